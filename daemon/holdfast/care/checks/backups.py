"""Whether the backups, and the events between them, are what they were."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from holdfast.archive.place import ARCHIVE
from holdfast.care.backup_set import BackupSet, list_sets
from holdfast.care.checks.messages import look_at_messages
from holdfast.care.checks.run import PAUSE_RECORDS, Verification, many
from holdfast.care.findings import (
    Finding,
    a_warning,
    an_error,
    readable_size,
)
from holdfast.care.history import History, HistoryGap, Part, holes_of, newest_segment
from holdfast.care.moments import restored_seqs
from holdfast.care.prove import prove
from holdfast.care.prover import Unproved, prove_apart
from holdfast.clock import format_ms
from holdfast.errors import StorageFull


def look_at_history(run: Verification) -> Iterator[Finding]:
    """The events that moments are restored from: none may be missing; with ``deep`` each is read."""
    history = History(run.path, run.seal)
    # What the journal goes on from, and what the snapshots hold, were events as well; looked at first, since there come more.
    present = run.manifests().present
    last_seq = max(newest_segment(run.path) - 1, present.snapshot_seq if present is not None else 0)
    try:
        parts = history.parts()
    except OSError as error:
        yield an_error("history", "a directory that can be read", str(error.strerror or error), "check the disk")
        return
    packed = [part for part in parts if part.is_packed]
    if not packed:
        yield Finding(severity="ok", part="history", found="none yet")
        return
    restored = restored_seqs(run.path)
    holes = []
    if run.settings.backups.pitr:
        holes = holes_of([part for part in parts if part.last_seq >= packed[0].first_seq], last_seq, restored)
    if run.deep and not holes:
        run.progress("reading the history")
        holes = _unreadable(run, history, packed, restored)
    for first, last in holes:
        yield a_warning(
            "history",
            "every event of the days that backups.pitr names",
            f"events {first} to {last} are in no part of the history that can be read",
            "take a backup (`holdfast backup`), from which on every moment can be restored; this is told until what lies before them is "
            "older than backups.pitr",
        )
    if not holes:
        size = sum(part.place.stat().st_size for part in packed)
        yield Finding(
            severity="ok",
            part="history",
            found=f"events {packed[0].first_seq} to {packed[-1].last_seq} in {readable_size(size)}, "
            f"from {format_ms(packed[0].first_at)} on",
        )


def _unreadable(run: Verification, history: History, packed: list[Part], restored: set[int]) -> list[tuple[int, int]]:
    """The first hole that shows only when every event of *packed* is read."""
    position, last_seq = packed[0].first_seq - 1, packed[-1].last_seq
    # No event has the number of a restored state, so that the reading goes on behind it.
    for end in [*(seq - 1 for seq in sorted(restored) if position < seq <= last_seq), last_seq]:
        try:
            for line in history.lines(position, end):
                if line.seq % PAUSE_RECORDS == 0:
                    run.pause()
        except HistoryGap as error:
            return [(error.first, error.last)]
        position = end + 1
    return []


def look_at_backups(run: Verification) -> Iterator[Finding]:
    """Every file of every set; with ``deep`` each set is loaded."""
    sets = list_sets(run.path)
    problems: list[Finding] = []
    # Unchanged content is shared among sets, and looked at once.
    known: dict[tuple[int, int], str] = {}
    for found in sets:
        run.progress(f"looking at backup {found.name}")
        problems += _set_problems(run, found, known)
    yield from problems
    sound = [found for found in sets if found.manifest is not None and not found.is_foreign]
    if strangers := [found.name for found in sets if found.is_foreign]:
        yield Finding(
            severity="notice",
            part="backups",
            found=f"{many(len(strangers), 'set')} of another data directory: {', '.join(strangers)}",
            action="nothing: what is there is used when it is named, and never removed",
        )
    if not sets:
        yield Finding(severity="notice", part="backups", found="there is none yet", action="run `holdfast backup`")
        return
    proved = sum(found.is_proved for found in sound)
    if not proved:
        yield a_warning("backups", "a backup that was proved", "none", "run `holdfast backup`")
    if sound and not problems:
        yield Finding(
            severity="ok",
            part="backups",
            found=f"{many(len(sound), 'set')}, {proved} of them proved, the newest {sound[0].name} at event "
            f"{sound[0].manifest.seq if sound[0].manifest else 0}",
        )
    newest = next((one for one in sound if one.is_proved and one.manifest and ARCHIVE in one.manifest.files), None)
    if run.deep and newest is not None:
        yield from look_at_messages(run, newest)


def _set_problems(run: Verification, found: BackupSet, known: dict[tuple[int, int], str]) -> Iterator[Finding]:
    retake = "take another (`holdfast backup`), then remove this directory"
    if found.manifest is None:
        yield an_error("backups", f"a set that can be read: {found.name}", found.damage, retake)
        return
    for name, stored in sorted(found.manifest.files.items()):
        path = found.path / stored.stored
        try:
            status = path.lstat()
            key = (status.st_dev, status.st_ino)
            if key not in known:
                known[key] = _digest(run, path)
        except FileNotFoundError:
            yield an_error("backups", name, f"{found.name} lacks {stored.stored}", retake)
            continue
        except OSError as error:
            yield an_error("backups", name, f"{found.name}/{stored.stored}: {error.strerror}", retake)
            continue
        if (status.st_size, known[key]) != (stored.stored_bytes, stored.stored_sha256):
            yield an_error("backups", "the content that was backed up", f"{found.name}/{stored.stored} changed", retake)
    if found.proof is not None and not found.proof.ok:
        yield an_error("backups", f"that {found.name} can be loaded", found.proof.reason, retake)
    elif run.deep:
        yield from _prove(run, found, retake)


def _prove(run: Verification, found: BackupSet, retake: str) -> Iterator[Finding]:
    run.progress(f"loading backup {found.name}")
    try:
        if run.engine is not None:
            # In a process of its own, so that nobody waits for the interpreter.
            proof = prove_apart(found, run.settings, threading.Event())
        else:
            with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
                proof = prove(found, run.seal, Path(scratch))
    except (Unproved, StorageFull, OSError) as error:
        yield Finding(severity="notice", part="backups", found=f"{found.name} could not be tried: {error}")
        return
    if not proof.ok:
        yield an_error("backups", f"that {found.name} can be loaded", proof.reason, retake)


def _digest(run: Verification, path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
