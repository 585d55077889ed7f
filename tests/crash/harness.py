"""Daemons to kill, clients that remember what they were promised, disks to break."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.care.verify import verify
from holdfast.disk.tail import Tail, oldest_seq
from holdfast.engine import Engine
from holdfast.errors import Gone
from holdfast.ops import AnyOp, Batch, OrderComplete, SessionPut
from holdfast.recovery import open_engine
from holdfast.settings import Settings
from tests.crash.oracle import (
    CONVERSATIONS,
    ESCALATIONS,
    READ_COLLECTIONS,
    Change,
    Found,
    Ledger,
    Listed,
    Place,
    Stored,
    contradictions,
    differences,
    found_in,
    found_of,
    whole_conversation,
    whole_escalation,
)

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
"""Whether the long forms run (``make crash``)."""

SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "1"))

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "holdfast", "serve"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount file systems")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to inject faults")


def clean_environ() -> dict[str, str]:
    """The environment without anything that changes settings, with the import path of this process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOLDFAST_", "NOTIFY_", "WATCHDOG_", "LISTEN_")) and name != "DATA_DIR"
    }
    paths = [str(ROOT), str(ROOT / "daemon"), *(path for path in sys.path if path)]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


class Recorder:
    """A structlog logger that remembers.

    Attributes:
        events: name and fields of each, in order.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    warning = error = exception = debug = info

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def fields(self, name: str) -> list[dict[str, Any]]:
        """The fields of every event *name*."""
        return [fields for event, fields in self.events if event == name]


def reopened(data_dir: Path, log: Recorder | None = None, **settings: Any) -> Engine:
    """An engine on *data_dir*, as a restart makes it."""
    return open_engine(Settings(data_dir=data_dir, **settings), log=log or Recorder())


def complaints(data_dir: Path, ledgers: Iterable[Ledger], log: Recorder | None = None) -> list[str]:
    """What a restart on *data_dir* lost, doubled or invented; empty when nothing, and when no manual step was needed."""
    log = log or Recorder()
    engine = reopened(data_dir, log)
    try:
        wrong = differences(ledgers, found_in(engine))
        wrong += [f"degraded: {reason}" for reason in engine.degraded] + surprises(log) + holes_in(engine)
    finally:
        engine.close()
    return wrong + [f"verify: {finding}" for finding in verify(data_dir, engine.settings).wrong]


def holes_in(engine: Engine) -> list[str]:
    """What is missing for those who follow the events, from the oldest that is there to the last."""
    directory = engine.feed.directory
    tail, last = Tail(directory, oldest_seq(directory) - 1), engine.status()["seq"]
    try:
        while tail.read(last):
            pass
    except Gone as error:
        return [f"hole in the history: {error}"]
    finally:
        tail.close()
    return []


def surprises(log: Recorder) -> list[str]:
    """Log events that a mere crash must not cause: nobody edited, damaged or ignored anything."""
    unexpected = (
        "snapshot.edited",
        "snapshot.damaged",
        "journal.damaged",
        "snapshot.edit_kept",
        "backup.kept_before_merge",
    )
    return [f"{name} {fields}" for name, fields in log.events if name in unexpected]


def do(engine: Engine, change: Change) -> None:
    """Have *engine* make *change*; returns when it is durable."""
    if len(change.ops) == 1:
        engine.submit(change.ops[0]).wait()
    else:
        engine.submit_batch(Batch(ops=change.ops, atomic=True)).wait()


class Served:
    """A daemon in a process of its own.

    Attributes:
        log_path: its stdout and stderr.
        started_s, ready_s: how long it took until it heeded signals, and until READY; infinite before.
    """

    def __init__(self, data_dir: Path, *arguments: str, wrapper: Iterable[str] = ()) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir.parent / f"{data_dir.name}.log"
        self._log = self.log_path.open("ab")
        self._log_starts_at = self.log_path.stat().st_size
        self.started_at = time.monotonic()
        self.started_s = self.ready_s = float("inf")
        self.process = subprocess.Popen(
            [
                *wrapper,
                *SERVE,
                "--data-dir",
                str(data_dir),
                "--listen",
                "unix:",
                "--set",
                "log.format=json",
                *arguments,
            ],
            stdout=self._log,
            stderr=self._log,
            cwd=data_dir.parent,
            env=clean_environ(),
        )

    @property
    def pid(self) -> int:
        """Of the daemon itself, also behind strace."""
        return int((self.data_dir / "holdfast.lock").read_text())

    def events(self) -> list[dict[str, Any]]:
        """What it logged since it was started."""
        raw = self.log_path.read_bytes()[self._log_starts_at :]
        return [json.loads(line) for line in raw.splitlines() if line.startswith(b"{")]

    def started(self) -> float:
        """Wait until it heeds signals; seconds since it was started."""
        self.started_s = self._wait_for(b'"daemon.started"', 20.0)
        return self.started_s

    def ready(self, deadline_s: float = 20.0) -> float:
        """Wait until it says READY; seconds since it was started."""
        self.started()
        self.ready_s = self._wait_for(b'"daemon.ready"', deadline_s)
        return self.ready_s

    def _wait_for(self, event: bytes, deadline_s: float) -> float:
        ends_at = time.monotonic() + deadline_s
        while time.monotonic() < ends_at:
            if event in self.log_path.read_bytes()[self._log_starts_at :]:
                return time.monotonic() - self.started_at
            assert self.process.poll() is None, (
                f"it ended: {self.log_path.read_bytes()[self._log_starts_at :][-2000:]!r}"
            )
            time.sleep(0.005)
        raise AssertionError(f"no {event!r} within {deadline_s} s: {self.events()}")

    def connect(self) -> Client:
        return Client(self.data_dir / "holdfast.sock")

    def kill(self) -> None:
        """SIGKILL, as the kernel's OOM killer would."""
        self.process.kill()
        self.process.wait(20)
        self._log.close()

    def stop(self, deadline_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(deadline_s)

    def wait(self, deadline_s: float = 30.0) -> int:
        """The exit code."""
        code = self.process.wait(deadline_s)
        self._log.close()
        return code

    def found(self) -> Found:
        """What it shows."""
        with self.connect() as client:
            return client.found()


@contextmanager
def serving(data_dir: Path, *arguments: str, wrapper: Iterable[str] = ()) -> Iterator[Served]:
    """A daemon that is ready; whatever happens it does not outlive the block."""
    served = Served(data_dir, *arguments, wrapper=wrapper)
    try:
        served.ready()
        yield served
    finally:
        if served.process.poll() is None:
            served.kill()


class Client:
    """One connection to a daemon's unix socket."""

    def __init__(self, path: Path) -> None:
        self._connection = http.client.HTTPConnection("localhost", timeout=20)
        self._connection.sock = socket.socket(socket.AF_UNIX)
        self._connection.sock.settimeout(20)
        self._connection.sock.connect(str(path))

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body."""
        self._connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        response = self._connection.getresponse()
        return response.status, response.read()

    def make(self, change: Change) -> tuple[int, bytes]:
        """Ask for *change*; the status says whether it is acknowledged."""
        ops = change.ops
        if len(ops) > 1:
            return self.ask("POST", "/v1/batch", msgspec.json.encode(Batch(ops=ops, atomic=True)))
        match ops[0]:
            case SessionPut(id=id, value=value):
                return self.ask("PUT", f"/v1/sessions/{id}", msgspec.json.encode(value))
            case OrderComplete(id=id, revenue=revenue):
                return self.ask("POST", f"/v1/orders/{id}/complete", msgspec.json.encode({"revenue": revenue}))
        status, body = self.ask("POST", "/v1/batch", _encode_batch(ops))
        return (json.loads(body)["results"][0]["status"] if status == 200 else status), body

    def found(self) -> Found:
        records: dict[Place, Stored] = {}
        for collection in READ_COLLECTIONS:
            path = collection if collection in ("sessions", "orders", "users") else f"collections/{collection}"
            cursor = ""
            while True:
                status, body = self.ask("GET", f"/v1/{path}?limit=1000{cursor}")
                assert status == 200, body
                page = json.loads(body)
                for item in page["items"]:
                    records[collection, item["id"]] = (item["version"], item["value"])
                if page["next"] is None:
                    break
                cursor = f"&cursor={page['next']}"
        listed, waiting = self._all("conversations"), self._all("escalations")
        heads: Listed = {}
        for id in listed:
            version, value = self._one(f"conversations/{id}")
            records[CONVERSATIONS, id] = (version, whole_conversation(value))
            heads[id] = self._one(f"conversations/{id}?messages=false")
        escalations = {id: self._one(f"escalations/{id}") for id in waiting}
        for id, (version, value) in escalations.items():
            records[ESCALATIONS, id] = (version, whole_escalation(value))
        status, sales = self.ask("GET", "/v1/stats/sales")
        assert status == 200, sales
        status, body = self.ask("GET", "/v1/stats/storage")
        assert status == 200, body
        counted = json.loads(body)
        counted["conversations"] = counted["total"]
        return found_of(records, sales, contradictions(heads, listed, escalations, waiting, counted))

    def _all(self, kind: str) -> Listed:
        """Everything in a list that the archive makes."""
        found: Listed = {}
        cursor = ""
        while True:
            status, body = self.ask("GET", f"/v1/{kind}?limit=1000{cursor}")
            assert status == 200, body
            page = json.loads(body)
            found |= {item["id"]: (item["version"], item["value"]) for item in page["items"]}
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    def _one(self, path: str) -> Stored:
        self._connection.request("GET", f"/v1/{path}")
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return int((response.headers["ETag"] or "").strip('"')), json.loads(body)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encode_batch(ops: list[AnyOp]) -> bytes:
    return msgspec.json.encode(Batch(ops=ops))


class Load:
    """Clients that change things as fast as they are answered, each in a thread with a ledger of its own."""

    def __init__(self, served: Served, ledgers: list[Ledger]) -> None:
        self.refused: list[tuple[int, bytes]] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(served, ledger), daemon=True) for ledger in ledgers]
        for thread in self._threads:
            thread.start()

    def _run(self, served: Served, ledger: Ledger) -> None:
        try:
            with served.connect() as client:
                while not self._stopping.is_set():
                    status, body = client.make(ledger.propose())
                    if status < 300:
                        ledger.acknowledge()
                    else:
                        # What was refused may not have happened; nothing here asks for what is wrong in itself.
                        ledger.refuse()
                        self.refused.append((status, body))
                        if status != 507:
                            return
                        time.sleep(0.01)
        except (OSError, http.client.HTTPException):
            return  # the daemon is gone; whatever was asked last is in doubt

    def join(self) -> None:
        """Wait until all clients noticed that the daemon is gone."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"

    def stop(self) -> None:
        """Let every client finish the request it is at."""
        self._stopping.set()
        self.join()


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own at *place*. Needs root."""
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def mount(*arguments: str) -> None:
    """mount(8)."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def contents(directory: Path) -> dict[str, bytes]:
    """Every regular file below *directory* by name, the lock apart."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("holdfast.lock",)
    }


def spread(count: int, limit: int) -> list[int]:
    """Of 1 … *count*, *limit* numbers that cover the whole range."""
    if count <= limit:
        return list(range(1, count + 1))
    return sorted({1 + round(index * (count - 1) / (limit - 1)) for index in range(limit)})


def report(capsys: pytest.CaptureFixture[str] | None, text: str) -> None:
    """Print a figure so that it is seen without ``-s``."""
    if capsys is None:
        print(text)
        return
    with capsys.disabled():
        print(f"\n    {text}", flush=True)
