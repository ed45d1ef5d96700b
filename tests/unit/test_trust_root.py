"""Keys, envelopes and the trust root: what is enrolled, what counts, and what is refused."""

import base64
import errno
import json
import os
import subprocess
import threading
import time
from datetime import timedelta

import bundles
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from airgap.audit import create_log_key
from bundle import envelope, keys, trust
from bundle.canonical import canonical_json
from bundle.transit import new_transit_key
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

NOW = bundles.ENROLLED


def code_of(call):
    with pytest.raises(AirgapError) as caught:
        call()
    return caught.value.code


# -- keys -------------------------------------------------------------------------------------


def test_a_new_key_signs_and_its_id_is_what_openssl_prints(tmp_path):
    made = keys.new_key(tmp_path / "keys", "alice", person="alice", roles=("approver", "isso"))
    secret = tmp_path / "keys" / "alice.pem"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert keys.parse_public_key((tmp_path / "keys" / "alice.pub.json").read_bytes()) == made
    signer = keys.load_signer(secret)
    assert signer.public_key.keyid == made.keyid
    signature = signer.sign(b"message")
    assert made.key.find_valid(signature, b"message")
    assert not made.key.find_valid(signature, b"other")
    assert not made.key.find_valid(b"short", b"message")
    der = subprocess.run(
        ["openssl", "pkey", "-in", secret, "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert Digest.of(der).hex == made.keyid


def test_a_passphrase_locks_the_key(tmp_path):
    keys.new_key(tmp_path, "a", person="a", roles=("approver",), passphrase=b"correct horse")
    path = tmp_path / "a.pem"
    assert b"ENCRYPTED" in path.read_bytes()
    assert keys.load_signer(path, b"correct horse").public_key.supported
    assert code_of(lambda: keys.load_signer(path)) == "trust.keyfile"
    assert code_of(lambda: keys.load_signer(path, b"wrong")) == "trust.keyfile"
    (tmp_path / "phrase").write_bytes(b"correct horse\r\nsecond line\n")
    assert keys.read_passphrase(tmp_path / "phrase") == b"correct horse"
    assert keys.read_passphrase(None) == b""
    (tmp_path / "phrase").write_bytes(b"\n")
    assert code_of(lambda: keys.read_passphrase(tmp_path / "phrase")) == "trust.keyfile"


def test_a_key_without_passphrase_refuses_one(tmp_path):
    keys.new_key(tmp_path, "a", person="a", roles=("approver",))
    assert code_of(lambda: keys.load_signer(tmp_path / "a.pem", b"x")) == "trust.keyfile"


def test_a_key_is_never_overwritten(tmp_path):
    keys.new_key(tmp_path, "a", person="a", roles=("approver",))
    before = (tmp_path / "a.pem").read_bytes()
    assert (
        code_of(lambda: keys.new_key(tmp_path, "a", person="a", roles=("approver",)))
        == "trust.keyfile"
    )
    assert (tmp_path / "a.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "person", "roles"),
    [
        ("../a", "a", ("x",)),
        ("a", "A B", ("x",)),
        ("a", "a", ()),
        ("a", "a", ("",)),
        ("", "a", ("x",)),
    ],
)
def test_names_that_are_not_allowed(tmp_path, name, person, roles):
    assert (
        code_of(lambda: keys.new_key(tmp_path, name, person=person, roles=roles)) == "trust.keyfile"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_others_can_read_is_refused(tmp_path):
    keys.new_key(tmp_path, "a", person="a", roles=("approver",))
    (tmp_path / "a.pem").chmod(0o644)
    with pytest.raises(RefusedError, match="other users"):
        keys.load_signer(tmp_path / "a.pem")


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\0" * 70_000])
def test_a_file_that_is_no_key(tmp_path, raw):
    path = tmp_path / "a.pem"
    path.write_bytes(raw)
    path.chmod(0o600)
    assert code_of(lambda: keys.load_signer(path)) == "trust.keyfile"


def test_a_key_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "a.pem"
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    with pytest.raises(RefusedError, match="P-384"):
        keys.load_signer(path)


def test_missing_and_odd_files(tmp_path):
    assert code_of(lambda: keys.load_signer(tmp_path / "none.pem")) == "host.io"
    assert code_of(lambda: keys.load_signer(tmp_path)) == "trust.keyfile"


@pytest.mark.parametrize(
    "change",
    [
        {"keyid": "0" * 64},
        {"public": "AAAA"},
        {"public": "not base64!"},
        {"scheme": "rsa"},
        {"roles": []},
        {"format": "airgap-key/2"},
        {"extra": 1},
    ],
)
def test_a_public_key_file_is_read_strictly(change):
    value = bundles.public("alice").model_dump(mode="json")
    assert keys.parse_public_key(canonical_json(value)).person == "alice"
    assert code_of(lambda: keys.parse_public_key(canonical_json(value | change))) == "trust.keyfile"


def test_an_unsupported_key_has_no_id_and_verifies_nothing():
    key = keys.PublicKey("ecdsa", b"x")
    assert not key.find_valid(b"", b"")
    with pytest.raises(ValueError, match="no key id"):
        _ = key.keyid


# -- envelopes --------------------------------------------------------------------------------


def test_pae_is_that_of_the_specification():
    assert envelope.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_signing_twice_with_one_key_is_refused():
    made = envelope.sign_statement(b"{}", "t", bundles.signer("alice"))
    assert code_of(lambda: envelope.add_signature(made, bundles.signer("alice"))) == (
        "seal.malformed"
    )


def test_an_envelope_returns_from_its_padded_form():
    made = envelope.sign_statement(b"{}", "t", bundles.signer("alice"))
    made = envelope.add_signature(made, bundles.signer("bob"))
    assert len(made.to_padded()) == envelope.ENVELOPE_SIZE
    assert envelope.parse_envelope(made.to_padded()) == made
    keyring = {k.keyid: k for k in (bundles.signer(n).public_key for n in ("alice", "carol"))}
    assert envelope.find_signers(made, keyring, payload_type="t") == (
        bundles.signer("alice").public_key.keyid,
    )


def test_an_envelope_that_does_not_fit_is_refused():
    made = envelope.Envelope(bytes(envelope.ENVELOPE_SIZE), "t", ())
    assert code_of(made.to_padded) == "seal.malformed"


def test_too_many_or_empty_signatures():
    signatures = [{"keyid": f"{i:064x}", "sig": "AAAA"} for i in range(65)]
    value = {"payload": "", "payloadType": "t", "signatures": signatures}
    with pytest.raises(RefusedError, match="more than 64"):
        envelope.parse_envelope(canonical_json(value))
    for bad in ({"keyid": "x", "sig": "AAAA"}, {"keyid": "0" * 64, "sig": ""}, 7, {"keyid": 1}):
        value["signatures"] = [bad]
        assert code_of(lambda: envelope.parse_envelope(canonical_json(value))) == "seal.malformed"


def test_a_second_implementation_accepts_the_envelope():
    dsse = pytest.importorskip("securesystemslib.dsse")
    from securesystemslib.signer import SSlibKey

    made = envelope.sign_statement(b"{}", "t", bundles.signer("alice"))
    key = bundles.signer("alice").public_key
    theirs = SSlibKey(key.keyid, "ed25519", "ed25519", {"public": key.public.hex()})
    parsed = dsse.Envelope.from_dict(json.loads(made.to_bytes()))
    assert parsed.verify([theirs], 1) == {key.keyid: theirs}


# -- root -------------------------------------------------------------------------------------


def test_a_root_grows_by_signed_versions_and_is_read_back(tmp_path):
    made = bundles.make_trust()
    link = trust.save_trust(made, tmp_path)
    assert link.readlink().name == f"{made.version}.root.json"
    assert trust.load_trust(tmp_path) == made
    assert made.version == 6
    assert made.document.people["alice"].keys == (
        bundles.public("alice").keyid,
        bundles.public("alice2").keyid,
    )
    trust.save_trust(made, tmp_path)  # again changes nothing
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"{n}.root.json" for n in range(1, 7)),
        "root.json",
    ]


def test_import_needs_the_fingerprint(tmp_path):
    made = bundles.make_trust()
    raw = trust.save_trust(made, tmp_path).read_bytes()
    imported = trust.import_root(raw, made.fingerprint)
    assert imported.version == made.version
    assert code_of(lambda: trust.import_root(raw, Digest.of(b""))) == "trust.fingerprint"
    assert code_of(lambda: trust.import_root(b"{}", made.fingerprint)) == "trust.chain"


def test_an_imported_root_follows_newer_ones_from_a_bundle(tmp_path):
    old = bundles.make_trust("builder", "alice")
    new = trust.add_key(old, bundles.public("bob"), [bundles.signer("root")], now=NOW)
    imported = trust.import_root(trust.save_trust(old, tmp_path).read_bytes(), old.fingerprint)
    assert len(imported.documents) == 1
    followed = trust.follow_chain(imported, trust.chain_document(new))
    assert followed.document == new.document
    assert trust.follow_chain(new, trust.chain_document(old)) == new  # an older bundle
    trust.save_trust(followed, tmp_path / "host")
    assert trust.load_trust(tmp_path / "host").version == new.version


def test_nobody_is_trusted_without_a_root(tmp_path):
    assert code_of(lambda: trust.load_trust(tmp_path)) == "trust.missing"
    assert code_of(lambda: trust.load_trust(tmp_path / "none")) == "trust.missing"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FaultError):
        trust.load_trust(tmp_path / "file")


def test_a_root_needs_a_root_key():
    with pytest.raises(RefusedError, match="role `root`"):
        trust.new_root(bundles.public("alice"), bundles.signer("alice"), now=NOW)


def test_the_wrong_private_key_makes_no_root():
    assert (
        code_of(lambda: trust.new_root(bundles.public("root"), bundles.signer("bob"), now=NOW))
        == "trust.chain"
    )


def test_only_the_root_key_enrols():
    made = bundles.make_trust("builder")
    for signer in ("alice", "builder"):
        assert (
            code_of(
                lambda s=signer: trust.add_key(
                    made, bundles.public("alice"), [bundles.signer(s)], now=NOW
                )
            )
            == "trust.chain"
        )
    assert code_of(lambda: trust.add_key(made, bundles.public("alice"), [], now=NOW)) == (
        "trust.chain"
    )


def test_a_key_is_enrolled_once():
    made = bundles.make_trust("alice")
    assert (
        code_of(
            lambda: trust.add_key(made, bundles.public("alice"), [bundles.signer("root")], now=NOW)
        )
        == "trust.root"
    )


def test_a_stored_version_is_never_replaced(tmp_path):
    trust.save_trust(bundles.make_trust("alice"), tmp_path)
    assert code_of(lambda: trust.save_trust(bundles.make_trust("bob"), tmp_path)) == "trust.chain"


def test_a_gap_on_disk_is_refused(tmp_path):
    trust.save_trust(bundles.make_trust(), tmp_path)
    (tmp_path / "3.root.json").unlink()
    assert code_of(lambda: trust.load_trust(tmp_path)) == "trust.chain"


def document(**changes):
    value = json.loads(bundles.make_trust().document.to_bytes())
    for path, change in changes.items():
        value[path] = change(value[path])
    return canonical_json(value)


ALICE, BOB = bundles.public("alice").keyid, bundles.public("bob").keyid


def with_keys(value, keyid, entry):
    return {**value, keyid: entry}


BROKEN = {
    "unknown field": lambda: canonical_json(json.loads(document()) | {"x": 1}),
    "explicit null": lambda: document(
        people=lambda v: v | {"alice": {**v["alice"], "valid_to": None}}
    ),
    "one key twice": lambda: document(
        keys=lambda v: v | {"0" * 64: v[ALICE]},
        people=lambda v: v | {"dora": {**v["bob"], "name": "dora", "keys": ["0" * 64]}},
    ),
    "wrong id": lambda: document(
        keys=lambda v: v | {ALICE: {**v[ALICE], "public": "A" * 43 + "="}}
    ),
    "not base64": lambda: document(keys=lambda v: v | {ALICE: {**v[ALICE], "public": "?"}}),
    "key of nobody": lambda: document(people=lambda v: {k: p for k, p in v.items() if k != "bob"}),
    "key of two": lambda: document(people=lambda v: v | {"dora": {**v["bob"], "name": "dora"}}),
    "expired at birth": lambda: document(expires=lambda _: "2020-01-01T00:00:00Z"),
    "other profile": lambda: document(profile=lambda _: "cnsa2"),
    "no root people": lambda: document(
        people=lambda v: v | {"rita": {**v["rita"], "roles": ["approver"]}}
    ),
    "threshold zero": lambda: document(
        thresholds=lambda v: v | {"seal": {"people": 0, "required_roles": []}}
    ),
    "version zero": lambda: document(version=lambda _: 0),
    "hidden name": lambda: document(
        people=lambda v: v | {"alice": {**v["alice"], "name": "a\u202eb"}}
    ),
}


def test_the_untouched_document_passes():
    assert trust.parse_root(document()) == bundles.make_trust().document


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN.keys())
def test_a_root_that_breaks_a_rule(build):
    assert code_of(lambda: trust.parse_root(build())) == "trust.root"


def test_new_keys_alone_do_not_make_a_new_root():
    """The old threshold must sign too: an attacker's own root key is not enough."""
    made = bundles.make_trust()
    people = made.document.people
    stolen = made.document.model_copy(
        update={
            "version": made.version + 1,
            "people": people
            | {"alice": people["alice"].model_copy(update={"roles": ("root", "approver")})},
        }
    )
    assert code_of(lambda: trust.append_root(made, stolen, [bundles.signer("alice")])) == (
        "trust.chain"
    )
    assert trust.append_root(made, stolen, [bundles.signer("root")]).version == made.version + 1


def test_a_person_counts_while_enrolled():
    person = trust.Person(
        name="a", keys=(ALICE,), roles=("isso",), valid_from=NOW, valid_to=NOW + timedelta(days=1)
    )
    assert person.approves
    assert [person.is_enrolled(NOW + timedelta(days=d)) for d in (-1, 0, 1)] == [False, True, False]
    for roles in (("root",), ("builder", "policy"), ("revocation",)):
        assert not person.model_copy(update={"roles": roles}).approves


def test_base64_has_one_form():
    assert keys.decode_base64("QQ==") == b"A"
    for text in ("QR==", "QQ", "Q Q==", "QQ==\n", "Q-=="):
        with pytest.raises(ValueError, match=r".*"):
            keys.decode_base64(text)
    assert base64.b64decode("QR==") == b"A"  # what a lenient reader would accept


def test_an_older_root_does_not_stand_for_a_newer_one(tmp_path):
    trust.save_trust(bundles.make_trust(), tmp_path)
    newest = max(tmp_path.glob("[0-9]*.root.json"), key=lambda path: int(path.name.split(".")[0]))
    for path in tmp_path.glob("[0-9]*.root.json"):
        if path.name not in {newest.name, "1.root.json"}:
            path.unlink()
    (tmp_path / "1.root.json").replace(newest)
    assert code_of(lambda: trust.load_trust(tmp_path)) == "trust.chain"


def test_a_clock_before_the_root_enrols_nobody():
    made = bundles.make_trust("alice")
    early = made.document.issued - timedelta(seconds=1)
    signers = [bundles.signer("root")]
    with pytest.raises(RefusedError) as caught:
        trust.add_key(made, bundles.public("bob"), signers, now=early)
    assert caught.value.code == "trust.clock"


class _Full:
    """os.fsync on a full disk, from its n-th call on."""

    def __init__(self, good):
        self.good = good

    def __call__(self, _):
        self.good -= 1
        if self.good < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: keys.new_key(folder, "k", person="p", roles=("approver",)),
        lambda folder: new_transit_key(folder, "k"),
        lambda folder: create_log_key(folder / "audit.pem", site="lab"),
    ],
    ids=["person", "transit", "log"],
)
def test_a_full_disk_leaves_no_half_of_a_key(tmp_path, monkeypatch, good, make):
    monkeypatch.setattr(os, "fsync", _Full(good))
    with pytest.raises(OSError, match="No space"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert make(tmp_path)


def test_a_full_disk_leaves_no_half_of_a_root(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _Full(0))
    with pytest.raises(OSError, match="No space"):
        trust.save_trust(bundles.make_trust(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_that_enrol_at_once_do_not_overwrite_each_other(tmp_path, monkeypatch):
    base = bundles.make_trust("alice")
    trust.save_trust(base, tmp_path)
    one, two = (
        trust.add_key(base, bundles.public(name), [bundles.signer("root")], now=NOW)
        for name in ("bob", "carol")
    )
    written = trust.write_beside
    started = threading.Event()
    ends = []

    def slow(path, content, mode):
        started.set()
        time.sleep(0.2)
        written(path, content, mode)

    monkeypatch.setattr(trust, "write_beside", slow)
    first = threading.Thread(target=lambda: ends.append(trust.save_trust(one, tmp_path)))
    first.start()
    assert started.wait(5)
    assert code_of(lambda: trust.save_trust(two, tmp_path)) == "trust.chain"
    first.join()
    assert trust.load_trust(tmp_path) == one
