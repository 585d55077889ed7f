"""The daemon as a process: its life, its signals, its exit codes, its talk with systemd."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyrage
import pytest

from tests.crash.harness import clean_environ

LOAD = [sys.executable, "-m", "holdfast", "serve"]


class Daemon:
    """A running daemon, with the log lines it wrote so far."""

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        command: list[str] | None = None,
        environ: dict[str, str] | None = None,
        stdout: int | None = None,
        listen: str = "unix:",
        wrapper: list[str] | None = None,
    ) -> None:
        self.data_dir = data_dir
        options = ["--data-dir", str(data_dir), *(["--listen", listen] if listen else []), *arguments]
        self.process = subprocess.Popen(
            [*(wrapper or []), *(command or LOAD), *options],
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
            cwd=data_dir.parent,
            env=clean_environ() | (environ or {}),
        )
        self.events: list[dict[str, Any]] = []
        self.stderr = b""
        self._readers = [threading.Thread(target=self._read_stderr, daemon=True)]
        if stdout is None:
            self._readers.append(threading.Thread(target=self._read_stdout, daemon=True))
        for reader in self._readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.read()

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def event(self, name: str, deadline_s: float = 20.0, after: int = 0, **fields: object) -> dict[str, Any]:
        """The first event *name* with *fields*, waited for; of those *after* so many events."""
        ends_at = time.monotonic() + deadline_s
        while True:
            for event in self.events[after:]:
                if event["event"] == name and fields.items() <= event.items():
                    return event
            assert time.monotonic() < ends_at, f"no {name} {fields} in {self.events} {self.stderr!r}"
            time.sleep(0.005)

    def ready(self) -> Daemon:
        self.event("daemon.ready")
        return self

    def answering(self, deadline_s: float = 20.0) -> Daemon:
        """Return when it answers; for one whose log is not to be seen."""
        ends_at = time.monotonic() + deadline_s
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionError):
                if self.request("GET", "/readyz")[0] == 200:
                    return self
            assert time.monotonic() < ends_at, self.stderr
            time.sleep(0.01)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def wait(self, deadline_s: float = 30.0) -> int:
        """The exit code; afterwards all events are there."""
        code = self.process.wait(deadline_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and decoded body of a request on the unix socket."""
        connection = http.client.HTTPConnection("localhost", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(20)
        connection.sock.connect(str(self.data_dir / "holdfast.sock"))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content) if content else None

    def put(self, id: str, **value: object) -> None:
        status, answer = self.request("PUT", f"/v1/sessions/{id}", value)
        assert status in (200, 201), answer

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons, on ``tmp_path/data`` unless told otherwise; those still running are killed at the end."""
    daemons = []

    def start(*arguments: str, data_dir: Path | None = None, **options: Any) -> Daemon:
        directory = data_dir or tmp_path / "data"
        directory.parent.mkdir(parents=True, exist_ok=True)
        daemons.append(Daemon(directory, *arguments, **options))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


def test_a_life(start: Start, tmp_path: Path) -> None:
    """It starts, says so, serves, stops with exit 0, and a second start has everything."""
    daemon = start().ready()
    daemon.put("573001234567", currentState="catalog")
    code = daemon.stop()

    again = start().ready()
    status, session = again.request("GET", "/v1/sessions/573001234567")

    assert code == 0 and daemon.stderr == b""
    assert [name for name in daemon.names() if not name.startswith("service.")] == [
        "daemon.started",
        "state.loaded",
        "daemon.ready",
        "shutdown.started",
        "flush.completed",
        "shutdown.completed",
    ]
    assert daemon.event("daemon.started")["pid"] == daemon.process.pid
    assert daemon.event("daemon.ready")["listen"] == [f"unix:{tmp_path / 'data' / 'holdfast.sock'}"]
    assert daemon.event("shutdown.completed")["clean"] is True
    assert (status, session["currentState"]) == (200, "catalog")
    assert again.stop() == 0


def test_readyz_tells_the_state(start: Start) -> None:
    """Once ready, /readyz says RUNNING and has no complaints."""
    daemon = start().ready()

    status, answer = daemon.request("GET", "/readyz")

    assert (status, answer["state"], answer["reasons"]) == (200, "RUNNING", [])


def test_sigusr1_flushes(start: Start, tmp_path: Path) -> None:
    """SIGUSR1 writes what is in memory to the snapshot files."""
    daemon = start().ready()
    daemon.put("573001234567", currentState="catalog")

    daemon.send(signal.SIGUSR1)
    daemon.event("flush.completed", reason="signal")

    (session,) = json.loads((tmp_path / "data" / "chat_sessions.json").read_bytes())
    assert session["recipientPhone"] == "573001234567"


def test_sigusr2_reports(start: Start) -> None:
    """SIGUSR2 logs counts, seqs, sizes, uptime and the last flush, none of it redacted."""
    daemon = start().ready()
    daemon.put("573001234567", currentState="catalog")

    daemon.send(signal.SIGUSR2)
    report = daemon.event("status.report")

    assert (report["sessions"], report["durable_seq"], report["state"]) == (1, 1, "RUNNING")
    assert {"uptime_s", "journal_bytes", "snapshot_seq", "last_flush"} <= report.keys()
    assert "***" not in json.dumps(report)


def test_sighup_reloads(start: Start, tmp_path: Path) -> None:
    """SIGHUP applies changed settings, and names those that need a restart."""
    daemon = start(environ={"HOLDFAST_LOG__LEVEL": "info"}).ready()
    (tmp_path / "holdfast.toml").write_text('flush_every = "77s"\nmirror = true\n')

    daemon.send(signal.SIGHUP)
    event = daemon.event("config.reloaded")

    assert (event["changed"], event["needs_restart"]) == (["flush_every"], ["mirror"])


def test_invalid_settings_are_refused_whole(start: Start, tmp_path: Path) -> None:
    """One wrong line refuses the reload with its reason; the old settings stay, and a later good file works."""
    path = tmp_path / "holdfast.toml"
    path.write_text('flush_every = "50s"\n')
    daemon = start().ready()

    path.write_text('flush_every = "60s"\nshutdown_timeout = "soon"\n')
    daemon.send(signal.SIGHUP)
    rejected = daemon.event("config.rejected")
    path.write_text('flush_every = "60s"\n')
    reloaded = daemon.event("config.reloaded")

    assert "shutdown_timeout" in rejected["reason"] and "soon" in rejected["reason"]
    assert reloaded["changed"] == ["flush_every"]


def test_a_key_that_is_missing_is_told_until_it_is_there(start: Start, tmp_path: Path) -> None:
    """It serves, since the key may stand on a disk that is mounted later; /readyz and one line of the log say it."""
    key = tmp_path / "key.txt"
    daemon = start("--set", f"backups.identity_file={key}").ready()

    warned = daemon.event("backup.key_missing")
    reasons = [daemon.request("GET", "/readyz")[1]["reasons"]]
    key.write_text(str(pyrage.x25519.Identity.generate()))
    key.chmod(0o600)
    daemon.send(signal.SIGHUP)
    daemon.event("config.reloaded")
    reasons.append(daemon.request("GET", "/readyz")[1]["reasons"])

    assert warned["level"] == "warning" and str(key) in warned["reason"]
    assert reasons == [[warned["reason"]], []]
    assert daemon.names().count("backup.key_missing") == 1


@pytest.mark.parametrize("recipients", ["age1abc", "/nowhere/recipients.txt"])
def test_recipients_that_are_none_are_a_settings_error(start: Start, tmp_path: Path, recipients: str) -> None:
    """At the start with exit code 2, at a reload with the old settings kept; not first when a backup is to be made."""
    refused = start("--set", f"backups.recipients={recipients}", data_dir=tmp_path / "refused" / "data")
    daemon = start().ready()
    (tmp_path / "holdfast.toml").write_text(f'[backups]\nrecipients = ["{recipients}"]\n')

    daemon.send(signal.SIGHUP)
    rejected = daemon.event("config.rejected")

    assert refused.wait() == 2 and recipients.encode() in refused.stderr and refused.stderr.count(b"\n") == 1
    assert recipients in rejected["reason"]


def test_a_changed_settings_file_is_noticed(start: Start, tmp_path: Path) -> None:
    """Without any signal a changed file is read within a second, however it was changed; nothing else is told."""
    path = tmp_path / "holdfast.toml"
    path.write_text("")
    daemon = start().ready()

    for number in range(100):
        path.write_text(f'flush_every = "{60 + number}s"\n' if number % 2 == 0 else "flush_every = ")
        time.sleep(0.005)
    path.write_text('flush_every = "90s"\n')
    changed_at = time.monotonic()
    daemon.event("config.reloaded")

    took_s = time.monotonic() - changed_at
    print(f"101 changes, reloaded {took_s:.2f} s after the last")
    assert took_s < 1
    time.sleep(1)
    assert [name for name in daemon.names() if name.startswith("config.")] == ["config.reloaded"]


def test_a_settings_file_may_break_vanish_and_be_moved(start: Start, tmp_path: Path) -> None:
    """Each change is one event within a second; what cannot be read leaves the settings as they were."""
    for version, flush_every in (("one", "60s"), ("two", "70s"), ("three", "80s")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "holdfast.toml").write_text(f'flush_every = "{flush_every}"\n')
    current, link = tmp_path / "current", tmp_path / "one" / "link.toml"
    current.symlink_to("one")
    link.symlink_to("holdfast.toml")
    daemon = start("--config", str(current / "link.toml")).ready()

    def swap(path: Path, target: str) -> None:
        (tmp_path / "next").symlink_to(target)
        os.replace(tmp_path / "next", path)

    (tmp_path / "two" / "link.toml").write_text('flush_every = "90s"\n')
    steps: list[tuple[str, Callable[[], object], str, object]] = [
        ("half written", lambda: (tmp_path / "one" / "holdfast.toml").write_text("flush_every = "), "rejected", None),
        ("vanished", lambda: (tmp_path / "one" / "holdfast.toml").unlink(), "rejected", None),
        ("as it was", lambda: (tmp_path / "one" / "holdfast.toml").write_text('flush_every = "60s"\n'), "", None),
        ("link swapped", lambda: swap(link, str(tmp_path / "three" / "holdfast.toml")), "reloaded", ["flush_every"]),
        ("directory swapped", lambda: swap(current, "two"), "reloaded", ["flush_every"]),
    ]
    for what, change, told, changed in steps:
        known = len(daemon.names())
        changed_at = time.monotonic()
        change()
        if told:
            event = daemon.event(f"config.{told}", after=known)
            took_s = time.monotonic() - changed_at
            print(f"{what}: {told} after {took_s:.2f} s")
            assert took_s < 1, what
            assert event.get("changed") == changed, what
        time.sleep(1)

        names = [name for name in daemon.names()[known:] if name.startswith("config.")]
        assert names == ([f"config.{told}"] if told else []), what
    assert daemon.request("GET", "/readyz")[0] == 200


def test_it_flushes_regularly(start: Start) -> None:
    """Every flush_every there is a flush."""
    daemon = start("--set", "flush_every=1s").ready()

    daemon.put("573001234567", currentState="catalog")

    assert daemon.event("flush.completed", reason="interval")["files"] > 0


def test_it_flushes_when_the_journal_is_large(start: Start) -> None:
    """A journal grown past journal_max is flushed, without waiting for the interval."""
    daemon = start("--set", "journal_max=64KiB").ready()

    for number in range(80):
        daemon.put(str(number), text="x" * 1000)

    daemon.event("flush.completed", reason="size")


# Ends.


def test_wrong_settings_end_with_2(start: Start, tmp_path: Path) -> None:
    """A wrong setting is told on stderr in one line, exit 2; nothing is touched."""
    daemon = start("--set", "flush_every=soon")

    assert daemon.wait() == 2
    assert daemon.stderr.count(b"\n") == 1 and b"flush_every" in daemon.stderr
    assert not (tmp_path / "data").exists()


def test_a_second_instance_ends_with_3(start: Start, tmp_path: Path) -> None:
    """A second daemon on the same directory names the first one's PID, touches nothing, and is gone within a second of its start."""
    first = start().ready()
    before = snapshot_of(tmp_path / "data")

    second = start()
    second.event("daemon.started")
    started_at = time.monotonic()
    code = second.wait()

    took_s = time.monotonic() - started_at
    print(f"second instance: exit {code} after {took_s:.2f} s")
    assert (code, took_s < 1) == (3, True)
    assert second.events[-1]["event"] == "daemon.failed" and str(first.process.pid) in second.events[-1]["reason"]
    assert snapshot_of(tmp_path / "data") == before


def test_data_of_a_newer_format_ends_with_4(start: Start, tmp_path: Path) -> None:
    """Data that cannot be opened safely is left as it is; the log says what to do."""
    daemon = start().ready()
    daemon.stop()
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: 99 if key.startswith("format") else value for key, value in manifest.items()}))
    before = snapshot_of(tmp_path / "data")

    again = start()

    assert again.wait() == 4
    assert again.events[-1]["event"] == "daemon.failed" and again.events[-1]["exit_code"] == 4
    assert snapshot_of(tmp_path / "data") == before


def test_an_address_in_use_ends_with_1(start: Start) -> None:
    """An address that somebody else has ends the start with exit 1, and the reason in the last line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = start(listen=f"tcp:127.0.0.1:{port}")

        assert daemon.wait() == 1
    assert daemon.events[-1]["event"] == "daemon.failed" and str(port) in daemon.events[-1]["reason"]


def snapshot_of(directory: Path) -> dict[str, bytes]:
    """Every regular file below *directory*, by name, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        # The lock file holds the PID of whoever has it.
        if path.is_file() and not path.is_symlink() and path.name != "holdfast.lock"
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ten_signals_are_one_stop(start: Start, number: int) -> None:
    """However often the stop is asked for, there is one shutdown, one final flush, exit 0."""
    daemon = start().ready()
    daemon.put("573001234567", currentState="catalog")

    for _ in range(10):
        with contextlib.suppress(ProcessLookupError):
            daemon.send(number)
        time.sleep(0.003)

    assert daemon.wait() == 0
    for name in ("shutdown.started", "flush.completed", "shutdown.completed"):
        assert daemon.names().count(name) == 1


def test_a_storm_of_signals(start: Start) -> None:
    """A thousand mixed signals: a few flushes, reports and reloads, nothing lost, still serving; then one clean stop."""
    daemon = start().ready()
    daemon.put("573001234567", currentState="catalog")
    chosen = random.Random(17)

    for _ in range(1000):
        daemon.send(chosen.choice([signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]))
    daemon.event("flush.completed")
    status, _ = daemon.request("GET", "/readyz")
    for _ in range(1000):
        daemon.send(chosen.choice([signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGINT]))
        if daemon.process.poll() is not None:
            break

    assert (status, daemon.wait()) == (200, 0)
    counts = {name: daemon.names().count(name) for name in ("flush.completed", "status.report", "config.reloaded")}
    print(f"2,000 signals: {counts}")
    assert daemon.names().count("shutdown.started") == 1
    assert daemon.names().count("shutdown.completed") == 1


def test_a_request_in_flight_is_finished(start: Start, tmp_path: Path) -> None:
    """A request whose body is still on its way when the stop begins is answered."""
    daemon = start().ready()
    body = json.dumps({"currentState": "catalog"}).encode()
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(tmp_path / "data" / "holdfast.sock"))
    head = f"PUT /v1/sessions/1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body[:5])
    time.sleep(0.3)

    daemon.send(signal.SIGTERM)
    daemon.event("shutdown.started")
    time.sleep(0.3)
    sock.sendall(body[5:])
    answer = sock.recv(65536)

    assert answer.startswith(b"HTTP/1.1 201") and b"connection: close" in answer.lower()
    assert daemon.wait() == 0
    assert start().ready().request("GET", "/v1/sessions/1")[0] == 200


# What hangs.

SCRIPT = """
import os, sys, threading, time
from pathlib import Path
from holdfast.service import daemon
from holdfast.settings import load
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
overrides = {"data_dir": arguments["--data-dir"], "listen": arguments["--listen"], **OVERRIDES}
def load_settings():
    return load(overrides, os.environ, None, Path.cwd())
"""


def script(code: str, **overrides: str) -> list[str]:
    """A command that runs *code* in place of ``holdfast serve``."""
    return [sys.executable, "-c", SCRIPT.replace("OVERRIDES", repr(overrides)) + code]


def test_a_thread_that_never_ends_does_not_keep_the_process(start: Start) -> None:
    """A job in a thread that the interpreter would wait for does not delay the exit."""
    job = "threading.Thread(target=time.sleep, args=(300,)).start()\nsys.exit(daemon.run(load_settings))"
    daemon = start(command=script(job)).ready()

    started_at = time.monotonic()
    code = daemon.stop()

    assert (code, daemon.events[-1]["event"]) == (0, "shutdown.completed")
    assert time.monotonic() - started_at < 5


BLOCKED = """
make_loop = daemon._new_event_loop
def make_and_block():
    loop = make_loop()
    def block():
        while not os.path.exists("block"):
            time.sleep(0.01)
        loop.call_soon_threadsafe(time.sleep, BLOCKED_S)
    threading.Thread(target=block, daemon=True).start()
    return loop
daemon._new_event_loop = make_and_block
sys.exit(daemon.run(load_settings))
"""


def test_a_blocked_event_loop_is_stopped_in_time(start: Start, tmp_path: Path) -> None:
    """When the event loop is blocked, the stop waits for it no longer than it lasts, and loses nothing."""
    daemon = start(command=script(BLOCKED.replace("BLOCKED_S", "3"), shutdown_timeout="10s")).ready()
    daemon.put("573001234567", currentState="catalog")

    (tmp_path / "block").touch()
    time.sleep(0.2)
    daemon.send(signal.SIGTERM)

    assert daemon.wait(20) == 0
    (tmp_path / "block").unlink()
    assert start().ready().request("GET", "/v1/sessions/573001234567")[0] == 200


def test_a_loop_blocked_for_ever_does_not_keep_the_process(start: Start, tmp_path: Path) -> None:
    """When the event loop never comes back, the final flush is done all the same, then the process ends itself, exit 1."""
    command = script(BLOCKED.replace("BLOCKED_S", "300"), shutdown_timeout="2s")
    daemon = start(command=command).ready()
    daemon.put("573001234567", currentState="catalog")

    (tmp_path / "block").touch()
    time.sleep(0.2)
    started_at = time.monotonic()
    code = daemon.stop()

    took_s = time.monotonic() - started_at
    print(f"blocked for ever, shutdown_timeout 2 s: exit {code} after {took_s:.2f} s")
    assert code == 1 and took_s < 4
    assert "flush.completed" in daemon.names() and daemon.names()[-1] == "daemon.failed"


class NotifySocket:
    """The manager's end of the notify protocol: collects what is said, with the moment."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self.said: list[tuple[float, list[str]]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                content, descriptors, _, _ = socket.recv_fds(self._sock, 4096, 8)
            except OSError:
                return
            for descriptor in descriptors:
                os.close(descriptor)
            self.said.append((time.monotonic(), content.decode().splitlines()))

    def states(self) -> list[str]:
        """What was said, but for the text of the status and times."""
        told = [line.partition("=")[0] for _, lines in list(self.said) for line in lines]
        return [state for state in told if state not in ("STATUS", "MONOTONIC_USEC", "EXTEND_TIMEOUT_USEC")]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[NotifySocket]:
    manager = NotifySocket(tmp_path)
    yield manager
    manager.close()


def test_systemd_is_told(start: Start, tmp_path: Path, manager: NotifySocket) -> None:
    """READY comes once it listens, RELOADING and READY around a reload, STOPPING first of all, a BARRIER last."""
    daemon = start(environ={"NOTIFY_SOCKET": str(manager.path)}).ready()
    assert daemon.request("GET", "/readyz")[0] == 200

    daemon.send(signal.SIGHUP)
    daemon.event("config.reloaded")
    code = daemon.stop()

    assert code == 0
    assert manager.states() == ["READY", "RELOADING", "READY", "STOPPING", "BARRIER"]


def test_a_blocked_event_loop_gives_no_sign_of_life(start: Start, tmp_path: Path, manager: NotifySocket) -> None:
    """The watchdog hears nothing while the loop is blocked; its SIGABRT leaves the Python stack; nothing is lost."""
    environ = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "1000000"}
    daemon = start(command=script(BLOCKED.replace("BLOCKED_S", "10")), environ=environ).ready()
    daemon.put("573001234567", currentState="catalog")
    time.sleep(1.2)
    signs_before = manager.states().count("WATCHDOG")

    (tmp_path / "block").touch()
    time.sleep(0.6)
    signs_blocked = manager.states().count("WATCHDOG")
    time.sleep(1.2)
    signs_after = manager.states().count("WATCHDOG")
    daemon.send(signal.SIGABRT)
    code = daemon.wait()

    assert signs_before >= 2 and signs_after == signs_blocked
    assert code == -signal.SIGABRT
    assert b"Fatal Python error: Aborted" in daemon.stderr and b"in run\n" in daemon.stderr
    (tmp_path / "block").unlink()
    assert start().ready().request("GET", "/v1/sessions/573001234567")[0] == 200


def test_sockets_of_systemd_are_used(start: Start, tmp_path: Path) -> None:
    """With socket activation it serves on the inherited socket; who connected before it was there is answered."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "activated.sock"))
    listening.listen(16)
    early = socket.socket(socket.AF_UNIX)
    early.settimeout(20)
    early.connect(str(tmp_path / "activated.sock"))
    early.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    wrapper = ["bash", "-c", f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listening.fileno()}', "activate"]
    os.set_inheritable(listening.fileno(), True)
    data_dir = tmp_path / "data"
    process = subprocess.Popen(
        [*wrapper, *LOAD, "--data-dir", str(data_dir)],
        pass_fds=[listening.fileno()],
        env=clean_environ(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )

    try:
        answer = early.recv(65536)
    finally:
        process.terminate()
        code = process.wait(30)

    assert answer.startswith(b"HTTP/1.1 200") and code == 0
    assert (tmp_path / "activated.sock").exists()
    listening.close()


# A reader of the log that does not read.


def test_a_stalled_reader_of_stdout_stalls_nothing(start: Start) -> None:
    """With nobody reading stdout it serves on, and stops with exit 0."""
    read_end, write_end = os.pipe()
    daemon = start("--set", "log.level=debug", stdout=write_end)
    os.close(write_end)
    daemon.answering()

    slowest_s = 0.0
    for number in range(300):
        daemon.send(signal.SIGUSR2)
        before = time.monotonic()
        daemon.put(str(number), currentState="catalog")
        slowest_s = max(slowest_s, time.monotonic() - before)
    code = daemon.stop()

    print(f"slowest put {slowest_s * 1000:.0f} ms while stdout was stalled")
    assert (code, slowest_s < 2) == (0, True)
    os.close(read_end)


def test_a_closed_stdout_harms_no_file(start: Start, tmp_path: Path) -> None:
    """Started with stdin, stdout and stderr closed, no log line ends up in a file of the data directory."""
    daemon = start(wrapper=["bash", "-c", 'exec "$@" <&- >&- 2>&-', "closed"])
    daemon.answering()
    daemon.put("573001234567", currentState="catalog")
    code = daemon.stop()

    assert code == 0
    assert not [name for name, content in snapshot_of(tmp_path / "data").items() if b"daemon.started" in content]
    assert start().ready().request("GET", "/v1/sessions/573001234567")[0] == 200


@pytest.mark.crash
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_failed_sync_ends_the_process(start: Start, tmp_path: Path) -> None:
    """When the disk refuses to sync, the process ends with exit 1, the reason in its last line, and nothing is flushed."""
    inject = ["strace", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=3+"]
    daemon = start(wrapper=inject).ready()
    acknowledged = 0

    with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
        for number in range(10):
            daemon.put(str(number), currentState="catalog")
            acknowledged += 1

    assert daemon.wait() == 1
    last = daemon.events[-1]
    assert (last["event"], last["exit_code"]) == ("daemon.failed", 1) and "sync" in last["reason"]
    assert "flush.completed" not in daemon.names()[daemon.names().index("daemon.ready") :]
    again = start().ready()
    for number in range(acknowledged):
        assert again.request("GET", f"/v1/sessions/{number}")[0] == 200
