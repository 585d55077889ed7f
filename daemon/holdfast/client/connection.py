"""One connection of a program that waits."""

from __future__ import annotations

import socket
import struct

from holdfast.client import messages
from holdfast.client.address import Address
from holdfast.client.wire import Receiver, Response

RECEIVE_BYTES = 256 << 10


class Channel:
    """One connection, for one thread at a time, with the name under which its requests may be sent again."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._receiver = Receiver()
        self._timeout_s = 0.0
        self.client = messages.new_client_id()
        self.number = 0

    @property
    def is_open(self) -> bool:
        """Whether the next request needs no new connection."""
        return self._socket is not None

    def exchange(self, request: bytes, timeout_s: float) -> Response:
        """Send *request* and return the response.

        Raises:
            TimeoutError: no response within *timeout_s*; the connection is closed.
            OSError, WireError: the connection failed and is closed; whether the request was served is not known.
        """
        try:
            connected = self._socket or self._open(timeout_s)
            if timeout_s != self._timeout_s:
                limit_calls(connected, timeout_s)
                self._timeout_s = timeout_s
            connected.sendall(request)
            receiver = self._receiver
            while True:
                receiver.feed(connected.recv(RECEIVE_BYTES))
                response = receiver.next()
                if response is not None:
                    break
        except BlockingIOError:
            self.close()
            raise TimeoutError from None
        except BaseException:
            self.close()
            raise
        if response.is_last:
            self.close()
        return response

    def take_over(self, other: Channel) -> None:
        """Go on with the connection of *other*, which nobody uses and nobody may use any more."""
        self.close()
        self._socket, self._receiver, self._timeout_s = other._socket, other._receiver, other._timeout_s
        other._socket = None

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._receiver = Receiver()

    def _open(self, timeout_s: float) -> socket.socket:
        opened = open_socket(self._address, timeout_s)
        self._socket = opened
        self._timeout_s = timeout_s
        return opened


def open_socket(address: Address, timeout_s: float) -> socket.socket:
    """A connection to *address*, which blocks for *timeout_s* at most in each call.

    Raises:
        OSError: it could not be opened within *timeout_s*.
    """
    if address.path:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Before connecting: where many wait to be accepted, only a blocking connect waits with them.
            limit_calls(opened, timeout_s)
            opened.connect(address.path)
        except BlockingIOError:
            opened.close()
            raise TimeoutError("the daemon accepts no connection") from None
        except BaseException:
            opened.close()
            raise
        return opened
    opened = socket.create_connection((address.host, address.port), timeout_s)
    try:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = address.tls()
        if tls is not None:
            opened = tls.wrap_socket(opened, server_hostname=address.host)
        limit_calls(opened, timeout_s)
    except BaseException:
        opened.close()
        raise
    return opened


def limit_calls(opened: socket.socket, timeout_s: float) -> None:
    """Let no call on *opened* block for longer than *timeout_s*."""
    if hasattr(opened, "unwrap"):  # of TLS, whose layer takes a call that the kernel ended for one to be repeated
        opened.settimeout(timeout_s)
        return
    # By the kernel and not by settimeout, which adds a poll to every call.
    opened.settimeout(None)
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000) or 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
