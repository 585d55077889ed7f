"""Fault 6 for restores, and the drill: killed anywhere it is the old state or the new one; destroyed, everything comes back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from holdfast.care import moments, restore, restore_plan, swap
from holdfast.care.backup_set import list_sets
from holdfast.care.history import History
from holdfast.ops import Message, MessageAppend, SessionPut
from tests.crash.harness import FULL, ROOT, clean_environ, needs_strace, report, spread
from tests.engine_harness import HandClock, Log
from tests.restore_harness import all_of, change, copy_of, opened, pack_set, settings_of

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

CHANGING = ("write", "pwrite64", "fdatasync", "fsync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir",
            "ftruncate", "mkdir", "mkdirat", "linkat")  # fmt: skip
RESTORE_S = 60.0
SHORT = 4
SESSIONS, CONVERSATIONS = (100_000, 20_000) if FULL else (4_000, 400)


class Place(NamedTuple):
    """One changing system call of a restore: its name, and which of that name, counted from 1."""

    call: str
    number: int
    is_swap: bool


class Lived(NamedTuple):
    """A directory with a backup and a later present; not to be changed."""

    path: Path
    backup: str
    old: dict[str, Any]
    new: dict[str, Any]
    now_ms: int


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    path, clock = tmp_path_factory.mktemp("restored") / "data", HandClock()
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
    return Lived(path, name, old, new, clock.now_ms())


def _command(lived: Lived, data_dir: Path) -> list[str]:
    return [sys.executable, "-m", "tests.crash.restore_life", str(data_dir), lived.backup, str(lived.now_ms)]


def _places(lived: Lived, place: Path) -> list[Place]:
    """Every changing call of an undisturbed restore, in order; those from its decision on belong to the swap."""
    data_dir, trace = copy_of(lived.path, place / "data"), place / "trace"
    known = ",".join(f"?{call}" for call in CHANGING)
    subprocess.run(
        ["strace", "-o", str(trace), "-e", f"trace={known}", *_command(lived, data_dir)],
        check=True,
        cwd=ROOT,
        env=clean_environ(),
        timeout=RESTORE_S,
    )
    counts: Counter[str] = Counter()
    found: list[Place] = []
    is_swap = False
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"(\w+)\((.*)", line)
        if match is not None:
            is_swap = is_swap or swap.INTENT in match[2]
            counts[match[1]] += 1
            found.append(Place(match[1], counts[match[1]], is_swap))
    return found


@needs_strace
def test_killed_at_every_call_of_a_restore(lived: Lived, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next start has the old state or the new one, whole, with the present in a backup once it is the new one."""
    places = _places(lived, tmp_path)
    swapping = [place for place in places if place.is_swap]
    chosen = (
        places
        if FULL
        else [places[number - 1] for number in spread(len(places), 2)[:1]]
        + [swapping[number - 1] for number in spread(len(swapping), SHORT)]
    )
    outcomes: Counter[str] = Counter()
    for place in chosen:
        data_dir = copy_of(lived.path, tmp_path / "data")
        killed = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={place.call}",
             "-e", f"inject={place.call}:signal=KILL:when={place.number}", *_command(lived, data_dir)],
            cwd=ROOT,
            env=clean_environ(),
            stderr=subprocess.DEVNULL,
            timeout=RESTORE_S,
            check=False,
        )  # fmt: skip
        assert killed.returncode == -9, place

        engine = opened(data_dir, clock=HandClock(lived.now_ms))
        seen, degraded, left = all_of(engine), engine.degraded, {path.name for path in data_dir.iterdir()}
        engine.close()

        assert seen in (lived.old, lived.new), place
        assert degraded == [] and not {swap.STAGING, swap.INTENT} & left, place
        outcomes["new" if seen == lived.new else "old"] += 1
        if seen == lived.new:
            saved = [found for found in list_sets(data_dir) if found.name != lived.backup]
            _assert_reaches(lived, data_dir, saved[-1].name, tmp_path / "saved")
    report(capsys, f"killed at {len(chosen)} of {len(places)} calls of a restore: {dict(outcomes)}, 0 mixed, 0 lost")


def _assert_reaches(lived: Lived, data_dir: Path, name: str, into: Path) -> None:
    """The set *name* gives the present of before."""
    history = History(data_dir)
    target = moments.choose(data_dir, None, name=name, at_ms=None, now_ms=4_000_000_000_000, history=history)
    shutil.rmtree(into, ignore_errors=True)
    restore.restore_beside(target, into, settings_of(data_dir), None, history)
    engine = opened(into, clock=HandClock(lived.now_ms))
    try:
        assert all_of(engine) == lived.old
    finally:
        engine.close()


def test_the_drill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Backed up, destroyed and restored: every session and every message is compared, none differs."""
    path, clock = tmp_path / "data", HandClock()
    engine = opened(path, clock=clock)
    tickets = [
        engine.submit(SessionPut(id=f"57300{number:07d}", value={"currentState": "catalog", "turn": number}))
        for number in range(SESSIONS)
    ]
    tickets += [
        engine.submit(
            MessageAppend(
                id=f"chat-{number}",
                messages=[
                    Message(role="user", content=f"hola {number}"),
                    Message(role="assistant", content="buenas", metadata={"turn": number}),
                ],
            )
        )
        for number in range(CONVERSATIONS)
    ]
    for ticket in tickets:
        ticket.wait()
    sessions = {one.id: (one.version, one.value) for one in engine.everything("sessions")}
    heads = {one.id: (one.version, one.value) for one in engine.everything("conversations")}
    messages = {id: [bytes(one.value) for one in engine.transcripts.messages(id).items] for id in heads}
    made = engine.backup("command")
    engine.close()
    assert made.proved

    for spoilt in path.iterdir():
        if spoilt.name not in ("backups", "holdfast.lock"):
            shutil.rmtree(spoilt) if spoilt.is_dir() else spoilt.write_bytes(b"\0" * 1_000)
    settings, history, now_ms = settings_of(path), History(path), 4_000_000_000_000
    target = moments.choose(path, None, name=made.name, at_ms=None, now_ms=now_ms, history=history)
    plan, _ = restore_plan.planned(settings, target, None, history, engine=None, now_ms=clock.now_ms())
    started = time.monotonic()
    done = restore.restore_stopped(settings, target, plan, None, now_ms=now_ms, log=Log())
    took_s = time.monotonic() - started

    engine = opened(path, clock=clock)
    assert {one.id: (one.version, one.value) for one in engine.everything("sessions")} == sessions
    assert {one.id: (one.version, one.value) for one in engine.everything("conversations")} == heads
    for id, wanted in messages.items():
        assert [bytes(one.value) for one in engine.transcripts.messages(id).items] == wanted
    assert engine.degraded == []
    engine.close()
    assert done.proof.counts["sessions"] == SESSIONS and done.proof.counts["messages"] == 2 * CONVERSATIONS
    assert orjson.loads((path / "chat_sessions.json").read_bytes())
    report(
        capsys,
        f"{SESSIONS} sessions and {CONVERSATIONS} conversations destroyed and restored in {took_s:.1f} s, 0 differ",
    )
