"""What a handler answers, rendered to the bytes of an HTTP/1.1 response."""

from __future__ import annotations

import asyncio
import zlib
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from holdfast import __version__

JSON = "application/json"
GZIP_BYTES_MIN = 1024
"""Below this a compressed body saves no packet."""

GZIP_INLINE_BYTES_MAX = 64 * 1024
"""Above this compression leaves the event loop, since it takes milliseconds."""

_GZIP_WBITS = 31
_GZIP_LEVEL = 1
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_BODILESS = (204, 304)

encode_json = msgspec.json.Encoder().encode


class Reply(msgspec.Struct, frozen=True):
    """An answer, complete before its first byte is sent.

    Attributes:
        body: what the client gets, uncompressed.
        headers: further header lines, each ending with CRLF; never made of what a client sent.
        is_last: the connection is closed after it, whatever the client asked for.
    """

    status: int
    body: bytes = b""
    headers: str = ""
    content_type: str = JSON
    is_last: bool = False


class Source(Protocol):
    """Where the body of a stream comes from, part by part."""

    @property
    def lag(self) -> int:
        """How much is waiting to be read, in its own units; for the log."""

    async def next(self) -> bytes:
        """The next part, when there is one; empty at the end."""

    def end(self) -> None:
        """Let it give what there is already, then the end."""

    def close(self) -> None:
        """Give everything back, ``next`` returns at once; may be called twice."""


class Stream(Reply, frozen=True, kw_only=True):
    """An answer whose body comes as it happens. The connection takes the source over, and closes it."""

    source: Source


def json_reply(value: Any, status: int = 200) -> Reply:
    """*value* as JSON."""
    return Reply(status, encode_json(value))


def current_date_line() -> str:
    """The headers ``Date`` of now, good for a second, and ``Server``, by which a client of another version says so."""
    return f"Server: holdfast/{__version__}\r\nDate: {formatdate(usegmt=True)}\r\n"


def render(reply: Reply, date_line: str, connection_line: str, *, has_body: bool) -> bytes:
    """The whole response; without the body itself when *has_body* is False, as HEAD wants it."""
    if reply.status in _BODILESS:
        return f"{_STATUS_LINES[reply.status]}{reply.headers}{date_line}{connection_line}\r\n".encode("latin-1")
    head = (
        f"{_STATUS_LINES[reply.status]}Content-Type: {reply.content_type}\r\nContent-Length: {len(reply.body)}\r\n"
        f"{reply.headers}{date_line}{connection_line}\r\n"
    ).encode("latin-1")
    return head + reply.body if has_body else head


def render_head(reply: Stream, date_line: str, *, is_chunked: bool) -> bytes:
    """The beginning of a stream, which is the last answer on its connection; without chunks the end closes it."""
    framing = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
    return (
        f"{_STATUS_LINES[reply.status]}Content-Type: {reply.content_type}\r\n{framing}"
        f"{reply.headers}{date_line}Connection: close\r\n\r\n"
    ).encode("latin-1")


async def compressed(reply: Reply, accept_encoding: str) -> Reply:
    """*reply* with a gzip body when the client takes one and it is worth it."""
    if len(reply.body) <= GZIP_BYTES_MIN:
        return reply
    headers = reply.headers + "Vary: Accept-Encoding\r\n"
    if not _accepts_gzip(accept_encoding):
        return msgspec.structs.replace(reply, headers=headers)
    if len(reply.body) <= GZIP_INLINE_BYTES_MAX:
        body = _gzip(reply.body)
    else:
        body = await asyncio.to_thread(_gzip, reply.body)
    return msgspec.structs.replace(reply, body=body, headers=headers + "Content-Encoding: gzip\r\n")


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, _GZIP_LEVEL, _GZIP_WBITS)


def _accepts_gzip(accept_encoding: str) -> bool:
    for part in accept_encoding.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() in ("gzip", "x-gzip"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
