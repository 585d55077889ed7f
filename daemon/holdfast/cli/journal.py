"""The commands that show the journal of a data directory, whether its daemon runs or not."""

from __future__ import annotations

import heapq
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import click
import orjson

from holdfast.cli.arguments import SINCE, TEXT
from holdfast.cli.connection import DIRECTORY, settings_to_reach
from holdfast.cli.groups import InOrder
from holdfast.cli.show import (
    Column,
    examples,
    json_option,
    print_json,
    print_json_line,
    print_table,
    readable_count,
    readable_size,
)
from holdfast.clock import parse_ms
from holdfast.disk.files import Directory
from holdfast.disk.journal import Damage, History, JournalLine, read_history
from holdfast.errors import DataRefused, NotFound
from holdfast.settings import Settings

LARGEST = 5
"""Events whose size ``stat`` shows."""

HOURS_SHOWN = 24

SINGLY_MAX = 100
"""Unreadable events that are passed over one by one; each costs another look at its file."""

_TIME_CHARS = 13
_BEFORE = "1970-01-01T00:00:00Z"
"""When an event happened that does not say so."""


class Wanted(NamedTuple):
    """Which events are meant.

    Attributes:
        data_dir: None for the one that the settings name.
        all: as far back as there are any, not only since the last flush.
        after: only those behind this seq.
        until: only those up to this moment; None for all.
        ops, ids: only these; empty for all.
    """

    data_dir: str | None
    all: bool
    after: int
    until: str | None
    ops: tuple[str, ...]
    ids: tuple[str, ...]


def _selecting(command: Callable[..., int]) -> Callable[..., int]:
    """Give *command* the options that choose events; it receives them as ``Wanted``, its first argument."""

    def with_wanted(
        data_dir: str | None,
        all: bool,
        after: int,
        since_seq: int,
        until: str | None,
        ops: tuple[str, ...],
        ids: tuple[str, ...],
        **rest: Any,
    ) -> int:
        return command(Wanted(data_dir, all, max(after, since_seq - 1), until, ops, ids), **rest)

    with_wanted.__name__, with_wanted.__doc__ = command.__name__, command.__doc__
    for option in (
        click.option("--id", "ids", multiple=True, metavar="ID", help="Only events of this record; may be repeated."),
        click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op, such as order.put; repeatable."),
        click.option("--until", type=SINCE, metavar="TIME", help="Only up to this moment, or a span: 2h."),
        click.option(
            "--since-seq", type=click.IntRange(min=1), default=1, metavar="SEQ", help="Begin with this event."
        ),
        click.option("--after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Begin behind this event."),
        click.option("--all", is_flag=True, help="As far back as there are events, not only since the last flush."),
        click.option("--data-dir", type=DIRECTORY, metavar="DIR", help="The data directory; nothing in it is changed."),
    ):
        with_wanted = option(with_wanted)
    return with_wanted


class _DumpByDefault(InOrder):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["dump", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_DumpByDefault,
    epilog=examples(
        "holdfast journal --op order.complete",
        "holdfast journal grep --all 'Calle 5[0-9]'",
        "holdfast journal stat",
    ),
)
def journal() -> None:
    """Show the events in the journal; alone, as `dump`.

    It reads the files of a stopped or running data directory, and changes nothing. An atomic batch is one event, shown whole
    when one of its members matches. What cannot be read is told on stderr; the exit code is 1 when that is more than an
    unfinished last write.
    """


@journal.command(
    epilog=examples(
        "holdfast journal dump --id 573001234567",
        "holdfast journal dump --all --until 2026-11-21T14:00:00Z",
        "holdfast journal dump | jq -c '{at, op, id}'",
    )
)
@click.option("--json", "as_json", is_flag=True, help="What it prints anyway: one JSON object a line.")
@_selecting
def dump(wanted: Wanted, as_json: bool) -> int:
    """Print events, one JSON object a line; coloured on a terminal."""
    reading = _Reading(wanted)
    for line in reading.lines():
        print_json_line(line.payload)
    return reading.told()


@journal.command(
    epilog=examples(
        "holdfast journal grep 573001234567",
        "holdfast journal grep --all --op message.append '(?i)calle 5[0-9]'",
    )
)
@click.argument("pattern", type=TEXT)
@click.option("--json", "as_json", is_flag=True, help="What it prints anyway: one JSON object a line.")
@_selecting
def grep(wanted: Wanted, pattern: str, as_json: bool) -> int:
    """Print the events in whose JSON PATTERN, a regular expression, is found. Nothing is redacted."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise click.UsageError(f"PATTERN is no regular expression: {error}") from None
    reading = _Reading(wanted)
    for line in reading.lines():
        if expression.search(line.payload.decode("utf-8", "replace")):
            print_json_line(line.payload)
    return reading.told()


@journal.command(epilog=examples("holdfast journal stat", "holdfast journal stat --all --json"))
@json_option
@_selecting
def stat(wanted: Wanted, as_json: bool) -> int:
    """Count events and bytes, by op and by hour; name the largest, the oldest and the newest."""
    reading = _Reading(wanted)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    hours: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    largest: list[tuple[int, int, str, str]] = []
    ends: list[dict[str, Any]] = []
    for line in reading.lines():
        event, size = orjson.loads(line.payload), len(line.payload)
        op, at = str(event.get("op", "")), str(event.get("at", ""))
        counts[op] += 1
        sizes[op] += size
        hour = hours[at[:_TIME_CHARS]]
        hour[0] += 1
        hour[1] += size
        item = (size, -line.seq, op, str(event.get("id", "")))
        (heapq.heappush if len(largest) < LARGEST else heapq.heappushpop)(largest, item)
        ends[1:] = [{"seq": line.seq, "at": at}]
    found = {
        "events": counts.total(),
        "bytes": sizes.total(),
        "segments": reading.segments,
        "oldest": ends[0] if ends else None,
        "newest": ends[-1] if ends else None,
        "ops": {op: {"events": count, "bytes": sizes[op]} for op, count in counts.most_common()},
        "hours": {hour: {"events": count, "bytes": size} for hour, (count, size) in sorted(hours.items())},
        "largest": [
            {"seq": -seq, "op": op, "id": id, "bytes": size} for size, seq, op, id in sorted(largest, reverse=True)
        ],
    }
    if as_json:
        print_json(found)
    else:
        _show(found)
    return reading.told()


def _show(found: dict[str, Any]) -> None:
    size, segments = readable_size(found["bytes"]), readable_count(found["segments"], "segment")
    click.echo(f"{readable_count(found['events'], 'event')}, {size}, in {segments}")
    if not found["events"]:
        return
    for name in ("oldest", "newest"):
        click.echo(f"{name}: event {found[name]['seq']}, {found[name]['at']}")
    for title, key, rows in (
        ("Op", "ops", found["ops"].items()),
        ("Hour", "hours", list(found["hours"].items())[-HOURS_SHOWN:]),
    ):
        click.echo()
        print_table(
            [Column(title), Column("Events", is_number=True), Column("Size", is_number=True)],
            [[name, f"{one['events']:,}", readable_size(one["bytes"])] for name, one in rows],
        )
        if key == "hours" and len(found["hours"]) > HOURS_SHOWN:
            click.echo(f"and {len(found['hours']) - HOURS_SHOWN} hours before")
    click.echo()
    print_table(
        [Column("Largest", is_number=True), Column("Size", is_number=True), Column("Op"), Column("Id", is_long=True)],
        [[str(one["seq"]), readable_size(one["bytes"]), one["op"], one["id"]] for one in found["largest"]],
    )


class _Reading:
    """One reading of a journal, with what was wrong on the way."""

    def __init__(self, wanted: Wanted) -> None:
        """Read the segments; those that are packed only when they are asked for.

        Raises:
            NotFound, DataRefused: there is no journal, or it cannot be read.
        """
        self._wanted = wanted
        self._settings = settings_to_reach(wanted.data_dir)
        self._until_ms = self._moment(wanted.until)
        self._history = _read(self._settings)
        self._problems: list[str] = []
        self.segments = len(self._history.segments)

    def lines(self) -> Iterator[JournalLine]:
        """The events that are wanted, in order."""
        wanted = self._wanted
        for line in self._everything():
            if line.seq <= wanted.after:
                continue
            event = orjson.loads(line.payload) if wanted.ops or wanted.ids or self._until_ms is not None else {}
            if self._until_ms is not None and parse_ms(event.get("at", _BEFORE)) > self._until_ms:
                # Time never runs backwards from one event to the next.
                return
            if not (wanted.ops or wanted.ids) or _matches(event, wanted.ops, wanted.ids):
                yield line

    def told(self) -> int:
        """Tell what was wrong; the exit code."""
        # In this order on a terminal as well, where both streams meet.
        if sys.stdout is not None:
            sys.stdout.flush()
        history = self._history
        problems = [*self._problems, *_problems(history)]
        for problem in problems:
            click.echo(f"holdfast: {problem}", err=True)
        if history.torn is not None:
            click.echo(f"holdfast: {_placed(history.torn)}; the next start cuts it off", err=True)
        return 1 if problems else 0

    def _everything(self) -> Iterator[JournalLine]:
        if self._wanted.all:
            yield from self._before(min(self._history.segments, default=0))
        yield from self._history.lines

    def _before(self, first_seq: int) -> Iterator[JournalLine]:
        """What stands before the segments of the journal: in ``kept/``, and packed in ``backups/journal/``."""
        from holdfast.care import history, moments  # here, since they bring what only few calls need

        found = history.History(self._settings.data_dir)
        parts = [part for part in found.parts() if part.first_seq < first_seq]
        self.segments += len(parts)
        if not parts:
            return
        position, last_seq = max(parts[0].first_seq - 1, self._wanted.after), first_seq - 1
        missing: list[tuple[int, int]] = []
        while position < last_seq:
            try:
                for line in found.lines(position, last_seq):
                    yield line
                    position = line.seq
            except history.HistoryGap as gap:
                # Behind a damaged line the next one may be whole; where many are gone, the next file begins with one.
                end = gap.first if len(missing) < SINGLY_MAX else gap.last
                missing.append((gap.first, end))
                position = end
        # A restored state stands at a number of its own.
        states = moments.restored_seqs(self._settings.data_dir)
        missing = [(first, last) for first, last in missing if not states.issuperset(range(first, last + 1))]
        self._problems += [
            f"events {first} to {last} are missing, or cannot be read" for first, last in _joined(missing)
        ]

    def _moment(self, text: str | None) -> int | None:
        if text is None:
            return None
        try:
            return parse_ms(text, ZoneInfo(self._settings.stats.timezone))
        except (ValueError, OverflowError):
            raise click.UsageError(
                f"--until: expected a time such as 2026-11-21T14:00:00Z, or a span such as 2h, found {text!r:.80}"
            ) from None


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """*stretches*, those that follow one another as one."""
    joined: list[tuple[int, int]] = []
    for first, last in stretches:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _read(settings: Settings) -> History:
    path = settings.data_dir / "journal"
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
