"""Backups of a directory that nobody has open: before a restore, an import, a migration, or by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from holdfast import __version__
from holdfast.care.backup_report import infos_of, log_completed, report_of
from holdfast.care.backup_set import (
    BACKUPS,
    BackupSet,
    list_sets,
    own_sets,
    read_set,
    write_proof,
)
from holdfast.care.history import History
from holdfast.care.history_follower import history_of
from holdfast.care.prover import Unproved, prove_apart
from holdfast.care.rotation import at_of
from holdfast.care.seal import seal_to_write
from holdfast.care.set_parts import (
    Made,
    add_found,
    add_journal,
    add_rest,
    copy_stopped_archive,
    finished,
    new_name,
    newest_good,
    remove_half_made,
    settled_manifest,
)
from holdfast.care.set_writer import SetWriter
from holdfast.clock import Clock, format_ms
from holdfast.disk.files import Directory
from holdfast.errors import HoldfastError, Unavailable
from holdfast.ops import BackupList, BackupReport
from holdfast.settings import Settings

UPGRADE = "upgrade"
"""Why there is a set from before another version changed anything."""

_UPGRADE_AGAIN_MS = 3600 * 1000

Progress = Callable[[str], object]


def back_up_stopped(
    settings: Settings,
    reason: str,
    log: Any,
    progress: Progress | None = None,
    *,
    prove: bool = True,
    cancelled: threading.Event | None = None,
) -> BackupSet:
    """Make a set of a data directory that nobody has open, under the caller's lock, of whatever state it is in.

    What is damaged is in it as it is, which the log says. Nothing outside of ``backups/`` is changed, but that SQLite may
    create an index of the archive's log beside it.

    Args:
        reason: why.
        prove: load everything from it afterwards; the set says how that went.
        cancelled: set it to give up.

    Raises:
        StorageFull, OSError: there is no set.
        Unavailable: *cancelled*.
    """
    report = report_stopped(settings, reason, log, progress, prove=prove, cancelled=cancelled)
    return read_set(settings.data_dir / BACKUPS / report.name)


def back_up_before_upgrade(
    settings: Settings, written_by: str, log: Any, progress: Progress, cancelled: threading.Event
) -> None:
    """Make a set of what another version has *written*, before this one changes anything of it; under the lock.

    One an hour is enough for a daemon that does not come up. It is proved later, in its turn, so that a start is not held up;
    without room for it the start goes on, and the log says so.

    Raises:
        Unavailable: *cancelled*.
    """
    if not written_by or written_by == __version__:
        return
    now_ms = Clock().now_ms()
    made = next(iter(own_sets(settings.data_dir)), None)
    if made is not None and made.manifest is not None and made.manifest.reason == UPGRADE:
        age_ms = now_ms - at_of(made)
    else:
        age_ms = _UPGRADE_AGAIN_MS
    if age_ms < _UPGRADE_AGAIN_MS:
        return
    progress(f"taking a backup of what Holdfast {written_by} has written")
    try:
        report_stopped(settings, UPGRADE, log, progress, prove=False, cancelled=cancelled)
    except Unavailable:
        raise
    except (HoldfastError, OSError) as error:
        log.error("backup.failed", reason=UPGRADE, error=str(error))


def report_stopped(
    settings: Settings,
    reason: str,
    log: Any = None,
    progress: Progress | None = None,
    *,
    prove: bool = True,
    cancelled: threading.Event | None = None,
) -> BackupReport:
    """As ``back_up_stopped``, for who wants to know how it went; without *log* nobody else is told."""
    clock, cancelled, progress = Clock(), cancelled or threading.Event(), progress or (lambda text: None)
    started = clock.monotonic()
    made = _write_stopped(settings, reason, clock, progress, cancelled)
    if log is not None:
        log_completed(log, made, reason, clock.monotonic() - started)
    proof, problem = None, ""
    if prove:
        progress("loading it, to see that all is there")
        try:
            proof = prove_apart(made.found, settings, cancelled)
            write_proof(made.found.path, proof)
            problem = proof.reason
        except Unproved as error:
            problem = str(error)
        if log is not None and proof is not None and proof.ok:
            log.info("backup.proved", backup=made.found.name, duration_ms=proof.duration_ms)
        elif log is not None:
            log.error("backup.proof_failed", backup=made.found.name, reason=problem, is_tried=proof is not None)
    return report_of(made, reason, proof, problem, clock, started)


def _write_stopped(
    settings: Settings, reason: str, clock: Clock, progress: Progress, cancelled: threading.Event
) -> Made:
    notes: list[str] = []

    def is_busy() -> bool:
        if cancelled.is_set():
            raise Unavailable("stopping; the backup was given up, nothing was changed")
        return False

    with Directory(settings.data_dir) as data, data.subdirectory(BACKUPS) as backups:
        remove_half_made(backups)
        name = new_name(settings.data_dir, clock.now_ms())
        seal = seal_to_write(settings)
        writer = SetWriter(backups, name, newest_good(settings.data_dir), seal, is_busy)
        try:
            progress("compressing the snapshots")
            manifest = settled_manifest(data, notes)
            counts = add_found(writer, data, manifest, notes)
            progress("copying the archive")
            archived_seq = copy_stopped_archive(writer, data, counts, notes)
            progress("adding the journal")
            history = History(settings.data_dir)
            last_seq = max([manifest.snapshot_seq, *(part.last_seq for part in history.parts() if not part.is_packed)])
            reached = add_journal(writer, history, manifest.snapshot_seq, archived_seq, notes, up_to_seq=last_seq)
            add_rest(writer, data, manifest, settings)
            return finished(
                writer,
                notes,
                manifest,
                at=format_ms(clock.now_ms()),
                reason=reason,
                reached=reached,
                archived_seq=archived_seq,
                counts=counts,
            )
        except BaseException:
            writer.abandon()
            raise


def list_stopped(settings: Settings) -> BackupList:
    """The sets of a directory that nobody has open, newest first, and its history."""
    sets = list_sets(settings.data_dir)
    return BackupList(infos_of(sets), history_of(settings, sets))
