"""Rule packs: what loads, what is refused and where, and how a site may tighten."""

from datetime import date

import pytest
from policy_cases import RULES, pack_text, rule

from policy import combine, parse_pack
from policy.errors import RefusedError
from policy.logic import AnyPath
from policy.terms import FACTS, Scope

PATH = "{any_path: {from: bundle, via: [developed_by], hits_list: dod-1260h, basis: published}}"


def refused(*rules):
    assert parse_pack(pack_text(rule()))
    with pytest.raises(RefusedError) as caught:
        parse_pack(pack_text(*rules))
    assert "line " in caught.value.message
    assert "column " in caught.value.message
    return caught.value


def test_all_starting_rules_are_live():
    ids = {each.id for each in RULES.packs.rules}
    assert len(ids) == 39
    assert ids >= {
        *("US-NDAA24-805-A", "US-NDAA24-805-B", "US-NDAA26-1532-A", "US-NDAA26-1532-B"),
        *("LIC-CONFLICT", "LIC-LLAMA32-AUP", "CUI-BOUNDARY", "LIST-STALE", "HAZ-CWC1"),
        *("HAZ-SCREEN-INCOMPLETE", "BASE-ADMIT", "BASE-USE"),
    }
    assert RULES.packs.states == {"TX", "NY", "VA"}


def test_every_shipped_rule_has_what_a_reader_needs():
    for each in RULES.packs.rules:
        text = each.text
        assert text.citation.text
        assert text.plain
        assert text.owner
        assert text.review_by > date(2026, 11, 23)


def test_no_shipped_duty_asks_for_a_signature_that_nobody_checks():
    duties = [duty for each in RULES.packs.rules for duty in each.text.obligations]
    assert duties
    assert not [duty.text for duty in duties if "signed list" in duty.text]


VOCABULARY = {
    "an unknown fact, with the nearest name": ("{eq: [project.activity, true]}", "project.active"),
    "a value of another type": ("{eq: [project.active, 1]}", "true or false"),
    "a text for a number": ('{gte: [screen.tier, "2"]}', "an integer"),
    "a true for a number": ("{gte: [screen.tier, true]}", "an integer"),
    "a member that is not there": ("{contains: [data.markings, CIU]}", "'CUI'"),
    "a member of `in` that is not there": ("{in: [task.action, [infre]]}", "'infer'"),
    "an operator that does not fit": ("{contains: [project.active, CUI]}", "does not fit"),
    "an order over names": ("{lt: [task.action, 3]}", "does not fit"),
    "a date that is no date": ('{before: [project.award_date, "2026-02-30"]}', ""),
    "a form that is not there": ("{equals: [project.active, true]}", "no form is called"),
    "a test of ignorance": ("{known: [project.active]}", "no form is called"),
    "two forms in one": ("{eq: [project.active, true], not: {all: []}}", "one form"),
    "no mapping": ("[all]", "one form"),
    "an empty any": ("{any: []}", "never true"),
    "all of no list": ("{all: {eq: [project.active, true]}}", "takes a list"),
    "one operand": ("{eq: [project.active]}", "takes [fact, value]"),
    "an empty list": ("{in: [task.action, []]}", "not empty"),
    "a name twice": ("{in: [task.action, [infer, infer]]}", "twice"),
    "a path under not": (f"{{not: {PATH}}}", "may not stand under"),
    "a path without target": (
        "{any_path: {from: bundle, via: [developed_by], basis: published}}",
        "one of hits_list and domicile_in",
    ),
    "a path without basis": (
        "{any_path: {from: bundle, via: [developed_by], hits_list: dod-1260h}}",
        "basis goes with",
    ),
    "a path from nowhere": (
        "{any_path: {from: person, via: [developed_by], domicile_in: [CN]}}",
        "no path starts at",
    ),
    "a relation that is not there": (
        "{any_path: {from: bundle, via: [developed_for], domicile_in: [CN]}}",
        "no relation is called",
    ),
    "a path that cannot leave": (
        "{any_path: {from: bundle, via: [same_person_as], domicile_in: [CN]}}",
        "nothing leaves bundle",
    ),
    "a first step of another start": (
        "{any_path: {from: counterparty, via: [developed_by], domicile_in: [CN]}}",
        "does not leave counterparty",
    ),
}


@pytest.mark.parametrize(("when", "words"), VOCABULARY.values(), ids=VOCABULARY.keys())
def test_a_rule_outside_the_vocabulary_does_not_load(when, words):
    error = refused(rule(when=when))
    assert error.code in {"pack.vocabulary", "pack.schema"}
    assert words in error.message
    assert "line 1" in error.message or "line 2" in error.message


def test_an_unknown_field_of_a_path_is_placed():
    error = refused(rule(when=PATH.replace("basis", "bases")))
    assert (error.code, "bases" in error.message) == ("pack.schema", True)


FAULTS = {
    "permit on unknown": {"effect": "permit", "on_unknown": "deny"},
    "deny that ignores an unknown": {"on_unknown": "not_matched"},
    "deny that only obliges on unknown": {"on_unknown": "oblige"},
    "oblige without obligation": {"effect": "oblige", "on_unknown": "oblige"},
    "statute lifted by an approval": {
        "statutory": "true",
        "override": "{kind: approval, roles: [pi], approvers: 1, max_days: 1,"
        " needs_document: false}",
    },
    "permit that can be lifted": {
        "effect": "permit",
        "on_unknown": "not_matched",
        "override": '{kind: government_waiver, authority: "x"}',
    },
    "path in a permit": {"effect": "permit", "on_unknown": "not_matched", "when": PATH},
    "path in unless": {"unless": PATH},
    "empty window": {"valid": '[{from: "2026-01-01", to: "2026-01-01"}]'},
    "window backwards": {"valid": '[{from: "2026-01-02", to: "2026-01-01"}]'},
    "windows that overlap": {
        "valid": '[{from: null, to: "2026-01-02"}, {from: "2026-01-01", to: null}]'
    },
    "window after an open end": {
        "valid": '[{from: null, to: null}, {from: "2026-01-01", to: null}]'
    },
    "too many leaves": {"when": "{all: [" + ",".join(["{eq: [project.active, true]}"] * 65) + "]}"},
    "no scope": {"scope": ""},
    "no window": {"valid": "[]"},
    "an id in small letters": {"id": "x-1"},
    "an id with a Cyrillic letter": {"id": "Х-1"},
    "version nought": {"version": "0"},
    "an override of no kind": {"override": "{kind: whim}"},
    "a date that is not one": {"warn_from": '"2026-02-30"'},
    "a screen in a rule that users see": {"when": "{gte: [screen.tier, 3]}"},
    "a screen in an exception that users see": {"unless": "{eq: [screen.status, complete]}"},
}


@pytest.mark.parametrize("fields", FAULTS.values(), ids=FAULTS.keys())
def test_fields_that_do_not_go_together_are_refused(fields):
    assert refused(rule(**fields)).code in {"pack.vocabulary", "pack.schema"}


def test_windows_that_meet_are_in_order():
    pack = parse_pack(
        pack_text(rule(valid='[{from: null, to: "2026-01-01"}, {from: "2026-01-01", to: null}]'))
    )
    assert pack.rules[0].in_force(date(2026, 1, 1))


def test_document_faults_name_the_field():
    good = pack_text(rule())
    cases = {
        good.replace(b"status: draft", b"status: draft\nmore: 1"): "pack.schema",
        good.replace(b"pack_version: 1", b"pack_version: true"): "pack.schema",
        good.replace(b"pack_id: test\n", b""): "pack.schema",
        good.replace(b"policy-pack/1", b"policy-pack/2"): "pack.version",
        good.replace(b"schema: airgap/policy-pack/1", b"schema: 1"): "pack.schema",
        good.replace(b"status: draft", b"status: draft\nstates: [XX]"): "pack.vocabulary",
        b"[]": "pack.schema",
        b"text": "pack.schema",
        pack_text(rule(), rule()): "pack.duplicate",
        pack_text(rule()) + b"  nonsense: 1\n": "pack.schema",
    }
    for content, code in cases.items():
        with pytest.raises(RefusedError) as caught:
            parse_pack(content)
        assert caught.value.code == code, content[-80:]


def test_a_comment_changes_the_digest_of_the_bytes_and_not_that_of_the_meaning():
    plain = parse_pack(pack_text(rule()))
    commented = parse_pack(b"# a word\n" + pack_text(rule()))
    assert plain.digest != commented.digest
    assert plain.canonical_digest == commented.canonical_digest


# -- several packs --------------------------------------------------------------------------------

DUTY = '[{{id: o, text: "{}", owner: {}, due: {}}}]'
HOLD = {
    "effect": "needs_approval",
    "obligations": DUTY.format("Do it", "pi", "at_start"),
    "on_unknown": "needs_approval",
    "override": "{kind: approval, roles: [pi], approvers: 1, max_days: 9, needs_document: false}",
}
STRICTER = {
    **HOLD,
    "version": "2",
    "effect": "deny",
    "on_unknown": "deny",
    "override": "{kind: none}",
}
LOOSER = {
    "another condition": {**STRICTER, "when": "{eq: [project.active, false]}"},
    "a narrower scope": {**STRICTER, "scope": "admission"},
    "other dates": {**STRICTER, "valid": '[{from: "2026-01-01", to: null}]'},
    "an easier approval": {
        **HOLD,
        "version": "2",
        "override": "{kind: approval, roles: [pi], approvers: 1, max_days: 10,"
        " needs_document: false}",
    },
    "the same version": {**STRICTER, "version": "1"},
    "another topic": {**STRICTER, "topic": "cui"},
    "no obligation": {**STRICTER, "obligations": "[]"},
    "an obligation in other words": {
        **STRICTER,
        "obligations": DUTY.format("Do nothing", "pi", "at_start"),
    },
    "an obligation of another owner": {
        **STRICTER,
        "obligations": DUTY.format("Do it", "isso", "at_start"),
    },
    "an obligation due later": {**STRICTER, "obligations": DUTY.format("Do it", "pi", "standing")},
    "a duty that only obliges": {
        **HOLD,
        "version": "2",
        "effect": "oblige",
        "on_unknown": "oblige",
        "obligations": '[{id: o, text: "t", owner: pi, due: standing}]',
    },
}


def site(**fields):
    return parse_pack(pack_text(rule(**fields), pack_id="site"))


def test_a_site_may_make_a_rule_stricter():
    shipped = parse_pack(pack_text(rule(**HOLD)))
    (found,) = combine([shipped], [site(**STRICTER)]).rules
    assert (found.text.effect, found.text.version) == ("deny", 2)


@pytest.mark.parametrize("fields", LOOSER.values(), ids=LOOSER.keys())
def test_a_site_may_not_loosen_a_rule(fields):
    shipped = parse_pack(pack_text(rule(**HOLD)))
    assert combine([shipped], [site(**STRICTER)])
    with pytest.raises(RefusedError) as caught:
        combine([shipped], [site(**fields)])
    assert caught.value.code == "pack.duplicate"


def test_a_statutory_rule_and_a_permit_stay_as_they_are():
    for fields in (
        {"statutory": "true"},
        {"effect": "permit", "on_unknown": "not_matched"},
    ):
        with pytest.raises(RefusedError, match="stays as it is"):
            combine([parse_pack(pack_text(rule(**fields)))], [site(version="2", **fields)])


def test_a_duty_of_a_site_may_not_take_the_place_of_another():
    shipped = parse_pack(pack_text(rule(**HOLD)))
    duty = {"id": "A-1", "effect": "oblige", "on_unknown": "oblige"}
    same = site(**duty, obligations=DUTY.format("Do it", "pi", "at_admission"))
    assert len(combine([shipped], [same]).rules) == 2
    for text, owner in (("Do nothing", "pi"), ("Do it", "isso")):
        other = site(**duty, obligations=DUTY.format(text, owner, "at_admission"))
        with pytest.raises(RefusedError, match="obligation o stands elsewhere") as caught:
            combine([shipped], [other])
        assert caught.value.code == "pack.duplicate"


def test_a_rule_on_a_screen_is_a_hazard_rule():
    when = "{gte: [screen.tier, 3]}"
    assert parse_pack(pack_text(rule(topic="hazard", when=when))).rules
    assert parse_pack(pack_text(rule(when="{eq: [screen.required, true]}"))).rules
    assert "topic hazard alone" in refused(rule(when=when)).message


def test_one_id_in_two_packs_is_refused():
    one = parse_pack(pack_text(rule()))
    with pytest.raises(RefusedError, match="two packs"):
        combine([one, one])
    with pytest.raises(RefusedError, match="two site packs"):
        combine([], [one, one])


@pytest.mark.parametrize("scope", ["admission", "use", "admission, use"])
def test_a_site_may_not_permit_beside_the_shipped_permit(scope):
    wide = {"id": "LAB-OPEN", "when": "{all: []}", "scope": scope, "override": "{kind: none}"}
    assert combine(RULES.packs.packs, [site(**wide)])
    with pytest.raises(RefusedError, match="may not permit by rule LAB-OPEN what BASE-") as caught:
        combine(RULES.packs.packs, [site(**wide, effect="permit", on_unknown="not_matched")])
    assert caught.value.code == "pack.duplicate"
    # Without a shipped permit everything is denied, and a pack of its own may begin.
    assert combine([], [site(**wide, effect="permit", on_unknown="not_matched")])


def test_one_name_for_two_packs_is_refused():
    one, other = parse_pack(pack_text(rule())), parse_pack(pack_text(rule(id="X-2")))
    with pytest.raises(RefusedError, match="two packs are called") as caught:
        combine([one], [other])
    assert caught.value.code == "pack.duplicate"
    assert combine([one], [site(id="X-2")]).rules


def test_programs_hold_each_leaf_once():
    for scope in Scope:
        program = RULES.packs.programs[scope]
        assert len(set(program.leaves)) == len(program.leaves)
        assert all(isinstance(leaf, AnyPath) or leaf.fact in FACTS for leaf in program.leaves)
