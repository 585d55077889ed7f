"""Which daemon is meant, and with which token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from holdfast.errors import SettingsError

if TYPE_CHECKING:
    import ssl

PORT = 8765
SECURE_PORT = 443
TOKEN_CHARS_MAX = 256

TIMEOUT_MAX_S = 1e9
"""Thirty years: for those who would rather wait for ever."""


class Address(NamedTuple):
    """A daemon, or the proxy before it.

    Attributes:
        path: of the unix socket; empty on TCP.
        host, port: of TCP.
        is_secure: by TLS, which a proxy before the daemon speaks.
    """

    path: str
    host: str
    port: int
    is_secure: bool

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"{'https' if self.is_secure else 'http'}://{self.host_header}"

    @property
    def host_header(self) -> str:
        """What the Host header says."""
        if self.path:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def tls(self) -> ssl.SSLContext | None:
        """For a secure one the system's trust; None for the others."""
        if not self.is_secure:
            return None
        import ssl  # here, because it takes as long as everything else that a command imports

        return ssl.create_default_context()


def address_of(text: str) -> Address:
    """The address in ``unix:PATH``, ``http://HOST:PORT``, ``tcp:HOST:PORT`` or ``https://HOST``.

    Raises:
        SettingsError: anything else.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest and "\0" not in rest:
        # From now on: a later change of the working directory does not change who is meant.
        return Address(os.path.abspath(rest), "", 0, False)
    try:
        url = urlsplit(f"tcp://{rest}" if scheme == "tcp" and not rest.startswith("//") else text)
        if url.scheme in ("http", "tcp", "https") and url.hostname and url.path in ("", "/") and not url.query:
            is_secure = url.scheme == "https"
            return Address("", url.hostname, url.port or (SECURE_PORT if is_secure else PORT), is_secure)
    except ValueError:
        pass
    raise SettingsError(f"expected unix:PATH or http://HOST:PORT (https://HOST of a proxy), found {text!r:.120}")


def timeout_of(timeout: float) -> float:
    """The *timeout* given, when it is one.

    Raises:
        SettingsError: it is no number of seconds that a call may take.
    """
    if isinstance(timeout, int | float) and 0 < timeout <= TIMEOUT_MAX_S:
        return timeout
    raise SettingsError(f"expected timeout as seconds above 0 and up to {TIMEOUT_MAX_S:g}, found {timeout!r:.80}")


def token_of(token: str | None, token_file: str | os.PathLike[str] | None) -> str | None:
    """The token given, else the one in *token_file*, else the one in HOLDFAST_TOKEN; None when there is none.

    Raises:
        SettingsError: the file cannot be read, or what was found is no token.
    """
    source = "token"
    if token is None and token_file is not None:
        source = os.fspath(token_file)
        try:
            token = Path(token_file).read_text("ascii", "replace")
        except OSError as error:
            raise SettingsError(f"the token file {source} cannot be read: {(error.strerror or '').lower()}") from None
    elif token is None:
        source, token = "HOLDFAST_TOKEN", os.environ.get("HOLDFAST_TOKEN")
    if not token:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token or len(token) > TOKEN_CHARS_MAX:
        raise SettingsError(f"{source}: expected one token of printable ASCII, found something else")
    return token
