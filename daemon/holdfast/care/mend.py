"""Mending a stopped data directory: what can be put right safely is, after a backup, and each step is told.

Nothing that anybody could want is removed: what is damaged goes to ``quarantine/``, and all of it is in the backup before.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.findings import ANEW, CHMOD, OPEN, REMOVE, SET_ASIDE, Finding, Report
from holdfast.care.packing import Seal
from holdfast.care.verify import verify
from holdfast.clock import format_ms
from holdfast.disk.files import Directory, DirectoryLock
from holdfast.engine import Engine
from holdfast.errors import HoldfastError
from holdfast.recovery import finish_restore, open_engine
from holdfast.settings import Settings

REASON = "mend"
"""Of the backup before."""

REBUILD_WAIT_S = 3600.0
"""The longest that making an archive anew is waited for; ten million messages take ten minutes."""


class MendReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was mended, or would be.

    Attributes:
        backup: the name of the set that was made before; empty when none was needed or wanted.
        steps: what was done, in words.
        before, after: what a verification found; *after* is None when nothing was to be done.
    """

    backup: str
    steps: list[str]
    before: Report
    after: Report | None


def mend(
    settings: Settings,
    log: Any,
    *,
    seal: Seal | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> MendReport:
    """Put right what a verification finds and what is safe to put right; blocks.

    When there is nothing to be done, nothing is changed. Broken off, it has done a part, and can be run again.

    Raises:
        DirectoryLocked: somebody has the directory open.
        DataRefused: a newer Holdfast wrote it, or it cannot be opened; what to do is said.
        StorageFull, OSError: the disk does not let us.
    """
    before = verify(settings.data_dir, settings, seal=seal, progress=progress)
    wanted = [finding for finding in before.findings if finding.mend]
    if not wanted:
        return MendReport(backup="", steps=[], before=before, after=None)
    run = _Mending(settings, log, progress)
    lock = DirectoryLock(settings.data_dir)
    try:
        # Not proved: what is damaged could not be loaded, and is in it all the same.
        backup = back_up_stopped(settings, REASON, log, progress, prove=False).name
        run.put_files_right(wanted)
    finally:
        lock.release()
    run.open_and_flush(wanted)
    run.write_report(backup)
    after = verify(settings.data_dir, settings, seal=seal, progress=progress)
    log.info("data.mended", backup=backup, steps=len(run.steps), problems=len(after.wrong))
    return MendReport(backup=backup, steps=run.steps, before=before, after=after)


class _Mending:
    """One run, with the steps that were done."""

    def __init__(self, settings: Settings, log: Any, progress: Callable[[str], None]) -> None:
        self.steps: list[str] = []
        self._settings = settings
        self._log = log
        self._progress = progress
        self._stamp = format_ms(time.time_ns() // 1_000_000).replace(":", "")

    def put_files_right(self, wanted: list[Finding]) -> None:
        """What needs no engine; under the lock."""
        path = self._settings.data_dir
        for finding in wanted:
            if finding.mend == CHMOD:
                self._take_rights_away(path / finding.path)
            elif finding.mend == REMOVE:
                _remove(path / finding.path)
                self._did(f"removed {finding.path}, which was half written")
            elif finding.mend == SET_ASIDE:
                self._set_aside(finding)
        with Directory(path) as directory:
            if finish_restore(directory, self._log):
                self._did("completed the restore that was broken off")
            directory.sync()

    def open_and_flush(self, wanted: list[Finding]) -> None:
        """What recovery does: open the directory, make the archive anew when that is wanted, flush, close."""
        opens = [finding for finding in wanted if finding.mend == OPEN]
        anew = [finding for finding in wanted if finding.mend == ANEW]
        if not opens and not anew:
            return
        # Strict is for starts that nobody watches; who mends has decided.
        settings = msgspec.structs.replace(self._settings, recovery="available")
        self._progress("opening the directory, which recovers what can be recovered")
        engine = open_engine(settings, progress=self._progress, log=self._log)
        try:
            for reason in engine.degraded:
                self._did(f"recovered: {reason}")
            if anew:
                self._make_anew(engine, anew[0])
            engine.flush("mend")
            if opens:
                self._did(f"opened it, and flushed at event {engine.status()['snapshot_seq']}")
        finally:
            engine.close()

    def write_report(self, backup: str) -> None:
        """Keep what was done beside the evidence."""
        report = {"mended": self.steps, "backup": backup, "at": self._stamp}
        with Directory(self._settings.data_dir) as directory, directory.subdirectory("quarantine") as quarantine:
            quarantine.write_atomic(
                f"{self._stamp}-mend.report.json", [msgspec.json.format(msgspec.json.encode(report)) + b"\n"]
            )

    def _make_anew(self, engine: Engine, finding: Finding) -> None:
        self._progress("making the archive anew")
        try:
            engine.rebuild_archive(finding.found, REBUILD_WAIT_S)
        except HoldfastError as error:
            self._did(f"the archive could not be made anew: {error.detail}")
            return
        figures = engine.transcripts.figures()
        self._did(f"made the archive anew: {figures.conversations} conversations, {figures.messages} messages")

    def _take_rights_away(self, path: Path) -> None:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return
        mode = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
        path.chmod(mode)
        self._did(f"gave {path.relative_to(self._settings.data_dir)} the mode {mode:04o}")

    def _set_aside(self, finding: Finding) -> None:
        place, name = os.path.split(finding.path)
        with (
            Directory(self._settings.data_dir) as directory,
            directory.subdirectory("quarantine") as quarantine,
            Directory(self._settings.data_dir / place) as source,
        ):
            if source.stat(name) is None:
                return  # set aside for another finding already
            source.move(name, quarantine, f"{self._stamp}-{name}")
            report = {"file": finding.path, "reason": finding.found, "at": self._stamp}
            quarantine.write_atomic(f"{self._stamp}-{name}.report.json", [msgspec.json.encode(report) + b"\n"])
        self._did(f"moved {finding.path} to quarantine/")

    def _did(self, step: str) -> None:
        self.steps.append(step)
        self._progress(step)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
