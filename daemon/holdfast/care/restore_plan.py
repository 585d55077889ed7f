"""What going back would change: shown before anything is done, collection by collection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
import orjson

from holdfast import record
from holdfast.care.history import History
from holdfast.care.moments import (
    Target,
    naming_another,
)
from holdfast.care.rewind import SALES, present_of, state_of
from holdfast.care.seal import AgeSeal
from holdfast.clock import format_ms
from holdfast.core.decide import activity_ms
from holdfast.core.rules import Rules, rules_of
from holdfast.core.sales import encode_sales
from holdfast.core.state import COMPLETED_ORDERS, CONVERSATIONS, ESCALATIONS, ORDERS, SESSIONS, USERS, State
from holdfast.engine import Engine
from holdfast.errors import NotFound
from holdfast.ops import Record
from holdfast.settings import Settings

COMPARED = (SESSIONS, ORDERS, COMPLETED_ORDERS, USERS, CONVERSATIONS, ESCALATIONS)
"""The collections that a plan always shows; custom ones follow when they hold something."""


class RestoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore makes of one collection.

    Attributes:
        collection: its name; ``messages`` for those of all conversations.
        now, then: how many there are, and will be.
        added, changed, removed: of the present ones; messages are never changed.
        oldest, newest: when the records that come back were last active or changed, ISO 8601; None when that is not known.
    """

    collection: str
    now: int
    then: int
    added: int
    changed: int
    removed: int
    oldest: str | None = None
    newest: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether it stays as it is."""
        return not (self.added or self.changed or self.removed)


class RestorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore would do.

    Attributes:
        backup: name of the set.
        backup_at: when it was made; *at* is the moment of the state, both ISO 8601.
        is_proved: whether all of the set was loaded once.
        seq: the last event of that state.
        rows: by collection.
        expiring: sessions that are too old by now, and go with the next expiry.
        has_other_sales: whether the sales figures change.
    """

    backup: str
    backup_at: str
    at: str
    is_proved: bool
    seq: int
    rows: list[RestoreRow]
    expiring: int = 0
    has_other_sales: bool = False


# What would change.


def records_in(state: State, collection: str) -> Iterator[Record]:
    """All records of *collection* in *state*, which nobody changes."""
    found = state.collections.get(collection)
    for id in found or ():
        assert found is not None
        line = found.get(id)
        if line is not None:
            value, version = record.split(line)
            yield Record(id, version, value)


def plan(
    target: Target,
    then: State,
    present: Callable[[str], Iterable[Record]],
    custom: Iterable[str],
    present_sales: bytes | None,
    then_sales: bytes,
    rules: Rules,
    now_ms: int,
) -> RestorePlan:
    """What becomes of each collection when the state *then* takes the place of the *present*.

    Args:
        present: gives the records of a collection as they are now.
        custom: names of the custom collections there are now.
        present_sales, then_sales: the figures as in their file.
    """
    assert target.found.manifest is not None
    names = [*COMPARED, *sorted({*custom, *(one.name for one in then.custom())})]
    rows = []
    for name in names:
        row, counted = _row(name, then, present(name), rules)
        rows.append(row)
        if name == CONVERSATIONS:
            now, was = counted
            rows.append(
                RestoreRow(
                    collection="messages",
                    now=now,
                    then=was,
                    added=max(0, was - now),
                    changed=0,
                    removed=max(0, now - was),
                )
            )
    due = (now_ms - rules.session_ttl_ms, now_ms)
    return RestorePlan(
        backup=target.found.name,
        backup_at=target.found.manifest.at,
        at=format_ms(target.at_ms),
        is_proved=target.found.is_proved,
        seq=target.seq,
        rows=rows,
        expiring=sum(_is_over(line, rules, due) for line in map(then.sessions.get, then.sessions) if line is not None),
        has_other_sales=present_sales != then_sales,
    )


@naming_another()
def planned(
    settings: Settings,
    target: Target,
    seal: AgeSeal | None,
    history: History,
    *,
    engine: Engine | None,
    now_ms: int,
    part: tuple[tuple[str, ...], str | None] | None = None,
) -> tuple[RestorePlan, State]:
    """The plan, and the state that would come back; of the *engine*, or of the stopped directory. Blocks; changes nothing.

    *part* are the collections, and perhaps the one record, that are to be put back; None means everything.

    Raises:
        SetDamaged, HistoryGap, DataRefused: what was at that moment cannot be had.
        NotFound: the one record was not there then.
    """
    then = state_of(
        target.found,
        seal,
        settings,
        up_to_seq=target.seq,
        history=history,
        collections=None if part is None else {*part[0], SALES},
    )
    present: Callable[[str], Iterable[Record]]
    if engine is not None:
        present, custom, sales = engine.everything, engine.collection_names(), engine.sales()
    else:
        now = present_of(settings.data_dir, settings)
        custom, sales = [one.name for one in now.custom()], encode_sales(now.sales)

        def present(name: str) -> Iterable[Record]:
            return records_in(now, name)

    rules = rules_of(settings)
    if part is None:
        whole = plan(target, then, present, custom, sales, encode_sales(then.sales), rules, now_ms)
        return whole, then
    names, id = part
    shown = then
    if id is not None:
        shown = State(rules.session_ttl_ms)
        for name in names:
            line = then.collections[name].get(id) if name in then.collections else None
            if line is not None:
                shown.collection(name).fill(id, line)
        if not any(one.count for one in shown.collections.values()):
            raise NotFound(
                f"backup {target.found.name} has no {id!a:.80} among the {names[0]} of that moment; "
                "name an older one (`holdfast backups`), or an earlier moment with --at"
            )
    elif names[0] not in {*COMPARED, *then.collections, *custom}:
        raise NotFound(
            f"neither backup {target.found.name} nor the present has a collection {names[0]!a:.80}; "
            f"there are now: {', '.join([*COMPARED[:4], *custom])}"
        )
    rows = plan(
        target,
        shown,
        lambda name: (one for one in present(name) if id is None or one.id == id) if name in names else iter(()),
        [name for name in names if name not in COMPARED],
        None,
        b"",
        rules,
        now_ms,
    )
    return (
        msgspec.structs.replace(
            rows,
            rows=[row for row in rows.rows if row.collection in names],
            has_other_sales=False,
            expiring=rows.expiring if SESSIONS in names else 0,
        ),
        then,
    )


def _row(name: str, then: State, present: Iterable[Record], rules: Rules) -> tuple[RestoreRow, tuple[int, int]]:
    """The row of the collection *name*; of conversations also their messages now and then."""
    found = then.collections.get(name)
    now = same = changed = removed = messages_now = messages_then = 0
    for one in present:
        now += 1
        if name == CONVERSATIONS:
            messages_now += messages_in(one.value)
        line = None if found is None else found.get(one.id)
        if line is None:
            removed += 1
        elif record.value_of(line) == one.value:
            same += 1
        else:
            changed += 1
    oldest = newest = 0
    for id in found or ():
        assert found is not None
        line = found.get(id)
        if line is None:
            continue
        if name == CONVERSATIONS:
            messages_then += messages_in(record.value_of(line))
        at = activity_ms(line, rules) if name == SESSIONS else record.header_of(line).at
        if at:
            oldest, newest = min(oldest or at, at), max(newest, at)
    count = 0 if found is None else found.count
    row = RestoreRow(
        collection=name,
        now=now,
        then=count,
        added=count - same - changed,
        changed=changed,
        removed=removed,
        oldest=format_ms(oldest) if oldest else None,
        newest=format_ms(newest) if newest else None,
    )
    return row, (messages_now, messages_then)


def messages_in(head: bytes) -> int:
    """How many messages the conversation *head* says that it has."""
    said = orjson.loads(head)
    return int(said["message_count"]) + int(said["system_count"])


def _is_over(line: bytes, rules: Rules, due: tuple[int, int]) -> bool:
    ttl = record.header_of(line).ttl
    return activity_ms(line, rules) <= (due[0] if ttl is None else due[1] - ttl)
