"""The two-valued part of the engine against Cedar, on the policies that the export writes."""

from __future__ import annotations

import json
import random
from datetime import date

import pytest
from policy_cases import NOW

from policy import Origin, Request, Snapshots, Start, decide, parse_lineage, parse_lists, unite
from policy.cedar import LEFT_OUT, LEVELS, context_of, export, outcome_of
from policy.terms import FACTS, FactSpec, Kind, Known, Outcome, Scope, Unknown

from policy_cases import RULES  # isort: skip

cedarpy = pytest.importorskip("cedarpy", reason="cedarpy is not installed")

EXPORT = export(RULES.packs)
DAYS = sorted(
    {
        date.fromordinal(day.toordinal() + step)
        for rule in RULES.packs.rules
        for window in rule.text.valid
        for day in (window.start, window.end)
        if day is not None
        for step in (-1, 0, 1)
    }
    | {date(2026, 11, 23), date(2024, 2, 29)}
)
LISTS = parse_lists(
    json.dumps(
        {
            "schema": "airgap/lists/1",
            "prepared_on": "2026-11-23",
            "snapshots": [
                {
                    "list_id": list_id,
                    "edition": "E1",
                    "status": "in_force",
                    "released": "2020-01-01",
                    "published": "2020-01-01",
                    "complete": True,
                    "names_in_edition": 1,
                    "citation": "a made-up list",
                    "source_url": None,
                    "source_sha256": None,
                    "source": "institutional",
                    "retrieved_on": "2026-11-01",
                    "next_review_by": None,
                    "verify_before_release": False,
                    "note": None,
                    "entries": [
                        {
                            "names": ["Listed Co"],
                            "listed_as": "listed",
                            "released": {"from": "2025-06-01", "to": None},
                            "published": {"from": "2026-07-01", "to": None},
                            "source": "institutional",
                            "confidence": "high",
                            "verify_before_release": False,
                            "note": None,
                        }
                    ],
                }
                for list_id in sorted(RULES.packs.list_ids)
            ],
        }
    ).encode()
)
PARTY = {
    "kind": "legal_person",
    "legal_name": None,
    "source": "institutional",
    "confidence": "high",
    "litigation_watch": False,
    "verify_before_release": False,
    "note": None,
}
EDGE = {
    "valid": {"from": None, "to": None},
    "status": "asserted",
    "citation": "made up",
    "source": "institutional",
    "confidence": "high",
    "checked_on": None,
    "reviewer": None,
    "verify_before_release": False,
    "note": None,
}
REGISTRY = unite(
    [
        parse_lineage(
            json.dumps(
                {
                    "schema": "airgap/lineage/1",
                    "registry_version": 1,
                    "prepared_on": "2026-11-23",
                    "status": "draft",
                    "reviewer": None,
                    "parties": [
                        {**PARTY, "id": "listed", "names": ["Listed Co"], "domicile": "CN"},
                        {**PARTY, "id": "owned", "names": ["Owned Co"], "domicile": "US"},
                        {**PARTY, "id": "clear", "names": ["Clear Co"], "domicile": "US"},
                    ],
                    "edges": [
                        {
                            **EDGE,
                            "id": f"E-{number}",
                            "subject": "owned",
                            "relation": relation,
                            "object": "listed",
                        }
                        for number, relation in enumerate(("controlled_by", "owned_50_by"), 1)
                    ],
                    "models": [],
                    "list_findings": [],
                    "adjudications": [],
                }
            ).encode()
        )
    ]
)
MAKERS = ("developed_by", "codeveloped_by", "fine_tuned_by", "distributed_by")


def any_value(random_: random.Random, spec: FactSpec):
    match spec.kind:
        case Kind.BOOL:
            return random_.random() < 0.6
        case Kind.INT:
            return random_.choice((0, 1, 2, 3, 4, 49, 50, 51))
        case Kind.DATE:
            return random_.choice(DAYS)
        case Kind.ENUM:
            return random_.choice(sorted(spec.members))
        case _:
            members = sorted(spec.members or ("apache-2.0", "llama-3.2-community", "mit"))
            return frozenset(random_.sample(members, random_.choice((0, 1, 1, 2))))


def made_up(random_: random.Random, scope: Scope) -> Request:
    """A request in which every fact is known; its values lean to those that rules name."""
    facts = {
        name: Known(any_value(random_, spec), "made up")
        for name, spec in FACTS.items()
        if not spec.derived
    }
    if random_.random() < 0.7:  # mostly close to a permit, or everything is denied by default
        for name in ("verified", "manifest_complete", "licence_texts_recorded", "admitted"):
            facts[f"bundle.{name}"] = Known(True, "made up")
        facts["bundle.provenance_level"] = Known(2, "made up")
        facts["bundle.licences"] = Known(frozenset({"apache-2.0"}), "made up")
        for name in ("person.on_project", "person.training_current", "project.active"):
            facts[name] = Known(True, "made up")
        facts["task.action_allowed"] = Known(True, "made up")
        facts["screen.status"] = Known("complete", "made up")
        facts["screen.repeated_probing"] = Known(False, "made up")
        facts["screen.tier"] = Known(random_.choice((0, 0, 1, 2)), "made up")
        facts["screen.classes"] = Known(frozenset(), "made up")
        facts["data.export_class"] = Known("EAR99", "made up")
        facts["data.markings"] = Known(frozenset(), "made up")
    if facts["data.export_class"].value == "unreviewed":
        facts["data.export_class"] = Known("EAR99", "made up")
    if not facts["bundle.licences"].value:
        facts["bundle.licences"] = Known(frozenset({"mit"}), "made up")

    def start(relations):
        count = random_.choice((0, 0, 1, 2))
        return Start(
            tuple(
                Origin(
                    random_.choice(relations),
                    random_.choice(("listed", "owned", "clear")),
                    sure=True,
                    source="made up",
                )
                for _ in range(count)
            )
        )

    starts = {
        "bundle": start(MAKERS),
        "base_bundles": start(MAKERS),
        "counterparty": start(("self",)),
        "personnel": start(("affiliated_with",)),
        "recipient": start(("self",)),
    }
    return Request(scope=scope, facts=facts, starts=starts)


def cedar_request(scope, level, context):
    return {
        "principal": 'Airgap::Person::"somebody"',
        "action": f'Airgap::Action::"{scope}_{level}"',
        "resource": 'Airgap::Bundle::"some"',
        "context": context,
    }


def cedar_says(questions):
    """Outcome by Cedar of each (scope, context); an error counts as a denial."""
    requests = [
        cedar_request(scope, level, context) for scope, context in questions for level in LEVELS
    ]
    answers = cedarpy.is_authorized_batch(requests, EXPORT.policies, [], EXPORT.schema)
    found = []
    for at in range(0, len(answers), len(LEVELS)):
        three = answers[at : at + len(LEVELS)]
        allowed = {
            level: answer.allowed and not answer.diagnostics.errors
            for level, answer in zip(LEVELS, three, strict=True)
        }
        found.append(outcome_of(allowed))
    return found


def agree(count: int, seed: int) -> dict[Outcome, int]:
    random_ = random.Random(seed)
    questions, ours = [], []
    while len(questions) < count:
        scope = random_.choice(tuple(Scope))
        decision = decide(
            made_up(random_, scope),
            RULES.packs,
            Snapshots(LISTS),
            REGISTRY,
            as_of=random_.choice(DAYS),
            known_at=NOW,
        )
        context = context_of(decision.evaluator, decision.evaluation, RULES.packs)
        assert context is not None, "every fact and path is known"
        questions.append((scope, context))
        ours.append(decision.outcome)
    theirs = cedar_says(questions)
    for (scope, context), one, other in zip(questions, ours, theirs, strict=True):
        assert one == other, (scope, context)
    return {each: ours.count(each) for each in Outcome}


def test_the_export_is_valid_by_its_own_schema():
    result = cedarpy.validate_policies(EXPORT.policies, EXPORT.schema)
    assert result.validation_passed, [str(each) for each in result.errors]
    assert cedarpy.format_policies(EXPORT.policies)
    for rule in RULES.packs.rules:
        assert f'"{rule.id}/' in EXPORT.policies
    assert all(each in EXPORT.policies for each in LEFT_OUT)


def test_cedar_agrees_on_made_up_scenarios():
    found = agree(300, seed=1)
    assert all(found.values()), found


@pytest.mark.soak
def test_cedar_agrees_on_twelve_thousand_scenarios():
    found = agree(12_000, seed=2)
    assert all(count > 100 for count in found.values()), found


def test_an_unknown_fact_has_no_cedar_context():
    request = made_up(random.Random(3), Scope.USE)
    facts = {**request.facts, "task.action": Unknown()}
    decision = decide(
        Request(scope=Scope.USE, facts=facts, starts=request.starts),
        RULES.packs,
        Snapshots(LISTS),
        REGISTRY,
        as_of=DAYS[-1],
        known_at=NOW,
    )
    assert context_of(decision.evaluator, decision.evaluation, RULES.packs) is None


def test_what_cedar_lets_pass_on_a_missing_attribute_is_held_here():
    """A `forbid` that meets a missing attribute errs and is skipped: Cedar says Allow."""
    policies = (
        "permit(principal, action, resource);\n"
        "forbid(principal, action, resource) when { context.ready == false };"
    )
    request = {
        "principal": 'P::"p"',
        "action": 'Action::"a"',
        "resource": 'R::"r"',
        "context": {},
    }
    answer = cedarpy.is_authorized(request, policies, [])
    assert answer.allowed
    assert answer.diagnostics.errors, "it is told beside the answer, and easily missed"
    # Our export has a schema in which every attribute is required, and an error is a denial here.
    scope, context = Scope.USE, None
    random_ = random.Random(5)
    while context is None or cedar_says([(scope, context)]) == [Outcome.DENY]:
        decision = decide(
            made_up(random_, scope),
            RULES.packs,
            Snapshots(LISTS),
            REGISTRY,
            as_of=DAYS[-1],
            known_at=NOW,
        )
        context = context_of(decision.evaluator, decision.evaluation, RULES.packs)
    for group, fields in context.items():
        for name in list(fields) if isinstance(fields, dict) else []:
            less = {**context, group: {k: v for k, v in fields.items() if k != name}}
            assert cedar_says([(scope, less)]) == [Outcome.DENY], (group, name)
