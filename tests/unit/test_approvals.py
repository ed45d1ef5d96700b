"""Signed approvals: what is signed, who counts, what a changed file is worth, and the commands."""

import json
from datetime import UTC, date, datetime

import bundles
import pytest
import typer
from policy_cases import DEMO, NOW, RULES, blocking, demo_site

from airgap import approvals
from airgap.cli import approve
from airgap.cli import policy as commands
from airgap.cli.common import show_error
from airgap.gate import decide_admission
from airgap.model_facts import registry_facts
from bundle import keys, trust
from bundle.envelope import Envelope, Signature
from bundle.intoto import PAYLOAD_TYPE
from policy.errors import AirgapError, RefusedError
from policy.terms import URI_BASE, Digest, Known, Outcome

BUNDLE = Digest.of(b"manifest of LOGOS-8B")
ISSUED = datetime(2026, 11, 1, tzinfo=UTC)
PROJECT = "route-design"
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)  # the commands read the clock, whatever it says


def enrolled(**people):
    """A trust root with these people and roles, each with a key of the same name."""
    made = trust.new_root(bundles.public("root"), bundles.signer("root"), now=bundles.ENROLLED)
    for name, roles in people.items():
        key = bundles.signer(name).public_key
        made = trust.add_key(
            made,
            keys.PublicKeyFile(
                keyid=key.keyid,
                person=name.rstrip("2"),
                public=keys.encode_base64(key.public),
                roles=roles,
                scheme=key.scheme,
            ),
            [bundles.signer("root")],
            now=bundles.ENROLLED,
        )
    return made


TRUST = enrolled(grace=("general_counsel",), grace2=("general_counsel",), tom=("approver",))


def statement(**changes):
    fields = {
        "rules": {"LIC-CONFLICT": 1},
        "project": PROJECT,
        "task": None,
        "reason": "both licences read; their union is acceptable",
        "issued": ISSUED,
        "expires": date(2027, 6, 1),
        "document": Digest.of(b"memo"),
        "authority": None,
        **changes,
    }
    return approvals.OVERRIDE.draft(approvals.override(**fields), BUNDLE)


def decide(*envelopes, submitter="ada"):
    assumed = {
        name: Known(value, "test")
        for name, value in {
            "bundle.verified": True,
            "bundle.manifest_complete": True,
            "bundle.provenance_level": 1,
            "bundle.licence_texts_recorded": True,
        }.items()
    }
    found = tuple(approvals.verify_approval(each, TRUST.document) for each in envelopes)
    return decide_admission(
        demo_site(),
        RULES,
        registry_facts("logos-8b", RULES.registry),
        bundle_digest=BUNDLE,
        project=PROJECT,
        as_of=NOW.date(),
        known_at=NOW,
        submitter=submitter,
        assumed=assumed,
        approvals=approvals.Approvals(found),
    )


def test_counsel_lifts_the_licence_conflict_of_logos_in_writing():
    assert blocking(decide()) == {"LIC-CONFLICT"}
    signed = approvals.OVERRIDE.sign(statement(), bundles.signer("grace"))
    decision = decide(signed)
    assert decision.outcome is Outcome.PERMIT_WITH_OBLIGATIONS
    assert decision.as_document()["approvals"] == [
        {
            "rule": "LIC-CONFLICT",
            "digest": str(Digest.of(signed.payload)),
            "approvers": ["grace"],
            "expires": "2027-06-01",
            "reason": "both licences read; their union is acceptable",
        }
    ]


def test_the_predicate_type_hangs_under_our_base():
    assert f"{URI_BASE}override/v1" == approvals.OVERRIDE.predicate_type


WORTHLESS = {
    "nobody enrolled": lambda: approvals.OVERRIDE.sign(statement(), bundles.signer("mallory")),
    "another role": lambda: approvals.OVERRIDE.sign(statement(), bundles.signer("tom")),
    "a changed payload": lambda: Envelope(
        statement(expires=date(2027, 6, 2)).to_bytes(),
        PAYLOAD_TYPE,
        approvals.OVERRIDE.sign(statement(), bundles.signer("grace")).signatures,
    ),
    "a broken signature": lambda: Envelope(
        statement().to_bytes(),
        PAYLOAD_TYPE,
        (Signature(bundles.signer("grace").public_key.keyid, b"\0" * 64),),
    ),
    "another project": lambda: approvals.OVERRIDE.sign(
        statement(project="sensor-coatings"), bundles.signer("grace")
    ),
    "an approval from before she was enrolled": lambda: approvals.OVERRIDE.sign(
        statement(issued=datetime(2026, 4, 1, tzinfo=UTC), expires=date(2027, 3, 1)),
        bundles.signer("grace"),
    ),
}


@pytest.mark.parametrize("make", WORTHLESS.values(), ids=WORTHLESS.keys())
def test_an_approval_that_is_not_what_it_seems_lifts_nothing(make):
    assert decide(approvals.OVERRIDE.sign(statement(), bundles.signer("grace"))).permitted
    assert blocking(decide(make())) == {"LIC-CONFLICT"}


def test_the_submitter_does_not_approve_her_own():
    assert not decide(
        approvals.OVERRIDE.sign(statement(), bundles.signer("grace")), submitter="Grace"
    ).permitted


def test_two_keys_of_one_person_are_one_person():
    signed = approvals.OVERRIDE.sign(statement(), bundles.signer("grace"))
    signed = approvals.countersign(signed, bundles.signer("grace2"))
    found = approvals.verify_approval(signed, TRUST.document)
    assert [each.person for each in found.approvers] == ["grace"]


def other_forms():
    good = json.loads(statement().to_bytes())
    yield b"{}"
    yield b"not json"
    yield json.dumps(good).encode()  # spaces: not the canonical form
    for change in (
        {"predicateType": f"{URI_BASE}seal/v1"},
        {"subject": []},
        {"more": 1},
        {"predicate": {**good["predicate"], "expires": "2027-02-30"}},
        {"predicate": {**good["predicate"], "rules": []}},
        {"predicate": {**good["predicate"], "reason": "a\u202eb"}},
    ):
        yield json.dumps(
            {**good, **change}, separators=(",", ":"), sort_keys=True, ensure_ascii=False
        ).encode()


@pytest.mark.parametrize("payload", list(other_forms()))
def test_another_statement_is_refused(payload):
    assert approvals.OVERRIDE.parse(statement().to_bytes())
    with pytest.raises(RefusedError) as caught:
        approvals.OVERRIDE.parse(payload)
    assert caught.value.code == "policy.approval"


def test_an_override_that_cannot_be_said_is_refused():
    with pytest.raises(RefusedError) as caught:
        statement(project="../x")
    assert caught.value.code == "policy.approval"


def reasons(*envelopes, **options):
    decision = decide(*envelopes, **options)
    return [each.reason for each in decision.idle_approvals()]


IDLE = {
    "issued after the legal day": ({"issued": datetime(2026, 12, 1, tzinfo=UTC)}, "not yet valid"),
    "expired": ({"expires": date(2026, 11, 2)}, "expired on 2026-11-02"),
    "another project": ({"project": "sensor-coatings"}, "for project sensor-coatings"),
    "a task, and an admission": ({"task": "molecule"}, "for task molecule"),
    "another version": ({"rules": {"LIC-CONFLICT": 2}}, "for version 2 of LIC-CONFLICT"),
    "no such rule": ({"rules": {"LIC-OLD": 1}}, "no such rule is loaded"),
    "a rule of uses": ({"rules": {"CUI-BOUNDARY": 1}}, "cannot be lifted"),
    "a rule that is content": ({"rules": {"LIST-STALE": 1}}, "too few people: 0 of 1"),
    "too long": ({"expires": date(2031, 1, 1)}, "runs longer than"),
}


@pytest.mark.parametrize(("changes", "words"), IDLE.values(), ids=IDLE.keys())
def test_an_approval_without_effect_says_why(changes, words):
    signed = approvals.OVERRIDE.sign(statement(**changes), bundles.signer("grace"))
    (reason,) = reasons(signed)
    assert words in reason, reason
    assert not decide(signed).permitted


def test_only_approvals_without_effect_are_listed_the_nearest_first():
    good = approvals.OVERRIDE.sign(statement(), bundles.signer("grace"))
    shorter = approvals.OVERRIDE.sign(statement(expires=date(2027, 5, 1)), bundles.signer("grace"))
    elsewhere = approvals.OVERRIDE.sign(
        statement(project="sensor-coatings"), bundles.signer("grace")
    )
    nobody = approvals.OVERRIDE.sign(statement(), bundles.signer("tom"))
    assert reasons(good) == []
    assert reasons(elsewhere, good, shorter) == [
        "LIC-CONFLICT is lifted by another approval, which lasts longer",
        "for project sensor-coatings",
    ]
    assert reasons(nobody) == ["too few people: 0 of 1 with role general_counsel"]
    assert reasons(good, submitter="grace") == ["the submitter is among the approvers"]


def test_hazard_rules_are_not_spoken_of_without_the_role():
    signed = approvals.OVERRIDE.sign(statement(rules={"HAZ-CWC1": 1}), bundles.signer("grace"))
    decision = decide(signed)
    assert decision.idle_approvals() == ()
    assert [each.rules for each in decision.idle_approvals(hazard_role=True)] == [("HAZ-CWC1",)]


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "site.toml").write_bytes(DEMO.read_bytes())
    for name in ("grace", "tom"):
        keys.new_key(root / "keys", name, person=name, roles=("general_counsel",))
    made = trust.new_root(bundles.public("root"), bundles.signer("root"), now=LONG_AGO)
    for name in ("grace", "tom"):
        public = keys.parse_public_key((root / "keys" / f"{name}.pub.json").read_bytes())
        made = trust.add_key(made, public, [bundles.signer("root")], now=LONG_AGO)
    trust.save_trust(made, root / "trust")
    return root


@pytest.fixture
def call(capsys):
    app = typer.Typer()
    commands.register(app)

    def run(*argv):
        try:
            status = app(args=[str(each) for each in argv], standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def arguments(tree, *more):
    return (
        *("approve", "new", "LIC-CONFLICT", "--bundle", BUNDLE, "--project", PROJECT),
        *("--reason", "read", "--expires", "2099-01-01", "--key", "grace", "--root", tree),
        *("--json", *more),
    )


def test_an_approval_is_drafted_signed_countersigned_and_listed(call, tree, tmp_path):
    memo = tmp_path / "memo.txt"
    memo.write_text("we read it")
    status, out, err = call(*arguments(tree, "--confirm", PROJECT, "--document", memo))
    assert status == 0, out
    document = json.loads(out)
    assert document["people"] == ["grace"]
    assert "You approve LIC-CONFLICT for bundle sha256:" in err
    status, out, _ = call(
        *("approve", "sign", document["file"], "--key", tree / "keys" / "tom.pem"),
        *("--confirm", PROJECT, "--root", tree, "--json"),
    )
    assert (status, json.loads(out)["people"]) == (0, ["grace", "tom"])
    status, out, _ = call("approve", "list", "--root", tree)
    assert (status, "signed by grace, tom" in out) == (0, True)
    assert [path.suffix for path in (tree / "policy" / "approvals").iterdir()] == [".json"]
    # Questions read them, and the folder of approvals is no folder of rules.
    status, out, _ = call("policy", "explain", "--model", "logos-8b", "--root", tree, "--json")
    assert status == 0


def test_an_approval_after_the_fixed_legal_day_warns_and_is_listed(call, tree):
    status, out, err = call(*arguments(tree, "--confirm", PROJECT))
    assert "site.toml [policy] as_of" in json.loads(out)["warnings"][0]
    assert "warning: issued on" in err
    question = ("--model", "logos-8b", "--project", PROJECT, "--root", tree)
    status, out, _ = call("policy", "explain", *question, "--as-of", "2099-01-02", "--json")
    (idle,) = json.loads(out)["approvals_without_effect"]
    assert (status, idle["rules"]) == (0, ["LIC-CONFLICT"])
    assert "none with a digest" in idle["reason"]
    status, out, _ = call("policy", "explain", *question)
    assert "Approvals without effect" in out
    status, out, err = call("policy", "check", *question)
    assert (status, "approval without effect: LIC-CONFLICT, signed by grace" in err) == (1, True)


def test_an_approval_warns_of_nothing_where_the_day_is_that_of_the_clock(call, tree):
    site = tree / "site.toml"
    text = site.read_text().replace("as_of = ", "# as_of = ").replace("America/New_York", "UTC")
    site.write_text(text)
    _, out, err = call(*arguments(tree, "--confirm", PROJECT))
    assert (json.loads(out)["warnings"], "warning" in err) == ([], False)
    site.unlink()
    _, out, _ = call(*arguments(tree, "--confirm", PROJECT))
    assert json.loads(out)["warnings"] == []


def test_nothing_is_signed_without_the_typed_project(call, tree):
    for more in ((), ("--confirm", "another")):
        status, out, _ = call(*arguments(tree, *more))
        assert (status, json.loads(out)["code"]) == (1, "policy.approval")
    assert not (tree / "policy").exists()


FAULTS = {
    "no such rule": (("LIC-CONFLICT", "LIC-CONFLCT"), "usage.argument"),
    "no such key": (("grace", "nobody"), "host.io"),
    "no such bundle": ((BUNDLE, "nope"), "store.missing"),
    "no digest": ((BUNDLE, "sha256:00"), "digest.malformed"),
}


@pytest.mark.parametrize(("swap", "code"), FAULTS.values(), ids=FAULTS.keys())
def test_an_approval_of_nothing_is_refused(call, tree, swap, code):
    old, new = swap
    argv = [new if each == old else each for each in arguments(tree, "--confirm", PROJECT)]
    status, out, _ = call(*argv)
    assert json.loads(out)["code"] == code
    assert status > 0


def test_a_file_that_is_no_approval_is_refused_loudly(call, tree):
    folder = tree / "policy" / "approvals"
    folder.mkdir(parents=True)
    (folder / "x.json").write_bytes(b"{}")
    for argv in (("approve", "list"), ("policy", "explain", "--model", "logos-8b")):
        status, out, _ = call(*argv, "--root", tree, "--json")
        assert (status, json.loads(out)["code"]) == (1, "policy.approval")
        assert str(folder / "x.json") in json.loads(out)["error"], "which file it is"


def test_the_list_names_no_hazard_rule_to_those_without_the_role(call, tree):
    hazard = ["HAZ-CWC1" if each == "LIC-CONFLICT" else each for each in arguments(tree)]
    assert call(*hazard, "--confirm", PROJECT)[0] == 0
    emergency = ("--confirm", PROJECT, "--break-glass")
    status, out, _ = call(*hazard, *emergency)
    file = json.loads(out)["file"]
    key = tree / "keys" / "tom.pem"
    assert call("approve", "sign", file, "--key", key, "--confirm", PROJECT, "--root", tree)[0] == 0
    for more in ((), ("--json",)):
        status, out, _ = call("approve", "list", "--root", tree, *more)
        assert (status, "HAZ" in out, "CWC" in out) == (0, True, False)
    assert "REVIEW OWED: break-glass of HAZ for" in " ".join(approve.owed(tree))
    (tree / "site.toml").unlink()
    assert "CWC" not in " ".join(approve.owed(tree))


def test_an_approval_for_no_project_of_the_site_is_told(call, tree):
    argv = ["nowhere" if each == PROJECT else each for each in arguments(tree)]
    status, out, _ = call(*argv, "--confirm", "nowhere")
    assert status == 0
    assert "no project of site.toml is called 'nowhere'" in json.loads(out)["warnings"]


@pytest.mark.parametrize(
    ("zone", "issued", "lifts"),
    [
        # 20:30 in New York is the next day in UTC, and still the legal day of the site.
        ("America/New_York", datetime(2026, 11, 24, 1, 30, tzinfo=UTC), True),
        ("UTC", datetime(2026, 11, 24, 1, 30, tzinfo=UTC), False),
        # 00:30 in Tokyo is the day before in UTC, and the legal day has not come yet.
        ("Asia/Tokyo", datetime(2026, 11, 23, 15, 30, tzinfo=UTC), False),
        ("Asia/Tokyo", datetime(2026, 11, 23, 14, 30, tzinfo=UTC), True),
    ],
)
def test_an_approval_counts_from_the_legal_day_on_which_it_was_signed(zone, issued, lifts):
    site = demo_site()
    site = site.model_copy(
        update={"institution": site.institution.model_copy(update={"legal_zone": zone})}
    )
    envelope = approvals.OVERRIDE.sign(statement(issued=issued), bundles.signer("grace"))
    assumed = {
        "bundle.verified": Known(value=True, source="test"),
        "bundle.manifest_complete": Known(value=True, source="test"),
        "bundle.provenance_level": Known(1, "test"),
        "bundle.licence_texts_recorded": Known(value=True, source="test"),
    }
    decision = decide_admission(
        site,
        RULES,
        registry_facts("logos-8b", RULES.registry),
        bundle_digest=BUNDLE,
        project=PROJECT,
        as_of=date(2026, 11, 23),
        known_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        submitter="ada",
        assumed=assumed,
        approvals=approvals.Approvals((approvals.verify_approval(envelope, TRUST.document),)),
    )
    assert ("LIC-CONFLICT" not in blocking(decision)) is lifts
