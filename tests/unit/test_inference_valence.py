"""The filter `valence` and the authors' perplexity: what they let through, count and refuse."""

import functools
import math
from dataclasses import replace

import hypothesis.strategies as st
import inference_models as models
import numpy as np
import partialsmiles
import pytest
from hypothesis import given

from airgap.enclave.channel import ProgramError
from airgap.inference.authors import authors_ids, perplexity
from airgap.inference.constrain import Grammars
from airgap.inference.decoder import Decoder
from airgap.inference.engine import Engine
from airgap.inference.fast import Head, Slots
from airgap.inference.model import load_model
from airgap.inference.program import create
from airgap.inference.protocol import (
    Generate,
    Grammar,
    Sample,
    parse_event,
    parse_request,
    segments_of,
)
from airgap.inference.valence import Valence, Writing, open_text

BUDGET = 64 << 20
MOLECULE = Grammar("structure", "molecule", valence=True)


@functools.cache
def fast():
    return load_model(models.fast_folder(), precision="fp32", demand="cpu", threads=1)


@functools.cache
def grammars():
    return Grammars(fast().vocabulary, fast().facts, Valence())


def ask(prompt="<MoleculeS>", grammar=MOLECULE, **change):
    settings = {
        "n": 8,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "seed": 1,
        "stop": ("<MoleculeE>",),
    }
    return Generate(prompt=segments_of(prompt), grammar=grammar, **{**settings, **change})


def answers(request):
    found = {}

    def emit(event):
        if isinstance(event, Sample):
            found[event.index] = event

    engine = Engine(fast(), budget=BUDGET, most_rows=8)
    engine.generate(request, grammars().compile(request.grammar, request.prompt), emit)
    return [found[index] for index in range(request.n)]


def possible(text, *, whole):
    try:
        partialsmiles.ParseSmiles(text, partial=not whole)
    except (partialsmiles.Error, IndexError):
        return False
    return True


def test_every_sample_can_still_become_a_molecule_or_is_one():
    plain = answers(ask(grammar=Grammar("structure", "molecule")))
    assert any(not possible(one.text.removesuffix("<MoleculeE>"), whole=False) for one in plain)
    for sample in answers(ask(n=16, max_new_tokens=40)):
        text = sample.text.removesuffix("<MoleculeE>")
        assert possible(text, whole=sample.finish_reason == "stop"), text
        assert sample.finish_reason in ("stop", "length", "dead_end")


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 0.85), (0, 1.0)])
def test_the_filter_looks_further_than_the_cuts(temperature, top_k, top_p):
    for sample in answers(ask(temperature=temperature, top_k=top_k, top_p=top_p)):
        assert possible(sample.text.removesuffix("<MoleculeE>"), whole=False)


def test_a_product_is_watched_from_its_own_tag_on_and_metals_never():
    retro = ask(models.RETRO, Grammar("structure", "retrosynthesis", valence=True), stop=())
    for sample in answers(retro):
        for piece in sample.text.split("<MoleculeS>")[1:]:
            text, closed, _ = piece.partition("<MoleculeE>")
            assert possible(text, whole=bool(closed)) or not text
    material = Grammar("structure", "material", valence=True)
    tags = fast().facts.tags
    state = grammars().compile(material, segments_of("<MaterialS>")).start()
    state.accept(tags["<MetalS>"])
    zinc = fast().vocabulary.plain_ids("[Zn]")[0]
    assert state.allows(zinc)
    state.accept(zinc)
    state.accept(tags["<MetalE>"])
    state.accept(tags["<MoleculeS>"])
    assert not state.allows(zinc)


def test_without_cuts_the_filter_has_the_distribution_of_a_mask():
    request = ask("<MoleculeS>C(F)(F)(F)", n=600, max_new_tokens=1, top_k=0)
    drawn = np.array([sample.ids[0] for sample in answers(request) if sample.ids])
    assert len(drawn) == 600
    model = fast()
    size = model.facts.vocab_size
    ids = [model.facts.bos_id, *model.vocabulary.encode(request.prompt)]
    slots = Slots(model.facts, rows=1, capacity=len(ids))
    head = Head(select=np.array([len(ids) - 1]), top_k=size)
    found = model.run(np.array([ids]), np.array([len(ids)], dtype=np.int32), slots, head)
    constraint = grammars().compile(MOLECULE, request.prompt)
    words = np.zeros((1, -(-size // 32)), dtype=np.uint32)
    state = constraint.start()
    state.mask(words[0])
    legal = constraint.legal_ids(words)[0]
    allowed = np.array([legal[n] and state.allows(n) for n in range(size)])
    assert 0 < allowed.sum() < legal.sum()
    weights = np.zeros(size)
    weights[found.ids[0]] = np.exp(found.raw[0] - found.raw[0].max())
    expected = np.where(allowed, weights, 0.0)
    expected /= expected.sum()
    observed = np.bincount(drawn, minlength=size) / len(drawn)
    assert not observed[~allowed].any()
    assert 0.5 * np.abs(observed - expected).sum() < 0.12  # 600 draws over some forty ids


def test_what_was_drawn_and_refused_counts_as_removed():
    request = ask("<MoleculeS>C(F)(F)(F)", n=64, max_new_tokens=1)
    plain = answers(replace(request, grammar=Grammar("structure", "molecule")))
    (mask,) = {sample.removed_mass for sample in plain}  # one step, so one mask for all
    filtered = [sample.removed_mass for sample in answers(request)]
    assert min(filtered) == mask  # whoever drew a good token at once lost nothing more
    assert mask < max(filtered) <= 1.0


def test_a_worker_without_the_filter_and_the_reference_graph_refuse():
    request = ask()
    bare = Grammars(fast().vocabulary, fast().facts)
    assert bare.compile(Grammar("structure", "molecule"), request.prompt) is not None
    with pytest.raises(ProgramError) as caught:
        bare.compile(request.grammar, request.prompt)
    assert caught.value.code == "model.valence"
    reference = load_model(
        models.fast_folder(), precision="fp32", demand="cpu", threads=1, interface="past"
    )
    constraint = grammars().compile(request.grammar, request.prompt)
    with pytest.raises(ProgramError) as caught:
        Decoder(reference, budget=BUDGET, most_rows=2).generate(request, constraint, print)
    assert caught.value.code == "model.valence"


def test_a_program_says_whether_it_filters():
    config = {"folder": str(models.fast_folder()), "precision": "fp32", "threads": 1}
    program = create({**config, "valence": True})
    assert program.warm_up()["valence"] is True
    events = []
    program.handle(ask(n=1, ppl_authors=True).encode(), events.append)
    samples = [e for e in map(parse_event, events) if isinstance(e, Sample)]
    assert samples[0].ppl_authors > 1.0


@given(st.text(alphabet="CNOPScnos[]()=#123%+-@/\\.HBrlFIZ", max_size=30))
def test_no_text_makes_the_filter_fail(text):
    valence = Valence()
    assert valence.may_begin(text) in (True, False)
    assert valence.is_whole(text) <= valence.may_begin(text) or not text


def test_the_prompt_may_hold_the_beginning():
    assert open_text(segments_of("<MoleculeS>")) == ""
    assert open_text(segments_of("<MoleculeS>CC(")) == "CC("
    assert open_text(segments_of("<MoleculeS>CC<MoleculeE><ReverseReact>")) is None
    tags = {"<MoleculeS>": 0, "<MoleculeE>": 1, "<MetalS>": 2}
    spelled = [b"", b"", b"", b"C", b"F", b"("]
    writing = Writing(Valence(), tags, spelled, "C(F)(F)(F)")
    assert writing.allows(3)
    assert not writing.allows(1)  # a last branch in brackets is refused as a whole text
    other = writing.copy()
    other.accept(4)
    assert other.text == "C(F)(F)(F)F"
    assert writing.text == "C(F)(F)(F)"
    assert other.allows(1)
    assert not other.allows(3)


def torch_perplexity(prompt_ids, sample_ids):
    """Do what the authors' `calculate_ppl` does, with their library."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = models.snapshot()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.decode([*prompt_ids, *sample_ids], skip_special_tokens=False)
    text = text.replace("<pad>", "")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    return float(loss.exp()), ids[0].tolist()


def test_the_perplexity_is_that_of_the_authors_scripts():
    request = ask(models.RETRO, Grammar(), n=3, stop=(), ppl_authors=True)
    facts, vocabulary = fast().facts, fast().vocabulary
    prompt = [facts.bos_id, *vocabulary.encode(request.prompt)]
    for sample in answers(request):
        value, ids = torch_perplexity(prompt, sample.ids)
        assert authors_ids(vocabulary, facts, [*prompt, *sample.ids]) == ids
        assert sample.ppl_authors == pytest.approx(value, rel=1e-4)
        assert sample.ppl_authors != pytest.approx(math.exp(-sample.logprob / len(sample.ids)))
    assert all(s.ppl_authors is None for s in answers(replace(request, ppl_authors=False)))


def test_a_perplexity_needs_two_ids_and_stays_finite():
    assert perplexity([1], lambda _first, _rest: 0.0) is None
    assert perplexity([1, 2], lambda _first, _rest: -1e9) <= 1e300
    assert perplexity([1, 2, 3], lambda _first, _rest: -2.0) == pytest.approx(math.e)


def test_both_wishes_survive_the_channel():
    request = ask(ppl_authors=True)
    assert parse_request(request.encode()) == request
    assert parse_request(ask(grammar=Grammar()).encode()).grammar.valence is False
    sample = Sample(0, "C", (1,), "eos", -1.0, 0.0, 3.5)
    assert parse_event(sample.encode()) == sample
    with pytest.raises(ProgramError):
        parse_request(request.encode().replace(b'"valence":true', b'"valence":1'))
    copy = b'{"mode":"copy","sequence":"MK","valence":true}'
    raw = ask(grammar=Grammar("copy", "", "MK")).encode()
    assert parse_request(raw)
    with pytest.raises(ProgramError):
        parse_request(raw.replace(b'{"mode":"copy","sequence":"MK"}', copy))
