"""Emulated hosts: no user namespaces, no Landlock, no IPv6; the kernel says no for real."""

from __future__ import annotations

from enclave_harness import PROGRAMS, needs_namespaces, needs_root, run_as

DOCTOR = """
import contextlib, io, os, tempfile
from airgap.cli.app import dispatch
page = io.StringIO()
with contextlib.redirect_stdout(page):
    status = dispatch(["doctor", "--json", "--root", tempfile.mkdtemp()])
found = json.loads(page.getvalue())
print(json.dumps({"status": status, "verdict": found["verdict"], "advice": found["advice"],
    "reasons": {rung["name"]: rung["reason"] for rung in found["rungs"]},
    "heard": {r["name"]: r["verdict"] and r["verdict"]["control_heard"] for r in found["rungs"]}}))
"""
# Inside a user namespace of our own, whose limit on further ones is 0, as an ordinary uid.
NO_NAMESPACES = """
from airgap.enclave import linux
from pathlib import Path
uid = os.getuid()
linux.call("unshare", linux.CLONE_NEWUSER)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
Path("/proc/self/gid_map").write_text(f"{uid} {uid} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")
"""
# A filter that answers as a kernel without the call does.
NO_CALL = """
from airgap.enclave import filters, linux, tables
import errno
code = [(0x20, 0, 0, 0), (0x15, 0, 1, linux.NUMBER[{name!r}]), (0x06, 0, 0, 0x50000 | errno.ENOSYS)]
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
filters.install(filters._pack([*code, (0x06, 0, 0, filters.ALLOW)]))
"""
# A socket() that knows no IPv6.
NO_IPV6 = """
from airgap.enclave import filters, linux
import errno
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 41), (0x20, 0, 0, 16), (0x15, 0, 1, 10),
        (0x06, 0, 0, 0x50000 | errno.EAFNOSUPPORT)]
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
filters.install(filters._pack([*code, (0x06, 0, 0, filters.ALLOW)]))
"""
# As with AppArmor's restriction of Ubuntu 24.04: a user may make namespaces, and inside no mount
# and no id map succeeds. A Landlock domain that spares all but /proc does the same.
DENIED_INSIDE = """
from airgap.enclave import landlock, linux
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
every = (1 << 13) - 1
rules = [(f"/{name}", every) for name in os.listdir("/") if name != "proc"]
landlock.restrict([*rules, ("/proc", landlock.READ | landlock.EXECUTE), ("/", landlock.READ)], 1)
"""
# A filter, as of a container, that lets nobody make a namespace.
NO_UNSHARE = """
from airgap.enclave import filters, linux
code = [(0x20, 0, 0, 0), (0x15, 0, 1, linux.NUMBER["unshare"]), (0x06, 0, 0, 0x50000 | 1)]
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
filters.install(filters._pack([*code, (0x06, 0, 0, filters.ALLOW)]))
"""
# What max_user_namespaces = 0 does to root: the number reads 0, and a user namespace is ENOSPC.
NO_USER_NAMESPACES_FOR_ROOT = """
from airgap.enclave import filters, linux
import errno, tempfile
from pathlib import Path
zero = Path(tempfile.mkdtemp()) / "zero"
zero.write_text("0")
linux.mount(str(zero), "/proc/sys/user/max_user_namespaces", None, linux.MS_BIND)
code = [(0x20, 0, 0, 0), (0x15, 0, 3, linux.NUMBER["unshare"]), (0x20, 0, 0, 16),
        (0x45, 0, 1, linux.CLONE_NEWUSER), (0x06, 0, 0, 0x50000 | errno.ENOSPC)]
filters.install(filters._pack([*code, (0x06, 0, 0, filters.ALLOW)]))
"""
NO_LANDLOCK = NO_CALL.format(name="landlock_create_ruleset")


LAUNCH = """
from airgap.enclave import SealSpec, launch
spec = SealSpec(profile="worker", program=ARGUMENT + ":create", read_only=(ARGUMENT,))
with launch(spec) as enclave:
    assert enclave.request(b"text", 5.0) == b"text"
    enclave.reverify()
    print(json.dumps(enclave.evidence))
"""


def doctor_on(starter, *steps, code=DOCTOR):
    """Run the doctor in a process that has taken `steps` before."""
    before = "import os\n" + "".join(steps)
    before += (
        "arguments = [sys.executable, '-c', ARGUMENTS[0]]\nos.execv(arguments[0], arguments)\n"
    )
    return run_as(starter, before, f"import json, sys\nARGUMENT = {str(PROGRAMS)!r}\n{code}")


pytestmark = [needs_namespaces, needs_root]


def test_a_host_without_user_namespaces_leaves_a_user_rung_b():
    found = doctor_on("user", NO_NAMESPACES)
    assert (found["status"], found["verdict"]) == (0, "SEALED/B"), found["reasons"]
    assert "max_user_namespaces is 0" in found["reasons"]["A"]
    assert found["heard"]["B"] >= 10  # over loopback and Unix paths alone
    assert any("sysctl -w user.max_user_namespaces" in step for step in found["advice"])


def test_a_host_without_user_namespaces_still_gives_root_rung_a():
    found = doctor_on("root", NO_USER_NAMESPACES_FOR_ROOT)
    assert (found["status"], found["verdict"]) == (0, "SEALED/A"), found["reasons"]
    assert found["reasons"]["U"] == "user.max_user_namespaces is 0"


def test_a_filter_of_a_container_leaves_a_user_rung_b_and_is_named():
    found = doctor_on("user", NO_UNSHARE)
    assert (found["status"], found["verdict"]) == (0, "SEALED/B"), found["reasons"]
    assert found["reasons"]["A"].startswith("EPERM")
    assert any("under 1 system call filter(s) of a container" in step for step in found["advice"])


def test_a_filter_of_a_container_is_a_refusal_for_root_and_is_named():
    found = doctor_on("root", NO_UNSHARE)
    assert (found["status"], found["verdict"]) == (1, "REFUSED")
    assert found["reasons"]["A"].startswith("EPERM")
    assert any("under 1 system call filter(s) of a container" in step for step in found["advice"])


def test_a_host_that_denies_capabilities_inside_gives_a_user_rung_u():
    found = doctor_on("user", DENIED_INSIDE)
    assert (found["status"], found["verdict"]) == (0, "SEALED/U"), found["reasons"]
    assert found["reasons"]["A"].startswith("EACCES")
    assert found["heard"]["U"] >= 10  # the fixture could not have a network of its own either


def test_a_host_that_denies_capabilities_inside_and_has_no_landlock_is_refused():
    found = doctor_on("user", DENIED_INSIDE, NO_LANDLOCK)
    assert (found["status"], found["verdict"]) == (1, "REFUSED")


def test_a_worker_on_such_a_host_is_launched_on_u_and_the_record_says_why():
    record = doctor_on("user", DENIED_INSIDE, code=LAUNCH)
    assert record["rung"] == "U"
    tried = {entry["rung"]: entry["reason"] for entry in record["tried"]}
    assert "enclave.namespaces" in tried["A"]
    assert record["ns"]["net"][0] != record["ns"]["net"][1]
    assert record["ns"]["mnt"][0] == record["ns"]["mnt"][1]
    assert record["net"] == {"links": ["lo:DOWN"], "addrs": [], "routes": 0, "sockets": 0}
    assert record["landlock"]["behaviour_verified"]
    assert record["mounts"] is None


def test_a_host_without_landlock_still_gives_rung_a():
    for starter in ("user", "root"):
        found = doctor_on(starter, NO_LANDLOCK)
        assert (found["status"], found["verdict"]) == (0, "SEALED/A"), found
        assert found["reasons"]["B"] == "the kernel reports no Landlock"


def test_a_host_with_neither_refuses_a_user_and_says_what_would_help():
    found = doctor_on("user", NO_NAMESPACES, NO_LANDLOCK)
    assert (found["status"], found["verdict"]) == (1, "REFUSED")
    assert any("lsm=landlock" in step for step in found["advice"])


def test_a_host_without_ipv6_is_probed_over_ipv4():
    found = doctor_on("user", NO_IPV6)
    assert (found["status"], found["verdict"]) == (0, "SEALED/A")


def test_a_host_without_seccomp_is_refused():
    found = doctor_on("user", NO_CALL.format(name="seccomp"))
    assert (found["status"], found["verdict"]) == (1, "REFUSED")
    assert found["reasons"]["A"]
    assert found["reasons"]["B"]


def test_a_host_without_newer_mount_calls_still_gives_rung_a():
    """As root, inputs of mode 0600 need id maps; without them the files must be readable."""
    found = doctor_on("root", NO_CALL.format(name="open_tree"))
    assert found["verdict"] == "SEALED/A"
