"""One policy decision with a full trace of all rules, and the loading of the packs.

Obeys docs/design/policy.md, 15: less than 200 microseconds for a decision, less than 50 ms to
parse, validate and compile the packs. No peer does the same work, so the required figures stand in
their place.
"""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from pathlib import Path

from harness import Context, Result, alone

import policy.strict
from airgap.gate import Rules, load_rules
from airgap.model_facts import registry_facts
from policy import Decision, Request, combine, decide, parse_pack
from policy.terms import Fact, Known, Scope, Value

DAY = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DECISIONS = 500  # in one measured run
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


def _request(scope: Scope, model: str, values: dict[str, Value], rules: Rules) -> Request:
    about = registry_facts(model, rules.registry)
    stated: dict[str, Fact] = {name: Known(value, "benchmark") for name, value in values.items()}
    return Request(scope=scope, facts={**about.facts, **stated}, starts=about.starts)


def _decide(request: Request, rules: Rules) -> Decision:
    return decide(request, rules.packs, rules.lists, rules.registry, as_of=DAY, known_at=NOW)


def _microseconds(request: Request, rules: Rules) -> float:
    start = time.perf_counter()
    for _ in range(DECISIONS):
        _decide(request, rules)
    return (time.perf_counter() - start) / DECISIONS * 1e6


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
