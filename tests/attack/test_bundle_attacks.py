"""Every row of the catalogue: the untouched bundle passes, the altered one is refused by name."""

import hashlib
import time
from collections import Counter

import attacks
import bundles
import pytest

from bundle.verify import Floors, open_bundle, verify_bundle
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

TRUST = bundles.make_trust()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.agb"
    bundles.make_bundle(path)
    assert verify_bundle(path, TRUST, now=bundles.NOW).seal.approvers == ("alice", "bob")
    return path.read_bytes()


def write(folder, raw):
    path = folder / "altered.agb"
    path.write_bytes(raw)
    return path


def test_putting_a_bundle_together_again_changes_nothing(good):
    raw = attacks.Forge.of(good).assemble()
    assert raw == good
    forge = attacks.Forge.of(good)
    attacks.rebuild(forge, {})
    assert forge.assemble() == good


@pytest.mark.parametrize("row", attacks.ATTACKS, ids=lambda row: row.name)
def test_row_is_refused_with_its_code(row, good, tmp_path):
    path = write(tmp_path, row.alter(good))
    started = time.monotonic()
    with pytest.raises(RefusedError) as caught:
        verify_bundle(path, TRUST, now=bundles.NOW)
    assert caught.value.code == row.code, caught.value.message
    assert time.monotonic() - started < 2
    assert [item.name for item in tmp_path.iterdir()] == ["altered.agb"]


def test_names_are_unique_and_the_catalogue_is_large():
    names = [row.name for row in attacks.ATTACKS]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(names) >= 100


def test_truncation_at_every_block_of_the_head_is_told_as_such(good, tmp_path):
    end = attacks.head_of(good)["body"][0]
    points = [*range(0, end, 512 * 16), *range(end - 8192, end, 512)]
    for cut in points:
        path = write(tmp_path, good[:cut])
        with pytest.raises(RefusedError) as caught:
            open_bundle(path, TRUST, now=bundles.NOW)
        assert caught.value.code == "archive.truncated", cut


def test_truncation_anywhere_in_the_body_is_told_before_it_is_read(good, tmp_path):
    start = attacks.head_of(good)["body"][0]
    for cut in range(start, len(good), 397_000):
        path = write(tmp_path, good[:cut])
        with pytest.raises(RefusedError) as caught:
            open_bundle(path, TRUST, now=bundles.NOW)
        assert caught.value.code == "archive.truncated", cut


def test_a_flipped_bit_anywhere_is_refused(good, tmp_path):
    for at, raw in attacks.random_flips(good, 80, seed=7):
        path = write(tmp_path, raw)
        with pytest.raises(RefusedError):
            verify_bundle(path, TRUST, now=bundles.NOW)
        assert at >= 0


def test_a_byte_flipped_in_each_section_is_refused_by_that_section(good, tmp_path):
    places = attacks.head_of(good)
    expected = {
        "META/envelope.dsse.json": {"seal.malformed", "seal.threshold"},
        "META/trust.json": {"trust.chain", "trust.root"},
        "META/manifest.json": {"seal.subject"},
        "META/chunks.bin": {"chunk.root"},
        "body": {"chunk.leaf"},
    }
    for section, (start, size) in places.items():
        for step in range(8):
            at = start + (size - 1) * step // 7
            path = write(tmp_path, attacks.flip(good, at))
            with pytest.raises(RefusedError) as caught:
                verify_bundle(path, TRUST, now=bundles.NOW)
            assert caught.value.code in expected[section], (section, at)


def test_spaces_of_the_envelope_are_not_free(good, tmp_path):
    raw = bytearray(good)
    raw[512 + 131_071] = 0
    with pytest.raises(RefusedError, match="strict JSON"):
        open_bundle(write(tmp_path, bytes(raw)), TRUST, now=bundles.NOW)


def test_a_file_of_a_terabyte_without_content_is_refused_at_once(tmp_path):
    path = tmp_path / "huge.agb"
    attacks.huge_sparse(path)
    started = time.monotonic()
    with pytest.raises(RefusedError) as caught:
        open_bundle(path, TRUST, now=bundles.NOW)
    assert caught.value.code == "archive.header"
    assert time.monotonic() - started < 1


def test_no_plain_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.agb")
    for name, code in (("", "archive.type"), ("pipe.agb", "archive.type"), ("none", "host.io")):
        with pytest.raises(AirgapError) as caught:
            open_bundle(tmp_path / name, TRUST, now=bundles.NOW)
        assert caught.value.code == code


def test_a_chunk_error_names_chunk_offset_and_file(good, tmp_path):
    start = attacks.head_of(good)["body"][0]
    at = start + attacks.CHUNK + 5
    path = write(tmp_path, attacks.flip(good, at))
    with pytest.raises(RefusedError) as caught:
        verify_bundle(path, TRUST, now=bundles.NOW)
    assert caught.value.code == "chunk.leaf"
    assert "chunk 1 " in caught.value.message
    assert f"{start + attacks.CHUNK:,}" in caught.value.message
    assert "model.onnx_data" in caught.value.message


@pytest.mark.parametrize(
    ("epoch", "digest", "code"),
    [(1, b"other", "trust.epoch"), (2, b"newer", "trust.epoch"), (0, b"older", "")],
)
def test_older_epoch_and_twin(good, tmp_path, epoch, digest, code):
    path = write(tmp_path, good)
    floors = Floors(epochs={"tiny-line": (epoch, Digest.of(digest))})
    if not code:
        open_bundle(path, TRUST, now=bundles.NOW, floors=floors).close()
        return
    with pytest.raises(RefusedError) as caught:
        open_bundle(path, TRUST, now=bundles.NOW, floors=floors)
    assert caught.value.code == code


def test_the_same_release_again_is_no_twin(good, tmp_path):
    path = write(tmp_path, good)
    digest = Digest.of(attacks.canonical_json(attacks.Forge.of(good).manifest))
    floors = Floors(epochs={"tiny-line": (1, digest)})
    open_bundle(path, TRUST, now=bundles.NOW, floors=floors).close()


def test_clock_set_back(good, tmp_path):
    path = write(tmp_path, good)
    for now, floors in (
        (bundles.ENROLLED - bundles.timedelta(seconds=1), Floors()),
        (bundles.NOW, Floors(clock=bundles.NOW + bundles.timedelta(seconds=1))),
    ):
        with pytest.raises(RefusedError) as caught:
            open_bundle(path, TRUST, now=now, floors=floors)
        assert caught.value.code == "trust.clock"


def test_root_expired(good, tmp_path):
    later = TRUST.document.expires
    with pytest.raises(RefusedError) as caught:
        open_bundle(write(tmp_path, good), TRUST, now=later)
    assert caught.value.code == "trust.root"


def test_required_role_missing(tmp_path):
    roots = bundles.make_trust(required_roles=("export-control",))
    path = tmp_path / "x.agb"
    bundles.make_bundle(path, roots=roots)
    with pytest.raises(RefusedError) as caught:
        open_bundle(path, roots, now=bundles.NOW)
    assert caught.value.code == "seal.role"
    roots = bundles.make_trust(required_roles=("isso",))
    bundles.make_bundle(path, roots=roots)
    open_bundle(path, roots, now=bundles.NOW).close()


def test_enrolment_ended_before_the_release(tmp_path):
    document = TRUST.document
    bob = document.people["bob"].model_copy(update={"valid_to": bundles.CREATED})
    from bundle import trust

    roots = trust.append_root(
        TRUST,
        document.model_copy(
            update={"version": document.version + 1, "people": {**document.people, "bob": bob}}
        ),
        [bundles.signer("root")],
    )
    path = tmp_path / "x.agb"
    bundles.make_bundle(path, roots=roots)
    with pytest.raises(RefusedError) as caught:
        open_bundle(path, roots, now=bundles.NOW)
    assert caught.value.code == "seal.threshold"


def test_a_key_of_another_scheme_never_counts(tmp_path, good):
    """P-256 under an enrolled id: the root may list it, no signature with it is verified."""
    from bundle import trust

    document = TRUST.document
    keyid = hashlib.sha256(b"p256").hexdigest()
    entry = trust.KeyEntry(scheme="ecdsa-sha2-nistp256", public="AAAA")
    carol = document.people["carol"]
    people = {**document.people, "carol": carol.model_copy(update={"keys": (*carol.keys, keyid)})}
    roots = trust.append_root(
        TRUST,
        document.model_copy(
            update={
                "version": document.version + 1,
                "keys": {**document.keys, keyid: entry},
                "people": people,
            }
        ),
        [bundles.signer("root")],
    )
    forge = attacks.Forge.of(good)
    forge.trust = trust.chain_document(roots)
    raw = forge.assemble()
    open_bundle(write(tmp_path, raw), TRUST, now=bundles.NOW).close()
    value = attacks.json.loads(raw[512 : 512 + 131_072])
    value["signatures"].append({"keyid": keyid, "sig": "AAAA"})
    value["signatures"].sort(key=lambda s: s["keyid"])
    padded = attacks.canonical_json(value).ljust(131_072)
    with pytest.raises(RefusedError) as caught:
        open_bundle(
            write(tmp_path, raw[:512] + padded + raw[512 + 131_072 :]), TRUST, now=bundles.NOW
        )
    assert caught.value.code == "seal.algorithm"


def test_medium_changes_between_passes(good, tmp_path):
    path = write(tmp_path, good)
    with open_bundle(path, TRUST, now=bundles.NOW) as sealed:
        sealed.verify_body()
        with path.open("r+b") as stream:
            stream.seek(sealed.head.body_start + sealed.manifest.find("META/report.json").offset)
            stream.write(b"X")
        with pytest.raises(RefusedError) as caught:
            sealed.read("META/report.json")
        assert caught.value.code == "chunk.leaf"
        with pytest.raises(RefusedError) as caught:
            sealed.verify_body()
        assert caught.value.code == "chunk.leaf"
        with path.open("r+b") as stream:
            stream.truncate(len(good) - 4096)
        with pytest.raises(RefusedError):
            sealed.verify_body()
