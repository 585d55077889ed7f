"""One look through a data directory: what all of its parts go by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from holdfast.care.packing import Seal
from holdfast.core.rules import Rules, rules_of
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    FileEntry,
    Manifest,
    read_manifest,
)
from holdfast.engine import Engine
from holdfast.errors import Unavailable
from holdfast.settings import Settings

PAUSE_S = 0.0005
PAUSE_RECORDS = 50
"""In a running daemon, after so many records, others get the interpreter for a moment."""


class Manifests(NamedTuple):
    """The manifest, and that of a flush which moves its files; None where there is none that can be read."""

    present: Manifest | None
    following: Manifest | None

    def entries(self, name: str) -> list[FileEntry]:
        """What *name* may be as we left it."""
        found = (one.files.get(name) for one in self if one is not None)
        return [entry for entry in found if entry is not None]


class Seen(NamedTuple):
    """What the journal says.

    Attributes:
        first_seq: the oldest event that is there, those kept for readers as well; 0 when there is none.
        last_seq: the newest.
        snapshot_seq: the snapshots hold everything up to here.
        conversations: those that events in it change, each with the last of these.
    """

    first_seq: int
    last_seq: int
    snapshot_seq: int
    conversations: dict[str, int]


class Verification:
    """What is looked through, and how.

    Attributes:
        directory, path: the data directory.
        settings, rules: how its records are read.
        deep: load every backup as well.
        engine: which has the directory open; None when nobody has.
        seal: opens encrypted backups.
        progress: told in words how far it is.
        now_ms: when it began.
        seen: what the journal says; empty until it was looked at.
        heads: the conversations, by id, as their lines in the snapshot are; likewise.
    """

    def __init__(
        self,
        directory: Directory,
        settings: Settings,
        deep: bool,
        engine: Engine | None,
        seal: Seal | None,
        progress: Callable[[str], None],
        is_stopping: Callable[[], bool],
        now_ms: int,
    ) -> None:
        self.directory = directory
        self.path = directory.path
        self.settings = settings
        self.rules: Rules = rules_of(settings)
        self.deep = deep
        self.engine = engine
        self.seal = seal
        self.progress = progress
        self.now_ms = now_ms
        self.seen = Seen(0, 0, 0, {})
        self.heads: dict[str, bytes] = {}
        self._is_stopping = is_stopping

    def manifests(self) -> Manifests:
        """As they are now; those of a directory in use change."""
        found: list[Manifest | None] = []
        for name in (MANIFEST, MANIFEST_NEXT):
            try:
                found.append(read_manifest(self.directory, name))
            except (ValueError, OSError):
                found.append(None)
        return Manifests(*found)

    def pause(self) -> None:
        """Let others have the interpreter, where there are others; break off when that is wanted."""
        if self._is_stopping():
            raise Unavailable("stopping; verify again later")
        if self.engine is not None:
            time.sleep(PAUSE_S)


def many(count: int, noun: str) -> str:
    """The *count* with its *noun*."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
