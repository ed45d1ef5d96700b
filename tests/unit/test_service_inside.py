"""The daemon on its socket in this process, its pair in memory: who is answered what, and when."""

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import audit_logs as logs
import lab_trees
import pytest
from lab_trees import run as command
from test_serve_broker import MODEL, Helper, Worker

from airgap.audit.query import read_records
from airgap.demo import site_toml
from airgap.install import Store
from airgap.serve import Job
from airgap.serve.session import House
from airgap.serve.tree import Tree
from airgap.service import client, wire
from airgap.service.daemon import Daemon, Limits
from airgap.service.keeper import Keeper, Patience
from airgap.service.kept_log import KeptLog
from airgap.service.sockets import listening
from policy.errors import FaultError, RefusedError

HELD = {"smiles": "OCCSCCO"}


class LiveWorker(Worker):
    """The worker in memory, with what the daemon and a page ask of a sealed process."""

    evidence = {"probe": {"sealed": {"tcp4": "EACCES"}}}  # noqa: RUF012 - never changed
    alive = True

    def close(self):
        self.alive = False

    def request(self, *_):
        return b""


class LiveHelper(Helper):
    alive = True

    def close(self):
        self.alive = False


@dataclass(frozen=True)
class Lab(House):
    """A house on a real tree and store, whose pair is in memory."""

    pair: list = field(default_factory=list)

    @contextlib.contextmanager
    def sealed_pair(self, log, **_):
        self.tree.put_on_record(log, self.tree.read())
        self.pair[:] = [LiveWorker(), LiveHelper()]
        yield tuple(self.pair)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    staging = lab_trees.make_staging(tmp_path_factory.mktemp("staging"))
    one = lab_trees.make_sealed(staging, staging / "one.agb", epoch=1)
    root = lab_trees.make_lab(staging, tmp_path_factory.mktemp("lab") / "tree")
    (root / "site.toml").write_text(site_toml(os.getuid()))
    assert command("install", one, "--root", root) == 0
    return root


class Place:
    """A daemon that serves in a thread."""

    def __init__(self, lab, folder, limits):
        self.root = folder / "tree"
        shutil.copytree(lab, self.root, symlinks=True)
        self.socket = folder / "s"
        self.pair = []
        self.log = KeptLog(lambda: logs.open_log(folder))
        self.keeper = Keeper(self.load, "", self.log, Patience(drain_s=0.2, wait_s=2.0))
        self.daemon = Daemon(self.keeper, self.log, None, limits)
        ready = threading.Event()
        self.thread = threading.Thread(
            target=self.daemon.run,
            args=(listening(self.socket), self.load(), lambda _: ready.set()),
        )
        self.thread.start()
        assert ready.wait(30)

    def load(self):
        tree, installed = Tree(self.root), Store(self.root / "store").current()
        model = replace(MODEL, bundle=installed.digest)
        clock = lambda: datetime.now(UTC)  # noqa: E731
        return Lab(tree, tree.read().site, installed, model, (), clock, self.pair)

    def ask(self, **changes):
        base = {"smiles": "CC(=O)Nc1ccc(O)cc1"}
        job = Job("retrosynthesis", base, "route-design", {"n": 2, "seed": 5})
        return client.run(self.socket, replace(job, **changes), {}, lambda *_: None).json

    def records(self, kind):
        return [r for r in read_records(self.log.folder) if r["kind"] == kind]

    def end(self):
        self.daemon.stop()
        self.daemon.stop()
        self.thread.join(30)
        self.log.close()
        assert not self.thread.is_alive()


@pytest.fixture
def place(lab, tmp_path, request):
    made = Place(lab, tmp_path, getattr(request, "param", Limits()))
    yield made
    made.end()


def code_of(act, *args, **options):
    with pytest.raises((RefusedError, FaultError)) as error:
        act(*args, **options)
    return error.value.code


def test_a_request_is_answered_with_its_release_and_status_says_who_asks(place):
    answer = place.ask()
    assert answer["run"]["model_digest"] == str(place.load().installed.digest)
    status = client.status(place.socket)
    assert (status["person"], status["state"], status["running"]) == ("ada", "serving", 0)
    assert status["bundle"] == answer["run"]["model_digest"]
    assert [r["data"].get("result") for r in place.records("inference")] == [None, "complete"]
    with client.connect(place.socket) as connection:
        wire.send(connection, {"op": "cancel"})  # after the end: nothing
        wire.send(connection, {"op": "x"})
        assert wire.receive(connection, 1_000) is None


def test_a_hold_is_listed_and_not_answered_before_its_release(place):
    assert client.holds(place.socket) == []
    assert code_of(place.ask, inputs=HELD) == "policy.held"
    (row,) = client.holds(place.socket)
    assert row["state"] == "held"
    assert client.hold_of(place.socket, row["reference"]) == row
    number = row["reference"].rpartition("#")[2]
    denials = len(place.records("denial"))
    for name in (row["reference"], number, f"#{number}", row["reference"]):
        assert code_of(client.fetch, place.socket, name, {}, print) == "hold.waiting"
    assert client.holds(place.socket) == [row]  # and none opened
    asked = place.records("denial")[denials:]
    assert [each["err"]["code"] for each in asked] == ["hold.waiting"] * 4
    assert not any("decision" in each for each in asked)  # none of them is repeated probing
    assert code_of(place.ask, inputs=HELD) == "policy.held"
    assert code_of(client.fetch, place.socket, "9999", {}, print) == "hold.missing"
    assert code_of(client.hold_of, place.socket, "9999") == "hold.missing"
    last = place.records("denial")[-1]
    assert (last["err"]["code"], last["data"]["stage"]) == ("hold.missing", "standing")
    kept = place.root / "holds"
    (file,) = [p for p in kept.glob("*.json") if row["reference"].encode() in p.read_bytes()]
    other = file.read_bytes().replace(row["bundle"].encode(), b"sha256:" + b"0" * 64)
    for path in kept.glob("*.json"):
        path.unlink()
    file.write_bytes(other)
    assert code_of(client.fetch, place.socket, row["reference"], {}, print) == "hold.model"


def test_what_the_tree_says_now_counts_and_its_disk_is_no_fault_of_the_client(place):
    site = (place.root / "site.toml").read_text()
    mine = f"uid = {os.getuid()} "
    assert mine in site
    (place.root / "site.toml").write_text(site.replace(mine, "uid = 54321 "))
    assert code_of(place.ask) == "site.person"
    (place.root / "site.toml").write_text("[")
    assert code_of(place.ask) == "site.toml"
    assert code_of(client.status, place.socket) == "site.toml"
    assert place.records("denial")[-1]["err"]["code"] == "site.toml"
    assert "name" not in place.records("denial")[-1]["actor"]
    (place.root / "site.toml").write_text(site)
    (place.root / "holds").write_text("no folder")
    assert code_of(place.ask, inputs=HELD) == "host.io"
    assert place.ask()["rows"]


def test_who_has_her_answer_has_her_place_again_and_a_last_word_is_waited_for(place, monkeypatch):
    told, send, uid = [], wire.send, os.getuid()

    def watched(connection, message):
        if message.get("event") in {"piece", "done"}:
            daemon = place.daemon
            told.append((message["event"], daemon._places[uid], daemon._running[uid]))
        send(connection, message)

    monkeypatch.setattr(wire, "send", watched)
    assert place.ask()["rows"]
    assert told == [("piece", 1, 1)] * (len(told) - 1) + [("done", 0, 1)]
    assert place.ask()["rows"]
    assert client.status(place.socket)["running"] == 0
    assert place.daemon._places.total() == 0


@pytest.mark.parametrize(
    "place", [Limits(clients=3, per_person=3, idle_s=0.6, message_s=0.3)], indirect=True
)
def test_connections_have_a_number_and_a_time(place):
    with contextlib.ExitStack() as stack:
        open_ = [stack.enter_context(client.connect(place.socket)) for _ in range(3)]
        until = time.monotonic() + 5
        while len(place.daemon._clients) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert code_of(client.status, place.socket) == "request.busy"
        open_[0].sendall(b"\0")
        assert open_[0].recv(10) == b""  # a message that does not come to its end
        assert open_[1].recv(10) == b""  # nothing asked for so long
    assert place.daemon._make_room(1_000) is False
    assert client.status(place.socket)["person"] == "ada"


def test_a_pair_that_ends_is_told_and_a_request_at_the_end_is_refused(place):
    with client.connect(place.socket) as connection:
        place.daemon._asked = 1
        message = {"op": "run", "task": "retrosynthesis", "inputs": {}, "options": {}}
        wire.send(connection, {**message, "project": "", "held": "", "files": []})
        with contextlib.suppress(RefusedError, OSError):
            told = wire.receive(connection, 10_000)
            assert told is None or told["code"] in {"service.draining", "site.project"}
    place.thread.join(30)
    assert code_of(client.status, Path(place.socket)) == "service.absent"
