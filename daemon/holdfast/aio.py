"""Holdfast in this process, with await: ``holdfast.aio.open``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import orjson

from holdfast.api import Id, OrderOps, RecordOps, SessionOps, StatsOps
from holdfast.embedded import LIST_PAGE, Keeper, count_of, note_ticket, sales_of, settings_from
from holdfast.engine import Engine, Ticket
from holdfast.errors import BadRequest, HoldfastError
from holdfast.flush import FlushReport
from holdfast.ops import Answer, AnyOp, Batch, Durability
from holdfast.pages import Page, Record
from holdfast.recovery import open_engine


@asynccontextmanager
async def open(data_dir: str | os.PathLike[str] = "data", **settings: Any) -> AsyncIterator[AsyncHoldfast]:
    """Open *data_dir* in this process for the length of an async with-block; as ``holdfast.open`` otherwise.

    Example::

        async with holdfast.aio.open("data") as hf:
            await hf.sessions.put("573001234567", {"currentState": "catalog"})
    """
    cancelled = threading.Event()
    chosen = settings_from(data_dir, settings)
    opening = asyncio.create_task(asyncio.to_thread(open_engine, chosen, cancelled=cancelled))
    try:
        engine = await asyncio.shield(opening)
    except asyncio.CancelledError:
        # The thread goes on for a moment, and the directory must not stay locked behind it.
        cancelled.set()
        with suppress(HoldfastError, OSError):
            await asyncio.to_thread((await opening).close, flush=False)
        raise
    keeper = Keeper(engine)
    try:
        yield AsyncHoldfast(engine)
    finally:
        await asyncio.shield(asyncio.to_thread(_close, keeper, engine))


def _close(keeper: Keeper, engine: Engine) -> None:
    keeper.stop()
    engine.close()


class Reading:
    """Asking a collection; answers come from memory, in their last durable state."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name

    async def get(self, id: Id, default: Any = None) -> Any:
        """The value of *id* as a dict, or *default*."""
        found = self._engine.get(self.name, str(id))
        return default if found is None else orjson.loads(found.value)

    async def record(self, id: Id) -> Record | None:
        """The value of *id* as JSON bytes, with its version; nothing is decoded."""
        return self._engine.get(self.name, str(id))

    async def page(
        self, *, limit: int = 100, cursor: str | None = None, since_ms: int | None = None, state: str | None = None
    ) -> Page:
        """Some records from *cursor* on; as ``Engine.page``."""
        return self._engine.page(self.name, limit=limit, cursor=cursor, since_ms=since_ms, state=state)

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

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self._engine.get(self.name, str(id)) is not None

    def __len__(self) -> int:
        return count_of(self._engine, self.name)


class Sessions(SessionOps[Awaitable[Answer]], Reading):
    """The sessions."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        SessionOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast.engine, "sessions")


class Orders(OrderOps[Awaitable[Answer]], Reading):
    """Pending, completed and cancelled orders."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        OrderOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast.engine, "orders")


class Records(RecordOps[Awaitable[Answer]], Reading):
    """Users, or a custom collection."""

    def __init__(self, holdfast: AsyncHoldfast, name: str) -> None:
        RecordOps.__init__(self, holdfast._do, name)
        Reading.__init__(self, holdfast.engine, name)


class Stats(StatsOps[Awaitable[Answer]]):
    """The sales figures."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        super().__init__(holdfast._do)
        self._engine = holdfast.engine

    async def sales(self) -> dict[str, Any]:
        """As in ``sales_stats.json``, with amounts that are not whole as Decimal."""
        return sales_of(self._engine)


class _Block(NamedTuple):
    """An atomic or pipeline block.

    Attributes:
        owner, task: whose it is. A task started inside inherits the context, but is not part of the block, which may
            be over long before it.
        ops: gathered by an atomic block; None in a pipeline.
        tickets: of a pipeline, one for each batch that its ops are written in.
        durability: of a pipeline's ops.
    """

    owner: AsyncHoldfast
    task: asyncio.Task[Any] | None
    ops: list[AnyOp] | None
    tickets: list[Ticket]
    durability: Durability | None


_block: ContextVar[_Block | None] = ContextVar("holdfast_block", default=None)


class AsyncHoldfast:
    """An open data directory for tasks; as ``Holdfast`` otherwise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sessions = Sessions(self)
        self.orders = Orders(self)
        self.users = Records(self, "users")
        self.stats = Stats(self)

    def collection(self, name: str) -> Records:
        """The custom collection *name*; it comes into being with its first record."""
        return Records(self, name)

    @asynccontextmanager
    async def atomic(self, *, durability: Durability | None = None) -> AsyncIterator[None]:
        """As ``Holdfast.atomic``, for the ops of this task; those of tasks it starts are on their own."""
        ops: list[AnyOp] = []
        token = self._enter(ops, [], durability)
        try:
            yield
        finally:
            _block.reset(token)
        if ops:
            await self.engine.submit_batch(Batch(ops=ops, atomic=True), durability=durability).committed()

    @asynccontextmanager
    async def pipeline(self, *, durability: Durability | None = None) -> AsyncIterator[None]:
        """As ``Holdfast.pipeline``, for the ops of this task; those of tasks it starts are on their own."""
        tickets: list[Ticket] = []
        token = self._enter(None, tickets, durability)
        try:
            yield
        finally:
            _block.reset(token)
            for ticket in tickets:
                await ticket.committed()

    async def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""
        return await asyncio.to_thread(self.engine.flush, "api")

    def _do(self, op: AnyOp, durability: Durability | None) -> Coroutine[Any, Any, Answer]:
        return self._submit(op, durability)

    async def _submit(self, op: AnyOp, durability: Durability | None) -> Answer:
        block = self._present_block()
        if block is None:
            ticket = self.engine.submit(op, durability=durability)
            await ticket.committed()
            return ticket.answer
        if block.ops is not None:
            block.ops.append(op)
            return Answer(status=200, seq=0)
        ticket = self.engine.submit(op, durability=durability or block.durability)
        if not ticket.outcomes:
            await ticket.committed()  # raises the refusal
        note_ticket(block.tickets, ticket)
        return ticket.answer

    def _present_block(self) -> _Block | None:
        block = _block.get()
        if block is None or block.owner is not self or block.task is not asyncio.current_task():
            return None
        return block

    def _enter(self, ops: list[AnyOp] | None, tickets: list[Ticket], durability: Durability | None) -> _Token:
        if self._present_block() is not None:
            raise BadRequest("atomic and pipeline blocks cannot be nested; end the outer one first")
        return _block.set(_Block(self, asyncio.current_task(), ops, tickets, durability))


_Token = Token[_Block | None]
