"""Random mixes of requests: each gets the tokens that it gets alone, whatever runs beside it.

They differ in prompt, n, length, seed, sampling, grammar and request set; some are cancelled or
paused on the way, and the batch is as wide as it happens to be.
"""

import functools
from dataclasses import replace

import hypothesis.strategies as st
import inference_models as models
import pytest
from hypothesis import HealthCheck, given, settings

from airgap.inference.constrain import Grammars
from airgap.inference.decoder import Decoder
from airgap.inference.engine import Engine
from airgap.inference.fast import PIECE
from airgap.inference.model import load_model
from airgap.inference.protocol import Done, Generate, Grammar, Sample, segments_of
from airgap.inference.valence import Valence

BUDGET = 64 << 20
PROMPTS = {
    "retro": (
        models.RETRO,
        (
            Grammar(),
            Grammar("structure", "retrosynthesis"),
            Grammar("structure", "retrosynthesis", valence=True),
        ),
    ),
    "molecule": (
        "<MoleculeS>",
        (
            Grammar(),
            Grammar("structure", "molecule"),
            Grammar("structure", "molecule", valence=True),
        ),
    ),
    "long": (  # more than a piece of a prompt: what a set shares of it is found again
        f"<MoleculeS>{'C' * (PIECE + 40)}",
        (Grammar(), Grammar("structure", "molecule")),
    ),
    "search": (models.SEARCH, (Grammar(), Grammar("copy", "", models.SEQUENCE))),
}


@functools.cache
def fast():
    return load_model(models.fast_folder(), precision="fp32", demand="cpu", threads=1)


@functools.cache
def grammars():
    return Grammars(fast().vocabulary, fast().facts, Valence())


def compiled(request):
    return grammars().compile(request.grammar, request.prompt)


@st.composite
def requests(draw):
    prompt, kinds = PROMPTS[draw(st.sampled_from(sorted(PROMPTS)))]
    return Generate(
        prompt=segments_of(prompt),
        n=draw(st.integers(1, 6)),
        max_new_tokens=draw(st.integers(1, 40)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.2])),
        top_p=draw(st.sampled_from([0.85, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 50])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.05, 1.5])),
        seed=draw(st.integers(0, 2**63 - 1)),
        stop=draw(st.sampled_from([(), ("<MoleculeE>",)])),
        grammar=draw(st.sampled_from(kinds)),
    )


class Sink:
    """What one request got."""

    def __init__(self):
        self.samples, self.answers = {}, []

    def emit(self, event):
        if isinstance(event, Sample):
            assert event.index not in self.samples
            self.samples[event.index] = (event.ids, event.finish_reason, event.text)

    def submit(self, engine, key, request, **options):
        engine.submit(
            key, request, compiled(request), emit=self.emit, finish=self.answers.append, **options
        )


def alone(request, most_rows=1):
    engine, sink = Engine(fast(), budget=BUDGET, most_rows=most_rows), Sink()
    sink.submit(engine, 0, request)
    while engine.busy:
        engine.step()
    assert isinstance(sink.answers[0], Done)
    return sink.samples


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_mix_gives_each_request_what_it_gets_alone(data):
    mix(data)


@pytest.mark.soak
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_two_hundred_mixes(data):
    mix(data)


def mix(data):
    wanted = data.draw(st.lists(requests(), min_size=2, max_size=5))
    engine = Engine(fast(), budget=BUDGET, most_rows=data.draw(st.integers(1, 9)))
    sinks, cancelled = [], set()
    for key, request in enumerate(wanted):
        sink = Sink()
        owner = data.draw(st.sampled_from(["", "a", "b"]))
        sink.submit(engine, key, replace(request, request_set=owner))
        sinks.append(sink)
        for _ in range(data.draw(st.integers(0, 20))):
            engine.step()
        engine.pause(data.draw(st.integers(0, key)), paused=data.draw(st.booleans()))
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.integers(0, key))
            if engine.cancel(victim):
                cancelled.add(victim)
    for key in range(len(wanted)):
        engine.pause(key, paused=False)
    while engine.busy:
        engine.step()
    for key, (request, sink) in enumerate(zip(wanted, sinks, strict=True)):
        if key in cancelled:
            assert sink.answers == []
            assert sink.samples.items() <= alone(request).items()
        else:
            (done,) = sink.answers
            assert done.tokens == sum(len(ids) for ids, _, _ in sink.samples.values())
            assert sink.samples == alone(request)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(requests())
def test_the_fast_graph_draws_what_the_reference_graph_draws(request):
    reference = load_model(
        models.fast_folder(), precision="fp32", demand="cpu", threads=1, interface="past"
    )
    found = {}

    def emit(event):
        if isinstance(event, Sample):
            found[event.index] = (event.ids, event.finish_reason, event.text)

    if request.grammar.valence:
        return  # the engine alone has it; a test of its own says how the decoder refuses
    Decoder(reference, budget=BUDGET, most_rows=4).generate(request, compiled(request), emit)
    assert found == alone(request, most_rows=4)


def test_texts_longer_than_a_block_of_numbers_are_the_same_in_a_mix_alone_and_by_the_reference():
    """Numbers are drawn ahead in blocks; a wide guess of a copy reaches over their edge."""
    long = models.SEQUENCE * (1 + 140 // len(models.SEQUENCE))
    search = models.SEARCH.replace(models.SEQUENCE, long)
    assert long in search
    settings = {"temperature": 1.2, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    wanted = [
        Generate(prompt=segments_of(prompt), grammar=grammar, stop=(), **settings | changes)
        for prompt, grammar, changes in (
            (models.RETRO, Grammar(), {"n": 5, "max_new_tokens": 200, "seed": 1}),
            (models.RETRO, Grammar(), {"n": 3, "max_new_tokens": 97, "seed": 1, "top_k": 5}),
            (search, Grammar("copy", "", long), {"n": 3, "max_new_tokens": 190, "seed": 2}),
            (
                "<MoleculeS>",
                Grammar("structure", "molecule"),
                {"n": 3, "max_new_tokens": 130, "seed": 3, "repetition_penalty": 1.5},
            ),
        )
    ]
    engine, sinks = Engine(fast(), budget=BUDGET, most_rows=4), []
    for key, request in enumerate(wanted):
        sinks.append(Sink())
        sinks[-1].submit(engine, key, request)
        for _ in range(31):
            engine.step()
    while engine.busy:
        engine.step()
    reference = load_model(
        models.fast_folder(), precision="fp32", demand="cpu", threads=1, interface="past"
    )
    longest = set()
    for request, sink in zip(wanted, sinks, strict=True):
        assert sink.samples == alone(request)
        by_loop = Sink()
        decoder = Decoder(reference, budget=BUDGET, most_rows=4)
        decoder.generate(request, compiled(request), by_loop.emit)
        assert sink.samples == by_loop.samples
        longest.add(max(len(ids) for ids, _, _ in sink.samples.values()))
    assert len([length for length in longest if length > 96]) > 2
