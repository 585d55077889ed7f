"""From the command line: encrypted backups and exports, their copies elsewhere, and the way back from there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyrage
import pytest

import holdfast as holdfast_package
from holdfast.ops import ConversationArchive, MessageAppend, SessionPut
from tests.cli_harness import HOLDFAST, environment
from tests.cli_harness import forked as holdfast
from tests.engine_harness import do, opened, running

WAIT_S = 30.0


class Place:
    """A directory with settings, a key, data, and a second place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data, self.second, self.key = path / "data", path / "second", path / "key.txt"
        self.second.mkdir()
        identity = pyrage.x25519.Identity.generate()
        self.recipient = str(identity.to_public())
        self.key.write_text(f"{identity}\n")
        self.key.chmod(0o600)
        self.settings()

    def settings(self, **backups: Any) -> None:
        lines = [f"{name} = {json.dumps(value)}" for name, value in {"copy_to": str(self.second), **backups}.items()]
        (self.path / "holdfast.toml").write_text(
            f"data_dir = {json.dumps(str(self.data))}\nlisten = 'unix:'\n[backups]\n" + "\n".join(lines) + "\n"
        )

    def run(self, *arguments: str | Path, code: int = 0) -> str:
        """What the command prints, which ends with *code*."""
        done = holdfast(*arguments, cwd=self.path)
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stdout + done.stderr

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def sessions(self) -> list[str]:
        with running(self.data) as engine:
            return sorted(item.id for item in engine.page("sessions").items)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A daemon on it, from READY to its end by SIGTERM."""
        daemon = subprocess.Popen(
            [*HOLDFAST, "serve"], cwd=self.path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            assert daemon.stdout is not None
            for line in daemon.stdout:
                if b"daemon.ready" in line:
                    break
            yield
        finally:
            daemon.send_signal(signal.SIGTERM)
            out, _ = daemon.communicate(timeout=WAIT_S)
            assert daemon.returncode == 0, out


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    with running(place.data) as engine:
        for number in range(20):
            do(engine, SessionPut(id=f"57300{number:04}", value={"currentState": "catalog"}))
        for number in range(10):
            do(engine, MessageAppend(id="c1", role="user", content=f"hola {number} " * 40))
        do(engine, ConversationArchive(id="c1"))
    return place


def test_an_encrypted_backup_opens_with_its_key_only(place: Place) -> None:
    """A machine without the key makes it and says that it is sealed; --identity verifies and restores it."""
    place.settings(recipients=[place.recipient])
    made = place.json("backup")
    name = made["name"]
    stored = [
        path.name for path in (place.data / "backups" / name).iterdir() if path.name not in ("set.json", "proof.json")
    ]
    assert stored
    assert all(one.endswith(".zst.age") for one in stored)
    assert made["proved"] is not False
    assert "there is no key here" in made["problem"]

    refused = holdfast("restore", name, "--yes", cwd=place.path)
    assert refused.returncode != 0
    assert "there is no key; name it by --identity FILE" in refused.stderr
    assert "can be loaded" in place.run("verify", "--backup", name, "--identity", place.key)
    assert "proved" in place.run("backups", "--verify", name, "--identity", place.key)
    with running(place.data) as engine:
        do(engine, SessionPut(id="later", value={}))
    place.run("restore", name, "--identity", place.key, "--yes")

    assert "later" not in place.sessions()
    assert len(place.sessions()) == 20


def test_a_backup_without_encryption_holds_no_encrypted_file(place: Place) -> None:
    """When encryption is turned off, what did not change since is written in clear, not shared with the set before."""
    place.settings(recipients=[place.recipient])
    place.run("backup")
    place.settings()

    made = place.json("backup")

    stored = [path.name for path in (place.data / "backups" / made["name"]).iterdir()]
    assert [name for name in stored if name.endswith(".age")] == []
    assert made["proved"] is True, made


def test_an_encrypted_export_opens_with_its_key_only(place: Place, tmp_path: Path) -> None:
    """For recipients of the command line, of a stopped directory and through a daemon; the tool age opens it too."""
    stopped, served = tmp_path / "stopped.tar.zst.age", tmp_path / "served.tar.zst.age"
    place.run("export", stopped, "--recipient", place.recipient)
    with place.serving():
        place.run("export", served, "--recipient", place.recipient)
        assert "age" in place.run("export", tmp_path / "open.tar.zst", "--recipient", place.recipient, code=2)

    for file in (stopped, served):
        other = tmp_path / file.name[:4]
        other.mkdir()
        refused = holdfast("import", file, "--yes", "--data-dir", other, cwd=place.path)
        assert refused.returncode != 0
        assert "--identity FILE" in refused.stderr
        place.run("import", file, "--yes", "--identity", place.key, "--data-dir", other)
        with running(other) as engine:
            assert engine.count("sessions") == 20
    if shutil.which("age") and shutil.which("zstd"):
        opened_file = subprocess.run(
            f"age -d -i {place.key} {stopped} | zstd -dc | tar -tf -",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "manifest.json" in opened_file.stdout


def test_the_daemon_copies_each_backup_and_tells_of_it(place: Place) -> None:
    """Then the machine is gone: from the second place everything comes back, by name, by path, and to a new place."""
    with place.serving():
        made = place.json("backup")["name"]
        until = time.monotonic() + WAIT_S
        while not place.json("copies")["items"]:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert [one["name"] for one in place.json("copies")["items"]] == [made]
        assert made in place.run("copies")
        status = place.json("status")
        assert status["degraded"] == []
        assert status["disk"]["free_bytes"] > 0
    shutil.rmtree(place.data)

    assert made in place.run("backups", "--fetch", "latest")
    place.run("restore", made, "--yes")
    assert len(place.sessions()) == 20

    shutil.rmtree(place.data)
    place.run("restore", place.second / made, "--into", place.path / "beside")
    with running(place.path / "beside") as engine:
        assert engine.count("sessions") == 20
    place.run("restore", "latest", "--from", place.second, "--into", place.path / "beside too")
    with running(place.path / "beside too") as engine:
        assert engine.count("sessions") == 20


def test_a_restore_from_elsewhere_that_is_not_there_says_so(place: Place) -> None:
    """And which backups there are, or that the place cannot be read."""
    assert "has no backup nothing; it has none at all" in place.run(
        "restore", "nothing", "--from", place.second, code=1
    )
    assert "mount its disk" in place.run("copies", "--from", place.path / "nowhere", code=1)
    place.settings(copy_to="")
    assert "backups.copy_to" in place.run("copies", code=2)


def test_compacting_works_with_and_without_a_daemon(place: Place) -> None:
    """It prints what each part took before and after."""
    assert "messages packed" in place.run("compact")
    with place.serving():
        told = place.json("compact")
        assert {"archive", "snapshots", "journal"} <= set(told["after"])
    engine = opened(place.data)
    try:
        assert len(engine.transcripts.messages("c1").items) == 10
    finally:
        engine.close()


def test_a_program_that_holds_the_data_itself_copies_as_well(place: Place) -> None:
    """Without a daemon; and ends at once when the second place cannot be reached."""
    with holdfast_package.open(place.data, backups={"copy_to": str(place.second)}) as hf:
        made = hf.backup()
        until = time.monotonic() + WAIT_S
        while not (place.second / made.name / "set.json").exists():
            assert time.monotonic() < until
            time.sleep(0.05)

    program = (
        "import holdfast, sys; holdfast.open(sys.argv[1], backups={'copy_to': '/nowhere/at/all'}).sessions.put('1', {})"
    )
    began = time.monotonic()
    subprocess.run([HOLDFAST[0], "-c", program, place.data], env=environment(), check=True, timeout=WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2
