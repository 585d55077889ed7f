"""What runs beside the engine, from its start to its stop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from holdfast.errors import HoldfastError
from holdfast.service.threads import in_thread

RETRY_S_MAX = 60.0
"""Longest pause of an interval that keeps failing, unless its own period is longer."""

GRACE_S = 0.2
"""What a service gets to stop at the very least: when the time is used up, or after a second signal."""


class Service(Protocol):
    """Something with a beginning and an end.

    Attributes:
        name: as it stands in the log.
        stop_deadline_s: how long ``stop`` may take before the stop of the process goes on without it.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop_deadline_s(self) -> float: ...

    async def start(self) -> None:
        """Return once it works. When this raises, nothing is left running."""

    async def stop(self) -> None:
        """Return once nothing is left running. Called once, and only after ``start`` returned."""


class Interval:
    """Regular work, as a service: *action* every *every_s* seconds, first after one period.

    A coroutine function runs on the event loop, any other function in a thread. Runs never overlap; one that
    raises is logged as ``interval.failed`` and tried again, later and later while it keeps failing.

    Attributes:
        every_s: may be changed while it runs; counts from the next pause on.
    """

    stop_deadline_s = 5.0

    def __init__(self, name: str, every_s: float, action: Callable[[], Awaitable[None]] | Callable[[], object]) -> None:
        self.name = name
        self.every_s = every_s
        self._action = action
        self._failures = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self.name)

    async def stop(self) -> None:
        """A run under way is finished, not cancelled: it may be in the middle of a file."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    @property
    def pause_s(self) -> float:
        """Seconds until the next run."""
        return max(self.every_s, min(RETRY_S_MAX, self.every_s * 2.0 ** min(self._failures, 30)))

    async def _run(self) -> None:
        while not await self._is_stopped_within(self.pause_s):
            try:
                if inspect.iscoroutinefunction(self._action):
                    await self._action()
                else:
                    await in_thread(self.name, self._action)
                self._failures = 0
            except Exception as error:
                self._failures += 1
                self._log.error(
                    "interval.failed",
                    interval=self.name,
                    reason=reason_of(error),
                    retry_s=self.pause_s,
                    exc_info=unexpected(error),
                )

    async def _is_stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False


class Supervisor:
    """Starts services in the order in which they were added; ``ShutdownManager`` stops them in the reverse order."""

    def __init__(self, services: Sequence[Service] = ()) -> None:
        self._services = list(services)
        self._running: list[Service] = []
        self._log = structlog.get_logger()

    def add(self, service: Service) -> None:
        """Have *service* started after all those added before."""
        self._services.append(service)

    @property
    def running(self) -> tuple[Service, ...]:
        """Those that were started, oldest first."""
        return tuple(self._running)

    async def start(self) -> None:
        """Start every service. When one raises, those before it are stopped, newest first, and its error is raised."""
        for service in self._services:
            started_at = time.monotonic()
            try:
                await service.start()
            except BaseException as error:
                if isinstance(error, Exception):
                    self._log.error(
                        "service.start_failed",
                        service=service.name,
                        reason=reason_of(error),
                        exc_info=unexpected(error),
                    )
                for started in reversed(self._running):
                    await stop_service(started.name, started.stop, started.stop_deadline_s)
                self._running.clear()
                raise
            self._running.append(service)
            self._log.debug("service.started", service=service.name, duration_ms=_since_ms(started_at))


async def stop_service(
    name: str, stop: Callable[[], Awaitable[None]], deadline_s: float, hurry: asyncio.Event | None = None
) -> bool:
    """Have *stop* end the service *name* within *deadline_s*, or within GRACE_S once *hurry* is set; whether it did.

    How it went is logged. A service that does not stop in time is cancelled and left behind: waiting for it to
    notice would be waiting again.
    """
    log = structlog.get_logger()
    started_at = time.monotonic()
    task = asyncio.create_task(_without_exit(stop), name=f"stop {name}")
    await _wait_for(task, deadline_s, hurry)
    if not task.done():
        task.cancel()
        log.error("service.stop_timed_out", service=name, deadline_s=round(time.monotonic() - started_at, 3))
        return False
    error = None if task.cancelled() else task.exception()
    if error is not None or task.cancelled():
        reason = reason_of(error) if error else "its stop was cancelled"
        log.error("service.stop_failed", service=name, reason=reason, exc_info=unexpected(error))
        return False
    log.info("service.stopped", service=name, duration_ms=_since_ms(started_at))
    return True


def reason_of(error: BaseException) -> str:
    """The text of *error* when it is ours or the system's; otherwise its type, as its text may quote a client."""
    return f"{error}" if isinstance(error, HoldfastError | OSError) else type(error).__name__


def unexpected(error: BaseException | None) -> BaseException | None:
    """*error* when its traceback says more than its reason: when it is not one of ours."""
    return None if isinstance(error, HoldfastError) else error


async def _wait_for(task: asyncio.Task[None], deadline_s: float, hurry: asyncio.Event | None) -> None:
    if hurry is None:
        await asyncio.wait({task}, timeout=deadline_s)
        return
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({task, hurried}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
    if hurry.is_set() and not task.done():
        await asyncio.wait({task}, timeout=min(GRACE_S, deadline_s))
    hurried.cancel()


async def _without_exit(stop: Callable[[], Awaitable[None]]) -> None:
    try:
        await stop()
    except (SystemExit, KeyboardInterrupt) as error:
        # asyncio would raise these through the event loop, past everything that is still to be stopped.
        raise RuntimeError(f"{type(error).__name__} raised while stopping") from error


def _since_ms(started_at: float) -> float:
    return round((time.monotonic() - started_at) * 1000, 1)
