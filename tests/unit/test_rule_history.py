"""What was held when: rules kept by the log, decisions made again, logged questions, horizon."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime

import bundles
import pytest
import typer
from policy_cases import pack_text, rule
from policy_site import TRUST, deciding, put_signed
from test_holds import FAMILY, held, writes
from test_serve_broker import MODEL, Helper, Worker, job

from airgap import rule_history, rulework
from airgap.audit import Actor, open_log
from airgap.audit.layout import Layout
from airgap.cli import policy as commands
from airgap.cli.common import show_error
from airgap.config import parse_site
from airgap.demo import site_toml
from airgap.dossier.usage import judge
from airgap.holds import Holds
from airgap.install import install
from airgap.install.record import admission, recorder
from airgap.rule_history import History
from airgap.rules import load_rules
from bundle import trust
from policy.approvals import Approvals
from policy.errors import AirgapError, RefusedError
from policy.replay import request_of_record, times_of_record
from policy.terms import Digest

PROJECT = "route-design"
NOTED = pack_text(
    rule(id="SITE-1", effect="deny", when="{eq: [task.action, export_weights]}"), pack_id="site"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tree with decisions under shipped rules, then under a signed pack of the site beside them.

    Yields the tree, its site, and three instants: before anything, between, and after.
    """
    root = tmp_path_factory.mktemp("lab")
    text = site_toml(os.getuid()).replace("as_of = ", "# as_of = ")
    (root / "site.toml").write_text(text)
    trust.save_trust(TRUST, root / "trust")
    site = parse_site(text.encode())
    instants = [datetime.now(UTC)]

    def ask(rules, *frames):
        use_policy = deciding(site, rules, MODEL.bundle)

        broker = Broker_(log, use_policy, root)
        if frames:
            held(broker, frames=frames[0])
        else:
            broker.infer(job())

    with open_log(root, site="Test Lab") as log:
        rules = load_rules(root)
        rule_history.put_on_record(log, rules)
        ask(rules)
        instants.append(datetime.now(UTC))
        put_signed(root, "site.yaml", NOTED)
        rules = load_rules(root)
        rule_history.put_on_record(log, rules)
        ask(rules)
        ask(rules, writes(FAMILY))
        instants.append(datetime.now(UTC))
    return root, site, instants


def Broker_(log, use_policy, root):  # noqa: N802 - makes one
    from airgap.serve.broker import Broker

    broker = Broker(log, Worker(), Helper(), MODEL, Actor("Ada Example"), use_policy)
    broker.restricted = root / "restricted"
    broker.holds = Holds(root, TRUST.document, "ada")
    return broker


@pytest.fixture
def history(lab):
    return History.of(lab[0] / "audit", judge(lab[0] / "audit", None))


@pytest.fixture
def call(capsys, lab):
    app = typer.Typer()
    commands.register(app)

    def run(*argv, root=lab[0]):
        try:
            line = ["policy", *map(str, argv), "--root", str(root), "--json"]
            status = app(args=line, standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        return status, json.loads(capsys.readouterr().out)

    return run


def test_the_rules_of_an_instant_are_those_that_were_loaded_last_by_then(lab, history):
    root, _, (start, between, after) = lab
    assert len(history.loads) == 2
    earlier, later = history.rules_at(between), history.rules_at(after)
    assert "SITE-1" not in {each.id for each in earlier.packs.rules}
    assert "SITE-1" in {each.id for each in later.packs.rules}
    today = load_rules(root)
    assert [each.digest for each in later.packs.packs] == [
        each.digest for each in today.packs.packs
    ]
    assert later.registry.digest == today.registry.digest
    with pytest.raises(RefusedError) as caught:
        history.rules_at(start)
    assert caught.value.code == "policy.known_at"
    assert "no load of rules by then, the first was at" in caught.value.message


def test_an_instant_of_which_nothing_is_on_record_is_never_answered_with_todays_rules(call, lab):
    _, _, (start, between, _) = lab
    question = ("explain", "--model", "logos-ref-tiny", "--project", PROJECT)
    status, answer = call(*question, "--known-at", between.isoformat())
    assert status == 0
    assert answer["known_at"].startswith(f"{between:%Y-%m-%dT%H:%M:%S}")
    assert "site" not in {each["pack_id"] for each in answer["packs"]}
    assert "site" in {each["pack_id"] for each in call(*question)[1]["packs"]}
    status, refused = call(*question, "--known-at", start.isoformat())
    assert (status, refused["code"]) == (1, "policy.known_at")
    status, refused = call(*question, "--known-at", "2999-01-01")
    assert (status, refused["code"]) == (2, "usage.argument")
    assert call(*question, "--known-at", "soon")[0] == 2
    # An earlier day of law alone keeps the rules of today, and says so.
    _, answer = call(*question, "--as-of", "2026-06-07")
    assert any("--known-at" in each for each in answer["assumed"])


def test_every_decision_of_the_log_comes_out_the_same_to_the_byte(call, lab):
    status, answer = call("replay")
    assert status == 0
    assert answer["same"] >= 4
    assert (answer["differs"], answer["not_possible"]) == (0, 0)
    assert answer["public_part_only"] == 1  # the hazard hold: its whole record is restricted
    one = next(each for each in answer["decisions"] if each["replay"] == "same")
    status, alone = call("replay", one["decision"][7:19])
    assert (status, alone["decisions"]) == (0, [one])
    status, refused = call("replay", "0000")
    assert (status, refused["code"]) == (1, "policy.record")
    (restricted,) = (lab[0] / "restricted").glob("*.json")
    status, whole = call("replay", restricted)
    assert (status, whole["same"], whole["decisions"][0]["outcome"]) == (0, 1, "needs_approval")


def cited(root, kind):
    return [r for r in rulework_records(root) if r["kind"] == kind and "decision" in r]


def test_a_decision_of_the_log_is_explained_by_id_request_and_number(call, lab):
    root = lab[0]
    record = [r for r in cited(root, "inference") if r["phase"] == "outcome"][-1]
    digest = record["decision"]["id"]
    status, by_id = call("explain", digest)
    assert status == 0
    assert by_id["logged"] == {
        "decision": digest,
        "record": by_id["logged"]["record"],
        "replay": "made again, the same to the byte",
    }
    assert (by_id["outcome"], by_id["scope"]) == (record["decision"]["outcome"], "use")
    assert {each["state"] for each in by_id["trace"]} >= {"fired", "not_fired"}
    for name in (digest[7:19], record["req"], f"#{record['seq']}", f"{record['seq']}"):
        assert call("explain", name) == (0, by_id), name
    for name in ("#999999", "0" * 26, "sha256:", "nobody", "x#", "#0"):
        status, refused = call("explain", name)
        assert (status, refused["code"]) == (1, "policy.record"), name
    assert call("explain", digest, "--project", PROJECT)[1]["code"] == "usage.argument"


def test_of_a_hazard_decision_only_its_officer_is_told_the_rule(call, lab, tmp_path):
    root = lab[0]
    record = cited(root, "denial")[-1]
    status, told = call("explain", f"#{record['seq']}")
    assert (status, told["held_for_review"], told["outcome"]) == (0, True, "needs_approval")
    assert "HAZ-CWC1" not in json.dumps(told)
    other = tmp_path / "other"
    shutil.copytree(root, other)
    site = (other / "site.toml").read_text()
    (other / "site.toml").write_text(
        site.replace('["principal_investigator"]', '["hazard_officer"]')
    )
    _, whole = call("explain", f"#{record['seq']}", root=other)
    assert "HAZ-CWC1" in {each["rule"] for each in whole["reasons"]}
    # Where the whole record is not there, the public part is told, and says so.
    shutil.rmtree(other / "restricted")
    _, part = call("explain", f"#{record['seq']}", root=other)
    assert part["logged"]["replay"] == "public part only"
    assert "HAZ-CWC1" not in json.dumps(part)


def test_an_explained_decision_is_shown_in_words(lab, capsys):
    app = typer.Typer()
    commands.register(app)
    root = lab[0]
    held_, answered = cited(root, "denial")[-1], cited(root, "inference")[-1]

    def show(record, where=root):
        line = ["policy", "explain", f"#{record['seq']}", "--root", str(where)]
        assert not app(args=line, standalone_mode=False)
        return capsys.readouterr().out

    shown = show(answered)
    assert "BASE-USE" in shown
    assert "made again, the same to the byte" in " ".join(shown.replace("│", " ").split())
    assert "Held for review" in show(held_)


def test_another_record_is_told_from_the_one_that_was_made(lab, history):
    root, _, _ = lab
    digest = next(
        each["decision"]["id"]
        for each in rulework_records(root)
        if each["kind"] == "inference" and "decision" in each
    )
    document = json.loads(Layout(root / "audit").object(Digest.parse(digest).hex).read_bytes())
    rules = history.rules_of(history.loads[0])
    assert rule_history.made_with(document, rules) == ""
    assert rule_history.replay(document, rules).same
    changed = {**document, "outcome": "deny", "summary": "deny by nobody"}
    made = rule_history.replay(changed, rules)
    assert (made.same, made.differs) == (False, "outcome")
    newer = history.rules_of(history.loads[1])
    assert "a pack more" in rule_history.made_with(document, newer)
    lost = {**document, "packs": [{**document["packs"][0], "digest": f"sha256:{'0' * 64}"}]}
    assert f"sha256:{'0' * 64}" in rule_history.made_with(lost, rules)
    with pytest.raises(RefusedError):
        request_of_record({**document, "request": {}})


def rulework_records(root):
    from airgap.audit.query import read_records

    return read_records(root / "audit")


def test_rules_that_the_log_lost_are_named(history, tmp_path):
    empty = replace(history, folder=tmp_path)
    with pytest.raises(RefusedError) as caught:
        empty.rules_of(history.loads[0])
    assert caught.value.code == "audit.object"
    kept = Layout(tmp_path).object(Digest.parse(history.loads[0].kept).hex)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b'{"format":"another"}')
    with pytest.raises(RefusedError) as caught:
        empty.rules_of(history.loads[0])
    assert caught.value.code == "audit.object"


def test_logged_questions_are_the_whole_decisions_of_the_log_each_once(lab, tmp_path):
    root, _, (_, _, after) = lab
    found = rulework.logged_questions(root, Approvals())
    assert found.left_out == 1  # the hazard hold
    assert len({each.name for each in found.questions}) == len(found.questions) >= 4
    assert all(each.known_at <= after for each in found.questions)
    for each in found.questions:
        assert each.request.project == PROJECT
        assert each.request.submitter == "ada"
    assert rulework.logged_questions(tmp_path, Approvals()) == rulework.Logged((), 0)


def test_diff_asks_the_logged_decisions_again_under_a_draft(call, lab, tmp_path):
    status, same = call("diff", lab[0] / "policy" / "site.yaml")
    assert (status, same["changes"]) == (0, [])
    assert (same["logged"], same["logged_left_out"]) == (same["questions"] - 322, 1)
    draft = tmp_path / "site.yaml"
    draft.write_bytes(
        pack_text(
            rule(id="SITE-1", effect="deny", when="{eq: [task.action, infer]}"), pack_id="site"
        )
    )
    status, changed = call("diff", draft)
    assert status == 1
    logged = [each for each in changed["changes"] if each["question"].startswith("decision ")]
    assert {(each["after"], each["cause"]) for each in logged} == {("deny", "rule")}
    _, without = call("diff", draft, "--no-logged")
    assert without["logged"] == 0


def test_times_of_a_record_need_a_zone_and_a_day():
    document = {"as_of": "2026-11-23", "known_at": "2026-11-23T12:00:00Z"}
    assert times_of_record(document)[0] == date(2026, 11, 23)
    with pytest.raises(RefusedError):
        times_of_record({"as_of": "soon", "known_at": "2026-11-23T12:00:00Z"})


# -- the horizon with an installed bundle -----------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A tree with a bundle that was admitted for real, by the rules, on record."""
    root = tmp_path_factory.mktemp("store")
    people = bundles.make_trust()
    trust.save_trust(people, root / "trust")
    text = site_toml(os.getuid()).replace("as_of = 2026-11-23", "as_of = 2026-06-01")
    (root / "site.toml").write_text(text)
    site, rules = parse_site(text.encode()), load_rules(root)
    licence = {"spdx": "Apache-2.0", "status": "declared", "text_digest": f"sha256:{'1' * 64}"}
    model = {"source": "local:logos-ref-tiny", "licence": licence}
    bundles.make_bundle(root / "one.agb", model=model)
    with open_log(root, site="Test Lab") as log:
        rule_history.put_on_record(log, rules)
        gate = admission(
            site,
            rules,
            site.legal_day(bundles.NOW),
            project=PROJECT,
            approvals=Approvals(),
            submitter="ada",
        )
        done = install(
            root / "one.agb",
            root=root,
            now=bundles.NOW,
            gate=gate,
            audit=recorder(log, actor=None, project=PROJECT),
        )
    return root, done


def test_the_horizon_says_when_an_installed_bundle_changes_and_why(call, installed):
    root, done = installed
    assert done.decision.permitted
    argv = ("horizon", "--as-of", "2026-11-23", "--days", "30,90,400")
    status, view = call(*argv, root=root)
    assert status == 0
    names = {each["name"] for each in view["bundles"]}
    assert f"tiny 1.0 for {PROJECT}" in names
    mine = next(each for each in view["bundles"] if each["name"].endswith(PROJECT))
    assert mine["within"]["30"] == []
    stale = [each for each in mine["within"]["400"] if "LIST-STALE" in each["rules"]]
    assert [each["outcome"] for each in stale] == ["needs_approval"]
    # Lists of 90 days are taken, of 91 not: the change falls on the day after the ninetieth.
    assert stale[0]["on"] == "2027-02-22"
    assert stale[0] not in mine["within"]["90"]


def test_the_admission_of_an_installed_bundle_comes_out_the_same(call, installed):
    status, answer = call("replay", root=installed[0])
    assert (status, answer["same"]) == (0, 1)
    (one,) = answer["decisions"]
    assert one["decision"] == str(installed[1].decision.digest)
