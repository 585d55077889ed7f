"""An engine on a real directory, with a clock and a disk that tests hold in their hands."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from holdfast.clock import Clock, parse_ms
from holdfast.engine import Engine
from holdfast.errors import HoldfastError
from holdfast.ops import Answer, AnyOp, Batch, Durability
from holdfast.recovery import open_engine
from holdfast.settings import BackupSettings, Settings

NOW = "2026-11-21T06:00:00.000Z"
NOW_MS = parse_ms(NOW)
ANSWER_S = 10.0
"""More than anything in these tests takes, so that a hang fails instead of hanging."""


class HandClock(Clock):
    """A clock that moves only when told to."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        super().__init__()
        self._wall_ms = now_ms
        self._seconds = 1000.0

    def now_ms(self) -> int:
        self._last_ms = max(self._last_ms, self._wall_ms)
        return self._last_ms

    def monotonic(self) -> float:
        return self._seconds

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._wall_ms += round(seconds * 1000)
        self._seconds += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock, as an operator or NTP would."""
        self._wall_ms += round(seconds * 1000)


class Log:
    """Remembers log events as (name, fields)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _note(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    debug = info = warning = error = exception = _note

    def named(self, name: str) -> list[dict[str, Any]]:
        """The fields of each event *name*."""
        return [fields for event, fields in self.events if event == name]


class Disk:
    """Stands in the way of the system calls that write and sync a journal; by default lets all through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before_write: Callable[[], None] = lambda: None
        self.before_sync: Callable[[], None] = lambda: None
        self.syncs = 0
        self.writes = 0
        write, fdatasync = os.write, os.fdatasync

        def journal_write(fd: int, data: bytes) -> int:
            if _is_segment(fd):
                self.writes += 1
                self.before_write()
            return write(fd, data)

        def journal_sync(fd: int) -> None:
            self.syncs += 1
            self.before_sync()
            fdatasync(fd)

        monkeypatch.setattr(os, "write", journal_write)
        monkeypatch.setattr("holdfast.disk.journal._sync_data", journal_sync)

    def fill(self) -> None:
        """No room from now on."""
        self.before_write = lambda: _raise(errno.ENOSPC)

    def free(self) -> None:
        """Room again."""
        self.before_write = lambda: None

    def fail_sync(self) -> None:
        """Refuse to sync from now on."""
        self.before_sync = lambda: _raise(errno.EIO)


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _is_segment(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl")
    return False


def settings_of(data_dir: Path, **chosen: Any) -> Settings:
    """Settings for *data_dir*, which keep no history behind the flushes; a mapping chooses within its section."""
    settings = Settings(data_dir=data_dir, backups=BackupSettings(pitr=0))
    for name, value in chosen.items():
        if isinstance(value, dict):
            value = msgspec.structs.replace(getattr(settings, name), **value)
        settings = msgspec.structs.replace(settings, **{name: value})
    return settings


def opened(data_dir: Path, *, clock: Clock | None = None, log: Any = None, **chosen: Any) -> Engine:
    """An engine on *data_dir*, whose clock stands at NOW."""
    return open_engine(settings_of(data_dir, **chosen), clock=clock or HandClock(), log=log or Log())


@contextlib.contextmanager
def running(data_dir: Path, *, clock: Clock | None = None, log: Any = None, **chosen: Any) -> Iterator[Engine]:
    """The same for the length of a block, closed without a flush so that the journal speaks at the next start."""
    engine = opened(data_dir, clock=clock, log=log, **chosen)
    try:
        yield engine
    finally:
        with contextlib.suppress(HoldfastError):
            engine.close(flush=False)


def do(engine: Engine, op: AnyOp, *, durability: Durability | None = None) -> Answer:
    """Submit *op* and wait until it is durable."""
    ticket = engine.submit(op, durability=durability)
    ticket.wait(ANSWER_S)
    return ticket.answer


def do_together(engine: Engine, *ops: AnyOp, durability: Durability | None = None) -> list[Answer | HoldfastError]:
    """Submit *ops* as one atomic batch and wait until it is durable."""
    ticket = engine.submit_batch(Batch(ops=list(ops), atomic=True), durability=durability)
    ticket.wait(ANSWER_S)
    return ticket.outcomes


def value_of(engine: Engine, collection: str, id: str) -> Any:
    """The durable value of a record; None when there is none."""
    found = engine.get(collection, id)
    return None if found is None else orjson.loads(found.value)


def everything(engine: Engine) -> dict[str, Any]:
    """All that readers can see, with versions."""
    names = ["sessions", "orders", "users", *engine.collection_names()]
    seen: dict[str, Any] = {"sales": orjson.loads(engine.sales())}
    for name in names:
        page = engine.page(name, limit=5_000)
        assert page.next is None
        seen[name] = {item.id: (item.version, orjson.loads(item.value)) for item in page.items}
    return seen
