"""The client for programs that wait: ``holdfast.connect``."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any

from holdfast.blocking import Block, Events, Holdfast
from holdfast.client import messages
from holdfast.client.address import Address, address_of, timeout_of, token_of
from holdfast.client.backoff import Backoff, described
from holdfast.client.connection import Channel
from holdfast.client.stream import RemoteEvents
from holdfast.client.wire import Requests, Response, WireError
from holdfast.errors import HoldfastError, Leased, Unavailable
from holdfast.held import Renewals
from holdfast.leases import LEASE_WAIT_MAX_S
from holdfast.ops import Answer, AnyOp, BackupReport, Durability, FlushReport, Page, Record, Retry, SessionLease, Window

FLUSH_TIMEOUT_S = 600.0
"""A flush of a million sessions takes seconds, on a slow disk a minute."""

BACKUP_TIMEOUT_S = 3600.0
"""A backup takes the time it needs: it gives way to everybody else."""

IDLE_CONNECTIONS_MAX = 64

FIRST_CONTACT_S = 5.0
"""How long a client waits for a daemon that it has never reached: it may be starting, but the address may be wrong."""


def connect(
    address: str = "unix:data/holdfast.sock",
    *,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
) -> Remote:
    """Use the daemon at *address*: ``unix:PATH``, ``http://HOST:PORT``, or ``https://HOST`` of a proxy before it.

    Nothing is sent before the first call. When the daemon is away, calls wait for it and are tried again, safely, for
    *timeout* seconds each; so a restart shows as a delay. One that was never reached is waited for no longer than 5 s.

    Args:
        token: for TCP; else what *token_file* holds, else HOLDFAST_TOKEN.
        timeout: seconds that a call may take, tries included; a lease's waiting and a flush come on top. The waiting for
            one answer begins anew with each signal that the calling thread handles.

    Raises:
        SettingsError: the address, token or timeout has no meaning.

    Example::

        with holdfast.connect("unix:data/holdfast.sock") as hf:
            hf.sessions.put("573001234567", {"currentState": "catalog"})
    """
    return Remote(address_of(address), token_of(token, token_file), timeout_of(timeout))


class _Transcripts:
    """What a daemon answers to questions about conversations."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def conversation(self, id: str) -> Record | None:
        return messages.record_in(self._remote.ask("GET", messages.conversation_target(id)), id)

    def page(self, **wanted: Any) -> Page:
        return messages.page_in(self._remote.ask("GET", messages.conversations_target(**wanted)))

    def messages(self, id: str, **wanted: Any) -> Page:
        return messages.page_in(self._remote.ask("GET", messages.messages_target(id, **wanted)))

    def window(self, id: str, **wanted: Any) -> Window:
        return messages.window_in(self._remote.ask("GET", messages.window_target(id, **wanted)))

    def escalations(self, **wanted: Any) -> Page:
        return messages.page_in(self._remote.ask("GET", messages.escalations_target(**wanted)))

    def storage(self) -> dict[str, Any]:
        return messages.status_in(self._remote.ask("GET", "/v1/stats/storage"))


class _Answers:
    """What a daemon answers to questions; the source of a ``Remote``."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.transcripts = _Transcripts(remote)

    def get(self, collection: str, id: str) -> Record | None:
        return messages.record_in(self._remote.ask("GET", messages.head_target(collection, id)), id)

    def page(
        self,
        collection: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        since_ms: int | None = None,
        state: str | None = None,
    ) -> Page:
        return messages.page_in(
            self._remote.ask("GET", messages.page_target(collection, limit, cursor, since_ms, state))
        )

    def count(self, collection: str) -> int:
        return messages.count_in(self.status(), collection)

    def sales(self) -> bytes:
        response = self._remote.ask("GET", "/v1/stats/sales")
        messages.check(response)
        return response.body

    def status(self) -> dict[str, Any]:
        return messages.status_in(self._remote.ask("GET", "/v1/admin/status"))


class _Pipeline:
    """Sends its ops in batches, without telling what became of them before its end."""

    def __init__(self, remote: Remote, durability: Durability | None) -> None:
        self._remote = remote
        self._own_durability = durability
        self._durability: Durability | None = None
        self._ops: list[bytes] = []
        self._bytes = 0
        self._refusal: HoldfastError | None = None

    def add(self, op: AnyOp, durability: Durability | None) -> Answer:
        """Take *op*, and send the batch when it is full."""
        durability = durability or self._own_durability
        if self._ops and durability != self._durability:
            self._send()
        self._durability = durability
        try:
            encoded = messages.encode_op(op)
        except HoldfastError as error:
            # What was called before may be refused as well, and is then the first.
            if self._ops:
                self._send()
            self._refusal = self._refusal or error
            return Answer(status=error.status, seq=0)
        self._ops.append(encoded)
        self._bytes += len(encoded)
        if len(self._ops) >= messages.BATCH_OPS_MAX or self._bytes >= messages.BATCH_BYTES_MAX:
            self._send()
        return Answer(status=200, seq=0)

    def finish(self) -> None:
        """Send the rest; raises the first refusal."""
        if self._ops:
            self._send()
        if self._refusal is not None:
            raise self._refusal

    def _send(self) -> None:
        ops, self._ops, self._bytes = self._ops, [], 0
        for outcome in self._remote.each(ops, self._durability):
            if isinstance(outcome, HoldfastError):
                self._refusal = self._refusal or outcome


class Remote(Holdfast):
    """A daemon, over as many connections as threads call at once."""

    def __init__(self, address: Address, token: str | None, timeout_s: float) -> None:
        super().__init__(_Answers(self))
        self._address = address
        self._requests = Requests(address.host_header, token)
        self._timeout_s = timeout_s
        self._idle: list[Channel] = []
        self._streams: weakref.WeakSet[RemoteEvents] = weakref.WeakSet()
        self._is_closed = False
        self._has_reached = False
        _remotes.add(self)

    def __str__(self) -> str:
        return str(self._address)

    def flush(self) -> FlushReport:
        """Have the daemon write what changed to its snapshot files, and wait until it has."""
        return messages.report_in(self.ask("POST", "/v1/admin/flush", b"", extra_s=FLUSH_TIMEOUT_S))

    def backup(self) -> BackupReport:
        """Have the daemon make a backup of everything and prove it, and wait until it has."""
        return messages.backup_in(self.ask("POST", "/v1/admin/backup", b"", extra_s=BACKUP_TIMEOUT_S))

    def events(self, after: int | None = None, *, ops: Collection[str] = (), ids: Collection[str] = ()) -> Events:
        """As ``Holdfast.events``; when the daemon restarts, the stream goes on where it was."""
        self._check_open()
        events = RemoteEvents(self._address, self._requests, after, ops, ids, self._patience_s(), self._timeout_s)
        self._has_reached = True
        self._streams.add(events)
        if self._is_closed:  # by another thread, meanwhile
            events.close()
        return events

    def close(self) -> None:
        """Close the connections that are idle, and end the event streams.

        A request that another thread has under way is still answered; one that waits for a daemon that is away is given up.
        """
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        for events in list(self._streams):
            events.close()

    def ask(self, method: str, target: str, body: bytes | None = None, *, extra_s: float = 0.0) -> Response:
        """The response to a request that may be sent twice; errors as ``connect`` says."""
        request = self._requests.render(method, target, body)
        return self._exchange(lambda channel: request, extra_s)

    def batch(self, ops: list[bytes], durability: Durability | None, *, atomic: bool) -> list[Answer | HoldfastError]:
        """What became of each of the encoded *ops*; raises what was refused as a whole."""
        body = messages.batch_body(ops, atomic=atomic)
        target = messages.batch_target(durability)
        return messages.outcomes(self._exchange(partial(self._once, target, body)), len(ops))

    def each(self, ops: list[bytes], durability: Durability | None) -> list[Answer | HoldfastError]:
        """What became of each of the encoded *ops*, none of which keeps the others back."""
        try:
            return self.batch(ops, durability, atomic=False)
        except HoldfastError as error:
            if not messages.may_be_of_one(error):
                raise
            if len(ops) == 1:
                return [error]
        middle = len(ops) // 2
        return self.each(ops[:middle], durability) + self.each(ops[middle:], durability)

    def _perform(self, op: AnyOp, durability: Durability | None) -> Answer:
        outcome = self.batch([messages.encode_op(op)], durability, atomic=False)[0]
        if isinstance(outcome, HoldfastError):
            raise outcome
        return outcome

    def _perform_together(self, ops: list[AnyOp], durability: Durability | None) -> None:
        self.batch([messages.encode_op(op) for op in ops], durability, atomic=True)

    def _pipeline(self, durability: Durability | None) -> Block:
        return _Pipeline(self, durability)

    def _take_lease(self, op: SessionLease, wait_s: float, durability: Durability | None) -> Answer:
        ends_at = time.monotonic() + wait_s
        target = messages.lease_target(op.id, durability)
        while True:
            ask_s = min(max(ends_at - time.monotonic(), 0.0), LEASE_WAIT_MAX_S)
            body = messages.lease_body(op, ask_s)
            try:
                return messages.answer_in(self._exchange(partial(self._once, target, body), ask_s))
            except Leased:
                if time.monotonic() >= ends_at:
                    raise

    def _once(self, target: str, body: bytes, channel: Channel) -> bytes:
        channel.number += 1
        return self._requests.render("POST", target, body, messages.retry_line(Retry(channel.client, channel.number)))

    def _exchange(self, render: Callable[[Channel], bytes], extra_s: float = 0.0) -> Response:
        """Send what *render* makes for a channel until it is answered."""
        self._check_open()
        try:
            channel = self._idle.pop()
        except IndexError:
            channel = Channel(self._address)
        timeout_s = left_s = self._timeout_s + extra_s
        ends_at = time.monotonic() + timeout_s
        backoff: Backoff | None = None
        is_fresh = not channel.is_open
        try:
            request = render(channel)
            while True:
                try:
                    response = channel.exchange(request, left_s)
                    self._has_reached = True
                    if not messages.is_temporary(response):
                        return response
                    reason: Exception = messages.refusal_in(response)
                except TimeoutError:
                    raise Unavailable(
                        f"{self} did not answer within {timeout_s:g} s; whether it acted is not known"
                    ) from None
                except (OSError, WireError) as error:
                    if isinstance(error, PermissionError):
                        raise Unavailable(f"{self}: {described(error)}") from None
                    reason = error
                    if not is_fresh:
                        # The daemon closes connections that were idle for long; a new one serves.
                        is_fresh = True
                        continue
                self._check_open()
                if backoff is None:
                    backoff = Backoff(self._patience_s(), str(self), ends_at)
                time.sleep(backoff.next_pause_s(reason))
                left_s = max(ends_at - time.monotonic(), 0.001)
                if isinstance(reason, HoldfastError):
                    # Refused, perhaps since there are too many connections: one that nobody uses now will do.
                    with suppress(IndexError):
                        channel.take_over(self._idle.pop())
        finally:
            if self._is_closed or len(self._idle) >= IDLE_CONNECTIONS_MAX:
                channel.close()
            else:
                self._idle.append(channel)

    def _patience_s(self) -> float:
        """How long a daemon may be away."""
        return self._timeout_s if self._has_reached else min(self._timeout_s, FIRST_CONTACT_S)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable("closed; connect again")

    def _forget_in_child(self) -> None:
        # Two processes on one connection would read each other's answers.
        self._idle = []
        self._streams = weakref.WeakSet()
        self._renewals = Renewals()


_remotes: weakref.WeakSet[Remote] = weakref.WeakSet()


def _after_fork() -> None:
    for remote in list(_remotes):
        remote._forget_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
