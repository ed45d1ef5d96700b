"""Clients that are slow, silent or hostile, disks that are full: the others go on being served."""

from __future__ import annotations

import json
import random
import resource
import shutil
import socket as sockets
import struct
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from disks import fill, mounted
from enclave_harness import needs_namespaces, needs_root
from service_lab import (
    ADA,
    BEN,
    JOB,
    NOBODY,
    Person,
    ada,
    lab_of,
    long_run,
    place_of,
    run,
    status,
    wait_for,
)

from airgap.service import client, wire

pytestmark = [needs_root, needs_namespaces]
LIMITS = {
    "clients": 8, "per_person": 6, "message_s": 1.0, "send_s": 2.0, "answer_s": 4.0,
    "large": 2_000, "large_per_person": 1,
}  # fmt: skip


@pytest.fixture
def lab(road):
    with lab_of(road) as copy:
        yield copy


@pytest.fixture
def place(lab):
    with place_of(lab) as running:
        yield running


def threads(running):
    text = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(text.partition("Threads:")[2].split()[0])


def descriptors(running):
    return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))


class Crowd:
    """Connections of one account that are held open, by a child."""

    def __init__(self, running, uid, count, words=b""):
        self.stop_at = running.socket.parent / f"stop-{uid}-{random.random()}"

        def act():
            got = []
            with ExitStack() as stack:
                for _ in range(count):
                    one = stack.enter_context(sockets.socket(sockets.AF_UNIX))
                    one.settimeout(20)
                    one.connect(str(running.socket))
                    one.sendall(words)
                    got.append(one)
                (running.socket.parent / "open").touch()
                while not self.stop_at.exists():
                    time.sleep(0.02)
                ended = 0
                for one in got:
                    one.settimeout(0.2)
                    try:
                        while one.recv(4096):
                            continue
                        ended += 1
                    except TimeoutError:
                        continue
                    except OSError:
                        ended += 1
                return ended

        running.socket.parent.chmod(0o777)
        (running.socket.parent / "open").unlink(missing_ok=True)
        self.person = Person(uid, act)
        wait_for((running.socket.parent / "open").exists, "the crowd")

    def leave(self):
        """Let all go; returns how many had been ended by the daemon."""
        self.stop_at.touch()
        return self.person.result()


@pytest.mark.soak
def test_slow_silent_and_talkative_clients_cost_their_own_places_alone(place):
    place.start(limits=LIMITS)
    assert ada(place)["rows"]
    before = threads(place), descriptors(place)

    # Half a head, half a body: cut off after a second, and a place is free again.
    crowd = Crowd(place, BEN, 5, b"\0\0")
    time.sleep(1.5)
    assert crowd.leave() == 5
    body = json.dumps({"op": "status", "x": "y" * 100}).encode()
    crowd = Crowd(place, BEN, 5, struct.pack(">I", len(body)) + body[:50])
    time.sleep(1.5)
    assert crowd.leave() == 5

    # One person takes all the places that one may have: the others are served.
    crowd = Crowd(place, ADA, 6)
    assert ada(place)["code"] == "request.busy"
    others = Crowd(place, BEN, 2)
    assert status(place, NOBODY)["code"] == "site.person"  # eight are there: one of hers went
    assert status(place, BEN)["person"] == "ben"
    assert others.leave() == 0
    assert crowd.leave() >= 1

    # Large requests: one at a time of one person, and the connection outlives the refusal.
    large = json.dumps({"op": "status", "pad": "x" * 4_000}).encode()
    head = struct.pack(">I", len(large))
    first = Crowd(place, ADA, 1, head + large[:10])

    def second():
        with client.connect(place.socket) as connection:
            connection.sendall(head + large)
            told = wire.receive(connection, wire.MESSAGE_LIMIT)
            wire.send(connection, {"op": "status"})
            return [told["code"], wire.receive(connection, wire.MESSAGE_LIMIT)["event"]]

    assert Person(ADA, second).result() == ["request.busy", "status"]
    first.leave()

    # Noise, and a crowd that comes and goes.
    chosen = random.Random(7)
    for _ in range(200):
        with sockets.socket(sockets.AF_UNIX) as raw:
            raw.connect(str(place.socket))
            raw.sendall(chosen.randbytes(chosen.randrange(1, 400)))
    for _ in range(500):
        with sockets.socket(sockets.AF_UNIX) as raw:
            raw.connect(str(place.socket))
    assert ada(place)["rows"]
    wait_for(lambda: threads(place) <= before[0] and descriptors(place) <= before[1], "the end")
    assert not place.records("enclave.incident")
    assert place.stop() == 0
    place.verify()


@pytest.mark.soak
def test_a_client_that_takes_nothing_loses_its_answer_and_its_place(place):
    place.start(limits=LIMITS)

    def takes_nothing():
        with client.connect(place.socket) as connection:
            options = {"n": 300, "seed": 3}
            message = {"op": "run", **JOB, "options": options, "project": "route-design"}
            wire.send(connection, {**message, "held": "", "files": ["csv", "html", "sdf"]})
            time.sleep(15)
            return []

    sleeper = Person(ADA, takes_nothing)
    wait_for(lambda: status(place)["running"] == 1)
    wait_for(lambda: status(place)["running"] == 0, "the end of the answer", 14)
    sleeper.result()
    assert ada(place)["rows"]


@pytest.mark.soak
def test_ten_thousand_quick_connections_leave_nothing_behind(place):
    place.start()
    assert ada(place)["rows"]
    before = threads(place), descriptors(place)
    slow = long_run(place, n=200)
    for number in range(10_000):
        with sockets.socket(sockets.AF_UNIX) as raw:
            raw.connect(str(place.socket))
            if number % 3 == 0:
                raw.sendall(b"\xff\xff\xff\xff")
    assert slow.result()["rows"]
    wait_for(lambda: threads(place) <= before[0] and descriptors(place) <= before[1], "the end")
    assert ada(place)["rows"]


@pytest.mark.soak
def test_without_descriptors_the_daemon_stands_and_serves_again(place):
    place.start(files=100)
    assert ada(place)["rows"]
    crowds = [Crowd(place, uid, 30) for uid in (BEN, NOBODY, 40407)]
    assert ada(place)["rows"]  # a low limit was raised: clients cannot use all up
    for crowd in crowds:
        crowd.leave()

    pid, limit = place.process.pid, resource.RLIMIT_NOFILE
    before = resource.prlimit(pid, limit)
    wait_for(lambda: descriptors(place) < 40)
    resource.prlimit(pid, limit, (descriptors(place) + 4, before[1]))
    crowd = Crowd(place, BEN, 20)
    wait_for(lambda: any("Too many open files" in line for line in place.lines), "the limit")
    assert place.process.poll() is None
    resource.prlimit(pid, limit, before)
    crowd.leave()
    wait_for(lambda: "rows" in ada(place), "an answer", 30)
    assert not place.records("enclave.incident")
    assert place.stop() == 0
    place.verify()


@contextmanager
def small_disk(folder, size):
    """Put a folder of the lab on a disk of its own."""
    kept = folder.with_name(f"{folder.name}.kept")
    if folder.exists():
        folder.rename(kept)
    with mounted(folder, size):
        if kept.exists():
            shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
        folder.chmod(0o700)
        yield folder


@pytest.mark.soak
def test_a_full_disk_of_the_log_refuses_and_space_brings_the_daemon_back(place, lab):
    with small_disk(lab / "audit", "160m") as disk:
        place.start()
        assert ada(place)["rows"]
        slow = long_run(place)
        fill(disk / "others", 0)
        codes = {ada(place)["code"] for _ in range(3)}
        assert codes <= {"audit.full", "audit.halted", "host.space"}, codes
        assert slow.result()["code"].startswith(("audit.", "host.space"))
        assert status(place)["person"] == "ada"
        assert place.process.poll() is None
        time.sleep(8)  # the log was opened again with its reserve, and admits nothing new
        assert ada(place)["code"] in {"audit.full", "audit.halted", "host.space"}
        (disk / "others").unlink()
        wait_for(lambda: "rows" in ada(place), "an answer", 60)
        assert {r["data"]["result"] for r in place.records("inference") if r["phase"] == "outcome"}
        assert place.outcomes()[-1][1] == "complete"
        assert place.stop() == 0
        place.verify()


@pytest.mark.soak
def test_a_full_disk_of_the_tree_is_told_by_its_code_and_nothing_leaves(place, lab):
    with small_disk(lab / "holds", "64k") as disk:
        place.start()
        fill(disk / "others", 0)
        held = {"inputs": {"smiles": "OCCSCCO"}, "options": {"n": 2, "seed": 4}}
        for _ in range(2):
            assert run(place, ADA, project="route-design", **held).result()["code"] == "host.space"
        assert ada(place)["rows"]  # what needs no room there
        (disk / "others").unlink()
        assert run(place, ADA, project="route-design", **held).result()["code"] == "policy.held"
        assert place.stop() == 0
        place.verify()
