"""A real systemd in namespaces of its own, with Holdfast installed in it as an operator would.

The file system is a copy in memory of the machine's own, so nothing stays when it ends; it ends with the process that
started it, however that ends. Needs root and a kernel that lets root make namespaces and mounts.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.crash.harness import ROOT, Client
from tests.systemd.boot import SYSTEMD

HERE = Path(__file__).resolve().parent
UNITS = ROOT / "systemd"

VENV = Path("/opt/holdfast")
BASE_PYTHON = Path("/opt/python")
"""Where the lab has the interpreter of the tests, when that is not the system's: services may not look into /root."""

BUNDLE = Path("/opt/bundle")

NEEDED = {"nsenter": "util-linux", "pivot_root": "util-linux", "systemctl": "systemd", "unshare": "util-linux"}
BOOT_S = 30.0
COMMAND_S = 60.0

PR_SET_PDEATHSIG = 1

Value = TypeVar("Value")


class LabUnavailable(Exception):
    """Why this machine cannot have a lab."""


class Lab:
    """A booted systemd.

    Attributes:
        root: its file system as seen from outside; sockets below it can be connected to.
        boot_s: how long it took to boot.
    """

    def __init__(self) -> None:
        """Boot.

        Raises:
            LabUnavailable: this machine or its container does not permit it; nothing is left behind.
        """
        _check_machine()
        for stale in Path(tempfile.gettempdir()).glob("holdfast-lab-*"):
            if _is_stale(stale):
                shutil.rmtree(stale, ignore_errors=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=f"holdfast-lab-{os.getpid()}-"))
        self._cgroup: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        started_at = time.monotonic()
        try:
            self._cgroup = _make_cgroup()
            self._boot()
        except BaseException:
            self.end()
            raise
        self.boot_s = time.monotonic() - started_at

    def _boot(self) -> None:
        assert self._cgroup is not None
        binds = {}
        if not sys.base_prefix.startswith("/usr"):
            binds[sys.base_prefix] = str(BASE_PYTHON)
        options = {"scratch": str(self._scratch), "cgroup": str(self._cgroup), "binds": binds}
        namespaces = ["--mount", "--pid", "--ipc", "--uts", "--net"]
        prctl = ctypes.CDLL(None).prctl
        boot = [sys.executable, "-I", str(HERE / "boot.py"), json.dumps(options)]
        log = self._scratch / "boot.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", "--fork", "--kill-child=SIGKILL", *namespaces, *boot],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # When this process dies, whatever it dies of, all of the lab dies with it.
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )

        def is_up() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise LabUnavailable(f"systemd does not boot in namespaces here: {_last_line(log)}")
            return (self._scratch / "pid").exists() and (self.root / "run/systemd/private").exists()

        try:
            wait_for(is_up, BOOT_S, "systemd to boot")
            self.exec("systemctl", "is-system-running", "--wait", check=False, timeout_s=BOOT_S)
            self.exec("systemctl", "is-active", "lab.target", "systemd-journald.service", timeout_s=BOOT_S)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise LabUnavailable(f"systemd does not come up in namespaces here: {error} {_last_line(log)}") from error

    @property
    def root(self) -> Path:
        return Path("/proc") / (self._scratch / "pid").read_text() / "root"

    def exec(
        self, *command: str | Path, check: bool = True, timeout_s: float = COMMAND_S, user: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run *command* inside, as root or *user*; with *check* a non-zero exit code fails the test."""
        done = subprocess.run(
            self.command(*command, user=user, **variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode} {done.stdout}{done.stderr}"
        return done

    def command(self, *command: str | Path, user: str = "", **variables: str) -> list[str]:
        """What runs *command* inside."""
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        environ |= {"HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"} | variables
        enter = ["nsenter", "-t", self.root.parent.name, "-m", "-u", "-i", "-n", "-p", "-C", "-r", "--"]
        become = ["runuser", "-u", user, "--"] if user else []
        return [
            *enter,
            *become,
            "env",
            "-i",
            "--chdir=/",
            *(f"{name}={value}" for name, value in environ.items()),
            *map(str, command),
        ]

    def systemctl(
        self, *arguments: str, check: bool = True, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run systemctl inside."""
        return self.exec("systemctl", "--no-pager", *arguments, check=check, timeout_s=timeout_s)

    def show(self, unit: str, name: str) -> str:
        """The property *name* of *unit*."""
        return self.systemctl("show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, *arguments: str) -> list[dict[str, Any]]:
        """What ``journalctl -o json`` prints."""
        printed = self.exec("journalctl", "--no-pager", "-o", "json", "--all", *arguments).stdout
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]

    def install_package(self) -> None:
        """Make the virtual environment /opt/holdfast with a wheel of the working tree, without a network."""
        bundle = self.root / str(BUNDLE).lstrip("/")
        bundle.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(bundle)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"the wheel could not be built: {done.stderr}"
        (wheel,) = bundle.glob("*.whl")
        python = Path(os.path.realpath(sys.executable))
        if not sys.base_prefix.startswith("/usr"):
            python = BASE_PYTHON / python.relative_to(os.path.realpath(sys.base_prefix))
            # The library of the interpreter, where it is shared, is no longer where the interpreter looks first.
            (self.root / "etc/ld.so.conf.d/lab.conf").write_text(f"{BASE_PYTHON}/lib\n")
            self.exec("ldconfig")
        self.exec(python, "-m", "venv", "--without-pip", VENV)
        packages = self.site_packages
        for distribution in _requirements("holdfast"):
            _copy_distribution(distribution, packages)
        _copy_distribution(importlib.metadata.distribution("pip"), bundle / "site")
        # pip as a directory, because it belongs to the tests and not into the environment of the service.
        pip = [VENV / "bin/python", BUNDLE / "site/pip", "--disable-pip-version-check", "--no-cache-dir"]
        offline = ["--no-index", "--no-deps", "--ignore-installed", "--root-user-action=ignore"]
        self.exec(*pip, "install", "--quiet", *offline, BUNDLE / wheel.name)
        shutil.copy(HERE / "hook.py", packages / "holdfast_lab_hook.py")
        (packages / "holdfast_lab_hook.pth").write_text(
            "import os; os.environ.get('LAB_FAULT') and __import__('holdfast_lab_hook')\n"
        )

    @property
    def site_packages(self) -> Path:
        """Of the virtual environment, from outside."""
        (packages,) = (self.root / str(VENV).lstrip("/")).glob("lib/python*/site-packages")
        return packages

    def install_units(self) -> None:
        """By hand, as ``systemd/README.md`` says."""
        self.exec("useradd", "--system", "--home-dir=/var/lib/holdfast", "--no-create-home", "holdfast")
        for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
            shutil.copy(unit, self.root / "etc/systemd/system")
        self.systemctl("daemon-reload")

    def end(self) -> None:
        """Kill everything inside and remove every trace outside."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
        if self._cgroup is not None:
            _remove_cgroup(self._cgroup)
        shutil.rmtree(self._scratch, ignore_errors=True)


class Service:
    """One unit of Holdfast in the lab: ``holdfast.service``, or an instance of the template.

    Attributes:
        unit: its full name.
        socket_path, data_dir: seen from outside.
        inside_data_dir: as the service itself sees it.
    """

    def __init__(self, lab: Lab, instance: str = "") -> None:
        self.lab = lab
        self.unit = f"holdfast@{instance}.service" if instance else "holdfast.service"
        run = f"run/holdfast/{instance}/holdfast.sock" if instance else "run/holdfast.sock"
        self.socket_path = lab.root / run
        self.inside_data_dir = Path("/var/lib", f"holdfast-{instance}" if instance else "holdfast")
        self.data_dir = lab.root / self.inside_data_dir.relative_to("/")

    def configure(self, *lines: str, section: str = "Service") -> None:
        """Add *lines* to the unit by a drop-in."""
        directory = self.lab.root / "etc/systemd/system" / f"{self.unit}.d"
        directory.mkdir(exist_ok=True)
        (directory / "test.conf").write_text("\n".join([f"[{section}]", *lines, ""]))
        self.lab.systemctl("daemon-reload")

    def start(self, *, check: bool = True, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        return self.lab.systemctl("start", self.unit, check=check, timeout_s=timeout_s)

    def stop(self, *, timeout_s: float = COMMAND_S) -> None:
        self.lab.systemctl("stop", self.unit, timeout_s=timeout_s)

    def kill(self, name: str) -> None:
        """Send the daemon the signal *name*, as an operator does."""
        self.lab.systemctl("kill", f"--signal={name}", "--kill-whom=main", self.unit)

    def show(self, name: str) -> str:
        """The property *name*."""
        return self.lab.show(self.unit, name)

    def moment(self, name: str) -> float:
        """The property *name*, a time, on the clock of time.monotonic."""
        return int(self.show(f"{name}Monotonic")) / 1e6

    def is_active(self) -> bool:
        return self.show("ActiveState") == "active"

    def journal(self) -> list[dict[str, Any]]:
        """Every line it wrote, as journalctl shows it."""
        return self.lab.journal(f"--unit={self.unit}", "--identifier=holdfast")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What it logged, those called *name* only where one is given."""
        messages = [line["MESSAGE"] for line in self.journal() if isinstance(line.get("MESSAGE"), str)]
        events = [json.loads(message) for message in messages if message.startswith('{"')]
        return [event for event in events if name in ("", event["event"])]

    def event(self, name: str, count: int = 1, deadline_s: float = 20.0) -> dict[str, Any]:
        """The event *name* that was logged as number *count*, waited for."""
        return wait_for(lambda: (self.events(name)[count - 1 :] or [None])[0], deadline_s, f"{self.unit}: {name}")

    def connect(self) -> Client:
        return Client(self.socket_path)


def wait_for(condition: Callable[[], Value | None], deadline_s: float, what: str) -> Value:
    """What *condition* yields as soon as that is neither None nor false; the test fails when *deadline_s* is over."""
    ends_at = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < ends_at, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.02)
    return value


def _check_machine() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise LabUnavailable("needs root on Linux to boot a systemd in namespaces")
    if not os.access(SYSTEMD, os.X_OK):
        raise LabUnavailable(f"needs systemd, found no {SYSTEMD}; install the package systemd")
    for package in ("hatchling", "pip"):
        if importlib.util.find_spec(package) is None:
            raise LabUnavailable(f"needs {package} beside pytest to install the package; make .venv/.test does it")
    for program, package in NEEDED.items():
        if shutil.which(program) is None:
            raise LabUnavailable(f"needs {program}; install the package {package}")


def _make_cgroup() -> Path:
    """A cgroup that will be the root of the lab's own hierarchy."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = [Path(left.split()[4]) for left, right in mounts if right.startswith("cgroup2 ")]
    if not places:
        raise LabUnavailable("needs control groups of version 2, found none mounted")
    for stale in places[0].glob("holdfast-lab-*"):
        if _is_stale(stale):
            _remove_cgroup(stale)
    cgroup = places[0] / f"holdfast-lab-{os.getpid()}-{time.monotonic_ns()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        raise LabUnavailable(f"needs a control group of its own: {error}") from error
    return cgroup


def _is_stale(path: Path) -> bool:
    """Whether the process that made *path*, whose number is in its name, was killed before it could remove it."""
    return not Path("/proc", path.name.split("-")[2]).exists()


def _remove_cgroup(cgroup: Path) -> None:
    for directory in [*sorted(cgroup.rglob("*/"), key=lambda path: -len(path.parts)), cgroup]:
        # Processes that were killed leave it in their own time.
        for _ in range(50):
            with contextlib.suppress(OSError):
                directory.rmdir()
            if not directory.exists():
                break
            time.sleep(0.02)


def _requirements(name: str) -> Iterator[importlib.metadata.Distribution]:
    """Every distribution that *name* needs to run, itself excluded, as they are installed for the tests."""
    seen, waiting = {name}, [name]
    while waiting:
        for requirement in importlib.metadata.distribution(waiting.pop()).requires or []:
            wanted = re.match(r"[\w.-]+", requirement)
            if wanted is None or "extra ==" in requirement or wanted[0].lower() in seen:
                continue
            try:
                distribution = importlib.metadata.distribution(wanted[0])
            except importlib.metadata.PackageNotFoundError:
                continue  # its marker names another Python or system
            seen.add(wanted[0].lower())
            waiting.append(wanted[0])
            yield distribution


def _copy_distribution(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    for file in distribution.files or []:
        if ".." in file.parts or not file.locate().exists():
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        # With its time, without which the compiled modules beside it would not count.
        shutil.copy2(str(file.locate()), target)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
