"""The commands that bring data out and in: ``export``, ``import``."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import click
import msgspec
import orjson

from holdfast.care import tar
from holdfast.care.export import (
    MANIFEST_FILE,
    ExportManifest,
    Selection,
    decode_export_manifest,
    encode_export_manifest,
    export_chunks,
)
from holdfast.care.given import ARCHIVE_BYTES_MAX, READ_BYTES, Given, open_path
from holdfast.care.merge import MergeCounts, MergeReport, merge
from holdfast.care.packing import PACKED, SEALED, Seal, pack, unpack
from holdfast.care.seal import seal_of, seal_to_write
from holdfast.cli.arguments import AGE, SINCE, TEXT, where_option
from holdfast.cli.changing import confirm
from holdfast.cli.connection import WORK_TIMEOUT_S, Daemon, daemon_options, settings_of
from holdfast.cli.show import Column, Progress, examples, json_option, print_json, print_table, readable_count
from holdfast.clock import parse_ms
from holdfast.disk.files import Directory, kept_from_writers
from holdfast.errors import BadRequest, DataRefused, DirectoryLocked, InvalidRecord, NotFound, SettingsError
from holdfast.settings import Settings

if TYPE_CHECKING:
    from holdfast.engine import Engine

ARCHIVE = f".tar{PACKED}"
"""How the name of an archive ends; encrypted ones have another ending behind it."""

_AGE_HEAD = b"age-encryption.org/"
_EXPORT_PATH = "/v1/export"
_IMPORT_PATH = "/v1/admin/import"

identity_option = click.option(
    "--identity",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The age key that opens what is encrypted, instead of backups.identity_file.",
)


@click.command(
    "export",
    epilog=examples(
        "holdfast export /mnt/usb/holdfast.tar.zst",
        "holdfast export copy/ --redact",
        "holdfast export sales/ --collection sales --since 2026-11-01",
        "holdfast export one.tar.zst --conversation 573001234567",
        "holdfast export paying/ --collection sessions --state awaiting_payment",
    ),
)
@click.argument("target", metavar="DIR|FILE.tar.zst", type=click.Path(path_type=Path))
@click.option("--collection", type=TEXT, metavar="NAME", help="Only sessions, orders, users, conversations, sales, …")
@click.option("--conversation", type=TEXT, metavar="ID", help="Only this conversation, with its escalation.")
@click.option("--since", type=SINCE, metavar="TIME", help="Only what was active or changed since: ISO 8601, or 2h.")
@click.option("--until", type=SINCE, metavar="TIME", help="Only what was active or changed before: ISO 8601, or 2h.")
@click.option("--older-than", type=AGE, metavar="SPAN", help="Only what was not changed for this span, such as 30d.")
@click.option("--state", type=TEXT, metavar="STATE", help="Only sessions or orders in this state.")
@where_option
@click.option("--redact", is_flag=True, help="Replace people and texts by stand-ins, for a copy that leaves the house.")
@click.option(
    "--recipient",
    "recipients",
    type=TEXT,
    multiple=True,
    metavar="RECIPIENT",
    help=f"Encrypt for this age recipient (age1…, ssh-ed25519 …) or file of them; the file's name ends in {ARCHIVE}{SEALED}.",
)
@identity_option
@json_option
@daemon_options
def export(
    daemon: Daemon,
    target: Path,
    redact: bool,
    recipients: tuple[str, ...],
    identity: Path | None,
    as_json: bool,
    older_than: str | None,
    until: str | None,
    **chosen: Any,
) -> None:
    """Write all data, or a part of it, as JSON: into a new directory, or into one file.

    It is the state at one event, from the running daemon or from a directory that no daemon has open; a manifest in it says what
    each file should be. `holdfast import` takes it back, here or in another place.
    """
    if older_than is not None and until is not None:
        raise click.UsageError("give either --until or --older-than, not both")
    until = older_than or until
    _check_span(chosen["since"], until)
    is_archive = target.name.endswith((ARCHIVE, ARCHIVE + SEALED))
    if target.exists() and (is_archive or not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target} is there already; name a new directory, or a file FILE{ARCHIVE}")
    if recipients and not target.name.endswith(ARCHIVE + SEALED):
        raise SettingsError(f"expected a file that ends in {ARCHIVE}{SEALED} to encrypt, found {target.name}")
    sealing = seal_to_write(Settings(), recipients)
    if not target.absolute().parent.is_dir():
        raise SettingsError(f"no directory {target.absolute().parent}; make it first")
    if not is_archive and target.suffix in (PACKED, SEALED, ".tar", ".zip", ".gz"):
        raise SettingsError(f"expected a directory or a file that ends in {ARCHIVE}, found {target.name}")
    with _exported(daemon, chosen | {"until": until}, redact, sealing) as (chunks, settings):
        if sealing is not None and settings is None:
            chunks = _sealed_here(chunks, sealing)
        manifest = (
            _write_archive(chunks, target) if is_archive else _write_directory(chunks, target, settings, identity)
        )
    if as_json:
        print_json({"path": str(target), **({} if manifest is None else msgspec.to_builtins(manifest))})
    elif manifest is None:
        click.echo(f"exported to {target}, encrypted")
    else:
        records = sum(file.records for file in manifest.files.values())
        click.echo(
            f"exported {readable_count(records, 'record')} and {readable_count(manifest.messages, 'message')} to {target}, "
            f"as of event {manifest.seq}"
        )


def _check_span(since: str | None, until: str | None) -> None:
    """Refuse a span that nothing lies in, as far as that shows without the zone of the daemon, which looks as well."""
    with suppress(TypeError, ValueError):
        if since is not None and until is not None and datetime.fromisoformat(since) >= datetime.fromisoformat(until):
            raise click.UsageError(
                f"expected --since to lie before --until, found {since:.40} and {until:.40}; exchange them"
            )


@contextmanager
def _exported(
    daemon: Daemon, chosen: dict[str, Any], redact: bool, sealing: Seal | None
) -> Iterator[tuple[Iterator[bytes], Settings | None]]:
    """The pieces of the export, and the settings where they are those of a directory that nobody has open."""
    with ExitStack() as opened:
        engine = opened.enter_context(stopped_engine(daemon))
        if engine is not None:
            moments = {
                f"{name}_ms": None if chosen[name] is None else _moment_ms(chosen[name], engine)
                for name in ("since", "until")
            }
            wanted = Selection(
                collection=chosen["collection"],
                conversation=chosen["conversation"],
                state=chosen["state"],
                where=chosen["where"],
                is_redacted=redact,
                **moments,
            )
            seal = sealing or seal_to_write(engine.settings)
            with Progress("exporting", lambda: None) as progress:
                yield _told(export_chunks(engine, wanted, seal), progress), engine.settings
            return
        query = [(name, chosen[name]) for name in ("collection", "conversation", "since", "until", "state")]
        query += [("where", f"{field}={value}") for field, value in chosen["where"]]
        query += [("redact", "true")] if redact else []
        text = urlencode([(name, value) for name, value in query if value is not None], quote_via=quote)
        connection = opened.enter_context(daemon.connect(timeout_s=WORK_TIMEOUT_S))
        with Progress("exporting", lambda: None) as progress:
            yield _told(connection.download(f"{_EXPORT_PATH}?{text}" if text else _EXPORT_PATH), progress), None


def _sealed_here(chunks: Iterator[bytes], seal: Seal) -> Iterator[bytes]:
    """*chunks* of a daemon, encrypted in this process."""
    first = next(chunks, b"")
    if first.startswith(_AGE_HEAD):
        raise SettingsError("the daemon encrypts its exports for its own recipients; give no --recipient")
    return seal.close_up(chain([first], chunks))


def _told(chunks: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    for chunk in chunks:
        progress.advance(len(chunk))
        yield chunk


def _moment_ms(text: str, engine: Engine) -> int:
    try:
        return parse_ms(text, engine.rules.zone)
    except (ValueError, OverflowError):
        raise BadRequest(
            f"expected a time in ISO 8601 such as 2026-11-21T06:00:00Z, or a span, found {text!r:.80}"
        ) from None


@contextmanager
def stopped_engine(daemon: Daemon) -> Iterator[Engine | None]:
    """The data directory of *daemon* opened in this process; None when a daemon has it, or none is named.

    Raises:
        NotFound: there is no such directory.
        DataRefused: it cannot be opened safely.
    """
    # Only where no daemon runs, and the help of all commands must not pay for it.
    from holdfast.recovery import open_engine

    data_dir = daemon.data_dir
    if data_dir is None:
        yield None
        return
    if not data_dir.is_dir():
        raise NotFound(f"no data directory {data_dir}; name it with --data-dir, or a daemon with --connect")
    try:
        with kept_from_writers(data_dir):
            pass
        engine = open_engine(settings_of(str(data_dir)))
    except DirectoryLocked:
        yield None
        return
    try:
        yield engine
    finally:
        engine.close()


def _write_archive(chunks: Iterator[bytes], target: Path) -> ExportManifest | None:
    """Write *chunks* to the file *target*; what the manifest in it says, None when it is encrypted."""
    first = next(chunks, b"")
    is_sealed = first.startswith(_AGE_HEAD)
    if is_sealed != target.name.endswith(SEALED):
        found = "encrypts its exports" if is_sealed else "does not encrypt its exports (backups.recipients)"
        raise SettingsError(f"the daemon {found}; name a file that ends in {ARCHIVE}{SEALED if is_sealed else ''}")
    directory = Directory(target.absolute().parent)
    with directory:
        manifest: list[ExportManifest | None] = [None]
        directory.stage(target.name, _looked_into(chain([first], chunks), manifest, is_sealed=is_sealed))
        directory.publish([target.name])
    return manifest[0]


def _looked_into(chunks: Iterator[bytes], found: list[ExportManifest | None], *, is_sealed: bool) -> Iterator[bytes]:
    """*chunks*, with the manifest at their beginning noted in *found*."""
    head = b""
    for chunk in chunks:
        if not is_sealed and found[0] is None and len(head) < READ_BYTES:
            head += chunk
            found[0] = _manifest_at(head)
        yield chunk


def _manifest_at(head: bytes) -> ExportManifest | None:
    """The manifest with which the archive that begins with *head* begins, once there is enough of it."""
    try:
        for member in tar.members(unpack([head]), bytes_max=ARCHIVE_BYTES_MAX):
            return decode_export_manifest(b"".join(member.content)) if member.name == MANIFEST_FILE else None
    except Exception:  # cut short, as it is
        return None
    return None


def _write_directory(
    chunks: Iterator[bytes], target: Path, settings: Settings | None, identity: Path | None
) -> ExportManifest:
    """Unpack *chunks* into the new directory *target*; nothing is there unless all of it is."""
    first = next(chunks, b"")
    raw: Iterable[bytes] = chain([first], chunks)
    seal: Seal | None = None
    if first.startswith(_AGE_HEAD):
        seal = seal_of(settings or Settings(), identity)
        if seal is None:
            raise SettingsError(
                f"the daemon encrypts its exports; name a file that ends in {ARCHIVE}{SEALED}, or the key by --identity"
            )
    parent = target.absolute().parent
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
    try:
        manifest: ExportManifest | None = None
        with Directory(staging) as directory:
            for member in tar.members(unpack(raw, seal), bytes_max=ARCHIVE_BYTES_MAX):
                if "/" in member.name:
                    raise InvalidRecord(f"expected an export, found an archive with {member.name!r:.80} in it")
                digest = hashlib.sha256()
                directory.stage(member.name, _digested(member.content, digest))
                directory.publish([member.name])
                if member.name == MANIFEST_FILE:
                    manifest = decode_export_manifest(directory.read(MANIFEST_FILE))
                elif manifest is None or manifest.files[member.name].sha256 != digest.hexdigest():
                    raise DataRefused(f"{member.name} did not arrive as it was sent; export again")
        if manifest is None:
            raise InvalidRecord("expected an export, found an archive without a manifest")
        # An empty directory gives way to it.
        os.rename(staging, target)
        with Directory(parent) as directory:
            directory.sync()
        return manifest
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _digested(chunks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


@click.command(
    "import",
    epilog=examples(
        "holdfast import holdfast.tar.zst --dry-run",
        "holdfast import /srv/old-bot/data",
        "holdfast import pending_orders.json --yes",
    ),
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--skip-invalid", is_flag=True, help="Take the valid records where others are not; else none is taken.")
@identity_option
@json_option
@daemon_options
def import_(
    daemon: Daemon, path: Path, dry_run: bool, yes: bool, skip_invalid: bool, identity: Path | None, as_json: bool
) -> int:
    """Merge an export, a directory of an old bot, or one file of either into the data.

    Everything is checked before anything changes, and a backup is taken before. Of two records with one id the newer counts, on
    a tie the one that is here; messages are added, never changed. Importing the same again changes nothing. The exit code is 1
    when something could not be merged.
    """
    with ExitStack() as opened:
        engine = opened.enter_context(stopped_engine(daemon))
        scratch = Path(tempfile.gettempdir()) if engine is None else engine.settings.data_dir
        seal = seal_of(Settings() if engine is None else engine.settings, identity)
        if engine is None and seal is None and path.name.endswith(SEALED):
            # The daemon may have the key.
            work = _sender(daemon, path, None, skip_invalid)
        else:
            given = opened.enter_context(open_path(path, scratch, seal))
            work = (
                _sender(daemon, path, given, skip_invalid) if engine is None else _merger(engine, given, skip_invalid)
            )
        if not yes or dry_run:
            report = work(True)
            if dry_run or not report.changes:
                return _tell_import(report, as_json)
            if not as_json:
                _tell_import(report, as_json)
            confirm(f"import {readable_count(report.changes, 'record')} from {path}", yes)
        return _tell_import(work(False), as_json)


def _merger(engine: Engine, given: Given, skip_invalid: bool) -> Callable[[bool], MergeReport]:
    def work(is_dry_run: bool) -> MergeReport:
        return merge(
            engine,
            given,
            is_dry_run=is_dry_run,
            skips_invalid=skip_invalid,
            before_change=lambda: engine.backup("import").name,
        )

    return work


def _sender(daemon: Daemon, path: Path, given: Given | None, skip_invalid: bool) -> Callable[[bool], MergeReport]:
    """Sends what is given to the daemon, which does the rest."""

    def work(is_dry_run: bool) -> MergeReport:
        name = f"upload{ARCHIVE}{SEALED}" if given is None else f"upload{ARCHIVE}"
        query = {"dry_run": str(is_dry_run).lower(), "skip_invalid": str(skip_invalid).lower(), "file": name}
        with (
            Progress(f"sending {path.name}", lambda: None) as progress,
            daemon.connect(timeout_s=WORK_TIMEOUT_S) as sent,
        ):
            chunks = _file_chunks(path) if given is None else pack(_tar_of(given))
            reply = sent.upload(f"{_IMPORT_PATH}?{urlencode(query)}", _told(chunks, progress))
        return reply.decoded(MergeReport)

    return work


def _tar_of(given: Given) -> Iterator[bytes]:
    """What is given as one archive."""
    if given.manifest is not None:
        raw = encode_export_manifest(given.manifest)
        yield tar.header_of(MANIFEST_FILE, len(raw)) + raw + tar.padding_of(len(raw))
    for part in given.parts:
        with part.open() as file:
            # Not of its descriptor: it may be a part of another file.
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            yield tar.header_of(part.name, size, part.written_ms // 1000)
            left = size
            while left and (piece := file.read(min(left, READ_BYTES))):
                left -= len(piece)
                yield piece
            if left:
                raise InvalidRecord(f"{part.name} changed while it was read; try again")
            yield tar.padding_of(size)
    yield tar.ENDING


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _tell_import(report: MergeReport, as_json: bool) -> int:
    code = 1 if report.sum_of("conflicting") + report.sum_of("refused") else 0
    if as_json:
        print_json(orjson.loads(msgspec.json.encode(report)))
        return code
    shown = [
        name
        for name in MergeCounts.__struct_fields__
        if name in ("added", "newer", "older", "same") or report.sum_of(name)
    ]
    print_table(
        [Column("collection"), *(Column(name, is_number=True) for name in shown)],
        [
            [collection, *(f"{getattr(counts, name):,}" for name in shown)]
            for collection, counts in report.collections.items()
        ],
    )
    done = "would change" if report.dry_run else "changed"
    click.echo(f"{done} {readable_count(report.changes, 'record')}, {readable_count(report.messages, 'message')} added")
    if report.ignored:
        names = ", ".join(report.ignored[:5])
        click.echo(f"left out, as no data of ours: {names}{' and more' if len(report.ignored) > 5 else ''}")
    if report.backup is not None:
        click.echo(f"as it was before: backup {report.backup}")
    for reason in report.reasons:
        click.echo(f"holdfast: {reason}", err=True)
    return code
