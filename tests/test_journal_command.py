"""The commands that show the journal: every event that is there, as far back as it goes, with what cannot be read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.clock import format_ms
from holdfast.ops import Batch, OrderPut, SessionPut, UserPut
from tests.cli_harness import assert_told_in_one_line, forked
from tests.engine_harness import NOW_MS, HandClock, do, running

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events 1 to 4 flushed and kept for readers, 5 to 7 behind them, an hour between one and the next; 7 is a batch."""
    data_dir = tmp_path_factory.mktemp("made") / "data"
    clock = HandClock()
    with running(data_dir, clock=clock, journal_keep=1 << 20) as engine:
        for number in range(1, 7):
            do(engine, UserPut(id=f"u{number}", value={"street": f"Calle {50 + number}"}))
            clock.advance(HOUR_S)
            if number == 4:
                engine.flush("api")
        ops = [SessionPut(id="573", value={"n": 1}), OrderPut(id="1001", value={"recipientPhone": "573"})]
        engine.submit_batch(Batch(ops=list(ops), atomic=True)).wait()
    return data_dir


def journal(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, *rest = arguments
    return forked("journal", command, "--data-dir", data_dir, *rest, cwd=data_dir)


def seqs(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [json.loads(line)["seq"] for line in done.stdout.splitlines()]


def at(hours: int) -> str:
    return format_ms(NOW_MS + hours * 3_600_000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dump"], [5, 6, 7]),
        (["dump", "--all"], [1, 2, 3, 4, 5, 6, 7]),
        (["dump", "--all", "--after", "3"], [4, 5, 6, 7]),
        (["dump", "--after", "5"], [6, 7]),
        (["dump", "--since-seq", "6"], [6, 7]),
        (["dump", "--all", "--until", at(1)], [1, 2]),
        (["dump", "--all", "--until", "2026-11-21T02:30:00-05:00"], [1, 2]),
        (["dump", "--op", "order.put"], [7]),
        (["dump", "--all", "--id", "u2", "--id", "u6"], [2, 6]),
        (["grep", "Calle 5[56]"], [5, 6]),
        (["grep", "--all", "(?i)CALLE 5[16]"], [1, 6]),
        (["grep", "--all", "--op", "user.put", "Calle 5[16]", "--after", "1"], [6]),
        (["grep", "nobody"], []),
    ],
    ids=str,
)
def test_events_are_chosen(made: Path, arguments: list[str], expected: list[int]) -> None:
    """By place, by time, by op and id, and by what stands in them."""
    done = journal(made, *arguments)

    assert (done.returncode, done.stderr) == (0, "")
    assert seqs(done) == expected


def test_stat_counts(made: Path) -> None:
    """Events and bytes add up, by op and by hour; ends and the largest are named."""
    done = journal(made, "stat", "--all", "--json")
    shown = journal(made, "stat", "--all")

    found = json.loads(done.stdout)
    assert found["events"] == 7 == sum(one["events"] for one in found["hours"].values())
    assert found["bytes"] == sum(one["bytes"] for one in found["ops"].values())
    assert {op: one["events"] for op, one in found["ops"].items()} == {"user.put": 6, "batch": 1}
    assert found["oldest"] == {"seq": 1, "at": at(0)}
    assert found["newest"]["seq"] == 7
    assert found["largest"][0]["op"] == "batch"
    assert len(found["hours"]) == 7
    assert "7 events" in shown.stdout and "user.put" in shown.stdout


def test_a_restored_state_is_no_missing_event(tmp_path: Path) -> None:
    """It stands at a number that no event has; further back nothing is missing."""
    data_dir = tmp_path / "data"
    with running(data_dir, journal_keep=1 << 20) as engine:
        do(engine, UserPut(id="u1", value={"n": 1}))
        engine.backup("api")
        do(engine, UserPut(id="u2", value={"n": 2}))
        engine.flush("api")
    assert forked("restore", "--data-dir", data_dir, "--yes", cwd=tmp_path).returncode == 0
    with running(data_dir, journal_keep=1 << 20) as engine:
        do(engine, UserPut(id="u3", value={"n": 3}))
        engine.flush("api")

    done = journal(data_dir, "dump", "--all")

    assert (done.returncode, done.stderr) == (0, "")
    assert seqs(done) == [1, 2, 4]


def test_stat_of_nothing(tmp_path: Path) -> None:
    """A journal without events is no failure."""
    with running(tmp_path / "data"):
        pass

    done = journal(tmp_path / "data", "stat")
    as_json = journal(tmp_path / "data", "stat", "--json")

    assert done.stdout.startswith("0 events")
    assert json.loads(as_json.stdout)["oldest"] is None


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """The third of five events is damaged, before and behind the last flush."""
    data_dir = tmp_path / "data"
    with running(data_dir, journal_keep=1 << 20) as engine:
        for number in range(1, 11):
            do(engine, UserPut(id=f"u{number}", value={"n": number}))
            if number == 5:
                engine.flush("api")
    for segment in (data_dir / "journal").rglob("*.jsonl"):
        segment.write_bytes(segment.read_bytes().replace(b'"u3"', b'"v3"').replace(b'"u8"', b'"v8"'))
    yield data_dir


@pytest.mark.parametrize("arguments", [["dump"], ["grep", "user"], ["stat", "--json"]], ids=" ".join)
def test_what_cannot_be_read_is_told(damaged: Path, arguments: list[str]) -> None:
    """The place of the damage with its offset, and which events are missing; the others are shown, exit code 1."""
    done = journal(damaged, *arguments)
    everything = journal(damaged, *arguments, "--all")

    assert done.returncode == everything.returncode == 1
    assert "00000000000000000006.jsonl: byte " in done.stderr and "checksum does not hold" in done.stderr
    assert "events 3 to 3 are missing" in everything.stderr
    if arguments[0] != "stat":
        assert seqs(done) == [6, 7, 9, 10]
        assert seqs(everything) == [1, 2, 4, 5, 6, 7, 9, 10]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["grep", "("], "no regular expression"),
        (["dump", "--until", "soon"], "--until"),
        (["dump", "--after", "-1"], "--after"),
        (["grep"], "PATTERN"),
        (["burn"], "burn"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_told(made: Path, arguments: list[str], part: str) -> None:
    """In one line, with exit code 2."""
    assert_told_in_one_line(journal(made, *arguments), 2, part)


def test_looking_changes_nothing(made: Path) -> None:
    """Not even a time of change."""
    before = {path: path.lstat().st_mtime_ns for path in made.rglob("*")}

    journal(made, "stat", "--all")
    journal(made, "grep", "x")

    assert {path: path.lstat().st_mtime_ns for path in made.rglob("*")} == before
