"""A quick load test of the running daemon, which cleans up after itself."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import orjson

from holdfast.cli.connection import WORK_TIMEOUT_S, Connection, Daemon, daemon_options
from holdfast.cli.show import Column, Progress, examples, json_option, print_json, print_table, readable_size
from holdfast.client.messages import collection_target, record_target
from holdfast.errors import HoldfastError

COLLECTION = "holdfast-bench"
"""A collection of its own: no bot reads it, and its records count in no sales figure."""

IDS = 1000
"""Records that it writes again and again, so that it takes no memory to speak of."""

BATCH_OPS = 100

BUSY_OPS_S = 20.0
"""Above this somebody else is at work, and would notice."""

LOOK_S = 0.5
"""Between two looks at the seq, by which it is known how busy the daemon is."""

TICKS_S = 10
"""Steps of the progress bar in a second."""

ROOM_BYTES_MIN = 1 << 30
JOURNAL_BYTES_PER_OP = 300
OPS_S_AT_MOST = 40_000
"""More than this client can send; for the estimate of what it writes."""

# 180 bytes, like the session of a bot.
_VALUE = {
    "recipientPhone": "573001234567",
    "currentState": "awaiting_payment",
    "lastActivity": "2026-11-21T06:00:00.000Z",
    "productType": "music",
    "capacity": "32GB",
    "note": "holdfast bench",
}


class Result(NamedTuple):
    """What one kind of load gave.

    Attributes:
        seconds: from the first request to the last answer.
        latencies_s: of each request, sorted.
    """

    load: str
    ops: int
    seconds: float
    latencies_s: list[float]

    def percentile_ms(self, percent: float) -> float:
        """The latency that so many percent of the requests kept within."""
        last = len(self.latencies_s) - 1
        return self.latencies_s[min(last, int(len(self.latencies_s) * percent / 100))] * 1000

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "load": self.load,
            "ops": self.ops,
            "seconds": round(self.seconds, 3),
            "ops_per_s": round(self.ops / self.seconds, 1),
            **{f"p{percent}_ms": round(self.percentile_ms(percent), 3) for percent in (50, 95, 99)},
        }


class Load(NamedTuple):
    """A kind of load.

    Attributes:
        request: method, path and body of the request of that number.
        ops: in each request.
    """

    name: str
    connections: int
    ops: int
    request: Callable[[int], tuple[str, str, bytes | None]]


@click.command(epilog=examples("holdfast bench", "holdfast bench --seconds 10 --connections 32 --json"))
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=3, show_default=True, help="For each kind of load.")
@click.option("--connections", type=click.IntRange(1, 256), default=16, show_default=True, help="At once.")
@click.option("--yes", is_flag=True, help="Do it also when it would be in somebody's way.")
@json_option
@daemon_options
def bench(daemon: Daemon, seconds: float, connections: int, yes: bool, as_json: bool) -> None:
    """Measure what the running daemon can do here: single puts, batches and gets.

    It writes 1000 records of 180 bytes, over and over, to the collection holdfast-bench and removes them at the end, also
    on ctrl-C. No other record and no sales figure is touched; the journal grows by what is written until the next flush.
    It refuses when the daemon is busy, degraded or short of disk, unless --yes is given.
    """
    status = daemon.fetch("GET", "/v1/admin/status").fields()
    _check_is_ours(daemon)
    if not yes:
        _check_hurts_nobody(daemon, status, seconds)
    loads = _loads(connections)
    results: list[Result] = []
    if not as_json:
        click.echo(
            f"writing to the collection {COLLECTION} for {len(loads)} times {seconds:g} s, "
            f"durability {status.get('durability')}"
        )
    cpu_s, began = time.process_time(), time.monotonic()
    try:
        with Progress("measuring", lambda: round(len(loads) * seconds * TICKS_S)) as progress:
            for load in loads:
                results.append(_measured(daemon, load, seconds, progress))
    finally:
        share = (time.process_time() - cpu_s) / max(time.monotonic() - began, 1e-9)
        _remove(daemon)
    if as_json:
        return print_json([result.as_json() for result in results])
    _print_results(results)
    if share > 0.8:
        click.echo(f"this client used {share:.0%} of a core itself; with more clients the daemon can do more")


def _loads(connections: int) -> list[Load]:
    value = orjson.dumps(_VALUE)
    paths = [record_target(COLLECTION, f"bench-{number}") for number in range(IDS)]

    def batch(number: int) -> tuple[str, str, bytes]:
        ops = [
            {
                "op": "record.put",
                "collection": COLLECTION,
                "id": f"bench-{(number * BATCH_OPS + op) % IDS}",
                "value": _VALUE,
            }
            for op in range(BATCH_OPS)
        ]
        return "POST", "/v1/batch", orjson.dumps({"ops": ops})

    # Made once: this client's own work must not be what is measured.
    batches = [batch(number) for number in range(IDS // BATCH_OPS)]
    return [
        Load("put, 1 connection", 1, 1, lambda number: ("PUT", paths[number % IDS], value)),
        Load(f"put, {connections} connections", connections, 1, lambda number: ("PUT", paths[number % IDS], value)),
        Load(
            f"batch of {BATCH_OPS}, {connections} connections",
            connections,
            BATCH_OPS,
            lambda number: batches[number % len(batches)],
        ),
        Load(f"get, {connections} connections", connections, 1, lambda number: ("GET", paths[number % IDS], None)),
    ]


def _check_is_ours(daemon: Daemon) -> None:
    """Refuse when the collection holds something.

    Raises:
        HoldfastError: another bench runs, or one was killed.
    """
    found = daemon.fetch("GET", collection_target(COLLECTION), query={"limit": "1"}).fields()
    if found["items"]:
        raise HoldfastError(
            f"expected the collection {COLLECTION} to be empty, found records in it: another bench runs or was killed; "
            f"wait, or remove them with `holdfast collections {COLLECTION} rm --all`"
        )


def _check_hurts_nobody(daemon: Daemon, status: dict[str, Any], seconds: float) -> None:
    """Refuse when somebody would notice the load.

    Raises:
        HoldfastError: the daemon is degraded, busy, or its disk has little room.
    """
    reasons = status.get("degraded") or []
    if reasons:
        raise HoldfastError(f"the daemon is degraded ({reasons[0]}); mend that first, or say --yes")
    time.sleep(LOOK_S)
    rate = (daemon.fetch("GET", "/v1/admin/status").fields()["seq"] - status["seq"]) / LOOK_S
    if rate > BUSY_OPS_S:
        raise HoldfastError(
            f"others change {rate:.0f} records a second just now and would notice this; come back at a quiet time, or say --yes"
        )
    needed = ROOM_BYTES_MIN + int(seconds * 3 * OPS_S_AT_MOST * JOURNAL_BYTES_PER_OP)
    with contextlib.suppress(OSError):  # a daemon in a container has a directory that is not ours to see
        free = shutil.disk_usage(str(status.get("data_dir"))).free
        if free < needed:
            raise HoldfastError(
                f"expected {readable_size(needed)} of room for the journal, found {readable_size(free)}; "
                f"measure for fewer --seconds, or say --yes"
            )


def _measured(daemon: Daemon, load: Load, seconds: float, progress: Progress) -> Result:
    """The figures of *load*, from as many threads as it has connections.

    Raises:
        HoldfastError: a request failed; the first of them.
    """
    stopping = threading.Event()
    failures: list[HoldfastError] = []
    latencies: list[list[float]] = [[] for _ in range(load.connections)]

    def send(place: int) -> None:
        try:
            with daemon.connect() as connection:
                for latency_s in _latencies(connection, load, place, stopping):
                    latencies[place].append(latency_s)
        except HoldfastError as error:
            failures.append(error)
            stopping.set()

    threads = [threading.Thread(target=send, args=(place,), daemon=True) for place in range(load.connections)]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        for _ in range(round(seconds * TICKS_S)):
            if stopping.wait(1 / TICKS_S):
                break
            progress.advance(1)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    taken_s = time.monotonic() - began
    if failures:
        raise failures[0]
    every = sorted(latency for some in latencies for latency in some)
    return Result(load.name, len(every) * load.ops, taken_s, every)


def _latencies(connection: Connection, load: Load, place: int, stopping: threading.Event) -> Iterator[float]:
    number = place
    while not stopping.is_set():
        method, path, body = load.request(number)
        number += load.connections
        began = time.perf_counter()
        connection.fetch(method, path, body=body)
        yield time.perf_counter() - began


def _remove(daemon: Daemon) -> None:
    ops = [{"op": "record.delete", "collection": COLLECTION, "id": f"bench-{number}"} for number in range(IDS)]
    body = orjson.dumps({"ops": ops})
    try:
        daemon.fetch("POST", "/v1/batch", body=body, timeout_s=WORK_TIMEOUT_S)
    except (HoldfastError, KeyboardInterrupt):
        click.echo(
            f"holdfast: the records of {COLLECTION} could not be removed; do it with "
            f"`holdfast collections {COLLECTION} rm --all`",
            err=True,
        )
        raise


def _print_results(results: list[Result]) -> None:
    numbers = [Column(title, is_number=True) for title in ("ops/s", "p50 ms", "p95 ms", "p99 ms")]
    print_table(
        [Column("load"), *numbers],
        (
            [
                result.load,
                f"{result.ops / result.seconds:,.0f}",
                *(f"{result.percentile_ms(percent):.2f}" for percent in (50, 95, 99)),
            ]
            for result in results
        ),
    )
