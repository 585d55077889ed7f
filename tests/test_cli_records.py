"""The commands for records, against a running daemon."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest

from holdfast.cli.connection import Daemon
from holdfast.client.address import address_of
from tests.cli_harness import (
    HOLDFAST,
    Terminal,
    assert_told_in_one_line,
    daemon_in,
    environment,
    shown_on_a_terminal,
)
from tests.cli_harness import forked as holdfast


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a daemon on its ``data``; each test has ids of its own."""
    directory = tmp_path_factory.mktemp("records")
    with daemon_in(directory):
        yield directory


def at(cwd: Path) -> Daemon:
    """The daemon of *cwd*, asked beside the command line."""
    return Daemon(address_of(f"unix:{cwd / 'data' / 'holdfast.sock'}"), None, None)


def stored(cwd: Path, *segments: str) -> Any:
    """The value of a record."""
    return at(cwd).fetch("GET", "/v1/" + "/".join(quote(segment, safe="") for segment in segments)).fields()


def batch(cwd: Path, ops: list[dict[str, Any]]) -> None:
    """Do many ops at once."""
    at(cwd).fetch("POST", "/v1/batch", body=orjson.dumps({"ops": ops}))


# One record.


@pytest.mark.parametrize("group", ["sessions", "orders", "users", "collections notes"])
def test_a_record_is_put_patched_read_and_removed(cwd: Path, group: str):
    """The five verbs work alike for every kind of record."""
    words = group.split()
    value = '{"recipientPhone": "57301", "a": 1, "b": 2}' if group == "orders" else '{"a": 1, "b": 2}'

    put = holdfast(*words, "put", "57301", value, cwd=cwd)
    patched = holdfast(*words, "patch", "57301", '{"a": null, "c": 3}', "--json", cwd=cwd)
    value_then = stored(cwd, *words, "57301")
    removed = holdfast(*words, "rm", "57301", cwd=cwd)
    gone = holdfast(*words, "get", "57301", cwd=cwd)

    assert (put.returncode, patched.returncode, removed.returncode) == (0, 0, 0), put.stderr + patched.stderr
    assert "57301 stored: version 1, seq " in put.stdout
    assert json.loads(patched.stdout)["version"] == 2
    assert {"b": 2, "c": 3}.items() <= value_then.items()
    assert "a" not in value_then
    assert removed.stdout.startswith("removed 1 ")
    assert_told_in_one_line(gone, 1, "'notes'" if words[-1] == "notes" else "'57301'")


def test_values_come_from_stdin_and_files(cwd: Path):
    """``-`` reads stdin, ``@FILE`` the file; both are stored as they stand."""
    (cwd / "value.json").write_text('{"from": "file", "money": "1.50"}')

    by_stdin = holdfast("users", "put", "v1", "-", cwd=cwd, stdin='{"from": "stdin"}')
    by_file = holdfast("users", "put", "v2", "@value.json", cwd=cwd)

    assert (by_stdin.returncode, by_file.returncode) == (0, 0), by_stdin.stderr + by_file.stderr
    assert stored(cwd, "users", "v1")["from"] == "stdin"
    assert stored(cwd, "users", "v2")["money"] == "1.50"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{", "at line 1, column 2"),
        ('{"a": 1,\n "b": }', "at line 2, column 7"),
        ("", "VALUE is not JSON"),
        ("[1]", "expected a JSON object, found an array"),
        ('{"a": 1, "a": 2}', "a"),
        ("@missing.json", "missing.json cannot be read"),
        ("@.", "cannot be read"),
        ("-", "stdin is not JSON"),
    ],
)
def test_a_malformed_value_is_told_with_its_place(cwd: Path, value: str, told: str):
    """Line and column, or the file that cannot be read; nothing is stored."""
    done = holdfast("users", "put", "malformed", value, cwd=cwd)

    assert done.returncode in (1, 2)
    assert_told_in_one_line(done, done.returncode, told)
    assert holdfast("users", "get", "malformed", cwd=cwd).returncode == 1


def test_a_version_guards_a_change(cwd: Path):
    """``--if-version 0`` creates only, ``--if-version N`` changes that version only."""
    first = holdfast("users", "put", "guarded", "{}", "--if-version", "0", cwd=cwd)
    again = holdfast("users", "put", "guarded", "{}", "--if-version", "0", cwd=cwd)
    stale = holdfast("users", "patch", "guarded", "{}", "--if-version", "7", cwd=cwd)
    removed = holdfast("users", "rm", "guarded", "--if-version", "7", cwd=cwd)

    assert first.returncode == 0, first.stderr
    assert_told_in_one_line(again, 1, "version")
    assert_told_in_one_line(stale, 1, "version")
    assert_told_in_one_line(removed, 1, "version")


def test_get_prints_what_is_stored(cwd: Path):
    """In a pipe byte for byte; with its version in the form of a list."""
    holdfast("users", "put", "exact", '{"n": 1.5, "big": 9007199254740993, "ñ": "😀"}', cwd=cwd)

    value = holdfast("users", "get", "exact", cwd=cwd)
    as_json = holdfast("users", "get", "exact", "--json", cwd=cwd)
    whole = holdfast("users", "get", "exact", "--with-version", cwd=cwd)

    assert '"n":1.5,"big":9007199254740993,"ñ":"😀"' in value.stdout
    assert value.stdout == as_json.stdout
    assert whole.stdout == f'{{"id":"exact","version":1,"value":{value.stdout.strip()}}}\n'


def test_get_is_indented_on_a_terminal(cwd: Path):
    """People get a key a line, with colours; an escape sequence in a value does not reach their terminal."""
    holdfast("users", "put", "hostile", '{"name": "\u009b31m\u202eAna"}', cwd=cwd)

    shown = shown_on_a_terminal("users", "get", "hostile", cwd=cwd)

    assert '\n  "name": "\\u009b31m\\u202eAna"' in shown.text
    assert "\x1b[" in shown.raw
    assert "\u009b" not in shown.raw


def test_no_color_is_honoured(cwd: Path):
    """NO_COLOR leaves the layout and drops the colours."""
    holdfast("users", "put", "plain", "{}", cwd=cwd)

    for arguments in (("users", "get", "plain"), ("users", "list"), ("status",), ("stats",)):
        assert "\x1b[" not in shown_on_a_terminal(*arguments, cwd=cwd, NO_COLOR="1").raw, arguments


def test_options_reach_the_daemon(cwd: Path):
    """Idempotency key and durability are those of HTTP; a repeat changes nothing."""
    how = ("--idempotency-key", "k-1", "--durability", "everysec", "--json")
    first = holdfast("users", "put", "once", '{"a": 1}', *how, cwd=cwd)
    again = holdfast("users", "put", "once", '{"a": 1}', *how, cwd=cwd)

    assert first.stdout == again.stdout != ""
    assert json.loads(holdfast("users", "get", "once", "--with-version", cwd=cwd).stdout)["version"] == 1


def test_the_daemon_may_be_named_before_the_verb(cwd: Path, tmp_path: Path):
    """``users --data-dir D list`` means what ``users list --data-dir D`` does."""
    for arguments in (
        ("users", "--data-dir", str(cwd / "data"), "list"),
        ("users", "list", "--data-dir", str(cwd / "data")),
        ("collections", "--connect", f"unix:{cwd}/data/holdfast.sock", "list"),
        ("collections", "--connect", f"unix:{cwd}/data/holdfast.sock"),
    ):
        assert holdfast(*arguments, cwd=tmp_path).returncode == 0, arguments
    both = holdfast("users", "--data-dir", "d", "list", "--connect", "unix:/x", cwd=tmp_path)
    assert_told_in_one_line(both, 2, "not both")


# Sessions and orders.


def test_a_lease_is_taken_used_renewed_and_released(cwd: Path):
    """Whoever has the generation writes; the others are told whose lease it is."""
    holdfast("sessions", "put", "leased", "{}", cwd=cwd)

    taken = holdfast("sessions", "lease", "leased", "--for", "30s", "--owner", "ana", "--json", cwd=cwd)
    generation = str(json.loads(taken.stdout)["generation"])
    other = holdfast("sessions", "put", "leased", "{}", cwd=cwd)
    other_removes = holdfast("sessions", "rm", "leased", cwd=cwd)
    holder = holdfast("sessions", "patch", "leased", "{}", "--lease", generation, cwd=cwd)
    renewed = holdfast("sessions", "lease", "leased", "--renew", generation, cwd=cwd)
    released = holdfast("sessions", "release", "leased", generation, cwd=cwd)
    expired = holdfast("sessions", "patch", "leased", "{}", "--lease", generation, cwd=cwd)

    assert_told_in_one_line(other, 1, "leased by ana until")
    assert_told_in_one_line(other_removes, 1, "leased by ana until")
    assert holder.returncode == 0, holder.stderr
    assert f"as generation {generation}" in renewed.stdout
    assert released.returncode == 0, released.stderr
    assert_told_in_one_line(expired, 1, "has ended; take a new one")


def test_a_session_is_touched(cwd: Path):
    """``touch`` moves the last activity and nothing else; ``--ttl`` travels with it."""
    holdfast("sessions", "put", "touched", '{"lastActivity": "2026-11-20T00:00:00Z"}', "--ttl", "90d", cwd=cwd)

    done = holdfast("sessions", "touch", "touched", "--ttl", "2h", cwd=cwd)
    wrong = holdfast("sessions", "touch", "touched", "--ttl", "soon", cwd=cwd)

    assert "version 2" in done.stdout, done.stderr
    assert stored(cwd, "sessions", "touched")["lastActivity"] > "2026-11-21"
    assert_told_in_one_line(wrong, 1, "soon")


def test_orders_are_completed_and_cancelled(cwd: Path):
    """Revenue is exact; a second completion counts nothing again; a closed order is told."""
    for id in ("1001", "1002"):
        holdfast("orders", "put", id, '{"recipientPhone": "57301"}', cwd=cwd)

    completed = holdfast("orders", "complete", "1001", "--revenue", "84900.50", cwd=cwd)
    again = holdfast("orders", "complete", "1001", "--revenue", "84900.50", cwd=cwd)
    cancelled = holdfast("orders", "cancel", "1002", "--reason", "paid twice", cwd=cwd)
    late = holdfast("orders", "complete", "1002", cwd=cwd)
    odd = holdfast("orders", "complete", "1001", "--revenue", "a lot", cwd=cwd)

    assert (completed.returncode, again.returncode) == (0, 0), completed.stderr + again.stderr
    assert stored(cwd, "orders", "1002")["status"] == "cancelled", cancelled.stderr
    assert_told_in_one_line(late, 1, "cancelled")
    assert_told_in_one_line(odd, 2, "expected an amount such as 84900.50")
    assert '"allTimeRevenue": 84900.50' in holdfast("stats", "--json", cwd=cwd).stdout


# Lists.


@pytest.fixture(scope="module")
def many(cwd: Path) -> Path:
    """The same daemon with 2,500 records in the collection ``many``."""
    for first in range(0, 2500, 500):
        batch(
            cwd,
            [
                {"op": "record.put", "collection": "many", "id": f"m{number:04}", "value": {"note": "x" * 300}}
                for number in range(first, first + 500)
            ],
        )
    return cwd


def test_a_list_is_limited_unless_all_is_asked_for(many: Path):
    """100 by default, any number by ``--limit``, every one exactly once by ``--all``, through all pages."""

    def ids(*how: str) -> list[str]:
        done = holdfast("collections", "many", "list", "--json", *how, cwd=many)
        assert done.returncode == 0, done.stderr
        return [item["id"] for item in json.loads(done.stdout)]

    assert len(ids()) == 100
    assert len(ids("--limit", "1001")) == 1001
    assert sorted(ids("--all")) == [f"m{number:04}" for number in range(2500)]


def test_a_json_list_is_an_array_with_a_record_a_line(many: Path):
    """Any tool reads it, and line tools find a record on one line; an empty one is an array as well."""
    some = holdfast("collections", "many", "list", "--limit", "3", "--json", cwd=many)
    none = holdfast("collections", "many", "list", "--since", "2999-01-01T00:00:00Z", "--json", cwd=many)

    opening, *lines, closing = some.stdout.splitlines()
    assert (opening, closing) == ("[", "]")
    assert [set(json.loads(line.rstrip(","))) for line in lines] == [{"id", "version", "value"}] * 3
    assert json.loads(none.stdout) == []


@pytest.mark.parametrize("how", [["--json"], []])
def test_a_list_into_a_closed_pipe_is_quiet(many: Path, how: list[str]):
    """``list --all | head -1`` shows the line and leaves no traceback."""
    done = subprocess.Popen(
        [*HOLDFAST, "collections", "many", "list", "--all", *how],
        cwd=many,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.stdout is not None and done.stderr is not None
    done.stdout.readline()
    done.stdout.close()

    assert done.stderr.read() == b""
    assert done.wait(30) == 1


def test_a_table_fits_a_narrow_terminal(many: Path):
    """At 80 columns no line is longer and no id is cut; what is left over is told."""
    shown = shown_on_a_terminal("collections", "many", "list", "--limit", "5", cwd=many)

    title, *rows, more = shown.text.rstrip("\n").split("\n")
    assert title.split() == ["id", "version", "value"]
    assert all(len(row) <= 80 and row.endswith("…") for row in rows)
    assert all(row.split()[:2] == [row[:5], "1"] and row[:5].strip("m").isdigit() for row in rows)
    assert len(rows) == 5
    assert "--all" in more


def test_a_table_in_a_pipe_is_whole(many: Path):
    """Nothing is cut where a program reads."""
    done = holdfast("collections", "many", "list", "--limit", "2", cwd=many, COLUMNS="40")

    assert [len(row) > 300 for row in done.stdout.splitlines()] == [False, True, True]


def test_lists_are_filtered_by_state_and_time(cwd: Path):
    """``--state`` and ``--since``, as a span or in ISO 8601, narrow the list; odd ones are told."""
    holdfast("sessions", "put", "f1", '{"currentState": "filtered"}', cwd=cwd)
    holdfast("sessions", "put", "f2", '{"currentState": "filtered", "lastActivity": "2026-11-20T00:00:00Z"}', "--ttl", "9000d", cwd=cwd)  # fmt: skip

    def ids(*how: str) -> list[str]:
        listed = holdfast("sessions", "list", "--state", "filtered", "--json", *how, cwd=cwd)
        return sorted(item["id"] for item in json.loads(listed.stdout))

    assert ids() == ["f1", "f2"]
    assert ids("--since", "2h") == ["f1"]
    assert ids("--since", "2026-11-19T00:00:00Z") == ["f1", "f2"]
    assert_told_in_one_line(holdfast("sessions", "list", "--since", "yesterday", cwd=cwd), 1, "yesterday")
    assert_told_in_one_line(holdfast("users", "list", "--state", "x", cwd=cwd), 2, "No such option")


def test_the_table_of_sessions_shows_state_and_age(cwd: Path):
    """Columns of their own for what an operator looks for, not repeated in the value."""
    holdfast("sessions", "put", "573009999999", '{"currentState": "columned", "name": "Ana"}', cwd=cwd)

    shown = shown_on_a_terminal("sessions", "list", "--state", "columned", cwd=cwd)

    row = shown.text.split("\n")[1]
    assert row.startswith("573009999999        1  columned  ")
    assert row.split(" ago ")[1].strip() == '{"name":"Ana"}'


def test_a_server_with_smaller_pages_is_listed_as_well(tmp_path: Path):
    """``limits.page`` below what we ask for is no failure."""
    with daemon_in(tmp_path):
        (tmp_path / "holdfast.toml").write_text("[limits]\npage = 3\n")
        holdfast("reload", "--data-dir", "data", cwd=tmp_path)
        batch(tmp_path, [{"op": "user.put", "id": f"u{number}", "value": {}} for number in range(8)])

        done = holdfast("users", "list", "--all", "--json", "--data-dir", "data", cwd=tmp_path)

    assert len(json.loads(done.stdout)) == 8, done.stderr


# Collections.


def test_collections_are_listed_with_their_counts(cwd: Path):
    """By ``collections`` and ``collections list``, for people and programs."""
    holdfast("collections", "counted", "put", "a", "{}", cwd=cwd)

    assert "counted" in holdfast("collections", cwd=cwd).stdout
    listed = json.loads(holdfast("collections", "list", "--json", cwd=cwd).stdout)
    assert {"name": "counted", "count": 1} in listed


@pytest.mark.parametrize("verb", [["list"], ["get", "n1"], ["rm", "--all", "--yes"]])
def test_a_mistyped_collection_is_told_with_those_that_exist(cwd: Path, verb: list[str]):
    """A name that nobody has used is no empty list."""
    holdfast("collections", "contacts", "put", "c1", "{}", cwd=cwd)

    done = holdfast("collections", "contcats", *verb, cwd=cwd)

    assert_told_in_one_line(done, 1, "no collection 'contcats'", "contacts")


def test_a_name_that_no_collection_may_have_is_told(cwd: Path):
    """The rule for names is the daemon's."""
    for name in ("../x", "Notes", "sessions", "a b"):
        assert_told_in_one_line(holdfast("collections", name, "put", "x", "{}", cwd=cwd), 1, "a collection's name is")


# Removing.


def test_several_are_removed_and_those_that_are_not_there_told(cwd: Path):
    """One bad id does not keep the others; the exit code notices."""
    for id in ("r1", "r2"):
        holdfast("users", "put", id, "{}", cwd=cwd)

    done = holdfast("users", "rm", "r1", "nobody", "r2", "--json", cwd=cwd)

    assert_told_in_one_line(done, 1, "no user 'nobody'")
    answer = json.loads(done.stdout)
    assert (answer["removed"], answer["refused"][0]["code"]) == (2, "not_found")


def test_all_are_removed_only_when_that_is_confirmed(cwd: Path):
    """Without a terminal ``--all`` needs ``--yes`` and never waits; nothing is removed before."""
    batch(
        cwd, [{"op": "record.put", "collection": "doomed", "id": f"d{number}", "value": {}} for number in range(1200)]
    )

    unconfirmed = holdfast("collections", "doomed", "rm", "--all", cwd=cwd)
    confirmed = holdfast("collections", "doomed", "rm", "--all", "--yes", cwd=cwd)

    assert_told_in_one_line(unconfirmed, 2, "1,200 records", "--yes")
    assert confirmed.stdout == "removed 1,200 records\n"
    assert "doomed" not in holdfast("collections", cwd=cwd).stdout


@pytest.mark.parametrize(("answer", "code", "left"), [("n\r", 130, True), ("y\r", 0, False)])
def test_a_person_is_asked(cwd: Path, answer: str, code: int, left: bool):
    """On a terminal ``rm --all`` asks, and no is no."""
    holdfast("collections", "asked", "put", "a", "{}", cwd=cwd)
    terminal = Terminal("collections", "asked", "rm", "--all", cwd=cwd)
    terminal.wait_for("[y/N]")

    terminal.type(answer)

    assert terminal.finish().code == code
    assert ("asked" in holdfast("collections", cwd=cwd).stdout) is left


@pytest.mark.parametrize(
    "arguments", [[], ["a", "--all"], ["a", "b", "--if-version", "1"], ["--all", "--yes", "--idempotency-key", "k"]]
)
def test_an_unclear_removal_is_refused(cwd: Path, arguments: list[str]):
    """Ids or all; conditions belong to one id."""
    assert_told_in_one_line(holdfast("users", "rm", *arguments, cwd=cwd), 2, "--help")


def test_long_work_shows_progress(many: Path, tmp_path: Path):
    """With the rows going to a file, a bar on the terminal's stderr says how far a slow list is."""
    arrived = threading.Event()
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)

    def read_slowly() -> None:
        with fifo.open("rb") as pipe:
            while pipe.read(20_000):
                arrived.wait(0.05)

    reader = threading.Thread(target=read_slowly, daemon=True)
    reader.start()
    shown = Terminal("collections", "many", "list", "--all", "--json", cwd=many, stdout=fifo).finish()
    arrived.set()
    reader.join(10)

    assert shown.code == 0
    assert "reading collections many" in shown.text
    assert "/2500" in shown.text
