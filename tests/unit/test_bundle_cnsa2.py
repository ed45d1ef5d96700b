"""The profile `cnsa2`: SHA-384 in manifest, tree and installed files, in every form."""

import hashlib
import json
from datetime import timedelta

import attacks
import bundles
import pytest
from cnsa2 import PEOPLE, everybody, make_cnsa2_bundle, make_cnsa2_trust, pair
from mutations import mutate, places_of

from airgap.install import Store, install, verify_installed
from airgap.install.quarantine import make_writable
from bundle import merkle, trust
from bundle.delta import BundleBase, write_delta
from bundle.manifest import Base, canonical, parse_manifest
from bundle.media import Help, open_medium
from bundle.split import split
from bundle.verify import verify_bundle
from policy.errors import AirgapError, RefusedError

ROOTS = make_cnsa2_trust()
CHUNK = attacks.CHUNK


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cnsa2")
    one = make_cnsa2_bundle(folder / "one.agb")
    base = Base(bundle_id="tiny-line", manifest_digest=str(one.digest))
    members = bundles.make_members(
        bundles.make_weights(CHUNK) + bundles.make_weights(65536, seed=8)
    )
    make_cnsa2_bundle(folder / "two.agb", members=members, base=base, epoch=2)
    return folder


def verify(path, roots=ROOTS, **more):
    return verify_bundle(path, roots, now=bundles.NOW, more=Help(**more))


def refusal(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value


class Yes:
    permitted = True
    canonical = b"{}"
    digest = trust.Digest.of(b"{}")


def bring_in(path, root):
    return install(
        path, root=root, now=bundles.NOW, gate=lambda *_: Yes(), audit=lambda event: event
    )


@pytest.fixture
def root(tmp_path):
    trust.save_trust(ROOTS, tmp_path / "root" / "trust")
    return tmp_path / "root"


def test_every_digest_that_is_used_is_of_sha384(release):
    path = release / "one.agb"
    report = verify(path)
    manifest = report.manifest
    assert report.seal.approvers == ("alice", "bob")
    assert manifest.body.hash == "sha384"
    assert all(entry.checked.algorithm == "sha384" for entry in manifest.files)
    raw = path.read_bytes()
    start, size = attacks.head_of(raw)["body"]
    body = raw[start:]
    leaves = [
        merkle.leaf_hash(body[at : at + CHUNK], hashlib.sha384) for at in range(0, size, CHUNK)
    ]
    place, length = attacks.head_of(raw)[attacks.archive.CHUNKS]
    assert raw[place : place + length] == b"".join(leaves)
    assert merkle.root(leaves, hashlib.sha384).hex() == manifest.body.root
    for entry in manifest.files:
        content = body[entry.offset : entry.offset + entry.size]
        assert entry.sha384 == hashlib.sha384(content).hexdigest()
        assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_writing_twice_gives_the_same_body_and_manifest(release, tmp_path):
    make_cnsa2_bundle(tmp_path / "again.agb")
    one, two = (release / "one.agb").read_bytes(), (tmp_path / "again.agb").read_bytes()
    assert one[512 + 131_072 :] == two[512 + 131_072 :]  # ECDSA and ML-DSA are randomised


def test_a_profile_is_that_of_the_host(release, tmp_path):
    assert refusal(verify, release / "one.agb", bundles.make_trust()).code in {
        "seal.profile",
        "trust.chain",
        "seal.threshold",
    }
    plain = tmp_path / "plain.agb"
    bundles.make_bundle(plain)
    assert refusal(verify, plain).code in {"seal.profile", "trust.chain", "seal.threshold"}


def test_install_checks_sha384(release, root):
    done = bring_in(release / "one.agb", root)
    folder = done.bundle.folder
    assert verify_installed(folder) == done.bundle.manifest
    make_writable(folder)
    data = done.bundle.model_folder("tiny") / "config.json"
    data.write_bytes(data.read_bytes().replace(b"llama", b"lhama"))
    assert refusal(verify_installed, folder).code == "start.digest"
    assert Store(root / "store").current().digest == done.bundle.digest


def test_other_forms(release, tmp_path):
    medium = open_medium(release / "one.agb")
    size = medium.head.body_start + CHUNK + 65536
    made = split(medium, tmp_path, volume_size=size, parity_count=1)
    medium.close()
    made[0].unlink()
    report = verify(tmp_path)
    assert [item["volume"] for item in report.medium["repaired"]] == [1]
    base = BundleBase(open_medium(release / "one.agb"))
    write_delta(open_medium(release / "two.agb"), base, tmp_path / "d.agb")
    report = verify(tmp_path / "d.agb", find_base=lambda _: base)
    assert report.manifest.epoch == 2
    assert report.medium["new_bytes"] < CHUNK


class Broken:
    """A key whose signatures are not its own."""

    def __init__(self, signer):
        self._signer = signer

    @property
    def public_key(self):
        return self._signer.public_key

    def sign(self, message):
        return self._signer.sign(message + b"x")


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_half_of_a_hybrid_counts_for_nobody(half, kind, tmp_path):
    make_cnsa2_bundle(tmp_path / "good.agb")
    assert verify(tmp_path / "good.agb").seal.approvers == ("alice", "bob")
    signers = [signer for signer in everybody() if signer not in pair("bob")]
    theirs = list(pair("bob"))
    other = theirs.pop(half)
    signers += theirs if kind == "absent" else [*theirs, Broken(other)]
    make_cnsa2_bundle(tmp_path / "half.agb", signers=signers)
    assert refusal(verify, tmp_path / "half.agb").code == "seal.threshold"


def test_half_a_builder_builds_nothing(tmp_path):
    signers = [signer for signer in everybody() if signer != pair("builder")[1]]
    make_cnsa2_bundle(tmp_path / "half.agb", signers=signers)
    assert refusal(verify, tmp_path / "half.agb").code == "seal.role"


def changed(manifest, change):
    value = json.loads(canonical(manifest))
    change(value)
    return attacks.canonical_json(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"][2].pop("sha384"),
        lambda m: m.update(profile="default"),
        lambda m: m["body"].update(hash="sha256"),
        lambda m: m["body"].update(root=m["body"]["root"][:64]),
        lambda m: m["body"].update(hash="sha256", root=m["body"]["root"][:64]),
        lambda m: m["files"][2].update(sha384="0" * 64),
    ],
)
def test_a_manifest_mixes_no_profiles(change, release):
    manifest = verify(release / "one.agb").manifest
    assert parse_manifest(changed(manifest, lambda _: None)) == manifest
    with pytest.raises(RefusedError) as caught:
        parse_manifest(changed(manifest, change))
    assert caught.value.code == "manifest.schema"


def test_sha384_does_not_enter_a_default_manifest(tmp_path):
    manifest = bundles.make_bundle(tmp_path / "plain.agb")
    sha384 = hashlib.sha384(b"").hexdigest()
    for change in (
        lambda m: m["files"][0].update(sha384=sha384),
        lambda m: [entry.update(sha384=sha384) for entry in m["files"]],
        lambda m: m["body"].update(hash="sha384", root=sha384),
    ):
        with pytest.raises(RefusedError) as caught:
            parse_manifest(changed(manifest, change))
        assert caught.value.code == "manifest.schema"
    assert manifest.expires - manifest.created > timedelta(0)


def run(tmp_path, rounds):
    """Alter a bundle that carries exactly the threshold of hybrid signatures."""
    import random
    from collections import Counter

    path = tmp_path / "x.agb"
    weights = hashlib.shake_256(b"cnsa2").digest(65536)
    make_cnsa2_bundle(path, members=bundles.make_members(weights))
    assert len(verify(path).seal.keyids) == 2 * len(PEOPLE)
    good = path.read_bytes()
    places, dice, codes = places_of(good), random.Random(2), Counter()
    while codes.total() < rounds:
        altered = mutate(good, places, dice)
        if altered == good:
            continue
        path.write_bytes(altered)
        with pytest.raises(RefusedError) as caught:
            verify(path)
        codes[caught.value.code] += 1
        assert [item.name for item in tmp_path.iterdir()] == ["x.agb"]
    return codes


def test_alterations_are_refused(tmp_path):
    run(tmp_path, 60)


@pytest.mark.soak
def test_ten_thousand_mutations_give_ten_thousand_refusals(tmp_path):
    print(run(tmp_path, 10_000))
