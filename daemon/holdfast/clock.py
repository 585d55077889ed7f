"""Where time comes from, and how it is written."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, tzinfo

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class Clock:
    """Wall time for records, monotonic time for timers; the one place that asks the system for either.

    ``now_ms`` never runs backwards within one object: when the wall clock is set back, it goes on at the pace of the
    monotonic one until the wall clock has caught up, so that leases and keys still end in their time. Thread-safe
    enough for its use: the engine calls it under its lock.
    """

    def __init__(self) -> None:
        self._last_ms = 0
        # While the wall clock is behind: where it was left, and the monotonic time of that moment.
        self._left_at: tuple[int, float] | None = None

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, never less than the value before."""
        now = time.time_ns() // 1_000_000
        if now >= self._last_ms:
            self._left_at = None
        else:
            if self._left_at is None:
                self._left_at = (self._last_ms, self.monotonic())
            left_ms, left_at = self._left_at
            now = max(left_ms + int((self.monotonic() - left_at) * 1000), self._last_ms)
        self._last_ms = now
        return now

    def monotonic(self) -> float:
        """Seconds of an arbitrary origin that no one can set; for timers and durations only."""
        return time.monotonic()

    def not_before(self, ms: int) -> None:
        """Promise that ``now_ms`` will not fall behind *ms*, the time of the last event on disk."""
        self._last_ms = max(self._last_ms, ms)


_DATE_CHARS = len("20261121")
_MIDNIGHT = re.compile(r"(.+)[T ]24(?::?00){0,2}(?:[.,]0+)?(Z|[+-][0-9:]+|)")
_ORDINAL = re.compile(r"(\d{4})-?(\d{3})(T.+|)")

# Consecutive events share their millisecond, and rendering a date costs ten times as much as the rest. One tuple,
# replaced whole, so that no thread ever sees the time of one and the text of another.
_cached: tuple[int, str] = (0, "1970-01-01T00:00:00.000Z")


def format_ms(ms: int) -> str:
    """Milliseconds since 1970 as ``2026-11-21T06:00:00.000Z``, the form of every timestamp that leaves Holdfast."""
    global _cached
    cached = _cached
    if cached[0] == ms:
        return cached[1]
    text = (EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")[:23] + "Z"
    _cached = (ms, text)
    return text


def parse_ms(text: str, zone: tzinfo = UTC) -> int:
    """Milliseconds since 1970 of any ISO 8601 *text*; a naive one is read in *zone*, a date alone is its first moment.

    Raises:
        ValueError: not a moment in ISO 8601.
    """
    if len(text) > _DATE_CHARS and text.isdigit():
        raise ValueError(f"a number: {text:.40}")  # which datetime would take for a date, a separator and a time
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = _rarely_written(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone)
    return (moment - EPOCH) // _MILLISECOND


def _rarely_written(text: str) -> datetime:
    """What ISO 8601 and RFC 3339 permit, and ``datetime`` does not read; ValueError when it is that neither."""
    text = text.upper()
    if found := _MIDNIGHT.fullmatch(text):
        try:
            return datetime.fromisoformat(f"{found[1]}T00:00:00{found[2]}") + timedelta(days=1)
        except OverflowError:
            raise ValueError(f"beyond the year 9999: {text:.40}") from None
    if found := _ORDINAL.fullmatch(text):
        first = datetime.fromisoformat(f"{found[1]}-01-01{found[3]}")
        day = first + timedelta(days=int(found[2]) - 1)
        if day.year == first.year:
            return day
    return datetime.fromisoformat(text)
