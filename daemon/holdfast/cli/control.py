"""Commands that make the running daemon do something now."""

from __future__ import annotations

import click

from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_options
from holdfast.cli.show import examples, json_option, print_json, readable_count, readable_size


@click.command(epilog=examples("holdfast flush && cp -a data/*.json /somewhere/"))
@json_option
@daemon_options
def flush(daemon: Daemon, as_json: bool) -> None:
    """Write all changed snapshot files now, and wait until they are on disk."""
    report = daemon.fetch("POST", "/v1/admin/flush", timeout_s=WORK_TIMEOUT_S).fields()
    if as_json:
        return print_json(report)
    click.echo(
        f"flushed up to seq {report['snapshot_seq']}: {readable_count(report['files'], 'file')}, "
        f"{readable_size(report['bytes'])}, {report['duration_ms']:.0f} ms"
    )


@click.command(epilog=examples("holdfast reload"))
@json_option
@daemon_options
def reload(daemon: Daemon, as_json: bool) -> None:
    """Read the settings again; exit 1 with the reason when the daemon refuses them."""
    answer = daemon.fetch("POST", "/v1/admin/reload", timeout_s=WORK_TIMEOUT_S).fields()
    if as_json:
        return print_json(answer)
    changed, waiting = answer.get("changed", []), answer.get("needs_restart", [])
    click.echo(f"reloaded: {', '.join(changed) or 'nothing changed'}")
    if waiting:
        click.echo(f"waiting for a restart: {', '.join(waiting)}")
