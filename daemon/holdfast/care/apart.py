"""Work done in a process of its own, which would hold this one's interpreter, or take its share of the processor.

The child has a low priority, is the first to go when memory runs out, and dies with us.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import holdfast
from holdfast.errors import Unavailable

LOOK_EVERY_S = 0.05
"""How soon the end of the child is noticed, and how soon it ends when we stop."""

_NICE = 10
"""A tenth of the share of others where they want all of the processor; with less it would hardly end there."""

_DIE_WITH_PARENT, _SIGKILL = 1, 9


class Failed(Exception):
    """The child did not come to its end; the text says why."""


def run_apart(program: str, question: bytes, cancelled: threading.Event) -> bytes | None:
    """What *program* (Python) writes to its standard output when it is given *question*; None where no child can be started.

    Raises:
        Failed: it ended with an error.
        Unavailable: *cancelled*; the child is gone.
    """
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaint:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=complaint,
                env={**os.environ, "PYTHONPATH": _import_path()},
            )
        except (OSError, ValueError):
            return None
        try:
            assert child.stdin is not None
            with suppress(OSError), child.stdin as stdin:
                stdin.write(question)
            while True:
                try:
                    code = child.wait(LOOK_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    if cancelled.is_set():
                        raise Unavailable("stopping; try again when it is back") from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        answer.seek(0)
        complaint.seek(0)
        if code == 0:
            return answer.read()
        said = complaint.read().decode("utf-8", "replace").strip()
    if "ImportError" in said or "ModuleNotFoundError" in said:
        # A program that found us in a way of its own.
        return None
    last = said.splitlines()[-1] if said else ""
    raise Failed(last or (f"its process was ended by signal {-code}" if code < 0 else f"exit code {code}"))


def step_back() -> None:
    """In the child, first of all: leave processor and memory to others, and do not outlive the parent; as far as the system
    lets us."""
    import ctypes  # here, because the parent has no use for it

    with suppress(OSError):
        os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, _SIGKILL)


def _import_path() -> str:
    root = str(Path(holdfast.__file__).parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
