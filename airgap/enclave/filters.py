"""BPF programs for seccomp, built from `tables` and nothing else (docs/design/enclave.md, 4).

Stage 1 is a deny list, installed before exec; stage 2 an allow list, installed by the worker after
warm-up; no-exec closes exec for a conversion. Both stages run on every call and the stricter answer
wins. The published digests are what an auditor compares a live process with; stage 2 names the
worker's own process id, so its template is published for pid 1 (a worker in its own PID namespace).
"""

from __future__ import annotations

import ctypes
import struct

from airgap.enclave import linux, tables
from airgap.enclave.tables import ENOSYS, EPERM

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGUMENT = (
    0,
    4,
    16,
)  # offsets in struct seccomp_data; an argument is 8 bytes, low half first

_SET_MODE_FILTER, _TSYNC, _LOG = 1, 1, 2

# SHA-256 of each program; `published/` holds the bytes for an auditor without Python.
PUBLISHED = {
    "stage1.x86_64": "c954d76944b2e3545d440a6468cb10e1288fd8c29b6e30970e27c77cef7af535",
    "stage2.x86_64": "c4dafc0ad27fd4e7b461f8f97e9f2038f0717a95900e1a270c3ac696a760bb75",
    "stage2_gpu.x86_64": "081dd50d1cee05baedd8e5d50e2b23ae1504897fa10e091fcb89f1861817d3f6",
    "no_exec.x86_64": "325e8e5e216e71602d4ccf11a0939542bf4144796e1078170b8f6331226e95ef",
    "stage1.aarch64": "83e4dfb99987595d68ba608dc7b93562154207581e9df600815af5d556acb0ac",
    "stage2.aarch64": "4ea7083215a2efcb3c51ad2b0e09680efed1bcf109a5d0073fcad07d81575adf",
    "stage2_gpu.aarch64": "6671dc6c20ebc1928e0f5b43e057e7e4c19ee12063a710a0c3651f7e0c75b759",
    "no_exec.aarch64": "0ec762fcf8b2f0a2323d3e9a1766095e3a6078fdcdbd5a84d9050b2b2209f3d6",
}


def stage1(arch: str = "x86_64") -> bytes:
    """Return the deny list: no network, no other process, no namespace, no rare kernel surface."""
    code = _head(arch)
    code += [(_AT_LEAST, 0, 1, tables.CEILING + 1), (_RETURN, 0, 0, _ERRNO | ENOSYS)]
    for _, error, calls in tables.STAGE1:
        for name in calls:
            code += _answer(tables.number(name, arch), _ERRNO | error)
    code += _rule(tables.number("clone", arch), _clone_threads_only())
    code += _rule(tables.number("ioctl", arch), _deny_values(1, tables.TERMINAL_IOCTLS))
    code += _rule(tables.number("prlimit64", arch), _allow_values(0, (0,)))
    return _pack([*code, (_RETURN, 0, 0, ALLOW)])


def no_exec(arch: str = "x86_64") -> bytes:
    """Return the filter that closes exec, for a conversion before any third-party import."""
    code = _head(arch)
    for name in tables.NO_EXEC:
        code += _answer(tables.number(name, arch), _ERRNO | EPERM)
    return _pack([*code, (_RETURN, 0, 0, ALLOW)])


def stage2(pid: int, arch: str = "x86_64") -> bytes:
    """Return the allow list for a worker that sees itself as `pid`."""
    return _stage2(pid, arch, tuple(tables.STAGE2))


def stage2_gpu(pid: int, arch: str = "x86_64") -> bytes:
    """Return the allow list for a worker with a GPU: never run on one."""
    return _stage2(pid, arch, (*tables.STAGE2, *tables.GPU))


def last(name: str, pid: int, arch: str = "x86_64") -> bytes:
    """Return the filter of a profile that closes the last doors, by its name."""
    if name == "no_exec":
        return no_exec(arch)
    return {"stage2": stage2, "stage2_gpu": stage2_gpu}[name](pid, arch)


def _stage2(pid: int, arch: str, allowed: tuple[str, ...]) -> bytes:
    code = _head(arch)
    for name in allowed:
        code += _answer(tables.number(name, arch), ALLOW)
    code += _rule(tables.number("write", arch), _allow_values(0, tables.WRITABLE))
    for name in ("mmap", "mprotect"):
        code += _rule(tables.number(name, arch), _deny_bits(2, tables.PROT_EXEC))
    code += _rule(tables.number("clone", arch), _clone_threads_only())
    code += _answer(tables.number("clone3", arch), _ERRNO | ENOSYS)
    code += _rule(tables.number("tgkill", arch), _allow_values(0, (pid,)))
    return _pack([*code, (_RETURN, 0, 0, _ERRNO | EPERM)])


def waiting_parent(child: int, arch: str = "x86_64") -> bytes:
    """Return the filter of the waiting parent: it may wait for `child`, kill it and exit."""
    code = _head(arch)
    for name in ("wait4", "waitid", "exit", "exit_group", "rt_sigreturn", "restart_syscall"):
        code += _answer(tables.number(name, arch), ALLOW)
    for name in ("munmap", "madvise", "brk", "futex", "rt_sigprocmask", "sched_yield"):
        code += _answer(
            tables.number(name, arch), ALLOW
        )  # what an interpreter does to its own memory
    for name in ("mmap", "mprotect"):
        code += _rule(tables.number(name, arch), _deny_bits(2, tables.PROT_EXEC))
    code += _rule(tables.number("kill", arch), _allow_values(0, (child,)))
    return _pack([*code, (_RETURN, 0, 0, _ERRNO | EPERM)])


def programs() -> dict[str, bytes]:
    """Return what is published: each filter for each architecture, stage 2 for pid 1."""
    return {
        f"{name}.{arch}": program(arch)
        for name, program in (("stage1", stage1), ("no_exec", no_exec))
        for arch in tables.ARCHITECTURES
    } | {
        f"{name}.{arch}": program(1, arch)
        for name, program in (("stage2", stage2), ("stage2_gpu", stage2_gpu))
        for arch in tables.ARCHITECTURES
    }


def digest(program: bytes) -> str:
    """Return the SHA-256 of a filter as bare hex."""
    import hashlib  # noqa: PLC0415 - the launcher compares bytes and is spared the library

    return hashlib.sha256(program).hexdigest()


def count(program: bytes) -> int:
    """Return how many instructions a filter has."""
    return len(program) // 8


def unpack(program: bytes) -> list[Instruction]:
    """Read a filter back into instructions."""
    return [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> None:
    """Install a filter on every thread; OSError when the kernel does anything else."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = _Program(count(program), ctypes.addressof(buffer))
    answer = linux.call("seccomp", _SET_MODE_FILTER, _TSYNC | _LOG, ctypes.byref(head))
    if answer != 0:
        raise OSError(3, f"thread {answer} could not take the filter")


# -- assembler ------------------------------------------------------------------------------------


def _head(arch: str) -> list[Instruction]:
    """Kill on a foreign architecture (and x32), then leave the call number in the accumulator."""
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, tables.ARCHITECTURES[arch]),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
    ]
    if arch == "x86_64":
        code += [(_AT_LEAST, 0, 1, tables.X32_BIT), (_RETURN, 0, 0, KILL_PROCESS)]
    return code


def _answer(nr: int | None, verdict: int) -> list[Instruction]:
    return [] if nr is None else [(_EQUAL, 0, 1, nr), (_RETURN, 0, 0, verdict)]


def _rule(nr: int | None, body: list[Instruction]) -> list[Instruction]:
    return [] if nr is None else [(_EQUAL, 0, len(body), nr), *body]


def _argument(index: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENT + 8 * index)


def _allow_values(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow when the low half of the argument is one of `values`, else EPERM."""
    tests = [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [_argument(index), *tests, (_RETURN, 0, 0, _ERRNO | EPERM), (_RETURN, 0, 0, ALLOW)]


def _deny_values(index: int, values: tuple[int, ...]) -> list[Instruction]:
    tests = [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [_argument(index), *tests, (_RETURN, 0, 0, ALLOW), (_RETURN, 0, 0, _ERRNO | EPERM)]


def _deny_bits(index: int, bits: int) -> list[Instruction]:
    return [
        _argument(index),
        (_ANY_BIT, 0, 1, bits),
        (_RETURN, 0, 0, _ERRNO | EPERM),
        (_RETURN, 0, 0, ALLOW),
    ]


def _clone_threads_only() -> list[Instruction]:
    """No namespaces and no processes: a thread or EPERM."""
    return [
        _argument(0),
        (_ANY_BIT, 0, 1, tables.CLONE_NEW),
        (_RETURN, 0, 0, _ERRNO | EPERM),
        (_ANY_BIT, 1, 0, tables.CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | EPERM),
        (_RETURN, 0, 0, ALLOW),
    ]


def _pack(code: list[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
