"""The command that shows the backups at the second place, and fetches them from there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from holdfast.cli.connection import DIRECTORY, settings_of
from holdfast.cli.show import (
    Column,
    examples,
    json_option,
    print_json,
    print_table,
    printable,
    readable_size,
    readable_span,
)
from holdfast.clock import parse_ms
from holdfast.settings import Settings


@click.command(
    epilog=examples(
        "holdfast copies",
        "holdfast copies --fetch latest",
        "holdfast copies --from s3://backups/shop --fetch 2026-11-21T140300.123Z --data-dir /srv/new",
    )
)
@click.option(
    "--fetch", "name", metavar="NAME|latest", help="Bring this backup into backups/, from where it is restored."
)
@click.option("--from", "place", metavar="PLACE", help="A directory or s3://BUCKET/PREFIX instead of backups.copy_to.")
@click.option("--data-dir", type=DIRECTORY, metavar="DIR", help="The data directory.")
@json_option
def copies(name: str | None, place: str | None, data_dir: str | None, as_json: bool) -> None:
    """Show the backups at the second place, or fetch one of them from there.

    Works beside a running daemon and without one. What is fetched is checked, and whole or not there at all; a damaged
    backup of that name here goes to quarantine/. The history comes along where there is none here, that of another data
    directory only into an empty one. `holdfast restore` then goes back to it.
    """
    from holdfast.care.store import CopyFailed, store_of  # here, since it is slow to import
    from holdfast.errors import Unavailable

    settings = settings_of(data_dir)
    if name is not None:
        return show_brought(settings, place or "", name, as_json=as_json)
    store = store_of(settings, _absolute(place or ""))
    try:
        there = store.sets()
    except CopyFailed as error:
        raise Unavailable(str(error)) from error
    if as_json:
        return print_json(
            {
                "place": store.where,
                "items": [
                    {
                        "name": one.name,
                        "at": one.manifest.at if one.manifest else None,
                        "bytes": one.stored_bytes,
                        "encrypted": one.manifest.encrypted if one.manifest else None,
                        "proved": one.is_proved,
                        "problem": one.damage,
                    }
                    for one in there
                ],
            }
        )
    if not there:
        return click.echo(f"no backups at {printable(store.where)}")
    rows = [
        [
            one.name,
            readable_span(max(0.0, time.time() - parse_ms(one.manifest.at) / 1000)) if one.manifest else "-",
            readable_size(one.stored_bytes),
            "yes" if one.is_proved else one.damage or "no",
        ]
        for one in there
    ]
    print_table(
        [Column("Name"), Column("Age", is_number=True), Column("Size", is_number=True), Column("Proved", is_long=True)],
        rows,
    )


def show_brought(settings: Settings, place: str, name: str, *, as_json: bool) -> None:
    """Fetch as ``bring``, and say what came of it."""
    fetched = bring(settings, place, name)
    if as_json:
        return print_json({"name": fetched.found.name, "bytes": fetched.bytes, "history": fetched.history})
    click.echo(
        f"{fetched.found.name} is in {settings.data_dir}/backups: {readable_size(fetched.bytes)} fetched, "
        f"{fetched.history} files of history; holdfast restore {fetched.found.name}"
    )


def bring(settings: Settings, place: str, name: str, at_ms: int | None = None) -> Any:
    """The backup *name*, or with *at_ms* the newest one that was made before, fetched from *place*; told on a terminal.

    What was damaged here, and why the history did not come along, goes to stderr.

    Raises:
        NotFound: there is none.
        HoldfastError, OSError: as ``copies.fetch``.
    """
    from holdfast.care.copies import fetch
    from holdfast.care.store import CopyFailed, store_of
    from holdfast.disk.files import prepare_directory
    from holdfast.errors import NotFound, Unavailable

    def progress(file: str, done: int, total: int) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(f"\r\x1b[K{printable(file)} {readable_size(done)} of {readable_size(total)}", err=True, nl=False)

    store = store_of(settings, _absolute(place))
    if at_ms is not None:
        try:
            older = [one for one in store.sets() if one.manifest and parse_ms(one.manifest.at) <= at_ms]
        except CopyFailed as error:
            raise Unavailable(str(error)) from error
        if not older:
            raise NotFound(f"{store.where} has no backup that was made before that moment")
        name = older[0].name
    prepare_directory(Path(settings.data_dir))
    try:
        fetched = fetch(store, name, settings.data_dir, progress)
    finally:
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)
    if fetched.set_aside:
        click.echo(f"the backup of that name here was damaged; it is in {fetched.set_aside} now", err=True)
    if fetched.left:
        click.echo(f"the history at {printable(store.where)} stayed there: {fetched.left}", err=True)
    return fetched


def _absolute(place: str) -> str:
    return place if not place or "://" in place else str(Path(place).absolute())
