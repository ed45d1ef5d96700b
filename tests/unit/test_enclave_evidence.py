"""A difference between plan and host is found and names its layer; what is hidden stays None."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from enclave_plans import FACTS as HOST
from enclave_plans import make

from airgap.enclave import evidence, filters, host, reading
from airgap.enclave.reading import Facts, Mount

PLAN = make(writable=["/data/out"])
PLAN["mapping"] = [1000, 1000]
PLAN["binds"].append({"path": "/data/model", "mode": "read", "owner": None})
HOST_SPACES = {name: f"{name}:[1]" for name in reading.NAMESPACES}
OWN_SPACES = {name: f"{name}:[2]" for name in reading.NAMESPACES}
BOUNDED = "1ffffffffff"
GOOD = Facts(
    pid=4711,
    start_time=99,
    session=4700,
    uids=(1000,) * 4,
    uid_map=((PLAN["mapping"][0], 1000, 1),),
    capabilities={"eff": "0", "prm": "0", "inh": "0", "bnd": BOUNDED, "amb": "0"},
    no_new_privs=1,
    seccomp=2,
    filters=2,
    threads=3,
    stray_threads=0,
    pid_inside=1,
    dumpable=False,
    namespaces=OWN_SPACES,
    descriptors=dict(evidence.DESCRIPTORS),
    mounts=(
        Mount("/", writable=False, kind="tmpfs"),
        Mount("/usr", writable=False, kind="ext4"),
        Mount("/data/model", writable=False, kind="ext4"),
        Mount("/data/out", writable=True, kind="ext4"),
        Mount("/dev/null", writable=True, kind="devtmpfs"),
    ),
    executable=PLAN["argv"][0],
    environment=dict(PLAN["env"]),
    limits=dict(PLAN["limits"]),
    links=("lo",),
    addresses=(),
    routes=0,
    sockets=0,
)


def findings(facts, plan=PLAN, **more):
    wanted = {
        "inherited": 0,
        "own_filters": 2,
        "dumpable": False,
        "host": HOST_SPACES,
        "uid": 1000,
    } | more
    return [finding.layer for finding in evidence.verify(facts, plan, **wanted)]


def test_what_the_plan_promised_gives_no_finding():
    assert findings(GOOD) == []


def mount(point, *, writable=False, kind="ext4"):
    return (*GOOD.mounts, Mount(point, writable=writable, kind=kind))


BROKEN = {
    "uid 0": ("identity", {"uids": (1000, 0, 1000, 1000)}),
    "uid 0 inside": ("identity", {"uid_map": ((0, 1000, 1),)}),
    "more ids inside": ("identity", {"uid_map": ((1000, 1000, 1), (0, 100000, 65536))}),
    "another uid": ("identity", {"uids": (1001,) * 4}),
    "an effective capability": ("identity", {"capabilities": {**GOOD.capabilities, "eff": "1"}}),
    "a permitted capability": ("identity", {"capabilities": {**GOOD.capabilities, "prm": "200"}}),
    "an ambient capability": ("identity", {"capabilities": {**GOOD.capabilities, "amb": "1"}}),
    "an inheritable capability": ("identity", {"capabilities": {**GOOD.capabilities, "inh": "1"}}),
    "no no_new_privs": ("nnp", {"no_new_privs": 0}),
    "no seccomp": ("stage1", {"seccomp": 0}),
    "one filter": ("stage2", {"filters": GOOD.filters - 1}),
    "a thread without the last filter": ("stage2", {"stray_threads": 1}),
    "a third filter": ("stage2", {"filters": GOOD.filters + 1}),
    "dumpable": ("dumpable", {"dumpable": True}),
    "the host's network": ("network", {"namespaces": {**OWN_SPACES, "net": "net:[1]"}}),
    "the host's processes": ("namespaces", {"namespaces": {**OWN_SPACES, "pid": "pid:[1]"}}),
    "the host's mounts": ("root", {"namespaces": {**OWN_SPACES, "mnt": "mnt:[1]"}}),
    "the host's queues": ("namespaces", {"namespaces": {**OWN_SPACES, "ipc": "ipc:[1]"}}),
    "the host's users": ("namespaces", {"namespaces": {**OWN_SPACES, "user": "user:[1]"}}),
    "not the first process": ("namespaces", {"pid_inside": 2}),
    "another interface": ("network", {"links": ("lo", "eth0")}),
    "an address": ("network", {"addresses": ("127.0.0.1",)}),
    "a route": ("network", {"routes": 1}),
    "a socket": ("network", {"sockets": 1}),
    "a surprise descriptor": ("descriptors", {"descriptors": {**evidence.DESCRIPTORS, 5: "pipe"}}),
    "a socket as channel": (
        "descriptors",
        {"descriptors": {**evidence.DESCRIPTORS, 3: "socket:[5]"}},
    ),
    "an inherited variable": ("environment", {"environment": {"LD_PRELOAD": "/x.so"}}),
    "no limit on files": ("limits", {"limits": {**PLAN["limits"], "FSIZE": -1}}),
    "a wider limit": ("limits", {"limits": {**PLAN["limits"], "NOFILE": 65}}),
    "a limit that is not told": ("limits", {"limits": {"CORE": 0}}),
    "another program": ("exec", {"executable": "/usr/bin/nc"}),
    "a mount of nobody": ("root", {"mounts": mount("/home")}),
    "a writable input": ("root", {"mounts": mount("/data/model/sub", writable=True)}),
    "a writable root": (
        "root",
        {"mounts": (Mount("/", writable=True, kind="tmpfs"), *GOOD.mounts[1:])},
    ),
    "the host's root": (
        "root",
        {"mounts": (Mount("/", writable=False, kind="ext4"), *GOOD.mounts[1:])},
    ),
    "no root": ("root", {"mounts": GOOD.mounts[1:]}),
}


@pytest.mark.parametrize(("layer", "change"), BROKEN.values(), ids=BROKEN.keys())
def test_a_missing_layer_is_named(layer, change):
    assert findings(GOOD) == []
    assert set(findings(replace(GOOD, **change))) == {layer}


def test_root_must_empty_the_bounding_set_too():
    spaces = [name for name in PLAN["namespaces"] if name != "user"]
    rooted = {**PLAN, "identity": [1000, 1000], "mapping": None, "namespaces": spaces}
    empty = replace(GOOD, capabilities={**GOOD.capabilities, "bnd": "0"})
    assert findings(empty, rooted) == []
    assert findings(GOOD, rooted) == ["identity"]
    shared = replace(empty, namespaces={**OWN_SPACES, "user": "user:[1]"})
    assert findings(shared, rooted) == []  # root needs no user namespace


def test_rung_u_has_namespaces_without_an_id_map_and_the_mounts_of_the_host():
    plan = make(rung="U")
    mounts = (Mount("/", writable=True, kind="ext4"),)
    spaces = {**OWN_SPACES, "mnt": "mnt:[1]", "cgroup": "cgroup:[1]"}
    facts = replace(GOOD, uid_map=(), namespaces=spaces, mounts=mounts)
    assert findings(facts, plan) == []
    assert findings(replace(facts, uid_map=((0, 1000, 1),)), plan) == ["identity"]
    assert findings(replace(facts, routes=1), plan) == ["network"]
    shared = replace(facts, namespaces={**spaces, "user": "user:[1]"})
    assert findings(shared, plan) == ["namespaces"]


def test_a_gpu_worker_holds_its_nodes_and_memory_and_nothing_else():
    node = {"path": "/dev/nvidia0", "mode": "gpu", "owner": None}
    plan = {**PLAN, "binds": [*PLAN["binds"], node]}
    held = {**evidence.DESCRIPTORS, 7: "/dev/nvidia0", 9: "/memfd:cuda (deleted)"}
    with_gpu = replace(GOOD, descriptors=held)
    assert findings(with_gpu, plan) == []
    assert findings(with_gpu) == ["descriptors"]
    for surprise in ("/dev/nvidia1", "socket:[5]", "/etc/passwd"):
        more = replace(with_gpu, descriptors={**held, 10: surprise})
        assert findings(more, plan) == ["descriptors"]
    # The driver opens and closes as it works; a socket is still a difference.
    now = replace(with_gpu, descriptors={**evidence.DESCRIPTORS, 8: "/dev/nvidiactl"})
    assert evidence.differences(with_gpu, now) == []
    grown = replace(with_gpu, descriptors={**held, 11: "socket:[5]"})
    assert [f.layer for f in evidence.differences(with_gpu, grown)] == ["descriptors"]


def test_before_stage_2_one_filter_is_right():
    early = replace(GOOD, filters=GOOD.filters - 1, dumpable=True)
    assert findings(early, own_filters=1, dumpable=None) == []
    assert findings(GOOD, own_filters=1, dumpable=None) == ["stage1"]


def test_what_cannot_be_read_is_no_finding_and_no_claim():
    hidden = replace(
        GOOD,
        uid_map=None,
        namespaces=None,
        descriptors=None,
        mounts=None,
        executable=None,
        environment=None,
        limits=None,
        links=None,
        addresses=None,
        routes=None,
        sockets=None,
        filters=None,
    )
    assert findings(hidden) == []
    document = make_document(hidden, hidden, live=None)
    assert document["fds"] is None
    assert document["mounts"] is None
    assert document["net"] == {"links": None, "addrs": None, "routes": None, "sockets": None}
    assert document["seccomp"]["live_dump_match"] is None
    assert document["ns"]["net"] == ["net:[1]", None]


def test_rung_b_makes_no_claim_about_namespaces():
    plan = make(rung="B")
    shared = replace(GOOD, namespaces=HOST_SPACES, pid_inside=4711, links=("lo", "eth0"), routes=3)
    assert findings(shared, plan) == []


def make_document(loaded, sealed, *, live=True):
    return evidence.seal_document(
        HOST,
        PLAN,
        loaded,
        sealed,
        policy={"min_rung": "B"},
        live=live,
        last_filter=filters.stage2(1),
        artifacts={},
        tried=[],
        probe=None,
        self_test={"tcp4": "EPERM"},
        host=HOST_SPACES,
    )


def test_the_record_has_the_fields_of_the_specification():
    document = make_document(GOOD, replace(GOOD, namespaces=None, descriptors=None, mounts=None))
    assert document["type"] == "enclave.seal"
    assert document["verdict"] == "SEALED"
    assert document["rung"] == "A"
    assert document["seq"] == 1
    assert document["prev"] is None
    assert document["net"] == {"links": ["lo:DOWN"], "addrs": [], "routes": 0, "sockets": 0}
    assert document["fds"] == ["0:/dev/null", "1:/dev/null", "2:pipe", "3:pipe", "4:pipe"]
    assert "/data/model:ro" in document["mounts"]
    assert document["seccomp"]["s2"]["sha256"] == filters.PUBLISHED["stage2.x86_64"]
    assert document["landlock"]["abi_reported"] == HOST.landlock_abi
    assert document["proc"]["dumpable"] == 0
    assert set(document["host"]) >= {"boot_id", "kernel", "distro", "lsm", "io_uring_disabled"}


CHANGES = {
    "another process": ("identity", {"start_time": 100}),
    "another uid": ("identity", {"uids": (0,) * 4}),
    "fewer filters": ("stage2", {"filters": 1}),
    "no seccomp": ("stage2", {"seccomp": 0}),
    "a thread of its own": ("stage2", {"stray_threads": 1}),
    "dumpable again": ("dumpable", {"dumpable": True}),
    "another namespace": ("namespaces", {"namespaces": HOST_SPACES}),
    "a new descriptor": ("descriptors", {"descriptors": {**evidence.DESCRIPTORS, 9: "pipe"}}),
    "a route": ("network", {"routes": 1}),
    "an interface": ("network", {"links": ("lo", "veth0")}),
}


@pytest.mark.parametrize(("layer", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_in_a_running_worker_is_found(layer, change):
    assert evidence.differences(GOOD, replace(GOOD, threads=9)) == []
    (found,) = evidence.differences(GOOD, replace(GOOD, **change))
    assert found.layer == layer


def test_what_was_or_became_hidden_is_not_a_change():
    assert evidence.differences(GOOD, replace(GOOD, namespaces=None, descriptors=None)) == []
    assert evidence.differences(replace(GOOD, routes=None), replace(GOOD, routes=5)) == []


def test_a_thread_that_is_sealed_otherwise_is_counted(tmp_path):
    text = Path("/proc/self/status").read_text()
    status = host.parse_status(text)

    def thread(name, content):
        (tmp_path / "task" / name).mkdir(parents=True)
        (tmp_path / "task" / name / "status").write_text(content)

    thread("7", text)
    thread("8", re.sub("NSpid:.*", "NSpid:\\t8\\t2", text))
    (tmp_path / "task" / "9").mkdir()  # it has ended meanwhile
    assert reading._stray_threads(tmp_path, status) == 0
    changes = {"Seccomp": "1", "NoNewPrivs": "9", "Uid": "7 7 7 7", "CapEff": "f0f0"}
    for number, (name, value) in enumerate(changes.items(), 1):
        thread(f"2{number}", re.sub(f"(?m)^{name}:.*$", f"{name}:\\t{value}", text))
        assert reading._stray_threads(tmp_path, status) == number


def test_this_process_is_read_as_it_is():
    found = reading.read(os.getpid())
    assert found.pid == os.getpid()
    assert found.uids[1] == os.geteuid()
    assert found.dumpable
    assert found.namespaces == reading.own_namespaces()
    assert "lo" in found.links
    assert found.limits["NOFILE"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert found.environment is not None
    assert found.session == os.getsid(0)
    assert Path(found.executable).exists()
    assert any(line.point == "/" for line in found.mounts)


def test_a_process_that_is_gone_cannot_be_read():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):  # dead, and not yet buried
        reading.read(child)
    os.waitpid(child, 0)
    with pytest.raises(OSError, match="No such"):
        reading.read(child)


def fake_proc(folder, **files):
    base = {
        "status": "Uid:\t7\t7\t7\t7\nNoNewPrivs:\t1\nSeccomp:\t2\nThreads:\t1\nNSpid:\t50\t1\n"
        + "".join(f"{name}:\t0000000000000000\n" for name in reading._CAPABILITY_SETS.values()),
        "stat": "50 (a) b (c) S 1 " + " ".join(str(n) for n in range(5, 40)),
    } | files
    (folder / "50/net").mkdir(parents=True)
    for name, text in base.items():
        (folder / "50" / name.replace("__", "/")).write_text(text)
    return folder


def test_an_old_kernel_and_closed_folders_give_none(tmp_path):
    found = reading.read(50, fake_proc(tmp_path))
    assert found.filters is None
    assert found.namespaces is None
    assert found.descriptors is None
    assert found.mounts is None
    assert found.environment is None
    assert found.limits is None
    assert found.uid_map is None
    assert found.session == 6
    assert found.links is None
    assert found.addresses is None
    assert found.routes is None
    assert found.sockets is None
    assert found.start_time == 22
    assert found.pid_inside == 1
    assert not found.dumpable


def test_addresses_of_an_interface_that_is_up_are_seen(tmp_path):
    trie = "Local:\n  +-- 127.0.0.0/8 2 0 2\n     |-- 127.0.0.1\n        /32 host LOCAL\n"
    six = "00000000000000000000000000000001 01 80 10 80       lo\n"
    used = "sockets: used 2\nTCP: inuse 1 orphan 0\n"
    proc = fake_proc(tmp_path, net__fib_trie=trie, net__if_inet6=six, net__sockstat=used)
    found = reading.read(50, proc)
    assert found.addresses == ("0" * 31 + "1", "127.0.0.1")
    assert found.sockets == 2
