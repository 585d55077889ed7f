"""Services, intervals and the watch on the settings file."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs
from structlog.typing import EventDict
from watchdog.observers.api import EventQueue, ObservedWatch

from holdfast.service import watch
from holdfast.service.supervisor import RETRY_S_MAX, Interval, Supervisor
from holdfast.service.threads import in_thread
from holdfast.service.watch import FileWatch


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[EventDict]]:
    """The events logged during the test."""
    structlog.reset_defaults()
    with capture_logs() as events:
        yield events


class Recorder:
    """A service that tells a shared list what happens to it."""

    stop_deadline_s = 1.0

    def __init__(self, name: str, told: list[str], *, fails: bool = False) -> None:
        self.name = name
        self._told = told
        self._fails = fails

    async def start(self) -> None:
        if self._fails:
            raise OSError("no room")
        self._told.append(f"+{self.name}")

    async def stop(self) -> None:
        self._told.append(f"-{self.name}")


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> float:
    """Wait until *condition* holds; how many seconds that took."""
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() - started_at < deadline_s, "waited in vain"
        await asyncio.sleep(0.01)
    return time.monotonic() - started_at


def test_services_start_in_the_order_they_were_added() -> None:
    """What was added first runs first, and is listed as running."""
    told: list[str] = []
    supervisor = Supervisor([Recorder("a", told)])
    supervisor.add(Recorder("b", told))

    asyncio.run(supervisor.start())

    assert told == ["+a", "+b"]
    assert [service.name for service in supervisor.running] == ["a", "b"]


def test_a_failed_start_stops_what_was_started(logged: list[EventDict]) -> None:
    """A service that does not start has those before it stopped, newest first; its error is raised."""
    told: list[str] = []
    services = [Recorder("a", told), Recorder("b", told), Recorder("c", told, fails=True), Recorder("d", told)]
    supervisor = Supervisor(services)

    with pytest.raises(OSError, match="no room"):
        asyncio.run(supervisor.start())

    assert told == ["+a", "+b", "-b", "-a"]
    assert supervisor.running == ()
    assert next((e["service"], e["reason"]) for e in logged if e["event"] == "service.start_failed") == ("c", "no room")


def test_an_interval_repeats_coroutines_and_functions() -> None:
    """Both kinds of action run again and again; a function runs outside the event loop's thread."""
    ran: list[str] = []

    async def on_the_loop() -> None:
        ran.append(threading.current_thread().name)

    def in_a_thread() -> None:
        ran.append(threading.current_thread().name)

    async def main() -> None:
        intervals = [Interval("one", 0.01, on_the_loop), Interval("two", 0.01, in_a_thread)]
        for interval in intervals:
            await interval.start()
        await until(lambda: ran.count("MainThread") > 2 and ran.count("two") > 2)
        for interval in intervals:
            await interval.stop()

    asyncio.run(main())

    assert {"MainThread", "two"} == set(ran)


def test_an_interval_that_raises_goes_on(logged: list[EventDict]) -> None:
    """A failure is logged, and the next run comes."""
    runs = 0

    def fail_twice() -> None:
        nonlocal runs
        runs += 1
        if runs <= 2:
            raise ValueError("573001234567")

    async def main() -> None:
        interval = Interval("often", 0.01, fail_twice)
        await interval.start()
        await until(lambda: runs > 3)
        await interval.stop()

    asyncio.run(main())

    assert [(e["interval"], e["reason"]) for e in logged if e["event"] == "interval.failed"] == [
        ("often", "ValueError")
    ] * 2


def test_an_interval_that_keeps_failing_slows_down() -> None:
    """The pause doubles with each failure up to a minute, and is never shorter than its period."""
    interval, slow = Interval("a", 1, lambda: None), Interval("b", 300, lambda: None)

    pauses = []
    for failures in range(9):
        interval._failures = slow._failures = failures
        pauses.append(interval.pause_s)

    assert pauses == [1, 2, 4, 8, 16, 32, RETRY_S_MAX, RETRY_S_MAX, RETRY_S_MAX]
    assert slow.pause_s == 300


def test_an_interval_never_overlaps_itself() -> None:
    """A run that takes longer than the period delays the next one."""
    now_running, most_running = 0, 0

    async def slow() -> None:
        nonlocal now_running, most_running
        now_running += 1
        most_running = max(most_running, now_running)
        await asyncio.sleep(0.03)
        now_running -= 1

    async def main() -> None:
        interval = Interval("slow", 0.001, slow)
        await interval.start()
        await asyncio.sleep(0.2)
        await interval.stop()

    asyncio.run(main())

    assert (most_running, now_running) == (1, 0)


def test_stopping_an_interval_finishes_its_run() -> None:
    """stop waits for a run under way, and cuts a pause short."""
    finished = threading.Event()
    began = threading.Event()

    def work() -> None:
        began.set()
        time.sleep(0.1)
        finished.set()

    async def main() -> float:
        interval, pausing = Interval("work", 0.01, work), Interval("pause", 1000, work)
        await interval.start()
        await pausing.start()
        await until(began.is_set)
        started_at = time.monotonic()
        await interval.stop()
        await pausing.stop()
        return time.monotonic() - started_at

    assert asyncio.run(main()) < 5
    assert finished.is_set()


@pytest.mark.parametrize(
    "raised", [ValueError("x"), SystemExit(1), StopIteration()], ids=lambda one: type(one).__name__
)
def test_a_thread_that_raises_tells_its_caller(raised: BaseException) -> None:
    """Whatever work raises reaches the caller as an error that does not end the event loop."""

    def work() -> None:
        raise raised

    with pytest.raises((ValueError, RuntimeError), match=r"x|work raised (SystemExit|StopIteration)"):
        asyncio.run(in_thread("work", work))


# The watch on the settings file.


class Watched:
    """A settings file under watch, with the number of times a change was reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.reported_at = 0.0

    async def changed(self) -> None:
        self.count += 1
        self.reported_at = time.monotonic()

    async def settled(self) -> int:
        """How often a change was reported, once nothing comes any more."""
        await until(lambda: self.count > 0)
        await asyncio.sleep(watch.SETTLE_S * 2 + 0.2)
        count, self.count = self.count, 0
        return count


def watching(path: Path, scenario: Callable[[Watched], Awaitable[None]], **options: object) -> None:
    """Run *scenario* while *path* is watched."""

    async def main() -> None:
        watched = Watched(path)
        service = FileWatch([path], watched.changed, **options)  # type: ignore[arg-type]
        await service.start()
        try:
            await scenario(watched)
        finally:
            await service.stop()

    asyncio.run(main())


def replace(path: Path, content: str) -> None:
    temporary = path.with_name("editor.tmp")
    temporary.write_text(content)
    temporary.replace(path)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is of Linux")
def test_an_event_while_the_watch_stops_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the library would say of it is dropped, and nothing else that it says."""
    from watchdog.observers.inotify import InotifyEmitter

    emitter = InotifyEmitter(EventQueue(), ObservedWatch(str(tmp_path), recursive=False))

    emitter.queue_events(0)
    logging.getLogger("watchdog.observers.inotify").error("something else")

    assert [entry.getMessage() for entry in caplog.records] == ["something else"]


def test_a_burst_of_changes_is_reported_once(tmp_path: Path) -> None:
    """A hundred changes a second are one report, within a second of the last of them."""
    path = tmp_path / "holdfast.toml"
    path.write_text("")

    async def scenario(watched: Watched) -> None:
        for number in range(150):
            replace(path, "#" * number)
            last_at = time.monotonic()
            await asyncio.sleep(0.01)
        assert await watched.settled() == 1
        print(f"reported {watched.reported_at - last_at:.2f} s after the last of 150 changes")
        assert watched.reported_at - last_at < 1

    watching(path, scenario)


def test_a_file_that_vanishes_and_returns_is_reported(tmp_path: Path) -> None:
    """Removing the file is a change, so is its return."""
    path = tmp_path / "holdfast.toml"
    path.write_text("")

    async def scenario(watched: Watched) -> None:
        path.unlink()
        assert await watched.settled() == 1
        path.write_text("mirror = true")
        assert await watched.settled() == 1

    watching(path, scenario)


def test_a_directory_made_anew_is_watched_again(tmp_path: Path) -> None:
    """When the whole directory is replaced, changes in the new one are noticed."""
    path = tmp_path / "etc" / "holdfast.toml"
    path.parent.mkdir()
    path.write_text("")

    async def scenario(watched: Watched) -> None:
        shutil.rmtree(path.parent)
        assert await watched.settled() == 1
        path.parent.mkdir()
        path.write_text("a")
        assert await watched.settled() == 1
        path.write_text("ab")
        assert await watched.settled() == 1

    watching(path, scenario)


def test_a_link_pointed_elsewhere_is_reported(tmp_path: Path) -> None:
    """Swapping a symbolic link in the path, as Kubernetes does, is a change; so is a change behind the link."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "holdfast.toml").write_text(name)
    data = tmp_path / "data"
    data.symlink_to("one")
    path = tmp_path / "holdfast.toml"
    path.symlink_to("data/holdfast.toml")

    async def scenario(watched: Watched) -> None:
        swap = tmp_path / "swap"
        swap.symlink_to("two")
        os.replace(swap, data)
        assert await watched.settled() == 1
        await asyncio.sleep(watch.CHECK_S)
        (tmp_path / "two" / "holdfast.toml").write_text("two, changed")
        assert await watched.settled() == 1

    watching(path, scenario)


def test_reading_and_touching_neighbours_is_no_change(tmp_path: Path) -> None:
    """Only the file itself counts."""
    path = tmp_path / "holdfast.toml"
    path.write_text("x")

    async def scenario(watched: Watched) -> None:
        for number in range(20):
            path.read_text()
            (tmp_path / f"other-{number}").write_text("y")
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert watched.count == 0

    watching(path, scenario)


def test_without_inotify_it_polls(tmp_path: Path, logged: list[EventDict]) -> None:
    """When the system refuses to watch, the file is polled, and the log says so once."""
    path = tmp_path / "holdfast.toml"
    path.write_text("x")

    def refused() -> object:
        raise OSError(24, "inotify instance limit reached")

    async def scenario(watched: Watched) -> None:
        path.write_text("changed")
        assert await watched.settled() == 1

    watching(path, scenario, observer=refused)

    assert [event["event"] for event in logged] == ["config.watch_degraded"]
