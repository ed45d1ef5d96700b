"""Precisions on the whole road, with the commands: built, forbidden, installed, told, and run."""

from __future__ import annotations

import contextlib
import os
import shutil

import policy_cases
import pytest
import tiny_llama
from conftest_road import Capture, call
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from enclave_harness import needs_namespaces
from lab_trees import make_staging

from airgap.demo import site_toml
from bundle.staging.architecture import expected_tensors, parse_architecture
from bundle.staging.sign import read_draft

pytestmark = needs_namespaces
NAME = "logos-ref-tiny"
PROJECT = ("--project", "route-design")
RUN = ("run", "molecule", "-n", "2", "--seed", "1", "--max-new-tokens", "4", *PROJECT)
CITED = "Site instruction 12: four-bit codes were not evaluated here"
FORBIDS = "{contains: [bundle.precisions, int4]}"


def sign_rule(lab, keys, scope):
    """Put a rule of the site against int4 into a tree, signed by a person with that role."""
    rule = policy_cases.rule(id="SITE-NO-INT4", scope=scope, when=FORBIDS)
    path = lab / "policy" / "own.yaml"
    path.parent.mkdir()
    raw = policy_cases.pack_text(rule.replace('text: "t"', f'text: "{CITED}"'), pack_id="site")
    path.write_bytes(raw)
    with Capture() as capture:
        done = call(capture, "policy", "sign", path, "--key", keys / "pat.pem", "--root", lab)
    assert done.document["counts"], done.text


def set_precision(lab, name):
    site = lab / "site.toml"
    site.write_text(f'{site.read_text()}\n[inference]\nprecision = "{name}"\n')


class Trees:
    """A sealed release with int4, and labs that trust its people."""

    def __init__(self, base):
        self.base, self.staging = base, base / "staging"
        self.bundle, self.keys = base / "tiny.agb", base / "staging" / "keys"

    def must(self, *words):
        with Capture() as capture:
            done = call(capture, *words)
        assert done.status == 0, done.text
        return done.document

    def make(self, precision="int4", **shape):
        make_staging(self.staging)
        root = ("--root", self.staging)
        self.must("keys", "new", "pat", "--person", "pat", "--role", "policy", *root)
        self.must("trust", "add", self.keys / "pat.pub.json", *root)
        (self.staging / "site.toml").write_text(site_toml(os.getuid()))
        snapshot = tiny_llama.write_snapshot(self.base / "model", **shape)
        if shape:
            tensors = expected_tensors(parse_architecture(tiny_llama.config(**shape)))
            (snapshot / "model.safetensors").write_bytes(tiny_llama.safetensors(tensors))
        signed = self.publish(snapshot)
        with contextlib.chdir(self.base):  # a name without a folder is as good as another
            self.built = self.must(
                *("build", snapshot, "-o", self.bundle.name, "--name", NAME, "--version", "1.0"),
                *("--key", self.keys / "builder.pem", *signed, "--supplier", "airgap project"),
                *("--jurisdiction", "none", "--modality", "molecule", "--no-reference"),
                *("--precision", precision, *root),
            )
        for name in ("alice", "bob"):
            key = self.keys / f"{name}.pem"
            self.must("sign", self.bundle, "--key", key, "--confirm", NAME, *root)
        return self

    def publish(self, snapshot):
        """Let a publisher sign the snapshot; returns the options that name the signature."""
        key, public, signature = (self.base / f"publisher.{end}" for end in ("pem", "pub", "sig"))
        private = ec.generate_private_key(ec.SECP384R1())
        pem = serialization.Encoding.PEM
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key.write_bytes(private.private_bytes(pem, *form))
        key.chmod(0o600)
        known = serialization.PublicFormat.SubjectPublicKeyInfo
        public.write_bytes(private.public_key().public_bytes(pem, known))
        self.must("sign-model", snapshot, "--key", key, "-o", signature)
        how = ("--signer-key", public, "--signer-channel", "read over the telephone")
        return ("--model-signature", signature, *how)

    def lab(self, name):
        lab = self.base / name
        lab.mkdir()
        (lab / "site.toml").write_text(site_toml(os.getuid()))
        document = self.staging / "trust" / "root.json"
        fingerprint = self.must("trust", "show", "--root", self.staging)["fingerprint"]
        self.must("trust", "init", "--from", document, "--fingerprint", fingerprint, "--root", lab)
        return lab


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return Trees(tmp_path_factory.mktemp("precisions")).make()


@pytest.fixture(scope="module")
def installed(trees):
    lab = trees.lab("lab")
    document = trees.must("install", trees.bundle, "--root", lab)
    assert {each["precision"] for each in document["parity"]} == {"fp32", "int4"}
    return lab


@pytest.fixture
def lab(installed, tmp_path):
    shutil.copytree(installed, tmp_path / "lab", symlinks=True)
    return tmp_path / "lab"


def records(capsys, lab, kind):
    return call(capsys, "audit", "show", "--kind", kind, "--root", lab).document["records"]


def test_the_build_says_under_which_seal_and_how_near(trees):
    built = trees.built
    assert str(read_draft(trees.base / "tiny.agb").digest) == built["digest"]
    assert built["rung"] in {"A", "U", "B"}
    assert built["provenance_level"] == "L2"
    assert built["parity"]["prompts"] >= 20
    assert float(built["parity"]["max_delta_with_cache"]) <= 1e-3
    left = {
        path.name for path in trees.base.iterdir() if path.suffix == ".agb" or path.name[0] == "."
    }
    assert left == {"tiny.agb"}


def test_a_rule_keeps_a_precision_out_of_the_lab(trees, capsys):
    lab = trees.lab("strict")
    sign_rule(lab, trees.keys, "admission")
    done = call(capsys, "install", trees.bundle, "--root", lab)
    assert (done.status, done.document["code"]) == (1, "policy.denied"), done.text
    assert "SITE-NO-INT4" in done.document["error"]
    assert CITED in done.document["error"] + done.document["hint"]
    assert call(capsys, "list", "--root", lab).document["bundles"] == []


def test_a_rule_forbids_a_precision_at_use_and_the_others_run(trees, lab, capsys):
    sign_rule(lab, trees.keys, "use")
    assert call(capsys, *RUN, "--root", lab).status == 0
    set_precision(lab, "int4")
    done = call(capsys, *RUN, "--root", lab)
    assert (done.status, done.document["code"]) == (1, "policy.denied"), done.text
    assert "SITE-NO-INT4" in done.document["error"]
    assert CITED in done.document["error"] + done.document["hint"]
    (denial,) = records(capsys, lab, "denial")
    assert denial["decision"]["rule"] == "SITE-NO-INT4"
    assert denial["project"] == "route-design"


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_a_precision_that_the_bundle_lacks_is_refused_before_anything_starts(lab, capsys, name):
    set_precision(lab, name)
    before = call(capsys, "audit", "show", "--root", lab).document["records"]
    done = call(capsys, *RUN, "--root", lab)
    assert (done.status, done.document["code"]) == (1, "model.precision"), done.text
    assert call(capsys, "audit", "show", "--root", lab).document["records"] == before
    shown = call(capsys, "inspect", NAME, "--root", lab)
    assert any("model.precision" in alarm for alarm in shown.document["alarms"])


PROTEIN = "MKVL" * 150  # its copy needs more than the 512 positions of this model
TASK = ("run", "binding-site", "--project", "route-design", "-n", "1")
IMPOSSIBLE = {
    "cuda without a GPU": ((*RUN, "--provider", "cuda"), {"model.provider", "enclave.gpu"}),
    "tensorrt without one": ((*RUN, "--provider", "tensorrt"), {"model.provider", "enclave.gpu"}),
    "more than the context": ((*TASK, "--sequence", PROTEIN), {"prompt.g10"}),
    "no such model": ((*RUN, "--model", "other"), {"store.missing"}),
}


@pytest.mark.parametrize(("words", "codes"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_run_is_refused_with_a_code_and_leaves_nothing(lab, capsys, words, codes):
    before = sorted(path.name for path in lab.iterdir())
    done = call(capsys, *words, "--csv", lab.parent / "out.csv", "--root", lab)
    assert done.status == 1, done.text
    assert done.document["code"] in codes
    assert done.document["hint"]
    assert not (lab.parent / "out.csv").exists()
    assert sorted(path.name for path in lab.iterdir()) == before


@pytest.mark.soak
def test_a_sample_that_does_not_fit_is_refused_and_a_shorter_one_runs(tmp_path, capsys):
    wide = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    trees = Trees(tmp_path).make("fp32", num_hidden_layers=6, hidden_size=16, **wide)
    lab = trees.lab("lab")
    trees.must("install", trees.bundle, "--root", lab)
    set_precision(lab, "fp32")
    site = lab / "site.toml"
    site.write_text(f"{site.read_text()}memory_mb = 64\n")
    assert call(capsys, *RUN, "--root", lab).status == 0
    done = call(capsys, *RUN, "--max-new-tokens", "200", "--root", lab)
    assert (done.status, done.document["code"]) == (1, "model.memory"), done.text
    assert "64 MiB are planned" in done.document["error"]


def test_an_installed_release_is_told_as_it_is_now_and_not_at_all_once_altered(lab, capsys):
    done = call(capsys, "inspect", NAME, "--root", lab, as_json=False)
    assert done.status == 0, done.text
    assert "weights      publisher's bytes, unchanged: model.safetensors, sha256:" in done.text
    assert "fp32         answers like the source on" in done.text
    assert "int4         mean KL to fp32" in done.text
    assert "runs here    fp32 on cpu" in done.text
    by_folder = call(capsys, "inspect", lab / "store" / "current", "--root", lab)
    assert by_folder.document["models"][0]["provenance"] == "L2"
    assert call(capsys, "inspect", "nonesuch", "--root", lab).document["code"] == "store.missing"
    (weights,) = (lab / "store" / "installed").rglob("model.safetensors")
    weights.parent.chmod(0o700)
    weights.chmod(0o600)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    done = call(capsys, "inspect", NAME, "--root", lab, as_json=False)
    assert done.status == 1
    assert "start.digest" in done.text
    assert "unchanged" not in done.text
