"""One policy decision with a full trace of all rules, and the loading of the packs.

Obeys docs/design/policy.md, 15: less than 200 microseconds for the median of single decisions,
less than 50 ms to parse, validate and compile the packs. No peer does the whole of this work, so
the required figures stand in their place. Beside them stand two engines that decide the two-valued
part of the same request: cedarpy on the policies of our own export (deny rules alone, all facts
known) and regopy on the deny rules without lineage; neither has a trace, unknowns or obligations.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import Context, Result, alone, paired

import policy.strict
from airgap.model_facts import registry_facts
from airgap.rules import Rules, load_rules
from policy import Decision, Request, Start, cedar, combine, decide, parse_pack
from policy.logic import All, AnyPath, Comparison, Condition, Not
from policy.logic import Any as AnyOf
from policy.pack import Rule
from policy.terms import Fact, Known, Scope, Value

DAY = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DECISIONS = 500  # in one measured run
PEER_DECISIONS = 300
REGO_DECISIONS = 30
REQUIRED_US = 200.0
REQUIRED_LOAD_MS = 50.0

USE: dict[str, Value] = {
    "institution.state": "MA",
    "institution.public": False,
    "system.owner": "institution",
    "system.ic_nss": False,
    "system.state_business": False,
    "performance.dod_contract": False,
    "project.sponsors": frozenset({"NIH"}),
    "project.instrument": "grant",
    "project.federal_funds": True,
    "project.active": True,
    "project.closed": False,
    "person.on_project": True,
    "person.training_current": True,
    "bundle.admitted": True,
    "task.action": "infer",
    "task.action_allowed": True,
    "task.modality": "retrosynthesis",
    "task.subjects": frozenset(),
    "data.markings": frozenset(),
    "data.export_class": "fundamental_research",
    "screen.status": "complete",
    "screen.tier": 0,
    "screen.target_tier": 0,
    "screen.classes": frozenset(),
    "screen.repeated_probing": False,
}
ADMISSION: dict[str, Value] = {
    "institution.state": "MA",
    "institution.public": False,
    "system.owner": "institution",
    "system.ic_nss": False,
    "system.state_business": False,
    "performance.dod_contract": True,
    "project.sponsors": frozenset({"DoD"}),
    "project.instrument": "contract",
    "project.federal_funds": True,
    "deliverable.to_dod": True,
    "deliverable.embeds_model_or_output": True,
    "transaction.buyer": "institution",
    "transaction.kind": "free_download",
    "data.markings": frozenset({"CUI"}),
    "bundle.verified": True,
    "bundle.manifest_complete": True,
    "bundle.provenance_level": 1,
    "bundle.licence_texts_recorded": True,
}


def run(context: Context) -> list[Result]:
    """Measure a clean use, an admission that walks much lineage, and the load of the packs."""
    rules = load_rules(None)
    cases = (
        ("policy decision, use", Scope.USE, "logos-ref-tiny", USE),
        ("policy decision, admission of LOGOS-8B", Scope.ADMISSION, "logos-8b", ADMISSION),
    )
    results = []
    for name, scope, model, values in cases:
        context.step(name)
        request = _request(scope, model, values, rules)
        decision = _decide(request, rules)
        figures = alone(
            lambda request=request: _microseconds(request, rules), REQUIRED_US, context.runs
        )
        results.append(
            figures.lower_is_better(
                name,
                unit="us",
                target=1.0,
                peer_is="the required figure",
                rules=len(decision.results),
                leaves=len(decision.evaluator.program.leaves),
                outcome=str(decision.outcome),
                record_bytes=len(decision.canonical),
                record_ms=round(_record_ms(request, rules), 3),
            )
        )
    results += _peers(rules, context)
    context.step("policy load")
    contents = [path.read_bytes() for path in _pack_files()]
    figures = alone(lambda: _load_ms(contents), REQUIRED_LOAD_MS, context.runs)
    results.append(
        figures.lower_is_better(
            "policy load of all packs",
            unit="ms",
            target=1.0,
            peer_is="the required figure",
            rules=len(rules.packs.rules),
            bytes=sum(map(len, contents)),
        )
    )
    return results


WHOLE: dict[str, Value] = {
    **USE,
    "system.cui_authorised": True,
    "system.in_ssp": True,
    "system.crypto_recorded": True,
    "person.us_person": True,
    "person.export_licence": False,
    "bundle.licences": frozenset({"apache-2.0"}),
    "bundle.tuned_on_nih_ca": False,
    "output.max_sequence_nt": 0,
}


def _peers(rules: Rules, context: Context) -> list[Result]:
    """The same use, every fact known, on other engines, in the same run."""
    starts = dict.fromkeys(("bundle", "base_bundles", "recipient"), Start())
    facts: dict[str, Fact] = {name: Known(value, "benchmark") for name, value in WHOLE.items()}
    request = Request(scope=Scope.USE, facts=facts, starts=starts)
    decision = _decide(request, rules)
    found = []
    for name, make in (("cedarpy", _cedar), ("regopy", _rego)):
        context.step(f"policy decision beside {name}")
        try:
            measure, version, more = make(decision, rules)
        except ImportError:
            continue
        figures = paired(lambda: _microseconds(request, rules), measure, context.runs)
        found.append(
            figures.lower_is_better(
                f"policy decision, use, beside {name}",
                unit="us",
                target=1.0,
                peer_is=f"{name} {version}",
                **more,
            )
        )
    return found


Peer = tuple[Callable[[], float], str, dict[str, Any]]


def _cedar(decision: Decision, rules: Rules) -> Peer:
    import cedarpy

    made = cedar.export(rules.packs)
    policies, schema = (
        cedarpy.PolicySet.from_str(made.policies),
        cedarpy.Schema.from_str(made.schema),
    )
    entities = cedarpy.Entities.from_json_str("[]")
    question = {
        "principal": 'Airgap::Person::"somebody"',
        "action": 'Airgap::Action::"use_unforbidden"',
        "resource": 'Airgap::Bundle::"some"',
        "context": cedar.context_of(decision.evaluator, decision.evaluation, rules.packs),
    }
    answer = cedarpy.is_authorized(question, policies, entities, schema)
    if not answer.allowed or answer.diagnostics.errors:
        raise RuntimeError(f"cedar answers otherwise: {answer.diagnostics.errors}")

    def measure() -> float:
        return _median_us(
            lambda: cedarpy.is_authorized(question, policies, entities, schema), PEER_DECISIONS
        )

    return measure, version("cedarpy"), {"peer_does": "deny rules; policies parsed once"}


def _rego(decision: Decision, rules: Rules) -> Peer:
    from regopy import Interpreter

    context = cedar.context_of(decision.evaluator, decision.evaluation, rules.packs)
    denies = [
        each.rule
        for each in rules.packs.programs[Scope.USE].rules
        if each.rule.text.effect == "deny"
        and not any(isinstance(leaf, AnyPath) for leaf in each.rule.leaves())
    ]
    engine = Interpreter()
    lines = [line for rule in denies for line in _rego_rules(rule)]
    engine.add_module("airgap", "package airgap\nimport rego.v1\n" + "\n".join(lines))
    engine.set_input(context)
    if '"HAZ' in str(engine.query("data.airgap.deny")):
        raise RuntimeError("regopy answers otherwise")

    def ask() -> None:
        engine.set_input(context)
        engine.query("data.airgap.deny")

    def measure() -> float:
        return _median_us(ask, REGO_DECISIONS)

    more = {"peer_does": f"{len(denies)} deny rules without lineage; module added once"}
    return measure, version("regopy"), more


def _rego_rules(rule: Rule) -> list[str]:
    """A deny rule as one Rego rule for each way in which it can fire."""
    ways = [[]]
    for part in (rule.applies_when, rule.when):
        ways = [[*one, *other] for one in ways for other in _ways(part, positive=True)]
    head = f'deny contains "{rule.id}" if'
    return [f"{head} {{ {'; '.join(way) or 'true'} }}" for way in ways]


def _ways(condition: Condition, *, positive: bool) -> list[list[str]]:
    match condition:
        case Not(part):
            return _ways(part, positive=not positive)
        case All(parts) | AnyOf(parts):
            inner = [_ways(part, positive=positive) for part in parts]
            if isinstance(condition, All) is positive:
                found: list[list[str]] = [[]]
                for each in inner:
                    found = [[*one, *other] for one in found for other in each]
                return found
            return [way for each in inner for way in each]
        case _:
            text = _rego_leaf(condition)
            return [[text if positive else f"not {text}"]]


_REGO_SIGNS = {"eq": "==", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


def _rego_leaf(leaf: Comparison) -> str:
    value = leaf.operand
    literal = json.dumps(sorted(value) if isinstance(value, frozenset) else value)
    fact = f"input.{leaf.fact}"
    match leaf.form:
        case "contains":
            return f"{literal} in {fact}"
        case "in":
            return f"{fact} in {literal}"
        case "intersects":
            return f"count({{x | some x in {fact}; x in {literal}}}) > 0"
        case form:
            return f"{fact} {_REGO_SIGNS[form]} {literal}"


def _request(scope: Scope, model: str, values: dict[str, Value], rules: Rules) -> Request:
    about = registry_facts(model, rules.registry)
    stated: dict[str, Fact] = {name: Known(value, "benchmark") for name, value in values.items()}
    return Request(scope=scope, facts={**about.facts, **stated}, starts=about.starts)


def _decide(request: Request, rules: Rules) -> Decision:
    return decide(request, rules.packs, rules.lists, rules.registry, as_of=DAY, known_at=NOW)


def _microseconds(request: Request, rules: Rules) -> float:
    return _median_us(lambda: _decide(request, rules), DECISIONS)


def _median_us(call: Callable[[], object], times: int) -> float:
    """Wall time of the median call: one that the machine interrupted does not speak for others."""
    found = []
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - start)
    return statistics.median(found) / 1e3


def _record_ms(request: Request, rules: Rules) -> float:
    """Time of the canonical record with its search for the next change."""
    decision = _decide(request, rules)
    start = time.perf_counter()
    decision.canonical  # noqa: B018 - computed on first access
    return (time.perf_counter() - start) * 1e3


def _load_ms(contents: list[bytes]) -> float:
    start = time.perf_counter()
    combine([parse_pack(content) for content in contents])
    return (time.perf_counter() - start) * 1e3


def _pack_files() -> list[Path]:
    return sorted((Path(policy.strict.__file__).parent / "packs").glob("*.yaml"))


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
