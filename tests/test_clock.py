"""The clock: time that does not run backwards, and how it is written and read."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import Clock, format_ms, parse_ms


def test_now_does_not_run_backwards() -> None:
    """A clock set back stands still, and goes on when the wall clock has caught up."""
    with freeze_time("2026-11-21T06:00:00Z") as frozen:
        clock = Clock()
        first = clock.now_ms()
        frozen.tick(timedelta(days=-2))
        during = clock.now_ms()
        frozen.tick(timedelta(days=2, seconds=1))

        assert during >= first
        assert clock.now_ms() == parse_ms("2026-11-21T06:00:01Z")


def test_now_is_not_before_the_last_event() -> None:
    """What the journal says happened is in the past."""
    clock = Clock()
    later = clock.now_ms() + 5_000

    clock.not_before(later)

    assert clock.now_ms() >= later


def test_the_first_time_that_is_written_is_right() -> None:
    """Whichever it is, also one of before 1970: a new process shows it as any other."""
    for ms, text in ((-1, "1969-12-31T23:59:59.999Z"), (0, "1970-01-01T00:00:00.000Z")):
        program = f"from holdfast.clock import format_ms; print(format_ms({ms}))"
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

        assert shown.stdout == text + "\n"


@given(st.integers(0, parse_ms("9999-12-31T23:59:59.999Z")))
def test_times_survive_writing_and_reading(ms: int) -> None:
    """Every millisecond has one text, and the text that millisecond."""
    text = format_ms(ms)

    assert len(text) == len("2026-11-21T06:00:00.000Z")
    assert parse_ms(text) == ms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T06:00:00.000Z", "2026-11-21T06:00:00+00:00"),
        ("2026-11-21T06:00:00", "2026-11-21T11:00:00+00:00"),
        ("2026-11-21T06:00:00.123456", "2026-11-21T11:00:00.123+00:00"),
        ("2026-11-21 06:00", "2026-11-21T11:00:00+00:00"),
        ("2026-11-21T06:00:00+05:30", "2026-11-21T00:30:00+00:00"),
        ("1969-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999+00:00"),
        ("2026-11-21", "2026-11-21T05:00:00+00:00"),
        ("2026-11-21t05:00:00z", "2026-11-21T05:00:00+00:00"),
        ("2026-12-31T24:00", "2027-01-01T05:00:00+00:00"),
        ("2026-12-31T24:00:00Z", "2027-01-01T00:00:00+00:00"),
        ("2026-325T05:00Z", "2026-11-21T05:00:00+00:00"),
        ("2026325", "2026-11-21T05:00:00+00:00"),
        ("2026-W47-6", "2026-11-21T05:00:00+00:00"),
    ],
)
def test_naive_times_are_read_in_the_zone(text: str, expected: str) -> None:
    """Any ISO 8601 is read; what has no zone is in the configured one, here Bogota's."""
    moment = datetime.fromisoformat(expected)

    assert parse_ms(text, ZoneInfo("America/Bogota")) == (moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(
        milliseconds=1
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-29T01:59:59", "2026-03-29T00:59:59.000Z"),
        ("2026-03-29T03:00:00", "2026-03-29T01:00:00.000Z"),
        ("2026-10-25T02:30:00", "2026-10-25T00:30:00.000Z"),
        ("2026-10-25T03:00:00", "2026-10-25T02:00:00.000Z"),
    ],
)
def test_naive_times_around_a_clock_change(text: str, expected: str) -> None:
    """In Berlin's hour that comes twice the first one is meant."""
    assert format_ms(parse_ms(text, ZoneInfo("Europe/Berlin"))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "06:00",
        "2026-13-01T00:00",
        "1795240800000",
        "2026-366",
        "2026-000",
        "2026-11-21T24:01",
        "2026-11",
    ],
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    """A time alone, a month, a day that there is not or a number is no moment."""
    with pytest.raises(ValueError):
        parse_ms(text)


def test_time_goes_on_while_the_wall_clock_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the wall clock was set back, time goes on at the pace of the monotonic one until it has caught up."""
    wall_ns, monotonic_s = 1_795_240_800_000_000_000, 100.0
    monkeypatch.setattr("time.time_ns", lambda: wall_ns)
    monkeypatch.setattr("time.monotonic", lambda: monotonic_s)
    clock = Clock()
    before = clock.now_ms()

    wall_ns -= 2 * 86400 * 10**9
    at_once = clock.now_ms()
    monotonic_s += 30
    later = clock.now_ms()
    wall_ns += 3 * 86400 * 10**9
    caught_up = clock.now_ms()

    assert (at_once - before, later - before, caught_up - before) == (0, 30_000, 86400_000)
