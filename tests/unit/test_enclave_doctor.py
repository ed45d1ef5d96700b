"""`airgap doctor`: one screen, the same facts as JSON, and an exit that tells."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from enclave_plans import FACTS

from airgap.cli.app import dispatch
from airgap.enclave import doctor, host, twin
from airgap.enclave.doctor import Examination, Rung


def report(rung, **change):
    from test_enclave_twin import good

    return good(rung) | change


@pytest.fixture
def hosts(monkeypatch):
    """Emulate a host: its facts, and the report of each rung's probe."""

    def emulate(facts, reports):
        monkeypatch.setattr(host, "survey", lambda: facts)
        monkeypatch.setattr(twin, "probe_rung", lambda rung, *_a, **_k: reports[rung])

    return emulate


def refusing(layer, message):
    return {"refused": {"layer": layer, "message": message}}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def one_screen(page):
    """Whether a terminal of 24 by 80 shows all of it."""
    lines = [line.rstrip() for line in page.splitlines()]
    return len(lines) <= 24 and max(map(len, lines)) <= 80


def test_a_good_host_reaches_a(hosts, capsys, tmp_path):
    hosts(FACTS, {"A": report("A"), "U": report("U"), "B": report("B")})
    assert dispatch(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SEALED/A" in out
    assert "tcp4" not in out
    assert one_screen(out)
    assert dispatch(["doctor", "--root", str(tmp_path), "--channels"]) == 0
    assert "tcp4" in capsys.readouterr().out
    assert dispatch(["doctor", "--root", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "SEALED/A"
    assert document["rungs"][0]["verdict"]["sealed_heard"] == 0
    assert document["advice"] == []


def test_a_host_without_user_namespaces_reaches_b_and_says_why(hosts, capsys, tmp_path):
    hosts(replace(FACTS, max_user_namespaces=0), {"B": report("B")})
    assert dispatch(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SEALED/B" in out
    assert "max_user_namespaces is 0" in out
    assert "\n  sysctl -w user.max_user_namespaces=15000\n" in out  # to copy: no line break in it
    assert one_screen(out)


def test_a_host_without_landlock_reaches_a_and_says_what_b_lacks(hosts, capsys, tmp_path):
    hosts(replace(FACTS, landlock_abi=0), {"A": report("A")})
    assert dispatch(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SEALED/A" in out
    assert "the kernel reports no Landlock" in out


def test_a_host_with_neither_is_refused(hosts, capsys, tmp_path):
    hosts(replace(FACTS, landlock_abi=0, max_user_namespaces=0), {})
    assert dispatch(["doctor", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "REFUSED" in out
    assert "lsm=landlock" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80


def test_a_leak_is_shown_and_refused(hosts, capsys, tmp_path):
    leaking = report("A")
    leaking["received"]["stage2"] = ["tcp4"]
    hosts(replace(FACTS, landlock_abi=0), {"A": leaking})
    assert dispatch(["doctor", "--root", str(tmp_path), "--channels"]) == 1
    out = capsys.readouterr().out
    assert "enclave.probe" in out
    assert "LEAK" in out


def test_a_site_decides_the_least_rung(hosts, capsys, tmp_path):
    from airgap.config import default_site_toml

    text = default_site_toml().replace("# min_rung", "min_rung")
    assert 'min_rung = "B"' in text
    (tmp_path / "site.toml").write_text(text)
    denied = refusing("namespaces", "EPERM")
    hosts(replace(FACTS, uid=0), {"A": denied, "U": denied, "B": report("B")})
    assert dispatch(["doctor", "--root", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["min_rung"] == "B"
    assert document["verdict"] == "SEALED/B"
    assert document["rungs"][0]["code"] == "enclave.namespaces"


def test_rung_c_is_looked_at_only_where_it_is_allowed(hosts):
    hosts(FACTS, {name: report(name) for name in "AUBC"})
    assert [rung.name for rung in doctor.examine().rungs] == ["A", "U", "B"]
    assert [rung.name for rung in doctor.examine("C").rungs] == ["A", "U", "B", "C"]


def test_a_sealed_rung_below_the_least_is_not_reached():
    rungs = (Rung("A", False, "enclave.root", "x", 0.0, None), Rung("B", True, "", "", 0.1, None))
    assert Examination(FACTS, "A", rungs, ()).reached is None
    assert Examination(FACTS, "B", rungs, ()).reached.name == "B"
    assert Examination(FACTS, "U", rungs, ()).reached is None


def test_channels_that_behave_alike_share_a_line():
    lines, untested = doctor.condense(twin.judge(report("A")).rows)
    assert sum(len(line.channels) for line in lines) == len(twin.judge(report("A")).rows)
    assert untested == ()
    half = report("A")
    half["control"]["sctp"] = half["control"]["af_kcm"] = ["BLOCKED", "EAFNOSUPPORT"]
    assert doctor.condense(twin.judge(half).rows)[1] == ("EAFNOSUPPORT: sctp af_kcm",)


def test_telemetry_and_restrictions_are_shown(hosts, capsys, tmp_path):
    hosts(
        replace(
            FACTS,
            uid=0,
            telemetry=("lib.so",),
            onnxruntime="1.32.0",
            apparmor_userns=1,
            autofs=("/net",),
        ),
        {"A": report("A"), "U": report("U"), "B": report("B")},
    )
    dispatch(["doctor", "--root", str(tmp_path)])
    out = capsys.readouterr().out
    assert "telemetry code present and switched off" in out
    assert "restricted by AppArmor" in out
    assert "/net" in out
    assert "uid of its own" in out


def test_advice_is_for_the_family_of_the_host():
    bare = replace(FACTS, landlock_abi=0, lsm="lockdown,selinux")
    red_hat = str(doctor.advise(replace(bare, distro="Rocky Linux 9.4"), [])[0])
    assert 'grubby --update-kernel=ALL --args="lsm=landlock,lockdown,selinux"' in red_hat
    assert "update-grub" not in red_hat
    ubuntu = str(doctor.advise(replace(bare, distro="Ubuntu 24.04"), [])[0])
    assert "update-grub" in ubuntu
    assert "grubby" not in ubuntu
    other = " ".join(map(str, doctor.advise(replace(bare, distro="unknown"), [])))
    assert "grubby" in other
    assert "update-grub" in other


def test_a_filter_of_a_container_and_selinux_are_named():
    denied = [Rung("A", False, "enclave.namespaces", "EPERM", 0.1, None)]
    inside = doctor.advise(replace(FACTS, own_filters=1), denied)
    assert any("container" in step.words for step in inside)
    selinux = doctor.advise(replace(FACTS, lsm="lockdown,selinux"), denied)
    (step,) = [str(step) for step in selinux if "ausearch -m AVC" in str(step)]
    assert "leave SELinux enforcing" in step


def test_no_advice_weakens_the_host():
    worst = replace(
        FACTS,
        max_user_namespaces=0,
        apparmor_userns=1,
        landlock_abi=0,
        autofs=("/net",),
        lsm="selinux,apparmor",
    )
    denied = [Rung("A", False, "enclave.namespaces", "EPERM", 0.1, None)]
    words = " ".join(map(str, doctor.advise(worst, denied)))
    assert "sysctl" in words
    for bad in ("setenforce", "permissive", "restrict_unprivileged_userns=0", "aa-disable"):
        assert bad not in words
