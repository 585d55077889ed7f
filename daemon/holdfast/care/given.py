"""What somebody gives us to be merged, opened: an export, a directory in the data directory's layout, or one file of it.

Nothing of it is believed: no link is followed, nothing is read that is no plain file, an archive is unpacked into nameless
files, sizes are bounded, and an export is held against its own checksums before anything is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import msgspec
import orjson

from holdfast import values
from holdfast.care import tar
from holdfast.care.export import (
    CONVERSATIONS_FILE,
    ESCALATIONS_FILE,
    MANIFEST_FILE,
    ExportManifest,
    decode_export_manifest,
)
from holdfast.care.mirror import CONVERSATIONS_PLACE, ESCALATION_ENDING, ESCALATIONS_PLACE
from holdfast.care.packing import PACKED, SEALED, Seal, Unreadable, unpack
from holdfast.core.state import COMPLETED_ORDERS, CONVERSATIONS, ESCALATIONS, ORDERS, SESSIONS, USERS, is_custom_name
from holdfast.disk.files import FULL_ERRNOS, Directory
from holdfast.disk.snapshot import record_start, whole_records
from holdfast.errors import BadRequest, HoldfastError, InvalidJson, InvalidRecord, NotFound, StorageFull
from holdfast.flush import FILE_OF, SALES_FILE

FILE_BYTES_MAX = 1 << 30
"""Of a JSON file that is not one record a line, and so is held in memory while it is read."""

LINE_BYTES_MAX = 256 << 20
"""Of one record or conversation, on a line of its own."""

ARCHIVE_BYTES_MAX = 64 << 30
"""Of an archive when it is unpacked."""

SPARE_BYTES = 256 << 20
"""Of room on the disk that unpacking leaves to others."""

READ_BYTES = 1 << 20

READ_BUFFER_BYTES = 64 << 10

PACKED_BYTES = 1 << 10
"""Unpacked at a time: zstd makes 128 KiB of four bytes."""

SALES = "sales"
OLD_CONVERSATION = "old conversation"
OLD_ESCALATION = "old escalation"

_LINE_LIMITS = values.ValueLimits(bytes_max=LINE_BYTES_MAX, keys_max=100_000_000, depth_max=300)
_COLLECTION_OF = {file: name for name, file in FILE_OF.items() if name in (SESSIONS, ORDERS, COMPLETED_ORDERS, USERS)}
_OLD_USERS = "users"
_OTHERS = ("_", ".")
_RUNNING_PARTS = ("archive.db", "journal")
_ARCHIVE_ENDINGS = (f".tar{PACKED}", f".tar{PACKED}{SEALED}", ".tar")


class Part(NamedTuple):
    """One file of what is given.

    Attributes:
        name: as people call it.
        kind: a collection, ``conversations`` or ``escalations`` of an export, ``sales``, or one old conversation or escalation.
        open: its content from the beginning; to be closed.
        written_ms: when it was written, ms since 1970; 0 when that is not known.
        held_bytes_max: so much of it may be in memory at a time; FILE_BYTES_MAX and LINE_BYTES_MAX hold as well.
    """

    name: str
    kind: str
    open: Callable[[], IO[bytes]]
    written_ms: int = 0
    held_bytes_max: int = FILE_BYTES_MAX

    @property
    def line_bytes_max(self) -> int:
        """Of one record or conversation in it, on a line or in a file of its own."""
        return min(LINE_BYTES_MAX, self.held_bytes_max)

    def too_large(self, place: str, bytes_max: int) -> InvalidRecord:
        """The error for what is above *bytes_max* at *place* in it."""
        how = "" if self.held_bytes_max == FILE_BYTES_MAX else ", or take it with `holdfast import`"
        return InvalidRecord(f"{place}: expected at most {bytes_max} bytes, found more; split it{how}")


class Wrong(NamedTuple):
    """Something that should be a record and is none.

    Attributes:
        place: where it stands.
        reason: what is wrong with it.
    """

    place: str
    reason: str


class Unfinished(InvalidRecord):
    """It is no JSON, or is cut short: perhaps somebody still writes it."""


class NoRecords(InvalidRecord):
    """It is whole, and holds something else than records: a settings file of a bot, say."""


class Given:
    """What is to be merged; close it when done.

    Attributes:
        parts: in the order in which they are to be taken.
        manifest: of an export; None of anything else.
        ignored: files that are none of ours, by name.
    """

    def __init__(self, held_bytes_max: int = FILE_BYTES_MAX) -> None:
        """*held_bytes_max*: of each of its parts."""
        self.held_bytes_max = held_bytes_max
        self.parts: list[Part] = []
        self.manifest: ExportManifest | None = None
        self.ignored: list[str] = []
        self._opened = ExitStack()

    def __enter__(self) -> Given:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._opened.close()

    def _keep(self, resource: Any) -> Any:
        return self._opened.enter_context(resource)

    def _add(self, name: str, kind: str | None, opener: Callable[[], IO[bytes]], written_ms: int = 0) -> None:
        if kind is None:
            self.ignored.append(name)
        else:
            self.parts.append(Part(name, kind, opener, written_ms, self.held_bytes_max))

    def _finish(self) -> None:
        order = {name: place for place, name in enumerate(_ORDER)}
        self.parts.sort(key=lambda part: (order.get(part.kind, order["custom"]), part.name))


_ORDER = (
    SESSIONS,
    ORDERS,
    COMPLETED_ORDERS,
    USERS,
    "custom",
    CONVERSATIONS,
    OLD_CONVERSATION,
    ESCALATIONS,
    OLD_ESCALATION,
    SALES,
)
"""In which collections are taken: what others rest on first."""


def open_path(path: Path, scratch: Path, seal: Seal | None = None, *, held_bytes_max: int = FILE_BYTES_MAX) -> Given:
    """What stands at *path*, a directory or file; *scratch* is a directory with room for what is unpacked.

    At most *held_bytes_max* of a file are in memory at a time; one of which more would have to be is refused.

    Raises:
        NotFound: nothing stands there.
        BadRequest: it is neither a directory nor a plain file.
        InvalidRecord: it is cut short, changed, in no layout that is known, or of a newer Holdfast; or it is a data directory
            that has to be exported first.
        StorageFull: no room to unpack it.
    """
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            # Named by the operator himself; what stands inside of a directory is another matter.
            path = path.resolve()
            status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _open_directory(path, held_bytes_max)
        if not stat.S_ISREG(status.st_mode):
            raise BadRequest(f"expected a directory or a file at {path}, found something else; name an export")
        with Directory(path.parent) as directory:
            return open_file(directory, path.name, scratch, seal, held_bytes_max=held_bytes_max)
    except FileNotFoundError as error:
        raise NotFound(f"nothing is at {path}; name an export, a directory of data or one file of it") from error
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from error


def open_file(
    directory: Directory,
    name: str,
    scratch: Path,
    seal: Seal | None = None,
    *,
    held_bytes_max: int = FILE_BYTES_MAX,
) -> Given:
    """The one file *name* in *directory*; errors as ``open_path``."""
    with os.fdopen(directory.open_to_read(name), "rb") as file:
        if name.endswith(_ARCHIVE_ENDINGS):
            return open_archive(_pieces(file), scratch, name, seal, held_bytes_max=held_bytes_max)
        raw_size = os.fstat(file.fileno()).st_size
    given = Given(held_bytes_max)
    try:
        parent = given._keep(Directory(directory.path))
        opener = opener_in(parent, name)
        written_ms = _written_ms(parent, name)
        if name == MANIFEST_FILE:
            raise InvalidRecord("expected data, found a manifest; name the directory it stands in")
        kind = _kind_of_name(name)
        if kind is None or (kind not in _ORDER and _is_one_object(opener)):
            # One conversation may be called as a collection is.
            kind = _kind_of_content(Part(name, "", opener, 0, held_bytes_max), raw_size) or kind
        if kind is None:
            raise InvalidRecord(
                f"expected a file of data, such as chat_sessions.json or notes.json, found {name!r:.80}, which is no name "
                "of a collection, and no conversation in it; rename it"
            )
        given._add(name, kind, opener, written_ms)
    except BaseException:
        given._opened.close()
        raise
    return given


def open_archive(
    chunks: Iterable[bytes],
    scratch: Path,
    name: str,
    seal: Seal | None = None,
    *,
    held_bytes_max: int = FILE_BYTES_MAX,
) -> Given:
    """The archive *chunks*, called *name*, unpacked; errors as ``open_path``."""
    if name.endswith(SEALED) and seal is None:
        raise BadRequest(f"{name!r:.80} is encrypted; give the identity that opens it (--identity FILE)")
    if not name.endswith(".tar"):
        chunks = unpack(_small(chunks), seal if name.endswith(SEALED) else None)
    given = Given(held_bytes_max)
    sums: dict[str, tuple[int, str]] = {}
    raw_manifest: bytes | None = None
    try:
        # One file for all of them: a process has fewer descriptors than an old bot has conversations.
        spool: IO[bytes] = given._keep(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
        begins = 0
        for member in tar.members(chunks, bytes_max=_room(scratch)):
            if member.name in sums or (member.name == MANIFEST_FILE and raw_manifest is not None):
                # The manifest speaks of one of them, and nobody can tell which.
                raise InvalidRecord(f"{name!r:.80} has two files with the name {member.name!r:.120}; pack it anew")
            if member.name == MANIFEST_FILE:
                raw_manifest = b"".join(member.content) if member.size <= READ_BYTES * 64 else b""
                continue
            digest = hashlib.sha256()
            for piece in member.content:
                spool.write(piece)
                digest.update(piece)
            sums[member.name] = member.size, digest.hexdigest()
            kind = _kind_of_path(member.name)
            given._add(member.name, kind, _opener_within(spool, begins, member.size), member.written_s * 1000)
            begins += member.size
        spool.flush()
        _check_manifest(given, raw_manifest, sums)
        if not given.parts and given.manifest is None:
            raise InvalidRecord(_nothing_in(name, given.ignored))
        given._finish()
    except Unreadable as error:
        given._opened.close()
        raise Unfinished(f"{name!r:.80}: {error}; copy it again, or export it again") from error
    except OSError as error:
        given._opened.close()
        if error.errno in FULL_ERRNOS:
            raise StorageFull(f"no room to unpack {name!r:.80} in {scratch}; nothing was changed") from error
        raise
    except BaseException:
        given._opened.close()
        raise
    return given


def _open_directory(path: Path, held_bytes_max: int) -> Given:
    given = Given(held_bytes_max)
    try:
        root: Directory = given._keep(Directory(path))
        names = root.names()
        raw_manifest = _manifest_in(root, names)
        if any(name in names for name in _RUNNING_PARTS):
            raise InvalidRecord(
                f"{path} is a data directory of Holdfast, whose journal and archive no import reads; "
                f"run `holdfast export --data-dir {path} FILE.tar.zst`, then import that file"
            )
        for name in names:
            found = root.stat(name)
            if found is None or name == MANIFEST_FILE:
                continue
            if stat.S_ISDIR(found.st_mode) and name in (CONVERSATIONS_PLACE, ESCALATIONS_PLACE, _OLD_USERS):
                if name == _OLD_USERS and f"{USERS}.json" in names:
                    continue
                inner: Directory = given._keep(root.subdirectory(name))
                for file in inner.names():
                    _add_found(given, inner, file, f"{name}/{file}")
            elif not stat.S_ISDIR(found.st_mode):
                _add_found(given, root, name, name)
        if raw_manifest is not None:
            manifest = decode_export_manifest(raw_manifest)
            if manifest is not None:
                _check_manifest(given, raw_manifest, {part.name: _sum_of(part) for part in given.parts})
        if not given.parts and given.manifest is None:
            raise InvalidRecord(_nothing_in(str(path), given.ignored))
        given._finish()
    except BaseException:
        given._opened.close()
        raise
    return given


def _add_found(given: Given, directory: Directory, name: str, shown: str) -> None:
    found = directory.stat(name)
    if found is None or not stat.S_ISREG(found.st_mode):
        given.ignored.append(shown)
        return
    given._add(shown, _kind_of_path(shown), opener_in(directory, name), found.st_mtime_ns // 1_000_000)


def _manifest_in(root: Directory, names: list[str]) -> bytes | None:
    if MANIFEST_FILE not in names:
        return None
    try:
        return root.read_head(MANIFEST_FILE, READ_BYTES * 64)
    except OSError:
        return None


def _check_manifest(given: Given, raw: bytes | None, sums: dict[str, tuple[int, str]]) -> None:
    """Hold what is given against the manifest in it, where it is an export."""
    manifest = None if raw is None else decode_export_manifest(raw)
    if manifest is None:
        if any(name in sums for name in (CONVERSATIONS_FILE, ESCALATIONS_FILE)):
            raise InvalidRecord(
                f"it has a {CONVERSATIONS_FILE if CONVERSATIONS_FILE in sums else ESCALATIONS_FILE} and no readable "
                f"{MANIFEST_FILE}, so nobody can tell whether it is whole; export it again, or import that file alone"
            )
        return
    for name, file in manifest.files.items():
        found = sums.get(name)
        if found is None:
            raise InvalidRecord(f"{name} is missing; the manifest says {file.records} records: export it again")
        if found != (file.bytes, file.sha256):
            what = (
                "its content was changed"
                if found[0] == file.bytes
                else f"expected {file.bytes} bytes, found {found[0]}"
            )
            raise InvalidRecord(f"{name} is not what was exported: {what}; copy it again, or export it again")
    unknown = sorted(set(sums) - set(manifest.files))
    given.parts = [part for part in given.parts if part.name in manifest.files]
    given.ignored += unknown
    given.manifest = manifest


def _sum_of(part: Part) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with part.open() as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _room(scratch: Path) -> int:
    found = os.statvfs(scratch)
    return min(ARCHIVE_BYTES_MAX, max(0, found.f_bavail * found.f_frsize - SPARE_BYTES))


def _kind_of_path(name: str) -> str | None:
    place, _, file = name.rpartition("/")
    if file.startswith(_OTHERS):
        return None
    if place == "":
        return _kind_of_name(file)
    if not file.endswith(".json"):
        return None
    return {CONVERSATIONS_PLACE: OLD_CONVERSATION, ESCALATIONS_PLACE: OLD_ESCALATION, _OLD_USERS: USERS}.get(place)


def _kind_of_name(name: str) -> str | None:
    """What the file *name* holds; None when its name does not tell."""
    special = {CONVERSATIONS_FILE: CONVERSATIONS, ESCALATIONS_FILE: ESCALATIONS, SALES_FILE: SALES}
    if name in special:
        return special[name]
    if name in _COLLECTION_OF:
        return _COLLECTION_OF[name]
    stem = name.removesuffix(".json")
    if name.endswith(".json") and is_custom_name(stem):
        return stem
    return None


def _is_one_object(opener: Callable[[], IO[bytes]]) -> bool:
    with opener() as file:
        return file.read(READ_BUFFER_BYTES).removeprefix(_BOM).lstrip().startswith(b"{")


def _kind_of_content(part: Part, size: int) -> str | None:
    """What a file of *size* bytes whose name does not tell holds: one conversation, one escalation, or sales figures."""
    name = part.name
    if not name.endswith(".json"):
        return None
    if size > part.line_bytes_max:
        raise part.too_large(name, part.line_bytes_max)
    with part.open() as file:
        try:
            content = orjson.loads(file.read().removeprefix(_BOM))
        except orjson.JSONDecodeError as error:
            raise Unfinished(f"not JSON: {error.msg}, at line {error.lineno}, column {error.colno}") from None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("messages"), list):
        return OLD_CONVERSATION
    if name.endswith(ESCALATION_ENDING) or ("conversation_id" in content and "reason" in content):
        return OLD_ESCALATION
    return SALES if "daily" in content and "totals" in content else None


def records_of(part: Part, *, salvages: bool = False) -> Iterator[dict[str, Any] | Wrong]:
    """The records in *part*, decoded, one after the other; what is none of them is told as such.

    A file with a record on each line, as ours have it, is never in memory as a whole. Of an array in any other layout that is
    damaged so that nobody can tell where its records end, *salvages* takes those that are whole.

    Raises:
        InvalidRecord: nothing can be made of the file: it is no JSON, cut short, or too large.
    """
    with part.open() as file:
        first = file.readline(part.line_bytes_max)
        if part.name.endswith(".jsonl"):
            if first:
                yield from _lines(part, _rest(part, first, file), 1)
            return
        if first.rstrip(b"\r\n") == b"[":
            second = file.readline(part.line_bytes_max)
            if _is_record(second):
                yield from _array_lines(part, second, file)
                return
            first += second
        yield from _whole(part, first, file, salvages)


def whole_of(part: Part) -> dict[str, Any]:
    """The one JSON object in *part*.

    Raises:
        InvalidRecord: it is none, or cannot be kept exactly.
    """
    with part.open() as file:
        raw = read_up_to(file, part.line_bytes_max + 1)
    if len(raw) > part.line_bytes_max:
        raise part.too_large(part.name, part.line_bytes_max)
    return _object_in(raw.removeprefix(_BOM), part.name)


def _object_in(raw: bytes, place: str) -> dict[str, Any]:
    try:
        return values.decode_object(raw, _LINE_LIMITS)
    except InvalidJson as error:
        raise Unfinished(f"{place}: {error}") from None
    except HoldfastError as error:
        raise InvalidRecord(f"{place}: {error}") from None


def _lines(part: Part, lines: Iterable[bytes], number: int) -> Iterator[dict[str, Any] | Wrong]:
    for line in lines:
        place = f"{part.name}, line {number}"
        if len(line) >= part.line_bytes_max:
            raise part.too_large(place, part.line_bytes_max)
        number += 1
        if not line.strip():
            continue
        found = _decoded(line, place, part)
        if isinstance(found, Wrong) and not line.endswith(b"\n"):
            raise Unfinished(f"{place} is cut short: {found.reason}")
        yield found


def _array_lines(part: Part, second: bytes, file: IO[bytes]) -> Iterator[dict[str, Any] | Wrong]:
    """An array in our own layout: each record alone on its line; but for those that somebody laid out otherwise."""
    line, number = second, 2
    is_ours = False
    while line.rstrip(b"\r\n") != b"]":
        if len(line) >= part.line_bytes_max:
            raise part.too_large(f"{part.name}, line {number}", part.line_bytes_max)
        following = file.readline(part.line_bytes_max)
        bare = line.rstrip(b"\r\n").removesuffix(b",")
        if not is_ours and not (following and _is_json(bare)):
            is_ours = True
            place = file.tell()
            file.seek(0)
            found = _array_in(read_up_to(file, part.held_bytes_max + 1), part.held_bytes_max)
            if found is not None:
                # Each line before this one was one record.
                for index, one in enumerate(found[number - 2 :], number - 1):
                    yield _decoded(bytes(one), f"{part.name}, record {index}", part)
                return
            file.seek(place)
        if not following:
            raise Unfinished(f"{part.name} is cut short behind line {number}; copy it again")
        yield _decoded(bare, f"{part.name}, line {number}", part)
        line, number = following, number + 1
    if file.read(READ_BYTES).strip():
        raise InvalidRecord(f"{part.name}: there is something behind its end, at line {number + 1}; remove it")


def _array_in(raw: bytes, bytes_max: int) -> list[msgspec.Raw] | None:
    """The values in the JSON array *raw*; None when it is none, or above *bytes_max*."""
    if len(raw) > bytes_max:
        return None
    try:
        return msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _whole(part: Part, first: bytes, file: IO[bytes], salvages: bool) -> Iterator[dict[str, Any] | Wrong]:
    """An array in any other layout."""
    raw = first + read_up_to(file, part.held_bytes_max + 1 - len(first))
    if len(raw) > part.held_bytes_max:
        raise part.too_large(part.name, part.held_bytes_max)
    raw = raw.removeprefix(_BOM)
    if part.kind == USERS and "/" in part.name:
        yield _decoded(raw, part.name, part)
        return
    try:
        found = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except msgspec.ValidationError:
        if not _is_json(raw):
            raise Unfinished(f"{part.name}: not JSON, or cut short") from None
        raise NoRecords(f"{part.name}: expected an array of records, found one JSON value of another kind") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not raw.strip(b"\0 \t\r\n"):
            raise Unfinished(f"{part.name}: empty") from None
        yield from _damaged(part, raw, f"not JSON: {error}", salvages)
        return
    for number, one in enumerate(found, 1):
        yield _decoded(bytes(one), f"{part.name}, record {number}", part)


def _damaged(part: Part, raw: bytes, reason: str, salvages: bool) -> Iterator[dict[str, Any] | Wrong]:
    """The records of an array that is no JSON for *reason*: each for itself, where it is told apart from the others."""
    # Bytes that are no UTF-8 stay as they are, and are refused with the record that they stand in.
    text = raw.decode("utf-8", "surrogateescape")
    opening = _OPENING.match(text)
    if opening is None:
        raise Unfinished(f"{part.name}: {reason}")
    spans, reached = _values_from(text, opening.end())
    first_damaged = len(spans) + 1
    if salvages and reached < len(text):
        spans += _spans_behind(text, reached)
    if reached < len(text) and not (salvages and spans):
        raise Unfinished(f"{part.name}: {reason}, in record {first_damaged}")
    number, position, is_told = 0, opening.end(), reached == len(text)
    for start, end in [*spans, (len(text), len(text))]:
        number += 1
        if lost := text[position:start].strip(", \t\r\n]\0"):
            line = text.count("\n", 0, text.index(lost, position)) + 1
            yield Wrong(f"{part.name}, record {number} (line {line})", "not JSON, or cut short")
            number, is_told = number + 1, True
        if start < end:
            whole = text[start:end].encode("utf-8", "surrogateescape")
            yield _decoded(whole, f"{part.name}, record {number}", part)
        position = end
    if not is_told:
        yield Wrong(f"{part.name}, record {number}", "the file is cut short")


def _values_from(text: str, at: int) -> tuple[list[tuple[int, int]], int]:
    """Where the values of a JSON array begin and end, from the one at *at* on, and where the first stands that is none; the
    length of *text* when the array ends with it, and only then."""
    spans: list[tuple[int, int]] = []
    at = _after_blanks(text, at)
    while True:
        try:
            _, end = _SPLITTER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return spans, min(at, len(text) - 1)
        spans.append((at, end))
        at = _after_blanks(text, end)
        if text.startswith(",", at):
            at = _after_blanks(text, at + 1)
        elif text.startswith("]", at) and _after_blanks(text, at + 1) == len(text):
            return spans, len(text)
        else:
            return spans, min(at, len(text) - 1)


def _spans_behind(text: str, damaged: int) -> list[tuple[int, int]]:
    """Where the whole records behind the damage at *damaged* begin and end."""
    begin = record_start(text)
    if "\n" in begin.pattern:
        return [(start, end) for start, end, _ in whole_records(text) if start > damaged]
    # On one line a record cannot be told from an object in it, but for those that follow a comma and end with the array.
    match = begin.search(text, damaged + 1)
    while match is not None:
        spans, reached = _values_from(text, match.end() - 1)
        if reached == len(text) and match[0].startswith(","):
            return spans
        match = begin.search(text, max(reached, match.end()) - 1)
    return []


def _after_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()


_OPENING = re.compile(r"[ \t\r\n]*\[")
_BLANKS = re.compile(r"[ \t\r\n]*")
_SPLITTER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=str)
"""Takes more for JSON than we do, so that what we refuse of an array costs no other record."""


def _is_json(raw: bytes) -> bool:
    try:
        msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return False
    return True


def _decoded(raw: bytes, place: str, part: Part) -> dict[str, Any] | Wrong:
    try:
        value = values.decode_object(raw, _LINE_LIMITS)
    except HoldfastError as error:
        return Wrong(place, str(error))
    if part.kind in (ORDERS, COMPLETED_ORDERS) and type(value.get("revenue")) is float:
        value["revenue"] = msgspec.json.decode(raw, type=_Money).revenue
    return value


class _Money(msgspec.Struct):
    """Of an order what must not pass through binary floating point."""

    revenue: Decimal


def _is_record(line: bytes) -> bool:
    bare = line.rstrip(b"\r\n")
    return bare == b"]" or (bare.startswith(b"{") and bare.removesuffix(b",").endswith(b"}"))


def _rest(part: Part, first: bytes, file: IO[bytes]) -> Iterator[bytes]:
    yield first.removeprefix(_BOM)
    while line := file.readline(part.line_bytes_max):
        yield line


def read_up_to(file: IO[bytes], size: int) -> bytes:
    """The next *size* bytes of *file*, or fewer where it ends; takes no more memory than those that there are."""
    pieces, left = [], size
    # A single read would first ask for room for all that could come.
    while left > 0 and (piece := file.read(min(left, READ_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def opener_in(directory: Directory, name: str) -> Callable[[], IO[bytes]]:
    """What opens the plain file *name* in *directory*, as long as that is open."""

    def opener() -> IO[bytes]:
        try:
            return os.fdopen(directory.open_to_read(name), "rb")
        except OSError as error:
            raise InvalidRecord(f"{name} cannot be read: {error.strerror or error}") from error

    return opener


class _Within(io.RawIOBase):
    """A part of an open file, read from its beginning; as many at once as there are readers."""

    def __init__(self, file: IO[bytes], begins: int, size: int) -> None:
        self._file = file
        self._begins, self._at, self._ends = begins, begins, begins + size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: self._begins, os.SEEK_CUR: self._at, os.SEEK_END: self._ends}[whence]
        self._at = min(max(self._begins, start + offset), self._ends)
        return self._at - self._begins

    def readinto(self, buffer: Any) -> int:
        piece = os.pread(self._file.fileno(), min(len(buffer), self._ends - self._at), self._at)
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _opener_within(file: IO[bytes], begins: int, size: int) -> Callable[[], IO[bytes]]:
    return lambda: io.BufferedReader(_Within(file, begins, size), READ_BUFFER_BYTES)


def _written_ms(directory: Directory, name: str) -> int:
    found = directory.stat(name)
    return 0 if found is None else found.st_mtime_ns // 1_000_000


def _small(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """*chunks* in parts of which none becomes more than some megabytes when it is unpacked."""
    for chunk in chunks:
        yield from (chunk[start : start + PACKED_BYTES] for start in range(0, len(chunk), PACKED_BYTES))


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(READ_BYTES), b"")


def _nothing_in(name: str, ignored: list[str]) -> str:
    found = f"found {', '.join(ignored[:5])}" if ignored else "found nothing"
    return f"expected files of data in {name}, such as chat_sessions.json or conversations/ID.json, {found}"


_BOM = b"\xef\xbb\xbf"
