"""Exports and imports: everything goes out and comes back, and nothing that is wrong gets in."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.care import tar
from holdfast.care.export import (
    CONVERSATIONS_FILE,
    MANIFEST_FILE,
    ExportManifest,
    Selection,
    decode_export_manifest,
    encode_export_manifest,
    export_chunks,
)
from holdfast.care.given import Part, Unfinished, Wrong, open_archive, open_path, records_of
from holdfast.care.merge import MergeReport, merge
from holdfast.care.packing import pack, unpack
from holdfast.care.seal import seal_of
from holdfast.clock import format_ms
from holdfast.engine import Engine
from holdfast.errors import HoldfastError, InvalidRecord, StorageFull
from holdfast.ops import (
    AnyOp,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderComplete,
    OrderPut,
    RecordPut,
    SessionPut,
    UserPut,
)
from tests.crash.harness import FULL
from tests.engine_harness import NOW, NOW_MS, Disk, do, everything, opened, running, value_of

PHONE = "573001234567"
LATER = format_ms(NOW_MS - 1000)
EARLIER = format_ms(NOW_MS - 60_000)


def exported(engine: Engine, **wanted: Any) -> bytes:
    """An archive of what is *wanted*."""
    return b"".join(export_chunks(engine, Selection(**wanted)))


def imported(engine: Engine, archive: bytes, **how: Any) -> MergeReport:
    """What came of merging *archive*."""
    with open_archive([archive], engine.settings.data_dir, "export.tar.zst") as given:
        return merge(engine, given, **how)


def taken(engine: Engine, path: Path, **how: Any) -> MergeReport:
    """What came of merging what stands at *path*."""
    with open_path(path, engine.settings.data_dir) as given:
        return merge(engine, given, **how)


def contents(archive: bytes) -> dict[str, bytes]:
    """The files in *archive*, by the common tools' reckoning."""
    raw = zstandard.ZstdDecompressor().stream_reader(BytesIO(archive)).read()
    with tarfile.open(fileobj=BytesIO(raw)) as files:
        return {one.name: files.extractfile(one).read() for one in files.getmembers()}  # type: ignore[union-attr]


def packed(files: dict[str, bytes], manifest: ExportManifest | None = None) -> bytes:
    """An archive of *files*."""
    chunks: list[bytes] = []
    named = dict(files)
    if manifest is not None:
        named = {MANIFEST_FILE: encode_export_manifest(manifest), **files}
    for name, content in named.items():
        chunks += [tar.header_of(name, len(content)), content, tar.padding_of(len(content))]
    return b"".join(pack([*chunks, tar.ENDING]))


def transcript(engine: Engine, id: str) -> list[dict[str, Any]]:
    """The messages of a conversation."""
    return [orjson.loads(item.value) for item in engine.transcripts.messages(id, limit=10_000).items]


def fill(engine: Engine) -> None:
    """A little of everything."""
    ops: list[AnyOp] = [
        SessionPut(id=PHONE, value={"currentState": "catalog", "name": "Ana María", "lastActivity": EARLIER}, ttl="2h"),
        SessionPut(id="573009999999", value={"currentState": "paying", "lastActivity": LATER}),
        OrderPut(id="1001", value={"recipientPhone": PHONE, "productType": "music", "note": "call Ana María"}),
        OrderPut(id="1002", value={"recipientPhone": PHONE, "productType": "videos"}),
        OrderComplete(id="1002", revenue=Decimal("84900.50")),
        UserPut(id="ana", value={"email": "ana@example.org"}),
        RecordPut(collection="notes", id="n1", value={"text": "hello", "big": 2**63}),
        ConversationPut(id=PHONE, value={"user_id": PHONE, "campaign": "autumn"}),
        MessageAppend(id=PHONE, role="user", content="Hola, soy Ana María", created_at=EARLIER),
        MessageAppend(
            id=PHONE,
            role="assistant",
            content="Buenas",
            tokens_used=3,
            metadata={"tool_calls": [{"id": "c1"}], "channel": "whatsapp", "external_id": "w1"},
            created_at=LATER,
        ),
        MessageAppend(id="old", role="user", content="adiós", created_at=EARLIER),
        ConversationArchive(id="old"),
        EscalationOpen(id=PHONE, reason="she insists", contact_info={"phone": PHONE}, priority="high"),
    ]
    for op in ops:
        do(engine, op)


def unversioned(engine: Engine) -> dict[str, Any]:
    """All that readers can see, but versions, which are counted anew, and conversations without what is counted."""
    seen: dict[str, Any] = {
        name: {id: value for id, (_, value) in records.items()}
        for name, records in everything(engine).items()
        if name != "sales"
    }
    seen["sales"] = orjson.loads(engine.sales())
    page = engine.transcripts.page(limit=1000)
    seen["conversations"] = {item.id: orjson.loads(item.value) for item in page.items}
    seen["messages"] = {item.id: transcript(engine, item.id) for item in page.items}
    seen["escalations"] = {item.id: orjson.loads(item.value) for item in engine.transcripts.escalations().items}
    return seen


# Out and back.


def test_an_export_comes_back_the_same_and_twice_changes_nothing(tmp_path: Path):
    """All records, figures, conversations and escalations are as they were; the second import does nothing."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        fill(source)
        archive = exported(source)

        report = imported(target, archive)

        assert report.sum_of("refused") == report.sum_of("conflicting") == 0
        assert report.messages == 3
        assert unversioned(target) == unversioned(source)
        assert target.line("sessions", PHONE) == source.line("sessions", PHONE)
        line = target.line("orders", "1002")
        assert line is not None and b'"revenue":84900.50,' in line

        before = target.status()["seq"]
        again = imported(target, archive)

        assert again.changes == 0 and again.messages == 0
        assert target.status()["seq"] == before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
IDS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x17F, exclude_categories=("C", "Z")), min_size=1, max_size=20
)
RECORDS = st.dictionaries(
    IDS,
    st.dictionaries(st.text(max_size=8).filter(lambda key: key not in ("id", "user_id", "_holdfast", "recipientPhone", "lastActivity", "updatedAt", "odooOrderId", "revenue", "productType", "createdAt")), VALUES, max_size=3),
    max_size=4,
)  # fmt: skip
TALK = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant", "tool", "system"]),
        content=st.text(min_size=1, max_size=30),
        tokens_used=st.none() | st.integers(0, 1000),
        metadata=st.none() | st.dictionaries(st.text(max_size=5).filter(lambda key: key not in ("channel", "external_id")), VALUES, max_size=2),
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sessions=RECORDS, users=RECORDS, notes=RECORDS, orders=RECORDS, talks=st.dictionaries(IDS, TALK, max_size=3))
def test_whatever_is_stored_survives_the_way_out_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    sessions: Any,
    users: Any,
    notes: Any,
    orders: Any,
    talks: dict[str, list[Message]],
):
    """Values, times, messages and figures are the same; only versions and the moment of the last change are new."""
    place = tmp_path_factory.mktemp("trip")
    with running(place / "a") as source, running(place / "b") as target:
        tickets = [source.submit(SessionPut(id=id, value=value)) for id, value in sessions.items()]
        tickets += [source.submit(UserPut(id=id, value=value)) for id, value in users.items()]
        tickets += [source.submit(RecordPut(collection="notes", id=id, value=value)) for id, value in notes.items()]
        tickets += [
            source.submit(OrderPut(id=id, value={"recipientPhone": "57", **value})) for id, value in orders.items()
        ]
        for id, messages in talks.items():
            tickets.append(source.submit(ConversationPut(id=id, value={})))
            if messages:
                tickets.append(source.submit(MessageAppend(id=id, messages=messages)))
        for ticket in tickets:
            ticket.wait(10)

        report = imported(target, exported(source))

        assert report.reasons == []
        assert unversioned(target) == unversioned(source)


def test_a_thousand_conversations_go_out_and_come_back(tmp_path: Path):
    """None is lost, and none is doubled."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        tickets = [
            source.submit(
                MessageAppend(id=f"c{number}", messages=[Message(role="user", content=f"m{n}") for n in range(5)])
            )
            for number in range(1000)
        ]
        tickets[-1].wait(10)

        archive = exported(source)
        report = imported(target, archive)

        assert report.collections["conversations"].added == 1000 and report.messages == 5000
        assert target.transcripts.figures().messages == 5000
        assert imported(target, archive).collections["conversations"].same == 1000


def test_an_export_is_of_one_event_however_much_is_written_meanwhile(tmp_path: Path):
    """Every conversation has the messages that its head counts, and all records are as of the manifest's event."""
    with running(tmp_path / "a") as engine:
        do(engine, MessageAppend(id="c", role="user", content="first"))
        stopped = threading.Event()

        def write() -> None:
            number = 0
            while not stopped.is_set():
                number += 1
                engine.submit(RecordPut(collection="notes", id="n", value={"number": number}))
                engine.submit(MessageAppend(id="c", role="user", content=f"note {number}")).wait(10)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            time.sleep(0.1)
            for _ in range(5):
                files = contents(exported(engine))
                head = json.loads(files[CONVERSATIONS_FILE])
                note = json.loads(files["notes.json"])[0]

                assert len(head["messages"]) == head["message_count"] == head["last_number"]
                # The note is written right before its message.
                assert note["number"] - (head["last_number"] - 1) in (0, 1)
        finally:
            stopped.set()
            writer.join(10)


def test_a_conversation_deleted_while_it_is_read_is_not_exported_in_part(tmp_path: Path):
    """The picture is taken anew, and what is gone is not in it."""
    with running(tmp_path / "a") as engine:
        for id in ("a", "b"):
            do(engine, MessageAppend(id=id, role="user", content="hello"))
        seen: list[str] = []

        def delete_meanwhile(progress: str) -> None:
            seen.append(progress)
            if progress == f"gathering {CONVERSATIONS_FILE}" and seen.count(progress) == 1:
                do(engine, ConversationDelete(id="b"))

        archive = b"".join(export_chunks(engine, Selection(), progress=delete_meanwhile))

        lines = contents(archive)[CONVERSATIONS_FILE].splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["a"]
        assert seen.count("taking a picture of the data") == 2


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"collection": "sessions"}, {"chat_sessions.json": 2}),
        ({"collection": "sessions", "state": "paying"}, {"chat_sessions.json": 1}),
        ({"collection": "sessions", "until_ms": NOW_MS - 30_000}, {"chat_sessions.json": 1}),
        ({"collection": "orders", "where": (("productType", "music"),)}, {"pending_orders.json": 1, "completed_orders.json": 0}),
        ({"conversation": PHONE}, {"conversations.jsonl": 1, "escalations.jsonl": 1}),
        ({"conversation": "old"}, {"conversations.jsonl": 1, "escalations.jsonl": 0}),
        ({"collection": "sales", "since_ms": NOW_MS + 86_400_000}, {"sales_stats.json": 0}),
        ({"collection": "notes"}, {"notes.json": 1}),
    ],
)  # fmt: skip
def test_a_part_of_the_data_is_exported(tmp_path: Path, wanted: dict[str, Any], found: dict[str, int]):
    """One collection, one conversation, a span, a state, a field: the manifest says which, and how many records."""
    with running(tmp_path / "a") as engine:
        fill(engine)

        manifest = decode_export_manifest(contents(exported(engine, **wanted))[MANIFEST_FILE])

        assert manifest is not None and manifest.only
        assert {name: file.records for name, file in manifest.files.items()} == found


# Merging.


def test_the_newer_record_wins_and_a_tie_keeps_what_is_here(tmp_path: Path):
    """By lastActivity of sessions, by updatedAt of others; versions grow."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        for engine, mine in ((source, "there"), (target, "here")):
            for id, time_there, time_here in (("newer", LATER, EARLIER), ("older", EARLIER, LATER), ("tie", NOW, NOW)):
                at = time_there if engine is source else time_here
                do(engine, SessionPut(id=id, value={"from": mine, "lastActivity": at}))
                do(engine, UserPut(id=id, value={"from": mine, "updatedAt": at}))

        report = imported(target, exported(source))

        for collection in ("sessions", "users"):
            values = {id: value_of(target, collection, id)["from"] for id in ("newer", "older", "tie")}
            assert values == {"newer": "there", "older": "here", "tie": "here"}
            counts = report.collections[collection]
            assert (counts.newer, counts.older, counts.added) == (1, 2, 0)
            found = target.get(collection, "newer")
            assert found is not None and found.version == 2


def test_a_longer_conversation_adds_its_rest_and_another_one_is_left_alone(tmp_path: Path):
    """What both have is compared; where they differ nothing of it is taken, and that is told."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        for id in ("same", "different"):
            do(source, MessageAppend(id=id, role="user", content="one", created_at=EARLIER))
        imported(target, exported(source))
        do(source, MessageAppend(id="same", role="user", content="two"))
        do(source, MessageAppend(id="different", role="user", content="theirs"))
        do(target, MessageAppend(id="different", role="user", content="ours"))

        report = imported(target, exported(source))

        assert [message["content"] for message in transcript(target, "same")] == ["one", "two"]
        assert [message["content"] for message in transcript(target, "different")] == ["one", "ours"]
        counts = report.collections["conversations"]
        assert (counts.newer, counts.conflicting) == (1, 1)
        assert "with other messages" in report.reasons[0]

        # And the longer one is here: nothing is added.
        assert imported(source, exported(target)).messages == 0


def test_sales_figures_are_added_where_nothing_was_counted(tmp_path: Path):
    """Into empty figures all come; of others only days of which there is nothing, and those count in the totals."""
    day = {"totalOrders": 2, "completedOrders": 1, "totalRevenue": 10.10, "productTypes": {"music": 2}}
    figures = {
        "daily": [{"date": "2026-11-20", **day}, {"date": "2026-11-21", **day}],
        "totals": {"allTimeOrders": 700, "allTimeRevenue": 5000.05, "allTimeCompleted": 300},
    }
    (tmp_path / "sales_stats.json").write_text(json.dumps(figures))
    with running(tmp_path / "empty") as empty, running(tmp_path / "used") as used:
        do(used, OrderPut(id="1", value={"recipientPhone": "57"}))

        for _ in range(2):
            taken(empty, tmp_path / "sales_stats.json")
            taken(used, tmp_path / "sales_stats.json")

        assert orjson.loads(empty.sales())["totals"] == figures["totals"]
        there = orjson.loads(used.sales())
        assert [one["totalOrders"] for one in there["daily"]] == [2, 1]
        assert there["totals"] == {"allTimeOrders": 3, "allTimeRevenue": 10.1, "allTimeCompleted": 1}


def test_a_directory_of_an_old_bot_is_merged(tmp_path: Path):
    """Its arrays, its conversations and escalations, one file each; twice adds nothing."""
    old = tmp_path / "old"
    for place in ("conversations", "escalations", "users"):
        (old / place).mkdir(parents=True)
    (old / "chat_sessions.json").write_text(json.dumps([{"recipientPhone": 57300, "lastActivity": LATER}], indent=2))
    (old / "completed_orders.json").write_text(
        json.dumps([{"odooOrderId": 7, "recipientPhone": "57", "status": "completed", "revenue": 0.1}])
    )
    (old / "users" / "ana.json").write_text('{"user_id": "ana", "name": "Ana"}')
    (old / "conversations" / "c1.json").write_text(
        json.dumps({"id": "c1", "messages": [{"role": "bot", "content": "hi"}, {"role": "user", "content": ""}]})
    )
    (old / "escalations" / "c1_escalation.json").write_text('{"conversation_id": "c1", "reason": "help"}')
    (old / "readme.txt").write_text("not ours")
    with running(tmp_path / "b") as engine:
        report = taken(engine, old)

        assert report.changes == 5 and report.messages == 2 and report.ignored == ["readme.txt"]
        assert value_of(engine, "sessions", "57300")["lastActivity"] == LATER
        assert value_of(engine, "orders", "7")["revenue"] == 0.1
        assert value_of(engine, "escalations", "c1")["reason"] == "help"
        assert orjson.loads(engine.sales())["totals"]["allTimeOrders"] == 0

        again = taken(engine, old)

        assert again.changes == 0 and again.messages == 0


# What is refused.


def test_an_archive_that_was_changed_or_cut_is_refused_and_nothing_is_changed(tmp_path: Path):
    """Wherever one byte differs, and wherever it ends."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        fill(source)
        whole = exported(source)
        places = range(0, len(whole), max(1, len(whole) // 60))

        for place in places:
            changed = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
            for damaged in (changed, whole[:place]):
                with pytest.raises(InvalidRecord):
                    imported(target, damaged)

        assert target.status()["seq"] == 0


def test_a_file_of_an_export_that_was_changed_is_named(tmp_path: Path):
    """Beneath the compression as well: the manifest says what each file should be."""
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        fill(source)
        files = contents(exported(source))
        manifest = decode_export_manifest(files.pop(MANIFEST_FILE))
        assert manifest is not None
        changed = files | {"users.json": files["users.json"].replace(b"ana@", b"eva@")}
        missing = {name: content for name, content in files.items() if name != "users.json"}

        with pytest.raises(InvalidRecord, match=r"users\.json is not what was exported"):
            imported(target, packed(changed, manifest))
        with pytest.raises(InvalidRecord, match=r"users\.json is missing"):
            imported(target, packed(missing, manifest))
        with pytest.raises(InvalidRecord, match=r"no readable manifest\.json"):
            imported(target, packed(files))
        assert target.status()["seq"] == 0


def test_an_export_of_a_newer_format_is_refused_untouched(tmp_path: Path):
    """It says which version is needed."""
    with running(tmp_path / "b") as target:
        archive = packed({}, ExportManifest(format=2))

        with pytest.raises(InvalidRecord, match="format 2, this Holdfast knows 1"):
            imported(target, archive)

        assert target.status()["seq"] == 0


def test_where_some_records_are_invalid_none_is_taken_unless_that_is_wanted(tmp_path: Path):
    """The first ones are named with their reasons; with skips_invalid the valid ones are taken."""
    records = [{"recipientPhone": str(n), "lastActivity": LATER} if n % 2 else {"name": n} for n in range(10)]
    (tmp_path / "chat_sessions.json").write_text(json.dumps(records))
    with running(tmp_path / "b") as engine:
        with pytest.raises(InvalidRecord, match=r"5 of 10 records cannot be taken.*record 1: expected a record with"):
            taken(engine, tmp_path / "chat_sessions.json")
        assert engine.status()["seq"] == 0

        report = taken(engine, tmp_path / "chat_sessions.json", skips_invalid=True)

        assert (report.changes, report.sum_of("refused")) == (5, 5)
        assert engine.count("sessions") == 5


LONE = '"\\ud83d"'
"""Half of a character, as a bot writes it that cuts texts to a length."""


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bad", [LONE, "NaN", '"\x01"', "1e400", '"x'], ids=ascii)
def test_one_bad_value_costs_its_record_only(tmp_path: Path, indent: int | None, bad: str):
    """In any layout, and named, where the others are wanted; else nothing is taken."""
    records = [
        {"recipientPhone": str(n), "lastActivity": LATER, "cart": [{"recipientPhone": "x"}, {"recipientPhone": "y"}]}
        for n in range(50)
    ]
    text = json.dumps([*records[:20], records[20] | {"name": "BAD"}, *records[21:]], indent=indent)
    (tmp_path / "chat_sessions.json").write_text(text.replace('"BAD"', bad))
    with running(tmp_path / "b") as engine:
        with pytest.raises(InvalidRecord, match=r"chat_sessions\.json.*record 21"):
            taken(engine, tmp_path / "chat_sessions.json")
        assert engine.status()["seq"] == 0

        report = taken(engine, tmp_path / "chat_sessions.json", skips_invalid=True)

        assert (report.changes, report.sum_of("refused")) == (49, 1)
        assert "record 21" in report.reasons[0]
        assert {engine.count("sessions"), len(everything(engine)["sessions"])} == {49}


@pytest.mark.parametrize("indent", [None, 2])
def test_every_cut_of_a_file_leaves_its_whole_records(tmp_path: Path, indent: int | None):
    """Where the others are wanted: exactly those before the cut, and no object inside of the one that was cut."""
    notes = [{"id": str(n), "parts": [{"id": f"x{n}"}, {"id": f"y{n}"}]} for n in range(3)]
    text = json.dumps(notes, indent=indent)
    part = Part("notes.json", "notes", lambda: BytesIO(b""))
    ends = [len(json.dumps(notes[: n + 1], indent=indent).rstrip("]\n")) for n in range(3)]

    for cut in range(ends[0], len(text)):
        found = list(records_of(part._replace(open=lambda cut=cut: BytesIO(text[:cut].encode())), salvages=True))

        assert [one for one in found if isinstance(one, dict)] == notes[: sum(end <= cut for end in ends)]
        # Not in silence, also where nothing but the end of the array is missing; and without being asked nothing is taken.
        assert any(isinstance(one, Wrong) for one in found)
        with pytest.raises(Unfinished):
            list(records_of(part._replace(open=lambda cut=cut: BytesIO(text[:cut].encode())), salvages=False))
    with pytest.raises(Unfinished, match="record 1"):
        list(records_of(part._replace(open=lambda: BytesIO(text[: ends[0] - 1].encode())), salvages=True))


def test_what_a_bot_keeps_beside_its_data_is_left_out(tmp_path: Path):
    """A file of a directory that holds no array of records is named, and is no reason to take nothing."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "notes.json").write_text('[{"id": "n1"}]')
    (old / "options.json").write_text('{"colour": "blue"}')
    with running(tmp_path / "b") as engine:
        report = taken(engine, old)

        assert (report.changes, report.ignored, list(report.collections)) == (1, ["options.json"], ["notes"])


def test_a_broken_file_of_a_bot_is_refused_unless_the_others_are_wanted(tmp_path: Path):
    """With skips_invalid the other files are taken, and those that nothing can be made of are named and counted."""
    old = tmp_path / "old"
    (old / "conversations").mkdir(parents=True)
    (old / "notes.json").write_text('[{"id": "n1"}]')
    (old / "chat_sessions.json").write_text('[{"recipientPhone": "57')
    (old / "conversations" / "broken.json").write_text('{"conversation_id": "br')
    with running(tmp_path / "b") as engine:
        with pytest.raises(InvalidRecord, match=r"chat_sessions\.json: not JSON"):
            taken(engine, old)
        assert engine.status()["seq"] == 0

        report = taken(engine, old, skips_invalid=True)

        assert (report.changes, report.sum_of("refused")) == (1, 2)
        assert [reason.partition(":")[0] for reason in report.reasons] == [
            "chat_sessions.json",
            "conversations/broken.json",
        ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_sessions.json", "", "empty"),
        ("chat_sessions.json", "[\n{", "not JSON"),
        ("chat_sessions.json", '[\n{"recipientPhone":"1"},\n', "cut short"),
        ("chat_sessions.json", '{"a": 1}', "expected an array"),
        ("notes.json", '[{"id": "n", "v": 1e400}]', "kept exactly"),
        ("notes.json", '[{"id": "n", "id": "m"}]', "same key twice"),
        ("notes.json", '[{"id": "n", "v": 99999999999999999999999}]', "64 bits"),
        ("pending_orders.json", '[{"odooOrderId": 1}]', "recipientPhone"),
        ("sales_stats.json", "[]", "JSON object"),
        ("My Notes.json", "[]", "no name of a collection"),
        ("notes.txt", "hello", "expected a file of data"),
        ("manifest.json", "{}", "found a manifest"),
    ],
)
def test_a_file_that_cannot_be_taken_says_why(tmp_path: Path, name: str, content: str, reason: str):
    """And nothing is changed."""
    (tmp_path / name).write_text(content)
    with running(tmp_path / "data") as engine:
        with pytest.raises(HoldfastError, match=reason):
            taken(engine, tmp_path / name)

        assert engine.status()["seq"] == 0


def test_what_is_no_file_is_refused(tmp_path: Path):
    """Nothing there, a pipe, a directory of other things, and a data directory that has to be exported first."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "archive.db").touch()
    import os

    os.mkfifo(tmp_path / "pipe.json")
    with running(tmp_path / "b") as engine:
        for name, reason in (
            ("nothing", "nothing is at"),
            ("pipe.json", "expected a directory or a file"),
            ("empty", "found nothing"),
            ("data", "holdfast export --data-dir"),
        ):
            with pytest.raises(HoldfastError, match=reason):
                taken(engine, tmp_path / name)


def header(name: str, **fields: Any) -> bytes:
    """A tar header as *fields* say."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (header("../users.json"), "leads out of it"),
        (header("/etc/passwd"), "leads out of it"),
        (header("a/../../b.json"), "leads out of it"),
        (header("users.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (header("users.json", type=tarfile.LNKTYPE, linkname="x"), "hard link"),
        (header("users.json", type=tarfile.CHRTYPE), "device"),
        (header("users.json", type=tarfile.FIFOTYPE), "pipe"),
        (header("users.json", size=1 << 50), "more than"),
        (header("users.json", type=b"L", size=1 << 40), "header of"),
        (b"no archive at all".ljust(1024), "expected a tar archive"),
        (b"", "cut short"),
    ],
)
def test_no_archive_does_harm(tmp_path: Path, archive: bytes, reason: str):
    """What leads out of it, what is no file, and what is larger than there is room for is refused before it is unpacked."""
    with running(tmp_path / "b") as engine, pytest.raises(InvalidRecord, match=reason):
        imported(engine, b"".join(pack([archive])))


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    """The manifest vouches for one of them only."""
    with running(tmp_path / "a") as source:
        do(source, RecordPut(collection="notes", id="n1", value={"text": "hello"}))
        files = contents(exported(source))
    other = ("notes.json", b'[\n{"id":"smuggled"}\n]\n')

    with running(tmp_path / "b") as target:
        for members in ([other, *files.items()], [*files.items(), other]):
            archive = b"".join(tar.header_of(name, len(raw)) + raw + tar.padding_of(len(raw)) for name, raw in members)
            with pytest.raises(InvalidRecord, match="two files with the name"):
                imported(target, b"".join(pack([archive, tar.ENDING])))

        assert target.count("notes") == 0


def test_an_archive_may_have_more_files_than_a_process_may_open(tmp_path: Path):
    """An old bot has a file for each conversation."""
    message = {"role": "user", "content": "hola", "timestamp": EARLIER}
    files = {
        f"conversations/c{n}.json": orjson.dumps({"id": f"c{n}", "messages": [message] * (n % 5)}) for n in range(300)
    }
    archive = packed(files)

    with running(tmp_path / "b") as target:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 50, hard))
        try:
            report = imported(target, archive)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        assert report.collections["conversations"].added == 300
        assert all(len(transcript(target, f"c{n}")) == n % 5 for n in range(300))


def test_a_small_archive_of_much_does_not_fill_memory_or_disk(tmp_path: Path):
    """Gigabytes of zeros are read past; nothing of them stays."""
    size = 100 << 20

    def zeros() -> Any:
        yield tar.header_of("users.json", size)
        for _ in range(size >> 20):
            yield bytes(1 << 20)
        yield tar.ENDING

    bomb = b"".join(pack(zeros()))
    assert len(bomb) < 100_000
    with running(tmp_path / "b") as engine:
        with pytest.raises(InvalidRecord, match=r"users\.json"):
            imported(engine, bomb)

        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10 << 20


# Crashes and full disks.


def test_an_import_goes_on_where_a_full_disk_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was merged until then stays; merging again does the rest, once."""
    disk = Disk(monkeypatch)
    with running(tmp_path / "a") as source:
        for number in range(1200):
            source.submit(RecordPut(collection="notes", id=str(number), value={"n": number}))
        do(source, MessageAppend(id="c", role="user", content="hello"))
        archive = exported(source)
    with running(tmp_path / "b") as target:
        writes = 0

        def fill_later() -> None:
            nonlocal writes
            writes += 1
            if writes > 2:
                raise OSError(28, "No space left on device")

        disk.before_write = fill_later
        with pytest.raises(StorageFull):
            imported(target, archive)
        disk.free()

        imported(target, archive)

        assert target.count("notes") == 1200
        assert [message["content"] for message in transcript(target, "c")] == ["hello"]


CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from holdfast.care.given import open_path
from holdfast.care.merge import merge
from holdfast.recovery import open_engine
from holdfast.settings import Settings
engine = open_engine(Settings(data_dir=Path(sys.argv[1])))
with open_path(Path(sys.argv[2]), Path(sys.argv[1])) as given:
    def die():
        # As many events later as the test says.
        until = engine.status()["seq"] + int(sys.argv[3])
        while engine.status()["durable_seq"] < until:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=die, daemon=True).start()
    merge(engine, given)
"""


@pytest.mark.parametrize("events", [1, 20, 60, 150, 400, 650, 701, 800, 900] if FULL else [60, 800])
def test_an_import_that_was_killed_is_completed_by_the_next(tmp_path: Path, events: int):
    """Wherever it was killed: after the next import everything is there once."""
    with running(tmp_path / "a") as source:
        tickets = [source.submit(RecordPut(collection="notes", id=str(n), value={"n": n})) for n in range(700)]
        tickets += [
            source.submit(MessageAppend(id=f"c{n}", messages=[Message(role="user", content="x")] * 3))
            for n in range(300)
        ]
        tickets[-1].wait(10)
        (tmp_path / "export.tar.zst").write_bytes(exported(source))
        expected = unversioned(source)

    arguments = [str(tmp_path / "b"), str(tmp_path / "export.tar.zst"), str(events)]
    killed = subprocess.run([sys.executable, "-c", CHILD, *arguments], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    with running(tmp_path / "b") as target:
        assert target.status()["seq"] >= events
        with open_path(tmp_path / "export.tar.zst", tmp_path) as given:
            merge(target, given)

        assert unversioned(target) == expected


def test_a_conversation_is_taken_whole_with_its_hold(tmp_path: Path):
    """In one event, since whoever imports again after a crash finds it here and leaves it as it is."""
    with running(tmp_path / "a") as source:
        do(source, MessageAppend(id="c", role="user", content="hola", created_at=EARLIER))
        do(source, ConversationArchive(id="c"))
        do(source, ConversationHold(id="c", reason="in court"))
        archive = exported(source)
        expected = unversioned(source)

    with running(tmp_path / "b") as target:
        before = target.status()["seq"]
        imported(target, archive)

        assert target.status()["seq"] == before + 1
        assert unversioned(target) == expected


def test_a_record_that_somebody_is_changing_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change on its way to the disk cannot be seen yet, but counts."""
    disk = Disk(monkeypatch)
    (tmp_path / "notes").mkdir()
    notes = [{"id": "n1", "updatedAt": LATER}, {"id": "n2", "updatedAt": LATER}]
    (tmp_path / "notes" / "notes.json").write_bytes(orjson.dumps(notes))
    with running(tmp_path / "b") as target:
        do(target, RecordPut(collection="notes", id="n1", value={"updatedAt": EARLIER}))
        go_on = threading.Event()
        changes = 0

        def change_first() -> str | None:
            nonlocal changes
            changes += 1
            disk.before_sync = lambda: (go_on.wait(10), None)[1]
            target.submit(RecordPut(collection="notes", id="n1", value={"updatedAt": EARLIER, "changed": True}))
            threading.Timer(0.1, go_on.set).start()
            return None

        report = taken(target, tmp_path / "notes", before_change=change_first)

        assert changes == 1
        assert report.collections["notes"].newer == 1 and report.collections["notes"].added == 1
        assert value_of(target, "notes", "n1") == notes[0]


# Redaction.


def test_a_redacted_export_tells_nobody_who_it_was_or_what_was_said(tmp_path: Path):
    """Phones keep their last three digits and stay joinable; names, texts, addresses and ids are gone."""
    with running(tmp_path / "a") as engine:
        fill(engine)
        do(
            engine,
            RecordPut(collection="notes", id="n2", value={"of": f"+{PHONE}", PHONE: 573001234567, "who": ["Ana"]}),
        )

        files = contents(exported(engine, is_redacted=True))
        again = contents(exported(engine, is_redacted=True))

        text = b"\n".join(files.values()).decode()
        for secret in (
            PHONE,
            "573009999999",
            "Ana",
            "María",
            "example.org",
            "Hola",
            "Buenas",
            "insists",
            "hello",
            "n1",
        ):
            assert secret not in text
        sessions = json.loads(files["chat_sessions.json"])
        stand_in = next(one["recipientPhone"] for one in sessions if one["currentState"] == "catalog")
        assert stand_in.endswith("567") and len(stand_in) == 12
        [pending] = json.loads(files["pending_orders.json"])
        assert pending["recipientPhone"] == stand_in and pending["productType"] == "music"
        [closed] = json.loads(files["completed_orders.json"])
        assert closed["revenue"] == 84900.5
        talk = {head["id"]: head for head in map(json.loads, files[CONVERSATIONS_FILE].splitlines())}[stand_in]
        assert [one["content"] for one in talk["messages"]] == ["[19 characters]", "[6 characters]"]
        note = next(one for one in json.loads(files["notes.json"]) if "of" in one)
        assert note["of"] == stand_in and note[stand_in] == int(stand_in)
        assert stand_in not in b"".join(again.values()).decode()

        with running(tmp_path / "b") as target:
            report = imported(target, exported(engine, is_redacted=True))

            assert report.sum_of("refused") == 0 and target.count("sessions") == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("customers", {"Carlos": {"visits": 1}}),
        ("p57-300-123-4567", 1),
        ("author", "Carlos"),
        ("handler", "Carlos"),
        ("status", "x57300123456789012345"),
        ("contactPhone", 61234567),
        ("tel", 61234567),
        ("sum", 573001234567.5),
        ("list", [573001234567, "Carlos", ["Carlos"]]),
        ("nested", {"role": "Carlos", "currentState": "Carlos Pérez"}),
    ],
)
def test_odd_places_for_names_and_numbers_are_redacted_too(field: str, value: Any):
    """In keys, where only certain words stay, as numbers, and in lists."""
    from holdfast.care.redact import Redactor

    shown = json.dumps(Redactor(b"key").record({"id": 61234567, field: value}, "id"))

    for secret in ("Carlos", "61234567", "573001234567", "57300123456", "300-123-4567"):
        assert secret not in shown


@given(st.lists(st.from_regex(r"[1-9][0-9]{6,11}", fullmatch=True), unique=True, max_size=50))
def test_no_two_phones_get_the_same_stand_in(phones: list[str]):
    """Or records of two people would be one after an import."""
    from holdfast.care.redact import Redactor

    redactor = Redactor(b"key")
    stand_ins = [redactor.phone(phone) for phone in phones]

    assert len(set(stand_ins)) == len(phones)
    assert all(len(one) == len(phone) and one[-3:] == phone[-3:] for one, phone in zip(stand_ins, phones, strict=True))


def test_the_manifest_is_what_common_tools_find(tmp_path: Path):
    """`zstd -d | tar -t` lists the files, a record a line in each, as the manifest says."""
    engine = opened(tmp_path / "a")
    try:
        fill(engine)
        files = contents(exported(engine))
    finally:
        engine.close()
    manifest = json.loads(files[MANIFEST_FILE])

    assert manifest["seq"] == 13 and manifest["kind"] == "holdfast export"
    for name, said in manifest["files"].items():
        assert said["bytes"] == len(files[name])
        if name.endswith(".json") and name != "sales_stats.json":
            assert len(json.loads(files[name])) == said["records"] == max(0, files[name].count(b"\n") - 2)
    assert b"".join(unpack(pack([b"x"]))) == b"x"


# Encryption.


def test_an_encrypted_export_opens_with_its_key_only(tmp_path: Path):
    """With it all comes back; with another one, or none, the reason is said and nothing is changed."""
    import pyrage

    keys = [pyrage.x25519.Identity.generate() for _ in range(2)]
    files = []
    for number, key in enumerate(keys):
        files.append(tmp_path / f"key{number}")
        files[-1].write_text(f"{key}\n")
        files[-1].chmod(0o600)
    with running(tmp_path / "a") as source, running(tmp_path / "b") as target:
        fill(source)
        seal = seal_of(source.settings, recipients=[str(keys[0].to_public())])
        archive = tmp_path / "export.tar.zst.age"
        archive.write_bytes(b"".join(export_chunks(source, Selection(), seal)))

        for seal, reason in ((None, "encrypted"), (seal_of(target.settings, files[1]), "export.tar.zst.age")):
            with pytest.raises(HoldfastError, match=reason):
                open_path(archive, target.settings.data_dir, seal)
        with open_path(archive, target.settings.data_dir, seal_of(target.settings, files[0])) as given:
            merge(target, given)

        assert unversioned(target) == unversioned(source)
