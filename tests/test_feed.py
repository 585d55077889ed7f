"""The events of an engine: each acknowledged change once, in order, never before it is durable."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.engine import Engine
from holdfast.errors import BadRequest, Conflict, ForkedProcess, Gone, HoldfastError, StorageFull, Unavailable
from holdfast.events import Event
from holdfast.feed import Events
from holdfast.ops import (
    AnyOp,
    Batch,
    OrderPut,
    RecordPut,
    SessionDelete,
    SessionPatch,
    SessionPut,
    SessionTouch,
    UserPut,
)
from tests.engine_harness import ANSWER_S, Disk, HandClock, Log, do, do_together, opened, running, settings_of

SEED = 20261121
SOON_S = 0.2
"""Long enough for something that should not happen to happen."""


def put(id: str = "1", **value: Any) -> SessionPut:
    return SessionPut(id=id, value=value)


def taken(events: Events, count: int) -> list[Event]:
    """The next *count* of *events*."""
    return [next(events) for _ in range(count)]


def shown(events: list[Event]) -> list[tuple[int, str, str | None]]:
    return [(event.seq, event.op, event.id) for event in events]


def followers(engine: Engine) -> dict[str, int]:
    """The lag of every reader; the archive follows as well, always."""
    lag = engine.gauges().follower_lag
    assert lag.pop("archive") == 0
    return lag


def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, at most ANSWER_S."""
    ends_at = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.001)


# What is shown.


def test_every_acknowledged_change_is_shown_once_in_order(tmp_path: Path) -> None:
    """Whatever many threads do, with batches, refusals and flushes between: the events are the journal, no more and no less."""
    acknowledged: list[tuple[int, str | None]] = []
    guard = threading.Lock()

    def work(engine: Engine, number: int) -> None:
        rng = random.Random(SEED + number)
        for n in range(60):
            id = str(rng.randrange(20))
            op: AnyOp = rng.choice(
                (put(id, n=n), SessionPatch(id=id, value={"n": n}), SessionDelete(id=id), put(id, n=n))
            )
            try:
                answer = do(engine, op)
            except HoldfastError:
                continue
            with guard:
                acknowledged.append((answer.seq, id))

    with running(tmp_path, journal_keep=0) as engine, engine.events() as events:
        threads = [threading.Thread(target=work, args=(engine, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        seen = taken(events, 40)
        engine.flush("api")
        for thread in threads:
            thread.join()
        engine.flush("api")
        seen += taken(events, len(acknowledged) - 40)

        assert events.lag == 0
    assert [(event.seq, event.id) for event in seen] == sorted(acknowledged)
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))


def test_readers_of_every_pace_get_the_same_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that keep up share what is read, those that fall behind or jump ahead read for themselves: nobody can tell."""
    monkeypatch.setattr("holdfast.feed.SHARED_BYTES_MAX", 3_000)
    seen: dict[int, list[tuple[int, str | None]]] = {}

    def follow(number: int, events: Events) -> None:
        rng = random.Random(SEED + number)
        found = seen[number] = []
        for event in events:
            found.append((event.seq, event.id))
            if rng.random() < number / 200:
                time.sleep(0.002)

    with running(tmp_path, journal_keep=0) as engine:
        streams = [engine.events(0, ids=["1", "2", "3"] if number == 4 else ()) for number in range(5)]
        threads = [threading.Thread(target=follow, args=(number, events)) for number, events in enumerate(streams)]
        for thread in threads:
            thread.start()
        written = []
        rng = random.Random(SEED)
        for n in range(400):
            ids = [str(rng.randrange(9)) for _ in range(rng.choice((1, 1, 1, 5)))]
            do_together(engine, *(put(id, n=n) for id in ids))
            written += [(n + 1, id) for id in ids]
            if n % 100 == 99:
                engine.flush("api")
        until(lambda: all(events.position == 400 for events in streams))
        for events in streams:
            events.close()
        for thread in threads:
            thread.join(ANSWER_S)

    for number in range(4):
        assert seen[number] == written
    assert seen[4] == [(seq, id) for seq, id in written if id in ("1", "2", "3")]


def test_an_event_tells_what_became(tmp_path: Path) -> None:
    """The line of the journal, decoded."""
    with running(tmp_path) as engine, engine.events() as events:
        do(engine, put("57300", cart=[1, 0.1]))

        event = next(events)

    assert (event.seq, event.at, event.op, event.id) == (1, "2026-11-21T06:00:00.000Z", "session.put", "57300")
    assert event.data["value"] == {"recipientPhone": "57300", "cart": [1, 0.1], "lastActivity": event.at}
    assert event.data["version"] == 1


def test_a_batch_is_shown_as_its_members(tmp_path: Path) -> None:
    """Each as an op of its own with seq and time of the batch; one goes on behind it only after the last."""
    with running(tmp_path) as engine, engine.events(after=0) as events:
        do(engine, put("1"))
        do_together(engine, put("2"), OrderPut(id="o", value={}), UserPut(id="u", value={}))
        do(engine, put("3"))
        seen, positions = [], []
        for event in events:
            seen.append(event)
            positions.append(events.position)
            if event.id == "3":
                break

    assert shown(seen) == [
        (1, "session.put", "1"),
        (2, "session.put", "2"),
        (2, "order.put", "o"),
        (2, "user.put", "u"),
        (3, "session.put", "3"),
    ]
    assert positions == [1, 1, 1, 2, 3]
    assert {event.at for event in seen} == {event.data["at"] for event in seen} == {"2026-11-21T06:00:00.000Z"}


@pytest.mark.parametrize(
    ("ops", "ids", "seqs"),
    [
        ((), (), [1, 2, 3, 3, 4, 5]),
        (("session.put",), (), [1, 3]),
        (("session.*",), (), [1, 3, 4, 5]),
        (("session.touch", "order.*"), (), [2, 3, 4]),
        ((), ("1",), [1, 2, 4, 5]),
        ((), ("2", "b"), [3, 3, 5]),
        (("session.*",), ("1",), [1, 4, 5]),
        (("session.expire",), ("2",), [5]),
        (("user.*",), (), []),
        ((), ("nobody",), []),
    ],
)
def test_filters_choose_by_op_and_id(
    tmp_path: Path, ops: tuple[str, ...], ids: tuple[str, ...], seqs: list[int]
) -> None:
    """By name or beginning of the op, by id of the record; within batches too, and by any id that expired."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine, engine.events(0, ops, ids) as events:
        do(engine, put("1"))
        do(engine, OrderPut(id="1", value={}))
        do_together(engine, put("2"), OrderPut(id="b", value={}))
        do(engine, SessionTouch(id="1"))
        clock.advance(25 * 3600)
        engine.expire()

        found = [event.seq for event in taken(events, len(seqs))]

        assert found == seqs
        assert not events._reader.wait(0) or not events._reader.read()


# When it is shown.


def test_nothing_is_shown_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the sync is held neither the caller nor a reader learns of the op; afterwards both do."""
    disk = Disk(monkeypatch)
    may_sync = threading.Event()
    with running(tmp_path) as engine, engine.events() as events:
        disk.before_sync = lambda: may_sync.wait(ANSWER_S) and None
        ticket = engine.submit(put("1"))
        until(lambda: disk.syncs > 0)

        assert not events._reader.wait(SOON_S)
        may_sync.set()
        ticket.wait(ANSWER_S)

        assert shown(taken(events, 1)) == [(1, "session.put", "1")]


def test_what_found_no_room_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seq is used again, by an op that is shown."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine, engine.events() as events:
        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, put("refused"))
        disk.free()
        do(engine, put("taken"))

        assert shown(taken(events, 1)) == [(1, "session.put", "taken")]


def test_what_is_kept_in_memory_is_shown_once_it_is_written(tmp_path: Path) -> None:
    """Under ``interval`` that is at the flush, or before the next op that is written; resuming behind it is no mistake."""
    with running(tmp_path, durability="interval") as engine, engine.events() as events:
        seq = do(engine, put("1")).seq
        assert not events._reader.wait(SOON_S)
        with engine.events(after=seq) as later:
            engine.flush("api")
            assert shown(taken(events, 1)) == [(1, "session.put", "1")]

            do(engine, put("2"))
            do(engine, put("3"), durability="always")
            assert [event.seq for event in taken(events, 2)] == [2, 3]
            assert [event.seq for event in taken(later, 2)] == [2, 3]


def test_what_was_kept_in_memory_is_shown_even_when_a_later_write_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was acknowledged and stands in the file; only the op behind it is taken back."""
    disk = Disk(monkeypatch)
    with running(tmp_path, durability="interval") as engine, engine.events() as events:
        do(engine, put("1"))
        writes = disk.writes

        def second() -> None:
            if disk.writes > writes + 1:
                raise OSError(28, "No space left on device")

        disk.before_write = second
        with pytest.raises(StorageFull):
            do(engine, put("2"), durability="always")

        assert shown(taken(events, 1)) == [(1, "session.put", "1")]


def test_readers_cost_the_writer_nothing_when_there_are_none(tmp_path: Path) -> None:
    """The journal's thread is told to tell only while somebody listens."""
    with running(tmp_path) as engine:
        assert engine.feed._wake not in engine._committer.on_committed
        with engine.events():
            assert engine.feed._wake in engine._committer.on_committed

        assert engine.feed._wake not in engine._committer.on_committed


# Where it begins.


def test_resuming_works_behind_every_event_over_flushes_and_restarts(tmp_path: Path) -> None:
    """Whoever has seen any one of them gets exactly the others, whatever happened to the segments meanwhile."""
    total = 0
    for flushes in (False, True, True):
        engine = opened(tmp_path)
        for n in range(5):
            do(engine, put(str(n)))
            if n == 2:
                engine.flush("api")
        do_together(engine, put("a"), put("b"))
        total += 6
        engine.close(flush=flushes)

    with running(tmp_path) as engine:
        for after in range(total + 1):
            with engine.events(after) as events:
                do(engine, put("new"))
                total += 1

                seqs = [event.seq for event in events_until(events, total)]

                assert sorted(set(seqs)) == list(range(after + 1, total + 1))
                assert len(seqs) - len(set(seqs)) == sum(seq in (6, 12, 18) for seq in set(seqs))


def events_until(events: Events, seq: int) -> list[Event]:
    found = []
    for event in events:
        found.append(event)
        if event.seq == seq:
            break
    return found


def test_now_is_after_what_is_durable(tmp_path: Path) -> None:
    """Without a seq a reader sees what comes, not what was."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        with engine.events() as events:
            do(engine, put("2"))

            assert shown(taken(events, 1)) == [(2, "session.put", "2")]


def test_the_past_beyond_the_journal_is_gone(tmp_path: Path) -> None:
    """The error names the oldest event that is there, and resuming just before it works."""
    with running(tmp_path, journal_keep=0) as engine:
        for n in range(3):
            do(engine, put(str(n)))
        engine.flush("api")
        do(engine, put("3"))

        with pytest.raises(Gone, match=r"begins with 4.*after event 3") as gone:
            engine.events(after=2)

        assert gone.value.oldest_seq == 4
        assert followers(engine) == {}
        with engine.events(after=gone.value.oldest_seq - 1) as events:
            assert shown(taken(events, 1)) == [(4, "session.put", "3")]


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"after": 2}, Conflict, "event 2 has not happened: the last one is 1"),
        ({"after": -1}, BadRequest, "found -1"),
        ({"after": True}, BadRequest, "found True"),
        ({"after": "1"}, BadRequest, "found '1'"),
        (
            {"ops": ["session.put", "session.jump"]},
            BadRequest,
            "unknown op 'session.jump'; known are conversation.archive",
        ),
        ({"ops": ["batch"]}, BadRequest, "unknown op 'batch'"),
        ({"ops": ["ses*"]}, BadRequest, "unknown op 'ses"),
        ({"ops": ["*"]}, BadRequest, "unknown op"),
        ({"ops": ["nothing.*"]}, BadRequest, "unknown op"),
        ({"ops": "session.put"}, BadRequest, "put it in a list"),
        ({"ids": "1"}, BadRequest, "put it in a list"),
    ],
)
def test_what_has_no_meaning_is_refused(
    tmp_path: Path, asked: dict[str, Any], error: type[HoldfastError], told: str
) -> None:
    """Before anything is read, and nothing is left behind."""
    with running(tmp_path) as engine:
        do(engine, put("1"))

        with pytest.raises(error, match=told):
            engine.events(**asked)

        assert followers(engine) == {}


# What it keeps.


def test_a_reader_keeps_the_journal_it_has_not_read(tmp_path: Path) -> None:
    """Flushes remove nothing that it needs; once it has read it, they do."""
    kept = tmp_path / "journal" / "kept"
    with running(tmp_path, journal_keep=0) as engine, engine.events() as events:
        for n in range(4):
            do(engine, put(str(n)))
            engine.flush("api")
        assert followers(engine) == {"events-1": 4}
        assert len(list(kept.iterdir())) == 4

        assert [event.seq for event in taken(events, 4)] == [1, 2, 3, 4]
        engine.flush("api")

        assert followers(engine) == {"events-1": 0}
        assert not list(kept.iterdir())


def test_a_reader_that_takes_nothing_does_not_keep_it_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After HOLD_S the journal goes on without it, and it is told so; one that waits is no such reader."""
    with running(tmp_path, journal_keep=0) as engine, engine.events() as stuck, engine.events() as waiting:
        seen: list[Event] = []
        thread = threading.Thread(target=lambda: seen.extend(taken(waiting, 1)))
        thread.start()
        until(lambda: waiting._reader._is_waiting)
        monkeypatch.setattr("holdfast.feed.HOLD_S", 0.0)
        engine.flush("api")
        do(engine, put("1"))
        thread.join(ANSWER_S)
        assert shown(seen) == [(1, "session.put", "1")]

        engine.flush("api")
        with pytest.raises(Gone):
            next(stuck)


def test_an_iterator_that_is_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    """Who breaks off a loop need not close it."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        for event in engine.events(after=0):
            assert event.seq == 1
            break
        gc.collect()

        assert followers(engine) == {}
        assert not engine.feed._readers


# How it ends.


def test_closing_ends_the_wait_of_another_thread(tmp_path: Path) -> None:
    """The loop ends as if there were no more."""
    with running(tmp_path) as engine:
        events = engine.events()
        seen: list[list[Event]] = []
        thread = threading.Thread(target=lambda: seen.append(list(events)))
        thread.start()
        until(lambda: events._reader._is_waiting)

        events.close()
        thread.join(ANSWER_S)

        assert seen == [[]]


def test_an_engine_that_closes_shows_what_is_durable_first(tmp_path: Path) -> None:
    """Then the events end; there are none of a closed engine."""
    engine = opened(tmp_path, durability="interval")
    events = engine.events()
    for n in range(3):
        do(engine, put(str(n)))

    engine.close()

    assert [event.seq for event in events] == [1, 2, 3]
    with pytest.raises(Unavailable):
        engine.events()


def test_a_forked_child_has_no_events(tmp_path: Path) -> None:
    """It is told so; the reader of the parent goes on."""
    with running(tmp_path) as engine, engine.events() as events:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(5)
                for ask in (lambda: next(events), lambda: engine.events()):
                    try:
                        ask()
                    except ForkedProcess:
                        code = 0
                    else:
                        code = 2
                        break
                events.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

        do(engine, put("1"))
        assert shown(taken(events, 1)) == [(1, "session.put", "1")]


# With asyncio.


def test_tasks_get_the_same_events(tmp_path: Path) -> None:
    """Several at once, each all of them, while others write; and a task that is cancelled leaves nothing behind."""

    async def scenario(engine: Engine) -> None:
        async def follow() -> list[int]:
            seqs = []
            async with engine.events(after=0) as events:
                async for event in events:
                    seqs.append(event.seq)
                    if len(seqs) == 300:
                        break
            return seqs

        async def write(number: int) -> None:
            for n in range(30):
                await engine.submit(put(f"{number}-{n}")).committed()

        async with asyncio.timeout(ANSWER_S):
            tasks = [asyncio.create_task(follow()) for _ in range(3)]
            idle = asyncio.create_task(anext(engine.events(ops=["user.*"])))
            await asyncio.gather(*(write(number) for number in range(10)))

            for seqs in await asyncio.gather(*tasks):
                assert seqs == list(range(1, 301))
            idle.cancel()
            await asyncio.wait([idle])
        del idle
        gc.collect()
        assert followers(engine) == {}
        assert not engine.feed._waiting

    with running(tmp_path) as engine:
        asyncio.run(scenario(engine))


def test_a_closed_engine_ends_the_loops_of_tasks(tmp_path: Path) -> None:
    """After what is durable."""

    async def scenario() -> None:
        engine = opened(tmp_path)
        events = engine.events()

        async def follow() -> list[int]:
            return [event.seq async for event in events]

        task = asyncio.create_task(follow())
        await engine.submit(put("1")).committed()
        await asyncio.to_thread(engine.close)

        assert await asyncio.wait_for(task, ANSWER_S) == [1]

    asyncio.run(scenario())


def test_large_events_and_long_histories_are_followed(tmp_path: Path) -> None:
    """A batch larger than what is read at once, and segments that follow each other by size."""
    with running(tmp_path, clock=HandClock(), log=Log()) as engine:
        big = "x" * 400_000
        do_together(engine, *(RecordPut(collection="notes", id=str(n), value={"t": big}) for n in range(5)))
        for n in range(12):
            engine.submit_batch(Batch(ops=[put(f"{n}-{k}", t=big) for k in range(2)])).wait(ANSWER_S)
        assert engine.status()["journal_segments"] > 2

        with engine.events(after=0) as events:
            seen = taken(events, 29)

    assert [event.seq for event in seen] == [1] * 5 + list(range(2, 26))
    assert all(len(event.data["value"].get("t")) == len(big) for event in seen)


def test_journal_keep_can_change_while_it_runs(tmp_path: Path) -> None:
    """From the next flush on."""
    with running(tmp_path, journal_keep=0) as engine:
        engine.reconfigure(settings_of(tmp_path, journal_keep=1 << 20))
        do(engine, put("1"))
        engine.flush("api")

        with engine.events(after=0) as events:
            assert shown(taken(events, 1)) == [(1, "session.put", "1")]
