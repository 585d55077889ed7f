"""What people put into the data directory while the daemon runs: files in the inbox, edits of snapshot files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.care.edited import EditedFiles
from holdfast.care.inbox import INBOX, PATIENCE_S, RETRY_S, SETTLE_S, Inbox
from holdfast.care.merge import merge
from holdfast.clock import Clock, format_ms
from holdfast.disk.files import Directory
from holdfast.engine import Engine
from holdfast.ops import (
    MessageAppend,
    OrderComplete,
    OrderPut,
    PersonHold,
    RecordDelete,
    RecordPut,
    SessionPut,
    StatsOrder,
)
from holdfast.service import inbox as inbox_service
from tests.cli_harness import daemon_in, start_daemon
from tests.cli_harness import forked as holdfast
from tests.engine_harness import NOW, NOW_MS, Disk, HandClock, Log, do, opened, running, value_of

EARLIER = format_ms(NOW_MS - 60_000)
NOTES = [{"id": "n1", "text": "hello"}]


class Place:
    """A data directory with its inbox, and time in our hands."""

    def __init__(self, data_dir: Path) -> None:
        self.clock = HandClock()
        self.log = Log()
        self.engine: Engine = opened(data_dir, clock=self.clock, log=self.log)
        self.inbox = Inbox(self.engine)
        self.edited = EditedFiles(self.engine)
        self.data_dir = data_dir
        self.path = data_dir / INBOX

    def put(self, name: str, content: Any, *, is_old: bool = False) -> Path:
        """Drop a file."""
        path = self.path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        if is_old:
            os.utime(path, ns=((NOW_MS - 60_000) * 1_000_000,) * 2)
        return path

    def look(self, seconds: float = 0.0) -> int:
        """Look, *seconds* later; how many files were put away."""
        self.clock.advance(seconds)
        return self.inbox.look()

    def names(self, place: str) -> list[str]:
        """What stands in ``done`` or ``rejected``."""
        return sorted(path.name for path in (self.path / place).iterdir())

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a snapshot file in place, as an editor does, and look until that is over."""
        path = self.data_dir / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        self.look_at_edits()

    def look_at_edits(self) -> None:
        """Look twice, so long apart that an edit is over."""
        self.edited.look()
        self.clock.advance(SETTLE_S)
        self.edited.look()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path / "data")
    yield found
    found.inbox.close()
    found.engine.close(flush=False)


# The inbox.


def test_a_file_is_merged_when_it_has_not_changed_for_a_second(place: Place):
    """However slowly it is written; then it stands in done."""
    for length in range(1, 4):
        place.put("notes.json", [{"id": str(number)} for number in range(length)])
        assert place.look() == place.look(SETTLE_S / 2) == 0

    assert place.look(SETTLE_S) == 1

    assert place.engine.count("notes") == 3
    assert place.names("done") == ["notes.json"] and not (place.path / "notes.json").exists()
    [said] = place.log.named("inbox.merged")
    assert (said["file"], said["added"], said["newer"], said["older"]) == ("notes.json", 3, 0, 0)


def test_a_file_that_is_known_to_be_complete_is_merged_at_once(place: Place):
    """One that was closed under our eyes, and one that was written long ago and moved in."""
    place.put("notes.json", NOTES)
    place.put("users.json", [{"user_id": "ana"}], is_old=True)

    assert place.inbox.look(complete={"notes.json"}) == 2

    assert place.names("done") == ["notes.json", "users.json"]


@pytest.mark.parametrize(
    "name", [".hidden.json", "notes.json.part", "notes.tmp", "notes.json~", "#notes.json#", "x.crdownload"]
)
def test_a_file_that_says_it_is_not_ready_is_left_alone(place: Place, name: str):
    """By its name, as downloads and editors choose them."""
    place.put(name, NOTES, is_old=True)

    assert place.look() == place.look(100) == 0

    assert (place.path / name).exists()


def test_what_is_no_json_may_still_be_in_the_writing(place: Place):
    """It is waited for, until it has not changed for half a minute; then it is rejected with a report for people."""
    for content in ('[{"id": "n1"', '{"a":'):
        place.put("notes.json", content)
        place.look()
        assert place.look(SETTLE_S) == place.look(PATIENCE_S - SETTLE_S - 0.1) == 0

    place.put("notes.json", NOTES)
    assert place.look() == 0 and place.look(SETTLE_S) == 1
    assert value_of(place.engine, "notes", "n1") == NOTES[0]

    place.put("notes.json", "[{]")
    place.look()
    place.look(SETTLE_S)
    assert place.look(PATIENCE_S) == 1
    assert place.names("rejected") == ["notes.json", "notes.json.report.txt"]
    report = (place.path / "rejected" / "notes.json.report.txt").read_text()
    assert "not JSON" in report and "inbox/ again" in report and NOTES[0]["text"] not in report


def test_one_record_that_is_none_rejects_the_file_and_changes_nothing(place: Place):
    """The report names it, and what was expected."""
    place.put("pending_orders.json", [{"odooOrderId": 1, "recipientPhone": "57"}, {"odooOrderId": 2}], is_old=True)
    before = place.engine.status()["seq"]

    assert place.look() == 1

    assert place.engine.status()["seq"] == before
    report = (place.path / "rejected" / "pending_orders.json.report.txt").read_text()
    assert "pending_orders.json, record 2: expected an order with its recipientPhone" in report
    [said] = place.log.named("inbox.rejected")
    assert said["file"] == "pending_orders.json" and "1 of 2 records" in said["reason"]


def test_odd_things_in_the_inbox_do_no_harm(place: Place, tmp_path: Path):
    """Links, pipes, directories of other things and files of ten gigabytes of nothing are put aside, each with a report."""
    (tmp_path / "secret.json").write_text(json.dumps(NOTES))
    (place.path / "link.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(place.path / "pipe.json")
    with (place.path / "notes.json").open("wb") as file:
        file.truncate(10 << 30)
    (place.path / "photos").mkdir()
    (place.path / "photos" / "cat.jpg").write_bytes(b"\xff")
    before = place.engine.status()["seq"]

    place.look()
    place.look(6)

    put_aside = ["link.json", "notes.json", "photos", "pipe.json"]
    assert place.names("rejected") == sorted(put_aside + [f"{name}.report.txt" for name in put_aside])
    assert place.engine.status()["seq"] == before
    assert (tmp_path / "secret.json").exists()


def test_a_directory_is_merged_when_nothing_in_it_changes_any_more(place: Place):
    """As a copy that takes its time makes it: file after file."""
    (place.path / "bot" / "conversations").mkdir(parents=True)
    place.put("bot/chat_sessions.json", [{"recipientPhone": "57", "lastActivity": NOW}])
    assert place.look() == place.look(3) == 0
    place.put("bot/conversations/c.json", {"id": "c", "messages": [{"role": "user", "content": "hola"}]})
    assert place.look(3) == place.look(3) == 0

    assert place.look(3) == 1

    assert place.engine.count("sessions") == place.engine.count("conversations") == 1
    assert (place.path / "done" / "bot" / "conversations" / "c.json").exists()


def test_a_merge_whose_file_was_not_moved_any_more_is_not_done_twice(place: Place):
    """As after a crash between the two: the same file again adds nothing, and both are kept."""
    conversation = {"id": "c", "messages": [{"role": "user", "content": "hola"}]}
    for _ in range(2):
        place.put("573001234567.json", conversation, is_old=True)
        assert place.look() == 1

    assert len(place.engine.transcripts.messages("c").items) == 1
    first, second = place.names("done")
    assert second == "573001234567.json" and re.fullmatch(r"573001234567-2026-11-21T060000000Z\.json", first)
    # A phone in a name does not get into the log.
    assert [said["file"] for said in place.log.named("inbox.merged")] == ["***567.json"] * 2


def test_a_full_disk_leaves_the_file_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And it is tried again."""
    disk = Disk(monkeypatch)
    place = Place(tmp_path / "data")
    try:
        place.put("notes.json", NOTES, is_old=True)
        disk.fill()
        assert place.look() == place.look(1) == 0
        assert len(place.log.named("inbox.postponed")) == 1
        disk.free()

        assert place.look(10) == 1

        assert place.engine.count("notes") == 1
    finally:
        place.inbox.close()
        place.engine.close(flush=False)


def test_one_conversation_may_be_called_as_a_collection_is(place: Place):
    """What is in the file tells them apart."""
    talk = {"id": "ana", "messages": [{"role": "user", "content": "hola", "timestamp": EARLIER}]}
    waiting = {"conversation_id": "ana", "reason": "she insists", "status": "pending", "timestamp": EARLIER}

    place.put("ana.json", talk, is_old=True)
    place.put("ana_escalation.json", waiting, is_old=True)

    assert place.look() == 2
    assert place.names("rejected") == []
    assert place.engine.transcripts.messages("ana").items[0].id == "1"
    assert value_of(place.engine, "escalations", "ana")["reason"] == "she insists"


def test_lines_that_nobody_closed_are_waited_for(place: Place):
    """A beginning of them is as good JSON as the whole; one who writes slowly may pause behind any of them."""
    lines = [json.dumps({"id": id, "messages": []}) + "\n" for id in ("c1", "c2")]

    place.put("conversations.jsonl", lines[0])
    assert [place.look(), place.look(SETTLE_S), place.look(PATIENCE_S / 2)] == [0, 0, 0]
    place.put("conversations.jsonl", lines[0] + lines[1])
    assert [place.look(), place.look(PATIENCE_S)] == [0, 1]

    assert place.engine.get("conversations", "c2") is not None


def test_a_file_that_changes_while_it_is_merged_is_merged_again(place: Place, monkeypatch: pytest.MonkeyPatch):
    """What is put away is what was merged; a file that is gone in the meantime is nobody's failure."""

    def meanwhile(change: Callable[[], object]) -> None:
        def merge_then(*args: Any, **options: Any) -> Any:
            report = merge(*args, **options)
            change()
            monkeypatch.setattr("holdfast.care.inbox.merge", merge)
            return report

        monkeypatch.setattr("holdfast.care.inbox.merge", merge_then)

    path = place.put("notes.json", NOTES, is_old=True)
    meanwhile(lambda: place.put("notes.json", [*NOTES, {"id": "n2"}]))
    assert place.look() == 0
    assert place.look() == 0
    assert place.look(SETTLE_S) == 1
    assert place.engine.count("notes") == 2
    assert place.names("done") == ["notes.json"]

    place.put("notes.json", NOTES, is_old=True)
    meanwhile(path.unlink)
    assert place.look() == 0
    assert place.look() == 0
    assert place.names("rejected") == []


def test_a_file_that_vanishes_before_it_is_read_is_forgotten(place: Place, monkeypatch: pytest.MonkeyPatch):
    """It leaves no report behind, and the next one has its turn."""

    def merge_gone(engine: Engine, given: Any, **options: Any) -> Any:
        (place.path / "a.json").unlink(missing_ok=True)
        return merge(engine, given, **options)

    monkeypatch.setattr("holdfast.care.inbox.merge", merge_gone)
    place.put("a.json", NOTES, is_old=True)
    place.put("b.json", NOTES, is_old=True)

    assert place.look() == 1

    assert (place.names("done"), place.names("rejected")) == (["b.json"], [])


def test_a_file_that_cannot_be_moved_keeps_no_other_waiting(place: Place, monkeypatch: pytest.MonkeyPatch):
    """It is told, and tried again."""
    move = Directory.move

    def refuse(self: Directory, name: str, into: Directory, new_name: str) -> None:
        if name == "a.json":
            raise PermissionError(13, "Permission denied")
        move(self, name, into, new_name)

    place.put("a.json", NOTES, is_old=True)
    place.put("b.json", NOTES, is_old=True)
    monkeypatch.setattr(Directory, "move", refuse)

    assert place.look() == 1
    assert place.names("done") == ["b.json"]
    [said] = place.log.named("inbox.postponed")
    assert said["reason"] == "it cannot be put away: Permission denied"
    monkeypatch.setattr(Directory, "move", move)
    assert place.look(RETRY_S) == 1


def test_a_file_that_cannot_be_moved_is_merged_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    """What was removed since does not come back with each try; what is written into it then is merged again."""
    place.put("notes.json", NOTES, is_old=True)
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "move", refuse_with(errno.ENOSPC))
        assert place.look() == 0
        do(place.engine, RecordDelete(collection="notes", id="n1"))
        assert place.look(RETRY_S) == 0
        assert place.engine.count("notes") == 0
        place.put("notes.json", [*NOTES, {"id": "n2"}])
        assert [place.look(RETRY_S), place.look(SETTLE_S)] == [0, 0]
        assert place.engine.count("notes") == 2
        do(place.engine, RecordDelete(collection="notes", id="n1"))

    assert place.look(RETRY_S) == 1

    assert place.engine.count("notes") == 1
    assert (place.names("done"), place.names("rejected")) == (["notes.json"], [])
    assert len(place.log.named("inbox.merged")) == 1


def test_a_report_that_cannot_be_written_keeps_no_other_waiting(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The file of which it tells stays until there is room, and then has one report."""
    place.put("a.json", "[1]", is_old=True)
    place.put("notes.json", NOTES, is_old=True)
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "_write_new", refuse_with(errno.ENOSPC))
        assert place.look() == 1
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "move", refuse_with(errno.EACCES))
        assert place.look(RETRY_S) == 0

    assert place.engine.count("notes") == 1
    assert (place.path / "a.json").exists() and place.names("rejected") == []
    assert "no room" in place.log.named("inbox.postponed")[0]["reason"]
    assert place.look(RETRY_S) == 1
    assert place.names("rejected") == ["a.json", "a.json.report.txt"]


def refuse_with(number: int) -> Callable[..., None]:
    """A call to the disk that is refused."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_fault_of_ours_keeps_no_other_waiting(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The file that brought it out is put aside with what is known; it is not said that nothing was changed."""

    def merge_with_fault(engine: Engine, given: Any, **options: Any) -> Any:
        if given.parts[0].name == "a.json":
            raise AttributeError("a phone, say")
        return merge(engine, given, **options)

    monkeypatch.setattr("holdfast.care.inbox.merge", merge_with_fault)
    place.put("a.json", NOTES, is_old=True)
    place.put("b.json", NOTES, is_old=True)

    assert place.look() == 2

    assert (place.names("done"), place.names("rejected")) == (["b.json"], ["a.json", "a.json.report.txt"])
    report = (place.path / "rejected" / "a.json.report.txt").read_text()
    assert "AttributeError" in report and "phone" not in report and "Nothing was changed" not in report
    assert place.log.named("inbox.failed")


def test_a_file_for_which_there_is_no_memory_is_rejected(tmp_path: Path):
    """And does not end the process, which would meet it again at its next start; the next file has its turn."""
    program = """
import os, resource, sys
from pathlib import Path
from holdfast.care.inbox import Inbox
from tests.engine_harness import opened
engine = opened(Path(sys.argv[1]))
inbox = Inbox(engine)
big, small = (Path(sys.argv[1]) / "inbox" / name for name in ("big.json", "small.json"))
big.write_text("[" + ",".join('{"id":"%d","text":"%s"}' % (number, "x" * 1000) for number in range(30_000)) + "]")
small.write_text('[{"id":"n1"}]')
inbox.look(["small.json"])
small.write_text('[{"id":"n2"}]')
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
print(inbox.look(["big.json", "small.json"]), engine.count("big"), engine.count("small"))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
inbox.close()
engine.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data"], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ran.returncode, ran.stdout) == (0, "2 0 2\n"), ran.stderr
    report = (tmp_path / "data" / "inbox" / "rejected" / "big.json.report.txt").read_text()
    assert "more memory than there is" in report and "split it" in report


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_less_of_a_file_is_held_in_memory_than_of_an_import(place: Place, monkeypatch: pytest.MonkeyPatch, excess: int):
    """The limit is of what must be there at a time: an array or a conversation in one piece, a line; no file of many lines."""
    monkeypatch.setattr("holdfast.care.inbox.HELD_BYTES_MAX", 1000)
    array = '[{"id":"n1","text":"%s"}]'
    talk = '{"id":"c1","messages":[{"role":"user","content":"%s"}]}'
    # A line of the largest size may be the beginning of a longer one.
    contents = {
        "notes.json": (array, 0),
        "573.json": (talk, 0),
        "conversations.jsonl": (talk.replace("c1", "c2") + "\n", -1),
    }
    for name, (form, less) in contents.items():
        place.put(name, form % ("x" * (1000 + less + excess - len(form) + 2)), is_old=True)
    many = ",\n".join(json.dumps({"id": str(number)}) for number in range(500))
    place.put("many.json", f"[\n{many}\n]\n", is_old=True)

    place.look()

    assert place.engine.count("many") == 500
    rejected = [] if excess <= 0 else sorted(contents)
    assert [name for name in place.names("rejected") if not name.endswith("report.txt")] == rejected
    for name in rejected:
        report = (place.path / "rejected" / f"{name}.report.txt").read_text()
        assert "at most 1000 bytes" in report and "`holdfast import`" in report


def test_a_look_that_fails_is_not_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever it was: neither the first, before the daemon is ready, nor a later one."""
    monkeypatch.setattr(inbox_service, "FAILED_PAUSE_S", 0.01)
    looks = []
    look = Inbox.look

    def look_with_fault(self: Inbox, *arguments: Any, **options: Any) -> int:
        looks.append(look)
        if len(looks) <= 2:
            raise RecursionError
        return look(self, *arguments, **options)

    monkeypatch.setattr(Inbox, "look", look_with_fault)

    async def serve() -> None:
        service = inbox_service.InboxService(engine)
        await service.start()
        (tmp_path / "new.json").write_text(json.dumps(NOTES))
        (tmp_path / "new.json").rename(tmp_path / "data" / INBOX / "notes.json")
        until = time.monotonic() + 10
        while not engine.count("notes"):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        await service.stop()

    with running(tmp_path / "data", clock=Clock()) as engine:
        asyncio.run(serve())

    assert len(looks) > 2


# Edits.


def test_an_edit_that_a_flush_came_before_is_taken_over(place: Place):
    """The flush replaces the file while the editor still writes; what he wrote in the end counts all the same, and once."""
    for id in ("n1", "n2"):
        do(place.engine, RecordPut(collection="notes", id=id, value={"text": id}))
    place.engine.flush("api")
    path = place.data_dir / "notes.json"
    text = path.read_text().replace('"text":"n1"', '"text":"edited"')
    with path.open("r+") as editor:
        editor.write(text[: len(text) // 2])
        editor.truncate()
        editor.flush()
        place.edited.look()
        do(place.engine, RecordPut(collection="notes", id="n3", value={"text": "n3"}))
        place.engine.flush("api")
        place.edited.look()
        editor.write(text[len(text) // 2 :])
    place.look_at_edits()

    assert value_of(place.engine, "notes", "n1")["text"] == "edited"
    assert place.engine.count("notes") == 3
    [said] = place.log.named("snapshot.edit_merged")
    assert (said["newer"], said["refused"]) == (1, 0)
    place.engine.flush("api")
    place.look_at_edits()
    assert len(place.log.named("snapshot.edit_merged")) == 1


def test_what_the_disk_changed_is_not_taken_for_an_edit(place: Place):
    """A file that is written anew because it is not what it was has the time at which we wrote it."""
    do(place.engine, RecordPut(collection="notes", id="n1", value={"text": "hello"}))
    place.engine.flush("api")
    path = place.data_dir / "notes.json"
    written_ns = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("hello", "hellp"))
    os.utime(path, ns=(written_ns, written_ns))

    place.engine.rewrite(["notes.json"])
    place.engine.flush("api")
    place.look_at_edits()

    assert value_of(place.engine, "notes", "n1")["text"] == "hello"
    assert not place.log.named("snapshot.edit_merged")


def test_an_edit_changes_the_records_that_were_edited_and_no_other(place: Place):
    """Money is no reason to take an order for edited, and what only looks the same is an edit."""
    for id in ("1", "2", "3"):
        do(place.engine, OrderPut(id=id, value={"recipientPhone": "57", "note": id}))
        do(place.engine, OrderComplete(id=id, revenue=Decimal("10.10")))
    do(place.engine, RecordPut(collection="notes", id="n1", value={"done": True}))
    place.engine.flush("api")

    place.edit("completed_orders.json", '"note":"2"', '"note":"two"')
    place.edit("notes.json", '"done":true', '"done":1')

    first, second = place.log.named("snapshot.edit_merged")
    assert (first["newer"], second["newer"]) == (1, 1)
    assert value_of(place.engine, "orders", "2")["note"] == "two"
    found = place.engine.get("notes", "n1")
    assert found is not None and found.value == b'{"id":"n1","done":1}'


def test_records_that_an_editor_laid_out_otherwise_are_taken_as_they_are(place: Place):
    """JSON is JSON, on however many lines."""
    for id in ("n1", "n2", "n3"):
        do(place.engine, RecordPut(collection="notes", id=id, value={"text": id}))
    place.engine.flush("api")
    lines = (place.data_dir / "notes.json").read_text().splitlines()
    lines[2] = lines[2].replace("{", "{\n  ", 1).replace('"text":"', '"text": "edited ')
    lines[3] += '\n, {"id": "n4"}'

    (place.data_dir / "notes.json").write_text("\n".join(lines[:-1]) + "]")
    place.look_at_edits()

    [said] = place.log.named("snapshot.edit_merged")
    assert (said["newer"], said["added"], said["refused"], said["missing"]) == (1, 1, 0, 0)


def test_an_edit_counts_although_its_time_is_older_and_is_kept(place: Place):
    """Nobody else changed the record, so what the editor left is what he means; his file is kept, ours written anew."""
    do(place.engine, SessionPut(id="57", value={"currentState": "catalog", "lastActivity": NOW}))
    do(place.engine, SessionPut(id="58", value={"currentState": "catalog", "lastActivity": NOW}))
    place.engine.flush("api")

    place.edit("chat_sessions.json", f'"57","currentState":"catalog","lastActivity":"{NOW}"', f'"57","currentState":"paid","lastActivity":"{EARLIER}"')  # fmt: skip

    assert value_of(place.engine, "sessions", "57") == {"recipientPhone": "57", "currentState": "paid", "lastActivity": EARLIER}  # fmt: skip
    found = place.engine.get("sessions", "57")
    other = place.engine.get("sessions", "58")
    assert found is not None and found.version == 2 and other is not None and other.version == 1
    [said] = place.log.named("snapshot.edit_merged")
    assert (said["newer"], said["added"], said["missing"]) == (1, 0, 0)
    [kept] = (place.data_dir / "backups").glob("edited-*/chat_sessions.json")
    assert '"paid"' in kept.read_text() and '"v":2' not in kept.read_text()
    assert '"v":2' in (place.data_dir / "chat_sessions.json").read_text()
    place.look_at_edits()
    assert len(place.log.named("snapshot.edit_merged")) == 1


def test_of_a_record_changed_on_both_sides_the_newer_counts(place: Place):
    """The line in the file is of an older version: by its time it is judged."""
    for id in ("57", "58"):
        do(place.engine, SessionPut(id=id, value={"currentState": "catalog", "lastActivity": EARLIER}))
    place.engine.flush("api")
    text = (place.data_dir / "chat_sessions.json").read_text()
    for id in ("57", "58"):
        do(place.engine, SessionPut(id=id, value={"currentState": "ours", "lastActivity": format_ms(NOW_MS - 30_000)}))
    lines = text.replace("catalog", "theirs").splitlines()
    lines = [line.replace(EARLIER, NOW) if '"57"' in line else line for line in lines]

    (place.data_dir / "chat_sessions.json").write_text("\n".join(lines))
    place.look_at_edits()

    assert value_of(place.engine, "sessions", "57")["currentState"] == "theirs"
    assert value_of(place.engine, "sessions", "58")["currentState"] == "ours"


def test_a_line_added_by_hand_is_a_new_record_and_a_line_removed_is_no_deletion(place: Place):
    """Nobody can tell a deleted line from a lost one; it comes back with the next flush, and that is told."""
    for id in ("n1", "n2", "n3"):
        do(place.engine, RecordPut(collection="notes", id=id, value={"text": id}))
    place.engine.flush("api")
    do(place.engine, RecordDelete(collection="notes", id="n3"))
    lines = (place.data_dir / "notes.json").read_text().splitlines()
    kept = [line.rstrip(",") for line in lines[1:-1] if '"n1"' not in line]

    (place.data_dir / "notes.json").write_text("[\n" + ",\n".join([*kept, '{"id": "n4"}']) + "\n]\n")
    place.look_at_edits()

    # n3 was removed here since the file was written, and stays so.
    assert place.engine.count("notes") == 3
    assert value_of(place.engine, "notes", "n4") == {"id": "n4"}
    [said] = place.log.named("snapshot.edit_merged")
    assert (said["added"], said["missing"]) == (1, 1)
    assert [one["id"] for one in sorted(json.loads((place.data_dir / "notes.json").read_text()), key=lambda one: one["id"])] == ["n1", "n2", "n4"]  # fmt: skip


def test_an_edit_that_is_not_finished_is_waited_for(place: Place):
    """Editors truncate first and write then; what is no JSON after half a minute is kept and replaced."""
    do(place.engine, RecordPut(collection="notes", id="n1", value={"text": "one"}))
    place.engine.flush("api")
    path = place.data_dir / "notes.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    place.look_at_edits()
    assert not place.log.named("snapshot.edit_merged")

    path.write_text(whole.replace("one", "two"))
    place.look_at_edits()
    assert value_of(place.engine, "notes", "n1")["text"] == "two"

    path.write_text("garbage")
    place.look_at_edits()
    place.clock.advance(PATIENCE_S)
    place.edited.look()
    assert json.loads(path.read_text())[0]["text"] == "two"
    assert any(kept.read_text() == "garbage" for kept in (place.data_dir / "backups").glob("edited-*/notes.json"))


def test_sales_figures_are_edited_as_long_as_nothing_was_counted_meanwhile(place: Place):
    """Otherwise what was counted stays, and what was written is kept."""
    do(place.engine, OrderPut(id="1", value={"recipientPhone": "57"}))
    place.engine.flush("api")

    place.edit("sales_stats.json", '"allTimeOrders": 1', '"allTimeOrders": 100')
    assert orjson.loads(place.engine.sales())["totals"]["allTimeOrders"] == 100

    do(place.engine, StatsOrder())
    place.edit("sales_stats.json", '"allTimeOrders": 100', '"allTimeOrders": 7')
    assert orjson.loads(place.engine.sales())["totals"]["allTimeOrders"] == 101
    assert len(list((place.data_dir / "backups").glob("edited-*/sales_stats.json"))) >= 1


def test_a_removed_file_is_written_again_and_book_keeping_is_never_taken_over(place: Place):
    """What is in memory counts."""
    do(place.engine, RecordPut(collection="notes", id="n1", value={"text": "one"}))
    do(place.engine, MessageAppend(id="c", role="user", content="hola"))
    do(place.engine, PersonHold(id="57"))
    place.engine.flush("api")

    (place.data_dir / "notes.json").unlink()
    (place.data_dir / "_holds.json").write_text("[\n]\n")
    place.look_at_edits()

    assert json.loads((place.data_dir / "notes.json").read_text())[0]["id"] == "n1"
    assert '"57"' in (place.data_dir / "_holds.json").read_text()
    assert [said["file"] for said in place.log.named("snapshot.removed")] == ["notes.json"]


def test_our_own_flushes_are_no_edits(tmp_path: Path):
    """However often they replace the files while they are looked at, and after a restart on a copied directory."""
    with running(tmp_path / "data") as engine:
        edited = EditedFiles(engine)
        for number in range(20):
            do(engine, RecordPut(collection="notes", id="n", value={"number": number}))
            engine.flush("api")
            assert engine.edited_files() == [] and edited.look() == 0
    os.utime(tmp_path / "data" / "notes.json")

    with running(tmp_path / "data") as engine:
        assert engine.edited_files() == []


# The daemon.


def test_the_daemon_merges_what_lay_there_before_it_is_ready_and_what_comes_later(tmp_path: Path):
    """Before the first request is served; and within moments of a move or of the end of a slow copy."""
    with daemon_in(tmp_path) as daemon:
        daemon.terminate()
        daemon.wait(10)
    inbox = tmp_path / "data" / "inbox"
    (inbox / "notes.json").write_text(json.dumps(NOTES))
    os.utime(inbox / "notes.json", (1, 1))
    daemon = start_daemon(tmp_path)
    try:
        log = (tmp_path / "log").read_text()
        assert log.index("inbox.merged") < log.index("daemon.ready")
        assert oct(inbox.stat().st_mode)[-3:] == "700"

        (tmp_path / "users.json").write_text('[{"user_id": "ana"}]')
        (tmp_path / "users.json").rename(inbox / "users.json")
        until = time.monotonic() + 10
        while not (inbox / "done" / "users.json").exists():
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.02)

        assert holdfast("users", "get", "ana", cwd=tmp_path).returncode == 0
    finally:
        daemon.kill()
        daemon.wait(10)
