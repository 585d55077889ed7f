"""What every test starts from."""

from __future__ import annotations

import os
import sys

import pytest

# The tests start hundreds of processes. Where the machine asks for no bytecode, each would compile the whole package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(autouse=True)
def no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test, nor any daemon it starts, sees settings from the environment of whoever runs the tests."""
    for variable in [name for name in os.environ if name.startswith("HOLDFAST_") and name != "HOLDFAST_CRASH"]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("DATA_DIR", raising=False)
