"""One client connection: its requests in order, each within its deadlines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Protocol

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from holdfast.errors import BadRequest, HoldfastError, RequestTimeout, TooLarge, Unavailable
from holdfast.http.problem import problem
from holdfast.http.reply import Reply, Source, Stream, current_date_line, render, render_head
from holdfast.http.request import Request
from holdfast.measures import HttpMeasures
from holdfast.settings import LimitSettings

READ_BUFFER_BYTES = 256 * 1024
STREAM_BUFFER_BYTES = 256 * 1024
"""What may wait for a reader of a stream, beside what the system buffers."""

PART_BYTES = 64 * 1024
"""Of a body without a limit, that must come within ``limits.body_timeout``."""

LINGER_S = 2.0
"""How long the rest of a refused request is read away, so that the client sees the reply instead of a reset."""

_CLOSE = "Connection: close\r\n"
_KEEP_ALIVE = "Connection: keep-alive\r\n"


class Owner(Protocol):
    """What a connection needs of the service it belongs to."""

    limits: LimitSettings
    measures: HttpMeasures
    date_line: str
    is_stopping: bool
    connections: set[Connection]

    def respond(self, request: Request) -> Awaitable[Reply]:
        """The reply to *request*; never raises but for cancellation."""

    def has_room(self) -> bool:
        """Whether one more connection is taken."""

    def left(self, connection: Connection) -> None:
        """*connection* is closed."""

    def began(self, connection: Connection) -> None:
        """A request of *connection* is in flight."""

    def ended(self) -> None:
        """It is answered, or its client gone."""

    def stream_began(self, connection: Connection) -> None:
        """The request in flight on *connection* has become a stream, for which nobody waits."""

    def stream_ended(self, connection: Connection) -> None:
        """It is a request in flight again, about to be over."""

    def stream_dropped(self, lag: int) -> None:
        """A stream is cut off, because its client takes nothing."""


class Connection(web.RequestHandler):
    """aiohttp's parser and flow control with a request loop of our own.

    aiohttp's own loop makes a task, a request, a writer and a response object for each request, and knows no
    deadline but that of an idle connection: a client that sends a byte a second stays for ever. Here a deadline
    is an attribute, swept by the owner a few times a second, because a timer for each request costs more.

    Attributes:
        deadline: in the loop's time; when it has passed, the owner calls ``expire``.
        is_local: it came by the unix socket.
        is_new: nothing was answered on it yet.
        peer: the address of the client, empty on the unix socket.
    """

    __slots__ = (
        "_body",
        "_head_bytes",
        "_is_busy",
        "_is_lingering",
        "_owner",
        "_source",
        "deadline",
        "is_local",
        "is_new",
        "peer",
    )

    def __init__(self, owner: Owner, server: web.Server, *, is_local: bool) -> None:
        limits = owner.limits
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=0,  # ours, not aiohttp's
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
            max_headers=limits.header_bytes // 4,
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
        )
        self._owner = owner
        self._is_busy = False
        self._is_lingering = False
        self._head_bytes = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._source: Source | None = None
        self.deadline = math.inf
        self.is_local = is_local
        self.is_new = True
        self.peer = ""

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the request loop, or say at once that there is no room."""
        is_taken = self._owner.has_room()
        self.deadline = self._loop.time() + self._owner.limits.header_timeout
        if not self.is_local:
            self.peer = str(transport.get_extra_info("peername")[0])
        self._owner.connections.add(self)
        super().connection_made(transport)
        if not is_taken:
            self.refuse(Unavailable("as many connections are open as limits.connections allows; try again soon"))
            # Without lingering: it would keep what there are too many of.
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wake a handler that waits for the rest of its body, or for more to send."""
        self._owner.left(self)
        super().connection_lost(exc)
        if self._source is not None:
            self._source.close()
        if not self._body.is_eof():
            self._body.set_exception(exc or ConnectionResetError("the client went away within a body"))

    def data_received(self, data: bytes) -> None:
        """Feed the parser, with a limit on time and size of a header that is not yet whole."""
        if self._is_busy or self._messages:
            super().data_received(data)
            return
        if self._is_lingering:
            return
        if not self._head_bytes:
            self.deadline = self._loop.time() + self._owner.limits.header_timeout
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._messages and self._head_bytes > self._owner.limits.header_bytes:
            self.refuse(self._header_too_large(), status=431)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume only what is paused: aiohttp calls this for every body, and would parse nothing once more each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    # Called by the owner.

    def expire(self) -> None:
        """The deadline has passed: refuse what has not arrived, drop who does not read."""
        self.deadline = math.inf
        if self._is_lingering:
            self.force_close()
        elif self._source is not None:
            self._owner.stream_dropped(self._source.lag)
            self._abort()
        elif not self._body.is_eof():
            self._body.set_exception(
                RequestTimeout("the body did not arrive within limits.body_timeout; send it faster")
            )
        elif self._is_busy:
            self._abort()
        elif self._head_bytes:
            self.refuse(RequestTimeout("the header did not arrive within limits.header_timeout; send it faster"))
        else:
            self.force_close()

    def close_when_idle(self) -> None:
        """Close now unless a request is in flight, which is then the last."""
        if not self._is_busy and not self._messages:
            self.force_close()

    def end_stream(self) -> None:
        """Send what there is already, then the end."""
        if self._source is not None:
            self._source.end()

    async def cut(self) -> None:
        """Give up the request in flight and wait until its loop has ended."""
        task = self._task_handler
        self._abort()
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])

    def refuse(self, error: HoldfastError, *, status: int | None = None) -> None:
        """Answer what is not, or not yet, a request, then linger and close."""
        reply = problem(error, status=status, is_last=True)
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        transport.write(render(reply, current_date_line(), _CLOSE, has_body=True))
        self._owner.measures.problems[error.code] += 1
        self._owner.measures.responses[reply.status] += 1
        self._linger()

    # Called by the request.

    @property
    def has_body(self) -> bool:
        """Whether the request in hand announced a body."""
        return self._body is not EMPTY_PAYLOAD

    def arrived_body(self) -> bytes | None:
        """The body of the request in hand when it came with its header, as most do; None when the rest is to come.

        Raises:
            TooLarge: above ``limits.body_bytes``.
        """
        if not self._body.is_eof():
            return None
        content: bytes = self._body.read_nowait(-1)
        if len(content) > self._owner.limits.body_bytes:
            raise self._body_too_large()
        return content

    async def read_body(self, headers: Mapping[str, str]) -> bytes:
        """The body of the request in hand, as it comes; read once.

        Raises:
            TooLarge: above ``limits.body_bytes``, by its Content-Length or while it comes.
            RequestTimeout: it did not come in time.
        """
        body = self._body
        bytes_max = self._owner.limits.body_bytes
        if int(headers.get("Content-Length", 0)) > bytes_max:
            raise self._body_too_large()
        if self.transport is not None and headers.get("Expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.deadline = self._loop.time() + self._owner.limits.body_timeout
        parts, size = [], 0
        while part := await body.readany():
            parts.append(part)
            size += len(part)
            if size > bytes_max:
                raise self._body_too_large()
        self.deadline = math.inf
        return b"".join(parts)

    async def body_parts(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body of the request in hand, part by part and without a limit on its size; read once.

        Raises:
            RequestTimeout: PART_BYTES of it did not come within ``limits.body_timeout``.
        """
        if self.transport is not None and headers.get("Expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = PART_BYTES
        try:
            while True:
                if size >= PART_BYTES:
                    self.deadline = self._loop.time() + self._owner.limits.body_timeout
                    size = 0
                part = await self._body.readany()
                if not part:
                    return
                size += len(part)
                yield part
        finally:
            self.deadline = math.inf

    # The loop.

    async def start(self) -> None:
        """Answer one request after the other until either side closes."""
        owner = self._owner
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message, self._body = self._messages.popleft()
            if self._parser is not None:
                self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            self._is_busy = True
            self.deadline = math.inf
            owner.began(self)
            try:
                if isinstance(message, RawRequestMessage):
                    stays_open = await self._answer(message)
                else:
                    self._refuse_malformed(message.exc)
                    stays_open = False
            finally:
                self._is_busy = self.is_new = False
                owner.ended()
            if not stays_open:
                break
            self._head_bytes = 0
            self.deadline = self._loop.time() + owner.limits.keep_alive
        if self.transport is not None and not self._is_lingering:
            self.transport.close()

    async def _answer(self, message: RawRequestMessage) -> bool:
        owner = self._owner
        if self._head_bytes > owner.limits.header_bytes and _header_bytes(message) > owner.limits.header_bytes:
            reply = problem(self._header_too_large(), status=431, is_last=True)
            owner.measures.problems[TooLarge.code] += 1
        else:
            reply = await owner.respond(Request(message, self))
        owner.measures.responses[reply.status] += 1
        if type(reply) is Stream:
            try:
                await self._send_stream(reply, message)
            except ConnectionError:
                pass
            except BaseException:
                # Not a clean end: the client must not take it for one.
                self._abort()
                raise
            finally:
                self._source = None
                reply.source.close()
            return False
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        body_is_read = self._body.is_eof()
        is_last = reply.is_last or message.should_close or owner.is_stopping or not body_is_read or self._upgraded
        connection_line = _CLOSE if is_last else _KEEP_ALIVE if message.version == HttpVersion10 else ""
        transport.write(render(reply, owner.date_line, connection_line, has_body=message.method != "HEAD"))
        if self._paused:
            # A client that does not read holds its reply in memory: it gets as long as an idle one.
            self.deadline = self._loop.time() + owner.limits.keep_alive
            try:
                await self._drain_helper()
            except ConnectionError:
                return False
        if not body_is_read:
            self._linger()
        return not is_last

    async def _send_stream(self, reply: Stream, message: RawRequestMessage) -> None:
        """Send the parts of *reply* as they come; return when it has ended or its client is gone."""
        owner, transport, source = self._owner, self.transport, reply.source
        if transport is None or transport.is_closing():
            return
        is_chunked = message.version >= HttpVersion11
        transport.write(render_head(reply, owner.date_line, is_chunked=is_chunked))
        if message.method == "HEAD":
            return
        transport.set_write_buffer_limits(high=STREAM_BUFFER_BYTES)
        self._source = source
        owner.stream_began(self)
        try:
            while part := await source.next():
                transport.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
                await self._taken()
            # The end counts as taken only when nothing waits behind it.
            transport.set_write_buffer_limits(high=0)
            transport.write(b"0\r\n\r\n" if is_chunked else b"")
            await self._taken()
        finally:
            owner.stream_ended(self)

    async def _taken(self) -> None:
        """Wait while too much of a stream is not taken by its client, which gets ``limits.stream_stall`` for that.

        Raises:
            ConnectionError: the client is gone.
        """
        if self._paused:
            self.deadline = self._loop.time() + self._owner.limits.stream_stall
            await self._drain_helper()
            self.deadline = math.inf
        if self.transport is None or self.transport.is_closing():
            raise ConnectionError("the client went away")

    def _linger(self) -> None:
        """End our side, and throw away what the client still sends until it ends its own, or LINGER_S have passed."""
        transport = self.transport
        assert transport is not None
        if transport.can_write_eof():
            transport.write_eof()
        self._is_lingering = True
        self.deadline = self._loop.time() + LINGER_S
        self.close()
        # Of a body too large the reader may have stopped the transport.
        self._resume_transport_reading()

    def _refuse_malformed(self, error: BaseException) -> None:
        if isinstance(error, LineTooLong):
            self.refuse(self._header_too_large(), status=431)
        else:
            self.refuse(BadRequest(f"not an HTTP/1.1 request: {type(error).__name__}; the connection is closed"))

    def _header_too_large(self) -> TooLarge:
        return TooLarge(f"a request header may have {self._owner.limits.header_bytes} bytes, this one has more")

    def _body_too_large(self) -> TooLarge:
        return TooLarge(f"a body may have {self._owner.limits.body_bytes} bytes, this one has more; split it")

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self.force_close()


def _header_bytes(message: RawRequestMessage) -> int:
    return len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
