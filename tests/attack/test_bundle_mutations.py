"""Random alterations of a bundle in every form: each is refused, and nothing is left anywhere.

The bundle carries exactly the threshold of signatures. Its bytes are not repeated anywhere, so that
no alteration puts the same content in place of itself.
"""

import hashlib
import random
from collections import Counter

import attacks
import bundles
import cnsa2
import pytest
from mutations import mutate, places_of

from bundle import transit
from bundle.delta import BundleBase, write_delta
from bundle.manifest import Base
from bundle.media import Help, open_medium
from bundle.source import PlainFile
from bundle.split import split
from bundle.staging import sign as signing
from bundle.staging.release import DECISION
from bundle.verify import verify_bundle
from bundle.write import Member
from policy.errors import RefusedError

CHUNK = attacks.CHUNK


def weights(seed, size=65536):
    return hashlib.shake_256(b"mutations %d" % seed).digest(size)


def small(out, seed=1, size=65536, **more):
    return bundles.make_bundle(out, members=bundles.make_members(weights(seed, size)), **more)


def as_file(folder):
    small(folder / "x.agb")
    return [folder / "x.agb"], folder / "x.agb", Help()


def as_volumes(folder):
    small(folder / "y.agb", size=CHUNK + 4096)
    medium = open_medium(folder / "y.agb")
    made = split(medium, folder, volume_size=medium.head.body_start + CHUNK + 65536)
    medium.close()
    (folder / "y.agb").unlink()
    return list(made), made[0], Help()


def as_delta(folder):
    shelf = folder.parent / "shelf"
    shelf.mkdir()
    one = small(shelf / "one.agb", size=2 * CHUNK)
    base = Base(bundle_id="tiny-line", manifest_digest=str(one.digest))
    members = bundles.make_members(weights(1, 2 * CHUNK)[:CHUNK] + weights(2))
    bundles.make_bundle(shelf / "two.agb", members=members, base=base, epoch=2)
    older = BundleBase(open_medium(shelf / "one.agb"))
    write_delta(open_medium(shelf / "two.agb"), older, folder / "x.agb")
    return [folder / "x.agb"], folder / "x.agb", Help(find_base=lambda _: older)


def as_encrypted(folder):
    shelf = folder.parent / "shelf"
    shelf.mkdir()
    small(shelf / "x.agb")
    key = transit.new_transit_key(shelf, "lab")
    transit.encrypt_file(PlainFile(shelf / "x.agb"), folder / "x.agb.enc", [key])
    identity = transit.load_identity(shelf / "lab.transit.pem")
    return [folder / "x.agb.enc"], folder / "x.agb.enc", Help(identities=(identity,))


def as_cnsa2(folder):
    signers = [each for name in ("builder", "alice", "bob") for each in cnsa2.pair(name)]
    members = bundles.make_members(weights(1))
    cnsa2.make_cnsa2_bundle(folder / "x.agb", members=members, signers=signers)
    return [folder / "x.agb"], folder / "x.agb", Help()


def as_cnsa2_volumes(folder):
    shelf = folder.parent / "shelf"
    shelf.mkdir()
    signers = [each for name in ("builder", "alice", "bob") for each in cnsa2.pair(name)]
    members = bundles.make_members(weights(1, CHUNK + 4096))
    cnsa2.make_cnsa2_bundle(shelf / "y.agb", members=members, signers=signers)
    medium = open_medium(shelf / "y.agb")
    made = split(medium, folder, volume_size=medium.head.body_start + CHUNK + 65536)
    medium.close()
    return list(made), made[0], Help()


def as_attested(folder):
    """Each approver counts with her own statement only."""
    path = folder / "x.agb"
    extra = Member(DECISION, b"{}", "policy", "application/json")
    members = bundles.make_members(weights(1), extra=(extra,))
    bundles.make_bundle(path, members=members, signers=("builder",), attested=True)
    for who in ("alice", "bob"):
        signing.sign(
            signing.read_draft(path),
            bundles.make_trust(),
            bundles.signer(who),
            confirmation="tiny",
            now=bundles.NOW,
        )
    return [path], path, Help()


def as_encrypted_volumes(folder):
    shelf = folder.parent / "shelf"
    shelf.mkdir()
    files, _, _ = as_volumes(shelf)
    key = transit.new_transit_key(shelf, "lab")
    for path in files:
        transit.encrypt_file(PlainFile(path), folder / f"{path.name}.enc", [key])
    identity = transit.load_identity(shelf / "lab.transit.pem")
    made = [folder / f"{path.name}.enc" for path in files]
    return made, made[0], Help(identities=(identity,))


def run(form, tmp_path, rounds):
    """Alter the files of a form `rounds` times; return the codes of the refusals."""
    folder = tmp_path / "quarantine"
    folder.mkdir()
    strong = form in {as_cnsa2, as_cnsa2_volumes}
    trust = cnsa2.make_cnsa2_trust() if strong else bundles.make_trust()
    files, path, more = form(folder)
    report = verify_bundle(path, trust, now=bundles.NOW, more=more)
    assert report.seal.approvers == ("alice", "bob")
    # The builder and two approvers, of whom two are needed; with two keys each in `cnsa2`.
    assert len(report.seal.keyids) == (6 if strong else 3)
    good = {file: file.read_bytes() for file in files}
    places = {file: places_of(raw) for file, raw in good.items()}
    dice, codes = random.Random(1), Counter()
    names = sorted(item.name for item in folder.iterdir())
    while codes.total() < rounds:
        file = dice.choice(files)
        altered = mutate(good[file], places[file], dice)
        if altered == good[file]:
            continue
        file.write_bytes(altered)
        with pytest.raises(RefusedError) as caught:
            verify_bundle(path, trust, now=bundles.NOW, more=more)
        codes[caught.value.code] += 1
        file.write_bytes(good[file])
        assert sorted(item.name for item in folder.iterdir()) == names
    return codes


FORMS = {
    "file": as_file,
    "volumes": as_volumes,
    "delta": as_delta,
    "encrypted": as_encrypted,
    "cnsa2": as_cnsa2,
    "cnsa2 volumes": as_cnsa2_volumes,
    "attested": as_attested,
    "encrypted volumes": as_encrypted_volumes,
}


@pytest.mark.parametrize("form", FORMS)
def test_alterations_are_refused_in_every_form(form, tmp_path):
    run(FORMS[form], tmp_path, 40)


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
def test_ten_thousand_mutations_give_ten_thousand_refusals(form, tmp_path):
    print(form, run(FORMS[form], tmp_path, 10_000))
