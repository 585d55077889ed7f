"""The answers to each client's last request, for the case that they did not arrive.

A client sends its next request only when it has the answers to the one before (``ops.Retry``), so one request a
client is enough, and noting an answer is one entry in a dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import orjson

from holdfast import record
from holdfast.errors import Conflict

CLIENTS_MAX = 65_536
"""Clients remembered at once; the one that changed nothing for longest is forgotten."""

TTL_MS = 3600 * 1000
"""How long the answers to a client's last request are kept for its next try."""


class Noted(NamedTuple):
    """What an op came to: enough to answer it again.

    Attributes:
        op, id: what was asked, by which a mistaken number is told from a repeat.
        version, seq: of its event.
        generation, until: of a lease.
        numbers: of appended messages.
    """

    op: str
    id: str
    version: int
    seq: int
    generation: int | None
    until: int | None
    numbers: list[int] | None = None


class _Client:
    __slots__ = ("at_ms", "noted", "number")

    def __init__(self, number: int, at_ms: int) -> None:
        self.number = number
        self.at_ms = at_ms
        self.noted: dict[int, Noted] = {}


class _Op(NamedTuple):
    """A ``Noted`` behind its place in the request; earlier versions of Holdfast wrote none of its numbers."""

    place: int
    op: str
    id: str
    version: int
    seq: int
    generation: int | None
    until: int | None
    numbers: list[int] | None = None


class RetryLine(msgspec.Struct):
    """A client as a line of the snapshot; the ops are its ``noted``, each behind its index."""

    id: str
    number: int
    at: int
    ops: list[_Op]


class Retries:
    """By client, what each op of its last request came to. Changed under the engine's lock.

    Attributes:
        changed_seq: the last seq that changed it.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self.changed_seq = 0

    def __len__(self) -> int:
        return len(self._clients)

    def is_repeat(self, client: str, number: int) -> bool:
        """Whether request *number* of *client*, or a later one, has happened at least in part."""
        known = self._clients.get(client)
        return known is not None and known.number >= number

    def find(self, client: str, index: int, number: int, op: str, id: str) -> Noted | None:
        """What the op *index* of request *number* came to; None when it has not happened.

        Raises:
            Conflict: the client has sent another request since, or numbers two requests alike.
        """
        known = self._clients.get(client)
        if known is None or known.number < number:
            return None
        if known.number > number:
            raise Conflict(f"request {number} of this client is older than its last one, {known.number}")
        noted = known.noted.get(index)
        if noted is not None and (noted.op, noted.id) != (op, id):
            raise Conflict(f"request {number} of this client was another op, {noted.op}; number each request anew")
        return noted

    def note(self, client: str, index: int, number: int, noted: Noted, at_ms: int) -> None:
        """Keep what an op came to, and forget the client's request before."""
        known = self._clients.get(client)
        if known is None or known.number != number:
            # At the end of the dict: the oldest client stands at its beginning.
            self._clients.pop(client, None)
            known = self._clients[client] = _Client(number, at_ms)
            if len(self._clients) > CLIENTS_MAX:
                del self._clients[next(iter(self._clients))]
        known.noted[index] = noted
        self.changed_seq = noted.seq

    def undo(self, seq: int) -> None:
        """Forget what happened after *seq*: it was taken back."""
        for known in self._clients.values():
            for index in [index for index, noted in known.noted.items() if noted.seq > seq]:
                del known.noted[index]

    def forget(self, now_ms: int) -> None:
        """Drop the clients whose last request is TTL_MS old."""
        for client in [client for client, known in self._clients.items() if known.at_ms + TTL_MS <= now_ms]:
            del self._clients[client]

    def clients(self) -> list[str]:
        """Those that are remembered."""
        return list(self._clients)

    def line(self, client: str, seq: int) -> bytes | None:
        """The snapshot line of *client*, without what happened after *seq*."""
        known = self._clients.get(client)
        if known is None:
            return None
        ops = [(index, *noted) for index, noted in known.noted.items() if noted.seq <= seq]
        return _line(client, known.number, known.at_ms, ops) if ops else None

    def load(self, lines: Iterable[bytes], seq: int) -> None:
        """Take snapshot lines back, which hold everything up to *seq*.

        Raises:
            msgspec.DecodeError: one is none.
        """
        for found in sorted(map(_decode_line, lines), key=lambda line: line.at):
            known = self._clients[found.id] = _Client(found.number, found.at)
            known.noted = {
                one.place: Noted(one.op, one.id, one.version, one.seq, one.generation, one.until, one.numbers)
                for one in found.ops
            }
        self.changed_seq = seq


def _line(client: str, number: int, at_ms: int, ops: Sequence[tuple[object, ...]]) -> bytes:
    return record.join(orjson.dumps({"id": client, "number": number, "at": at_ms, "ops": ops}), 1)


_decode_line = msgspec.json.Decoder(RetryLine).decode
