"""Tries what the options of a unit forbid, and prints as JSON what came of each try.

It stands in for the program of a unit (`live_systemd.py`): same options, another ExecStart. It runs
with the interpreter of a bare host and imports nothing of the product. `open` means that it could.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
ADJ_ESTERROR = b"\x08"
NEW_MOUNT, NEW_UTS, NEW_USER, NEW_PID = 0x00020000, 0x04000000, 0x10000000, 0x20000000


def call(result: int) -> None:
    """Raise the error of a C call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write(path: str) -> None:
    """Open a file for writing; nothing is written."""
    os.close(os.open(path, os.O_WRONLY))


def make(path: str) -> None:
    """Make a file and remove it again."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.close(descriptor)
    Path(path).unlink()


def set_id_bits() -> None:
    """Make a file with a set-id bit."""
    path = f"{os.environ['PROBE_PLACE']}/set-id"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o700)
    try:
        os.fchmod(descriptor, 0o4700)
    finally:
        os.close(descriptor)
        Path(path).unlink()


def executable_memory() -> None:
    """Map a page that can be written and run."""
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def in_child(attempt: Callable[[], object]) -> None:
    """Try it in a child, which may be killed for it or not come back the same."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except OSError as error:
            os._exit(error.errno or errno.EIO)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise OSError(errno.EPERM, signal.Signals(os.WTERMSIG(status)).name)
    if number := os.WEXITSTATUS(status):
        raise OSError(number, os.strerror(number))


def foreign_gate() -> None:
    """Enter the kernel by another gate: getpid by int 0x80."""
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if ctypes.CFUNCTYPE(ctypes.c_int)(at)() < 0:
        raise OSError(errno.ENOSYS, "no such gate")


def proc_in_namespace() -> None:
    """Mount a /proc of its own in a user namespace, as the launcher of the seal does."""
    call(LIBC.unshare(NEW_USER | NEW_MOUNT | NEW_PID))
    in_child(lambda: call(LIBC.mount(b"proc", b"/proc", b"proc", 0, None)))


def others() -> None:
    """See a process of another account in /proc."""
    own = os.getuid()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if path.stat().st_uid != own:
                return
    raise OSError(errno.ENOENT, "nobody else is there")


def clock() -> None:
    """Tell the kernel what it thinks of its clock: nothing changes."""
    timex = ctypes.create_string_buffer(512)
    call(LIBC.adjtimex(timex))
    timex[0] = ADJ_ESTERROR  # as it was: the kernel asks for the right all the same
    call(LIBC.adjtimex(timex))


def network() -> None:
    """Be in the network of the machine."""
    if Path("/proc/self/ns/net").readlink() != Path(os.environ["PROBE_NETWORK"]):
        raise OSError(errno.ENODEV, "another network")


def see(path: str) -> None:
    """See what lies at a path; systemd covers what it hides with something of no mode at all."""
    if Path(path).stat().st_mode & 0o777 == 0:
        raise OSError(errno.EACCES, "covered")
    if Path(path).is_dir():
        list(Path(path).iterdir())
    else:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def control_group() -> None:
    """Make a control group and remove it."""
    top = Path("/sys/fs/cgroup")
    place = (top / "systemd" if (top / "systemd").is_dir() else top) / "probe"
    place.mkdir()
    place.rmdir()


TRIES: dict[str, Callable[[], object]] = {
    "write /usr": lambda: make("/usr/probe"),
    "write /etc": lambda: make("/etc/probe"),
    "write /var": lambda: make("/var/probe"),
    "write the tree": lambda: make(f"{os.environ['PROBE_PLACE']}/probe"),
    "read /home": lambda: see("/home/ada"),
    "read /root": lambda: see("/root"),
    "see the /tmp of others": lambda: Path("/tmp/seen-by-all").stat(),  # noqa: S108 - made by the test for others to find
    "open /dev/tty": lambda: Path("/dev/tty9").stat(),
    "open /dev/kmsg": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    "read /proc/kmsg": lambda: see("/proc/kmsg"),
    "read the kernel log": lambda: call(LIBC.klogctl(3, ctypes.create_string_buffer(64), 64)),
    "list modules": lambda: see("/usr/lib/modules"),
    "set a kernel setting": lambda: write("/proc/sys/kernel/printk"),
    "write a control group": control_group,
    "set the clock": clock,
    "set the host's name": lambda: socket.sethostname(socket.gethostname()),
    "be real-time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "change personality": lambda: call(LIBC.personality(0x0008)),
    "make a set-id file": set_id_bits,
    "map writable code": executable_memory,
    "enter by a foreign gate": lambda: in_child(foreign_gate),
    "make a user namespace": lambda: in_child(lambda: call(LIBC.unshare(NEW_USER))),
    "make a UTS namespace": lambda: in_child(lambda: call(LIBC.unshare(NEW_UTS))),
    "mount a /proc in a namespace": lambda: in_child(proc_in_namespace),
    "speak Unix sockets": lambda: socket.socket(socket.AF_UNIX).close(),
    "speak IP": lambda: socket.socket(socket.AF_INET).close(),
    "speak netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "have a network": network,
    "see processes of others": others,
    "see more than processes": lambda: Path("/proc/cpuinfo").stat(),
    "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
    "renice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
}


def main() -> None:
    """Try everything, then say what this process is."""
    found = {}
    for name, attempt in TRIES.items():
        try:
            attempt()
            found[name] = "open"
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            found[name] = errno.errorcode.get(number, "") if number else str(error)
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    print(json.dumps({"tries": found, "status": status, "groups": os.getgroups()}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
