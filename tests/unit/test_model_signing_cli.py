"""The `model_signing` tool and we agree: its signatures are accepted, ours pass it. No network.

Every run of the tool happens in a network namespace of its own, without a route.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import private_sigstore as private
import pytest
import tiny_llama
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from bundle import keys
from bundle.evidence.anchors import Anchors, Authority, Identity, Key
from bundle.staging.inspect import inspect_source
from bundle.staging.model_signature import write_signature
from bundle.staging.upstream import Upstream, read_items
from policy.errors import RefusedError

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
TOOL = Path(sys.executable).with_name("model_signing")


@pytest.fixture(scope="module", autouse=True)
def _namespace():
    if not TOOL.exists():
        pytest.skip("the model_signing tool is not installed (extra `staging`)")
    if shutil.which("unshare") is None or subprocess.call(["unshare", "-rn", "true"]):
        pytest.skip("this host lets no user make a network namespace (unshare -rn)")


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    argv = ["unshare", "-rn", TOOL, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def snapshot(folder: Path) -> Path:
    return tiny_llama.write_snapshot(folder)


def inspected(folder: Path, signature: Path, anchors: Anchors):
    upstream = Upstream(read_items([("oms", signature)]), anchors, NOW)
    return inspect_source(folder, upstream=upstream)


def test_a_model_that_the_tool_signed_with_a_key_is_accepted(tmp_path):
    folder, key = snapshot(tmp_path / "model"), private.new_key(ec.SECP384R1())
    (tmp_path / "key.pem").write_bytes(private.private_pem(key))
    signature = folder / "model.sig"  # where the tool puts it by default: in the folder itself
    done = tool(
        "sign", "key", folder, "--private_key", tmp_path / "key.pem", "--signature", signature
    )
    assert done.returncode == 0, done.stderr
    pem = private.public_pem(key).decode()
    anchors = Anchors(keys=(Key(name="lab", channel="a letter", pem=pem),))
    report = inspected(folder, signature, anchors)
    assert report.ready, report.refusals
    assert report.provenance["level"] == "L2"
    assert "a letter" in report.provenance["evidence"][0]["text"]

    (folder / "extra.md").write_text("nobody signed this\n")
    assert [e.code for e in inspected(folder, signature, anchors).refusals] == ["evidence.oms"]


def test_what_the_tool_would_pass_over_is_refused_here(tmp_path):
    folder, key = snapshot(tmp_path / "model"), private.new_key()
    (tmp_path / "key.pem").write_bytes(private.private_pem(key))
    (tmp_path / "pub.pem").write_bytes(private.public_pem(key))
    (folder / ".gitattributes").write_text("* text\n")
    signature = tmp_path / "model.sig"
    done = tool(
        "sign", "key", folder, "--private_key", tmp_path / "key.pem", "--signature", signature
    )
    assert done.returncode == 0, done.stderr
    (folder / ".gitattributes").write_text("changed after it was signed\n")
    verify = (
        "verify",
        "key",
        folder,
        "--public_key",
        tmp_path / "pub.pem",
        "--signature",
        signature,
    )
    assert tool(*verify).returncode == 0, "the tool leaves it out"
    anchors = Anchors(keys=(Key(name="lab", channel="x", pem=private.public_pem(key).decode()),))
    assert [e.code for e in inspected(folder, signature, anchors).refusals] == ["evidence.oms"]
    (folder / ".gitattributes").unlink()
    assert inspected(folder, signature, anchors).provenance["level"] == "L2"


def test_a_model_that_the_tool_signed_with_a_certificate_is_accepted_while_it_is_valid(tmp_path):
    folder, key, ca = snapshot(tmp_path / "model"), private.new_key(), private.new_key()
    day = dt.timedelta(days=1)
    root = private.make_ca(ca, "inst-ca", start=NOW - day, end=NOW + 9 * day)
    leaf = private.make_leaf(key, ca, "inst-ca", private.WHO, start=NOW - day, end=NOW + 2 * day)
    for name, content in (
        ("key.pem", private.private_pem(key)),
        ("leaf.pem", leaf.public_bytes(Encoding.PEM)),
        ("ca.pem", root.public_bytes(Encoding.PEM)),
    ):
        (tmp_path / name).write_bytes(content)
    signature = tmp_path / "model.sig"
    done = tool(
        *("sign", "certificate", folder, "--signature", signature),
        *("--private_key", tmp_path / "key.pem", "--signing_certificate", tmp_path / "leaf.pem"),
        *("--certificate_chain", tmp_path / "ca.pem"),
    )
    assert done.returncode == 0, done.stderr
    pem = (tmp_path / "ca.pem").read_text()
    anchors = Anchors(
        authorities=(Authority(name="inst", channel="x", identity=private.WHO, pem=pem),)
    )
    assert inspected(folder, signature, anchors).provenance["level"] == "L2"
    late = Upstream(read_items([("oms", signature)]), anchors, NOW + 5 * day)
    refusals = inspect_source(folder, upstream=late).refusals
    assert [error.code for error in refusals] == ["evidence.signature"]


@pytest.mark.parametrize("inside", [True, False])
def test_our_model_signature_passes_the_tool(tmp_path, inside):
    folder = snapshot(tmp_path / "model")
    signer = keys.FileSigner(private.new_key(ec.SECP384R1()))
    (tmp_path / "pub.pem").write_bytes(signer.public_key.pem)
    out = (folder if inside else tmp_path) / "model.sig"
    assert write_signature(folder, out, signer) == len(list(folder.iterdir())) - inside
    verify = ("verify", "key", folder, "--public_key", tmp_path / "pub.pem", "--signature", out)
    done = tool(*verify)
    assert done.returncode == 0, done.stdout + done.stderr

    target = folder / "config.json"
    target.write_bytes(target.read_bytes() + b" ")
    assert tool(*verify).returncode != 0, "and it notices a change"


def test_our_model_signature_is_accepted_by_ourselves(tmp_path):
    folder = snapshot(tmp_path / "model")
    signer = keys.FileSigner(private.new_key(ec.SECP384R1()))
    write_signature(folder, tmp_path / "model.sig", signer)
    anchors = Anchors(keys=(Key(name="us", channel="x", pem=signer.public_key.pem.decode()),))
    assert inspected(folder, tmp_path / "model.sig", anchors).provenance["level"] == "L2"


def test_a_key_that_the_tool_does_not_know_is_refused_in_words(tmp_path):
    folder = snapshot(tmp_path / "model")
    with pytest.raises(RefusedError) as caught:
        write_signature(folder, tmp_path / "model.sig", bundles.signer("builder"))
    assert caught.value.code == "seal.algorithm"
    assert not (tmp_path / "model.sig").exists()


def test_a_private_sigstore_is_believed_by_the_tool_and_by_us_alike(tmp_path):
    folder = snapshot(tmp_path / "model")
    lab = private.PrivateSigstore(NOW)
    files = {name: each.sha256 for name, each in inspect_source(folder).digests.items()}
    signature = tmp_path / "model.sig"
    signature.write_text(json.dumps(lab.attest(private.oms_statement(files))))
    (tmp_path / "config.json").write_text(json.dumps(lab.trust_config()))
    verify = (
        *("verify", "sigstore", folder, "--signature", signature),
        *("--trust_config", tmp_path / "config.json", "--identity_provider", private.ISSUER),
    )
    done = tool(*verify, "--identity", private.WHO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tool(*verify, "--identity", "x@lab.example").returncode != 0
    anchors = Anchors(
        identities=(Identity(name="lab", identity=private.WHO, issuer=private.ISSUER),),
        trusted_root=json.dumps(lab.trusted_root()),
    )
    assert inspected(folder, signature, anchors).provenance["level"] == "L3"
