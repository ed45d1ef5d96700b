"""The revocation list, rotation of the root, and a clock that ran ahead."""

import json
from datetime import timedelta

import bundles
import cnsa2
import pytest

from airgap.install import Store, install
from airgap.install.standing import require_standing
from airgap.signed import signers_of
from bundle import clock, envelope, keys, revocation, rotation, trust
from bundle.canonical import canonical_json
from bundle.intoto import PAYLOAD_TYPE
from bundle.verify import verify_bundle
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

NOW = bundles.NOW
ROOT = [bundles.signer("root")]


def code_of(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


def public(name, person, *roles):
    key = bundles.signer(name).public_key
    return keys.PublicKeyFile(
        keyid=key.keyid,
        person=person,
        public=keys.encode_base64(key.public),
        roles=roles,
        scheme=key.scheme,
    )


def make_trust(*names, **more):
    made = bundles.make_trust(*names, **more)
    return trust.add_key(made, public("reva", "reva", "revocation"), ROOT, now=bundles.ENROLLED)


def make_list(version=1, signers=("reva",), issued=bundles.CREATED, days=60, **entries):
    document = revocation.RevocationDocument(
        version=version, issued=issued, next_update=issued + timedelta(days=days), **entries
    )
    return envelope.sign_statement(
        document.to_bytes(), revocation.LIST_TYPE, *map(bundles.signer, signers)
    )


@pytest.fixture(scope="module")
def roots():
    return make_trust()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, roots):
    path = tmp_path_factory.mktemp("b") / "b.agb"
    return path, bundles.make_bundle(path, roots=roots, signers=("builder", "alice", "bob"))


def with_list(roots, *args, **more):
    return trust.accept_revocations(roots, make_list(*args, **more))


# -- the list ---------------------------------------------------------------------------------


def test_a_list_without_a_fitting_entry_changes_nothing(roots, bundle):
    path, manifest = bundle
    listed = with_list(roots, keys={"0" * 64: "x"}, bundles={f"sha256:{'0' * 64}": "x"})
    report = verify_bundle(path, listed, now=NOW)
    assert report.as_document()["trust"]["revocations"] == 1
    assert report.alarms == ()
    assert verify_bundle(path, roots, now=NOW).digest == manifest.digest


def test_revoked_things_are_refused(roots, bundle):
    path, manifest = bundle
    weights = manifest.find("payload/tiny/model.onnx_data").sha256
    other = manifest.find("payload/tiny/config.json").sha256
    for entries in (
        {"bundles": {str(manifest.digest): "withdrawn"}},
        {"models": {weights: "poisoned"}},
        {"files": {other: "wrong"}},
    ):
        with pytest.raises(RefusedError, match="revoked by list 1") as caught:
            verify_bundle(path, with_list(roots, **entries), now=NOW)
        assert caught.value.code == "trust.revoked"
    verify_bundle(path, with_list(roots, wheels={other: "not a wheel"}), now=NOW)


def test_a_revoked_signer_counts_for_nothing(roots, bundle, tmp_path):
    path, _ = bundle
    alice = bundles.public("alice").keyid
    for entries in ({"keys": {alice: "lost"}}, {"people": {"alice": "left"}}):
        listed = with_list(roots, **entries)
        with pytest.raises(RefusedError, match="alice") as caught:
            verify_bundle(path, listed, now=NOW)
        assert caught.value.code == "seal.revoked"
        # others may still be enough
        three = tmp_path / f"{min(entries)}.agb"
        bundles.make_bundle(three, roots=roots, signers=("builder", "alice", "bob", "carol"))
        assert verify_bundle(three, listed, now=NOW).seal.approvers == ("bob", "carol")


def test_a_model_is_revoked_by_what_it_was_made_of(roots, tmp_path):
    entry = bundles.make_bundle(tmp_path / "a.agb", roots=roots).files[-1]
    source = "a" * 64
    changed = entry.model_copy(update={"derived_from": (f"sha256:{source}",)})
    listed = with_list(roots, models={source: "poisoned"})
    manifest = bundles.make_bundle(tmp_path / "b.agb", roots=roots)
    revocation.require_unrevoked(listed.revocations, manifest, manifest.digest)
    manifest = manifest.model_copy(update={"files": (*manifest.files[:-1], changed)})
    assert (
        code_of(revocation.require_unrevoked, listed.revocations, manifest, Digest.of(b""))
        == "trust.revoked"
    )


def test_a_list_only_grows(roots):
    two = with_list(roots, 2, keys={"a" * 64: "x"})
    assert trust.accept_revocations(two, two.revocations.envelope) == two  # again
    for bad in (
        make_list(1, keys={"a" * 64: "x"}),  # older
        make_list(2, keys={"a" * 64: "y"}),  # a twin
        make_list(3, keys={"b" * 64: "x"}),  # drops an entry
        make_list(3),
    ):
        assert code_of(trust.accept_revocations, two, bad) == "trust.revocation"
    three = trust.accept_revocations(two, make_list(3, keys={"a" * 64: "x"}, people={"bob": "y"}))
    assert three.revocations.version == 3


def test_whom_the_list_revokes_issues_no_newer_one(roots):
    both = trust.add_key(roots, public("rob", "rob", "revocation"), ROOT, now=bundles.ENROLLED)
    for gone in (
        {"people": {"reva": "left"}},
        {"keys": {bundles.signer("reva").public_key.keyid: "x"}},
    ):
        held = with_list(both, 1, signers=("reva",), **gone)  # her own last word holds
        assert trust.accept_revocations(held, held.revocations.envelope) == held
        assert with_list(held, 2, signers=("rob",), **gone).revocations.version == 2
        more = {**gone, "bundles": {"sha256:" + "0" * 64: "spite"}}
        assert code_of(with_list, held, 2, signers=("reva",), **more) == "trust.revocation"


def test_a_newer_list_is_not_dated_before_the_held_one(roots):
    held = with_list(roots, 1, issued=NOW)
    assert with_list(held, 2, issued=NOW).revocations.version == 2
    early = NOW - timedelta(days=1)
    assert code_of(with_list, held, 2, issued=early) == "trust.revocation"


@pytest.mark.parametrize("signers", [(), ("root",), ("alice",), ("mallory",)])
def test_only_the_revocation_role_makes_a_list(roots, signers):
    assert with_list(roots).revocations.version == 1
    assert code_of(with_list, roots, signers=signers) == "trust.revocation"


def test_a_list_is_read_strictly(roots):
    def signed(payload, kind=revocation.LIST_TYPE):
        return envelope.sign_statement(payload, kind, bundles.signer("reva"))

    good = json.loads(make_list().payload)
    trust.accept_revocations(roots, signed(canonical_json(good)))
    for change in (
        {"format": "airgap-revocations/2"},
        {"version": 0},
        {"extra": 1},
        {"keys": {"x": "y"}},
        {"next_update": good["issued"]},
        {"people": {"bob": ""}},
    ):
        bad = signed(canonical_json(good | change))
        assert code_of(trust.accept_revocations, roots, bad) == "trust.revocation"
    spaced = signed(json.dumps(good).encode())
    assert code_of(trust.accept_revocations, roots, spaced) == "trust.revocation"
    assert code_of(trust.accept_revocations, roots, signed(b"{}", "text/plain")) == "seal.type"


def test_a_bundle_carries_the_list_to_a_host(roots, tmp_path):
    listed = with_list(roots, 4, people={"mallory": "never ours"})
    path = tmp_path / "b.agb"
    manifest = bundles.make_bundle(path, roots=listed)
    same = bundles.make_bundle(tmp_path / "c.agb", roots=roots)
    assert manifest == same  # the list is outside of manifest and body
    followed = trust.follow_chain(roots, trust.chain_document(listed))
    assert followed.revocations == listed.revocations
    # an older list in a bundle takes nothing back from a host that has seen a newer one
    newer = with_list(roots, 5, people={"mallory": "never ours", "eve": "x"})
    assert trust.follow_chain(newer, trust.chain_document(listed)) == newer
    twin = with_list(roots, 4)
    assert code_of(trust.follow_chain, twin, trust.chain_document(listed)) == "trust.revocation"
    trust.save_trust(followed, tmp_path / "trust")
    assert trust.load_trust(tmp_path / "trust").revocations == listed.revocations


def test_a_forged_list_in_a_bundle_is_refused(roots):
    listed = with_list(roots, 4)
    value = json.loads(trust.chain_document(listed))
    assert trust.follow_chain(roots, canonical_json(value)).revocations.version == 4
    value["revocations"]["signatures"][0]["sig"] = keys.encode_base64(bytes(64))
    assert code_of(trust.follow_chain, roots, canonical_json(value)) == "trust.revocation"


def test_a_key_that_left_the_root_issues_no_list(roots):
    """A stolen, retired key could else empty the list with a date of long ago."""
    reva = bundles.signer("reva").public_key.keyid
    listed = with_list(roots, 1, keys={"a" * 64: "x"})
    other = trust.add_key(listed, public("rob", "rob", "revocation"), ROOT, now=NOW)
    later = rotation.without_key(other.document, reva, now=NOW)
    gone = trust.append_root(other, later, ROOT)
    assert gone.revocations == listed.revocations
    forged = make_list(9, keys={"a" * 64: "x"})
    assert code_of(trust.accept_revocations, gone, forged) == "trust.revocation"
    value = json.loads(trust.chain_document(gone))
    value["revocations"] = json.loads(forged.to_bytes())
    assert code_of(trust.follow_chain, gone, canonical_json(value)) == "trust.revocation"
    # the list that was accepted in its day stays in force, on disk as well
    assert trust.follow_chain(gone, trust.chain_document(gone)) == gone


def test_a_stored_list_of_another_version_is_refused(roots, tmp_path):
    trust.save_trust(with_list(roots, 1), tmp_path)
    (tmp_path / "1.revocations.json").rename(tmp_path / "2.revocations.json")
    assert code_of(trust.load_trust, tmp_path) == "trust.revocation"


def test_a_stale_list_alarms_and_refuses_where_the_root_says_so(roots, bundle):
    path, _ = bundle
    stale = with_list(roots, days=1, issued=NOW - timedelta(days=10))
    report = verify_bundle(path, stale, now=NOW)
    assert "stale" in report.alarms[0]
    assert "stale" in report.as_document()["alarms"][0]
    rule = trust.RevocationRule(required=True, stale="refuse")
    strict = rotation.with_thresholds(roots.document, now=bundles.ENROLLED, rule=rule)
    root = trust.append_root(roots, strict, ROOT)
    assert code_of(verify_bundle, path, root, now=NOW) == "trust.stale"
    old = trust.accept_revocations(root, make_list(days=1, issued=NOW - timedelta(days=10)))
    assert code_of(verify_bundle, path, old, now=NOW) == "trust.stale"
    fresh = trust.accept_revocations(root, make_list())
    assert verify_bundle(path, fresh, now=NOW).alarms == ()


# -- install and run --------------------------------------------------------------------------


class Yes:
    permitted = True
    canonical = b"{}"
    digest = Digest.of(b"{}")


def bring_in(path, root, **more):
    events = []
    done = install(path, root=root, now=NOW, gate=lambda *_: Yes(), audit=events.append, **more)
    return done, events


def test_an_installed_bundle_is_asked_again_before_each_start(roots, bundle, tmp_path):
    path, manifest = bundle
    trust.save_trust(roots, tmp_path / "trust")
    bring_in(path, tmp_path)
    installed = Store(tmp_path / "store").current()
    assert require_standing(installed, roots, now=NOW) == ()
    assert require_standing(installed, with_list(roots, people={"eve": "x"}), now=NOW) == ()
    for entries, code in (
        ({"bundles": {str(manifest.digest): "x"}}, "trust.revoked"),
        ({"models": {manifest.files[-1].sha256: "x"}}, "trust.revoked"),
        ({"people": {"alice": "x"}}, "seal.revoked"),
    ):
        listed = with_list(roots, **entries)
        assert code_of(require_standing, installed, listed, now=NOW) == code


def test_the_status_tells_of_the_list(roots, bundle, tmp_path):
    from airgap.cli.install import status_document, status_view

    path, manifest = bundle
    trust.save_trust(roots, tmp_path / "trust")
    bring_in(path, tmp_path)
    store = Store(tmp_path / "store")
    assert status_document(tmp_path, store)["alarms"] == []
    listed = with_list(roots, bundles={str(manifest.digest): "withdrawn"})
    trust.save_trust(listed, tmp_path / "trust")
    document = status_document(tmp_path, store)
    assert document["alarms"][0].startswith("trust.revoked")
    assert "ALARM" in status_view(document)


def test_bad_news_is_kept_when_the_bundle_itself_is_refused(roots, tmp_path):
    listed = with_list(roots, people={"alice": "x"})
    path = tmp_path / "b.agb"
    bundles.make_bundle(path, roots=listed)
    trust.save_trust(roots, tmp_path / "trust")
    events = []
    with pytest.raises(RefusedError) as caught:
        install(path, root=tmp_path, now=NOW, gate=lambda *_: Yes(), audit=events.append)
    assert caught.value.code == "seal.revoked"
    assert trust.load_trust(tmp_path / "trust").revocations == listed.revocations
    assert [event.phase for event in events] == ["intent", "trust", "trust", "outcome"]


# -- rotation ---------------------------------------------------------------------------------


def test_a_root_key_is_rotated_by_the_old_and_the_new_one(roots):
    fresh = public("root2", "rita", "root")
    old = bundles.public("root").keyid
    document = rotation.rotate(roots.document, [old], [fresh], now=NOW)
    assert document.people["rita"].keys == (fresh.keyid,)
    both = [bundles.signer("root"), bundles.signer("root2")]
    rotated = trust.append_root(roots, document, both)
    for one in both:
        assert code_of(trust.append_root, roots, document, [one]) == "trust.chain"
    # from now on the old key signs nothing
    later = rotation.renew(rotated.document, now=NOW)
    assert code_of(trust.append_root, rotated, later, [both[0]]) == "trust.chain"
    assert trust.append_root(rotated, later, [both[1]]).version == rotated.version + 1


def test_a_rotation_keeps_the_person(roots):
    old = bundles.public("alice").keyid
    for keyids, fresh in (
        ([old], [public("x", "eve", "approver")]),
        ([old], []),
        (["0" * 64], [public("x", "alice", "approver")]),
        ([], []),
    ):
        assert code_of(rotation.rotate, roots.document, keyids, fresh, now=NOW) == "trust.root"


def test_an_expired_root_refuses_and_is_renewed(roots, bundle):
    path, _ = bundle
    late = roots.document.expires + timedelta(days=1)
    assert verify_bundle(path, roots, now=NOW)
    assert code_of(verify_bundle, path, roots, now=late) == "trust.root"
    renewed = trust.append_root(roots, rotation.renew(roots.document, now=late), ROOT)
    assert renewed.document.expires > late
    # a host that holds the expired one follows; the release itself has expired by then
    followed = trust.follow_chain(roots, trust.chain_document(renewed))
    assert followed.document == renewed.document
    assert code_of(verify_bundle, path, renewed, now=late) == "trust.expired"


def test_a_person_who_left_counts_for_what_was_signed_before(roots, bundle):
    path, _ = bundle
    left = rotation.retire(roots.document, "alice", now=NOW)
    assert verify_bundle(path, trust.append_root(roots, left, ROOT), now=NOW)
    early = rotation.retire(roots.document, "alice", now=bundles.ENROLLED)
    assert (
        code_of(verify_bundle, path, trust.append_root(roots, early, ROOT), now=NOW)
        == "seal.threshold"
    )
    out = rotation.without_key(roots.document, bundles.public("bob").keyid, now=NOW)
    assert "bob" not in out.people
    assert (
        code_of(verify_bundle, path, trust.append_root(roots, out, ROOT), now=NOW)
        == "seal.threshold"
    )
    assert code_of(rotation.retire, roots.document, "eve", now=NOW) == "trust.root"
    assert code_of(rotation.without_key, roots.document, "0" * 64, now=NOW) == "trust.root"


def test_a_retired_root_person_dates_no_root_before_the_retirement(roots):
    """Her key stays in the root, for what it signed: a date of yesterday must not revive it."""
    two = trust.add_key(roots, public("rolf", "rolf", "root"), ROOT, now=bundles.ENROLLED)
    rolf, early = [bundles.signer("rolf")], NOW - timedelta(days=1)
    assert trust.append_root(two, rotation.renew(two.document, now=early), rolf)
    left = trust.append_root(two, rotation.retire(two.document, "rolf", now=NOW), ROOT)
    assert code_of(trust.append_root, left, rotation.renew(left.document, now=NOW), rolf) == (
        "trust.chain"
    )
    back = left.document.people["rolf"].model_copy(update={"valid_to": None})
    forged = left.document.model_copy(
        update={
            "version": left.version + 1,
            "issued": early,
            "people": {**left.document.people, "rolf": back},
        }
    )
    with pytest.raises(RefusedError, match="before root") as caught:
        trust.append_root(left, forged, rolf)
    assert caught.value.code == "trust.chain"
    value = json.loads(trust.chain_document(left))
    signed = envelope.sign_statement(forged.to_bytes(), trust.ROOT_TYPE, *rolf)
    value["roots"].append(json.loads(signed.to_bytes()))
    assert code_of(trust.follow_chain, left, canonical_json(value)) == "trust.chain"


def test_a_root_or_list_of_the_future_is_not_taken(roots, tmp_path):
    """A staging clock that ran ahead: kept, it could never be followed by one of the true date."""
    later = NOW + timedelta(days=1000)
    ahead = trust.append_root(roots, rotation.renew(roots.document, now=later), ROOT)
    for carried in (ahead, with_list(roots, issued=later)):
        path = tmp_path / "ahead.agb"
        bundles.make_bundle(path, roots=carried, signers=("builder", "alice", "bob"))
        root = tmp_path / str(carried.version)
        trust.save_trust(roots, root / "trust")
        assert code_of(verify_bundle, path, roots, now=NOW) == "trust.clock"
        assert (
            code_of(install, path, root=root, now=NOW, gate=lambda *_: None, audit=lambda _: None)
            == "trust.clock"
        )
        assert trust.load_trust(root / "trust") == roots


def test_two_root_people_sign_a_proposal_apart(roots):
    second = public("rolf", "rolf", "root")
    grown = trust.add_key(roots, second, ROOT, now=NOW)
    two = trust.append_root(
        grown,
        rotation.with_thresholds(grown.document, now=NOW, root=2),
        [*ROOT, bundles.signer("rolf")],
    )
    document = rotation.renew(two.document, now=NOW)
    proposal = rotation.propose(document, ROOT)
    assert "rolf" in rotation.missing_signers(two, proposal)
    assert code_of(trust.append_envelope, two, proposal) == "trust.chain"
    signed = rotation.sign_proposal(two, proposal, [bundles.signer("rolf")])
    assert rotation.missing_signers(two, signed) == ""
    done = trust.append_envelope(two, signed)
    assert done.version == two.version + 1
    assert code_of(rotation.sign_proposal, done, signed, ROOT) == "trust.chain"  # too late
    assert any("expires" in line for line in rotation.describe_change(two.document, document))
    other = envelope.sign_statement(document.to_bytes(), "text/plain", *ROOT)
    assert code_of(rotation.read_proposal, two, other) == "trust.chain"


def test_a_threshold_that_nobody_can_meet_is_refused(roots):
    assert code_of(rotation.with_thresholds, roots.document, now=NOW, root=2) == "trust.root"


def test_a_site_moves_to_cnsa2_and_never_back(roots):
    assert code_of(rotation.to_cnsa2, roots.document, now=NOW) == "trust.root"  # no keys yet
    pair = cnsa2.pair("root")
    grown = trust.add_key(roots, cnsa2.public("root"), ROOT, now=NOW)
    document = rotation.to_cnsa2(grown.document, now=NOW)
    assert code_of(trust.append_root, grown, document, ROOT) == "trust.chain"
    assert code_of(trust.append_root, grown, document, [*ROOT, pair[0]]) == "trust.chain"
    moved = trust.append_root(grown, document, [*ROOT, *pair])
    back = moved.document.model_copy(update={"version": moved.version + 1, "profile": "default"})
    assert code_of(trust.append_root, moved, back, [*ROOT, *pair]) == "trust.chain"


# -- the clock --------------------------------------------------------------------------------


def test_a_refused_clock_stays_refused_at_the_second_try(roots, bundle, tmp_path):
    path, _ = bundle
    trust.save_trust(roots, tmp_path / "trust")
    ahead = NOW + timedelta(days=2000)
    assert code_of(bring_in, path, tmp_path, last_record=ahead) == "trust.clock"
    # the refusal itself is the last record now, with the true time
    assert code_of(bring_in, path, tmp_path, last_record=NOW) == "trust.clock"
    store = Store(tmp_path / "store")
    floor = store.floors().clock
    assert floor == ahead
    made = clock.sign_clock(floor, "battery empty", ROOT, now=NOW)
    statement = clock.verify_clock(made, roots.document, floor=floor, now=NOW)
    store.forget_time(statement.issued)
    bring_in(path, tmp_path, last_record=NOW)
    # the same statement again: there is nothing left to forget
    assert (
        code_of(clock.verify_clock, made, roots.document, floor=store.floors().clock, now=NOW)
        == "trust.clock"
    )


def test_only_the_root_people_reset_a_clock(roots):
    ahead = NOW + timedelta(days=2000)
    good = clock.sign_clock(ahead, "battery", ROOT, now=NOW)
    check = lambda made, floor=ahead, now=NOW: clock.verify_clock(  # noqa: E731
        made, roots.document, floor=floor, now=now
    )
    assert check(good).reason == "battery"
    for name in ("alice", "mallory", "reva"):
        bad = clock.sign_clock(ahead, "battery", [bundles.signer(name)], now=NOW)
        assert code_of(check, bad) == "trust.clock"
    assert code_of(check, good, floor=ahead + timedelta(days=1)) == "trust.clock"
    assert code_of(check, good, floor=None) == "trust.clock"
    assert code_of(check, good, now=NOW - timedelta(hours=1)) == "trust.clock"
    assert code_of(check, good, now=NOW + timedelta(days=7)) == "trust.clock"
    assert code_of(clock.sign_clock, ahead, " ", ROOT, now=NOW) == "trust.clock"
    assert code_of(clock.parse_clock, b"{}") == "trust.clock"
    other = envelope.sign_statement(good.payload, "text/plain", *ROOT)
    assert code_of(check, other) == "seal.type"


def test_who_was_retired_dates_no_reset_before_that(roots):
    ahead, before = NOW + timedelta(days=2000), NOW - timedelta(days=2)
    two = trust.add_key(roots, public("rolf", "rolf", "root"), ROOT, now=bundles.ENROLLED)
    made = clock.sign_clock(ahead, "battery", [bundles.signer("rolf")], now=before)
    assert clock.verify_clock(made, two.document, floor=ahead, now=NOW)
    left = trust.append_root(
        two, rotation.retire(two.document, "rolf", now=NOW - timedelta(days=1)), ROOT
    )
    assert code_of(clock.verify_clock, made, left.document, floor=ahead, now=NOW) == "trust.clock"


# -- other acts -------------------------------------------------------------------------------


def test_who_is_revoked_counts_for_no_act(roots):
    assert roots.standing == roots.document
    alice = {bundles.public(name).keyid for name in ("alice", "alice2")}
    gone = with_list(roots, people={"alice": "left"}).standing
    assert "alice" not in gone.people
    assert not alice & gone.keys.keys()
    assert gone.people.keys() | {"alice"} == roots.document.people.keys()
    one = with_list(roots, keys={bundles.public("alice").keyid: "lost"}).standing
    assert one.people["alice"].keys == (bundles.public("alice2").keyid,)


def test_an_act_of_cnsa2_needs_both_keys_too():
    root = cnsa2.make_cnsa2_trust().standing
    pair = cnsa2.pair("alice")
    for signers, people in (
        ([pair], ["alice"]),
        ([pair[0]], []),
        ([pair[1]], []),
        ([pair, cnsa2.pair("bob")[0]], ["alice"]),
    ):
        made = envelope.sign_statement(b"{}", PAYLOAD_TYPE, *signers)
        found = signers_of(made, root, at=NOW)
        assert [each.person for each in found] == people


# -- a revoked root key -----------------------------------------------------------------------


def two_root_people():
    """Return a trust with two root people, of whom one is enough."""
    return trust.add_key(make_trust(), public("rob", "rob", "root"), ROOT, now=bundles.ENROLLED)


def test_a_revoked_root_key_makes_no_root_and_the_others_recover():
    roots = two_root_people()
    rita = bundles.signer("root").public_key.keyid
    new = public("new", "new", "approver")
    assert trust.add_key(roots, new, ROOT, now=NOW).version == roots.version + 1
    listed = trust.accept_revocations(roots, make_list(keys={rita: "stolen"}))
    with pytest.raises(RefusedError, match="0 of 1 root people") as caught:
        trust.add_key(listed, new, ROOT, now=NOW)
    assert caught.value.code == "trust.chain"
    # nor by way of a bundle, nor with a list that says nothing of it
    stolen = trust.add_key(roots, new, ROOT, now=NOW)
    assert trust.follow_chain(roots, trust.chain_document(stolen)).version == stolen.version
    assert code_of(trust.follow_chain, listed, trust.chain_document(stolen)) == "trust.chain"
    # the other root person takes the key out, and the chain goes on
    rob = [bundles.signer("rob")]
    document = rotation.without_key(listed.document, rita, now=NOW)
    mended = trust.append_root(listed, document, rob)
    assert mended.version == roots.version + 1
    assert trust.follow_chain(listed, trust.chain_document(mended)).version == mended.version
    assert trust.add_key(mended, new, rob, now=NOW).version == mended.version + 1


def test_a_chain_whose_only_root_key_is_revoked_does_not_go_on():
    rita = bundles.signer("root").public_key.keyid
    listed = trust.accept_revocations(make_trust(), make_list(keys={rita: "stolen"}))
    for change in (
        rotation.renew(listed.document, now=NOW),
        rotation.rotate(listed.document, [rita], [public("root2", "rita", "root")], now=NOW),
    ):
        both = [*ROOT, bundles.signer("root2")]
        assert code_of(trust.append_root, listed, change, both) == "trust.chain"


# -- what was taken out of the folder of trust ------------------------------------------------


def test_a_root_or_a_list_that_was_taken_away_is_missed(tmp_path):
    store = Store(tmp_path / "store")
    roots = make_trust()
    listed = with_list(roots, version=2, keys={"0" * 64: "x"})
    store.require_trust(roots)
    with store.locked():
        store.note_trust(listed)
    store.require_trust(listed)
    assert code_of(store.require_trust, roots) == "trust.revocation"
    assert code_of(store.note_trust, with_list(roots)) == "trust.revocation"
    longer = trust.add_key(listed, public("new", "new", "approver"), ROOT, now=NOW)
    store.note_trust(longer)
    assert code_of(store.require_trust, listed) == "trust.chain"
    store.require_trust(longer)
    # another chain, begun by a typed fingerprint, has marks of its own
    other = bundles.make_trust(people=1)
    assert other.documents[0].fingerprint != roots.documents[0].fingerprint
    store.require_trust(other)
    store.note_trust(other)
    assert code_of(store.require_trust, listed) == "trust.chain"
