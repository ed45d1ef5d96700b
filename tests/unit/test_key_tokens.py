"""Keys in tokens, with SoftHSM2: made there, used there, and every mistake refused by name."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from airgap.cli import trust as trust_commands
from bundle import keys
from bundle.keyring import key_paths, open_signers
from bundle.token import new_token_key, open_token, parse_uri
from policy.errors import AirgapError, RefusedError

MODULE = next(
    (
        str(path)
        for path in map(
            Path,
            ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"),
        )
        if path.exists()
    ),
    "",
)
PIN = b"4711"


def code_of(call):
    with pytest.raises(AirgapError) as caught:
        call()
    return caught.value.code


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    pytest.importorskip("pkcs11", reason="python-pkcs11 (extra hsm) is not installed")
    if not MODULE or not shutil.which("softhsm2-util"):
        pytest.skip("softhsm2 is not installed")
    folder = tmp_path_factory.mktemp("hsm")
    (folder / "tokens").mkdir()
    config = folder / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(config)  # read once, when the module is loaded
    command = "softhsm2-util --init-token --free --label site --so-pin 0815 --pin 4711"
    subprocess.run(
        command.split(),
        check=True,
        capture_output=True,
    )
    return lambda name, label="site": f"pkcs11:token={label};object={name}?module-path={MODULE}"


@pytest.mark.parametrize("scheme", [keys.ED25519, keys.P384])
def test_a_key_is_made_and_used_in_the_token(token, scheme):
    made = new_token_key(token(scheme), PIN, scheme)
    assert made.public_key.scheme == scheme
    (opened,) = open_signers([token(scheme)], Path("/nowhere"), pin=PIN)
    assert opened.public_key == made.public_key
    for message in (b"", b"message", bytes(100_000)):
        signature = opened.sign(message)
        assert made.public_key.find_valid(signature, message)
        assert not made.public_key.find_valid(signature, message + b"x")
    assert code_of(lambda: new_token_key(token(scheme), PIN, scheme)) == "trust.token"


def test_a_scheme_that_the_token_lacks_is_refused_by_name(token):
    with pytest.raises(RefusedError, match="does not offer ml-dsa-87") as caught:
        new_token_key(token("pq"), PIN, keys.MLDSA87)
    assert caught.value.code == "trust.token"
    assert code_of(lambda: new_token_key(token("x"), PIN, "rsa")) == "trust.token"


def test_wrong_pins_labels_and_modules(token):
    new_token_key(token("good"), PIN, keys.P384)
    assert open_token(token("good"), PIN).public_key.supported
    assert code_of(lambda: open_token(token("good"), b"0000")) == "trust.token"
    assert code_of(lambda: open_token(token("good"), b"")) == "trust.token"
    assert code_of(lambda: open_token(token("good"), b"\xff")) == "trust.token"
    assert code_of(lambda: open_token(token("none"), PIN)) == "trust.token"
    assert code_of(lambda: open_token(token("good", "other"), PIN)) == "trust.token"
    bad = "pkcs11:token=site;object=good?module-path=/nowhere/x.so"
    assert code_of(lambda: open_token(bad, PIN)) == "trust.token"


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:",
        "pkcs11:token=a?module-path=/x",
        "pkcs11:object=a?module-path=/x",
        "pkcs11:token=a;token=b;object=c?module-path=/x",
        "pkcs11:token=a;object=c;serial=1?module-path=/x",
        "pkcs11:token=a;object=c?pin-value=1",
    ],
)
def test_a_uri_that_is_not_understood(text, monkeypatch):
    monkeypatch.delenv("AIRGAP_PKCS11_MODULE", raising=False)
    assert code_of(lambda: parse_uri(text)) == "trust.token"


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:token=a;object=b?module-path=/x&pin-value=8642",
        "pkcs11:token=a;object=b;pin-value=8642?module-path=/x",
        "pkcs11:token=a;serial=1;object=b?pin-value=8642",
        "pkcs11:token=a;object=b&pin-value=8642",
        "pkcs11:token=a;object=b?module-path=/x?pin-value=8642",
        "pkcs11:token=a;object=b?pin%2Dvalue=8642",
        "PKCS11:token=a;object=b;PIN-VALUE=8642",
        "pkcs11:token=a;object=b?pin-source=/run/8642",
    ],
)
def test_a_pin_in_a_uri_is_in_no_message(text):
    with pytest.raises(RefusedError) as caught:
        open_signers([text], Path("/nowhere"), pin=PIN)
    assert caught.value.code == "trust.token"
    assert "8642" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("hidden", ["%00", "%1b[2J", "%0a", "%e2%80%ae"])
def test_hidden_characters_of_a_uri_reach_no_terminal(hidden):
    for text in (
        f"pkcs11:token=a{hidden};object=b?module-path=/x",
        f"pkcs11:token=a;object=b{hidden}?module-path=/x",
        f"pkcs11:token=a;object=b?module-path=/x{hidden}",
    ):
        assert code_of(lambda text=text: open_token(text, PIN)) == "trust.token"


def test_a_uri_is_decoded(monkeypatch):
    monkeypatch.setenv("AIRGAP_PKCS11_MODULE", "/lib/x.so")
    found = parse_uri("pkcs11:token=My%20Token;object=a")
    assert (found.token, found.object, found.module) == ("My Token", "a", "/lib/x.so")
    assert str(found) == "pkcs11:token=My Token;object=a"


def test_a_name_is_a_path_a_file_or_a_pair(tmp_path):
    keys.new_key(tmp_path, "one", person="a", roles=("x",))
    keys.new_pair(tmp_path, "two", person="a", roles=("x",))
    assert key_paths("one", tmp_path) == (tmp_path / "one.pem",)
    assert key_paths("one.pem", tmp_path) == (tmp_path / "one.pem",)
    assert key_paths(str(tmp_path / "one.pem"), Path("/nowhere")) == (tmp_path / "one.pem",)
    assert [path.name for path in key_paths("two", tmp_path)] == [
        "two-ml-dsa-87.pem",
        "two-ecdsa-p384.pem",
    ]
    schemes = [each.public_key.scheme for each in open_signers(["two", "one"], tmp_path)]
    assert schemes == [keys.MLDSA87, keys.P384, keys.ED25519]
    assert code_of(lambda: open_signers(["none"], tmp_path)) == "host.io"


def test_a_site_with_its_keys_in_a_token(token, tmp_path):
    pin = tmp_path / "pin"
    pin.write_bytes(PIN + b"\n")
    made = typer.Typer()
    trust_commands.register(made)

    def call(*words, code=""):
        result = CliRunner().invoke(made, [*map(str, words), "--root", tmp_path / "site"])
        found = getattr(result.exception, "code", "") if result.exception else ""
        assert found == code, result.output
        return result.stdout

    opened = ("--pin-file", pin)
    uri = token("cli-root")
    named = ("--person", "rita", "--role", "root", "--pkcs11", uri)
    call("keys", "new", "root", *named, *opened, "--json")
    assert not list((tmp_path / "site/keys").glob("*.pem"))  # the private half is in the token
    call("keys", "new", "root", *named, *opened, code="trust.keyfile")
    call("keys", "new", "x", *named, *opened, "--profile", "cnsa2", code="usage.argument")
    call("trust", "init", "--key", uri, code="trust.token")  # no PIN
    call("trust", "init", "--key", uri, *opened)
    call("keys", "new", "alice", "--person", "alice", "--role", "approver")
    alice = tmp_path / "site/keys/alice.pub.json"
    call("trust", "add", alice, "--key", "alice", code="trust.chain")
    assert "alice" in call("trust", "add", alice, "--key", uri, *opened)
