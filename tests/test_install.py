"""What install-service makes of the units, and what it refuses; that it works is seen in tests/systemd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli.units import (
    MARKER,
    SYSTEM,
    Scope,
    Service,
    adapted,
    data_dir_drop_in,
    data_dir_of,
    needs_quotes,
    of_user,
)

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted([*(ROOT / "systemd").glob("*.service"), *(ROOT / "systemd").glob("*.socket")])
PROGRAM = Path("/srv/venv/var/lib/bin/holdfast")
DOCUMENTATION = Path("/srv/venv/share/doc/holdfast/systemd")


def settings_of(text: str) -> list[tuple[str, str]]:
    lines = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return [(name, value) for name, _, value in lines]


def user_scope(monkeypatch: pytest.MonkeyPatch) -> Scope:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return of_user(Path("/home/bot"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_of_the_system_differs_only_in_its_paths(unit: Path) -> None:
    """What the handbook and the tests say of the shipped units holds for the installed ones."""
    shipped = unit.read_text()

    made = adapted(shipped, SYSTEM, PROGRAM, DOCUMENTATION)

    assert made.splitlines()[0] == MARKER
    assert "/opt/holdfast" not in made
    back = made.replace(str(PROGRAM), "/opt/holdfast/bin/holdfast")
    back = back.replace(str(DOCUMENTATION), "/opt/holdfast/share/doc/holdfast/systemd")
    assert settings_of(back) == settings_of(shipped)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_of_a_user_needs_nothing_of_the_system(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names no place, no account and no target that only the system has, and keeps what decides how it lives and ends."""
    shipped = settings_of(unit.read_text())

    made = adapted(unit.read_text(), user_scope(monkeypatch), PROGRAM, DOCUMENTATION)

    settings = settings_of(made)
    lifecycle = (
        "Type",
        "NotifyAccess",
        "Timeout",
        "Watchdog",
        "Kill",
        "Restart",
        "UMask",
        "Limit",
        "NoNew",
        "Start",
        "Also",
    )
    assert [one for one in settings if one[0].startswith(lifecycle)] == [
        one for one in shipped if one[0].startswith(lifecycle)
    ]
    assert not {"User", "Group", "SocketUser", "StateDirectory"} & {name for name, _ in settings}
    values = "\n".join(value.replace(str(PROGRAM), "") for _, value in settings)
    for of_the_system in ("/var/lib", "/etc", "/run/", "multi-user.target", "local-fs.target"):
        assert of_the_system not in values
    assert ("WantedBy", "sockets.target" if unit.suffix == ".socket" else "default.target") in settings


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda path: path.name)
def test_a_crash_loop_never_ends_for_good(unit: Path) -> None:
    """Restarts after crashes come too slowly for systemd's start limit; it is there for starts that follow at once."""
    settings = dict(settings_of(unit.read_text()))

    starts_max = int(settings["StartLimitBurst"])

    assert settings["Restart"] == "on-failure"
    assert starts_max * int(settings["RestartSec"]) >= int(settings["StartLimitIntervalSec"]) > 0


def test_a_user_may_have_moved_their_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    """The XDG variables say where a user's units, settings and data are."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/srv/config")
    monkeypatch.setenv("XDG_DATA_HOME", "/srv/data")

    scope = of_user(Path("/home/bot"))

    assert (scope.units, scope.config, scope.state) == (
        Path("/srv/config/systemd/user"),
        Path("/srv/config/holdfast"),
        Path("/srv/data"),
    )


@pytest.mark.parametrize("instance", ["", "shop"])
def test_a_chosen_directory_can_be_read_back(instance: str) -> None:
    """What --remove must know later stands in the drop-in."""
    service = Service(instance)

    drop_ins = data_dir_drop_in(service, SYSTEM, PROGRAM, Path("/srv/bot/data"))

    assert sorted(drop_ins) == sorted(service.units)
    assert data_dir_of(drop_ins[service.name]) == Path("/srv/bot/data")
    assert all(content.startswith(MARKER) for content in drop_ins.values())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/opt/holdfast-1.0_x+y@z/bin", False),
        ("/opt/my holdfast", True),
        ("/opt/50%", True),
        ("/opt/ñ", True),
        ("/o\np", True),
    ],
)
def test_a_path_that_a_unit_would_misread_is_known(path: str, expected: bool) -> None:
    """A space ends a path in a unit, a percent sign begins a specifier."""
    assert needs_quotes(Path(path)) is expected


def refused(*options: str) -> str:
    """What the command says, in one line and with exit 2."""
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "install-service", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("holdfast: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("name", ["Shop", "-shop", "a/b", "..", "a b", "x" * 33, "a%i", "a@b"])
def test_an_instance_has_a_plain_name(name: str) -> None:
    """A name that would need escaping in units, directories or sockets is refused before anything is looked at."""
    assert "--instance" in refused(f"--instance={name}")


def test_the_longest_name_is_taken() -> None:
    """32 letters are not what is refused."""
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs here, so the command has more to say")

    assert "--instance" not in refused(f"--instance={'x' * 32}", "--dry-run")


def test_without_systemd_nothing_is_planned() -> None:
    """Where another init runs, the command says what to do instead."""
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs here")

    assert "holdfast serve" in refused("--yes")


def test_removing_takes_no_directory() -> None:
    """--remove with --data-dir sounds as if the data went: it is refused."""
    assert "never removed" in refused("--remove", "--data-dir=/srv/data")
