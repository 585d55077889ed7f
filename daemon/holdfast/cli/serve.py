"""The command that runs the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import click

from holdfast.cli.connection import config_file
from holdfast.cli.show import examples, json_option, print_json
from holdfast.settings import LoadedSettings, describe, load


@click.command(
    epilog=examples(
        "holdfast serve",
        "holdfast serve --config holdfast.toml --data-dir /var/lib/holdfast",
        "holdfast serve --set sessions.ttl=12h --check",
    )
)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings in TOML.")
@click.option("--data-dir", metavar="DIR", help="Where all data is.")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT; may be repeated.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any setting; may be repeated.")
@click.option("--check", is_flag=True, help="Validate and print the effective settings, start nothing.")
@json_option
def serve(
    config: Path | None,
    data_dir: str | None,
    listen: tuple[str, ...],
    assignments: tuple[str, ...],
    check: bool,
    as_json: bool,
) -> int:
    """Run the daemon in the foreground until SIGTERM or ctrl-C."""
    overrides = _overrides(data_dir, listen, assignments)
    cwd = Path.cwd()
    config = config or config_file()
    loaded = _checked(load(overrides, os.environ, config, cwd))
    if check:
        _print_settings(loaded, as_json)
        return 0
    if as_json:
        raise click.UsageError("--json belongs to --check; for the log, set log.format=json")

    first: LoadedSettings | None = loaded

    def load_settings() -> LoadedSettings:
        nonlocal first
        if first is not None:
            settings, first = first, None
            return settings
        # The file of the first time is meant by name from now on: when it vanishes, that is an error, not the defaults.
        return _checked(load(overrides, os.environ, config or loaded.file, cwd))

    from holdfast.service.daemon import run  # here, because --check needs nothing of the daemon

    return run(load_settings)


def _checked(loaded: LoadedSettings) -> LoadedSettings:
    """*loaded*, when what it names besides values is there as well: a backup comes too late to tell.

    Raises:
        SettingsError: ``backups.recipients`` names nobody to encrypt for.
    """
    if loaded.settings.backups.recipients:
        from holdfast.care.seal import seal_to_write  # here, since few encrypt

        seal_to_write(loaded.settings)
    return loaded


def _overrides(data_dir: str | None, listen: tuple[str, ...], assignments: tuple[str, ...]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise click.UsageError(f"--set: expected NAME=VALUE, found {assignment!r}")
        overrides[name] = value
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    if listen:
        overrides["listen"] = ",".join(listen)
    return overrides


def _print_settings(loaded: LoadedSettings, as_json: bool) -> None:
    rows = list(describe(loaded))
    if as_json:
        return print_json({name: {"value": value, "origin": origin} for name, value, origin, _ in rows})
    # What is printed is itself a settings file.
    click.echo(f"# settings file: {loaded.file or 'none'}")
    for name, value, origin, meaning in rows:
        click.echo(f"\n# {meaning}\n{name} = {value}  # {origin}")
