"""Local people against the daemon and against one another: other people's names, holds, places."""

from __future__ import annotations

import json
import os
import random
import signal
import socket as sockets
import struct
import time
from pathlib import Path

import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import ADA, BEN, JOB, NOBODY, Person, ada, lab_of, place_of, run, status, wait_for

from airgap.service import client, wire
from policy.errors import CODES

pytestmark = [needs_root, needs_namespaces]
HELD = {"inputs": {"smiles": "OCCSCCO"}, "options": {"n": 2, "seed": 4}}


@pytest.fixture(scope="module")
def place(road):
    with lab_of(road) as lab, place_of(lab) as running:
        yield running.start(limits={"refusals": 1_000})
        assert not running.records("enclave.incident")
        assert not [line for line in running.lines if "service.defect" in line]
        assert running.stop() == 0
        running.verify()


def exchange(running, uid, message, *, within=30):
    """Send one message, as JSON or as bytes, and return the last word of the daemon, or None."""

    def act():
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        with client.connect(running.socket) as connection:
            connection.settimeout(within)
            connection.sendall(struct.pack(">I", len(body)) + body)
            while True:
                try:
                    told = wire.receive(connection, wire.MESSAGE_LIMIT)
                except ConnectionResetError:
                    return None
                if told is None or told["event"] != "progress":
                    return told

    return Person(uid, act).result()


def asked(**changes):
    return {
        "op": "run", **JOB, "project": "route-design", "held": "", "files": [], **changes,
    }  # fmt: skip


def test_a_connection_is_of_who_opened_it_whoever_holds_it_now(place):
    """What the kernel says at connect counts: a right that is handed on is hers who gave it."""

    def opened_as_ada():
        connection = client.connect(place.socket)
        os.seteuid(0) if os.geteuid() == 0 else None
        wire.send(connection, {"op": "status"})
        return wire.receive(connection, wire.MESSAGE_LIMIT)["person"]

    assert Person(ADA, opened_as_ada).result() == "ada"

    def opened_by_root_used_by_ben():
        wire.send(connection, {"op": "status"})
        return wire.receive(connection, wire.MESSAGE_LIMIT)

    with client.connect(place.socket) as connection:  # root is nobody of this site
        told = Person(BEN, opened_by_root_used_by_ben).result()
    assert told["code"] == "site.person"


def test_a_claim_to_be_somebody_else_is_no_request(place):
    for more in ({"uid": ADA}, {"person": "ada"}, {"peer": [ADA, 1]}, {"op": "run "}):
        assert exchange(place, BEN, asked(**more)) is None
    told = exchange(place, BEN, {"op": "status"})
    assert told["person"] == "ben"


def test_holds_of_others_are_not_told_taken_up_or_closed(place):
    lab, socket = place.lab, place.socket
    held = run(place, ADA, project="route-design", **HELD).result()
    assert held["code"] == "policy.held"
    (row,) = Person(ADA, lambda: client.holds(socket)).result()
    assert Person(BEN, lambda: client.holds(socket)).result() == []
    assert Person(NOBODY, lambda: client.holds(socket)).result()["code"] == "site.person"
    (file,) = [path for path in (lab / "holds").glob("*.json") if path.stem in path.read_text()]
    reference, request = row["reference"], file.stem
    for name in (reference, request, reference.rpartition("#")[2], "#0", "../" + request, "*", ""):
        told = exchange(place, BEN, {"op": "fetch", "hold": name, "files": []})
        assert told["code"] == "hold.missing", name
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (lab / "holds").iterdir())
    for name in (
        request,
        f"../holds/{request}",
        f"{lab}/holds/{request}",
        "/etc/passwd",
        "\0",
        "é",
    ):
        for uid, project in ((BEN, "sensor-coatings"), (ADA, "route-design")):
            if (uid, name) == (ADA, request):
                continue
            told = exchange(place, uid, asked(held=name, project=project))
            assert told["code"] in {"hold.missing", "policy.denied"}, (name, told)
            assert str(lab) not in told["message"]
    after = sorted((path.name, path.stat().st_mtime_ns) for path in (lab / "holds").iterdir())
    assert after == before


def test_whatever_is_sent_has_a_code_or_an_end_and_the_others_are_served(place):
    chosen = random.Random(20261126)
    values = [
        None, True, 0, -1, 2**63, 1e308, "", "\0", "x" * 5000, "\ud800", "é", [], [[]], {},
        {"a": 1}, ["csv"] * 4, ["csv", 1], {"smiles": "\udcff"}, {"smiles": {"smiles": "CCO"}},
        "run", "../..",
    ]  # fmt: skip
    texts = [b"NaN", b"Infinity", b"1e999", b"9" * 4000, b"[" * 900 + b"]" * 900, b'"\\ud800"']
    base = [
        asked(), {"op": "status"}, {"op": "holds"}, {"op": "cancel"},
        {"op": "fetch", "hold": "x", "files": []},
    ]  # fmt: skip
    seen = set()
    for number in range(250):
        message = dict(chosen.choice(base))
        name = chosen.choice([*message, "new"])
        if number % 3:
            message[name] = chosen.choice(values)
            body = json.dumps(message).encode()
        else:
            message[name] = "@@"
            body = json.dumps(message).replace('"@@"', "@@").encode()
            body = body.replace(b"@@", chosen.choice(texts))
        with client.connect(place.socket) as connection:
            connection.settimeout(60)
            connection.sendall(struct.pack(">I", len(body)) + body)
            connection.shutdown(sockets.SHUT_WR) if number % 2 else None
            if message.get("op") == "cancel":
                continue
            told = wire.receive(connection, wire.MESSAGE_LIMIT)
            if told is not None:
                assert told["event"] == "error", told  # root is nobody here
                assert told["code"] in CODES
                seen.add(told["code"])
    assert "site.person" in seen
    for number in range(60):
        told_value = chosen.choice(
            texts if number % 2 else [json.dumps(v).encode() for v in values]
        )
        where = chosen.choice([b'"inputs": {"smiles": @@}', b'"options": {"n": @@}', b'"task": @@'])
        whole = json.dumps(asked()).encode()
        key = where.split(b":")[0]
        start = whole.index(key)
        end = whole.index(b"}", start) + 1 if b"{" in where else whole.index(b",", start)
        body = whole[:start] + where.replace(b"@@", told_value) + whole[end:]
        told = exchange(place, ADA, body, within=60)
        if told is not None and told["event"] == "error":
            assert told["code"] in CODES
            assert told["code"] != "host.internal"
    assert not [line for line in place.lines if "service.defect" in line], place.lines[-20:]
    assert ada(place)["rows"]


def test_requests_in_one_breath_are_answered_in_order_and_half_a_cancel_holds_no_place(place):
    def breath():
        with client.connect(place.socket) as connection:
            body = json.dumps({"op": "status"}).encode()
            connection.sendall((struct.pack(">I", len(body)) + body) * 50)
            return [wire.receive(connection, wire.MESSAGE_LIMIT)["person"] for _ in range(50)]

    assert Person(BEN, breath).result() == ["ben"] * 50

    def half():
        with client.connect(place.socket) as connection:
            wire.send(connection, asked(options={"n": 400, "seed": 1}))
            wire.receive(connection, wire.MESSAGE_LIMIT)  # it is under way
            connection.sendall(b"\0")
            connection.settimeout(60)
            while connection.recv(4096):
                continue
            return "ended"

    person = Person(ADA, half)
    wait_for(lambda: status(place)["running"] == 1)
    assert person.result() == "ended"
    wait_for(lambda: status(place)["running"] == 0)
    assert place.outcomes()[-1][1:] == ("refused", "service.client")


def test_people_may_neither_signal_nor_lock_nor_look_behind_the_daemon(place):
    pid, lab = place.process.pid, place.lab

    def attempts():
        found = []
        for name in (signal.SIGHUP, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
            try:
                os.kill(pid, name)
                found.append(str(name))
            except PermissionError:
                pass
        for path in (lab / "enclave" / "daemon", lab / "audit" / ".lock", lab / "store" / "lock"):
            try:
                path.read_bytes()
                found.append(str(path))
            except OSError:
                pass
        for entry in (f"/proc/{pid}/environ", f"/proc/{pid}/mem", f"/proc/{pid}/fd"):
            try:
                list(Path(entry).iterdir()) if entry.endswith("fd") else Path(entry).read_bytes()
                found.append(entry)
            except OSError:
                pass
        return found

    assert Person(ADA, attempts).result() == []
    wait_for(lambda: status(place, BEN)["serving"], "the daemon's standing")


def test_a_storm_of_reloads_with_broken_files_ends_where_it_began(place):
    """Whoever may reload may do so at any moment, with any file half written."""
    site, current = place.lab / "site.toml", place.lab / "store" / "current"
    good, target = site.read_bytes(), current.readlink()
    assert ada(place)["rows"]

    def reload(times):
        for _ in range(times):
            place.process.send_signal(signal.SIGHUP)
            time.sleep(0.02)

    for broken in (b"", b"[institution", good[: len(good) // 2], b"\xff" * 100):
        site.write_bytes(broken)
        reload(5)
        code = ada(place)["code"]
        assert code in CODES
        assert code != "host.internal"
    site.unlink()
    reload(5)
    assert ada(place)["code"] in CODES
    site.write_bytes(good)

    current.unlink()
    current.symlink_to("installed/" + "0" * 64)
    reload(5)
    time.sleep(1.5)
    current.unlink()
    current.symlink_to(target)

    slow = run(place, ADA, project="route-design", options={"n": 200, "seed": 1})
    reload(30)
    told = slow.result()
    assert "rows" in told or told["code"] in CODES
    wait_for(lambda: "rows" in ada(place), "an answer", 90)
    assert place.process.poll() is None
