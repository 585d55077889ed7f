"""The command that gives back room which nothing uses."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from holdfast.care.compact import CompactReport, PartUsage
from holdfast.cli.connection import WORK_TIMEOUT_S, daemon_flags, named_daemon, settings_of
from holdfast.cli.show import Column, examples, json_option, print_json, print_table, printable, readable_size
from holdfast.errors import DirectoryLocked, NotFound, Unavailable

_NOTHING = PartUsage(0, 0)


@click.command(epilog=examples("holdfast compact", "holdfast compact --json | jq .freed_bytes"))
@json_option
@daemon_flags
def compact(as_json: bool, connect: str | None, data_dir: str | None, **_: Any) -> None:
    """Give back room: prune by the rules, pack old conversations, write the archive without what is free in it.

    A running daemon goes on serving meanwhile. The archive needs as much free room again for a while.
    """
    try:
        report = (
            named_daemon(click.get_current_context())
            .fetch("POST", "/v1/admin/compact", timeout_s=WORK_TIMEOUT_S)
            .decoded(CompactReport)
        )
    except Unavailable:
        stopped = _stopped(data_dir) if connect is None else None
        if stopped is None:
            raise
        report = stopped
    if as_json:
        return print_json(msgspec.to_builtins(report))
    rows = [
        [
            name,
            readable_size(before.bytes),
            readable_size(after.bytes),
            f"{before.files:,}",
            f"{after.files:,}",
        ]
        for name in dict.fromkeys([*report.before, *report.after])
        for before, after in [(report.before.get(name, _NOTHING), report.after.get(name, _NOTHING))]
    ]
    columns = [
        Column("Part"),
        *(Column(one, is_number=True) for one in ("Before", "After", "Files before", "Files after")),
    ]
    print_table(columns, rows)
    gained = f"{readable_size(report.freed_bytes)} less" if report.freed_bytes >= 0 else "no less"
    click.echo(f"{gained} in {report.duration_ms / 1000:.1f} s; {report.condensed_messages:,} messages packed")


def _stopped(data_dir: str | None) -> CompactReport | None:
    """The same of a directory that nobody has open; None when somebody has."""
    from holdfast.care.compact import compact as give_back  # here, since a running daemon does the work
    from holdfast.recovery import open_engine

    settings = settings_of(data_dir)
    if not settings.data_dir.is_dir():
        raise NotFound(f"{settings.data_dir} is not there; name the data directory by --data-dir")
    try:
        engine = open_engine(settings, progress=_show)
    except DirectoryLocked:
        return None
    try:
        return give_back(engine, progress=_show)
    finally:
        engine.close()
        _show("")


def _show(text: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(text)}", err=True, nl=False)
