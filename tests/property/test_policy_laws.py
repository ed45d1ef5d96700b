"""Laws of the policy engine: ignorance and adverse facts never loosen, order does not matter."""

import dataclasses
import random
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    pack_text,
    rule,
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
    parse_lists,
    parse_pack,
)
from policy.errors import CODES, RefusedError
from policy.facts import UNREAD
from policy.strict import read_yaml
from policy.terms import FACTS, STARTS, Digest, Kind, Known, Outcome, Scope

DAYS = st.dates(date(2024, 1, 1), date(2029, 1, 1)) | st.sampled_from(
    [
        day + timedelta(days=shift)
        for each in RULES.packs.rules
        for window in each.text.valid
        for day in (window.start, window.end)
        if day is not None
        for shift in (-1, 0, 1)
    ]
)
PARTIES = st.sampled_from([*RULES.registry.parties, "Acme Inc", "Huawei"])


def values(name):
    spec = FACTS[name]
    match spec.kind:
        case Kind.BOOL:
            return st.booleans()
        case Kind.INT:
            return (
                st.integers(0, 4) if name.startswith(("screen", "bundle")) else st.integers(0, 99)
            )
        case Kind.DATE:
            return DAYS
        case Kind.ENUM:
            return st.sampled_from(sorted(spec.members))
        case Kind.SET:
            members = spec.members or {"mit", "apache-2.0", "llama-3.2-community", UNREAD}
            return st.frozensets(st.sampled_from(sorted(members)), max_size=3)


SUPPLIED = sorted(name for name, spec in FACTS.items() if not spec.derived)


@st.composite
def requests(draw):
    """A scope, facts around a sound base, starts, and a day."""
    scope = draw(st.sampled_from(list(Scope)))
    facts = dict(ADMISSION if scope is Scope.ADMISSION else USE)
    for name in draw(st.lists(st.sampled_from(SUPPLIED), max_size=6, unique=True)):
        facts[name] = Known(draw(values(name)), "drawn")
    for name in draw(st.lists(st.sampled_from(sorted(facts)), max_size=2, unique=True)):
        del facts[name]
    starts = dict(draw(st.sampled_from([HARMLESS, LOGOS_8B, LOGOS_3B])))
    if draw(st.booleans()):
        origin = Origin("developed_by", draw(PARTIES), sure=draw(st.booleans()), source="drawn")
        starts["bundle"] = Start((origin,))
    return scope, facts, starts, draw(DAYS)


def outcome(request, **changes):
    scope, facts, starts, day = request
    return ask(facts, starts, scope=scope, day=day, **changes)


def duties_of_rules(decision):
    """Obligations of rules that are not permits: what ignorance may not take away."""
    return {
        duty.id
        for each in decision.results
        if each.effect is not None and each.rule.text.effect != "permit"
        for duty in each.rule.text.obligations
    }


@given(requests(), st.data())
@settings(deadline=None, max_examples=150)
def test_removing_a_fact_never_permits_what_was_blocked_and_drops_no_duty(request, data):
    scope, facts, starts, day = request
    before = outcome(request)
    gone = data.draw(st.sampled_from(sorted(facts)))
    after = outcome((scope, {k: v for k, v in facts.items() if k != gone}, starts, day))
    if not before.permitted:
        assert not after.permitted
    if not after.outcome.permitted or before.outcome.permitted:
        assert duties_of_rules(before) <= duties_of_rules(after)


@given(requests(), st.sampled_from(sorted(STARTS - {"bundle_and_bases"})))
@settings(deadline=None, max_examples=75)
def test_forgetting_a_lineage_never_permits_what_was_blocked(request, gone):
    scope, facts, starts, day = request
    before = outcome(request)
    after = outcome((scope, facts, {k: v for k, v in starts.items() if k != gone}, day))
    assert before.permitted or not after.permitted


@given(requests(), PARTIES, st.sampled_from(["developed_by", "codeveloped_by", "distributed_by"]))
@settings(deadline=None, max_examples=150)
def test_one_maker_more_never_loosens(request, party, relation):
    scope, facts, starts, day = request
    before = outcome(request)
    makers = starts.get("bundle", Start())
    more = Start((*makers.origins, Origin(relation, party, sure=True, source="x")), makers.unknown)
    after = outcome((scope, facts, {**starts, "bundle": more}, day))
    assert after.outcome.rank <= before.outcome.rank


LISTED = """\
schema: airgap/lists/1
prepared_on: "2026-11-23"
snapshots:
- list_id: {list_id}
  edition: "next"
  status: in_force
  released: "2026-11-01"
  published: "2026-11-01"
  complete: false
  names_in_edition: null
  citation: "c"
  source_url: null
  source_sha256: null
  source: primary
  retrieved_on: null
  next_review_by: null
  verify_before_release: false
  note: null
  entries:
{entries}
"""
ENTRY = (
    "  - {{names: [{name}], listed_as: listed, released: {{from: null, to: null}},"
    " published: {{from: null, to: null}}, source: primary, confidence: high,"
    " verify_before_release: false, note: null}}"
)


@given(requests(), PARTIES)
@settings(deadline=None, max_examples=60)
def test_a_hit_more_on_a_list_never_loosens(request, party):
    """The new edition holds every name of the old one and one more."""
    old = RULES.lists.held("dod-1260h", NOW)
    rows = []
    for entry in old.text.entries:
        names = ", ".join(f'"{each}"' for each in entry.names)
        windows = (entry.released, entry.published)
        row = ENTRY.format(name=names)
        for kind, window in zip(("released", "published"), windows, strict=True):
            start = f'"{window.start}"' if window.start else "null"
            end = f'"{window.end}"' if window.end else "null"
            row = row.replace(
                f"{kind}: {{from: null, to: null}}", f"{kind}: {{from: {start}, to: {end}}}"
            )
        rows.append(row)
    known_party = RULES.registry.parties.get(party)
    name = party if known_party is None else (known_party.names or known_party.handles)[0]
    rows.append(ENTRY.format(name=f'"{name}"'))
    text = LISTED.format(list_id="dod-1260h", entries="\n".join(rows))
    more = Snapshots((*RULES.lists.snapshots, *parse_lists(text.encode())))
    before = outcome(request)
    after = outcome(request, rules=dataclasses.replace(RULES, lists=more))
    assert after.outcome.rank <= before.outcome.rank


@given(requests(), st.sampled_from(["CUI", "ITAR", "NIH-CA", "PHI"]))
@settings(deadline=None, max_examples=75)
def test_one_marking_more_never_loosens(request, marking):
    scope, facts, starts, day = request
    held = facts.get("data.markings")
    if held is None:
        return
    more = facts | {"data.markings": Known(held.value | {marking}, "x")}
    assert outcome((scope, more, starts, day)).outcome.rank <= outcome(request).outcome.rank


@given(requests())
@settings(deadline=None, max_examples=75)
def test_a_deny_rule_more_never_loosens_and_is_never_outvoted(request):
    scope, _, _, _ = request
    denial = parse_pack(
        pack_text(rule(id="SITE-NO", scope=str(scope), when="{all: []}"), pack_id="site")
    )
    stricter = dataclasses.replace(RULES, packs=combine(RULES.packs.packs, [denial]))
    assert outcome(request, rules=stricter).outcome is Outcome.DENY


@given(requests())
@settings(deadline=None, max_examples=75)
def test_widening_the_window_of_a_rule_that_is_no_permit_never_loosens(request):
    window = RULES.packs.rules[0].text.valid[0].model_copy(update={"start": None, "end": None})
    widened = tuple(
        each
        if each.text.effect == "permit"
        else dataclasses.replace(each, text=each.text.model_copy(update={"valid": (window,)}))
        for each in RULES.packs.rules
    )
    merged = dataclasses.replace(RULES.packs.packs[0], rules=widened)
    after = outcome(request, rules=dataclasses.replace(RULES, packs=combine([merged])))
    assert after.outcome.rank <= outcome(request).outcome.rank


@given(requests(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_order_of_rules_facts_lists_and_lineage_does_not_matter(request, seed):
    scope, facts, starts, day = request
    shuffle = random.Random(seed)

    def shuffled(items):
        items = list(items)
        shuffle.shuffle(items)
        return items

    packs = [
        dataclasses.replace(pack, rules=tuple(shuffled(pack.rules)))
        for pack in shuffled(RULES.packs.packs)
    ]
    other = Rules(combine(packs), Snapshots(tuple(shuffled(RULES.lists.snapshots))), RULES.registry)
    moved_starts = {
        name: Start(tuple(shuffled(start.origins)), start.unknown)
        for name, start in shuffled(starts.items())
    }
    moved = ask(dict(shuffled(facts.items())), moved_starts, scope=scope, day=day, rules=other)
    assert moved.canonical == outcome(request).canonical


@given(requests())
@settings(deadline=None, max_examples=40)
def test_a_replay_is_byte_identical(request):
    assert outcome(request).canonical == outcome(request).canonical


@given(
    requests(),
    st.sampled_from(
        [
            {"expires": date(2020, 1, 2)},
            {"project": "p2"},
            {"bundle": Digest.of(b"other")},
            {"approvers": (Approver("sam", frozenset({"general_counsel", "ehs"})),)},
        ]
    ),
)
@settings(deadline=None, max_examples=60)
def test_approvals_that_do_not_count_change_nothing(request, fault):
    fields = {
        "digest": Digest.of(b"approval"),
        "rules": {each.id: each.text.version for each in RULES.packs.rules},
        "approvers": (Approver("grace", frozenset({"general_counsel"})),),
        "reason": "r",
        "bundle": BUNDLE,
        "project": "p1",
        "task": None,
        "issued": NOW - timedelta(days=3000),
        "expires": date(2030, 1, 1),
        "document": Digest.of(b"memo"),
        **fault,
    }
    after = outcome(request, approvals=Approvals((Approval(**fields),)))
    before = outcome(request)
    assert (after.outcome, after.obligations) == (before.outcome, before.obligations)


@given(requests())
@settings(deadline=None, max_examples=40)
def test_next_change_is_a_change_and_the_day_before_is_none(request):
    scope, facts, starts, day = request
    decision = outcome(request)
    change = decision.next_change
    if change is None:
        later = outcome((scope, facts, starts, date(2099, 1, 1)))
        assert later.outcome is decision.outcome
        return
    assert change.on > day
    assert outcome((scope, facts, starts, change.on)).outcome is change.outcome
    eve = change.on - timedelta(days=1)
    assert outcome((scope, facts, starts, eve)).outcome is decision.outcome


# -- bytes in, a value or ours out ----------------------------------------------------------------

ACCEPTED = {"", *(code for code in CODES if code.startswith("pack."))}


def refusal(parse, content):
    """The code of our refusal, with its place in the words; empty when the content is accepted."""
    try:
        parse(content)
    except RefusedError as error:
        return error.code if "line" in error.message else "no place"
    return ""


PARSERS = [parse_pack, parse_lists, parse_lineage]
SEEDS = {
    parse_pack: pack_text(rule()),
    parse_lists: LISTED.format(list_id="l", entries=ENTRY.format(name='"Acme"')).encode(),
    parse_lineage: b'schema: airgap/lineage/1\nregistry_version: 1\nprepared_on: "2026-11-23"\n'
    b"status: draft\nreviewer: null\nparties: []\nedges: []\nmodels: []\nlist_findings: []\n"
    b"adjudications: []\n",
}


@pytest.mark.parametrize("parse", PARSERS, ids=lambda each: each.__name__)
def test_the_seed_of_the_fuzzing_is_sound(parse):
    assert parse(SEEDS[parse])


@pytest.mark.parametrize("parse", PARSERS, ids=lambda each: each.__name__)
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_a_pack_or_our_refusal(parse, content):
    assert refusal(parse, content) in ACCEPTED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc-1{}[]:&*!'\"\\\n ", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["schema", "rules", "id", "all", "eq", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda each: each.__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_sound_pack_with_something_else_in_one_place_is_a_pack_or_our_refusal(parse, data):
    """Replace one node of a sound document by any JSON value: YAML reads JSON."""
    import json

    value = read_yaml(SEEDS[parse]).value
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        child = node[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
            break
        node = child
    node[key] = data.draw(JSON)
    assert refusal(parse, json.dumps(value, ensure_ascii=False).encode()) in ACCEPTED


@given(st.binary(max_size=6), st.data())
@settings(deadline=None, max_examples=150)
def test_a_pack_with_bytes_spliced_in_is_a_pack_or_our_refusal(splice, data):
    whole = SEEDS[parse_pack]
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 8))
    assert refusal(parse_pack, whole[:at] + splice + whole[at + cut :]) in ACCEPTED


def test_a_decision_reads_no_file_no_network_and_no_clock(monkeypatch):
    import builtins
    import socket
    import time

    def forbidden(*_args, **_kwargs):
        raise AssertionError("an effect in a pure function")

    canonical = ask(USE, scope=Scope.USE, day=DAY).canonical
    for module, name in (
        (builtins, "open"),
        (socket, "socket"),
        (time, "time"),
        (time, "monotonic"),
        (time, "time_ns"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    again = ask(USE, scope=Scope.USE, day=DAY).canonical
    monkeypatch.undo()
    assert again == canonical


def test_policy_evaluates_no_text_as_code():
    import ast
    from pathlib import Path

    import policy

    for path in Path(policy.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__", "open"}, path
