"""Whether the backups, and the events between them, are what they were."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from holdfast.care.backup_set import BACKUPS, BackupSet, list_sets
from holdfast.care.checks.run import PAUSE_RECORDS, Verification, many
from holdfast.care.findings import (
    Finding,
    a_warning,
    an_error,
    readable_size,
)
from holdfast.care.history import History, HistoryGap
from holdfast.care.prove import prove
from holdfast.care.prover import Unproved, prove_apart
from holdfast.clock import format_ms
from holdfast.errors import StorageFull


def look_at_history(run: Verification) -> Iterator[Finding]:
    """The events that moments are restored from."""
    history = History(run.path, run.seal)
    try:
        parts = [part for part in history.parts() if part.place.parent.parent.name == BACKUPS]
    except OSError as error:
        yield an_error("history", "a directory that can be read", str(error.strerror or error), "check the disk")
        return
    if not parts:
        yield Finding(severity="ok", part="history", found="none yet")
        return
    if run.deep:
        run.progress("reading the history")
        try:
            for line in history.lines(parts[0].first_seq - 1, parts[-1].last_seq):
                if line.seq % PAUSE_RECORDS == 0:
                    run.pause()
        except HistoryGap as error:
            yield a_warning(
                "history",
                "every event of the days that backups.pitr names",
                str(error),
                "nothing: moments before that cannot be restored any more; take a backup",
            )
            return
    size = sum(part.place.stat().st_size for part in parts)
    yield Finding(
        severity="ok",
        part="history",
        found=f"events {parts[0].first_seq} to {parts[-1].last_seq} in {readable_size(size)}, from {format_ms(parts[0].first_at)} on",
    )


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
    if not problems:
        yield Finding(
            severity="ok",
            part="backups",
            found=f"{many(len(sound), 'set')}, {proved} of them proved, the newest {sound[0].name} at event "
            f"{sound[0].manifest.seq if sound[0].manifest else 0}",
        )


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
