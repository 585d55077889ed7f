"""Holdfast in this process: ``holdfast.open``."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from typing import Any

from holdfast.blocking import Block, Events, Holdfast
from holdfast.care import backup
from holdfast.care.retention import CHECK_EVERY_S, Daily
from holdfast.engine import Engine, Ticket
from holdfast.errors import HoldfastError
from holdfast.leases import take_lease
from holdfast.ops import Answer, AnyOp, BackupReport, Batch, Durability, FlushReport, SessionLease
from holdfast.recovery import open_engine
from holdfast.settings import Settings, chosen

EXPIRE_EVERY_S = 10.0


def open(data_dir: str | os.PathLike[str] = "data", **settings: Any) -> Embedded:
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
    return Embedded(open_engine(settings_from(data_dir, settings)))


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
        if engine.settings.backups.copy_to:
            from holdfast.care.copies import Copies  # here, since most programs copy nothing

            engine.copies = Copies(
                engine.settings.data_dir, lambda: engine.settings, engine.now_ms, engine.log, is_left_behind=True
            )
            engine.copies.start()
        self._thread = threading.Thread(target=self._run, name="holdfast-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits for what it is at."""
        self._stopping.set()
        self._engine.backups.cancel()
        if self._engine.copies is not None:
            self._engine.copies.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        every_s = min(EXPIRE_EVERY_S, self._engine.settings.flush_every)
        retention = Daily(self._engine, self._stopping.is_set)
        waited_s = since_start_s = 0.0
        while not self._stopping.wait(every_s):
            waited_s += every_s
            since_start_s += every_s
            try:
                self._engine.look_at_disk(self._stopping.is_set)
                if since_start_s >= CHECK_EVERY_S:
                    retention.run_when_due()
                if since_start_s >= backup.CHECK_EVERY_S:
                    self._engine.backups.run_when_due()
                self._engine.expire()
                if waited_s >= self._engine.settings.flush_every or self._engine.flush_wanted():
                    waited_s = 0.0
                    self._engine.flush("interval")
            except (HoldfastError, OSError):
                continue  # logged where it happened; the next turn tries again


def note_ticket(tickets: list[Ticket], ticket: Ticket) -> None:
    """Add *ticket* unless the wait for the last of *tickets* covers it."""
    if not tickets or not tickets[-1].waits_with(ticket):
        tickets.append(ticket)


class _Pipeline:
    """Decides each op at once, and waits for all at its end."""

    def __init__(self, engine: Engine, durability: Durability | None) -> None:
        self._engine = engine
        self._durability = durability
        self._tickets: list[Ticket] = []
        self._refusal: HoldfastError | None = None

    def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Decide *op*."""
        try:
            ticket = self._engine.submit(op, durability=durability or self._durability)
            if not ticket.outcomes:
                ticket.wait()  # raises the refusal
        except HoldfastError as error:
            self._refusal = self._refusal or error
            return Answer(status=error.status, seq=0)
        note_ticket(self._tickets, ticket)
        return ticket.answer

    def finish(self) -> None:
        """Wait for all; raises the first refusal."""
        for ticket in self._tickets:
            ticket.wait()
        if self._refusal is not None:
            raise self._refusal


class Embedded(Holdfast):
    """An open data directory.

    Attributes:
        engine: what is beneath, for those who need more.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine
        self._keeper = Keeper(engine)

    def flush(self) -> FlushReport:
        """Write what changed to the snapshot files; errors as ``Engine.flush``."""
        return self.engine.flush("api")

    def backup(self) -> BackupReport:
        """As ``Holdfast.backup``."""
        return self.engine.backup("api")

    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> Events:
        """As ``Holdfast.events``; a reader that comes to lag behind what the journal keeps ends with Gone."""
        return self.engine.events(after, ops, ids)

    def close(self) -> None:
        """Flush, and give the directory back; errors as ``Engine.close``."""
        self._keeper.stop()
        self.engine.close()

    def _perform(self, op: AnyOp, durability: Durability | None) -> Answer:
        ticket = self.engine.submit(op, durability=durability)
        ticket.wait()
        return ticket.answer

    def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        self.engine.submit_batch(Batch(ops=ops, atomic=True), durability=durability).wait()

    def _pipeline(self, durability: Durability | None) -> Block:
        return _Pipeline(self.engine, durability)

    def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        return take_lease(self.engine, op, wait_s, durability=durability)
