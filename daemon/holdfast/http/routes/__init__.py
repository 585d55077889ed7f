"""The table of paths: which handler serves which path by which method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from holdfast.core.state import is_custom_name
from holdfast.errors import InvalidRecord, MethodNotAllowed, NotFound
from holdfast.http.reply import Reply
from holdfast.http.request import Request, decoded_segment
from holdfast.http.routes import batch, records, status
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.records import Place

Handler = Callable[[Backend, Request], Awaitable[Reply]]
RecordHandler = Callable[[Backend, Request, Place], Awaitable[Reply]]
H = TypeVar("H", Handler, RecordHandler)


class OtherMethod(MethodNotAllowed):
    """The path exists, the method does not.

    Attributes:
        allowed: the methods it has.
    """

    def __init__(self, allowed: list[str], found: str) -> None:
        super().__init__(f"this path takes {', '.join(allowed)}, found {found}")
        self.allowed = allowed


_FIXED: dict[tuple[str, ...], dict[str, Handler]] = {
    ("",): {"GET": status.index},
    ("healthz",): {"GET": status.healthz},
    ("readyz",): {"GET": status.readyz},
    ("v1", "batch"): {"POST": batch.batch},
    ("v1", "collections"): {"GET": records.names},
    ("v1", "stats", "sales"): {"GET": status.sales},
    ("v1", "admin", "status"): {"GET": status.report},
    ("v1", "admin", "flush"): {"POST": status.flush},
    ("v1", "admin", "reload"): {"POST": status.reload},
}

_LIST: dict[str, RecordHandler] = {"GET": records.page}
_RECORD: dict[str, RecordHandler] = {
    "GET": records.get,
    "PUT": records.put,
    "PATCH": records.patch,
    "DELETE": records.delete,
}
_ACTIONS: dict[str, dict[str, dict[str, RecordHandler]]] = {
    "sessions": {
        "touch": {"POST": records.touch},
        "lease": {"POST": records.lease, "DELETE": records.release},
        "release": {"POST": records.release},
    },
    "orders": {"complete": {"POST": records.complete}, "cancel": {"POST": records.cancel}},
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
        kind = records.KINDS.get(segments[1])
        if kind is not None:
            return _of_record(backend, request, kind, segments[1], segments[2:])
        if segments[1] == "collections":
            name = decoded_segment(segments[2])
            if not is_custom_name(name):
                raise InvalidRecord(
                    f"a collection's name is 1 to 64 of a-z, 0-9, _ and -, starting with a letter, "
                    f"and not one that Holdfast uses itself; found {name!a:.80}"
                )
            return _of_record(backend, request, records.CUSTOM, name, segments[3:])
    elif len(segments) == 2 and segments[0] == "v1" and segments[1] in records.KINDS:
        return _of_record(backend, request, records.KINDS[segments[1]], segments[1], [])
    methods = _FIXED.get(tuple(segments))
    if methods is None:
        raise _no_path()
    return _chosen(methods, request.method)(backend, request)


def _of_record(
    backend: Backend, request: Request, kind: records.Kind, collection: str, rest: list[str]
) -> Awaitable[Reply]:
    if not rest:
        methods, id = _LIST, ""
    else:
        id = decoded_segment(rest[0])
        methods = _RECORD if len(rest) == 1 else _ACTIONS.get(collection, {}).get(rest[1], {}) if len(rest) == 2 else {}
    if not methods or (rest and not id):
        raise _no_path()
    return _chosen(methods, request.method)(backend, request, Place(kind, collection, id))


def _chosen(methods: dict[str, H], method: str) -> H:
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        names = [*methods, "HEAD"] if "GET" in methods else list(methods)
        raise OtherMethod(names, method)
    return handler


def _no_path() -> NotFound:
    return NotFound("no such path; GET / names them")
