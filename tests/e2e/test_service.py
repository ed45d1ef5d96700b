"""The daemon, with real accounts: two people, one worker; denied, cancelled, killed, drained."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket as sockets
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import ADA, AIRGAP, BEN, JOB, NOBODY, Person, Running, lab_of, place_of, run

from airgap import cli
from airgap.audit import load_ring, verify_log
from airgap.service import client, wire
from policy.errors import FaultError, RefusedError

pytestmark = [needs_root, needs_namespaces]


@pytest.fixture(scope="module")
def lab(road):
    with lab_of(road) as copy:
        yield copy


@pytest.fixture
def daemon(lab):
    with place_of(lab) as running:
        yield running.start()


def cut_short(running, uid):
    """Ask for much and leave at the first word of progress."""

    def act():
        with client.connect(running.socket) as connection:
            options = {"n": 400, "seed": 3}
            message = {"op": "run", **JOB, "options": options, "project": "route-design"}
            wire.send(connection, {**message, "held": "", "files": []})
            found = wire.receive(connection, wire.MESSAGE_LIMIT)
            wire.send(connection, {"op": "cancel"})
            while found and found["event"] == "progress":
                found = wire.receive(connection, wire.MESSAGE_LIMIT)
            return found

    return Person(uid, act)


def outcomes(running):
    return [found[:2] for found in running.outcomes()]


def test_people_are_served_each_by_her_own_rights(daemon):
    before, earlier = len(outcomes(daemon)), len(daemon.records("inference"))
    ada = run(daemon, ADA, project="route-design", options={"n": 2, "seed": 5})
    again = run(daemon, ADA, project="route-design", options={"n": 2, "seed": 5})
    ben, nobody = run(daemon, BEN), run(daemon, NOBODY)
    first, second = ada.result(), again.result()
    assert first["rows"] == second["rows"]
    assert first["request"] != second["request"]
    assert ben.result()["code"].startswith("policy.")
    assert nobody.result()["code"] == "site.person"
    assert outcomes(daemon)[before:] == [(ADA, "complete")] * 2
    denied = {r["actor"]["uid"]: r for r in daemon.records("denial")}
    assert set(denied) == {BEN, NOBODY}
    assert (denied[NOBODY]["err"]["code"], "name" in denied[NOBODY]["actor"]) == (
        "site.person",
        False,
    )
    auth = {r["actor"]["auth"] for r in daemon.records("inference")[earlier:]}
    assert auth == {"peercred"}


def test_the_command_prints_and_writes_what_it_does_without_a_daemon(daemon):
    folder = daemon.socket.parent / "out"
    folder.mkdir()
    folder.chmod(0o777)
    words = ["run", "retrosynthesis", "--smiles", "CC(=O)Nc1ccccc1", "-n", "3", "--seed", "7"]
    words += ["--project", "route-design", "--socket", str(daemon.socket)]
    words += [f"--{kind}={folder}/{kind}" for kind in ("csv", "sdf", "html", "receipt")]

    def act():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = cli.invoke(words)
        return [status, printed.getvalue()]

    status, text = Person(ADA, act).result()
    print(text)
    assert status == 0, text
    for word in ("on record:", "sealed: rung", "seed 7", "csv:", "votes"):
        assert word in text
    assert (folder / "csv").read_text().count("\n") > 1
    assert "<svg" in (folder / "html").read_text()
    assert (folder / "receipt").read_text().startswith("c2sp.org/tlog-proof@v1")
    assert (folder / "sdf").stat().st_uid == ADA
    words.append("--model=other")
    assert Person(ADA, act).result()[0] == 2


def test_one_that_leaves_is_cancelled_and_the_other_is_answered(daemon):
    before = len(outcomes(daemon))
    gone, stays = cut_short(daemon, ADA), run(daemon, ADA, project="route-design")
    assert gone.result()["code"] == "request.cancelled"
    assert stays.result()["rows"]
    assert sorted(outcomes(daemon)[before:]) == [(ADA, "cancelled"), (ADA, "complete")]


def test_a_person_has_so_many_requests_at_once_and_sees_no_others(daemon):
    many = [cut_short(daemon, ADA) for _ in range(4)]
    codes = sorted(each.result()["code"] for each in many)
    assert set(codes) <= {"request.busy", "request.cancelled"}
    status = Person(BEN, lambda: client.status(daemon.socket)).result()
    assert (status["person"], status["running"]) == ("ben", 0)
    assert "route-design" not in json.dumps(status)


def test_a_killed_worker_is_an_incident_and_a_new_one_serves(daemon):
    seals = len(daemon.records("enclave.seal"))
    before = len(daemon.records("enclave.incident"))
    begun = len(daemon.records("inference"))
    victim = cut_long(daemon)
    until = time.monotonic() + 60
    while len(daemon.records("inference")) == begun and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(daemon.worker(), signal.SIGKILL)
    assert victim.result()["code"] == "enclave.worker"
    while len(daemon.records("enclave.seal")) < seals + 2 and time.monotonic() < until:
        time.sleep(0.1)
    (incident,) = daemon.records("enclave.incident")[before:]
    assert (incident["data"]["profile"], incident["data"]["signal"]) == ("worker", 9)
    while time.monotonic() < until:
        found = run(daemon, ADA, project="route-design").result()
        if "rows" in found:
            break
        assert found["code"] == "enclave.worker"
        time.sleep(0.2)
    assert found["rows"]


def cut_long(running):
    return run(running, ADA, project="route-design", options={"n": 2000, "seed": 1})


def test_sigterm_lets_those_under_way_end_takes_no_new_one_and_the_log_verifies(daemon):
    slow = run(daemon, ADA, project="route-design", options={"n": 60, "seed": 1})
    before = len(outcomes(daemon))
    until = time.monotonic() + 60
    intents = len([r for r in daemon.records("inference") if r["phase"] == "intent"])
    while intents <= before and time.monotonic() < until:
        intents = len([r for r in daemon.records("inference") if r["phase"] == "intent"])
        time.sleep(0.02)
    daemon.process.send_signal(signal.SIGTERM)
    assert len(slow.result()["rows"]) > 0
    assert daemon.process.wait(60) == 0
    with pytest.raises(FaultError):
        client.status(daemon.socket)
    assert daemon.records()[-1]["kind"] == "shutdown"
    assert not daemon.records("enclave.incident")[1:]
    found = verify_log(daemon.lab / "audit", vkey=load_ring(daemon.lab / "keys" / "audit.vkey"))
    assert (found.exit, found.size) == (3, found.records)  # 3: no anchor was kept elsewhere


def test_without_the_service_of_the_log_nothing_is_answered(lab, tmp_path_factory):
    del tmp_path_factory
    with tempfile.TemporaryDirectory(prefix="airgap-run-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        site = (lab / "site.toml").read_text()
        line = f'\n[audit]\nsocket = "{folder}/audit.sock"\n'
        (lab / "site.toml").write_text(
            site.replace("\n[audit]\n", line) if "\n[audit]" in site else site + line
        )
        owner = subprocess.Popen(
            [AIRGAP, "audit", "serve", "--root", lab, "--broker", "root"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert "serving" in owner.stderr.readline()
            running = Running(lab, folder).start()
            found = run(running, ADA, project="route-design").result()
            assert found["rows"]
            (last,) = [r for r in running.records("inference") if r["req"] == found["request"]][1:]
            assert (last["actor"]["uid"], last["actor"]["auth"]) == (ADA, "peercred")
            owner.send_signal(signal.SIGSTOP)
            paused = run(running, ADA, project="route-design").result()
            owner.send_signal(signal.SIGCONT)
            assert paused["code"] == "audit.timeout"
            assert run(running, ADA, project="route-design").result()["rows"]
            owner.send_signal(signal.SIGTERM)
            owner.wait(60)
            gone = run(running, ADA, project="route-design").result()
            assert gone["code"] == "audit.service"
            running.stop()
        finally:
            owner.kill()
            owner.wait()
            (lab / "site.toml").write_text(site)


def test_what_is_no_request_is_cut_off(daemon):
    for message in ({"op": "run"}, {"op": "run", **JOB, "uid": 0}, {"op": "x"}):
        with client.connect(daemon.socket) as connection:
            wire.send(connection, message)
            assert wire.receive(connection, 100) is None
    with sockets.socket(sockets.AF_UNIX) as raw:
        raw.connect(str(daemon.socket))
        raw.sendall(b"\xff\xff\xff\xff")
        assert raw.recv(10) == b""
    assert Person(ADA, lambda: client.status(daemon.socket)).result()["person"] == "ada"
    with pytest.raises(RefusedError):
        wire.receive(FakeEnd(b"\0\0\0\2[]"), 100)


class FakeEnd:
    """A socket that holds bytes."""

    def __init__(self, content):
        self.content = content

    def recv(self, count):
        part, self.content = self.content[:count], self.content[count:]
        return part
