"""Orders, with the two ways in which only they end."""

from __future__ import annotations

from decimal import Decimal

from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, CHANGE_ERRORS, OptionalBody, body_of, commit, op_fields, written
from holdfast.http.routes.fields import CONDITIONAL, CURSOR, DURABILITY_QUERY, LIMIT, SINCE, STATE, UNTIL
from holdfast.http.routes.kinds import Example, Kind, Place
from holdfast.http.routes.records import paths_of
from holdfast.http.routes.route import Body, route
from holdfast.ops import OrderCancel, OrderComplete, OrderDelete, OrderPatch, OrderPut


class CompleteBody(OptionalBody, forbid_unknown_fields=True):
    """What the order brought.

    Attributes:
        revenue: counted once, however often this is repeated.
    """

    revenue: Decimal | None = None


class CancelBody(OptionalBody, forbid_unknown_fields=True):
    """Why.

    Attributes:
        reason: kept with the order.
    """

    reason: str | None = None


@route(
    written(),
    name="order_complete",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(CompleteBody, {"revenue": "84900.50"}, is_required=False),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS),
)
async def complete(backend: Backend, request: Request, place: Place) -> Reply:
    """Complete an order, with its revenue."""
    query = request.query()
    body = await body_of(backend, request, CompleteBody)
    op = OrderComplete(revenue=body.revenue, **op_fields(request, query, place))
    return await commit(backend, request, query, op)


@route(
    written(),
    name="order_cancel",
    query=(DURABILITY_QUERY,),
    headers=CONDITIONAL,
    body=Body(CancelBody, {"reason": "out of stock"}, is_required=False),
    errors=(*BODY_ERRORS, *CHANGE_ERRORS),
)
async def cancel(backend: Backend, request: Request, place: Place) -> Reply:
    """Cancel a pending order."""
    query = request.query()
    body = await body_of(backend, request, CancelBody)
    op = OrderCancel(reason=body.reason, **op_fields(request, query, place))
    return await commit(backend, request, query, op)


PATHS = paths_of(
    Kind(
        "order",
        OrderPut,
        OrderPatch,
        OrderDelete,
        Example(
            "1001",
            {"odooOrderId": 1001},
            {"recipientPhone": "573001234567", "productType": "music"},
            {"capacity": "64GB"},
        ),
        list_query=(LIMIT, CURSOR, SINCE, UNTIL, STATE),
    ),
    {"complete": {"POST": complete}, "cancel": {"POST": cancel}},
)
