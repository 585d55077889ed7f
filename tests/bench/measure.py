"""How things are measured: each in a process of its own, so that no heap or cache is inherited."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED_S = 60.0
TASK_S = 900.0


def environ() -> dict[str, str]:
    """The environment of a process of ours: no settings of the caller, the source tree first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "DATA_DIR"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT / "daemon"), str(ROOT)])}


def run_task(name: str, **arguments: Any) -> dict[str, Any]:
    """What the function *name* of ``tests.bench.tasks`` returns, run in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "tests.bench.tasks", name, orjson.dumps(arguments).decode()]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=TASK_S, env=environ(), cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} ended with {done.returncode}")
    result: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return result


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024
    number = os.getpid() if pid == "self" else pid
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(number)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024


def write_and_sync(path: Path, size: int) -> float:
    """Seconds to write *size* bytes in pieces of 1 MiB and sync them; the least that a flush can take."""
    piece = os.urandom(1 << 20)
    started = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    left = size
    while left:
        left -= os.write(fd, piece[:left])
    os.fsync(fd)
    os.close(fd)
    took = time.perf_counter() - started
    path.unlink()
    return took


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """The slope of log cost over log size: 0 when cost does not grow, 1 when it grows as the size does."""
    if len(points) < 2:
        return None
    xs = [math.log(size) for size, _ in points]
    ys = [math.log(cost) for _, cost in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def median(values: Sequence[float]) -> float:
    """The middle one, the higher of two."""
    return sorted(values)[len(values) // 2]


def machine(directory: Path) -> str:
    """What this runs on; the sync is measured, since everything durable depends on it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    syncs = sorted(write_and_sync(directory / "sync", 4096) for _ in range(50))
    busy = f", load {os.getloadavg()[0]:.1f}"
    return (
        f"{model}, {os.cpu_count()} cores{busy}, {platform.platform()}; write + fsync of 4 KiB {syncs[25] * 1e6:.0f} us"
    )
