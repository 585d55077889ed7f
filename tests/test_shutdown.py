"""The stop: its order, its deadlines, and what hangs or fails on the way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs
from structlog.typing import EventDict

from holdfast.errors import StorageFull
from holdfast.service import shutdown
from holdfast.service.shutdown import FinalStep, ShutdownManager, State
from holdfast.service.systemd import Notifier


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[EventDict]]:
    """The events logged during the test."""
    structlog.reset_defaults()
    with capture_logs() as events:
        yield events


class Case:
    """A process with services *a*, *b*, *c* that tells what happens while it stops."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.told: list[str] = []
        self.was_given_up = threading.Event()
        self.manager = ShutdownManager(timeout_s=timeout_s, notifier=Notifier({}), last_resort=self.was_given_up.set)
        self.manager.running()
        self.services: list[Service] = [Service(name, self) for name in "abc"]
        self.final_steps = self.manager.final_steps
        self.final_steps += [
            FinalStep("flush", lambda: self.told.append("flush")),
            FinalStep("lock", lambda: self.told.append("lock")),
        ]
        self.duration_s = 0.0

    async def stop_accepting(self) -> None:
        self.told.append("accepting")

    async def finish_requests(self) -> None:
        self.told.append("requests")

    async def stop(self) -> bool:
        started_at = time.monotonic()
        self.manager.request("SIGTERM")
        clean = await self.manager.stop(
            stop_accepting=self.stop_accepting,
            finish_requests=self.finish_requests,
            services=self.services,
        )
        self.duration_s = time.monotonic() - started_at
        return clean


class Service:
    """One that stops at once, unless *behave* does something else."""

    stop_deadline_s = 0.3

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        self._case = case
        self.behave: Any = None

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self._case.told.append(self.name)
        if self.behave is not None:
            await self.behave()


IN_ORDER = ["accepting", "requests", "c", "b", "a", "flush", "lock"]


async def hang() -> None:
    await asyncio.sleep(3600)


async def hang_and_refuse_to_be_cancelled() -> None:
    ends_at = time.monotonic() + 4
    while time.monotonic() < ends_at:
        try:
            await asyncio.sleep(4)
        except asyncio.CancelledError:
            continue


async def hang_in_a_thread() -> None:
    """A job that nobody can end."""
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 2)


async def fail() -> None:
    raise ValueError("573001234567")


async def exit_at_once() -> None:
    raise SystemExit(7)


def told_events(logged: list[EventDict], *names: str) -> list[EventDict]:
    return [event for event in logged if event["event"] in names]


def test_the_order_is_that_of_the_contract(logged: list[EventDict]) -> None:
    """Accepting ends, requests finish, services stop newest first, the flush is last but for the lock."""
    case = Case()

    clean = asyncio.run(case.stop())

    assert clean and case.told == IN_ORDER
    assert State.SHUTDOWN_COMPLETE is case.manager.state
    assert ["shutdown.started", *["service.stopped"] * 5, "shutdown.completed"] == [e["event"] for e in logged]
    assert logged[0]["signal"] == "SIGTERM" and logged[-1]["clean"] is True


def test_the_state_is_told_while_it_stops() -> None:
    """STARTING, RUNNING, SHUTTING_DOWN, SHUTDOWN_COMPLETE, in this order."""
    states = [ShutdownManager(timeout_s=1, notifier=Notifier({}), last_resort=print).state]
    case = Case()
    states.append(case.manager.state)
    case.final_steps.append(FinalStep("look", lambda: states.append(case.manager.state)))

    asyncio.run(case.stop())

    assert [*states, case.manager.state] == ["STARTING", "RUNNING", "SHUTTING_DOWN", "SHUTDOWN_COMPLETE"]


@pytest.mark.parametrize(
    ("behave", "event"),
    [
        (hang, "service.stop_timed_out"),
        (hang_and_refuse_to_be_cancelled, "service.stop_timed_out"),
        (hang_in_a_thread, "service.stop_timed_out"),
        (fail, "service.stop_failed"),
        (exit_at_once, "service.stop_failed"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_service_that_does_not_stop_keeps_nothing_else(
    behave: object, event: str, place: int, logged: list[EventDict]
) -> None:
    """A service that hangs or raises costs its own deadline; the others stop, everything is flushed, it is told."""
    case = Case()
    case.services[place].behave = behave
    loop = asyncio.new_event_loop()

    clean = loop.run_until_complete(case.stop())

    assert case.told == IN_ORDER
    assert [(case.services[place].name)] == [e["service"] for e in told_events(logged, event)]
    assert not clean and case.services[place].name in case.manager.failure
    assert case.duration_s < 1.5
    loop.run_until_complete(_cancel_others())


async def _cancel_others() -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


def test_when_everything_hangs_the_whole_is_in_time() -> None:
    """However many services hang, with whatever deadlines, the flush begins in time and the whole is in time."""
    case = Case(timeout_s=3)
    case.services = [Service(str(number), case) for number in range(8)]
    for service in case.services:
        service.behave = hang
        service.stop_deadline_s = 60
    case.finish_requests = hang  # type: ignore[method-assign]

    asyncio.run(case.stop())

    print(f"8 hanging services and hanging requests: {case.duration_s:.2f} s of 3 s")
    assert ["accepting", *"76543210", "flush", "lock"] == case.told
    assert case.duration_s < 3.5


def test_slow_requests_are_no_failure(logged: list[EventDict]) -> None:
    """Requests that do not finish are left behind and told, but the stop is clean: all is on disk."""
    case = Case(timeout_s=1)
    case.finish_requests = hang  # type: ignore[method-assign]

    clean = asyncio.run(case.stop())

    assert clean
    assert [e["service"] for e in told_events(logged, "service.stop_timed_out")] == ["requests"]


def test_a_second_signal_skips_the_waiting_but_not_the_flush(logged: list[EventDict]) -> None:
    """After a second request nobody is waited for, every service is still told to stop, and the flush is done."""
    case = Case(timeout_s=60)
    for service in case.services:
        service.behave = hang
        service.stop_deadline_s = 20
    case.finish_requests = hang  # type: ignore[method-assign]
    case.final_steps.insert(0, FinalStep("slow flush", lambda: time.sleep(0.5) or case.told.append("slow flush")))

    async def main() -> bool:
        loop = asyncio.get_running_loop()
        for delay_s in (0.1, 0.1, 0.2, 0.9, 1.2):
            loop.call_later(delay_s, case.manager.request, "SIGINT")
        return await case.stop()

    clean = asyncio.run(main())

    assert clean and case.duration_s < 3
    assert case.told == ["accepting", "c", "b", "a", "slow flush", "flush", "lock"]
    assert 1 == len(told_events(logged, "shutdown.hurried")) == len(told_events(logged, "shutdown.completed"))


def test_a_final_step_that_fails_keeps_no_other(logged: list[EventDict]) -> None:
    """When the flush fails the lock is still released, and the stop says that it was not clean."""
    case = Case()

    def full() -> None:
        raise StorageFull("no room for chat_sessions.json")

    case.final_steps.insert(0, FinalStep("full", full))

    clean = asyncio.run(case.stop())

    assert not clean and case.told == IN_ORDER
    assert case.manager.failure == "full: no room for chat_sessions.json"
    assert [e["step"] for e in told_events(logged, "shutdown.step_failed")] == ["full"]


def test_a_final_step_that_hangs_does_not_keep_the_process(logged: list[EventDict]) -> None:
    """When the disk does not answer, the stop ends in time, not clean, and says what is unfinished."""
    case = Case(timeout_s=1)
    case.final_steps.insert(0, FinalStep("dead disk", lambda: time.sleep(3)))

    clean = asyncio.run(case.stop())

    assert not clean and "dead disk" in case.manager.failure
    assert 0.9 < case.duration_s < 2


def test_a_blocked_event_loop_does_not_keep_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that blocks the whole event loop cannot keep the final steps; beyond all time the process is ended."""
    monkeypatch.setattr(shutdown, "STUCK_S", 0.3)
    case = Case(timeout_s=1)
    flushed_at: list[float] = []
    case.final_steps[:] = [FinalStep("flush", lambda: flushed_at.append(time.monotonic()))]

    async def block() -> None:
        # What blocks is not a coroutine, that is the point.
        time.sleep(2)  # noqa: ASYNC251

    case.services[1].behave = block
    started_at = time.monotonic()

    asyncio.run(case.stop())

    assert 0.5 < flushed_at[0] - started_at < 1.5
    assert case.was_given_up.is_set()


def test_an_event_loop_that_never_hears_of_the_stop_does_not_keep_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the loop is blocked already as the signal comes, the final steps are done, then the process is ended."""
    monkeypatch.setattr(shutdown, "STUCK_S", 0.2)
    case = Case(timeout_s=0.5)

    case.manager.note()

    assert case.was_given_up.wait(5)
    assert case.told == ["flush", "lock"]
