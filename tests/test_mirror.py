"""The readable mirror: after each flush the files show what is there, whatever happened before."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from holdfast.care import mirror
from holdfast.care.mirror import NAME_BYTES_MAX, file_name
from holdfast.disk.files import Directory
from holdfast.engine import Engine
from holdfast.ops import (
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    SessionPut,
)
from tests.engine_harness import Log, do, do_together, running

HOSTILE = ["../x", "a/b", "..", ".", ".tmp", "%2e%2e", "a b", "ñ" * 150, "価" * 256, "x" * 256, "c~1", "-rf", "a\\b|c"]


def append(engine: Engine, id: str, *contents: str) -> None:
    """The customer says so."""
    do(engine, MessageAppend(id=id, messages=[Message(role="user", content=content) for content in contents]))


def mirrored(data: Path, place: str = "conversations") -> dict[str, Any]:
    """What the files show, by their names without the ending."""
    return {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in (data / place).glob("*.json")}


def contents(data: Path) -> dict[str, list[str]]:
    """The same, of each message its content only."""
    return {name: [message["content"] for message in shown["messages"]] for name, shown in mirrored(data).items()}


def test_a_conversation_is_mirrored_as_old_bots_wrote_it(tmp_path: Path) -> None:
    """The keys of their files in their order, what messages carry beside their content, and our mark at the end."""
    with running(tmp_path, mirror=True) as engine:
        do(engine, MessageAppend(id="c1", role="user", content='Hola 🎶 \n "¿"', metadata={"lang": "es"}, user_id="u1"))
        do(engine, EscalationOpen(id="c1", reason="help", contact_info={"mobile": "57"}, priority="high"))
        engine.flush("api")
        seq = engine.status()["seq"]

    shown = mirrored(tmp_path)["c1"]
    assert list(shown) == [
        "id", "created_at", "updated_at", "title", "user_id", "messages", "escalated", "_holdfast",
    ]  # fmt: skip
    assert shown["messages"] == [{"role": "user", "content": 'Hola 🎶 \n "¿"', "lang": "es"}]
    assert (shown["created_at"], shown["escalated"]) == ("2026-11-21T06:00:00.000Z", True)
    assert shown["_holdfast"] == {"seq": seq}
    assert mirrored(tmp_path, "escalations") == {
        "c1_escalation": {
            "conversation_id": "c1",
            "timestamp": "2026-11-21T06:00:00.000Z",
            "reason": "help",
            "contact_info": {"mobile": "57"},
            "priority": "high",
            "status": "pending",
            "_holdfast": {"seq": seq},
        }
    }


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    """A flush rewrites the files of the conversations that were touched since the last one, and of no others."""
    with running(tmp_path, mirror=True) as engine:
        for id in ("a", "b", "c"):
            append(engine, id, "Hola")
        engine.flush("api")
        before = {path.name: path.stat().st_ino for path in (tmp_path / "conversations").iterdir()}
        append(engine, "b", "more")
        do(engine, SessionPut(id="a", value={}))
        engine.flush("api")
        after = {path.name: path.stat().st_ino for path in (tmp_path / "conversations").iterdir()}

    assert {name for name in after if after[name] != before[name]} == {"b.json"}
    assert contents(tmp_path)["b"] == ["Hola", "more"]


def test_files_go_with_what_they_show(tmp_path: Path) -> None:
    """A conversation that was deleted has no file after the next flush, nor has its escalation; one made anew has a new one."""
    with running(tmp_path, mirror=True) as engine:
        for id in ("a", "b"):
            append(engine, id, "Hola")
            do(engine, EscalationOpen(id=id, reason="help"))
        engine.flush("api")
        do(engine, ConversationDelete(id="a"))
        do_together(engine, ConversationDelete(id="b"), ConversationPut(id="b", value={"title": "new"}))
        engine.flush("api")

    assert contents(tmp_path) == {"b": []}
    assert mirrored(tmp_path, "escalations") == {}


def test_a_long_conversation_is_written_whole(tmp_path: Path) -> None:
    """More messages than one page has, each once, in order."""
    with running(tmp_path, mirror=True) as engine:
        for start in range(0, 2_500, 500):
            append(engine, "long", *(f"{number}" for number in range(start, start + 500)))
        engine.flush("api")

    assert contents(tmp_path) == {"long": [f"{number}" for number in range(2_500)]}


def test_no_id_leads_out_of_its_place(tmp_path: Path) -> None:
    """Every id has one file of its own in the directory, which is nobody else's, hidden or too long."""
    data = tmp_path / "data"
    with running(data, mirror=True) as engine:
        for id in HOSTILE:
            append(engine, id, id)
            do(engine, EscalationOpen(id=id, reason="help"))
        engine.flush("api")

    assert {shown["id"] for shown in mirrored(data).values()} == set(HOSTILE)
    assert {shown["conversation_id"] for shown in mirrored(data, "escalations").values()} == set(HOSTILE)
    names = [path.name for place in ("conversations", "escalations") for path in (data / place).iterdir()]
    assert len(names) == 2 * len(HOSTILE)
    assert not [name for name in names if name.startswith(".") or len(name.encode()) > NAME_BYTES_MAX + 20]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_two_ids_share_a_name() -> None:
    """Not even one that looks like the encoded form of the other, or that begins the same for long."""
    ids = [*HOSTILE, "%2E%2E", "..%2Fx", "x" * 255, "x" * 200, "x" * 201, "x" * 150 + "~", "A", "a%20b", "a+b"]

    assert len({file_name(id, ".json") for id in ids}) == len(ids)
    assert file_name("573001234567", ".json") == "573001234567.json"


def test_a_crash_before_the_flush_loses_nothing_of_it(tmp_path: Path) -> None:
    """What changed since the last flush stands in the journal, and in the mirror after the next flush."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one")
        append(engine, "b", "one")
        engine.flush("api")
        append(engine, "a", "two")
        do(engine, ConversationDelete(id="b"))
    with running(tmp_path, mirror=True) as engine:
        append(engine, "c", "three")
        engine.flush("api")

        assert contents(tmp_path) == {"a": ["one", "two"], "c": ["three"]}


def test_a_crash_while_files_are_written_loses_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshots are newer than the mirror then; what it still lacks is known, and written after the next flush."""
    with running(tmp_path, mirror=True) as engine:
        for id in ("a", "b", "c"):
            append(engine, id, "one")
        engine.flush("api")
        append(engine, "b", "two")
        do(engine, ConversationDelete(id="c"))
        with monkeypatch.context() as broken:
            broken.setattr("holdfast.care.mirror._Writing.write", lambda self, ids: _raise(OSError("cut off")))
            engine.flush("api")
        assert contents(tmp_path)["b"] == ["one"]
        assert json.loads((tmp_path / "_mirror.json").read_text()) == {"seq": 5, "pending": ["b", "c"]}
    inode = (tmp_path / "conversations" / "a.json").stat().st_ino
    with running(tmp_path, mirror=True) as engine:
        engine.flush("api")

        assert contents(tmp_path) == {"a": ["one"], "b": ["one", "two"]}
        assert json.loads((tmp_path / "_mirror.json").read_text())["pending"] == []
    assert (tmp_path / "conversations" / "a.json").stat().st_ino == inode


@pytest.mark.parametrize(
    "state", [None, b"", b"[]", b'{"seq":0,"pending":[]}', b'{"seq":999,"pending":[]}', b'{"seq":9}']
)
def test_without_its_state_everything_is_written(state: bytes | None, tmp_path: Path) -> None:
    """When it is not known how far the mirror is, all files are written, and those of nobody removed."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one")
        append(engine, "gone", "one")
        engine.flush("api")
    with running(tmp_path, mirror=False) as engine:
        append(engine, "a", "two")
        append(engine, "b", "new")
        do(engine, ConversationDelete(id="gone"))
        engine.flush("api")
    if state is None:
        (tmp_path / "_mirror.json").unlink()
    else:
        (tmp_path / "_mirror.json").write_bytes(state)
    (tmp_path / "conversations" / "foreign.json").write_text('{"not": "ours"}')
    with running(tmp_path, mirror=True) as engine:
        engine.flush("api")

    assert contents_of_ours(tmp_path) == {"a": ["one", "two"], "b": ["new"]}


def contents_of_ours(data: Path) -> dict[str, list[str]]:
    return {
        name: [message["content"] for message in shown["messages"]]
        for name, shown in mirrored(data).items()
        if "_holdfast" in shown
    }


def test_switched_off_it_leaves_what_is_there(tmp_path: Path) -> None:
    """Its files stay, are not taken for an old bot's at a start, and are brought up to date when it is switched on again."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one")
        engine.flush("api")
    log = Log()
    with running(tmp_path, mirror=False, log=log) as engine:
        append(engine, "a", "two")
        engine.flush("api")
        assert contents(tmp_path) == {"a": ["one"]}
        assert engine.count("conversations") == 1
    with running(tmp_path, mirror=True) as engine:
        engine.flush("api")
        assert contents(tmp_path) == {"a": ["one", "two"]}
    assert log.named("conversations.imported") == []


def test_it_never_makes_a_flush_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is told once, shown as degraded, and written when it can be again."""
    log = Log()
    stage = Directory.stage

    def refuse(self: Directory, name: str, *rest: Any) -> Any:
        if self.path.name == "conversations":
            raise OSError(28, "No space left on device")
        return stage(self, name, *rest)

    with running(tmp_path, mirror=True, log=log) as engine:
        append(engine, "a", "one")
        with monkeypatch.context() as full:
            full.setattr(Directory, "stage", refuse)
            assert engine.flush("api").snapshot_seq == 1
            assert engine.flush("api").snapshot_seq == 1
            assert "the readable mirror cannot be written: No space left" in engine.degraded[0]
        engine.flush("api")

        assert engine.degraded == []
        assert contents(tmp_path) == {"a": ["one"]}
    assert len(log.named("mirror.failed")) == len(log.named("mirror.resumed")) == 1


def test_one_file_that_cannot_be_written_keeps_no_other_back(tmp_path: Path) -> None:
    """A directory in the place of a file is told without its name; all others are up to date."""
    with running(tmp_path, mirror=True) as engine:
        (tmp_path / "conversations" / "b.json").mkdir(parents=True)
        for id in ("a", "b", "c"):
            append(engine, id, "one")
        engine.flush("api")
        (reason,) = engine.degraded
        (tmp_path / "conversations" / "b.json").rmdir()
        engine.flush("api")

        assert contents(tmp_path) == {id: ["one"] for id in ("a", "b", "c")}
        assert engine.degraded == []
    assert "directory" in reason and "b.json" not in reason


def test_it_follows_no_link(tmp_path: Path) -> None:
    """A link in the place of a file is replaced, what it leads to stays; one in the place of the directory is refused."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.json").write_text("precious")
    data = tmp_path / "data"
    with running(data, mirror=True) as engine:
        (data / "conversations").mkdir()
        (data / "conversations" / "a.json").symlink_to(outside / "precious.json")
        (data / "escalations").symlink_to(outside)
        append(engine, "a", "one")
        engine.flush("api")
        assert "must be a directory of ours" in engine.degraded[0]
        (data / "escalations").unlink()
        engine.flush("api")
        assert engine.degraded == []

    assert contents(data) == {"a": ["one"]}
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("precious.json", "precious")]


def test_a_file_that_somebody_else_wrote_is_kept(tmp_path: Path) -> None:
    """What an old bot puts in our place while we run is copied aside before it is replaced."""
    with running(tmp_path, mirror=True) as engine:
        (tmp_path / "conversations").mkdir()
        (tmp_path / "conversations" / "a.json").write_text('{"id": "a", "messages": []}')
        append(engine, "a", "one")
        engine.flush("api")

    assert contents(tmp_path) == {"a": ["one"]}
    assert [path.read_text() for path in tmp_path.glob("backups/edited-*/a.json")] == ['{"id": "a", "messages": []}']


def test_its_files_are_for_the_owner_only(tmp_path: Path) -> None:
    """0600 in directories that are 0700, and nothing unfinished among them."""
    with running(tmp_path / "data", mirror=True) as engine:
        append(engine, "a", "one")
        do(engine, EscalationOpen(id="a", reason="help"))
        do(engine, ConversationHold(id="a"))
        engine.flush("api")

    for place in ("conversations", "escalations"):
        directory = tmp_path / "data" / place
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()] == [0o600]
    assert os.listdir(tmp_path / "data" / "conversations") == ["a.json"]


def test_the_last_flush_writes_it_as_well(tmp_path: Path) -> None:
    """After a clean stop the mirror is complete, and the next start has nothing to do."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one")
        engine.close()

    assert contents(tmp_path) == {"a": ["one"]}
    assert json.loads((tmp_path / "_mirror.json").read_text()) == {"seq": 1, "pending": []}


def _raise(error: Exception) -> None:
    raise error


def test_what_changes_while_it_is_written_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the flush that noted it, although the one before was still at the same conversation."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "c", "one")
        write = mirror._Writing.write

        def write_and_be_overtaken(self: Any, ids: list[str]) -> Any:
            written = write(self, ids)
            monkeypatch.setattr(mirror._Writing, "write", write)
            append(engine, "c", "two")
            # As the next flush does, which does not wait for a mirror that is slow.
            engine._flusher.before_publishing(engine.status()["seq"])
            return written

        monkeypatch.setattr(mirror._Writing, "write", write_and_be_overtaken)
        engine.flush("api")
        assert json.loads((tmp_path / "_mirror.json").read_text())["pending"] == ["c"]
        engine.flush("api")

    assert contents(tmp_path) == {"c": ["one", "two"]}
