"""An approval to bring back an older release: who may give it, for what, and what it never does."""

from dataclasses import replace
from datetime import timedelta

import bundles
import pytest

from bundle import envelope, revocation, rollback, trust
from bundle.canonical import canonical_json
from bundle.verify import Floors, open_bundle
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

NOW = bundles.NOW
MARK = (5, Digest.of(b"the newer release"))
ROOTS = bundles.make_trust()


def approval(manifest, *names, mark=MARK, now=NOW, days=7, reason="release 5 answers wrongly"):
    people = [bundles.signer(name) for name in names]
    return rollback.sign_rollback(
        manifest, mark, reason, people, now=now, valid_for=timedelta(days=days)
    )


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    path = tmp_path_factory.mktemp("older") / "older.agb"
    return path, bundles.make_bundle(path, epoch=3)


def verify(signed, manifest, *, roots=ROOTS, mark=MARK, now=NOW, builder="ben"):
    return rollback.verify_rollback(signed, roots, manifest, builder=builder, mark=mark, now=now)


def listed(**entries):
    document = revocation.RevocationDocument(
        version=1, issued=bundles.CREATED, next_update=NOW + timedelta(days=60), **entries
    )
    signed = envelope.sign_statement(
        document.to_bytes(), revocation.LIST_TYPE, bundles.signer("reva")
    )
    key = bundles.signer("reva").public_key
    grown = trust.add_key(
        ROOTS,
        bundles.public("alice").model_copy(
            update={
                "keyid": key.keyid,
                "public": bundles.keys.encode_base64(key.public),
                "person": "reva",
                "roles": ("revocation",),
            }
        ),
        [bundles.signer("root")],
        now=bundles.ENROLLED,
    )
    return trust.accept_revocations(grown, signed)


def code_of(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


def test_two_approvers_bring_one_older_release_back(older):
    path, manifest = older
    floors = Floors(epochs={"tiny-line": MARK})
    assert code_of(open_bundle, path, ROOTS, now=NOW, floors=floors) == "trust.epoch"
    signed = approval(manifest, "alice", "bob")
    with open_bundle(path, ROOTS, now=NOW, floors=floors, rollback=signed) as sealed:
        assert sealed.rollback is not None
        assert sealed.rollback.approvers == ("alice", "bob")
        assert sealed.rollback.digest == Digest.of(signed.payload)
        assert sealed.rollback.statement.reason == "release 5 answers wrongly"


def test_an_approval_is_not_looked_at_for_a_release_that_needs_none(older):
    path, manifest = older
    nonsense = replace(approval(manifest, "alice"), payload=b"{")
    with open_bundle(path, ROOTS, now=NOW, rollback=nonsense) as sealed:
        assert sealed.rollback is None
    # a twin of the same epoch is no older release, and nobody can approve it
    floors = Floors(epochs={"tiny-line": (3, MARK[1])})
    signed = approval(manifest, "alice", "bob")
    assert code_of(open_bundle, path, ROOTS, now=NOW, floors=floors, rollback=signed) == (
        "trust.epoch"
    )


@pytest.mark.parametrize(
    "names",
    [(), ("alice",), ("alice", "alice2"), ("alice", "mallory"), ("alice", "root"), ("builder",)],
)
def test_too_few_distinct_approvers_are_refused(older, names):
    _, manifest = older
    assert verify(approval(manifest, "alice", "bob"), manifest).approvers == ("alice", "bob")
    assert code_of(verify, approval(manifest, *names), manifest) == "trust.rollback"


def test_the_builder_of_a_release_never_approves_its_return(older):
    _, manifest = older
    signed = approval(manifest, "alice", "carol")  # carol builds and approves
    assert verify(signed, manifest).approvers == ("alice", "carol")
    assert code_of(verify, signed, manifest, builder="carol") == "trust.rollback"


def test_required_roles_are_those_of_a_seal(older):
    _, manifest = older
    strict = bundles.make_trust(required_roles=("isso",))
    assert verify(approval(manifest, "alice", "bob"), manifest, roots=strict)
    with pytest.raises(RefusedError, match="role isso"):
        verify(approval(manifest, "alice", "carol"), manifest, roots=strict)


def test_an_approval_is_for_one_release_one_mark_and_some_days(older, tmp_path):
    _, manifest = older
    signed = approval(manifest, "alice", "bob")
    assert verify(signed, manifest, now=NOW + timedelta(days=6))
    assert code_of(verify, signed, manifest, now=NOW + timedelta(days=7)) == "trust.rollback"
    assert code_of(verify, signed, manifest, now=NOW - timedelta(seconds=1)) == "trust.rollback"
    for mark in ((6, MARK[1]), (5, Digest.of(b"another"))):
        assert code_of(verify, signed, manifest, mark=mark) == "trust.rollback"
    other = bundles.make_bundle(tmp_path / "other.agb", epoch=2)
    assert code_of(verify, signed, other) == "trust.rollback"


def test_what_is_revoked_never_comes_back(older):
    _, manifest = older
    signed = approval(manifest, "alice", "bob")
    weights = manifest.find("payload/tiny/model.onnx_data").sha256
    assert verify(signed, manifest, roots=listed(models={"0" * 64: "x"}))
    below = {"tiny-line": revocation.EpochFloor(below=4, reason="unpatched")}
    for entries in (
        {"bundles": {str(manifest.digest): "bad"}},
        {"models": {weights: "bad"}},
        {"epochs": below},
    ):
        assert code_of(verify, signed, manifest, roots=listed(**entries)) == "trust.revoked"
    at_the_floor = {"tiny-line": revocation.EpochFloor(below=3, reason="unpatched")}
    assert verify(signed, manifest, roots=listed(epochs=at_the_floor))


def test_a_revoked_approver_counts_for_nothing(older):
    _, manifest = older
    signed = approval(manifest, "alice", "bob")
    assert code_of(verify, signed, manifest, roots=listed(people={"bob": "left"})) == (
        "trust.rollback"
    )


def test_an_approval_that_says_nothing_sensible_is_not_made(older):
    _, manifest = older
    for more in ({"mark": (3, MARK[1])}, {"days": 31}, {"days": 0}, {"reason": "  "}):
        assert code_of(approval, manifest, "alice", **more) == "trust.rollback"


@pytest.mark.parametrize(
    "alter",
    [
        lambda value: value | {"more": 1},
        lambda value: value | {"format": "airgap-rollback/2"},
        lambda value: value | {"epoch": 5},
        lambda value: value | {"expires": "2036-06-01T12:00:00Z"},
        lambda value: {k: v for k, v in value.items() if k != "above"},
    ],
)
def test_a_malformed_approval_is_refused(older, alter):
    _, manifest = older
    good = approval(manifest, "alice", "bob")
    value = rollback.parse_rollback(good.payload).model_dump(mode="json")
    assert canonical_json(value) == good.payload
    bad = envelope.sign_statement(
        canonical_json(alter(value)),
        rollback.ROLLBACK_TYPE,
        bundles.signer("alice"),
        bundles.signer("bob"),
    )
    assert code_of(verify, bad, manifest) == "trust.rollback"


def test_a_document_of_another_kind_is_no_approval(older):
    _, manifest = older
    payload = approval(manifest, "alice", "bob").payload
    clock = envelope.sign_statement(
        payload, "application/vnd.airgap.clock+json", bundles.signer("alice")
    )
    assert code_of(verify, clock, manifest) == "seal.type"


# -- epochs on the revocation list ------------------------------------------------------------


def test_a_floor_of_epochs_revokes_the_older_releases_of_its_line(older):
    path, _ = older
    floor = revocation.EpochFloor(below=4, reason="unpatched")
    assert open_bundle(path, listed(epochs={"other-line": floor}), now=NOW).digest
    with pytest.raises(RefusedError, match="all below 4") as caught:
        open_bundle(path, listed(epochs={"tiny-line": floor}), now=NOW)
    assert caught.value.code == "trust.revoked"


def test_a_floor_of_epochs_never_sinks():
    held = listed(epochs={"tiny-line": revocation.EpochFloor(below=4, reason="x")}).revocations
    for epochs in (None, {"tiny-line": revocation.EpochFloor(below=3, reason="x")}):
        document = held.document.model_copy(update={"version": 2, "epochs": epochs})
        offered = revocation.Revocations(held.envelope, document)
        with pytest.raises(RefusedError, match="below 4"):
            revocation.require_newer(held, offered)
    higher = {"tiny-line": revocation.EpochFloor(below=5, reason="x")}
    document = held.document.model_copy(update={"version": 2, "epochs": higher})
    revocation.require_newer(held, revocation.Revocations(held.envelope, document))
