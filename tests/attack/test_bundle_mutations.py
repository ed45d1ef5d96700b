"""Random alterations of a bundle in every form: each is refused, and nothing is left anywhere.

The bundle carries exactly the threshold of signatures. Its bytes are not repeated anywhere, so that
no alteration puts the same content in place of itself.
"""

import hashlib
import random
from collections import Counter

import attacks
import bundles
import pytest
from mutations import mutate, places_of

from bundle import transit
from bundle.delta import BundleBase, write_delta
from bundle.manifest import Base
from bundle.media import Help, open_medium
from bundle.source import PlainFile
from bundle.split import split
from bundle.verify import verify_bundle
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


def run(form, tmp_path, rounds):
    """Alter the files of a form `rounds` times; return the codes of the refusals."""
    folder = tmp_path / "quarantine"
    folder.mkdir()
    trust = bundles.make_trust()
    files, path, more = form(folder)
    report = verify_bundle(path, trust, now=bundles.NOW, more=more)
    assert report.seal.approvers == ("alice", "bob")
    assert len(report.seal.keyids) == 3  # the builder and two approvers, of whom two are needed
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
}


@pytest.mark.parametrize("form", FORMS)
def test_alterations_are_refused_in_every_form(form, tmp_path):
    run(FORMS[form], tmp_path, 60)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("form", "rounds"),
    [("file", 10_000), ("volumes", 4000), ("delta", 4000), ("encrypted", 4000)],
)
def test_ten_thousand_mutations_give_ten_thousand_refusals(form, rounds, tmp_path):
    print(form, run(FORMS[form], tmp_path, rounds))
