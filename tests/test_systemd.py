"""What is said to systemd, what comes from it, and the units."""

from __future__ import annotations

import array
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import SettingsError
from holdfast.service.systemd import Notifier, inherited_sockets

UNITS = Path(__file__).resolve().parent.parent / "systemd"


class Manager:
    """The end of the notify socket that systemd holds."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.settimeout(5)

    def read(self) -> list[str]:
        return self.sock.recv(4096).decode().splitlines()


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both kinds of address that systemd may give."""
    if request.param == "path":
        return str(tmp_path / "notify")
    if sys.platform != "linux":
        pytest.skip("abstract sockets exist on Linux only")
    return f"@holdfast-test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    manager = Manager(address)
    yield manager
    manager.sock.close()


def test_every_state_is_told(manager: Manager, address: str) -> None:
    """Each state arrives in the words of sd_notify(3), one datagram each."""
    environ = {"NOTIFY_SOCKET": address}
    notifier = Notifier(environ)
    told = []

    for say in (
        lambda: notifier.ready("serving\nMAINPID=1"),
        lambda: notifier.stopping("bye"),
        lambda: notifier.status("n = 1"),
        notifier.watchdog,
        lambda: notifier.extend_timeout(1.5),
    ):
        say()
        told.append(manager.read())

    assert told == [
        ["READY=1", "STATUS=serving MAINPID=1"],
        ["STOPPING=1", "STATUS=bye"],
        ["STATUS=n = 1"],
        ["WATCHDOG=1"],
        ["EXTEND_TIMEOUT_USEC=1500000"],
    ]
    assert environ == {}


def test_a_reload_carries_its_moment(manager: Manager, address: str) -> None:
    """RELOADING=1 comes with the monotonic time, as systemd requires."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    Notifier({"NOTIFY_SOCKET": address}).reloading()
    state, moment = manager.read()

    assert state == "RELOADING=1"
    assert before <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_barrier_waits_for_the_manager(manager: Manager, address: str) -> None:
    """barrier returns once the manager has closed the descriptor that came with it, or when its time is over."""
    notifier = Notifier({"NOTIFY_SOCKET": address})
    unread = notifier.barrier(0.05)
    told = []

    def read() -> None:
        for _ in range(2):
            content, control, _, _ = manager.sock.recvmsg(4096, socket.CMSG_SPACE(4))
            told.append(content)
            os.close(array.array("i", control[0][2])[0])

    reader = threading.Thread(target=read)
    reader.start()
    is_read = notifier.barrier(5)
    reader.join(5)

    assert (unread, is_read, told) == (False, True, [b"BARRIER=1"] * 2)


def test_without_systemd_nothing_happens() -> None:
    """Outside systemd every call returns at once."""
    notifier = Notifier({})

    notifier.ready("")
    notifier.watchdog()

    assert notifier.barrier(0) and not notifier.is_connected and notifier.watchdog_s is None


def test_a_manager_that_is_gone_or_does_not_read_is_no_failure(tmp_path: Path) -> None:
    """Neither a missing socket nor a full one raises or blocks."""
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready("")
    manager = Manager(str(tmp_path / "full"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "full")})
    started_at = time.monotonic()

    for _ in range(1000):
        notifier.watchdog()

    assert time.monotonic() - started_at < 5
    manager.sock.close()


@pytest.mark.parametrize(
    ("interval", "pid", "expected"),
    [
        ("30000000", "", 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "1", None),
        ("0", "", None),
        ("x", "", None),
    ],
)
def test_the_watchdog_is_ours_only(interval: str, pid: str, expected: float | None) -> None:
    """The watchdog counts when it has a time and names this process, or none."""
    assert (
        expected
        == Notifier({"WATCHDOG_USEC": interval, "WATCHDOG_PID": pid.replace("ours", str(os.getpid()))}).watchdog_s
    )


ACTIVATED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from holdfast.errors import SettingsError
from holdfast.service.systemd import inherited_sockets
try:
    for sock in inherited_sockets():
        print(sock.family.name, sock.getblocking(), os.get_inheritable(sock.fileno()), "LISTEN_FDS" in os.environ)
except SettingsError as error:
    print(error)
"""


def activated(*sockets: socket.socket, names: str = "") -> str:
    """What a process prints to which systemd hands *sockets* from descriptor 3 upwards."""
    numbers = [os.dup(sock.fileno()) for sock in sockets]
    # The shell puts them where systemd would.
    moves = " ".join(f"{3 + index}<&{number}" for index, number in enumerate(numbers))
    environ = os.environ | {"LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names}
    command = ["bash", "-c", f'exec "$0" -c "$1" {moves}', sys.executable, ACTIVATED]
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environ, pass_fds=numbers, capture_output=True, text=True, timeout=30)
    for number in numbers:
        os.close(number)
    assert done.stderr == ""
    return done.stdout


def test_sockets_are_inherited(tmp_path: Path) -> None:
    """Sockets that systemd opened arrive in order, do not block, and go to no child."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    with unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        printed = activated(unix, tcp)

    assert printed == "AF_UNIX False False False\nAF_INET False False False\n"


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    """Anything but a listening stream socket is refused by its name in the socket unit."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        printed = activated(datagrams, names="web")

    assert "descriptor 3 (web)" in printed and "ListenStream=" in printed


def test_sockets_for_another_process_are_not_ours() -> None:
    """Variables left over from a parent are not taken for descriptors."""
    assert inherited_sockets({"LISTEN_FDS": "1", "LISTEN_PID": "1"}) == []
    assert inherited_sockets({}) == []
    assert issubclass(SettingsError, Exception)


# The units.

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def installed_units(tmp_path: Path) -> Path:
    """The units with a program that exists here in the place of /opt/holdfast/bin/holdfast."""
    program = tmp_path / "holdfast"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    units = tmp_path / "units"
    units.mkdir()
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        (units / unit.name).write_text(unit.read_text().replace("/opt/holdfast/bin/holdfast", str(program)))
    return units


@needs_systemd
@pytest.mark.parametrize("unit", ["holdfast.service", "holdfast@shop.service", "holdfast.socket"])
def test_the_units_verify(unit: str, tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say."""
    units = installed_units(tmp_path)
    if "@" in unit:
        (units / unit).symlink_to("holdfast@.service")

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(units / unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", ["holdfast.service", "holdfast@.service"])
def test_the_units_are_closed_to_the_outside(unit: str) -> None:
    """systemd-analyze security finds an exposure below 0.3 of 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=3", "--no-pager", str(UNITS / unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr


def settings_of(unit: str) -> dict[str, str]:
    lines = (UNITS / unit).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", ";")))


@pytest.mark.parametrize("unit", ["holdfast.service", "holdfast@.service"])
def test_systemd_waits_longer_than_the_daemon_needs(unit: str) -> None:
    """The stop may take as long as shutdown_timeout allows before systemd kills, and no exit that a restart cannot mend is retried."""
    settings = settings_of(unit)

    assert float(settings["TimeoutStopSec"]) > 25 + 2
    assert settings["RestartPreventExitStatus"] == "2 3 4"
    assert (settings["Type"], settings["KillMode"]) == ("notify", "mixed")
