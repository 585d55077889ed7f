"""The sockets the service listens on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from holdfast.errors import SettingsError
from holdfast.settings import TcpAddress, UnixAddress, parse_address

BACKLOG = 1024
"""Clients that the kernel lets wait; on a unix socket the next one is refused."""

UNIX_MODE = 0o660
"""The file's permissions are the credential: owner and group may connect."""


class Listener:
    """One listening socket, from its making to ``close``."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        """Take *sock* over; *path* is the socket file we made ourselves, to be removed at the end."""
        self.sock = sock
        self._path = path
        self._made = os.lstat(path) if path else None

    @property
    def is_local(self) -> bool:
        """Whether it is a unix socket."""
        return self.sock.family == socket.AF_UNIX

    @property
    def host(self) -> str:
        """The address of a TCP socket."""
        return str(self.sock.getsockname()[0])

    def __str__(self) -> str:
        name = self.sock.getsockname()
        if self.is_local:
            return f"unix:{os.fsdecode(name)}"
        return f"tcp:[{name[0]}]:{name[1]}" if ":" in name[0] else f"tcp:{name[0]}:{name[1]}"

    def deepen_queue(self) -> None:
        """Let BACKLOG clients wait in the kernel, after the event loop has set a queue of its own."""
        self.sock.listen(BACKLOG)

    def remove_file(self) -> None:
        """Remove the socket file, unless somebody has put another in its place."""
        if self._path is None or self._made is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._path), self._made):
                os.unlink(self._path)


def open_listeners(addresses: tuple[str, ...], data_dir: Path) -> list[Listener]:
    """Listen on *addresses*. Call it only while the lock of *data_dir* is held: a socket file left there is then stale.

    Raises:
        SettingsError: an address that cannot be used, with the reason; none of the others stays open.
    """
    listeners: list[Listener] = []
    try:
        for text in addresses:
            try:
                address = parse_address(text, data_dir)
            except ValueError as error:
                raise SettingsError(f"listen: {error}") from None
            try:
                listeners.append(_listen_unix(address) if isinstance(address, UnixAddress) else _listen_tcp(address))
            except OSError as error:
                raise SettingsError(
                    f"listen: cannot listen on {text}: {error.strerror or error}{_advice(error)}"
                ) from error
    except BaseException:
        for listener in listeners:
            listener.sock.close()
            listener.remove_file()
        raise
    return listeners


def inherited_listeners(sockets: list[socket.socket]) -> list[Listener]:
    """Take over *sockets* that somebody else opened and bound, such as systemd.

    Raises:
        SettingsError: one of them is no stream socket, or TCP that is not loopback.
    """
    listeners = []
    for sock in sockets:
        sock.setblocking(False)
        if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            raise SettingsError(
                f"expected inherited sockets to be unix or TCP stream sockets, found {sock.family.name}"
            )
        listener = Listener(sock)
        if not listener.is_local:
            _refuse_public(listener)
        listeners.append(listener)
    return listeners


def _refuse_public(listener: Listener) -> None:
    try:
        parse_address(str(listener), Path())
    except ValueError as error:
        raise SettingsError(f"inherited socket: {error}") from None


def _listen_unix(address: UnixAddress) -> Listener:
    path = address.path
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(os.fspath(path))
        # Before listen(): until then nobody can connect, whatever the umask gave to the file.
        os.chmod(path, UNIX_MODE)
        sock.listen(BACKLOG)
        return Listener(sock, path)
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SettingsError(f"listen: expected nothing or a socket at {path}, found another kind of file; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        else:
            raise SettingsError(f"listen: another program answers on {path}; stop it or choose another path")
    path.unlink(missing_ok=True)


def _listen_tcp(address: TcpAddress) -> Listener:
    """One socket; for ``localhost`` the first family the system has, so that port 0 means one port."""
    family, _, _, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
        listener = Listener(sock)
        # Again after the name was resolved: what the hosts file calls localhost is not ours to trust.
        _refuse_public(listener)
        return listener
    except BaseException:
        sock.close()
        raise


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "; another program uses this port: stop it or choose another"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "; choose a path or port this user may use"
    return ""
