"""The commands that look through a data directory, say what is wrong, and put right what can be put right safely."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson

from holdfast.cli.connection import DIRECTORY, WORK_TIMEOUT_S, daemon_flags, named_daemon, settings_of
from holdfast.cli.show import QuietLog, examples, json_option, print_json, printable, readable_count, styled
from holdfast.errors import DirectoryLocked, NotFound, Unavailable
from holdfast.settings import Settings

_COLOURS = {"ok": "green", "notice": "cyan", "warning": "yellow", "error": "red"}
_PATH = "/v1/admin/verify"


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A finding, as a daemon or the directory itself tells it."""

    severity: str
    part: str
    found: str
    expected: str = ""
    action: str = ""
    mend: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A report, likewise."""

    data_dir: str
    is_running: bool
    duration_ms: float
    findings: list[Shown]


@click.command(
    epilog=examples(
        "holdfast verify",
        "holdfast verify --deep",
        "holdfast verify --json | jq '.findings[] | select(.severity == \"error\")'",
        "holdfast verify --backup 2026-11-21T140300.123Z",
    )
)
@click.option(
    "--deep",
    is_flag=True,
    help="Load every backup as well, compare messages with the newest, and look at each page of a running archive.",
)
@click.option("--backup", "backup", metavar="NAME|latest", help="Only this backup: load all of it.")
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The age key of encrypted backups; without a daemon, or with --backup.",
)
@json_option
@daemon_flags
def verify(deep: bool, backup: str | None, as_json: bool, **_: Any) -> int:
    """Look through everything in a data directory: files, journal, archive, backups, permissions, room on the disk.

    Nothing is changed. When a daemon has the directory it does the looking. The exit code is 1 when something is wrong; what
    is only good to know (a notice) is not.
    """
    if backup is not None:
        return _verify_backup(backup, as_json)
    raw = _stopped(deep) if _flag("connect") is None else None
    if raw is None:
        body = orjson.dumps({"deep": deep})
        daemon = named_daemon(click.get_current_context())
        raw = daemon.fetch("POST", _PATH, body=body, timeout_s=WORK_TIMEOUT_S).body
        result = daemon.understood(raw, Result)
    else:
        result = msgspec.json.decode(raw, type=Result)
    if as_json:
        print_json(orjson.loads(raw))
    else:
        _tell(result)
    return 1 if any(finding.severity in ("warning", "error") for finding in result.findings) else 0


def _flag(name: str) -> Any:
    return click.get_current_context().params.get(name)


def _stopped(deep: bool) -> bytes | None:
    """The report of a directory that nobody has open, as JSON; None when a daemon has it.

    Raises:
        DirectoryLocked: somebody has it who does not answer.
    """
    from holdfast.care.verify import verify as look_through  # here, since it is slow to import

    settings = settings_of(_flag("data_dir"))
    try:
        return msgspec.json.encode(
            look_through(settings.data_dir, settings, deep=deep, seal=_seal_of(settings), progress=_progress)
        )
    except DirectoryLocked as locked:
        try:
            named_daemon(click.get_current_context()).fetch("GET", "/healthz")
        except Unavailable as error:
            raise DirectoryLocked(f"{locked}; it has the directory open and does not answer: {error}") from error
        return None
    finally:
        _progress("")


def _seal_of(settings: Settings) -> Any:
    """What opens encrypted backups; None when the settings name no key."""
    from holdfast.care.seal import seal_of  # here, since it is slow to import

    return seal_of(settings, _flag("identity"))


def _progress(text: str) -> None:
    """Show on a terminal what is being done."""
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(text)}", err=True, nl=False)


def _tell(result: Result) -> None:
    state = "in use" if result.is_running else "stopped"
    click.echo(f"{printable(result.data_dir)} ({state}), looked through in {result.duration_ms / 1000:.1f} s")
    width = max(len(finding.part) for finding in result.findings)
    for finding in result.findings:
        severity = styled(f"{finding.severity:7}", fg=_COLOURS.get(finding.severity))
        click.echo(f"{severity}  {finding.part:{width}}  {printable(finding.found)}")
        indent = " " * (11 + width)
        if finding.expected:
            click.echo(f"{indent}expected: {printable(finding.expected)}")
        if finding.action:
            click.echo(f"{indent}do: {printable(finding.action)}")
        if finding.mend:
            click.echo(f"{indent}holdfast mend: {finding.mend}")
    wrong = sum(finding.severity in ("warning", "error") for finding in result.findings)
    click.echo(styled("all in order", fg="green") if not wrong else styled(readable_count(wrong, "problem"), fg="red"))


@click.command(epilog=examples("holdfast mend --dry-run", "holdfast mend --yes"))
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.option("--data-dir", type=DIRECTORY, metavar="DIR", help="The data directory; nobody may have it open.")
def mend(data_dir: str | None, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Put right what is safe to put right in a stopped data directory, after a backup.

    That is what `holdfast verify` says of each problem behind `holdfast mend`. What is damaged goes to quarantine/, nothing is
    lost. The exit code is 1 when something is still wrong afterwards, and why is said.
    """
    from holdfast.care.mend import mend as put_right  # here, since it is slow to import
    from holdfast.care.verify import verify as look_through

    settings = settings_of(data_dir)
    seal = _seal_of(settings)
    before = look_through(settings.data_dir, settings, seal=seal, progress=_progress)
    _progress("")
    wanted = [finding for finding in before.findings if finding.mend]
    if dry_run or not wanted:
        if as_json:
            print_json(
                {
                    "dry_run": dry_run,
                    "backup": "",
                    "steps": [],
                    "wanted": msgspec.to_builtins(wanted),
                    "problems": len(before.wrong),
                }
            )
        else:
            _tell_wanted([Shown(**_shown(finding)) for finding in wanted], len(before.wrong))
        return 1 if before.wrong and not wanted else 0
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here; look with --dry-run, then give --yes")
        _tell_wanted([Shown(**_shown(finding)) for finding in wanted], len(before.wrong))
        click.confirm("do that now, after a backup?", abort=True)
    report = put_right(settings, QuietLog(), seal=seal, progress=_progress)
    _progress("")
    after = report.after or report.before
    if as_json:
        print_json(msgspec.to_builtins(report) | {"dry_run": False, "problems": len(after.wrong)})
        return 1 if after.wrong else 0
    click.echo(f"backup {report.backup}")
    for step in report.steps:
        click.echo(printable(step))
    _tell(msgspec.convert(msgspec.to_builtins(after), Result))
    return 1 if after.wrong else 0


def _shown(finding: Any) -> dict[str, str]:
    return {name: getattr(finding, name) for name in Shown.__struct_fields__}


def _tell_wanted(wanted: list[Shown], problems: int) -> None:
    if not wanted:
        click.echo(
            "nothing to mend"
            + (f"; {readable_count(problems, 'problem')} remain, see holdfast verify" if problems else "")
        )
        return
    for finding in wanted:
        click.echo(f"{finding.part}: {printable(finding.found)}")
        click.echo(f"  {finding.mend}")


def _verify_backup(name: str, as_json: bool) -> int:
    """Load all of the backup *name*, which a running daemon does not touch."""
    from holdfast.care.backup_set import list_sets
    from holdfast.care.prove import prove

    settings = settings_of(_flag("data_dir"))
    sets = {found.name: found for found in list_sets(settings.data_dir)}
    if name == "latest" and sets:
        name = next(iter(sets))
    if name not in sets:
        there = ", ".join(list(sets)[:3]) or "none"
        raise NotFound(f"no backup {name!a:.80} in {settings.data_dir}; the newest are: {there}")
    _progress(f"loading {name}")
    with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
        proof = prove(sets[name], _seal_of(settings), Path(scratch))
    _progress("")
    if as_json:
        print_json(msgspec.to_builtins(proof) | {"name": name})
    elif proof.ok and proof.reason:
        click.echo(f"backup {name}: {printable(proof.reason)}")
    elif proof.ok:
        records = ", ".join(f"{count:,} {what}" for what, count in sorted(proof.counts.items()) if count)
        click.echo(f"backup {name} can be loaded: {records or 'empty'}")
    else:
        click.echo(f"backup {name} cannot be restored: {printable(proof.reason)}")
    return 0 if proof.ok else 1
