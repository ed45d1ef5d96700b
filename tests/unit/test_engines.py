"""Engines of one GPU: signed by the lab, and refused on every difference."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from airgap.enclave.inventory import Gpu
from airgap.engines import (
    Place,
    options_digest,
    place_of,
    record_engines,
    require_engines,
    sign_engines,
)
from bundle.envelope import parse_envelope
from bundle.keys import load_signer, new_key
from policy.errors import RefusedError
from policy.terms import Digest

NOW = datetime(2026, 11, 25, tzinfo=UTC)
BUNDLE, GRAPH = Digest.of(b"bundle"), Digest.of(b"graph")
GPU = Gpu(0, "NVIDIA H100", "GPU-1", "590.44.01", 81559, "9.0", "Disabled")
VERSIONS = {"onnxruntime-gpu": "1.28.0", "tensorrt-cu13": "10.16.1.11"}
OPTIONS = options_digest({"device_id": "0"})
PROFILES = {f"trt_profile_{kind}_shapes": "input_ids:1x1" for kind in ("min", "opt", "max")}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("lab", "other"):
        new_key(folder, name, person=name, roles=("approver",))
    return {name: load_signer(folder / f"{name}.pem") for name in ("lab", "other")}


@pytest.fixture
def engines(tmp_path):
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "engine_ctx.onnx").write_bytes(b"context")
    (folder / "graph.engine").write_bytes(b"engine" * 1000)
    return folder


def facts(**change):
    given = {"bundle": BUNDLE, "graph": GRAPH, "profiles": PROFILES, "options": OPTIONS}
    return {**given, "place": place_of(GPU, VERSIONS), **change}


def signed(folder, signer):
    return sign_engines(record_engines(folder, now=NOW, **facts()), signer)


def trusted(signer):
    return {signer.public_key.keyid: signer.public_key}


def refused(envelope, keys, folder, **change):
    with pytest.raises(RefusedError) as caught:
        require_engines(envelope, keys, folder, **facts(**change))
    return caught.value


def test_the_same_machine_loads_what_its_lab_signed(engines, keys):
    envelope = signed(engines, keys["lab"])
    again = parse_envelope(envelope.to_bytes(), code="model.engine")
    record = require_engines(again, trusted(keys["lab"]), engines, **facts())
    assert [file.name for file in record.files] == ["engine_ctx.onnx", "graph.engine"]
    assert record.place == Place(
        gpu="NVIDIA H100",
        compute="9.0",
        driver="590.44.01",
        tensorrt="10.16.1.11",
        onnxruntime="1.28.0",
    )


def test_a_key_of_nobody_is_no_signature(engines, keys):
    error = refused(signed(engines, keys["other"]), trusted(keys["lab"]), engines)
    assert error.code == "model.engine"


OTHERS = {
    "bundle": {"bundle": Digest.of(b"another")},
    "graph": {"graph": Digest.of(b"another")},
    "gpu": {"place": place_of(replace(GPU, name="NVIDIA L40S"), VERSIONS)},
    "compute": {"place": place_of(replace(GPU, compute="8.9"), VERSIONS)},
    "driver": {"place": place_of(replace(GPU, driver="590.44.02"), VERSIONS)},
    "tensorrt": {"place": place_of(GPU, {**VERSIONS, "tensorrt-cu13": "10.16.1.12"})},
    "onnxruntime": {"place": place_of(GPU, {**VERSIONS, "onnxruntime-gpu": "1.28.1"})},
    "options": {"options": options_digest({"device_id": "1"})},
    "shapes": {"profiles": {**PROFILES, "trt_profile_max_shapes": "input_ids:2x1"}},
}


@pytest.mark.parametrize(("name", "change"), OTHERS.items(), ids=OTHERS.keys())
def test_any_difference_refuses_and_names_itself(name, change, engines, keys):
    envelope, trust = signed(engines, keys["lab"]), trusted(keys["lab"])
    assert require_engines(envelope, trust, engines, **facts())
    error = refused(envelope, trust, engines, **change)
    assert error.code == "model.engine"
    assert name in error.message


def test_files_that_changed_vanished_or_came_are_refused(engines, keys):
    envelope, trust = signed(engines, keys["lab"]), trusted(keys["lab"])
    assert require_engines(envelope, trust, engines, **facts())
    engine = engines / "graph.engine"
    raw = engine.read_bytes()
    engine.write_bytes(raw[:-1] + b"X")
    assert "has changed" in refused(envelope, trust, engines).message
    engine.unlink()
    assert "is missing" in refused(envelope, trust, engines).message
    engine.write_bytes(raw)
    extra = engines / "more.engine"
    extra.write_bytes(b"")
    assert "is not signed" in refused(envelope, trust, engines).message
    extra.unlink()
    extra.symlink_to(engine)
    assert "no plain file" in refused(envelope, trust, engines).message
    extra.unlink()
    assert require_engines(envelope, trust, engines, **facts())


def test_nothing_is_recorded_of_an_empty_folder_or_without_the_libraries(tmp_path):
    with pytest.raises(RefusedError):
        record_engines(tmp_path, now=NOW, **facts())
    for versions in ({}, {"onnxruntime-gpu": "1.28.0"}, {"tensorrt-cu13": "10.1"}):
        with pytest.raises(RefusedError) as caught:
            place_of(GPU, versions)
        assert caught.value.code == "model.engine"
