"""Evidence inside a bundle: built twice, verified again on the lab side, summed up, on a page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import bundles
import private_sigstore as private
import pytest
import tiny_llama
from staging_runs import FACTS, build_tiny

from airgap.receipt import Receipt, receipt_page
from bundle.evidence.anchors import Anchors, Builder, Identity, Key
from bundle.evidence.deep import deep_lines, deep_summary, verify_deep
from bundle.evidence.summary import PATH as SUMMARY
from bundle.evidence.summary import require_summary
from bundle.manifest import parse_manifest
from bundle.media import open_medium
from bundle.staging.inspect import inspect_source
from bundle.staging.sign import read_draft, sign
from bundle.staging.upstream import Upstream, read_items
from bundle.verify import open_bundle, verify_contents
from policy.errors import AirgapError, FaultError, RefusedError

NOW = bundles.NOW + timedelta(days=1)
SIGSTORE = private.PrivateSigstore(bundles.NOW)
BUILDER, REPO = "https://build.lab.example/v1", "git+https://git.lab.example/model"
ANCHORS = Anchors(
    identities=(Identity(name="lab", identity=private.WHO, issuer=private.ISSUER),),
    builders=(Builder(id=BUILDER, source=REPO),),
    trusted_root=json.dumps(SIGSTORE.trusted_root()),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A snapshot with a model signature and build provenance, and the sealed bundle of it."""
    base = tmp_path_factory.mktemp("evidence")
    folder = tiny_llama.write_snapshot(base / "model")
    files = {n: d.sha256 for n, d in inspect_source(folder).digests.items()}
    (base / "model.sig").write_text(json.dumps(SIGSTORE.attest(private.oms_statement(files))))
    statement = private.slsa_statement(files, BUILDER, REPO)
    (base / "build.json").write_text(json.dumps(SIGSTORE.attest(statement)))
    items = read_items([("oms", base / "model.sig"), ("slsa", base / "build.json")])
    upstream = Upstream(items, ANCHORS)
    built = build_tiny(folder, base / "tiny.agb", upstream=upstream)
    for who in ("alice", "bob"):
        draft = read_draft(built.path)
        sign(draft, bundles.make_trust(), bundles.signer(who), confirmation="tiny", now=bundles.NOW)
    return built, folder, upstream


def opened(path: Path):
    return open_bundle(path, bundles.make_trust(), now=NOW)


def code(call, *args, **more) -> str:
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value.code


def test_the_level_is_proved_claimed_and_summed_up(made):
    built = made[0]
    assert built.manifest.models[0].provenance_level == "L4"
    kinds = [item.kind for item in built.manifest.evidence]
    assert kinds == ["source-digests", "oms", "slsa", "anchors"]
    with opened(built.path) as sealed:
        sealed.verify_body()
        verify_contents(sealed.manifest, sealed.view)
        summary = json.loads(sealed.read(SUMMARY))
    assert summary["predicate"]["verifiedLevels"] == ["AIRGAP_PROVENANCE_L4"]
    assert len(summary["subject"]) == len(list(made[1].iterdir()))


def test_building_twice_gives_the_same_manifest_and_body(made, tmp_path):
    built, folder, upstream = made
    again = build_tiny(folder, tmp_path / "again.agb", upstream=upstream)
    assert again.manifest == built.manifest
    bodies = []
    for path in (built.path, again.path):
        medium = open_medium(path)
        start = medium.head.body_start
        medium.close()
        bodies.append(path.read_bytes()[start:])
    assert bodies[0] == bodies[1], "only the envelope in the head differs"


def test_deep_repeats_everything_from_inside_the_bundle(made):
    with opened(made[0].path) as sealed:
        report = verify_deep(sealed.manifest, sealed.read)
        again = verify_deep(sealed.manifest, sealed.read, ANCHORS)
    assert (report.level, report.claimed, report.anchors) == ("L4", "L4", "sealed")
    assert again.anchors == "host"
    assert report.complete
    labels = [label for label, _ in deep_lines(report)]
    assert "verified" in labels
    assert "declared" in labels
    value = json.loads(deep_summary(sealed.manifest, report, now=NOW))
    assert value["subject"][0]["digest"]["sha256"] == sealed.manifest.digest.hex
    assert value["predicate"]["verificationResult"] == "PASSED"


def test_deep_believes_the_host_and_not_the_bundle(made):
    other = ANCHORS.model_copy(
        update={"identities": (Identity(name="x", identity="x@lab.example", issuer="y"),)}
    )
    with opened(made[0].path) as sealed:
        assert verify_deep(sealed.manifest, sealed.read, ANCHORS).level == "L4"
        assert code(verify_deep, sealed.manifest, sealed.read, other) == "evidence.identity"
        assert code(verify_deep, sealed.manifest, sealed.read, Anchors()) == "evidence.anchor"


def test_deep_without_sigstore_says_what_it_could_not_repeat(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "sigstore", None)
    monkeypatch.setitem(sys.modules, "sigstore.hashes", None)
    with opened(made[0].path) as sealed:
        report = verify_deep(sealed.manifest, sealed.read)
        assert not report.complete
        assert [name for name, _ in report.missing] == ["model.sig", "build.json"]
        with pytest.raises(FaultError) as caught:
            deep_summary(sealed.manifest, report, now=NOW)
    assert caught.value.code == "host.extra"


def changed(sealed, **edits):
    """Return a manifest with edits and a reader with replaced members, as a careless signer's."""
    value = json.loads(sealed.head.manifest)
    level = edits.pop("level", None)
    if level:
        value["models"][0]["provenance_level"] = level
    drop = edits.pop("drop", ())
    value["evidence"] = [item for item in value["evidence"] if item["kind"] not in drop]
    value["files"] = [item for item in value["files"] if item["path"] not in edits.get("gone", ())]
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return parse_manifest(raw)


def replaced(sealed, path: str, edit):
    content = json.dumps(
        edit(json.loads(sealed.read(path))), sort_keys=True, separators=(",", ":")
    ).encode()
    return lambda name: memoryview(content) if name == path else memoryview(sealed.read(name))


def test_an_inflated_level_is_refused_in_step_7_and_in_deep(made):
    with opened(made[0].path) as sealed:
        require_summary(sealed.view, sealed.manifest)
        lower = changed(sealed, level="L3")
        assert code(require_summary, sealed.view, lower) == "evidence.level"
        without = changed(sealed, drop=("slsa",))
        assert code(require_summary, sealed.view, without) == "evidence.summary"

        def claims(value):
            value["predicate"]["inputAttestations"] = [
                item
                for item in value["predicate"]["inputAttestations"]
                if "build.json" not in item["uri"]
            ]
            return value

        view = replaced(sealed, SUMMARY, claims)
        assert code(require_summary, view, without) == "evidence.level", "L4 without provenance"
        assert code(verify_deep, without, sealed.read) == "evidence.level"


SUMMARIES = {
    "no PASSED": (lambda v: v["predicate"].update(verificationResult="FAILED"), "evidence.summary"),
    "another level": (
        lambda v: v["predicate"].update(verifiedLevels=["AIRGAP_PROVENANCE_L9"]),
        "evidence.level",
    ),
    "another type": (lambda v: v.update(predicateType="x"), "evidence.summary"),
    "evidence left out": (
        lambda v: v["predicate"].update(inputAttestations=[]),
        "evidence.summary",
    ),
    "subjects left out": (lambda v: v.update(subject=[]), "evidence.subject"),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_that_contradicts_is_refused(made, name):
    edit, expected = SUMMARIES[name]
    with opened(made[0].path) as sealed:
        require_summary(sealed.view, sealed.manifest)
        view = replaced(sealed, SUMMARY, lambda value: edit(value) or value)
        assert code(require_summary, view, sealed.manifest) == expected


def test_a_release_that_claims_a_publisher_has_a_summary(made):
    with opened(made[0].path) as sealed:
        gone = changed(sealed, gone=(SUMMARY,))
        assert code(require_summary, sealed.view, gone) == "evidence.summary"


DEEP = {
    "a digest of the source": (
        "META/evidence/source.sha256",
        lambda raw: raw.replace(raw[:4], b"0000", 1),
        "evidence.summary",
    ),
    "an anchor": ("META/evidence/anchors.json", lambda raw: raw + b" ", "evidence.anchor"),
    "the signature": (
        "META/evidence/upstream/model.sig",
        lambda raw: raw.replace(b'"integratedTime": "1', b'"integratedTime": "2', 1),
        "evidence.signature",
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_refuses_evidence_that_does_not_fit(made, name):
    path, edit, expected = DEEP[name]
    with opened(made[0].path) as sealed:
        original = sealed.read
        assert verify_deep(sealed.manifest, original).complete
        assert edit(original(path)) != original(path)

        def read(asked: str) -> bytes:
            return edit(original(asked)) if asked == path else original(asked)

        assert code(verify_deep, sealed.manifest, read) == expected


def test_evidence_that_does_not_hold_stops_the_build(made, tmp_path):
    _, folder, upstream = made
    key = private.new_key()
    pem = private.public_pem(key).decode()
    other = replace(upstream, anchors=Anchors(keys=(Key(name="x", channel="y", pem=pem),)))
    with pytest.raises(RefusedError) as caught:
        build_tiny(folder, tmp_path / "x.agb", upstream=other, facts=FACTS)
    assert caught.value.code == "evidence.anchor"
    assert not (tmp_path / "x.agb").exists()


def test_the_receipt_keeps_verified_and_declared_apart(made):
    with opened(made[0].path) as sealed:
        sealed.verify_body()
        scan = verify_contents(sealed.manifest, sealed.view)
        receipt = Receipt.of(sealed, scan, now=NOW)
    facts = receipt.document
    assert [each["person"] for each in facts["approvers"]] == ["alice", "bob"]
    assert [each["provenance"]["level"] for each in facts["models"]] == ["L4"]
    assert {each["condition"] for each in facts["approvers"]} == {""}
    assert any("model signature (sigstore)" in text for text in facts["verified"])
    assert any(text.startswith("supplier:") for text in facts["declared"])
    assert not set(facts["verified"]) & set(facts["declared"])
    assert {item["path"].rpartition("/")[2] for item in facts["attestations"]} >= {
        "conversion.json",
        "parity.json",
        "scan.json",
        "summary.json",
    }
    assert facts["scanners"]
    page = receipt_page(receipt)
    assert "sealed and whole" in page
    assert "http-equiv" in page
    for foreign in ("<script", "<img", "src=", "<link"):
        assert foreign not in page
    assert json.loads(json.dumps(facts)) == facts
    assert dict(receipt.rows)["digest"] == str(made[0].manifest.digest)


def test_foreign_text_on_the_receipt_is_escaped(made):
    with opened(made[0].path) as sealed:
        scan = verify_contents(sealed.manifest, sealed.view)
        receipt = Receipt.of(sealed, scan, now=NOW)
    document = {**receipt.document, "findings": ["<b>bold</b>\u202e"]}
    page = receipt_page(Receipt(document))
    assert "&lt;b&gt;bold" in page
    assert "\u202e" not in page
