"""What it takes to install or remove a service: checked first, then planned step by step."""

from __future__ import annotations

import difflib
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import holdfast
from holdfast.cli.units import (
    MARKER,
    SYSTEM,
    Scope,
    Service,
    adapted,
    data_dir_drop_in,
    data_dir_of,
    needs_quotes,
    shipped_units,
)
from holdfast.errors import SettingsError

COMMAND_TIMEOUT_S = 180.0
"""Starting waits until the journal is replayed, stopping until all is flushed."""

SEARCH_DEPTH = 4
"""How deep below the root a data directory is looked for before its account is removed: /srv/shop/bot/data."""

SEARCH_TIMEOUT_S = 60.0

NOT_SEARCHED = ("/boot", "/dev", "/proc", "/run", "/sys", "/usr")

DROP_IN = "data-dir.conf"

ACCOUNT_COMMENT = "Holdfast, made by install-service"
"""In the account's entry: only an account with it is ours to remove."""

HIDDEN_FROM_SERVICE = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What ProtectHome= and PrivateTmp= in the units keep out of sight."""

FOREIGN_UNIT_PLACES = (
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)


class Step(NamedTuple):
    """One thing to do.

    Attributes:
        text: what it is, in the words of the plan.
        action: does it; None for what is only told.
        details: lines below it, such as what changes in a file.
    """

    text: str
    action: Callable[[], object] | None
    details: list[str]


# The plans.


def installation(service: Service, scope: Scope, data_dir: Path | None, start: bool) -> Iterator[Step]:
    """The steps to *service* with its data in *data_dir*, or where it was before, or in the usual place.

    What is already so takes no step. Nothing is changed before a step is done.

    Raises:
        SettingsError: it could not run here, or would be in the way of what is not ours.
    """
    program = _check_program(scope)
    usual, known = scope.state / service.directory, chosen_data_dir(service, scope)
    # Chosen once, it is meant until another is: data must not seem lost after an update.
    data_dir = data_dir or known
    if data_dir == usual:
        data_dir = None
    if data_dir is not None:
        _check_data_dir(data_dir, scope)
    units = shipped_units()
    wanted = {scope.units / name: adapted((units / name).read_text(), scope, program, units) for name in service.files}
    for path in wanted:
        _check_is_ours(path)
    drop_ins = data_dir_drop_in(service, scope, program, data_dir) if data_dir is not None else {}
    wanted |= {_drop_in(scope, unit): content for unit, content in drop_ins.items()}

    if scope.account and _account_id(scope.account) is None:
        yield _make_account(scope)
    if scope.account and not scope.config.is_dir():
        yield Step(f"make directory {scope.config} for settings", lambda: scope.config.mkdir(mode=0o755), [])
    if data_dir is not None and not (data_dir.exists() and _is_owned(data_dir, scope)):
        text = f"make directory {data_dir}, mode 700, of {scope.account or 'this user'}"
        yield Step(text, _make_data_dir(data_dir, scope), [])
    left = known or usual
    if left != (data_dir or usual) and left.exists():
        yield Step(f"leave the data in {left} where it is", None, [])
    written = [step for path, content in wanted.items() if (step := _write(path, content)) is not None]
    # Of a directory that was chosen earlier.
    stale = [_drop_in(scope, unit) for unit in service.units if unit not in drop_ins]
    removed = [_unlink(path) for path in stale if path.exists()]
    yield from written
    yield from removed
    if written or removed:
        yield _run(scope, "daemon-reload")
    if not _is(scope, "is-enabled", service.units):
        yield _run(scope, "enable", *service.units)
    if start and not _is(scope, "is-active", service.units):
        yield _run(scope, "start", *service.units)
    elif start and (written or removed):
        yield _run(scope, "restart", *service.units)


def removal(service: Service, scope: Scope) -> Iterator[Step]:
    """The steps that undo ``installation``; they keep the data, and what other instances need.

    Raises:
        SettingsError: a unit is not ours.
    """
    others = _other_instances(service, scope)
    kept = ["holdfast@.service"] if others else []
    drop_ins = [_drop_in(scope, unit) for unit in service.units]
    files = [scope.units / name for name in service.files if name not in kept]
    present = [path for path in [*drop_ins, *files] if (content := _content(path)) is not None and _is_ours(content)]
    for path in files:
        if path.exists() and path not in present:
            raise SettingsError(f"{path} was not written by install-service; remove it the way it came")
    is_active = _is(scope, "is-active", service.units, every=False)
    if is_active:
        # Both at once, or the socket would start the service again.
        yield _run(scope, "stop", *service.units)
    if _is(scope, "is-enabled", service.units, every=False):
        yield _run(scope, "disable", *service.units)
    for path in present:
        yield _unlink(path)
    if present:
        yield _run(scope, "daemon-reload")
        # Otherwise a unit that had failed would still be listed.
        yield _run(scope, "reset-failed", *service.units, may_fail=True)
    for data_dir in sorted(set(_data_dirs(service, scope))):
        yield Step(f"keep {data_dir}, the data", None, [])
    if not scope.account or others or _is_installed_otherwise(service, scope):
        return
    if scope.config.is_dir() and not any(scope.config.iterdir()):
        yield Step(f"remove the empty directory {scope.config}", scope.config.rmdir, [])
    if _is_account_ours(scope.account):
        found = _file_of(scope.account)
        if found:
            yield Step(f"keep user {scope.account}, to whom {found} belongs", None, [])
        else:
            yield Step(f"remove user and group {scope.account}", lambda: _call("userdel", str(scope.account)), [])


def _make_account(scope: Scope) -> Step:
    account = str(scope.account)
    options = ["--system", "--user-group", f"--home-dir={scope.state}/holdfast", "--no-create-home"]
    options += ["--shell=/usr/sbin/nologin", f"--comment={ACCOUNT_COMMENT}"]
    return Step(f"make user and group {account}, without login", lambda: _call("useradd", *options, account), [])


def _make_data_dir(data_dir: Path, scope: Scope) -> Callable[[], None]:
    def make() -> None:
        data_dir.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        data_dir.mkdir(mode=0o700, exist_ok=True)
        data_dir.chmod(0o700)
        if scope.account:
            shutil.chown(data_dir, scope.account, scope.account)

    return make


def _write(path: Path, content: str) -> Step | None:
    """The step that makes *path* hold *content*; None when it does."""
    before = _content(path)
    if before == content:
        return None
    changes = difflib.unified_diff((before or content).splitlines(), content.splitlines(), lineterm="", n=0)
    # Without the names of the files and the positions of the changes.
    details = [line for line in changes if not line.startswith(("---", "+++", "@@"))]

    def write() -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(content)
        new.chmod(0o644)
        new.replace(path)

    return Step(f"write {path}" if before is None else f"change {path}", write, details)


def _unlink(path: Path) -> Step:
    def unlink() -> None:
        path.unlink()
        if path.parent.name.endswith(".d") and not any(path.parent.iterdir()):
            path.parent.rmdir()

    return Step(f"remove {path}", unlink, [])


def _run(scope: Scope, *arguments: str, may_fail: bool = False) -> Step:
    command = [*scope.systemctl, *arguments]
    return Step(f"run {' '.join(command)}", lambda: _call(*command, may_fail=may_fail), [])


# What must be so.


def check_manager(scope: Scope, *, needs_root: bool) -> None:
    """Return when the service manager of *scope* can be talked to, and changed where *needs_root*.

    Raises:
        SettingsError: it cannot.
    """
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        raise SettingsError(
            "systemd does not run here, and Holdfast can be installed as a service of nothing else;"
            " let your own supervisor run `holdfast serve --data-dir DIR`"
        )
    if scope.account:
        if needs_root and os.geteuid() != 0:
            raise SettingsError(
                "a service of the system needs root, found another user; run it with sudo, or add --user for a service of your own"
            )
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    if not Path(runtime, "systemd/private").exists():
        raise SettingsError(
            f"expected the service manager of this user at {runtime}/systemd, found none; log in as this user, not by"
            " su or sudo, or have root run `loginctl enable-linger USER`, then try again"
        )
    os.environ["XDG_RUNTIME_DIR"] = runtime


def _check_program(scope: Scope) -> Path:
    """The command that the unit will run.

    Raises:
        SettingsError: systemd could not, or would not be allowed to, run it.
    """
    program = Path(sysconfig.get_path("scripts"), "holdfast")
    if not os.access(program, os.X_OK):
        raise SettingsError(f"expected the command holdfast at {program}, found none; install the package with pip")
    # The environment, the interpreter it was made from, and in an editable installation the source.
    needed = {program, Path(os.path.realpath(sys.executable)), Path(holdfast.__file__).resolve()}
    for path in sorted(needed):
        if needs_quotes(path):
            raise SettingsError(
                f"a unit takes only paths of plain letters, found {str(path)!r}; install into a place like /opt/holdfast"
            )
        if scope.account:
            _check_seen_by_service(
                path, "install Holdfast into a place like /opt/holdfast, with an interpreter of the system"
            )
    return program


def _check_seen_by_service(path: Path, advice: str, *, option: str = "") -> None:
    """Refuse a *path* that the units keep from the service; *option* names what the user chose it by."""
    hidden = next((place for place in HIDDEN_FROM_SERVICE if path.is_relative_to(place)), None)
    if hidden is not None:
        raise SettingsError(
            f"{option}{path} lies below {hidden}, which ProtectHome=yes and PrivateTmp=yes hide from the service;"
            f" {advice}, or add --user"
        )
    closed = _closed_parent(path)
    if closed is not None:
        raise SettingsError(
            f"{option}{closed} is closed to the account of the service, which needs {path}; chmod o+x it, or {advice}"
        )


def _closed_parent(path: Path) -> Path | None:
    """The directory above *path* into which only its owner and group may look."""
    return next((parent for parent in path.parents if parent.is_dir() and not parent.stat().st_mode & 0o001), None)


def _check_data_dir(data_dir: Path, scope: Scope) -> None:
    if needs_quotes(data_dir):
        raise SettingsError(
            f"--data-dir: a unit takes only paths of plain letters, found {str(data_dir)!r}; choose another"
        )
    if scope.account:
        _check_seen_by_service(data_dir, "choose a place like /srv/holdfast", option="--data-dir: ")
    if data_dir.exists() and not data_dir.is_dir():
        raise SettingsError(f"--data-dir: expected a directory at {data_dir}, found something else; choose another")
    if data_dir.exists() and any(data_dir.iterdir()) and not _is_owned(data_dir, scope):
        raise SettingsError(
            f"--data-dir: {data_dir} belongs to user id {data_dir.stat().st_uid};"
            f" `chown -R {scope.account or os.getuid()}: {data_dir}` first, or choose another"
        )


def _check_is_ours(path: Path) -> None:
    """Refuse to overwrite or hide a unit that is not ours; one copied by hand from the package counts as ours."""
    for other in (Path(place, path.name) for place in FOREIGN_UNIT_PLACES if path.parent == SYSTEM.units):
        if other.exists():
            raise SettingsError(
                f"expected no {path.name} but our own, found {other}; remove the package that brought it, or use that one"
            )
    content = _content(path)
    if content is None or _is_ours(content):
        return
    shipped = shipped_units() / path.name
    if not shipped.is_file() or shipped.read_text() != content:
        raise SettingsError(
            f"{path} was not written by install-service; move it away first, or keep to it and run systemctl yourself"
        )


# What is there.


def _drop_in(scope: Scope, unit: str) -> Path:
    return scope.units / f"{unit}.d" / DROP_IN


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _is_ours(content: str) -> bool:
    return content.startswith(MARKER)


def _is(scope: Scope, question: str, units: list[str], *, every: bool = True) -> bool:
    answers = [_ask(scope, question, "--quiet", unit).returncode == 0 for unit in units]
    return all(answers) if every else any(answers)


def _other_instances(service: Service, scope: Scope) -> list[str]:
    """Instances of the template beside *service* that are enabled or running."""
    enabled = {path.name for path in scope.units.glob("*.wants/holdfast@*.service")}
    running = _ask(scope, "list-units", "--all", "--plain", "--no-legend", "holdfast@*.service").stdout.split("\n")
    return sorted((enabled | {line.split()[0] for line in running if line.strip()}) - {service.name})


def _is_installed_otherwise(service: Service, scope: Scope) -> bool:
    return bool(service.instance) and (scope.units / "holdfast.service").exists()


def _data_dirs(service: Service, scope: Scope) -> Iterator[Path]:
    """Where data of *service* is: the usual place, and the one that was chosen."""
    for data_dir in (scope.state / service.directory, chosen_data_dir(service, scope)):
        if data_dir is not None and data_dir.is_dir():
            yield data_dir


def chosen_data_dir(service: Service, scope: Scope) -> Path | None:
    """Where the data of *service* was moved to; None when it stands in the usual place."""
    return data_dir_of(_content(_drop_in(scope, service.name)) or "")


def _file_of(account: str) -> str:
    """A file or directory of *account*, or why there may be one; empty when there is none SEARCH_DEPTH below the root."""
    excluded = [part for place in NOT_SEARCHED for part in ("-path", place, "-prune", "-o")]
    command = ["find", "/", "-maxdepth", str(SEARCH_DEPTH), *excluded, "-user", account, "-print", "-quit"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SEARCH_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"perhaps something ({type(error).__name__} while looking)"
    return done.stdout.strip()


def _is_owned(path: Path, scope: Scope) -> bool:
    return path.stat().st_uid == (_account_id(scope.account) if scope.account else os.getuid())


def _account_id(account: str | None) -> int | None:
    try:
        return pwd.getpwnam(account or "").pw_uid
    except KeyError:
        return None


def _is_account_ours(account: str) -> bool:
    return _account_id(account) is not None and pwd.getpwnam(account).pw_gecos == ACCOUNT_COMMENT


def _ask(scope: Scope, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*scope.systemctl, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)


def output_of(*command: str) -> str:
    """What *command* prints; raises OSError or SubprocessError when it fails."""
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True).stdout


def _call(*command: str, may_fail: bool = False) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=not may_fail)
