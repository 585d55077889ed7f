"""Mending: what a verification finds and what is safe to put right is put right, once, after a backup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdfast.care.backup_set import list_sets
from holdfast.care.mend import MendReport, mend
from holdfast.ops import MessageAppend, UserPut
from tests.cli_harness import assert_told_in_one_line, forked, shown_on_a_terminal
from tests.damage_harness import GOOD_TO_KNOW, WRONG, flip, make_directory, picture
from tests.engine_harness import HandClock, Log, do, everything, opened, running, settings_of

HOPELESS = {
    "a snapshot is a link",
    "an id twice",
    "an op nobody knows",
    "a message gone",
    "a directory in the place of one",
    "a restore broken off",
}
"""What no program can put right by itself, and what another test is about."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copied, never changed."""
    return make_directory(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data", copy_function=shutil.copy2))


def mended(data_dir: Path) -> MendReport:
    return mend(settings_of(data_dir), Log())


@pytest.mark.parametrize("name", sorted(set(WRONG) - HOPELESS))
def test_what_can_be_mended_is(data_dir: Path, name: str) -> None:
    """Afterwards all is in order, there is a backup of before, and a second time there is nothing to do."""
    damage = WRONG[name][0]
    damage(data_dir)

    report = mended(data_dir)

    assert report.steps
    assert report.after is not None
    assert not [one for one in report.after.wrong if one.part != "backups"], report.after.wrong
    assert [found.name for found in list_sets(data_dir)][-1] == report.backup
    before = picture(data_dir)
    assert mended(data_dir).steps == []
    assert picture(data_dir) == before


@pytest.mark.parametrize("name", ["a torn tail", "a half written file", "a half made backup"])
def test_what_is_left_over_is_cleared(data_dir: Path, name: str) -> None:
    """Notices that a start would clear away are cleared away."""
    (data_dir / "backups").mkdir(0o700, exist_ok=True)
    make, part, fragment = GOOD_TO_KNOW[name]
    make(data_dir)

    report = mended(data_dir)

    assert report.after is not None
    assert not [one for one in report.after.findings if one.part == part and fragment in one.found]


def test_what_cannot_be_mended_is_said(data_dir: Path) -> None:
    """A message that is nowhere any more stays missing, and the way to it is named; it is not tried again and again."""
    WRONG["a message gone"][0](data_dir)
    shutil.rmtree(data_dir / "journal" / "kept")

    report = mended(data_dir)

    assert report.after is not None
    (left,) = [one for one in report.after.wrong if one.part == "archive"]
    assert "with 1 messages" in left.expected
    assert "restore the conversation from a backup" in left.action
    assert mended(data_dir).steps == []


def test_nothing_that_was_whole_is_lost(tmp_path: Path) -> None:
    """With the archive gone, the manifest damaged and a torn tail, every record and message is there again."""
    clock = HandClock()
    with running(tmp_path / "data", clock=clock, journal_keep=1 << 20) as engine:
        do(engine, UserPut(id="ana", value={"name": "Ana"}))
        do(engine, MessageAppend(id="c", role="user", content="Hola"))
        engine.flush("api")
        do(engine, UserPut(id="ben", value={"name": "Ben"}))
        before = everything(engine)
    (tmp_path / "data" / "archive.db").unlink()
    with max((tmp_path / "data" / "journal").glob("*.jsonl")).open("ab") as file:
        file.write(b"torn")

    report = mended(tmp_path / "data")

    assert report.after is not None and not [one for one in report.after.wrong if one.part != "backups"]
    engine = opened(tmp_path / "data", clock=clock)
    assert everything(engine) == before
    assert b"Hola" in engine.transcripts.window("c").items[0].value
    engine.close()


def test_when_all_is_in_order_nothing_is_touched(data_dir: Path) -> None:
    """Not even a backup is made."""
    before = picture(data_dir)

    report = mended(data_dir)

    assert (report.backup, report.steps, report.after) == ("", [], None)
    assert picture(data_dir) == before


def test_the_command_asks_first(data_dir: Path) -> None:
    """Without a terminal and without --yes it does nothing; --dry-run says what would be done."""
    flip(data_dir / "manifest.json")
    before = picture(data_dir)

    assert_told_in_one_line(forked("mend", "--data-dir", data_dir, cwd=data_dir), 2, "--yes")
    dry = forked("mend", "--dry-run", "--data-dir", data_dir, cwd=data_dir)

    assert dry.returncode == 0
    assert "manifest: manifest.json: its checksum does not hold" in dry.stdout
    assert picture(data_dir) == before


def test_the_command_mends(data_dir: Path) -> None:
    """It names the backup, says each step, and shows what a verification finds afterwards."""
    flip(data_dir / "manifest.json")
    (data_dir / "users.json").chmod(0o644)

    done = forked("mend", "--yes", "--data-dir", data_dir, cwd=data_dir)
    again = forked("mend", "--yes", "--data-dir", data_dir, "--json", cwd=data_dir)

    assert done.stdout.startswith("backup 20"), done.stdout + done.stderr
    assert "gave users.json the mode 0600" in done.stdout
    assert json.loads(again.stdout)["wanted"] == []


def test_the_command_shows_progress_on_a_terminal(data_dir: Path) -> None:
    """What is being done stands there, and is gone at the end."""
    shown = shown_on_a_terminal("mend", "--dry-run", "--data-dir", data_dir, cwd=data_dir)

    assert "looking at the journal" in shown.raw
    assert "nothing to mend" in shown.text


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    """Exit code 3, with the PID of whoever has it."""
    with running(tmp_path / "data"):
        done = forked("mend", "--yes", "--data-dir", "data", cwd=tmp_path)

    assert_told_in_one_line(done, 3, "holds")


def test_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    """Exit code 4."""
    done = forked("mend", "--yes", "--data-dir", "nowhere", cwd=tmp_path)

    assert_told_in_one_line(done, 4, "nowhere")
    assert not (tmp_path / "nowhere").exists()
