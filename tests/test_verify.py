"""Verifying: everything that can be wrong with a data directory is found, and nothing is changed by looking."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from holdfast.care.backup_set import BackupSet, Proof, encode_set_manifest, list_sets, write_proof
from holdfast.care.findings import Finding, Report
from holdfast.care.history_follower import PACK_AFTER_S
from holdfast.care.verify import Daily, verify, verify_running
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import MANIFEST
from holdfast.errors import Conflict, DataRefused, DirectoryLocked, Unavailable
from holdfast.ops import MessageAppend, SessionPut, UserPut
from tests.cli_harness import assert_told_in_one_line, daemon_in, forked
from tests.damage_harness import (
    GOOD_TO_KNOW,
    WRONG,
    cut,
    edit_archive,
    flip,
    life,
    make_directory,
    newest_segment,
    picture,
)
from tests.engine_harness import HandClock, Log, do, opened, running, settings_of

FLUSHES, LOOKS_MAX = 12, 400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copied, never changed."""
    return make_directory(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data", copy_function=shutil.copy2))


def looked(data_dir: Path, *, deep: bool = False) -> Report:
    """What is found in *data_dir*, which is as it was afterwards."""
    before = picture(data_dir)

    report = verify(data_dir, settings_of(data_dir), deep=deep)

    assert picture(data_dir) == before, "looking changed something"
    return report


def named(report: Report, part: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.part == part]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(data_dir: Path, name: str) -> None:
    """Each damage is told with the part it is in, what was expected, and what to do; looking changes nothing."""
    damage, severity, part, fragment = WRONG[name]
    assert not looked(data_dir).wrong

    damage(data_dir)
    found = [one for one in looked(data_dir).wrong if one.part == part and fragment in one.found]

    assert found, looked(data_dir).wrong
    assert found[0].severity == severity
    assert found[0].expected and found[0].action


@pytest.mark.parametrize("name", GOOD_TO_KNOW)
def test_what_is_no_problem_is_a_notice(data_dir: Path, name: str) -> None:
    """What the next start puts right by itself, or what harms nobody, is told and is not wrong."""
    make, part, fragment = GOOD_TO_KNOW[name]
    if name == "a half made backup":
        (data_dir / "backups").mkdir(0o700, exist_ok=True)
        (data_dir / "backups").chmod(0o700)

    make(data_dir)
    if (data_dir / "backups").exists():
        (data_dir / "backups").chmod(0o700)
    report = looked(data_dir)

    assert [one for one in named(report, part) if one.severity == "notice" and fragment in one.found], report
    assert not [one for one in report.wrong if one.part != "directory"]


def test_every_bit_of_the_journal_counts(data_dir: Path) -> None:
    """Wherever a bit of an acknowledged event flips, it is noticed."""
    segment = newest_segment(data_dir)
    whole = segment.read_bytes()

    for offset in range(0, len(whole), 7):
        flip(segment, offset)
        report = verify(data_dir, settings_of(data_dir))
        assert [one for one in report.findings if one.part == "journal" and one.severity != "ok"], offset
        segment.write_bytes(whole)


@pytest.mark.parametrize("without", [(), ("archive.db-shm",)], ids=["as killed", "copied without the index"])
def test_what_a_kill_leaves_is_in_order(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Changes that only the journal and SQLite's log have yet are no problem, and stay where they are."""
    engine = opened(tmp_path / "data", clock=HandClock())
    for op in life():
        do(engine, op)
    engine.transcripts.page(limit=1)
    data_dir = Path(
        shutil.copytree(tmp_path / "data", tmp_path / "killed", ignore=shutil.ignore_patterns(*without, "*.sock"))
    )
    engine.close()
    assert (data_dir / "archive.db-wal").stat().st_size

    report = looked(data_dir)

    assert not report.wrong
    assert "2 conversations, 3 messages" in named(report, "archive")[0].found


def test_an_empty_directory_is_in_order(tmp_path: Path) -> None:
    """Before the first start there is nothing that could be wrong."""
    tmp_path.chmod(0o700)

    assert not looked(tmp_path).wrong


def test_all_that_stands_beside_backups_is_known(tmp_path: Path) -> None:
    """What we have written there ourselves is not called somebody else's."""
    with running(tmp_path / "data") as engine:
        do(engine, SessionPut(id="57300", value={"currentState": "catalog"}))
        engine.backup("api")

    assert not [one for one in looked(tmp_path / "data").findings if "not ours" in one.found]


def test_a_directory_in_use_is_not_looked_at_from_outside(tmp_path: Path) -> None:
    """Half a flush would look like damage, so whoever has it open must be asked."""
    with running(tmp_path / "data"), pytest.raises(DirectoryLocked, match=str(os.getpid())):
        verify(tmp_path / "data", settings_of(tmp_path / "data"))


def test_nobody_opens_it_meanwhile(data_dir: Path) -> None:
    """The lock is held while a stopped directory is looked through."""
    refused: list[bool] = []

    def open_it(text: str) -> None:
        if not refused:
            with pytest.raises(DirectoryLocked):
                opened(data_dir)
            refused.append(True)

    verify(data_dir, settings_of(data_dir), progress=open_it)

    assert refused


def test_a_newer_format_is_refused(data_dir: Path) -> None:
    """Of what a newer Holdfast wrote nothing is said, since nothing would be right."""
    raw = (data_dir / MANIFEST).read_text()
    (data_dir / MANIFEST).write_text(raw.replace('"format": 1', '"format": 99'))

    with pytest.raises(DataRefused, match="has format 99"):
        verify(data_dir, settings_of(data_dir))


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    """Nothing is created where nothing is."""
    with pytest.raises(DataRefused, match="cannot be read"):
        verify(tmp_path / "nowhere", settings_of(tmp_path / "nowhere"))

    assert not (tmp_path / "nowhere").exists()


# Backups.


@pytest.fixture(scope="module")
def backed_up(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two backups, both proved, and the history between them; copied, never changed."""
    place = tmp_path_factory.mktemp("backed_up") / "data"
    shutil.copytree(made, place, copy_function=shutil.copy2)
    for _ in range(2):
        with running(place) as engine:
            engine.backup("command")
            do(engine, UserPut(id="new", value={"name": "New"}))
            engine.flush("api")
    return place


def a_file(found: BackupSet, name: str) -> Path:
    return found.path / f"{name}.zst"


SPOILT: dict[str, tuple[Callable[[BackupSet], object], str]] = {
    "a byte": (lambda found: flip(a_file(found, "chat_sessions.json")), "chat_sessions.json.zst changed"),
    "a file cut": (lambda found: cut(a_file(found, "archive.db"), 3), "archive.db.zst changed"),
    "a file missing": (lambda found: a_file(found, "users.json").unlink(), "lacks users.json.zst"),
    "what is in it": (lambda found: flip(found.path / "set.json"), "checksum"),
    "its proof": (lambda found: write_proof(found.path, Proof("", False, "the disk lied")), "the disk lied"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_backup_is_found(backed_up: Path, tmp_path: Path, name: str) -> None:
    """Each file of each set is held against its checksum."""
    data_dir = Path(shutil.copytree(backed_up, tmp_path / "data", copy_function=shutil.copy2))
    assert not looked(data_dir).wrong
    spoil, fragment = SPOILT[name]

    spoil(list_sets(data_dir)[1])
    wrong = looked(data_dir).wrong

    assert wrong and {one.part for one in wrong} == {"backups"}
    assert fragment in wrong[0].found
    assert "holdfast backup" in wrong[0].action


def test_a_deep_look_loads_every_backup(backed_up: Path, tmp_path: Path) -> None:
    """What only shows when it is loaded is found: a set whose counts are not those of its records."""
    data_dir = Path(shutil.copytree(backed_up, tmp_path / "data", copy_function=shutil.copy2))
    found = list_sets(data_dir)[0]
    assert found.manifest is not None
    counts = found.manifest.counts | {"users": 99}
    with Directory(found.path) as directory:
        directory.write_atomic(
            "set.json", [encode_set_manifest(msgspec.structs.replace(found.manifest, counts=counts))]
        )

    assert not looked(data_dir).wrong
    wrong = looked(data_dir, deep=True).wrong

    assert "users" in wrong[0].found and "99" in wrong[0].found


@pytest.mark.parametrize("seq", [2, 3])
def test_a_hole_in_the_history_is_found(tmp_path: Path, seq: int) -> None:
    """Also without reading it: the names of its parts tell which events are in none."""
    clock, data_dir = HandClock(), tmp_path / "data"
    kept = {"backups": {"pitr": 7 * 86400.0}, "journal_keep": 0}
    with running(data_dir, clock=clock, **kept) as engine:
        for n in range(3):
            do(engine, SessionPut(id=str(n), value={}))
            engine.flush("api")
            clock.advance(PACK_AFTER_S + 1)
            engine.backups.history.step()
    settings = settings_of(data_dir, **kept)
    assert not verify(data_dir, settings, deep=True).wrong

    for path in [*data_dir.glob("journal/kept/*"), *data_dir.glob(f"backups/journal/*{seq}-*")]:
        path.unlink()
    wrong = {deep: verify(data_dir, settings, deep=deep).wrong for deep in (False, True)}

    for found in wrong.values():
        assert [(one.severity, one.part) for one in found] == [("warning", "history")]
        assert f"events {seq} to {seq} " in found[0].found and "holdfast backup" in found[0].action


def test_a_deep_look_finds_a_message_that_is_no_text(backed_up: Path, tmp_path: Path) -> None:
    """A bit of a letter that makes it none: SQLite hands it out only to who reads it."""
    data_dir = Path(shutil.copytree(backed_up, tmp_path / "data", copy_function=shutil.copy2))
    edit_archive(data_dir, "UPDATE messages SET content = CAST(x'c3' || substr(content, 2) AS TEXT)")

    wrong = looked(data_dir, deep=True).wrong

    assert [(one.severity, one.part, one.expected) for one in wrong] == [
        ("error", "archive", "messages that can be read")
    ]
    assert wrong[0].mend


@pytest.mark.parametrize("is_running", [False, True])
def test_a_deep_look_compares_messages_with_the_backup(backed_up: Path, tmp_path: Path, is_running: bool) -> None:
    """One letter of a message that is another one, which no checksum of SQLite tells; a message that came since is none."""
    data_dir = Path(shutil.copytree(backed_up, tmp_path / "data", copy_function=shutil.copy2))
    with running(data_dir) as engine:
        do(engine, MessageAppend(id="since", role="user", content="hola"))
        assert not verify(data_dir, engine.settings, deep=True, engine=engine).wrong
    with sqlite3.connect(data_dir / "archive.db") as archive:
        place, content = archive.execute("SELECT place, content FROM messages ORDER BY place").fetchone()
    edit_archive(data_dir, f"UPDATE messages SET content = 'X' || substr(content, 2) WHERE place = {place}")

    assert content and not verify(data_dir, settings_of(data_dir)).wrong
    if is_running:
        with running(data_dir) as engine:
            wrong = verify(data_dir, engine.settings, deep=True, engine=engine).wrong
    else:
        wrong = looked(data_dir, deep=True).wrong

    assert [(one.severity, one.part) for one in wrong] == [("error", "archive")]
    assert f"message {place & 0xFFFFFFFF} of conversation" in wrong[0].expected


def test_what_a_restore_left_is_cleared_by_the_next_start(data_dir: Path) -> None:
    """A restore that was given up before it was decided leaves a directory, which is no problem."""
    (data_dir / "restore").mkdir(0o700)

    report = looked(data_dir)

    assert not report.wrong
    assert any("restore/ is left" in one.found for one in named(report, "files"))


# In use.


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "busy"


def test_a_busy_directory_gives_no_false_alarm(busy: Path) -> None:
    """Flushes, rotations and pruning under way are not taken for damage."""
    with running(busy, journal_keep=0) as engine:
        stopping = threading.Event()
        flushes: list[int] = []

        def change() -> None:
            for number in itertools.count():
                if stopping.is_set():
                    return
                do(engine, SessionPut(id=f"s{number % 50}", value={"n": number}))
                do(engine, MessageAppend(id=f"c{number % 9}", role="user", content="x" * (1 + number % 500)))
                if number % 10 == 0:
                    engine.flush("api")
                    flushes.append(number)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            reports: list[Report] = []
            while len(flushes) < FLUSHES and len(reports) < LOOKS_MAX:
                reports.append(verify(busy, engine.settings, engine=engine, deep=len(reports) % 2 == 1))
        finally:
            stopping.set()
            thread.join()

    assert len(flushes) >= FLUSHES
    assert not [one for report in reports for one in report.wrong]


def test_damage_under_a_running_engine_is_found(busy: Path) -> None:
    """It is logged without ids, readiness says degraded, and both are taken back when it is in order again."""
    log = Log()
    with running(busy, log=log) as engine:
        do(engine, UserPut(id="ana", value={"name": "Ana"}))
        do(engine, MessageAppend(id="573001234567", role="user", content="Hola"))
        engine.flush("api")
        whole = (busy / "users.json").read_bytes()
        flip(busy / "users.json")

        assert verify_running(engine, deep=False, reason="api").wrong
        assert "1 problems (snapshots)" in engine.degraded[0]
        assert log.named("data.verify_failed")[0]["parts"] == ["snapshots"]
        assert engine.measures.verify_findings["error"] == 1

        mtime_ns = (busy / "users.json").stat().st_mtime_ns
        (busy / "users.json").write_bytes(whole)
        os.utime(busy / "users.json", ns=(mtime_ns, mtime_ns))
        verify_running(engine, deep=False, reason="api")

        assert not engine.degraded
        assert log.named("data.verified")


def test_a_running_archive_is_held_against_memory(busy: Path) -> None:
    """A conversation that only memory knows is found, and with ``deep`` messages that are missing."""
    with running(busy) as engine:
        for op in life():
            do(engine, op)
        engine.flush("api")
        edit_archive(busy, "DELETE FROM messages WHERE place = (SELECT max(place) FROM messages)")

        report = verify(busy, engine.settings, engine=engine, deep=True)

    assert [one for one in report.wrong if one.part == "archive"]


def test_one_at_a_time(busy: Path) -> None:
    """Who asks while it is being done is told so, rather than having all of it read twice."""
    with running(busy) as engine:
        inside, go = threading.Event(), threading.Event()

        def stop_there() -> bool:
            inside.set()
            go.wait(10)
            return False

        thread = threading.Thread(
            target=lambda: verify_running(engine, deep=False, reason="daily", is_stopping=stop_there)
        )
        thread.start()
        inside.wait(10)
        try:
            with pytest.raises(Conflict, match="under way"):
                verify_running(engine, deep=False, reason="api")
        finally:
            go.set()
            thread.join()


def test_it_is_broken_off_when_the_daemon_stops(busy: Path) -> None:
    """A stop does not wait for a directory to be read to its end."""
    with running(busy) as engine:
        with pytest.raises(Unavailable, match="stopping"):
            verify_running(engine, deep=False, reason="api", is_stopping=lambda: True)
        Daily(engine, lambda: True).run_when_due()


def test_a_daemon_verifies_once_a_day(busy: Path) -> None:
    """The first time when it is asked first, then a day later."""
    clock, log = HandClock(), Log()
    with running(busy, clock=clock, log=log) as engine:
        daily = Daily(engine)
        for _ in range(4):
            daily.run_when_due()
            clock.advance(12 * 3600)

    assert len(log.named("data.verified")) == 2


# The command.


def test_the_command_tells_what_is_wrong(data_dir: Path) -> None:
    """Its exit code is 0 when all is in order, and 1 when something is wrong."""
    good = forked("verify", "--data-dir", data_dir, cwd=data_dir)
    flip(data_dir / "users.json")
    bad = forked("verify", "--data-dir", data_dir, cwd=data_dir)
    as_json = forked("verify", "--data-dir", data_dir, "--json", cwd=data_dir)

    assert (good.returncode, good.stderr) == (0, "")
    assert "all in order" in good.stdout
    assert bad.returncode == as_json.returncode == 1
    assert "users.json" in bad.stdout and "do: " in bad.stdout and bad.stdout.endswith("1 problem\n")
    (error,) = [one for one in json.loads(as_json.stdout)["findings"] if one["severity"] == "error"]
    assert error["part"] == "snapshots"


def test_the_command_asks_a_running_daemon(tmp_path: Path) -> None:
    """Without false alarms, and with the same exit codes."""
    with daemon_in(tmp_path):
        good = forked("verify", "--deep", "--data-dir", "data", cwd=tmp_path)
        forked("users", "put", "ana", '{"name": "Ana"}', cwd=tmp_path)
        forked("flush", cwd=tmp_path)
        flip(tmp_path / "data" / "users.json")
        bad = forked("verify", "--json", cwd=tmp_path)

    assert good.returncode == 0, good.stdout + good.stderr
    assert "(in use)" in good.stdout
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["is_running"] is True


def test_the_command_names_who_has_the_directory(tmp_path: Path) -> None:
    """A program that has it open without a socket cannot be asked: exit code 3, with its PID."""
    with running(tmp_path / "data"):
        done = forked("verify", "--data-dir", "data", cwd=tmp_path)

    assert_told_in_one_line(done, 3, str(os.getpid()))


def test_the_command_refuses_a_newer_format(data_dir: Path) -> None:
    """Exit code 4, and what to do."""
    raw = (data_dir / MANIFEST).read_text()
    (data_dir / MANIFEST).write_text(raw.replace('"format": 1', '"format": 99'))

    assert_told_in_one_line(forked("verify", "--data-dir", data_dir, cwd=data_dir), 4, "format 99", "install")


def test_the_command_names_the_backups_there_are(data_dir: Path) -> None:
    """An unknown name is told with those that exist."""
    done = forked("verify", "--data-dir", data_dir, "--backup", "../x", cwd=data_dir)

    assert_told_in_one_line(done, 1, "no backup", "none")


def test_what_an_old_bot_left_is_no_problem(tmp_path: Path) -> None:
    """Its files may be readable to all, as it wrote them: nobody else can enter the directory, taken over as it is."""
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "chat_sessions.json").write_text(
        '[{"recipientPhone": "573001234567", "lastActivity": "2020-01-01T00:00:00Z"}]'
    )
    (data_dir / "config.json").write_text('{"colour": "red"}')
    for place, name, content in (
        ("users", "u1.json", {"id": "u1"}),
        ("conversations", "c1.json", {"id": "c1", "messages": [{"role": "user", "content": "hola"}]}),
        ("conversations", "broken.json", {"id": "broken", "messages": "none"}),
    ):
        (data_dir / place).mkdir(exist_ok=True)
        (data_dir / place / name).write_text(json.dumps(content))
    for path in data_dir.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)

    for _ in range(2):
        with running(data_dir) as engine:
            engine.flush("api")
            assert verify(data_dir, engine.settings, engine=engine).wrong == []
        assert looked(data_dir).wrong == []
    assert list((data_dir / "quarantine").glob("*broken.json"))
