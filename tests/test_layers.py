"""Which module may import which: the picture in the README, checked."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "daemon" / "holdfast"

LAYERS = [
    {"errors", "clock", "checksum", "measures", "turns"},
    {"ops"},
    {"events", "settings", "values", "record"},
    {"core", "disk"},
    {"archive"},
    {"care", "commit", "engine", "feed", "flush", "leases", "load", "pages", "recovery", "transcripts"},
    {"api"},
    {"held", "blocking", "asynchronous"},
    {"embedded", "embedded_aio", "client"},
    {"aio", "compat"},
    {"http"},
    {"service"},
    {"cli"},
    {"__main__"},
]
"""From the innermost outwards; a module imports from its own group or from groups above it in this list."""

STRANGERS = [{"core", "disk"}]
"""Groups on one level that must not know each other: core is meaning without bytes, disk bytes without meaning."""

IMPORTED_IN = {
    "aiohttp": ("http/",),
    "click": ("cli/",),
    "isal": ("checksum.py",),
    "jinja2": ("http/docs/",),
    "markupsafe": ("http/docs/",),
    "msgspec": ("",),
    "multidict": ("http/",),
    "obstore": ("care/store.py",),
    "orjson": ("",),
    "prometheus_client": ("http/metrics.py",),
    "pyrage": ("care/seal.py",),
    "rich": ("cli/",),
    "sqlite3": ("archive/sqlite",),
    "structlog": ("service/", "http/", "recovery.py"),
    "uvloop": ("service/daemon.py",),
    "watchdog": ("service/watch.py",),
    "zstandard": ("archive/sqlite_packed.py", "care/packing.py"),
}
"""Where each library may be imported; those for JSON and structs are at home everywhere. Of Python's own, the one that may
give way to another."""

IMPURE = {
    "asyncio",
    "concurrent",
    "io",
    "os",
    "pathlib",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "threading",
    "time",
}
"""What code that decides has no use for."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(module: Path) -> Iterator[str]:
    """Every dotted name that *module* imports, also inside functions."""
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            # `from holdfast import x` may name a module or what __init__ offers.
            yield from (
                (f"{node.module}.{name.name}" for name in node.names) if node.module == "holdfast" else [node.module]
            )


def group(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} stands in no layer; add it to LAYERS, and to the picture in the README"
    return found[0]


@pytest.mark.parametrize("module", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_groups_above_its_own(module: Path):
    """Nothing inner knows anything outer, so that each group can be read, and tested, with what lies above it."""
    own = group(module)

    for name in imported(module):
        package, _, rest = name.partition(".")
        if package != "holdfast" or name in ("holdfast", "holdfast.__version__"):
            continue
        other = rest.partition(".")[0]
        assert level(other) <= level(own), f"{module.name} imports {name}"
        assert not any({own, other} <= pair and own != other for pair in STRANGERS), f"{module.name} imports {name}"


@pytest.mark.parametrize("module", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_library_is_imported_where_it_belongs(module: Path):
    """Whoever wants to replace a library finds all that touches it together."""
    place = module.relative_to(PACKAGE).as_posix()

    for name in imported(module):
        library = name.partition(".")[0]
        if library == "holdfast" or (library in sys.stdlib_module_names and library not in IMPORTED_IN):
            continue
        assert library in IMPORTED_IN, f"{place} imports {library}, which has no place in IMPORTED_IN"
        assert place.startswith(IMPORTED_IN[library]), f"{place} imports {library}"


def test_the_readme_leads_to_every_module():
    """Its reading order leaves out no module that stands for itself, and no group."""
    readme = (PACKAGE.parent.parent / "README.md").read_text()
    order = readme.partition("Read the source in this order")[2]

    for path in modules():
        name = path.relative_to(PACKAGE).parts[0]
        place = f"`{name}`" if name.endswith(".py") else f"`{name}/"
        assert place in order or name == "__main__.py", f"the README's reading order does not name {name}"


def test_deciding_and_applying_touch_nothing_outside():
    """core/ has no clock, no thread, no file, no randomness: the same op in the same state is always the same event."""
    for module in (PACKAGE / "core").glob("*.py"):
        touched = {name.partition(".")[0] for name in imported(module)} & IMPURE

        assert not touched, f"{module.name} imports {', '.join(touched)}"
