"""Our log against somebody else's reader, and against the vectors of the specifications.

`tlog-scales` (PyPI, Apache-2.0) is an independent C2SP implementation; coreutils check a leaf.
"""

import base64
import shutil
import subprocess

import audit_logs as logs
import pytest

from airgap.audit import parse_receipt
from airgap.audit.checkpoint import parse_checkpoint, parse_vkey
from airgap.audit.tiles import tile_name
from policy.errors import RefusedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c2sp")
    with logs.open_log(folder) as log:
        for _ in range(700):
            log._submit(logs.denial(), None, None)
        logs.keep(logs.infer(log), folder / "receipt.tlog-proof")
    return folder


def test_an_independent_reader_finds_our_tiles_heads_and_proofs_good(folder):
    scales = pytest.importorskip("tlog_scales", reason="tlog-scales is not installed")
    from tlog_scales import backend, reader, signing, tlog

    del scales
    note = (folder / "audit/log/checkpoint").read_text()
    head = tlog.Checkpoint.from_text(note)
    head.verify(signing.Vkey.from_string(str(logs.vkey())))
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever that library raises
        head.verify(signing.Vkey.from_string(str(logs.vkey(seed=9))))

    tiles = reader.TilesReader(backend.LocalBackend(folder / "audit/log"))
    tiles.set_size(head.size)
    assert head.size == len(logs.lines_of(folder)) > 512
    assert tiles.calculate_root_hash() == head.root_hash
    lines = logs.lines_of(folder)
    import hashlib

    for seq in (0, 255, 256, 500, head.size - 1):
        leaf = hashlib.sha256(b"\0" + lines[seq]).digest()
        tiles.get_inclusion_proof(seq, head.size).check(leaf, head.root_hash)

    receipt = parse_receipt((folder / "receipt.tlog-proof").read_bytes())
    old = tlog.Checkpoint.from_text(receipt.note)
    ours = tlog.InclusionProof(receipt.seq, receipt.size, list(receipt.proof))
    ours.check(receipt.leaf, old.root_hash)
    tiles.get_consistency_proof(old.size, head.size).check(old.root_hash, head.root_hash)


def test_coreutils_check_a_leaf(folder):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    receipt = parse_receipt((folder / "receipt.tlog-proof").read_bytes())
    number = receipt.seq + 1
    script = f"(printf '\\000'; sed -n {number}p \"$0\" | tr -d '\\n') | sha256sum"
    done = subprocess.run(
        ["sh", "-c", script, str(logs.segment(folder))], check=True, capture_output=True, text=True
    )
    assert done.stdout.split()[0] == receipt.leaf.hex()


def test_openssl_checks_a_head(folder, tmp_path):
    """The signature of a checkpoint, by a tool that knows nothing of us."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    note = (folder / "audit/log/checkpoint").read_text()
    text, signature = note.split("\n\n")
    (tmp_path / "text").write_text(text + "\n")
    (tmp_path / "sig").write_bytes(base64.b64decode(signature.split(" ")[2])[4:])
    raw = logs.vkey().public.public_bytes_raw()
    spki = bytes.fromhex("302a300506032b6570032100") + raw
    pem = base64.encodebytes(spki).decode()
    (tmp_path / "pub").write_text(f"-----BEGIN PUBLIC KEY-----\n{pem}-----END PUBLIC KEY-----\n")
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "pub", "-rawin"]
    files = ["-in", "text", "-sigfile", "sig"]
    done = subprocess.run([*verify, *files], check=False, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "text").write_text(text.replace("\n7", "\n8", 1) + "\n")
    assert subprocess.run(
        [*verify, *files], check=False, capture_output=True, cwd=tmp_path
    ).returncode


def test_the_checkpoint_of_the_specification_parses():
    """Source: C2SP tlog-checkpoint.md, its example."""
    note = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "\u2014 example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7"
        "u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    )
    found = parse_checkpoint(note.encode())
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20_852_163)
    assert found.signatures[0][1][:4].hex() == "033de0ae"


def test_the_go_vkey_of_the_checksum_database_parses():
    """Source: golang.org/x/mod, the key of sum.golang.org (type 0x01, Ed25519)."""
    text = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
    assert str(parse_vkey(text.encode())) == text
    with pytest.raises(RefusedError):
        parse_vkey(text.replace("033de0ae", "033de0af").encode())


@pytest.mark.parametrize(
    ("note", "why"),
    [
        ("a\n1\n{root}\nextension\n\n{sig}", "lines"),
        ("a\n01\n{root}\n\n{sig}", "size"),
        ("a\n1\n{root}\n{sig}", "expected"),
        ("a b\n1\n{root}\n\n{sig}", "origin"),
        ("a+b\n1\n{root}\n\n{sig}", "origin"),
        ("a\n1\nAAAA\n\n{sig}", "root"),
        ("a\n1\n{root}\n\n{sig}\u2014 a AAAA\n", "short"),
        ("a\n1\n{root}\n\n- a AAAAAAAA\n", "signature"),
        ("a\n1\n{root}\n\n{sig}" + "{sig}" * 24, "expected"),
        ("a\r\n1\n{root}\n\n{sig}", "control"),
    ],
)
def test_a_malformed_checkpoint_is_refused(note, why):
    parts = {
        "root": base64.b64encode(b"\1" * 32).decode(),
        "sig": f"\u2014 a {base64.b64encode(b'12345').decode()}\n",
    }
    parse_checkpoint("a\n1\n{root}\n\n{sig}".format(**parts).encode())
    with pytest.raises(RefusedError, match=why):
        parse_checkpoint(note.format(**parts).encode())


def test_tile_names_are_those_of_tlog_tiles():
    """Source: C2SP tlog-tiles.md."""
    assert tile_name(0, 1_234_067) == "0/x001/x234/067"
    assert tile_name(1, 5, 112) == "1/005.p/112"
