"""Data directories as the bots that Holdfast replaces leave them behind, small and made up."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

NAMES = ["Ana Martínez", "李小龙", "Zoë Brontë", "Мария", "José 🎶", "O'Neil"]
TEXTS = [
    "Hola! quiero una USB 🎶",
    "¿cuánto cuesta? [oferta], {sí}",
    'line one\nline two\t"quoted" \\ back',
    "价格, 价格",
]


def write_legacy(data_dir: Path, *, sessions: int = 60, orders: int = 20, seed: int = 7) -> list[dict[str, Any]]:
    """Write a directory with pretty-printed arrays and JavaScript times; returns the sessions, all of them fresh."""
    chance = random.Random(seed)
    now = datetime.now(UTC)
    data_dir.mkdir(mode=0o700, parents=True)
    rows = [
        {
            "recipientPhone": f"57300{number:07d}",
            "currentState": chance.choice(["welcome", "catalog", "done"]),
            "pendingData": {
                "name": chance.choice(NAMES),
                "cart": [{"price": 54900, "n": i} for i in range(number % 3)],
            },
            "lastActivity": _javascript(now - timedelta(minutes=chance.randint(1, 900))),
            "lastText": chance.choice(TEXTS),
            "tags": [],
        }
        for number in range(sessions)
    ]
    _pretty(data_dir / "chat_sessions.json", rows)
    _pretty(
        data_dir / "pending_orders.json",
        [
            {"odooOrderId": 1000 + number, "recipientPhone": "573001", "status": "pending", "price": 84900}
            for number in range(orders)
        ],
    )
    _pretty(
        data_dir / "sales_stats.json",
        {"daily": [], "totals": {"allTimeOrders": 50, "allTimeRevenue": 123456, "allTimeCompleted": 40}},
    )
    return rows


def _javascript(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _pretty(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))
    path.chmod(0o600)
