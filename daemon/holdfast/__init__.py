"""Holdfast keeps a chatbot's state: sessions, orders and sales figures that come back from anything.

``holdfast.open`` and ``holdfast.aio.open`` keep it in this process; the command ``holdfast serve`` keeps it for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast import aio
    from holdfast.embedded import Holdfast, open
    from holdfast.errors import (
        BadRequest,
        Conflict,
        DataRefused,
        DirectoryLocked,
        ForkedProcess,
        HoldfastError,
        InvalidRecord,
        JournalBroken,
        Leased,
        NotFound,
        SettingsError,
        StorageFull,
        TooLarge,
        Unavailable,
        VersionMismatch,
    )

__all__ = [
    "BadRequest",
    "Conflict",
    "DataRefused",
    "DirectoryLocked",
    "ForkedProcess",
    "Holdfast",
    "HoldfastError",
    "InvalidRecord",
    "JournalBroken",
    "Leased",
    "NotFound",
    "SettingsError",
    "StorageFull",
    "TooLarge",
    "Unavailable",
    "VersionMismatch",
    "__version__",
    "aio",
    "open",
]

# Names are imported when they are first used, so that the command line answers at once.
_HOME = {"Holdfast": "holdfast.embedded", "open": "holdfast.embedded"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "aio":
        return import_module("holdfast.aio")
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "holdfast.errors")), name)
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
