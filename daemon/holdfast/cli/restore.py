"""The command that goes back to a backup, or to a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson

from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_flags, named_daemon, settings_of
from holdfast.cli.show import Column, examples, json_option, print_json, print_table, readable_count
from holdfast.errors import DirectoryLocked, HoldfastError, Unavailable

PATH = "/v1/admin/restore"

POLL_S = 0.2
GONE_MAX_S = 60.0
"""How long a daemon that restores may give no answer at all."""

_PARTS = ("collection", "file", "session", "order", "user", "conversation")


class Row(msgspec.Struct, frozen=True):
    """What becomes of one collection."""

    collection: str
    now: int
    then: int
    added: int
    changed: int
    removed: int
    oldest: str | None = None
    newest: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """What would change."""

    backup: str
    backup_at: str
    at: str
    is_proved: bool
    rows: list[Row]
    expiring: int = 0
    has_other_sales: bool = False


class PartReport(msgspec.Struct, frozen=True):
    """What became of the records of a part."""

    added: int
    changed: int
    removed: int
    unchanged: int
    refused: int
    reasons: list[str]


class Proved(msgspec.Struct, frozen=True):
    """What was looked at and found right."""

    files: int
    counts: dict[str, int]


class Report(msgspec.Struct, frozen=True):
    """What a restore of everything did."""

    saved_as: str
    seq: int
    proof: Proved
    duration_ms: float


class State(msgspec.Struct, frozen=True):
    """How a restore of everything stands."""

    state: str
    progress: str = ""
    reason: str = ""
    report: msgspec.Raw = msgspec.Raw(b"null")


class Restored(msgspec.Struct, frozen=True):
    """What a daemon answers."""

    plan: msgspec.Raw
    part: msgspec.Raw = msgspec.Raw(b"null")
    saved_as: str = ""


@click.command(
    epilog=examples(
        "holdfast restore --dry-run",
        "holdfast restore 2026-11-21T140300.123Z",
        'holdfast restore --at "2026-11-21T14:03:00Z"',
        "holdfast restore --at 2026-11-21T14:03 --session 573001234567",
        "holdfast restore latest --into /srv/yesterday",
    )
)
@click.argument("backup", metavar="[SET|latest]", required=False)
@click.option("--at", metavar="TIME", help="Go back to this moment, ISO 8601; without an offset in stats.timezone.")
@click.option("--file", metavar="NAME", help="Put only this snapshot file back, such as chat_sessions.json.")
@click.option("--collection", metavar="NAME", help="Put only this collection back.")
@click.option("--session", metavar="ID", help="Put only this session back.")
@click.option("--order", metavar="ID", help="Put only this order back.")
@click.option("--user", metavar="ID", help="Put only this user profile back.")
@click.option("--conversation", metavar="ID", help="Put only this conversation back, with its messages of then.")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Restore into this missing or empty directory, and leave the present alone.",
)
@click.option(
    "--from",
    "place",
    metavar="PLACE",
    help="Fetch the backup from there first: a directory or s3://BUCKET/PREFIX.",
)
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The age key of an encrypted backup; without a daemon only.",
)
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@daemon_flags
def restore(
    backup: str | None,
    at: str | None,
    into: Path | None,
    place: str | None,
    identity: Path | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    data_dir: str | None,
    connect: str | None,
    token_file: Path | None,
    **parts: str | None,
) -> int:
    """Go back to a backup, or to a moment, with everything or with a part.

    Shows what would change, asks, backs the present up, restores, and proves by counts and checksums that it is there.
    Works on a stopped data directory, and through the daemon when one runs on it. Without SET and --at it takes the
    newest backup.
    """
    chosen = {name: value for name, value in parts.items() if value is not None}
    if len(chosen) > 1:
        raise click.UsageError(f"give one of {', '.join(f'--{name}' for name in _PARTS)}")
    wanted: dict[str, Any] = {"set": backup, "at": at, **chosen}
    if backup is None and at is None:
        wanted["set"] = "latest"
    if backup is not None and "/" in backup and place is None:
        # A set by its path, in the second place.
        place, _, backup = backup.rstrip("/").rpartition("/")
        wanted["set"] = backup
    if place is not None:
        if connect is not None:
            raise click.UsageError("--from fetches into a data directory here; give it without --connect")
        wanted["set"] = _fetched(settings_of(data_dir), place, wanted)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if into is not None:
        if chosen or connect is not None:
            raise click.UsageError(
                "--into restores everything of a data directory here; give it without a part or --connect"
            )
        return _into(settings_of(data_dir), wanted, into, identity, dry_run=dry_run, as_json=as_json)
    ask = _asker(yes=yes, as_json=as_json)
    if connect is None:
        settings = settings_of(data_dir)
        if not settings.data_dir.is_dir():
            raise click.UsageError(f"no data directory at {settings.data_dir}; name it with --data-dir")
        from holdfast.disk.files import DirectoryLock

        try:
            lock = DirectoryLock(settings.data_dir)
        except DirectoryLocked:
            pass  # through whoever has it
        else:
            # The lock goes with it, at the latest.
            with ExitStack() as held:
                held.callback(lock.release)
                return _stopped(settings, wanted, ask, held.close, identity, dry_run=dry_run, as_json=as_json)
    if identity is not None:
        raise click.UsageError(
            "a daemon has the directory, and a key is not sent to it: set backups.identity_file there, or stop it, or "
            "restore beside with --into"
        )
    return _through(named_daemon(click.get_current_context()), wanted, ask, dry_run=dry_run, as_json=as_json)


def _asker(*, yes: bool, as_json: bool) -> Callable[[Plan], bool]:
    def ask(plan: Plan) -> bool:
        if not as_json:
            _show(plan)
        if yes:
            return True
        if as_json or not sys.stdin.isatty():
            raise click.UsageError("give --yes to restore without being asked, or --dry-run to see what would change")
        return click.confirm("\nRestore this?", err=True)

    return ask


# On a directory that nobody has open.


def _stopped(
    settings: Any,
    wanted: dict[str, Any],
    ask: Callable[[Plan], bool],
    release: Callable[[], None],
    identity: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    from holdfast.care import put_back
    from holdfast.care.backup_stopped import back_up_stopped
    from holdfast.care.history import History
    from holdfast.care.restore import naming_room, restore_stopped
    from holdfast.care.restore_plan import planned as plan_of
    from holdfast.care.seal import seal_of
    from holdfast.clock import Clock
    from holdfast.core.rules import rules_of
    from holdfast.disk.files import Directory
    from holdfast.recovery import finish_restore, open_engine

    log, now_ms = _Quiet(), Clock().now_ms()
    with Directory(settings.data_dir) as data:
        finish_restore(data, log)
    seal = seal_of(settings, identity)
    history = History(settings.data_dir, seal)
    part = _part_of(wanted)
    target = _target(settings, wanted, seal, history, now_ms)
    planned, then = plan_of(
        settings,
        target,
        seal,
        history,
        engine=None,
        now_ms=now_ms,
        part=None if part is None else (part.collections, part.id),
    )
    plan = msgspec.convert(msgspec.to_builtins(planned), Plan)
    if dry_run:
        return _tell_plan(plan, msgspec.to_builtins(planned), as_json=as_json)
    if not ask(plan):
        return 1
    progress = _Told(as_json=as_json)
    if part is None:
        report = restore_stopped(settings, target, planned, seal, now_ms=now_ms, log=log, progress=progress.note)
        progress.end()
        return _tell_report(plan, msgspec.to_builtins(report), as_json=as_json)
    with naming_room(target, settings.data_dir):
        saved = back_up_stopped(settings, "restore", log, progress.note)
    # The engine takes the lock itself.
    release()
    engine = open_engine(settings, log=log)
    try:
        messages = put_back.messages_from(target, settings.data_dir, seal, history)
        done = put_back.put_back(engine, part, then, rules_of(settings), messages)
    finally:
        engine.close()
    progress.end()
    return _tell_part(plan, msgspec.to_builtins(planned), msgspec.to_builtins(done), saved.name, as_json=as_json)


def _fetched(settings: Any, place: str, wanted: dict[str, Any]) -> str | None:
    """The name of the backup that *wanted* means, brought here from *place*; None when a moment alone is wanted."""
    from zoneinfo import ZoneInfo

    from holdfast.care.moments import moment_of
    from holdfast.cli.copies import bring

    at_ms = None
    if wanted.get("set") is None and wanted.get("at") is not None:
        at_ms = moment_of(wanted["at"], ZoneInfo(settings.stats.timezone))
    name: str = bring(settings, place, wanted.get("set") or "latest", at_ms).found.name
    return None if at_ms is not None else name


def _into(
    settings: Any, wanted: dict[str, Any], into: Path, identity: Path | None, *, dry_run: bool, as_json: bool
) -> int:
    from holdfast.care.history import History
    from holdfast.care.restore import restore_beside
    from holdfast.care.restore_plan import planned as plan_of
    from holdfast.care.seal import seal_of
    from holdfast.clock import Clock

    now_ms = Clock().now_ms()
    seal = seal_of(settings, identity)
    history = History(settings.data_dir, seal)
    target = _target(settings, wanted, seal, history, now_ms)
    if dry_run:
        planned, _ = plan_of(settings, target, seal, history, engine=None, now_ms=now_ms)
        return _tell_plan(
            msgspec.convert(msgspec.to_builtins(planned), Plan), msgspec.to_builtins(planned), as_json=as_json
        )
    progress = _Told(as_json=as_json)
    proof = restore_beside(target, into.absolute(), settings, seal, history, progress.note)
    progress.end()
    if as_json:
        print_json({"into": str(into), "backup": target.found.name, "proof": msgspec.to_builtins(proof)})
        return 0
    click.echo(f"restored backup {target.found.name} into {into}, the present is as it was")
    _show_proof(msgspec.convert(msgspec.to_builtins(proof), Proved))
    return 0


def _target(settings: Any, wanted: dict[str, Any], seal: Any, history: Any, now_ms: int) -> Any:
    from zoneinfo import ZoneInfo

    from holdfast.care.moments import choose, moment_of

    at_ms = moment_of(wanted["at"], ZoneInfo(settings.stats.timezone)) if "at" in wanted else None
    return choose(settings.data_dir, seal, name=wanted.get("set"), at_ms=at_ms, now_ms=now_ms, history=history)


def _part_of(wanted: dict[str, Any]) -> Any:
    from holdfast.care import put_back

    for name in _PARTS:
        if name in wanted:
            if name == "collection":
                return put_back.part_of_collection(wanted[name])
            if name == "file":
                return put_back.part_of_file(wanted[name])
            return put_back.Part(f"{name}s", wanted[name])
    return None


# Through a daemon.


def _through(
    daemon: Daemon, wanted: dict[str, Any], ask: Callable[[Plan], bool], *, dry_run: bool, as_json: bool
) -> int:
    planned = _asked(daemon, wanted | {"dry_run": True})
    plan = daemon.understood(planned.plan, Plan)
    if dry_run:
        return _tell_plan(plan, orjson.loads(bytes(planned.plan)), as_json=as_json)
    if not ask(plan):
        return 1
    # What was shown is what is done, also when another backup is made meanwhile.
    done = _asked(daemon, wanted | {"set": plan.backup})
    raw_plan = orjson.loads(bytes(done.plan))
    if bytes(done.part) != b"null":
        return _tell_part(plan, raw_plan, orjson.loads(bytes(done.part)), done.saved_as, as_json=as_json)
    state = _followed(daemon, as_json=as_json)
    if state.state != "completed":
        raise HoldfastError(f"nothing was restored: {state.reason or state.state}; see the daemon's log")
    return _tell_report(plan, orjson.loads(bytes(state.report)), as_json=as_json)


def _asked(daemon: Daemon, body: dict[str, Any]) -> Restored:
    return daemon.fetch("POST", PATH, body=orjson.dumps(body), timeout_s=WORK_TIMEOUT_S).decoded(Restored)


def _followed(daemon: Daemon, *, as_json: bool) -> State:
    """The state of the daemon's restore when it is over."""
    progress = _Told(as_json=as_json)
    seen_at = time.monotonic()
    try:
        while True:
            try:
                state = daemon.fetch("GET", PATH).decoded(State)
            except Unavailable:
                if time.monotonic() - seen_at > GONE_MAX_S:
                    raise
            else:
                seen_at = time.monotonic()
                if state.state in ("completed", "failed", "idle"):
                    return state
                progress.note(state.progress or state.state)
            time.sleep(POLL_S)
    finally:
        progress.end()


# What is shown.


class _Told:
    """Says on stderr how far it is, on a terminal."""

    def __init__(self, *, as_json: bool) -> None:
        self._is_shown = not as_json and sys.stderr is not None and sys.stderr.isatty()
        self._last = ""

    def note(self, text: str) -> None:
        if self._is_shown and text and text != self._last:
            click.echo(f"\r\x1b[K{text} …", nl=False, err=True)
            self._last = text

    def end(self) -> None:
        if self._is_shown and self._last:
            click.echo("\r\x1b[K", nl=False, err=True)


def _show(plan: Plan) -> None:
    proved = "proved" if plan.is_proved else "not proved"
    click.echo(f"backup {plan.backup} ({proved}), the state of {plan.at}")
    click.echo()
    print_table(
        [
            Column("Collection"),
            *(Column(title, is_number=True) for title in ("Now", "Then", "Added", "Changed", "Removed")),
            Column("Oldest"),
            Column("Newest"),
        ],
        [
            [
                row.collection,
                *(f"{count:,}" for count in (row.now, row.then, row.added, row.changed, row.removed)),
                row.oldest or "",
                row.newest or "",
            ]
            for row in plan.rows
        ],
    )
    if plan.has_other_sales:
        click.echo("the sales figures change")
    if plan.expiring:
        click.echo(f"{readable_count(plan.expiring, 'session')} idle for too long will expire at once")


def _tell_plan(plan: Plan, raw: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print_json({"dry_run": True, "plan": raw})
    else:
        _show(plan)
    return 0


def _tell_report(plan: Plan, raw: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print_json({"dry_run": False, **raw})
        return 0
    report = msgspec.convert(raw, Report)
    click.echo(
        f"restored backup {plan.backup}, the state of {plan.at}; what was there before is backup {report.saved_as}"
    )
    _show_proof(report.proof)
    return 0


def _show_proof(proof: Proved) -> None:
    # Each collection has the name of many.
    counts = ", ".join(
        f"{count:,} {name.removesuffix('s') if count == 1 else name}" for name, count in proof.counts.items() if count
    )
    click.echo(f"proved: {proof.files} files with the right checksums, {counts or 'no records'}")


def _tell_part(plan: Plan, raw_plan: dict[str, Any], raw: dict[str, Any], saved_as: str, *, as_json: bool) -> int:
    done = msgspec.convert(raw, PartReport)
    if as_json:
        print_json({"dry_run": False, "plan": raw_plan, "part": raw, "saved_as": saved_as})
    else:
        click.echo(
            f"from backup {plan.backup}: {done.added:,} added, {done.changed:,} changed, {done.removed:,} removed,"
            f" {done.unchanged:,} as they were; what was there before is backup {saved_as}"
        )
        for reason in done.reasons:
            click.echo(f"not restored: {reason}", err=True)
    return 1 if done.refused else 0


class _Quiet:
    """The log of a command, whose answer says all."""

    def info(self, event: str, **fields: Any) -> None:
        """Nothing."""

    debug = warning = error = exception = info
