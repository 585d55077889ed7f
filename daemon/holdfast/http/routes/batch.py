"""Many ops in one request."""

from __future__ import annotations

import msgspec

from holdfast.errors import (
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
from holdfast.http.problem import readable
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import DURABILITY_QUERY, WRITE, durability, idempotency_key, retry_of
from holdfast.http.routes.route import Body, Outcome, route
from holdfast.ops import Answer, Batch
from holdfast.values import decode_typed


@route(
    Outcome(
        200,
        "One result for each op, in their order; a refused one has a `code`.",
        answers.Results,
        {
            "seq": 1,
            "results": [
                {"status": 201, "seq": 1, "id": "573001234567", "version": 1},
                {"status": 201, "seq": 1, "id": "1001", "version": 1},
            ],
        },
    ),
    query=(DURABILITY_QUERY,),
    headers=WRITE,
    body=Body(
        Batch,
        {
            "atomic": True,
            "ops": [
                {"op": "session.put", "id": "573001234567", "value": {"currentState": "awaiting_payment"}},
                {"op": "order.put", "id": "1001", "value": {"recipientPhone": "573001234567"}},
            ],
        },
    ),
    errors=(
        InvalidJson,
        TooLarge,
        UnsupportedMediaType,
        NotFound,
        Conflict,
        VersionMismatch,
        InvalidRecord,
        Leased,
        StorageFull,
    ),
)
async def batch(backend: Backend, request: Request) -> Reply:
    """Do the ops of a batch in order; all or nothing when it is atomic, else each with an outcome of its own.

    Raises:
        HoldfastError: an atomic batch was refused; ``index`` says by which op.
    """
    query = request.query()
    ops = decode_typed(await request.body(), Batch, backend.batch_limits)
    ops_max = backend.settings.limits.batch_ops
    if len(ops.ops) > ops_max:
        raise TooLarge(f"a batch may have {ops_max} ops, this one has {len(ops.ops)}; split it")
    key = idempotency_key(request)
    if key is not None:
        ops = _keyed(ops, key)
    ticket = await backend.engine.submit_batch_async(
        ops, durability=durability(request, query), retry=retry_of(request), at_once=backend.is_alone
    )
    await ticket.committed()
    return json_reply(answers.Results(ticket.seq, [_result(outcome) for outcome in ticket.outcomes]))


def _keyed(batch: Batch, key: str) -> Batch:
    """*batch*, whose ops without a key of their own have *key*, a slash and their index."""
    ops = [
        msgspec.structs.replace(op, idempotency_key=f"{key}/{index}") if op.idempotency_key is None else op
        for index, op in enumerate(batch.ops)
    ]
    return Batch(ops=ops, atomic=batch.atomic)


def _result(outcome: Answer | HoldfastError) -> Answer | answers.Refusal:
    if isinstance(outcome, HoldfastError):
        return answers.Refusal(outcome.status, outcome.code, readable(outcome.detail))
    return outcome
