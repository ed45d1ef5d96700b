"""Worked outcomes at their days and one day to each side (docs/design/policy.md, 10)."""

import dataclasses
from datetime import UTC, date, datetime, timedelta

import pytest
from policy_cases import (
    ADMISSION,
    BUNDLE,
    DAY,
    HARMLESS,
    LOGOS_3B,
    LOGOS_8B,
    NOW,
    RULES,
    USE,
    ask,
    blocking,
    dutiful,
    known,
    pack_text,
    rule,
    without,
)

from airgap.rules import Rules
from policy import (
    Approval,
    Approvals,
    Approver,
    Origin,
    Snapshots,
    Start,
    combine,
    parse_lineage,
    parse_pack,
    require,
)
from policy.errors import RefusedError
from policy.facts import UNREAD
from policy.lineage import unite
from policy.terms import Digest, Outcome, Scope

DENY, HOLD = Outcome.DENY, Outcome.NEEDS_APPROVAL
DUTY, PERMIT = Outcome.PERMIT_WITH_OBLIGATIONS, Outcome.PERMIT
LOGOS_LICENCES = frozenset({"cc-by-4.0", "apache-2.0"})
CONTRACTOR = ADMISSION | known(
    project__sponsors=frozenset({"DoD"}),
    project__instrument="contract",
    performance__dod_contract=True,
    bundle__licences=LOGOS_LICENCES,
)
DELIVERS = CONTRACTOR | known(deliverable__to_dod=True, deliverable__embeds_model_or_output=True)


def use(**facts):
    return ask(USE | known(**facts), scope=Scope.USE)


# -- admission ------------------------------------------------------------------------------------


def test_logos_for_a_dod_contract_is_held_and_the_purchase_rule_is_silent():
    decision = ask(CONTRACTOR, LOGOS_8B)
    assert decision.outcome is HOLD
    assert blocking(decision) == {
        *("US-NDAA26-1532-B", "US-NDAA26-1532-B-BASE", "LIC-CONFLICT"),
        "DOD-1286-FR",  # Alibaba has not been looked up on the partial list of institutions
    }


@pytest.mark.parametrize(
    ("day", "outcome", "warned"),
    [
        ("2027-06-29", HOLD, True),
        ("2027-06-30", DENY, False),
        ("2027-07-01", DENY, False),
    ],
)
def test_a_deliverable_that_embeds_logos_is_denied_from_the_day_of_805_b(day, outcome, warned):
    decision = ask(DELIVERS, LOGOS_8B, day=date.fromisoformat(day))
    assert decision.outcome is outcome
    assert ("US-NDAA24-805-B" in blocking(decision)) is not warned
    warnings = {each["rule"]: each["from"] for each in decision.as_document()["warnings"]}
    assert (warnings.get("US-NDAA24-805-B") == "2027-06-30") is warned


def test_the_next_change_of_that_deliverable_is_the_day_of_805_b():
    change = ask(DELIVERS, LOGOS_8B).next_change
    assert change is not None
    assert (change.on, change.outcome) == (date(2027, 6, 30), DENY)
    assert {"US-NDAA24-805-B", "US-NDAA24-805-B-BASE"} <= set(change.rules)


def test_logos_at_a_private_university_is_held_for_its_licences_until_counsel_signs():
    facts = ADMISSION | known(bundle__licences=LOGOS_LICENCES)
    decision = ask(facts, LOGOS_8B)
    assert decision.outcome is HOLD
    assert blocking(decision) == {"LIC-CONFLICT"}

    decision = ask(facts, LOGOS_8B, approvals=Approvals((signed("LIC-CONFLICT"),)))
    assert decision.outcome is DUTY
    assert {"US-NDAA26-851-BIO", "US-1260H-WATCH"} <= dutiful(decision)
    assert "review-lic-conflict" in {each.id for each in decision.obligations}
    assert "licence-union" in {each.id for each in decision.obligations}
    reasons = {each["rule"]: each["state"] for each in decision.as_document()["reasons"]}
    assert reasons["LIC-CONFLICT"] == "fired, overridden"


@pytest.mark.parametrize(
    ("day", "rules"),
    [
        ("2026-01-25", {"LIC-CONFLICT"}),
        ("2026-01-26", {"LIC-CONFLICT", "TX-GOV620-PROHIB"}),
        ("2026-01-27", {"LIC-CONFLICT", "TX-GOV620-PROHIB"}),
        ("2026-11-23", {"LIC-CONFLICT", "TX-GOV620-PROHIB"}),
    ],
)
def test_texas_bars_it_from_a_public_university_whatever_the_money(day, rules):
    facts = ADMISSION | known(
        institution__state="TX",
        institution__public=True,
        project__federal_funds=False,
        project__sponsors=frozenset({"internal"}),
        bundle__licences=LOGOS_LICENCES,
    )
    # The account exists since June 2026; before that day the units answer for the developer.
    starts = LOGOS_8B | {
        "bundle": Start((Origin("developed_by", "tongyi-lab", sure=True, source="t"),))
    }
    decision = ask(facts, starts, day=date.fromisoformat(day))
    assert blocking(decision) == rules
    assert decision.outcome is (DENY if "TX-GOV620-PROHIB" in rules else HOLD)


def test_the_head_of_a_texan_institution_may_except_it():
    facts = ADMISSION | known(institution__state="TX", institution__public=True)
    approval = signed("TX-GOV620-PROHIB", roles={"institution_head"})
    assert ask(facts, LOGOS_8B).outcome is DENY
    assert ask(facts, LOGOS_8B, approvals=Approvals((approval,))).outcome is DUTY


def test_a_state_without_a_pack_is_asked_about():
    facts = ADMISSION | known(institution__state="CA", institution__public=True)
    decision = ask(facts)
    assert (decision.outcome, blocking(decision)) == (HOLD, {"STATE-NO-PACK"})
    assert ask(ADMISSION | known(institution__state="CA")).outcome is DUTY


def test_logos_on_a_dod_grant_asks_the_grants_officer():
    facts = ADMISSION | known(
        project__sponsors=frozenset({"DoD"}), bundle__licences=frozenset({"apache-2.0"})
    )
    decision = ask(facts, LOGOS_8B)
    assert decision.outcome is HOLD
    assert "US-NDAA24-805-GRANT" in blocking(decision)
    renmin = {"bundle": Start((Origin("codeveloped_by", "gaoling-school", sure=True, source="t"),))}
    decision = ask(facts, HARMLESS | renmin)
    found = [
        leaf["found"]
        for each in decision.as_document()["trace"]
        if each["rule"] == "DOD-1286-FR"
        for leaf in each["leaves"]
        if "found" in leaf and "bundle" in leaf["leaf"]
    ]
    assert found == ["no hit on dod-1286 edition FY25"]


@pytest.mark.parametrize("start", ["bundle", "base_bundles"])
def test_deepseek_in_a_dod_contract_is_denied_as_developer_and_as_base(start):
    starts = HARMLESS | {start: Start((Origin("developed_by", "deepseek", sure=True, source="t"),))}
    for day, hit in (("2025-12-17", False), ("2025-12-18", True), ("2025-12-19", True)):
        decision = ask(CONTRACTOR, starts, day=date.fromisoformat(day))
        assert ("US-NDAA26-1532-A" in blocking(decision)) is hit
    assert ask(CONTRACTOR, starts).outcome is DENY


NATURELM = {
    "bundle": Start((Origin("developed_by", "microsoft-research", sure=True, source="t"),)),
    "base_bundles": Start((Origin("developed_by", "mistral-ai", sure=False, source="t"),)),
    "counterparty": Start(),
    "personnel": Start(),
}


def test_naturelm_with_open_facts_is_held_and_every_open_fact_is_asked_for():
    facts = CONTRACTOR | known(
        data__markings=frozenset({"CUI"}), bundle__licences=frozenset({UNREAD})
    )
    decision = ask(facts, NATURELM)
    assert decision.outcome is HOLD
    assert {"LIC-CONFLICT", "DOD-1286-FR"} <= blocking(decision)
    asked = {fact for each in decision.missing for fact in each.facts}
    assert "bundle.licences" in asked
    words = " ".join(question for each in decision.missing for question in each.questions)
    assert "mistral-ai" in words or "microsoft" in words


FINDINGS = """\
schema: airgap/lineage/1
registry_version: 1
prepared_on: "2026-11-23"
status: draft
reviewer: null
parties: []
edges: []
models: []
list_findings:
{rows}
adjudications: []
"""
FINDING = (
    '  - {{id: S-{at}, party: {party}, list: {list}, edition: "{edition}", finding: no_hit,'
    " source: institutional, confidence: high, verify_before_release: false, note: null}}"
)


def looked_up(parties, lists):
    """A site's registry that says: somebody looked, and there was no hit."""
    rows = [
        FINDING.format(at=at, party=party, list=list_id, edition=edition)
        for at, (party, (list_id, edition)) in enumerate(
            ((party, each) for party in parties for each in lists), 1
        )
    ]
    own = parse_lineage(FINDINGS.format(rows="\n".join(rows)).encode())
    return dataclasses.replace(RULES, registry=unite([*RULES.registry.files, own]))


def test_naturelm_with_settled_facts_is_permitted_with_the_duties_of_cmmc():
    facts = CONTRACTOR | known(
        data__markings=frozenset({"CUI"}), bundle__licences=frozenset({"mit"})
    )
    starts = NATURELM | {"base_bundles": Start()}
    rules = looked_up(["microsoft"], [("dod-1286", "FY25")])
    decision = ask(facts, starts, rules=rules)
    assert decision.outcome is DUTY
    assert "CMMC-P2-INV" in dutiful(decision)
    decision = ask(
        USE
        | without(facts, *ADMISSION)
        | known(
            project__sponsors=frozenset({"DoD"}),
            project__instrument="contract",
            performance__dod_contract=True,
            data__markings=frozenset({"CUI"}),
        ),
        starts,
        scope=Scope.USE,
        rules=rules,
    )
    assert (decision.outcome, dutiful(decision)) == (DUTY, {"CMMC-P2-INV"})


@pytest.mark.parametrize(
    ("day", "obliged", "warned"),
    [("2026-11-09", False, True), ("2026-11-10", True, False), ("2026-11-11", True, False)],
)
def test_cmmc_phase_two_begins_on_its_day(day, obliged, warned):
    facts = CONTRACTOR | known(data__markings=frozenset({"CUI"}))
    decision = ask(facts, day=date.fromisoformat(day))
    assert ("CMMC-P2-INV" in dutiful(decision)) is obliged
    warnings = {each["rule"] for each in decision.as_document()["warnings"]}
    assert ("CMMC-P2-INV" in warnings) is warned


@pytest.mark.parametrize(
    ("day", "denied"), [("2026-06-29", False), ("2026-06-30", True), ("2026-07-01", True)]
)
def test_dod_may_not_buy_from_a_listed_company_from_the_day_of_805_a(day, denied):
    facts = ADMISSION | known(
        transaction__buyer="DoD",
        transaction__kind="support_contract",
        transaction__interconnection_only=False,
        transaction__under_existing_contract=False,
    )
    starts = HARMLESS | {"counterparty": Start.parties(["Alibaba Cloud"], "t")}
    decision = ask(facts, starts, day=date.fromisoformat(day))
    assert ("US-NDAA24-805-A" in blocking(decision)) is denied
    excepted = facts | known(transaction__interconnection_only=True)
    decision = ask(excepted, starts, day=date.fromisoformat(day))
    assert "US-NDAA24-805-A" not in blocking(decision)


# -- use ------------------------------------------------------------------------------------------


def test_llama_terms_bar_itar_data_and_also_while_the_derivation_is_unknown():
    facts = {
        "bundle__licences": frozenset({"cc-by-4.0", "llama-3.2-community"}),
        "data__markings": frozenset({"ITAR"}),
        "data__export_class": "ITAR",
    }
    assert blocking(use(**facts)) == {"LIC-LLAMA32-AUP"}
    assert use(**facts).outcome is DENY
    unread = {**facts, "bundle__licences": frozenset({"cc-by-4.0", UNREAD})}
    assert (use(**unread).outcome, blocking(use(**unread))) == (DENY, {"LIC-LLAMA32-AUP"})
    assert use(**{**facts, "bundle__licences": frozenset({"mit"})}).outcome is PERMIT
    assert LOGOS_3B  # its base is Meta's, so no list rule says the same


@pytest.mark.parametrize(
    ("day", "denied"), [("2024-09-24", False), ("2024-09-25", True), ("2024-09-26", True)]
)
def test_llama_terms_begin_on_their_day(day, denied):
    facts = USE | known(
        bundle__licences=frozenset({"llama-3.2-community"}), task__subjects=frozenset({"nuclear"})
    )
    decision = ask(facts, scope=Scope.USE, day=date.fromisoformat(day))
    assert ("LIC-LLAMA32-AUP" in blocking(decision)) is denied


@pytest.mark.parametrize("lacking", ["cui_authorised", "in_ssp", "crypto_recorded"])
def test_cui_needs_an_authorised_described_and_recorded_system(lacking):
    marked = {"data__markings": frozenset({"CUI"})}
    assert use(**marked).outcome is PERMIT
    assert blocking(use(**marked, **{f"system__{lacking}": False})) == {"CUI-BOUNDARY"}
    facts = without(USE, f"system.{lacking}") | known(**marked)
    decision = ask(facts, scope=Scope.USE)
    assert (decision.outcome, blocking(decision)) == (DENY, {"CUI-BOUNDARY"})


def test_an_unknown_marking_on_an_unauthorised_system_denies():
    facts = without(USE, "data.markings") | known(system__cui_authorised=False)
    decision = ask(facts, scope=Scope.USE)
    assert (decision.outcome, "CUI-BOUNDARY" in blocking(decision)) == (DENY, True)


@pytest.mark.parametrize(
    ("tier", "outcome"), [(0, PERMIT), (1, DUTY), (2, DUTY), (3, HOLD), (4, DENY)]
)
def test_hazard_tiers(tier, outcome):
    assert use(screen__tier=tier).outcome is outcome


def test_a_screen_that_did_not_finish_holds_and_none_at_all_denies():
    decision = use(screen__status="incomplete")
    assert (decision.outcome, blocking(decision)) == (HOLD, {"HAZ-SCREEN-INCOMPLETE"})
    names = [name for name in USE if name.startswith("screen.")]
    assert ask(without(USE, *names), scope=Scope.USE).outcome is DENY
    decision = ask(without(USE, *names) | known(task__modality="annotation"), scope=Scope.USE)
    assert decision.outcome is PERMIT


def test_a_route_to_a_controlled_target_is_held_and_to_an_unread_one_denied():
    assert use(task__modality="retrosynthesis").outcome is PERMIT
    decision = use(task__modality="retrosynthesis", screen__target_tier=2)
    assert (decision.outcome, blocking(decision)) == (HOLD, {"HAZ-RETRO"})
    facts = without(USE, "screen.target_tier") | known(task__modality="retrosynthesis")
    assert ask(facts, scope=Scope.USE).outcome is DENY


def test_an_unknown_modality_is_screened():
    facts = without(USE, "task.modality") | known(screen__tier=3)
    assert ask(facts, scope=Scope.USE).outcome in {DENY, HOLD}
    assert "HAZ-CWC1" in blocking(ask(facts, scope=Scope.USE))


def test_unreviewed_output_is_for_us_persons_and_held_for_a_person_of_unknown_status():
    assert use(data__export_class="unreviewed").outcome is PERMIT
    unknown = without(USE, "person.us_person")
    decision = ask(unknown | known(data__export_class="unreviewed"), scope=Scope.USE)
    assert (decision.outcome, blocking(decision)) == (HOLD, {"EXP-DEEMED"})
    foreign = known(person__us_person=False, person__export_licence=False)
    controlled = known(data__export_class="ECCN")
    assert blocking(ask(USE | foreign | controlled, scope=Scope.USE)) == {"EXP-DEEMED"}
    licensed = known(person__us_person=False, person__export_licence=True)
    assert ask(USE | licensed | controlled, scope=Scope.USE).outcome is PERMIT


@pytest.mark.parametrize(
    ("day", "denied"), [("2025-03-27", False), ("2025-03-28", True), ("2025-03-29", True)]
)
def test_weights_tuned_on_controlled_access_data_are_not_exported(day, denied):
    facts = USE | known(bundle__tuned_on_nih_ca=True, task__action="export_weights")
    starts = HARMLESS | {"recipient": Start()}
    decision = ask(facts, starts, scope=Scope.USE, day=date.fromisoformat(day))
    assert ("NIH-GDS-AI" in blocking(decision)) is denied


@pytest.mark.parametrize(("length", "obliged"), [(49, False), (50, True), (51, True)])
def test_synthesis_orders_with_federal_money_from_fifty_nucleotides_on(length, obliged):
    facts = USE | known(
        task__action="export_output",
        task__modality="nucleic_acid",
        output__max_sequence_nt=length,
        data__export_class="fundamental_research",
    )
    decision = ask(facts, HARMLESS | {"recipient": Start()}, scope=Scope.USE)
    assert decision.outcome is (DUTY if obliged else PERMIT)
    assert dutiful(decision) == ({"HAZ-SEQ-ORDER"} if obliged else set())


@pytest.mark.parametrize(
    ("day", "state"),
    [
        ("2025-09-28", "not_in_force"),
        ("2025-09-29", "unknown"),
        ("2025-11-09", "unknown"),
        ("2025-11-10", "not_in_force"),
        ("2026-11-09", "not_in_force"),
        ("2026-11-10", "unknown"),
    ],
)
def test_a_suspended_rule_sleeps_in_between(day, state):
    facts = USE | known(task__action="export_output")
    decision = ask(facts, scope=Scope.USE, day=date.fromisoformat(day))
    assert {each.rule.id: each.state for each in decision.results}["EXP-AFFIL50"] == state


@pytest.mark.parametrize(("age", "held"), [(89, False), (90, False), (91, True)])
@pytest.mark.parametrize("scope", [Scope.ADMISSION, Scope.USE])
def test_a_list_may_be_ninety_days_old(age, held, scope):
    facts = ADMISSION if scope is Scope.ADMISSION else USE
    decision = ask(facts, scope=scope, day=DAY + timedelta(days=age))
    assert (blocking(decision) == {"LIST-STALE"}) is held


def test_the_next_change_of_a_clean_use_is_the_day_the_lists_grow_old():
    change = use().next_change
    assert change is not None
    assert (change.on, change.outcome, change.rules) == (date(2027, 2, 22), HOLD, ("LIST-STALE",))


# -- combination ----------------------------------------------------------------------------------

PERMITS = {"effect": "permit", "on_unknown": "not_matched"}


def tiny(*texts):
    packs = [parse_pack(pack_text(*texts))] if texts else []
    return Rules(combine(packs), Snapshots(), RULES.registry)


def test_an_empty_pack_denies_and_an_empty_request_denies():
    decision = ask(USE, scope=Scope.USE, rules=tiny())
    assert (decision.outcome, blocking(decision)) == (DENY, {"DEFAULT-DENY"})
    assert ask({}, {}, scope=Scope.USE).outcome is DENY
    assert ask({}, {}, scope=Scope.ADMISSION).outcome is DENY


def test_a_permit_cannot_outvote_a_deny_and_the_conflict_is_shown():
    decision = ask(USE, scope=Scope.USE, rules=tiny(rule(id="P-1", **PERMITS), rule(id="D-1")))
    assert decision.outcome is DENY
    assert decision.as_document()["conflicts"] == [{"permit": ["P-1"], "against": ["D-1"]}]


def test_one_duty_stands_once_and_the_earliest_due_date_wins():
    duty = '[{{id: d, text: "{}", owner: pi, due: {}}}]'
    rules = tiny(
        rule(id="P-1", **PERMITS, obligations=duty.format("late", "standing")),
        rule(id="P-2", **PERMITS, obligations=duty.format("early", "at_start")),
    )
    decision = ask(USE, scope=Scope.USE, rules=rules)
    assert decision.outcome is DUTY
    assert [(each.text, each.due) for each in decision.obligations] == [("early", "at_start")]


def test_an_exception_in_the_text_of_a_rule_silences_it():
    rules = tiny(rule(id="P-1", **PERMITS), rule(id="D-1", unless="{eq: [project.closed, false]}"))
    assert ask(USE, scope=Scope.USE, rules=rules).outcome is PERMIT
    facts = without(USE, "project.closed")
    assert ask(facts, scope=Scope.USE, rules=rules).outcome is DENY


def test_a_decision_is_no_truth_value():
    decision = use()
    with pytest.raises(TypeError, match="require"):
        bool(decision)
    assert require(decision) is decision
    with pytest.raises(TypeError):
        decision.refusal()


def test_require_names_rule_and_citation_of_a_denial_and_what_a_hold_lacks():
    with pytest.raises(RefusedError) as caught:
        require(use(data__markings=frozenset({"CUI"}), system__cui_authorised=False))
    assert caught.value.code == "policy.denied"
    assert "CUI-BOUNDARY" in caught.value.message
    assert "DFARS 252.204-7012" in caught.value.message
    facts = without(ADMISSION, "bundle.licences")
    with pytest.raises(RefusedError) as caught:
        require(ask(facts))
    assert caught.value.code == "policy.held"
    assert "Which licences" in caught.value.hint


WRONG_REQUESTS = {
    "a name outside the vocabulary": known(project__activity=True),
    "another type": known(project__active=1),
    "a derived fact": known(screen__required=False),
    "a strange member": known(data__markings=frozenset({"CIU"})),
}


@pytest.mark.parametrize("facts", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS.keys())
def test_a_request_outside_the_vocabulary_is_refused(facts):
    with pytest.raises(RefusedError) as caught:
        ask(USE | facts, scope=Scope.USE)
    assert caught.value.code == "policy.request"


def test_a_clock_without_a_zone_and_a_strange_start_are_refused():
    with pytest.raises(RefusedError, match="time zone"):
        ask(USE, scope=Scope.USE, now=datetime(2026, 11, 23))  # noqa: DTZ001 - the point of it
    with pytest.raises(RefusedError, match="no path starts"):
        ask(USE, {"bundle_and_bases": Start()}, scope=Scope.USE)


# -- approvals ------------------------------------------------------------------------------------


def signed(*ids, **changes):
    roles = changes.pop("roles", {"general_counsel"})
    people = changes.pop("people", ["grace"])
    versions = {each.id: each.text.version for each in RULES.packs.rules}
    fields = {
        "digest": Digest.of(b"approval"),
        "rules": {each: versions[each] for each in ids},
        "approvers": tuple(Approver(each, frozenset(roles)) for each in people),
        "reason": "read and found acceptable",
        "bundle": BUNDLE,
        "project": "p1",
        "task": None,
        "issued": datetime(2026, 11, 1, tzinfo=UTC),
        "expires": date(2027, 3, 1),
        "document": Digest.of(b"memo"),
        **changes,
    }
    return Approval(**fields)


CONFLICT = ADMISSION | known(bundle__licences=frozenset({"mit", "apache-2.0"}))
NO_EFFECT = {
    "another version": {"rules": {"LIC-CONFLICT": 2}},
    "another rule": {"rules": {"LIST-STALE": 1}},
    "another bundle": {"bundle": Digest.of(b"other")},
    "another project": {"project": "p2"},
    "another task": {"task": "molecule"},
    "issued after what was known": {"issued": NOW + timedelta(seconds=1)},
    "expired today": {"expires": DAY},
    "no document": {"document": None},
    "wrong role": {"roles": {"principal_investigator"}},
    "nobody": {"people": []},
    "the submitter": {"people": ["Sam"]},
    "one person twice": {"people": ["grace", " GRACE "]},
    "too long": {"issued": datetime(2026, 1, 1, tzinfo=UTC), "expires": date(2027, 1, 2)},
}


@pytest.mark.parametrize("changes", NO_EFFECT.values(), ids=NO_EFFECT.keys())
def test_an_approval_that_does_not_fit_changes_nothing(changes):
    good = signed("LIC-CONFLICT")
    assert ask(CONFLICT, approvals=Approvals((good,))).outcome is DUTY
    bad = dataclasses.replace(
        signed(
            "LIC-CONFLICT",
            **{key: value for key, value in changes.items() if key in {"roles", "people"}}
            | ({"roles": changes["roles"]} if isinstance(changes.get("roles"), set) else {}),
        ),
        **{key: value for key, value in changes.items() if key not in {"roles", "people"}},
    )
    decision = ask(CONFLICT, approvals=Approvals((bad,)))
    assert (decision.outcome, blocking(decision)) == (HOLD, {"LIC-CONFLICT"})


def test_an_approval_counts_up_to_the_day_before_it_expires_and_the_record_says_when():
    approvals = Approvals((signed("LIC-CONFLICT", expires=date(2026, 12, 1)),))
    assert ask(CONFLICT, approvals=approvals, day=date(2026, 11, 30)).outcome is DUTY
    assert ask(CONFLICT, approvals=approvals, day=date(2026, 12, 1)).outcome is HOLD
    change = ask(CONFLICT, approvals=approvals).next_change
    assert change is not None
    assert (change.on, change.outcome) == (date(2026, 12, 1), HOLD)


def test_without_a_submitter_nobody_can_be_told_apart_from_the_approvers():
    approvals = Approvals((signed("LIC-CONFLICT"),))
    assert ask(CONFLICT, approvals=approvals, submitter=None).outcome is HOLD


def test_a_statute_yields_to_a_confirmed_waiver_only():
    starts = HARMLESS | {
        "bundle": Start((Origin("developed_by", "deepseek", sure=True, source="t"),))
    }
    facts = CONTRACTOR | known(bundle__licences=frozenset({"mit"}))
    rest = ("US-NDAA26-1532-B", "DOD-1286-FR")
    others = [
        signed(
            *rest,
            people=["grace", "lin"],
            roles={"general_counsel", "export_control", "research_security", "sponsored_programs"},
        )
    ]
    assert blocking(ask(facts, starts, approvals=Approvals(tuple(others)))) == {"US-NDAA26-1532-A"}
    for waiver, lifted in (
        (signed("US-NDAA26-1532-A", people=["grace", "lin"]), False),
        (signed("US-NDAA26-1532-A", authority="DoD", people=["grace"]), False),
        (
            signed("US-NDAA26-1532-A", authority="DoD", people=["grace", "lin"], document=None),
            False,
        ),
        (signed("US-NDAA26-1532-A", authority="DoD", people=["grace", "lin"]), True),
    ):
        decision = ask(facts, starts, approvals=Approvals((*others, waiver)))
        assert decision.permitted is lifted


def test_an_unknown_under_a_statute_is_settled_by_a_fact_and_never_by_a_waiver():
    facts = without(CONTRACTOR, "bundle.licences") | known(bundle__licences=frozenset({"mit"}))
    starts = without(HARMLESS, "bundle")
    waiver = signed("US-NDAA26-1532-A", authority="DoD", people=["grace", "lin"])
    assert "US-NDAA26-1532-A" in blocking(ask(facts, starts, approvals=Approvals((waiver,))))


def test_two_people_release_a_hazard_and_the_investigator_is_neither():
    facts = USE | known(screen__tier=3)
    release = signed("HAZ-CWC1", people=["ehs1", "bio1"], roles={"ehs"}, expires=date(2026, 11, 25))
    decision = ask(facts, scope=Scope.USE, approvals=Approvals((release,)))
    assert decision.outcome is DUTY
    decision = ask(
        facts, scope=Scope.USE, approvals=Approvals((release,)), leads=frozenset({"Bio1"})
    )
    assert decision.outcome is HOLD
    exact = ask(USE | known(screen__tier=4), scope=Scope.USE, approvals=Approvals((release,)))
    assert exact.outcome is DENY


# -- the record -----------------------------------------------------------------------------------


def test_the_record_says_what_was_read_and_from_where():
    decision = use()
    document = decision.as_document()
    assert document["format"] == "airgap/decision/1"
    assert {each["pack_id"] for each in document["packs"]} == {
        *("baseline", "hazard", "licences", "us-federal", "us-states"),
    }
    held = {each["list_id"]: each["edition"] for each in document["lists"]}
    assert (held["dod-1260h"], held["bis-entity-meu"]) == ("2026-06-08", None)
    assert len(document["trace"]) == 23
    assert all(each["leaves"] for each in document["trace"])
    assert {each["name"] for each in document["facts"]} >= set(USE)
    assert decision.digest == Digest.of(decision.canonical)


def test_a_replay_with_what_was_known_then_ignores_the_later_edition():
    starts = HARMLESS | {"bundle": LOGOS_8B["bundle"]}
    then = datetime(2026, 6, 7, tzinfo=UTC)
    before = ask(ADMISSION, starts, day=date(2026, 6, 10), now=then)
    after = ask(ADMISSION, starts, day=date(2026, 6, 10), now=datetime(2026, 6, 8, tzinfo=UTC))
    assert "US-1260H-WATCH" not in {
        each.rule.id for each in before.results if each.state == "fired"
    }
    assert "US-1260H-WATCH" in {each.rule.id for each in after.results if each.state == "fired"}


def test_the_smallest_question_comes_first():
    facts = without(DELIVERS, "deliverable.to_dod", "deliverable.embeds_model_or_output")
    missing = ask(facts, LOGOS_8B, day=date(2027, 7, 1)).missing
    sizes = [len(each.facts) for each in missing if each.blocks]
    assert sizes == sorted(sizes)
    settling = next(each for each in missing if "US-NDAA24-805-B" in each.rules)
    assert len(settling.facts) == 1


# -- hazards are an oracle ------------------------------------------------------------------------


def test_two_hazard_holds_tell_the_user_the_same_words():
    told = set()
    for facts in (
        {"screen__tier": 3},
        {"screen__tier": 4},
        {"screen__classes": frozenset({"toxin"})},
        {"screen__status": "incomplete"},
        {"screen__repeated_probing": True},
        {"task__modality": "retrosynthesis", "screen__target_tier": 2},
    ):
        decision = use(**facts)
        assert decision.rule_for_log == "HAZ"
        with pytest.raises(RefusedError) as caught:
            require(decision, reference="log#7")
        error = caught.value
        told.add((error.code, error.message, error.hint))
    assert len(told) == 1
    ((code, message, _),) = told
    assert (code, message) == ("policy.held", "Held for review. Reference log#7.")


def test_beside_another_ground_a_hazard_is_not_mentioned():
    marked = {"data__markings": frozenset({"CUI"}), "system__cui_authorised": False}
    plain, hazard = use(**marked), use(**marked, screen__tier=4)
    assert plain.refusal().message == hazard.refusal().message
    assert plain.rule_for_log == hazard.rule_for_log == "CUI-BOUNDARY"
