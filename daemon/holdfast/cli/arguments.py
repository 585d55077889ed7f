"""What users type: ids, values, times, checked before anything is sent."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import orjson

from holdfast.clock import format_ms
from holdfast.settings import parse_duration

VALUE_BYTES_MAX = 64 << 20
"""Of a value from a file or stdin; the daemon's own limit is smaller."""

DIGITS_MAX = 18
"""Of versions and generations; more is no number of ours."""


_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Text(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on, ours from 8.1
    """Text that can be sent: not empty, and Unicode; an argument of other bytes is refused."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("expected some text, found none", param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"expected UTF-8, found {os.fsencode(text)!r:.80}", param, ctx)
        return text


class HeaderText(Text):
    """Text that travels in a header: printable ASCII."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        if not text.isascii() or not text.isprintable() or text != text.strip():
            self.fail(f"expected printable ASCII characters, found {text!r:.80}", param, ctx)
        return text


class Amount(Text):
    """An exact amount of money, as its digits."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        try:
            amount = Decimal(text)
        except ArithmeticError:
            amount = Decimal("NaN")
        if not amount.is_finite() or amount < 0 or "_" in text:
            self.fail(f"expected an amount such as 84900.50, found {text!r:.80}", param, ctx)
        return text.strip()


class Since(Text):
    """A moment in ISO 8601, left to the daemon to read, a day, which begins in its zone, or a span before now such as ``2h``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        if _DAY.fullmatch(text):
            return f"{text}T00:00:00"
        if not text[:1].isdigit() or "-" in text:
            return text
        try:
            since_s = time.time() - parse_duration(text)
            return format_ms(int(since_s * 1000))
        except ValueError:
            return text
        except OverflowError:
            self.fail(f"expected a span within the calendar, found {text!r:.80}", param, ctx)


class Age(Text):
    """A span such as ``30d``, as the moment that was so long ago."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        try:
            return format_ms(max(0, int((time.time() - parse_duration(text)) * 1000)))
        except (ValueError, OverflowError):
            self.fail(f"expected a span such as 30d, found {text!r:.80}", param, ctx)


class FieldValue(Text):
    """``FIELD=VALUE``, as the two."""

    name = "field"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        field, sign, wanted = text.partition("=")
        if not (field and sign):
            self.fail(f"expected FIELD=VALUE, found {text!r:.80}", param, ctx)
        return field, wanted


class WholeNumber(click.ParamType):  # type: ignore[type-arg]
    """A version, generation or count: a whole number of *least* or more, with as many digits as the daemon takes."""

    name = "number"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX and int(text) >= self._least):
            self.fail(f"expected a whole number of {self._least} or more, found {text!r:.80}", param, ctx)
        return int(text)


TEXT = Text()
HEADER_TEXT = HeaderText()
AMOUNT = Amount()
VERSION = WholeNumber(0)
GENERATION = WholeNumber(1)
COUNT = WholeNumber(1)
SINCE = Since()
AGE = Age()


def where_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which records are meant by what is in them; the command receives ``where``, pairs of a field and its value."""
    return click.option(
        "--where",
        multiple=True,
        type=FieldValue(),
        metavar="FIELD=VALUE",
        help="Only records whose FIELD has this VALUE; may be repeated.",
    )(command)


def json_value(argument: str) -> bytes:
    """The JSON that *argument* gives: itself, the file behind ``@``, or stdin for ``-``.

    Raises:
        click.UsageError: no such file, or not JSON; the message says where.
    """
    source, raw = _read_value(argument)
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise click.UsageError(
            f"{source} is not JSON: {error.msg.partition(':')[0]}, at line {error.lineno}, column {error.colno}"
        ) from None
    return raw


def _read_value(argument: str) -> tuple[str, bytes]:
    if argument == "-":
        if sys.stdin is None:
            raise click.UsageError("stdin: expected a value there, found it closed")
        source, raw = "stdin", _read("stdin", lambda: sys.stdin.buffer.read(VALUE_BYTES_MAX + 1))
    elif argument.startswith("@"):
        path = Path(argument[1:])
        source = str(path)
        raw = _read(source, lambda: _head(path))
    else:
        return "VALUE", os.fsencode(argument)
    if len(raw) > VALUE_BYTES_MAX:
        raise click.UsageError(f"{source}: expected at most {VALUE_BYTES_MAX >> 20} MiB, found more")
    return source, raw


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(VALUE_BYTES_MAX + 1)


def _read(source: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise click.UsageError(f"{source} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in a name, a stream that is closed
        raise click.UsageError(f"{source} cannot be read: {error}") from None
