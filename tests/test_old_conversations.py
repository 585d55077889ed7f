"""Conversations and escalations of an old bot: all of them come over, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.care.old_layout import message_of, old_message
from holdfast.clock import format_ms
from holdfast.engine import Engine
from holdfast.errors import StorageFull, Unavailable
from holdfast.ops import ConversationDelete, MessageAppend
from holdfast.recovery import open_engine
from tests.engine_harness import NOW_MS, Disk, Log, do, running, settings_of, value_of

LINES = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hola! quiero una USB 🎶 <b>de 64GB</b> con salsa, y mucho más que cincuenta letras"},
    {"role": "assistant", "content": 'line one\nline two\t"quoted" \\ backslash'},
]


def old_conversation(id: str, messages: Any = LINES, **fields: Any) -> dict[str, Any]:
    """As an old bot writes it, with local times."""
    made = {"id": id, "created_at": "2026-11-01T10:00:00", "updated_at": "2026-11-01T10:05:00.250000"}
    return made | {"title": "Hola", "messages": messages, "escalated": False} | fields


def old_escalation(id: str, **fields: Any) -> dict[str, Any]:
    made = {"conversation_id": id, "timestamp": "2026-11-01T10:01:00", "reason": "Customer requested assistance"}
    return made | {"contact_info": {"mobile": "0123456789"}, "priority": "high", "status": "pending"} | fields


def left(data: Path, *, conversations: Any = (), escalations: Any = ()) -> None:
    """Write what an old bot left in *data*."""
    data.mkdir(mode=0o700, exist_ok=True)
    for place, olds, field, ending in (
        ("conversations", conversations, "id", ".json"),
        ("escalations", escalations, "conversation_id", "_escalation.json"),
    ):
        (data / place).mkdir(exist_ok=True)
        for old in olds:
            path = data / place / f"{old[field]}{ending}"
            path.write_text(json.dumps(old, indent=2, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize(
    "names",
    [
        [b"\xff\xfe.json"],
        ["日".encode() * 80 + b".json"],
        [b"a" * 240 + b"1.json", b"a" * 240 + b"2.json"],
        ["日".encode() * 70 + b"1.json", "日".encode() * 70 + b"2.json"],
    ],
)
def test_a_file_that_cannot_be_taken_may_have_any_name(tmp_path: Path, names: list[bytes]) -> None:
    """All of them are kept, each with its report, and the others are taken over."""
    left(tmp_path, conversations=[old_conversation("a")])
    for number, name in enumerate(names):
        (tmp_path / "conversations" / os.fsdecode(name)).write_text(f"{{broken {number}")

    with running(tmp_path) as engine:
        assert engine.get("conversations", "a") is not None
        assert engine.degraded == []

    kept = [path for path in (tmp_path / "quarantine").iterdir() if not path.name.endswith(".report.json")]
    assert sorted(path.read_text() for path in kept) == [f"{{broken {number}" for number in range(len(names))]
    for path in kept:
        report = orjson.loads(path.with_name(f"{path.name}.report.json").read_bytes())
        assert report["file"].startswith("conversations/")
    assert list((tmp_path / "conversations").iterdir()) == []


def messages_in(engine: Engine, id: str) -> list[dict[str, Any]]:
    """All of them, as they are shown."""
    page = engine.transcripts.messages(id, limit=1_000, after=0)
    assert page.next is None
    return [orjson.loads(item.value) for item in page.items]


def came_back(engine: Engine, id: str) -> list[Any]:
    """The messages in the old bot's form."""
    return [old_message(message) for message in messages_in(engine, id)]


def names_in(data: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in data.glob(pattern))


def test_a_conversation_comes_over_whole(tmp_path: Path) -> None:
    """Title, times in the configured zone, every message in order, the flag; system messages are counted apart."""
    left(tmp_path / "data", conversations=[old_conversation("c1", escalated=True)])

    with running(tmp_path / "data", stats={"timezone": "America/Bogota"}) as engine:
        head = value_of(engine, "conversations", "c1")

        assert head["title"] == "Hola"
        assert head["created_at"] == "2026-11-01T15:00:00.000Z"
        assert head["updated_at"] == "2026-11-01T15:05:00.250Z"
        assert (head["escalated"], head["message_count"], head["system_count"]) == (True, 2, 1)
        assert came_back(engine, "c1") == LINES
        assert {message["created_at"] for message in messages_in(engine, "c1")} == {head["created_at"]}


def test_fields_of_the_bots_own_come_over(tmp_path: Path) -> None:
    """What else stands in a file belongs to the conversation; what we count ourselves does not."""
    own = {"user_id": 57300, "language": "es", "tags": ["vip"], "message_count": 99, "_holdfast": "mine"}
    left(tmp_path / "data", conversations=[old_conversation("c1", **own)])

    with running(tmp_path / "data") as engine:
        head = value_of(engine, "conversations", "c1")

    assert (head["user_id"], head["language"], head["tags"], head["message_count"]) == ("57300", "es", ["vip"], 2)
    assert "_holdfast" not in head


def test_a_time_that_is_not_said_as_ours_is_kept_beside_it(tmp_path: Path) -> None:
    """The microseconds of Python stand under ``_original``; what we would say the same takes no room."""
    exact = {"created_at": "2026-11-01T10:00:00.123456", "updated_at": "2026-11-01T10:05:00.250000"}
    left(
        tmp_path / "data",
        conversations=[old_conversation("c1", **exact), old_conversation("c2")],
        escalations=[old_escalation("c1", timestamp="2026-11-01T10:01:00.000001"), old_escalation("c2")],
    )

    with running(tmp_path / "data") as engine:
        head, escalation = value_of(engine, "conversations", "c1"), value_of(engine, "escalations", "c1")
        assert head["created_at"] == "2026-11-01T10:00:00.123Z"
        assert head["_original"] == {"created_at": "2026-11-01T10:00:00.123456"}
        assert escalation["opened_at"] == "2026-11-01T10:01:00.000Z"
        assert escalation["contact_info"] == {
            "mobile": "0123456789",
            "_original": {"timestamp": "2026-11-01T10:01:00.000001"},
        }
        assert "_original" not in value_of(engine, "conversations", "c2")
        assert value_of(engine, "escalations", "c2")["contact_info"] == {"mobile": "0123456789"}


def test_escalations_come_over(tmp_path: Path) -> None:
    """Each waits since it was opened; one of a conversation that is not there gets an empty one; a closed one waits no more."""
    left(
        tmp_path / "data",
        conversations=[old_conversation("c1"), old_conversation("c3")],
        escalations=[
            old_escalation("c1"),
            old_escalation("c2", priority="urgent", reason=" "),
            old_escalation("c3", status="resolved"),
        ],
    )

    with running(tmp_path / "data") as engine:
        first, second = value_of(engine, "escalations", "c1"), value_of(engine, "escalations", "c2")

        assert (first["opened_at"], first["status"], first["priority"]) == (
            "2026-11-01T10:01:00.000Z",
            "pending",
            "high",
        )
        assert first["contact_info"] == {"mobile": "0123456789"}
        assert (second["priority"], second["reason"]) == ("high", "no reason given")
        assert value_of(engine, "conversations", "c2")["message_count"] == 0
        assert value_of(engine, "escalations", "c3") is None
        third = value_of(engine, "conversations", "c3")
        assert (third["escalated"], third["handler"]) == (True, "bot")
        assert third["old_escalation"] == old_escalation("c3", status="resolved")
        assert [item.id for item in engine.transcripts.escalations().items] == ["c1", "c2"]


ODD = [
    {"role": "user", "content": "Hola", "timestamp": "2026-11-01T10:02:00", "mood": {"score": 0.1}},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "call1", "function": {"name": "stock"}}]},
    {"role": "tool", "content": "3 left", "tool_call_id": "call1"},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}, {"type": "image", "url": "x"}]},
    {"role": "assistant", "content": ""},
    {"role": "bot", "content": "an old name of a role"},
    {"role": "narrator", "content": "nobody's role"},
    {"role": ["user"], "content": {"text": "nothing fits"}},
    {"content": "no role"},
    {"role": "user", "content": "twice", "channel": "whatsapp", "external_id": "wamid.1"},
    {"role": "user", "content": "twice", "channel": "whatsapp", "external_id": "wamid.1"},
    {"role": "user", "content": "half a pair \ud800", "n": 1},
    {"role": "user", "content": "too large a number", "n": 2**70},
    {"role": "user", "content": "not a number", "n": [float("inf")]},
    {"role": "user", "content": "deep", "n": json.loads("[" * 200 + "]" * 200)},
    {"role": "user", "content": "reserved", "_original": "mine", "created_at": 17},
    {"role": "assistant", "content": "cost", "tokens_used": 12, "author": "agent"},
    {"role": "assistant", "content": "cost", "tokens_used": -1, "author": "somebody"},
    "only a text",
    None,
    7,
]
"""Messages that an old bot may have, most of which we could not keep as they are."""


def test_no_message_is_left_out_or_changed(tmp_path: Path) -> None:
    """Whatever stands in the list of messages comes back as it was, in its place."""
    data = tmp_path / "data"
    left(data)
    (data / "conversations" / "odd.json").write_text(json.dumps(old_conversation("odd", ODD)))

    with running(data) as engine:
        assert came_back(engine, "odd") == ODD
        shown = messages_in(engine, "odd")

    assert [message["number"] for message in shown] == list(range(1, len(ODD) + 1))
    assert shown[0]["created_at"] == "2026-11-01T10:02:00.000Z"
    assert shown[1]["metadata"]["tool_calls"] == ODD[1]["tool_calls"]  # type: ignore[index]
    assert shown[3]["content"] == "three"
    assert [message["role"] for message in shown[5:9]] == ["assistant", "tool", "tool", "tool"]
    assert (shown[16]["tokens_used"], shown[16]["author"]) == (12, "agent")
    assert (shown[17]["tokens_used"], shown[17]["author"]) == (None, "bot")


def test_a_plain_message_is_kept_plainly() -> None:
    """The usual message carries no copy of itself."""
    message = message_of({"role": "user", "content": "Hola", "lang": "es"}, UTC)

    assert (message.role, message.content, message.metadata) == ("user", "Hola", {"lang": "es"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"id": "b", "messages": [', "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\0" * 500, "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"id": "b"}', "expected a list of messages"),
        ('{"id": "b", "messages": {"0": {}}}', "expected a list of messages"),
        (json.dumps({"id": "b", "messages": [{"role": "user", "content": "x" * 300_000}]}), "262144 bytes"),
    ],
)
def test_what_cannot_be_taken_is_kept_aside(content: str, reason: str, tmp_path: Path) -> None:
    """A broken file goes to quarantine/ with a report, is told and counted, and keeps nobody else back."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")])
    (data / "conversations" / "b.json").write_text(content)
    log = Log()

    with running(data, log=log) as engine:
        assert engine.count("conversations") == 1
        assert engine.degraded == []

    assert reason in log.named("conversation.import_failed")[0]["reason"]
    imported = log.named("conversations.imported")[0]
    assert (imported["conversations"], imported["broken"]) == (1, 1)
    assert [path.read_text() for path in (data / "quarantine").glob("*-conversations-b.json")] == [content]
    report = json.loads(next((data / "quarantine").glob("*b.json.report.json")).read_text())
    assert report["file"] == "conversations/b.json" and reason in report["reason"]
    assert names_in(data, "conversations/*") == []


def test_the_id_is_the_files_or_its_names(tmp_path: Path) -> None:
    """An id that cannot be one is replaced by the file's name; of two files with one id the second is kept aside."""
    data = tmp_path / "data"
    left(data)
    for name, id in (("a", "other"), ("b", 17), ("c", "x" * 300), ("d", None), ("e", "other"), ("f", "../up")):
        (data / "conversations" / f"{name}.json").write_text(json.dumps(old_conversation("") | {"id": id}))

    with running(data) as engine:
        ids = sorted(item.id for item in engine.transcripts.page().items)

    assert ids == ["../up", "17", "c", "d", "other"]
    assert names_in(data, "quarantine/*.json") == [
        f"{format_ms(NOW_MS).replace(':', '')}-conversations-e.json",
        f"{format_ms(NOW_MS).replace(':', '')}-conversations-e.json.report.json",
    ]


def test_what_was_taken_is_moved_away(tmp_path: Path) -> None:
    """The files stand byte for byte in backups/; a second start takes nothing, and brings back nothing that was deleted."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation(f"c{n}") for n in range(5)], escalations=[old_escalation("c1")])
    original = (data / "conversations" / "c1.json").read_bytes()
    with running(data) as engine:
        do(engine, ConversationDelete(id="c1"))
        do(engine, MessageAppend(id="c2", role="user", content="new"))
    log = Log()

    with running(data, log=log) as engine:
        assert engine.count("conversations") == 4
        assert len(messages_in(engine, "c2")) == len(LINES) + 1

    kept = data / "backups" / f"imported-{format_ms(NOW_MS).replace(':', '')}"
    assert (kept / "conversations" / "c1.json").read_bytes() == original
    assert names_in(kept, "escalations/*") == ["c1_escalation.json"]
    assert names_in(data, "conversations/*") == names_in(data, "escalations/*") == []
    assert log.named("conversations.imported") == []


def test_files_that_an_old_bot_writes_again(tmp_path: Path) -> None:
    """A longer list brings its new messages, the same or a shorter one nothing; another conversation is kept aside."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation(id) for id in ("longer", "same", "shorter", "other")])
    with running(data):
        pass
    more = [{"role": "user", "content": "more"}]
    left(
        data,
        conversations=[
            old_conversation("longer", LINES + more, updated_at="2026-11-02T10:00:00"),
            old_conversation("same"),
            old_conversation("shorter", LINES[:1]),
            old_conversation("other", more * 5),
        ],
    )
    log = Log()

    with running(data, log=log) as engine:
        assert came_back(engine, "longer") == LINES + more
        assert value_of(engine, "conversations", "longer")["updated_at"] == "2026-11-02T10:00:00.000Z"
        assert all(came_back(engine, id) == LINES for id in ("same", "shorter", "other"))

    assert "with other messages" in log.named("conversation.import_failed")[0]["reason"]
    assert len(names_in(data, "quarantine/*-other.json")) == 1
    assert names_in(data, "conversations/*") == []


def test_of_two_files_the_one_with_the_right_name_counts(tmp_path: Path) -> None:
    """A copy that somebody made beside it is set aside, wherever its name stands; without the other, or when that is broken,
    it is taken."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation(id) for id in ("57", "58", "59")])
    place = data / "conversations"
    for id in ("57", "58", "59"):
        copy = old_conversation(id, [{"role": "user", "content": "copy"}])
        (place / f"{id} (copy).json").write_text(json.dumps(copy))
    (place / "58.json").unlink()
    (place / "59.json").write_text('{"id": "59')

    with running(data) as engine:
        assert [message["content"] for message in messages_in(engine, "57")] == [one["content"] for one in LINES]
        for id in ("58", "59"):
            assert [message["content"] for message in messages_in(engine, id)] == ["copy"]
    assert names_in(data, "quarantine/*57 (copy).json")


def test_links_and_pipes_are_left_alone(tmp_path: Path) -> None:
    """Nothing is followed or waited for that is not a plain file of its own."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")])
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(old_conversation("outside")))
    (data / "conversations" / "link.json").symlink_to(outside)
    os.mkfifo(data / "conversations" / "pipe.json")
    (data / "conversations" / "folder.json").mkdir()
    (data / "conversations" / "note.txt").write_text("not ours")
    (data / "escalations").rmdir()
    (data / "escalations").symlink_to(tmp_path)
    log = Log()

    with running(data, log=log) as engine:
        assert engine.count("conversations") == 1

    assert names_in(data, "conversations/*") == ["folder.json", "link.json", "note.txt", "pipe.json"]
    assert len(log.named("file.ignored")) == 4
    assert outside.exists()


def test_many_messages_are_one_step(tmp_path: Path) -> None:
    """A conversation comes over whole or not at all, however long; the limit of one op is the clients'."""
    many = [{"role": "user", "content": f"message {n}"} for n in range(2_500)]
    left(tmp_path / "data", conversations=[old_conversation("long", many)])

    with running(tmp_path / "data") as engine:
        assert engine.status()["seq"] == 1
        assert value_of(engine, "conversations", "long")["message_count"] == 2_500
        assert engine.transcripts.window("long", messages=1).items[0].id == "2500"


def test_a_start_that_is_given_up_goes_on_later(tmp_path: Path) -> None:
    """Cancelled in the middle it raises, releases the directory, and the next start takes all, nothing twice."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation(f"c{n:03}") for n in range(300)])
    cancelled = threading.Event()

    def cancel_late(progress: str) -> None:
        if progress.startswith("taking over conversations: 200"):
            cancelled.set()

    with pytest.raises(Unavailable, match="the next start goes on"):
        open_engine(settings_of(data), log=Log(), cancelled=cancelled, progress=cancel_late)
    with running(data) as engine:
        assert engine.count("conversations") == 300
        assert all(came_back(engine, f"c{n:03}") == LINES for n in range(300))


def test_no_room_is_no_reason_not_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the files stay where they are, that is told, and the next start takes them."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")])
    disk = Disk(monkeypatch)
    disk.fill()

    with running(data) as engine:
        assert "old conversations could not be taken over" in engine.degraded[0]
        assert engine.get("conversations", "c1") is None
        with pytest.raises(StorageFull):
            do(engine, MessageAppend(id="c2", role="user", content="Hola"))
    assert names_in(data, "conversations/*") == ["c1.json"]
    disk.free()
    with running(data) as engine:
        assert came_back(engine, "c1") == LINES
        assert engine.degraded == []


def test_an_archive_that_cannot_be_read_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to be compared with it waits in its place, and that is told."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")])
    with running(data):
        pass
    left(data, conversations=[old_conversation("c1", LINES * 2)])

    def refuse(*args: Any, **wanted: Any) -> Any:
        raise Unavailable("the archive cannot be read: for now; try again soon")

    with monkeypatch.context() as broken:
        broken.setattr("holdfast.transcripts.Transcripts.messages", refuse)
        with running(data) as engine:
            assert "the archive cannot be read" in engine.degraded[0]
            assert engine.count("conversations") == 1
    assert names_in(data, "conversations/*") == ["c1.json"]
    with running(data) as engine:
        assert came_back(engine, "c1") == LINES * 2


def test_what_is_kept_is_for_the_owner_only(tmp_path: Path) -> None:
    """The directories that hold the old files are 0700."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")])

    with running(data):
        pass

    for place in ("backups", *(f"backups/{name}" for name in names_in(data, "backups/*"))):
        assert stat.S_IMODE((data / place).stat().st_mode) == 0o700


def test_an_escalation_is_not_opened_again(tmp_path: Path) -> None:
    """A file that stayed behind, since a start was broken off before it was moved, opens nothing twice."""
    data = tmp_path / "data"
    left(data, conversations=[old_conversation("c1")], escalations=[old_escalation("c1")])
    with running(data) as engine:
        version = engine.get("escalations", "c1").version  # type: ignore[union-attr]
    later = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    left(data, conversations=[old_conversation("c1")], escalations=[old_escalation("c1", timestamp=later)])

    with running(data) as engine:
        found = engine.get("escalations", "c1")

    assert found is not None and found.version == version
    assert names_in(data, "escalations/*") == []


@pytest.mark.parametrize("named", ["dup1", "dup2", "dup"])
def test_of_two_files_the_newer_one_counts(named: str, tmp_path: Path) -> None:
    """Whatever their names; the older one is kept aside, and one that cannot be taken counts for nothing."""
    more = [*LINES, {"role": "user", "content": "more"}]
    older = old_conversation("dup", updated_at="2026-11-21T10:00:00")
    newer = old_conversation("dup", more, updated_at="2026-11-21T05:30:00-06:00")
    broken = old_conversation("dup", "no list", updated_at="2026-11-21T12:00:00")
    left(tmp_path)
    for name, old in {"dup1": older, "dup2": older, "dup": older, "dup3": broken, named: newer}.items():
        (tmp_path / "conversations" / f"{name}.json").write_text(json.dumps(old))

    with running(tmp_path) as engine:
        assert came_back(engine, "dup") == more

    kept = [
        json.loads(path.read_text()) for path in tmp_path.glob("quarantine/*dup*.json") if "report" not in path.name
    ]
    assert sorted(kept, key=str) == sorted([older, older, broken], key=str)
    assert names_in(tmp_path, "conversations/*") == []


@pytest.mark.parametrize("said_since", [1, 2, 5])
def test_an_old_file_of_a_conversation_that_went_another_way_is_kept_aside(tmp_path: Path, said_since: int) -> None:
    """However many messages each has: it is not taken for one that was taken before."""
    data_dir = tmp_path / "data"
    with running(data_dir) as engine:
        for number in range(said_since):
            do(engine, MessageAppend(id="c", role="user", content=f"new {number}"))
    (data_dir / "conversations").mkdir(mode=0o700)
    old = {"id": "c", "messages": [{"role": "user", "content": f"old {number}"} for number in range(2)]}
    (data_dir / "conversations" / "c.json").write_text(json.dumps(old))

    log = Log()
    with running(data_dir, log=log) as engine:
        assert orjson.loads(engine.get("conversations", "c").value)["last_number"] == said_since  # type: ignore[union-attr]

    assert log.named("conversation.import_failed")
    assert any(path.name.endswith("conversations-c.json") for path in (data_dir / "quarantine").iterdir())
