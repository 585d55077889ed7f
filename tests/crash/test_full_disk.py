"""Fault 10: no room, wherever an event or a flush meets it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from holdfast.archive.place import ARCHIVE
from holdfast.engine import Engine
from holdfast.errors import StorageFull, Unavailable
from holdfast.ops import MessageAppend, RecordPut, SessionPut
from tests.crash.harness import (
    FULL,
    SEED,
    Load,
    Recorder,
    complaints,
    do,
    mount,
    mounted,
    needs_root,
    reopened,
    report,
    serving,
)
from tests.crash.oracle import Ledger, differences, found_in

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

RESUMES_S = 5.0


@needs_root
@pytest.mark.root
def test_full_at_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a disk of any size: the journal ends on a whole event, writes are refused, reads go on, room brings them back."""
    sizes = range(64 if FULL else 8)
    refusals, slowest_s = 0, 0.0
    for size in sizes:
        # Not a whole number of pages, so that the end of the disk cuts another byte of another event each time.
        with mounted(tmp_path / f"disk{size}", f"size={256 + 16 * size}k") as disk:
            ledger = Ledger(0, f"{SEED}:{size}")
            log = Recorder()
            engine = reopened(disk / "data", log)
            _pad_journal(engine, size * 97)
            refusals += _fill_up(engine, ledger)

            journal = max((disk / "data" / "journal").glob("*.jsonl")).read_bytes()
            assert journal.endswith(b"\n") and b"\0" not in journal
            assert not differences([ledger], found_in(engine, with_messages=False))
            assert "journal.disk_filled" in log.names()

            mount("-o", "remount,size=4m", str(disk))
            slowest_s = max(slowest_s, _resume(engine, ledger))
            assert not differences([ledger], found_in(engine))
            _wait_until_healthy(engine)
            engine.close()
            assert not complaints(disk / "data", [ledger])
    report(
        capsys,
        f"{len(sizes)} of {len(sizes)} disk sizes: {refusals} ops refused, 0 lost; writes back {slowest_s * 1000:.0f} ms "
        "after the room",
    )


def test_full_at_every_byte_of_an_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that may not grow in the middle of an event, at whichever byte: it is refused and leaves no trace."""
    ledger = Ledger(0, SEED)
    engine = reopened(tmp_path / "data")
    _many(engine, ledger, 5)
    segment = max((tmp_path / "data" / "journal").glob("*.jsonl"))
    before = segment.stat().st_size
    _many(engine, ledger, 1, together=3)
    event_bytes = segment.stat().st_size - before

    for room in range(event_bytes if FULL else min(event_bytes, 120)):
        whole = segment.read_bytes()
        with _largest_file(len(whole) + room), pytest.raises(StorageFull):
            engine.submit(SessionPut(id="c9-no", value={"text": "x" * event_bytes})).wait()
        assert segment.read_bytes() == whole
        assert engine.get("sessions", "c9-no") is None
        _many(engine, ledger, 1)

    assert not differences([ledger], found_in(engine))
    engine.close()
    assert not complaints(tmp_path / "data", [ledger])
    report(capsys, f"no room at {room + 1} of {room + 1} bytes of an event: refused each time, no byte of it left")


@needs_root
@pytest.mark.root
def test_full_during_a_flush(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flush without room leaves the old snapshot and the whole journal; the one after it succeeds."""
    failed = 0
    rounds = 30 if FULL else 6
    for number in range(rounds):
        with mounted(tmp_path / f"disk{number}", "size=1m") as disk:
            ledger = Ledger(0, f"{SEED}:{number}")
            engine = reopened(disk / "data")
            _many(engine, ledger, 40)
            engine.flush("api")
            _many(engine, ledger, 40)
            # From no room at all to a page less than it takes.
            _use_up(disk, leave_pages=number % 12)
            snapshot_seq, journal = engine.status()["snapshot_seq"], engine.status()["journal_bytes"]
            try:
                engine.flush("api")
            except (StorageFull, OSError):
                failed += 1
                assert engine.status()["snapshot_seq"] == snapshot_seq
                assert engine.status()["journal_bytes"] == journal
                assert any("flush failed" in reason for reason in engine.degraded)
                assert not [path.name for path in (disk / "data").iterdir() if path.name.endswith(".tmp")]
            assert not differences([ledger], found_in(engine, with_messages=False))

            (disk / "ballast").unlink()
            engine.flush("api")
            _many(engine, ledger, 5)
            _wait_until_healthy(engine)
            engine.close(flush=False)
            assert not complaints(disk / "data", [ledger])
    assert failed
    report(
        capsys,
        f"{failed} of {rounds} flushes found no room: old snapshot kept, journal kept, 0 lost, the next one succeeded",
    )


@needs_root
@pytest.mark.root
def test_the_archive_finds_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the journal or after it: no op is refused for its sake, who reads is told soon, and with room it has all."""
    monkeypatch.setattr("holdfast.archive.follower.RETRY_S", 0.2)
    long = "x" * 150_000
    # From too little for the journal to enough for the archive as well.
    rooms = range(0, 120, 3 if FULL else 20)
    stalled = answered = unavailable = 0
    slowest_s = 0.0
    for pages in rooms:
        with mounted(tmp_path / f"disk{pages}", "size=2m") as disk:
            ledger = Ledger(0, f"{SEED}:{pages}")
            log = Recorder()
            engine = reopened(disk / "data", log, journal_keep=0)
            _many(engine, ledger, 60)
            assert not differences([ledger], found_in(engine))
            engine.flush("api")
            _use_up(disk, leave_pages=pages)

            with suppress(StorageFull):
                engine.submit(MessageAppend(id="long", role="user", content=long)).wait()
            _fill_up(engine, ledger)
            assert not differences([ledger], found_in(engine, with_messages=False))
            started = time.monotonic()
            try:
                assert not differences([ledger], found_in(engine))
                answered += 1
            except Unavailable as error:
                unavailable += 1
                assert "no room" in str(error)
                assert any("archive cannot be written" in reason for reason in engine.degraded)
            slowest_s = max(slowest_s, time.monotonic() - started)
            # Also a flush without room, whose checkpoint the archive owes.
            with suppress(StorageFull, OSError):
                engine.flush("api")
            stalled += "archive.stalled" in log.names()

            (disk / "ballast").unlink()
            _resume(engine, ledger)
            assert not differences([ledger], found_in(engine))
            engine.flush("api")
            _wait_until_healthy(engine)
            assert log.names().count("archive.stalled") == log.names().count("archive.resumed")
            assert engine.status()["journal_bytes"] == 0
            assert not list((disk / "data" / "journal").glob("kept/*.jsonl"))
            engine.close()
            assert not complaints(disk / "data", [ledger])
    assert stalled and answered and unavailable
    assert slowest_s < RESUMES_S
    report(
        capsys,
        f"{len(rooms)} disks full: the archive stalled on {stalled}; transcripts read on {answered}, on {unavailable} told "
        f"within {slowest_s:.1f} s that there is no room; caught up on each, 0 lost",
    )


@needs_root
@pytest.mark.root
def test_full_while_the_archive_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else works meanwhile; once there is room it is there, whole, and nothing half made is left."""
    monkeypatch.setattr("holdfast.archive.follower.RETRY_S", 0.2)
    rooms = [4, 8, 14, 22] if not FULL else range(2, 40)
    stalled = refused = 0
    for number, pages in enumerate(rooms):
        with mounted(tmp_path / f"disk{pages}", "size=2m") as disk:
            ledger = Ledger(0, f"{SEED}:{pages}")
            engine = reopened(disk / "data")
            _many(engine, ledger, 120)
            # So small a disk keeps no history, so what was not flushed is all that the journal has.
            engine.close(flush=False)
            archive = disk / "data" / ARCHIVE
            archive.write_bytes(b"no database" * 200) if number % 2 else archive.unlink()
            _use_up(disk, leave_pages=pages)

            log = Recorder()
            try:
                engine = reopened(disk / "data", log)
            except (StorageFull, OSError):
                refused += 1  # there is no room even for a new segment
                (disk / "ballast").unlink()
                engine = reopened(disk / "data", log)
            else:
                assert not differences([ledger], found_in(engine, with_messages=False))
                time.sleep(0.2)
                stalled += "archive.stalled" in log.names()
                (disk / "ballast").unlink()
            assert not differences([ledger], found_in(engine))
            _many(engine, ledger, 5)
            _wait_until_healthy(engine)
            assert not list((disk / "data").glob("archive.rebuild*"))
            engine.close()
            assert not complaints(disk / "data", [ledger])
    assert stalled
    report(capsys, f"no room to make an archive anew on {stalled} of {len(rooms)} disks: whole once there was, 0 lost")


@needs_root
@pytest.mark.root
def test_inodes_used_up(tmp_path: Path) -> None:
    """Without room for another file flushes fail, writes go on, and both work again when there is."""
    with mounted(tmp_path / "disk", "size=4m,nr_inodes=64") as disk:
        ledger = Ledger(0, SEED)
        engine = reopened(disk / "data")
        _many(engine, ledger, 20)
        taken: list[Path] = []
        try:
            while True:
                taken.append(disk / f"file{len(taken)}")
                taken[-1].touch()
        except OSError:
            taken.pop()

        with pytest.raises((StorageFull, OSError)):
            engine.flush("api")
        _many(engine, ledger, 20)
        for path in taken:
            path.unlink()
        engine.flush("api")

        assert engine.degraded == []
        engine.close()
        assert not complaints(disk / "data", [ledger])


def test_the_limit_of_file_sizes(tmp_path: Path) -> None:
    """Under RLIMIT_FSIZE a flush that would exceed it fails, and nothing is lost."""
    ledger = Ledger(0, SEED)
    engine = reopened(tmp_path / "data")
    _many(engine, ledger, 30)
    engine.submit(RecordPut(collection="large", id="x", value={"text": "y" * 20_000})).wait()

    with _largest_file(10_000), pytest.raises(StorageFull):
        engine.flush("api")
    engine.flush("api")

    assert not differences([ledger], found_in(engine))
    engine.close()
    assert not complaints(tmp_path / "data", [ledger])


@needs_root
@pytest.mark.root
def test_the_daemon_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It answers 507, goes on reading, resumes by itself within 5 s of room, and loses nothing."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        ledgers = [Ledger(client, SEED) for client in range(4)]
        with serving(disk / "data") as served:
            _use_up(disk, leave_pages=40)
            load = Load(served, ledgers)
            _wait_for(lambda: len(load.refused) > 50)
            assert all(status == 507 and b"storage_full" in body for status, body in load.refused)
            with served.connect() as client:
                assert client.ask("GET", "/v1/sessions")[0] == 200
                assert "disk is full" in client.ask("GET", "/readyz")[1].decode()
            before = sum(ledger.acknowledged for ledger in ledgers)
            (disk / "ballast").unlink()
            room_at = time.monotonic()
            _wait_for(lambda: sum(ledger.acknowledged for ledger in ledgers) > before)
            took_s = time.monotonic() - room_at
            load.stop()
            assert not differences(ledgers, served.found())
            assert served.stop() == 0
        assert took_s < RESUMES_S
        assert not complaints(disk / "data", ledgers)
    report(
        capsys,
        f"daemon on a full disk: {len(load.refused)} refused with 507, 0 lost, resumed {took_s * 1000:.0f} ms after the room",
    )


@needs_root
@pytest.mark.root
def test_stopped_on_a_full_disk(tmp_path: Path) -> None:
    """SIGTERM without room for the final flush: exit 1, the last log line says so, everything is there afterwards."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        ledgers = [Ledger(client, SEED) for client in range(2)]
        with serving(disk / "data") as served:
            load = Load(served, ledgers)
            _wait_for(lambda: sum(ledger.acknowledged for ledger in ledgers) > 100)
            load.stop()
            _use_up(disk, leave_pages=0)
            code = served.stop()
            last = served.events()[-1]
        (disk / "ballast").unlink()

        assert code == 1
        assert last["event"] == "daemon.failed" and "no room" in last["reason"]
        assert not complaints(disk / "data", ledgers)


def _many(engine: Engine, ledger: Ledger, count: int, *, together: int | None = None) -> None:
    for _ in range(count):
        do(engine, ledger.propose(together=together))
        ledger.acknowledge()


def _pad_journal(engine: Engine, size: int) -> None:
    engine.submit(RecordPut(collection="pad", id="x", value={"text": "p" * size})).wait()


def _fill_up(engine: Engine, ledger: Ledger) -> int:
    """Change things until nothing fits any more; how many changes were refused."""
    refused = 0
    while refused < 20:
        try:
            do(engine, ledger.propose())
        except StorageFull:
            ledger.refuse()
            refused += 1
        else:
            ledger.acknowledge()
    return refused


def _resume(engine: Engine, ledger: Ledger) -> float:
    started = time.monotonic()
    while True:
        try:
            do(engine, ledger.propose())
        except StorageFull:
            ledger.refuse()
            assert time.monotonic() - started < RESUMES_S, "writes did not resume"
        else:
            ledger.acknowledge()
            # What was proposed may change nothing, and only a change shows that there is room again.
            _pad_journal(engine, 1)
            return time.monotonic() - started


def _use_up(disk: Path, *, leave_pages: int) -> None:
    """Fill *disk* but for *leave_pages* pages."""
    page = resource.getpagesize()
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(b"\0" * page) == page:
                pass
        except OSError:
            pass
        ballast.truncate(max(0, ballast.tell() - leave_pages * page))


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond *size* bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _wait_until_healthy(engine: Engine) -> None:
    """The archive tries again each second."""
    _wait_for(lambda: not engine.degraded, lambda: f"still degraded: {engine.degraded}")


def _wait_for(
    condition: Callable[[], bool],
    complaint: Callable[[], str] = lambda: "it did not come to it",
    deadline_s: float = 30.0,
) -> None:
    ends_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends_at, complaint()
        time.sleep(0.01)
