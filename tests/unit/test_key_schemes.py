"""Three schemes of keys: what they sign, what files hold, and what openssl says of them."""

import subprocess

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import keys
from policy.errors import RefusedError

SIZES = {keys.ED25519: 64, keys.P384: None, keys.MLDSA87: 4627}


def code_of(call):
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def make(folder, scheme, name="a", **more):
    return keys.new_key(folder, name, person="a", roles=("approver",), scheme=scheme, **more)


@pytest.mark.parametrize("scheme", keys.SCHEMES)
@pytest.mark.parametrize("passphrase", [b"", b"correct horse"])
def test_a_key_signs_and_only_its_own_bytes_verify(tmp_path, scheme, passphrase):
    made = make(tmp_path, scheme, passphrase=passphrase)
    path = tmp_path / "a.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (b"ENCRYPTED" in path.read_bytes()) == bool(passphrase)
    signer = keys.load_signer(path, passphrase)
    assert signer.public_key == made.key
    assert made.key.keyid == made.keyid
    signature = signer.sign(b"message")
    assert SIZES[scheme] in {None, len(signature)}
    assert made.key.find_valid(signature, b"message")
    assert not made.key.find_valid(signature, b"messagf")
    assert not made.key.find_valid(signature[:-1], b"message")
    assert not made.key.find_valid(signature + b"\0", b"message")
    assert not made.key.find_valid(b"", b"message")
    other = make(tmp_path, scheme, "b")
    assert not other.key.find_valid(signature, b"message")
    assert keys.parse_public_key((tmp_path / "a.pub.json").read_bytes()) == made


@pytest.mark.parametrize("scheme", keys.SCHEMES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_flipped_bit_of_a_signature_verifies(scheme, data):
    signer = keys.FileSigner(keys._generate(scheme))
    signature = bytearray(signer.sign(b"message"))
    at = data.draw(st.integers(0, 2**20)) % (len(signature) * 8)
    signature[at // 8] ^= 1 << at % 8
    assert not signer.public_key.find_valid(bytes(signature), b"message")


def test_an_ecdsa_signature_has_one_form_only():
    signer = keys.FileSigner(keys._generate(keys.P384))
    signature = signer.sign(b"message")
    assert signer.public_key.find_valid(signature, b"message")
    r, s = decode_dss_signature(signature)
    padded = (
        bytes([0x30, len(signature) - 2 + 1])
        + bytes([2, signature[3] + 1, 0])
        + signature[4 : 4 + signature[3]]
        + signature[4 + signature[3] :]
    )
    assert not signer.public_key.find_valid(padded, b"message")
    raw = r.to_bytes(48, "big") + s.to_bytes(48, "big")
    assert not signer.public_key.find_valid(raw, b"message")  # the form of tokens


def test_a_p384_signature_over_another_hash_is_none():
    private = ec.generate_private_key(ec.SECP384R1())
    key = keys.PublicKey.of(private)
    assert key.find_valid(private.sign(b"m", ec.ECDSA(hashes.SHA384())), b"m")
    assert not key.find_valid(private.sign(b"m", ec.ECDSA(hashes.SHA256())), b"m")


def test_an_ml_dsa_signature_with_a_context_is_none():
    private = mldsa.MLDSA87PrivateKey.generate()
    key = keys.PublicKey.of(private)
    assert key.find_valid(private.sign(b"m"), b"m")
    assert not key.find_valid(private.sign(b"m", b"context"), b"m")


@pytest.mark.parametrize("scheme", [keys.ED25519, keys.P384])
def test_openssl_verifies_and_prints_the_key_id(tmp_path, scheme):
    made = make(tmp_path, scheme)
    (tmp_path / "message").write_bytes(b"message")
    (tmp_path / "sig").write_bytes(keys.load_signer(tmp_path / "a.pem").sign(b"message"))
    (tmp_path / "pub.pem").write_bytes(made.key.pem)
    der = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "a.pem", "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert der == made.key.der
    digest = ["-digest", "sha384"] if scheme == keys.P384 else []
    checked = subprocess.run(
        [
            "openssl",
            "pkeyutl",
            "-verify",
            "-pubin",
            "-inkey",
            "pub.pem",
            "-rawin",
            *digest,
            "-sigfile",
            "sig",
            "-in",
            "message",
        ],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("scheme", "public"),
    [
        (keys.ED25519, bytes(31)),
        (keys.P384, b"\x04" + bytes(96)),  # no point of the curve
        (keys.P384, bytes(97)),
        (keys.MLDSA87, bytes(1952)),  # the length of ML-DSA-65
        (keys.MLDSA87, bytes(32)),
        ("ecdsa-p256", bytes(65)),
        ("ml-dsa-65", bytes(1952)),
    ],
)
def test_a_key_of_the_wrong_shape_is_not_supported(scheme, public):
    key = keys.PublicKey(scheme, public)
    assert not key.supported
    assert not key.find_valid(bytes(64), b"m")
    with pytest.raises(ValueError, match=r"."):
        _ = key.keyid


def test_a_compressed_point_is_not_supported():
    private = ec.generate_private_key(ec.SECP384R1())
    point = keys.PublicKey.of(private).public
    compressed = private.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )
    assert keys.PublicKey(keys.P384, point).supported
    assert not keys.PublicKey(keys.P384, compressed.ljust(97, b"\0")).supported


@pytest.mark.parametrize(
    "private",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP521R1()),
        mldsa.MLDSA65PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p521", "ml-dsa-65", "rsa"],
)
def test_a_key_file_of_another_scheme_is_refused(tmp_path, private):
    path = tmp_path / "a.pem"
    path.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    assert code_of(lambda: keys.load_signer(path)) == "trust.keyfile"


def test_an_unknown_scheme_is_refused(tmp_path):
    assert code_of(lambda: make(tmp_path, "rsa")) == "trust.keyfile"
    assert list(tmp_path.iterdir()) == []
    private = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ValueError, match="P-384"):
        keys.PublicKey.of(private)


def test_a_pair_is_two_keys_or_none(tmp_path):
    made = keys.new_pair(tmp_path, "alice", person="alice", roles=("approver",))
    assert [each.scheme for each in made] == [keys.MLDSA87, keys.P384]
    assert sorted(path.name for path in tmp_path.glob("*.pem")) == [
        "alice-ecdsa-p384.pem",
        "alice-ml-dsa-87.pem",
    ]
    before = sorted(tmp_path.iterdir())
    again = lambda: keys.new_pair(tmp_path, "alice", person="alice", roles=("approver",))  # noqa: E731
    assert code_of(again) == "trust.keyfile"
    assert sorted(tmp_path.iterdir()) == before
    bad = lambda: keys.new_pair(tmp_path, "bob", person="B O B", roles=("approver",))  # noqa: E731
    assert code_of(bad) == "trust.keyfile"
    assert sorted(tmp_path.iterdir()) == before
