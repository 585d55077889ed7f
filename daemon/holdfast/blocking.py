"""The library for programs that wait: what ``holdfast.open`` and ``holdfast.connect`` have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from types import TracebackType
from typing import Any, Protocol

import msgspec
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
from holdfast.errors import BadRequest, HoldfastError, VersionMismatch
from holdfast.events import Event
from holdfast.held import Lease, Renewals
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


class Transcripts(Protocol):
    """Where what is said in conversations comes from; as ``holdfast.transcripts.Transcripts``."""

    def conversation(self, id: str) -> Record | None:
        """A conversation whole, with its ``messages``."""

    def page(
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
    ) -> Page:
        """Conversations without their messages, newest first."""

    def messages(
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
    ) -> Page:
        """Messages of a conversation, in order."""

    def window(self, id: str, *, messages: int | None = None, tokens: int | None = None) -> Window:
        """The newest messages that fit."""

    def escalations(
        self, *, limit: int = 100, cursor: str | None = None, status: str | None = None, priority: str | None = None
    ) -> Page:
        """Escalations, the most urgent first."""

    def storage(self) -> dict[str, Any]:
        """How much there is."""


class Source(Protocol):
    """Where answers come from: an engine, or a connection to one.

    Attributes:
        transcripts: those about conversations.
    """

    @property
    def transcripts(self) -> Transcripts: ...

    def get(self, collection: str, id: str) -> Record | None:
        """The record *id* in its last durable state."""

    def page(
        self,
        collection: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        since_ms: int | None = None,
        state: str | None = None,
    ) -> Page:
        """A part of a list; as ``Engine.page``."""

    def count(self, collection: str) -> int:
        """How many records; completed and cancelled orders are ``completed_orders``."""

    def sales(self) -> bytes:
        """The sales figures as JSON."""

    def status(self) -> dict[str, Any]:
        """Counts, seqs, sizes and the last flush."""


class Events(Protocol):
    """A stream of durable events; ends when it is closed.

    Attributes:
        position: the seq after which a resume misses nothing.
    """

    @property
    def position(self) -> int: ...

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def __enter__(self) -> Events: ...

    def __exit__(self, *error: object) -> None: ...

    def close(self) -> None:
        """End the iteration; from any thread."""


class Reading:
    """Asking a collection; answers show the last durable state."""

    def __init__(self, holdfast: Holdfast, name: str, put: Callable[..., Answer]) -> None:
        self.name = name
        self._source = holdfast._source
        self._put = put

    def get(self, id: Id, default: Any = None) -> Any:
        """The value of *id* as a dict, or *default*."""
        found = self._source.get(self.name, id if type(id) is str else text_of(id))
        return default if found is None else orjson.loads(found.value)

    def record(self, id: Id) -> Record | None:
        """The value of *id* as JSON bytes, with its version; nothing is decoded."""
        return self._source.get(self.name, id if type(id) is str else text_of(id))

    def page(
        self, *, limit: int = 100, cursor: str | None = None, since_ms: int | None = None, state: str | None = None
    ) -> Page:
        """Some records from *cursor* on; as ``Engine.page``."""
        return self._source.page(self.name, limit=limit, cursor=cursor, since_ms=since_ms, state=state)

    def list(self, *, since_ms: int | None = None, state: str | None = None) -> Iterator[Record]:
        """All records, a page at a time; what changes meanwhile may be seen or not."""
        cursor: str | None = None
        while True:
            page = self.page(limit=LIST_PAGE, cursor=cursor, since_ms=since_ms, state=state)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def count(self) -> int:
        """How many records, as ``list`` lists them."""
        return sum(map(self._source.count, counted(self.name)))

    def contains(self, id: Id) -> bool:
        """Whether there is a record *id*."""
        return self._source.get(self.name, text_of(id)) is not None

    def update(
        self,
        id: Id,
        change: Callable[[dict[str, Any]], Value | None],
        *,
        default: Value | None = None,
        **options: Any,
    ) -> Answer:
        """Read, let *change* work on it, and put it under the version that was read; again when another was faster.

        Not for atomic and pipeline blocks, whose puts are decided after they were called.

        Args:
            change: gets the value as a dict, and changes it or returns another one. Called once for each attempt.
            default: what it gets when there is no record yet.
            options: of ``put``, but ``if_version``.

        Raises:
            NotFound: no record, and no *default*.
            VersionMismatch: UPDATE_ATTEMPTS times another was faster.
        """
        for attempt in range(1, UPDATE_ATTEMPTS + 1):
            value, version = changed(self.record(id), change, default, f"{self.name} {str(id)!r:.80}")
            try:
                return self._put(id, value, if_version=version, **options)
            except VersionMismatch:
                if attempt == UPDATE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self.contains(id)

    def __len__(self) -> int:
        return self.count()


class Sessions(SessionOps[Answer], Reading):
    """The sessions."""

    def __init__(self, holdfast: Holdfast) -> None:
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
    ) -> Lease:
        """Take the lease of a session, in turn with all others who want it; use it in a with-block.

        Args:
            ttl: how long it holds when it is not renewed; a with-block renews it.
            timeout: wait for it so many seconds at most; None waits for ever, 0 not at all.
            owner: for people to read in the refusals of others.
            generation: renew this lease instead.

        Raises:
            Leased: another had it for the whole *timeout*.
            Conflict: the lease of *generation* is over.
        """
        op, ttl_s = lease_op(id, ttl, owner, generation)
        answer = self._holdfast._take_lease(op, waited(timeout), durability)
        return Lease(self, op.id, ttl_s, answer, self._holdfast._renewals)


class Orders(OrderOps[Answer], Reading):
    """Pending, completed and cancelled orders."""

    def __init__(self, holdfast: Holdfast) -> None:
        OrderOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast, "orders", self.put)


class Records(RecordOps[Answer], Reading):
    """Users, or a custom collection."""

    def __init__(self, holdfast: Holdfast, name: str) -> None:
        RecordOps.__init__(self, holdfast._do, name)
        Reading.__init__(self, holdfast, name, self.put)


class Conversations(ConversationOps[Answer]):
    """The conversations: each has a head, which is always at hand, and messages, which are read as they are asked for."""

    def __init__(self, holdfast: Holdfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    def get(self, id: Id, default: Any = None) -> Any:
        """The conversation *id* whole as a dict, its ``messages`` in order among its fields, or *default*.

        Raises:
            TooLarge: above 64 MiB; ``messages`` reads it piece by piece.
        """
        found = self._source.transcripts.conversation(text_of(id))
        return default if found is None else orjson.loads(found.value)

    def head(self, id: Id, default: Any = None) -> Any:
        """What is known of the conversation *id* beside its messages (title, counts, times …) as a dict, or *default*."""
        found = self.record(id)
        return default if found is None else orjson.loads(found.value)

    def record(self, id: Id) -> Record | None:
        """The head as JSON bytes, with its version; nothing is decoded."""
        return self._source.get("conversations", text_of(id))

    def page(
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
        return self._source.transcripts.page(
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

    def list(
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
    ) -> Iterator[Record]:
        """The heads, the conversation with the newest message first, a page at a time.

        Args:
            user_id, session_id: only those that belong to them.
            escalated, archived: only those that are, or are not.
            since_ms, until_ms: updated at or after, before: ms since 1970, or a datetime with its zone.
            active_within, older_than: updated within the last …, or not: seconds, or such as ``"30d"``.
        """
        cursor: str | None = None
        while True:
            page = self.page(
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
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def messages(
        self,
        id: Id,
        *,
        role: str | None = None,
        author: str | None = None,
        since_ms: When | None = None,
        until_ms: When | None = None,
    ) -> Iterator[dict[str, Any]]:
        """All messages of the conversation *id* as dicts, oldest first, read a page at a time.

        Args:
            role, author: only these.
            since_ms, until_ms: created at or after, before: ms since 1970, or a datetime with its zone.

        Raises:
            NotFound: no such conversation.
        """
        after = 0
        while True:
            page = self.message_page(
                id, limit=LIST_PAGE, after=after, role=role, author=author, since_ms=since_ms, until_ms=until_ms
            )
            yield from (orjson.loads(item.value) for item in page.items)
            if page.next is None:
                return
            after = int(page.next)

    def message_page(
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
        """The newest messages of the conversation *id* or, with *after*, the oldest; in order either way.

        Args:
            before: only older ones than the message with this number, or ``next`` of the page that came before.
            after: only newer ones than the message with this number; 0 begins with the first.
        """
        return self._source.transcripts.messages(
            text_of(id),
            limit=limit,
            before=before,
            after=after,
            role=role,
            author=author,
            since_ms=ms_of(since_ms),
            until_ms=ms_of(until_ms),
        )

    def newest(self, id: Id, n: int = 20) -> Messages:
        """The newest *n* messages of the conversation *id* as dicts, oldest first."""
        found: deque[dict[str, Any]] = deque()
        before: str | None = None
        while True:
            page = self.message_page(id, limit=min(n - len(found), LIST_PAGE), before=before)
            found.extendleft(orjson.loads(item.value) for item in reversed(page.items))
            if page.next is None or len(found) >= n:
                return [*found]
            before = page.next

    def window(self, id: Id, *, messages: int | None = None, tokens: int | None = None) -> Messages:
        """The newest messages that fit, as dicts, oldest first; never a tool's result without its call.

        Args:
            messages: at most so many; 20 when neither is given.
            tokens: at most so many together. A message whose tokens nobody counted counts one for four characters.

        Raises:
            NotFound: no such conversation.
            BadRequest: below 1.
        """
        found = self._source.transcripts.window(text_of(id), messages=messages, tokens=tokens)
        return [orjson.loads(item.value) for item in found.items]

    def count(self) -> int:
        """How many conversations, archived ones as well."""
        return self._source.count("conversations")

    def contains(self, id: Id) -> bool:
        """Whether there is a conversation *id*."""
        return self.record(id) is not None

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self.contains(id)

    def __len__(self) -> int:
        return self.count()


class Escalations(EscalationOps[Answer]):
    """Customers who wait for a human; an escalation has the id of its conversation."""

    def __init__(self, holdfast: Holdfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    def get(self, id: Id, default: Any = None) -> Any:
        """The escalation of the conversation *id* as a dict, or *default*."""
        found = self.record(id)
        return default if found is None else orjson.loads(found.value)

    def record(self, id: Id) -> Record | None:
        """It as JSON bytes, with its version; nothing is decoded."""
        return self._source.get("escalations", text_of(id))

    def page(
        self, *, limit: int = 100, cursor: str | None = None, status: str | None = None, priority: str | None = None
    ) -> Page:
        """Some from *cursor* on, in the order of ``list``."""
        return self._source.transcripts.escalations(limit=limit, cursor=cursor, status=status, priority=priority)

    def list(self, *, status: str | None = None, priority: str | None = None) -> Iterator[Record]:
        """All of them, or those of one *status* (pending, …) or *priority* (low, high): high first, then who waits longest."""
        cursor: str | None = None
        while True:
            page = self.page(limit=LIST_PAGE, cursor=cursor, status=status, priority=priority)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def count(self) -> int:
        """How many escalations, of any status."""
        return self._source.count("escalations")

    def contains(self, id: Id) -> bool:
        """Whether the conversation *id* has one."""
        return self.record(id) is not None

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self.contains(id)

    def __len__(self) -> int:
        return self.count()


class Stats(StatsOps[Answer]):
    """The sales figures, and how much there is."""

    def __init__(self, holdfast: Holdfast) -> None:
        super().__init__(holdfast._do)
        self._source = holdfast._source

    def sales(self) -> dict[str, Any]:
        """As in ``sales_stats.json``, with amounts that are not whole as Decimal."""
        return sales_figures(self._source.sales())

    def storage(self) -> dict[str, Any]:
        """How many conversations, messages, tokens and bytes; exact, and found without counting them."""
        return self._source.transcripts.storage()


_decode_sales = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


def sales_figures(encoded: bytes) -> dict[str, Any]:
    """The sales figures in *encoded*, with amounts that are not whole as Decimal."""
    return _decode_sales(encoded)


class Block(Protocol):
    """An atomic or pipeline block under way."""

    def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Take *op*; the answer has seq 0 where it is not known yet."""

    def finish(self) -> None:
        """Return when all of it is acknowledged; raises when something was refused."""


class AtomicBlock:
    """Gathers ops, and does them at its end."""

    def __init__(self, perform: Callable[[list[AnyOp]], None]) -> None:
        self._perform = perform
        self._ops: list[AnyOp] = []

    def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Gather *op*; its durability is the block's."""
        self._ops.append(detached(op))
        return Answer(status=200, seq=0)

    def finish(self) -> None:
        """Do them all or none."""
        if self._ops:
            self._perform(self._ops)


class _Present(threading.local):
    """The block that the present thread is in."""

    block: Block | None = None


class Holdfast(ABC):
    """What keeps a chatbot's state, in this process or in a daemon. Thread-safe; ends with ``close`` or its with-block.

    Attributes:
        sessions, orders, users: the built-in collections.
        conversations, escalations: what is said, and who waits for a human.
        stats: the sales figures, and how much there is.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._present = _Present()
        self._renewals = Renewals()
        self.sessions = Sessions(self)
        self.orders = Orders(self)
        self.users = Records(self, "users")
        self.conversations = Conversations(self)
        self.escalations = Escalations(self)
        self.stats = Stats(self)

    def collection(self, name: str) -> Records:
        """The custom collection *name*; it comes into being with its first record."""
        return Records(self, name)

    @contextmanager
    def atomic(self, *, durability: Durability | None = None) -> Iterator[None]:
        """The ops of this thread inside the block happen together at its end or, when one is refused, not at all.

        Inside the block they return an answer of seq 0, since nothing is decided yet, and reads show the state
        before it. An exception inside the block drops them.
        """
        with self._inside(AtomicBlock(lambda ops: self._perform_together(ops, durability))) as block:
            yield
        block.finish()

    @contextmanager
    def pipeline(self, *, durability: Durability | None = None) -> Iterator[None]:
        """The ops of this thread inside the block happen one after the other, and are waited for together at its end.

        A refused op keeps none of the others back; the first refusal is raised at the end of the block. What an op
        returns inside has seq 0 where its answer is not known yet. An exception inside takes nothing back.
        """
        with self._inside(self._pipeline(durability)) as block:
            try:
                yield
            except BaseException:
                with suppress(HoldfastError):
                    block.finish()
                raise
        block.finish()

    def status(self) -> dict[str, Any]:
        """Counts, seqs, sizes and the last flush, for people and monitors."""
        return self._source.status()

    @abstractmethod
    def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""

    @abstractmethod
    def backup(self) -> BackupReport:
        """Make a backup of everything, and load everything from it to prove it; errors as ``Engine.backup``."""

    @abstractmethod
    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> Events:
        """Every event once it is durable, in order, without end.

        Args:
            after: begin with the event behind this seq, as long as the journal holds it; None begins now, 0 with the
                oldest of all.
            ops: only these, such as ``order.complete`` or ``session.*``.
            ids: only of these records.

        Raises:
            Gone: the journal does not reach back to *after*.
            Conflict: there is no such seq yet.
        """

    @abstractmethod
    def close(self) -> None:
        """End it; safe to call twice."""

    @abstractmethod
    def _perform(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Do one op, durably."""

    @abstractmethod
    def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        """Do all of *ops* or none."""

    @abstractmethod
    def _pipeline(self, durability: Durability | None) -> Block:
        """A block whose ops are waited for together."""

    @abstractmethod
    def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        """Take or renew a lease, waiting for it so long at most."""

    def _do(self, op: AnyOp, durability: Durability | None) -> Answer:
        block = self._present.block
        if block is None:
            return self._perform(op, durability)
        return block.add(op, durability)

    @contextmanager
    def _inside(self, block: Block) -> Iterator[Block]:
        if self._present.block is not None:
            raise BadRequest("atomic and pipeline blocks cannot be nested; end the outer one first")
        self._present.block = block
        try:
            yield block
        finally:
            self._present.block = None

    def __enter__(self) -> Holdfast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
