"""Looks after what people put into the data directory while the daemon runs: files in the inbox, edits of snapshot files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from holdfast.care.edited import EditedFiles
from holdfast.care.inbox import INBOX, Inbox
from holdfast.engine import Engine
from holdfast.errors import StorageFull, Unavailable
from holdfast.service.supervisor import reason_of, unexpected
from holdfast.service.threads import in_thread
from holdfast.service.watch import POLL_S, DirectoryWatch

FAILED_PAUSE_S = 30.0
"""After a look that failed, so that the log stays readable."""


class InboxService:
    """Merges what is dropped into ``inbox/``, and what somebody edits, as a service.

    The snapshot files are looked at twice a second instead of being watched: the archive beside them changes with every message,
    and each change would be an event.
    """

    name = "inbox"
    stop_deadline_s = 5.0

    def __init__(
        self,
        engine: Engine,
        *,
        progress: Callable[[str], object] = lambda text: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """*progress* is told in words what the start is at, while it merges what lay there before, unless it *is_stopping*."""
        self._engine = engine
        self._progress = progress
        self._is_process_stopping = is_stopping
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    async def start(self) -> None:
        """Merge what lies in the inbox already, then watch it."""
        self._inbox = await in_thread("inbox", lambda: Inbox(self._engine, is_cancelled=self._is_over))
        self._edited = EditedFiles(self._engine)
        self._watch = DirectoryWatch(self._engine.settings.data_dir / INBOX)
        self._watch.start()
        await self._look(self._progress)
        self._task = asyncio.create_task(self._run(), name=self.name)

    async def stop(self) -> None:
        """End; a merge under way is broken off, and done again by the next start."""
        self._is_stopping = True
        self._watch.noticed.set()
        if self._task is not None:
            await self._task
        self._watch.stop()
        self._inbox.close()

    def _is_over(self) -> bool:
        return self._is_stopping or self._is_process_stopping()

    async def _run(self) -> None:
        pause_s = POLL_S
        while not self._is_stopping:
            try:
                async with asyncio.timeout(pause_s):
                    await self._watch.noticed.wait()
            except TimeoutError:
                pass
            self._watch.noticed.clear()
            if not self._is_stopping:
                pause_s = POLL_S if await self._look() else FAILED_PAUSE_S

    async def _look(self, progress: Callable[[str], object] = lambda text: None) -> bool:
        """Take what is to be taken; whether that could be done."""
        complete = self._watch.take_complete()

        def look() -> None:
            self._inbox.look(complete, progress)
            self._edited.look()

        try:
            await in_thread("inbox", look)
        except (StorageFull, Unavailable):
            return self._is_over()  # told where it happened
        except Exception as error:  # a fault of ours must neither keep the daemon from starting nor end this for good
            self._log.error("inbox.failed", reason=reason_of(error), exc_info=unexpected(error))
            return False
        return True
