"""The golden scenarios of the shipped packs, and that a broken rule is noticed by one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from policy_cases import RULES, pack_text, rule

from policy import parse_pack
from policy.errors import RefusedError
from policy.terms import Known
from policy.trial import World, ask, mutants, play, request_of, survivors

WORLD = World(RULES.lists, RULES.registry)
PACKS = {pack.pack_id: pack for pack in RULES.packs.packs}


@pytest.mark.parametrize("pack_id", sorted(PACKS))
def test_every_golden_scenario_of_a_pack_holds(pack_id):
    pack = PACKS[pack_id]
    played = list(play(pack.scenarios, RULES.packs, WORLD, pack.prepared_on))
    assert len(played) == len(pack.scenarios)
    assert [each.words for each in played if not each.holds] == []


def test_every_rule_has_four_scenarios_and_answers_yes_no_and_unknown():
    states: dict[str, Counter[str]] = {}
    for pack in PACKS.values():
        for each in pack.scenarios:
            states.setdefault(each.rule, Counter())[each.expect] += 1
    assert set(states) == {each.id for each in RULES.packs.rules}
    assert all(sum(found.values()) >= 4 for found in states.values())
    # Lists are never without an age, and the two lists behind these rules are not held in full.
    quiet = {"LIST-STALE": "unknown", "DOD-1286-FR": "fired", "EXP-AFFIL50": "fired"}
    for name, found in states.items():
        assert {"fired", "unknown"} - set(found) <= {quiet.get(name)}, name
        assert found["not_fired"] + found["not_applicable"] > 0, name


def test_every_boundary_of_every_rule_has_the_day_before_the_day_and_the_day_after():
    days: dict[str, set] = {}
    for pack in PACKS.values():
        for each in pack.scenarios:
            days.setdefault(each.rule, set()).add(each.as_of)
    for each in RULES.packs.rules:
        edges = [day for w in each.text.valid for day in (w.start, w.end) if day is not None]
        for edge in edges:
            wanted = {edge + timedelta(days=step) for step in (-1, 0)}
            assert wanted <= days[each.id], (each.id, edge)
            assert any(edge < day for day in days[each.id]), (each.id, edge)


@pytest.mark.parametrize("pack_id", sorted(PACKS))
def test_a_leaf_dropped_or_negated_a_date_moved_or_an_effect_changed_is_noticed(pack_id):
    pack = PACKS[pack_id]
    assert sum(1 for each in pack.rules for _ in mutants(each)) > len(pack.rules)
    left = [f"{each.rule.id}: {each.change}" for each in survivors(pack, RULES.packs.packs, WORLD)]
    assert left == []


def test_a_scenario_that_is_wrong_is_told_with_what_was_found():
    pack = PACKS["baseline"]
    first = pack.scenarios[0]
    assert first.expect == "fired"
    wrong = replace(first, expect="not_fired")
    (played,) = play([wrong], RULES.packs, WORLD, pack.prepared_on)
    assert not played.holds
    assert "expected not_fired" in played.words
    assert "found fired" in played.words


def test_a_pack_without_scenarios_lets_every_change_pass():
    pack = replace(PACKS["baseline"], scenarios=())
    changes = [change for each in pack.rules for change in mutants(each)]
    assert len(list(survivors(pack, RULES.packs.packs, WORLD))) == len(changes)


SCENARIO = """\
fact_sets:
- {id: base, scope: use, facts: {project.active: true}, starts: {}}
scenarios:
- rule: X-1
  over: base
  cases:
  - {title: "active", expect: fired}
"""


def test_scenarios_are_read():
    pack = parse_pack(pack_text(rule()) + SCENARIO.encode())
    (scenario,) = pack.scenarios
    assert (scenario.rule, scenario.expect, scenario.as_of) == ("X-1", "fired", pack.prepared_on)
    assert request_of(scenario).facts == {"project.active": Known(value=True, source="scenario")}
    decision = ask(scenario, RULES.packs, WORLD, known_on=pack.prepared_on)
    assert decision.as_of == pack.prepared_on


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("rule: X-1", "rule: X-9", "pack.vocabulary"),
        ("over: base", "over: nobody", "pack.vocabulary"),
        ("project.active: true", "project.aktive: true", "pack.vocabulary"),
        ("project.active: true", 'project.active: "true"', "pack.vocabulary"),
        ("project.active: true", 'project.award_date: "2026-02-30"', "pack.vocabulary"),
        ("project.active: true", "screen.required: true", "pack.vocabulary"),
        ("project.active: true", "project.sponsors: [7]", "pack.vocabulary"),
        ("starts: {}", "starts: {nowhere: {}}", "pack.vocabulary"),
        ("starts: {}", "starts: {bundle: {loved_by: [meta]}}", "pack.vocabulary"),
        ("expect: fired", "expect: fired, unknown: [project.closed]", "pack.vocabulary"),
        ("expect: fired", "expect: fired, nothing_known: [bundle]", "pack.vocabulary"),
        ("expect: fired", "expect: perhaps", "pack.schema"),
        ("expect: fired", "expect: fired, colour: red", "pack.schema"),
        ("cases:\n", 'cases:\n  - {title: "active", expect: fired}\n', "pack.duplicate"),
        (
            "scenarios:\n",
            "- {id: base, scope: use, facts: {}, starts: {}}\nscenarios:\n",
            "pack.duplicate",
        ),
    ],
)
def test_a_faulty_scenario_is_refused_with_its_place(old, new, code):
    content = (pack_text(rule()).decode() + SCENARIO).encode()
    parse_pack(content)
    broken = content.decode().replace(old, new, 1).encode()
    assert broken != content
    with pytest.raises(RefusedError, match=r"line \d+, column \d+") as caught:
        parse_pack(broken)
    assert caught.value.code == code
