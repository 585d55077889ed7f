"""What a handler sees of one HTTP request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp.http import RawRequestMessage
from multidict import CIMultiDictProxy

from holdfast.errors import BadRequest, UnsupportedMediaType
from holdfast.http.problem import readable

if TYPE_CHECKING:
    from holdfast.http.connection import Connection
    from holdfast.http.routes.route import Route

QUERY_FIELDS_MAX = 32

_JSON_TYPES = frozenset(("application/json", "application/json; charset=utf-8"))
PATCH_TYPE = "application/merge-patch+json"


class Request:
    """One request; lives until its reply is sent.

    Attributes:
        method: upper case, as sent.
        segments: the path between its slashes, still percent-encoded; ``("v1", "sessions", "57300")``.
        route: the one that was chosen for it; not there before.
    """

    __slots__ = ("_connection", "headers", "method", "query_text", "route", "segments")

    route: Route[Any]

    def __init__(self, message: RawRequestMessage, connection: Connection) -> None:
        self.method: str = message.method
        self.headers: CIMultiDictProxy[str] = message.headers
        self._connection = connection
        target: str = message.path
        if not target.startswith("/"):
            # The absolute form, as a client sends it that takes us for a proxy, or "*".
            target = message.url.raw_path_qs
        path, _, self.query_text = target.partition("?")
        self.segments = path.split("/")[1:]

    @property
    def is_local(self) -> bool:
        """It came by the unix socket, whose file permissions are the credential."""
        return self._connection.is_local

    @property
    def is_first(self) -> bool:
        """Of its connection."""
        return self._connection.is_new

    @property
    def is_gone(self) -> bool:
        """Whether the client has hung up, so that nobody reads the reply."""
        transport = self._connection.transport
        return transport is None or transport.is_closing()

    @property
    def peer(self) -> str:
        """The address it came from; empty on the unix socket."""
        return self._connection.peer

    def query(self) -> dict[str, str]:
        """The query parameters by name.

        Raises:
            BadRequest: one that its route does not declare, one that is given twice, or bytes that are not UTF-8.
        """
        if not self.query_text:
            return {}
        pairs = self._query_pairs(self.query_text)
        values = dict(pairs)
        if len(values) != len(pairs):
            raise BadRequest("a query parameter is given twice; send each at most once")
        return values

    def query_lists(self) -> dict[str, list[str]]:
        """The query parameters by name, each with all its values: repeated, or with commas between them.

        A comma that is percent-encoded is part of a value.

        Raises:
            BadRequest: one that its route does not declare, or bytes that are not UTF-8.
        """
        values: dict[str, list[str]] = {}
        for pair in filter(None, self.query_text.split("&")):
            name, _, text = pair.partition("=")
            for part in text.split(","):
                for known, value in self._query_pairs(f"{name}={part}"):
                    values.setdefault(known, []).append(value)
        return values

    def _query_pairs(self, query_text: str) -> list[tuple[str, str]]:
        try:
            text = query_text.encode("utf-8", "surrogateescape").decode("utf-8")
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
        except ValueError:
            raise BadRequest(
                f"expected a query of at most {QUERY_FIELDS_MAX} parameters in percent-encoded UTF-8, found another"
            ) from None
        known = [field.name for field in self.route.query]
        for name, _ in pairs:
            if name not in known:
                raise BadRequest(
                    f"unknown query parameter {readable(name)[:64]!r}; this path takes {', '.join(known) or 'none'}"
                )
        return pairs

    async def body(self) -> bytes:
        """The whole body, which must be JSON by its Content-Type when it has one.

        Raises:
            UnsupportedMediaType: the Content-Type or Content-Encoding is another.
            TooLarge: above ``limits.body_bytes``.
            RequestTimeout: it did not come within ``limits.body_timeout``.
        """
        if not self._connection.has_body:
            return b""
        content_type = self.headers.get("Content-Type")
        if content_type is not None and content_type not in _JSON_TYPES:
            self._check_content_type(content_type)
        encoding = self.headers.get("Content-Encoding")
        if encoding is not None and encoding.lower() != "identity":
            raise UnsupportedMediaType("expected a body that is not compressed; send it without Content-Encoding")
        arrived = self._connection.arrived_body()
        return await self._connection.read_body(self.headers) if arrived is None else arrived

    def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any size and kind, for who stores it elsewhere.

        Raises, while it is read:
            RequestTimeout: nothing of it came within ``limits.body_timeout``.
            ConnectionError: the client went away.
        """
        return self._connection.body_parts(self.headers)

    def _check_content_type(self, content_type: str) -> None:
        media_type, _, parameters = content_type.lower().partition(";")
        charset = parameters.strip().removeprefix("charset=").strip('"')
        is_json = media_type.strip() == "application/json" or (
            media_type.strip() == PATCH_TYPE and self.method == "PATCH"
        )
        if not is_json or charset not in ("", "utf-8"):
            raise UnsupportedMediaType(
                f"expected Content-Type: application/json in UTF-8, found {readable(content_type)[:64]!r}"
            )


def decoded_segment(segment: str) -> str:
    """An id or name from the path, percent-decoded once, so that ``a%2Fb`` is the id ``a/b``.

    Raises:
        BadRequest: broken percent-encoding, or bytes that are not UTF-8.
    """
    if "%" not in segment and segment.isascii():
        return segment
    raw = segment.encode("utf-8", "surrogateescape")
    parts = raw.split(b"%")
    if any(not _is_hex(part[:2]) for part in parts[1:]):
        raise BadRequest("expected two hexadecimal digits after each % in the path; encode a literal % as %25")
    try:
        return unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("expected percent-encoded UTF-8 in the path, found other bytes") from None


def _is_hex(digits: bytes) -> bool:
    return len(digits) == 2 and all(digit in b"0123456789abcdefABCDEF" for digit in digits)
