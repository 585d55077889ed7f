"""Events as those who follow them see them."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson


class Event(msgspec.Struct, frozen=True):
    """One change, once it is durable. The members of an atomic batch come one by one, with the batch's seq and time.

    Attributes:
        seq: its number; members of a batch share one.
        at: when it was decided, ISO 8601 UTC with milliseconds.
        op: the op's name, such as ``session.put``; ``session.expire`` happens by itself.
        id: of the record; None where the op has no single one.
        data: all of it as it stands in the journal: what became, not what was asked (``value``, ``version``, …).
    """

    seq: int
    at: str
    op: str
    id: str | None
    data: dict[str, Any]


def event_of(payload: bytes) -> Event:
    """The event in *payload*, the JSON of the journal or of a stream's ``data`` line.

    Raises:
        ValueError, KeyError: it is none.
    """
    data = orjson.loads(payload)
    return Event(data["seq"], data["at"], data["op"], data.get("id"), data)
