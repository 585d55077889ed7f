"""Sessions, with what only they have: leases, and a last activity that can be touched."""

from __future__ import annotations

from holdfast.errors import BadRequest, Conflict, InvalidRecord, Leased, StorageFull
from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import (
    BODY_ERRORS,
    CHANGE_ERRORS,
    OptionalBody,
    answer_reply,
    body_of,
    commit,
    op_fields,
    written,
)
from holdfast.http.routes.fields import (
    CONDITIONAL,
    CURSOR,
    DURABILITY_QUERY,
    GENERATION,
    LEASE,
    LEASE_QUERY,
    LIMIT,
    SINCE,
    STATE,
    TTL,
    UNTIL,
    WRITE,
    durability,
    idempotency_key,
    integer,
    retry_of,
)
from holdfast.http.routes.kinds import Example, Kind, Place
from holdfast.http.routes.records import paths_of
from holdfast.http.routes.route import Body, Outcome, route
from holdfast.leases import LEASE_WAIT_MAX_S, take_lease_async
from holdfast.ops import Seconds, SessionDelete, SessionLease, SessionPatch, SessionPut, SessionRelease, SessionTouch
from holdfast.settings import parse_duration

_LEASE_ERRORS = (*BODY_ERRORS, Conflict, InvalidRecord, Leased, StorageFull)


class TouchBody(OptionalBody, forbid_unknown_fields=True):
    """Nothing, or an empty object."""


class LeaseBody(OptionalBody, forbid_unknown_fields=True):
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


class ReleaseBody(OptionalBody, forbid_unknown_fields=True):
    """Which lease is over.

    Attributes:
        generation: as it was granted.
    """

    generation: int | None = None


@route(
    written(id="573001234567"),
    name="session_touch",
    query=(TTL, LEASE_QUERY, DURABILITY_QUERY),
    headers=(*CONDITIONAL, LEASE),
    body=Body(TouchBody, {}, is_required=False),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS, Leased),
)
async def touch(backend: Backend, request: Request, place: Place) -> Reply:
    """Set a session's last activity to now."""
    query = request.query()
    await body_of(backend, request, TouchBody)
    return await commit(backend, request, query, SessionTouch(**op_fields(request, query, place)))


@route(
    Outcome(
        200,
        "The lease is the caller's.",
        answers.Granted,
        {"id": "573001234567", "version": 1, "seq": 2, "generation": 2, "expires_at": "2026-11-21T06:00:30.000Z"},
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
    body = await body_of(backend, request, LeaseBody)
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
    return answer_reply(answer)


@route(
    written("It is free.", id="573001234567", version=1, seq=3),
    name="session_release",
    query=(GENERATION, DURABILITY_QUERY),
    headers=WRITE,
    body=Body(ReleaseBody, {"generation": 2}, is_required=False),
    errors=_LEASE_ERRORS,
)
async def release(backend: Backend, request: Request, place: Place) -> Reply:
    """Give the lease of a session back."""
    query = request.query()
    body = await body_of(backend, request, ReleaseBody)
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
    return await commit(backend, request, query, op)


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


def _wait_s(wait: Seconds) -> float:
    try:
        wait_s = parse_duration(wait)
    except ValueError as error:
        raise InvalidRecord(f"wait: {error}") from None
    if not 0 <= wait_s <= LEASE_WAIT_MAX_S:
        raise InvalidRecord(f"wait must be 0 to {LEASE_WAIT_MAX_S:.0f} s, found {wait!r}; ask again after that")
    return wait_s


PATHS = paths_of(
    Kind(
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
        list_query=(LIMIT, CURSOR, SINCE, UNTIL, STATE),
        takes_lease=True,
    ),
    {"touch": {"POST": touch}, "lease": {"POST": lease, "DELETE": delete_lease}, "release": {"POST": release}},
)
