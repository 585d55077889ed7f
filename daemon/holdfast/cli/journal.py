"""The command that shows the journal of a data directory, whether its daemon runs or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
import orjson

from holdfast.cli.connection import settings_of
from holdfast.cli.show import examples, print_json_line
from holdfast.disk.files import Directory
from holdfast.disk.journal import Damage, History, read_history
from holdfast.errors import DataRefused, NotFound


@click.command(
    epilog=examples(
        "holdfast journal --op order.complete",
        "holdfast journal --id 573001234567",
        "holdfast journal | jq -c '{at, op, id}'",
    )
)
@click.option("--data-dir", metavar="DIR", help="The data directory whose journal is meant; nothing in it is changed.")
@click.option("--since-seq", type=click.IntRange(min=1), default=1, metavar="SEQ", help="Begin with this event.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op, such as order.put; may be repeated.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only events of this record; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="What it prints anyway: one JSON object a line.")
def journal(data_dir: str | None, since_seq: int, ops: tuple[str, ...], ids: tuple[str, ...], as_json: bool) -> int:
    """Print the events since the last flush, one JSON object a line; coloured on a terminal.

    An atomic batch is one event, shown whole when one of its members matches. What cannot be read is told on stderr;
    the exit code is 1 when that is more than an unfinished last write.
    """
    history = _read(data_dir)
    for line in history.lines:
        if line.seq >= since_seq and (not (ops or ids) or _matches(orjson.loads(line.payload), ops, ids)):
            print_json_line(line.payload)
    # In this order on a terminal as well, where both streams meet.
    if sys.stdout is not None:
        sys.stdout.flush()
    problems = list(_problems(history))
    for problem in problems:
        click.echo(f"holdfast: {problem}", err=True)
    if history.torn is not None:
        click.echo(f"holdfast: {_placed(history.torn)}; the next start cuts it off", err=True)
    return 1 if problems else 0


def _read(data_dir: str | None) -> History:
    path = settings_of(data_dir).data_dir / "journal"
    try:
        with Directory(path) as directory:
            # A running daemon may prune a segment between the listing and the reading; then look again.
            for _ in range(9):
                try:
                    return read_history(directory, after_seq=0)
                except FileNotFoundError:
                    continue
            return read_history(directory, after_seq=0)
    except FileNotFoundError as error:
        raise NotFound(f"no journal at {path}; name the data directory with --data-dir") from error
    except OSError as error:
        raise DataRefused(f"the journal at {path} cannot be read: {error.strerror}") from error


def _matches(event: dict[str, Any], ops: tuple[str, ...], ids: tuple[str, ...]) -> bool:
    if (not ops or event.get("op") in ops) and (not ids or event.get("id") in ids or _any_in(event.get("ids"), ids)):
        return True
    return any(_matches(member, ops, ids) for member in event.get("events", ()))


def _any_in(found: list[str] | None, ids: tuple[str, ...]) -> bool:
    return found is not None and not set(ids).isdisjoint(found)


def _problems(history: History) -> Iterator[str]:
    for damage in history.damages:
        yield f"{_placed(damage)}; the next start copies the segment to quarantine/ and applies the rest"
    oldest = min(history.segments, default=0)
    for first, last in history.gaps:
        # What lies before the oldest segment was pruned, because the snapshots hold it.
        if last >= oldest:
            yield f"events {first} to {last} are missing"


def _placed(damage: Damage) -> str:
    return f"{damage.segment}: byte {damage.offset}, {damage.bytes} bytes: {damage.reason}"
