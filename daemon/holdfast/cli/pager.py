"""Long texts, shown in the user's pager."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

import click

from holdfast.cli.show import is_live
from holdfast.errors import SettingsError

PAGER = "less"
"""Unless $PAGER names another."""

PAGER_VARIABLES = {"LESS": "FRX", "LV": "-c"}
"""As git sets them where the user has not: quit when all fits on one screen, pass colours, leave the text on the screen."""


def print_paged(lines: Iterable[str]) -> None:
    """Print *lines* while they come; on a terminal through $PAGER, of which an empty one or ``cat`` means none.

    Whoever leaves the pager has seen enough: no further line is asked for. An error that *lines* raises is passed on
    when the pager has ended.

    Raises:
        SettingsError: $PAGER is no command.
    """
    command = _command() if is_live() else None
    if command is None:
        for line in lines:
            click.echo(line)
        return
    sys.stdout.flush()
    pager = subprocess.Popen(
        command,
        shell=True,  # as git does
        stdin=subprocess.PIPE,
        env={**PAGER_VARIABLES, **os.environ},
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
    )
    assert pager.stdin is not None
    # A ctrl-C is for the pager alone, which would otherwise be left without us on a terminal that it has changed.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(BrokenPipeError), pager.stdin:
            for line in lines:
                pager.stdin.write(f"{line}\n")
    finally:
        pager.wait()
        signal.signal(signal.SIGINT, interrupt)


def _command() -> str | None:
    chosen = os.environ.get("PAGER")
    if chosen is None:
        return PAGER if shutil.which(PAGER) else None
    if chosen.strip() in ("", "cat"):
        return None
    try:
        words = shlex.split(chosen)
    except ValueError:
        words = []
    # "LESS=-S less" is a command as well.
    program = next((word for word in words if "=" not in word), "")
    if shutil.which(program) is None:
        raise SettingsError(f"expected a command in PAGER, found {chosen!r:.80}; set it to one such as less, or to cat")
    return chosen
