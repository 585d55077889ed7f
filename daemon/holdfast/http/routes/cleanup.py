"""Letting conversations go on demand."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.care import retention
from holdfast.errors import InvalidRecord, StorageFull
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, OptionalBody, body_of
from holdfast.http.routes.route import Body, Outcome, route

AT_ONCE_MAX = 1_000
"""Conversations that one request changes at most, so that none takes long."""


class CleanupBody(OptionalBody, forbid_unknown_fields=True):
    """What is to go; nothing at all means what the settings say.

    Attributes:
        days: archive conversations without a message for so many days.
        delete_messages: delete the messages of these conversations for good.
        idle_hours: instead, remove conversations not updated for so many hours, with everything in them.
        dry_run: count only.
        limit: conversations changed by this request; `remaining` says whether there are more.
    """

    days: Annotated[float, Meta(ge=0, le=36_500)] | None = None
    delete_messages: bool = False
    idle_hours: Annotated[float, Meta(ge=0, le=876_000)] | None = None
    dry_run: bool = False
    limit: Annotated[int, Meta(ge=1, le=AT_ONCE_MAX)] = AT_ONCE_MAX


@route(
    Outcome(
        200,
        "What went.",
        answers.Cleaned,
        {
            "archived": 1,
            "conversations": 0,
            "messages_deleted": 0,
            "bytes_freed": 0,
            "deleted": 0,
            "errors": 0,
            "held": 0,
            "remaining": 0,
            "storage": {
                "total": 1,
                "active": 0,
                "old": 1,
                "archived": 0,
                "escalated": 0,
                "messages": 1,
                "system_messages": 0,
                "messages_last_30_days": 0,
                "tokens": 0,
                "bytes": 40960,
                "escalated_share": 0.0,
                "average_messages": 1.0,
            },
        },
    ),
    body=Body(CleanupBody, {"days": 90, "dry_run": True}, is_required=False),
    errors=(*BODY_ERRORS, InvalidRecord, StorageFull),
)
async def cleanup(backend: Backend, request: Request) -> Reply:
    """Let conversations go now: archive them, delete their messages, or remove them. Legal holds are kept.

    Call it again while ``remaining`` is not 0.
    """
    request.query()
    wanted = await body_of(backend, request, CleanupBody)
    if wanted.idle_hours is not None and (wanted.days is not None or wanted.delete_messages or wanted.dry_run):
        raise InvalidRecord("expected idle_hours alone, or days with delete_messages and dry_run, found both")
    if wanted.delete_messages and wanted.days is None:
        raise InvalidRecord("delete_messages goes with days; without both the settings say what is deleted")
    return json_reply(await asyncio.to_thread(partial(_clean, backend, wanted)))


def _clean(backend: Backend, wanted: CleanupBody) -> answers.Cleaned:
    engine = backend.engine
    now_ms = engine.now_ms()
    cleaned = answers.Cleaned()
    if wanted.idle_hours is not None:
        removal = retention.remove_idle(engine, wanted.idle_hours, now_ms, limit=wanted.limit)
        cleaned = msgspec.structs.replace(cleaned, **msgspec.structs.asdict(removal))
    else:
        if wanted.days is None:
            plan = msgspec.structs.replace(
                retention.by_settings(engine, now_ms), limit=wanted.limit, is_dry_run=wanted.dry_run
            )
        else:
            plan = retention.older_than(
                wanted.days,
                now_ms,
                delete_messages=wanted.delete_messages,
                limit=wanted.limit,
                is_dry_run=wanted.dry_run,
            )
        report = retention.clean(engine, plan, reason="api")
        cleaned = msgspec.structs.replace(cleaned, **msgspec.structs.asdict(report))
    return msgspec.structs.replace(cleaned, storage=engine.transcripts.storage())
