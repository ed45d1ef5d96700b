"""Parts of the daemon by themselves: its log, its lock, its words on the wire, who keeps a pair."""

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import audit_logs as logs
import lab_trees
import pytest
from lab_trees import run

from airgap.audit import Actor, Event, open_log
from airgap.audit.log import State
from airgap.audit.query import read_records
from airgap.audit.service import RemoteLog
from airgap.audit.site import OWNER_SOCKET, find_log_socket, open_site_log
from airgap.config import AuditSettings, load_site
from airgap.install import Store
from airgap.serve.broker import Model
from airgap.serve.session import House
from airgap.serve.tree import Tree
from airgap.service import presence, wire
from airgap.service.daemon import send_pieces
from airgap.service.keeper import Keeper, Patience, cut_off
from airgap.service.kept_log import KeptLog, disk_fault
from airgap.service.start import raise_descriptors
from policy.errors import FaultError, RefusedError

FAST = Patience(drain_s=0.3, wait_s=5.0, restart_s=(0.0, 0.05), ends=3)


def denial():
    return Event("denial", actor=Actor("jdoe"), err="prompt.g01", data={"count": 1})


# -- the log ----------------------------------------------------------------------------------


def armed(disk):
    """Let the next write fail."""
    disk.at = len(disk.calls) + 1


def test_a_log_that_halted_is_opened_again_and_says_so(tmp_path):
    disk = logs.FailingDisk(0, errno.ENOSPC, only=("write",))
    with KeptLog(lambda: logs.open_log(tmp_path, disk=disk)) as log:
        size = log.append(denial()).seq
        armed(disk)
        for _ in range(2):
            with pytest.raises(FaultError) as fault:
                log.append(denial())
            assert fault.value.code == "audit.halted"
        log.look()
        assert log.append(denial()).seq > size
        log.look()  # one that runs is left alone
    kinds = [record["kind"] for record in read_records(tmp_path / "audit")]
    assert kinds.count("boot") == 2
    assert kinds[-1] == "shutdown"


def test_a_log_that_cannot_be_opened_yet_is_tried_again_later(tmp_path):
    disk = logs.FailingDisk(0, errno.EIO, only=("write",))
    opened = []

    def reopen():
        opened.append(len(opened))
        if len(opened) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return logs.open_log(tmp_path, disk=disk)

    with KeptLog(reopen) as log:
        armed(disk)
        with pytest.raises(FaultError):
            log.append(denial())
        log.look()
        log.look()  # not again at once
        assert len(opened) == 2
        log._again = 0.0
        log.look()
        assert log.append(denial())


def test_a_full_disk_of_evidence_is_a_code(tmp_path):
    disk = logs.FailingDisk(0, errno.ENOSPC)
    with KeptLog(lambda: logs.open_log(tmp_path, disk=disk)) as log:
        disk.only, disk.calls, disk.at = ("open", "write", "mkdir"), [], 1
        with pytest.raises(FaultError) as fault:
            log.put_object(b"evidence")
        assert fault.value.code == "host.space"
        assert log.append(denial())  # the log itself goes on
    assert disk_fault(OSError(errno.EIO, "broken"), "x").code == "host.io"


def test_a_reserve_that_had_no_room_is_held_back_once_there_is(tmp_path):
    clock = logs.FixedClock()
    disk = logs.FailingDisk(1, errno.ENOSPC, only=("allocate",))
    with logs.open_log(tmp_path, disk=disk, clock=clock, reserve_bytes=1 << 20) as log:
        assert log.state is State.DRAIN
        health = log._health
        now = clock.wall_ns() // 10**9
        assert health.state(now) is State.DRAIN  # not again at once
        assert health.state(now + 6) is State.RUNNING


def test_commands_write_to_the_log_of_a_daemon_that_owns_it(tmp_path):
    (tmp_path / "site.toml").write_text('[institution]\nname = "Test"\n')
    site = load_site(tmp_path)
    assert find_log_socket(tmp_path, site.audit) is None
    path = tmp_path / OWNER_SOCKET
    with KeptLog(lambda: open_log(tmp_path, site="Test", mode="service"), path) as log:
        assert path.stat().st_mode & 0o777 == 0o600
        with open_site_log(tmp_path, site) as other:
            assert isinstance(other, RemoteLog)
            assert other.append(denial()).origin == log.origin
        assert not log.remote
        assert len(log.ring.keys) == 1
        assert log._daily.look()  # the whole log, on record, once a day
        assert not log._daily.look()
        assert list(read_records(log.folder))[-1]["data"]["verdict"] == "cannot tell"
        assert log.append(denial())
    assert find_log_socket(tmp_path, site.audit) is None
    named = AuditSettings(socket="/run/x.sock")
    assert str(find_log_socket(tmp_path, named)) == "/run/x.sock"
    with open_site_log(tmp_path, site) as own:
        assert not isinstance(own, RemoteLog)


def test_a_tree_whose_name_is_too_long_for_a_socket_has_none(tmp_path):
    with KeptLog(lambda: logs.open_log(tmp_path), tmp_path / ("x" * 120) / "s") as log:
        assert log.append(denial())


# -- one daemon a tree ------------------------------------------------------------------------


def test_one_daemon_holds_a_tree_and_says_what_it_serves(tmp_path):
    assert presence.find_daemon(tmp_path) is None
    assert presence.taken_over(tmp_path, "sha256:1") == (None, [])
    held = presence.Presence(tmp_path)
    assert presence.find_daemon(tmp_path) == {}
    held.tell({"serves": "m 1", "chosen": ""})
    found = presence.find_daemon(tmp_path)
    assert (found["pid"], found["serves"]) == (os.getpid(), "m 1")
    document, rows = presence.taken_over(tmp_path, "sha256:1")
    assert document["takes_over"]
    assert "by itself" in rows[0][1]
    held.tell({"serves": "m 1", "chosen": "m-1"})
    document, rows = presence.taken_over(tmp_path, "sha256:1")
    assert not document["takes_over"]
    assert "--model m-1" in rows[0][1]
    held.tell({"serves": "m 1", "bundle": "sha256:1"})
    assert "already" in presence.taken_over(tmp_path, "sha256:1")[1][0][1]
    with pytest.raises(RefusedError) as refused:
        presence.Presence(tmp_path)
    assert refused.value.code == "service.locked"
    assert str(os.getpid()) in refused.value.message
    held.close()
    presence.Presence(tmp_path).close()
    (tmp_path / presence.FILE).unlink()
    (tmp_path / presence.FILE).symlink_to(tmp_path / "other")
    with pytest.raises(FaultError) as fault:
        presence.Presence(tmp_path)
    assert fault.value.code == "host.io"
    assert presence.find_daemon(tmp_path) is None


# -- the wire ---------------------------------------------------------------------------------


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_message_has_a_time_from_its_first_byte_on(ends):
    ours, theirs = ends
    wire.send(theirs, {"op": "status"})
    assert wire.receive(ours, 100, within_s=0.2) == {"op": "status"}
    theirs.sendall(b"\0\0")
    with pytest.raises(TimeoutError):
        wire.receive(ours, 100, within_s=0.05)
    theirs.sendall(b"\0\x10{")
    with pytest.raises((TimeoutError, RefusedError)):
        wire.receive(ours, 100, within_s=0.05)


def test_what_is_not_admitted_is_read_away_and_the_next_message_is_whole(ends):
    ours, theirs = ends
    busy = RefusedError("request.busy", "x")
    wire.send(theirs, {"op": "x", "pad": "y" * 2_000})
    wire.send(theirs, {"op": "status"})
    with pytest.raises(RefusedError) as refused:
        wire.receive(ours, 4_000, within_s=1, admit=lambda size: busy if size > 1_000 else None)
    assert refused.value is busy
    assert wire.receive(ours, 4_000, within_s=1) == {"op": "status"}
    theirs.sendall(b"\0\0\0\x05{")
    theirs.close()
    with pytest.raises(RefusedError) as refused:
        wire.receive(ours, 100)
    assert refused.value.code == "service.client"


def test_an_answer_has_a_time_as_a_whole(ends):
    ours, theirs = ends
    with pytest.raises(TimeoutError):
        send_pieces(ours, "x" * 10, within_s=-1.0)
    send_pieces(ours, "x" * 10, within_s=10.0)
    assert wire.receive(theirs, 1 << 20)["text"] == "x" * 10


def test_a_low_limit_of_descriptors_is_raised_as_far_as_it_may():
    script = (
        "import resource as r, sys; from airgap.service.start import raise_descriptors as up;"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 700)); up(512); print(r.getrlimit(r.RLIMIT_NOFILE));"
        "up(900); print(r.getrlimit(r.RLIMIT_NOFILE)); up(5); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["(512, 700)", "(700, 700)", "(700, 700)"]
    raise_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


# -- who keeps a pair -------------------------------------------------------------------------


@dataclass
class Process:
    """A sealed process in memory."""

    alive: bool = True
    asked: list = field(default_factory=list)

    def close(self):
        self.alive = False

    def request(self, payload, timeout):
        self.asked.append((payload, timeout))
        return b""


@dataclass(frozen=True)
class Lab(House):
    """A house on a real tree and store, whose pairs are in memory; `fail` lets starts fail."""

    pairs: list = field(default_factory=list)
    fail: list = field(default_factory=list)

    @contextlib.contextmanager
    def sealed_pair(self, log, *, lasting=False, why=None):
        assert lasting
        log.append(Event("model.load", "intent", req=ULID, data=dict(why)))
        if self.fail:
            raise self.fail[0]
        pair = (Process(), Process())
        self.pairs.append((pair, dict(why)))
        yield pair
        for each in pair:
            each.close()


ULID = "01K0000000000000000000000A"


class Records:
    """A log in memory."""

    def __init__(self):
        self.kept = []

    def append(self, event):
        self.kept.append(event)

    def look(self):
        pass


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    staging = lab_trees.make_staging(tmp_path_factory.mktemp("staging"))
    one = lab_trees.make_sealed(staging, staging / "one.agb", epoch=1)
    two = lab_trees.make_sealed(staging, staging / "two.agb", epoch=2)
    root = lab_trees.make_lab(staging, tmp_path_factory.mktemp("lab") / "tree")
    assert run("install", one, "--root", root) == 0
    return root, two


@pytest.fixture
def kept(started, tmp_path):
    """A keeper on a copy of the lab, and what it works with."""
    root = tmp_path / "tree"
    shutil.copytree(started[0], root, symlinks=True)
    shared = {"pairs": [], "fail": [], "days": [0], "refuse": []}

    def clock():
        return datetime.now(UTC) + timedelta(days=shared["days"][0])

    def load():
        if shared["refuse"]:
            raise shared["refuse"][0]
        tree = Tree(root)
        installed = Store(root / "store").current()
        version = installed.manifest.version
        model = Model("tiny", installed.digest, "tiny", version, "fp32", {}, True, False)
        return Lab(
            tree, tree.read().site, installed, model, (), clock, shared["pairs"], shared["fail"]
        )

    log = Records()
    keeper = Keeper(load, "", log, FAST)
    keeper.start(load())
    yield keeper, root, shared, log
    keeper.close(lambda: True, cut_off("the test is over"))


def until(ready, within=10.0):
    end = time.monotonic() + within
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_pair_that_ends_is_started_again_and_after_three_ends_no_more(kept):
    keeper, _, shared, log = kept
    for number in range(1, 4):
        with keeper.ticket() as ticket:
            assert ticket.serving.alive
        assert len(shared["pairs"]) == number
        shared["pairs"][-1][0][0].alive = False
        until(lambda: keeper.standing.state != "serving")
        if number < 3:
            until(lambda: keeper.standing.state == "serving")
    until(lambda: keeper.standing.state == "refusing")
    with pytest.raises(FaultError) as fault, keeper.ticket():
        pass
    assert fault.value.code == "service.failed"
    assert log.kept[-1].kind == "enclave.incident"
    keeper.ask_reload()
    until(lambda: keeper.standing.state == "serving")
    keeper.forget("abc")
    assert shared["pairs"][-1][0][0].asked


def test_starts_that_fail_end_as_well_and_the_reason_is_told(kept):
    keeper, _, shared, _ = kept
    shared["fail"].append(RefusedError("enclave.landlock", "no Landlock"))
    shared["pairs"][-1][0][1].alive = False
    until(lambda: keeper.standing.state == "refusing")
    assert "no Landlock" in keeper.standing.why.message
    shared["fail"][:] = [FaultError("audit.halted", "the disk of the log")]
    keeper.ask_reload()
    until(lambda: keeper.standing.why.code == "audit.halted")  # no end of a worker: tried again
    with pytest.raises(FaultError) as fault, keeper.ticket():
        pass
    assert fault.value.code == "audit.halted"
    shared["fail"].clear()
    keeper.ask_reload()
    until(lambda: keeper.standing.state == "serving")


def test_a_release_is_taken_over_when_the_requests_under_way_have_ended(kept, started):
    keeper, root, shared, _ = kept
    ends = threading.Event()
    seen = {}

    def ask():
        with keeper.ticket() as ticket:
            seen["before"] = ticket.serving.house.installed.manifest.epoch
            ends.wait(10)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: seen)
    assert run("update", started[1], "--root", root) == 0
    until(lambda: keeper.standing.state == "changing")
    ends.set()
    thread.join()
    with keeper.ticket() as ticket:  # waits
        assert (seen["before"], ticket.serving.house.installed.manifest.epoch) == (1, 2)
    assert set(shared["pairs"][-1][1]) == {"previous", "reason"}


def test_who_does_not_end_in_time_is_told_and_gets_that_word(kept):
    keeper, _, shared, _ = kept
    keeper.ask_reload()

    def ask():
        with keeper.ticket() as ticket:
            until(lambda: ticket.stop is not None)
            with pytest.raises(FaultError):
                ticket.proceed()
            raise RefusedError("prompt.g01", "what it fails with then is not the reason")

    with pytest.raises(FaultError) as fault:
        ask()
    assert fault.value.code == "service.draining"
    until(lambda: len(shared["pairs"]) == 2 and keeper.standing.state == "serving")


def test_an_expired_release_ends_with_its_requests_and_serves_again_with_the_right_clock(kept):
    keeper, _, shared, _ = kept

    def ask():
        with keeper.ticket() as ticket:
            shared["days"][0] = 100_000
            until(lambda: ticket.stop is not None)
            ticket.proceed()

    with pytest.raises(RefusedError) as refused:
        ask()
    assert refused.value.code == "trust.expired"
    until(lambda: keeper.standing.state == "refusing")
    with pytest.raises(RefusedError) as refused, keeper.ticket():
        pass
    assert refused.value.code == "trust.expired"
    shared["days"][0] = 0
    until(lambda: keeper.standing.state == "serving")


def test_a_release_that_may_not_run_is_not_taken_over(kept, started):
    keeper, root, shared, log = kept
    shared["refuse"].append(RefusedError("start.digest", "a file has changed"))
    assert run("update", started[1], "--root", root) == 0
    until(lambda: keeper.standing.why is not None)
    assert (keeper.standing.state, keeper.standing.why.code) == ("serving", "start.digest")
    assert (log.kept[-1].kind, log.kept[-1].err) == ("model.load", "start.digest")
    with keeper.ticket() as ticket:
        assert ticket.serving.house.installed.manifest.epoch == 1
    shared["refuse"].clear()
    keeper.ask_reload()
    until(lambda: keeper.standing.why is None and keeper.standing.state == "serving")
    with keeper.ticket() as ticket:
        assert ticket.serving.house.installed.manifest.epoch == 2


def test_a_removed_release_serves_no_more(kept):
    keeper, root, _, _ = kept
    assert run("remove", "--default", "logos-ref-tiny", "--root", root) in {0, 1}
    name = str(keeper.standing.house.installed.digest)
    run("remove", "--default", name, "--root", root)
    until(lambda: keeper.standing.state == "refusing")
    assert keeper.standing.why.code == "store.missing"


# -- files of a tree --------------------------------------------------------------------------


def test_a_tree_is_read_anew_when_its_bytes_change_and_only_then(started, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(started[0], root, symlinks=True)
    tree = Tree(root)
    first = tree.read()
    assert tree.read() is first
    text = (root / "site.toml").read_text()
    before = (root / "site.toml").stat()
    (root / "site.toml").write_text(text.replace('state = "MA"', 'state = "TX"'))
    os.utime(root / "site.toml", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = tree.read()
    assert (first.site.institution.state, second.site.institution.state) == ("MA", "TX")
    with logs.open_log(tmp_path) as log:
        tree.put_on_record(log, second)
        tree.put_on_record(log, second)
        kinds = [record["kind"] for record in read_records(log.folder)]
    assert kinds.count("policy.load") == 2  # intent and outcome, once
    (root / "site.toml").unlink()
    with pytest.raises(RefusedError) as refused:
        tree.read()
    assert refused.value.code == "site.missing"
    (root / "site.toml").write_text(text)
    (root / "policy").mkdir(exist_ok=True)
    (root / "policy" / "mine.yaml").write_text("a: b")
    with pytest.raises(RefusedError) as refused:
        tree.read()
    assert refused.value.code == "policy.signature"
