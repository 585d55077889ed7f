"""The document about all routes, and the page made of it."""

from __future__ import annotations

import asyncio
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.http.reply import JSON, Reply, encode_json
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import ETAG, SEEN, has_seen
from holdfast.http.routes.route import Outcome, route

HTML = "text/html; charset=utf-8"

_SEEN = Outcome(304, "It is what the caller has.", headers=(ETAG,))


@route(
    Outcome(200, "The document.", dict[str, Any], headers=(ETAG,)),
    _SEEN,
    name="openapi",
    headers=(SEEN,),
)
async def openapi(backend: Backend, request: Request) -> Reply:
    """This document: OpenAPI 3.1."""
    request.query()
    # In a thread: the first time it takes some 50 ms.
    return _unless_seen(request, await asyncio.to_thread(_document_reply))


@route(
    Outcome(200, "The page.", str, headers=(ETAG,), content_type="text/html"),
    _SEEN,
    headers=(SEEN,),
)
async def docs(backend: Backend, request: Request) -> Reply:
    """The same for people, with lines to paste: one page that loads nothing else."""
    request.query()
    return _unless_seen(
        request, await asyncio.to_thread(_page_reply, tuple(backend.listening), backend.settings.data_dir)
    )


# The modules are imported here and not above: most daemons are never asked.


@lru_cache(maxsize=1)
def _document_reply() -> Reply:
    from holdfast.http.openapi import document

    return _tagged(encode_json(document()), JSON)


@lru_cache(maxsize=1)
def _page_reply(listening: tuple[str, ...], data_dir: Path) -> Reply:
    from holdfast.http.docs import SECURITY_HEADERS, page

    return _tagged(page(listening, data_dir), HTML, SECURITY_HEADERS)


def _tagged(body: bytes, content_type: str, headers: str = "") -> Reply:
    tag = hashlib.sha256(body).hexdigest()[:16]
    return Reply(200, body, f'ETag: "{tag}"\r\nCache-Control: no-cache\r\n{headers}', content_type)


def _unless_seen(request: Request, reply: Reply) -> Reply:
    tag = reply.headers[len("ETag: ") : reply.headers.index("\r\n")]
    return Reply(304, headers=reply.headers) if has_seen(request, tag) else reply
