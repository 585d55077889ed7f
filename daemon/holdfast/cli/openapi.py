"""The command that prints the document of the HTTP interface, whether a daemon runs or not."""

from __future__ import annotations

import click

from holdfast.cli.connection import settings_to_reach
from holdfast.cli.show import examples
from holdfast.settings import UnixAddress, parse_address


@click.command(epilog=examples("holdfast openapi > openapi.json", "holdfast openapi --html > holdfast.html"))
@click.option("--data-dir", metavar="DIR", help="The data directory that the curl lines of the page are written for.")
@click.option("--html", "as_html", is_flag=True, help="The page for people instead, as /docs serves it.")
@click.option("--json", "as_json", is_flag=True, help="What it prints anyway, unless --html is given.")
def openapi(data_dir: str | None, as_html: bool, as_json: bool) -> None:
    """Print the OpenAPI document of the HTTP interface. No daemon needs to run, and no token is needed."""
    if as_html and as_json:
        raise click.UsageError("expected --html or --json, found both; leave one out")
    if not as_html:
        import orjson

        from holdfast.http.openapi import document

        return click.echo(orjson.dumps(document(), option=orjson.OPT_INDENT_2))

    from holdfast.http.docs import page

    settings = settings_to_reach(data_dir)
    listening = []
    for text in settings.listen:
        address = parse_address(text, settings.data_dir)
        listening.append(f"unix:{address.path}" if isinstance(address, UnixAddress) else text)
    click.echo(page(listening, settings.data_dir))
