"""Old conversations take less room and are read, searched and let go as before; compacting gives the room back."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from holdfast.archive import sqlite as sqlite_module
from holdfast.archive.base import Archive, ArchiveDamaged, Condensed, MessageQuery
from holdfast.archive.sqlite import SQLiteArchive, open_sqlite
from holdfast.archive.sqlite_packed import SHARED_BY, Text, blocks_of, train
from holdfast.archive.sqlite_salvage import salvage
from holdfast.care import compact as compact_module
from holdfast.care.compact import compact
from holdfast.care.retention import Daily
from holdfast.core.event import StoredMessage
from holdfast.errors import Conflict, StorageFull, Unavailable
from holdfast.ops import ConversationArchive, MessageAppend
from tests.engine_harness import Log, do, running
from tests.test_archive import IMPLEMENTATIONS, T0_MS, appended, apply, changed, deleted, head_of, message

PHRASES = ("Hola, quiero hacer un pedido para hoy", "Claro que sí, ¿cuál es su dirección?", "Muchas gracias por todo")


@pytest.fixture(params=IMPLEMENTATIONS)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    archive = IMPLEMENTATIONS[request.param](tmp_path)
    yield archive
    wrong = archive.check()
    archive.close()
    assert not wrong


def talk(id: str, turns: int, **fields: Any) -> list[StoredMessage]:
    """Messages as a bot and a customer write them, some of them odd."""
    odd = ["", "\0", "ñandú 🦔", "x" * 40_000]
    return [
        message(
            number,
            T0_MS + number * 1000,
            role="user" if number % 2 else "assistant",
            author="customer" if number % 2 else "bot",
            content=odd[number] if number < len(odd) and id.endswith("7") else f"{PHRASES[number % 3]}, {id} {number}",
            metadata=msgspec.Raw(orjson.dumps({"channel": "whatsapp", "n": number}))
            if number % 4
            else msgspec.Raw(b""),
            **fields,
        )
        for number in range(1, turns + 1)
    ]


def filled(archive: Archive, conversations: int = 30, turns: int = 12) -> list[str]:
    """Conversations, two of three of them archived; their ids."""
    ids = [f"c{index}" for index in range(conversations)]
    for index, id in enumerate(ids):
        apply(archive, appended(head_of(id, turns, archived=index % 3 > 0), *talk(id, turns)))
    return ids


def condensed(archive: Archive) -> Condensed:
    """All of it, step by step."""
    total, after = Condensed(), ""
    while True:
        step = archive.condense(after)
        total = Condensed(
            total.messages + step.messages,
            total.bytes_before + step.bytes_before,
            total.bytes_after + step.bytes_after,
        )
        if step.after is None:
            return total
        after = step.after


def everything(archive: Archive, ids: list[str]) -> dict[str, list[StoredMessage]]:
    return {id: archive.messages(id, MessageQuery(limit=100_000)) for id in ids}


def test_what_is_packed_is_read_as_before(archive: Archive) -> None:
    """By every filter, in both directions, page by page; only archived conversations are packed, and only once."""
    ids = filled(archive)
    questions = [
        MessageQuery(),
        MessageQuery(limit=3),
        MessageQuery(limit=3, newest=False, after=4),
        MessageQuery(role="assistant"),
        MessageQuery(author="customer", before=9),
        MessageQuery(since_ms=T0_MS + 3000, until_ms=T0_MS + 8000),
    ]
    before = [archive.messages(id, question) for id in ids for question in questions]
    figures, heads = archive.figures(T0_MS), archive.message_counts()

    done = condensed(archive)

    assert done.messages == 20 * 12
    assert done.bytes_after < done.bytes_before / 2
    assert [archive.messages(id, question) for id in ids for question in questions] == before
    assert archive.message_counts() == heads
    assert archive.figures(T0_MS).messages == figures.messages
    assert condensed(archive).messages == 0


def test_a_packed_conversation_goes_on(archive: Archive) -> None:
    """A new message stands behind the packed ones, and is packed in its turn once the conversation is archived again."""
    filled(archive)
    condensed(archive)
    before = everything(archive, ["c1"])["c1"]
    new = message(13, T0_MS + 20_000, content="and one more " * 20)

    apply(archive, appended(head_of("c1", 13), new))
    assert everything(archive, ["c1"])["c1"] == [*before, new]
    assert condensed(archive).messages == 0

    apply(archive, changed("conversation.archive", head_of("c1", 14, archived=True)))
    assert condensed(archive).messages == 1
    assert everything(archive, ["c1"])["c1"] == [*before, new]


def test_messages_of_a_block_can_go_one_by_one(archive: Archive) -> None:
    """What is left of their block is there, and may be packed again; how much goes is told as before."""
    filled(archive, turns=50)
    before = everything(archive, ["c1", "c2"])
    told = archive.expirable(T0_MS + 5500, 100)
    condensed(archive)
    assert archive.expirable(T0_MS + 5500, 100) == told

    apply(
        archive,
        changed("message.expire", head_of("c1", 51, archived=True), before=T0_MS + 5500, up_to=50),
        deleted("c2"),
    )

    assert everything(archive, ["c1"])["c1"] == before["c1"][5:]
    assert everything(archive, ["c2"])["c2"] == []
    assert archive.check() == []
    assert condensed(archive).messages > 0
    assert everything(archive, ["c1"])["c1"] == before["c1"][5:]


def test_what_changes_meanwhile_is_not_packed(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and packing a conversation is deleted, made anew, appended to: nothing of that is lost."""
    ids = filled(archive, 9, 3)
    read = SQLiteArchive._to_pack
    anew = [message(number, T0_MS, content="anew") for number in (1, 2, 3)]

    def read_then_change(self: SQLiteArchive, id: str, *arguments: Any) -> Any:
        found = read(self, id, *arguments)
        if id == "c8":
            # The last row: who comes next gets its key again.
            apply(archive, deleted("c8"), appended(head_of("new", 3, archived=True), *anew))
        elif id == "c1":
            apply(archive, appended(head_of("c1", 4), message(4, content="late")))
        return found

    before = everything(archive, ids)
    monkeypatch.setattr(SQLiteArchive, "_to_pack", read_then_change)
    condensed(archive)

    assert everything(archive, ["new"])["new"] == anew
    assert [one.content for one in everything(archive, ["c1"])["c1"]][-1] == "late"
    assert everything(archive, ["c4"])["c4"] == before["c4"]
    assert archive.check() == []


def test_a_long_conversation_is_packed_in_steps(tmp_path: Path) -> None:
    """Each is one short transaction, and the next goes on where it ended."""
    archive = open_sqlite(tmp_path / "archive.db")
    apply(archive, appended(head_of("long", 1_000, archived=True), *talk("long", 1_000)))
    before = everything(archive, ["long"])

    steps = 1
    while archive.condense().after is not None:
        steps += 1
        assert everything(archive, ["long"]) == before
    assert steps > 1_000 // sqlite_module.PACK_MESSAGES
    assert archive.check() == []
    archive.close()


def test_killed_while_it_packs(tmp_path: Path) -> None:
    """At whatever moment: the next start has every message, and packs the rest."""
    archive = open_sqlite(tmp_path / "archive.db")
    ids = filled(archive, 120, 20)
    before = everything(archive, ids)
    archive.close()
    program = (
        "import sys; from holdfast.archive.sqlite import open_sqlite; from pathlib import Path\n"
        "archive = open_sqlite(Path(sys.argv[1])); after = ''; print('ready', flush=True)\n"
        "while after is not None: after = archive.condense(after).after\n"
    )
    for pause_s in (0.005, 0.02, 0.06):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "archive.db")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(pause_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()

        archive = open_sqlite(tmp_path / "archive.db")
        assert everything(archive, ids) == before
        assert archive.check() == []
        archive.close()
    archive = open_sqlite(tmp_path / "archive.db")
    condensed(archive)
    assert everything(archive, ids) == before
    archive.close()


def test_an_archive_of_the_version_before_is_brought_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored without packing is read, and packed."""
    from holdfast.archive import sqlite_file

    scripts = sqlite_file._migrations()
    monkeypatch.setattr(sqlite_file, "_migrations", lambda: scripts[:1])
    connection = sqlite3.connect(tmp_path / "archive.db", isolation_level=None)
    sqlite_file._migrate(connection)
    connection.execute(
        "INSERT INTO conversations VALUES (1, 'c', 1, NULL, NULL, 0, 1, ?, ?, ?)",
        (T0_MS, T0_MS, head_of("c").value.decode()),
    )
    connection.execute(
        "INSERT INTO messages VALUES (?, ?, 7, NULL, ?, NULL, NULL, NULL)", ((1 << 32) + 1, T0_MS, "hola " * 50)
    )
    connection.execute("UPDATE totals SET conversations = 1, archived = 1, messages = 1, archived_seq = 1")
    connection.execute("INSERT INTO days VALUES (?, 1, 0)", (T0_MS // 86_400_000,))
    connection.close()
    monkeypatch.undo()

    archive = open_sqlite(tmp_path / "archive.db")

    assert condensed(archive).messages == 1
    assert [one.content for one in everything(archive, ["c"])["c"]] == ["hola " * 50]
    assert archive.describe()["schema_version"] == 2
    assert archive.check() == []
    archive.close()


# What happens when some of it is damaged.


def packed_file(path: Path, conversations: int = 300) -> dict[str, list[StoredMessage]]:
    """A closed archive, large enough for a dictionary."""
    archive = open_sqlite(path)
    ids = filled(archive, conversations, 8)
    whole = everything(archive, ids)
    condensed(archive)
    archive.close()
    return whole


def saved(path: Path) -> dict[str, list[StoredMessage]]:
    found: dict[str, list[StoredMessage]] = {}
    for id, messages in salvage(path):
        found.setdefault(id, []).extend(messages)
    return found


def test_everything_is_saved_of_a_whole_packed_file(tmp_path: Path) -> None:
    """With its dictionary, of which there is one."""
    whole = packed_file(tmp_path / "archive.db")
    connection = sqlite3.connect(tmp_path / "archive.db")
    assert connection.execute("SELECT id, copy FROM dictionaries ORDER BY 1, 2").fetchall() == [(1, 0), (1, 1)]
    connection.close()

    assert saved(tmp_path / "archive.db") == whole


def test_one_of_the_two_copies_of_a_dictionary_suffices(tmp_path: Path) -> None:
    """Whichever is damaged or gone."""
    whole = packed_file(tmp_path / "archive.db")
    for statement in (
        "UPDATE dictionaries SET content = zeroblob(1000) WHERE copy = 0",
        "DELETE FROM dictionaries WHERE copy = 0",
    ):
        connection = sqlite3.connect(tmp_path / "archive.db", isolation_level=None)
        connection.execute(statement)
        connection.close()

        archive = open_sqlite(tmp_path / "archive.db")
        assert everything(archive, list(whole)) == whole
        archive.close()


def test_a_lost_block_is_noticed_and_costs_what_is_in_it(tmp_path: Path) -> None:
    """Read, it is damage, so that the archive is made anew; of the old one everything else is saved."""
    whole = packed_file(tmp_path / "archive.db")
    connection = sqlite3.connect(tmp_path / "archive.db", isolation_level=None)
    connection.execute("DELETE FROM blocks WHERE place = (SELECT min(place) FROM blocks)")
    (second,) = connection.execute("SELECT min(place) FROM blocks").fetchone()
    connection.execute(
        "UPDATE blocks SET texts = CAST(substr(texts, 1, length(texts) - 1) || x'00' AS BLOB) WHERE place = ?",
        (second,),
    )
    connection.close()

    archive = open_sqlite(tmp_path / "archive.db")
    assert any("without a block" in one for one in archive.check())
    for id in ("c1", "c2"):
        with pytest.raises(ArchiveDamaged, match="block"):
            archive.messages(id, MessageQuery())
    archive.close()

    assert saved(tmp_path / "archive.db") == {id: found for id, found in whole.items() if id not in ("c1", "c2")}


# The dictionary.


def test_a_dictionary_has_nothing_of_one_person(tmp_path: Path) -> None:
    """Only what several conversations say, three words at a time, and no digits: erasing leaves nothing there."""
    common = "Quiero hacer un pedido para hoy por favor. Mi número es 573001234567"
    conversations = [[common, f"Vivo en la calle de los secretos {index} con Margarita Xirinacs"] for index in range(4)]
    conversations += [[common, *PHRASES] for _ in range(60)]

    dictionary = train(conversations)

    assert dictionary is not None
    assert b"Quiero hacer un pedido" in dictionary
    assert SHARED_BY > 4
    for personal in (b"573001234567", b"5730", b"secretos", b"Xirinacs"):
        assert personal not in dictionary


def test_too_little_to_learn_from_makes_no_dictionary() -> None:
    """Then blocks are packed without one."""
    assert train([]) is None
    assert train([[f"{index}"] for index in range(300)]) is None


def test_blocks_hold_neighbours_up_to_a_size() -> None:
    """A message that is too long for any has one of its own."""
    small, large = [Text(number, "x" * 100, None) for number in range(1, 40)], Text(40, "y" * 300_000, None)

    blocks = blocks_of([*small, large, Text(41, "z", "{}")])

    assert [len(block) for block in blocks] == [32, 7, 1, 1]


# In the engine.


def talked(engine: Any, conversations: int = 60, turns: int = 10) -> None:
    for index in range(conversations):
        for number in range(turns):
            engine.submit(
                MessageAppend(id=f"c{index}", role="user", content=f"{PHRASES[number % 3]} {index} {number} " * 8)
            )
        do(engine, ConversationArchive(id=f"c{index}"))


def transcripts(engine: Any, conversations: int = 60) -> list[Any]:
    return [engine.transcripts.messages(f"c{index}", limit=100) for index in range(conversations)]


def test_the_daily_run_packs_what_is_archived(tmp_path: Path) -> None:
    """Logged with what it came to; a second run has nothing to do."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        talked(engine)
        before = transcripts(engine)

        Daily(engine).run_when_due()
        Daily(engine).run_when_due()

        assert transcripts(engine) == before
    told = log.named("archive.condensed")
    assert len(told) == 1
    assert told[0]["messages"] == 600
    assert told[0]["bytes_after"] < told[0]["bytes_before"] / 2


def test_compacting_gives_back_room_while_others_write(tmp_path: Path) -> None:
    """No change is lost or held up for long, whenever it comes; the archive goes on where it was."""
    log = Log()
    with running(tmp_path, log=log) as engine:
        talked(engine, 120)
        engine.flush("api")
        written, slowest, stopping = 0, 0.0, threading.Event()

        def write() -> None:
            nonlocal written, slowest
            while not stopping.is_set():
                began = time.monotonic()
                do(engine, MessageAppend(id="busy", role="user", content=f"{written}"))
                slowest, written = max(slowest, time.monotonic() - began), written + 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            report = compact(engine)
            engine.flush("api")
        finally:
            stopping.set()
            writer.join()

        assert report.condensed_messages >= 1_200
        assert report.after["archive"].bytes < report.before["archive"].bytes
        assert written > 10
        assert slowest < 5.0
        contents = [
            orjson.loads(one.value)["content"] for one in engine.transcripts.messages("busy", limit=1_000).items
        ]
        assert contents[-5:] == [str(number) for number in range(written - 5, written)]
        before = transcripts(engine)
        assert not (tmp_path / "archive.compact.db").exists()
        assert len(log.named("data.compacted")) == 1
        assert not log.named("archive.damaged")
    with running(tmp_path, log=log) as engine:
        assert transcripts(engine) == before
        assert engine.degraded == []
        assert not log.named("archive.damaged")


def test_compacting_twice_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second hears that it is under way; the first goes on."""
    with running(tmp_path) as engine:
        talked(engine, 3)
        condensing = compact_module.condense

        def again(*arguments: Any) -> Any:
            with pytest.raises(Conflict, match="under way"):
                compact(engine)
            return condensing(*arguments)

        monkeypatch.setattr(compact_module, "condense", again)

        assert compact(engine).condensed_messages == 30


def test_compacting_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how much, and leaves everything as it was."""
    with running(tmp_path) as engine:
        talked(engine, 3)
        before = transcripts(engine, 3)
        monkeypatch.setattr(engine._flusher, "disk_space", lambda: (1000, 1 << 40))

        with pytest.raises(StorageFull, match="free space first"):
            engine.compact_archive()

        assert transcripts(engine, 3) == before


def test_a_stop_breaks_compacting_off(tmp_path: Path) -> None:
    """The archive is as it was, and nothing half made remains."""
    with running(tmp_path) as engine:
        talked(engine)
        before = transcripts(engine)

        with pytest.raises(Unavailable):
            engine.compact_archive(lambda: True)

        assert transcripts(engine) == before
        assert not list(tmp_path.glob("archive.compact.db*"))


@pytest.mark.parametrize("step", ["discard", "companions", "rename", "open"])
def test_killed_while_the_compacted_archive_takes_its_place(tmp_path: Path, step: str) -> None:
    """Whichever of the two is there afterwards has everything, or gets the rest from the journal."""
    program = f"""
import os, signal
from holdfast.archive import place
from tests.engine_harness import opened
from tests.test_packed import talked
from pathlib import Path

engine = opened(Path({str(tmp_path / "data")!r}))
talked(engine)
engine.flush("api")
talked(engine, 5, 2)
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
kept = place.DataDirectoryPlace
def wrapped(name, before):
    real = getattr(kept, name)
    def call(self, *arguments):
        before or real(self, *arguments)
        die()
    setattr(kept, name, call)
step = {step!r}
if step == "discard":
    wrapped("adopt_compacted", True)
elif step == "companions":
    real = kept._remove_companions
    def removing(self, directory, name):
        real(self, directory, name)
        if name == place.ARCHIVE:
            die()
    kept._remove_companions = removing
elif step == "rename":
    place.open_sqlite = die
else:
    wrapped("adopt_compacted", False)
engine.compact_archive()
"""
    root = Path(__file__).parent.parent
    child = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr

    log = Log()
    with running(tmp_path / "data", log=log) as engine:
        found = transcripts(engine)
        assert [len(one.items) for one in found] == [12] * 5 + [10] * 55
        assert not log.named("archive.damaged")
        assert not list((tmp_path / "data").glob("archive.compact.db*"))
