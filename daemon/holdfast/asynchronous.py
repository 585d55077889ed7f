"""The library for tasks: what ``holdfast.aio.open`` and ``holdfast.aio.connect`` have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import orjson

from holdfast.api import (
    LIST_PAGE,
    UPDATE_ATTEMPTS,
    ConversationOps,
    EscalationOps,
    Id,
    Messages,
    OrderOps,
    RecordOps,
    SessionOps,
    StatsOps,
    Value,
    When,
    changed,
    counted,
    detached,
    lease_op,
    ms_of,
    span_s,
    text_of,
    waited,
)
from holdfast.blocking import sales_figures
from holdfast.errors import BadRequest, HoldfastError, VersionMismatch
from holdfast.events import Event
from holdfast.held import AsyncLease, AsyncLeaseRequest
from holdfast.ops import (
    Answer,
    AnyOp,
    BackupReport,
    Durability,
    FlushReport,
    Page,
    Record,
    Seconds,
    SessionLease,
    Window,
)


class AsyncTranscripts(Protocol):
    """Where what is said in conversations comes from: as ``blocking.Transcripts``, with await."""

    async def conversation(self, id: str) -> Record | None: ...

    async def page(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        user_id: str | None = None,
        session_id: str | None = None,
        escalated: bool | None = None,
        archived: bool | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        active_within_s: float | None = None,
        older_than_s: float | None = None,
    ) -> Page: ...

    async def messages(
        self,
        id: str,
        *,
        limit: int = 100,
        before: str | int | None = None,
        after: int | None = None,
        role: str | None = None,
        author: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> Page: ...

    async def window(self, id: str, *, messages: int | None = None, tokens: int | None = None) -> Window: ...

    async def escalations(
        self, *, limit: int = 100, cursor: str | None = None, status: str | None = None, priority: str | None = None
    ) -> Page: ...

    async def storage(self) -> dict[str, Any]: ...


class AsyncSource(Protocol):
    """Where answers come from: as ``blocking.Source``, with await."""

    @property
    def transcripts(self) -> AsyncTranscripts: ...

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


class Conversations(ConversationOps[Awaitable[Answer]]):
    """The conversations: each has a head, which is always at hand, and messages, which are read as they are asked for."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    async def get(self, id: Id, default: Any = None) -> Any:
        """The conversation *id* whole as a dict, its ``messages`` in order among its fields, or *default*."""
        found = await self._source.transcripts.conversation(text_of(id))
        return default if found is None else orjson.loads(found.value)

    async def head(self, id: Id, default: Any = None) -> Any:
        """What is known of the conversation *id* beside its messages (title, counts, times …) as a dict, or *default*."""
        found = await self.record(id)
        return default if found is None else orjson.loads(found.value)

    async def record(self, id: Id) -> Record | None:
        """The head as JSON bytes, with its version; nothing is decoded."""
        return await self._source.get("conversations", text_of(id))

    async def page(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        escalated: bool | None = None,
        archived: bool | None = None,
        since_ms: When | None = None,
        until_ms: When | None = None,
        active_within: Seconds | None = None,
        older_than: Seconds | None = None,
    ) -> Page:
        """Some heads from *cursor* on, the conversation with the newest message first; filters as for ``list``."""
        return await self._source.transcripts.page(
            limit=limit,
            cursor=cursor,
            user_id=None if user_id is None else text_of(user_id),
            session_id=None if session_id is None else text_of(session_id),
            escalated=escalated,
            archived=archived,
            since_ms=ms_of(since_ms),
            until_ms=ms_of(until_ms),
            active_within_s=span_s(active_within, "active_within"),
            older_than_s=span_s(older_than, "older_than"),
        )

    async def list(
        self,
        *,
        user_id: Id | None = None,
        session_id: Id | None = None,
        escalated: bool | None = None,
        archived: bool | None = None,
        since_ms: When | None = None,
        until_ms: When | None = None,
        active_within: Seconds | None = None,
        older_than: Seconds | None = None,
    ) -> AsyncIterator[Record]:
        """The heads, the conversation with the newest message first; filters as for ``blocking.Conversations.list``."""
        cursor: str | None = None
        while True:
            page = await self.page(
                limit=LIST_PAGE,
                cursor=cursor,
                user_id=user_id,
                session_id=session_id,
                escalated=escalated,
                archived=archived,
                since_ms=since_ms,
                until_ms=until_ms,
                active_within=active_within,
                older_than=older_than,
            )
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next

    async def messages(
        self,
        id: Id,
        *,
        role: str | None = None,
        author: str | None = None,
        since_ms: When | None = None,
        until_ms: When | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """All messages of the conversation *id* as dicts, oldest first; as ``blocking.Conversations.messages``."""
        after = 0
        while True:
            page = await self.message_page(
                id, limit=LIST_PAGE, after=after, role=role, author=author, since_ms=since_ms, until_ms=until_ms
            )
            for item in page.items:
                yield orjson.loads(item.value)
            if page.next is None:
                return
            after = int(page.next)

    async def message_page(
        self,
        id: Id,
        *,
        limit: int = 100,
        before: str | int | None = None,
        after: int | None = None,
        role: str | None = None,
        author: str | None = None,
        since_ms: When | None = None,
        until_ms: When | None = None,
    ) -> Page:
        """Some messages, in order; as ``blocking.Conversations.message_page``."""
        return await self._source.transcripts.messages(
            text_of(id),
            limit=limit,
            before=before,
            after=after,
            role=role,
            author=author,
            since_ms=ms_of(since_ms),
            until_ms=ms_of(until_ms),
        )

    async def newest(self, id: Id, n: int = 20) -> Messages:
        """The newest *n* messages of the conversation *id* as dicts, oldest first."""
        found: deque[dict[str, Any]] = deque()
        before: str | None = None
        while True:
            page = await self.message_page(id, limit=min(n - len(found), LIST_PAGE), before=before)
            found.extendleft(orjson.loads(item.value) for item in reversed(page.items))
            if page.next is None or len(found) >= n:
                return [*found]
            before = page.next

    async def window(self, id: Id, *, messages: int | None = None, tokens: int | None = None) -> Messages:
        """The newest messages that fit, as dicts, oldest first; as ``blocking.Conversations.window``."""
        found = await self._source.transcripts.window(text_of(id), messages=messages, tokens=tokens)
        return [orjson.loads(item.value) for item in found.items]

    async def count(self) -> int:
        """How many conversations, archived ones as well."""
        return await self._source.count("conversations")

    async def contains(self, id: Id) -> bool:
        """Whether there is a conversation *id*."""
        return await self.record(id) is not None


class Escalations(EscalationOps[Awaitable[Answer]]):
    """Customers who wait for a human; an escalation has the id of its conversation."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    async def get(self, id: Id, default: Any = None) -> Any:
        """The escalation of the conversation *id* as a dict, or *default*."""
        found = await self.record(id)
        return default if found is None else orjson.loads(found.value)

    async def record(self, id: Id) -> Record | None:
        """It as JSON bytes, with its version; nothing is decoded."""
        return await self._source.get("escalations", text_of(id))

    async def page(
        self, *, limit: int = 100, cursor: str | None = None, status: str | None = None, priority: str | None = None
    ) -> Page:
        """Some from *cursor* on, in the order of ``list``."""
        return await self._source.transcripts.escalations(limit=limit, cursor=cursor, status=status, priority=priority)

    async def list(self, *, status: str | None = None, priority: str | None = None) -> AsyncIterator[Record]:
        """All of them, or those of one *status* (pending, …) or *priority* (low, high): high first, then who waits longest."""
        cursor: str | None = None
        while True:
            page = await self.page(limit=LIST_PAGE, cursor=cursor, status=status, priority=priority)
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next

    async def count(self) -> int:
        """How many escalations, of any status."""
        return await self._source.count("escalations")

    async def contains(self, id: Id) -> bool:
        """Whether the conversation *id* has one."""
        return await self.record(id) is not None


class Stats(StatsOps[Awaitable[Answer]]):
    """The sales figures, and how much there is."""

    def __init__(self, holdfast: AsyncHoldfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    async def sales(self) -> dict[str, Any]:
        """As in ``sales_stats.json``, with amounts that are not whole as Decimal."""
        return sales_figures(await self._source.sales())

    async def storage(self) -> dict[str, Any]:
        """As ``blocking.Stats.storage``."""
        return await self._source.transcripts.storage()


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
        conversations, escalations: what is said, and who waits for a human.
        stats: the sales figures, and how much there is.
    """

    def __init__(self, source: AsyncSource) -> None:
        self._source = source
        self.sessions = Sessions(self)
        self.orders = Orders(self)
        self.users = Records(self, "users")
        self.conversations = Conversations(self)
        self.escalations = Escalations(self)
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
    async def backup(self) -> BackupReport:
        """Make a backup of everything, and load everything from it to prove it; errors as ``Engine.backup``."""

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
