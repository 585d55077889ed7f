"""Holdfast in this process, with await: ``holdfast.aio.open``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from holdfast import asynchronous
from holdfast.api import counted
from holdfast.asynchronous import AsyncBlock, AsyncEvents, AsyncHoldfast
from holdfast.embedded import Keeper, note_ticket, settings_from
from holdfast.engine import Engine, Ticket
from holdfast.errors import HoldfastError
from holdfast.leases import take_lease_async
from holdfast.ops import Answer, AnyOp, BackupReport, Batch, Durability, FlushReport, Page, Record, SessionLease, Window
from holdfast.recovery import open_engine


@asynccontextmanager
async def open_async(data_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> AsyncIterator[AsyncEmbedded]:
    """As ``holdfast.aio.open``."""
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
        yield AsyncEmbedded(engine)
    finally:
        await asyncio.shield(asyncio.to_thread(_close, keeper, engine))


def _close(keeper: Keeper, engine: Engine) -> None:
    keeper.stop()
    engine.close()


class _Transcripts:
    """The engine's answers about conversations, which are read from the disk, in threads."""

    def __init__(self, engine: Engine) -> None:
        self._ask = engine.ask
        self._transcripts = engine.transcripts

    async def conversation(self, id: str) -> Record | None:
        return await self._ask(partial(self._transcripts.conversation, id))

    async def page(self, **wanted: Any) -> Page:
        return await self._ask(partial(self._transcripts.page, **wanted))

    async def messages(self, id: str, **wanted: Any) -> Page:
        return await self._ask(partial(self._transcripts.messages, id, **wanted))

    async def window(self, id: str, *, messages: int | None = None, tokens: int | None = None) -> Window:
        return await self._ask(partial(self._transcripts.window, id, messages=messages, tokens=tokens))

    async def escalations(self, **wanted: Any) -> Page:
        return await self._ask(partial(self._transcripts.escalations, **wanted))

    async def storage(self) -> dict[str, Any]:
        return await self._ask(self._transcripts.storage)


class _Memory:
    """The engine's answers, for callers that await them; all but those about conversations come without waiting."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.transcripts = _Transcripts(engine)

    async def get(self, collection: str, id: str) -> Record | None:
        return self._engine.get(collection, id)

    async def page(self, collection: str, **wanted: Any) -> Page:
        return self._engine.page(collection, **wanted)

    async def count(self, collection: str) -> int:
        return self._engine.count(collection)

    async def sales(self) -> bytes:
        return self._engine.sales()

    async def status(self) -> dict[str, Any]:
        return self._engine.status()


class _Pipeline:
    """Decides each op at once, and waits for all at its end."""

    def __init__(self, engine: Engine, durability: Durability | None) -> None:
        self._engine = engine
        self._durability = durability
        self._tickets: list[Ticket] = []
        self._refusal: HoldfastError | None = None

    async def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Decide *op*."""
        try:
            ticket = await self._engine.submit_async(op, durability=durability or self._durability)
            if not ticket.outcomes:
                await ticket.committed()  # raises the refusal
        except HoldfastError as error:
            self._refusal = self._refusal or error
            return Answer(status=error.status, seq=0)
        note_ticket(self._tickets, ticket)
        return ticket.answer

    async def finish(self) -> None:
        """Wait for all; raises the first refusal."""
        for ticket in self._tickets:
            await ticket.committed()
        if self._refusal is not None:
            raise self._refusal


class _InMemory:
    """Adds what needs no await here: ``in`` and ``len``."""

    name: str
    engine: Engine

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self.engine.get(self.name, str(id)) is not None

    def __len__(self) -> int:
        return sum(map(self.engine.count, counted(self.name)))


class _Sessions(_InMemory, asynchronous.Sessions):
    def __init__(self, holdfast: AsyncEmbedded) -> None:
        asynchronous.Sessions.__init__(self, holdfast)
        self.engine = holdfast.engine


class _Orders(_InMemory, asynchronous.Orders):
    def __init__(self, holdfast: AsyncEmbedded) -> None:
        asynchronous.Orders.__init__(self, holdfast)
        self.engine = holdfast.engine


class _Records(_InMemory, asynchronous.Records):
    def __init__(self, holdfast: AsyncEmbedded, name: str) -> None:
        asynchronous.Records.__init__(self, holdfast, name)
        self.engine = holdfast.engine


class _Conversations(_InMemory, asynchronous.Conversations):
    name = "conversations"

    def __init__(self, holdfast: AsyncEmbedded) -> None:
        asynchronous.Conversations.__init__(self, holdfast)
        self.engine = holdfast.engine


class _Escalations(_InMemory, asynchronous.Escalations):
    name = "escalations"

    def __init__(self, holdfast: AsyncEmbedded) -> None:
        asynchronous.Escalations.__init__(self, holdfast)
        self.engine = holdfast.engine


class AsyncEmbedded(AsyncHoldfast):
    """An open data directory.

    Attributes:
        engine: what is beneath, for those who need more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        super().__init__(_Memory(engine))
        self.sessions = _Sessions(self)
        self.orders = _Orders(self)
        self.users = _Records(self, "users")
        self.conversations = _Conversations(self)
        self.escalations = _Escalations(self)

    def collection(self, name: str) -> asynchronous.Records:
        """The custom collection *name*; it comes into being with its first record."""
        return _Records(self, name)

    async def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""
        return await asyncio.to_thread(self.engine.flush, "api")

    async def backup(self) -> BackupReport:
        """As ``AsyncHoldfast.backup``."""
        return await asyncio.to_thread(self.engine.backup, "api")

    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> AsyncEvents:
        """As ``AsyncHoldfast.events``; a reader that comes to lag behind what the journal keeps ends with Gone."""
        return self.engine.events(after, ops, ids)

    def _perform(self, op: AnyOp, durability: Durability | None) -> Coroutine[Any, Any, Answer]:
        return self._submit(op, durability)

    async def _submit(self, op: AnyOp, durability: Durability | None) -> Answer:
        ticket = await self.engine.submit_async(op, durability=durability)
        await ticket.committed()
        return ticket.answer

    async def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        ticket = await self.engine.submit_batch_async(Batch(ops=ops, atomic=True), durability=durability)
        await ticket.committed()

    def _pipeline(self, durability: Durability | None) -> AsyncBlock:
        return _Pipeline(self.engine, durability)

    async def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        return await take_lease_async(self.engine, op, wait_s, durability=durability)
