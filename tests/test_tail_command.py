"""`holdfast tail`, run as a user runs it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_harness import (
    ANSWER_S,
    HOLDFAST,
    Terminal,
    assert_told_in_one_line,
    daemon_in,
    environment,
    forked,
    start_daemon,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon on ``data`` in the test's directory."""
    with daemon_in(tmp_path) as process:
        yield process


def request(directory: Path, method: str, path: str, value: object = None) -> int:
    """Ask the daemon of *directory*; the status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(str(directory / "data" / "holdfast.sock"))
        body = b"" if value is None else json.dumps(value).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 20"), answer
    return int(answer[9:12])


def put(directory: Path, id: str = "1", **value: object) -> None:
    request(directory, "PUT", f"/v1/sessions/{id}", value)


class Tail:
    """`holdfast tail` running; its lines as they come."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*HOLDFAST, "tail", *arguments],
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._watchdog = threading.Timer(ANSWER_S, self.process.kill)
        self._watchdog.start()

    def line(self) -> str:
        """The next line of its stdout."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.endswith("\n"), self.error()
        return line[:-1]

    def error(self) -> str:
        """All of its stderr, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def ended(self) -> int:
        """Wait for its exit code."""
        code = self.process.wait(ANSWER_S)
        self._watchdog.cancel()
        return code


@contextlib.contextmanager
def tailing(directory: Path, *arguments: str) -> Iterator[Tail]:
    """A tail that has begun: it is there when it shows the first event of the past."""
    tail = Tail(directory, *arguments)
    try:
        yield tail
    finally:
        tail.process.kill()
        tail.ended()
        for stream in (tail.process.stdout, tail.process.stderr):
            assert stream is not None
            stream.close()


def test_events_are_shown_as_they_happen(tmp_path: Path, daemon: subprocess.Popen[bytes]) -> None:
    """One a line, at once, with time, seq, op, id and what became; Ctrl-C ends it well."""
    put(tmp_path, "57300", cart=["x"])
    with tailing(tmp_path, "--after", "0") as tail:
        first = tail.line()
        assert first[4] == "-" and "T" not in first[:23]
        assert first[23:].split()[:3] == ["1", "session.put", "57300"]
        assert '"cart":["x"]' in first

        request(tmp_path, "DELETE", "/v1/sessions/57300")
        assert tail.line().split()[2:] == ["2", "session.delete", "57300"]

        tail.process.send_signal(signal.SIGINT)
        assert (tail.ended(), tail.error()) == (0, "")


def test_json_is_the_journal_byte_for_byte(tmp_path: Path, daemon: subprocess.Popen[bytes]) -> None:
    """One object a line, with the digits as they were sent."""
    put(tmp_path, "1", text="línea\n\u2028", n=1.50)
    request(tmp_path, "POST", "/v1/batch", {"ops": [
        {"op": "order.put", "id": "9", "value": {"price": 7}},
        {"op": "order.complete", "id": "9", "revenue": "84900.50"},
    ]})  # fmt: skip

    shown = forked("tail", "--json", "--after", "0", "--count", "3", cwd=tmp_path)
    written = forked("journal", cwd=tmp_path)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == written.stdout
    assert "84900.50" in shown.stdout


def test_filters_and_places(tmp_path: Path, daemon: subprocess.Popen[bytes]) -> None:
    """By op and id, from an event or behind it, and of a batch its members."""
    put(tmp_path, "1")
    request(tmp_path, "POST", "/v1/batch", {"atomic": True, "ops": [
        {"op": "session.put", "id": "2", "value": {}}, {"op": "order.put", "id": "1", "value": {}},
    ]})  # fmt: skip
    put(tmp_path, "2")

    def seqs(*arguments: str) -> list[tuple[int, str]]:
        done = forked("tail", "--json", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [(event["seq"], event["op"]) for event in map(json.loads, done.stdout.splitlines())]

    assert seqs("--since-seq", "2", "--count", "3") == [(2, "session.put"), (2, "order.put"), (3, "session.put")]
    assert seqs("--after", "2", "--count", "1") == [(3, "session.put")]
    assert seqs("--after", "0", "--op", "order.*", "--count", "1") == [(2, "order.put")]
    assert seqs("--after", "0", "--id", "1", "--op", "session.put", "--op", "order.put", "--count", "2") == [
        (1, "session.put"), (2, "order.put"),
    ]  # fmt: skip


def test_a_restart_is_waited_for_and_nothing_is_missed_or_repeated(tmp_path: Path) -> None:
    """It says once that it waits, and goes on with the next event."""
    with daemon_in(tmp_path) as daemon:
        put(tmp_path, "1")
        with tailing(tmp_path, "--json", "--after", "0") as tail:
            seqs = [json.loads(tail.line())["seq"]]
            put(tmp_path, "2")
            seqs.append(json.loads(tail.line())["seq"])
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(ANSWER_S) == 0
            time.sleep(0.3)

            again = start_daemon(tmp_path)
            try:
                put(tmp_path, "3")
                request(tmp_path, "POST", "/v1/admin/flush")
                put(tmp_path, "4")
                seqs += [json.loads(tail.line())["seq"] for _ in range(2)]
                tail.process.send_signal(signal.SIGINT)

                assert tail.ended() == 0
                assert seqs == [1, 2, 3, 4]
                told = tail.error()
                assert told.count("\n") == 1 and "waiting until it is back" in told
            finally:
                again.kill()
                again.wait(ANSWER_S)


def test_colours_and_the_width_are_those_of_the_terminal(tmp_path: Path, daemon: subprocess.Popen[bytes]) -> None:
    """A long value is cut to what fits into a line, control characters are shown as such, NO_COLOR is honoured."""
    put(tmp_path, "1", text="x" * 500)
    put(tmp_path, "2", text="turned \u202e around")
    arguments = ("tail", "--after", "0", "--count", "2")

    seen = Terminal(*arguments, cwd=tmp_path, columns=140).finish()
    plain = Terminal(*arguments, cwd=tmp_path, columns=140, NO_COLOR="1").finish()

    lines = seen.text.splitlines()
    assert (seen.code, len(lines)) == (0, 2)
    assert len(lines[0]) == 140 and lines[0].endswith("…")
    assert "turned \\u202e around" in lines[1]
    assert "\x1b[32m" in seen.raw
    assert "\x1b" not in plain.raw


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--after", "7"), 1, "event 7 has not happened: the last one is 1"),
        (("--op", "session.jump"), 1, "unknown op 'session.jump'; known are"),
        (("--after", "1", "--since-seq", "1"), 2, "not both"),
        (("--since-seq", "0"), 2, "x>=1"),
        (("--count", "0"), 2, "x>=1"),
        (("--connect", "unix:/nowhere/holdfast.sock"), 1, "no daemon is running"),
    ],
)
def test_what_cannot_be_followed_is_told(
    tmp_path: Path, daemon: subprocess.Popen[bytes], arguments: tuple[str, ...], code: int, told: str
) -> None:
    """In one line with what to do, and an exit code."""
    put(tmp_path)

    assert_told_in_one_line(forked("tail", *arguments, cwd=tmp_path), code, told)


def test_the_past_that_is_gone_and_the_token_that_is_wrong(tmp_path: Path) -> None:
    """410 and 401 end it, also when it had begun long before."""
    with daemon_in(tmp_path) as daemon:
        put(tmp_path)
        (tmp_path / "holdfast.toml").write_text(
            'listen = ["unix:", "tcp:127.0.0.1:0"]\njournal_keep = 0\n[backups]\npitr = "0s"\n'
        )
        assert forked("reload", cwd=tmp_path).returncode == 0
        assert forked("flush", cwd=tmp_path).returncode == 0
        assert_told_in_one_line(
            forked("tail", "--after", "0", cwd=tmp_path), 1, "event 1 is no longer in the journal", "after event 1"
        )
        log = (tmp_path / "log").read_text()
        port = log.partition("tcp:127.0.0.1:")[2][:6].strip('"], ')
        done = forked("tail", "--connect", f"http://127.0.0.1:{port}", cwd=tmp_path, HOLDFAST_TOKEN="wrong")
        assert_told_in_one_line(done, 1, "--token-file")

        with tailing(tmp_path, "--after", "1") as tail:
            put(tmp_path)
            tail.line()
            daemon.kill()
            daemon.wait(ANSWER_S)
            for path in (tmp_path / "data").rglob("*.json*"):
                path.unlink()
            again = start_daemon(tmp_path)
            try:
                assert tail.ended() == 1
                told = tail.error()
                assert told.count("\n") == 2 and "event 2 has not happened" in told
            finally:
                again.kill()
                again.wait(ANSWER_S)


def test_a_closed_pipe_ends_it_quietly(tmp_path: Path, daemon: subprocess.Popen[bytes]) -> None:
    """As `holdfast tail | head -1` does."""
    put(tmp_path)
    with tailing(tmp_path, "--after", "0") as tail:
        tail.line()
        assert tail.process.stdout is not None
        tail.process.stdout.close()
        put(tmp_path)
        put(tmp_path)

        assert (tail.ended(), tail.error()) == (1, "")
