"""The group ``escalations``: customers who wait for a human."""

from __future__ import annotations

import sys
from typing import Any

import click
import orjson

from holdfast.cli.arguments import TEXT, json_value
from holdfast.cli.changing import do_one, write_options
from holdfast.cli.connection import Daemon, daemon_flags, daemon_options
from holdfast.cli.groups import InOrder
from holdfast.cli.kinds import CONVERSATIONS, ESCALATIONS, id_argument
from holdfast.cli.reading import Item, items_of, limit_options, print_list
from holdfast.cli.show import (
    Column,
    cells_of,
    examples,
    is_terminal,
    json_option,
    print_json,
    printable,
    readable_span,
    styled,
)
from holdfast.cli.transcript import Escalation, colour_of, local
from holdfast.clock import Clock

PRIORITIES = ("low", "high")
STATUSES = ("pending", "claimed", "resolved")


@click.group(
    "escalations",
    cls=InOrder,
    epilog=examples("holdfast escalations list --status pending", "holdfast escalations show 573001234567"),
)
@daemon_flags
def escalations(**_: Any) -> None:
    """See who waits for a human, and have somebody wait for one."""


@escalations.command(
    "list",
    epilog=examples(
        "holdfast escalations list --status pending",
        "holdfast escalations list --priority high --json | jq -r '.[].id'",
    ),
)
@limit_options
@click.option("--status", type=click.Choice(STATUSES), help="Only those of this status.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Only those of this priority.")
@json_option
@daemon_options
def list_(daemon: Daemon, limit: int, is_all: bool, as_json: bool, **filters: Any) -> None:
    """List escalations, those of high priority first, then the one that waits longest.

    The id is that of the conversation. --json prints one array, an escalation a line, while it comes.
    """
    query = {name: value for name, value in filters.items() if value is not None}
    print_list(
        items_of(daemon, ESCALATIONS.path, query, sys.maxsize if is_all else limit + 1),
        [
            Column("id"),
            Column("priority"),
            Column("status"),
            Column("waiting", is_number=True),
            Column("reason", is_long=True),
        ],
        lambda item: _row(daemon, item),
        what="escalations",
        limit=None if is_all else limit,
        total=lambda: None,
        as_json=as_json,
    )


def _row(daemon: Daemon, item: Item) -> list[str]:
    found = daemon.understood(item.value, Escalation)
    return [item.id, found.priority, found.status, _waited(found), " ".join(found.reason.split())]


def _waited(escalation: Escalation) -> str:
    """How long the customer has waited, until somebody took the conversation or it was resolved."""
    until = escalation.claimed_at or escalation.resolved_at
    until_s = Clock().now_ms() / 1000 if until is None else until.timestamp()
    return readable_span(max(0, until_s - escalation.opened_at.timestamp()))


@escalations.command(
    "show",
    epilog=examples("holdfast escalations show 573001234567", "holdfast escalations show 573001234567 --json"),
)
@id_argument(ESCALATIONS)
@json_option
@daemon_options
def show(daemon: Daemon, id: str, as_json: bool) -> None:
    """Print the escalation of the conversation ID; exit 1 when there is none."""
    reply = daemon.fetch("GET", ESCALATIONS.path_of(id))
    if as_json:
        return print_json(reply.fields())
    found = reply.decoded(Escalation)
    rows = [
        ("conversation", found.id, None),
        ("status", found.status, colour_of(found)),
        ("priority", found.priority, "red" if found.priority == "high" else None),
        ("reason", found.reason, None),
    ]
    rows += [(name, text, None) for name, text in found.contacts()]
    rows += [("assignee", found.assignee, None)] if found.assignee else []
    for name, at in (
        ("opened", found.opened_at),
        ("claimed", found.claimed_at),
        ("resolved", found.resolved_at),
    ):
        if at is not None:
            rows.append((name, f"{local(at):%Y-%m-%d %H:%M:%S}", None))
    rows.append(("waiting" if found.status == "pending" else "waited", _waited(found), None))
    width = max(cells_of(printable(name)) for name, _, _ in rows)
    for name, text, colour in rows:
        name = printable(name)
        shown = styled(printable(text), fg=colour) if colour else printable(text)
        click.echo(f"{name}{' ' * (width - cells_of(name))}  {shown}")
    if is_terminal():
        click.echo(styled(f"holdfast conversations show {printable(found.id)} shows what was said", dim=True))


@escalations.command(
    "open",
    epilog=examples(
        "holdfast escalations open 573001234567 --reason 'wants a refund'",
        "holdfast escalations open 573001234567 --reason 'wants a refund' --priority high --contact '{\"phone\": \"57300\"}'",
    ),
)
@id_argument(CONVERSATIONS)
@click.option("--reason", type=TEXT, required=True, metavar="TEXT", help="Why, for whoever takes it.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="How urgent it is; low when it is new.")
@click.option("--contact", metavar="VALUE", help="How the customer is reached: a JSON object, @FILE, or -.")
@write_options(ESCALATIONS)
@json_option
@daemon_options
def open_(
    daemon: Daemon, id: str, reason: str, priority: str | None, contact: str | None, as_json: bool, **how: Any
) -> None:
    """Have the customer of the conversation ID wait for a human.

    When one waits already, that escalation is updated.
    """
    op = {"id": id, "reason": reason} | ({} if priority is None else {"priority": priority})
    if contact is not None:
        op["contact_info"] = orjson.loads(json_value(contact))
    answer = do_one(daemon, ESCALATIONS.op("open", op), how)
    if as_json:
        return print_json(answer)
    click.echo(f"escalation {answer['id']} is open: version {answer['version']}, seq {answer['seq']}")
