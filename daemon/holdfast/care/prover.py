"""Proving a backup set in a process of its own: loading a million sessions would hold this one's interpreter."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import tomllib
from contextlib import suppress
from pathlib import Path

import msgspec

from holdfast.care.apart import Failed, run_apart, step_back
from holdfast.care.backup_set import BACKUPS, BackupSet, Proof, read_set
from holdfast.disk.files import Directory
from holdfast.errors import HoldfastError, SettingsError, Unavailable
from holdfast.settings import LoadedSettings, Settings, all_settings, chosen, describe, value_of

_PROGRAM = "from holdfast.care.prover import main; main()"


_numbers = itertools.count(1)
"""Each proof has a place of its own: the daily one and that of ``verify --deep`` may run at one time."""


class Unproved(Exception):
    """A set could not be proved, which says nothing about it; the text says why."""


def prove_apart(found: BackupSet, settings: Settings, cancelled: threading.Event) -> Proof:
    """The proof of the set *found*; blocks, without holding the interpreter where a child can be started.

    Raises:
        Unproved: no room, no memory, no key.
        Unavailable: *cancelled*.
    """
    try:
        # Where everything of ours is, so that a start removes what is left of it, and it is no smaller than what was kept.
        with Directory(settings.data_dir / BACKUPS) as backups:
            scratch = f".prove-{next(_numbers)}.{os.getpid()}.tmp"
            backups.subdirectory(scratch).close()
            try:
                return _prove(found, settings, backups.path / scratch, cancelled)
            finally:
                with suppress(OSError):
                    backups.remove_tree(scratch)
    except (OSError, HoldfastError) as error:
        if isinstance(error, Unavailable):
            raise
        raise Unproved(str(error)) from error


def written(settings: Settings) -> dict[str, str]:
    """Every setting as it would stand in a settings file."""
    return {name: value for name, value, _, _ in describe(_in_use(settings))}


def settings_from(written: dict[str, str]) -> Settings:
    """The settings that *written* says, each value as it stands in a settings file; SettingsError when one is wrong."""
    values: dict[str, object] = {}
    for name, text in written.items():
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{name}: expected a value of TOML, found {text!r:.80}: {error}") from None
    return chosen(values)


def shown(settings: Settings) -> dict[str, dict[str, str]]:
    """What ``holdfast serve --check --json`` shows of settings in use."""
    return {name: {"value": value, "origin": origin} for name, value, origin, _ in describe(_in_use(settings))}


def _in_use(settings: Settings) -> LoadedSettings:
    origins = {
        name: "default" if value_of(settings, name) == setting.default else "in use"
        for name, setting in all_settings().items()
    }
    return LoadedSettings(settings, origins, None, [])


def _prove(found: BackupSet, settings: Settings, scratch: Path, cancelled: threading.Event) -> Proof:
    question = msgspec.json.encode({"path": str(found.path), "scratch": str(scratch), "settings": written(settings)})
    try:
        answer = run_apart(_PROGRAM, question, cancelled)
    except Failed as error:
        raise Unproved(str(error)) from error
    return _prove_here(found, settings, scratch) if answer is None else msgspec.json.decode(answer, type=Proof)


def _prove_here(found: BackupSet, settings: Settings, scratch: Path) -> Proof:
    # Here, because the child alone needs them otherwise, and because they know the engine, which knows us.
    from holdfast.care.prove import prove
    from holdfast.care.seal import seal_of

    return prove(found, seal_of(settings), scratch)


def main() -> None:
    """The child: a question on standard input, the proof on standard output."""
    step_back()
    question = msgspec.json.decode(sys.stdin.buffer.read())
    # Everything loaded is looked at once and forgotten.
    gc.disable()
    try:
        proof = _prove_here(
            read_set(Path(question["path"])), settings_from(question["settings"]), Path(question["scratch"])
        )
    except (HoldfastError, OSError, MemoryError) as error:
        sys.exit(f"{error or type(error).__name__}")
    sys.stdout.buffer.write(msgspec.json.encode(proof))
