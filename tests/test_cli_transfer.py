"""The commands ``export`` and ``import``, and removal by filter, as a user runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.cli.connection import Daemon
from holdfast.client.address import address_of
from tests.cli_harness import assert_told_in_one_line, daemon_in, shown_on_a_terminal
from tests.cli_harness import forked as holdfast


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a daemon on its ``data``; each test has collections of its own."""
    directory = tmp_path_factory.mktemp("transfer")
    with daemon_in(directory):
        yield directory


def batch(cwd: Path, *ops: dict[str, Any]) -> None:
    """Do many ops at once."""
    daemon = Daemon(address_of(f"unix:{cwd / 'data' / 'holdfast.sock'}"), None, None)
    daemon.fetch("POST", "/v1/batch", body=orjson.dumps({"ops": ops}))


def notes(cwd: Path, collection: str, *states: str) -> None:
    """Records 0, 1, 2 … of *collection*, each in its state."""
    batch(
        cwd,
        *(
            {"op": "record.put", "collection": collection, "id": str(number), "value": {"state": state}}
            for number, state in enumerate(states)
        ),
    )


def told(*arguments: str | Path, cwd: Path) -> Any:
    """What a command says with --json."""
    done = holdfast(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_everything_goes_out_of_a_running_daemon_and_into_another_directory(cwd: Path, tmp_path: Path):
    """Into a file and into a directory, and from both into a directory that no daemon has open."""
    notes(cwd, "moved", "open", "closed")
    batch(cwd, {"op": "message.append", "id": "c1", "role": "user", "content": "hola"})

    said = told("export", tmp_path / "all.tar.zst", cwd=cwd)
    directory = told("export", tmp_path / "all", cwd=cwd)

    assert said["files"]["moved.json"]["records"] == directory["files"]["moved.json"]["records"] == 2
    assert json.loads((tmp_path / "all" / "moved.json").read_text())[0]["state"] == "open"
    assert (tmp_path / "all").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "all.tar.zst").stat().st_mode & 0o777 == 0o600
    back = told("import", tmp_path / "all.tar.zst", "--yes", cwd=cwd)
    assert back["collections"]["moved"]["same"] == 2 and back["messages"] == 0 and back["backup"] is None
    (tmp_path / "new").mkdir()
    for source, added in ((tmp_path / "all.tar.zst", 2), (tmp_path / "all", 0)):
        report = told("import", source, "--data-dir", tmp_path / "new", "--yes", cwd=tmp_path)
        assert report["collections"]["moved"]["added"] == added
    out = told("export", tmp_path / "again", "--data-dir", tmp_path / "new", cwd=tmp_path)
    assert out["messages"] == said["messages"]
    assert {path.name for path in tmp_path.iterdir()} == {"all", "all.tar.zst", "new", "again"}


def test_an_import_shows_first_what_it_would_do(cwd: Path, tmp_path: Path):
    """A dry run changes nothing; without a terminal it needs --yes; a backup is taken before."""
    (tmp_path / "shown.json").write_text('[{"id": "a"}, {"id": "b"}]')

    dry = told("import", tmp_path / "shown.json", "--dry-run", cwd=cwd)
    asked = holdfast("import", tmp_path / "shown.json", cwd=cwd)
    done = told("import", tmp_path / "shown.json", "--yes", cwd=cwd)
    again = told("import", tmp_path / "shown.json", "--yes", cwd=cwd)

    assert dry["collections"]["shown"]["added"] == 2 and dry["dry_run"] and dry["backup"] is None
    assert asked.returncode == 2 and "say --yes" in asked.stderr
    assert done["collections"]["shown"]["added"] == 2
    assert (cwd / "data" / "backups" / done["backup"]).is_dir()
    assert again["collections"]["shown"]["same"] == 2 and again["backup"] is None


def test_an_old_bots_directory_is_sent_to_the_daemon(cwd: Path, tmp_path: Path):
    """With its conversations, one file each."""
    (tmp_path / "bot" / "conversations").mkdir(parents=True)
    (tmp_path / "bot" / "bots.json").write_text('[\n  {\n    "id": "x"\n  }\n]')
    (tmp_path / "bot" / "conversations" / "old1.json").write_text(
        '{"id": "old1", "messages": [{"role": "user", "content": "hola"}]}'
    )

    report = told("import", tmp_path / "bot", "--yes", cwd=cwd)

    assert report["messages"] == 1 and report["collections"]["bots"]["added"] == 1
    assert holdfast("conversations", "show", "old1", cwd=cwd).stdout.count("hola") >= 1


def test_a_span_that_ends_before_it_begins_is_refused(cwd: Path, tmp_path: Path):
    """Nothing would be in it, and nothing is written."""
    for since, until in (
        ("2026-11-02", "2026-11-01"),
        ("2h", "30d"),
        ("2026-11-02T00:00:00Z", "2026-11-01T22:00:00-01:00"),
    ):
        refused = holdfast("export", tmp_path / "none.tar.zst", "--since", since, "--until", until, cwd=cwd)

        assert_told_in_one_line(refused, 2, "--since")
    assert not (tmp_path / "none.tar.zst").exists()


def test_what_cannot_be_imported_is_told_in_one_line(cwd: Path, tmp_path: Path):
    """Nothing there, half of the records wrong, an archive cut short."""
    (tmp_path / "half.json").write_text('[{"id": "a"}, {"x": 1}]')
    assert holdfast("export", tmp_path / "whole.tar.zst", cwd=cwd).returncode == 0
    whole = (tmp_path / "whole.tar.zst").read_bytes()
    (tmp_path / "cut.tar.zst").write_bytes(whole[:-20])

    for name, part in (("nothing", "nothing is at"), ("half.json", "1 of 2 records"), ("cut.tar.zst", "cut short")):
        assert_told_in_one_line(holdfast("import", tmp_path / name, "--yes", cwd=cwd), 1, part)
    skipping = holdfast("import", tmp_path / "half.json", "--yes", "--skip-invalid", cwd=cwd)
    assert skipping.returncode == 1 and "changed 1 record" in skipping.stdout


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(cwd: Path, tmp_path: Path):
    """A file or a directory with something in it stays; after a refusal there is nothing new."""
    (tmp_path / "there.tar.zst").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()

    for target, part in (
        ("there.tar.zst", "is there already"),
        ("full", "is there already"),
        ("no/where", "make it first"),
        ("x.zip", "ends in .tar.zst"),
        ("x.tar.zst.age", "does not encrypt"),
    ):
        assert_told_in_one_line(holdfast("export", tmp_path / target, cwd=cwd), 2, part)
    assert_told_in_one_line(holdfast("export", tmp_path / "x", "--collection", "none", cwd=cwd), 1, "no collection")

    assert sorted(os.listdir(tmp_path)) == ["full", "there.tar.zst"]


def test_an_export_by_filter_holds_what_the_filter_says(cwd: Path, tmp_path: Path):
    """The same filters as for removal."""
    notes(cwd, "filtered", "open", "closed", "open")

    said = told("export", tmp_path / "some", "--collection", "filtered", "--where", "state=open", cwd=cwd)
    old = told("export", tmp_path / "old", "--collection", "filtered", "--older-than", "30d", cwd=cwd)

    assert said["files"] == {"filtered.json": said["files"]["filtered.json"]}
    assert (said["files"]["filtered.json"]["records"], old["files"]["filtered.json"]["records"]) == (2, 0)


def test_records_are_removed_by_what_is_in_them(cwd: Path):
    """The preview counts them and names the first; --yes removes just these."""
    notes(cwd, "bulk", *(["open", "closed"] * 20))

    preview = holdfast("collections", "bulk", "rm", "--where", "state=open", "--dry-run", cwd=cwd)
    asked = holdfast("collections", "bulk", "rm", "--where", "state=open", cwd=cwd)
    done = told("collections", "bulk", "rm", "--where", "state=open", "--yes", cwd=cwd)

    assert preview.stdout.startswith("would remove 20 records: ") and preview.stdout.endswith(" and more\n")
    assert asked.returncode == 2 and "remove 20 records" in asked.stderr
    assert done == {"removed": 20, "refused": []}
    left = told("collections", "bulk", "list", "--all", cwd=cwd)
    assert {item["value"]["state"] for item in left} == {"closed"}


def test_sessions_and_orders_are_removed_by_state_and_age(cwd: Path):
    """Only those that are both."""
    batch(
        cwd,
        *(
            {"op": "session.put", "id": id, "value": {"currentState": state}, "ttl": "9d"}
            for id, state in (("s1", "lost"), ("s2", "lost"), ("s3", "paying"))
        ),
        {"op": "order.put", "id": "77", "value": {"recipientPhone": "57", "status": "lost"}},
    )

    assert told("sessions", "rm", "--state", "lost", "--older-than", "1h", "--dry-run", cwd=cwd)["would_remove"] == 0
    assert told("sessions", "rm", "--state", "lost", "--older-than", "0s", "--yes", cwd=cwd)["removed"] == 2
    assert told("orders", "rm", "--state", "lost", "--yes", cwd=cwd)["removed"] == 1
    assert holdfast("sessions", "get", "s3", cwd=cwd).returncode == 0


def test_conversations_are_removed_by_the_filters_of_their_list(cwd: Path):
    """With their messages; both ids and filters are too much, and none is too little."""
    for number in range(3):
        batch(
            cwd, {"op": "message.append", "id": f"bulk{number}", "user_id": "mallory", "role": "user", "content": "x"}
        )

    assert told("conversations", "rm", "--user", "mallory", "--dry-run", cwd=cwd)["would_remove"] == 3
    assert told("conversations", "rm", "--user", "mallory", "--yes", cwd=cwd)["removed"] == 3
    assert told("conversations", "list", "--user", "mallory", cwd=cwd) == []
    for arguments in ((), ("bulk1", "--user", "mallory")):
        assert holdfast("conversations", "rm", *arguments, cwd=cwd).returncode == 2


def test_a_person_at_a_terminal_sees_a_table_and_is_asked(cwd: Path, tmp_path: Path):
    """And who answers no, or nothing, has changed nothing."""
    (tmp_path / "seen.json").write_text('[{"id": "a"}]')

    shown = shown_on_a_terminal("import", tmp_path / "seen.json", "--dry-run", cwd=cwd)

    assert shown.code == 0
    assert "added" in shown.text and "would change 1 record" in shown.text
    assert holdfast("collections", "seen", "get", "a", cwd=cwd).returncode == 1
