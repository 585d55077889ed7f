"""Fault 16: the archive spoilt in every way; it comes back by itself, and sessions and orders never notice."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from holdfast.archive.base import Archive, ArchiveDamaged
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_file import PAGE_BYTES
from holdfast.engine import Engine
from holdfast.settings import BackupSettings
from tests.crash.harness import FULL, SEED, Load, Recorder, complaints, do, reopened, report, serving, spread
from tests.crash.oracle import CONVERSATIONS, MESSAGES, Ledger, differences, found_in

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

LOG, INDEX = f"{ARCHIVE}-wal", f"{ARCHIVE}-shm"
CHANGES = 160
CUTS = 200 if FULL else 6
"""At least; the archive itself is cut in the middle of each page as well: what is missing then may be in its log."""
FLIPS = 600 if FULL else 10
KILLS = 60 if FULL else 4

BARE: dict[str, Any] = {"journal_keep": 0, "backups": BackupSettings(pitr=0)}
"""Settings with which nothing is kept behind a flush; what backups bring back is a test of its own."""

Spoil = Callable[[Path], object]


class Lived(NamedTuple):
    """A data directory as a killed process left it.

    Attributes:
        path: of it; not to be changed.
        older: what ``archive.db`` was some changes before.
        ledgers: what must be in it.
    """

    path: Path
    older: Path
    ledgers: list[Ledger]

    def copy(self, place: Path, spoil: Spoil) -> Path:
        """Another directory like it, but for what *spoil* does."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.path, place)
        spoil(place)
        return place


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One whose journal reaches back to the first event."""
    return _lived(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One whose journal holds nothing that a flush has put elsewhere."""
    return _lived(tmp_path_factory.mktemp("bare"), **BARE)


def _lived(base: Path, **settings: Any) -> Lived:
    data_dir, older = base / "used", base / "older.db"
    ledgers = [Ledger(client, SEED) for client in range(2)]
    engine = reopened(data_dir, **settings)
    _change(engine, ledgers, CHANGES)
    engine.flush("api")
    shutil.copy(data_dir / ARCHIVE, older)
    _change(engine, ledgers, CHANGES // 2)
    engine.flush("api")
    _change(engine, ledgers, CHANGES // 4)
    engine.transcripts.figures()
    shutil.copytree(data_dir, base / "left")
    engine.close(flush=False)
    assert (base / "left" / LOG).stat().st_size > 0
    return Lived(base / "left", older, ledgers)


def _change(engine: Engine, ledgers: Iterable[Ledger], count: int) -> None:
    for _ in range(count):
        for ledger in ledgers:
            do(engine, ledger.propose())
            ledger.acknowledge()


def _spoilt_whole(lived: Lived) -> Iterator[tuple[str, Spoil]]:
    """Ways in which the file as a whole is not what it was."""
    size = (lived.path / ARCHIVE).stat().st_size
    yield "gone", lambda place: _remove(place, ARCHIVE, LOG, INDEX)
    yield "gone, its log left behind", lambda place: _remove(place, ARCHIVE)
    yield "garbage", lambda place: (place / ARCHIVE).write_bytes(b"this is no database\n" * 400)
    yield "zeroed", lambda place: (place / ARCHIVE).write_bytes(bytes(size))
    yield "empty", lambda place: (place / ARCHIVE).write_bytes(b"")
    yield (
        "zeroed, without its log",
        lambda place: (_remove(place, LOG, INDEX), (place / ARCHIVE).write_bytes(bytes(size))),
    )
    yield "of an older moment", lambda place: (_remove(place, LOG, INDEX), shutil.copy(lived.older, place / ARCHIVE))
    for cut in sorted({*spread(size - 1, CUTS), *range(PAGE_BYTES // 2, size, PAGE_BYTES)}):
        yield f"cut at {cut} of {size}", lambda place, cut=cut: _cut(place / ARCHIVE, cut)


def _spoilt_log(lived: Lived) -> Iterator[tuple[str, Spoil]]:
    """Ways in which only what is beside the file is not what it was."""
    size = (lived.path / LOG).stat().st_size
    chance = random.Random(SEED)
    yield "log deleted", lambda place: _remove(place, LOG)
    yield "index deleted", lambda place: _remove(place, INDEX)
    yield "both deleted", lambda place: _remove(place, LOG, INDEX)
    yield "index garbage", lambda place: (place / INDEX).write_bytes(chance.randbytes(32768))
    yield "log garbage", lambda place: (place / LOG).write_bytes(chance.randbytes(size))
    for cut in [0, *spread(size - 1, CUTS)]:
        yield f"log cut at {cut} of {size}", lambda place, cut=cut: _cut(place / LOG, cut)
    for _ in range(FLIPS):
        bit = chance.randrange(size * 8)
        yield f"bit {bit} of the log flipped", lambda place, bit=bit: _flip(place / LOG, bit)


def test_the_archive_is_made_anew(kept: Lived, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lost, overwritten, cut, without its log or of another day: every word is there again, from the journal."""
    ways = [*_spoilt_whole(kept), *_spoilt_log(kept)]
    anew = 0
    for name, spoil in ways:
        data_dir = kept.copy(tmp_path / "data", spoil)
        log = Recorder()
        wrong = _wrong_in(data_dir, kept.ledgers, log)
        anew += "archive.rebuilt" in log.names() or "archive.damaged" in log.names()

        assert not wrong, (name, wrong[:5])
    report(
        capsys,
        f"archive spoilt in {len(ways)} ways, {anew} made anew: all there word by word, 0 sessions or orders changed",
    )


def test_flipped_bits(kept: Lived, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of the archive changes nothing outside of it; and once somebody noticed, the journal's words count."""
    size = (kept.path / ARCHIVE).stat().st_size
    chance = random.Random(SEED)
    noticed = 0
    for _ in range(FLIPS):
        bit = chance.randrange(size * 8)
        # Without its log, which has most of the pages once more.
        data_dir = kept.copy(
            tmp_path / "data", lambda place, bit=bit: (_remove(place, LOG, INDEX), _flip(place / ARCHIVE, bit))
        )
        log = Recorder()
        engine = reopened(data_dir, log)
        try:
            wrong = differences(kept.ledgers, found_in(engine, with_messages=False))
            complained = engine.transcripts.read(lambda archive: archive.check())
            noticed += bool(complained) or "archive.damaged" in log.names()
            _report_damage(engine)
            wrong += differences(kept.ledgers, found_in(engine)) + engine.degraded
        finally:
            engine.close()
        wrong += _wrong_in(data_dir, kept.ledgers)

        assert not wrong, (bit, wrong[:5])
    report(
        capsys,
        f"{FLIPS} bits of the archive flipped, {noticed} noticed by a check: 0 sessions or orders changed, 0 lost",
    )


def test_spoilt_while_it_runs(kept: Lived, tmp_path: Path) -> None:
    """Overwritten under the hands of the process that has it open: whoever reads waits a moment, nobody is told nonsense."""
    data_dir = kept.copy(tmp_path / "data", lambda place: None)
    log = Recorder()
    engine = reopened(data_dir, log)
    before = found_in(engine)
    with (data_dir / ARCHIVE).open("r+b") as file:
        file.write(bytes((data_dir / ARCHIVE).stat().st_size))

    assert engine.transcripts.read(lambda archive: archive.check()) or "archive.damaged" in log.names()
    _report_damage(engine)

    assert found_in(engine) == before
    assert engine.degraded == []
    engine.close()
    assert not _wrong_in(data_dir, kept.ledgers)


def test_what_is_lost_is_told(bare: Lived, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When the journal does not reach back: so many messages are missing as it says, none that the journal has, no head."""
    ways = [*_spoilt_whole(bare), *_spoilt_log(bare)]
    # The journal has whatever only the log holds.
    harmless = {name for name, _ in _spoilt_log(bare)}
    lost = losses = 0
    in_journal = _numbers_in_journal(bare.path / "journal")
    for name, spoil in ways:
        data_dir = bare.copy(tmp_path / "data", spoil)
        log = Recorder()
        engine = reopened(data_dir, log, **BARE)
        try:
            missing, wrong = _missing(engine, bare.ledgers, in_journal)
            wrong += differences(bare.ledgers, found_in(engine, with_messages=False))
            told = [fields["lost_messages"] for fields in log.fields("archive.rebuilt")]
            if missing != sum(told) or (missing > 0) != any(
                f"without {missing} messages" in one for one in engine.degraded
            ):
                wrong.append(f"{missing} messages are missing, told was {told}, {engine.degraded}")
            if missing and name in harmless:
                wrong.append(f"{missing} messages are missing for want of the log")
        finally:
            engine.close()
        wrong += _unsound(data_dir)
        lost, losses = lost + missing, losses + bool(missing)
        again = Recorder()
        engine = reopened(data_dir, again, **BARE)
        try:
            if _missing(engine, bare.ledgers, in_journal)[0] != missing:
                wrong.append("a second start has other messages")
            wrong += [name for name in again.names() if name.startswith("archive.")]
        finally:
            engine.close(flush=False)

        assert not wrong, (name, wrong[:5])
    assert losses > 3
    report(
        capsys,
        f"archive spoilt in {len(ways)} ways without history: {losses} told that {lost} messages are lost, exactly",
    )


def test_killed_and_spoilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon that is killed under load and whose archive is spoilt before it starts again serves every word."""
    data_dir = tmp_path / "data"
    ledgers = [Ledger(client, SEED) for client in range(3)]
    chance = random.Random(SEED)
    wrong: list[str] = []
    spoils: list[Callable[[], object]] = [
        lambda: _cut(data_dir / LOG, chance.randrange((data_dir / LOG).stat().st_size + 1)),
        lambda: _remove(data_dir, LOG),
        lambda: _cut(data_dir / ARCHIVE, chance.randrange((data_dir / ARCHIVE).stat().st_size)),
        lambda: _remove(data_dir, INDEX),
        lambda: (data_dir / ARCHIVE).write_bytes(chance.randbytes(30_000)),
    ]

    for round in range(KILLS):
        with serving(data_dir, "--set", "journal_max=64KiB", "--set", "flush_every=1s") as served:
            wrong += [f"round {round}: {complaint}" for complaint in differences(ledgers, served.found())]
            assert not wrong, wrong[:5]
            load = Load(served, ledgers)
            time.sleep(chance.uniform(0.1, 0.6))
            served.kill()
            load.join()
            assert not load.refused, load.refused[:3]
        spoils[round % len(spoils)]()
    with serving(data_dir) as served:
        wrong += differences(ledgers, served.found())
        assert served.stop() == 0

    assert not wrong, wrong[:5]
    assert not _wrong_in(data_dir, ledgers)
    acknowledged = sum(ledger.acknowledged for ledger in ledgers)
    report(capsys, f"{KILLS} of {KILLS} kills with a spoilt archive: {acknowledged} acknowledged, 0 lost, 0 doubled")


def _wrong_in(data_dir: Path, ledgers: list[Ledger], log: Recorder | None = None) -> list[str]:
    """What a start, and a second one, find wrong in *data_dir*."""
    wrong = complaints(data_dir, ledgers, log) + _unsound(data_dir)
    again = Recorder()
    wrong += [f"second start: {complaint}" for complaint in complaints(data_dir, ledgers, again)]
    return wrong + [f"second start: {name}" for name in again.names() if name.startswith("archive.")]


def _unsound(data_dir: Path) -> list[str]:
    with closing(sqlite3.connect(data_dir / ARCHIVE)) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchall()
    return [] if found == [("ok",)] else [f"integrity_check: {found}"]


def _report_damage(engine: Engine) -> None:
    """Say that the archive is damaged, and wait until it is made anew."""
    asked: list[Archive] = []

    def ask(archive: Archive) -> None:
        asked.append(archive)
        if len(asked) == 1:
            raise ArchiveDamaged("somebody looked through it")

    engine.transcripts.read(ask)


def _missing(engine: Engine, ledgers: list[Ledger], in_journal: dict[str, set[int]]) -> tuple[int, list[str]]:
    """How many messages are not there, and what should not be so."""
    found, missing, wrong = found_in(engine), 0, []
    for ledger in ledgers:
        for place, (_, fields) in ledger.records.items():
            if place[0] == CONVERSATIONS:
                there = {message["number"]: message for message in found.records[place][1][MESSAGES]}
                wrong += [f"{place} has {message}" for message in there.values() if message not in fields[MESSAGES]]
                absent = {message["number"] for message in fields[MESSAGES]} - there.keys()
                missing += len(absent)
                if absent & in_journal[place[1]]:
                    wrong.append(f"{place} lacks {sorted(absent & in_journal[place[1]])}, which the journal has")
    return missing, wrong


def _numbers_in_journal(journal: Path) -> dict[str, set[int]]:
    """The numbers of the messages that stand in the journal, by conversation."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for segment in sorted(journal.rglob("*.jsonl"), key=lambda path: path.name):
        for line in segment.read_bytes().splitlines():
            event = json.loads(line[9:])
            for one in event.get("events", [event]):
                if one["op"] == "message.append":
                    found[one["id"]] |= {message["number"] for message in one["messages"]}
                elif one["op"] == "conversation.delete":
                    found[one["id"]].clear()
    assert any(found.values())
    return found


def _remove(data_dir: Path, *names: str) -> None:
    for name in names:
        (data_dir / name).unlink(missing_ok=True)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
