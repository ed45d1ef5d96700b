"""`docs/bare-check.sh`: a bundle is checked with tar, sha256sum and openssl alone."""

import shutil
import subprocess
from pathlib import Path

import bundles
import pytest

from bundle import archive, envelope, keys
from bundle.source import PlainFile
from bundle.statement import PAYLOAD_TYPE

SCRIPT = Path(__file__).parents[2] / "docs/bare-check.sh"
TOOLS = (
    "sh tar sha256sum openssl sed base64 cut cmp grep head gzip find mktemp tr wc basename cat rm "
    "ls chmod"
)

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS.split()), reason="openssl or tar is missing"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    bundles.make_bundle(folder / "good.agb")
    (folder / "keys").mkdir()
    for name in ("alice", "bob"):
        (folder / "keys" / f"{name}.pem").write_bytes(bundles.signer(name).public_key.pem)
    # nothing else than these tools can be found
    (folder / "bin").mkdir()
    for tool in TOOLS.split():
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    return folder


def check(place, bundle, tmp_path, *, keyring="keys", needed=2):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        ["sh", SCRIPT, bundle, place / keyring, str(needed), out],
        env={"PATH": str(place / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, sorted(path for path in out.rglob("*") if path.is_file())


def refused(done, found, text):
    assert done.returncode == 1, done.stdout
    assert text in done.stderr
    assert found == []


def test_a_good_bundle_passes_and_lies_there(place, tmp_path):
    done, found = check(place, place / "good.agb", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["signed by alice", "signed by bob"]
    names = {path.name for path in found}
    assert {"manifest.json", "SHA256SUMS", "model.onnx", "model.onnx_data"} <= names


def test_any_altered_byte_of_the_payload_is_noticed(place, tmp_path):
    good = (place / "good.agb").read_bytes()
    with (place / "good.agb").open("rb"):
        source = PlainFile(place / "good.agb")
        start = archive.read_head(source).body_start
        source.close()
    for number, at in enumerate((len(good) // 2, len(good) - 70_000)):
        assert at > start
        raw = bytearray(good)
        raw[at] ^= 1
        bad = tmp_path / f"bad{number}.agb"
        bad.write_bytes(raw)
        done, found = check(place, bad, tmp_path)
        refused(done, found, "REFUSED")


def rewritten(place, tmp_path, change):
    """Return the bundle with another envelope."""
    good = (place / "good.agb").read_bytes()
    at = 512
    made = change(envelope.parse_envelope(good[at : at + envelope.ENVELOPE_SIZE]))
    bad = tmp_path / "bad.agb"
    bad.write_bytes(good[:at] + made.to_padded() + good[at + envelope.ENVELOPE_SIZE :])
    return bad


def test_the_same_envelope_written_again_passes(place, tmp_path):
    done, _ = check(place, rewritten(place, tmp_path, lambda e: e), tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_altered_signature_or_payload_is_none(place, tmp_path):
    def flip(made):
        alice = bundles.signer("alice").public_key.keyid
        changed = tuple(
            envelope.Signature(s.keyid, bytes([s.sig[0] ^ 1]) + s.sig[1:])
            if s.keyid == alice
            else s
            for s in made.signatures
        )
        return envelope.Envelope(made.payload, made.payload_type, changed)

    def edit(made):
        return envelope.Envelope(
            made.payload.replace(b'"epoch":1', b'"epoch":2'), made.payload_type, made.signatures
        )

    def strip(made):
        return envelope.Envelope(made.payload, made.payload_type, ())

    for change, text in (
        (flip, "1 of 2 signatures"),
        (edit, "0 of 2 signatures"),
        (strip, "0 of 2 signatures"),
    ):
        done, found = check(place, rewritten(place, tmp_path, change), tmp_path)
        refused(done, found, text)


def test_the_wrong_key_counts_for_nothing(place, tmp_path):
    other = place / "others"
    other.mkdir(exist_ok=True)
    (other / "alice.pem").write_bytes(bundles.signer("alice").public_key.pem)
    (other / "mallory.pem").write_bytes(bundles.signer("mallory").public_key.pem)
    done, found = check(place, place / "good.agb", tmp_path, keyring="others")
    refused(done, found, "1 of 2 signatures")


def test_a_signed_statement_of_another_kind_is_no_seal(place, tmp_path):
    def other(made):
        payload = made.payload.replace(b"airgap.invalid/seal/v1", b"airgap.invalid/override/v1")
        return envelope.sign_statement(
            payload, PAYLOAD_TYPE, bundles.signer("alice"), bundles.signer("bob")
        )

    done, found = check(place, rewritten(place, tmp_path, other), tmp_path)
    refused(done, found, "no seal")


def test_another_manifest_and_appended_members_are_refused(place, tmp_path):
    import tarfile

    bundles.make_bundle(tmp_path / "other.agb", version="9.9")
    theirs = (tmp_path / "other.agb").read_bytes()
    good = (place / "good.agb").read_bytes()
    at = 512 + envelope.ENVELOPE_SIZE
    (tmp_path / "swap.agb").write_bytes(good[:at] + theirs[at:])
    done, found = check(place, tmp_path / "swap.agb", tmp_path)
    refused(done, found, "manifest is not the signed one")

    shutil.copy(place / "good.agb", tmp_path / "more.agb")
    with tarfile.open(tmp_path / "more.agb", "a") as tar:
        link = tarfile.TarInfo("payload/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    done, found = check(place, tmp_path / "more.agb", tmp_path)
    refused(done, found, "other members")


def test_a_compressed_bundle_is_not_unpacked(place, tmp_path):
    """tar would start a decompressor on bytes that nobody has checked."""
    import gzip

    (tmp_path / "small.agb").write_bytes(gzip.compress((place / "good.agb").read_bytes()))
    done, found = check(place, tmp_path / "small.agb", tmp_path)
    refused(done, found, "is no bundle")


def test_a_name_with_a_colon_is_a_file_and_no_host(place, tmp_path):
    shutil.copy(place / "good.agb", tmp_path / "host:good.agb")
    done, found = check(place, tmp_path / "host:good.agb", tmp_path)
    assert done.returncode == 0, done.stderr
    assert found


def test_a_medium_that_changes_its_mind_is_noticed(place, tmp_path):
    """The list that counts is the checked one, not what a second reading of the medium gives."""
    tools = tmp_path / "bin"
    shutil.copytree(place / "bin", tools, symlinks=True)
    (tools / "tar").unlink()
    (tools / "tar").write_text(
        f"""#!/bin/sh
{shutil.which("tar")} "$@" || exit 1
for last; do :; done
case "$*" in *" -xf "*) chmod -R u+w {tmp_path}/out
  printf evil > "$(find {tmp_path}/out/payload -type f | head -n 1)"
  cd {tmp_path}/out && sed 's/.*  //' META/SHA256SUMS > {tmp_path}/names
  tr '\\n' '\\0' < {tmp_path}/names | {shutil.which("xargs")} -0 sha256sum > {tmp_path}/new
  cat {tmp_path}/new > META/SHA256SUMS ;;
esac
"""
    )
    (tools / "tar").chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        ["sh", SCRIPT, place / "good.agb", place / "keys", "2", out],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not the listed one" in done.stderr
    assert list(out.iterdir()) == []


def test_p384_keys_are_checked_too(place, tmp_path):
    signers = [keys.FileSigner(keys._generate(keys.P384)) for _ in range(2)]
    keyring = place / "p384"
    keyring.mkdir(exist_ok=True)
    for number, signer in enumerate(signers):
        (keyring / f"{number}.pem").write_bytes(signer.public_key.pem)
    bad = rewritten(
        place, tmp_path, lambda e: envelope.sign_statement(e.payload, PAYLOAD_TYPE, *signers)
    )
    done, _ = check(place, bad, tmp_path, keyring="p384")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_not_empty_is_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    done, found = check(place, place / "good.agb", tmp_path)
    assert done.returncode == 1
    assert [path.name for path in found] == ["mine"]
