"""The walk, the pins, the hub's records, licences, cards, shapes: what inspection stands on."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
import tiny_llama

from bundle.scan.safetensors import Tensor, parse_safetensors
from bundle.staging import source as walking
from bundle.staging.architecture import (
    expected_tensors,
    parse_architecture,
    require_tensors,
)
from bundle.staging.inspect import inspect_source
from bundle.staging.licences import card_licences, licence_text, parse_card
from bundle.staging.provenance import parse_pins
from bundle.staging.source import hash_file, open_file, walk
from policy.errors import FaultError, RefusedError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def snapshot(tmp_path):
    return tiny_llama.write_snapshot(tmp_path / "model")


def refused(call, *args, **kwargs) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call(*args, **kwargs)
    return caught.value


def codes(folder, **options) -> list[str]:
    return [error.code for error in inspect_source(folder, **options).refusals]


# -- the walk ---------------------------------------------------------------------------------


def test_every_file_is_listed_in_order(snapshot):
    (snapshot / "figures").mkdir()
    (snapshot / "figures" / "a.png").write_bytes(b"\x89PNG")
    paths = [file.path for file in walk(snapshot)]
    assert paths == sorted(paths)
    assert "figures/a.png" in paths
    assert len(paths) == 8


def test_digests_are_those_of_sha256sum_and_git(snapshot):
    file = next(file for file in walk(snapshot) if file.path == "config.json")
    raw = file.place.read_bytes()
    seen = []
    digests = hash_file(file, seen.append)
    assert digests.sha256 == hashlib.sha256(raw).hexdigest()
    assert digests.git_blob == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()  # noqa: S324
    assert sum(seen) == len(raw)


def test_no_folder_no_report(tmp_path):
    assert refused(walk, tmp_path / "absent").code == "source.missing"
    assert refused(walk, tmp_path).code == "source.empty"
    (tmp_path / "file").write_bytes(b"\x7fELF")
    assert refused(walk, tmp_path / "file").code == "source.type"
    assert "a device" in refused(walk, Path("/dev/null")).message
    assert refused(walk, tmp_path / "file" / "x").code == "source.missing"


def pipe(place: Path) -> None:
    os.mkfifo(place)


def sock(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(place))


@pytest.mark.parametrize(("make", "kind"), [(pipe, "a pipe"), (sock, "a socket")])
def test_what_is_neither_file_nor_folder_is_refused(snapshot, make, kind, monkeypatch):
    monkeypatch.chdir(snapshot)
    make(Path("odd.txt"))
    error = refused(walk, snapshot)
    assert error.code == "source.type"
    assert kind in error.message


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "config.json", "../x", "../../blobs/xyz", "absent"]
)
def test_links_outside_the_hubs_cache_are_refused(snapshot, target):
    (snapshot / "link.md").symlink_to(target)
    error = refused(walk, snapshot)
    assert error.code == "source.link"
    assert "cp -rL" in error.hint


def test_a_link_to_a_folder_is_refused(snapshot):
    (snapshot / "more").symlink_to("/etc")
    assert refused(walk, snapshot).code == "source.link"


def test_a_git_history_is_refused(snapshot):
    (snapshot / ".git").mkdir()
    assert "history" in refused(walk, snapshot).message


@pytest.mark.parametrize("name", ["NUL.md", "a\u202eb.md", "a:b.md", "x .md ", "e\u0301.md"])
def test_names_that_another_host_reads_otherwise_are_refused(snapshot, name):
    (snapshot / name).write_text("x")
    assert refused(walk, snapshot).code == "source.name"


def test_a_name_that_is_not_utf8_is_refused(snapshot):
    with open(os.fsencode(snapshot) + b"/a\xff.md", "w"):  # noqa: PTH123 - a name of bytes
        pass
    error = refused(walk, snapshot)
    assert error.code == "source.name"
    assert "UTF-8" in error.message


def test_case_twins_are_refused(snapshot):
    (snapshot / "Config.json").write_text("{}")
    assert refused(walk, snapshot).code == "source.name"


def test_huge_snapshots_are_refused(snapshot, monkeypatch):
    deep = snapshot / "/".join("d" * 12)
    deep.mkdir(parents=True)
    assert refused(walk, snapshot).code == "source.huge"
    deep.rmdir()
    with (snapshot / "model.safetensors").open("r+b") as stream:
        stream.truncate(3 << 40)  # sparse: three tebibytes that nobody wrote
    assert refused(walk, snapshot).code == "source.huge"
    monkeypatch.setattr(walking, "MAX_FILES", 3)
    assert refused(walk, snapshot).code == "source.huge"


def test_a_file_that_changes_is_noticed(snapshot):
    file = next(file for file in walk(snapshot) if file.path == "config.json")
    os.close(open_file(file))
    file.place.write_text("{}")
    assert refused(open_file, file).code == "source.changed"

    file = next(file for file in walk(snapshot) if file.path == "tokenizer.json")

    def meddle(_count: int) -> None:
        os.utime(file.place, ns=(1, 1))

    assert refused(hash_file, file, meddle).code == "source.changed"


def test_a_file_that_vanishes_is_a_fault(snapshot):
    file = walk(snapshot)[0]
    file.place.unlink()
    with pytest.raises(FaultError) as caught:
        open_file(file)
    assert caught.value.code == "host.io"


# -- pins -------------------------------------------------------------------------------------


def pin(folder: Path, place: Path) -> Path:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    ]
    place.write_text("# approved\n\n" + "".join(lines))
    return place


def test_pins_raise_the_level(snapshot, tmp_path):
    assert inspect_source(snapshot).provenance["level"] == "L0"
    report = inspect_source(snapshot, pins=pin(snapshot, tmp_path / "pins"))
    assert report.ready
    assert report.provenance["level"] == "L1"
    assert report.provenance["evidence"][0]["status"] == "verified"
    assert "does not say who made them" in report.provenance["sentence"]


def test_one_changed_byte_is_named(snapshot, tmp_path):
    pins = pin(snapshot, tmp_path / "pins")
    text = (snapshot / "README.md").read_text()
    (snapshot / "README.md").write_text(text + " ")
    report = inspect_source(snapshot, pins=pins)
    assert [error.code for error in report.refusals] == ["pin.mismatch"]
    assert "README.md" in report.refusals[0].message
    assert report.provenance["level"] == "L0"


def test_pins_are_a_closed_world(snapshot, tmp_path):
    pins = pin(snapshot, tmp_path / "pins")
    (snapshot / "extra.md").write_text("x")
    assert codes(snapshot, pins=pins) == ["pin.mismatch"]
    (snapshot / "extra.md").unlink()
    assert codes(snapshot, pins=pins) == []
    (snapshot / "README.md").unlink()
    assert codes(snapshot, pins=pins) == ["pin.mismatch"]


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "abc  file\n", f"{'A' * 64}  f\n", f"{'a' * 64} f\n", f"{'a' * 64}  f\n" * 2,  # noqa: E501 - a table
     f"\\{'a' * 64}  f\\n\n", "\xff"],
)  # fmt: skip
def test_malformed_pin_files(tmp_path, text):
    place = tmp_path / "pins"
    place.write_bytes(text.encode("latin-1"))
    error = refused(parse_pins, place)
    assert error.code == "pin.malformed"
    assert "sha256sum" in error.hint


def test_both_forms_of_sha256sum_are_read(tmp_path):
    (tmp_path / "pins").write_text(f"{'a' * 64} *./one\n{'b' * 64}  two words\n")
    assert parse_pins(tmp_path / "pins") == {"one": "a" * 64, "two words": "b" * 64}


# -- the hub's records ------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blob(raw: bytes, *, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(raw).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()  # noqa: S324


def record(folder: Path, name: str, commit: str = COMMIT, etag: str | None = None) -> Path:
    place = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    place.parent.mkdir(parents=True, exist_ok=True)
    raw = (folder / name).read_bytes()
    etag = etag or blob(raw, lfs=name.endswith(".safetensors"))
    place.write_text(f'{commit}\n"{etag}"\n1764000000.5\n')
    return place


def test_records_of_a_download_are_compared_with_the_bytes(snapshot):
    for path in list(snapshot.iterdir()):
        record(snapshot, path.name)
    report = inspect_source(snapshot)
    assert report.ready
    assert (report.hub.commit, report.hub.lfs, report.hub.git) == (COMMIT, 1, 6)
    assert report.provenance["level"] == "L0"  # the client wrote them and nobody signed them
    assert {item["status"] for item in report.provenance["evidence"]} == {"verified", "declared"}
    assert report.as_document()["revision"] == COMMIT


def test_files_without_a_record_are_named(snapshot):
    record(snapshot, "config.json")
    assert "README.md" in str(inspect_source(snapshot).provenance)


@pytest.mark.parametrize("wrong", ["etag", "commit", "words", "digest"])
def test_records_that_tell_of_other_bytes_are_refused(snapshot, wrong):
    record(snapshot, "config.json")
    place = record(snapshot, "model.safetensors")
    assert codes(snapshot) == []
    lines = place.read_text().split("\n")
    place.write_text(
        {
            "etag": f"{COMMIT}\n{'0' * 64}\n1\n",
            "commit": f"{'f' * 40}\n{lines[1]}\n1\n",
            "words": "hello\nworld\n",
            "digest": f"{COMMIT}\nabc\n",
        }[wrong]
    )
    assert codes(snapshot) == ["pin.mismatch"]


def test_a_record_of_a_file_that_was_taken_out_is_ignored(snapshot):
    (snapshot / "x.md").write_text("x")
    record(snapshot, "x.md")
    (snapshot / "x.md").unlink()
    assert codes(snapshot) == []


@pytest.fixture
def cache(snapshot, tmp_path):
    """The same snapshot, inside the hub's own cache: links to blobs that bear their digest."""
    base = tmp_path / "models--Org--tiny"
    (base / "blobs").mkdir(parents=True)
    folder = base / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for path in snapshot.iterdir():
        raw = path.read_bytes()
        name = blob(raw, lfs=path.suffix == ".safetensors")
        (base / "blobs" / name).write_bytes(raw)
        (folder / path.name).symlink_to(f"../../blobs/{name}")
    return folder


def test_links_of_the_hubs_cache_are_followed(cache):
    report = inspect_source(cache)
    assert report.ready
    assert report.name == report.repository == "Org/tiny"
    assert (report.hub.commit, report.hub.lfs, report.hub.git) == (COMMIT, 1, 6)


def test_a_blob_with_other_bytes_is_refused(cache):
    blob_place = (cache / "README.md").resolve()
    blob_place.write_text(blob_place.read_text() + " ")
    assert codes(cache) == ["pin.mismatch"]


@pytest.mark.parametrize("depth", ["../blobs/", "../../../blobs/"])
def test_links_of_another_depth_are_refused(cache, depth):
    link = cache / "README.md"
    name = link.readlink().name
    link.unlink()
    link.symlink_to(depth + name)
    assert refused(walk, cache).code == "source.link"


def test_a_blob_that_is_a_link_itself_is_refused(cache):
    place = (cache / "README.md").resolve()
    place.unlink()
    place.symlink_to("/etc/passwd")
    assert refused(walk, cache).code == "source.type"


def test_a_blob_that_is_gone_is_a_fault(cache):
    (cache / "README.md").resolve().unlink()
    with pytest.raises(FaultError):
        walk(cache)


# -- licences and cards -----------------------------------------------------------------------


def test_a_complete_licence_text_is_verified():
    text = (ROOT / "LICENSE").read_text()
    found = licence_text("LICENSE", text)
    assert (found.spdx, found.status) == ("Apache-2.0", "verified")
    assert (
        licence_text("LICENSE", text.replace("royalty-free", "royalty-bearing")).status
        == "declared"
    )


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("MIT License\n\nCopyright X", "MIT"),
        ("Creative Commons Attribution 4.0 International", "CC-BY-4.0"),
        ("Creative Commons Attribution-NonCommercial 4.0", "CC-BY-NC-4.0"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "LicenseRef-Llama-3.2"),
        ("Llama 3.2 Acceptable Use Policy", "LicenseRef-Llama-3.2-AUP"),
    ],
)
def test_licences_are_recognised_by_their_title(text, spdx):
    assert licence_text("LICENSE", text).spdx == spdx
    assert licence_text("LICENSE", "all rights reserved") is None


CARD = "---\nlicense: {}\n---\n# words\n"


@pytest.mark.parametrize(
    ("value", "spdx"),
    [
        ("apache-2.0", ["Apache-2.0"]),
        ("cc-by-4.0", ["CC-BY-4.0"]),
        ("[mit, llama3.2]", ["MIT", "LicenseRef-Llama-3.2"]),
        ("other\nlicense_name: qwen-research", ["qwen-research"]),
        ("other", ["LicenseRef-unknown"]),
        ("'my own words'", ["LicenseRef-unknown"]),
    ],
)
def test_licences_of_a_card(value, spdx):
    found = card_licences(parse_card(CARD.format(value)), "README.md", "0" * 64)
    assert [item.spdx for item in found] == spdx
    assert {item.status for item in found} == {"declared"}


@pytest.mark.parametrize(
    "front",
    ["a: &x 1\nb: *x", "a: !!python/object:os.system 1", "a: 1\na: 2", "- a", "a: [", "'1': {1: 2, 1: 3}",  # noqa: E501 - a table
     "a: " + "[" * 40 + "]" * 40, "a: !!binary aGk=", "1: a", "x: " + "y" * 70_000],
)  # fmt: skip
def test_front_matter_is_strict(front):
    assert refused(parse_card, f"---\n{front}\n---\n").code == "source.card"


def test_a_card_may_have_no_front_matter():
    assert parse_card("# words") == parse_card("") == parse_card("---\n\n---\n") == {}
    assert refused(parse_card, "---\nlicense: mit\n").code == "source.card"


def test_licences_and_conflicts_stand_in_the_report(snapshot):
    (snapshot / "LICENSE").write_text("Creative Commons Attribution 4.0 International")
    (snapshot / "COPYING").write_text("all mine")
    report = inspect_source(snapshot)
    assert {item.spdx for item in report.licences} == {
        "Apache-2.0",
        "CC-BY-4.0",
        "LicenseRef-unknown",
    }
    assert any("3 licences" in finding.text for finding in report.findings)


def test_a_card_without_a_licence_is_a_finding(snapshot):
    (snapshot / "README.md").write_text("# words")
    assert any("no licence" in finding.text for finding in inspect_source(snapshot).findings)


def test_a_bad_card_is_refused_with_the_rest_of_the_report(snapshot):
    (snapshot / "README.md").write_text("---\na: 1\na: 2\n---\n")
    assert codes(snapshot) == ["source.card"]


# -- architecture -----------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, Tensor]:
    data = memoryview((folder / "model.safetensors").read_bytes())
    return {tensor.name: tensor for tensor in parse_safetensors(data).tensors}


def test_tensors_follow_from_the_configuration(snapshot):
    shape = parse_architecture(tiny_llama.config())
    require_tensors(shape, tensors_of(snapshot))
    assert expected_tensors(shape) == tiny_llama.shapes()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "is not part of it"),
        ({"num_key_value_heads": 4}, "has shape"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"attention_bias": True}, "bias is missing"),
        ({"mlp_bias": True}, "bias is missing"),
        ({"vocab_size": 500}, "has shape"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, word):
    folder = tiny_llama.write_snapshot(tmp_path / "model", **change)
    report = inspect_source(folder)
    assert [error.code for error in report.refusals] == ["source.shape"]
    assert word in report.refusals[0].message


def test_a_tied_copy_and_old_buffers_are_allowed(snapshot):
    found = tensors_of(snapshot)
    rows = found["model.embed_tokens.weight"]
    shape = parse_architecture(tiny_llama.config())
    extra = {
        "lm_head.weight": Tensor("lm_head.weight", "F32", rows.shape, 0, 0),
        "model.layers.0.self_attn.rotary_emb.inv_freq": Tensor("x", "F32", (4,), 0, 0),
    }
    require_tensors(shape, {**found, **extra})
    wrong = {"lm_head.weight": Tensor("lm_head.weight", "F32", (1,), 0, 0)}
    assert refused(require_tensors, shape, {**found, **wrong}).code == "source.shape"
    ints = {name: Tensor(name, "I8", t.shape, 0, 0) for name, t in found.items()}
    assert "type I8" in refused(require_tensors, shape, ints).message


def test_other_families_have_their_own_tensors():
    base = tiny_llama.config()
    qwen2 = expected_tensors(
        parse_architecture(
            {
                **base,
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "attention_bias": None,
            }
        )
    )
    assert "model.layers.0.self_attn.q_proj.weight" in qwen2
    mixtral = expected_tensors(
        parse_architecture(
            {**base, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        )
    )
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in mixtral
    assert "model.layers.0.mlp.up_proj.weight" not in mixtral
    qwen3 = expected_tensors(
        parse_architecture({**base, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    assert qwen3["model.layers.0.self_attn.q_norm.weight"] == (base["head_dim"],)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"num_hidden_layers": 0},
        {"hidden_size": "32"},
        {"vocab_size": True},
        {"num_attention_heads": 1 << 40},
        {"eos_token_id": [-1]},
        {"eos_token_id": "3"},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_architectures_that_are_not_converted(tmp_path, change):
    folder = tiny_llama.write_snapshot(tmp_path / "model", **change)
    report = inspect_source(folder)
    assert [error.code for error in report.refusals] == ["source.architecture"]


def test_end_tokens_of_both_files_count():
    shape = parse_architecture(tiny_llama.config(), {"eos_token_id": [3, 7]})
    assert shape.eos_ids == (3, 7)
    assert (
        refused(parse_architecture, tiny_llama.config(eos_token_id=None)).code
        == "source.architecture"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
        {"rope_scaling": "linear"},
        {"rope_theta": 0},
        {"rope_theta": True},
        {"rms_norm_eps": -1e-6},
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
        },
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 0,
        },
    ],
)
def test_kinds_of_attention_that_are_not_converted_are_refused(change):
    assert parse_architecture(tiny_llama.config())
    error = refused(parse_architecture, {**tiny_llama.config(), **change})
    assert error.code == "source.architecture"


def test_rope_is_read_in_both_spellings():
    base = tiny_llama.config()
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = parse_architecture({**base, "rope_theta": 5e5, "rope_scaling": scaling}).rope
    new = parse_architecture({**base, "rope_parameters": {**scaling, "rope_theta": 5e5}}).rope
    assert old == new
    assert old.frequencies(4)[0] == 0.5
