"""Transit encryption: only recipients open it; no block is moved, cut or exchanged unseen."""

import hashlib
import json
import shutil
import subprocess

import attacks
import bundles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airgap.install import Store, install
from bundle import transit, trust
from bundle.keys import decode_base64, encode_base64
from bundle.media import Help, open_medium, open_source
from bundle.source import PlainFile
from bundle.split import split
from bundle.verify import open_bundle, verify_bundle
from policy.errors import AirgapError, RefusedError

TRUST = bundles.make_trust()
BLOCK = transit.CHUNK + transit.TAG


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, profile in (("lab", "default"), ("second", "default"), ("gov", "cnsa2")):
        transit.new_transit_key(folder, name, profile=profile)
    return folder


def public(keys, name):
    return transit.parse_transit_key((keys / f"{name}.transit.pub.json").read_bytes())


def private(keys, name):
    return transit.load_identity(keys / f"{name}.transit.pem")


def seal(path, out, keys, *names, **more):
    source = PlainFile(path)
    try:
        return transit.encrypt_file(source, out, [public(keys, name) for name in names], **more)
    finally:
        source.close()


@pytest.fixture(scope="module")
def release(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("release")
    weights = bundles.make_weights(2 * transit.CHUNK + 12344, seed=3)
    bundles.make_bundle(folder / "tiny.agb", members=bundles.make_members(weights))
    seal(folder / "tiny.agb", folder / "tiny.agb.enc", keys, "lab", "gov")
    return folder


def verify(path, *identities):
    return verify_bundle(path, TRUST, now=bundles.NOW, more=Help(identities=identities))


def refusal(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value


@pytest.mark.parametrize("name", ["lab", "gov"])
def test_each_recipient_verifies_what_was_encrypted(name, release, keys):
    wanted = verify(release / "tiny.agb")
    report = verify(release / "tiny.agb.enc", private(keys, "second"), private(keys, name))
    assert (report.digest, report.seal, report.scan) == (wanted.digest, wanted.seal, wanted.scan)


def test_nobody_else_opens_it(release, keys):
    for identities in ((), (private(keys, "second"),)):
        error = refusal(verify, release / "tiny.agb.enc", *identities)
        assert error.code == "transit.key"
        assert "none opens it" in error.message


def test_no_plain_byte_is_in_it(release):
    plain, cipher = (release / "tiny.agb").read_bytes(), (release / "tiny.agb.enc").read_bytes()
    for at in range(0, len(plain) - 64, 400_000):
        if plain[at : at + 64].strip(b"\0"):
            assert plain[at : at + 64] not in cipher
    listed = subprocess.run(
        ["tar", "tf", release / "tiny.agb.enc"], check=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == ["META/transit.json", "TRANSIT/content.bin"]


def test_encrypting_twice_shares_no_key_and_no_block(release, keys, tmp_path):
    seal(release / "tiny.agb", tmp_path / "b.enc", keys, "lab", "gov")
    one, two = (release / "tiny.agb.enc").read_bytes(), (tmp_path / "b.enc").read_bytes()
    assert len(one) == len(two)
    assert one[-2_000_000:-8192] != two[-2_000_000:-8192]


def test_decrypt_gives_the_file_back(release, keys, tmp_path):
    source = open_source(release / "tiny.agb.enc", [private(keys, "lab")])
    transit.decrypt_file(source, tmp_path / "tiny.agb")
    source.close()
    assert (tmp_path / "tiny.agb").read_bytes() == (release / "tiny.agb").read_bytes()


def content_at(raw):
    return raw.index(b"TRANSIT/content.bin") + 512


def move_blocks(raw):
    at = content_at(raw)
    return (
        raw[:at] + raw[at + BLOCK : at + 2 * BLOCK] + raw[at : at + BLOCK] + raw[at + 2 * BLOCK :]
    )


def drop_last(raw):
    """Cut the last block and say so in the header, consistently."""
    return with_header(raw, lambda h: h.update(size=2 * transit.CHUNK), blocks=2)


def with_header(raw, change, *, blocks=None):
    size = int(raw[4096 - 512 + 124 : 4096 - 512 + 135], 8)
    header = json.loads(raw[4096 : 4096 + size])
    at = content_at(raw)
    length = header["size"] + transit.TAG * -(-header["size"] // transit.CHUNK)
    content = raw[at : at + length]
    change(header)
    text = attacks.canonical_json(header)
    content = content if blocks is None else content[: blocks * BLOCK]
    layout = attacks.tar.Layout([(transit.TRANSIT, len(text)), (transit.CONTENT, len(content))])
    return layout.gap(0) + text + layout.gap(1) + content + layout.gap(2)


def set_field(name, value):
    return lambda raw: with_header(raw, lambda h: h.update({name: value}))


def wrapped_flip(header):
    raw = bytearray(decode_base64(header["recipients"][0]["wrapped"]))
    raw[40] ^= 1
    for item in header["recipients"]:
        item["wrapped"] = encode_base64(bytes(raw))


ALTERED = {
    "blocks moved": (move_blocks, "transit.tag"),
    "last block dropped": (drop_last, "transit.key"),
    "one bit": (lambda raw: attacks.flip(raw, content_at(raw) + 9), "transit.tag"),
    "one bit of a tag": (lambda raw: attacks.flip(raw, content_at(raw) + BLOCK - 1), "transit.tag"),
    "cut": (lambda raw: raw[:-8192], "archive.truncated"),
    "appended": (lambda raw: raw + bytes(4096), "archive.trailing"),
    "end not zero": (lambda raw: attacks.flip(raw, len(raw) - 1), "archive.padding"),
    "another commitment": (set_field("commitment", "0" * 64), "transit.key"),
    "another id": (set_field("id", "0" * 64), "transit.key"),
    "unknown field": (set_field("note", "x"), "transit.malformed"),
    "another chunk": (set_field("chunk", 8 << 20), "transit.malformed"),
    "no recipients": (set_field("recipients", []), "transit.malformed"),
    "wrapped key": (lambda raw: with_header(raw, wrapped_flip), "transit.key"),
    "recipient dropped": (lambda raw: with_header(raw, lambda h: h["recipients"].pop()), "both"),
    "recipients reversed": (
        lambda raw: with_header(raw, lambda h: h["recipients"].reverse()),
        "transit.malformed",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_file_is_refused(name, release, keys, tmp_path):
    change, code = ALTERED[name]
    path, good = tmp_path / "x.agb.enc", (release / "tiny.agb.enc").read_bytes()
    path.write_bytes(with_header(good, lambda _: None))
    assert path.read_bytes() == good
    verify(path, private(keys, "lab"))
    path.write_bytes(change(good))
    errors = [refusal(verify, path, private(keys, who)) for who in ("lab", "gov")]
    found = {error.code for error in errors}
    assert found <= ({"transit.key", "transit.tag"} if code == "both" else {code}), errors


def test_nothing_in_plain_is_left_of_a_file_that_is_refused(release, keys, tmp_path):
    path = tmp_path / "x.agb.enc"
    raw = (release / "tiny.agb.enc").read_bytes()
    path.write_bytes(attacks.flip(raw, content_at(raw) + 2 * BLOCK + 5))
    source = open_source(path, [private(keys, "lab")])
    error = refusal(transit.decrypt_file, source, tmp_path / "x.agb")
    source.close()
    assert error.code == "transit.tag"
    assert "block 2 of 3" in error.message
    assert [item.name for item in tmp_path.iterdir()] == ["x.agb.enc"]


def test_a_key_that_is_wrapped_but_not_committed_to_opens_nothing(release, keys, tmp_path):
    """AES-GCM alone would let one file open under two keys; the commitment decides."""
    other = tmp_path / "other.enc"
    seal(release / "tiny.agb", other, keys, "lab")
    theirs = json.loads(other.read_bytes()[4096:].split(b"\0", 1)[0])

    def take(header):
        header["id"] = theirs["id"]
        header["recipients"] = theirs["recipients"]

    path = tmp_path / "x.enc"
    path.write_bytes(with_header((release / "tiny.agb.enc").read_bytes(), take))
    assert refusal(verify, path, private(keys, "lab")).code == "transit.key"


def test_volumes_and_install_take_encrypted_files(release, keys, tmp_path):
    medium = open_medium(release / "tiny.agb")
    size = medium.head.body_start + transit.CHUNK + 64 * 1024
    made = split(medium, tmp_path, volume_size=size, parity_count=1)
    medium.close()
    drive = tmp_path / "drive"
    drive.mkdir()
    for path in made[1:]:  # the first one is lost
        seal(path, drive / f"{path.name}.enc", keys, "lab")
    report = verify(drive, private(keys, "lab"))
    assert [item["volume"] for item in report.medium["repaired"]] == [1]
    root = tmp_path / "root"
    trust.save_trust(TRUST, root / "trust")

    class Yes:
        permitted = True
        canonical = b"{}"
        digest = trust.Digest.of(b"{}")

    done = install(
        drive,
        root=root,
        now=bundles.NOW,
        gate=lambda *_: Yes(),
        audit=lambda event: event,
        more=Help(identities=(private(keys, "lab"),)),
    )
    assert Store(root / "store").current() == done.bundle


# -- keys -------------------------------------------------------------------------------------


def test_key_files(keys, tmp_path):
    assert (keys / "lab.transit.pem").stat().st_mode & 0o777 == 0o600
    assert private(keys, "lab").keyid == public(keys, "lab").keyid
    assert private(keys, "gov").scheme == "mlkem1024-p384"
    made = transit.new_transit_key(tmp_path, "locked", passphrase=b"correct horse")
    path = tmp_path / "locked.transit.pem"
    assert b"ENCRYPTED" in path.read_bytes()
    assert transit.load_identity(path, b"correct horse").keyid == made.keyid
    for phrase in (b"", b"wrong"):
        assert refusal(transit.load_identity, path, phrase).code == "trust.keyfile"
    assert refusal(transit.new_transit_key, tmp_path, "locked").code == "trust.keyfile"
    assert refusal(transit.new_transit_key, tmp_path, "a/b").code == "trust.keyfile"


def test_what_is_no_transit_key(keys, tmp_path):
    path = tmp_path / "k.pem"
    shutil.copy(keys / "lab.transit.pem", path)
    path.chmod(0o644)
    assert refusal(transit.load_identity, path).code == "trust.keyfile"
    path.chmod(0o600)
    raw = path.read_bytes()
    for bad in (b"", b"x", raw[: len(raw) // 2], raw + raw):
        path.write_bytes(bad)
        assert refusal(transit.load_identity, path).code == "trust.keyfile"
    good = json.loads((keys / "lab.transit.pub.json").read_bytes())
    for change in (
        {"keyid": "0" * 64},
        {"scheme": "mlkem1024-p384"},
        {"public": "AAAA"},
        {"public": "no base64"},
        {"note": ""},
    ):
        raw = attacks.canonical_json({**good, **change})
        assert refusal(transit.parse_transit_key, raw).code == "transit.key"


def test_somebody_must_be_able_to_open_it(release, keys, tmp_path):
    for names in ((), ("lab", "lab")):
        error = refusal(seal, release / "tiny.agb", tmp_path / "x.enc", keys, *names)
        assert error.code == "transit.key"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 15, transit.CHUNK - 1, transit.CHUNK, transit.CHUNK + 1])
def test_any_size(size, keys, tmp_path):
    path, out = tmp_path / "plain", tmp_path / "plain.enc"
    path.write_bytes(bundles.make_weights(size))
    seal(path, out, keys, "lab")
    source = open_source(out, [private(keys, "lab")])
    assert source.size == size
    transit.decrypt_file(source, tmp_path / "again")
    source.close()
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@given(st.binary(max_size=400))
def test_any_header_is_parsed_or_refused(raw):
    with pytest.raises(RefusedError) as caught:
        transit.parse_header(raw)
    assert caught.value.code == "transit.malformed"


def test_the_derivation_is_the_documented_one(release, keys):
    """FORMAT.md 16.4, written down a second time."""
    import hmac

    def hkdf(salt, secret, info):
        extracted = hmac.digest(salt, secret, "sha384")
        return hmac.digest(extracted, info + b"\x01", "sha384")[:32]

    fixed = iter([b"i" * 32, b"k" * 32])
    out = release / "fixed.enc"
    header = seal(release / "tiny.agb", out, keys, "lab", random=lambda _: next(fixed))
    wanted = hkdf(b"i" * 32, b"k" * 32, b"airgap-transit/1 commitment")
    assert header.commitment == wanted.hex()
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key = hkdf(b"i" * 32, b"k" * 32, b"airgap-transit/1 block")
    raw = out.read_bytes()
    at = content_at(raw)
    last = header.count - 1
    bound = (
        b"airgap-transit/1 "
        + hashlib.sha256(header.to_bytes()).digest()
        + last.to_bytes(8)
        + header.count.to_bytes(8)
        + b"\x01"
    )
    block = raw[at + last * BLOCK :][: header.size - last * transit.CHUNK + 16]
    plain = AESGCM(key).decrypt(last.to_bytes(12), block, bound)
    assert plain == (release / "tiny.agb").read_bytes()[last * transit.CHUNK :]
    out.unlink()


def test_weights_that_are_too_large_to_hold_are_verified_all_the_same(keys, tmp_path):
    """Their bytes go through the tree; the scan needs none of them, or a header."""
    path = tmp_path / "large.agb"
    bundles.make_bundle(path, members=bundles.make_members(bundles.make_weights(65 << 20)))
    seal(path, tmp_path / "large.agb.enc", keys, "lab")
    mine = Help(identities=(private(keys, "lab"),))
    assert verify(tmp_path / "large.agb.enc", private(keys, "lab")).scan == verify(path).scan
    with open_bundle(tmp_path / "large.agb.enc", TRUST, now=bundles.NOW, more=mine) as sealed:
        name = f"payload/{bundles.MODEL}/model.onnx_data"
        view = sealed.view(name)
        assert len(view) == 65 << 20
        assert view[:8] == bundles.make_weights(8)
        assert bytes(view[16:64]) == bytes(48)
        with pytest.raises(TypeError):
            view[0] = 1
