"""The command that makes Holdfast a service of systemd, and unmakes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click

from holdfast.cli.plan import Step, check_manager, chosen_data_dir, installation, output_of, removal
from holdfast.cli.show import examples, json_option, print_json
from holdfast.cli.units import SYSTEM, Scope, Service, of_user
from holdfast.errors import HoldfastError, SettingsError

INSTANCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
"""Needs no escaping in the name of a unit, and leaves room in the path of a socket."""


@click.command(
    "install-service",
    epilog=examples(
        "sudo /opt/holdfast/bin/holdfast install-service",
        "sudo /opt/holdfast/bin/holdfast install-service --instance shop --yes",
        "holdfast install-service --user --dry-run",
        "sudo /opt/holdfast/bin/holdfast install-service --remove",
    ),
)
@click.option("--user", "for_user", is_flag=True, help="A service of your own account, without root.")
@click.option("--instance", default="", metavar="NAME", help="One of several beside each other: holdfast@NAME.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where all data is to be.")
@click.option("--start/--no-start", default=True, help="Start it as well, or only at the next boot.")
@click.option("--remove", is_flag=True, help="Undo it; the data stays.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, do nothing.")
@json_option
def install_service(
    for_user: bool,
    instance: str,
    data_dir: Path | None,
    start: bool,
    remove: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make Holdfast a service of systemd: units, account, directories. Shows all of it before it does anything."""
    if instance and not INSTANCE_NAME.fullmatch(instance):
        raise click.UsageError(
            f"--instance: expected up to 32 of a-z, 0-9, - and _, found {instance!r}; it names sockets and directories"
        )
    if remove and data_dir is not None:
        raise click.UsageError("--remove takes no --data-dir: the data is never removed")
    scope = of_user(Path.home()) if for_user else SYSTEM
    service = Service(instance)
    check_manager(scope, needs_root=not dry_run)
    if remove:
        plan = list(removal(service, scope))
    else:
        plan = list(installation(service, scope, data_dir.absolute() if data_dir else None, start))
    is_settled = all(step.action is None for step in plan)
    if not as_json:
        _show(plan, service, remove=remove, is_settled=is_settled)
    if not is_settled and not dry_run:
        if not yes:
            _ask_for_consent(can_ask=not as_json)
        for step in plan:
            _do(step, service, scope)
        if not as_json:
            click.echo(f"{service.name} is removed" if remove else _way_on(service, scope, start))
    if as_json:
        steps = [{"step": step.text, "details": step.details} for step in plan]
        print_json({"unit": service.name, "steps": steps, "done": not dry_run})
    return 0


def _ask_for_consent(*, can_ask: bool) -> None:
    if not can_ask or not sys.stdin.isatty() or not sys.stdout.isatty():
        raise SettingsError("nothing was changed, as there is no terminal to ask on; read the plan, then add --yes")
    if not click.confirm("Go ahead?", default=False):
        raise HoldfastError("nothing was changed, as you wished")


def _show(plan: list[Step], service: Service, *, remove: bool, is_settled: bool) -> None:
    if is_settled:
        click.echo(f"nothing to do: {service.name} is {'not installed' if remove else 'installed as it should be'}")
    else:
        click.echo(f"{'Removing' if remove else 'Installing'} {service.name}:")
    for step in plan:
        click.echo(f"  {step.text}")
        for detail in step.details:
            click.echo(f"      {detail}")


def _do(step: Step, service: Service, scope: Scope) -> None:
    if step.action is None:
        return
    began_at = time.time()
    try:
        step.action()
    except (OSError, subprocess.SubprocessError) as error:
        reason = _said_by(service, scope, began_at) or _last_line(_printed_by(error)) or str(error)
        raise HoldfastError(
            f"could not {step.text}: {reason}; what came before it is done:"
            f" see `{' '.join(scope.systemctl)} status {service.name}`, mend it and run the same command again,"
            " or undo it with --remove"
        ) from error


def _said_by(service: Service, scope: Scope, since: float) -> str:
    """What the service, or systemd about its sockets, has in the journal as the reason of a failure; often nothing."""
    journal = ["journalctl", "--quiet", "--no-pager", "--output=cat", f"--since=@{int(since)}"]
    journal += [] if scope.account else ["--user"]
    try:
        lines = output_of(*journal, *(f"--unit={unit}" for unit in service.units)).splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    for line in reversed(lines):
        if line.startswith("holdfast: ") or "Failed to create listening socket" in line:
            return line.removeprefix("holdfast: ")
        if '"event":"daemon.failed"' in line:
            with contextlib.suppress(ValueError, KeyError):
                return str(json.loads(line)["reason"])
    return ""


def _printed_by(error: OSError | subprocess.SubprocessError) -> str:
    return error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else ""


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _way_on(service: Service, scope: Scope, start: bool) -> str:
    systemctl = " ".join(scope.systemctl)
    units = " ".join(service.units)
    socket = service.group_socket(scope).replace("%t", os.environ.get("XDG_RUNTIME_DIR", ""))
    lines = [
        f"{service.name} serves" if start else f"{service.name} is installed; {systemctl} start {units} starts it",
        f"  data      {chosen_data_dir(service, scope) or scope.state / service.directory}",
        f"  ask       curl --unix-socket {socket} http://localhost/readyz",
        f"  look      {systemctl} status {service.name}",
        f"  log       journalctl {'' if scope.account else '--user '}-u {service.name} -o cat -f",
        f"  settings  {scope.config}/{f'{service.instance}.env' if service.instance else 'holdfast.toml'}",
    ]
    if scope.account:
        lines.append(f"  allow     usermod -aG {scope.account} USER, for each account whose programs may use it")
    else:
        lines.append("  stay      loginctl enable-linger, or it ends when you log out")
    return "\n".join([*lines, f"  undo      {_undo(service, scope)}"])


def _undo(service: Service, scope: Scope) -> str:
    options = ["--user"] * (scope.account is None) + [f"--instance {service.instance}"] * bool(service.instance)
    return " ".join(["holdfast install-service --remove", *options])
