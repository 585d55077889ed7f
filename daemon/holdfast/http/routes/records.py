"""Sessions, orders, users, custom collections: the same paths, with a few of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from holdfast.errors import (
    BadRequest,
    Conflict,
    HoldfastError,
    InvalidJson,
    InvalidRecord,
    Leased,
    NotFound,
    StorageFull,
    TooLarge,
    UnsupportedMediaType,
    VersionMismatch,
)
from holdfast.http.reply import Reply, encode_json, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import (
    CONDITIONAL,
    CURSOR,
    DURABILITY_QUERY,
    ETAG,
    GENERATION,
    LEASE,
    LEASE_QUERY,
    LIMIT,
    SEEN,
    SINCE,
    STATE,
    TTL,
    WRITE,
    add_conditions,
    durability,
    has_seen,
    idempotency_key,
    integer,
    limit,
    retry_of,
    since_ms,
)
from holdfast.http.routes.route import Body, Field, Methods, Outcome, route, text_of
from holdfast.leases import LEASE_WAIT_MAX_S, take_lease_async
from holdfast.ops import (
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
from holdfast.settings import parse_duration
from holdfast.values import decode_object, decode_typed

if TYPE_CHECKING:
    from holdfast.ops import Page

B = TypeVar("B", bound="_Body")


class Example(NamedTuple):
    """A record of one kind, as the document shows it.

    Attributes:
        key: what is added to *value* when it is stored.
    """

    id: str
    key: dict[str, Any]
    value: dict[str, Any]
    patch: dict[str, Any]


class Kind(NamedTuple):
    """What tells one kind of record from another."""

    noun: str
    put: type[Any]
    patch: type[Any]
    delete: type[Any]
    example: Example
    list_query: tuple[Field, ...] = (LIMIT, CURSOR, SINCE)
    takes_lease: bool = False


KINDS = {
    "sessions": Kind(
        "session",
        SessionPut,
        SessionPatch,
        SessionDelete,
        Example(
            "573001234567",
            {"recipientPhone": "573001234567"},
            {"currentState": "catalog", "lastActivity": "2026-11-21T06:00:00.000Z"},
            {"currentState": "awaiting_payment"},
        ),
        list_query=(LIMIT, CURSOR, SINCE, STATE),
        takes_lease=True,
    ),
    "orders": Kind(
        "order",
        OrderPut,
        OrderPatch,
        OrderDelete,
        Example(
            "1001",
            {"odooOrderId": 1001},
            {"recipientPhone": "573001234567", "productType": "music"},
            {"capacity": "64GB"},
        ),
        list_query=(LIMIT, CURSOR, SINCE, STATE),
    ),
    "users": Kind(
        "user",
        UserPut,
        UserPatch,
        UserDelete,
        Example("ana", {"user_id": "ana"}, {"name": "Ana"}, {"city": "Medellín"}),
    ),
}
CUSTOM = Kind(
    "record", RecordPut, RecordPatch, RecordDelete, Example("n1", {"id": "n1"}, {"text": "hello"}, {"read": True})
)


class Place(NamedTuple):
    """Where a request points: a record, or with an empty *id* a collection."""

    kind: Kind
    collection: str
    id: str

    def names(self) -> dict[str, str]:
        """The op's fields that say where."""
        return {"id": self.id, "collection": self.collection} if self.kind is CUSTOM else {"id": self.id}


RecordHandler = Callable[[Backend, Request, Place], Awaitable[Reply]]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    pass


class TouchBody(_Body, forbid_unknown_fields=True):
    """Nothing, or an empty object."""


class LeaseBody(_Body, forbid_unknown_fields=True):
    """What kind of lease is wanted; all of it may be left out.

    Attributes:
        ttl: when it ends unless it is renewed.
        owner: who wants it, for people who look.
        generation: of the lease that is to be renewed; without it a new one is taken.
        wait: how long to stand in line while another holds it; then 423.
    """

    ttl: Seconds = 30
    owner: str | None = None
    generation: int | None = None
    wait: Seconds = 0


class ReleaseBody(_Body, forbid_unknown_fields=True):
    """Which lease is over.

    Attributes:
        generation: as it was granted.
    """

    generation: int | None = None


class CompleteBody(_Body, forbid_unknown_fields=True):
    """What the order brought.

    Attributes:
        revenue: counted once, however often this is repeated.
    """

    revenue: Decimal | None = None


class CancelBody(_Body, forbid_unknown_fields=True):
    """Why.

    Attributes:
        reason: kept with the order.
    """

    reason: str | None = None


_BODY_ERRORS = (InvalidJson, TooLarge, UnsupportedMediaType)
_PUT_ERRORS = (Conflict, VersionMismatch, InvalidRecord, StorageFull)
_CHANGE_ERRORS = (NotFound, *_PUT_ERRORS)
_LEASE_ERRORS = (*_BODY_ERRORS, Conflict, InvalidRecord, Leased, StorageFull)


def _written(
    about: str = "It is done.", *, id: str = "1001", status: int = 200, version: int = 2, seq: int = 2
) -> Outcome:
    return Outcome(status, about, answers.Written, {"id": id, "version": version, "seq": seq})


# Reading.


async def get(backend: Backend, request: Request, place: Place) -> Reply:
    """One record, as it was stored."""
    request.query()
    record = backend.engine.get(place.collection, place.id)
    if record is None:
        raise NotFound(f"no {place.kind.noun} {place.id!r:.80}")
    tag = f'"{record.version}"'
    if has_seen(request, tag):
        return Reply(304, headers=f"ETag: {tag}\r\n")
    return Reply(200, record.value, f"ETag: {tag}\r\n")


async def page(backend: Backend, request: Request, place: Place) -> Reply:
    """One page of a collection."""
    query = request.query()
    # In a thread: a filter that few records pass may look at all of them.
    found = await asyncio.to_thread(
        backend.engine.page,
        place.collection,
        limit=limit(query, backend.settings.limits.page),
        cursor=query.get("cursor"),
        since_ms=since_ms(query, backend),
        state=query.get("state"),
    )
    return Reply(200, _encode_page(found))


@route(
    Outcome(200, "Their names.", answers.Collections, {"items": [{"name": "notes", "count": 1}], "next": None}),
    name="collection_list",
)
async def names(backend: Backend, request: Request) -> Reply:
    """The custom collections that exist."""
    request.query()
    engine = backend.engine
    items = [answers.CollectionCount(name, engine.count(name)) for name in engine.collection_names()]
    return json_reply(answers.Collections(items))


# Writing.


async def put(backend: Backend, request: Request, place: Place) -> Reply:
    """Store a whole record."""
    query = request.query()
    value = decode_object(await request.body(), backend.record_limits)
    return await _commit(backend, request, query, place.kind.put(value=value, **_op_fields(request, query, place)))


async def patch(backend: Backend, request: Request, place: Place) -> Reply:
    """Merge a patch into a record (RFC 7396)."""
    query = request.query()
    value = decode_object(await request.body(), backend.record_limits)
    return await _commit(backend, request, query, place.kind.patch(value=value, **_op_fields(request, query, place)))


async def delete(backend: Backend, request: Request, place: Place) -> Reply:
    """Remove a record."""
    query = request.query()
    return await _commit(backend, request, query, place.kind.delete(**_op_fields(request, query, place)))


@route(
    _written(id="573001234567"),
    name="session_touch",
    query=(TTL, LEASE_QUERY, DURABILITY_QUERY),
    headers=(*CONDITIONAL, LEASE),
    body=Body(TouchBody, {}, is_required=False),
    errors=(*_BODY_ERRORS, *_CHANGE_ERRORS, Leased),
)
async def touch(backend: Backend, request: Request, place: Place) -> Reply:
    """Set a session's last activity to now."""
    query = request.query()
    await _body(backend, request, TouchBody)
    return await _commit(backend, request, query, SessionTouch(**_op_fields(request, query, place)))


@route(
    Outcome(
        200,
        "The lease is the caller's.",
        answers.Granted,
        {"id": "573001234567", "version": 0, "seq": 2, "generation": 2, "expires_at": "2026-11-21T06:00:30.000Z"},
    ),
    name="session_lease",
    query=(DURABILITY_QUERY,),
    headers=WRITE,
    body=Body(LeaseBody, {"ttl": "30s", "owner": "worker-1"}, is_required=False),
    errors=_LEASE_ERRORS,
)
async def lease(backend: Backend, request: Request, place: Place) -> Reply:
    """Take or renew the lease of a session; with ``wait``, stand in line for it for so long."""
    query = request.query()
    body = await _body(backend, request, LeaseBody)
    op = SessionLease(
        id=place.id,
        ttl=body.ttl,
        owner=body.owner,
        generation=body.generation,
        idempotency_key=idempotency_key(request),
    )
    answer = await take_lease_async(
        backend.engine,
        op,
        _wait_s(body.wait),
        durability=durability(request, query),
        retry=retry_of(request),
        is_wanted=lambda: not request.is_gone,
    )
    return _answer_reply(answer)


@route(
    _written("It is free.", id="573001234567", version=0, seq=3),
    name="session_release",
    query=(GENERATION, DURABILITY_QUERY),
    headers=WRITE,
    body=Body(ReleaseBody, {"generation": 2}, is_required=False),
    errors=_LEASE_ERRORS,
)
async def release(backend: Backend, request: Request, place: Place) -> Reply:
    """Give the lease of a session back."""
    query = request.query()
    body = await _body(backend, request, ReleaseBody)
    generation = body.generation
    if "generation" in query:
        generation = integer(query["generation"], "generation")
        if body.generation not in (None, generation):
            raise BadRequest(
                f"expected one generation, found ?generation={generation} and {body.generation} in the body"
            )
    if generation is None:
        raise BadRequest("expected the generation of the lease, as ?generation= or in the body; found none")
    op = SessionRelease(id=place.id, generation=generation, idempotency_key=idempotency_key(request))
    return await _commit(backend, request, query, op)


@route(
    Outcome(204, "It is free."),
    name="session_lease_delete",
    query=release.query,
    headers=release.headers,
    body=release.body,
    errors=release.errors,
)
async def delete_lease(backend: Backend, request: Request, place: Place) -> Reply:
    """The same as POST …/release, with 204 for an answer."""
    await release.handler(backend, request, place)
    return Reply(204)


@route(
    _written(),
    name="order_complete",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(CompleteBody, {"revenue": "84900.50"}, is_required=False),
    errors=(*_BODY_ERRORS, *_CHANGE_ERRORS),
)
async def complete(backend: Backend, request: Request, place: Place) -> Reply:
    """Complete an order, with its revenue."""
    query = request.query()
    body = await _body(backend, request, CompleteBody)
    op = OrderComplete(revenue=body.revenue, **_op_fields(request, query, place))
    return await _commit(backend, request, query, op)


@route(
    _written(),
    name="order_cancel",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(CancelBody, {"reason": "out of stock"}, is_required=False),
    errors=(*_BODY_ERRORS, *_CHANGE_ERRORS),
)
async def cancel(backend: Backend, request: Request, place: Place) -> Reply:
    """Cancel a pending order."""
    query = request.query()
    body = await _body(backend, request, CancelBody)
    op = OrderCancel(reason=body.reason, **_op_fields(request, query, place))
    return await _commit(backend, request, query, op)


def _op_fields(request: Request, query: dict[str, str], place: Place) -> dict[str, Any]:
    op: dict[str, Any] = place.names()
    add_conditions(op, request, query, takes_lease=place.kind.takes_lease)
    return op


async def _commit(backend: Backend, request: Request, query: dict[str, str], op: AnyOp) -> Reply:
    ticket = backend.engine.submit(op, durability=durability(request, query), retry=retry_of(request))
    await ticket.committed()
    return _answer_reply(ticket.answer)


def _answer_reply(answer: Answer) -> Reply:
    if answer.status == 204:
        return Reply(204)
    if answer.generation is None and answer.expires_at is None:
        body = b'{"id":%b,"version":%d,"seq":%d}' % (encode_json(answer.id), answer.version, answer.seq)
        return Reply(answer.status, body)
    granted: dict[str, Any] = {"id": answer.id, "version": answer.version, "seq": answer.seq}
    if answer.generation is not None:
        granted["generation"] = answer.generation
    if answer.expires_at is not None:
        granted["expires_at"] = answer.expires_at
    return json_reply(granted, answer.status)


def _encode_page(found: Page) -> bytes:
    items = b",".join(
        b'{"id":%b,"version":%d,"value":%b}' % (encode_json(item.id), item.version, item.value) for item in found.items
    )
    return b'{"items":[%b],"next":%b}' % (items, encode_json(found.next))


def _wait_s(wait: Seconds) -> float:
    try:
        wait_s = parse_duration(wait)
    except ValueError as error:
        raise InvalidRecord(f"wait: {error}") from None
    if not 0 <= wait_s <= LEASE_WAIT_MAX_S:
        raise InvalidRecord(f"wait must be 0 to {LEASE_WAIT_MAX_S:.0f} s, found {wait!r}; ask again after that")
    return wait_s


async def _body(backend: Backend, request: Request, kind: type[B]) -> B:
    assert request.route.body is not None and request.route.body.type is kind, "the declaration says another body"
    raw = await request.body()
    return decode_typed(raw, kind, backend.record_limits) if raw else kind()


# The paths.


class Paths(NamedTuple):
    """The routes of one kind of record: of its collection, of a record, and of what may follow a record's id."""

    kind: Kind
    collection: Methods[RecordHandler]
    record: Methods[RecordHandler]
    actions: Mapping[str, Methods[RecordHandler]]


_Errors = tuple[type[HoldfastError], ...]


def _paths(kind: Kind, actions: Mapping[str, Methods[RecordHandler]]) -> Paths:
    """The routes that every kind has, declared for this one, beside the *actions* of its own."""
    noun = kind.noun
    id, key, value, patched = kind.example
    stored = key | value
    read_errors: _Errors = (InvalidRecord,) if kind is CUSTOM else ()
    delete_query: tuple[Field, ...] = (DURABILITY_QUERY,)
    write_query = delete_query
    headers: tuple[Field, ...] = CONDITIONAL
    lease_errors: _Errors = ()
    if kind.takes_lease:
        delete_query, write_query = (LEASE_QUERY, DURABILITY_QUERY), (TTL, LEASE_QUERY, DURABILITY_QUERY)
        headers, lease_errors = (*CONDITIONAL, LEASE), (Leased,)

    def written(about: str, status: int, version: int) -> Outcome:
        return _written(about, id=id, status=status, version=version, seq=version)

    return Paths(
        kind,
        {
            "GET": route(
                Outcome(
                    200,
                    "A page.",
                    answers.Page,
                    {"items": [{"id": id, "version": 1, "value": stored}], "next": None},
                ),
                name=f"{noun}_list",
                about=f"One page of the {noun}s.",
                query=kind.list_query,
                errors=read_errors,
            )(page)
        },
        {
            "GET": route(
                Outcome(200, f"The {noun}.", dict[str, Any], stored, headers=(ETAG,)),
                Outcome(304, "It is still the version that the caller has.", headers=(ETAG,)),
                name=f"{noun}_get",
                about=f"One {noun}, as it was stored.",
                headers=(SEEN,),
                errors=(NotFound, *read_errors),
            )(get),
            "PUT": route(
                written("It was replaced.", 200, 2),
                written("It is new.", 201, 1),
                name=f"{noun}_put",
                about=text_of(kind.put),
                query=write_query,
                headers=headers,
                body=Body(dict[str, Any], value),
                errors=(*_BODY_ERRORS, *_PUT_ERRORS, *lease_errors),
            )(put),
            "PATCH": route(
                written("It was merged.", 200, 2),
                name=f"{noun}_patch",
                about=text_of(kind.patch),
                query=write_query,
                headers=headers,
                body=Body(dict[str, Any], patched),
                errors=(*_BODY_ERRORS, *_CHANGE_ERRORS, *lease_errors),
            )(patch),
            "DELETE": route(
                Outcome(204, "It is gone."),
                name=f"{noun}_delete",
                about=text_of(kind.delete),
                query=delete_query,
                headers=headers,
                errors=(*_CHANGE_ERRORS, *lease_errors),
            )(delete),
        },
        actions,
    )


PATHS = {
    "sessions": _paths(
        KINDS["sessions"],
        {"touch": {"POST": touch}, "lease": {"POST": lease, "DELETE": delete_lease}, "release": {"POST": release}},
    ),
    "orders": _paths(KINDS["orders"], {"complete": {"POST": complete}, "cancel": {"POST": cancel}}),
    "users": _paths(KINDS["users"], {}),
}
CUSTOM_PATHS = _paths(CUSTOM, {})
