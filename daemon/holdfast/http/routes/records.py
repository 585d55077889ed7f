"""What every kind of record has: a list, and reading, storing, patching and deleting one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from holdfast.errors import HoldfastError, InvalidRecord, Leased, NotFound
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, CHANGE_ERRORS, PUT_ERRORS, commit, op_fields, written
from holdfast.http.routes.fields import (
    CONDITIONAL,
    DURABILITY_QUERY,
    ETAG,
    LEASE,
    LEASE_QUERY,
    SEEN,
    TTL,
    limit,
    moment_ms,
)
from holdfast.http.routes.found import page_reply, record_reply
from holdfast.http.routes.kinds import Example, Kind, Paths, Place, RecordHandler
from holdfast.http.routes.route import Body, Field, Methods, Outcome, route, text_of
from holdfast.ops import Record, RecordDelete, RecordPatch, RecordPut, UserDelete, UserPatch, UserPut
from holdfast.values import decode_object

_Errors = tuple[type[HoldfastError], ...]


def existing(backend: Backend, place: Place) -> Record:
    """The record at *place*.

    Raises:
        NotFound: there is none.
    """
    record = backend.engine.get(place.collection, place.id)
    if record is None:
        raise NotFound(f"no {place.kind.noun} {place.id!r:.80}")
    return record


async def get(backend: Backend, request: Request, place: Place) -> Reply:
    """One record, as it was stored."""
    request.query()
    return record_reply(request, existing(backend, place))


async def page(backend: Backend, request: Request, place: Place) -> Reply:
    """One page of a collection."""
    query = request.query()
    # In a thread: a filter that few records pass may look at all of them.
    found = await asyncio.to_thread(
        backend.engine.page,
        place.collection,
        limit=limit(query, backend.settings.limits.page),
        cursor=query.get("cursor"),
        since_ms=moment_ms(query, backend),
        state=query.get("state"),
        until_ms=moment_ms(query, backend, "until"),
    )
    return page_reply(found)


async def put(backend: Backend, request: Request, place: Place) -> Reply:
    """Store a whole record."""
    query = request.query()
    value = decode_object(await request.body(), backend.record_limits)
    return await commit(backend, request, query, place.kind.put(value=value, **op_fields(request, query, place)))


async def patch(backend: Backend, request: Request, place: Place) -> Reply:
    """Merge a patch into a record (RFC 7396)."""
    query = request.query()
    value = decode_object(await request.body(), backend.record_limits)
    return await commit(backend, request, query, place.kind.patch(value=value, **op_fields(request, query, place)))


async def delete(backend: Backend, request: Request, place: Place) -> Reply:
    """Remove a record."""
    query = request.query()
    return await commit(backend, request, query, place.kind.delete(**op_fields(request, query, place)))


def paths_of(kind: Kind, actions: Mapping[str, Methods[RecordHandler]]) -> Paths:
    """The routes that every kind has, declared for this one, beside the *actions* of its own."""
    noun = kind.noun
    id, key, value, patched = kind.example
    stored = key | value
    read_errors: _Errors = (InvalidRecord,) if kind.is_custom else ()
    delete_query: tuple[Field, ...] = (DURABILITY_QUERY,)
    write_query = delete_query
    headers: tuple[Field, ...] = CONDITIONAL
    lease_errors: _Errors = ()
    if kind.takes_lease:
        delete_query, write_query = (LEASE_QUERY, DURABILITY_QUERY), (TTL, LEASE_QUERY, DURABILITY_QUERY)
        headers, lease_errors = (*CONDITIONAL, LEASE), (Leased,)

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
                written("It was replaced.", id=id),
                written("It is new.", id=id, status=201, version=1, seq=1),
                name=f"{noun}_put",
                about=text_of(kind.put),
                query=write_query,
                headers=headers,
                body=Body(dict[str, Any], value),
                errors=(*BODY_ERRORS, *PUT_ERRORS, *lease_errors),
            )(put),
            "PATCH": route(
                written("It was merged.", id=id),
                name=f"{noun}_patch",
                about=text_of(kind.patch),
                query=write_query,
                headers=headers,
                body=Body(dict[str, Any], patched),
                errors=(*BODY_ERRORS, *CHANGE_ERRORS, *lease_errors),
            )(patch),
            "DELETE": route(
                Outcome(204, "It is gone."),
                name=f"{noun}_delete",
                about=text_of(kind.delete),
                query=delete_query,
                headers=headers,
                errors=(*CHANGE_ERRORS, *lease_errors),
            )(delete),
        },
        actions,
    )


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


USER_PATHS = paths_of(
    Kind(
        "user",
        UserPut,
        UserPatch,
        UserDelete,
        Example("ana", {"user_id": "ana"}, {"name": "Ana"}, {"city": "Medellín"}),
    ),
    {},
)
CUSTOM_PATHS = paths_of(
    Kind(
        "record",
        RecordPut,
        RecordPatch,
        RecordDelete,
        Example("n1", {"id": "n1"}, {"text": "hello"}, {"read": True}),
        is_custom=True,
    ),
    {},
)
