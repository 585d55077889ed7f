"""The route of the metrics."""

from __future__ import annotations

import asyncio

from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.route import Outcome, route

_EXAMPLE = """\
# HELP holdfast_durable_seq The last event that is on stable storage.
# TYPE holdfast_durable_seq gauge
holdfast_durable_seq 2.0
"""


@route(Outcome(200, "In the text format of Prometheus, or in OpenMetrics.", str, _EXAMPLE, content_type="text/plain"))
async def metrics(backend: Backend, request: Request) -> Reply:
    """What is counted, for Prometheus. OpenMetrics when Accept asks for it."""
    request.query()
    # In a thread: it takes milliseconds, and its library is loaded at the first scrape.
    return await asyncio.to_thread(backend.scrape, request.headers.get("Accept", ""))
