"""`airgap policy explain|check` and `airgap site init`: what is printed, and how it ends."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import bundles
import pytest
import typer
from policy_cases import DEMO

from airgap.cli import common
from airgap.cli import policy as commands
from airgap.cli.common import show_error
from bundle import trust
from policy.errors import AirgapError


@pytest.fixture
def root(tmp_path):
    """The tree of the demonstration, for the account that runs the test."""
    text = DEMO.read_text().replace("uid = 0 ", f"uid = {os.getuid()} ")
    (tmp_path / "site.toml").write_text(text)
    return tmp_path


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command line; returns exit status, standard output and standard error."""
    app = typer.Typer()
    commands.register(app)

    def run(*argv, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("airgap.cli.common.stdout._width", columns)
        try:
            status = app(args=[str(each) for each in argv], standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json="--json" in argv)
            status = error.exit_status
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_explain_prints_rule_citation_facts_sources_and_dates(call, root):
    status, out, _ = call(
        "policy", "explain", "--model", "logos-8b", "--project", "route-design", "--root", root
    )
    assert status == 0
    for words in (
        "NEEDS APPROVAL",
        "as of 2026-11-23 (site.toml [policy] as_of)",
        "LIC-CONFLICT version 1",
        "91 FR 35189",
        "{apache-2.0, cc-by-4.0}",
        "[registry: logos-8b]",
        "same_person_as alibaba-group [E-005]",
        "way out: approval by 1 of general_counsel",
        "bundle.verified = true",
        "this outcome does not change",
        "no legal advice",
    ):
        assert words in out


def test_explain_of_a_use_and_its_next_change(call, root):
    use = ("--task", "retrosynthesis", "--project", "route-design", "--root", root)
    status, out, _ = call("policy", "explain", "--model", "logos-ref-tiny", *use)
    assert status == 0
    assert "PERMITTED" in out
    assert "from 2027-02-22 on it needs approval (LIST-STALE)" in out
    status, out, _ = call("policy", "explain", "--model", "logos-ref-tiny", *use, "--json")
    document = json.loads(out)
    assert (document["outcome"], document["as_of"]) == ("permit", "2026-11-23")
    assert "screen.tier = 0" in document["assumed"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_explain_keeps_within_the_terminal(call, root, columns):
    _, out, _ = call(
        *("policy", "explain", "--model", "naturelm", "--project", "sensor-coatings"),
        *("--root", root),
        columns=columns,
    )
    assert max(len(line) for line in out.splitlines()) <= min(columns, 110)
    assert "What is missing" in out


def test_as_of_moves_the_day_and_is_named(call, root):
    argv = ("policy", "explain", "--model", "logos-8b", "--project", "sensor-coatings")
    _, early, _ = call(*argv, "--as-of", "2025-12-17", "--root", root)
    _, late, _ = call(*argv, "--as-of", "2025-12-18", "--root", root)
    assert "as of 2025-12-17 (--as-of)" in early
    assert "US-NDAA26-1532-B version" not in early
    assert "US-NDAA26-1532-B version" in late


def test_check_assumes_nothing_and_exits_by_the_outcome(call, root):
    use = ("--model", "logos-ref-tiny", "--task", "molecule", "--project", "route-design")
    status, _, err = call("policy", "check", *use, "--root", root)
    assert (status, "DEFAULT-DENY" in err) == (1, True)
    good = (
        *("--assume", "bundle.admitted=true", "--assume", "screen.status=complete"),
        *("--assume", "screen.tier=0", "--assume", "screen.classes="),
        *("--assume", "screen.repeated_probing=false"),
    )
    status, out, _ = call("policy", "check", *use, *good, "--root", root)
    assert (status, out.strip()) == (0, "permit by BASE-USE")
    status, out, _ = call("policy", "check", *use, *good, "--root", root, "--json")
    assert (status, json.loads(out)["outcome"]) == (0, "permit")
    status, out, _ = call("policy", "check", *use, "--root", root, "--json")
    assert (status, json.loads(out)["outcome"]) == (1, "deny")


def test_a_denied_use_names_its_citation(call, root):
    status, _, err = call(
        *("policy", "check", "--model", "logos-ref-tiny", "--task", "molecule"),
        *("--project", "sensor-coatings", "--root", root),
    )
    assert status == 1
    assert "policy.denied" in err
    assert "DFARS 252.204-7012" in err


def test_a_hazard_is_told_to_its_officer_only(call, root):
    argv = (
        *("policy", "explain", "--model", "logos-ref-tiny", "--task", "molecule"),
        *("--project", "route-design", "--root", root),
    )
    texts, documents = set(), set()
    for tier in ("3", "4"):
        hit = ("--assume", f"screen.tier={tier}")
        _, out, _ = call(*argv, *hit)
        texts.add(out.replace(f"screen.tier = {tier}", ""))
        _, out, _ = call(*argv, *hit, "--json")
        documents.add(out.replace(f"screen.tier = {tier}", ""))
        assert "HAZ" not in out
    assert (len(texts), len(documents)) == (1, 1)
    assert "Held for review" in texts.pop()

    site = root / "site.toml"
    site.write_text(site.read_text().replace('["principal_investigator"]', '["hazard_officer"]'))
    _, out, _ = call(*argv, "--assume", "screen.tier=3")
    assert "HAZ-CWC1 version 1" in out
    _, out, _ = call(*argv, "--assume", "screen.tier=3", "--json")
    assert "HAZ-CWC1" in out


FAULTS = {
    "nothing asked about": ((), "usage.argument"),
    "two asked about": (("--model", "logos-8b", "--bundle", "x.agb"), "usage.argument"),
    "no such model": (("--model", "logos-9b"), "policy.model"),
    "no such project": (("--model", "logos-8b", "--project", "nope"), "site.project"),
    "no such person": (("--model", "logos-8b", "--person", "eve"), "site.person"),
    "no such fact": (("--model", "logos-8b", "--assume", "screen.teir=0"), "usage.argument"),
    "a derived fact": (
        ("--model", "logos-8b", "--assume", "screen.required=false"),
        "usage.argument",
    ),
    "no value": (("--model", "logos-8b", "--assume", "screen.tier"), "usage.argument"),
    "a value of another type": (
        ("--model", "logos-8b", "--assume", "screen.tier=H0"),
        "usage.argument",
    ),
    "a date that is none": (
        ("--model", "logos-8b", "--assume", "project.award_date=2026-02-30"),
        "usage.argument",
    ),
    "a use without a task": (("--model", "logos-8b", "--scope", "use"), "usage.argument"),
    "no such action": (
        ("--model", "logos-8b", "--task", "molecule", "--action", "fly"),
        "usage.argument",
    ),
    "a bundle that is nowhere": (("--bundle", "nope"), "store.missing"),
}


@pytest.mark.parametrize(("argv", "code"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("command", ["explain", "check"])
def test_a_question_without_sense_is_refused(call, root, command, argv, code):
    status, out, _ = call("policy", command, *argv, "--root", root, "--json")
    document = json.loads(out)
    assert document["code"] == code
    assert status == document["exit"] > 0


def test_assumptions_of_every_kind(call, root):
    argv = ("policy", "explain", "--model", "logos-8b", "--project", "route-design", "--root", root)
    for text in (
        *("project.award_date=2026-01-02", "data.markings=CUI, ITAR", "data.markings="),
        *("system.owner=DoD", "project.active=true", "output.max_sequence_nt=12"),
    ):
        status, out, _ = call(*argv, "--assume", text)
        assert status == 0
        assert text.partition("=")[0] in out


def test_without_site_toml_explain_shows_what_is_missing_and_check_refuses(call, tmp_path):
    status, out, _ = call("policy", "explain", "--model", "logos-8b", "--root", tmp_path)
    assert status == 0
    assert "there is no site.toml" in out
    assert "What is missing" in out
    status, _, err = call("policy", "check", "--model", "logos-8b", "--root", tmp_path)
    assert (status, "site.missing" in err) == (1, True)


def test_a_bundle_file_is_opened_and_its_seal_verified(call, root, tmp_path):
    junk = tmp_path / "junk.agb"
    junk.write_bytes(b"no bundle")
    status, out, _ = call("policy", "explain", "--bundle", junk, "--root", root, "--json")
    assert status in {1, 3}
    assert json.loads(out)["code"].split(".")[0] in {"trust", "archive", "seal", "host"}


def test_site_init_writes_once(call, tmp_path):
    status, out, _ = call("site", "init", "--root", tmp_path / "tree")
    assert (status, "site.toml" in out) == (0, True)
    status, out, _ = call("site", "init", "--root", tmp_path / "tree", "--json")
    assert (status, json.loads(out)["code"]) == (1, "site.exists")
    shutil.rmtree(tmp_path / "tree")


def test_an_account_without_a_name_is_its_number(monkeypatch):
    def nobody(_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert common.account_name() == str(os.getuid())


@pytest.fixture
def sealed(root):
    """A bundle of the reference model under a good seal, and the trust root of this tree."""
    now = datetime.now(UTC).replace(microsecond=0)
    long_ago = datetime(2001, 1, 1, tzinfo=UTC)
    made = trust.new_root(
        bundles.public("root"),
        bundles.signer("root"),
        now=long_ago,
        valid_for=timedelta(days=36_500),
    )
    for name in ("builder", "alice", "bob"):
        made = trust.add_key(made, bundles.public(name), [bundles.signer("root")], now=long_ago)
    trust.save_trust(made, root / "trust")
    model = {
        "id": "logos-ref-tiny",
        "source": "local:logos-ref-tiny",
        "licence": {
            "spdx": "Apache-2.0",
            "text_digest": f"sha256:{'1' * 64}",
            "status": "declared",
        },
    }
    path = root / "tiny.agb"
    bundles.make_bundle(
        path,
        roots=made,
        members=bundles.make_members(model="logos-ref-tiny"),
        model=model,
        created=now,
        not_before=now,
        expires=now + timedelta(days=30),
    )
    return path


def test_a_sealed_bundle_is_explained_and_not_taken_for_verified(call, root, sealed):
    argv = ("--bundle", sealed, "--project", "route-design", "--root", root, "--json")
    status, out, _ = call("policy", "explain", *argv)
    document = json.loads(out)
    assert (status, document["outcome"]) == (0, "permit_with_obligations")
    assert document["assumed"] == ["bundle.verified = true"]
    assert document["request"]["bundle"].startswith("sha256:")
    # The head alone was read, so a check does not count the body as verified.
    status, out, _ = call("policy", "check", *argv)
    document = json.loads(out)
    assert (status, document["outcome"]) == (1, "deny")
    assert (document["exit"], document["code"]) == (1, "policy.denied")
    status, out, _ = call("policy", "check", *argv, "--assume", "bundle.verified=true")
    assert (status, json.loads(out)["exit"]) == (0, 0)


def test_a_bundle_with_a_bad_seal_is_not_explained(call, root, sealed):
    content = bytearray(sealed.read_bytes())
    content[content.index(b'"sig":"') + 10] ^= 1
    sealed.write_bytes(content)
    status, out, _ = call("policy", "explain", "--bundle", sealed, "--root", root, "--json")
    assert status == 1
    assert json.loads(out)["code"].startswith("seal.")
