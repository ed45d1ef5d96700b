"""What receivers got decides; a probe that proves nothing counts as open."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
from enclave_plans import FACTS

from airgap.enclave import probe, twin
from airgap.enclave.refused import SealRefused


def good(rung="A"):
    """A report of a control that leaks everywhere and a twin that does not leak at all."""
    return {
        "version": probe.VERSION,
        "rung": rung,
        "landlock": 7,
        "control": {name: ["OPEN", ""] for name in (*probe.CHANNELS, "foreign_abi")},
        "stage1": {name: ["BLOCKED", "EACCES"] for name in probe.CHANNELS},
        "stage2": {name: ["BLOCKED", "EPERM"] for name in probe.CHANNELS},
        "convert": {name: ["BLOCKED", "EACCES"] for name in probe.CHANNELS},
        "received": {"control": sorted(twin.HEARD), "stage1": [], "stage2": [], "convert": []},
        "foreign_abi": int(signal.SIGSYS),
    }


def test_a_leaking_control_and_a_silent_twin_are_a_seal():
    verdict = twin.judge(good())
    assert verdict.sealed
    assert verdict.control_heard == len(twin.HEARD)
    assert (verdict.sealed_open, verdict.sealed_heard) == (0, 0)
    twin.require_sealed(good())


@pytest.mark.parametrize("name", probe.CORE)
def test_a_control_that_does_not_leak_over_a_core_channel_proves_nothing(name):
    report = good()
    report["control"][name] = ["BLOCKED", "EACCES"]
    assert twin.judge(report).reason.startswith("inconclusive")


@pytest.mark.parametrize("name", sorted(twin.HEARD))
def test_a_receiver_that_is_deaf_proves_nothing(name):
    report = good()
    report["received"]["control"].remove(name)
    assert name in twin.judge(report).reason


def test_a_gpu_worker_may_start_a_memfd_before_stage_2_alone():
    for profile, phase, sealed in (
        ("worker-gpu", "stage1", True),
        ("worker-gpu", "stage2", False),
        ("worker-gpu", "convert", False),
        ("worker", "stage1", False),
    ):
        report = {**copy.deepcopy(good()), "profile": profile}
        report[phase]["memfd_exec"] = ["OPEN", ""]
        assert twin.judge(report).sealed == sealed, (profile, phase)


@pytest.mark.parametrize("phase", ["stage1", "stage2", "convert"])
@pytest.mark.parametrize("name", sorted(twin.HEARD))
def test_one_token_outside_is_a_leak_whatever_the_twin_says(phase, name):
    report = good()
    report["received"][phase].append(name)
    verdict = twin.judge(report)
    assert name in verdict.reason
    assert verdict.sealed_heard == 1


@pytest.mark.parametrize("phase", ["stage1", "stage2", "convert"])
@pytest.mark.parametrize("name", list(probe.CHANNELS))
def test_an_open_channel_is_no_seal(phase, name):
    report = good()
    report[phase][name] = ["OPEN", ""]
    assert not twin.judge(report).sealed
    inherits = phase == "stage1" and name in probe.OPEN_BEFORE_STAGE2
    assert twin.judge(report | {"landlock": 0}).sealed is inherits


@pytest.mark.parametrize("phase", ["control", "stage1", "stage2", "convert", "received"])
def test_a_part_that_is_missing_proves_nothing(phase):
    report = good()
    del report[phase]
    assert not twin.judge(report).sealed


def test_a_channel_that_was_not_tried_proves_nothing():
    report = good()
    del report["stage2"]["tcp4"]
    assert "tcp4" in twin.judge(report).reason


@pytest.mark.parametrize("signal_", [None, 11, 9])
def test_the_foreign_gate_must_kill(signal_):
    report = good()
    report["foreign_abi"] = signal_
    assert "i386" in twin.judge(report).reason
    report["control"]["foreign_abi"] = ["BLOCKED", "ENOSYS"]  # a kernel without that gate
    assert twin.judge(report).sealed


def test_signals_pass_rung_b_before_stage_2_where_landlock_has_no_scopes():
    report = good("B") | {"landlock": 5}
    for phase in ("stage1", "convert"):
        report[phase]["signal_outside"] = ["OPEN", "sent"]
    assert twin.judge(report).sealed
    assert not twin.judge(report | {"landlock": 6}).sealed
    assert not twin.judge(report | {"rung": "A"}).sealed
    report["stage2"]["signal_outside"] = ["OPEN", "sent"]
    assert not twin.judge(report).sealed


def test_rung_c_claims_nothing_before_stage_2():
    report = good("C")
    del report["convert"]
    report["stage1"]["read_file"] = ["OPEN", ""]
    report["received"]["stage1"] = ["proc_fd_outside"]
    assert twin.judge(report).sealed
    report["received"]["stage2"] = ["tcp4"]
    assert not twin.judge(report).sealed


def test_what_the_kernel_lacks_is_listed_and_not_counted():
    report = good()
    report["control"]["sctp"] = ["BLOCKED", "EPROTONOSUPPORT"]
    verdict = twin.judge(report)
    assert verdict.sealed
    assert verdict.not_tested == ("sctp: EPROTONOSUPPORT",)


def test_a_twin_that_did_not_start_refuses_with_its_layer():
    report = {"refused": {"layer": "namespaces", "message": "EPERM"}}
    with pytest.raises(SealRefused) as caught:
        twin.require_sealed(report)
    assert caught.value.code == "enclave.namespaces"
    report["refused"]["layer"] = "nonsense"
    with pytest.raises(SealRefused) as caught:
        twin.require_sealed(report)
    assert caught.value.code == "enclave.probe"


def test_a_leak_refuses_with_the_probe():
    report = good()
    report["received"]["stage2"].append("tcp4")
    with pytest.raises(SealRefused) as caught:
        twin.require_sealed(report)
    assert caught.value.code == "enclave.probe"


def test_the_table_shows_leaks_openings_and_answers():
    report = good()
    report["control"]["sctp"] = ["BLOCKED", "EPROTONOSUPPORT"]
    report["received"]["stage1"] = ["tcp4"]
    rows = {row.channel: row for row in twin.judge(report).rows}
    assert (rows["tcp4"].control, rows["tcp4"].stage1, rows["tcp4"].stage2) == (
        "LEAK",
        "LEAK",
        "EPERM",
    )
    assert rows["sctp"].control == "EPROTONOSUPPORT"
    assert rows["af_vsock"].control == "open"
    summary = twin.summary(report)
    assert summary["receiver_tokens_seen"] == 1
    assert summary["sealed"]["tcp4"] == ["LEAK", "EPERM", "EACCES"]


# -- what is kept ------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Count the probes that are really run; each gives a good report."""
    made = []

    def run(wanted):
        made.append(wanted)
        return good(wanted["rung"])

    monkeypatch.setattr(twin, "_run", run)
    monkeypatch.setattr(twin, "_kept", {})
    return made


def test_a_result_is_kept_in_this_process(runs):
    twin.probe_rung("A", None, FACTS, None)
    twin.probe_rung("A", None, FACTS, None)
    assert len(runs) == 1
    twin.probe_rung("B", None, FACTS, None)
    twin.probe_rung("A", None, FACTS, None, fresh=True)
    assert len(runs) == 3


def test_a_result_is_kept_between_processes(runs, tmp_path, monkeypatch):
    twin.probe_rung("A", None, FACTS, tmp_path / "state")
    monkeypatch.setattr(twin, "_kept", {})
    twin.probe_rung("A", None, FACTS, tmp_path / "state")
    assert len(runs) == 1
    assert oct((tmp_path / "state").stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize(
    "change", [{"boot_id": "x"}, {"kernel": "9"}, {"uid": 0}, {"landlock_abi": 1}]
)
def test_another_host_or_starter_is_probed_again(change):
    from dataclasses import replace

    one, other = {"rung": "A"}, {"rung": "B"}
    assert twin.cache_key(one, FACTS) != twin.cache_key(other, FACTS)
    assert twin.cache_key(one, FACTS) != twin.cache_key(one, replace(FACTS, **change))


SPOILED = {
    "not JSON": lambda _: "{",
    "a list": lambda _: "[]",
    "of another key": lambda text: text.replace('"key": "', '"key": "0'),
    "that proves no seal": lambda text: text.replace('"foreign_abi": 31', '"foreign_abi": 9'),
    "too large": lambda text: text + " " * (1 << 21),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_kept_result_is_not_believed_when_it_is_spoiled(spoil, runs, tmp_path, monkeypatch):
    twin.probe_rung("A", None, FACTS, tmp_path)
    (path,) = tmp_path.glob("probe-*.json")
    path.write_text(spoil(path.read_text()))
    monkeypatch.setattr(twin, "_kept", {})
    twin.probe_rung("A", None, FACTS, tmp_path)
    assert len(runs) == 2


@pytest.mark.usefixtures("runs")
def test_a_refusal_is_not_kept(monkeypatch, tmp_path):
    report = copy.deepcopy(good())
    report["received"]["stage2"] = ["tcp4"]
    monkeypatch.setattr(twin, "_run", lambda *_: report)
    twin.probe_rung("A", None, FACTS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert twin._kept == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.usefixtures("runs")
def test_a_folder_that_cannot_be_written_costs_a_second_and_no_more(tmp_path):
    tmp_path.chmod(0o500)
    assert twin.judge(twin.probe_rung("A", None, FACTS, tmp_path / "x")).sealed


def test_root_probes_as_a_uid_that_it_maps(runs):
    from dataclasses import replace

    twin.probe_rung("A", None, replace(FACTS, uid=0), None)
    twin.probe_rung("B", 61500, replace(FACTS, uid=0), None)
    twin.probe_rung("A", None, replace(FACTS, uid=0, uid_map=((0, 5, 1),)), None)
    assert runs[0]["uid"] in range(61184, 65520)
    assert runs[1]["uid"] == 61500
    assert runs[2]["uid"] is None


def test_a_fixture_that_does_not_report_refuses(monkeypatch, tmp_path):
    from airgap.enclave import plan

    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho nonsense; echo why >&2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(plan, "interpreter", lambda: str(broken))
    report = twin._run({"rung": "A", "uid": None})
    assert "why" in report["refused"]["message"]
    broken.write_text("#!/bin/sh\nexec sleep 9\n")
    monkeypatch.setattr(twin, "_LIMIT_S", 0.1)
    assert "took over" in twin._run({"rung": "A", "uid": None})["refused"]["message"]


def test_a_report_survives_json():
    assert twin.judge(json.loads(json.dumps(good()))).sealed
