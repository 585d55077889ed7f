"""Commands that change records: ``put``, ``patch``, ``rm``, with what sessions and orders have of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import click
import msgspec
import orjson

from holdfast.cli.arguments import AGE, AMOUNT, GENERATION, HEADER_TEXT, TEXT, VERSION, json_value, where_option
from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_options
from holdfast.cli.kinds import Kind, id_argument
from holdfast.cli.reading import PAGE_LIMIT, Item, check_collection, count_of, items_of
from holdfast.cli.show import Progress, counted, examples, json_option, print_json, printable, readable_count
from holdfast.errors import Unavailable, error_of

BATCH_OPS = 500
"""Records removed by one request."""

IDS_SHOWN = 10
"""Of the records that a filter chooses, in the preview."""

REFUSALS_TOLD = 10
"""Records that ``rm`` could not remove are named up to this many."""

Arguments = dict[str, Any]


class _Result(msgspec.Struct, frozen=True):
    """What became of one op of a batch; *code* and *detail* say why it was refused."""

    status: int
    seq: int = 0
    id: str = ""
    version: int = 0
    code: str = ""
    detail: str = ""


class _Results(msgspec.Struct, frozen=True):
    results: list[_Result]


_VALUE_HELP = "VALUE is a JSON object, @FILE names a file that holds one, - reads it from stdin."


def put_command(kind: Kind) -> click.Command:
    """``put``, for records of *kind*."""
    id, value = kind.example
    return _value_command(
        kind,
        "put",
        f"Store one {kind.noun} whole.",
        f"holdfast {kind.command} put {id} '{value}'",
        f"holdfast {kind.command} put {id} @{kind.noun}.json --if-version 0",
        f"jq -n '{{}}' | holdfast {kind.command} put {id} -",
        done="stored",
    )


def patch_command(kind: Kind) -> click.Command:
    """``patch``, for records of *kind*."""
    id, value = kind.example
    return _value_command(
        kind,
        "patch",
        f"Merge a patch into one {kind.noun} (RFC 7396: null removes a key).",
        f"holdfast {kind.command} patch {id} '{value}'",
        f"holdfast {kind.command} patch {id} '{{\"note\": null}}' --if-version 3",
        done="changed",
    )


def _value_command(kind: Kind, verb: str, purpose: str, *lines: str, done: str) -> click.Command:
    """A command that sends a VALUE; *lines* are its examples."""

    @click.command(verb, help=f"{purpose}\n\n{_VALUE_HELP}", epilog=examples(*lines))
    @id_argument(kind)
    @click.argument("value", metavar="VALUE")
    @write_options(kind)
    @json_option
    @daemon_options
    def send(daemon: Daemon, id: str, value: str, as_json: bool, **how: Any) -> None:
        answer = change(daemon, verb.upper(), kind, id, how, body=json_value(value))
        tell(kind, answer, as_json, done)

    return send


def rm_command(kind: Kind) -> click.Command:
    """``rm``, for records of *kind*."""
    id, _ = kind.example
    noun = kind.command.split()[0]

    @click.command(
        "rm",
        help=f"""Remove {noun} by their ids, those that are chosen by --where and its like, or all of them.

        Of those that are chosen the number and the first ids are shown, and then asked; one that somebody changes meanwhile stays.
        Those that cannot be removed are told and the others removed all the same; the exit code is 1 then.
        """,
        epilog=examples(
            f"holdfast {kind.command} rm {id}",
            f"holdfast {kind.command} rm {id} --if-version 3",
            f"holdfast {kind.command} rm --older-than 30d --dry-run",
            f"holdfast {kind.command} rm --all --yes",
        ),
    )
    @id_argument(kind, nargs=-1)
    @where_option
    @click.option("--older-than", type=AGE, metavar="SPAN", help="Only those not active or changed for this span.")
    @click.option("--all", "is_all", is_flag=True, help="All there are; asks first.")
    @click.option("--dry-run", is_flag=True, help="Say how many are meant and name the first, and change nothing.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @write_options(kind, has_ttl=False)
    @json_option
    @daemon_options
    def rm(
        daemon: Daemon,
        id: tuple[str, ...],
        where: tuple[tuple[str, str], ...],
        older_than: str | None,
        is_all: bool,
        dry_run: bool,
        yes: bool,
        as_json: bool,
        state: str | None = None,
        **how: Any,
    ) -> int:
        query = {name: value for name, value in (("until", older_than), ("state", state)) if value is not None}
        is_chosen = bool(query or where)
        if is_all + is_chosen + bool(id) != 1:
            raise click.UsageError("expected ids, or what chooses them (--where), or --all, and one of these only")
        if id and not dry_run:
            own = fields_of(how, len(id))
            ops = (kind.op("delete", {"id": one, **own}) for one in id)
            return do_each(daemon, kind, ops, len(id), how, as_json, doing="removing", done="removed")
        fields_of(how, 0)
        check_collection(daemon, kind)
        if id:
            return tell_preview(kind, list(id), as_json)
        if is_all and not dry_run:
            total = count_of(daemon, kind)
            confirm(f"remove all {kind.command} ({readable_count(total or 0, 'record')})", yes)
            ops = (kind.op("delete", {"id": item.id}) for item in items_of(daemon, kind.path, {}, PAGE_LIMIT))
            return do_each(daemon, kind, ops, total, how, as_json, doing="removing", done="removed")
        return remove_chosen(daemon, kind, query, where, how, as_json, is_dry_run=dry_run, yes=yes)

    if kind.state_field is not None:
        option = click.option("--state", type=TEXT, metavar="STATE", help=f"Only those with this {kind.state_field}.")
        option(rm)
    return rm


def remove_chosen(
    daemon: Daemon,
    kind: Kind,
    query: dict[str, str],
    where: tuple[tuple[str, str], ...],
    how: Arguments,
    as_json: bool,
    *,
    is_dry_run: bool,
    yes: bool,
) -> int:
    """Remove the records that *query* and *where* choose, after a preview; the exit code."""
    with Progress(f"looking for {kind.command}", lambda: count_of(daemon, kind)) as progress:
        found = [
            (item.id, item.version)
            for item in counted(items_of(daemon, kind.path, query, PAGE_LIMIT), progress)
            if is_meant(item, where)
        ]
    ids = [id for id, _ in found]
    if is_dry_run:
        return tell_preview(kind, ids, as_json)
    if ids:
        confirm(f"remove {readable_count(len(ids), kind.noun)} ({first_of(ids)})", yes)
    # Only as they were seen: what changed since is not what was meant.
    ops = (kind.op("delete", {"id": id, "if_version": version}) for id, version in found)
    return do_each(daemon, kind, ops, len(found), how, as_json, doing="removing", done="removed")


def is_meant(item: Item, where: tuple[tuple[str, str], ...]) -> bool:
    """Whether every field of *where* has its value in *item*."""
    if not where:
        return True
    value = orjson.loads(bytes(item.value))
    return all(_as_text(value.get(field)) == wanted for field, wanted in where)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def tell_preview(kind: Kind, ids: list[str], as_json: bool) -> int:
    """Tell how many records are meant, and the first of them; the exit code."""
    if as_json:
        print_json({"would_remove": len(ids), "first": ids[:IDS_SHOWN]})
    else:
        click.echo(f"would remove {readable_count(len(ids), kind.noun)}{': ' if ids else ''}{first_of(ids)}")
    return 0


def first_of(ids: list[str]) -> str:
    """The first of *ids*, as one reads them."""
    return printable(", ".join(ids[:IDS_SHOWN])) + (" and more" if len(ids) > IDS_SHOWN else "")


def fields_of(how: Arguments, count: int = 1) -> Arguments:
    """The fields that options of ``write_options`` give to an op, one of *count*.

    Raises:
        click.UsageError: an option that goes with a single op.
    """
    fields = {name: how[name] for name in ("if_version", "lease", "idempotency_key") if how.get(name) is not None}
    if fields and count != 1:
        raise click.UsageError(f"--{next(iter(fields)).replace('_', '-')} goes with one id only")
    return fields


def do_each(
    daemon: Daemon,
    kind: Kind,
    ops: Iterator[dict[str, Any]],
    total: int | None,
    how: Arguments,
    as_json: bool,
    *,
    doing: str,
    done: str,
) -> int:
    """Do every one of *ops*, of which there are *total*, and tell what came of it; the exit code.

    Each has a record of its own, and one that is refused does not keep the others.
    """
    count, refused = 0, []
    with Progress(f"{doing} {kind.command}", lambda: total) as progress:
        while some := list(islice(ops, BATCH_OPS)):
            for op, result in zip(some, _results(daemon, some, how), strict=True):
                if result.status < 400:
                    count += 1
                else:
                    refused.append({"id": op["id"], "code": result.code, "detail": result.detail})
            progress.advance(len(some))
    if as_json:
        print_json({done: count, "refused": refused})
    else:
        click.echo(f"{done} {readable_count(count, kind.noun)}")
    for refusal in refused[:REFUSALS_TOLD]:
        click.echo(f"holdfast: {printable(refusal['detail'])}", err=True)
    if len(refused) > REFUSALS_TOLD:
        click.echo(f"holdfast: {len(refused)} were not {done}; --json names them all", err=True)
    return 1 if refused else 0


def do_one(daemon: Daemon, op: Arguments, how: Arguments) -> dict[str, Any]:
    """Do *op*, and what it yielded: ``id``, ``version``, ``seq``.

    Raises:
        HoldfastError: it was refused.
    """
    [result] = _results(daemon, [op | fields_of(how)], how)
    if result.status >= 400:
        raise error_of(result.code, result.detail, result.status)
    return {"id": result.id, "version": result.version, "seq": result.seq}


def _results(daemon: Daemon, ops: list[Arguments], how: Arguments) -> list[_Result]:
    """The result of each of *ops*, in their order."""
    query = {"durability": how["durability"]} if how.get("durability") else None
    reply = daemon.fetch("POST", "/v1/batch", query=query, body=orjson.dumps({"ops": ops}), timeout_s=WORK_TIMEOUT_S)
    results = reply.decoded(_Results).results
    if len(results) != len(ops):
        raise Unavailable(f"expected {len(ops)} results from {daemon}, found {len(results)}; it is no Holdfast daemon")
    return results


def confirm(what: str, yes: bool) -> None:
    """Ask before *what*, where there is somebody to ask.

    Raises:
        click.UsageError: nobody can be asked, and --yes is not given.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"this would {what}; say --yes")
    click.confirm(what.capitalize() + "?", abort=True, err=True)


def touch_command(kind: Kind) -> click.Command:
    """``touch``, which only sessions have."""

    @click.command("touch", epilog=examples("holdfast sessions touch 573001234567 --ttl 2h"))
    @id_argument(kind)
    @write_options(kind)
    @json_option
    @daemon_options
    def touch(daemon: Daemon, id: str, as_json: bool, **how: Any) -> None:
        """Set the last activity of a session to now."""
        tell(kind, change(daemon, "POST", kind, id, how, "touch"), as_json, "touched")

    return touch


def lease_command(kind: Kind) -> click.Command:
    """``lease``, which only sessions have."""

    @click.command(
        "lease",
        epilog=examples(
            "holdfast sessions lease 573001234567 --for 5m --owner ana",
            "holdfast sessions put 573001234567 '{}' --lease 1234",
            "holdfast sessions lease 573001234567 --renew 1234",
        ),
    )
    @id_argument(kind)
    @click.option("--for", "span", type=TEXT, default="30s", show_default=True, metavar="SPAN", help="How long.")
    @click.option("--owner", type=TEXT, metavar="NAME", help="Told to whoever meets the lease.")
    @click.option("--renew", type=GENERATION, metavar="GENERATION", help="Renew this lease.")
    @write_options(kind, has_ttl=False, has_condition=False)
    @json_option
    @daemon_options
    def lease(
        daemon: Daemon, id: str, span: str, owner: str | None, renew: int | None, as_json: bool, **how: Any
    ) -> None:
        """Take a session for yourself; other writers are refused until the lease ends.

        Write under it with --lease GENERATION, and give it back with `release`.
        """
        body = {name: value for name, value in (("ttl", span), ("owner", owner), ("generation", renew)) if value}
        answer = change(daemon, "POST", kind, id, how, "lease", body=body)
        if as_json:
            return print_json(answer)
        click.echo(
            f"session {answer['id']} is yours until {answer['expires_at']}, as generation {answer['generation']}"
        )

    return lease


def release_command(kind: Kind) -> click.Command:
    """``release``, which only sessions have."""

    @click.command("release", epilog=examples("holdfast sessions release 573001234567 1234"))
    @id_argument(kind)
    @click.argument("generation", type=GENERATION, metavar="GENERATION")
    @write_options(kind, has_ttl=False, has_condition=False)
    @json_option
    @daemon_options
    def release(daemon: Daemon, id: str, generation: int, as_json: bool, **how: Any) -> None:
        """Give the lease GENERATION of a session back."""
        answer = change(daemon, "POST", kind, id, how, "release", body={"generation": generation})
        if as_json:
            return print_json(answer)
        click.echo(f"session {answer['id']} is released")

    return release


def complete_command(kind: Kind) -> click.Command:
    """``complete``, which only orders have."""

    @click.command("complete", epilog=examples("holdfast orders complete 1001 --revenue 84900.50"))
    @id_argument(kind)
    @click.option("--revenue", type=AMOUNT, metavar="AMOUNT", help="Counted once, exactly as written.")
    @write_options(kind)
    @json_option
    @daemon_options
    def complete(daemon: Daemon, id: str, revenue: str | None, as_json: bool, **how: Any) -> None:
        """Complete an order, with its revenue; a repeat counts nothing again."""
        body = None if revenue is None else {"revenue": revenue}
        tell(kind, change(daemon, "POST", kind, id, how, "complete", body=body), as_json, "completed")

    return complete


def cancel_command(kind: Kind) -> click.Command:
    """``cancel``, which only orders have."""

    @click.command("cancel", epilog=examples("holdfast orders cancel 1001 --reason 'paid twice'"))
    @id_argument(kind)
    @click.option("--reason", type=TEXT, metavar="TEXT", help="Kept in the order.")
    @write_options(kind)
    @json_option
    @daemon_options
    def cancel(daemon: Daemon, id: str, reason: str | None, as_json: bool, **how: Any) -> None:
        """Cancel a pending order."""
        body = None if reason is None else {"reason": reason}
        tell(kind, change(daemon, "POST", kind, id, how, "cancel", body=body), as_json, "cancelled")

    return cancel


# What they have in common.


def write_options(kind: Kind, *, has_ttl: bool = True, has_condition: bool = True) -> Callable[..., Any]:
    """The options that each change takes; the command receives them as ``how``."""
    options = [
        click.option(
            "--durability", type=click.Choice(["always", "everysec"]), help="When it is acknowledged; else as set."
        ),
        click.option(
            "--idempotency-key", type=HEADER_TEXT, metavar="KEY", help="A repeat within 24 h changes nothing."
        ),
    ]
    if has_condition:
        options.append(
            click.option(
                "--if-version",
                type=VERSION,
                metavar="N",
                help="Only when the record has this version; 0: only when there is none.",
            )
        )
        if kind.is_session:
            options.append(
                click.option(
                    "--lease",
                    type=GENERATION,
                    metavar="GENERATION",
                    help="Write under this lease.",
                )
            )
    if kind.is_session and has_ttl:
        options.append(click.option("--ttl", type=TEXT, metavar="SPAN", help="Idle time of its own, such as 2h."))

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        # Each goes before those already there, so that conditions come first in the help.
        for option in options:
            command = option(command)
        return command

    return with_options


def _headers(how: Arguments) -> dict[str, str]:
    headers: dict[str, str] = {}
    version = how.get("if_version")
    if version == 0:
        headers["If-None-Match"] = "*"
    elif version is not None:
        headers["If-Match"] = f'"{version}"'
    for option, header in (
        ("idempotency_key", "Idempotency-Key"),
        ("durability", "Holdfast-Durability"),
        ("lease", "Holdfast-Lease"),
    ):
        if how.get(option) is not None:
            headers[header] = str(how[option])
    return headers


def change(
    daemon: Daemon, method: str, kind: Kind, id: str, how: Arguments, *action: str, body: Any = None
) -> dict[str, Any]:
    query = {"ttl": how["ttl"]} if how.get("ttl") is not None else None
    raw = body if isinstance(body, bytes | None) else orjson.dumps(body)
    return daemon.fetch(method, kind.path_of(id, *action), query=query, headers=_headers(how), body=raw).fields()


def tell(kind: Kind, answer: dict[str, Any], as_json: bool, done: str) -> None:
    if as_json:
        return print_json(answer)
    click.echo(f"{kind.noun} {answer['id']} {done}: version {answer['version']}, seq {answer['seq']}")
