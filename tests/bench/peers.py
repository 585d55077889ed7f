"""The programs that Holdfast is measured beside, started here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import orjson

from tests.bench.measure import STARTED_S, environ, rss_bytes

REDIS_SETTINGS = "appendonly yes, appendfsync always, save off, unix socket"


class MissingPeerError(Exception):
    """A peer is not installed; the message says which, and how to get it."""


def need_program(name: str, package: str) -> str:
    """The path of the program *name*.

    Raises:
        MissingPeerError: it is not on this machine.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingPeerError(f"{name} is missing; install the system's package {package}")
    return path


def need_module(name: str) -> None:
    """See that *name* can be imported.

    Raises:
        MissingPeerError: it cannot.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingPeerError(f"the Python package {name} is missing; it is in the bench extra")


class Redis(NamedTuple):
    """A running redis-server of our own.

    Attributes:
        socket: where it listens.
        loaded_s: how long it says that loading its file took; None when it loaded none.
    """

    socket: str
    process: subprocess.Popen[bytes]
    loaded_s: float | None

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        return rss_bytes(self.process.pid)


@contextmanager
def redis_server(directory: Path, *, durable: bool) -> Iterator[Redis]:
    """A redis-server on *directory*, with an append-only file synced at each write when *durable*, else on its RDB alone.

    Raises:
        MissingPeerError: redis-server or its client is not installed.
    """
    program = need_program("redis-server", "redis-server")
    need_module("redis")
    directory.mkdir(exist_ok=True)
    place = directory / "redis.sock"
    log = directory / "redis.log"
    log.unlink(missing_ok=True)
    options = ["--port", "0", "--unixsocket", str(place), "--dir", str(directory), "--save", "", "--logfile", str(log)]
    options += ["--appendonly", "yes", "--appendfsync", "always"] if durable else ["--appendonly", "no"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(place, process)
        match = re.search(r"DB loaded from disk: ([0-9.]+) seconds", log.read_text())
        yield Redis(str(place), process, float(match[1]) if match else None)
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(place: Path, process: subprocess.Popen[bytes]) -> None:
    ends_at = time.monotonic() + STARTED_S
    while time.monotonic() < ends_at and process.poll() is None:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(place))
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
        except OSError:
            pass
        time.sleep(0.01)
    raise RuntimeError(f"redis-server did not answer within {STARTED_S} s (exit code {process.poll()})")


@contextmanager
def bare_handler(form: str) -> Iterator[str]:
    """``HOST:PORT`` of an aiohttp handler that answers at once: *form* is ``application`` or ``server``."""
    command = [sys.executable, "-m", "tests.bench.bare", form]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ())
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {"python": sys.version.split()[0]}
    for name in ("aiohttp", "uvloop", "orjson", "msgspec", "redis", "hiredis", "diskcache"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    for program, option in (("redis-server", "--version"), ("wrk", "--version")):
        path = shutil.which(program)
        if path is None:
            found[program] = "missing"
            continue
        text = subprocess.run([path, option], capture_output=True, text=True).stdout
        match = re.search(r"\d+\.\d+(\.\d+)?", text)
        found[program] = match[0] if match else "unknown"
    return found


def put_load(address: str, token: str | None, connections: int, seconds: int) -> float:
    """PUTs of sessions answered a second, sent by wrk over *connections* to ``HOST:PORT``.

    Raises:
        MissingPeerError: wrk is not installed; the caller falls back to a client in Python.
        RuntimeError: an answer was no success.
    """
    wrk = need_program("wrk", "wrk")
    script = Path(__file__).with_name("put.lua")
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), f"http://{address}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ() | {"BENCH_TOKEN": token or ""})
    try:
        result = orjson.loads(done.stdout.splitlines()[-1])
    except (IndexError, orjson.JSONDecodeError):
        raise RuntimeError(f"wrk failed: {done.stdout} {done.stderr}") from None
    if result["failed"] or not result["answered"]:
        raise RuntimeError(f"{result['failed']} of {result['answered']} answers were no success")
    return float(result["answered"] / result["seconds"])
