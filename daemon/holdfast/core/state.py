"""All that is held in memory, and the one function that changes it.

``apply`` is used live, right after an op was decided, and by replay; that the two agree is not tested into
the code but follows from there being only one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from holdfast import record
from holdfast.clock import format_ms
from holdfast.core.backlog import Backlog
from holdfast.core.collection import Change, Collection
from holdfast.core.event import Event
from holdfast.core.retries import Noted, Retries
from holdfast.core.sales import Sales
from holdfast.core.wheel import Wheel
from holdfast.ops import Answer

SESSIONS = "sessions"
ORDERS = "orders"
COMPLETED_ORDERS = "completed_orders"
USERS = "users"
LEASES = "_leases"
KEYS = "_keys"
RETRIES = "_retries"
COUNTED = "_counted"
CONVERSATIONS = "conversations"
ESCALATIONS = "escalations"
HOLDS = "_holds"
EXTERNALS = "_externals"

BUILT_IN = (
    SESSIONS, ORDERS, COMPLETED_ORDERS, USERS, LEASES, KEYS, RETRIES, COUNTED, CONVERSATIONS, ESCALATIONS, HOLDS, EXTERNALS,
)  # fmt: skip
"""The collections that always exist. Those with an underscore are our own book-keeping, shown by no API: leases;
answers by idempotency key; the last answers of each client; deleted orders that are in the sales figures; people under a
legal hold; external ids of the messages of the last day. Of conversations these are the heads, without messages."""

KEY_TTL_MS = 24 * 3600 * 1000
"""How long a repeated op with the same idempotency key gets the first answer (CONTRACT section 6)."""

EXTERNAL_TTL_MS = 24 * 3600 * 1000
"""How long a message's external id is kept in memory; the archive knows it for as long as it has the message."""

_CUSTOM_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_RESERVED = {*BUILT_IN, "chat_sessions", "pending_orders", "sales_stats", "manifest", "tokens", "conversations",
             "escalations", "people", "stats", "search", "events", "batch", "admin", "backups", "archive"}  # fmt: skip


def is_custom_name(name: str) -> bool:
    """Whether *name* may be a custom collection: a plain file name that is not taken by a part of ours."""
    return _CUSTOM_NAME.fullmatch(name) is not None and name not in _RESERVED


class State:
    """The working copy of the journal. Changed by ``apply`` only, under the engine's lock.

    Attributes:
        collections: by name.
        sales: as decided.
        seq: of the last event applied.
        session_ttl_ms: the setting; a session with its own ttl does not use it.
        session_wheel, lease_wheel, key_wheel, external_wheel: who is to be looked at when.
        backlog: events on their way to the archive.
        externals_since: of conversations that began after this event, all external ids are in memory.
        retries: the answers to each client's last request.
        on_released: called with the session's id, under the engine's lock, whenever a lease is given back.
    """

    def __init__(self, session_ttl_ms: int = 24 * 3600 * 1000) -> None:
        self.collections = {name: Collection(name) for name in BUILT_IN}
        self.sessions = self.collections[SESSIONS]
        self.orders = self.collections[ORDERS]
        self.completed_orders = self.collections[COMPLETED_ORDERS]
        self.users = self.collections[USERS]
        self.leases = self.collections[LEASES]
        self.keys = self.collections[KEYS]
        self.counted = self.collections[COUNTED]
        self.conversations = self.collections[CONVERSATIONS]
        self.escalations = self.collections[ESCALATIONS]
        self.holds = self.collections[HOLDS]
        self.externals = self.collections[EXTERNALS]
        self.backlog = Backlog()
        self.externals_since = 0
        self.sales = Sales()
        self.sales_changed_seq = 0
        self._sales_pending: Sales | None = None
        self._sales_writing: Sales | None = None
        self._changes: list[Change] | None = None
        self.seq = 0
        self.session_ttl_ms = session_ttl_ms
        self.session_wheel = Wheel()
        self.lease_wheel = Wheel()
        self.key_wheel = Wheel()
        self.external_wheel = Wheel()
        self.retries = Retries()
        self.on_released: Callable[[str], None] = lambda id: None

    def collection(self, name: str) -> Collection:
        """The collection *name*, which comes into being when it is new."""
        found = self.collections.get(name)
        if found is None:
            found = self.collections[name] = Collection(name)
            found.changes = self._changes
        return found

    def custom(self) -> Iterator[Collection]:
        """The custom collections that hold something."""
        return (found for name, found in sorted(self.collections.items()) if name not in BUILT_IN and found.count)

    @property
    def committed_sales(self) -> Sales:
        """The sales figures in their last durable state; under the engine's lock."""
        return self._sales_writing or self._sales_pending or self.sales

    def set_sales(self, sales: Sales, seq: int, *, undoable: bool) -> None:
        """Replace the figures, as ``Collection.set`` replaces a record."""
        if undoable and self._sales_pending is None:
            self._sales_pending = self.sales
        self.sales = sales
        self.sales_changed_seq = seq

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back every change made inside the block when it raises; what was in flight before stays so."""
        changes: list[Change] = []
        sales, sales_pending, seq = self.sales, self._sales_pending, self.seq
        known = len(self.collections)
        self._note_changes(changes)
        try:
            yield
        except BaseException:
            for collection, id, record, is_first in reversed(changes):
                collection.take_back(id, record, is_first=is_first)
            while len(self.collections) > known:
                self.collections.popitem()
            self.sales, self._sales_pending, self.seq = sales, sales_pending, seq
            self.retries.undo(seq)
            self.backlog.undo(seq)
            raise
        finally:
            self._note_changes(None)

    def _note_changes(self, changes: list[Change] | None) -> None:
        self._changes = changes
        for collection in self.collections.values():
            collection.changes = changes

    def begin_write(self) -> None:
        """The ops in flight so far are now being written."""
        for collection in self.collections.values():
            if not collection.is_settled:
                collection.begin_write()
        self._sales_writing, self._sales_pending = self._sales_pending, None

    def commit(self) -> None:
        """The ops being written are durable."""
        for collection in self.collections.values():
            if not collection.is_settled:
                collection.commit()
        self._sales_writing = None

    def undo(self, seq: int) -> None:
        """Take back every op in flight; *seq* is the last one that stays."""
        for collection in self.collections.values():
            if not collection.is_settled:
                collection.undo()
        self.sales = self.committed_sales
        self._sales_pending = self._sales_writing = None
        self.retries.undo(seq)
        self.backlog.undo(seq)
        self.seq = seq


def apply(state: State, event: Event, at_ms: int, *, undoable: bool) -> None:
    """Change *state* by *event*, which was decided at *at_ms*.

    Applying an event again, or an older one before a newer one of the same record, ends in the same state; so
    replay may start at an earlier seq than the snapshot has.

    With *undoable* the state before remains what readers see until ``state.commit``.
    """
    _APPLY[event.op](state, event, event.seq, at_ms, undoable)
    if event.key is not None:
        _remember_answer(state, event, event.seq, at_ms, undoable)
    elif event.retry is not None:
        _note_retry(state, event, event.seq, at_ms)
    state.seq = event.seq


def answer_of(event: Event | Noted, seq: int) -> Answer:
    """What the client is told about *event*; a pure function, so that a repeat is told the same after a restart."""
    version = event.version
    if event.until is not None:
        expires_at = format_ms(event.until)
        return Answer(
            status=200, seq=seq, id=event.id, version=version, generation=event.generation, expires_at=expires_at
        )
    if not version and event.op.endswith("delete"):
        return Answer(status=204, seq=seq, id=event.id)
    status = 201 if version == 1 and event.op.endswith("put") else 200
    return Answer(status=status, seq=seq, id=event.id, version=version, numbers=_numbers_of(event))


def _numbers_of(event: Event | Noted) -> list[int] | None:
    if event.numbers is None and isinstance(event, Event) and event.messages is not None:
        return [message.number for message in event.messages]
    return event.numbers


def _session_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    value = bytes(event.value)
    if event.ttl is None:
        line = record.join(value, event.version)
    else:
        line = record.join_header(value, record.Header(v=event.version, ttl=event.ttl))
    old = state.sessions.set(event.id, line, seq, undoable=undoable)
    if event.activity is not None:
        ttl = state.session_ttl_ms if event.ttl is None else event.ttl
        state.session_wheel.schedule(event.id, event.activity + ttl)
    elif old is None:
        ttl = state.session_ttl_ms if event.ttl is None else event.ttl
        state.session_wheel.schedule(event.id, at_ms + ttl)


def _session_removed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    state.sessions.set(event.id, None, seq, undoable=undoable)


def _sessions_expired(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    for id in event.ids or ():
        state.sessions.set(id, None, seq, undoable=undoable)


def _session_leased(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    assert event.until is not None
    lease = {"id": event.id, "generation": event.generation, "until": event.until, "owner": event.owner}
    state.leases.set(event.id, record.join(orjson.dumps(lease), 1), seq, undoable=undoable)
    state.lease_wheel.schedule(event.id, event.until)


def _session_released(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    state.leases.set(event.id, None, seq, undoable=undoable)
    state.on_released(event.id)


def _order_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    header = record.Header(v=event.version, at=at_ms, counted=event.counted)
    state.orders.set(event.id, record.join_header(bytes(event.value), header), seq, undoable=undoable)
    _sales_counted(state, event, seq, at_ms, undoable)


def _order_closed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    header = record.Header(v=event.version, at=at_ms, counted=event.counted)
    state.orders.set(event.id, None, seq, undoable=undoable)
    state.completed_orders.set(event.id, record.join_header(bytes(event.value), header), seq, undoable=undoable)
    _sales_counted(state, event, seq, at_ms, undoable)


def _order_removed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    mark = orjson.dumps({"id": event.id, "completed": event.counted})
    state.counted.set(event.id, record.join(mark, 1), seq, undoable=undoable)
    state.orders.set(event.id, None, seq, undoable=undoable)
    state.completed_orders.set(event.id, None, seq, undoable=undoable)


def _sales_counted(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    if event.totals is not None:
        state.set_sales(state.sales.replaced(event.day, event.totals, event.oldest), seq, undoable=undoable)


def _user_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    line = record.join_header(bytes(event.value), record.Header(v=event.version, at=at_ms))
    state.users.set(event.id, line, seq, undoable=undoable)


def _user_removed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    state.users.set(event.id, None, seq, undoable=undoable)


def _record_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    line = record.join_header(bytes(event.value), record.Header(v=event.version, at=at_ms))
    state.collection(event.collection).set(event.id, line, seq, undoable=undoable)


def _record_removed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    state.collection(event.collection).set(event.id, None, seq, undoable=undoable)


def _messages_appended(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    _head_stored(state, event, seq, at_ms, undoable)
    for message in event.messages or ():
        if message.external_id:
            key = f"{event.id}\n{message.channel}\n{message.external_id}"
            noted = orjson.dumps({"id": key, "number": message.number, "seq": seq, "at": at_ms})
            state.externals.set(key, record.join(noted, 1), seq, undoable=undoable)
            state.external_wheel.schedule(key, at_ms + EXTERNAL_TTL_MS)


def _head_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    _set_head(state, event.id, bytes(event.value), event.version, seq, at_ms, undoable)
    state.backlog.note(seq, event)


def _set_head(state: State, id: str, head: bytes, version: int, seq: int, at_ms: int, undoable: bool) -> None:
    old = state.conversations.get(id)
    born = seq if old is None or version == 1 else record.header_of(old).born
    line = record.join_header(head, record.Header(v=version, at=at_ms, born=born))
    state.conversations.set(id, line, seq, undoable=undoable)


def _conversation_removed(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    state.conversations.set(event.id, None, seq, undoable=undoable)
    state.escalations.set(event.id, None, seq, undoable=undoable)
    state.backlog.note(seq, event)


def _person_held(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    line = record.join(bytes(event.value), 1) if event.value else None
    state.holds.set(event.id, line, seq, undoable=undoable)


def _escalation_stored(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    line = record.join_header(bytes(event.value), record.Header(v=event.version, at=at_ms))
    state.escalations.set(event.id, line, seq, undoable=undoable)
    _set_head(state, event.id, bytes(event.head), event.head_version, seq, at_ms, undoable)
    state.backlog.note(seq, event)


def _batch_applied(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    for member in event.events or ():
        _APPLY[member.op](state, member, seq, at_ms, undoable)
        if member.key is not None:
            _remember_answer(state, member, seq, at_ms, undoable)
        elif member.retry is not None:
            _note_retry(state, member, seq, at_ms)


def _remember_answer(state: State, event: Event, seq: int, at_ms: int, undoable: bool) -> None:
    answer = answer_of(event, seq)
    kept: dict[str, Any] = {
        "id": event.key,
        "op": event.op,
        "collection": event.collection,
        "target": event.id,
        "at": at_ms,
    }
    kept |= {"status": answer.status, "seq": seq, "version": answer.version}
    kept |= {"generation": answer.generation, "expires_at": answer.expires_at, "numbers": answer.numbers}
    assert event.key is not None
    state.keys.set(event.key, record.join(orjson.dumps(kept), 1), seq, undoable=undoable)
    state.key_wheel.schedule(event.key, at_ms + KEY_TTL_MS)


def _note_retry(state: State, event: Event, seq: int, at_ms: int) -> None:
    assert event.retry is not None
    client, index, number = event.retry
    noted = Noted(event.op, event.id, event.version, seq, event.generation, event.until, _numbers_of(event))
    state.retries.note(client, index, number, noted, at_ms)


_Applier = Callable[[State, Event, int, int, bool], None]

_APPLY: dict[str, _Applier] = {
    "session.put": _session_stored,
    "session.patch": _session_stored,
    "session.touch": _session_stored,
    "session.delete": _session_removed,
    "session.expire": _sessions_expired,
    "session.lease": _session_leased,
    "session.release": _session_released,
    "order.put": _order_stored,
    "order.patch": _order_stored,
    "order.complete": _order_closed,
    "order.cancel": _order_closed,
    "order.delete": _order_removed,
    "stats.order": _sales_counted,
    "stats.completion": _sales_counted,
    "user.put": _user_stored,
    "user.patch": _user_stored,
    "user.delete": _user_removed,
    "record.put": _record_stored,
    "record.patch": _record_stored,
    "record.delete": _record_removed,
    "message.append": _messages_appended,
    "message.expire": _head_stored,
    "conversation.put": _head_stored,
    "conversation.delete": _conversation_removed,
    "conversation.archive": _head_stored,
    "conversation.hold": _head_stored,
    "person.hold": _person_held,
    "escalation.open": _escalation_stored,
    "batch": _batch_applied,
}

EVENT_OPS = frozenset(_APPLY)
"""The ops that may stand in a journal of this format version."""
