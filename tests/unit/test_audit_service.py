"""The log behind a socket: who is believed, what is refused; nothing answers without it."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import audit_logs as logs
import pytest
from test_serve_broker import MODEL, Helper, Worker, job

from airgap.audit import (
    Actor,
    Event,
    Peer,
    State,
    commitment,
    load_ring,
    new_ulid,
    verify_log,
    verify_receipt,
)
from airgap.audit.disk import Disk
from airgap.audit.payloads import HolderKey
from airgap.audit.query import read_records
from airgap.audit.record import encode
from airgap.audit.service import MAX_OF_ACCOUNT, RemoteLog, Service, event_from_wire, event_to_wire
from airgap.audit.site import open_site_log
from airgap.config import load_site
from airgap.demo import site_toml
from airgap.serve.broker import Broker
from policy.errors import AirgapError, FaultError, RefusedError


@contextlib.contextmanager
def served(folder, **options):
    """Yield an open log and the socket on which a thread of this process serves it."""
    path = folder / "run" / "audit.sock"
    with logs.open_log(folder, mode="service", **options) as log:
        service, ready = Service(log, path), threading.Event()
        thread = threading.Thread(target=service.run, args=(ready.set,), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield log, path
        finally:
            service.stop()
            thread.join(10)


def infer(log):
    decision, req = log.put_object(logs.DECISION), new_ulid()
    log.append(logs.intent(decision, req))
    return log.append(logs.outcome(req))


# -- the same log ------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="two accounts take root")
def test_one_account_does_not_take_the_connections_of_all():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o755)
        _, path = stack.enter_context(served(Path(folder)))
        path.chmod(0o666)

        def connect():
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(10)
            connection.connect(str(path))
            return connection

        os.seteuid(40406)
        try:
            crowd = [connect() for _ in range(MAX_OF_ACCOUNT)]
            for number in (1, 2):
                assert connect().recv(1) == b"", number
        finally:
            os.seteuid(0)
        with RemoteLog(path) as client:
            assert infer(client)
        crowd[0].close()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            os.seteuid(40406)
            try:
                again = connect()
            finally:
                os.seteuid(0)
            again.settimeout(0.3)
            try:
                assert again.recv(1) == b""  # the place is not yet free
            except TimeoutError:
                return
        pytest.fail("the place of a connection that ended is not given again")


def test_a_client_gets_the_receipts_that_the_owner_would_get(tmp_path):
    with served(tmp_path) as (log, path):
        with RemoteLog(path) as client:
            assert client.origin == log.origin == logs.ORIGIN
            receipt = infer(client)
            verify_receipt(receipt, logs.vkey())
        logs.infer(log)
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    records = list(read_records(tmp_path / "audit"))
    assert records[0]["data"]["mode"] == "service"
    mine, own = [r for r in records if r["kind"] == "inference" and r["phase"] == "outcome"]
    assert (mine["actor"]["auth"], mine["actor"]["uid"]) == ("peercred", os.getuid())
    assert mine["src"] == f"unix:pid={os.getpid()}"
    assert own["actor"]["auth"] == "self"
    kept = logs.keep(receipt, tmp_path / "kept" / "r.tlog-proof")
    assert verify_log(tmp_path / "audit", vkey=logs.vkey(), anchors=[kept]).exit == 0


def test_every_field_of_an_event_survives_the_wire():
    req, decision = new_ulid(), "sha256:" + "cd" * 32
    for event in (
        logs.intent(decision, req), logs.outcome(req), logs.denial(label="CUI", project="P-1"),
        Event("enclave.seal", data={"rung": "A", "evidence": decision}),
        logs.outcome(req, phase="chunk", part=3, tok=None, lat_ms=None, data=None),
    ):  # fmt: skip
        wire = json.loads(json.dumps(event_to_wire(event)))
        assert "uid" not in json.dumps(wire)
        again = event_from_wire(wire)
        assert encode(again.fields(uid=3, auth="self")) == encode(event.fields(uid=3, auth="self"))


def test_many_clients_share_commits(tmp_path):
    with served(tmp_path) as (log, path):
        found = []

        def work():
            with RemoteLog(path, deadline_s=30) as client:
                found.extend(client.append(logs.denial()) for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(r.seq for r in found) == list(range(1, 121))
        assert log.size == 121


def test_payloads_are_sealed_by_the_client_and_denials_are_ones_own(tmp_path):
    holder = HolderKey.generate()
    with served(tmp_path) as (log, path), RemoteLog(path, payload_key=holder.public) as client:
        req = new_ulid()
        commit = client.commit(b"prompt", b"\1" * 32, req=req, side="in")
        assert commit.commit == commitment(b"prompt", b"\1" * 32).commit
        assert (tmp_path / "audit/log/sealed" / commit.sealed[7:9] / commit.sealed[7:]).is_file()
        client.append(logs.denial())
        log.append(logs.denial(), peer=Peer(uid=4_000_000, pid=1))
        assert len(list(client.denials(os.getuid(), "2000-01-01"))) == 1
        assert list(client.denials(4_000_000, "2000-01-01")) == []
        assert list(client.denials(os.getuid(), "2999-01-01")) == []


# -- what a client may not ------------------------------------------------------------


def test_t37_a_message_cannot_name_a_uid(tmp_path):
    with served(tmp_path) as (_, path), RemoteLog(path) as client:
        client.append(logs.denial())
        for forged in ({"uid": 0, "name": "eve"}, {"auth": "local", "name": "eve"}):
            with pytest.raises(RefusedError) as refused:
                client._ask(
                    {"op": "append", "event": event_to_wire(logs.denial()) | {"actor": forged}}
                )
            assert refused.value.code == "audit.record"
    actors = [r["actor"] for r in read_records(tmp_path / "audit") if r["kind"] == "denial"]
    assert actors == [{"auth": "peercred", "name": "eve", "uid": os.getuid()}]


@pytest.mark.parametrize("kind", ["boot", "heartbeat", "shutdown", "key.rotate", "recovery"])
def test_a_client_cannot_speak_for_the_owner(tmp_path, kind):
    with served(tmp_path) as (_, path), RemoteLog(path) as client:
        with pytest.raises(RefusedError) as refused:
            client.append(Event(kind))
        assert refused.value.code == "audit.service"
        client.append(logs.denial())


def test_a_client_closes_only_its_own_requests_and_leaves_none_open(tmp_path):
    with served(tmp_path) as (log, path):
        with RemoteLog(path) as one, RemoteLog(path) as other:
            req = new_ulid()
            one.append(logs.intent(one.put_object(logs.DECISION), req))
            with pytest.raises(RefusedError) as refused:
                other.append(logs.outcome(req))
            assert refused.value.code == "audit.order"
        deadline = time.monotonic() + 10
        while log.size < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    last = [r for r in read_records(tmp_path / "audit") if r.get("req") == req]
    assert [r["phase"] for r in last] == ["intent", "outcome"]
    assert last[1]["data"] == {"result": "unknown"}


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\5nope!", b"\0\0\0\x7fshort", b"GET / HTTP/1.1",
    ],
)  # fmt: skip
def test_who_breaks_the_protocol_is_cut_off_and_nobody_else(tmp_path, message):
    with served(tmp_path) as (_, path), RemoteLog(path) as client:
        client.append(logs.denial())
        with socket.socket(socket.AF_UNIX) as rude:
            rude.settimeout(10)
            rude.connect(str(path))
            with contextlib.suppress(ConnectionError):  # reset is cut off, too
                rude.sendall(message)
                rude.shutdown(socket.SHUT_WR)
                assert rude.recv(10) == b""
        client.append(logs.denial())


@pytest.mark.parametrize(
    "request_",
    [
        {}, {"op": "nothing"}, {"op": "append"}, {"op": "append", "event": 5},
        {"op": "store", "content": "!", "payload": False}, {"op": "store", "content": "AAAA"},
        {"op": "append", "event": {"kind": "denial", "phase": "event", "x": 1}},
        {"op": "append", "event": {"kind": "denial", "phase": "event", "tok": 5}},
        {"op": "append", "event": {"kind": ["denial"], "phase": "event"}},
    ],
)  # fmt: skip
def test_a_strange_request_is_refused_and_the_connection_goes_on(tmp_path, request_):
    with served(tmp_path) as (_, path), RemoteLog(path) as client:
        with pytest.raises(AirgapError) as refused:
            client._ask(request_)
        assert refused.value.code in {"audit.service", "audit.record"}
        client.append(logs.denial())


def test_something_else_in_the_sockets_place_is_left_alone(tmp_path):
    path = tmp_path / "run" / "audit.sock"
    path.parent.mkdir()
    path.write_text("precious")
    with logs.open_log(tmp_path) as log, pytest.raises(RefusedError):
        Service(log, path).run()
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with served(tmp_path) as (_, again), RemoteLog(again) as client:
        client.append(logs.denial())


# -- nothing answers without a record ------------------------------------------------------------


def serve(tree):
    """Start the real service in a process of its own and return it when it serves."""
    program = "import airgap.cli; airgap.cli.main()"
    argv = [sys.executable, "-c", program, "audit", "serve", "--root", str(tree)]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    line = child.stderr.readline()
    assert line.startswith("serving "), line + child.stderr.read()
    return child


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    text = site_toml(0) + f'\n[audit]\nsocket = "{tmp_path}/audit.sock"\n'
    (folder / "site.toml").write_text(text)
    return folder


def broker_on(log, tree):
    from policy_site import deciding
    from test_serve_broker import NOW, load_rules

    site, rules = load_site(tree), load_rules(tree)
    day = site.legal_day(NOW)
    use_policy = deciding(site, rules, MODEL.bundle, day=(day.as_of, day.known_at))
    return Broker(log, Worker(), Helper(), MODEL, Actor("Ada"), use_policy)


def test_t33_t34_with_the_service_stopped_paused_or_gone_no_inference_answers(tree):
    """The real service, the real broker; only the sealed processes are doubles."""
    child = serve(tree)
    try:
        log = open_site_log(tree, load_site(tree))
        broker = broker_on(log, tree)
        answer = broker.infer(job())
        verify_receipt(answer.outcome, load_ring(tree / "keys/audit.vkey"))
        asked = len(broker.worker.asked)

        os.kill(child.pid, signal.SIGSTOP)  # paused
        start = time.monotonic()
        with pytest.raises(FaultError) as fault:
            broker.infer(job())
        assert fault.value.code == "audit.timeout"
        assert time.monotonic() - start < 8
        os.kill(child.pid, signal.SIGCONT)
        broker.infer(job())

        child.send_signal(signal.SIGTERM)  # stopped
        assert child.wait(20) == 0
        with pytest.raises(FaultError) as fault:
            broker.infer(job())
        assert fault.value.code == "audit.service"

        child = serve(tree)  # and back
        broker.infer(job())
        os.kill(child.pid, signal.SIGKILL)  # gone
        child.wait(20)
        with pytest.raises(FaultError) as fault:
            broker.infer(job())
        assert fault.value.code == "audit.service"
        assert len(broker.worker.asked) == asked + 2  # no work was done without an intent
        with pytest.raises(FaultError):
            open_site_log(tree, load_site(tree))
    finally:
        child.kill()
        child.wait()


class _Vanishing(Worker):
    """Stops the service in the middle of a request, after the intent was durable."""

    child = None

    def stream(self, payload, timeout, *, total_s=None):
        yield from super().stream(payload, timeout, total_s=total_s)
        self.child.kill()
        self.child.wait()


def test_t34_an_answer_whose_outcome_finds_no_log_is_not_released(tree):
    child = serve(tree)
    try:
        worker = _Vanishing()
        worker.child = child
        broker = replace(broker_on(open_site_log(tree, load_site(tree)), tree), worker=worker)
        with pytest.raises(FaultError) as fault:
            broker.infer(job())
        assert fault.value.code == "audit.service"
        assert worker.asked
    finally:
        child.kill()
        child.wait()
    with serve_again(tree):
        pass
    ends = [r["data"]["result"] for r in read_records(tree / "audit") if r["phase"] == "outcome"]
    assert ends == ["unknown"]


@contextlib.contextmanager
def serve_again(tree):
    child = serve(tree)
    yield child
    child.terminate()
    assert child.wait(20) == 0


def test_t29_with_the_services_disk_full_no_inference_answers(tmp_path):
    disk = tmp_path / "disk"
    logs.mounted(disk, "size=1m")
    try:
        key = logs.write_key(tmp_path / "k.pem")
        text = site_toml(0)
        (tmp_path / "site.toml").write_text(text)
        with served(disk, key=key, disk=Disk(), reserve_bytes=64 << 10) as (log, path):
            broker = broker_on(RemoteLog(path), tmp_path)
            broker.infer(job())
            with contextlib.suppress(FaultError):
                for _ in range(4_000):
                    log.append(logs.denial(label="x" * 64))
            assert log.state is State.HALTED
            asked = len(broker.worker.asked)
            with pytest.raises(AirgapError) as refused:
                broker.infer(job())
            assert refused.value.exit_status == 3
            assert len(broker.worker.asked) == asked
            assert log.state is State.HALTED
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_connection_that_timed_out_is_not_used_again(tmp_path):
    """A late answer to an old question must never pass for the answer to a new one."""
    path = tmp_path / "audit.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def answer(connection, document):
        content = json.dumps(document).encode()
        connection.sendall(struct.pack(">I", len(content)) + content)

    def slow():
        first, _ = server.accept()
        first.recv(1 << 16)
        answer(first, {"origin": "o", "folder": "/"})
        first.recv(1 << 16)
        time.sleep(0.6)
        with contextlib.suppress(OSError):
            answer(first, {"digest": "sha256:" + "11" * 32})
        second, _ = server.accept()
        second.recv(1 << 16)
        answer(second, {"digest": "sha256:" + "22" * 32})

    thread = threading.Thread(target=slow, daemon=True)
    thread.start()
    with RemoteLog(path, deadline_s=0.3) as client:
        with pytest.raises(FaultError) as fault:
            client.put_object(b"first")
        assert fault.value.code == "audit.timeout"
        time.sleep(0.5)
        client._deadline_s = 5
        assert client.put_object(b"second").hex == "22" * 32
    thread.join(5)
    server.close()
    assert Path(path).exists()
