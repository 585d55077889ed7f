"""The readable mirror: after each flush the files show what is there, whatever happened before."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.care import legacy, mirror
from holdfast.care.mirror import NAME_BYTES_MAX, file_name
from holdfast.disk.files import Directory
from holdfast.engine import Engine
from holdfast.errors import StorageFull
from holdfast.ops import (
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    MessageExpire,
    SessionPut,
)
from tests.engine_harness import NOW_MS, HandClock, Log, do, do_together, opened, running, value_of

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
        "id", "created_at", "updated_at", "title", "user_id", "messages", "escalated", "_holdfast_kept", "_holdfast",
    ]  # fmt: skip
    assert shown["messages"] == [{"role": "user", "content": 'Hola 🎶 \n "¿"', "lang": "es"}]
    assert (shown["created_at"], shown["escalated"]) == ("2026-11-21T06:00:00.000Z", True)
    assert shown["_holdfast"] == {"seq": seq}
    lineage = json.loads((tmp_path / "manifest.json").read_text())["lineage"]
    assert shown["_holdfast_kept"] == {
        "lineage": lineage,
        "messages": [[1, "2026-11-21T06:00:00.000Z", None, "customer"]],
        "archived": False,
        "hold": False,
        "hold_reason": None,
    }
    assert mirrored(tmp_path, "escalations") == {
        "c1_escalation": {
            "conversation_id": "c1",
            "timestamp": "2026-11-21T06:00:00.000Z",
            "reason": "help",
            "contact_info": {"mobile": "57"},
            "priority": "high",
            "status": "pending",
            "_holdfast_kept": {"lineage": lineage, "messages": []},
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
        assert state_of(tmp_path) == {"seq": 5, "pending": ["b", "c"]}
    inode = (tmp_path / "conversations" / "a.json").stat().st_ino
    with running(tmp_path, mirror=True) as engine:
        engine.flush("api")

        assert contents(tmp_path) == {"a": ["one"], "b": ["one", "two"]}
        assert json.loads((tmp_path / "_mirror.json").read_text())["pending"] == []
    assert (tmp_path / "conversations" / "a.json").stat().st_ino == inode


def state_of(data: Path) -> dict[str, Any]:
    """How far the mirror is; of a directory that has lost nothing."""
    state: dict[str, Any] = json.loads((data / "_mirror.json").read_text())
    assert state.pop("lineage") == json.loads((data / "manifest.json").read_text())["lineage"]
    return state


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
    assert state_of(tmp_path) == {"seq": 1, "pending": []}


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


def lived(data: Path, *, holds: bool = True) -> dict[str, Any]:
    """Have a mirror of some conversations in *data*; they, as they are shown."""
    with running(data, mirror=True) as engine:
        do(engine, MessageAppend(id="plain", role="user", content="Hola", user_id="57", metadata={"lang": "es"}))
        do(engine, MessageAppend(id="plain", role="assistant", content="¿Sí?", tokens_used=7))
        do(engine, MessageAppend(id="plain", role="user", content="64", channel="wa", external_id="w1"))
        do(engine, MessageAppend(id="plain", role="assistant", content="Soy Ana", author="agent"))
        do(engine, MessageAppend(id="plain", role="tool", content="3", author="bot", created_at="2026-11-20T01:02:03Z"))
        do(engine, EscalationOpen(id="plain", reason="help", priority="high", contact_info={"mobile": "57"}))
        append(engine, "a/b", "one")
        do(engine, ConversationArchive(id="a/b"))
        do(engine, ConversationPut(id="empty", value={"title": "nothing yet"}))
        if holds:
            do(engine, ConversationHold(id="empty", reason="the court"))
        engine.flush("api")
        return shown_by(engine)


def shown_by(engine: Engine) -> dict[str, Any]:
    """Every conversation with its messages, and every escalation, but for what tells who deals with it."""
    shown: dict[str, Any] = {}
    for item in engine.transcripts.page().items:
        whole = engine.transcripts.conversation(item.id)
        assert whole is not None
        shown[item.id] = orjson.loads(whole.value)
        escalation = value_of(engine, "escalations", item.id)
        shown[item.id]["escalation"] = escalation and {**escalation, "updated_at": None}
    return shown


def only_the_mirror(data: Path, target: Path) -> Path:
    """A new data directory with nothing in it but the mirror of *data*."""
    target.mkdir(mode=0o700)
    for place in ("conversations", "escalations"):
        shutil.copytree(data / place, target / place)
    return target


@pytest.mark.parametrize("is_mirrored", [True, False])
def test_the_only_copy_left_is_taken_over(is_mirrored: bool, tmp_path: Path) -> None:
    """In a directory with nothing but a mirror all comes back that it shows, once, and the files are kept and written anew."""
    before = lived(tmp_path / "old")
    data = only_the_mirror(tmp_path / "old", tmp_path / "new")
    names = sorted(path.name for path in (data / "conversations").iterdir())
    log = Log()

    with running(data, mirror=is_mirrored, log=log) as engine:
        assert shown_by(engine) == before
        engine.flush("api")
        assert engine.degraded == []
        assert sorted(mirrored(data)) == ([name.removesuffix(".json") for name in names] if is_mirrored else [])
    with running(data, mirror=is_mirrored, log=log) as engine:
        assert shown_by(engine) == before

    (told,) = log.named("conversations.imported")
    assert (told["conversations"], told["messages"], told["escalations"], told["broken"]) == (3, 6, 1, 0)
    assert sorted(path.name for path in data.glob("backups/imported-*/conversations/*")) == names
    assert log.named("mirror.files_kept") == []


def test_taking_over_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far it came, also over a flush in between: the next start takes what is left, and nothing is taken for a stray."""
    before = lived(tmp_path / "old")
    submit = legacy._Import._submit
    left = 0

    def submit_some(self: Any, id: str, ops: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        submit(self, id, ops)
        self._settle()
        self._engine.flush("api")

    for taken in range(len(before) + 1):
        data = only_the_mirror(tmp_path / "old", tmp_path / f"new{taken}")
        left = taken
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(legacy._Import, "_submit", submit_some)
            with running(data, mirror=True):
                pass
        with running(data, mirror=True) as engine:
            engine.flush("api")
            assert shown_by(engine) == before
        assert len(mirrored(data)) == len(before)
        assert list(data.glob("backups/edited-*")) == []


def test_taking_over_that_fails_keeps_the_mirror_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for all, what was taken is there, what was not is not written over, and what is deleted meanwhile stays so."""
    before = lived(tmp_path / "old", holds=False)
    data = only_the_mirror(tmp_path / "old", tmp_path / "new")
    submit = legacy._Import._submit

    def submit_one(self: Any, id: str, ops: Any) -> None:
        if self._begun:
            raise StorageFull("no room")
        submit(self, id, ops)

    with monkeypatch.context() as full:
        full.setattr(legacy._Import, "_submit", submit_one)
        with running(data, mirror=True) as engine:
            assert "could not be taken over" in engine.degraded[0]
            (first,) = shown_by(engine)
            do(engine, ConversationDelete(id=first))
            engine.flush("api")
    with running(data, mirror=True) as engine:
        engine.flush("api")

        assert shown_by(engine) == {id: shown for id, shown in before.items() if id != first}
    assert list(data.glob("backups/edited-*")) == []


@pytest.mark.parametrize("lost", ["_conversations.json", "a copy from elsewhere", "without its state"])
def test_what_nobody_else_has_is_not_removed(lost: str, tmp_path: Path) -> None:
    """A file whose conversation is not here, and was not deleted here, is moved aside and told."""
    before = lived(tmp_path / "old")
    data = tmp_path / "old"
    strays = set(before)
    if lost == "_conversations.json":
        lose_the_archive(data)
        for name in ("_conversations.json", "_escalations.json"):
            (data / name).write_bytes(b"[\n]")
    else:
        data = tmp_path / "new"
        with running(data, mirror=True) as engine:
            append(engine, "mine", "one")
            engine.flush("api")
        for place in ("conversations", "escalations"):
            shutil.copytree(tmp_path / "old" / place, data / place, dirs_exist_ok=True)
        if lost == "without its state":
            (data / "_mirror.json").unlink()
        else:
            # As after some time without a mirror.
            with running(data) as engine:
                append(engine, "mine", "two")
                engine.flush("api")
    log = Log()

    with running(data, mirror=True, log=log) as engine:
        engine.flush("api")
        engine.flush("api")
        assert not strays & set(mirrored(data))

    kept = [json.loads(path.read_text()) for path in data.glob("backups/edited-*/*.json")]
    assert {shown["id"] for shown in kept if "id" in shown} == strays
    assert [shown["conversation_id"] for shown in kept if "id" not in shown] == ["plain"]
    (told,) = log.named("mirror.files_kept")
    assert told["files"] == len(strays) + 1
    assert (data / told["kept_in"]).is_dir()


def test_what_was_deleted_is_kept_nowhere(tmp_path: Path) -> None:
    """Neither with the mirror off meanwhile, nor after a kill before the flush, nor when the file has to be looked for."""
    lived(tmp_path, holds=False)
    log = Log()
    with running(tmp_path, log=log) as engine:
        do(engine, ConversationDelete(id="plain"))
        engine.flush("api")
    with running(tmp_path, log=log) as engine:
        do(engine, ConversationDelete(id="empty"))
    with running(tmp_path, mirror=True, log=log) as engine:
        do(engine, ConversationDelete(id="a/b"))
    with running(tmp_path, mirror=True, log=log) as engine:
        engine.flush("api")
        assert engine.count("conversations") == 0

    assert mirrored(tmp_path) == mirrored(tmp_path, "escalations") == {}
    assert list(tmp_path.glob("backups/edited-*")) == log.named("conversations.imported") == []


def lose_the_archive(data: Path) -> None:
    """And all that it could be made from."""
    for path in [*data.glob("archive.db*"), *data.glob("journal/*.jsonl"), *data.glob("journal/kept/*")]:
        path.unlink()


@pytest.mark.parametrize("is_mirrored", [True, False])
def test_an_archive_is_made_anew_from_it(is_mirrored: bool, tmp_path: Path) -> None:
    """Messages that neither archive, journal nor backups have come from the mirror, as they were and with their numbers."""
    before = lived(tmp_path)
    lose_the_archive(tmp_path)
    log = Log()

    with running(tmp_path, mirror=is_mirrored, log=log) as engine:
        assert shown_by(engine) == before
        append(engine, "plain", "more")
        assert [one["number"] for one in shown_by(engine)["plain"]["messages"]] == [1, 2, 3, 4, 5, 6]
        engine.flush("api")

    assert list(tmp_path.glob("backups/edited-*")) == log.named("archive.rebuilt") == []


def test_what_was_let_go_does_not_come_back_from_it(tmp_path: Path) -> None:
    """Neither what retention removed, nor the messages of an earlier conversation with the same id."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "aged", "one", "two", "three")
        append(engine, "again", "of the first life")
        engine.flush("api")
    with running(tmp_path) as engine:
        do(engine, MessageExpire(id="aged", up_to=2, before_ms=NOW_MS + 1, messages=2, system=0, tokens=0))
        do(engine, ConversationDelete(id="again"))
        append(engine, "again", "of the second life")
        engine.flush("api")
    lose_the_archive(tmp_path)

    with running(tmp_path, mirror=True) as engine:
        assert [one["content"] for one in shown_by(engine)["aged"]["messages"]] == ["three"]
        assert shown_by(engine)["again"]["messages"] == []
        engine.flush("api")
        assert contents(tmp_path) == {"aged": ["three"], "again": []}
    kept = [path.read_text() for path in tmp_path.glob("backups/edited-*/*")]
    assert not [text for text in kept if "one" in text or "first life" in text]


@pytest.mark.parametrize("says_numbers", [True, False])
def test_a_fuller_file_is_kept_before_it_is_replaced(
    says_numbers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the archive has lost messages that only the file shows, once; how many came since does not matter."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one", "two")
        engine.flush("api")
    path = tmp_path / "conversations" / "a.json"
    if not says_numbers:
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "_holdfast_kept" not in line))
    original = path.read_bytes()
    lose_the_archive(tmp_path)
    monkeypatch.setattr("holdfast.care.candidates._mirrored_messages", lambda settings, heads: [])

    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "three", "four", "five")
        engine.flush("api")
        append(engine, "a", "six")
        engine.flush("api")

    assert contents(tmp_path) == {"a": ["three", "four", "five", "six"]}
    assert [kept.read_bytes() for kept in tmp_path.glob("backups/edited-*/a.json")] == [original]


def test_a_file_of_before_that_says_no_numbers_is_taken_when_it_shows_all(tmp_path: Path) -> None:
    """A shorter one is not: nobody knows which of the messages it shows."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "all", "one", "two")
        append(engine, "some", "one", "two")
        engine.flush("api")
    for id in ("all", "some"):
        path = tmp_path / "conversations" / f"{id}.json"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "_holdfast_kept" not in line))
    with running(tmp_path) as engine:
        append(engine, "some", "three")
        engine.flush("api")
    lose_the_archive(tmp_path)

    with running(tmp_path) as engine:
        shown = shown_by(engine)
        assert [(one["number"], one["content"]) for one in shown["all"]["messages"]] == [(1, "one"), (2, "two")]
        assert shown["some"]["messages"] == []


def test_two_messages_that_look_the_same_are_two(tmp_path: Path) -> None:
    """An old bot's own external ids, which tell nothing from one another, drop none when the file is taken over."""
    old = {"role": "user", "content": "Hola", "external_id": "x"}
    conversation = {"id": "c", "created_at": "2026-11-01T10:00:00", "messages": [old, old]}
    (tmp_path / "old" / "conversations").mkdir(parents=True)
    (tmp_path / "old" / "conversations" / "c.json").write_text(json.dumps(conversation))
    with running(tmp_path / "old", mirror=True) as engine:
        engine.flush("api")
    (tmp_path / "old" / "escalations").mkdir(exist_ok=True)

    with running(only_the_mirror(tmp_path / "old", tmp_path / "new"), mirror=True) as engine:
        engine.flush("api")

    assert mirrored(tmp_path / "new")["c"]["messages"] == [old, old]


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_conversation_that_begins_anew_replaces_only_what_was_deleted(is_lost: bool, tmp_path: Path) -> None:
    """The file of one that was lost is kept before the new one with its id is written; of one that was deleted it is not."""
    with running(tmp_path, mirror=True) as engine:
        append(engine, "a", "one")
        engine.flush("api")
    if is_lost:
        lose_the_archive(tmp_path)
        (tmp_path / "_conversations.json").unlink()
    else:
        with running(tmp_path) as engine:
            do(engine, ConversationDelete(id="a"))

    with running(tmp_path, mirror=True, clock=HandClock(NOW_MS + 1_000)) as engine:
        append(engine, "a", "two")
        engine.flush("api")

    assert contents(tmp_path) == {"a": ["two"]}
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("backups/edited-*/a.json")]
    assert [[one["content"] for one in shown["messages"]] for shown in kept] == ([["one"]] if is_lost else [])


def test_a_start_that_is_killed_before_it_takes_a_mirror_over_does_so_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the mirror is to be taken over is noted before anything else is begun."""
    with running(tmp_path / "one", mirror=True) as engine:
        do(engine, MessageAppend(id="c", role="user", content="Hola"))
        engine.flush("api")
    (tmp_path / "two").mkdir(mode=0o700)
    shutil.copytree(tmp_path / "one" / "conversations", tmp_path / "two" / "conversations")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("holdfast.recovery.import_old_files", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path / "two", mirror=True)

    with running(tmp_path / "two", mirror=True) as engine:
        assert engine.count("conversations") == 1
