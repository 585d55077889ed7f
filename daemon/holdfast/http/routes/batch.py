"""Many ops in one request."""

from __future__ import annotations

from typing import Any

from holdfast.errors import HoldfastError, TooLarge
from holdfast.http.problem import readable
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.records import durability
from holdfast.ops import Answer, Batch
from holdfast.values import decode_typed


async def batch(backend: Backend, request: Request) -> Reply:
    """Do the ops of a batch in order; all or nothing when it is atomic, else each with an outcome of its own.

    Raises:
        HoldfastError: an atomic batch was refused; ``index`` says by which op.
    """
    query = request.query("durability")
    ops = decode_typed(await request.body(), Batch, backend.batch_limits)
    ops_max = backend.settings.limits.batch_ops
    if len(ops.ops) > ops_max:
        raise TooLarge(f"a batch may have {ops_max} ops, this one has {len(ops.ops)}; split it")
    ticket = backend.engine.submit_batch(ops, durability=durability(request, query))
    await ticket.committed()
    return json_reply({"seq": ticket.seq, "results": [_result(outcome) for outcome in ticket.outcomes]})


def _result(outcome: Answer | HoldfastError) -> Answer | dict[str, Any]:
    if isinstance(outcome, HoldfastError):
        return {"status": outcome.status, "code": outcome.code, "detail": readable(outcome.detail)}
    return outcome
