"""What stands in a data directory: whose it is, who may read it, what does not belong there, and how much room is left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from holdfast.archive.place import ARCHIVE, COMPACTED, REBUILT
from holdfast.care.backup_set import BACKUPS, LINEAGE_FILE, SET_NAME
from holdfast.care.checks.run import Verification, many
from holdfast.care.findings import (
    CHMOD,
    REMOVE,
    Finding,
    a_warning,
    an_error,
    readable_size,
)
from holdfast.care.history import JOURNAL
from holdfast.care.mirror import CONVERSATIONS_PLACE, ESCALATIONS_PLACE
from holdfast.care.space import INODES_LOW, SHARE
from holdfast.care.swap import ARCHIVE_SCRATCH, INTENT, SCRATCH, STAGING
from holdfast.core.state import BUILT_IN, is_custom_name
from holdfast.disk.files import LOCK_NAME
from holdfast.disk.journal import KEPT, SEGMENT_NAME
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
)
from holdfast.flush import SALES_FILE, file_of

FREE_SHARE_MIN = 0.03


COMPANIONS = (ARCHIVE + "-wal", ARCHIVE + "-shm", ARCHIVE + "-journal")

LEFTOVER_NAMES = frozenset(
    base + companion for base in (REBUILT, COMPACTED) for companion in ("", "-wal", "-shm", "-journal")
)
DIRECTORIES = frozenset(
    {
        JOURNAL,
        BACKUPS,
        "quarantine",
        "inbox",
        "media",
        "conversations",
        "escalations",
        "users",
        STAGING,
        SCRATCH,
        ARCHIVE_SCRATCH,
    }
)
"""Those of ours in a data directory."""

FILES = frozenset(
    {
        *(file_of(name) for name in BUILT_IN),
        SALES_FILE,
        MANIFEST,
        MANIFEST_NEXT,
        ARCHIVE,
        *COMPANIONS,
        *LEFTOVER_NAMES,
        INTENT,
        LOCK_NAME,
        "_mirror.json",
        "token",
        "tokens.json",
        "holdfast.sock",
        "holdfast.toml",
        "README.md",
        ".gitkeep",
    }
)
"""Likewise files, beside those of custom collections."""

_KEPT_FILES = ("start-", "edited-", "imported-", "restores.json", "copied_to.json", LINEAGE_FILE)

_KEPT_FROM_OTHERS = tuple(
    os.path.join(*parts)
    for parts in (("inbox", ""), ("quarantine", ""), *((BACKUPS, kind) for kind in ("imported-", "start-", "edited-")))
)
"""How the paths begin of what others wrote, and we only moved or linked."""


def look_at_directory(run: Verification) -> Iterator[Finding]:
    """Owners and modes of everything in it."""
    status = run.path.stat()
    if status.st_uid != os.geteuid():
        yield a_warning(
            "directory",
            f"owned by user {os.geteuid()}, who verifies",
            f"it belongs to user {status.st_uid}",
            "run as its owner, or change the owner",
        )
    loose, foreign = [], []
    for path, status in _everything(run):
        if stat.S_ISLNK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            continue
        if status.st_mode & 0o077 and not _is_dropped(run, path):
            loose.append(path)
        if status.st_uid != os.geteuid():
            foreign.append(path)
    for path in loose:
        yield a_warning(
            "directory",
            "readable by its owner alone (directories 0700, files 0600)",
            f"{path} has the mode {stat.S_IMODE((run.path / path).lstat().st_mode):04o}",
            "run `holdfast mend`, or chmod go-rwx",
            mend=CHMOD,
            path=path,
        )
    for path in foreign:
        yield a_warning(
            "directory", "one owner", f"{path} belongs to another user", "change its owner to the directory's"
        )


def _everything(run: Verification) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and directory in it, by its path within, links not followed."""
    yield ".", run.path.stat()
    for place, directories, files in os.walk(run.path):
        run.pause()
        for name in (*directories, *files):
            path = os.path.join(place, name)
            try:
                yield os.path.relpath(path, run.path), os.lstat(path)
            except FileNotFoundError:
                continue  # removed meanwhile


def _is_dropped(run: Verification, path: str) -> bool:
    """Whether somebody else put it there, who may choose its mode: nobody can enter the data directory itself.

    What an old bot left stays as it was, also where it is kept: in backups and quarantine.
    """
    if path.partition(os.sep)[0] in ("users", CONVERSATIONS_PLACE, ESCALATIONS_PLACE):
        return True
    if path.startswith(_KEPT_FROM_OTHERS):
        return True
    return path.endswith(".json") and os.sep not in path and path not in FILES and not run.manifests().entries(path)


def look_at_space(run: Verification) -> Iterator[Finding]:
    """Room for the next flush."""
    found = os.statvfs(run.path)
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    present = run.manifests().present
    needed = sum(entry.bytes for entry in present.files.values()) if present else 0
    if free < max(needed, round(size * FREE_SHARE_MIN)):
        yield a_warning(
            "space",
            f"room for another copy of the snapshots ({readable_size(needed)}), and 3 % of the disk",
            f"{readable_size(free)} free of {readable_size(size)}",
            "free space before it is full; a full disk refuses writes, reads go on",
        )
    # On a small file system a share of what it has, as the watch of the daemon has it.
    nodes_min = min(INODES_LOW, found.f_files // SHARE)
    if found.f_favail < nodes_min:
        yield a_warning(
            "space",
            f"{nodes_min} free inodes",
            f"{found.f_favail} of {found.f_files}",
            "remove small files from this file system",
        )


def look_at_quarantine(run: Verification) -> Iterator[Finding]:
    """What damage left, and when."""
    try:
        names = [name for name in os.listdir(run.path / "quarantine") if not name.endswith(".report.json")]
    except OSError:
        names = []
    if names:
        yield Finding(
            severity="notice",
            part="quarantine",
            found=f"{many(len(names), 'damaged file')}, the oldest {min(names)}",
            action="read the reports beside them; remove what you do not need",
        )
    else:
        yield Finding(severity="ok", part="quarantine", found="empty")


def look_at_files(run: Verification) -> Iterator[Finding]:
    """What does not belong there."""
    manifest = run.manifests().present
    known = FILES | (manifest.files.keys() if manifest is not None else set())
    temporaries = set(run.directory.temporaries())
    has_intent = run.directory.stat(INTENT) is not None
    for name in run.directory.names():
        status = run.directory.stat(name)
        if status is None:
            continue
        is_link = stat.S_ISLNK(status.st_mode)
        if name in temporaries or (name in LEFTOVER_NAMES and run.engine is None):
            if run.engine is None:
                yield Finding(
                    severity="notice",
                    part="files",
                    found=f"{name} is half written; the next start removes it",
                    mend=REMOVE,
                    path=name,
                )
        elif name in (STAGING, SCRATCH, ARCHIVE_SCRATCH) and run.engine is None and not has_intent:
            yield Finding(
                severity="notice",
                part="files",
                found=f"{name}/ is left of a restore that was given up; the next start removes it",
                mend=REMOVE,
                path=name,
            )
        elif name == INTENT:
            yield a_warning(
                "files",
                "no restore under way",
                "a restore was interrupted",
                "start, or run `holdfast mend`: it goes on",
                mend="completes it",
            )
        elif is_link and name in known | DIRECTORIES:
            yield an_error("files", "no symbolic links", f"{name} is one", "move away what is there")
        elif name in DIRECTORIES and not stat.S_ISDIR(status.st_mode):
            yield an_error("files", "a directory", f"{name} is none", "move away what is there")
        elif name not in known | DIRECTORIES and not _is_collection(run, name):
            yield Finding(severity="notice", part="files", found=f"{name} is not ours; it is left alone")
    for place in (BACKUPS, JOURNAL):
        yield from _strangers(run, place)


def _is_collection(run: Verification, name: str) -> bool:
    return name.endswith(".json") and is_custom_name(name.removesuffix(".json"))


def _strangers(run: Verification, place: str) -> Iterator[Finding]:
    try:
        names = sorted(os.listdir(run.path / place))
    except OSError:
        return
    for name in names:
        if place == JOURNAL:
            is_ours = SEGMENT_NAME.fullmatch(name) is not None or name == KEPT
        else:
            is_ours = SET_NAME.fullmatch(name) is not None or name == JOURNAL or name.startswith(_KEPT_FILES)
        if is_ours:
            continue
        if name.endswith(".tmp") and name.startswith("."):
            if run.engine is None:
                yield Finding(
                    severity="notice",
                    part="files",
                    found=f"{place}/{name} is half made; the next start removes it",
                    mend=REMOVE,
                    path=f"{place}/{name}",
                )
        else:
            yield Finding(severity="notice", part="files", found=f"{place}/{name} is not ours; it is left alone")
