"""How records that were found are answered: one with its version, several as a part of a list."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.http.reply import Reply, encode_json
from holdfast.http.request import Request
from holdfast.http.routes.fields import has_seen
from holdfast.ops import Page, Record


def record_reply(request: Request, record: Record) -> Reply:
    """*record* with its version as ETag, or 304 when the caller has that version."""
    tag = f'"{record.version}"'
    if has_seen(request, tag):
        return Reply(304, headers=f"ETag: {tag}\r\n")
    return Reply(200, record.value, f"ETag: {tag}\r\n")


def page_reply(found: Page) -> Reply:
    """A part of a list."""
    return Reply(200, b'{"items":[%b],"next":%b}' % (encode_items(found.items), encode_json(found.next)))


def encode_items(items: Iterable[Record]) -> bytes:
    """*items* as the members of a list."""
    return b",".join(
        b'{"id":%b,"version":%d,"value":%b}' % (encode_json(item.id), item.version, item.value) for item in items
    )
