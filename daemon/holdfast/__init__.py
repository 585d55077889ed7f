"""Holdfast keeps a chatbot's state: sessions, orders, conversations and sales figures that come back from anything.

``holdfast.open`` and ``holdfast.aio.open`` keep it in this process; the command ``holdfast serve`` keeps it for others,
who use ``holdfast.connect`` and ``holdfast.aio.connect``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast import aio
    from holdfast.blocking import Holdfast
    from holdfast.client.sync import connect
    from holdfast.embedded import open
    from holdfast.errors import (
        BadRequest,
        Conflict,
        DataRefused,
        DirectoryLocked,
        Forbidden,
        ForkedProcess,
        Gone,
        HoldfastError,
        InvalidRecord,
        JournalBroken,
        Leased,
        NotFound,
        SettingsError,
        StorageFull,
        TooLarge,
        Unauthorized,
        Unavailable,
        VersionMismatch,
    )
    from holdfast.events import Event
    from holdfast.ops import Answer, Message, Record

__all__ = [
    "Answer",
    "BadRequest",
    "Conflict",
    "DataRefused",
    "DirectoryLocked",
    "Event",
    "Forbidden",
    "ForkedProcess",
    "Gone",
    "Holdfast",
    "HoldfastError",
    "InvalidRecord",
    "JournalBroken",
    "Leased",
    "Message",
    "NotFound",
    "Record",
    "SettingsError",
    "StorageFull",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "VersionMismatch",
    "__version__",
    "aio",
    "connect",
    "open",
]

# Names are imported when they are first used, so that the command line answers at once.
_HOME = {
    "Answer": "holdfast.ops",
    "Event": "holdfast.events",
    "Holdfast": "holdfast.blocking",
    "Message": "holdfast.ops",
    "Record": "holdfast.ops",
    "connect": "holdfast.client.sync",
    "open": "holdfast.embedded",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "aio":
        return import_module("holdfast.aio")
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "holdfast.errors")), name)
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
