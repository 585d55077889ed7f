"""Escalations: who waits for a human."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import msgspec

from holdfast.errors import NotFound
from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, CHANGE_ERRORS, commit, op_fields, written
from holdfast.http.routes.fields import CONDITIONAL, CURSOR, DURABILITY_QUERY, ETAG, LIMIT, SEEN, limit
from holdfast.http.routes.found import page_reply
from holdfast.http.routes.kinds import Example, Kind, Paths, Place
from holdfast.http.routes.records import get
from holdfast.http.routes.route import Body, Field, Outcome, route
from holdfast.ops import EscalationOpen, Priority
from holdfast.values import decode_typed

Status = Literal["pending", "claimed", "resolved"]

STATUS = Field("status", "Only escalations of this status.", Status, "pending")
PRIORITY = Field("priority", "Only escalations of this priority.", Priority, "high")

_ID = "573001234567"
_OPENED = {
    "conversation_id": _ID,
    "reason": "wants to talk about an invoice",
    "contact_info": {"phone": "+57 300 123 4567"},
    "priority": "high",
}
_ESCALATION = {
    "id": _ID,
    **_OPENED,
    "status": "pending",
    "assignee": None,
    "opened_at": "2026-11-21T06:00:00.000Z",
    "updated_at": "2026-11-21T06:00:00.000Z",
    "claimed_at": None,
    "resolved_at": None,
}


class OpenBody(msgspec.Struct, forbid_unknown_fields=True):
    """Who waits, and why.

    Attributes:
        conversation_id: of the customer's conversation, which must be there.
        reason: for whoever takes it.
        contact_info: how the customer is reached.
    """

    conversation_id: str
    reason: str
    contact_info: dict[str, Any] | None = None
    priority: Priority | None = None


@route(
    Outcome(200, "A page.", answers.Page, {"items": [{"id": _ID, "version": 1, "value": _ESCALATION}], "next": None}),
    name="escalation_list",
    query=(LIMIT, CURSOR, STATUS, PRIORITY),
)
async def page(backend: Backend, request: Request, place: Place) -> Reply:
    """One page of the escalations: those of high priority first, then the one that waits longest."""
    query = request.query()
    found = await backend.engine.ask(
        partial(
            backend.engine.transcripts.escalations,
            limit=limit(query, backend.settings.limits.page),
            cursor=query.get("cursor"),
            status=query.get("status"),
            priority=query.get("priority"),
        )
    )
    return page_reply(found)


@route(
    written(id=_ID, version=1, seq=2),
    name="escalation_open",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(OpenBody, _OPENED),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS),
)
async def open(backend: Backend, request: Request, place: Place) -> Reply:
    """Have a customer wait for a human. A second call updates the escalation that is open.

    Raises:
        NotFound: no such conversation.
    """
    query = request.query()
    body = decode_typed(await request.body(), OpenBody, backend.record_limits)
    op = EscalationOpen(
        reason=body.reason,
        contact_info=body.contact_info,
        priority=body.priority,
        **op_fields(request, query, place._replace(id=body.conversation_id)),
    )
    return await commit(backend, request, query, op)


PATHS = Paths(
    Kind("escalation", None, None, None, Example(_ID, {}, _ESCALATION, {})),
    {"GET": page, "POST": open},
    {
        "GET": route(
            Outcome(200, "The escalation.", answers.Escalation, _ESCALATION, headers=(ETAG,)),
            Outcome(304, "It is still the version that the caller has.", headers=(ETAG,)),
            name="escalation_get",
            about="The escalation of one conversation.",
            headers=(SEEN,),
            errors=(NotFound,),
        )(get)
    },
    {},
)
