"""Pickled weights: converted under the seal only, attacks contained, and never called published."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import tiny_llama
from staging_runs import Result, run_inline

from airgap.enclave import run_sealed
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view
from bundle.staging.inspect import inspect_source
from bundle.staging.unpickle import RECORD, parse_unpickled, unpickle
from policy.errors import AirgapError, RefusedError

torch = pytest.importorskip("torch")


@pytest.fixture
def pickled(tmp_path):
    """The tiny model with its weights as a pickle, and the digests of its tensors."""
    folder = tiny_llama.write_snapshot(tmp_path / "published")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def code(call, *args, **more) -> str:
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


def test_a_pickle_becomes_safetensors_under_the_real_seal(pickled, tmp_path):
    assert [e.code for e in inspect_source(pickled).refusals][:1] == ["scan.pickle"]
    out = tmp_path / "converted"
    record = unpickle(pickled, out, run_sealed=run_sealed)
    assert record.rung in {"A", "B"}
    (pair,) = record.files
    assert pair.source == "pytorch_model.bin"
    assert pair.source_sha256 == hashlib.sha256((pickled / pair.source).read_bytes()).hexdigest()
    assert parse_safetensors(open_view(out / pair.file), pair.file).tensors
    assert not (out / "pytorch_model.bin").exists(), "the original does not travel"

    report = inspect_source(out)
    assert report.ready, report.refusals
    document = report.as_document()
    assert document["provenance"]["unpickled"] is True
    text = json.dumps(document)
    assert "the publisher never published the bytes that were converted here" in text


def test_pins_are_the_most_that_a_converted_pickle_can_have(pickled, tmp_path):
    out = tmp_path / "converted"
    unpickle(pickled, out, run_sealed=run_inline)
    pins = tmp_path / "pins"
    digests = inspect_source(out).digests
    pins.write_text("".join(f"{d.sha256}  {name}\n" for name, d in digests.items()))
    assert inspect_source(out, pins=pins).provenance["level"] == "L1"


def test_a_record_of_other_weights_is_refused(pickled, tmp_path):
    out = tmp_path / "converted"
    record = unpickle(pickled, out, run_sealed=run_inline)
    assert inspect_source(out).ready
    value = json.loads((out / RECORD).read_bytes())
    value["files"][0]["sha256"] = "0" * 64
    (out / RECORD).write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))
    assert [e.code for e in inspect_source(out).refusals] == ["source.shape"]
    for bad in (b"{}", b"[1]", b"x", json.dumps(value).encode()):
        assert code(parse_unpickled, bad) == "source.shape"
    assert record


class Runs:
    """Unpickling it runs a command of the attacker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def torch_zip(content: bytes) -> bytes:
    """A file in torch's own format, with any pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return made.getvalue()


def itself() -> bytes:
    """A dictionary that holds itself where the weights are looked for."""
    value: dict[str, object] = {}
    value["model"] = value
    return torch_zip(pickle.dumps(value, protocol=2))


ATTACKS = {
    "a bare pickle that runs a command": lambda mark: pickle.dumps(Runs(mark)),
    "the same in torch's zip": lambda mark: torch_zip(pickle.dumps(Runs(mark), protocol=2)),
    "weights beside a command": lambda mark: torch_zip(
        pickle.dumps({"w": [1.0], "x": Runs(mark)}, protocol=2)
    ),
    "no weights at all": lambda _: torch_zip(pickle.dumps({"a": 1}, protocol=2)),
    "a list": lambda _: torch_zip(pickle.dumps([1, 2], protocol=2)),
    "a dictionary that holds itself": lambda _: itself(),
    "noise": lambda _: b"\x80\x04" + bytes(range(256)),
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_malicious_pickle_is_refused_and_runs_nothing(pickled, tmp_path, name):
    assert unpickle(pickled, tmp_path / "good", run_sealed=run_inline)
    mark = tmp_path / "mark"
    (pickled / "pytorch_model.bin").write_bytes(ATTACKS[name](mark))
    with pytest.raises(RefusedError) as caught:
        unpickle(pickled, tmp_path / "x", run_sealed=run_inline)
    assert caught.value.code == "scan.pickle"
    said = f"{caught.value.message} {caught.value.hint}"
    assert not any(word in said for word in ("weights_only", "Re-running", "safe_globals"))
    assert not mark.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "published"]


def test_what_gets_past_the_loader_is_held_by_the_seal(pickled, tmp_path):
    """A loader that runs everything, in the same seal: it can reach neither files nor network."""
    mark = tmp_path / "mark"
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(mark)))
    careless = tmp_path / "careless.py"
    careless.write_text(
        "import pickle, socket, sys, pathlib\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    pickle.loads(path.read_bytes())\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', 9), timeout=1)\n"
        "except OSError as error:\n"
        "    pathlib.Path(sys.argv[2], 'net').write_text(type(error).__name__)\n"
    )

    def run(job):
        assert job.argv[3].endswith("unpickle_main.py")
        argv = (*job.argv[:3], str(careless), *job.argv[4:])
        from dataclasses import replace

        return run_sealed(replace(job, argv=argv, read_only=(*job.read_only, careless)))

    assert code(unpickle, pickled, tmp_path / "x", run_sealed=run) in {
        "convert.failed",
        "convert.output",
        "enclave.output",
    }
    assert not mark.exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("left", ["extra", "missing", "bad", "other name"])
def test_what_the_program_leaves_is_not_believed(pickled, tmp_path, left):
    def run(job):
        out = job.out
        names = {"pytorch_model.bin": "model.safetensors"}
        if left == "other name":
            names = {"pytorch_model.bin": "../../x.safetensors"}
        if left != "missing":
            good = tiny_llama.write_snapshot(tmp_path / "other") / "model.safetensors"
            content = b"no tensors" if left == "bad" else good.read_bytes()
            (out / "model.safetensors").write_bytes(content)
        if left == "extra":
            (out / "run.py").write_text("print()")
        (out / "unpickle.json").write_text(json.dumps({"names": names, "versions": {}}))
        return Result(0)

    found = code(unpickle, pickled, tmp_path / "x", run_sealed=run)
    expected = {"bad": {"scan.safetensors"}, "missing": {"host.io"}}
    assert found in expected.get(left, {"convert.output"})
    assert not (tmp_path / "x").exists()


def test_shards_and_their_index_follow(pickled, tmp_path):
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    (pickled / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, pickled / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1.5}, "weight_map": weight_map}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    out = tmp_path / "converted"
    unpickle(pickled, out, run_sealed=run_inline)
    report = inspect_source(out)
    assert report.ready, report.refusals
    assert set(report.tensors) == set(tensors)


def test_what_cannot_be_begun_is_refused(pickled, tmp_path):
    assert code(unpickle, pickled, tmp_path / "x", run_sealed=None) == "build.seal"
    (tmp_path / "there").mkdir()
    assert code(unpickle, pickled, tmp_path / "there", run_sealed=run_inline) == "build.output"
    plain = tiny_llama.write_snapshot(tmp_path / "plain")
    assert code(unpickle, plain, tmp_path / "x", run_sealed=run_inline) == "source.incomplete"
    (pickled / "run.py").write_text("print()")
    with pytest.raises(RefusedError) as caught:
        unpickle(pickled, tmp_path / "x", run_sealed=run_inline)
    assert caught.value.code == "scan.role", "any other refusal stands"
