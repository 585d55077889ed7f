"""What the README shows a newcomer works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import holdfast
from tests.test_daemon import Daemon

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE_S = 30


def run(example: str, cwd: Path) -> str:
    """What *example* prints, run in *cwd*."""
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=EXAMPLE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_in_this_process(tmp_path: Path) -> None:
    """The first example, on the directory of the commands before it."""
    with holdfast.open(tmp_path / "data") as hf:
        hf.sessions.put("573001234567", {"currentState": "catalog"})

    printed = run(EXAMPLES[0], tmp_path)

    assert "awaiting_payment" in printed and "119900" in printed
    assert len(json.loads((tmp_path / "data" / "notes.json").read_text())) == 1000


def test_the_library_through_a_daemon(tmp_path: Path) -> None:
    """The second: a daemon, a lease, an update, the event stream."""
    daemon = Daemon(tmp_path / "data").ready()
    try:
        printed = run(EXAMPLES[1], tmp_path)

        assert printed.splitlines()[-1].endswith("session.put 573001")
        assert "session.lease 573001" in printed
        assert daemon.request("GET", "/v1/sessions/573001")[1]["currentState"] == "awaiting_payment"
        assert daemon.request("GET", "/v1/users/573001")[1]["visits"] == 1
    finally:
        daemon.kill()


def test_conversations(tmp_path: Path) -> None:
    """The third: a message that comes twice, a window, an escalation, the figures."""
    printed = run(EXAMPLES[2], tmp_path).splitlines()

    assert printed[:2] == ["user Hola! quiero una USB de 64GB", "assistant ¡Claro! ¿Con qué música?"]
    assert "'handler': 'waiting'" in printed[2] and "'message_count': 2" in printed[2]
    assert "'escalated_share': 1.0" in printed[3]


def test_the_drop_in_module(tmp_path: Path) -> None:
    """The fourth, in the directory of the third: a list that grew is one conversation with both messages."""
    run(EXAMPLES[2], tmp_path)

    printed = run(EXAMPLES[3], tmp_path).splitlines()

    assert "¡Hola!" in printed[0] and "USB" not in printed[0]
    assert "'message_count': 2" in printed[1]


def test_the_drop_in_class(tmp_path: Path) -> None:
    """The fifth: a list in a file, a backup of it, its settings."""
    printed = run(EXAMPLES[4], tmp_path).splitlines()

    assert re.fullmatch(r"tasks_\d{8}_\d{6}\.json", printed[0])
    assert printed[1].startswith("[{'id': 1, 'due': '2026-11-21'}] [{'filename': 'tasks_")
    assert printed[2] == "10 True"


def test_every_example_is_run() -> None:
    """One more in the README wants one more test here."""
    assert len(EXAMPLES) == 5
