"""What answers look like, as types: handlers build them, or bytes that a test holds against them."""

from __future__ import annotations

from typing import Annotated, Any

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


class Item(msgspec.Struct, frozen=True):
    """A record in a list."""

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


class Sales(msgspec.Struct, frozen=True):
    """The sales figures, as in ``sales_stats.json``: keys that another program left there stay."""

    daily: list[Day]
    totals: Totals


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


class StatusReport(msgspec.Struct, frozen=True):
    """Counts, seqs, sizes, uptime, last flush.

    Attributes:
        uptime_s: since the process started.
        seq: of the last change.
        durable_seq: every change up to here is synced.
        snapshot_seq: the snapshot files hold every change up to here.
        collections: records in each custom collection.
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
    collections: dict[str, Count]
    leases: Count
    idempotency_keys: Count
    seq: Count
    durable_seq: Count
    snapshot_seq: Count
    journal_bytes: Count
    journal_segments: Count
    snapshot_bytes: Count
    durability: Durability
    last_flush: FlushReport | None
    degraded: list[str]
