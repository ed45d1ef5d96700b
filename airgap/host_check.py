"""What a host should be before it serves: files, clock, disk, settings of the kernel, accounts.

`airgap doctor --system` prints it. The seal depends on none of this: it is proved at each start.
But a private key that others read, a log on a disk that forgets, or a clock that nobody sets are
found here before an auditor finds them. Every place is an argument: a test can describe any host.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from airgap.config import load_site
from airgap.enclave.inventory import examine as examine_gpu
from airgap.enclave.inventory import take
from airgap.host_setup import Places, differences, log_account
from airgap.install.record import last_record
from airgap.install.store import Store
from policy.errors import AirgapError
from policy.wording import counted

State = Literal["good", "look", "bad"]

LOW_SPACE: Final = 1 << 30  # bytes: the log and one small release
NO_SPACE: Final = 64 << 20
LOW_INODES: Final = 10_000
FORGETS: Final = {"tmpfs", "ramfs", "overlay", "squashfs"}
REMOTE: Final = {"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p"}
# As in packaging/sysctl.d/60-airgap.conf; a test compares them.
SETTINGS: Final[dict[str, tuple[str, ...]]] = {
    "kernel.yama.ptrace_scope": ("1", "2", "3"),
    "kernel.io_uring_disabled": ("1", "2"),
    "kernel.core_pattern": ("core",),
}
AHEAD: Final = timedelta(minutes=5)
_STA_UNSYNC: Final = 0x0040
_TELEMETRY_FROM: Final = (1, 29)  # onnxruntime sends by default from here on
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS: Final = 0o077


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `fix` is a command or a step that works offline."""

    name: str
    state: State
    found: str
    fix: str = ""


def clock_is_set() -> bool | None:
    """Tell whether the kernel counts its clock as synchronised; None where it will not say."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, 208 bytes; modes 0 only reads
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.adjtimex(buffer) < 0:
            return None
    except (OSError, AttributeError):
        return None
    # unsigned modes; long offset, freq, maxerror, esterror; int status
    status = int.from_bytes(buffer.raw[40:44], sys.byteorder)
    return not status & _STA_UNSYNC


@dataclass(frozen=True, slots=True)
class Host:
    """Where a host is looked at, and what the kernel says of it."""

    tree: Path
    top: Path = Path("/")  # /proc, /sys and /etc are read below it
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    clock_is_set: Callable[[], bool | None] = clock_is_set
    interpreter: Path = Path(sys.executable)
    trusted_owners: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Found:
    """Every check, in order."""

    checks: tuple[Check, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is bad."""
        return all(check.state != "bad" for check in self.checks)

    def as_document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "format": "airgap/doctor-system/1",
            "good": self.good,
            "checks": [asdict(check) for check in self.checks],
        }


def examine(host: Host) -> Found:
    """Look at everything; a check that cannot look says so and is no pass."""
    checks: list[Check] = []
    for look in (
        _tree,
        _private_files,
        _installation,
        _clock,
        _last_record,
        _space,
        _file_system,
        _entropy,
        _settings,
        _security_module,
        _gpu,
        _swap,
        _interpreter,
        _packages,
        _network,
    ):
        try:
            checks += look(host)
        except OSError as error:
            name = look.__name__.strip("_").replace("_", " ")
            what = f"{error.filename}: {error.strerror}"
            checks.append(Check(name, "bad", f"cannot be looked at: {what}", "run it as root"))
    return Found(tuple(checks))


# -- files ------------------------------------------------------------------------------------


def _tree(host: Host) -> Iterator[Check]:
    """Nobody else may change what decides: the tree, the folders above it, site.toml, rules."""
    if not host.tree.is_dir():
        yield Check("tree", "bad", f"{host.tree} is missing", "airgap site init")
        return
    owner = host.tree.stat().st_uid
    owners = {owner, *host.trusted_owners}
    wrong = [
        f"{place} may be changed by others"
        for place in (host.tree, *host.tree.parents)
        if place.stat().st_mode & _OTHERS_WRITE and not place.stat().st_mode & stat.S_ISVTX
    ]
    wrong += [
        f"{place} belongs to uid {place.stat().st_uid}"
        for place in host.tree.parents
        if place.stat().st_uid not in owners
    ]
    for name in ("site.toml", "trust", "policy", "store", "audit", "keys"):
        path = host.tree / name
        for each in (path, *(path.rglob("*") if name in {"trust", "policy"} else ())):
            if each.exists() and not each.is_symlink() and each.stat().st_mode & _OTHERS_WRITE:
                wrong.append(f"{each} may be changed by others")
    if wrong:
        yield Check("tree", "bad", _few(wrong), f"chmod -R go-w {host.tree}, and the folders above")
    else:
        yield Check("tree", "good", f"{host.tree}, changed by uid {owner} and root alone")


def _private_files(host: Host) -> Iterator[Check]:
    """A private key is for one account; so are records of hazards and held answers."""
    places = [
        *(host.tree / "keys").glob("*.pem"),
        *(host.tree / "restricted").glob("*"),
        *(host.tree / "holds").glob("*"),
    ]
    wrong = [str(path) for path in places if path.lstat().st_mode & _OTHERS]
    if wrong:
        fix = f"chmod -R go-rwx {host.tree}/keys/*.pem {host.tree}/restricted {host.tree}/holds"
        yield Check("private files", "bad", f"others read {_few(wrong)}", fix)
    else:
        yield Check(
            "private files", "good", f"{counted(len(places), 'file')}, for their owner alone"
        )


def _installation(host: Host) -> Iterator[Check]:
    """Where our units are: the daemon reads what root decides, and the log has its own account."""
    if not (host.top / "etc/systemd/system/airgap.service").is_file():
        return
    try:
        site = load_site(host.tree)
    except AirgapError as error:
        yield Check("installation", "bad", f"{error.code}: {error.message}", "edit site.toml")
        return
    wrong = differences(Places(host.tree, host.tree, system=True, host=host.top), site)
    if wrong:
        fix = "sh install.sh --bundle MEDIUM --system, once more: it sets owners and modes"
        yield Check("installation", "bad", _few(wrong), fix)
    elif site.service.socket is not None and site.audit.socket is None:
        fix = 'socket = "/run/airgap/audit.sock" under [audit] of site.toml, then install.sh again'
        yield Check("installation", "bad", "a daemon, and no service that owns the log", fix)
    else:
        yield Check("installation", "good", f"units; the log belongs to {log_account(site)}")


# -- time -------------------------------------------------------------------------------------


def _clock(host: Host) -> Iterator[Check]:
    held = host.clock_is_set()
    if held is None:
        yield Check("clock", "look", "the kernel does not say whether it is set")
    elif held:
        yield Check("clock", "good", "kept by a time service")
    else:
        yield Check(
            "clock",
            "look",
            "kept by nobody: rules and expiry take it for the truth",
            "chrony with a source inside the lab, or check it by hand and note that you did",
        )


def _last_record(host: Host) -> Iterator[Check]:
    """The clock may not lie before what has been."""
    try:
        floor = Store(host.tree / "store").floors(last_record(host.tree)).clock
    except AirgapError as error:
        yield Check("last record", "bad", f"{error.code}: {error.message}", "airgap audit verify")
        return
    if floor is None:
        yield Check("last record", "good", "none yet")
    elif host.now() + AHEAD < floor:
        yield Check(
            "last record",
            "bad",
            f"{floor:%Y-%m-%d %H:%M} UTC, and the clock says {host.now():%Y-%m-%d %H:%M}",
            "set the clock; if it ran ahead before: airgap trust clock",
        )
    else:
        yield Check("last record", "good", f"{floor:%Y-%m-%d %H:%M} UTC, not after the clock")


# -- disk -------------------------------------------------------------------------------------


def _space(host: Host) -> Iterator[Check]:
    found = os.statvfs(_existing(host.tree))
    free = found.f_bavail * found.f_frsize
    state: State = "bad" if free < NO_SPACE else "look" if free < LOW_SPACE else "good"
    fix = "" if state == "good" else "free space; airgap remove NAME, airgap audit export and prune"
    yield Check("space", state, f"{free / 2**30:.1f} GiB free at {host.tree}", fix)
    if found.f_files and found.f_favail < LOW_INODES:
        yield Check("inodes", "look", f"{found.f_favail:,} free", "the log needs names: free some")
    if found.f_flag & os.ST_RDONLY:
        yield Check("mount", "bad", f"{host.tree} is mounted read-only", "remount it read-write")


def _file_system(host: Host) -> Iterator[Check]:
    kind = _mounted(host.top / "proc/self/mounts", _existing(host.tree))
    if kind in FORGETS:
        yield Check(
            "file system",
            "look" if kind == "overlay" else "bad",
            f"{kind}: what is on record may be gone after the next start",
            "put the tree on a disk: --root DIR",
        )
    elif kind in REMOTE:
        fix = "put the tree on a local disk: --root DIR"
        yield Check("file system", "look", f"{kind}: locks and syncs are another host's", fix)
    else:
        yield Check("file system", "good", kind or "unknown")


def _mounted(table: Path, path: Path) -> str:
    """Return the type of the file system that a path lies on."""
    best, kind = -1, ""
    for line in table.read_text("utf-8", "replace").splitlines():
        fields = line.split()
        point = Path(fields[1].replace("\\040", " "))
        if path.resolve().is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


# -- kernel -----------------------------------------------------------------------------------


def _entropy(host: Host) -> Iterator[Check]:
    found = int((host.top / "proc/sys/kernel/random/entropy_avail").read_text())
    if found < 256:  # noqa: PLR2004 - bits of a full pool since Linux 5.18
        yield Check("entropy", "look", f"{found} bits", "wait a minute, or give the host a source")
    else:
        yield Check("entropy", "good", f"{found} bits")


def _settings(host: Host) -> Iterator[Check]:
    for name, wanted in SETTINGS.items():
        path = host.top / "proc/sys" / name.replace(".", "/")
        try:
            found = path.read_text().strip()
        except FileNotFoundError:
            yield Check(name, "look", "this kernel does not have it")
            continue
        if found in wanted:
            yield Check(name, "good", found)
        else:
            fix = f"sysctl -w {name}={wanted[0]}; packaging/sysctl.d keeps it"
            yield Check(name, "look", f"{found:.60}", fix)


def _security_module(host: Host) -> Iterator[Check]:
    selinux = host.top / "sys/fs/selinux/enforce"
    apparmor = host.top / "sys/module/apparmor/parameters/enabled"
    if selinux.is_file():
        on = selinux.read_text().strip() == "1"
        words = "SELinux enforces" if on else "SELinux is there and does not enforce"
        fix = "" if on else "setenforce 1; packaging/README.md says what to label"
        yield Check("security module", "good" if on else "look", words, fix)
    elif apparmor.is_file() and apparmor.read_text().strip() == "Y":
        loaded = host.top / "sys/kernel/security/apparmor/profiles"
        ours = loaded.is_file() and any(
            line.startswith(("airgap ", "/opt/airgap")) for line in loaded.read_text().splitlines()
        )
        words = "AppArmor, our profile is loaded" if ours else "AppArmor, our profile is not loaded"
        fix = "" if ours else "apparmor_parser -r /etc/apparmor.d/airgap; needed on Ubuntu alone"
        yield Check("security module", "good" if ours else "look", words, fix)
    else:
        yield Check("security module", "look", "none is active", "the seal needs none")


def _gpu(host: Host) -> Iterator[Check]:
    if not list((host.top / "dev").glob("nvidia[0-9]*")):
        yield Check("gpu", "good", "none, and none is needed")
        return
    found = examine_gpu(take())
    if found.cuda:
        yield Check("gpu", "good", "driver and libraries fit")
    else:
        yield Check("gpu", "look", "driver and libraries do not fit", "airgap doctor --gpu")


def _swap(host: Host) -> Iterator[Check]:
    lines = (host.top / "proc/swaps").read_text().splitlines()[1:]
    plain = [line.split()[0] for line in lines if not line.startswith(("/dev/dm-", "/dev/zram"))]
    if plain:
        fix = "swapoff -a, or encrypt it: prompts and answers pass through memory"
        yield Check("swap", "look", f"{_few(plain)} may hold what was in memory", fix)
    else:
        yield Check("swap", "good", "none, or encrypted or in memory")


# -- program ----------------------------------------------------------------------------------


def _interpreter(host: Host) -> Iterator[Check]:
    path = host.interpreter.resolve()
    owners = {0, os.getuid()}
    wrong = [
        str(place)
        for place in (path, *path.parents)
        if place.stat().st_uid not in owners
        or (place.stat().st_mode & _OTHERS_WRITE and not place.stat().st_mode & stat.S_ISVTX)
    ]
    if wrong:
        fix = "install into a folder that root owns: sh install.sh --system"
        yield Check("interpreter", "bad", f"others may change {_few(wrong)}", fix)
    else:
        yield Check("interpreter", "good", str(path))


def _packages(host: Host) -> Iterator[Check]:
    del host
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in found.split(".")[:2])
        if numbers >= _TELEMETRY_FROM:
            fix = "install the pinned wheel of the bundle: versions from 1.29 on send telemetry"
            yield Check(name, "bad", found, fix)
        else:
            yield Check(name, "good", f"{found}, before telemetry")


def _network(host: Host) -> Iterator[Check]:
    """Say which way out the host has; the sealed processes have none, whatever is found."""
    routes = host.top / "proc/net/route"
    lines = routes.read_text().splitlines()[1:] if routes.is_file() else []
    out = sorted({line.split()[0] for line in lines if line.split()[1] == "00000000"})
    if out:
        words = f"a default route by {', '.join(out)}; the sealed processes have no network"
        yield Check("network", "look", words, "an isolated host has no default route")
    else:
        yield Check("network", "good", "no default route")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _few(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
