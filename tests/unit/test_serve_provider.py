"""The provider as a demand of the site: what a worker is told, and refusals before it starts."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from airgap.config import InferenceSettings, default_site_toml
from airgap.enclave.profiles import PROFILES
from airgap.serve.broker import Model
from airgap.serve.provider import (
    SHOWN_ON,
    demanded,
    profile_of,
    require_host,
    worker_settings,
)
from airgap.serve.session import require_precision, specs
from policy.errors import RefusedError, UsageError
from policy.terms import Digest

DEMANDS = ("cpu", "cuda", "tensorrt")
GPU = {"onnxruntime-gpu": "1.28.0", "tensorrt-cu13": "10.16.1.11"}


def test_the_option_goes_before_the_file_and_another_word_is_refused():
    settings = InferenceSettings(provider="cuda")
    assert demanded(settings) == "cuda"
    assert demanded(settings, "cpu") == "cpu"
    for word in ("gpu", "CUDA", "rocm"):
        with pytest.raises(UsageError) as caught:
            demanded(settings, word)
        assert caught.value.code == "usage.argument"


def test_a_gpu_gets_the_profile_of_one():
    assert [profile_of(demand) for demand in DEMANDS] == ["worker", "worker-gpu", "worker-gpu"]
    assert all(profile_of(demand) in PROFILES for demand in DEMANDS)
    assert set(SHOWN_ON) == set(DEMANDS)


@pytest.mark.parametrize(
    ("demand", "versions", "word"),
    [
        ("cuda", {"onnxruntime": "1.28.0"}, "onnxruntime-gpu"),
        ("tensorrt", {"onnxruntime": "1.28.0"}, "TensorRT"),
        ("tensorrt", {"onnxruntime-gpu": "1.28.0"}, "TensorRT"),
    ],
)
def test_what_the_environment_lacks_is_refused_by_name_before_anything_starts(
    demand, versions, word
):
    require_host(demand, GPU)
    require_host("cpu", {})
    with pytest.raises(RefusedError) as caught:
        require_host(demand, versions)
    assert caught.value.code == "model.provider"
    assert word in caught.value.message


def test_the_worker_is_told_what_differs_from_its_own_settings_and_no_more():
    told = worker_settings(InferenceSettings(threads=3), "cpu")
    assert told == {"threads": 3}
    site = InferenceSettings(threads=1, spin=False, arena=False, memory_mb=512, device=1)
    told = worker_settings(site, "cpu")
    assert told == {"threads": 1, "spin": False, "arena": False, "memory_mb": 512}
    told = worker_settings(site.model_copy(update={"deterministic": False}), "cuda")
    assert (told["provider"], told["device"], told["deterministic"]) == ("cuda", 1, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": "gpu"},
        {"threads": 0},
        {"threads": 1025},
        {"device": 64},
        {"device_mb": 1},
        {"memory_mb": 1},
        {"engine_rows": 0},
        {"spin": "no"},
    ],
    ids=str,
)
def test_settings_have_limits(wrong):
    InferenceSettings()
    with pytest.raises(ValidationError):
        InferenceSettings.model_validate(wrong)


def test_the_template_names_every_setting_and_its_lines_are_valid():
    section = default_site_toml().partition("[inference]")[2].partition("\n[")[0]
    given = tomllib.loads(re.sub(r"(?m)^# (?=\w+ = )", "", section))
    assert set(given) == set(InferenceSettings.model_fields)
    assert InferenceSettings.model_validate(given).provider == "cpu"


def bundle(*claims, precisions=("fp32",)):
    entry = SimpleNamespace(id="m", precisions=precisions)
    parity = [SimpleNamespace(precision="fp32", provider=name) for name in claims]
    return SimpleNamespace(
        manifest=SimpleNamespace(models=[entry], parity=parity),
        model_folder=lambda name: Path("/models") / name,
        folder=Path("/models"),
        digest=Digest.of(b"bundle"),
    )


def test_a_claim_for_the_cpu_serves_a_gpu_and_not_the_other_way_round():
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    for demand in DEMANDS:
        require_precision(bundle(cpu), "fp32", demand)
    require_precision(bundle(cuda), "fp32", "cuda")
    with pytest.raises(RefusedError) as caught:
        require_precision(bundle(cuda), "fp32", "cpu")
    assert caught.value.code == "model.precision"


@pytest.mark.parametrize("demand", DEMANDS)
def test_the_seal_of_the_worker_follows_the_demand(demand, tmp_path):
    site = SimpleNamespace(
        enclave=SimpleNamespace(min_rung="B", reverify_s=60),
        inference=InferenceSettings(threads=2, device_mb=1024),
    )
    model = Model("m", Digest.of(b"b"), "m", "1", "fp32", {}, True, False, demand)
    worker, helper = specs(bundle(), model, site, tmp_path)
    assert worker.profile == profile_of(demand)
    assert worker.config.get("provider", "cpu") == demand
    assert worker.config.get("device_mb") == (None if demand == "cpu" else 1024)
    assert helper.profile == "screen"
