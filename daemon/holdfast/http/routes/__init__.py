"""The table of paths: which handler serves which path by which method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from holdfast.core.state import is_custom_name
from holdfast.errors import InvalidRecord, MethodNotAllowed, NotFound
from holdfast.http.reply import Reply
from holdfast.http.request import Request, decoded_segment
from holdfast.http.routes import (
    backup,
    batch,
    cleanup,
    compact,
    conversations,
    document,
    escalations,
    events,
    metrics,
    orders,
    records,
    restore,
    sessions,
    stats,
    status,
    transfer,
    verify,
)
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.kinds import Paths, Place, RecordHandler
from holdfast.http.routes.route import H, Methods, Route

Handler = Callable[[Backend, Request], Awaitable[Reply]]


class OtherMethod(MethodNotAllowed):
    """The path exists, the method does not.

    Attributes:
        allowed: the methods it has.
    """

    def __init__(self, allowed: list[str], found: str) -> None:
        super().__init__(f"this path takes {', '.join(allowed)}, found {found}")
        self.allowed = allowed


RECORDS = {
    "sessions": sessions.PATHS,
    "orders": orders.PATHS,
    "users": records.USER_PATHS,
    "conversations": conversations.PATHS,
    "escalations": escalations.PATHS,
    "people": conversations.PEOPLE_PATHS,
}
"""By the name that stands in the path and in the engine."""

_FIXED: Mapping[tuple[str, ...], Methods[Handler]] = {
    ("",): {"GET": status.index},
    ("healthz",): {"GET": status.healthz},
    ("readyz",): {"GET": status.readyz},
    ("metrics",): {"GET": metrics.metrics},
    ("openapi.json",): {"GET": document.openapi},
    ("docs",): {"GET": document.docs},
    ("v1", "batch"): {"POST": batch.batch},
    ("v1", "collections"): {"GET": records.names},
    ("v1", "events"): {"GET": events.events},
    ("v1", "export"): {"GET": transfer.export},
    ("v1", "stats", "sales"): {"GET": stats.sales},
    ("v1", "stats", "storage"): {"GET": stats.storage},
    ("v1", "admin", "status"): {"GET": status.report},
    ("v1", "admin", "backup"): {"POST": backup.backup},
    ("v1", "admin", "backups"): {"GET": backup.backups},
    ("v1", "admin", "cleanup"): {"POST": cleanup.cleanup},
    ("v1", "admin", "compact"): {"POST": compact.compact_data},
    ("v1", "admin", "flush"): {"POST": status.flush},
    ("v1", "admin", "import"): {"POST": transfer.import_},
    ("v1", "admin", "reload"): {"POST": status.reload},
    ("v1", "admin", "restore"): {"GET": restore.state, "POST": restore.begin},
    ("v1", "admin", "verify"): {"POST": verify.verify},
}


def dispatch(backend: Backend, request: Request) -> Awaitable[Reply]:
    """Choose the handler for *request* and begin its reply, which is then awaited.

    Raises:
        NotFound: no such path.
        MethodNotAllowed: the path exists, the method does not.
        HoldfastError: whatever the handler refuses.
    """
    segments = request.segments
    if len(segments) > 2 and segments[0] == "v1":
        paths = RECORDS.get(segments[1])
        if paths is not None:
            return _of_record(backend, request, paths, segments[1], segments[2:])
        if segments[1] == "collections":
            name = decoded_segment(segments[2])
            if not is_custom_name(name):
                raise InvalidRecord(
                    f"a collection's name is 1 to 64 of a-z, 0-9, _ and -, starting with a letter, "
                    f"and not one that Holdfast uses itself; found {name!a:.80}"
                )
            return _of_record(backend, request, records.CUSTOM_PATHS, name, segments[3:])
    elif len(segments) == 2 and segments[0] == "v1" and segments[1] in RECORDS:
        return _of_record(backend, request, RECORDS[segments[1]], segments[1], [])
    methods = _FIXED.get(tuple(segments))
    if methods is None:
        raise _no_path()
    return _chosen(methods, request).handler(backend, request)


def declared() -> Iterator[tuple[str, str, Route[Any]]]:
    """Every route there is: its path, with ``{id}`` and ``{name}`` where those stand, its method, its declaration."""
    found: list[tuple[str, Methods[Any]]] = []
    prefixes = {f"/v1/{name}": paths for name, paths in RECORDS.items()}
    prefixes["/v1/collections/{name}"] = records.CUSTOM_PATHS
    for prefix, paths in prefixes.items():
        found += [(prefix, paths.collection), (f"{prefix}/{{id}}", paths.record)]
        found += [(f"{prefix}/{{id}}/{action}", methods) for action, methods in paths.actions.items()]
    found += [("/" + "/".join(path), methods) for path, methods in _FIXED.items()]
    for path, methods in found:
        for method, route in methods.items():
            yield path, method, route


def _of_record(backend: Backend, request: Request, paths: Paths, collection: str, rest: list[str]) -> Awaitable[Reply]:
    methods: Methods[RecordHandler]
    if not rest:
        methods, id = paths.collection, ""
    else:
        id = decoded_segment(rest[0])
        methods = paths.record if len(rest) == 1 else paths.actions.get(rest[1], {}) if len(rest) == 2 else {}
    if not methods or (rest and not id):
        raise _no_path()
    return _chosen(methods, request).handler(backend, request, Place(paths.kind, collection, id))


def _chosen(methods: Methods[H], request: Request) -> Route[H]:
    method = request.method
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        names = [*methods, "HEAD"] if "GET" in methods else list(methods)
        raise OtherMethod(names, method)
    request.route = route
    return route


def _no_path() -> NotFound:
    return NotFound("no such path; GET / names them")
