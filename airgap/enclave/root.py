"""Step 7 of a launch: a root of read-only binds on a tmpfs (docs/design/enclave.md, 3).

Whatever the plan does not bind does not exist in there: no socket of a daemon, no automounter, no
`/proc`. Runs in the launcher, after it has a mount namespace of its own. Stdlib only.
"""

# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH112, PTH115, PTH118, PTH120, PTH211
# pathlib costs the launcher ten milliseconds
from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from airgap.enclave import linux

TYPE_CHECKING = (
    False  # the launcher has no use for the `typing` module; type checkers know this name
)
if TYPE_CHECKING:
    from airgap.enclave.plan import Bind, Plan


class RootError(Exception):
    """The private root is not what it should be."""


def private_root(plan: Plan) -> None:
    """Build a root of read-only binds on a tmpfs and pivot into it; the old tree is gone then."""
    os.umask(0o022)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    binds = plan["binds"]
    # Open every source first: the mount point may cover one of them.
    sources = {bind["path"]: os.open(bind["path"], os.O_PATH | os.O_CLOEXEC) for bind in binds}
    base = next(path for path in ("/tmp", "/mnt", "/srv", "/usr") if os.path.isdir(path))  # noqa: S108 - a mount point, covered at once
    options = f"mode=0755,size={plan['root_kib']}k"
    linux.mount("tmpfs", base, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    carriers = Carriers()
    for bind in binds:
        attach(base, bind, sources[bind["path"]], plan, carriers)
    for path, target in plan["links"]:
        if not os.path.lexists(base + path):
            os.symlink(target, base + path)
    protect(base, binds)
    old = os.path.join(base, ".old")
    os.mkdir(old)
    linux.call("pivot_root", linux.text(base), linux.text(old))
    os.chdir("/")
    linux.call("umount2", linux.text("/.old"), linux.MNT_DETACH)
    os.rmdir("/.old")
    linux.mount(
        None,
        "/",
        None,
        linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV,
    )
    for descriptor in sources.values():
        os.close(descriptor)
    carriers.close()
    if os.path.exists("/.old") or os.statvfs("/").f_flag & os.ST_RDONLY == 0:
        raise RootError("the private root is not closed")


def attach(base: str, bind: Bind, source: int, plan: Plan, carriers: Carriers) -> None:
    """Bind one source below `base`; as root, show the files of its owner as the worker's own."""
    target = base + bind["path"]
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    if bind["owner"] is not None and plan["identity"] is not None:
        try:
            attach_owned(source, target, carriers.of(bind["owner"], plan["identity"]))
        except OSError:
            pass  # a file system without idmapped mounts: `check_readable` decides
        else:
            return
    if bind["mode"] == "proc":  # of the own PID namespace: no other process has a name in it
        flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        linux.mount("proc", target, "proc", flags)
        return
    linux.mount(f"/proc/self/fd/{source}", target, None, linux.MS_BIND | linux.MS_REC)


_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH = 1, 0x1000, 4
_MOUNT_ATTR_IDMAP, _MOUNT_ATTR_RDONLY = 0x00100000, 1
_AT_FDCWD = -100


def attach_owned(source: int, target: str, namespace: int) -> None:
    """Bind read-only with the id map of a user namespace (`Carriers`)."""
    tree = linux.call(
        "open_tree", source, linux.text(""), _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC
    )
    try:
        content = struct.pack("<QQQQ", _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, namespace)
        attribute = ctypes.create_string_buffer(content, len(content))
        linux.call("mount_setattr", tree, linux.text(""), _AT_EMPTY_PATH, attribute, len(content))
        linux.call(
            "move_mount",
            tree,
            linux.text(""),
            _AT_FDCWD,
            linux.text(target),
            _MOVE_MOUNT_F_EMPTY_PATH,
        )
    finally:
        os.close(tree)


class Carriers:
    """User namespaces that carry the id map of a mount: what one owner has on disk is another's."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], int] = {}
        self._children: list[int] = []

    def of(self, owner: list[int], identity: list[int]) -> int:
        """Return a namespace in which the files of `owner` belong to `identity`."""
        key = (*owner, *identity)
        if key not in self._made:
            self._made[key] = self._make(owner, identity)
        return self._made[key]

    def close(self) -> None:
        """Close the namespaces and bury the processes that made them."""
        for namespace in self._made.values():
            os.close(namespace)
        for child in self._children:
            os.waitpid(child, 0)

    def _make(self, inside: list[int], outside: list[int]) -> int:
        told, tell = os.pipe()
        kept, keep = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(keep)
                linux.call("unshare", linux.CLONE_NEWUSER)
                # /proc still belongs to the outer PID namespace: this is the number that it knows.
                os.write(tell, os.readlink("/proc/self").encode())
                os.read(kept, 1)  # until it is killed
            finally:
                os._exit(0)
        self._children.append(child)
        os.close(tell)
        os.close(kept)
        try:
            number = os.read(told, 20).decode()
            if not number:
                raise OSError(errno.ENOSPC, "no user namespace can be made")
            linux.write_text(f"/proc/{number}/uid_map", f"{inside[0]} {outside[0]} 1")
            linux.write_text(f"/proc/{number}/gid_map", f"{inside[1]} {outside[1]} 1")
            return os.open(f"/proc/{number}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(told)
            os.close(keep)
            os.kill(child, linux.SIGKILL)


def protect(base: str, binds: list[Bind]) -> None:
    """Remount every bind, and whatever was mounted below it, with the flags of its mode."""
    modes = {base + bind["path"]: bind["mode"] for bind in binds}
    for point, options in mounts_below(base):
        owner = max(
            (path for path in modes if point == path or point.startswith(path + "/")),
            key=len,
            default=None,
        )
        if owner is None:
            raise RootError(f"a mount at {point!r} belongs to no source")
        mode = modes[owner]
        flags = linux.MS_BIND | linux.MS_REMOUNT | linux.MS_NOSUID | keep_flags(options)
        if mode == "read":
            flags |= linux.MS_RDONLY | linux.MS_NODEV
        elif mode in {"write", "proc"}:
            flags |= linux.MS_NODEV | linux.MS_NOEXEC
        else:
            flags |= linux.MS_NOEXEC
        linux.mount(None, point, None, flags)


def mounts_below(base: str) -> list[tuple[str, list[str]]]:
    """List (mount point, options) of this mount namespace below `base`, from mountinfo."""
    descriptor = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, encoding="utf-8", errors="surrogateescape") as file:
        return parse_mounts(file.read(), base)


def parse_mounts(mountinfo: str, base: str) -> list[tuple[str, list[str]]]:
    """Read mountinfo(5): id, parent id, device, root, mount point with octal escapes, options.

    Only what hangs below the last mount at `base` counts: that mount may cover others, whose names
    look the same.
    """
    rows = [line.split(" ") for line in mountinfo.splitlines()]
    own = [row[0] for row in rows if unescape(row[4]) == base]
    inside = set(own[-1:])
    out = []
    for row in rows:  # a mount is listed after its parent
        if row[1] in inside:
            inside.add(row[0])
            out.append((unescape(row[4]), row[5].split(",")))
    return out


def unescape(path: str) -> str:
    """Undo the octal escapes of space, tab, newline and backslash."""
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, sign)
    return path


_KEPT = {
    "ro": linux.MS_RDONLY,
    "nosuid": linux.MS_NOSUID,
    "nodev": linux.MS_NODEV,
    "noexec": linux.MS_NOEXEC,
    "noatime": linux.MS_NOATIME,
    "nodiratime": linux.MS_NODIRATIME,
    "relatime": linux.MS_RELATIME,
}


def keep_flags(options: list[str]) -> int:
    """Return the flags that a mount has: a user namespace locks them, so they are repeated."""
    flags = 0
    for option in options:
        flags |= _KEPT.get(option, 0)
    return flags
