"""The entry inside the seal: one program, typed errors, an end with its broker."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from sealed_programs import Program

from airgap.enclave import channel, filters, linux, stub, tables, worker
from airgap.enclave.channel import ProgramError


@pytest.fixture
def wire(monkeypatch):
    """Put pipes where the worker expects its channel; yields (to the worker, from the worker)."""
    incoming, to_worker = os.pipe()
    from_worker, outgoing = os.pipe()
    for module in (worker, stub):
        monkeypatch.setattr(module, "CHANNEL_IN", incoming)
        monkeypatch.setattr(module, "CHANNEL_OUT", outgoing)
    yield to_worker, from_worker
    for end in (incoming, to_worker, from_worker, outgoing):
        try:
            os.close(end)
        except OSError:
            continue


def ask(wire, *frames):
    """Queue requests, close the channel, serve, and return what the worker answered."""
    to_worker, from_worker = wire
    for number, (kind, payload) in enumerate(frames, 1):
        channel.send(to_worker, kind, payload, number)
    os.close(to_worker)
    answers = []
    reader = threading.Thread(target=collect, args=(from_worker, answers), daemon=True)
    reader.start()
    with pytest.raises(EOFError):
        worker.serve(Program({}), 1 << 20)
    reader.join(0.2)
    return answers


def collect(end, into):
    with contextlib.suppress(EOFError, OSError):
        while True:
            into.append(channel.receive(end, 1 << 20))


def echo(value, parts=0):
    return channel.REQUEST, json.dumps({"op": "echo", "value": value, "parts": parts}).encode()


def test_requests_are_answered_in_order_with_their_parts(wire):
    answers = ask(wire, echo(1, 2), echo("two"))
    assert [(a.kind, a.request, a.payload) for a in answers] == [
        (channel.PART, 1, b"0"),
        (channel.PART, 1, b"1"),
        (channel.REPLY, 1, b"1"),
        (channel.REPLY, 2, b'"two"'),
    ]


def test_a_refusal_of_the_program_keeps_its_code_and_is_cut(wire):
    wanted = json.dumps({"op": "refuse", "code": "prompt.g01"}).encode()
    refused, after = ask(wire, (channel.REQUEST, wanted), echo(1))
    found = json.loads(refused.payload)
    assert refused.kind == channel.ERROR
    assert found["code"] == "prompt.g01"
    assert len(found["message"]) == len(found["hint"]) == channel.ERROR_TEXT_LIMIT
    assert after.kind == channel.REPLY


def test_a_failure_of_the_program_fails_one_request(wire):
    broken, after = ask(wire, (channel.REQUEST, b'{"op": "raise"}'), echo(1))
    assert broken.kind == channel.FAULT
    assert json.loads(broken.payload)["message"].startswith("RuntimeError: broken")
    assert after.kind == channel.REPLY


def test_a_frame_that_is_no_request_ends_the_worker(wire):
    channel.send(wire[0], channel.SEAL, b"")
    with pytest.raises(ValueError, match="unknown frame"):
        worker.serve(Program({}), 100)


@pytest.mark.parametrize(
    "program",
    ["sealed_programs:create", str(Path(__file__).parents[1] / "sealed_programs.py") + ":create"],
)
def test_a_program_is_named_by_module_or_file(program, wire):
    wanted = {"program": program, "config": {"a": 1}, "request_cap": 77, "cuda": None}
    channel.send(wire[0], channel.PROGRAM, json.dumps(wanted).encode())
    made, seen = worker.load()
    assert (made.config, seen) == ({"a": 1}, wanted)
    loaded = channel.receive(wire[1], 1 << 20)
    assert loaded.kind == channel.LOADED
    assert json.loads(loaded.payload)["program"]["pid"] == os.getpid()


def test_a_gpu_is_asked_before_the_program_is_loaded(wire, monkeypatch):
    from airgap.enclave import gpu

    monkeypatch.setattr(gpu, "initialise", lambda library: {"cuInit": 0, "driver": len(library)})
    wanted = {"program": "sealed_programs:create", "config": {}, "request_cap": 1, "cuda": "lib"}
    channel.send(wire[0], channel.PROGRAM, json.dumps(wanted).encode())
    worker.load()
    loaded = json.loads(channel.receive(wire[1], 1 << 20).payload)
    assert loaded["gpu"] == {"cuInit": 0, "driver": 3}


def test_a_gpu_that_is_not_there_is_a_refusal_of_its_layer(wire, monkeypatch):
    leave(monkeypatch)
    with pytest.raises(SystemExit):
        worker.initialise_gpu("libcuda-of-nobody.so.1")
    frame = channel.receive(wire[1], 1 << 20)
    assert frame.kind == channel.REFUSED
    assert json.loads(frame.payload)["layer"] == "gpu"


@pytest.mark.parametrize("name", ["no_such_module", "/etc/hostname"])
def test_a_program_that_is_not_there_does_not_load(name):
    with pytest.raises(ImportError):
        worker.find_module(name)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ProgramError("model.file", "gone", "install"), channel.ERROR, "model.file"),
        (ValueError("x"), channel.FAULT, ""),
    ],
)
def test_a_program_that_does_not_load_is_reported(error, kind, code, wire, capfd):
    worker.fault(error)
    frame = channel.receive(wire[1], 1 << 20)
    assert frame.kind == kind
    assert json.loads(frame.payload)["code"] == code
    assert type(error).__name__ in capfd.readouterr().err


def test_a_broken_channel_silences_the_report(capfd, monkeypatch):
    monkeypatch.setattr(worker, "CHANNEL_OUT", 987654)
    worker.fault(ValueError("x"))
    assert "ValueError" in capfd.readouterr().err


def leave(monkeypatch):
    """Turn os._exit into an exception that carries the status."""

    def exit_(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", exit_)


@pytest.mark.parametrize(
    ("load", "serve", "status"),
    [
        (EOFError, None, 0),
        (ValueError, None, worker.LOAD_STATUS),
        (None, EOFError, 0),
        (None, ValueError, worker.PROTOCOL_STATUS),
    ],
)
@pytest.mark.usefixtures("wire")
def test_the_worker_ends_with_a_status_that_tells_why(load, serve, status, monkeypatch):
    def fail(error):
        def step(*_):
            if error:
                raise error("x")
            return Program({}), {"stage2": "stage2", "request_cap": 10}

        return step

    leave(monkeypatch)
    monkeypatch.setattr(worker, "load", fail(load))
    monkeypatch.setattr(worker, "seal", lambda _: None)
    monkeypatch.setattr(worker, "serve", fail(serve))
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        worker.main()
    assert caught.value.code == status


def test_only_the_word_of_the_broker_seals(wire):
    channel.send(wire[0], channel.REQUEST, b"")
    with pytest.raises(ValueError, match="did not seal"):
        worker.seal("stage2")


def test_sealing_tries_every_door_and_reports(wire, monkeypatch):
    done = []
    monkeypatch.setattr(linux, "prctl", lambda *pair: done.append(pair))
    monkeypatch.setattr(filters, "install", lambda program: done.append(filters.digest(program)))
    monkeypatch.setattr(
        worker, "prepare_attempts", lambda: {"tcp4": lambda: "EPERM", "open": lambda: "OPEN"}
    )
    channel.send(wire[0], channel.SEAL, b"")
    worker.seal("stage2")
    assert done == [
        (linux.PR_SET_DUMPABLE, 0),
        filters.digest(filters.stage2(os.getpid())),
    ]
    ready = channel.receive(wire[1], 1 << 20)
    assert json.loads(ready.payload) == {"self_test": {"tcp4": "EPERM", "open": "OPEN"}}


def test_every_door_is_shut_under_stage_2():
    """In a child: the self-test after the real filter."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, tables.CHANNEL_OUT)
        attempts = worker.prepare_attempts()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        filters.install(filters.stage2(os.getpid()))
        found = {name: attempt() for name, attempt in attempts.items()}
        os.write(tables.CHANNEL_OUT, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = json.loads(os.read(read, 65536))
    os.close(read)
    assert set(found.values()) == {"EPERM"}
    assert len(found) == 15


def test_an_open_door_is_told():
    assert worker._attempt(linux.NUMBER["getpid"], ())() == "OPEN"
    assert worker._attempt(linux.NUMBER["close"], (987654,))() == errno.errorcode[errno.EBADF]


# -- the conversion stub -----------------------------------------------------------------------


def test_the_stub_closes_exec_first_and_then_runs_the_program(wire, monkeypatch, tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import sys\nprint('ran', *sys.argv[1:])\n")
    order = []
    monkeypatch.setattr(filters, "install", lambda p: order.append(filters.digest(p)))
    monkeypatch.setattr(linux, "prctl", lambda *pair: order.append(pair))
    monkeypatch.setattr(os, "dup2", lambda *pair: order.append(pair))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    ran = []
    monkeypatch.setattr(stub, "run", lambda *words: ran.append(words))
    wanted = {"kind": "script", "name": str(script), "arguments": ["a", "b"]}
    channel.send(wire[0], channel.SEAL, b"")
    channel.send(wire[0], channel.REQUEST, json.dumps(wanted).encode())
    stub.main()
    assert order[0] == filters.PUBLISHED["no_exec.x86_64"]
    assert order[1] == (linux.PR_SET_DUMPABLE, 0)
    assert ran == [("script", str(script), ["a", "b"])]
    assert [channel.receive(wire[1], 100).kind for _ in range(2)] == [
        channel.LOADED,
        channel.READY,
    ]


def test_the_stub_waits_for_the_broker(wire, monkeypatch):
    monkeypatch.setattr(filters, "install", lambda _: None)
    channel.send(wire[0], channel.REQUEST, b"{}")
    with pytest.raises(ValueError, match="did not seal"):
        stub.main()


def test_the_stub_runs_scripts_and_modules(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    script = tmp_path / "program.py"
    script.write_text("import sys\nprint(__name__, *sys.argv[1:])\n")
    stub.run("script", str(script), ["x"])
    monkeypatch.syspath_prepend(str(tmp_path))
    stub.run("module", "program", ["y"])
    assert capsys.readouterr().out == "__main__ x\n__main__ y\n"
