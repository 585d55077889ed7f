"""Group commit: durable before it is told, hidden until then, undone when there is no room."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.clock import Clock
from holdfast.engine import Engine, Ticket
from holdfast.errors import BadRequest, JournalBroken, NotFound, StorageFull, Unavailable, VersionMismatch
from holdfast.ops import Batch, Durability, OrderPut, SessionDelete, SessionPatch, SessionPut, StatsOrder, UserPut
from tests.engine_harness import ANSWER_S, Disk, HandClock, Log, do, do_together, opened, running, value_of


class Gate:
    """Holds the journal's thread before a write or a sync until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(ANSWER_S)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under the journal."""
    return Disk(monkeypatch)


def put(id: str = "1", **value: Any) -> SessionPut:
    return SessionPut(id=id, value=value)


def journaled(data_dir: Path) -> list[int]:
    """The seqs in the journal files as another process reads them."""
    lines = b"".join(path.read_bytes() for path in sorted((data_dir / "journal").iterdir())).splitlines()
    return [orjson.loads(line[9:])["seq"] for line in lines]


def is_done(ticket: Ticket) -> bool:
    try:
        ticket.wait(0)
    except Unavailable:
        return False
    return True


# Levels of durability.


@pytest.mark.parametrize(("level", "syncs", "writes"), [("always", 1, 1), ("everysec", 0, 1), ("interval", 0, 0)])
@pytest.mark.parametrize("per_call", [False, True])
def test_an_op_is_as_durable_as_was_asked_for(
    tmp_path: Path, disk: Disk, level: Durability, syncs: int, writes: int, per_call: bool
) -> None:
    """When the wait ends: synced, written, or in memory; by the setting, or for one call."""
    chosen: dict[str, Any] = {} if per_call else {"durability": level}
    if per_call and level == "always":
        chosen["durability"] = "interval"
    with running(tmp_path, **chosen) as engine:
        before = (disk.syncs, disk.writes)

        do(engine, put(), durability=level if per_call else None)

        assert (disk.syncs - before[0], disk.writes - before[1]) == (syncs, writes)
        assert value_of(engine, "sessions", "1") is not None


def test_an_unknown_durability_is_refused(tmp_path: Path) -> None:
    """A typing error never weakens a promise."""
    with running(tmp_path) as engine:
        with pytest.raises(BadRequest):
            engine.submit(put(), durability="allways")  # type: ignore[arg-type]
        assert engine.count("sessions") == 0


def test_everysec_is_synced_within_a_second(tmp_path: Path, disk: Disk) -> None:
    """Also when nothing follows."""
    with running(tmp_path, clock=Clock(), durability="everysec") as engine:
        do(engine, put(lastActivity="2026-11-21T06:00:00Z"))
        written_at, before = time.monotonic(), disk.syncs
        while disk.syncs == before and time.monotonic() - written_at < ANSWER_S:
            time.sleep(0.01)

        assert 0.5 < time.monotonic() - written_at < 2.0


def test_interval_ops_reach_the_disk_with_a_flush(tmp_path: Path) -> None:
    """And with a stop; a crash before loses them, as the old bots did."""
    engine = opened(tmp_path, durability="interval")
    do(engine, put("1"))
    assert journaled(tmp_path) == []
    engine.flush("api")
    do(engine, put("2"))
    engine.close()

    with running(tmp_path) as engine:
        assert engine.count("sessions") == 2


def test_interval_ops_reach_the_disk_before_what_follows_them(tmp_path: Path) -> None:
    """The journal has no gaps: an op that waits takes those before it along."""
    with running(tmp_path, durability="interval") as engine:
        do(engine, put("1"))
        do(engine, put("2"))
        do(engine, put("3"), durability="always")

        assert journaled(tmp_path) == [1, 2, 3]


def test_an_interval_op_behind_one_that_waits_waits_too(tmp_path: Path, disk: Disk) -> None:
    """It rests on what may yet be undone, so it is told, and shown, only together with that."""
    with running(tmp_path) as engine:
        gate = disk.before_sync = Gate()
        first = engine.submit(put("1", n=1))
        assert gate.reached.wait(ANSWER_S)
        second = engine.submit(SessionPatch(id="1", value={"n": 2}), durability="interval")

        assert not is_done(second)
        assert engine.get("sessions", "1") is None
        gate.open.set()
        for ticket in (first, second):
            ticket.wait(ANSWER_S)
        assert value_of(engine, "sessions", "1")["n"] == 2


# One sync for all who wait.


def test_all_who_wait_share_one_sync(tmp_path: Path, disk: Disk) -> None:
    """What gathers while a batch is synced is the next batch, whole."""
    with running(tmp_path) as engine:
        gate = disk.before_sync = Gate()
        before = disk.syncs
        first = engine.submit(put("0"))
        assert gate.reached.wait(ANSWER_S)

        others = [engine.submit(put(str(n))) for n in range(1, 100)]
        gate.open.set()
        for ticket in [first, *others]:
            ticket.wait(ANSWER_S)

        assert disk.syncs - before == 2
        assert all(ticket.waits_with(others[0]) for ticket in others)


def test_threads_and_tasks_are_released_together(tmp_path: Path) -> None:
    """Waiting in a thread and awaiting in two loops end with the same batch."""
    with running(tmp_path) as engine:
        seen: list[int] = []

        def thread() -> None:
            seen.append(do(engine, put("a")).seq)

        def loop() -> None:
            async def many() -> None:
                tickets = [engine.submit(put(str(n))) for n in range(50)]
                await asyncio.wait_for(asyncio.gather(*(ticket.committed() for ticket in tickets)), ANSWER_S)
                seen.extend(ticket.seq for ticket in tickets)

            asyncio.run(many())

        threads = [threading.Thread(target=run) for run in (thread, loop, loop)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(ANSWER_S)

        assert sorted(seen) == list(range(1, 102))


def test_a_wait_may_be_given_up(tmp_path: Path, disk: Disk) -> None:
    """A timeout, or a cancelled task, leaves the op to become durable in its time."""
    with running(tmp_path) as engine:
        gate = disk.before_sync = Gate()
        ticket = engine.submit(put())
        with pytest.raises(Unavailable):
            ticket.wait(0.01)

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ticket.committed(), 0.01)

        asyncio.run(give_up())
        gate.open.set()
        ticket.wait(ANSWER_S)
        assert engine.count("sessions") == 1


# Nothing is told before it is durable.


def test_no_read_shows_what_is_not_durable(tmp_path: Path, disk: Disk) -> None:
    """Neither get, nor a page, nor the figures; a removed record is shown until its removal is durable."""
    with running(tmp_path) as engine:
        do(engine, put("old"))
        gate = disk.before_sync = Gate()
        tickets = [engine.submit(op) for op in (put("new"), SessionDelete(id="old"), StatsOrder())]
        assert gate.reached.wait(ANSWER_S)

        assert engine.get("sessions", "new") is None
        assert [item.id for item in engine.page("sessions").items] == ["old"]
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 0
        gate.open.set()
        for ticket in tickets:
            ticket.wait(ANSWER_S)
        assert [item.id for item in engine.page("sessions").items] == ["new"]
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 1


def test_a_refusal_waits_for_what_it_rests_on(tmp_path: Path, disk: Disk) -> None:
    """ "Exists already" is told when it is true for good; and not at all when it became untrue."""
    with running(tmp_path) as engine:
        gate = disk.before_sync = Gate()
        engine.submit(put("1"))
        assert gate.reached.wait(ANSWER_S)
        refused = engine.submit(SessionPut(id="1", value={}, if_version=0))

        assert not is_done(refused)
        gate.open.set()
        with pytest.raises(VersionMismatch):
            refused.wait(ANSWER_S)


def test_a_refusal_that_rested_on_an_undone_op_says_so(tmp_path: Path, disk: Disk) -> None:
    """The caller hears storage_full, not of a record that does not exist."""
    with running(tmp_path) as engine:
        gate = Gate()

        def fail() -> None:
            gate()
            disk.fill()
            disk.before_write()

        disk.before_write = fail
        engine.submit(put("1"))
        assert gate.reached.wait(ANSWER_S)
        refused = engine.submit(SessionPut(id="1", value={}, if_version=0))
        gate.open.set()

        with pytest.raises(StorageFull):
            refused.wait(ANSWER_S)


# A full disk.


def test_a_full_disk_undoes_and_writes_resume(tmp_path: Path, disk: Disk) -> None:
    """Every op of the batch, and what was decided on top of it, is refused; memory equals the disk; room is noticed."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        do(engine, put("1", n=1))
        disk.fill()
        for op in (put("2"), SessionPatch(id="1", value={"n": 2}), SessionDelete(id="1"), StatsOrder()):
            with pytest.raises(StorageFull):
                do(engine, op)
        assert value_of(engine, "sessions", "1")["n"] == 1
        assert engine.count("sessions") == 1
        assert any("full" in reason for reason in engine.degraded)

        disk.free()
        assert do(engine, put("2")).seq == 2
        assert engine.degraded == []
        assert [len(log.named(name)) for name in ("journal.disk_filled", "journal.writes_resumed")] == [1, 1]
    with running(tmp_path) as engine:
        assert engine.count("sessions") == 2
        assert engine.degraded == []


def test_what_was_acknowledged_outlives_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    """Interval ops before those that are undone stay, are not doubled, and are written when there is room."""
    with running(tmp_path) as engine:
        do(engine, put("1", n=1), durability="interval")
        disk.fill()
        for _ in range(3):
            with pytest.raises(StorageFull):
                do(engine, SessionPatch(id="1", value={"n": 9}))
        do(engine, SessionPatch(id="1", value={"n": 2}), durability="interval")
        do(engine, put("2"), durability="interval")
        with pytest.raises(StorageFull):
            do(engine, put("1", n=9))
        assert value_of(engine, "sessions", "1")["n"] == 2

        disk.free()
        do(engine, put("3"))
        assert journaled(tmp_path) == [1, 2, 3, 4]
        assert engine.status()["seq"] == 4
        assert not engine.flush_wanted()
    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "1")["n"] == 2
        assert engine.count("sessions") == 3


def test_interval_ops_have_a_limit(tmp_path: Path) -> None:
    """What waits in memory for a flush is bounded by journal_max."""
    with running(tmp_path, durability="interval", journal_max=1000) as engine:
        with pytest.raises(StorageFull):
            for n in range(100):
                do(engine, put(str(n)))
        assert engine.flush_wanted()
        engine.flush("size")
        do(engine, put("after"))


def test_a_refused_atomic_batch_does_not_hide_what_follows(tmp_path: Path, disk: Disk) -> None:
    """After it an op acknowledged at once is shown at once, and no full disk takes it back."""
    with running(tmp_path) as engine:
        do(engine, put("1", n=1))
        with pytest.raises(NotFound):
            do_together(engine, SessionPatch(id="1", value={"n": 5}), SessionDelete(id="absent"))
        do(engine, SessionPatch(id="1", value={"n": 2}), durability="interval")
        assert value_of(engine, "sessions", "1")["n"] == 2
        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, put("2"))

        assert value_of(engine, "sessions", "1")["n"] == 2
        disk.free()
        do(engine, put("2"))
    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "1")["n"] == 2


def test_a_full_disk_undoes_an_atomic_batch_whole(tmp_path: Path, disk: Disk) -> None:
    """Records, figures and collections of it are gone together."""
    with running(tmp_path) as engine:
        disk.fill()
        with pytest.raises(StorageFull):
            do_together(engine, put("1"), OrderPut(id="1", value={}), UserPut(id="1", value={}))

        assert [engine.count(name) for name in ("sessions", "orders", "users")] == [0, 0, 0]
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 0
        disk.free()
        do_together(engine, put("1"), OrderPut(id="1", value={}))
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 1


# A disk that refuses to sync.


def test_a_failed_sync_ends_all_writing(tmp_path: Path, disk: Disk) -> None:
    """Its op is not acknowledged, the owner is told once, everything after is refused, reads go on."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        told: list[Exception] = []
        broken = threading.Event()

        def tell(error: Exception) -> None:
            told.append(error)
            broken.set()

        engine.on_broken = tell
        disk.fail_sync()

        for _ in range(3):
            with pytest.raises(JournalBroken):
                do(engine, put("2"))
        assert broken.wait(ANSWER_S)

        assert len(told) == 1 and isinstance(told[0], JournalBroken)
        assert engine.get("sessions", "1") is not None
        assert engine.get("sessions", "2") is None
        with pytest.raises(JournalBroken):
            engine.flush("api")
        with pytest.raises(JournalBroken):
            engine.close()


def test_after_a_failed_sync_the_thread_rests(tmp_path: Path, disk: Disk) -> None:
    """It does not spin on the sync that everysec still owes."""

    class Counting(HandClock):
        asked = 0

        def monotonic(self) -> float:
            self.asked += 1
            return super().monotonic()

    clock = Counting()
    with running(tmp_path, clock=clock, durability="everysec") as engine:
        do(engine, put("1"))
        disk.fail_sync()
        clock.advance(5)
        with pytest.raises(JournalBroken):
            do(engine, put("2"), durability="always")
        time.sleep(0.05)
        before = clock.asked
        time.sleep(0.1)

        assert clock.asked - before < 10


def test_a_fault_of_ours_in_the_thread_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Whoever waits for a checkpoint, or for an op, hears of it, and nothing more is acknowledged."""

    def begin(seq: int) -> None:
        raise ZeroDivisionError

    with running(tmp_path) as engine:
        with pytest.raises(JournalBroken, match="ZeroDivisionError"):
            engine._committer.checkpoint(begin)

        with pytest.raises(JournalBroken):
            do(engine, put("1"))


# Stopping.


def test_a_stop_while_ops_are_written_waits_for_them(tmp_path: Path, disk: Disk) -> None:
    """Whatever was decided is on the disk when close returns."""
    engine = opened(tmp_path)
    gate = disk.before_sync = Gate()
    ticket = engine.submit(put("1"))
    assert gate.reached.wait(ANSWER_S)
    closing = threading.Thread(target=engine.close, kwargs={"flush": False})
    closing.start()
    gate.open.set()
    closing.join(ANSWER_S)

    assert not closing.is_alive()
    ticket.wait(0)
    assert journaled(tmp_path) == [1]


def test_a_flush_after_the_stop_is_refused(tmp_path: Path) -> None:
    """It neither hangs nor touches the directory."""
    engine: Engine = opened(tmp_path)
    engine.close()

    for attempt in (lambda: engine.flush("api"), lambda: engine.submit(put()), lambda: engine.page("sessions")):
        with pytest.raises(Unavailable):
            attempt()


# Writing in the thread of the caller.


def quick(engine: Engine) -> Engine:
    """*engine*, as if its disk had been quick of late."""
    engine._committer._usual_sync_s = 0.0
    return engine


@pytest.fixture
def writers(disk: Disk) -> list[str]:
    """The names of the threads that write to the journal, from now on."""
    found: list[str] = []
    disk.before_write = lambda: found.append(threading.current_thread().name)
    return found


def test_who_is_alone_writes_by_himself(tmp_path: Path, writers: list[str]) -> None:
    """Without the journal's thread, and durable all the same when the call returns."""
    with running(tmp_path) as engine:
        quick(engine)
        writers.clear()
        for ticket in (
            engine.submit(put("1"), at_once=True),
            engine.submit_batch(Batch(ops=[put("2"), StatsOrder()]), at_once=True),
            engine.submit_batch(Batch(ops=[put("3"), StatsOrder()], atomic=True), at_once=True),
        ):
            assert is_done(ticket)
        do(engine, put("4"))

        assert writers == [threading.current_thread().name] * 3 + ["holdfast-journal"]
        assert journaled(tmp_path) == [1, 2, 3, 4, 5]


def test_a_slow_disk_is_left_to_the_thread(tmp_path: Path, disk: Disk, writers: list[str]) -> None:
    """Until it has been quick for a while, and from the first slow sync on."""
    delays = [0.0]
    clock = HandClock()
    disk.before_sync = lambda: clock.advance(delays[0])
    with running(tmp_path, clock=clock) as engine:
        for _ in range(60):
            engine.submit(put(), at_once=True).wait()
        assert writers[0] == "holdfast-journal" and writers[-1] == threading.current_thread().name
        delays[0] = 0.05
        engine.submit(put(), at_once=True).wait()
        writers.clear()
        engine.submit(put(), at_once=True).wait()

        assert writers == ["holdfast-journal"]


def test_nobody_leads_while_others_write(tmp_path: Path, disk: Disk, writers: list[str]) -> None:
    """Whoever comes while the thread is at it waits for it, and shares the next sync."""
    gate = Gate()
    with running(tmp_path) as engine:
        quick(engine)
        disk.before_sync = gate
        first = engine.submit(put("1"))
        assert gate.reached.wait(ANSWER_S)
        others = [engine.submit(put(str(n)), at_once=True) for n in range(2, 5)]
        assert not any(map(is_done, others))
        gate.open.set()
        for ticket in (first, *others):
            ticket.wait(ANSWER_S)

        assert writers == ["holdfast-journal"] * 2


def test_who_comes_while_a_leader_writes_is_served(tmp_path: Path, disk: Disk, writers: list[str]) -> None:
    """By the thread, as soon as the leader is done."""
    gate = Gate()
    with running(tmp_path) as engine:
        quick(engine)
        disk.before_sync = gate
        leader = threading.Thread(target=lambda: engine.submit(put("1"), at_once=True), name="leader")
        leader.start()
        assert gate.reached.wait(ANSWER_S)
        second = engine.submit(put("2"))
        assert not is_done(second)
        gate.open.set()
        second.wait(ANSWER_S)
        leader.join(ANSWER_S)

        assert writers == ["leader", "holdfast-journal"]


def test_everysec_is_synced_also_when_a_leader_wrote(tmp_path: Path, disk: Disk) -> None:
    """The thread learns that there is something to sync."""
    with running(tmp_path, durability="everysec", clock=Clock()) as engine:
        quick(engine)
        before = disk.syncs
        engine.submit(put(), at_once=True).wait()
        ends_at = time.monotonic() + ANSWER_S
        while disk.syncs == before and time.monotonic() < ends_at:
            time.sleep(0.01)

        assert disk.syncs == before + 1


def test_a_leader_that_finds_the_disk_full_is_told(tmp_path: Path, disk: Disk) -> None:
    """As anybody else is, and writes resume."""
    with running(tmp_path) as engine:
        quick(engine)
        disk.fill()
        with pytest.raises(StorageFull):
            engine.submit(put(), at_once=True).wait()
        assert value_of(engine, "sessions", "1") is None
        disk.free()
        engine.submit(put(), at_once=True).wait()

        assert value_of(engine, "sessions", "1") is not None


def test_a_refused_op_leads_nobody(tmp_path: Path, writers: list[str]) -> None:
    """The next one is written as if nothing had been."""
    with running(tmp_path) as engine:
        quick(engine)
        with pytest.raises(NotFound):
            engine.submit(SessionDelete(id="absent"), at_once=True)
        do(engine, put("1"))
        assert is_done(engine.submit(put("2"), at_once=True))

        assert writers == ["holdfast-journal", threading.current_thread().name]


def test_a_leaders_failed_sync_ends_all_writing(tmp_path: Path, disk: Disk) -> None:
    """Before anybody is told anything."""
    with running(tmp_path) as engine:
        quick(engine)
        broken: list[Exception] = []
        engine.on_broken = broken.append
        disk.fail_sync()
        with pytest.raises(JournalBroken):
            engine.submit(put(), at_once=True).wait()
        with pytest.raises(JournalBroken):
            engine.submit(put(), at_once=True)

        assert len(broken) == 1


def test_leaders_flushes_and_threads_together(tmp_path: Path) -> None:
    """Whoever writes, everything acknowledged is there once, in order."""
    with running(tmp_path, clock=Clock()) as engine:
        stopping = threading.Event()

        def by_thread(name: str) -> None:
            for n in range(200):
                engine.submit(put(f"{name}-{n}")).wait(ANSWER_S)

        def flush() -> None:
            while not stopping.is_set():
                engine.flush("api")

        others = [threading.Thread(target=by_thread, args=(str(n),)) for n in range(3)]
        flusher = threading.Thread(target=flush)
        for thread in (*others, flusher):
            thread.start()
        for n in range(300):
            quick(engine)
            engine.submit(put(f"leader-{n}"), at_once=True).wait(ANSWER_S)
        for thread in others:
            thread.join(ANSWER_S)
        stopping.set()
        flusher.join(ANSWER_S)
    with running(tmp_path) as engine:
        assert engine.count("sessions") == 900
        assert engine.status()["seq"] == 900
