"""Fault 12: a journal cut, flipped, zeroed, shuffled: always noticed, never more lost than is damaged."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from holdfast.disk.files import Directory
from holdfast.disk.journal import History, JournalLine, encode_line, read_history, segment_name
from tests.crash.harness import FULL, SEED, Recorder, contents, do, reopened, report
from tests.crash.oracle import Ledger, differences, found_in

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

EVENTS = 40


class Written(NamedTuple):
    """A data directory with one segment that no snapshot covers.

    Attributes:
        path: the data directory.
        segment: the file name of the journal's newest segment.
        raw: its content.
        ends: where each event ends.
        lines: its events.
        snapshot_seq: what the snapshots hold.
    """

    path: Path
    segment: str
    raw: bytes
    ends: list[int]
    lines: list[JournalLine]
    snapshot_seq: int

    def journal(self, raw: bytes) -> History:
        """What is read when the segment holds *raw*."""
        (self.path / "journal" / self.segment).write_bytes(raw)
        with Directory(self.path / "journal") as directory:
            return read_history(directory, self.snapshot_seq)

    def ledger(self, events: int) -> Ledger:
        """The ledger of a life that ended after the first *events* of the segment."""
        ledger = Ledger(0, SEED, repeats=False)
        for _ in range(self.snapshot_seq + events):
            ledger.propose()
            ledger.acknowledge()
        return ledger


@pytest.fixture
def written(tmp_path: Path) -> Written:
    ledger = Ledger(0, SEED, repeats=False)
    engine = reopened(tmp_path / "data")
    for _ in range(EVENTS):
        do(engine, ledger.propose())
        ledger.acknowledge()
    report = engine.flush("api")
    for _ in range(EVENTS):
        do(engine, ledger.propose())
        ledger.acknowledge()
    engine.close(flush=False)
    segment = max((tmp_path / "data" / "journal").glob("*.jsonl"))
    raw = segment.read_bytes()
    ends = [index + 1 for index, byte in enumerate(raw) if byte == 0x0A]
    with Directory(segment.parent) as directory:
        lines = read_history(directory, report.snapshot_seq).lines
    assert len(ends) == len(lines) == EVENTS
    return Written(tmp_path / "data", segment.name, raw, ends, lines, report.snapshot_seq)


def test_truncated_at_every_byte(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the newest segment is cut, exactly the whole events before the cut are read, and the rest is a torn tail."""
    near_ends = {end + step for end in (0, *written.ends) for step in range(-3, 4)}
    # Otherwise every third, and all of the last two events, which are the ones that a crash cuts.
    cuts = [
        cut for cut in range(len(written.raw) + 1) if FULL or cut % 3 == 0 or cut in near_ends or cut > written.ends[-3]
    ]
    for cut in cuts:
        history = written.journal(written.raw[:cut])

        whole = sum(end <= cut for end in written.ends)
        assert history.lines == written.lines[:whole], cut
        assert not history.damages and not history.gaps, cut
        torn = cut - (written.ends[whole - 1] if whole else 0)
        assert (history.torn.bytes if history.torn else 0) == torn, cut
    report(
        capsys, f"cut at {len(cuts)} of {len(written.raw) + 1} bytes: every whole event read, every torn tail noticed"
    )


def test_a_torn_tail_is_cut_off(written: Written) -> None:
    """A start after a torn write keeps every whole event, cuts the rest, says so, and is not degraded."""
    for cut in _some(range(written.ends[-2] + 1, written.ends[-1]), 12):
        written.journal(written.raw[:cut])
        log = Recorder()

        engine = reopened(written.path, log)

        assert not differences([written.ledger(EVENTS - 1)], found_in(engine))
        assert log.fields("journal.tail_dropped") == [{"bytes": cut - written.ends[-2], "segment": written.segment}]
        assert engine.degraded == []
        engine.close(flush=False)


def test_every_bit_flipped(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever bit changes, it is noticed, no changed event is believed, and every other event is read."""
    window = min(1024, written.ends[-2])
    start = (written.ends[-2] - window) // 2
    places = [*range(start, start + window), *range(written.ends[-2], len(written.raw))]
    noticed = 0
    for place in places:
        # Two bits of each byte, other ones in the next; CRC-32 notices them all alike.
        for bit in range(8) if FULL else (place % 4, 4 + place % 4):
            flipped = bytearray(written.raw)
            flipped[place] ^= 1 << bit

            history = written.journal(bytes(flipped))

            assert history.damages or history.torn, (place, bit)
            noticed += 1
            hit = sum(end <= place for end in written.ends)
            # A newline that is gone joins an event to the next one.
            spoiled = {hit, hit + 1} if written.raw[place] == 0x0A else {hit}
            intact = [line for index, line in enumerate(written.lines) if index not in spoiled]
            assert [line for line in history.lines if line in intact] == intact, (place, bit)
            assert set(history.lines) <= set(written.lines), (place, bit)
            if hit < EVENTS - 1:
                assert history.damages and history.gaps, (place, bit)
    report(capsys, f"{noticed} of {noticed} flipped bits noticed, 0 changed events believed")


def test_a_flipped_bit_is_loud(written: Written) -> None:
    """Damage before the tail: the evidence is kept, an error is logged, /readyz has a reason, all other events are there."""
    chance = random.Random(SEED)
    pristine = contents(written.path)
    for place in [chance.randrange(written.ends[-2]) for _ in range(100 if FULL else 8)]:
        flipped = bytearray(written.raw)
        flipped[place] ^= 1 << chance.randrange(8)
        written.journal(bytes(flipped))
        log = Recorder()

        engine = reopened(written.path, log)

        hit = sum(end <= place for end in written.ends)
        seq = written.lines[hit].seq
        assert any(str(seq) in reason and "missing" in reason for reason in engine.degraded), engine.degraded
        assert log.fields("journal.damaged")
        assert any(kept == bytes(flipped) for kept in contents(written.path / "quarantine").values())
        engine.close()
        again = Recorder()
        engine = reopened(written.path, again)
        assert engine.degraded == [] and not again.fields("journal.damaged")
        engine.close(flush=False)
        _put_back(written, pristine)


@pytest.mark.parametrize("zeros", [1, 8, 511, 4096, 70_000])
def test_zeros_after_the_tail(written: Written, zeros: int) -> None:
    """Blocks that were allocated and never written are a torn tail: nothing is lost, nobody is alarmed."""
    for cut in (len(written.raw), len(written.raw) - 20, written.ends[-2]):
        whole = EVENTS if cut == len(written.raw) else EVENTS - 1
        written.journal(written.raw[:cut] + bytes(zeros))
        log = Recorder()

        engine = reopened(written.path, log)

        assert not differences([written.ledger(whole)], found_in(engine))
        assert engine.degraded == []
        assert len(log.fields("journal.tail_dropped")) == 1
        engine.close(flush=False)
        assert (written.path / "journal" / written.segment).read_bytes() == written.raw[: written.ends[whole - 1]]


def test_stale_events_behind_the_tail(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """Valid events of an earlier use of the same blocks are never replayed."""
    tried = 0
    for first in _some(range(EVENTS - 3), 30):
        stale = written.raw[(written.ends[first - 1] if first else 0) : written.ends[first + 2]]
        for glue in (b"", b"\0" * 40):
            history = written.journal(written.raw + glue + stale)
            tried += 1

            assert history.lines == written.lines
            assert history.torn is not None or history.damages
    # Of a segment that was pruned long ago.
    pruned = encode_line(b'{"seq":3,"at":"2026-11-21T06:00:00.000Z","op":"stats.order"}')
    assert written.journal(written.raw + pruned).lines == written.lines
    report(capsys, f"stale events behind the tail: {tried} of {tried} noticed, 0 replayed")


def test_segments_missing_doubled_swapped(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """A segment that is missing, stands twice, or holds another one's events is named."""
    journal = written.path / "journal"
    cuts = [written.ends[9], written.ends[19], written.ends[29]]
    parts = [written.raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(written.raw)], strict=True)]
    seqs = [written.lines[index].seq for index in (0, 10, 20, 30)]
    shutil.rmtree(journal)
    journal.mkdir(mode=0o700)
    names = [segment_name(seq) for seq in seqs]

    def read(layout: dict[str, bytes]) -> History:
        for path in journal.iterdir():
            path.unlink()
        for name, raw in layout.items():
            (journal / name).write_bytes(raw)
        with Directory(journal) as directory:
            return read_history(directory, written.snapshot_seq)

    whole = dict(zip(names, parts, strict=True))
    assert read(whole) == History(
        {seq: len(part) for seq, part in zip(seqs, parts, strict=True)}, written.lines, None, [], []
    )
    noticed = 0
    for index in range(3):
        history = read({name: raw for name, raw in whole.items() if name != names[index]})
        assert history.gaps == [(seqs[index], seqs[index + 1] - 1)]
        assert history.lines == written.lines[: 10 * index] + written.lines[10 * index + 10 :]
        # The same, but an empty file stands in its place.
        history = read(whole | {names[index]: b""})
        assert history.gaps == [(seqs[index], seqs[index + 1] - 1)]
        noticed += 2
    for index in range(4):
        doubled = read(whole | {segment_name(seqs[index] + 3): parts[index]})
        assert doubled.lines == written.lines and doubled.damages, index
        twice = read(whole | {names[index]: parts[index] * 2})
        assert twice.lines == written.lines and (twice.damages or twice.torn), index
        noticed += 2
    for one, other in ((0, 1), (1, 2), (0, 3)):
        swapped = read(whole | {names[one]: parts[other], names[other]: parts[one]})
        assert swapped.lines == written.lines and swapped.damages, (one, other)
        noticed += 1
    report(capsys, f"segments missing, empty, doubled, swapped: {noticed} of {noticed} noticed, every gap named")


def test_a_doubled_segment_is_set_right(written: Written) -> None:
    """After a start with a segment that stands twice the next one is healthy, and new events are where they belong."""
    journal = written.path / "journal"
    (journal / segment_name(written.lines[5].seq)).write_bytes(written.raw)
    ledger = written.ledger(EVENTS)
    engine = reopened(written.path)
    assert engine.degraded
    do(engine, ledger.propose())
    ledger.acknowledge()
    engine.close(flush=False)

    engine = reopened(written.path)

    assert engine.degraded == []
    assert not differences([ledger], found_in(engine))
    engine.close()


def test_a_missing_segment_is_loud(written: Written) -> None:
    """A start without a segment says which events are gone; the rest is there, and the next start is healthy again."""
    (written.path / "journal" / written.segment).unlink()
    log = Recorder()

    engine = reopened(written.path, log)

    assert engine.degraded and "journal is missing" in engine.degraded[0]
    assert not differences([written.ledger(0)], found_in(engine))
    engine.close()
    engine = reopened(written.path)
    assert engine.degraded == []
    engine.close()


def test_strict_recovery_touches_nothing(written: Written) -> None:
    """With recovery = "strict" a damaged journal is refused, and not a byte changes."""
    from holdfast.errors import DataRefused

    flipped = bytearray(written.raw)
    flipped[30] ^= 1
    written.journal(bytes(flipped))
    before = contents(written.path)

    with pytest.raises(DataRefused, match=written.segment):
        reopened(written.path, recovery="strict")

    assert contents(written.path) == before


def _some(places: range, short: int) -> list[int]:
    return list(places) if FULL else [places[index * len(places) // short] for index in range(short)]


def _put_back(written: Written, files: dict[str, bytes]) -> None:
    shutil.rmtree(written.path)
    for name, raw in files.items():
        path = written.path / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(raw)
