"""What lets a request pass on other engines, shown to fail closed on this one; and hostile packs.

Obeys docs/design/policy.md, 14 and 15.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, date, datetime

import pytest
from policy_cases import ADMISSION, HARMLESS, RULES, USE, ask, pack_text, rule, without
from policy_site import put_signed

from airgap.rules import MAX_SITE_FILES, Rules, load_rules
from policy import combine, decide, parse_lineage, parse_lists, parse_pack
from policy.errors import RefusedError
from policy.logic import T, compare
from policy.replay import request_of_record, times_of_record
from policy.strict import MAX_BYTES, read_yaml
from policy.terms import FACTS, Known, Outcome, Scope

from policy.trial import World, ask as ask_scenario  # isort: skip

WORLD = World(RULES.lists, RULES.registry)
BLOCKED = [
    (pack, scenario)
    for pack in RULES.packs.packs
    for scenario in pack.scenarios
    if scenario.outcome in {Outcome.DENY, Outcome.NEEDS_APPROVAL}
]


# -- a missing fact: Cedar skips a forbid that errs on it ------------------------------------------


@pytest.mark.parametrize(("pack", "scenario"), BLOCKED, ids=[each.key for _, each in BLOCKED])
def test_no_blocked_scenario_is_permitted_when_a_fact_is_dropped(pack, scenario):
    asked = ask_scenario(scenario, RULES.packs, WORLD, known_on=pack.prepared_on)
    assert not asked.permitted
    read = asked.evaluator.program.fact_names & set(scenario.facts)
    for name in sorted(read):
        facts = {key: value for key, value in scenario.facts.items() if key != name}
        less = replace(scenario, facts=facts)
        found = ask_scenario(less, RULES.packs, WORLD, known_on=pack.prepared_on)
        assert not found.permitted, name
    for name in scenario.starts:
        starts = {key: value for key, value in scenario.starts.items() if key != name}
        less = replace(scenario, starts=starts)
        found = ask_scenario(less, RULES.packs, WORLD, known_on=pack.prepared_on)
        assert not found.permitted, name


# -- a mistyped or missing input: an empty deny set permits in Rego --------------------------------


@pytest.mark.parametrize(
    "name", ["data.marking", "DATA.MARKINGS", "data.markings ", "data", "", "screen.tier.", "x"]
)
def test_a_mistyped_fact_is_refused(name):
    facts = {**without(USE, "data.markings"), name: Known(frozenset({"CUI"}), "test")}
    assert ask(USE, scope=Scope.USE).permitted
    with pytest.raises(RefusedError) as caught:
        ask(facts, scope=Scope.USE)
    assert caught.value.code == "policy.request"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("screen.tier", "0"),
        ("screen.tier", True),
        ("screen.tier", 0.0),
        ("screen.repeated_probing", 0),
        ("screen.repeated_probing", "false"),
        ("data.markings", "CUI"),
        ("data.markings", ["CUI"]),
        ("data.markings", frozenset({"cui"})),
        ("screen.status", "Complete"),
        ("screen.status", None),
        ("project.award_date", "2026-01-01"),
        ("project.award_date", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(RefusedError) as caught:
        ask({**USE, name: Known(value, "test")}, scope=Scope.USE)
    assert caught.value.code == "policy.request"


@pytest.mark.parametrize("scope", Scope)
def test_an_empty_request_and_an_empty_pack_deny(scope):
    assert ask({}, {}, scope=scope).outcome is Outcome.DENY
    bare = Rules(combine([]), RULES.lists, RULES.registry)
    good = ADMISSION if scope is Scope.ADMISSION else USE
    assert ask(good, HARMLESS, scope=scope).permitted
    assert ask(good, HARMLESS, scope=scope, rules=bare).outcome is Outcome.DENY


# -- a rule that errs: it is a fault here, and never a rule that is left out -----------------------


def test_a_rule_that_errs_stops_the_decision():
    program = RULES.packs.programs[Scope.USE]
    leaf = next(leaf for _, leaf in program.still if str(leaf) == "screen.tier >= 2")
    assert compare(leaf, Known(2, "test")) == T
    with pytest.raises(TypeError):  # what a defect would do: nothing below catches it
        compare(leaf, Known(frozenset(), "a defect"))


def test_an_error_in_one_pack_loads_no_pack():
    good, bad = pack_text(rule(id="A-1")), pack_text(rule(id="A-2", when="{eq: [x, 1]}"))
    assert parse_pack(good).rules
    with pytest.raises(RefusedError):
        parse_pack(bad)


# -- a bad date: a dated deny never fires on regopy ------------------------------------------------


@pytest.mark.parametrize(
    "day",
    ["2026-02-30", "2026-13-01", "26-01-01", "2026-1-1", "20260101", "2026-01-01T00:00:00Z", ""],
)
def test_a_bad_date_does_not_load(day):
    window = '[{{from: "{}", to: null}}]'
    parse_pack(pack_text(rule(valid=window.format("2026-01-01"))))
    with pytest.raises(RefusedError, match=r"line \d+, column \d+") as caught:
        parse_pack(pack_text(rule(valid=window.format(day))))
    assert caught.value.code == "pack.schema"


def test_leap_days_and_the_ends_of_the_calendar():
    leap = pack_text(
        rule(valid='[{from: "2028-02-29", to: "2028-03-01"}]', scope="use", id="LEAP-1")
    )
    rules = Rules(combine([*RULES.packs.packs, parse_pack(leap)]), RULES.lists, RULES.registry)
    for day, expected in (
        (date(2028, 2, 28), "not_in_force"),
        (date(2028, 2, 29), "fired"),
        (date(2028, 3, 1), "not_in_force"),
    ):
        decision = ask(USE, scope=Scope.USE, day=day, rules=rules)
        assert {each.rule.id: each.state for each in decision.results}["LEAP-1"] == expected
    for day in (date.min, date.max):
        assert ask(USE, scope=Scope.USE, day=day).as_document()


# -- replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", Scope)
def test_a_record_alone_gives_the_same_bytes_again(scope):
    facts = ADMISSION if scope is Scope.ADMISSION else USE
    facts = {name: fact for name, fact in facts.items() if name != "institution.public"}
    first = ask(facts, scope=scope)
    document = first.as_document()
    as_of, known_at = times_of_record(document)
    again = decide(
        request_of_record(document),
        RULES.packs,
        RULES.lists,
        RULES.registry,
        as_of=as_of,
        known_at=known_at,
    )
    assert again.canonical == first.canonical
    assert again.digest == first.digest


def test_what_is_no_whole_record_is_refused():
    good = ask(USE, scope=Scope.USE).as_document()
    request_of_record(good)
    for bad in (
        {},
        {**good, "format": "airgap/decision/2"},
        {**good, "request": {}},
        {**good, "facts": [{"name": "x"}]},
        {**good, "facts": None},
        {**good, "scope": "abuse"},
    ):
        with pytest.raises(RefusedError) as caught:
            request_of_record(bad)
        assert caught.value.code == "policy.record"
    with pytest.raises(RefusedError):
        times_of_record({"as_of": "soon", "known_at": "later"})


# -- hostile packs, with line and column -----------------------------------------------------------


GOOD = pack_text(rule()).decode()
HOSTILE = {
    "a duplicate key": GOOD.replace("  version: 1\n", "  version: 1\n  version: 2\n"),
    "an anchor": GOOD.replace("plain: ", "plain: &a "),
    "an alias": GOOD.replace('plain: "p"', "plain: *a"),
    "a bomb of anchors": "a: &a [x,x]\n" + "b: [*a,*a]\n" * 20,
    "a merge key": GOOD.replace("  version: 1\n", "  <<: {version: 1}\n"),
    "a tag": GOOD.replace("plain: ", "plain: !!python/object:os.system "),
    "an unknown field": GOOD.replace("  version: 1\n", "  version: 1\n  colour: red\n"),
    "a missing field": GOOD.replace("  version: 1\n", ""),
    "a wrong type": GOOD.replace("version: 1\n", 'version: "1"\n'),
    "a schema of the future": GOOD.replace("policy-pack/1", "policy-pack/2"),
    "another schema": GOOD.replace("airgap/policy-pack/1", "somebody/else/1"),
    "a homoglyph in an id": GOOD.replace("X-1", "\u0425-1"),
    "a direction mark in plain words": GOOD.replace('plain: "p"', 'plain: "p\u202e"'),
    "a second document": GOOD + "---\nschema: x\n",
    "an unquoted date": GOOD.replace('"2027-02-21"', "2027-02-21"),
    "a word that readers type differently": GOOD.replace("statutory: false", "statutory: no"),
    "nested too deep": "a: " + "[" * 40 + "]" * 40,
    "too long a text": GOOD.replace('plain: "p"', f'plain: "{"p" * 5000}"'),
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pack_is_refused_with_line_and_column(text):
    parse_pack(GOOD.encode())
    assert text != GOOD
    with pytest.raises(RefusedError, match=r"line \d+, column \d+") as caught:
        parse_pack(text.encode())
    assert caught.value.code.startswith("pack.")


@pytest.mark.parametrize("parse", [parse_pack, parse_lists, parse_lineage])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: \xc3\x28", b"a: \xed\xa0\x80"])
def test_bytes_that_are_not_utf8_are_refused_with_their_place(parse, content):
    with pytest.raises(RefusedError, match=r"line 1, column \d+: byte 0x"):
        parse(content)


def test_a_hundred_megabytes_are_refused_unread(tmp_path):
    path = put_signed(tmp_path, "big.yaml", b"x")
    with path.open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(RefusedError) as caught:
        load_rules(tmp_path)
    assert caught.value.code in {"pack.limit", "policy.signature"}
    with pytest.raises(RefusedError, match=r"line 1, column 1") as caught:
        read_yaml(b"#" * (MAX_BYTES + 1))
    assert caught.value.code == "pack.limit"


def test_a_pipe_in_place_of_a_pack_is_not_waited_for(tmp_path):
    path = put_signed(tmp_path, "own.yaml", GOOD.encode())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not an ordinary file"):
        load_rules(tmp_path)
    assert len(FACTS) * 10 > MAX_SITE_FILES
