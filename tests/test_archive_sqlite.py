"""What only the SQLite archive has: plans, a file, a write-ahead log, and what becomes of them when they are damaged."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.archive import sqlite_file
from holdfast.archive.base import (
    ArchiveDamaged,
    ArchiveError,
    ConversationQuery,
    EscalationQuery,
    MessageQuery,
)
from holdfast.archive.sqlite import SQLiteArchive, open_sqlite
from holdfast.archive.sqlite_file import PAGE_BYTES, WAL_BYTES_MAX
from holdfast.archive.sqlite_salvage import salvage
from holdfast.clock import format_ms
from holdfast.core.event import Event, StoredMessage
from holdfast.errors import DataRefused, ForkedProcess
from tests.crash.harness import FULL, ROOT, clean_environ, mount, mounted, needs_root, needs_strace
from tests.test_archive import (
    DAY_MS,
    T0_MS,
    appended,
    apply,
    changed,
    deleted,
    escalated,
    escalation_of,
    head_of,
    message,
    numbers,
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for longer than a moment."""
    monkeypatch.setattr(sqlite_file, "BUSY_MS", 20)


def filled(path: Path, conversations: int, messages: int = 3) -> SQLiteArchive:
    """An archive with so many conversations, each with so many messages, one user and one session."""
    archive = open_sqlite(path)
    for first in range(0, conversations, 1_000):
        apply(
            archive,
            *(
                appended(
                    head_of(
                        f"c{n:06}",
                        messages,
                        user_id=f"u{n % 50}",
                        session_id=f"s{n % 70}",
                        escalated=n % 5 == 0,
                        archived=n % 3 == 0,
                        updated_at=format_ms(T0_MS + n),
                    ),
                    *(message(k, T0_MS + n, external_id=f"{n}.{k}") for k in range(1, messages + 1)),
                )
                for n in range(first, min(first + 1_000, conversations))
            ),
        )
    apply(archive, *(escalated(escalation_of(f"c{n:06}"), head_of(f"c{n:06}")) for n in range(0, conversations, 50)))
    return archive


# Plans.


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that any connection runs from now on."""
    seen: list[str] = []
    connect = sqlite3.connect

    def connect_traced(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        connection.set_trace_callback(seen.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_traced)
    return seen


def use_every_way(archive: SQLiteArchive) -> None:
    """Everything that is asked of an archive while it serves, with each combination of filters."""
    for user_id, session_id, is_escalated, archived, since_ms, until_ms, after in itertools.product(
        (None, "u1"), (None, "s1"), (None, True), (None, False), (None, T0_MS), (None, T0_MS + 9), (None, (T0_MS, "c"))
    ):
        archive.conversations(
            ConversationQuery(
                user_id=user_id,
                session_id=session_id,
                escalated=is_escalated,
                archived=archived,
                since_ms=since_ms,
                until_ms=until_ms,
                after=after,
            )
        )
    for status, priority, place in itertools.product((None, "pending"), (None, "low"), (None, ("low", T0_MS, "c"))):
        archive.escalations(EscalationQuery(status=status, priority=priority, after=place))
    for number, before, role, author, ms, newest in itertools.product(
        (0, 2), (None, 3), (None, "user"), (None, "bot"), (None, T0_MS), (True, False)
    ):
        archive.messages(
            "c000001",
            MessageQuery(
                after=number, before=before, role=role, author=author, since_ms=ms, until_ms=ms, newest=newest
            ),
        )
    archive.external_numbers("c000001", [("", "1.1"), ("web", "1.1")])
    archive.figures(T0_MS + DAY_MS)
    archive.archivable(T0_MS + 50, 10, "c000003")
    archive.count_archivable(T0_MS + 50)
    archive.expirable(T0_MS + 50, 10, "c000003")
    apply(
        archive,
        appended(head_of("c000001", 5, user_id="u1", session_id="s1"), message(2), message(4, T0_MS - 1)),
        appended(head_of("new"), message(1)),
        escalated(escalation_of("new"), head_of("new", 2)),
        changed("message.expire", head_of("c000001", 6), up_to=2, before=T0_MS + 5),
        deleted("new"),
    )
    archive.fill_messages("c000002", [message(1), message(9)])


def test_nothing_is_searched_by_looking_at_all(tmp_path: Path, statements: list[str]) -> None:
    """Every query, of each combination of filters, and every change, runs along an index in the order of its answer."""
    archive = filled(tmp_path / "archive.db", 200)
    statements.clear()
    use_every_way(archive)
    seen = {one for one in statements if one.startswith(("SELECT", "UPDATE", "INSERT", "DELETE"))}

    plans = sqlite3.connect(tmp_path / "archive.db")
    explained = 0
    for statement in seen:
        for *_, step in plans.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall():
            explained += 1
            assert not step.startswith("SCAN") or step == "SCAN CONSTANT ROW", f"{step}: {statement}"
            assert "TEMP B-TREE" not in step, f"{step}: {statement}"

    assert len(seen) > 150 and explained > 300
    plans.close()
    archive.close()


FIRST_PAGES: dict[str, Callable[[SQLiteArchive], object]] = {
    "conversations": lambda archive: archive.conversations(ConversationQuery(limit=10)),
    "awake": lambda archive: archive.conversations(ConversationQuery(archived=False, limit=10)),
    "escalated": lambda archive: archive.conversations(ConversationQuery(escalated=True, archived=False, limit=10)),
    "older": lambda archive: archive.conversations(ConversationQuery(until_ms=T0_MS + 90, limit=10)),
    "user": lambda archive: archive.conversations(ConversationQuery(user_id="u1", limit=2)),
    "session": lambda archive: archive.conversations(ConversationQuery(session_id="s1", limit=1)),
    "user's escalated": lambda archive: archive.conversations(
        ConversationQuery(user_id="u0", escalated=True, archived=False, limit=1)
    ),
    "escalations": lambda archive: archive.escalations(EscalationQuery(limit=2)),
    "pending": lambda archive: archive.escalations(EscalationQuery(status="pending", priority="low", limit=2)),
    "messages": lambda archive: archive.messages("c000050", MessageQuery(limit=20)),
    "external": lambda archive: archive.external_numbers("c000050", [("", "50.1")]),
    "figures": lambda archive: archive.figures(T0_MS + 40 * DAY_MS),
}


MANY = 100_000 if FULL else 25_000
"""Conversations that a first page must not be slowed by."""


def test_a_first_page_costs_the_same_however_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of SQLite's machine for each kind of page, with a hundred conversations and with very many."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    connect = sqlite3.connect

    def connect_counted(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        if "mode=ro" in str(arguments[0]):
            connection.set_progress_handler(count, 1)
        return connection

    small, large = filled(tmp_path / "small.db", 150), filled(tmp_path / "large.db", MANY, 1)
    for archive in (small, large):
        archive.close()
    monkeypatch.setattr(sqlite3, "connect", connect_counted)
    costs: list[dict[str, int]] = []
    for name in ("small.db", "large.db"):
        archive = open_sqlite(tmp_path / name)
        costs.append({})
        for page, read in FIRST_PAGES.items():
            steps = 0
            read(archive)
            costs[-1][page] = steps
        archive.close()

    for page in FIRST_PAGES:
        assert 0 < costs[1][page] <= 1.2 * costs[0][page], f"{page}: {costs[0][page]} steps, then {costs[1][page]}"


def test_a_small_archive_is_small(tmp_path: Path) -> None:
    """500 short turns in one conversation take at most three times their own bytes (GOALS, row 11)."""
    content = "word " * 12
    archive = open_sqlite(tmp_path / "archive.db")
    for n in range(1, 501):
        apply(archive, appended(head_of("573001234567", n), message(n, T0_MS + n, content=content)))
    archive.close()

    assert [path.name for path in tmp_path.iterdir()] == ["archive.db"]
    assert (tmp_path / "archive.db").stat().st_size <= 3 * 500 * len(content)


# The file.


def test_all_its_files_are_private(tmp_path: Path) -> None:
    """0600, those beside it too, whatever they and the umask were before."""
    before = os.umask(0)
    try:
        open_sqlite(tmp_path / "archive.db").close()
        (tmp_path / "archive.db").chmod(0o644)
        archive = open_sqlite(tmp_path / "archive.db")
        apply(archive, appended(head_of("a"), message(1)))
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"archive.db": 0o600, "archive.db-wal": 0o600, "archive.db-shm": 0o600}
    archive.close()


@pytest.mark.parametrize("name", ["archive.db", "archive.db-wal", "archive.db-shm"])
def test_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    """Nor is anything else read that is no regular file; what a link points to is as it was."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    places: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(outside),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ]
    for n, plant in enumerate(places):
        (tmp_path / str(n)).mkdir()
        plant(tmp_path / str(n) / name)

        with pytest.raises(DataRefused, match="not a regular file"):
            open_sqlite(tmp_path / str(n) / "archive.db")

    assert outside.read_bytes() == b"" and not (tmp_path / "nowhere").exists()


def test_an_empty_file_is_a_new_archive(tmp_path: Path) -> None:
    """As a process leaves it that was killed while it created one: empty, or with a header and nothing else."""
    (tmp_path / "archive.db").touch()
    open_sqlite(tmp_path / "archive.db").close()
    bare = sqlite3.connect(tmp_path / "bare.db")
    bare.execute("PRAGMA journal_mode=WAL")
    bare.close()
    assert (tmp_path / "bare.db").stat().st_size > 0

    for name in ("archive.db", "bare.db"):
        archive = open_sqlite(tmp_path / name)
        apply(archive, appended(head_of("a"), message(1)))
        assert archive.check() == []
        archive.close()


@pytest.mark.parametrize("where", ["file", "log"])
def test_a_newer_schema_is_refused_untouched(tmp_path: Path, where: str) -> None:
    """Whether the file says so, or the write-ahead log of somebody who was killed."""
    path = tmp_path / "archive.db"
    filled(path, 10).close()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version=99")
    if where == "log":
        newer.execute("PRAGMA wal_checkpoint")
        newer.execute("PRAGMA user_version=100")
        # Taken as a kill would leave it: what is in the log is in no file yet.
        copies = [(tmp_path / "killed.db", path), (tmp_path / "killed.db-wal", path.with_name("archive.db-wal"))]
        content = [(copy, original.read_bytes()) for copy, original in copies]
        # Only the log may say it.
        before_log = bytearray(content[0][1])
        before_log[60:64] = (1).to_bytes(4)
        content[0] = (copies[0][0], bytes(before_log))
        for copy, raw in content:
            copy.write_bytes(raw)
        path = tmp_path / "killed.db"
    newer.close()
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir() if not one.name.endswith("-shm")}

    with pytest.raises(DataRefused, match="schema version"):
        open_sqlite(path)

    assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if not one.name.endswith("-shm")} == before


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """With another application_id, or without one but with a version."""
    for pragma in ("application_id=1", "user_version=1"):
        other = sqlite3.connect(tmp_path / pragma)
        other.execute("CREATE TABLE t (x)")
        other.execute(f"PRAGMA {pragma}")
        other.close()
        before = (tmp_path / pragma).read_bytes()

        with pytest.raises(ArchiveDamaged, match="another program"):
            open_sqlite(tmp_path / pragma)

        assert (tmp_path / pragma).read_bytes() == before


def test_a_forked_child_cannot_use_it(tmp_path: Path) -> None:
    """It is told so; its end leaves the parent's archive as it was."""
    archive = filled(tmp_path / "archive.db", 10)

    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            lambda: archive.figures(0),
            lambda: archive.checkpoint(),
            lambda: archive.apply([], 99),
            lambda: archive.fill([], []),
        ):
            try:
                use()
            except ForkedProcess:
                refused += 1
        archive.close()
        os._exit(refused)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 4
    apply(archive, appended(head_of("a"), message(1)))
    assert archive.check() == []
    archive.close()


def test_what_is_deleted_is_gone_from_the_file(tmp_path: Path) -> None:
    """Not one byte of it is left after a checkpoint and a close, whether it was deleted whole or expired."""
    path = tmp_path / "archive.db"
    archive = filled(path, 30)
    apply(
        archive,
        appended(head_of("a", title="SECRET"), *(message(n, content="SECRET" * 900 * (n % 2)) for n in range(1, 40))),
        appended(head_of("b"), message(1, content="SECRET")),
    )
    archive.checkpoint()
    assert b"SECRET" in path.read_bytes()

    apply(archive, deleted("a"), changed("message.expire", head_of("b", 2), up_to=1, before=T0_MS + 1))
    archive.close()

    assert b"SECRET" not in path.read_bytes()


def test_a_day_without_anything_has_no_row(tmp_path: Path) -> None:
    """What is counted by day does not grow with the days that were."""
    archive = open_sqlite(tmp_path / "archive.db")
    apply(archive, *(appended(head_of(f"c{n}"), message(1, T0_MS + n * DAY_MS)) for n in range(40)))
    apply(archive, *(deleted(f"c{n}") for n in range(40)))
    archive.close()

    other = sqlite3.connect(tmp_path / "archive.db")
    assert other.execute("SELECT count(*) FROM days").fetchone() == (0,)
    other.close()


# The write-ahead log.


def test_the_log_stays_bounded(tmp_path: Path) -> None:
    """However much is applied between checkpoints; and what is there stays for a disk that gets full."""
    archive = open_sqlite(tmp_path / "archive.db")
    largest = 0
    for n in range(1, 60):
        apply(archive, appended(head_of("a", n), message(n, content="x" * 500_000)))
        largest = max(largest, (tmp_path / "archive.db-wal").stat().st_size)

    assert WAL_BYTES_MAX <= largest <= 1.5 * WAL_BYTES_MAX
    archive.checkpoint()
    apply(archive, appended(head_of("a", 60), message(60)))
    assert WAL_BYTES_MAX // 2 < (tmp_path / "archive.db-wal").stat().st_size <= WAL_BYTES_MAX
    archive.close()


def test_what_a_reader_holds_back_is_not_called_durable(tmp_path: Path, impatient: None) -> None:
    """A checkpoint beside a long read is not complete, says so, and is when it is tried again."""
    archive = open_sqlite(tmp_path / "archive.db")
    apply(archive, appended(head_of("a"), message(1)))
    archive.checkpoint()
    other = sqlite3.connect(tmp_path / "archive.db", isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM totals").fetchall()
    apply(archive, appended(head_of("a", 2), message(2)))

    with pytest.raises(ArchiveError, match="being read"):
        archive.checkpoint()

    assert (archive.archived_seq, archive.durable_seq) == (2, 1)
    other.execute("COMMIT")
    archive.checkpoint()
    assert archive.durable_seq == 2
    other.close()
    archive.close()


def test_a_locked_file_can_be_used_afterwards(tmp_path: Path, impatient: None) -> None:
    """While another program writes, applying fails and changes nothing; reading goes on."""
    archive = open_sqlite(tmp_path / "archive.db")
    other = sqlite3.connect(tmp_path / "archive.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(ArchiveError, match="another program"):
        apply(archive, appended(head_of("a"), message(1)))

    assert (archive.archived_seq, archive.conversations(ConversationQuery())) == (0, [])
    other.execute("ROLLBACK")
    apply(archive, appended(head_of("a"), message(1)))
    assert archive.archived_seq == 1
    other.close()
    archive.close()


@pytest.mark.parametrize("room", [0, 1_000, 20_000, 100_000, 300_000])
def test_a_file_that_may_not_grow_refuses_and_goes_on(tmp_path: Path, room: int) -> None:
    """Wherever the limit is met: the transaction leaves nothing behind, and the next one with room succeeds."""
    archive = open_sqlite(tmp_path / "archive.db")
    apply(archive, appended(head_of("a"), message(1)))
    limit = (tmp_path / "archive.db-wal").stat().st_size + room
    large = [message(n, content="x" * 50_000) for n in range(2, 12)]

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ArchiveError):
            apply(archive, appended(head_of("a", 2), *large))
        assert archive.archived_seq == 1
        assert numbers(archive, "a") == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    apply(archive, appended(head_of("a", 2), *large))
    assert numbers(archive, "a") == list(range(1, 12))
    assert archive.check() == []
    archive.close()


@needs_root
@pytest.mark.root
def test_a_full_disk_refuses_and_goes_on(tmp_path: Path) -> None:
    """ArchiveError while there is no room, whatever is asked of it; all that was applied is there, and it goes on with room."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        archive = open_sqlite(disk / "archive.db")
        applied, refusals = 0, 0
        while refusals < 5:
            try:
                apply(archive, appended(head_of("a", applied + 1), message(applied + 1, content="x" * 9_000)))
                applied += 1
            except ArchiveError as error:
                assert "no room" in str(error)
                refusals += 1
        try:
            archive.checkpoint()
        except ArchiveError:
            refusals += 1
        assert archive.archived_seq == applied == len(numbers(archive, "a", limit=1_000))

        mount("-o", "remount,size=8m", str(disk))
        apply(archive, appended(head_of("a", applied + 1), message(applied + 1)))
        archive.checkpoint()

        assert archive.durable_seq == applied + 1
        assert archive.check() == []
        archive.close()
        assert [path.name for path in disk.iterdir()] == ["archive.db"]


@needs_root
@pytest.mark.root
def test_what_came_before_the_disk_was_full_is_archived(tmp_path: Path) -> None:
    """Room for it is set aside, from the first on and behind a checkpoint: readers wait for nothing that was acknowledged."""
    with mounted(tmp_path / "disk", "size=32m") as disk:
        archive = open_sqlite(disk / "archive.db")
        for number in (1, 2):
            (disk / "ballast").unlink(missing_ok=True)
            if number == 2:
                archive.checkpoint()
            with pytest.raises(OSError, match="No space left"), (disk / "ballast").open("wb") as ballast:
                while True:
                    ballast.write(b"x" * 4096)
                    ballast.flush()

            apply(archive, appended(head_of("a", number), message(number, content="x" * 1_000_000)))

            assert numbers(archive, "a") == list(range(1, number + 1))
        (disk / "ballast").unlink()
        archive.checkpoint()
        assert archive.check() == []
        archive.close()


# Crashes.

WRITER = """
import sys
from pathlib import Path
from tests.test_archive_sqlite import open_sqlite, scripted
archive = open_sqlite(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    seq, count = archive.archived_seq, 1 + archive.archived_seq % 7
    archive.apply([(seq + n, scripted(seq + n)) for n in range(1, count + 1)], seq + count)
    if seq % 5 == 0:
        archive.checkpoint()
"""


def scripted(seq: int) -> Event:
    """The event *seq* of a life in which every tenth goes to another conversation."""
    place, number = seq // 10, seq % 10
    head = head_of(f"c{place}", number + 1, user_id=f"u{place % 3}", updated_at=format_ms(T0_MS + seq))
    return appended(head, message(number + 1, T0_MS + seq, content=f"event {seq} {'x' * (seq % 900)}"))


def test_what_cannot_be_applied_leaves_the_seq_where_it_was(tmp_path: Path) -> None:
    """Rows and watermark go together: nothing of a batch is there, nor said to be, when one event of it fails."""
    path = tmp_path / "archive.db"
    archive = open_sqlite(path)
    archive.apply([(1, scripted(1))], 1)
    wrong = appended(head_of("c0", 7), message(7, T0_MS, tokens_used=2**70))
    with pytest.raises(ArchiveError):
        archive.apply([(2, scripted(2)), (3, wrong)], 3)
    archive.close()

    archive = open_sqlite(path)
    assert archive.archived_seq == 1
    _assert_holds(archive, 1)
    archive.close()


@pytest.mark.crash
@pytest.mark.timeout(1200 if FULL else 120)
def test_killed_while_it_applies(tmp_path: Path) -> None:
    """kill -9 at any moment: it opens, holds exactly what its seq says, and nothing is doubled when events come again."""
    path = tmp_path / "archive.db"
    rnd = random.Random(1)
    for _ in range(60 if FULL else 5):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], env=clean_environ(), cwd=ROOT, stdout=subprocess.PIPE
        )
        try:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(rnd.random() * 0.3)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()

        archive = open_sqlite(path)
        seq = archive.archived_seq
        assert archive.durable_seq == seq
        assert archive.check() == []
        _assert_holds(archive, seq)
        again = max(1, seq - 15)
        archive.apply([(n, scripted(n)) for n in range(again, seq + 3)], seq + 2)
        _assert_holds(archive, seq + 2)
        assert archive.check() == []
        archive.close()
    assert seq > 50


def _assert_holds(archive: SQLiteArchive, seq: int) -> None:
    assert archive.archived_seq == seq
    expected: dict[str, int] = {}
    for n in range(1, seq + 1):
        expected[f"c{n // 10}"] = expected.get(f"c{n // 10}", 0) + 1
    assert archive.message_counts() == expected
    last = archive.messages(f"c{seq // 10}", MessageQuery())[-1:]
    assert last == (scripted(seq).messages if seq else [])


def test_without_its_log_it_is_what_the_last_checkpoint_left(tmp_path: Path) -> None:
    """The -wal deleted: an older seq, not older than what was called durable, and rows that agree with it."""
    archive = open_sqlite(tmp_path / "archive.db")
    for seq in range(1, 60):
        archive.apply([(seq, scripted(seq))], seq)
        if seq == 31:
            archive.checkpoint()
    durable = archive.durable_seq
    (tmp_path / "cut.db").write_bytes((tmp_path / "archive.db").read_bytes())
    archive.close()

    cut = open_sqlite(tmp_path / "cut.db")

    assert durable == 31 <= cut.archived_seq
    _assert_holds(cut, cut.archived_seq)
    assert cut.check() == []
    cut.apply([(seq, scripted(seq)) for seq in range(cut.archived_seq - 3, 60)], 59)
    _assert_holds(cut, 59)
    cut.close()


FAILING = """
import sys
from pathlib import Path
from tests.test_archive_sqlite import ArchiveError, open_sqlite, scripted
archive = open_sqlite(Path(sys.argv[1]))
steps = []
for seq in (1, 2, 3):
    steps += [lambda seq=seq: archive.apply([(seq, scripted(seq))], seq), archive.checkpoint]
told = []
for step in steps:
    try:
        step()
        told.append(f"{archive.archived_seq} {archive.durable_seq}")
    except ArchiveError as error:
        told.append(str(error))
archive.close()
print("told", *told, f"{archive.archived_seq} {archive.durable_seq}", sep="|")
"""


@needs_strace
@pytest.mark.timeout(600 if FULL else 120)
def test_after_a_failed_sync_nothing_more_is_believed(tmp_path: Path) -> None:
    """Whichever sync fails, it is not tried again: from then on nothing is applied and nothing becomes durable; the log is
    kept for the next start, which brings it to the disk anew."""
    path = tmp_path / "archive.db"
    undisturbed = [line for line in _traced(path) if "fdatasync(" in line]
    assert len(undisturbed) > 12
    # Those of directories SQLite does not heed, and those of the last checkpoint are behind all that can be told.
    counts = [n for n, line in enumerate(undisturbed[:-2], 1) if "archive.db" in line]
    for when in counts if FULL else (counts[2], counts[-4], counts[-1]):
        for one in tmp_path.iterdir():
            one.unlink()

        lines = _traced(path, "-e", f"inject=fdatasync:error=EIO:when={when}")

        told = next((line.split("|")[1:] for line in lines if line.startswith("told|")), None)
        if told is None:
            assert "ArchiveBroken" in lines[-1], when
            durable = 0
        else:
            *steps, end = told
            failed = [n for n, step in enumerate(steps) if not step[0].isdigit()]
            assert failed == list(range(failed[0], len(steps))), when
            assert all("refused to sync" in step for step in steps[failed[0] + 1 :]), when
            durable = int(end.split()[1])
            assert durable == max([0, *(int(step.split()[1]) for step in steps if step[0].isdigit())]), when
            assert path.with_name("archive.db-wal").stat().st_size > 0, when
        archive = open_sqlite(path)
        assert archive.archived_seq >= durable, when
        assert archive.durable_seq == archive.archived_seq, when
        assert archive.check() == [], when
        archive.close()


def _traced(path: Path, *options: str) -> list[str]:
    """What FAILING prints on *path*, and what strace says of its syncs."""
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-e", "trace=fdatasync,fsync", *options, sys.executable, "-c", FAILING, path],
        env=clean_environ(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


# Damage.

CONVERSATIONS, MESSAGES = 300, 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed archive of many pages; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "archive.db"
    filled(path, CONVERSATIONS, MESSAGES).close()
    return path


@pytest.fixture(scope="module")
def everything(whole: Path) -> dict[str, list[StoredMessage]]:
    """What is in it."""
    return saved(whole)


def saved(path: Path) -> dict[str, list[StoredMessage]]:
    found: dict[str, list[StoredMessage]] = {}
    for id, messages in salvage(path):
        found.setdefault(id, []).extend(messages)
    return found


def read_all(path: Path) -> list[str]:
    """Open *path* and use it in every way; what is found wrong with it, empty when nothing."""
    try:
        archive = open_sqlite(path)
    except ArchiveDamaged as error:
        return [str(error)]
    try:
        wrong = archive.check()
        use_every_way(archive)
        archive.message_counts()
        archive.describe()
        return wrong
    except ArchiveDamaged as error:
        return [*wrong, str(error)]
    finally:
        archive.close()


def test_everything_is_saved_of_a_whole_file(whole: Path) -> None:
    """In order, in parts of bounded size, and nothing is written or left beside it."""
    before, beside = whole.read_bytes(), set(whole.parent.iterdir())

    found = saved(whole)

    assert list(found) == [f"c{n:06}" for n in range(CONVERSATIONS)]
    for n, messages in enumerate(found.values()):
        assert messages == [message(k, T0_MS + n, external_id=f"{n}.{k}") for k in range(1, MESSAGES + 1)]
    assert (whole.read_bytes(), set(whole.parent.iterdir())) == (before, beside)


def test_what_only_the_log_has_is_saved_too(tmp_path: Path) -> None:
    """A file that was never checkpointed, as a kill leaves it."""
    archive = open_sqlite(tmp_path / "archive.db")
    apply(archive, appended(head_of("a"), *(message(n) for n in range(1, 1_201))))
    for side in ("", "-wal"):
        (tmp_path / f"killed.db{side}").write_bytes((tmp_path / f"archive.db{side}").read_bytes())
    archive.close()

    parts = list(salvage(tmp_path / "killed.db"))

    assert [len(messages) for _, messages in parts] == [500, 500, 200]


@pytest.mark.parametrize("raw", [b"\0" * 100_000, b"garbage " * 9_000, b"x", b"SQLite format 3\0", b"\xff" * 4096])
def test_garbage_is_damage(tmp_path: Path, raw: bytes) -> None:
    """Told as such, left as it was, and nothing is saved of it."""
    path = tmp_path / "archive.db"
    path.write_bytes(raw)

    with pytest.raises(ArchiveDamaged):
        open_sqlite(path)

    assert path.read_bytes() == raw
    assert saved(path) == {}


def test_a_cut_file_is_damaged_and_gives_what_it_has(
    tmp_path: Path, whole: Path, everything: dict[str, list[StoredMessage]]
) -> None:
    """Wherever it ends: opening tells, and salvage gives nothing wrong, and more the more is left."""
    raw = whole.read_bytes()
    path = tmp_path / "archive.db"
    counts = []
    for cut in itertools.chain(
        range(PAGE_BYTES, len(raw), 4 * PAGE_BYTES), range(PAGE_BYTES // 2, len(raw), len(raw) // 40)
    ):
        path.write_bytes(raw[:cut])
        with pytest.raises(ArchiveDamaged):
            open_sqlite(path)

        found = saved(path)

        assert path.read_bytes() == raw[:cut]
        wrong = [one for id, messages in found.items() for one in messages if one not in everything[id]]
        # Of the message through which the cut goes, SQLite reads the rest as zeros.
        assert len(wrong) <= (cut % PAGE_BYTES > 0), cut
        counts.append((cut, sum(map(len, found.values()))))
    assert counts[-1][1] > 0.9 * CONVERSATIONS * MESSAGES
    assert [count for _, count in sorted(counts)] == sorted(count for _, count in counts)


@pytest.mark.timeout(1200 if FULL else 120)
@pytest.mark.parametrize("damage", ["zeros", "noise"])
def test_a_damaged_page_costs_what_is_on_it(
    tmp_path: Path, whole: Path, everything: dict[str, list[StoredMessage]], damage: str
) -> None:
    """Page by page: it is noticed, never as anything but damage; all messages on other pages are saved, none is invented."""
    raw = whole.read_bytes()
    pages = len(raw) // PAGE_BYTES
    leads = _pages_that_lead(whole)
    on_a_page = PAGE_BYTES // 25
    unnoticed = []
    for page in range(1, pages, 1 if FULL else 3):
        path = tmp_path / "archive.db"
        filling = b"\0" * PAGE_BYTES if damage == "zeros" else random.Random(page).randbytes(PAGE_BYTES)
        path.write_bytes(raw[: page * PAGE_BYTES] + filling + raw[(page + 1) * PAGE_BYTES :])
        found = saved(path)

        assert all(one in everything[id] for id, messages in found.items() for one in messages), page
        count = sum(map(len, found.values()))
        assert count == sum(len({one.number for one in messages}) for messages in found.values()), page
        if b'"handler"' in raw[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]:
            # A page of conversations: the index still knows whose messages these are.
            assert count == CONVERSATIONS * MESSAGES, page
        elif page + 1 not in leads:
            assert count >= CONVERSATIONS * MESSAGES - on_a_page, page
        if not read_all(path):
            unnoticed.append(page)
    assert unnoticed == []


def _pages_that_lead(path: Path) -> set[int]:
    """Numbers of pages that hold no rows but lead to those that do, and of the pages of the schema."""
    raw = path.read_bytes()
    schema = {n + 1 for n in range(len(raw) // PAGE_BYTES) if b"CREATE " in raw[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]}
    return {1} | schema | {n + 1 for n in range(len(raw) // PAGE_BYTES) if raw[n * PAGE_BYTES] in (2, 5)}


def test_a_bad_place_in_a_long_conversation_costs_what_is_on_it(tmp_path: Path) -> None:
    """The messages before and behind the damaged page are saved, to the last one."""
    path = tmp_path / "archive.db"
    archive = open_sqlite(path)
    apply(archive, appended(head_of("a"), *(message(n, content=f"<{n}>" + "x" * 60) for n in range(1, 3_001))))
    archive.close()
    raw = path.read_bytes()
    page = raw.index(b"<1500>") // PAGE_BYTES
    lost = raw[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].count(b"<")
    path.write_bytes(raw[: page * PAGE_BYTES] + b"\0" * PAGE_BYTES + raw[(page + 1) * PAGE_BYTES :])

    found = saved(path)["a"]

    assert len(found) == 3_000 - lost


def test_scattered_damage_costs_what_it_hits(
    tmp_path: Path, whole: Path, everything: dict[str, list[StoredMessage]]
) -> None:
    """Several bad places in one file: whatever lies between them is saved."""
    raw = whole.read_bytes()
    leads = _pages_that_lead(whole)
    leaves = [n for n in range(len(raw) // PAGE_BYTES) if raw[n * PAGE_BYTES] == 13 and n + 1 not in leads]
    bad = leaves[5::9]
    for page in bad:
        raw = raw[: page * PAGE_BYTES] + b"\xff" * PAGE_BYTES + raw[(page + 1) * PAGE_BYTES :]
    path = tmp_path / "archive.db"
    path.write_bytes(raw)

    found = saved(path)

    assert len(bad) > 5
    assert all(one in everything[id] for id, messages in found.items() for one in messages)
    assert sum(map(len, found.values())) > 0.75 * CONVERSATIONS * MESSAGES


def test_flipped_bits_raise_nothing_odd(tmp_path: Path, whole: Path) -> None:
    """Anywhere in the file: either it is noticed as damage, or it is a text that reads otherwise."""
    raw = whole.read_bytes()
    rnd = random.Random(9)
    path = tmp_path / "archive.db"
    for _ in range(400 if FULL else 25):
        broken = bytearray(raw)
        for _ in range(rnd.choice([1, 1, 8, 200])):
            broken[rnd.randrange(len(raw))] ^= 1 << rnd.randrange(8)
        path.write_bytes(bytes(broken))

        saved(path)
        try:
            read_all(path)
        except (DataRefused, ArchiveError):
            pass  # a bit of the version, or of what says how the file is locked


def test_lost_totals_are_noticed(tmp_path: Path) -> None:
    """A file that is sound to SQLite but counts wrongly, or does not say how far it is."""
    path = tmp_path / "archive.db"
    for change, complaint in (
        ("UPDATE totals SET messages = messages + 1", "totals of messages"),
        ("UPDATE days SET conversations = conversations + 1", "conversations by day"),
        ("DELETE FROM conversations WHERE id = 'c000003'", "messages without a conversation"),
        ("UPDATE conversations SET oldest_ms = 1 WHERE id = 'c000003'", "oldest"),
    ):
        path.unlink(missing_ok=True)
        filled(path, 10).close()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute(change)
        other.close()

        archive = open_sqlite(path)
        assert any(complaint in one for one in archive.check()), change
        archive.close()

    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DELETE FROM totals")
    other.close()
    with pytest.raises(ArchiveDamaged, match="how far"):
        open_sqlite(path)
