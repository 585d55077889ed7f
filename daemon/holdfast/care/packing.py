"""The form in which backups, exports and history stand on the disk: compressed with zstd and, when wanted, encrypted.

Both are formats of common tools (``zstd -d``, ``age -d``), so that what is in them can be reached without us.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard

LEVEL = 3
"""Of zstd: snapshots shrink to a tenth at 400 MB/s; a higher level saves a few percent at a multiple of the time."""

BLOCK_BYTES = 1 << 20

WINDOW_BYTES_MAX = 128 << 20
"""What a foreign file may make us set aside for reading it; zstd's own limit unless asked for more."""

PACKED, SEALED = ".zst", ".age"
"""The endings of what is compressed, and of what is encrypted on top of that."""


class Unreadable(Exception):
    """What was packed cannot be unpacked: cut short, changed, or for another key. The text says which."""


class Seal(Protocol):
    """Encrypts for the recipients that the settings name, and decrypts with the identities that the operator gives."""

    def close_up(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """*chunks*, encrypted."""

    def open(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """*chunks*, decrypted.

        Raises:
            Unreadable: no identity fits, or they were changed or cut short.
        """


def pack(chunks: Iterable[bytes], seal: Seal | None = None) -> Iterator[bytes]:
    """*chunks* compressed, and encrypted when there is a *seal*."""
    packed = _compress(chunks)
    return packed if seal is None else seal.close_up(packed)


def unpack(chunks: Iterable[bytes], seal: Seal | None = None) -> Iterator[bytes]:
    """What ``pack`` was given, in other pieces.

    Raises:
        Unreadable: cut short, changed, or for another key; what was yielded before may be incomplete.
    """
    return _decompress(chunks if seal is None else seal.open(chunks))


def seal_for(name: str, seal: Seal | None) -> Seal | None:
    """What opens the file *name*: the *seal*, or nothing where it is not encrypted.

    Raises:
        Unreadable: it is encrypted, and there is no seal.
    """
    if not name.endswith(SEALED):
        return None
    if seal is None:
        raise Unreadable("it is encrypted, and there is no key; name it by --identity FILE or backups.identity_file")
    return seal


def _compress(chunks: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
    for chunk in chunks:
        # In parts, so that no call holds a core for long; none of them holds the interpreter.
        for start in range(0, len(chunk), BLOCK_BYTES):
            packed = compressor.compress(memoryview(chunk)[start : start + BLOCK_BYTES])
            if packed:
                yield packed
    yield compressor.flush()


def _decompress(chunks: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompressobj()
    try:
        for chunk in chunks:
            # A kilobyte may hold 32 MB of zeros, so no more is taken at a time.
            for start in range(0, len(chunk), _STEP_BYTES):
                if decompressor.eof:
                    raise Unreadable("there is something behind its end")
                unpacked = decompressor.decompress(chunk[start : start + _STEP_BYTES])
                if unpacked:
                    yield unpacked
    except zstandard.ZstdError as error:
        raise Unreadable(f"it is not what zstd wrote: {error}") from error
    if not decompressor.eof:
        raise Unreadable("it is cut short")
    if decompressor.unused_data:
        raise Unreadable("there is something behind its end")


_STEP_BYTES = 1 << 10
