"""The library with await: ``holdfast.aio.open`` and ``holdfast.aio.connect``."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from holdfast.asynchronous import AsyncHoldfast

if TYPE_CHECKING:
    from holdfast.embedded_aio import AsyncEmbedded

__all__ = ["AsyncHoldfast", "connect", "open"]


def open(data_dir: str | os.PathLike[str] = "data", **settings: Any) -> AbstractAsyncContextManager[AsyncEmbedded]:
    """Open *data_dir* in this process for the length of an async with-block; as ``holdfast.open`` otherwise.

    Example::

        async with holdfast.aio.open("data") as hf:
            await hf.sessions.put("573001234567", {"currentState": "catalog"})
    """
    from holdfast.embedded_aio import open_async  # here, so that a client needs nothing of the engine

    return open_async(data_dir, settings)


def connect(
    address: str = "unix:data/holdfast.sock",
    *,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
) -> AbstractAsyncContextManager[AsyncHoldfast]:
    """Use the daemon at *address* for the length of an async with-block; as ``holdfast.connect`` otherwise.

    Ops that are called while a request is under way leave together in the next one, in the order of their calls.

    Example::

        async with holdfast.aio.connect("http://127.0.0.1:8765", token_file="data/token") as hf:
            await hf.sessions.put("573001234567", {"currentState": "catalog"})
    """
    from holdfast.client.aio import connect_async

    return connect_async(address, token, token_file, timeout)
