"""``holdfast restore``, on a stopped directory and through a daemon that stays."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from holdfast.care.backup_set import list_sets
from holdfast.clock import format_ms
from holdfast.recovery import open_engine
from tests.cli_harness import Terminal, assert_told_in_one_line, forked
from tests.crash.harness import Served, contents, serving
from tests.engine_harness import Log
from tests.restore_harness import all_of, change, copy_of, pack_set, settings_of


class Lived(NamedTuple):
    """A directory with a backup, a moment after it and a later present, in the time of the system.

    Attributes:
        at: the moment, ISO 8601.
        seen: what was there then.
        last: what is there now.
    """

    path: Path
    at: str
    backed_up: dict[str, Any]
    seen: dict[str, Any]
    last: dict[str, Any]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    path = tmp_path_factory.mktemp("lived") / "data"
    backed_up = _lived_on(path, range(16))
    pack_set(path, time.time_ns() // 1_000_000)
    time.sleep(0.01)
    engine = open_engine(settings_of(path), log=Log())
    for number in range(16, 28):
        change(engine, number)
    seen, at = all_of(engine), format_ms(engine.now_ms())
    time.sleep(0.01)
    for number in range(28, 46):
        change(engine, number)
    last = all_of(engine)
    engine.close()
    return Lived(path, at, backed_up, seen, last)


def _lived_on(path: Path, numbers: range) -> dict[str, Any]:
    engine = open_engine(settings_of(path), log=Log())
    for number in numbers:
        change(engine, number)
    seen = all_of(engine)
    engine.close()
    return seen


@pytest.fixture
def directory(lived: Lived, tmp_path: Path) -> Lived:
    """A copy of it that may be changed."""
    return lived._replace(path=copy_of(lived.path, tmp_path / "data"))


@pytest.fixture
def served(directory: Lived) -> Iterator[Served]:
    """A daemon on it."""
    with serving(directory.path) as served:
        yield served


def seen_in(path: Path) -> dict[str, Any]:
    """What a start on the directory shows."""
    engine = open_engine(settings_of(path), log=Log())
    try:
        assert engine.degraded == []
        return all_of(engine)
    finally:
        engine.close(flush=False)


def restore(lived: Lived, *arguments: str) -> Any:
    return forked("restore", "--data-dir", lived.path, *arguments, cwd=lived.path.parent)


def test_a_dry_run_shows_the_table_and_changes_nothing(directory: Lived):
    """Each collection now and then, what is added, changed and removed; not a byte is different afterwards."""
    before = contents(directory.path)

    done = restore(directory, "--at", directory.at, "--dry-run")
    as_json = restore(directory, "--at", directory.at, "--dry-run", "--json")

    assert done.returncode == as_json.returncode == 0, done.stderr + as_json.stderr
    assert "Removed" in done.stdout and "notes" in done.stdout and "sales figures change" in done.stdout
    rows = {row["collection"]: row for row in json.loads(as_json.stdout)["plan"]["rows"]}
    assert rows["notes"]["then"] == len(directory.seen["notes"])
    assert rows["notes"]["removed"] == len(directory.last["notes"].keys() - directory.seen["notes"].keys())
    assert contents(directory.path) == before


def test_a_stopped_directory_goes_back_to_a_moment(directory: Lived):
    """It says what it did and proves it by counts and checksums; the present is a backup."""
    done = restore(directory, "--at", directory.at, "--yes")

    assert done.returncode == 0, done.stderr
    assert "proved: " in done.stdout and "checksums" in done.stdout
    assert len(list_sets(directory.path)) == 3
    assert seen_in(directory.path) == directory.seen


def test_it_asks_before_it_restores(directory: Lived):
    """On a terminal it shows the table and waits; without one it wants --yes; no answer but yes changes anything."""
    before = contents(directory.path)
    asked = restore(directory, "--at", directory.at)
    terminal = Terminal("restore", "--data-dir", directory.path, cwd=directory.path.parent)

    terminal.wait_for("Restore this?")
    terminal.type("n\n")
    shown = terminal.finish()

    assert_told_in_one_line(asked, 2, "--yes")
    assert shown.code == 1 and "Collection" in shown.text
    assert contents(directory.path) == before


def test_restoring_beside_leaves_the_present_alone(directory: Lived, tmp_path: Path):
    """--into makes a directory of its own, and refuses one that holds something."""
    before = contents(directory.path)

    done = restore(directory, "latest", "--into", str(tmp_path / "beside"))
    again = restore(directory, "latest", "--into", str(tmp_path / "beside"))

    assert done.returncode == 0, done.stderr
    assert seen_in(tmp_path / "beside") == directory.backed_up
    assert_told_in_one_line(again, 1, "empty or missing")
    assert contents(directory.path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--at", "2020-01-01T00:00:00Z", "--yes"], 1, "the oldest that a backup reaches"),
        (["--at", "2099-01-01T00:00:00Z", "--yes"], 1, "a moment that is over"),
        (["--at", "yesterday", "--yes"], 1, "ISO 8601"),
        (["2020-01-01T000000.000Z", "--yes"], 1, "there are"),
        (["--file", "sales_stats.json", "--yes"], 1, "restore everything"),
        (["--session", "nobody", "--yes"], 1, "nobody"),
        (["--session", "a", "--user", "b"], 2, "one of"),
        (["--into", "x", "--session", "a"], 2, "--into"),
    ],
)
def test_what_cannot_be_restored_is_told_in_one_line(lived: Lived, arguments: list[str], code: int, says: str):
    """With the reason and what to do; nothing is changed."""
    before = contents(lived.path)

    done = restore(lived, *arguments)

    assert_told_in_one_line(done, code, says)
    after = contents(lived.path)
    assert {name: raw for name, raw in after.items() if not name.startswith("backups")} == {
        name: raw for name, raw in before.items() if not name.startswith("backups")
    }


def test_one_session_comes_back_on_a_stopped_directory(directory: Lived):
    """Nothing else changes."""
    id = next(id for id, one in directory.seen["sessions"].items() if directory.last["sessions"][id] != one)

    done = restore(directory, "--at", directory.at, "--session", id, "--yes", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["part"]["changed"] == 1
    found = seen_in(directory.path)
    assert found["sessions"][id][1] == directory.seen["sessions"][id][1]
    assert found["users"] == directory.last["users"]


def test_a_daemon_goes_back_and_stays(directory: Lived, served: Served):
    """The same process, the same socket, no connection refused meanwhile; what was there before is a backup."""
    pid, refused, answers = served.pid, [], []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            try:
                with served.connect() as client:
                    answers.append(client.ask("GET", "/v1/sessions")[0])
            except OSError as error:
                refused.append(error)
            time.sleep(0.01)

    looking = threading.Thread(target=look)
    looking.start()
    done = restore(directory, "--at", directory.at, "--yes")
    is_over.set()
    looking.join()

    assert done.returncode == 0, done.stderr
    assert "proved: " in done.stdout
    assert served.pid == pid and served.process.poll() is None
    assert not refused and {200, 503} >= set(answers)
    with served.connect() as client:
        assert client.ask("GET", "/readyz")[0] == 200
        status, raw = client.ask("GET", "/v1/admin/restore")
        assert status == 200 and json.loads(raw)["state"] == "completed"
        assert client.ask("PUT", "/v1/sessions/after", b"{}")[0] == 201
        assert client.ask("DELETE", "/v1/sessions/after")[0] == 204
    assert served.stop() == 0
    assert seen_in(directory.path) == directory.seen
    names = [event["event"] for event in served.events()]
    assert names.count("restore.started") == names.count("restore.completed") == 1


def test_a_daemon_puts_a_conversation_back(directory: Lived, served: Served):
    """By ordinary ops, without a pause."""
    id = next(iter(directory.seen["conversations"]))

    done = restore(directory, "--at", directory.at, "--conversation", id, "--yes")

    assert done.returncode == 0, done.stderr
    assert "1 changed" in done.stdout
    assert "restore.started" not in [event["event"] for event in served.events()]
    assert served.stop() == 0
    assert seen_in(directory.path)["conversations"][id][1:] == directory.seen["conversations"][id][1:]


def test_a_stop_during_a_restore_leaves_one_state_whole(directory: Lived, served: Served):
    """SIGTERM while it prepares: it stops in time, the old state is there, and the next start has no leftovers."""
    name = list_sets(directory.path)[0].name
    with served.connect() as client:
        begun, _ = client.ask("POST", "/v1/admin/restore", json.dumps({"set": name}).encode())
        second, _ = client.ask("POST", "/v1/admin/restore", json.dumps({"set": name}).encode())

    code = served.stop()

    assert (begun, second) == (202, 409)
    assert code == 0
    assert seen_in(directory.path) in (directory.last, directory.backed_up)
    assert not {"restore", "restore.json"} & set(os.listdir(directory.path))


def test_what_a_daemon_cannot_restore_is_no_fault_of_it(directory: Lived, served: Served):
    """A spoilt backup is a conflict with the reason; nothing is changed, it goes on serving."""
    found = list_sets(directory.path)[0]
    spoilt = found.path / "chat_sessions.json.zst"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])

    with served.connect() as client:
        status, raw = client.ask("POST", "/v1/admin/restore", json.dumps({"set": found.name}).encode())
        neither, _ = client.ask("POST", "/v1/admin/restore", b"{}")
        latest, _ = client.ask("POST", "/v1/admin/restore", b'{"set": "latest"}')
        sessions, _ = client.ask("GET", "/v1/sessions")

    assert (status, neither, latest, sessions) == (409, 422, 422, 200)
    assert "chat_sessions.json" in json.loads(raw)["detail"]
