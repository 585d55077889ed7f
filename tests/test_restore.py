"""Going back to a backup or to a moment: exactly, wholly, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson
import pytest

from holdfast.care import moments, put_back, restore, restore_plan, swap
from holdfast.care.backup_set import SET_FILE, BackupSet, SetDamaged, list_sets, read_set
from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.history import History, HistoryGap
from holdfast.care.history_follower import PACK_AFTER_S
from holdfast.care.moments import Target
from holdfast.care.rewind import state_of
from holdfast.clock import Clock, format_ms
from holdfast.core.rules import rules_of
from holdfast.disk.files import Directory
from holdfast.engine import Engine
from holdfast.errors import BadRequest, DataRefused, Gone, NotFound, StorageFull
from holdfast.ops import (
    ConversationDelete,
    MessageAppend,
    OrderComplete,
    OrderPut,
    SessionDelete,
    SessionLease,
    SessionPut,
    UserPut,
)
from tests.crash.harness import FULL, contents
from tests.engine_harness import NOW_MS, HandClock, Log, do, value_of
from tests.restore_harness import all_of, change, copy_of, messages_of, opened, pack_set, settings_of

CHANGES = 42


class Moment(NamedTuple):
    """What was there at a time, and the last event until then."""

    at_ms: int
    seq: int
    seen: dict[str, Any]


class Lived(NamedTuple):
    """A directory that was backed up in the middle of its life.

    Attributes:
        path: of it; not to be changed.
        moments: since the backup.
        now_ms: when it was stopped.
    """

    path: Path
    moments: list[Moment]
    now_ms: int


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One whose journal has everything since the backup."""
    path, clock = tmp_path_factory.mktemp("lived") / "data", HandClock()
    engine = opened(path, clock=clock)
    for number in range(CHANGES // 2):
        clock.advance(1)
        change(engine, number)
    clock.advance(1)
    moments = [Moment(clock.now_ms(), engine.status()["seq"], all_of(engine))]
    engine.close()
    pack_set(path, clock.now_ms())
    engine = opened(path, clock=clock)
    for number in range(CHANGES // 2, CHANGES):
        clock.advance(1)
        change(engine, number)
        moments.append(Moment(clock.now_ms(), engine.status()["seq"], all_of(engine)))
        if number % 10 == 0:
            engine.flush("api")
    engine.close()
    return Lived(path, moments, clock.now_ms())


@pytest.fixture
def directory(lived: Lived, tmp_path: Path) -> Lived:
    """A copy of it that may be changed."""
    return lived._replace(path=copy_of(lived.path, tmp_path / "data"))


def target_at(lived: Lived, at_ms: int | None, name: str | None = None) -> Target:
    history = History(lived.path)
    return moments.choose(lived.path, None, name=name, at_ms=at_ms, now_ms=lived.now_ms, history=history)


def restored(lived: Lived, target: Target) -> restore.RestoreReport:
    """Go back to *target* as the command does on a stopped directory, but that its backups are not proved, which takes long."""
    settings = settings_of(lived.path)
    plan, _ = restore_plan.planned(settings, target, None, History(lived.path), engine=None, now_ms=lived.now_ms)
    restoring = restore.Restoring(settings, target, plan, None, log=Log())
    restoring.prepare()
    report = restoring.finish("", 0, lived.now_ms, is_awaited=True)
    back_up_stopped(settings, "restore", Log(), prove=False)
    return report


def seen_in(lived: Lived, path: Path | None = None) -> dict[str, Any]:
    """What a start on the directory shows."""
    engine = opened(path or lived.path, clock=HandClock(lived.now_ms))
    try:
        assert engine.degraded == []
        return all_of(engine)
    finally:
        engine.close(flush=False)


def test_every_moment_comes_back_exactly(lived: Lived, tmp_path: Path):
    """Whatever moment is asked for, every record, version, figure and message is what it was then."""
    for number, moment in enumerate(lived.moments[:: 1 if FULL else 3]):
        target = target_at(lived, moment.at_ms)
        into = tmp_path / str(number)

        restore.restore_beside(target, into, settings_of(lived.path), None, History(lived.path))

        assert target.seq == moment.seq
        assert seen_in(lived, into) == moment.seen


def test_the_state_of_a_moment_is_had_without_writing(lived: Lived):
    """A state read from backup and history holds each record as it was; the data directory is as before."""
    before = contents(lived.path)
    moment = lived.moments[7]

    state = state_of(
        list_sets(lived.path)[0], None, settings_of(lived.path), up_to_seq=moment.seq, history=History(lived.path)
    )

    for name in ("sessions", "users", "notes", "orders"):
        found = {one.id: (one.version, orjson.loads(one.value)) for one in restore_plan.records_in(state, name)}
        wanted = dict(moment.seen[name])
        assert found == {
            id: wanted[id] for id in wanted if name != "orders" or id not in moment.seen["completed_orders"]
        }
    assert contents(lived.path) == before


def test_a_whole_restore_takes_the_place_of_the_present(directory: Lived):
    """Afterwards the directory is the state of then, numbered above all that was, with the present in a backup."""
    moment, last = directory.moments[5], directory.moments[-1]

    report = restored(directory, target_at(directory, moment.at_ms))

    assert seen_in(directory) == moment.seen
    assert report.seq > last.seq
    assert report.proof.counts["messages"] == sum(len(one[2]) for one in moment.seen["conversations"].values())
    saved = next(found for found in list_sets(directory.path) if found.name == report.saved_as)
    assert saved.manifest is not None and saved.manifest.seq == last.seq
    assert not {swap.STAGING, swap.INTENT} & set(os.listdir(directory.path))


def test_moments_before_a_restore_stay_reachable(directory: Lived):
    """Two histories are never mixed: after going back, a moment that was undone and a moment since both come back."""
    first, undone = directory.moments[3], directory.moments[-2]
    restored(directory, target_at(directory, first.at_ms))
    # The backups of a restore have the time of the system, so what happens between them has it, too.
    engine = opened(directory.path, clock=Clock())
    do(engine, SessionPut(id="new", value={"currentState": "since"}))
    since = Moment(engine.now_ms(), engine.status()["seq"], all_of(engine))
    time.sleep(0.01)
    do(engine, SessionDelete(id="new"))
    directory = directory._replace(now_ms=engine.now_ms())
    engine.close()

    restored(directory, target_at(directory, undone.at_ms))
    seen_undone = seen_in(directory)
    directory = directory._replace(now_ms=Clock().now_ms())
    restored(directory, target_at(directory, since.at_ms))

    assert seen_undone == undone.seen
    assert seen_in(directory) == since.seen


def test_a_restore_to_a_backup_needs_no_history(directory: Lived):
    """A set alone is enough: journal and history may be gone."""
    name = list_sets(directory.path)[0].name
    shutil.rmtree(directory.path / "journal" / "kept", ignore_errors=True)
    shutil.rmtree(directory.path / "backups" / "journal", ignore_errors=True)

    restored(directory, target_at(directory, None, name))

    assert seen_in(directory) == directory.moments[0].seen


def test_event_readers_begin_anew_after_a_restore(directory: Lived):
    """Whoever resumes behind an event of the old history is told to read the present state."""
    last = directory.moments[-1].seq
    restored(directory, target_at(directory, directory.moments[2].at_ms))
    engine = opened(directory.path, clock=HandClock(directory.now_ms))

    for after in (0, last - 3, last):
        with pytest.raises(Gone):
            next(iter(engine.events(after)))
    engine.close(flush=False)


def test_old_sessions_come_back_and_are_told(directory: Lived):
    """A restore brings sessions back that are too old by now; the plan says how many the next expiry takes."""
    later = directory._replace(now_ms=directory.now_ms + 48 * 3600 * 1000)
    target = target_at(later, directory.moments[0].at_ms)

    plan, _ = restore_plan.planned(
        settings_of(later.path), target, None, History(later.path), engine=None, now_ms=later.now_ms
    )
    report = restored(later, target)

    assert plan.expiring == len(directory.moments[0].seen["sessions"]) == report.proof.counts["sessions"]


def test_a_plan_counts_what_would_change(lived: Lived):
    """Each collection with its records now and then, what is added, changed and removed, and how old they are."""
    moment, last = lived.moments[4], lived.moments[-1]

    plan, _ = restore_plan.planned(
        settings_of(lived.path),
        target_at(lived, moment.at_ms),
        None,
        History(lived.path),
        engine=None,
        now_ms=lived.now_ms,
    )

    rows = {row.collection: row for row in plan.rows}
    for name in ("sessions", "users", "notes", "completed_orders", "conversations"):
        then, now = moment.seen[name], last.seen[name]
        both = then.keys() & now.keys()
        row = rows[name]
        assert (row.now, row.then) == (len(now), len(then))
        assert row.added == len(then.keys() - now.keys()) and row.removed == len(now.keys() - then.keys())
        assert row.changed == sum(then[id][1] != now[id][1] for id in both)
    assert plan.has_other_sales == (moment.seen["sales"] != last.seen["sales"])
    newest = rows["sessions"].newest
    assert newest is not None and newest <= format_ms(moment.at_ms)


# What cannot be restored.


def assert_nothing_changed(lived: Lived, before: dict[str, bytes]) -> None:
    assert contents(lived.path) == before


def test_moments_that_no_backup_reaches_are_refused(lived: Lived):
    """Before the oldest backup, and in the future: the error says from when on."""
    before = contents(lived.path)

    with pytest.raises(BadRequest, match=r"from .* on, the oldest"):
        target_at(lived, NOW_MS)
    with pytest.raises(BadRequest, match="that is over"):
        target_at(lived, lived.now_ms + 1)
    assert_nothing_changed(lived, before)


def test_an_unknown_backup_is_refused_with_those_there_are(lived: Lived):
    """The names that could have been meant stand in the error."""
    with pytest.raises(NotFound, match=list_sets(lived.path)[0].name):
        target_at(lived, None, "2020-01-01T000000.000Z")


def test_without_any_backup_there_is_nothing_to_go_back_to(tmp_path: Path):
    """An error that says how to make one."""
    opened(tmp_path / "data").close()

    with pytest.raises(NotFound, match="holdfast backup"):
        target_at(Lived(tmp_path / "data", [], NOW_MS), None)


def test_a_gap_in_the_history_is_named(directory: Lived):
    """Events that are nowhere: refused with their numbers, nothing changed."""
    for path in [*(directory.path / "journal").glob("**/*.jsonl"), *(directory.path / "backups/journal").glob("*")]:
        if directory.moments[2].seq in range(int(path.name[:20]), int(path.name[:20]) + 12):
            path.unlink()
    before = contents(directory.path)

    with pytest.raises(HistoryGap, match="events"):
        restored(directory, target_at(directory, directory.moments[-1].at_ms))
    assert_nothing_changed(directory, before)


def test_a_history_that_is_gone_is_not_taken_for_silence(directory: Lived):
    """With every event since the backup gone, a later moment is refused instead of answered with the backup's state."""
    shutil.rmtree(directory.path / "journal")
    shutil.rmtree(directory.path / "backups" / "journal", ignore_errors=True)

    with pytest.raises(HistoryGap, match="events"):
        target_at(directory, directory.moments[-1].at_ms)


def test_a_moment_since_a_restore_is_never_the_state_before_it(directory: Lived):
    """Without a backup of the restored state, nor any event since, it is refused; the next look takes that backup."""
    settings, first = settings_of(directory.path), directory.moments[3]
    target = target_at(directory, first.at_ms)
    plan, _ = restore_plan.planned(
        settings, target, None, History(directory.path), engine=None, now_ms=directory.now_ms
    )
    restoring = restore.Restoring(settings, target, plan, None, log=Log())
    restoring.prepare()
    restoring.finish("", 0, directory.now_ms, is_awaited=True)
    later = directory._replace(now_ms=Clock().now_ms() + 1)

    with pytest.raises(HistoryGap):
        target_at(later, later.now_ms)

    engine = opened(directory.path, clock=Clock())
    engine.backups.run_when_due()
    later = directory._replace(now_ms=engine.now_ms())
    engine.close()
    restored(later, target_at(later, later.now_ms))
    assert seen_in(later) == first.seen


def test_an_empty_directory_that_is_started_keeps_the_history_it_was_given(directory: Lived, tmp_path: Path):
    """Backups were copied to a new machine, and the daemon came before the restore: every moment is still there."""
    with Directory(directory.path) as data:
        restore.keep_history(data, None)
    shutil.copytree(directory.path / "backups", tmp_path / "new" / "backups")
    there, wanted = directory._replace(path=tmp_path / "new"), directory.moments[5]
    engine = opened(there.path, clock=HandClock(directory.now_ms + 1))
    assert any("what is missing is in the backups" in reason for reason in engine.degraded)
    engine.close()

    restored(there, target_at(there, wanted.at_ms))

    assert seen_in(there) == wanted.seen


def test_the_number_that_a_restored_state_took_is_no_gap(directory: Lived):
    """The history goes on behind it, and nobody is told that an event was lost."""
    report = restored(directory, target_at(directory, directory.moments[3].at_ms))
    clock, log = HandClock(Clock().now_ms()), Log()
    engine = opened(directory.path, clock=clock, log=log)
    for number in (CHANGES, CHANGES + 1):
        change(engine, number)
        engine.flush("interval")
        clock.advance(PACK_AFTER_S)
    engine.backups.history.step()
    engine.close()

    assert log.named("history.gap_found") == []
    assert report.seq + 1 in {part.first_seq for part in History(directory.path).parts() if part.is_packed}


def test_a_directory_put_back_from_an_older_copy_mixes_no_histories(directory: Lived, tmp_path: Path):
    """What its backups know beyond the copy stays there, and comes back by their names; no moment is made of both."""
    older, clock = copy_of(directory.path, tmp_path / "older"), HandClock(directory.now_ms)
    engine = opened(directory.path, clock=clock)
    for number in range(CHANGES, CHANGES + 30):
        clock.advance(1)
        change(engine, number)
    clock.advance(1)
    undone = engine.backup("api").name
    clock.advance(1)
    undone_ms, undone_seen = clock.now_ms(), all_of(engine)
    engine.close()
    with Directory(directory.path) as data:
        restore.keep_history(data, None)
    for path in directory.path.iterdir():
        if path.name != "backups":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(older, directory.path, ignore=shutil.ignore_patterns("backups"), dirs_exist_ok=True)

    clock.advance(60)
    log = Log()
    engine = opened(directory.path, clock=clock, log=log)
    assert any("older copy" in reason for reason in engine.degraded)
    assert log.named("history.set_aside") and list((directory.path / "quarantine").iterdir())
    for number in range(CHANGES + 30, CHANGES + 70):
        clock.advance(1)
        change(engine, number)
    directory = directory._replace(now_ms=clock.now_ms())
    with pytest.raises(HistoryGap):
        target_at(directory, clock.now_ms())
    clock.advance(1)
    engine.backups.run_when_due()
    clock.advance(1)
    change(engine, CHANGES + 70)
    clock.advance(1)
    directory, present = directory._replace(now_ms=clock.now_ms()), all_of(engine)
    engine.close()

    for wanted, seen in (
        (target_at(directory, undone_ms), undone_seen),
        (target_at(directory, clock.now_ms()), present),
    ):
        into = tmp_path / str(wanted.seq)
        restore.restore_beside(wanted, into, settings_of(directory.path), None, History(directory.path))
        assert seen_in(directory, into) == seen
    assert target_at(directory, None, "latest").found.name != undone


def _spoilt(found: BackupSet) -> Iterator[tuple[str, bytes]]:
    for path in sorted(found.path.iterdir()):
        raw = path.read_bytes()
        if path.name != "proof.json":
            yield f"{path.name} cut short", raw[:-1]
            yield (
                f"{path.name} with one byte changed",
                raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
            )


def test_a_spoilt_backup_is_refused(directory: Lived, tmp_path: Path):
    """Any file of it cut short or with one byte changed: refused with the file's name, nothing changed."""
    found = list_sets(directory.path)[0]
    for what, raw in list(_spoilt(found)):
        path = found.path / what.partition(" ")[0]
        whole = path.read_bytes()
        path.write_bytes(raw)
        before = contents(directory.path)

        with pytest.raises(SetDamaged) as refused:
            target = target_at(directory, None, found.name)
            restore.restore_beside(
                target, tmp_path / "into", settings_of(directory.path), None, History(directory.path)
            )

        assert path.name.removesuffix(".zst") in str(refused.value) and "\n" not in str(refused.value), what
        assert "choose another" in str(refused.value), what
        assert not (tmp_path / "into").exists()
        assert_nothing_changed(directory, before)
        path.write_bytes(whole)


def out_of_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["mkdir", "open", "write"])
def test_a_disk_without_room_is_told_with_what_to_do(directory: Lived, monkeypatch: pytest.MonkeyPatch, call: str):
    """Whatever of it fails first: how much it takes, how much there is; nothing changed."""
    target = target_at(directory, None)
    before = contents(directory.path)

    with monkeypatch.context() as full, pytest.raises(StorageFull, match=r"expected .* found .*--into.*Nothing was"):
        opened_before = os.open
        full.setattr(
            os,
            call,
            out_of_room
            if call != "open"
            else lambda path, flags, *a, **k: (
                out_of_room() if flags & os.O_CREAT and flags & os.O_EXCL else opened_before(path, flags, *a, **k)
            ),
        )
        restored(directory, target)

    assert_nothing_changed(directory, before)


def test_a_backup_of_a_newer_format_is_refused(directory: Lived):
    """It says which format it has and what to install."""
    found = list_sets(directory.path)[0]
    assert found.manifest is not None
    newer = msgspec.structs.replace(found.manifest, data_format=99)
    (found.path / SET_FILE).write_bytes(restore_manifest(newer))

    with pytest.raises(DataRefused, match="format 99"):
        target_at(directory, None, found.name)


def restore_manifest(manifest: Any) -> bytes:
    from holdfast.care.backup_set import encode_set_manifest

    return encode_set_manifest(manifest)


@pytest.mark.parametrize("place", ["beside", "backups/beside", "."])
def test_the_data_directory_is_no_place_to_restore_into(directory: Lived, tmp_path: Path, place: str):
    """Also by way of a link: nothing of ours looks after what would stand there."""
    (tmp_path / "link").symlink_to(directory.path)
    before = contents(directory.path)

    for root in (directory.path, tmp_path / "link"):
        with pytest.raises(BadRequest, match="outside of the data directory"):
            restore.restore_beside(
                target_at(directory, None), root / place, settings_of(directory.path), None, History(directory.path)
            )

    assert contents(directory.path) == before


def test_a_directory_with_something_in_it_is_no_place_to_restore_into(lived: Lived, tmp_path: Path):
    """--into never touches what is there."""
    (tmp_path / "kept").write_text("mine")

    with pytest.raises(BadRequest, match="empty or missing"):
        restore.restore_beside(
            target_at(lived, None, "latest"), tmp_path, settings_of(lived.path), None, History(lived.path)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_target_is_told_before_anything_is_written(directory: Lived, monkeypatch: pytest.MonkeyPatch):
    """How much is needed and how much is free; the present is as it was."""
    before = contents(directory.path)
    monkeypatch.setattr(Directory, "space", lambda self: (1_000, 1_000_000))

    with pytest.raises(StorageFull, match=r"expected .* KiB .* found 1000 bytes"):
        restored(directory, target_at(directory, directory.moments[0].at_ms))
    assert_nothing_changed(directory, before)


# The swap.


def test_a_swap_is_completed_wherever_it_was_broken_off(lived: Lived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Failing at each rename of the swap in turn: the next start has the new state, whole."""
    moment = lived.moments[6]
    target = target_at(lived, moment.at_ms)
    ready = copy_of(lived.path, tmp_path / "ready")
    with Directory(ready) as data:
        data.subdirectory(swap.STAGING).close()
    prepared = restore.prepare(target, ready / swap.STAGING, settings_of(ready), None, History(ready))
    failures = 0
    while True:
        broken = lived._replace(path=copy_of(ready, tmp_path / "data"))
        if not _is_broken_off(broken, target, prepared, failures, monkeypatch):
            break
        assert seen_in(broken) == moment.seen, failures
        assert not {swap.STAGING, swap.INTENT} & set(os.listdir(broken.path))
        failures += 1 if FULL else 4

    assert failures > 20


def _is_broken_off(
    lived: Lived, target: Target, prepared: restore.Prepared, whole: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Swap on a disk that refuses every rename after *whole* of them; whether that was before the end."""
    left, rename = whole, os.rename

    def failing(*arguments: Any, **options: Any) -> None:
        nonlocal left
        if (lived.path / swap.INTENT).exists():
            left -= 1
            if left < 0:
                raise OSError(5, "Input/output error")
        rename(*arguments, **options)

    with monkeypatch.context() as patched, contextlib.suppress(OSError):
        patched.setattr(os, "rename", failing)
        restore.take_place(lived.path, prepared, target, seal=None, keeps_history=False, now_ms=lived.now_ms)
    return left < 0


def test_what_was_prepared_but_not_decided_is_forgotten(directory: Lived):
    """Killed before the swap was decided, the next start has the old state and no leftovers."""
    target = target_at(directory, directory.moments[1].at_ms)
    with Directory(directory.path) as data:
        data.subdirectory(swap.STAGING).close()
    restore.prepare(target, directory.path / swap.STAGING, settings_of(directory.path), None, History(directory.path))

    assert seen_in(directory) == directory.moments[-1].seen
    assert swap.STAGING not in os.listdir(directory.path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "cannot be read"),
        (b'{"format": 99}', "format 99"),
        (b'{"format": 1, "staged": ["../x"]}', "no file of ours"),
        (b'{"format": 1, "staged": ["gone.json"]}', "gone.json"),
    ],
)
def test_an_intent_that_means_nothing_stops_the_start(directory: Lived, raw: bytes, says: str):
    """Nobody guesses what a restore was about to do: the start is refused, nothing is touched."""
    (directory.path / swap.INTENT).write_bytes(raw)
    before = contents(directory.path)

    with pytest.raises(DataRefused, match=says):
        opened(directory.path)
    assert_nothing_changed(directory, before)


# Parts.


def put_part_back(lived: Lived, engine: Engine, at_ms: int, part: put_back.Part) -> put_back.PartRestored:
    settings, history = settings_of(lived.path), History(lived.path)
    target = moments.choose(lived.path, None, name=None, at_ms=at_ms, now_ms=engine.now_ms(), history=history)
    _, then = restore_plan.planned(
        settings, target, None, history, engine=engine, now_ms=engine.now_ms(), part=(part.collections, part.id)
    )
    messages = put_back.messages_from(target, lived.path, None, history)
    return put_back.put_back(engine, part, then, rules_of(settings), messages)


@pytest.fixture
def served(directory: Lived) -> Iterator[tuple[Lived, Engine]]:
    """The directory with an engine on it, which a part is put back into."""
    engine = opened(directory.path, clock=HandClock(directory.now_ms + 1_000))
    yield directory, engine
    engine.close(flush=False)


@pytest.mark.parametrize("name", ["sessions", "users", "notes", "orders", "completed_orders"])
def test_one_collection_comes_back_and_nothing_else_changes(served: tuple[Lived, Engine], name: str):
    """Its records are those of then, those since are gone; every other record and figure is as it was."""
    lived, engine = served
    moment, before = lived.moments[3], all_of(engine)

    report = put_part_back(lived, engine, moment.at_ms, put_back.part_of_collection(name))

    after = all_of(engine)
    assert values(after, name) == values(moment.seen, name)
    others = {"sessions", "users", "notes", "sales", "conversations"} - {name}
    assert {other: after[other] for other in others} == {other: before[other] for other in others}
    assert report.refused == 0
    again = put_part_back(lived, engine, moment.at_ms, put_back.part_of_collection(name))
    assert (again.added, again.changed, again.removed) == (0, 0, 0)


def values(seen: dict[str, Any], name: str) -> dict[str, Any]:
    closed = seen["completed_orders"] if name == "orders" else {}
    return {id: one[1] for id, one in seen[name].items() if id not in closed}


def test_one_session_comes_back(served: tuple[Lived, Engine]):
    """A deleted session is there again, as it was; its neighbours stay as they are."""
    lived, engine = served
    moment = lived.moments[3]
    id = next(iter(moment.seen["sessions"]))
    do(engine, SessionDelete(id=id))
    before = all_of(engine)["sessions"]

    report = put_part_back(lived, engine, moment.at_ms, put_back.Part("sessions", id))

    assert value_of(engine, "sessions", id) == moment.seen["sessions"][id][1]
    assert {other: one for other, one in all_of(engine)["sessions"].items() if other != id} == before
    assert (report.added, report.changed, report.removed) == (1, 0, 0)


def test_a_session_that_would_expire_at_once_is_touched(directory: Lived):
    """Asked for by name, it is wanted: its lastActivity is now."""
    clock = HandClock(directory.now_ms + 48 * 3600 * 1000)
    engine = opened(directory.path, clock=clock)
    id = next(iter(directory.moments[3].seen["sessions"]))

    put_part_back(directory, engine, directory.moments[3].at_ms, put_back.Part("sessions", id))
    engine.expire()

    assert value_of(engine, "sessions", id)["lastActivity"] == format_ms(clock.now_ms())
    engine.close(flush=False)


def test_a_leased_session_is_left_to_its_worker(served: tuple[Lived, Engine]):
    """It is counted as refused with the reason, the others come back."""
    lived, engine = served
    moment = lived.moments[3]
    id = next(iter(moment.seen["sessions"]))
    do(engine, SessionPut(id=id, value={"currentState": "since"}))
    do(engine, SessionLease(id=id, ttl=60))

    report = put_part_back(lived, engine, moment.at_ms, put_back.part_of_collection("sessions"))

    assert report.refused == 1 and "leased" in report.reasons[0]
    assert value_of(engine, "sessions", id) != moment.seen["sessions"][id][1]


def test_an_order_comes_back_from_either_side(served: tuple[Lived, Engine]):
    """Pending then and completed since, it is pending again; completed then and deleted, it is completed, digit by digit."""
    lived, engine = served
    moment = lived.moments[3]
    pending = next(id for id in moment.seen["orders"] if id not in moment.seen["completed_orders"])
    closed = next(iter(moment.seen["completed_orders"]))
    do(engine, OrderComplete(id=pending))
    raw_closed = engine.get("completed_orders", closed)
    assert raw_closed is not None
    sales = engine.sales()
    do(engine, put_back.OrderDelete(id=closed))

    put_part_back(lived, engine, moment.at_ms, put_back.Part("orders", pending))
    put_part_back(lived, engine, moment.at_ms, put_back.Part("orders", closed))

    assert engine.get("completed_orders", pending) is None
    assert value_of(engine, "orders", pending) == moment.seen["orders"][pending][1]
    again = engine.get("completed_orders", closed)
    assert again is not None and again.value == raw_closed.value
    do(engine, OrderComplete(id=closed))
    assert engine.sales() == sales


def test_a_conversation_comes_back_with_its_messages(served: tuple[Lived, Engine]):
    """Deleted, or gone on since: the conversation is again what it was, message by message."""
    lived, engine = served
    moment = lived.moments[5]
    gone, longer = sorted(moment.seen["conversations"])[:2]
    do(engine, ConversationDelete(id=gone))
    do(engine, MessageAppend(id=longer, role="user", content="since"))

    for id in (gone, longer):
        put_part_back(lived, engine, moment.at_ms, put_back.Part("conversations", id))

    for id in (gone, longer):
        _, head, messages = moment.seen["conversations"][id]
        assert messages_of(engine, id) == messages
        assert value_of(engine, "conversations", id) == head


def test_what_was_not_there_then_cannot_come_back(served: tuple[Lived, Engine]):
    """A record that the moment does not have is an error, not a removal."""
    lived, engine = served
    do(engine, UserPut(id="later", value={"name": "Ana"}))

    with pytest.raises(NotFound, match="later"):
        put_part_back(lived, engine, lived.moments[3].at_ms, put_back.Part("users", "later"))
    assert value_of(engine, "users", "later") is not None


def test_a_collection_that_neither_has_is_an_error(served: tuple[Lived, Engine]):
    """A slip of the pen is not a restore of nothing: the names that there are are told."""
    lived, engine = served

    with pytest.raises(NotFound, match=r"'nots'; there are now: .*notes"):
        put_part_back(lived, engine, lived.moments[3].at_ms, put_back.Part("nots"))


@pytest.mark.parametrize(
    "file", ["sales_stats.json", "_leases.json", "_conversations.json", "manifest.json", "x/y", ""]
)
def test_files_that_mean_nothing_alone_are_refused(file: str):
    """The error says what can be put back alone."""
    with pytest.raises(BadRequest):
        put_back.part_of_file(file)


def test_files_are_known_by_their_names():
    """As they stand in the data directory."""
    assert put_back.part_of_file("chat_sessions.json") == put_back.Part("sessions")
    assert put_back.part_of_file("pending_orders.json") == put_back.Part("orders")
    assert put_back.part_of_file("notes.json") == put_back.Part("notes")


def test_a_set_reads_the_same_after_its_directory_is_gone(lived: Lived, tmp_path: Path):
    """A set that was carried elsewhere restores into an empty place without anything of the old one."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(list_sets(lived.path)[0].path, elsewhere / "backups" / list_sets(lived.path)[0].name)
    found = read_set(next((elsewhere / "backups").iterdir()))
    assert found.manifest is not None
    target = Target(found, found.manifest.seq, lived.now_ms, False)

    restore.restore_beside(target, tmp_path / "into", settings_of(elsewhere), None, History(elsewhere))

    assert seen_in(lived, tmp_path / "into") == lived.moments[0].seen


def test_an_order_put_back_counts_in_no_figure(served: tuple[Lived, Engine]):
    """Deleted and put back, its completion and revenue stand in the figures once."""
    lived, engine = served
    do(engine, OrderPut(id="again", value={"recipientPhone": "573001234567"}))
    before = engine.sales()

    put_part_back(lived, engine, lived.moments[3].at_ms, put_back.part_of_collection("orders"))

    assert engine.sales() == before


def test_an_intent_whose_files_are_gone_is_refused(tmp_path: Path) -> None:
    """Somebody removed ``restore/``: nothing more may go, and what to do is told."""
    (tmp_path / "chat_sessions.json").write_text("[]")
    (tmp_path / "notes.json").write_text("[]")
    with Directory(tmp_path) as data:
        swap.decide(data, swap.Intent(staged=("chat_sessions.json",), removed=("notes.json",)))

        with pytest.raises(DataRefused, match=r"put restore/ back, or remove .*restore\.json"):
            swap.complete(data)

    assert (tmp_path / "notes.json").exists()
