"""The record that everything here is measured with: a session of 180 bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

RECORD_BYTES = 180
SEED = 20261121
"""Of every random choice in a run."""

_MOMENT = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def id_of(number: int) -> str:
    """The phone of session *number*."""
    return f"57{3_000_000_000 + number}"


def session_of(id: str) -> dict[str, Any]:
    """A session that was active when this process started; RECORD_BYTES as compact JSON."""
    return {
        "recipientPhone": id,
        "currentState": "choosing_size",
        "lastActivity": _MOMENT,
        "pendingData": {"productType": "music", "capacity": "64GB"},
        "buyingIntent": 50,
    }
