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
