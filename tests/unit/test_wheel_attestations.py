"""Attestations of wheels (PEP 740): verified under pinned identities, or refused, never guessed."""

import datetime as dt
import json

import pytest
import wheel_index
from private_sigstore import ISSUER, WHO, PrivateSigstore

from bundle.evidence.anchors import Anchors, Identity
from bundle.staging.wheel_attestations import Attestations
from bundle.staging.wheelhouse import Wheel, collect, parse_target
from policy.errors import RefusedError

pytest.importorskip("sigstore")

NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)
SIGSTORE = PrivateSigstore(NOW)
WHOM = Identity(name="publisher", identity=WHO, issuer=ISSUER)
ANCHORS = Anchors(identities=(WHOM,), trusted_root=json.dumps(SIGSTORE.trusted_root()))


@pytest.fixture
def wheel(tmp_path):
    path = wheel_index.make_wheel(tmp_path, "pydantic", "2.14.3")
    return Wheel(path, "pydantic", "2.14.3", wheel_index.sha256(path), "MIT", ())


def statement(wheel, **changes):
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": wheel.path.name, "digest": {"sha256": wheel.sha256}}],
        "predicateType": "https://publish.example/v1",
        "predicate": None,
        **changes,
    }


def document(bundle):
    """Put a Sigstore bundle into the form in which an index serves it."""
    material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
    return {
        "version": 1,
        "attestation_bundles": [
            {
                "publisher": {"kind": "example"},
                "attestations": [
                    {
                        "version": 1,
                        "verification_material": {
                            "certificate": material["certificate"]["rawBytes"],
                            "transparency_entries": material["tlogEntries"],
                        },
                        "envelope": {
                            "statement": envelope["payload"],
                            "signature": envelope["signatures"][0]["sig"],
                        },
                    }
                ],
            }
        ],
    }


def put(wheel, value):
    place = wheel.path.with_name(f"{wheel.path.name}.provenance")
    place.write_text(json.dumps(value))
    return place


def refused(code, wheel, anchors=ANCHORS):
    with pytest.raises(RefusedError) as caught:
        Attestations(wheel.path.parent, anchors)(wheel)
    assert caught.value.code == code, caught.value.message


def test_a_publisher_that_is_pinned_is_proved_and_its_document_is_kept(wheel):
    attest = Attestations(wheel.path.parent, ANCHORS)
    assert attest(wheel).words == "absent"
    place = put(wheel, document(SIGSTORE.attest(statement(wheel))))
    proved = attest(wheel)
    assert proved.words == f"published by {WHO} ({ISSUER})"
    assert proved.document == place.read_bytes()


def test_who_is_not_pinned_proves_nothing(wheel):
    put(wheel, document(SIGSTORE.attest(statement(wheel))))
    other = Identity(name="other", identity="other@lab.example", issuer=ISSUER)
    refused("evidence.signature", wheel, ANCHORS.model_copy(update={"identities": (other,)}))
    refused("evidence.anchor", wheel, Anchors())


WRONG = {
    "another file": {"subject": [{"name": "x.whl", "digest": {"sha256": "0" * 64}}]},
    "no subject": {"subject": []},
    "another type": {"_type": "https://in-toto.io/Statement/v0.1"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_a_statement_about_something_else_is_refused(wheel, changes):
    put(wheel, document(SIGSTORE.attest(statement(wheel, **changes))))
    refused("evidence.subject", wheel)


def test_a_changed_document_is_refused(wheel):
    good = document(SIGSTORE.attest(statement(wheel)))
    other = document(SIGSTORE.attest(statement(wheel, predicate={})))
    mixed = json.loads(json.dumps(good))
    inside = mixed["attestation_bundles"][0]["attestations"][0]
    inside["envelope"] = other["attestation_bundles"][0]["attestations"][0]["envelope"]
    put(wheel, mixed)
    refused("evidence.signature", wheel)
    del inside["envelope"]["signature"]
    put(wheel, mixed)
    refused("evidence.malformed", wheel)
    for broken in ({"version": 2}, {"version": 1, "attestation_bundles": []}, {"version": 1}):
        put(wheel, broken)
        refused("evidence.malformed", wheel)


def test_the_wheelhouse_carries_documents_and_words(tmp_path):
    index, work = tmp_path / "index", tmp_path / "work"
    wheel_index.make_index(index)
    work.mkdir()
    own = wheel_index.make_own(tmp_path)
    path = index / "pydantic-2.14.3-py3-none-any.whl"
    wheel = Wheel(path, "pydantic", "2.14.3", wheel_index.sha256(path), "MIT", ())
    place = put(wheel, document(SIGSTORE.attest(statement(wheel))))
    house = collect(
        [parse_target("linux-x86_64-cp311")],
        "cpu",
        work,
        own=own,
        pip=wheel_index.OnePip(index),
        attest=Attestations(index, ANCHORS),
    )
    found = {each.name: each.attestation for each in house.wheels}
    assert found["pydantic"].startswith("published by")
    assert found["numpy"] == "absent"
    kept = next(m for m in house.members if m.path.endswith(".provenance"))
    assert kept.source == place.read_bytes()
    assert kept.path.startswith("META/attest/wheels/")
