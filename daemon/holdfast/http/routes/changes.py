"""How a change of one record is read from its request, done, and answered."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from holdfast.errors import (
    Conflict,
    InvalidJson,
    InvalidRecord,
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
from holdfast.http.routes.fields import add_conditions, durability, retry_of
from holdfast.http.routes.kinds import Place
from holdfast.http.routes.route import Outcome
from holdfast.ops import Answer, AnyOp
from holdfast.values import decode_typed

BODY_ERRORS = (InvalidJson, TooLarge, UnsupportedMediaType)
PUT_ERRORS = (Conflict, VersionMismatch, InvalidRecord, StorageFull)
CHANGE_ERRORS = (NotFound, *PUT_ERRORS)

B = TypeVar("B", bound="OptionalBody")


class OptionalBody(msgspec.Struct, forbid_unknown_fields=True):
    """A body that may be left out: each of its fields has a default."""


def written(
    about: str = "It is done.", *, id: str = "1001", status: int = 200, version: int = 2, seq: int = 2
) -> Outcome:
    """A change that yields what every change does; the arguments beside *about* make its example."""
    return Outcome(status, about, answers.Written, {"id": id, "version": version, "seq": seq})


def op_fields(request: Request, query: dict[str, str], place: Place) -> dict[str, Any]:
    """The fields that every op on one record has: where, and under which conditions.

    Raises:
        HoldfastError: as ``add_conditions``.
    """
    op: dict[str, Any] = place.names()
    add_conditions(op, request, query, takes_lease=place.kind.takes_lease)
    return op


async def commit(backend: Backend, request: Request, query: dict[str, str], op: AnyOp) -> Reply:
    """Do *op*, and answer once it is as durable as the request asks for.

    Raises:
        HoldfastError: it was refused.
    """
    ticket = await backend.engine.submit_async(
        op, durability=durability(request, query), retry=retry_of(request), at_once=backend.is_alone
    )
    await ticket.committed()
    return answer_reply(ticket.answer)


def answer_reply(answer: Answer) -> Reply:
    """*answer* as a client sees it."""
    if answer.status == 204:
        return Reply(204)
    if answer.numbers is not None:
        return json_reply(answers.Appended(answer.id, answer.version, answer.seq, answer.numbers))
    if answer.generation is None and answer.expires_at is None:
        body = b'{"id":%b,"version":%d,"seq":%d}' % (encode_json(answer.id), answer.version, answer.seq)
        return Reply(answer.status, body)
    granted: dict[str, Any] = {"id": answer.id, "version": answer.version, "seq": answer.seq}
    if answer.generation is not None:
        granted["generation"] = answer.generation
    if answer.expires_at is not None:
        granted["expires_at"] = answer.expires_at
    return json_reply(granted, answer.status)


async def body_of(backend: Backend, request: Request, kind: type[B]) -> B:
    """The body of *request*, which its route declares as *kind*; one without fields when there is none.

    Raises:
        HoldfastError: it cannot be read, or says what has no meaning.
    """
    assert request.route.body is not None and request.route.body.type is kind, "the declaration says another body"
    raw = await request.body()
    return decode_typed(raw, kind, backend.record_limits) if raw else kind()
