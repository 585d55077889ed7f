"""How the daemon stops: in order, in time, with everything on disk."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import structlog

from holdfast.service.supervisor import GRACE_S, Service, reason_of, stop_service, unexpected
from holdfast.service.systemd import Notifier

FINAL_SHARE = 0.4
"""Share of ``shutdown_timeout`` that is kept for the final steps, whatever services and requests do."""

REQUESTS_SHARE = 0.5
"""Share of the rest that requests in flight may use up."""

STUCK_S = 1.0
"""How long beyond its time the event loop may be silent before others act for it."""

EXTEND_S = 10.0
"""How much time each message to the manager asks for while the final steps run."""


class State(StrEnum):
    """Where the process is in its life; readable as a word on /readyz."""

    STARTING = "STARTING"
    RUNNING = "RUNNING"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    SHUTDOWN_COMPLETE = "SHUTDOWN_COMPLETE"


class FinalStep(NamedTuple):
    """Blocking work that ends the process: the final flush, closing the archive, releasing the lock."""

    name: str
    action: Callable[[], object]


class ShutdownManager:
    """Takes the process from RUNNING to SHUTDOWN_COMPLETE, once.

    The order is that of CONTRACT section 4: stop accepting, finish requests in flight, stop services newest
    first, then the final steps. What hangs or raises on the way costs its own deadline and nothing else: the
    final steps run in a thread that begins when its time has come, even if the event loop is blocked.
    All deadlines are monotonic, and count from the first request.

    Attributes:
        state: STARTING until ``running`` is called.
        timeout_s: for the whole of it; may be changed until the stop is requested.
        final_steps: run one after the other, in this order; may be added to until the stop is requested.
        hurry: set by a second request; everything but the final steps is then no longer waited for.
        failure: what was not as it should be, when ``stop`` returned False.
    """

    def __init__(self, *, timeout_s: float, notifier: Notifier, last_resort: Callable[[], object]) -> None:
        """*last_resort* ends the process at once; a thread calls it when the stop is not over STUCK_S after its time."""
        self.state = State.STARTING
        self.timeout_s = timeout_s
        self.final_steps: list[FinalStep] = []
        self.hurry = asyncio.Event()
        self.failure = ""
        self._cause = ""
        self._notifier = notifier
        self._last_resort = last_resort
        self._requested = asyncio.Event()
        self._final_done = asyncio.Event()
        self._final_may_begin = threading.Event()
        self._final_step = "waiting to begin"
        self._final_failure = ""
        self._is_over = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        # The only queue whose put is safe in a signal handler.
        self._noted: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._noted_at: float | None = None
        self._log = structlog.get_logger()
        threading.Thread(target=self._end, name="final steps", daemon=True).start()

    @property
    def is_requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._requested.is_set()

    def running(self) -> None:
        """The start is over."""
        assert self.state is State.STARTING
        self.state = State.RUNNING

    def note(self) -> None:
        """The time of the stop begins. To be called in the signal handler, before ``request`` gets its turn."""
        if self._noted_at is None:
            self._noted_at = time.monotonic()
            self._noted.put(self._noted_at)

    def request(self, cause: str) -> None:
        """Ask for the stop; a second call skips the waiting. To be called on the event loop."""
        self.note()
        if not self.is_requested:
            self._cause = cause
            self._loop = asyncio.get_running_loop()
            self._requested.set()
        elif not self.hurry.is_set():
            self._log.warning("shutdown.hurried", signal=cause)
            self.hurry.set()

    async def requested(self) -> None:
        """Return when a stop was asked for."""
        await self._requested.wait()

    async def stop(
        self,
        *,
        stop_accepting: Callable[[], Awaitable[None]] | None = None,
        finish_requests: Callable[[], Awaitable[None]] | None = None,
        services: Sequence[Service] = (),
    ) -> bool:
        """Go through the whole stop, once it was requested; *services* are given oldest first. Whether all succeeded.

        Returns within ``timeout_s``. False when a final step failed or is unfinished, or when a service did not stop
        although nobody was in a hurry.
        """
        assert self.is_requested and self.state in (State.STARTING, State.RUNNING)
        assert self._noted_at is not None
        self.state = State.SHUTTING_DOWN
        started_at = self._noted_at
        final_at = started_at + self.timeout_s * (1 - FINAL_SHARE)
        self._notifier.stopping("stopping: finishing requests")
        self._log.info("shutdown.started", signal=self._cause)

        requests_end_at = started_at + (final_at - started_at) * REQUESTS_SHARE
        for name, step in (("accepting", stop_accepting), ("requests", finish_requests)):
            if step is not None:
                # A client that takes its time is no failure of ours: these may time out.
                await stop_service(name, step, _left_s(requests_end_at), self.hurry)
        for remaining, service in zip(range(len(services) - 1, -1, -1), reversed(services), strict=True):
            # What hangs may not use up the time of those that come after it.
            deadline_s = min(service.stop_deadline_s, _left_s(final_at - remaining * GRACE_S))
            stopped = await stop_service(service.name, service.stop, deadline_s, self.hurry)
            if not stopped and not self.hurry.is_set():
                self.failure = self.failure or f"{service.name} did not stop"

        self._notifier.status("stopping: writing everything to disk")
        self._final_may_begin.set()
        self.failure = await self._final_steps_done(started_at + self.timeout_s) or self.failure
        self._is_over.set()
        self.state = State.SHUTDOWN_COMPLETE
        duration_ms = round((time.monotonic() - started_at) * 1000, 1)
        clean = not self.failure
        self._log.info("shutdown.completed", duration_ms=duration_ms, clean=clean)
        return clean

    async def _final_steps_done(self, ends_at: float) -> str:
        """Wait until all final steps are done, at most until *ends_at*; what failed, empty when nothing did."""
        while not self._final_done.is_set():
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                reason = "not finished in time; what was acknowledged is in the journal, which the next start replays"
                self._log.error("shutdown.step_failed", step=self._final_step, reason=reason)
                return f"{self._final_step} {reason}"
            self._notifier.extend_timeout(EXTEND_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, EXTEND_S / 4)):
                    await self._final_done.wait()
        return self._final_failure

    def _end(self) -> None:
        """The thread that needs no event loop to end the process with everything on disk."""
        noted_at = self._noted.get()
        guard = threading.Thread(target=self._guard, args=(noted_at + self.timeout_s + STUCK_S,), daemon=True)
        guard.start()
        begins_at = noted_at + self.timeout_s * (1 - FINAL_SHARE) + STUCK_S
        self._final_may_begin.wait(max(0.0, begins_at - time.monotonic()))
        for step in self.final_steps:
            self._final_step = step.name
            try:
                step.action()
            except Exception as error:
                self._final_failure = self._final_failure or f"{step.name}: {reason_of(error)}"
                self._log.error(
                    "shutdown.step_failed", step=step.name, reason=reason_of(error), exc_info=unexpected(error)
                )
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._final_done.set)

    def _guard(self, ends_at: float) -> None:
        if not self._is_over.wait(max(0.0, ends_at - time.monotonic())):
            self._last_resort()


def _left_s(until: float) -> float:
    return max(until - time.monotonic(), GRACE_S)
