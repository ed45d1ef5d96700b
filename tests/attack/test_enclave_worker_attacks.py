"""Hostile programs inside the seal: each is contained, ended in time and told by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from enclave_harness import HERE, PROGRAMS, needs_namespaces, run_as, starters
from sealed_programs import Program

from airgap.enclave import (
    Caps,
    SealRefused,
    SealSpec,
    evidence,
    filters,
    host,
    launch,
    plan,
    reading,
    seal,
    twin,
)
from airgap.enclave.profiles import PROFILES
from policy.errors import FaultError, RefusedError

CAPS = Caps(memory_mb=512, stderr_bytes=4096, frame_bytes=1 << 20, reply_bytes=8 << 20)
# The twin has its own tests; here it would cost every case half a second.
pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(sys.platform != "linux", reason="the seal is Linux's"),
]


@pytest.fixture(autouse=True)
def probed(monkeypatch):
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


def spec(*, deadline_s=10.0, caps=CAPS, read_only=(), **config):
    return SealSpec(
        profile="worker",
        program=f"{PROGRAMS}:create",
        config=config,
        read_only=(PROGRAMS, *read_only),
        deadline_s=deadline_s,
        caps=caps,
    )


def ask(enclave, op, *, timeout=5.0, **more):
    return enclave.request(json.dumps({"op": op, **more}).encode(), timeout)


@pytest.fixture
def worker():
    with launch(spec()) as enclave:
        yield enclave


@pytest.fixture(scope="module")
def shared():
    """One worker for attacks that a worker survives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
        patch.setattr(twin, "require_sealed", lambda _: None)
        patch.setattr(twin, "summary", lambda report: report)
        enclave = launch(spec(warm="environment"))
    yield enclave
    enclave.close()


def gone(pid):
    """Say whether a process has ended, within a second."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


# -- what a worker may do ---------------------------------------------------------------------


def test_a_worker_answers_with_parts_and_a_reply(shared):
    frames = list(shared.stream(json.dumps({"op": "echo", "value": [1], "parts": 3}).encode(), 5))
    assert [(frame.is_part, frame.payload) for frame in frames] == [
        (True, b"0"),
        (True, b"1"),
        (True, b"2"),
        (False, b"[1]"),
    ]
    assert shared.alive


def test_threads_errors_and_tracebacks_work_after_stage_2(shared):
    assert ask(shared, "thread") == b"[1]"
    assert b"KeyError" in ask(shared, "traceback")
    with pytest.raises(FaultError) as caught:
        ask(shared, "raise")
    assert caught.value.code == "enclave.program"
    assert len(caught.value.message) < 5000
    assert ask(shared, "echo", value=1) == b"1"


def test_the_environment_is_the_built_one_and_no_more(shared):
    found = json.loads(ask(shared, "environment"))
    own = dict(PROFILES["worker"].environment)
    assert found == plan.built_environment(threads=CAPS.threads) | own
    assert found["ORT_DISABLE_TELEMETRY"] == "1"


REFUSED_CALLS = {
    "connect": {},
    "fork": {},
    "exec": {},
    "signals": {},
    "executable_memory": {},
    "open": {"path": "/etc/passwd"},
    "write_to": {"fd": 1},
}


@pytest.mark.parametrize(("op", "more"), REFUSED_CALLS.items(), ids=REFUSED_CALLS.keys())
def test_a_call_that_is_not_allowed_is_denied_and_the_worker_goes_on(op, more, shared):
    assert ask(shared, op, **more) == b"EPERM"
    assert ask(shared, "echo", value=2) == b"2"


def test_a_refusal_of_the_program_keeps_its_code(shared):
    with pytest.raises(RefusedError) as caught:
        ask(shared, "refuse", code="prompt.g01")
    assert caught.value.code == "prompt.g01"
    assert len(caught.value.message) <= 4000


@pytest.mark.parametrize(
    "code", ["policy.denied", "enclave.probe", "no.such", "", "audit.tampered"]
)
def test_a_program_cannot_speak_for_another_room(code, shared):
    with pytest.raises(FaultError) as caught:
        ask(shared, "refuse", code=code)
    assert caught.value.code == "enclave.program"


def test_a_request_over_its_cap_is_refused_and_changes_nothing():
    with launch(spec(caps=Caps(memory_mb=512, request_bytes=100))) as enclave:
        with pytest.raises(RefusedError) as caught:
            enclave.request(b"x" * 101, 1)
        assert caught.value.code == "enclave.channel"
        assert enclave.request(b"x" * 100, 5) == b"x" * 100


def test_memory_over_the_limit_fails_one_request(shared):
    with pytest.raises(FaultError) as caught:
        ask(shared, "memory", size=4 << 30)
    assert "MemoryError" in caught.value.message
    assert ask(shared, "memory", size=1 << 20) == str(1 << 20).encode()


def test_what_a_worker_prints_is_capped_and_cleaned(shared):
    ask(shared, "stderr", text="\x1b[31mred\n" + "y" * 100_000)
    words = shared._process.words()
    assert "\x1b" not in words
    assert len(words) <= CAPS.stderr_bytes


def test_facts_are_read_again_and_still_hold(shared):
    shared.reverify()
    assert shared.evidence["verdict"] == "SEALED"


# -- what ends a worker -----------------------------------------------------------------------

ENDS = {
    "a hang": ("hang", {"timeout": 0.3}, "enclave.worker", "in time"),
    "a segfault": ("segfault", {}, "enclave.worker", "SIGSEGV"),
    "an exit": ("exit", {"status": 0}, "enclave.worker", "exit status 0"),
    "an exit with a status": ("exit", {"status": 7}, "enclave.worker", "exit status 7"),
    "a frame over the cap": ("size", {"size": (1 << 20) + 1}, "enclave.worker", "the cap is"),
    "too many bytes": ("parts", {"size": 1 << 20, "count": 100}, "enclave.worker", "more than"),
    "an unknown kind": ("raw", {"frame": "000000003f00000001"}, "enclave.worker", "kind"),
    "a control frame": ("raw", {"frame": "000000007200000001"}, "enclave.worker", "kind"),
    "another request's reply": (
        "raw",
        {"frame": "000000006100000099"},
        "enclave.worker",
        "request",
    ),
    "half a frame": ("raw", {"frame": "0000000961", "exit": 1}, "enclave.worker", "channel ended"),
    "a frame that never ends": (
        "raw",
        {"frame": "000000096100000001", "then": 9, "timeout": 0.3},
        "enclave.worker",
        "in time",
    ),
}


@pytest.mark.parametrize(("op", "more", "code", "words"), ENDS.values(), ids=ENDS.keys())
def test_a_broken_worker_is_ended_and_said_to_be(op, more, code, words, worker):
    pid = worker.pid
    with pytest.raises(FaultError) as caught:
        ask(worker, op, **more)
    assert caught.value.code == code
    assert words in caught.value.message
    assert not worker.alive
    assert gone(pid)
    with pytest.raises(FaultError, match="has ended"):
        ask(worker, "echo", value=1)


def test_a_worker_that_never_stops_talking_is_ended_in_time(worker):
    with pytest.raises(FaultError, match="in time"):
        worker.request(b'{"op": "spin"}', 5.0, total_s=0.3)


def test_a_caller_that_leaves_early_ends_the_worker(worker):
    for _ in worker.stream(b'{"op": "parts", "count": 1000, "size": 10}', 5.0):
        break
    assert not worker.alive


def test_ctrl_c_in_a_request_ends_the_worker(worker):
    pid = worker.pid
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        ask(worker, "hang", timeout=30.0)
    assert gone(pid)


def test_a_call_by_a_foreign_gate_is_an_incident():
    with launch(
        SealSpec(
            profile="worker",
            program="airgap.enclave.probe:create",
            config={"targets": TARGETS},
            caps=CAPS,
        )
    ) as enclave:
        with pytest.raises(FaultError) as caught:
            enclave.request(b'{"op": "foreign"}', 5.0)
        end = enclave.close()
    assert caught.value.code == "enclave.incident"
    assert end["incident"] == "SIGSYS"
    assert end["signal"] == signal.SIGSYS
    assert end["prev"] == evidence.digest_of(enclave.evidence)
    assert end["seq"] == 2


TARGETS = {
    "token": "0" * 16,
    "ip": "127.0.0.1",
    "ip6": "::1",
    "port": 9,
    "dns_port": 9,
    "resolver": False,
    "stream": "/nowhere",
    "datagram": "/nowhere",
    "abstract": "nobody",
    "inherited": 999,
    "passed": 999,
    "pid": 1,
    "address": 0,
    "outside_pipe": 0,
    "outside_socket": 0,
    "shared": "/nowhere",
    "secret": "/etc/passwd",
    "shm_key": 1,
    "queue": "nobody",
    "program": "/usr/bin/true",
}


def test_the_end_is_recorded_once_and_after_the_seal(worker):
    ask(worker, "echo", value=1)
    end = worker.close()
    assert end is worker.close()
    assert (end["status"], end["signal"], end["incident"], end["requests"]) == (0, None, None, 1)
    assert end["prev"] == evidence.digest_of(worker.evidence)


def test_a_change_that_the_host_sees_is_an_incident(worker, monkeypatch):
    real = reading.read
    with monkeypatch.context() as patch:
        patch.setattr(reading, "read", lambda pid: replace(real(pid), seccomp=0))
        with pytest.raises(SealRefused) as caught:
            worker.reverify()
    assert caught.value.code == "enclave.stage2"
    assert "seccomp" in worker.close()["incident"]
    with pytest.raises(FaultError, match="has ended"):
        worker.reverify()


def test_the_filters_are_looked_at_before_each_request(worker, monkeypatch):
    assert ask(worker, "echo", value=1) == b"1"
    changed = replace(worker._sealed, filters=9)
    assert evidence.glance(worker._sealed) == []
    assert [finding.layer for finding in evidence.glance(changed)] == ["stage2"]
    monkeypatch.setattr(worker, "_sealed", changed)
    with pytest.raises(SealRefused) as caught:
        ask(worker, "echo", value=1)
    assert caught.value.code == "enclave.stage2"
    assert not worker.alive


def test_all_facts_are_read_again_before_a_later_request(worker, monkeypatch):
    assert ask(worker, "echo", value=1) == b"1"
    real = reading.read
    monkeypatch.setattr(reading, "read", lambda pid: replace(real(pid), links=("lo", "eth0")))
    worker._looked -= 2.0
    with pytest.raises(SealRefused) as caught:
        ask(worker, "echo", value=1)
    assert caught.value.code == "enclave.network"
    assert not worker.alive


def test_a_worker_that_died_between_requests_is_said_to_have_died(worker):
    os.kill(worker.pid, signal.SIGKILL)
    assert gone(worker.pid)
    with pytest.raises(FaultError, match="SIGKILL") as caught:
        ask(worker, "echo", value=1)
    assert caught.value.code == "enclave.worker"
    assert (worker.close()["signal"], worker.close()["incident"]) == (9, None)


# -- the timer --------------------------------------------------------------------------------


def ended(enclave, within=10.0):
    """Wait until a worker has ended by itself; returns its exit record."""
    until = time.monotonic() + within
    while enclave.alive and time.monotonic() < until:
        time.sleep(0.02)
    assert not enclave.alive
    return enclave.close()


def test_the_timer_looks_at_an_idle_worker_and_ends_one_that_changed(monkeypatch):
    told = []
    with launch(replace(spec(), reverify_s=0.1), told.append) as enclave:
        time.sleep(0.35)
        assert ask(enclave, "echo", value=1) == b"1"
        real = reading.read
        with monkeypatch.context() as patch:
            patch.setattr(reading, "read", lambda pid: replace(real(pid), seccomp=0))
            end = ended(enclave)
        assert "seccomp" in end["incident"]
        assert told == [end]
        with pytest.raises(FaultError, match="has ended"):
            ask(enclave, "echo", value=1)


def test_the_timer_ends_a_request_in_flight(monkeypatch):
    with launch(replace(spec(), reverify_s=0.2)) as enclave:
        real, after = reading.read, time.monotonic() + 0.5
        monkeypatch.setattr(
            reading,
            "read",
            lambda pid: replace(real(pid), seccomp=0) if time.monotonic() > after else real(pid),
        )
        with pytest.raises(SealRefused) as caught:
            ask(enclave, "hang", timeout=20.0)
        assert caught.value.code == "enclave.stage2"
        assert "seccomp" in enclave.close()["incident"]


def test_the_timer_repeats_the_twin_and_a_leak_ends_the_worker(monkeypatch):
    asked = []

    def probe_rung(*_a, older_than_s=None, **_k):
        asked.append(older_than_s)
        return {"leaks": len(asked) > 3}

    def require(report):
        if report["leaks"]:
            raise SealRefused("probe", "the sealed twin got out over tcp4")

    monkeypatch.setattr(twin, "probe_rung", probe_rung)
    monkeypatch.setattr(twin, "require_sealed", require)
    with launch(replace(spec(), reverify_s=0.1)) as enclave:
        end = ended(enclave)
    assert asked == [None, 0.05, 0.05, 0.05, 0.05]  # a failure is tried once more
    assert "tcp4" in end["incident"]


def test_filters_that_are_others_end_the_worker(monkeypatch):
    with launch(replace(spec(), reverify_s=0.1)) as enclave:
        monkeypatch.setattr(evidence, "live_filters", lambda *_: False)
        assert "published" in ended(enclave)["incident"]


def test_a_look_that_fails_in_an_unknown_way_ends_the_worker(monkeypatch):
    with launch(replace(spec(), reverify_s=0.1)) as enclave:
        monkeypatch.setattr(evidence, "differences", lambda *_a, **_k: 1 / 0)
        assert "ZeroDivisionError" in ended(enclave)["incident"]


def test_an_idle_death_by_sigsys_is_an_incident():
    told = []
    with launch(replace(spec(warm="gate"), reverify_s=0.1), told.append) as enclave:
        assert ask(enclave, "gate_later") == b"soon"
        end = ended(enclave)
    assert (end["signal"], end["incident"]) == (signal.SIGSYS, "SIGSYS")
    assert told == [end]


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel's records are for root")
def test_denied_calls_are_counted_after_the_self_test(worker):
    for _ in range(5):
        assert ask(worker, "open", path="/etc/passwd") == b"EPERM"
    end = worker.close()
    if end["denied"]["source"] is None:
        pytest.skip("this kernel keeps no record of denied calls")
    if end["denied"]["exact"]:
        assert end["denied_calls"] >= 5
    assert end["denied"]["calls"]["openat"] >= 1


# -- what never becomes a worker --------------------------------------------------------------

LOADS = {
    "a program that raises": ("raise", FaultError, "enclave.program", "no model here"),
    "a program that refuses": ("refuse", RefusedError, "model.file", "missing"),
    "sys.exit": ("exit", FaultError, "enclave.program", "SystemExit"),
    "os._exit": ("os_exit", FaultError, "enclave.worker", "exit status 3"),
    "a hang": ("hang", SealRefused, "enclave.deadline", "within"),
    "a segfault": ("segfault", FaultError, "enclave.worker", "SIGSEGV"),
    "10 GiB": ("memory", FaultError, "enclave.program", "MemoryError"),
    "a fork bomb": ("fork_bomb", FaultError, "enclave.program", "not permitted"),
    "an open file": ("open", SealRefused, "enclave.descriptors", "/dev/null"),
    "a frame of its own": ("write_channel", SealRefused, "enclave.channel", "kind"),
}


@pytest.mark.parametrize(("warm", "kind", "code", "words"), LOADS.values(), ids=LOADS.keys())
def test_a_program_that_does_not_come_up_is_contained(warm, kind, code, words):
    started = time.monotonic()
    deadline = 0.8 if warm == "hang" else 10.0
    with pytest.raises(kind) as caught:
        launch(spec(warm=warm, deadline_s=deadline))
    assert caught.value.code == code
    assert words in caught.value.message
    assert time.monotonic() - started < 10


def test_a_flood_on_the_error_pipe_is_drained_and_cut():
    with launch(spec(warm="output")) as enclave:
        assert len(enclave._process.words()) == CAPS.stderr_bytes
        assert ask(enclave, "echo", value=1) == b"1"


def test_a_program_of_no_name_does_not_load():
    with pytest.raises(FaultError) as caught:
        launch(SealSpec(profile="worker", program="no.such:thing", caps=CAPS))
    assert "ModuleNotFoundError" in caught.value.message


def test_an_input_that_is_missing_is_refused():
    with pytest.raises(SealRefused) as caught:
        launch(spec(read_only=(Path("/nowhere/model"),)))
    assert caught.value.code == "enclave.files"


def test_a_telemetry_client_without_its_switch_is_refused(monkeypatch):
    facts = replace(host.survey(), telemetry=("libonnxruntime.so",))
    monkeypatch.setattr(host, "survey", lambda: facts)
    with launch(spec()) as enclave:
        assert enclave.evidence["artifacts"]["ort_telemetry"] == "disabled"
    monkeypatch.setattr(plan, "built_environment", lambda **_: {"PATH": "/usr/bin"})
    with pytest.raises(SealRefused) as caught:
        launch(spec())
    assert caught.value.code == "enclave.telemetry"


def test_a_host_that_reaches_no_rung_is_refused_with_the_reasons(monkeypatch):
    facts = replace(host.survey(), arch="riscv64")
    monkeypatch.setattr(host, "survey", lambda: facts)
    with pytest.raises(SealRefused) as caught:
        launch(spec())
    assert caught.value.code == "enclave.rung"
    assert "riscv64" in caught.value.message
    assert caught.value.tried
    assert caught.value.facts is facts


def test_a_lower_rung_is_taken_by_name_only_where_it_is_allowed(monkeypatch):
    """A layer of rung A fails: with `min_rung` A that is a refusal, with B it is rung B."""
    taken = []

    def start(rung, *_a, **more):
        taken.append(rung)
        if rung == "A":
            raise SealRefused("namespaces", "EPERM")
        return list(more["tried"])

    monkeypatch.setattr(seal, "start", start)
    with pytest.raises(SealRefused) as caught:
        launch(replace(spec(), min_rung="A"))
    assert caught.value.code == "enclave.namespaces"
    tried = launch(replace(spec(), min_rung="B"))
    assert taken == ["A", "A", "U"]
    assert {"rung": "A", "reason": "enclave.namespaces: EPERM"} in tried

    def broken(rung, *_a, **_k):
        taken.append(rung)
        raise SealRefused("network", "lo is up")

    monkeypatch.setattr(seal, "start", broken)
    taken.clear()
    with pytest.raises(SealRefused):
        launch(replace(spec(), min_rung="B"))
    assert taken == ["A"]  # not a fact of the host: no rung makes up for it


# -- its parent -------------------------------------------------------------------------------

BROKER = """
import os, time, signal
from pathlib import Path
from airgap.enclave import seal, twin
from airgap.enclave import Caps, SealSpec, launch
twin.probe_rung = lambda *a, **k: {}
twin.require_sealed = lambda report: None
twin.summary = lambda report: report
spec = SealSpec(profile="worker", program=ARGUMENTS[0] + ":create", config={"warm": "handler"},
                read_only=(Path(ARGUMENTS[0]),), caps=Caps(memory_mb=512),
                min_rung=ARGUMENTS[1], rung=ARGUMENTS[1])
"""
ORPHAN = (
    BROKER
    + """
import threading
child = os.fork()
if not child:
    made = []
    # From a thread that ends: the death signal must follow the process.
    starter = threading.Thread(target=lambda: made.append(launch(spec)))
    starter.start(); starter.join()
    enclave = made[0]
    assert enclave.request(b"alive", 5.0) == b"alive"
    time.sleep(0.2)
    assert enclave.request(b"alive", 5.0) == b"alive"
    Path(ARGUMENTS[2]).write_text(json.dumps([enclave.pid, enclave._process._popen.pid]))
    # The worker hangs and never looks at its channel again.
    threading.Thread(target=lambda: enclave.request(b'{"op": "hang"}', 60.0), daemon=True).start()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
pids = json.loads(Path(ARGUMENTS[2]).read_text())
for _ in range(200):
    left = [p for p in pids if Path(f"/proc/{p}").exists()
            and Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] != "Z"]
    if not left:
        break
    time.sleep(0.01)
print(json.dumps(left))
"""
)


# Root reaches A, a user may be left with U or B; the rest in `make soak`.
USUAL = [
    pytest.param(
        starter, rung, marks=() if rung in {"root": "A"}.get(starter, "UB") else pytest.mark.soak
    )
    for starter in starters()
    for rung in "AUBC"
]


# No fact of /proc tells the death signal: this is the proof of that layer, and that it can fail.
WITHOUT_DEATH_SIGNAL = """
import shutil, tempfile
from pathlib import Path
import airgap.enclave
from airgap.enclave import plan
real, whole = Path(airgap.enclave.__file__).parent, plan.package_folders()
folder = Path(tempfile.mkdtemp()) / "airgap"
shutil.copytree(real, folder / "enclave", ignore=shutil.ignore_patterns("__pycache__"))
(folder / "__init__.py").write_text("")
folder.parent.chmod(0o755)
for path in (folder / "enclave").glob("*.py"):
    text = path.read_text()
    path.write_text(text.replace("PR_SET_PDEATHSIG, linux.SIGKILL", "PR_SET_PDEATHSIG, 0"))
assert "PR_SET_PDEATHSIG, 0" in (folder / "enclave" / "launcher.py").read_text()
plan.package_folders = lambda: {**whole, "airgap": str(folder)}
"""


def orphans(starter, rung, before=""):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        note = Path(folder, "pids")
        note.touch()
        note.chmod(0o666)
        return run_as(starter, before + ORPHAN, str(PROGRAMS), rung, str(note))


@pytest.mark.parametrize(("starter", "rung"), USUAL)
def test_a_killed_broker_leaves_no_orphan(starter, rung):
    assert orphans(starter, rung) == []


@pytest.mark.parametrize(("starter", "rung"), USUAL)
def test_without_the_death_signal_there_would_be_orphans(starter, rung):
    left = orphans(starter, rung, WITHOUT_DEATH_SIGNAL)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left


TERMINAL = (
    BROKER
    + """
enclave = launch(spec)
session = int(Path(f"/proc/{enclave.pid}/stat").read_text().rpartition(")")[2].split()[3])
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(os.getpgid(0), signal.SIGINT)  # what Ctrl-C on the terminal sends
time.sleep(0.1)
print(json.dumps([session != os.getsid(0), enclave.request(b"alive", 5.0).decode(), enclave.rung]))
"""
)


@pytest.mark.parametrize(("starter", "rung"), USUAL)
def test_ctrl_c_on_the_terminal_leaves_the_worker_to_its_broker(starter, rung):
    code = "import os\nos.setpgid(0, 0)\n" + TERMINAL
    assert run_as(starter, code, str(PROGRAMS), rung) == [True, "alive", rung]


def test_a_forgotten_worker_ends_with_its_object():
    enclave = launch(spec())
    pid = enclave.pid
    del enclave
    assert gone(pid)


# -- inside other namespaces ------------------------------------------------------------------


@pytest.mark.parametrize(
    "outer",
    [["unshare", "-n"], ["unshare", "-rn"], ["unshare", "-rmpf", "--mount-proc"]],
    ids=["no network", "root of a user namespace, no network", "a small container"],
)
def test_a_seal_holds_inside_an_outer_namespace(outer, tmp_path):
    """The demo runs where the host itself has no route."""
    code = (
        "import json; from pathlib import Path; from airgap.enclave import launch, SealSpec\n"
        f"e = launch(SealSpec(profile='worker', program={str(PROGRAMS)!r} + ':create',"
        f" read_only=(Path({str(PROGRAMS)!r}),), state=Path({str(tmp_path)!r})))\n"
        "print(json.dumps([e.rung, e.request(b'x', 5).decode()])); e.close()\n"
    )
    if os.geteuid() == 0 and "-r" in outer[1]:
        # Root that is root outside and has no other id: nothing to become.
        code = "from policy.errors import AirgapError\ntry:\n" + textwrap.indent(code, " ")
        code += "except AirgapError as error: print(json.dumps(error.code))\n"
        wanted = "enclave.identity"
    else:
        wanted = ["A", "x"]
    done = subprocess.run(
        [*outer, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=HERE,
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"unshare is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


# -- the evidence of a real worker ------------------------------------------------------------


def test_the_record_says_what_the_host_says(shared):
    found = shared.evidence
    assert found["seccomp"]["s1"]["sha256"] == filters.PUBLISHED["stage1.x86_64"]
    if found["rung"] == "A":
        assert found["seccomp"]["s2"]["sha256"] == filters.PUBLISHED["stage2.x86_64"]
        assert found["net"] == {"links": ["lo:DOWN"], "addrs": [], "routes": 0, "sockets": 0}
        assert all(mount.endswith(":ro") for mount in found["mounts"] if "/dev/" not in mount)
    if os.geteuid() == 0:
        assert found["seccomp"]["live_dump_match"] in {True, None}
    assert found["proc"]["uid"] != 0
    assert set(found["self_test"].values()) == {"EPERM"}
    assert found["fds"] == ["0:/dev/null", "1:/dev/null", "2:pipe", "3:pipe", "4:pipe"]


def test_the_test_program_is_harmless_outside():
    assert json.loads(Program({}).handle(b'{"op": "echo", "value": 1}', print)) == 1
