"""Events: ops as they were decided.

An event holds resulting values (version, time, the day's figures), never instructions, so replay needs neither
clock nor randomness, and applying one twice, or an old one before a newer one, ends in the same state.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

NO_VALUE = msgspec.Raw(b"")

Figures = dict[str, Any]
"""A JSON object with exact numbers: int or Decimal where the JSON has a number."""


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A message as it is kept.

    Attributes:
        number: 1, 2, 3 … in its conversation; never given twice.
        role, content, tokens_used: as in ``ops.Message``.
        author: bot, agent, customer; empty for messages of the system and of tools that name none.
        created_ms: ms since 1970.
        metadata: a JSON object with everything else; empty when there is nothing.
        channel, external_id: as in ``metadata``, where they stand as well; empty without.
    """

    number: int
    role: str
    content: str = ""
    tokens_used: int | None = None
    author: str = ""
    created_ms: int
    metadata: msgspec.Raw = NO_VALUE
    channel: str = ""
    external_id: str = ""


class Event(msgspec.Struct, omit_defaults=True, gc=False):
    """One line of the journal, after its checksum. Fields that do not apply are absent.

    Attributes:
        seq: 1, 2, 3 … without gaps; 0 in the members of a batch, which share the batch's.
        at: when it was decided, ISO 8601 UTC with milliseconds.
        op: the op's name; ``session.expire`` and ``batch`` exist only as events.
        collection: of ``record.*``.
        id: the record's id.
        version: the record's version from now on.
        value: the whole value from now on, canonical JSON.
        ttl: a session's own idle time, ms.
        activity: ms since 1970, when the session may expire earlier than *at* + ttl.
        ids: the sessions of ``session.expire``.
        generation: of a lease.
        until: when the lease ends, ms since 1970.
        owner: who holds the lease, for people to read.
        day: a day's sales figures from now on.
        totals: the all-time sales figures from now on.
        oldest: days before this date are no longer kept.
        counted: the completion of the order is in the figures.
        messages: those appended by ``message.append``.
        numbers: what ``message.append`` answers.
        up_to: the highest number that ``message.expire`` removes.
        before: it removes only messages created before this, ms since 1970.
        head: the conversation from now on, where *value* is its escalation; canonical JSON.
        head_version: the conversation's version then.
        key: idempotency key.
        retry: client, index in its request, number of the request (``ops.Retry``).
        events: the members of an atomic batch.
    """

    seq: int = 0
    at: str = ""
    op: str = ""
    collection: str = ""
    id: str = ""
    version: int = 0
    value: msgspec.Raw = NO_VALUE
    ttl: int | None = None
    activity: int | None = None
    ids: list[str] | None = None
    generation: int | None = None
    until: int | None = None
    owner: str | None = None
    day: Figures | None = None
    totals: Figures | None = None
    oldest: str | None = None
    counted: bool = False
    messages: list[StoredMessage] | None = None
    numbers: list[int] | None = None
    up_to: int | None = None
    before: int | None = None
    head: msgspec.Raw = NO_VALUE
    head_version: int = 0
    key: str | None = None
    retry: tuple[str, int, int] | None = None
    events: list[Event] | None = None


encode_event = msgspec.json.Encoder(decimal_format="number").encode
"""The journal's JSON of an event, without checksum and newline. Money is written digit by digit."""

decode_event = msgspec.json.Decoder(Event, float_hook=Decimal).decode
"""The event in a journal line's JSON; raises msgspec.DecodeError when it is none."""
