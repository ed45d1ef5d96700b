"""The life of a sealed process in the log: seal first, its end at once, incidents by name."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
from enclave_harness import PROGRAMS, needs_namespaces

from airgap.audit import open_log
from airgap.audit.query import read_records
from airgap.enclave import Caps, SealSpec, reading, running, twin
from airgap.serve.session import sealed

pytestmark = needs_namespaces


@pytest.fixture(autouse=True)
def probed(monkeypatch):
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


def spec(tmp_path, **more):
    made = SealSpec(
        profile="worker",
        program=f"{PROGRAMS}:create",
        read_only=(PROGRAMS,),
        caps=Caps(memory_mb=512),
        state=tmp_path / "enclave",
    )
    return replace(made, **more)


def kinds(log):
    return [r["kind"] for r in read_records(log.folder) if r["kind"].startswith("enclave.")]


def ask(enclave, op, **more):
    return enclave.request(json.dumps({"op": op, **more}).encode(), 5.0)


def test_seal_and_exit_are_on_record_and_the_running_worker_is_listed(tmp_path):
    state = tmp_path / "enclave"
    with open_log(tmp_path, site="Test") as log:
        with sealed(log, spec(tmp_path)) as enclave:
            assert kinds(log) == ["enclave.seal"]
            assert ask(enclave, "echo", value=1) == b"1"
            (listed,) = running.find_running(state)
            assert listed == json.loads(json.dumps(enclave.evidence))
        assert kinds(log) == ["enclave.seal", "enclave.exit"]
        assert running.find_running(state) == []
        last = [r for r in read_records(log.folder) if r["kind"] == "enclave.exit"][-1]
        assert last["data"]["status"] == 0


def test_an_incident_is_on_record_before_the_session_ends(tmp_path, monkeypatch):
    with (
        open_log(tmp_path, site="Test") as log,
        sealed(log, spec(tmp_path, reverify_s=0.1)) as enclave,
    ):
        real = reading.read
        monkeypatch.setattr(reading, "read", lambda pid: replace(real(pid), seccomp=0))
        until = time.monotonic() + 10
        while len(kinds(log)) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert kinds(log) == ["enclave.seal", "enclave.incident"]
        record = [r for r in read_records(log.folder) if r["kind"] == "enclave.incident"][-1]
        assert "seccomp" in record["data"]["reason"]
        assert record["data"]["signal"] == 9
        assert not enclave.alive
    assert kinds(log) == ["enclave.seal", "enclave.incident"]


def test_a_death_by_sigsys_is_an_incident_in_the_log(tmp_path):
    with (
        open_log(tmp_path, site="Test") as log,
        sealed(log, spec(tmp_path, reverify_s=0.1, config={"warm": "gate"})) as enclave,
    ):
        assert ask(enclave, "gate_later") == b"soon"
        until = time.monotonic() + 10
        while len(kinds(log)) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert kinds(log) == ["enclave.seal", "enclave.incident"]
        record = [r for r in read_records(log.folder) if r["kind"] == "enclave.incident"][-1]
        assert (record["data"]["reason"], record["data"]["signal"]) == ("SIGSYS", 31)


# -- the list of what runs ------------------------------------------------------------------------


def test_a_signpost_of_a_dead_process_or_of_another_kind_is_no_sealed_process(tmp_path):
    folder = tmp_path / running.FOLDER
    folder.mkdir()
    dead = {"proc": {"pid": 2**22 - 1, "starttime": 1}, "mono_ns": 1}
    dead |= {"profile": "worker", "rung": "A", "ts": "x"}
    (folder / "1.json").write_text(json.dumps(dead))
    (folder / "2.json").write_text("[]")
    (folder / "3.json").write_text("{")
    (folder / "4.json").symlink_to("/etc/passwd")
    (folder / "5.json").write_text(json.dumps({**dead, "mono_ns": -1}))
    own = {"pid": os.getpid(), "starttime": reading.read(os.getpid()).start_time}
    (folder / "6.json").write_text(json.dumps({"proc": own, "mono_ns": 1}))  # no profile, no rung
    words = {"profile": "worker", "rung": "A", "ts": "x", "mono_ns": float("inf"), "proc": own}
    (folder / "7.json").write_text(json.dumps(words))
    assert running.find_running(tmp_path) == []
    assert not (folder / "1.json").exists()


def test_a_tree_that_cannot_be_written_hides_the_pid_and_no_more(tmp_path):
    (tmp_path / "file").write_text("")
    with running.noted(tmp_path / "file", {"proc": {"pid": 1, "starttime": 1}}):
        assert running.find_running(tmp_path / "file") == []
