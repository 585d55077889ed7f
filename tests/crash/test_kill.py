"""Fault 1: SIGKILL under load, at random times."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from holdfast.ops import Batch, SessionPut
from tests.crash.harness import FULL, SEED, Load, reopened, report, serving
from tests.crash.oracle import Ledger, differences

KILLS = 200 if FULL else 5
SESSIONS = 10_000
CLIENTS = 6
READY_S = 2.0 if FULL else 6.0
"""The pass mark is 2 s; the short form runs beside whatever else the machine does."""


@pytest.mark.crash
@pytest.mark.timeout(3600 if FULL else 120)
def test_kill_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed at any time under load, it is ready again at once with every acknowledged op exactly once."""
    data_dir = tmp_path / "data"
    _fill(data_dir)
    ledgers = [Ledger(client, SEED) for client in range(CLIENTS)]
    chance = random.Random(SEED)
    wrong: list[str] = []
    in_doubt, slowest_s = 0, 0.0

    for round in range(KILLS):
        # Flushes are what a kill may find half done, so there are many.
        with serving(
            data_dir, "--set", f"journal_max={chance.choice(['64KiB', '1MiB'])}", "--set", "flush_every=1s"
        ) as served:
            if round:
                slowest_s = max(slowest_s, served.ready_s)
                in_doubt += sum(ledger.in_doubt is not None for ledger in ledgers)
                wrong += [f"after kill {round}: {complaint}" for complaint in differences(ledgers, served.found())]
            assert not wrong, wrong[:5]
            load = Load(served, ledgers)
            time.sleep(chance.uniform(0.01, 1.2))
            if chance.random() < 0.5:
                served.process.send_signal(signal.SIGUSR1)
                time.sleep(chance.uniform(0, 0.1))
            served.kill()
            load.join()
            assert not load.refused, load.refused[:3]
    with serving(data_dir) as served:
        wrong += differences(ledgers, served.found())
        degraded = [event for event in served.events() if event["level"] == "error"]
        assert served.stop() == 0

    acknowledged = sum(ledger.acknowledged for ledger in ledgers)
    assert not wrong and not degraded, (wrong[:5], degraded)
    assert acknowledged > KILLS * CLIENTS
    assert slowest_s < READY_S
    report(
        capsys,
        f"{KILLS} of {KILLS} kills: {acknowledged} acknowledged, 0 lost, 0 doubled, {in_doubt} in doubt at most once; "
        f"READY within {slowest_s:.2f} s at {SESSIONS} sessions (seed {SEED})",
    )


def _fill(data_dir: Path) -> None:
    engine = reopened(data_dir)
    ops = [
        SessionPut(id=f"57300{number:07d}", value={"currentState": "catalog", "n": number})
        for number in range(SESSIONS)
    ]
    engine.submit_batch(Batch(ops=list(ops), atomic=False)).wait()
    engine.close()
