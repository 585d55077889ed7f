"""The command that shows the sales figures."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import click

from holdfast.cli.connection import Daemon, daemon_options
from holdfast.cli.show import Column, bar, examples, json_option, print_table
from holdfast.core.event import Figures
from holdfast.core.sales import decode_sales
from holdfast.errors import Unavailable

DAYS_SHOWN = 14
DAYS_MAX = 3660
BAR_CELLS = 24
TYPES_SHOWN = 10


@click.command(epilog=examples("holdfast stats", "holdfast stats --days 90", "holdfast stats --json | jq .totals"))
@click.option(
    "--days",
    type=click.IntRange(1, DAYS_MAX),
    default=DAYS_SHOWN,
    show_default=True,
    metavar="N",
    help="The last so many.",
)
@json_option
@daemon_options
def stats(daemon: Daemon, days: int, as_json: bool) -> None:
    """Show the sales figures: totals, the last days, what was ordered in them.

    Amounts are exact, digit by digit as in sales_stats.json; --json prints that file as it would be written now.
    """
    raw = daemon.fetch("GET", "/v1/stats/sales").body
    if as_json:
        # Not decoded: whoever adds amounts up wants the digits.
        click.echo(raw, nl=not raw.endswith(b"\n"))
        return
    try:
        sales = decode_sales(raw)
    except ValueError as error:
        raise Unavailable(f"expected sales figures from {daemon}, found something else ({error})") from None
    totals = sales.totals
    print_table(
        [Column("all time"), Column("", is_number=True)],
        [
            ["orders", str(totals.get("allTimeOrders", 0))],
            ["completed", str(totals.get("allTimeCompleted", 0))],
            ["revenue", _amount(totals.get("allTimeRevenue", 0))],
        ],
    )
    if sales.days:
        last = _last_days(sales.days, days)
        click.echo()
        _print_days(last)
        _print_types(last)


def _last_days(known: dict[str, Figures], count: int) -> list[Figures]:
    """The figures of the last *count* days up to the newest in *known*, also of those without any order."""
    newest = date.fromisoformat(max(known))
    oldest = max(date.fromisoformat(min(known)).toordinal(), newest.toordinal() - count + 1)
    days = [date.fromordinal(day).isoformat() for day in range(oldest, newest.toordinal() + 1)]
    return [known.get(day, {"date": day}) for day in days]


def _print_days(days: list[Figures]) -> None:
    most = max(day.get("totalOrders", 0) for day in days) or 1
    print_table(
        [
            Column("day"),
            Column("orders", is_number=True),
            Column("completed", is_number=True),
            Column("revenue", is_number=True),
            Column("orders a day", is_long=True),
        ],
        (
            [
                day["date"],
                str(day.get("totalOrders", 0)),
                str(day.get("completedOrders", 0)),
                _amount(day.get("totalRevenue", 0)),
                bar(float(day.get("totalOrders", 0) / most), BAR_CELLS),
            ]
            for day in days
        ),
    )


def _print_types(days: list[Figures]) -> None:
    """What was ordered in *days*, the most frequent first."""
    counts: dict[str, int] = {}
    for day in days:
        for name, count in (day.get("productTypes") or {}).items():
            counts[name] = counts.get(name, 0) + count
    if not counts:
        return
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    shown, rest = ranked[:TYPES_SHOWN], sum(count for _, count in ranked[TYPES_SHOWN:])
    rows = [[name, str(count), bar(count / ranked[0][1], BAR_CELLS)] for name, count in shown]
    if rest:
        rows.append([f"{len(ranked) - TYPES_SHOWN} others", str(rest), ""])
    click.echo()
    print_table([Column("product type"), Column("orders", is_number=True), Column("share", is_long=True)], rows)


def _amount(amount: Any) -> str:
    # format() would give a whole number six decimals.
    return format(amount, "f") if isinstance(amount, Decimal) else str(amount)
