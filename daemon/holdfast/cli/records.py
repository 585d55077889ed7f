"""The groups ``sessions``, ``orders``, ``users`` and ``collections``, with the commands that each has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from holdfast.cli.arguments import TEXT
from holdfast.cli.changing import (
    cancel_command,
    complete_command,
    lease_command,
    patch_command,
    put_command,
    release_command,
    rm_command,
    touch_command,
)
from holdfast.cli.completion import complete_collection
from holdfast.cli.connection import Daemon, daemon_flags, daemon_options, named_daemon
from holdfast.cli.groups import InOrder
from holdfast.cli.kinds import ORDERS, SESSIONS, USERS, Kind, custom
from holdfast.cli.reading import collections_of, get_command, list_command
from holdfast.cli.show import Column, examples, json_option, print_json, print_table


def _group(kind: Kind, purpose: str, *further: Callable[[Kind], click.Command]) -> click.Group:
    id, value = kind.example

    @click.group(
        kind.command,
        cls=InOrder,
        help=purpose,
        epilog=examples(f"holdfast {kind.command} list", f"holdfast {kind.command} put {id} '{value}'"),
    )
    @daemon_flags
    def group(**_: Any) -> None:
        pass

    for make in (list_command, get_command, put_command, patch_command, rm_command, *further):
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
        return _group(custom(name), f"Read and change the records of the collection {name}.")

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
    found = collections_of(daemon)
    if as_json:
        return print_json([{"name": one.name, "count": one.count} for one in found])
    print_table(
        [Column("collection"), Column("records", is_number=True)], ([one.name, str(one.count)] for one in found)
    )


sessions = _group(SESSIONS, "Read and change sessions.", touch_command, lease_command, release_command)
orders = _group(ORDERS, "Read and change orders.", complete_command, cancel_command)
users = _group(USERS, "Read and change user profiles.")
