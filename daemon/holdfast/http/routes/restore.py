"""Going back to a backup, or to a moment, on demand."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.care import moments, put_back, restore, restore_plan
from holdfast.care.history import History
from holdfast.care.seal import AgeSeal, seal_of
from holdfast.core.rules import rules_of
from holdfast.core.state import CONVERSATIONS, ORDERS, SESSIONS, USERS
from holdfast.errors import BadRequest, Conflict, DataRefused, InvalidRecord, NotFound, StorageFull
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.changes import BODY_ERRORS
from holdfast.http.routes.route import Body, Outcome, route
from holdfast.values import decode_typed

Text = Annotated[str, Meta(min_length=1, max_length=1_024)]


class RestoreBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is to come back; one of `set` and `at` at least, and one at most of the fields that name a part.

    Attributes:
        set: name of a backup; in a dry run also `latest`.
        at: a moment, ISO 8601; reached from the best backup, or from `set`.
        collection: put only this collection back; what is not in it then goes.
        file: the same, by the name of its snapshot file.
        session: put only this session back; likewise *order*, *user*, *conversation*.
        dry_run: tell only what would change.
    """

    set: Text | None = None
    at: Text | None = None
    collection: Text | None = None
    file: Text | None = None
    session: Text | None = None
    order: Text | None = None
    user: Text | None = None
    conversation: Text | None = None
    dry_run: bool = False


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What would change, and what became of it.

    Attributes:
        plan: what would change, or has changed.
        part: what became of the records, when a part was put back.
        saved_as: the backup of what was there before, when a part was put back.
        state: of a restore of everything, which goes on after this answer; ask for it with GET.
    """

    plan: restore_plan.RestorePlan
    part: put_back.PartRestored | None = None
    saved_as: str = ""
    state: restore.RestoreState | None = None


_PLAN = {
    "backup": "2026-11-21T140300.123Z",
    "backup_at": "2026-11-21T14:03:00.123Z",
    "at": "2026-11-21T14:03:00.123Z",
    "is_proved": True,
    "seq": 1,
    "rows": [
        {
            "collection": "sessions",
            "now": 1,
            "then": 1,
            "added": 0,
            "changed": 0,
            "removed": 0,
            "oldest": "2026-11-21T13:00:00.000Z",
            "newest": "2026-11-21T14:02:59.000Z",
        }
    ],
    "expiring": 0,
    "has_other_sales": False,
}


@route(
    Outcome(
        200,
        "How it stands.",
        restore.RestoreState,
        {"state": "idle", "backup": "", "at": "", "progress": "", "reason": "", "report": None},
    ),
    name="restore_state",
)
async def state(backend: Backend, request: Request) -> Reply:
    """How the restore of everything stands that is under way, or was the last; answered while nothing else is."""
    request.query()
    return json_reply(backend.admin.restore_state())


@route(
    Outcome(
        200,
        "A dry run, or a part that is back.",
        Restored,
        {"plan": _PLAN, "part": None, "saved_as": "", "state": None},
    ),
    Outcome(
        202,
        "A restore of everything has begun.",
        Restored,
        {"plan": _PLAN, "part": None, "saved_as": "", "state": {"state": "preparing"}},
    ),
    body=Body(RestoreBody, {"set": "latest", "collection": "sessions", "dry_run": True}),
    errors=(*BODY_ERRORS, BadRequest, NotFound, Conflict, InvalidRecord, StorageFull),
    name="restore",
)
async def begin(backend: Backend, request: Request) -> Reply:
    """Go back to a backup or to a moment, with everything or with a part. The present is backed up first.

    A part is put back by ordinary changes. For everything the daemon prepares the state, pauses for a moment and comes
    back with it; event streams begin anew.
    """
    request.query()
    wanted = decode_typed(await request.body(), RestoreBody, backend.record_limits)
    if wanted.set is None and wanted.at is None:
        raise InvalidRecord("expected set, the name of a backup, or at, a moment; found neither")
    if wanted.set == moments.LATEST and not wanted.dry_run:
        raise InvalidRecord("expected the name of a backup, as a dry run tells it, found latest")
    return await asyncio.to_thread(partial(_begin, backend, wanted, asyncio.get_running_loop()))


def _begin(backend: Backend, wanted: RestoreBody, loop: asyncio.AbstractEventLoop) -> Reply:
    try:
        return _planned(backend, wanted, loop)
    except DataRefused as error:
        # It is the backup that cannot be used; the data that is served is as well as it was.
        raise Conflict(error.detail) from error


def _planned(backend: Backend, wanted: RestoreBody, loop: asyncio.AbstractEventLoop) -> Reply:
    engine, settings = backend.engine, backend.settings
    part = _part(wanted)
    seal = seal_of(settings)
    history = History(settings.data_dir, seal)
    at_ms = None if wanted.at is None else moments.moment_of(wanted.at, backend.zone)
    target = moments.choose(
        settings.data_dir, seal, name=wanted.set, at_ms=at_ms, now_ms=engine.now_ms(), history=history
    )
    plan, then = restore_plan.planned(
        settings,
        target,
        seal,
        history,
        engine=engine,
        now_ms=engine.now_ms(),
        part=None if part is None else (part.collections, part.id),
    )
    if wanted.dry_run:
        return json_reply(Restored(plan=plan))
    if part is None:
        begun = asyncio.run_coroutine_threadsafe(_admin(backend, target, plan, seal), loop).result()
        return json_reply(Restored(plan=plan, state=begun), status=202)
    saved = engine.backup("restore")
    messages = put_back.messages_from(target, settings.data_dir, seal, history)
    report = put_back.put_back(engine, part, then, rules_of(settings), messages)
    return json_reply(Restored(plan=plan, part=report, saved_as=saved.name))


async def _admin(
    backend: Backend, target: moments.Target, plan: restore_plan.RestorePlan, seal: AgeSeal | None
) -> restore.RestoreState:
    return backend.admin.restore(target, plan, seal)


def _part(wanted: RestoreBody) -> put_back.Part | None:
    named = {
        SESSIONS: wanted.session,
        ORDERS: wanted.order,
        USERS: wanted.user,
        CONVERSATIONS: wanted.conversation,
        "collection": wanted.collection,
        "file": wanted.file,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRecord(f"expected one part, found {len(given)}; restore them one after the other")
    ((name, value),) = given.items()
    if name == "collection":
        return put_back.part_of_collection(value)
    if name == "file":
        return put_back.part_of_file(value)
    return put_back.Part(name, value)
