"""The command that lets conversations go."""

from __future__ import annotations

from typing import Any, TypeVar

import click
import msgspec
import orjson

from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_options
from holdfast.cli.show import (
    Column,
    Progress,
    examples,
    json_option,
    print_json,
    print_table,
    readable_count,
    readable_size,
)
from holdfast.errors import Unavailable

T = TypeVar("T")

AT_ONCE = 500
"""Conversations that one request archives, cleans or removes."""

DAYS_MAX = 36_500
HOURS_MAX = 876_000

_PATH = "/v1/admin/cleanup"


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Of the storage figures, those that the contract's table shows."""

    total: int
    active: int
    messages: int
    tokens: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one request did, or in a dry run would do; *remaining* is not 0 while there is more.

    Attributes:
        storage: the figures of ``/v1/stats/storage`` afterwards.
    """

    archived: int
    messages_deleted: int
    bytes_freed: int
    held: int
    remaining: int
    storage: msgspec.Raw = msgspec.Raw(b"{}")


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What one request removed."""

    deleted: int
    errors: int
    held: int = 0
    remaining: int = 0


@click.command(
    epilog=examples(
        "holdfast cleanup --dry-run",
        "holdfast cleanup --days 90",
        "holdfast cleanup --days 365 --delete-messages --dry-run",
        "holdfast cleanup --idle-hours 24",
    )
)
@click.option(
    "--days",
    type=click.IntRange(0, DAYS_MAX),
    metavar="N",
    help="Archive conversations without a message for so many days.",
)
@click.option("--delete-messages", is_flag=True, help="Delete the messages of these conversations for good.")
@click.option("--dry-run", is_flag=True, help="Count what would go, and change nothing.")
@click.option(
    "--idle-hours",
    type=click.IntRange(0, HOURS_MAX),
    metavar="N",
    help="Instead: remove conversations not updated for so many hours, with everything in them, for good.",
)
@json_option
@daemon_options
def cleanup(
    daemon: Daemon, days: int | None, delete_messages: bool, dry_run: bool, idle_hours: int | None, as_json: bool
) -> int:
    """Archive conversations and delete old messages now, and show what is left.

    Without --days it does what the settings say, as the daemon does by itself every day. Conversations under a legal
    hold keep their messages. Interrupted, it has done a part, and can be run again.
    """
    if idle_hours is not None:
        if days is not None or delete_messages or dry_run:
            raise click.UsageError("--idle-hours goes without --days, --delete-messages and --dry-run")
        return _remove_idle(daemon, idle_hours, as_json)
    if delete_messages and days is None:
        raise click.UsageError("--delete-messages goes with --days; without both the settings say what is deleted")
    wanted = {} if days is None else {"days": days, "delete_messages": delete_messages}
    report = _clean(daemon, wanted, is_dry_run=dry_run)
    if as_json:
        print_json(
            {"dry_run": dry_run, **msgspec.structs.asdict(report), "storage": orjson.loads(bytes(report.storage))}
        )
    else:
        _tell(daemon, report, has_deleted=delete_messages or days is None, is_dry_run=dry_run)
    return 0


def _clean(daemon: Daemon, wanted: dict[str, Any], *, is_dry_run: bool) -> Report:
    """Do what is *wanted*, request after request, and the sum of their reports."""
    if is_dry_run:
        return _asked(daemon, wanted | {"dry_run": True}, Report)
    done = Report(archived=0, messages_deleted=0, bytes_freed=0, held=0, remaining=0)

    def total() -> int:
        ahead = _asked(daemon, wanted | {"dry_run": True}, Report)
        return _work_of(done) + _work_of(ahead)

    with Progress("cleaning up", total) as progress:
        while True:
            report = _asked(daemon, wanted | {"limit": AT_ONCE}, Report)
            # What is held is counted anew each time.
            done = msgspec.structs.replace(
                report,
                archived=done.archived + report.archived,
                messages_deleted=done.messages_deleted + report.messages_deleted,
                bytes_freed=done.bytes_freed + report.bytes_freed,
            )
            progress.advance(_work_of(report))
            if not report.remaining:
                return done
            _check_progress(_work_of(report), report.remaining)


def _work_of(report: Report) -> int:
    return report.archived + report.messages_deleted


def _remove_idle(daemon: Daemon, hours: int, as_json: bool) -> int:
    deleted = errors = 0
    with Progress("removing idle conversations", lambda: None) as progress:
        while True:
            removal = _asked(daemon, {"idle_hours": hours, "limit": AT_ONCE}, Removal)
            deleted += removal.deleted
            # Those that could not be removed are met again each time.
            errors = removal.errors
            progress.advance(removal.deleted)
            if not removal.remaining:
                break
            _check_progress(removal.deleted, removal.remaining)
    if as_json:
        print_json({"deleted": deleted, "errors": errors})
    else:
        click.echo(f"removed {readable_count(deleted, 'conversation')}, {readable_count(errors, 'error')}")
        if removal.held:
            click.echo(f"kept {readable_count(removal.held, 'conversation')} under a legal hold")
    return 1 if errors else 0


def _asked(daemon: Daemon, body: dict[str, Any], kind: type[T]) -> T:
    return daemon.fetch("POST", _PATH, body=orjson.dumps(body), timeout_s=WORK_TIMEOUT_S).decoded(kind)


def _check_progress(work: int, remaining: int) -> None:
    """Refuse to go on for ever where nothing moves."""
    if not work:
        raise Unavailable(
            f"the daemon did nothing and says that {remaining} remain; somebody else changes them now, or it is stopping:"
            " try again later"
        )


def _tell(daemon: Daemon, report: Report, *, has_deleted: bool, is_dry_run: bool) -> None:
    storage = daemon.understood(report.storage, Storage)
    click.echo(f"{'would archive' if is_dry_run else 'archived'} {readable_count(report.archived, 'conversation')}")
    if has_deleted:
        click.echo(
            f"{'would delete' if is_dry_run else 'deleted'} {readable_count(report.messages_deleted, 'message')}"
            f" ({readable_size(report.bytes_freed)})"
        )
    if report.held:
        click.echo(f"kept the messages of {readable_count(report.held, 'conversation')} under a legal hold")
    click.echo()
    print_table(
        [Column("Metric"), Column("Value", is_number=True)],
        [
            ["Total Conversations", f"{storage.total:,}"],
            ["Active Conversations", f"{storage.active:,}"],
            ["Total Messages", f"{storage.messages:,}"],
            ["Total Tokens", f"{storage.tokens:,}"],
        ],
    )
