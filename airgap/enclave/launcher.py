"""Builds the seal around one process and turns it into the worker (docs/design/enclave.md, 3).

Runs as `python -I -S -B entry.py launcher`, one thread, standard library and ctypes only. Each
step either does all that it says or raises, and then nothing was started: the broker gets a
REFUSED frame that names the layer. Where a step can be tried out, it is; a return code of 0 is not
believed.
"""

# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH112, PTH115, PTH116, PTH118, PTH120, PTH208, PTH211
# pathlib costs the launcher ten milliseconds
from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import stat
import struct

from airgap.enclave import channel, filters, landlock, linux, tables
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT

TYPE_CHECKING = (
    False  # the launcher has no use for the `typing` module; type checkers know this name
)
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airgap.enclave.plan import Bind, Plan

PLAN_LIMIT = 1 << 20  # bytes
REFUSED_STATUS = 97  # exit status of a launcher that refused
SIGNAL_BASE = 128  # exit status of the waiting parent when a signal ended the worker
OPEN_DESCRIPTORS = 256

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_IFF_UP, _SIOCGIFFLAGS = 1, 0x8913


class Refusal(Exception):  # noqa: N818 - an answer and not a defect
    """A layer could not be built."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


def main(argv: list[str]) -> None:
    """Seal this process and exec the program; `argv` holds two pipe ends and the broker's pid."""
    incoming, outgoing, broker = (int(argument) for argument in argv)
    voice = outgoing
    try:
        with layer("start"):
            check_start()
        with layer("parent"):
            os.setsid()
            die_with(broker)
        with layer("descriptors"):
            take_channel(incoming, outgoing)
            voice = CHANNEL_OUT
            close_others()
            check_descriptors()
        with layer("start"):
            plan = read_plan()
        seal(plan)
        with layer("exec"):
            os.execve(plan["argv"][0], plan["argv"], plan["env"])  # noqa: S606 - no shell is wanted
    except Refusal as refusal:
        report(voice, refusal.layer, str(refusal))
    except BaseException as error:  # noqa: BLE001 - whatever it is, nothing may start
        report(voice, "start", f"{type(error).__name__}: {error}")
    os._exit(REFUSED_STATUS)


def seal(plan: Plan) -> None:
    """Take every layer of the plan, in order."""
    with layer("limits"):
        set_limits(plan)
    alive: Callable[[], None] = lambda: None  # noqa: E731
    if plan["namespaces"]:
        with layer("namespaces"):
            enter_namespaces(plan)
            alive = become_first_process(plan)
            check_network()
        with layer("root"):
            private_root(plan)
    else:
        channel.send(CHANNEL_OUT, channel.ALIVE, str(os.getpid()).encode())
    with layer("identity"):
        drop_identity(plan)
        alive()
    with layer("parent"):
        if not plan["namespaces"] and os.getppid() != plan["broker"]:
            raise OSError(errno.ESRCH, "the broker is gone")
    with layer("files"):
        check_readable(plan)
    with layer("landlock"):
        apply_landlock(plan)
    with layer("stage1"):
        apply_stage1()


@contextlib.contextmanager
def layer(name: str) -> Iterator[None]:
    """Name the layer in which anything went wrong."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        code = f"{errno.errorcode.get(error.errno or 0, '')} " if isinstance(error, OSError) else ""
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refusal(name, f"{code}{words}{where}") from error


def report(voice: int, name: str, message: str) -> None:
    """Tell the broker which layer refused."""
    text = json.dumps({"layer": name, "message": message[:2000]}).encode()
    with contextlib.suppress(OSError):
        channel.send(voice, channel.REFUSED, text)


# -- step 2: a fresh process ----------------------------------------------------------------------


def check_start() -> None:
    """One thread, a known architecture: namespaces and Landlock bind the calling thread only."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise Refusal("start", f"the launcher has {threads} threads, expected 1")
    if linux.MACHINE not in tables.ENABLED:
        raise Refusal("arch", f"no filter is enabled for {linux.MACHINE}")
    if struct.calcsize("P") != 8:  # noqa: PLR2004 - bytes of a 64-bit pointer
        raise Refusal("arch", "the interpreter is not a 64-bit program")


def die_with(parent: int) -> None:
    """Ask for SIGKILL when the parent dies, then make sure that it had not died before."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the broker is gone")


# -- step 3: descriptors and limits ---------------------------------------------------------------


def take_channel(incoming: int, outgoing: int) -> None:
    """Put the two pipe ends where the worker expects them."""
    import fcntl  # noqa: PLC0415 - used once

    spare = [
        fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, OPEN_DESCRIPTORS) for end in (incoming, outgoing)
    ]
    for source, target in zip(spare, (CHANNEL_IN, CHANNEL_OUT), strict=True):
        os.dup2(source, target, inheritable=True)


def close_others() -> None:
    """Close every descriptor above the channel."""
    try:
        linux.call("close_range", CHANNEL_OUT + 1, 0xFFFFFFFF, 0)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        os.closerange(CHANNEL_OUT + 1, os.sysconf("SC_OPEN_MAX"))


def check_descriptors() -> None:
    """Refuse any descriptor but null, the error pipe and the channel."""
    expected = dict.fromkeys((0, 1), "null") | dict.fromkeys((2, CHANNEL_IN, CHANNEL_OUT), "pipe")
    null = os.stat("/dev/null").st_rdev
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the listing's own descriptor, closed by now
        if stat.S_ISFIFO(status.st_mode):
            found[int(name)] = "pipe"
        elif stat.S_ISCHR(status.st_mode) and status.st_rdev == null:
            found[int(name)] = "null"
        else:
            found[int(name)] = stat.filemode(status.st_mode)
    if found != expected:
        raise Refusal("descriptors", f"found {found}, expected {expected}")


def read_plan() -> Plan:
    """Read what the broker wants; the filters must be the ones that it will compare with."""
    frame = channel.receive(CHANNEL_IN, PLAN_LIMIT)
    plan: Plan = json.loads(frame.payload)
    if filters.stage1(linux.MACHINE).hex() != plan["stage1"]:
        raise Refusal("stage1", "the filter is not the one that the broker expects")
    return plan


def set_limits(plan: Plan) -> None:
    """Set each limit soft and hard, and read it back."""
    for name, value in plan["limits"].items():
        key = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(key)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(key, (wanted, wanted))
        if resource.getrlimit(key) != (wanted, wanted):
            raise Refusal("limits", f"RLIMIT_{name} did not become {wanted}")


# -- steps 4 to 6: namespaces ---------------------------------------------------------------------


def enter_namespaces(plan: Plan) -> None:
    """Unshare everything in one call; map the own id to itself, never to 0."""
    flags = (
        linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWNS
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWCGROUP
    )
    mapping = plan["mapping"]
    outside_uid, outside_gid = os.getuid(), os.getgid()
    linux.call("unshare", flags | (linux.CLONE_NEWUSER if mapping else 0))
    if mapping:
        if 0 in mapping:
            raise Refusal("identity", "an id inside the seal would be 0")
        write_text("/proc/self/setgroups", "deny")
        write_text("/proc/self/uid_map", f"{mapping[0]} {outside_uid} 1")
        write_text("/proc/self/gid_map", f"{mapping[1]} {outside_gid} 1")


def become_first_process(plan: Plan) -> Callable[[], None]:
    """Fork into the PID namespace; the child returns and the parent only waits.

    Returns a function that re-arms the death signal, after a change of uid has cleared it.
    """
    question, asked = os.pipe()
    replied, answer = os.pipe()
    child = os.fork()
    if child:
        os.close(asked)
        os.close(replied)
        wait_outside(child, question, answer, plan)
    os.close(question)
    os.close(answer)

    def still_alive() -> None:
        # The parent is outside this PID namespace and has no number here: it must answer instead.
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(asked, b"?")
        if os.read(replied, 1) != b"!":
            raise Refusal("parent", "the waiting parent is gone")

    def last_check() -> None:
        still_alive()
        os.close(asked)
        os.close(replied)
        check_descriptors_by_number()

    still_alive()
    if os.getpid() != 1:
        raise Refusal("namespaces", "the process is not the first of its PID namespace")
    return last_check


def check_descriptors_by_number() -> None:
    """Refuse any open number above the channel, where /proc is gone already."""
    for number in range(CHANNEL_OUT + 1, OPEN_DESCRIPTORS):
        with contextlib.suppress(OSError):
            os.fstat(number)
            raise Refusal("descriptors", f"descriptor {number} is open")


def wait_outside(child: int, question: int, answer: int, plan: Plan) -> None:
    """Wait for the worker, keep nothing else, pass its end on as an exit status; never returns."""
    status = REFUSED_STATUS
    try:
        channel.send(CHANNEL_OUT, channel.ALIVE, str(child).encode())
        while os.read(question, 1):  # ends when the child has closed its side
            os.write(answer, b"!")
        os.closerange(0, OPEN_DESCRIPTORS * 2)
        drop_identity(plan)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != plan["broker"]:
            os._exit(REFUSED_STATUS)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        filters.install(filters.waiting_parent(child, linux.MACHINE))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = code if code >= 0 else SIGNAL_BASE - code
    finally:
        os._exit(status)


def check_network() -> None:
    """Leave the loopback interface down, and see that it is."""
    import _socket  # noqa: PLC0415 - used once, before stage 1 ends the use of sockets
    import fcntl  # noqa: PLC0415

    names = [name for _, name in _socket.if_nameindex()]
    if names != ["lo"]:
        raise Refusal("network", f"interfaces {names} exist, expected lo alone")
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFFLAGS, struct.pack("<16sH14x", b"lo", 0))
    finally:
        probe.close()
    if struct.unpack_from("<H", answer, 16)[0] & _IFF_UP:
        raise Refusal("network", "the loopback interface is up")


def write_text(path: str, content: str) -> None:
    """Write a kernel file in one call."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, content.encode())
    finally:
        os.close(descriptor)


# -- step 7: the private root ---------------------------------------------------------------------


def private_root(plan: Plan) -> None:
    """Build a root of read-only binds on a tmpfs and pivot into it; the old tree is gone then."""
    os.umask(0o022)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    devices: list[Bind] = [{"path": path, "mode": "device", "owner": None} for path in _DEVICES]
    binds = [*plan["binds"], *devices]
    # Open every source first: the mount point may cover one of them.
    sources = {bind["path"]: os.open(bind["path"], os.O_PATH | os.O_CLOEXEC) for bind in binds}
    base = next(path for path in ("/tmp", "/mnt", "/srv", "/usr") if os.path.isdir(path))  # noqa: S108 - a mount point, covered at once
    options = f"mode=0755,size={plan['root_kib']}k"
    linux.mount("tmpfs", base, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    for bind in binds:
        attach(base, bind, sources[bind["path"]], plan)
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
    if os.path.exists("/.old") or os.statvfs("/").f_flag & os.ST_RDONLY == 0:
        raise Refusal("root", "the private root is not closed")


def attach(base: str, bind: Bind, source: int, plan: Plan) -> None:
    """Bind one source below `base`; as root, show the files of its owner as the worker's own."""
    target = base + bind["path"]
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    if bind["owner"] is not None and plan["identity"] is not None:
        try:
            attach_owned(source, target, bind["owner"], plan["identity"])
        except OSError:
            pass  # a file system without idmapped mounts: `check_readable` decides
        else:
            return
    linux.mount(f"/proc/self/fd/{source}", target, None, linux.MS_BIND | linux.MS_REC)


_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH = 1, 0x1000, 4
_MOUNT_ATTR_IDMAP, _MOUNT_ATTR_RDONLY = 0x00100000, 1
_AT_FDCWD = -100


def attach_owned(source: int, target: str, owner: list[int], identity: list[int]) -> None:
    """Bind read-only with an id map: what `owner` owns on disk belongs to `identity` here."""
    tree = linux.call(
        "open_tree", source, linux.text(""), _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC
    )
    try:
        with user_namespace(owner, identity) as namespace:
            content = struct.pack("<QQQQ", _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, namespace)
            attribute = ctypes.create_string_buffer(content, len(content))
            linux.call(
                "mount_setattr", tree, linux.text(""), _AT_EMPTY_PATH, attribute, len(content)
            )
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


@contextlib.contextmanager
def user_namespace(inside: list[int], outside: list[int]) -> Iterator[int]:
    """Yield a descriptor of a user namespace that maps one uid and one gid: the map's carrier."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            linux.call("unshare", linux.CLONE_NEWUSER)
            # /proc still belongs to the outer PID namespace: this is the number that it knows.
            os.write(tell, os.readlink("/proc/self").encode())
            signal.pause()
        finally:
            os._exit(0)
    os.close(tell)
    try:
        number = os.read(told, 20).decode()
        if not number:
            raise OSError(errno.ENOSPC, "no user namespace can be made")
        write_text(f"/proc/{number}/uid_map", f"{inside[0]} {outside[0]} 1")
        write_text(f"/proc/{number}/gid_map", f"{inside[1]} {outside[1]} 1")
        namespace = os.open(f"/proc/{number}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield namespace
    finally:
        os.close(namespace)


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
            raise Refusal("root", f"a mount at {point!r} belongs to no source")
        mode = modes[owner]
        flags = linux.MS_BIND | linux.MS_REMOUNT | linux.MS_NOSUID | keep_flags(options)
        if mode == "read":
            flags |= linux.MS_RDONLY | linux.MS_NODEV
        elif mode == "write":
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


# -- steps 8 to 11: identity, files, filter -------------------------------------------------------


def drop_identity(plan: Plan) -> None:
    """Become the worker's uid for good, without groups, capabilities or a way to gain any."""
    if plan["identity"] is not None:
        uid, gid = plan["identity"]
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        linux.drop_bounding_set()
        os.setresuid(uid, uid, uid)
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    uids = os.getresuid()
    if 0 in uids or len(set(uids)) != 1:
        raise Refusal("identity", f"the ids are {uids}, expected one that is not 0")
    if plan["identity"] is not None:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # the change of uid has cleared it
        try:
            os.setuid(0)
        except OSError:
            return
        raise Refusal("identity", "the process can become root again")


def check_readable(plan: Plan) -> None:
    """Refuse clearly what would fail later as a puzzling import error: unreadable inputs."""
    for path in plan["check"]:
        for entry in entries(path):
            if not os.access(entry, os.R_OK):
                raise Refusal("files", f"uid {os.getuid()} inside the seal cannot read {entry!r}")


def entries(path: str) -> Iterator[str]:
    """Yield a path and, of a folder, what lies directly in it."""
    yield path
    if os.path.isdir(path) and os.access(path, os.R_OK):
        with os.scandir(path) as found:
            for entry in found:
                yield entry.path


_RIGHTS = {
    "read": landlock.READ,
    "exec": landlock.EXECUTE,
    "write": landlock.WRITE,
    "device": landlock.DEVICE,
}


def apply_landlock(plan: Plan) -> None:
    """Restrict files, and prove it; without Landlock on the host the plan says None."""
    wanted = plan["landlock"]
    if wanted is None:
        return
    if not landlock.can_open("/", os.O_RDONLY | os.O_DIRECTORY):
        raise Refusal(
            "landlock", "the root folder does not open before the rules, so no test is left"
        )
    abi = wanted["abi"]
    landlock.restrict([(path, _RIGHTS[kind]) for path, kind in wanted["rules"]], abi)
    outside = None if plan["namespaces"] else plan["broker"]
    landlock.verify_behaviour(abi, readable=plan["argv"][0], outside=outside)


def apply_stage1() -> None:
    """Install the deny list and try one call of each kind of answer."""
    filters.install(filters.stage1(linux.MACHINE))
    expected = {
        "socket": errno.EACCES,
        "io_uring_setup": errno.ENOSYS,
        "ptrace": errno.EPERM,
        "unshare": errno.EPERM,
        "keyctl": errno.EPERM,
        "msgget": errno.EPERM,
    }
    for name, error in expected.items():
        found = answer_of(linux.NUMBER[name])
        if found != error:
            answer = errno.errorcode.get(found, "success")
            raise Refusal("stage1", f"{name} answered {answer}, expected {errno.errorcode[error]}")
    if answer_of(tables.CEILING + 1) != errno.ENOSYS:
        raise Refusal("stage1", "a number above the ceiling did not answer ENOSYS")


def answer_of(number: int) -> int:
    """Return the errno of a call with invalid arguments, 0 when it succeeded."""
    try:
        linux.call_number(number, -1, -1, -1)
    except OSError as error:
        return error.errno or 0
    return 0
