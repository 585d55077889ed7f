"""The page "If the worst happens" of systemd/README.md: each command on it, in the situation it is for."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.crash.harness import clean_environ
from tests.systemd.lab import UNITS, VENV, Lab, Service, _copy_distribution, wait_for

TITLE = "## If the worst happens"
PRELUDE = "Before anything else"

MOMENT = "2026-11-21T14:03:00Z"
SET = "2026-11-21T020000.123Z"
PROCESS = "4711"
CUSTOMER = "573001234567"
"""The values of the page's one example; what a command is run with stands in their place."""

DATA = Path("/var/lib/holdfast")

PROGRAMS = ("age", "chown", "cp", "curl", "df", "holdfast", "journalctl", "kill", "rm", "systemctl")
"""What a line of prose may not tell to run unless a command block does; `holdfast@shop` and the like are no commands."""


def parts_of(page: str) -> dict[str, list[str]]:
    """The commands of each part of the page, in their order."""
    parts: dict[str, list[str]] = {}
    for part in page.split("\n### ")[1:]:
        title, _, text = part.partition("\n")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        parts[title] = [line for block in blocks for line in block.splitlines() if line.strip()]
    return parts


HANDBOOK = (UNITS / "README.md").read_text(encoding="utf-8")
PAGE = HANDBOOK.partition(f"{TITLE}\n")[2].partition("\n## ")[0]
PARTS = parts_of(PAGE)
FOLLOWED = {PRELUDE}
"""The parts that a test follows, noted while this module is imported."""


class Part:
    """An operator who follows one part of the page, command by command."""

    def __init__(self, title: str, service: Service) -> None:
        self._left = list(PARTS[title])
        self._service = service

    def step(self, begins: str, code: int = 0, **values: str) -> str:
        """Do the next command, which begins so, and return what it prints; *values* stand in for those of the example."""
        assert self._left, f"the page has no command here, least of all {begins}"
        command = self._left.pop(0)
        assert command.startswith(begins), f"expected {begins}, the page has {command}"
        for name, value in values.items():
            example = {"moment": MOMENT, "backup": SET, "process": PROCESS}[name]
            assert example in command, f"{command} has no {example}"
            command = command.replace(example, value)
        done = self._service.lab.exec("bash", "-c", f"{PARTS[PRELUDE][0]}\n{command}", check=False)
        printed = done.stdout + done.stderr
        assert done.returncode == code, f"{command}: {done.returncode}\n{printed}"
        return printed

    def end(self) -> None:
        assert not self._left, f"nobody follows {self._left}"


def follows(title: str) -> Callable[[Callable[[Part, Any], None]], Any]:
    """A test that follows the part *title*, from a service that is well to one that is."""
    FOLLOWED.add(title)

    def made(test: Callable[[Part, Any], None]) -> Any:
        def followed(shop: Shop) -> None:
            part = Part(title, shop.service)
            shop.make_well()
            test(part, shop)
            part.end()
            shop.check_well()

        followed.__doc__, followed.__name__ = test.__doc__, test.__name__
        return followed

    return made


S3_SERVER = """
import sys
import boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id="test",
             aws_secret_access_key="test").create_bucket(Bucket=sys.argv[1])
print(port, flush=True)
sys.stdin.read()
server.stop()
"""
"""Ends when its stdin does."""


class Shop:
    """A service with a day's data, for all tests here.

    Attributes:
        moment: before which all was well.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.lab = service.lab
        self.moment = ""

    def ask(self, method: str, path: str, value: object = None) -> Any:
        """The answer of the daemon; anything but success fails the test."""
        with self.service.connect() as client:
            status, body = client.ask(method, path, None if value is None else json.dumps(value).encode())
        assert status < 300, f"{method} {path}: {status} {body!r}"
        return json.loads(body) if body else None

    def has(self, path: str) -> bool:
        with self.service.connect() as client:
            return client.ask("GET", path)[0] == 200

    def readiness(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", "/readyz")
        return found

    def make_well(self) -> None:
        """Have it run, with the customer's data; afterwards a moment has passed."""
        self.settings()
        self.lab.systemctl("reset-failed", "holdfast.service", "holdfast.socket", check=False)
        self.lab.systemctl("start", "holdfast.socket", "holdfast.service")
        self.ask("PUT", f"/v1/sessions/{CUSTOMER}", {"currentState": "catalog"})
        self.ask("PUT", f"/v1/users/{CUSTOMER}", {"name": "Ana"})
        self.ask("PUT", "/v1/collections/notes/n1", {"text": "likes salsa"})
        if not self.has(f"/v1/conversations/{CUSTOMER}"):
            message = {"role": "user", "content": "Hola, una USB de 64GB"}
            self.ask("POST", f"/v1/conversations/{CUSTOMER}/messages", message)
        if not self.has("/v1/orders/7001"):
            self.ask("PUT", "/v1/orders/7001", {"recipientPhone": CUSTOMER, "total": 119900})
        time.sleep(0.01)
        self.moment = self.now()
        time.sleep(0.01)

    def now(self) -> str:
        return self.lab.exec("date", "-u", "+%Y-%m-%dT%H:%M:%S.%3NZ").stdout.strip()

    def check_well(self) -> None:
        """It runs, says so, and has what it had."""
        assert self.service.is_active() and self.readiness()["status"] == "ready", self.readiness()
        assert self.ask("GET", f"/v1/sessions/{CUSTOMER}")["currentState"] == "catalog"
        assert self.ask("GET", f"/v1/conversations/{CUSTOMER}")["messages"][0]["content"].startswith("Hola")

    def settings(self, *lines: str) -> None:
        """Have the settings file hold *lines*; without any there is none."""
        place = self.lab.root / "etc/holdfast/holdfast.toml"
        place.parent.mkdir(exist_ok=True)
        if lines:
            place.write_text("\n".join(lines) + "\n")
        else:
            place.unlink(missing_ok=True)

    @contextmanager
    def on_a_small_disk(self) -> Iterator[Path]:
        """The data directory, with new data, on a disk that is soon full; it is well when this begins, and not after it ends."""
        with self.stopped() as data:
            self.inside("mount", "-t", "tmpfs", "-o", "size=32m,mode=700,uid=holdfast,gid=holdfast", "tmpfs", DATA)
        try:
            self.make_well()
            yield data
        finally:
            self.lab.systemctl("stop", "holdfast.socket", "holdfast.service")
            self.inside("umount", "-l", DATA)
            self.lab.systemctl("start", "holdfast.socket", "holdfast.service")

    def lose(self) -> None:
        """The machine with all its data is gone; what stands elsewhere is not."""
        self.lab.systemctl("kill", "--signal=KILL", "holdfast")
        self.lab.systemctl("stop", "holdfast.socket", "holdfast")
        self.inside("rm", "-rf", DATA)

    def install(self, *names: str) -> None:
        """Add what an extra brings to the virtual environment in the lab."""
        for name in names:
            _copy_distribution(importlib.metadata.distribution(name), self.lab.site_packages)

    @contextmanager
    def bucket(self, name: str) -> Iterator[Callable[[], list[str]]]:
        """An S3 server in the lab that has the bucket *name*; yields what waits for it, and tells the settings that lead there."""
        self.install("obstore")
        # In the network of the lab, but with the files of the tests.
        enter = ["nsenter", "-t", self.lab.root.parent.name, "-n", "--"]
        server = subprocess.Popen(
            [*enter, sys.executable, "-c", S3_SERVER, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environ(),
        )  # fmt: skip

        def settings() -> list[str]:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            keys = self.lab.root / "srv/s3-credentials"
            keys.write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
            self.inside("chown", "holdfast:", "/srv/s3-credentials")
            self.inside("chmod", "600", "/srv/s3-credentials")
            return [
                f'backups.s3_endpoint = "http://127.0.0.1:{port}"',
                'backups.s3_credentials_file = "/srv/s3-credentials"',
            ]

        try:
            yield settings
        finally:
            server.communicate(timeout=20)

    def inside(self, *command: str | Path, user: str = "") -> str:
        return self.lab.exec(*command, user=user).stdout

    def holdfast(self, *arguments: str) -> str:
        """What the command prints, as the page has it run."""
        return self.lab.exec(VENV / "bin/holdfast", *arguments, user="holdfast", DATA_DIR=str(DATA)).stdout

    @contextmanager
    def stopped(self) -> Iterator[Path]:
        """The data directory, seen from outside, while nothing runs on it."""
        self.lab.systemctl("stop", "holdfast.socket", "holdfast.service")
        yield self.service.data_dir


@pytest.fixture(scope="module")
def shop(lab: Lab) -> Iterator[Shop]:
    service = Service(lab)
    yield Shop(service)
    print(lab.exec("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic", f"--unit={service.unit}").stdout)
    lab.systemctl("stop", "holdfast.socket", "holdfast.service", check=False)
    lab.systemctl("reset-failed", check=False)
    lab.exec("rm", "-rf", str(DATA), "/srv/before", "/srv/out", "/mnt/copy", "/etc/holdfast")
    lab.exec("rm", "-rf", f"/etc/systemd/system/{service.unit}.d")
    lab.systemctl("daemon-reload")


# The page itself.


def test_every_part_with_commands_is_followed() -> None:
    """A command that is added to the page wants a test that runs it."""
    assert {title for title, commands in PARTS.items() if commands} == FOLLOWED
    assert len(PARTS[PRELUDE]) == 1


def test_no_command_stands_in_prose_alone() -> None:
    """What a sentence tells to run is run as well: it begins a command of some block."""
    known = [command for commands in PARTS.values() for command in commands]
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    told = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.split()[0] in PROGRAMS and " " in span]

    assert [span for span in told if not any(command.startswith(span) for command in known)] == []


def test_what_the_page_refers_to_is_there() -> None:
    """Each part that a table or a sentence sends the reader to."""
    titles = re.findall(r"^##+ (.*)$", HANDBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    named = set(re.findall(r"\]\(#([^)]*)\)", HANDBOOK))

    assert len(named) > 8 and named <= anchors


# Each part.


@follows("First look")
def test_first_look(part: Part, shop: Shop) -> None:
    """Of a service that is well, each command says so."""
    shop.holdfast("backup")

    assert "Active: active (running)" in part.step("systemctl status")
    part.step("journalctl -u holdfast -p warning")
    assert '"status":"ready"' in part.step("curl")
    assert "/" in part.step("df -h")
    assert "RUNNING" in part.step("holdfast status")
    assert "all in order" in part.step("holdfast verify")
    assert "yes" in part.step("holdfast backups")


@follows("It does not start")
def test_it_does_not_start(part: Part, shop: Shop) -> None:
    """With bad settings, with a directory that somebody else holds, with one that is not safe: exit 2, 3, 4."""
    with shop.stopped():
        shop.settings('shutdown_timeout = "soon"')
        shop.lab.systemctl("start", "holdfast", check=False)
        assert part.step("systemctl show").strip() == "2"
        assert "shutdown_timeout" in part.step("journalctl -u holdfast")
        assert "shutdown_timeout" in part.step("holdfast serve --check", code=2)
        shop.settings()
        part.step("systemctl start holdfast")

    with shop.stopped():
        by_hand = held_by_hand(shop)
        try:
            shop.lab.systemctl("start", "holdfast", check=False)
            assert shop.service.show("ExecMainStatus") == "3"
            process = re.findall(r"process (\d+) holds", str(shop.service.events()[-1]))[-1]
            assert "holdfast serve" in part.step("ps -fp", process=process)
            part.step("kill", process=process)
            by_hand.wait(30)
        finally:
            by_hand.kill()
        part.step("systemctl start holdfast")

    with shop.stopped():
        # As after a copy that root put back.
        shop.inside("chown", "root:root", DATA / "holdfast.lock", DATA / "users.json")
        shop.lab.systemctl("start", "holdfast", check=False)
        assert shop.service.show("ExecMainStatus") == "4"
        part.step("chown -R holdfast: /var/lib/holdfast")
        part.step("chmod 700 /var/lib/holdfast")
        part.step("systemctl reset-failed holdfast")
        part.step("systemctl start holdfast")


def held_by_hand(shop: Shop) -> subprocess.Popen[bytes]:
    """A daemon that somebody started and forgot; it has the directory when this returns."""
    command = [VENV / "bin/holdfast", "serve", "--data-dir", DATA, "--listen", f"unix:{DATA}/by-hand.sock"]
    started = subprocess.Popen(
        shop.lab.command(*command, user="holdfast"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (shop.service.data_dir / "by-hand.sock").exists(), 20, "a daemon started by hand")
    return started


@follows("It serves, but is degraded")
def test_it_is_degraded(part: Part, shop: Shop) -> None:
    """A damaged file was mended at the start: the reason is told everywhere, and is gone with the next start."""
    shop.holdfast("backup")
    with shop.stopped() as data:
        damage(data / "chat_sessions.json")
    shop.lab.systemctl("start", "holdfast.socket", "holdfast")

    assert '"status":"degraded"' in part.step("curl")
    assert "snapshot.damaged" in part.step("journalctl")
    assert "chat_sessions.json" in part.step("holdfast verify", code=1)
    part.step("holdfast backup")
    assert "all in order" in part.step("holdfast verify")


@follows("The disk is full")
def test_the_disk_is_full(part: Part, shop: Shop) -> None:
    """Writes are refused, every figure is shown, and with room it is ready again without a restart or a write."""
    with shop.on_a_small_disk() as data:
        shop.lab.exec("sh", "-c", f"cat /dev/zero > {DATA}/filler", check=False)
        with shop.service.connect() as client:
            refused = [client.ask("PUT", "/v1/sessions/more", b'{"text": "%s"}' % (b"x" * 10_000))[0] for _ in range(9)]
        assert refused[-1] == 507

        assert "100%" in part.step("df -h")
        part.step("df -i")
        assert "archive.db" in part.step("du -sh")
        part.step("journalctl --disk-usage")
        (data / "filler").unlink()
        assert "archive" in part.step("holdfast compact")
        wait_for(lambda: shop.readiness()["status"] == "ready", 20, "it to notice that there is room")
        assert '"status":"ready"' in part.step("curl")


@follows("A file is damaged")
def test_a_file_is_damaged(part: Part, shop: Shop) -> None:
    """Verify names it, mend says what it does and does it, verify is content; and one file comes back from a backup."""
    shop.holdfast("backup")
    with shop.stopped() as data:
        damage(data / "users.json")
        shop.lab.systemctl("start", "holdfast.socket", check=False)
        assert "users.json" in part.step("holdfast verify", code=1)
        part.step("systemctl stop holdfast.socket holdfast")
        assert "users" in part.step("holdfast mend --dry-run")
        part.step("holdfast mend --yes")
        part.step("holdfast verify")
        part.step("systemctl start")
    assert shop.ask("GET", f"/v1/users/{CUSTOMER}")["name"] == "Ana"
    shop.ask("PUT", f"/v1/sessions/{CUSTOMER}", {"currentState": "lost"})

    part.step("holdfast restore latest --file chat_sessions.json --dry-run")
    assert shop.ask("GET", f"/v1/sessions/{CUSTOMER}")["currentState"] == "lost"
    part.step("holdfast restore latest --file chat_sessions.json --yes")


@follows("Something was deleted by mistake")
def test_something_was_deleted_by_mistake(part: Part, shop: Shop) -> None:
    """Session, conversation, order, profile and collection come back from the moment before, and nothing else changes."""
    shop.holdfast("backup")
    time.sleep(0.01)
    moment = shop.now()
    for path in ("sessions", "conversations", "users"):
        shop.ask("DELETE", f"/v1/{path}/{CUSTOMER}")
    shop.ask("DELETE", "/v1/orders/7001")
    shop.ask("DELETE", "/v1/collections/notes/n1")
    shop.ask("PUT", "/v1/sessions/other", {"currentState": "new"})

    assert "session.delete" in part.step("holdfast journal grep")
    part.step("holdfast restore --at", moment=moment)
    assert not shop.has(f"/v1/sessions/{CUSTOMER}")
    for _ in range(5):
        part.step("holdfast restore --at", moment=moment)

    assert all(shop.has(f"/v1/{path}/{CUSTOMER}") for path in ("sessions", "users", "conversations"))
    assert shop.has("/v1/orders/7001") and shop.has("/v1/collections/notes/n1") and shop.has("/v1/sessions/other")


@follows("A wrong deploy at 14:03")
def test_a_wrong_deploy(part: Part, shop: Shop) -> None:
    """Everything is as at that moment, in the running daemon and beside it."""
    shop.holdfast("backup")
    time.sleep(0.01)
    moment = shop.now()
    for number in range(20):
        shop.ask("PUT", f"/v1/sessions/wrong{number}", {"currentState": "broken"})
    shop.ask("PUT", f"/v1/sessions/{CUSTOMER}", {"currentState": "broken"})

    assert "20" in part.step("holdfast restore --at", moment=moment)
    assert shop.has("/v1/sessions/wrong1")
    part.step("holdfast restore --at", moment=moment)
    assert not shop.has("/v1/sessions/wrong1")
    part.step("holdfast verify")
    part.step("install -d")
    part.step("holdfast restore --at", moment=moment)
    assert "catalog" in part.step(f"grep {CUSTOMER}")


@follows("The server is gone")
def test_the_server_is_gone(part: Part, shop: Shop) -> None:
    """The copy of the backups in a directory or in S3, or an export, is enough for a new machine."""
    with shop.bucket("backups") as settings:
        shop.holdfast("export", "/tmp/holdfast.tar.zst")
        shop.inside("mv", "/tmp/holdfast.tar.zst", "/srv/holdfast.tar.zst")
        shop.inside("install", "-d", "-o", "holdfast", "-m", "700", "/mnt/copy")
        shop.holdfast("backup")
        shop.service.configure("ReadWritePaths=/mnt/copy")
        shop.settings('backups.copy_to = "/mnt/copy"')
        shop.lab.systemctl("restart", "holdfast")
        copied = shop.service.event("backup.copied")

        shop.lose()
        part.step("install -d")
        assert copied["name"] in part.step("holdfast copies --from /mnt/copy")
        assert copied["name"] in part.step("holdfast copies --from /mnt/copy --fetch")
        part.step("holdfast restore latest --yes")
        part.step("systemctl start")
        assert "all in order" in part.step("holdfast verify")
        shop.check_well()

        shop.settings(*settings())
        shop.inside(VENV / "bin/python", "-c", SEND_TO_S3, user="holdfast")
        shop.lose()
        shop.inside("install", "-d", "-o", "holdfast", "-m", "700", DATA)
        assert "history" in part.step("holdfast copies --from s3://")
    shop.settings()
    shop.holdfast("restore", "latest", "--yes")
    shop.lab.systemctl("start", "holdfast.socket", "holdfast")
    shop.check_well()

    shop.lose()
    shop.inside("install", "-d", "-o", "holdfast", "-m", "700", DATA)
    assert "sessions" in part.step("holdfast import", code=0)
    part.step("holdfast import")
    shop.lab.systemctl("start", "holdfast.socket", "holdfast")


SEND_TO_S3 = f"""
from holdfast.care.backup_set import list_sets
from holdfast.care.store import store_of
from holdfast.settings import load
from pathlib import Path
settings = load({{"data_dir": "{DATA}"}}, {{}}).settings
store_of(settings, "s3://backups/shop").put(list_sets(Path("{DATA}"))[0], lambda: False)
"""
"""What the service does with `backups.copy_to` when it has a network."""


@follows("After a power cut")
def test_after_a_power_cut(part: Part, shop: Shop) -> None:
    """Killed, it is up again by itself, and the log says from where."""
    shop.service.kill("KILL")
    wait_for(lambda: shop.service.show("NRestarts") != "0" and shop.service.is_active(), 20, "the restart")

    assert "daemon.ready" in part.step("journalctl")
    part.step("holdfast verify")


@follows("The archive is damaged")
def test_the_archive_is_damaged(part: Part, shop: Shop) -> None:
    """It is made anew while the service runs, and the log says what is missing: nothing."""
    with shop.stopped() as data:
        (data / "archive.db").write_bytes(b"no database" * 1000)
    shop.lab.systemctl("start", "holdfast.socket", "holdfast")
    wait_for(lambda: shop.service.events("archive.rebuilt"), 20, "a new archive")

    assert "archive.rebuilt" in part.step("journalctl")
    part.step("holdfast verify")
    shop.lab.systemctl("restart", "holdfast")


@follows("The journal is damaged")
def test_the_journal_is_damaged(part: Part, shop: Shop) -> None:
    """Every event but the damaged one is there, what is wrong is named, and with a backup of what is there it is well."""
    shop.holdfast("flush")
    shop.ask("PUT", "/v1/sessions/damaged", {"currentState": "x" * 100})
    shop.ask("PUT", "/v1/sessions/behind", {"currentState": "catalog"})
    shop.lab.systemctl("kill", "--signal=KILL", "holdfast")
    with shop.stopped() as data:
        segment = max((data / "journal").glob("*.jsonl"))
        segment.write_bytes(segment.read_bytes().replace(b"x" * 100, b"y" * 100))
    shop.lab.systemctl("start", "holdfast.socket", "holdfast")

    assert "journal.damaged" in part.step("journalctl")
    assert shop.has("/v1/sessions/behind") and not shop.has("/v1/sessions/damaged")
    part.step("holdfast verify", code=1)
    part.step("holdfast backup")
    part.step("systemctl stop")
    assert "quarantine" in part.step("holdfast mend --yes")
    part.step("systemctl start")
    assert "all in order" in part.step("holdfast verify")
    assert "missing" in part.step("holdfast journal stat --all", code=1)
    assert shop.has("/v1/sessions/behind")


@follows("The clock is wrong")
def test_the_clock_is_wrong(part: Part, shop: Shop) -> None:
    """What the machine and what Holdfast takes for the time."""
    assert "Universal time" in part.step("timedatectl")
    part.step("date -u")
    assert "RUNNING" in part.step("holdfast status")


@follows("Taking evidence")
def test_taking_evidence(part: Part, shop: Shop) -> None:
    """Log, directory and a redacted export are there; the export has nobody's name."""
    part.step("journalctl")
    part.step("systemctl stop holdfast")
    part.step("cp -a")
    part.step("systemctl start holdfast")
    part.step("install -d")
    part.step("holdfast export --redact")

    assert (shop.lab.root / "root/holdfast.log").stat().st_size > 100
    assert (shop.lab.root / "root/holdfast-evidence/manifest.json").exists()
    shop.inside("tar", "-C", "/srv/out", "--zstd", "-xf", "/srv/out/redacted.tar.zst")
    found = shop.lab.exec("grep", "-rlE", f"Ana|{CUSTOMER}", "/srv/out", "--include=*.json*", check=False)
    assert (found.returncode, found.stdout) == (1, ""), found.stdout


@follows("Is all well again?")
def test_all_is_well_again(part: Part, shop: Shop) -> None:
    """Each of the last commands says so."""
    assert part.step("systemctl is-active") == "active\n"
    assert '"status":"ready"' in part.step("curl")
    assert "all in order" in part.step("holdfast verify --deep")
    assert "proved" in part.step("holdfast backup")
    part.step("holdfast backups")
    part.step("holdfast stats storage")


# Last, since moments whose history is encrypted cannot be gone back to without the key, as verify then says.
@follows("The backup is encrypted")
def test_the_backup_is_encrypted(part: Part, shop: Shop) -> None:
    """With the identity it is verified and restored."""
    shop.install("pyrage")
    identity, recipient = shop.inside(VENV / "bin/python", "-c", NEW_KEY).split()
    shop.inside("sh", "-c", f"umask 077; echo {identity} > /root/key.txt")
    shop.settings(f'backups.recipients = ["{recipient}"]')
    shop.lab.systemctl("restart", "holdfast")
    backup = json.loads(shop.holdfast("backup", "--json"))["name"]
    shop.ask("PUT", f"/v1/sessions/{CUSTOMER}", {"currentState": "lost"})

    part.step("install -o holdfast")
    part.step("holdfast verify --backup", backup=backup)
    part.step("systemctl stop")
    part.step("holdfast restore", backup=backup)
    part.step("systemctl start")
    assert CUSTOMER in part.step("age -d", backup=backup)
    part.step("rm /srv/key.txt")
    shop.settings()
    shop.lab.systemctl("restart", "holdfast")
    shop.holdfast("backup")


NEW_KEY = "from pyrage import x25519; key = x25519.Identity.generate(); print(key, key.to_public())"


def damage(path: Path) -> None:
    """Overwrite a stretch in its middle."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 20] = b"\0" * 20
    path.write_bytes(raw)
