"""Commands that ask the running daemon to show or do something."""

from __future__ import annotations

from typing import Any

import click
import orjson

from holdfast.cli.connection import Daemon, daemon_options
from holdfast.settings import format_size

# A flush of a million sessions takes seconds, on a slow disk a minute.
WORK_TIMEOUT_S = 600.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


@click.command()
@daemon_options
@json_option
def status(daemon: Daemon, as_json: bool) -> None:
    """Show counts, seqs and sizes of the running daemon."""
    answer = daemon.request("GET", "/v1/admin/status")
    if as_json:
        return print_json(answer)

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "value", title=f"Holdfast at {daemon}", title_justify="left")
    for name, value in _flat(answer):
        table.add_row(Text(name), Text(_readable(name, value)))
    Console(soft_wrap=True).print(table)


@click.command()
@daemon_options
@json_option
def flush(daemon: Daemon, as_json: bool) -> None:
    """Write all changed snapshot files now, and wait until they are on disk."""
    report = daemon.request("POST", "/v1/admin/flush", timeout_s=WORK_TIMEOUT_S)
    if as_json:
        return print_json(report)
    click.echo(
        f"flushed up to seq {report['snapshot_seq']}: {report['files']} files, "
        f"{format_size(report['bytes'])}, {report['duration_ms']:.0f} ms"
    )


@click.command()
@daemon_options
@json_option
def reload(daemon: Daemon, as_json: bool) -> None:
    """Read the settings again; exit 1 with the reason when the daemon refuses them."""
    answer = daemon.request("POST", "/v1/admin/reload", timeout_s=WORK_TIMEOUT_S)
    if as_json:
        return print_json(answer)
    changed, waiting = answer.get("changed", []), answer.get("needs_restart", [])
    click.echo(f"reloaded: {', '.join(changed) or 'nothing changed'}")
    if waiting:
        click.echo(f"waiting for a restart: {', '.join(waiting)}")


def print_json(value: Any) -> None:
    """Print *value* indented, as every ``--json`` does."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            rows += _flat(inner, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", inner))
    return rows


def _readable(name: str, value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return f"{value:,} bytes"
        case list():
            return ", ".join(map(str, value)) or "none"
        case _:
            return str(value)
