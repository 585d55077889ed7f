"""A start on damaged files with backups at hand: what brings back most is used, and what is whole again is not called lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from holdfast.care.backup_set import list_sets
from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.restore import keep_history
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused
from holdfast.ops import (
    ConversationDelete,
    ConversationPut,
    Message,
    MessageAppend,
    OrderComplete,
    OrderDelete,
    OrderPut,
    RecordPut,
    SessionPut,
    UserPut,
)
from tests.crash.harness import FULL
from tests.engine_harness import HandClock, Log, do
from tests.restore_harness import all_of, change, copy_of, messages_of, opened, pack_set, settings_of

CHANGES = 48


class Lived(NamedTuple):
    """A directory with four backups, stopped without a flush; not to be changed.

    Attributes:
        seen: what must come back.
        backed_up: what the newest backup holds.
        now_ms: when it was stopped.
    """

    path: Path
    seen: dict[str, Any]
    backed_up: dict[str, Any]
    now_ms: int


def _lived(base: Path, **settings: Any) -> Lived:
    path, clock = base / "data", HandClock()
    backed_up: dict[str, Any] = {}
    for part in range(4):
        engine = opened(path, clock=clock, **settings)
        for number in range(part * 6, part * 6 + 6):
            clock.advance(1)
            change(engine, number)
        clock.advance(1)
        backed_up = all_of(engine)
        engine.close()
        pack_set(path, clock.now_ms())
    engine = opened(path, clock=clock, **settings)
    for number in range(24, CHANGES):
        clock.advance(1)
        change(engine, number)
        if number == 40:
            engine.flush("api")
    seen = all_of(engine)
    engine.close(flush=False)
    return Lived(path, seen, backed_up, clock.now_ms())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One whose history reaches from the backups to its end."""
    return _lived(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One without any history behind the last flush."""
    return _lived(tmp_path_factory.mktemp("bare"), backups={"pitr": 0.0}, journal_keep=0)


def spoilt(lived: Lived, place: Path, spoil: Callable[[Path], object]) -> Lived:
    """A copy of it with something wrong."""
    path = copy_of(lived.path, place / "data")
    spoil(path)
    return lived._replace(path=path)


def damage(path: Path) -> None:
    """Half of the file becomes zeros, with nobody having written it."""
    stat = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


FILES = ["chat_sessions.json", "pending_orders.json", "completed_orders.json", "users.json", "notes.json",
         "sales_stats.json", "_conversations.json", "_counted.json"]  # fmt: skip


# What is missing of a file without records is nothing.
WAYS = [(damage, file) for file in FILES] + [(Path.unlink, file) for file in FILES if file != "_counted.json"]
FEW = (0, 5, 7, 8, 13)


@pytest.mark.parametrize(("spoil", "file"), WAYS if FULL else [WAYS[number] for number in FEW])
def test_a_file_comes_back_whole_from_backup_and_journal(
    kept: Lived, tmp_path: Path, spoil: Callable[[Path], object], file: str
):
    """Everything is as it was, the log says out of which backup, and it is degraded only until the next backup."""
    lived, log = spoilt(kept, tmp_path, lambda path: spoil(path / file)), Log()

    engine = opened(lived.path, clock=HandClock(lived.now_ms), log=log)

    assert all_of(engine) == lived.seen
    assert engine.degraded and file in engine.degraded[0]
    newest = list_sets(lived.path)[0].name
    told = log.named("snapshot.damaged")
    assert [(one["file"], one["recovered_from"]) for one in told] == [(file, f"backup {newest} + journal")]
    assert log.named("recovery.candidate_found")[0]["is_exact"]
    if file == FILES[0]:
        engine.backup("api")
        assert engine.degraded == []
    engine.close()


@pytest.mark.parametrize("file", FILES if FULL else [FILES[0], FILES[4], FILES[5]])
def test_a_file_that_is_missing_with_the_manifest_comes_back(kept: Lived, tmp_path: Path, file: str):
    """Nothing here says any more that it was there; the backups do."""

    def spoil(path: Path) -> None:
        (path / "manifest.json").unlink()
        (path / file).unlink()

    lived, log = spoilt(kept, tmp_path, spoil), Log()

    engine = opened(lived.path, clock=HandClock(lived.now_ms), log=log)

    assert all_of(engine) == lived.seen
    if file != "_counted.json":
        assert file in engine.degraded[0]
        assert log.named("snapshot.damaged")[0]["file"] == file
    engine.close()


def test_a_file_that_came_back_whole_is_no_reason_to_refuse(kept: Lived, tmp_path: Path):
    """Under recovery = "strict" a start is refused for what is lost, not for what is whole again."""
    lived = spoilt(kept, tmp_path, lambda path: damage(path / "chat_sessions.json"))

    engine = opened(lived.path, clock=HandClock(lived.now_ms), recovery="strict")

    assert all_of(engine) == lived.seen
    engine.close()


def test_all_files_damaged_and_three_backups_bad(kept: Lived, tmp_path: Path):
    """The fourth brings everything back, with the history; it is named with its age."""

    def spoil(path: Path) -> None:
        for file in FILES:
            damage(path / file)
        for found in list_sets(path)[:3]:
            for stored in found.path.glob("*.zst"):
                stored.write_bytes(stored.read_bytes()[:-3])

    lived, log = spoilt(kept, tmp_path, spoil), Log()

    engine = opened(lived.path, clock=HandClock(lived.now_ms), log=log)

    assert all_of(engine) == lived.seen
    fourth = list_sets(lived.path)[3]
    assert fourth.manifest is not None
    assert {one["recovered_from"] for one in log.named("snapshot.damaged")} == {f"backup {fourth.name} + journal"}
    assert {one["at"] for one in log.named("recovery.candidate_found")} == {fourth.manifest.at}
    engine.close()


def test_an_older_state_adds_what_could_not_be_saved(bare: Lived, tmp_path: Path):
    """Without a history the backup is older: its records fill what the damaged file lost, what was saved stays newer."""

    def spoil(path: Path) -> None:
        lines = (path / "users.json").read_bytes().splitlines(keepends=True)
        (path / "users.json").write_bytes(b"".join(lines[:2]))

    lived, log = spoilt(bare, tmp_path, spoil), Log()

    engine = opened(lived.path, clock=HandClock(lived.now_ms), log=log)

    users = {id: one[1] for id, one in all_of(engine)["users"].items()}
    assert users.keys() >= lived.backed_up["users"].keys()
    told = log.named("snapshot.damaged")[0]
    assert told["recovered_from"] == f"salvage, backup {list_sets(lived.path)[0].name}"
    assert told["records"] == len(lived.backed_up["users"].keys() | {one["user_id"] for one in _saved(bare)})
    assert any("users.json" in reason for reason in engine.degraded)
    engine.backup("api")
    assert any("users.json" in reason for reason in engine.degraded)
    engine.close()


def _saved(lived: Lived) -> list[dict[str, Any]]:
    first: dict[str, Any] = json.loads((lived.path / "users.json").read_bytes().splitlines()[1].rstrip(b","))
    return [first]


def test_salvage_is_used_when_it_brings_back_more(bare: Lived, tmp_path: Path):
    """A backup with fewer records than could be saved is only looked at."""

    def spoil(path: Path) -> None:
        raw = (path / "notes.json").read_bytes()
        (path / "notes.json").write_bytes(raw[:-4])

    lived, log = spoilt(bare, tmp_path, spoil), Log()

    engine = opened(lived.path, clock=HandClock(lived.now_ms), log=log)

    assert log.named("snapshot.damaged")[0]["recovered_from"] == "salvage"
    assert len(log.named("recovery.candidate_found")) == 4
    assert len(all_of(engine)["notes"]) >= len(lived.seen["notes"]) - 1
    engine.close()


def _spoil_everything(path: Path) -> None:
    for file in FILES:
        (path / file).write_bytes(b"\0" * 100)
    (path / "manifest.json").write_bytes(b"garbage")
    shutil.rmtree(path / "journal")
    shutil.rmtree(path / "backups")


def test_with_nothing_left_it_starts_empty_with_the_evidence(kept: Lived, tmp_path: Path):
    """No backup, no journal, every file bad: empty and degraded, and each file of ours is in quarantine."""
    lived = spoilt(kept, tmp_path, _spoil_everything)

    engine = opened(lived.path, clock=HandClock(lived.now_ms))

    assert all_of(engine)["sessions"] == {} and engine.degraded
    evidence = [path.name for path in (lived.path / "quarantine").iterdir()]
    assert all(any(name.endswith(f"-{file}") for name in evidence) for file in FILES if file != "notes.json")
    do(engine, SessionPut(id="573001234567", value={}))
    engine.close()


def test_with_nothing_left_a_strict_start_is_refused(kept: Lived, tmp_path: Path):
    """Exit code 4, with what is damaged and what to do."""
    lived = spoilt(kept, tmp_path, _spoil_everything)

    with pytest.raises(DataRefused, match="Restore a backup") as refused:
        opened(lived.path, clock=HandClock(lived.now_ms), recovery="strict")
    assert refused.value.exit_code == 4


def test_a_damaged_event_comes_back_from_the_history(tmp_path: Path):
    """Events that the journal lost stand in the history as well: nothing is lost, and it says so."""

    path = tmp_path / "data"
    engine = opened(path, clock=HandClock())
    for number in range(20):
        change(engine, number)
    seen = all_of(engine)
    engine.close(flush=False)
    with Directory(path) as data:
        keep_history(data, None)
    segment = sorted(path.glob("journal/*.jsonl"))[-1]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*lines[:5], b"0" + lines[5][1:], *lines[6:]]))
    log = Log()

    engine = opened(path, clock=HandClock(), log=log)

    assert all_of(engine) == seen
    assert log.named("journal.damaged") and "all came back" in " ".join(engine.degraded)
    engine.backup("api")
    assert engine.degraded == []
    engine.close()


@pytest.mark.parametrize("how", ["garbage", "missing", "zeroed"])
def test_messages_come_back_from_a_backup(tmp_path: Path, how: str):
    """The archive cannot be read and the journal is pruned: the backup's messages and those since are there."""
    path, clock = tmp_path / "data", HandClock()
    settings: dict[str, Any] = {"backups": {"pitr": 0.0}, "journal_keep": 0}
    engine = opened(path, clock=clock, **settings)
    for number in range(30):
        do(engine, MessageAppend(id=f"chat-{number % 3}", role="user", content=f"hola {number}"))
    engine.close()
    pack_set(path, clock.now_ms())
    engine = opened(path, clock=clock, **settings)
    do(engine, MessageAppend(id="chat-0", messages=[Message(role="assistant", content="since")]))
    seen = all_of(engine)
    engine.close(flush=False)
    for part in ("-wal", "-shm"):
        (path / f"archive.db{part}").unlink(missing_ok=True)
    if how == "missing":
        (path / "archive.db").unlink()
    else:
        (path / "archive.db").write_bytes((b"garbage " if how == "garbage" else bytes(8)) * 2_000)

    engine = opened(path, clock=clock, **settings)

    assert all_of(engine) == seen
    assert engine.degraded == []
    engine.close()


def test_what_was_removed_does_not_come_back_with_the_archive(tmp_path: Path):
    """A conversation of the same name that began after the backup has none of the old messages."""
    path, clock = tmp_path / "data", HandClock()
    settings: dict[str, Any] = {"backups": {"pitr": 0.0}, "journal_keep": 0}
    engine = opened(path, clock=clock, **settings)
    for number in range(5):
        do(engine, MessageAppend(id="chat", role="user", content=f"old {number}"))
    engine.close()
    pack_set(path, clock.now_ms())
    engine = opened(path, clock=clock, **settings)
    do(engine, ConversationDelete(id="chat"))
    do(engine, ConversationPut(id="chat", value={"title": "anew"}))
    do(engine, MessageAppend(id="chat", role="user", content="new"))
    seen = all_of(engine)
    engine.close()
    (path / "archive.db").write_bytes(b"garbage " * 2_000)

    engine = opened(path, clock=clock, **settings)
    found = all_of(engine)

    assert found["conversations"]["chat"][1] == seen["conversations"]["chat"][1]
    assert "old" not in json.dumps(found["conversations"])
    engine.close()


@pytest.mark.parametrize("damaged", ["pending_orders.json", "completed_orders.json"])
def test_an_order_is_never_pending_and_closed_at_once(tmp_path: Path, damaged: str):
    """Where only one of the two files comes back older, an order that was in it then stays where it is now."""
    place, clock = tmp_path / "data", HandClock()
    engine = opened(place, clock=clock, backups={"pitr": 0.0}, journal_keep=0)
    for id in ("1", "2", "3"):
        do(engine, OrderPut(id=id, value={"recipientPhone": "573001111111", "productType": "music"}))
    do(engine, OrderComplete(id="3", revenue=Decimal(1)))
    engine.flush("api")
    engine.close()
    pack_set(place, clock.now_ms())
    engine = opened(place, clock=clock, backups={"pitr": 0.0}, journal_keep=0)
    do(engine, OrderComplete(id="1", revenue=Decimal(10)))
    do(engine, OrderDelete(id="3"))
    do(engine, OrderPut(id="3", value={"recipientPhone": "573001111111", "productType": "videos"}))
    engine.close()
    (place / damaged).write_bytes(b"")

    engine = opened(place, clock=clock, backups={"pitr": 0.0}, journal_keep=0)
    pending = {one.id for one in engine.everything("orders")}
    closed = {one.id for one in engine.everything("completed_orders")}
    reasons = engine.degraded
    engine.close()

    assert any(damaged in reason for reason in reasons)
    assert (pending, closed) == (({"2"}, {"1"}) if damaged == "pending_orders.json" else ({"2", "3"}, set()))


@pytest.mark.parametrize("has_set", [True, False])
def test_a_conversation_goes_on_behind_its_archived_messages(tmp_path: Path, has_set: bool):
    """Its head is lost, or comes back older than the archive: a new message must not get the number of one that is there."""
    place, clock = tmp_path / "data", HandClock()
    settings: dict[str, Any] = {"backups": {"pitr": 0.0}, "journal_keep": 0}
    said = [f"message {number}" for number in range(6)]
    for part in (said[:2], said[2:]):
        engine = opened(place, clock=clock, **settings)
        for content in part:
            do(engine, MessageAppend(id="chat", messages=[Message(role="user", content=content)]))
        engine.close()
        if has_set and part == said[:2]:
            pack_set(place, clock.now_ms())
    (place / "_conversations.json").write_bytes(b"")

    engine = opened(place, clock=clock, **settings)
    reasons = engine.degraded
    do(engine, MessageAppend(id="chat", messages=[Message(role="user", content="new")]))
    seen = [message["content"] for message in messages_of(engine, "chat")]
    engine.close()

    assert any("_conversations.json was damaged" in reason for reason in reasons)
    assert seen == [*said, "new"]


@pytest.mark.parametrize("has_history", [True, False])
def test_a_backup_of_what_was_damaged_is_no_better_than_that(kept: Lived, tmp_path: Path, has_history: bool):
    """Taken by hand, or by mend, before anybody repaired anything: it is the newest, and holds the damage."""

    def spoil(path: Path) -> None:
        damage(path / FILES[0])
        if not has_history:
            shutil.rmtree(path / "backups")
            shutil.rmtree(path / "journal" / "kept")

    lived, log = spoilt(kept, tmp_path, spoil), Log()
    copy = copy_of(lived.path, tmp_path / "copy")
    back_up_stopped(settings_of(lived.path), "mend", Log(), prove=False)
    there, here = (opened(path, clock=HandClock(lived.now_ms), log=log) for path in (lived.path, copy))

    assert all_of(there) == all_of(here)
    assert there.degraded and (all_of(there) == lived.seen) == has_history
    if not has_history:
        assert not any("all of it came back" in reason for reason in there.degraded)
    there.close()
    here.close()


def test_what_began_after_the_newest_backup_is_missed(tmp_path: Path):
    """Its file went with the manifest: neither says that it was there, the events do."""
    clock = HandClock()
    engine = opened(tmp_path / "data", clock=clock)
    do(engine, SessionPut(id="s", value={"currentState": "catalog"}))
    engine.close()
    pack_set(tmp_path / "data", clock.now_ms())
    engine = opened(tmp_path / "data", clock=clock)
    do(engine, UserPut(id="ana", value={"name": "Ana"}))
    do(engine, RecordPut(collection="notes", id="n", value={"text": "hola"}))
    seen = all_of(engine)
    engine.close()
    for name in ("manifest.json", "users.json", "notes.json"):
        (tmp_path / "data" / name).unlink()

    engine = opened(tmp_path / "data", clock=clock)

    assert all_of(engine) == seen
    assert any("users.json" in reason for reason in engine.degraded)
    assert any("notes.json" in reason for reason in engine.degraded)
    engine.close()


@pytest.mark.parametrize("lost", ["backups", "middle"])
def test_events_are_used_where_no_backup_reaches_to_the_end(kept: Lived, tmp_path: Path, lost: str):
    """Without any backup, and behind a hole in the history: each says what its record is from then on."""

    def spoil(path: Path) -> None:
        (path / "notes.json").unlink()
        if lost == "backups":
            shutil.rmtree(path / "backups")
            return
        with Directory(path) as data:
            keep_history(data, None)
        for found in list_sets(path)[:-1]:
            shutil.rmtree(found.path)
        parts = sorted((path / "backups" / "journal").iterdir())
        parts[len(parts) // 2].unlink()
        shutil.rmtree(path / "journal" / "kept")

    lived = spoilt(kept, tmp_path, spoil)
    notes = set(lived.seen["records"]["notes"]) if "records" in lived.seen else set(lived.seen["notes"])

    engine = opened(lived.path, clock=HandClock(lived.now_ms))

    back = {one.id for one in engine.everything("notes")}
    assert max(notes, key=lambda id: int(id[1:])) in back and len(back) >= len(notes) - (2 if lost == "middle" else 0)
    assert engine.degraded
    engine.close()


def test_backups_alone_are_no_past(kept: Lived, tmp_path: Path):
    """A start on nothing but backups says what to do; what begins then is another life than theirs."""

    def spoil(path: Path) -> None:
        for one in path.iterdir():
            if one.name != "backups":
                shutil.rmtree(one) if one.is_dir() else one.unlink()

    lived = spoilt(kept, tmp_path, spoil)
    newest = list_sets(lived.path)[0]

    engine = opened(lived.path, clock=HandClock(lived.now_ms))
    told = list(engine.degraded)
    for number in range(60):
        do(engine, RecordPut(collection="notes", id=f"new-{number}", value={"text": "new"}))
    engine.close()
    damage(lived.path / "notes.json")
    engine = opened(lived.path, clock=HandClock(lived.now_ms))

    assert any(f"holdfast restore {newest.name}" in reason for reason in told)
    assert {one.id.partition("-")[0] for one in engine.everything("notes")} == {"new"}
    engine.close()
