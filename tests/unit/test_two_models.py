"""A release with two models: each is judged by its own evidence, and pages say which is which."""

import json

import bundles
import pytest

from airgap.receipt import Receipt, receipt_page
from bundle.canonical import canonical_json
from bundle.evidence.deep import deep_lines, deep_summary, verify_deep
from bundle.evidence.summary import PATH as SUMMARY
from bundle.evidence.summary import require_summary, statement
from bundle.manifest import Evidence, ModelEntry, Parity
from bundle.scan.bom import PATH as BOM
from bundle.vectors import Vector, Vectors, canonical_vectors
from bundle.verify import open_bundle, verify_contents
from bundle.write import Member
from policy.errors import AirgapError

NOW = bundles.NOW
NAMES = ("tiny", "other")
SEEDS = {"tiny": 0, "other": 9}


def sources(name, **more):
    """The lines of the digests of a model's source: a weight file and a config."""
    files = {"model.safetensors": name[0] * 64, "config.json": "c" * 64, **more}
    files = {k: f"{sum(map(ord, v + name)):064x}" for k, v in files.items()}
    return files, "".join(f"{sha}  {file}\n" for file, sha in sorted(files.items())).encode()


def evidence(kind, path, raw, subject):
    return Evidence(
        kind=kind, path=path, sha256=bundles.sha_of(raw), subject=subject, summary=f"{kind} here"
    )


def make(path, *, about="tiny", levels=("L1", "L1"), pinned=NAMES, spoil=None, more=(), parity=()):
    """Write a sealed release of two models, each with digests of its source and perhaps pins."""
    payload, evidences, extra = [], [], []
    for name in NAMES:
        files, listed = sources(name)
        weights = bundles.make_weights(seed=SEEDS[name])
        derived = (f"sha256:{files['model.safetensors']}",)
        for file, (role, content) in bundles.make_payload(weights, name).items():
            given = derived if role == "external-data" else ()
            payload.append(Member(f"payload/{name}/{file}", content, role, derived_from=given))
        place = f"META/evidence/{name}/source.sha256"
        documents = [("source-digests", place, listed)]
        if name in pinned:
            documents.append(("pins", f"META/evidence/{name}/pins.sha256", listed))
        if spoil is not None:
            documents = spoil(name, documents)
        for kind, at, raw in documents:
            extra.append(Member(at, raw, "evidence", "text/plain"))
            evidences.append(evidence(kind, at, raw, name))
    files, _ = sources(about)
    roles = {"model.safetensors": "weights", "config.json": "config"}
    report = {
        "model": about,
        "files": [{"path": p, "sha256": d, "role": roles[p]} for p, d in files.items()],
        "findings": [],
    }
    members = [
        *payload,
        Member(BOM, bundles.make_bom(payload), "sbom", "application/json"),
        Member("META/report.json", canonical_json(report), "report", "application/json"),
        *extra,
        *more,
    ]
    models = tuple(
        ModelEntry.model_validate_json(
            json.dumps({**bundles.MODEL_FACTS, "id": name, "provenance_level": level,
                        "supplier": {"legal_name": f"lab of {name}", "jurisdiction": "none",
                                     "status": "declared"}})
        )
        for name, level in zip(NAMES, levels, strict=True)
    )  # fmt: skip
    release = {"models": models, "evidence": tuple(evidences), "parity": parity}
    bundles.make_bundle(path, members=members, **release)
    return path


def deep(path):
    with open_bundle(path, bundles.make_trust(), now=NOW) as sealed:
        return sealed.manifest, verify_deep(sealed.manifest, sealed.read)


def code(path):
    with pytest.raises(AirgapError) as caught:
        deep(path)
    return caught.value.code


def test_each_model_is_judged_by_its_own_evidence(tmp_path):
    manifest, report = deep(make(tmp_path / "x.agb"))
    assert (report.level, report.claimed) == ("L1", "L1")
    assert report.complete
    said = [text for label, text in deep_lines(report) if label == "verified"]
    for name in NAMES:
        assert f"{name}: SHA-256 of 2 files of the source, as sealed" in said
        assert f"{name}: the pin file of the institution names exactly these files" in said
    summed = json.loads(deep_summary(manifest, report, now=NOW))
    assert summed["predicate"]["verifiedLevels"] == ["AIRGAP_PROVENANCE_L1"]
    assert len(summed["predicate"]["inputAttestations"]) == 4
    # the report may be about the other one
    assert deep(make(tmp_path / "y.agb", about="other"))[1].level == "L1"


def test_the_pins_of_one_model_lift_no_other(tmp_path):
    """The level of the release is the lowest; a claim above what a model proves is refused."""
    report = deep(make(tmp_path / "x.agb", levels=("L1", "L0"), pinned=("tiny",)))[1]
    assert (report.level, report.claimed) == ("L0", "L0")
    assert code(make(tmp_path / "y.agb", pinned=("tiny",))) == "evidence.level"


def swapped(name, documents):
    """Each model shows the digests of the other one's source."""
    raw = sources("other" if name == "tiny" else "tiny")[1]
    return [(kind, at, raw) for kind, at, _ in documents]


def other_pins(name, documents):
    raw = sources("other" if name == "tiny" else "tiny")[1]
    return [(kind, at, raw if kind == "pins" else listed) for kind, at, listed in documents]


SPOILT = {
    "sources swapped": (swapped, "evidence.summary"),
    "pins of the other one": (other_pins, "evidence.subject"),
    "one without digests": (
        lambda name, found: found if name == "tiny" else [f for f in found if f[0] == "pins"],
        "evidence.summary",
    ),
    "one whose weights come from elsewhere": (
        lambda name, found: found
        if name == "tiny"
        else [(kind, at, sources(name, **{"model.safetensors": "z" * 64})[1])
              for kind, at, _ in found],
        "evidence.subject",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), SPOILT.values(), ids=SPOILT.keys())
def test_evidence_of_another_model_is_refused(tmp_path, spoil, expected):
    deep(make(tmp_path / "good.agb"))
    assert code(make(tmp_path / "x.agb", spoil=spoil)) == expected


def test_a_high_claim_beside_a_low_one_needs_evidence_of_its_own(tmp_path):
    """The summary names the lowest level; what the other model claims is checked all the same."""

    def judged(path, kinds, owner):
        files = {
            name: digest
            for each in NAMES
            for name, digest in ((f"{each}/{k}", v) for k, v in sources(each)[0].items())
        }
        files |= {
            f"payload/{each}/{file}": bundles.sha_of(content)
            for each in NAMES
            for file, (_, content) in bundles.make_payload(
                bundles.make_weights(seed=SEEDS[each]), each
            ).items()
        }
        given = []

        def spoil(name, documents):
            found = [
                *documents,
                *((k, f"META/evidence/{name}/{k}", b"{}") for k in kinds if name == owner),
            ]
            given.extend((at, bundles.sha_of(raw)) for _, at, raw in found)
            return found

        make(path.with_suffix(".first"), levels=("L1", "L3"), spoil=spoil)
        raw = statement(
            resource="tiny-line@1.0",
            subjects=files,
            inputs=dict(given),
            level="L1",
            moment=bundles.CREATED,
            policy=["0" * 64],
        )
        summary = Member(SUMMARY, raw, "attestation", "application/json")
        make(path, levels=("L1", "L3"), spoil=spoil, more=(summary,))
        with open_bundle(path, bundles.make_trust(), now=NOW) as sealed:
            require_summary(sealed.view, sealed.manifest)

    judged(tmp_path / "good.agb", ("oms",), "other")
    for number, (kinds, owner) in enumerate([((), ""), (("oms",), "tiny")]):
        with pytest.raises(AirgapError, match="other claims L3") as caught:
            judged(tmp_path / f"{number}.agb", kinds, owner)
        assert caught.value.code == "evidence.level"


def test_the_receipt_names_the_model_of_each_fact(tmp_path):
    path = tmp_path / "x.agb"
    stated = {"precision": "fp32", "provider": "CPUExecutionProvider", "tolerance": "0.001"}
    claims, vectors = [], []
    for name in NAMES:
        one = Vector(kind="molecule", prompt="C", source="here", prompt_ids=(6,), greedy_ids=(7,),
                     top_logits=((7, "1.5"),))  # fmt: skip
        found = Vectors(model=name, steps=1, credits=(), vectors=(one,), **stated)
        member = Member(f"META/vectors/{name}.json", canonical_vectors(found), "vectors")
        vectors.append(member)
        claims.append(Parity(model=name, vectors=member.path, **stated))
    make(path, more=tuple(vectors), parity=tuple(claims))
    with open_bundle(path, bundles.make_trust(), now=NOW) as sealed:
        sealed.verify_body()
        receipt = Receipt.of(sealed, verify_contents(sealed.manifest, sealed.view), now=NOW)
    facts = receipt.document
    assert [each["id"] for each in facts["models"]] == list(NAMES)
    for name in NAMES:
        assert f"{name}: supplier: lab of {name} (none)" in facts["declared"]
        (found,) = [t for t in facts["verified"] if t.startswith(f"{name}: the graph of fp32")]
        assert "answers like the published weights" in found
    page = receipt_page(receipt)
    assert all(f"lab of {name}" in page for name in NAMES)
