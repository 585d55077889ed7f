"""The event stream as a client reads it: server-sent events into ``Event`` objects."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from urllib.parse import urlencode

from holdfast.client import messages
from holdfast.client.address import Address
from holdfast.client.backoff import Backoff, described
from holdfast.client.connection import limit_calls, open_socket
from holdfast.client.wire import Receiver, Requests, Response, WireError
from holdfast.errors import BadRequest, Unavailable
from holdfast.events import Event, event_of

SILENCE_MAX_S = 60.0
"""The daemon sends something every 15 s; after so long without anything the connection is dead."""

RECEIVE_BYTES = 64 << 10
EVENT_BYTES_MAX = 32 << 20
LASTING_S = 1.0
"""A connection that held for so long was a good one, even if nothing happened meanwhile."""

EVENTS_PATH = "/v1/events"


class Blocks:
    """Takes the bytes of a stream apart (WHATWG, server-sent events); no I/O.

    Attributes:
        position: everything up to this seq was handed out; None until it is known.
        payload: the JSON of the event that was handed out last, as the daemon sent it.
    """

    def __init__(self, position: int | None) -> None:
        self.position = position
        self.payload = b""
        self._rest = bytearray()
        self._ready: deque[tuple[Event | None, int | None, bytes]] = deque()
        # Ops of an atomic batch whose last one is still to come: handed out so far, and to be skipped of its repeat.
        self._handed_out = 0
        self._to_skip = 0
        self._skipped_seq = 0

    def feed(self, data: bytes) -> None:
        """Take what came; the events it completes are in ``next``.

        Raises:
            WireError: something else than our stream.
        """
        self._rest += data
        start = 0
        while (end := self._rest.find(b"\n\n", start)) >= 0:
            self._read(bytes(self._rest[start:end]))
            start = end + 2
        del self._rest[:start]
        if len(self._rest) > EVENT_BYTES_MAX:
            raise WireError("an event without an end")

    def next(self) -> Event | None:
        """The next event, which counts as handed out; None when more must come first."""
        self.settle()
        while self._ready:
            event, id, payload = self._ready.popleft()
            assert event is not None
            is_repeated = self._to_skip > 0 and event.seq == self._skipped_seq
            if id is not None:
                self._pass(id)
            elif not is_repeated:
                self._handed_out += 1
            self.settle()
            if is_repeated:
                self._to_skip -= 1
                continue
            self._to_skip = 0
            self._skipped_seq = event.seq
            self.payload = payload
            return event
        return None

    def settle(self) -> None:
        """Take note of positions that stand before the next event."""
        while self._ready and self._ready[0][0] is None:
            _, id, _ = self._ready.popleft()
            if id is not None:
                self._pass(id)

    def begin_again(self) -> None:
        """The next bytes come from another connection, which begins behind ``position``.

        An atomic batch comes again whole, since only its last op moves the position: what was handed out is skipped.
        """
        self._rest.clear()
        self._ready.clear()
        self._to_skip = self._handed_out

    def _pass(self, id: int) -> None:
        # A connection begins by saying where it goes on from; that is no news of the batch that is under way.
        if id != self.position:
            self.position, self._handed_out = id, 0

    def _read(self, block: bytes) -> None:
        payload, id = b"", None
        for line in block.split(b"\n"):
            if line.startswith(b"data: "):
                payload = line[6:]
            elif line.startswith(b"id: ") and line[4:].isdigit():
                id = int(line[4:])
        try:
            event = event_of(payload) if payload else None
        except (ValueError, LookupError, TypeError) as error:
            raise WireError(f"an event that cannot be read: {error}") from None
        self._ready.append((event, id, payload))


def stream_request(requests: Requests, position: int | None, ops: Collection[str], ids: Collection[str]) -> bytes:
    """The request for everything behind *position*; from now on when it is None."""
    query = urlencode([("op", op) for op in ops] + [("id", id) for id in ids])
    resume = "" if position is None else f"Last-Event-ID: {position}\r\n"
    return requests.render(
        "GET", f"{EVENTS_PATH}{'?' if query else ''}{query}", None, f"Accept: text/event-stream\r\n{resume}"
    )


class Pauses:
    """Between the connections of one stream: none behind one that was good for something, else growing ones.

    So a stream whose daemon goes on serving nothing but nonsense neither hammers it nor goes on for ever.
    """

    def __init__(self, new_backoff: Callable[[], Backoff]) -> None:
        self.new_backoff = new_backoff
        self._backoff: Backoff | None = None
        self._opened_at = 0.0
        self._was_good = True

    def note_opening(self) -> None:
        """A connection was opened."""
        self._opened_at = time.monotonic()
        self._was_good = False

    def note_progress(self) -> None:
        """It has brought something."""
        self._was_good = True

    def before_next(self, reason: Exception | str) -> float:
        """Seconds to wait before the next one.

        Raises:
            Unavailable: there were too many that were good for nothing; *reason* says why the last one was not.
        """
        if self._was_good or time.monotonic() - self._opened_at >= LASTING_S:
            self._backoff = None
            return 0.0
        if self._backoff is None:
            self._backoff = self.new_backoff()
        try:
            return self._backoff.next_pause_s(reason)
        except Unavailable:
            self._backoff = None
            raise


class RemoteEvents:
    """The events of a daemon; goes on by itself, without loss or repetition, when the daemon restarts.

    An iterator for one thread; ``close``, from any thread, or a with-block ends it.
    """

    def __init__(
        self,
        address: Address,
        requests: Requests,
        after: int | None,
        ops: Collection[str],
        ids: Collection[str],
        first_s: float,
        timeout_s: float,
    ) -> None:
        """Begin the stream, within *first_s*; later the daemon may be away for *timeout_s*. Raises what it refuses."""
        self._address = address
        self._requests = requests
        self._ops = named(ops, "ops")
        self._ids = named(ids, "ids")
        self._blocks = Blocks(after)
        self._socket: socket.socket | None = None
        self._receiver = Receiver()
        self._is_closed = False
        self._reason: Exception | str = "the stream was ended"
        self._pauses = Pauses(lambda: Backoff(timeout_s, str(address)))
        self._open(Backoff(first_s, str(address)))

    @property
    def position(self) -> int:
        """Everything up to this seq was handed out: where another stream would go on."""
        return self._blocks.position or 0

    def close(self) -> None:
        """End the iteration."""
        self._is_closed = True
        opened = self._socket
        if opened is not None:
            # Wakes the thread that reads from it.
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> RemoteEvents:
        return self

    def __next__(self) -> Event:
        while not self._is_closed:
            event = self._blocks.next()
            if event is not None:
                return event
            if self._socket is None:
                time.sleep(self._pauses.before_next(self._reason))
                self._open(self._pauses.new_backoff())
            elif not self._receive():
                self._drop()
        self._drop()
        raise StopIteration

    def __enter__(self) -> RemoteEvents:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._drop()

    def _receive(self) -> bool:
        """Take what comes next; False when this connection brings nothing more."""
        assert self._socket is not None
        try:
            self._receiver.feed(self._socket.recv(RECEIVE_BYTES))
            self._blocks.feed(self._receiver.take_body())
        except (OSError, WireError) as error:
            self._reason = error
            return False
        self._pauses.note_progress()
        return not self._receiver.is_whole and self._receiver.has_head

    def _open(self, backoff: Backoff) -> None:
        while not self._is_closed:
            try:
                refused = self._begin(backoff.left_s)
                if refused is None:
                    self._pauses.note_opening()
                    return
                if not messages.is_temporary(refused):
                    raise messages.refusal_in(refused)
                reason: Exception = messages.refusal_in(refused)
            except PermissionError as error:
                raise Unavailable(f"{self._address}: {described(error)}") from None
            except (OSError, WireError) as error:
                reason = error
            self._drop()
            time.sleep(backoff.next_pause_s(reason))

    def _begin(self, timeout_s: float) -> Response | None:
        """Open a connection and read the head of its answer; the whole answer when it is a refusal."""
        opened = self._socket = open_socket(self._address, timeout_s)
        opened.sendall(stream_request(self._requests, self._blocks.position, self._ops, self._ids))
        receiver = self._receiver = Receiver()
        while not receiver.has_head:
            receiver.feed(opened.recv(RECEIVE_BYTES))
        if receiver.status != 200:
            while not receiver.is_whole:
                receiver.feed(opened.recv(RECEIVE_BYTES))
            return receiver.next()
        limit_calls(opened, SILENCE_MAX_S)
        self._blocks.begin_again()
        self._blocks.feed(receiver.take_body())
        self._blocks.settle()
        while self._blocks.position is None:
            # The first block says where "now" is; without it a broken connection would lose what came meanwhile.
            receiver.feed(opened.recv(RECEIVE_BYTES))
            self._blocks.feed(receiver.take_body())
            self._blocks.settle()
        return None

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def named(names: Collection[str], what: str) -> list[str]:
    """*names* as a list; a single text is a mistake.

    Raises:
        BadRequest: it is one.
    """
    if isinstance(names, str):
        raise BadRequest(f"expected {what} as a list of names, found the text {names!r:.80}")
    return list(names)
