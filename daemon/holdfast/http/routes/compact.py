"""Giving back room on demand."""

from __future__ import annotations

import asyncio

from holdfast.care.compact import CompactReport, compact
from holdfast.errors import Conflict, StorageFull
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.route import Outcome, route


@route(
    Outcome(
        200,
        "It is done.",
        CompactReport,
        {
            "before": {"archive": {"bytes": 8388608, "files": 2}},
            "after": {"archive": {"bytes": 6291456, "files": 2}},
            "freed_bytes": 2097152,
            "condensed_messages": 4711,
            "temporaries": 0,
            "duration_ms": 812.5,
        },
    ),
    errors=(Conflict, StorageFull),
)
async def compact_data(backend: Backend, request: Request) -> Reply:
    """Give back room that nothing uses: flush, prune, pack old conversations, and write the archive anew.

    Others go on reading and writing meanwhile. The archive needs as much free room again for a while.
    """
    request.query()
    return json_reply(await asyncio.to_thread(compact, backend.engine))
