"""What a process did to the disk and told its clients, as strace saw it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CALLS = ("open", "openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "sendto", "sendmsg", "ftruncate", "fsync",
         "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "linkat")  # fmt: skip

STRACE = ["strace", "-f", "-qq", "-y", "-xx", "-s", "10000000", "--seccomp-bpf"]
"""To be followed by ``-o FILE -e trace=CALLS`` and the command."""


class Call(NamedTuple):
    """One system call.

    Attributes:
        name: of it.
        paths: what its descriptors are open on, in order.
        strings: its text arguments, in order.
        arguments: all of them as strace writes them; of a call that has only begun, those known by then.
        result: what it returned; None when it has only begun.
    """

    name: str
    paths: list[str]
    strings: list[bytes]
    arguments: str
    result: int | None

    @property
    def target(self) -> str:
        """The path of the descriptor it works on; of a call by name the path it names."""
        if self.name in ("openat", "mkdirat", "unlinkat"):
            return str(Path(self.paths[0]) / self.strings[0].decode())
        if self.name in ("renameat", "renameat2", "linkat"):
            return str(Path(self.paths[-1]) / self.strings[-1].decode())
        return self.paths[0] if self.paths else self.strings[-1].decode()

    @property
    def source(self) -> str:
        """What a rename or link starts from."""
        return str(Path(self.paths[0]) / self.strings[0].decode())


def read_trace(path: Path) -> Iterator[tuple[bool, Call]]:
    """Every call twice, in order: when it begins (False) and, unless the process ended in it, when it is over (True)."""
    begun: dict[str, str] = {}
    for line in path.read_text("ascii", errors="replace").splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", text)
        if resumed is not None:
            whole = begun.pop(thread) + resumed[1]
            yield True, _parse(whole)
        elif text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>").rstrip()
            yield False, _parse(begun[thread])._replace(result=None)
        elif re.match(r"\w+\(", text):
            call = _parse(text)
            yield False, call._replace(result=None)
            yield True, call


def _parse(text: str) -> Call:
    name, _, arguments = text.partition("(")
    result = re.search(r"\) += (-?\d+)[^()]*(?:\([^()]*\))?$", arguments)
    asked = arguments[: result.start()] if result else arguments
    return Call(
        name,
        [_decoded(found).decode("utf-8", "replace") for found in re.findall(r"<((?:\\x[0-9a-f]{2})+)>", asked)],
        [_decoded(found) for found in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', asked)],
        asked,
        int(result[1]) if result else None,
    )


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
