"""`airgap doctor --gpu`: cards, driver and wheels held against each other, on stand-ins."""

import json
import os
from dataclasses import replace

import pytest

from airgap.cli.app import dispatch
from airgap.enclave import inventory
from airgap.enclave.inventory import Host, examine, parse_smi, take

SMI = "0, NVIDIA H100 80GB HBM3, GPU-1234, 590.44.01, 81559, 9.0, Disabled\n"
VERSIONS = {
    "onnxruntime-gpu": "1.28.0",
    "nvidia-cuda-runtime": "13.5.37",
    "nvidia-cublas": "13.10.0.20",
    "nvidia-cufft": "12.5.0.14",
    "nvidia-curand": "10.4.5.25",
    "nvidia-cuda-nvrtc": "13.5.37",
    "nvidia-cudnn-cu13": "9.28.1.4",
    "tensorrt-cu13": "10.16.1.11",
}
GOOD = Host(
    smi=SMI,
    module="NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.44.01  Release Build",
    nodes=("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"),
    nodes_missing="",
    versions=VERSIONS,
    libraries=frozenset(library for _, library, _ in inventory.LIBRARIES[13]),
)


def without(*names, **more):
    kept = {name: version for name, version in VERSIONS.items() if name not in names}
    return replace(GOOD, versions={**kept, **more})


def test_a_host_where_everything_fits_may_demand_both():
    found = examine(GOOD)
    assert (found.cuda, found.tensorrt) == (True, True)
    assert not [check.fix for check in found.checks if check.fix]
    assert json.loads(json.dumps(found.as_document()))["cards"][0]["memory_mb"] == 81559


# What is wrong, and which line must say so.
WRONG = {
    "no driver": (replace(GOOD, module=""), "driver"),
    "no nodes": (replace(GOOD, nodes=(), nodes_missing="there is no /dev/nvidiactl"), "nodes"),
    "no card": (replace(GOOD, smi=""), "cards"),
    "library and module differ": (
        replace(GOOD, module=GOOD.module.replace("590.44.01", "580.95.05")),
        "driver library",
    ),
    "driver too old for CUDA 13": (replace(GOOD, smi=SMI.replace("590.44", "570.10")), "card 0"),
    "card too old for CUDA 13": (replace(GOOD, smi=SMI.replace("9.0", "6.1")), "card 0"),
    "no onnxruntime for a GPU": (without("onnxruntime-gpu", onnxruntime="1.28.0"), "onnxruntime"),
    "two of them": (without(onnxruntime="1.28.0"), "onnxruntime"),
    "a version unknown here": (without(**{"onnxruntime-gpu": "1.99.0"}), "onnxruntime"),
    "no cuDNN": (without("nvidia-cudnn-cu13"), "nvidia-cudnn-cu13"),
    "another cuDNN": (without(**{"nvidia-cudnn-cu13": "8.9.7"}), "nvidia-cudnn-cu13"),
    "no cuBLAS": (without("nvidia-cublas"), "nvidia-cublas"),
    "a wheel without its library": (
        replace(GOOD, libraries=GOOD.libraries - {"libcublasLt.so.13"}),
        "nvidia-cublas",
    ),
}


@pytest.mark.parametrize(("host", "line"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_named_with_a_fix(host, line):
    assert examine(GOOD).cuda
    found = examine(host)
    assert not found.cuda
    assert not found.tensorrt
    bad = {check.name: check.fix for check in found.checks if not check.good}
    assert line in bad
    assert bad[line]


@pytest.mark.parametrize(
    "host",
    [
        without("tensorrt-cu13"),
        without(**{"tensorrt-cu13": "11.0.0.1"}),
        without("tensorrt-cu13", **{"tensorrt-cu12": "10.9.0.34"}),
    ],
    ids=["absent", "too new", "of another CUDA"],
)
def test_tensorrt_is_judged_apart(host):
    found = examine(host)
    assert (found.cuda, found.tensorrt) == (True, False)
    assert "tensorrt-cu13<11" in found.tensorrt_checks[0].command


def test_an_older_onnxruntime_wants_cuda_12():
    names = {name: f"{major}.1" for name, _, major in inventory.LIBRARIES[12]}
    host = replace(
        GOOD,
        smi=SMI.replace("590.44.01", "535.10"),
        module=GOOD.module.replace("590.44.01", "535.10"),
        versions={"onnxruntime-gpu": "1.26.0", **names},
        libraries=frozenset(library for _, library, _ in inventory.LIBRARIES[12]),
    )
    assert examine(host).cuda


def test_what_nvidia_smi_prints_is_read_with_care():
    assert [card.compute for card in parse_smi(SMI * 2)] == ["9.0", "9.0"]
    for odd in ("", "No devices were found", "a,b,c", SMI.replace("81559", "[N/A]"), "\x00" * 9):
        assert parse_smi(odd) == []


# -- hosts as trees of files ----------------------------------------------------------------------


def lay(root, *, module="590.44.01", nodes=("nvidia0", "nvidiactl", "nvidia-uvm"), wheels=None):
    """Lay out a host: a driver, its nodes as plain files, cards, and wheels."""
    wheels = VERSIONS if wheels is None else wheels
    files = {f"dev/{name}": "" for name in nodes}
    if module:
        text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {module}  Release Build\n"
        card = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 12\n"
        files["proc/driver/nvidia/version"] = text
        files["proc/driver/nvidia/gpus/0000:01:00.0/information"] = card
    rows = {name: library for rows in inventory.LIBRARIES.values() for name, library, _ in rows}
    for name, version in wheels.items():
        about = f"site/{name.replace('-', '_')}-{version}.dist-info"
        files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        library = rows.get(name)
        files[f"{about}/RECORD"] = f"nvidia/lib/{library},,\n" if library else ""
        if library:
            files[f"site/nvidia/lib/{library}"] = ""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def seen(root, smi=SMI):
    site = [str(root / "site")]
    return examine(take(root, run=lambda _argv: smi, packages=site, node=os.path.isfile))


CUDA_12 = {
    "nvidia-cuda-runtime-cu12": "12.9.79",
    "nvidia-cublas-cu12": "12.9.1.4",
    "nvidia-cufft-cu12": "11.4.1.4",
    "nvidia-curand-cu12": "10.3.10.19",
    "nvidia-cuda-nvrtc-cu12": "12.9.86",
    "nvidia-cudnn-cu12": "9.10.2.21",
}
TREES = {
    "no device": ({"module": "", "nodes": ()}, "", {"driver", "nodes", "cards"}),
    "device without driver": ({"module": ""}, "", {"driver", "cards"}),
    "driver without nodes": ({"nodes": ()}, SMI, {"nodes"}),
    "driver too old": (
        {"module": "570.10"},
        SMI.replace("590.44.01", "570.10"),
        {"card 0"},
    ),
    "no cuDNN": (
        {"wheels": {k: v for k, v in VERSIONS.items() if "cudnn" not in k}},
        SMI,
        {"nvidia-cudnn-cu13"},
    ),
    "libraries of another CUDA": (
        {"wheels": {"onnxruntime-gpu": "1.28.0", **CUDA_12}},
        SMI,
        {name for name, _, _ in inventory.LIBRARIES[13]},
    ),
    "one library of another CUDA": (
        {"wheels": {**VERSIONS, "nvidia-cublas": "12.9.1.4"}},
        SMI,
        {"nvidia-cublas"},
    ),
}


@pytest.mark.parametrize(("change", "smi", "bad"), TREES.values(), ids=TREES.keys())
def test_a_host_laid_out_as_files_is_judged_line_by_line(change, smi, bad, tmp_path):
    good = seen(lay(tmp_path / "good"))
    assert (good.cuda, good.tensorrt) == (True, True)
    assert good.cards[0].name == "NVIDIA H100 80GB HBM3"
    found = seen(lay(tmp_path / "bad", **change), smi)
    assert not found.cuda
    assert {check.name for check in found.checks if not check.good} == bad
    for check in (*found.checks, *found.tensorrt_checks):
        assert check.good or check.fix
        assert len(check.command) <= 76
        assert "http" not in check.fix + check.command


def test_a_library_of_another_cuda_is_named_with_the_one_that_is_wanted(tmp_path):
    wheels = {"onnxruntime-gpu": "1.28.0", **CUDA_12}
    found = seen(lay(tmp_path, wheels=wheels))
    line = next(check for check in found.checks if check.name == "nvidia-cudnn-cu13")
    assert line.found == "nvidia-cudnn-cu12 is for CUDA 12"
    assert line.fix == "onnxruntime-gpu here is built for CUDA 13"
    assert line.command == "pip install --no-index -f WHEELS nvidia-cudnn-cu13"


def test_a_wheel_whose_library_was_deleted_is_damaged(tmp_path):
    root = lay(tmp_path)
    assert seen(root).cuda
    (root / "site/nvidia/lib/libcudnn.so.9").unlink()
    line = next(check for check in seen(root).checks if not check.good)
    assert (line.name, line.fix) == ("nvidia-cudnn-cu13", "the wheel is damaged")
    assert "--force-reinstall" in line.command


def test_a_card_that_only_the_module_shows_is_named(tmp_path):
    line = next(check for check in seen(lay(tmp_path), smi="").checks if not check.good)
    assert line.found == "nvidia-smi names none; the driver shows NVIDIA H100 80GB HBM3"


def test_without_arguments_this_host_is_read(tmp_path):
    asked = []

    def run(argv):
        asked.append(argv)
        return SMI

    host = take(tmp_path, run=run)
    assert asked[0][0] == "nvidia-smi"
    assert (host.smi, host.module, host.nodes, host.shown) == (SMI, "", (), ())
    assert "nvidiactl" in host.nodes_missing
    assert "pytest" in host.versions


def test_a_program_that_fails_or_hangs_answers_nothing(tmp_path):
    assert inventory._answer([str(tmp_path / "nvidia-smi")]) == ""
    assert inventory._answer(["false"]) == ""
    assert inventory._answer(["printf", SMI.strip()]) == SMI.strip()


def test_the_command_prints_lines_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ends = dispatch(["doctor", "--gpu"])
    out = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert "may be demanded: cpu" in out
    assert dispatch(["doctor", "--gpu", "--json"]) == ends
    assert json.loads(capsys.readouterr().out)["cuda"] is (ends == 0)
