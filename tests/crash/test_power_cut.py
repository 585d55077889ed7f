"""Fault 3: the power is cut under load, on a real ext4."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.engine import Engine
from holdfast.errors import HoldfastError
from tests.crash.harness import FULL, SEED, Recorder, do, holes_in, needs_root, reopened, report, surprises
from tests.crash.oracle import Ledger, differences, found_in

CUTS = 1000 if FULL else 50

_EXT4_IOC_SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
_NO_LOG_FLUSH = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 image and where to mount it."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    try:
        run_tool("truncate", "-s", "64M", str(image))
        run_tool("mkfs.ext4", "-q", "-F", "-J", "size=4", str(image))
        run_tool("mount", "-o", "loop", str(image), str(place))
        run_tool("umount", str(place))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"needs ext4 on a loop device: {error}")
    yield image, place
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.crash
@pytest.mark.root
@needs_root
@pytest.mark.timeout(3600 if FULL else 120)
def test_power_cuts(disk: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """After a power cut at any moment every acknowledged op is there exactly once, without any manual step."""
    image, place = disk
    chance = random.Random(SEED)
    ledgers = [Ledger(client, SEED) for client in range(4)]
    started = time.monotonic()
    wrong: list[str] = []
    behind = 0

    for cut in range(CUTS):
        run_tool("mount", "-o", "loop", str(image), str(place))
        log = Recorder()
        engine = reopened(place / "data", log)
        wrong += differences(ledgers, found_in(engine)) + engine.degraded + surprises(log) + holes_in(engine)
        assert not wrong, (cut, wrong[:5])
        has_power = threading.Event()
        has_power.set()
        workers = [threading.Thread(target=_work, args=(engine, ledger, has_power)) for ledger in ledgers]
        workers.append(threading.Thread(target=_flush, args=(engine,)))
        for worker in workers:
            worker.start()
        time.sleep(chance.uniform(0.005, 0.06))
        # While it writes what it has taken, or is about to.
        status = engine.status()
        behind += status["archived_seq"] < status["durable_seq"]
        has_power.clear()
        cut_power(place)
        for worker in workers:
            worker.join()
        try:
            engine.close(flush=False)
        except (HoldfastError, OSError):
            pass  # its disk is gone
        run_tool("umount", str(place))

    acknowledged = sum(ledger.acknowledged for ledger in ledgers)
    assert acknowledged > CUTS and behind
    report(
        capsys,
        f"{CUTS} of {CUTS} power cuts in {time.monotonic() - started:.0f} s: {acknowledged} acknowledged, 0 lost, 0 doubled, "
        f"{behind} while the archive was behind (seed {SEED})",
    )


def _work(engine: Engine, ledger: Ledger, has_power: threading.Event) -> None:
    while True:
        try:
            do(engine, ledger.propose())
        except HoldfastError:
            return  # in doubt from now on
        if not has_power.is_set():
            # Nobody is told anything without power. And a sync that runs while the kernel shuts the file system down
            # may return 0 for data that is gone: 4 of 150 cuts of a bare write and fdatasync loop, none before the cut.
            return
        ledger.acknowledge()


def _flush(engine: Engine) -> None:
    while True:
        try:
            engine.flush("api")
        except (HoldfastError, OSError):
            return


def cut_power(place: Path) -> None:
    """From now on nothing reaches the disk, and what was not synced is gone."""
    directory = os.open(place, os.O_RDONLY)
    fcntl.ioctl(directory, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    os.close(directory)


def run_tool(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
