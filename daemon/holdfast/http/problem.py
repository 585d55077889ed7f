"""How an error looks over HTTP (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from holdfast.errors import HoldfastError, TooManyRequests, Unauthorized, Unavailable
from holdfast.http.reply import Reply, encode_json

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_S = 1
"""Starting, stopping and a burst of connections are over within seconds."""

GUESSING_RETRY_AFTER_S = 60

_HEADERS: dict[type[HoldfastError], str] = {
    Unauthorized: 'WWW-Authenticate: Bearer realm="holdfast"\r\n',
    TooManyRequests: f"Retry-After: {GUESSING_RETRY_AFTER_S}\r\n",
    Unavailable: f"Retry-After: {RETRY_AFTER_S}\r\n",
}


def problem(error: HoldfastError, *, status: int | None = None, headers: str = "", is_last: bool = False) -> Reply:
    """The reply that tells *error*; *status* where HTTP has a finer one than the error's own."""
    status = status or error.status
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": error.code,
        "detail": readable(error.detail),
    }
    index = getattr(error, "index", None)
    if index is not None:
        body["index"] = index
    for kind, lines in _HEADERS.items():
        if isinstance(error, kind):
            headers += lines
    return Reply(status, encode_json(body), headers, PROBLEM_JSON, is_last)


def readable(text: str) -> str:
    """*text* as valid Unicode: what a client sent may hold lone surrogates, and come back in a detail."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
