"""Break-glass: two people, three days, never for hazards; its review is owed until signed."""

import json
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import bundles
import pytest
import typer
from policy_cases import DEMO, NOW, blocking
from test_approvals import BUNDLE, LONG_AGO, PROJECT, TRUST, decide, enrolled, reasons, statement

from airgap import approvals, site_rules
from airgap.audit import open_log
from airgap.audit.query import read_records
from airgap.cli import install, policy
from airgap.cli.common import show_error
from airgap.signed import keep as keep_file
from bundle import keys, trust
from bundle.intoto import PAYLOAD_TYPE
from policy import pack
from policy.approvals import Approval, Approver, Case, fault_of
from policy.errors import AirgapError
from policy.pack import parse_pack
from policy.terms import Digest, Outcome, Scope

ISSUED = datetime(2026, 11, 23, 12, tzinfo=UTC)
SHORT = {"issued": ISSUED, "expires": date(2026, 11, 26), "break_glass": True, "document": None}


def signed(*people, **changes):
    envelope = approvals.OVERRIDE.sign(statement(**{**SHORT, **changes}), bundles.signer(people[0]))
    for person in people[1:]:
        envelope = approvals.countersign(envelope, bundles.signer(person))
    return envelope


def test_two_people_of_any_role_break_the_glass_and_owe_a_review():
    assert blocking(decide()) == {"LIC-CONFLICT"}
    decision = decide(signed("grace", "tom"))
    assert decision.outcome is Outcome.PERMIT_WITH_OBLIGATIONS
    duty = next(each for each in decision.obligations if each.id == "after-review-lic-conflict")
    assert "did not sign it" in duty.text
    assert decision.as_document()["approvals"][0]["break_glass"] is True
    ordinary = approvals.OVERRIDE.sign(statement(), bundles.signer("grace"))
    assert "break_glass" not in decide(ordinary).as_document()["approvals"][0]


WEAK = {
    "one person": (("grace",), {}, "too few people: 1 of 2"),
    "one person with two keys": (("grace", "grace2"), {}, "too few people: 1 of 2"),
    "four days": (("grace", "tom"), {"expires": date(2026, 11, 27)}, "runs longer than 3 days"),
}


@pytest.mark.parametrize(("people", "changes", "words"), WEAK.values(), ids=WEAK.keys())
def test_break_glass_that_is_too_weak_lifts_nothing(people, changes, words):
    assert decide(signed("grace", "tom")).permitted
    (reason,) = reasons(signed(*people, **changes))
    assert words in reason
    assert not decide(signed(*people, **changes)).permitted


def test_the_submitter_does_not_break_the_glass():
    assert decide(signed("grace", "tom"), submitter="ada").permitted
    assert not decide(signed("grace", "tom"), submitter="tom").permitted


RULE = b"""
schema: airgap/policy-pack/1
pack_id: p
pack_version: 1
prepared_on: "2026-11-23"
status: draft
rules:
- id: LAB-X
  version: 1
  topic: TOPIC
  scope: [use]
  effect: EFFECT
  statutory: STATUTORY
  basis: institutional
  valid: [{from: null, to: null}]
  warn_from: null
  applies_when: {all: []}
  when: {eq: [system.in_ssp, false]}
  unless: null
  on_unknown: needs_approval
  override: OVERRIDE
  obligations: []
  citation: {text: "x", url: null, source: institutional, quote_sha256: null,
             checked_on: "2026-11-23", checked_by: null}
  confidence: policy
  verify_before_release: false
  review_by: "2027-02-21"
  owner: security_officer
  notes: null
  plain: "x"
"""
APPROVAL = b"{kind: approval, roles: [isso], approvers: 1, max_days: 90, needs_document: false}"
WAIVER = b'{kind: government_waiver, authority: "An agency"}'


def rule(topic=b"base", effect=b"needs_approval", statutory=b"false", override=APPROVAL):
    raw = RULE.replace(b"TOPIC", topic).replace(b"EFFECT", effect)
    raw = raw.replace(b"STATUTORY", statutory).replace(b"OVERRIDE", override)
    return parse_pack(raw, "test").rules[0]


def fault(of, *people, leads=(), **changes):
    approval = Approval(
        digest=Digest.of(b"a"),
        rules={"LAB-X": 1},
        approvers=tuple(Approver(each, frozenset({"isso"})) for each in people),
        reason="r",
        bundle=BUNDLE,
        project=PROJECT,
        task=None,
        issued=ISSUED,
        expires=date(2026, 11, 26),
        document=None,
        **changes,
    )
    case = Case(
        scope=Scope.USE,
        bundle=BUNDLE,
        project=PROJECT,
        task=None,
        submitter="ada",
        leads=frozenset(leads),
        as_of=NOW.date(),
        known_at=NOW + timedelta(days=1),
    )
    return fault_of(approval, of, case)


SHUT = {
    "hazard": rule(topic=b"hazard"),
    "CUI": rule(topic=b"cui"),
    "statutory": rule(effect=b"deny", statutory=b"true", override=WAIVER),
    "waiver only": rule(override=WAIVER),
    "none": rule(override=b"{kind: none}"),
}


@pytest.mark.parametrize("shut", SHUT.values(), ids=SHUT.keys())
def test_no_emergency_opens_these(shut):
    assert fault(rule(), "ivy", "max", break_glass=True) is None
    assert "break-glass" in fault(shut, "ivy", "max", break_glass=True)


def test_a_principal_investigator_alone_does_not_release_the_own_award():
    assert fault(rule(), "ivy", leads=["max"]) is None
    assert "principal investigator alone" in fault(rule(), "ivy", leads=["Ivy"])
    assert fault(rule(), "ivy", "max", leads=["ivy"]) is None
    assert "too few people" in fault(rule(topic=b"hazard"), "ivy", leads=["ivy"])


# -- notes and commands ---------------------------------------------------------------------------


def note(of, person, kind="after-review", text="it was needed"):
    return approvals.sign_note(of, kind, text, ISSUED, bundles.signer(person))


def keep(root, envelope, folder=approvals.FOLDER):
    return keep_file(envelope, root / folder)


PEOPLE = enrolled(
    grace=("general_counsel",), tom=("approver",), max=("isso",), ben=("builder",), rosa=("root",)
).document


def test_a_review_is_owed_until_somebody_else_signs_it(tmp_path):
    broken = signed("grace", "tom")
    keep(tmp_path, broken)
    keep(tmp_path, approvals.OVERRIDE.sign(statement(), bundles.signer("grace")))
    keep(tmp_path, signed("grace", reason="one person broke nothing"))
    assert [each.is_open for each in approvals.reviews_of(tmp_path, PEOPLE)] == [True]
    for nobody in ("grace", "tom", "ben", "mallory"):
        keep(tmp_path, note(broken, nobody, text=f"by {nobody}"), approvals.NOTES)
        assert [each.is_open for each in approvals.reviews_of(tmp_path, PEOPLE)] == [True], nobody
    keep(tmp_path, note(broken, "max"), approvals.NOTES)
    (review,) = approvals.reviews_of(tmp_path, PEOPLE)
    assert (review.is_open, review.note.text) == (False, "it was needed")


def test_an_approval_that_is_taken_back_lifts_nothing_and_its_review_stays_owed(tmp_path):
    broken = signed("grace", "tom")
    keep(tmp_path, broken)
    assert len(approvals.load_approvals(tmp_path, PEOPLE).approvals) == 1
    keep(tmp_path, note(broken, "ben", "revocation", "no approver"), approvals.NOTES)
    assert len(approvals.load_approvals(tmp_path, PEOPLE).approvals) == 1
    keep(tmp_path, note(broken, "max", "revocation", "a mistake"), approvals.NOTES)
    assert approvals.load_approvals(tmp_path, PEOPLE).approvals == ()
    assert [each.is_open for each in approvals.reviews_of(tmp_path, PEOPLE)] == [True]


BAD_NOTES = {
    "another kind": lambda d: d["predicate"].update(kind="praise"),
    "no text": lambda d: d["predicate"].update(text=""),
    "another type": lambda d: d.update(predicateType=approvals.OVERRIDE.predicate_type),
    "about nothing": lambda d: d.update(subject=[]),
}


@pytest.mark.parametrize("change", BAD_NOTES.values(), ids=BAD_NOTES.keys())
def test_a_note_of_another_form_is_refused(change):
    from bundle.canonical import canonical_json
    from bundle.envelope import sign_statement

    good = note(signed("grace", "tom"), "max")
    assert approvals.verify_note(good, PEOPLE).people[0].person == "max"
    document = json.loads(good.payload)
    change(document)
    bad = sign_statement(canonical_json(document), PAYLOAD_TYPE, bundles.signer("max"))
    with pytest.raises(AirgapError, match="note"):
        approvals.verify_note(bad, PEOPLE)
    with pytest.raises(AirgapError):
        approvals.sign_note(signed("grace"), "praise", "x", ISSUED, bundles.signer("max"))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "site.toml").write_bytes(DEMO.read_bytes())
    made = trust.new_root(bundles.public("root"), bundles.signer("root"), now=LONG_AGO)
    for name in ("grace", "tom", "max"):
        keys.new_key(root / "keys", name, person=name, roles=("general_counsel",))
        public = keys.parse_public_key((root / "keys" / f"{name}.pub.json").read_bytes())
        made = trust.add_key(made, public, [bundles.signer("root")], now=LONG_AGO)
    paula = bundles.signer("paula").public_key
    public = keys.PublicKeyFile(
        keyid=paula.keyid,
        person="paula",
        public=keys.encode_base64(paula.public),
        roles=("policy",),
        scheme=paula.scheme,
    )
    made = trust.add_key(made, public, [bundles.signer("root")], now=LONG_AGO)
    trust.save_trust(made, root / "trust")
    with open_log(root, site="Test Lab"):
        pass
    return root


@pytest.fixture
def call(capsys, tree):
    app = typer.Typer()
    policy.register(app)
    install.register(app)

    def run(*argv):
        try:
            line = [*(str(each) for each in argv), "--root", str(tree), "--json"]
            status = app(args=line, standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        out = capsys.readouterr().out
        return status, json.loads(out)

    return run


def test_the_whole_life_of_an_emergency(call, tree):
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    status, made = call(
        *("approve", "new", "LIC-CONFLICT", "--bundle", BUNDLE, "--project", PROJECT),
        *("--reason", "the reactor must be shut", "--expires", tomorrow, "--break-glass"),
        *("--key", "grace", "--confirm", PROJECT),
    )
    assert (status, made["break_glass"]) == (0, True)
    assert call("status")[1]["reviews_owed"] == []  # one person has broken nothing yet
    call("approve", "sign", made["file"], "--key", "tom", "--confirm", PROJECT)
    (owed,) = call("status")[1]["reviews_owed"]
    assert owed.startswith("REVIEW OWED: break-glass of LIC-CONFLICT")
    _, checked = call("policy", "check", "--model", "logos-8b", "--project", PROJECT)
    assert checked["reviews_owed"] == [owed]
    status, refused = call("approve", "review", made["file"], "--key", "tom", "--finding", "fine")
    assert (status, refused["code"]) == (1, "policy.approval")
    status, done = call("approve", "review", made["file"], "--key", "max", "--finding", "fine")
    assert (status, done["people"]) == (0, ["max"])
    assert call("status")[1]["reviews_owed"] == []
    _, listed = call("approve", "list")
    assert listed["reviews"][0]["finding"] == "fine"
    status, _ = call("approve", "revoke", made["file"], "--key", "max", "--reason", "over")
    assert (status, call("approve", "list")[1]["approvals"]) == (0, [])
    acts = [
        (each["phase"], each["actor"]["name"])
        for each in read_records(tree / "audit")
        if each["kind"] == "admin.approval"
    ]
    assert acts == [
        (phase, who) for who in ("grace", "tom", "max", "max") for phase in ("intent", "outcome")
    ]


def approve(call, rule, *more, person="grace"):
    later = datetime.now(UTC).date() + timedelta(days=2)
    _, made = call(
        *("approve", "new", rule, "--bundle", BUNDLE, "--project", PROJECT, "--reason", "[b]why"),
        *("--expires", later, "--key", person, "--confirm", PROJECT, *more),
    )
    return made


def test_what_an_approval_does_not_lift_is_told_when_it_is_signed(call):
    assert (
        "too few people"
        in approve(call, "LIC-CONFLICT", "--break-glass")["without_effect"]["LIC-CONFLICT"]
    )
    assert (
        "break-glass is not"
        in approve(call, "HAZ-CWC1", "--break-glass")["without_effect"]["HAZ-CWC1"]
    )
    assert "cannot be lifted" in approve(call, "CUI-BOUNDARY")["without_effect"]["CUI-BOUNDARY"]


def test_a_new_edition_puts_approvals_of_lineage_rules_up_for_review(call, tree):
    approve(call, "US-NDAA26-1532-B")
    assert call("approve", "list")[1]["up_for_review"] == []
    shipped = next((Path(pack.__file__).parent / "lists").glob("*1260h*.yaml")).read_text()
    days = re.sub(
        r'(released|published|retrieved_on|prepared_on): "\d{4}-\d\d-\d\d"',
        r'\1: "2098-01-01"',
        shipped,
    )
    assert days != shipped
    content = days.replace('edition: "', 'edition: "9').encode()
    beside = tree / "policy" / "newer.yaml"
    beside.write_bytes(content)
    signed_file = site_rules.sign_file(
        content, "newer.yaml", bundles.signer("paula"), author=None, issued=ISSUED
    )
    beside.with_name("newer.yaml.sig.json").write_bytes(signed_file.to_bytes())
    (line,) = call("approve", "list")[1]["up_for_review"]
    assert "US-NDAA26-1532-B" in line


def test_an_ordinary_approval_owes_no_review(call):
    later = datetime.now(UTC).date() + timedelta(days=30)
    _, made = call(
        *("approve", "new", "LIC-CONFLICT", "--bundle", BUNDLE, "--project", PROJECT),
        *("--reason", "read", "--expires", later, "--key", "grace", "--confirm", PROJECT),
    )
    status, refused = call("approve", "review", made["file"], "--key", "max", "--finding", "fine")
    assert (status, "owes" in refused["error"]) == (1, True)
    assert TRUST.document  # the shared root of the other tests stays as it is
