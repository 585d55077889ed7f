"""Killed while an old bot's files are taken over and mirrored: nothing is lost, nothing comes twice, nobody has to help."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from holdfast.care.old_layout import old_message
from holdfast.engine import Engine
from holdfast.recovery import open_engine
from holdfast.settings import Settings
from tests.crash.harness import FULL, Recorder, report
from tests.test_old_conversations import LINES, left, old_conversation, old_escalation

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

CHANGING = ("write", "pwrite", "fsync", "fdatasync", "rename", "link", "unlink", "mkdir", "ftruncate")
"""The calls before each of which the process may end."""

CONVERSATIONS = [old_conversation(f"c{number}", LINES * (number + 1)) for number in range(6)]
ESCALATIONS = [old_escalation("c1"), old_escalation("c2", status="resolved"), old_escalation("alone")]
KILLED = 9


def written(data: Path) -> None:
    """What the old bot leaves."""
    left(data, conversations=CONVERSATIONS, escalations=ESCALATIONS)
    (data / "conversations" / "broken.json").write_text('{"id": "broken", "messages": [')


def started_and_stopped(data: Path) -> None:
    """A whole life: taken over, flushed and mirrored, closed."""
    open_engine(Settings(data_dir=data, mirror=True), log=Recorder()).close()


def in_child(action: Callable[[], None], *, die_at: int) -> tuple[int, int]:
    """Do *action* in a process that ends without a word before its changing call *die_at*: its exit code, and how many
    such calls it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            calls = _dying_at(die_at, writer)
            action()
            os.pwrite = os.write = calls.real["write"]
            calls.tell()
            os._exit(0)
        except BaseException as error:
            calls.real["write"](2, repr(error).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        count = int(told.read() or b"0")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


class _dying_at:
    """Counts the changing calls of this process, in all its threads, and ends it before one of them."""

    def __init__(self, number: int, writer: int) -> None:
        self.real = {name: getattr(os, name) for name in CHANGING}
        self._left = number
        self._count = 0
        self._writer = writer
        for name in CHANGING:
            setattr(os, name, self._counted(self.real[name]))

    def tell(self) -> None:
        self.real["write"](self._writer, str(self._count).encode())

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            self._count += 1
            if self._count == self._left:
                self.tell()
                os._exit(KILLED)
            return call(*args, **keywords)

        return counted


def wrong_with(engine: Engine, data: Path) -> list[str]:
    """What is not as it must be when all was taken over once."""
    wrong = []
    for old in CONVERSATIONS:
        page = engine.transcripts.messages(old["id"], limit=1_000, after=0)
        if [old_message(orjson.loads(item.value)) for item in page.items] != old["messages"]:
            wrong.append(f"{old['id']} has other messages")
    if engine.count("conversations") != len(CONVERSATIONS) + 1:
        wrong.append(f"{engine.count('conversations')} conversations")
    waiting = sorted(item.id for item in engine.transcripts.escalations().items)
    if waiting != ["alone", "c1"]:
        wrong.append(f"waiting: {waiting}")
    figures = engine.transcripts.figures()
    if figures.messages != sum(len(old["messages"]) for old in CONVERSATIONS):
        wrong.append(f"{figures.messages} messages")
    shown = {path.name: json.loads(path.read_text()) for path in (data / "conversations").iterdir()}
    if {name: one["messages"] for name, one in shown.items()} != {
        "alone.json": [],
        **{f"{old['id']}.json": old["messages"] for old in CONVERSATIONS},
    }:
        wrong.append(f"the mirror shows {sorted(shown)}")
    kept = sorted(path.name for path in data.glob("backups/imported-*/conversations/*"))
    if kept != sorted(f"{old['id']}.json" for old in CONVERSATIONS):
        wrong.append(f"kept: {kept}")
    broken = [path.name for path in data.glob("quarantine/*broken.json")]
    if len(broken) != 1:
        wrong.append(f"set aside: {broken}")
    return wrong + [f"degraded: {reason}" for reason in engine.degraded]


def test_killed_at_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before whichever change of the disk the first start ends, the second one has everything, once."""
    written(tmp_path / "whole")
    code, calls = in_child(lambda: started_and_stopped(tmp_path / "whole"), die_at=0)
    assert code == 0 and calls > 50
    places = range(1, calls + 1, 1 if FULL else calls // 13)

    killed = 0
    for place in places:
        data = tmp_path / f"at{place}"
        written(data)
        code, _ = in_child(lambda data=data: started_and_stopped(data), die_at=place)  # type: ignore[misc]
        # Threads take turns as they like, so now and then there are a few calls fewer.
        killed += code == KILLED
        assert code in (0, KILLED)

        engine = open_engine(Settings(data_dir=data, mirror=True), log=Recorder())
        try:
            engine.flush("api")
            assert wrong_with(engine, data) == [], f"killed before change {place} of {calls}"
        finally:
            engine.close()
        shutil.rmtree(data)
    assert killed >= len(places) - 3
    report(capsys, f"killed at {killed} of {calls} changes of the disk: all conversations there once, all mirrored")
