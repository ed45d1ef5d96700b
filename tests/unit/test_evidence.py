"""Evidence of publishers: what is accepted, at which level, and what is refused by which code."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime as dt
import hashlib
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from private_sigstore import (
    ISSUER,
    WHO,
    PrivateSigstore,
    common_name,
    envelope_by,
    key_usage,
    make_ca,
    make_leaf,
    new_key,
    oms_statement,
    public_pem,
    slsa_statement,
)

from bundle.evidence.anchors import Anchors, Authority, Builder, Identity, Key, parse_anchors
from bundle.evidence.levels import Item, Source, check, level_of, uncovered
from policy.errors import AirgapError, RefusedError

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
DAY = dt.timedelta(days=1)
FILES = {
    name: hashlib.sha256(name.encode()).hexdigest()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.md")
}
NEEDED = frozenset(["config.json", "tokenizer.json", "model.safetensors"])
SOURCE = Source(FILES, NEEDED, frozenset(["model.safetensors"]))
BUILDER, REPO = "https://build.lab.example/v1", "git+https://git.lab.example/model"

KEY = new_key(ec.SECP384R1())
PUBLISHER = Key(name="lab", channel="read over the telephone", pem=public_pem(KEY).decode())
CA = new_key()
ROOT = make_ca(CA, "inst-ca", start=NOW - 100 * DAY, end=NOW + 100 * DAY)
AUTHORITY = Authority(
    name="inst-ca",
    channel="printed",
    identity=WHO,
    pem=ROOT.public_bytes(Encoding.PEM).decode(),
)
SIGSTORE = PrivateSigstore(NOW)
ANCHORS = Anchors(
    keys=(PUBLISHER,),
    authorities=(AUTHORITY,),
    identities=(Identity(name="lab", identity=WHO, issuer=ISSUER),),
    builders=(Builder(id=BUILDER, source=REPO),),
    trusted_root=json.dumps(SIGSTORE.trusted_root()),
)


def dump(value) -> bytes:
    return json.dumps(value).encode()


def key_bundle(statement, key=KEY) -> dict:
    size = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ""}, "tlogEntries": []},
        "dsseEnvelope": envelope_by(key, statement, size),
    }


def certificate_bundle(statement, *, start=NOW - DAY, end=NOW + DAY, who=WHO, **more) -> dict:
    key = new_key()
    leaf = make_leaf(key, CA, "inst-ca", who, start=start, end=end, **more)
    chain = [{"rawBytes": base64.b64encode(leaf.public_bytes(Encoding.DER)).decode()}]
    return {
        "verificationMaterial": {
            "x509CertificateChain": {"certificates": chain},
            "tlogEntries": [],
        },
        "dsseEnvelope": envelope_by(key, statement),
    }


def signed_checksums(files=FILES, key=KEY) -> tuple[bytes, bytes]:
    data = "".join(f"{digest}  {name}\n" for name, digest in files.items()).encode()
    return data, key.sign(data, ec.ECDSA(hashes.SHA384()))


def run(*items: Item, anchors: Anchors = ANCHORS, source: Source = SOURCE, at=NOW):
    return check(items, source, anchors, at=at)


def code(*items: Item, **more) -> str:
    with pytest.raises(AirgapError) as caught:
        run(*items, **more)
    return caught.value.code


MODES = {
    "key": (key_bundle, 2),
    "certificate": (certificate_bundle, 2),
    "sigstore": (SIGSTORE.attest, 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_signature_gives_its_level_in_each_mode(mode):
    make, level = MODES[mode]
    (proof,) = run(Item("oms", "model.sig", dump(make(oms_statement(FILES)))))
    assert (proof.level, proof.covers) == (level, frozenset(FILES))
    assert level_of(SOURCE, [proof]) == f"L{level}"
    assert uncovered(SOURCE, [proof]) == ()
    statuses = {line["status"] for line in proof.as_documents()}
    assert "verified" in statuses
    assert ("declared" in statuses) == (mode != "sigstore"), "the time of signing is not proved"


OMS = {
    "a file that nobody signed": (oms_statement({k: FILES[k] for k in sorted(FILES)[1:]}), {}),
    "a signed file that is missing": (oms_statement({**FILES, "extra.json": "0" * 64}), {}),
    "another digest": (oms_statement({**FILES, "config.json": "0" * 64}), {}),
    "ignore_paths that hit a file": (oms_statement(FILES, ignore_paths=["./notes.md"]), {}),
    "ignore_paths that hit a folder": (
        oms_statement({**FILES, ".git/x.py": "1" * 64}, ignore_paths=[".git"]),
        {".git/x.py": "1" * 64},
    ),
    "symbolic links allowed": (oms_statement(FILES, allow_symlinks=True), {}),
    "shards": (oms_statement(FILES, method="shards"), {}),
    "another hash": (oms_statement(FILES, hash_type="blake3"), {}),
    "the legacy predicate": (
        {**oms_statement(FILES), "predicateType": "https://model_signing/Digests/v0.1"},
        {},
    ),
}


@pytest.mark.parametrize("name", OMS)
def test_a_model_signature_over_anything_else_is_refused(name):
    statement, more = OMS[name]
    source = replace(SOURCE, files={**FILES, **more})
    assert code(Item("oms", "m", dump(key_bundle(statement))), source=source) == "evidence.oms"


def test_paths_that_are_ignored_and_not_there_do_no_harm():
    statement = oms_statement(FILES, ignore_paths=[".git", ".gitignore", "model.sig"])
    assert run(Item("oms", "m", dump(key_bundle(statement))))


def test_the_signature_itself_may_lie_among_the_files():
    raw = dump(key_bundle(oms_statement(FILES, ignore_paths=["model.sig"])))
    files = {**FILES, "model.sig": hashlib.sha256(raw).hexdigest()}
    assert run(Item("oms", "model.sig", raw), source=replace(SOURCE, files=files))


def test_a_duplicate_resource_is_refused():
    statement = oms_statement(FILES)
    statement["predicate"]["resources"] *= 2
    assert code(Item("oms", "m", dump(key_bundle(statement)))) == "evidence.malformed"


def test_certificates_count_only_while_they_are_valid_and_lead_to_a_given_authority():
    statement = oms_statement(FILES)
    good = Item("oms", "m", dump(certificate_bundle(statement)))
    assert run(good)
    assert code(good, at=NOW + 2 * DAY) == "evidence.signature", "expired"
    assert code(good, at=NOW - 2 * DAY) == "evidence.signature", "not valid yet"
    other = make_ca(new_key(), "inst-ca", start=NOW - DAY, end=NOW + DAY)
    foreign = replace_pem(other)
    assert code(good, anchors=foreign) == "evidence.signature", "another authority of that name"
    wrong = certificate_bundle(statement, usage=key_usage(key_agreement=True))
    assert code(Item("oms", "m", dump(wrong))) == "evidence.signature", "not made for signing"
    someone = certificate_bundle(statement, who="someone@lab.example")
    assert code(Item("oms", "m", dump(someone))) == "evidence.identity"


def replace_pem(certificate) -> Anchors:
    pem = certificate.public_bytes(Encoding.PEM).decode()
    return ANCHORS.model_copy(update={"authorities": (AUTHORITY.model_copy(update={"pem": pem}),)})


def test_no_anchor_no_belief():
    for mode, (make, _) in MODES.items():
        item = Item("oms", "m", dump(make(oms_statement(FILES))))
        assert run(item), mode
        assert code(item, anchors=Anchors()) == "evidence.anchor", mode
    half = ANCHORS.model_copy(update={"trusted_root": None})
    item = Item("oms", "m", dump(SIGSTORE.attest(oms_statement(FILES))))
    assert code(item, anchors=half) == "evidence.anchor"


@pytest.mark.parametrize(
    "who", [{"who": "mallory@lab.example"}, {"issuer": "https://oidc.mallory.example"}]
)
def test_another_identity_or_issuer_is_refused(who):
    assert run(Item("oms", "m", dump(SIGSTORE.attest(oms_statement(FILES)))))
    item = Item("oms", "m", dump(SIGSTORE.attest(oms_statement(FILES), **who)))
    assert code(item) == "evidence.identity"


def test_another_instance_is_refused():
    item = Item("oms", "m", dump(PrivateSigstore(NOW).attest(oms_statement(FILES))))
    assert code(item) == "evidence.signature"


def alterations(good: dict) -> dict[str, tuple[dict, str]]:
    made = {}

    def change(name: str, expected: str, edit) -> None:
        value = copy.deepcopy(good)
        edit(value, value["verificationMaterial"]["tlogEntries"])
        made[name] = (value, expected)

    def payload(value, _entries):
        raw = base64.b64decode(value["dsseEnvelope"]["payload"])
        raw = raw.replace(b"notes.md", b"evil1.md")
        value["dsseEnvelope"]["payload"] = base64.b64encode(raw).decode()

    change("payload", "evidence.signature", payload)
    change(
        "signature",
        "evidence.signature",
        lambda v, _: v["dsseEnvelope"]["signatures"][0].update(sig="A" * 96),
    )
    change(
        "payload type",
        "evidence.signature",
        lambda v, _: v["dsseEnvelope"].update(payloadType="text/plain"),
    )
    change(
        "time",
        "evidence.signature",
        lambda _, e: e[0].update(integratedTime=str(int(e[0]["integratedTime"]) + 60)),
    )
    change(
        "log id",
        "evidence.signature",
        lambda _, e: e[0]["logId"].update(keyId=base64.b64encode(bytes(32)).decode()),
    )
    change("two entries", "evidence.malformed", lambda _, e: e.append(e[0]))
    change(
        "two signatures",
        "evidence.malformed",
        lambda v, _: v["dsseEnvelope"]["signatures"].append({"sig": "AAAA"}),
    )
    # Without an entry it is a signature by a certificate, which leads to no given authority.
    change("no entry", "evidence.signature", lambda _, e: e.clear())
    return made


@pytest.mark.parametrize("name", list(alterations(SIGSTORE.attest(oms_statement(FILES)))))
def test_an_altered_sigstore_bundle_is_refused(name):
    good = SIGSTORE.attest(oms_statement(FILES))
    assert run(Item("oms", "m", dump(good)))
    value, expected = alterations(good)[name]
    assert code(Item("oms", "m", dump(value))) == expected


def test_a_timestamp_of_a_private_authority_is_accepted(tmp_path):
    stamped = PrivateSigstore(dt.datetime.now(dt.UTC).replace(microsecond=0))
    stamped.make_tsa(tmp_path / "tsa")
    anchors = ANCHORS.model_copy(update={"trusted_root": json.dumps(stamped.trusted_root())})
    good = stamped.attest(oms_statement(FILES))
    assert good["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    assert run(Item("oms", "m", dump(good)), anchors=anchors)[0].level == 3
    other = PrivateSigstore(stamped.now)
    other.make_tsa(tmp_path / "other")
    stamps = other.attest(oms_statement(FILES))["verificationMaterial"]["timestampVerificationData"]
    good["verificationMaterial"]["timestampVerificationData"] = stamps
    good["verificationMaterial"]["tlogEntries"][0].pop("inclusionPromise")
    assert code(Item("oms", "m", dump(good)), anchors=anchors) == "evidence.signature"


def test_a_signed_checksum_file_gives_level_2_and_an_unsigned_one_none():
    data, signature = signed_checksums()
    (proof,) = run(Item("checksums", "SHA256SUMS", data, signature))
    assert level_of(SOURCE, [proof]) == "L2"
    assert run(Item("checksums", "S", data, base64.b64encode(signature)))[0].level == 2
    (plain,) = run(Item("checksums", "SHA256SUMS", data))
    assert level_of(SOURCE, [plain]) == "L0"
    assert level_of(replace(SOURCE, pinned=True), [plain]) == "L1"
    assert {line["status"] for line in plain.as_documents()} == {"verified", "declared"}
    assert code(Item("checksums", "S", data + b"#", signature)) == "evidence.signature"
    wrong, signature = signed_checksums({**FILES, "config.json": "0" * 64})
    assert code(Item("checksums", "S", wrong, signature)) == "evidence.subject"
    foreign, signature = signed_checksums({"x": "0" * 64})
    assert code(Item("checksums", "S", foreign, signature)) == "evidence.subject"


def test_a_checksum_file_in_the_form_of_tag_is_read():
    data = "".join(f"SHA256 ({name}) = {d}\n" for name, d in FILES.items()).encode()
    assert run(Item("checksums", "S", data))[0].covers == frozenset(FILES)
    for bad in (b"\xff", b"hello\n", data + data):
        assert code(Item("checksums", "S", bad)) == "evidence.malformed"


def test_a_checksum_file_signed_by_an_identity_gives_level_3():
    data, _ = signed_checksums()
    (proof,) = run(Item("checksums", "S", data, dump(SIGSTORE.sign(data))))
    assert level_of(SOURCE, [proof]) == "L3"


def test_a_level_is_that_of_all_files_that_travel():
    some = {name: FILES[name] for name in ("config.json", "tokenizer.json")}
    data, signature = signed_checksums(some)
    (proof,) = run(Item("checksums", "S", data, signature))
    assert (level_of(SOURCE, [proof]), uncovered(SOURCE, [proof])) == (
        "L0",
        ("model.safetensors",),
    )


def test_a_bundle_over_one_artifact_covers_that_file():
    data = b"model.safetensors"  # whose digest FILES has
    (proof,) = run(Item("sigstore", "b", dump(SIGSTORE.sign(data))))
    assert (proof.level, proof.covers) == (3, frozenset([data.decode()]))
    assert code(Item("sigstore", "b", dump(SIGSTORE.sign(b"else")))) == "evidence.subject"


def test_an_attestation_must_speak_of_files_that_are_here():
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://lab.example/note/v1",
        "predicate": {},
    }

    def attested(**subjects: str) -> Item:
        listed = [{"name": n, "digest": {"sha256": d}} for n, d in subjects.items()]
        return Item("sigstore", "b", dump(SIGSTORE.attest({**statement, "subject": listed})))

    (proof,) = run(attested(any_name=FILES["notes.md"]))
    assert proof.covers == {"notes.md"}
    assert code(attested(other="0" * 64)) == "evidence.subject"
    both = attested(any_name=FILES["config.json"], **{"notes.md": "0" * 64})
    assert code(both) == "evidence.subject", "a name that is here with other bytes"


def slsa(files=FILES, builder=BUILDER, source=f"{REPO}@refs/heads/main") -> Item:
    return Item("slsa", "p", dump(SIGSTORE.attest(slsa_statement(files, builder, source))))


def test_provenance_of_an_expected_builder_and_source_gives_level_4_with_an_identity():
    oms = Item("oms", "m", dump(SIGSTORE.attest(oms_statement(FILES))))
    proofs = run(oms, slsa())
    assert level_of(SOURCE, proofs) == "L4"
    assert level_of(SOURCE, proofs[:1]) == "L3"
    assert level_of(SOURCE, run(slsa({"config.json": FILES["config.json"]}))) == "L0"
    partly = run(oms, slsa({"config.json": FILES["config.json"]}))
    assert level_of(SOURCE, partly) == "L3", "the weights were not built so"


def test_provenance_by_a_key_does_not_reach_level_4():
    item = Item("slsa", "p", dump(key_bundle(slsa_statement(FILES, BUILDER, REPO))))
    assert level_of(SOURCE, run(item)) == "L2"


def test_provenance_of_another_builder_or_source_is_refused():
    assert run(slsa())
    assert code(slsa(builder="https://build.mallory.example")) == "evidence.identity"
    assert code(slsa(source="git+https://git.mallory.example/model")) == "evidence.identity"
    assert code(slsa(source=f"{REPO}-evil@refs/heads/main")) == "evidence.identity"
    assert code(slsa({"x": "0" * 64})) == "evidence.subject"
    assert code(slsa(), anchors=ANCHORS.model_copy(update={"builders": ()})) == "evidence.anchor"
    other = Item("slsa", "p", dump(key_bundle(oms_statement(FILES))))
    assert code(other) == "evidence.malformed"


def test_weights_that_were_a_pickle_are_pinned_at_most():
    proofs = run(Item("oms", "m", dump(SIGSTORE.attest(oms_statement(FILES)))))
    assert level_of(SOURCE, proofs) == "L3"
    assert level_of(replace(SOURCE, unpickled=True), proofs) == "L0"
    assert level_of(replace(SOURCE, unpickled=True, pinned=True), proofs) == "L1"


def test_anchors_have_one_form():
    assert parse_anchors(ANCHORS.to_bytes()) == ANCHORS
    for bad in (b"{}", b"[]", ANCHORS.to_bytes() + b" ", b'{"format":"airgap-anchors/1","x":1}'):
        with pytest.raises(RefusedError) as caught:
            parse_anchors(bad)
        assert caught.value.code == "evidence.anchor"


STILL = dump(key_bundle(oms_statement(FILES)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bytes_and_any_changed_field_are_refused_or_hold(data):
    kind = data.draw(st.sampled_from(["oms", "checksums", "slsa"]))
    raw = bytearray(STILL)
    if data.draw(st.booleans()):
        raw = bytearray(data.draw(st.binary(max_size=200)))
    else:
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RefusedError):  # and no other error
        run(Item(kind, "m", bytes(raw)))


def chained(*, path_length: int | None = 0, ca: bool = True) -> dict:
    """A signature by a leaf whose issuer stands between it and the given root."""
    from cryptography import x509

    middle, key = new_key(), new_key()
    between = (
        x509.CertificateBuilder()
        .subject_name(common_name("between"))
        .issuer_name(common_name("root-of-two"))
        .public_key(middle.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(
            x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True
        )
        .add_extension(key_usage(key_cert_sign=True, digital_signature=True), critical=True)
        .sign(TWO, hashes.SHA256())
    )
    leaf = make_leaf(key, middle, "between", WHO, start=NOW - DAY, end=NOW + DAY)
    certificates = [
        {"rawBytes": base64.b64encode(each.public_bytes(Encoding.DER)).decode()}
        for each in (leaf, between)
    ]
    return {
        "verificationMaterial": {
            "x509CertificateChain": {"certificates": certificates},
            "tlogEntries": [],
        },
        "dsseEnvelope": envelope_by(key, oms_statement(FILES)),
    }


TWO = new_key()


def test_a_chain_is_followed_through_authorities_only():
    from cryptography import x509

    root = (
        x509.CertificateBuilder()
        .subject_name(common_name("root-of-two"))
        .issuer_name(common_name("root-of-two"))
        .public_key(TWO.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(key_cert_sign=True), critical=True)
        .sign(TWO, hashes.SHA256())
    )
    anchors = replace_pem(root)
    assert run(Item("oms", "m", dump(chained())), anchors=anchors)[0].level == 2
    forged = Item("oms", "m", dump(chained(ca=False)))
    assert code(forged, anchors=anchors) == "evidence.signature", "a leaf is no authority"


def test_a_root_says_how_many_may_stand_below_it():
    short = make_ca(TWO, "root-of-two", start=NOW - DAY, end=NOW + DAY)  # path length 0
    item = Item("oms", "m", dump(chained()))
    assert code(item, anchors=replace_pem(short)) == "evidence.signature"


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.pop("verificationMaterial"),
        lambda v: v.update(verificationMaterial=[]),
        lambda v: v.update(dsseEnvelope=None),
        lambda v: v["dsseEnvelope"].update(payload="?"),
        lambda v: v["dsseEnvelope"].update(payloadType=7),
        lambda v: v["dsseEnvelope"].update(signatures=[]),
        lambda v: v["verificationMaterial"]["x509CertificateChain"].update(certificates=[]),
        lambda v: v["verificationMaterial"]["x509CertificateChain"].update(certificates=[{}]),
    ],
)
def test_a_bundle_of_another_shape_is_refused(edit):
    value = certificate_bundle(oms_statement(FILES))
    assert run(Item("oms", "m", dump(value)))
    edit(value)
    assert code(Item("oms", "m", dump(value))) in {"evidence.malformed", "evidence.signature"}


def test_keys_of_other_kinds_are_read_or_refused():
    from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

    data = signed_checksums()[0]
    edwards = ed25519.Ed25519PrivateKey.generate()
    big = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    for key, signature in (
        (edwards, edwards.sign(data)),
        (big, big.sign(data, padding.PKCS1v15(), hashes.SHA256())),
    ):
        given_key = Key(name="k", channel="c", pem=public_pem(key).decode())
        anchors = Anchors(keys=(given_key,))
        assert run(Item("checksums", "S", data, signature), anchors=anchors)[0].level == 2
    small = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for bad in (public_pem(small).decode(), "no key", public_pem(new_key(ec.SECP256K1())).decode()):
        with pytest.raises(RefusedError) as caught:
            _ = Key(name="k", channel="c", pem=bad).public
        assert caught.value.code == "evidence.anchor"


def test_anchors_of_two_files_are_joined_but_for_two_roots():
    other = Anchors(keys=(PUBLISHER,), trusted_root="{}")
    assert len(ANCHORS.joined(Anchors(keys=(PUBLISHER,))).keys) == 2
    with pytest.raises(RefusedError):
        ANCHORS.joined(other)
