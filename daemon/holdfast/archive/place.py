"""Where the SQLite archive lies in the data directory, and how a damaged one is replaced there."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from holdfast.archive.base import Archive, ArchiveDamaged, ArchiveError
from holdfast.archive.sqlite import open_sqlite
from holdfast.archive.sqlite_file import HEADER_BYTES, check_header
from holdfast.archive.sqlite_salvage import salvage
from holdfast.core.event import StoredMessage
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused

ARCHIVE = "archive.db"
REBUILT = "archive.rebuild.db"
"""A new one under way; worth nothing until it has the other name."""

Older = Callable[[], Iterable[tuple[str, list[StoredMessage]]]]
"""Gives some messages of one conversation at a time, out of backups."""

COMPACTED = "archive.compact.db"
"""A copy of the archive without what is free in it; worth nothing until it has the other name."""

_COMPANIONS = ("-wal", "-shm", "-journal")


class DataDirectoryPlace:
    """The place of ``archive.db`` in a data directory; damaged ones go to ``quarantine/``."""

    def __init__(self, data_dir: Path, stamp: Callable[[], str], older: Older = lambda: ()) -> None:
        """In *data_dir*; *stamp* gives the time that the names in ``quarantine/`` begin with, *older* what backups have."""
        self._data_dir = data_dir.absolute()
        self._stamp = stamp
        self._older = older

    def check(self) -> None:
        """Look at the archive without touching it.

        Raises:
            DataRefused: a newer Holdfast wrote it, or what stands in its place is no file.
        """
        path = self._data_dir / ARCHIVE
        with Directory(self._data_dir) as directory:
            found = directory.stat(ARCHIVE)
            if found is None:
                return
            if not stat.S_ISREG(found.st_mode):
                raise DataRefused(f"{path} is not a regular file; move away what is there")
            # What is damaged, or cannot be read for now, is dealt with when it is opened.
            with suppress(ArchiveDamaged, OSError):
                check_header(path, directory.read_head(ARCHIVE, HEADER_BYTES))

    def open(self) -> Archive | None:
        """As ``Place.open``."""
        path = self._data_dir / ARCHIVE
        with Directory(self._data_dir) as directory:
            self._remove(directory, REBUILT)
            self._remove(directory, COMPACTED)
            if directory.stat(ARCHIVE) is None:
                return None
        return open_sqlite(path)

    def create(self) -> Archive:
        """As ``Place.create``."""
        return open_sqlite(self._data_dir / ARCHIVE)

    def begin(self) -> Archive:
        """As ``Place.begin``."""
        with Directory(self._data_dir) as directory:
            self._remove(directory, REBUILT)
        return open_sqlite(self._data_dir / REBUILT)

    def salvage(self) -> Iterator[tuple[str, list[StoredMessage]]]:
        """As ``Place.salvage``."""
        path = self._data_dir / ARCHIVE
        if path.is_file():
            yield from salvage(path)
        # Of a message that both have the first one counts.
        yield from self._older()

    def adopt(self, archive: Archive) -> Archive:
        """As ``Place.adopt``."""
        archive.checkpoint()
        archive.close()
        with Directory(self._data_dir) as directory:
            if any(directory.stat(ARCHIVE + part) is not None for part in ("", *_COMPANIONS)):
                self._keep_evidence(directory)
                # What belongs to the old one must not be taken for the new one's, also when that itself is gone. Its
                # events are in the journal still.
                self._remove_companions(directory, ARCHIVE)
            directory.rename(REBUILT, ARCHIVE)
            self._remove_companions(directory, REBUILT)
            directory.sync()
        opened = self.open()
        if opened is None:
            raise ArchiveError(f"{self._data_dir / ARCHIVE} vanished while it was made anew")
        return opened

    def begin_compacted(self) -> Path:
        """As ``Place.begin_compacted``."""
        self.discard_compacted()
        return self._data_dir / COMPACTED

    def discard_compacted(self) -> None:
        """As ``Place.discard_compacted``."""
        with Directory(self._data_dir) as directory:
            self._remove(directory, COMPACTED)

    def adopt_compacted(self) -> Archive:
        """As ``Place.adopt_compacted``."""
        with Directory(self._data_dir) as directory:
            # Before the rename, and durably: a log of the old file must not be taken for one of the new.
            self._remove_companions(directory, ARCHIVE)
            directory.sync()
            directory.rename(COMPACTED, ARCHIVE)
            directory.sync()
        return open_sqlite(self._data_dir / ARCHIVE)

    def _keep_evidence(self, directory: Directory) -> None:
        stamp = self._stamp()
        with directory.subdirectory("quarantine") as quarantine:
            for name in (ARCHIVE, *(ARCHIVE + companion for companion in _COMPANIONS)):
                if directory.stat(name) is not None:
                    directory.keep_link(name, quarantine, f"{stamp}-{name}")
            report = {"file": ARCHIVE, "reason": "damaged or of another history; made anew", "at": stamp}
            quarantine.write_atomic(f"{stamp}-{ARCHIVE}.report.json", [msgspec.json.encode(report) + b"\n"])

    def _remove(self, directory: Directory, name: str) -> None:
        if directory.stat(name) is not None:
            directory.remove(name)
        self._remove_companions(directory, name)

    def _remove_companions(self, directory: Directory, name: str) -> None:
        for companion in _COMPANIONS:
            if directory.stat(name + companion) is not None:
                directory.remove(name + companion)
