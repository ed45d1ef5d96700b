"""Five profiles, one table: what it says is what a plan gives; a GPU is found node by node."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from enclave_plans import FACTS, make

from airgap.enclave import filters, gpu, landlock, plan, profiles, tables
from airgap.enclave.gpu import GpuError
from airgap.enclave.plan import PlanError

NAMES = ("nvidia0", "nvidiactl", "nvidia-uvm")
FORBIDDEN = ("nvidia-modeset", "nvidia-caps-imex-channels", "infiniband", "nvidia-fs0", "nvidiaX")


def tree(folder, *names):
    """Make a folder of device nodes, as plain files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(folder)


def found(folder, *names):
    return gpu.find_nodes(tree(folder, *names), node=os.path.isfile)


def test_there_are_five_profiles_and_each_has_two_published_filters():
    names = {"worker", "worker-gpu", "screen", "convert", "engine"}
    assert set(profiles.PROFILES) == names
    assert {name for name in names if profiles.PROFILES[name].gpu} == {"worker-gpu", "engine"}
    for row in profiles.PROFILES.values():
        assert row.filters[0] == "stage1"
        for arch in tables.ARCHITECTURES:
            assert f"{row.last_filter}.{arch}" in filters.PUBLISHED
    assert "C" not in profiles.PROFILES["convert"].rungs
    assert "C" not in profiles.PROFILES["engine"].rungs
    assert "C" not in profiles.PROFILES["worker-gpu"].rungs


@pytest.mark.parametrize("arch", tables.ARCHITECTURES)
def test_the_table_names_the_digests_that_are_published(arch):
    rows = profiles.document(arch)["profiles"]
    assert [row["name"] for row in rows] == list(profiles.PROFILES)
    for row in rows:
        for shown in row["filters"]:
            assert shown["sha256"] == filters.PUBLISHED[f"{shown['name']}.{arch}"]
            assert shown.get("allows") or shown.get("denies")
    allowed = {row["name"]: set(row["filters"][1].get("allows", ())) for row in rows}
    assert allowed["worker"] == allowed["screen"] == set(tables.STAGE2)
    assert allowed["worker-gpu"] - allowed["worker"] == set(tables.GPU)


@pytest.mark.parametrize("name", ["worker", "screen", "convert"])
def test_a_plan_gives_the_nodes_and_kernel_files_of_its_row(name):
    made, row = make(profile=name), profiles.PROFILES[name]
    devices = {bind["path"] for bind in made["binds"] if bind["mode"] in {"device", "gpu"}}
    assert devices == set(row.nodes)
    kernel = {b["path"] for b in made["binds"] if b["path"].startswith(("/proc", "/sys"))}
    assert kernel == {path for path in row.kernel if os.path.exists(path)}  # noqa: PTH110
    assert made["last"] == row.last_filter


def test_a_profile_of_no_name_or_on_a_wrong_rung_is_refused():
    for wish, layer in (
        ({"profile": "none"}, "job"),
        ({"profile": "convert", "rung": "C"}, "rung"),
    ):
        with pytest.raises(PlanError) as caught:
            make(**wish)
        assert caught.value.layer == layer


def test_a_worker_never_runs_in_the_profile_of_a_conversion():
    """That profile has no stage 2."""
    from airgap.enclave import SealRefused, SealSpec, host, seal

    spec = SealSpec(profile="convert", program="airgap.enclave.probe:create")
    with pytest.raises(SealRefused) as caught:
        seal.start("B", spec, host.survey())
    assert caught.value.code == "enclave.job"


# -- a GPU ----------------------------------------------------------------------------------------


def test_the_nodes_of_a_gpu_and_no_other_are_found(tmp_path):
    more = ("nvidia1", "nvidia12", "nvidia-uvm-tools", "nvidia-caps/nvidia-cap1")
    names = {*NAMES, *more}
    nodes = found(tmp_path, *names, "nvidia-caps/other", *FORBIDDEN, "sda", "nvidia0x")
    assert set(nodes) == {f"{tmp_path}/{name}" for name in names}
    assert len(nodes) == len(set(nodes))


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_node_is_named(missing, tmp_path):
    assert len(found(tmp_path / "whole", *NAMES)) == 3
    with pytest.raises(GpuError, match=missing):
        found(tmp_path / "part", *(name for name in NAMES if name != missing))


def test_a_plain_file_or_a_link_is_no_node(tmp_path):
    tree(tmp_path, *NAMES)
    with pytest.raises(GpuError, match="nvidiactl"):
        gpu.find_nodes(str(tmp_path))
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    assert gpu.is_node("/dev/null")
    assert not gpu.is_node(str(link))
    assert not gpu.is_node(str(tmp_path / "nothing"))


def test_a_host_without_a_gpu_is_refused_by_the_name_of_the_node(tmp_path):
    with pytest.raises(PlanError, match="nvidiactl") as caught:
        make(profile="worker-gpu", devices=str(tmp_path))
    assert caught.value.layer == "gpu"


@pytest.fixture
def devices(tmp_path):
    """Real character devices with the names of a GPU's: each is another /dev/null."""
    folder = tmp_path / "dev"
    folder.mkdir()
    try:
        for name in (*NAMES, "nvidia-caps-imex-channels"):
            os.mknod(folder / name, 0o666 | 0o020000, os.makedev(1, 3))
            (folder / name).chmod(0o666)
    except PermissionError:
        pytest.skip("only root makes device nodes")
    return str(folder)


def test_a_gpu_plan_adds_nodes_environment_and_its_own_proc(devices):
    made = make(profile="worker-gpu", devices=devices)
    modes = {bind["path"]: bind["mode"] for bind in made["binds"]}
    assert {path for path, mode in modes.items() if mode == "gpu"} == {
        f"{devices}/{name}" for name in NAMES
    }
    assert modes["/proc"] == "proc"
    assert modes["/sys"] == "read"
    assert made["env"]["CUDA_MODULE_LOADING"] == "EAGER"
    assert made["env"]["CUDA_CACHE_DISABLE"] == "1"
    assert not {"CUDA_MPS_PIPE_DIRECTORY", "LD_LIBRARY_PATH"} & set(made["env"])
    assert made["last"] == "stage2_gpu"
    assert "AS" not in made["limits"]
    assert set(made["check"]) >= {f"{devices}/{name}" for name in NAMES}


def test_engines_are_built_with_the_nodes_of_a_gpu_and_written_to_one_folder(devices, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    worker = make(profile="worker-gpu", devices=devices)
    made = make(profile="engine", devices=devices, writable=[str(out)])
    binds = [{(bind["path"], bind["mode"]) for bind in each["binds"]} for each in (worker, made)]
    assert binds[1] - binds[0] == {(str(out), "write")}
    assert not binds[0] - binds[1]
    assert made["last"] == "no_exec"
    assert (made["env"], "AS" in made["limits"]) == (worker["env"], False)
    with pytest.raises(PlanError) as caught:
        make(profile="engine", rung="U", devices=devices)
    assert caught.value.layer == "rung"
    with pytest.raises(PlanError, match="nvidiactl"):
        make(profile="engine", devices=str(tmp_path))


def test_on_rung_b_a_gpu_process_may_name_its_own_threads_alone(devices):
    made = make(profile="worker-gpu", rung="B", devices=devices)
    rules = dict(made["landlock"]["rules"])
    assert rules["/proc/self/task"] == "proc"
    assert "/proc" not in rules
    for rung in "UC":
        with pytest.raises(PlanError) as caught:
            make(profile="worker-gpu", rung=rung, devices=devices)
        assert caught.value.layer == "rung"


def test_a_node_takes_ioctl_where_landlock_knows_it():
    ioctl = landlock.GPU & ~landlock.DEVICE
    assert landlock.rights(landlock.GPU, 4, folder=False) == landlock.DEVICE
    assert landlock.rights(landlock.GPU, 5, folder=False) == landlock.DEVICE | ioctl
    assert not landlock.rights(landlock.DEVICE, 7, folder=False) & ioctl


def test_a_profile_without_a_gpu_binds_no_node_of_one():
    for facts in (FACTS, replace(FACTS, nodes=("/dev/nvidiactl",))):
        paths = [bind["path"] for bind in make(facts=facts)["binds"]]
        assert not any("nvidia" in path for path in paths)


# -- cuInit ---------------------------------------------------------------------------------------


def library(
    folder, init=0, devices=1, also="int cuDriverGetVersion(int *n) { *n = 12040; return 0; }"
):
    """Build a stand-in for libcuda that answers as told."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source = folder / "cuda.c"
    source.write_text(
        f"int cuInit(unsigned f) {{ return {init}; }}\n{also}\n"
        f"int cuDeviceGetCount(int *n) {{ *n = {devices}; return 0; }}\n"
    )
    made = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, source], check=True)
    return str(made)


def test_a_gpu_that_answers_is_described(tmp_path):
    assert gpu.initialise(library(tmp_path)) == {"cuInit": 0, "driver": 12040, "devices": 1}


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"init": 304}, "304: a call to the system failed"),
        ({"init": 4711}, "4711: see cuda.h"),
        ({"devices": 0}, "sees no device"),
        ({"also": ""}, "no cuDriverGetVersion"),
    ],
)
def test_a_gpu_that_does_not_answer_is_refused_with_the_cause(wish, words, tmp_path):
    with pytest.raises(GpuError, match=words):
        gpu.initialise(library(tmp_path, **wish))


def test_a_missing_library_is_named():
    with pytest.raises(GpuError, match=r"libcuda-of-nobody.so.1 does not load"):
        gpu.initialise("libcuda-of-nobody.so.1")


def test_only_the_table_decides_where_a_profile_runs():
    assert plan.runs_on("worker", "C")
    assert not plan.runs_on("worker-gpu", "U")
    assert plan.runs_on("a name that is refused later", "A")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_table_is_printed_for_an_auditor(options, capsys):
    from airgap.cli.app import dispatch

    assert dispatch(["enclave", "profiles", *options]) == 0
    out = capsys.readouterr().out
    for name in profiles.PROFILES:
        assert name in out
    for name in ("stage1", "stage2", "stage2_gpu", "no_exec"):
        assert filters.PUBLISHED[f"{name}.x86_64"] in out
    assert "imex" in out
