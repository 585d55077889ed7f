"""The command that follows the events of the running daemon."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import orjson

from holdfast.cli.connection import Daemon, daemon_options
from holdfast.cli.show import cells_of, examples, is_terminal, printable, shortened, styled
from holdfast.client.backoff import Backoff
from holdfast.client.stream import SILENCE_MAX_S, Blocks
from holdfast.client.wire import WireError
from holdfast.errors import Unavailable

_SHORT_CHARS_MAX = 2000
"""Of a value, where no terminal says how much room there is."""

_COLOURS = {
    "put": "green",
    "append": "green",
    "patch": "cyan",
    "touch": "blue",
    "complete": "bright_green",
    "order": "bright_green",
    "completion": "bright_green",
    "cancel": "yellow",
    "open": "yellow",
    "hold": "yellow",
    "archive": "magenta",
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
    left = count
    try:
        for payload in _followed(daemon, after, ops, ids):
            click.echo(payload if as_json else _line_of(orjson.loads(payload)))
            if left is not None:
                left -= 1
                if not left:
                    return
    except KeyboardInterrupt:
        return  # that is how one ends it


def _followed(daemon: Daemon, after: int | None, ops: Sequence[str], ids: Sequence[str]) -> Iterator[bytes]:
    """The JSON of each event behind *after*, each once; goes on when the daemon comes back."""
    blocks = Blocks(after)
    backoff: Backoff | None = None
    was_there = False
    while True:
        try:
            for part in daemon.connect(timeout_s=SILENCE_MAX_S).stream(blocks.position, ops, ids):
                was_there, backoff = True, None
                blocks.feed(part)
                while blocks.next() is not None:
                    yield blocks.payload
            reason = f"{daemon} has ended the stream"
        except (Unavailable, WireError) as error:
            if not was_there:
                raise
            reason = str(error)
        if backoff is None:
            backoff = Backoff(math.inf, str(daemon))
            click.echo(f"holdfast: {reason}; waiting until it is back", err=True)
        blocks.begin_again()
        time.sleep(backoff.next_pause_s(reason))


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
    """What was said, or what became, as JSON: the value of a record, else whatever the event tells besides."""
    if event.get("messages"):
        said = " ".join(f"{one.get('role')}: {one.get('content', '')}" for one in event["messages"])
        return printable(said[:_SHORT_CHARS_MAX])
    told = event.get("value", {name: value for name, value in event.items() if name not in _TOLD_APART})
    return printable(orjson.dumps(told).decode()[:_SHORT_CHARS_MAX]) if told else ""
