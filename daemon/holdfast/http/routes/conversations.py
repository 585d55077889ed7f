"""Conversations: their heads, their messages, and the holds that keep them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from holdfast.errors import Conflict, InvalidRecord, NotFound, StorageFull, TooLarge
from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import (
    BODY_ERRORS,
    CHANGE_ERRORS,
    PUT_ERRORS,
    OptionalBody,
    body_of,
    commit,
    op_fields,
    written,
)
from holdfast.http.routes.fields import (
    CONDITIONAL,
    CURSOR,
    DURABILITY_QUERY,
    ETAG,
    INTEGER_DIGITS_MAX,
    LIMIT,
    SEEN,
    UNTIL,
    WRITE,
    flag,
    idempotency_key,
    integer,
    limit,
    moment_ms,
    positive,
    span_s,
)
from holdfast.http.routes.found import encode_items, page_reply, record_reply
from holdfast.http.routes.kinds import Example, Kind, Paths, Place
from holdfast.http.routes.records import delete, existing, put
from holdfast.http.routes.route import Body, Field, Outcome, route, text_of
from holdfast.ops import (
    Author,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    Message,
    MessageAppend,
    PersonHold,
    Role,
)
from holdfast.values import decode_typed

_Number = Annotated[int, Meta(ge=0, lt=10**INTEGER_DIGITS_MAX)]
_Positive = Annotated[int, Meta(ge=1, lt=10**INTEGER_DIGITS_MAX)]
_Span = Annotated[str, Meta(min_length=1)]

USER_ID = Field("user_id", "Only conversations that belong to this user.", example="ana")
SESSION_ID = Field("session_id", "Only conversations that belong to this session.", example="573001234567")
ESCALATED = Field("escalated", "Only those that are or were escalated, or only the others.", bool, "false")
ARCHIVED = Field("archived", "Only archived ones, or only the others.", bool, "false")
UPDATED_SINCE = Field(
    "since",
    "Only those updated at or after this moment, ISO 8601; without an offset it is read in `stats.timezone`.",
    example="2026-11-21T06:00:00Z",
)
ACTIVE_WITHIN = Field("active_within", "Only those updated in the last `30d`, `12h`, …", _Span, "30d")
OLDER_THAN = Field("older_than", "Only those not updated in the last `90d`, …", _Span, "90d")
WHOLE = Field("messages", "`false`: without its messages, which costs no reading from the disk.", bool, "false")
ROLE = Field("role", "Only messages of this role.", Role, "user")
AUTHOR = Field("author", "Only messages of this author.", Author, "customer")
CREATED_SINCE = Field(
    "since",
    "Only those created at or after this moment, ISO 8601; without an offset it is read in `stats.timezone`.",
    example="2026-11-21T06:00:00Z",
)
BEFORE = Field("before", "Only older ones: the `next` of the page before, or a message's number.", example="2")
AFTER = Field("after", "Only newer ones than the message with this number, the oldest of them first.", _Number, "0")
MESSAGES = Field("messages", "At most so many; 20 when neither this nor `tokens` is given.", _Positive, "20")
TOKENS = Field(
    "tokens",
    "At most so many together. A message whose tokens nobody counted counts one for 4 characters.",
    _Positive,
    "2000",
)

_ID = "573001234567"
_HEAD = {
    "id": _ID,
    "title": "Hola",
    "user_id": None,
    "session_id": None,
    "created_at": "2026-11-21T06:00:00.000Z",
    "updated_at": "2026-11-21T06:00:00.000Z",
    "escalated": False,
    "archived": False,
    "handler": "bot",
    "message_count": 1,
    "system_count": 0,
    "tokens_used": 3,
    "last_number": 1,
}
_MESSAGE = {
    "number": 1,
    "role": "user",
    "content": "Hola",
    "author": "customer",
    "tokens_used": 3,
    "created_at": "2026-11-21T06:00:00.000Z",
    "metadata": {"channel": "whatsapp", "external_id": "wamid.1"},
}
_MESSAGE_ITEMS = [{"id": "1", "version": 1, "value": _MESSAGE}]


class AppendBody(msgspec.Struct, forbid_unknown_fields=True):
    """One message, by its fields, or several as ``messages``.

    Attributes:
        content: may be empty only where ``metadata`` holds ``tool_calls`` or ``attachments``.
        tokens_used: what it cost; null where nobody counted.
        author: who wrote it; null means the customer for a user, the bot for an assistant.
        metadata: anything else that is to be kept with it.
        external_id: of the message on its ``channel``; a second one with both the same is the first, delivered twice.
        created_at: ISO 8601; null means now.
        messages: instead of the fields above: each as it would be given alone.
        user_id: whose conversation it is; kept once given.
        session_id: to which session it belongs; kept once given.
    """

    role: Role | None = None
    content: str = ""
    tokens_used: int | None = None
    author: Author | None = None
    metadata: dict[str, Any] | None = None
    channel: str | None = None
    external_id: str | None = None
    created_at: str | None = None
    messages: list[Message] | None = None
    user_id: str | None = None
    session_id: str | None = None


class ArchiveBody(OptionalBody, forbid_unknown_fields=True):
    """Where it is to be.

    Attributes:
        archived: false brings it back into the active set.
    """

    archived: bool = True


class HoldBody(OptionalBody, forbid_unknown_fields=True):
    """Why.

    Attributes:
        reason: for people to read; kept with the hold.
    """

    reason: str | None = None


@route(
    Outcome(
        200,
        "A page.",
        answers.Page,
        {"items": [{"id": _ID, "version": 2, "value": _HEAD}], "next": None},
    ),
    name="conversation_list",
    query=(
        LIMIT,
        CURSOR,
        USER_ID,
        SESSION_ID,
        ESCALATED,
        ARCHIVED,
        UPDATED_SINCE,
        UNTIL,
        ACTIVE_WITHIN,
        OLDER_THAN,
    ),
)
async def page(backend: Backend, request: Request, place: Place) -> Reply:
    """One page of the conversations, the one with the newest message first, without their messages."""
    query = request.query()
    found = await backend.engine.ask(
        partial(
            backend.engine.transcripts.page,
            limit=limit(query, backend.settings.limits.page),
            cursor=query.get("cursor"),
            user_id=query.get("user_id"),
            session_id=query.get("session_id"),
            escalated=flag(query, "escalated"),
            archived=flag(query, "archived"),
            since_ms=moment_ms(query, backend),
            until_ms=moment_ms(query, backend, "until"),
            active_within_s=span_s(query, "active_within"),
            older_than_s=span_s(query, "older_than"),
        )
    )
    return page_reply(found)


@route(
    Outcome(200, "The conversation.", answers.Conversation, {**_HEAD, "messages": [_MESSAGE]}, headers=(ETAG,)),
    Outcome(304, "It is still the version that the caller has.", headers=(ETAG,)),
    name="conversation_get",
    query=(WHOLE,),
    headers=(SEEN,),
    errors=(NotFound, TooLarge),
)
async def get(backend: Backend, request: Request, place: Place) -> Reply:
    """One conversation whole; above 64 MiB its messages can be read in pages only.

    Raises:
        NotFound: no such conversation.
        TooLarge: above 64 MiB.
    """
    query = request.query()
    head = existing(backend, place)
    reply = record_reply(request, head)
    if reply.status == 304 or flag(query, "messages") is False:
        return reply
    found = await backend.engine.ask(partial(backend.engine.transcripts.conversation, place.id))
    if found is None:
        raise NotFound(f"no conversation {place.id!r:.80}")
    return record_reply(request, found)


@route(
    Outcome(
        200,
        "They are appended.",
        answers.Appended,
        {"id": _ID, "version": 2, "seq": 2, "numbers": [1]},
    ),
    name="message_append",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(
        AppendBody,
        {
            "role": "user",
            "content": "Hola",
            "tokens_used": 3,
            "channel": "whatsapp",
            "external_id": "wamid.1",
            "created_at": "2026-11-21T06:00:00.000Z",
        },
    ),
    errors=(*BODY_ERRORS, *PUT_ERRORS),
)
async def append(backend: Backend, request: Request, place: Place) -> Reply:
    """Append one message or several; the conversation comes into being with its first one.

    A message whose channel and external id the conversation has already was delivered twice: it is not appended, and its
    number is the one that it has.
    """
    query = request.query()
    # The engine measures each message; all together may be as large as a batch.
    body = decode_typed(await request.body(), AppendBody, backend.batch_limits)
    op = MessageAppend(**msgspec.structs.asdict(body), **op_fields(request, query, place))
    return await commit(backend, request, query, op)


@route(
    Outcome(200, "A page.", answers.Page, {"items": _MESSAGE_ITEMS, "next": None}),
    name="message_list",
    query=(LIMIT, BEFORE, AFTER, ROLE, AUTHOR, CREATED_SINCE, UNTIL),
    errors=(NotFound,),
)
async def messages(backend: Backend, request: Request, place: Place) -> Reply:
    """The newest messages of a conversation or, with ``after``, the oldest; in order either way.

    ``next`` goes on: as ``before`` to older ones or, where ``after`` was given, as ``after`` to newer ones. A page ends at
    about 16 MiB, whatever its ``limit``.

    Raises:
        NotFound: no such conversation.
    """
    query = request.query()
    found = await backend.engine.ask(
        partial(
            backend.engine.transcripts.messages,
            place.id,
            limit=limit(query, backend.settings.limits.page),
            before=query.get("before"),
            after=integer(query["after"], "after") if "after" in query else None,
            role=query.get("role"),
            author=query.get("author"),
            since_ms=moment_ms(query, backend),
            until_ms=moment_ms(query, backend, "until"),
        )
    )
    return page_reply(found)


@route(
    Outcome(
        200, "The messages, oldest first.", answers.Window, {"items": _MESSAGE_ITEMS, "next": None, "tokens_used": 3}
    ),
    name="message_window",
    query=(MESSAGES, TOKENS),
    errors=(NotFound,),
)
async def window(backend: Backend, request: Request, place: Place) -> Reply:
    """The newest messages of a conversation that fit, oldest first, never a tool's result without its call.

    However much was asked for, they are 10,000 and about 16 MiB at most.

    Raises:
        NotFound: no such conversation.
    """
    query = request.query()
    found = await backend.engine.ask(
        partial(
            backend.engine.transcripts.window,
            place.id,
            messages=positive(query, "messages"),
            tokens=positive(query, "tokens"),
        )
    )
    return Reply(200, b'{"items":[%b],"next":null,"tokens_used":%d}' % (encode_items(found.items), found.tokens_used))


@route(
    written(id=_ID, version=3, seq=3),
    name="conversation_archive",
    about=text_of(ConversationArchive),
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(ArchiveBody, {"archived": True}, is_required=False),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS),
)
async def archive(backend: Backend, request: Request, place: Place) -> Reply:
    query = request.query()
    body = await body_of(backend, request, ArchiveBody)
    op = ConversationArchive(archived=body.archived, **op_fields(request, query, place))
    return await commit(backend, request, query, op)


@route(
    written("It is held.", id=_ID, version=3, seq=3),
    name="conversation_hold",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(HoldBody, {"reason": "case 42"}, is_required=False),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS),
)
async def hold(backend: Backend, request: Request, place: Place) -> Reply:
    """Put a conversation under a legal hold. Nothing of it is deleted until that is lifted."""
    query = request.query()
    body = await body_of(backend, request, HoldBody)
    op = ConversationHold(reason=body.reason, **op_fields(request, query, place))
    return await commit(backend, request, query, op)


@route(
    Outcome(204, "It is free."),
    name="conversation_hold_delete",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    errors=CHANGE_ERRORS,
)
async def lift(backend: Backend, request: Request, place: Place) -> Reply:
    """Lift the legal hold of a conversation."""
    query = request.query()
    await commit(backend, request, query, ConversationHold(hold=False, **op_fields(request, query, place)))
    return Reply(204)


@route(
    written("They are held.", id=_ID, version=0, seq=1),
    name="person_hold",
    query=(DURABILITY_QUERY,),
    headers=WRITE,
    body=Body(HoldBody, {"reason": "case 42"}, is_required=False),
    errors=(*BODY_ERRORS, Conflict, InvalidRecord, StorageFull),
)
async def hold_person(backend: Backend, request: Request, place: Place) -> Reply:
    """Put all conversations of a person under a legal hold: those with this id, ``user_id`` or ``session_id``."""
    query = request.query()
    body = await body_of(backend, request, HoldBody)
    op = PersonHold(id=place.id, reason=body.reason, idempotency_key=idempotency_key(request))
    return await commit(backend, request, query, op)


@route(
    Outcome(204, "They are free."),
    name="person_hold_delete",
    query=(DURABILITY_QUERY,),
    headers=WRITE,
    errors=(Conflict, InvalidRecord, StorageFull),
)
async def lift_person(backend: Backend, request: Request, place: Place) -> Reply:
    """Lift the legal hold of a person; conversations that are held for themselves stay so."""
    query = request.query()
    op = PersonHold(id=place.id, hold=False, idempotency_key=idempotency_key(request))
    await commit(backend, request, query, op)
    return Reply(204)


PATHS = Paths(
    Kind(
        "conversation",
        ConversationPut,
        None,
        ConversationDelete,
        Example(_ID, {"id": _ID}, {"title": "Hola"}, {}),
    ),
    {"GET": page},
    {
        "GET": get,
        "PUT": route(
            written("It says so.", id=_ID, version=2, seq=2),
            written("It is new.", id=_ID, status=201, version=1, seq=1),
            name="conversation_put",
            about=text_of(ConversationPut),
            query=(DURABILITY_QUERY,),
            headers=CONDITIONAL,
            body=Body(dict[str, Any], {"title": "Hola"}),
            errors=(*BODY_ERRORS, *PUT_ERRORS),
        )(put),
        "DELETE": route(
            Outcome(204, "It is gone."),
            name="conversation_delete",
            about=text_of(ConversationDelete),
            query=(DURABILITY_QUERY,),
            headers=CONDITIONAL,
            errors=CHANGE_ERRORS,
        )(delete),
    },
    {
        "messages": {"GET": messages, "POST": append},
        "window": {"GET": window},
        "archive": {"POST": archive},
        "hold": {"PUT": hold, "DELETE": lift},
    },
)

PEOPLE_PATHS = Paths(
    Kind("person", None, None, None, Example(_ID, {}, {}, {})),
    {},
    {},
    {"hold": {"PUT": hold_person, "DELETE": lift_person}},
)
