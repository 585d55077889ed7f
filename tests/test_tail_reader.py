"""Following the journal: every event once, in order, from wherever one begins, and none that may be taken back."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.disk.files import Directory
from holdfast.disk.journal import KEPT, Journal, encode_line, segment_name
from holdfast.disk.tail import Tail, oldest_seq
from holdfast.errors import Gone

SEED = 20261121


def line(seq: int, chars: int = 20) -> bytes:
    return encode_line(b'{"seq":%d,"op":"%b"}' % (seq, b"x" * chars))


def write(path: Path, first: int, last: int, chars: int = 20) -> bytes:
    """A segment with these events; its content."""
    path.mkdir(exist_ok=True)
    content = b"".join(line(seq, chars) for seq in range(first, last + 1))
    (path / segment_name(first)).write_bytes(content)
    return content


def read_all(tail: Tail, last_seq: int, bytes_max: int = 1 << 16) -> list[int]:
    """The seqs that *tail* hands out until there is no more."""
    seqs: list[int] = []
    while lines := tail.read(last_seq, bytes_max):
        seqs += [one.seq for one in lines]
    return seqs


@pytest.fixture
def tails(tmp_path: Path) -> Iterator[list[Tail]]:
    """Tails that a test has made, to be closed behind it."""
    made: list[Tail] = []
    yield made
    for tail in made:
        tail.close()


def test_reading_begins_behind_any_event_of_any_segment(tmp_path: Path, tails: list[Tail]) -> None:
    """Whatever event one has seen last, the next ones follow, across segments, kept or not."""
    write(tmp_path / KEPT, 1, 9)
    write(tmp_path, 10, 40)
    write(tmp_path, 41, 41)
    write(tmp_path, 42, 60)

    for after in range(60):
        tail = Tail(tmp_path, after)
        tails.append(tail)

        assert read_all(tail, 60) == list(range(after + 1, 61)), after
        assert tail.position == 60


def test_places_are_found_by_halving_whatever_the_size_of_lines(tmp_path: Path, tails: list[Tail]) -> None:
    """Lines of 20 bytes beside lines of 100,000: each is found, with a look at a small part of the segment only."""
    rng = random.Random(SEED)
    content = b""
    for seq in range(1, 301):
        content += line(seq, rng.choice((1, 50, 3_000, 5_000, 100_000)))
    (tmp_path / segment_name(1)).write_bytes(content)
    looked: list[int] = []
    pread = os.pread

    for seq in range(1, 301):
        tail = Tail(tmp_path, seq - 1)
        tails.append(tail)
        looked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pread", lambda fd, size, at: looked.append(size) or pread(fd, size, at))
            lines = tail.read(300, 1)

        assert lines[0].seq == seq
        assert len(looked) < 300, len(looked)


def test_nothing_beyond_the_watermark_is_handed_out_or_believed(tmp_path: Path, tails: list[Tail]) -> None:
    """What is not final yet may be torn, cut off and written anew; the reader sees only the second version."""
    write(tmp_path, 1, 3)
    path = tmp_path / segment_name(1)
    tail = Tail(tmp_path, 0)
    tails.append(tail)
    with path.open("ab") as file:
        file.write(line(4, 500) + line(5)[:-7])
    assert read_all(tail, 3) == [1, 2, 3]
    assert tail.read(3) == []

    whole = b"".join(line(seq) for seq in (1, 2, 3))
    os.truncate(path, len(whole))
    with path.open("ab") as file:
        file.write(line(4, 7) + line(5, 9))

    assert [one.payload for one in tail.read(4)] == [line(4, 7)[9:-1]]
    assert [one.payload for one in tail.read(5)] == [line(5, 9)[9:-1]]


def test_one_call_hands_out_a_bounded_part(tmp_path: Path, tails: list[Tail]) -> None:
    """About as many bytes as asked for; a longer line comes alone and whole."""
    write(tmp_path, 1, 100)
    write(tmp_path, 101, 101, chars=300_000)
    write(tmp_path, 102, 103)
    tail = Tail(tmp_path, 0)
    tails.append(tail)
    size = len(line(10))

    first = tail.read(103, 10 * size)
    assert 9 <= len(first) <= 11
    read_all(tail, 100)

    assert [len(one.payload) > 300_000 for one in tail.read(103, 1000)] == [True]
    assert read_all(tail, 103) == [102, 103]


def test_a_segment_removed_while_it_is_read_is_read_to_its_end(tmp_path: Path, tails: list[Tail]) -> None:
    """Its descriptor stays good; only what comes after it can be missing."""
    write(tmp_path, 1, 50)
    write(tmp_path, 51, 60)
    tail = Tail(tmp_path, 10)
    tails.append(tail)
    tail.read(60, 1)

    (tmp_path / segment_name(1)).unlink()

    assert read_all(tail, 60) == list(range(12, 61))


def test_pruned_events_are_gone_with_the_oldest_named(tmp_path: Path, tails: list[Tail]) -> None:
    """Whether they were missing from the start or went while one read."""
    write(tmp_path, 51, 60)
    behind = Tail(tmp_path, 10)
    with pytest.raises(Gone, match=r"event 11 is no longer in the journal.*after event 50") as gone:
        behind.read(60)
    assert gone.value.oldest_seq == 51
    assert behind.position == 10

    write(tmp_path, 41, 45)
    overtaken = Tail(tmp_path, 40)
    tails.append(overtaken)
    with pytest.raises(Gone) as gone:
        read_all(overtaken, 60)
    assert overtaken.position == 45
    assert gone.value.oldest_seq == 51
    assert oldest_seq(tmp_path) == 41


@pytest.mark.parametrize("damaged", [1, 7, 10])
def test_a_damaged_event_is_never_passed_over(tmp_path: Path, tails: list[Tail], damaged: int) -> None:
    """Those before it are handed out, then the reader says that it cannot go on and with which event it could."""
    content = bytearray(write(tmp_path, 1, 10))
    write(tmp_path, 11, 12)
    content[content.index(b'"seq":%d,' % damaged) + 10] ^= 1
    (tmp_path / segment_name(1)).write_bytes(content)
    tail = Tail(tmp_path, 0)
    tails.append(tail)
    seqs: list[int] = []

    with pytest.raises(Gone, match=f"event {damaged} is damaged") as gone:
        while True:
            seqs += [one.seq for one in tail.read(12)]

    assert seqs == list(range(1, damaged))
    assert gone.value.oldest_seq == 11


def test_a_reader_beside_a_writer_gets_everything_once(tmp_path: Path, tails: list[Tail]) -> None:
    """While batches are written, cut back, rotated, kept and removed, as long as what it needs is not removed."""
    journal = Journal(Directory(tmp_path), {}, 1, new_segment=True)
    tail = Tail(tmp_path, 0)
    tails.append(tail)
    committed = 0
    rng = random.Random(SEED)

    def work() -> None:
        nonlocal committed
        seq = 0
        for _ in range(600):
            count = rng.randint(1, 40)
            journal.append(
                b"".join(line(one, rng.randint(0, 200)) for one in range(seq + 1, seq + count + 1)), seq + count
            )
            seq += count
            committed = seq
            if rng.random() < 0.1:
                journal.rotate()
                journal.retire(committed, tail.position + 1, rng.choice((0, 20_000)))
        journal.close()

    writer = threading.Thread(target=work)
    seqs: list[int] = []
    writer.start()
    while writer.is_alive() or tail.position < committed:
        seqs += [one.seq for one in tail.read(committed, 5_000)]
    writer.join()

    assert seqs == list(range(1, committed + 1))
    assert committed > 5_000
