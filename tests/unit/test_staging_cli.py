"""The commands as a person types them: exit status, one JSON document, nothing left half done."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime

import bundles
import pytest
import tiny_llama
import typer
from staging_runs import build_tiny
from typer.testing import CliRunner

from airgap.cli import staging, wheels
from bundle.keys import load_signer, new_key
from bundle.staging.sign import count, read_draft
from bundle.trust import add_key, new_root, save_trust
from policy.errors import AirgapError, RefusedError, UsageError

SITE = """
[institution]
name = "Example Lab"
kind = "university"
state = "MA"
legal_zone = "UTC"
public = false
[system]
owner = "institution"
ic_nss = false
state_business = false
cui_authorised = false
in_ssp = false
[transaction]
buyer = "institution"
kind = "own_work"
[[project]]
id = "chem-1"
title = "Trying it out"
sponsors = ["NIH"]
instrument = "grant"
federal_funds = true
active = true
closed = false
principal_investigators = ["pi"]
actions = ["infer"]
subjects = []
[project.data]
markings = []
export_class = "fundamental_research"
[project.deliverable]
to_dod = false
embeds_model_or_output = false
[project.performance]
dod_contract = false
[[person]]
id = "pi"
name = "P. I."
uid = 0
roles = ["principal_investigator"]
projects = ["chem-1"]
training_until = 2027-06-30
us_person = true
record = "file 12"
"""


def call(*words, expect: int = 0, stdin: str = ""):
    """Run one command of the group; returns (standard output, error or None)."""
    app = typer.Typer()
    staging.register(app)
    done = CliRunner().invoke(
        app, [str(word) for word in words], input=stdin, standalone_mode=False
    )
    if isinstance(done.exception, AirgapError):
        assert done.exception.exit_status == expect
        return done.stdout, done.exception
    assert done.exception is None, done.exception
    assert (done.return_value or 0) == expect
    return done.stdout, None


@pytest.fixture
def snapshot(tmp_path):
    return tiny_llama.write_snapshot(tmp_path / "model")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A staging root with keys, people and facts of a site."""
    folder = tmp_path_factory.mktemp("root")
    keys = folder / "keys"
    new = [
        new_key(keys, name, person=person, roles=(role,))
        for name, person, role in (
            ("root", "rosa", "root"),
            ("builder", "ben", "builder"),
            ("isso", "ivy", "isso"),
            ("export", "carl", "export"),
        )
    ]
    trust = new_root(new[0], load_signer(keys / "root.pem"), now=bundles.ENROLLED)
    for public in new[1:]:
        trust = add_key(trust, public, [load_signer(keys / "root.pem")], now=bundles.ENROLLED)
    save_trust(trust, folder / "trust")
    (folder / "site.toml").write_text(SITE)
    return folder


# -- inspect ----------------------------------------------------------------------------------


def test_inspect_prints_one_document(snapshot):
    out, _ = call("inspect", snapshot, "--json")
    document = json.loads(out)
    assert (document["verdict"], document["format"]) == ("ready", "airgap-inspect/1")
    assert document["digest"].startswith("sha256:")


def test_inspect_prints_a_report(snapshot, tmp_path):
    out, _ = call("inspect", snapshot, "--html", tmp_path / "r.html")
    assert "ready to build" in out
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_inspect_ends_with_1_and_a_code_when_it_refuses(snapshot, tmp_path):
    (snapshot / "w.bin").write_bytes(b"x")
    out, _ = call("inspect", snapshot, "--json", "--html", tmp_path / "r.html", expect=1)
    document = json.loads(out)
    assert (document["verdict"], document["code"], document["exit"]) == (
        "refused",
        "scan.pickle",
        1,
    )
    assert "scan.pickle" in (tmp_path / "r.html").read_text()
    out, _ = call("inspect", snapshot, expect=1)
    assert "✗ refused" in out


@pytest.mark.parametrize("place", ["absent", "/dev/null", "/proc/self/environ"])
def test_inspect_of_what_is_no_snapshot(tmp_path, place):
    out, error = call("inspect", tmp_path / place, "--json", expect=1)
    # A file is taken for a bundle, of which this one has not the beginning.
    known = {"/proc/self/environ": {"archive.truncated"}}
    assert error.code in known.get(place, {"source.missing", "source.type"})
    assert error.hint
    assert out == ""


# -- build ------------------------------------------------------------------------------------


def seal_works() -> str:
    """Return why this host cannot seal a conversion, or nothing."""
    from airgap.enclave import survey

    facts = survey()
    return "" if facts.landlock_abi or facts.sys_admin else "no namespaces and no Landlock here"


def run_build(snapshot, root, out, *more):
    return (
        *("build", snapshot, "-o", out, "--name", "logos-ref-tiny", "--version", "1.0"),
        *("--key", root / "keys" / "builder.pem", "--root", root, "--project", "chem-1"),
        *("--supplier", "airgap project", "--jurisdiction", "none", *more),
    )


def test_build_asks_the_policy_of_the_site(snapshot, root, tmp_path):
    (snapshot / "README.md").write_text("# no licence, no level\n")
    _, error = call(*run_build(snapshot, root, tmp_path / "x.agb"), expect=1)
    assert error.code in {"policy.denied", "policy.held"}
    assert not (tmp_path / "x.agb").exists()


def test_build_without_a_site_is_refused(snapshot, root, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "trust").symlink_to(root / "trust")
    words = run_build(snapshot, root, tmp_path / "x.agb")
    words = tuple(tmp_path / "bare" if word == root else word for word in words)
    _, error = call(*words, expect=1)
    assert error.code == "site.missing"


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01T00:00:00Z", "2026-01-01"])
def test_build_takes_one_form_of_time(snapshot, root, tmp_path, text):
    _, error = call(*run_build(snapshot, root, tmp_path / "x.agb", "--created", text), expect=2)
    assert isinstance(error, UsageError)


def test_time_of_a_release(monkeypatch):
    assert staging._created("2026-01-31T12:00:00Z") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert staging._created(None) == datetime(1970, 1, 1, tzinfo=UTC)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(UsageError):
        staging._created(None)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert staging._created(None).microsecond == 0


@pytest.mark.slow
@pytest.mark.parametrize("after", ["scan", "convert"])
def test_an_interrupt_ends_with_130_and_leaves_nothing(snapshot, root, tmp_path, after):
    if reason := seal_works():
        pytest.skip(reason)
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from airgap.cli import invoke; sys.exit(invoke(sys.argv[1:]))"
    )
    out = tmp_path / "out" / "x.agb"
    out.parent.mkdir()
    with (tmp_path / "pins").open("wb") as pins:
        names = sorted(path.name for path in snapshot.iterdir())
        subprocess.run(["sha256sum", *names], cwd=snapshot, stdout=pins, check=True)
    words = run_build(
        snapshot, root, out, "--pin", tmp_path / "pins", "--created", "2026-06-01T12:00:00Z"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        deadline = time.monotonic() + 60
        graph = out.parent / ".x.agb.work" / "graph"
        while time.monotonic() < deadline and child.poll() is None:
            if after == "scan" or graph.exists():
                break
            time.sleep(0.02)
        if after == "scan":
            time.sleep(0.8)
        child.send_signal(signal.SIGINT)
        _, words_ = child.communicate(timeout=60)
    assert child.returncode == 130, words_.decode()
    assert b"Traceback" not in words_
    assert list(out.parent.iterdir()) == []


# -- sign -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory, root):
    folder = tiny_llama.write_snapshot(tmp_path_factory.mktemp("s") / "model")
    from bundle.trust import load_trust

    trust = load_trust(root / "trust")
    signer = load_signer(root / "keys" / "builder.pem")
    return build_tiny(folder, folder.parent / "tiny.agb", trust=trust, signer=signer)


@pytest.fixture
def draft(built, tmp_path):
    place = tmp_path / "tiny.agb"
    place.write_bytes(built.path.read_bytes())
    return place


def test_sign_counts_people(draft, root):
    key = root / "keys" / "isso.pem"
    out, _ = call("sign", draft, "--key", key, "--root", root, "--confirm", "tiny", "--json")
    document = json.loads(out)
    assert (document["signed_by"], document["people"], document["needed"]) == ("ivy", ["ivy"], 2)
    assert document["complete"] is False
    key = root / "keys" / "export.pem"
    out, _ = call("sign", draft, "--key", key, "--root", root, "--confirm", "tiny")
    assert "2 of 2 approvers: carl, ivy" in out


def test_sign_without_a_terminal_or_a_confirmation_is_refused(draft, root):
    before = draft.read_bytes()
    _, error = call("sign", draft, "--key", root / "keys" / "isso.pem", "--root", root, expect=1)
    assert error.code == "sign.confirm"
    assert "--confirm" in error.hint
    assert draft.read_bytes() == before


def test_the_builder_does_not_approve(draft, root):
    key = root / "keys" / "builder.pem"
    _, error = call("sign", draft, "--key", key, "--root", root, "--confirm", "tiny", expect=1)
    assert error.code == "seal.people"


def test_sign_of_what_is_no_bundle(snapshot, root):
    key = root / "keys" / "isso.pem"
    place = snapshot / "model.safetensors"
    _, error = call("sign", place, "--key", key, "--root", root, "--confirm", "x", expect=1)
    assert error.code.startswith("archive.")


def test_a_draft_that_two_have_signed_counts_for_a_host(draft, root):
    from bundle.trust import load_trust

    for name in ("isso", "export"):
        call(
            "sign",
            draft,
            "--key",
            root / "keys" / f"{name}.pem",
            "--root",
            root,
            "--confirm",
            "tiny",
        )
    assert count(read_draft(draft), load_trust(root / "trust")).complete


# -- small things -----------------------------------------------------------------------------


def test_a_missing_library_is_a_fault_that_says_what_to_install():
    with pytest.raises(AirgapError) as caught, wheels.staging():
        import absent_library  # noqa: F401
    assert caught.value.code == "host.extra"
    assert "absent_library" in caught.value.message
    assert "staging" in caught.value.hint


def test_other_errors_pass_through():
    with pytest.raises(RefusedError), wheels.staging():
        raise RefusedError("source.empty", "x")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "nowhere", "empty"])
def test_a_report_never_takes_the_place_of_something_else(snapshot, tmp_path, kind):
    """A rename over a device as root would replace the device."""
    out = tmp_path / "report.html"
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "link":
        out.symlink_to("/dev/null")
    elif kind == "folder":
        out.mkdir()
    else:
        out = tmp_path / "no" / "report.html" if kind == "nowhere" else ""
    _, error = call("inspect", snapshot, "--html", out, expect=2)
    assert error.code == "usage.argument"
    assert "--html" in error.message
    if out:
        assert kind == "nowhere" or not stat.S_ISREG(out.lstat().st_mode)
    assert not list(tmp_path.glob(".*"))


def test_a_release_that_would_outlive_the_calendar_is_refused():
    with pytest.raises(UsageError) as caught:
        staging._expires(datetime(9999, 12, 31, tzinfo=UTC), 365)
    assert caught.value.code == "usage.argument"
    assert staging._expires(datetime(2026, 1, 1, tzinfo=UTC), 1) == datetime(2026, 1, 2, tzinfo=UTC)
