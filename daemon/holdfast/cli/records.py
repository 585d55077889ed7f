"""Commands for records: ``sessions``, ``orders``, ``users``, ``collections``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain, islice
from typing import Any, NamedTuple

import click
import msgspec
import orjson

from holdfast.cli.arguments import AMOUNT, COUNT, GENERATION, HEADER_TEXT, SINCE, TEXT, VERSION, json_value
from holdfast.cli.completion import complete_collection, complete_id
from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_flags, daemon_options, decoded, named_daemon, path_of
from holdfast.cli.show import (
    Column,
    Progress,
    counted,
    examples,
    is_terminal,
    json_option,
    print_json,
    print_table,
    print_value,
    printable,
    readable_count,
    readable_span,
    styled,
)
from holdfast.clock import Clock, parse_ms
from holdfast.errors import BadRequest, NotFound

LIST_LIMIT = 100
"""Records that ``list`` shows unless told otherwise."""

PAGE_LIMIT = 1000
"""Records asked for at once; the default of ``limits.page``."""

BATCH_OPS = 500
"""Records removed by one request."""

REFUSALS_TOLD = 10
"""Records that ``rm`` could not remove are named up to this many."""

NAMES_TOLD = 10
"""Collections are named up to this many when another was meant."""

CELL_CHARS = 40
"""Of a state or time in a list, which are whatever the bots have written there."""

Arguments = dict[str, Any]


class Kind(NamedTuple):
    """What tells the commands of one kind of record from those of another.

    Attributes:
        command: as typed after ``holdfast``.
        segments: of the path below ``/v1``.
        state_field, time_fields: of the value, shown in the list; the first time that is there counts.
        example: an id, for the help.
    """

    noun: str
    command: str
    segments: tuple[str, ...]
    state_field: str | None = None
    time_fields: tuple[str, ...] = ()
    example: tuple[str, str] = ("573001234567", '{"name": "Ana"}')

    @property
    def is_session(self) -> bool:
        """It has a ttl of its own, and leases."""
        return self.noun == "session"

    def op(self, verb: str, fields: Arguments) -> Arguments:
        """An op of a batch on a record of this kind."""
        return {"op": f"{self.noun}.{verb}", **self._place, **fields}

    @property
    def _place(self) -> Arguments:
        return {"collection": self.segments[1]} if self.noun == "record" else {}


SESSIONS = Kind(
    "session",
    "sessions",
    ("sessions",),
    "currentState",
    ("lastActivity",),
    ("573001234567", '{"currentState": "catalog"}'),
)
ORDERS = Kind(
    "order",
    "orders",
    ("orders",),
    "status",
    ("completedAt", "cancelledAt", "updatedAt", "createdAt"),
    ("1001", '{"recipientPhone": "573001234567", "productType": "music"}'),
)
USERS = Kind("user", "users", ("users",))


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


# The groups.


class _InOrder(click.Group):
    """Shows its commands in the order in which they were added: reading before changing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _group(kind: Kind, purpose: str, *further: Callable[[Kind], click.Command]) -> click.Group:
    id, value = kind.example

    @click.group(
        kind.command,
        cls=_InOrder,
        help=purpose,
        epilog=examples(f"holdfast {kind.command} list", f"holdfast {kind.command} put {id} '{value}'"),
    )
    @daemon_flags
    def group(**_: Any) -> None:
        pass

    for make in (_list, _get, _put, _patch, _rm, *further):
        group.add_command(make(kind))
    return group


class _Collections(click.Group):
    """``list``, and any name of a collection with the commands for its records."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["list"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "list":
            return _names
        name = TEXT.convert(cmd_name, None, ctx)
        kind = Kind("record", f"collections {name}", ("collections", name), example=("n1", '{"text": "hello"}'))
        return _group(kind, f"Read and change the records of the collection {name}.")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # A name that begins with a dash is a mistyped option, and told as such.
        if args and args[0].startswith("-"):
            ctx.fail(f"No such option: {args[0]}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = map(CompletionItem, complete_collection(ctx, incomplete))
        return [*super().shell_complete(ctx, incomplete), *names]


@click.group(
    cls=_Collections,
    invoke_without_command=True,
    subcommand_metavar="[list | NAME list|get|put|patch|rm]",
    epilog=examples(
        "holdfast collections",
        "holdfast collections notes list",
        'holdfast collections notes put n1 \'{"text": "hi"}\'',
    ),
)
@daemon_flags
@click.pass_context
def collections(ctx: click.Context, /, **_: Any) -> None:
    """List the custom collections; read and change the records of one.

    A collection comes into being with its first record, and is gone with its last.
    """
    if ctx.invoked_subcommand is None:
        _show_names(named_daemon(ctx), as_json=False)


@click.command("list", epilog=examples("holdfast collections list", "holdfast collections list --json"))
@json_option
@daemon_options
def _names(daemon: Daemon, as_json: bool) -> None:
    """List the custom collections with their numbers of records."""
    _show_names(daemon, as_json=as_json)


def _show_names(daemon: Daemon, *, as_json: bool) -> None:
    found = _collections(daemon)
    if as_json:
        return print_json([{"name": one.name, "count": one.count} for one in found])
    print_table(
        [Column("collection"), Column("records", is_number=True)], ([one.name, str(one.count)] for one in found)
    )


def _collections(daemon: Daemon) -> list[Name]:
    return decoded(daemon.fetch("GET", path_of("collections")).body, Names, daemon).items


# Options that several commands have.


def _id_argument(kind: Kind, **more: Any) -> Callable[..., Any]:
    return click.argument("id", type=TEXT, metavar="ID", shell_complete=complete_id(kind.segments), **more)


def _write_options(kind: Kind, *, has_ttl: bool = True, has_condition: bool = True) -> Callable[..., Any]:
    """The options that each change takes; the command receives them as ``how``."""
    options = [
        click.option(
            "--durability", type=click.Choice(["always", "everysec"]), help="When it is acknowledged; else as set."
        ),
        click.option(
            "--idempotency-key", type=HEADER_TEXT, metavar="KEY", help="A repeat within 24 h changes nothing."
        ),
    ]
    if has_condition:
        options.append(
            click.option(
                "--if-version",
                type=VERSION,
                metavar="N",
                help="Only when the record has this version; 0: only when there is none.",
            )
        )
        if kind.is_session:
            options.append(
                click.option(
                    "--lease",
                    type=GENERATION,
                    metavar="GENERATION",
                    help="Write under this lease.",
                )
            )
    if kind.is_session and has_ttl:
        options.append(click.option("--ttl", type=TEXT, metavar="SPAN", help="Idle time of its own, such as 2h."))

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        # Each goes before those already there, so that conditions come first in the help.
        for option in options:
            command = option(command)
        return command

    return with_options


def _headers(how: Arguments) -> dict[str, str]:
    headers: dict[str, str] = {}
    version = how.get("if_version")
    if version == 0:
        headers["If-None-Match"] = "*"
    elif version is not None:
        headers["If-Match"] = f'"{version}"'
    for option, header in (
        ("idempotency_key", "Idempotency-Key"),
        ("durability", "Holdfast-Durability"),
        ("lease", "Holdfast-Lease"),
    ):
        if how.get(option) is not None:
            headers[header] = str(how[option])
    return headers


def _change(
    daemon: Daemon, method: str, kind: Kind, id: str, how: Arguments, *action: str, body: Any = None
) -> dict[str, Any]:
    query = {"ttl": how["ttl"]} if how.get("ttl") is not None else None
    raw = body if isinstance(body, bytes | None) else orjson.dumps(body)
    return daemon.request(method, path_of(*kind.segments, id, *action), query=query, headers=_headers(how), body=raw)


def _tell(kind: Kind, answer: dict[str, Any], as_json: bool, done: str) -> None:
    if as_json:
        return print_json(answer)
    click.echo(f"{kind.noun} {answer['id']} {done}: version {answer['version']}, seq {answer['seq']}")


# The commands that every kind has.


def _list(kind: Kind) -> click.Command:
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
    @click.option(
        "--limit",
        type=COUNT,
        default=LIST_LIMIT,
        show_default=True,
        metavar="N",
        help="At most so many.",
    )
    @click.option("--all", "is_all", is_flag=True, help="All of them.")
    @click.option(
        "--since", type=SINCE, metavar="TIME", help="Active or changed since: ISO 8601, or a span such as 2h."
    )
    @json_option
    @daemon_options
    def list_(
        daemon: Daemon, limit: int, is_all: bool, since: str | None, as_json: bool, state: str | None = None
    ) -> None:
        query = {name: value for name, value in (("since", since), ("state", state)) if value is not None}
        items = _items(daemon, kind, query, sys.maxsize if is_all else limit + 1)
        first = next(items, None)
        if first is None and not query:
            _check_collection(daemon, kind)
        every = items if first is None else chain([first], items)
        with Progress(
            f"reading {kind.command}",
            lambda: None if query else _count(daemon, kind),
            # Rows that run over the terminal are progress enough.
            is_wanted=not is_terminal(),
        ) as progress:
            shown = counted(every if is_all else islice(every, limit), progress)
            if as_json:
                _print_array(shown)
            else:
                print_table(_columns(kind), (_row(kind, item) for item in shown))
        if is_terminal() and not as_json and next(every, None) is not None:
            click.echo(styled(f"and more: --limit {limit * 10} shows more, --all everything", dim=True))

    if kind.state_field is not None:
        option = click.option("--state", type=TEXT, metavar="STATE", help=f"Only those with this {kind.state_field}.")
        option(list_)
    return list_


def _items(daemon: Daemon, kind: Kind, query: dict[str, str], wanted: int) -> Iterator[Item]:
    """The records of a list, page after page, asked for when they are needed; about *wanted* at once."""
    path = path_of(*kind.segments)
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
        page = decoded(reply.body, Page, daemon)
        yield from page.items
        if page.next is None:
            return
        asked["cursor"] = page.next


def _count(daemon: Daemon, kind: Kind) -> int | None:
    status = daemon.request("GET", path_of("admin", "status"))
    match kind.segments:
        case ["orders"]:
            counts = [status.get("pending_orders"), status.get("completed_orders")]
        case ["collections", name]:
            counts = [status.get("collections", {}).get(name)]
        case _:
            counts = [status.get(kind.segments[0])]
    return None if None in counts else sum(count or 0 for count in counts)


def _check_collection(daemon: Daemon, kind: Kind) -> None:
    """Tell a mistyped collection from one that has nothing to show.

    Raises:
        NotFound: no such custom collection; the message names those that there are.
    """
    if kind.noun != "record":
        return
    names = [one.name for one in _collections(daemon)]
    if kind.segments[1] not in names:
        known = ", ".join(names[:NAMES_TOLD]) + (" and more" if len(names) > NAMES_TOLD else "")
        raise NotFound(f"no collection {kind.segments[1]!r}; there {f'are: {known}' if names else 'is none yet'}")


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
        cells.append(_cell(shown.pop(kind.state_field, None)))
        time_field = next((field for field in kind.time_fields if shown.get(field)), None)
        cells.append(_moment(shown.pop(time_field)) if time_field else "-")
    # For people without what stands in the other columns; for programs as it is stored.
    return [*cells, orjson.dumps(shown).decode() if is_terminal() else raw.decode()]


def _moment(time: Any) -> str:
    """*time* as it is, for people as how long ago that was."""
    text = _cell(time)
    try:
        # Without an offset only the daemon knows the zone.
        has_offset = is_terminal() and datetime.fromisoformat(text).tzinfo is not None
        ago_s = (Clock().now_ms() - parse_ms(text)) / 1000
    except (ValueError, OverflowError):
        return text
    return f"{readable_span(ago_s)} ago" if has_offset and ago_s >= 0 else text


def _cell(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"


def _print_array(items: Iterator[Item]) -> None:
    """One array, valid JSON for any tool and yet a record a line, as the snapshot files have it."""
    click.echo("[", nl=False)
    separator = b"\n"
    while some := list(islice(items, PAGE_LIMIT)):
        lines = b",\n".join(map(_encode_item, some))
        click.echo(separator + lines, nl=False)
        separator = b",\n"
    click.echo("\n]")


_encode_item = msgspec.json.Encoder().encode


def _get(kind: Kind) -> click.Command:
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
    @_id_argument(kind)
    @click.option("--with-version", is_flag=True, help="Print id, version and value, as the list has them.")
    @json_option
    @daemon_options
    def get(daemon: Daemon, id: str, with_version: bool, as_json: bool) -> None:
        try:
            reply = daemon.fetch("GET", path_of(*kind.segments, id))
        except NotFound:
            _check_collection(daemon, kind)
            raise
        value = reply.body
        if with_version:
            value = _encode_item(Item(id, reply.version or 0, msgspec.Raw(value)))
        if as_json:
            click.echo(value)
        else:
            print_value(value)

    return get


_VALUE_HELP = "VALUE is a JSON object, @FILE names a file that holds one, - reads it from stdin."


def _put(kind: Kind) -> click.Command:
    id, value = kind.example

    @click.command(
        "put",
        help=f"Store one {kind.noun} whole.\n\n{_VALUE_HELP}",
        epilog=examples(
            f"holdfast {kind.command} put {id} '{value}'",
            f"holdfast {kind.command} put {id} @{kind.noun}.json --if-version 0",
            f"jq -n '{{}}' | holdfast {kind.command} put {id} -",
        ),
    )
    @_id_argument(kind)
    @click.argument("value", metavar="VALUE")
    @_write_options(kind)
    @json_option
    @daemon_options
    def put(daemon: Daemon, id: str, value: str, as_json: bool, **how: Any) -> None:
        answer = _change(daemon, "PUT", kind, id, how, body=json_value(value))
        _tell(kind, answer, as_json, "stored")

    return put


def _patch(kind: Kind) -> click.Command:
    id, value = kind.example

    @click.command(
        "patch",
        help=f"Merge a patch into one {kind.noun} (RFC 7396: null removes a key).\n\n{_VALUE_HELP}",
        epilog=examples(
            f"holdfast {kind.command} patch {id} '{value}'",
            f"holdfast {kind.command} patch {id} '{{\"note\": null}}' --if-version 3",
        ),
    )
    @_id_argument(kind)
    @click.argument("value", metavar="VALUE")
    @_write_options(kind)
    @json_option
    @daemon_options
    def patch(daemon: Daemon, id: str, value: str, as_json: bool, **how: Any) -> None:
        answer = _change(daemon, "PATCH", kind, id, how, body=json_value(value))
        _tell(kind, answer, as_json, "changed")

    return patch


def _rm(kind: Kind) -> click.Command:
    id, _ = kind.example

    @click.command(
        "rm",
        help=f"""Remove {kind.command.split()[0]} by their ids, or all of them.

        Those that cannot be removed are told and the others removed all the same; the exit code is 1 then.
        """,
        epilog=examples(
            f"holdfast {kind.command} rm {id}",
            f"holdfast {kind.command} rm {id} --if-version 3",
            f"holdfast {kind.command} rm --all --yes",
        ),
    )
    @_id_argument(kind, nargs=-1)
    @click.option("--all", "is_all", is_flag=True, help="All there are; asks first.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @_write_options(kind, has_ttl=False)
    @json_option
    @daemon_options
    def rm(daemon: Daemon, id: tuple[str, ...], is_all: bool, yes: bool, as_json: bool, **how: Any) -> int:
        if is_all == bool(id):
            raise click.UsageError("expected ids, or --all; found " + ("both" if id else "neither"))
        own = {name: how[name] for name in ("if_version", "lease", "idempotency_key") if how.get(name) is not None}
        if own and len(id) != 1:
            raise click.UsageError(f"--{next(iter(own)).replace('_', '-')} goes with one id only")
        total: int | None = len(id)
        ids: Iterator[str] = iter(id)
        if is_all:
            _check_collection(daemon, kind)
            total = _count(daemon, kind)
            _confirm(f"remove all {kind.command} ({readable_count(total or 0, 'record')})", yes)
            ids = (item.id for item in _items(daemon, kind, {}, PAGE_LIMIT))
        removed, refused = 0, []
        with Progress(f"removing {kind.command}", lambda: total) as progress:
            while some := list(islice(ids, BATCH_OPS)):
                for one, result in zip(some, _removed(daemon, kind, some, own, how), strict=True):
                    if result["status"] < 400:
                        removed += 1
                    else:
                        refused.append({"id": one, "code": result["code"], "detail": result["detail"]})
                progress.advance(len(some))
        if as_json:
            print_json({"removed": removed, "refused": refused})
        else:
            click.echo(f"removed {readable_count(removed, kind.noun)}")
        for refusal in refused[:REFUSALS_TOLD]:
            click.echo(f"holdfast: {printable(refusal['detail'])}", err=True)
        if len(refused) > REFUSALS_TOLD:
            click.echo(f"holdfast: {len(refused)} were not removed; --json names them all", err=True)
        return 1 if refused else 0

    return rm


def _removed(daemon: Daemon, kind: Kind, ids: list[str], own: Arguments, how: Arguments) -> list[dict[str, Any]]:
    """The result of removing each of *ids*, in their order."""
    durability = {"durability": how["durability"]} if how.get("durability") else None
    ops = [kind.op("delete", {"id": id, **own}) for id in ids]
    results: list[dict[str, Any]] = daemon.request(
        "POST", path_of("batch"), query=durability, body=orjson.dumps({"ops": ops}), timeout_s=WORK_TIMEOUT_S
    )["results"]
    return results


def _confirm(what: str, yes: bool) -> None:
    """Ask before *what*, where there is somebody to ask.

    Raises:
        click.UsageError: nobody can be asked, and --yes is not given.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"this would {what}; say --yes")
    click.confirm(what.capitalize() + "?", abort=True, err=True)


# The commands that sessions and orders have of their own.


def _touch(kind: Kind) -> click.Command:
    @click.command("touch", epilog=examples("holdfast sessions touch 573001234567 --ttl 2h"))
    @_id_argument(kind)
    @_write_options(kind)
    @json_option
    @daemon_options
    def touch(daemon: Daemon, id: str, as_json: bool, **how: Any) -> None:
        """Set the last activity of a session to now."""
        _tell(kind, _change(daemon, "POST", kind, id, how, "touch"), as_json, "touched")

    return touch


def _lease(kind: Kind) -> click.Command:
    @click.command(
        "lease",
        epilog=examples(
            "holdfast sessions lease 573001234567 --for 5m --owner ana",
            "holdfast sessions put 573001234567 '{}' --lease 1234",
            "holdfast sessions lease 573001234567 --renew 1234",
        ),
    )
    @_id_argument(kind)
    @click.option("--for", "span", type=TEXT, default="30s", show_default=True, metavar="SPAN", help="How long.")
    @click.option("--owner", type=TEXT, metavar="NAME", help="Told to whoever meets the lease.")
    @click.option("--renew", type=GENERATION, metavar="GENERATION", help="Renew this lease.")
    @_write_options(kind, has_ttl=False, has_condition=False)
    @json_option
    @daemon_options
    def lease(
        daemon: Daemon, id: str, span: str, owner: str | None, renew: int | None, as_json: bool, **how: Any
    ) -> None:
        """Take a session for yourself; other writers are refused until the lease ends.

        Write under it with --lease GENERATION, and give it back with `release`.
        """
        body = {name: value for name, value in (("ttl", span), ("owner", owner), ("generation", renew)) if value}
        answer = _change(daemon, "POST", kind, id, how, "lease", body=body)
        if as_json:
            return print_json(answer)
        click.echo(
            f"session {answer['id']} is yours until {answer['expires_at']}, as generation {answer['generation']}"
        )

    return lease


def _release(kind: Kind) -> click.Command:
    @click.command("release", epilog=examples("holdfast sessions release 573001234567 1234"))
    @_id_argument(kind)
    @click.argument("generation", type=GENERATION, metavar="GENERATION")
    @_write_options(kind, has_ttl=False, has_condition=False)
    @json_option
    @daemon_options
    def release(daemon: Daemon, id: str, generation: int, as_json: bool, **how: Any) -> None:
        """Give the lease GENERATION of a session back."""
        answer = _change(daemon, "POST", kind, id, how, "release", body={"generation": generation})
        if as_json:
            return print_json(answer)
        click.echo(f"session {answer['id']} is released")

    return release


def _complete(kind: Kind) -> click.Command:
    @click.command("complete", epilog=examples("holdfast orders complete 1001 --revenue 84900.50"))
    @_id_argument(kind)
    @click.option("--revenue", type=AMOUNT, metavar="AMOUNT", help="Counted once, exactly as written.")
    @_write_options(kind)
    @json_option
    @daemon_options
    def complete(daemon: Daemon, id: str, revenue: str | None, as_json: bool, **how: Any) -> None:
        """Complete an order, with its revenue; a repeat counts nothing again."""
        body = None if revenue is None else {"revenue": revenue}
        _tell(kind, _change(daemon, "POST", kind, id, how, "complete", body=body), as_json, "completed")

    return complete


def _cancel(kind: Kind) -> click.Command:
    @click.command("cancel", epilog=examples("holdfast orders cancel 1001 --reason 'paid twice'"))
    @_id_argument(kind)
    @click.option("--reason", type=TEXT, metavar="TEXT", help="Kept in the order.")
    @_write_options(kind)
    @json_option
    @daemon_options
    def cancel(daemon: Daemon, id: str, reason: str | None, as_json: bool, **how: Any) -> None:
        """Cancel a pending order."""
        body = None if reason is None else {"reason": reason}
        _tell(kind, _change(daemon, "POST", kind, id, how, "cancel", body=body), as_json, "cancelled")

    return cancel


sessions = _group(SESSIONS, "Read and change sessions.", _touch, _lease, _release)
orders = _group(ORDERS, "Read and change orders.", _complete, _cancel)
users = _group(USERS, "Read and change user profiles.")
