"""Completion by the shell: the script that switches it on, and the ids and names that only the daemon knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import click
import orjson

from holdfast.cli.connection import named_daemon
from holdfast.cli.show import examples
from holdfast.errors import HoldfastError

PATIENCE_S = 0.5
"""Whoever presses the tab key waits no longer than this for the daemon."""

IDS_MAX = 200
"""Ids looked at: more are no help to choose from."""

_FILES = {
    "bash": "~/.local/share/bash-completion/completions/holdfast",
    "zsh": "~/.zfunc/_holdfast",
    "fish": "~/.config/fish/completions/holdfast.fish",
}

# Ids come from strangers, and what a shell completes stands on the command line unquoted.
_HARMLESS = re.compile(r"[\w@.:+,=-][\w@.:+,=/-]*", re.ASCII)

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


@click.command(
    epilog=examples(
        *(f"holdfast completion {shell} > {file}" for shell, file in _FILES.items()),
        'eval "$(holdfast completion bash)"',
    )
)
@click.argument("shell", type=click.Choice(list(_FILES)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes commands, options, ids and names.

    For zsh the directory must stand in $fpath before compinit runs.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "holdfast", "_HOLDFAST_COMPLETE")
    # Not script.source(), which runs a bash to look at its version: the script may be made on another machine.
    click.echo(script.source_template % script.source_vars())


def complete_id(path: str) -> Complete:
    """Completes an id of the records at *path*."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return _offered((item["id"] for item in _asked(ctx, path, {"limit": str(IDS_MAX)})), incomplete)

    return complete


def complete_collection(ctx: click.Context, incomplete: str) -> list[str]:
    """The custom collections whose names begin with *incomplete*."""
    return _offered((item["name"] for item in _asked(ctx, "/v1/collections", {})), incomplete)


def _offered(names: Iterator[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete) and _HARMLESS.fullmatch(name))


def _asked(ctx: click.Context, path: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
    try:
        reply = named_daemon(ctx).fetch("GET", path, query=query, timeout_s=PATIENCE_S)
        yield from orjson.loads(reply.body)["items"]
    except (HoldfastError, click.ClickException, OSError, ValueError, KeyError):
        # No daemon, no completion: a message would stand in the middle of the command line.
        return
