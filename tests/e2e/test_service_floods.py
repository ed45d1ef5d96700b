"""An account that is refused again and again: the log grows by little, and nobody else waits."""

from __future__ import annotations

import threading
import time

import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import ADA, NOBODY, Person, ada, lab_of, place_of, status, wait_for

from airgap.service import client, wire
from airgap.service.budget import BURST, PER_S, TOLD_S

pytestmark = [needs_root, needs_namespaces]
ASKED = {
    "op": "run", "task": "retrosynthesis", "inputs": {"smiles": "CCO"}, "options": {"n": 2},
    "project": "route-design", "held": "", "files": [],
}  # fmt: skip
FLOOD_S = 6.0
CONNECTIONS = 16


@pytest.fixture(scope="module")
def place(road):
    with lab_of(road) as lab, place_of(lab) as running:
        yield running.start()


def flood(running, seconds):
    """Let somebody who is nobody here ask from many connections; returns the codes and hints."""

    def ask(until, told):
        with client.connect(running.socket) as connection:
            while time.monotonic() < until:
                wire.send(connection, ASKED)
                answer = wire.receive(connection, wire.MESSAGE_LIMIT)
                told.append((answer["code"], answer["hint"]))

    def act():
        told, until = [], time.monotonic() + seconds
        threads = [threading.Thread(target=ask, args=(until, told)) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return told

    return Person(NOBODY, act)


def size_of(running):
    return sum(path.stat().st_size for path in (running.lab / "audit").rglob("seg/*"))


def test_a_flood_of_refused_requests_is_told_in_few_records_and_others_are_served(place):
    assert ada(place, seed=4)["rows"]
    before, bytes_before = len(place.records("denial")), size_of(place)
    began = time.monotonic()
    flooder = flood(place, FLOOD_S)
    served = 0
    while time.monotonic() - began < FLOOD_S - 1.0:
        assert ada(place, seed=4)["rows"]
        served += 1
    told = flooder.result()
    took = time.monotonic() - began
    assert served >= 2

    codes = [code for code, _ in told]
    refused, busy = codes.count("site.person"), codes.count("request.busy")
    assert refused + busy == len(told)
    assert BURST <= refused <= BURST + took * PER_S
    assert busy > 20
    assert {hint for code, hint in told if code == "request.busy"} == {"ask again in 1 s"}

    # It stands on record soon, without another word of theirs, and none of it was lost.
    def summary():
        return [r for r in place.records("denial") if r["data"]["stage"].startswith("budget")]

    wait_for(lambda: sum(r["data"]["count"] for r in summary()) == busy, within=TOLD_S + 10)
    for record in summary():
        assert (record["err"]["code"], record["actor"]["uid"]) == ("request.busy", NOBODY)
    denials = place.records("denial")[before:]
    others = [r for r in denials if not r["data"]["stage"].startswith("budget")]
    assert sum(r["data"]["count"] for r in others) == refused
    assert len(denials) <= refused + 2
    spent_on_ada = 6_000 * (served + 1)  # her records, whatever else was written meanwhile
    assert size_of(place) - bytes_before <= 1_000 * len(denials) + spent_on_ada

    # Who is refused rightly is told so again, and the end tells what nothing told before.
    time.sleep(2.0 / PER_S)
    assert flood(place, 0.05).result()[0][0] == "site.person"
    more = [code for code, _ in flood(place, 0.5).result()].count("request.busy")
    assert status(place, ADA)["serving"]
    assert place.stop() == 0
    assert sum(r["data"]["count"] for r in summary()) >= busy + more
    place.verify()
    assert not [line for line in place.lines if "service.defect" in line]
