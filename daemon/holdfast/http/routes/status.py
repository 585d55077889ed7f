"""What the daemon says about itself, with the few things an operator may ask of it."""

from __future__ import annotations

from holdfast.http.reply import Reply, json_reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend

_STOPPING = ("SHUTTING_DOWN", "SHUTDOWN_COMPLETE")


async def healthz(backend: Backend, request: Request) -> Reply:
    """The event loop runs; that is all this says."""
    return json_reply({"status": "ok"})


async def readyz(backend: Backend, request: Request) -> Reply:
    """Whether requests are served, and what is wrong all the same."""
    readiness = backend.readiness()
    state = readiness["state"]
    reasons = list(readiness.get("reasons", ()))
    if state == "RUNNING":
        return json_reply({"status": "degraded" if reasons else "ready", "state": state, "reasons": reasons})
    status = "stopping" if state in _STOPPING else "starting"
    reply = json_reply({"status": status, "state": state, "reasons": reasons})
    return Reply(503, reply.body, "Retry-After: 1\r\n")


async def index(backend: Backend, request: Request) -> Reply:
    """Where to go from here."""
    import holdfast  # here, because it imports what imports us

    return json_reply(
        {
            "name": "holdfast",
            "version": holdfast.__version__,
            "paths": [
                "/v1/sessions",
                "/v1/orders",
                "/v1/users",
                "/v1/collections",
                "/v1/batch",
                "/v1/stats/sales",
                "/v1/admin/status",
                "/v1/admin/flush",
                "/v1/admin/reload",
                "/healthz",
                "/readyz",
            ],
        }
    )


async def sales(backend: Backend, request: Request) -> Reply:
    """The sales figures, as in ``sales_stats.json``."""
    request.query()
    return Reply(200, backend.engine.sales())


async def report(backend: Backend, request: Request) -> Reply:
    """Counts, seqs, sizes, uptime, last flush."""
    request.query()
    return json_reply(backend.admin.status())


async def flush(backend: Backend, request: Request) -> Reply:
    """Flush now, and tell what was written."""
    request.query()
    return json_reply(await backend.admin.flush())


async def reload(backend: Backend, request: Request) -> Reply:
    """Read the settings again, and tell what changed."""
    request.query()
    return json_reply(await backend.admin.reload())
