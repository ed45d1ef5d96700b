"""A log whose key lies in a PKCS#11 token (SoftHSM2): made there, used there, destroyed there."""

import audit_logs as logs
import pytest
from test_audit_cli import result
from test_key_tokens import PIN, token

from airgap.audit import Actor, load_ring, new_ulid, verify_log
from airgap.audit.checkpoint import create_log_key, load_log_key
from airgap.audit.epochs import KeyFiles
from airgap.audit.query import read_records
from airgap.audit.token_key import TokenKey
from airgap.demo import site_toml
from bundle.keys import P384
from bundle.token import new_token_key, open_token
from policy.errors import FaultError, RefusedError

__all__ = ["token"]  # a fixture
WHO = Actor("isso")


@pytest.fixture
def uri(token):
    return token(f"log-{new_ulid()}")


@pytest.fixture
def tree(tmp_path, uri):
    """Return a folder whose log key is in the token, and what names it beside its PIN."""
    (tmp_path / "keys").mkdir()
    pin = tmp_path / "keys/audit.pin"
    pin.write_bytes(PIN + b"\n")
    pin.chmod(0o400)
    key = TokenKey.make(uri, PIN)
    create_log_key(tmp_path / "keys/audit.pem", site="lab.example", token=key)
    return tmp_path


def opened(tree):
    return logs.open_log(tree)


def good(tree, receipt):
    kept = logs.keep(receipt, tree / "kept/r.tlog-proof")
    ring = load_ring(tree / "keys/audit.vkey")
    verdict = verify_log(tree / "audit", vkey=ring, anchors=[kept])
    assert verdict.exit == 0, verdict.findings
    return ring


def test_a_log_is_signed_in_its_token_and_verifies_like_any_other(tree, uri):
    with opened(tree) as log:
        logs.infer(log)
    with opened(tree) as log:
        receipt = logs.infer(log)
    ring = good(tree, receipt)
    assert (tree / "keys/audit.pem").read_text() == f"{uri}\n"
    assert open_token(uri, PIN).public_key.public == ring.newest.public.public_bytes_raw()
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in (tree / "keys").iterdir())


def test_a_change_of_the_key_destroys_the_old_one_in_the_token(tree, uri):
    with opened(tree) as log:
        logs.infer(log)
        log.rotate_key(WHO)
        receipt = logs.infer(log)
        log.rotate_key(WHO)
    with opened(tree) as log:
        receipt = logs.infer(log)
    ring = good(tree, receipt)
    assert len(ring.keys) == 3
    for gone in (uri, uri.replace("?", ".1?")):
        with pytest.raises(RefusedError):
            open_token(gone, PIN)
    assert open_token(uri.replace("?", ".2?"), PIN).public_key.public


def test_a_log_moves_from_a_file_into_a_token(tmp_path, uri):
    with logs.open_log(tmp_path) as log:
        logs.infer(log)
        log.rotate_key(WHO, TokenKey.make(uri, PIN))
        receipt = logs.infer(log)
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
    assert len(good(tmp_path, receipt).keys) == 2
    assert (tmp_path / "keys/audit.pin").stat().st_mode & 0o777 == 0o400


def test_a_next_key_that_no_record_names_is_forgotten_and_destroyed(tree, uri):
    with opened(tree) as log:
        logs.infer(log)
    files = KeyFiles(tree / "keys/audit.pem")
    files.prepare(load_log_key(files.path))  # and a crash before its record
    assert open_token(uri.replace("?", ".1?"), PIN)
    with opened(tree) as log:
        receipt = logs.infer(log)
    assert len(good(tree, receipt).keys) == 1
    with pytest.raises(RefusedError):
        open_token(uri.replace("?", ".1?"), PIN)


def test_a_token_that_lost_the_key_halts_the_log(tree):
    with opened(tree) as log:
        receipt = logs.infer(log)
        KeyFiles(tree / "keys/audit.pem")._destroy(tree / "keys/audit.pem")
        with pytest.raises(FaultError) as fault:
            log.append(logs.denial())
        assert fault.value.code == "audit.halted"
    assert [r["kind"] for r in read_records(tree / "audit")][: receipt.size][-1] == "inference"


def no_pin(tree):
    (tree / "keys/audit.pin").unlink()


def open_pin(tree):
    (tree / "keys/audit.pin").chmod(0o444)


def wrong_pin(tree):
    logs.replace(tree / "keys/audit.pin", b"0000\n")
    (tree / "keys/audit.pin").chmod(0o400)


def other_key(tree):
    path = tree / "keys/audit.pem"
    uri = path.read_text().strip().replace("?", "-p384?")
    new_token_key(uri, PIN, P384)
    logs.replace(path, f"{uri}\n".encode())
    path.chmod(0o400)


def no_uri(tree):
    logs.replace(tree / "keys/audit.pem", b"pkcs11:token=site\n")
    (tree / "keys/audit.pem").chmod(0o400)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (no_pin, "audit.key"), (open_pin, "audit.key"), (wrong_pin, "trust.token"),
        (other_key, "audit.key"), (no_uri, "trust.token"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_key_file_that_names_no_usable_key_opens_no_log(tree, wrong, code):
    opened(tree).close()
    wrong(tree)
    with pytest.raises((RefusedError, FaultError)) as refused:
        opened(tree)
    assert refused.value.code == code


def test_the_commands_make_a_key_in_a_token_and_move_a_log_into_one(tmp_path, uri, capsys):
    tree = tmp_path / "tree"
    (tree / "keys").mkdir(parents=True)
    (tree / "site.toml").write_text(site_toml(0))
    pin = tmp_path / "pin"
    pin.write_bytes(PIN + b"\n")
    pin.chmod(0o400)
    status, document = result(capsys, "token-key", uri, "--pin-file", pin, "--root", tree)
    assert (status, document["uri"]) == (0, uri)
    with logs.open_log(tree) as log:
        receipt = logs.infer(log)
    good(tree, receipt)
    into = uri.replace("?", "-two?")
    status, _ = result(
        capsys, "rotate-key", "--into", into, "--pin-file", pin, "--root", tree
    )  # fmt: skip
    assert status == 0
    with logs.open_log(tree) as log:
        receipt = logs.infer(log)
    assert len(good(tree, receipt).keys) == 2
    with pytest.raises(RefusedError):
        open_token(uri, PIN)
