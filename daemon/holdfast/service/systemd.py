"""What Holdfast says to systemd, which needs no library.

The notify protocol of sd_notify(3) is one datagram of ``KEY=VALUE`` lines; socket activation of
sd_listen_fds(3) is descriptors from 3 upwards, counted in the environment. Outside systemd all of
this does nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import MutableMapping

from holdfast.errors import SettingsError

LISTEN_FDS_START = 3


class Notifier:
    """Sends state to the service manager; every method returns at once, may be called from any thread, and never raises.

    Attributes:
        is_connected: False outside systemd, where every call does nothing.
        watchdog_s: how often the manager wants a sign of life, None when it does not.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Take ``NOTIFY_SOCKET`` and the watchdog variables out of *environ*, so that no child speaks in our name."""
        address = environ.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of Linux's abstract namespace, which no environment can hold.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.is_connected = bool(address)
        self.watchdog_s = _watchdog(environ)

    def ready(self, status: str) -> None:
        """The daemon listens, or a reload is over."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """The stop begins."""
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """The line that ``systemctl status`` shows."""
        self._send(f"STATUS={_one_line(status)}")

    def watchdog(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for *seconds* from now before the manager gives up on the start, reload or stop under way."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def barrier(self, timeout_s: float) -> bool:
        """Block until the manager has read all that was sent before, at most *timeout_s*; whether it has."""
        if not self.is_connected:
            return True
        read_end, write_end = os.pipe()
        try:
            sent = self._send("BARRIER=1", write_end)
        finally:
            os.close(write_end)
        try:
            # The manager closes its copy of the write end once it gets there: end of file for us.
            return sent and bool(select.select([read_end], [], [], timeout_s)[0])
        finally:
            os.close(read_end)

    def _send(self, message: str, *descriptors: int) -> bool:
        if not self.is_connected:
            return False
        # A manager that is gone or does not read is no reason to stop serving.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(self._address)
            socket.send_fds(sock, [message.encode("utf-8", "replace")], list(descriptors))
            return True
        return False


def inherited_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that systemd opened for this process, in the order of the socket unit; empty without.

    They do not block and are not inherited further; the variables are taken out of *environ*.

    Raises:
        SettingsError: a descriptor is not a listening stream socket.
    """
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for index in range(int(count)):
        descriptor = LISTEN_FDS_START + index
        try:
            sock = socket.socket(fileno=descriptor)
            is_listening = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            is_listening = False
        if not is_listening:
            name = names[index] if index < len(names) else "unnamed"
            raise SettingsError(
                f"expected a listening stream socket as descriptor {descriptor} ({name}) from systemd, found something"
                " else; use only ListenStream= with Accept=no in the socket unit"
            )
        sock.setblocking(False)
        sock.set_inheritable(False)
        sockets.append(sock)
    return sockets


def _watchdog(environ: MutableMapping[str, str]) -> float | None:
    interval, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not interval.isdecimal() or int(interval) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(interval) / 1_000_000


def _one_line(text: str) -> str:
    # A newline would start the next KEY=VALUE.
    return " ".join(text.split())
