"""The commands of this room, as a person types them: exit status, JSON, and what they leave."""

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import attacks
import bundles
import pytest
from lab_trees import PEOPLE, SITE, make_sealed, make_staging

from airgap import cli
from bundle import keys, trust

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    return make_staging(tmp_path_factory.mktemp("staging"))


@pytest.fixture(scope="module")
def bundle(staging):
    return make_sealed(staging, staging / "tiny-1.0.agb", line="tiny")


@pytest.fixture
def lab(staging, tmp_path, call):
    root = tmp_path / "lab"
    _, shown = call("trust", "show", "--root", staging)
    status, imported = call(
        *("trust", "init", "--from", staging / "trust" / "root.json"),
        *("--fingerprint", shown["fingerprint"], "--root", root),
    )
    assert status == 0
    assert imported["fingerprint"] == shown["fingerprint"]
    return root


def with_site(root):
    shutil.copyfile(SITE, root / "site.toml")
    return root


# -- keys and trust ---------------------------------------------------------------------------


def test_keys_and_trust(staging, call):
    status, shown = call("trust", "show", "--root", staging)
    assert status == 0
    assert shown["version"] == len(PEOPLE)
    assert shown["people"]["bob"]["roles"] == ["isso"]
    assert shown["thresholds"]["seal"] == {"people": 2, "required_roles": []}
    assert (staging / "keys" / "root.pem").stat().st_mode & 0o777 == 0o600
    status, again = call(
        "keys", "new", "root", "--person", "x", "--role", "root", "--root", staging
    )
    assert (status, again["code"]) == (1, "trust.keyfile")


def test_text_output_holds_the_fingerprint(staging, capsys):
    assert cli.invoke(["trust", "show", "--root", str(staging)]) == 0
    out = capsys.readouterr().out
    assert str(trust.load_trust(staging / "trust").fingerprint) in out
    assert "2 approvers beside its builder" in out


def test_a_trust_root_is_imported_by_its_fingerprint_only(staging, tmp_path, call):
    source = staging / "trust" / "root.json"
    root = tmp_path / "lab"
    for argv, code, exit_status in (
        (("--from", source), "usage.argument", 2),
        (("--fingerprint", "sha256:" + "0" * 64), "usage.argument", 2),
        (("--from", source, "--fingerprint", "abc"), "digest.malformed", 1),
        (("--from", source, "--fingerprint", "sha256:" + "0" * 64), "trust.fingerprint", 1),
        (("--from", tmp_path / "none", "--fingerprint", "sha256:" + "0" * 64), "host.io", 3),
    ):
        status, found = call("trust", "init", *argv, "--root", root)
        assert (status, found["code"]) == (exit_status, code)
    assert not (root / "trust").exists()


def test_a_trust_root_is_never_replaced(staging, call):
    status, found = call("trust", "init", "--root", staging)
    assert (status, found["code"]) == (1, "trust.exists")


def test_a_passphrase_file_locks_and_opens(tmp_path, call):
    phrase = tmp_path / "phrase"
    phrase.write_text("a long one\n")
    with_phrase = ("--passphrase-file", phrase, "--root", tmp_path)
    argv = ("keys", "new", "root", "--person", "rita", "--role", "root")
    assert call(*argv, *with_phrase)[1]["encrypted"] is True
    status, found = call("trust", "init", "--root", tmp_path)
    assert (status, found["code"]) == (1, "trust.keyfile")
    assert call("trust", "init", *with_phrase)[0] == 0


def test_a_public_file_of_another_key_is_refused(tmp_path, call):
    for name in ("a", "b"):
        call("keys", "new", name, "--person", name, "--role", "root", "--root", tmp_path)
    (tmp_path / "keys/a.pub.json").write_bytes((tmp_path / "keys/b.pub.json").read_bytes())
    status, found = call("trust", "init", "--key", "a", "--root", tmp_path)
    assert (status, found["code"]) == (1, "trust.keyfile")


# -- verify -----------------------------------------------------------------------------------


def test_verify(lab, bundle, call):
    before = sorted(lab.rglob("*"))
    status, found = call("verify", bundle, "--root", lab)
    assert status == 0
    assert (found["verdict"], found["builder"], found["approvers"]) == (
        "sealed",
        "ben",
        ["alice", "bob"],
    )
    assert sorted(lab.rglob("*")) == before
    assert call("verify", bundle, "--trust", lab / "trust", "--root", lab / "none")[0] == 0


def test_verify_in_words(lab, bundle, capsys):
    assert cli.invoke(["verify", str(bundle), "--root", str(lab)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sealed and whole\n")
    assert "alice, bob (2 needed)" in out
    assert "not for scientific use" in out


def test_verify_refuses_with_a_code_and_writes_nothing(lab, bundle, tmp_path, call):
    raw = bundle.read_bytes()
    bad = tmp_path / "bad.agb"
    for section, (start, size) in attacks.head_of(raw).items():
        bad.write_bytes(attacks.flip(raw, start + size // 2))
        status, found = call("verify", bad, "--root", lab)
        assert status == 1, section
        assert found["code"].split(".")[0] in {"seal", "trust", "chunk"}, section
    for content, code in ((b"", "archive.truncated"), (os.urandom(9000), "archive.header")):
        bad.write_bytes(content)
        assert call("verify", bad, "--root", lab)[1]["code"] == code
    status, found = call("verify", tmp_path / "none.agb", "--root", lab)
    assert (status, found["code"]) == (3, "host.io")
    status, found = call("verify", bundle, "--root", tmp_path / "nobody")
    assert (status, found["code"]) == (1, "trust.missing")


# -- install, list, status --------------------------------------------------------------------


def test_status_and_list_of_nothing(tmp_path, call, capsys):
    status, found = call("status", "--root", tmp_path / "new")
    assert status == 0
    assert found["trust"]["code"] == "trust.missing"
    assert found["current"] is None
    assert call("list", "--root", tmp_path / "new")[1]["bundles"] == []
    for command in ("status", "list"):
        assert cli.invoke([command, "--root", str(tmp_path / "new")]) == 0
        assert "airgap install BUNDLE.agb" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_install_needs_site_facts(lab, bundle, call):
    status, found = call("install", bundle, "--root", lab)
    assert (status, found["code"]) == (1, "site.missing")


def test_install_list_status(lab, bundle, call, capsys):
    with_site(lab)
    status, done = call("install", bundle, "--root", lab)
    assert status == 0, done
    assert done["receipt"]["seq"] > 0
    assert done["previous"] is None
    _, found = call("list", "--root", lab)
    assert [item["current"] for item in found["bundles"]] == [True]
    assert found["bundles"][0]["digest"] == done["digest"]
    _, found = call("status", "--root", lab)
    assert found["current"]["digest"] == done["digest"]
    assert found["audit"] is True
    assert found["unfinished"] == []
    assert cli.invoke(["list", "--root", str(lab)]) == 0
    assert capsys.readouterr().out.startswith("* tiny 1.0")
    assert cli.invoke(["status", "--root", str(lab)]) == 0
    assert done["digest"] in capsys.readouterr().out
    assert cli.invoke(["install", str(bundle), "--root", str(lab)]) == 0
    assert "on record" in capsys.readouterr().out
    kinds = [(r["kind"], r["phase"]) for r in records(lab)]
    wanted = [("admin.install", "intent"), ("admission", "event"), ("admin.install", "outcome")]
    assert [item for item in kinds if item in wanted] == wanted * 2


def records(root):
    from airgap.audit.query import read_records

    return list(read_records(root / "audit"))


def test_a_refused_install_is_on_record(lab, bundle, tmp_path, call):
    with_site(lab)
    raw = bundle.read_bytes()
    bad = tmp_path / "bad.agb"
    bad.write_bytes(attacks.flip(raw, len(raw) - 9000))
    status, found = call("install", bad, "--root", lab)
    assert (status, found["code"]) == (1, "chunk.leaf")
    last = [r for r in records(lab) if r["kind"] == "admin.install"][-1]
    assert last["err"]["code"] == "chunk.leaf"
    assert last["data"]["result"] == "refused"
    assert call("list", "--root", lab)[1]["bundles"] == []


def test_a_newer_root_that_travels_along_is_on_record(staging, lab, bundle, tmp_path, call):
    with_site(lab)
    made = trust.load_trust(lab / "trust")
    longer = trust.add_key(
        made,
        bundles.public("mallory"),
        [keys.load_signer(staging / "keys" / "root.pem")],
        now=datetime.now(UTC),
    )
    forge = attacks.Forge.of(bundle.read_bytes())
    forge.trust = trust.chain_document(longer)
    bad = tmp_path / "bad.agb"
    bad.write_bytes(forge.assemble())
    status, found = call("install", bad, "--root", lab)
    assert (status, found["code"]) == (1, "seal.threshold")
    assert trust.load_trust(lab / "trust").version == made.version + 1
    phases = [(r["phase"], r["data"]["new"]) for r in records(lab) if r["kind"] == "admin.trust"]
    assert [phase for phase, _ in phases] == ["intent", "outcome"]
    assert phases[0][1] == f"version {longer.version} {longer.fingerprint}"


def test_an_install_that_is_held_is_on_record_with_its_decision(lab, bundle, call):
    (lab / "site.toml").write_text('[institution]\nname = "x"\nkind = "university"\n')
    status, found = call("install", bundle, "--root", lab)
    assert (status, found["code"]) == (1, "policy.held")
    admission = next(r for r in records(lab) if r["kind"] == "admission")
    assert admission["data"]["result"] == "needs_approval"
    cited = admission["decision"]["id"].removeprefix("sha256:")
    assert (lab / "audit/log/objects" / cited[:2] / cited).is_file()
    assert call("list", "--root", lab)[1]["bundles"] == []


def test_status_tells_damage(lab, bundle, call):
    with_site(lab)
    done = call("install", bundle, "--root", lab)[1]
    manifest = Path(done["folder"]) / "META/manifest.json"
    manifest.parent.chmod(0o755)
    manifest.unlink()
    status, found = call("status", "--root", lab)
    assert status == 0
    assert found["current"]["code"] == "start.digest"
    status, found = call("list", "--root", lab)
    assert (status, found["bundles"]) == (0, [])
    assert [each["code"] for each in found["damaged"]] == ["start.digest"]


def test_the_clock_of_the_log_is_a_floor(lab, bundle, tmp_path):
    from airgap.install.record import last_record

    assert last_record(tmp_path) is None
    with_site(lab)
    assert cli.invoke(["install", str(bundle), "--root", str(lab)]) == 0
    newest = last_record(lab)
    assert NOW <= newest <= datetime.now(UTC)


# -- interrupts and imports -------------------------------------------------------------------


SLOW = """
import os, signal, sys, threading
from airgap import cli
from airgap.cli import bundle
real = bundle.bar
import contextlib
@contextlib.contextmanager
def slow(label):
    with real(label) as tell:
        def paused(done, total):
            tell(done, total)
            print("started", flush=True)
            signal.pause()
        yield paused
bundle.bar = slow
from airgap.cli import install
install.bar = slow
sys.exit(cli.invoke(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["verify", "install"])
def test_ctrl_c_ends_with_130_and_leaves_only_the_quarantine(command, lab, bundle):
    with_site(lab)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, command, str(bundle), "--root", str(lab)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "started\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    if command == "verify":
        assert not (lab / "store").exists()
        return
    store = lab / "store"
    assert not (store / "current").exists()
    assert list((store / "installed").iterdir()) == []
    last = [r for r in records(lab) if r["kind"] == "admin.install"][-1]
    assert last["data"]["result"] == "cancelled"
    assert cli.invoke(["install", str(bundle), "--root", str(lab)]) == 0


def test_verify_loads_no_library_of_an_extra(lab, bundle):
    script = (
        "import sys\nfrom airgap import cli\nstatus = cli.invoke(sys.argv[1:])\n"
        "bad = {'numpy', 'onnx', 'onnxruntime', 'torch', 'rdkit', 'transformers', 'tokenizers'}\n"
        "sys.exit(status or len(bad & set(sys.modules)) + 10 * ('bundle.staging' in sys.modules))"
    )
    argv = [sys.executable, "-c", script, "verify", str(bundle), "--root", str(lab)]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
