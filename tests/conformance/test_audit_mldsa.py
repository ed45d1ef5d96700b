"""ML-DSA-87 of the Go verifier (FIPS 204) against Wycheproof and against `cryptography`."""

import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from audit_exports import TOOLS, go_environment, need_go
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PrivateKey, MLDSA87PublicKey

VECTORS = Path(__file__).resolve().parents[1] / "vectors/mldsa/mldsa_87_verify.json.xz"
TEST = """package main

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"
)

func TestVectors(t *testing.T) {
	content, err := os.ReadFile("vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		TestGroups []struct {
			PublicKey string
			Tests     []struct {
				TcId                           int
				Comment, Msg, Ctx, Sig, Result string
			}
		}
	}
	if err := json.Unmarshal(content, &file); err != nil {
		t.Fatal(err)
	}
	for _, group := range file.TestGroups {
		key, _ := hex.DecodeString(group.PublicKey)
		for _, each := range group.Tests {
			msg, _ := hex.DecodeString(each.Msg)
			ctx, _ := hex.DecodeString(each.Ctx)
			sig, _ := hex.DecodeString(each.Sig)
			if verifyMLDSA87(key, msg, ctx, sig) != (each.Result == "valid") {
				t.Errorf("%d %s: expected %s", each.TcId, each.Comment, each.Result)
			}
			t.Logf("case %d", each.TcId)
		}
	}
}
"""


def wycheproof():
    return json.loads(lzma.decompress(VECTORS.read_bytes()))


def go_says(folder, groups):
    """Let Go judge all cases and return its words; an assertion tells where it differs."""
    need_go()
    shutil.copy(TOOLS / "verify_export.go", folder)
    (folder / "vectors_test.go").write_text(TEST)
    (folder / "vectors.json").write_text(json.dumps({"testGroups": groups}))
    done = subprocess.run(
        ["go", "test", "-v", "verify_export.go", "vectors_test.go"], cwd=folder,
        env=go_environment(folder / "cache"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert done.stdout.count(": case ") == sum(len(group["tests"]) for group in groups)


def made_here():
    """Signatures of `cryptography` over texts of many lengths, each whole and with one bit off."""
    private = MLDSA87PrivateKey.from_seed_bytes(bytes(range(32)))
    tests = []
    for length in (0, 1, 135, 136, 137, 1_000):
        message = bytes(length)
        for ctx in (b"", b"audit"):
            good = private.sign(message, ctx)
            bad = bytearray(good)
            bad[(length * 31) % len(bad)] ^= 1 << length % 8
            tests += [
                {"msg": message.hex(), "ctx": ctx.hex(), "sig": bytes(sig).hex(), "result": word}
                for sig, word in ((good, "valid"), (bad, "invalid"))
            ]
    raw = private.public_key().public_bytes(
        serialization.Encoding.Raw, serialization.PublicFormat.Raw
    )
    return [{"publicKey": raw.hex(), "tests": tests}]


def test_go_verifies_ml_dsa_87_as_the_standard_says(tmp_path):
    groups = wycheproof()["testGroups"] + made_here()
    assert sum(len(group["tests"]) for group in groups) == 62 + 24
    go_says(tmp_path, groups)


def test_a_case_that_says_the_wrong_thing_would_be_noticed(tmp_path):
    groups = made_here()
    groups[0]["tests"][1]["result"] = "valid"
    with pytest.raises(AssertionError, match="expected valid"):
        go_says(tmp_path, groups)


def test_the_library_agrees_with_the_vectors():
    """What `audit verify` and the Python file rely on."""
    for group in wycheproof()["testGroups"]:
        raw = bytes.fromhex(group["publicKey"])
        if len(raw) != 2_592:
            continue
        key = MLDSA87PublicKey.from_public_bytes(raw)
        for case in group["tests"]:
            ctx = bytes.fromhex(case.get("ctx", ""))
            if len(ctx) > 255:
                continue
            try:
                key.verify(bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"]), ctx)
                found = "valid"
            except InvalidSignature:
                found = "invalid"
            assert found == case["result"], case["comment"]
