"""The rows of the table: what is run for each, what it is compared with, and which ratio is the goal."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

import holdfast
from tests.bench.measure import STARTED_S, environ, exponent, median, run_task, write_and_sync
from tests.bench.peers import MissingPeerError, bare_handler, put_load, redis_server
from tests.bench.record import id_of, session_of

FULL = 1_000_000
CONNECTIONS = 64
COROUTINES = 64
MANY_COROUTINES = 512
WRK_S = 6
IMPORT_MAX_S, STATUS_MAX_S, READY_MAX_S = 0.080, 0.250, 0.500
STALL_MAX_S = 0.002
STOP_GRACE_S = 0.5
REPEATS = 7
FEW = 100
MESSAGES = 10_000
TURNS = 500
PACED_OPS_S = 2_000
PACED_S = 5.0


class Result(NamedTuple):
    """One line of the table.

    Attributes:
        row: number in GOALS.md.
        what: was measured.
        ours, peer: as people read them; *peer* begins with its name.
        ratio: of the two, in the direction of the goal; None when nothing can be compared.
        goal: of the ratio.
        is_at_least: the ratio must reach the goal; else it must stay at or below it.
        note: anything more.
    """

    row: int
    what: str
    ours: str
    peer: str
    ratio: float | None
    goal: float | None
    is_at_least: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """Met, missed or not judged."""
        if self.ratio is None or self.goal is None:
            return "–"
        return "met" if (self.ratio >= self.goal if self.is_at_least else self.ratio <= self.goal) else "MISSED"


class Bench:
    """One run: its sizes, its directory, and what several rows share.

    Attributes:
        directory: for everything that is written.
        sizes: 1 %, 10 % and 100 % of a million sessions, or only the first with ``--quick``.
        dialogues: a file of recorded dialogues, in the form of ``tests/replay.py``.
    """

    def __init__(self, directory: Path, sizes: list[int], dialogues: Path) -> None:
        self.directory = directory
        self.sizes = sizes
        self.dialogues = dialogues
        self._filled: dict[int, dict[str, Any]] = {}
        self._redis_filled: dict[int, dict[str, Any]] = {}
        self._started: dict[int, dict[str, Any]] = {}
        self._redis_started: dict[int, dict[str, float]] = {}

    @property
    def size(self) -> int:
        """The largest."""
        return self.sizes[-1]

    def place(self, name: str) -> Path:
        """A path that nothing is at."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def holdfast_filled(self, size: int) -> tuple[Path, dict[str, Any]]:
        """A data directory with *size* sessions, and how its filling went."""
        path = self.directory / f"holdfast-{size}"
        if size not in self._filled:
            self._filled[size] = run_task("holdfast_fill", directory=str(path), count=size)
        return path, self._filled[size]

    def redis_filled(self, size: int) -> tuple[Path, dict[str, Any]]:
        """The same for redis: a directory with an RDB."""
        path = self.directory / f"redis-{size}"
        if size not in self._redis_filled:
            with redis_server(path, durable=True) as redis:
                filled = run_task("redis_fill", socket=redis.socket, count=size)
                self._redis_filled[size] = filled | {"rss_bytes": redis.rss_bytes}
            shutil.rmtree(path / "appendonlydir")
        return path, self._redis_filled[size]

    def holdfast_started(self, size: int) -> dict[str, Any]:
        """How a start with *size* sessions goes, the fastest of three."""
        if size not in self._started:
            path, _ = self.holdfast_filled(size)
            runs = [run_task("holdfast_start", directory=str(path), size=size) for _ in range(3)]
            self._started[size] = min(runs, key=lambda run: run["seconds"])
        return self._started[size]

    def redis_started(self, size: int) -> dict[str, float]:
        """The same for redis from its RDB."""
        if size not in self._redis_started:
            path, _ = self.redis_filled(size)
            runs = []
            for _ in range(3):
                with redis_server(path, durable=False) as redis:
                    assert redis.loaded_s is not None, "redis did not say how long it loaded"
                    runs.append({"seconds": redis.loaded_s, "rss_bytes": float(redis.rss_bytes)})
            self._redis_started[size] = min(runs, key=lambda run: run["seconds"])
        return self._redis_started[size]


def row_1(bench: Bench) -> Iterator[Result]:
    """Embedded durable puts from 64 coroutines."""
    what = f"embedded durable puts, {COROUTINES} coroutines"
    count = bench.size // 5
    ours = run_task("holdfast_async", directory=str(bench.place("row1")), count=count, coroutines=COROUTINES)["ops_s"]
    with peer_or_note(Result(1, what, speed(ours), "", None, 6)) as note:
        with redis_server(bench.place("row1-redis"), durable=True) as redis:
            peer = run_task("redis_async", socket=redis.socket, count=max(count // 5, 5_000), coroutines=COROUTINES)
        note(Result(1, what, speed(ours), f"redis.asyncio {speed(peer['ops_s'])}", ours / peer["ops_s"], 6))
    yield from note.results


def row_2(bench: Bench) -> Iterator[Result]:
    """Embedded puts with one wait at the end."""
    costs = []
    for size in bench.sizes:
        what = f"embedded puts, one wait at the end, {size:,}"
        ours = bench.holdfast_filled(size)[1]["ops_s"]
        costs.append((size, 1 / ours))
        with peer_or_note(Result(2, what, speed(ours), "", None, 6)) as note:
            peer = bench.redis_filled(size)[1]["ops_s"]
            note(Result(2, what, speed(ours), f"redis-py pipelines of 100 {speed(peer)}", ours / peer, 6))
        yield from note.results
    yield from growth(2, "cost of a put", costs, 0)


def row_3(bench: Bench) -> Iterator[Result]:
    """Embedded get."""
    costs = []
    for size in bench.sizes:
        path, _ = bench.holdfast_filled(size)
        ours = run_task("holdfast_get", directory=str(path), size=size, count=300_000)
        costs.append((size, 1 / ours["ops_s"]))
        # Decoding costs all of them the same, so that the stores are compared without it.
        forms = {"bytes_ops_s": ("as bytes", True), "ops_s": ("decoded", False)}
        with peer_or_note(Result(3, f"embedded get, {size:,}", speed(ours["ops_s"]), "", None, 100)) as note:
            redis_path, _ = bench.redis_filled(size)
            with redis_server(redis_path, durable=False) as redis:
                peer = run_task("redis_get", socket=redis.socket, size=size, count=20_000)
            for key, (form, is_judged) in forms.items():
                ratio = ours[key] / peer[key]
                what = f"embedded get, {form}, {size:,}"
                note(
                    Result(3, what, speed(ours[key]), f"redis-py {speed(peer[key])}", ratio, 100 if is_judged else None)
                )
        yield from note.results
        if size > FULL // 10:
            continue  # filling a million into diskcache takes minutes and does not slow its gets much
        with peer_or_note(Result(3, f"embedded get, {size:,}", speed(ours["ops_s"]), "", None, 10)) as note:
            peer = run_task("diskcache_get", directory=str(bench.place("diskcache")), size=size, count=50_000)
            for key, (form, is_judged) in forms.items():
                ratio = ours[key] / peer[key]
                what = f"embedded get, {form}, {size:,}"
                note(
                    Result(3, what, speed(ours[key]), f"diskcache {speed(peer[key])}", ratio, 10 if is_judged else None)
                )
        yield from note.results
    yield from growth(3, "cost of a get", costs, 0)


def row_4(bench: Bench) -> Iterator[Result]:
    """Served durable puts from one async client that sends together what is called at once."""
    for coroutines, goal in ((COROUTINES, 4.0), (MANY_COROUTINES, 2.5)):
        what = f"served durable puts from one async client, {coroutines} coroutines"
        count = bench.size // 10
        with serving(bench.place("row4"), "unix:") as daemon:
            address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
            ours = run_task("client_async", address=address, count=count, coroutines=coroutines)["ops_s"]
        with peer_or_note(Result(4, what, speed(ours), "", None, goal)) as note:
            with redis_server(bench.place("row4-redis"), durable=True) as redis:
                if coroutines == COROUTINES:
                    name = "redis.asyncio"
                    found = run_task("redis_async", socket=redis.socket, count=count // 5, coroutines=COROUTINES)
                else:
                    name = "redis-py pipelines of 100"
                    found = run_task("redis_pipelines", socket=redis.socket, count=count)
            note(Result(4, what, speed(ours), f"{name} {speed(found['ops_s'])}", ours / found["ops_s"], goal))
        yield from note.results


def row_6(bench: Bench) -> Iterator[Result]:
    """Served single puts from the synchronous client, each waiting for its own sync."""
    what = "served single puts, synchronous client, unix socket"
    count = max(bench.size // 50, 5_000)
    with serving(bench.place("row6"), "unix:") as daemon:
        address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
        with peer_or_note(Result(6, what, "", "", None, 1.2)) as note:
            with redis_server(bench.place("row6-redis"), durable=True) as redis:
                # In turn, so that whatever else the disk does falls on both.
                ours, peers = [], []
                for _ in range(3):
                    ours.append(run_task("client_sync", address=address, count=count)["ops_s"])
                    peers.append(run_task("redis_sync", socket=redis.socket, count=count)["ops_s"])
            mine, peer = median(ours), median(peers)
            note(Result(6, what, speed(mine), f"redis-py {speed(peer)}", mine / peer, 1.2))
    yield from note.results


def row_5(bench: Bench) -> Iterator[Result]:
    """Served single-op durable puts."""
    what = f"served durable PUTs, {CONNECTIONS} connections, TCP"
    load, name = loader()
    try:
        load_s = WRK_S if bench.size == FULL else 2
        with serving(bench.place("row5"), "tcp:127.0.0.1:0") as daemon:
            load(daemon.address, daemon.token, CONNECTIONS, 1)
            ours = load(daemon.address, daemon.token, CONNECTIONS, load_s)
        for form, label in (("application", "bare web.Application"), ("server", "bare web.Server")):
            with bare_handler(form) as address:
                load(address, None, CONNECTIONS, 1)
                peer = load(address, None, CONNECTIONS, load_s)
            goal = 0.8 if form == "application" else None
            note = f"load from {name}" + ("; shown for comparison" if goal is None else "")
            yield Result(5, what, speed(ours), f"{label} {speed(peer)}", ours / peer, goal, note=note)
    except MissingPeerError as error:
        yield Result(5, what, "", "", None, 0.8, note=str(error))


def row_7(bench: Bench) -> Iterator[Result]:
    """Flush: its time, and how long others wait meanwhile."""
    costs = []
    for size in bench.sizes:
        path = bench.place("row7")
        shutil.copytree(bench.holdfast_filled(size)[0], path)
        found = run_task("holdfast_flush", directory=str(path), size=size, rounds=5)
        plain = min(write_and_sync(bench.directory / "plain", found["bytes"]) for _ in range(3))
        costs.append((size, found["seconds"]))
        ours, peer = seconds(found["seconds"]), f"write + fsync of {found['bytes'] >> 20} MiB {seconds(plain)}"
        yield Result(7, f"flush of {size:,} sessions", ours, peer, found["seconds"] / plain, at_full(1.5, size), False)
        stall, usual = median(found["stalls"]), median(found["usual_stalls"])
        yield Result(
            7,
            f"longest stall of requests during it, {size:,}",
            seconds(stall),
            f"without a flush {seconds(usual)}; 2 ms more allowed",
            stall / (usual + STALL_MAX_S),
            at_full(1, size),
            False,
            note=f"durable puts: {seconds(median(found['durable']))} beside {seconds(median(found['usual_durable']))}, "
            "which is the disk's share",
        )
    yield from growth(7, "time of a flush", costs, 1)


def row_8(bench: Bench) -> Iterator[Result]:
    """Start with everything in the snapshot."""
    costs = []
    for size in bench.sizes:
        path, _ = bench.holdfast_filled(size)
        ours = bench.holdfast_started(size)["seconds"]
        costs.append((size, ours))
        what = f"start with {size:,} sessions"
        with peer_or_note(Result(8, what, seconds(ours), "", None, at_full(1.3, size), False)) as note:
            peer = bench.redis_started(size)["seconds"]
            # Redis tells milliseconds, so a small file may take none.
            ratio = ours / peer if peer else None
            note(
                Result(
                    8, what, seconds(ours), f"redis loading its RDB {seconds(peer)}", ratio, at_full(1.3, size), False
                )
            )
        yield from note.results
        file = str(path / "chat_sessions.json")
        decoding = min(run_task("decode_file", path=file)["seconds"] for _ in range(3))
        peer_text = f"orjson.loads of the file {seconds(decoding)}"
        yield Result(8, what, seconds(ours), peer_text, ours / decoding, at_full(0.5, size), False)
    yield from growth(8, "time of a start", costs, 1)


def row_9(bench: Bench) -> Iterator[Result]:
    """Memory: after a start with the data, and after putting it."""
    costs = []
    for size in bench.sizes:
        started, filled = bench.holdfast_started(size), bench.holdfast_filled(size)[1]
        costs.append((size, max(started["rss_bytes"] - started["rss_before_bytes"], 1.0)))
        for when, ours, redis in (
            ("after a start", started["rss_bytes"], bench.redis_started),
            ("after the puts of row 2", filled["rss_bytes"], lambda size: bench.redis_filled(size)[1]),
        ):
            what = f"memory with {size:,} sessions, {when}"
            with peer_or_note(Result(9, what, mebibytes(ours), "", None, at_full(1.1, size), False)) as note:
                peer = redis(size)["rss_bytes"]
                text = f"redis RSS {mebibytes(peer)}"
                note(Result(9, what, mebibytes(ours), text, ours / peer, at_full(1.1, size), False))
            yield from note.results
    yield from growth(9, "memory beyond an empty process", costs, 1)
    yield from dialogues(bench)


def dialogues(bench: Bench) -> Iterator[Result]:
    """Memory for sessions as replayed dialogues leave them; GOALS.md has no figure for it."""
    count = bench.size // 5
    path, peer_path = bench.place("dialogues"), bench.place("dialogues-redis")
    found = run_task("holdfast_dialogues", directory=str(path), dialogues=str(bench.dialogues), count=count)
    ours = run_task("holdfast_start", directory=str(path), size=count)
    what = f"memory with {count:,} sessions of replayed dialogues, {found['bytes']:.0f} bytes each"
    beyond = (ours["rss_bytes"] - ours["rss_before_bytes"]) / count
    text = f"{mebibytes(ours['rss_bytes'])}, {beyond:.0f} bytes a session"
    with peer_or_note(Result(9, what, text, "", None, None, False)) as note:
        with redis_server(peer_path, durable=False) as redis:
            run_task("redis_dialogues", socket=redis.socket, dialogues=str(bench.dialogues), count=count)
        with redis_server(peer_path, durable=False) as redis:
            peer = redis.rss_bytes
        ratio = ours["rss_bytes"] / peer
        note(
            Result(
                9, what, text, f"redis RSS {mebibytes(peer)}", ratio, None, False, note=f"from {bench.dialogues.name}"
            )
        )
    yield from note.results


def row_10(bench: Bench) -> Iterator[Result]:
    """Appending to a long conversation and reading its end, beside a short one."""
    costs: dict[str, list[tuple[int, float]]] = {"append": [], "window": []}
    for size in (MESSAGES // 100, MESSAGES // 10, MESSAGES):
        took = run_task("conversation_costs", directory=str(bench.place("row10")), size=size, rounds=400)
        for name, what, goal in (
            ("append", "durable message.append on a conversation", 1.1),
            ("window", "window(20) on a conversation", 1.2),
        ):
            ours, peer = took[name], took[f"{name}_10"]
            costs[name].append((size, ours))
            yield Result(
                10,
                f"{what} of {size:,} messages",
                seconds(ours),
                f"of 10: {seconds(peer)}",
                ours / peer,
                goal if size == MESSAGES else None,
                False,
                note="a conversation of 10 has only 10 to show" if name == "window" else "",
            )
    for name, points in costs.items():
        yield from growth(10, f"time of {name}", points, 0)


def row_11(bench: Bench) -> Iterator[Result]:
    """What 500 turns take on the disk once the daemon has stopped."""
    arguments = {"dialogues": str(bench.dialogues), "turns": TURNS}
    found = run_task("conversation_bytes", directory=str(bench.place("row11")), **arguments)
    note = f"the journal's history of {found['kept'] / 1024:.0f} KiB, which journal_keep bounds, comes on top"
    yield Result(
        11,
        f"bytes on disk for {TURNS} turns, all files",
        f"{found['bytes'] / 1024:.0f} KiB",
        f"the turns: {found['own'] / 1024:.0f} KiB",
        found["bytes"] / found["own"],
        3,
        False,
        note=note,
    )


def row_12(bench: Bench) -> Iterator[Result]:
    """The first page of a list."""
    yield from conversation_pages(bench)
    few = bench.place("row12")
    run_task("holdfast_fill", directory=str(few), count=FEW)
    base = run_task("holdfast_page", directory=str(few), size=FEW, rounds=2_000)["seconds"]
    costs = [(FEW, base)]
    for size in bench.sizes:
        path, _ = bench.holdfast_filled(size)
        ours = run_task("holdfast_page", directory=str(path), size=size, rounds=200)["seconds"]
        costs.append((size, ours))
        what = f"first page of the list of {size:,} sessions"
        yield Result(12, what, seconds(ours), f"of {FEW}: {seconds(base)}", ours / base, at_full(2, size), False)
    yield from growth(12, "time of a first page", costs, 0)


def conversation_pages(bench: Bench) -> Iterator[Result]:
    """The first page of a list of conversations, of all and of one user."""
    costs: dict[str, list[tuple[int, float]]] = {"all": [], "user": []}
    for size in (FEW, *(size // 10 for size in bench.sizes)):
        path = bench.place("row12-conversations")
        run_task("fill_conversations", directory=str(path), count=max(size, FEW))
        took = run_task("conversation_page", directory=str(path), size=max(size, FEW), rounds=400)
        for name, what in (("all", "conversations"), ("user", "conversations, one user's")):
            costs[name].append((size, took[name]))
            base = costs[name][0][1]
            if size > FEW:
                peer = f"of {FEW}: {seconds(base)}"
                goal = at_full(2, size * 10)
                yield Result(
                    12,
                    f"first page of the list of {size:,} {what}",
                    seconds(took[name]),
                    peer,
                    took[name] / base,
                    goal,
                    False,
                )
    for name, points in costs.items():
        yield from growth(12, f"time of a first page of conversations, {name}", points, 0)


def row_16(bench: Bench) -> Iterator[Result]:
    """Latency of single durable puts while everything is flushed and backed up.

    One client sends PACED_OPS_S puts a second, each when it is due, whether or not those before it are answered; the delay
    runs from that moment to the answer, so that what waits behind a stall counts in full. Three times in turn, PACED_S
    without and PACED_S with flushes, 0.2 s after each other and each of all sessions, and with backups, one after the other
    and each proved; compared are the medians of the three p99. In the goal a search runs as well; it does not exist yet.
    """
    what = f"p99 of durable puts at {PACED_OPS_S:,}/s during flushes and backups of {bench.size:,} sessions"
    path = bench.place("row16")
    shutil.copytree(bench.holdfast_filled(bench.size)[0], path)
    with serving(path, "unix:") as daemon:
        arguments = {"address": f"unix:{path / 'holdfast.sock'}", "token": None, "size": bench.size}
        arguments |= {"seconds": PACED_S, "ops_s": PACED_OPS_S}
        quiet, busy, flushes, backups = [], [], 0, 0
        for _ in range(3):
            quiet.append(run_task("paced_puts", **arguments)["p99"])
            # A flush rewrites every session as soon as one of them has changed.
            stop = threading.Event()
            done: list[int] = []
            begun: list[str] = []
            others = [
                threading.Thread(target=keep_flushing, args=(path, stop, done)),
                threading.Thread(target=keep_backing_up, args=(path, stop, begun)),
            ]
            for other in others:
                other.start()
            try:
                busy.append(run_task("paced_puts", **arguments)["p99"])
            finally:
                stop.set()
                for other in others:
                    other.join()
            flushes += len(done)
            backups += len(begun)
        del daemon
    ours, usual = median(busy), median(quiet)
    note = f"{flushes} flushes and {backups} proved backups in {3 * PACED_S:.0f} s; search does not exist yet"
    yield Result(16, what, seconds(ours), f"without them {seconds(usual)}", ours / usual, 2, False, note=note)


def keep_flushing(path: Path, stop: threading.Event, done: list[int]) -> None:
    """Flush again and again."""
    with holdfast.connect(f"unix:{path / 'holdfast.sock'}") as hf:
        while not stop.is_set():
            done.append(hf.flush().snapshot_seq)
            stop.wait(0.2)


def keep_backing_up(path: Path, stop: threading.Event, begun: list[str]) -> None:
    """Take one backup after the other; the last may go on behind the end."""
    with holdfast.connect(f"unix:{path / 'holdfast.sock'}") as hf:
        while not stop.is_set():
            report = hf.backup()
            if not report.proved:
                raise RuntimeError(f"a backup was not proved: {report.problem}")
            begun.append(report.name)


def row_14(bench: Bench) -> Iterator[Result]:
    """SIGTERM to exit when everything has changed."""
    path = bench.place("row14")
    shutil.copytree(bench.holdfast_filled(bench.size)[0], path)
    with serving(path, "unix:", "--set", "journal_max=1GiB", "--set", "flush_every=1d") as daemon:
        put_all(daemon, bench.size)
        daemon.process.send_signal(signal.SIGUSR1)
        flush = daemon.event("flush.completed")["duration_ms"] / 1000
        put_all(daemon, bench.size)
        started = time.perf_counter()
        daemon.process.send_signal(signal.SIGTERM)
        code = daemon.process.wait(STARTED_S)
        took = time.perf_counter() - started
    if code:
        raise RuntimeError(f"the daemon ended with {code}")
    what = f"SIGTERM to exit, {bench.size:,} sessions changed"
    yield Result(
        14,
        what,
        seconds(took),
        f"a flush + 0.5 s: {seconds(flush + STOP_GRACE_S)}",
        took / (flush + STOP_GRACE_S),
        1,
        False,
    )


def row_15(bench: Bench) -> Iterator[Result]:
    """Small things that people wait for."""
    code = "import time; t = time.perf_counter(); import holdfast; print(time.perf_counter() - t)"
    imports, statuses, readies = [], [], []
    for _ in range(REPEATS):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ(), check=True)
        imports.append(float(done.stdout))
    for _ in range(REPEATS):
        path = bench.place("row15")
        started = time.perf_counter()
        with serving(path, "unix:") as daemon:
            readies.append(time.perf_counter() - started)
            asked = time.perf_counter()
            command = [sys.executable, "-m", "holdfast", "status", "--data-dir", str(path)]
            subprocess.run(command, capture_output=True, env=environ(), check=True)
            statuses.append(time.perf_counter() - asked)
            daemon.process.send_signal(signal.SIGTERM)
            daemon.process.wait(STARTED_S)
    for what, times, allowed in (
        ("import holdfast", imports, IMPORT_MAX_S),
        ("holdfast status", statuses, STATUS_MAX_S),
        ("READY on an empty directory", readies, READY_MAX_S),
    ):
        ours = median(times)
        yield Result(15, what, seconds(ours), f"at most {seconds(allowed)}", ours / allowed, 1, False)


ROWS: dict[int, Callable[[Bench], Iterator[Result]]] = {
    1: row_1,
    2: row_2,
    3: row_3,
    4: row_4,
    5: row_5,
    6: row_6,
    7: row_7,
    8: row_8,
    9: row_9,
    10: row_10,
    11: row_11,
    12: row_12,
    14: row_14,
    15: row_15,
    16: row_16,
}


# A daemon to measure.


class Served(NamedTuple):
    """A running daemon.

    Attributes:
        events: everything it logs, as it comes.
    """

    process: subprocess.Popen[str]
    events: Iterator[dict[str, Any]]
    data_dir: Path
    listen: list[str]

    def event(self, name: str) -> dict[str, Any]:
        """The next event *name*."""
        return next(event for event in self.events if event["event"] == name)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return self.listen[0].removeprefix("tcp:")

    @property
    def token(self) -> str:
        return (self.data_dir / "token").read_text().strip()


@contextmanager
def serving(path: Path, listen: str, *options: str) -> Iterator[Served]:
    """A daemon on *path* that is ready; killed at the end unless it has ended."""
    command = [sys.executable, "-m", "holdfast", "serve", "--data-dir", str(path), "--listen", listen]
    command += ["--set", "log.format=json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ(), cwd=path.parent)
    try:
        assert process.stdout is not None
        events = map(orjson.loads, process.stdout)
        ready = next((event for event in events if event["event"] == "daemon.ready"), None)
        if ready is None:
            raise RuntimeError(f"the daemon did not start, exit code {process.wait(STARTED_S)}")
        yield Served(process, events, path, ready["listen"])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def put_all(daemon: Served, size: int) -> None:
    """Store every session anew, in batches of 10,000."""
    connection = http.client.HTTPConnection("localhost", timeout=STARTED_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.data_dir / "holdfast.sock"))
    for first in range(0, size, 10_000):
        ids = [id_of(number) for number in range(first, min(first + 10_000, size))]
        ops = [{"op": "session.put", "id": id, "value": session_of(id)} for id in ids]
        connection.request("POST", "/v1/batch", orjson.dumps({"ops": ops}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the batch was answered {response.status}: {response.read()[:300]!r}")
        response.read()
    connection.close()


def loader() -> tuple[Callable[[str, str | None, int, int], float], str]:
    """What sends the load of row 5: wrk, else a client in Python, which is slower than what it measures."""
    if shutil.which("wrk"):
        return put_load, "wrk"
    return (
        python_load,
        "aiohttp, since wrk is missing (package wrk): the figures are the client's as much as the server's",
    )


def python_load(address: str, token: str | None, connections: int, load_s: int) -> float:
    """As ``put_load``, from aiohttp."""
    import aiohttp

    async def run() -> float:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answered = 0
        ends_at = time.perf_counter() + load_s

        async def one(client: aiohttp.ClientSession, turn: int) -> None:
            nonlocal answered
            id = id_of(turn)
            while time.perf_counter() < ends_at:
                async with client.put(f"http://{address}/v1/sessions/{id}", json=session_of(id)) as response:
                    response.raise_for_status()
                    await response.read()
                    answered += 1

        connector = aiohttp.TCPConnector(limit=connections)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as client:
            await asyncio.gather(*(one(client, turn) for turn in range(connections)))
        return answered / load_s

    return asyncio.run(run())


# Saying it.


class _Note:
    def __init__(self) -> None:
        self.results: list[Result] = []

    def __call__(self, result: Result) -> None:
        self.results.append(result)


@contextmanager
def peer_or_note(without: Result) -> Iterator[_Note]:
    """Gather results; when a peer turns out to be missing, the one *without* it, which names what is missing."""
    note = _Note()
    try:
        yield note
    except MissingPeerError as error:
        note(without._replace(note=str(error)))


def growth(row: int, what: str, costs: list[tuple[int, float]], goal: int) -> Iterator[Result]:
    """The growth exponent over the sizes, when there are several."""
    slope = exponent(costs)
    if slope is not None:
        sizes = " → ".join(f"{size:,}" for size, _ in costs)
        yield Result(row, f"growth exponent: {what}", f"{slope:.2f}", f"should be {goal}", None, None, note=sizes)


def at_full(goal: float, size: int) -> float | None:
    """*goal*, which is one for a million sessions; smaller sizes show how the cost grows."""
    return goal if size == FULL else None


def speed(ops_s: float) -> str:
    """Ops a second."""
    return f"{ops_s:,.0f}/s"


def seconds(duration_s: float) -> str:
    """In the unit that suits it."""
    return f"{duration_s:.2f} s" if duration_s >= 1 else f"{duration_s * 1000:.1f} ms"


def mebibytes(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"
