"""A daemon that speaks for its users at the service of the log: known by account, or refused."""

import os
import threading

import pytest

from airgap.audit import Actor, Event, open_log
from airgap.audit.clock import Peer
from airgap.audit.layout import Layout
from airgap.audit.query import Denials, read_records
from airgap.audit.service import RemoteLog, Service
from airgap.service.kept_log import PersonLog
from policy.errors import RefusedError


@pytest.fixture(params=["broker", "stranger"])
def remote(request, tmp_path):
    brokers = frozenset({os.getuid()} if request.param == "broker" else {})
    with open_log(tmp_path, site="Test", mode="service") as log:
        service = Service(log, tmp_path / "log.sock", brokers=brokers)
        ready = threading.Event()
        thread = threading.Thread(target=service.run, args=(ready.set,), daemon=True)
        thread.start()
        assert ready.wait(10)
        with RemoteLog(service.path) as client:
            yield client, log, request.param
        service.stop()
        thread.join()


def denial(actor):
    return Event("denial", actor=actor, project="p", err="prompt.g01", data={"count": 1})


def test_records_bear_the_uid_of_whom_a_known_daemon_names(remote):
    client, log, kind = remote
    ada = PersonLog(client, Peer(4242, 7))
    event = denial(Actor("jdoe", "scientist"))
    if kind == "stranger":
        with pytest.raises(RefusedError) as caught:
            ada.append(event)
        assert caught.value.code == "audit.service"
        with pytest.raises(RefusedError):
            list(ada.denials(4242, "2000"))
        return
    ada.append(event)
    (record,) = (r for r in read_records(log.folder) if r["kind"] == "denial")
    assert (record["actor"]["uid"], record["actor"]["auth"]) == (4242, "peercred")
    assert record["src"] == "unix:pid=7"
    assert [r["seq"] for r in ada.denials(4242, "2000")] == [record["seq"]]
    assert list(PersonLog(client, Peer(1, 1)).denials(1, "2000")) == []


def test_denials_are_read_once_and_then_on_from_there(tmp_path):
    layout = Layout(tmp_path / "audit")
    with open_log(tmp_path, site="Test") as log:
        found = Denials(layout)
        assert found.of(os.getuid(), "2000") == []
        first = log.append(denial(Actor("jdoe", "scientist")))
        assert [each["seq"] for each in found.of(os.getuid(), "2000")] == [first.seq]
        log.append(Event("denial", actor=Actor("jdoe"), err="prompt.g01", data={"count": 1}))
        second = log.append(denial(Actor("jdoe", "scientist")))
        whole = [r for r in read_records(log.folder) if r["kind"] == "denial"]
        for reader in (found, Denials(layout)):
            read = reader.of(os.getuid(), "2000")
            assert [r["seq"] for r in read] == [r["seq"] for r in whole]
            assert [r["ts"] for r in read] == [r["ts"] for r in whole]
        assert found.of(os.getuid(), whole[-1]["ts"])[-1]["seq"] == second.seq
        assert found.of(os.getuid() + 1, "2000") == []
        assert list(log.denials(os.getuid(), "9")) == []
        segment = layout.segment(0)
        with segment.open("ab") as file:
            file.write(b'{"kind":"denial"')  # a line that is being written
        assert len(found.of(os.getuid(), "2000")) == len(whole)
        os.truncate(segment, segment.stat().st_size - 16)
