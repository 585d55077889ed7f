"""Fault 6, and GOALS row 16: backups ended at each of their system calls, and taken under load."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import holdfast
from holdfast.care.backup_set import list_sets
from holdfast.care.prove import prove
from tests.crash import backing_up
from tests.crash.harness import (
    FULL,
    ROOT,
    Recorder,
    clean_environ,
    holes_in,
    needs_strace,
    reopened,
    report,
    serving,
    spread,
    surprises,
)

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

CHANGING = ("write", "pwrite64", "fdatasync", "fsync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdirat",
            "mkdir", "rmdir", "link", "linkat", "ftruncate")  # fmt: skip
LIFE_S = 60.0
SHORT_CALLS = 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one proved backup."""
    base = tmp_path_factory.mktemp("prepared")
    subprocess.run(_life(base / "data", base / "acknowledged", "--first"), check=True, cwd=ROOT, env=clean_environ())
    assert [found.is_proved for found in list_sets(base / "data")] == [True]
    return base / "data"


def _life(*arguments: Path | str) -> list[str]:
    return [sys.executable, "-m", "tests.crash.backing_up", *map(str, arguments)]


@needs_strace
def test_kill_at_every_call_of_backups(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before any changing call of backup, proof and rotation: a proved set is there, and the next start is clean."""
    places = _places(prepared, tmp_path)
    chosen = places if FULL else [places[number - 1] for number in spread(len(places), SHORT_CALLS)]
    wrong = []
    for call, number in chosen:
        data_dir, acknowledged = tmp_path / "data", tmp_path / "acknowledged"
        shutil.copytree(prepared, data_dir)
        done = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
             "-e", f"inject={call}:signal=KILL:when={number}", *_life(data_dir, acknowledged)],
            check=False, cwd=ROOT, env=clean_environ(), capture_output=True, timeout=LIFE_S,
        )  # fmt: skip
        if done.returncode != -9:
            wrong.append(f"{call} {number}: not killed, {done.returncode} {done.stderr[-200:]!r}")
        count = acknowledged.stat().st_size if acknowledged.exists() else 0
        wrong += [
            f"{call} {number}: {complaint}"
            for complaint in complaints_after_backups(data_dir, count, tmp_path / "scratch")
        ]
        shutil.rmtree(data_dir)
        acknowledged.unlink(missing_ok=True)

    assert not wrong, wrong[:5]
    report(capsys, f"killed at {len(chosen)} of {len(places)} calls of two backups: always a proved set, 0 lost")


def _places(prepared: Path, tmp_path: Path) -> list[tuple[str, int]]:
    """The changing calls of an undisturbed life's main thread, from its first backup on."""
    trace, data_dir = tmp_path / "trace", tmp_path / "recorded"
    shutil.copytree(prepared, data_dir)
    known = [call for call in CHANGING if subprocess.run(
        ["strace", "-e", f"trace={call}", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0]  # fmt: skip
    subprocess.run(
        ["strace", "-qq", "-o", str(trace), "-e", f"trace={','.join(known)}", *_life(data_dir, tmp_path / "told")],
        check=True, cwd=ROOT, env=clean_environ(), capture_output=True, timeout=LIFE_S,
    )  # fmt: skip
    assert len(list_sets(data_dir)) == 1, "the rotation leaves the newest"
    shutil.rmtree(data_dir)
    # Of the main thread alone, which does all of it.
    lines = [line for line in trace.read_text(errors="replace").splitlines() if re.match(r"\w+\(", line)]
    counts: Counter[str] = Counter()
    found = []
    for line in lines:
        call = line.partition("(")[0]
        counts[call] += 1
        found.append((call, counts[call]))
    return found


def complaints_after_backups(data_dir: Path, acknowledged: int, scratch: Path) -> list[str]:
    """What is not as it must be after a kill."""
    scratch.mkdir(exist_ok=True)
    wrong = []
    proved = [found for found in list_sets(data_dir) if found.is_proved]
    if not proved:
        wrong.append("no proved set")
    wrong += [f"{found.name}: {reason}" for found in proved if (reason := prove(found, None, scratch).reason)]
    log = Recorder()
    engine = reopened(data_dir, log, backups=backing_up.SETTINGS)
    try:
        left = [path.name for path in (data_dir / "backups").iterdir() if path.name.startswith(".")]
        wrong += [f"left behind: {name}" for name in left]
        wrong += [f"degraded: {reason}" for reason in engine.degraded] + surprises(log) + holes_in(engine)
        for n in range(acknowledged):
            if engine.get("sessions", f"new {n}") is None:
                wrong.append(f"session {n} is lost")
        if engine.count("sessions") not in (backing_up.SESSIONS + acknowledged, backing_up.SESSIONS + acknowledged + 1):
            wrong.append(f"{engine.count('sessions')} sessions")
    finally:
        engine.close()
    return wrong


@pytest.mark.skipif(not FULL, reason="a timed test; make crash runs it")
def test_no_write_waits_for_a_backup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No acknowledged write is slower than twice the 99th percentile without a backup, but for those that are as slow without."""
    with serving(tmp_path / "data", "--set", "flush_every=1h") as served:
        address = f"unix:{served.data_dir / 'holdfast.sock'}"
        with holdfast.connect(address) as hf, holdfast.connect(address) as other:
            with hf.pipeline():
                for n in range(100_000):
                    hf.sessions.put(f"57{n:08d}", {"currentState": "catalog", "text": "x" * 100})
            for n in range(2_000):
                hf.conversations.append(f"57{n:08d}", role="user", content="hola " * 20)
            hf.flush()
            usual = _latencies(hf, threading.Event(), 15.0)
            done = threading.Event()

            def back_up() -> None:
                for _ in range(3):
                    assert other.backup().proved
                done.set()

            thread = threading.Thread(target=back_up)
            thread.start()
            during = _latencies(hf, done, 600.0)
            thread.join()

    without, with_backup = (found[len(found) * 99 // 100] for found in (usual, during))
    report(
        capsys,
        f"single puts, p99 {without * 1000:.2f} ms without, {with_backup * 1000:.2f} ms with a backup of 100,000 sessions: "
        f"{with_backup / without:.2f} ×; the slowest {usual[-1] * 1000:.0f} and {during[-1] * 1000:.0f} ms",
    )
    assert with_backup <= 2 * without


def _latencies(hf: holdfast.Holdfast, done: threading.Event, limit_s: float) -> list[float]:
    """Of single puts, 200 a second, until *done* or *limit_s*; sorted."""
    found = []
    ends_at = time.monotonic() + limit_s
    while not done.is_set() and (began := time.monotonic()) < ends_at:
        hf.sessions.put("57300", {"n": len(found)})
        found.append(time.monotonic() - began)
        time.sleep(max(0.0, 0.005 - found[-1]))
    return sorted(found)
