"""The lists of an archive, made from memory: for the time in which there is none that is up to date.

In the same order and with the same filters, but by looking at everything.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import msgspec

from holdfast.archive.base import ConversationQuery, Escalation, EscalationQuery, Head
from holdfast.clock import parse_ms

_RANKS = {"high": 0, "low": 1}
_RANK_OF_OTHERS = 2


class _HeadFields(msgspec.Struct, gc=False):
    updated_at: str
    user_id: str | None
    session_id: str | None
    escalated: bool
    archived: bool


class _EscalationFields(msgspec.Struct, gc=False):
    opened_at: str
    status: str
    priority: str


_decode_head = msgspec.json.Decoder(_HeadFields).decode
_decode_escalation = msgspec.json.Decoder(_EscalationFields).decode


def conversations_among(heads: Iterable[Head], wanted: ConversationQuery) -> list[Head]:
    """As ``Archive.conversations``, of *heads*."""
    found = heapq.nlargest(wanted.limit, _wanted_heads(heads, wanted), key=lambda one: one[0])
    return [head for _, head in found]


def _wanted_heads(heads: Iterable[Head], wanted: ConversationQuery) -> Iterator[tuple[tuple[int, str], Head]]:
    for head in heads:
        said = _decode_head(head.value)
        if (
            wanted.user_id not in (None, said.user_id)
            or wanted.session_id not in (None, said.session_id)
            or wanted.escalated not in (None, said.escalated)
            or wanted.archived not in (None, said.archived)
        ):
            continue
        updated_ms = parse_ms(said.updated_at)
        if wanted.since_ms is not None and updated_ms < wanted.since_ms:
            continue
        if wanted.until_ms is not None and updated_ms >= wanted.until_ms:
            continue
        if wanted.after is None or (updated_ms, head.id) < wanted.after:
            yield (updated_ms, head.id), head


def escalations_among(escalations: Iterable[Escalation], wanted: EscalationQuery) -> list[Escalation]:
    """As ``Archive.escalations``, of *escalations*."""
    after = None if wanted.after is None else (_rank(wanted.after[0]), *wanted.after[1:])
    placed = []
    for escalation in escalations:
        said = _decode_escalation(escalation.value)
        place = (_rank(said.priority), parse_ms(said.opened_at), escalation.id)
        if (
            wanted.status in (None, said.status)
            and wanted.priority in (None, said.priority)
            and (after is None or place > after)
        ):
            placed.append((place, escalation))
    return [escalation for _, escalation in heapq.nsmallest(wanted.limit, placed, key=lambda one: one[0])]


def _rank(priority: str) -> int:
    return _RANKS.get(priority, _RANK_OF_OTHERS)
