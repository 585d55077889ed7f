"""All data out, and data in: exports and imports as archives."""

from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from holdfast.care import merge, tar
from holdfast.care.export import Selection, export_chunks
from holdfast.care.given import open_archive
from holdfast.care.seal import seal_of, seal_to_write
from holdfast.disk.files import FULL_ERRNOS
from holdfast.errors import (
    BadRequest,
    HoldfastError,
    InvalidRecord,
    NotFound,
    StorageFull,
    Unavailable,
)
from holdfast.http.reply import JSON, Reply, Stream, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS
from holdfast.http.routes.fields import SINCE, STATE, UNTIL, flag, moment_ms
from holdfast.http.routes.route import Body, Field, Outcome, route
from holdfast.values import decode_typed

EXPORTS_MAX = 2
"""At once; each takes the room of what it exports while it is read."""

PART_BYTES = 256 << 10
WHERE_MAX = 10

_TAR_TYPE = "application/zstd"
_UPLOAD_TYPE = "application/octet-stream"
_NAME = "upload.tar.zst"
_Files = dict[str, list[dict[str, Any]] | dict[str, Any]]

COLLECTION = Field(
    "collection",
    "Only this: `sessions`, `orders`, `users`, `conversations`, `escalations`, `sales`, or a custom collection.",
    example="sessions",
)
CONVERSATION = Field("conversation", "Only the conversation with this id, and its escalation.")
WHERE = Field(
    "where",
    "Only records in which this field has this value, as `FIELD=VALUE`; may be repeated.",
    Annotated[str, Meta(pattern="^[^=]+=")],
)
REDACT = Field("redact", "Replace people and texts by stand-ins.", bool, "false")
DRY_RUN = Field("dry_run", "Say what would change, and change nothing.", bool, "true")
SKIP_INVALID = Field(
    "skip_invalid", "Take the valid records where others are not; else nothing is taken then.", bool, "false"
)
FILE = Field(
    "file", "What the archive is called; `.age` at its end says that it is encrypted.", example="export.tar.zst"
)

_gate = threading.BoundedSemaphore(EXPORTS_MAX)


@route(
    Outcome(
        200,
        "The archive: `.tar.zst`, and encrypted with age where `backups.recipients` names somebody. It is whole when it ends "
        "as chunked bodies end.",
        bytes,
        content_type=_TAR_TYPE,
    ),
    query=(COLLECTION, CONVERSATION, SINCE, UNTIL, STATE, WHERE, REDACT),
    errors=(NotFound, StorageFull),
)
async def export(backend: Backend, request: Request) -> Reply:
    """Everything, or a part of it, as it is at one event: files of JSON, a record a line, with a manifest."""
    query = request.query_lists()
    single = {name: values[0] for name, values in query.items() if name != "where"}
    if any(len(values) > 1 for name, values in query.items() if name != "where"):
        raise BadRequest("a query parameter is given twice; send each but where at most once")
    pairs = [text.partition("=") for text in query.get("where", [])]
    if len(pairs) > WHERE_MAX or not all(field and sign for field, sign, _ in pairs):
        raise BadRequest(f"expected where=FIELD=VALUE, at most {WHERE_MAX} times, found {query.get('where')!a:.80}")
    wanted = Selection(
        collection=single.get("collection"),
        conversation=single.get("conversation"),
        since_ms=moment_ms(single, backend),
        until_ms=moment_ms(single, backend, "until"),
        state=single.get("state"),
        where=tuple((field, value) for field, _, value in pairs),
        is_redacted=bool(flag(single, "redact")),
    )
    seal = seal_to_write(backend.settings)
    if not _gate.acquire(blocking=False):
        raise Unavailable(f"{EXPORTS_MAX} exports are being read already; try again when one of them has ended")
    source = _ExportSource(export_chunks(backend.engine, wanted, seal))
    try:
        # All is gathered before the first byte, so that what cannot be had is refused in time.
        await source.begin()
    except BaseException:
        source.close()
        raise
    return Stream(200, content_type=_TAR_TYPE, source=source)


class _ExportSource:
    """The body of an export, read in threads."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._first = b""
        self._is_ended = self._is_closed = False
        self._reading = threading.Lock()

    @property
    def lag(self) -> int:
        """Nothing waits: it is read when it is sent."""
        return 0

    async def begin(self) -> None:
        """Gather it, up to the first piece; errors as ``export_chunks``."""
        self._first = await asyncio.to_thread(self._read)

    async def next(self) -> bytes:
        """The next part.

        Raises:
            ConnectionError: the daemon stops; what was sent is not all, and does not look as if it were.
        """
        if self._is_ended:
            raise ConnectionError("stopping")
        if self._first:
            first, self._first = self._first, b""
            return first
        try:
            return await asyncio.to_thread(self._read)
        except (HoldfastError, OSError) as error:
            raise ConnectionError(str(error)) from error

    def end(self) -> None:
        """Break off: half an export is none."""
        self._is_ended = True

    def close(self) -> None:
        """Give back what was gathered."""
        if not self._is_closed:
            self._is_closed = True
            # Gigabytes are not given back in a moment, and somebody may still be reading.
            threading.Thread(target=self._give_back, name="export", daemon=True).start()

    def _read(self) -> bytes:
        parts, size = [], 0
        with self._reading:
            while size < PART_BYTES and (part := next(self._chunks, b"")):
                parts.append(part)
                size += len(part)
        return b"".join(parts)

    def _give_back(self) -> None:
        with self._reading:
            try:
                self._chunks.close()  # type: ignore[attr-defined]  # a generator's
            finally:
                _gate.release()


@route(
    Outcome(
        200,
        "What came of it.",
        merge.MergeReport,
        {
            "collections": {
                "notes": {
                    "added": 1,
                    "newer": 0,
                    "older": 0,
                    "same": 0,
                    "expired": 0,
                    "conflicting": 0,
                    "refused": 0,
                }
            },
            "messages": 0,
            "reasons": [],
            "ignored": [],
            "dry_run": False,
            "backup": "2026-11-21T140300.123Z",
        },
    ),
    name="import",
    query=(DRY_RUN, SKIP_INVALID, FILE),
    body=Body(
        _Files,
        {"notes.json": [{"id": "n1", "text": "hello"}]},
        other_type=_UPLOAD_TYPE,
    ),
    errors=(*BODY_ERRORS, InvalidRecord, StorageFull),
)
async def import_(backend: Backend, request: Request) -> Reply:
    """Merge files in the layout of the data directory, given as JSON by their names, or an archive: an export, `.tar.zst` or `.tar`.

    Everything is checked before anything is changed, and a backup is taken. Of two records with one id the newer counts; the
    same archive again changes nothing.
    """
    query = request.query()
    is_dry_run, skips_invalid = bool(flag(query, "dry_run")), bool(flag(query, "skip_invalid"))
    name = query.get("file", _NAME)
    engine = backend.engine
    scratch = engine.settings.data_dir
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() == JSON:
        raw = await request.body()
        decode_typed(raw, _Files, backend.batch_limits)
        return json_reply(
            await asyncio.to_thread(partial(_merged, backend, _tar_of(raw), f"{name}.tar", is_dry_run, skips_invalid))
        )
    with tempfile.TemporaryFile(dir=scratch) as file:
        try:
            async for part in request.parts():
                await asyncio.to_thread(file.write, part)
            file.seek(0)
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                raise StorageFull("no room for what was sent; free as much as it takes, nothing was changed") from error
            if error.errno in (None, errno.ECONNRESET, errno.EPIPE):
                raise ConnectionError("the client went away") from error
            raise
        pieces = iter(lambda: file.read(PART_BYTES), b"")
        return json_reply(await asyncio.to_thread(partial(_merged, backend, pieces, name, is_dry_run, skips_invalid)))


def _tar_of(raw: bytes) -> Iterator[bytes]:
    """The files in *raw*, a JSON object of their contents by name, as an archive."""
    for name, content in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).items():
        yield tar.header_of(name, len(content)) + bytes(content) + tar.padding_of(len(content))
    yield tar.ENDING


def _merged(
    backend: Backend, pieces: Iterator[bytes], name: str, is_dry_run: bool, skips_invalid: bool
) -> merge.MergeReport:
    engine = backend.engine
    with open_archive(pieces, engine.settings.data_dir, name, seal_of(backend.settings)) as given:
        return merge.merge(
            engine,
            given,
            is_dry_run=is_dry_run,
            skips_invalid=skips_invalid,
            before_change=lambda: engine.backup("import").name,
            is_cancelled=lambda: backend.readiness()["state"] != "RUNNING",
        )
