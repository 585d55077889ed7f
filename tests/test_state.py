"""Applying events: replay equals live, and may begin earlier than the snapshot."""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast import record
from holdfast.core.decide import decide, decide_expiry, due_ms
from holdfast.core.event import Event, decode_event, encode_event
from holdfast.core.rules import Rules
from holdfast.core.sales import decode_sales, encode_sales
from holdfast.core.state import State, answer_of, apply, is_custom_name
from holdfast.errors import HoldfastError
from holdfast.ops import (
    AnyOp,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    RecordDelete,
    RecordPatch,
    RecordPut,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionRelease,
    SessionTouch,
    StatsCompletion,
    StatsOrder,
    UserDelete,
    UserPut,
)
from tests.engine_harness import NOW_MS

RULES = Rules()
IDS = st.sampled_from(["1", "2", "3"])
VALUES = st.sampled_from([{}, {"n": 1}, {"n": 2, "text": "hola"}, {"productType": "ring"}, {"a": {"b": None}}])
REVENUE = st.sampled_from([None, Decimal("0.1"), Decimal("0.2"), Decimal(100), Decimal("99.999999")])
TTL = st.sampled_from([None, None, "90s", "2d"])
KEYS = st.sampled_from([None, None, None, "k1", "k2"])

OPS: st.SearchStrategy[AnyOp] = st.one_of(
    st.builds(SessionPut, id=IDS, value=VALUES, ttl=TTL, idempotency_key=KEYS),
    st.builds(SessionPatch, id=IDS, value=VALUES, ttl=TTL),
    st.builds(SessionTouch, id=IDS, ttl=TTL),
    st.builds(SessionDelete, id=IDS, idempotency_key=KEYS),
    st.builds(SessionLease, id=IDS, ttl=st.sampled_from([1, 100])),
    st.builds(SessionRelease, id=IDS, generation=st.integers(1, 5)),
    st.builds(OrderPut, id=IDS, value=VALUES, idempotency_key=KEYS),
    st.builds(OrderPatch, id=IDS, value=VALUES),
    st.builds(OrderComplete, id=IDS, revenue=REVENUE),
    st.builds(OrderCancel, id=IDS),
    st.builds(OrderDelete, id=IDS),
    st.builds(StatsOrder, product_type=st.sampled_from([None, "ring"])),
    st.builds(StatsCompletion, revenue=REVENUE),
    st.builds(UserPut, id=IDS, value=VALUES),
    st.builds(UserDelete, id=IDS),
    st.builds(RecordPut, collection=st.just("notes"), id=IDS, value=VALUES),
    st.builds(RecordPatch, collection=st.just("notes"), id=IDS, value=VALUES),
    st.builds(RecordDelete, collection=st.just("notes"), id=IDS),
)
STEPS = st.lists(
    st.tuples(OPS | st.just("expire"), st.sampled_from([0, 1, 40_000, 3_600_000, 86_400_000])), max_size=40
)


def snapshot(state: State) -> dict[str, Any]:
    """All that a flush would write."""
    return {
        "sales": encode_sales(state.sales),
        **{
            name: {id: collection.get(id) for id in collection}
            for name, collection in state.collections.items()
            if collection.count
        },
    }


def restored(picture: dict[str, Any]) -> State:
    """A state loaded from what a flush wrote."""
    state = State()
    for name, records in picture.items():
        if name == "sales":
            state.set_sales(decode_sales(records), 0, undoable=False)
        else:
            for id, line in records.items():
                state.collection(name).fill(id, line)
    return state


def live(steps: list[tuple[AnyOp | str, int]]) -> tuple[State, list[tuple[bytes, int]], list[dict[str, Any]]]:
    """Decide and apply *steps*; the state, the journal's payloads with their times, and a snapshot before each."""
    state, now_ms = State(), NOW_MS
    journal: list[tuple[bytes, int]] = []
    pictures = [snapshot(state)]
    for op, pause_ms in steps:
        now_ms += pause_ms
        if isinstance(op, str):
            expired, _ = decide_expiry(state, list(state.sessions), RULES, now_ms)
            decided: Any = Event(state.seq + 1, "", "session.expire", ids=expired)
        else:
            try:
                decided = decide(state, op, RULES, state.seq + 1, now_ms)
            except HoldfastError:
                continue
        if isinstance(decided, Event):
            payload = encode_event(decided)
            apply(state, decided, now_ms, undoable=False)
            journal.append((payload, now_ms))
            pictures.append(snapshot(state))
    return state, journal, pictures


def replay(state: State, journal: list[tuple[bytes, int]]) -> State:
    for payload, at_ms in journal:
        apply(state, decode_event(payload), at_ms, undoable=False)
    return state


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_replay_equals_live(steps: list[tuple[AnyOp | str, int]]) -> None:
    """The journal's text, decoded and applied to nothing, makes the same state, byte for byte."""
    state, journal, _ = live(steps)

    replayed = replay(State(), journal)

    assert snapshot(replayed) == snapshot(state)
    assert replayed.seq == state.seq


@settings(max_examples=150, deadline=None)
@given(STEPS, st.data())
def test_replay_may_begin_before_the_snapshot(steps: list[tuple[AnyOp | str, int]], data: st.DataObject) -> None:
    """Events that the snapshot, or only some of its files, already holds change nothing in the end."""
    state, journal, pictures = live(steps)
    begin = data.draw(st.integers(0, len(journal)))
    mixed = {}
    for name in ["sales", *state.collections]:
        taken = data.draw(st.integers(begin, len(journal)), label=name)
        if name in pictures[taken]:
            mixed[name] = pictures[taken][name]

    replayed = replay(restored(mixed), journal[begin:])

    assert snapshot(replayed) == snapshot(state)


@settings(max_examples=50, deadline=None)
@given(STEPS)
def test_replaying_twice_changes_nothing(steps: list[tuple[AnyOp | str, int]]) -> None:
    """Applying all events again to the state that they made ends in that state."""
    _, journal, pictures = live(steps)

    assert snapshot(replay(replay(State(), journal), journal)) == pictures[-1]


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_deciding_changes_nothing(steps: list[tuple[AnyOp | str, int]]) -> None:
    """A decision leaves the state, and the op with its value, as they were."""
    state, _, pictures = live(steps)
    for op, _ in steps:
        if isinstance(op, str):
            continue
        before = copy.deepcopy(op)
        try:
            decide(state, op, RULES, state.seq + 1, NOW_MS)
        except HoldfastError:
            pass
        assert op == before
    assert snapshot(state) == pictures[-1]


@settings(max_examples=100, deadline=None)
@given(STEPS)
@example([(SessionPut(id="1", value={}, ttl="2d"), 0), (SessionTouch(id="1", ttl="90s"), 0)])
@example([(SessionPut(id="1", value={}), 0), (SessionPatch(id="1", value={"lastActivity": "2026-11-20T07:00:00Z"}), 0)])
def test_every_session_stands_in_the_wheel_in_time(steps: list[tuple[AnyOp | str, int]]) -> None:
    """Live and after replay: whoever is due is found by looking at the wheel alone, at most a minute late."""
    state, journal, _ = live(steps)
    for one in (state, replay(State(), journal)):
        dues = sorted((due_ms(line, RULES), id) for id in one.sessions if (line := one.sessions.get(id)) is not None)
        looked: set[str] = set()
        for due, id in dues:
            looked |= one.session_wheel.take_due(due + 60_000, 10_000)
            assert id in looked


def test_touching_does_not_fill_the_wheel() -> None:
    """Postponing costs nothing, with a ttl of one's own as well."""
    steps: list[tuple[AnyOp | str, int]] = [(SessionPut(id="1", value={}, ttl="12h"), 0)]
    steps += [(SessionTouch(id="1"), 1000)] * 500
    steps += [(SessionPatch(id="1", value={"n": 1}), 1000)] * 500
    steps += [(SessionPut(id="1", value={}), 1000)] * 500

    state, _, _ = live(steps)

    assert len(state.session_wheel) == 1


def test_answers_are_functions_of_the_event() -> None:
    """A repeat after a restart is told what the first one was told."""
    state = State()
    event = decide(state, SessionLease(id="1", ttl=30, owner="w", idempotency_key="k"), RULES, 1, NOW_MS)
    assert isinstance(event, Event)
    first = answer_of(event, 1)
    replay(state, [(encode_event(event), NOW_MS)])

    again = decide(state, SessionLease(id="1", ttl=30, owner="w", idempotency_key="k"), RULES, 2, NOW_MS + 1000)

    assert again == first


@pytest.mark.parametrize(
    ("name", "expected"),
    [("notes", True), ("a", True), ("a" * 64, True), ("a" * 65, False), ("", False), ("Notes", False), ("1a", False)]
    + [
        (name, False)
        for name in ("sessions", "chat_sessions", "manifest", "_keys", "../x", "a/b", "a.b", "ñ", "notes\n")
    ],
)
def test_collection_names_are_plain_file_names(name: str, expected: bool) -> None:
    """Nothing that is ours, no path, no surprise on any file system."""
    assert is_custom_name(name) is expected


def test_a_record_holds_its_header_last() -> None:
    """What a flush writes is the value with one key more."""
    state, _, _ = live([(OrderPut(id="1", value={"n": 1}), 0)])
    line = state.orders.get("1")

    assert line is not None
    assert orjson.loads(line) == {"odooOrderId": 1, "n": 1, "_holdfast": {"v": 1, "at": NOW_MS}}
    assert record.value_of(line) == b'{"odooOrderId":1,"n":1}'
