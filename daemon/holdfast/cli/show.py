"""How a command shows what it found: tables, colours, JSON, progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import orjson

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")

MEASURED_ROWS = 200
"""Rows from which a table takes the widths of its columns; what comes later may be wider and is shown whole."""

PATIENCE_S = 1.0
"""Work that is over sooner needs no progress bar."""

CELL_CHARS_MAX = 1000
"""Of one cell on a terminal."""

_GAP = "  "
# A string with the colon that makes it a key, a number, or a word.
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)(\s*:)?')
_VALUE_CHARS_MIN = 8
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Of the same kind as what turns a line around, but parts of many emoji and scripts.
_JOINERS = "\u200c\u200d"


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: Any) -> None:
    """Print *value* indented, as every ``--json`` does."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def is_terminal() -> bool:
    """Whether stdout is one, so that a person reads it."""
    return sys.stdout is not None and sys.stdout.isatty()


def has_colour() -> bool:
    """Whether stdout takes colours and the user wants them (https://no-color.org)."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_live() -> bool:
    """Whether what stands on the terminal can be written over."""
    return is_terminal() and os.environ.get("TERM", "dumb") != "dumb"


def styled(text: str, **style: Any) -> str:
    """*text* in a style of ``click.style``, on a terminal with colours."""
    return click.style(text, **style) if has_colour() else text


def printable(text: str) -> str:
    """*text* on one line, without what would move the cursor or turn the line around: ids and values come from
    strangers."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char) in _UNPRINTABLE and char not in _JOINERS else char
        for char in text
    )


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        is_number: it is right-aligned.
        is_long: it takes the room that is left, and is cut to it on a terminal; at most one, the last.
    """

    title: str
    is_number: bool = False
    is_long: bool = False


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print *rows* below their titles while they come; only the long column is ever cut, and only on a terminal."""
    rows = iter(rows)
    first = [_cells(row) for row in islice(rows, MEASURED_ROWS)]
    widths = [
        0 if column.is_long else max(map(cells_of, [column.title, *(row[index] for row in first)]))
        for index, column in enumerate(columns)
    ]
    room = None
    if columns[-1].is_long and is_terminal():
        taken = sum(widths) + len(_GAP) * (len(columns) - 1)
        room = max(shutil.get_terminal_size().columns - taken, _VALUE_CHARS_MIN)
    click.echo(styled(_line([column.title for column in columns], columns, widths), bold=True))
    for cells in chain(first, (_cells(row) for row in rows)):
        if room is not None and cells_of(cells[-1]) > room:
            cells[-1] = shortened(cells[-1], room)
        click.echo(_line(cells, columns, widths))


def _cells(row: Sequence[str]) -> list[str]:
    # No terminal shows more of a line than this, and a record may be a megabyte.
    return [printable(cell[:CELL_CHARS_MAX] if is_terminal() else cell) for cell in row]


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts: list[str] = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        padding = "" if column.is_long else " " * (width - cells_of(cell))
        parts.append(padding + cell if column.is_number else cell + padding)
    return _GAP.join(parts).rstrip()


def cells_of(text: str) -> int:
    """How many columns of a terminal *text* takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # here, because most tables are ASCII

    return cell_len(text)


def shortened(text: str, cells: int) -> str:
    """*text* cut to *cells* columns, with an ellipsis."""
    kept = text[: cells - 1]
    while cells_of(kept) > cells - 1:
        kept = kept[:-1]
    return kept + "…"


def print_value(value: bytes) -> None:
    """Print a JSON value: for people indented and coloured, else byte for byte as it is stored."""
    if not is_terminal():
        click.echo(value)
        return
    import msgspec

    # The tokens stay as they are: 1.50 is not 1.5 to whoever looks for it in the file.
    for line in msgspec.json.format(value, indent=2).split(b"\n"):
        print_json_line(line)


def print_json_line(line: bytes) -> None:
    """Print a line of JSON: for people with its keys and values in colours, else byte for byte."""
    if not is_terminal():
        click.echo(line)
        return
    text = printable(line.decode("utf-8", "replace"))
    click.echo(_TOKEN.sub(_coloured, text) if has_colour() else text)


def _coloured(token: re.Match[str]) -> str:
    text, colon = token[1], token[2]
    if colon:
        return click.style(text, fg="cyan") + colon
    return click.style(text, fg="green" if text.startswith('"') else "magenta")


def blocks_are_shown() -> bool:
    """Whether stdout takes the characters of a bar chart."""
    return sys.stdout is not None and (sys.stdout.encoding or "").lower().startswith("utf")


def bar(share: float, cells: int) -> str:
    """A horizontal bar over *share* (0 to 1) of *cells* columns; anything above nothing is seen."""
    eighths = round(share * cells * 8)
    if share > 0:
        eighths = max(eighths, 1)
    if not blocks_are_shown():
        return "#" * -(-eighths // 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


class Progress:
    """A progress bar on stderr, for people who wait: it appears after a second, and only on a terminal.

    Use it in a with-block; ``advance`` may be called as often as one likes.
    """

    def __init__(self, what: str, total: Callable[[], int | None], *, is_wanted: bool = True) -> None:
        """Show *what* is done, out of *total*, which is asked for when the bar appears."""
        self._what = what
        self._total = total
        self._done = 0
        self._appears_at = time.monotonic() + PATIENCE_S
        self._is_wanted = is_wanted and sys.stderr is not None and sys.stderr.isatty()
        self._rich: RichProgress | None = None

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=self._done)
        elif self._is_wanted and time.monotonic() >= self._appears_at:
            self._appear()

    def _appear(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._rich.add_task(self._what, total=self._total(), completed=self._done)
        self._rich.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()


def counted(rows: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """*rows*, each counted in *progress* as it passes."""
    for row in rows:
        progress.advance(1)
        yield row


def readable_size(size: int) -> str:
    """*size* bytes as one reads it: ``1.2 MiB``."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def readable_span(seconds: float) -> str:
    """*seconds* as one reads them, in their two largest units: ``3 d 4 h``, ``12 s``."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def readable_count(count: int, noun: str) -> str:
    """``1 segment``, ``12,345 segments``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class QuietLog:
    """The log of a command, whose answer says all that was done."""

    def _say_nothing(self, event: str, **fields: Any) -> None:
        """Nothing."""

    debug = info = warning = error = exception = _say_nothing
