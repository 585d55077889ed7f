"""A disk that fills is told before it is full, and one that has room again is noticed without anybody's op."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.care import space as space_module
from holdfast.care.space import BUCKET_S, Growth, SpaceWatch, Usage, parts_of
from holdfast.errors import StorageFull
from holdfast.ops import SessionPut
from tests.crash.harness import mount, mounted, needs_root
from tests.engine_harness import HandClock, Log, do, running

MIB = 1 << 20
WAIT_S = 10.0


def grown(*spans: int) -> Growth:
    """What is known after spans in which so many bytes were taken."""
    growth, free, at_s = Growth(), 1 << 40, 0.0
    growth.note(at_s, free)
    for taken in spans:
        free, at_s = free - taken, at_s + BUCKET_S
        growth.note(at_s, free)
    return growth


def test_a_steady_growth_is_the_rate() -> None:
    """After a quarter of an hour; before, nothing is said."""
    assert grown(*[300 * MIB] * 2).bytes_s is None
    assert grown(*[300 * MIB] * 3).bytes_s == pytest.approx(MIB)
    assert grown(*[300 * MIB] * 200).bytes_s == pytest.approx(MIB)


def test_one_burst_is_no_rate() -> None:
    """A backup, or a file that somebody copies, does not fill the disk by tomorrow; nor does removing one empty it."""
    assert grown(*[0] * 10, 50_000 * MIB, 0, 0).bytes_s == pytest.approx(0)
    assert grown(*[300 * MIB] * 10, -50_000 * MIB, *[300 * MIB] * 2).bytes_s == pytest.approx(MIB)


def test_what_is_recent_weighs_most() -> None:
    """An hour after it began to grow ten times as fast most of that is seen; a day later nothing is left of before."""
    slow, fast = 30 * MIB, 300 * MIB

    assert 3.0 < grown(*[slow] * 72, *[fast] * 12).bytes_s / (slow / BUCKET_S) < 10  # type: ignore[operator]
    assert grown(*[slow] * 72, *[fast] * 288).bytes_s == pytest.approx(fast / BUCKET_S)


def test_each_part_is_told_with_its_files(tmp_path: Path) -> None:
    """By what it takes of the disk; what several sets share counts once; what is unknown stands under other."""
    sizes = {
        "chat_sessions.json": 5_000,
        "journal/00000000000000000001.jsonl": 9_000,
        "journal/kept/00000000000000000000.jsonl": 4_096,
        "archive.db": 40_960,
        "archive.db-wal": 4_096,
        "backups/2026-11-20T140300.000Z/archive.db.zst": 40_000,
        "backups/journal/1-2.jsonl.zst": 100,
        "backups/start-2026-11-20T140300.000Z/users.json": 100,
        "conversations/1.json": 100,
        "quarantine/a/b": 100,
        "holdfast.lock": 0,
    }
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    second = tmp_path / "backups" / "2026-11-21T140300.000Z"
    second.mkdir()
    os.link(tmp_path / "backups/2026-11-20T140300.000Z/archive.db.zst", second / "archive.db.zst")
    (tmp_path / "quarantine" / "link").symlink_to("/etc")

    parts = parts_of(tmp_path)

    def usage(*names: str, files: int = 0) -> Usage:
        taken = sum((tmp_path / name).stat().st_blocks * 512 for name in names)
        return Usage(taken, files or len(names))

    assert parts["snapshots"] == usage("chat_sessions.json")
    assert parts["journal"] == usage("journal/00000000000000000001.jsonl")
    assert parts["kept"] == usage("journal/kept/00000000000000000000.jsonl")
    assert parts["archive"] == usage("archive.db", "archive.db-wal")
    assert parts["backups"] == usage("backups/2026-11-20T140300.000Z/archive.db.zst", files=2)
    assert parts["history"] == usage("backups/journal/1-2.jsonl.zst")
    assert parts["copies kept"].files == parts["mirror"].files == parts["other"].files == 1
    assert parts["quarantine"].files == 2


@contextmanager
def watched(tmp_path: Path, size: str) -> Iterator[tuple[SpaceWatch, HandClock, Log, Path]]:
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        clock, log = HandClock(), Log()
        yield SpaceWatch(disk, clock.monotonic, log), clock, log, disk


@needs_root
@pytest.mark.root
def test_a_disk_that_fills_is_told_once_before_it_is_full(tmp_path: Path) -> None:
    """With the hours that are left; when there is room again, that is told once as well."""
    with watched(tmp_path, "64m") as (watch, clock, log, disk):
        for number in range(8):
            (disk / f"grows{number}").write_bytes(b"x" * MIB)
            watch.look(16 * MIB)
            clock.advance(BUCKET_S)
        told = log.named("disk.filling")
        assert len(told) == 1
        # 1 MiB each five minutes, with 58 or so left.
        assert 4.0 < told[0]["hours_left"] < 5.5
        assert told[0]["free_bytes"] > 50 * MIB
        assert not watch.complaint

        for number in range(8):
            (disk / f"grows{number}").unlink()
        for _ in range(80):
            clock.advance(BUCKET_S)
            watch.look(16 * MIB)

        assert len(log.named("disk.filling")) == len(log.named("disk.room_returned")) == 1


@needs_root
@pytest.mark.root
def test_little_room_is_degraded_until_there_is_more(tmp_path: Path) -> None:
    """Not at the border to and fro: a quarter more has to be free. limits.disk_free, or a twentieth of a small disk."""
    with watched(tmp_path, "100m") as (watch, clock, log, disk):
        for free_mib, is_low in ((6, False), (4, True), (5.5, True), (7, False), (5.5, False)):
            (disk / "filler").write_bytes(b"x" * int((100 - free_mib) * MIB - 65_536))
            clock.advance(5)
            watch.look(1 << 30)

            assert watch.space.is_low == is_low, free_mib
            assert ("nearly full" in watch.complaint) == is_low
            (disk / "filler").unlink()
        assert len(log.named("disk.filling")) == 1


@needs_root
@pytest.mark.root
def test_no_files_left_is_as_bad_as_no_room(tmp_path: Path) -> None:
    """The words say which of the two it is; with limits.disk_free = 0 nobody is bothered."""
    with mounted(tmp_path / "disk", "size=8m,nr_inodes=100") as disk:
        for number in range(96):
            (disk / str(number)).touch()
        watch = SpaceWatch(disk, HandClock().monotonic, Log())

        watch.look(1 << 30)
        assert "more files only" in watch.complaint
        watch.look(0)
        assert not watch.complaint


@needs_root
@pytest.mark.root
def test_a_full_disk_with_room_again_is_noticed_without_an_op(tmp_path: Path) -> None:
    """/readyz does not say full until somebody writes, and does not say otherwise as long as it is."""
    log = Log()
    with mounted(tmp_path / "disk", "size=1m") as disk, running(disk / "data", log=log) as engine:
        (disk / "filler").write_bytes(b"")
        with pytest.raises(StorageFull), (disk / "filler").open("ab", buffering=0) as filler:
            while True:
                try:
                    filler.write(b"x" * 4096)
                except OSError:
                    do(engine, SessionPut(id="1", value={"text": "x" * 9_000}))
        engine.look_at_disk()
        time.sleep(0.2)
        assert any("the disk is full" in reason for reason in engine.degraded)

        mount("-o", "remount,size=4m", str(disk))
        engine.look_at_disk()

        until = time.monotonic() + WAIT_S
        while any("the disk is full" in reason for reason in engine.degraded):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert len(log.named("journal.writes_resumed")) == 1
        assert not list((disk / "data").glob(".room*"))
        do(engine, SessionPut(id="1", value={}))


def test_a_limit_on_the_size_of_files_is_not_taken_for_room(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, like a quota, does not show in the free room: what is tried is a file as large as the journal's."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        for number in range(20):
            do(engine, SessionPut(id=str(number), value={"text": "x" * 9_000}))
        segment = max((tmp_path / "journal").glob("*.jsonl"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (segment.stat().st_size + 100, limits[1]))
        try:
            with pytest.raises(StorageFull):
                do(engine, SessionPut(id="0", value={"text": "x" * 9_000}))
            for _ in range(3):
                engine.look_at_disk()
                time.sleep(0.1)
            assert not log.named("journal.writes_resumed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        engine.look_at_disk()

        until = time.monotonic() + WAIT_S
        while not log.named("journal.writes_resumed"):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_the_status_tells_room_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the last look: asking walks through nothing."""
    with running(tmp_path) as engine:
        assert engine.status()["parts"] == {}
        engine.look_at_disk()
        monkeypatch.setattr(space_module, "parts_of", lambda *_: pytest.fail("walked again"))
        engine.look_at_disk()

        status = engine.status()

    assert status["parts"]["journal"]["files"] >= 1
    assert 0 < status["disk"]["free_bytes"] <= status["disk"]["size_bytes"]
