"""Every line of every filter is removed in turn: a refusal, or the kernel shows what it is for.

Two questions for each line. Removed from the program that a sealed process takes, but not from
what the broker expects: does the launch end in REFUSED? Removed everywhere, as if the table had
never had it: does a channel of the probe open, or does the call reach the kernel? A line for which
neither can be seen has its reason in `EXPLAINED`, one by one.
"""

from __future__ import annotations

import inspect

import filter_lines
import pytest
from enclave_harness import PROGRAMS, needs_namespaces, needs_root, run_as

from airgap.enclave import filters

pytestmark = [needs_namespaces, needs_root]


def program_of(kind):
    if kind == "waiting_parent":
        return filters.waiting_parent(0x4D)
    return filters.programs()[f"{kind}.x86_64"]


def every_line(kind):
    return [f"{kind} {label}" for label in filter_lines.lines(program_of(kind))]


LAUNCHED = [x for kind in ("stage1", "stage2", "waiting_parent") for x in every_line(kind)]

# -- removed everywhere ---------------------------------------------------------------------------

# Children try each call as root with arguments that no call accepts: what answers is the kernel.
# They run in namespaces of their own, with a session of their own.
REACH = """
import errno, os, signal, tempfile
from pathlib import Path
from airgap.enclave import filters, fixture, linux, probe, tables
from filter_lines import lines, without

NEW = "NETWORK NS IPC UTS".split()
os.setsid()
own = fixture.enter_network()
linux.call("unshare", linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)

def child(action):
    # What the child tells comes by a pipe: a call that makes a process may spoil its stack.
    told, tell = os.pipe()
    made = os.fork()
    if not made:
        try:
            os.write(tell, str(action(tell)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    said = b""
    while part := os.read(told, 4096):
        said += part
    os.close(told)
    status = os.waitpid(made, 0)[1]
    return said.decode() or f"signal {os.waitstatus_to_exitcode(status)}"

def call(label, tell):
    name, _, value = label.partition(" ")
    if label == "architecture":
        return probe.prepare_foreign_socket()() >= 0 and "reached"
    if label == "x32":
        number, arguments = tables.X32_BIT | linux.NUMBER["getpid"], ()
    elif label == "ceiling":
        number, arguments = tables.CEILING + 1, (-1,) * 6
    else:
        number, arguments = linux.NUMBER[name], (-1,) * 6
    if name == "ioctl":
        arguments = (-1, int(value, 16) if value else tables.TERMINAL_IOCTLS[0], 0)
    if name == "clone":
        arguments = (signal.SIGCHLD, 0, 0, 0, 0)
    if name == "prlimit64":
        arguments = (os.getppid(), 7, 0, 0)
    if name in {"msgget", "shmget", "semget"}:
        arguments = (0, 1, 0o1600)
    parent = os.getpid()
    try:
        made = linux.call_number(number, *arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    if os.getpid() != parent:
        os.write(tell, b"reached by a new process ")
        os._exit(0)
    return "success"

def under(program, action):
    def act(tell):
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        if program:
            filters.install(program)
        return action(tell)
    return child(act)

def opened(program, outside, name):
    # The control of the probe, with this one filter and no other layer.
    targets = outside.targets(name)
    def act(_):
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        filters.install(program)
        return json.dumps([n for n, a in probe.attempt_all(targets).items() if a[0] == probe.OPEN])
    try:
        return set(json.loads(child(act)))
    except ValueError:
        return set()

found = {}
folder = Path(tempfile.mkdtemp())
with fixture.Outside(folder, None, own_network=own) as outside:
    for kind in ("stage1", "no_exec"):
        whole = filters.programs()[f"{kind}.x86_64"]
        closed = opened(whole, outside, kind)
        for label, place in lines(whole).items():
            mutant = without(whole, *place)
            kept = under(whole, lambda tell: call(label, tell))
            gone = under(mutant, lambda tell: call(label, tell))
            more = opened(mutant, outside, f"{kind} {label}") - closed
            import time; time.sleep(0.002)
            found[f"{kind} {label}"] = [kept, gone, sorted(more)]
            for end in outside._kept[-4:]:
                end.close()
            del outside._kept[-4:]
print(json.dumps(found))
"""

# Lines whose absence neither a launch nor a channel nor the kernel shows, each with its reason. An
# allow line that is missing makes a filter stricter: its reason is who needs the call.
STRICTER = "stricter without it; "
EXPLAINED = {
    "stage1 clone 0x7e020080": "a thread (which the next test demands) cannot have a user or PID "
    "namespace of its own, and any other needs a capability; the line keeps both from the kernel",
    "stage1 prlimit64 0x0": STRICTER + "libc reads the limits of its own stack for new threads",
    "stage2 architecture": "stage 1 kills as well; needed where stage 2 is read alone",
    "stage2 x32": "stage 1 kills as well; needed where stage 2 is read alone",
    "stage2 close": STRICTER + "onnxruntime and the interpreter close files that they hold",
    "stage2 fstat": STRICTER + "an older libc sizes its buffers by it",
    "stage2 poll": STRICTER + "libc waits by it in places that a request seldom reaches",
    "stage2 lseek": STRICTER + "the interpreter asks a stream for its position",
    "stage2 munmap": STRICTER + "libc gives memory back; without it memory only grows",
    "stage2 rt_sigaction": STRICTER + "the interpreter restores a handler after a fault of its own",
    "stage2 rt_sigprocmask": STRICTER + "libc masks signals while it makes a thread",
    "stage2 rt_sigreturn": STRICTER + "every handled signal returns by it",
    "stage2 pread64": STRICTER + "reads of a file that is open and not mapped",
    "stage2 sched_yield": STRICTER + "idle threads of onnxruntime spin by it",
    "stage2 mremap": STRICTER + "libc grows large blocks by it",
    "stage2 madvise": STRICTER + "libc frees the stack of a thread by it",
    "stage2 nanosleep": STRICTER + "back-off of older thread pools",
    "stage2 getpid": STRICTER + "libc asks for it before it raises a signal",
    "stage2 exit": STRICTER + "the end of a thread",
    "stage2 gettimeofday": STRICTER + "clocks where the kernel maps no vDSO",
    "stage2 sigaltstack": STRICTER + "a fault handler's stack for each new thread",
    "stage2 gettid": STRICTER + "the interpreter numbers its threads",
    "stage2 sched_getaffinity": STRICTER + "onnxruntime counts the cores that it may use",
    "stage2 restart_syscall": STRICTER + "the kernel resumes an interrupted wait by it",
    "stage2 clock_gettime": STRICTER + "clocks where the kernel maps no vDSO",
    "stage2 clock_nanosleep": STRICTER + "sleep of the interpreter and of libc",
    "stage2 exit_group": STRICTER + "the end of the worker; without it the broker kills it",
    "stage2 ppoll": STRICTER + "libc waits by it in places that a request seldom reaches",
    "stage2 set_robust_list": STRICTER + "libc, for each new thread",
    "stage2 getcpu": STRICTER + "allocators pick an arena by it where the vDSO has none",
    "stage2 getrandom": STRICTER + "hash seeds and temporary names",
    "stage2 membarrier": STRICTER + "libc synchronises threads by it as libraries unload",
    "stage2 mmap": STRICTER + "large blocks; a worker with few allocations does without",
    "stage2 mprotect": STRICTER + "the guard page of a new thread's stack",
    "stage2 write 0x2": STRICTER + "the error pipe",
    "stage2 clone": STRICTER + "new threads after warm-up; Python's tolerates a denial",
    "stage2 clone 0x7e020080": "stage 1 denies the same bits",
    "stage2 clone 0x10000": "stage 1 denies the same",
    "stage2 clone3": "only the errno changes, and stage 1 says ENOSYS too",
    "stage2 tgkill": STRICTER + "abort() of a library raises its signal by it",
    "stage2 tgkill 0x1": STRICTER + "abort() of a library raises its signal by it",
    # No filter of the parent lets anything out but an exit status: it has no descriptor.
    "waiting_parent architecture": "the parent runs a loop of ours and no foreign code",
    "waiting_parent x32": "the parent runs a loop of ours and no foreign code",
    "waiting_parent waitid": STRICTER + "libc may wait by it",
    "waiting_parent exit": STRICTER + "the end of a thread; the parent has one",
    "waiting_parent exit_group": STRICTER + "its end; without it the kernel ends it by a fault",
    "waiting_parent rt_sigreturn": STRICTER + "a handled signal returns by it",
    "waiting_parent restart_syscall": STRICTER + "an interrupted wait goes on by it",
    "waiting_parent munmap": STRICTER + "memory of the interpreter",
    "waiting_parent madvise": STRICTER + "memory of the interpreter",
    "waiting_parent brk": STRICTER + "memory of the interpreter",
    "waiting_parent futex": STRICTER + "locks of the interpreter",
    "waiting_parent rt_sigprocmask": STRICTER + "libc masks signals at the end",
    "waiting_parent sched_yield": STRICTER + "locks of the interpreter",
    "waiting_parent mmap": STRICTER + "memory of the interpreter",
    "waiting_parent mprotect": STRICTER + "memory of the interpreter",
    "waiting_parent mmap 0x4": "executable memory of a process that runs a loop of ours",
    "waiting_parent mprotect 0x4": "executable memory of a process that runs a loop of ours",
    "waiting_parent kill": STRICTER + "a kill of its child, which it never needs today",
    "waiting_parent kill 0x4d": STRICTER + "a kill of its child, which it never needs today",
}


@pytest.fixture(scope="module")
def reached():
    return run_as("root", REACH, timeout=300)


@pytest.mark.parametrize("line", [*every_line("stage1"), *every_line("no_exec")])
def test_a_line_that_is_missing_everywhere_is_seen(line, reached):
    kept, gone, channels = reached[line]
    shown = bool(channels) or gone != kept
    assert shown != (line in EXPLAINED), (kept, gone, channels)


# -- removed from what is installed alone ---------------------------------------------------------

LAUNCH = """
import os, shutil, tempfile
from pathlib import Path
import airgap.enclave
from airgap.enclave import filters, host, plan, seal
from policy.errors import AirgapError

real, whole = Path(airgap.enclave.__file__).parent, plan.package_folders()
facts = host.survey()
rung, wanted, program, helper = ARGUMENTS
folder = Path(tempfile.mkdtemp()) / "airgap"
shutil.copytree(real, folder / "enclave", ignore=shutil.ignore_patterns("__pycache__"))
(folder / "__init__.py").write_text("")
folder.parent.chmod(0o755)
target = folder / "enclave/filters.py"
text = target.read_text()
plan.package_folders = lambda: {**whole, "airgap": str(folder)}
spec = airgap.enclave.SealSpec(profile="worker", program=f"{program}:create",
                     read_only=(Path(program),), deadline_s=4.0,
                     caps=airgap.enclave.Caps(memory_mb=512))
made = {}
for label, function, place in wanted:
    end = f"\\n\\n{helper}\\n\\n_whole = {function}\\n\\n\\ndef {function}(*arguments):\\n"
    end += f"    return without(_whole(*arguments), *{place})\\n"
    target.write_text(text + (end if place else ""))
    try:
        enclave = seal.start(rung, spec, facts)
        try:
            for op in ("echo", "thread", "traceback", "raise"):
                payload = json.dumps({"op": op, "value": "x" * 100000}).encode()
                try:
                    enclave.request(payload, 4.0)
                except AirgapError as error:
                    if error.code != "enclave.program":
                        raise
            made[label] = "SEALED"
        finally:
            end = enclave.close()
            if end["incident"]:
                made[label] = "SIGSYS"
    except AirgapError as error:
        made[label] = error.code + ": " + error.message[:200]
shutil.rmtree(folder.parent)
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def launched():
    """What became of each launch; all of one starter and one filter run in one process."""
    made = {}

    def ask(starter, rung, kind):
        if (starter, rung, kind) not in made:
            places = filter_lines.lines(program_of(kind)).items()
            wanted = [["untouched", kind, None], *([label, kind, at] for label, at in places)]
            helper = inspect.getsource(filter_lines.without)
            found = run_as(starter, LAUNCH, rung, wanted, str(PROGRAMS), helper, timeout=300)
            made[starter, rung, kind] = found
        return made[starter, rung, kind]

    return ask


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["stage1", "stage2", "waiting_parent"])
@pytest.mark.parametrize("starter", ["root", "user"])
def test_a_filter_with_all_its_lines_is_sealed(starter, kind, launched):
    assert launched(starter, "A", kind)["untouched"] == "SEALED"


@pytest.mark.soak
@pytest.mark.parametrize("line", LAUNCHED)
def test_root_refuses_a_filter_without_one_of_its_lines(line, launched):
    """The broker of root dumps the live filters; a launcher compares its own before."""
    kind, _, label = line.partition(" ")
    found = launched("root", "A", kind)[label].split(":")[0]
    layer = {"waiting_parent": "parent"}.get(kind, kind)
    ends = {"enclave.worker"}
    if line == "stage2 read":
        ends.add("enclave.evidence")  # it cannot read its channel and may be gone before a look
    assert found in {f"enclave.{layer}", *ends}, found


@pytest.mark.soak
@pytest.mark.parametrize("line", LAUNCHED)
def test_a_user_refuses_or_the_line_is_explained(line, launched):
    """A user may not dump: what then remains has its reason, and no reason is left over."""
    kind, _, label = line.partition(" ")
    found = launched("user", "A", kind)[label]
    if kind == "stage1":
        assert found.startswith("enclave.stage1:")
    else:
        assert (found == "SEALED") == (line in EXPLAINED), found


def test_every_reason_belongs_to_a_line():
    lines = {x for k in ("stage1", "stage2", "no_exec", "waiting_parent") for x in every_line(k)}
    assert set(EXPLAINED) <= lines
    assert all(len(reason) > 20 for reason in EXPLAINED.values())
