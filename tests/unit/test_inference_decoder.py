"""Decoding: equal to torch where it must be, alone or in company, refused before work begins."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from inference_models import (
    RETRO,
    SEARCH,
    SEQUENCE,
    model_folder,
    poison,
    snapshot,
    write_model,
)

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Grammars
from airgap.inference.decoder import Decoder, plan_memory
from airgap.inference.graphs import parse_graphs
from airgap.inference.model import load_model
from airgap.inference.protocol import (
    Generate,
    Grammar,
    Progress,
    Sample,
    Score,
    Segment,
    segments_of,
)

MIB = 1 << 20
COPY = Grammar("copy", sequence=SEQUENCE)


@functools.cache
def model():
    return load_model(model_folder(), precision="fp32", demand="cpu", threads=1)


@functools.cache
def grammars():
    return Grammars(model().vocabulary, model().facts)


def request(tagged=RETRO, **change):
    return replace(
        Generate(
            prompt=segments_of(tagged),
            n=8,
            max_new_tokens=40,
            temperature=1.0,
            top_p=0.9,
            top_k=50,
            repetition_penalty=1.05,
            seed=7,
        ),
        **change,
    )


def run(wanted, *, most_rows=64, budget=512 * MIB, clock=lambda: 0.0, loaded=None):
    """Return ({index: sample}, reply, progress events)."""
    events = []
    decoder = Decoder(loaded or model(), budget=budget, most_rows=most_rows, clock=clock)
    constraint = grammars().compile(wanted.grammar, wanted.prompt)
    done = decoder.generate(wanted, constraint, events.append)
    samples = [event for event in events if isinstance(event, Sample)]
    found = {sample.index: sample for sample in samples}
    assert len(samples) == len(found) == wanted.n
    return found, done, [event for event in events if isinstance(event, Progress)]


@functools.cache
def torch_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(snapshot()).eval()


def prompt_ids(wanted):
    return [model().facts.bos_id, *model().vocabulary.encode(wanted.prompt)]


def teacher_forced(prompt, ids):
    import torch

    with torch.no_grad():
        logits = torch_model()(torch.tensor([[*prompt, *ids]])).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    return sum(float(table[len(prompt) - 1 + at, number]) for at, number in enumerate(ids))


@pytest.mark.parametrize("grammar", [Grammar(), Grammar("structure", "retrosynthesis")])
def test_log_likelihoods_are_those_of_torch(grammar):
    wanted = request(n=12, grammar=grammar)
    found, _, _ = run(wanted)
    prompt = prompt_ids(wanted)
    for sample in found.values():
        assert sample.logprob == pytest.approx(teacher_forced(prompt, sample.ids), abs=1e-4)


def test_greedy_tokens_are_those_of_transformers():
    import torch

    for tagged in (RETRO, SEARCH, "<MoleculeS>"):
        wanted = request(tagged, n=2, temperature=0.0, repetition_penalty=1.1, max_new_tokens=60)
        prompt = prompt_ids(wanted)
        theirs = (
            torch_model()
            .generate(
                torch.tensor([prompt]),
                do_sample=False,
                repetition_penalty=1.1,
                max_new_tokens=60,
                pad_token_id=0,
            )[0, len(prompt) :]
            .tolist()
        )
        found, _, _ = run(wanted)
        assert list(found[0].ids) == theirs
        assert found[1].ids == found[0].ids


def test_sampling_follows_the_model():
    import torch

    wanted = request("<MoleculeS>", n=4000, max_new_tokens=1, top_p=1.0, top_k=0)
    wanted = replace(wanted, repetition_penalty=1.0, temperature=0.7)
    found, _, _ = run(wanted)
    with torch.no_grad():
        logits = torch_model()(torch.tensor([prompt_ids(wanted)])).logits[0, -1].double()
    expected = (torch.softmax(logits / 0.7, dim=-1) * 4000).numpy()
    counts = np.bincount([s.ids[0] for s in found.values()], minlength=len(expected))
    often = expected >= 5
    rest = expected[~often].sum()
    chi_square = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
    chi_square += (counts[~often].sum() - rest) ** 2 / max(rest, 1e-9)
    freedom = int(often.sum())
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 4


@pytest.mark.parametrize("grammar", [Grammar(), COPY], ids=["none", "copy"])
def test_a_sample_does_not_depend_on_its_company(grammar):
    wanted = request(SEARCH, n=23, max_new_tokens=75, grammar=grammar, stop=("<ProteinE>",))
    whole, done, _ = run(wanted)
    assert done.rows == 23
    for rows in (1, 2, 7, 16):
        again, done, _ = run(wanted, most_rows=rows)
        assert done.rows == rows
        assert again == whole
    fewer, _, _ = run(replace(wanted, n=5))
    assert fewer == {index: whole[index] for index in range(5)}


def test_the_seed_decides():
    wanted = request()
    assert run(wanted)[0] == run(wanted)[0]
    assert run(wanted)[0] != run(replace(wanted, seed=8))[0]


def test_samples_of_one_request_differ():
    found, _, _ = run(request(n=40))
    assert len({sample.ids for sample in found.values()}) > 35


def test_copies_are_exact_and_stop_at_the_tag():
    wanted = request(SEARCH, n=40, max_new_tokens=3 * len(SEQUENCE) + 1, grammar=COPY)
    found, done, _ = run(replace(wanted, stop=("<ProteinE>",), repetition_penalty=1.0))
    for sample in found.values():
        assert sample.finish_reason == "stop"
        assert re.sub("<Pocket[SE]>", "", sample.text) == SEQUENCE + "<ProteinE>"
        assert 0.5 < sample.removed_mass <= 1.0  # a random model: the grammar writes the answer
    assert done.tokens == sum(len(sample.ids) for sample in found.values())


def test_a_copy_without_a_stop_ends_with_the_end_token():
    found, _, _ = run(request(SEARCH, max_new_tokens=80, grammar=COPY))
    for sample in found.values():
        assert sample.finish_reason == "eos"
        assert sample.ids[-1] == 3
        assert sample.text.endswith("<ProteinE>")


def test_reasons_text_and_counts_agree():
    wanted = request("<MoleculeS>", n=200, stop=("<MoleculeE>",), top_p=1.0, top_k=0)
    found, done, _ = run(wanted, most_rows=256)
    reasons = Counter(sample.finish_reason for sample in found.values())
    assert set(reasons) == {"eos", "stop", "length"}
    for sample in found.values():
        last = sample.ids[-1]
        assert (last == 3) == (sample.finish_reason == "eos")
        assert sample.text.endswith("<MoleculeE>") == (sample.finish_reason == "stop")
        assert (len(sample.ids) == 40) or sample.finish_reason != "length"
        assert "<eos>" not in sample.text
        assert sample.removed_mass == 0.0
    assert done.tokens == sum(len(sample.ids) for sample in found.values())
    assert done.runs <= 40


def test_the_end_token_is_scored():
    found, _, _ = run(request("<MoleculeS>", n=200, top_p=1.0, top_k=0))
    ended = next(s for s in found.values() if s.finish_reason == "eos")
    prompt = prompt_ids(request("<MoleculeS>"))
    assert ended.logprob == pytest.approx(teacher_forced(prompt, ended.ids), abs=1e-4)
    assert ended.logprob < teacher_forced(prompt, ended.ids[:-1])


def test_a_dead_end_is_named_and_keeps_what_was_written():
    impossible = Grammar("copy", sequence="MKJ")
    found, _, _ = run(request(SEARCH, grammar=impossible, n=5))
    for sample in found.values():
        assert sample.finish_reason == "dead_end"
        assert sample.text.replace("<PocketS>", "").replace("<PocketE>", "") == "MK"
        assert np.isfinite(sample.logprob)


def test_progress_is_told_as_time_passes():
    ticks = iter(np.arange(0, 1000, 0.06))
    _, done, progress = run(request(n=20), clock=lambda: next(ticks))
    assert progress
    assert [p.tokens for p in progress] == sorted(p.tokens for p in progress)
    assert all(p.n == 20 and p.finished <= 20 and p.tokens <= done.tokens for p in progress)
    assert done.elapsed_ms > 0
    assert run(request(n=20))[2] == []


def test_one_prefill_serves_every_chunk():
    _, done, _ = run(request(n=9, max_new_tokens=1), most_rows=4)
    assert done.runs == 1
    assert done.prompt_tokens == len(prompt_ids(request()))


def refusal(wanted, **options):
    run(request())
    before = model().runs
    with pytest.raises(ProgramError) as caught:
        run(wanted, **options)
    assert model().runs == before, "work began before the refusal"
    return caught.value


def test_a_budget_beyond_the_context_is_refused_and_never_cut():
    room = model().facts.max_context - len(prompt_ids(request()))
    run(request(max_new_tokens=room, n=1))
    error = refusal(request(max_new_tokens=room + 1, n=1))
    assert error.code == "prompt.g10"
    assert f"at most {room} new tokens" in error.hint


def test_a_prompt_beyond_the_context_is_refused():
    error = refusal(request("<MoleculeS>" + "C" * 600))
    assert error.code == "prompt.g10"
    assert error.hint == "shorten the input"


def test_a_stop_tag_that_the_model_lacks_is_refused():
    assert refusal(request(stop=("<Nothing>",))).code == "model.stop"


def test_too_little_memory_is_refused():
    assert refusal(request(), budget=10_000).code == "model.memory"


def test_memory_decides_how_many_rows_run_together():
    facts = parse_graphs((model_folder() / "graphs.json").read_bytes())
    plan = functools.partial(
        plan_memory, facts, kv_bytes=4, prompt=10, new=90, n=10_000, most_rows=64
    )
    assert plan(budget=512 * MIB).rows == 64
    narrow = plan(budget=MIB)
    assert 1 <= narrow.rows < 64
    assert narrow.size <= MIB
    assert narrow.capacity == 100
    # Keys and values, twice, of 2 layers x 2 heads x 8 numbers: half a KiB a position.
    assert plan(budget=narrow.size * 2).rows > narrow.rows


def test_logits_that_are_not_numbers_are_refused(tmp_path):
    broken = load_model(
        poison(write_model(tmp_path / "model")), precision="fp32", demand="cpu", threads=1
    )
    with pytest.raises(ProgramError) as caught:
        run(request(), loaded=broken)
    assert caught.value.code == "model.nan"
    with pytest.raises(ProgramError) as caught:
        Decoder(broken, budget=MIB, most_rows=4).score(
            Score(prompt=segments_of(RETRO), completions=((Segment("CC"),),))
        )
    assert caught.value.code == "model.nan"


def test_scores_are_those_of_torch_and_of_sampling(monkeypatch):
    decoder = Decoder(model(), budget=64 * MIB, most_rows=4)
    texts = ("<MoleculeS>CC<MoleculeE>", "C", "<MoleculeS>CC(=O)NC<MoleculeE><MoleculeS>O")
    wanted = Score(prompt=segments_of(RETRO), completions=tuple(map(segments_of, texts)))
    found = decoder.score(wanted)
    assert found.prompt_tokens == len(prompt_ids(request()))
    for text, (logprob, count) in zip(texts, found.scores, strict=True):
        ids = model().vocabulary.encode(segments_of(text))
        assert count == len(ids)
        assert logprob == pytest.approx(teacher_forced(prompt_ids(request()), ids), abs=1e-4)
    monkeypatch.setattr("airgap.inference.model.PIECE_BYTES", 4 * model().facts.vocab_size * 3)
    pieces = decoder.score(wanted)
    assert [v for v, _ in pieces.scores] == pytest.approx([v for v, _ in found.scores], abs=1e-4)


def test_an_empty_prompt_or_completion_is_refused(monkeypatch):
    decoder = Decoder(model(), budget=64 * MIB, most_rows=4)
    with pytest.raises(ProgramError) as caught:
        decoder.score(Score(prompt=segments_of(RETRO), completions=((Segment(""),),)))
    assert caught.value.code == "request.malformed"
    run(request(prompt=(Segment(""),)))  # the start token alone
    monkeypatch.setattr(model(), "facts", replace(model().facts, bos_id=None))
    assert refusal(request(prompt=(Segment(""),))).code == "request.malformed"


def test_scores_of_too_long_completions_are_refused():
    decoder = Decoder(model(), budget=64 * MIB, most_rows=4)
    with pytest.raises(ProgramError) as caught:
        decoder.score(Score(prompt=segments_of(RETRO), completions=((Segment("C" * 600),),)))
    assert caught.value.code == "prompt.g10"
