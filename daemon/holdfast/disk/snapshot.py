"""Snapshot files: a JSON array with one record a line, and the manifest that says what each should be.

The file is ``[``, newline, records joined by comma and newline, newline, ``]``. Every program that reads JSON
reads it; grep finds a record; and when it is damaged, every line that is whole can be saved.

A flush first writes ``manifest.next.json``, then the files, then renames the manifest into place. So at every
instant each file matches one of the two manifests, and a file that matches neither was changed by somebody else.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from holdfast.checksum import crc32
from holdfast.disk.files import Directory, WrittenFile
from holdfast.errors import DataRefused

FORMAT_VERSION = 1
"""Of the data directory; a newer one is refused untouched."""

MANIFEST = "manifest.json"
MANIFEST_NEXT = "manifest.next.json"
_BLOCK_BYTES = 4 << 20
_OPENING, _BETWEEN, _CLOSING = b"[\n", b",\n", b"\n]\n"


_NO_CHECKSUM = "00000000"
_CHECKSUM = re.compile(rb'(?<=\n  "checksum": ")[0-9a-f]{8}(?="\n}\n$)')


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the manifest says of one snapshot file.

    Attributes:
        records: how many; 0 for files that hold none.
        bytes: its size.
        crc32: of its content, 8 hex digits.
        mtime_ns: when we wrote it, ns since 1970.
        seq: it holds every change of its collection up to here.
    """

    records: int
    bytes: int
    crc32: str
    mtime_ns: int
    seq: int


class Manifest(msgspec.Struct, frozen=True):
    """The table of contents of the data directory.

    Attributes:
        format: version of the layout.
        holdfast: version of the program that wrote it.
        at: when, ISO 8601.
        snapshot_seq: the files hold every event up to here.
        lineage: whose seqs these are: 32 hex digits drawn with the first manifest, and kept for ever. Empty in those of
            early versions.
        files: by name.
        checksum: in the file the CRC-32 of it with zeros in this place, 8 hex digits; here always the zeros.
    """

    format: int = FORMAT_VERSION
    holdfast: str = ""
    at: str = ""
    snapshot_seq: int = 0
    lineage: str = ""
    files: dict[str, FileEntry] = {}
    checksum: str = _NO_CHECKSUM


def new_lineage() -> str:
    """One that no other directory has."""
    return secrets.token_hex(16)


def entry_of(written: WrittenFile, records: int, seq: int) -> FileEntry:
    """The manifest's words for a file just written."""
    return FileEntry(records, written.bytes, f"{written.crc32:08x}", written.mtime_ns, seq)


def encode_manifest(manifest: Manifest) -> bytes:
    """Its JSON, indented for people."""
    manifest = msgspec.structs.replace(manifest, checksum=_NO_CHECKSUM)
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    return _CHECKSUM.sub(b"%08x" % crc32(raw), raw)


def read_manifest(directory: Directory, name: str) -> Manifest | None:
    """The manifest *name*; None when there is none.

    Raises:
        DataRefused: written by a newer Holdfast.
        ValueError: damaged; an OSError when it cannot be read.
    """
    if directory.stat(name) is None:
        return None
    raw = directory.read(name)
    try:
        layout = msgspec.json.decode(raw, type=dict[str, Any]).get("format")
    except msgspec.DecodeError as error:
        raise ValueError(f"not a manifest: {error}") from None
    if isinstance(layout, int) and layout > FORMAT_VERSION:
        raise DataRefused(
            f"{directory.path} has format {layout}, this Holdfast knows {FORMAT_VERSION}; "
            "install the newer version that wrote it. Nothing was touched"
        )
    # What it says of the other files decides which events are replayed, so it is believed whole or not at all.
    if _CHECKSUM.findall(raw) != [b"%08x" % crc32(_CHECKSUM.sub(_NO_CHECKSUM.encode(), raw))]:
        raise ValueError("its checksum does not hold")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
        return msgspec.structs.replace(manifest, checksum=_NO_CHECKSUM)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a manifest: {error}") from None


def snapshot_chunks(shards: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """The content of a snapshot file, a chunk for each of *shards*."""
    separator = _OPENING
    for records in shards:
        chunk = _BETWEEN.join(records)
        if chunk:
            yield separator
            yield chunk
            separator = _BETWEEN
    yield _CLOSING if separator is _BETWEEN else b"[\n]\n"


class ChecksumMismatchError(Exception):
    """A snapshot file is not what the manifest says."""


def read_blocks(directory: Directory, name: str, entry: FileEntry) -> Iterator[bytes]:
    """The file *name* as blocks of whole lines without the brackets, each ending before its last comma.

    Raises:
        ChecksumMismatchError: size or checksum differ from *entry*; what was yielded before may be wrong.
        OSError: it cannot be read.
    """
    with os.fdopen(directory.open_to_read(name), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != entry.bytes:
            raise ChecksumMismatchError(name)
        yield from blocks_of(iter(lambda: file.read(_BLOCK_BYTES), b""), name, entry)


def blocks_of(pieces: Iterable[bytes], name: str, entry: FileEntry) -> Iterator[bytes]:
    """As ``read_blocks``, of a file *name* whose content comes in *pieces*."""
    checksum, rest = 0, b""
    for block in pieces:
        checksum = crc32(block, checksum)
        block = rest + block if rest else block
        end = block.rfind(_BETWEEN)
        if end < 0:
            rest = block
            continue
        rest = block[end + 2 :]
        yield block[2:end] if block.startswith(_OPENING) else block[:end]
    if f"{checksum:08x}" != entry.crc32:
        raise ChecksumMismatchError(name)
    if rest.startswith(_OPENING):
        rest = rest[2:]
    rest = rest.removesuffix(_CLOSING)
    if rest and rest != b"]\n":
        yield rest


class Salvage(NamedTuple):
    """What could be read of a file that is not as we left it.

    Attributes:
        records: every whole JSON value that stands where a record stands.
        is_whole: the file is one JSON array; nothing is missing.
        reason: what is wrong with it; empty when it is whole.
    """

    records: list[Any]
    is_whole: bool
    reason: str


def salvage(raw: bytes) -> Salvage:
    """Read the records of *raw*, a JSON array in any layout, as far as they are whole.

    A damaged record costs itself only: reading goes on at the next line that begins as records begin.
    """
    reason = ""
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = f"not JSON: {error}"
    else:
        if isinstance(value, list):
            return Salvage(value, True, "")
        return Salvage([], False, "a JSON object, not an array of records")
    if not raw.strip(b"\0 \t\r\n"):
        return Salvage([], False, "empty" if not raw else "nothing but zeros")
    text = raw.decode("utf-8", "replace")
    records = [value for start, end, value in whole_records(text) if "\ufffd" not in text[start:end]]
    return Salvage(records, False, reason)


def whole_records(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Where each whole record of the damaged array *text* begins and ends, and its value."""
    # The parser knows NaN and rounds 1e400 to infinity; such a record cannot be kept as it is, so it is not whole.
    decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).raw_decode
    begin = record_start(text)
    match = _AFTER_BAD_NEWLINE.match(text) or begin.search(text)
    while match is not None:
        start = match.end() - 1
        try:
            value, end = decode(text, start)
        except (ValueError, RecursionError):
            end = match.end()
        else:
            if isinstance(value, dict):
                yield start, end, value
            match = _AFTER_BAD_NEWLINE.match(text, end)
            if match is not None:
                continue
        match = begin.search(text, end)


_AFTER_BAD_NEWLINE = re.compile(r"[\[,].[ \t]*\{", re.DOTALL)
"""Right behind the bracket or a whole record: a record, even if the newline between them is damaged."""


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} cannot be kept exactly")
    return value


def record_start(text: str) -> re.Pattern[str]:
    """How the records of this file begin: after a newline and the first record's indentation, or after any comma."""
    first = re.match(r"\s*\[(\r?\n[ \t]*)\{", text)
    if first is not None:
        return re.compile(re.escape(first[1]) + r"\{")
    # Objects inside of records stand deeper.
    indents = Counter(re.findall(r"(?:^|\n)([ \t]*)\{", text))
    repeated = [indent for indent, count in indents.items() if count > 1]
    if repeated:
        return re.compile(r"\n" + re.escape(min(repeated, key=len)) + r"\{")
    return re.compile(r"[\[,]\s*\{")
