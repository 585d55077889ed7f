"""Faults 2, 6, 8 and 9: a scripted life ended, or hindered, at each of its system calls."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.crash import life
from tests.crash.harness import FULL, ROOT, SEED, clean_environ, complaints, needs_strace, report, serving, spread

pytestmark = [pytest.mark.crash, needs_strace, pytest.mark.timeout(3600 if FULL else 120)]

CHANGING = ("write", "pwrite64", "fdatasync", "fsync", "rename", "renameat", "unlink", "unlinkat", "ftruncate", "mkdirat",
            "linkat")  # fmt: skip
LIFE_S = 30.0


class Place(NamedTuple):
    """One system call of a life.

    Attributes:
        thread: ``main`` opens, flushes and closes; ``journal`` writes and syncs events; ``archive`` follows them.
        call: its name.
        number: counted from 1 among the calls of this name in this thread.
        path: what it is about; of a rename the new name.
    """

    thread: str
    call: str
    number: int
    path: str


class Lived(NamedTuple):
    """How a life went: its exit code (negative: the signal), how many steps it acknowledged, what it complained about."""

    code: int
    acknowledged: int
    complaints: str


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """Every changing call of an undisturbed life: those of the main thread, of the journal's and of the archive's."""
    base = tmp_path_factory.mktemp("record")
    known = [call for call in CHANGING if _is_known(call)]
    lines: dict[bool, list[str]] = {}
    for waits in (False, True):
        trace, data_dir = base / f"trace{waits}", base / f"data{waits}"
        subprocess.run(
            ["strace", "-f", "-y", "-o", str(trace), "-e", f"trace={','.join(known)}",
             *_life(data_dir, base / "acknowledged", *(["--wait"] if waits else []))],
            check=True,
            cwd=ROOT,
            env=clean_environ(),
            input=b"\n",
            stdout=subprocess.DEVNULL,
            timeout=LIFE_S,
        )  # fmt: skip
        lines[waits] = trace.read_text(errors="replace").splitlines()
    # Threads are attached to when all is open, so what they do before is not among their places.
    told = next(number for number, line in enumerate(lines[True]) if re.match(r"\d+ +write\(1<", line))
    threads = re.findall(r"\d+", lines[True][told].partition('"')[2])
    return [
        *_places_of("main", lines[False][0].split()[0], lines[False]),
        *_places_of("journal", threads[0], lines[True][told:]),
        *_places_of("archive", threads[1], lines[True][told:]),
    ]


def _places_of(name: str, thread: str, lines: list[str]) -> list[Place]:
    """The places in the part of a trace that is about the thread with this id."""
    counts: Counter[str] = Counter()
    found: list[Place] = []
    for line in lines:
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is not None and match[1] == thread:
            counts[match[2]] += 1
            is_named = match[2].startswith("rename") or match[2] == "unlink"
            paths = re.findall(r'"([^"]*)"' if is_named else r"<([^>]*)>", match[3])
            found.append(Place(name, match[2], counts[match[2]], paths[-1] if paths else ""))
    return found


def test_kill_at_every_call(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before any changing call of its life, it comes back by itself with every acknowledged op exactly once."""
    chosen = [
        place
        for thread, short in (("main", 6), ("journal", 2), ("archive", 5))
        for place in _spread(_of(thread, places), short)
    ]
    wrong = []
    for place in chosen:
        data_dir = tmp_path / "data"
        lived = _hinder(place, f"{place.call}:signal=KILL:when={place.number}", data_dir)
        if lived.code != -9:
            wrong.append(f"{place}: not killed, {lived}")
        wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(
        capsys,
        f"{len(chosen)} of {len(chosen)} calls ({len(places)} in the life, {len(_of('archive', places))} of the archive's "
        "thread): killed there, 0 lost, 0 doubled",
    )


def test_two_kills(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed during a flush, and once more on the way back or in the next flush, it still loses and doubles nothing."""
    renames = _flush_renames(places)
    chance = random.Random(SEED)
    first = [place for place in renames if "manifest" not in place.path]
    pairs = [
        (chance.choice(first), chance.choice([place for place in places if place.thread == "main"]))
        for _ in range(150 if FULL else 1)
    ]
    # The worst: each time in the middle of moving files into place.
    step = 3 if FULL else 6
    pairs += [(one, other) for one in first[2:8:step] for other in renames[1:8:step]]
    wrong = []
    for one, other in pairs:
        data_dir = tmp_path / "data"
        lived = _hinder(one, f"{one.call}:signal=KILL:when={one.number}", data_dir)
        shutil.copytree(data_dir, tmp_path / "copy")
        ledger = life.ledger_after(lived.acknowledged)
        if lived.acknowledged < life.STEPS:
            ledger.propose()
        wrong += [f"{one}: {complaint}" for complaint in complaints(tmp_path / "copy", [ledger])]
        done = ledger.acknowledged
        again = _hinder(other, f"{other.call}:signal=KILL:when={other.number}", data_dir, done=done)
        wrong += [
            f"{one}, then {other}: {complaint}"
            for complaint in _complaints(data_dir, again._replace(acknowledged=done + again.acknowledged))
        ]
        shutil.rmtree(data_dir)
        shutil.rmtree(tmp_path / "copy")

    assert not wrong, wrong[:5]
    report(capsys, f"{len(pairs)} of {len(pairs)} lives killed twice: 0 lost, 0 doubled")


def test_a_sync_of_the_journal_fails(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When the disk refuses to sync an event, nothing more is acknowledged, and nothing acknowledged is lost."""
    syncs = [place for place in places if place.thread == "journal" and place.call == "fdatasync"]
    chosen = _spread(syncs, 5)
    wrong = []
    for place in chosen:
        data_dir = tmp_path / "data"
        lived = _hinder(place, f"fdatasync:error=EIO:when={place.number}", data_dir)
        if lived.code != 1 or "could not sync" not in lived.complaints or lived.acknowledged != place.number - 1:
            wrong.append(f"{place}: {lived}")
        wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(
        capsys,
        f"EIO at {len(chosen)} of {len(syncs)} syncs of the journal: each ended it, 0 acknowledged afterwards, 0 lost",
    )


def test_a_flush_meets_a_bad_disk(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EIO from any sync, rename or write of a flush, a start or a stop: the old snapshot stands, nothing is lost."""
    hindered = [place for place in places if place.thread == "main" and place.call in ("fsync", "renameat", "rename", "write")
                and "acknowledged" not in place.path]  # fmt: skip
    chosen = _spread(hindered, 4)
    wrong = []
    told = 0
    for place in chosen:
        data_dir = tmp_path / "data"
        lived = _hinder(place, f"{place.call}:error=EIO:when={place.number}", data_dir)
        told += bool(lived.complaints)
        if not lived.complaints:
            wrong.append(f"{place}: not told, {lived}")
        if lived.complaints.startswith("flush") and lived.acknowledged != life.STEPS:
            wrong.append(f"{place}: did not go on, {lived}")
        wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(capsys, f"EIO at {len(chosen)} of {len(hindered)} calls of flush, start and stop: {told} told, 0 lost")


def test_the_archive_meets_a_bad_disk(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EIO from any write, sync, rename or removal of the archive: told, no op waits for it, it is whole again by itself."""
    calls = [place for place in _of("archive", places) if place.call != "linkat"]
    syncs = [place for place in calls if place.call == "fdatasync"]
    others = [place for place in calls if place.call != "fdatasync"]
    chosen = calls if FULL else _spread(syncs, 5) + _spread(others, 4)
    wrong = []
    told = 0
    for place in chosen:
        data_dir = tmp_path / "data"
        lived = _hinder(place, f"{place.call}:error=EIO:when={place.number}", data_dir)
        told += "archive: " in lived.complaints
        # Its first answer may be that it is not there for a moment; nothing else may fail.
        if lived.code != 0 or lived.acknowledged != life.STEPS or "flush: " in lived.complaints:
            wrong.append(f"{place}: {lived}")
        if place.call == "fdatasync" and place.path.endswith(("-wal", ".db")) and "archive: " not in lived.complaints:
            wrong.append(f"{place}: not told, {lived}")
        if place in syncs[: len(syncs) // 2] and "archive: " in lived.complaints and "resumed" not in lived.complaints:
            wrong.append(f"{place}: not mended, {lived}")
        wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(
        capsys,
        f"EIO at {len(chosen)} of {len(calls)} calls of the archive's thread: {told} told, no op and no flush failed, 0 lost",
    )


def test_a_sync_of_the_archive_is_not_believed(places: list[Place], tmp_path: Path) -> None:
    """While none of its syncs succeeds the journal stays: with the archive taken away, everything comes from there."""
    data_dir = tmp_path / "data"
    first = next(place for place in places if place.thread == "archive" and place.call == "fdatasync")

    lived = _hinder(first, "fdatasync:error=EIO:when=1+", data_dir)

    assert lived.code == 0 and lived.acknowledged == life.STEPS, lived
    assert "refused to sync" in lived.complaints
    for path in data_dir.glob("archive.*"):
        path.unlink()
    assert not _complaints(data_dir, lived)


def test_a_failed_flush_then_a_kill(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flush that fails half way leaves files that the next one replaces; killed there, nothing is lost either."""
    renames = _flush_renames(places)
    # Those of the first flush that come behind its manifest.next, up to the manifest itself.
    last = next(number for number, place in enumerate(renames) if place.path == "manifest.json")
    chosen = _spread(renames[1 : last + 1], 2)
    wrong = []
    for place in chosen:
        data_dir, trace = tmp_path / "data", tmp_path / "trace"
        failing = f"{place.call}:error=EIO:when={place.number}"
        _hinder(place, failing, data_dir, more=["fsync:retval=0:when=60000"], trace=trace)
        # The sync after the second manifest.next came into place, before any file did.
        seen = trace.read_text().splitlines()
        second = [number for number, line in enumerate(seen) if '"manifest.next.json") = 0' in line][1]
        syncs = sum(line.startswith("fsync") for line in seen[: second + 2])
        shutil.rmtree(data_dir)
        for number in range(syncs, syncs + (3 if FULL else 1)):
            lived = _hinder(place, failing, data_dir, more=[f"fsync:signal=KILL:when={number}"])
            if lived.code != -9:
                wrong.append(f"{place}: not killed, {lived}")
            wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
            shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(capsys, f"{len(chosen)} flushes failed at a rename and killed in the next: 0 lost, 0 doubled")


def test_a_disk_that_takes_only_a_part(places: list[Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A write that says it took 7 bytes, and took none, spoils no event."""
    writes = [place for place in places if place.thread == "journal" and place.call == "write"]
    chosen = _spread(writes, 4)
    wrong = []
    for place in chosen:
        data_dir = tmp_path / "data"
        lived = _hinder(place, f"write:retval=7:when={place.number}", data_dir)
        if lived.code != 0 or lived.acknowledged != life.STEPS:
            wrong.append(f"{place}: {lived}")
        wrong += [f"{place}: {complaint}" for complaint in _complaints(data_dir, lived)]
        shutil.rmtree(data_dir)

    assert not wrong, wrong[:5]
    report(capsys, f"{len(chosen)} of {len(writes)} writes of the journal that lied: every event whole, 0 lost")


@pytest.mark.parametrize("number", range(1, 51) if FULL else (1, 20))
def test_the_daemon_ends_when_a_sync_fails(number: int, tmp_path: Path) -> None:
    """Behind HTTP as well: the reason stands in the last log line, the exit code is 1, nothing acknowledged is lost."""
    from tests.crash.harness import Load
    from tests.crash.oracle import Ledger

    data_dir = tmp_path / "data"
    wrapper = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fdatasync",
        "-e",
        f"inject=fdatasync:error=EIO:when={number}",
    ]
    ledgers = [Ledger(client, SEED) for client in range(2)]

    with serving(data_dir, wrapper=wrapper) as served:
        Load(served, ledgers).join()
        code = served.wait()
        last = served.events()[-1]

    assert code == 1
    assert last["event"] == "daemon.failed" and "could not sync" in last["reason"]
    assert not complaints(data_dir, ledgers)


def _life(data_dir: Path, acknowledged: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.crash.life", str(data_dir), str(acknowledged), *arguments]


def _hinder(
    place: Place,
    fault: str,
    data_dir: Path,
    *,
    done: int = 0,
    more: Sequence[str] = (),
    trace: Path = Path("/dev/null"),
) -> Lived:
    """A life of which *done* steps are behind it, with *fault* in the thread of *place*."""
    acknowledged = data_dir.parent / "acknowledged"
    acknowledged.unlink(missing_ok=True)
    after = ["--after", str(done)] if done else []
    faults = [argument for one in (fault, *more) for argument in ("-e", f"inject={one}")]
    calls = ",".join(one.partition(":")[0] for one in (fault, *more))
    strace = ["strace", "-qq", "-o", str(trace), "-e", f"trace={calls}", *faults]
    if place.thread == "main":
        # Neither of its threads is traced.
        lived = subprocess.run(
            [*strace, *_life(data_dir, acknowledged, *after)],
            cwd=ROOT,
            env=clean_environ(),
            stderr=subprocess.PIPE,
            timeout=LIFE_S,
            check=False,
        )
        code, complained = lived.returncode, lived.stderr
    else:
        code, complained = _hinder_thread(place.thread, strace, _life(data_dir, acknowledged, "--wait", *after))
    count = acknowledged.stat().st_size if acknowledged.exists() else 0
    return Lived(code, count, complained.decode(errors="replace"))


def _hinder_thread(name: str, strace: list[str], command: list[str]) -> tuple[int, bytes]:
    with subprocess.Popen(
        command, cwd=ROOT, env=clean_environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as living:
        assert living.stdout is not None and living.stdin is not None
        thread = dict(zip(("journal", "archive"), living.stdout.readline().split(), strict=True))[name].decode()
        strace = [argument for argument in strace if argument != "-qq"]
        with subprocess.Popen([*strace, "-p", thread], stderr=subprocess.PIPE) as tracing:
            assert tracing.stderr is not None
            attached = tracing.stderr.readline()
            assert b"attached" in attached, attached
            _, complained = living.communicate(b"\n", timeout=LIFE_S)
            tracing.stderr.read()
    return living.returncode, complained


def _complaints(data_dir: Path, lived: Lived) -> list[str]:
    ledger = life.ledger_after(lived.acknowledged)
    if lived.acknowledged < life.STEPS:
        ledger.propose()
    return complaints(data_dir, [ledger])


def _of(thread: str, places: list[Place]) -> list[Place]:
    return [place for place in places if place.thread == thread]


def _flush_renames(places: list[Place]) -> list[Place]:
    """Those that move files of a flush into place."""
    return [place for place in _of("main", places) if place.call.startswith("rename") and place.path.endswith(".json")]


def _spread(places: list[Place], short: int) -> list[Place]:
    return places if FULL else [places[number - 1] for number in spread(len(places), short)]


def _is_known(call: str) -> bool:
    """Whether this machine has the call; newer architectures lack rename and unlink."""
    return (
        subprocess.run(
            ["strace", "-o", "/dev/null", "-e", f"trace={call}", "true"], capture_output=True, check=False
        ).returncode
        == 0
    )
