"""Settings: what is read from where, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import SettingsError
from holdfast.settings import (
    CONFIG_BYTES_MAX,
    RELOADABLE,
    SOCKET_PATH_BYTES_MAX,
    Count,
    Settings,
    Size,
    Span,
    TcpAddress,
    UnixAddress,
    all_settings,
    changes,
    describe,
    format_duration,
    format_size,
    load,
    parse_address,
    parse_duration,
    parse_size,
    reloaded,
    settings_table,
    value_of,
)

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A working directory without a settings file."""
    return tmp_path


def written(directory: Path, text: str | bytes, name: str = "holdfast.toml") -> Path:
    file = directory / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(cwd: Path, overrides: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(overrides or {}, environ or {}, None, cwd)
    assert caught.value.code == "invalid_settings"
    return caught.value.detail


# Sources.


def test_defaults_are_those_of_the_contract(cwd: Path):
    """Without any source every setting has its default, with a data directory below the working directory."""
    loaded = load({}, {}, None, cwd)

    assert loaded.settings == Settings(data_dir=cwd / "data")
    assert set(loaded.origins.values()) == {"default"}
    settings = loaded.settings
    assert (settings.flush_every, settings.journal_max, settings.shutdown_timeout) == (300, 256 * 2**20, 25)
    assert (settings.sessions.ttl, settings.sessions.max_bytes) == (86400, 2**20)
    assert (settings.retention.archive_after, settings.retention.delete_after) == (90 * 86400, 365 * 86400)


def test_each_source_goes_over_the_one_below(cwd: Path):
    """Command line over HOLDFAST_DATA_DIR over DATA_DIR over the file over the default, each named as the origin."""
    file = written(cwd, 'data_dir = "in-file"\n')
    levels = [
        ({}, {}, "in-file", str(file)),
        ({}, {"DATA_DIR": "old"}, "old", "DATA_DIR"),
        ({}, {"DATA_DIR": "old", "HOLDFAST_DATA_DIR": "new"}, "new", "HOLDFAST_DATA_DIR"),
        ({"data_dir": "typed"}, {"HOLDFAST_DATA_DIR": "new"}, "typed", "command line"),
    ]

    for overrides, environ, directory, origin in levels:
        loaded = load(overrides, environ, None, cwd)

        assert (loaded.settings.data_dir, loaded.origins["data_dir"]) == (cwd / directory, origin)


def test_sections_are_read_from_the_file(cwd: Path):
    """Every kind of value can be written in TOML, as text with a unit or as a plain number."""
    file = written(
        cwd,
        """
        listen = ["unix:", "tcp:[::1]:0"]
        flush_every = 90
        mirror = true
        journal_max = "1GB"
        [sessions]
        ttl = "12h"
        [stats]
        timezone = "America/Bogota"
        [limits]
        keys = 5
        """,
    )

    loaded = load({}, {}, None, cwd)

    assert loaded.file == file
    assert loaded.watch == [file]
    settings = loaded.settings
    assert (settings.listen, settings.flush_every, settings.mirror) == (("unix:", "tcp:[::1]:0"), 90.0, True)
    assert (settings.journal_max, settings.sessions.ttl, settings.limits.keys) == (10**9, 43200.0, 5)
    assert settings.stats.timezone == "America/Bogota"
    assert loaded.origins["sessions.ttl"] == str(file)


def test_every_setting_can_be_set_by_environment_and_command_line(cwd: Path):
    """What ``--check`` shows of a setting can be given back, as a variable or as ``--set``."""
    for name, setting in all_settings().items():
        text = setting.kind.write(setting.default).strip('"')
        if name == "listen":
            text = "unix:, tcp:127.0.0.1:8765"

        by_variable = load({}, {setting.variable: text}, None, cwd)
        by_option = load({name: text}, {}, None, cwd)

        assert value_of(by_variable.settings, name) == value_of(by_option.settings, name)
        assert (by_variable.origins[name], by_option.origins[name]) == (setting.variable, "command line")


def test_the_printed_settings_are_a_settings_file(cwd: Path):
    """A file made of all printed values loads to the same settings."""
    first = load({"sessions.ttl": "90s", "listen": "unix:/run/x.sock", "limits.page": "7"}, {}, None, cwd)

    written(cwd, "".join(f"{name} = {value}\n" for name, value, _, _ in describe(first)))
    second = load({}, {}, None, cwd)

    assert second.settings == first.settings


def test_relative_socket_paths_start_at_the_working_directory(cwd: Path):
    """A socket named on the command line lies where the shell would put it, not in the data directory."""
    settings = load({"listen": "unix:hf.sock", "data_dir": "elsewhere"}, {}, None, cwd).settings

    assert parse_address(settings.listen[0], settings.data_dir) == UnixAddress(cwd / "hf.sock")


# Refusals.

WRONG_FILES = {
    "unknown name": ("sessoins_ttl = 1", "no such setting"),
    "unknown name in a section": ("[sessions]\nttll = 1", "did you mean sessions.ttl?"),
    "unknown section": ("[session]\nttl = 1", "did you mean sessions?"),
    "a section as a value": ("sessions = 1", "is a section"),
    "a value as a section": ("[flush_every]\nx = 1", "expected a duration"),
    "a number as a word": ('[backups]\nkeep = "10"', "expected a whole number from 1 to 10000, found '10'"),
    "a word as a flag": ('mirror = "true"', "expected true or false"),
    "a flag as a duration": ("flush_every = true", "expected a duration"),
    "a date": ("flush_every = 2026-01-01", "expected a duration"),
    "not a number": ("flush_every = nan", "expected a duration"),
    "infinite": ("flush_every = inf", "expected a duration"),
    "below its range": ('[sessions]\nttl = "500ms"', "expected a duration from 1s to 3650d"),
    "above its range": ("[limits]\ndepth = 201", "expected a whole number from 1 to 200, found 201"),
    "a wrong choice": ('durability = "allways"', "did you mean always?"),
    "an unknown zone": ('[stats]\ntimezone = "America/Bogata"', "did you mean America/Bogota?"),
    "a zone that is a directory": ('[stats]\ntimezone = "America"', "expected a time zone"),
    "a zone that climbs": ('[stats]\ntimezone = "../../etc/passwd"', "expected a time zone"),
    "the wrong order": ('[retention]\ndelete_after = "30d"', "expected at least retention.archive_after (90d)"),
    "our own key": ('[sessions]\nid_field = "_holdfast"', "expected the name of a field"),
    "no address": ("listen = []", "expected a list"),
    "an address twice": ('listen = ["unix:", "unix:"]', "expected each address once"),
    "an address of the network": ('listen = ["tcp:0.0.0.0:80"]', "TLS proxy"),
    "broken TOML": ("flush_every = ", "expected TOML"),
    "a name twice": ("mirror = true\nmirror = false", "expected TOML"),
    "nested a thousand times": ("x = " + "[" * 5000, "expected TOML"),
    "not UTF-8": (b"mirror = true # \xff", "expected TOML in UTF-8"),
    "too long": ("#" * (CONFIG_BYTES_MAX + 1), "expected at most 1MiB"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_whole(cwd: Path, case: str):
    """The refusal names the file, what was expected and what is near."""
    text, reason = WRONG_FILES[case]
    file = written(cwd, text)

    detail = refusal(cwd)

    assert str(file) in detail
    assert reason in detail


def test_a_file_named_on_the_command_line_must_exist(cwd: Path):
    """``--config`` never falls back to another file."""
    written(cwd, "mirror = true")

    with pytest.raises(SettingsError, match=r"missing\.toml: the settings file cannot be read: No such file"):
        load({}, {}, Path("missing.toml"), cwd)


@pytest.mark.timeout(5)
def test_what_is_no_regular_file_is_refused_at_once(cwd: Path):
    """A FIFO, a device or a directory in the place of the file is refused without waiting for it."""
    os.mkfifo(cwd / "fifo")

    for odd in (cwd / "fifo", Path("/dev/zero"), cwd):
        with pytest.raises(SettingsError):
            load({}, {}, odd, cwd)


def test_an_unknown_variable_is_refused(cwd: Path):
    """A mistyped variable never passes in silence; those of the client commands are no settings."""
    assert "did you mean HOLDFAST_SESSIONS__TTL?" in refusal(cwd, environ={"HOLDFAST_SESSION__TTL": "1h"})
    assert (
        load({}, {"HOLDFAST_TOKEN": "hf_x", "HOLDFASTING": "1"}, None, cwd).settings == load({}, {}, None, cwd).settings
    )


def test_a_variable_is_named_when_its_value_is_refused(cwd: Path):
    """The operator sees which variable to correct."""
    assert refusal(cwd, environ={"HOLDFAST_SESSIONS__TTL": "soon"}).startswith("HOLDFAST_SESSIONS__TTL: expected")
    assert refusal(cwd, environ={"HOLDFAST_DATA_DIR": ""}).startswith("HOLDFAST_DATA_DIR: expected a path")


@pytest.mark.parametrize("name", [n for n, s in all_settings().items() if isinstance(s.kind, Span | Size | Count)])
def test_every_limit_holds_just_below_at_and_just_above(cwd: Path, name: str):
    """The lowest and highest values pass, their neighbours outside do not."""
    kind = all_settings()[name].kind
    assert isinstance(kind, Span | Size | Count)

    for inside in (kind.low, kind.high):
        assert kind.check(inside) == inside
    for outside in (kind.low - 0.001 if isinstance(kind, Span) else kind.low - 1, kind.high + 1):
        with pytest.raises(ValueError, match="expected"):
            kind.check(outside)


# Units and addresses.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300s", 300),
        ("5m", 300),
        ("24h", 86400),
        ("90d", 7776000),
        ("500ms", 0.5),
        ("1.5h", 5400),
        ("7", 7),
        (0.25, 0.25),
    ],
)
def test_durations_are_read(text: str | float, seconds: float):
    """A number with a unit, or a number of seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("odd", ["", "5 minutes", "-1s", "1e3", "٣s", "1h30m", "nan", "9" * 400, -1, True, None, 1e400])
def test_odd_durations_are_refused(odd: object):
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(odd)


@given(st.integers(0, 10**10) | st.integers(0, 10**7).map(lambda ms: ms / 1000))
def test_a_formatted_duration_reads_back(seconds: float):
    """``parse_duration`` undoes ``format_duration``."""
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64KiB", 65536), ("256MiB", 2**28), ("1GB", 10**9), ("12", 12), ("3 b", 3), ("1mib", 2**20), (9, 9)],
)
def test_sizes_are_read(text: str | int, size: int):
    """Binary and decimal units, in either case, or a number of bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize("odd", ["", "1.5MiB", "-1", "1K", "1iB", "1 parsec", 1.0, False, None, -1])
def test_odd_sizes_are_refused(odd: object):
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(odd)


@given(st.integers(0, 2**60))
def test_a_formatted_size_reads_back(size: int):
    """``parse_size`` undoes ``format_size``."""
    assert parse_size(format_size(size)) == size


def test_addresses_are_read():
    """Sockets absolute or in the data directory; loopback hosts by number and by name."""
    data = Path("/data")

    assert parse_address("unix:", data) == UnixAddress(Path("/data/holdfast.sock"))
    assert parse_address("unix:/run/hf.sock", data) == UnixAddress(Path("/run/hf.sock"))
    assert parse_address("tcp:127.0.0.1:8765", data) == TcpAddress("127.0.0.1", 8765)
    assert parse_address("tcp:[::1]:0", data) == TcpAddress("::1", 0)
    assert parse_address("tcp:localhost:1", data) == TcpAddress("localhost", 1)


@pytest.mark.parametrize(
    "odd",
    ["", "unix", "tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:65536", "tcp:::1:1", "http://127.0.0.1:1", "tcp:127.0.0.1:-1"],
)
def test_odd_addresses_are_refused(odd: str):
    """The three forms are named."""
    with pytest.raises(ValueError, match="expected unix:PATH, unix: or tcp:HOST:PORT"):
        parse_address(odd, Path("/data"))


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.1.4", "example.org", "", "127.0.0.1.example.org"])
def test_only_loopback_is_listened_on(host: str):
    """A host that others can reach is refused with the reason."""
    with pytest.raises(ValueError, match="TLS proxy"):
        parse_address(f"tcp:{host}:8765", Path("/data"))


def test_a_socket_path_that_the_system_cannot_hold_is_refused(cwd: Path):
    """107 bytes, counted as bytes of the whole path, are the most."""
    longest = "/" + "é" * ((SOCKET_PATH_BYTES_MAX - 1) // 2)

    assert parse_address(f"unix:{longest}", cwd) == UnixAddress(Path(longest))
    with pytest.raises(ValueError, match="expected a socket path of at most 107 bytes"):
        parse_address(f"unix:{longest}x", cwd)
    assert "expected a socket path" in refusal(cwd, {"data_dir": "x" * 200})


# Reload.


def test_changes_are_sorted_by_what_a_reload_can_do(cwd: Path):
    """A changed time to live works at once, a changed address after a restart."""
    old = load({}, {}, None, cwd).settings
    new = load({"sessions.ttl": "1h", "listen": "tcp:127.0.0.1:1"}, {}, None, cwd).settings

    assert changes(old, new) == (["sessions.ttl"], ["listen"])
    assert changes(old, old) == ([], [])


def test_a_reload_keeps_what_needs_a_restart(cwd: Path):
    """The settings put to work have the new values of what is reloadable and the old ones of the rest."""
    old = load({}, {}, None, cwd).settings
    new = load({"sessions.ttl": "1h", "data_dir": "other", "listen": "unix:a.sock"}, {}, None, cwd).settings

    working = reloaded(old, new)

    assert working.sessions.ttl == 3600
    assert (working.data_dir, working.listen) == (old.data_dir, old.listen)
    assert changes(old, working)[1] == []


def test_where_data_lies_never_changes_by_reload():
    """Nothing that names the data or its form is reloadable."""
    assert not RELOADABLE & {"data_dir", "listen", "sessions.id_field", "orders.id_field", "stats.timezone"}


# The README.


def test_the_readme_lists_every_setting():
    """The table in the README is the one that the code renders."""
    found = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", README.read_text(), re.DOTALL)

    assert found is not None
    assert found[1].strip() == settings_table().strip()
