"""Leases in practice: customers whose messages come in faster than one worker handles them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.engine import Engine
from holdfast.errors import Leased, Unavailable
from holdfast.leases import take_lease, take_lease_async
from holdfast.ops import SessionLease, SessionRelease
from tests.engine_harness import running
from tests.library_forms import TEST_S, daemon_in_thread
from tests.test_daemon import Daemon

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "20261121"))
PROCESSES = 8
CUSTOMERS = 200
MESSAGES = 24_000 if FULL else 2_400

WORKER = """
import asyncio, json, random, sys
import holdfast

address, seed, count, customers, form = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
rnd = random.Random(seed)
# Half of all messages come from a tenth of the customers, two at a time.
ids = [str(rnd.randrange(customers // 10) if rnd.random() < 0.5 else rnd.randrange(customers)) for _ in range(count)]

def handled(state):
    # What a bot does: it reads, thinks for a moment, and writes what rests on what it read.
    return {"handled": state.get("handled", 0) + 1}

def sync():
    with holdfast.connect(address) as hf:
        for id in ids:
            with hf.sessions.lease(id, ttl=30, owner=f"worker {seed}") as session:
                session.put(handled(session.get(default={})))

async def tasks():
    async with holdfast.aio.connect(address) as hf:
        todo = iter(ids)
        async def worker():
            for id in todo:
                async with hf.sessions.lease(id, ttl=30) as session:
                    await session.put(handled(await session.get(default={})))
        await asyncio.gather(*(worker() for _ in range(8)))

sync() if form == "sync" else asyncio.run(tasks())
counts = {}
for id in ids:
    counts[id] = counts.get(id, 0) + 1
print(json.dumps(counts))
"""


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of Python that runs *script*."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon process on ``tmp_path/data``."""
    running = Daemon(tmp_path / "data").ready()
    yield running
    running.kill()


def test_no_update_is_lost(daemon: Daemon) -> None:
    """Eight processes, threads and tasks, handle the messages of 200 customers: each one is counted once."""
    print(f"seed {SEED}")
    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
    started_at = time.monotonic()
    workers = [
        started(WORKER, address, SEED + n, MESSAGES // PROCESSES, CUSTOMERS, "sync" if n % 2 else "async")
        for n in range(PROCESSES)
    ]
    expected: dict[str, int] = {}
    for worker in workers:
        output, _ = worker.communicate(timeout=100)
        assert worker.returncode == 0
        for id, count in json.loads(output).items():
            expected[id] = expected.get(id, 0) + count
    took_s = time.monotonic() - started_at

    with holdfast.connect(address) as hf:
        found = {item.id: json.loads(item.value)["handled"] for item in hf.sessions.list()}

        assert found == expected
        assert hf.status()["leases"] == 0
    print(f"{MESSAGES} messages of {len(found)} customers from {PROCESSES} processes in {took_s:.1f} s, none lost")


HOLDER = """
import sys, time
import holdfast

with holdfast.connect(sys.argv[1]) as hf, hf.sessions.lease("57", ttl=float(sys.argv[2])) as session:
    session.put({"by": "holder"})
    print(session.generation, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("is_awaited", [False, True])
def test_the_lease_of_a_dead_worker_ends_with_its_ttl(is_awaited: bool, daemon: Daemon) -> None:
    """Who waits gets it then, with a higher generation; until then the living holder renewed it."""
    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
    ttl_s = 1.0
    holder = started(HOLDER, address, ttl_s)
    try:
        assert holder.stdout is not None
        generation = int(holder.stdout.readline())
        with holdfast.connect(address) as hf, pytest.raises(Leased):
            hf.sessions.lease("57", timeout=2 * ttl_s)
    finally:
        holder.kill()
        holder.wait()
    killed_at = time.monotonic()

    async def waited() -> int:
        async with holdfast.aio.connect(address) as hf, hf.sessions.lease("57") as session:
            assert (await session.get())["by"] == "holder"
            return int(session.generation)

    if is_awaited:
        found = asyncio.run(waited())
    else:
        with holdfast.connect(address) as hf, hf.sessions.lease("57") as session:
            found = session.generation

    assert found > generation
    assert time.monotonic() - killed_at < ttl_s + 0.5


def test_a_restart_keeps_leases_and_those_who_wait(daemon: Daemon) -> None:
    """A lease outlives its daemon; who waited waits on, and gets it when it is released."""
    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
    got: list[int] = []

    def wait() -> None:
        with holdfast.connect(address) as hf, hf.sessions.lease("57") as session:
            got.append(session.generation)

    with holdfast.connect(address) as hf:
        lease = hf.sessions.lease("57")
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.2)
        daemon.send(signal.SIGTERM)
        assert daemon.wait() == 0
        back = Daemon(daemon.data_dir).ready()
        try:
            time.sleep(0.7)
            assert not got
            lease.put({"n": 1})
            lease.release()
            waiter.join(TEST_S)
        finally:
            back.kill()

    assert got and got[0] > lease.generation


# The queue.


@contextlib.contextmanager
def engine_on(path: Path) -> Iterator[Engine]:
    """An engine, and nobody left waiting at its end."""
    with running(path) as engine:
        yield engine
        assert engine.lease_queue.waiting_count() == 0


def test_first_come_first_served(tmp_path: Path) -> None:
    """Threads and tasks stand in one line, and nobody who comes later goes before."""
    order: list[int] = []
    with engine_on(tmp_path) as engine:
        held = take_lease(engine, SessionLease(id="57"), 0)

        def by_thread(number: int) -> None:
            answer = take_lease(engine, SessionLease(id="57"), TEST_S)
            order.append(number)
            engine.submit(SessionRelease(id="57", generation=generation_of(answer))).wait()

        async def by_task(number: int) -> None:
            answer = await take_lease_async(engine, SessionLease(id="57"), TEST_S)
            order.append(number)
            await engine.submit(SessionRelease(id="57", generation=generation_of(answer))).committed()

        threads = []
        for number in range(20):
            target = by_thread if number % 2 else lambda number=number: asyncio.run(by_task(number))
            thread = threading.Thread(target=target, args=(number,) if number % 2 else ())
            thread.start()
            threads.append(thread)
            until_waiting(engine, number + 1)
        engine.submit(SessionRelease(id="57", generation=generation_of(held))).wait()
        for thread in threads:
            thread.join(TEST_S)

    assert order == list(range(20))


def until_waiting(engine: Engine, count: int) -> None:
    """Return when so many wait."""
    ends_at = time.monotonic() + TEST_S
    while engine.lease_queue.waiting_count() < count:
        assert time.monotonic() < ends_at, f"{engine.lease_queue.waiting_count()} of {count} wait"
        time.sleep(0.001)


def generation_of(answer: Any) -> int:
    assert answer.generation is not None
    return int(answer.generation)


def test_a_waiter_gives_up_in_time(tmp_path: Path) -> None:
    """And those behind it move up."""
    with engine_on(tmp_path) as engine:
        held = take_lease(engine, SessionLease(id="57", owner="w"), 0)
        started_at = time.monotonic()
        with pytest.raises(Leased, match="by w until"):
            take_lease(engine, SessionLease(id="57"), 0.1)
        assert 0.1 <= time.monotonic() - started_at < 5
        got: list[Any] = []
        behind = threading.Thread(target=lambda: got.append(take_lease(engine, SessionLease(id="57"), TEST_S)))
        behind.start()
        with pytest.raises(Leased, match="others wait for it before you"):
            until_waiting(engine, 1)
            take_lease(engine, SessionLease(id="57"), 0.1)
        engine.submit(SessionRelease(id="57", generation=generation_of(held))).wait()
        behind.join(TEST_S)

        assert generation_of(got[0]) > generation_of(held)


def test_a_waiter_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither its place nor a lease that nobody knows of."""

    async def body() -> None:
        rnd = random.Random(SEED)
        for _ in range(100):
            held = await take_lease_async(engine, SessionLease(id="57"), TEST_S)
            waiter = asyncio.create_task(take_lease_async(engine, SessionLease(id="57"), TEST_S))
            await asyncio.sleep(0)
            await engine.submit(SessionRelease(id="57", generation=generation_of(held))).committed()
            for _ in range(rnd.randrange(4)):
                await asyncio.sleep(0)
            waiter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                answer = await waiter
                await engine.submit(SessionRelease(id="57", generation=generation_of(answer))).committed()
        free = await take_lease_async(engine, SessionLease(id="57"), 5)
        assert free.generation

    with engine_on(tmp_path) as engine:
        asyncio.run(asyncio.wait_for(body(), TEST_S))


def test_who_waits_is_told_when_the_daemon_stops(tmp_path: Path) -> None:
    """At once, with an error that says to come back."""
    with running(tmp_path) as engine:
        take_lease(engine, SessionLease(id="57"), 0)
        told: list[BaseException] = []

        def wait() -> None:
            try:
                take_lease(engine, SessionLease(id="57"), TEST_S)
            except Unavailable as error:
                told.append(error)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        until_waiting(engine, 3)
        engine.close()
        for thread in threads:
            thread.join(TEST_S)

        assert len(told) == 3


def test_a_client_that_hung_up_is_passed_over(tmp_path: Path) -> None:
    """Its turn is nobody's loss: the next one is served at once."""
    with daemon_in_thread(tmp_path) as served, holdfast.connect(f"unix:{served.socket_path}") as hf:
        lease = hf.sessions.lease("57", ttl=3600)

        async def hang_up() -> None:
            async with holdfast.aio.connect(f"unix:{served.socket_path}") as other:

                async def wait() -> None:
                    await other.sessions.lease("57")

                tasks = [asyncio.create_task(wait()) for _ in range(3)]
                await asyncio.to_thread(until_waiting, served.engine, 3)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(hang_up())
        got: list[Any] = []
        patient = threading.Thread(target=lambda: got.append(hf.sessions.lease("57", timeout=TEST_S)))
        patient.start()
        time.sleep(0.1)
        released_at = time.monotonic()
        lease.release()
        patient.join(TEST_S)

        assert time.monotonic() - released_at < 5
        assert got[0].generation > lease.generation
        got[0].release()
        assert served.engine.lease_queue.waiting_count() == 0
