"""A Debian root booted with its own systemd as PID 1: namespaces, no virtual machine, no nspawn.

The machine has PID, mount, network (a loopback, no route), IPC, UTS and cgroup namespaces of its
own and shares the kernel; as on a real host /proc is whole and root has every capability, which a
container of systemd-nspawn takes away, and without which no seal of rung A could be shown. What
belongs to the one kernel stays out of its reach: settings and modules are masked.

Nothing is left of it, whatever happens: PID 1 dies with the process that booted it (PDEATHSIG),
mounts go with their namespace, control groups are removed at the end or by the next machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NAME = "airgap-machine-"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("setpriv", "nsenter")
BOOT_S, HALT_S = 60.0, 20.0
# Units that would change the kernel that this machine shares with its host, or wait for hardware.
MASKED = (
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-udevd.service",
    "systemd-random-seed.service",
    "systemd-binfmt.service",
    "systemd-journald-audit.socket",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "getty.target",
    "console-getty.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)
# Runs as the first process of the new namespaces and becomes their init.
BOOT = """
set -eu
root=$1 medium=$2 cgroups=$3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for node in null zero full random urandom tty; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
if [ "$cgroups" = unified ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
    mount -t tmpfs -o mode=0755 tmpfs "$root/sys/fs/cgroup"
    for kind in $cgroups; do
        mkdir "$root/sys/fs/cgroup/${kind#name=}"
        case $kind in
            unified) mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified" ;;
            *) mount -t cgroup -o "$kind" cgroup "$root/sys/fs/cgroup/${kind#name=}" ;;
        esac
    done
fi
mkdir -p "$root/media/disc"
mount --bind "$medium" "$root/media/disc"
mount -o remount,bind,ro "$root/media/disc"
hostname lab-host-1
cd "$root"
pivot_root . mnt
exec chroot . /bin/sh -c 'umount -l /mnt
    exec env -i container=other PATH=$PATH /lib/systemd/systemd --log-target=journal' </dev/null
"""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command in the machine ended."""

    status: int
    said: str


class BrokenError(Exception):
    """The machine did not boot, or a command in it did not end as it had to."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted root. `pid` is its init, as this host counts; `medium` lies at /media/disc."""

    root: Path
    medium: Path
    pid: int

    def run(self, *argv: object, user: str = "", stdin: str = "", limit: float = 200.0) -> Done:
        """Run a command inside, as root or as an account with its groups."""
        enter = ["nsenter", f"--target={self.pid}", "--all", "--root", "--wd"]
        if user:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        done = subprocess.run(
            [*enter, *map(str, argv)],
            env={"PATH": PATH, "HOME": f"/home/{user}" if user else "/root", "LANG": "C.UTF-8"},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=limit,
        )
        return Done(done.returncode, done.stdout)

    def good(self, *argv: object, user: str = "", stdin: str = "", limit: float = 200.0) -> str:
        """Run a command that must end with 0, and return what it said."""
        done = self.run(*argv, user=user, stdin=stdin, limit=limit)
        if done.status:
            raise BrokenError(f"{' '.join(map(str, argv))}: {done.status}\n{done.said}")
        return done.said

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit, all where none is named."""
        words = [f"--property={','.join(names)}"] if names else []
        said = self.good("systemctl", "show", unit, *words)
        return dict(line.partition("=")[::2] for line in said.splitlines() if "=" in line)

    def pid_outside(self, pid: int) -> int:
        """Return the number that this host knows a process of the machine by."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                found = re.search(r"(?m)^NSpid:\t(\d+)\t(\d+)\b", status.read_text())
                if found and int(found[2]) == pid and self._holds(int(found[1])):
                    return int(found[1])
        raise BrokenError(f"no process {pid} in the machine")

    def _holds(self, pid: int) -> bool:
        """Tell whether a process of this host descends from the machine's init."""
        while pid not in {0, 1, self.pid}:
            found = re.search(r"(?m)^PPid:\t(\d+)$", Path(f"/proc/{pid}/status").read_text())
            pid = int(found[1]) if found else 0
        return pid == self.pid

    def file(self, path: str) -> Path:
        """Return a file of the root, seen from here: not what is mounted over it inside."""
        return self.root / path.lstrip("/")


def reason_to_skip() -> str:
    """Say why no machine can boot here, or nothing; `bare_roots.reason_to_skip` says the rest."""
    kinds = _hierarchies()
    if not kinds:
        return f"no control groups at {CGROUPS}"
    try:
        for folder in _folders(kinds, NAME + "probe"):
            folder.mkdir(exist_ok=True)
            folder.rmdir()
    except OSError as error:
        return f"no control group can be made: {error}"
    probe = ["unshare", "--cgroup", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"]
    done = subprocess.run(probe, capture_output=True, check=False)
    return "this host gives out no namespaces" if done.returncode else ""


@contextlib.contextmanager
def booted(root: Path, medium: Path) -> Iterator[Machine]:
    """Boot a root, with the medium read-only at /media/disc, and halt it at the end."""
    _prepare(root)
    _sweep()
    kinds = _hierarchies()
    folders = _folders(kinds, f"{NAME}{os.getpid()}")
    for folder in folders:
        folder.mkdir()
        for name in ("cpuset.cpus", "cpuset.mems"):  # empty in a new group of the old hierarchy
            if kinds != ["unified"] and (folder / name).exists():
                (folder / name).write_text((folder.parent / name).read_text())
    join = 'for group in $GROUPS_TO_JOIN; do echo $$ > "$group/cgroup.procs"; done; exec "$@"'
    argv = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", join, "sh"]
    argv += ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--cgroup"]
    argv += ["--fork", "--kill-child", "sh", "-c", BOOT, "sh", str(root), str(medium)]
    try:
        outer = subprocess.Popen(
            [*argv, " ".join(kinds)],
            env={"PATH": PATH, "GROUPS_TO_JOIN": " ".join(map(str, folders))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            machine = Machine(root, medium, _init_of(outer))
            _wait(machine)
            yield machine
        finally:
            _halt(outer)
    finally:
        _remove(folders)


def _prepare(root: Path) -> None:
    """Mask what is not for it, and give it an identity, so that nothing counts as a first boot."""
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/hostname").write_text("lab-host-1\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost lab-host-1\n")
    (root / "etc/fstab").write_text("")


def _hierarchies() -> list[str]:
    """Return the kinds of control groups: `unified`, or those of a host that still has the old."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point, kind, options = Path(left.split()[4]), right.split()[0], right.split()[2].split(",")
        if kind == "cgroup2" and point == CGROUPS:
            return ["unified"]
        if kind == "cgroup2" and point == CGROUPS / "unified":
            found.append("unified")
        elif kind == "cgroup" and point.parent == CGROUPS:
            named = [each for each in options if each.startswith("name=")]
            found.append(named[0] if named else point.name)
    return found


def _folders(kinds: list[str], name: str) -> list[Path]:
    """Return the group of that name in each hierarchy, beside the one that this process is in."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)
        own[kind or "unified"] = path.lstrip("/")
    if kinds == ["unified"]:
        return [CGROUPS / name]
    return [CGROUPS / kind.removeprefix("name=") / own.get(kind, "") / name for kind in kinds]


def _init_of(outer: subprocess.Popen[str]) -> int:
    """Wait until unshare has its child."""
    until = time.monotonic() + BOOT_S
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while time.monotonic() < until and outer.poll() is None:
        with contextlib.suppress(OSError):
            if found := children.read_text().split():
                return int(found[0])
        time.sleep(0.05)
    raise BrokenError(
        f"no init: {outer.communicate()[0] if outer.poll() is not None else 'no child'}"
    )


def _wait(machine: Machine) -> None:
    """Wait until its systemd says that the machine runs."""
    until, said = time.monotonic() + BOOT_S, ""
    while time.monotonic() < until:
        if not Path(f"/proc/{machine.pid}").exists():
            raise BrokenError(f"init ended: {said}")
        comm = Path(f"/proc/{machine.pid}/comm").read_text().strip()
        if comm == "systemd":
            done = machine.run("systemctl", "is-system-running", "--wait")
            said = done.said.strip()
            if said in {"running", "degraded"}:
                return
        time.sleep(0.2)
    raise BrokenError(f"not up after {BOOT_S:.0f} s: {said}")


def _halt(outer: subprocess.Popen[str]) -> None:
    """End the machine: its init is killed with unshare, and everything in it with its init."""
    outer.send_signal(signal.SIGKILL)
    outer.communicate(timeout=HALT_S)


def _sweep() -> None:
    """Remove groups of machines whose process is gone."""
    for parent in _folders(_hierarchies(), ""):
        for folder in parent.glob(f"{NAME}*"):
            owner = folder.name.removeprefix(NAME)
            if not owner.isdigit() or not Path(f"/proc/{owner}").exists():
                _remove([folder])


def _remove(folders: list[Path]) -> None:
    """Remove groups and all below them, once the processes in them are gone."""
    until = time.monotonic() + HALT_S
    for folder in folders:
        while folder.exists():
            for each in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
                if each.is_dir():
                    with contextlib.suppress(OSError):
                        each.rmdir()
            with contextlib.suppress(OSError):
                folder.rmdir()
            if folder.exists():
                if time.monotonic() > until:
                    raise BrokenError(f"{folder} cannot be removed")
                time.sleep(0.1)


def clear(folder: Path) -> None:
    """Delete a folder of an earlier run; no mount of it can be left in this namespace."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if Path(line.split()[4]).is_relative_to(folder):
            raise BrokenError(f"{line.split()[4]} is mounted: it is not deleted")
    shutil.rmtree(folder, ignore_errors=True)
