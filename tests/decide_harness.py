"""A state to decide on, without engine or disk."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from holdfast import record
from holdfast.core.decide import decide
from holdfast.core.event import encode_event
from holdfast.core.rules import Rules
from holdfast.core.state import State, answer_of, apply
from holdfast.errors import HoldfastError
from holdfast.ops import Answer, AnyOp, MessageExpire
from tests.engine_harness import NOW_MS


class World:
    """A state, its rules and its time."""

    def __init__(self, **rules: Any) -> None:
        self.state = State()
        self.rules = Rules(**rules)
        self.now_ms = NOW_MS

    def do(self, op: AnyOp | MessageExpire) -> Answer:
        """Decide and apply *op*."""
        decided = decide(self.state, op, self.rules, self.state.seq + 1, self.now_ms)
        if isinstance(decided, Answer):
            return decided
        encode_event(decided)
        apply(self.state, decided, self.now_ms, undoable=False)
        return answer_of(decided, decided.seq)

    def refused(self, op: AnyOp | MessageExpire, error: type[HoldfastError]) -> str:
        """Why *op* is refused."""
        seq = self.state.seq
        with pytest.raises(error) as found:
            self.do(op)
        assert self.state.seq == seq
        return str(found.value)

    def value(self, collection: str, id: str) -> Any:
        line = self.state.collections[collection].get(id)
        return None if line is None else orjson.loads(record.value_of(line))

    def totals(self) -> tuple[int, int, Any]:
        """Orders, completions, revenue of all time."""
        found = self.state.sales.totals
        return found.get("allTimeOrders", 0), found.get("allTimeCompleted", 0), found.get("allTimeRevenue", 0)
