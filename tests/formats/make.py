"""Makes a fixture: a small data directory as the installed version of Holdfast leaves it when it is killed.

``python tests/formats/make.py DIRECTORY`` writes ``DIRECTORY/data`` and ``DIRECTORY/expected.json``, what that version itself
read from it last. It uses nothing that the first version did not have, so that it runs with any. Run it once for each
version that is released, and commit what it makes.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import orjson

from holdfast.clock import Clock, parse_ms
from holdfast.engine import Engine
from holdfast.ops import Batch
from holdfast.recovery import open_engine
from holdfast.settings import Settings

NOW = "2026-11-21T06:00:00.000Z"

FLUSHED: list[dict[str, Any]] = [
    {"op": "session.put", "id": "573001234567", "value": {"currentState": "catalog", "text": "¿cuánto cuesta? 🎶", "n": 2**63 - 1}},
    {"op": "session.put", "id": "573009999999", "value": {"currentState": "paying", "rate": 0.1}, "ttl": 7_200_000},
    {"op": "session.put", "id": "573000000000", "value": {"currentState": "gone"}},
    {"op": "session.patch", "id": "573001234567", "value": {"currentState": "cart", "cart": [{"capacity": "64GB"}]}},
    {"op": "session.lease", "id": "573009999999", "ttl": 3_600, "owner": "worker-1"},
    {"op": "order.put", "id": "1001", "value": {"recipientPhone": "573001234567", "productType": "music", "total": 84900.5}},
    {"op": "order.put", "id": "1002", "value": {"recipientPhone": "573009999999", "productType": "videos"}},
    {"op": "order.complete", "id": "1001", "revenue": "84900.50"},
    {"op": "user.put", "id": "ana", "value": {"name": "Ana", "tags": ["a", "b"]}},
    {"op": "record.put", "collection": "notes", "id": "n1", "value": {"text": "first"}},
    {"op": "conversation.put", "id": "573001234567", "value": {"title": "Música", "topic": 7}},
    {"op": "message.append", "id": "573001234567", "role": "user", "content": "Hola, ¿precio?", "channel": "whatsapp", "external_id": "w1"},
    {"op": "message.append", "id": "573001234567", "role": "assistant", "content": "84.900 🎶", "tokens_used": 12},
    {"op": "message.append", "id": "573009999999", "role": "user", "content": "Ayuda"},
    {"op": "escalation.open", "id": "573009999999", "reason": "asks for a human", "priority": "high"},
]  # fmt: skip
"""What the snapshots hold."""

JOURNALED: list[dict[str, Any]] = [
    {"op": "session.touch", "id": "573001234567"},
    {"op": "session.delete", "id": "573000000000"},
    {"op": "order.cancel", "id": "1002"},
    {"op": "record.patch", "collection": "notes", "id": "n1", "value": {"text": "second"}},
    {"op": "stats.order", "product_type": "movies"},
    {"op": "stats.completion", "revenue": "0.10"},
    {"op": "user.put", "id": "ben", "value": {"name": "Ben"}},
    {"op": "message.append", "id": "573001234567", "role": "user", "content": "Gracias"},
    {"op": "conversation.put", "id": "573009999999", "value": {"topic": 8}},
]
"""What only the journal holds."""


class FixedClock(Clock):
    """Time that does not pass, so that what is made says the same each time."""

    def now_ms(self) -> int:
        return parse_ms(NOW)


def main(place: Path) -> None:
    """Make the fixture in *place*, and end the process as if it were killed."""
    data_dir = place / "data"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    engine = open_engine(Settings(data_dir=data_dir), clock=FixedClock())
    for op in FLUSHED:
        do(engine, op)
    engine.flush("api")
    if hasattr(engine, "backups"):
        engine.backups.take("api")
    for op in JOURNALED:
        do(engine, op)
    expected = orjson.dumps(everything(engine), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    (place / "expected.json").write_bytes(expected + b"\n")
    (data_dir / "holdfast.lock").unlink()
    # Nothing but an index, which SQLite makes anew.
    (data_dir / "archive.db-shm").unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(0)


def do(engine: Engine, op: dict[str, Any]) -> None:
    """Ask for *op*, unless it is one that this version does not know."""
    if not knows_conversations() and op["op"].partition(".")[0] in ("conversation", "message", "escalation"):
        return
    options: dict[str, Any] = {}
    if "retry" in inspect.signature(engine.submit).parameters:
        from holdfast.ops import Retry

        options["retry"] = Retry("11f0c6a5", int(engine.status()["seq"]) + 1)
    (decoded,) = msgspec.json.decode(orjson.dumps({"ops": [op]}), type=Batch).ops
    engine.submit(decoded, **options).wait()


def knows_conversations() -> bool:
    """Whether this version keeps them."""
    import holdfast.ops

    return hasattr(holdfast.ops, "MessageAppend")


def everything(engine: Engine) -> dict[str, Any]:
    """All that readers can see, with versions."""
    names = ["sessions", "orders", "users", *engine.collection_names()]
    if knows_conversations():
        names += ["conversations", "escalations"]
    seen: dict[str, Any] = {"seq": engine.status()["seq"], "sales": orjson.loads(engine.sales()), "records": {}}
    for name in names:
        page = engine.page(name, limit=1_000)
        seen["records"][name] = {item.id: [item.version, orjson.loads(item.value)] for item in page.items}
    if knows_conversations():
        seen["conversations"] = {
            id: orjson.loads(found.value)
            for id in seen["records"]["conversations"]
            if (found := engine.transcripts.conversation(id)) is not None
        }
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
