"""Writing one backup set: beside the others, under a name that is no set's until everything of it is on the disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import msgspec

from holdfast.care.backup_set import (
    SET_FILE,
    BackupSet,
    Kind,
    SetManifest,
    StoredFile,
    encode_set_manifest,
    read_set,
    stored_name,
)
from holdfast.care.packing import Seal, pack
from holdfast.checksum import crc32
from holdfast.disk.files import Directory
from holdfast.errors import StorageFull

PIECE_BYTES = 256 << 10
"""Read, hashed and compressed at a time; between two of them others are let go first."""

PATIENCE_S = 60.0
"""The longest that the reading of one file is drawn out for the sake of others."""


LEFT_BYTES, LEFT_SHARE = 16 << 20, 20
"""What a set leaves free of the disk while others write there, or one in so many of it where that is less."""


class Digest(NamedTuple):
    """What a content is known by.

    Attributes:
        bytes: its size.
        sha256: hexadecimal.
        crc32: as in the data directory's manifest, 8 hex digits.
    """

    bytes: int
    sha256: str
    crc32: str


class SetWriter:
    """One set under way, from the first file to ``finish`` or ``abandon``; one thread.

    Attributes:
        name: of the set.
        files: those that are in it so far, by their name in the data directory.
        new_bytes: of them that no earlier set shares.
    """

    def __init__(
        self, backups: Directory, name: str, earlier: BackupSet | None, seal: Seal | None, is_busy: Callable[[], bool]
    ) -> None:
        """Begin.

        Args:
            backups: where the sets are.
            name: of this one.
            earlier: shares its files where they have the same content; None: everything is written anew.
            seal: encrypts.
            is_busy: tells whether others have used the disk since it was asked last; what it raises breaks the writing off.
        """
        self.name = name
        self.files: dict[str, StoredFile] = {}
        self.new_bytes = 0
        self._backups: Directory | None = backups
        self._earlier = _sharing(earlier, seal)
        self._seal = seal
        self._is_busy = is_busy
        self._staging = f".{name}.{os.getpid()}.tmp"
        if backups.stat(self._staging) is not None:
            backups.remove_tree(self._staging)
        self.directory = backups.subdirectory(self._staging)
        self._staged: list[str] = []

    @classmethod
    def within(
        cls, directory: Directory, earlier: BackupSet | None, seal: Seal | None, is_busy: Callable[[], bool]
    ) -> SetWriter:
        """One that only adds files to *directory*, where another process has begun the set; that one finishes it."""
        writer = cls.__new__(cls)
        writer.name, writer.files, writer.new_bytes = "", {}, 0
        writer._backups, writer._staging, writer.directory, writer._staged = None, "", directory, []
        writer._earlier, writer._seal, writer._is_busy = _sharing(earlier, seal), seal, is_busy
        return writer

    @property
    def earlier_path(self) -> str:
        """Of the set that shares its files; empty when none does."""
        return "" if self._earlier is None else str(self._earlier.path)

    def adopt(self, files: dict[str, StoredFile], new_bytes: int) -> None:
        """Take over *files* that another process has added to ``directory``."""
        self.files |= files
        self.new_bytes += new_bytes

    def publish(self) -> None:
        """Bring what was added to its place in ``directory``, durably."""
        self.directory.publish(self._staged)
        self._staged = []

    def add_file(self, kind: Kind, name: str, records: int = 0) -> Digest:
        """Take the file *name* that stands in ``directory`` into the set, and remove it there; its digest."""
        last = name.rpartition("/")[2]
        digest = digest_of(self._paced(self._pieces(last)))
        stored = self._shared(kind, name, digest, records)
        if stored is None:
            self.add(kind, name, self._pieces(last), records)
        else:
            self.files[name] = stored
        self.directory.remove(last)
        return digest

    def add(self, kind: Kind, name: str, chunks: Iterable[bytes], records: int | Callable[[], int] = 0) -> None:
        """Take *chunks* as the content of *name*; *records* may be a function, asked when they are through."""
        content, packed = _Hashed(self._paced(chunks)), stored_name(name, sealed=self._seal is not None)
        kept = _Hashed(pack(content, self._seal))
        self.directory.stage(packed, kept, self._is_busy)
        self._staged.append(packed)
        self.new_bytes += kept.bytes
        count = records if isinstance(records, int) else records()
        self.files[name] = StoredFile(kind, packed, kept.bytes, kept.sha256, content.bytes, content.sha256, count)

    def drop(self, name: str) -> None:
        """Take back what was added as *name*."""
        stored = self.files.pop(name, None)
        if stored is not None and stored.stored in self._staged:
            self._staged.remove(stored.stored)
            self.directory.discard([stored.stored])
        elif stored is not None:
            self.directory.remove(stored.stored)

    def finish(self, manifest: SetManifest) -> BackupSet:
        """Make it a set, with what *manifest* says of it; durable when this returns."""
        manifest = msgspec.structs.replace(manifest, encrypted=self._seal is not None, files=self.files)
        assert self._backups is not None, "another process finishes it"
        self.publish()
        self.directory.write_atomic(SET_FILE, [encode_set_manifest(manifest)])
        self.directory.close()
        self._backups.rename(self._staging, self.name)
        self._backups.sync()
        return read_set(self._backups.path / self.name)

    def abandon(self) -> None:
        """Remove what there is of it; what cannot be removed now is removed at the next start."""
        with suppress(OSError):
            self.directory.close()
        assert self._backups is not None, "another process has begun it"
        with suppress(OSError):
            if self._backups.stat(self._staging) is not None:
                self._backups.remove_tree(self._staging)

    def _shared(self, kind: Kind, name: str, digest: Digest, records: int) -> StoredFile | None:
        """The same content in the earlier set, linked into this one; None when it has none, or cannot be trusted."""
        earlier = self._earlier
        stored = None if earlier is None or earlier.manifest is None else earlier.manifest.files.get(name)
        if earlier is None or stored is None or (stored.sha256, stored.bytes) != (digest.sha256, digest.bytes):
            return None
        try:
            with Directory(earlier.path) as directory:
                # A byte may have changed on the disk since; then it is written anew, and not handed down for ever.
                found = digest_of(self._paced(read_pieces(directory, stored.stored)))
                if found.sha256 != stored.stored_sha256:
                    return None
                directory.keep_link(stored.stored, self.directory)
        except OSError:
            return None
        return msgspec.structs.replace(stored, kind=kind, records=records)

    def _pieces(self, name: str) -> Iterator[bytes]:
        return read_pieces(self.directory, name)

    def _paced(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        patience_s, began = PATIENCE_S, time.monotonic()
        for piece in pieces:
            yield piece
            if self._is_busy() and patience_s > 0:
                # Of two processors one is theirs anyway; this leaves them half of the other, and of the disk.
                took_s = time.monotonic() - began
                time.sleep(min(took_s, patience_s))
                patience_s -= 2 * took_s
            began = time.monotonic()


class _Hashed:
    """*chunks* on their way through, with what they add up to when they are through."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.bytes = 0
        self._chunks = chunks
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._sha256.update(chunk)
            self.bytes += len(chunk)
            yield chunk


def leaving_room(directory: Directory, is_busy: Callable[[], bool]) -> Callable[[], bool]:
    """*is_busy*, which breaks a set off before it takes the last room, so that it is the set which fails and not the journal.

    It raises:
        StorageFull: too little is left on the disk of *directory*.
    """

    def asked() -> bool:
        check_room(directory)
        return is_busy()

    return asked


def check_room(directory: Directory, beyond_bytes: int = 0) -> None:
    """Make sure that what must stay free is free on the disk of *directory*, also when *beyond_bytes* are written.

    Raises:
        StorageFull: it is not.
    """
    free, total = directory.space()
    needed = min(LEFT_BYTES, total // LEFT_SHARE) + beyond_bytes
    if free < needed:
        raise StorageFull(
            f"no room for a backup: {free >> 10} KiB are free at {directory.path}, it needs {needed >> 10} KiB; free space"
        )


def digest_of(pieces: Iterable[bytes]) -> Digest:
    """The digest of *pieces* together."""
    sha256, size, checksum = hashlib.sha256(), 0, 0
    for piece in pieces:
        sha256.update(piece)
        checksum = crc32(piece, checksum)
        size += len(piece)
    return Digest(size, sha256.hexdigest(), f"{checksum:08x}")


def read_pieces(directory: Directory, name: str) -> Iterator[bytes]:
    """The content of *name*, in pieces; errors as ``Directory.open_to_read``."""
    with os.fdopen(directory.open_to_read(name), "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _sharing(earlier: BackupSet | None, seal: Seal | None) -> BackupSet | None:
    """*earlier*, when its files may be those of a set that *seal* encrypts; None encrypts nothing."""
    # What is encrypted is never shared: it may be for others than those who may read this one, or nobody has the key now.
    is_encrypted = earlier is not None and (earlier.manifest is None or earlier.manifest.encrypted)
    return None if seal is not None or is_encrypted else earlier
