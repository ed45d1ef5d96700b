"""Shared beginnings of prompts: in one request set, the same bits, bounded, forgotten on ask."""

from dataclasses import replace

import inference_models as models
import pytest
from test_inference_engine import ask, engine, fast, submit

from airgap.enclave.channel import ProgramError
from airgap.inference import likelihoods
from airgap.inference.engine import Engine
from airgap.inference.fast import PIECE, Slots
from airgap.inference.prefixes import Prefix, Prefixes
from airgap.inference.protocol import Forget, Forgotten, parse_reply, parse_request, segments_of
from airgap.inference.refusals import not_finite

LONG = f"<MoleculeS>{'C' * (PIECE + 40)}"


def run(target, *requests):
    """Run requests together to their end; returns (samples, runs) of each."""
    started = [submit(target, key, request) for key, request in enumerate(requests)]
    while target.busy:
        target.step()
    found = []
    for events, answers in started:
        samples = {e.index: (e.ids, e.logprob) for e in events if hasattr(e, "ids")}
        found.append((samples, answers[0].runs))
    return found


def long_ask(tail="<MoleculeE>", **change):
    return ask(LONG + tail, n=2, max_new_tokens=4, **change)


@pytest.mark.parametrize("tail", ["<MoleculeE>", "O<MoleculeE><ReverseReact>"])
def test_a_beginning_is_run_once_in_a_set_and_gives_the_same_bits(tail):
    (alone,) = run(engine(), long_ask(tail))
    target = engine()
    run(target, long_ask(request_set="a"))
    ((samples, runs),) = run(target, long_ask(tail, request_set="a", seed=1))
    assert samples == alone[0]
    assert runs < alone[1]
    ((samples, runs),) = run(target, long_ask(tail, request_set="a", seed=1))
    assert samples == alone[0]
    assert runs == alone[1] - 2  # both pieces


def test_nothing_is_found_under_another_set_or_without_one():
    (alone,) = run(engine(), long_ask())
    target = engine()
    run(target, long_ask(request_set="a"))
    for other in ("b", ""):
        assert run(target, long_ask(request_set=other)) == [alone]
    assert target.forget("b") == 1
    assert target.forget("a") == 1
    assert run(target, long_ask(request_set="a")) == [alone]


def test_what_is_kept_is_bounded_by_the_budget_and_gives_way_to_rows():
    request = long_ask(request_set="a")
    position = 8 * fast().facts.layers * fast().facts.kv_heads * fast().facts.head_dim
    entry = position * (PIECE + 43)
    small = engine(budget=16 * entry, most_rows=64)
    for tail in ("O", "N", "CO", "CN", "OC", "NC", "CCO", "CCN"):
        run(small, replace(request, prompt=segments_of(LONG + tail)))
        assert 0 < small._batch.kept <= 4 * entry + 4 * position
    wide = ask(n=64, max_new_tokens=380)
    submit(small, 99, wide)
    small.step()
    assert small._batch.kept <= small._batch.for_prefixes(small._jobs.values()) < 4 * entry
    small.cancel(99)


def left(ids):
    return Prefix(tuple(ids), None, None, None)


def test_the_longest_common_beginning_wins_and_the_oldest_goes_first():
    kept = Prefixes()
    first, second = list(range(PIECE + 5)), list(range(2 * PIECE + 1))
    for ids in (first, second):
        kept.keep("a", left(ids), size=10, room=20)
    assert kept.find("a", list(range(3 * PIECE)))[1] == 2 * PIECE
    assert kept.find("a", first)[1] == len(first)
    assert kept.find("a", list(range(PIECE + 4)))[1] == PIECE
    assert kept.find("a", list(range(PIECE - 1))) is None
    assert kept.find("a", [9, *first]) is None
    assert kept.find("a", first)[1] == len(first)
    kept.keep("a", left([7]), size=10, room=20)  # the second was used least recently
    assert kept.find("a", second)[1] == PIECE
    kept.keep("a", left([8]), size=21, room=20)
    assert kept.find("a", [8]) is None
    assert kept.size == 20
    kept.keep("a", left([7]), size=12, room=30)  # in the place of what it was
    assert kept.size == 22
    kept.keep("", left([9]), size=1, room=30)
    assert kept.find("", [9]) is None


def test_the_very_prompt_comes_before_a_longer_one_that_shares_whole_pieces():
    kept = Prefixes()
    short, longer = list(range(PIECE)), list(range(2 * PIECE))
    for ids in (longer, short):
        kept.keep("a", left(ids), size=1, room=9)
    found, shared = kept.find("a", short)
    assert (list(found.ids), shared) == (short, PIECE)
    target, whole = engine(), ask("<MoleculeS>" + "C" * (PIECE - 2), request_set="a")
    run(target, ask("<MoleculeS>" + "C" * (PIECE + 9), request_set="a"))
    ((samples, runs),) = run(target, whole)
    assert run(target, whole) == [(samples, runs - 1)]


@pytest.mark.parametrize(
    "change",
    [{"top_k": 3}, {"repetition_penalty": 1.3}, {"temperature": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_a_kept_prompt_under_other_settings_runs_its_last_piece_again(change):
    other = replace(long_ask(), **change)
    (alone,) = run(engine(), other)
    target = engine()
    run(target, long_ask(request_set="a"))
    other = replace(other, request_set="a")
    assert run(target, other) == [(alone[0], alone[1] - 1)]
    assert run(target, other) == [(alone[0], alone[1] - 2)]


def test_samples_of_one_token_take_no_run_beside_the_prompt():
    for n in (1, 20):
        ((samples, runs),) = run(engine(), ask(n=n, max_new_tokens=1))
        assert (len(samples), runs) == (n, 1)


@pytest.mark.parametrize("error", [not_finite(3), ProgramError("model.run", "it failed", "-")])
def test_a_perplexity_that_is_no_number_ends_its_own_request(error, monkeypatch):
    def fails(*_, **__):
        raise error

    (alone,) = run(engine(), ask(n=3))
    monkeypatch.setattr(likelihoods, "authors_perplexity", fails)
    target = engine()
    started = [submit(target, 0, ask(n=3, ppl_authors=True)), submit(target, 1, ask(n=3))]
    while target.busy:
        target.step()
    (_, first), (events, second) = started
    assert [answer.code for answer in first] == [error.code]
    if error.code == "model.run":  # the graph failed: nobody's rows can be trusted
        assert [answer.code for answer in second] == [error.code]
    else:
        samples = {e.index: (e.ids, e.logprob) for e in events if hasattr(e, "ids")}
        assert samples == alone[0]


def test_rows_that_end_together_are_not_moved(monkeypatch):
    moves = []
    move = Slots.move
    monkeypatch.setattr(Slots, "move", lambda *a, **k: (moves.append(a), move(*a, **k)))
    ((samples, _),) = run(engine(), ask(n=6, max_new_tokens=5))
    assert {len(ids) for ids, _ in samples.values()} == {5}
    assert not moves
    ((samples, _),) = run(engine(), ask(n=6, max_new_tokens=40))
    assert len({len(ids) for ids, _ in samples.values()}) > 1
    assert moves


def test_buffers_that_grow_before_the_first_token_lose_nothing():
    short, long = ask(n=3, max_new_tokens=4), ask(LONG, n=3, max_new_tokens=30, seed=8)
    alone = [run(engine(), one)[0][0] for one in (short, long)]
    for together in ((short, long), (long, short)):
        found = [samples for samples, _ in run(engine(), *together)]
        assert found == (alone if together[0] is short else alone[::-1])


def test_slots_go_to_the_set_that_has_the_fewest():
    target = engine(most_rows=4)
    for key in range(3):
        submit(target, key, ask(n=50, max_new_tokens=30, request_set="many"))
    target.step()
    events, answers = submit(target, 9, ask(n=4, max_new_tokens=3, request_set="few"))
    while not answers:
        target.step()
        mine = sum(row.job.request.request_set == "few" for row in target._batch.rows)
        assert mine <= 2 or len(events) > 1
    assert len([e for e in events if hasattr(e, "ids")]) == 4
    assert target.busy
    for key in range(3):
        target.cancel(key)


def test_a_paused_request_waits_and_then_gets_what_it_gets_alone():
    wanted = ask(n=4, max_new_tokens=12)
    alone = run(engine(), wanted)[0][0]
    target = engine()
    events, answers = submit(target, 1, wanted)
    _, other = submit(target, 2, ask(models.SEARCH, seed=9))
    for _ in range(3):
        target.step()
    target.pause(1, paused=True)
    count = len(events)
    while not other:
        target.step()
    assert not target.runnable
    for _ in range(3):
        target.step()
    assert (len(events), answers) == (count, [])
    target.pause(1, paused=False)
    while not answers:
        target.step()
    assert {e.index: (e.ids, e.logprob) for e in events if hasattr(e, "ids")} == alone


def test_a_request_says_in_its_own_words_when_it_ends():
    now = [0.0]
    target = Engine(fast(), budget=64 << 20, most_rows=1, clock=lambda: now[0])
    _, answers = submit(target, 1, ask(max_new_tokens=100, deadline_ms=1500))
    target.step()
    assert answers == []
    now[0] = 1.6
    target.step()
    assert answers[0].code == "model.deadline"


def test_forget_and_its_reply_are_read_back():
    assert parse_request(Forget("aB3").encode()) == Forget("aB3")
    assert parse_reply(Forgotten(2).encode()) == Forgotten(2)
