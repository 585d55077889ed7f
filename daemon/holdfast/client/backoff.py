"""How long to wait before trying again."""

from __future__ import annotations

import math
import random
import time

from holdfast.errors import Unavailable

FIRST_S = 0.01
LONGEST_S = 0.5
"""A daemon that restarts is back within a second or two; its clients should not add much to that."""


class Backoff:
    """The tries of one call: when the next one is due, and when it is enough.

    Pauses double and are spread at random, so that the clients of a daemon do not all come at the same moment.
    """

    def __init__(self, timeout_s: float, what: str, ends_at: float = math.inf) -> None:
        """Begin to try: for *timeout_s*, and never beyond *ends_at* of the monotonic clock."""
        self._ends_at = min(time.monotonic() + timeout_s, ends_at)
        self._timeout_s = timeout_s
        self._what = what
        self._pause_s = FIRST_S

    @property
    def left_s(self) -> float:
        """Seconds until it is enough, never less than a moment."""
        return max(self._ends_at - time.monotonic(), 0.001)

    def next_pause_s(self, reason: Exception | str) -> float:
        """Seconds to wait before the next try.

        Raises:
            Unavailable: that would be too late; *reason* says why the last one failed.
        """
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if time.monotonic() + pause_s >= self._ends_at:
            raise Unavailable(f"{self._what} could not be reached within {self._timeout_s:g} s: {described(reason)}")
        self._pause_s = min(self._pause_s * 2, LONGEST_S)
        return pause_s


def described(reason: Exception | str) -> str:
    """*reason* for a person."""
    if isinstance(reason, FileNotFoundError):
        return "no such socket; is the daemon running?"
    if isinstance(reason, ConnectionRefusedError):
        return "connection refused; is the daemon running?"
    if isinstance(reason, PermissionError):
        return "no permission on the socket; run as the daemon's user or group"
    if isinstance(reason, OSError):
        return reason.strerror or type(reason).__name__
    return str(reason) or type(reason).__name__
