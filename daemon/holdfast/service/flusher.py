"""Flushes on behalf of all who ask, never two at once."""

from __future__ import annotations

import asyncio

from holdfast.engine import Engine
from holdfast.errors import Unavailable
from holdfast.ops import FlushReport
from holdfast.service.threads import in_thread


class FlushQueue:
    """One flush runs, at most one waits, and whoever comes meanwhile shares that one.

    As a service it is the last to stop, and leaves no flush behind: the final one is then alone.
    """

    name = "flusher"
    stop_deadline_s = 5.0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_stopping = False
        self._running: asyncio.Task[FlushReport] | None = None
        self._waiting: asyncio.Task[FlushReport] | None = None

    async def start(self) -> None:
        """Nothing runs until somebody asks."""

    async def stop(self) -> None:
        """Refuse further flushes, finish those under way."""
        self._is_stopping = True
        under_way = {task for task in (self._running, self._waiting) if task is not None}
        if under_way:
            await asyncio.wait(under_way)

    async def flush(self, reason: str) -> FlushReport:
        """Return once everything that was acknowledged before the call is in the snapshots.

        Raises:
            Unavailable: stopping; the final flush does it.
            HoldfastError, OSError: as ``Engine.flush``.
        """
        if self._is_stopping:
            raise Unavailable("stopping; the final flush writes everything")
        if self._waiting is None:
            self._waiting = asyncio.create_task(self._flush(reason, self._running))
        # A caller that gives up takes the flush from nobody else.
        return await asyncio.shield(self._waiting)

    async def _flush(self, reason: str, before: asyncio.Task[FlushReport] | None) -> FlushReport:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._waiting = self._waiting, None
        return await in_thread("flush", lambda: self._engine.flush(reason))
