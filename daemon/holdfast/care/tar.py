"""Tar archives as a stream: written so that every tool reads them, read so that none does harm.

Ours, and not ``tarfile``, for reading: that one sets aside whatever a header asks for, and knows links, devices and sparse
files, none of which has a place in what is imported.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from holdfast.care.packing import Unreadable
from holdfast.errors import InvalidRecord

BLOCK_BYTES = 512
"""Of which everything in an archive is a multiple."""

FILES_MAX = 200_000
"""In one archive; a directory of an old bot has one for each conversation."""

NAME_BYTES_MAX = 1024

PIECE_BYTES = 1 << 20

_REGULAR, _OLD_REGULAR, _DIRECTORY, _LONG_NAME = b"0", b"\0", b"5", b"L"
_EXTRA_HEADERS = (b"x", b"g")
_EXTRA_BYTES_MAX = 64 << 10
_EXTRA_THAT_MATTERS = re.compile(rb"(?:^|\n)\d+ (?:path|linkpath|size|GNU\.sparse\.[a-z]+)=")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    """One file in an archive.

    Attributes:
        name: without a leading ``./``; relative, and without ``..``.
        size: in bytes.
        content: its pieces; what is not read of them is passed over when the next member is asked for.
        written_s: when it was written, seconds since 1970; 0 when that is not known.
    """

    name: str
    size: int
    content: Iterator[bytes]
    written_s: int


def header_of(name: str, size: int, written_s: int = 0) -> bytes:
    """What stands before the *size* bytes of the file *name*, written *written_s* seconds after 1970 began."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, written_s
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padding_of(size: int) -> bytes:
    """What stands behind them."""
    return bytes(-size % BLOCK_BYTES)


ENDING = bytes(2 * BLOCK_BYTES)
"""The end of an archive."""


def members(chunks: Iterable[bytes], *, bytes_max: int) -> Iterator[Member]:
    """The files in the archive *chunks*, in their order; directories are passed over.

    Raises:
        Unreadable: it is cut short.
        InvalidRecord: it is no tar archive, holds what is no file or leads out of its place, or is more than
            *bytes_max* when it is unpacked.
    """
    stream = _Stream(chunks)
    long_name: str | None = None
    total = count = 0
    while (block := stream.take(BLOCK_BYTES)).strip(b"\0"):
        size = _checked_size(block)
        kind = block[156:157]
        if kind == _LONG_NAME or kind in _EXTRA_HEADERS:
            if size > _EXTRA_BYTES_MAX:
                raise InvalidRecord(f"the archive has a header of {size} bytes; pack it anew with tar")
            extra = stream.take(size + -size % BLOCK_BYTES)[:size]
            if kind == _LONG_NAME:
                long_name = _text(extra.rstrip(b"\0"))
            elif _EXTRA_THAT_MATTERS.search(extra):
                raise InvalidRecord("the archive names its files in extended headers; pack it with tar --format=gnu")
            continue
        name, long_name = _checked_name(long_name if long_name is not None else _name_in(block)), None
        if kind == _DIRECTORY:
            stream.skip(size + -size % BLOCK_BYTES)
            continue
        if kind not in (_REGULAR, _OLD_REGULAR):
            raise InvalidRecord(
                f"{name!r:.120} in the archive is {_KINDS.get(kind, 'of a kind that no file has')}, expected regular files only"
            )
        total += size
        count += 1
        if total > bytes_max or count > FILES_MAX:
            raise InvalidRecord(
                f"the archive holds more than {FILES_MAX} files, or than the {bytes_max} bytes that the disk has room for; "
                "free space, or split it"
            )
        yield Member(name, size, stream.pieces(size), max(0, _number(block[136:148])))
        stream.finish_pieces()
        stream.skip(-size % BLOCK_BYTES)
    stream.drain()


class _Stream:
    """Bytes in the portions that are asked for."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._buffer = memoryview(b"")
        self._left = 0

    def take(self, size: int) -> bytes:
        """The next *size* bytes."""
        parts = []
        while size:
            part = self._some(size)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Pass over the next *size* bytes."""
        while size:
            size -= len(self._some(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next *size* bytes, in pieces."""
        self._left = size
        while self._left:
            part = self._some(min(self._left, PIECE_BYTES))
            self._left -= len(part)
            yield part

    def finish_pieces(self) -> None:
        """Pass over those that nobody asked for."""
        self.skip(self._left)
        self._left = 0

    def drain(self) -> None:
        """Read to the end, which tells whether all of it was right; more than padding may not follow."""
        rest = 0
        for chunk in self._chunks:
            rest += len(chunk)
            if rest > _EXTRA_BYTES_MAX:
                raise InvalidRecord("there is something behind the end of the archive; pack it anew")

    def _some(self, size: int) -> bytes:
        while not self._buffer:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise Unreadable("the archive is cut short")
            self._buffer = memoryview(chunk)
        part, self._buffer = bytes(self._buffer[:size]), self._buffer[size:]
        return part


def _checked_size(block: bytes) -> int:
    expected = sum(block[:148]) + 8 * 32 + sum(block[156:])
    if _number(block[148:156]) != expected:
        raise InvalidRecord("expected a tar archive, found something else, or one that was changed")
    size = _number(block[124:136])
    if size < 0:
        raise InvalidRecord("the archive has a file of a negative size")
    return size


def _number(field: bytes) -> int:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1


def _name_in(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _checked_name(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    if (
        len(name) > NAME_BYTES_MAX
        or name.startswith("/")
        or "\0" in name
        or any(part == ".." for part in name.split("/"))
    ):
        raise InvalidRecord(f"the archive has a file {name!a:.120}, which leads out of it; nothing was taken")
    return name
