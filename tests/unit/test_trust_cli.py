"""`airgap keys`, `trust` and `revoke` on the command line, as people type them."""

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
import typer
from typer.testing import CliRunner

from airgap.cli import trust as commands
from airgap.install import Store
from bundle import keys
from policy.errors import AirgapError


def app():
    made = typer.Typer()
    commands.register(made)
    return made


APP = app()


def call(*words, code=""):
    result = CliRunner().invoke(APP, [*map(str, words)])
    if code:
        assert isinstance(result.exception, AirgapError), result.output
        assert result.exception.code == code
        return {}
    assert result.exception is None, result.exception
    return json.loads(result.stdout) if "--json" in words else result.stdout


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "site"
    for name, person, role in (
        ("root", "rita", "root"),
        ("revocation", "reva", "revocation"),
        ("alice", "alice", "approver"),
    ):
        call("keys", "new", name, "--person", person, "--role", role, "--root", root)
    call("trust", "init", "--root", root)
    call(
        "trust",
        "add",
        root / "keys/revocation.pub.json",
        root / "keys/alice.pub.json",
        "--root",
        root,
    )
    return root


@pytest.fixture
def host(site, tmp_path):
    root = tmp_path / "host"
    shown = call("trust", "show", "--root", site, "--json")
    source = site / "trust/root.json"
    wrong = "sha256:" + "0" * 64
    options = ("--from", source, "--root", root, "--fingerprint")
    call("trust", "init", *options, wrong, code="trust.fingerprint")
    call("trust", "init", *options, shown["fingerprint"])
    return root


def keyid(root, name):
    return json.loads((root / f"keys/{name}.pub.json").read_text())["keyid"]


def test_a_list_is_made_here_and_taken_there(site, host, tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    call("revoke", "show", "--root", site, code="trust.revocation")
    call("revoke", "create", "--person", "eve", "-o", first, "--root", site, code="usage.argument")
    made = call("revoke", "create", "--person", "eve", "--reason", "left", "-o", first,
                "--root", site, "--json")  # fmt: skip
    assert made == {"file": str(first), "complete": True, "version": 1}
    digest = "a" * 64
    call("revoke", "create", "--model", digest, "--bundle", digest, "--reason", "bad", "-o",
         second, "--root", site)  # fmt: skip
    call("trust", "import-revocations", second, "--root", host)
    call("trust", "import-revocations", first, "--root", host, code="trust.revocation")
    shown = call("trust", "show", "--root", host, "--json")["revocations"]
    assert (shown["version"], shown["entries"], shown["alarm"]) == (2, 3, "")
    listed = call("revoke", "show", "--root", host, "--json")
    assert listed["people"] == {"eve": "left"}
    assert listed["models"] == {digest: "bad"}
    call("revoke", "create", "--model", "x", "--reason", "y", "-o", first, "--root", site,
         code="trust.revocation")  # fmt: skip


def test_a_list_of_nobody_is_not_kept(site, tmp_path):
    out = tmp_path / "list.json"
    made = call("revoke", "create", "--person", "eve", "--reason", "x", "-o", out, "--key",
                "alice", "--root", site, "--json")  # fmt: skip
    assert not made["complete"]
    assert call("trust", "show", "--root", site, "--json")["revocations"] is None
    call("revoke", "sign", out, "--key", "revocation", "--confirm", "0" * 8, "--root", site,
         code="sign.confirm")  # fmt: skip


def test_two_sign_a_list(site, tmp_path):
    call("keys", "new", "rob", "--person", "rob", "--role", "revocation", "--root", site)
    call("trust", "add", site / "keys/rob.pub.json", "--root", site)
    call("trust", "threshold", "--revocation-people", "2", "--stale", "refuse", "--list-required",
         "--root", site)  # fmt: skip
    out = tmp_path / "list.json"
    made = call("revoke", "create", "--person", "eve", "--reason", "x", "-o", out, "--root", site,
                "--json")  # fmt: skip
    assert not made["complete"]
    from bundle.envelope import parse_envelope
    from policy.terms import Digest

    digest = Digest.of(parse_envelope(out.read_bytes().strip()).payload).hex
    done = call("revoke", "sign", out, "--key", "rob", "--confirm", digest[:8], "--root", site,
                "--json")  # fmt: skip
    assert done["complete"]


def test_roots_travel_forward_only(site, host, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    call("trust", "export", old, "--root", site, "--keys", tmp_path / "pem")
    (pem,) = (tmp_path / "pem").iterdir()
    assert pem.name == f"alice-{keyid(site, 'alice')[:8]}.pem"
    call("trust", "renew", "--days", "10", "--root", site)
    call("trust", "export", new, "--root", site)
    assert call("trust", "import", new, "--root", host, "--json")["version"] == 3
    call("trust", "import", old, "--root", host, code="trust.chain")
    call("trust", "init", "--root", host, code="trust.exists")
    (tmp_path / "x.json").write_text("{}")
    call("trust", "import", tmp_path / "x.json", "--root", host, code="trust.chain")


def test_the_root_key_is_rotated(site):
    call("keys", "new", "root2", "--person", "rita", "--role", "root", "--root", site)
    words = ("trust", "rotate", site / "keys/root2.pub.json", "--old", keyid(site, "root"))
    call(*words, "--key", "root2", "--root", site, code="trust.chain")
    call(*words, "--key", "root", "--key", "root2", "--root", site)
    call("trust", "renew", "--root", site, code="trust.chain")
    call("trust", "renew", "--key", "root2", "--root", site)


def test_people_leave_and_keys_go(site):
    call("trust", "retire", "alice", "--root", site)
    shown = call("trust", "show", "--root", site, "--json")
    assert "valid_to" in shown["people"]["alice"]
    call("trust", "remove", keyid(site, "alice"), "--root", site)
    assert "alice" not in call("trust", "show", "--root", site, "--json")["people"]
    call("trust", "remove", "0" * 64, "--root", site, code="trust.root")
    call("trust", "threshold", "--stale", "never", "--root", site, code="usage.argument")


def test_a_proposal_is_signed_apart(site, tmp_path):
    call("keys", "new", "rolf", "--person", "rolf", "--role", "root", "--root", site)
    call("trust", "add", site / "keys/rolf.pub.json", "--root", site)
    call(
        "trust", "threshold", "--root-people", "2", "--key", "root", "--key", "rolf", "--root", site
    )
    other = tmp_path / "rolf"
    shutil.copytree(site, other)
    proposal = tmp_path / "next.json"
    told = call("trust", "renew", "--propose", proposal, "--root", site, "--json")
    assert "rolf" in told["missing"]
    call("trust", "import", proposal, "--root", site, code="trust.chain")
    words = ("trust", "sign", proposal, "--key", "rolf", "--root", other)
    call(*words, "--confirm", "00000000", code="sign.confirm")
    call(*words, code="sign.confirm")  # no terminal
    digest = told["digest"].removeprefix("sha256:")
    assert call(*words, "--confirm", digest[:8], "--json")["missing"] == ""
    assert call("trust", "import", proposal, "--root", site, "--json")["version"] == 5


def test_a_site_of_the_profile_cnsa2(tmp_path):
    root = tmp_path / "site"
    call("keys", "new", "root", "--profile", "cnsa2", "--person", "rita", "--role", "root",
         "--root", root)  # fmt: skip
    call("trust", "init", "--profile", "cnsa2", "--root", root)
    call("keys", "new", "alice", "--profile", "cnsa2", "--person", "alice", "--role", "approver",
         "--root", root)  # fmt: skip
    paths = sorted((root / "keys").glob("alice-*.pub.json"))
    half = ("--key", root / "keys/root-ml-dsa-87.pem")
    call("trust", "add", *paths, *half, "--root", root, code="trust.chain")
    shown = call("trust", "add", *paths, "--root", root, "--json")
    assert shown["profile"] == "cnsa2"
    assert len(shown["people"]["alice"]["keys"]) == 2
    call("keys", "new", "x", "--profile", "weak", "--person", "x", "--role", "x", "--root", root,
         code="usage.argument")  # fmt: skip
    call("trust", "init", "--profile", "weak", "--root", tmp_path / "n", code="usage.argument")


def test_a_default_root_is_no_root_of_cnsa2(tmp_path):
    keys.new_key(tmp_path / "keys", "root", person="rita", roles=("root",))
    call("trust", "init", "--profile", "cnsa2", "--root", tmp_path, code="trust.root")
    keys.new_key(tmp_path / "keys", "other", person="rita", roles=("root",))
    shutil.copy(tmp_path / "keys/other.pub.json", tmp_path / "keys/root.pub.json")
    call("trust", "init", "--root", tmp_path, code="trust.keyfile")


def test_a_clock_that_ran_ahead_is_forgotten_once(site, host, tmp_path):
    store = Store(host / "store")
    with store.locked():
        store.note_time(datetime.now(UTC) + timedelta(days=3000))
    told = call("trust", "clock", "--root", host, "--json")
    assert told["behind"]
    assert "clock-sign" in call("trust", "clock", "--root", host)
    statement = tmp_path / "clock.json"
    words = ("trust", "clock-sign", statement, "--reason", "battery", "--root", site)
    call(*words, "--forget", "yesterday", "--key", "root", code="usage.argument")
    call(*words, "--forget", told["latest"], "--key", "alice")
    call("trust", "clock-reset", statement, "--root", host, code="trust.clock")
    call("trust", "clock-sign", statement, "--key", "root", "--root", site)
    done = call("trust", "clock-reset", statement, "--root", host, "--json")
    assert done["forgotten"] == told["latest"]
    assert not call("trust", "clock", "--root", host, "--json")["behind"]
    call("trust", "clock-reset", statement, "--root", host, code="trust.clock")


@pytest.mark.parametrize("scheme", ["ed25519", "ecdsa-p384"])
def test_a_file_is_signed_for_openssl(site, tmp_path, scheme):
    words = ("--person", "bob", "--role", "approver", "--scheme", scheme, "--root", site)
    call("keys", "new", "bob", *words)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  airgap-1.0-py3-none-any.whl\n")
    options = ("--key", "bob", "--root", site, "--json")
    call("trust", "sign-file", sums, *options, code="trust.root")  # nobody knows bob yet
    call("trust", "add", site / "keys/bob.pub.json", "--root", site)
    (made,) = call("trust", "sign-file", sums, *options)["signatures"]
    call("trust", "export", tmp_path / "chain.json", "--root", site, "--keys", tmp_path)

    def verify():
        return subprocess.run(
            made["verify"].split(), cwd=tmp_path, capture_output=True, check=False
        ).returncode

    assert verify() == 0
    sums.write_text(sums.read_text().replace("1.0", "1.1"))
    assert verify() == 1


def test_an_older_release_is_approved_by_one_person_after_another(site, tmp_path):
    """The first signs what she names, the next one what the file says."""
    import bundles

    older = tmp_path / "older.agb"
    manifest = bundles.make_bundle(older, epoch=3)
    out, mark = tmp_path / "rollback.json", f"5@sha256:{'5' * 64}"
    words = ("trust", "rollback-sign", out, "--root", site, "--json")
    first = ("--release", older, "--reason", "release 5 is wrong", "--key", "alice")
    call(*words, *first, code="trust.rollback")  # this tree has no mark of its own
    made = call(*words, *first, "--above", mark)
    assert (made["bundle"], made["epoch"], made["signatures"]) == (str(manifest.digest), 3, 1)
    assert made["above"] == {"epoch": 5, "bundle": f"sha256:{'5' * 64}"}
    call(*words, "--key", "root", "--confirm", "00000000", code="sign.confirm")
    digest = made["digest"].removeprefix("sha256:")
    again = call(*words, "--key", "root", "--confirm", digest[:8])
    assert (again["signatures"], again["digest"]) == (2, made["digest"])
    call(*words, "--key", "root", "--confirm", digest[:8], code="seal.malformed")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--reason", "x"),
        ("--release", "x.agb"),
        ("--release", "none", "--reason", "x"),
        ("--above", "five", "--reason", "x"),
    ],
)
def test_an_approval_that_names_nothing_is_not_written(site, tmp_path, wrong):
    out = tmp_path / "rollback.json"
    result = CliRunner().invoke(
        APP, ["trust", "rollback-sign", str(out), "--key", "alice", "--root", str(site), *wrong]
    )
    assert isinstance(result.exception, AirgapError), result.output
    assert not out.exists()
