"""`holdfast install-service` on a machine with a real systemd: what it makes, what it leaves, what it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator

import pytest

from tests.systemd.conftest import booted
from tests.systemd.lab import VENV, Lab, Service, wait_for
from tests.systemd.test_service import get, put

HOLDFAST = VENV / "bin/holdfast"
INSTALL = [HOLDFAST, "install-service"]


@pytest.fixture(scope="module")
def bare_lab() -> Iterator[Lab]:
    """A machine on which the package is installed and nothing more; there is a user bot."""
    for lab in booted():
        lab.exec("useradd", "--create-home", "bot")
        yield lab


@pytest.fixture
def machine(bare_lab: Lab) -> Iterator[Lab]:
    """The same, and afterwards as it was before."""
    before = what_is_there(bare_lab)
    yield bare_lab
    for options in ([], ["--instance", "shop"]):
        bare_lab.exec(*INSTALL, "--remove", "--yes", *options, check=False)
    bare_lab.exec("sh", "-c", "rm -rf /var/lib/holdfast* /srv/* /etc/holdfast; userdel holdfast", check=False)
    assert what_is_there(bare_lab) == before


def what_is_there(lab: Lab) -> list[str]:
    """Everything that an installation may touch."""
    places = "/etc/systemd/system /etc/holdfast /var/lib/holdfast* /srv /home/bot/.config /home/bot/.local"
    found = lab.exec(
        "sh", "-c", f"find {places} 2>/dev/null; getent passwd holdfast; getent group holdfast", check=False
    )
    # What systemd itself keeps there is not ours.
    return sorted(line for line in found.stdout.splitlines() if not line.endswith(("/.config", "/systemd", "/user")))


def run(lab: Lab, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, as root without a terminal."""
    return lab.exec(*INSTALL, *options, check=False, **variables)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """In one line, with exit 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("holdfast: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_service_is_made_used_and_unmade(machine: Lab) -> None:
    """It installs, enables and starts; doing it again changes nothing; --remove takes away what it made, never the data."""
    service = Service(machine)

    installed = run(machine, "--yes")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    put(service, "573001234567", currentState="catalog")
    states = [
        machine.systemctl(question, unit).stdout.strip()
        for question in ("is-enabled", "is-active")
        for unit in ("holdfast.socket", "holdfast.service")
    ]
    settings = machine.show("holdfast.service", "Documentation").removeprefix("file://")
    again = run(machine, "--yes")
    removed = run(machine, "--remove", "--yes")
    remains = what_is_there(machine)
    once_more = run(machine, "--remove", "--yes")

    assert "holdfast.service serves" in installed.stdout and "--remove" in installed.stdout
    assert states == ["enabled", "enabled", "active", "active"]
    assert machine.exec("test", "-r", settings).returncode == 0
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert removed.returncode == 0, removed.stdout + removed.stderr
    assert "keep /var/lib/holdfast, the data" in removed.stdout
    assert "keep user holdfast" in removed.stdout
    assert not [
        line for line in remains if line.startswith("/etc/systemd/system/holdfast") or ".wants/holdfast" in line
    ]
    assert "/var/lib/holdfast/chat_sessions.json" in remains
    assert (once_more.returncode, "nothing to do" in once_more.stdout) == (0, True)


def test_the_data_is_found_again(machine: Lab) -> None:
    """Removed and installed anew, it serves the data that stayed; when the data is gone the account goes as well."""
    service = Service(machine)
    assert run(machine, "--yes").returncode == 0
    put(service, "573001234567", currentState="catalog")
    assert run(machine, "--remove", "--yes").returncode == 0

    assert run(machine, "--yes").returncode == 0
    found = get(service, "573001234567")
    assert run(machine, "--remove", "--yes").returncode == 0
    machine.exec("rm", "-rf", "/var/lib/holdfast")
    removed = run(machine, "--remove", "--yes")

    assert found == 200
    assert "remove user and group holdfast" in removed.stdout
    assert machine.exec("getent", "passwd", "holdfast", check=False).returncode != 0


def test_nothing_is_done_unasked(machine: Lab) -> None:
    """--dry-run shows the plan and does nothing; without a terminal and without --yes it does the same, and exits with 2."""
    before = what_is_there(machine)

    shown = run(machine, "--dry-run")
    as_json = run(machine, "--dry-run", "--json")
    unasked = run(machine)
    by_a_user = machine.exec(*INSTALL, "--dry-run", user="bot")

    steps = ["make user and group holdfast", "write /etc/systemd/system/holdfast.service"]
    steps += [
        "run systemctl enable holdfast.socket holdfast.service",
        "run systemctl start holdfast.socket holdfast.service",
    ]
    for output in (shown.stdout, unasked.stdout, by_a_user.stdout):
        assert [step for step in steps if step not in output] == []
    assert [step["step"] for step in json.loads(as_json.stdout)["steps"]][-1] == steps[-1]
    assert (shown.returncode, as_json.returncode) == (0, 0)
    assert_refused(unasked, "--yes")
    assert what_is_there(machine) == before


def test_it_asks_at_a_terminal(machine: Lab) -> None:
    """At a terminal it asks: no leaves everything as it was, yes goes ahead."""
    before = what_is_there(machine)

    declined = at_a_terminal(machine, "n\n", "--no-start")
    untouched = what_is_there(machine) == before
    agreed = at_a_terminal(machine, "y\n", "--no-start")

    assert "Go ahead?" in declined and untouched
    assert "systemctl start holdfast.socket holdfast.service starts it" in agreed
    assert machine.systemctl("is-enabled", "holdfast.service").stdout.strip() == "enabled"
    assert machine.systemctl("is-active", "holdfast.service", check=False).stdout.strip() == "inactive"


def at_a_terminal(lab: Lab, answer: str, *options: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(lab.command(*INSTALL, *options), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
            if b"Go ahead?" in shown and answer:
                os.write(ours, answer.encode())
                answer = ""
    except OSError:
        pass  # the other end is closed
    process.wait(60)
    os.close(ours)
    return shown.decode()


def test_a_changed_unit_is_shown_and_mended(machine: Lab) -> None:
    """What differs from the package is shown line by line, and the service runs with the mended unit."""
    assert run(machine, "--yes").returncode == 0
    unit = machine.root / "etc/systemd/system/holdfast.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=7"))
    pid = machine.show("holdfast.service", "MainPID")

    mended = run(machine, "--yes")

    assert "change /etc/systemd/system/holdfast.service" in mended.stdout
    assert "-WatchdogSec=7" in mended.stdout and "+WatchdogSec=30" in mended.stdout
    assert machine.show("holdfast.service", "WatchdogUSec") == "30s"
    assert machine.show("holdfast.service", "MainPID") != pid
    assert machine.systemctl("is-active", "holdfast.service").stdout.strip() == "active"


def test_an_instance_comes_and_goes_alone(machine: Lab) -> None:
    """--instance shop runs beside the other; removing one leaves the other, its template and the account."""
    main, shop = Service(machine), Service(machine, "shop")
    assert run(machine, "--yes").returncode == 0

    installed = run(machine, "--yes", "--instance", "shop")
    put(main, "1", of="main")
    put(shop, "2", of="shop")
    found = [get(service, id) for service in (main, shop) for id in ("1", "2")]
    without_main = run(machine, "--yes", "--remove")
    shop_serves = get(shop, "2")
    without_shop = run(machine, "--yes", "--remove", "--instance", "shop")

    assert installed.returncode == 0 and "/run/holdfast/shop/holdfast.sock" in installed.stdout
    assert found == [200, 404, 404, 200]
    assert without_main.returncode == 0 and shop_serves == 200
    assert without_shop.returncode == 0, without_shop.stderr
    assert "keep /var/lib/holdfast-shop, the data" in without_shop.stdout
    assert not list((machine.root / "etc/systemd/system").glob("holdfast*"))


@pytest.mark.parametrize("instance", ["", "shop"])
def test_the_data_may_be_elsewhere(machine: Lab, instance: str) -> None:
    """--data-dir makes the directory, moves service and socket there, and is remembered: by the next call, and by --remove."""
    options = ["--instance", instance] if instance else []
    service = Service(machine, instance)

    installed = run(machine, "--yes", "--data-dir", "/srv/bot/data", *options)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    put(service, "1", currentState="catalog")
    status = machine.exec(HOLDFAST, "status", "--json", "--data-dir", "/srv/bot/data").stdout
    reload = machine.systemctl("reload", service.unit, check=False)
    owner = machine.exec("stat", "--format=%U %a", "/srv/bot/data").stdout.strip()
    again = run(machine, "--yes", *options)
    back = run(machine, "--dry-run", "--data-dir", str(service.inside_data_dir), *options)
    removed = run(machine, "--yes", "--remove", *options)

    assert json.loads(status)["state"] == "RUNNING"
    assert reload.returncode == 0
    assert owner == "holdfast 700"
    assert "nothing to do" in again.stdout
    assert "data-dir.conf" in back.stdout and "leave the data in /srv/bot/data" in back.stdout
    assert "keep /srv/bot/data, the data" in removed.stdout and "keep user holdfast, to whom /srv/bot" in removed.stdout
    assert (machine.root / "srv/bot/data/chat_sessions.json").is_file()
    assert not list((machine.root / "etc/systemd/system").glob("holdfast*"))


def test_a_user_has_a_service_of_their_own(machine: Lab) -> None:
    """--user needs no root: units, data and sockets in the user's own places, with the sandbox that a user's manager can give."""
    uid = machine.exec("id", "-u", "bot").stdout.strip()
    if machine.exec("loginctl", "enable-linger", "bot", check=False).returncode != 0:
        pytest.skip("needs the packages dbus and libpam-systemd, for a service manager of a user")
    wait_for((machine.root / f"run/user/{uid}/systemd/private").exists, 20, "the service manager of the user")
    as_bot = {"HOME": "/home/bot", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}
    control = ["systemctl", "--user", "--no-pager"]
    ask = [HOLDFAST, "status", "--json", "--data-dir", "/home/bot/.local/share/holdfast"]

    installed = machine.exec(*INSTALL, "--user", "--yes", user="bot", **as_bot)
    running = json.loads(machine.exec(*ask, user="bot", **as_bot).stdout)
    machine.exec(*INSTALL, "--user", "--yes", "--instance", "shop", user="bot", **as_bot)
    again = machine.exec(*INSTALL, "--user", "--yes", user="bot", **as_bot)
    reload = machine.exec(*control, "reload", "holdfast.service", "holdfast@shop.service", user="bot", **as_bot)
    verified = [
        machine.exec(
            "systemd-analyze",
            "--user",
            "verify",
            "--man=no",
            f"/home/bot/.config/systemd/user/{unit}",
            user="bot",
            **as_bot,
        )
        for unit in ("holdfast.service", "holdfast.socket")
    ]
    removed = [
        machine.exec(*INSTALL, "--user", "--yes", "--remove", *options, user="bot", **as_bot)
        for options in ([], ["--instance", "shop"])
    ]

    assert f"curl --unix-socket /run/user/{uid}/holdfast.sock" in installed.stdout
    assert sorted(running["listen"]) == [
        "tcp:127.0.0.1:8765",
        "unix:/home/bot/.local/share/holdfast/holdfast.sock",
        f"unix:/run/user/{uid}/holdfast.sock",
    ]
    assert "nothing to do" in again.stdout and reload.returncode == 0
    assert [(done.stdout, done.stderr) for done in verified] == [("", "")] * 2
    assert "keep /home/bot/.local/share/holdfast, the data" in removed[0].stdout
    left = machine.exec("find", "/home/bot/.config/systemd", "-name", "holdfast*").stdout
    assert left == ""
    machine.exec("sh", "-c", "rm -rf /home/bot/.local /home/bot/.config/holdfast")


def test_what_cannot_work_is_refused(machine: Lab) -> None:
    """Not root, no manager of the user, an odd name or path, a unit of somebody else: one line each, and nothing is touched."""
    before = what_is_there(machine)
    units = machine.root / "etc/systemd/system"

    assert_refused(machine.exec(*INSTALL, "--yes", user="bot", check=False), "root", "--user")
    assert_refused(run(machine, "--user", "--yes", XDG_RUNTIME_DIR="/run/user/4711"), "enable-linger")
    assert_refused(run(machine, "--yes", "--instance", "Shop 1"), "--instance", "'Shop 1'")
    assert_refused(run(machine, "--yes", "--data-dir", "/srv/my data"), "--data-dir", "/srv/my data")
    assert_refused(run(machine, "--yes", "--data-dir", "/home/bot/data"), "ProtectHome", "/srv")
    assert_refused(run(machine, "--yes", "--data-dir", "/var/spool"), "chown")
    (units / "holdfast.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert_refused(run(machine, "--yes"), "/etc/systemd/system/holdfast.service", "not written by install-service")
    assert_refused(run(machine, "--yes", "--remove"), "/etc/systemd/system/holdfast.service")
    (units / "holdfast.service").unlink()
    packaged = machine.root / "usr/lib/systemd/system/holdfast.service"
    packaged.write_text("[Service]\nExecStart=/bin/true\n")
    assert_refused(run(machine, "--yes"), "systemd/system/holdfast.service", "package")
    packaged.unlink()

    assert what_is_there(machine) == before


@pytest.mark.parametrize(
    ("place", "told"),
    [("/root/holdfast", "ProtectHome"), ("/opt/my holdfast", "'/opt/my holdfast"), ("/opt/closed/holdfast", "o+x")],
)
def test_an_environment_that_the_service_could_not_use_is_refused(machine: Lab, place: str, told: str) -> None:
    """Below /root, in a path with a space, behind a closed directory: said before anything is done."""
    before = what_is_there(machine)
    packages = machine.exec(VENV / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    machine.exec("install", "-d", "-m", "700", "/opt/closed")
    machine.exec("cp", "-a", VENV, place)
    program = machine.root / place.lstrip("/") / "bin/holdfast"
    program.write_text(program.read_text().replace(str(VENV), place))

    done = machine.exec(f"{place}/bin/python", f"{place}/bin/holdfast", "install-service", "--yes", check=False)

    machine.exec("rm", "-rf", place, "/opt/closed")
    assert packages
    assert_refused(done, told)
    assert what_is_there(machine) == before


def test_units_copied_by_hand_are_taken_over(machine: Lab) -> None:
    """Who followed the handbook before gets the same service from the command."""
    machine.install_units()

    done = run(machine, "--yes")

    assert done.returncode == 0, done.stderr
    assert "change /etc/systemd/system/holdfast.service" in done.stdout
    wait_for(lambda: machine.show("holdfast.service", "ActiveState") == "active", 20, "the service")
    assert run(machine, "--remove", "--yes").returncode == 0
    (machine.root / "etc/systemd/system/holdfast@.service").unlink()


def test_a_step_that_fails_is_told(machine: Lab) -> None:
    """When the service does not start, the step, the reason and the ways on are named, exit 1; --remove still works."""
    (machine.root / "etc/holdfast").mkdir()
    (machine.root / "etc/holdfast/holdfast.toml").write_text('flush_every = "soon"\n')

    failed = run(machine, "--yes")
    removed = run(machine, "--remove", "--yes")

    assert failed.returncode == 1
    assert failed.stderr.startswith("holdfast: could not run systemctl start") and failed.stderr.count("\n") == 1
    assert "flush_every" in failed.stderr and "soon" in failed.stderr
    assert "systemctl status holdfast.service" in failed.stderr and "--remove" in failed.stderr
    assert removed.returncode == 0, removed.stderr
