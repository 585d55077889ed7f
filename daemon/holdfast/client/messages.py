"""Ops as request bodies, and answers from response bodies: what both clients say, and understand."""

from __future__ import annotations

import math
import secrets
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import orjson

from holdfast import __version__, values
from holdfast.client.wire import Response
from holdfast.clock import format_ms
from holdfast.errors import (
    BadRequest,
    Gone,
    HoldfastError,
    InvalidJson,
    InvalidRecord,
    TooLarge,
    Unavailable,
    error_of,
)
from holdfast.ops import (
    Answer,
    AnyOp,
    BackupReport,
    Durability,
    EscalationOpen,
    FlushReport,
    MessageAppend,
    Page,
    Record,
    Retry,
    SessionLease,
    SessionPut,
    Window,
)

BATCH_OPS_MAX = 512
"""Ops that a client puts into one request by itself: enough to share a sync, few enough to hold up nobody."""

BATCH_BYTES_MAX = 1 << 20

SPAN_MAX_S = 1e12
"""Longer ago than that was nothing."""

PATH_OF = {name: f"/v1/{name}" for name in ("sessions", "orders", "users", "conversations", "escalations")}

_NO_LIMITS = values.ValueLimits(bytes_max=1 << 62, depth_max=1 << 62, keys_max=1 << 62)
"""The daemon has limits of its own."""

NO_TEXT = "a lone surrogate is not text; send valid Unicode"

_NO_OPTIONS = (None, None, None, None)

_encode = msgspec.json.Encoder().encode


class _Outcome(Answer, frozen=True, kw_only=True):
    """The answer to an op, or with a *code* its refusal."""

    seq: int = 0
    code: str | None = None
    detail: str = ""


class _BatchAnswer(msgspec.Struct):
    seq: int
    results: list[_Outcome]


class _Item(msgspec.Struct):
    id: str
    version: int
    value: msgspec.Raw


class _Items(msgspec.Struct):
    items: list[_Item]
    next: str | None = None


class _Window(msgspec.Struct):
    items: list[_Item]
    tokens_used: int


class _Problem(msgspec.Struct):
    code: str = ""
    detail: str = ""
    index: int | None = None
    oldest_seq: int | None = None


_decode_batch = msgspec.json.Decoder(_BatchAnswer).decode
_decode_items = msgspec.json.Decoder(_Items).decode
_decode_window = msgspec.json.Decoder(_Window).decode
_decode_problem = msgspec.json.Decoder(_Problem).decode
_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_report = msgspec.json.Decoder(FlushReport).decode
_decode_backup = msgspec.json.Decoder(BackupReport).decode


# Requests.


def new_client_id() -> str:
    """A name for the retries of one connection."""
    return secrets.token_urlsafe(9)


def encode_op(op: AnyOp) -> bytes:
    """*op* as a member of a batch.

    Raises:
        InvalidRecord: its value is nothing that can be kept exactly.
    """
    value = getattr(op, "value", None)
    try:
        if type(op) is SessionPut and (op.if_version, op.ttl, op.lease, op.idempotency_key) == _NO_OPTIONS:
            return b'{"op":"session.put","id":%b,"value":%b}' % (_encode(op.id), values.encode(op.value, _NO_LIMITS))
        ttl = getattr(op, "ttl", None)
        if isinstance(ttl, float) and not math.isfinite(ttl):  # which JSON has no word for
            raise InvalidRecord(f"ttl: expected a number of seconds, found {ttl}")
        if isinstance(op, MessageAppend | EscalationOpen):
            # As one value, since callers put into metadata what they like.
            return values.encode({"op": type(op).__struct_config__.tag, **_given(op)}, _NO_LIMITS)
        if value is None:
            return _encode(op)
        encoded = values.encode(value, _NO_LIMITS)
        fields = {name: found for name in op.__struct_fields__ if (found := getattr(op, name)) is not None}
        return _encode({"op": type(op).__struct_config__.tag} | fields | {"value": msgspec.Raw(encoded)})
    except UnicodeEncodeError:
        raise InvalidRecord(NO_TEXT) from None


def _given(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields of *struct* that say something, those of messages in it as well."""
    fields = {name: found for name in struct.__struct_fields__ if (found := getattr(struct, name)) is not None}
    if isinstance(struct, MessageAppend) and struct.messages is not None:
        fields["messages"] = [_given(message) for message in struct.messages]
    return fields


def batch_body(ops: list[bytes], *, atomic: bool) -> bytes:
    """The body of ``/v1/batch``."""
    return b'{"atomic":%b,"ops":[%b]}' % (b"true" if atomic else b"false", b",".join(ops))


def batch_target(durability: Durability | None) -> str:
    """Where a batch goes."""
    return "/v1/batch" if durability is None else f"/v1/batch?durability={quote(durability, safe='')}"


def retry_line(retry: Retry) -> str:
    """The header that makes sending again safe."""
    return f"Holdfast-Retry: {retry.client}/{retry.number}\r\n"


def collection_target(collection: str) -> str:
    """The path of a collection."""
    return PATH_OF.get(collection) or f"/v1/collections/{quote(collection, safe='')}"


def record_target(collection: str, id: str) -> str:
    """The path of a record.

    Raises:
        InvalidRecord: *id* is no text that can be sent.
    """
    try:
        # Only what no path means otherwise: a proxy would resolve "." and "..".
        return f"{collection_target(collection)}/{quote(id, safe='') if id not in ('.', '..') else '%2E' * len(id)}"
    except UnicodeEncodeError:
        raise InvalidRecord(NO_TEXT) from None


def page_target(collection: str, limit: int, cursor: str | None, since_ms: int | None, state: str | None) -> str:
    """The path of a part of a list."""
    return _asking(collection_target(collection), limit=limit, cursor=cursor, state=state, since_ms=since_ms)


def head_target(collection: str, id: str) -> str:
    """The path of a record or, of a conversation, of what is known of it beside its messages."""
    target = record_target(collection, id)
    return f"{target}?messages=false" if collection == "conversations" else target


def conversation_target(id: str) -> str:
    """The path of a conversation whole."""
    return record_target("conversations", id)


def conversations_target(
    *, active_within_s: float | None = None, older_than_s: float | None = None, **wanted: Any
) -> str:
    """The path of a part of the conversations; *wanted* as ``blocking.Transcripts.page`` takes it."""
    spans = {"active_within": active_within_s, "older_than": older_than_s}
    texts = {name: f"{min(span, SPAN_MAX_S):f}s" for name, span in spans.items() if span is not None}
    return _asking(collection_target("conversations"), **wanted, **texts)


def messages_target(id: str, **wanted: Any) -> str:
    """The path of some messages; *wanted* as ``blocking.Transcripts.messages`` takes it."""
    return _asking(f"{record_target('conversations', id)}/messages", **wanted)


def window_target(id: str, messages: int | None, tokens: int | None) -> str:
    """The path of the newest messages that fit."""
    return _asking(f"{record_target('conversations', id)}/window", messages=messages, tokens=tokens)


def escalations_target(**wanted: Any) -> str:
    """The path of a part of the escalations."""
    return _asking(collection_target("escalations"), **wanted)


def _asking(path: str, **query: Any) -> str:
    """*path* with those of *query* that say something; ``since_ms`` goes as ``since``.

    Raises:
        InvalidRecord: a text that cannot be sent.
    """
    given: dict[str, Any] = {}
    for name, value in query.items():
        if value is None:
            continue
        if name.endswith("_ms"):
            given[name.removesuffix("_ms")] = _moment(value)
        else:
            given[name] = str(value).lower() if isinstance(value, bool) else value
    try:
        return f"{path}?{urlencode(given)}" if given else path
    except UnicodeEncodeError:
        raise InvalidRecord(NO_TEXT) from None


def _moment(ms: int) -> str:
    try:
        return format_ms(ms)
    except (OverflowError, ValueError):
        raise BadRequest(f"expected ms since 1970 within the years 1 to 9999, found {ms}") from None


def lease_target(id: str, durability: Durability | None) -> str:
    """Where a lease is asked for."""
    query = "" if durability is None else f"?durability={quote(durability, safe='')}"
    return f"{record_target('sessions', id)}/lease{query}"


def lease_body(op: SessionLease, wait_s: float) -> bytes:
    """The body that asks for a lease and waits for it."""
    fields = {"ttl": op.ttl, "owner": op.owner, "generation": op.generation, "wait": wait_s}
    return _encode({name: value for name, value in fields.items() if value is not None})


# Answers.


def outcomes(response: Response, count: int) -> list[Answer | HoldfastError]:
    """What became of each of the *count* ops of a batch.

    Raises:
        HoldfastError: of the batch as a whole.
    """
    check(response)
    results = _decoded(_decode_batch, response).results
    if len(results) != count:
        raise Unavailable(
            f"expected the answers to {count} ops, found {len(results)}; is it a daemon of another version?"
        )
    return [one if one.code is None else error_of(one.code, one.detail, one.status) for one in results]


def may_be_of_one(error: HoldfastError) -> bool:
    """Whether a batch that was refused whole, with nothing done, may be good but for some of its ops or its size."""
    return isinstance(error, BadRequest | InvalidJson | InvalidRecord | TooLarge)


def record_in(response: Response, id: str) -> Record | None:
    """The record that was asked for; None when there is none."""
    if response.status == 404 and _problem(response).detail != NO_SUCH_PATH:
        return None
    check(response)
    return Record(id, int(response.headers["etag"].strip('W/"')), response.body)


def page_in(response: Response) -> Page:
    """A part of a list."""
    check(response)
    found = _decoded(_decode_items, response)
    return Page([Record(item.id, item.version, bytes(item.value)) for item in found.items], found.next)


def window_in(response: Response) -> Window:
    """The newest messages that fit."""
    check(response)
    found = _decoded(_decode_window, response)
    return Window([Record(item.id, item.version, bytes(item.value)) for item in found.items], found.tokens_used)


def answer_in(response: Response) -> Answer:
    """The answer to a single op."""
    check(response)
    fields = _decoded(orjson.loads, response)
    return msgspec.convert({"status": response.status} | fields, Answer)


def report_in(response: Response) -> FlushReport:
    """What a flush did."""
    check(response)
    report: FlushReport = _decoded(_decode_report, response)
    return report


def backup_in(response: Response) -> BackupReport:
    """What a backup did."""
    check(response)
    report: BackupReport = _decoded(_decode_backup, response)
    return report


def status_in(response: Response) -> dict[str, Any]:
    """A JSON object."""
    check(response)
    found: dict[str, Any] = _decoded(orjson.loads, response)
    return found


def count_in(status: dict[str, Any], collection: str) -> int:
    """How many records *collection* has, by the daemon's status."""
    name = {"orders": "pending_orders", "escalations": "open_escalations"}.get(collection, collection)
    if name in ("sessions", "pending_orders", "completed_orders", "users", "conversations", "open_escalations"):
        return int(status[name])
    return int(status["collections"].get(name, 0))


def is_temporary(response: Response) -> bool:
    """Whether the same request may well be served soon: the daemon starts, stops, or a proxy does not find it."""
    return response.status in (502, 503, 504)


NO_SUCH_PATH = "no such path; GET / names them"
"""How the daemon says that it does not know a path, rather than a record."""


def check(response: Response) -> None:
    """Return when the request was served.

    Raises:
        HoldfastError: it was refused.
    """
    if response.status >= 400:
        raise refusal_in(response)


def refusal_in(response: Response) -> HoldfastError:
    """What the daemon says against a request."""
    problem = _problem(response)
    if not problem.code:
        return Unavailable(
            f"expected a Holdfast daemon, found a server that answers {response.status} without a reason"
        )
    error = error_of(problem.code, problem.detail + _other_version(response), response.status)
    error.index = problem.index
    if isinstance(error, Gone) and problem.oldest_seq is not None:
        error.oldest_seq = problem.oldest_seq
    return error


def _other_version(response: Response) -> str:
    """A hint where the refusal may come from a daemon that is older or newer than this library."""
    server = response.headers.get("server", "")
    if response.status not in (400, 404, 405, 422) or not server.startswith("holdfast/"):
        return ""
    version = server.removeprefix("holdfast/")
    return "" if version == __version__ else f" (the daemon is version {version}, this client {__version__})"


def _problem(response: Response) -> _Problem:
    try:
        return _decode_problem(response.body)
    except msgspec.DecodeError:
        return _Problem()


def _decoded(decode: Any, response: Response) -> Any:
    try:
        return decode(response.body)
    except (msgspec.DecodeError, orjson.JSONDecodeError):
        server = response.headers.get("server", "another server")
        raise Unavailable(
            f"expected the JSON of a Holdfast daemon, version {__version__}; {server} sent {response.body!r:.60}"
        ) from None
