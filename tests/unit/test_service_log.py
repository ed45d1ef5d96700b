"""A daemon that speaks for its users at the service of the log: known by account, or refused."""

import os
import threading

import pytest

from airgap.audit import Actor, Event, open_log
from airgap.audit.clock import Peer
from airgap.audit.query import read_records
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
