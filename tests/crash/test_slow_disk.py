"""Fault 9: a disk that is slow, from the start or all of a sudden."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

import holdfast
from tests.crash.harness import FULL, Served, needs_strace, report, serving

DELAYS_S = (0.3, 5.0) if FULL else (0.3,)
ASK_EVERY_S = 0.01
LAG_MAX_S = 0.05 if FULL else 0.15
"""At the 99th percentile: the pass mark, or what a busy machine may add to it."""

pytestmark = [pytest.mark.crash, needs_strace, pytest.mark.timeout(300)]


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("first_slow_sync", [1, 200])
def test_a_slow_disk_slows_nobody_but_those_who_wait_for_it(
    delay_s: float, first_slow_sync: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The event loop answers at once, also when syncs were quick before; whoever writes gets his answer in time."""
    faults = f"inject=fdatasync:delay_enter={int(delay_s * 1e6)}:when={first_slow_sync}+"
    strace = ["strace", "-qq", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", faults]
    lags: list[float] = []
    puts: list[float] = []
    stop = threading.Event()
    with serving(tmp_path / "data", "--set", "flush_every=1h", wrapper=strace) as served:
        asking = threading.Thread(target=_ask, args=(served, lags, stop))
        try:
            with holdfast.connect(f"unix:{served.data_dir / 'holdfast.sock'}") as hf:
                asking.start()
                ends_at = time.monotonic() + 4 * delay_s + 3
                # Of one client alone, so that the loop would write by itself as long as syncs are quick.
                while time.monotonic() < ends_at:
                    began = time.monotonic()
                    hf.sessions.put("57300", {"n": len(puts)})
                    puts.append(time.monotonic() - began)
                version = hf.sessions.record("57300")
        finally:
            stop.set()
            asking.join(30)
            # strace alone would leave the daemon behind.
            os.kill(served.pid, signal.SIGKILL)
            served.process.wait(30)
        told = [event for event in served.events() if event["event"] == "journal.sync_slow"]

    lags.sort()
    p99 = lags[len(lags) * 99 // 100]
    report(
        capsys,
        f"syncs of {delay_s} s from the {first_slow_sync}. on: /healthz p99 {p99 * 1000:.1f} ms, longest "
        f"{lags[-1] * 1000:.0f} ms of {len(lags)}; {len(puts)} puts, the slowest {max(puts):.2f} s, "
        f"the median {statistics.median(puts) * 1000:.1f} ms",
    )
    assert p99 < LAG_MAX_S
    assert max(puts) >= delay_s
    assert version is not None and version.version == len(puts)
    assert 1 <= len(told) <= 2


def _ask(served: Served, lags: list[float], stop: threading.Event) -> None:
    """Ask whether the loop is well, again and again."""
    with served.connect() as client:
        while not stop.wait(ASK_EVERY_S):
            began = time.monotonic()
            client.ask("GET", "/healthz")
            lags.append(time.monotonic() - began)
