"""The command line, run as a user runs it: a process with arguments, streams and an exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from holdfast.cli.main import commands
from holdfast.disk.files import Directory
from holdfast.disk.journal import Journal, encode_line
from tests.cli_harness import HOLDFAST, assert_told_in_one_line, daemon_in, environment, shown_on_a_terminal
from tests.cli_harness import forked as holdfast


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon on ``data`` in the test's directory, listening on its socket and a free port, with a settings file."""
    with daemon_in(tmp_path) as process:
        yield process


# The command line itself.


def test_version_is_shown(tmp_path: Path):
    """``holdfast --version`` names the program and its version."""
    done = holdfast("--version", cwd=tmp_path)

    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "holdfast", "")


def test_every_command_explains_itself(tmp_path: Path):
    """``--help`` of each command, and of each command below it, shows what it does with an example."""
    help_of = {(): holdfast("--help", cwd=tmp_path).stdout}
    for name in commands.list_commands(click.Context(commands)):
        assert re.search(rf"^  {name} ", help_of[()], re.MULTILINE)
        command = commands.get_command(click.Context(commands), name)
        below = [()] if not isinstance(command, click.Group) else [(), *((inner,) for inner in _inner_names(command))]
        for inner in below:
            path = (name, *inner)
            shown = CliRunner().invoke(commands, [*path, "--help"])
            assert shown.exit_code == 0, path
            assert "Examples:" in shown.output, path
            assert "Usage:" in shown.output, path


def _inner_names(group: click.Group) -> list[str]:
    return group.list_commands(click.Context(group))


@pytest.mark.parametrize(
    "arguments",
    [["sevre"], ["serve", "--bogus"], ["serve", "extra"], ["status", "--data-dir"], ["journal", "--since-seq", "x"]],
)
def test_a_bad_command_line_is_told_with_exit_2(tmp_path: Path, arguments: list[str]):
    """One line says what is wrong and where help is; nothing is touched."""
    done = holdfast(*arguments, cwd=tmp_path)

    assert_told_in_one_line(done, 2, "--help")
    assert list(tmp_path.iterdir()) == []


def test_no_arguments_show_help_with_exit_2(tmp_path: Path):
    """``holdfast`` alone lists the commands."""
    done = holdfast(cwd=tmp_path)

    assert done.returncode == 2
    assert "  serve " in done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path):
    """``holdfast … | head -1`` leaves no traceback."""
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [*HOLDFAST, "serve", "--check"],
        cwd=tmp_path,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_told(tmp_path: Path):
    """A full disk behind ``>`` gives one line and exit 1, not a traceback and not success."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*HOLDFAST, "--version"], cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=30
        )

    assert (done.returncode, done.stderr) == (1, b"holdfast: No space left on device\n")


# serve --check


def test_check_prints_every_setting_with_its_origin(tmp_path: Path):
    """What would be used is shown as TOML, with the source in a comment; no directory is made."""
    (tmp_path / "holdfast.toml").write_text("mirror = true\n")

    done = holdfast("serve", "--check", "--set", "sessions.ttl=12h", cwd=tmp_path, DATA_DIR="old")

    assert done.returncode == 0
    assert f"mirror = true  # {tmp_path}/holdfast.toml" in done.stdout
    assert 'sessions.ttl = "12h"  # command line' in done.stdout
    assert f'data_dir = "{tmp_path}/old"  # DATA_DIR' in done.stdout
    assert "limits.page = 1000  # default" in done.stdout
    assert not (tmp_path / "old").exists()


def test_check_prints_json(tmp_path: Path):
    """``--json`` gives value and origin by name."""
    done = holdfast("serve", "--check", "--json", cwd=tmp_path)

    assert json.loads(done.stdout)["backups.keep"] == {"value": "10", "origin": "default"}


def test_what_check_prints_is_a_settings_file(tmp_path: Path):
    """The output given back with ``--config`` means the same."""
    first = holdfast("serve", "--check", "--set", "limits.page=9", cwd=tmp_path).stdout
    (tmp_path / "again.toml").write_text(first)

    again = holdfast("serve", "--check", "--config", "again.toml", cwd=tmp_path).stdout

    def values(text: str) -> list[str]:
        return [line.partition("  #")[0] for line in text.splitlines() if line and not line.startswith("#")]

    assert values(again) == values(first)


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_invalid_settings_exit_2_and_touch_nothing(tmp_path: Path, check: list[str]):
    """With and without ``--check`` the reason stands in one line."""
    done = holdfast("serve", *check, "--listen", "tcp:0.0.0.0:80", cwd=tmp_path)

    assert_told_in_one_line(done, 2, "command line: listen: expected a loopback host", "TLS proxy")
    assert list(tmp_path.iterdir()) == []


# Commands to a daemon that is not there, or not one.


@pytest.mark.parametrize("command", ["status", "flush", "reload"])
def test_without_a_daemon_the_reason_is_told(tmp_path: Path, command: str):
    """Exit 1 names the socket that nobody serves and how to start one."""
    done = holdfast(command, "--data-dir", "d", cwd=tmp_path)

    assert_told_in_one_line(done, 1, f"unix:{tmp_path}/d/holdfast.sock", f"holdfast serve --data-dir {tmp_path}/d")


def test_a_left_over_socket_is_no_daemon(tmp_path: Path):
    """A socket file whose daemon was killed is told like none at all."""
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(tmp_path / "s"))
    left_over.close()

    assert_told_in_one_line(
        holdfast("status", "--connect", f"unix:{tmp_path}/s", cwd=tmp_path), 1, "no daemon is running"
    )


@pytest.mark.parametrize(
    "address", ["", "unix:", "ftp://x", "http://", "http://127.0.0.1:99999", "http://127.0.0.1:1/path"]
)
def test_an_odd_address_exits_2(tmp_path: Path, address: str):
    """``--connect`` names the two forms it takes."""
    assert_told_in_one_line(
        holdfast("status", "--connect", address, cwd=tmp_path), 2, "expected unix:PATH or http://HOST:PORT"
    )


def test_two_ways_to_name_a_daemon_are_one_too_many(tmp_path: Path):
    """``--connect`` and ``--data-dir`` together are refused rather than ranked."""
    done = holdfast("status", "--connect", "unix:/x", "--data-dir", "d", cwd=tmp_path)

    assert_told_in_one_line(done, 2, "not both")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "broke off without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke off without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "expected a Holdfast daemon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "expected a Holdfast daemon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "broke off without an answer"),
        (b'HTTP/1.1 503 X\r\nContent-Length: 42\r\n\r\n{"code":"unavailable","detail":"stopping"}', "stopping"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 2\r\n\r\n{}", "a server that answers 502"),
    ],
)
def test_odd_answers_are_told(tmp_path: Path, answer: bytes, told: str):
    """Whatever listens there, the user gets one line."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve_one() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_one, daemon=True)
        thread.start()
        done = holdfast("status", "--connect", f"http://127.0.0.1:{server.getsockname()[1]}", cwd=tmp_path)
        thread.join(10)

    assert_told_in_one_line(done, 1, told)


def test_a_bad_token_file_exits_2(tmp_path: Path):
    """A missing file, or one that holds no token, is told before anything is sent."""
    (tmp_path / "binary").write_bytes(b"\xff\x00 two words")

    for name, reason in (("missing", "no such file"), ("binary", "expected one token")):
        done = holdfast("status", "--connect", "http://127.0.0.1:1", "--token-file", name, cwd=tmp_path)

        assert_told_in_one_line(done, 2, reason)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_socket_that_is_not_ours_to_open_is_told():
    """Another user learns that it is the permission, and whose user to become."""
    with tempfile.TemporaryDirectory() as directory:
        # Not tmp_path, into which nobody else may look.
        os.chmod(directory, 0o755)
        path = Path(directory) / "s"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            path.chmod(0o600)
            arguments = ["status", "--connect", f"unix:{path}"]
            code = (
                "import os, sys; from holdfast.cli.main import main\n"
                # Once everything is imported, since another user may not read where we are installed.
                "import holdfast.cli.status; os.setgid(65534); os.setuid(65534); main()"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                cwd=directory,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=30,
            )

    assert_told_in_one_line(done, 1, "may not be opened by this user", "run as the daemon's user or group")


# Commands to a running daemon.


def test_status_shows_the_running_daemon(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """A table for people, JSON for programs, both with the PID."""
    table = holdfast("status", cwd=tmp_path)
    as_json = holdfast("status", "--json", cwd=tmp_path)

    assert (table.returncode, as_json.returncode) == (0, 0), table.stderr + as_json.stderr
    assert str(daemon.pid) in table.stdout
    assert json.loads(as_json.stdout)["pid"] == daemon.pid


def test_flush_reports_what_it_wrote(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """The command returns when the snapshot files are on disk."""
    done = holdfast("flush", "--data-dir", "data", cwd=tmp_path)
    as_json = holdfast("flush", "--json", cwd=tmp_path)

    assert (done.returncode, as_json.returncode) == (0, 0), done.stderr + as_json.stderr
    assert done.stdout.startswith("flushed up to seq ")
    assert json.loads(as_json.stdout)["reason"] == "api"
    assert (tmp_path / "data" / "manifest.json").exists()


def test_reload_waits_for_the_answer(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """It names what changed and what waits for a restart."""
    (tmp_path / "holdfast.toml").write_text('flush_every = "1m"\nlisten = ["unix:"]\n')

    done = holdfast("reload", cwd=tmp_path)

    # The watcher may have been faster with the first; the second waits for a restart however often it is read.
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reloaded: ")
    assert "waiting for a restart: listen" in done.stdout


@pytest.mark.parametrize("content", ["flush_evry = 1\n", None])
def test_a_refused_reload_exits_1_with_the_reason(tmp_path: Path, daemon: subprocess.Popen[bytes], content: str | None):
    """An invalid file, or one that vanished, is refused by the daemon, which goes on as before."""
    file = tmp_path / "holdfast.toml"
    file.unlink() if content is None else file.write_text(content)

    done = holdfast("reload", "--data-dir", "data", cwd=tmp_path)

    assert_told_in_one_line(done, 1, str(file))
    assert holdfast("status", "--data-dir", "data", cwd=tmp_path).returncode == 0


def test_tcp_needs_a_token(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """Over http:// the token comes from the file or the environment; without it the way to give one is told."""
    listening = json.loads(holdfast("status", "--json", cwd=tmp_path).stdout)["listen"]
    address = "http://" + next(one for one in listening if one.startswith("tcp:"))[4:]
    token = (tmp_path / "data" / "token").read_text().strip()

    without = holdfast("status", "--connect", address, cwd=tmp_path)
    wrong = holdfast("status", "--connect", address, cwd=tmp_path, HOLDFAST_TOKEN="hf_wrong")
    by_file = holdfast("status", "--connect", address, "--token-file", tmp_path / "data" / "token", cwd=tmp_path)
    by_variable = holdfast("status", "--connect", address, cwd=tmp_path, HOLDFAST_TOKEN=token)

    assert_told_in_one_line(without, 1, "HOLDFAST_TOKEN or --token-file")
    assert_told_in_one_line(wrong, 1, "HOLDFAST_TOKEN or --token-file")
    assert (by_file.returncode, by_variable.returncode) == (0, 0)
    assert token not in without.stderr + by_file.stdout + by_variable.stdout


def test_a_second_daemon_exits_3_with_the_pid_of_the_first(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """Nothing is touched while another process holds the directory."""
    done = holdfast("serve", "--listen", "unix:other.sock", cwd=tmp_path)

    assert done.returncode == 3
    assert str(daemon.pid) in done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_daemon_exits_0(daemon: subprocess.Popen[bytes], number: signal.Signals):
    """SIGTERM, and ctrl-C, end it cleanly."""
    daemon.send_signal(number)

    assert daemon.wait(30) == 0


def test_a_person_is_told_how_to_use_it(tmp_path: Path):
    """On a terminal the daemon prints where it listens, where the token is and a line to try."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*HOLDFAST, "serve", "--listen", "unix:"],
        cwd=tmp_path,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    until = time.monotonic() + 20
    try:
        while b"curl --unix-socket" not in shown and time.monotonic() < until:
            try:
                shown += os.read(controller, 65536)
            except OSError:  # the terminal's last user is gone
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, shown.decode()
    finally:
        process.kill()
        process.wait(10)
        os.close(controller)

    assert str(tmp_path / "data" / "token").encode() in shown


# journal


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A stopped data directory with six events, the last of them a batch."""
    directory = tmp_path / "stopped" / "journal"
    directory.mkdir(parents=True)
    events = [b'{"seq":%d,"op":"session.put","id":"a%d"}' % (seq, seq) for seq in range(1, 6)]
    events.append(b'{"seq":6,"op":"batch","events":[{"op":"order.put","id":"a1"}]}')
    written = Journal(Directory(directory), {}, 1, new_segment=True)
    for seq, event in enumerate(events, 1):
        written.append(encode_line(event), seq)
    written.close()
    return directory.parent


def seqs(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [json.loads(line)["seq"] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        (["--since-seq", "5"], [5, 6]),
        (["--id", "a1"], [1, 6]),
        (["--op", "order.put"], [6]),
        (["--op", "session.put", "--id", "a1", "--id", "a2"], [1, 2]),
        (["--op", "session.put", "--id", "a6"], []),
    ],
)
def test_the_journal_is_filtered(stopped: Path, filters: list[str], expected: list[int]):
    """Filters of one kind widen, of different kinds narrow; a batch counts by its members."""
    done = holdfast("journal", "--data-dir", stopped, *filters, cwd=stopped)

    assert (done.returncode, done.stderr) == (0, "")
    assert seqs(done) == expected


def test_the_journal_is_coloured_for_people_only(stopped: Path):
    """On a terminal keys and values have colours; a pipe gets the bytes of the file."""
    shown = shown_on_a_terminal("journal", "--data-dir", stopped, cwd=stopped, columns=120)
    piped = holdfast("journal", "--data-dir", stopped, cwd=stopped)

    assert "\x1b[36m" in shown.raw
    assert shown.text == piped.stdout


def test_reading_the_journal_changes_nothing(stopped: Path):
    """The directory is byte for byte and name for name as before."""
    before = {path: path.is_file() and path.read_bytes() for path in stopped.rglob("*")}

    holdfast("journal", "--data-dir", stopped, cwd=stopped)

    assert {path: path.is_file() and path.read_bytes() for path in stopped.rglob("*")} == before


def test_a_torn_tail_is_told_and_is_no_failure(stopped: Path):
    """An unfinished last write is normal after a crash."""
    segment = next((stopped / "journal").iterdir())
    segment.write_bytes(segment.read_bytes()[:-5])

    done = holdfast("journal", "--data-dir", stopped, cwd=stopped)

    assert seqs(done) == [1, 2, 3, 4, 5]
    assert_told_in_one_line(done, 0, segment.name, "unfinished")


def test_corruption_is_told_and_fails(stopped: Path):
    """Every whole event is printed, the damaged one is named, and a script notices."""
    segment = next((stopped / "journal").iterdir())
    segment.write_bytes(segment.read_bytes().replace(b'"a3"', b'"b3"'))

    done = holdfast("journal", "--data-dir", stopped, cwd=stopped)

    assert (seqs(done), done.returncode) == ([1, 2, 4, 5, 6], 1)
    assert "checksum does not hold" in done.stderr
    assert "events 3 to 3 are missing" in done.stderr


def test_no_journal_is_told(tmp_path: Path):
    """A directory that holds none is named."""
    assert_told_in_one_line(
        holdfast("journal", "--data-dir", "d", cwd=tmp_path), 1, f"no journal at {tmp_path}/d/journal"
    )


def test_the_journal_of_a_running_daemon_is_shown(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """Reading needs neither the lock nor the socket."""
    done = holdfast("journal", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")


# token


def test_tokens_are_made_listed_and_revoked(tmp_path: Path):
    """A token is shown once; afterwards only its name and scope are known."""
    (tmp_path / "data").mkdir(mode=0o700)

    made = holdfast("token", "new", "--name", "reports", "--read-only", cwd=tmp_path)
    listed = holdfast("token", "list", "--json", cwd=tmp_path)
    revoked = holdfast("token", "revoke", "reports", cwd=tmp_path)
    empty = holdfast("token", "list", "--json", cwd=tmp_path)

    assert made.stdout.startswith("hf_")
    assert [(one["name"], one["scope"]) for one in json.loads(listed.stdout)] == [("reports", "read")]
    assert made.stdout.strip() not in (tmp_path / "data" / "tokens.json").read_text() + listed.stdout
    assert revoked.returncode == 0
    assert json.loads(empty.stdout) == []


def test_the_data_directory_may_stand_before_or_after(tmp_path: Path):
    """``token --data-dir D list`` and ``token list --data-dir D`` mean the same directory."""
    (tmp_path / "d").mkdir(mode=0o700)

    holdfast("token", "--data-dir", "d", "new", "--name", "a", cwd=tmp_path)

    assert "a" in holdfast("token", "list", "--data-dir", "d", cwd=tmp_path).stdout


def test_token_errors_are_told(tmp_path: Path):
    """No directory, no token yet, an unknown name: each in one line."""
    (tmp_path / "d").mkdir(mode=0o700)

    assert_told_in_one_line(
        holdfast("token", "new", "--name", "a", cwd=tmp_path), 1, f"no data directory at {tmp_path}/data"
    )
    assert_told_in_one_line(holdfast("token", "--data-dir", "d", cwd=tmp_path), 1, "no token at")
    assert_told_in_one_line(
        holdfast("token", "revoke", "x", "--data-dir", "d", cwd=tmp_path), 1, "no token is named 'x'"
    )


def test_the_path_of_the_first_token_is_shown(tmp_path: Path, daemon: subprocess.Popen[bytes]):
    """``curl -H "Authorization: Bearer $(cat $(holdfast token))"`` works."""
    done = holdfast("token", cwd=tmp_path)

    assert done.stdout == f"{tmp_path}/data/token\n"
    assert Path(done.stdout.strip()).stat().st_mode & 0o777 == 0o600


def test_a_stopped_directory_is_opened_with_the_settings_that_are_named(tmp_path: Path):
    """By --config or HOLDFAST_CONFIG; they say how records are read, so wrong ones are refused before anything is done."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    (tmp_path / "shop.toml").write_text('data_dir = "data"\n[sessions]\nid_field = "phone"\n')
    (tmp_path / "broken.toml").write_text("flush_every = 'soon'\n")
    (tmp_path / "chat_sessions.json").write_text('[{"phone": "57300", "lastActivity": "2099-01-01T00:00:00Z"}]')
    importing = ("import", "chat_sessions.json", "--yes", "--json")

    broken = holdfast("--config", "broken.toml", *importing, "--data-dir", "data", cwd=tmp_path)
    missing = holdfast("--config", "nowhere.toml", *importing, "--data-dir", "data", cwd=tmp_path)
    untouched = list(data.iterdir())
    done = holdfast("--config", "shop.toml", *importing, cwd=tmp_path)
    again = holdfast(*importing, cwd=tmp_path, HOLDFAST_CONFIG="shop.toml")

    assert (broken.returncode, missing.returncode, untouched) == (2, 2, [])
    assert "flush_every" in broken.stderr and "nowhere.toml" in missing.stderr
    assert json.loads(done.stdout)["collections"]["sessions"]["added"] == 1, done.stderr
    assert json.loads(again.stdout)["collections"]["sessions"]["same"] == 1, again.stderr
