"""The journal: what is written comes back, what is torn is cut, what is damaged is loud."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.disk.files import Directory
from holdfast.disk.journal import (
    KEPT,
    Damage,
    Journal,
    decode_line,
    encode_line,
    read_history,
    read_lines,
    segment_name,
)
from holdfast.errors import JournalBroken, StorageFull
from tests.engine_harness import Disk


def line(seq: int, text: str = "x") -> bytes:
    return encode_line(b'{"seq":%d,"op":"%b"}' % (seq, text.encode()))


def lines(first: int, last: int) -> bytes:
    return b"".join(line(seq) for seq in range(first, last + 1))


def written(path: Path, content: bytes, first_seq: int = 1) -> None:
    (path / segment_name(first_seq)).write_bytes(content)


def seqs(path: Path) -> list[int]:
    with Directory(path) as directory:
        return [found.seq for found in read_history(directory, 0).lines]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty journal."""
    opened = Journal(Directory(tmp_path), {}, 1, new_segment=True)
    try:
        yield opened
    finally:
        opened.close()


# Writing.


def test_events_come_back_in_order(journal: Journal, tmp_path: Path) -> None:
    """Batches, segments and a rotation between them are one history."""
    journal.append(lines(1, 3), 3)
    journal.rotate()
    journal.append(line(4), 4)
    journal.sync()

    assert seqs(tmp_path) == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [segment_name(1), segment_name(4)]
    assert (journal.written_seq, journal.synced_seq, journal.segments) == (4, 4, 2)


def test_a_line_is_checksum_space_json() -> None:
    """The format that tail, cut and jq rely on."""
    encoded = encode_line(b'{"seq":1,"op":"x"}')

    assert encoded[8:9] == b" " and encoded.endswith(b"}\n")
    assert int(encoded[:8], 16) >= 0
    assert decode_line(encoded[:-1]) == b'{"seq":1,"op":"x"}'


def test_every_flipped_bit_of_a_line_is_noticed() -> None:
    """In the checksum, in the space, in the JSON."""
    whole = line(7, "order.put")[:-1]
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8

        assert decode_line(bytes(broken)) is None


def test_rotating_an_empty_segment_does_nothing(journal: Journal) -> None:
    """Flushes without changes leave no trail of empty files."""
    journal.rotate()
    journal.append(line(1), 1)
    journal.rotate()
    journal.rotate()

    assert journal.segments == 2


def names_in(path: Path) -> list[str]:
    """The segments in *path*, oldest first."""
    return sorted(one.name for one in path.iterdir() if one.suffix == ".jsonl") if path.exists() else []


@pytest.mark.parametrize(
    ("covered", "left"), [(0, [1, 4, 7]), (2, [1, 4, 7]), (3, [4, 7]), (5, [4, 7]), (6, [7]), (99, [7])]
)
def test_retiring_leaves_every_event_that_no_snapshot_has(
    journal: Journal, tmp_path: Path, covered: int, left: list[int]
) -> None:
    """Whole segments up to the covered seq go; the newest always stays, since its name says where seq stands."""
    for first in (1, 4):
        journal.append(lines(first, first + 2), first + 2)
        journal.rotate()

    retired = journal.retire(covered, needed_seq=covered + 1, keep_bytes=0)

    assert names_in(tmp_path) == [segment_name(first) for first in left]
    assert not names_in(tmp_path / KEPT)
    assert retired == 3 - len(left)


@pytest.mark.parametrize(
    ("needed", "keep_segments", "kept"),
    [
        (10, 0, []),
        (10, 1, [7]),
        (10, 2, [4, 7]),
        (10, 9, [1, 4, 7]),
        (9, 0, [7]),
        (7, 0, [7]),
        (6, 1, [4, 7]),
        (1, 0, [1, 4, 7]),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_readers_find_what_they_need_and_what_there_is_room_for(
    journal: Journal, tmp_path: Path, needed: int, keep_segments: int, kept: list[int], at_once: bool
) -> None:
    """Of the retired segments the newest that fit are kept, and all that somebody needs, whether they went at once or
    one after the other; the journal's size does not count them."""
    size = len(lines(1, 3))
    for first in (1, 4, 7):
        journal.append(lines(first, first + 2), first + 2)
        journal.rotate()
        if not at_once:
            journal.retire(first + 2, min(needed, first + 3), keep_segments * size)

    journal.retire(9, needed, keep_segments * size)

    assert names_in(tmp_path / KEPT) == [segment_name(first) for first in kept]
    assert names_in(tmp_path) == [segment_name(10)]
    assert journal.kept_bytes == len(kept) * size
    assert journal.size_bytes == 0


def test_what_is_kept_is_known_again_after_a_restart(journal: Journal, tmp_path: Path) -> None:
    """Its size counts against the same bound, and a history whose numbers are used again is given up."""
    journal.append(lines(1, 3), 3)
    journal.rotate()
    journal.retire(3, 4, 1 << 20)
    (tmp_path / KEPT / segment_name(4)).write_bytes(lines(4, 9))

    again = Journal(Directory(tmp_path), {4: 0}, 4, new_segment=False)

    assert again.kept_bytes == len(lines(1, 3))
    assert names_in(tmp_path / KEPT) == [segment_name(1)]
    again.retire(3, 4, 0)
    assert not names_in(tmp_path / KEPT)
    again.close()


def test_files_are_readable_by_their_owner_only(journal: Journal, tmp_path: Path) -> None:
    """0600, whatever the umask."""
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


# A disk that does not take it.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_refuses_the_batch_whole(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Nothing of it is in the file, and the next batch goes where it would have gone."""
    journal.append(line(1), 1)
    write = os.write
    taken: list[int] = []

    def write_some(fd: int, data: bytes) -> int:
        # As Linux does it: a part fits, then nothing more.
        if taken:
            raise OSError(number, os.strerror(number))
        taken.append(write(fd, data[:10]))
        return taken[0]

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(StorageFull):
        journal.append(lines(2, 4), 4)
    monkeypatch.setattr(os, "write", write)
    journal.append(line(2, "y"), 2)

    assert (tmp_path / segment_name(1)).read_bytes() == line(1) + line(2, "y")


def test_a_lying_short_write_is_written_again_whole(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest never follows a part that may not be there."""
    write = os.write
    calls: list[int] = []

    def write_part(fd: int, data: bytes) -> int:
        calls.append(len(data))
        return 7 if len(calls) == 1 else write(fd, data)

    monkeypatch.setattr(os, "write", write_part)
    journal.append(lines(1, 3), 3)

    assert (tmp_path / segment_name(1)).read_bytes() == lines(1, 3)


@pytest.mark.parametrize("call", ["write", "ftruncate"])
def test_a_file_that_cannot_be_put_right_accepts_nothing_more(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """EIO while writing, or while cutting back a part."""

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    if call == "ftruncate":
        monkeypatch.setattr(os, "write", lambda fd, data: 3)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(JournalBroken):
        journal.append(line(1), 1)
    monkeypatch.undo()

    attempts: list[Callable[[], None]] = [lambda: journal.append(line(1), 1), journal.sync, journal.rotate]
    for attempt in attempts:
        with pytest.raises(JournalBroken):
            attempt()


def test_a_failed_sync_is_never_retried(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would report success without the data."""
    disk = Disk(monkeypatch)
    disk.fail_sync()
    journal.append(line(1), 1)
    with pytest.raises(JournalBroken):
        journal.sync()
    with pytest.raises(JournalBroken):
        journal.sync()

    assert disk.syncs == 1
    assert journal.synced_seq == 0


def test_no_room_for_a_segment_leaves_the_old_one_in_use(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation that fails for want of room costs nothing."""
    journal.append(line(1), 1)
    fsync = os.fsync

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        journal.rotate()
    monkeypatch.setattr(os, "fsync", fsync)
    journal.append(line(2), 2)
    journal.sync()

    assert [path.name for path in tmp_path.iterdir()] == [segment_name(1)]
    assert seqs(tmp_path) == [1, 2]


# Reading what a crash left.


def test_wherever_a_crash_cuts_the_last_event_those_before_it_come_back(tmp_path: Path) -> None:
    """A torn tail is told as such, and nothing else is wrong."""
    whole = lines(1, 3)
    for cut in range(len(lines(1, 2)) + 1, len(whole)):
        written(tmp_path, whole[:cut])
        with Directory(tmp_path) as directory:
            history = read_history(directory, 0)

        assert [found.seq for found in history.lines] == [1, 2]
        assert history.torn is not None and history.torn.offset == len(lines(1, 2))
        assert (history.damages, history.gaps) == ([], [])


@pytest.mark.parametrize(
    ("tail", "is_torn"),
    [
        (b"\0" * 100, True),
        (line(4)[:20] + b"\0" * 50, True),
        (line(4)[:20] + b"\0" * 50 + b"\n", True),
        (line(2) + line(3), True),
        (line(4)[:-1], True),
        (line(4).replace(b'"x"', b'"y"'), False),
        (b"garbage\n", False),
        (b"\n", False),
    ],
    ids=["zeros", "zeros in a line", "zeros before a newline", "stale", "no newline", "flipped", "garbage", "blank"],
)
def test_an_unfinished_write_is_told_from_damage(tmp_path: Path, tail: bytes, is_torn: bool) -> None:
    """Zeros, a missing newline, or older events behind the tail are what crashes leave; anything else was acknowledged."""
    written(tmp_path, lines(1, 3) + tail)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert [found.seq for found in history.lines] == [1, 2, 3]
    assert (history.torn is not None, bool(history.damages)) == (is_torn, not is_torn)


@pytest.mark.parametrize("tail", [line(4)[:15], b"\0" * 64, line(4)[:15] + b"\0" * 64])
def test_a_torn_tail_does_not_hide_damage_before_it(tmp_path: Path, tail: bytes) -> None:
    """A whole line with a wrong checksum is corruption, also when the very next line is unfinished."""
    damaged = line(3).replace(b'"x"', b'"y"')
    written(tmp_path, lines(1, 2) + damaged + tail)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    name = segment_name(1)
    assert history.damages == [Damage(name, len(lines(1, 2)), len(damaged), "checksum does not hold")]
    assert history.torn is not None
    assert (history.torn.offset, history.torn.bytes) == (len(lines(1, 2) + damaged), len(tail))


def test_damage_in_the_middle_costs_only_itself(tmp_path: Path) -> None:
    """Every event whose checksum holds comes back; the hole is named."""
    content = bytearray(lines(1, 9))
    content[len(lines(1, 4)) + 15] ^= 1
    written(tmp_path, bytes(content))
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert [found.seq for found in history.lines] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert history.gaps == [(5, 5)]
    assert [damage.offset for damage in history.damages] == [len(lines(1, 4))]


@pytest.mark.parametrize(
    ("segments", "after", "gaps"),
    [
        ({1: lines(1, 3), 7: lines(7, 9)}, 0, [(4, 6)]),
        ({4: lines(4, 6)}, 0, [(1, 3)]),
        ({4: lines(4, 6)}, 3, []),
        ({4: lines(4, 6)}, 5, []),
        ({4: lines(4, 6)}, 1, [(2, 3)]),
        ({1: lines(1, 3), 9: b""}, 0, [(4, 8)]),
        ({1: lines(1, 3), 4: b""}, 0, []),
        ({}, 5, []),
    ],
)
def test_missing_segments_are_named(
    tmp_path: Path, segments: dict[int, bytes], after: int, gaps: list[tuple[int, int]]
) -> None:
    """What the snapshot holds is no gap; everything else that is missing is, to the seq."""
    for first, content in segments.items():
        written(tmp_path, content, first)
    with Directory(tmp_path) as directory:
        assert read_history(directory, after).gaps == gaps


def test_a_doubled_segment_doubles_nothing(tmp_path: Path) -> None:
    """Each event counts once, and the copy is reported."""
    written(tmp_path, lines(1, 3))
    written(tmp_path, lines(1, 3), 4)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert [found.seq for found in history.lines] == [1, 2, 3]
    assert history.torn is not None or history.damages


def test_swapped_segments_lose_nothing(tmp_path: Path) -> None:
    """Events come back by their seq, not by their file; the wrong names are reported."""
    written(tmp_path, lines(4, 6), 1)
    written(tmp_path, lines(1, 3), 4)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert history.damages
    assert [found.seq for found in history.lines] == [1, 2, 3, 4, 5, 6]


def test_a_wrongly_named_segment_with_a_damaged_first_line_is_read_on(tmp_path: Path) -> None:
    """Its other events are as good under any name."""
    written(tmp_path, line(1).replace(b'"x"', b'"y"') + lines(2, 3), 4)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert [found.seq for found in history.lines] == [2, 3]
    assert history.damages and history.gaps == [(1, 1)]


def test_two_different_events_of_one_seq_are_damage(tmp_path: Path) -> None:
    """Two histories were mixed; the first one stands, and it is said."""
    written(tmp_path, lines(1, 3))
    written(tmp_path, line(3, "other") + line(4), 3)
    with Directory(tmp_path) as directory:
        history = read_history(directory, 0)

    assert [found.seq for found in history.lines] == [1, 2, 3, 4]
    assert history.lines[2].payload == decode_line(line(3)[:-1])
    assert any("different event 3" in damage.reason for damage in history.damages)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    """Only names of segments count."""
    written(tmp_path, lines(1, 2))
    (tmp_path / "notes.jsonl").write_bytes(line(3))
    (tmp_path / "00000000000000000003.jsonl.bak").write_bytes(line(3))

    assert seqs(tmp_path) == [1, 2]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    """A journal in use can be dumped, torn tail included."""
    written(tmp_path, lines(1, 2) + b"torn")
    before = (tmp_path / segment_name(1)).read_bytes()

    found = list(read_lines(tmp_path))

    assert len(found) == 3 and isinstance(found[-1], Damage)
    assert (tmp_path / segment_name(1)).read_bytes() == before
