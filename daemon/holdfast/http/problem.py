"""How an error looks over HTTP (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from holdfast.errors import Gone, HoldfastError, TooManyRequests, Unauthorized, Unavailable
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


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error: what was expected, what was found, what to do.

    Attributes:
        type: says nothing that *code* does not.
        title: the name of the status.
        code: what a program looks at; stable.
        detail: what a person reads.
        index: of the op that was refused, in an atomic batch.
        oldest_seq: of the events that can still be read, when older ones were asked for.
    """

    type: str
    title: str
    status: int
    code: str
    detail: str
    index: int | None = None
    oldest_seq: int | None = None


def problem(error: HoldfastError, *, status: int | None = None, headers: str = "", is_last: bool = False) -> Reply:
    """The reply that tells *error*; *status* where HTTP has a finer one than the error's own."""
    status = status or error.status
    body = Problem("about:blank", HTTPStatus(status).phrase, status, error.code, readable(error.detail), error.index)
    if isinstance(error, Gone):
        body = msgspec.structs.replace(body, oldest_seq=error.oldest_seq)
    for kind, lines in _HEADERS.items():
        if isinstance(error, kind):
            headers += lines
    return Reply(status, encode_json(body), headers, PROBLEM_JSON, is_last)


def readable(text: str) -> str:
    """*text* as valid Unicode: what a client sent may hold lone surrogates, and come back in a detail."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
