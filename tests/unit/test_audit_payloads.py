"""Encrypted payloads: only their holder reads them, and destroying one leaves a valid log."""

import hashlib
import hmac
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import audit_logs as logs
import pytest
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from test_audit_cli import result

from airgap.audit import Actor, Commit, Streamed, commitment, new_ulid, verify_log
from airgap.audit.layout import Layout
from airgap.audit.payloads import HolderKey, load_holder_key, load_payload_key
from airgap.audit.people import Act, parse_act
from airgap.audit.query import read_records
from airgap.audit.retention import choose_payload, find_line, open_sealed, purge
from policy.errors import FaultError, RefusedError

HOLDER = HolderKey.generate()
PROMPT = "<MoleculeS>CCO<MoleculeE> \u00e9".encode()
OUTPUT = b'{"answer":"CC.O"}'
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
WHO = Actor("isso")


@pytest.fixture
def tree(tmp_path):
    """Return a log with one inference whose texts are sealed, its receipts kept elsewhere."""
    folder = tmp_path / "tree"
    with logs.open_log(folder, payload_key=HOLDER.public) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        in_ = log.commit(PROMPT, b"\1" * 32, req=req, side="in")
        log.append(logs.intent(decision, req, in_=in_))
        out = log.commit(OUTPUT, b"\2" * 32, req=req, side="out")
        receipt = log.append(logs.outcome(req, out=out))
    logs.keep(receipt, folder / "kept" / "r.tlog-proof")
    return folder


def layout(tree):
    return Layout(tree / "audit")


def verify(tree, **more):
    return verify_log(tree / "audit", vkey=logs.vkey(), anchors=[tree / "kept"], **more)


def opened(tree, seq, holder=HOLDER, side=""):
    line = find_line(layout(tree), seq)
    return open_sealed(layout(tree), line, holder, origin=logs.ORIGIN, side=side)


def records(tree):
    return {r["phase"]: r for r in read_records(tree / "audit") if r["kind"] == "inference"}


def _labeled(suite_id, salt, label, ikm):
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm, "sha256")


def _expand(suite_id, prk, label, info, length):
    labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info
    return HKDFExpand(hashes.SHA256(), length, labeled).derive(prk)


def _key_schedule(private, enc, info):
    """RFC 9180, base mode, DHKEM(X25519), HKDF-SHA256, AES-128-GCM: return secret, key and nonce.

    Written from sections 4.1 and 5.1, so that the library is held against something else.
    """
    dh = private.exchange(X25519PublicKey.from_public_bytes(enc))
    kem, suite_id = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x01"
    context = enc + private.public_key().public_bytes_raw()
    secret = _expand(kem, _labeled(kem, b"", b"eae_prk", dh), b"shared_secret", context, 32)
    psk_id = _labeled(suite_id, b"", b"psk_id_hash", b"")
    context = b"\0" + psk_id + _labeled(suite_id, b"", b"info_hash", info)
    prk = _labeled(suite_id, secret, b"secret", b"")
    return (
        secret,
        _expand(suite_id, prk, b"key", context, 16),
        _expand(suite_id, prk, b"base_nonce", context, 12),
    )


def test_hpke_of_the_library_is_that_of_rfc_9180():
    """Source: RFC 9180, appendix A.1.1 (IETF Trust; vectors are code components, BSD licence)."""
    private = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    )
    enc = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    info = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
    secret, key, nonce = _key_schedule(private, enc, info)
    assert secret.hex() == "fe0e18c9f024ce43799ae393c7e8fe8fce9d218875e8227b0187c04e7d2ea1fc"
    assert key.hex() == "4531685d41d65f03dc48f6b8302c05b0"
    assert nonce.hex() == "56d890e5accaaf011cff4b7d"
    text = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
    sealed = AESGCM(key).encrypt(nonce, text, b"Count-0")
    assert sealed.hex() == (
        "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
    )
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_128_GCM)
    blob = suite.encrypt(text, private.public_key(), info=info)
    _, key, nonce = _key_schedule(private, blob[:32], info)
    assert AESGCM(key).decrypt(nonce, blob[32:], b"") == text


def test_the_holder_and_nobody_else_reads_what_was_sealed(tree):
    kinds = records(tree)
    assert opened(tree, kinds["intent"]["seq"]) == ("in", PROMPT)
    assert opened(tree, kinds["outcome"]["seq"]) == ("out", OUTPUT)
    assert verify(tree).exit == 0
    everything = b"".join(p.read_bytes() for p in (tree / "audit").rglob("*") if p.is_file())
    for secret in (PROMPT, OUTPUT, b"CCO", b"\1" * 32, b"\2" * 32):
        assert secret not in everything


def test_t42_the_wrong_key_opens_nothing_and_changes_no_verdict(tree):
    before = verify(tree)
    with pytest.raises(RefusedError) as refused:
        opened(tree, records(tree)["intent"]["seq"], HolderKey.generate())
    assert refused.value.code == "audit.payload"
    assert verify(tree) == before
    assert before.exit == 0


def test_the_holder_verifies_every_commitment(tree):
    verdict = verify(tree, holder=HOLDER)
    assert (verdict.exit, verdict.as_document()["payloads"]) == (
        0, {"opened": 2, "other_key": 0, "gone": 0},
    )  # fmt: skip
    assert "2 opened" in str(verdict.findings[-1])
    stranger = verify(tree, holder=HolderKey.generate())
    assert (stranger.exit, stranger.opened.opened, stranger.opened.other_key) == (0, 0, 2)
    assert verify(tree).opened is None


# What a host could seal beside what it commits to; its log is whole, and public keys see nothing.
LIES = {
    "another text": lambda log, req: log.commit(b"harmless", b"\1" * 32, req=req, side="in"),
    "another nonce": lambda log, req: log.commit(PROMPT, b"\3" * 32, req=req, side="in"),
    "another request": lambda log, _: log.commit(PROMPT, b"\1" * 32, req=new_ulid(), side="in"),
    "the other side": lambda log, req: log.commit(PROMPT, b"\1" * 32, req=req, side="out"),
    "no blob at all": lambda log, _: Commit("", 0, str(log.put_payload(b"nothing\n"))),
}


def test_the_holder_hears_of_a_file_among_the_segments_as_everybody_does(tree):
    (layout(tree).log / "seg/00000000.jsonl.gz").write_bytes(b"")
    for holder in (None, HOLDER):
        found = verify(tree, holder=holder)
        assert (found.verdict, found.findings[0].check) == ("tampered", "segment")


@pytest.mark.parametrize("lie", [None, *LIES], ids=str)
def test_a_host_that_seals_another_text_is_found_by_the_holder_alone(tmp_path, lie):
    with logs.open_log(tmp_path, payload_key=HOLDER.public) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        in_ = log.commit(PROMPT, b"\1" * 32, req=req, side="in")
        if lie is not None:
            in_ = replace(in_, sealed=LIES[lie](log, req).sealed)
        log.append(logs.intent(decision, req, in_=in_))
        receipt = log.append(logs.outcome(req))
    logs.keep(receipt, tmp_path / "kept" / "r.tlog-proof")
    assert verify(tmp_path).exit == 0
    verdict = verify(tmp_path, holder=HOLDER)
    assert verdict.exit == (0 if lie is None else 1)
    if lie is not None:
        assert (verdict.findings[0].check, verdict.findings[0].seq) == ("commitment", 1)


def test_the_command_opens_every_payload_with_the_holders_key(tree, tmp_path, capsys):
    HOLDER.write(tmp_path / "isso.pem", b"pass")
    (tmp_path / "pass").write_text("pass\n")
    status, document = result(
        capsys, "verify", "--root", tree, "--anchors", tree / "kept",
        "--isso-key", tmp_path / "isso.pem", "--passphrase-file", tmp_path / "pass",
    )  # fmt: skip
    assert (status, document["payloads"]["opened"]) == (0, 2)


def test_a_payload_of_another_record_or_side_is_refused(tree):
    kinds = records(tree)
    blob = layout(tree).payload(kinds["intent"]["in"]["sealed"][7:]).read_bytes()
    assert HOLDER.open(blob, kinds["intent"], origin=logs.ORIGIN, side="in") == PROMPT
    for record, side, origin in (
        (kinds["outcome"], "out", logs.ORIGIN),
        (kinds["intent"], "in", "other/audit/1"),
        (dict(kinds["intent"], req=new_ulid()), "in", logs.ORIGIN),
        (dict(kinds["intent"], **{"in": kinds["outcome"]["out"]}), "in", logs.ORIGIN),
    ):
        with pytest.raises(RefusedError) as refused:
            HOLDER.open(blob, record, origin=origin, side=side)
        assert refused.value.code == "audit.payload"


@pytest.mark.parametrize("at", [0, 30, 200, 400, -1])
def test_a_changed_blob_does_not_open_and_the_log_says_so(tree, at):
    kinds = records(tree)
    path = layout(tree).payload(kinds["intent"]["in"]["sealed"][7:])
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    with pytest.raises(RefusedError):
        HOLDER.open(bytes(blob), kinds["intent"], origin=logs.ORIGIN, side="in")
    logs.replace(path, bytes(blob))
    assert verify(tree).exit == 1
    with pytest.raises(RefusedError):
        opened(tree, kinds["intent"]["seq"])


def test_a_blob_that_is_gone_without_a_record_is_tampering(tree):
    layout(tree).payload(records(tree)["intent"]["in"]["sealed"][7:]).unlink()
    verdict = verify(tree)
    assert verdict.exit == 1
    assert "payload" in str(verdict.findings[0])


def test_a_payload_must_be_stored_before_the_record_that_names_it(tmp_path):
    with logs.open_log(tmp_path) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        plain = log.commit(PROMPT, b"\1" * 32, req=req, side="in")  # no key: nothing is kept
        assert plain == commitment(PROMPT, b"\1" * 32)
        named = type(plain)(plain.commit, plain.bytes, "sha256:" + "ab" * 32)
        with pytest.raises(RefusedError) as refused:
            log.append(logs.intent(decision, req, in_=named))
        assert refused.value.code == "audit.object"


# -- keys ------------------------------------------------------------------------------------------


def test_key_files_are_read_back_and_others_are_refused(tmp_path):
    key = tmp_path / "isso.pem"
    HOLDER.write(key, b"correct horse")
    assert key.stat().st_mode & 0o777 == 0o400
    assert b"ENCRYPTED" in key.read_bytes()
    public = load_payload_key(tmp_path / "isso.pub")
    assert public.key_id == HOLDER.public.key_id
    sealed = public.seal(b"x", b"\3" * 32, origin="o", req="r", side="in")
    record = {"req": "r", "in": {"commit": commitment(b"x", b"\3" * 32).commit, "bytes": 1}}
    back = load_holder_key(key, b"correct horse")
    assert back.open(sealed, record, origin="o", side="in") == b"x"
    for bad in (b"", b"wrong"):
        with pytest.raises(RefusedError):
            load_holder_key(key, bad)
    with pytest.raises(RefusedError):
        load_payload_key(key)
    with pytest.raises(RefusedError):
        load_holder_key(tmp_path / "isso.pub")
    with pytest.raises(FaultError):
        load_payload_key(tmp_path / "absent")
    with pytest.raises(RefusedError):
        HOLDER.write(key)
    (tmp_path / "junk").write_bytes(
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n" * 2
    )
    with pytest.raises(RefusedError):
        load_payload_key(tmp_path / "junk")


# -- purging ---------------------------------------------------------------------------------------


def act_of(tree, **changes):
    record = records(tree)["intent"]
    fields = {
        "act": "spill.purge", "origin": logs.ORIGIN, "issued": NOW - timedelta(hours=1),
        "reason": "classified text in a prompt", "record": record["seq"],
        "payload": record["in"]["sealed"],
    }  # fmt: skip
    return Act(**(fields | changes))


def test_t41_a_spilled_payload_is_destroyed_and_the_log_verifies(tree, tmp_path):
    trust, signers = logs.people_of(tmp_path / "people", ada="isso", bob="compliance")
    blob = layout(tree).payload(records(tree)["intent"]["in"]["sealed"][7:])
    content, inode = blob.read_bytes(), os.open(blob, os.O_RDONLY)
    with logs.open_log(tree) as log:
        envelope = logs.signed_act(act_of(tree), signers["ada"], signers["bob"])
        purge(log, envelope, trust=trust, now=NOW, actor=WHO)
    assert not blob.exists()
    assert os.pread(inode, 1 << 16, 0) == bytes(len(content))  # overwritten before it went
    os.close(inode)
    verdict = verify(tree)
    assert verdict.exit == 0, verdict.findings
    with pytest.raises(RefusedError, match="purged"):
        opened(tree, records(tree)["intent"]["seq"])
    assert opened(tree, records(tree)["outcome"]["seq"])[1] == OUTPUT
    acts = [r for r in read_records(tree / "audit") if r["kind"] == "spill.purge"]
    assert [r["phase"] for r in acts] == ["intent", "outcome"]
    assert (acts[0]["data"]["person_1"], acts[0]["data"]["person_2"]) == ("ada", "bob")
    with logs.open_log(tree) as log, pytest.raises(RefusedError):
        purge(log, envelope, trust=trust, now=NOW, actor=WHO)


def test_t41_of_an_answer_in_pieces_no_state_is_left(tmp_path):
    trust, signers = logs.people_of(tmp_path / "people", ada="isso", bob="compliance")
    with logs.open_log(tmp_path, payload_key=HOLDER.public) as log:
        req = new_ulid()
        log.append(logs.intent(log.put_object(logs.DECISION), req))
        streamed = Streamed(log, req=req, project="P-0042", nonce=b"\2" * 32, actor=WHO)
        streamed.release(b"CC")
        streamed.release(b".O")
        receipt = log.append(logs.outcome(req, out=streamed.commit()))
        record = records(tmp_path)["outcome"]
        spilled = Act(
            act="spill.purge", origin=logs.ORIGIN, issued=NOW - timedelta(hours=1), reason="spill",
            record=record["seq"], payload=record["out"]["sealed"],
        )  # fmt: skip
        assert len(list((tmp_path / "audit/log/sealed").rglob("*/*"))) == 2
        envelope = logs.signed_act(spilled, signers["ada"], signers["bob"])
        purge(log, envelope, trust=trust, now=NOW, actor=WHO)
    assert not list((tmp_path / "audit/log/sealed").rglob("*/*"))
    logs.keep(receipt, tmp_path / "kept" / "r.tlog-proof")
    verdict = verify(tmp_path, holder=HOLDER)
    assert (verdict.exit, verdict.opened.gone) == (0, 3), verdict.findings


@pytest.mark.parametrize(
    ("changes", "signed"),
    [
        ({}, ("ada",)),
        ({}, ("ada", "ada2")),
        ({}, ("ada", "root")),
        ({}, ("ada", "stranger")),
        ({"origin": "other/audit/1"}, ("ada", "bob")),
        ({"issued": NOW - timedelta(days=8)}, ("ada", "bob")),
        ({"issued": NOW + timedelta(days=1)}, ("ada", "bob")),
        ({"act": "prune"}, ("ada", "bob")),
        ({"record": 0}, ("ada", "bob")),
        ({"record": 999}, ("ada", "bob")),
        ({"payload": "sha256:" + "00" * 32}, ("ada", "bob")),
    ],
)
def test_t41_one_person_or_another_act_destroys_nothing(tree, tmp_path, changes, signed):
    trust, signers = logs.people_of(
        tmp_path / "people", ada="isso", bob="compliance", ada2="isso", root="root"
    )
    person = trust.people["ada"]
    keys = (*person.keys, *trust.people["ada2"].keys)  # two keys of one person
    people = {k: v for k, v in trust.people.items() if k != "ada2"}
    trust = trust.model_copy(
        update={"people": people | {"ada": person.model_copy(update={"keys": keys})}}
    )
    _, strangers = logs.people_of(tmp_path / "others", stranger="isso")
    envelope = logs.signed_act(
        act_of(tree, **changes), *((signers | strangers)[name] for name in signed)
    )
    with logs.open_log(tree) as log:
        with pytest.raises(RefusedError) as refused:
            purge(log, envelope, trust=trust, now=NOW, actor=WHO)
        assert refused.value.code in {"audit.people", "audit.payload", "audit.absent"}
    assert opened(tree, records(tree)["intent"]["seq"])[1] == PROMPT
    assert not [r for r in read_records(tree / "audit") if r["kind"] == "spill.purge"]


def test_an_act_has_one_form(tree):
    content = act_of(tree).to_bytes()
    assert parse_act(content).act == "spill.purge"
    for bad in (b"{}", b"[]", content.replace(b'","', b'", "', 1), content[:-1]):
        with pytest.raises(RefusedError) as refused:
            parse_act(bad)
        assert refused.value.code == "audit.people"


def test_a_record_with_two_payloads_asks_which(tree):
    record = dict(records(tree)["outcome"])
    record["in"] = records(tree)["intent"]["in"]
    line = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    assert choose_payload(line, "in")[0] == "in"
    with pytest.raises(RefusedError, match="2 payloads"):
        choose_payload(line, "")
    with pytest.raises(RefusedError, match="0 payloads"):
        choose_payload(find_line(layout(tree), 0), "")
    assert hashlib.sha256(b"").hexdigest() not in str(record)
