"""A lazy timer wheel: who must be looked at in which minute.

An id stands in the bucket of one minute, at or before the minute in which it may be due. Postponing (a touched
session) costs nothing: when the minute comes, the owner looks at the record and puts the id into a later bucket.
Eight bytes an id, no scan, and an id that stands twice or is gone does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable

MINUTE_MS = 60_000


class Wheel:
    """Buckets of ids by minute. Not thread-safe; the engine's lock covers it."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[str]] = {}

    def schedule(self, id: str, due_ms: int) -> None:
        """Have *id* looked at in the minute after *due_ms* at the latest."""
        minute = due_ms // MINUTE_MS + 1
        bucket = self._buckets.get(minute)
        if bucket is None:
            self._buckets[minute] = [id]
        else:
            bucket.append(id)

    def schedule_all(self, minute: int, ids: Iterable[str]) -> None:
        """Put all *ids* into the bucket of *minute* (minutes since 1970); how a load fills the wheel."""
        self._buckets.setdefault(minute, []).extend(ids)

    def take_due(self, now_ms: int, limit: int) -> set[str]:
        """Remove and return up to about *limit* ids whose minute has come, each once.

        A bucket larger than *limit* is split, so that no call holds its caller for long.
        """
        now_minute = now_ms // MINUTE_MS
        taken: set[str] = set()
        for minute in sorted(minute for minute in self._buckets if minute <= now_minute):
            bucket = self._buckets[minute]
            room = limit - len(taken)
            if room <= 0:
                break
            taken.update(bucket[-room:])
            del bucket[-room:]
            if not bucket:
                del self._buckets[minute]
        return taken

    def clear(self) -> None:
        """Forget all."""
        self._buckets.clear()

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))
