"""What answers look like, as types: handlers build them, or bytes that a test holds against them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from holdfast.ops import Durability, FlushReport

Money = Annotated[float, Meta(description="An exact decimal: read its digits, not a binary floating point number.")]
Count = Annotated[int, Meta(ge=0)]
Moment = Annotated[str, Meta(description="ISO 8601, UTC, milliseconds.", extra_json_schema={"format": "date-time"})]


class Written(msgspec.Struct, frozen=True):
    """What a change yielded.

    Attributes:
        id: the record's.
        version: of the record from now on; send it as ``If-Match`` to change just this one.
        seq: number of the change in the journal.
    """

    id: str
    version: Count
    seq: Count


class Granted(Written, frozen=True):
    """A lease.

    Attributes:
        generation: to be sent as ``Holdfast-Lease`` with every write.
        expires_at: when it ends unless it is renewed.
    """

    generation: Count
    expires_at: Moment


class Appended(Written, frozen=True):
    """What messages yielded.

    Attributes:
        id: the conversation's.
        version: of the conversation from now on.
        numbers: of the messages, in their order; one that was delivered before has its old number.
    """

    numbers: list[Count]


class Item(msgspec.Struct, frozen=True):
    """A record in a list; of messages, the id is the number and the version 1."""

    id: str
    version: Count
    value: dict[str, Any]


class Page(msgspec.Struct, frozen=True):
    """A part of a list; it may hold fewer items than asked for, even none, while *next* is given.

    Attributes:
        next: the ``cursor`` of the following page; null at the end.
    """

    items: list[Item]
    next: str | None


class ConversationMessage(msgspec.Struct, frozen=True):
    """A message of a conversation.

    Attributes:
        number: counted from 1 in each conversation; one that was removed leaves a gap.
        role: system, user, assistant, tool.
        author: bot, agent, customer; null where nobody said.
        tokens_used: null where nobody counted.
        metadata: whatever was given, with `channel` and `external_id`.
    """

    number: Count
    role: str
    content: str
    author: str | None
    tokens_used: Count | None
    created_at: Moment
    metadata: dict[str, Any]


class Conversation(msgspec.Struct, frozen=True):
    """A conversation; fields of the caller's own stand beside these.

    Attributes:
        title: the first 50 characters of the first user message, unless another was given.
        updated_at: when the newest message was created.
        handler: who may speak: bot, waiting (an escalation is open), human.
        message_count: without those of the system.
        system_count: those of the system.
        tokens_used: of all messages.
        last_number: of the newest message.
        messages: all of them in order, unless they were not asked for.
    """

    id: str
    title: str | None
    user_id: str | None
    session_id: str | None
    created_at: Moment | None
    updated_at: Moment | None
    escalated: bool
    archived: bool
    handler: str
    message_count: Count
    system_count: Count
    tokens_used: Count
    last_number: Count
    messages: list[ConversationMessage] | msgspec.UnsetType = msgspec.UNSET


class Window(msgspec.Struct, frozen=True):
    """The newest messages that fit, oldest first.

    Attributes:
        tokens_used: what they take together; a message whose tokens nobody counted counts one for 4 characters.
    """

    items: list[Item]
    tokens_used: Count
    next: None = None


class Escalation(msgspec.Struct, frozen=True):
    """A customer who waits for a human, waited for one, or has one.

    Attributes:
        id: the conversation's.
        contact_info: how the customer is reached.
        priority: low, high.
        status: pending; claimed, resolved.
        assignee: who has claimed it.
    """

    id: str
    conversation_id: str
    reason: str
    contact_info: dict[str, Any] | None
    priority: str
    status: str
    assignee: str | None
    opened_at: Moment
    updated_at: Moment
    claimed_at: Moment | None
    resolved_at: Moment | None


class CollectionCount(msgspec.Struct, frozen=True):
    """A custom collection, and how many records it has."""

    name: str
    count: Count


class Collections(msgspec.Struct, frozen=True):
    """The custom collections; all of them."""

    items: list[CollectionCount]
    next: None = None


class Refusal(msgspec.Struct, frozen=True):
    """An op of a batch that was refused."""

    status: int
    code: str
    detail: str


class Results(msgspec.Struct, frozen=True):
    """What the ops of a batch yielded, one result each, in their order.

    Attributes:
        seq: number of the last change in the journal when all of them were decided.
    """

    seq: Count
    results: Annotated[
        list[Any],
        Meta(
            extra_json_schema={
                "items": {"anyOf": [{"$ref": "#/components/schemas/Answer"}, {"$ref": "#/components/schemas/Refusal"}]}
            }
        ),
    ]


class Day(msgspec.Struct, frozen=True):
    """The sales figures of one day, in ``stats.timezone``."""

    date: Annotated[str, Meta(extra_json_schema={"format": "date"})]
    totalOrders: int = 0
    completedOrders: int = 0
    totalRevenue: Money = 0
    productTypes: dict[str, int] = {}


class Totals(msgspec.Struct, frozen=True):
    """The sales figures of all time."""

    allTimeOrders: int
    allTimeRevenue: Money
    allTimeCompleted: int


class Period(msgspec.Struct, frozen=True, rename={"begins": "from", "ends": "to"}):
    """The sales figures of a day, week or month.

    Attributes:
        period: its name in ISO 8601.
        totalOrders: those of one product when only that was asked for.
        completedOrders: not known by product, and left out when one was asked for.
        totalRevenue: as `completedOrders`.
    """

    period: str
    begins: Annotated[str, Meta(extra_json_schema={"format": "date"})]
    ends: Annotated[str, Meta(extra_json_schema={"format": "date"})]
    totalOrders: int
    productTypes: dict[str, int]
    completedOrders: int | msgspec.UnsetType = msgspec.UNSET
    totalRevenue: Money | msgspec.UnsetType = msgspec.UNSET


class Sales(msgspec.Struct, frozen=True):
    """The sales figures, as in ``sales_stats.json``: keys that another program left there stay.

    Attributes:
        periods: the days asked for, added up; there only when the request has a parameter.
    """

    daily: list[Day]
    totals: Totals
    periods: list[Period] | msgspec.UnsetType = msgspec.UNSET


class Storage(msgspec.Struct, frozen=True):
    """How much there is.

    Attributes:
        total: conversations.
        active: not archived, and updated in the last 30 days.
        old: not archived, and not updated for 90 days.
        archived: archived ones.
        escalated: those that are or were escalated.
        messages: all of them, those of the system as well.
        messages_last_30_days: by `created_at`.
        tokens: of all messages.
        bytes: what the archive takes on the disk.
        escalated_share: of all conversations, 0 to 1.
        average_messages: of a conversation, without those of the system.
    """

    total: Count
    active: Count
    old: Count
    archived: Count
    escalated: Count
    messages: Count
    system_messages: Count
    messages_last_30_days: Count
    tokens: Count
    bytes: Count
    escalated_share: float
    average_messages: float


class Cleaned(msgspec.Struct, frozen=True, kw_only=True):
    """What went, or in a dry run would go.

    Attributes:
        archived: conversations that were archived.
        conversations: those that lost messages.
        messages_deleted: these messages.
        bytes_freed: their size; the archive uses the room for new ones.
        deleted: idle conversations that were removed.
        errors: those that could not be.
        held: conversations that a legal hold kept.
        remaining: not 0 when there is more to do than `limit` allowed.
        storage: the figures afterwards.
    """

    archived: Count = 0
    conversations: Count = 0
    messages_deleted: Count = 0
    bytes_freed: Count = 0
    deleted: Count = 0
    errors: Count = 0
    held: Count = 0
    remaining: Count = 0
    storage: dict[str, Any] = {}


class VerifyFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        severity: `error` is data lost or at risk, `warning` needs somebody's hand, `notice` is good to know.
        part: of the data directory.
        found: what is so.
        expected: what should be so; empty where it is.
        action: what to do; empty where there is nothing to be done.
        mend: what `holdfast mend` does about it on a stopped directory; empty when it does nothing.
        path: of the file that it is about, where mending needs to know it.
    """

    severity: Literal["ok", "notice", "warning", "error"]
    part: str
    found: str
    expected: str = ""
    action: str = ""
    mend: str = ""
    path: str = ""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    Attributes:
        at: when it began.
        is_running: whether the directory was in use.
        is_deep: whether the backups were loaded.
        findings: in the order of the parts; at least one of each.
    """

    at: Moment
    data_dir: str
    is_running: bool
    is_deep: bool
    duration_ms: float
    findings: list[VerifyFinding]


class Health(msgspec.Struct, frozen=True):
    """The event loop runs."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether requests are served.

    Attributes:
        status: ready, degraded, starting or stopping.
        state: of the process.
        reasons: what is wrong all the same.
    """

    status: str
    state: str
    reasons: list[str]


class Index(msgspec.Struct, frozen=True):
    """Where to go from here."""

    name: str
    version: str
    paths: list[str]


class Reloaded(msgspec.Struct, frozen=True):
    """What became of changed settings.

    Attributes:
        changed: those that hold now.
        needs_restart: those that hold after the next start.
    """

    changed: list[str]
    needs_restart: list[str] = []


class DiskReport(msgspec.Struct, frozen=True):
    """The file system of the data directory.

    Attributes:
        free_bytes, size_bytes: for users other than root.
        free_files: files that can still be made; null where there is no limit.
        grows_bytes_h: by how much more is taken each hour at the rate of the last ones; null when that is not known yet.
        hours_left: until it is full at that rate; null when it is not known, or does not grow.
    """

    free_bytes: Count
    size_bytes: Count
    free_files: Count | None
    grows_bytes_h: int | None
    hours_left: float | None


class PartReport(msgspec.Struct, frozen=True):
    """What a part of the data directory takes of the disk."""

    bytes: Count
    files: Count


class BackupsReport(msgspec.Struct, frozen=True):
    """How the backups stand.

    Attributes:
        count: how many there are, and *bytes* what they take.
        newest_at: when the newest was made.
        proved_at: when loading everything from the newest was tried last, and *is_proved* whether that went well.
    """

    count: Count
    bytes: Count
    newest_at: str | None
    proved_at: str | None
    is_proved: bool


class CopiesReport(msgspec.Struct, frozen=True):
    """How the copies of the backups at the second place stand; *failure* says why the last try failed."""

    place: str
    count: Count
    newest_at: str | None
    failure: str


class StatusReport(msgspec.Struct, frozen=True):
    """Counts, seqs, sizes, uptime, last flush.

    Attributes:
        uptime_s: since the process started.
        seq: of the last change.
        durable_seq: every change up to here is synced.
        snapshot_seq: the snapshot files hold every change up to here.
        archived_seq: the archive holds every change of conversations up to here.
        collections: records in each custom collection.
        copies: of the backups; null without a second place.
        parts: what each part of the data directory takes, looked at every few minutes.
        degraded: what is wrong with the data all the same.
    """

    state: str
    version: str
    pid: Count
    uptime_s: float
    listen: list[str]
    data_dir: str
    sessions: Count
    pending_orders: Count
    completed_orders: Count
    users: Count
    conversations: Count
    open_escalations: Count
    collections: dict[str, Count]
    leases: Count
    idempotency_keys: Count
    seq: Count
    durable_seq: Count
    snapshot_seq: Count
    archived_seq: Count
    journal_bytes: Count
    journal_segments: Count
    snapshot_bytes: Count
    durability: Durability
    last_flush: FlushReport | None
    backups: BackupsReport
    copies: CopiesReport | None
    disk: DiskReport
    parts: dict[str, PartReport]
    degraded: list[str]
