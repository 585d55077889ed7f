"""Commands that read records: ``list``, ``get``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any

import click
import msgspec
import orjson

from holdfast.cli.arguments import COUNT, SINCE, TEXT
from holdfast.cli.connection import Daemon, daemon_options
from holdfast.cli.kinds import Kind, id_argument
from holdfast.cli.show import (
    Column,
    Progress,
    counted,
    examples,
    is_terminal,
    json_option,
    print_table,
    print_value,
    readable_span,
    styled,
)
from holdfast.clock import Clock, parse_ms
from holdfast.errors import BadRequest, NotFound

LIST_LIMIT = 100
"""Records that ``list`` shows unless told otherwise."""

PAGE_LIMIT = 1000
"""Records asked for at once; the default of ``limits.page``."""

NAMES_TOLD = 10
"""Collections are named up to this many when another was meant."""

CELL_CHARS = 40
"""Of a state or time in a list, which are whatever the bots have written there."""


class Item(msgspec.Struct, frozen=True):
    """A record of a list; its value as the bytes that are stored."""

    id: str
    version: int
    value: msgspec.Raw


class Page(msgspec.Struct, frozen=True):
    """A page of a list."""

    items: list[Item]
    next: str | None


class Name(msgspec.Struct, frozen=True):
    """A custom collection that holds something."""

    name: str
    count: int


class Names(msgspec.Struct, frozen=True):
    """All custom collections."""

    items: list[Name]


def collections_of(daemon: Daemon) -> list[Name]:
    """The custom collections that there are."""
    return daemon.fetch("GET", "/v1/collections").decoded(Names).items


def list_command(kind: Kind) -> click.Command:
    """``list``, for records of *kind*."""

    @click.command(
        "list",
        help=f"""List {kind.command.split()[0]}, in an order of no meaning.

        --json prints one array, a record a line, while it comes. For people the value is cut to the terminal.
        """,
        epilog=examples(
            f"holdfast {kind.command} list --limit 20",
            f"holdfast {kind.command} list --since 2h",
            f"holdfast {kind.command} list --all --json | jq '.[].id'",
        ),
    )
    @limit_options
    @click.option(
        "--since", type=SINCE, metavar="TIME", help="Active or changed since: ISO 8601, or a span such as 2h."
    )
    @json_option
    @daemon_options
    def list_(
        daemon: Daemon, limit: int, is_all: bool, since: str | None, as_json: bool, state: str | None = None
    ) -> None:
        query = {name: value for name, value in (("since", since), ("state", state)) if value is not None}
        items = items_of(daemon, kind.path, query, sys.maxsize if is_all else limit + 1)
        first = next(items, None)
        if first is None and not query:
            check_collection(daemon, kind)
        every = items if first is None else chain([first], items)
        print_list(
            every,
            _columns(kind),
            lambda item: _row(kind, item),
            what=kind.command,
            limit=None if is_all else limit,
            total=lambda: None if query else count_of(daemon, kind),
            as_json=as_json,
        )

    if kind.state_field is not None:
        option = click.option("--state", type=TEXT, metavar="STATE", help=f"Only those with this {kind.state_field}.")
        option(list_)
    return list_


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How much of a list is shown; the command receives ``limit`` and ``is_all``."""
    how_many = click.option(
        "--limit", type=COUNT, default=LIST_LIMIT, show_default=True, metavar="N", help="At most so many."
    )
    return how_many(click.option("--all", "is_all", is_flag=True, help="All of them.")(command))


def print_list(
    items: Iterator[Item],
    columns: Sequence[Column],
    row: Callable[[Item], Sequence[str]],
    *,
    what: str,
    limit: int | None,
    total: Callable[[], int | None],
    as_json: bool,
) -> None:
    """Print *items*, up to *limit* of them, while they come: each as a *row*, or all as one JSON array.

    Args:
        what: they are, for the progress bar, which asks for their *total* when it appears.
    """
    # Rows that run over the terminal are progress enough.
    with Progress(f"reading {what}", total, is_wanted=not is_terminal()) as progress:
        shown = counted(items if limit is None else islice(items, limit), progress)
        if as_json:
            _print_array(shown)
        else:
            print_table(columns, map(row, shown))
    if limit is not None and is_terminal() and not as_json and next(items, None) is not None:
        click.echo(styled(f"and more: --limit {limit * 10} shows more, --all everything", dim=True))


def items_of(daemon: Daemon, path: str, query: dict[str, str], wanted: int) -> Iterator[Item]:
    """The records of the list at *path*, page after page, asked for when they are needed; about *wanted* at once."""
    for page in pages_of(daemon, path, query, wanted):
        yield from page.items


def pages_of(
    daemon: Daemon, path: str, query: dict[str, str], wanted: int, *, cursor: str = "cursor"
) -> Iterator[Page]:
    """The pages of which ``items_of`` are, each going on at the *cursor* of the one before."""
    asked = {"limit": str(min(wanted, PAGE_LIMIT)), **query}
    while True:
        try:
            reply = daemon.fetch("GET", path, query=asked)
        except BadRequest as error:
            # limits.page is smaller than we hoped; then the daemon's own choice will do.
            if "limit" not in asked or "expected a limit" not in error.detail:
                raise
            del asked["limit"]
            continue
        page = reply.decoded(Page)
        yield page
        if page.next is None:
            return
        asked[cursor] = page.next


def count_of(daemon: Daemon, kind: Kind) -> int | None:
    """How many records of *kind* there are; None when the daemon does not say."""
    status = daemon.fetch("GET", "/v1/admin/status").fields()
    if kind.is_custom:
        counts = [status.get("collections", {}).get(kind.collection)]
    elif kind.noun == "order":
        counts = [status.get("pending_orders"), status.get("completed_orders")]
    else:
        counts = [status.get(kind.collection)]
    return None if None in counts else sum(count or 0 for count in counts)


def check_collection(daemon: Daemon, kind: Kind) -> None:
    """Tell a mistyped collection from one that has nothing to show.

    Raises:
        NotFound: no such custom collection; the message names those that there are.
    """
    if not kind.is_custom:
        return
    names = [one.name for one in collections_of(daemon)]
    if kind.collection not in names:
        known = ", ".join(names[:NAMES_TOLD]) + (" and more" if len(names) > NAMES_TOLD else "")
        raise NotFound(f"no collection {kind.collection!r}; there {f'are: {known}' if names else 'is none yet'}")


def _columns(kind: Kind) -> list[Column]:
    columns = [Column("id"), Column("version", is_number=True)]
    if kind.state_field is not None:
        columns += [Column("state" if kind.is_session else "status"), Column(_time_title(kind))]
    return [*columns, Column("value", is_long=True)]


def _time_title(kind: Kind) -> str:
    return "last activity" if kind.is_session else "last change"


def _row(kind: Kind, item: Item) -> list[str]:
    raw = bytes(item.value)
    cells = [item.id, str(item.version)]
    if kind.state_field is None and not is_terminal():
        return [*cells, raw.decode()]
    value = orjson.loads(raw)
    shown = {name: inner for name, inner in value.items() if str(inner) != item.id}
    if kind.state_field is not None:
        cells.append(cell_of(shown.pop(kind.state_field, None)))
        time_field = next((field for field in kind.time_fields if shown.get(field)), None)
        cells.append(moment_of(shown.pop(time_field)) if time_field else "-")
    # For people without what stands in the other columns; for programs as it is stored.
    return [*cells, orjson.dumps(shown).decode() if is_terminal() else raw.decode()]


def moment_of(time: Any) -> str:
    """*time* as it is, for people as how long ago that was."""
    text = cell_of(time)
    try:
        # Without an offset only the daemon knows the zone.
        has_offset = is_terminal() and datetime.fromisoformat(text).tzinfo is not None
        ago_s = (Clock().now_ms() - parse_ms(text)) / 1000
    except (ValueError, OverflowError):
        return text
    return f"{readable_span(ago_s)} ago" if has_offset and ago_s >= 0 else text


def cell_of(value: Any) -> str:
    """*value* as it may stand in a cell."""
    text = "-" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"


def _print_array(items: Iterator[Item]) -> None:
    """One array, valid JSON for any tool and yet a record a line, as the snapshot files have it."""
    click.echo("[", nl=False)
    separator = b"\n"
    while some := list(islice(items, PAGE_LIMIT)):
        lines = b",\n".join(map(encode_item, some))
        click.echo(separator + lines, nl=False)
        separator = b",\n"
    click.echo("\n]")


encode_item = msgspec.json.Encoder().encode


def get_command(kind: Kind) -> click.Command:
    """``get``, for records of *kind*."""
    id, _ = kind.example

    @click.command(
        "get",
        help=f"""Print the value of one {kind.noun}; exit 1 when there is none.

        On a terminal it is indented; with --json, or in a pipe, it is printed as it is stored.
        """,
        epilog=examples(
            f"holdfast {kind.command} get {id}",
            f"holdfast {kind.command} get {id} --with-version",
            f"holdfast {kind.command} get {id} | jq .",
        ),
    )
    @id_argument(kind)
    @click.option("--with-version", is_flag=True, help="Print id, version and value, as the list has them.")
    @json_option
    @daemon_options
    def get(daemon: Daemon, id: str, with_version: bool, as_json: bool) -> None:
        try:
            reply = daemon.fetch("GET", kind.path_of(id))
        except NotFound:
            check_collection(daemon, kind)
            raise
        value = reply.body
        if with_version:
            value = encode_item(Item(id, reply.version or 0, msgspec.Raw(value)))
        if as_json:
            click.echo(value)
        else:
            print_value(value)

    return get
