"""The command ``holdfast``: finds the subcommand, turns every error into one line with an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from typing import NoReturn

import click

from holdfast.cli.show import printable
from holdfast.errors import HoldfastError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

# Each command by the module that holds it: `holdfast status` must not pay for what only `serve` needs.
_COMMANDS = {
    "serve": "serve",
    "status": "status",
    "flush": "control",
    "reload": "control",
    "sessions": "records",
    "orders": "records",
    "users": "records",
    "collections": "records",
    "conversations": "conversations",
    "escalations": "escalations",
    "stats": "stats",
    "export": "transfer",
    "import": "transfer",
    "tail": "tail",
    "journal": "journal",
    "cleanup": "cleanup",
    "compact": "compact",
    "copies": "copies",
    "backup": "backups",
    "backups": "backups",
    "restore": "restore",
    "verify": "verify",
    "mend": "verify",
    "migrate": "upgrade",
    "downgrade-check": "upgrade",
    "token": "token",
    "install-service": "install",
    "openapi": "openapi",
    "bench": "bench",
    "completion": "completion",
}

_SECTIONS = {
    "The daemon": ("serve", "status", "flush", "reload", "install-service"),
    "Data": (
        "sessions",
        "orders",
        "users",
        "collections",
        "conversations",
        "escalations",
        "stats",
        "export",
        "import",
    ),
    "Backups": ("backup", "backups", "copies", "restore"),
    "Care": ("verify", "mend", "cleanup", "compact", "migrate", "downgrade-check"),
    "What happened": ("tail", "journal"),
}
"""How the help groups them; the others follow as tools."""

SHORT_HELP_CHARS = 200
"""A first sentence is shown whole, on two lines if need be."""


class _Commands(click.Group):
    """The subcommands, each imported when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"holdfast.cli.{_COMMANDS[cmd_name]}"), _name_of(cmd_name))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = list(_COMMANDS)
        for title, names in {**_SECTIONS, "Tools": tuple(_COMMANDS)}.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name) if name in left else None
                if command is not None:
                    left.remove(name)
                    rows.append((name, command.get_short_help_str(limit=SHORT_HELP_CHARS)))
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=16)


def _name_of(command: str) -> str:
    """The name of *command* in its module."""
    name = command.replace("-", "_")
    return f"{name}_" if iskeyword(name) else name


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from holdfast import __version__

        click.echo(f"holdfast {__version__}")
        ctx.exit()


@click.command(
    "holdfast",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command shows examples: holdfast sessions put --help",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="HOLDFAST_CONFIG",
    help="Settings in TOML, as the daemon has them; else ./holdfast.toml or /etc/holdfast/holdfast.toml.",
)
def commands(config: Path | None) -> None:
    """Keep the sessions, orders, conversations and sales figures of chat bots through everything.

    `serve` runs the daemon; the other commands talk to it, or read its data directory.
    """


def main() -> NoReturn:
    """Run the command line of this process, then exit with a code of the contract's section 4."""
    if sys.stdout is None and sys.argv[1:2] != ["serve"]:
        # Whoever writes is told, as by other commands; the daemon, whose log it would be, does without.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal's encoding does not have is shown escaped; it is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run()
        # Here and not at interpreter exit, where a failure could no longer be told.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        code = EXIT_FAILED
    except OSError as error:
        _forget_stdout()
        if error.errno == errno.EBADF:
            error.strerror = "standard output is closed; open it, or send it to /dev/null"
        code = _told(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", EXIT_FAILED)
    sys.exit(code)


def _run() -> int:
    try:
        code = commands.main(prog_name="holdfast", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.UsageError as error:
        help_path = error.ctx.command_path if error.ctx else "holdfast"
        return _told(f"{error.format_message()} (see {help_path} --help)", EXIT_USAGE)
    except click.ClickException as error:
        return _told(error.format_message(), EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except HoldfastError as error:
        return _told(error.detail, error.exit_code)
    except OSError:
        raise  # told by main
    except Exception as error:
        # A fault of ours. Where it is goes with it, in the one line that users are promised.
        return _told(f"a fault of this command: {_placed(error)}; please report it", EXIT_FAILED)
    return code if isinstance(code, int) else EXIT_OK


def _placed(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
    return f"{type(error).__name__}{place}: {error}"


def _told(reason: str, code: int) -> int:
    one_line = " ".join(reason.split())
    print(f"holdfast: {printable(one_line)}", file=sys.stderr)
    return code


def _forget_stdout() -> None:
    if sys.stdout is None:
        return
    # Otherwise the interpreter flushes the rest into the same broken stream at exit, with a traceback.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
