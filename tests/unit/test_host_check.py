"""Any host, described by files: what is found there, and which way out is told."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from airgap.config import parse_site
from airgap.host_check import SETTINGS, Host, clock_is_set, examine
from airgap.host_setup import Places, set_up
from airgap.install import Store

PACKAGING = Path(__file__).parents[2] / "packaging"
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def top(tmp_path):
    """The part of a well kept host that is read."""
    top = tmp_path / "top"
    for name, wanted in SETTINGS.items():
        write(top / "proc/sys" / name.replace(".", "/"), f"{wanted[0]}\n")
    write(top / "proc/sys/kernel/random/entropy_avail", "256\n")
    write(top / "proc/self/mounts", f"/dev/vda / ext4 rw 0 0\n/dev/vdb {tmp_path} xfs rw 0 0\n")
    write(top / "proc/swaps", "Filename Type Size Used Priority\n/dev/dm-1 partition 1 0 -2\n")
    write(top / "proc/net/route", "Iface Destination Gateway\neth0 0000A8C0 00000000\n")
    write(top / "sys/fs/selinux/enforce", "1")
    return top


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "lab"
    for name in ("trust", "policy", "store", "keys", "restricted", "holds"):
        (tree / name).mkdir(parents=True, mode=0o700)
    write(tree / "site.toml", "")
    (tree / "site.toml").chmod(0o644)
    key = tree / "keys" / "audit.pem"
    write(key, "x")
    key.chmod(0o600)
    return tree


def look(tree, top, **more):
    more.setdefault("clock_is_set", lambda: True)
    return examine(Host(tree, top, now=lambda: NOW, interpreter=Path("/bin/sh"), **more))


def state(found, name):
    return next(check for check in found.checks if check.name == name)


def test_a_well_kept_host(tree, top):
    found = look(tree, top)
    assert {(c.name, c.found) for c in found.checks if c.state != "good"} == set()
    assert found.good
    assert state(found, "file system").found == "xfs"
    document = found.as_document()
    assert document["format"] == "airgap/doctor-system/1"
    assert all(set(check) == {"name", "state", "found", "fix"} for check in document["checks"])


CHANGES = {
    "site.toml for all": (lambda at: (at.tree / "site.toml").chmod(0o666), "tree", "bad"),
    "rules for a group": (lambda at: (at.tree / "policy").chmod(0o770), "tree", "bad"),
    "no tree": (lambda at: at.tree.rename(at.tree.parent / "gone"), "tree", "bad"),
    "a key that others read": (
        lambda at: (at.tree / "keys/audit.pem").chmod(0o640), "private files", "bad",
    ),
    "a held answer": (
        lambda at: write(at.tree / "holds/1.json", "{}"), "private files", "bad",
    ),
    "memory": (
        lambda at: write(at.top / "proc/self/mounts", f"x {at.tree.parent} tmpfs rw 0 0\n"),
        "file system", "bad",
    ),
    "another host's disk": (
        lambda at: write(at.top / "proc/self/mounts", f"x {at.tree.parent} nfs4 rw 0 0\n"),
        "file system", "look",
    ),
    "no entropy": (
        lambda at: write(at.top / "proc/sys/kernel/random/entropy_avail", "12"),
        "entropy", "look",
    ),
    "no word of entropy": (
        lambda at: (at.top / "proc/sys/kernel/random/entropy_avail").unlink(),
        "entropy", "bad",
    ),
    "io_uring": (
        lambda at: write(at.top / "proc/sys/kernel/io_uring_disabled", "0"),
        "kernel.io_uring_disabled", "look",
    ),
    "an old kernel": (
        lambda at: (at.top / "proc/sys/kernel/io_uring_disabled").unlink(),
        "kernel.io_uring_disabled", "look",
    ),
    "cores to a program": (
        lambda at: write(at.top / "proc/sys/kernel/core_pattern", "|/usr/bin/report"),
        "kernel.core_pattern", "look",
    ),
    "SELinux looks on": (
        lambda at: write(at.top / "sys/fs/selinux/enforce", "0"), "security module", "look",
    ),
    "swap": (
        lambda at: write(at.top / "proc/swaps", "Filename\n/swapfile file 1 0 -2\n"),
        "swap", "look",
    ),
    "a way out": (
        lambda at: write(at.top / "proc/net/route", "Iface\neth0 00000000 0100A8C0\n"),
        "network", "look",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_wrong_is_named_with_a_way_out(change, tree, top):
    alter, name, wanted = CHANGES[change]
    assert state(look(tree, top), name).state == "good"
    alter(SimpleNamespace(tree=tree, top=top))
    check = state(look(tree, top), name)
    assert check.state == wanted
    assert check.fix or change == "an old kernel"
    assert look(tree, top).good == (wanted != "bad")


def test_apparmor_with_and_without_our_profile(tree, top):
    (top / "sys/fs/selinux/enforce").unlink()
    assert state(look(tree, top), "security module").found == "none is active"
    write(top / "sys/module/apparmor/parameters/enabled", "Y\n")
    assert "not loaded" in state(look(tree, top), "security module").found
    write(top / "sys/kernel/security/apparmor/profiles", "airgap (unconfined)\n")
    assert state(look(tree, top), "security module").state == "good"


@pytest.mark.parametrize(("held", "wanted"), [(True, "good"), (False, "look"), (None, "look")])
def test_a_clock_that_nobody_keeps(held, wanted, tree, top):
    assert state(look(tree, top, clock_is_set=lambda: held), "clock").state == wanted
    assert clock_is_set() in {True, False, None}


def test_a_clock_before_what_has_been(tree, top):
    store = Store(tree / "store")
    store.note_time(NOW - timedelta(days=1))
    assert state(look(tree, top), "last record").state == "good"
    store.note_time(NOW + timedelta(days=365))
    found = state(look(tree, top), "last record")
    assert found.state == "bad"
    assert "2027-11-25" in found.found


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to somebody else")
def test_a_folder_above_that_belongs_to_somebody(tree, top):
    os.chown(tree.parent, 65534, 65534)
    found = state(look(tree, top), "tree")
    assert found.state == "bad"
    assert "belongs to uid 65534" in found.found


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to somebody else")
def test_an_interpreter_of_somebody_else(tree, top, tmp_path):
    program = tmp_path / "python"
    write(program, "")
    os.chown(program, 65534, 65534)
    host = Host(tree, top, now=lambda: NOW, clock_is_set=lambda: True, interpreter=program)
    assert state(examine(host), "interpreter").state == "bad"


def test_the_settings_are_those_that_we_ship():
    lines = (PACKAGING / "sysctl.d" / "60-airgap.conf").read_text().splitlines()
    shipped = dict(line.split(" = ", 1) for line in lines if " = " in line and line[0] != "#")
    for name, wanted in SETTINGS.items():
        assert shipped[name] == wanted[0]


SERVED = '[institution]\nname = "Lab"\n[service]\nsocket = "/run/b.sock"\n'
OWN_LOG = SERVED + '[audit]\nsocket = "/run/a.sock"\n'


@pytest.mark.parametrize(
    ("facts", "spoil", "found"),
    [
        (OWN_LOG, lambda _: None, "the log belongs to airgap-audit"),
        (SERVED, lambda _: None, "no service that owns the log"),
        (OWN_LOG, lambda tree: (tree / "holds").chmod(0o755), "has mode 0755"),
        (OWN_LOG, lambda tree: (tree / "holds").rmdir(), "is missing"),
        ("x", lambda _: None, "site.toml"),
    ],
)
def test_an_installation_is_looked_at_where_our_units_are(tree, top, facts, spoil, found):
    assert "installation" not in {check.name for check in look(tree, top).checks}
    write(top / "etc/systemd/system/airgap.service", "[Unit]\n")
    write(tree / "site.toml", OWN_LOG)
    list(set_up(Places(tree, tree, True, top), parse_site(OWN_LOG.encode(), "x"), None))
    assert state(look(tree, top), "installation").state == "good"
    write(tree / "site.toml", facts)
    spoil(tree)
    check = state(look(tree, top), "installation")
    assert found in check.found
    assert (check.state == "good") == ("belongs to" in found)
