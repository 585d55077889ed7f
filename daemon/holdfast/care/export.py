"""All data, or a part of it, as files of JSON that any program reads: the way out.

The files are those of the data directory's own layout, one record a line, with each conversation whole on one line of
``conversations.jsonl`` and a manifest of their own. What is written is the state at one event: the snapshots of a flush, and
from the archive the messages that the conversations had then.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson

from holdfast import __version__, record
from holdfast.archive.base import MessageQuery
from holdfast.care import tar
from holdfast.care.packing import Seal, pack
from holdfast.care.redact import Redactor
from holdfast.care.signed import encode_signed, is_whole
from holdfast.clock import format_ms, parse_ms
from holdfast.core.rules import Rules
from holdfast.core.sales import Sales, decode_sales, encode_sales
from holdfast.core.state import BUILT_IN, COMPLETED_ORDERS, CONVERSATIONS, ESCALATIONS, ORDERS, SESSIONS, USERS
from holdfast.disk.files import FULL_ERRNOS, Directory
from holdfast.disk.snapshot import ChecksumMismatchError, Manifest, blocks_of, snapshot_chunks
from holdfast.errors import BadRequest, InvalidRecord, NotFound, StorageFull, Unavailable
from holdfast.flush import FILE_OF, SALES_FILE, file_of
from holdfast.load import id_field_of
from holdfast.transcripts import encode_message

if TYPE_CHECKING:
    from holdfast.engine import Engine

FORMAT = 1
"""Of an export; a newer one is refused untouched."""

KIND = "holdfast export"
"""What tells its manifest from that of a data directory."""

CONVERSATIONS_FILE = "conversations.jsonl"
ESCALATIONS_FILE = "escalations.jsonl"
MANIFEST_FILE = "manifest.json"
SALES = "sales"

TRIES = 5
"""How often the picture is taken anew when something in it is deleted before it is written."""

MESSAGES_AT_ONCE = 500
LINES_AT_ONCE = 500

BREATH_S = 0.0002
"""Between portions, for the others that share the processor."""

READ_BYTES = 1 << 20

_PARTS = (SESSIONS, "orders", USERS, CONVERSATIONS, ESCALATIONS, SALES)
"""What may be named beside custom collections."""


class ExportFile(msgspec.Struct, frozen=True):
    """What the manifest says of one file.

    Attributes:
        records: how many; of sales figures the days.
        bytes: its size.
        sha256: of its content, 64 hex digits.
    """

    records: int
    bytes: int
    sha256: str


class ExportManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What ``manifest.json`` of an export says.

    Attributes:
        kind, format: that it is one, and of which layout.
        holdfast: version of the program that wrote it.
        at: when the data was so, ISO 8601.
        seq: everything up to this event is in it, and nothing beyond.
        redacted: people and texts are replaced by stand-ins.
        only: what was asked for; empty for everything.
        files: by name.
        messages: in all conversations together.
        checksum: SHA-256 of this file with nothing in this place.
    """

    kind: str = KIND
    format: int = FORMAT
    holdfast: str = ""
    at: str = ""
    seq: int = 0
    redacted: bool = False
    only: dict[str, str] = {}
    files: dict[str, ExportFile] = {}
    messages: int = 0
    checksum: str = ""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of the data; nothing said means all of it.

    Attributes:
        collection: sessions, orders, users, conversations, escalations, sales, or a custom collection.
        conversation: one conversation with its escalation.
        since_ms, until_ms: only what was active (sessions), changed (records) or updated (conversations) at or after, and
            before; of sales figures the days; ms since 1970.
        state: only sessions with this ``currentState``, orders with this ``status``.
        where: only records whose field has this value, as text; all of them must hold.
        is_redacted: with stand-ins for people and texts.
    """

    collection: str | None = None
    conversation: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    state: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    is_redacted: bool = False

    def described(self) -> dict[str, str]:
        """It in words, for the manifest."""
        said: dict[str, str | None] = {
            "collection": self.collection,
            "conversation": None if self.is_redacted else self.conversation,
            "since": None if self.since_ms is None else format_ms(self.since_ms),
            "until": None if self.until_ms is None else format_ms(self.until_ms),
            "state": self.state,
            "where": None
            if self.is_redacted
            else " and ".join(f"{field}={value}" for field, value in self.where) or None,
        }
        return {name: text for name, text in said.items() if text is not None}

    def takes_time(self, ms: int) -> bool:
        """Whether what happened at *ms* is wanted."""
        return (self.since_ms is None or ms >= self.since_ms) and (self.until_ms is None or ms < self.until_ms)


def export_chunks(
    engine: Engine, wanted: Selection, seal: Seal | None = None, progress: Callable[[str], object] = lambda text: None
) -> Iterator[bytes]:
    """The export of *wanted* as an archive (``.tar.zst``, with a *seal* ``.tar.zst.age``), piece by piece; blocks.

    Everything is gathered before the first piece, in nameless files beside the data, which are gone with whoever reads this.

    Raises:
        NotFound: no such collection or conversation.
        BadRequest: what was asked for does not go together.
        Unavailable: conversations are being deleted all the time, or the archive cannot be read.
        StorageFull, OSError: no room for the flush or for what is gathered.
    """
    with gathered(engine, wanted, progress) as export:
        yield from pack(export.tar_chunks(), seal)


class Export:
    """What was gathered, until it is closed."""

    def __init__(self, manifest: ExportManifest, contents: dict[str, IO[bytes]]) -> None:
        self.manifest = manifest
        self._contents = contents

    def tar_chunks(self) -> Iterator[bytes]:
        """It as a tar archive, the manifest first."""
        manifest = encode_export_manifest(self.manifest)
        yield tar.header_of(MANIFEST_FILE, len(manifest)) + manifest + tar.padding_of(len(manifest))
        for name, file in self.manifest.files.items():
            yield tar.header_of(name, file.bytes)
            content = self._contents[name]
            content.seek(0)
            while piece := content.read(READ_BYTES):
                yield piece
            yield tar.padding_of(file.bytes)
        yield tar.ENDING


def encode_export_manifest(manifest: ExportManifest) -> bytes:
    """Its JSON, indented for people."""
    return encode_signed(manifest)


def decode_export_manifest(raw: bytes) -> ExportManifest | None:
    """What ``encode_export_manifest`` made; None when it is the manifest of something else.

    Raises:
        InvalidRecord: a newer Holdfast wrote it, or it was changed.
    """
    try:
        said = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    if said.get("kind") != KIND:
        return None
    layout = said.get("format")
    if isinstance(layout, int) and layout > FORMAT:
        raise InvalidRecord(
            f"it is an export of format {layout}, this Holdfast knows {FORMAT}; install the version that wrote it. "
            "Nothing was touched"
        )
    try:
        manifest = msgspec.json.decode(raw, type=ExportManifest)
    except msgspec.DecodeError:
        manifest = None
    if manifest is None or not is_whole(raw):
        raise InvalidRecord("its manifest.json was changed since it was written; export it again")
    return manifest


@contextmanager
def gathered(
    engine: Engine, wanted: Selection, progress: Callable[[str], object] = lambda text: None
) -> Iterator[Export]:
    """Gather what is *wanted* in nameless files; blocks. Errors as ``export_chunks``."""
    _check(engine, wanted)
    for _ in range(TRIES):
        with ExitStack() as opened:
            try:
                export = _gather(engine, wanted, opened, progress)
            except _Deleted:
                continue
            except OSError as error:
                if error.errno in FULL_ERRNOS:
                    raise StorageFull(
                        f"no room to gather the export: {error.strerror}; free as much as it will take"
                    ) from error
                raise
            yield export
            return
    raise Unavailable("conversations were deleted all the while they were read; export again in a moment")


class _Deleted(Exception):
    """A conversation lost messages since the picture was taken; it has to be taken anew."""


class _Picture(NamedTuple):
    """The snapshot files at one seq, open: whoever replaces them does not change what is read here."""

    manifest: Manifest
    files: dict[str, IO[bytes]]

    def lines(self, name: str) -> Iterator[bytes]:
        """The records in the file *name*."""
        file = self.files.get(name)
        if file is None:
            return
        entry = self.manifest.files[name]
        try:
            for block in blocks_of(iter(lambda: file.read(READ_BYTES), b""), name, entry):
                yield from block.split(b",\n")
        except ChecksumMismatchError as error:
            raise Unavailable(f"{name} is not what was written; see holdfast verify") from error


def _check(engine: Engine, wanted: Selection) -> None:
    if wanted.since_ms is not None and wanted.until_ms is not None and wanted.since_ms >= wanted.until_ms:
        raise BadRequest(
            f"expected since to lie before until, found {format_ms(wanted.since_ms)} and {format_ms(wanted.until_ms)}; "
            "exchange them"
        )
    if wanted.conversation is not None:
        if wanted.collection not in (None, CONVERSATIONS) or wanted.state is not None or wanted.where:
            raise BadRequest("expected one conversation or a choice among many, found both")
        if engine.get(CONVERSATIONS, wanted.conversation) is None:
            raise NotFound(f"no conversation {wanted.conversation!r:.80}")
    if wanted.collection is not None and wanted.collection not in (*_PARTS, *engine.collection_names()):
        names = ", ".join([*_PARTS, *engine.collection_names()])
        raise NotFound(f"no collection {wanted.collection!r:.80}; there are {names}")
    if wanted.state is not None and wanted.collection not in (SESSIONS, ORDERS):
        raise BadRequest(
            "expected a state together with the collection sessions or orders, found it with another or none"
        )


def _gather(engine: Engine, wanted: Selection, opened: ExitStack, progress: Callable[[str], object]) -> Export:
    progress("taking a picture of the data")
    picture = _take_picture(engine, opened)
    redactor = Redactor() if wanted.is_redacted else None
    spools: dict[str, _Spool] = {}
    messages = 0
    for name, collection in _files_of(engine, picture, wanted):
        progress(f"gathering {name}")
        spool = spools[name] = _Spool(engine, opened)
        if name == SALES_FILE:
            spool.write_all([_sales_of(picture, wanted, spool)])
        elif collection == CONVERSATIONS:
            messages = _write_conversations(engine, picture, wanted, redactor, spool)
        elif collection == ESCALATIONS:
            for line in _lines(engine, picture, wanted, collection, redactor):
                spool.write_record(record.value_of(line) + b"\n")
        else:
            lines = _counted(_lines(engine, picture, wanted, collection, redactor), spool)
            spool.write_all(snapshot_chunks(_blocks(lines)))
    manifest = ExportManifest(
        holdfast=__version__,
        at=picture.manifest.at,
        seq=picture.manifest.snapshot_seq,
        redacted=wanted.is_redacted,
        only=wanted.described(),
        files={name: spool.entry() for name, spool in spools.items()},
        messages=messages,
    )
    return Export(manifest, {name: spool.file for name, spool in spools.items()})


def _take_picture(engine: Engine, opened: ExitStack) -> _Picture:
    """The snapshot files of one flush, as of now."""
    engine.flush("api")
    for _ in range(TRIES):
        try:
            return engine.hold_snapshots(lambda manifest, directory: _opened(manifest, directory, opened))
        except FileNotFoundError as error:
            # Somebody edited it, or took it away. What is in memory counts.
            engine.rewrite([str(error.filename)])
            engine.flush("api")
    raise Unavailable("somebody else writes the snapshot files all the while; try again when that has ended")


def _opened(manifest: Manifest, directory: Directory, opened: ExitStack) -> _Picture:
    files: dict[str, IO[bytes]] = {}
    for name, entry in manifest.files.items():
        found = directory.stat(name)
        if found is None or (found.st_size, found.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
            raise FileNotFoundError(errno.ENOENT, "not as it was written", name)
        files[name] = opened.enter_context(os.fdopen(directory.open_to_read(name), "rb"))
    return _Picture(manifest, files)


def _files_of(engine: Engine, picture: _Picture, wanted: Selection) -> Iterator[tuple[str, str]]:
    """The files of the export, each with its collection."""
    custom = [
        name.removesuffix(".json")
        for name in picture.manifest.files
        if name not in (*FILE_OF.values(), SALES_FILE) and not name.startswith("_")
    ]
    if wanted.conversation is not None:
        chosen = [CONVERSATIONS, ESCALATIONS]
    elif wanted.collection is None:
        chosen = [SESSIONS, ORDERS, COMPLETED_ORDERS, USERS, *sorted(custom), CONVERSATIONS, ESCALATIONS, SALES]
    elif wanted.collection == ORDERS:
        chosen = [ORDERS, COMPLETED_ORDERS]
    elif wanted.collection == CONVERSATIONS:
        chosen = [CONVERSATIONS, ESCALATIONS]
    else:
        chosen = [wanted.collection]
    special = {CONVERSATIONS: CONVERSATIONS_FILE, ESCALATIONS: ESCALATIONS_FILE, SALES: SALES_FILE}
    for collection in chosen:
        yield special.get(collection) or file_of(collection), collection


def _lines(
    engine: Engine, picture: _Picture, wanted: Selection, collection: str, redactor: Redactor | None
) -> Iterator[bytes]:
    """The records of *collection* that are wanted, with their headers."""
    rules = engine.rules
    is_all = wanted == Selection(collection=wanted.collection, is_redacted=wanted.is_redacted)
    id_field = id_field_of(collection, rules)
    for line in picture.lines(file_of(collection)):
        if redactor is None and is_all:
            yield line
            continue
        value = orjson.loads(line)
        if not is_all and not is_wanted(wanted, collection, value, line, rules):
            continue
        if redactor is not None:
            header = record.header_of(line)
            line = record.join_header(orjson.dumps(redactor.record(value, id_field)), header)
        yield line


def is_wanted(wanted: Selection, collection: str, value: dict[str, Any], line: bytes, rules: Rules) -> bool:
    """Whether the record in *line*, decoded as *value*, is *wanted*."""
    if wanted.conversation is not None and value.get("id") != wanted.conversation:
        return False
    if wanted.state is not None:
        field = "currentState" if collection == SESSIONS else "status"
        if value.get(field) != wanted.state:
            return False
    if any(_as_text(value.get(field)) != text for field, text in wanted.where):
        return False
    return (wanted.since_ms is None and wanted.until_ms is None) or wanted.takes_time(
        time_of(collection, value, record.header_of(line), rules)
    )


def time_of(collection: str, value: dict[str, Any], header: record.Header, rules: Rules) -> int:
    """When the record was active or changed last, ms since 1970; 0 when nothing tells."""
    fields = {
        SESSIONS: (rules.session_time_field,),
        ORDERS: ("updatedAt", "completedAt", "cancelledAt"),
        COMPLETED_ORDERS: ("updatedAt", "completedAt", "cancelledAt"),
        CONVERSATIONS: ("updated_at",),
        ESCALATIONS: ("updated_at", "opened_at"),
    }.get(collection, ("updatedAt",))
    said = [ms for field in fields if (ms := _moment(value.get(field), rules)) is not None]
    return max(said) if said else header.at or 0


def _moment(text: Any, rules: Rules) -> int | None:
    try:
        return parse_ms(text, rules.zone)
    except (TypeError, ValueError, OverflowError):
        return None


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def _write_conversations(
    engine: Engine, picture: _Picture, wanted: Selection, redactor: Redactor | None, spool: _Spool
) -> int:
    """Write each conversation on one line; how many messages that are."""
    total = 0
    unredacted = msgspec.structs.replace(wanted, is_redacted=False)
    for line in _lines(engine, picture, unredacted, CONVERSATIONS, None):
        value, version = record.split(line)
        head = orjson.loads(value)
        shown = value if redactor is None else orjson.dumps(redactor.conversation(head))
        spool.write(shown[:-1] + b',"messages":[')
        count = 0
        for messages in _messages(engine, head):
            encoded = [
                message if redactor is None else orjson.dumps(redactor.message(orjson.loads(message)))
                for message in messages
            ]
            spool.write((b"," if count else b"") + b",".join(encoded))
            count += len(messages)
        if count != head["message_count"] + head["system_count"]:
            present = engine.get(CONVERSATIONS, head["id"])
            if present is None or present.version != version:
                raise _Deleted
            # The archive lost them; what it has is all there is.
        spool.write_record(b"]}\n")
        total += count
        time.sleep(BREATH_S)
    return total


def _messages(engine: Engine, head: dict[str, Any]) -> Iterator[list[bytes]]:
    """The messages that the conversation had when its *head* was so, in portions."""
    after = 0
    while True:
        query = MessageQuery(after=after, before=head["last_number"] + 1, limit=MESSAGES_AT_ONCE, newest=False)
        found = engine.transcripts.read(lambda archive, query=query: archive.messages(head["id"], query))  # type: ignore[misc]
        if found:
            yield [encode_message(message) for message in found]
        if len(found) < MESSAGES_AT_ONCE:
            return
        after = found[-1].number


def _sales_of(picture: _Picture, wanted: Selection, spool: _Spool) -> bytes:
    file = picture.files.get(SALES_FILE)
    sales = Sales() if file is None else decode_sales(file.read())
    if wanted.since_ms is not None or wanted.until_ms is not None:
        # A day counts when it begins in the span, as UTC has it: the totals are those of all time.
        days = {
            date: figures
            for date, figures in sales.days.items()
            if wanted.takes_time(parse_ms(f"{date}T00:00:00.000Z"))
        }
        sales = Sales(days, sales.totals, sales.extra)
    if wanted.is_redacted:
        sales = Sales(sales.days, sales.totals)
    spool.records = len(sales.days)
    return encode_sales(sales)


def _blocks(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    for line in lines:
        block.append(line)
        if len(block) == LINES_AT_ONCE:
            yield block
            block = []
            time.sleep(BREATH_S)
    yield block


def _counted(lines: Iterable[bytes], spool: _Spool) -> Iterator[bytes]:
    for line in lines:
        spool.records += 1
        yield line


class _Spool:
    """One file of the export while it is written; it has no name and vanishes when it is closed."""

    def __init__(self, engine: Engine, opened: ExitStack) -> None:
        self.file: IO[bytes] = opened.enter_context(tempfile.TemporaryFile(dir=engine.settings.data_dir))  # noqa: SIM115
        self.records = 0
        self._bytes = 0
        self._digest = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Write *chunk*."""
        self.file.write(chunk)
        self._bytes += len(chunk)
        self._digest.update(chunk)

    def write_record(self, chunk: bytes) -> None:
        """Write *chunk*, which ends a record."""
        self.write(chunk)
        self.records += 1

    def write_all(self, chunks: Iterable[bytes]) -> None:
        """Write all *chunks*."""
        for chunk in chunks:
            self.write(chunk)

    def entry(self) -> ExportFile:
        """What the manifest says of it."""
        return ExportFile(self.records, self._bytes, self._digest.hexdigest())


assert set(_PARTS) - {SALES} <= {*BUILT_IN, "orders"}
