"""Coming back: order of start, hand edits, merging, interrupted flushes, refusals, evidence."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.disk.files import Directory, DirectoryLock
from holdfast.disk.journal import encode_line
from holdfast.engine import Engine
from holdfast.errors import DataRefused, DirectoryLocked, Unavailable
from holdfast.ops import OrderComplete, OrderDelete, OrderPut, RecordPut, SessionDelete, SessionPut, StatsOrder, UserPut
from holdfast.recovery import open_engine
from tests.engine_harness import (
    NOW,
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

HOUR_AGO = "2026-11-21T05:00:00.000Z"
TWO_HOURS_AGO = "2026-11-21T04:00:00.000Z"
TWO_DAYS_AGO = "2026-11-19T06:00:00.000Z"


def fill(engine: Engine) -> None:
    """A little of everything."""
    for n in range(5):
        do(engine, SessionPut(id=f"57300{n}", value={"currentState": "catalog", "n": n}))
    do(engine, OrderPut(id="1", value={"recipientPhone": "573000", "productType": "ring"}))
    do(engine, OrderPut(id="2", value={"recipientPhone": "573001"}))
    do(engine, OrderComplete(id="2", revenue=Decimal("10.10")))
    do(engine, UserPut(id="u", value={"name": "Ana"}))
    do(engine, RecordPut(collection="notes", id="n", value={"text": "hola"}))


def write_array(path: Path, records: list[Any]) -> None:
    """As the old bots wrote their files."""
    path.write_bytes(orjson.dumps(records, option=orjson.OPT_INDENT_2))


def session(id: str, at: str = HOUR_AGO, **fields: Any) -> dict[str, Any]:
    return {"recipientPhone": id, "lastActivity": at, **fields}


# What comes back.


def test_everything_comes_back_after_a_clean_stop(tmp_path: Path) -> None:
    """A stop with its flush and a start show the same records, versions and figures."""
    engine = opened(tmp_path)
    fill(engine)
    before = everything(engine)
    engine.close()

    with running(tmp_path) as engine:
        assert everything(engine) == before
        assert engine.degraded == []


def test_everything_comes_back_from_the_journal_alone(tmp_path: Path) -> None:
    """Without any flush a start replays all."""
    with running(tmp_path) as engine:
        fill(engine)
        before = everything(engine)

    with running(tmp_path) as engine:
        assert everything(engine) == before
        assert engine.degraded == []


def test_a_start_reports_what_it_loaded(tmp_path: Path) -> None:
    """state.loaded counts what came, what was too old, what was invalid and what stood twice."""
    write_array(
        tmp_path / "chat_sessions.json",
        [session("1"), session("1", NOW), session("2", TWO_DAYS_AGO), {"recipientPhone": "3"}, {"lastActivity": NOW}],
    )
    log = Log()

    with running(tmp_path, log=log):
        pass

    loaded = log.named("state.loaded")[0]
    assert {key: loaded[key] for key in ("sessions", "dropped_stale", "skipped_invalid", "merged", "replayed")} == {
        "sessions": 1,
        "dropped_stale": 1,
        "skipped_invalid": 2,
        "merged": 1,
        "replayed": 0,
    }


def test_seq_goes_on_where_it_stood(tmp_path: Path) -> None:
    """The first event after a restart has the next seq, with and without a journal to read it from."""
    with running(tmp_path) as engine:
        assert do(engine, SessionPut(id="1", value={})).seq == 1
    engine = opened(tmp_path)
    assert do(engine, SessionPut(id="1", value={})).seq == 2
    engine.close()

    with running(tmp_path) as engine:
        assert do(engine, SessionPut(id="1", value={})).seq == 3


def test_time_goes_on_where_it_stood(tmp_path: Path) -> None:
    """After a crash with the clock set back no event is older than the one before it."""
    with running(tmp_path) as engine:
        do(engine, SessionPut(id="1", value={}))
    earlier = HandClock()
    earlier.jump(-3600)

    with running(tmp_path, clock=earlier) as engine:
        do(engine, SessionPut(id="2", value={}))
        assert value_of(engine, "sessions", "2")["lastActivity"] == NOW


def test_opening_and_closing_keeps_no_descriptor(tmp_path: Path) -> None:
    """A program may open a directory as often as it likes."""
    opened(tmp_path).close()
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        opened(tmp_path).close()

    assert len(os.listdir("/proc/self/fd")) == before


# Files of others.


@pytest.mark.parametrize(
    ("stamps", "kept"),
    [
        ((HOUR_AGO, NOW), 1),
        ((NOW, HOUR_AGO), 0),
        ((NOW, NOW), 0),
        ((HOUR_AGO, TWO_HOURS_AGO, HOUR_AGO), 0),
        ((HOUR_AGO, "2026-11-21T00:00:00-05:30"), 1),
    ],
)
def test_an_id_that_stands_twice_keeps_its_newest_activity(tmp_path: Path, stamps: tuple[str, ...], kept: int) -> None:
    """The newest lastActivity wins; a tie keeps the one that came first."""
    write_array(tmp_path / "chat_sessions.json", [session("1", at, n=n) for n, at in enumerate(stamps)])

    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "1")["n"] == kept


def test_files_are_kept_as_they_were_before_anything_is_left_out(tmp_path: Path) -> None:
    """What was dropped, skipped or merged stands in backups/start-…, byte for byte, even after the next flush."""
    write_array(tmp_path / "chat_sessions.json", [session("1"), session("2", TWO_DAYS_AGO), {"x": 1}])
    before = (tmp_path / "chat_sessions.json").read_bytes()

    opened(tmp_path).close()

    kept = list(tmp_path.glob("backups/start-*/chat_sessions.json"))
    assert [path.read_bytes() for path in kept] == [before]
    assert (tmp_path / "chat_sessions.json").read_bytes() != before


def test_unknown_fields_survive_load_and_flush(tmp_path: Path) -> None:
    """Fields we know nothing about, numbers included, come out as they went in."""
    odd = session("1", big=2**63 - 1, low=-(2**63), huge=2**64 - 1, exact=0.1, tiny=5e-324, deep={"a": [None, {}]})
    write_array(tmp_path / "chat_sessions.json", [odd])
    opened(tmp_path).close()

    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "1") == odd


@pytest.mark.parametrize("odd", [b"18446744073709551616", b"NaN", b"1e400", b'"\\ud800"'])
def test_what_cannot_be_kept_exactly_is_skipped_not_changed(tmp_path: Path, odd: bytes) -> None:
    """A foreign record with such a value is left out and counted, and its neighbours are loaded."""
    file = b'[\n{"recipientPhone":"1","lastActivity":"%b","odd":%b},\n{"recipientPhone":"2","lastActivity":"%b"}\n]\n'
    (tmp_path / "chat_sessions.json").write_bytes(file % (HOUR_AGO.encode(), odd, HOUR_AGO.encode()))

    with running(tmp_path) as engine:
        assert engine.get("sessions", "1") is None
        assert value_of(engine, "sessions", "2") is not None
    assert list(tmp_path.glob("backups/start-*/chat_sessions.json"))


def test_a_line_edited_while_stopped_is_honoured(tmp_path: Path) -> None:
    """An editor's change counts, gets a new version, and the file as it was found is kept."""
    engine = opened(tmp_path)
    fill(engine)
    engine.close()
    path = tmp_path / "chat_sessions.json"
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":33'))
    log = Log()

    engine = opened(tmp_path, log=log)

    assert value_of(engine, "sessions", "573003")["n"] == 33
    found = engine.get("sessions", "573003")
    assert found is not None and found.version == 2
    assert log.named("snapshot.edited")[0]["file"] == "chat_sessions.json"
    assert engine.degraded == []
    engine.close()
    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "573003")["n"] == 33


def test_a_removed_line_is_honoured(tmp_path: Path) -> None:
    """A record whose line was deleted with an editor stays away, after the next flush as well."""
    engine = opened(tmp_path)
    fill(engine)
    engine.close()
    path = tmp_path / "chat_sessions.json"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b"573003" not in line))
    opened(tmp_path).close()

    with running(tmp_path) as engine:
        assert engine.get("sessions", "573003") is None
        assert engine.count("sessions") == 4


@pytest.mark.parametrize("header", ['{"v":0}', '{"v":-1}', '{"v":9223372036854775807}', '{"v":"1"}', "5"])
def test_a_header_that_no_version_has_is_no_header(tmp_path: Path, header: str) -> None:
    """Whatever an editor made of _holdfast, a record that was loaded can be changed again."""
    record = f'{{"id":"1","text":"hola","_holdfast":{header}}}'
    (tmp_path / "notes.json").write_text(f'[\n{{"id":"2"}},\n{record}\n]\n')

    with running(tmp_path) as engine:
        if engine.get("notes", "1") is not None:
            version = do(engine, RecordPut(collection="notes", id="1", value={})).version
            assert 1 <= version < 2**63
        assert engine.get("notes", "2") is not None


def test_changed_sales_figures_are_honoured(tmp_path: Path) -> None:
    """A corrected sales_stats.json counts, keys of others included, and is kept as it was found."""
    engine = opened(tmp_path)
    do(engine, StatsOrder(product_type="ring"))
    engine.close()
    path = tmp_path / "sales_stats.json"
    figures = orjson.loads(path.read_bytes())
    figures["totals"]["allTimeOrders"] = 70
    figures["note"] = "corrected"
    path.write_bytes(orjson.dumps(figures))

    with running(tmp_path) as engine:
        do(engine, StatsOrder())

        sales = orjson.loads(engine.sales())
    assert sales["totals"]["allTimeOrders"] == 71
    assert sales["note"] == "corrected"


def test_sales_figures_that_the_disk_changed_are_noticed(tmp_path: Path) -> None:
    """A flipped digit that still is JSON is damage: degraded, with the evidence in quarantine."""
    engine = opened(tmp_path)
    do(engine, StatsOrder(product_type="ring"))
    engine.close()
    path = tmp_path / "sales_stats.json"
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"allTimeOrders": 1', b'"allTimeOrders": 9'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with running(tmp_path) as engine:
        assert any("sales_stats.json" in reason for reason in engine.degraded)
    assert list(tmp_path.glob("quarantine/*sales_stats.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("package.json", b'{"name": "x"}'),
        ("notes.json", b"[1, 2, 3]"),
        ("broken.json", b"[{"),
        ("Upper.json", b'[{"id": "1"}]'),
        ("archive.json", b'[{"id": "1"}]'),
    ],
)
def test_files_that_are_no_collections_are_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    """A file of somebody else is not loaded, not rewritten, and its name cannot become a collection's."""
    (tmp_path / name).write_bytes(content)

    engine = opened(tmp_path)
    collection = name.removesuffix(".json")
    with pytest.raises(Exception) as refused:
        do(engine, RecordPut(collection=collection, id="1", value={}))
    engine.close()

    assert getattr(refused.value, "code", None) in ("conflict", "invalid_record")
    assert (tmp_path / name).read_bytes() == content


def test_a_file_that_appears_while_running_is_kept(tmp_path: Path) -> None:
    """A flush that must write where somebody put a file meanwhile keeps a copy of it first."""
    engine = opened(tmp_path)
    (tmp_path / "notes.json").write_bytes(b'{"mine": true}')
    do(engine, RecordPut(collection="notes", id="1", value={}))

    engine.close()

    assert [path.read_bytes() for path in tmp_path.glob("backups/edited-*/notes.json")] == [b'{"mine": true}']


@pytest.mark.parametrize("flushed", [False, True])
def test_an_edit_while_running_is_kept(tmp_path: Path, flushed: bool) -> None:
    """A snapshot file edited while we run is copied aside before the next flush replaces it, also before the first."""
    write_array(tmp_path / "chat_sessions.json", [session("1")])
    engine = opened(tmp_path)
    if flushed:
        engine.flush("api")
    write_array(tmp_path / "chat_sessions.json", [session("1"), session("2")])
    do(engine, SessionPut(id="1", value={}))

    engine.close()

    kept = list(tmp_path.glob("backups/edited-*/chat_sessions.json"))
    assert len(kept) == 1
    assert b'"2"' in kept[0].read_bytes()


def test_a_copied_directory_counts_as_unedited(tmp_path: Path) -> None:
    """Its files have other times than those they were written at; nothing is said of edits, and no copies pile up."""
    engine = opened(tmp_path / "original")
    fill(engine)
    engine.close()
    shutil.copytree(tmp_path / "original", tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").glob("*.json"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    log = Log()

    engine = opened(tmp_path / "copy", log=log)
    do(engine, SessionPut(id="573001", value={}))
    engine.close()

    assert log.named("flush.completed")[-1]["files"] > 0
    assert not log.named("snapshot.edit_kept") and not log.named("snapshot.edited")
    assert not (tmp_path / "copy" / "backups").exists()


def test_a_flush_of_unedited_files_keeps_no_copies(tmp_path: Path) -> None:
    """Copies are made of what others wrote, never of what we wrote or loaded."""
    write_array(tmp_path / "chat_sessions.json", [session("1"), session("2", TWO_DAYS_AGO)])
    engine = opened(tmp_path)
    for n in range(3):
        do(engine, SessionPut(id="1", value={"n": n}))
        engine.flush("api")
    engine.close()

    assert not list(tmp_path.glob("backups/edited-*"))


# Ageing.


def test_sessions_too_old_are_dropped_after_replay(tmp_path: Path) -> None:
    """A session that the journal touched is judged by that, not by its snapshot line."""
    write_array(tmp_path / "chat_sessions.json", [session("1", TWO_DAYS_AGO), session("2", TWO_DAYS_AGO)])
    earlier = HandClock()
    earlier.jump(-2 * 86400)
    with running(tmp_path, clock=earlier) as engine:
        earlier.advance(86400 + 3600)
        do(engine, SessionPut(id="1", value={"n": 1}))

    with running(tmp_path) as engine:
        assert value_of(engine, "sessions", "1")["n"] == 1
        assert engine.get("sessions", "2") is None


def test_sales_days_too_old_are_dropped(tmp_path: Path) -> None:
    """90 days stay, the totals stay whole, and the file with the others is kept."""
    days = [{"date": f"2026-{month:02}-01", "totalOrders": 1} for month in range(1, 12)]
    figures = {"daily": days, "totals": {"allTimeOrders": 11}}
    (tmp_path / "sales_stats.json").write_bytes(orjson.dumps(figures))

    with running(tmp_path) as engine:
        sales = orjson.loads(engine.sales())

    assert [day["date"] for day in sales["daily"]] == ["2026-09-01", "2026-10-01", "2026-11-01"]
    assert sales["totals"]["allTimeOrders"] == 11
    assert list(tmp_path.glob("backups/start-*/sales_stats.json"))


# Flushes that did not end.


class Died(BaseException):
    """The place where the process would have died."""


STEPS = ("stage", "write_atomic", "publish", "rename")


def _interrupt(directory: Directory, step: str, place: int) -> None:
    """Have the *place*-th call of *step* on the data directory never return."""
    original: Callable[..., Any] = getattr(directory, step)
    count = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == place:
            if step == "publish":  # part of the files only
                original(list(arguments[0])[:1])
            raise Died
        return original(*arguments)

    setattr(directory, step, interrupted)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(("step", "place"), [*((step, 1) for step in STEPS), ("stage", 3)])
def test_a_flush_interrupted_anywhere_loses_nothing(tmp_path: Path, step: str, place: int, is_first: bool) -> None:
    """Wherever the process dies within a flush, the first ever or a later one, a start finds everything."""
    data, crashed = tmp_path / "data", tmp_path / "crashed"
    write_legacy(data)
    engine = opened(data)
    fill(engine)
    if not is_first:
        engine.flush("api")
        do(engine, SessionPut(id="573001", value={"currentState": "paid"}))
        do(engine, SessionDelete(id="573002"))
        do(engine, OrderComplete(id="1", revenue=Decimal("0.20")))
    before = everything(engine)
    _interrupt(engine._flusher._directory, step, place)
    # What a killed process leaves: temporaries are not tidied up.
    engine._flusher._directory.discard = lambda names: None  # type: ignore[method-assign]
    with pytest.raises(Died):
        engine.flush("api")
    shutil.copytree(data, crashed, ignore=shutil.ignore_patterns("holdfast.sock"))
    engine.close(flush=False)

    for _ in range(2):
        with running(crashed) as recovered:
            assert everything(recovered) == before
            assert recovered.degraded == []
    opened(crashed).close()
    with running(crashed) as recovered:
        assert everything(recovered) == before
    assert not list(crashed.glob(".*.tmp"))


def write_legacy(data: Path) -> None:
    data.mkdir()
    write_array(data / "chat_sessions.json", [session("legacy", n=1)])


@pytest.mark.parametrize("name", ["manifest.json", "manifest.next.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 1}', b"\0" * 100, None],
    ids=["empty", "cut", "array", "bare", "zeros", "missing"],
)
def test_a_damaged_manifest_loses_nothing(tmp_path: Path, name: str, content: bytes | None) -> None:
    """The files and the journal speak for themselves."""
    with running(tmp_path) as engine:
        fill(engine)
        engine.flush("api")
        do(engine, SessionPut(id="573001", value={"currentState": "paid"}))
        do(engine, OrderComplete(id="1", revenue=Decimal("0.20")))
        before = everything(engine)
    if content is None:
        (tmp_path / name).unlink(missing_ok=True)
    else:
        (tmp_path / name).write_bytes(content)

    for _ in range(2):
        with running(tmp_path) as engine:
            assert everything(engine) == before
            assert do(engine, UserPut(id="u", value={"name": "Ana"})).seq > 11
            before = everything(engine)


def test_a_missing_manifest_is_no_hole_in_the_journal(tmp_path: Path) -> None:
    """After a clean stop the manifest may be removed: the files are read as anyone's."""
    engine = opened(tmp_path)
    fill(engine)
    before = everything(engine)
    engine.close()
    (tmp_path / "manifest.json").unlink()

    with running(tmp_path) as engine:
        assert everything(engine) == before
        assert engine.degraded == []


# Refusals.


@pytest.mark.parametrize("name", ["manifest.json", "manifest.next.json"])
def test_a_newer_format_is_refused_untouched(tmp_path: Path, name: str) -> None:
    """Data of a newer Holdfast is left exactly as it is, with advice."""
    engine = opened(tmp_path)
    fill(engine)
    engine.close()
    manifest = orjson.loads((tmp_path / "manifest.json").read_bytes())
    (tmp_path / name).write_bytes(orjson.dumps(manifest | {"format": 2}))
    before = contents(tmp_path)

    with pytest.raises(DataRefused, match="newer version"):
        opened(tmp_path)

    assert contents(tmp_path) == before


def test_an_unknown_event_is_refused_untouched(tmp_path: Path) -> None:
    """A journal that a newer Holdfast went on with is not cut, replayed in part, or pruned."""
    with running(tmp_path) as engine:
        fill(engine)
    segment = next((tmp_path / "journal").glob("*.jsonl"))
    with segment.open("ab") as file:
        file.write(encode_line(b'{"seq":11,"at":"2026-11-21T06:00:00.000Z","op":"session.freeze","id":"1"}'))
    before = contents(tmp_path)

    with pytest.raises(DataRefused, match=r"session\.freeze"):
        opened(tmp_path)

    assert contents(tmp_path) == before


def test_strict_recovery_refuses_damage_untouched(tmp_path: Path) -> None:
    """recovery = "strict" leaves a damaged directory as it is, each time it is asked."""
    (tmp_path / "chat_sessions.json").mkdir()
    before = contents(tmp_path)

    for _ in range(2):
        with pytest.raises(DataRefused, match="chat_sessions"):
            opened(tmp_path, recovery="strict")

    assert contents(tmp_path) == before


def test_a_held_directory_is_refused_with_the_holder(tmp_path: Path) -> None:
    """The second one is told who has it."""
    with running(tmp_path), pytest.raises(DirectoryLocked, match=str(os.getpid())):
        opened(tmp_path)


@pytest.mark.parametrize("plant", ["directory", "link", "pipe"])
def test_whatever_stands_in_the_place_of_the_lock_is_refused(tmp_path: Path, plant: str) -> None:
    """A lock file that is none is not followed, and the start says so."""
    path = tmp_path / "holdfast.lock"
    if plant == "directory":
        path.mkdir()
    elif plant == "link":
        path.symlink_to("/dev/null")
    else:
        os.mkfifo(path)

    with pytest.raises(DataRefused, match=r"holdfast\.lock"):
        opened(tmp_path)


def test_a_directory_writable_by_all_is_refused(tmp_path: Path) -> None:
    """Anyone could plant files in it."""
    tmp_path.chmod(0o777)

    with pytest.raises(DataRefused, match="chmod 700"):
        opened(tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the directory to somebody else")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """We would lock its owner out."""
    os.chown(tmp_path, 12345, 12345)

    with pytest.raises(DataRefused, match="12345"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Neither locks nor fsync can be relied on there."""
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - {kind} server:/export rw\n"
    real = open

    def mounted(path: Any, *arguments: Any, **options: Any) -> Any:
        return io.StringIO(line) if path == "/proc/self/mountinfo" else real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", mounted)

    with pytest.raises(DataRefused, match=kind):
        opened(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """data_dir must be a directory, or absent."""
    (tmp_path / "data").write_text("")

    with pytest.raises(DataRefused, match="not a directory"):
        opened(tmp_path / "data")


def test_a_cancelled_start_changes_nothing(tmp_path: Path) -> None:
    """Files, journal and evidence are as before."""
    with running(tmp_path) as engine:
        fill(engine)
    (tmp_path / "chat_sessions.json").write_bytes(b'[\n{"recipientPhone":"1","la')
    before = contents(tmp_path)
    cancelled = threading.Event()
    cancelled.set()

    with pytest.raises(Unavailable):
        open_engine(settings_of(tmp_path), clock=HandClock(), log=Log(), cancelled=cancelled)

    assert contents(tmp_path) == before


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below *directory*, but for the lock, which is empty whenever nobody holds it."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "holdfast.lock"
    }


# Settings that name other fields.


@pytest.mark.parametrize("chosen", [{"id_field": "phone"}, {"time_field": "lastSeen"}])
def test_other_field_names_leave_sessions_out_without_losing_the_file(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Sessions written under other names are left out, counted, and kept in the copy of their file."""
    engine = opened(tmp_path)
    fill(engine)
    engine.close()
    log = Log()

    opened(tmp_path, log=log, sessions=chosen).close()

    loaded = log.named("state.loaded")[0]
    assert loaded["sessions"] == 0
    assert loaded["skipped_invalid"] + loaded["dropped_stale"] == 5
    assert b"573003" in next(tmp_path.glob("backups/start-*/chat_sessions.json")).read_bytes()


def test_sessions_under_another_time_field_go_in_their_turn(tmp_path: Path) -> None:
    """When a journal brings sessions of which nobody can tell the age, a start succeeds and they expire."""
    with running(tmp_path) as engine:
        fill(engine)

    clock = HandClock()
    with running(tmp_path, clock=clock, sessions={"time_field": "lastSeen"}) as engine:
        clock.advance(86400 + 120)
        assert engine.page("sessions", since_ms=1).items == []
        assert engine.expire() == 5


ODD_IDS = [
    'with "quotes"',
    "back\\slash",
    "ñandú",
    "日本",
    "a,b",
    "💎",
    "x" * 256,
    "_holdfast",
    "a/../b",
    "'",
    "{",
    "[1]",
]


@pytest.mark.parametrize("fields", [("recipientPhone", "lastActivity"), ("phone", "seen"), ('q"f', 'q"t'), ("ñ", "é")])
def test_odd_ids_and_fields_come_back_from_a_snapshot(tmp_path: Path, fields: tuple[str, str]) -> None:
    """Ids and times are found in our own lines without decoding them, whatever they are made of."""
    chosen = {"id_field": fields[0], "time_field": fields[1]}
    engine = opened(tmp_path, sessions=chosen)
    for n, id in enumerate(ODD_IDS):
        nested = {"lastActivity": "2020-01-01T00:00:00.000Z", "seen": "2020-01-01T00:00:00.000Z", "n": n}
        do(engine, SessionPut(id=id, value={"nested": nested, f'x"{fields[1]}': "2020"}))
    before = everything(engine)
    engine.close()

    with running(tmp_path, sessions=chosen) as engine:
        assert everything(engine) == before
        assert engine.degraded == []


@pytest.mark.parametrize(
    "stamp",
    [
        "2026-11-21T05:30:00.000Z",
        "2026-11-21T05:30:00Z",
        "2026-11-21 05:30:00.000Z",
        "2026-11-21T05:30:00.000000+00:00",
        "2026-11-21T00:30:00-05:00",
        "2026-11-21T05:30",
        "20261121T053000.0000000Z",
        "2026-W47-6T05:30:00.000Z",
        "2026W476T053000.0000000Z",
    ],
)
def test_every_form_of_time_expires_in_its_time(tmp_path: Path, stamp: str) -> None:
    """A session read from a snapshot expires a day after its activity, however that was written."""
    engine = opened(tmp_path)
    do(engine, SessionPut(id="1", value={"lastActivity": stamp}))
    engine.close()

    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        clock.advance(23.4 * 3600)
        assert engine.expire() == 0
        clock.advance(0.2 * 3600)
        assert engine.expire() == 1


def test_a_journal_batch_replays_as_one(tmp_path: Path) -> None:
    """An atomic batch comes back whole, with one seq."""
    with running(tmp_path) as engine:
        do_together(engine, SessionPut(id="1", value={}), OrderPut(id="2", value={}), StatsOrder(product_type="ring"))
        before = everything(engine)

    with running(tmp_path) as engine:
        assert everything(engine) == before
        assert engine.status()["seq"] == 1


def test_a_stray_segment_far_ahead_does_not_hold_up_the_start(tmp_path: Path) -> None:
    """A gap is told by its ends, however many numbers lie in it."""
    with running(tmp_path) as engine:
        fill(engine)
    (tmp_path / "journal" / f"{10**18:020d}.jsonl").write_bytes(b"")

    with running(tmp_path) as engine:
        assert any(f"to {10**18 - 1} are missing" in reason for reason in engine.degraded)


def test_a_start_that_is_refused_keeps_no_descriptor(tmp_path: Path) -> None:
    """A program that tries again and again must not run out of them."""
    with running(tmp_path) as engine:
        fill(engine)
    (tmp_path / "chat_sessions.json").write_bytes(b"\0" * 100)
    with pytest.raises(DataRefused):
        opened(tmp_path, recovery="strict")
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(3):
        with pytest.raises(DataRefused):
            opened(tmp_path, recovery="strict")

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PID in it is a courtesy: without room for it the directory is opened all the same, and closed again."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = tmp_path / "data"
    lock.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        DirectoryLock(lock).release()

    DirectoryLock(lock).release()


def test_an_order_that_was_deleted_does_not_count_again_after_a_crash(tmp_path: Path) -> None:
    """Its mark stands in the journal alone when nothing was flushed."""
    engine = opened(tmp_path)
    do(engine, OrderPut(id="1", value={}))
    do(engine, OrderComplete(id="1", revenue=Decimal("10.10")))
    do(engine, OrderDelete(id="1"))
    engine.close(flush=False)

    with running(tmp_path) as engine:
        do(engine, OrderPut(id="1", value={}))
        do(engine, OrderComplete(id="1", revenue=Decimal("10.10")))

        totals = orjson.loads(engine.sales())["totals"]
        assert totals == {"allTimeOrders": 1, "allTimeRevenue": 10.1, "allTimeCompleted": 1}
