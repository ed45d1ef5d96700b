"""The engine: refusals before work, deadlines, cancels, fewer runs by guesses, likelihoods."""

import functools
import json
import shutil

import inference_models as models
import numpy as np
import pytest

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Copy, Grammars
from airgap.inference.decoder import Decoder
from airgap.inference.engine import Engine
from airgap.inference.fast import PIECE, Head, Slots
from airgap.inference.model import load_model
from airgap.inference.program import create
from airgap.inference.protocol import (
    Done,
    Generate,
    Grammar,
    Progress,
    Sample,
    Score,
    parse_reply,
    segments_of,
)
from airgap.inference.vocabulary import Place

BUDGET = 64 << 20


@functools.cache
def fast():
    return load_model(models.fast_folder(), precision="fp32", demand="cpu", threads=1)


def ask(prompt=models.RETRO, **change):
    settings = {
        "n": 4,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "seed": 1,
    }
    return Generate(prompt=segments_of(prompt), **{**settings, **change})


def engine(**change):
    return Engine(fast(), **{"budget": BUDGET, "most_rows": 8, **change})


def submit(target, key, request, constraint=None, **options):
    events, answers = [], []
    target.submit(key, request, constraint, emit=events.append, finish=answers.append, **options)
    return events, answers


def test_what_cannot_fit_is_refused_before_anything_runs():
    assert engine().generate(ask(), None, lambda _event: None).tokens > 0
    before = fast().runs
    context = fast().facts.max_context
    for code, request, change in (
        ("prompt.g10", ask(max_new_tokens=context), {}),
        ("model.memory", ask(max_new_tokens=64), {"budget": 40_000}),
        ("model.stop", ask(stop=("<Nowhere>",)), {}),
        ("prompt.g04", ask("<Nowhere>"), {}),
    ):
        with pytest.raises(ProgramError) as caught:
            submit(engine(**change), 0, request)
        assert caught.value.code == code
    assert fast().runs == before


def test_rows_follow_the_budget_and_the_tokens_do_not():
    found = {}
    for budget in (BUDGET, 100_000, 60_000):
        samples = {}

        def emit(event, samples=samples):
            if isinstance(event, Sample):  # a slow machine tells of its progress too
                samples[event.index] = event.ids

        done = engine(budget=budget).generate(ask(n=8), None, emit)
        found[budget] = (done.rows, samples)
    rows = [rows for rows, _ in found.values()]
    assert rows[0] == 8
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 8
    assert all(samples == found[BUDGET][1] for _, samples in found.values())


def test_a_request_ends_at_its_deadline_and_its_neighbour_goes_on():
    now = [0.0]
    target = engine(clock=lambda: now[0])
    _, late = submit(target, 1, ask(max_new_tokens=40), deadline=5.0)
    events, kept = submit(target, 2, ask(max_new_tokens=40, seed=2))
    for _ in range(3):
        target.step()
    assert not late
    now[0] = 5.0
    while target.busy:
        target.step()
    assert [error.code for error in late] == ["model.deadline"]
    assert isinstance(kept[0], Done)
    assert sum(isinstance(event, Sample) for event in events) == 4


def test_a_cancelled_request_gets_no_answer_and_frees_its_slots():
    target = engine(most_rows=4)
    _, first = submit(target, 1, ask(n=4, max_new_tokens=60, temperature=0.0))
    _, second = submit(target, 2, ask())
    target.step()
    assert target.cancel(1)
    assert not target.cancel(1)
    while target.busy:
        target.step()
    assert first == []
    assert isinstance(second[0], Done)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_the_last_request_gives_the_buffers_back_also_where_it_has_no_slot(how):
    now = [0.0]
    target = engine(clock=lambda: now[0])
    submit(target, 1, ask())
    submit(target, 2, ask(seed=2), deadline=5.0)
    target.pause(2, paused=True)
    while target.runnable:
        target.step()
    assert target._batch._slots is not None
    if how == "cancel":
        target.cancel(2)
    else:
        now[0] = 5.0
        target.step()
    assert not target.busy
    assert target._batch._slots is None


def test_a_small_request_does_not_wait_for_a_large_one():
    target = engine(most_rows=4)
    _, large = submit(target, 1, ask(n=200))
    _, small = submit(target, 2, ask(n=1))
    while not small:
        target.step()
    assert not large
    assert target.cancel(1)


def test_progress_is_told_while_it_lasts():
    now = [0.0]

    def clock():
        now[0] += 0.06
        return now[0]

    target = engine(clock=clock)
    events, answers = submit(target, 1, ask(n=8, max_new_tokens=30))
    while not answers:
        target.step()
    told = [event for event in events if isinstance(event, Progress)]
    assert told
    assert [event.tokens for event in told] == sorted(event.tokens for event in told)


def test_numbers_that_are_none_end_the_request_with_their_code(tmp_path):
    folder = shutil.copytree(models.fast_folder(), tmp_path / "model")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + size])["model.norm.weight"]["data_offsets"]
    raw[8 + size + start : 8 + size + end] = b"\xff" * (end - start)
    (folder / "model.safetensors").write_bytes(raw)
    broken = load_model(folder, precision="fp32", demand="cpu", threads=1)
    target = Engine(broken, budget=BUDGET, most_rows=8)
    for request in (ask(), ask(temperature=0.0)):
        with pytest.raises(ProgramError) as caught:
            target.generate(request, None, lambda _event: None)
        assert caught.value.code == "model.nan"
        assert not target.busy
    score = Score(segments_of(models.RETRO), (segments_of("<MoleculeS>C<MoleculeE>"),))
    with pytest.raises(ProgramError) as caught:
        target.score(score)
    assert caught.value.code == "model.nan"


def test_likelihoods_are_those_of_the_reference_graph():
    reference = load_model(
        models.fast_folder(), precision="fp32", demand="cpu", threads=1, interface="past"
    )
    request = Score(
        segments_of(models.RETRO),
        tuple(segments_of(f"<MoleculeS>{'C' * n}<MoleculeE>") for n in (1, 2, 40)),
    )
    ours = engine().score(request)
    theirs = Decoder(reference, budget=BUDGET, most_rows=1).score(request)
    assert ours.prompt_tokens == theirs.prompt_tokens
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        assert one[1] == other[1]
        assert one[0] == pytest.approx(other[0], abs=1e-3)


def test_a_likelihood_of_a_sample_is_what_the_sample_said():
    samples = []
    engine().generate(ask(n=40, max_new_tokens=6), None, samples.append)
    whole = [one for one in samples if isinstance(one, Sample) and one.finish_reason == "length"]
    whole = [one for one in whole if list(one.ids) == encoded(one.text)]
    assert whole
    for sample in whole:
        request = Score(segments_of(models.RETRO), (segments_of(sample.text),))
        ((found, count),) = engine().score(request).scores
        assert count == len(sample.ids)
        assert found == pytest.approx(sample.logprob, abs=1e-3)


def encoded(text):
    """Return the ids of a text, or none where it holds what cannot be written."""
    try:
        return fast().vocabulary.encode(segments_of(text))
    except ProgramError:
        return []


def test_a_copy_needs_far_fewer_runs_where_the_guess_is_right():
    guess = Copy(
        "MKVAA",
        lambda text, _place: [ord(c) for c in text],
        letters=[1] * 128,
        tags=TAGS,
        place=Place.TAG,
    )
    place = guess.start
    assert guess.guess(place, 9) == [77, 75, 86, 65, 65, TAGS["<ProteinE>"]]
    for token in (77, TAGS["<PocketS>"]):
        place = guess.advance(place, token)
    assert guess.guess(place, 3) == [75, TAGS["<PocketE>"], 86]
    place = guess.advance(place, 75)
    assert guess.guess(place, 2) == [TAGS["<PocketE>"], 86]
    place = guess.advance(place, TAGS["<PocketE>"])
    assert guess.guess(place, 9) == [86, 65, 65, TAGS["<ProteinE>"]]


TAGS = {"<PocketS>": 1, "<PocketE>": 2, "<ProteinE>": 3}


def test_a_constrained_copy_is_exact_and_its_runs_are_counted():
    grammars = Grammars(fast().vocabulary, fast().facts)
    grammar = Grammar("copy", "", models.SEQUENCE)
    request = ask(models.SEARCH, grammar=grammar, max_new_tokens=80, stop=("<ProteinE>",), n=2)
    samples = []
    done = engine().generate(request, grammars.compile(grammar, request.prompt), samples.append)
    for sample in (event for event in samples if isinstance(event, Sample)):
        bare = sample.text.replace("<PocketS>", "").replace("<PocketE>", "")
        assert bare == f"{models.SEQUENCE}<ProteinE>"
        assert sample.finish_reason == "stop"
    assert done.runs < done.tokens + 2


def test_a_long_prompt_runs_in_pieces_with_the_same_result():
    model = fast()
    ids = np.random.default_rng(0).integers(4, 40, PIECE // 2).tolist()
    whole = Slots(model.facts, rows=1, capacity=200)
    model.prefill(ids, whole)
    again = Slots(model.facts, rows=1, capacity=300)
    model.prefill(ids, again)
    again.resize(3, 250, [len(ids)])
    again.move(0, len(ids), to=2)
    head = Head(select=np.array([0]), top_k=5)
    after = np.array([len(ids) + 1], dtype=np.int32)
    one = model.run(np.array([[5]]), after, whole, head)
    two = model.run(np.array([[5]]), after, again, head, first=2)
    assert (one.raw == two.raw).all()


class Halved(Slots):
    """Buffers whose memory runs out in the middle of a resize."""

    def resize(self, rows, capacity, lengths):
        kept = self._buffers
        heads = 1 << 44  # the second one asks for more than there is
        wide = np.lib.stride_tricks.as_strided(kept[1], (1, heads, 1, 1), (0, 0, 0, 0))
        self._buffers = [kept[0], wide, *kept[2:]]
        try:
            super().resize(rows, capacity, lengths)
        finally:
            self._buffers[1] = kept[1]


class Short:
    """A loaded model whose memory runs out in the middle of a resize."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def slots(self, *, rows, capacity):
        return Halved(self._model.facts, rows=rows, capacity=capacity)


def test_memory_that_runs_out_in_a_resize_leaves_nothing_of_the_old_buffers_in_use():
    first, longer = ask(n=2, max_new_tokens=20), ask(n=1, max_new_tokens=60, seed=3)
    expected = {}
    engine().generate(first, None, lambda event: keep(expected, event))
    target = Engine(Short(fast()), budget=BUDGET, most_rows=8)
    _, ended = submit(target, 1, first)
    target.step()
    _, never = submit(target, 2, longer)
    target.step()
    assert [error.code for error in (*ended, *never)] == ["model.memory"] * 2
    found = {}
    target.generate(first, None, lambda event: keep(found, event))
    assert found == expected


def keep(found, event):
    if isinstance(event, Sample):
        found[event.index] = event.ids


def test_the_program_takes_the_fast_graph_where_there_is_one():
    program = create({"folder": str(models.fast_folder()), "precision": "fp32", "threads": 1})
    facts = program.warm_up()
    assert (facts["graph"], facts["interface"]) == ("fast", "shared")
    assert facts["batch_invariant"] is True
    reply = parse_reply(program.handle(ask().encode(), lambda _event: None))
    assert isinstance(reply, Done)
    old = create(
        {
            "folder": str(models.fast_folder()),
            "precision": "fp32",
            "threads": 1,
            "interface": "past",
        }
    )
    assert old.warm_up()["graph"] == "reference"
