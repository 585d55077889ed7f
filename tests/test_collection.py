"""A collection: what was decided, what is durable, and one picture of it, all at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import count
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.collection import SHARDS, Collection
from holdfast.core.sales import Sales
from holdfast.core.state import State


def held(collection: Collection) -> dict[str, bytes]:
    """All records as decided."""
    return {id: record for id in collection if (record := collection.get(id)) is not None}


def shown(collection: Collection) -> dict[str, bytes]:
    """All records in their last durable state, as a list reads them."""
    return {id: record for index in range(SHARDS) for id, record in collection.committed_shard(index).items()}


def captured(collection: Collection) -> dict[str, bytes]:
    return {id: record for index in range(SHARDS) for id, record in collection.capture_shard(index).items()}


def test_a_change_is_shown_once_it_is_durable() -> None:
    """Deciding sees it at once, readers only after commit."""
    collection = Collection("c")
    collection.set("a", b"1", 1, undoable=False)

    collection.set("a", b"2", 2, undoable=True)
    collection.set("b", b"1", 3, undoable=True)

    assert (collection.get("a"), collection.committed("a"), collection.committed("b")) == (b"2", b"1", None)
    collection.begin_write()
    assert (collection.committed("a"), collection.committed("b")) == (b"1", None)
    collection.commit()
    assert (collection.committed("a"), collection.committed("b")) == (b"2", b"1")
    assert collection.is_settled


def test_each_batch_is_shown_in_its_turn() -> None:
    """While one batch is written and another gathers, readers see neither; then the first; then both."""
    collection = Collection("c")
    collection.set("a", b"1", 1, undoable=True)
    collection.begin_write()
    collection.set("a", b"2", 2, undoable=True)

    assert collection.committed("a") is None
    collection.commit()
    assert collection.committed("a") == b"1"
    collection.begin_write()
    assert collection.committed("a") == b"1"
    collection.commit()
    assert collection.committed("a") == b"2"


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from("abcd"), st.one_of(st.none(), st.binary(min_size=1, max_size=2))),
        st.tuples(st.sampled_from(["begin", "commit", "undo", "now", "refused"]), st.sampled_from("abcd"), st.just(b"n")),
    ),
    max_size=40,
)  # fmt: skip


@given(OPS)
def test_three_views_agree_with_three_dicts(ops: list[tuple[str, str, bytes | None]]) -> None:
    """Any order of changes, writes, undos, refused batches and immediate changes: each view is a plain dict's equal."""
    state = State()
    collection = state.sessions
    decided: dict[str, bytes] = {}
    durable: dict[str, bytes] = {}
    writing: dict[str, bytes] | None = None
    for seq, (what, id, record) in enumerate(ops, 1):
        if what == "set":
            collection.set(id, record, seq, undoable=True)
            if record is None:
                decided.pop(id, None)
            else:
                decided[id] = record
        elif what == "begin" and writing is None:
            state.begin_write()
            writing = dict(decided)
        elif what == "commit" and writing is not None:
            state.commit()
            durable, writing = writing, None
        elif what == "undo":
            state.undo(0)
            decided, writing = dict(durable), None
        elif what == "now" and writing is None and decided == durable:
            # As the engine does it: acknowledged at once only when nothing is in flight.
            if not collection.is_settled:
                state.begin_write()
                state.commit()
            collection.set(id, record, seq, undoable=False)
            decided[id] = record or b""
            durable = dict(decided)
        elif what == "refused":
            try:
                with state.all_or_nothing():
                    collection.set(id, record, seq, undoable=True)
                    collection.set(id, None, seq, undoable=True)
                    raise KeyError
            except KeyError:
                pass
        assert held(collection) == decided
        assert shown(collection) == durable
        assert {id: collection.committed(id) for id in "abcd"} == {id: durable.get(id) for id in "abcd"}
        assert collection.count == len(decided)


def test_a_refused_batch_leaves_nothing_in_flight() -> None:
    """Left-over bookkeeping would hide what is acknowledged at once afterwards, and an undo would take it back."""
    state = State()
    state.sessions.set("a", b"1", 1, undoable=False)
    try:
        with state.all_or_nothing():
            state.sessions.set("a", b"2", 2, undoable=True)
            state.set_sales(Sales(totals={"allTimeOrders": 1}), 2, undoable=True)
            raise KeyError
    except KeyError:
        pass

    state.sessions.set("a", b"3", 2, undoable=False)
    state.set_sales(Sales(totals={"allTimeOrders": 7}), 2, undoable=False)

    assert state.sessions.committed("a") == b"3"
    assert state.committed_sales.totals == {"allTimeOrders": 7}
    state.undo(2)
    assert state.sessions.get("a") == b"3"
    assert state.sales.totals == {"allTimeOrders": 7}


def test_a_refused_batch_leaves_no_collection_behind() -> None:
    """Nor would a flush write a file for it."""
    state = State()
    try:
        with state.all_or_nothing():
            state.collection("notes").set("a", b"1", 1, undoable=True)
            raise KeyError
    except KeyError:
        pass

    assert "notes" not in state.collections


def test_a_refused_batch_keeps_what_was_in_flight_before() -> None:
    """An earlier change of the same record stays decided, stays hidden, and can still be undone."""
    state = State()
    state.sessions.set("a", b"1", 1, undoable=False)
    state.sessions.set("a", b"2", 2, undoable=True)
    try:
        with state.all_or_nothing():
            state.sessions.set("a", b"3", 3, undoable=True)
            raise KeyError
    except KeyError:
        pass

    assert (state.sessions.get("a"), state.sessions.committed("a")) == (b"2", b"1")
    state.undo(1)
    assert state.sessions.get("a") == b"1"


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=60), st.integers(0, 60), st.booleans())
def test_a_capture_is_one_moment(changes: list[tuple[int, bool]], at: int, undone: bool) -> None:
    """Whatever changes or is undone between taking one shard and the next, the picture is of the moment it began."""
    collection = Collection("c")
    for n in range(30):
        collection.set(f"id{n}", b"old", n, undoable=False)
    for n, is_removed in changes[:at]:
        collection.set(f"id{n}", None if is_removed else b"before", 100, undoable=False)
    expected = held(collection)

    collection.begin_capture()
    picture: dict[str, bytes] = {}
    later = iter(changes[at:])
    for index in range(SHARDS):
        picture |= collection.capture_shard(index)
        for n, is_removed in later:
            collection.set(f"id{n}", None if is_removed else b"after", 200, undoable=True)
            break
        if undone and index == SHARDS // 2:
            collection.undo()
    collection.end_capture()

    assert picture == expected


def test_a_new_capture_forgets_the_one_before() -> None:
    """A capture that was given up leaves nothing behind."""
    collection = Collection("c")
    collection.set("a", b"1", 1, undoable=False)
    collection.begin_capture()
    collection.set("a", b"2", 2, undoable=False)
    collection.end_capture()

    collection.begin_capture()

    assert captured(collection) == {"a": b"2"}


class Interleaved(dict[str, bytes]):
    """A shard in which something happens right after a reader without the lock has looked."""

    def __init__(self, records: dict[str, bytes]) -> None:
        super().__init__(records)
        self.after_look: Callable[[], None] | None = None

    def get(self, id: str, default: Any = None) -> Any:
        found = super().get(id, default)
        happens, self.after_look = self.after_look, None
        if happens is not None:
            happens()
        return found


def refuse_batch(state: State) -> Callable[[], None]:
    """Decide an atomic batch that is refused once the returned function is called."""
    block = state.all_or_nothing()
    block.__enter__()
    state.sessions.set("a", b"undecided", 2, undoable=True)

    def refuse() -> None:
        block.__exit__(KeyError, KeyError(), None)

    return refuse


@pytest.mark.parametrize("fate", ["undo", "refused batch", "commit"])
def test_a_reader_overtaken_between_its_looks_looks_again(fate: str) -> None:
    """Whatever becomes of a change after the record was seen and before what is in flight was."""
    state = State()
    state.sessions.set("a", b"durable", 1, undoable=False)
    index = crc32(b"a") & 255
    shard = state.sessions._shards[index] = Interleaved(state.sessions._shards[index])
    if fate == "refused batch":
        happens = refuse_batch(state)
    else:
        state.sessions.set("a", b"decided", 2, undoable=True)
        state.begin_write()
        happens = state.commit if fate == "commit" else lambda: state.undo(1)

    def overtake() -> None:
        with contextlib.suppress(KeyError):
            happens()

    shard.after_look = overtake

    assert state.sessions.committed("a") == (b"decided" if fate == "commit" else b"durable")


def test_readers_without_a_lock_never_see_what_is_undone() -> None:
    """While batches are written, committed, refused and undone, a reader sees durable values only, never going back."""
    state = State()
    collection = state.sessions
    collection.set("a", b"0", 0, undoable=False)
    durable = 0
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            floor = durable
            record = collection.committed("a")
            if record is None or record.startswith(b"x") or int(record) < max(floor, last):
                wrong.append((floor, last, record))
                return
            last = int(record)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in count(1):
        if n == 20_000 or wrong:
            break
        if n % 3:
            collection.set("a", b"x%d" % n, n, undoable=True)
            if n % 2:
                collection.begin_write()
                collection.set("a", b"x", n, undoable=True)
            collection.undo()
        try:
            with state.all_or_nothing():
                collection.set("a", b"x", n, undoable=True)
                raise KeyError
        except KeyError:
            pass
        collection.set("a", b"%d" % n, n, undoable=True)
        collection.begin_write()
        collection.commit()
        durable = n
    stop.set()
    for reader in readers:
        reader.join()

    assert wrong == []
