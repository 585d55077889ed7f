"""The command that shows how the running daemon is, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import orjson

from holdfast.cli.connection import Daemon, daemon_options
from holdfast.cli.show import (
    cells_of,
    examples,
    is_live,
    json_option,
    print_json,
    printable,
    readable_count,
    readable_size,
    readable_span,
    styled,
)
from holdfast.clock import parse_ms
from holdfast.errors import Unavailable

if TYPE_CHECKING:
    from rich.text import Text

WATCH_S = 2.0
"""Between two looks unless told otherwise."""

_GOOD, _BAD = "green", "red"

# What is shown first, in this order and under these names; whatever else the daemon tells follows as it is.
_TITLES = {
    "version": "version",
    "pid": "pid",
    "uptime_s": "up for",
    "listen": "listening on",
    "data_dir": "data directory",
    "durability": "durability",
    "sessions": "sessions",
    "pending_orders": "orders pending",
    "completed_orders": "orders closed",
    "users": "users",
    "collections": "collections",
    "conversations": "conversations",
    "open_escalations": "escalations open",
    "leases": "leases",
    "idempotency_keys": "idempotency keys",
    "seq": "seq",
    "durable_seq": "seq durable",
    "snapshot_seq": "seq in snapshots",
    "archived_seq": "seq in the archive",
    "journal_bytes": "journal",
    "snapshot_bytes": "snapshots",
    "last_flush": "last flush",
}
_SHOWN_OTHERWISE = ("state", "degraded", "journal_segments", "backups", "copies", "disk", "parts")


class Row(NamedTuple):
    """A line of the status; *colour* when it says how things are."""

    title: str
    text: str
    colour: str | None = None


@click.command(
    epilog=examples(
        "holdfast status",
        "holdfast status --json | jq .sessions",
        "holdfast status --watch",
        "holdfast status --watch 0.5",
    )
)
@click.option(
    "--watch",
    type=click.FloatRange(0.1, 86400),
    is_flag=False,
    flag_value=WATCH_S,
    metavar="[SECONDS]",
    help=f"Show it again and again until ctrl-C; every {WATCH_S:g} s unless told otherwise.",
)
@json_option
@daemon_options
def status(daemon: Daemon, watch: float | None, as_json: bool) -> None:
    """Show counts, seqs and sizes of the running daemon.

    While it watches, --json prints one object a line, and a daemon that is gone is waited for.
    """
    if watch is None:
        answer = daemon.fetch("GET", "/v1/admin/status").fields()
        return print_json(answer) if as_json else _print_rows(daemon, rows(answer))
    try:
        if as_json:
            for found in _looks(daemon, watch):
                click.echo(orjson.dumps(found if isinstance(found, dict) else _gone(found)))
        elif is_live():
            _show_live(daemon, watch)
        else:
            for shown in _watched(daemon, watch):
                _print_rows(daemon, shown)
                click.echo()
    except KeyboardInterrupt:
        # How one stops looking; nothing has failed.
        return


def _looks(daemon: Daemon, every_s: float) -> Iterator[dict[str, Any] | Unavailable]:
    """What the daemon says, or why it says nothing, again and again at a steady pace."""
    next_at = time.monotonic()
    while True:
        try:
            yield daemon.fetch("GET", "/v1/admin/status").fields()
        except Unavailable as error:
            yield error
        now = time.monotonic()
        next_at = max(next_at + every_s, now)
        time.sleep(next_at - now)


def _watched(daemon: Daemon, every_s: float) -> Iterator[list[Row]]:
    """The rows of each look, with the ops a second between them."""
    before: tuple[float, int, int] | None = None
    for found in _looks(daemon, every_s):
        if isinstance(found, Unavailable):
            before = None
            yield [Row("state", "no daemon, waiting", _BAD), Row("reason", found.detail)]
            continue
        now = (time.monotonic(), found["seq"], found["pid"])
        rate = None
        # The seqs of another process may begin again where its journal ended.
        if before is not None and now[2] == before[2] and now[0] > before[0]:
            rate = (now[1] - before[1]) / (now[0] - before[0])
        before = now
        yield rows(found, rate)


def _gone(error: Unavailable) -> dict[str, Any]:
    return {"state": "NO_DAEMON", "detail": error.detail}


def rows(status: dict[str, Any], rate: float | None = None) -> list[Row]:
    """The lines that show *status*, with *rate* ops a second where that is known."""
    reasons = status.get("degraded") or []
    shown = [Row("state", f"{status.get('state', '-')}{', degraded' if reasons else ''}", _BAD if reasons else _GOOD)]
    shown += [Row("degraded", str(reason), _BAD) for reason in reasons]
    if rate is not None:
        shown.append(Row("ops", f"{rate:,.0f} a second"))
    shown += [Row(title, _readable(name, status[name], status)) for name, title in _TITLES.items() if name in status]
    others = {name: value for name, value in status.items() if name not in (*_TITLES, *_SHOWN_OTHERWISE)}
    shown += [Row(name, _readable(name, value, status)) for name, value in _flat(others)]
    shown += [*_backup_rows(status.get("backups")), *_copy_rows(status.get("copies"))]
    return shown + list(_disk_rows(status.get("disk") or {})) + list(_part_rows(status.get("parts") or {}))


def _backup_rows(backups: dict[str, Any] | None) -> Iterator[Row]:
    """How many there are, how old the newest is, and whether everything could be loaded from it."""
    if backups is None:
        return
    if backups["newest_at"] is None:
        yield Row("backups", "none yet")
        return
    proved = "proved" if backups["is_proved"] else "not proved"
    yield Row(
        "backups",
        f"{backups['count']:,}, the newest {_age(backups['newest_at'])} old, {proved}",
        None if backups["is_proved"] else _BAD,
    )


def _copy_rows(copies: dict[str, Any] | None) -> Iterator[Row]:
    if copies is None:
        return
    newest = (
        "none yet"
        if copies["newest_at"] is None
        else f"{copies['count']:,}, the newest {_age(copies['newest_at'])} old"
    )
    yield Row("backup copies", f"{newest}, in {copies['place']}")
    if copies["failure"]:
        yield Row("backup copies", copies["failure"], _BAD)


def _age(at: str) -> str:
    return readable_span(max(0.0, time.time() - parse_ms(at) / 1000))


def _disk_rows(disk: dict[str, Any]) -> Iterator[Row]:
    """What is free, and for how long: nothing that was not looked at yet."""
    if not disk.get("size_bytes"):
        return
    files = disk.get("free_files")
    room = f"{readable_size(disk['free_bytes'])} of {readable_size(disk['size_bytes'])}"
    yield Row("disk free", room if files is None else f"{room}, and {readable_count(files, 'file')}")
    grows, hours = disk.get("grows_bytes_h"), disk.get("hours_left")
    if grows is not None:
        yield Row("disk fills by", f"{readable_size(max(grows, 0))} an hour")
    if hours is not None:
        yield Row("disk is full in", readable_span(hours * 3600))


def _part_rows(parts: dict[str, Any]) -> Iterator[Row]:
    """What takes the room, the empty parts left out."""
    for name, used in parts.items():
        if used.get("files"):
            yield Row(f"size of {name}", f"{readable_size(used['bytes'])} in {readable_count(used['files'], 'file')}")


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat += _flat(inner, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", inner))
    return flat


def _readable(name: str, value: Any, status: dict[str, Any]) -> str:
    match value:
        case {"reason": reason, "duration_ms": int() | float() as ms, "bytes": int() as size, "snapshot_seq": seq}:
            return f"up to seq {seq} by {reason}: {readable_size(size)} in {ms:.0f} ms"
        case None:
            return "none yet" if name == "last_flush" else "-"
        case bool():
            return "yes" if value else "no"
        case int() if name == "journal_bytes":
            return f"{readable_size(value)} in {readable_count(status.get('journal_segments', 0), 'segment')}"
        case int() if name.endswith("bytes"):
            return readable_size(value)
        case int() if name == "pid":
            return str(value)
        case int() | float() if name.endswith("_s"):
            return readable_span(value)
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(str, value)) or "none"
        case dict():
            return ", ".join(f"{inner} {count}" for inner, count in value.items()) or "none"
        case _:
            return str(value)


def _print_rows(daemon: Daemon, shown: list[Row]) -> None:
    width = max(cells_of(row.title) for row in shown)
    click.echo(styled(f"Holdfast at {printable(str(daemon))}", bold=True))
    for row in shown:
        text = printable(row.text)
        click.echo(f"{row.title:<{width}}  {styled(text, fg=row.colour) if row.colour else text}")


def _show_live(daemon: Daemon, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        for shown in _watched(daemon, every_s):
            live.update(_as_text(daemon, shown), refresh=True)


def _as_text(daemon: Daemon, shown: list[Row]) -> Text:
    from rich.text import Text

    width = max(cells_of(row.title) for row in shown)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"Holdfast at {printable(str(daemon))}  (ctrl-C ends)\n", "bold")
    for row in shown:
        text.append(f"{row.title:<{width}}  ")
        text.append(f"{printable(row.text)}\n", row.colour)
    text.rstrip()
    return text
