"""The launcher, the fixture and the broker as they run, each step on a real process."""

from __future__ import annotations

import json
import marshal
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from covered import keep, measuring, run_covered, start_line
from enclave_harness import HERE, NAMESPACES, PROGRAMS, ROOT, needs_namespaces

from airgap.enclave import (
    Caps,
    SealRefused,
    SealSpec,
    channel,
    evidence,
    filters,
    host,
    launcher,
    plan,
    probe,
    process,
    reading,
    seal,
    twin,
)
from airgap.enclave.channel import Reader, Writer
from policy.errors import FaultError

FACTS = host.survey()
SPEC = SealSpec(
    profile="worker",
    program=f"{PROGRAMS}:create",
    read_only=(PROGRAMS,),
    caps=Caps(memory_mb=512),
    deadline_s=10.0,
)
RUNG = "A" if NAMESPACES else "B"


def plan_of(rung=RUNG, **change):
    made = plan.build(
        FACTS,
        rung=rung,
        profile="worker",
        part="worker",
        read_only=[str(PROGRAMS)],
        writable=[],
        environment={"PATH": "/usr/bin"},
        memory_mb=512,
        descriptors=256,
        file_mb=0,
        uid=None,
    )
    return {**made, **change}


# -- the launcher, up to the program --------------------------------------------------------------

LAUNCHER = """
import os, sys
sys.path.insert(0, ARGUMENTS[0])
from airgap.enclave import channel, launcher
def finish(*command):
    # In place of exec, with every layer taken: the channel is the only way left.
    if COVERED:
        COVERED.stop()
    channel.send(4, channel.LOADED, COVERED.get_data().dumps() if COVERED else b"")
    os._exit(0)
os.execve = finish
launcher.main(sys.argv[1:])
"""


def launch_to_exec(made, *, within=20.0, ppid=None):
    """Run the launcher as a process on a plan; returns its frames by kind."""
    incoming, to = os.pipe()
    read, outgoing = os.pipe()
    repo = str(HERE.parent)
    code = start_line() + LAUNCHER.replace("ARGUMENTS[0]", repr(repo))
    ends = [str(incoming), str(outgoing), str(ppid or os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *ends],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(incoming, outgoing),
        cwd="/",
    )
    os.close(incoming)
    os.close(outgoing)
    deadline = time.monotonic() + within
    frames = {}
    try:
        Writer(to).write(channel.encode(channel.PLAN, marshal.dumps(made)), deadline=deadline)
        kinds = (channel.ALIVE, channel.LOADED, channel.REFUSED)
        while not {channel.LOADED, channel.REFUSED} & set(frames):
            frame = Reader(read).read(kinds, cap=64 << 20, deadline=deadline)
            frames[frame.kind] = frame.payload
    except channel.ChannelError as error:
        frames["broken"] = error.kind
    finally:
        os.close(to)
        os.close(read)
        words = process.stderr.read().decode()
        process.stderr.close()
        frames["status"] = process.wait()
        frames["words"] = words
    keep(frames.get(channel.LOADED))
    return frames


@needs_namespaces
def test_the_launcher_takes_every_layer_and_then_execs():
    frames = launch_to_exec(plan_of())
    assert channel.LOADED in frames, frames
    assert int(frames[channel.ALIVE]) > 1
    assert frames["status"] == 0
    if measuring():
        assert len(frames[channel.LOADED]) > 100


@needs_namespaces
@pytest.mark.parametrize("rung", ["A", "U", "B"])
def test_the_launcher_takes_the_layers_of_each_rung(rung):
    made = plan_of(rung)
    if rung == "A":  # as for a GPU: a /proc of the own PID namespace
        made["binds"] = sorted(
            [*made["binds"], {"path": "/proc", "mode": "proc", "owner": None}],
            key=lambda bind: len(bind["path"]),
        )
        made["landlock"]["rules"].append(["/proc", "proc"])
    frames = launch_to_exec(made)
    if channel.REFUSED in frames and json.loads(frames[channel.REFUSED])["layer"] == "files":
        pytest.skip("this interpreter cannot be read by another uid")
    assert channel.LOADED in frames, frames


def refused(made, **more):
    frames = launch_to_exec(made, **more)
    assert channel.REFUSED in frames, frames
    assert frames["status"] == launcher.REFUSED_STATUS
    return json.loads(frames[channel.REFUSED])["layer"]


REFUSED = {
    "another filter": ("stage1", {"stage1": "0" * 64}),
    "a limit of no name": ("limits", {"limits": {"NOTHING": 1}}),
    "an input that nobody can read": ("files", {"check": ["/nowhere"]}),
    "a rule for a path that is not there": (
        "landlock",
        {"landlock": {"abi": 1, "rules": [["/nowhere", "read"]]}},
    ),
    "a source that is not there": (
        "root",
        {"binds": [{"path": "/nowhere", "mode": "read", "owner": None}]},
    ),
    "a mount of no known file system": ("root", {"root_kib": "x"}),
}


@needs_namespaces
@pytest.mark.parametrize(("layer", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_the_launcher_refuses_a_plan_that_it_cannot_carry_out(layer, change):
    assert refused(plan_of(**change)) == layer


def test_a_launcher_of_another_parent_refuses():
    # It has not read the plan yet: a full pipe to a dead reader is no matter.
    assert refused(plan_of(), ppid=1) == "parent"


def test_a_plan_that_is_no_plan_is_refused():
    frames = launch_to_exec({})
    assert json.loads(frames[channel.REFUSED])["layer"] == "start"


@pytest.mark.skipif(not ROOT, reason="a user cannot stay root")
def test_a_worker_that_would_stay_root_is_refused():
    made = plan_of("B")
    assert refused({**made, "identity": None, "namespaces": []}) == "identity"


# -- the fixture ----------------------------------------------------------------------------------

FIXTURE = """
from airgap.enclave import fixture, host
uid = host.free_uid() if host.survey().uid == 0 else None
ANSWER = fixture.run(ARGUMENTS[0], uid)
"""
CONTROL = """
import os, tempfile
from pathlib import Path
from airgap.enclave import fixture, probe
own = fixture.enter_network()
folder = Path(tempfile.mkdtemp())
with fixture.Outside(folder, None, own_network=own) as outside:
    targets = outside.targets("control")
    twin = probe.Twin({"targets": targets})
    first = twin.warm_up()["stage1"]
    targets = outside.targets("again")
    twin._targets.update(targets)
    wanted = json.dumps({"op": "all", "token": targets["token"]}).encode()
    second = json.loads(twin.handle(wanted, None))
    made = int(twin.handle(b'{"op": "foreign"}', None))
    status = probe.main([json.dumps(outside.targets("third")), str(folder / "found.json")])
    third = json.loads((folder / "found.json").read_text())
    import time; time.sleep(0.1)
    ANSWER = [first, second, third, outside.received(), made, status]
"""


@needs_namespaces
def test_a_starter_that_lets_no_one_read_its_files_is_probed_as_any_other():
    report = run_covered(f"import os\nos.umask(0o777)\n{FIXTURE}", "A")
    assert twin.require_sealed(report) is None


@needs_namespaces
@pytest.mark.parametrize("rung", ["A", "U", "C"] if ROOT else ["A", "U", "B", "C"])
def test_the_fixture_reports_a_leaking_control_and_a_sealed_twin(rung):
    report = run_covered(FIXTURE, rung)
    if report.get("refused", {}).get("layer") == "files":
        pytest.skip("this interpreter cannot be read by another uid")
    assert twin.judge(report).sealed, twin.judge(report).reason


@needs_namespaces
def test_without_a_seal_every_channel_of_the_kernel_is_open():
    first, second, third, received, made, status = run_covered(CONTROL)
    assert status == 0
    assert made != 0
    for found in (first, second, third):
        assert {name for name in probe.CORE if found[name][0] != "OPEN"} == set()
    for phase in ("control", "again"):
        assert set(received[phase]) >= set(probe.CORE) & set(twin.HEARD)


def test_channels_that_cannot_be_tried_say_so():
    assert probe.attempt(probe.CHANNELS["dns_getaddrinfo"], {"resolver": False}) == [
        "BLOCKED",
        "skipped",
    ]
    assert probe.attempt(lambda _: 1 / 0, {}) == ["BLOCKED", "ZeroDivisionError"]


def test_a_host_without_namespaces_uses_loopback_alone():
    """No address but loopback and no resolver: nothing may leave an ordinary host."""
    code = """
import tempfile
from pathlib import Path
from airgap.enclave import fixture, linux, probe
def refuse(*_):
    raise OSError(1, "no")
linux.call, call = refuse, linux.call
own = fixture.enter_network()
linux.call = call
with fixture.Outside(Path(tempfile.mkdtemp()), None, own_network=own) as outside:
    targets = outside.targets("control")
    names = ("tcp4", "udp4_sendto", "dns_udp", "unix_path_stream", "dns_getaddrinfo")
    sent = {name: probe.attempt(probe.CHANNELS[name], targets) for name in names}
    import time; time.sleep(0.1)
    heard = outside.received()["control"]
    ANSWER = [own, targets["ip"], targets["ip6"], targets["resolver"], heard, sent]
"""
    own, ip, ip6, resolver, heard, sent = run_covered(code)
    assert own is False
    assert (ip, ip6, resolver) == ("127.0.0.1", "::1", False)
    assert set(heard) == {"tcp4", "udp4_sendto", "dns_udp", "unix_path_stream"}
    assert sent["dns_getaddrinfo"] == ["BLOCKED", "skipped"]


# -- the broker's side ----------------------------------------------------------------------------


def start(**change):
    """Start the test program with a plan that was changed on the way."""
    build = plan.build

    def changed(*arguments, **more):
        return {**build(*arguments, **more), **change}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "build", changed)
        return seal.start(RUNG, SPEC, FACTS)


@needs_namespaces
def test_a_refusal_of_the_launcher_names_its_layer():
    with pytest.raises(SealRefused) as caught:
        start(stage1="0" * 64)
    assert caught.value.code == "enclave.stage1"


@needs_namespaces
@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ({"argv": ["/usr/bin/true", "x"]}, "landlock"),
        ({"env": {"PATH": "/elsewhere"}, "profile": "other"}, None),
    ],
)
def test_what_the_plan_says_is_what_is_verified(change, layer):
    if layer is None:
        start(**change).close()
        return
    with pytest.raises((SealRefused, FaultError)):
        start(**change)


@needs_namespaces
def test_a_finding_of_the_broker_refuses_and_ends_the_process(monkeypatch):
    seen = []

    def find(facts, *_a, **_k):
        seen.append(facts.pid)
        return [evidence.Finding("nnp", "off")]

    monkeypatch.setattr(evidence, "verify", find)
    with pytest.raises(SealRefused) as caught:
        start()
    assert caught.value.code == "enclave.nnp"
    time.sleep(0.05)
    with pytest.raises(OSError, match="No such"):
        reading.read(seen[0])


@needs_namespaces
def test_filters_that_are_not_the_published_ones_are_refused(monkeypatch):
    monkeypatch.setattr(evidence, "live_filters", lambda *_: False)
    with pytest.raises(SealRefused) as caught:
        start()
    assert caught.value.code == ("enclave.parent" if RUNG == "A" else "enclave.stage2")


@needs_namespaces
def test_a_waiting_parent_that_is_not_sealed_is_refused(monkeypatch):
    if RUNG != "A":
        pytest.skip("only rung A has a waiting parent")
    real, shown = reading.read, {}

    def read(pid):
        found = real(pid)
        return found if found.pid_inside == 1 else replace(found, **shown)

    monkeypatch.setattr(reading, "read", read)
    start().close()
    shown["no_new_privs"] = 0
    with pytest.raises(SealRefused) as caught:
        start()
    assert caught.value.code == "enclave.parent"
    shown.clear()
    shown["seccomp"] = 0
    monkeypatch.setattr(process, "_GRACE_S", 0.1)
    with pytest.raises(SealRefused, match="no filter"):
        start()


@needs_namespaces
def test_a_shared_session_is_refused(monkeypatch):
    real = reading.read
    monkeypatch.setattr(reading, "read", lambda pid: replace(real(pid), session=1))
    with pytest.raises(SealRefused) as caught:
        start()
    assert caught.value.code == "enclave.parent"


@needs_namespaces
def test_a_process_that_is_gone_is_no_proof(monkeypatch):
    def gone(_):
        raise FileNotFoundError("/proc/1")

    monkeypatch.setattr(reading, "read", gone)
    with pytest.raises(SealRefused) as caught:
        start()
    assert caught.value.code == "enclave.evidence"


def test_a_launcher_that_cannot_start_is_a_fault(monkeypatch):
    monkeypatch.setattr(plan, "launcher_argv", lambda *_: ["/nowhere/python"])
    with pytest.raises(FaultError) as caught:
        start()
    assert caught.value.code == "enclave.worker"


FAKES = {
    "silence": ("sleep 9", "enclave.deadline", 0.3),
    "an early end": ("exit 5", "enclave.worker", 9),
    "a refusing parent": ("exit 97", "enclave.parent", 9),
    "a forbidden call": ("kill -SYS $$", "enclave.incident", 9),
    "noise": ("echo not a frame at all >&$4; sleep 9", "enclave.channel", 9),
    "a foreign pid": ("printf '\\0\\0\\0\\001p\\0\\0\\0\\0001' >&$4; sleep 9", "enclave.parent", 9),
    "a strange layer": (
        'printf \'\\0\\0\\0\\020n\\0\\0\\0\\0{"layer": "odd"}\' >&$4; sleep 9',
        "enclave.start",
        9,
    ),
}


@pytest.mark.parametrize(("script", "code", "within"), FAKES.values(), ids=FAKES.keys())
def test_a_launcher_that_is_somebody_else_is_refused(script, code, within, monkeypatch):
    """Whatever answers in place of the launcher, the broker only believes the host."""

    def argv(_incoming, outgoing):
        words = script.replace("$4", str(outgoing))
        return ["/bin/bash", "-c", words]

    monkeypatch.setattr(plan, "launcher_argv", argv)
    with pytest.raises((SealRefused, FaultError)) as caught:
        seal.start(RUNG, replace(SPEC, deadline_s=within), FACTS)
    assert caught.value.code == code


def test_ends_are_read_from_statuses():
    assert process.exit_of(0) == {"status": 0, "signal": None}
    assert process.exit_of(128 + signal.SIGSYS) == {"status": None, "signal": 31}
    assert process.exit_of(-signal.SIGKILL) == {"status": None, "signal": 9}
    assert process.exit_of(128) == {"status": 128, "signal": None}
    assert process.exit_of(launcher.HIGH_STATUS) == {"status": 255, "signal": None}
    assert process.how({"status": None, "signal": 200}) == "signal 200"
    assert process.how({"status": 98, "signal": None}) == "the program did not load"


@pytest.mark.parametrize(
    "payload", [b"nonsense", b"[" * 100_000, b"[]", b'{"self_test": {}}', b"{}"]
)
def test_a_self_test_that_says_nothing_is_refused(payload):
    with pytest.raises(SealRefused):
        seal._self_test(payload, {"last": "stage2"})


def test_a_door_that_opened_is_refused():
    wanted = {"last": "stage2"}
    assert seal._self_test(b'{"self_test": {"tcp4": "EPERM"}}', wanted) == {"tcp4": "EPERM"}
    with pytest.raises(SealRefused) as caught:
        seal._self_test(b'{"self_test": {"tcp4": "EPERM", "open": "OPEN"}}', wanted)
    assert caught.value.code == "enclave.stage2"


def test_with_a_gpu_a_file_may_be_missing_and_never_open():
    wanted = {"last": "stage2_gpu"}
    for answer in ("ENOENT", "EACCES", "EPERM"):
        payload = json.dumps({"self_test": {"open": answer}}).encode()
        assert seal._self_test(payload, wanted) == {"open": answer}
    for door, answer in (("open", "OPEN"), ("tcp4", "ENOENT")):
        with pytest.raises(SealRefused):
            seal._self_test(json.dumps({"self_test": {door: answer}}).encode(), wanted)


def test_public_names_are_fetched_from_their_modules():
    import airgap.enclave as room

    for name in room.__all__:
        assert getattr(room, name).__name__ == name
    with pytest.raises(AttributeError):
        room.no_such_name  # noqa: B018
    assert filters.count(filters.no_exec()) == 11
