"""Holdfast in this process: ``holdfast.open``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from types import TracebackType
from typing import Any

import msgspec
import orjson

from holdfast.api import Id, OrderOps, RecordOps, SessionOps, StatsOps
from holdfast.engine import Engine, Ticket
from holdfast.errors import BadRequest, HoldfastError
from holdfast.flush import FlushReport
from holdfast.ops import Answer, AnyOp, Batch, Durability
from holdfast.pages import Page, Record
from holdfast.recovery import open_engine
from holdfast.settings import Settings, chosen

EXPIRE_EVERY_S = 10.0
LIST_PAGE = 1_000


def open(data_dir: str | os.PathLike[str] = "data", **settings: Any) -> Holdfast:
    """Open the data directory *data_dir* in this process, which owns it until ``close``.

    Keywords are settings by their names (``flush_every="1m"``, ``sessions={"ttl": "12h"}``); neither files nor
    environment are read. Flushes and expiry run in a thread of their own.

    Raises:
        SettingsError: a keyword that is no setting.
        DirectoryLocked: another process has the directory.
        DataRefused: it cannot be opened safely.

    Example::

        with holdfast.open("data") as hf:
            hf.sessions.put("573001234567", {"currentState": "catalog"})
    """
    return Holdfast(open_engine(settings_from(data_dir, settings)))


def settings_from(data_dir: str | os.PathLike[str], keywords: Mapping[str, Any]) -> Settings:
    """The settings that *keywords* choose; those of a section stand in a mapping of their own."""
    overrides: dict[str, object] = {"data_dir": os.fspath(data_dir)}
    for name, value in keywords.items():
        if isinstance(value, Mapping):
            overrides |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            overrides[name] = value
    return chosen(overrides)


class Keeper:
    """Does what the daemon's supervisor does in a process without one: expires and flushes in its time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="holdfast-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits for what it is at."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        every_s = min(EXPIRE_EVERY_S, self._engine.settings.flush_every)
        waited_s = 0.0
        while not self._stopping.wait(every_s):
            waited_s += every_s
            try:
                self._engine.expire()
                if waited_s >= self._engine.settings.flush_every or self._engine.flush_wanted():
                    waited_s = 0.0
                    self._engine.flush("interval")
            except (HoldfastError, OSError):
                continue  # logged where it happened; the next turn tries again


class Reading:
    """Asking a collection; answers come from memory, without waiting, in their last durable state."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name

    def get(self, id: Id, default: Any = None) -> Any:
        """The value of *id* as a dict, or *default*."""
        found = self._engine.get(self.name, id if type(id) is str else str(id))
        return default if found is None else orjson.loads(found.value)

    def record(self, id: Id) -> Record | None:
        """The value of *id* as JSON bytes, with its version; nothing is decoded."""
        return self._engine.get(self.name, id if type(id) is str else str(id))

    def page(
        self, *, limit: int = 100, cursor: str | None = None, since_ms: int | None = None, state: str | None = None
    ) -> Page:
        """Some records from *cursor* on; as ``Engine.page``."""
        return self._engine.page(self.name, limit=limit, cursor=cursor, since_ms=since_ms, state=state)

    def list(self, *, since_ms: int | None = None, state: str | None = None) -> Iterator[Record]:
        """All records, a page at a time; what changes meanwhile may be seen or not."""
        cursor: str | None = None
        while True:
            page = self.page(limit=LIST_PAGE, cursor=cursor, since_ms=since_ms, state=state)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str | int) and self._engine.get(self.name, str(id)) is not None

    def __len__(self) -> int:
        return count_of(self._engine, self.name)


def count_of(engine: Engine, name: str) -> int:
    """How many records the collection *name* has, as ``page`` lists them."""
    closed = engine.count("completed_orders") if name == "orders" else 0
    return engine.count(name) + closed


def sales_of(engine: Engine) -> dict[str, Any]:
    """The sales figures as in ``sales_stats.json``, with amounts that are not whole as Decimal."""
    figures: dict[str, Any] = msgspec.json.Decoder(float_hook=Decimal).decode(engine.sales())
    return figures


class Sessions(SessionOps[Answer], Reading):
    """The sessions."""

    def __init__(self, holdfast: Holdfast) -> None:
        SessionOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast.engine, "sessions")


class Orders(OrderOps[Answer], Reading):
    """Pending, completed and cancelled orders."""

    def __init__(self, holdfast: Holdfast) -> None:
        OrderOps.__init__(self, holdfast._do)
        Reading.__init__(self, holdfast.engine, "orders")


class Records(RecordOps[Answer], Reading):
    """Users, or a custom collection."""

    def __init__(self, holdfast: Holdfast, name: str) -> None:
        RecordOps.__init__(self, holdfast._do, name)
        Reading.__init__(self, holdfast.engine, name)


class Stats(StatsOps[Answer]):
    """The sales figures."""

    def __init__(self, holdfast: Holdfast) -> None:
        super().__init__(holdfast._do)
        self._engine = holdfast.engine

    def sales(self) -> dict[str, Any]:
        """As in ``sales_stats.json``, with amounts that are not whole as Decimal."""
        return sales_of(self._engine)


class _Block(threading.local):
    """The atomic or pipeline block that the present thread is in.

    Attributes:
        ops: gathered by an atomic block.
        tickets: of a pipeline block, one for each batch that its ops are written in.
        durability: of the block.
    """

    ops: list[AnyOp] | None = None
    tickets: list[Ticket] | None = None
    durability: Durability | None = None

    def enter(self, durability: Durability | None) -> None:
        if self.ops is not None or self.tickets is not None:
            raise BadRequest("atomic and pipeline blocks cannot be nested; end the outer one first")
        self.durability = durability


def note_ticket(tickets: list[Ticket], ticket: Ticket) -> None:
    """Add *ticket* unless the wait for the last of *tickets* covers it."""
    if not tickets or not tickets[-1].waits_with(ticket):
        tickets.append(ticket)


class Holdfast:
    """An open data directory. Thread-safe; ends with ``close`` or its with-block.

    Attributes:
        sessions, orders, users: the built-in collections.
        stats: the sales figures.
        engine: what is beneath, for those who need more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._block = _Block()
        self._keeper = Keeper(engine)
        self.sessions = Sessions(self)
        self.orders = Orders(self)
        self.users = Records(self, "users")
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
        block = self._block
        block.enter(durability)
        ops: list[AnyOp] = []
        block.ops = ops
        try:
            yield
        finally:
            block.ops = None
        if ops:
            self.engine.submit_batch(Batch(ops=ops, atomic=True), durability=durability).wait()

    @contextmanager
    def pipeline(self, *, durability: Durability | None = None) -> Iterator[None]:
        """The ops of this thread inside the block happen each at once, and are waited for together at its end.

        A refused op raises where it stands; those before it happen nevertheless.
        """
        block = self._block
        block.enter(durability)
        tickets: list[Ticket] = []
        block.tickets = tickets
        try:
            yield
        finally:
            block.tickets = None
            for ticket in tickets:
                ticket.wait()

    def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""
        return self.engine.flush("api")

    def close(self) -> None:
        """Flush, and give the directory back; errors as ``Engine.close``."""
        self._keeper.stop()
        self.engine.close()

    def _do(self, op: AnyOp, durability: Durability | None) -> Answer:
        block = self._block
        if block.ops is not None:
            block.ops.append(op)
            return Answer(status=200, seq=0)
        if block.tickets is None:
            ticket = self.engine.submit(op, durability=durability)
            ticket.wait()
            return ticket.answer
        ticket = self.engine.submit(op, durability=durability or block.durability)
        if not ticket.outcomes:
            ticket.wait()  # raises the refusal
        note_ticket(block.tickets, ticket)
        return ticket.answer

    def __enter__(self) -> Holdfast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
