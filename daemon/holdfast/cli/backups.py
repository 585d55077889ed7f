"""Commands that make backups and show what there is to go back to."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson

from holdfast.cli.connection import WORK_TIMEOUT_S, daemon_flags, named_daemon, settings_of
from holdfast.cli.show import (
    Column,
    examples,
    json_option,
    print_json,
    print_table,
    printable,
    readable_count,
    readable_size,
    readable_span,
    styled,
)
from holdfast.clock import parse_ms
from holdfast.errors import DirectoryLocked, NotFound, Unavailable
from holdfast.ops import BackupInfo, BackupList, BackupReport
from holdfast.settings import Settings

BACKUP_TIMEOUT_S = 6 * WORK_TIMEOUT_S
"""A backup gives way to everybody else, so it takes the time it needs."""


@click.command(epilog=examples("holdfast backup", "holdfast backup --json | jq -r .name"))
@json_option
@daemon_flags
def backup(as_json: bool, **_: Any) -> int:
    """Make a backup of everything now, and load everything from it to prove it.

    The daemon makes it while it serves; when none has the data directory it is made here. Exit code 1 when the proof failed: then
    the backup is there, and should not be counted on.
    """
    report = _backed_up_stopped() if _flag("connect") is None else None
    if report is None:
        daemon = named_daemon(click.get_current_context())
        _show("the daemon makes a backup")
        try:
            reply = daemon.fetch("POST", "/v1/admin/backup", body=b'{"reason":"command"}', timeout_s=BACKUP_TIMEOUT_S)
        finally:
            _show("")
        report = reply.decoded(BackupReport)
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        click.echo(
            f"{report.name}: {readable_count(report.records, 'record')} up to seq {report.seq}, "
            f"{readable_size(report.bytes)} ({readable_size(report.new_bytes)} new), {report.duration_ms / 1000:.1f} s"
        )
        for note in report.notes:
            click.echo(styled(f"mind: {printable(note)}", fg="yellow"))
        click.echo(_proof_line(report.proved, report.problem))
    return 1 if report.proved is False else 0


@click.command(
    epilog=examples(
        "holdfast backups",
        "holdfast backups --json | jq '.items[0]'",
        "holdfast backups --verify 2026-11-21T140300.123Z",
        "holdfast backups --fetch latest",
    )
)
@click.option(
    "--fetch",
    "fetched",
    metavar="NAME|latest",
    help="Bring this backup here from the second place (backups.copy_to); `holdfast copies` shows those there.",
)
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The age key of an encrypted backup, for --verify.",
)
@click.option(
    "--verify", "name", metavar="NAME|latest", help="Load everything from this backup, and note in it how that went."
)
@json_option
@daemon_flags
def backups(name: str | None, fetched: str | None, as_json: bool, **_: Any) -> int:
    """Show the backups, how each proof went, and how far back any moment can be restored."""
    if fetched is not None:
        from holdfast.cli.copies import show_brought

        show_brought(_settings(), "", fetched, as_json=as_json)
        return 0
    if name is not None:
        return _verify(name, as_json)
    found = _listed()
    if as_json:
        print_json(msgspec.to_builtins(found))
        return 0
    if not found.items:
        click.echo("no backups yet; `holdfast backup` makes one")
    else:
        columns = [
            Column("Name"),
            Column("Age", is_number=True),
            Column("Reason"),
            Column("Seq", is_number=True),
            Column("Records", is_number=True),
            Column("Size", is_number=True),
            Column("New", is_number=True),
            Column("Proved", is_long=True),
        ]
        print_table(columns, [_row(info) for info in found.items])
    history = found.history
    if history.problem:
        click.echo(styled(f"history: {printable(history.problem)}", fg="yellow"))
    elif history.since:
        click.echo(
            f"any moment since {history.since} can be restored; the history takes {readable_size(history.bytes)} "
            f"in {readable_count(history.parts, 'part')}"
        )
    elif history.parts:
        click.echo(
            styled("no moment can be restored before the next backup is made; see `holdfast verify`", fg="yellow")
        )
    return 0


def _row(info: BackupInfo) -> list[str]:
    proved = {True: "yes", False: "NO", None: "not yet"}[info.proved]
    if not info.at:
        proved = f"cannot be read: {info.problem}"
    elif info.problem:
        # A set that is encrypted for keys that are not here: all that can be checked of it is.
        proved = info.problem if info.proved else f"{proved}: {info.problem}"
    if info.foreign:
        proved += ", of another data directory"
    return [
        info.name,
        readable_span(max(0.0, time.time() - parse_ms(info.at) / 1000)) if info.at else "-",
        info.reason or "-",
        str(info.seq),
        f"{info.records:,}",
        readable_size(info.bytes),
        readable_size(info.new_bytes),
        proved,
    ]


def _listed() -> BackupList:
    """What the daemon says, or without one the directory itself."""
    context = click.get_current_context()
    try:
        return named_daemon(context).fetch("GET", "/v1/admin/backups").decoded(BackupList)
    except Unavailable:
        if _flag("connect") is not None:
            raise
    from holdfast.care.backup_stopped import list_stopped  # here, since a running daemon does the work

    return list_stopped(_settings())


def _backed_up_stopped() -> BackupReport | None:
    """What a backup of a directory that nobody has open did; None when somebody has."""
    from holdfast.care.backup_stopped import report_stopped  # here, since a running daemon does the work
    from holdfast.disk.files import DirectoryLock

    settings = _settings()
    if not settings.data_dir.is_dir():
        raise NotFound(f"{settings.data_dir} is not there; name the data directory by --data-dir")
    try:
        lock = DirectoryLock(settings.data_dir)
    except DirectoryLocked:
        return None
    try:
        return report_stopped(settings, "command", progress=_show)
    finally:
        _show("")
        lock.release()


def _verify(name: str, as_json: bool) -> int:
    from holdfast.care.backup_set import list_sets, write_proof
    from holdfast.care.prove import prove
    from holdfast.care.seal import seal_of

    settings = _settings()
    sets = {found.name: found for found in list_sets(settings.data_dir)}
    if name == "latest" and sets:
        name = next(iter(sets))
    if name not in sets:
        there = ", ".join(list(sets)[:3]) or "none"
        raise NotFound(f"no backup {name!a:.80} in {settings.data_dir}; the newest are: {there}")
    _show(f"loading {name}")
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
            proof = prove(sets[name], seal_of(settings, _flag("identity")), Path(scratch))
        write_proof(sets[name].path, proof)
    finally:
        _show("")
    if as_json:
        print_json(orjson.loads(msgspec.json.encode(proof)) | {"name": name})
    else:
        click.echo(f"{name}: {_proof_line(proof.ok, proof.reason)}")
    return 0 if proof.ok else 1


def _proof_line(proved: bool | None, problem: str) -> str:
    if proved and problem:
        return styled(printable(problem), fg="yellow")
    if proved:
        return styled("proved: everything was loaded from it", fg="green")
    if proved is None:
        return styled(f"not proved yet: {printable(problem)}", fg="yellow")
    return styled(f"NOT PROVED: {printable(problem)}", fg="red")


def _settings() -> Settings:
    return settings_of(_flag("data_dir"))


def _flag(name: str) -> Any:
    return click.get_current_context().params.get(name)


def _show(text: str) -> None:
    """Show on a terminal what is being done."""
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(text)}", err=True, nl=False)
