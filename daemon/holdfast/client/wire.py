"""HTTP/1.1 as the clients speak it: requests as bytes, responses from bytes; no I/O.

Ours, because a general client spends more on one request than the daemon spends on serving it: http.client twice,
aiohttp and httpx up to ten times as much. It knows what RFC 9112 lets a server or a proxy before it answer to our
own requests: a length, chunks, or an end by closing; nothing is compressed, since nobody asked for it.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_BYTES_MAX = 64 << 10
BODY_BYTES_MAX = 256 << 20


class WireError(Exception):
    """What came is no HTTP response."""


class Response(NamedTuple):
    """A whole response.

    Attributes:
        headers: by lower-case name; of repeated ones the last.
        is_last: the connection is of no use after it.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    is_last: bool


class Requests:
    """Makes the requests of one client, whose common headers are always the same."""

    def __init__(self, host: str, token: str | None) -> None:
        credential = f"Authorization: Bearer {token}\r\n" if token else ""
        self._common = f" HTTP/1.1\r\nHost: {host}\r\n{credential}"

    def render(self, method: str, target: str, body: bytes | None = None, headers: str = "") -> bytes:
        """The request; *headers* are whole lines, each with its CRLF."""
        if body is None:
            return f"{method} {target}{self._common}{headers}\r\n".encode("latin-1")
        head = (
            f"{method} {target}{self._common}{headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body


class Receiver:
    """Reads the responses of one connection, one after the other, from whatever pieces they come in."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._length: int | None = None
        self._is_chunked = False
        self._chunk_left = 0
        self._is_behind_chunk = False
        self._is_in_trailer = False
        self._body = bytearray()
        self.is_whole = False

    @property
    def has_head(self) -> bool:
        """Whether status and headers of the present response are known."""
        return self.status != 0

    def feed(self, data: bytes) -> None:
        """Take *data*; empty means that the other side closed.

        Raises:
            WireError: not HTTP, or larger than any answer of ours.
        """
        if not data:
            self._end()
            return
        self._buffer += data
        self._go_on()

    def next(self) -> Response | None:
        """The present response when it is whole; the following one is then the present one."""
        if not self.is_whole:
            return None
        is_last = (self._length is None and not self._is_chunked) or "close" in self.headers.get(
            "connection", ""
        ).lower()
        response = Response(self.status, self.headers, bytes(self._body), is_last)
        self._begin()
        self._go_on()
        return response

    def take_body(self) -> bytes:
        """What has come of the body since the last call; for streams."""
        body = bytes(self._body)
        self._body.clear()
        return body

    def _end(self) -> None:
        if self.has_head and self._length is None and not self._is_chunked:
            self.is_whole = True
        else:
            within = "within" if self._buffer or self.has_head else "before"
            raise WireError(f"the connection was closed {within} a response")

    def _go_on(self) -> None:
        while not self.is_whole and self._buffer:
            if not self.has_head:
                if not self._read_head():
                    return
            elif self._is_chunked:
                if not self._read_chunk():
                    return
            elif not self._read_plain():
                return
            if len(self._body) > BODY_BYTES_MAX:
                raise WireError(f"an answer of more than {BODY_BYTES_MAX} bytes")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise WireError(f"a header of more than {HEAD_BYTES_MAX} bytes")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise WireError(f"expected HTTP/1.1, found {first!r:.60}")
        status = int(rest[:3])
        if status < 200:  # 100 Continue and its like announce the real one
            return True
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self.status = status
        if status in (204, 304):
            self._length = 0
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._is_chunked = True
        elif "content-length" in self.headers:
            text = self.headers["content-length"]
            if not text.isdigit() or len(text) > 12:
                raise WireError(f"a Content-Length of {text!r:.30}")
            self._length = int(text)
        self.is_whole = self._length == 0
        return True

    def _read_plain(self) -> bool:
        if self._length is None:
            self._body += self._buffer
            self._buffer.clear()
            return False
        if len(self._buffer) < self._length:
            if self._length > BODY_BYTES_MAX:
                raise WireError(f"an answer of more than {BODY_BYTES_MAX} bytes")
            return False
        self._body += self._buffer[: self._length]
        del self._buffer[: self._length]
        self.is_whole = True
        return True

    def _read_chunk(self) -> bool:
        if self._chunk_left:
            piece = self._buffer[: self._chunk_left]
            del self._buffer[: len(piece)]
            self._body += piece
            self._chunk_left -= len(piece)
            self._is_behind_chunk = not self._chunk_left
            return True
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise WireError("a chunk without a size")
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        if self._is_behind_chunk:
            self._is_behind_chunk = False
            if line:
                raise WireError("a chunk longer than its size")
        elif self._is_in_trailer:
            self.is_whole = not line
        else:
            try:
                self._chunk_left = int(line.split(b";", 1)[0], 16)
            except ValueError:
                raise WireError(f"a chunk of size {line!r:.30}") from None
            self._is_in_trailer = not self._chunk_left
        return True
