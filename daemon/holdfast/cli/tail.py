"""The command that follows the events of the running daemon."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlencode

import click
import orjson

from holdfast.cli.connection import Connection, Daemon, daemon_options
from holdfast.cli.show import cells_of, examples, is_terminal, printable, shortened, styled
from holdfast.errors import Unavailable

SILENCE_MAX_S = 60.0
"""The daemon gives a sign of life more often than that; after it the connection counts as lost."""

PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 5.0
"""Between two tries to reach a daemon that went away."""

_SHORT_CHARS_MAX = 2000
"""Of a value, where no terminal says how much room there is."""

_COLOURS = {
    "put": "green",
    "patch": "cyan",
    "touch": "blue",
    "complete": "bright_green",
    "order": "bright_green",
    "completion": "bright_green",
    "cancel": "yellow",
    "delete": "red",
    "expire": "magenta",
}
"""By what an op does, which is the second part of its name."""

_TOLD_APART = ("seq", "at", "op", "id", "value", "version", "key")
"""Fields of an event that have a place of their own on its line, or none."""


@click.command(
    epilog=examples(
        "holdfast tail",
        "holdfast tail --op 'order.*' --id 573001234567",
        "holdfast tail --after 0 --json | jq -r '[.seq, .op] | @tsv'",
    )
)
@daemon_options
@click.option(
    "--op", "ops", multiple=True, metavar="OP", help="Only this op, such as order.put or 'order.*'; repeatable."
)
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only events of this record; repeatable.")
@click.option("--since-seq", type=click.IntRange(min=1), metavar="SEQ", help="Begin with this event instead of now.")
@click.option("--after", type=click.IntRange(min=0), metavar="SEQ", help="Begin behind this event; 0 is the beginning.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many events.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, as in the journal.")
def tail(
    daemon: Daemon,
    ops: tuple[str, ...],
    ids: tuple[str, ...],
    since_seq: int | None,
    after: int | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Show what changes while it changes, once it is on disk. Ctrl-C ends it.

    When the daemon restarts it goes on where it was. The members of an atomic batch come one by one.
    """
    if since_seq is not None:
        if after is not None:
            raise click.UsageError("give either --since-seq or --after, not both")
        after = since_seq - 1
    query = urlencode([("op", op) for op in ops] + [("id", id) for id in ids])
    left = count
    try:
        for payload in _followed(daemon, query, None if after is None else str(after)):
            click.echo(payload if as_json else _line_of(orjson.loads(payload)))
            if left is not None:
                left -= 1
                if not left:
                    return
    except KeyboardInterrupt:
        return  # that is how one ends it


class _Block(NamedTuple):
    """What stands between two empty lines of a stream."""

    id: str | None
    data: bytes | None


def _followed(daemon: Daemon, query: str, position: str | None) -> Iterator[bytes]:
    """The JSON of each event behind *position*, each once; goes on when the daemon comes back."""
    target = f"/v1/events?{query}" if query else "/v1/events"
    pause_s = PAUSE_FIRST_S
    is_away, was_there = False, False
    # Of a batch whose last member is still to come: shown so far, and to be left out when it comes again.
    shown = left_out = 0
    while True:
        headers = {} if position is None else {"Last-Event-ID": position}
        try:
            for block in _blocks(daemon.connect(timeout_s=SILENCE_MAX_S), target, headers):
                was_there, is_away, pause_s = True, False, PAUSE_FIRST_S
                if block.data is not None:
                    if left_out:
                        left_out -= 1
                    else:
                        yield block.data
                    shown += 1
                if block.id is not None:
                    position, shown = block.id, 0
        except Unavailable as error:
            if not was_there:
                raise
            reason = error.detail
        else:
            reason = f"{daemon} has ended the stream"
        if not is_away:
            is_away = True
            click.echo(f"holdfast: {reason}; waiting until it is back", err=True)
        shown, left_out = 0, shown
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)


def _blocks(connection: Connection, target: str, headers: dict[str, str]) -> Iterator[_Block]:
    id: str | None = None
    data: bytes | None = None
    for line in connection.lines(target, headers=headers):
        name, _, value = line.partition(b": ")
        if not line:
            yield _Block(id, data)
            id, data = None, None
        elif name == b"id":
            id = value.decode("ascii")
        elif name == b"data":
            data = value


def _line_of(event: dict[str, Any]) -> str:
    """*event* for a person: time, seq, op, id, and as much of what became as there is room for."""
    op, at = str(event["op"]), str(event["at"]).replace("T", " ").rstrip("Z")
    subject = printable(str(event.get("id", "")))
    head = f"{at}  {event['seq']:>7}  {op:<15}  {subject:<13}"
    short = _short(event)
    if is_terminal():
        room = shutil.get_terminal_size().columns - cells_of(head) - 2
        short = "" if room < 2 else shortened(short, room) if cells_of(short) > room else short
    coloured = "  ".join(
        (
            styled(at, dim=True),
            f"{event['seq']:>7}",
            styled(f"{op:<15}", fg=_COLOURS.get(op.partition(".")[2])),
            styled(f"{subject:<13}", bold=True),
            short,
        )
    )
    return coloured.rstrip()


def _short(event: dict[str, Any]) -> str:
    """What became, as JSON: the value of a record, else whatever the event tells besides."""
    told = event.get("value", {name: value for name, value in event.items() if name not in _TOLD_APART})
    return printable(orjson.dumps(told).decode()[:_SHORT_CHARS_MAX]) if told else ""
