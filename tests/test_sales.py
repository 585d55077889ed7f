"""Sales figures: counted once, on the right day, to the last digit."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import parse_ms
from holdfast.core.sales import (
    Sales,
    add_money,
    count_completion,
    count_order,
    day_of,
    decode_sales,
    encode_sales,
    money,
    money_text,
    oldest_day,
    periods_of,
)
from holdfast.errors import InvalidRecord


@pytest.mark.parametrize(
    ("moment", "zone", "day"),
    [
        ("2026-11-21T04:59:59.999Z", "America/Bogota", "2026-11-20"),
        ("2026-11-21T05:00:00.000Z", "America/Bogota", "2026-11-21"),
        ("2026-11-21T00:00:00.000Z", "UTC", "2026-11-21"),
        ("2026-11-20T23:59:59.999Z", "UTC", "2026-11-20"),
        ("2026-03-28T22:59:59.999Z", "Europe/Berlin", "2026-03-28"),
        ("2026-03-28T23:00:00.000Z", "Europe/Berlin", "2026-03-29"),
        ("2026-03-29T21:59:59.999Z", "Europe/Berlin", "2026-03-29"),
        ("2026-03-29T22:00:00.000Z", "Europe/Berlin", "2026-03-30"),
        ("2026-10-24T22:00:00.000Z", "Europe/Berlin", "2026-10-25"),
        ("2026-10-25T22:59:59.999Z", "Europe/Berlin", "2026-10-25"),
        ("2026-10-25T23:00:00.000Z", "Europe/Berlin", "2026-10-26"),
        ("1969-12-31T23:59:59.999Z", "UTC", "1969-12-31"),
    ],
)
def test_a_day_begins_at_midnight_of_the_zone(moment: str, zone: str, day: str) -> None:
    """To the millisecond, on the days when the clocks change as well."""
    assert day_of(parse_ms(moment), ZoneInfo(zone)) == day


@pytest.mark.parametrize(("keep_days", "oldest"), [(1, "2026-11-21"), (2, "2026-11-20"), (90, "2026-08-24")])
def test_days_are_kept_with_today_among_them(keep_days: int, oldest: str) -> None:
    """90 days are today and the 89 before it."""
    assert oldest_day(parse_ms("2026-11-21T06:00:00Z"), ZoneInfo("UTC"), keep_days) == oldest


def test_a_tenth_and_two_tenths_make_three_tenths() -> None:
    """No binary floating point: what every shop expects."""
    sales = Sales()
    for revenue in ("0.1", "0.2"):
        count = count_completion(sales, "2026-11-21", "2026-08-24", Decimal(revenue))
        sales = sales.replaced(count.day, count.totals, count.oldest)

    assert b'"allTimeRevenue": 0.3' in encode_sales(sales)
    assert b'"totalRevenue": 0.3' in encode_sales(sales)


@given(st.lists(st.decimals(0, 10**24, allow_nan=False, allow_infinity=False, places=12), max_size=30))
def test_sums_are_exact_and_survive_the_file(amounts: list[Decimal]) -> None:
    """The sum of any amounts that are accepted is exact, also after being written and read."""
    amounts = [amount for amount in amounts if amount.adjusted() < 24]
    sales = Sales()
    for amount in amounts:
        count = count_completion(sales, "2026-11-21", "2026-08-24", money(amount))
        sales = decode_sales(encode_sales(sales.replaced(count.day, count.totals, count.oldest)))

    expected = sum(map(Fraction, amounts))
    assert Fraction(sales.totals.get("allTimeRevenue", 0)) == expected
    assert not amounts or Fraction(sales.days["2026-11-21"]["totalRevenue"]) == expected


def test_whole_sums_are_written_as_the_old_bots_did() -> None:
    """100, not 100.00; and still a number."""
    assert add_money(Decimal("99.50"), Decimal("0.50")) == 100
    assert type(add_money(Decimal("99.50"), Decimal("0.50"))) is int


@pytest.mark.parametrize(
    "amount", ["0", "0.000000000001", "999999999999999999999999", "1E+5", "120000.50", "-0", "0E+20"]
)
def test_prices_are_accepted(amount: str) -> None:
    """Up to 24 digits and 12 decimals, in any notation; written without exponent."""
    accepted = money(Decimal(amount))

    text = money_text(accepted).decode()
    assert Decimal(text) == Decimal(amount)
    assert "E" not in text


@pytest.mark.parametrize("amount", ["-1", "NaN", "sNaN", "Infinity", "1E+24", "0.0000000000001", "1E-5000", "0E+999"])
def test_what_is_no_price_is_refused(amount: str) -> None:
    """Negative, not finite, or more digits than any price has."""
    with pytest.raises(InvalidRecord):
        money(Decimal(amount))


def test_an_order_counts_on_its_day_by_its_product_type() -> None:
    """Orders and product types go up by one; other days stay as they are."""
    sales = Sales({"2026-11-20": {"date": "2026-11-20", "totalOrders": 5}}, {"allTimeOrders": 5, "note": "x"})

    for product_type in ("ring", "ring", None):
        count = count_order(sales, "2026-11-21", "2026-08-24", product_type)
        sales = sales.replaced(count.day, count.totals, count.oldest)

    assert sales.days["2026-11-21"]["totalOrders"] == 3
    assert sales.days["2026-11-21"]["productTypes"] == {"ring": 2}
    assert sales.days["2026-11-20"] == {"date": "2026-11-20", "totalOrders": 5}
    assert (sales.totals["allTimeOrders"], sales.totals["note"]) == (8, "x")


def test_an_order_of_a_day_no_longer_kept_counts_in_the_totals_only() -> None:
    """Its day does not come back."""
    count = count_order(Sales(), "2026-08-23", "2026-08-24", "ring")

    assert count.day is None
    assert count.totals["allTimeOrders"] == 1


def test_counting_drops_days_that_are_too_old() -> None:
    """The first day kept stays, the one before it goes."""
    sales = Sales({day: {"date": day} for day in ("2026-08-23", "2026-08-24", "2026-11-20")})

    count = count_order(sales, "2026-11-21", "2026-08-24", None)

    assert sorted(sales.replaced(count.day, count.totals, count.oldest).days) == [
        "2026-08-24",
        "2026-11-20",
        "2026-11-21",
    ]


def test_counting_changes_nothing_given_to_it() -> None:
    """Figures are values; a reader may keep them."""
    day = {"date": "2026-11-21", "totalOrders": 1, "productTypes": {"ring": 1}}
    sales = Sales({"2026-11-21": day}, {"allTimeOrders": 1})

    count_order(sales, "2026-11-21", "2026-08-24", "ring")
    count_completion(sales, "2026-11-21", "2026-08-24", Decimal(5))

    assert day == {"date": "2026-11-21", "totalOrders": 1, "productTypes": {"ring": 1}}
    assert sales.totals == {"allTimeOrders": 1}


def test_figures_of_others_keep_their_other_keys() -> None:
    """In a day, in the totals, beside them, with their numbers digit by digit."""
    raw = (
        b'{"daily":[{"date":"2026-11-20","totalOrders":2,"mood":1.10}],"totals":{"allTimeOrders":2,"x":0.30},'
        b'"currency":"COP","rate":0.00025}'
    )

    written = encode_sales(decode_sales(raw))

    found = orjson.loads(written)
    assert found["daily"][0]["mood"] == 1.1
    assert found["totals"] == {"allTimeOrders": 2, "allTimeRevenue": 0, "allTimeCompleted": 0, "x": 0.3}
    assert b"1.10" in written and b"0.30" in written and b"0.00025" in written
    assert found["currency"] == "COP"


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{",
        b'{"daily":{}}',
        b'{"daily":[5]}',
        b'{"daily":[{"date":"yesterday"}]}',
        b'{"daily":[{"date":"2026-11-20","totalOrders":"2"}]}',
        b'{"daily":[{"date":"2026-11-20","totalRevenue":true}]}',
        b'{"daily":[{"date":"2026-11-20","productTypes":["ring"]}]}',
        b'{"totals":[]}',
        b'{"totals":{"allTimeRevenue":null}}',
    ],
)
def test_other_layouts_are_refused(raw: bytes) -> None:
    """Nothing is counted onto what is not understood."""
    with pytest.raises(ValueError):
        decode_sales(raw)


def figures(day: str, orders: int, completed: int, revenue: str, **types: int) -> dict[str, object]:
    """The figures of one day."""
    return {
        "date": day,
        "totalOrders": orders,
        "completedOrders": completed,
        "totalRevenue": add_money(0, Decimal(revenue)),
        "productTypes": types,
    }


DAYS = [
    figures("2026-12-31", 2, 1, "0.1", music=2),
    figures("2027-01-01", 1, 1, "0.2", video=1),
    figures("2027-01-04", 3, 0, "0", music=1, video=2),
    figures("2027-02-28", 1, 1, "10"),
]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (
            "day",
            [
                ("2026-12-31", "2026-12-31", "2026-12-31", 2, 1, "0.1", {"music": 2}),
                ("2027-01-01", "2027-01-01", "2027-01-01", 1, 1, "0.2", {"video": 1}),
                ("2027-01-04", "2027-01-04", "2027-01-04", 3, 0, "0", {"music": 1, "video": 2}),
                ("2027-02-28", "2027-02-28", "2027-02-28", 1, 1, "10", {}),
            ],
        ),
        (
            "week",
            [
                ("2026-W53", "2026-12-28", "2027-01-03", 3, 2, "0.3", {"music": 2, "video": 1}),
                ("2027-W01", "2027-01-04", "2027-01-10", 3, 0, "0", {"music": 1, "video": 2}),
                ("2027-W08", "2027-02-22", "2027-02-28", 1, 1, "10", {}),
            ],
        ),
        (
            "month",
            [
                ("2026-12", "2026-12-01", "2026-12-31", 2, 1, "0.1", {"music": 2}),
                ("2027-01", "2027-01-01", "2027-01-31", 4, 1, "0.2", {"music": 1, "video": 3}),
                ("2027-02", "2027-02-01", "2027-02-28", 1, 1, "10", {}),
            ],
        ),
    ],
)
def test_days_are_added_up_by_period(group: str, expected: list[tuple[object, ...]]):
    """By day, ISO week or month, in order, exactly, with the calendar's own bounds; nothing is made up between."""
    sales = Sales({str(day["date"]): day for day in reversed(DAYS)})

    found = periods_of(sales, group)  # type: ignore[arg-type]

    assert [tuple(one.values()) for one in found] == [
        (period, begins, ends, orders, completed, Decimal(revenue), types)
        for period, begins, ends, orders, completed, revenue, types in expected
    ]
    assert all(isinstance(one["totalRevenue"], int | Decimal) for one in found)
    assert sum(one["totalOrders"] for one in found) == 7


def test_periods_of_some_days_or_one_product():
    """Both ends belong to it. Of one product there are orders; completions and revenue are not known by product."""
    sales = Sales({str(day["date"]): day for day in DAYS})

    assert [one["period"] for one in periods_of(sales, "day", "2027-01-01", "2027-01-04")] == [
        "2027-01-01",
        "2027-01-04",
    ]
    assert periods_of(sales, "month", product="video") == [
        {"period": "2027-01", "from": "2027-01-01", "to": "2027-01-31", "totalOrders": 3, "productTypes": {"video": 3}}
    ]
    assert periods_of(sales, "month", product="none") == periods_of(Sales()) == []


@pytest.mark.parametrize("group", ["day", "week", "month"])
@pytest.mark.parametrize("day", ["0001-01-01", "0999-12-31", "9999-12-31"])
def test_the_ends_of_the_calendar_are_periods_too(group: str, day: str):
    """Dates that nobody means, but that a file may hold."""
    (found,) = periods_of(Sales({day: figures(day, 1, 0, "0")}), group)  # type: ignore[arg-type]

    assert found["from"] <= day <= found["to"]
    assert found["period"].startswith((day[:4], "0998-W", "1000-W"))


def test_periods_leave_the_figures_as_they_are():
    """What they are made of is not changed, and without them the file's layout is what it was."""
    sales = Sales({str(day["date"]): day for day in DAYS})
    before = encode_sales(sales)

    periods = periods_of(sales, "month")

    assert encode_sales(sales) == before
    assert orjson.loads(encode_sales(sales, periods)) == orjson.loads(before) | {
        "periods": [one | {"totalRevenue": float(one["totalRevenue"])} for one in periods]
    }
