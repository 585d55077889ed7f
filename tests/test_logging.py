"""The log: what leaves it, and what cannot break it."""

from __future__ import annotations

import ast
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidRecord
from holdfast.service.events import EVENTS, events_table
from holdfast.service.logging import LINE_BYTES_MAX, LINES_MAX, Log
from holdfast.service.redaction import redacted
from holdfast.settings import LogSettings

ROOT = Path(__file__).resolve().parent.parent
JSON = LogSettings(format="json")
PIPE_BYTES = 4096
NOWHERE = os.open(os.devnull, os.O_WRONLY)
SILENT = Log(JSON, fd=NOWHERE)
"""For what is rendered and not written."""


class Poison:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("573001234567")


class Pipe:
    """A pipe with few bytes of room, and everything that was read from it."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self.read_end, False)
        self.content = b""

    def read(self) -> None:
        try:
            while chunk := os.read(self.read_end, 1 << 20):
                self.content += chunk
        except BlockingIOError:
            return

    def lines(self) -> list[dict[str, object]]:
        self.read()
        return [json.loads(line) for line in self.content.splitlines()]

    def lines_after(self, log: Log, deadline_s: float = 10.0) -> list[dict[str, object]]:
        """Read until *log* has written everything."""
        ends_at = time.monotonic() + deadline_s
        while not log.drain(0.01):
            assert time.monotonic() < ends_at
            self.read()
        return self.lines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    # A writer thread that still waits for room ends its write here.
    os.close(pipe.read_end)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Leave the process-wide loggers as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def one_line(log: Log, level: str = "info", **event: object) -> dict[str, object]:
    line = json.loads(log.render(level, event))
    assert isinstance(line, dict)
    return line


def test_an_event_is_one_json_line(pipe: Pipe) -> None:
    """An event on a pipe is one JSON object with time, level, name and its fields."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()

    structlog.get_logger().info("sessions.expired", count=3)

    (line,) = pipe.lines_after(log)
    assert list(line) == ["timestamp", "level", "event", "count"]
    assert [line["level"], line["event"], line["count"]] == ["info", "sessions.expired", 3]
    assert str(line["timestamp"]).endswith("Z")


def test_what_is_not_allowed_is_redacted() -> None:
    """Only the fields of the catalogue leave whole; of a phone elsewhere 3 digits remain."""

    line = one_line(
        SILENT, event="sessions.expired", count=2, phone="+57 300 123-4567", name="María", number=573001234567
    )

    assert {"count": 2, "phone": "***567", "name": "***", "number": "***567"}.items() <= line.items()


def test_an_event_outside_the_catalogue_shows_nothing() -> None:
    """An unknown event keeps its name and loses its values."""

    line = one_line(SILENT, event="some.thing_happened", count=2, text={"a": "María"})

    assert (line["count"], line["text"]) == ("***", "***")


def test_free_text_loses_phones_and_tokens() -> None:
    """A phone or token inside an allowed text is masked; a seq, a size and a segment's name are not."""
    text = "573001234567 and +57 300 123 4567, hf_0123456789abcdef, seq 1234567890, 123456789 bytes, 00000000000000000001.jsonl"

    shown = redacted("reason", text, ("reason",))

    assert shown == "***567 and ***567, hf_***, seq 1234567890, 123456789 bytes, 00000000000000000001.jsonl"


def test_spans_of_time_are_no_phones() -> None:
    """A number with a unit stays as it is; a phone with a dot in it, before it or behind it does not."""
    spans = "1.234567499s, 30.00000012 seconds, 2.123456789ms, 123456789ns, 1234567.5s"
    phones = "57.3001234567, 573001234567s, 573001234567.5, 573001234567 s, 3.573001234567.json"

    assert redacted("reason", spans, ("reason",)) == spans
    assert redacted("reason", phones, ("reason",)) == "57.***567, ***567s, ***567.5, ***567 s, 3.***567.json"


def test_redaction_can_be_switched_off_and_on() -> None:
    """With log.redact = false everything passes, until it is changed back."""
    log = Log(LogSettings(format="json", redact=False), fd=NOWHERE)

    shown = one_line(log, event="sessions.expired", phone="573001234567")["phone"]
    log.change(JSON)
    hidden = one_line(log, event="sessions.expired", phone="573001234567")["phone"]

    assert (shown, hidden) == ("573001234567", "***567")


def test_an_exception_is_told_without_its_text() -> None:
    """A traceback says where; what the exception says is kept back unless the text is ours."""
    texts = []
    for error in (ValueError("María 573001234567"), InvalidRecord("expected an object, found 573001234567")):
        try:
            raise error
        except Exception as raised:
            texts.append(str(one_line(SILENT, event="interval.failed", exc_info=raised)["exception"]))

    assert texts[0].startswith("ValueError: ***\n") and "test_logging.py" in texts[0]
    assert texts[1].startswith("InvalidRecord: expected an object, found ***567\n")


@pytest.mark.parametrize(
    "value",
    [
        "\ud800 lone",
        float("nan"),
        float("-inf"),
        1 << 70,
        10**5000,
        Poison(),
        [Poison()] * 3,
        {Poison(): Poison()},
        {"\ud800": b"\xff"},
        b"\xff\x00",
        ValueError("x"),
        {1, 2},
        object,
        "\x1b[2J\x00",
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("redact", [True, False])
def test_poisoned_values_are_logged(value: object, form: str, redact: bool) -> None:
    """Whatever a field holds, the line is there, is UTF-8, and cannot steer a terminal."""
    log = Log(LogSettings(format=form, redact=redact), fd=NOWHERE)

    line = log.render("info", {"event": "config.rejected", "reason": value, "other": value})

    assert b"config.rejected" in line and b"log.line_failed" not in line
    assert b"\x1b[2J" not in line
    line.decode()


def test_a_list_that_holds_itself_is_logged() -> None:
    """A value without end is cut at a depth."""
    endless: list[object] = []
    endless.append(endless)

    line = one_line(SILENT, event="config.reloaded", changed=endless)

    assert "changed" in line


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)
"""Any value, lone surrogates included."""


@given(TREES)
def test_any_tree_of_values_is_one_json_line(value: object) -> None:
    """No value breaks the line: it parses, and has one newline, at its end."""
    line = SILENT.render("info", {"event": "config.reloaded", "changed": value, "other": value})

    assert b"config.reloaded" in line and line.count(b"\n") == 1 and json.loads(line)


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "fields", [{"reason": "é" * 200_000}, {f"field_{number}": "é" * 900 for number in range(200)}], ids=["one", "many"]
)
def test_a_long_line_is_shortened(form: str, fields: dict[str, object]) -> None:
    """No line is longer than journald keeps in one piece, and it says that it was shortened."""
    log = Log(LogSettings(format=form, redact=False), fd=NOWHERE)

    line = log.render("info", {"event": "config.rejected", **fields})

    assert len(line) <= LINE_BYTES_MAX and b"shortened" in line and b"config.rejected" in line


def test_a_stalled_reader_blocks_nobody(pipe: Pipe) -> None:
    """While nobody reads stdout, logging goes on at once; later the number of missing lines is told."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()
    logger = structlog.get_logger()
    count = LINES_MAX + 5_000

    slowest_s = 0.0
    for number in range(count):
        before = time.monotonic()
        logger.info("sessions.expired", count=number)
        slowest_s = max(slowest_s, time.monotonic() - before)
    lines = pipe.lines_after(log)

    dropped = sum(int(str(line["count"])) for line in lines if line["event"] == "log.lines_dropped")
    kept = sum(line["event"] == "sessions.expired" for line in lines)
    print(f"slowest call {slowest_s * 1000:.1f} ms, {kept} lines kept, {dropped} dropped and told")
    assert count == kept + dropped and dropped > 0
    assert slowest_s < 1


def test_a_closed_reader_breaks_nothing(pipe: Pipe) -> None:
    """When the reader of stdout is gone, logging and the last drain go on."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()
    os.close(pipe.read_end)

    structlog.get_logger().info("sessions.expired", count=1)

    assert log.drain(5)
    pipe.read_end = os.open(os.devnull, os.O_RDONLY)


def test_a_non_blocking_stdout_loses_nothing(pipe: Pipe) -> None:
    """A descriptor that somebody made non-blocking is waited for, not given up."""
    os.set_blocking(pipe.write_end, False)
    log = Log(JSON, fd=pipe.write_end)
    log.install()

    for number in range(500):
        structlog.get_logger().info("sessions.expired", count=number)
    lines = pipe.lines_after(log)

    assert list(range(500)) == [line["count"] for line in lines]


def test_nothing_follows_the_last_line(pipe: Pipe) -> None:
    """After a closing drain nothing more is written."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()

    structlog.get_logger().error("daemon.failed", reason="the last", exit_code=1)
    log.drain(5, close=True)
    structlog.get_logger().info("sessions.expired", count=1)
    log.drain(5)

    assert [line["event"] for line in pipe.lines()] == ["daemon.failed"]


def test_journald_is_told_the_level(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stdout leads to journald, each line begins with its priority, also one that cannot be rendered; elsewhere none does."""
    status = os.fstat(pipe.write_end)
    levels = ("debug", "info", "warning", "error", "critical")

    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    prefixes = [Log(JSON, fd=pipe.write_end).render(level, {"event": "x"})[:4] for level in levels]
    broken = Log(JSON, fd=pipe.write_end).render("error", {"event": "x", "exc_info": Poison()})
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    elsewhere = Log(JSON, fd=pipe.write_end).render("info", {"event": "x"})

    assert prefixes == [b"<7>{", b"<6>{", b"<4>{", b"<3>{", b"<2>{"]
    assert broken.startswith(b"<3>{")
    assert elsewhere.startswith(b"{")


def test_the_level_can_change(pipe: Pipe) -> None:
    """A new level counts from the next line on, for loggers that exist already as well."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()
    logger = structlog.get_logger().bind()

    logger.debug("service.started", service="a")
    log.change(LogSettings(format="json", level="debug"))
    logger.debug("service.started", service="b")
    log.change(LogSettings(format="json", level="error"))
    logger.warning("service.started", service="c")

    assert [line["service"] for line in pipe.lines_after(log)] == ["b"]


def test_libraries_log_through_us(pipe: Pipe) -> None:
    """A library's line is an event; the arguments of its text, which may quote a request, stay out."""
    log = Log(JSON, fd=pipe.write_end)
    log.install()

    logging.getLogger("aiohttp.server").warning("bad request from %s", "573001234567")
    logging.getLogger("asyncio").error("a task failed\nfuture: María", exc_info=ValueError("María"))
    first, second = pipe.lines_after(log)

    assert (
        first["event"],
        first["logger"],
        first["message"],
    ) == ("library.logged", "aiohttp.server", "bad request from %s")
    assert second["message"] == "a task failed" and second["exception"] == "ValueError: ***"


# The catalogue.


def logged_calls() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Place, event name and fields of every logging call in the code."""
    for path in sorted((ROOT / "daemon" / "holdfast").rglob("*.py")):
        if path.name == "file_storage.py":
            continue  # it has no engine: it speaks as a library does, in messages to the standard logger
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            receiver = ast.unparse(node.func.value)
            if node.func.attr not in ("debug", "info", "warning", "error", "exception", "critical"):
                continue
            if receiver.rstrip("()").rsplit(".", 1)[-1].lstrip("_") not in ("log", "logger", "get_logger"):
                continue
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            names = [ast.literal_eval(one) for one in _constants(node.args[0])]
            assert names, f"{place}: expected the name of the event as a literal"
            for name in names:
                yield place, name, frozenset(keyword.arg or "**" for keyword in node.keywords)


def _constants(node: ast.expr) -> list[ast.Constant]:
    if isinstance(node, ast.IfExp):
        return _constants(node.body) + _constants(node.orelse)
    return [node] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_every_logged_event_is_in_the_catalogue() -> None:
    """Every event that the code logs is listed, with each of its fields."""
    for place, name, fields in logged_calls():
        assert name in EVENTS, f"{place}: {name} is not in EVENTS"
        unknown = fields - set(EVENTS[name].fields) - {"exc_info", "**"}
        assert not unknown, f"{place}: {name} has fields that EVENTS does not allow: {sorted(unknown)}"


def test_every_event_of_the_catalogue_is_logged() -> None:
    """The catalogue lists nothing that the code never says."""
    logged = {name for _, name, _ in logged_calls()} | {
        "log.lines_dropped",
        "log.line_failed",
        "library.logged",
        "thread.failed",
    }

    assert set(EVENTS) == logged


CONTRACT_EVENTS = {
    "daemon.started": "version pid data_dir",
    "state.loaded": "sessions orders dropped_stale skipped_invalid merged replayed duration_ms",
    "daemon.ready": "listen duration_ms",
    "flush.completed": "reason duration_ms bytes files snapshot_seq",
    "flush.failed": "",
    "journal.tail_dropped": "bytes",
    "snapshot.damaged": "file recovered_from",
    "config.reloaded": "",
    "config.rejected": "reason",
    "sessions.expired": "count",
    "shutdown.started": "signal",
    "service.stopped": "service duration_ms",
    "service.stop_failed": "",
    "service.stop_timed_out": "",
    "shutdown.completed": "duration_ms clean",
    "status.report": "",
}


@pytest.mark.parametrize("name", sorted(CONTRACT_EVENTS))
def test_the_promised_events_exist(name: str) -> None:
    """Section 5 of the contract: these events exist with at least these fields."""
    assert set(CONTRACT_EVENTS[name].split()) <= set(EVENTS[name].fields)


def test_the_readme_lists_the_events() -> None:
    """The table in the README is the catalogue."""
    readme = (ROOT / "README.md").read_text()

    table = readme.partition("<!-- events -->")[2].partition("<!-- /events -->")[0].strip()

    assert events_table() == table
