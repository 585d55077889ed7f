"""What the daemon says about itself, with the few things an operator may ask of it."""

from __future__ import annotations

from holdfast import __version__
from holdfast.errors import SettingsError, StorageFull
from holdfast.http.problem import RETRY_AFTER_S
from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes import answers
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import RETRY_AFTER
from holdfast.http.routes.route import Outcome, route
from holdfast.ops import FlushReport

_STOPPING = ("SHUTTING_DOWN", "SHUTDOWN_COMPLETE")


@route(Outcome(200, "It runs.", answers.Health, {"status": "ok"}), name="health")
async def healthz(backend: Backend, request: Request) -> Reply:
    """The event loop runs; that is all this says."""
    return json_reply(answers.Health("ok"))


@route(
    Outcome(
        200,
        "Requests are served; `degraded` when something is wrong with the data all the same.",
        answers.Readiness,
        {"status": "ready", "state": "RUNNING", "reasons": []},
    ),
    Outcome(
        503,
        "Starting or stopping.",
        answers.Readiness,
        {"status": "starting", "state": "STARTING", "reasons": []},
        headers=(RETRY_AFTER,),
    ),
    name="readiness",
)
async def readyz(backend: Backend, request: Request) -> Reply:
    """Whether requests are served, and what is wrong all the same."""
    readiness = backend.readiness()
    state = readiness["state"]
    reasons = list(readiness.get("reasons", ()))
    if state == "RUNNING":
        return json_reply(answers.Readiness("degraded" if reasons else "ready", state, reasons))
    status = "stopping" if state in _STOPPING else "starting"
    reply = json_reply(answers.Readiness(status, state, reasons))
    return Reply(503, reply.body, f"Retry-After: {RETRY_AFTER_S}\r\n")


@route(
    Outcome(
        200,
        "The paths without those of single records.",
        answers.Index,
        {"name": "holdfast", "version": __version__, "paths": ["/v1/sessions", "/v1/orders", "/healthz"]},
    )
)
async def index(backend: Backend, request: Request) -> Reply:
    """Where to go from here."""
    # Here, because it imports us.
    from holdfast.http.routes import declared

    paths = dict.fromkeys(path for path, _, _ in declared() if "{" not in path and path != "/")
    return json_reply(answers.Index("holdfast", __version__, list(paths)))


@route(
    Outcome(
        200,
        "The report.",
        answers.StatusReport,
        {
            "state": "RUNNING",
            "version": "0.1.0",
            "pid": 4711,
            "uptime_s": 3600.1,
            "listen": ["unix:/var/lib/holdfast/holdfast.sock", "tcp:127.0.0.1:8765"],
            "data_dir": "/var/lib/holdfast",
            "sessions": 1,
            "pending_orders": 1,
            "completed_orders": 0,
            "users": 1,
            "conversations": 1,
            "open_escalations": 0,
            "collections": {"notes": 1},
            "leases": 0,
            "idempotency_keys": 0,
            "seq": 4,
            "durable_seq": 4,
            "snapshot_seq": 0,
            "archived_seq": 4,
            "journal_bytes": 812,
            "journal_segments": 1,
            "snapshot_bytes": 0,
            "durability": "always",
            "last_flush": None,
            "backups": {
                "count": 12,
                "bytes": 73400320,
                "newest_at": "2026-11-21T03:12:45.123Z",
                "proved_at": "2026-11-21T03:12:46.871Z",
                "is_proved": True,
            },
            "copies": None,
            "disk": {
                "free_bytes": 21474836480,
                "size_bytes": 53687091200,
                "free_files": 3276000,
                "grows_bytes_h": 1048576,
                "hours_left": 20480.0,
            },
            "parts": {"journal": {"bytes": 4096, "files": 1}},
            "degraded": [],
        },
    ),
    name="status",
)
async def report(backend: Backend, request: Request) -> Reply:
    """Counts, seqs, sizes, uptime, last flush."""
    request.query()
    return json_reply(backend.admin.status())


@route(
    Outcome(
        200,
        "All of it is on disk.",
        FlushReport,
        {
            "reason": "api",
            "snapshot_seq": 1,
            "files": 4,
            "bytes": 1024,
            "pruned": 1,
            "duration_ms": 4.2,
            "at": "2026-11-21T06:00:00.000Z",
        },
    ),
    errors=(StorageFull,),
)
async def flush(backend: Backend, request: Request) -> Reply:
    """Flush now, and tell what was written."""
    request.query()
    return json_reply(await backend.admin.flush())


@route(
    Outcome(200, "They hold.", answers.Reloaded, {"changed": ["sessions.ttl"], "needs_restart": []}),
    errors=(SettingsError,),
)
async def reload(backend: Backend, request: Request) -> Reply:
    """Read the settings again, and tell what changed; invalid ones are refused and the old ones stay."""
    request.query()
    return json_reply(await backend.admin.reload())
