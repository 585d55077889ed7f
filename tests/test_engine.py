"""The engine: batches, restarts, expiry, lists, flushes, forks."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.clock import format_ms
from holdfast.core import retries
from holdfast.engine import EXPIRE_AT_ONCE, Engine
from holdfast.errors import (
    BadRequest,
    Conflict,
    ForkedProcess,
    HoldfastError,
    Leased,
    NotFound,
    StorageFull,
    TooLarge,
    VersionMismatch,
)
from holdfast.ops import (
    Answer,
    AnyOp,
    Batch,
    ConversationDelete,
    ConversationPut,
    FlushReport,
    MessageAppend,
    OrderComplete,
    OrderDelete,
    OrderPut,
    RecordPut,
    Retry,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionTouch,
    StatsOrder,
    UserPut,
)
from holdfast.pages import PAGE_LOOKS_AT_MOST
from tests.engine_harness import (
    ANSWER_S,
    NOW_MS,
    Disk,
    HandClock,
    Log,
    do,
    do_together,
    everything,
    opened,
    running,
    settings_of,
    value_of,
)

DAY_S = 86_400


def put(id: str = "1", **value: Any) -> SessionPut:
    return SessionPut(id=id, value=value)


# Batches.


def test_an_atomic_batch_is_one_event(tmp_path: Path) -> None:
    """Its ops see each other, share one seq, and stand in one line."""
    with running(tmp_path) as engine:
        answers = do_together(engine, put("1", n=1), SessionPatch(id="1", value={"m": 2}), OrderPut(id="7", value={}))

        assert [getattr(answer, "version", None) for answer in answers] == [1, 2, 1]
        assert {getattr(answer, "seq", None) for answer in answers} == {1}
        assert value_of(engine, "sessions", "1")["n"] == 1
        segment = next((tmp_path / "journal").iterdir()).read_bytes()
        assert segment.count(b"\n") == 1


def test_an_atomic_batch_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    """The refused op is named by its index; state, figures, seq and journal are as before."""
    with running(tmp_path) as engine:
        do(engine, put("1", n=1))
        before = everything(engine)
        ops: list[AnyOp] = [
            SessionPatch(id="1", value={"n": 2}),
            StatsOrder(product_type="ring"),
            RecordPut(collection="notes", id="1", value={}),
            SessionDelete(id="absent"),
        ]

        with pytest.raises(NotFound) as refused:
            engine.submit_batch(Batch(ops=ops, atomic=True))

        assert refused.value.index == 3
        assert everything(engine) == before
        assert do(engine, put("2")).seq == 2
        engine.flush("api")
        assert not (tmp_path / "notes.json").exists()


def test_a_batch_that_is_not_atomic_does_what_it_can(tmp_path: Path) -> None:
    """Refusals stand among the answers, in order."""
    with running(tmp_path) as engine:
        ticket = engine.submit_batch(Batch(ops=[put("1"), SessionDelete(id="absent"), put("2")]))
        ticket.wait(ANSWER_S)

        assert [type(outcome) for outcome in ticket.outcomes] == [Answer, NotFound, Answer]
        assert ticket.seq == 2


def test_a_batch_has_a_limit(tmp_path: Path) -> None:
    """At the limit it is done, above it refused whole."""
    with running(tmp_path, limits={"batch_ops": 3}) as engine:
        engine.submit_batch(Batch(ops=[put(str(n)) for n in range(3)])).wait(ANSWER_S)
        with pytest.raises(TooLarge):
            engine.submit_batch(Batch(ops=[put(str(n)) for n in range(4, 8)]))

        assert engine.count("sessions") == 3


def test_an_empty_batch_is_nothing(tmp_path: Path) -> None:
    """No event, no error."""
    with running(tmp_path) as engine:
        for atomic in (True, False):
            ticket = engine.submit_batch(Batch(ops=[], atomic=atomic))
            ticket.wait(ANSWER_S)
            assert (ticket.outcomes, ticket.seq) == ([], 0)


# What survives a restart beside records.


@pytest.mark.parametrize("flushed", [False, True])
def test_idempotency_keys_survive_restarts(tmp_path: Path, flushed: bool) -> None:
    """From the journal and from the snapshot; the answer is the first one to the letter, also inside a batch."""
    single = SessionPut(id="1", value={}, idempotency_key="one")
    inside: list[AnyOp] = [
        UserPut(id="1", value={}, idempotency_key="two"),
        SessionLease(id="9", idempotency_key="three"),
    ]
    engine = opened(tmp_path)
    first = [do(engine, single), *do_together(engine, *inside)]
    do(engine, SessionDelete(id="1"))
    engine.close(flush=flushed)

    with running(tmp_path) as engine:
        again = [do(engine, single), *do_together(engine, *inside)]

        assert again == first
        assert engine.get("sessions", "1") is None
        assert engine.status()["seq"] == 3


@pytest.mark.parametrize("flushed", [False, True])
def test_leases_survive_restarts(tmp_path: Path, flushed: bool) -> None:
    """A crash of ours frees nobody's session before its time."""
    clock = HandClock()
    engine = opened(tmp_path, clock=clock)
    do(engine, put("1"))
    generation = do(engine, SessionLease(id="1", ttl=60)).generation
    engine.close(flush=flushed)
    clock.advance(30)

    with running(tmp_path, clock=clock) as engine:
        with pytest.raises(Leased):
            do(engine, SessionTouch(id="1"))
        do(engine, SessionTouch(id="1", lease=generation))
        clock.advance(31)
        do(engine, SessionTouch(id="1"))


@pytest.mark.parametrize("flushed", [False, True])
def test_a_deleted_order_is_not_counted_again_after_a_restart(tmp_path: Path, flushed: bool) -> None:
    """Nor an order that an old bot completed."""
    (tmp_path / "completed_orders.json").write_text(
        '[{"odooOrderId": 5, "recipientPhone": "57", "status": "completed", "revenue": 10}]'
    )
    engine = opened(tmp_path)
    do(engine, OrderPut(id="1", value={}))
    do(engine, OrderComplete(id="1"))
    for id in ("1", "5"):
        do(engine, OrderDelete(id=id))
    engine.close(flush=flushed)

    with running(tmp_path) as engine:
        for id in ("1", "5"):
            do(engine, OrderPut(id=id, value={}))
            do(engine, OrderComplete(id=id))
        totals = orjson.loads(engine.sales())["totals"]
    assert (totals["allTimeOrders"], totals["allTimeCompleted"]) == (1, 1)


# Expiry.


def test_idle_sessions_expire_and_stay_away(tmp_path: Path) -> None:
    """Within a minute of their time, durably, and the touched ones stay."""
    clock, log = HandClock(), Log()
    with running(tmp_path, clock=clock, log=log) as engine:
        for id in ("idle", "touched"):
            do(engine, put(id))
        do(engine, SessionPut(id="short", value={}, ttl="90s"))
        clock.advance(100)
        assert engine.expire() == 0
        clock.advance(60)
        assert engine.expire() == 1
        clock.advance(DAY_S - 200)
        assert engine.expire() == 0
        do(engine, SessionTouch(id="touched"))
        clock.advance(120)
        assert engine.expire() == 1

        assert [item.id for item in engine.page("sessions").items] == ["touched"]
        assert log.named("sessions.expired") == [{"count": 1}, {"count": 1}]
        clock.advance(DAY_S)
        assert engine.expire() == 1
    with running(tmp_path, clock=clock) as engine:
        assert engine.count("sessions") == 0


def test_expiry_looks_at_nobody_who_is_not_due(tmp_path: Path) -> None:
    """Looking is what costs; with nobody due it costs nothing, however many there are."""
    clock = HandClock()
    with running(tmp_path, clock=clock, durability="interval") as engine:
        for n in range(2_000):
            do(engine, put(str(n)))
        wheel = engine._state.session_wheel
        before = len(wheel)
        clock.advance(3600)

        assert engine.expire() == 0
        assert len(wheel) == before
        assert not [minute for minute in wheel._buckets if minute <= clock.now_ms() // 60_000]


def test_many_expire_in_portions(tmp_path: Path) -> None:
    """No event holds more than its share."""
    clock = HandClock()
    with running(tmp_path, clock=clock, durability="interval") as engine:
        for n in range(2 * EXPIRE_AT_ONCE + 500):
            do(engine, put(str(n)))
        seq = engine.status()["seq"]
        clock.advance(DAY_S + 60)

        assert engine.expire() == 2 * EXPIRE_AT_ONCE + 500
        assert engine.status()["seq"] == seq + 3
        assert engine.count("sessions") == 0


def test_sessions_undone_by_a_full_disk_expire_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back, and go when there is room."""
    disk = Disk(monkeypatch)
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        do(engine, put("1"))
        clock.advance(DAY_S + 60)
        disk.fill()
        engine.expire()
        assert engine.count("sessions") == 1
        disk.free()
        clock.advance(60)

        assert engine.expire() == 1


def test_a_jump_of_the_clock_expires_nobody(tmp_path: Path) -> None:
    """The monotonic clock did not confirm it; told once."""
    clock, log = HandClock(), Log()
    with running(tmp_path, clock=clock, log=log) as engine:
        do(engine, put("1"))
        clock.jump(10 * 365 * DAY_S)
        for _ in range(3):
            clock.advance(10)
            assert engine.expire() == 0

        assert len(log.named("clock.jumped")) == 1


def test_old_keys_and_leases_are_forgotten(tmp_path: Path) -> None:
    """All whose time has come, however many there are."""
    clock = HandClock()
    count = 2 * EXPIRE_AT_ONCE + 10
    with running(tmp_path, clock=clock, durability="interval") as engine:
        for n in range(count):
            do(engine, SessionLease(id=str(n), ttl=30, idempotency_key=f"key-{n}"))
        clock.advance(120)
        engine.expire()
        assert (engine.status()["leases"], engine.status()["idempotency_keys"]) == (0, count)
        clock.advance(DAY_S)
        engine.expire()

        assert engine.status()["idempotency_keys"] == 0


def test_a_shorter_ttl_counts_at_once(tmp_path: Path) -> None:
    """After a reload the sessions that are too old by the new setting go with the next expiry."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        do(engine, put("1"))
        clock.advance(3600)
        do(engine, put("2"))
        engine.reconfigure(settings_of(tmp_path, sessions={"ttl": 1800.0}))

        assert engine.expire() == 1
        assert engine.get("sessions", "2") is not None


# Lists.


def listed(engine: Engine, collection: str, **options: Any) -> list[str]:
    """All ids of a list, page by page."""
    ids: list[str] = []
    cursor = None
    while True:
        page = engine.page(collection, cursor=cursor, **options)
        ids += [item.id for item in page.items]
        if page.next is None:
            return ids
        cursor = page.next


@pytest.mark.parametrize("limit", [1, 2, 7, 100, 1000])
def test_pages_show_every_record_once(tmp_path: Path, limit: int) -> None:
    """In a stable order, whatever the limit; orders with the closed ones."""
    with running(tmp_path, durability="interval") as engine:
        for n in range(60):
            do(engine, put(f"id-{n}"))
            do(engine, OrderPut(id=str(n), value={}))
            if n % 3 == 0:
                do(engine, OrderComplete(id=str(n)))

        for name, expected in (("sessions", {f"id-{n}" for n in range(60)}), ("orders", {str(n) for n in range(60)})):
            found = listed(engine, name, limit=limit)
            assert len(found) == 60 and set(found) == expected
            assert found == listed(engine, name, limit=1000)


def test_a_list_goes_on_where_it_stood_when_records_come_and_go(tmp_path: Path) -> None:
    """Whoever is there throughout is seen exactly once."""
    with running(tmp_path, durability="interval") as engine:
        for n in range(100):
            do(engine, put(f"stays-{n}"))
            do(engine, put(f"goes-{n}"))
        seen: list[str] = []
        cursor = None
        for n in range(1000):
            page = engine.page("sessions", limit=7, cursor=cursor)
            seen += [item.id for item in page.items]
            if page.next is None:
                break
            cursor = page.next
            if n < 100:
                do(engine, SessionDelete(id=f"goes-{n}"))
                do(engine, put(f"comes-{n}"))

        assert sorted(id for id in seen if id.startswith("stays")) == sorted(f"stays-{n}" for n in range(100))
        assert len(seen) == len(set(seen))


def test_filters_choose_by_state_and_time(tmp_path: Path) -> None:
    """currentState of sessions, status of orders, activity or change since a moment."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        do(engine, put("old", currentState="catalog"))
        do(engine, OrderPut(id="1", value={"status": "pending"}))
        do(engine, UserPut(id="u1", value={}))
        clock.advance(60)
        do(engine, put("new", currentState="catalog", note='"currentState":"paid"'))
        do(engine, put("paid", currentState="paid"))
        do(engine, OrderPut(id="2", value={"status": "pending"}))
        do(engine, OrderComplete(id="2"))
        do(engine, UserPut(id="u2", value={}))
        since = NOW_MS + 60_000

        assert listed(engine, "sessions", state="paid") == ["paid"]
        assert sorted(listed(engine, "sessions", since_ms=since)) == ["new", "paid"]
        assert listed(engine, "sessions", since_ms=since, state="catalog") == ["new"]
        assert listed(engine, "orders", state="completed") == ["2"]
        assert listed(engine, "users", since_ms=since) == ["u2"]
        with pytest.raises(BadRequest):
            engine.page("users", state="x")


def test_a_filtered_page_looks_at_a_limited_number(tmp_path: Path) -> None:
    """It may be empty and still name a next one."""
    with running(tmp_path, durability="interval") as engine:
        ops: list[AnyOp] = [put(str(n), currentState="a") for n in range(PAGE_LOOKS_AT_MOST + 10)]
        engine.submit_batch(Batch(ops=ops)).wait(ANSWER_S)

        page = engine.page("sessions", state="b")

        assert page.items == []
        assert page.next is not None
        assert engine.page("sessions", state="b", cursor=page.next).next is None


@pytest.mark.parametrize(
    "cursor", ["", "x", "ñ", "AAAA", "WyJvcmRlcnMiLDAsIiJd", "WyJzZXNzaW9ucyIsOTk5LCIiXQ", "bnVsbA"]
)
def test_a_cursor_of_elsewhere_is_refused(tmp_path: Path, cursor: str) -> None:
    """Of another list, of nowhere, or no cursor at all."""
    with running(tmp_path) as engine, pytest.raises(BadRequest):
        engine.page("sessions", cursor=cursor)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_of_nothing_is_refused(tmp_path: Path, limit: int) -> None:
    """It would never end."""
    with running(tmp_path) as engine, pytest.raises(BadRequest):
        engine.page("sessions", limit=limit)


def test_an_unknown_collection_is_empty(tmp_path: Path) -> None:
    """It may come into being any time."""
    with running(tmp_path) as engine:
        assert engine.page("notes").items == []
        assert engine.get("notes", "1") is None
        assert engine.count("notes") == 0
        assert engine.collection_names() == []


# Flushing.


def test_only_changed_files_are_rewritten(tmp_path: Path) -> None:
    """And the manifest with its seq; the journal before it goes."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        do(engine, UserPut(id="1", value={}))
        engine.flush("api")
        before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.json")}
        do(engine, put("2"))

        report = engine.flush("api")

        changed = {path.name for path in tmp_path.glob("*.json") if path.stat().st_ino != before.get(path.name)}
        assert changed == {"chat_sessions.json", "manifest.json"}
        assert (report.files, report.snapshot_seq, report.reason) == (1, 3, "api")
        assert [path.name for path in (tmp_path / "journal").glob("*.jsonl")] == ["00000000000000000004.jsonl"]


def test_a_flush_without_changes_writes_no_snapshot(tmp_path: Path) -> None:
    """Time passing is no change."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        engine.flush("api")

        assert engine.flush("interval").files == 0


def test_two_triggers_at_once_make_one_running_and_one_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty more share the waiting one; each sees what was there when it asked."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        do(engine, put("1"))
        directory = engine._flusher._directory
        reached, go_on = threading.Event(), threading.Event()
        stage = directory.stage

        def slow(*arguments: Any) -> Any:
            reached.set()
            assert go_on.wait(ANSWER_S)
            return stage(*arguments)

        monkeypatch.setattr(directory, "stage", slow)
        reports: list[FlushReport] = []
        threads = [threading.Thread(target=lambda: reports.append(engine.flush("signal"))) for _ in range(21)]
        threads[0].start()
        assert reached.wait(ANSWER_S)
        do(engine, put("2"))
        for thread in threads[1:]:
            thread.start()
        time.sleep(0.05)
        go_on.set()
        for thread in threads:
            thread.join(ANSWER_S)

        assert len(log.named("flush.completed")) == 2
        assert sorted(report.snapshot_seq for report in reports) == [1] + 20 * [2]


def test_ops_go_on_while_a_flush_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are of one seq, without what came later."""
    with running(tmp_path) as engine:
        for n in range(50):
            do(engine, put(str(n), n=1))
        directory = engine._flusher._directory
        stage = directory.stage

        def busy(*arguments: Any) -> Any:
            for n in range(50, 60):
                do(engine, put(str(n)))
                do(engine, SessionPatch(id=str(n - 50), value={"n": 2}))
                do(engine, SessionDelete(id=str(n - 20)))
            monkeypatch.setattr(directory, "stage", stage)
            return stage(*arguments)

        monkeypatch.setattr(directory, "stage", busy)
        report = engine.flush("api")

        records = orjson.loads((tmp_path / "chat_sessions.json").read_bytes())
        assert report.snapshot_seq == 50
        assert len(records) == 50 and {record["n"] for record in records} == {1}
        before = everything(engine)
    with running(tmp_path) as engine:
        assert everything(engine) == before


def test_an_interrupted_wait_for_a_flush_blocks_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ctrl-C while waiting for the running flush leaves nobody waiting for ever."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with running(tmp_path) as engine:

            def flush_meanwhile(*_: object) -> None:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    engine.flush("api")

            engine.hold_snapshots(flush_meanwhile)
            later = threading.Thread(target=engine.flush, args=("api",), daemon=True)
            later.start()
            later.join(ANSWER_S)
            assert not later.is_alive()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_failed_flush_is_told_and_keeps_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old snapshot stands, nothing is pruned, degraded until one succeeds."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        do(engine, put("1"))
        engine.flush("api")
        do(engine, put("2"))
        old = (tmp_path / "chat_sessions.json").read_bytes()
        rename = os.rename
        monkeypatch.setattr(os, "rename", _fails)
        with pytest.raises(OSError):
            engine.flush("api")
        assert engine.degraded and log.named("flush.failed")
        assert (tmp_path / "chat_sessions.json").read_bytes() == old
        assert not list(tmp_path.glob(".*.tmp"))
        monkeypatch.setattr(os, "rename", rename)

        engine.flush("api")

        assert engine.degraded == []
        assert b'"2"' in (tmp_path / "chat_sessions.json").read_bytes()


def _fails(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_followers_keep_the_journal_they_need(tmp_path: Path) -> None:
    """Nothing is removed beyond the slowest watermark, though the journal itself holds only what no snapshot has."""
    kept = tmp_path / "journal" / "kept"
    with running(tmp_path, journal_keep=0) as engine:
        watermark = 0
        engine.follow("archive", lambda: watermark)
        for n in range(3):
            do(engine, put(str(n)))
            engine.flush("api")
        assert engine.status()["journal_segments"] == 1
        assert sorted(path.name for path in kept.iterdir()) == [f"{first:020d}.jsonl" for first in (1, 2, 3)]

        watermark = 2
        engine.flush("api")
        assert sorted(path.name for path in kept.iterdir()) == [f"{3:020d}.jsonl"]

        engine.unfollow("archive")
        engine.flush("api")
        assert not list(kept.iterdir())


def test_history_is_kept_up_to_journal_keep(tmp_path: Path) -> None:
    """So many bytes stay behind the snapshots; neither the size of the journal nor the next flush counts them."""
    kept = tmp_path / "journal" / "kept"
    log = Log()
    with running(tmp_path, log=log, journal_keep=100_000, journal_max=65_536) as engine:
        for n in range(8):
            do(engine, put(str(n), text="x" * 30_000))
            engine.flush("api")

            assert sum(path.stat().st_size for path in kept.iterdir()) // 30_000 == min(n + 1, 3)
            assert engine.status()["journal_bytes"] == 0
            assert not engine.flush_wanted()
        assert sorted(path.name for path in kept.iterdir()) == [f"{first:020d}.jsonl" for first in (6, 7, 8)]

        engine.reconfigure(settings_of(tmp_path, journal_keep=0))
        engine.flush("api")

        assert not list(kept.iterdir())
    assert not log.named("journal.keep_failed")


def test_a_disk_short_of_room_keeps_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only readers want goes before a flush writes anything, and as soon as a write finds no room."""
    kept = tmp_path / "journal" / "kept"
    disk = Disk(monkeypatch)
    room = 10_000_000
    monkeypatch.setattr("holdfast.disk.files.Directory.space", lambda _: (room, 100_000_000))
    with running(tmp_path, journal_keep=1_000_000) as engine:
        do(engine, put("1"))
        engine.flush("api")
        assert list(kept.iterdir())

        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, put("2"))
        ends_at = time.monotonic() + ANSWER_S
        while list(kept.iterdir()):  # callers are told first
            assert time.monotonic() < ends_at

        disk.free()
        do(engine, put("2"))
        engine.flush("api")
        assert list(kept.iterdir())

        room = 3_999_999
        do(engine, put("3"))
        engine.flush("api")
        assert not list(kept.iterdir())


def test_a_flush_does_not_fail_for_want_of_room_for_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an inode for the directory it gives the history up, as it would without bytes."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        do(engine, put("1"))
        mkdir = os.mkdir

        def no_inodes(path: Any, *arguments: Any, **named: Any) -> None:
            if path == "kept":
                raise OSError(28, "No space left on device")
            mkdir(path, *arguments, **named)

        monkeypatch.setattr(os, "mkdir", no_inodes)
        engine.flush("api")

        assert engine.degraded == []
        assert [path.name for path in (tmp_path / "journal").iterdir()] == [f"{2:020d}.jsonl"]
    assert log.named("journal.keep_failed")


def test_a_start_does_not_look_at_kept_history(tmp_path: Path) -> None:
    """Whatever became of it: the data is whole, seqs go on."""
    log = Log()
    with running(tmp_path) as engine:
        do(engine, put("1"))
        engine.flush("api")
        do(engine, put("2"))
    kept = tmp_path / "journal" / "kept" / f"{1:020d}.jsonl"
    kept.write_bytes(b"garbage\n" + kept.read_bytes()[:20])

    with running(tmp_path, log=log, recovery="strict") as engine:
        assert engine.degraded == []
        assert do(engine, put("3")).seq == 3
        assert sorted(everything(engine)["sessions"]) == ["1", "2", "3"]
    assert log.named("state.loaded")[0]["replayed"] == 1
    assert not log.named("journal.damaged")


def test_a_snapshot_keeps_the_fractions_of_money(tmp_path: Path) -> None:
    """0.1 and 0.2 make 0.3 in the file as well."""
    with running(tmp_path) as engine:
        for id, revenue in (("1", "0.1"), ("2", "0.2")):
            do(engine, OrderPut(id=id, value={}))
            do(engine, OrderComplete(id=id, revenue=Decimal(revenue)))
        engine.flush("api")

    assert b'"allTimeRevenue": 0.3\n' in (tmp_path / "sales_stats.json").read_bytes().replace(b",", b"\n")


# Threads and forks.


def test_threads_at_once_lose_nothing(tmp_path: Path) -> None:
    """Every version exists exactly once, whoever wins."""
    with running(tmp_path) as engine:
        do(engine, put("1", n=0))
        done: list[int] = []

        def increment() -> None:
            for _ in range(30):
                while True:
                    found = engine.get("sessions", "1")
                    assert found is not None
                    n = orjson.loads(found.value)["n"]
                    try:
                        answer = do(engine, SessionPatch(id="1", value={"n": n + 1}, if_version=found.version))
                    except VersionMismatch:
                        continue
                    done.append(answer.version)
                    break

        threads = [threading.Thread(target=increment) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S)

        assert sorted(done) == list(range(2, 122))
        assert value_of(engine, "sessions", "1")["n"] == 120


def in_child(check: Any) -> int:
    """The exit code of a forked child that runs *check*; 99 when it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(ANSWER_S))
            check()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("is_held", [False, True])
def test_a_forked_child_is_refused(tmp_path: Path, is_held: bool) -> None:
    """With an error for every use, also when a thread of the parent held the lock; the parent goes on, still locked."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        do(engine, MessageAppend(id="c", role="user", content="Hola", external_id="1"))

        def use() -> None:
            attempts: list[Any] = [
                lambda: engine.submit(put("2")),
                lambda: engine.submit_batch(Batch(ops=[put("2")])),
                lambda: engine.get("sessions", "1"),
                lambda: engine.page("sessions"),
                lambda: engine.sales(),
                lambda: engine.flush("api"),
                lambda: engine.submit(MessageAppend(id="c", role="user", content="Hola", external_id="1")),
                lambda: engine.transcripts.conversation("c"),
                lambda: engine.transcripts.messages("c"),
                lambda: engine.transcripts.page(),
                lambda: engine.transcripts.escalations(),
                lambda: engine.transcripts.storage(),
            ]
            for attempt in attempts:
                try:
                    attempt()
                except ForkedProcess:
                    continue
                os._exit(2)
            engine.close()
            try:
                opened(tmp_path)
            except HoldfastError as error:
                assert error.code == "directory_locked"
            else:
                os._exit(3)

        assert engine._follower is not None
        with ExitStack() as held:
            if is_held:
                held.enter_context(engine._lock)
                held.enter_context(engine._follower._changed)
            code = in_child(use)

        assert code == 0
        do(engine, put("3"))
        assert engine.count("sessions") == 2


def test_status_is_json(tmp_path: Path) -> None:
    """For the command line and monitors, at any time."""
    with running(tmp_path) as engine:
        do(engine, put("1"))
        do(engine, RecordPut(collection="notes", id="1", value={}))
        engine.flush("api")

        status = orjson.loads(orjson.dumps(engine.status()))

        assert (status["sessions"], status["collections"], status["seq"]) == (1, {"notes": 1}, 2)
        assert status["durable_seq"] == status["snapshot_seq"] == 2
        assert status["last_flush"]["at"] == format_ms(NOW_MS)


def test_a_full_last_page_has_no_next(tmp_path: Path) -> None:
    """Whoever asks for as many as there are is told that there are no more, without another empty page."""
    with running(tmp_path) as engine:
        for number in range(3):
            engine.submit(put(str(number))).wait()

        whole = engine.page("sessions", limit=3)
        first = engine.page("sessions", limit=2)
        second = engine.page("sessions", limit=2, cursor=first.next)

    assert (len(whole.items), whole.next) == (3, None)
    assert (len(first.items), len(second.items), second.next) == (2, 1, None)


RETRY = Retry("client-1", 1)


@pytest.mark.parametrize("flushed", [False, True])
def test_a_repeated_request_gets_its_first_answers(tmp_path: Path, flushed: bool) -> None:
    """Op by op, also after a restart; what was refused the first time is decided anew."""
    batch = Batch(ops=[SessionPut(id="1", value={}), SessionDelete(id="absent"), StatsOrder(), SessionLease(id="1")])
    with running(tmp_path) as engine:
        first = engine.submit_batch(batch, retry=RETRY)
        first.wait()
        again = engine.submit_batch(batch, retry=RETRY)
        again.wait()
        assert again.outcomes[0] == first.outcomes[0] and again.outcomes[2:] == first.outcomes[2:]
        if flushed:
            engine.flush("api")
    with running(tmp_path) as engine:
        later = engine.submit_batch(batch, retry=RETRY)
        later.wait()
        assert later.outcomes[0] == first.outcomes[0] and later.outcomes[2:] == first.outcomes[2:]
        assert isinstance(later.outcomes[1], NotFound)
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 1
        engine.submit_batch(batch, retry=Retry("client-1", 2)).wait()
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 2
        late = engine.submit_batch(batch, retry=RETRY).outcomes[2]
        assert isinstance(late, Conflict) and "older than its last one" in str(late)


def test_a_repeated_atomic_batch_gets_its_first_answers(tmp_path: Path) -> None:
    """As a whole, over a restart."""
    batch = Batch(ops=[StatsOrder(), SessionPut(id="1", value={}, if_version=0)], atomic=True)
    with running(tmp_path) as engine:
        first = engine.submit_batch(batch, retry=RETRY)
        first.wait()
    with running(tmp_path) as engine:
        again = engine.submit_batch(batch, retry=RETRY)
        again.wait()

        assert again.outcomes == first.outcomes


def test_a_number_is_one_request(tmp_path: Path) -> None:
    """A client that numbers two requests alike is told, not given the answer of another op."""
    with running(tmp_path) as engine:
        engine.submit(SessionPut(id="1", value={}), retry=RETRY).wait()

        for other in (SessionPut(id="2", value={}), SessionTouch(id="1")):
            with pytest.raises(Conflict, match="was another op"):
                engine.submit(other, retry=RETRY).wait()
        # Its own key says what it is, and goes before the number.
        engine.submit(SessionPut(id="2", value={}, idempotency_key="k"), retry=RETRY).wait()


def test_what_the_disk_refused_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try of a request that found the disk full is its first."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        disk.fill()
        with pytest.raises(StorageFull):
            engine.submit(StatsOrder(), retry=RETRY).wait()
        disk.free()
        engine.submit(StatsOrder(), retry=RETRY).wait()

        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 1


def test_retries_of_an_earlier_version_are_taken() -> None:
    """Their lines have no numbers of messages."""
    line = b'{"id":"client-1","number":1,"at":0,"ops":[[0,"session.put","a",2,9,null,null]],"_holdfast":{"v":1}}'
    known = retries.Retries()

    known.load([line], 9)

    assert known.find("client-1", 0, 1, "session.put", "a") == retries.Noted("session.put", "a", 2, 9, None, None)


def test_retries_are_forgotten(tmp_path: Path) -> None:
    """Of each client one request is remembered, for an hour."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        for number in range(1, 50):
            ops: list[AnyOp] = [StatsOrder()] * 3
            engine.submit_batch(Batch(ops=ops), retry=Retry("client-1", number)).wait()
        engine.submit(StatsOrder(), retry=Retry("client-2", 1)).wait()
        assert len(engine._state.retries) == 2
        for passed_s, count in ((3500, 2), (200, 0)):
            clock.advance(passed_s)
            engine.expire()
            assert len(engine._state.retries) == count


def test_the_clients_remembered_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that changed something last are kept, over a restart as well."""
    monkeypatch.setattr(retries, "CLIENTS_MAX", 10)
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        for turn in range(3):
            for n in range(12):
                clock.advance(1)
                engine.submit(StatsOrder(), retry=Retry(f"client-{n}", turn)).wait()
        engine.flush("api")
        assert (tmp_path / "_retries.json").read_bytes().count(b'"id"') == 10
    with running(tmp_path) as engine:
        assert engine._state.retries.clients() == [f"client-{n}" for n in range(2, 12)]


def test_what_is_put_in_place_of_a_conversation_goes_on_with_its_versions(tmp_path: Path) -> None:
    """Else who knows one of them would be given what somebody else has made of it since; also after a crash."""
    engine = opened(tmp_path)
    for text in ("a", "b", "c"):
        do(engine, MessageAppend(id="c", role="user", content=text))
    replacing = (
        ConversationDelete(id="c"),
        ConversationPut(id="c", value={}),
        MessageAppend(id="c", role="user", content="d"),
    )
    versions = [answer.version for answer in do_together(engine, *replacing) if isinstance(answer, Answer)][1:]
    engine.close(flush=False)

    with running(tmp_path) as engine:
        found = engine.get("conversations", "c")
        assert found is not None
        assert (versions, found.version, orjson.loads(found.value)["last_number"]) == ([4, 5], 5, 1)
        with pytest.raises(VersionMismatch):
            do(engine, MessageAppend(id="c", role="user", content="e", if_version=3))
