"""Facts and small packs that the tests of the policy share."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from airgap.config import Site, parse_site
from airgap.rules import Rules, load_rules
from policy import Approvals, Decision, Origin, Request, Start, decide
from policy.terms import Digest, Fact, Known, Scope, Value

DAY = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
RULES: Rules = load_rules(None)
BUNDLE = Digest.of(b"a bundle")
DEMO = Path(__file__).parent / "data" / "site_demo.toml"


def demo_site() -> Site:
    return parse_site(DEMO.read_bytes())


def known(**values: Value) -> dict[str, Fact]:
    """Facts by name, with a double underscore for the dot."""
    return {name.replace("__", "."): Known(value, "test") for name, value in values.items()}


ADMISSION = known(
    institution__state="MA",
    institution__public=False,
    system__owner="institution",
    system__ic_nss=False,
    system__state_business=False,
    performance__dod_contract=False,
    project__sponsors=frozenset({"NIH"}),
    project__instrument="grant",
    project__federal_funds=True,
    deliverable__to_dod=False,
    deliverable__embeds_model_or_output=False,
    transaction__buyer="institution",
    transaction__kind="free_download",
    data__markings=frozenset(),
    bundle__verified=True,
    bundle__manifest_complete=True,
    bundle__provenance_level=1,
    bundle__licence_texts_recorded=True,
    bundle__licences=frozenset({"apache-2.0"}),
    bundle__modalities=frozenset({"molecule"}),
)
USE = known(
    institution__state="MA",
    institution__public=False,
    system__owner="institution",
    system__ic_nss=False,
    system__state_business=False,
    system__cui_authorised=True,
    system__in_ssp=True,
    system__crypto_recorded=True,
    performance__dod_contract=False,
    project__sponsors=frozenset({"NIH"}),
    project__instrument="grant",
    project__federal_funds=True,
    project__active=True,
    project__closed=False,
    person__on_project=True,
    person__training_current=True,
    person__us_person=True,
    bundle__admitted=True,
    bundle__licences=frozenset({"apache-2.0"}),
    bundle__tuned_on_nih_ca=False,
    task__action="infer",
    task__action_allowed=True,
    task__modality="molecule",
    task__subjects=frozenset(),
    data__markings=frozenset(),
    data__export_class="fundamental_research",
    screen__status="complete",
    screen__tier=0,
    screen__target_tier=0,
    screen__classes=frozenset(),
    screen__repeated_probing=False,
    output__max_sequence_nt=0,
)
HARMLESS = {
    "bundle": Start(),
    "base_bundles": Start(),
    "counterparty": Start(),
    "personnel": Start(),
}

LOGOS_8B = {
    "bundle": Start(
        (
            Origin("developed_by", "logos-hub", sure=True, source="registry"),
            Origin("codeveloped_by", "gaoling-school", sure=True, source="registry"),
        )
    ),
    "base_bundles": Start((Origin("developed_by", "qwen-team", sure=True, source="registry"),)),
    "counterparty": Start(),
    "personnel": Start(),
}
LOGOS_3B = {
    **LOGOS_8B,
    "base_bundles": Start((Origin("developed_by", "meta", sure=True, source="registry"),)),
}


def without(facts: Mapping[str, Fact], *names: str) -> dict[str, Fact]:
    return {name: fact for name, fact in facts.items() if name not in names}


def ask(
    facts: Mapping[str, Fact],
    starts: Mapping[str, Start] = HARMLESS,
    *,
    scope: Scope = Scope.ADMISSION,
    day: date = DAY,
    now: datetime = NOW,
    rules: Rules = RULES,
    approvals: Approvals | None = None,
    submitter: str | None = "sam",
    leads: frozenset[str] = frozenset(),
    task: str | None = None,
) -> Decision:
    request = Request(
        scope=scope,
        bundle=BUNDLE,
        project="p1",
        task=task,
        submitter=submitter,
        leads=leads,
        facts=facts,
        starts=starts,
    )
    return decide(
        request,
        rules.packs,
        rules.lists,
        rules.registry,
        approvals or Approvals(),
        as_of=day,
        known_at=now,
    )


def blocking(decision: Decision) -> set[str]:
    return {each.rule for each in decision.reasons if each.blocks}


def dutiful(decision: Decision) -> set[str]:
    return {each.rule.id for each in decision.results if each.effect == "oblige"}


PACK = """\
schema: airgap/policy-pack/1
pack_id: {pack_id}
pack_version: 1
prepared_on: "2026-11-23"
status: draft
rules:
{rules}"""
RULE = """\
- id: {id}
  version: {version}
  topic: {topic}
  scope: [{scope}]
  effect: {effect}
  statutory: {statutory}
  basis: institutional
  valid: {valid}
  warn_from: {warn_from}
  applies_when: {applies_when}
  when: {when}
  unless: {unless}
  on_unknown: {on_unknown}
  override: {override}
  obligations: {obligations}
  citation: {{text: "t", url: null, source: institutional, quote_sha256: null, checked_on: null,
    checked_by: null}}
  confidence: policy
  verify_before_release: false
  review_by: "2027-02-21"
  owner: security_officer
  notes: null
  plain: "p"
"""
DEFAULTS = {
    "id": "X-1",
    "version": "1",
    "topic": "base",
    "scope": "use",
    "effect": "deny",
    "statutory": "false",
    "valid": "[{from: null, to: null}]",
    "warn_from": "null",
    "applies_when": "{all: []}",
    "when": "{eq: [project.active, true]}",
    "unless": "null",
    "on_unknown": "deny",
    "override": "{kind: none}",
    "obligations": "[]",
}


def rule(**fields: str) -> str:
    return RULE.format(**{**DEFAULTS, **fields})


def pack_text(*rules: str, pack_id: str = "test") -> bytes:
    body = "".join(rules)
    return PACK.format(pack_id=pack_id, rules=body or "  []\n").encode()
