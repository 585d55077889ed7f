"""The group ``conversations``: transcripts to find, read, put away and keep."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain
from typing import Any

import click

from holdfast.cli.arguments import COUNT, SINCE, TEXT, where_option
from holdfast.cli.changing import confirm, do_each, do_one, fields_of, remove_chosen, tell_preview, write_options
from holdfast.cli.connection import Daemon, daemon_flags, daemon_options
from holdfast.cli.groups import InOrder
from holdfast.cli.kinds import CONVERSATIONS, ESCALATIONS, id_argument
from holdfast.cli.pager import print_paged
from holdfast.cli.reading import Item, count_of, items_of, limit_options, pages_of, print_list
from holdfast.cli.show import Column, examples, is_terminal, json_option, print_json, readable_count, readable_span
from holdfast.cli.transcript import Escalation, Head, Message, Transcript
from holdfast.clock import Clock, format_ms
from holdfast.errors import NotFound

ROLES = ("system", "user", "assistant", "tool")
AUTHORS = ("bot", "agent", "customer")

_id = id_argument(CONVERSATIONS)


@click.group(
    "conversations",
    cls=InOrder,
    epilog=examples("holdfast conversations list --escalated", "holdfast conversations show 573001234567 --last 20"),
)
@daemon_flags
def conversations(**_: Any) -> None:
    """Find and read conversations; archive, hold and remove them."""


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which conversations are meant; the command receives each by the name of its parameter."""
    for option in reversed(
        (
            click.option("--user", "user_id", type=TEXT, metavar="ID", help="Only those of this user."),
            click.option("--session", "session_id", type=TEXT, metavar="ID", help="Only those of this session."),
            click.option(
                "--escalated/--no-escalated", default=None, help="Only those that are or were escalated, or the others."
            ),
            click.option("--archived/--no-archived", default=None, help="Only archived ones, or the others."),
            click.option("--since", type=SINCE, metavar="TIME", help="Updated since: ISO 8601, or a span such as 2h."),
            click.option("--until", type=SINCE, metavar="TIME", help="Updated before: ISO 8601, or a span such as 2h."),
            click.option("--active-within", type=TEXT, metavar="SPAN", help="Updated within this span, such as 7d."),
            click.option("--older-than", type=TEXT, metavar="SPAN", help="Not updated for this span, such as 90d."),
        )
    ):
        command = option(command)
    return command


@conversations.command(
    "list",
    epilog=examples(
        "holdfast conversations list --active-within 7d",
        "holdfast conversations list --user 573001234567 --no-archived",
        "holdfast conversations list --all --older-than 90d --json | jq -r '.[].id'",
    ),
)
@limit_options
@filter_options
@json_option
@daemon_options
def list_(daemon: Daemon, limit: int, is_all: bool, as_json: bool, **filters: Any) -> None:
    """List conversations, the one with the newest message first.

    --json prints one array, a conversation a line, while it comes. For people the title is cut to the terminal.
    """
    query = {name: _as_query(value) for name, value in filters.items() if value is not None}
    print_list(
        items_of(daemon, CONVERSATIONS.path, query, sys.maxsize if is_all else limit + 1),
        [
            Column("id"),
            Column("last message"),
            Column("messages", is_number=True),
            Column("state"),
            Column("title", is_long=True),
        ],
        lambda item: _row(daemon, item),
        what="conversations",
        limit=None if is_all else limit,
        total=lambda: None if query else count_of(daemon, CONVERSATIONS),
        as_json=as_json,
    )


def _as_query(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def _row(daemon: Daemon, item: Item) -> list[str]:
    head = daemon.understood(item.value, Head)
    return [item.id, moment(head.updated_at), str(head.message_count), state_of(head), head.title or ""]


def state_of(head: Head) -> str:
    """What is to be known of a conversation before one opens it; empty when it is one like any other."""
    states = {
        "waiting": head.handler == "waiting",
        "human": head.handler == "human",
        "escalated": head.escalated and head.handler == "bot",
        "archived": head.archived,
        "held": head.hold,
    }
    return ", ".join(name for name, is_so in states.items() if is_so)


def moment(at: datetime | None) -> str:
    """*at* as a program reads it, for people as how long ago that was."""
    if at is None:
        return "-"
    at_ms = round(at.timestamp() * 1000)
    ago_s = (Clock().now_ms() - at_ms) / 1000
    return f"{readable_span(ago_s)} ago" if is_terminal() and ago_s >= 0 else format_ms(at_ms)


@conversations.command(
    "show",
    epilog=examples(
        "holdfast conversations show 573001234567",
        "holdfast conversations show 573001234567 --last 20",
        "holdfast conversations show 573001234567 --role tool --since 2h",
        "holdfast conversations show 573001234567 --json | jq -r '.messages[].content'",
    ),
)
@_id
@click.option("--last", type=COUNT, metavar="N", help="Only the newest so many.")
@click.option("--role", type=click.Choice(ROLES), help="Only messages of this role.")
@click.option("--author", type=click.Choice(AUTHORS), help="Only messages of this author.")
@click.option("--since", type=SINCE, metavar="TIME", help="Only messages since: ISO 8601, or a span such as 2h.")
@click.option("--until", type=SINCE, metavar="TIME", help="Only messages before: ISO 8601, or a span such as 2h.")
@json_option
@daemon_options
def show(daemon: Daemon, id: str, last: int | None, as_json: bool, **filters: Any) -> None:
    """Print a conversation: who said what, when, in local time.

    On a terminal a long one is shown in $PAGER (less). --json prints the conversation with its messages, one a line.
    """
    query = {name: value for name, value in filters.items() if value is not None}
    head = daemon.fetch("GET", CONVERSATIONS.path_of(id), query={"messages": "false"}).body
    messages = _messages(daemon, id, query, last)
    if as_json:
        _print_whole(head, messages)
    else:
        print_paged(_written(daemon, daemon.understood(head, Head), messages, is_whole=not query and last is None))


def _messages(daemon: Daemon, id: str, query: dict[str, str], last: int | None) -> Iterator[Item]:
    """The messages of a conversation in their order: all that *query* wants, or the *last* of them."""
    path = CONVERSATIONS.path_of(id, "messages")
    if last is None:
        for page in pages_of(daemon, path, {"after": "0", **query}, sys.maxsize, cursor="after"):
            yield from page.items
        return
    pages: list[list[Item]] = []
    wanted = last
    for page in pages_of(daemon, path, query, last, cursor="before"):
        pages.append(page.items)
        wanted -= len(page.items)
        if wanted <= 0:
            break
    yield from list(chain.from_iterable(reversed(pages)))[-last:]


def _written(daemon: Daemon, head: Head, messages: Iterator[Item], *, is_whole: bool) -> Iterator[str]:
    transcript = Transcript(shutil.get_terminal_size().columns if is_terminal() else None)
    yield from transcript.heading(head, _escalation_of(daemon, head))
    first: int | None = None
    for item in messages:
        message = daemon.understood(item.value, Message)
        if first is None:
            first = message.number
            if is_whole and first > 1:
                yield from transcript.note(_deleted(first - 1))
        yield from transcript.lines(message)
    if first is None:
        nothing = _deleted(head.last_number) if head.last_number else "no message yet"
        yield from transcript.note(nothing if is_whole else "no such message")


def _deleted(count: int) -> str:
    return f"{readable_count(count, 'message')} deleted"


def _escalation_of(daemon: Daemon, head: Head) -> Escalation | None:
    if not head.escalated:
        return None
    try:
        return daemon.fetch("GET", ESCALATIONS.path_of(head.id)).decoded(Escalation)
    except NotFound:
        # Conversations of other programs are marked without one.
        return None


def _print_whole(head: bytes, messages: Iterator[Item]) -> None:
    """The conversation as one JSON object, its messages one a line and as they are stored."""
    click.echo(head.rstrip()[:-1] + b',"messages":[', nl=False)
    separator = b"\n"
    for item in messages:
        click.echo(separator + bytes(item.value), nl=False)
        separator = b",\n"
    click.echo("\n]}")


@conversations.command(
    "rm",
    epilog=examples(
        "holdfast conversations rm 573001234567",
        "holdfast conversations rm 573001234567 573007654321 --yes",
        "holdfast conversations rm --archived --older-than 365d --dry-run",
    ),
)
@id_argument(CONVERSATIONS, nargs=-1)
@filter_options
@where_option
@click.option("--dry-run", is_flag=True, help="Say how many are meant and name the first, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@write_options(CONVERSATIONS)
@json_option
@daemon_options
def rm(
    daemon: Daemon,
    id: tuple[str, ...],
    where: tuple[tuple[str, str], ...],
    dry_run: bool,
    yes: bool,
    as_json: bool,
    durability: str | None,
    idempotency_key: str | None,
    if_version: int | None,
    **filters: Any,
) -> int:
    """Remove conversations for good, by their ids or by what chooses them; on a terminal it asks first.

    Their messages and escalations go with them. Those that cannot be removed, such as one under a legal hold, are told and the others removed all the same; the exit
    code is 1 then.
    """
    how = {"durability": durability, "idempotency_key": idempotency_key, "if_version": if_version}
    query = {name: _as_query(value) for name, value in filters.items() if value is not None}
    if bool(id) == bool(query or where):
        raise click.UsageError("expected one ID or more, or what chooses them (--older-than), and not both")
    if not id:
        fields_of(how, 0)
        return remove_chosen(daemon, CONVERSATIONS, query, where, how, as_json, is_dry_run=dry_run, yes=yes)
    if dry_run:
        return tell_preview(CONVERSATIONS, list(id), as_json)
    own = fields_of(how, len(id))
    if sys.stdin is not None and sys.stdin.isatty():
        confirm(f"remove {readable_count(len(id), 'conversation')} with all messages for good", yes)
    ops = (CONVERSATIONS.op("delete", {"id": one, **own}) for one in id)
    return do_each(daemon, CONVERSATIONS, ops, len(id), how, as_json, doing="removing", done="removed")


@conversations.command(
    "archive",
    epilog=examples(
        "holdfast conversations archive 573001234567",
        "holdfast conversations archive 573001234567 --undo",
    ),
)
@id_argument(CONVERSATIONS, nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Bring them back among the active ones.")
@write_options(CONVERSATIONS)
@json_option
@daemon_options
def archive(daemon: Daemon, id: tuple[str, ...], undo: bool, as_json: bool, **how: Any) -> int:
    """Put conversations away, out of the active ones.

    They can be read as before, and a new message brings one back.
    """
    own = fields_of(how, len(id))
    ops = (CONVERSATIONS.op("archive", {"id": one, "archived": not undo, **own}) for one in id)
    done = "unarchived" if undo else "archived"
    return do_each(daemon, CONVERSATIONS, ops, len(id), how, as_json, doing="archiving", done=done)


@conversations.command(
    "hold",
    epilog=examples(
        "holdfast conversations hold 573001234567 --reason 'case 12/2026'",
        "holdfast conversations hold 573001234567 --release",
        "holdfast conversations hold --person 573001234567 --reason 'case 12/2026'",
    ),
)
@_id
@click.option("--person", is_flag=True, help="ID is a phone or user id, and everything of this person is meant.")
@click.option("--reason", type=TEXT, metavar="TEXT", help="Kept with the hold.")
@click.option("--release", is_flag=True, help="Lift the hold.")
@write_options(CONVERSATIONS)
@json_option
@daemon_options
def hold(daemon: Daemon, id: str, person: bool, reason: str | None, release: bool, as_json: bool, **how: Any) -> None:
    """Put a conversation or a person under a legal hold.

    Nothing of the conversation, or of all that belong to the person, is deleted until the hold is lifted.
    """
    if release and reason is not None:
        raise click.UsageError("--reason goes with a hold, not with its --release")
    if person and how.get("if_version") is not None:
        raise click.UsageError("--if-version goes with a conversation; a person has no version")
    kind = "person" if person else "conversation"
    op = {"op": f"{kind}.hold", "id": id, "hold": not release}
    if reason is not None:
        op["reason"] = reason
    answer = do_one(daemon, op, how)
    if as_json:
        return print_json(answer)
    state = "is no longer under a legal hold" if release else "is under a legal hold"
    click.echo(f"{kind} {id} {state}: seq {answer['seq']}")
