"""The units under a real systemd: start, reload, signals, restarts, exit codes, instances, log."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.crash.harness import report
from tests.systemd.conftest import MakeService
from tests.systemd.lab import VENV, Lab, Service, wait_for

JOURNAL_SESSIONS = 200_000
"""How many a journal holds that takes a while to replay."""


def put(service: Service, id: str, **value: object) -> None:
    """A session, acknowledged."""
    with service.connect() as client:
        status, body = client.ask("PUT", f"/v1/sessions/{id}", json.dumps(value).encode())
    assert status in (200, 201), body


def get(service: Service, id: str) -> int:
    """The status of reading a session."""
    with service.connect() as client:
        return client.ask("GET", f"/v1/sessions/{id}")[0]


def test_start_returns_when_it_serves(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """systemd hears READY when it already listens: no attempt to connect from that moment on is refused."""
    refused_at: list[float] = []

    def knock() -> None:
        while time.monotonic() < ends_at:
            attempted_at = time.monotonic()
            try:
                service.connect().close()
                return
            except OSError:
                refused_at.append(attempted_at)
                time.sleep(0.0002)

    for _ in range(3):
        refused_at.clear()
        ends_at = time.monotonic() + 20
        knocking = threading.Thread(target=knock)
        knocking.start()
        service.start()
        with service.connect() as client:
            status, body = client.ask("GET", "/readyz")
        knocking.join(20)

        active_at = service.moment("ActiveEnterTimestamp")
        report(capsys, f"last refused {(active_at - refused_at[-1]) * 1000:.1f} ms before systemd heard READY")
        assert (status, json.loads(body)["state"]) == (200, "RUNNING")
        assert refused_at[-1] < active_at
        service.stop()


def test_reload_tells_the_truth(main_service: Service, lab: Lab) -> None:
    """`systemctl reload` fails, with the reason in the journal, when the settings are refused; then the old ones stay."""
    settings = lab.root / "etc/holdfast/holdfast.toml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('flush_every = "50s"\n')
    main_service.start()
    reload = ["reload", main_service.unit]

    settings.write_text('flush_every = "60s"\nshutdown_timeout = "soon"\n')
    refused = lab.systemctl(*reload, check=False)
    reasons = [line["MESSAGE"] for line in lab.journal(f"--unit={main_service.unit}") if "soon" in str(line["MESSAGE"])]
    still_active = main_service.is_active()
    settings.write_text('flush_every = "50s"\nshutdown_timeout = "24s"\n')
    accepted = lab.systemctl(*reload, check=False)

    settings.unlink()
    assert refused.returncode != 0 and still_active
    assert any(reason.startswith("holdfast: ") for reason in reasons), "the answer to holdfast reload"
    assert accepted.returncode == 0
    # flush_every was never 60 s.
    assert main_service.event("config.reloaded")["changed"] == ["shutdown_timeout"]


def test_a_backup_is_proved_inside_the_sandbox(main_service: Service, lab: Lab) -> None:
    """The unit leaves what it takes: another process, of low priority, with room to unpack the archive."""
    lab.systemctl("start", main_service.unit)
    put(main_service, "57300", currentState="catalog")
    command = [VENV / "bin/holdfast", "backup", "--json", "--data-dir", main_service.inside_data_dir]

    made = json.loads(lab.exec(*command, user="holdfast").stdout)

    assert made["proved"] is True and made["reason"] == "command", made
    assert main_service.event("backup.proved")["backup"] == made["name"]
    lab.systemctl("stop", main_service.unit)


def test_signals_by_systemctl(service: Service) -> None:
    """`systemctl kill -s USR1` flushes, USR2 reports, and both reach the daemon alone."""
    service.start()
    put(service, "573001234567", currentState="catalog")

    service.kill("USR1")
    flushed = service.event("flush.completed")
    service.kill("USR2")
    reported = service.event("status.report")

    assert (flushed["reason"], flushed["snapshot_seq"]) == ("signal", 1)
    assert "573001234567" in (service.data_dir / "chat_sessions.json").read_text()
    assert reported["pid"] == int(service.show("MainPID"))


def test_a_killed_daemon_comes_back_with_its_data(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """After kill -9 systemd starts it again, and everything acknowledged is there."""
    service.start()
    for number in range(100):
        put(service, str(number), currentState="catalog")
    before = time.monotonic()

    service.kill("KILL")
    service.event("daemon.ready", 2)

    report(capsys, f"killed, ready again after {time.monotonic() - before:.2f} s, RestartSec included")
    assert service.show("NRestarts") == "1"
    assert {get(service, str(number)) for number in range(100)} == {200}


def test_a_long_start_survives_its_timeout(
    service: Service, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A journal that takes longer to replay than TimeoutStartSec allows is replayed all the same."""
    write_journal = (
        "import sys, holdfast, os\n"
        "hf = holdfast.open(sys.argv[1])\n"
        "with hf.pipeline():\n"
        f"    for number in range({JOURNAL_SESSIONS}):\n"
        "        hf.sessions.put(str(number), {'currentState': 'catalog', 'cart': ['x' * 20] * 5})\n"
        "os._exit(0)  # without the final flush\n"
    )
    lab.exec("install", "-d", "-m", "700", "-o", "holdfast", "-g", "holdfast", service.inside_data_dir)
    lab.exec(VENV / "bin/python", "-c", write_journal, service.inside_data_dir, user="holdfast")
    service.start()
    without_limit_s = service.moment("ActiveEnterTimestamp") - service.moment("InactiveExitTimestamp")
    service.kill("KILL")
    service.stop()
    # Longer than the interpreter takes until Holdfast can speak at all, shorter than the replay.
    allowed_s = without_limit_s / 1.8

    service.configure(f"TimeoutStartSec={allowed_s:.3f}")
    service.start()

    took_s = service.moment("ActiveEnterTimestamp") - service.moment("InactiveExitTimestamp")
    report(capsys, f"start of {took_s:.2f} s with TimeoutStartSec={allowed_s:.2f}s")
    assert took_s > 1.2 * allowed_s, "the journal is too small to show anything"
    assert service.events("state.loaded")[-1]["sessions"] == JOURNAL_SESSIONS


def test_what_a_restart_cannot_mend_is_not_restarted(make_service: MakeService, lab: Lab) -> None:
    """After exit 2 (settings), 3 (directory held by another) and 4 (data refused) the unit stays down."""
    wrong_settings, held, refused = make_service(), make_service(), make_service()
    wrong_settings.configure("Environment=HOLDFAST_FLUSH_EVERY=soon")
    for service in (held, refused):
        service.start()
        service.stop()
    manifest = json.loads((refused.data_dir / "manifest.json").read_text())
    newer = {key: 99 if key.startswith("format") else value for key, value in manifest.items()}
    (refused.data_dir / "manifest.json").write_text(json.dumps(newer))
    by_hand = [VENV / "bin/holdfast", "serve", "--data-dir", held.inside_data_dir, "--listen", "unix:"]
    holder = subprocess.Popen(lab.command(*by_hand, user="holdfast"), stdout=subprocess.DEVNULL)

    try:
        wait_for(lambda: (held.data_dir / "holdfast.sock").exists(), 20, "the daemon started by hand")
        codes = {service.start(check=False).returncode for service in (wrong_settings, held, refused)}
        time.sleep(2.5)  # RestartSec is 1 s
        ends = [
            (service.show("ExecMainStatus"), service.show("ActiveState"), service.show("NRestarts"))
            for service in (wrong_settings, held, refused)
        ]
    finally:
        lab.exec("pkill", "--full", str(held.inside_data_dir), check=False)
        holder.wait(30)

    assert codes == {1}
    assert ends == [("2", "failed", "0"), ("3", "failed", "0"), ("4", "failed", "0")]


def test_an_instance_runs_beside_the_other(main_service: Service, lab: Lab) -> None:
    """holdfast@shop.service and holdfast.service serve at the same time, each its own data on its own sockets."""
    shop = Service(lab, "shop")
    try:
        lab.systemctl("start", main_service.unit, shop.unit)
        put(main_service, "1", of="main")
        put(shop, "2", of="shop")

        found = [[get(service, id) for id in ("1", "2")] for service in (main_service, shop)]
        inside = [
            lab.exec(VENV / "bin/holdfast", "status", "--json", "--data-dir", service.inside_data_dir, user="holdfast")
            for service in (main_service, shop)
        ]
        listening = [json.loads(done.stdout)["listen"] for done in inside]
        shop.stop()
        remains = get(main_service, "1")
    finally:
        lab.systemctl("stop", shop.unit, check=False)

    assert found == [[200, 404], [404, 200]]
    assert remains == 200
    assert not set(listening[0]) & set(listening[1])
    assert not shop.data_dir.is_relative_to(main_service.data_dir)


def test_the_three_addresses_have_their_credentials(main_service: Service, lab: Lab) -> None:
    """The group's socket and the directory's are closed to other users; TCP wants the token."""
    lab.systemctl("start", main_service.unit)
    ask = ["python3", "-c", ASK]

    answers = {
        "group's socket": lab.exec(*ask, "unix", "/run/holdfast.sock", user="holdfast").stdout,
        "directory's socket": lab.exec(*ask, "unix", "/var/lib/holdfast/holdfast.sock", user="holdfast").stdout,
        "group's socket, stranger": lab.exec(*ask, "unix", "/run/holdfast.sock", user="nobody").stdout,
        "directory's socket, stranger": lab.exec(*ask, "unix", "/var/lib/holdfast/holdfast.sock", user="nobody").stdout,
        "TCP": lab.exec(*ask, "tcp", "", user="nobody").stdout,
        "TCP with token": lab.exec(
            *ask, "tcp", (main_service.data_dir / "token").read_text().strip(), user="nobody"
        ).stdout,
    }

    assert {name: answer.strip() for name, answer in answers.items()} == {
        "group's socket": "200",
        "directory's socket": "200",
        "group's socket, stranger": "PermissionError",
        "directory's socket, stranger": "PermissionError",
        "TCP": "401",
        "TCP with token": "200",
    }


ASK = """
import http.client, socket, sys
connection = http.client.HTTPConnection("127.0.0.1", 8765, timeout=20)
try:
    if sys.argv[1] == "unix":
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(sys.argv[2])
    headers = {"Authorization": "Bearer " + sys.argv[2]} if sys.argv[1] == "tcp" and sys.argv[2] else {}
    connection.request("GET", "/v1/sessions", headers=headers)
    print(connection.getresponse().status)
except OSError as error:
    print(type(error).__name__)
"""


def test_the_journal_has_structured_lines(service: Service, lab: Lab) -> None:
    """`journalctl -o json` shows one JSON object a line, with the level as the priority of systemd."""
    service.configure("Environment=HOLDFAST_LOG__LEVEL=debug")
    service.start()
    (service.data_dir / "manifest.json").mkdir()
    service.kill("USR1")
    service.event("flush.failed")
    service.stop()

    lines = service.journal()

    priorities = {"debug": "7", "info": "6", "warning": "4", "error": "3"}
    events = [json.loads(line["MESSAGE"]) for line in lines]
    assert [event["event"] for event in events[:2]] == ["daemon.started", "state.loaded"]
    assert {"debug", "info", "error"} <= {event["level"] for event in events}
    assert [line["PRIORITY"] for line in lines] == [priorities[event["level"]] for event in events]
    only_errors = lab.journal(f"--unit={service.unit}", "--priority=err", "--identifier=holdfast")
    assert {json.loads(line["MESSAGE"])["level"] for line in only_errors} == {"error"}
