"""How often something may happen within a span of time."""

from __future__ import annotations

from collections import OrderedDict, deque

KEYS_MAX = 1024
"""Who is remembered at once; the one unseen longest is forgotten."""


class Throttle:
    """Counts what happens to each of many keys; one thread at a time."""

    def __init__(self, count_max: int, period_s: float) -> None:
        self._count_max = count_max
        self._period_s = period_s
        self._moments: OrderedDict[str, deque[float]] = OrderedDict()

    def allows(self, key: str, now: float) -> bool:
        """Note that it happened to *key* at *now* (monotonic); False when it is more than the count in the period."""
        moments = self._moments.pop(key, None)
        if moments is None:
            moments = deque(maxlen=self._count_max)
        self._moments[key] = moments
        if len(self._moments) > KEYS_MAX:
            self._moments.popitem(last=False)
        is_within = len(moments) < self._count_max or now - moments[0] > self._period_s
        if is_within:
            moments.append(now)
        return is_within
