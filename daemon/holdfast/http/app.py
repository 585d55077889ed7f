"""The HTTP service: from the first listening socket to the last answered request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from zoneinfo import ZoneInfo

import structlog
from aiohttp import web

from holdfast.errors import HoldfastError, Unavailable
from holdfast.http.auth import TokenStore
from holdfast.http.connection import Connection
from holdfast.http.guard import OPEN_PATHS, Guard
from holdfast.http.listen import Listener, inherited_listeners, open_listeners
from holdfast.http.problem import problem
from holdfast.http.reply import GZIP_BYTES_MIN, Reply, compressed, current_date_line
from holdfast.http.request import Request
from holdfast.http.routes import OtherMethod, dispatch
from holdfast.http.routes.backend import Admin
from holdfast.http.throttle import Throttle
from holdfast.measures import HttpMeasures
from holdfast.settings import Settings
from holdfast.values import ValueLimits

if TYPE_CHECKING:
    from holdfast.engine import Engine
    from holdfast.http.metrics import Exposition

SWEEP_S = 0.25
"""How late a deadline may be noticed, and how soon a changed token file."""

ACCEPT_AT_ONCE = 16
"""asyncio accepts as many connections as its backlog says before it tells us of the first: a burst must not take
the descriptors that the disk needs."""

ALONE_AFTER = 8
"""Requests of one connection in a row, after which its client counts as the only one."""

LOG_LINES_MAX = 10
"""Lines about refused connections in a minute, and about dropped streams."""

FIRST_REQUEST_S = 0.2
"""What a connection gets at a stop to send its first request."""

STREAM_END_S = 0.5
"""What streams get at a stop to send what is durable already; their readers resume when we are back."""

log = structlog.get_logger()


class InternalError(HoldfastError):
    """A fault of ours; the log has the traceback."""


class HttpService:
    """Serves one engine on the addresses of its settings.

    Lives on one event loop, and while the lock of the data directory is held. In order: ``start``, ``attach``,
    ``stop_accepting``, ``drain``, ``stop``. Before ``attach`` it answers 503, except for the health checks.
    """

    def __init__(
        self,
        engine: Engine | None,
        settings: Settings,
        *,
        readiness: Callable[[], Mapping[str, Any]],
        admin: Admin,
        sockets: list[socket.socket] | None = None,
        lines_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        """Serve on the inherited *sockets* when there are any, else on ``settings.listen``.

        *lines_dropped*: log lines that could not be written, so far.
        """
        self._engine = engine
        self._absence = "starting: the data is being loaded"
        self.readiness = readiness
        self.admin = admin
        self.is_stopping = False
        self.connections: set[Connection] = set()
        self._streams: set[Connection] = set()
        self._streams_over = asyncio.Event()
        self._streams_over.set()
        self.measures = HttpMeasures()
        self.date_line = current_date_line()
        self._sockets = sockets
        self._tokens = TokenStore(settings.data_dir)
        self._guard = Guard(self._tokens)
        self._listeners: list[Listener] = []
        self._servers: list[asyncio.AbstractServer] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._latest: Connection | None = None
        self._in_a_row = 0
        self._progressed = asyncio.Event()
        self._lines_dropped = lines_dropped
        self._exposition: Exposition | None = None
        self._refusals = Throttle(LOG_LINES_MAX, 60.0)
        self._drops = Throttle(LOG_LINES_MAX, 60.0)
        self.reconfigure(settings)

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            Unavailable: it is still loading.
        """
        if self._engine is None:
            raise Unavailable(f"{self._absence}; try again soon")
        return self._engine

    @property
    def listening(self) -> list[str]:
        """Where, as ``unix:PATH`` or ``tcp:HOST:PORT``, with the port the system chose."""
        return [str(listener) for listener in self._listeners]

    @property
    def open_connections(self) -> int:
        """How many there are."""
        return len(self.connections)

    @property
    def open_streams(self) -> int:
        """How many of them are event streams."""
        return len(self._streams)

    @property
    def connections_max(self) -> int:
        """How many there may be."""
        return self._connections_max

    def scrape(self, accept: str) -> Reply:
        """The metrics, in the form that *accept*, the header, names; blocks for milliseconds, at first for longer.

        Raises:
            Unavailable: as ``engine``.
        """
        if self._exposition is None:
            from holdfast.http.metrics import Exposition  # see there

            self._exposition = Exposition(self.engine, self, self._lines_dropped)
        body, content_type = self._exposition.rendered(accept)
        return Reply(200, body, content_type=content_type)

    def attach(self, engine: Engine) -> None:
        """Serve *engine* from now on."""
        self._engine = engine
        # Its figures are those of one engine.
        self._exposition = None

    async def detach(self, reason: str, timeout_s: float) -> None:
        """Until ``attach``, answer 503 with this *reason*; the addresses stay. Streams end, requests in flight finish.

        Returns when they are done, or *timeout_s* seconds have passed.
        """
        engine, self._engine, self._absence = self._engine, None, reason
        for connection in list(self._streams):
            connection.end_stream()
        if engine is not None:
            engine.lease_queue.dismiss()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._streams_over.wait()
                await self.drain()

    def reconfigure(self, settings: Settings) -> None:
        """Follow changed settings; the addresses and connections that are open stay."""
        limits = settings.limits
        self.settings = settings
        self.limits = limits
        self.zone: tzinfo = ZoneInfo(settings.stats.timezone)
        self.record_limits = ValueLimits(
            bytes_max=max(limits.record_bytes, settings.sessions.max_bytes),
            depth_max=limits.depth,
            keys_max=limits.keys,
        )
        # Each record in it is measured by the engine; to walk the whole body as well would cost more than all the rest.
        self.batch_limits = ValueLimits(bytes_max=limits.body_bytes, depth_max=sys.maxsize, keys_max=sys.maxsize)
        # Files need descriptors too: a flush must not fail because clients took the last one.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._connections_max = min(limits.connections, max(1, descriptors // 2))

    async def start(self) -> None:
        """Make the first token if there is none, then listen.

        Raises:
            SettingsError: an address cannot be used.
            DataRefused: a token file is damaged or open to others.
        """
        loop = asyncio.get_running_loop()
        self._tokens.load()
        if self._sockets:
            self._listeners = inherited_listeners(self._sockets)
        else:
            self._listeners = open_listeners(self.settings.listen, self.settings.data_dir)
        server = web.Server(_never_called)
        for listener in self._listeners:
            factory = partial(Connection, self, server, is_local=listener.is_local)
            if listener.is_local:
                self._servers.append(await loop.create_unix_server(factory, sock=listener.sock, backlog=ACCEPT_AT_ONCE))
            else:
                self._guard.add_name(listener.host)
                self._servers.append(await loop.create_server(factory, sock=listener.sock, backlog=ACCEPT_AT_ONCE))
            listener.deepen_queue()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop_accepting(self) -> None:
        """Take no new connections; on those that are open, new requests get 503 and are the last. Streams end.

        The first request of a connection is answered all the same: its client could not know, and a moment later
        systemd would have kept the connection for the next process.
        """
        self.is_stopping = True
        for connection in self._streams:
            connection.end_stream()
        if self._engine is not None:
            self._engine.lease_queue.dismiss()
        for server in self._servers:
            server.close()
        for listener in self._listeners:
            listener.remove_file()

    async def drain(self) -> None:
        """Wait until no request is in flight, nor likely on its way; the caller sets the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REQUEST_S):
                while any(connection.is_new for connection in self.connections):
                    await self._progress()
        while self._in_flight:
            await self._progress()

    async def stop(self) -> None:
        """Close every connection; a request still in flight is cut off. May be called at any time, and twice."""
        await self.stop_accepting()
        for connection in list(self.connections):
            connection.close_when_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STREAM_END_S):
                await self._streams_over.wait()
        await asyncio.gather(*(connection.cut() for connection in list(self.connections)))
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None

    # Called by the connections.

    async def respond(self, request: Request) -> Reply:
        """The reply to *request*, whatever happens."""
        try:
            self._guard.check(request)
            if self.is_stopping and not request.is_first and request.segments not in OPEN_PATHS:
                raise Unavailable("stopping: the daemon takes no more requests; try again soon")
            reply = await dispatch(self, request)
        except HoldfastError as error:
            self.measures.problems[error.code] += 1
            reply = problem(error, headers=_allow(error))
        except ConnectionError:
            self.measures.problems[Unavailable.code] += 1
            reply = problem(Unavailable("the client went away within its request"), is_last=True)
        except Exception as error:
            # Two segments name the route; a third would name a person.
            route = "/" + "/".join(request.segments[:2])
            self.measures.problems[InternalError.code] += 1
            log.error("request.failed", method=request.method, route=route, exc_info=error)
            reply = problem(InternalError(_internal_detail(error)), is_last=True)
        if len(reply.body) > GZIP_BYTES_MIN:
            reply = await compressed(reply, request.headers.get("Accept-Encoding", ""))
        return reply

    def has_room(self) -> bool:
        """Whether one more connection is taken."""
        if len(self.connections) < self._connections_max:
            self.measures.connections += 1
            return True
        self.measures.connections_refused += 1
        if self._refusals.allows("", time.monotonic()):
            log.warning("connections.refused", open=len(self.connections), limit=self._connections_max)
        return False

    def left(self, connection: Connection) -> None:
        """*connection* is closed."""
        self.connections.discard(connection)
        if connection is self._latest:
            self._latest = None
        self._progressed.set()

    def began(self, connection: Connection) -> None:
        """A request of *connection* is in flight."""
        self._in_flight += 1
        if connection is self._latest:
            self._in_a_row += 1
        else:
            self._latest, self._in_a_row = connection, 0

    @property
    def is_alone(self) -> bool:
        """Whether the request in hand is all there is to do: one client asks, one request after the other."""
        return self._in_a_row >= ALONE_AFTER and self._in_flight == 1

    def ended(self) -> None:
        """It is answered, or its client gone."""
        self._in_flight -= 1
        self._progressed.set()

    def stream_began(self, connection: Connection) -> None:
        """The request in flight on *connection* has become a stream, for which nobody waits."""
        self._streams.add(connection)
        self._streams_over.clear()
        self.ended()
        if self.is_stopping:
            connection.end_stream()

    def stream_ended(self, connection: Connection) -> None:
        """It is a request in flight again, about to be over."""
        self._streams.discard(connection)
        if not self._streams:
            self._streams_over.set()
        self._in_flight += 1

    def stream_dropped(self, lag: int) -> None:
        """A stream is cut off, because its client takes nothing."""
        self.measures.streams_dropped += 1
        if self._drops.allows("", time.monotonic()):
            log.warning("stream.dropped", reason="its reader took nothing for limits.stream_stall", lag=lag)

    async def _progress(self) -> None:
        """Return when a request has ended or a connection is closed."""
        self._progressed.clear()
        await self._progressed.wait()

    async def _sweep(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        while True:
            due = time.monotonic() + SWEEP_S  # the time of a loop may be whole milliseconds
            await asyncio.sleep(SWEEP_S)
            self.measures.loop_lag.add(max(0.0, time.monotonic() - due))
            self.date_line = current_date_line()
            self._guard.refresh()
            now = loop.time()
            for connection in list(self.connections):
                if connection.deadline < now:
                    connection.expire()


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    raise AssertionError("Connection has a request loop of its own")


def _allow(error: HoldfastError) -> str:
    return f"Allow: {', '.join(error.allowed)}\r\n" if isinstance(error, OtherMethod) else ""


def _internal_detail(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission on the data directory ({error.strerror}); make it writable for the user of the daemon"
    return "an error inside Holdfast; the log has it as request.failed"
