"""Fault 22: a wall clock that jumps expires nobody, and moves no timer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import orjson
import pytest

from holdfast.clock import Clock
from holdfast.engine import Engine
from holdfast.errors import Leased
from holdfast.ops import SessionLease, SessionPut, SessionRelease, StatsOrder
from holdfast.recovery import open_engine
from holdfast.settings import Settings, StatsSettings
from tests.crash.harness import Recorder, report

pytestmark = pytest.mark.crash

SESSIONS = 500
HOUR_S = 3600
DAY_S = 24 * HOUR_S
YEAR_S = 365 * DAY_S


class SetClock(Clock):
    """A clock whose wall time somebody sets, while monotonic time goes on as it does.

    Attributes:
        wall_ms: what the system says.
        passed_s: since the clock was made.
    """

    def __init__(self, at: str) -> None:
        super().__init__()
        self.wall_ms = round(datetime.fromisoformat(at).timestamp() * 1000)
        self.passed_s = 0.0

    def now_ms(self) -> int:
        self._last_ms = max(self._last_ms, self.wall_ms)
        return self._last_ms

    def monotonic(self) -> float:
        return self.passed_s

    def pass_time(self, seconds: float) -> None:
        """Let time pass, for both."""
        self.wall_ms += round(seconds * 1000)
        self.passed_s += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock."""
        self.wall_ms += round(seconds * 1000)


class Opened(NamedTuple):
    engine: Engine
    clock: SetClock
    log: Recorder


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """An engine with sessions that are an hour old."""
    clock, log = SetClock("2026-11-21T12:00:00Z"), Recorder()
    engine = open_engine(Settings(data_dir=tmp_path / "data"), clock=clock, log=log)
    for number in range(SESSIONS):
        ticket = engine.submit(SessionPut(id=f"57{number}", value={"n": number}))
    ticket.wait()
    clock.pass_time(HOUR_S)
    yield Opened(engine, clock, log)
    engine.close()


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("-2 days", -2 * DAY_S), ("+10 years", 10 * YEAR_S), ("+1 hour (DST)", HOUR_S), ("-1 hour (DST)", -HOUR_S), ("+25 hours", 25 * HOUR_S)],
)  # fmt: skip
def test_a_jump_expires_nobody(opened: Opened, name: str, seconds: int, capsys: pytest.CaptureFixture[str]) -> None:
    """However far the wall clock is set, nobody expires who has not been idle for as long by the monotonic clock."""
    opened.clock.jump(seconds)

    expired = 0
    for _ in range(12):
        opened.clock.pass_time(HOUR_S)
        expired += opened.engine.expire()

    assert expired == 0
    assert opened.engine.count("sessions") == SESSIONS
    jumps = opened.log.fields("clock.jumped")
    assert len(jumps) == (seconds > 300)
    report(capsys, f"wall clock {name}: 0 of {SESSIONS} sessions expired within 12 h")


def test_those_idle_by_both_clocks_expire(opened: Opened) -> None:
    """After a jump the sessions still expire once their time has come by the monotonic clock."""
    opened.clock.jump(3 * HOUR_S)
    opened.clock.pass_time(22 * HOUR_S)
    assert opened.engine.expire() == 0

    opened.clock.pass_time(2 * HOUR_S)

    assert opened.engine.expire() == SESSIONS


def test_a_clock_that_is_put_right_again(opened: Opened) -> None:
    """A jump that is taken back leaves no trace: who is active stays, who was idle for a day goes."""
    opened.clock.jump(10 * YEAR_S)
    opened.engine.expire()
    opened.clock.jump(-10 * YEAR_S)
    opened.clock.pass_time(12 * HOUR_S)

    assert opened.engine.expire() == 0
    assert opened.engine.count("sessions") == SESSIONS


def test_time_stands_still_while_the_clock_is_behind(opened: Opened) -> None:
    """Set back, times given out never go backwards, and a lease still ends within its time of the journal's clock."""
    before = opened.clock.now_ms()
    opened.clock.jump(-2 * DAY_S)

    ticket = opened.engine.submit(SessionPut(id="late", value={}))
    ticket.wait()

    record = opened.engine.get("sessions", "late")
    assert record is not None
    at = datetime.fromisoformat(orjson.loads(record.value)["lastActivity"])
    assert at.timestamp() * 1000 >= before


def test_a_lease_is_not_given_twice(opened: Opened) -> None:
    """Whoever has a lease keeps it when the clock is set back; the generations go on growing."""
    ticket = opened.engine.submit(SessionLease(id="57000", ttl=60))
    ticket.wait()
    opened.clock.jump(-2 * DAY_S)

    with pytest.raises(Leased):
        opened.engine.submit(SessionLease(id="57000", ttl=60)).wait()

    assert ticket.answer.generation is not None
    opened.engine.submit(SessionRelease(id="57000", generation=ticket.answer.generation)).wait()
    again = opened.engine.submit(SessionLease(id="57000", ttl=60))
    again.wait()
    assert again.answer.generation is not None and again.answer.generation > ticket.answer.generation


@pytest.mark.parametrize(
    ("zone", "before", "after"),
    [
        # Clocks go back: 25 hours, twice the same hour; forward: 23 hours.
        ("Europe/Berlin", "2026-10-24T23:30:00+02:00", "2026-10-25T23:30:00+01:00"),
        ("America/New_York", "2026-03-07T23:30:00-05:00", "2026-03-08T23:30:00-04:00"),
    ],
)
def test_days_with_a_change_of_the_clock(zone: str, before: str, after: str, tmp_path: Path) -> None:
    """Orders count on the day that people there would name, also on days of 23 and 25 hours."""
    clock = SetClock(before)
    settings = Settings(data_dir=tmp_path / "data", stats=StatsSettings(timezone=zone))
    engine = open_engine(settings, clock=clock, log=Recorder())
    start = datetime.fromisoformat(before).astimezone(ZoneInfo(zone))
    expected: dict[str, int] = {}
    for _ in range(60):
        now = datetime.fromtimestamp(clock.wall_ms / 1000, UTC).astimezone(ZoneInfo(zone))
        expected[now.date().isoformat()] = expected.get(now.date().isoformat(), 0) + 1
        engine.submit(StatsOrder()).wait()
        clock.pass_time(HOUR_S / 2)

    days = {day["date"]: day["totalOrders"] for day in orjson.loads(engine.sales())["daily"]}

    assert days == expected and len(days) >= 3 - (start.hour == 0)
    assert datetime.fromisoformat(after).astimezone(ZoneInfo(zone)).date().isoformat() in days
    engine.close()


def test_a_restart_after_a_jump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whom a start drops because the clock stands ten years ahead is still in the copy that it keeps of the file."""
    clock = SetClock("2026-11-21T12:00:00Z")
    engine = open_engine(Settings(data_dir=tmp_path / "data"), clock=clock, log=Recorder())
    for number in range(SESSIONS):
        engine.submit(SessionPut(id=f"57{number}", value={"n": number}))
    engine.close()
    clock.jump(10 * YEAR_S)

    log = Recorder()
    engine = open_engine(Settings(data_dir=tmp_path / "data"), clock=clock, log=log)
    dropped = log.fields("state.loaded")[0]["dropped_stale"]
    engine.close()

    kept = list((tmp_path / "data" / "backups").glob("start-*/chat_sessions.json"))
    assert dropped == SESSIONS and len(kept) == 1
    assert {value["recipientPhone"] for value in orjson.loads(kept[0].read_bytes())} == {
        f"57{n}" for n in range(SESSIONS)
    }
    report(capsys, f"start with the clock 10 years ahead: {dropped} dropped, {SESSIONS} of {SESSIONS} in the kept copy")
