"""A graph that is not the model: caught where it is made, and once more where it shall run."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import bundles
import coded_faults
import numpy as np
import onnx
import pytest
import tiny_llama
from enclave_harness import needs_namespaces
from onnx import numpy_helper
from random_models import save_random, write_fast
from staging_runs import FACTS, build_tiny, run_inline

from airgap.enclave import launch
from airgap.install import install
from airgap.install.parity import in_order, judge, prover
from bundle.manifest import Parity as Claim
from bundle.staging.parity import MAX_PART, TOLERANCE
from bundle.staging.sign import read_draft, sign
from bundle.trust import save_trust
from bundle.vectors import Vector, Vectors, canonical_vectors, parse_vectors
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

NOW = bundles.NOW + timedelta(hours=1)

# -- where it is made -----------------------------------------------------------------------------

WORDS = len(tiny_llama.vocabulary())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a model whose vocabulary is as large as its feed-forward, with square projections."""
    folder = tmp_path_factory.mktemp("faults") / "model"
    save_random(
        folder,
        "llama-bias",
        num_hidden_layers=1,
        vocab_size=WORDS,
        intermediate_size=WORDS,
        max_position_embeddings=1024,
        bos_token_id=2,
        eos_token_id=3,
        attention_bias=False,
        mlp_bias=False,
    )
    tiny_llama.write_json(folder / "tokenizer.json", tiny_llama.tokenizer())
    write_fast(folder)
    return folder


def transpose(graph):
    """Multiply by a square matrix the wrong way round."""
    node = next(n for n in graph.node if any("0.self_attn.q_proj.weight" in i for i in n.input))
    after = next(n for n in graph.node if n.op_type == "Gemm" and n.input[1] in node.output)
    next(a for a in after.attribute if a.name == "transB").i = 0


def wrong_base(graph):
    """Turn queries and keys by another base."""
    table = next(one for one in graph.initializer if one.name == "inv_freq")
    values = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(values**1.02, "inv_freq"))


def swap_heads(graph):
    """Exchange the keys of the two key-value heads."""
    node = next(n for n in graph.node if n.op_type == "GroupQueryAttention")
    order = numpy_helper.from_array(np.array([*range(16, 32), *range(16)]), "order")
    graph.initializer.append(order)
    moved = onnx.helper.make_node("Gather", [node.input[1], "order"], ["moved"], axis=2)
    place = list(graph.node).index(node)
    graph.node.insert(place, moved)
    node.input[1] = "moved"


def wrong_head(graph):
    """Take another matrix of the same shape for the head, as one does who finds it by its size."""
    renamed = {"lm_head.weight": "model.layers.0.mlp.gate_proj.weight"}
    for node in graph.node:
        for place, name in enumerate(node.input):
            for old, new in renamed.items():
                node.input[place] = name.replace(old, new) if name == f"{old}.cast" else name


def branch(graph, name):
    (choice,) = (node for node in graph.node if node.op_type == "If")
    return next(part.g for part in choice.attribute if part.name == f"{name}_branch")


def first(graph, kind):
    return next(node for node in graph.node if node.op_type == kind)


def invert_mask(graph):
    node = first(branch(graph, "then"), "Where")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def always_free(graph):
    choice = first(graph, "If")
    for part in choice.attribute:
        if part.name == "then_branch":
            part.g.CopyFrom(branch(graph, "else"))
            for node in part.g.node:  # names within a graph are once only
                for place, name in enumerate(node.output):
                    new = f"other.{name}"
                    for value in part.g.output:
                        value.name = new if value.name == name else value.name
                    node.output[place] = new


def reward(graph):
    node = first(graph, "Where")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def sum_of_all(graph):
    part = branch(graph, "then")
    legal = [node for node in part.node if node.op_type == "Where"][1].output[0]
    raw = [node for node in part.node if node.op_type == "Where"][1].input[1]
    for node in part.node:
        node.input[:] = [raw if name == legal else name for name in node.input]


def punished_target(graph):
    """Take the target's logit after the penalty."""
    told = next(node for node in graph.node if "target_raw" in node.output)
    wanted = next(node for node in graph.node if told.input[0] in node.output)
    wanted.input[0] = first(graph, "ScatterElements").output[0]
    moved = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (wanted, told)]
    for node in (wanted, told):
        graph.node.remove(node)
    graph.node.extend(moved)


FAULTS = {
    "a transposed matrix": transpose,
    "another rotary base": wrong_base,
    "swapped heads": swap_heads,
    "vocabulary as large as another width": wrong_head,
    "a mask upside down": invert_mask,
    "a mask that is not read": always_free,
    "a penalty that rewards": reward,
    "a sum over all for that of the legal": sum_of_all,
    "the target's logit after the penalty": punished_target,
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_seeded_fault_stops_the_whole_build(snapshot, tmp_path, change):
    out = tmp_path / "x.agb"
    with pytest.raises(RefusedError) as caught:
        build_tiny(snapshot, out, run_sealed=perturbing(change, "before"), reference=False)
    assert caught.value.code == "parity.failed"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault",
    [
        name if name == "swapped heads" else pytest.param(name, marks=pytest.mark.soak)
        for name in FAULTS
    ],
)
def test_nothing_but_parity_stops_a_seeded_fault(source, snapshot, tmp_path, fault):
    """The same fault after the proof: the build ends well, and the bundle carries it."""
    runs = perturbing(FAULTS[fault], "after")
    built = build_tiny(snapshot, tmp_path / "x.agb", run_sealed=runs, reference=False)
    assert built.parity.full < Decimal("0.0001")
    untouched = (source / "fast.onnx").read_bytes()
    assert built.manifest.find("payload/tiny/fast.onnx").sha256 != Digest.of(untouched).hex
    (weights,) = built.manifest.published_weights("tiny")
    assert weights.sha256 == Digest.of((snapshot / "model.safetensors").read_bytes()).hex


@pytest.fixture(scope="module")
def snapshot(source, tmp_path_factory):
    """Return the model as a publisher would release it."""
    folder = tmp_path_factory.mktemp("snapshot") / "model"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".onnx":
            (folder / path.name).hardlink_to(path)
    (folder / "README.md").write_text(tiny_llama.CARD)
    return folder


def perturbing(change, when):
    """Return a runner whose parity run sees, or is followed by, a changed graph."""

    def run(job):
        path = job.read_only[1] / "fast.onnx" if len(job.read_only) > 1 else None
        proof = any(Path(word).name == "parity_main.py" for word in job.argv)
        done = None if proof and when == "before" else run_inline(job)
        if proof:
            model = onnx.load(path, load_external_data=False)
            change(model.graph)
            path.write_bytes(model.SerializeToString(deterministic=True))
        return done or run_inline(job)

    return run


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    return tiny_llama.write_snapshot(tmp_path_factory.mktemp("coded") / "tiny")


@dataclass
class Seeded:
    """A runner whose parity run finds the files of a precision changed; keeps its figures."""

    change: object
    name: str
    figures: dict | None = None

    def __call__(self, job):
        proof = any(Path(word).name == "parity_main.py" for word in job.argv)
        if proof:
            self.change(job.read_only[1] / self.name)
        done = run_inline(job)
        if proof:
            found = json.loads((job.out / "parity.json").read_bytes())["precisions"]
            (self.figures,) = found.values()
        return done

    @property
    def rounding(self):
        return max(Decimal(row["codes"]["part"]) for row in self.figures["rows"])

    def exact(self, name):
        return Decimal(self.figures["codes"][name])


def build_coded(snapshot, out, precision, run):
    return build_tiny(
        snapshot, out, run_sealed=run, reference=False, precisions=("fp32", precision)
    )


CODED = {**coded_faults.IN_GRAPH, **coded_faults.FAR}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_untouched_codes_pass_with_room(two_layers, tmp_path, precision):
    run = Seeded(lambda _: None, "")
    built = build_coded(two_layers, tmp_path / "x.agb", precision, run)
    (found,) = built.parity.measured
    assert found.codes.exact < TOLERANCE / 20
    assert found.codes.step <= Decimal("0.5")
    assert found.codes.scale == 0
    assert found.codes.part < MAX_PART / 5


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("fault", CODED.values(), ids=CODED)
def test_a_fine_fault_in_a_graph_of_codes_stops_the_whole_build(
    two_layers, tmp_path, fault, precision
):
    run = Seeded(lambda path: coded_faults.seed_graph(path, fault), f"fast-{precision}.onnx")
    with pytest.raises(RefusedError) as caught:
        build_coded(two_layers, tmp_path / "x.agb", precision, run)
    assert caught.value.code == "parity.failed"
    assert "without rounded activations" in caught.value.message
    assert run.rounding <= MAX_PART  # which alone would let it pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("fault", coded_faults.IN_FILE.values(), ids=coded_faults.IN_FILE)
def test_a_fine_fault_in_the_file_of_codes_stops_the_whole_build(
    two_layers, tmp_path, fault, precision
):
    run = Seeded(lambda path: coded_faults.seed_file(path, *fault), f"{precision}.safetensors")
    with pytest.raises(RefusedError) as caught:
        build_coded(two_layers, tmp_path / "x.agb", precision, run)
    assert caught.value.code == "parity.failed"
    assert "furthest" in caught.value.message
    # The graph answers like its codes, whatever they are: only the weights tell.
    assert max(run.exact("full"), run.exact("past")) <= TOLERANCE
    assert run.rounding <= MAX_PART
    assert not any(tmp_path.iterdir())


# -- where it shall run ---------------------------------------------------------------------------


@dataclass
class Permit:
    permitted: bool = True
    canonical: bytes = b"{}"

    @property
    def digest(self):
        return Digest.of(self.canonical)


def sealed_bundle(folder, run_sealed):
    folder.mkdir()
    snapshot, out = tiny_llama.write_snapshot(folder / "tiny"), folder / "tiny.agb"
    build_tiny(snapshot, out, run_sealed=run_sealed, reference=False)
    sealed_trust(folder)
    return out


def sealed_trust(folder):
    """Let two approvers sign the draft in `folder`, and give its lab the root of trust."""
    trust = bundles.make_trust()
    for name in ("alice", "bob"):
        draft = read_draft(folder / "tiny.agb")
        sign(draft, trust, bundles.signer(name), confirmation=FACTS.model_id, now=NOW)
    save_trust(trust, folder / "lab" / "trust")


def take_in(folder, prove):
    events = []
    try:
        done = install(
            folder / "tiny.agb",
            root=folder / "lab",
            now=NOW,
            gate=lambda *_: Permit(),
            audit=events.append,
            prove=prove,
        )
    except (RefusedError, FaultError) as error:
        return error, events
    return done, events


def seal(spec):
    return contextlib.closing(launch(spec))


@needs_namespaces
def test_a_bundle_whose_graph_answers_otherwise_here_is_not_made_active(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    sealed_bundle(good, run_inline)
    sealed_bundle(bad, perturbing(wrong_base, "after"))
    prove = prover(seal, state=tmp_path / "enclave")

    done, events = take_in(good, prove)
    (proof,) = done.proofs
    assert proof.run == proof.vectors >= 20
    assert proof.delta < Decimal("0.001")
    assert events[-1].result == "complete"
    assert events[-1].proofs == done.proofs
    assert (good / "lab" / "store" / "current").exists()

    error, events = take_in(bad, prove)
    assert error.code == "parity.failed"
    assert "fp32" in error.message
    assert (events[-1].result, events[-1].code) == ("refused", "parity.failed")
    assert not (bad / "lab" / "store" / "current").exists()
    assert not any((bad / "lab" / "store" / "installed").iterdir())


CLAIM = Claim(
    model="m", precision="fp32", provider="CPUExecutionProvider", tolerance="0.001", vectors="v"
)
VECTOR = Vector(
    kind="molecule",
    prompt="<MoleculeS>",
    source="a test",
    prompt_ids=(1, 2),
    greedy_ids=(5, 6, 7),
    top_logits=((5, "2.000000e+00"), (9, "1.000000e+00")),
)
VECTORS = Vectors(
    model="m",
    precision="fp32",
    provider="CPUExecutionProvider",
    tolerance="0.001",
    steps=3,
    credits=(),
    vectors=(VECTOR,),
)


def answer(**changes):
    best = [["2.0", "1.0", "2.0"], ["3.0", "1.0", "3.0"], ["1.0", "0.9995", "1.0"]]
    return {"top": ["2.0", "1.0"], "best": best, "decoded": [5, 6, 7], **changes}


def judged(found):
    return judge(CLAIM, VECTORS, [VECTOR], [found])


WRONG = {
    "a logit beyond the tolerance": ({"top": ["2.002", "1.0"]}, "parity.failed"),
    "a logit that is no number": ({"top": ["nan", "1.0"]}, "parity.failed"),
    "another best token": (
        {"best": [["2.0", "1.0", "1.0"], *answer()["best"][1:]]},
        "parity.failed",
    ),
    "best is no number": ({"best": [["nan", "1", "1"], *answer()["best"][1:]]}, "parity.failed"),
    "another token with the cache": ({"decoded": [5, 8]}, "parity.failed"),
    "logits missing": ({"top": ["2.0"]}, "parity.device"),
    "steps missing": ({"best": answer()["best"][:2]}, "parity.device"),
    "no answer": ({"best": None}, "parity.device"),
    "words": ({"top": ["two", "1.0"]}, "parity.device"),
}


@pytest.mark.parametrize(("change", "code"), WRONG.values(), ids=WRONG)
def test_the_judge_believes_no_answer(change, code):
    assert judged(answer()).tokens == 3
    with pytest.raises((RefusedError, FaultError)) as caught:
        judged(answer(**change))
    assert caught.value.code == code


def test_behind_a_choice_that_was_near_texts_may_part():
    assert judged(answer(decoded=[5, 6, 8]))


def test_one_vector_of_each_kind_comes_first():
    long = VECTOR.model_copy(update={"prompt_ids": (1, 2, 3)})
    other = long.model_copy(update={"kind": "material"})
    assert in_order([long, VECTOR, other]) == (VECTOR, other, long)


class Worker:
    """Stands for a sealed worker that answers, or raises."""

    def __init__(self, reply):
        self.reply = reply

    def request(self, _payload, _timeout):
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def ask(tmp_path, reply, **changes):
    claim = CLAIM.model_copy(update=changes)
    vectors = VECTORS.model_copy(update=changes)
    (tmp_path / "v").write_bytes(canonical_vectors(vectors))

    @dataclass
    class Listing:
        parity: tuple = (claim,)
        digest: str = "sha256:" + "0" * 64

    return prover(lambda _: contextlib.nullcontext(Worker(reply)))(tmp_path, Listing())


def test_a_model_that_does_not_run_here_is_a_fault_and_one_for_another_device_is_told(tmp_path):
    (proof,) = ask(tmp_path, json.dumps({"answers": [answer()]}).encode())
    assert proof.text.isascii()
    for reply in (RefusedError("model.graph", "no kernel"), b"[]", b"{", b'{"answers":[]}'):
        with pytest.raises(FaultError) as caught:
            ask(tmp_path, reply)
        assert caught.value.code == "parity.device"
    with pytest.raises(RefusedError) as refused:
        ask(tmp_path, RefusedError("enclave.rung", "no rung"))
    assert refused.value.code == "enclave.rung"
    (proof,) = ask(tmp_path, b"", provider="CUDAExecutionProvider")
    assert "not run" in proof.text
    assert replace(proof, run=1).text != proof.text


def test_vectors_that_are_not_those_of_the_claim_are_refused():
    raw = canonical_vectors(VECTORS)
    assert parse_vectors(raw, CLAIM) == VECTORS
    for bad, claim in (
        (raw, CLAIM.model_copy(update={"tolerance": "0.5"})),
        (raw, CLAIM.model_copy(update={"precision": "int8"})),
        (raw.replace(b'"steps":3', b'"steps":0'), CLAIM),
        (raw + b" ", CLAIM),
        (b"{}", CLAIM),
    ):
        with pytest.raises(RefusedError) as caught:
            parse_vectors(bad, claim)
        assert caught.value.code == "manifest.vectors"
