"""The owner's acts while a service holds the log, and the daily look at the whole of it."""

import json
import os
import signal
import time

import audit_logs as logs
import pytest
from test_audit_cli import result
from test_audit_service import serve, served, tree

from airgap.audit import Actor, Event, Peer, Ring, load_ring, new_ulid, verify_log
from airgap.audit.capacity import DAY_S
from airgap.audit.daily import Daily, Looked, look_apart, look_at
from airgap.audit.layout import Layout
from airgap.audit.query import read_records
from airgap.audit.service import Service, event_to_wire
from airgap.audit.steward import OwnersLog, held_by_service
from policy.errors import FaultError, RefusedError

__all__ = ["tree"]  # a fixture
WHO = Actor("isso")


def intent(kind="export"):
    return Event(kind, "intent", req=new_ulid(), actor=WHO, data={})


def ended(begun):
    return Event(begun.kind, "outcome", req=begun.req, actor=WHO, data={"result": "complete"})


def test_the_owners_account_acts_through_the_service_and_the_log_goes_on(tmp_path):
    with served(tmp_path) as (log, path):
        log.append(logs.denial())
        held = held_by_service(path, tmp_path / "audit")
        with held:
            held.require_files()
            begun = intent()
            receipt = held.append(begun)
            held.append(ended(begun))
            held.note_export(receipt.size)
            assert held.last_export == log.last_export
            assert (held.last_export.number, held.last_export.size) == (1, receipt.size)
            assert (held.size, held.anchored, str(held.ring)) == (log.size, 0, str(log.ring))
            held.note_anchor(2)
            assert held.anchored == log.anchored == 2
            held.note_freed()
            vkey = held.rotate_key(WHO)
            assert str(vkey) == log.vkey == str(load_ring(tmp_path / "keys/audit.vkey").newest)
            log.append(logs.denial())
    actors = [r["actor"] for r in read_records(tmp_path / "audit") if r["kind"] == "export"]
    assert actors == [{"auth": "peercred", "name": "isso", "uid": os.getuid()}] * 2


def test_one_act_at_a_time_and_one_that_dies_leaves_the_way_free(tmp_path):
    with served(tmp_path) as (log, path):
        with OwnersLog(path) as one, OwnersLog(path) as other:
            begun = intent("prune")
            one.append(begun)
            with pytest.raises(RefusedError) as refused:
                other.append(intent())
            assert refused.value.code == "audit.locked"
            one.append(ended(begun))
            dying = intent()
            other.append(dying)
        deadline = time.monotonic() + 30
        while log.size < 5:  # boot, three records of the acts, and the end of the dead one
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with OwnersLog(path) as third:
            third.append(intent())
    last = [r for r in read_records(tmp_path / "audit") if r.get("req") == dying.req][-1]
    assert last["data"]["result"] == "unknown"


@pytest.mark.parametrize(
    ("message", "for_root"),
    [
        ({"op": "append", "event": event_to_wire(intent("export"))}, True),
        ({"op": "append", "event": event_to_wire(Event("verify.result", data={"size": 1}))}, True),
        ({"op": "append", "event": event_to_wire(intent("prune"))}, False),
        ({"op": "append", "event": event_to_wire(intent("spill.purge"))}, False),
        ({"op": "note", "what": "export", "size": 1}, True),
        ({"op": "note", "what": "anchor", "size": 1}, False),
        ({"op": "rotate", "name": "eve", "role": ""}, True),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_another_account_speaks_for_nobody_but_itself(tmp_path, message, for_root):
    with logs.open_log(tmp_path, mode="service") as log:
        service = Service(log, tmp_path / "unused.sock")
        stranger = service._answer(message, Peer(os.getuid() + 1, 1), {})
        assert stranger["code"] == "audit.service"
        if os.getuid():
            root = service._answer(message, Peer(0, 1), {})
            assert ("code" in root) != for_root
        assert "code" not in service._answer(message, Peer(os.getuid(), 1), {})


@pytest.mark.parametrize(
    "message",
    [
        {"op": "note", "what": "export", "size": 10_000},
        {"op": "note", "what": "export", "size": -1},
        {"op": "note", "what": "wishes", "size": 0},
    ],
)
def test_a_note_that_cannot_be_is_refused(tmp_path, message):
    with served(tmp_path) as (log, path), OwnersLog(path) as held:
        with pytest.raises(RefusedError) as refused:
            held._ask(message)
        assert refused.value.code == "audit.service"
        assert log.last_export.number == 0


def test_a_socket_of_another_log_or_of_nobody_is_not_the_service_of_this_one(tmp_path):
    with served(tmp_path) as (_, path):
        assert held_by_service(path, tmp_path / "other") is None
        assert held_by_service(path, tmp_path / "audit") is not None
    assert held_by_service(path, tmp_path / "audit") is None
    assert held_by_service(None, tmp_path / "audit") is None


def test_an_export_and_a_verdict_while_the_service_runs(tree, tmp_path, capsys):
    child = serve(tree)
    try:
        for number, name in enumerate(("one", "two"), 1):
            status, document = result(capsys, "export", "--root", tree, "--out", tmp_path / name)
            assert (status, document["number"]) == (0, number)
            ring = load_ring(tree / "keys/audit.vkey")
            assert verify_log(tmp_path / name, vkey=ring).exit == 3  # for want of an anchor alone
        status, document = result(capsys, "verify", "--root", tree, "--record")
        assert (status, document["verdict"]) == (3, "cannot tell")
        status, document = result(capsys, "status", "--root", tree)
        assert document["writer"].startswith("running")
        assert document["exported"] > 0
        assert document["verified_age_s"] < 600
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)
        child.stderr.close()
    kinds = [r["kind"] for r in read_records(tree / "audit")]
    assert kinds == ["boot", *["export"] * 4, "verify.result", "shutdown"]


# -- once a day --------------------------------------------------------------------------------


def results(folder):
    return [r["data"] for r in read_records(folder / "audit") if r["kind"] == "verify.result"]


def test_once_a_day_the_whole_log_is_read_again_and_the_verdict_is_on_record(tmp_path):
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
        logs.keep(receipt, tmp_path / "audit/log/anchors/r.tlog-proof")
        moment = time.time()
        daily = Daily(log, now=lambda: moment, judge=look_at)
        assert daily.look()
        assert not daily.look()
        assert results(tmp_path) == [{"verdict": "good", "size": 3, "anchored": 3}]
        moment += DAY_S + 60
        assert daily.look()
        moment -= 400 * DAY_S  # a clock that was set back puts nothing off
        assert daily.look()
    assert len(results(tmp_path)) == 3


def test_what_changed_on_the_disk_is_an_alarm_and_a_record(tmp_path):
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
        logs.keep(receipt, tmp_path / "audit/log/anchors/r.tlog-proof")
        Layout(tmp_path / "audit").object(logs_object(tmp_path)).write_bytes(b"other")
        assert Daily(log, judge=look_at).look()
    assert results(tmp_path)[0]["verdict"] == "tampered"


def logs_object(folder):
    found = [r["decision"]["id"][7:] for r in read_records(folder / "audit") if "decision" in r]
    return found[0]


def test_the_look_runs_in_a_process_of_its_own(tmp_path):
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
        logs.keep(receipt, tmp_path / "audit/log/anchors/r.tlog-proof")
        looked = look_apart(log.folder, log.ring)
    assert (looked.verdict, looked.size, looked.anchored) == ("good", 3, 3)
    with pytest.raises(FaultError) as fault:
        look_apart(tmp_path / "audit", Ring(()))
    assert fault.value.code == "audit.unknown"


def test_a_look_that_fails_is_told_and_tried_again(tmp_path):
    tries = []

    def judge(folder, _):
        tries.append(folder)
        if len(tries) == 1:
            raise FaultError("audit.unknown", "the first look finds nothing out")
        return Looked("good", 1, 1, "")

    with logs.open_log(tmp_path) as log:
        daily = Daily(log, judge=judge, look_s=0.001)
        daily.start()
        deadline = time.monotonic() + 30
        while not results(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        daily.stop()
    assert len(tries) == 2
