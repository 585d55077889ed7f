"""Whether an op may happen, and what it comes to: op + state → event, or an error.

Pure: nothing is changed, no clock is asked, no disk is touched. The event holds resulting values only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import cache
from typing import Any

import msgspec
import orjson

from holdfast import record, values
from holdfast.clock import format_ms, parse_ms
from holdfast.core import conversations
from holdfast.core import sales as figures
from holdfast.core.collection import Collection
from holdfast.core.event import Event
from holdfast.core.rules import Rules, check_id, check_text, existing, next_version, refuse_header, unchanged
from holdfast.core.state import KEY_TTL_MS, State, answer_of, is_custom_name
from holdfast.core.wheel import MINUTE_MS
from holdfast.errors import Conflict, InvalidRecord, Leased
from holdfast.ops import (
    Answer,
    AnyOp,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    MessageAppend,
    MessageExpire,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    OrderRestore,
    OrderTake,
    OwnOp,
    PersonHold,
    RecordDelete,
    RecordPatch,
    RecordPut,
    Seconds,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionRelease,
    SessionTouch,
    StatsCompletion,
    StatsOrder,
    StatsTake,
    UserDelete,
    UserPatch,
    UserPut,
)
from holdfast.settings import parse_duration

_DURATION_MAX_S = 100 * 365 * 86400
LEASE_TTL_MAX_MS = 3600 * 1000
KEY_CHARS_MAX = 255
USER_ID_FIELD = "user_id"
RECORD_ID_FIELD = "id"


NOTHING_KNOWN: conversations.Externals = {}


def decide(
    state: State,
    op: AnyOp | OwnOp,
    rules: Rules,
    seq: int,
    now_ms: int,
    retry: tuple[str, int, int] | None = None,
    known: conversations.Externals = NOTHING_KNOWN,
) -> Event | Answer:
    """The event that *op* comes to, with *seq* and *now_ms*; or the answer, when nothing is to change.

    Args:
        retry: client, index in its request, number of the request; the op's own idempotency key goes before it.
        known: of ``message.append``, the messages that the archive has under its external ids.

    Raises:
        HoldfastError: refused; the class says why.
    """
    key = op.idempotency_key
    if key is None and retry is None:
        if known:
            assert isinstance(op, MessageAppend)
            return conversations.message_append(state, op, rules, seq, now_ms, known)
        return _DECIDE[type(op)](state, op, rules, seq, now_ms)
    if key is not None:
        previous = _previous_answer(state, op, key, now_ms)
    else:
        assert retry is not None
        previous = _retried_answer(state, op, retry)
    if previous is not None:
        return previous
    if known:
        assert isinstance(op, MessageAppend)
        decided = conversations.message_append(state, op, rules, seq, now_ms, known)
    else:
        decided = _DECIDE[type(op)](state, op, rules, seq, now_ms)
    if type(decided) is Event:
        decided.key = key
        if key is None:
            decided.retry = retry
    return decided


def decide_expiry(
    state: State, ids: Iterable[str], rules: Rules, now_ms: int
) -> tuple[list[str], list[tuple[str, int]]]:
    """Of the session *ids* whose minute came: those that are idle too long, and the others with their due time, ms.

    A leased session is in use and waits for the end of the lease.
    """
    expired, later = [], []
    for id in ids:
        line = state.sessions.get(id)
        if line is None:
            continue
        due = due_ms(line, rules)
        lease = _active_lease(state, id, now_ms)
        if lease is not None:
            due = max(due, lease["until"])
        if due <= now_ms:
            expired.append(id)
        else:
            later.append((id, due))
    return expired, later


def due_ms(line: bytes, rules: Rules) -> int:
    """When the session in *line* expires unless it is touched, ms since 1970."""
    ttl = record.header_of(line).ttl
    return activity_ms(line, rules) + (rules.session_ttl_ms if ttl is None else ttl)


def activity_ms(line: bytes, rules: Rules) -> int:
    """When the session in *line* was last active, ms since 1970; 0 when it was written under another time field."""
    text = orjson.loads(line).get(rules.session_time_field)
    try:
        return parse_ms(text, rules.zone)
    except (TypeError, ValueError, OverflowError):
        return 0


def milliseconds(duration: Seconds, what: str) -> int:
    """*duration* in ms: a number of seconds, or text such as ``90s``, ``12h``.

    Raises:
        InvalidRecord: neither, or not more than nothing.
    """
    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        raise InvalidRecord(f"{what}: {error}") from None
    if not 0 < seconds <= _DURATION_MAX_S:
        raise InvalidRecord(f"{what} must be above 0 and below a century, found {duration!r}")
    return max(1, round(seconds * 1000))


# Sessions.


def _session_put(state: State, op: SessionPut, rules: Rules, seq: int, now_ms: int) -> Event:
    id, value = op.id, op.value
    check_id(id, rules)
    old = state.sessions.get(id)
    version, ttl = next_version(old, op)
    if op.lease is not None or state.leases.count:
        _check_lease(state, id, op.lease, now_ms)
    encoded = values.encode(value, rules.session_limits)
    if rules.session_id_field not in value:
        encoded = _with_field_first(encoded, rules.session_id_field, id)
    return _session_event(op, "session.put", old, value, encoded, version, ttl, rules, seq, now_ms)


def _session_patch(state: State, op: SessionPatch, rules: Rules, seq: int, now_ms: int) -> Event:
    old = existing(state.sessions, op, "session")
    version, ttl = next_version(old, op)
    _check_lease(state, op.id, op.lease, now_ms)
    refuse_header(op.value)
    value = values.merge_patch(orjson.loads(record.value_of(old)), op.value)
    encoded = values.encode(value, rules.session_limits)
    if rules.session_id_field not in value:
        raise InvalidRecord(f"a patch may not remove the id field {rules.session_id_field!r}")
    return _session_event(op, "session.patch", old, value, encoded, version, ttl, rules, seq, now_ms)


def _session_touch(state: State, op: SessionTouch, rules: Rules, seq: int, now_ms: int) -> Event:
    old = existing(state.sessions, op, "session")
    version, ttl = next_version(old, op)
    _check_lease(state, op.id, op.lease, now_ms)
    value = orjson.loads(record.value_of(old))
    value[rules.session_time_field] = format_ms(now_ms)
    return _session_event(op, "session.touch", old, value, orjson.dumps(value), version, ttl, rules, seq, now_ms)


def _session_event(
    op: SessionPut | SessionPatch | SessionTouch,
    name: str,
    old: bytes | None,
    value: dict[str, Any],
    encoded: bytes,
    version: int,
    ttl: int | None,
    rules: Rules,
    seq: int,
    now_ms: int,
) -> Event:
    """The event that stores *value*; adds ``lastActivity`` to *encoded* when *value* has none."""
    id = op.id
    if record.HEADER_KEY in value:
        refuse_header(value)
    given_id = value.get(rules.session_id_field, id)
    if given_id != id:
        _check_same_id(given_id, id, rules.session_id_field)
    if op.ttl is not None:
        ttl = milliseconds(op.ttl, "ttl")
    at = format_ms(now_ms)
    activity = None
    if rules.session_time_field in value:
        activity = _activity(value[rules.session_time_field], rules)
        # Within the last minute it makes no difference to the wheel, and the event stays short.
        if activity > now_ms - MINUTE_MS and ttl is None:
            activity = None
        elif activity > now_ms:
            activity = now_ms
    else:
        encoded = encoded[:-1] + _time_key(rules.session_time_field) + at.encode() + b'"}'
        if ttl is not None:
            activity = now_ms
    if activity is not None and old is not None:
        due = activity + (rules.session_ttl_ms if ttl is None else ttl)
        if due >= due_ms(old, rules):
            # It stands in the wheel early enough; standing there once more for each touch would fill the memory.
            activity = None
    return Event(seq, at, name, "", id, version, msgspec.Raw(encoded), ttl, activity)


@cache
def _time_key(field: str) -> bytes:
    return b',%b:"' % orjson.dumps(field)


def _session_delete(state: State, op: SessionDelete, rules: Rules, seq: int, now_ms: int) -> Event:
    next_version(existing(state.sessions, op, "session"), op)
    _check_lease(state, op.id, op.lease, now_ms)
    return Event(seq, format_ms(now_ms), "session.delete", id=op.id)


def _session_lease(state: State, op: SessionLease, rules: Rules, seq: int, now_ms: int) -> Event:
    check_id(op.id, rules)
    ttl = milliseconds(op.ttl, "ttl")
    if ttl > LEASE_TTL_MAX_MS:
        raise InvalidRecord(
            f"a lease may last {LEASE_TTL_MAX_MS // 1000} s at most, found {op.ttl!r}; renew it instead"
        )
    check_text(op.owner, "the owner of a lease", rules.id_chars_max)
    lease = _active_lease(state, op.id, now_ms)
    generation = seq
    if lease is not None:
        generation = lease["generation"]
        if op.generation != generation:
            raise _leased(op.id, lease, now_ms)
    elif op.generation is not None:
        raise Conflict(f"lease {op.generation} of session {op.id!r} has ended; take a new one without a generation")
    # The seq makes generations grow for ever without anyone remembering the last one of each session.
    return Event(
        seq,
        format_ms(now_ms),
        "session.lease",
        id=op.id,
        version=_session_version(state, op.id),
        generation=generation,
        until=now_ms + ttl,
        owner=op.owner,
    )


def _session_release(state: State, op: SessionRelease, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    check_id(op.id, rules)
    lease = _active_lease(state, op.id, now_ms)
    version = _session_version(state, op.id)
    if lease is None:
        return Answer(status=200, seq=seq - 1, id=op.id, version=version)
    if lease["generation"] != op.generation:
        raise _leased(op.id, lease, now_ms)
    return Event(seq, format_ms(now_ms), "session.release", id=op.id, version=version, generation=op.generation)


def _session_version(state: State, id: str) -> int:
    """The version of a session that a lease leaves as it is; 0 when there is none yet."""
    line = state.sessions.get(id)
    return 0 if line is None else record.version_of(line)[0]


def _activity(text: Any, rules: Rules) -> int:
    try:
        return parse_ms(text, rules.zone)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRecord(
            f"{rules.session_time_field} must be a time in ISO 8601 such as 2026-11-21T06:00:00.000Z, found {text!r:.80}"
        ) from None


def _active_lease(state: State, id: str, now_ms: int) -> dict[str, Any] | None:
    line = state.leases.get(id)
    if line is None:
        return None
    lease: dict[str, Any] = orjson.loads(line)
    return lease if lease["until"] > now_ms else None


def _check_lease(state: State, id: str, generation: int | None, now_ms: int) -> None:
    lease = _active_lease(state, id, now_ms)
    if lease is None:
        if generation is not None:
            raise Conflict(f"lease {generation} of session {id!r} has ended; take a new one and read the session again")
    elif lease["generation"] != generation:
        raise _leased(id, lease, now_ms)


def _leased(id: str, lease: dict[str, Any], now_ms: int) -> Leased:
    owner = f" by {lease['owner']}" if lease["owner"] else ""
    error = Leased(
        f"session {id!r} is leased{owner} until {format_ms(lease['until'])}; wait, or write with its generation"
    )
    error.ends_in_ms = lease["until"] - now_ms
    return error


# Orders.


def _order_put(state: State, op: OrderPut, rules: Rules, seq: int, now_ms: int) -> Event:
    id, value = op.id, op.value
    check_id(id, rules)
    _refuse_closed(state, id)
    old = state.orders.get(id)
    version, _ = next_version(old, op)
    encoded = _checked(value, id, rules.order_id_field, rules, as_number=True)
    if old is not None:
        return _order_event(seq, now_ms, "order.put", id, version, encoded, record.header_of(old).counted)
    mark = state.counted.get(id)
    if mark is not None:
        return _order_event(seq, now_ms, "order.put", id, version, encoded, orjson.loads(mark)["completed"])
    product_type = value.get("productType")
    check_text(product_type, "productType", rules.id_chars_max)
    day = _created_day(value, rules, now_ms)
    count = figures.count_order(state.sales, day, _oldest(rules, now_ms), product_type)
    return _order_event(seq, now_ms, "order.put", id, version, encoded, False, count)


def _order_patch(state: State, op: OrderPatch, rules: Rules, seq: int, now_ms: int) -> Event:
    _refuse_closed(state, op.id)
    old = existing(state.orders, op, "order")
    version, _ = next_version(old, op)
    encoded = _patched(old, op.value, op.id, rules.order_id_field, rules)
    return _order_event(seq, now_ms, "order.patch", op.id, version, encoded, record.header_of(old).counted)


def _order_complete(state: State, op: OrderComplete, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    revenue = figures.money(op.revenue)
    closed = state.completed_orders.get(op.id)
    if closed is not None:
        if orjson.loads(closed).get("status") == "cancelled":
            raise Conflict(f"order {op.id!r} is cancelled; a cancelled order cannot be completed")
        if op.revenue is None or "revenue" in orjson.loads(closed):
            return unchanged(op, closed, seq)
        return _order_paid(state, op, closed, revenue, rules, seq, now_ms)
    old = existing(state.orders, op, "order")
    version, _ = next_version(old, op)
    changes: dict[str, Any] = {"status": "completed", "completedAt": format_ms(now_ms)}
    if op.revenue is not None:
        changes["revenue"] = orjson.Fragment(figures.money_text(revenue))
    encoded = _closed(old, changes, now_ms)
    if record.header_of(old).counted:
        return _order_event(seq, now_ms, "order.complete", op.id, version, encoded, True)
    today = figures.day_of(now_ms, rules.zone)
    count = figures.count_completion(state.sales, today, _oldest(rules, now_ms), revenue)
    return _order_event(seq, now_ms, "order.complete", op.id, version, encoded, True, count)


def _order_paid(
    state: State, op: OrderComplete, closed: bytes, revenue: Decimal, rules: Rules, seq: int, now_ms: int
) -> Event:
    """The revenue of an order that was completed without one: counted today, its completion was."""
    version, _ = next_version(closed, op)
    encoded = orjson.dumps(
        orjson.loads(record.value_of(closed)) | {"revenue": orjson.Fragment(figures.money_text(revenue))}
    )
    counted = record.header_of(closed).counted
    mark = state.counted.get(op.id)
    # One that was deleted and begun anew was counted in its first life, with what it brought then.
    if not counted or (mark is not None and orjson.loads(mark)["completed"]):
        return _order_event(seq, now_ms, "order.complete", op.id, version, encoded, counted)
    today = figures.day_of(now_ms, rules.zone)
    count = figures.count_completion(state.sales, today, _oldest(rules, now_ms), revenue, orders=0)
    return _order_event(seq, now_ms, "order.complete", op.id, version, encoded, True, count)


def _order_cancel(state: State, op: OrderCancel, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    closed = state.completed_orders.get(op.id)
    if closed is not None:
        if orjson.loads(closed).get("status") != "cancelled":
            raise Conflict(f"order {op.id!r} is completed; a completed order cannot be cancelled")
        return unchanged(op, closed, seq)
    old = existing(state.orders, op, "order")
    version, _ = next_version(old, op)
    changes: dict[str, Any] = {"status": "cancelled", "cancelledAt": format_ms(now_ms)}
    if op.reason is not None:
        check_text(op.reason, "the reason", rules.record_limits.bytes_max)
        changes["cancelReason"] = op.reason
    encoded = _closed(old, changes, now_ms)
    return _order_event(seq, now_ms, "order.cancel", op.id, version, encoded, record.header_of(old).counted)


def _order_delete(state: State, op: OrderDelete, rules: Rules, seq: int, now_ms: int) -> Event:
    where = state.orders if state.orders.get(op.id) is not None else state.completed_orders
    old = existing(where, op, "order")
    next_version(old, op)
    return Event(seq, format_ms(now_ms), "order.delete", id=op.id, counted=record.header_of(old).counted)


def _order_restore(state: State, op: OrderRestore, rules: Rules, seq: int, now_ms: int) -> Event:
    present = state.completed_orders.get(op.id) or state.orders.get(op.id)
    version, _ = next_version(present, op)
    name = "order.put"
    if op.is_closed:
        name = "order.cancel" if orjson.loads(op.value).get("status") == "cancelled" else "order.complete"
    return _order_event(seq, now_ms, name, op.id, version, op.value, op.counted)


def _order_take(state: State, op: OrderTake, rules: Rules, seq: int, now_ms: int) -> Event:
    id, value = op.id, op.value
    check_id(id, rules)
    closed = state.completed_orders.get(id)
    if closed is not None and not op.is_closed:
        _refuse_closed(state, id)
    version, _ = next_version(state.orders.get(id) if closed is None else closed, op)
    if isinstance(value.get("revenue"), Decimal):
        # As it is written there, digit by digit.
        value = value | {"revenue": orjson.Fragment(figures.money_text(figures.money(value["revenue"])))}
    encoded = _checked(value, id, rules.order_id_field, rules, as_number=True)
    if not value.get("recipientPhone"):
        raise InvalidRecord("expected an order with its recipientPhone, found none")
    if not op.is_closed:
        old = state.orders.get(id)
        is_counted = old is not None and record.header_of(old).counted
        return _order_event(seq, now_ms, "order.put", id, version, encoded, is_counted)
    # Who completed it has counted that.
    is_cancelled = value.get("status") == "cancelled"
    name = "order.cancel" if is_cancelled else "order.complete"
    return _order_event(seq, now_ms, name, id, version, encoded, not is_cancelled)


def _order_event(
    seq: int,
    now_ms: int,
    name: str,
    id: str,
    version: int,
    encoded: bytes,
    counted: bool,
    count: figures.Count | None = None,
) -> Event:
    event = Event(seq, format_ms(now_ms), name, "", id, version, msgspec.Raw(encoded), counted=counted)
    if count is not None:
        event.day, event.totals, event.oldest = count.day, count.totals, count.oldest
    return event


def _closed(old: bytes, changes: dict[str, Any], now_ms: int) -> bytes:
    value = orjson.loads(record.value_of(old))
    if "updatedAt" in value:
        value["updatedAt"] = format_ms(now_ms)
    return orjson.dumps(value | changes)


def _refuse_closed(state: State, id: str) -> None:
    closed = state.completed_orders.get(id)
    if closed is not None:
        status = orjson.loads(closed).get("status")
        raise Conflict(f"order {id!r} is {status}; a closed order is not changed any more")


def _created_day(value: dict[str, Any], rules: Rules, now_ms: int) -> str:
    """The day the order was made: that of its ``createdAt`` when it is a time not in the future, else today."""
    try:
        return figures.day_of(min(parse_ms(value["createdAt"], rules.zone), now_ms), rules.zone)
    except (KeyError, TypeError, ValueError, OverflowError):
        return figures.day_of(now_ms, rules.zone)


# Figures of orders that are not kept here.


def _stats_order(state: State, op: StatsOrder, rules: Rules, seq: int, now_ms: int) -> Event:
    check_text(op.product_type, "product_type", rules.id_chars_max)
    count = figures.count_order(state.sales, _stats_day(op.at, rules, now_ms), _oldest(rules, now_ms), op.product_type)
    return _stats_event(seq, now_ms, "stats.order", count)


def _stats_completion(state: State, op: StatsCompletion, rules: Rules, seq: int, now_ms: int) -> Event:
    day = _stats_day(op.at, rules, now_ms)
    count = figures.count_completion(state.sales, day, _oldest(rules, now_ms), figures.money(op.revenue))
    return _stats_event(seq, now_ms, "stats.completion", count)


def _stats_take(state: State, op: StatsTake, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    given = figures.Sales({day["date"]: day for day in op.days}, op.totals)
    counts = figures.take(state.sales, given, _oldest(rules, now_ms), replaces=op.replaces)
    if not counts:
        return Answer(status=200, seq=seq - 1)
    events = [Event(op="stats.order", day=count.day, totals=count.totals, oldest=count.oldest) for count in counts]
    return Event(seq, format_ms(now_ms), "batch", events=events)


def _stats_event(seq: int, now_ms: int, name: str, count: figures.Count) -> Event:
    return Event(seq, format_ms(now_ms), name, day=count.day, totals=count.totals, oldest=count.oldest)


def _stats_day(at: str | None, rules: Rules, now_ms: int) -> str:
    if at is None:
        return figures.day_of(now_ms, rules.zone)
    try:
        moment = parse_ms(at, rules.zone)
        day = figures.day_of(moment, rules.zone)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRecord(
            f"at must be a time in ISO 8601 such as 2026-11-21T06:00:00.000Z, found {at!r:.80}"
        ) from None
    if moment > now_ms:
        raise InvalidRecord(f"at must not be in the future, found {at!r:.80}")
    return day


def _oldest(rules: Rules, now_ms: int) -> str:
    return figures.oldest_day(now_ms, rules.zone, rules.keep_days)


# Users and custom collections.


def _user_put(state: State, op: UserPut, rules: Rules, seq: int, now_ms: int) -> Event:
    check_id(op.id, rules)
    version, _ = next_version(state.users.get(op.id), op)
    encoded = _checked(op.value, op.id, USER_ID_FIELD, rules)
    return Event(seq, format_ms(now_ms), "user.put", "", op.id, version, msgspec.Raw(encoded))


def _user_patch(state: State, op: UserPatch, rules: Rules, seq: int, now_ms: int) -> Event:
    old = existing(state.users, op, "user")
    version, _ = next_version(old, op)
    encoded = _patched(old, op.value, op.id, USER_ID_FIELD, rules)
    return Event(seq, format_ms(now_ms), "user.patch", "", op.id, version, msgspec.Raw(encoded))


def _user_delete(state: State, op: UserDelete, rules: Rules, seq: int, now_ms: int) -> Event:
    next_version(existing(state.users, op, "user"), op)
    return Event(seq, format_ms(now_ms), "user.delete", id=op.id)


def _record_put(state: State, op: RecordPut, rules: Rules, seq: int, now_ms: int) -> Event:
    check_collection(op.collection, rules)
    check_id(op.id, rules)
    collection = state.collections.get(op.collection)
    version, _ = next_version(collection.get(op.id) if collection is not None else None, op)
    encoded = _checked(op.value, op.id, RECORD_ID_FIELD, rules)
    return Event(seq, format_ms(now_ms), "record.put", op.collection, op.id, version, msgspec.Raw(encoded))


def _record_patch(state: State, op: RecordPatch, rules: Rules, seq: int, now_ms: int) -> Event:
    collection = _existing_collection(state, op.collection, rules)
    old = existing(collection, op, "record")
    version, _ = next_version(old, op)
    encoded = _patched(old, op.value, op.id, RECORD_ID_FIELD, rules)
    return Event(seq, format_ms(now_ms), "record.patch", op.collection, op.id, version, msgspec.Raw(encoded))


def _record_delete(state: State, op: RecordDelete, rules: Rules, seq: int, now_ms: int) -> Event:
    collection = _existing_collection(state, op.collection, rules)
    next_version(existing(collection, op, "record"), op)
    return Event(seq, format_ms(now_ms), "record.delete", op.collection, op.id)


def check_collection(name: str, rules: Rules) -> None:
    """Refuse what cannot be the name of a custom collection.

    Raises:
        InvalidRecord: not a name, or one that Holdfast uses itself.
        Conflict: a file that is no collection has this name.
    """
    if not is_custom_name(name):
        raise InvalidRecord(
            f"a collection's name is a to z, 0 to 9, _ and -, up to 64, and none that Holdfast uses; found {name!r:.80}"
        )
    if name in rules.reserved_names:
        raise Conflict(f"{name}.json exists and is no collection ({rules.reserved_names[name]}); use another name")


def _existing_collection(state: State, name: str, rules: Rules) -> Collection:
    check_collection(name, rules)
    return state.collections.get(name) or Collection(name)


# What they share.


def _checked(value: dict[str, Any], id: str, id_field: str, rules: Rules, *, as_number: bool = False) -> bytes:
    """The canonical JSON of *value* with its id in it."""
    refuse_header(value)
    encoded = values.encode(value, rules.record_limits)
    if id_field not in value:
        is_number = as_number and id.isascii() and id.isdigit() and len(id) <= 15 and (id == "0" or id[0] != "0")
        return _with_field_first(encoded, id_field, int(id) if is_number else id)
    _check_same_id(value[id_field], id, id_field)
    return encoded


def _patched(old: bytes, patch: dict[str, Any], id: str, id_field: str, rules: Rules) -> bytes:
    refuse_header(patch)
    value = values.merge_patch(orjson.loads(record.value_of(old)), patch)
    if id_field not in value:
        raise InvalidRecord(f"a patch may not remove the id field {id_field!r}")
    _check_same_id(value[id_field], id, id_field)
    return values.encode(value, rules.record_limits)


def _check_same_id(given: Any, id: str, id_field: str) -> None:
    if isinstance(given, bool) or not isinstance(given, str | int) or str(given) != id:
        raise InvalidRecord(
            f"{id_field} is {given!r:.80}, but the record's id is {id!r}; leave it out or make them equal"
        )


def _with_field_first(encoded: bytes, field: str, value: str | int) -> bytes:
    comma = b"" if encoded == b"{}" else b","
    return b"{%b:%b%b%b" % (orjson.dumps(field), orjson.dumps(value), comma, encoded[1:])


def _previous_answer(state: State, op: AnyOp | OwnOp, key: str, now_ms: int) -> Answer | None:
    """The answer that *key* got within the last 24 hours."""
    if not key or len(key) > KEY_CHARS_MAX or not key.isprintable():
        raise InvalidRecord(f"an idempotency key has 1 to {KEY_CHARS_MAX} printable characters")
    line = state.keys.get(key)
    if line is None:
        return None
    kept = orjson.loads(line)
    if kept["at"] + KEY_TTL_MS <= now_ms:
        return None
    name = type(op).__struct_config__.tag
    if (kept["op"], kept["target"], kept["collection"]) != (name, getattr(op, "id", ""), getattr(op, "collection", "")):
        raise Conflict(f"idempotency key {key!r} was used for another op, {kept['op']}; use a new key for each op")
    return Answer(
        status=kept["status"],
        seq=kept["seq"],
        id=kept["target"],
        version=kept["version"],
        generation=kept["generation"],
        expires_at=kept["expires_at"],
        numbers=kept.get("numbers"),
    )


def _retried_answer(state: State, op: AnyOp | OwnOp, retry: tuple[str, int, int]) -> Answer | None:
    """The answer that this op of this request got before."""
    noted = state.retries.find(*retry, type(op).__struct_config__.tag, getattr(op, "id", ""))  # type: ignore[arg-type]
    return None if noted is None else answer_of(noted, noted.seq)


def _message_append(state: State, op: MessageAppend, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    return conversations.message_append(state, op, rules, seq, now_ms, NOTHING_KNOWN)


_Decider = Callable[[State, Any, Rules, int, int], Event | Answer]

_DECIDE: dict[type[Any], _Decider] = {
    SessionPut: _session_put,
    SessionPatch: _session_patch,
    SessionTouch: _session_touch,
    SessionDelete: _session_delete,
    SessionLease: _session_lease,
    SessionRelease: _session_release,
    OrderPut: _order_put,
    OrderPatch: _order_patch,
    OrderComplete: _order_complete,
    OrderCancel: _order_cancel,
    OrderDelete: _order_delete,
    OrderTake: _order_take,
    OrderRestore: _order_restore,
    StatsOrder: _stats_order,
    StatsCompletion: _stats_completion,
    StatsTake: _stats_take,
    UserPut: _user_put,
    UserPatch: _user_patch,
    UserDelete: _user_delete,
    RecordPut: _record_put,
    RecordPatch: _record_patch,
    RecordDelete: _record_delete,
    MessageAppend: _message_append,
    MessageExpire: conversations.message_expire,
    ConversationPut: conversations.conversation_put,
    ConversationDelete: conversations.conversation_delete,
    ConversationArchive: conversations.conversation_archive,
    ConversationHold: conversations.conversation_hold,
    PersonHold: conversations.person_hold,
    EscalationOpen: conversations.escalation_open,
}
