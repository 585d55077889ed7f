"""The command line run as a user runs it: a process with arguments, streams, perhaps a terminal, and an exit code."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import structlog

from holdfast.cli.main import main

HOLDFAST = [sys.executable, "-m", "holdfast"]
DAEMON_SOURCE = str(Path(__file__).parent.parent / "daemon")
ANSWER_S = 30.0

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": DAEMON_SOURCE, "COLUMNS": "200", **variables}


def holdfast(
    *arguments: str | Path, cwd: Path, stdin: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``holdfast`` with *arguments* and wait for it; its stdin gives *stdin*, or nothing."""
    return subprocess.run(
        [*HOLDFAST, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )


def forked(
    *arguments: str | Path, cwd: Path, stdin: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same as ``holdfast`` in a twentieth of the time: a fork of this process, where everything is imported."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write((stdin or "").encode())
        given.seek(0)
        child = os.fork()
        if child == 0:
            _become_holdfast([*map(os.fspath, arguments)], cwd, variables, given.fileno(), out.fileno(), err.fileno())
        until = time.monotonic() + ANSWER_S
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError(f"holdfast {arguments} did not end")
            time.sleep(0.002)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(ended[1])
        return subprocess.CompletedProcess(
            arguments, code, out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace")
        )


def _become_holdfast(arguments: list[str], cwd: Path, variables: dict[str, str], *descriptors: int) -> NoReturn:
    code: object = 99
    try:
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        # As the interpreter makes them; those of this process belong to pytest.
        sys.stdin = os.fdopen(0, encoding="utf-8", errors="strict", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(cwd)
        os.environ.update(environment(**variables))
        structlog.reset_defaults()  # whatever the tests before have made of it
        sys.argv = ["holdfast", *arguments]
        main()
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def assert_told_in_one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("holdfast: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


@contextlib.contextmanager
def daemon_in(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon on ``data`` in *directory*, listening on its socket and a free port, with a settings file."""
    (directory / "holdfast.toml").write_text('listen = ["unix:", "tcp:127.0.0.1:0"]\n')
    process = start_daemon(directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def start_daemon(directory: Path) -> subprocess.Popen[bytes]:
    """The daemon of *directory*, once it is ready; the caller ends it."""
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*HOLDFAST, "serve"],
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    until = time.monotonic() + 20
    while b"daemon.ready" not in (directory / "log").read_bytes():
        assert process.poll() is None and time.monotonic() < until, (directory / "log").read_text()
        time.sleep(0.02)
    return process


class Shown(NamedTuple):
    """What a user saw on a terminal."""

    code: int | None
    raw: str

    @property
    def text(self) -> str:
        """Without colours and cursor movements."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")


class Terminal:
    """``holdfast`` running on a terminal of its own. End it with ``finish`` or ``stop``."""

    def __init__(
        self, *arguments: str | Path, cwd: Path, columns: int = 80, stdout: Path | None = None, **variables: str
    ) -> None:
        """Run it; with *stdout* only stdin and stderr are the terminal."""
        self._controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        variables = {"TERM": "xterm-256color", "COLUMNS": str(columns)} | variables
        with contextlib.ExitStack() as files:
            output = terminal if stdout is None else files.enter_context(stdout.open("wb"))
            self.process = subprocess.Popen(
                [*HOLDFAST, *map(str, arguments)],
                cwd=cwd,
                env=environment(**variables),
                stdin=terminal,
                stdout=output,
                stderr=terminal,
                process_group=0,
            )
        os.close(terminal)
        self.raw = ""

    def type(self, text: str) -> None:
        """Type *text*."""
        os.write(self._controller, text.encode())

    def interrupt(self) -> None:
        """What ctrl-C does: a signal to all that run there."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, part: str, *, after: int = 0) -> None:
        """Read until *part* is shown, *after* so many characters seen before."""
        until = time.monotonic() + ANSWER_S
        while part not in self.raw[after:]:
            assert time.monotonic() < until and self._read(), f"{part!r} never appeared:\n{self.raw}"

    def finish(self) -> Shown:
        """Read to the end, and what was shown."""
        try:
            until = time.monotonic() + ANSWER_S
            while self._read():
                assert time.monotonic() < until, self.raw
            return Shown(self.process.wait(ANSWER_S), self.raw)
        finally:
            self.stop()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
        with contextlib.suppress(OSError):
            os.close(self._controller)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._controller], [], [], ANSWER_S)
        try:
            read = os.read(self._controller, 65536) if ready else b""
        except OSError:  # the terminal's last user is gone
            return False
        self.raw += read.decode("utf-8", "replace")
        return bool(read)


def shown_on_a_terminal(*arguments: str | Path, cwd: Path, columns: int = 80, **variables: str) -> Shown:
    """Run ``holdfast`` on a terminal to its end."""
    return Terminal(*arguments, cwd=cwd, columns=columns, **variables).finish()
