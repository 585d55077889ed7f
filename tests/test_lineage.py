"""Whose seqs those of a backup are: what is of another data directory is used when it is named, and only then."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from holdfast.care import moments, restore, restore_plan
from holdfast.care.backup_set import BACKUPS, SET_FILE, BackupSet, list_sets
from holdfast.care.backup_stopped import back_up_stopped, list_stopped
from holdfast.care.copies import Copies
from holdfast.care.history import History
from holdfast.care.rotation import stale
from holdfast.care.verify import verify
from holdfast.disk.snapshot import MANIFEST, lineage_of
from holdfast.errors import BadRequest
from holdfast.ops import SessionPut
from holdfast.settings import BackupSettings, chosen
from tests.engine_harness import NOW_MS, HandClock, Log, do, value_of
from tests.restore_harness import opened, pack_set, settings_of

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


def whole_restore(path: Path, name: str) -> None:
    """As the command, but that nothing is proved, which takes long."""
    now_ms = NOW_MS + 2 * HOUR_MS
    settings, history = settings_of(path), History(path)
    target = moments.choose(path, None, name=name, at_ms=None, now_ms=now_ms, history=history)
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
