"""What is counted: sales, and how much there is."""

from __future__ import annotations

from datetime import date
from typing import Annotated, get_args

from msgspec import Meta

from holdfast.core.sales import Group, encode_sales, periods_of
from holdfast.errors import BadRequest
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.route import Field, Outcome, route

_GROUPS: tuple[Group, ...] = get_args(Group)
_Date = Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]

FROM = Field("from", "The first day of the `periods`, in `stats.timezone`.", _Date, "2026-11-01")
TO = Field("to", "Their last day.", _Date, "2026-11-30")
GROUP = Field("group", "What the days are added up to; `day` when absent.", Group, "month")
PRODUCT = Field("product", "Only orders of this product type count in them.", example="music")


@route(
    Outcome(
        200,
        "The figures.",
        answers.Sales,
        {
            "daily": [
                {
                    "date": "2026-11-21",
                    "totalOrders": 1,
                    "completedOrders": 1,
                    "totalRevenue": 84900.5,
                    "productTypes": {"music": 1},
                }
            ],
            "totals": {"allTimeOrders": 1, "allTimeRevenue": 84900.5, "allTimeCompleted": 1},
        },
    ),
    name="sales",
    query=(FROM, TO, GROUP, PRODUCT),
)
async def sales(backend: Backend, request: Request) -> Reply:
    """The sales figures, as in ``sales_stats.json``. With any parameter, also ``periods`` for charts: days added up.

    Raises:
        BadRequest: no date, or no period of ours.
    """
    query = request.query()
    if not query:
        return Reply(200, backend.engine.sales())
    group = query.get("group", "day")
    if group not in _GROUPS:
        raise BadRequest(f"group must be one of {', '.join(_GROUPS)}, found {group!a:.80}")
    first, last = _day(query, "from"), _day(query, "to")
    if first is not None and last is not None and first > last:
        raise BadRequest(f"expected from before to, found {first} and {last}")
    figures = backend.engine.sales_figures()
    return Reply(200, encode_sales(figures, periods_of(figures, group, first, last, query.get("product"))))


@route(
    Outcome(
        200,
        "The figures.",
        answers.Storage,
        {
            "total": 1,
            "active": 1,
            "old": 0,
            "archived": 0,
            "escalated": 0,
            "messages": 1,
            "system_messages": 0,
            "messages_last_30_days": 1,
            "tokens": 3,
            "bytes": 69632,
            "escalated_share": 0.0,
            "average_messages": 1.0,
        },
    ),
)
async def storage(backend: Backend, request: Request) -> Reply:
    """How many conversations, messages, tokens and bytes there are; exact, and found without counting them."""
    request.query()
    return json_reply(await backend.engine.ask(backend.engine.transcripts.storage))


def _day(query: dict[str, str], name: str) -> str | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        # Other forms of ISO 8601, such as 20261121, would not compare as text.
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise BadRequest(f"expected {name} as a date such as 2026-11-21, found {text!a:.80}")
