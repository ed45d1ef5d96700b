"""The filters say exactly what the tables say, for every number, architecture and argument."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path

import pytest
from filter_lines import lines, name_of, run, without

from airgap.enclave import filters, linux, tables

ALLOW, KILL = filters.ALLOW, filters.KILL_PROCESS
X86, ARM = tables.ARCHITECTURES["x86_64"], tables.ARCHITECTURES["aarch64"]
I386, RISCV = 0x40000003, 0xC00000F3
PUBLISHED = Path(filters.__file__).parent / "published"


def denied(code):
    return 0x00050000 | code


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_stage1_answers_every_number_as_its_table_says(arch):
    program = filters.stage1(arch)
    audit = tables.ARCHITECTURES[arch]
    listed = {name: code for _, code, calls in tables.STAGE1 for name in calls}
    for nr in range(601):
        name = name_of(nr, arch)
        found = run(program, nr, audit)
        if nr > tables.CEILING:
            assert found == denied(errno.ENOSYS), nr
        elif name in listed:
            assert found == denied(listed[name]), name
        elif name == "clone":
            assert found == denied(errno.EPERM)  # without flags it would be a process
        else:
            assert found == ALLOW, (nr, name)


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
@pytest.mark.parametrize("gpu", [False, True])
def test_stage2_allows_its_list_and_nothing_else(arch, gpu):
    program = filters.stage2_gpu(1, arch) if gpu else filters.stage2(1, arch)
    allowed = {**tables.STAGE2, **(tables.GPU if gpu else {})}
    audit = tables.ARCHITECTURES[arch]
    by_argument = {"write", "mmap", "mprotect", "clone", "tgkill"}
    for nr in range(601):
        name = name_of(nr, arch)
        found = run(program, nr, audit)
        if name in by_argument:
            continue
        if name in allowed:
            assert found == ALLOW, name
        elif name == "clone3":
            assert found == denied(errno.ENOSYS)
        else:
            assert found == denied(errno.EPERM), (nr, name)


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_no_exec_denies_exec_alone(arch):
    program = filters.no_exec(arch)
    for nr in range(601):
        wanted = denied(errno.EPERM) if name_of(nr, arch) in tables.NO_EXEC else ALLOW
        assert run(program, nr, tables.ARCHITECTURES[arch]) == wanted


@pytest.mark.parametrize("name", filters.programs())
def test_a_foreign_architecture_is_killed_whatever_it_asks(name):
    native = tables.ARCHITECTURES[name.split(".")[1]]
    program = filters.programs()[name]
    for nr in range(601):
        for arch in {X86, ARM, I386, RISCV, 0} - {native}:
            assert run(program, nr, arch) == KILL
    assert run(program, 39 if native == X86 else 172, native) == ALLOW  # getpid


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_gpu", "no_exec"])
def test_x32_numbers_are_killed(name):
    program = filters.programs()[f"{name}.x86_64"]
    for nr in range(601):
        assert run(program, tables.X32_BIT | nr, X86) == KILL
    assert run(program, 0xFFFFFFFF, X86) == KILL


ARCHES = ["x86_64", "aarch64"]
BY_ARGUMENT = {"clone", "ioctl", "prlimit64", "write", "mmap", "mprotect", "tgkill"}
THREADED = {
    "stage1": filters.stage1,
    "stage2": lambda arch: filters.stage2(1, arch),
    "stage2_gpu": lambda arch: filters.stage2_gpu(1, arch),
}
ALLOWING = [THREADED["stage2"], THREADED["stage2_gpu"]]


def ask(program, name, arch, *arguments):
    return run(program, tables.number(name, arch), tables.ARCHITECTURES[arch], *arguments)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("make", THREADED.values(), ids=THREADED.keys())
@pytest.mark.parametrize("bit", [b for b in range(32) if tables.CLONE_NEW >> b & 1])
def test_every_namespace_bit_of_clone_is_denied(make, bit, arch):
    thread = tables.CLONE_THREAD | 0x3D0F00
    assert ask(make(arch), "clone", arch, thread) == ALLOW
    assert ask(make(arch), "clone", arch, thread | 1 << bit) == denied(errno.EPERM)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("make", THREADED.values(), ids=THREADED.keys())
def test_clone_makes_threads_and_no_processes(make, arch):
    assert ask(make(arch), "clone", arch, 0x11) == denied(errno.EPERM)  # SIGCHLD: fork
    assert ask(make(arch), "clone", arch, 0x4111) == denied(errno.EPERM)  # vfork
    assert ask(make(arch), "clone", arch, 1 << 32 | 0x11) == denied(errno.EPERM)
    assert ask(make(arch), "clone3", arch) == denied(errno.ENOSYS)  # its flags cannot be read


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("request_", tables.TERMINAL_IOCTLS)
def test_typing_into_a_terminal_is_denied(request_, arch):
    program = filters.stage1(arch)
    assert ask(program, "ioctl", arch, 0, 0x5401) == ALLOW
    assert ask(program, "ioctl", arch, 0, request_) == denied(errno.EPERM)
    # The kernel reads 32 bits of the request: what stands above must not hide it.
    assert ask(program, "ioctl", arch, 0, 1 << 32 | request_) == denied(errno.EPERM)


@pytest.mark.parametrize("arch", ARCHES)
def test_limits_of_other_processes_are_denied(arch):
    assert ask(filters.stage1(arch), "prlimit64", arch, 0) == ALLOW
    assert ask(filters.stage1(arch), "prlimit64", arch, 4711) == denied(errno.EPERM)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("make", ALLOWING)
@pytest.mark.parametrize("descriptor", [*range(10), 2**32 - 1])
def test_stage2_lets_write_reach_the_channel_and_the_error_pipe_alone(descriptor, make, arch):
    wanted = ALLOW if descriptor in tables.WRITABLE else denied(errno.EPERM)
    assert ask(make(arch), "write", arch, descriptor) == wanted


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("make", ALLOWING)
@pytest.mark.parametrize("name", ["mmap", "mprotect"])
@pytest.mark.parametrize("protection", range(8))
def test_stage2_makes_no_executable_memory(name, protection, make, arch):
    wanted = denied(errno.EPERM) if protection & 4 else ALLOW
    assert ask(make(arch), name, arch, 0, 4096, protection) == wanted


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("pid", [1, 2, 31337])
def test_stage2_lets_a_worker_signal_itself_alone(pid, arch):
    program = filters.stage2(pid, arch)
    assert ask(program, "tgkill", arch, pid) == ALLOW
    assert ask(program, "tgkill", arch, pid + 1) == denied(errno.EPERM)
    assert ask(program, "kill", arch, pid) == denied(errno.EPERM)


def test_the_waiting_parent_can_do_nothing_but_wait():
    program = filters.waiting_parent(77)
    assert run(program, 61, X86) == ALLOW  # wait4
    assert run(program, 62, X86, 77) == ALLOW  # kill its child
    assert run(program, 62, X86, 78) == denied(errno.EPERM)
    for name in ("socket", "openat", "execve", "ptrace", "clone", "write", "read"):
        assert run(program, tables.number(name), X86) == denied(errno.EPERM), name


WAITING = {
    *("wait4", "waitid", "exit", "exit_group", "rt_sigreturn", "restart_syscall", "munmap"),
    *("madvise", "brk", "futex", "rt_sigprocmask", "sched_yield"),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_the_waiting_parent_allows_its_list_and_nothing_else(arch):
    program = filters.waiting_parent(77, arch)
    for nr in range(601):
        name = name_of(nr, arch)
        if name not in {"mmap", "mprotect"}:  # by argument
            wanted = ALLOW if name in WAITING else denied(errno.EPERM)
            assert run(program, nr, tables.ARCHITECTURES[arch]) == wanted, (nr, name)
    assert ask(program, "mmap", arch, 0, 4096, 7) == denied(errno.EPERM)


@pytest.mark.parametrize("name", filters.programs())
def test_a_line_that_is_removed_changes_what_it_decides_and_nothing_else(name):
    """By interpretation: what the kernel does about each line is shown in `make soak`."""
    program, arch = filters.programs()[name], name.split(".")[1]
    audit = tables.ARCHITECTURES[arch]
    numbers = sorted({tables.number(call, arch) or 0 for call in tables.NUMBERS} | {454, 600})
    before = {nr: run(program, nr, audit) for nr in numbers}
    for label, place in lines(program, arch).items():
        mutant = without(program, *place)
        changed = [nr for nr in numbers if run(mutant, nr, audit) != before[nr]]
        call = label.split(" ")[0]
        if label == "ceiling":
            assert changed == [454, 600]
        elif label in {"architecture", "x32"}:
            assert changed == []
        else:
            assert set(changed) <= {tables.number(call, arch)}
            same = name.startswith("stage2") and call == "clone3"  # both errnos deny
            assert changed or " " in label or call in BY_ARGUMENT or same, label


@pytest.mark.parametrize("name", filters.programs())
def test_digests_and_files_are_the_published_ones(name):
    program = filters.programs()[name]
    assert filters.digest(program) == filters.PUBLISHED[name]
    assert (PUBLISHED / f"{name}.bpf").read_bytes() == program
    line = f"{hashlib.sha256(program).hexdigest()}  {name}.bpf"
    assert line in (PUBLISHED / "SHA256SUMS").read_text().splitlines()


def test_nothing_else_is_published():
    assert set(filters.PUBLISHED) == set(filters.programs())
    assert {path.stem for path in PUBLISHED.glob("*.bpf")} == set(filters.programs())


@pytest.mark.parametrize("name", filters.programs())
def test_every_jump_lands_inside_and_every_path_ends(name):
    code = filters.unpack(filters.programs()[name])
    for at, (op, yes, no, _) in enumerate(code):
        if op not in {0x20, 0x06}:
            assert at + 1 + max(yes, no) < len(code)
    assert code[-1][0] == 0x06
    assert len(code) < 4096  # BPF_MAXINSNS


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
# The generic table reaches these by a macro with another name, or holds them for 64 bit only.
GENERIC = {"newfstatat": "fstatat", "_sysctl": None, "uselib": None}


@pytest.mark.parametrize("arch", HEADERS)
def test_numbers_are_those_of_the_kernel_headers(arch):
    if not HEADERS[arch].exists():
        pytest.skip(f"the kernel headers for {arch} are not installed")
    text = HEADERS[arch].read_text()
    kernel = {
        found[1]: int(found[2])
        for found in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)
    }
    compared = 0
    for name, pair in tables.NUMBERS.items():
        number = pair[0 if arch == "x86_64" else 1]
        known = kernel.get(name, kernel.get(GENERIC.get(name) or name))
        if number is not None and known is not None:
            assert known == number, name
            compared += 1
        elif number is None and arch == "aarch64":
            assert name not in kernel, name
    assert compared > 100


def test_a_filter_that_the_kernel_does_not_take_is_an_error(monkeypatch):
    monkeypatch.setattr(linux, "call", lambda *_: 42)
    with pytest.raises(OSError, match="thread 42"):
        filters.install(filters.no_exec())
