"""Looking through a data directory: everything that can be wrong with it, and what to do about each.

Nothing is changed. On a directory that nobody has open the lock is held meanwhile; of one in use, what does not hold is
looked at again before it is told, since a flush may have been under way.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from holdfast.care.checks.archive import look_at_archive
from holdfast.care.checks.backups import look_at_backups, look_at_history
from holdfast.care.checks.directory import look_at_directory, look_at_files, look_at_quarantine, look_at_space
from holdfast.care.checks.journal import look_at_journal
from holdfast.care.checks.run import Verification
from holdfast.care.checks.snapshots import look_at_manifest, look_at_snapshots
from holdfast.care.findings import (
    Finding,
    Report,
    bounded,
)
from holdfast.care.packing import Seal
from holdfast.clock import format_ms
from holdfast.disk.files import Directory, kept_from_writers
from holdfast.engine import Engine
from holdfast.errors import Conflict, DataRefused, Unavailable
from holdfast.settings import Settings

TRIES = 4
"""Of a part of a directory in use, before what is wrong with it counts."""

TRY_AGAIN_S = 0.3

DAY_S = 24 * 3600.0
DAILY_CHECK_S = 900.0
"""How often a daemon looks whether a day has passed, and how long after its start it verifies first."""

NICE = 10
"""Of the thread of a daemon that verifies."""


def verify(
    data_dir: Path,
    settings: Settings,
    *,
    deep: bool = False,
    engine: Engine | None = None,
    seal: Seal | None = None,
    progress: Callable[[str], None] = lambda text: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Report:
    """Look through all of *data_dir*; blocks, for a second a gigabyte or so.

    Args:
        settings: how its records are read.
        deep: load every backup as well; and of a directory in use look at each page of the archive.
        engine: which has the directory open; without one nobody may have.
        seal: opens encrypted backups.
        progress: told in words how far it is.
        is_stopping: whether to break off.

    Raises:
        DirectoryLocked: another process has it open.
        Unavailable: broken off.
        DataRefused: there is no such directory, or a newer Holdfast wrote it.
    """
    started, at_ms = time.monotonic(), time.time_ns() // 1_000_000
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(Directory(data_dir))
        except OSError as error:
            raise DataRefused(
                f"{data_dir} cannot be read: {error.strerror}; name the data directory, and run as its owner"
            ) from error
        if engine is None:
            stack.enter_context(kept_from_writers(data_dir))
        run = Verification(directory, settings, deep, engine, seal, progress, is_stopping, at_ms)
        findings = _looked_through(run)
    return Report(
        at=format_ms(at_ms),
        data_dir=str(data_dir),
        is_running=engine is not None,
        is_deep=deep,
        duration_ms=round((time.monotonic() - started) * 1000, 1),
        findings=findings,
    )


_PARTS = {
    "directory": look_at_directory,
    "space": look_at_space,
    "manifest": look_at_manifest,
    "snapshots": look_at_snapshots,
    "journal": look_at_journal,
    "archive": look_at_archive,
    "history": look_at_history,
    "backups": look_at_backups,
    "quarantine": look_at_quarantine,
    "files": look_at_files,
}
"""In this order: the archive is compared with what snapshots and journal say."""


def _looked_through(run: Verification) -> list[Finding]:
    # A newer format is refused before anything is said of it.
    run.manifests()
    findings: list[Finding] = []
    for part, look in _PARTS.items():
        run.progress(f"looking at the {part}")
        findings += _settled(run, part, look)
    if run.engine is not None:
        notes = [text for text in run.engine.degraded if not text.startswith(_NOTE)]
        findings += [Finding(severity="warning", part="daemon", found=text, action="see its log") for text in notes]
    return findings


def _settled(run: Verification, part: str, look: Callable[[Verification], Iterable[Finding]]) -> list[Finding]:
    """What *look* finds; of a directory in use what it finds again and again."""
    for left in reversed(range(TRIES)):
        found = bounded(look(run))
        is_wrong = any(finding.severity in ("warning", "error") for finding in found)
        if run.engine is None or not is_wrong or not left:
            break
        time.sleep(TRY_AGAIN_S)
    return found or [Finding(severity="ok", part=part, found="as it should be")]


class Daily:
    """Verifies a daemon's directory once a day, and tells what it finds."""

    def __init__(self, engine: Engine, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._engine = engine
        self._is_stopping = is_stopping
        self._due_at = 0.0

    def run_when_due(self) -> None:
        """Verify, unless that was done less than a day ago; broken off when the daemon stops."""
        now = self._engine.monotonic()
        if now < self._due_at:
            return
        self._due_at = now + DAY_S
        try:
            verify_running(self._engine, deep=False, reason="daily", is_stopping=self._is_stopping)
        except Conflict:
            pass  # somebody asked for it just now
        except Unavailable:
            if not self._is_stopping():
                raise


def verify_running(
    engine: Engine, *, deep: bool, reason: str, is_stopping: Callable[[], bool] = lambda: False
) -> Report:
    """Verify the directory of *engine*, log the outcome, and have ``degraded`` say it; blocks.

    Raises:
        Conflict: that is being done already.
        DataRefused, Unavailable: as ``verify``.
    """
    if not _running.acquire(blocking=False):
        raise Conflict("a verification is under way; ask again when it is over")
    try:
        return _verify_running(engine, deep, reason, is_stopping)
    finally:
        _running.release()


_running = threading.Lock()
"""One at a time: each reads all there is."""


def _verify_running(engine: Engine, deep: bool, reason: str, is_stopping: Callable[[], bool]) -> Report:
    report = _politely(
        lambda: verify(engine.settings.data_dir, engine.settings, deep=deep, engine=engine, is_stopping=is_stopping)
    )
    wrong = report.wrong
    severities = [finding.severity for finding in report.findings]
    engine.measures.verified_at = time.time()
    engine.measures.verify_findings = {name: severities.count(name) for name in ("notice", "warning", "error")}
    if not wrong:
        engine.care_notes.pop("verify", None)
        engine.log.info("data.verified", reason=reason, deep=deep, duration_ms=report.duration_ms)
        return report
    # Without the texts: they may name conversations, and neither the log nor /readyz may.
    parts = sorted({finding.part for finding in wrong})
    engine.care_notes["verify"] = (
        f"{_NOTE} {len(wrong)} problems ({', '.join(parts)}); see `holdfast verify`, and verify again when they are mended"
    )
    engine.log.error(
        "data.verify_failed",
        reason=reason,
        deep=deep,
        count=len(wrong),
        parts=parts,
        action="see `holdfast verify`",
        duration_ms=report.duration_ms,
    )
    return report


_NOTE = "a verification found"


def _politely(work: Callable[[], Report]) -> Report:
    """What *work* returns, done in a thread that gives way to all others where the system lets one."""
    outcome: list[Report | BaseException] = []

    def run() -> None:
        try:
            # Of this thread alone, on Linux; elsewhere there is no such thing, and nothing depends on it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        except OSError:
            pass
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="holdfast-verify", daemon=True)
    thread.start()
    thread.join()
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found
