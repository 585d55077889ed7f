"""The vocabulary: what clients may ask (ops), and what they are told (answers).

One type per op of CONTRACT section 6. The same types serve the embedded library, the HTTP routes, batches
and the command line, so an op that works in one place works in all. An op says what the caller wants; only
``core.decide`` knows whether it may have it.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

Durability = Literal["always", "everysec", "interval"]
"""When an op is acknowledged: after fsync, after write (fsync each second), or at once (written at each flush)."""

Seconds = Annotated[
    str | int | float, msgspec.Meta(description="Seconds, or text such as `90s`, `12h`.", examples=["30s", 90])
]
"""A duration on the wire: a number of seconds, or text such as ``"90s"``, ``"12h"``."""


ANY_VERSION = -1
"""As ``if_version``: the record must exist, in whatever version (HTTP's ``If-Match: *``)."""


class Op(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="op", gc=False
):
    """What every op has.

    Attributes:
        idempotency_key: a repeat with the same key within 24 h returns the first answer and changes nothing.
    """

    idempotency_key: str | None = None


class RecordOp(Op, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An op on one record.

    Attributes:
        id: the record's id, as text also where the stored field is a number.
        if_version: do it only when the record has this version; 0 means "only if absent",
            ``ANY_VERSION`` (-1) "only if present".
    """

    id: str
    if_version: int | None = None


class SessionPut(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.put"):
    """Store a whole session. ``lastActivity`` is kept when given and set to now when absent.

    Attributes:
        value: the JSON object.
        ttl: idle time after which it expires; None keeps the session's own, or the setting's.
        lease: the generation of the lease under which the caller writes.
    """

    value: dict[str, Any]
    ttl: Seconds | None = None
    lease: int | None = None


class SessionPatch(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.patch"):
    """Merge *value* into the session (RFC 7396). ``lastActivity`` moves only when the patch says so."""

    value: dict[str, Any]
    ttl: Seconds | None = None
    lease: int | None = None


class SessionTouch(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.touch"):
    """Set ``lastActivity`` to now."""

    ttl: Seconds | None = None
    lease: int | None = None


class SessionDelete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.delete"):
    """Remove the session."""

    lease: int | None = None


class SessionLease(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.lease"):
    """Take the lease of a session for *ttl*, or renew the one of *generation*. The session need not exist yet."""

    id: str
    ttl: Seconds = 30
    owner: str | None = None
    generation: int | None = None


class SessionRelease(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="session.release"):
    """Give the lease of *generation* back."""

    id: str
    generation: int


class OrderPut(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.put"):
    """Store a whole order. The first one of an id counts in the sales statistics."""

    value: dict[str, Any]


class OrderPatch(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.patch"):
    """Merge *value* into a pending order (RFC 7396)."""

    value: dict[str, Any]


class OrderComplete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.complete"):
    """Complete an order; counts completion and *revenue* once, however often it is repeated."""

    revenue: Decimal | None = None


class OrderCancel(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.cancel"):
    """Cancel a pending order."""

    reason: str | None = None


class OrderDelete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.delete"):
    """Remove an order, pending or completed. What it added to the statistics stays counted."""


class StatsOrder(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stats.order"):
    """Count an order that Holdfast does not keep. *at* is its moment, now when absent."""

    product_type: str | None = None
    at: str | None = None


class StatsCompletion(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stats.completion"):
    """Count a completion and its *revenue*, of an order that Holdfast does not keep."""

    revenue: Decimal | None = None
    at: str | None = None


class UserPut(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="user.put"):
    """Store a whole user profile."""

    value: dict[str, Any]


class UserPatch(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="user.patch"):
    """Merge *value* into a user profile (RFC 7396)."""

    value: dict[str, Any]


class UserDelete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="user.delete"):
    """Remove a user profile."""


class RecordPut(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="record.put"):
    """Store a whole record of a custom collection, which comes into being with its first record."""

    collection: str
    value: dict[str, Any]


class RecordPatch(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="record.patch"):
    """Merge *value* into a record of a custom collection (RFC 7396)."""

    collection: str
    value: dict[str, Any]


class RecordDelete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="record.delete"):
    """Remove a record of a custom collection."""

    collection: str


Role = Literal["system", "user", "assistant", "tool"]
Author = Literal["bot", "agent", "customer"]
Priority = Literal["low", "high"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A line of a conversation, as a caller hands it in. It is never changed afterwards.

    Attributes:
        role: system, user, assistant, tool.
        content: its text; empty only where ``metadata`` holds ``tool_calls`` or ``attachments``.
        tokens_used: what it cost; None where nobody counted.
        author: bot, agent, customer; None means customer for a user, bot for an assistant.
        metadata: anything else, such as ``channel``, ``external_id``, ``tool_calls``, ``tool_call_id``, ``attachments``
            (by reference). A second message with the channel and external id of one that the conversation has is that
            one, delivered twice.
        channel, external_id: short for the two in ``metadata``.
        created_at: ISO 8601; None means now.
    """

    role: Role
    content: str = ""
    tokens_used: int | None = None
    author: Author | None = None
    metadata: dict[str, Any] | None = None
    channel: str | None = None
    external_id: str | None = None
    created_at: str | None = None


class MessageAppend(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="message.append"):
    """Append to the conversation *id*, which comes into being with its first message: one message, given by its fields,
    or several as ``messages``.

    Attributes:
        messages: each as it would be given alone; then no field of a single one may be.
        user_id, session_id: whose conversation it is; kept once given.
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


class ConversationPut(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="conversation.put"):
    """Say something about a conversation: its ``title``, ``user_id``, ``session_id``, ``escalated``, ``created_at``,
    ``updated_at``, or fields of the caller's own.

    Fields that are not given stay as they are, null removes. What Holdfast keeps itself (``message_count``,
    ``tokens_used``, ``archived``, …) is ignored, so that what was read can be put back; messages are appended instead.
    """

    value: dict[str, Any]


class ConversationDelete(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="conversation.delete"):
    """Remove the conversation with its messages and its escalation. Refused under a legal hold."""


class ConversationArchive(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="conversation.archive"):
    """Move the conversation out of the active set, or with *archived* false back into it. A new message brings it back."""

    archived: bool = True


class ConversationHold(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="conversation.hold"):
    """Put the conversation under a legal hold, or with *hold* false lift it. Nothing of it is deleted meanwhile."""

    hold: bool = True
    reason: str | None = None


class PersonHold(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="person.hold"):
    """Put everything of a person, a phone or user id, under a legal hold, or with *hold* false lift it."""

    id: str
    hold: bool = True
    reason: str | None = None


class EscalationOpen(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="escalation.open"):
    """Have the customer of the conversation *id* wait for a human. A second call updates the escalation that is open.

    Attributes:
        reason: why, for whoever takes it.
        contact_info: how the customer is reached.
        priority: low, high; None means low, or what the open escalation has.
        opened_at: ISO 8601; None means now.
    """

    reason: str
    contact_info: dict[str, Any] | None = None
    priority: Priority | None = None
    opened_at: str | None = None


AnyOp = (
    SessionPut
    | SessionPatch
    | SessionTouch
    | SessionDelete
    | SessionLease
    | SessionRelease
    | OrderPut
    | OrderPatch
    | OrderComplete
    | OrderCancel
    | OrderDelete
    | StatsOrder
    | StatsCompletion
    | UserPut
    | UserPatch
    | UserDelete
    | RecordPut
    | RecordPatch
    | RecordDelete
    | MessageAppend
    | ConversationPut
    | ConversationDelete
    | ConversationArchive
    | ConversationHold
    | PersonHold
    | EscalationOpen
)
"""Every op a client may send."""


class MessageExpire(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="message.expire"):
    """Remove the oldest messages of a conversation for good. Only retention asks for it, which has counted them.

    Attributes:
        before_ms: those created before this, ms since 1970 …
        up_to: … and with this number or a lower one.
        messages, system, tokens: how many these are, how many of them of the system, and their tokens.
    """

    before_ms: int
    up_to: int
    messages: int
    system: int
    tokens: int


class OrderRestore(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.restore"):
    """Put an order back as it was, byte for byte and without counting it anew. Only a restore asks for it.

    Attributes:
        value: the JSON object.
        is_closed: it was completed or cancelled.
        counted: its completion is in the sales figures.
    """

    value: bytes
    is_closed: bool
    counted: bool


class OrderTake(RecordOp, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="order.take"):
    """Store an order as it is in another place, which has counted it. Only an import asks for it.

    Attributes:
        value: with its status and times, which stay as they are.
        is_closed: it is completed or cancelled.
    """

    value: dict[str, Any]
    is_closed: bool


class StatsTake(Op, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stats.take"):
    """Add sales figures that were counted in another place. Only an import asks for it.

    Attributes:
        days, totals: as in ``sales_stats.json``, money as exact numbers.
        replaces: they are our own, edited: what they say counts.
    """

    days: list[dict[str, Any]]
    totals: dict[str, Any]
    replaces: bool = False


OwnOp = MessageExpire | OrderRestore | OrderTake | StatsTake
"""What only Holdfast itself asks for; the events are those of the other ops."""


class Batch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/batch``: *ops* in order, all or nothing when *atomic*."""

    ops: list[AnyOp]
    atomic: bool = False


class Retry(NamedTuple):
    """Which request of which client this is, so that it may be sent again when its answer is lost.

    Of each client the answers to its last request are kept, for an hour; so a client numbers its requests upwards and
    sends the next one only when the last one is answered. Costs less than an idempotency key, which is kept for a day.

    Attributes:
        client: 8 to 64 of A-Z, a-z, 0-9, _ and -, drawn at random for each connection.
        number: of the request.
    """

    client: str
    number: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What an op yielded.

    Attributes:
        status: 200 changed or confirmed, 201 created, 204 removed.
        seq: the event that made it so (for a repeat: the event of the first time).
        id: the record's id; empty for ``stats.*``.
        version: the record's version after the op; 0 when there is none (deleted, lease, stats).
        generation: the fencing generation of a lease.
        expires_at: when a lease ends, ISO 8601.
        numbers: of the messages of ``message.append``, in their order; one that was there before has its old number.
    """

    status: int
    seq: int
    id: str = ""
    version: int = 0
    generation: int | None = None
    expires_at: str | None = None
    numbers: list[int] | None = None


class Record(msgspec.Struct, frozen=True, gc=False):
    """A stored record.

    Attributes:
        id: as text.
        version: counted from 1.
        value: the JSON object as it was stored.
    """

    id: str
    version: int
    value: bytes


class Page(msgspec.Struct, frozen=True):
    """A part of a list.

    Attributes:
        items: the records; may be fewer than asked for, even none, when *next* is given.
        next: the cursor of the following page; None at the end.
    """

    items: list[Record]
    next: str | None


class Window(msgspec.Struct, frozen=True):
    """The newest messages of a conversation that fit into a language model's context, oldest first.

    Attributes:
        items: one for each; its id is the message's number, its value the message.
        tokens_used: what they take together, estimated for those whose tokens nobody counted.
    """

    items: list[Record]
    tokens_used: int


class FlushReport(msgspec.Struct, frozen=True):
    """What a flush did.

    Attributes:
        reason: interval, size, signal, api, backup, shutdown, recovery.
        snapshot_seq: the files hold every event up to here.
        files: how many were rewritten.
        bytes: their size.
        pruned: journal segments removed.
        duration_ms: from the first to the last step.
        at: when it ended, ISO 8601.
    """

    reason: str
    snapshot_seq: int
    files: int
    bytes: int
    pruned: int
    duration_ms: float
    at: str


class BackupReport(msgspec.Struct, frozen=True):
    """What a backup did.

    Attributes:
        name: of the set, its directory in ``backups/``.
        reason: daily, api, command, restore, import, migration, upgrade, mend.
        seq: everything up to here is in it.
        records: how many records and messages.
        files: of the set.
        bytes: they take, compressed.
        new_bytes: of these, in files that no earlier set shares.
        notes: what is not as it should be, in words: what could not be had, and so is not in it.
        proved: whether everything was loaded from it and was right; None when that could not be tried.
        problem: why it was not right, or could not be tried; empty when it was.
        duration_ms: of all of it.
        at: when it ended, ISO 8601.
    """

    name: str
    reason: str
    seq: int
    records: int
    files: int
    bytes: int
    new_bytes: int
    notes: list[str]
    proved: bool | None
    problem: str
    duration_ms: float
    at: str


class BackupInfo(msgspec.Struct, frozen=True):
    """A backup set that is there.

    Attributes:
        name: its directory in ``backups/``.
        at: when it was taken, ISO 8601; empty when it cannot be read.
        reason, seq, records, bytes, new_bytes: as in ``BackupReport``.
        encrypted: whether it is.
        foreign: whether it is of another data directory, and so used only when it is named.
        proved: whether everything was loaded from it, the last time that was tried; None when it never was.
        proved_at: when, ISO 8601; empty when it never was.
        problem: why it cannot be read, or was not right; empty otherwise.
    """

    name: str
    at: str
    reason: str
    seq: int
    records: int
    bytes: int
    new_bytes: int
    encrypted: bool
    foreign: bool
    proved: bool | None
    proved_at: str
    problem: str


class HistoryInfo(msgspec.Struct, frozen=True):
    """The history behind the backups, from which any moment can be restored.

    Attributes:
        since: of the oldest moment that can be restored, ISO 8601; empty when there is none.
        first_seq, last_seq: of the events in closed parts; 0 when there are none.
        parts: how many files.
        bytes: they take, compressed.
        problem: why it is not kept now; empty when it is.
    """

    since: str
    first_seq: int
    last_seq: int
    parts: int
    bytes: int
    problem: str


class BackupList(msgspec.Struct, frozen=True):
    """What there is to go back to.

    Attributes:
        items: the sets, newest first.
        history: what lies between and behind them.
    """

    items: list[BackupInfo]
    history: HistoryInfo
