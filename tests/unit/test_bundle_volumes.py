"""Volumes: any of them is a tar and names its set; a lost or bad one is named; parity mends it."""

import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import attacks
import bundles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airgap.install import Store, install
from bundle import parity, trust
from bundle.media import Help, open_medium
from bundle.source import PlainFile
from bundle.split import Chunks, join, mend, split
from bundle.verify import open_bundle, verify_bundle
from bundle.volumes import VolumeSet
from policy.errors import AirgapError, FaultError, RefusedError, UsageError

TRUST = bundles.make_trust()
CHUNK = attacks.CHUNK
COUNT = 6


def cut(path, folder, *, count=COUNT, spare=0):
    """Cut a bundle of `count` chunks into volumes of one chunk each."""
    folder.mkdir(exist_ok=True)
    medium = open_medium(path)
    size = medium.head.body_start + CHUNK + 64 * 1024
    made = split(medium, folder, volume_size=size, parity_count=spare)
    medium.close()
    assert len(made) == count + spare
    return made


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "tiny.agb"
    weights = b"".join(bundles.make_weights(CHUNK, seed=n) for n in range(COUNT - 1))
    bundles.make_bundle(path, members=bundles.make_members(weights + b"tail" * 1000))
    return path


@pytest.fixture(scope="module")
def plain_set(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    cut(full, folder)
    return folder


@pytest.fixture(scope="module")
def spare_set(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spare")
    cut(full, folder, spare=2)
    return folder


@pytest.fixture
def volumes(plain_set, tmp_path):
    return Path(shutil.copytree(plain_set, tmp_path / "set"))


@pytest.fixture
def spared(spare_set, tmp_path):
    return Path(shutil.copytree(spare_set, tmp_path / "set"))


def name(folder, number):
    return folder / f"tiny.agb.{number:03}"


def verify(path, **more):
    return verify_bundle(path, TRUST, now=bundles.NOW, more=Help(**more))


def refusal(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x20
    path.write_bytes(raw)


# -- a whole set ------------------------------------------------------------------------------


def test_a_set_is_the_bundle(full, plain_set, tmp_path):
    wanted = verify(full)
    for path in (plain_set, name(plain_set, 1), name(plain_set, 4)):
        report = verify(path)
        assert (report.digest, report.seal, report.scan) == (
            wanted.digest,
            wanted.seal,
            wanted.scan,
        )
        assert report.medium["count"] == COUNT
        assert report.medium["repaired"] == []
    medium = open_medium(plain_set)
    join(medium, tmp_path / "again.agb")
    medium.close()
    assert (tmp_path / "again.agb").read_bytes() == full.read_bytes()


def test_a_folder_with_one_plain_bundle_stands_for_it(full, tmp_path):
    lone = Path(shutil.copy(full, tmp_path))
    (tmp_path / "SHA256SUMS").write_text("")
    assert verify(tmp_path).digest == verify(full).digest
    shutil.copy(full, tmp_path / "another.agb")
    assert refusal(verify, tmp_path).code == "archive.type"
    (tmp_path / "another.agb").unlink()
    lone.rename(tmp_path / "tiny.agb.enc")
    assert refusal(verify, tmp_path).code == "archive.type"


def test_each_volume_is_a_tar_and_together_they_are_the_body(full, spare_set):
    body = b""
    for number in range(1, COUNT + 3):
        listed = subprocess.run(
            ["tar", "tf", name(spare_set, number)], check=True, capture_output=True, text=True
        ).stdout.split()
        assert listed[:4] == [path for path, _ in attacks.archive.HEAD]
        assert "META/volume.json" in listed
        if number <= COUNT:
            assert listed[-1] == f"VOLUME/body.{number:03}"
            body += subprocess.run(
                ["tar", "xOf", name(spare_set, number), listed[-1]], check=True, capture_output=True
            ).stdout
    raw = full.read_bytes()
    assert raw == raw[: attacks.head_of(raw)["body"][0]] + body


def test_cutting_twice_gives_the_same_bytes(full, spare_set, tmp_path):
    for path in cut(full, tmp_path / "again", spare=2):
        assert path.read_bytes() == (spare_set / path.name).read_bytes()


def test_volumes_in_several_folders(volumes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for number in (4, 5):
        name(volumes, number).rename(name(other, number))
    assert refusal(verify, volumes).code == "volume.missing"
    assert verify(volumes, volumes=(other,)).medium["count"] == COUNT
    assert verify(name(volumes, 1), volumes=(name(other, 4),)).medium["count"] == COUNT


def test_a_signature_is_added_to_every_volume(full, volumes):
    envelope = attacks.envelope.parse_envelope(full.read_bytes()[512 : 512 + 131_072])
    less = attacks.envelope.Envelope(
        envelope.payload, envelope.payload_type, envelope.signatures[:2]
    )
    medium = open_medium(volumes)
    medium.rewrite_envelope(less)
    medium.close()
    assert refusal(verify, volumes).code in {"seal.threshold", "seal.role"}
    medium = open_medium(volumes)
    medium.rewrite_envelope(envelope)
    medium.close()
    assert verify(volumes).seal.approvers == ("alice", "bob")
    name(volumes, 3).unlink()
    medium = open_medium(volumes)
    assert refusal(medium.rewrite_envelope, less).code == "volume.missing"
    medium.close()


def test_a_signing_that_was_killed_is_mended(full, volumes):
    raw = full.read_bytes()[512 : 512 + 131_072]
    envelope = attacks.envelope.parse_envelope(raw)
    less = attacks.envelope.Envelope(
        envelope.payload, envelope.payload_type, envelope.signatures[:2]
    )
    medium = open_medium(volumes)
    medium.rewrite_envelope(less)
    medium.close()
    for number in (1, 2):  # had got so far when it was killed
        with name(volumes, number).open("r+b") as stream:
            stream.seek(512)
            stream.write(raw)
    error = refusal(verify, volumes)
    assert error.code in {"volume.set", "seal.threshold", "seal.role"}
    medium = open_medium(volumes)
    done = mend(medium, volumes)
    medium.close()
    assert sorted(done.equalised) == [name(volumes, 1), name(volumes, 2)]
    assert verify(volumes).seal.approvers == ("alice", "bob")


# -- without parity ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, COUNT])
def test_a_lost_volume_is_named(volumes, number):
    assert verify(volumes).medium["count"] == COUNT
    name(volumes, number).unlink()
    error = refusal(verify, volumes)
    assert error.code == "volume.missing"
    assert f"volume {number} of {COUNT} is not here" in error.message


def test_several_lost_volumes_are_named_after_the_rest_was_checked(volumes):
    for number in (2, 3, 5):
        name(volumes, number).unlink()
    seen = []
    with (
        open_bundle(volumes, TRUST, now=bundles.NOW) as sealed,
        pytest.raises(RefusedError, match=r"volumes 2, 3, 5 of 6 are not here"),
    ):
        sealed.verify_body(progress=lambda done, _: seen.append(done))
    assert len(seen) == COUNT - 3
    flip(name(volumes, 6), -8192 - 4096)
    assert "volume 6 of 6" in refusal(verify, volumes).message


@pytest.mark.parametrize("number", [1, 3, COUNT])
def test_a_bad_volume_is_named_with_the_offset(volumes, number):
    assert verify(volumes).medium["count"] == COUNT
    at = name(volumes, number).stat().st_size - 60_000 if number < COUNT else -8192 - 4096
    flip(name(volumes, number), at)
    error = refusal(verify, volumes)
    assert error.code == "chunk.leaf", error.message
    assert f"volume {number} of {COUNT} (tiny.agb.{number:03}), bytes " in error.message


def swap(volumes, *_):
    name(volumes, 3).rename(volumes / "x")
    name(volumes, 4).rename(name(volumes, 3))
    (volumes / "x").rename(name(volumes, 4))


def exchange(volumes, tmp_path, _):
    other = tmp_path / "tiny.agb"
    weights = b"".join(bundles.make_weights(CHUNK, seed=n + 40) for n in range(COUNT - 1))
    bundles.make_bundle(other, members=bundles.make_members(weights + b"tail" * 1000))
    cut(other, tmp_path / "other")
    shutil.copy(name(tmp_path / "other", 3), name(volumes, 3))


def edit(change):
    def apply(volumes, *_):
        path = name(volumes, 3)
        path.write_bytes(change(path.read_bytes()))

    return apply


DAMAGES = {
    "swapped": swap,
    "another set": exchange,
    "truncated": edit(lambda raw: raw[:-5000]),
    "truncated head": edit(lambda raw: raw[:70_000]),
    "appended": edit(lambda raw: raw + b"\0"),
    "empty": edit(lambda _: b""),
    "noise": edit(lambda _: bundles.make_weights(1 << 20)),
    "lies about its place": edit(lambda raw: raw.replace(b'"index":3', b'"index":4')),
    "lies about the count": edit(lambda raw: raw.replace(b'"count":6', b'"count":5')),
    "lies about the set": edit(lambda raw: attacks.flip(raw, raw.index(b'"set":"sha256:') + 20)),
    "header": edit(lambda raw: raw.replace(b"VOLUME/body.003", b"VOLUME/body.004")),
    "sealed head": edit(lambda raw: attacks.flip(raw, 512 + 400)),
    "a whole bundle": lambda volumes, _, full: shutil.copy(full, name(volumes, 3)),
}


def damage(kind, volumes, tmp_path, full):
    DAMAGES[kind](volumes, tmp_path, full)


DAMAGE = {
    "swapped": "volume.order",
    "truncated": "archive.truncated",
    "truncated head": "archive.truncated",
    "appended": "archive.trailing",
    "empty": "archive.truncated",
    "noise": "archive.header",
    "another set": "volume.set",
    "lies about its place": "volume.order",
    "lies about the count": "volume.order",
    "lies about the set": "volume.order",
    "header": "archive.name",
    "sealed head": "volume.set",
    "a whole bundle": "archive.name",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_volume_is_refused_by_name(kind, volumes, tmp_path, full):
    assert verify(volumes).medium["count"] == COUNT
    damage(kind, volumes, tmp_path, full)
    error = refusal(verify, volumes)
    assert error.code == DAMAGE[kind], error.message
    assert "tiny.agb.003" in error.message


@pytest.mark.parametrize("kind", ["swapped", "truncated head", "noise", "sealed head"])
def test_parity_makes_up_for_a_damaged_volume(kind, spared, tmp_path, full):
    damage(kind, spared, tmp_path, full)
    report = verify(spared)
    assert report.seal.approvers == ("alice", "bob")
    assert 3 in {item["volume"] for item in report.medium["repaired"]}
    assert any("tiny.agb.003" in text for text in report.medium["problems"])


def test_all_volumes_agree_on_a_lie(volumes):
    for number in range(1, COUNT + 1):
        raw = name(volumes, number).read_bytes()
        name(volumes, number).write_bytes(raw.replace(b'"chunks":1', b'"chunks":2'))
    assert refusal(verify, volumes).code == "volume.order"


def test_a_set_of_one_volume_has_one_description(full, tmp_path):
    medium = open_medium(full)
    (path,) = split(medium, tmp_path, volume_size=1 << 30)
    medium.close()
    assert verify(path).medium["count"] == 1
    raw = path.read_bytes()
    for lie in (b'"chunks":7', b'"chunks":9', b'"chunks":5'):
        path.write_bytes(raw.replace(b'"chunks":6', lie))
        assert refusal(verify, path).code == "volume.order"


def test_all_volumes_name_another_set(volumes):
    for number in range(1, COUNT + 1):
        raw = name(volumes, number).read_bytes()
        at = raw.index(b'"set":"sha256:') + len(b'"set":"sha256:')
        name(volumes, number).write_bytes(raw[:at] + b"0" * 64 + raw[at + 64 :])
    assert refusal(verify, volumes).code == "volume.set"


def test_one_volume_twice(volumes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(name(volumes, 3), name(other, 3))
    error = refusal(verify, volumes, volumes=(other,))
    assert error.code == "volume.order"
    assert "volume 3 is there twice" in error.message


def test_two_sets_in_one_folder(volumes):
    shutil.copy(name(volumes, 1), volumes / "other.agb.001")
    assert refusal(verify, volumes).code == "volume.set"
    assert verify(name(volumes, 1)).medium["count"] == COUNT


def test_a_folder_or_a_number_without_a_set(tmp_path):
    assert refusal(verify, tmp_path).code == "archive.type"
    assert refusal(verify, tmp_path / "x.agb.001").code == "host.io"


# -- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [(6,), (1, 2), (4, 7), (7, 8)])
def test_any_two_of_eight_may_be_lost(lost, spared, full, tmp_path):
    for number in lost:
        name(spared, number).unlink()
    report = verify(spared)
    assert [item["volume"] for item in report.medium["repaired"]] == [n for n in lost if n <= COUNT]
    assert report.medium["bad_parity"] == [n for n in lost if n > COUNT]
    medium = open_medium(spared)
    join(medium, tmp_path / "again.agb")
    done = mend(medium, spared)
    medium.close()
    assert (tmp_path / "again.agb").read_bytes() == full.read_bytes()
    assert [path.name for path in done.written] == [f"tiny.agb.{n:03}" for n in lost]
    report = verify(spared)
    assert (report.medium["repaired"], report.medium["bad_parity"]) == ([], [])


def test_mended_volumes_are_those_that_were_cut(spare_set, spared):
    name(spared, 3).unlink()
    flip(name(spared, 5), -70_000)
    medium = open_medium(spared)
    mend(medium, spared)
    medium.close()
    for path in spare_set.iterdir():
        assert path.read_bytes() == (spared / path.name).read_bytes()


def test_three_of_eight_are_too_many(spared):
    for number in (2, 4, 6):
        name(spared, number).unlink()
    error = refusal(verify, spared)
    assert error.code == "volume.missing"
    assert "volumes 2, 4, 6 of 6" in error.message


def test_damage_all_over_is_mended_chunk_by_chunk(full, tmp_path):
    medium = open_medium(full)
    size = medium.head.body_start + 2 * CHUNK + 64 * 1024  # two chunks a volume
    folder = tmp_path / "set"
    folder.mkdir()
    made = split(medium, folder, volume_size=size, parity_count=1)
    medium.close()
    assert len(made) == 4
    end = made[0].stat().st_size - 3 * 4096  # inside the second chunk
    flip(made[0], end - CHUNK)
    flip(made[1], end)  # each column has one bad chunk
    report = verify(folder)
    assert [(i["volume"], i["chunks"]) for i in report.medium["repaired"]] == [(1, 1), (2, 1)]
    flip(made[0], end)  # now one column has two
    error = refusal(verify, folder)
    assert error.code == "chunk.leaf"
    assert "volume 1 of 3" in error.message


# The set that the acceptance names: twelve volumes.


def test_twelve_volumes_name_the_bad_and_the_missing_one_and_parity_repairs_it(tmp_path):
    path = tmp_path / "tiny.agb"
    weights = b"".join(bundles.make_weights(CHUNK, seed=n) for n in range(11)) + b"tail" * 1000
    bundles.make_bundle(path, members=bundles.make_members(weights))
    plain, spare = tmp_path / "plain", tmp_path / "spare"
    cut(path, plain, count=12)
    cut(path, spare, count=12, spare=1)
    assert verify(plain).medium["count"] == 12
    good = name(plain, 7).read_bytes()
    flip(name(plain, 7), len(good) - 60_000)
    error = refusal(verify, plain)
    assert error.code == "chunk.leaf"
    assert "volume 7 of 12 (tiny.agb.007), bytes " in error.message
    name(plain, 7).unlink()
    error = refusal(verify, plain)
    assert error.code == "volume.missing"
    assert "volume 7 of 12 is not here" in error.message
    good = name(spare, 7).read_bytes()
    flip(name(spare, 7), len(good) - 60_000)
    for _ in range(2):  # corrupted, then missing
        report = verify(spare)
        assert [item["volume"] for item in report.medium["repaired"]] == [7]
        medium = open_medium(spare)
        assert mend(medium, spare).written == (name(spare, 7),)
        medium.close()
        assert name(spare, 7).read_bytes() == good
        name(spare, 7).unlink()


class BadSector(PlainFile):
    """A disc that cannot be read from some byte on, in one of its files."""

    def __init__(self, path, number, start):
        super().__init__(path)
        self._start = start if path.name.endswith(f".{number:03}") else None

    def read_into(self, offset, buffer):
        if self._start is not None and offset + len(buffer) > self._start:
            raise FaultError("host.io", f"{self.path} cannot be read at byte {offset}: bad sector")
        super().read_into(offset, buffer)


@pytest.mark.parametrize("start", [700, 4_000_000])
def test_a_bad_sector_is_told_or_made_up_for(start, plain_set, spare_set):
    def fetch(folder):
        paths = sorted(folder.iterdir())
        found = VolumeSet(paths, lambda path: BadSector(path, 3, start))
        try:
            chunks = Chunks(found)
            return b"".join(chunks.read(index) for index in range(len(chunks.leaves)))
        finally:
            found.close()

    error = refusal(fetch, plain_set)
    assert error.code == "host.io"
    assert "tiny.agb.003" in error.message
    assert len(fetch(spare_set)) > (COUNT - 1) * CHUNK


def test_a_volume_that_cannot_be_opened_is_made_up_for(spared):
    """A link to nothing, or a file that gives no byte, is a lost volume and no more."""
    for number in range(1, COUNT + 1):
        place = name(spared, number)
        kept = place.read_bytes()
        place.unlink()
        place.symlink_to("/nowhere/disc")
        assert verify(spared).medium["repaired"][0]["volume"] == number
        place.unlink()
        place.write_bytes(kept)


def test_poisoned_parity_repairs_nothing(spared):
    name(spared, 5).unlink()
    for number in (7, 8):
        path = name(spared, number)
        raw = bytearray(path.read_bytes())
        at = len(raw) - 4096 - CHUNK
        raw[at : at + 64] = bytes(64)
        path.write_bytes(raw)
    error = refusal(verify, spared)
    assert error.code in {"volume.missing", "chunk.leaf"}


def test_parity_that_lies_consistently_is_held_against_the_seal(full, tmp_path):
    folder = tmp_path / "set"
    cut(full, folder, spare=1)
    path = name(folder, COUNT + 1)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"VOLUME/parity.007") + 512
    raw[at] ^= 1
    leaf = attacks.hashlib.sha256(b"\0" + bytes(raw[at : at + CHUNK])).digest()
    table = raw.rindex(b"META/parity.bin") + 512
    raw[table : table + 32] = leaf
    path.write_bytes(raw)
    assert verify(folder).medium["bad_parity"] == []  # nothing needs it, and it fits its own list
    name(folder, 5).unlink()
    error = refusal(verify, folder)
    assert error.code == "chunk.leaf"
    assert "volume 5 of 6" in error.message


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_any_loss_within_the_code_is_recovered(count, spare, length, dice):
    data = [dice.randbytes(length) for _ in range(count)]
    code = parity.matrix(count, spare)
    sums = parity.Sums(code)
    for place, chunk in enumerate(data):
        sums.add(place, chunk)
    made = [sums.chunk(row, length) for row in range(spare)]
    lost = sorted(dice.sample(range(count), dice.randint(1, min(count, spare))))
    rows = dice.sample(range(spare), dice.randint(len(lost), spare))
    left = parity.Sums([code[row] for row in rows])
    for place, chunk in enumerate(data):
        if place not in lost:
            left.add(place, chunk)
    found = parity.recover([code[r] for r in rows], lost, left, [made[r] for r in rows])
    assert found == [data[place] for place in lost]


def test_the_first_row_is_xor_and_every_square_part_can_be_inverted():
    assert set(parity.matrix(40, 3)[0]) == {1}
    code = parity.matrix(6, 3)
    for rows, places in itertools.product(
        itertools.combinations(range(3), 2), itertools.combinations(range(6), 2)
    ):
        (a, b), (c, d) = ([code[r][p] for p in places] for r in rows)
        assert parity.multiply(a, d) != parity.multiply(b, c)
    for bad in ((0, 1), (250, 6), (3, -1)):
        with pytest.raises(ValueError, match="no code"):
            parity.matrix(*bad)
    with pytest.raises(ZeroDivisionError):
        parity.invert(0)


# -- cutting ----------------------------------------------------------------------------------


def test_sizes_that_cannot_be(full, tmp_path):
    medium = open_medium(full)
    assert refusal(split, medium, tmp_path, volume_size=1000).code == "usage.argument"
    size = medium.head.body_start + CHUNK + 64 * 1024
    with pytest.raises(UsageError):
        split(medium, tmp_path, volume_size=size, parity_count=parity.MAX_VOLUMES - COUNT + 1)
    medium.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_makes_no_set(full, tmp_path):
    bad = tmp_path / "bad.agb"
    bad.write_bytes(attacks.flip(full.read_bytes(), -1_000_000))
    folder = tmp_path / "set"
    folder.mkdir()
    medium = open_medium(bad)
    assert refusal(split, medium, folder, volume_size=30_000_000, parity_count=1).code == (
        "chunk.leaf"
    )
    medium.close()
    assert list(folder.iterdir()) == []


# -- install ----------------------------------------------------------------------------------


class Yes:
    permitted = True
    canonical = b"{}"
    digest = bundles.trust.Digest.of(b"{}")


def bring_in(path, root, **more):
    return install(
        path,
        root=root,
        now=bundles.NOW,
        gate=lambda *_: Yes(),
        audit=lambda event: event,
        more=Help(**more),
    )


@pytest.fixture
def root(tmp_path):
    trust.save_trust(TRUST, tmp_path / "root" / "trust")
    return tmp_path / "root"


def test_discs_one_after_another_resume(volumes, root, tmp_path):
    discs = [tmp_path / f"disc{n}" for n in range(3)]
    for number in range(1, COUNT + 1):
        disc = discs[(number - 1) // 2]
        disc.mkdir(exist_ok=True)
        name(volumes, number).rename(name(disc, number))
    for disc, missing in zip(discs[:2], ("3, 4, 5, 6", "5, 6"), strict=True):
        error = refusal(bring_in, disc, root)
        assert error.code == "volume.missing"
        assert f"volumes {missing} of 6" in error.message
        assert Store(root / "store").current() is None
    done = bring_in(discs[2], root)
    assert done.resumed == 4
    assert Store(root / "store").current() == done.bundle


def test_an_install_asks_for_the_next_disc(volumes, root, tmp_path):
    shelf, drive, asked = volumes, tmp_path / "drive", []
    drive.mkdir()
    name(shelf, 1).rename(name(drive, 1))

    def ask(number, count):
        asked.append((number, count))
        for path in drive.iterdir():
            path.unlink()  # the drive holds one disc
        shutil.copy(name(shelf, number), name(drive, number))
        return [name(drive, number)]

    done = bring_in(drive, root, asker=ask)
    assert asked == [(number, COUNT) for number in range(2, COUNT + 1)]
    assert done.resumed == 0
    assert Store(root / "store").current() == done.bundle


def test_an_install_that_gets_no_disc_can_be_resumed(volumes, root):
    name(volumes, 5).rename(volumes.parent / "tiny.agb.005")
    asked = []
    error = refusal(bring_in, volumes, root, asker=lambda *about: asked.append(about) or [])
    assert error.code == "volume.missing"
    assert asked == [(5, COUNT)]
    (volumes.parent / "tiny.agb.005").rename(name(volumes, 5))
    assert bring_in(volumes, root).resumed > 0


def test_an_install_repairs_on_its_way(spared, root, full):
    name(spared, 2).unlink()
    flip(name(spared, 4), -70_000)
    done = bring_in(spared, root)
    assert done.bundle.digest == verify(full).digest


# -- a run that was killed --------------------------------------------------------------------


def killed_at(number, call):
    """Run in a child that dies when its progress has been told `number` times."""
    child = os.fork()
    if child == 0:
        told = 0

        def tell(_done, _total):
            nonlocal told
            told += 1
            if told == number:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            call(tell)
        finally:
            os._exit(77)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def cut_counting(path, folder, spare, progress=None):
    """Cut a set; return the numbers of the chunks that were read from the bundle."""
    medium = open_medium(path)
    reads = []
    medium.read_into, plain = (
        lambda at, part: (reads.append(at // CHUNK), plain(at, part)),
        (medium.read_into),
    )
    size = medium.head.body_start + 2 * CHUNK + 64 * 1024
    split(medium, folder, volume_size=size, parity_count=spare, progress=progress)
    medium.close()
    return reads


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_a_killed_split_is_gone_on_with(full, tmp_path, spare, number):
    whole, folder = tmp_path / "whole", tmp_path / "set"
    whole.mkdir()
    folder.mkdir()
    assert sorted(cut_counting(full, whole, spare)) == list(range(COUNT))
    killed_at(number, lambda tell: cut_counting(full, folder, spare, tell))
    for path in folder.glob("tiny.agb.*"):  # what bears its final name is whole
        assert path.read_bytes() == (whole / path.name).read_bytes()
    again = cut_counting(full, folder, spare)
    assert len(again) == COUNT - (number - 1)  # the chunk that it died with is read again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_killed_join_is_gone_on_with(full, plain_set, tmp_path, number):
    out = tmp_path / "tiny.agb"

    def run(tell=None):
        medium = open_medium(plain_set)
        try:
            join(medium, out, tell)
        finally:
            medium.close()

    killed_at(number, run)
    assert not out.exists()
    left = next(tmp_path.iterdir())
    raw = bytearray(left.read_bytes())
    raw[-1] ^= 1  # what is there is hashed, not believed
    left.write_bytes(raw)
    run()
    assert out.read_bytes() == full.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_left_of_another_set_is_not_taken(full, plain_set, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    bundles.make_bundle(other / "tiny.agb", version="2.0")
    medium = open_medium(other / "tiny.agb")
    size = medium.head.body_start + CHUNK + 64 * 1024
    split(medium, other, volume_size=size)
    medium.close()
    folder = tmp_path / "set"
    folder.mkdir()
    for path in other.glob("tiny.agb.*"):
        shutil.copyfile(path, folder / path.name)
        shutil.copyfile(path, folder / f".{path.name}.partial")
    cut(full, folder)
    for path in plain_set.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
