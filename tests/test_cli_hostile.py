"""The command line given nonsense: one line and an exit code, never a traceback."""

from __future__ import annotations

import itertools
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import holdfast.http.docs
import holdfast.http.openapi  # here, so that not each fork has to
from holdfast import __version__
from holdfast.cli.main import commands
from tests.cli_harness import HOLDFAST, assert_told_in_one_line, daemon_in, environment, forked, holdfast
from tests.crash.harness import FULL, SEED

ODD = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1e999",
    "99999999999999999999",
    ".",
    "..",
    "../../etc/passwd",
    "a/b?c=d&e#f",
    "%2e%2e",
    "%",
    "\udcff\udcfe",
    "ñ😀\u202e",
    "\x1b[31m\x07",
    "a\r\nX-Evil: 1",
    "x" * 5000,
    "@",
    "@/dev/null",
    "@/proc/self/mem",
    "{",
    "{}",
    '{"a": NaN}',
    "[" * 3000,
    "NaN",
    "-Infinity",
    "null",
    "--help",
    "--json",
]
"""What no command expects."""

KEEPS_RUNNING = {("serve",), ("status", "--watch"), ("tail",), ("bench",)}
"""Not given at random, since they would not come back."""


COMMON = {"data_dir", "connect", "token_file", "as_json"}
"""Options that nearly every command has; now and then is enough."""


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a daemon on its ``data``."""
    directory = tmp_path_factory.mktemp("hostile")
    with daemon_in(directory):
        yield directory


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that lead to it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    names = command.list_commands(ctx)
    if path == ("collections",):
        names = [*names, "notes"]
    for name in names:
        inner = command.get_command(ctx, name)
        assert inner is not None
        yield from leaves(inner, (*path, name))


def command_lines(chance: random.Random, tries: int) -> Iterator[list[str]]:
    """Every command with every option of its own and each argument set to something odd, one at a time."""
    for path, command in leaves(commands):
        if any(path[: len(one)] == one for one in KEEPS_RUNNING) or path[0] == "install-service":
            continue
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        options = [
            one for one in command.params if isinstance(one, click.Option) and one.name not in ("watch", "follow")
        ]
        for odd in chance.sample(ODD, 4 * tries if FULL else 2):
            yield [*path, *(odd for _ in arguments)]
        for option in options:
            if option.name in COMMON and chance.random() > 0.2:
                continue
            for odd in chance.sample(ODD, tries):
                value = [] if option.is_flag else [odd]
                yield [*path, option.opts[0], *value, *(chance.choice(ODD) for _ in arguments)]


@pytest.mark.parametrize(
    "tries",
    [
        1,
        pytest.param(
            7,
            marks=[
                pytest.mark.crash,
                pytest.mark.skipif(not FULL, reason="the long form: only with HOLDFAST_CRASH=full"),
            ],
        ),
    ],
)
def test_no_argument_leads_to_a_traceback(cwd: Path, tries: int):
    """Every command, with odd values in every place, ends with a code of the contract and a line that says why."""
    for line in command_lines(random.Random(SEED), tries):
        done = forked(*line, cwd=cwd)

        assert done.returncode in (0, 1, 2, 3, 4), (line, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout, (line, done.stderr)
        assert "a fault of this command" not in done.stderr, (line, done.stderr)
        assert done.returncode == 0 or done.stderr.startswith(("holdfast: ", "Usage: ")), (line, done.stderr)
        assert "\x1b" not in done.stderr + done.stdout, (line, done.stderr)


@pytest.mark.parametrize("address", ["dead", "silent", "talks", "none"])
def test_no_command_dies_of_an_odd_daemon(tmp_path: Path, address: str):
    """Whatever is at the other end of the socket, each command tells it in one line with exit 1."""
    path = tmp_path / "s"
    server = socket.socket(socket.AF_UNIX)
    stopping = threading.Event()
    if address != "none":
        server.bind(str(path))
    if address in ("silent", "talks"):
        server.listen(64)

    def serve() -> None:
        for number in itertools.count():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                if stopping.is_set():
                    return
                if address == "talks":
                    connection.recv(65536)
                    body = [b"{}", b"[]", b'{"items": 3}', b'{"items": [{}], "next": 7}', b"\xff"][number % 5]
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        for line in (
            ["sessions", "list"],
            ["users", "get", "a"],
            ["orders", "put", "a", "{}"],
            ["users", "rm", "a"],
            ["users", "rm", "--all", "--yes"],
            ["collections"],
            ["collections", "notes", "list", "--json"],
            ["sessions", "lease", "a"],
            ["conversations", "list"],
            ["conversations", "show", "a"],
            ["conversations", "show", "a", "--last", "3", "--json"],
            ["conversations", "rm", "a"],
            ["conversations", "hold", "a"],
            ["escalations", "list"],
            ["escalations", "show", "a"],
            ["cleanup", "--days", "90"],
            ["cleanup", "--idle-hours", "24", "--json"],
            ["stats"],
            ["stats", "sales"],
            ["stats", "storage"],
            ["status"],
            ["flush"],
            ["reload"],
            ["bench", "--seconds", "0.1"],
        ):
            for _ in range(5 if address == "talks" else 1):
                done = forked(*line, "--connect", f"unix:{path}", cwd=tmp_path)

                assert "Traceback" not in done.stderr, (line, done.stderr)
                assert "a fault of this command" not in done.stderr, (line, done.stderr)
                assert address == "talks" or done.returncode == 1, (line, done.stderr)
    finally:
        stopping.set()
        server.close()


def serve_once(server: socket.socket, answer: bytes) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize(
    ("status", "server_line", "found"),
    [
        ("404 Not Found", "Server: holdfast/9.8.7\r\n", "is 9.8.7"),
        ("405 Method Not Allowed", "Server: holdfast/9.8.7\r\n", "is 9.8.7"),
        ("404 Not Found", "", "is of another version"),
    ],
)
def test_a_daemon_of_another_version_is_told(tmp_path: Path, status: str, server_line: str, found: str):
    """A path that the daemon does not know means that the two do not belong together, and both versions are named."""
    body = b'{"status": 404, "code": "not_found", "detail": "no such path; GET / names them"}'
    head = f"HTTP/1.1 {status}\r\n{server_line}Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        serve_once(server, head.encode() + body)

        done = holdfast("stats", "--connect", f"http://127.0.0.1:{server.getsockname()[1]}", cwd=tmp_path)

    assert_told_in_one_line(done, 1, found, f"this command line {__version__}", "/v1/stats/sales")


def test_an_absent_record_is_no_other_version(cwd: Path):
    """404 for a record is told as such."""
    assert_told_in_one_line(forked("users", "get", "absent", cwd=cwd), 1, "no user 'absent'")


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("line", ["--version", "users list", "users put a -", "journal"])
def test_closed_streams_are_survived(cwd: Path, stream: str, line: str):
    """A job of cron or a container may have none of the three; the exit code still says how it went."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m holdfast {line} {stream}', HOLDFAST[0]],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert "Traceback" not in done.stderr + done.stdout
    assert "a fault of" not in done.stderr + done.stdout
    assert done.returncode in (0, 1, 2)


def test_output_that_nobody_can_get_is_told(cwd: Path):
    """A command that has something to say and a closed stdout fails, as `ls >&-` does."""
    for line in ("users list --json", "status", "users put said {} --json"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m holdfast {line} >&-', HOLDFAST[0]],
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
        )

        assert_told_in_one_line(done, 1, "standard output is closed")


def test_a_poor_terminal_encoding_is_no_failure(cwd: Path):
    """Where stdout is ASCII, what it lacks is shown escaped."""
    forked("users", "put", "ascii", '{"name": "Ñandú 😀"}', cwd=cwd)

    done = holdfast("users", "list", cwd=cwd, PYTHONIOENCODING="ascii", LC_ALL="C")

    assert done.returncode == 0, done.stderr
    assert "Ñandú" in done.stdout or "\\xd1and\\xfa" in done.stdout
