"""Raw Linux calls through ctypes: what Python 3.11 has no function for (docs/design/enclave.md, 3).

`libc.syscall` is variadic: an argument that is not passed as a full long leaves garbage in its
upper half, so everything goes through `call`. Stdlib only; loaded inside the launcher and the
worker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from airgap.enclave import tables

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

NAMESPACES = {
    "net": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "pid": CLONE_NEWPID,
    "mnt": CLONE_NEWNS,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
    "user": CLONE_NEWUSER,
}

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC = 32, 1024, 2048, 4096, 16384
MS_PRIVATE, MS_RELATIME = 1 << 18, 1 << 21
MNT_DETACH = 2
SIGKILL = 9  # the `signal` module costs the launcher seven milliseconds

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long

MACHINE = os.uname().machine


def call(name: str, *arguments: object) -> int:
    """Make a system call by name; integers become longs, buffers must outlive the call.

    Raises:
        OSError: With the kernel's errno.

    """
    return call_number(NUMBER[name], *arguments)


def call_number(nr: int, *arguments: object) -> int:
    """Make a system call by number; see `call`."""
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    answer: int = _libc.syscall(ctypes.c_long(nr), *values)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


NUMBER = {
    name: nr
    for name in tables.NUMBERS
    if (nr := tables.number(name, "aarch64" if MACHINE == "aarch64" else "x86_64")) is not None
}


def text(value: str | None) -> ctypes.c_char_p:
    """Return a C string, or NULL for None."""
    return ctypes.c_char_p(None if value is None else os.fsencode(value))


def mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    """Mount(2)."""
    call("mount", text(source), text(target), text(kind), flags, text(options))


def write_text(path: str, content: str) -> None:
    """Write a kernel file in one call."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, content.encode())
    finally:
        os.close(descriptor)


def prctl(option: int, value: int) -> None:
    """Prctl(2) with one argument; OSError when it fails."""
    call("prctl", option, value, 0, 0, 0)


def drop_bounding_set() -> None:
    """Empty the bounding set; without CAP_SETPCAP it stays, and no_new_privs makes it idle."""
    for capability in range(_LAST_CAPABILITY):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.EPERM}:
                return
            raise


def drop_capabilities() -> None:
    """Empty the ambient, effective, permitted and inheritable sets."""
    call("prctl", PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    head = ctypes.create_string_buffer(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), 8)
    empty = ctypes.create_string_buffer(24)
    call("capset", head, empty)


# -- the filters that a live process really runs --------------------------------------------------

_SEIZE, _INTERRUPT, _GET_FILTER, _DETACH, _WALL = 0x4206, 0x4207, 0x420C, 17, 0x40000000


def dump_filters(pid: int) -> list[bytes]:
    """Return the seccomp filters of `pid`, first installed first.

    Stops the process for an instant. Needs CAP_SYS_ADMIN in the initial user namespace and a kernel
    with CONFIG_CHECKPOINT_RESTORE; an auditor's tool, so OSError is an answer and not a verdict.
    """
    _ptrace(_SEIZE, pid, 0, None)
    try:
        _ptrace(_INTERRUPT, pid, 0, None)
        os.waitpid(pid, _WALL)
        out: list[bytes] = []
        while True:
            try:
                length = _ptrace(_GET_FILTER, pid, len(out), None)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return out
                raise
            buffer = ctypes.create_string_buffer(length * 8)
            _ptrace(_GET_FILTER, pid, len(out), buffer)
            out.append(buffer.raw)
    finally:
        _ptrace(_DETACH, pid, 0, None)


def _ptrace(request: int, pid: int, address: int, data: object) -> int:
    ctypes.set_errno(0)
    answer: int = _libc.ptrace(
        ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data
    )
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer
