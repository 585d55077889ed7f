"""How a command reaches the running daemon."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import orjson

from holdfast.errors import HoldfastError, SettingsError, Unauthorized, Unavailable
from holdfast.settings import Settings, TcpAddress, UnixAddress, format_duration, load, parse_address

ANSWER_TIMEOUT_S = 10.0
ANSWER_BYTES_MAX = 64 << 20


class Daemon(NamedTuple):
    """Where a daemon listens, with what this caller may show it. Each request has a connection of its own."""

    address: UnixAddress | TcpAddress
    token: str | None
    data_dir: Path | None

    def request(self, method: str, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """The JSON object that the daemon answers.

        Raises:
            Unavailable: nobody answers there, or not within *timeout_s*; whether the daemon acted is then not known.
            HoldfastError: the daemon refused; the detail is its own.
        """
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        connection = self._connection(timeout_s)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read(ANSWER_BYTES_MAX)
            if response.length:
                raise http.client.IncompleteRead(body, response.length)
        except TimeoutError as error:
            raise Unavailable(f"{self} did not answer within {format_duration(timeout_s)}; see its log") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(self._unreachable(error)) from error
        finally:
            connection.close()
        return self._answer(response.status, body)

    def __str__(self) -> str:
        match self.address:
            case UnixAddress(path):
                return f"unix:{path}"
            case TcpAddress(host, port):
                return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        match self.address:
            case UnixAddress(path):
                return _UnixConnection(path, timeout_s)
            case TcpAddress(host, port):
                return http.client.HTTPConnection(host, port, timeout=timeout_s)

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, PermissionError):
            return f"the socket {self} may not be opened by this user; run as the daemon's user or group"
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            start = f"holdfast serve --data-dir {self.data_dir}" if self.data_dir else "holdfast serve"
            return f"no daemon is running at {self}; start one with `{start}`, or name another with --connect"
        return f"{self} broke off without an answer ({error or type(error).__name__}); see the daemon's log"

    def _answer(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise Unavailable(
                f"expected a Holdfast daemon at {self}, found a server that answers {status} without JSON"
            )
        if status == Unauthorized.status:
            raise Unauthorized(f"{self}: {answer.get('detail')}; give a token with HOLDFAST_TOKEN or --token-file")
        if status >= 400:
            raise HoldfastError(str(answer.get("detail", f"the daemon answered {status}")))
        return answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


def find_daemon(connect: str | None, data_dir: str | None, token_file: Path | None) -> Daemon:
    """The daemon at *connect*, else the one that serves *data_dir*, else the one the settings describe.

    A unix socket is preferred; on TCP the token comes from *token_file*, HOLDFAST_TOKEN or the data directory.

    Raises:
        SettingsError: the address, token or settings have no meaning.
    """
    if connect is not None:
        return Daemon(_address_of(connect), _token(token_file, None), None)
    settings = settings_of(data_dir)
    addresses = [parse_address(address, settings.data_dir) for address in settings.listen]
    address = next((one for one in addresses if isinstance(one, UnixAddress)), addresses[0])
    first_token = settings.data_dir / "token" if isinstance(address, TcpAddress) else None
    return Daemon(address, _token(token_file, first_token), settings.data_dir)


def settings_of(data_dir: str | None) -> Settings:
    """The settings a daemon on *data_dir* would have, as far as a command needs them.

    Where the directory is named, a broken settings file does not matter: `holdfast reload` must reach the daemon that
    has to say what is wrong with it.

    Raises:
        SettingsError: the settings are invalid, and so the directory is not known.
    """
    named = {"data_dir": data_dir} if data_dir is not None else {}
    try:
        return load(named, os.environ).settings
    except SettingsError:
        known = data_dir or os.environ.get("HOLDFAST_DATA_DIR") or os.environ.get("DATA_DIR")
        if not known:
            raise
        return Settings(data_dir=Path(known).absolute())


def _address_of(connect: str) -> UnixAddress | TcpAddress:
    if connect.startswith("unix:") and connect != "unix:":
        try:
            return parse_address(connect, Path())
        except ValueError as error:
            raise SettingsError(f"--connect: {error}") from error
    try:
        url = urlsplit(connect)
        if url.scheme in ("http", "tcp") and url.hostname and url.path in ("", "/"):
            return TcpAddress(url.hostname, url.port or 8765)
    except ValueError:
        pass
    raise SettingsError(f"--connect: expected unix:PATH or http://HOST:PORT, found {connect!r}")


def _token(token_file: Path | None, first_token: Path | None) -> str | None:
    token = os.environ.get("HOLDFAST_TOKEN") if token_file is None else None
    source = "HOLDFAST_TOKEN"
    path = token_file or first_token
    if not token and path is not None:
        source = str(path)
        try:
            token = path.read_text("ascii", "replace")
        except FileNotFoundError:
            if path == token_file:
                raise SettingsError(f"--token-file: no such file: {path}") from None
            return None
    if not token:
        return None
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError(f"{source}: expected one token of printable ASCII, found something else")
    return token


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give *command* the options that name a daemon; it receives the ``Daemon`` as its first argument."""

    @click.option("--data-dir", metavar="DIR", help="The data directory that the daemon serves.")
    @click.option("--connect", metavar="ADDRESS", help="unix:PATH or http://HOST:PORT, instead of --data-dir.")
    @click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Holds the token for http://.")
    @wraps(command)
    def with_daemon(*args: Any, connect: str | None, data_dir: str | None, token_file: Path | None, **kw: Any) -> Any:
        if connect is not None and data_dir is not None:
            raise click.UsageError("give either --connect or --data-dir, not both")
        return command(find_daemon(connect, data_dir, token_file), *args, **kw)

    return with_daemon
