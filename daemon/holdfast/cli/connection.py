"""How a command reaches the running daemon."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import click
import msgspec
import orjson

from holdfast import __version__
from holdfast.client.address import Address, address_of, token_of
from holdfast.client.connection import RECEIVE_BYTES, Channel, open_socket
from holdfast.client.messages import NO_SUCH_PATH, refusal_in
from holdfast.client.stream import EVENTS_PATH, stream_request
from holdfast.client.wire import Receiver, Requests, Response, WireError
from holdfast.errors import HoldfastError, MethodNotAllowed, SettingsError, Unauthorized, Unavailable
from holdfast.settings import Settings, UnixAddress, format_duration, load, parse_address

T = TypeVar("T")

DIRECTORY = click.Path(file_okay=False)
"""Of an option; need not exist, and the shell completes directories."""

ANSWER_TIMEOUT_S = 10.0
WORK_TIMEOUT_S = 600.0
"""A flush of a million sessions takes seconds, on a slow disk a minute."""


class Reply(NamedTuple):
    """What the daemon answered.

    Attributes:
        version: of the record in *body*, where there is one.
        body: JSON, or nothing.
    """

    daemon: Daemon
    version: int | None
    body: bytes

    def fields(self) -> dict[str, Any]:
        """The JSON object in *body*.

        Raises:
            Unavailable: it is none, so whoever listens there is no daemon of ours.
        """
        try:
            found = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise Unavailable(
                f"expected a Holdfast daemon at {self.daemon}, found a server that answers without a JSON object"
            )
        return Fields(self.daemon, found)

    def decoded(self, kind: type[T]) -> T:
        """What *body* holds, as *kind*; raises as ``fields``."""
        return self.daemon.understood(self.body, kind)


class Daemon(NamedTuple):
    """Where a daemon listens, with what this caller may show it."""

    address: Address
    token: str | None
    data_dir: Path | None

    def connect(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Connection:
        """A connection for many requests, opened by the first of them; for one thread at a time."""
        return Connection(self, timeout_s)

    def fetch(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Reply:
        """What the daemon answers, on a connection of its own.

        Raises:
            Unavailable: nobody answers there, or not within *timeout_s*; whether the daemon acted is then not known.
            HoldfastError: the daemon refused; the detail is its own.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        with self.connect(timeout_s=timeout_s) as connection:
            return connection.fetch(method, target, headers=headers, body=body)

    def understood(self, raw: bytes | msgspec.Raw, kind: type[T]) -> T:
        """The JSON *raw*, which this daemon has sent, as *kind*.

        Raises:
            Unavailable: it is something else, so whoever listens there is no daemon of ours.
        """
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.DecodeError as error:
            raise Unavailable(f"expected a Holdfast daemon at {self}, found another answer ({error})") from None

    def __str__(self) -> str:
        return str(self.address)


class Connection:
    """One kept-alive connection to a daemon. For one thread at a time; a failed request leaves it closed."""

    def __init__(self, daemon: Daemon, timeout_s: float) -> None:
        self._daemon = daemon
        self._timeout_s = timeout_s
        self._requests = Requests(daemon.address.host_header, daemon.token)
        self._channel = Channel(daemon.address)

    def fetch(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Reply:
        """What the daemon answers to *method* on *target*, a path with its query; raises as ``Daemon.fetch``."""
        request = self._requests.render(method, target, body, _lines_of(headers))
        try:
            response = self._channel.exchange(request, self._timeout_s)
        except TimeoutError as error:
            raise Unavailable(
                f"{self._daemon} did not answer within {format_duration(self._timeout_s)}; see its log"
            ) from error
        except (OSError, WireError) as error:
            raise Unavailable(self._unreachable(error)) from error
        return self._checked(response, target)

    def stream(self, position: int | None, ops: Collection[str], ids: Collection[str]) -> Iterator[bytes]:
        """What the event stream behind *position* brings, piece by piece, until the daemon ends it.

        Raises:
            Unavailable: nobody answers, or it broke off, or nothing came for the connection's timeout.
            HoldfastError: the daemon refused; the detail is its own.
        """
        receiver = Receiver()
        try:
            with open_socket(self._daemon.address, self._timeout_s) as opened:
                opened.sendall(stream_request(self._requests, position, ops, ids))
                while not receiver.is_whole:
                    receiver.feed(opened.recv(RECEIVE_BYTES))
                    if receiver.status == 200:
                        yield receiver.take_body()
        except (OSError, WireError) as error:
            raise Unavailable(self._unreachable(error)) from error
        response = receiver.next()
        assert response is not None
        self._checked(response, EVENTS_PATH)

    def download(self, target: str) -> Iterator[bytes]:
        """The body that the daemon answers to a GET of *target*, piece by piece, of any size; raises as ``stream``."""
        receiver = Receiver()
        try:
            with open_socket(self._daemon.address, self._timeout_s) as opened:
                opened.sendall(self._requests.render("GET", target, None, "Accept: */*\r\n"))
                while not receiver.is_whole:
                    receiver.feed(opened.recv(RECEIVE_BYTES))
                    if receiver.status == 200 and (piece := receiver.take_body()):
                        yield piece
        except (OSError, WireError) as error:
            raise Unavailable(self._unreachable(error)) from error
        response = receiver.next()
        assert response is not None
        if response.status >= 400:
            raise self._refusal(response, target)

    def upload(self, target: str, chunks: Iterable[bytes]) -> Reply:
        """What the daemon answers to a POST of *chunks* to *target*; raises as ``stream``."""
        receiver = Receiver()
        headers = "Accept: application/json\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n"
        try:
            with open_socket(self._daemon.address, self._timeout_s) as opened:
                with suppress(BrokenPipeError, ConnectionResetError):  # refused before the end: the answer says why
                    opened.sendall(self._requests.render("POST", target, None, headers))
                    for chunk in filter(None, chunks):
                        opened.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                    opened.sendall(b"0\r\n\r\n")
                while not receiver.is_whole:
                    receiver.feed(opened.recv(RECEIVE_BYTES))
        except (OSError, WireError) as error:
            raise Unavailable(self._unreachable(error)) from error
        response = receiver.next()
        assert response is not None
        return self._checked(response, target)

    def close(self) -> None:
        """Close it; the next request opens it again."""
        self._channel.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unreachable(self, error: Exception) -> str:
        daemon = self._daemon
        if isinstance(error, PermissionError):
            return f"the socket {daemon} may not be opened by this user; run as the daemon's user or group"
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            start = f"holdfast serve --data-dir {daemon.data_dir}" if daemon.data_dir else "holdfast serve"
            return f"no daemon is running at {daemon}; start one with `{start}`, or name another with --connect"
        if isinstance(error, OSError) and error.errno is not None:
            return f"{daemon} cannot be reached ({error.strerror}); name another with --connect"
        return f"{daemon} broke off without an answer ({error or type(error).__name__}); see the daemon's log"

    def _checked(self, response: Response, target: str) -> Reply:
        if response.status == 204:
            return Reply(self._daemon, None, b"")
        if response.status >= 400:
            raise self._refusal(response, target)
        tag = response.headers.get("etag", "").strip('W/"')
        reply = Reply(self._daemon, int(tag) if tag.isascii() and tag.isdigit() else None, response.body)
        if response.body and not response.body.startswith(b"{"):
            # Of a large page no more is looked at here.
            reply.fields()
        return reply

    def _refusal(self, response: Response, target: str) -> HoldfastError:
        error = refusal_in(response)
        if isinstance(error, Unauthorized):
            return Unauthorized(f"{self._daemon}: {error.detail}; give a token with HOLDFAST_TOKEN or --token-file")
        if isinstance(error, MethodNotAllowed) or error.detail.startswith(NO_SUCH_PATH):
            return HoldfastError(self._other_version(response.headers.get("server", ""), target))
        if isinstance(error, SettingsError):
            # Those of the daemon: the command line was right.
            return HoldfastError(error.detail)
        return error

    def _other_version(self, server: str, target: str) -> str:
        path = target.partition("?")[0]
        name, _, version = server.partition("/")
        found = version if name == "holdfast" and version else "of another version"
        return (
            f"the daemon at {self._daemon} is {found}, this command line {__version__}, and the daemon does not know "
            f"{path}; run the same version of both"
        )


class Fields(dict[str, Any]):
    """A JSON object from *daemon*; what it should have and has not is told, for it is the daemon's doing."""

    def __init__(self, daemon: Daemon, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self._daemon = daemon

    def __missing__(self, name: str) -> Any:
        raise Unavailable(f"expected a Holdfast daemon at {self._daemon}, found an answer without {name!r}")


def _lines_of(headers: Mapping[str, str] | None) -> str:
    return "".join(
        f"{name}: {value}\r\n" for name, value in ({"Accept": "application/json"} | dict(headers or {})).items()
    )


def find_daemon(connect: str | None, data_dir: str | None, token_file: Path | None) -> Daemon:
    """The daemon at *connect*, else the one that serves *data_dir*, else the one the settings describe.

    A unix socket is preferred; on TCP the token comes from *token_file*, HOLDFAST_TOKEN or the data directory.

    Raises:
        SettingsError: the address, token or settings have no meaning.
    """
    if connect is not None:
        try:
            address = address_of(connect)
        except SettingsError as error:
            raise SettingsError(f"--connect: {error}") from None
        return Daemon(address, token_of(None, token_file), None)
    settings = settings_to_reach(data_dir)
    try:
        addresses = [parse_address(address, settings.data_dir) for address in settings.listen]
    except ValueError as error:
        # Such as a directory whose name is too long for a socket in it.
        raise SettingsError(f"listen: {error}") from error
    found = next((one for one in addresses if isinstance(one, UnixAddress)), addresses[0])
    if isinstance(found, UnixAddress):
        return Daemon(Address(str(found.path), "", 0, False), token_of(None, token_file), settings.data_dir)
    token = token_of(None, token_file)
    first_token = settings.data_dir / "token"
    if token is None and first_token.exists():
        token = token_of(None, first_token)
    return Daemon(Address("", found.host, found.port, False), token, settings.data_dir)


def config_file() -> Path | None:
    """The settings file that ``holdfast --config FILE COMMAND``, or HOLDFAST_CONFIG, names."""
    ctx = click.get_current_context(silent=True)
    found: Path | None = None if ctx is None else ctx.find_root().params.get("config")
    return found


def settings_of(data_dir: str | None) -> Settings:
    """The settings a daemon on *data_dir* would have: for commands that open the data themselves.

    Raises:
        SettingsError: they are invalid; by others than the daemon's the data would be read wrong.
    """
    return load({"data_dir": data_dir} if data_dir is not None else {}, os.environ, config_file()).settings


def settings_to_reach(data_dir: str | None) -> Settings:
    """As ``settings_of``, as far as a command needs them to find the daemon or the directory.

    Where the directory is named, a broken settings file does not matter: `holdfast reload` must reach the daemon that
    has to say what is wrong with it.

    Raises:
        SettingsError: the settings are invalid, and so the directory is not known.
    """
    try:
        return settings_of(data_dir)
    except SettingsError:
        known = data_dir or os.environ.get("HOLDFAST_DATA_DIR") or os.environ.get("DATA_DIR")
        if not known:
            raise
        return Settings(data_dir=Path(known).absolute())


def daemon_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name a daemon, for a group: they may stand before the subcommand as well as after it."""
    for option in (
        click.option(
            "--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Holds the token for http://."
        ),
        click.option("--connect", metavar="ADDRESS", help="unix:PATH or http://HOST:PORT, instead of --data-dir."),
        click.option("--data-dir", type=DIRECTORY, metavar="DIR", help="The data directory that the daemon serves."),
    ):
        command = option(command)
    return command


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give *command* the options that name a daemon; it receives the ``Daemon`` as its first argument."""

    @daemon_flags
    @wraps(command)
    def with_daemon(*args: Any, **kw: Any) -> Any:
        for name in _FLAGS:
            del kw[name]
        return command(named_daemon(click.get_current_context()), *args, **kw)

    return with_daemon


_FLAGS = ("connect", "data_dir", "token_file")


def named_daemon(ctx: click.Context) -> Daemon:
    """The daemon that the options of this command, or of the group before it, name."""
    found: dict[str, Any] = dict.fromkeys(_FLAGS)
    level: click.Context | None = ctx
    while level is not None:
        for name in _FLAGS:
            found[name] = level.params.get(name) if found[name] is None else found[name]
        level = level.parent
    if found["connect"] is not None and found["data_dir"] is not None:
        raise click.UsageError("give either --connect or --data-dir, not both")
    return find_daemon(**found)
