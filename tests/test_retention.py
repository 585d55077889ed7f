"""Conversations go in time: archived, emptied or removed when they are old, unless somebody holds them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.care import retention
from holdfast.care.retention import Cleanup, CleanupReport
from holdfast.clock import format_ms
from holdfast.engine import Engine
from holdfast.errors import InvalidRecord, StorageFull
from holdfast.ops import ConversationHold, Message, MessageAppend, PersonHold, SessionPut
from tests.engine_harness import ANSWER_S, NOW_MS, Disk, HandClock, Log, do, running, value_of

DAY_MS = 86_400_000


def talk(engine: Engine, id: str, *days_old: float, role: Any = "user", **fields: Any) -> None:
    """A conversation with a message of each of these ages."""
    messages = [
        Message(
            role=role, content=f"{days} days old", tokens_used=10, created_at=format_ms(NOW_MS - round(days * DAY_MS))
        )
        for days in days_old
    ]
    do(engine, MessageAppend(id=id, messages=messages, **fields))


def old_shop(engine: Engine) -> None:
    """One conversation of each age."""
    talk(engine, "new", 1)
    talk(engine, "mixed", 400, 380, 5)
    talk(engine, "idle", 100, 91)
    talk(engine, "ancient", 500, 450)
    talk(engine, "ancient-system", 500, role="system")


def archived(engine: Engine) -> set[str]:
    return {item.id for item in engine.transcripts.page(archived=True).items}


def left(engine: Engine, id: str) -> list[str]:
    return [orjson.loads(item.value)["content"] for item in engine.transcripts.messages(id).items]


def agrees(engine: Engine) -> None:
    """Heads and archive count the same."""
    total = 0
    for item in engine.transcripts.page(limit=1000).items:
        head = value_of(engine, "conversations", item.id)
        messages = [orjson.loads(one.value) for one in engine.transcripts.messages(item.id, limit=1000).items]
        assert head["message_count"] + head["system_count"] == len(messages)
        assert head["tokens_used"] == sum(one["tokens_used"] or 0 for one in messages)
        total += len(messages)
    assert engine.transcripts.figures().messages == total


def test_the_daily_run_follows_the_settings(tmp_path: Path) -> None:
    """Idle ones are archived, old messages deleted wherever they stand; the report and the log say how much."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        old_shop(engine)

        report = retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")

        assert archived(engine) == {"idle", "ancient", "ancient-system"}
        assert left(engine, "mixed") == ["5 days old"]
        assert left(engine, "ancient") == left(engine, "ancient-system") == []
        assert left(engine, "idle") == ["100 days old", "91 days old"]
        assert (report.archived, report.conversations, report.messages_deleted, report.remaining) == (3, 3, 5, 0)
        assert report.bytes_freed == 5 * len("400 days old")
        assert value_of(engine, "conversations", "mixed")["title"] == "400 days old"
        agrees(engine)
    told = log.named("retention.completed")[0]
    assert (told["reason"], told["archived"], told["messages_deleted"], told["bytes_freed"]) == ("daily", 3, 5, 60)


def test_what_went_stays_gone_after_a_restart(tmp_path: Path) -> None:
    """Also when the archive is made anew from the journal, which still has the messages."""
    with running(tmp_path) as engine:
        old_shop(engine)
        retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")
    for _ in range(2):
        with running(tmp_path) as engine:
            assert left(engine, "mixed") == ["5 days old"]
            agrees(engine)
        (tmp_path / "archive.db").unlink()


def test_cleanup_by_days(tmp_path: Path) -> None:
    """Messages go with the conversations that are idle for so long, and not out of others."""
    with running(tmp_path) as engine:
        old_shop(engine)

        report = retention.clean(engine, retention.older_than(90, engine.now_ms(), delete_messages=True), reason="api")

        assert archived(engine) == {"idle", "ancient", "ancient-system"}
        assert left(engine, "mixed") == ["400 days old", "380 days old", "5 days old"]
        assert left(engine, "idle") == []
        assert report.messages_deleted == 5
        agrees(engine)


def test_a_dry_run_tells_what_would_go(tmp_path: Path) -> None:
    """And changes nothing, not even the log."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        old_shop(engine)
        seq = engine.status()["seq"]

        wanted = retention.older_than(90, engine.now_ms(), delete_messages=True, is_dry_run=True)
        report = retention.clean(engine, wanted, reason="api")

        assert (report.archived, report.messages_deleted, report.remaining) == (3, 5, 0)
        assert engine.status()["seq"] == seq
    assert not log.named("retention.completed")


def test_a_limit_makes_it_go_by_steps(tmp_path: Path) -> None:
    """Which together do the same as one run without."""
    with running(tmp_path) as engine:
        for number in range(25):
            talk(engine, f"c{number}", 100)
        talk(engine, "held", 100)
        do(engine, ConversationHold(id="held"))
        total = CleanupReport()
        steps = 0

        while True:
            wanted = retention.older_than(90, engine.now_ms(), delete_messages=True, limit=7)
            report = retention.clean(engine, wanted, reason="api")
            total.archived += report.archived
            total.messages_deleted += report.messages_deleted
            steps += 1
            if not report.remaining:
                break
            assert report.archived + report.conversations == 7

        assert (total.archived, total.messages_deleted, report.held, steps) == (26, 25, 1, 8)
        agrees(engine)


@pytest.mark.parametrize("hold", [ConversationHold(id="ancient"), PersonHold(id="573001"), PersonHold(id="ancient")])
def test_a_hold_keeps_messages(tmp_path: Path, hold: Any) -> None:
    """Of the conversation or of everything of a person; it may be archived all the same, and it is counted."""
    with running(tmp_path) as engine:
        talk(engine, "ancient", 500, user_id="573001")
        talk(engine, "other", 500, user_id="573002")
        do(engine, hold)

        report = retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")
        removal = retention.remove_idle(engine, 24, engine.now_ms())

        assert (report.archived, report.messages_deleted, report.held) == (2, 1, 1)
        assert (removal.deleted, removal.errors, removal.held) == (1, 0, 1)
        assert left(engine, "ancient") == ["500 days old"]


def test_idle_conversations_are_removed(tmp_path: Path) -> None:
    """The old kind of cleaning: what was not updated for so many hours is gone whole."""
    with running(tmp_path) as engine:
        talk(engine, "a", 2)
        talk(engine, "b", 1.1)
        talk(engine, "c", 0.9)

        limited = retention.remove_idle(engine, 24, engine.now_ms(), limit=1)
        rest = retention.remove_idle(engine, 24, engine.now_ms(), limit=1)

        assert (limited.deleted, limited.remaining) == (1, 1)
        assert (rest.deleted, rest.remaining) == (1, 0)
        assert [item.id for item in engine.transcripts.page().items] == ["c"]


def test_each_removal_of_idle_conversations_is_logged(tmp_path: Path) -> None:
    """Also one that the limit ended."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        for id in "abc":
            talk(engine, id, 2)

        for _ in range(2):
            retention.remove_idle(engine, 24, engine.now_ms(), limit=2)

    assert [fields["deleted"] for fields in log.named("retention.idle_removed")] == [2, 1]


def test_idle_conversations_are_removed_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sync serves many; what is held or cannot be removed keeps the others from nothing."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        for number in range(200):
            talk(engine, f"{number:03}", 2)
        do(engine, ConversationHold(id="100"))
        do(engine, PersonHold(id="150"))
        syncs = disk.syncs

        removal = retention.remove_idle(engine, 24, engine.now_ms())

        assert (removal.deleted, removal.errors, removal.held, removal.remaining) == (198, 0, 2, 0)
        assert {item.id for item in engine.transcripts.page().items} == {"100", "150"}
        assert disk.syncs - syncs < 50
        agrees(engine)


def test_idle_conversations_that_cannot_be_removed_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes none away, and the next time they go."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        for id in "abc":
            talk(engine, id, 2)
        disk.fill()
        refused = retention.remove_idle(engine, 24, engine.now_ms())
        disk.free()

        removed = retention.remove_idle(engine, 24, engine.now_ms())

        assert (refused.deleted, refused.errors) == (0, 3)
        assert (removed.deleted, removed.errors) == (3, 0)


@pytest.mark.parametrize("days", [-1, -0.001, 36_501, float("nan"), float("inf")])
def test_days_that_have_no_meaning_are_refused(tmp_path: Path, days: float) -> None:
    """Before anything is looked at."""
    with pytest.raises(InvalidRecord, match="days must be from 0"):
        retention.older_than(days, NOW_MS)
    with running(tmp_path) as engine, pytest.raises(InvalidRecord, match="hours must be from 0"):
        retention.remove_idle(engine, days * 24, NOW_MS)


def test_who_writes_meanwhile_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message between the look and the deed keeps the conversation, and all the counts right."""
    with running(tmp_path) as engine:
        talk(engine, "a", 500)
        talk(engine, "b", 500)
        submit = engine.submit

        def with_a_message_before(op: Any, **options: Any) -> Any:
            if not isinstance(op, MessageAppend) and op.id == "a":
                monkeypatch.setattr(engine, "submit", submit)
                do(engine, MessageAppend(id="a", role="user", content="still here"))
            return submit(op, **options)

        monkeypatch.setattr(engine, "submit", with_a_message_before)
        report = retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")

        assert archived(engine) == {"b"}
        assert report.archived == 1
        agrees(engine)


def test_a_full_disk_ends_a_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not journaled did not happen."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        old_shop(engine)
        disk.fill()
        with pytest.raises(StorageFull):
            retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")
        assert archived(engine) == set()
        disk.free()

        report = retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")

        assert report.archived == 3
        agrees(engine)


def test_writers_go_on_while_it_cleans(tmp_path: Path) -> None:
    """No op waits for more than a few of its batches."""
    with running(tmp_path) as engine:
        for number in range(400):
            engine.submit(
                MessageAppend(
                    id=f"c{number}",
                    messages=[Message(role="user", content="x" * 50, created_at=format_ms(NOW_MS - 500 * DAY_MS))] * 5,
                )
            )
        waits: list[float] = []
        is_over = threading.Event()

        def write() -> None:
            number = 0
            while not is_over.is_set():
                started = time.perf_counter()
                do(engine, SessionPut(id=str(number := number + 1), value={}))
                waits.append(time.perf_counter() - started)

        writer = threading.Thread(target=write)
        writer.start()
        report = retention.clean(engine, retention.by_settings(engine, engine.now_ms()), reason="daily")
        is_over.set()
        writer.join(ANSWER_S)

        assert (report.archived, report.messages_deleted) == (400, 2000)
        assert len(waits) > 10
        assert sorted(waits)[len(waits) // 2] < 0.5


def test_it_stops_when_the_process_does(tmp_path: Path) -> None:
    """In the middle, after what is under way; the next run does the rest."""
    with running(tmp_path) as engine:
        for number in range(10):
            talk(engine, f"c{number}", 100)
        asked = iter(range(100))

        report = retention.clean(
            engine, Cleanup(archive_before_ms=NOW_MS), reason="daily", is_stopping=lambda: next(asked) > 4
        )

        assert 0 < report.archived < 10
        assert report.remaining == 10 - report.archived


def test_it_runs_once_a_day(tmp_path: Path) -> None:
    """However often it is looked at; and again when a run has failed."""
    clock, log = HandClock(), Log()
    with running(tmp_path, clock=clock, log=log) as engine:
        daily = retention.Daily(engine)
        for _ in range(3 * 24 * 6):
            daily.run_when_due()
            clock.advance(600)

    assert len(log.named("retention.completed")) == 3
