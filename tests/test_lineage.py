"""Whose seqs those of a backup are: what is of another data directory is used when it is named, and only then."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from holdfast.care import moments, restore, restore_plan
from holdfast.care.backup_set import BACKUPS, SET_FILE, BackupSet, SetDamaged, lineage_of, list_sets
from holdfast.care.backup_stopped import back_up_stopped, list_stopped
from holdfast.care.copies import Copies, fetch
from holdfast.care.history import History, HistoryGap
from holdfast.care.history_follower import packed_parts
from holdfast.care.rotation import stale
from holdfast.care.store import Store, store_of
from holdfast.care.verify import verify
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import MANIFEST
from holdfast.errors import BadRequest
from holdfast.ops import MessageAppend, SessionPut
from holdfast.settings import BackupSettings, chosen
from tests.engine_harness import NOW_MS, HandClock, Log, do, value_of
from tests.restore_harness import messages_of, opened, pack_set, settings_of

HOUR_MS = 3_600_000


def live(path: Path, who: str, count: int, clock: HandClock | None = None) -> None:
    """A stop after *count* sessions of *who*."""
    engine = opened(path, clock=clock or HandClock())
    for number in range(count):
        do(engine, SessionPut(id=f"{who}-{number}", value={"currentState": who}))
    engine.close()


def strange_set(tmp_path: Path, path: Path, at_ms: int) -> BackupSet:
    """In the directory *path* a set of another one, whose seqs are lower."""
    live(tmp_path / "other", "other", 3)
    return pack_set(tmp_path / "other", at_ms, into=path)


def states(path: Path) -> set[str]:
    """Of whom the sessions are that a start on *path* finds."""
    engine = opened(path, clock=HandClock())
    try:
        found = {str(value_of(engine, "sessions", one.id)["currentState"]) for one in engine.everything("sessions")}
        return found
    finally:
        engine.close()


def whole_restore(path: Path, name: str, at_ms: int | None = None) -> None:
    """As the command, but that nothing is proved, which takes long."""
    now_ms = NOW_MS + 2 * HOUR_MS
    settings, history = settings_of(path), History(path)
    target = moments.choose(path, None, name=name, at_ms=at_ms, now_ms=now_ms, history=history)
    plan, _ = restore_plan.planned(settings, target, None, history, engine=None, now_ms=now_ms)
    restoring = restore.Restoring(settings, target, plan, None, log=Log())
    restoring.prepare()
    restoring.finish("", 0, now_ms, is_awaited=True)


def test_a_directory_keeps_its_lineage(tmp_path: Path):
    """Through flushes, restarts and the loss of its manifest; two directories never share one."""
    first, second = tmp_path / "first", tmp_path / "second"
    live(first, "first", 2)
    live(second, "second", 2)
    lineage = lineage_of(first)
    live(first, "first", 4)
    back_up_stopped(settings_of(first), "api", Log(), prove=False)

    (first / MANIFEST).unlink()
    live(first, "first", 1)

    assert len(lineage) == 32 and lineage_of(first) == lineage != lineage_of(second)
    assert [found.manifest.lineage for found in list_sets(first) if found.manifest] == [lineage]


def test_a_strange_backup_is_never_taken_unasked(tmp_path: Path):
    """Neither to mend a file, though it is the newest, nor as the latest, nor for a moment."""
    path = tmp_path / "data"
    live(path, "ours", 20)
    ours = pack_set(path, NOW_MS)
    strange = strange_set(tmp_path, path, NOW_MS + HOUR_MS)
    now_ms = NOW_MS + 2 * HOUR_MS
    history = History(path)

    latest = moments.choose(path, None, name="latest", at_ms=None, now_ms=now_ms, history=history)
    with pytest.raises(BadRequest, match="of another data directory"):
        moments.choose(path, None, name=strange.name, at_ms=now_ms - 1, now_ms=now_ms, history=history)
    (path / "chat_sessions.json").write_bytes(b"\0" * 100)

    assert latest.found.name == ours.name
    assert states(path) == {"ours"}


def test_a_strange_backup_is_shown_as_one_and_stays(tmp_path: Path):
    """In the list and by verify; rotation removes none that it has not made."""
    path = tmp_path / "data"
    live(path, "ours", 20)
    for hour in range(4):
        pack_set(path, NOW_MS + hour * HOUR_MS)
    strange = strange_set(tmp_path, path, NOW_MS - HOUR_MS)
    few = BackupSettings(keep=1, keep_daily=0, keep_weekly=0, keep_monthly=0, pitr=0.0)

    listed = {info.name: info.foreign for info in list_stopped(settings_of(path)).items}
    going = stale(list_sets(path), few, NOW_MS + 9 * HOUR_MS)
    findings = verify(path, settings_of(path)).findings

    assert [name for name, foreign in listed.items() if foreign] == [strange.name]
    assert len(going) == 3 and strange.name not in {found.name for found in going}
    assert any(strange.name in finding.found for finding in findings if finding.severity == "notice")


def test_a_new_machine_takes_over_what_the_lost_one_was(tmp_path: Path):
    """It has run empty, and then gets the backups of the lost one: the latest is restored, and all are its own from then on."""
    lost, new = tmp_path / "lost", tmp_path / "new"
    live(lost, "lost", 5)
    pack_set(lost, NOW_MS)
    live(new, "new", 1)
    shutil.copytree(lost / BACKUPS, new / BACKUPS, dirs_exist_ok=True)

    whole_restore(new, "latest")

    assert states(new) == {"lost"}
    assert lineage_of(new) == lineage_of(lost)
    foreign = {found.manifest.reason: found.is_foreign for found in list_sets(new) if found.manifest}
    assert foreign["api"] is False, "its sets"


def test_a_new_machine_that_ran_empty_gets_the_history_as_well(tmp_path: Path):
    """With the backup that is fetched; moments behind that one are reached then."""
    lost, new = tmp_path / "lost", tmp_path / "new"
    store, made = second_place(tmp_path, lost)
    live(new, "new", 0)

    fetched = fetch(store, "latest", new)

    assert (fetched.found.name, fetched.history, fetched.left) == (made.name, 2, "")
    now_ms = NOW_MS + 9 * HOUR_MS
    target = moments.choose(new, None, name=None, at_ms=now_ms - 1, now_ms=now_ms, history=History(new))
    assert target.seq == 10


def test_the_history_of_another_directory_is_never_laid_beside_ours(tmp_path: Path):
    """Its set is, and is a stranger here; the same numbers are other events."""
    store, made = second_place(tmp_path, tmp_path / "other")
    path = tmp_path / "data"
    live(path, "ours", 3)

    fetched = fetch(store, "latest", path)

    assert (fetched.found.name, fetched.history) == (made.name, 0)
    assert "another data directory" in fetched.left
    assert packed_parts(path) == []


def test_ours_comes_back_beside_what_is_here(tmp_path: Path):
    """What was lost of our own history is fetched, however much has happened."""
    path = tmp_path / "data"
    store, _ = second_place(tmp_path, path)
    shutil.rmtree(path / BACKUPS)
    live(path, "ours", 12)

    assert fetch(store, "latest", path).history == 2


def test_no_strange_history_comes_to_one_that_runs(tmp_path: Path):
    """It may have its first event in the next moment, and that would have the number of another."""
    store, _ = second_place(tmp_path, tmp_path / "other")
    engine = opened(tmp_path / "data", clock=HandClock())
    try:
        while_running = fetch(store, "latest", tmp_path / "data")
    finally:
        engine.close()
    afterwards = fetch(store, "latest", tmp_path / "data")

    assert while_running.history == 0 and "stop it" in while_running.left
    assert (afterwards.bytes, afterwards.history) == (0, 2)


def test_a_backup_of_another_directory_is_named_when_ours_cannot_be_read(tmp_path: Path):
    """It is not taken unasked, but whoever has lost everything else may want it; for a moment it is of no use."""
    path = tmp_path / "data"
    live(path, "ours", 20)
    ours = pack_set(path, NOW_MS)
    strange = strange_set(tmp_path, path, NOW_MS + HOUR_MS)
    (ours.path / SET_FILE).write_bytes(b"")
    now_ms, history = NOW_MS + 2 * HOUR_MS, History(path)

    for at_ms, name in ((None, "latest"), (now_ms - 1, None)):
        with pytest.raises(
            SetDamaged, match=rf"{ours.name}.*{strange.name}, which can be read, is of another data dir"
        ):
            moments.choose(path, None, name=name, at_ms=at_ms, now_ms=now_ms, history=history)


def second_place(tmp_path: Path, path: Path) -> tuple[Store, BackupSet]:
    """Where the only set of the new directory *path*, and its history, stand as well; ten events, five in the set."""
    live(path, path.name, 5)
    made = pack_set(path, NOW_MS)
    live(path, path.name, 5)
    with Directory(path) as data:
        restore.keep_history(data, None)
    (tmp_path / "place").mkdir()
    store = store_of(chosen({"data_dir": str(path), "backups.copy_to": str(tmp_path / "place")}))
    store.put(made, lambda: False)
    with Directory(path / BACKUPS / "journal") as packed:
        for name in packed.names():
            store.put_history(packed, name, lambda: False)
    return store, made


def test_the_present_can_be_had_back_after_a_strange_restore(tmp_path: Path):
    """What was there before stands in the backup that the restore made, which is foreign now, and is named."""
    path = tmp_path / "data"
    live(path, "ours", 20)
    own = lineage_of(path)
    strange = strange_set(tmp_path, path, NOW_MS)

    whole_restore(path, strange.name)
    assert states(path) == {"other"} and lineage_of(path) != own
    before = next(found for found in list_sets(path) if found.is_foreign)
    whole_restore(path, before.name)

    assert states(path) == {"ours"} and lineage_of(path) == own


def test_a_directory_restored_beside_has_a_life_of_its_own(tmp_path: Path):
    """Backups of both may come together later."""
    path, beside = tmp_path / "data", tmp_path / "beside"
    live(path, "ours", 5)
    pack_set(path, NOW_MS)
    history = History(path)
    target = moments.choose(path, None, name="latest", at_ms=None, now_ms=NOW_MS + HOUR_MS, history=history)

    restore.restore_beside(target, beside, settings_of(path), None, history)

    assert states(beside) == {"ours"}
    assert lineage_of(beside) not in ("", lineage_of(path))


def test_two_directories_do_not_share_a_second_place(tmp_path: Path):
    """The numbers of their events are the same, and the sets of one would be rotated away for those of the other."""
    place = tmp_path / "place"
    place.mkdir()
    first, second = tmp_path / "first", tmp_path / "second"

    _, first_set = copied(first, NOW_MS, place)
    failure, second_set = copied(second, NOW_MS + HOUR_MS, place)

    assert (place / first_set.name / SET_FILE).exists() and not (place / second_set.name).exists()
    assert first_set.name in failure and "a place of its own" in failure


def copied(path: Path, at_ms: int, place: Path) -> tuple[str, BackupSet]:
    """What became of copying a set of a new directory *path* to *place*: why it failed, and the set."""
    live(path, path.name, 3)
    made = pack_set(path, at_ms)
    settings = chosen({"data_dir": str(path), "backups.copy_to": str(place)})
    copies = Copies(path, lambda: settings, lambda: at_ms, Log())
    copies.start()
    until = time.monotonic() + 20
    while not (copies.state.failures or (place / made.name / SET_FILE).exists()):
        assert time.monotonic() < until, "nothing was tried"
        time.sleep(0.01)
    copies.close()
    return copies.state.failure, made


def test_moments_of_two_directories_are_not_mixed(tmp_path: Path):
    """What was packed of the present's history goes aside when another directory's state takes its place."""
    path = tmp_path / "data"
    live(path, "ours", 20)
    with Directory(path) as data:
        assert restore.keep_history(data, None) == 20
    strange = strange_set(tmp_path, path, NOW_MS - HOUR_MS // 2)

    whole_restore(path, strange.name)

    with pytest.raises(HistoryGap):
        whole_restore(path, strange.name, at_ms=NOW_MS + HOUR_MS)
    assert states(path) == {"other"}
    assert any(name.name.endswith(".jsonl.zst") for name in (path / "quarantine").iterdir())


def test_a_lineage_outlives_manifest_and_backups(tmp_path: Path):
    """It is noted beside the backups as well, so that neither a stranger's nor a new one takes its place."""
    path = tmp_path / "data"
    live(path, "ours", 5)
    lineage = lineage_of(path)
    made = back_up_stopped(settings_of(path), "api", Log(), prove=False)
    strange_set(tmp_path, path, NOW_MS + 30 * 24 * HOUR_MS)
    shutil.rmtree(made.path)

    for damage in (b"", (path / MANIFEST).read_bytes()[:-20]):
        (path / MANIFEST).write_bytes(damage)
        live(path, "ours", 6)
        assert lineage_of(path) == lineage


def test_messages_of_an_abandoned_life_do_not_come_back(tmp_path: Path):
    """The directory was put back from an older copy, the backups were not, and then the archive is lost."""
    path, copy = tmp_path / "data", tmp_path / "copy"
    say(path, 0, "first", "second")
    shutil.copytree(path, copy)
    say(path, 0, "abandoned")
    pack_set(path, NOW_MS + HOUR_MS)
    shutil.move(path / BACKUPS, tmp_path / BACKUPS)
    shutil.rmtree(path)
    shutil.copytree(copy, path, ignore=shutil.ignore_patterns(BACKUPS))
    shutil.move(tmp_path / BACKUPS, path / BACKUPS)
    say(path, 2, "third")

    for file in path.glob("archive.db*"):
        file.unlink()
    shutil.rmtree(path / "journal" / "kept")

    assert "abandoned" not in say(path, 3)


def say(path: Path, hour: int, *texts: str) -> list[str]:
    """All that was said in a conversation, when *texts* were added at that *hour*."""
    engine = opened(path, clock=HandClock(NOW_MS + hour * HOUR_MS))
    for text in texts:
        do(engine, MessageAppend(id="c", role="user", content=text))
    try:
        return [message["content"] for message in messages_of(engine, "c")]
    finally:
        engine.close()
