"""The library for tasks: what ``holdfast.aio.open`` and ``holdfast.aio.connect`` have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import orjson

from holdfast.api import (
    LIST_PAGE,
    UPDATE_ATTEMPTS,
    Id,
    OrderOps,
    RecordOps,
    SessionOps,
    StatsOps,
    Value,
    changed,
    counted,
    detached,
    lease_op,
    text_of,
    waited,
)
from holdfast.blocking import sales_figures
from holdfast.errors import BadRequest, HoldfastError, VersionMismatch
from holdfast.events import Event
from holdfast.held import AsyncLease, AsyncLeaseRequest
from holdfast.ops import Answer, AnyOp, Durability, FlushReport, Page, Record, Seconds, SessionLease


class AsyncSource(Protocol):
    """Where answers come from: as ``blocking.Source``, with await."""

    async def get(self, collection: str, id: str) -> Record | None: ...

    async def page(
        self,
        collection: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        since_ms: int | None = None,
        state: str | None = None,
    ) -> Page: ...

    async def count(self, collection: str) -> int: ...

    async def sales(self) -> bytes: ...

    async def status(self) -> dict[str, Any]: ...


class AsyncEvents(Protocol):
    """A stream of durable events; ends when it is closed.

    Attributes:
        position: the seq after which a resume misses nothing.
    """

    @property
    def position(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def __aenter__(self) -> AsyncEvents: ...

    async def __aexit__(self, *error: object) -> None: ...

    def close(self) -> None:
        """End the iteration."""


class Reading:
    """Asking a collection; answers show the last durable state."""

    def __init__(self, holdfast: AsyncHoldfast, name: str, put: Callable[..., Awaitable[Answer]]) -> None:
        self.name = name
        self._source = holdfast._source
        self._put = put

    async def get(self, id: Id, default: Any = None) -> Any:
        """The value of *id* as a dict, or *default*."""
        found = await self._source.get(self.name, text_of(id))
        return default if found is None else orjson.loads(found.value)

    async def record(self, id: Id) -> Record | None:
        """The value of *id* as JSON bytes, with its version; nothing is decoded."""
        return await self._source.get(self.name, text_of(id))

    async def page(
        self, *, limit: int = 100, cursor: str | None = None, since_ms: int | None = None, state: str | None = None
    ) -> Page:
        """Some records from *cursor* on; as ``Engine.page``."""
        return await self._source.page(self.name, limit=limit, cursor=cursor, since_ms=since_ms, state=state)

    async def list(self, *, since_ms: int | None = None, state: str | None = None) -> AsyncIterator[Record]:
        """All records, a page at a time; the loop runs on between pages."""
        cursor: str | None = None
        while True:
            page = await self.page(limit=LIST_PAGE, cursor=cursor, since_ms=since_ms, state=state)
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next
            await asyncio.sleep(0)

    async def count(self) -> int:
        """How many records, as ``list`` lists them."""
        return sum([await self._source.count(name) for name in counted(self.name)])

    async def contains(self, id: Id) -> bool:
        """Whether there is a record *id*."""
        return await self._source.get(self.name, text_of(id)) is not None

    async def update(
        self,
        id: Id,
        change: Callable[[dict[str, Any]], Value | None],
        *,
        default: Value | None = None,
        **options: Any,
    ) -> Answer:
        """Read, let *change* work on it, and put it under the version that was read; as ``blocking.Reading.update``."""
        for attempt in range(1, UPDATE_ATTEMPTS + 1):
            value, version = changed(await self.record(id), change, default, f"{self.name} {str(id)!r:.80}")
            try:
                return await self._put(id, value, if_version=version, **options)
            except VersionMismatch:
                if attempt == UPDATE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")


class Sessions(SessionOps[Awaitable[Answer]], Reading):
    """The sessions."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        SessionOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast, "sessions", self.put)
        self._holdfast = holdfast

    def lease(
        self,
        id: Id,
        ttl: Seconds = 30,
        *,
        timeout: float | None = None,
        owner: str | None = None,
        generation: int | None = None,
        durability: Durability | None = None,
    ) -> AsyncLeaseRequest:
        """As ``blocking.Sessions.lease``; for ``async with``, or to be awaited."""

        async def take() -> AsyncLease:
            op, ttl_s = lease_op(id, ttl, owner, generation)
            answer = await self._holdfast._take_lease(op, waited(timeout), durability)
            return AsyncLease(self, op.id, ttl_s, answer)

        return AsyncLeaseRequest(take)


class Orders(OrderOps[Awaitable[Answer]], Reading):
    """Pending, completed and cancelled orders."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        OrderOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast, "orders", self.put)


class Records(RecordOps[Awaitable[Answer]], Reading):
    """Users, or a custom collection."""

    def __init__(self, holdfast: AsyncHoldfast, name: str) -> None:
        RecordOps.__init__(self, holdfast._do, name)
        Reading.__init__(self, holdfast, name, self.put)


class Stats(StatsOps[Awaitable[Answer]]):
    """The sales figures."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    async def sales(self) -> dict[str, Any]:
        """As in ``sales_stats.json``, with amounts that are not whole as Decimal."""
        return sales_figures(await self._source.sales())


class AsyncBlock(Protocol):
    """An atomic or pipeline block under way."""

    async def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Take *op*; the answer has seq 0 where it is not known yet."""

    async def finish(self) -> None:
        """Return when all of it is acknowledged; raises when something was refused."""


class AsyncAtomicBlock:
    """Gathers ops, and does them at its end."""

    def __init__(self, perform: Callable[[list[AnyOp]], Awaitable[None]]) -> None:
        self._perform = perform
        self._ops: list[AnyOp] = []

    async def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Gather *op*; its durability is the block's."""
        self._ops.append(detached(op))
        return Answer(status=200, seq=0)

    async def finish(self) -> None:
        """Do them all or none."""
        if self._ops:
            await self._perform(self._ops)


class _Present(NamedTuple):
    """The block of one task of one library. A task started inside inherits the context, but is not part of the block,
    which may be over long before it."""

    owner: AsyncHoldfast
    task: asyncio.Task[Any] | None
    block: AsyncBlock


_present: ContextVar[_Present | None] = ContextVar("holdfast_block", default=None)


class AsyncHoldfast(ABC):
    """What keeps a chatbot's state, in this process or in a daemon, for the tasks of one event loop.

    Attributes:
        sessions, orders, users: the built-in collections.
        stats: the sales figures.
    """

    def __init__(self, source: AsyncSource) -> None:
        self._source = source
        self.sessions = Sessions(self)
        self.orders = Orders(self)
        self.users = Records(self, "users")
        self.stats = Stats(self)

    def collection(self, name: str) -> Records:
        """The custom collection *name*; it comes into being with its first record."""
        return Records(self, name)

    @asynccontextmanager
    async def atomic(self, *, durability: Durability | None = None) -> AsyncIterator[None]:
        """As ``blocking.Holdfast.atomic``, for the ops of this task; those of tasks it starts are on their own."""
        block = AsyncAtomicBlock(lambda ops: self._perform_together(ops, durability))
        token = self._enter(block)
        try:
            yield
        finally:
            _present.reset(token)
        await block.finish()

    @asynccontextmanager
    async def pipeline(self, *, durability: Durability | None = None) -> AsyncIterator[None]:
        """As ``blocking.Holdfast.pipeline``, for the ops of this task; those of tasks it starts are on their own."""
        block = self._pipeline(durability)
        token = self._enter(block)
        try:
            yield
        except BaseException:
            with suppress(HoldfastError):
                await block.finish()
            raise
        finally:
            _present.reset(token)
        await block.finish()

    async def status(self) -> dict[str, Any]:
        """Counts, seqs, sizes and the last flush, for people and monitors."""
        return await self._source.status()

    @abstractmethod
    async def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""

    @abstractmethod
    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> AsyncEvents:
        """As ``blocking.Holdfast.events``, for ``async for``."""

    @abstractmethod
    def _perform(self, op: AnyOp, durability: Durability | None) -> Coroutine[Any, Any, Answer]:
        """Do one op, durably."""

    @abstractmethod
    async def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        """Do all of *ops* or none."""

    @abstractmethod
    def _pipeline(self, durability: Durability | None) -> AsyncBlock:
        """A block whose ops are waited for together."""

    @abstractmethod
    async def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        """Take or renew a lease, waiting for it so long at most."""

    def _do(self, op: AnyOp, durability: Durability | None) -> Coroutine[Any, Any, Answer]:
        if _present.get() is None:
            return self._perform(op, durability)
        return self._do_inside(op, durability)

    async def _do_inside(self, op: AnyOp, durability: Durability | None) -> Answer:
        block = self._present_block()
        return await (self._perform(op, durability) if block is None else block.add(op, durability))

    def _present_block(self) -> AsyncBlock | None:
        present = _present.get()
        if present is None or present.owner is not self or present.task is not asyncio.current_task():
            return None
        return present.block

    def _enter(self, block: AsyncBlock) -> Any:
        if self._present_block() is not None:
            raise BadRequest("atomic and pipeline blocks cannot be nested; end the outer one first")
        return _present.set(_Present(self, asyncio.current_task(), block))
