"""What only a real systemd can do to the daemon, or for it: faults 18, 19 and 21 of the list that the tests go through."""

from __future__ import annotations

import json
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.harness import FULL, Load, report
from tests.crash.oracle import Ledger, differences
from tests.systemd.hook import BURST_LINES
from tests.systemd.lab import Lab, Service, wait_for

pytestmark = pytest.mark.crash

WATCHDOG_S = 30 if FULL else 3
CLIENTS = 8
SHORT_CONNECTIONS = 10_000 if FULL else 5_000
RESTARTS = 9 if FULL else 5
"""One start and as many restarts as StartLimitBurst=10 of the unit allows."""

JOURNALD_STOPPED_S = 30.0 if FULL else 2.0

BURST_S = 3.0
"""Enough for all lines of a burst to be logged."""

P99_FLOOR_S = 0.050
"""Below this a difference of the p99 is the noise of a busy machine: every acknowledgement waits for a disk that others
use, too. Whoever waits for journald waits for seconds."""


def test_a_blocked_event_loop_is_killed_by_the_watchdog(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """systemd kills it within WatchdogSec + 2 s, the Python stack is in the journal, and the restart has everything acknowledged."""
    service.configure("Environment=LAB_FAULT=block", f"WatchdogSec={WATCHDOG_S}")
    service.start()
    ledgers = [Ledger(client, "watchdog") for client in range(4)]
    load = Load(service, ledgers)
    time.sleep(1)
    pid = service.show("MainPID")

    blocked_at = time.monotonic()
    service.kill("SIGRTMIN")
    wait_for(lambda: service.show("MainPID") != pid, WATCHDOG_S + 20, "the watchdog")
    killed_s = time.monotonic() - blocked_at
    load.join()
    service.event("daemon.ready", 2)

    stack = "\n".join(str(line["MESSAGE"]) for line in service.journal())
    with service.connect() as client:
        wrong = differences(ledgers, client.found())
    acknowledged = sum(ledger.acknowledged for ledger in ledgers)
    report(
        capsys,
        f"blocked, gone {killed_s:.1f} s later with WatchdogSec={WATCHDOG_S}; {acknowledged} acknowledged, 0 lost",
    )
    assert killed_s < WATCHDOG_S + 2
    assert service.show("NRestarts") == "1"
    assert "Fatal Python error: Aborted" in stack and "in _block" in stack and "service/daemon.py" in stack
    assert acknowledged > 100 and wrong == []


def test_what_hangs_does_not_keep_the_service(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A service that never stops, others that fail to, and a job that never ends: the stop takes the declared deadlines, and all is flushed."""
    service.configure("Environment=LAB_FAULT=hang")
    service.start()
    ledgers = [Ledger(client, "hang") for client in range(2)]
    load = Load(service, ledgers)
    time.sleep(0.5)
    load.stop()

    started_at = time.monotonic()
    service.stop()
    took_s = time.monotonic() - started_at

    timed_out = service.event("service.stop_timed_out")
    failed = service.events("service.stop_failed")
    report(capsys, f"a service that hangs and a job that never ends: stopped after {took_s:.1f} s")
    assert timed_out["service"] == "settings watch" and failed
    # Its own deadline of 2 s, then the flush; far from shutdown_timeout and from being killed.
    assert 1.5 < took_s < 6
    assert service.events()[-1]["event"] == "daemon.failed" and service.show("ExecMainStatus") == "1"
    assert service.events("flush.completed")[-1]["reason"] == "shutdown"
    service.configure()
    service.start()
    with service.connect() as client:
        assert differences(ledgers, client.found()) == []


class ShortConnections:
    """Clients that connect for one request each, and note how it went.

    Attributes:
        outcomes: how often what happened; statuses of answers, or what the connection came to instead.
        slowest_s: from connecting to the answer.
        acknowledged: the ids of sessions that were acknowledged.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.acknowledged: list[str] = []
        self._path = str(path)
        self._numbers = iter(range(count))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            before = time.monotonic()
            outcome = self._put(f"c{number}")
            with self._lock:
                self.outcomes[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - before)
                if outcome == "201":
                    self.acknowledged.append(f"c{number}")

    def _put(self, id: str) -> str:
        request = f"PUT /v1/sessions/{id} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        request += "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            try:
                sock.connect(self._path)
            except OSError as error:
                return f"refused: {type(error).__name__}"
            try:
                sock.sendall(request.encode())
                answer = sock.recv(65536)
            except OSError as error:
                return f"cut: {type(error).__name__}"
        return answer[9:12].decode() if answer else "cut: without an answer"

    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def done(self) -> int:
        return self.outcomes.total()


def test_restarts_under_load_refuse_no_connection(
    main_service: Service, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """With holdfast.socket, of 10,000 connections made while the service restarts each is answered, and nothing acknowledged is lost."""
    lab.systemctl("start", "holdfast.socket", main_service.unit)
    clients = ShortConnections(main_service.socket_path, SHORT_CONNECTIONS)
    restarts = 0

    # Spread over the connections, however fast this machine makes them.
    while not clients.is_over():
        if restarts < RESTARTS and clients.done() >= (restarts + 0.5) * SHORT_CONNECTIONS / RESTARTS:
            lab.systemctl("restart", main_service.unit)
            restarts += 1
        time.sleep(0.005)

    with main_service.connect() as client:
        stored = {id for _, id in client.found().records}
    report(
        capsys,
        f"{clients.done()} connections during {restarts} restarts: {dict(clients.outcomes)}; slowest {clients.slowest_s:.2f} s",
    )
    assert restarts == RESTARTS
    assert clients.done() == SHORT_CONNECTIONS
    assert set(clients.outcomes) == {"201"}
    assert not set(clients.acknowledged) - stored


@contextmanager
def journald_stopped(lab: Lab) -> Iterator[None]:
    """journald reads nothing within the block, and surely does again afterwards."""
    pid = int(lab.show("systemd-journald.service", "MainPID"))
    lab.exec("kill", "-STOP", str(pid))
    try:
        yield
    finally:
        lab.exec("kill", "-CONT", str(pid))


def acknowledgements_s(service: Service, for_s: float) -> list[float]:
    """How long each durable put took, one after the other on one connection."""
    taken = []
    with service.connect() as client:
        ends_at = time.monotonic() + for_s
        while time.monotonic() < ends_at:
            before = time.monotonic()
            status, body = client.ask("PUT", "/v1/sessions/573001234567", b'{"currentState": "catalog"}')
            taken.append(time.monotonic() - before)
            assert status in (200, 201), body
    return taken


def p99_s(taken: list[float]) -> float:
    return statistics.quantiles(taken, n=100)[98]


def test_a_stopped_journald_slows_no_acknowledgement(
    service: Service, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """With journald stopped and every buffer full, acknowledgements take what they took before; the lines dropped meanwhile are counted."""
    service.configure("Environment=LAB_FAULT=burst HOLDFAST_LOG__REDACT=false")
    service.start()
    before_s = p99_s(acknowledgements_s(service, JOURNALD_STOPPED_S))
    pid = service.show("MainPID")

    with journald_stopped(lab):
        # Not by systemctl: the manager logs what it does, and may wait for journald.
        lab.exec("kill", f"-{signal.SIGRTMIN:d}", pid)
        time.sleep(BURST_S)
        meanwhile_s = p99_s(acknowledgements_s(service, JOURNALD_STOPPED_S))
    after_s = p99_s(acknowledgements_s(service, JOURNALD_STOPPED_S))
    (told,) = wait_for(lambda: lines(service, "log.lines_dropped"), 60, "the count of the dropped lines")
    dropped = json.loads(told)["count"]
    written = wait_for(lambda: lines(service, "lab.line_written"), 60, "what was not dropped")
    report(
        capsys,
        f"acknowledgement p99 {before_s * 1000:.2f} ms, with journald stopped for {BURST_S + JOURNALD_STOPPED_S:.0f} s"
        f" {meanwhile_s * 1000:.2f} ms, afterwards {after_s * 1000:.2f} ms; {dropped} lines dropped and counted",
    )
    assert dropped > 0 and len(written) + dropped == BURST_LINES
    assert meanwhile_s < max(before_s * 1.1, after_s * 1.1, P99_FLOOR_S)


def lines(service: Service, event: str) -> list[str]:
    """What is in the journal of *event*, so far."""
    only = ["--output=cat", f"--unit={service.unit}", f"--grep={event}"]
    return service.lab.exec("journalctl", "--no-pager", *only, check=False).stdout.splitlines()


def test_a_closed_stdout_slows_no_acknowledgement(
    service: Service, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """When journald ends and with it the other end of stdout, the daemon serves on, and logs nothing into its files."""
    service.start()
    before_s = p99_s(acknowledgements_s(service, 1.0))
    pid = service.show("MainPID")

    shut = (
        "import os, socket, sys\n"
        "fd = os.pidfd_open(int(sys.argv[1]))\n"
        "import ctypes\n"
        "own = ctypes.CDLL(None, use_errno=True).syscall(438, fd, 1, 0)\n"  # pidfd_getfd: its stdout
        "assert own >= 0, os.strerror(ctypes.get_errno())\n"
        "socket.socket(fileno=own).shutdown(socket.SHUT_RDWR)\n"
    )
    lab.exec("python3", "-c", shut, pid)
    for _ in range(20):
        service.kill("USR2")
    meanwhile_s = p99_s(acknowledgements_s(service, 1.0))
    service.kill("USR1")
    wait_for(lambda: (service.data_dir / "chat_sessions.json").exists(), 20, "the flush")

    report(capsys, f"acknowledgement p99 {before_s * 1000:.2f} ms, with stdout closed {meanwhile_s * 1000:.2f} ms")
    assert meanwhile_s < max(before_s * 1.1, P99_FLOOR_S)
    assert (service.show("MainPID"), service.show("NRestarts")) == (pid, "0")
    service.stop()
    assert service.show("ExecMainStatus") == "0"
    logged_into = [
        path for path in service.data_dir.rglob("*") if path.is_file() and b"status.report" in path.read_bytes()
    ]
    assert logged_into == []
