"""What a program may ask of Holdfast: one set of methods for every way to reach it.

Each method builds an op and hands it to ``_do``. A is what comes back: ``Answer`` where the call waits, an awaitable of
it where the caller awaits. Embedded and remote, waiting and awaiting forms differ only in ``_do`` and in how they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
import orjson

from holdfast.clock import EPOCH
from holdfast.errors import BadRequest, InvalidRecord, NotFound
from holdfast.ops import (
    AnyOp,
    Author,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    Durability,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    PersonHold,
    Priority,
    Record,
    RecordDelete,
    RecordPatch,
    RecordPut,
    Role,
    Seconds,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionRelease,
    SessionTouch,
    StatsCompletion,
    StatsOrder,
    UserDelete,
    UserPatch,
    UserPut,
)
from holdfast.settings import parse_duration

A = TypeVar("A")

Value = Mapping[str, Any]
"""A JSON object, as Python has it."""

Id = str | int
"""A record's id; numbers stand for their digits."""

Money = Decimal | int | str
"""An exact amount. A float is none: 0.1 is not what it seems."""

When = int | datetime
"""A moment to search by: ms since 1970, or a datetime that knows its zone."""

Messages = list[dict[str, Any]]
"""Messages of a conversation, each with ``number``, ``role``, ``content``, ``author``, ``tokens_used``, ``created_at``,
``metadata``."""

Do = Callable[[AnyOp, Durability | None], A]


LIST_PAGE = 1_000
"""Records that a list asks for at once."""

UPDATE_ATTEMPTS = 100
"""More than the workers that any record has at once; who loses as often is in an endless loop."""


class SessionOps(Generic[A]):
    """Changing sessions.

    All take ``durability`` for this call, ``idempotency_key``, and, where a record changes, ``if_version`` (0: only if
    absent) and ``lease`` (the generation under which the caller writes).
    """

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole. ``lastActivity`` is kept when given and set to now when absent."""
        return self._do(
            SessionPut(
                id=id if type(id) is str else text_of(id),
                value=value if type(value) is dict else object_of(value),
                if_version=if_version,
                ttl=ttl,
                lease=lease,
                idempotency_key=idempotency_key,
            ),
            durability,
        )

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into it (RFC 7396)."""
        op = SessionPatch(
            id=text_of(id),
            value=object_of(patch),
            if_version=if_version,
            ttl=ttl,
            lease=lease,
            idempotency_key=idempotency_key,
        )
        return self._do(op, durability)

    def touch(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Set ``lastActivity`` to now."""
        op = SessionTouch(id=text_of(id), if_version=if_version, ttl=ttl, lease=lease, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it; NotFound when it is not there."""
        op = SessionDelete(id=text_of(id), if_version=if_version, lease=lease, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def release(
        self, id: Id, generation: int, *, idempotency_key: str | None = None, durability: Durability | None = None
    ) -> A:
        """Give the lease back."""
        return self._do(
            SessionRelease(id=text_of(id), generation=generation, idempotency_key=idempotency_key), durability
        )


class OrderOps(Generic[A]):
    """Changing orders; options as for sessions, without lease."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole. The first put of an id counts in the sales figures."""
        op = OrderPut(id=text_of(id), value=object_of(value), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into a pending order (RFC 7396)."""
        op = OrderPatch(id=text_of(id), value=object_of(patch), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def complete(
        self,
        id: Id,
        revenue: Money | None = None,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Complete it. Completion and *revenue* count once, however often this is repeated."""
        op = OrderComplete(
            id=text_of(id), revenue=_exact(revenue), if_version=if_version, idempotency_key=idempotency_key
        )
        return self._do(op, durability)

    def cancel(
        self,
        id: Id,
        reason: str | None = None,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Cancel a pending one."""
        op = OrderCancel(id=text_of(id), reason=reason, if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it. What it added to the figures stays counted."""
        op = OrderDelete(id=text_of(id), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)


class RecordOps(Generic[A]):
    """Changing users, or a custom collection; options as for orders."""

    def __init__(self, do: Do[A], name: str) -> None:
        self._do = do
        self.name = name

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole."""
        op: AnyOp
        if self.name == "users":
            op = UserPut(id=text_of(id), value=object_of(value), if_version=if_version, idempotency_key=idempotency_key)
        else:
            op = RecordPut(
                collection=self.name,
                id=text_of(id),
                value=object_of(value),
                if_version=if_version,
                idempotency_key=idempotency_key,
            )
        return self._do(op, durability)

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into it (RFC 7396)."""
        op: AnyOp
        if self.name == "users":
            op = UserPatch(
                id=text_of(id), value=object_of(patch), if_version=if_version, idempotency_key=idempotency_key
            )
        else:
            op = RecordPatch(
                collection=self.name,
                id=text_of(id),
                value=object_of(patch),
                if_version=if_version,
                idempotency_key=idempotency_key,
            )
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it; NotFound when it is not there."""
        op: AnyOp
        if self.name == "users":
            op = UserDelete(id=text_of(id), if_version=if_version, idempotency_key=idempotency_key)
        else:
            op = RecordDelete(
                collection=self.name, id=text_of(id), if_version=if_version, idempotency_key=idempotency_key
            )
        return self._do(op, durability)


class ConversationOps(Generic[A]):
    """Changing conversations; options as for orders."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def append(
        self,
        id: Id,
        role: Role | None = None,
        content: str = "",
        *,
        author: Author | None = None,
        tokens_used: int | None = None,
        metadata: Value | None = None,
        channel: str | None = None,
        external_id: Id | None = None,
        created_at: str | datetime | None = None,
        messages: Iterable[Value | Message] | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Append one message, or several as *messages*; the conversation comes into being with its first one.

        The answer has the ``numbers`` of the messages. One whose channel and external id the conversation has already
        was delivered twice: nothing is appended for it, and its number is the one that it has.

        Args:
            role: system, user, assistant, tool.
            content: may be empty only where *metadata* holds ``tool_calls`` or ``attachments``.
            author: bot, agent, customer; a user's are the customer's and an assistant's the bot's when it is not said.
            metadata: anything else that is to be kept with it.
            created_at: ISO 8601, or a datetime; without an offset it is read in ``stats.timezone``. Now when absent.
            messages: each a dict of the arguments above, all of them together or none.
            user_id, session_id: whose conversation it is; kept once given.

        Raises:
            InvalidRecord: an unknown role, an empty message, or what cannot be kept exactly.
            TooLarge: more than ``limits.message_bytes``, or more than 1,000 messages.
            Conflict: the conversation belongs to another user or session.
        """
        return self._do(
            MessageAppend(
                id=id if type(id) is str else text_of(id),
                role=role,
                content=content,
                tokens_used=tokens_used,
                author=author,
                metadata=None if metadata is None else object_of(metadata),
                channel=_text(channel, "channel"),
                external_id=None if external_id is None else text_of(external_id),
                created_at=_moment_text(created_at),
                messages=None if messages is None else _messages(messages),
                user_id=None if user_id is None else text_of(user_id),
                session_id=None if session_id is None else text_of(session_id),
                if_version=if_version,
                idempotency_key=idempotency_key,
            ),
            durability,
        )

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Set its ``title``, ``user_id``, ``session_id``, ``escalated``, ``created_at``, ``updated_at``, or fields of your
        own; those that *value* does not name stay as they are, and None removes."""
        op = ConversationPut(
            id=text_of(id), value=object_of(value), if_version=if_version, idempotency_key=idempotency_key
        )
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it with its messages and its escalation; Conflict under a legal hold."""
        return self._do(
            ConversationDelete(id=text_of(id), if_version=if_version, idempotency_key=idempotency_key), durability
        )

    def archive(
        self,
        id: Id,
        archived: bool = True,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Move it out of the active set, or back; a new message brings it back as well."""
        op = ConversationArchive(
            id=text_of(id), archived=_flag(archived, "archived"), if_version=if_version, idempotency_key=idempotency_key
        )
        return self._do(op, durability)

    def hold(
        self,
        id: Id,
        hold: bool = True,
        reason: str | None = None,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Put it under a legal hold, or lift that; nothing of it is deleted meanwhile."""
        op = ConversationHold(
            id=text_of(id),
            hold=_flag(hold, "hold"),
            reason=reason,
            if_version=if_version,
            idempotency_key=idempotency_key,
        )
        return self._do(op, durability)

    def hold_person(
        self,
        id: Id,
        hold: bool = True,
        reason: str | None = None,
        *,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Put all conversations of a person, a phone or user id, under a legal hold, or lift that."""
        op = PersonHold(id=text_of(id), hold=_flag(hold, "hold"), reason=reason, idempotency_key=idempotency_key)
        return self._do(op, durability)


class EscalationOps(Generic[A]):
    """Having customers wait for a human."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def open(
        self,
        id: Id,
        reason: str,
        contact_info: Value | None = None,
        priority: Priority | None = None,
        *,
        opened_at: str | datetime | None = None,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Have the customer of the conversation *id* wait for a human. A second call updates the one that is open.

        Args:
            opened_at: since when the customer waits, as ``created_at`` of a message; now when absent.

        Raises:
            NotFound: no such conversation.
        """
        op = EscalationOpen(
            id=text_of(id),
            reason=reason,
            contact_info=None if contact_info is None else object_of(contact_info),
            priority=priority,
            opened_at=_moment_text(opened_at),
            if_version=if_version,
            idempotency_key=idempotency_key,
        )
        return self._do(op, durability)


class StatsOps(Generic[A]):
    """Counting what is kept elsewhere."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def order(
        self,
        product_type: str | None = None,
        *,
        at: str | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Count an order, made *at* (ISO 8601, now when absent)."""
        return self._do(StatsOrder(product_type=product_type, at=at, idempotency_key=idempotency_key), durability)

    def completion(
        self,
        revenue: Money | None = None,
        *,
        at: str | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Count a completion with its *revenue*, made *at*."""
        op = StatsCompletion(revenue=_exact(revenue), at=at, idempotency_key=idempotency_key)
        return self._do(op, durability)


def text_of(id: Id) -> str:
    """*id* as text.

    Raises:
        InvalidRecord: it is neither text nor a whole number; a None that slipped in would be one record for everybody.
    """
    if isinstance(id, str):
        return id if type(id) is str else str(id)
    if isinstance(id, int) and not isinstance(id, bool):
        return str(id)
    raise InvalidRecord(f"expected an id as text or a whole number, found {id!r:.80}")


def object_of(value: Value) -> dict[str, Any]:
    """A copy of *value* as a dict.

    Raises:
        InvalidRecord: it is none.
    """
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise InvalidRecord(f"expected a JSON object as a dict, found {type(value).__name__}") from None


def message_of(given: Value | Message) -> Message:
    """*given*, a member of ``messages``, as a message.

    Raises:
        InvalidRecord: it is none, or has a field that no message has.
    """
    if isinstance(given, Message):
        return given
    fields = object_of(given)
    unknown = fields.keys() - set(Message.__struct_fields__)
    if unknown or "role" not in fields:
        expected = ", ".join(Message.__struct_fields__)
        found = ", ".join(map(str, fields)) or "nothing"
        raise InvalidRecord(f"expected a message with a role, and of {expected}; found {found:.200}")
    if fields.get("metadata") is not None:
        fields["metadata"] = object_of(fields["metadata"])
    if fields.get("external_id") is not None:
        fields["external_id"] = text_of(fields["external_id"])
    fields["channel"] = _text(fields.get("channel"), "channel")
    fields["created_at"] = _moment_text(fields.get("created_at"))
    return Message(**fields)


_CHANGEABLE = ("value", "metadata", "messages", "contact_info")
"""Fields of ops that hold what a caller could still change."""


def detached(op: AnyOp) -> AnyOp:
    """*op* with values of its own, for doing it later: what the caller changes in the meantime does not count."""
    held = {name: value for name in _CHANGEABLE if (value := getattr(op, name, None)) is not None}
    if not held:
        return op
    try:
        return msgspec.structs.replace(op, **deepcopy(held))
    except TypeError as error:
        raise InvalidRecord(f"cannot be kept as JSON: {error}") from None


def ms_of(when: When | None) -> int | None:
    """*when* in ms since 1970.

    Raises:
        BadRequest: neither a whole number nor a datetime with a zone.
    """
    if when is None or (isinstance(when, int) and not isinstance(when, bool)):
        return when
    if isinstance(when, datetime) and when.tzinfo is not None:
        return (when - EPOCH) // timedelta(milliseconds=1)
    raise BadRequest(f"expected ms since 1970 or a datetime with its zone, found {when!r:.80}")


def span_s(span: Seconds | None, name: str) -> float | None:
    """*span* in seconds.

    Raises:
        BadRequest: no duration of 0 or more.
    """
    if span is None:
        return None
    try:
        return parse_duration(span)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None


def _messages(given: Iterable[Value | Message]) -> list[Message]:
    try:
        return [message_of(one) for one in given]
    except TypeError:
        raise InvalidRecord(f"expected a list of messages, found {given!r:.80}") from None


def _flag(given: bool, name: str) -> bool:
    if isinstance(given, bool):
        return given
    raise InvalidRecord(f"{name} must be true or false, found {given!r:.80}")


def _text(given: str | None, name: str) -> str | None:
    if given is None or isinstance(given, str):
        return given
    raise InvalidRecord(f"{name} must be text, found {given!r:.80}")


def _moment_text(moment: str | datetime | None) -> str | None:
    if isinstance(moment, datetime):
        return moment.isoformat()
    return _text(moment, "created_at")


def _exact(amount: Money | None) -> Decimal | None:
    if amount is None or isinstance(amount, Decimal):
        return amount
    if isinstance(amount, bool) or not isinstance(amount, int | str):
        raise InvalidRecord(f"revenue must be a Decimal, an int or a decimal string, found {amount!r}")
    try:
        return Decimal(amount)
    except ArithmeticError:
        raise InvalidRecord(f"revenue must be a Decimal, an int or a decimal string, found {amount!r}") from None


def changed(
    found: Record | None, change: Callable[[dict[str, Any]], Value | None], default: Value | None, what: str
) -> tuple[Value, int]:
    """What *change* makes of the record *found*, or of *default* when there is none, with the version it rests on.

    Raises:
        NotFound: neither a record nor a default.
    """
    if found is not None:
        value, version = orjson.loads(found.value), found.version
    elif default is not None:
        value, version = dict(default), 0
    else:
        raise NotFound(f"no {what} to update; give a default to begin with")
    returned = change(value)
    return (value if returned is None else returned), version


def counted(name: str) -> tuple[str, ...]:
    """The collections whose records the list *name* has."""
    return ("orders", "completed_orders") if name == "orders" else (name,)


def lease_op(id: Id, ttl: Seconds, owner: str | None, generation: int | None) -> tuple[SessionLease, float]:
    """The op that asks for a lease, with its ttl in seconds.

    Raises:
        InvalidRecord: *ttl* is no duration.
    """
    try:
        ttl_s = parse_duration(ttl)
    except ValueError as error:
        raise InvalidRecord(f"ttl: {error}") from None
    return SessionLease(id=text_of(id), ttl=ttl, owner=owner, generation=generation), ttl_s


def waited(timeout: float | None) -> float:
    """Seconds to wait for a lease; None means for ever."""
    return math.inf if timeout is None else timeout
