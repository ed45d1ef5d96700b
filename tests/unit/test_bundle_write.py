"""Writing: one pass, the same bytes anywhere, nothing half-written, a full disk said cleanly."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import attacks
import bundles
import pytest
from disks import fill, mounted

from bundle import envelope
from bundle.delta import BundleBase, write_delta
from bundle.manifest import Base, ModelEntry, Release
from bundle.media import Help, open_medium, open_source
from bundle.source import PlainFile
from bundle.split import join, split
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.transit import decrypt_file, encrypt_file, load_identity, new_transit_key
from bundle.verify import verify_bundle
from bundle.write import Member, fresh_file, write_archive
from policy.errors import AirgapError, FaultError

TRUST = bundles.make_trust()
TESTS = Path(__file__).parents[1]

# Another machine, as far as one can be had: what a program inherits is all different.
ELSEWHERE = """
import os, random, sys, time
sys.path.insert(0, sys.argv[1])
os.umask(int(sys.argv[3], 8))
time.tzset()
import bundles
from bundle.write import Member
members = bundles.make_members()
random.Random(sys.argv[4]).shuffle(members)
from pathlib import Path
for number, member in enumerate(members):
    Path(f"source{number}").write_bytes(member.source)
    os.utime(f"source{number}", (number, number))
members = [
    Member(m.path, Path(f"source{n}"), m.role, m.media_type) for n, m in enumerate(members)
]
bundles.make_bundle(Path(sys.argv[2]), members=members)
"""


@pytest.mark.parametrize("cores", [1, 2])
def test_two_machines_write_the_same_bytes(tmp_path, cores):
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    made = []
    for number, (env, mask) in enumerate(
        [
            ({"LC_ALL": "C", "TZ": "UTC", "HOME": "/root", "USER": "root"}, "022"),
            (
                {
                    "LC_ALL": "tr_TR.UTF-8",
                    "TZ": "Pacific/Kiritimati",
                    "HOME": "/nowhere",
                    "USER": "someone",
                    "PYTHONHASHSEED": "77",
                    "PYTHONUTF8": "0",
                    "COLUMNS": "20",
                },
                "077",
            ),
        ]
    ):
        folder = tmp_path / f"machine{number}" / ("x" * (1 + 40 * number))
        folder.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE, TESTS, folder / "out.agb", mask, str(number)],
            check=True,
            cwd=folder,
            env={"PATH": os.environ["PATH"], **env},
            preexec_fn=(lambda n=number: n and os.sched_setaffinity(0, allowed)),
        )
        made.append((folder / "out.agb").read_bytes())
    assert made[0] == made[1]
    bundles.make_bundle(tmp_path / "here.agb")
    assert made[0] == (tmp_path / "here.agb").read_bytes()


def test_each_source_is_read_once(tmp_path):
    weights = bundles.make_weights()
    (tmp_path / "weights").write_bytes(weights)
    members = bundles.make_members(weights)

    class Once(type(tmp_path)):
        """A file that opens once."""

        opened = 0

        def open(self, *args, **more):
            type(self).opened += 1
            return super().open(*args, **more)

    place = Once(tmp_path / "weights")
    members = [
        bundles.Member(m.path, place, m.role, m.media_type) if m.source == weights else m
        for m in members
    ]
    bundles.make_bundle(tmp_path / "a.agb", members=members)
    assert Once.opened == 1


def test_the_sums_serve_sha256sum_in_every_form(tmp_path):
    """What tar takes out of a bundle, or of one put together again, passes `sha256sum -c`."""
    path = tmp_path / "tiny.agb"
    bundles.make_bundle(path)
    medium = open_medium(path)
    size = medium.head.body_start + attacks.CHUNK + 64 * 1024
    split(medium, tmp_path, volume_size=size)
    medium.close()
    medium = open_medium(tmp_path / "tiny.agb.001")
    join(medium, tmp_path / "joined.agb")
    medium.close()
    # Without any program of ours: the head of one volume and the bodies of all.
    names = sorted(tmp_path.glob("tiny.agb.0*"))
    start = attacks.head_of(path.read_bytes())["body"][0]
    with (tmp_path / "by-hand.agb").open("wb") as out:
        subprocess.run(["head", "-c", str(start), names[0]], check=True, stdout=out)
        for number, name in enumerate(names, start=1):
            member = f"VOLUME/body.{number:03}"
            subprocess.run(["tar", "xOf", name, member], check=True, stdout=out)
    for name in ("tiny.agb", "joined.agb", "by-hand.agb"):
        folder = tmp_path / f"out-{name}"
        folder.mkdir()
        subprocess.run(["tar", "xf", tmp_path / name], check=True, cwd=folder)
        done = subprocess.run(
            ["sha256sum", "-c", "META/SHA256SUMS"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        assert "FAILED" not in done.stdout


# -- a full disk ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    one = bundles.make_bundle(folder / "one.agb")
    base = Base(bundle_id="tiny-line", manifest_digest=str(one.digest))
    members = bundles.make_members(bundles.make_weights(seed=5))
    bundles.make_bundle(folder / "two.agb", base=base, epoch=2, members=members)
    new_transit_key(folder, "lab")
    medium = open_medium(folder / "one.agb")
    size = medium.head.body_start + attacks.CHUNK + 64 * 1024
    split(medium, folder, volume_size=size, parity_count=1)
    medium.close()
    return folder


def to_build(_release, out):
    bundles.make_bundle(out / "x.agb")


def to_split(release, out):
    medium = open_medium(release / "one.agb")
    split(medium, out, volume_size=30_000_000, parity_count=1)


def to_join(release, out):
    join(open_medium(release / "one.agb.001"), out / "x.agb")


def to_delta(release, out):
    base = BundleBase(open_medium(release / "one.agb"))
    write_delta(open_medium(release / "two.agb"), base, out / "x.agb")


def to_encrypt(release, out):
    from bundle.transit import parse_transit_key

    key = parse_transit_key((release / "lab.transit.pub.json").read_bytes())
    encrypt_file(PlainFile(release / "one.agb"), out / "x.enc", [key])


def to_decrypt(release, out):
    from bundle.transit import parse_transit_key

    key = parse_transit_key((release / "lab.transit.pub.json").read_bytes())
    encrypt_file(PlainFile(release / "one.agb"), release / "one.agb.enc", [key])
    source = open_source(release / "one.agb.enc", [load_identity(release / "lab.transit.pem")])
    decrypt_file(source, out / "x.agb")


WRITERS = [to_build, to_split, to_join, to_delta, to_encrypt, to_decrypt]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_told_before_anything_is_written(write, release, tmp_path):
    with mounted(tmp_path / "disk", 40 << 20) as disk:
        write(release, disk)
        made = sorted(path.name for path in disk.iterdir())
        assert made
        for path in disk.iterdir():
            path.unlink()
        fill(disk / "ballast", 1 << 20)
        with pytest.raises(FaultError) as caught:
            write(release, disk)
        assert caught.value.code == "host.space"
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        fill(disk / "rest", 0)  # truly full: not one byte is left
        with pytest.raises(FaultError) as caught:
            write(release, disk)
        assert caught.value.code == "host.space"
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "rest"]


def test_a_disk_that_fills_while_it_is_written_leaves_nothing(tmp_path):
    with mounted(tmp_path / "disk", 40 << 20) as disk:

        def run_out(*_):
            if not (disk / "ballast").exists():
                fill(disk / "ballast", 0)

        with pytest.raises(FaultError) as caught:
            bundles.make_bundle(disk / "x.agb", progress=run_out)
        assert caught.value.code == "host.space"
        assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_what_cannot_be_written_is_a_fault(tmp_path):
    with pytest.raises(AirgapError) as caught, fresh_file(tmp_path / "none" / "x", 1):
        pass
    assert caught.value.code == "host.io"


def test_the_untouched_release_passes(release):
    for name in ("one.agb", "two.agb", "one.agb.003"):
        assert verify_bundle(release / name, TRUST, now=bundles.NOW, more=Help())


GOLDEN = {
    "META/report.json": ("report", b"{}"),
    "META/evidence/pins.sha256": ("evidence", b"pins\n"),
    "META/sbom/bom.cdx.json": ("sbom", b"{}"),
    "META/vectors/parity.json": ("vectors", b"{}"),
    "payload/tiny/graphs.json": ("graphs", b"{}"),
    "payload/tiny/model.onnx_data": ("external-data", bytes(range(256)) * 20_000),
    "payload/tiny/" + "n" * 100 + "/Überblick-分子.txt": ("document", b"text\n"),
}


def write_golden(out):
    members = [Member(path, raw, role) for path, (role, raw) in GOLDEN.items()]
    at = datetime(2026, 5, 31, 12, tzinfo=UTC)
    model = {
        "id": "tiny",
        "source": "local:tiny",
        "revision": "r1",
        "provenance_level": "L1",
        "precisions": ["fp32"],
        "licence": {"spdx": "Apache-2.0", "status": "declared"},
        "supplier": {"legal_name": "airgap project", "jurisdiction": "none", "status": "declared"},
        "modalities": ["molecule"],
        "intended_use": "tests",
        "reference_model": True,
        "scientific_use": False,
    }
    release = Release(
        bundle_id="tiny-line",
        name="tiny",
        version="1.0",
        created=at,
        not_before=at,
        expires=at + timedelta(days=365),
        epoch=1,
        models=(ModelEntry.model_validate_json(json.dumps(model)),),
    )

    def seal(manifest):
        payload = seal_statement(manifest, builder="ben").to_bytes()
        return envelope.sign_statement(payload, PAYLOAD_TYPE, bundles.signer("builder"))

    return write_archive(out, release, members, trust_chain=b"{}", seal=seal)


def test_the_bytes_of_the_default_profile_are_those_of_the_first_release(tmp_path):
    """Written by the version before volumes, deltas and `cnsa2`, whose readers still take it."""
    write_golden(tmp_path / "x.agb")
    found = hashlib.sha256((tmp_path / "x.agb").read_bytes()).hexdigest()
    assert found == "e826506c44a4ca68a08ed5fba339cb10efb5a1e1732d9c757d1e6862e4cbc491"
