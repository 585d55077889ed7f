"""Makes a throw-away copy of this machine's file system, enters it and becomes its systemd; run by ``lab.py`` in new namespaces.

Needs nothing but the standard library and the programs of util-linux: it is started as a plain script.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

CLONE_NEWCGROUP = 0x02000000

SYSTEMD = "/lib/systemd/systemd"

MASKED = [
    "dev-hugepages.mount",
    "getty.target",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-modules-load.service",
    "systemd-remount-fs.service",
    "systemd-resolved.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp.service",
]
"""Units that look after hardware, which is not ours here."""

TARGET = """[Unit]
Description=What the tests need
Requires=sysinit.target systemd-journald.service
Wants=dbus.socket
After=sysinit.target dbus.socket systemd-journald.service
AllowIsolate=yes
"""

JOURNALD = """[Journal]
Storage=volatile
RuntimeMaxUse=256M
RateLimitIntervalSec=0
ForwardToSyslog=no
ForwardToWall=no
"""
"""No limit on the rate: the tests count lines."""


def main() -> None:
    """Boot; the first argument is a JSON object: ``scratch`` directory, ``cgroup``, ``binds`` from outside to inside."""
    options = json.loads(sys.argv[1])
    scratch, root = Path(options["scratch"]), Path(options["scratch"]) / "disk" / "root"
    # /proc is still the one of the outside, and so is the number.
    (scratch / "pid").write_text(os.readlink("/proc/self"))
    _mount("--make-rprivate", "/")
    _make_root(scratch / "disk", root)
    _make_devices(root / "dev")
    _make_kernel_views(root)
    for outside, inside in options["binds"].items():
        (root / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
        _mount("--rbind", outside, str(root / inside.lstrip("/")))
    _enter_cgroup(Path(options["cgroup"]), root)
    _write_configuration(root / "etc")
    os.chdir(root)
    (root / "mnt/outside").mkdir(parents=True)
    subprocess.run(["pivot_root", ".", "mnt/outside"], check=True)
    _mount("--make-rprivate", "/mnt/outside")
    subprocess.run(["umount", "-l", "/mnt/outside"], check=True)
    # systemd expects to be able to share what it mounts with its services.
    _mount("--make-rshared", "/")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environ = {"container": "holdfast-lab", "PATH": path, "LANG": "C.UTF-8"}
    os.execve(SYSTEMD, [SYSTEMD, "--system", "--unit=lab.target", "--log-target=journal", "--show-status=no"], environ)


def _make_root(disk: Path, root: Path) -> None:
    """The machine's own root, under a layer in memory that takes every change."""
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(disk))
    for name in ("upper", "work", "root"):
        (disk / name).mkdir()
    layers = f"lowerdir=/,upperdir={disk}/upper,workdir={disk}/work"
    _mount("-t", "overlay", "-o", layers, "overlay", str(root))
    for name, mode in (("run", "755"), ("tmp", "1777"), ("mnt", "755")):
        _mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", str(root / name))
    (root / "run/lock").mkdir()


def _make_devices(dev: Path) -> None:
    _mount("-t", "tmpfs", "-o", "mode=755,nosuid", "tmpfs", str(dev))
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (dev / name).touch()
        _mount("--bind", f"/dev/{name}", str(dev / name))
    (dev / "console").touch()
    _mount("--bind", "/dev/null", str(dev / "console"))
    for name in ("pts", "shm", "mqueue"):
        (dev / name).mkdir()
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "devpts", str(dev / "pts"))
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(dev / "shm"))
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd"} | {
        name: f"/proc/self/fd/{number}" for number, name in enumerate(("stdin", "stdout", "stderr"))
    }
    for name, target in links.items():
        (dev / name).symlink_to(target)


def _make_kernel_views(root: Path) -> None:
    """/proc and /sys, such that no setting of the kernel can be changed for the outside."""
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("--bind", str(root / "proc/sys"), str(root / "proc/sys"))
    _mount("-o", "remount,bind,ro", str(root / "proc/sys"))
    _mount("-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))


def _enter_cgroup(cgroup: Path, root: Path) -> None:
    """From now on *cgroup* is the root of the hierarchy."""
    (cgroup / "cgroup.procs").write_text("0")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWCGROUP) != 0:
        raise OSError(ctypes.get_errno(), "unshare of the cgroup namespace")
    _mount("-t", "cgroup2", "-o", "nosuid,nodev,noexec", "cgroup2", str(root / "sys/fs/cgroup"))


def _write_configuration(etc: Path) -> None:
    units = etc / "systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for wanted in [*units.glob("*.wants"), *units.glob("*.requires")]:
        subprocess.run(["rm", "-rf", str(wanted)], check=True)
    for name, content in (("machine-id", ""), ("fstab", ""), ("hostname", "lab\n")):
        (etc / name).unlink(missing_ok=True)
        (etc / name).write_text(content)
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    (units / "lab.target").write_text(TARGET)
    journald = etc / "systemd/journald.conf.d"
    journald.mkdir(parents=True, exist_ok=True)
    (journald / "lab.conf").write_text(JOURNALD)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
