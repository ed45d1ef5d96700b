"""The statement of an approver: her role is part of what is signed, and cannot be taken away."""

from dataclasses import replace

import bundles
import cnsa2
import pytest

from bundle import approval, envelope, trust
from bundle.archive import read_head
from bundle.canonical import canonical_json
from bundle.medium import overwrite
from bundle.source import PlainFile
from bundle.staging import sign as signing
from bundle.staging.release import DECISION
from bundle.statement import PAYLOAD_TYPE, approved_by, parse_statement
from bundle.tar import BLOCK
from bundle.verify import open_bundle, verify_bundle
from bundle.write import Member
from policy.errors import AirgapError

ROOTS = bundles.make_trust()
STRICT = bundles.make_trust(required_roles=("isso",))
EXTRA = Member(DECISION, b"{}", "policy", "application/json")
NOW = bundles.NOW


def code_of(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


def make(path, roots=ROOTS, **more):
    members = bundles.make_members(extra=(EXTRA,))
    bundles.make_bundle(
        path, roots=roots, signers=("builder",), members=members, attested=True, **more
    )
    return path


def sign(path, who, roots=ROOTS, **more):
    return signing.sign(
        signing.read_draft(path), roots, bundles.signer(who), confirmation="tiny", now=NOW, **more
    )


def seal_of(path):
    source = PlainFile(path)
    try:
        return envelope.parse_seal(read_head(source).envelope)
    finally:
        source.close()


def put(path, sealed):
    overwrite(path, BLOCK, sealed.to_padded())


@pytest.fixture
def draft(tmp_path):
    return make(tmp_path / "tiny.agb")


@pytest.fixture
def signed(draft):
    sign(draft, "alice")
    sign(draft, "bob", role="isso", conditions="not for classified targets")
    return draft


def test_role_and_condition_are_in_the_seal(signed):
    found = verify_bundle(signed, ROOTS, now=NOW)
    alice, bob = found.seal.approvals
    assert (alice.person, alice.roles, alice.conditions) == ("alice", ("approver",), None)
    assert (bob.person, bob.roles) == ("bob", ("isso",))
    assert bob.conditions == "not for classified targets"
    assert (bob.approved, bob.expires) == (NOW, found.manifest.expires)
    told = found.as_document()["approvals"]
    assert [each["person"] for each in told] == ["alice", "bob"]
    statements = [envelope.parse_envelope(raw) for raw in seal_of(signed).statements]
    assert {each.payload_type for each in statements} == {"application/vnd.in-toto+json"}
    assert approval.read_approvals(seal_of(signed)) == (alice, bob)


def test_a_role_that_was_not_named_is_not_borne(tmp_path):
    path = make(tmp_path / "tiny.agb", STRICT)
    sign(path, "alice", STRICT)
    assert sign(path, "bob", STRICT, role="approver").missing_roles == ("isso",)
    with pytest.raises(AirgapError, match="approved in the role isso") as caught:
        open_bundle(path, STRICT, now=NOW)
    assert caught.value.code == "seal.role"
    path = make(tmp_path / "second.agb", STRICT)
    sign(path, "alice", STRICT)
    assert sign(path, "bob", STRICT).complete
    open_bundle(path, STRICT, now=NOW).close()


def with_statement(path, *, person="bob", signers=("bob",), **changes):
    """Return the statement that these signers would make, somewhat changed."""
    sealed = seal_of(path)
    about = approved_by(parse_statement(sealed.payload), sealed.payload)
    roles = changes.pop("roles", ("isso",))
    made = approval.with_approval(
        replace(sealed, statements=()),
        replace(about, **changes),
        [bundles.signer(name) for name in signers],
        person=person,
        roles=roles,
        approved=NOW,
    )
    return made.statements[0]


TAMPER = {
    "taken away": lambda _: None,
    "signed by another": lambda path: with_statement(path, signers=("alice",)),
    "signed by a stranger": lambda path: with_statement(path, signers=("mallory",)),
    "of another seal": lambda path: with_statement(path, payload=b"{}"),
    "of another release": lambda path: with_statement(path, manifest_sha256="0" * 64),
    "of another report": lambda path: with_statement(path, report_digest="sha256:" + "0" * 64),
    "with another end": lambda path: with_statement(path, expires=NOW),
    "with a role of nobody's": lambda path: with_statement(path, roles=("export",)),
    "with an office": lambda path: with_statement(path, person="bob", roles=("root",)),
    "of a builder": lambda path: with_statement(path, person="ben", signers=("builder",)),
    "noise": lambda _: b"{",
}


@pytest.mark.parametrize("how", TAMPER)
def test_without_a_statement_that_holds_nobody_counts(signed, how):
    sealed = seal_of(signed)
    bobs = next(
        raw
        for raw in sealed.statements
        if b'"roles":["isso"]' in envelope.parse_envelope(raw).payload
    )
    assert with_statement(signed) != bobs  # another time, no condition: and as good
    rest = [raw for raw in sealed.statements if raw != bobs]
    put(signed, sealed.with_statements([*rest, with_statement(signed)]))
    open_bundle(signed, ROOTS, now=NOW).close()
    bad = TAMPER[how](signed)
    put(signed, sealed.with_statements([*rest, *([] if bad is None else [bad])]))
    with pytest.raises(AirgapError, match="without a statement of approval that holds: bob") as c:
        open_bundle(signed, ROOTS, now=NOW)
    assert c.value.code == "seal.threshold"


@pytest.mark.parametrize("spoil", ["order", "twice", "empty", "many", "base64", "type"])
def test_statements_have_one_form(signed, spoil):
    import json

    sealed = seal_of(signed)
    value = json.loads(sealed.to_bytes())
    put(signed, sealed)
    open_bundle(signed, ROOTS, now=NOW).close()
    good = value["statements"]
    value["statements"] = {
        "order": good[::-1],
        "twice": [good[0], good[0]],
        "empty": [],
        "many": sorted(good * 9),
        "base64": [good[0].rstrip("=") + "!"],
        "type": [1],
    }[spoil]
    overwrite(signed, BLOCK, canonical_json(value).ljust(envelope.ENVELOPE_SIZE))
    assert code_of(open_bundle, signed, ROOTS, now=NOW) == "seal.malformed"


def test_no_other_document_carries_statements(signed):
    raw = seal_of(signed).to_bytes()
    assert code_of(envelope.parse_envelope, raw) == "seal.malformed"
    root = replace(ROOTS.chain[0], statements=(b"x",)).to_bytes()
    assert code_of(trust.import_root, root, ROOTS.documents[0].fingerprint) == "trust.chain"


def test_what_cannot_be_said_is_not_signed(draft):
    assert code_of(sign, draft, "alice", conditions="x" * 2000) == "seal.malformed"
    assert code_of(sign, draft, "alice", conditions="\u202etxt") == "seal.malformed"
    assert seal_of(draft).statements == ()
    assert len(seal_of(draft).signatures) == 1


def test_a_seal_of_before_counts_without_statements(tmp_path):
    bundles.make_bundle(tmp_path / "old.agb")
    found = verify_bundle(tmp_path / "old.agb", ROOTS, now=NOW)
    assert (found.seal.approvers, found.seal.approvals) == (("alice", "bob"), ())


def test_the_envelope_has_room_for_as_many_as_are_needed():
    about = approval.Approved(b"x" * 2000, "0" * 64, "sha256:" + "0" * 64, NOW)
    for profile, most in (("default", 16), ("cnsa2", 6)):
        made = envelope.Envelope(about.payload, PAYLOAD_TYPE, ())
        pairs = [
            cnsa2.pair(f"p{n}") if profile == "cnsa2" else (bundles.signer(f"p{n}"),)
            for n in range(most + 1)
        ]
        for signers in pairs:  # and the builder
            made = envelope.add_signature(made, *signers)
        for number, signers in enumerate(pairs[:most]):
            made = approval.with_approval(
                made,
                about,
                signers,
                person=f"p{number}",
                roles=("approver", "isso"),
                approved=NOW,
                conditions="c" * 100,
            )
        assert len(made.to_padded()) == envelope.ENVELOPE_SIZE
        root = ROOTS.document.model_copy(update={"profile": profile})
        for people in (most, most + 1):
            seal = root.thresholds.seal.model_copy(update={"people": people})
            asked = root.model_copy(
                update={"thresholds": root.thresholds.model_copy(update={"seal": seal})}
            )
            assert approval.have_room(asked) is (people == most)
