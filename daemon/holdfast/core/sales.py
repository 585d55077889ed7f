"""Sales figures: orders, completions and exact revenue, by day and for all time.

All functions are pure. Figures are JSON objects as in ``sales_stats.json``; those that come from another
program keep the keys that we do not know.
"""

from __future__ import annotations

import decimal
from calendar import monthrange
from datetime import date, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Literal

import msgspec

from holdfast.core.event import Figures
from holdfast.errors import InvalidRecord

# Sums stay exact far beyond any shop: 60 digits, and an inexact result would raise rather than round.
_MONEY = decimal.Context(prec=60, traps=[decimal.Inexact, decimal.InvalidOperation, decimal.Overflow])
_WHOLE_DIGITS_MAX = 24
_DECIMALS_MAX = 12


Group = Literal["day", "week", "month"]


class Sales(msgspec.Struct, frozen=True):
    """All sales figures. Replaced as a whole, never changed, so that a reader may keep one.

    Attributes:
        days: date (``2026-11-21``, in the configured zone) to that day's figures.
        totals: the all-time figures.
        extra: other keys found in the file, kept as they were.
    """

    days: dict[str, Figures] = {}
    totals: Figures = {}
    extra: Figures = {}

    def replaced(self, day: Figures | None, totals: Figures | None, oldest: str | None) -> Sales:
        """These figures with *day* and *totals* put in and the days before *oldest* dropped."""
        days = self.days
        if day is not None:
            days = {**days, day["date"]: day}
        if oldest is not None and any(date < oldest for date in days):
            days = {date: figures for date, figures in days.items() if date >= oldest}
        return Sales(days, self.totals if totals is None else totals, self.extra)


class Count(msgspec.Struct, frozen=True):
    """What an order or completion makes of the figures; the fields of the event.

    Attributes:
        day: the day's figures from now on; None when its day is no longer kept.
        totals: the all-time figures from now on.
        oldest: the first day that is still kept.
    """

    day: Figures | None
    totals: Figures
    oldest: str


def count_order(sales: Sales, day: str, oldest: str, product_type: str | None) -> Count:
    """Count one order of *product_type* on *day*."""
    figures = None
    if day >= oldest:
        figures = dict(sales.days.get(day) or _empty_day(day))
        figures["totalOrders"] = figures.get("totalOrders", 0) + 1
        if product_type is not None:
            types = dict(figures.get("productTypes") or {})
            types[product_type] = types.get(product_type, 0) + 1
            figures["productTypes"] = types
    totals = _totals(sales)
    totals["allTimeOrders"] += 1
    return Count(figures, totals, oldest)


def count_completion(sales: Sales, day: str, oldest: str, revenue: Decimal, *, orders: int = 1) -> Count:
    """Count one completion with *revenue* on *day*; with 0 *orders* only the revenue."""
    figures = None
    if day >= oldest:
        figures = dict(sales.days.get(day) or _empty_day(day))
        figures["completedOrders"] = figures.get("completedOrders", 0) + orders
        figures["totalRevenue"] = add_money(figures.get("totalRevenue", 0), revenue)
    totals = _totals(sales)
    totals["allTimeCompleted"] += orders
    totals["allTimeRevenue"] = add_money(totals["allTimeRevenue"], revenue)
    return Count(figures, totals, oldest)


def take(sales: Sales, given: Sales, oldest: str, *, replaces: bool = False) -> list[Count]:
    """What *given*, counted in another place, makes of *sales*; empty when nothing.

    Where nothing was counted yet all of it counts. Otherwise a day of which there is nothing is added, to the totals as
    well; a day that is there stays, since nobody can tell whether the two counted the same orders. With *replaces* they
    are the same figures, edited, and what *given* says counts.
    """
    known = _totals(sales)
    is_empty = not sales.days and not any(known.values())
    kept = {day: figures for day, figures in sorted(given.days.items()) if day >= oldest}
    totals = {**known, **given.totals} if is_empty or replaces else dict(known)
    counts: list[Count] = []
    for day, figures in kept.items():
        there = sales.days.get(day)
        if there == figures or (there is not None and not replaces):
            continue
        if there is None and not is_empty and not replaces:
            for total, key in (("allTimeOrders", "totalOrders"), ("allTimeCompleted", "completedOrders")):
                totals[total] += figures.get(key, 0)
            totals["allTimeRevenue"] = add_money(totals["allTimeRevenue"], figures.get("totalRevenue", 0))
        counts.append(Count(figures, dict(totals), oldest))
    if not counts and totals != known:
        counts.append(Count(None, totals, oldest))
    return counts


def add_money(first: Any, second: Any) -> int | Decimal:
    """The exact sum; an int when it is whole, as the files of the old bots have it."""
    total = _MONEY.add(Decimal(first), Decimal(second))
    return int(total) if total == total.to_integral_value() else total


def money(revenue: Decimal | None) -> Decimal:
    """*revenue* checked; None is nothing.

    Raises:
        InvalidRecord: negative, not finite, or of more digits than any price has.
    """
    if revenue is None:
        return Decimal(0)
    if not revenue.is_finite() or revenue < 0:
        raise InvalidRecord(f"revenue must be a number of 0 or more, found {revenue}")
    if revenue.adjusted() >= _WHOLE_DIGITS_MAX or -int(revenue.as_tuple().exponent) > _DECIMALS_MAX:
        raise InvalidRecord(
            f"revenue may have {_WHOLE_DIGITS_MAX} digits and {_DECIMALS_MAX} decimals, found {revenue}"
        )
    return revenue.copy_abs()  # exactly; for there is a -0


def money_text(amount: Decimal) -> bytes:
    """*amount* as a JSON number, without exponent."""
    return format(amount, "f").encode()


def day_of(ms: int, zone: tzinfo) -> str:
    """The date in *zone* of a moment in ms since 1970."""
    return datetime.fromtimestamp(ms / 1000, zone).date().isoformat()


def oldest_day(now_ms: int, zone: tzinfo, keep_days: int) -> str:
    """The first of the *keep_days* days that end today."""
    today = date.fromisoformat(day_of(now_ms, zone))
    return (today - timedelta(days=keep_days - 1)).isoformat()


def periods_of(
    sales: Sales, group: Group = "day", first: str | None = None, last: str | None = None, product: str | None = None
) -> list[Figures]:
    """The figures of the days from *first* to *last* added up by day, week (from Monday) or month, oldest first.

    Each period has its name in ISO 8601 (``2026-11-21``, ``2026-W47``, ``2026-11``), the dates it goes ``from`` and ``to``,
    and the keys of a day. With *product* only its orders count, and there is no ``completedOrders`` nor ``totalRevenue``,
    which are not known by product. Periods in which nothing was counted are left out.
    """
    periods: dict[str, Figures] = {}
    for day in sorted(sales.days):
        if (first is not None and day < first) or (last is not None and day > last):
            continue
        figures = sales.days[day]
        types = figures.get("productTypes") or {}
        if product is not None and product not in types:
            continue
        name, begins, ends = _period(date.fromisoformat(day), group)
        period = periods.setdefault(name, _empty_period(name, begins, ends, product))
        for type, count in types.items():
            if product is None or type == product:
                period["productTypes"][type] = period["productTypes"].get(type, 0) + count
        if product is not None:
            period["totalOrders"] += types[product]
            continue
        for key in ("totalOrders", "completedOrders"):
            period[key] += figures.get(key, 0)
        period["totalRevenue"] = add_money(period["totalRevenue"], figures.get("totalRevenue", 0))
    return list(periods.values())


def encode_sales(sales: Sales, periods: list[Figures] | None = None) -> bytes:
    """``sales_stats.json``, indented for people, days in order; with *periods*, when they are given, as one more key."""
    days = [sales.days[day] for day in sorted(sales.days)]
    whole = {"daily": days, "totals": _totals(sales), **sales.extra}
    if periods is not None:
        whole["periods"] = periods
    return msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(whole), indent=2) + b"\n"


def decode_sales(raw: bytes) -> Sales:
    """The figures in a ``sales_stats.json``, ours or an old bot's; money is read from its digits.

    Raises:
        ValueError: not JSON, or not in that layout.
    """
    whole = msgspec.json.Decoder(float_hook=Decimal).decode(raw)
    if not isinstance(whole, dict):
        raise ValueError("expected a JSON object with 'daily' and 'totals'")
    daily, totals = whole.get("daily", []), whole.get("totals", {})
    if not isinstance(daily, list) or not isinstance(totals, dict):
        raise ValueError("expected 'daily' to be an array and 'totals' an object")
    for day in daily:
        if not isinstance(day, dict) or not isinstance(day.get("date"), str):
            raise ValueError("expected every day to be an object with a 'date'")
        date.fromisoformat(day["date"])
    for figures in [totals, *daily]:
        for key in (*_TOTALS, "totalOrders", "completedOrders", "totalRevenue"):
            if key in figures and type(figures[key]) not in (int, Decimal):
                raise ValueError(f"expected {key!r} to be a number, found {figures[key]!r}")
        types = figures.get("productTypes", {})
        if not isinstance(types, dict) or any(type(count) is not int for count in types.values()):
            raise ValueError("expected 'productTypes' to count whole orders")
    extra = {key: value for key, value in whole.items() if key not in ("daily", "totals")}
    return Sales({day["date"]: day for day in daily}, totals, extra)


_COUNTED = ("totalOrders", "completedOrders", "totalRevenue")
_TOTALS = ("allTimeOrders", "allTimeRevenue", "allTimeCompleted")


def _period(day: date, group: Group) -> tuple[str, date, date]:
    """The name, first and last day of the period that *day* is in."""
    if group == "day":
        return day.isoformat(), day, day
    if group == "week":
        year, week, weekday = day.isocalendar()
        begins = day - timedelta(days=weekday - 1)
        # The last week there is does not end on a Sunday.
        return f"{year:04}-W{week:02}", begins, begins + min(timedelta(days=6), date.max - begins)
    _, days = monthrange(day.year, day.month)
    return day.isoformat()[:7], day.replace(day=1), day.replace(day=days)


def _empty_period(name: str, begins: date, ends: date, product: str | None) -> Figures:
    counted = {"totalOrders": 0} if product is not None else dict.fromkeys(_COUNTED, 0)
    return {"period": name, "from": begins.isoformat(), "to": ends.isoformat(), **counted, "productTypes": {}}


def _empty_day(day: str) -> Figures:
    return {"date": day, "totalOrders": 0, "completedOrders": 0, "totalRevenue": 0, "productTypes": {}}


def _totals(sales: Sales) -> Figures:
    return {**dict.fromkeys(_TOTALS, 0), **sales.totals}
