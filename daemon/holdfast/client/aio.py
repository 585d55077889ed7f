"""The client for tasks: ``holdfast.aio.connect``."""

from __future__ import annotations

import asyncio
import math
import os
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

from holdfast.asynchronous import AsyncBlock, AsyncEvents, AsyncHoldfast
from holdfast.client import messages
from holdfast.client.address import Address, address_of, timeout_of, token_of
from holdfast.client.backoff import Backoff, described
from holdfast.client.stream import RECEIVE_BYTES, SILENCE_MAX_S, Blocks, Pauses, named, stream_request
from holdfast.client.sync import BACKUP_TIMEOUT_S, FIRST_CONTACT_S, FLUSH_TIMEOUT_S
from holdfast.client.wire import Receiver, Requests, Response, WireError
from holdfast.errors import HoldfastError, Leased, Unavailable
from holdfast.events import Event
from holdfast.leases import LEASE_WAIT_MAX_S
from holdfast.ops import Answer, AnyOp, BackupReport, Durability, FlushReport, Page, Record, Retry, SessionLease, Window

UNDER_WAY = "closed while the request was under way; whether it happened is not known"

PIPELINE_MAX = 4_096
"""Ops of one pipeline block that may be under way; the block then waits for the first of them."""


@asynccontextmanager
async def connect_async(
    address: str, token: str | None, token_file: str | os.PathLike[str] | None, timeout_s: float
) -> AsyncIterator[AsyncHoldfast]:
    """As ``holdfast.aio.connect``."""
    remote = AsyncRemote(address_of(address), token_of(token, token_file), timeout_of(timeout_s))
    try:
        yield remote
    finally:
        await remote.aclose()


class Line(asyncio.Protocol):
    """One connection; its requests are answered in their order, and may follow each other without waiting."""

    def __init__(self) -> None:
        self._receiver = Receiver()
        self._waiting: deque[asyncio.Future[Response]] = deque()
        self._transport: asyncio.Transport | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: the transports of uvloop are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._receiver.feed(data)
            while (response := self._receiver.next()) is not None:
                self._answered(response)
        except (WireError, IndexError) as error:
            self._end(ConnectionResetError(str(error) or "an answer to no request"))

    def eof_received(self) -> None:
        try:
            self._receiver.feed(b"")
            response = self._receiver.next()
            if response is not None:
                self._answered(response)
        except (WireError, IndexError) as error:
            self._end(ConnectionResetError(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionResetError("the connection was closed"))

    def send(self, request: bytes) -> asyncio.Future[Response]:
        """Send *request*; its response, or what became of the connection."""
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        if self.is_closed or self._transport is None:
            future.set_exception(ConnectionResetError("the connection was closed"))
            return future
        self._waiting.append(future)
        self._transport.write(request)
        return future

    def close(self) -> None:
        """Close it; who waits gets a ConnectionResetError."""
        self._end(ConnectionResetError("the connection was closed"))

    def _answered(self, response: Response) -> None:
        future = self._waiting.popleft()
        if not future.done():
            future.set_result(response)
        if response.is_last:
            self._end(ConnectionResetError("the daemon closes the connection"))

    def _end(self, error: Exception) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(error)


class Dialler:
    """Opens connections to one daemon, and knows whether it was ever reached, and is still wanted."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.has_reached = False
        self.is_closed = False

    def check_open(self) -> None:
        """Raise Unavailable when nobody wants the daemon any more."""
        if self.is_closed:
            raise Unavailable("closed; connect again")

    async def dial(self) -> Line:
        """A new connection; OSError when there is none."""
        loop = asyncio.get_running_loop()
        address = self.address
        if address.path:
            _, line = await loop.create_unix_connection(Line, address.path)
        else:
            _, line = await loop.create_connection(Line, address.host, address.port, ssl=address.tls())
        return line

    def backoff(self, ends_at: float = math.inf) -> Backoff:
        """The tries of one call, which never go beyond *ends_at*."""
        patience_s = self.timeout_s if self.has_reached else min(self.timeout_s, FIRST_CONTACT_S)
        return Backoff(patience_s, str(self.address), ends_at)


class Exchange:
    """A connection that is opened when it is needed, and again when it is lost."""

    def __init__(self, dialler: Dialler) -> None:
        self._dialler = dialler
        self._line: Line | None = None
        self._dialling = asyncio.Lock()

    async def response_to(self, request: bytes, timeout_s: float) -> Response:
        """The response to *request*, which may be sent more than once.

        Raises:
            Unavailable: none within *timeout_s*, no daemon, or the client was closed.
        """
        dialler = self._dialler
        left_s = timeout_s
        ends_at = time.monotonic() + timeout_s
        backoff: Backoff | None = None
        is_fresh = self._line is None
        while True:
            dialler.check_open()
            try:
                line = self._line
                if line is None or line.is_closed:
                    line = await self._dialled(left_s)
                async with asyncio.timeout(left_s):
                    response = await line.send(request)
                dialler.has_reached = True
                if not messages.is_temporary(response):
                    return response
                reason: Exception = messages.refusal_in(response)
            except TimeoutError:
                self.close()
                raise Unavailable(
                    f"{dialler.address} did not answer within {timeout_s:g} s; whether it acted is not known"
                ) from None
            except OSError as error:
                if isinstance(error, PermissionError):
                    raise Unavailable(f"{dialler.address}: {described(error)}") from None
                reason = error
                if not is_fresh:
                    # The daemon closes connections that were idle for long; a new one serves.
                    is_fresh = True
                    continue
            dialler.check_open()
            if backoff is None:
                backoff = dialler.backoff(ends_at)
            await asyncio.sleep(backoff.next_pause_s(reason))
            left_s = max(ends_at - time.monotonic(), 0.001)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._line is not None:
            self._line.close()
            self._line = None

    async def _dialled(self, timeout_s: float) -> Line:
        # One for all who find it closed.
        async with self._dialling:
            if self._line is None or self._line.is_closed:
                async with asyncio.timeout(timeout_s):
                    self._line = await self._dialler.dial()
                if self._dialler.is_closed:  # meanwhile
                    self._line.close()
            return self._line


class _Pending:
    """An op that waits for its request, or for the answer."""

    __slots__ = ("durability", "encoded", "future")

    def __init__(self, encoded: bytes, durability: Durability | None, future: asyncio.Future[Answer]) -> None:
        self.encoded = encoded
        self.durability = durability
        self.future = future


class Courier:
    """Carries ops to the daemon: while a request is under way, the next one gathers.

    So many tasks share a request, and a sync, without any of them waiting longer than for one request before; and ops
    happen in the order in which they were called. A second request at the same time was tried: it halves what shares a
    sync, and so costs both sides more than it saves.
    """

    def __init__(self, remote: AsyncRemote, dialler: Dialler) -> None:
        self._remote = remote
        self._dialler = dialler
        self._exchange = Exchange(dialler)
        self._gathered: deque[_Pending] = deque()
        self._under_way: list[_Pending] = []
        self._task: asyncio.Task[None] | None = None
        self._client = messages.new_client_id()
        self._number = 0
        self._is_due = False

    def carry(self, op: AnyOp, durability: Durability | None) -> asyncio.Future[Answer]:
        """The answer to *op*. Cancelled before it is sent, the op does not happen.

        Raises:
            InvalidRecord: its value is nothing that can be kept.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._gathered.append(_Pending(messages.encode_op(op), durability, future))
        if not self._is_due and self._task is None:
            self._dispatch_soon()
        return future

    async def stop(self) -> None:
        """Refuse what waits; give up the request under way."""
        self._dispatch()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        # A task that was cancelled before its first step has told nobody.
        self._refuse(self._under_way, Unavailable(UNDER_WAY))
        self._exchange.close()

    def _dispatch_soon(self) -> None:
        # After all tasks that can run now have said what they want.
        self._is_due = True
        asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_due = False
        if self._dialler.is_closed:
            self._refuse(self._gathered, Unavailable("closed; connect again"))
            self._gathered.clear()
        elif self._task is None:
            self._under_way = self._next_batch()
            if self._under_way:
                self._task = asyncio.get_running_loop().create_task(self._send())

    def _next_batch(self) -> list[_Pending]:
        """The next ops, in order, as many as a request should have."""
        batch: list[_Pending] = []
        size = 0
        gathered = self._gathered
        while gathered and len(batch) < messages.BATCH_OPS_MAX and size < messages.BATCH_BYTES_MAX:
            pending = gathered[0]
            if not pending.future.cancelled():
                if batch and pending.durability != batch[0].durability:
                    break
                batch.append(pending)
                size += len(pending.encoded)
            gathered.popleft()
        return batch

    async def _send(self) -> None:
        # Those that are refused together are tried in halves: nobody's op is refused for another task's.
        parts = [self._under_way]
        try:
            while parts:
                part = parts.pop()
                try:
                    found = await self._outcomes(part)
                except HoldfastError as error:
                    if len(part) > 1 and messages.may_be_of_one(error):
                        middle = len(part) // 2
                        parts += [part[middle:], part[:middle]]
                    else:
                        self._refuse(part, error)
                else:
                    self._settle(part, found)
        except BaseException:
            self._refuse(self._under_way, Unavailable(UNDER_WAY))
            raise
        finally:
            self._under_way, self._task = [], None
        self._dispatch_soon()

    async def _outcomes(self, batch: list[_Pending]) -> list[Answer | HoldfastError]:
        self._number += 1
        request = self._remote.requests.render(
            "POST",
            messages.batch_target(batch[0].durability),
            messages.batch_body([pending.encoded for pending in batch], atomic=False),
            messages.retry_line(Retry(self._client, self._number)),
        )
        return messages.outcomes(await self._exchange.response_to(request, self._remote.timeout_s), len(batch))

    @staticmethod
    def _settle(batch: list[_Pending], found: list[Answer | HoldfastError]) -> None:
        for pending, outcome in zip(batch, found, strict=True):
            if pending.future.done():
                continue
            if isinstance(outcome, HoldfastError):
                pending.future.set_exception(outcome)
            else:
                pending.future.set_result(outcome)

    @staticmethod
    def _refuse(batch: Collection[_Pending], error: HoldfastError) -> None:
        for pending in batch:
            if not pending.future.done():
                # Each its own: a traceback belongs to one task.
                own = type(error)(str(error))
                pending.future.set_exception(own)


class _Transcripts:
    """What a daemon answers to questions about conversations."""

    def __init__(self, remote: AsyncRemote) -> None:
        self._remote = remote

    async def conversation(self, id: str) -> Record | None:
        return messages.record_in(await self._remote.ask("GET", messages.conversation_target(id)), id)

    async def page(self, **wanted: Any) -> Page:
        return messages.page_in(await self._remote.ask("GET", messages.conversations_target(**wanted)))

    async def messages(self, id: str, **wanted: Any) -> Page:
        return messages.page_in(await self._remote.ask("GET", messages.messages_target(id, **wanted)))

    async def window(self, id: str, **wanted: Any) -> Window:
        return messages.window_in(await self._remote.ask("GET", messages.window_target(id, **wanted)))

    async def escalations(self, **wanted: Any) -> Page:
        return messages.page_in(await self._remote.ask("GET", messages.escalations_target(**wanted)))

    async def storage(self) -> dict[str, Any]:
        return messages.status_in(await self._remote.ask("GET", "/v1/stats/storage"))


class _Answers:
    """What a daemon answers to questions; the source of an ``AsyncRemote``."""

    def __init__(self, remote: AsyncRemote) -> None:
        self._remote = remote
        self.transcripts = _Transcripts(remote)

    async def get(self, collection: str, id: str) -> Record | None:
        return messages.record_in(await self._remote.ask("GET", messages.head_target(collection, id)), id)

    async def page(
        self,
        collection: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        since_ms: int | None = None,
        state: str | None = None,
    ) -> Page:
        target = messages.page_target(collection, limit, cursor, since_ms, state)
        return messages.page_in(await self._remote.ask("GET", target))

    async def count(self, collection: str) -> int:
        return messages.count_in(await self.status(), collection)

    async def sales(self) -> bytes:
        response = await self._remote.ask("GET", "/v1/stats/sales")
        messages.check(response)
        return response.body

    async def status(self) -> dict[str, Any]:
        return messages.status_in(await self._remote.ask("GET", "/v1/admin/status"))


class _Pipeline:
    """Lets its ops leave as they come, and waits for all at its end."""

    def __init__(self, remote: AsyncRemote, durability: Durability | None) -> None:
        self._remote = remote
        self._durability = durability
        self._under_way: deque[asyncio.Future[Answer]] = deque()
        self._refusal: HoldfastError | None = None

    async def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Take *op*."""
        try:
            future = self._remote.courier.carry(op, durability or self._durability)
        except HoldfastError as error:
            # In its place, so that what was called before is the first refusal when it is refused as well.
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        self._under_way.append(future)
        if len(self._under_way) > PIPELINE_MAX:
            await self._settle(self._under_way.popleft())
        return Answer(status=200, seq=0)

    async def finish(self) -> None:
        """Wait for the rest; raises the first refusal."""
        while self._under_way:
            await self._settle(self._under_way.popleft())
        if self._refusal is not None:
            raise self._refusal

    async def _settle(self, future: asyncio.Future[Answer]) -> None:
        try:
            await future
        except HoldfastError as error:
            self._refusal = self._refusal or error


class AsyncRemote(AsyncHoldfast):
    """A daemon, over one connection for changes, one for questions, and one for each call that may take long."""

    def __init__(self, address: Address, token: str | None, timeout_s: float) -> None:
        super().__init__(_Answers(self))
        self.requests = Requests(address.host_header, token)
        self.timeout_s = timeout_s
        self._dialler = Dialler(address, timeout_s)
        self._asking = Exchange(self._dialler)
        self.courier = Courier(self, self._dialler)
        self._idle: list[_Own] = []
        self._busy: set[_Own] = set()
        self._streams: weakref.WeakSet[AsyncRemoteEvents] = weakref.WeakSet()

    def __str__(self) -> str:
        return str(self._dialler.address)

    async def aclose(self) -> None:
        """Close the connections, and end the event streams; calls under way get Unavailable."""
        self._dialler.is_closed = True
        await self.courier.stop()
        for exchange in (self._asking, *(own.exchange for own in (*self._idle, *self._busy))):
            exchange.close()
        for events in list(self._streams):
            events.close()

    async def ask(self, method: str, target: str) -> Response:
        """The response to a question."""
        return await self._asking.response_to(self.requests.render(method, target), self.timeout_s)

    async def flush(self) -> FlushReport:
        """Have the daemon write what changed to its snapshot files, and wait until it has."""
        response = await self._alone(
            lambda own: self.requests.render("POST", "/v1/admin/flush", b""), self.timeout_s + FLUSH_TIMEOUT_S
        )
        return messages.report_in(response)

    async def backup(self) -> BackupReport:
        """Have the daemon make a backup of everything and prove it, and wait until it has."""
        response = await self._alone(
            lambda own: self.requests.render("POST", "/v1/admin/backup", b""), self.timeout_s + BACKUP_TIMEOUT_S
        )
        return messages.backup_in(response)

    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> AsyncEvents:
        """As ``AsyncHoldfast.events``; begins with the first turn of the loop, and goes on when the daemon restarts."""
        self._dialler.check_open()
        events = AsyncRemoteEvents(self._dialler, self.requests, after, ops, ids)
        self._streams.add(events)
        return events

    def _perform(self, op: AnyOp, durability: Durability | None) -> Coroutine[Any, Any, Answer]:
        return self._carried(op, durability)

    async def _carried(self, op: AnyOp, durability: Durability | None) -> Answer:
        self._dialler.check_open()
        return await self.courier.carry(op, durability)

    async def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        body = messages.batch_body([messages.encode_op(op) for op in ops], atomic=True)
        target = messages.batch_target(durability)
        messages.outcomes(await self._alone(partial(self._numbered, target, body), self.timeout_s), len(ops))

    def _pipeline(self, durability: Durability | None) -> AsyncBlock:
        return _Pipeline(self, durability)

    async def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        ends_at = time.monotonic() + wait_s
        target = messages.lease_target(op.id, durability)
        while True:
            ask_s = min(max(ends_at - time.monotonic(), 0.0), LEASE_WAIT_MAX_S)
            body = messages.lease_body(op, ask_s)
            try:
                return messages.answer_in(
                    await self._alone(partial(self._numbered, target, body), self.timeout_s + ask_s)
                )
            except Leased:
                if time.monotonic() >= ends_at:
                    raise

    async def _alone(self, render: Callable[[_Own], bytes], timeout_s: float) -> Response:
        """The response to a request on a connection of its own, so that it holds up nobody."""
        self._dialler.check_open()
        own = self._idle.pop() if self._idle else _Own(Exchange(self._dialler))
        self._busy.add(own)
        try:
            response = await own.exchange.response_to(render(own), timeout_s)
        except BaseException:
            # Cancelled, perhaps: closing tells the daemon that nobody waits any more.
            own.exchange.close()
            raise
        finally:
            self._busy.discard(own)
        if self._dialler.is_closed:
            own.exchange.close()
        else:
            self._idle.append(own)
        return response

    def _numbered(self, target: str, body: bytes, own: _Own) -> bytes:
        return own.numbered(self.requests, target, body)


class _Own:
    """A connection for one request at a time, with the name under which its requests may be sent again."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._client = messages.new_client_id()
        self._number = 0

    def numbered(self, requests: Requests, target: str, body: bytes) -> bytes:
        """The request as the next one of this connection."""
        self._number += 1
        return requests.render("POST", target, body, messages.retry_line(Retry(self._client, self._number)))


class AsyncRemoteEvents:
    """The events of a daemon; goes on by itself, without loss or repetition, when the daemon restarts."""

    def __init__(
        self, dialler: Dialler, requests: Requests, after: int | None, ops: Collection[str], ids: Collection[str]
    ) -> None:
        self._dialler = dialler
        self._requests = requests
        self._ops = named(ops, "ops")
        self._ids = named(ids, "ids")
        self._blocks = Blocks(after)
        self._receiver = Receiver()
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._is_closed = False
        self._pauses = Pauses(dialler.backoff)
        self._reason: Exception | str = "the stream was ended"

    @property
    def position(self) -> int:
        """Everything up to this seq was handed out: where another stream would go on."""
        return self._blocks.position or 0

    def close(self) -> None:
        """End the iteration."""
        self._is_closed = True
        self._drop()

    def __aiter__(self) -> AsyncRemoteEvents:
        return self

    async def __anext__(self) -> Event:
        while not self._is_closed:
            event = self._blocks.next()
            if event is not None:
                return event
            if self._reader is None:
                await asyncio.sleep(self._pauses.before_next(self._reason))
                await self._open()
            elif not await self._receive():
                self._drop()
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncRemoteEvents:
        await self._open()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    async def _receive(self) -> bool:
        """Take what comes next; False when this connection brings nothing more."""
        assert self._reader is not None
        try:
            async with asyncio.timeout(SILENCE_MAX_S):
                self._receiver.feed(await self._reader.read(RECEIVE_BYTES))
            self._blocks.feed(self._receiver.take_body())
        except (OSError, WireError) as error:
            self._reason = error
            return False
        self._pauses.note_progress()
        return self._receiver.has_head and not self._receiver.is_whole

    async def _open(self) -> None:
        backoff = self._dialler.backoff()
        while not self._is_closed:
            try:
                async with asyncio.timeout(backoff.left_s):
                    refused = await self._begin()
                if refused is None:
                    self._dialler.has_reached = True
                    self._pauses.note_opening()
                    return
                if not messages.is_temporary(refused):
                    raise messages.refusal_in(refused)
                reason: Exception = messages.refusal_in(refused)
            except PermissionError as error:
                raise Unavailable(f"{self._dialler.address}: {described(error)}") from None
            except (OSError, WireError) as error:
                reason = error
            except BaseException:
                # Cancelled, perhaps: what was begun only half must not be taken for a stream.
                self._drop()
                raise
            self._drop()
            await asyncio.sleep(backoff.next_pause_s(reason))

    async def _begin(self) -> Response | None:
        """Open a connection and read the head of its answer; the whole answer when it is a refusal."""
        address = self._dialler.address
        if address.path:
            self._reader, self._writer = await asyncio.open_unix_connection(address.path)
        else:
            self._reader, self._writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls())
        self._writer.write(stream_request(self._requests, self._blocks.position, self._ops, self._ids))
        receiver = self._receiver = Receiver()
        while not receiver.has_head:
            receiver.feed(await self._reader.read(RECEIVE_BYTES))
        if receiver.status != 200:
            while not receiver.is_whole:
                receiver.feed(await self._reader.read(RECEIVE_BYTES))
            return receiver.next()
        self._blocks.begin_again()
        self._blocks.feed(receiver.take_body())
        self._blocks.settle()
        while self._blocks.position is None:
            # The first block says where "now" is; without it a broken connection would lose what came meanwhile.
            receiver.feed(await self._reader.read(RECEIVE_BYTES))
            self._blocks.feed(receiver.take_body())
            self._blocks.settle()
        return None

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
