"""Backups on demand, and what there is to go back to."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Literal

from holdfast.errors import InvalidRecord, StorageFull
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS, OptionalBody, body_of
from holdfast.http.routes.route import Body, Outcome, route
from holdfast.ops import BackupList, BackupReport


class BackupBody(OptionalBody, forbid_unknown_fields=True):
    """Nothing is needed.

    Attributes:
        reason: told in the list of backups.
    """

    reason: Literal["api", "command"] = "api"


_REPORT = {
    "name": "2026-11-21T140300.123Z",
    "reason": "api",
    "seq": 1,
    "records": 1,
    "files": 16,
    "bytes": 52428,
    "new_bytes": 10240,
    "notes": [],
    "proved": True,
    "problem": "",
    "duration_ms": 812.5,
    "at": "2026-11-21T14:03:01.000Z",
}


@route(
    Outcome(200, "The backup is there.", BackupReport, _REPORT),
    body=Body(BackupBody, {"reason": "api"}, is_required=False),
    errors=(*BODY_ERRORS, InvalidRecord, StorageFull),
)
async def backup(backend: Backend, request: Request) -> Reply:
    """Make a backup of everything, and load everything from it to prove it. Nobody else has to wait meanwhile.

    Calls that come while one is made share the one after it. ``proved`` is false when not all could be loaded from it, and
    null when that could not be tried; then ``problem`` says why.
    """
    request.query()
    wanted = await body_of(backend, request, BackupBody)
    return json_reply(await asyncio.to_thread(partial(backend.engine.backup, wanted.reason)))


@route(
    Outcome(
        200,
        "The backups, newest first.",
        BackupList,
        {
            "items": [
                {
                    "name": "2026-11-21T140300.123Z",
                    "at": "2026-11-21T14:03:00.123Z",
                    "reason": "api",
                    "seq": 1,
                    "records": 1,
                    "bytes": 52428,
                    "new_bytes": 10240,
                    "encrypted": False,
                    "foreign": False,
                    "proved": True,
                    "proved_at": "2026-11-21T14:03:01.000Z",
                    "problem": "",
                }
            ],
            "history": {
                "since": "2026-11-14T14:03:00.123Z",
                "first_seq": 0,
                "last_seq": 0,
                "parts": 0,
                "bytes": 0,
                "problem": "",
            },
        },
    ),
)
async def backups(backend: Backend, request: Request) -> Reply:
    """The backups that there are, how each proof went, and how far back any moment can be restored."""
    request.query()
    return json_reply(await asyncio.to_thread(backend.engine.backups.listed))
