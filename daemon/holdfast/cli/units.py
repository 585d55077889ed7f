"""The units of systemd that come with the package, made to fit where it is installed and who runs it."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import NamedTuple

import holdfast
from holdfast.errors import HoldfastError

MARKER = "# Written by `holdfast install-service`, which writes it anew; for changes of your own: systemctl edit."
"""First line of every file of ours; one without it is somebody else's."""

_PROGRAM = "/opt/holdfast/bin/holdfast"
_DOCUMENTATION = "/opt/holdfast/share/doc/holdfast/systemd"

_NEEDS_ROOT = frozenset(
    {
        "AmbientCapabilities",
        "CapabilityBoundingSet",
        "DevicePolicy",
        "Group",
        "IPAddressAllow",
        "IPAddressDeny",
        "KeyringMode",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateNetwork",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "RemoveIPC",
        "SocketGroup",
        "SocketUser",
        "User",
    }
)
"""What the manager of a user cannot do, or only where the system allows user namespaces."""

_NOT_OF_A_USER = frozenset({"After", "StateDirectory", "StateDirectoryMode"})
"""What means something else there: no local-fs.target to wait for, and state would stand below the configuration."""

_NEEDS_QUOTES = re.compile(r"[^A-Za-z0-9/._@+:,=~-]")


class Scope(NamedTuple):
    """Whose manager runs the service, with the places this implies.

    Attributes:
        units: where its manager looks for units that an operator writes.
        state: below it stand the data directories.
        config: the directory for settings.
        run: below it stand the sockets, as a unit names it.
        account: user and group it runs as; None for the caller's own.
    """

    units: Path
    state: Path
    config: Path
    run: str
    account: str | None

    @property
    def systemctl(self) -> list[str]:
        """The command that talks to the manager."""
        return ["systemctl"] if self.account else ["systemctl", "--user"]


SYSTEM = Scope(
    units=Path("/etc/systemd/system"),
    state=Path("/var/lib"),
    config=Path("/etc/holdfast"),
    run="/run",
    account="holdfast",
)


def of_user(home: Path) -> Scope:
    """The scope of the user at *home*, by the XDG variables where they are set."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    state = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    return Scope(units=config / "systemd/user", state=state, config=config / "holdfast", run="%t", account=None)


class Service(NamedTuple):
    """``holdfast.service`` with its socket, or an instance of the template ``holdfast@.service``."""

    instance: str

    @property
    def files(self) -> list[str]:
        """The unit files it needs."""
        return ["holdfast@.service"] if self.instance else ["holdfast.service", "holdfast.socket"]

    @property
    def name(self) -> str:
        """The unit that is started."""
        return f"holdfast@{self.instance}.service" if self.instance else "holdfast.service"

    @property
    def units(self) -> list[str]:
        """All units that are started, in that order."""
        return [self.name] if self.instance else ["holdfast.socket", self.name]

    @property
    def directory(self) -> str:
        """The name of its data directory, unless another is chosen."""
        return f"holdfast-{self.instance}" if self.instance else "holdfast"

    def group_socket(self, scope: Scope) -> str:
        """Where programs reach it, as a unit names it."""
        return f"{scope.run}/holdfast/{self.instance}/holdfast.sock" if self.instance else f"{scope.run}/holdfast.sock"


def shipped_units() -> Path:
    """The directory of the units: in the source tree, or where the wheel brought them.

    Raises:
        HoldfastError: the package was installed without them.
    """
    source = Path(holdfast.__file__).resolve().parents[2] / "systemd"
    if (source / "holdfast.service").is_file():
        return source
    for file in importlib.metadata.files("holdfast") or []:
        if file.name == "holdfast.service":
            found = Path(str(file.locate())).resolve().parent
            if found.is_dir():
                return found
    raise HoldfastError("the units of systemd are not installed with this package; install it again from its wheel")


def adapted(text: str, scope: Scope, program: Path, documentation: Path) -> str:
    """The unit *text* for *scope*, with *program* as its command."""
    lines = [MARKER, *text.splitlines()]
    if scope.account is None:
        lines = _without_what_needs_root(lines)
    replaced = "\n".join([*lines, ""])
    for shipped, here in _replacements(scope, program, documentation).items():
        replaced = replaced.replace(shipped, here)
    return replaced


def data_dir_drop_in(service: Service, scope: Scope, program: Path, data_dir: Path) -> dict[str, str]:
    """The drop-ins, by the unit they belong to, that move the data of *service* to *data_dir*."""
    command = f"{program} {{}} --data-dir {data_dir}"
    lines = [
        MARKER,
        "[Unit]",
        f"RequiresMountsFor={data_dir}",
        "",
        "[Service]",
        "ExecStart=",
        f"ExecStart={command.format('serve')}",
        "ExecReload=",
        f"ExecReload={command.format('reload')}",
    ]
    if scope.account:
        lines += ["StateDirectory=", f"ReadWritePaths={data_dir}"]
    drop_ins = {service.name: "\n".join([*lines, ""])}
    if not service.instance:
        addresses = [service.group_socket(scope), f"{data_dir}/holdfast.sock", "127.0.0.1:8765"]
        listen = [f"ListenStream={address}" for address in ["", *addresses]]
        drop_ins["holdfast.socket"] = "\n".join([MARKER, "[Socket]", *listen, ""])
    return drop_ins


def data_dir_of(drop_in: str) -> Path | None:
    """The directory that a drop-in of ``data_dir_drop_in`` names."""
    found = re.search(r"^ExecStart=\S+ serve --data-dir (\S+)$", drop_in, re.MULTILINE)
    return Path(found[1]) if found else None


def needs_quotes(path: Path) -> bool:
    """Whether *path* cannot stand in a unit as it is: a space ends it, a percent sign means something."""
    return _NEEDS_QUOTES.search(str(path)) is not None


def _replacements(scope: Scope, program: Path, documentation: Path) -> dict[str, str]:
    of_user = {
        "/var/lib/": f"{scope.state}/",
        "/run/": f"{scope.run}/",
        "/etc/holdfast/": f"{scope.config}/",
        # Where ./holdfast.toml is looked for; systemd has made it by then.
        "ConfigurationDirectory=holdfast\n": f"ConfigurationDirectory=holdfast\nWorkingDirectory={scope.config}\n",
        "SocketMode=0660": "SocketMode=0600",
        "multi-user.target": "default.target",
        "programs of the group holdfast": "programs of this user",
    }
    # Last, because these paths may contain what is replaced above.
    places = {_PROGRAM: str(program), _DOCUMENTATION: str(documentation)}
    places["See README.md beside this file."] = f"See {documentation}/README.md."
    return places if scope.account else of_user | places


def _without_what_needs_root(lines: list[str]) -> list[str]:
    kept: list[str] = []
    for line in lines:
        name, is_setting, _ = line.partition("=")
        if is_setting and not line.startswith("#") and name in _NEEDS_ROOT | _NOT_OF_A_USER:
            # A comment above it speaks of it.
            while kept and kept[-1].startswith("#"):
                kept.pop()
            continue
        kept.append(line)
    return kept
