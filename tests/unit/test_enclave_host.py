"""Facts of a host lead to rungs and advice; hosts are emulated (docs/design/enclave.md, 5)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from airgap.enclave import doctor, host, plan
from airgap.enclave.plan import PlanError

FACTS = host.survey()
PLAIN = replace(
    FACTS,
    arch="x86_64",
    uid=1000,
    sys_admin=False,
    may_kill=True,
    uid_map=((0, 0, 4294967295),),
    max_user_namespaces=1000,
    apparmor_userns=None,
    landlock_abi=4,
    autofs=(),
    seccomp_actions="kill_process errno allow",
)
ROOT = replace(PLAIN, uid=0, sys_admin=True)
HOSTS = {
    "plain user": (PLAIN, "B", ["A", "U", "B"]),
    "root": (ROOT, "A", ["A"]),
    "STIG user": (replace(PLAIN, max_user_namespaces=0), "B", ["B"]),
    "STIG root": (replace(ROOT, max_user_namespaces=0), "A", ["A"]),
    "STIG on RHEL 8, user": (replace(PLAIN, max_user_namespaces=0, landlock_abi=0), "B", []),
    "STIG on RHEL 8, C allowed": (
        replace(PLAIN, max_user_namespaces=0, landlock_abi=0),
        "C",
        ["C"],
    ),
    "no Landlock": (replace(PLAIN, landlock_abi=0), "B", ["A"]),
    "automounter": (replace(PLAIN, autofs=("/net",)), "B", ["A"]),
    "AppArmor restricts": (replace(PLAIN, apparmor_userns=1), "B", ["A", "U", "B"]),
    "aarch64": (replace(ROOT, arch="aarch64"), "C", []),
    "root that may not kill": (replace(ROOT, may_kill=False), "C", []),
    "a user that may not kill others": (replace(PLAIN, may_kill=False), "B", ["A", "U", "B"]),
    "the overflow uid": (replace(PLAIN, uid=65534, overflow_uid=65534), "C", []),
    "no seccomp": (replace(ROOT, seccomp_actions="kill allow"), "C", []),
    "U allowed, B not": (PLAIN, "U", ["A", "U"]),
    "root with U allowed": (ROOT, "U", ["A", "U"]),
    "STIG root with U allowed": (replace(ROOT, max_user_namespaces=0), "U", ["A"]),
}


@pytest.mark.parametrize(("facts", "least", "rungs"), HOSTS.values(), ids=HOSTS.keys())
def test_rungs_that_can_be_tried(facts, least, rungs):
    found, left_out = host.candidate_rungs(facts, least)
    assert found == rungs
    assert set(found) | set(left_out) == set(host.RUNGS)
    assert not set(found) & set(left_out)


def test_the_least_rung_without_a_decision():
    assert host.default_min_rung(ROOT) == "A"
    assert host.default_min_rung(PLAIN) == "B"


def refused(name, code, reason):
    return doctor.Rung(name, False, code, reason, 0.0, None)


def sealed(name):
    return doctor.Rung(name, True, "", "", 0.1, None)


ADVICE = {
    "STIG user": (replace(PLAIN, max_user_namespaces=0), [sealed("B")], "user.max_user_namespaces"),
    "no Landlock": (
        replace(PLAIN, landlock_abi=0, max_user_namespaces=0),
        [],
        "lsm=landlock",
    ),
    "Ubuntu 24.04": (replace(PLAIN, apparmor_userns=1), [sealed("B")], "apparmor_parser"),
    "automounter": (replace(PLAIN, autofs=("/net",)), [], "/net"),
    "closed folder": (
        PLAIN,
        [refused("A", "enclave.files", "uid 61200 cannot read '/root/x'")],
        "/root/x",
    ),
    "aarch64": (replace(PLAIN, arch="aarch64"), [], "x86-64"),
    "nothing known": (PLAIN, [refused("A", "enclave.namespaces", "EPERM")], "EPERM"),
}


@pytest.mark.parametrize(("facts", "rungs", "words"), ADVICE.values(), ids=ADVICE.keys())
def test_what_would_raise_it_is_said(facts, rungs, words):
    assert any(words in str(step) for step in doctor.advise(facts, rungs))


def test_nothing_is_advised_on_the_highest_rung():
    assert doctor.advise(replace(PLAIN, apparmor_userns=1), [sealed("A")]) == []


def test_root_is_not_told_to_allow_namespaces_to_users():
    steps = doctor.advise(replace(ROOT, max_user_namespaces=0), [refused("A", "enclave.root", "x")])
    assert not any("sysctl" in str(step) for step in steps)


# -- parsers and identity ----------------------------------------------------------------------

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
41 22 0:33 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw,fd=29,pgrp=1,timeout=0,direct
42 27 0:34 / /net rw - autofs /etc/auto.net rw,fd=6,pgrp=900,indirect
43 27 0:35 / /home/a\\040b rw - nfs4 filer:/home rw,vers=4.2
broken line
"""


def test_only_automounts_that_are_told_names_count(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(MOUNTS)
    found = host.survey(tmp_path)
    assert found.autofs == ("/net",)
    assert found.network_mounts == ("/home/a\\040b",)


def test_what_cannot_be_read_is_none_and_not_a_guess(tmp_path):
    found = host.survey(tmp_path)
    assert found.max_user_namespaces is None
    assert found.yama is None
    assert found.core_pattern_piped is None
    assert found.sys_admin is False
    assert found.as_document()["uid_map"] == []


def test_a_number_that_is_none_is_none(tmp_path):
    (tmp_path / "sys/user").mkdir(parents=True)
    (tmp_path / "sys/user/max_user_namespaces").write_text("many\n")
    assert host.survey(tmp_path).max_user_namespaces is None


def test_a_core_program_is_seen(tmp_path):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/core_pattern").write_text("|/usr/share/apport %p\n")
    assert host.survey(tmp_path).core_pattern_piped is True


def test_a_free_uid_is_nobodys():
    first = host.free_uid(frozenset())
    assert first in range(61184, 65520)
    assert host.free_uid(frozenset({first})) != first
    with pytest.raises(OSError, match="no free uid"):
        host.free_uid(frozenset(range(61184, 65520)))


def test_root_becomes_another_and_a_user_stays():
    assert plan.identity_of(ROOT, 61300) == ([61300, 61300], None)
    own, mapping = plan.identity_of(PLAIN, None)
    assert own is None
    assert mapping is not None


def test_root_of_a_user_namespace_maps_itself_to_another_id():
    inner = replace(ROOT, uid_map=((0, 1000, 1),))
    assert plan.identity_of(inner, None) == (None, [plan.INSIDE_ID, plan.INSIDE_ID])


@pytest.mark.parametrize("facts", [replace(ROOT, uid_map=((0, 0, 1),))])
def test_root_that_is_root_outside_and_has_no_other_id_is_refused(facts):
    with pytest.raises(PlanError) as caught:
        plan.identity_of(facts, None)
    assert caught.value.layer == "identity"


def test_uid_0_is_refused():
    with pytest.raises(PlanError) as caught:
        plan.identity_of(ROOT, 0)
    assert caught.value.layer == "identity"


# -- telemetry ---------------------------------------------------------------------------------


def test_the_installed_onnxruntime_has_no_telemetry_client():
    if FACTS.onnxruntime is None:
        pytest.skip("onnxruntime is not installed")
    assert host.telemetry_hits() == ()


def test_a_telemetry_client_is_found_in_any_shared_object(tmp_path):
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/lib.so.1").write_bytes(b"\x7fELF" + bytes(5000) + b"OneCollector" + bytes(9))
    (tmp_path / "capi/other.so").write_bytes(b"\x7fELF")
    (tmp_path / "empty.so").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("OneCollector")
    assert host.scan_for_collector(tmp_path) == ("lib.so.1",)


def test_a_wheel_that_phones_home_needs_its_switch():
    plan.require_silent((), {})
    plan.require_silent(("lib.so.1",), plan.built_environment(threads=1))
    for environment in ({}, {"ORT_DISABLE_TELEMETRY": "0"}, {"CI": "true"}):
        with pytest.raises(PlanError) as caught:
            plan.require_silent(("lib.so.1",), environment)
        assert caught.value.layer == "telemetry"
