"""The commands about evidence: inspect and build with flags, verify --deep, receipt, sign-model."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bundles
import private_sigstore as private
import pytest
import tiny_llama
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from staging_runs import build_tiny

from airgap import cli
from bundle.evidence.anchors import Anchors, Key
from bundle.staging.inspect import inspect_source
from bundle.staging.sign import read_draft, sign
from bundle.staging.upstream import Upstream, anchors_of, read_items
from bundle.trust import save_trust
from policy.errors import UsageError

KEY = private.new_key(ec.SECP384R1())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A snapshot with a signed checksum file, a publishers file, and a sealed bundle of it."""
    base = tmp_path_factory.mktemp("cli")
    folder = tiny_llama.write_snapshot(base / "model")
    digests = inspect_source(folder).digests
    sums = "".join(f"{each.sha256}  {name}\n" for name, each in digests.items()).encode()
    (base / "SHA256SUMS").write_bytes(sums)
    (base / "SHA256SUMS.sig").write_bytes(KEY.sign(sums, ec.ECDSA(hashes.SHA384())))
    (base / "pub.pem").write_bytes(private.public_pem(KEY))
    (base / "publishers.toml").write_text(
        'format = "airgap-anchors/1"\n[[key]]\nname = "lab"\nchannel = "a letter"\n'
        'file = "pub.pem"\n'
    )
    anchors = Anchors(
        keys=(Key(name="lab", channel="a letter", pem=private.public_pem(KEY).decode()),)
    )
    upstream = Upstream(read_items([("checksums", base / "SHA256SUMS")]), anchors)
    (base / "pins").write_bytes(sums)
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for name, each in digests.items():
        etag = each.sha256 if name.endswith(".safetensors") else each.git_blob
        (records / f"{name}.metadata").write_text(f"{'a' * 40}\n{etag}\n1.0\n")
    now = datetime.now(UTC).replace(microsecond=0)
    from dataclasses import replace

    from staging_runs import FACTS

    facts = replace(FACTS, created=now - timedelta(days=1), expires=now + timedelta(days=9))
    built = build_tiny(
        folder, base / "tiny.agb", upstream=upstream, facts=facts, pins=base / "pins"
    )
    for who in ("alice", "bob"):
        draft = read_draft(built.path)
        sign(draft, bundles.make_trust(), bundles.signer(who), confirmation="tiny", now=bundles.NOW)
    save_trust(bundles.make_trust(), base / "root" / "trust")
    return base


def run(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.invoke([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_inspect_takes_evidence_by_flags_and_by_a_file(made, capsys):
    flags = ("--checksums", made / "SHA256SUMS", "--json")
    status, out, _ = run(
        capsys, "inspect", made / "model", *flags,
        "--signer-key", made / "pub.pem", "--signer-channel", "a letter",
    )  # fmt: skip
    assert (status, json.loads(out)["provenance"]["level"]) == (0, "L2")
    status, out, _ = run(
        capsys, "inspect", made / "model", *flags, "--publishers", made / "publishers.toml"
    )
    assert (status, json.loads(out)["provenance"]["level"]) == (0, "L2")
    status, out, _ = run(capsys, "inspect", made / "model", *flags)
    document = json.loads(out)
    assert (status, document["code"]) == (1, "evidence.anchor")
    assert document["provenance"]["level"] == "L0"


def test_the_report_on_screen_keeps_verified_and_declared_apart(made, capsys):
    status, out, _ = run(
        capsys, "inspect", made / "model", "--checksums", made / "SHA256SUMS",
        "--publishers", made / "publishers.toml",
    )  # fmt: skip
    assert status == 0
    assert "verified" in out
    assert "checksum file signed (key) by lab" in " ".join(out.split())


@pytest.mark.parametrize(
    "options",
    [
        {"keys": [Path("k")]},
        {"authorities": [Path("k")]},
        {"identities": ["x"]},
        {"issuer": "x"},
        {"builder": "x"},
    ],
)
def test_options_that_need_each_other(options):
    with pytest.raises(UsageError):
        anchors_of(**options)


@pytest.mark.parametrize(
    "text",
    [
        "x = [",
        'format = "other"',
        '[[key]]\nname = "a"\nchannel = "b"\nfile = "publishers.bad"\n',
        '[[authority]]\nname="a"\nchannel="b"\nidentity="c"\npem="x"',
        "surprise = 1",
    ],
)
def test_a_bad_file_of_publishers_is_refused(made, capsys, text):
    (made / "publishers.bad").write_text(text)
    status, out, _ = run(
        capsys, "inspect", made / "model", "--publishers", made / "publishers.bad", "--json"
    )
    assert (status, json.loads(out)["code"]) == (1, "evidence.anchor")


def test_verify_deep_repeats_and_writes_a_summary(made, capsys, tmp_path):
    command = ("verify", made / "tiny.agb", "--root", made / "root", "--deep")
    status, out, err = run(capsys, *command, "--vsa", tmp_path / "vsa.json")
    assert status == 0, out + err
    assert "evidence, checked again" in out
    assert "L2" in out
    value = json.loads((tmp_path / "vsa.json").read_bytes())
    assert value["predicateType"] == "https://slsa.dev/verification_summary/v1"
    assert value["predicate"]["verifiedLevels"] == ["AIRGAP_PROVENANCE_L2"]
    status, out, _ = run(capsys, *command, "--publishers", made / "publishers.toml", "--json")
    deep = json.loads(out)["deep"]
    assert (status, deep["anchors"], deep["complete"]) == (0, "host", True)


def test_options_of_deep_need_deep(made, capsys):
    status, _, err = run(
        capsys, "verify", made / "tiny.agb", "--root", made / "root", "--vsa", made / "v"
    )
    assert status == 2
    assert "--deep" in err


def test_the_receipt_is_a_page_and_a_document(made, capsys, tmp_path):
    page = tmp_path / "receipt.html"
    command = ("receipt", made / "tiny.agb", "--root", made / "root")
    status, out, _ = run(capsys, *command, "--html", page, "--json")
    assert (status, json.loads(out)["models"][0]["provenance"]["level"]) == (0, "L2")
    assert page.read_text().startswith("<!doctype html>")
    broken = Path(shutil.copyfile(made / "tiny.agb", tmp_path / "x.agb"))
    raw = bytearray(broken.read_bytes())
    raw[-5000] ^= 1
    broken.write_bytes(raw)
    status, out, err = run(
        capsys, "receipt", broken, "--root", made / "root", "--html", tmp_path / "no.html"
    )
    assert status == 1
    assert "chunk.leaf" in out + err
    assert not (tmp_path / "no.html").exists(), "there is no receipt for a bad bundle"


def test_the_receipt_of_other_forms_of_a_bundle(made, capsys, tmp_path):
    words = ("--root", made / "root")
    full = made / "tiny.agb"
    assert run(capsys, "split", full, "--volume-size", "5MB", "--out", tmp_path / "set")[0] == 0
    assert run(capsys, "keys", "transit", "lab", "--out", tmp_path)[0] == 0
    public = tmp_path / "lab.transit.pub.json"
    assert run(capsys, "encrypt", full, "--to", public, "--out", tmp_path)[0] == 0
    private = ("--transit-key", tmp_path / "lab.transit.pem")
    want = json.loads(run(capsys, "receipt", full, *words, "--json")[1])
    for name, form, more in (
        ("set/tiny.agb.001", "volumes", ()),
        ("tiny.agb.enc", "file", private),
    ):
        status, out, _ = run(capsys, "receipt", tmp_path / name, *words, *more, "--json")
        found = json.loads(out)
        assert (status, found["medium"]["form"]) == (0, form)
        assert found["bundle"] == want["bundle"]
    assert run(capsys, "receipt", tmp_path / "tiny.agb.enc", *words)[0] == 1


def test_inspect_reads_the_attestations_of_a_bundle_back(made, capsys, tmp_path):
    status, out, _ = run(capsys, "inspect", made / "tiny.agb", "--json")
    document = json.loads(out)
    assert (status, document["verdict"]) == (0, "not verified")
    assert {item["path"].rpartition("/")[2] for item in document["attestations"]} == {
        "conversion.json",
        "parity.json",
        "scan.json",
        "summary.json",
    }
    assert "checksums-signature" in {item["kind"] for item in document["evidence"]}
    status, out, _ = run(capsys, "inspect", made / "tiny.agb")
    assert "NOT verified" in out
    other = Path(shutil.copyfile(made / "tiny.agb", tmp_path / "x.agb"))
    raw = other.read_bytes()
    other.write_bytes(raw.replace(b"AIRGAP_PROVENANCE_L2", b"AIRGAP_PROVENANCE_L4"))
    status, out, _ = run(capsys, "inspect", other, "--json")
    assert (status, json.loads(out)["code"]) == (1, "seal.subject")


def test_sign_model_and_unpickle_speak_plainly(made, capsys, tmp_path):
    (tmp_path / "key.pem").write_bytes(private.private_pem(KEY))
    (tmp_path / "key.pem").chmod(0o600)
    out_file = tmp_path / "model.sig"
    status, out, err = run(
        capsys, "sign-model", made / "model", "--key", tmp_path / "key.pem", "-o", out_file
    )
    assert status == 0, err
    assert "signed" in out
    assert out_file.exists()
    status, out, _ = run(capsys, "unpickle", made / "model", "-o", tmp_path / "new", "--json")
    assert (status, json.loads(out)["code"]) == (1, "source.incomplete")


def test_deep_refuses_pins_and_records_of_other_files(made):
    from bundle.evidence.deep import verify_deep
    from bundle.verify import open_bundle
    from policy.errors import RefusedError

    trust = bundles.make_trust()
    with open_bundle(made / "tiny.agb", trust, now=datetime.now(UTC)) as sealed:
        assert verify_deep(sealed.manifest, sealed.read).complete
        for path, edit in (
            ("META/evidence/pins.sha256", lambda raw: raw.split(b"\n", 1)[1]),
            (
                "META/evidence/hub/model.safetensors.metadata",
                lambda _: b"a\n" + b"0" * 64 + b"\n1.0\n",
            ),
        ):
            with pytest.raises(RefusedError) as caught:
                verify_deep(
                    sealed.manifest,
                    lambda asked, path=path, edit=edit: (
                        edit(sealed.read(asked)) if asked == path else sealed.read(asked)
                    ),
                )
            assert caught.value.code == "evidence.subject"
