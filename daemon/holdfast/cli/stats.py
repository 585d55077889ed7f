"""The commands that show figures: sales, storage."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import click
import msgspec

from holdfast.cli.arguments import TEXT
from holdfast.cli.connection import Daemon, daemon_flags, daemon_options, named_daemon
from holdfast.cli.groups import InOrder
from holdfast.cli.show import Column, bar, examples, json_option, print_json, print_table, readable_size
from holdfast.core.event import Figures
from holdfast.core.sales import Sales, decode_sales
from holdfast.errors import Unavailable

DAYS_SHOWN = 14
DAYS_MAX = 3660
BAR_CELLS = 24
TYPES_SHOWN = 10


@click.group(
    cls=InOrder,
    invoke_without_command=True,
    subcommand_metavar="[sales | storage]",
    epilog=examples(
        "holdfast stats",
        "holdfast stats --days 90",
        "holdfast stats --json | jq .totals",
        "holdfast stats sales --by month",
        "holdfast stats storage",
    ),
)
@click.option(
    "--days",
    type=click.IntRange(1, DAYS_MAX),
    metavar="N",
    help=f"The last so many; {DAYS_SHOWN} unless told otherwise.",
)
@json_option
@daemon_flags
@click.pass_context
def stats(ctx: click.Context, /, days: int | None, as_json: bool, **_: Any) -> None:
    """Show the sales figures: totals, the last days, what was ordered in them.

    Amounts are exact, digit by digit as in sales_stats.json; --json prints that file as it would be written now.
    """
    if ctx.invoked_subcommand is None:
        _show_totals(named_daemon(ctx), days or DAYS_SHOWN, as_json)
    elif as_json or days is not None:
        raise click.UsageError(f"expected the options of {ctx.invoked_subcommand} behind it")


def _show_totals(daemon: Daemon, days: int, as_json: bool) -> None:
    raw = daemon.fetch("GET", "/v1/stats/sales").body
    if as_json:
        # Not decoded: whoever adds amounts up wants the digits.
        click.echo(raw, nl=not raw.endswith(b"\n"))
        return
    sales = _decoded(daemon, raw)
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
        _print_periods(last, "day")
        _print_types([day.product_types for day in last])


def _decoded(daemon: Daemon, raw: bytes) -> Sales:
    try:
        return decode_sales(raw)
    except ValueError as error:
        raise Unavailable(f"expected sales figures from {daemon}, found something else ({error})") from None


@stats.command(
    "sales",
    epilog=examples(
        "holdfast stats sales --by month",
        "holdfast stats sales --by week --product music --from 2026-09-01",
        "holdfast stats sales --by month --json | jq .periods",
    ),
)
@click.option(
    "--by", "group", type=click.Choice(["day", "week", "month"]), default="day", show_default=True, help="The periods."
)
@click.option("--product", type=TEXT, metavar="TYPE", help="Only orders of this product type.")
@click.option("--from", "first", type=TEXT, metavar="DATE", help="The first day, such as 2026-11-01.")
@click.option("--to", "last", type=TEXT, metavar="DATE", help="The last day.")
@json_option
@daemon_options
def sales_command(daemon: Daemon, as_json: bool, **chosen: str | None) -> None:
    """Show the sales by day, week or month, as far back as days are kept. Periods without sales are left out."""
    names = {"group": "group", "product": "product", "first": "from", "last": "to"}
    query = {names[name]: value for name, value in chosen.items() if value is not None}
    raw = daemon.fetch("GET", "/v1/stats/sales", query=query).body
    if as_json:
        click.echo(raw, nl=not raw.endswith(b"\n"))
        return
    periods = daemon.understood(raw, Periods).periods
    if not periods:
        click.echo("no sales")
        return
    _print_periods(periods, str(chosen["group"]), has_revenue=chosen["product"] is None)
    _print_types([one.product_types for one in periods])


class Period(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The sales of a day, week or month; of a single product type without what is not known by product."""

    period: str
    total_orders: int
    completed_orders: int = 0
    total_revenue: Decimal = Decimal(0)
    product_types: dict[str, int] = {}


class Periods(msgspec.Struct, frozen=True):
    """The figures of ``/v1/stats/sales`` for charts."""

    periods: list[Period]


@stats.command(
    "storage", epilog=examples("holdfast stats storage", "holdfast stats storage --json | jq .messages_last_30_days")
)
@json_option
@daemon_options
def storage(daemon: Daemon, as_json: bool) -> None:
    """Show how many conversations and messages there are, and what they take."""
    reply = daemon.fetch("GET", "/v1/stats/storage")
    if as_json:
        return print_json(reply.fields())
    _print_storage(reply.decoded(Storage))


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of ``/v1/stats/storage``."""

    total: int
    active: int
    old: int
    archived: int
    escalated: int
    messages: int
    system_messages: int
    messages_last_30_days: int
    tokens: int
    bytes: int
    average_messages: float


def _print_storage(found: Storage) -> None:
    conversations = [
        ("active in 30 days", found.active),
        ("idle for 90 days", found.old),
        ("archived", found.archived),
        ("escalated", found.escalated),
    ]
    messages = [("in 30 days", found.messages_last_30_days), ("of the system", found.system_messages)]
    rows = [["conversations", f"{found.total:,}", ""]]
    rows += [_part(name, count, found.total) for name, count in conversations]
    rows += [["messages", f"{found.messages:,}", ""]]
    rows += [_part(name, count, found.messages) for name, count in messages]
    rows += [
        ["  a conversation", f"{found.average_messages:,.2f}", ""],
        ["tokens", f"{found.tokens:,}", ""],
        ["on disk", readable_size(found.bytes), ""],
    ]
    print_table([Column("storage"), Column("", is_number=True), Column("share", is_long=True)], rows)


def _part(name: str, count: int, whole: int) -> list[str]:
    share = count / whole if whole else 0.0
    return [f"  {name}", f"{count:,}", f"{share:>5.1%} {bar(share, BAR_CELLS)}"]


def _last_days(known: dict[str, Figures], count: int) -> list[Period]:
    """The sales of the last *count* days up to the newest in *known*, also of those without any order."""
    newest = date.fromisoformat(max(known))
    oldest = max(date.fromisoformat(min(known)).toordinal(), newest.toordinal() - count + 1)
    days = [date.fromordinal(day).isoformat() for day in range(oldest, newest.toordinal() + 1)]
    return [_day(day, known.get(day, {})) for day in days]


def _day(day: str, figures: Figures) -> Period:
    return Period(
        period=day,
        total_orders=int(figures.get("totalOrders", 0)),
        completed_orders=int(figures.get("completedOrders", 0)),
        total_revenue=Decimal(figures.get("totalRevenue", 0)),
        product_types=figures.get("productTypes") or {},
    )


def _print_periods(periods: list[Period], what: str, *, has_revenue: bool = True) -> None:
    most = max(period.total_orders for period in periods) or 1
    further = [Column("completed", is_number=True), Column("revenue", is_number=True)] if has_revenue else []
    print_table(
        [Column(what), Column("orders", is_number=True), *further, Column(f"orders a {what}", is_long=True)],
        (
            [
                period.period,
                str(period.total_orders),
                *([str(period.completed_orders), _amount(period.total_revenue)] if has_revenue else []),
                bar(period.total_orders / most, BAR_CELLS),
            ]
            for period in periods
        ),
    )


def _print_types(periods: list[dict[str, int]]) -> None:
    """What was ordered, the most frequent first: the counts by product type of all *periods* together."""
    counts: dict[str, int] = {}
    for period in periods:
        for name, count in period.items():
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
