"""The archive follows the journal: what was acknowledged is in it once, whatever happens to it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.archive.base import ArchiveDamaged, ArchiveError
from holdfast.engine import Engine
from holdfast.errors import DataRefused, HoldfastError, NotFound, StorageFull, Unavailable
from holdfast.ops import ConversationDelete, EscalationOpen, Message, MessageAppend, SessionPut
from tests.engine_harness import ANSWER_S, Disk, HandClock, Log, do, do_together, running


def say(content: str, id: str = "c", **fields: Any) -> MessageAppend:
    return MessageAppend(id=id, role="user", content=content, **fields)


def contents(engine: Engine, id: str = "c") -> list[str]:
    """What stands in the conversation, in order."""
    page = engine.transcripts.messages(id, limit=1000)
    assert page.next is None
    return [orjson.loads(item.value)["content"] for item in page.items]


def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, at most ANSWER_S."""
    ends_at = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < ends_at, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("durability", ["always", "everysec", "interval"])
def test_a_reader_sees_what_was_acknowledged(tmp_path: Path, durability: Any) -> None:
    """At once, under whatever durability, and again after a restart."""
    with running(tmp_path) as engine:
        for number in range(30):
            do(engine, say(str(number)), durability=durability)
            assert contents(engine)[-1] == str(number)
    with running(tmp_path) as engine:
        assert contents(engine) == [str(number) for number in range(30)]


def test_readers_and_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each conversation is seen whole and in order by many threads while others write to it."""
    with running(tmp_path) as engine:
        failures: list[BaseException] = []

        def work(id: str) -> None:
            try:
                for number in range(60):
                    do(engine, say(str(number), id))
                    assert contents(engine, id) == [str(one) for one in range(number + 1)]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(f"c{one}",)) for one in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S * 3)

        assert not failures


def test_a_conversation_is_whole_while_it_is_begun_anew(tmp_path: Path) -> None:
    """Whoever reads it sees one of those that there were, never the head of one with the messages of another."""
    with running(tmp_path) as engine:
        is_over = threading.Event()
        odd: list[Any] = []
        seen: set[int] = set()

        def read() -> None:
            while not is_over.is_set():
                whole = engine.transcripts.conversation("c")
                if whole is not None:
                    found = orjson.loads(whole.value)
                    said = [message["content"] for message in found["messages"]]
                    seen.add(len(said))
                    if said != [found["title"]] * found["message_count"]:
                        odd.append((found["title"], found["message_count"], said))

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(300):
            for _ in range(number % 3 + 1):
                do(engine, say(f"life {number}"))
            do(engine, ConversationDelete(id="c"))
        is_over.set()
        for reader in readers:
            reader.join(ANSWER_S)

        assert odd == []
        assert seen


@pytest.mark.parametrize("durability", ["everysec", "interval"])
def test_nothing_is_archived_before_it_is_synced(tmp_path: Path, durability: Any) -> None:
    """What a power cut could take out of the journal must not be in the archive."""
    with running(tmp_path) as engine:
        do(engine, say("one"), durability=durability)
        assert engine.transcripts.external_numbers("c", [], 0) == {}
        time.sleep(0.2)
        assert engine.status()["archived_seq"] == 0
        assert contents(engine) == ["one"]  # a reader has it synced
        assert engine.status()["durable_seq"] == 1


def test_an_op_that_a_full_disk_takes_back_is_not_archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is given to the next message, and readers are not held up."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        do(engine, say("one"))
        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, say("lost"))
        assert contents(engine) == ["one"]
        disk.free()

        answer = do(engine, say("two"))

        assert answer.numbers == [2]
        assert contents(engine) == ["one", "two"]


def test_what_a_full_disk_takes_back_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is what else happened since the last message, which no archive hears of."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        do(engine, say("one"))
        assert contents(engine) == ["one"]
        for number in range(5):
            do(engine, SessionPut(id=str(number), value={}))
        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, say("lost"))

        assert contents(engine) == ["one"]


def test_a_refused_batch_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """Its first op may have been about a conversation, its last one refused."""
    with running(tmp_path) as engine:
        do(engine, say("one"))
        assert contents(engine) == ["one"]
        do(engine, SessionPut(id="s", value={}))
        with pytest.raises(NotFound):
            do_together(engine, say("two"), ConversationDelete(id="d"))

        assert contents(engine) == ["one"]
        assert engine.transcripts.figures().messages == 1


def test_members_of_a_batch_are_archived(tmp_path: Path) -> None:
    """Also when they are read from the journal again."""
    with running(tmp_path) as engine:
        do_together(engine, SessionPut(id="s", value={}), say("one"), say("two"), say("three", "d"))
        assert contents(engine) == ["one", "two"]
    (tmp_path / "archive.db").unlink()
    with running(tmp_path) as engine:
        assert contents(engine) == ["one", "two"]
        assert contents(engine, "d") == ["three"]


def test_a_follower_far_behind_reads_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory keeps only the newest events for it."""
    monkeypatch.setattr("holdfast.core.backlog.EVENTS_MAX", 5)
    with running(tmp_path) as engine:
        tickets = [engine.submit(say(str(number), "c" if number % 3 else "d")) for number in range(300)]
        tickets[-1].wait(ANSWER_S)

        assert contents(engine) == [str(number) for number in range(300) if number % 3]
        assert contents(engine, "d") == [str(number) for number in range(0, 300, 3)]


@pytest.mark.parametrize("durability", ["always", "everysec", "interval"])
def test_more_than_memory_keeps_may_wait_to_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Any
) -> None:
    """What is not synced yet is not looked for in the journal, where it may be missing and may be cut off again."""
    monkeypatch.setattr("holdfast.core.backlog.EVENTS_MAX", 5)
    monkeypatch.setattr("holdfast.archive.follower.LAZY_S", 0.001)
    disk, log, may_sync = Disk(monkeypatch), Log(), threading.Event()
    with running(tmp_path, log=log) as engine:
        do(engine, say("0"))
        disk.before_sync = lambda: may_sync.wait(ANSWER_S) and None
        tickets = [engine.submit(say(str(number)), durability=durability) for number in range(1, 60)]
        time.sleep(0.1)
        archived_seq = engine.status()["archived_seq"]
        durable_seq = engine.status()["durable_seq"]
        may_sync.set()
        for ticket in tickets:
            ticket.wait(ANSWER_S)

        assert archived_seq <= durable_seq < 60
        assert contents(engine) == [str(number) for number in range(60)]
    assert not log.named("archive.damaged")


def test_a_full_disk_takes_back_more_than_memory_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seqs of what was taken back are given again; what has them then is archived."""
    monkeypatch.setattr("holdfast.core.backlog.EVENTS_MAX", 5)
    monkeypatch.setattr("holdfast.archive.follower.LAZY_S", 0.001)
    disk, log = Disk(monkeypatch), Log()
    with running(tmp_path, log=log) as engine:
        do(engine, say("0"))
        disk.fill()
        with pytest.raises(StorageFull):
            do_together(engine, *(say("lost", f"c{number}") for number in range(30)))
        for _ in range(30):
            with pytest.raises(StorageFull):
                do(engine, say("lost"))
        disk.free()
        for number in range(1, 40):
            do(engine, say(str(number)))

        assert contents(engine) == [str(number) for number in range(40)]
    assert not log.named("archive.damaged")


def test_closing_in_the_midst_of_catching_up_skips_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not read of the journal yet is read by the next start, although newer events were at hand."""
    with running(tmp_path) as engine:
        do(engine, say("0"))
        assert contents(engine) == ["0"]
        follower = engine._follower
        with monkeypatch.context() as patch:
            patch.setattr("holdfast.core.backlog.EVENTS_MAX", 5)
            patch.setattr("holdfast.archive.follower.JOURNAL_READ_BYTES", 2_000)
            archive = type(follower._archive)
            apply = archive.apply

            def close_then_apply(self: Any, events: Any, up_to: int) -> None:
                follower._is_closing = True
                apply(self, events, up_to)

            patch.setattr(archive, "apply", close_then_apply)
            # So that all of it waits.
            patch.setattr("holdfast.archive.follower.LAZY_S", 0.5)
            tickets = [engine.submit(say(str(number))) for number in range(1, 200)]
            tickets[-1].wait(ANSWER_S)
            until(lambda: follower._is_closing)
            engine.close(flush=False)

    with running(tmp_path) as engine:
        assert contents(engine) == [str(number) for number in range(200)]


# The archive cannot be written.


def test_a_stalled_archive_holds_up_no_op_and_no_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is kept for it, it is told, and it catches up by itself."""
    monkeypatch.setattr("holdfast.engine.ARCHIVE_WAIT_S", 0.2)
    monkeypatch.setattr("holdfast.archive.follower.RETRY_S", 0.05)
    log = Log()
    with running(tmp_path, log=log, journal_keep=0) as engine:
        do(engine, say("one"))
        assert contents(engine) == ["one"]
        with monkeypatch.context() as patch:
            archive = engine._follower._archive
            patch.setattr(type(archive), "apply", lambda *a: (_ for _ in ()).throw(ArchiveError("no room")))
            do(engine, say("two"))
            do(engine, SessionPut(id="s", value={}))
            engine.flush("api")
            assert len(list(tmp_path.glob("journal/kept/*.jsonl"))) == 1
            until(lambda: any("no room" in reason for reason in engine.degraded))
            with pytest.raises(Unavailable, match="no room"):
                contents(engine)

        assert contents(engine) == ["one", "two"]
        until(lambda: not engine.degraded)
        engine.flush("api")
        assert not list(tmp_path.glob("journal/kept/*.jsonl"))
        assert len(log.named("archive.stalled")) == len(log.named("archive.resumed")) == 1
    with running(tmp_path) as engine:
        assert contents(engine) == ["one", "two"]


def test_the_journal_is_pruned_once_the_archive_is_durable(tmp_path: Path) -> None:
    """Not before, and by the same flush."""
    with running(tmp_path, journal_keep=0) as engine:
        for number in range(5):
            do(engine, say(str(number)))

        engine.flush("api")

        assert engine.status()["journal_bytes"] == 0
        assert engine.gauges().archived_seq == 5
    with running(tmp_path) as engine:
        assert contents(engine) == ["0", "1", "2", "3", "4"]


# The archive is lost, damaged, or another one.


def filled(tmp_path: Path, **chosen: Any) -> None:
    """Conversations before and after a flush."""
    with running(tmp_path, **chosen) as engine:
        do(engine, say("one"))
        do(engine, say("two"))
        do(engine, EscalationOpen(id="c", reason="help"))
        do(engine, say("one", "gone"))
        do(engine, SessionPut(id="s", value={}))
        engine.flush("api")
        do(engine, say("three"))
        do(engine, ConversationDelete(id="gone"))
        do(engine, say("other", "d"))


def lost(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 1000)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * 8192 + whole[12288:])


@pytest.mark.parametrize("spoil", [lost, garbage, zeroed, emptied, cut, overwritten])
def test_a_spoilt_archive_is_made_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """From memory and the journal that is kept: nothing is missing, nothing doubled, nothing that was deleted is back."""
    filled(tmp_path)
    spoil(tmp_path / "archive.db")
    log = Log()

    with running(tmp_path, log=log) as engine:
        assert engine.get("sessions", "s") is not None
        assert contents(engine) == ["one", "two", "three"]
        assert contents(engine, "d") == ["other"]
        assert engine.transcripts.conversation("gone") is None
        assert [item.id for item in engine.transcripts.page().items] == ["d", "c"]
        assert [item.id for item in engine.transcripts.escalations().items] == ["c"]
        assert engine.transcripts.figures().messages == 4
        assert engine.degraded == []
        do(engine, say("four"))
        assert contents(engine) == ["one", "two", "three", "four"]

    assert [told["lost_messages"] for told in log.named("archive.rebuilt")] == ([] if spoil in (lost, emptied) else [0])
    kept = [path.name for path in tmp_path.glob("quarantine/*archive.db")]
    # An empty file is a new archive, and no evidence of anything.
    assert len(kept) == (0 if spoil in (lost, emptied) else 1)


def test_what_an_archive_takes_with_it_is_told(tmp_path: Path) -> None:
    """When the journal does not reach back either: how many messages, and that the data is degraded; heads stay."""
    filled(tmp_path, journal_keep=0)
    (tmp_path / "archive.db").unlink()
    log = Log()

    with running(tmp_path, log=log) as engine:
        assert contents(engine) == ["three"]
        until(lambda: bool(engine.degraded))
        assert "without 2 messages" in engine.degraded[0]
        page = engine.transcripts.page()
        assert {item.id: orjson.loads(item.value)["message_count"] for item in page.items} == {"c": 3, "d": 1}
        assert do(engine, say("four")).numbers == [4]

    assert log.named("archive.rebuilt")[0]["lost_messages"] == 2


def replaced(path: Path) -> None:
    """As by an operator who puts an older one back."""
    other = path.with_name("other.db")
    shutil.copyfile(path, other)
    other.replace(path)


@pytest.mark.parametrize("spoil", [lost, replaced])
def test_an_archive_that_vanishes_while_it_is_open_loses_nothing(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Neither what it had alone nor what came after: the next flush notices before the journal is given up."""
    log = Log()
    with running(tmp_path, log=log, journal_keep=0) as engine:
        do(engine, say("one"))
        engine.flush("api")
        spoil(tmp_path / "archive.db")
        do(engine, say("two"))
        engine.flush("api")
        do(engine, say("three"))

        engine.flush("api")

        assert contents(engine) == ["one", "two", "three"]
        until(lambda: bool(log.named("archive.rebuilt")))
        assert log.named("archive.rebuilt")[0]["lost_messages"] == 0
        assert "removed or replaced" in log.named("archive.damaged")[0]["reason"]
    with running(tmp_path, journal_keep=0) as engine:
        assert contents(engine) == ["one", "two", "three"]
        assert not engine.degraded


def test_what_can_be_read_of_a_damaged_archive_is_saved(tmp_path: Path) -> None:
    """Although the journal does not reach back to it."""
    with running(tmp_path, journal_keep=0) as engine:
        for number in range(400):
            engine.submit(say(f"message {number} " + "x" * 100, f"c{number % 20}"))
        do(engine, say("last", "c0"))
        engine.flush("api")
    path = tmp_path / "archive.db"
    whole = path.read_bytes()
    # A page in the middle, which is most likely one of messages.
    at = len(whole) // 2 // 4096 * 4096
    path.write_bytes(whole[:at] + b"\xff" * 4096 + whole[at + 4096 :])
    log = Log()

    with running(tmp_path, log=log) as engine:
        engine._follower.report_damage(ArchiveDamaged("found while reading"))
        until(lambda: bool(log.named("archive.rebuilt")))
        told = log.named("archive.rebuilt")[0]

        assert told["conversations"] == 20
        assert told["messages"] + told["lost_messages"] == 401
        assert told["salvaged"] >= 300
        assert engine.transcripts.figures().messages == told["messages"]


def test_an_older_archive_catches_up(tmp_path: Path) -> None:
    """As one that an operator has copied back; what the journal has is applied once."""
    filled(tmp_path)
    shutil.copy(tmp_path / "archive.db", tmp_path / "copy")
    with running(tmp_path) as engine:
        do(engine, say("four"))
    shutil.copy(tmp_path / "copy", tmp_path / "archive.db")

    with running(tmp_path) as engine:
        assert contents(engine) == ["one", "two", "three", "four"]
        assert engine.transcripts.figures().messages == 5


def test_an_archive_older_than_the_journal_keeps_what_it_has(tmp_path: Path) -> None:
    """The gap between the two is lost, and told."""
    with running(tmp_path, journal_keep=0) as engine:
        do(engine, say("one"))
        engine.flush("api")
    shutil.copy(tmp_path / "archive.db", tmp_path / "copy")
    with running(tmp_path, journal_keep=0) as engine:
        do(engine, say("two"))
        engine.flush("api")
        do(engine, say("three"))
    shutil.copy(tmp_path / "copy", tmp_path / "archive.db")

    with running(tmp_path) as engine:
        assert contents(engine) == ["one", "three"]
        until(lambda: bool(engine.degraded))
        assert "without 1 messages" in engine.degraded[0]


def test_an_archive_from_the_future_gives_no_message_twice(tmp_path: Path) -> None:
    """As when the rest of the directory comes from an older copy: numbers that are given again mean the new messages."""
    with running(tmp_path / "present") as engine:
        do(engine, say("one"))
        do(engine, say("two"))
    shutil.copytree(tmp_path / "present", tmp_path / "copy")
    with running(tmp_path / "present") as engine:
        do(engine, say("never"))
        do(engine, say("happened", "d"))
        assert contents(engine, "d") == ["happened"]
    shutil.copy(tmp_path / "present" / "archive.db", tmp_path / "copy" / "archive.db")

    with running(tmp_path / "copy") as engine:
        assert contents(engine) == ["one", "two"]
        assert do(engine, say("three")).numbers == [3]
        assert contents(engine) == ["one", "two", "three"]
        assert engine.transcripts.page().items[0].id == "c"
        assert len(engine.transcripts.page().items) == 1


def test_rebuilding_may_be_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damaged archive stays in its place until the new one is complete; the next start begins again."""
    filled(tmp_path)
    garbage(tmp_path / "archive.db")
    with monkeypatch.context() as patch:
        patch.setattr(
            "holdfast.archive.place.DataDirectoryPlace.adopt", lambda *a: (_ for _ in ()).throw(ArchiveError("stopped"))
        )
        with running(tmp_path) as engine:
            until(lambda: any("stopped" in reason for reason in engine.degraded))
            with pytest.raises(Unavailable):
                engine._follower.archive(timeout=0.05)
            assert do(engine, say("four")).numbers == [4]
    assert (tmp_path / "archive.db").read_bytes().startswith(b"this is no database")

    with running(tmp_path) as engine:
        assert contents(engine) == ["one", "two", "three", "four"]
    assert not list(tmp_path.glob("archive.rebuild*"))


def test_an_archive_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    """As the rest of a newer directory is; the lock is given back."""
    import sqlite3

    filled(tmp_path)
    connection = sqlite3.connect(tmp_path / "archive.db")
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    before = (tmp_path / "archive.db").read_bytes()

    for _ in range(2):
        with pytest.raises(DataRefused, match="newer"), running(tmp_path):
            pass

    assert (tmp_path / "archive.db").read_bytes() == before


def test_directories_of_before_the_archive_open(tmp_path: Path) -> None:
    """With events in a journal that is pruned long since, and nothing to say about them."""
    log = Log()
    with running(tmp_path, journal_keep=0) as engine:
        for number in range(5):
            do(engine, SessionPut(id=str(number), value={}))
        engine.flush("api")
    for path in tmp_path.glob("archive.db*"):
        path.unlink()

    with running(tmp_path, log=log) as engine:
        do(engine, say("one"))
        assert contents(engine) == ["one"]
        assert engine.degraded == []
    assert not log.named("archive.rebuilt")


# External ids and time.


def test_the_archive_remembers_external_ids(tmp_path: Path) -> None:
    """A channel that delivers again after a week, and a restart, finds its message."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        do(engine, say("one", external_id="w1", channel="wa"))
        do(engine, say("two", external_id="w2", channel="wa"))
        clock.advance(7 * 86_400)
        engine.expire()
        assert engine.gauges().records["conversations"] == 1
        assert not list(engine._state.externals)
    with running(tmp_path, clock=clock) as engine:
        both = [
            Message(role="user", content=text, external_id=id, channel="wa")
            for text, id in (("two", "w2"), ("3", "w3"))
        ]

        assert do(engine, MessageAppend(id="c", messages=both)).numbers == [2, 3]
        assert contents(engine) == ["one", "two", "3"]


def test_external_ids_of_an_earlier_conversation_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the archive still holds the one that was deleted."""
    with running(tmp_path) as engine:
        do(engine, say("one", external_id="w1"))
        do(engine, say("two", external_id="w2"))
        assert contents(engine) == ["one", "two"]
        monkeypatch.setattr("holdfast.archive.follower.LAZY_S", ANSWER_S)

        do(engine, ConversationDelete(id="c"))
        do(engine, say("three"))
        answers = [do(engine, say(text, external_id="w2")) for text in ("four", "again")]

        assert [answer.numbers for answer in answers] == [[2], [2]]
        assert contents(engine) == ["three", "four"]


def test_a_young_conversation_needs_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its external ids are in memory, until the first of them is forgotten, or the process is another one."""
    asked: list[str] = []
    clock = HandClock()

    def listen(engine: Engine) -> None:
        question = engine.transcripts.external_numbers

        def note(id: str, *rest: Any) -> dict[tuple[str, str], int]:
            asked.append(id)
            return question(id, *rest)

        monkeypatch.setattr(engine.transcripts, "external_numbers", note)

    with running(tmp_path, clock=clock) as engine:
        listen(engine)
        for number in range(3):
            do(engine, say(str(number), external_id=f"w{number}"))
        assert do(engine, say("1", external_id="w1")).numbers == [2]
        assert contents(engine) == ["0", "1", "2"]
        assert asked == []

        clock.advance(25 * 3600)
        engine.expire()
        assert do(engine, say("1", external_id="w1")).numbers == [2]
        assert asked == ["c"]
        do(engine, say("1", "young", external_id="w1"))
        do(engine, say("2", "young", external_id="w2"))
        assert asked == ["c"]
    with running(tmp_path, clock=clock) as engine:
        listen(engine)
        assert do(engine, say("2", "young", external_id="w2")).numbers == [2]
        assert asked == ["c", "young"]


def test_a_closed_engine_reads_no_more(tmp_path: Path) -> None:
    """With an error of its own, not with one of the database."""
    with running(tmp_path) as engine:
        do(engine, say("one"))
    with pytest.raises(HoldfastError):
        contents(engine)
