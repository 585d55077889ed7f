"""The commands for conversations: read on a terminal, put away, kept, let go."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import orjson
import pytest

from holdfast.cli import cleanup as cleanup_command
from holdfast.cli.connection import Daemon
from holdfast.cli.show import cells_of
from holdfast.cli.transcript import Message, Transcript, wrapped
from holdfast.client.address import address_of
from tests.cli_harness import Terminal, assert_told_in_one_line, daemon_in, forked, shown_on_a_terminal
from tests.cli_harness import holdfast as process

BOGOTA = {"TZ": "America/Bogota"}
"""Five hours behind UTC, all year."""

WORDS = "Hola, ¿cuánto cuesta el combo? 日本語のテキスト 👩\u200d🚀 e\u0301cole"


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a daemon on its ``data``; each test has conversations of its own."""
    directory = tmp_path_factory.mktemp("conversations")
    with daemon_in(directory):
        yield directory


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    """A directory with a daemon that nobody else uses."""
    with daemon_in(tmp_path):
        yield tmp_path


def ask(cwd: Path, method: str, path: str, value: Any = None) -> bytes:
    """Ask the daemon of *cwd* beside the command line."""
    daemon = Daemon(address_of(f"unix:{cwd / 'data' / 'holdfast.sock'}"), None, None)
    return daemon.fetch(method, path, body=None if value is None else orjson.dumps(value)).body


def say(cwd: Path, id: str, *messages: dict[str, Any], **whose: str) -> None:
    """Append *messages* to a conversation."""
    ask(cwd, "POST", f"/v1/conversations/{quote(id, safe='')}/messages", {"messages": messages, **whose})


def message(content: str, at: str = "2024-11-20T12:00:00Z", role: str = "user", **more: Any) -> dict[str, Any]:
    """A message as it is appended."""
    return {"role": role, "content": content, "created_at": at, **more}


def ago(days: float) -> str:
    """A moment so many days before now."""
    return (datetime.now(UTC) - timedelta(days=days)).isoformat()


def head_of(cwd: Path, id: str) -> dict[str, Any]:
    """A conversation without its messages."""
    found: dict[str, Any] = orjson.loads(ask(cwd, "GET", f"/v1/conversations/{id}?messages=false"))
    return found


def listed(cwd: Path, *how: str, group: str = "conversations") -> list[str]:
    """The ids that a list shows."""
    done = forked(group, "list", "--json", *how, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [item["id"] for item in json.loads(done.stdout)]


def written(*messages: dict[str, Any], columns: int | None = 80) -> list[str]:
    """The lines of a transcript."""
    transcript = Transcript(columns)
    told = [msgspec.convert({"number": number, **one}, Message) for number, one in enumerate(messages, 1)]
    return [line for one in told for line in transcript.lines(one)]


# How a transcript is written.


@pytest.mark.parametrize("cells", [20, 21, 40, 79])
def test_text_is_wrapped_between_words(cells: int):
    """No line is wider than the terminal, as it counts columns, and every word is there."""
    text = f"{WORDS} " * 9

    lines = wrapped(text, cells)

    assert max(map(cells_of, lines)) <= cells
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(line == line.strip(" ") for line in lines)
    latin = " ".join(wrapped("Hola cuánto cuesta el combo " * 9, cells))
    assert set(latin.split()) == {"Hola", "cuánto", "cuesta", "el", "combo"}


def test_a_word_that_fits_no_line_is_broken():
    """A long address fills lines of its own."""
    assert wrapped("see " + "x" * 45, 20) == ["see", "x" * 20, "x" * 20, "x" * 5]


def test_wide_characters_and_clusters_stay_whole():
    """A character of two columns is not cut at the edge, an emoji of several code points not torn apart."""
    assert wrapped("日本語日本語", 5) == ["日本", "語日", "本語"]
    assert wrapped("a" * 19 + "👩\u200d🚀", 20) == ["a" * 19, "👩\u200d🚀"]
    assert wrapped("x" * 19 + "e\u0301e\u0301", 20) == ["x" * 19 + "e\u0301", "e\u0301"]


def test_lines_of_the_text_are_kept():
    """Empty lines and indented lists look as they were written."""
    assert wrapped("one\r\n\n  - two\n\tthree", 40) == ["one", "", "  - two", "    three"]


@pytest.mark.parametrize("columns", [80, None])
@pytest.mark.parametrize("hostile", ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\u202e", "\r", "\x00", "\u2028"])
def test_control_characters_do_not_reach_the_terminal(hostile: str, columns: int | None):
    """Wherever strangers may write, what they send is shown escaped."""
    lines = written(
        message(f"a{hostile}b"),
        message(f"a{hostile}b", role="tool", metadata={"name": f"t{hostile}"}),
        message("", metadata={"tool_calls": [{"name": f"c{hostile}", "input": {"x": f"{hostile}"}}]}),
        message("", metadata={"attachments": [f"f{hostile}", {"name": f"g{hostile}", "type": hostile}]}),
        message("x", author=f"w{hostile}"),
        columns=columns,
    )

    text = "\n".join(lines)
    assert hostile not in text
    assert text.count(f"\\u{ord(hostile[0]):04x}") >= 6


def test_speakers_days_tools_and_attachments_are_named():
    """Each message has its time and speaker, a result the name of the tool, a day its heading."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_price", "arguments": '{"sku": "m-1"}'}}
    photo = {"filename": "photo.jpg", "mime_type": "image/jpeg", "size": 123_456, "ref": "media/1"}
    lines = written(
        message("Be kind.", role="system"),
        message("Hola", metadata={"attachments": [photo, "https://example.com/a"]}),
        message("", role="assistant", metadata={"tool_calls": [call]}),
        message("84900", role="tool", metadata={"tool_call_id": "c1"}),
        message("84.900", at="2024-11-25T12:00:00Z", role="assistant", author="agent"),
        columns=None,
    )

    time = f"{datetime.fromisoformat('2024-11-20T12:00:00Z').astimezone():%H:%M}"
    assert lines[1].strip("─- ").endswith("20 November 2024")
    assert lines[2:7] == [
        f"{time}  system    Be kind.",
        f"{time}  customer  Hola",
        "                 attached photo.jpg (image/jpeg, 121 KiB) media/1",
        "                 attached https://example.com/a",
        f'{time}  bot       calls get_price({{"sku": "m-1"}})',
    ]
    assert lines[7] == f"{time}  tool      get_price: 84900"
    assert "25 November 2024" in lines[9]
    assert lines[10].endswith("  agent     84.900")


@pytest.mark.parametrize(
    "metadata",
    [
        {"tool_calls": 3},
        {"tool_calls": [None, [], "x", {"function": None}, {"function": {"name": 7, "arguments": {"a": [1]}}}]},
        {"tool_calls": {"name": {}}},
        {"attachments": [None, 1, {}, {"name": 3, "size": "big"}, {"size": -1, "url": [1]}, [["x"]]]},
        {"name": [1], "tool_call_id": {"a": 1}},
    ],
)
@pytest.mark.parametrize("role", ["assistant", "tool", "odd"])
def test_odd_metadata_is_shown_somehow(metadata: dict[str, Any], role: str):
    """Bots write there what they like; a transcript is readable all the same."""
    assert "said" in "\n".join(written(message("said", role=role, metadata=metadata)))


# show


def test_a_conversation_reads_well_on_a_terminal(cwd: Path):
    """Heading, days in local time and colours; nothing is wider than the terminal, no escape sequence comes through."""
    say(
        cwd,
        "reads",
        message("Be kind.", "2024-11-20T01:00:00Z", "system", tokens_used=3),
        message(f"{WORDS} " * 5, "2024-11-20T04:59:00Z"),
        message("bad \x1b[31mred\x9b31m\x1b]0;x\x07", "2024-11-20T05:01:00Z"),
        message("I am Ana.", "2024-11-20T15:00:00Z", "assistant", author="agent", tokens_used=4),
        user_id="ana",
    )
    ask(
        cwd,
        "POST",
        "/v1/escalations",
        {"conversation_id": "reads", "reason": "refund", "priority": "high", "contact_info": {"phone": "57300"}},
    )
    ask(cwd, "PUT", "/v1/conversations/reads/hold", {"reason": "case 12"})

    for columns in (80, 120):
        shown = shown_on_a_terminal("conversations", "show", "reads", cwd=cwd, columns=columns, PAGER="cat", **BOGOTA)

        assert shown.code == 0
        lines = shown.text.rstrip("\n").split("\n")
        assert max(map(cells_of, lines)) <= columns
        assert lines[0] == head_of(cwd, "reads")["title"]
        heading = " ".join(" ".join(lines[: lines.index("")]).split())
        for part in ("user ana", "3 messages and 1 of the system", "7 tokens", "2024-11-19 20:00", "-05", "refund"):
            assert part in heading
        assert "(high priority): refund" in heading and "contact: phone 57300" in heading
        assert "under a legal hold: case 12" in heading
        days = [re.sub("[─ ]*$", "", line).lstrip("─ ") for line in lines if line.startswith("──")]
        assert days == ["Tuesday, 19 November 2024", "Wednesday, 20 November 2024"]
        assert "00:01  customer  bad \\u001b[31mred\\u009b31m\\u001b]0;x\\u0007" in lines
        assert "10:00  agent     I am Ana." in lines
        assert "\x1b[31mred" not in shown.raw and "\x9b" not in shown.raw and "\x1b]" not in shown.raw
        assert "\x1b[2mBe kind." in shown.raw
        assert "\x1b[36m" in shown.raw


def test_a_conversation_in_a_pipe_is_plain(cwd: Path):
    """No colours, no pager, no line broken that was none; escape sequences of strangers neither."""
    say(cwd, "piped", message(f"{WORDS} " * 20), message("\x1b[31m"))

    done = forked("conversations", "show", "piped", cwd=cwd, PAGER="echo PAGED #", COLUMNS="40")

    assert (done.returncode, done.stderr) == (0, "")
    assert "PAGED" not in done.stdout and "\x1b" not in done.stdout
    assert (f"{WORDS} " * 20).strip() in done.stdout


@pytest.fixture(scope="module")
def long(cwd: Path) -> Path:
    """The same daemon with a conversation of 2,500 messages, more than two pages."""
    for first in range(0, 2500, 500):
        say(cwd, "long", *(message(f"m{number:04}") for number in range(first, first + 500)))
    return cwd


def test_every_message_comes_once_in_order(long: Path):
    """Through all pages, whole or the last so many, as text or as JSON."""
    every = [f"m{number:04}" for number in range(2500)]

    for how, expected in (([], every), (["--last", "3"], every[-3:]), (["--last", "1500"], every[-1500:])):
        shown = forked("conversations", "show", "long", *how, cwd=long)
        as_json = forked("conversations", "show", "long", "--json", *how, cwd=long)

        assert re.findall(r"  customer  (m\d+)$", shown.stdout, re.MULTILINE) == expected
        assert [one["content"] for one in json.loads(as_json.stdout)["messages"]] == expected


def test_a_server_with_smaller_pages_is_read_as_well(alone: Path):
    """``limits.page`` below what we ask for loses nothing and doubles nothing."""
    (alone / "holdfast.toml").write_text("[limits]\npage = 3\n")
    forked("reload", "--data-dir", "data", cwd=alone)
    say(alone, "c", *(message(f"m{number}") for number in range(8)))

    for how, expected in (([], range(8)), (["--last", "5"], range(3, 8)), (["--last", "99"], range(8))):
        done = forked("conversations", "show", "c", "--json", "--data-dir", "data", *how, cwd=alone)

        assert [one["content"] for one in json.loads(done.stdout)["messages"]] == [f"m{number}" for number in expected]


def test_json_is_what_is_stored(cwd: Path):
    """The conversation whole, as HTTP gives it, with a message a line."""
    say(cwd, "exact", message("a\x1b ñ", metadata={"n": 1.50, "big": 9007199254740993}), message("b", role="assistant"))

    done = forked("conversations", "show", "exact", "--json", cwd=cwd)

    assert orjson.loads(done.stdout) == orjson.loads(ask(cwd, "GET", "/v1/conversations/exact"))
    assert len(done.stdout.splitlines()) == 4


def test_messages_are_filtered(cwd: Path):
    """By role, author and time, also among the last so many; when nothing is left that is said."""
    say(
        cwd,
        "filtered",
        message("one", "2024-11-18T12:00:00Z"),
        message("two", "2024-11-19T12:00:00Z", "assistant"),
        message("three", "2024-11-20T12:00:00Z", "assistant", author="agent"),
        message("four", "2024-11-20T12:00:00Z"),
    )

    def contents(*how: str) -> list[str]:
        done = forked("conversations", "show", "filtered", "--json", *how, cwd=cwd)
        return [one["content"] for one in json.loads(done.stdout)["messages"]]

    assert contents("--role", "user") == ["one", "four"]
    assert contents("--author", "agent") == ["three"]
    assert contents("--since", "2024-11-19", "--until", "2024-11-20T12:00:00Z") == ["two"]
    assert contents("--role", "assistant", "--last", "1") == ["three"]
    assert "no such message" in forked("conversations", "show", "filtered", "--role", "tool", cwd=cwd).stdout


def test_a_conversation_without_messages_is_shown(cwd: Path):
    """One that was only described says so."""
    ask(cwd, "PUT", "/v1/conversations/empty", {"title": "Later"})

    done = forked("conversations", "show", "empty", cwd=cwd)

    assert done.stdout.splitlines()[0] == "Later"
    assert done.stdout.splitlines()[-1] == "no message yet"


# The pager.


@pytest.fixture
def pager(tmp_path: Path) -> Path:
    """A pager that says what it got."""
    path = tmp_path / "pager"
    path.write_text('#!/bin/sh\necho "PAGED by LESS=$LESS $*"\nexec cat\n')
    path.chmod(0o755)
    return path


def test_a_terminal_gets_the_pager(long: Path, pager: Path):
    """$PAGER with its arguments shows what there is, with less set up as git does it, unless the user has."""
    shown = shown_on_a_terminal("conversations", "show", "long", cwd=long, PAGER=f"{pager} -x")
    chosen = shown_on_a_terminal("conversations", "show", "long", cwd=long, PAGER=str(pager), LESS="S")
    as_json = shown_on_a_terminal("conversations", "show", "long", "--json", cwd=long, PAGER=str(pager))

    assert (shown.code, shown.text.split("\n")[0]) == (0, "PAGED by LESS=FRX -x")
    assert "m0000" in shown.text and "m2499" in shown.text
    assert chosen.text.startswith("PAGED by LESS=S \n")
    assert "PAGED" not in as_json.text


@pytest.mark.parametrize("none", [{"PAGER": ""}, {"PAGER": "cat"}, {"TERM": "dumb"}])
def test_a_pager_can_be_switched_off(cwd: Path, pager: Path, none: dict[str, str]):
    """An empty one, ``cat``, or a terminal that cannot scroll back."""
    say(cwd, "unpaged", message("Hola"))

    shown = shown_on_a_terminal("conversations", "show", "unpaged", cwd=cwd, **{"PAGER": str(pager)} | none)

    assert shown.code == 0
    assert "Hola" in shown.text and "PAGED" not in shown.text


def test_leaving_the_pager_early_is_no_failure(long: Path):
    """Whoever has seen enough gets the prompt back, with exit 0 and no message."""
    shown = shown_on_a_terminal("conversations", "show", "long", cwd=long, PAGER="head -1")

    assert (shown.code, shown.text) == (0, "m0000\n")


def test_ctrl_c_belongs_to_the_pager(long: Path, tmp_path: Path):
    """The pager, which has changed the terminal, is not left alone with it: we end when it does."""
    path = tmp_path / "pager"
    path.write_text("#!/bin/sh\ntrap 'echo CAUGHT; exit 0' INT\nhead -1\necho WAITING\nwhile :; do sleep 0.05; done\n")
    path.chmod(0o755)
    terminal = Terminal("conversations", "show", "long", cwd=long, PAGER=str(path))
    try:
        terminal.wait_for("WAITING")
        terminal.interrupt()
        shown = terminal.finish()
    finally:
        terminal.stop()

    assert shown.code == 0
    assert "CAUGHT" in shown.text


@pytest.mark.parametrize("odd", ["no-such-pager", "LESS=S no-such-pager", "less '"])
def test_a_pager_that_does_not_exist_is_told(cwd: Path, odd: str):
    """Exit 2 names the variable, in one line."""
    say(cwd, "oddly-paged", message("Hola"))

    shown = shown_on_a_terminal("conversations", "show", "oddly-paged", cwd=cwd, PAGER=odd)

    assert shown.code == 2
    assert shown.text.startswith("holdfast: expected a command in PAGER")
    assert shown.text.count("\n") == 1


# list


def test_lists_are_filtered(alone: Path):
    """By whose they are, by state and by time; the newest first."""
    say(alone, "old", message("a", ago(100)), user_id="ana")
    say(alone, "new", message("b", ago(1)), user_id="ana", session_id="s1")
    say(alone, "mid", message("c", ago(10)), user_id="bob")
    ask(alone, "POST", "/v1/conversations/mid/archive", {"archived": True})
    ask(alone, "POST", "/v1/escalations", {"conversation_id": "old", "reason": "r"})

    assert listed(alone) == ["new", "mid", "old"]
    assert listed(alone, "--user", "ana") == ["new", "old"]
    assert listed(alone, "--session", "s1") == ["new"]
    assert listed(alone, "--escalated") == ["old"]
    assert listed(alone, "--no-escalated") == ["new", "mid"]
    assert listed(alone, "--archived") == ["mid"]
    assert listed(alone, "--no-archived") == ["new", "old"]
    assert listed(alone, "--active-within", "7d") == ["new"]
    assert listed(alone, "--older-than", "90d") == ["old"]
    assert listed(alone, "--since", "50d", "--until", "5d") == ["mid"]
    assert listed(alone, "--since", ago(50)[:10]) == ["new", "mid"]
    assert listed(alone, "--limit", "2") == ["new", "mid"]
    assert listed(alone, "--user", "nobody") == []


def test_the_table_says_what_is_special(cwd: Path):
    """Age, count, state and title; cut to the terminal, what strangers wrote escaped."""
    say(cwd, "573001112233", message("\x1b[31m" + "título " * 20), user_id="tabled")
    ask(cwd, "POST", "/v1/escalations", {"conversation_id": "573001112233", "reason": "r"})
    ask(cwd, "PUT", "/v1/conversations/573001112233/hold", {})

    shown = shown_on_a_terminal("conversations", "list", "--user", "tabled", cwd=cwd)
    piped = forked("conversations", "list", "--user", "tabled", cwd=cwd)

    titles, row = shown.text.rstrip("\n").split("\n")
    assert titles.split("  ")[0] == "id" and "last message" in titles and len(row) <= 80
    assert re.match(r"573001112233  .* ago +1  waiting, held  \\u001b\[31mtí", row)
    assert "2024-11-20T12:00:00.000Z" in piped.stdout


def test_a_long_list_says_that_there_is_more(alone: Path):
    """100 unless told otherwise, everything with ``--all``."""
    for number in range(103):
        say(alone, f"c{number:03}", message("x"))

    shown = shown_on_a_terminal("conversations", "list", cwd=alone)

    assert "--all" in shown.text.rstrip("\n").split("\n")[-1]
    assert len(listed(alone)) == 100
    assert sorted(listed(alone, "--all")) == [f"c{number:03}" for number in range(103)]


# rm, archive, hold


def test_removing_asks_on_a_terminal(cwd: Path):
    """No leaves everything, yes removes it, ``--yes`` is not asked."""
    for id, answer, is_left in (("kept", "n\n", True), ("gone", "y\n", False)):
        say(cwd, id, message("x"))
        terminal = Terminal("conversations", "rm", id, cwd=cwd)
        try:
            terminal.wait_for("Remove 1 conversation with all messages for good?")
            terminal.type(answer)
            shown = terminal.finish()
        finally:
            terminal.stop()

        assert (shown.code == 0) is not is_left
        assert (forked("conversations", "show", id, cwd=cwd).returncode == 0) is is_left
    assert shown_on_a_terminal("conversations", "rm", "kept", "--yes", cwd=cwd).code == 0


def test_removing_tells_what_could_not_be_removed(cwd: Path):
    """A program is not asked; one that is held or unknown does not keep the others."""
    for id in ("r1", "r2", "r3"):
        say(cwd, id, message("x"))
    ask(cwd, "PUT", "/v1/conversations/r2/hold", {})

    done = forked("conversations", "rm", "r1", "r2", "r3", "unknown", "--json", cwd=cwd)

    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["removed"], [one["id"] for one in found["refused"]]) == (2, ["r2", "unknown"])
    assert "legal hold" in done.stderr and "unknown" in done.stderr
    assert_told_in_one_line(forked("conversations", "show", "r1", cwd=cwd), 1, "no conversation 'r1'")
    assert head_of(cwd, "r2")["hold"] is True


def test_conversations_are_archived_and_brought_back(cwd: Path):
    """``archive`` and its ``--undo``, for several at once."""
    for id in ("a1", "a2"):
        say(cwd, id, message("x"))

    done = forked("conversations", "archive", "a1", "a2", cwd=cwd)
    are_archived = [head_of(cwd, id)["archived"] for id in ("a1", "a2")]
    undone = forked("conversations", "archive", "a1", "--undo", "--json", cwd=cwd)

    assert (done.returncode, done.stdout) == (0, "archived 2 conversations\n")
    assert are_archived == [True, True]
    assert json.loads(undone.stdout) == {"unarchived": 1, "refused": []}
    assert head_of(cwd, "a1")["archived"] is False


def test_a_hold_keeps_and_releases(cwd: Path):
    """Of a conversation, with its reason, and of a person with everything that is theirs."""
    say(cwd, "h1", message("x"))
    say(cwd, "h2", message("x"), user_id="holder")

    held = forked("conversations", "hold", "h1", "--reason", "case 12", cwd=cwd)
    person = forked("conversations", "hold", "holder", "--person", "--json", cwd=cwd)
    refused = forked("conversations", "rm", "h1", "h2", cwd=cwd)
    head = head_of(cwd, "h1")
    released = [forked("conversations", "hold", *how, "--release", cwd=cwd) for how in (["h1"], ["holder", "--person"])]
    removed = forked("conversations", "rm", "h1", "h2", cwd=cwd)

    assert held.stdout.startswith("conversation h1 is under a legal hold: seq ")
    assert json.loads(person.stdout)["id"] == "holder"
    assert (refused.returncode, refused.stderr.count("legal hold")) == (1, 2)
    assert (head["hold"], head["hold_reason"]) == (True, "case 12")
    assert [done.returncode for done in released] == [0, 0], released
    assert removed.stdout == "removed 2 conversations\n"


def test_options_guard_a_change(cwd: Path):
    """A stale version is refused, a repeated key changes nothing; with several ids neither has a meaning."""
    say(cwd, "guarded", message("x"))

    stale = forked("conversations", "rm", "guarded", "--if-version", "7", cwd=cwd)
    keyed = [forked("conversations", "hold", "guarded", "--idempotency-key", "k", "--json", cwd=cwd) for _ in range(2)]
    several = forked("conversations", "archive", "guarded", "other", "--if-version", "2", cwd=cwd)

    assert stale.returncode == 1 and "version" in stale.stderr
    assert keyed[0].stdout == keyed[1].stdout != ""
    assert_told_in_one_line(several, 2, "--if-version goes with one id only")


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("conversations show unknown", 1, "no conversation 'unknown'"),
        ("conversations hold unknown", 1, "no conversation 'unknown'"),
        ("conversations hold x --release --reason y", 2, "--reason"),
        ("conversations hold x --person --if-version 1", 2, "--if-version"),
        ("conversations show x --role robot", 2, "--role"),
        ("conversations show x --last 0", 2, "--last"),
        ("conversations show x --since yesterday", 1, "x"),
        ("conversations list --since yesterday", 1, "yesterday"),
        ("conversations list --older-than soon", 1, "soon"),
        ("conversations list --limit 0", 2, "--limit"),
        ("conversations rm", 2, "ID"),
        ("escalations show unknown", 1, "no escalation 'unknown'"),
        ("escalations open unknown --reason x", 1, "no conversation 'unknown'"),
        ("escalations open unknown", 2, "--reason"),
        ("escalations open x --reason y --priority urgent", 2, "--priority"),
        ("escalations open x --reason y --contact {", 2, "not JSON"),
        ("escalations open x --reason y --contact []", 1, "contact_info"),
        ("escalations list --status odd", 2, "--status"),
        ("cleanup --days -1", 2, "--days"),
        ("cleanup --days x", 2, "--days"),
        ("cleanup --idle-hours -1", 2, "--idle-hours"),
        ("cleanup --days 1 --idle-hours 1", 2, "--idle-hours goes without"),
        ("cleanup --idle-hours 1 --dry-run", 2, "--idle-hours goes without"),
        ("cleanup --delete-messages", 2, "--days"),
        ("stats --json storage", 2, "behind it"),
        ("stats sales --from yesterday", 1, "yesterday"),
    ],
)
def test_what_cannot_be_is_told(cwd: Path, line: str, code: int, told: str):
    """One line says what was expected and found."""
    assert_told_in_one_line(forked(*line.split(), cwd=cwd), code, told)


# escalations


def test_escalations_are_opened_listed_and_shown(alone: Path):
    """High priority first, then who waits longest; a second call updates the one that is open."""
    for id in ("e1", "e2", "e3"):
        say(alone, id, message("help"))

    opened = [
        forked("escalations", "open", id, "--reason", f"because {id}", *how, cwd=alone)
        for id, how in (("e1", []), ("e2", ["--priority", "high", "--contact", '{"phone": "57300"}']), ("e3", []))
    ]
    again = forked("escalations", "open", "e1", "--reason", "still\nwaiting", "--json", cwd=alone)
    table = forked("escalations", "list", cwd=alone)
    shown = forked("escalations", "show", "e2", cwd=alone)
    as_json = forked("escalations", "show", "e2", "--json", cwd=alone)

    assert [done.returncode for done in opened] == [0, 0, 0], opened
    assert opened[0].stdout.startswith("escalation e1 is open: version 1, seq ")
    assert json.loads(again.stdout)["version"] == 2
    assert listed(alone, group="escalations") == ["e2", "e1", "e3"]
    assert listed(alone, "--priority", "low", "--status", "pending", group="escalations") == ["e1", "e3"]
    assert listed(alone, "--status", "resolved", group="escalations") == []
    assert re.search(r"^e1 +low +pending +\d+ s  still waiting$", table.stdout, re.MULTILINE)
    assert re.search(r"^reason +because e2$", shown.stdout, re.MULTILINE)
    assert re.search(r"^phone +57300$", shown.stdout, re.MULTILINE)
    assert json.loads(as_json.stdout)["contact_info"] == {"phone": "57300"}


def test_an_escalation_brings_nothing_onto_the_terminal(cwd: Path):
    """Reason and contact come from strangers as well."""
    say(cwd, "e9", message("x"))
    contact = {"na\x1b[31mme": "\x1b]0;x\x07"}
    ask(cwd, "POST", "/v1/escalations", {"conversation_id": "e9", "reason": "a\x1b[2Jb", "contact_info": contact})

    for line in (["escalations", "show", "e9"], ["escalations", "list"], ["conversations", "show", "e9"]):
        shown = shown_on_a_terminal(*line, cwd=cwd, NO_COLOR="1", PAGER="cat")

        assert "a\\u001b[2Jb" in shown.text
        assert "\x1b" not in shown.raw


# cleanup


def storage_of(cwd: Path) -> dict[str, Any]:
    """The figures of what there is."""
    found: dict[str, Any] = orjson.loads(ask(cwd, "GET", "/v1/stats/storage"))
    return found


def test_cleanup_archives_deletes_and_shows_the_table(alone: Path, monkeypatch: pytest.MonkeyPatch):
    """In as many requests as it takes; a dry run only counts, what is held keeps its messages."""
    monkeypatch.setattr(cleanup_command, "AT_ONCE", 3)
    for number in range(10):
        say(alone, f"old{number}", *(message("hola", "2024-01-01T00:00:00Z", tokens_used=2) for _ in range(2)))
    say(alone, "new", message("hola", ago(1), tokens_used=5))
    forked("conversations", "hold", "old4", cwd=alone)
    before = storage_of(alone)

    would = forked("cleanup", "--days", "90", "--delete-messages", "--dry-run", cwd=alone)
    untouched = storage_of(alone)
    archived = forked("cleanup", "--days", "90", cwd=alone)
    done = forked("cleanup", "--days", "90", "--delete-messages", cwd=alone)
    again = forked("cleanup", "--days", "90", "--delete-messages", "--json", cwd=alone)

    assert untouched == before
    assert would.stdout.startswith("would archive 10 conversations\nwould delete 18 messages (72 bytes)\n")
    assert archived.stdout.startswith("archived 10 conversations\n\nMetric")
    assert done.stdout.splitlines()[:3] == [
        "archived 0 conversations",
        "deleted 18 messages (72 bytes)",
        "kept the messages of 1 conversation under a legal hold",
    ]
    table = dict(re.findall(r"^(Total \w+|Active \w+) +([\d,]+)$", done.stdout, re.MULTILINE))
    assert table == {
        "Total Conversations": "11",
        "Active Conversations": "1",
        "Total Messages": "3",
        "Total Tokens": "9",
    }
    found = json.loads(again.stdout)
    assert (found["archived"], found["messages_deleted"], found["held"]) == (0, 0, 1)
    assert found["storage"]["archived"] == 10
    assert "2 messages deleted" in forked("conversations", "show", "old1", cwd=alone).stdout


def test_cleanup_by_the_settings_does_what_the_day_would_bring(alone: Path):
    """Without ``--days`` the settings say what is archived and what is deleted."""
    for id, days in (("a", 400), ("b", 200), ("c", 1)):
        say(alone, id, message("hola", ago(days)))

    done = forked("cleanup", cwd=alone)

    assert done.stdout.startswith("archived 2 conversations\ndeleted 1 message (4 bytes)\n")


def test_idle_conversations_are_removed_the_old_way(alone: Path, monkeypatch: pytest.MonkeyPatch):
    """``--idle-hours`` removes what was not updated for so long, and says so in the old form."""
    monkeypatch.setattr(cleanup_command, "AT_ONCE", 3)
    for number in range(8):
        say(alone, f"old{number}", message("hola", "2024-11-01T00:00:00Z"))
    say(alone, "new", {"role": "user", "content": "hola"})

    done = forked("cleanup", "--idle-hours", "24", "--json", cwd=alone)

    assert json.loads(done.stdout) == {"deleted": 8, "errors": 0}
    assert listed(alone) == ["new"]


def test_long_work_has_a_progress_bar(alone: Path, monkeypatch: pytest.MonkeyPatch):
    """On a terminal, once it takes a while; what was done is told below."""
    impatient = "from holdfast.cli import cleanup, main, show; cleanup.AT_ONCE = 50; show.PATIENCE_S = 0; main.main()"
    monkeypatch.setattr("tests.cli_harness.HOLDFAST", [sys.executable, "-c", impatient])
    old = message("hola", "2024-01-01T00:00:00Z")
    ask(alone, "POST", "/v1/batch", {"ops": [{"op": "message.append", "id": f"c{n}", **old} for n in range(400)]})

    shown = shown_on_a_terminal("cleanup", "--days", "90", "--delete-messages", cwd=alone)

    assert shown.code == 0
    assert re.search(r"cleaning up [^\n]*\d+/800", shown.text)
    assert "archived 400 conversations" in shown.text


# stats


def test_storage_is_shown(alone: Path):
    """Counts with their shares for people, the daemon's own figures for programs."""
    say(alone, "a", message("x", "2024-01-01T00:00:00Z", tokens_used=1000))
    say(alone, "b", {"role": "user", "content": "x"}, {"role": "system", "content": "y"})

    table = forked("stats", "storage", cwd=alone).stdout
    as_json = forked("stats", "storage", "--json", cwd=alone).stdout

    assert re.search(r"^conversations +2$", table, re.MULTILINE)
    assert re.search(r"^  active in 30 days +1 +50\.0% █+$", table, re.MULTILINE)
    assert re.search(r"^messages +3$", table, re.MULTILINE)
    assert re.search(r"^tokens +1,000$", table, re.MULTILINE)
    assert json.loads(as_json) == storage_of(alone)


def test_storage_of_nothing_is_shown(alone: Path):
    """A new daemon has figures without shares."""
    done = forked("stats", "storage", cwd=alone)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^conversations +0$", done.stdout, re.MULTILINE)


def test_sales_are_added_up_by_period_and_product(alone: Path):
    """Exact money by month, with bars that compare; of one product the orders only."""
    today = datetime.now(UTC).date()
    # Days are kept for 90 days, so both months are not long ago.
    this, before = today.replace(day=1), (today.replace(day=1) - timedelta(days=1)).replace(day=1)
    ops: list[dict[str, Any]] = []
    for day, product, revenue in ((before, "music", "0.1"), (before, "videos", "0.2"), (this, "music", "84900.50")):
        at = f"{day}T00:00:00Z"
        ops.append({"op": "stats.order", "product_type": product, "at": at})
        ops.append({"op": "stats.completion", "revenue": revenue, "at": at})
    ask(alone, "POST", "/v1/batch", {"ops": ops})

    by_month = forked("stats", "sales", "--by", "month", cwd=alone).stdout
    music = forked("stats", "sales", "--by", "month", "--product", "music", "--from", str(this), cwd=alone).stdout
    as_json = forked("stats", "sales", "--by", "month", "--json", cwd=alone).stdout
    none = forked("stats", "sales", "--to", "2024-01-01", cwd=alone).stdout

    assert re.search(rf"^{before:%Y-%m} +2 +2 +0\.3 +█{{24}}$", by_month, re.MULTILINE)
    assert re.search(rf"^{this:%Y-%m} +1 +1 +84900\.50 +█{{12}}$", by_month, re.MULTILINE)
    assert re.search(r"^music +2 ", by_month, re.MULTILINE)
    assert re.search(rf"^{this:%Y-%m} +1 +█{{24}}$", music, re.MULTILINE)
    assert "revenue" not in music and f"{before:%Y-%m}" not in music
    assert '"totalRevenue": 84900.50' in as_json
    assert none == "no sales\n"


# tail


def test_what_is_said_is_seen_while_it_is_said(cwd: Path):
    """``tail`` shows the messages themselves, on one line and without what would move the cursor."""
    say(cwd, "tailed", message("Hola\x1b[2J"), message("¡Hola!", role="assistant"))

    done = process("tail", "--after", "0", "--id", "tailed", "--count", "1", cwd=cwd)

    assert done.stdout.rstrip().endswith("message.append   tailed         user: Hola\\u001b[2J assistant: ¡Hola!")
