"""Events about conversations on their way to the archive, so that it need not read them from the journal again."""

from __future__ import annotations

from collections import deque

from holdfast.core.event import Event

EVENTS_MAX = 4_096
BYTES_MAX = 64 << 20
"""What waits at most; who is further behind reads the journal. A message may have as many bytes as a thousand usual ones."""


class Backlog:
    """The newest events for the archive, in order. Used under the engine's lock.

    Attributes:
        since: every such event above this seq is here, or was taken.
        last_seq: of the last such event, here or taken.
        touched: where somebody asks for it, the conversations that events were about, each with the last one's seq; whoever
            reads it replaces it. Those whose event was taken back stay in it.
    """

    def __init__(self) -> None:
        self.since = 0
        self.last_seq = 0
        self.touched: dict[str, int] | None = None
        self._events: deque[tuple[int, Event]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._events)

    @property
    def first_seq(self) -> int | None:
        """Of the oldest event here; None when there is none. Also without the lock."""
        try:
            return self._events[0][0]
        except IndexError:
            return None

    def note(self, seq: int, event: Event) -> None:
        """Add *event*, which is applied; a member of a batch with the batch's seq."""
        self.last_seq = seq
        if self.touched is not None:
            self.touched[event.id] = seq
        self._events.append((seq, event))
        self._bytes += _size_of(event)
        while len(self._events) > EVENTS_MAX or self._bytes > BYTES_MAX:
            # Whole seqs only: the members of a batch go together.
            self.since = self._events[0][0]
            while self._events and self._events[0][0] <= self.since:
                self._bytes -= _size_of(self._events.popleft()[1])

    def undo(self, seq: int) -> None:
        """Forget what happened after *seq*: it was taken back."""
        while self._events and self._events[-1][0] > seq:
            self._bytes -= _size_of(self._events.pop()[1])
        # Of what was too much to be kept, too: the journal will never have it.
        self.since = min(self.since, seq)
        # Not seq itself, which may be about something else: whoever waits for last_seq would wait in vain.
        self.last_seq = self._events[-1][0] if self._events else min(self.last_seq, self.since)

    def take(self, up_to: int) -> list[tuple[int, Event]]:
        """Remove and return the events up to the seq *up_to*."""
        taken = []
        while self._events and self._events[0][0] <= up_to:
            taken.append(self._events.popleft())
            self._bytes -= _size_of(taken[-1][1])
        self.since = max(self.since, up_to)
        return taken


def _size_of(event: Event) -> int:
    """About the bytes of *event*; of text its characters, which is quick."""
    size = len(event.value)
    for message in event.messages or ():
        size += len(message.content) + len(message.metadata)
    return size
