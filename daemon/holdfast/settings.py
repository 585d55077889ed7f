"""What an operator may choose, read from every place where it may be said.

The structs below are the whole list: names, defaults, ranges, meaning. Command line goes over environment
over TOML file over defaults. Reading is strict: one unknown name, wrong type or value out of range refuses
the whole, so that a typing error never runs as a default.
"""

from __future__ import annotations

import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec

from holdfast.errors import SettingsError
from holdfast.ops import Durability

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
DECADE = 3650 * DAY

SOCKET_PATH_BYTES_MAX = 107
"""What fits into ``sockaddr_un`` on Linux with its closing NUL."""

CONFIG_BYTES_MAX = MIB
SYSTEM_CONFIG = Path("/etc/holdfast/holdfast.toml")
LOCAL_CONFIG = "holdfast.toml"
ENVIRONMENT_PREFIX = "HOLDFAST_"

SECRET_WORDS = ("IDENTITY", "SECRET", "ACCESS_KEY", "PASSWORD")
"""In the name of a variable that is no setting: somebody means to hand over a key."""

SECRET_KEY_PREFIX = "AGE-SECRET-KEY-"
"""How a secret key of age begins; upper case, as age-keygen writes it."""

RECIPIENT_PREFIXES = ("age1", "ssh-ed25519 ", "ssh-rsa ")
"""How a recipient begins that is written out; anything else is the path of a file of them."""

ENVIRONMENT_OF_OTHERS = frozenset({"HOLDFAST_CONFIG", "HOLDFAST_TOKEN", "HOLDFAST_CRASH"})
"""Variables with our prefix that are no settings: of the command line, of the client commands, of the test suite."""


# Units, as people write them.

_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s?(ms|s|m|h|d)?")
_SECONDS_IN = {"ms": 0.001, "s": 1.0, "m": MINUTE, "h": HOUR, "d": DAY}
_SIZE = re.compile(r"([0-9]{1,19})\s?([kmgt]?i?b)?", re.IGNORECASE)
_BYTES_IN = {
    "TiB": TIB,
    "TB": 10**12,
    "GiB": GIB,
    "GB": 10**9,
    "MiB": MIB,
    "MB": 10**6,
    "KiB": KIB,
    "KB": 10**3,
    "B": 1,
}
_BYTES_IN_LOWER = {unit.lower(): factor for unit, factor in _BYTES_IN.items()} | {"ib": 0}


def parse_duration(value: object) -> float:
    """Seconds of ``"300s"``, ``"5m"``, ``"24h"``, ``"90d"``, ``"500ms"``, or of a number of seconds.

    Raises:
        ValueError: none of these, negative, or not finite.
    """
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match:
            return float(match[1]) * _SECONDS_IN[match[2] or "s"]
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e15:
        return float(value)
    raise ValueError(f"expected a duration such as 500ms, 300s, 5m, 24h, 90d, found {_shown(value)}")


def format_duration(seconds: float) -> str:
    """The shortest text that ``parse_duration`` reads as *seconds*: ``"24h"``, ``"90d"``, ``"1.5s"``."""
    if math.isinf(seconds):
        return "never"
    # A single day reads better as 24h, which is also how the contract writes it.
    for unit, length, fewest in (("d", DAY, 2), ("h", HOUR, 1), ("m", MINUTE, 1), ("s", 1.0, 1)):
        if seconds >= fewest * length and seconds % length == 0:
            return f"{int(seconds // length)}{unit}"
    milliseconds = round(seconds * 1000, 6)
    return f"{milliseconds:g}ms" if seconds < 1 else f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def parse_size(value: object) -> int:
    """Bytes of ``"64KiB"``, ``"256MiB"``, ``"1GB"`` (decimal), or of a whole number of bytes.

    Raises:
        ValueError: none of these, or negative.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        factor = _BYTES_IN_LOWER[(match[2] or "b").lower()] if match else 0
        if match and factor:
            return int(match[1]) * factor
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"expected a size such as 64KiB, 256MiB, 1GB, found {_shown(value)}")


def format_size(size: int) -> str:
    """The shortest exact text of *size*: ``"256MiB"``, ``"1GB"``, ``"1000001B"``."""
    for unit, factor in _BYTES_IN.items():
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


# Addresses.


class UnixAddress(NamedTuple):
    """A socket file; its permissions are the credential."""

    path: Path


class TcpAddress(NamedTuple):
    """A loopback host with its port; 0 lets the system choose one."""

    host: str
    port: int


def parse_address(text: str, data_dir: Path) -> UnixAddress | TcpAddress:
    """The address that ``unix:PATH``, ``unix:`` alone (a socket in *data_dir*) or ``tcp:HOST:PORT`` names.

    Raises:
        ValueError: another form, a path too long for a socket, or a host that is not loopback.
    """
    scheme, separator, rest = text.partition(":")
    if scheme == "unix" and separator:
        path = data_dir / (rest or "holdfast.sock")
        if "\0" in rest or len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise ValueError(
                f"expected a socket path of at most {SOCKET_PATH_BYTES_MAX} bytes (a limit of the system), "
                f"found {len(os.fsencode(path))}: {_shown(str(path))}; choose a shorter one, such as unix:/run/holdfast.sock"
            )
        return UnixAddress(path)
    host, separator, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        separator = ""
    if scheme != "tcp" or not separator or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"expected unix:PATH, unix: or tcp:HOST:PORT, found {_shown(text)}")
    if not _is_loopback(host):
        raise ValueError(
            f"expected a loopback host (127.0.0.1, localhost, [::1]), found {_shown(host)}: "
            "Holdfast speaks no TLS, so put a TLS proxy before it to serve other machines"
        )
    return TcpAddress(host, int(port))


def _is_loopback(host: str) -> bool:
    import ipaddress  # here, because most runs keep the default address

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Kinds of settings: each knows its text form, its range, and how to refuse.


class Kind(msgspec.Struct, frozen=True):
    """How one setting is read and written.

    Attributes:
        meaning: one line for the operator, with the trade-off.
        restart: True when a change works only after a restart.
    """

    meaning: str
    restart: bool = False

    def from_text(self, text: str) -> object:
        """What a TOML file would hold for *text* of the command line or environment; *text* itself when unsure."""
        return text

    def check(self, raw: object) -> Any:
        """The setting's value for *raw*, a TOML value.

        Raises:
            ValueError: says what was expected and what was found.
        """
        raise NotImplementedError

    def write(self, value: Any) -> str:
        """*value* as an operator would write it in TOML."""
        return _quoted(str(value))


class Span(Kind, frozen=True, kw_only=True):
    """A duration in seconds, within a range."""

    low: float
    high: float

    def check(self, raw: object) -> float:
        seconds = parse_duration(raw)
        if not self.low <= seconds <= self.high:
            low, high = format_duration(self.low), format_duration(self.high)
            raise ValueError(f"expected a duration from {low} to {high}, found {_shown(raw)}")
        return seconds

    def write(self, value: Any) -> str:
        return _quoted(format_duration(value))


class Size(Kind, frozen=True, kw_only=True):
    """A number of bytes, within a range."""

    low: int
    high: int

    def check(self, raw: object) -> int:
        size = parse_size(raw)
        if not self.low <= size <= self.high:
            raise ValueError(
                f"expected a size from {format_size(self.low)} to {format_size(self.high)}, found {_shown(raw)}"
            )
        return size

    def write(self, value: Any) -> str:
        return _quoted(format_size(value))


class Count(Kind, frozen=True, kw_only=True):
    """A whole number, within a range."""

    low: int
    high: int

    def from_text(self, text: str) -> object:
        return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text

    def check(self, raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int) or not self.low <= raw <= self.high:
            raise ValueError(f"expected a whole number from {self.low} to {self.high}, found {_shown(raw)}")
        return raw

    def write(self, value: Any) -> str:
        return str(value)


class Flag(Kind, frozen=True):
    """Yes or no."""

    def from_text(self, text: str) -> object:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)

    def check(self, raw: object) -> bool:
        if not isinstance(raw, bool):
            raise ValueError(f"expected true or false, found {_shown(raw)}")
        return raw

    def write(self, value: Any) -> str:
        return "true" if value else "false"


class Choice(Kind, frozen=True, kw_only=True):
    """One word of a few."""

    of: tuple[str, ...]

    def check(self, raw: object) -> str:
        if not isinstance(raw, str) or raw not in self.of:
            raise ValueError(f"expected one of {', '.join(self.of)}, found {_shown(raw)}{_nearest(raw, self.of)}")
        return raw


class FieldName(Kind, frozen=True):
    """The name of a field in a record."""

    def check(self, raw: object) -> str:
        if not isinstance(raw, str) or not 0 < len(raw) <= 100 or not raw.isprintable() or raw == "_holdfast":
            raise ValueError(f"expected the name of a field, 1 to 100 printable characters, found {_shown(raw)}")
        return raw


class Zone(Kind, frozen=True):
    """A time zone of the IANA list."""

    def check(self, raw: object) -> str:
        from zoneinfo import ZoneInfo, available_timezones  # here, because most runs keep the default zone

        try:
            if isinstance(raw, str) and ZoneInfo(raw):
                return raw
        except (ValueError, LookupError, OSError):
            pass
        near = _nearest(raw, tuple(available_timezones()))
        raise ValueError(f"expected a time zone such as UTC or America/Bogota, found {_shown(raw)}{near}")


class Directory(Kind, frozen=True):
    """A path; what is relative starts at the working directory."""

    def check(self, raw: object) -> Path:
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise ValueError(f"expected a path, found {_shown(raw)}")
        return Path(raw).expanduser()


class KeyFile(Kind, frozen=True):
    """Where a secret is kept, never the secret: a path, or the name of a systemd credential; empty for none."""

    def check(self, raw: object) -> str:
        if isinstance(raw, str) and raw.lstrip().upper().startswith((SECRET_KEY_PREFIX, "-----BEGIN")):
            # What was found is not shown: this goes to a log.
            raise ValueError(
                "expected the path of a file with the key, found a key itself; put it into a file of mode 0600 and name that"
            )
        if not isinstance(raw, str) or not raw.isprintable() or "\0" in raw:
            raise ValueError(f"expected the path of a file, or the name of a systemd credential, found {_shown(raw)}")
        return raw


class Recipients(Kind, frozen=True):
    """For whom to encrypt: recipients of age, or files of them; none or more."""

    def from_text(self, text: str) -> object:
        return [part.strip() for part in text.split(",") if part.strip()]

    def check(self, raw: object) -> tuple[str, ...]:
        named = [raw] if isinstance(raw, str) else raw
        if SECRET_KEY_PREFIX in str(raw).upper():
            raise ValueError(
                "expected recipients (age1…), found a secret key; age-keygen -y KEYFILE prints its recipient"
            )
        if not isinstance(named, list) or not all(isinstance(one, str) and one.isprintable() and one for one in named):
            raise ValueError(
                f"expected recipients (age1…, ssh-ed25519 …) or the path of a file of them, found {_shown(raw)}"
            )
        return tuple(named)

    def write(self, value: Any) -> str:
        return f"[{', '.join(map(_quoted, value))}]"


class CopyPlace(Kind, frozen=True):
    """A second place for backups: a directory by its absolute path, or ``s3://BUCKET/PREFIX``; empty for none."""

    def check(self, raw: object) -> str:
        if isinstance(raw, str) and (
            raw == ""
            or (raw.startswith("/") and raw.isprintable())
            or re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,62}(/[A-Za-z0-9!_.*'()/-]*)?", raw)
        ):
            return raw
        raise ValueError(f"expected an absolute path or s3://BUCKET/PREFIX, found {_shown(raw)}")


class Endpoint(Kind, frozen=True):
    """The address of an S3-compatible server; empty for that of the region."""

    def check(self, raw: object) -> str:
        if isinstance(raw, str) and (raw == "" or re.fullmatch(r"https?://[^\s/@?#]+/?", raw)):
            return raw.rstrip("/")
        raise ValueError(f"expected https://HOST or http://HOST:PORT without a path, found {_shown(raw)}")


class Word(Kind, frozen=True):
    """A short name without spaces."""

    def check(self, raw: object) -> str:
        if isinstance(raw, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", raw):
            return raw
        raise ValueError(f"expected a name of letters, digits, dots and dashes, found {_shown(raw)}")


class Addresses(Kind, frozen=True):
    """Where to listen: one or more."""

    def from_text(self, text: str) -> object:
        return [part.strip() for part in text.split(",")]

    def check(self, raw: object) -> tuple[str, ...]:
        addresses = [raw] if isinstance(raw, str) else raw
        if not isinstance(addresses, list) or not addresses or not all(isinstance(one, str) for one in addresses):
            raise ValueError(f"expected a list of unix:PATH or tcp:HOST:PORT, found {_shown(raw)}")
        if len(set(addresses)) != len(addresses):
            raise ValueError(f"expected each address once, found {_shown(raw)}")
        for address in addresses:
            # The length of a socket's path depends on data_dir too; `load` looks at it when both are known.
            if not address.startswith("unix:"):
                parse_address(address, Path())
        return tuple(addresses)

    def write(self, value: Any) -> str:
        return f"[{', '.join(map(_quoted, value))}]"


# The settings.


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[sessions]``"""

    ttl: Annotated[
        float,
        Span(
            "A session idle for this long expires; a longer time costs memory, a shorter one loses unfinished chats.",
            low=1,
            high=DECADE,
        ),
    ] = DAY
    id_field: Annotated[
        str, FieldName("Field that holds a session's id; data written with another name is skipped.", True)
    ] = "recipientPhone"
    time_field: Annotated[str, FieldName("Field that holds a session's last activity, from which it ages.", True)] = (
        "lastActivity"
    )
    max_bytes: Annotated[
        int,
        Size("A larger session is refused with too_large; every byte of it stays in memory.", low=KIB, high=64 * MIB),
    ] = MIB


class OrderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[orders]``"""

    id_field: Annotated[
        str, FieldName("Field that holds an order's id; data written with another name is skipped.", True)
    ] = "odooOrderId"
    keep_completed: Annotated[
        float,
        Span(
            "Not used by this version, which keeps all completed orders: they leave only once an archive has them.",
            low=HOUR,
            high=DECADE,
        ),
    ] = 90 * DAY


class StatsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[stats]``"""

    keep_days: Annotated[
        int, Count("Days of sales figures kept day by day; the totals keep everything.", low=1, high=3650)
    ] = 90
    timezone: Annotated[
        str,
        Zone("Zone in which a day of sales begins, and in which timestamps without a zone are read.", True),
    ] = "UTC"


class RetentionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[retention]``"""

    archive_after: Annotated[
        float,
        Span(
            "A conversation without a message for this long is archived; a new message brings it back.",
            low=DAY,
            high=10 * DECADE,
        ),
    ] = 90 * DAY
    delete_after: Annotated[
        float,
        Span(
            "Messages older than this are deleted for good, but for those under a legal hold.",
            low=DAY,
            high=10 * DECADE,
        ),
    ] = 365 * DAY


class BackupSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[backups]``"""

    every: Annotated[
        float,
        Span(
            "Time between two backups; what did not change since the one before costs no room.",
            low=MINUTE,
            high=365 * DAY,
        ),
    ] = DAY
    keep: Annotated[
        int,
        Count(
            "Newest backups kept, and copies of files as they were before a start left records out; more reach further back.",
            low=1,
            high=10_000,
        ),
    ] = 10
    keep_daily: Annotated[
        int,
        Count("Days, the last ones with a backup, of each of which the newest is kept as well.", low=0, high=10_000),
    ] = 7
    keep_weekly: Annotated[
        int,
        Count("Weeks, the last ones with a backup, of each of which the newest is kept as well.", low=0, high=10_000),
    ] = 4
    keep_monthly: Annotated[
        int,
        Count("Months, the last ones with a backup, of each of which the newest is kept as well.", low=0, high=10_000),
    ] = 0
    pitr: Annotated[
        float,
        Span(
            "How far back any moment can be restored; keeps the journal, compressed, behind a backup that old; 0 keeps none.",
            low=0,
            high=365 * DAY,
        ),
    ] = 7 * DAY
    recipients: Annotated[
        tuple[str, ...],
        Recipients(
            "Encrypt backups and exports for these age recipients (age1…, ssh-ed25519 …), or for those in files of them; "
            "without an identity nobody here can read them again."
        ),
    ] = ()
    identity_file: Annotated[
        str,
        KeyFile(
            "File with the age key that opens them, or a systemd credential by its name; without it a backup is proved by "
            "its checksums only."
        ),
    ] = ""
    copy_to: Annotated[
        str,
        CopyPlace(
            "Copy each backup to this directory (another disk), or to s3://BUCKET/PREFIX; one place for each daemon."
        ),
    ] = ""
    copy_keep: Annotated[
        int, Count("Backups kept in the second place; more reach further back.", low=1, high=10_000)
    ] = 30
    s3_endpoint: Annotated[
        str, Endpoint("Address of an S3-compatible server; empty for that of Amazon in s3_region.")
    ] = ""
    s3_region: Annotated[str, Word("Region of the bucket, as its server names it.")] = "us-east-1"
    s3_credentials_file: Annotated[
        str,
        KeyFile(
            "File with aws_access_key_id and aws_secret_access_key, as that of the AWS tools, or a systemd credential by "
            "its name."
        ),
    ] = ""


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[limits]``"""

    disk_free: Annotated[
        int,
        Size(
            "Less room than this on the disk, or than a twentieth of it where that is less, is reported as degraded; 0 never.",
            low=0,
            high=TIB,
        ),
    ] = GIB
    header_bytes: Annotated[int, Size("Longer request headers are refused with 431.", low=KIB, high=MIB)] = 16 * KIB
    body_bytes: Annotated[
        int, Size("A longer request body is refused with too_large; each may be held in memory.", low=KIB, high=GIB)
    ] = 10 * MIB
    record_bytes: Annotated[int, Size("A larger record is refused with too_large.", low=KIB, high=64 * MIB)] = MIB
    message_bytes: Annotated[
        int,
        Size("A message with longer content, or metadata, is refused with too_large.", low=KIB, high=64 * MIB),
    ] = 256 * KIB
    depth: Annotated[int, Count("JSON nested deeper is refused with invalid_record.", low=1, high=200)] = 128
    keys: Annotated[
        int, Count("A record with more keys, counted at all depths, is refused.", low=1, high=1_000_000)
    ] = 10_000
    batch_ops: Annotated[
        int, Count("A batch of more ops is refused; a large one makes others wait.", low=1, high=1_000_000)
    ] = 10_000
    id_chars: Annotated[int, Count("A longer id is refused.", low=1, high=1024)] = 256
    page: Annotated[int, Count("Most items that one page of a list may have.", low=1, high=10_000)] = 1_000
    header_timeout: Annotated[
        float, Span("A request whose header takes longer to arrive is dropped.", low=0.1, high=HOUR)
    ] = 5.0
    body_timeout: Annotated[
        float,
        Span("A request whose body takes longer is dropped; a slow mobile uplink may need more.", low=0.1, high=HOUR),
    ] = 15.0
    keep_alive: Annotated[
        float,
        Span("An idle connection is closed after this; above a proxy's own value avoids races.", low=0.1, high=DAY),
    ] = 75.0
    connections: Annotated[
        int, Count("More connections at once are turned away; each costs a descriptor.", low=1, high=1_000_000)
    ] = 1_000
    streams: Annotated[
        int, Count("More event streams at once are refused; each is a connection as well.", low=0, high=1_000_000)
    ] = 100
    heartbeat: Annotated[
        float,
        Span(
            "An event stream without events carries a sign of life so often; below a proxy's own limit.",
            low=0.1,
            high=HOUR,
        ),
    ] = 15.0
    stream_stall: Annotated[
        float,
        Span(
            "A reader of an event stream that takes nothing for so long is cut off; it may resume.", low=0.1, high=HOUR
        ),
    ] = 30.0


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[log]``"""

    level: Annotated[str, Choice("Least severity that is logged.", of=("debug", "info", "warning", "error"))] = "info"
    format: Annotated[
        str,
        Choice("JSON lines, coloured text, or auto: text on a terminal only.", True, of=("auto", "json", "console")),
    ] = "auto"
    redact: Annotated[
        bool, Flag("Hide phone numbers, names and texts; false shows them whole, for a test machine only.")
    ] = True


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator may choose. Durations are seconds, sizes bytes; never changed, only replaced."""

    data_dir: Annotated[
        Path,
        Directory("Where all data is; on a local disk, for file locks and sync do not hold on network ones.", True),
    ] = Path("data")
    listen: Annotated[
        tuple[str, ...],
        Addresses("Unix sockets (unix: alone is holdfast.sock in data_dir) or loopback TCP to serve on.", True),
    ] = ("unix:", "tcp:127.0.0.1:8765")
    durability: Annotated[
        Durability,
        Choice(
            "When a change is acknowledged: after fsync; after write, with an fsync each second; at once, saved at a flush.",
            False,
            of=get_args(Durability),
        ),
    ] = "always"
    flush_every: Annotated[
        float,
        Span("Time between two flushes; shorter makes a restart faster and writes more.", low=1, high=DAY),
    ] = 5 * MINUTE
    journal_max: Annotated[
        int,
        Size("A journal grown past this is flushed early; larger makes a restart slower.", low=64 * KIB, high=GIB),
    ] = 256 * MIB
    journal_keep: Annotated[
        int,
        Size(
            "Journal kept behind the flushes, from which event streams resume; not kept when the disk is short of room.",
            low=0,
            high=GIB,
        ),
    ] = 16 * MIB
    shutdown_timeout: Annotated[
        float,
        Span("The whole of a stop; keep it below TimeoutStopSec of systemd.", low=1, high=HOUR),
    ] = 25.0
    mirror: Annotated[
        bool,
        Flag(
            "Also write each conversation as a readable JSON file, at each flush; costs a file and a sync for each.",
            True,
        ),
    ] = False
    recovery: Annotated[
        Literal["available", "strict"],
        Choice(
            "When nothing can be read back: start empty and degraded, or refuse to start (exit 4).",
            True,
            of=("available", "strict"),
        ),
    ] = "available"
    sessions: SessionSettings = SessionSettings()
    orders: OrderSettings = OrderSettings()
    stats: StatsSettings = StatsSettings()
    retention: RetentionSettings = RetentionSettings()
    backups: BackupSettings = BackupSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()


class Setting(NamedTuple):
    """One setting: its dotted *name*, its *kind*, its *default*."""

    name: str
    kind: Kind
    default: Any

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENVIRONMENT_PREFIX + self.name.upper().replace(".", "__")


def _listed(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[Setting]:
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        if isinstance(hint, type):
            yield from _listed(hint, f"{field.name}.")
        else:
            yield Setting(prefix + field.name, hint.__metadata__[0], field.default)


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its dotted name, in the order of the structs."""
    return {setting.name: setting for setting in _listed(Settings)}


def value_of(settings: Settings, name: str) -> Any:
    """The value of the setting with the dotted *name*."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


# Reading.


class LoadedSettings(msgspec.Struct, frozen=True):
    """Settings with where they came from.

    Attributes:
        origins: for every dotted name the file, the variable, ``"command line"`` or ``"default"``.
        file: the settings file that was read, if any.
        watch: files whose change may change the settings.
    """

    settings: Settings
    origins: dict[str, str]
    file: Path | None
    watch: list[Path]


def load(
    overrides: Mapping[str, str],
    environ: Mapping[str, str],
    config: Path | None = None,
    cwd: Path | None = None,
) -> LoadedSettings:
    """The effective settings: *overrides* (dotted names) over *environ* over a TOML file over defaults.

    The file is *config*, which must then exist, or ``holdfast.toml`` in *cwd*, or the one in /etc. All paths
    in the result are absolute.

    Raises:
        SettingsError: something is unknown, wrong or out of range; names the source, what was expected and found.
    """
    cwd = (cwd or Path.cwd()).absolute()
    candidates = [cwd / config] if config else [cwd / LOCAL_CONFIG, SYSTEM_CONFIG]
    file = candidates[0] if config else next((path for path in candidates if os.path.exists(path)), None)

    values: dict[str, Any] = {}
    origins = dict.fromkeys(all_settings(), "default")
    for name, raw, origin in [*_from_file(file), *_from_environment(environ), *_from_command_line(overrides)]:
        where = f"{origin}: {name}" if origin in (str(file), "command line") else origin
        values[name] = _checked(name, raw, where)
        origins[name] = origin

    settings = _assembled(values, cwd)
    _check_addresses(settings, origins)
    _check_retention(settings, origins)
    return LoadedSettings(
        settings, origins, file, [file] if file else [one for one in candidates if one.parent.is_dir()]
    )


def chosen(overrides: Mapping[str, object]) -> Settings:
    """The settings of a program that opens the data itself: *overrides* (dotted names) over defaults.

    Neither files nor environment are read; a relative ``data_dir`` is below the working directory.

    Raises:
        SettingsError: something is unknown, wrong or out of range.
    """
    values = {name: _checked(name, raw, f"keyword: {name}") for name, raw in overrides.items()}
    settings = _assembled(values, Path.cwd())
    _check_retention(settings, dict.fromkeys(all_settings(), "keyword"))
    return settings


def _from_file(file: Path | None) -> Iterator[tuple[str, object, str]]:
    if file is None:
        return
    for name, raw in _read_toml(file).items():
        if not isinstance(raw, dict):
            yield name, raw, str(file)
            continue
        if name in all_settings():
            yield name, raw, str(file)
            continue
        if name not in _sections():
            raise SettingsError(
                f"{file}: no section [{name}]{_nearest(name, _sections())}; known: {', '.join(_sections())}"
            )
        for key, value in raw.items():
            yield f"{name}.{key}", value, str(file)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    if environ.get("DATA_DIR"):
        yield "data_dir", environ["DATA_DIR"], "DATA_DIR"
    names = {setting.variable: setting for setting in all_settings().values()}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in ENVIRONMENT_OF_OTHERS:
            continue
        if variable not in names:
            if any(word in variable for word in SECRET_WORDS):
                raise SettingsError(
                    f"{variable}: keys are not taken from the environment, which other programs can read; put the key into "
                    "a file of mode 0600, or a systemd credential, and name it by backups.identity_file or "
                    "backups.s3_credentials_file"
                )
            raise SettingsError(f"{variable}: no setting has this variable{_nearest(variable, tuple(names))}")
        setting = names[variable]
        yield setting.name, setting.kind.from_text(environ[variable]), variable


def _from_command_line(overrides: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    for name, text in overrides.items():
        setting = all_settings().get(name)
        yield name, setting.kind.from_text(text) if setting else text, "command line"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        # O_NONBLOCK, so that a FIFO of this name is refused and not waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SettingsError(f"{file}: expected a regular file with settings in TOML, found something else")
            content = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(
            f"{file}: the settings file cannot be read: {error.strerror}; create it or correct --config"
        ) from error
    if len(content) > CONFIG_BYTES_MAX:
        raise SettingsError(f"{file}: expected at most {format_size(CONFIG_BYTES_MAX)} of settings, found more")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: expected TOML in UTF-8, found something else: {error}") from error


def _checked(name: str, raw: object, where: str) -> Any:
    setting = all_settings().get(name)
    if setting is None:
        inside = f"; [{name}] is a section, name one of its settings" if name in _sections() else ""
        raise SettingsError(f"{where}: no such setting{inside or _nearest(name, tuple(all_settings()))}")
    try:
        return setting.kind.check(raw)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from error


def _assembled(values: dict[str, Any], cwd: Path) -> Settings:
    top: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    top["data_dir"] = Path(os.path.normpath(cwd / top.get("data_dir", Settings().data_dir)))
    for section in _sections():
        start = len(section) + 1
        given = {name[start:]: value for name, value in values.items() if name.startswith(f"{section}.")}
        top[section] = msgspec.structs.replace(getattr(Settings(), section), **given)
    # Socket paths start at the working directory, like every other path; only `unix:` alone means data_dir.
    listen = top.get("listen", Settings().listen)
    top["listen"] = tuple(f"unix:{cwd / one[5:]}" if one[:5] == "unix:" and one[5:] else one for one in listen)
    return Settings(**top)


def _check_addresses(settings: Settings, origins: Mapping[str, str]) -> None:
    for address in settings.listen:
        try:
            parse_address(address, settings.data_dir)
        except ValueError as error:
            raise SettingsError(f"{origins['listen']}: listen: {error}") from error


def _check_retention(settings: Settings, origins: Mapping[str, str]) -> None:
    retention = settings.retention
    if retention.delete_after < retention.archive_after:
        raise SettingsError(
            f"{origins['retention.delete_after']}: retention.delete_after: expected at least retention.archive_after "
            f"({format_duration(retention.archive_after)}), found {format_duration(retention.delete_after)}"
        )


def _sections() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.partition(".")[0] for name in all_settings() if "." in name))


def _nearest(found: object, known: tuple[str, ...]) -> str:
    import difflib  # here, because only an error needs it

    near = difflib.get_close_matches(str(found)[:100], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


# Changing while running.

RELOADABLE: frozenset[str] = frozenset(name for name, setting in all_settings().items() if not setting.kind.restart)
"""Names of the settings that a reload changes; the others wait for a restart."""


def changes(old: Settings, new: Settings) -> tuple[list[str], list[str]]:
    """Names that differ: those a reload applies, and those that need a restart."""
    differing = [name for name in all_settings() if value_of(old, name) != value_of(new, name)]
    return [one for one in differing if one in RELOADABLE], [one for one in differing if one not in RELOADABLE]


def reloaded(old: Settings, new: Settings) -> Settings:
    """*new*, but with *old*'s value wherever a change needs a restart: what a reload may put to work."""
    kept = {name: value_of(old if name not in RELOADABLE else new, name) for name in all_settings()}
    return _assembled(kept, old.data_dir)


# Showing.


def describe(loaded: LoadedSettings) -> Iterator[tuple[str, str, str, str]]:
    """For every setting its name, its value as TOML, where it came from, its meaning."""
    for name, setting in all_settings().items():
        value = setting.kind.write(value_of(loaded.settings, name))
        yield name, value, loaded.origins[name], setting.kind.meaning


def settings_table() -> str:
    """The Markdown table of all settings that stands in the README."""
    lines = ["| setting | default | reload | meaning |", "| --- | --- | --- | --- |"]
    for name, setting in all_settings().items():
        reload = "restart" if setting.kind.restart else "yes"
        lines.append(f"| `{name}` | `{setting.kind.write(setting.default)}` | {reload} | {setting.kind.meaning} |")
    return "\n".join(lines) + "\n"
