"""Models that must not be converted, each refused with its code before any work begins.

By the function, with a runner that must not be called, and by the command with the real one: it
leaves its code, one line of hint, no traceback and no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import tiny_llama
from lab_trees import make_staging, run
from staging_runs import build_tiny, run_inline

from airgap.demo import site_toml
from airgap.inference.vocabulary import _byte_level
from bundle.scan.safetensors import parse_safetensors
from policy.errors import RefusedError

WEIGHTS = "model.safetensors"


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        found = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def no_end(folder):
    config(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink()


def scaling(kind, **more):
    return config(rope_scaling={"rope_type": kind, "factor": 2.0, **more})


def cut(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-1000])


def put(name, value, place=5):
    """Write one float32 into a tensor."""

    def change(folder):
        raw = bytearray((folder / WEIGHTS).read_bytes())
        tensors = parse_safetensors(memoryview(bytes(raw))).tensors
        start = next(one.start for one in tensors if one.name == name) + 4 * place
        raw[start : start + 4] = struct.pack("<f", value)
        (folder / WEIGHTS).write_bytes(bytes(raw))

    return change


def without(name):
    def change(folder):
        shapes = {key: size for key, size in tiny_llama.shapes().items() if key != name}
        (folder / WEIGHTS).write_bytes(tiny_llama.safetensors(shapes))

    return change


def written(name, change):
    """Change the bytes of a file; None takes it away."""

    def apply(folder):
        path = folder / name
        raw = change(path.read_bytes())
        path.unlink()
        if raw is not None:
            path.write_bytes(raw)

    return apply


def padded(folder):
    """Give the model rows that the tokenizer has no word for, and its end token there."""
    config(vocab_size=100, eos_token_id=99)(folder)
    shapes = {**tiny_llama.shapes(), "model.embed_tokens.weight": (100, 32)}
    (folder / WEIGHTS).write_bytes(tiny_llama.safetensors(shapes))


def renamed(tag, other):
    """Give the id of a tag to another word."""

    def change(folder):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace(tag, other))

    return change


def tokenizer(alter):
    """Change the parts of `tokenizer.json`."""

    def change(folder):
        value = json.loads((folder / "tokenizer.json").read_text())
        alter(value)
        tiny_llama.write_json(folder / "tokenizer.json", value)

    return change


def in_bytes(*lost):
    """Spell texts in bytes, so that nothing is ever unknown, and leave out some tags."""

    def change(folder):
        control = ["<pad>", "[spare]", "<bos>", "<eos>"]
        special = [*control, *(tag for tag in tiny_llama.TAGS if tag not in lost)]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        value = {
            **tiny_llama.tokenizer(),
            "added_tokens": [
                {"id": number, "content": token, **flags, "special": True}
                for number, token in enumerate(special)
            ],
            "pre_tokenizer": {**step, "use_regex": True},
            "decoder": {**step, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {text: n for n, text in enumerate([*special, *_byte_level()])},
                "merges": [],
            },
        }
        tiny_llama.write_json(folder / "tokenizer.json", value)
        rows = len(control) + len(tiny_llama.TAGS) + 256
        config(vocab_size=rows, max_position_embeddings=1024)(folder)
        shapes = {**tiny_llama.shapes(), "model.embed_tokens.weight": (rows, 32)}
        (folder / WEIGHTS).write_bytes(tiny_llama.safetensors(shapes))

    return change


def not_special(value):
    next(t for t in value["added_tokens"] if t["content"] == "<MaterialE>")["special"] = False


def only_a_word(value):
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != "<Search>"]


def two_starts(value):
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }


def lost_shard(folder):
    index = {"weight_map": dict.fromkeys(tiny_llama.shapes(), "model-2.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def twice(folder):
    (folder / "more.safetensors").write_bytes((folder / WEIGHTS).read_bytes())


def pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


MIXTURE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 5,
}
HEAD = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "truncated weights": (cut, "scan.safetensors"),
    "a weight is NaN": (put(HEAD, float("nan")), "source.values"),
    "a weight is infinite": (put("model.norm.weight", float("-inf"), 0), "source.values"),
    "a missing tensor": (without(HEAD), "source.shape"),
    "another hidden size": (config(hidden_size=48), "source.shape"),
    "another feed-forward": (config(intermediate_size=64), "source.shape"),
    "more layers": (config(num_hidden_layers=3), "source.shape"),
    "another number of heads": (config(num_key_value_heads=4), "source.shape"),
    "another vocabulary": (config(vocab_size=1000), "source.shape"),
    "no tied head": (config(tie_word_embeddings=False), "source.shape"),
    "a family nobody knows": (config(model_type="mamba"), "source.architecture"),
    "another class": (config(architectures=["LlamaForTokens"]), "source.architecture"),
    "another activation": (config(hidden_act="gelu"), "source.architecture"),
    "quantised already": (config(quantization_config={"bits": 4}), "source.architecture"),
    "rope scaling yarn": (scaling("yarn"), "source.architecture"),
    "rope scaling dynamic": (scaling("dynamic"), "source.architecture"),
    "rope scaling longrope": (scaling("longrope", short_factor=[1.0]), "source.architecture"),
    "rope scaling without a factor": (
        config(rope_scaling={"rope_type": "linear"}),
        "source.architecture",
    ),
    "rope base of nought": (config(rope_theta=0), "source.architecture"),
    "no end token": (no_end, "source.architecture"),
    "no word for a task's stop tag": (renamed("<MoleculeE>", "<MoleculeX>"), "model.tags"),
    "no stop tag among bytes": (in_bytes("<MaterialE>"), "model.tags"),
    "a tag that closes what none opens": (in_bytes("<PocketS>"), "model.tags"),
    "no tag of a whole task": (renamed("<Material", "<Matter"), "parity.vectors"),
    "a stop tag that a text can write": (tokenizer(not_special), "model.tags"),
    "a tag that is a word": (tokenizer(only_a_word), "model.tags"),
    "a tag that ends texts": (config(eos_token_id=[3, 9]), "model.tags"),
    "an end token that is a letter": (config(eos_token_id=20), "source.shape"),
    "two start tokens": (tokenizer(two_starts), "source.shape"),
    "a context shorter than a proof": (config(max_position_embeddings=64), "parity.vectors"),
    "a context too short for a task": (config(max_position_embeddings=90), "parity.vectors"),
    "an end token that is nobody": (config(eos_token_id=9999), "source.shape"),
    "an end token without a word": (padded, "source.shape"),
    "a start token in words": (config(bos_token_id="<bos>"), "source.architecture"),
    "heads that cannot share": (config(num_key_value_heads=3), "source.architecture"),
    "a head of odd width": (config(head_dim=15), "source.architecture"),
    "a head of no width": (config(num_attention_heads=64, head_dim=None), "source.architecture"),
    "ten million layers": (config(num_hidden_layers=10_000_000), "source.architecture"),
    "a context without end": (config(max_position_embeddings=1 << 23), "source.architecture"),
    "more experts than there are": (config(**MIXTURE), "source.architecture"),
    "half of a head is turned": (config(partial_rotary_factor=0.5), "source.architecture"),
    "windows in some layers": (config(layer_types=["sliding_attention"]), "source.architecture"),
    "layer types that are none": (config(layer_types=2), "source.architecture"),
    "a width that is no number": (config(hidden_size="32"), "source.architecture"),
    "a width of 32.0": (config(hidden_size=32.0), "source.architecture"),
    "epsilon of nought": (config(rms_norm_eps=0), "source.architecture"),
    "code of its own": (config(auto_map={"AutoModel": "model.Net"}), "scan.config"),
    "a config cut short": (written("config.json", lambda raw: raw[:60]), "scan.config"),
    "a config that is a list": (written("config.json", lambda _: b"[]"), "scan.config"),
    "no config": (written("config.json", lambda _: None), "source.incomplete"),
    "no tokenizer": (written("tokenizer.json", lambda _: None), "source.incomplete"),
    "a tokenizer cut short": (written("tokenizer.json", lambda raw: raw[:500]), "scan.tokenizer"),
    "no weights": (written(WEIGHTS, lambda _: None), "source.incomplete"),
    "empty weights": (written(WEIGHTS, lambda _: b""), "scan.safetensors"),
    "weights cut in the header": (written(WEIGHTS, lambda raw: raw[:99]), "scan.safetensors"),
    "a shard that did not come": (lost_shard, "source.incomplete"),
    "every tensor twice": (twice, "source.shape"),
    "a pickle beside": (pickled, "scan.pickle"),
}


def never(job):
    raise AssertionError(f"work began: {job.argv}")


def build(folder, run_sealed):
    return build_tiny(folder, folder.with_suffix(".agb"), run_sealed=run_sealed, reference=False)


def test_the_untouched_model_builds(tmp_path):
    assert build(tiny_llama.write_snapshot(tmp_path / "tiny"), run_inline).path.exists()


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ((), []),
        (
            ("<MaterialS>", "<MaterialE>"),
            ["task material will be refused: there is no <MaterialS>"],
        ),
    ],
    ids=["all tags", "no materials"],
)
def test_a_model_in_bytes_may_lack_a_task_and_says_so(tmp_path, lost, told):
    folder = tiny_llama.write_snapshot(tmp_path / "tiny")
    in_bytes(*lost)(folder)
    built = build(folder, run_inline)
    findings = [one.text for one in built.report.findings if one.path == "tokenizer.json"]
    assert findings == told
    assert set(built.report.tags) == set(tiny_llama.TAGS) - set(lost)


@pytest.mark.parametrize(("change", "code"), BAD.values(), ids=BAD)
def test_a_bad_model_is_refused_before_work_begins(tmp_path, change, code):
    folder = tiny_llama.write_snapshot(tmp_path / "tiny")
    change(folder)
    with pytest.raises(RefusedError) as caught:
        build(folder, never)
    assert code == caught.value.code or code in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


FIRST = {code: name for name, (_, code) in reversed(BAD.items())}  # one of each code
COMMANDS = [
    pytest.param(*BAD[name], id=name, marks=() if name in FIRST.values() else pytest.mark.soak)
    for name in BAD
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = make_staging(tmp_path_factory.mktemp("root") / "staging")
    (folder / "site.toml").write_text(site_toml(os.getuid()))
    return folder


@pytest.mark.parametrize(("change", "code"), COMMANDS)
def test_the_command_refuses_a_bad_model_and_leaves_nothing(tmp_path, root, capsys, change, code):
    folder, pins = tiny_llama.write_snapshot(tmp_path / "tiny"), tmp_path / "pins"
    change(folder)
    files = sorted(folder.iterdir())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    pins.write_text("".join(lines))
    capsys.readouterr()
    status = run(
        *("build", folder, "-o", tmp_path / "x.agb", "--name", "logos-ref-tiny", "--version", "1"),
        *("--pin", pins, "--supplier", "airgap project", "--jurisdiction", "none"),
        *("--modality", "molecule", "--key", root / "keys" / "builder.pem"),
        *("--root", root, "--no-reference", "--json"),
    )
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert status == 1
    assert code == told["code"] or code in told["error"], told
    assert told["hint"]
    assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "pins"}
