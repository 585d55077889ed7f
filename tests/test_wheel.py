"""The timer wheel: nobody is looked at late, nobody is scanned."""

from __future__ import annotations

import pytest

from holdfast.core.wheel import MINUTE_MS, Wheel


@pytest.mark.parametrize("due_ms", [0, 1, MINUTE_MS - 1, MINUTE_MS, MINUTE_MS + 1, 10 * MINUTE_MS])
def test_an_id_comes_within_the_minute_after_it_is_due(due_ms: int) -> None:
    """Never before it is due, and at the latest one minute after."""
    wheel = Wheel()
    wheel.schedule("a", due_ms)

    assert wheel.take_due(due_ms, 10) == set()
    assert wheel.take_due(due_ms + MINUTE_MS, 10) == {"a"}


def test_an_id_is_taken_once() -> None:
    """Whoever takes it must schedule it again."""
    wheel = Wheel()
    wheel.schedule("a", 0)
    wheel.schedule("a", 0)

    assert wheel.take_due(MINUTE_MS, 10) == {"a"}
    assert wheel.take_due(10 * MINUTE_MS, 10) == set()


def test_large_buckets_come_in_portions() -> None:
    """No more than the limit at a time, each id exactly once, until none is left."""
    wheel = Wheel()
    wheel.schedule_all(5, [str(n) for n in range(25)])
    wheel.schedule_all(6, [str(n) for n in range(25, 40)])

    portions = []
    while portion := wheel.take_due(10 * MINUTE_MS, 10):
        portions.append(portion)

    assert max(map(len, portions)) == 10
    assert sorted(map(int, (id for portion in portions for id in portion))) == list(range(40))
    assert len(wheel) == 0


def test_what_is_not_due_is_not_looked_at() -> None:
    """Buckets of later minutes stay whole."""
    wheel = Wheel()
    wheel.schedule_all(100, map(str, range(1000)))

    assert wheel.take_due(99 * MINUTE_MS, 10_000) == set()
    assert len(wheel) == 1000


def test_a_cleared_wheel_holds_nobody() -> None:
    """After clear only what is scheduled anew comes."""
    wheel = Wheel()
    wheel.schedule("a", 0)

    wheel.clear()

    assert wheel.take_due(MINUTE_MS, 10) == set()
