"""What a system installation puts on its host, and takes away again: accounts, files, ownership.

`install.sh --system` brings it in by way of `airgap.bootstrap`; `airgap remove --all --system`
takes it away. One gate guards the tree: its top is for root and the group `airgap`. Below it the
daemon may read what root decides (site facts, trust root, rules, releases) and writes its own. The
log and its keys belong to `airgap-audit` where site.toml names the socket of that service, as a
host with a daemon does; else they are root's, who then is the only one to ask. The daemon never
owns the log: root would have to write into folders of an account that talks to people.
docs/design/enclave.md, 9.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from airgap.config import FILE_NAME, LOG_ACCOUNT, Site
from policy.errors import FaultError

GATE: Final = "airgap"  # the group that may enter the tree, and the daemon's account
_LOG_S: Final = 60.0
_PREFIX, _ROOT = "/opt/airgap", "/var/lib/airgap"  # as the shipped units name them
_UNITS = ("systemd", "/etc/systemd/system")
_FOLDERS = (("sysusers.d", "/etc/sysusers.d"), ("sysctl.d", "/etc/sysctl.d"))
_PROFILE = "/etc/apparmor.d/airgap"
_GROUP = re.compile(r"g (?P<name>[a-z-]+) - -")
_ACCOUNT = re.compile(r'u (?P<name>[a-z-]+) - "(?P<text>[^"]*)" (?P<home>\S+) (?P<shell>\S+)')
_FOR_GATE = ("trust", "policy", "store", "store/installed")  # root's; the daemon reads them
_DAEMONS = ("enclave", "enclave/running", "holds", "restricted")


@dataclass(frozen=True, slots=True)
class Program:
    """Runs a program; what it prints as JSON comes back. Replaced in tests of the order."""

    argv: tuple[str, ...] = field(
        default_factory=lambda: (
            sys.executable,
            "-I",
            str(Path(sys.executable).with_name("airgap")),
        )
    )

    def own(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Run one command of our own."""
        done = subprocess.run(
            [*self.argv, *words, "--json"], capture_output=True, text=True, check=False
        )
        try:
            return done.returncode, json.loads(done.stdout)
        except ValueError:
            return done.returncode, {"error": done.stderr.strip()[-400:]}

    def foreign(self, *argv: str) -> None:
        """Run a tool of the system; FaultError `host.io` with its words when it fails."""
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FaultError(
                "host.io", f"{argv[0]} ended with {done.returncode}: {done.stderr.strip():.300}"
            )


@dataclass(frozen=True, slots=True)
class Places:
    """Where things go. `host` stands before every absolute path of the system; `/` but in tests."""

    prefix: Path
    root: Path
    system: bool = False
    host: Path = Path("/")

    def on_host(self, path: str) -> Path:
        """Return a path of the system."""
        return self.host / path.lstrip("/")

    @property
    def real(self) -> bool:
        """Whether this is the host itself, whose accounts are asked for and made."""
        return self.host == Path("/")

    @property
    def live(self) -> bool:
        """Whether systemd runs this host."""
        return self.on_host("/run/systemd/system").is_dir()


def packaged() -> Path:
    """Return the folder of units and profiles: inside the package, or in the checkout."""
    inside = Path(str(resources.files("airgap"))) / "packaging"
    return inside if inside.is_dir() else inside.parents[1] / "packaging"


def set_up(places: Places, site: Site, program: Program) -> Iterator[tuple[bool, str]]:
    """Bring accounts, files and owners to their state; yield whether each changed, and what."""
    yield from _accounts(places, packaged() / "sysusers.d" / "airgap.conf", program)
    pairs = _files(places)
    changed = [target for source, target in pairs if _install_file(source, target, places)]
    for _, target in pairs:
        yield target in changed, str(target)
    if changed and places.live:
        program.foreign("systemctl", "daemon-reload")
    profile = places.on_host(_PROFILE)
    if profile in changed and _apparmor(places):
        program.foreign("apparmor_parser", "-r", str(profile))
    yield settle(places, site), f"owners and modes in {places.root}"


def settle(places: Places, site: Site) -> bool:
    """Give everything its owner and mode; tell whether anything changed."""
    owners = _owners(places, site)
    moved = [path for path, wanted in owners.items() if _settle(path, *wanted)]
    for path in _closed(places.root):
        moved.append(path)
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    return bool(moved)


def settle_restored(places: Places, site: Site) -> str:
    """Give a tree that root restored to the accounts of this host; return what is left to do.

    A tree whose log no service holds stays root's. Without the accounts of an installation nobody
    is guessed: `install.sh --system` makes them, and gives the tree to them.
    """
    if os.geteuid() or site.audit.socket is None:
        return ""
    known = has_account(GATE) and has_account(LOG_ACCOUNT) and has_group(GATE)
    if places.real and not known:
        return f"there is no account {LOG_ACCOUNT} here: install.sh --system before the service"
    settle(places, site)
    return ""


@contextmanager
def log_served(places: Places, site: Site, program: Program) -> Iterator[None]:
    """Have the log served while the block runs, as its account, where its unit is not started yet.

    A first installation needs it: the program gets its place last, and no unit can start before.

    Raises:
        FaultError: `audit.service`, with what the service said.

    """
    path = None if site.audit.socket is None else Path(site.audit.socket)
    if path is None or not (places.system and places.real) or _answers(path):
        yield
        return
    account = pwd.getpwnam(LOG_ACCOUNT)
    if not path.parent.exists():  # as RuntimeDirectory= of the unit will make it
        path.parent.mkdir(mode=0o750)
        os.chown(path.parent, account.pw_uid, account.pw_gid)
    words = ["audit", "serve", "--root", str(places.root), "--socket", str(path)]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [*program.argv, *words, "--group", GATE, "--broker", GATE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            umask=0o077,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
        )
        try:
            until = time.monotonic() + _LOG_S
            while not _answers(path):
                if child.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    told = said.read(4_000).decode("utf-8", "replace").strip()
                    raise FaultError(
                        "audit.service",
                        f"the log's service did not come up: {told[-400:]}",
                        hint="airgap doctor --system; then the same command again",
                    )
                time.sleep(0.1)
            yield
        finally:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LOG_S)
            child.kill()
            child.wait()


def _answers(path: Path) -> bool:
    """Tell whether somebody listens at a socket."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(2.0)
        trial.connect(str(path))
        return True
    return False


def differences(places: Places, site: Site) -> list[str]:
    """Return what of accounts, owners and modes is not as `set_up` leaves it."""
    names = [GATE, log_account(site)]
    if missing := [name for name in names if places.real and not has_account(name)]:
        return [f"there is no account {name}" for name in missing]
    found = [_differs(path, *wanted) for path, wanted in _owners(places, site).items()]
    found += [f"{path} cannot be read by the daemon" for path in _closed(places.root)]
    return [text for text in found if text]


def to_start(places: Places, site: Site) -> str:
    """Return the command that starts what site.toml asks for, empty where nothing is to start."""
    units = ["airgap-audit.service"] if site.audit.socket is not None else []
    units += ["airgap.socket", "airgap.service"] if site.service.socket is not None else []
    if not units or not places.system:
        return ""
    wanted = places.on_host(f"{_UNITS[1]}/multi-user.target.wants/{units[-1]}")
    act = "restart" if wanted.exists() else "enable --now"
    return f"systemctl {act} {' '.join(units)}"


def stop_daemon(places: Places, program: Program) -> None:
    """Stop what answers people, where systemd runs it; requests under way end first."""
    names = ("airgap.socket", "airgap.service")
    there = [name for name in names if places.on_host(f"{_UNITS[1]}/{name}").exists()]
    if there and places.live:
        program.foreign("systemctl", "stop", *there)


def take_down(places: Places, program: Program) -> Iterator[str]:
    """Stop what runs, and remove what `set_up` wrote to the system; yield each thing that is gone.

    Accounts stay: the log belongs to one. So does the program, which cannot remove itself.
    """
    pairs = _files(places)
    units = [target for _, target in pairs if target.parent == places.on_host(_UNITS[1])]
    # A template has no state of its own; what was started from it is a request, and ends by itself.
    there = [path.name for path in units if path.exists() and "@" not in path.name]
    if there and places.live:
        program.foreign("systemctl", "disable", "--now", *there)
    profile = places.on_host(_PROFILE)
    if profile.exists() and _apparmor(places):
        program.foreign("apparmor_parser", "-R", str(profile))
    answers = places.on_host("/run").glob("airgap-run-*.json")  # of single requests
    for target in (*(target for _, target in pairs), *sorted(answers)):
        if target.is_file():
            target.unlink()
            yield str(target)
    if there and places.live:
        program.foreign("systemctl", "daemon-reload")


# -- accounts -------------------------------------------------------------------------------------


def _accounts(places: Places, listed: Path, program: Program) -> Iterator[tuple[bool, str]]:
    """Make the groups and accounts of the list that are missing."""
    lines = listed.read_text().splitlines()
    for found in filter(None, map(_GROUP.fullmatch, lines)):
        missing = places.real and not has_group(found["name"])
        if missing:
            program.foreign("groupadd", "--system", found["name"])
        yield missing, f"group {found['name']}"
    for found in filter(None, map(_ACCOUNT.fullmatch, lines)):
        missing = places.real and not has_account(found["name"])
        if missing:
            words = ["--system", "--gid", GATE, "--no-create-home", "--comment", found["text"]]
            words += ["--home-dir", str(places.root), "--shell", found["shell"]]
            program.foreign("useradd", *words, found["name"])
        yield missing, f"account {found['name']}"


def has_account(name: str) -> bool:
    """Tell whether this host knows an account."""
    with suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


def has_group(name: str) -> bool:
    """Tell whether this host knows a group."""
    with suppress(KeyError):
        return bool(grp.getgrnam(name))
    return False


# -- files ----------------------------------------------------------------------------------------


def _files(places: Places) -> list[tuple[Path, Path]]:
    """Return what is shipped for this host, each with its place."""
    source = packaged()
    pairs = [
        (path, places.on_host(_UNITS[1]) / path.name)
        for path in sorted((source / _UNITS[0]).iterdir())
        if path.suffix in {".service", ".socket", ".timer"}
    ]
    pairs += [
        (path, places.on_host(folder) / path.name)
        for name, folder in _FOLDERS
        for path in sorted((source / name).glob("*.conf"))
    ]
    if places.on_host(_PROFILE).parent.is_dir():
        pairs.append((source / "apparmor" / "airgap", places.on_host(_PROFILE)))
    return pairs


def _apparmor(places: Places) -> bool:
    loaded = places.on_host("/sys/kernel/security/apparmor").is_dir()
    return loaded and shutil.which("apparmor_parser") is not None


def _install_file(source: Path, target: Path, places: Places) -> bool:
    """Write a shipped file with the true places in it; tell whether it changed."""
    text = source.read_text("utf-8")
    runtimes = f"{places.prefix}/runtimes/*/bin"  # a profile attaches to the real file
    text = text.replace(f"profile airgap {_PREFIX}/bin", f"profile airgap {runtimes}")
    text = text.replace(_PREFIX, str(places.prefix)).replace(_ROOT, str(places.root))
    raw = text.encode()
    if target.is_file() and target.read_bytes() == raw:
        return False
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    place_file(target, raw, mode=0o644)
    return True


def place_file(target: Path, raw: bytes, mode: int = 0o600) -> None:
    """Write beside, sync, rename."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.chmod(mode)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


# -- owners ---------------------------------------------------------------------------------------


def log_account(site: Site) -> str:
    """Return the account that owns the log of a system installation."""
    return "root" if site.audit.socket is None else LOG_ACCOUNT


def _owners(places: Places, site: Site) -> dict[Path, tuple[int, int, int]]:
    """Return (uid, gid, mode) of each place of the tree; -1 leaves an owner as it is (tests)."""

    def uid(name: str) -> int:
        return pwd.getpwnam(name).pw_uid if places.real else -1

    root = uid("root")
    gate = grp.getgrnam(GATE).gr_gid if places.real else -1
    logs = root if site.audit.socket is None else gate
    tree = places.root
    return {
        tree: (root, gate, 0o750),
        tree / FILE_NAME: (root, root, 0o644),
        **{tree / name: (root, root, 0o755) for name in _FOR_GATE},
        **{tree / name: (uid(GATE), gate, 0o700) for name in _DAEMONS},
        tree / "audit": (uid(log_account(site)), logs, 0o700),
        tree / "keys": (uid(log_account(site)), gate, 0o750),  # public halves for the daemon
        places.on_host("/etc/airgap"): (root, root, 0o755),
        places.on_host("/etc/airgap/requests"): (root, root, 0o700),
    }


def _differs(path: Path, uid: int, gid: int, mode: int) -> str:
    """Say how a place differs from its owner and mode, empty where it does not."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return f"{path} is missing"
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link"
    if uid not in {-1, found.st_uid} or gid not in {-1, found.st_gid}:
        return f"{path} belongs to {found.st_uid}:{found.st_gid}, expected {uid}:{gid}"
    if stat.S_IMODE(found.st_mode) != mode:
        return f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, expected {mode:04o}"
    return ""


def _settle(path: Path, uid: int, gid: int, mode: int) -> bool:
    """Give a place its owner and mode, a missing folder is made; tell whether anything changed.

    Where a folder had another account, what lies in it goes along: that is the first run, or a
    change of who owns the log.
    """
    if not _differs(path, uid, gid, mode):
        return False
    if not os.path.lexists(path):
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise FaultError("host.state", f"{path} is a link", hint="put the folder itself there")
    if stat.S_ISDIR(found.st_mode) and uid not in {-1, found.st_uid}:
        _give(path, uid, gid)
    os.chown(path, uid, gid, follow_symlinks=False)
    path.chmod(mode)
    return True


def _closed(root: Path) -> list[Path]:
    """Return what root decides and the daemon could not read: written under a stricter umask."""
    found = [root / "store" / "state.json"]
    found += [path for name in ("trust", "policy") for path in (root / name).rglob("*")]
    found += (root / "keys").glob("*.pub")
    return [
        path
        for path in found
        if path.exists()
        and not path.is_symlink()
        and path.stat().st_mode & (wanted := 0o055 if path.is_dir() else 0o044) != wanted
    ]


def _give(folder: Path, uid: int, gid: int) -> None:
    """Give all in a folder to an account; no link is followed, no file with two names given."""
    for _, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                raise FaultError(
                    "host.state",
                    f"{name!r:.100} in {folder} has {found.st_nlink} names",
                    hint="somebody linked it: look at it, then remove it or its other name",
                )
            os.chown(name, uid, gid, dir_fd=descriptor, follow_symlinks=False)
