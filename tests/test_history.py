"""The history: every event that is still somewhere, in order, or the gap by its numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.care.history import History, HistoryGap, holes_of
from holdfast.care.packing import pack
from holdfast.clock import format_ms
from holdfast.disk.journal import KEPT, encode_line, segment_name

MINUTE_MS = 60_000


def line(seq: int) -> bytes:
    """An event that happened in the minute of its seq."""
    return encode_line(
        b'{"seq":%d,"at":"%b","op":"session.delete","id":"x"}' % (seq, format_ms(seq * MINUTE_MS).encode())
    )


def lines(first: int, last: int) -> bytes:
    return b"".join(line(seq) for seq in range(first, last + 1))


def segment(data_dir: Path, first: int, last: int, *, kept: bool = False) -> Path:
    place = data_dir / "journal" / KEPT if kept else data_dir / "journal"
    place.mkdir(parents=True, exist_ok=True)
    path = place / segment_name(first)
    path.write_bytes(lines(first, last))
    return path


def packed(data_dir: Path, first: int, last: int) -> Path:
    place = data_dir / "backups" / "journal"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{first:020d}-{last:020d}.jsonl.zst"
    path.write_bytes(b"".join(pack([lines(first, last)])))
    os.utime(path, ns=(0, last * MINUTE_MS * 1_000_000))
    return path


def seqs(found: Iterator[tuple[int, bytes]]) -> list[int]:
    return [seq for seq, _ in found]


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Events 1 to 10 packed, 11 to 20 kept, 21 to 30 in the journal."""
    packed(tmp_path, 1, 10)
    segment(tmp_path, 11, 20, kept=True)
    segment(tmp_path, 21, 30)
    return History(tmp_path)


def test_events_come_in_order_from_all_places(history: History) -> None:
    """Packed, kept or in the journal: it is one history."""
    assert seqs(history.lines(0, 30)) == list(range(1, 31))
    assert seqs(history.lines(7, 24)) == list(range(8, 25))
    assert seqs(history.lines(30, 30)) == []


def test_its_parts_say_what_they_hold_and_when_it_happened(history: History) -> None:
    """Without unpacking more than the head of each."""
    found = [(part.first_seq, part.last_seq, part.first_at, part.last_at, part.is_packed) for part in history.parts()]

    assert found == [
        (1, 10, 1 * MINUTE_MS, 10 * MINUTE_MS, True),
        (11, 20, 11 * MINUTE_MS, 20 * MINUTE_MS, False),
        (21, 30, 21 * MINUTE_MS, 30 * MINUTE_MS, False),
    ]


def test_a_moment_is_found_to_the_event(history: History) -> None:
    """At or before it; between two events the earlier one; before and behind everything as well."""
    for seq in range(1, 31):
        assert history.seq_at(seq * MINUTE_MS, 0) == seq
        assert history.seq_at(seq * MINUTE_MS + 1, 0) == seq
        assert history.seq_at(seq * MINUTE_MS - 1, 0) == seq - 1
    assert history.seq_at(99 * MINUTE_MS, 0) == 30
    assert history.seq_at(3 * MINUTE_MS, 12) == 12


def test_what_is_missing_is_named(history: History, tmp_path: Path) -> None:
    """The events before the gap were handed out."""
    (tmp_path / "journal" / KEPT / segment_name(11)).unlink()
    got = []

    with pytest.raises(HistoryGap) as raised:
        for seq, _ in history.lines(5, 30):
            got.append(seq)

    assert got == [6, 7, 8, 9, 10]
    assert (raised.value.first, raised.value.last) == (11, 20)


def test_events_beyond_the_last_one_are_a_gap(history: History) -> None:
    """Whoever asks for more than there is learns it."""
    with pytest.raises(HistoryGap) as raised:
        list(history.lines(20, 35))

    assert (raised.value.first, raised.value.last) == (31, 35)


def test_where_one_copy_is_damaged_the_other_serves(history: History, tmp_path: Path) -> None:
    """A segment is packed before it is given up, so for a while it stands twice."""
    path = packed(tmp_path, 11, 20)
    kept = tmp_path / "journal" / KEPT / segment_name(11)
    whole = kept.read_bytes()
    for place in range(0, len(whole), 37):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])

        assert seqs(history.lines(0, 30)) == list(range(1, 31))

    path.write_bytes(path.read_bytes()[:-20])
    kept.write_bytes(whole)
    assert seqs(history.lines(0, 30)) == list(range(1, 31))


def test_damage_without_a_second_copy_is_a_gap_from_there(history: History, tmp_path: Path) -> None:
    """A changed byte costs no more than what stands behind it in that file."""
    kept = tmp_path / "journal" / KEPT / segment_name(11)
    whole = kept.read_bytes()
    kept.write_bytes(whole.replace(line(14), line(14).replace(b"delete", b"deletf")))

    with pytest.raises(HistoryGap) as raised:
        list(history.lines(0, 30))

    assert (raised.value.first, raised.value.last) == (14, 20)


def test_an_unfinished_last_line_is_no_event(history: History, tmp_path: Path) -> None:
    """The journal is written while it is read."""
    newest = tmp_path / "journal" / segment_name(21)
    newest.write_bytes(lines(21, 30) + line(31)[:-9])

    assert history.parts()[-1].last_seq == 30
    assert seqs(history.lines(28, 30)) == [29, 30]


def test_a_directory_without_anything_has_no_history(tmp_path: Path) -> None:
    """Neither files nor directories are needed to ask."""
    history = History(tmp_path)

    assert history.parts() == []
    assert history.seq_at(5, 0) == 0


@pytest.mark.parametrize(
    ("gone", "holes"),
    [
        ([], []),
        (["backups/journal/*"], []),  # that is where it begins
        (["journal/kept/*"], [(11, 20)]),
        (["journal/0*"], [(21, 30)]),
        (["journal/kept/*", "journal/0*"], [(11, 30)]),
    ],
)
def test_holes_are_found_by_names_and_ends(history: History, tmp_path: Path, gone: list[str], holes: object) -> None:
    """In the middle and at the end; nothing is unpacked for that."""
    for pattern in gone:
        for path in tmp_path.glob(pattern):
            if path.is_file():
                path.unlink()

    assert holes_of(history.parts(), 30, ()) == holes


def test_a_segment_does_not_stand_for_one_that_is_missing_behind_it(tmp_path: Path) -> None:
    """Where its last event can be read, that is its end, whatever begins next."""
    segment(tmp_path, 1, 10, kept=True)
    segment(tmp_path, 21, 30)

    assert holes_of(History(tmp_path).parts(), 30, ()) == [(11, 20)]


def test_numbers_of_restored_states_are_no_holes(history: History, tmp_path: Path) -> None:
    """No event has them; what is missing around them is."""
    (tmp_path / "journal" / KEPT / segment_name(11)).unlink()

    assert holes_of(history.parts(), 32, range(11, 21)) == [(31, 32)]
    assert holes_of(history.parts(), 32, [5, 14, 32]) == [(11, 13), (15, 20), (31, 31)]
