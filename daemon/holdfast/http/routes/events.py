"""The event stream: every change once it is durable, as server-sent events."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta

from holdfast.errors import BadRequest, Conflict, Gone, Unavailable
from holdfast.feed import Part, Reader, Selection
from holdfast.http.reply import Reply, Stream
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import RETRY_AFTER, integer
from holdfast.http.routes.route import Field, Outcome, route

RECONNECT_MS = 1000
"""What a client is told to wait before it comes back."""

GATHER_S = 0.005
"""Under load events are sent together so often: soon for any reader, and rarely enough to cost the writers little."""

_Seq = Annotated[int, Meta(ge=0, lt=10**18)]

AFTER = Field(
    "after", "Begin behind the event with this `seq`; 0: with the first one ever. Now, when absent.", _Seq, "0"
)
OP = Field(
    "op",
    "Only events of this op, `session.*` for all that begin so; may be repeated, or hold several with commas between.",
    example="session.*",
)
ID = Field(
    "id", "Only events of this record; may be repeated, or hold several with commas between.", example="573001234567"
)
LAST_EVENT_ID = Field(
    "Last-Event-ID",
    "The last `id` that a client has seen, as it sends it when it reconnects; goes before `after`.",
    _Seq,
)


@route(
    Outcome(
        200,
        "The stream. It ends only when the daemon stops, or the client takes nothing for `limits.stream_stall`.",
        str,
        'retry: 1000\nid: 0\n: from event 1 on\n\nid: 1\nevent: session.put\ndata: {"seq":1,"at":"2026-11-21T06:00:00.000Z",'
        '"op":"session.put","id":"573001234567","version":1,"value":{"recipientPhone":"573001234567","currentState":"catalog",'
        '"lastActivity":"2026-11-21T06:00:00.000Z"},"activity":1795240800000}\n\n',
        content_type="text/event-stream",
    ),
    Outcome(503, "As many streams are open as `limits.streams` allows, or it stops.", headers=(RETRY_AFTER,)),
    query=(AFTER, OP, ID),
    headers=(LAST_EVENT_ID,),
    errors=(Conflict, Gone),
)
async def events(backend: Backend, request: Request) -> Reply:
    """Every change once it is durable, in order, as server-sent events.

    Each has its `seq` as `id`, its op as `event`, and as `data` one line of JSON: what became, as it stands in the
    journal. An atomic batch comes as its members; only the last one carries the `id`, so that a client that goes on
    after the last `id` it has seen may meet some again, but misses none.

    Raises:
        BadRequest: a filter or seq that has no meaning.
        Conflict: the event to begin behind has not happened.
        Gone: it is so long ago that the journal does not hold those after it.
        Unavailable: too many streams.
    """
    query = request.query_lists()
    after = request.headers.get("Last-Event-ID") or _only(query.get("after", []))
    selection = Selection(
        [op for text in query.get("op", []) for op in text.split(",")],  # no op has a comma in its name
        query.get("id", []),
    )
    seq = integer(after, "the seq to begin behind") if after is not None else None
    # In a thread, since a flush may be at the journal just now.
    reader = await asyncio.to_thread(backend.engine.feed.open, seq, selection)
    limits = backend.settings.limits
    if backend.open_streams >= limits.streams:
        reader.close()
        raise Unavailable("as many event streams are open as limits.streams allows; close one, or try again later")
    return Stream(
        status=200,
        headers="Cache-Control: no-store\r\nX-Accel-Buffering: no\r\n",
        content_type="text/event-stream",
        source=_EventSource(reader, backend),
    )


class _EventSource:
    """Writes what *reader* reads as a stream; lives as long as the connection it goes to."""

    def __init__(self, reader: Reader, backend: Backend) -> None:
        self._reader = reader
        self._backend = backend
        self._told_seq = -1
        self._told_at = 0.0

    @property
    def lag(self) -> int:
        """How many events its client is behind."""
        return self._reader.lag

    def end(self) -> None:
        """Let it give what is durable, then the end."""
        self._reader.end()

    def close(self) -> None:
        """Give the reader back."""
        self._reader.close()

    async def next(self) -> bytes:
        """The next events, or a sign of life when there are none for ``limits.heartbeat``; empty at the end."""
        reader, loop = self._reader, asyncio.get_running_loop()
        if self._told_seq < 0:
            self._told(reader.position, loop.time())
            return b"retry: %d\nid: %d\n: from event %d on\n\n" % (RECONNECT_MS, self._told_seq, self._told_seq + 1)
        heartbeat_at = self._told_at + self._backend.settings.limits.heartbeat
        while True:
            if reader.has_more:
                await asyncio.sleep(max(0.0, self._told_at + GATHER_S - loop.time()))
                try:
                    parts = await reader.read_async()
                except Gone as error:
                    # The client learns it as 410 when it comes back.
                    reader.close()
                    return b": %b\n\n" % error.detail.encode()
                if parts:
                    self._told(parts[-1].seq, loop.time())
                    return b"".join(map(_written, parts))
            elif reader.is_over:
                return b""
            left_s = heartbeat_at - loop.time()
            if left_s <= 0:
                return self._heartbeat(loop.time())
            if not reader.has_more:
                await reader.wait_async(left_s)

    def _heartbeat(self, now: float) -> bytes:
        """A comment and, when events passed that the client does not want, the id behind them to resume from."""
        position = self._reader.position
        is_news = position > self._told_seq
        self._told(position, now)
        return b"id: %d\n:\n\n" % position if is_news else b":\n\n"

    def _told(self, seq: int, now: float) -> None:
        self._told_seq = seq
        self._told_at = now


def _written(part: Part) -> bytes:
    id_line = b"id: %d\n" % part.seq if part.ends_line else b""
    return b"%bevent: %b\ndata: %b\n\n" % (id_line, part.op.encode(), part.payload)


def _only(values: list[str]) -> str | None:
    if len(values) > 1:
        raise BadRequest("the query parameter after is given twice; send it at most once")
    return values[0] if values else None
