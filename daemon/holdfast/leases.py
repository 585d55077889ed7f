"""Waiting for the lease of a session, first come, first served.

The queue lives in memory: who waits when the daemon stops asks again when it is back. A waiter does its own asking
and its own timing; the queue only says whose turn it is, and wakes him when the lease may be free.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError, Leased, Unavailable
from holdfast.ops import Answer, Durability, Retry, SessionLease, SessionRelease

if TYPE_CHECKING:
    from holdfast.engine import Engine, Ticket

LEASE_WAIT_MAX_S = 3600.0
"""As long as the longest lease; who would wait longer asks again."""

AFTER_END_S = 0.002
"""The holder's time is over at its last millisecond, not before."""


class Turn:
    """One waiter's place; made by ``LeaseQueue.join``, given up by ``LeaseQueue.leave``."""

    __slots__ = ("id", "wake")

    def __init__(self, id: str, wake: Callable[[], None]) -> None:
        self.id = id
        self.wake = wake


class LeaseQueue:
    """Who waits for which session. Thread-safe; calls nothing but the waiters' ``wake``, which must not block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Turn]] = {}
        self.is_dismissed = False

    def join(self, id: str, wake: Callable[[], None]) -> Turn:
        """Stand at the end for session *id*; *wake* is called, from any thread, when looking again may be worth it."""
        turn = Turn(id, wake)
        with self._lock:
            self._waiting.setdefault(id, deque()).append(turn)
        return turn

    def leave(self, turn: Turn) -> None:
        """Give the place up, served or not; the next one is woken."""
        with self._lock:
            turns = self._waiting[turn.id]
            was_first = turns[0] is turn
            turns.remove(turn)
            if not turns:
                del self._waiting[turn.id]
            elif was_first:
                turns[0].wake()

    def is_first(self, turn: Turn) -> bool:
        """Whether it is this one's turn."""
        with self._lock:
            return self._waiting[turn.id][0] is turn

    def has_waiters(self, id: str) -> bool:
        """Whether somebody waits for session *id*."""
        return id in self._waiting

    def released(self, id: str) -> None:
        """The lease of session *id* was given back."""
        if id not in self._waiting:
            return
        with self._lock:
            turns = self._waiting.get(id)
            if turns:
                turns[0].wake()

    def dismiss(self) -> None:
        """Nobody is served any more: every waiter is woken, to be told so."""
        with self._lock:
            self.is_dismissed = True
            for turns in self._waiting.values():
                for turn in turns:
                    turn.wake()

    def waiting_count(self) -> int:
        """How many wait."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def check(self) -> None:
        """Raise Unavailable when nobody is served any more."""
        if self.is_dismissed:
            raise Unavailable("stopping; connect again when it is back")


def take_lease(
    engine: Engine,
    op: SessionLease,
    wait_s: float,
    *,
    durability: Durability | None = None,
) -> Answer:
    """Take the lease that *op* asks for when its turn has come; blocks.

    Raises:
        Leased: not within *wait_s*.
        HoldfastError: as ``Engine.submit``.
    """
    queue = engine.lease_queue
    if wait_s <= 0 or op.generation is not None:
        return _taken(engine, op, durability)
    ends_at = time.monotonic() + wait_s
    woken = threading.Event()
    turn = queue.join(op.id, woken.set)
    try:
        while True:
            woken.clear()
            queue.check()
            ends_in_s = math.inf
            refusal = Leased(f"session {op.id!r} is leased, and others wait for it before you")
            if queue.is_first(turn):
                try:
                    return _taken(engine, op, durability)
                except Leased as error:
                    refusal, ends_in_s = error, _ends_in_s(error)
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                raise refusal
            woken.wait(_pause_s(left_s, ends_in_s))
    finally:
        queue.leave(turn)


def _taken(engine: Engine, op: SessionLease, durability: Durability | None) -> Answer:
    ticket = engine.submit(op, durability=durability)
    try:
        ticket.wait()
    except KeyboardInterrupt:
        _give_back(engine, op, ticket)
        raise
    return ticket.answer


def _give_back(engine: Engine, op: SessionLease, ticket: Ticket) -> None:
    """Release what was granted to somebody who will never know; the others must not wait for its end."""
    if op.generation is None and ticket.refusal is None:
        generation = ticket.answer.generation
        assert generation is not None
        with contextlib.suppress(HoldfastError):
            engine.submit(SessionRelease(id=op.id, generation=generation))


async def take_lease_async(
    engine: Engine,
    op: SessionLease,
    wait_s: float,
    *,
    durability: Durability | None = None,
    retry: Retry | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Answer:
    """The same for asyncio. Whoever is cancelled, or not *is_wanted* any more when his turn comes, gives it up.

    Raises:
        Leased: not within *wait_s*, or not wanted any more.
        HoldfastError: as ``Engine.submit``.
    """
    queue = engine.lease_queue
    if wait_s <= 0 or op.generation is not None:
        return await _taken_async(engine, op, durability, retry)
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + wait_s
    woken = asyncio.Event()
    turn = queue.join(op.id, lambda: _wake_in(loop, woken))
    try:
        while True:
            woken.clear()
            queue.check()
            ends_in_s = math.inf
            refusal = Leased(f"session {op.id!r} is leased, and others wait for it before you")
            if queue.is_first(turn):
                if not is_wanted():
                    raise refusal
                try:
                    return await _taken_async(engine, op, durability, retry)
                except Leased as error:
                    refusal, ends_in_s = error, _ends_in_s(error)
            left_s = ends_at - loop.time()
            if left_s <= 0:
                raise refusal
            try:
                async with asyncio.timeout(_pause_s(left_s, ends_in_s)):
                    await woken.wait()
            except TimeoutError:
                pass
    finally:
        queue.leave(turn)


async def _taken_async(engine: Engine, op: SessionLease, durability: Durability | None, retry: Retry | None) -> Answer:
    ticket = engine.submit(op, durability=durability, retry=retry)
    try:
        await ticket.committed()
    except asyncio.CancelledError:
        _give_back(engine, op, ticket)
        raise
    return ticket.answer


def _ends_in_s(error: Leased) -> float:
    return math.inf if error.ends_in_ms is None else error.ends_in_ms / 1000 + AFTER_END_S


def _pause_s(left_s: float, ends_in_s: float) -> float | None:
    pause_s = min(left_s, ends_in_s)
    return None if pause_s == math.inf else pause_s


def _wake_in(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(woken.set)
    except RuntimeError:  # the loop was closed, and nobody waits there any more
        pass
