"""An auditor's own program in the seal: it runs, it is contained, and its end has a name."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from enclave_harness import ROOT, needs_namespaces, run_as, starters

from airgap.enclave import Caps, SealRefused, SealSpec, host, reading, trial, twin
from policy.errors import CODES, RefusedError

DEADLINE_S = 4.0
SPEC = SealSpec(
    profile="worker",
    program="guest",
    deadline_s=DEADLINE_S,
    caps=Caps(memory_mb=256, stderr_bytes=1 << 16),
)
pytestmark = needs_namespaces


@pytest.fixture(autouse=True)
def probed(monkeypatch, tmp_path_factory):
    """The twin has its own tests; here it would cost every case half a second."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("own")))
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


def write(folder, source):
    path = folder / "probe.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return path


def left_over():
    """Return what a run could leave: processes of this one, and files in its temporary folder."""
    sealed = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int(host.parse_status((entry / "status").read_text())["PPid"])
            except OSError:
                continue
            if {b"guest", b"launcher"} & set(words) and parent == os.getpid():
                sealed.append(int(entry.name))
    return sealed, sorted(Path(tempfile.gettempdir()).iterdir())


def run(tmp_path, source, *, stage=2, spec=SPEC):
    """Run a probe; whatever it does, it ends in time and nothing of it stays."""
    before = left_over()
    started = time.monotonic()
    found = trial.run_trial(trial.read_probe(write(tmp_path, source)), spec, stage=stage)
    assert time.monotonic() - started < spec.deadline_s + 5
    for _ in range(100):
        if left_over() == before:
            break
        time.sleep(0.02)
    assert left_over() == before
    assert found.code in {"", *CODES}
    assert len(found.output) <= spec.caps.stderr_bytes
    with pytest.raises(OSError, match="No such"):
        reading.read(found.evidence["proc"]["pid"])
    json.dumps(found.as_document())
    return found


# -- probes that behave ---------------------------------------------------------------------------

ENTERED = """
import socket
print("imported", __name__)
def prepare():
    global kept
    kept = 7
    print("prepared")
def tried(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return "OPEN"
def main():
    print("ran", kept, tried(socket.socket), tried(lambda: open("/etc/passwd")))
    return 5
"""
SCRIPT = """
import errno, socket
from decimal import Decimal
print(__name__, Decimal("1.5"))
try:
    socket.socket()
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("rung", ["A", "U", "B", "C"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_probe_runs_in_the_seal_of_the_worker_on_each_rung(stage, rung, tmp_path):
    if ROOT and rung in "UBC" and not readable_by_all():
        pytest.skip("this interpreter cannot be read by another uid")
    found = run(tmp_path, ENTERED, stage=stage, spec=replace(SPEC, rung=rung, min_rung=rung))
    claimed = "NO CLAIM" if (rung, stage) == ("C", 1) else "SEALED"
    assert (found.verdict, found.outcome, found.code) == (f"{claimed}/{rung}", "exited", "")
    assert found.status == 5
    words = found.output.decode().split()
    assert words[:5] == ["imported", "airgap_probe", "prepared", "ran", "7"]
    assert words[5] == ("13" if stage == 1 else "1")  # the errno names the filter
    assert words[6] != "OPEN" or (rung, stage) == ("C", 1)
    assert found.looks >= 1


def readable_by_all():
    from airgap.enclave import plan

    folders = [plan.interpreter(), *plan.package_folders().values()]
    return all(p.stat().st_mode & 1 for path in folders for p in Path(path).parents)


@pytest.mark.parametrize(("stage", "errno"), [(1, "EACCES"), (2, "EPERM")])
def test_a_plain_script_just_runs(stage, errno, tmp_path):
    found = run(tmp_path, SCRIPT, stage=stage)
    assert (found.outcome, found.status, found.code) == ("returned", 0, "")
    assert found.output.decode().split() == ["__main__", "1.5", errno]


def test_the_seal_is_the_one_of_a_worker(tmp_path):
    from airgap.enclave import launch

    found = run(tmp_path, "print(1)")
    worker = replace(SPEC, program="airgap.enclave.guest:create")
    with launch(worker) as enclave:
        same = ("rung", "profile", "seccomp", "landlock", "fds", "net", "self_test")
        assert {**found.evidence["limits"], "AS": 0} == {**enclave.evidence["limits"], "AS": 0}
        for name in same:
            assert found.evidence[name] == enclave.evidence[name], name
        for name in ("caps", "nnp", "seccomp", "filters", "dumpable", "exe"):
            assert found.evidence["proc"][name] == enclave.evidence["proc"][name]
    assert found.evidence["artifacts"]["program"]["sha256"] == (
        trial.ProbeFile("x", b"print(1)").sha256
    )


def test_before_stage_2_the_evidence_names_the_first_filter_alone(tmp_path):
    found = run(tmp_path, "print(1)", stage=1)
    assert set(found.evidence["seccomp"]) == {"s1", "live_dump_match"}
    assert found.evidence["verdict"] == "STAGE 1"
    assert found.evidence["proc"]["dumpable"] == 1


@pytest.mark.skipif(not ROOT, reason="the kernel's records are for root")
def test_denied_calls_are_counted_where_the_kernel_tells(tmp_path):
    source = (
        "import socket\nfor _ in range(40):\n    try: socket.socket()\n    except OSError: pass"
    )
    found = run(tmp_path, source)
    if found.denied["source"] is None:
        pytest.skip("this kernel keeps no record of denied calls")
    assert found.denied["calls"].get("socket", 0) > 0
    if found.denied["exact"]:
        assert found.denied["calls"]["socket"] == 40
    assert run(tmp_path, "pass").denied["calls"].get("socket", 0) == 0


# -- probes that do not -----------------------------------------------------------------------

ANY = (1, 2)
# Of each: source, stages, outcome, code, words that stand in the output or the message.
BAD = {
    "syntax error": ("def main(:\n", ANY, "syntax", "enclave.program", "SyntaxError"),
    "not UTF-8": (b"x = '\xff\xfe'\n", ANY, "syntax", "enclave.program", "utf-8"),
    "a null byte": (b"x = 1\0\n", ANY, "syntax", "enclave.program", "null bytes"),
    "deep nesting": ("(" * 100_000, ANY, "syntax", "enclave.program", ""),
    "an endless loop": ("while True: pass", ANY, "deadline", "enclave.deadline", "within 4 s"),
    "an endless prepare": (
        "def prepare():\n while True: pass\ndef main(): pass",
        (2,),
        "deadline",
        "enclave.deadline",
        "within 4 s",
    ),
    "a fork bomb": (
        "import os\nwhile True: os.fork()",
        ANY,
        "raised",
        "enclave.program",
        "not per",
    ),
    "a thread bomb": (
        (
            "import threading, time\nwhile True:\n"
            " threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
        ),
        ANY,
        "raised",
        "enclave.program",
        "can't start new thread",
    ),
    "10 GB": ("x = bytearray(10 << 30)", ANY, "memory", "enclave.program", "MemoryError"),
    "10 GB piece by piece": (
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        ANY,
        "memory",
        "enclave.program",
        "MemoryError",
    ),
    "10 GB of shared memory": (
        "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 28))",
        ANY,
        "raised",
        "enclave.program",
        "Cannot allocate memory",
    ),
    "1 GB of output": (
        "import os\nfor _ in range(1 << 14): os.write(2, b'x' * (1 << 16))",
        ANY,
        "returned",
        "",
        "xxx",
    ),
    "1 GB printed": (
        "line = 'y' * (1 << 20)\nfor _ in range(1 << 10): print(line)",
        ANY,
        "returned",
        "",
        "yyy",
    ),
    "sys.exit": ("import sys\nsys.exit(9)", ANY, "exited", "", ""),
    "sys.exit with words": ("import sys\nsys.exit('gone')", ANY, "exited", "", "gone"),
    "os._exit": ("import os\nos._exit(9)", ANY, "exited", "", ""),
    "os._exit while it loads": (
        "import os\nos._exit(9)\ndef main(): pass",
        ANY,
        "exited",
        "",
        "",
    ),
    "a segfault": ("import ctypes\nctypes.string_at(0)", ANY, "signal", "enclave.worker", "11"),
    "abort": ("import os\nos.abort()", (1,), "signal", "enclave.worker", "signal"),
    "SIGKILL itself on A": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nprint('alive')",
        (1,),
        "returned",
        "",
        "alive",  # the first process of a PID namespace takes no signal from inside
    ),
    "SIGKILL itself after stage 2": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        (2,),
        "raised",
        "enclave.program",
        "not permitted",
    ),
    "closed descriptors": ("import os\nos.closerange(0, 100)", ANY, "exited", "", ""),
    "closed descriptors and a loop": (
        "import os\nos.closerange(0, 100)\nwhile True: pass",
        ANY,
        "channel",
        "enclave.channel",
        "it closed the channel and went on",  # we ended it: no signal of its own
    ),
    "an exit status that reads like SIGSYS": (
        "import os\nos._exit(159)",
        ANY,
        "exited",
        "",
        "128 or above",
    ),
    "a reply of the wrong types": (
        (
            "import os, json\np = json.dumps({'outcome': ['returned'], 'status': 0}).encode()\n"
            "os.write(4, len(p).to_bytes(4, 'big') + b'a\\0\\0\\0\\1' + p)"
        ),
        (2,),
        "channel",
        "enclave.channel",
        "reply is none",
    ),
    "a status that is no byte": (
        (
            "import os, json\np = json.dumps({'outcome': 'exited', 'status': 10**90}).encode()\n"
            "os.write(4, len(p).to_bytes(4, 'big') + b'a\\0\\0\\0\\1' + p)"
        ),
        (2,),
        "channel",
        "enclave.channel",
        "reply is none",
    ),
    "a session of its own": (
        "import os\nos.setsid()\ndef main(): pass",
        (2,),
        "refused",
        "enclave.parent",
        "not in that of its launcher",
    ),
    "garbage on the channel": (
        "import os\nos.write(4, b'garbage garbage garbage')",
        ANY,
        "channel",
        "enclave.channel",
        "cap",
    ),
    "half a frame": (
        "import os, time\nos.write(4, b'\\0\\0\\0\\x09a\\0\\0\\0\\1')\nos._exit(0)",
        ANY,
        "channel",
        "enclave.channel",
        "short",
    ),
    "half a frame and no more": (
        "import os, time\nos.write(4, b'\\0\\0\\0\\x09a\\0\\0\\0\\1')\nwhile True: pass",
        ANY,
        "deadline",
        "enclave.deadline",
        "",
    ),
    "a frame over the cap": (
        "import os\nos.write(4, b'\\x7f\\xff\\xff\\xffa\\0\\0\\0\\1')",
        ANY,
        "channel",
        "enclave.channel",
        "cap",
    ),
    "an answer of its own": (
        (
            "import os, json\np = json.dumps({'outcome': 'sealed', 'status': 0}).encode()\n"
            "os.write(4, len(p).to_bytes(4, 'big') + b'a\\0\\0\\0\\1' + p)"
        ),
        ANY,
        "channel",
        "enclave.channel",
        "reply is none",
    ),
    "a reply that is no JSON": (
        "import os\nos.write(4, b'\\0\\0\\0\\1a\\0\\0\\0\\1{')",
        ANY,
        "channel",
        "enclave.channel",
        "not JSON",
    ),
    "threads that stay": (
        (
            "import threading, time\ndef stay():\n while True: time.sleep(0.01)\n"
            "for _ in range(8): threading.Thread(target=stay).start()\nprint('left')"
        ),
        ANY,
        "returned",
        "",
        "left",
    ),
    "a missing module": (
        "import no_such_module",
        ANY,
        "raised",
        "enclave.program",
        "ModuleNotFoundError",
    ),
    "an exception": ("1 / 0", ANY, "raised", "enclave.program", "1 / 0"),
    "an exception that cannot be shown": (
        "class E(Exception):\n def __str__(self): raise RuntimeError\nraise E",
        ANY,
        "raised",
        "enclave.program",
        "",
    ),
    "output that is gone": ("import sys\nsys.stdout = None\nprint(1)", ANY, "returned", "", ""),
    "a descriptor left open": (
        "kept = open('/dev/null')\ndef main(): pass",
        (2,),
        "refused",
        "enclave.descriptors",
        "/dev/null",
    ),
    "a foreign system call": (
        (
            "from airgap.enclave import probe\ngate = probe.prepare_foreign_socket()\n"
            "def main(): gate()"
        ),
        ANY,
        "incident",
        "enclave.incident",
        "SIGSYS",
    ),
    "a signal handler and a loop": (
        "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        (1,),
        "deadline",
        "enclave.deadline",
        "",
    ),
}
# Slow, and no other at stage 2 than before it.
SOAKED = {"half a frame and no more", "1 GB printed", "10 GB piece by piece", "deep nesting"}
CASES = [
    pytest.param(
        (source, stage, *rest),
        id=f"{name}, stage {stage}",
        marks=pytest.mark.soak if name in SOAKED and stage == stages[-1] else (),
    )
    for name, (source, stages, *rest) in BAD.items()
    for stage in stages
]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_probe_ends_in_time_contained_and_named(case, tmp_path):
    source, stage, outcome, code, words = case
    # One that ends by itself has the deadline of the command: a busy host may take its time.
    spec = replace(SPEC, deadline_s=1.5 if outcome == "deadline" else 30.0)
    found = run(tmp_path, source, stage=stage, spec=spec)
    shown = found.output.decode(errors="replace") + found.message
    assert (found.outcome, found.code) == (outcome, code), shown[-500:]
    assert words.replace("4 s", "1.5 s") in shown
    assert found.verdict in {"SEALED/A", "REFUSED/A"}


RULES_OF_OTHERS = """
import ctypes, errno, os
libc, other = ctypes.CDLL(None, use_errno=True), os.getpid()
def main():
    for number in NUMBERS:
        libc.syscall(number, other, 8, b"\\1" + bytes(63))
        print(errno.errorcode[ctypes.get_errno()])
"""


def test_no_process_is_ranked_or_pinned_from_inside(tmp_path):
    # What is set shows in /proc to every account of the host, and on B and C it could be that of
    # any process of the user: setpriority, ioprio_set, sched_setparam, -scheduler, -attr.
    ranking = (141, 251, 142, 144, 314)
    for stage, numbers in ((1, ranking), (2, (*ranking, 203))):  # and sched_setaffinity
        source = RULES_OF_OTHERS.replace("NUMBERS", str(numbers))
        found = run(tmp_path, source, stage=stage, spec=replace(SPEC, deadline_s=30.0))
        assert found.output.split() == [b"EPERM"] * len(numbers), found.output


def test_output_over_the_cap_is_counted_and_cut(tmp_path):
    found = run(tmp_path, "import os\nfor _ in range(1000): os.write(2, b'x' * 65536)")
    assert found.output_bytes == 65_536_000
    assert len(found.output) == 1 << 16
    assert found.as_document()["output_cut"] is True


def test_a_probe_that_ends_while_it_loads_proves_no_second_stage(tmp_path):
    found = run(tmp_path, "import os\nos._exit(9)\ndef main(): pass")
    assert (found.verdict, found.status) == ("REFUSED/A", 9)
    assert found.evidence["verdict"] == "STAGE 1"


def test_a_change_that_the_host_sees_is_told(tmp_path, monkeypatch):
    source = "import time\nwhile True: time.sleep(0.1)"
    real, after = reading.read, time.monotonic() + 2

    def read(pid):
        found = real(pid)
        return replace(found, seccomp=0) if time.monotonic() > after else found

    monkeypatch.setattr(reading, "read", read)
    found = trial.run_trial(
        trial.read_probe(write(tmp_path, source)), replace(SPEC, deadline_s=20.0)
    )
    assert (found.verdict, found.code) == ("BROKEN/A", "enclave.stage2")
    assert found.seconds < 10


# -- files that are no probe ------------------------------------------------------------------


def test_a_file_that_is_no_probe_is_refused_before_anything_starts(tmp_path):
    good = write(tmp_path, "print(1)")
    assert trial.read_probe(good).content == b"print(1)"
    pipe, link, folder = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder"
    os.mkfifo(pipe)
    link.symlink_to(good)
    folder.mkdir()
    huge = tmp_path / "huge.py"
    huge.write_bytes(b"#" * (trial.SOURCE_LIMIT + 1))
    for path in (pipe, link, folder, huge, tmp_path / "missing", good / "below"):
        with pytest.raises(RefusedError) as caught:
            trial.read_probe(path)
        assert caught.value.code == "enclave.probe_file", path
    huge.write_bytes(b"#" * trial.SOURCE_LIMIT)
    assert len(trial.read_probe(huge).content) == trial.SOURCE_LIMIT


# -- a forced rung ----------------------------------------------------------------------------


def test_a_rung_that_the_host_lacks_is_refused_by_name(monkeypatch):
    facts = replace(host.survey(), landlock_abi=0)
    monkeypatch.setattr(host, "survey", lambda: facts)
    spec = replace(SPEC, rung="B", min_rung="B")
    with pytest.raises(SealRefused) as caught:
        trial.run_trial(trial.ProbeFile("x", b""), spec)
    assert caught.value.code == "enclave.rung"
    assert "rung B cannot be had on this host: the kernel reports no Landlock" in str(caught.value)


COMMAND = """
import contextlib, io, pathlib, tempfile
from airgap.cli.app import dispatch
path = pathlib.Path(tempfile.mkdtemp()) / "probe.py"
path.write_text("import socket\\ntry: socket.socket()\\nexcept OSError as e: print(e.errno)")
page = io.StringIO()
rung = ["--rung", ARGUMENTS[1]] if ARGUMENTS[1] else []
with contextlib.redirect_stdout(page):
    status = dispatch(["enclave", "audit", "--probe", str(path), "--stage", ARGUMENTS[0], "--json",
        "--root", tempfile.mkdtemp(), *rung])
found = json.loads(page.getvalue())
print(json.dumps([status, {k: found.get(k) for k in ("verdict", "outcome", "output", "error")}]))
"""


USUAL = [("2", ""), ("1", "B")]
OTHERS = [(stage, rung) for stage in "12" for rung in "AUBC" if (stage, rung) not in USUAL]


@pytest.mark.parametrize(
    ("stage", "rung"), [*USUAL, *(pytest.param(*each, marks=pytest.mark.soak) for each in OTHERS)]
)
@pytest.mark.parametrize("starter", starters())
def test_the_command_runs_a_probe_after_a_fresh_twin_as_root_and_as_a_user(starter, stage, rung):
    status, found = run_as(starter, COMMAND, stage, rung)
    assert status == 0, found
    claimed = "NO CLAIM" if (stage, rung) == ("1", "C") else "SEALED"
    assert found["verdict"] == f"{claimed}/{rung or 'A'}"
    assert found["output"] == {"1": "13\n", "2": "1\n"}[stage]
