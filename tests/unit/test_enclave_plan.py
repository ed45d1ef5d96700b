"""The plan lists all that a sealed process gets; what it does not list does not exist there."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from enclave_plans import FACTS, make

from airgap.enclave import filters, host, plan
from airgap.enclave.plan import PlanError


def test_inputs_are_read_only_and_outputs_alone_are_writable(tmp_path):
    made = make(read_only=[str(tmp_path)], writable=["/somewhere/out"])
    modes = {bind["path"]: bind["mode"] for bind in made["binds"]}
    assert modes[str(tmp_path)] == "read"
    assert [path for path, mode in modes.items() if mode == "write"] == ["/somewhere/out"]


def test_an_input_that_is_missing_is_refused(tmp_path):
    with pytest.raises(PlanError) as caught:
        make(read_only=[str(tmp_path / "nothing")])
    assert caught.value.layer == "files"


def test_a_worker_has_nothing_to_write_to():
    made = make()
    assert {bind["mode"] for bind in made["binds"]} == {"read", "device"}
    assert made["limits"]["FSIZE"] == 0
    assert made["limits"]["CORE"] == 0


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the kernel has none"
)
@pytest.mark.parametrize("profile", ["worker", "convert"])
def test_of_large_pages_their_state_is_read_and_no_counter_of_the_host(profile):
    found = {
        Path(bind["path"]).name: bind["mode"]
        for bind in make(profile=profile)["binds"]
        if "hugepage" in bind["path"]
    }
    assert found == {"enabled": "read", "hpage_pmd_size": "read"}


def test_our_packages_the_interpreter_and_nothing_of_the_home_are_bound():
    made = make()
    paths = [bind["path"] for bind in made["binds"]]

    def covered(path):
        return any(path == p or path.startswith(p + "/") for p in paths)

    assert covered(plan.interpreter())
    assert covered(str(Path(plan.__file__)))
    assert covered(os.path.realpath(os.__file__))
    for secret in ("/etc/shadow", "/etc/passwd", "/etc/resolv.conf", "/proc/1", "/dev/tun", "/run"):
        assert not covered(secret)
    assert not covered(str(Path(__file__)))


def test_parents_come_before_what_lies_in_them():
    lengths = [len(bind["path"]) for bind in make(read_only=["/usr/share"])["binds"]]
    assert lengths == sorted(lengths)


def test_an_input_that_is_there_already_is_not_bound_twice():
    paths = [bind["path"] for bind in make(read_only=["/usr/share"])["binds"]]
    assert "/usr/share" not in paths
    assert len(paths) == len(set(paths))


def test_root_shows_an_input_as_the_workers_own(tmp_path):
    made = make(
        facts=replace(FACTS, uid=0, uid_map=((0, 0, 1 << 32),)),
        read_only=[str(tmp_path)],
        uid=61300,
    )
    (bind,) = [bind for bind in made["binds"] if bind["path"] == str(tmp_path)]
    assert bind["owner"] == [tmp_path.stat().st_uid, tmp_path.stat().st_gid]
    assert made["identity"] == [61300, 61300]
    assert made["mapping"] is None


@pytest.mark.parametrize(
    ("rung", "namespaces", "mapped", "rules"),
    [
        ("A", {"net", "ipc", "pid", "mnt", "uts", "cgroup", "user"}, True, True),
        ("U", {"net", "ipc", "pid", "uts", "user"}, False, True),
        ("B", set(), False, True),
        ("C", set(), False, False),
    ],
)
def test_each_rung_has_its_layers(rung, namespaces, mapped, rules):
    made = make(rung=rung)
    assert set(made["namespaces"]) == namespaces
    assert (made["mapping"] is not None) is mapped
    assert (made["landlock"] is not None) is rules
    assert made["stage1"] == filters.stage1().hex()


def test_rung_a_does_without_landlock_where_there_is_none():
    assert make(facts=replace(FACTS, landlock_abi=0))["landlock"] is None


def test_nothing_but_the_interpreter_and_its_loader_may_be_started():
    rules = make()["landlock"]["rules"]
    started = [path for path, kind in rules if kind == "exec"]
    assert plan.interpreter() in started
    assert len(started) <= 2
    assert [path for path, kind in rules if kind == "write"] == []


def test_the_address_space_grows_with_the_inputs(tmp_path):
    small = make(read_only=[str(tmp_path)])["limits"]["AS"]
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    assert make(read_only=[str(tmp_path)])["limits"]["AS"] == small + (2 << 20)
    assert plan.folder_bytes([str(tmp_path / "weights")]) == 1 << 20


def test_root_of_a_namespace_without_namespaces_would_stay_root():
    facts = replace(FACTS, uid=0, uid_map=((0, 1000, 1),))
    for rung in "UBC":
        with pytest.raises(PlanError) as caught:
            make(facts=facts, rung=rung)
        assert caught.value.layer == "identity"


def test_the_environment_is_built_and_not_inherited(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/home/evil.so")
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    made = plan.built_environment(threads=3)
    assert made["ORT_DISABLE_TELEMETRY"] == "1"
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["HOME"] == "/nonexistent"
    assert not {"LD_PRELOAD", "PYTHONPATH", "TMPDIR", "CI"} & set(made)
    assert plan.built_environment(threads=1, scratch="/s")["TMPDIR"] == "/s"


def test_the_launcher_is_an_isolated_interpreter_without_site():
    argv = plan.launcher_argv(5, 6)
    assert argv[:4] == [plan.interpreter(), "-I", "-S", "-B"]
    assert argv[-3:] == ["5", "6", str(os.getpid())]
    assert argv[5:7] == ["launcher", plan.package_folders()["airgap"]]


def test_the_loader_of_an_interpreter_is_read_from_its_file(tmp_path):
    assert Path(plan.loader(plan.interpreter())).exists()
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(PlanError) as caught:
        plan.loader(str(script))
    assert caught.value.layer == "files"


def test_a_static_program_has_no_loader(tmp_path):
    import struct

    head = (
        b"\x7fELF\x02" + bytes(27) + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
    )
    program = tmp_path / "static"
    program.write_bytes(head.ljust(64, b"\0") + struct.pack("<I", 1) + bytes(52))
    assert plan.loader(str(program)) is None


def test_site_folders_are_those_of_this_interpreter():
    folders = plan.site_folders()
    assert any(Path(folder).is_relative_to(sys.prefix) for folder in folders)
    assert "" not in folders
    assert os.getcwd() not in folders  # noqa: PTH109


def test_all_three_packages_are_found():
    assert set(plan.package_folders()) == {"airgap", "bundle", "policy"}
    assert host.RUNGS == tuple(plan.NAMESPACES) == ("A", "U", "B", "C")
