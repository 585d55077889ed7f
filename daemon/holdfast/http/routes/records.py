"""Sessions, orders, users, custom collections: the same paths, with a few of their own."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import msgspec

from holdfast.clock import parse_ms
from holdfast.errors import BadRequest, NotFound, VersionMismatch
from holdfast.http.reply import Reply, encode_json, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.ops import (
    ANY_VERSION,
    Answer,
    AnyOp,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    RecordDelete,
    RecordPatch,
    RecordPut,
    Seconds,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionRelease,
    SessionTouch,
    UserDelete,
    UserPatch,
    UserPut,
)
from holdfast.values import decode_object, decode_typed

if TYPE_CHECKING:
    from holdfast.pages import Page

PAGE_DEFAULT = 100
INTEGER_DIGITS_MAX = 18
"""Of versions and generations; more is no number of ours, and Python's own limit is never met."""

CallDurability = Literal["always", "everysec"]
_DURABILITIES = get_args(CallDurability)

B = TypeVar("B", bound="_Body")


class Kind(NamedTuple):
    """What tells one kind of record from another."""

    noun: str
    put: type[Any]
    patch: type[Any]
    delete: type[Any]
    list_query: tuple[str, ...] = ("limit", "cursor", "since")
    write_query: tuple[str, ...] = ("durability",)
    delete_query: tuple[str, ...] = ("durability",)


KINDS = {
    "sessions": Kind(
        "session",
        SessionPut,
        SessionPatch,
        SessionDelete,
        ("limit", "cursor", "since", "state"),
        ("ttl", "lease", "durability"),
        ("lease", "durability"),
    ),
    "orders": Kind("order", OrderPut, OrderPatch, OrderDelete, ("limit", "cursor", "since", "state")),
    "users": Kind("user", UserPut, UserPatch, UserDelete),
}
CUSTOM = Kind("record", RecordPut, RecordPatch, RecordDelete)


class Place(NamedTuple):
    """Where a request points: a record, or with an empty *id* a collection."""

    kind: Kind
    collection: str
    id: str

    def names(self) -> dict[str, str]:
        """The op's fields that say where."""
        return {"id": self.id, "collection": self.collection} if self.kind is CUSTOM else {"id": self.id}


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _LeaseBody(_Body, forbid_unknown_fields=True):
    ttl: Seconds = 30
    owner: str | None = None
    generation: int | None = None


class _ReleaseBody(_Body, forbid_unknown_fields=True):
    generation: int | None = None


class _CompleteBody(_Body, forbid_unknown_fields=True):
    revenue: Decimal | None = None


class _CancelBody(_Body, forbid_unknown_fields=True):
    reason: str | None = None


# Reading.


async def get(backend: Backend, request: Request, place: Place) -> Reply:
    """One record, as it was stored."""
    request.query()
    record = backend.engine.get(place.collection, place.id)
    if record is None:
        raise NotFound(f"no {place.kind.noun} {place.id!r:.80}")
    tag = f'"{record.version}"'
    seen = request.headers.get("If-None-Match")
    if seen is not None and (seen.strip() == "*" or tag in [_strong(one) for one in seen.split(",")]):
        return Reply(304, headers=f"ETag: {tag}\r\n")
    return Reply(200, record.value, f"ETag: {tag}\r\n")


async def page(backend: Backend, request: Request, place: Place) -> Reply:
    """One page of a collection."""
    query = request.query(*place.kind.list_query)
    since = query.get("since")
    # In a thread: a filter that few records pass may look at all of them.
    found = await asyncio.to_thread(
        backend.engine.page,
        place.collection,
        limit=_limit(query.get("limit"), backend.settings.limits.page),
        cursor=query.get("cursor"),
        since_ms=None if since is None else _moment(since, backend),
        state=query.get("state"),
    )
    return Reply(200, _encode_page(found))


async def names(backend: Backend, request: Request) -> Reply:
    """The custom collections that exist."""
    request.query()
    engine = backend.engine
    items = [{"name": name, "count": engine.count(name)} for name in engine.collection_names()]
    return json_reply({"items": items, "next": None})


# Writing.


async def put(backend: Backend, request: Request, place: Place) -> Reply:
    """Store a whole record."""
    query = request.query(*place.kind.write_query)
    value = decode_object(await request.body(), backend.record_limits)
    return await _commit(backend, request, query, place.kind.put(value=value, **_op_fields(request, query, place)))


async def patch(backend: Backend, request: Request, place: Place) -> Reply:
    """Merge a patch into a record (RFC 7396)."""
    query = request.query(*place.kind.write_query)
    value = decode_object(await request.body(), backend.record_limits)
    return await _commit(backend, request, query, place.kind.patch(value=value, **_op_fields(request, query, place)))


async def delete(backend: Backend, request: Request, place: Place) -> Reply:
    """Remove a record."""
    query = request.query(*place.kind.delete_query)
    return await _commit(backend, request, query, place.kind.delete(**_op_fields(request, query, place)))


async def touch(backend: Backend, request: Request, place: Place) -> Reply:
    """Set a session's last activity to now."""
    query = request.query("ttl", "lease", "durability")
    await _body(backend, request, _Body)
    return await _commit(backend, request, query, SessionTouch(**_op_fields(request, query, place)))


async def lease(backend: Backend, request: Request, place: Place) -> Reply:
    """Take or renew the lease of a session."""
    query = request.query("durability")
    body = await _body(backend, request, _LeaseBody)
    op = SessionLease(
        id=place.id,
        ttl=body.ttl,
        owner=body.owner,
        generation=body.generation,
        idempotency_key=_idempotency_key(request),
    )
    return await _commit(backend, request, query, op)


async def release(backend: Backend, request: Request, place: Place) -> Reply:
    """Give the lease of a session back."""
    query = request.query("generation", "durability")
    body = await _body(backend, request, _ReleaseBody)
    generation = body.generation if "generation" not in query else _integer(query["generation"], "generation")
    if generation is None:
        raise BadRequest("expected the generation of the lease, as ?generation= or in the body; found none")
    op = SessionRelease(id=place.id, generation=generation, idempotency_key=_idempotency_key(request))
    reply = await _commit(backend, request, query, op)
    return Reply(204) if request.method == "DELETE" else reply


async def complete(backend: Backend, request: Request, place: Place) -> Reply:
    """Complete an order, with its revenue."""
    query = request.query("durability")
    body = await _body(backend, request, _CompleteBody)
    op = OrderComplete(revenue=body.revenue, **_op_fields(request, query, place))
    return await _commit(backend, request, query, op)


async def cancel(backend: Backend, request: Request, place: Place) -> Reply:
    """Cancel a pending order."""
    query = request.query("durability")
    body = await _body(backend, request, _CancelBody)
    op = OrderCancel(reason=body.reason, **_op_fields(request, query, place))
    return await _commit(backend, request, query, op)


async def _commit(backend: Backend, request: Request, query: dict[str, str], op: AnyOp) -> Reply:
    ticket = backend.engine.submit(op, durability=durability(request, query))
    await ticket.committed()
    return _answer_reply(ticket.answer)


def _answer_reply(answer: Answer) -> Reply:
    if answer.status == 204:
        return Reply(204)
    if answer.generation is None and answer.expires_at is None:
        body = b'{"id":%b,"version":%d,"seq":%d}' % (encode_json(answer.id), answer.version, answer.seq)
        return Reply(answer.status, body)
    fields: dict[str, Any] = {"id": answer.id, "version": answer.version, "seq": answer.seq}
    if answer.generation is not None:
        fields["generation"] = answer.generation
    if answer.expires_at is not None:
        fields["expires_at"] = answer.expires_at
    return json_reply(fields, answer.status)


def _encode_page(found: Page) -> bytes:
    items = b",".join(
        b'{"id":%b,"version":%d,"value":%b}' % (encode_json(item.id), item.version, item.value) for item in found.items
    )
    return b'{"items":[%b],"next":%b}' % (items, encode_json(found.next))


# What a request says beside its body.


def durability(request: Request, query: dict[str, str]) -> CallDurability | None:
    """The durability this call asks for; None leaves it to the setting.

    Raises:
        BadRequest: neither ``always`` nor ``everysec``.
    """
    asked = query.get("durability") or request.headers.get("Holdfast-Durability")
    if asked is None:
        return None
    for known in _DURABILITIES:
        if asked == known:
            return known  # type: ignore[no-any-return]
    raise BadRequest(f"expected durability {' or '.join(_DURABILITIES)}, found {asked!a:.80}")


def _op_fields(request: Request, query: dict[str, str], place: Place) -> dict[str, Any]:
    headers = request.headers
    fields: dict[str, Any] = place.names()
    if_match, if_none_match = headers.get("If-Match"), headers.get("If-None-Match")
    if if_none_match is not None:
        if if_match is not None or if_none_match.strip() != "*":
            raise BadRequest('a write takes If-Match: "VERSION", If-Match: * or If-None-Match: *, and one of them only')
        fields["if_version"] = 0
    elif if_match is not None:
        fields["if_version"] = _version(if_match)
    key = _idempotency_key(request)
    if key is not None:
        fields["idempotency_key"] = key
    if "lease" in place.kind.write_query:
        generation = query.get("lease") or headers.get("Holdfast-Lease")
        if generation is not None:
            fields["lease"] = _integer(generation, "Holdfast-Lease")
    if "ttl" in query:
        fields["ttl"] = _seconds(query["ttl"])
    return fields


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not key.isascii():
        raise BadRequest("expected an Idempotency-Key of printable ASCII characters, found others")
    return key


def _version(tag: str) -> int:
    tag = _strong(tag)
    if tag == "*":
        return ANY_VERSION
    if "," in tag:
        raise BadRequest("expected one ETag in If-Match, found several")
    text = tag[1:-1] if len(tag) > 2 and tag[0] == tag[-1] == '"' else tag
    if not text.isascii() or not text.isdigit() or len(text) > INTEGER_DIGITS_MAX or int(text) == 0:
        raise VersionMismatch(f"no record ever had the ETag {tag!a:.80}; read the record for its own")
    return int(text)


def _strong(tag: str) -> str:
    """*tag* as we made it: a proxy that compresses marks it as weak."""
    return tag.strip().removeprefix("W/")


def _integer(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > INTEGER_DIGITS_MAX:
        raise BadRequest(f"expected a whole number as {name}, found {text!a:.80}")
    return int(text)


def _seconds(text: str) -> Seconds:
    """A number of seconds as such; anything else is for the engine to judge, which knows ``90s`` and ``12h``."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= INTEGER_DIGITS_MAX else text


def _limit(text: str | None, limit_max: int) -> int:
    if text is None:
        return min(PAGE_DEFAULT, limit_max)
    limit = _integer(text, "limit")
    if not 1 <= limit <= limit_max:
        raise BadRequest(f"expected a limit of 1 to {limit_max}, found {limit}")
    return limit


def _moment(text: str, backend: Backend) -> int:
    # An offset of +02:00 that was not percent-encoded arrives with a space.
    for candidate in (text, text.replace(" ", "+")):
        try:
            return parse_ms(candidate, backend.zone)
        except (ValueError, OverflowError):
            continue
    raise BadRequest(f"expected since as ISO 8601, such as 2026-11-21T06:00:00Z, found {text!a:.80}")


async def _body(backend: Backend, request: Request, kind: type[B]) -> B:
    raw = await request.body()
    return decode_typed(raw, kind, backend.record_limits) if raw else kind()
