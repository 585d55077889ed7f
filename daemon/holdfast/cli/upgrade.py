"""The commands for changing the version of Holdfast: forwards, and back."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from holdfast.cli.connection import DIRECTORY, settings_of
from holdfast.cli.show import examples, json_option, print_json, printable
from holdfast.errors import DataRefused

_directory = click.option("--data-dir", type=DIRECTORY, metavar="DIR", help="The data directory.")


@click.command(epilog=examples("holdfast migrate --dry-run", "holdfast migrate"))
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@json_option
@_directory
def migrate(data_dir: str | None, dry_run: bool, as_json: bool) -> int:
    """Bring a stopped data directory to the format of this version, after a backup.

    A start does the same by itself; this is for those who want to see it done first.
    """
    from holdfast.care import upgrade  # here, since it is slow to import
    from holdfast.disk.files import Directory, kept_from_writers
    from holdfast.recovery import open_engine

    settings = settings_of(data_dir)
    try:
        with Directory(settings.data_dir) as data, kept_from_writers(settings.data_dir):
            situation = upgrade.look(data)
    except OSError as error:
        raise DataRefused(f"{settings.data_dir} cannot be read: {error.strerror}; name the data directory") from error
    if not dry_run:
        open_engine(settings, progress=lambda text: click.echo(printable(text), err=True)).close()
    if as_json:
        print_json(msgspec.to_builtins(situation) | {"dry_run": dry_run})
        return 0
    if not situation.steps:
        click.echo(f"nothing to migrate: {_described(situation)}")
        return 0
    for step in situation.steps:
        click.echo(f"{'would migrate' if dry_run else 'migrated'} to {step}")
    if not dry_run:
        click.echo("the backup from before is in `holdfast backups`, with the reason migration")
    return 0


def _described(situation: Any) -> str:
    if situation.format is None:
        return "nothing was flushed here yet"
    written_by = situation.written_by or "an unknown version"
    schema = "no archive" if situation.archive_schema is None else f"archive schema {situation.archive_schema}"
    return f"format {situation.format}, {schema}, last written by Holdfast {written_by}"


@click.command(epilog=examples("holdfast downgrade-check 0.1.0-core", "holdfast downgrade-check 1 --json"))
@click.argument("version", metavar="VERSION|FORMAT")
@json_option
@_directory
def downgrade_check(version: str, data_dir: str | None, as_json: bool) -> int:
    """Say whether an older version could open this data directory, running or stopped, and what to do when it could not.

    The exit code is 1 when it could not.
    """
    from holdfast.care.upgrade import check_downgrade  # here, since it is slow to import

    report = check_downgrade(settings_of(data_dir).data_dir, version)
    if as_json:
        print_json(msgspec.to_builtins(report) | {"possible": not report.obstacles})
    elif not report.obstacles:
        click.echo(f"{printable(version)} can open it; take a backup first (`holdfast backup`)")
    else:
        click.echo(f"{printable(version)} cannot open it as it is:")
        for obstacle in report.obstacles:
            click.echo(f"  {printable(obstacle.found)}")
            click.echo(f"    do: {obstacle.action}")
        newest = report.backups[0] if report.backups else "none"
        click.echo(f"the newest backup that it could restore: {newest}")
    return 1 if report.obstacles else 0
