"""Commands for the tokens that open the daemon's TCP port."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from holdfast.cli.connection import settings_to_reach
from holdfast.cli.show import Column, examples, json_option, print_json, print_table
from holdfast.errors import NotFound
from holdfast.http.auth import FIRST_TOKEN_FILE, TokenStore


def _on_directory(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give *command* the option ``--data-dir``; it receives the existing directory as its first argument."""

    @click.option("--data-dir", metavar="DIR", help="The data directory whose tokens are meant.")
    @wraps(command)
    def with_directory(*args: Any, data_dir: str | None, **kw: Any) -> Any:
        directory = settings_to_reach(data_dir).data_dir
        if not directory.is_dir():
            raise NotFound(f"no data directory at {directory}; name it with --data-dir, or start the daemon once")
        return command(directory, *args, **kw)

    return with_directory


@click.group(
    invoke_without_command=True,
    epilog=examples('curl -H "Authorization: Bearer $(cat $(holdfast token))" http://127.0.0.1:8765/v1/sessions'),
)
@click.pass_context
@click.option("--data-dir", metavar="DIR", help="The data directory whose tokens are meant.")
def token(ctx: click.Context, data_dir: str | None) -> None:
    """Show where the first token is; make, list and revoke others."""
    if ctx.invoked_subcommand is not None:
        # So that the option may stand before or after the subcommand.
        ctx.default_map = {name: {"data_dir": data_dir} for name in ("new", "list", "revoke")}
        return
    path = settings_to_reach(data_dir).data_dir / FIRST_TOKEN_FILE
    if not path.is_file():
        raise NotFound(f"no token at {path} yet; the daemon makes it at its first start")
    click.echo(path)


@token.command(epilog=examples("holdfast token new --name reports --read-only"))
@_on_directory
@click.option("--name", required=True, help="How you will recognise it in `token list`.")
@click.option("--read-only", is_flag=True, help="It may read everything, change nothing.")
def new(directory: Path, name: str, read_only: bool) -> None:
    """Make a token and print it: only its hash is kept, so it is shown this once."""
    click.echo(TokenStore(directory).create(name, "read" if read_only else "write"))


@token.command("list", epilog=examples("holdfast token list"))
@_on_directory
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """List the tokens made with `token new`."""
    tokens = TokenStore(directory).list()
    if as_json:
        return print_json([{"name": one.name, "scope": one.scope, "created_at": one.created_at} for one in tokens])
    print_table(
        [Column("name"), Column("scope"), Column("created at")],
        ([one.name, one.scope, one.created_at] for one in tokens),
    )


@token.command(epilog=examples("holdfast token revoke reports"))
@_on_directory
@click.argument("name")
def revoke(directory: Path, name: str) -> None:
    """Make the token NAME worthless, within a second also for a running daemon."""
    TokenStore(directory).revoke(name)
    click.echo(f"revoked {name}")
