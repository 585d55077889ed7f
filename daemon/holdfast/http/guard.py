"""Whether a request may pass: by its Host, its origin, its token."""

from __future__ import annotations

import re
import time
from urllib.parse import urlsplit

import structlog

from holdfast.errors import DataRefused, Forbidden, HoldfastError, TooManyRequests, Unauthorized
from holdfast.http.auth import Scope, TokenStore
from holdfast.http.request import Request
from holdfast.http.throttle import Throttle

FAILURES_MAX = 20
FAILURES_PERIOD_S = 60.0
LOG_LINES_MAX = 10
"""Refusals logged in a minute; a flood of guesses must not fill the log."""

OPEN_PATHS = (["healthz"], ["readyz"])
_DOCUMENTS = (["docs"], ["openapi.json"])
_HINT = (
    "; to read it in a browser, which sends none: `holdfast openapi --html > holdfast.html`, "
    "or curl --unix-socket DATA_DIR/holdfast.sock http://localhost/docs > holdfast.html"
)
"""Whoever comes without a token to read about tokens is told another way in."""

_READING = ("GET", "HEAD", "OPTIONS")
_LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(?::[0-9]{1,5})?")
_HOSTS_REMEMBERED_MAX = 64
_ACCEPTED_REMEMBERED_MAX = 64

log = structlog.get_logger()


class Guard:
    """Decides for every request, before anything of it but the header is read."""

    def __init__(self, tokens: TokenStore) -> None:
        self._tokens = tokens
        self._names = set(_LOOPBACK_NAMES)
        self._hosts_seen: set[str] = set()
        # Authorization headers as they were accepted, so that not every request is hashed; until the tokens change.
        self._accepted: dict[str, Scope] = {}
        self._failures = Throttle(FAILURES_MAX, FAILURES_PERIOD_S)
        self._log_lines = Throttle(LOG_LINES_MAX, 60.0)

    def add_name(self, host: str) -> None:
        """Accept *host*, an address we listen on, in the Host header."""
        self._names.add(f"[{host}]" if ":" in host else host)

    def refresh(self) -> None:
        """Follow a change of the token files; a file that cannot be used leaves the tokens as they were."""
        try:
            if self._tokens.refresh():
                self._accepted.clear()
        except (DataRefused, OSError) as error:
            log.error("tokens.reload_failed", reason=str(error))

    def check(self, request: Request) -> None:
        """Return when *request* may pass.

        Raises:
            Forbidden: by its Host (DNS rebinding), its origin, or a read token on a write.
            Unauthorized: without a token we know.
            TooManyRequests: the same after FAILURES_MAX failures in a minute; a right token still passes.
        """
        try:
            if request.method not in _READING:
                _check_origin(request)
            if not request.is_local:
                self._check_host(request.headers.get("Host", ""))
                if request.segments not in OPEN_PATHS:
                    self._check_token(request)
        except HoldfastError as error:
            if self._log_lines.allows("", time.monotonic()):
                log.warning("request.refused", code=error.code, peer=request.peer, reason=str(error))
            raise

    def _check_host(self, host: str) -> None:
        if host in self._hosts_seen:
            return
        match = _HOST.fullmatch(host)
        if match is None or match[1].lower() not in self._names:
            raise Forbidden("expected a Host header that names this machine, such as 127.0.0.1 or localhost")
        if len(self._hosts_seen) < _HOSTS_REMEMBERED_MAX:
            self._hosts_seen.add(host)

    def _check_token(self, request: Request) -> None:
        authorization = request.headers.get("Authorization", "")
        # A guess is found only when all of it is right, so how long the look takes tells nothing.
        scope = self._accepted.get(authorization)
        if scope is None:
            scope = self._scope(authorization)
            if scope is not None and len(self._accepted) < _ACCEPTED_REMEMBERED_MAX:
                self._accepted[authorization] = scope
        if scope is None:
            if not self._failures.allows(request.peer, time.monotonic()):
                raise TooManyRequests("too many requests without a known token from this address; wait a minute")
            hint = _HINT if request.segments in _DOCUMENTS else ""
            raise Unauthorized(f"expected Authorization: Bearer TOKEN with a token of `holdfast token`{hint}")
        if scope == "read" and request.method not in _READING:
            raise Forbidden("this token may read only; use one made without --read-only")

    def _scope(self, authorization: str) -> Scope | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        token = token.strip()
        return self._tokens.scope_of(token)


def _check_origin(request: Request) -> None:
    """Refuse a write that a page of another site makes in a browser; other clients send neither header."""
    headers = request.headers
    if headers.get("Sec-Fetch-Site") == "cross-site":
        raise Forbidden("a page of another site may not write here")
    origin = headers.get("Origin")
    if origin is not None:
        try:
            is_same = urlsplit(origin).netloc.lower() == headers.get("Host", "").lower() != ""
        except ValueError:
            is_same = False
        if not is_same:
            raise Forbidden(
                "expected an Origin equal to the Host, found another: a page of another site may not write here"
            )
