"""The judge of parity: every figure is checked; a missing or odd one fails, and a near miss."""

from __future__ import annotations

import contextlib
import json
from copy import deepcopy
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from staging_runs import Result

from bundle.manifest import Parity as ParityClaim
from bundle.staging.convert import Made
from bundle.staging.parity import judge, prove_parity, statement
from bundle.staging.prompts import KINDS, MIN_PROMPTS, STEPS, fewest_pieces, load_prompts
from bundle.vectors import canonical_vectors, parse_vectors
from policy.errors import AirgapError, FaultError, RefusedError

PROMPTS = load_prompts()[0]
GRAPHS = ("fast", "reference")
MADE = (
    Made("fast", "shared", "fast.onnx", (), frozenset(), None),
    Made("reference", "past", "model.onnx", (), frozenset(), None),
)


def figures(**changes):
    rows = [
        {
            "index": index,
            "ids": [2, 8],
            "source": list(range(STEPS)),
            "graphs": {
                "fast": {"greedy": list(range(STEPS)), "full": "1.5e-06", "past": "2.0e-06"},
                "reference": {"greedy": list(range(STEPS)), "full": "1.0e-06", "past": "2.5e-06"},
            },
            "margin": "1.0e-02",
            "top": [[1, "2.0e+00"]],
        }
        for index in range(len(PROMPTS))
    ]
    base = {
        "rows": rows,
        "heads": {"fast": "3.0e-06"},
        "skipped": [],
        "versions": {"torch": "2"},
        "provider": "CPU",
        "steps": STEPS,
    }
    return {**base, **changes}


def prove(folder, run):
    out = folder / "out"
    return prove_parity(folder, folder, out, made=MADE, start=None, run_sealed=run, memory_mb=1)


def refused(value) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        judge(value, PROMPTS, expected=MADE)
    return caught.value


def test_the_packaged_prompts_are_enough_and_credited():
    prompts, sources = load_prompts()
    assert len(prompts) >= MIN_PROMPTS
    assert {prompt.kind for prompt in prompts} == KINDS
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(prompt.source for prompt in prompts)
    assert all(item["licence"] for item in sources)


@pytest.mark.parametrize(
    "heads",
    [
        None,
        {},
        [],
        {"reference": "1e-6"},
        {"fast": "1e-6", "other": "1e-6"},
        {"fast": "2e-3"},
        {"fast": "-1e-6"},
        {"fast": "nan"},
        {"fast": "inf"},
        {"fast": "much"},
        {"fast": None},
        {"fast": []},
    ],
    ids=str,
)
def test_a_head_that_is_not_proven_fails(heads):
    assert refused(figures(heads=heads)).code == "parity.failed"


def test_a_proof_without_a_fast_graph_says_nothing_of_a_head():
    value = figures(heads={})
    for row in value["rows"]:
        del row["graphs"]["fast"]
    parity = judge(value, PROMPTS, expected=MADE[1:])
    assert parity.head is None
    assert b"max_delta_of_head" not in statement(parity, {}, {})


def test_sound_figures_are_a_proof():
    parity = judge(figures(), PROMPTS, expected=MADE)
    assert (parity.full, parity.past) == (Decimal("1.5e-06"), Decimal("2.5e-06"))
    assert parity.head == Decimal("3.0e-06")
    (document,) = parity.vectors_documents("tiny")
    assert len(document.vectors) == len(PROMPTS)
    assert document.vectors[0].greedy_ids == tuple(range(STEPS))
    raw = canonical_vectors(document)
    claim = ParityClaim(
        model="tiny", precision="fp32", provider="CPU", tolerance="0.001", vectors="v"
    )
    assert parse_vectors(raw, claim) == document
    raw = statement(parity, {"payload/m/model.onnx": "0" * 64}, {"model.safetensors": "1" * 64})
    assert json.loads(raw)["predicate"]["result"] == "PASSED"


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("field", ["full", "past"])
@pytest.mark.parametrize("value", ["1.001e-03", "nan", "inf", "-1e-09", "1", "x", None, []])
def test_a_delta_beyond_the_tolerance_or_no_number_fails(graph, field, value):
    rows = deepcopy(figures()["rows"])
    rows[3]["graphs"][graph][field] = value
    assert refused(figures(rows=rows)).code == "parity.failed"
    rows[3]["graphs"][graph][field] = "1.000e-03"
    assert judge(figures(rows=rows), PROMPTS, expected=MADE)


def test_one_other_token_fails_and_is_named():
    rows = deepcopy(figures()["rows"])
    rows[5]["graphs"]["fast"]["greedy"][40] = 7
    error = refused(figures(rows=rows))
    assert error.code == "parity.failed"
    assert f"token 41 of {STEPS}" in error.message


@pytest.mark.parametrize("tokens", [[], list(range(STEPS - 1)), "abc", [1.5] * STEPS, [-1] * STEPS])
def test_other_than_64_tokens_fails(tokens):
    rows = deepcopy(figures()["rows"])
    rows[0]["source"] = tokens
    for found in rows[0]["graphs"].values():
        found["greedy"] = tokens
    assert refused(figures(rows=rows)).code == "parity.failed"


@pytest.mark.parametrize("where", ["everywhere", "in one row", "another"])
def test_a_graph_that_was_made_must_be_covered_by_every_row(where):
    rows = deepcopy(figures()["rows"])
    for row in rows if where == "everywhere" else rows[4:5]:
        del row["graphs"]["fast"]
    if where == "another":
        rows[4]["graphs"]["other"] = rows[4]["graphs"]["reference"]
    assert refused(figures(rows=rows)).code == "parity.failed"


def test_the_same_prompt_twice_fails():
    rows = figures()["rows"]
    assert refused(figures(rows=[*rows, rows[0]])).code == "parity.failed"


def test_too_few_prompts_or_a_missing_kind_is_no_proof():
    rows = figures()["rows"]
    assert refused(figures(rows=rows[: MIN_PROMPTS - 1])).code == "parity.vectors"
    without = [row for row in rows if PROMPTS[row["index"]].kind != "material"]
    skipped = [
        {"index": n, "reason": "the tokenizer lacks a token"}
        for n, prompt in enumerate(PROMPTS)
        if prompt.kind == "material"
    ]
    assert len(without) >= MIN_PROMPTS
    error = refused(figures(rows=without, skipped=skipped))
    assert error.code == "parity.vectors"
    assert "material" in error.message
    assert "lacks a token" in error.message


@pytest.mark.parametrize("key", ["rows", "skipped", "versions", "provider"])
def test_missing_parts_fail(key):
    value = figures()
    del value[key]
    assert refused(value).code == "parity.failed"


JSON = some.recursive(
    some.none() | some.booleans() | some.integers(-5, 99) | some.text(max_size=5),
    lambda inner: (
        some.lists(inner, max_size=4)
        | some.dictionaries(some.sampled_from(list(figures()["rows"][0])), inner, max_size=8)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(some.dictionaries(some.sampled_from(list(figures())), JSON | some.lists(JSON, max_size=3)))
def test_any_figures_are_judged_or_refused(changes):
    with contextlib.suppress(AirgapError):
        judge(figures(**changes), PROMPTS, expected=MADE)


@pytest.mark.parametrize(
    ("left", "code"),
    [
        ({}, "parity.failed"),
        ({"parity.json": b"{}"}, "parity.failed"),
        ({"parity.json": b'{"a":1,"a":2}'}, "parity.failed"),
        ({"parity.json": b"{}", "extra": b""}, "parity.failed"),
    ],
)
def test_what_a_run_leaves_is_not_believed(tmp_path, left, code):
    def run(job):
        for name, content in left.items():
            (job.out / name).write_bytes(content)
        return Result()

    with pytest.raises(RefusedError) as caught:
        prove(tmp_path, run)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "result",
    [Result(1, stderr="Traceback\nRuntimeError: no"), Result(None, 9, ""), Result(137)],
    ids=["error", "killed", "status"],
)
def test_a_run_that_does_not_finish_is_a_fault(tmp_path, result):
    with pytest.raises(FaultError) as caught:
        prove(tmp_path, lambda _: result)
    assert caught.value.code == "parity.run"
    assert "Traceback" not in caught.value.message


def test_a_full_disk_inside_the_seal_is_told_as_such(tmp_path):
    full = Result(1, stderr="OSError: [Errno 28] No space left on device: 'x'")
    with pytest.raises(FaultError) as caught:
        prove(tmp_path, lambda _: full)
    assert caught.value.code == "host.space"


@given(some.lists(some.sampled_from(["<MoleculeS>", "C", "Cl", "c1"]), max_size=12))
def test_the_fewest_pieces_of_a_prompt_are_never_more_than_a_tokenizer_needs(words):
    known = {"<MoleculeS>": 0, "C": 1, "Cl": 2, "c1": 3, "CC": 4}
    fewest = fewest_pieces("".join(words), known)
    assert fewest is not None
    assert fewest <= len(words)
    assert fewest_pieces("".join([*words, "N"]), known) is None
