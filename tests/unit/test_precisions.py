"""Precisions in a bundle: measured, proven, carried with their price, and a policy's to forbid."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal

import policy_cases
import pytest
import tiny_llama
from policy_cases import demo_site
from policy_site import put_signed
from staging_runs import build_tiny
from test_gate import CLEAN, FAIR, entry
from test_staging_build import member
from test_staging_parity import MADE, PROMPTS, figures

from airgap.cli.precisions import count_valid, wanted_precisions
from airgap.gate import TaskFacts, decide_admission, decide_use
from airgap.install import InstalledBundle
from airgap.rules import load_rules
from airgap.serve.session import describe, require_precision, running
from bundle.graphs import parse_graphs
from bundle.manifest import Parity as Claim
from bundle.staging.convert import CPU, CUDA, Made
from bundle.staging.parity import MAX_KL, Completions, judge, statement
from bundle.staging.prompts import STEPS
from bundle.vectors import canonical_vectors, parse_vectors
from policy.errors import FaultError, RefusedError, UsageError

INT8 = Made(
    "fast-int8", "shared", "x", (), frozenset(), None, precision="int8", codes="int8.safetensors"
)
FP16 = Made("fast-fp16", "shared", "x", (), frozenset(), None, precision="fp16")
BF16 = replace(FP16, name="fast-bf16", precision="bf16", stand_in="s", provider=CUDA)


CODES = {
    "step": "5.000e-01",
    "scale": "0.000e+00",
    "prompts": [0, 6, 22],
    "full": "1.200e-05",
    "past": "1.300e-05",
}


def measured(made, proof=None, **changes):
    """Return figures of a run that also measured `made`; `proof` is laid over those of codes."""
    rows = [
        {
            "index": index,
            "ids": [2, 8],
            "greedy": list(range(STEPS)),
            "agree": STEPS // 2,
            "top": [[1, "2.000000e+00"]],
            "kl": "6.5e-02",
            "same": 60,
            "positions": 65,
            "delta": "1.0e-01",
            **({"codes": {"kl": "1e-3", "part": "2e-2", "positions": 65}} if made.codes else {}),
            **changes,
        }
        for index in range(len(PROMPTS))
    ]
    said = {"index": 0, "kind": "molecule"}
    samples = [{**said, "completions": [{"text": "CC", "finish": "eos", "tokens": 3}] * 4}]
    found = {"provider": CPU, "rows": rows, "samples": samples}
    if made.codes:
        codes = {**CODES, **(proof or {})}
        found["codes"] = {name: value for name, value in codes.items() if value is not None}
    heads = dict.fromkeys(("fast", made.name), "1.0e-06")
    return figures(precisions={made.name: found}, samples=samples, heads=heads)


def proof(made, value):
    return judge(value, PROMPTS, expected=(*MADE, made))


@pytest.mark.parametrize("made", [INT8, FP16, BF16], ids=lambda made: made.precision)
def test_a_precision_is_described_by_its_figures(made):
    found = proof(made, measured(made))
    (one,) = found.measured
    assert one.kl == Decimal("0.001")
    assert one.top1 == Decimal("0.9231")
    assert one.greedy == Decimal("0.5")
    counted = iter((3, 2))
    fp32, other = found.vectors_documents("tiny", lambda _: next(counted))
    assert fp32.measured is None
    assert other.precision == made.precision
    (task,) = other.measured.tasks
    assert (task.samples, task.valid_fp32, task.valid) == (4, 3, 2)
    assert "molecule valid 2 of 4 (fp32 3)" in other.measured.text
    assert ("rounded to bf16" in other.measured.measured_on) == (made is BF16)
    assert (one.codes is not None) == (made is INT8)
    raw = canonical_vectors(other)
    assert (b"airgap-parity-vectors/2" in raw) == (b'"exact"' in raw) == (made is INT8)
    if made is INT8:
        assert other.measured.codes.exact == "0.00001300"
        assert "codes exact to 1.3e-5 in a logit" in other.measured.text
        told = json.loads(statement(found, {}, {}))["predicate"]["configuration"][-1]
        assert told["annotations"]["codes_exact_max_delta"] == "0.00001300"


@pytest.mark.parametrize(
    "change",
    [
        {"codes": {"kl": "1e-3", "part": "0.2501", "positions": 65}},
        {"codes": {"kl": "1e-3", "part": "nan", "positions": 65}},
        {"codes": {"kl": "1e-3", "part": "-1e-9", "positions": 65}},
        *({"proof": {name: None}} for name in CODES),
        *({"proof": {name: value}} for name in ("full", "past") for value in ("1.001e-03", "nan")),
        {"proof": {"step": "5.011e-01"}},
        {"proof": {"scale": "1.001e-06"}},
        {"proof": {"step": "nan"}},
        {"proof": {"scale": "-1e-9"}},
        {"proof": {"prompts": []}},
        {"proof": {"prompts": [0, 6, 6]}},
        {"proof": {"prompts": [0, 6, 99]}},
        {"proof": {"prompts": [0, 6, -1]}},
        {"proof": {"prompts": 3}},
        {"codes": {"kl": "-inf", "part": "2e-2", "positions": 65}},
        {"codes": {"kl": "1e-3", "part": "2e-2", "positions": 64}},
        {"codes": {"kl": "1e-3", "positions": 65}},
        {"codes": None},
        {"kl": "nan"},
        {"delta": "inf"},
        {"same": 66},
        {"agree": STEPS + 1},
        {"positions": 0},
        {"greedy": [1]},
        {"ids": [2, 9]},
        {"top": []},
        {"same": "60"},
    ],
    ids=str,
)
def test_codes_that_are_not_what_they_stand_for_or_odd_figures_fail(change):
    assert proof(INT8, measured(INT8))
    if change == {"top": []}:
        with pytest.raises(ValueError, match="top_logits"):
            proof(INT8, measured(INT8, **change)).vectors_documents("tiny")
        return
    with pytest.raises(RefusedError) as caught:
        proof(INT8, measured(INT8, **change))
    assert caught.value.code == "parity.failed"


def test_the_exact_twin_ran_the_longest_prompt_too():
    for prompts, passes in (([0, 6, 22, 7], True), ([0, 6, 22], False)):
        value = measured(INT8, {"prompts": prompts})
        for rows in (value["rows"], value["precisions"][INT8.name]["rows"]):
            rows[7]["ids"] = [2, 8, 9]
        if passes:
            assert proof(INT8, value)
            continue
        with pytest.raises(RefusedError) as caught:
            proof(INT8, value)
        assert "longest" in caught.value.message


def test_sixteen_bits_that_are_another_model_fail():
    most = MAX_KL * 65
    assert proof(FP16, measured(FP16, kl=str(most)))
    with pytest.raises(RefusedError) as caught:
        proof(FP16, measured(FP16, kl=str(most + 1)))
    assert "divergence" in caught.value.message


@pytest.mark.parametrize(
    "where", ["left out", "another", "one prompt less", "no codes", "no samples"]
)
def test_every_precision_is_covered_on_every_prompt(where):
    value = deepcopy(measured(INT8))
    if where == "left out":
        value["precisions"] = {}
    elif where == "another":
        value["precisions"]["fast-int4"] = value["precisions"]["fast-int8"]
    elif where == "one prompt less":
        value["precisions"]["fast-int8"]["rows"].pop()
    elif where == "no codes":
        del value["precisions"]["fast-int8"]["codes"]
    else:
        del value["precisions"]["fast-int8"]["samples"]
    with pytest.raises(RefusedError) as caught:
        proof(INT8, value)
    assert caught.value.code == "parity.failed"


def test_codes_of_an_older_build_are_read_and_told_and_no_format_is_mixed():
    (_, document) = proof(INT8, measured(INT8)).vectors_documents("tiny")
    now = json.loads(canonical_vectors(document))
    claim = Claim(model="tiny", precision="int8", provider=CPU, tolerance="0.5", vectors="v")

    def read(value):
        return parse_vectors(
            json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), claim
        )

    assert read(now) == document
    old = {**deepcopy(now), "format": "airgap-parity-vectors/1"}
    del old["measured"]["codes"]
    assert "not proven exactly" in read(old).measured.text
    figures_of = [
        {"exact": "1e-5"},
        *(
            {"exact": exact, "part": part}
            for exact, part in (
                ("x", "1e-2"),
                ("0.0011", "1e-2"),
                ("-1e-9", "1e-2"),
                ("1e-5", "0.26"),
                ("1e-5", "-0.1"),
            )
        ),
    ]
    wrong = [
        {**old, "format": now["format"]},
        {**now, "format": old["format"]},
        {**now, "format": "airgap-parity-vectors/3"},
        *({**now, "measured": {**now["measured"], "codes": codes}} for codes in figures_of),
    ]
    for value in wrong:
        with pytest.raises(RefusedError) as caught:
            read(value)
        assert caught.value.code == "manifest.vectors"


# -- a build --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precisions")
    snapshot = tiny_llama.write_snapshot(folder / "tiny")
    return build_tiny(
        snapshot,
        folder / "tiny.agb",
        precisions=("int8", "bf16"),
        reference=False,
        assess=lambda completions: len(completions.items) // 2,
    )


def installed(built, folder):
    return InstalledBundle(folder, built.manifest, built.manifest.digest)


def test_a_bundle_carries_its_precisions_with_vectors_recipe_and_price(built):
    manifest = built.manifest
    assert manifest.models[0].precisions == ("fp32", "bf16", "int8")
    assert {claim.precision: claim.provider for claim in manifest.parity} == {
        "fp32": CPU,
        "bf16": CUDA,
        "int8": CPU,
    }
    codes = manifest.find("payload/tiny/int8.safetensors")
    weights = manifest.find("payload/tiny/model.safetensors")
    assert codes.origin is None
    assert codes.derived_from == (f"sha256:{weights.sha256}",)
    assert manifest.published_weights("tiny") == (weights,)
    assert manifest.find("payload/tiny/model.onnx") is None  # no reference graph was asked for
    by_name = {vectors.precision: vectors for vectors in built.vectors}
    assert "block" in by_name["int8"].measured.recipe
    assert all(task.samples == 32 for task in by_name["int8"].measured.tasks)
    assert by_name["bf16"].measured.recipe == ""
    statement = json.loads(member(built.path, "META/attest/conversion.json"))
    recipes = statement["predicate"]["buildDefinition"]["externalParameters"]["recipes"]
    assert recipes == {"int8.safetensors": by_name["int8"].measured.recipe}
    graphs = parse_graphs(member(built.path, "payload/tiny/graphs.json"))
    assert [graph.precision for graph in graphs.graphs] == ["fp32", "bf16", "int8"]


def test_the_policy_sees_at_use_the_one_that_runs(built, tmp_path):
    bundle = installed(built, tmp_path)
    assert running(bundle, "int8").manifest.models[0].precisions == ("int8",)
    assert bundle.manifest.models[0].precisions == ("fp32", "bf16", "int8")


def decide(rules, bundle, *, use):
    shared = {"bundle_digest": policy_cases.BUNDLE, "project": FAIR, "as_of": policy_cases.DAY}
    models = [entry(precisions=bundle.manifest.models[0].precisions)]
    if not use:
        return decide_admission(
            demo_site(), rules, models, known_at=policy_cases.NOW, verified=True, **shared
        )
    return decide_use(
        demo_site(),
        rules,
        models,
        person="ada",
        task=TaskFacts("molecule", "molecule"),
        screen=CLEAN,
        known_at=policy_cases.NOW,
        admitted=True,
        hazard_holds=0,
        **shared,
    )


def test_a_site_forbids_a_precision_at_admission_or_at_use(built, tmp_path):
    bundle = installed(built, tmp_path)
    no_int8 = "{contains: [bundle.precisions, int8]}"
    for scope in ("admission", "use"):
        root = tmp_path / scope
        root.mkdir()
        text = policy_cases.pack_text(
            policy_cases.rule(id="SITE-NO-INT8", scope=scope, when=no_int8), pack_id="site"
        )
        put_signed(root, "own.yaml", text)
        rules = load_rules(root)
        use = scope == "use"
        forbidden = decide(rules, running(bundle, "int8") if use else bundle, use=use)
        assert policy_cases.blocking(forbidden) == {"SITE-NO-INT8"}
        allowed = decide(rules, running(bundle, "fp32"), use=use)
        assert not policy_cases.blocking(allowed)


@pytest.mark.parametrize("precision", ["int4", "bf16"])
def test_a_precision_that_is_not_there_or_not_for_this_provider_is_refused(
    built, tmp_path, precision
):
    bundle = installed(built, tmp_path)
    require_precision(bundle, "int8")
    with pytest.raises(RefusedError) as caught:
        describe(bundle, precision)
    assert caught.value.code == "model.precision"


def test_an_unknown_precision_is_a_mistake_of_usage():
    assert wanted_precisions(None) == ("fp32",)
    assert wanted_precisions(["int8"]) == ("int8",)
    with pytest.raises(UsageError) as caught:
        wanted_precisions(["int8-dynamic"])
    assert "dynamic" in caught.value.hint


class Refusing:
    def __init__(self, code):
        self.code = code

    def request(self, _payload, _timeout):
        raise RefusedError(self.code, "no")


def test_completions_of_no_task_are_not_counted_and_a_broken_helper_is_a_fault():
    said = Completions(PROMPTS[0], (("CC", "eos", 3),))
    assert count_valid(Refusing("prompt.g05"), said) is None
    with pytest.raises(FaultError):
        count_valid(Refusing("request.malformed"), said)
    other = Completions(replace(PROMPTS[0], kind="poem"), said.items)
    assert count_valid(Refusing("science.reply"), other) is None
