"""What `lint` finds, each with its line and column."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from policy_cases import DAY, RULES, pack_text, rule

import policy.strict
from policy import parse_pack
from policy.lint import lint, lint_registry

HOME = Path(policy.strict.__file__).parent
BESIDE = RULES.packs.packs
LISTS = RULES.lists.snapshots


def find(content: bytes, today: date = DAY, beside=BESIDE):
    return lint(content, "my.yaml", beside=beside, lists=LISTS, today=today)


def errors(content: bytes, today: date = DAY):
    return [each for each in find(content, today) if each.error]


@pytest.mark.parametrize("path", sorted((HOME / "packs").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_shipped_pack_has_an_error_and_its_open_work_is_listed(path):
    found = find(path.read_bytes())
    assert [each for each in found if each.error] == []
    assert {"status"} <= {each.code for each in found}
    assert all(each.line > 0 for each in found)


def test_a_sound_rule_has_no_error():
    assert errors(pack_text(rule())) == []
    parse_pack(pack_text(rule()))


FAULTS = {
    "dead by contradiction": (
        {"when": "{all: [{eq: [project.active, true]}, {eq: [project.active, false]}]}"},
        "dead",
    ),
    "dead by two states": (
        {"when": "{all: [{eq: [task.action, infer]}, {eq: [task.action, finetune]}]}"},
        "dead",
    ),
    "dead by numbers": (
        {"when": "{all: [{gt: [output.max_sequence_nt, 3]}, {lt: [output.max_sequence_nt, 2]}]}"},
        "dead",
    ),
    "dead by its exception": ({"unless": "{eq: [project.active, true]}"}, "dead"),
    "a leaf without a say": (
        {"when": "{any: [{eq: [project.active, true]}, {all: []}, {eq: [project.closed, true]}]}"},
        "dead",
    ),
    "a window that is past": ({"valid": '[{from: null, to: "2026-01-01"}]'}, "dates"),
    "a warning without a day": ({"warn_from": '"2026-01-01"'}, "dates"),
    "a warning too late": (
        {"valid": '[{from: "2027-01-01", to: null}]', "warn_from": '"2027-01-01"'},
        "dates",
    ),
    "an id of another pack": ({"id": "BASE-USE"}, "overlap"),
    "an unknown fact": ({"when": "{eq: [project.aktive, true]}"}, "vocabulary"),
    "a wrong type": ({"version": '"1"'}, "schema"),
    "an unknown effect": ({"effect": "allow"}, "schema"),
    "two windows at once": (
        {"valid": '[{from: null, to: "2027-01-01"}, {from: "2026-12-01", to: null}]'},
        "vocabulary",
    ),
}


@pytest.mark.parametrize(("fields", "code"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_with_its_place(fields, code):
    found = errors(pack_text(rule(**fields)))
    assert code in {each.code for each in found}, found
    assert all(each.line >= 7 and each.column > 0 for each in found)


def test_every_fault_of_vocabulary_is_told_and_not_only_the_first():
    content = pack_text(
        rule(id="X-1", when="{eq: [project.aktive, true]}"),
        rule(id="X-2", when="{eq: [project.active, 7]}"),
        rule(id="X-2"),
    )
    found = errors(content)
    assert [each.code for each in found] == ["vocabulary", "vocabulary", "duplicate"]
    assert len({each.line for each in found}) == 3


def test_two_faults_of_form_are_both_told():
    found = errors(pack_text(rule(version='"1"', effect="allow")))
    assert len(found) == 2


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"schema: airgap/policy-pack/9\n", b"- 1\n"])
def test_what_is_no_pack_is_one_finding(content):
    (found,) = find(content)
    assert found.error


def test_open_work_of_a_draft():
    content = pack_text(
        rule()
        .replace("source: institutional", "source: primary")
        .replace("confidence: policy", "confidence: high")
        .replace("verify_before_release: false", "verify_before_release: true")
    )
    codes = [each.code for each in find(content, date(2027, 3, 1))]
    assert (codes.count("citation"), codes.count("unread")) == (1, 1)
    assert {"review", "scenarios", "status"} <= set(codes)
    assert errors(content, date(2027, 3, 1)) == []


def test_a_scope_without_a_permit_denies_everything():
    found = find(pack_text(rule()), beside=())
    assert sum(each.code == "permit" for each in found) == 2


def test_a_list_that_is_not_held_is_told():
    path = "{any_path: {from: recipient, via: [owned_50_by], hits_list: nowhere, basis: released}}"
    assert "list" in {each.code for each in find(pack_text(rule(when=path)))}


def test_edges_without_a_reviewer_are_open_work():
    codes = [each.code for each in lint_registry(RULES.registry, today=DAY)]
    assert codes == ["registry.reviewer", "registry.reviewer"]
