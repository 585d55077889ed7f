"""Lists of records, a page at a time, in an order that inserts and removals do not upset."""

from __future__ import annotations

import base64
import threading
from bisect import bisect_right
from collections.abc import Callable

import msgspec
import orjson

from holdfast import record
from holdfast.core.collection import SHARDS
from holdfast.core.decide import activity_ms
from holdfast.core.rules import Rules
from holdfast.core.state import COMPLETED_ORDERS, ORDERS, SESSIONS, State
from holdfast.errors import BadRequest
from holdfast.ops import Page, Record

PAGE_BYTES_MAX = 8 << 20
"""Of the values in one page; it may then be short, with a cursor to go on."""

PAGE_LOOKS_AT_MOST = 5_000
"""Records that one filtered page examines; it may then be short, with a cursor to go on."""

_STATE_FIELD = {SESSIONS: "currentState", ORDERS: "status"}


class Filter(msgspec.Struct, frozen=True):
    """Which records of a list are wanted.

    Attributes:
        since_ms, until_ms: active (sessions) or changed (others) at or after this, and before; ms since 1970.
        state: sessions with this ``currentState``, orders with this ``status``.
    """

    since_ms: int | None = None
    state: str | None = None
    until_ms: int | None = None


def page_of(
    state: State, lock: threading.Lock, rules: Rules, name: str, limit: int, cursor: str | None, wanted: Filter
) -> Page:
    """Up to *limit* records of the list *name* that are *wanted*, from *cursor* on, in their last durable state.

    The order is that of shards, and of ids within one: of no meaning, but the same in every process. ``orders`` are the
    pending ones, then those completed or cancelled.

    Raises:
        BadRequest: no limit, a cursor of another list, or a filter that this list does not have.
    """
    if limit < 1:
        raise BadRequest(f"limit must be 1 or more, found {limit}")
    names = [ORDERS, COMPLETED_ORDERS] if name == ORDERS else [name]
    parts = [part for each in names if (part := state.collections.get(each)) is not None]
    matches = _matcher(name, wanted, rules)
    first_place, after = _decode_cursor(cursor, name)
    items: list[Record] = []
    looks = size = 0
    looked_at = first_place, after
    for place in range(first_place, len(parts) * SHARDS):
        part = parts[place // SHARDS]
        with lock:
            ids = list(part.committed_shard(place % SHARDS))
        ids.sort()
        for id in ids[bisect_right(ids, after) :] if after else ids:
            line = part.committed(id)
            looks += 1
            if line is not None and (matches is None or matches(line)):
                if len(items) == limit or size >= PAGE_BYTES_MAX:
                    return Page(items, _encode_cursor(name, *looked_at))
                value, version = record.split(line)
                items.append(Record(id, version, value))
                size += len(line)
            looked_at = place, id
            if looks == PAGE_LOOKS_AT_MOST:
                return Page(items, _encode_cursor(name, *looked_at))
        after = ""
    return Page(items, None)


def _matcher(name: str, wanted: Filter, rules: Rules) -> Callable[[bytes], bool] | None:
    state, since_ms, until_ms = wanted.state, wanted.since_ms, wanted.until_ms
    state_field = _STATE_FIELD.get(name)
    if state is not None and state_field is None:
        raise BadRequest(f"{name} have no state to filter by; sessions and orders have")
    if since_ms is None and state is None and until_ms is None:
        return None
    # Most records are ruled out without being decoded.
    part = state.encode("utf-8", "replace") if state is not None and state.isalnum() else b""

    def matches(line: bytes) -> bool:
        if part not in line or (state is not None and orjson.loads(line).get(state_field) != state):
            return False
        if since_ms is None and until_ms is None:
            return True
        changed_ms = activity_ms(line, rules) if name == SESSIONS else record.header_of(line).at or 0
        return (since_ms is None or changed_ms >= since_ms) and (until_ms is None or changed_ms < until_ms)

    return matches


def _encode_cursor(name: str, place: int, id: str) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([name, place, id])).decode().rstrip("=")


def _decode_cursor(cursor: str | None, name: str) -> tuple[int, str]:
    if cursor is None:
        return 0, ""
    try:
        of, place, id = msgspec.json.decode(
            base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)), type=tuple[str, int, str]
        )
    except (ValueError, msgspec.DecodeError):
        raise BadRequest("not a cursor; use the 'next' of the page before, or leave it out") from None
    if of != name or not 0 <= place < 2 * SHARDS:
        raise BadRequest(f"a cursor of the list of {of!r:.80}, this is the list of {name!r:.80}")
    return place, id
