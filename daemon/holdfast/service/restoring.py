"""Restoring everything while the daemon runs: prepared beside the serving, then the daemon pauses for the swap."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from holdfast.care.moments import Target
from holdfast.care.restore import RestoreReport, RestoreState, Restoring, naming_room
from holdfast.care.restore_plan import RestorePlan
from holdfast.care.seal import AgeSeal
from holdfast.disk.files import DirectoryLock
from holdfast.engine import Engine
from holdfast.errors import Conflict, HoldfastError, Unavailable
from holdfast.service.supervisor import reason_of
from holdfast.service.threads import in_thread


class Restores:
    """At most one restore at a time; on the event loop but for ``swap``.

    Attributes:
        is_due: set when a prepared state waits for the daemon to pause.
        state: how the restore under way, or the last one, stands.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self.is_due = asyncio.Event()
        self.state = RestoreState(state="idle")
        self._is_stopping = is_stopping
        self._restoring: Restoring | None = None
        self._saved: tuple[str, int] = ("", 0)
        self._report: RestoreReport | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    def begin(self, engine: Engine, target: Target, planned: RestorePlan, seal: AgeSeal | None) -> RestoreState:
        """Prepare the state of *target*, then have the daemon pause; returns at once.

        Raises:
            Conflict: another restore is under way.
            Unavailable: stopping.
        """
        if self._restoring is not None:
            raise Conflict(f"a restore of backup {self.state.backup} is under way; wait for it, then look again")
        if self._is_stopping():
            raise Unavailable("stopping; restore when it is back, or while it is stopped")
        seen_seq = engine.last_seq()

        def is_busy() -> bool:
            nonlocal seen_seq
            before, seen_seq = seen_seq, engine.last_seq()
            return seen_seq != before

        self._restoring = Restoring(
            engine.settings, target, planned, seal, log=self._log, progress=self._note_progress, is_busy=is_busy
        )
        self.state = RestoreState(state="preparing", backup=planned.backup, at=planned.at)
        self._task = asyncio.create_task(self._prepare(engine, target, self._restoring))
        return self.state

    async def _prepare(self, engine: Engine, target: Target, restoring: Restoring) -> None:
        def work() -> tuple[str, int]:
            restoring.prepare()
            try:
                self._note_progress("backing up the present")
                with naming_room(target, engine.settings.data_dir):
                    saved = engine.backup("restore")
            except BaseException as error:
                restoring.give_up(error)
                raise
            return saved.name, saved.seq

        try:
            self._saved = await in_thread("restore", work)
        except Exception as error:
            self._failed(error)
            return
        self.is_due.set()

    def swap(self, now_ms: int) -> None:
        """Put the prepared state in place; blocks. To be called when the engine is closed; never raises.

        Whatever it came to, the directory can be opened afterwards: as the old state or as the new one.
        """
        assert self._restoring is not None
        self.state = msgspec.structs.replace(self.state, state="swapping")
        try:
            lock = DirectoryLock(self._restoring.settings.data_dir)
        except HoldfastError as error:
            self.fail(error)
            return
        try:
            self._report = self._restoring.finish(*self._saved, now_ms, is_awaited=True)
        except Exception as error:
            self._failed(error)
        finally:
            lock.release()

    def fail(self, error: Exception) -> None:
        """What was prepared cannot be used, since the daemon could not pause."""
        assert self._restoring is not None
        self._restoring.give_up(error)
        self._failed(error)

    async def conclude(self, engine: Engine) -> None:
        """The daemon serves again, with *engine*: back up what it has now, from which later moments are reached."""
        self.is_due.clear()
        report, self._report, self._restoring = self._report, None, None
        if report is None:
            return
        self.state = msgspec.structs.replace(self.state, state="completed", progress="", report=report)
        try:
            saved = await in_thread("backup", lambda: engine.backup("restore"))
        except (HoldfastError, OSError) as error:
            self._log.warning("restore.backup_failed", reason=str(error))
            return
        self.state = msgspec.structs.replace(self.state, report=msgspec.structs.replace(report, backup=saved.name))

    def _failed(self, error: Exception) -> None:
        self._restoring = None
        self.state = msgspec.structs.replace(self.state, state="failed", progress="", reason=reason_of(error))

    def _note_progress(self, text: str) -> None:
        if self._is_stopping():
            raise Unavailable("stopping; nothing was restored")
        self.state = msgspec.structs.replace(self.state, progress=text)
