"""Putting a prepared state in the place of the present one: the old or the new, never a mixture, whatever is killed when.

The new files stand in ``restore/``, complete and synced. ``restore.json`` says which they are and what must go; from the
moment it is durable the swap is decided, and whoever holds the lock next completes it before he looks at anything else. Then
each name is moved: the old file to ``restore/replaced/``, the new one into its place, each round synced before the next. Last
``restore.json`` goes, then ``restore/`` with what was replaced, which a backup of the present holds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection

import msgspec

from holdfast.disk.files import Directory
from holdfast.errors import DataRefused

STAGING, INTENT = "restore", "restore.json"
REPLACED = "replaced"
"""Within the staging directory: what stood in the places of the new files."""

SCRATCH = "restore.part"
"""Where the archive of a set lies while the messages of one conversation are taken from it."""

ARCHIVE_SCRATCH = "archive.backup"
"""The same, while an archive is made anew."""

INTENT_FORMAT = 1


class Intent(msgspec.Struct, frozen=True):
    """What ``restore.json`` says.

    Attributes:
        format: of it; a newer one is refused.
        source: the backup that the new state comes from.
        at: when the swap was decided, ISO 8601.
        seq: where the new state's history begins: above every event of the old one.
        staged: names that move from ``restore/`` into the data directory.
        removed: names that go, for which there is nothing new.
    """

    format: int = INTENT_FORMAT
    source: str = ""
    at: str = ""
    seq: int = 0
    staged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def decide(data: Directory, intent: Intent) -> None:
    """Make the swap *intent* certain; only under the lock, and with everything in ``restore/`` synced.

    Raises:
        StorageFull, OSError: nothing was changed.
    """
    data.write_atomic(INTENT, [msgspec.json.format(msgspec.json.encode(intent), indent=2) + b"\n"])


def complete(data: Directory) -> Intent | None:
    """Carry a decided swap to its end, from wherever it was broken off; what it was, None when there is none.

    Only under the lock, before anything else is looked at.

    Raises:
        DataRefused: a newer Holdfast decided it, or what it needs is not there; nothing was touched.
        OSError: the disk does not let us; the next start tries again.
    """
    if data.stat(INTENT) is None:
        return None
    intent = _read(data)
    if data.stat(STAGING) is None:
        raise DataRefused(
            f"{data.path / INTENT} moves {' and '.join(intent.staged[:1]) or 'files'} into place, but {STAGING}/ is gone; "
            f"put {STAGING}/ back, or remove {INTENT} and restore again"
        )
    with data.subdirectory(STAGING) as staging:
        if missing := [name for name in intent.staged if staging.stat(name) is None and data.stat(name) is None]:
            raise DataRefused(
                f"{data.path / INTENT} moves {missing[0]} into place, but it is neither in {STAGING}/ nor here; "
                f"put {STAGING}/ back, or remove {INTENT} and restore again"
            )
        with staging.subdirectory(REPLACED) as replaced:
            for name in (*intent.staged, *intent.removed):
                if name in intent.removed or staging.stat(name) is not None:
                    _move_old(data, staging, replaced, name)
            # Both, in this order: after a power cut a file may stand in both places, but not in none.
            replaced.sync()
            data.sync()
        waiting = [name for name in intent.staged if staging.stat(name) is not None]
        staging.move_all(waiting, data)
    data.remove(INTENT)
    data.sync()
    discard(data)
    return intent


def discard_scratch(data: Directory, *names: str) -> None:
    """Remove what was unpacked for a while: the directories *names*, or all of them."""
    for name in names or (SCRATCH, ARCHIVE_SCRATCH):
        if data.stat(name) is not None:
            shutil.rmtree(data.path / name)


def discard(data: Directory) -> None:
    """Remove ``restore/``, unless a swap is decided that needs it."""
    if data.stat(INTENT) is None and data.stat(STAGING) is not None:
        shutil.rmtree(data.path / STAGING)
        data.sync()


def names_to_remove(data: Directory, present: Collection[str], staged: Collection[str]) -> tuple[str, ...]:
    """Of the names *present* those that are there, and for which nothing is *staged*."""
    return tuple(sorted(name for name in set(present) - set(staged) if data.stat(name) is not None))


def _move_old(data: Directory, staging: Directory, replaced: Directory, name: str) -> None:
    old, new = data.stat(name), staging.stat(name)
    if old is None or (new is not None and os.path.samestat(old, new)):
        return
    if replaced.stat(name) is not None:
        # Of an earlier try that a power cut took half back; what stands in the place is the one that counts.
        _remove(replaced, name)
    os.rename(data.path / name, replaced.path / name)


def _remove(directory: Directory, name: str) -> None:
    path = directory.path / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        directory.remove(name)


def _read(data: Directory) -> Intent:
    try:
        raw = data.read(INTENT)
        layout = msgspec.json.decode(raw, type=dict[str, object]).get("format")
        if isinstance(layout, int) and layout > INTENT_FORMAT:
            raise DataRefused(
                f"{data.path / INTENT} has format {layout}, this Holdfast knows {INTENT_FORMAT}; "
                "install the newer version that wrote it. Nothing was touched"
            )
        intent = msgspec.json.decode(raw, type=Intent)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataRefused(
            f"{data.path / INTENT} cannot be read: {reason}; a restore was being completed. Look at {STAGING}/, then "
            f"remove {INTENT} and restore again"
        ) from error
    if any("/" in name or name in ("", ".", "..") for name in (*intent.staged, *intent.removed)):
        raise DataRefused(f"{data.path / INTENT} names what is no file of ours; remove it and restore again")
    return intent
