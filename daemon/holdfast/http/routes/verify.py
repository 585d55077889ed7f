"""Looking through the data directory on demand."""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec

from holdfast.care.verify import verify_running
from holdfast.errors import Conflict, InvalidRecord
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, OptionalBody, body_of
from holdfast.http.routes.route import Body, Outcome, route


class VerifyBody(OptionalBody, forbid_unknown_fields=True):
    """How closely to look.

    Attributes:
        deep: load every backup as well, and look at each page of the archive.
    """

    deep: bool = False


@route(
    Outcome(
        200,
        "What was found; `error` and `warning` are problems.",
        answers.Verified,
        {
            "at": "2026-11-21T06:00:00.000Z",
            "data_dir": "/var/lib/holdfast",
            "is_running": True,
            "is_deep": False,
            "duration_ms": 31.5,
            "findings": [
                {
                    "severity": "ok",
                    "part": "journal",
                    "found": "7 events behind the snapshots, to event 1042, in 1 segments",
                    "expected": "",
                    "action": "",
                    "mend": "",
                    "path": "",
                }
            ],
        },
    ),
    body=Body(VerifyBody, {"deep": False}, is_required=False),
    errors=(*BODY_ERRORS, InvalidRecord, Conflict),
)
async def verify(backend: Backend, request: Request) -> Reply:
    """Look through everything in the data directory: files, journal, archive, backups, permissions, room on the disk.

    Nothing is changed. It takes a second for a gigabyte, with ``deep`` some more.
    """
    request.query()
    wanted = await body_of(backend, request, VerifyBody)
    report = await asyncio.to_thread(partial(verify_running, backend.engine, deep=wanted.deep, reason="api"))
    return json_reply(msgspec.convert(msgspec.to_builtins(report), answers.Verified))
