"""graphs.json inside the seal: read back whole, or refused."""

from __future__ import annotations

import json

import pytest
from inference_models import model_folder

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import parse_graphs
from bundle.canonical import canonical_json
from bundle.graphs import parse_graphs as parse_signed


def document():
    return json.loads((model_folder() / "graphs.json").read_text())


def parse(value):
    return parse_graphs(json.dumps(value).encode())


def test_the_facts_are_read():
    facts = parse(document())
    assert (facts.model, facts.layers, facts.eos_ids) == ("tiny-random-llama", 2, (3,))
    assert facts.past_inputs[:2] == ("past_key_values.0.key", "past_key_values.0.value")
    assert facts.present_outputs[-1] == "present.1.value"
    assert facts.graph("fp32").name == "reference"
    assert list(facts.tags.values()) == sorted(facts.tags.values())


def test_the_worker_and_the_verifier_read_the_same_file():
    raw = canonical_json(document())
    ours, signed = parse_graphs(raw), parse_signed(raw)
    assert ours.tags == signed.tags
    assert ours.graphs[0].sha256 == signed.graphs[0].sha256


def test_a_precision_that_is_not_there_is_refused():
    with pytest.raises(ProgramError) as caught:
        parse(document()).graph("int4")
    assert caught.value.code == "model.precision"


def graph(**change):
    def apply(value):
        value["graphs"][0] |= change

    return apply


def put(**change):
    return lambda value: value.update(change)


def drop(name):
    return lambda value: value.pop(name)


BROKEN = {
    "unknown field": put(note="x"),
    "unknown field of a graph": graph(note="x"),
    "missing field": drop("unk_id"),
    "other format": put(format="airgap-graphs/2"),
    "no end token": put(eos_ids=[]),
    "end token outside": put(eos_ids=[10_000]),
    "tag outside": put(tags={"<A>": 10_000}),
    "two tags of one id": put(tags={"<A>": 4, "<B>": 4}),
    "tag that is the end token": put(tags={"<A>": 3}),
    "tag id that is no number": put(tags={"<A>": "4"}),
    "tag id that is a boolean": put(tags={"<A>": True}),
    "tags as a list": put(tags=["<A>"]),
    "unknown token ends": put(unk_id=3),
    "no graph": put(graphs=[]),
    "other layout": graph(kv_layout="BSHD"),
    "unknown interface": graph(interface="other"),
    "interface of another graph": graph(interface="shared"),
    "path out of the folder": graph(path="../model.onnx"),
    "path of a hidden file": graph(path=".model.onnx"),
    "digest that is none": graph(sha256="0" * 63),
    "no position input": graph(inputs=["input_ids", "attention_mask"]),
    "an output more": lambda value: value["graphs"][0]["outputs"].append("hidden"),
    "a layer more": put(layers=3),
    "external without a digest": graph(external=[{"path": "model.onnx_data"}]),
    "text for a flag": put(scientific_use="no"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_understood_is_refused(change):
    value = document()
    parse(value)
    change(value)
    with pytest.raises(ProgramError) as caught:
        parse(value)
    assert caught.value.code == "model.facts"
