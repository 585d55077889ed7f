"""Changing the version: what older versions left is read, migrated after a proved backup, and the way back is told."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson
import pytest

from holdfast.archive.sqlite_file import schema_version
from holdfast.care import swap
from holdfast.care.backup_set import list_sets
from holdfast.care.prove import prove
from holdfast.care.upgrade import RELEASES, Changed, Obstacle, Release, Step, bring_up, check_downgrade, look
from holdfast.care.verify import verify
from holdfast.core.state import EVENT_OPS
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import FORMAT_VERSION, MANIFEST, MANIFEST_NEXT, encode_manifest, read_manifest
from holdfast.errors import DataRefused, NotFound, StorageFull
from holdfast.ops import MessageAppend, UserPut
from holdfast.recovery import open_engine
from tests.cli_harness import assert_told_in_one_line, forked
from tests.crash.migrating import STEP, make_format_0, rename_profiles
from tests.damage_harness import flip, picture
from tests.engine_harness import HandClock, Log, do, opened, running, settings_of
from tests.formats.make import everything

FORMATS = Path(__file__).parent / "formats"
RELEASED = sorted(path.parent.name for path in FORMATS.glob("*/expected.json"))


def left_by(release: str, place: Path) -> Path:
    """The directory that *release* left, as it was when it was killed."""
    data_dir = shutil.copytree(FORMATS / release / "data", place / "data")
    for path in [data_dir, *data_dir.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    return data_dir


def test_every_release_has_its_directory() -> None:
    """Whoever releases a version keeps what it writes, so that those after it can be held against it."""
    assert set(RELEASED) == set(RELEASES)


@pytest.mark.parametrize("release", RELEASED)
def test_what_a_release_left_is_all_there(release: str, tmp_path: Path) -> None:
    """Every record, message and figure is as that version itself read it last, also after a flush and another start."""
    data_dir = left_by(release, tmp_path)
    expected = json.loads((FORMATS / release / "expected.json").read_text())
    before = verify(data_dir, settings_of(data_dir))

    for _ in range(2):
        engine = opened(data_dir, clock=HandClock())
        found = orjson.loads(orjson.dumps(everything(engine)))
        assert {name: found[name] for name in expected if name != "records"} == {
            name: value for name, value in expected.items() if name != "records"
        }
        for name, records in expected["records"].items():
            assert found["records"][name] == records
        assert not engine.degraded
        engine.flush("api")
        engine.close()

    assert not before.wrong
    assert not [one for one in verify(data_dir, settings_of(data_dir)).wrong if one.part != "backups"]


@pytest.mark.parametrize("release", [name for name in RELEASED if (FORMATS / name / "data" / "backups").is_dir()])
def test_the_backups_of_a_release_are_good(release: str, tmp_path: Path) -> None:
    """They can be read, everything is loaded from them, and they are this directory's own after it was opened."""
    data_dir = left_by(release, tmp_path)
    opened(data_dir, clock=HandClock()).close()
    (tmp_path / "scratch").mkdir()

    for found in list_sets(data_dir):
        assert found.manifest is not None and not found.is_foreign, found.damage
        proof = prove(found, None, tmp_path / "scratch")
        assert proof.ok, proof.reason
        assert found.proof is not None and proof.counts == found.proof.counts
    assert list_sets(data_dir)


# Migrating. Format 0 is made up: its users stood in profiles.json.


def of_format_0(data_dir: Path) -> Path:
    return make_format_0(data_dir, clock=HandClock())


def test_an_older_format_is_migrated_at_a_start(tmp_path: Path) -> None:
    """After a backup that was proved, with progress told; afterwards it is as if it had never been another."""
    data_dir = of_format_0(tmp_path / "data")
    told: list[str] = []
    log = Log()

    engine = open_engine(settings_of(data_dir), clock=HandClock(), log=log, progress=told.append, migrations=(STEP,))

    assert sorted(item.id for item in engine.page("users").items) == ["ana", "ben"]
    assert not engine.degraded
    engine.close()
    (backup,) = [found for found in list_sets(data_dir) if found.manifest and found.manifest.reason == "migration"]
    assert backup.is_proved and backup.manifest is not None
    assert (backup.manifest.data_format, "profiles.json" in backup.manifest.files) == (0, True)
    assert "migrating to format 1: users have a file of their own name" in told
    (migrated,) = log.named("data.migrated")
    assert (migrated["from_format"], migrated["to_format"], migrated["backup"]) == (0, 1, backup.name)
    assert not (data_dir / "profiles.json").exists()
    assert not verify(data_dir, settings_of(data_dir)).wrong


def test_a_second_start_migrates_nothing(tmp_path: Path) -> None:
    """There is one backup, and one migration."""
    data_dir = of_format_0(tmp_path / "data")
    log = Log()

    for _ in range(2):
        open_engine(settings_of(data_dir), clock=HandClock(), log=log, migrations=(STEP,)).close()

    assert len(log.named("data.migrated")) == 1
    assert len([found for found in list_sets(data_dir) if found.manifest and found.manifest.reason == "migration"]) == 1


def test_a_step_that_fails_leaves_the_old_format(tmp_path: Path) -> None:
    """No room for what is new: the directory is as it was but for the backup, which the next try uses again."""
    data_dir = of_format_0(tmp_path / "data")

    def fail(data: Directory, staging: Directory, progress: Callable[[str], None]) -> Changed:
        rename_profiles(data, staging, progress)
        raise StorageFull("no room")

    before = {name: value for name, value in picture(data_dir).items() if "holdfast.lock" not in name}
    with pytest.raises(StorageFull):
        open_engine(settings_of(data_dir), log=Log(), migrations=(Step(1, "fails", fail),))
    after = picture(data_dir)

    assert {name: after.get(name) for name in before if name != str(data_dir)} == {
        name: value for name, value in before.items() if name != str(data_dir)
    }
    open_engine(settings_of(data_dir), clock=HandClock(), log=Log(), migrations=(STEP,)).close()
    assert len([found for found in list_sets(data_dir) if found.manifest and found.manifest.reason == "migration"]) == 1


def test_it_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    """Once the step is decided, whoever starts next completes it, be it a start that knows no steps at all."""
    data_dir = of_format_0(tmp_path / "data")
    with Directory(data_dir) as data:
        with data.subdirectory(swap.STAGING) as staging:
            changed = rename_profiles(data, staging, lambda text: None)
            manifest = msgspec.structs.replace(changed.manifest, format=1)
            staging.write_atomic(MANIFEST, [encode_manifest(manifest)])
        swap.decide(data, swap.Intent(staged=(*changed.staged, MANIFEST), removed=changed.removed))

    engine = opened(data_dir, clock=HandClock())

    assert sorted(item.id for item in engine.page("users").items) == ["ana", "ben"]
    engine.close()


def test_what_is_damaged_is_not_migrated(tmp_path: Path) -> None:
    """A step could not tell damage from what it does not know; the file and the way on are named, nothing is touched."""
    data_dir = of_format_0(tmp_path / "data")
    flip(data_dir / "profiles.json")
    before = picture(data_dir)

    with pytest.raises(DataRefused, match=r"profiles\.json cannot be migrated.*edited or damaged"):
        open_engine(settings_of(data_dir), log=Log(), migrations=(STEP,))

    after = picture(data_dir)
    assert {name: after[name][2] for name in before} == {name: value[2] for name, value in before.items()}


def test_a_flush_that_was_broken_off_is_no_damage(tmp_path: Path) -> None:
    """Files that it had moved into place are known by its own manifest."""
    data_dir = of_format_0(tmp_path / "data")
    with Directory(data_dir) as data:
        manifest = read_manifest(data, MANIFEST)
        assert manifest is not None
        line = data.read("profiles.json").replace(b"Ana", b"Eva")
        written = data.write_atomic("profiles.json", [line])
        entry = msgspec.structs.replace(
            manifest.files["profiles.json"], crc32=f"{written.crc32:08x}", mtime_ns=written.mtime_ns
        )
        following = msgspec.structs.replace(manifest, files=manifest.files | {"profiles.json": entry})
        data.write_atomic(MANIFEST_NEXT, [encode_manifest(following)])

    engine = open_engine(settings_of(data_dir), clock=HandClock(), log=Log(), migrations=(STEP,))

    assert b"Eva" in engine.page("users").items[0].value or b"Eva" in engine.page("users").items[1].value
    assert not engine.degraded
    engine.close()


def test_without_a_way_it_is_refused(tmp_path: Path) -> None:
    """A format from which no step leads to ours is left alone, and the way is named."""
    data_dir = of_format_0(tmp_path / "data")
    before = picture(data_dir)

    with pytest.raises(DataRefused, match=r"has format 0.*a version in between"):
        opened(data_dir)

    after = picture(data_dir)
    assert {name: after[name][2] for name in before} == {name: value[2] for name, value in before.items()}


def test_a_newer_format_is_refused_untouched(tmp_path: Path) -> None:
    """By a start, by migrate and by look alike: exit code 4."""
    data_dir = tmp_path / "data"
    opened(data_dir).close()
    raw = (data_dir / MANIFEST).read_text()
    (data_dir / MANIFEST).write_text(raw.replace(f'"format": {FORMAT_VERSION}', f'"format": {FORMAT_VERSION + 1}'))
    before = picture(data_dir)

    with pytest.raises(DataRefused, match="Nothing was touched"):
        opened(data_dir)
    with Directory(data_dir) as data, pytest.raises(DataRefused):
        look(data)
    assert_told_in_one_line(forked("migrate", "--data-dir", data_dir, cwd=tmp_path), 4, "newer version")

    after = picture(data_dir)
    assert {name: after[name][2] for name in before if "lock" not in name} == {
        name: value[2] for name, value in before.items() if "lock" not in name
    }


def test_a_damaged_manifest_hides_the_format(tmp_path: Path) -> None:
    """Where there are steps, nothing is guessed."""
    data_dir = of_format_0(tmp_path / "data")
    (data_dir / MANIFEST).write_text("{")

    with Directory(data_dir) as data, pytest.raises(DataRefused, match="restore the newest backup"):
        bring_up(settings_of(data_dir), data, Log(), steps=(STEP,))


def test_nothing_to_do_touches_nothing(tmp_path: Path) -> None:
    """A start of the version that wrote it makes no backup of it."""
    opened(tmp_path / "data").close()

    opened(tmp_path / "data").close()

    assert not list_sets(tmp_path / "data")


# The commands.


def test_migrate_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    """With the format and who wrote it; --json gives the same to scripts."""
    opened(tmp_path / "data").close()

    done = forked("migrate", "--data-dir", "data", cwd=tmp_path)
    as_json = forked("migrate", "--dry-run", "--json", "--data-dir", "data", cwd=tmp_path)

    assert (done.returncode, "nothing to migrate: format 1, archive schema" in done.stdout) == (0, True), done.stderr
    assert json.loads(as_json.stdout)["steps"] == []


def test_migrate_does_not_create_a_directory(tmp_path: Path) -> None:
    """A wrong name is told: exit code 4."""
    assert_told_in_one_line(forked("migrate", "--data-dir", "nowhere", cwd=tmp_path), 4, "nowhere")

    assert not (tmp_path / "nowhere").exists()


def test_migrate_needs_a_stopped_directory(tmp_path: Path) -> None:
    """Whoever has it open has migrated it: exit code 3, with the PID."""
    with running(tmp_path / "data"):
        assert_told_in_one_line(forked("migrate", "--dry-run", "--data-dir", "data", cwd=tmp_path), 3, str(os.getpid()))


def set_schema(data_dir: Path, version: int) -> None:
    connection = sqlite3.connect(data_dir / "archive.db", isolation_level=None)
    connection.execute(f"PRAGMA user_version={version}")
    connection.close()


def test_going_back_is_possible_while_nothing_is_in_the_way(tmp_path: Path) -> None:
    """A directory that was flushed and stopped can be opened by a version that knows its format and schema."""
    data_dir = tmp_path / "data"
    with running(data_dir) as engine:
        do(engine, UserPut(id="ana", value={"name": "Ana"}))
        engine.flush("api")
    same = {"1.0": Release(FORMAT_VERSION, schema_version(), EVENT_OPS)}

    assert check_downgrade(data_dir, "1.0", same).obstacles == []
    assert check_downgrade(data_dir, str(FORMAT_VERSION), same).obstacles == []


def test_each_obstacle_is_named(tmp_path: Path) -> None:
    """A format, a schema and events that the older version does not know, each with what makes it go away."""
    data_dir = tmp_path / "data"
    with running(data_dir) as engine:
        do(engine, MessageAppend(id="c", role="user", content="Hola"))
        engine.flush("api")
        do(engine, MessageAppend(id="c", role="user", content="Hola?"))
        engine.transcripts.page(limit=1)
        older = {"0.9": Release(FORMAT_VERSION - 1, 1, frozenset({"user.put"}))}

        report = check_downgrade(data_dir, "0.9", older)
    set_schema(data_dir, 7)
    later = check_downgrade(data_dir, "0.9", older)

    assert any("format 1, it knows 0" in one.found for one in report.obstacles)
    (events,) = [one for one in report.obstacles if "message.append" in one.found]
    assert "flush" in events.action
    assert Obstacle(found="archive schema 7, it knows 1", action=report.obstacles[0].action) in later.obstacles


def test_a_version_without_conversations_would_lose_them(tmp_path: Path) -> None:
    """It would open the directory and ignore the archive; the command says so, with exit code 1."""
    opened(tmp_path / "data").close()

    done = forked("downgrade-check", "0.1.0-core", "--data-dir", "data", cwd=tmp_path)
    fine = forked("downgrade-check", "0.1.0-conversations", "--data-dir", "data", "--json", cwd=tmp_path)

    assert done.returncode == 1
    assert "it keeps no conversations" in done.stdout
    assert json.loads(fine.stdout)["possible"] is (schema_version() == 1)


@pytest.mark.parametrize("to", ["9.9", "99", "", "../x", "1" * 50])
def test_an_unknown_version_is_told_with_those_there_are(tmp_path: Path, to: str) -> None:
    """Nobody has to guess how they are called."""
    opened(tmp_path / "data").close()

    with pytest.raises(NotFound, match=r"0\.1\.0-core"):
        check_downgrade(tmp_path / "data", to)


def test_the_maker_of_directories_works_with_this_version(tmp_path: Path) -> None:
    """Whoever releases this version can make the directory that is to be kept."""
    subprocess.run(
        [sys.executable, str(FORMATS / "make.py"), str(tmp_path / "next")],
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(FORMATS.parent.parent / "daemon")},
    )

    engine = opened(tmp_path / "next" / "data", clock=HandClock())
    expected = json.loads((tmp_path / "next" / "expected.json").read_text())
    assert orjson.loads(orjson.dumps(everything(engine))) == expected
    engine.close()
