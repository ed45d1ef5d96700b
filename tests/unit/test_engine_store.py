"""Engines built by a stand-in for the session, signed by an approver, refused on any difference."""

import json
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import inference_models as models
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

import airgap
from airgap.cli import engine as engine_cli
from airgap.cli.app import dispatch
from airgap.config import InferenceSettings
from airgap.enclave import SealSpec, inventory, launch
from airgap.enclave.channel import ProgramError
from airgap.enclave.convert import run_sealed
from airgap.enclave.inventory import Host
from airgap.engine_store import FILES, RECORD, Wanted, build, on_record, require, require_lab
from airgap.inference import engine_build
from airgap.inference.graphs import Graph, parse_graphs
from airgap.inference.model import load_model
from airgap.inference.options import PROVIDERS, Setup, Shapes, profiles
from airgap.serve.broker import Model
from airgap.serve.provider import engine_settings
from airgap.serve.session import specs
from bundle.keys import load_signer, new_key
from bundle.trust import add_key, new_root
from policy.errors import AirgapError
from policy.terms import Digest

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
HOST = Host(
    smi="0, NVIDIA H100, GPU-1, 590.44.01, 81559, 9.0, Disabled\n",
    module="",
    nodes=(),
    nodes_missing="",
    versions={"onnxruntime-gpu": "1.28.0", "tensorrt-cu13": "10.16.1.11"},
    libraries=frozenset(),
)
DEMO_SITE = Path(airgap.__file__).with_name("demo_site.toml")
SETTINGS = InferenceSettings(engine_rows=4, engine_positions=64, engine_piece=16, threads=1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    people = {"ann": ("approver",), "bob": ("root",), "eve": ("approver",)}
    files = {name: new_key(folder, name, person=name, roles=people[name]) for name in people}
    signers = {name: load_signer(folder / f"{name}.pem") for name in people}
    return {**signers, "files": files}


@pytest.fixture(scope="module")
def trust(keys):
    """The root knows bob, who keeps it, and ann, who approves; eve is nobody here."""
    files, enrolled = keys["files"], NOW - timedelta(days=1)
    made = new_root(files["bob"], keys["bob"], now=enrolled, people=1)
    return add_key(made, files["ann"], [keys["bob"]], now=enrolled).document


def installed(folder):
    return SimpleNamespace(
        folder=folder, digest=Digest.of(b"bundle"), model_folder=lambda _name: folder
    )


@pytest.fixture
def bundle():
    return installed(models.model_folder())


def wanted_of(bundle, host=HOST, settings=SETTINGS, precision="fp32"):
    return Wanted.of(bundle, "tiny", precision, settings, host)


def stand_in(_graph, *, setup, described, **_more):
    """Leave what TensorRT would: a context, an engine, a cache."""
    assert setup.build
    assert described.interface == "past"
    for name in ("engine_ctx.onnx", "part_0_sm90.engine", "timing.cache"):
        (setup.engines / name).write_bytes(name.encode() * 10)


def seal_with(open_session, capsys=None):
    """Run the program of the seal in this process."""

    def seal(job):
        job.out.mkdir()
        status = engine_build.main(job.argv[3:], open_session)
        return SimpleNamespace(status=status, stderr=capsys.readouterr().err if capsys else "")

    return seal


def built(root, wanted, keys):
    return build(root, wanted, seal=seal_with(stand_in), signer=keys["ann"], now=NOW)


def refusal(call, *given, **named):
    with pytest.raises(AirgapError) as caught:
        call(*given, **named)
    return caught.value


def test_what_was_built_here_is_what_a_start_here_accepts(bundle, keys, trust, tmp_path):
    wanted = wanted_of(bundle)
    assert refusal(require, tmp_path, wanted, trust).code == "model.engine"
    made = built(tmp_path, wanted, keys)
    found = require(tmp_path, wanted_of(bundle), trust)
    assert (found.folder, found.digest) == (made.folder, made.digest)
    assert {each.name for each in found.record.files} == set(os.listdir(found.folder))  # noqa: PTH208
    assert found.record.place.gpu == "NVIDIA H100"
    assert found.record.place.driver == "590.44.01"
    again = built(tmp_path, wanted, keys)
    assert require(tmp_path, wanted, trust).digest == again.digest
    assert os.listdir(found.folder.parents[1]) == ["fp32"]  # noqa: PTH208 - no scratch is left


CHANGES = {
    "gpu": {"host": replace(HOST, smi=HOST.smi.replace("H100", "H200"))},
    "driver": {"host": replace(HOST, smi=HOST.smi.replace("590.44.01", "590.44.02"))},
    "tensorrt": {"host": replace(HOST, versions={**HOST.versions, "tensorrt-cu13": "10.16.2"})},
    "onnxruntime": {"host": replace(HOST, versions={**HOST.versions, "onnxruntime-gpu": "1.29"})},
    "shapes": {"settings": SETTINGS.model_copy(update={"engine_rows": 5})},
    "options": {"settings": SETTINGS.model_copy(update={"device_mb": 4096})},
}


@pytest.mark.parametrize("word", CHANGES)
def test_another_machine_or_setting_refuses_and_says_which(word, bundle, keys, trust, tmp_path):
    built(tmp_path, wanted_of(bundle), keys)
    assert require(tmp_path, wanted_of(bundle), trust)
    error = refusal(require, tmp_path, wanted_of(bundle, **CHANGES[word]), trust)
    assert error.code == "model.engine"
    assert word in error.message


def test_another_bundle_has_a_folder_of_its_own(bundle, keys, trust, tmp_path):
    built(tmp_path, wanted_of(bundle), keys)
    other = SimpleNamespace(**{**vars(bundle), "digest": Digest.of(b"other")})
    assert "there are no engines" in refusal(require, tmp_path, wanted_of(other), trust).message


def change_byte(path):
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)


SPOILED = {
    "an engine that changed": lambda place: change_byte(place / FILES / "part_0_sm90.engine"),
    "an engine that is gone": lambda place: (place / FILES / "part_0_sm90.engine").unlink(),
    "a cache that changed": lambda place: change_byte(place / FILES / "timing.cache"),
    "a file more": lambda place: (place / FILES / "more.engine").write_bytes(b"x"),
    "no record": lambda place: (place / RECORD).unlink(),
    "a record that is no JSON": lambda place: (place / RECORD).write_bytes(b"{"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_engines_are_refused(spoil, bundle, keys, trust, tmp_path):
    wanted = wanted_of(bundle)
    made = built(tmp_path, wanted, keys)
    assert require(tmp_path, wanted, trust)
    spoil(made.folder.parent)
    assert refusal(require, tmp_path, wanted, trust).code == "model.engine"


@pytest.mark.parametrize("who", ["bob", "eve"])
def test_a_key_that_approves_nothing_here_signs_no_engines(who, bundle, keys, trust, tmp_path):
    require_lab(keys["ann"], trust, NOW)
    assert refusal(require_lab, keys[who], trust, NOW).code == "model.engine"
    wanted = wanted_of(bundle)
    build(tmp_path, wanted, seal=seal_with(stand_in), signer=keys[who], now=NOW)
    assert refusal(require, tmp_path, wanted, trust).code == "model.engine"


def test_a_failed_build_leaves_the_engines_before_it(bundle, keys, trust, tmp_path, capsys):
    wanted = wanted_of(bundle)
    built(tmp_path, wanted, keys)

    def failing(*_given, **_named):
        raise ProgramError("model.provider", "no TensorRT", "airgap doctor --gpu")

    def idle(*_given, **_named):
        return None

    attempt = partial(build, tmp_path, wanted, signer=keys["ann"], now=NOW)
    assert refusal(attempt, seal=seal_with(failing, capsys)).code == "model.provider"
    assert refusal(attempt, seal=seal_with(idle, capsys)).code == "model.engine"
    for words in ("", "Traceback\nboom", '{"code": "policy.signature", "message": "", "hint": ""}'):

        def odd(job, words=words):
            job.out.mkdir()
            return SimpleNamespace(status=1, stderr=words)

        assert refusal(attempt, seal=odd).code == "model.engine"

    def lying(job):
        job.out.mkdir()
        return SimpleNamespace(status=0, stderr="")

    assert refusal(attempt, seal=lying).code == "model.engine"
    assert require(tmp_path, wanted, trust)


def test_nothing_is_built_without_the_card_the_libraries_or_the_graph(bundle):
    wanted_of(bundle)
    none = replace(HOST, smi="")
    assert refusal(wanted_of, bundle, none).code == "model.engine"
    second = SETTINGS.model_copy(update={"device": 1})
    assert "number 1" in refusal(wanted_of, bundle, settings=second).message
    assert refusal(wanted_of, bundle, replace(HOST, versions={})).code == "model.engine"
    assert refusal(wanted_of, bundle, precision="fp16").code == "model.precision"


def test_a_graph_that_changed_is_not_built_and_the_job_is_read_strictly(tmp_path):
    folder = models.write_model(tmp_path / "model")
    job = {
        "folder": str(folder),
        "precision": "fp32",
        "threads": 1,
        "device": 0,
        "device_mb": None,
        "deterministic": True,
        "rows": 2,
        "positions": 32,
        "piece": 8,
    }
    out = tmp_path / "out"
    out.mkdir()
    assert engine_build.main([json.dumps(job), str(out)], stand_in) == 0
    change_byte(folder / "model.onnx")
    assert engine_build.main([json.dumps(job), str(out)], stand_in) == 1
    (folder / "model.onnx").unlink()
    assert engine_build.main([json.dumps(job), str(out)], stand_in) == 1
    for wrong in ({"rows": 0}, {"more": 1}, {"piece": 33}, {"folder": "/nowhere"}):
        assert engine_build.main([json.dumps({**job, **wrong}), str(out)], stand_in) == 1
    assert engine_build.main(["[]", str(out)], stand_in) == 1


def test_the_onnxruntime_of_this_host_builds_none_and_says_so(bundle, tmp_path, capsys):
    wanted = wanted_of(bundle)
    call = partial(build, tmp_path, wanted, signer=None, now=NOW)
    assert refusal(call, seal=seal_with(None, capsys)).code == "model.provider"


def test_the_seal_of_the_build_is_refused_where_there_is_no_gpu(bundle, tmp_path):
    if os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
        pytest.skip("this host has a GPU")
    seal = partial(run_sealed, profile="engine", state=tmp_path / "state")
    call = partial(build, tmp_path, wanted_of(bundle), seal=seal, signer=None, now=NOW)
    assert refusal(call).code == "enclave.gpu"


def test_the_worker_is_told_of_the_engines_and_stays_within_their_sizes(bundle, keys, tmp_path):
    engines = built(tmp_path, wanted_of(bundle), keys)
    site = SimpleNamespace(enclave=SimpleNamespace(min_rung="B", reverify_s=60), inference=SETTINGS)
    model = Model("tiny", bundle.digest, "t", "1", "fp32", {}, True, False, "tensorrt")
    worker, _ = specs(bundle, model, site, tmp_path, engines=engines)
    assert worker.profile == "worker-gpu"
    assert engines.folder in worker.read_only
    assert worker.artifacts["engines"] == str(engines.digest)
    told = engine_settings(engines)
    assert told.items() <= worker.config.items()
    assert (told["rows"], told["positions"], told["piece"], told["most_rows"]) == (4, 64, 16, 4)
    assert engine_settings(None) == {}
    sizes = Shapes(rows=4, capacity=64, piece=16)
    small = load_model(
        models.model_folder(),
        precision="fp32",
        demand="cpu",
        threads=1,
        interface="past",
        setup=Setup(shapes=sizes),
    )
    assert (small.facts.max_context, small.piece) == (64, 16)


def parsed(text):
    pairs = (one.rsplit(":", 1) for one in text.split(","))
    return {name: tuple(int(size) for size in shape.split("x")) for name, shape in pairs}


@given(
    layers=st.one_of(st.sampled_from([16, 36]), st.integers(1, 90)),
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    sizes=st.tuples(st.integers(1, 512), st.integers(1, 8192), st.integers(1, 8192)),
    order=st.randoms(use_true_random=False),
)
def test_the_profiles_of_any_manifest_name_every_input_once_and_bound_it(
    layers, kv_heads, head_dim, sizes, order
):
    rows, capacity, piece = sizes[0], max(sizes[1:]), min(sizes[1:])
    known = replace(
        tiny_facts(), layers=layers, kv_heads=kv_heads, head_dim=head_dim, max_context=capacity
    )
    inputs = ["input_ids", "attention_mask", "position_ids", *known.past_inputs]
    order.shuffle(inputs)
    graph = Graph("g", "fp32", "past", "g.onnx", "0" * 64, (), tuple(inputs), ())
    found = profiles(known, graph, Shapes(rows, capacity, piece))
    least, usual, most = (parsed(found[f"trt_profile_{k}_shapes"]) for k in ("min", "opt", "max"))
    for shapes in (least, usual, most):
        assert list(shapes) == inputs
        assert sum(name.startswith("past_key_values.") for name in shapes) == 2 * layers
    for name in inputs:
        bounds = zip(least[name], usual[name], most[name], strict=True)
        assert all(low <= middle <= high for low, middle, high in bounds), name
    assert most["input_ids"] == (rows, piece)
    cache = most["past_key_values.0.key"]
    assert cache == (rows, kv_heads, capacity, head_dim)


def tiny_facts():
    return parse_graphs((models.model_folder() / "graphs.json").read_bytes())


def test_the_seal_of_a_build_and_its_end_are_in_the_log(bundle, keys, tmp_path):
    objects, events = [], []

    def put_object(content):
        objects.append(json.loads(content))
        return Digest.of(content)

    log = SimpleNamespace(put_object=put_object, append=events.append)

    def run(job):
        ended = seal_with(stand_in)(job)
        return SimpleNamespace(**vars(ended), signal=None, evidence={"rung": "A"})

    build(tmp_path, wanted_of(bundle), seal=on_record(log, run), signer=keys["ann"], now=NOW)
    assert [event.kind for event in events] == ["enclave.seal", "enclave.exit"]
    assert objects == [{"rung": "A"}]
    assert events[1].data["profile"] == "engine"
    assert events[1].data["status"] == 0


@pytest.mark.parametrize("words", [["build", "--key", "nobody"], ["verify"]], ids=lambda w: w[0])
def test_the_commands_refuse_an_environment_without_the_libraries(words, tmp_path, capsys):
    if {"onnxruntime-gpu"} & set(inventory.installed()):
        pytest.skip("this environment has onnxruntime-gpu")
    shutil.copy(DEMO_SITE, tmp_path / "site.toml")
    assert dispatch(["engine", *words, "--root", str(tmp_path), "--json"]) == 1
    said = json.loads("".join(capsys.readouterr()))
    assert said["code"] == "model.provider"
    assert "TensorRT" in said["error"]


def test_what_is_shown_fits_a_terminal(bundle, keys, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wanted = wanted_of(bundle)
    made = built(tmp_path, wanted, keys)
    bench = engine_cli.Bench(tmp_path, None, None, wanted)
    engine_cli._show(bench, made, "built and signed", json=False)
    out = capsys.readouterr().out
    assert "NVIDIA H100, compute 9.0, driver 590.44.01" in out
    assert all(len(line) <= 80 or line.startswith("folder") for line in out.splitlines())
    engine_cli._show(bench, made, "built and signed", json=True)
    assert json.loads(capsys.readouterr().out)["record"]["place"]["tensorrt"] == "10.16.1.11"


@pytest.mark.parametrize("demand", ["cuda", "tensorrt"])
def test_the_sealed_worker_refuses_a_provider_that_its_onnxruntime_does_not_offer(demand, tmp_path):
    config = {"folder": str(models.model_folder()), "precision": "fp32", "threads": 1}
    spec = SealSpec(
        profile="worker",
        program="airgap.inference.program:create",
        config=config,
        read_only=(models.model_folder(),),
        state=tmp_path,
    )
    with launch(spec) as worker:
        assert worker.alive
    if PROVIDERS[demand][0] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(AirgapError) as caught:
        launch(replace(spec, config={**config, "provider": demand}))
    assert caught.value.code == "model.provider"
