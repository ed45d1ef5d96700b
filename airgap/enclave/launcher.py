"""Builds the seal around one process and turns it into the worker (docs/design/enclave.md, 3).

Runs as `python -I -S -B entry.py launcher`, one thread, standard library and ctypes only. Each
step either does all that it says or raises, and then nothing was started: the broker gets a
REFUSED frame that names the layer. Where a step can be tried out, it is; a return code of 0 is not
believed.
"""

# ruff: noqa: PTH112, PTH116, PTH208
# Each import is a part of the start of every worker: pathlib, json, re, signal, contextlib and
# typing would cost the launcher as much as the interpreter itself.
from __future__ import annotations

import errno
import marshal
import os
import resource
import stat
import struct

from airgap.enclave import channel, filters, landlock, linux, root, tables
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT

TYPE_CHECKING = (
    False  # the launcher has no use for the `typing` module; type checkers know this name
)
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airgap.enclave.plan import Plan

PLAN_LIMIT = 1 << 20  # bytes
REFUSED_STATUS = 97  # exit status of a launcher that refused
SIGNAL_BASE = 128  # exit status of the waiting parent when a signal ended the worker
HIGH_STATUS = 255  # and when it ended by itself with a status that reads like one of those
OPEN_DESCRIPTORS = 256

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
    if unmapped(plan):
        with layer("identity"):
            become_worker(plan)  # no id can be changed where none is mapped
    if plan["namespaces"]:
        with layer("namespaces"):
            enter_namespaces(plan)
            alive = become_first_process(plan)
            check_network()
    else:
        channel.send(CHANNEL_OUT, channel.ALIVE, str(os.getpid()).encode())
    if "mnt" in plan["namespaces"]:
        with layer("root"):
            root.private_root(plan)
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


class layer:  # noqa: N801 - reads as a part of the sentence
    """Names the layer in which anything went wrong."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Refusal) or not isinstance(error, Exception):
            return
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        code = f"{errno.errorcode.get(error.errno or 0, '')} " if isinstance(error, OSError) else ""
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refusal(self._name, f"{code}{words}{where}") from error


def report(voice: int, name: str, message: str) -> None:
    """Tell the broker which layer refused; what stands in the way of a frame stays unsaid."""
    text = f'{{"layer": {quoted(name)}, "message": {quoted(message[:2000])}}}'
    try:
        channel.send(voice, channel.REFUSED, text.encode(errors="backslashreplace"))
    except OSError:
        return


def quoted(text: str) -> str:
    """Return a JSON string: whether a file is readable by now is not known, so none is imported."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(max(sign, " ") for sign in escaped) + '"'


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
    linux.prctl(linux.PR_SET_PDEATHSIG, linux.SIGKILL)
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the broker is gone")


# -- step 3: descriptors and limits ---------------------------------------------------------------


def take_channel(incoming: int, outgoing: int) -> None:
    """Put the two pipe ends where the worker expects them."""
    import fcntl  # noqa: PLC0415 - used once

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft <= 2 * OPEN_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * OPEN_DESCRIPTORS), hard))
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
    plan: Plan = marshal.loads(frame.payload)  # noqa: S302 - of the broker, as this program is
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
    """Unshare everything in one call; map the own id to itself, never to 0, or none (rung U)."""
    flags = 0
    for name in plan["namespaces"]:
        flags |= linux.NAMESPACES[name]
    mapping = plan["mapping"]
    outside_uid, outside_gid = os.getuid(), os.getgid()
    linux.call("unshare", flags)
    if mapping:
        if 0 in mapping:
            raise Refusal("identity", "an id inside the seal would be 0")
        linux.write_text("/proc/self/setgroups", "deny")
        linux.write_text("/proc/self/uid_map", f"{mapping[0]} {outside_uid} 1")
        linux.write_text("/proc/self/gid_map", f"{mapping[1]} {outside_gid} 1")


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
        linux.prctl(linux.PR_SET_PDEATHSIG, linux.SIGKILL)
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
        try:
            os.fstat(number)
        except OSError:
            continue
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
        linux.prctl(linux.PR_SET_PDEATHSIG, linux.SIGKILL)
        if os.getppid() != plan["broker"]:
            os._exit(REFUSED_STATUS)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        filters.install(filters.waiting_parent(child, linux.MACHINE))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = SIGNAL_BASE - code if code < 0 else code if code < SIGNAL_BASE else HIGH_STATUS
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


# -- steps 8 to 11: identity, files, filter -------------------------------------------------------


def unmapped(plan: Plan) -> bool:
    """Say whether the user namespace maps no id: rung U, where mounts are not allowed either."""
    return "user" in plan["namespaces"] and plan["mapping"] is None


def become_worker(plan: Plan) -> None:
    """Started by root: become the worker's uid, without groups."""
    if plan["identity"] is not None:
        uid, gid = plan["identity"]
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        linux.drop_bounding_set()
        os.setresuid(uid, uid, uid)


def drop_identity(plan: Plan) -> None:
    """Keep one id that is not 0, and no capability or way to gain any."""
    if not unmapped(plan):
        become_worker(plan)
    linux.drop_bounding_set()  # a new user namespace has come with all of it
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    uids = os.getresuid()
    if 0 in uids or len(set(uids)) != 1:
        raise Refusal("identity", f"the ids are {uids}, expected one that is not 0")
    if plan["identity"] is not None:
        linux.prctl(linux.PR_SET_PDEATHSIG, linux.SIGKILL)  # the change of uid has cleared it
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
                where = closed_above(entry)
                because = f": the folder {where!r} is closed to it" if where else ""
                uid = plan["identity"][0] if plan["identity"] else os.getuid()
                words = f"uid {uid} inside the seal cannot read {entry!r}{because}"
                raise Refusal("files", words)


def closed_above(path: str) -> str | None:
    """Return the first folder above `path` that this process may not pass, None where it may."""
    parts = path.split("/")[1:-1]
    above = ("/" + "/".join(parts[:depth]) for depth in range(len(parts) + 1))
    return next((folder for folder in above if not os.access(folder, os.X_OK)), None)


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
    "gpu": landlock.GPU,
    "proc": landlock.PROC,
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
    script = plan["argv"][4]  # not the interpreter: it runs, and ETXTBSY would come before any rule
    landlock.verify_behaviour(abi, readable=script, outside=outside)


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
