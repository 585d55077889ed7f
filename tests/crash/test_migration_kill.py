"""Fault 15, and 2 for upgrades: a migration ended at each of its system calls."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from holdfast.care import swap
from holdfast.care.backup_set import list_sets
from holdfast.care.verify import verify
from holdfast.disk.snapshot import MANIFEST
from holdfast.settings import Settings
from tests.crash import migrating
from tests.crash.harness import FULL, ROOT, Recorder, clean_environ, needs_strace, report, spread

pytestmark = [pytest.mark.crash, needs_strace, pytest.mark.timeout(3600 if FULL else 120)]

CHANGING = ("write", "pwrite64", "fdatasync", "fsync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdirat",
            "mkdir", "rmdir", "link", "linkat", "ftruncate")  # fmt: skip
LIFE_S = 60.0
SHORT_CALLS = 4


def test_kill_at_every_call_of_a_migration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before any changing call: the old format or the new one, a proved backup before the first step is decided, and
    the next start completes it with everything there."""
    prepared = migrating.make_format_0(tmp_path / "prepared")
    places = _places(prepared, tmp_path)
    wrong = []
    chosen = places if FULL else [places[number - 1] for number in spread(len(places), SHORT_CALLS)]
    for call, number in chosen:
        data_dir = Path(shutil.copytree(prepared, tmp_path / "data"))
        done = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
             "-e", f"inject={call}:signal=KILL:when={number}", *_start(data_dir)],
            check=False, cwd=ROOT, env=clean_environ(), capture_output=True, timeout=LIFE_S,
        )  # fmt: skip
        if done.returncode != -9:
            wrong.append(f"{call} {number}: not killed, {done.returncode} {done.stderr[-200:]!r}")
        wrong += [f"{call} {number}: {complaint}" for complaint in complaints_after_migration(data_dir)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(capsys, f"killed at {len(chosen)} of {len(places)} calls of a migration: the old format or the new, 0 lost")


def _start(data_dir: Path) -> list[str]:
    return [sys.executable, "-m", "tests.crash.migrating", str(data_dir)]


def _places(prepared: Path, tmp_path: Path) -> list[tuple[str, int]]:
    """The changing calls of an undisturbed migration's main thread."""
    trace, data_dir = tmp_path / "trace", Path(shutil.copytree(prepared, tmp_path / "recorded"))
    known = [call for call in CHANGING if subprocess.run(
        ["strace", "-e", f"trace={call}", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0]  # fmt: skip
    subprocess.run(
        ["strace", "-qq", "-o", str(trace), "-e", f"trace={','.join(known)}", *_start(data_dir)],
        check=True, cwd=ROOT, env=clean_environ(), capture_output=True, timeout=LIFE_S,
    )  # fmt: skip
    shutil.rmtree(data_dir)
    counts: Counter[str] = Counter()
    found = []
    for line in trace.read_text(errors="replace").splitlines():
        if re.match(r"\w+\(", line):
            call = line.partition("(")[0]
            counts[call] += 1
            found.append((call, counts[call]))
    return found


def complaints_after_migration(data_dir: Path) -> list[str]:
    """What is not as it must be after a kill."""
    wrong = []
    layout = (
        msgspec.json.decode((data_dir / MANIFEST).read_bytes())["format"] if (data_dir / MANIFEST).exists() else None
    )
    is_decided = (data_dir / swap.INTENT).exists()
    if not is_decided and (layout, (data_dir / "profiles.json").exists()) not in ((0, True), (1, False)):
        wrong.append(f"a mixture: format {layout}, {sorted(path.name for path in data_dir.iterdir())}")
    if (is_decided or layout == 1) and not [found for found in list_sets(data_dir) if found.is_proved]:
        wrong.append("no proved backup of before")
    log = Recorder()
    engine = migrating.migrated(data_dir, log)
    try:
        users = {item.id for item in engine.page("users").items}
        if users != migrating.USERS:
            wrong.append(f"users: {users}")
        if b"Hola" not in engine.transcripts.window("c").items[0].value:
            wrong.append("the message is lost")
        wrong += [f"degraded: {reason}" for reason in engine.degraded]
    finally:
        engine.close()
    proved = [found for found in list_sets(data_dir) if found.is_proved]
    wrong += [] if proved else ["no proved backup"]
    return wrong + [str(one) for one in verify(data_dir, Settings(data_dir=data_dir)).wrong]
