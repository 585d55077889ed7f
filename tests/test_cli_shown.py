"""What an operator looks at: figures, status, a load test, and what the shell completes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.cli import status
from holdfast.cli.bench import COLLECTION
from holdfast.cli.connection import Daemon
from holdfast.cli.show import bar, printable, readable_size, readable_span, shortened
from holdfast.client.address import address_of
from holdfast.clock import format_ms
from tests.cli_harness import (
    HOLDFAST,
    Terminal,
    assert_told_in_one_line,
    daemon_in,
    environment,
    forked,
    holdfast,
    shown_on_a_terminal,
    start_daemon,
)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a daemon on its ``data``, which knows some sales."""
    directory = tmp_path_factory.mktemp("shown")
    with daemon_in(directory):
        ops: list[dict[str, Any]] = []
        for day, orders, revenue in (("18", 4, "0.10"), ("20", 2, "0.2"), ("21", 1, "84900.50")):
            at = f"2026-11-{day}T12:00:00Z"
            ops += [{"op": "stats.order", "product_type": "music", "at": at}] * orders
            ops.append({"op": "stats.completion", "revenue": revenue, "at": at})
        ops.append({"op": "stats.order", "product_type": "\u202eniño\x1b[31m", "at": "2026-11-21T12:00:00Z"})
        ask(directory, "POST", "/v1/batch", {"ops": ops})
        yield directory


def ask(cwd: Path, method: str, path: str, value: Any = None) -> dict[str, Any]:
    """Ask the daemon of *cwd* beside the command line."""
    daemon = Daemon(address_of(f"unix:{cwd / 'data' / 'holdfast.sock'}"), None, None)
    return daemon.fetch(method, path, body=None if value is None else orjson.dumps(value)).fields()


# stats


def test_the_figures_are_exact(cwd: Path):
    """Amounts have the digits that the file has, in the table and with ``--json``."""
    table = forked("stats", cwd=cwd).stdout
    as_json = forked("stats", "--json", cwd=cwd).stdout

    assert re.search(r"^revenue +84900\.80$", table, re.MULTILINE)
    assert re.search(r"^2026-11-18 +4 +1 +0\.10 ", table, re.MULTILINE)
    assert '"allTimeRevenue": 84900.80' in as_json
    assert json.loads(as_json)["totals"]["allTimeOrders"] == 8


def test_the_bars_compare_the_days(cwd: Path):
    """The best day fills the chart, the others are in proportion, and a day without orders has its place."""
    rows = {line[:10]: line for line in forked("stats", cwd=cwd).stdout.splitlines() if line.startswith("2026-")}

    assert [line.count("█") for line in rows.values()] == [24, 0, 12, 12]
    assert rows["2026-11-19"].split()[1:] == ["0", "0", "0"]


def test_the_days_are_limited(cwd: Path):
    """``--days`` shows the last so many, and counts the product types of these only."""
    table = forked("stats", "--days", "1", cwd=cwd).stdout

    assert len(re.findall(r"^2026-", table, re.MULTILINE)) == 1
    assert re.search(r"^music +1 ", table, re.MULTILINE)
    assert "\x1b[31m" not in table
    assert "\\u202eniño\\u001b[31m" in table


def test_figures_without_any_sale_are_shown(tmp_path: Path):
    """A new daemon has totals of nothing."""
    with daemon_in(tmp_path):
        done = forked("stats", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^orders +0$", done.stdout, re.MULTILINE)


# status


def test_what_is_wrong_is_shown_in_red(tmp_path: Path):
    """A degraded daemon says why, first of all."""
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "users.json").write_text("garbage")
    with daemon_in(tmp_path):
        shown = shown_on_a_terminal("status", cwd=tmp_path)

    state, reason = shown.raw.split("\r\n")[1:3]
    assert "RUNNING, degraded" in state and "\x1b[31m" in state
    assert "users.json" in reason and "\x1b[31m" in reason


def test_the_disk_is_shown_once_it_was_looked_at():
    """Free room, how long it lasts and what takes it; before the first look nothing is said of it."""
    disk = {"free_bytes": 3 << 30, "size_bytes": 8 << 30, "free_files": 1, "grows_bytes_h": 1 << 30, "hours_left": 3.0}
    parts = {"journal": {"bytes": 2048, "files": 2}, "media": {"bytes": 0, "files": 0}}
    unseen = {"free_bytes": 0, "size_bytes": 0, "free_files": None, "grows_bytes_h": None, "hours_left": None}

    shown = {row.title: row.text for row in status.rows({"state": "RUNNING", "disk": disk, "parts": parts})}

    assert shown == {
        "state": "RUNNING",
        "disk free": "3.0 GiB of 8.0 GiB, and 1 file",
        "disk fills by": "1.0 GiB an hour",
        "disk is full in": "3 h",
        "size of journal": "2.0 KiB in 2 files",
    }
    assert [row.title for row in status.rows({"state": "RUNNING", "disk": unseen, "parts": {}})] == ["state"]


def test_the_backups_are_shown_with_their_age():
    """How many, how old the newest is, and in red what is wrong with it, or with its copies."""
    hours_ago = format_ms(round(time.time() * 1000) - (3 * 3600 + 10 * 60 + 30) * 1000)
    backups = {"count": 3, "bytes": 1 << 20, "newest_at": hours_ago, "proved_at": hours_ago, "is_proved": True}
    copies = {"place": "/mnt/usb", "count": 0, "newest_at": None, "failure": "not mounted"}

    well = status.rows({"state": "RUNNING", "backups": backups, "copies": None})
    ill = status.rows({"state": "RUNNING", "backups": backups | {"is_proved": False}, "copies": copies})
    none = status.rows({"state": "RUNNING", "backups": backups | {"newest_at": None}, "copies": None})

    assert [tuple(row) for row in well[1:]] == [("backups", "3, the newest 3 h 10 min old, proved", None)]
    assert [tuple(row) for row in ill[1:]] == [
        ("backups", "3, the newest 3 h 10 min old, not proved", "red"),
        ("backup copies", "none yet, in /mnt/usb", None),
        ("backup copies", "not mounted", "red"),
    ]
    assert [tuple(row) for row in none[1:]] == [("backups", "none yet", None)]


def test_watching_survives_a_restart(tmp_path: Path):
    """While the daemon is gone that is said, afterwards the figures are back; ctrl-C ends with 0."""
    with daemon_in(tmp_path) as process:
        terminal = Terminal("status", "--watch", "0.1", "--data-dir", "data", cwd=tmp_path)
        try:
            terminal.wait_for("a second")
            process.terminate()
            assert process.wait(30) == 0
            terminal.wait_for("no daemon, waiting")
            seen = len(terminal.raw)
            again = start_daemon(tmp_path)
            try:
                terminal.wait_for(f"pid                 {again.pid}", after=seen)
                terminal.process.send_signal(signal.SIGINT)
                assert terminal.finish().code == 0
            finally:
                again.kill()
                again.wait(10)
        finally:
            terminal.stop()


@pytest.mark.parametrize("how", [["--json"], []])
def test_watching_without_a_terminal_prints_look_after_look(cwd: Path, how: list[str]):
    """A program gets a JSON object a line, a file gets blocks; each as soon as it is known."""
    process = subprocess.Popen(
        [*HOLDFAST, "status", "--watch", "0.1", *how], cwd=cwd, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        if how:
            assert [json.loads(process.stdout.readline())["state"] for _ in range(3)] == ["RUNNING"] * 3
        else:
            looks = (line for line in iter(process.stdout.readline, "") if line.startswith("Holdfast at "))
            assert len(list(islice(looks, 3))) == 3
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        process.stdout.close()


def test_watching_on_a_dumb_terminal_prints_look_after_look(cwd: Path):
    """Where nothing can be written over, one look follows the other."""
    terminal = Terminal("status", "--watch", "0.1", cwd=cwd, TERM="dumb")
    try:
        terminal.wait_for("Holdfast at ")
        terminal.wait_for("Holdfast at ", after=len("Holdfast at "))
        terminal.process.send_signal(signal.SIGINT)
        shown = terminal.finish()
    finally:
        terminal.stop()

    assert shown.code == 0
    assert "\x1b" not in shown.raw


def test_a_refused_look_ends_the_watch(cwd: Path):
    """A wrong token is no daemon that is gone: waiting would not help."""
    listening = ask(cwd, "GET", "/v1/admin/status")["listen"]
    address = "http://" + next(one for one in listening if one.startswith("tcp:"))[4:]

    done = holdfast("status", "--watch", "--connect", address, cwd=cwd, HOLDFAST_TOKEN="hf_wrong")

    assert_told_in_one_line(done, 1, "HOLDFAST_TOKEN or --token-file")


# bench


def test_the_bench_measures_and_leaves_nothing(cwd: Path):
    """Figures for four kinds of load; afterwards its collection is gone and no sale was counted."""
    sales = forked("stats", "--json", cwd=cwd).stdout

    done = forked("bench", "--seconds", "0.2", "--connections", "2", "--json", "--yes", cwd=cwd)

    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 4
    assert all(one["ops_per_s"] > 0 and one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] for one in results)
    assert results[2]["ops"] % 100 == 0
    assert ask(cwd, "GET", f"/v1/collections/{COLLECTION}")["items"] == []
    assert forked("stats", "--json", cwd=cwd).stdout == sales


def test_an_interrupted_bench_cleans_up(cwd: Path):
    """ctrl-C in the middle removes what was written."""
    process = subprocess.Popen(
        [*HOLDFAST, "bench", "--seconds", "60", "--connections", "2", "--yes"],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 20
    while not ask(cwd, "GET", f"/v1/collections/{COLLECTION}")["items"]:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)

    assert (process.returncode, told.strip()) == (130, "")
    assert ask(cwd, "GET", f"/v1/collections/{COLLECTION}")["items"] == []


def test_the_bench_does_not_meet_another(cwd: Path):
    """Records in its collection mean that another one runs, or was killed; they are left alone."""
    ask(cwd, "PUT", f"/v1/collections/{COLLECTION}/left", {})
    try:
        assert_told_in_one_line(forked("bench", "--yes", cwd=cwd), 1, f"holdfast collections {COLLECTION} rm --all")
    finally:
        ask(cwd, "POST", "/v1/batch", {"ops": [{"op": "record.delete", "collection": COLLECTION, "id": "left"}]})


def test_the_bench_keeps_away_from_a_busy_daemon(cwd: Path):
    """While others write, it refuses and says how much."""
    stopping = threading.Event()

    def write() -> None:
        while not stopping.is_set():
            ask(cwd, "PUT", "/v1/users/busy", {})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        done = holdfast("bench", cwd=cwd)
    finally:
        stopping.set()
        writer.join(10)

    assert_told_in_one_line(done, 1, "records a second just now", "--yes")


# Completion.


@pytest.fixture(scope="module")
def on_the_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which ``holdfast`` is this one."""
    directory = tmp_path_factory.mktemp("bin")
    script = directory / "holdfast"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m holdfast "$@"\n')
    script.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ``holdfast completion bash`` prints."""
    return forked("completion", "bash", cwd=tmp_path_factory.mktemp("nowhere")).stdout


def asked_of_a_shell(shell: list[str], script: str, cwd: Path, path: str) -> list[str]:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"needs {shell[0]}")
    done = subprocess.run(
        [*shell, script], cwd=cwd, env=environment(PATH=path), capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sta"], ["stats", "status"]),
        (["orders", "co"], ["complete"]),
        (["sessions", "get", "57"], ["573001", "573002"]),
        (["sessions", "--data-dir", "data", "rm", "573002"], ["573002"]),
        (["sessions", "--data-dir", "nowhere", "rm", "573002"], []),
        (["sessions", "get", "--connect", "odd://x", "57"], []),
        (["conversations", "show", "57"], ["573003"]),
        (["escalations", "show", ""], ["573003"]),
        (["conversations", "arch"], ["archive"]),
        (["stats", "st"], ["storage"]),
        (["collections", "comp"], ["completed-things"]),
        (["collections", "completed-things", "get", ""], ["c1"]),
        (["users", "put", "x", "{}", "--if-v"], ["--if-version"]),
        (["no-such-command", "x"], []),
    ],
)
def test_bash_completes(cwd: Path, on_the_path: str, bash_script: str, words: list[str], expected: list[str]):
    """Commands and options at once, ids and collections from the daemon; without one there is silence, not an error."""
    hostile = {"op": "session.put", "id": "57$(touch pwned)", "value": {}}
    ops = [hostile, *({"op": "session.put", "id": id, "value": {}} for id in ("573001", "573002"))]
    ask(cwd, "POST", "/v1/batch", {"ops": ops})
    ask(cwd, "PUT", "/v1/collections/completed-things/c1", {})
    ask(cwd, "POST", "/v1/conversations/573003/messages", {"role": "user", "content": "Hola"})
    ask(cwd, "POST", "/v1/escalations", {"conversation_id": "573003", "reason": "refund"})
    line = " ".join(f"'{word}'" for word in ["holdfast", *words])
    script = (
        f"{bash_script}\n"
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMPREPLY=()\n"
        "_holdfast_completion holdfast\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )

    assert sorted(asked_of_a_shell(["bash", "--norc", "-c"], script, cwd, on_the_path)) == expected


def test_fish_completes(cwd: Path, on_the_path: str):
    """The script is one that fish understands."""
    script = 'holdfast completion fish | source; complete -C "holdfast sta"'

    words = asked_of_a_shell(["fish", "--no-config", "-c"], script, cwd, on_the_path)

    assert {"stats", "status"} <= set(words)


def test_zsh_completes(cwd: Path, on_the_path: str):
    """The script is one that zsh understands; its completion functions stand in for a line editor."""
    script = (
        "compdef() { :; }\n"
        '_describe() { for one in "${completions_with_descriptions[@]}"; do print -r -- "${one%%:*}"; done; }\n'
        'eval "$(holdfast completion zsh)"\n'
        "words=(holdfast sta); CURRENT=2; _holdfast_completion\n"
    )

    assert sorted(asked_of_a_shell(["zsh", "-f", "-c"], script, cwd, on_the_path)) == ["stats", "status"]


# How things are written.


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3661, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_a_span_is_written_in_two_units(seconds: float, text: str):
    """As one would say it."""
    assert readable_span(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (150 << 10, "150 KiB"), (5 << 40, "5.0 TiB")],
)
def test_a_size_is_written_with_its_unit(size: int, text: str):
    """As one would say it."""
    assert readable_size(size) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ñandú 👩\u200d🚀", "Ñandú 👩\u200d🚀"),
        ("a\x1b[2Jb", "a\\u001b[2Jb"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("a\nb\u2028c\x9b", "a\\u000ab\\u2028c\\u009b"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_would_move_the_cursor_is_escaped(text: str, shown: str):
    """Names with emoji stay, control characters and changes of direction do not reach the terminal."""
    assert printable(text) == shown


def test_wide_characters_are_cut_by_the_columns_they_take():
    """A character of two columns is not taken for one."""
    assert shortened("日本語", 4) == "日…"
    assert shortened("abcdef", 4) == "abc…"


def test_a_bar_shows_whatever_is_more_than_nothing(monkeypatch: pytest.MonkeyPatch):
    """A small day is not mistaken for an empty one."""
    monkeypatch.setattr("holdfast.cli.show.blocks_are_shown", lambda: True)

    assert [bar(share, 4) for share in (0, 0.001, 0.5, 1)] == ["", "▏", "██", "████"]
