"""What is checked before an approver signs: the payload, the person, the role, the profile."""

from datetime import timedelta

import bundles
import cnsa2
import pytest

from bundle import archive, envelope, keys, revocation, trust
from bundle.source import PlainFile
from bundle.staging import sign as signing
from bundle.staging.release import DECISION
from bundle.verify import verify_bundle
from bundle.write import Member
from policy.errors import AirgapError

ROOTS = bundles.make_trust()
EXTRA = Member(DECISION, b"{}", "policy", "application/json")


def code_of(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


@pytest.fixture
def draft(tmp_path):
    path = tmp_path / "tiny.agb"
    members = bundles.make_members(extra=(EXTRA,))
    bundles.make_bundle(path, roots=ROOTS, signers=("builder",), members=members)
    return path


@pytest.fixture
def strong(tmp_path):
    path = tmp_path / "strong.agb"
    members = bundles.make_members(extra=(EXTRA,))
    cnsa2.make_cnsa2_bundle(path, members=members, signers=list(cnsa2.pair("builder")))
    return path


def test_a_whole_payload_is_hashed_with_its_progress(draft):
    seen = []
    found = signing.read_draft(draft)
    signing.verify_payload(found, ROOTS, lambda done, total: seen.append((done, total)))
    size = found.manifest.body.size
    assert seen[-1] == (size, size)


def test_a_payload_that_is_not_the_manifests_is_refused(draft):
    found = signing.read_draft(draft)
    signing.verify_payload(found, ROOTS)
    raw = bytearray(draft.read_bytes())
    raw[len(raw) // 2] ^= 1
    draft.write_bytes(raw)
    assert code_of(signing.verify_payload, signing.read_draft(draft), ROOTS) == "chunk.leaf"


def test_a_draft_that_was_exchanged_is_refused(draft):
    found = signing.read_draft(draft)
    members = bundles.make_members(extra=(EXTRA,))
    bundles.make_bundle(draft, roots=ROOTS, signers=("builder",), members=members, version="2")
    assert code_of(signing.verify_payload, found, ROOTS) == "seal.subject"


def test_a_careless_build_is_found_before_it_is_signed(tmp_path):
    members = [m for m in bundles.make_members(extra=(EXTRA,)) if "sbom" not in m.path]
    path = tmp_path / "b.agb"
    bundles.make_bundle(path, roots=ROOTS, signers=("builder",), members=members)
    assert code_of(signing.verify_payload, signing.read_draft(path), ROOTS) == "bom.mismatch"


def test_a_role_is_ones_own(draft):
    found, bob = signing.read_draft(draft), bundles.signer("bob")
    assert signing.require_approver(found, ROOTS, bob) == ("bob", ("isso", "approver"))
    assert signing.require_approver(found, ROOTS, bob, role="isso") == ("bob", ("isso",))
    for role in ("compliance", "root", "x"):
        assert code_of(signing.require_approver, found, ROOTS, bob, role=role) == "seal.role"
        assert (
            code_of(
                signing.sign, found, ROOTS, bob, confirmation="tiny", role=role, now=bundles.NOW
            )
            == "seal.role"
        )


def test_two_people_do_not_sign_in_one_go(draft):
    both = [bundles.signer("alice"), bundles.signer("bob")]
    assert code_of(signing.require_approver, signing.read_draft(draft), ROOTS, both) == "seal.role"
    assert code_of(signing.require_approver, signing.read_draft(draft), ROOTS, []) == "seal.role"


def test_a_revoked_key_signs_nothing_more(draft):
    roots = trust.add_key(
        ROOTS,
        bundles.public("root").model_copy(
            update={
                "keyid": bundles.signer("reva").public_key.keyid,
                "person": "reva",
                "public": keys.encode_base64(bundles.signer("reva").public_key.public),
                "roles": ("revocation",),
            }
        ),
        [bundles.signer("root")],
        now=bundles.ENROLLED,
    )
    document = revocation.RevocationDocument(
        version=1,
        issued=bundles.CREATED,
        next_update=bundles.CREATED + timedelta(days=90),
        people={"alice": "left"},
    )
    listed = trust.accept_revocations(
        roots,
        envelope.sign_statement(document.to_bytes(), revocation.LIST_TYPE, bundles.signer("reva")),
    )
    found = signing.read_draft(draft)
    assert (
        code_of(signing.require_approver, found, listed, bundles.signer("alice")) == "seal.revoked"
    )
    assert signing.require_approver(found, listed, bundles.signer("bob"))[0] == "bob"


def test_a_person_of_cnsa2_signs_with_both_keys(strong):
    roots = cnsa2.make_cnsa2_trust()
    alice, bob = cnsa2.pair("alice"), cnsa2.pair("bob")
    found = signing.read_draft(strong)
    signing.verify_payload(found, roots)
    for half in alice:
        assert code_of(signing.require_approver, found, roots, half) == "seal.role"
    crossed = [alice[0], bob[1]]
    assert code_of(signing.require_approver, found, roots, crossed) == "seal.role"
    assert not signing.sign(found, roots, alice, confirmation="tiny", now=bundles.NOW).complete
    assert (
        code_of(
            signing.sign,
            signing.read_draft(strong),
            roots,
            alice,
            confirmation="tiny",
            now=bundles.NOW,
        )
        == "seal.people"
    )
    tally = signing.sign(
        signing.read_draft(strong), roots, bob, confirmation="tiny", now=bundles.NOW
    )
    assert tally.complete
    assert tally.approvers == ("alice", "bob")
    report = verify_bundle(strong, roots, now=bundles.NOW)
    assert report.seal.approvers == ("alice", "bob")
    assert len(report.seal.keyids) == 6


def test_a_draft_of_another_profile_is_not_signed(draft, strong):
    roots = cnsa2.make_cnsa2_trust()
    pair = cnsa2.pair("alice")
    assert code_of(signing.require_approver, signing.read_draft(draft), roots, pair) == (
        "seal.profile"
    )
    assert (
        code_of(
            signing.require_approver, signing.read_draft(strong), ROOTS, bundles.signer("alice")
        )
        == "seal.profile"
    )


def test_sixteen_people_of_cnsa2_fit_into_the_envelope(strong):
    """Largest seal: a builder and sixteen approvers with two signatures each."""
    source = PlainFile(strong)
    head = archive.read_head(source)
    source.close()
    made = envelope.parse_envelope(head.envelope)
    signatures = [
        envelope.Signature(f"{number:064x}", bytes(4627 if number % 2 else 104))
        for number in range(34)
    ]
    full = envelope.Envelope(made.payload, made.payload_type, tuple(signatures))
    assert len(full.to_padded()) == envelope.ENVELOPE_SIZE
    assert envelope.parse_envelope(full.to_padded()) == full
