"""Laws of the worker: parsers take any bytes, and a sample is its own, whatever runs beside it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_models import RETRO, SEARCH, SEQUENCE, model_folder

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Grammars
from airgap.inference.decoder import Decoder
from airgap.inference.graphs import ModelFacts, parse_graphs
from airgap.inference.model import load_model
from airgap.inference.protocol import (
    TASKS,
    Done,
    Generate,
    Grammar,
    Info,
    Sample,
    Score,
    Segment,
    parse_event,
    parse_reply,
    parse_request,
    segments_of,
    tagged_of,
)
from airgap.inference.sampling import Settings, draw, kept, uniforms
from airgap.inference.strict import MalformedError

NAMES = st.from_regex(r"<[A-Za-z][A-Za-z0-9_]{0,20}>", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SEGMENTS = st.one_of(NAMES.map(lambda name: Segment(name, tag=True)), TEXTS.map(Segment))
GRAMMARS = st.one_of(
    st.just(Grammar()),
    st.sampled_from(TASKS).map(lambda task: Grammar("structure", task)),
    st.text("ACDEFGHIKLMNPQRSTVWYX", min_size=1, max_size=30).map(
        lambda sequence: Grammar("copy", sequence=sequence)
    ),
)
REQUESTS = st.builds(
    Generate,
    prompt=st.lists(SEGMENTS, min_size=1, max_size=8).map(tuple),
    n=st.integers(1, 10_000),
    max_new_tokens=st.integers(1, 65_536),
    temperature=st.one_of(st.just(0.0), st.floats(1e-3, 10.0)),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    top_k=st.integers(0, 2**24),
    repetition_penalty=st.floats(0.01, 100.0),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(NAMES, max_size=16).map(tuple),
    grammar=GRAMMARS,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=6)
    ),
    max_leaves=20,
)


@given(REQUESTS)
def test_every_valid_request_is_read_back(request):
    assert parse_request(request.encode()) == request


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw):
    for parse in (parse_request, parse_event, parse_reply, parse_graphs):
        try:
            parse(raw)
        except (ProgramError, MalformedError):
            continue


@given(st.sampled_from(["generate", "score", "info", "sample", "progress", "done"]), JSON)
def test_any_json_is_read_or_refused(kind, value):
    document = value if isinstance(value, dict) else {"prompt": value}
    for field in ("op", "event"):
        raw = json.dumps(document | {field: kind}).encode()
        for parse in (parse_request, parse_event, parse_reply, parse_graphs):
            try:
                found = parse(raw)
            except (ProgramError, MalformedError):
                continue
            assert isinstance(found, (Generate, Score, Info, Sample, Done, ModelFacts, dict))


@given(REQUESTS, st.data())
def test_a_request_with_one_field_replaced_is_read_or_refused(request, data):
    document = json.loads(request.encode())
    name = data.draw(st.sampled_from(sorted(document)))
    document[name] = data.draw(JSON)
    try:
        code = type(parse_request(json.dumps(document).encode())).__name__
    except ProgramError as error:
        code = error.code
    assert code in ("Generate", "Score", "Info", "request.malformed", "request.limit")


@given(st.lists(st.one_of(NAMES, st.text("CNOcno()=#123", max_size=12)), max_size=12))
def test_tagged_strings_survive_being_cut(pieces):
    tagged = "".join(pieces)
    segments = segments_of(tagged)
    assert tagged_of(segments) == tagged
    assert all(("<" in s.text) == s.tag for s in segments)


@given(st.text(max_size=60))
def test_any_text_is_cut_or_refused(text):
    try:
        found = tagged_of(segments_of(text))
    except ProgramError as error:
        found = error.code
    assert found in (text, "prompt.g04")


@given(
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.integers(2, 60),
    st.builds(
        Settings,
        temperature=st.one_of(st.just(0.0), st.floats(0.1, 3.0)),
        top_p=st.floats(0.01, 1.0),
        top_k=st.integers(0, 70),
        repetition_penalty=st.floats(0.5, 2.0),
    ),
    st.booleans(),
)
@settings(max_examples=150)
def test_a_row_is_drawn_as_if_it_were_alone(seed, rows, vocabulary, how, masked):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (rows, vocabulary)).astype(np.float32)
    seen = rng.random(logits.shape) < 0.3
    legal = rng.random(logits.shape) < 0.5 if masked else None
    values = uniforms(seed, np.arange(rows), 3, 1)[:, 0]
    together = draw(logits, values, how, seen=seen, legal=legal)
    for row in range(rows):
        at = slice(row, row + 1)
        alone = draw(
            logits[at], values[at], how, seen=seen[at], legal=None if legal is None else legal[at]
        )
        for name in ("ids", "logprob", "removed_mass", "dead"):
            assert getattr(alone, name)[0] == getattr(together, name)[row]
        if legal is not None and not together.dead[row]:
            assert legal[row, together.ids[row]]


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 70))
def test_cuts_keep_the_best_and_enough_of_them(seed, vocabulary, top_p, top_k):
    scores = np.random.default_rng(seed).normal(0, 3, (1, vocabulary))
    ids, weights = kept(scores, top_k=top_k, top_p=top_p)
    inside = ids[0][weights[0] > 0]
    outside = np.setdiff1d(np.arange(vocabulary), inside)
    assert len(inside) >= 1
    assert not top_k or len(inside) <= top_k
    assert not len(outside) or scores[0, inside].min() >= scores[0, outside].max()
    order = np.sort(np.exp(scores[0]))[::-1][: top_k or vocabulary]
    assert weights.sum() * np.exp(scores.max()) >= top_p * order.sum() * (1 - 1e-9)


@functools.cache
def worker():
    loaded = load_model(model_folder(), precision="fp32", demand="cpu", threads=1)
    return loaded, Grammars(loaded.vocabulary, loaded.facts)


@given(
    st.builds(
        Generate,
        prompt=st.sampled_from([RETRO, SEARCH, "<MoleculeS>", "<MaterialS>"]).map(segments_of),
        n=st.integers(1, 14),
        max_new_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 0.7, 1.2]),
        top_p=st.sampled_from([0.9, 1.0]),
        top_k=st.sampled_from([0, 50]),
        repetition_penalty=st.sampled_from([1.0, 1.05]),
        seed=st.integers(0, 2**63 - 1),
        stop=st.just(("<MoleculeE>",)),
        grammar=st.sampled_from(
            [
                Grammar(),
                Grammar("structure", "retrosynthesis"),
                Grammar("structure", "material"),
                Grammar("copy", sequence=SEQUENCE),
            ]
        ),
    ),
    st.integers(1, 14),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_is_its_own_whatever_n_and_chunks(request, rows, data):
    loaded, grammars = worker()

    def run(n, rows):
        events = []
        decoder = Decoder(loaded, budget=1 << 28, most_rows=rows, clock=lambda: 0.0)
        constraint = grammars.compile(request.grammar, request.prompt)
        decoder.generate(replace(request, n=n), constraint, events.append)
        return {sample.index: sample for sample in events}

    whole = run(request.n, 64)
    assert run(request.n, rows) == whole
    fewer = data.draw(st.integers(1, request.n))
    assert run(fewer, 64) == {index: whole[index] for index in range(fewer)}
