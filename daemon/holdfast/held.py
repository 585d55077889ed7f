"""A lease in the hands of a worker: its with-block, writing under it, and renewing it in time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from holdfast.api import SessionOps, Value
from holdfast.errors import Conflict, HoldfastError, Leased
from holdfast.ops import Answer, Durability, Record, Seconds

if TYPE_CHECKING:
    from holdfast import asynchronous, blocking

A = TypeVar("A")

RENEW_AFTER = 1 / 3
"""Of the ttl: there is then time for a second and a third try."""

IDLE_S = 10.0
"""How long the renewing thread waits for another lease before it ends."""


class _Held(Generic[A]):
    """A session under a lease: every change carries the lease's generation, and is refused once the lease is lost.

    Attributes:
        id: of the session.
        ttl_s: for how long each renewal holds.
        generation: the fencing number; grows with every new lease of a session.
        expires_at: ISO 8601, as of the last renewal.
        is_lost: another may have the session: a renewal came too late. Whatever is written now is refused.
    """

    def __init__(self, ops: SessionOps[A], id: str, ttl_s: float, answer: Answer) -> None:
        assert answer.generation is not None and answer.expires_at is not None
        self._ops = ops
        self.id = id
        self.ttl_s = ttl_s
        self.generation = answer.generation
        self.expires_at = answer.expires_at
        self.is_lost = False

    def put(
        self,
        value: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """As ``sessions.put``, under the lease; Conflict or Leased when it is lost."""
        return self._ops.put(
            self.id,
            value,
            if_version=if_version,
            ttl=ttl,
            lease=self.generation,
            idempotency_key=idempotency_key,
            durability=durability,
        )

    def patch(
        self,
        patch: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """As ``sessions.patch``, under the lease."""
        return self._ops.patch(
            self.id,
            patch,
            if_version=if_version,
            ttl=ttl,
            lease=self.generation,
            idempotency_key=idempotency_key,
            durability=durability,
        )

    def touch(self, *, ttl: Seconds | None = None, durability: Durability | None = None) -> A:
        """As ``sessions.touch``, under the lease."""
        return self._ops.touch(self.id, ttl=ttl, lease=self.generation, durability=durability)

    def delete(self, *, durability: Durability | None = None) -> A:
        """As ``sessions.delete``, under the lease, which goes on until it is released."""
        return self._ops.delete(self.id, lease=self.generation, durability=durability)


class Lease(_Held[Answer]):
    """The lease of a session, from the call of ``sessions.lease`` until ``release``, or until its time is over.

    As a with-block it renews itself by a thread while the block runs, and is released at its end::

        with hf.sessions.lease("573001234567", ttl=30) as session:
            state = session.get(default={})
            session.put(state | {"currentState": "paid"})
    """

    def __init__(self, sessions: blocking.Sessions, id: str, ttl_s: float, answer: Answer, renewals: Renewals) -> None:
        super().__init__(sessions, id, ttl_s, answer)
        self._sessions = sessions
        self._renewals = renewals

    def get(self, default: Any = None) -> Any:
        """The session's value as a dict, or *default*."""
        return self._sessions.get(self.id, default)

    def record(self) -> Record | None:
        """Its value as JSON bytes, with its version."""
        return self._sessions.record(self.id)

    def renew(self) -> None:
        """Hold it for another ttl from now on.

        Raises:
            Conflict, Leased: it was lost.
        """
        try:
            answer = self._sessions.lease(self.id, self.ttl_s, generation=self.generation)
        except (Conflict, Leased):
            self.is_lost = True
            raise
        self.expires_at = answer.expires_at

    def release(self) -> None:
        """Let the next one have it; nothing happens when it is over already."""
        self._renewals.remove(self)
        with contextlib.suppress(Leased):
            self._sessions.release(self.id, self.generation)

    def __enter__(self) -> Lease:
        self._renewals.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # What cannot be released now ends by itself, and must not hide how the block ended.
        with contextlib.suppress(HoldfastError):
            self.release()


class Renewals:
    """The thread that renews the leases of with-blocks; it runs only while there are some."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Lease, float] = {}
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        """Renew *lease* in time until it is removed."""
        due = time.monotonic() + lease.ttl_s * RENEW_AFTER
        with self._changed:
            is_next = not self._due or due < min(self._due.values())
            self._due[lease] = due
            # After a fork the thread is the parent's.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="holdfast-leases", daemon=True)
                self._thread.start()
            elif is_next:
                self._changed.notify()

    def remove(self, lease: Lease) -> None:
        """Let it be."""
        with self._changed:
            self._due.pop(lease, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                lease = self._next()
                if lease is None:
                    self._thread = None
                    return
            retry_s = lease.ttl_s * RENEW_AFTER
            try:
                lease.renew()
            except (Conflict, Leased):
                self.remove(lease)
                continue
            except HoldfastError:
                retry_s /= 10
            with self._changed:
                if lease in self._due:
                    self._due[lease] = time.monotonic() + retry_s

    def _next(self) -> Lease | None:
        """The next lease that is due, when it is; None when nobody has needed one for a while."""
        while True:
            if not self._due:
                if not self._changed.wait(IDLE_S) and not self._due:
                    return None
                continue
            lease = min(self._due, key=self._due.__getitem__)
            left_s = self._due[lease] - time.monotonic()
            if left_s <= 0:
                return lease
            self._changed.wait(left_s)


class AsyncLease(_Held[Awaitable[Answer]]):
    """The same for tasks; the renewing is done by the event loop."""

    def __init__(self, sessions: asynchronous.Sessions, id: str, ttl_s: float, answer: Answer) -> None:
        super().__init__(sessions, id, ttl_s, answer)
        self._sessions = sessions
        self._timer: asyncio.TimerHandle | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def get(self, default: Any = None) -> Any:
        """The session's value as a dict, or *default*."""
        return await self._sessions.get(self.id, default)

    async def record(self) -> Record | None:
        """Its value as JSON bytes, with its version."""
        return await self._sessions.record(self.id)

    async def renew(self) -> None:
        """Hold it for another ttl from now on.

        Raises:
            Conflict, Leased: it was lost.
        """
        try:
            answer = await self._sessions.lease(self.id, self.ttl_s, generation=self.generation)
        except (Conflict, Leased):
            self.is_lost = True
            raise
        self.expires_at = answer.expires_at

    async def release(self) -> None:
        """Let the next one have it; nothing happens when it is over already."""
        self._stop_renewing()
        with contextlib.suppress(Leased):
            await self._sessions.release(self.id, self.generation)

    def _renew_in(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin_renewal)

    def _begin_renewal(self) -> None:
        self._renewing = asyncio.get_running_loop().create_task(self._renew_once())

    async def _renew_once(self) -> None:
        try:
            await self.renew()
        except (Conflict, Leased):
            return
        except HoldfastError:
            self._renew_in(self.ttl_s * RENEW_AFTER / 10)
        else:
            self._renew_in(self.ttl_s * RENEW_AFTER)

    def _stop_renewing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._renewing is not None:
            self._renewing.cancel()


class AsyncLeaseRequest:
    """What ``sessions.lease`` of the async forms returns: await it, or use it in ``async with``."""

    def __init__(self, take: Callable[[], Awaitable[AsyncLease]]) -> None:
        self._take = take
        self._lease: AsyncLease | None = None

    def __await__(self) -> Generator[Any, None, AsyncLease]:
        return self._take().__await__()

    async def __aenter__(self) -> AsyncLease:
        self._lease = await self._take()
        self._lease._renew_in(self._lease.ttl_s * RENEW_AFTER)
        return self._lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._lease is not None
        # What cannot be released now ends by itself, and must not hide how the block ended.
        with contextlib.suppress(HoldfastError):
            await self._lease.release()
