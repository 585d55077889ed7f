"""Fault 3 for what care does: the power is cut while it backs up, restores, migrates or imports, on a real ext4."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.care import swap
from holdfast.care.backup_set import list_sets
from holdfast.care.given import open_path
from holdfast.care.merge import merge
from holdfast.ops import Message, MessageAppend, RecordPut
from tests.crash import migrating
from tests.crash.harness import FULL, ROOT, SEED, clean_environ, needs_root, report
from tests.crash.test_backup_kill import complaints_after_backups
from tests.crash.test_migration_kill import complaints_after_migration
from tests.crash.test_power_cut import cut_power, disk, run_tool
from tests.engine_harness import HandClock
from tests.restore_harness import all_of, change, opened, pack_set
from tests.test_transfer import exported, running, unversioned

__all__ = ["disk"]

pytestmark = [pytest.mark.crash, pytest.mark.root, needs_root, pytest.mark.timeout(3600 if FULL else 120)]

CUTS = 100 if FULL else 3
LIFE_S = 60.0

IMPORTING = """
import sys
from pathlib import Path
from holdfast.care.given import open_path
from holdfast.care.merge import merge
from holdfast.recovery import open_engine
from holdfast.settings import Settings
engine = open_engine(Settings(data_dir=Path(sys.argv[1])))
with open_path(Path(sys.argv[2]), Path(sys.argv[3])) as given:
    merge(engine, given)
engine.close()
"""


def cut_in(
    disk: tuple[Path, Path],
    prepared: Path,
    life: Callable[[Path], list[str]],
    check: Callable[[Path], list[str]],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    """Have *life*, a command on a copy of *prepared*, lose its power at CUTS moments; what *check* says of each is wrong."""
    image, place = disk
    chance = random.Random(f"{SEED}:{what}")
    wrong: list[str] = []
    whole_s = 0.0
    for cut in range(CUTS + 1):
        run_tool("mount", "-o", "loop", str(image), str(place))
        data_dir = place / "data"
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(prepared, data_dir)
        os.sync()
        process = subprocess.Popen(
            life(data_dir), cwd=ROOT, env=clean_environ(), stderr=subprocess.DEVNULL if cut else None
        )
        started = time.monotonic()
        if cut == 0:
            # The first one lives to its end, so that it is known how long that is.
            assert process.wait(LIFE_S) == 0
            whole_s = time.monotonic() - started
        else:
            # At first it only imports modules.
            time.sleep(chance.uniform(0.3, 1.0) * whole_s)
            cut_power(place)
            process.kill()
            process.wait()
        _unmount(place)
        run_tool("mount", "-o", "loop", str(image), str(place))
        wrong += [f"cut {cut}: {complaint}" for complaint in check(data_dir)]
        _unmount(place)
        assert not wrong, wrong[:5]
    report(capsys, f"{CUTS} power cuts within {what} of {whole_s:.1f} s: 0 lost, 0 mixed")


def _unmount(place: Path) -> None:
    for _ in range(100):
        if subprocess.run(["umount", str(place)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.05)  # the last descriptor of the killed process is being closed
    raise AssertionError(f"{place} stays in use")


def test_power_cuts_in_backups(disk: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proved set is there at every moment, also while the old one is rotated out."""
    life = [sys.executable, "-m", "tests.crash.backing_up"]
    told = tmp_path / "acknowledged"
    subprocess.run(
        [*life, str(tmp_path / "data"), str(told), "--first"], check=True, cwd=ROOT, env=clean_environ(), timeout=LIFE_S
    )

    def begin(data_dir: Path) -> list[str]:
        told.unlink(missing_ok=True)
        return [*life, str(data_dir), str(told)]

    def check(data_dir: Path) -> list[str]:
        count = told.stat().st_size if told.exists() else 0
        return complaints_after_backups(data_dir, count, tmp_path / "scratch")

    cut_in(disk, tmp_path / "data", begin, check, capsys, "backups")


def test_power_cuts_in_a_restore(disk: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The old state or the new one, and the next start completes what was decided."""
    path, clock = tmp_path / "data", HandClock()
    engine = opened(path, clock=clock)
    for number in range(20):
        clock.advance(1)
        change(engine, number)
    new = all_of(engine)
    engine.close()
    name = pack_set(path, clock.now_ms()).name
    engine = opened(path, clock=clock)
    for number in range(20, 40):
        clock.advance(1)
        change(engine, number)
    old = all_of(engine)
    engine.close(flush=False)
    now_ms = clock.now_ms()

    def begin(data_dir: Path) -> list[str]:
        return [sys.executable, "-m", "tests.crash.restore_life", str(data_dir), name, str(now_ms)]

    def check(data_dir: Path) -> list[str]:
        engine = opened(data_dir, clock=HandClock(now_ms))
        seen, wrong = all_of(engine), list(engine.degraded)
        engine.close()
        if seen not in (old, new):
            wrong.append("a mixture")
        if seen == new and len(list_sets(data_dir)) < 2:
            wrong.append("no backup of the state before")
        left = {swap.STAGING, swap.INTENT} & {path.name for path in data_dir.iterdir()}
        return wrong + [f"left behind: {name}" for name in left]

    cut_in(disk, path, begin, check, capsys, "a restore")


def test_power_cuts_in_a_migration(disk: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The old format or the new one, with a proved backup before anything is changed."""
    prepared = migrating.make_format_0(tmp_path / "prepared")

    def begin(data_dir: Path) -> list[str]:
        return [sys.executable, "-m", "tests.crash.migrating", str(data_dir)]

    cut_in(disk, prepared, begin, complaints_after_migration, capsys, "a migration")


def test_power_cuts_in_an_import(disk: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next import completes it: everything is there once."""
    with running(tmp_path / "a") as source:
        for n in range(300):
            source.submit(RecordPut(collection="notes", id=str(n), value={"n": n}))
        for n in range(100):
            source.submit(MessageAppend(id=f"c{n}", messages=[Message(role="user", content="x")] * 3)).wait()
        archive = tmp_path / "export.tar.zst"
        archive.write_bytes(exported(source))
        expected = unversioned(source)
    (tmp_path / "empty").mkdir(mode=0o700)

    def begin(data_dir: Path) -> list[str]:
        return [sys.executable, "-c", IMPORTING, str(data_dir), str(archive), str(tmp_path)]

    def check(data_dir: Path) -> list[str]:
        with running(data_dir) as target:
            with open_path(archive, tmp_path) as given:
                merge(target, given)
            return [*target.degraded, *([] if unversioned(target) == expected else ["not what was imported"])]

    cut_in(disk, tmp_path / "empty", begin, check, capsys, "an import")
