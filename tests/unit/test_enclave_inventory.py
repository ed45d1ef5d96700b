"""`airgap doctor --gpu`: cards, driver and wheels held against each other, on stand-ins."""

import json
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
    assert "tensorrt-cu13<11" in found.tensorrt_checks[0].fix


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


def test_this_host_is_read_through_arguments(tmp_path):
    version = tmp_path / "version"
    version.write_text(GOOD.module)
    asked = []

    def run(argv):
        asked.append(argv)
        return SMI

    host = take(run, version, str(tmp_path))
    assert asked[0][0] == "nvidia-smi"
    assert (host.smi, host.module, host.nodes) == (SMI, GOOD.module, ())
    assert "nvidiactl" in host.nodes_missing
    assert "pytest" in host.versions
    assert take(lambda _argv: "", tmp_path / "none", str(tmp_path)).module == ""


def test_a_program_that_fails_or_hangs_answers_nothing(tmp_path):
    assert inventory._answer([str(tmp_path / "nvidia-smi")]) == ""
    assert inventory._answer(["false"]) == ""
    assert inventory._answer(["printf", SMI.strip()]) == SMI.strip()


def test_the_command_prints_lines_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    ends = dispatch(["doctor", "--gpu"])
    out = capsys.readouterr().out
    assert "may be demanded: cpu" in out
    assert dispatch(["doctor", "--gpu", "--json"]) == ends
    assert json.loads(capsys.readouterr().out)["cuda"] is (ends == 0)
