"""What of an event may stand in the log, in types that JSON has.

Whatever is logged, however odd, these functions give something that can be written.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.errors import HoldfastError

TEXT_CHARS_MAX = 48 * 1024
"""Of one text; no line of the log is longer."""

DEPTH_MAX = 5
ITEMS_MAX = 200
CAUSES_MAX = 5

FREE_TEXT = frozenset({"reason", "error", "message", "exception"})
"""Allowed fields whose text was put together elsewhere: phones and tokens inside are masked."""

# A seq and a size are numbers, too; they are named as such in our texts. The file names of journal segments have 20 digits.
# So is a span of time, which libraries write as 1.234567499s; a fraction without a unit may be 57.3001234567.
_PHONE = re.compile(
    r"\+\d[\d ().-]{6,20}\d"
    r"|(?<!\d)(?<!seq )(?!(?<=\d\.)\d{1,9}(?:s| seconds)\b)(?!\d{1,9}[mµun]s\b)\d{8,15}(?!\d)(?! bytes)"
)
_TOKEN = re.compile(r"hf_[\w-]{8,}")


def redacted(key: str, value: object, allowed: Iterable[str]) -> object:
    """*value* as it may stand under *key*: whole when *allowed*, else ``***``, of which a phone keeps 3 digits."""
    if key in allowed:
        return _scrubbed(plain(value)) if key in FREE_TEXT else value
    if value is None or isinstance(value, bool):
        return value
    text = plain(value)
    if isinstance(text, int):
        text = str(text)
    return _masked(text) if isinstance(text, str) else "***"


def _masked(text: str) -> str:
    digits = re.sub(r"[\s+().-]", "", text)
    return f"***{digits[-3:]}" if digits.isdecimal() and 7 <= len(digits) <= 15 else "***"


def _scrubbed(value: object) -> object:
    if not isinstance(value, str):
        return value
    return _PHONE.sub(lambda match: _masked(match[0]), _TOKEN.sub("hf_***", value))


def describe_exception(error: BaseException, *, redact: bool) -> str:
    """Where *error* was raised, with what caused it; its text only when it cannot quote what a client sent."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < CAUSES_MAX:
        frames = [
            f"  {frame.filename}:{frame.lineno} in {frame.name}"
            for frame in traceback.extract_tb(current.__traceback__)
        ]
        text = plain(current) if not redact or isinstance(current, HoldfastError | OSError) else "***"
        parts.append("\n".join([f"{type(current).__name__}: {text}", *frames[-ITEMS_MAX:]]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\ncaused by ".join(parts)


def exception_of(exc_info: object) -> BaseException | None:
    """The exception that *exc_info* stands for, in any of the forms that logging knows."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple) and len(exc_info) == 3:
        return exc_info[1] if isinstance(exc_info[1], BaseException) else None
    if exc_info:
        return sys.exc_info()[1]
    return None


# From anything to what JSON can hold.


def plain(value: object, depth: int = 0) -> Any:
    """*value* in types that every JSON encoder takes; what has no such form is described. Never raises."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, str):
        return str.__str__(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int):
        number = int.__index__(value)
        # Beyond 4,300 digits Python itself refuses to write it.
        return number if -(1 << 63) <= number < 1 << 64 else f"<integer of {number.bit_length()} bits>"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else float.__repr__(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value[:TEXT_CHARS_MAX]).decode("utf-8", "backslashreplace")
    if depth < DEPTH_MAX:
        if isinstance(value, Mapping):
            return _plain_items(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            return _plain_list(value, depth)
    return _described(value)


def _plain_items(value: Mapping[Any, Any], depth: int) -> Any:
    try:
        items = list(value.items())[:ITEMS_MAX]
    except Exception:
        return _described(value)
    return {str(plain(key, DEPTH_MAX)): plain(item, depth + 1) for key, item in items}


def _plain_list(value: Iterable[Any], depth: int) -> Any:
    try:
        items = list(value)[:ITEMS_MAX]
    except Exception:
        return _described(value)
    return [plain(item, depth + 1) for item in items]


def _described(value: object) -> str:
    try:
        text = str(value)
    except Exception as error:
        text = f"<{type(value).__name__} whose text raises {type(error).__name__}>"
    return text[:TEXT_CHARS_MAX].encode("utf-8", "backslashreplace").decode()
