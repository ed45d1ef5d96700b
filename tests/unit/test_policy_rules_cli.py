"""`airgap policy lint|test|diff|horizon|export|schema|sign`: what is printed, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import typer
from policy_cases import DEMO, pack_text, rule
from policy_site import TRUST, put_key, put_signed

import policy.strict
from airgap.cli import policy as commands
from airgap.cli.common import show_error
from airgap.rules import load_rules
from bundle import trust
from policy.errors import AirgapError
from policy.schema import pack_schema
from policy.snapshots import normal_name

PACKS = Path(policy.strict.__file__).parent / "packs"
OSCAL = Path(__file__).parent.parent / "vectors" / "oscal" / "oscal_component_schema.json"


@pytest.fixture
def root(tmp_path):
    tree = tmp_path / "lab"
    tree.mkdir()
    text = DEMO.read_text().replace("uid = 0 ", f"uid = {os.getuid()} ")
    (tree / "site.toml").write_text(text)
    trust.save_trust(TRUST, tree / "trust")
    return tree


@pytest.fixture
def call(capsys, root):
    app = typer.Typer()
    commands.register(app)

    def run(*argv):
        line = ["policy", *map(str, argv)]
        if argv[0] != "schema":
            line += ["--root", str(root)]
        try:
            status = app(args=line, standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json="--json" in argv)
            status = error.exit_status
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def as_json(result):
    status, out, _ = result
    return status, json.loads(out)


def test_lint_of_everything_that_is_loaded_is_open_work_and_no_error(call, root):
    status, document = as_json(call("lint", "--json"))
    assert (status, document["failing"]) == (0, 0)
    assert {each["file"] for each in document["findings"]} >= {"packs/us-federal.yaml"}
    status, document = as_json(call("lint", "--release", "--json"))
    assert (status, document["exit"]) == (1, 1)
    put_signed(root, "mine.yaml", pack_text(rule(id="SITE-1"), pack_id="mine"))
    status, out, _ = call("lint")
    assert status == 0
    assert "mine.yaml: line 7, column 7: open [scenarios] SITE-1: 0 scenarios" in out


def test_lint_names_line_and_column_of_a_fault(call, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(pack_text(rule(when="{eq: [project.aktive, true]}")))
    status, out, _ = call("lint", path)
    assert status == 1
    assert "bad.yaml: line 17, column 15: error [vocabulary]" in out
    assert "did you mean 'project.active'" in out


def test_test_plays_all_scenarios_and_notices_a_wrong_one(call, tmp_path):
    status, out, _ = call("test")
    assert status == 0
    assert "322 scenarios, 0 do not hold" in out
    wrong = tmp_path / "baseline.yaml"
    text = (PACKS / "baseline.yaml").read_text(encoding="utf-8")
    wrong.write_text(text.replace("lists.max_age_days, 90", "lists.max_age_days, 91"))
    status, document = as_json(call("test", wrong, "--json"))
    assert status == 1
    assert [each.partition(":")[0] for each in document["wrong"]] == [
        "LIST-STALE [admission] lists of 91 days, 2027-02-22",
        "LIST-STALE [use] lists of 91 days, 2027-02-22",
    ]
    status, document = as_json(call("test", PACKS / "licences.yaml", "--mutants", "--json"))
    assert (status, document["unnoticed"]) == (0, [])


def test_diff_shows_what_a_stricter_list_age_changes_and_why(call, tmp_path):
    same = tmp_path / "same.yaml"
    shutil.copy(PACKS / "licences.yaml", same)
    status, document = as_json(call("diff", same, "--json"))
    assert (status, document["changes"], document["questions"]) == (0, [], 322)
    changed = tmp_path / "changed.yaml"
    text = (PACKS / "licences.yaml").read_text(encoding="utf-8")
    changed.write_text(text.replace('from: "2024-09-25"', 'from: "2024-09-27"'))
    status, document = as_json(call("diff", changed, "--json"))
    assert status == 1
    assert {each["cause"] for each in document["changes"]} == {"rule"}
    denied = [each for each in document["changes"] if each["before"] == "deny"]
    assert denied
    # The two days between the old and the new beginning, and no other.
    assert all(each["from"] >= "2024-09-25" for each in denied)
    assert all(each["to"] <= "2024-09-26" for each in denied)
    status, out, _ = call("diff", changed)
    assert status == 1
    assert "Because of: rule" in out


def test_horizon_without_a_bundle_says_so_and_lists_what_falls_due(call, tmp_path):
    status, out, _ = call("horizon", "--as-of", "2026-11-23")
    assert status == 0
    assert "No bundle is installed" in out
    assert "US-NDAA24-805-B comes into force" in out
    page = tmp_path / "horizon.html"
    status, document = as_json(call("horizon", "--days", "30,90", "--html", page, "--json"))
    assert (status, document["bundles"]) == (0, [])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert "http" not in text
    status, _, _ = call("horizon", "--html", page)
    assert status == 2, "a page is never written over"
    assert call("horizon", "--days", "soon")[0] == 2


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31", "9999-12-30", "9998-12-01"])
def test_horizon_lint_and_test_hold_at_the_ends_of_the_calendar(call, day, tmp_path):
    status, document = as_json(call("horizon", "--as-of", day, "--days", "30,36600", "--json"))
    assert (status, document["as_of"]) == (0, day)
    assert call("horizon", "--as-of", day, "--html", tmp_path / "page.html")[0] == 0
    ends = pack_text(rule(valid=f'[{{from: "{day}", to: null}}]'), pack_id="ends")
    pack = tmp_path / "ends.yaml"
    pack.write_bytes(ends)
    for argv in (("lint", pack, "--as-of", day), ("test", pack, "--mutants"), ("diff", pack)):
        assert call(*argv)[0] in {0, 1}, argv


def test_export_to_cedar_and_to_oscal(call, tmp_path):
    status, document = as_json(call("export", "cedar", "--out", tmp_path / "cedar", "--json"))
    assert status == 0
    assert document["files"] == ["paths.json", "policies.cedar", "schema.cedarschema"]
    assert any("approvals" in each for each in document["left_out"])
    status, _ = as_json(call("export", "oscal", "--out", tmp_path / "oscal", "--json"))
    assert status == 0
    made = json.loads((tmp_path / "oscal" / "component-definition.json").read_text())
    component = made["component-definition"]["components"][0]
    assert component["title"] == "airgap policy packs"
    assert "pack-us-federal-digest" in {each["name"] for each in component["props"]}
    assert call("export", "oscal", "--out", tmp_path / "oscal")[0] == 2


def test_the_schema_is_printed_and_written(call, tmp_path):
    status, document = as_json(call("schema", "--json"))
    assert (status, document) == (0, pack_schema())
    jsonschema.Draft202012Validator.check_schema(document)
    status, _, _ = call("schema", "--write", tmp_path)
    assert status == 0
    assert len(list(tmp_path.glob("*.schema.json"))) == 3
    assert call("schema", "nothing")[0] == 2


def test_a_pack_is_signed_and_counts(call, root, tmp_path):
    private = put_key(tmp_path / "pat.pem", "pat")
    path = root / "policy" / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pack_text(rule(id="SITE-1"), pack_id="mine"))
    status, document = as_json(call("sign", path, "--key", private, "--json"))
    assert (status, document["counts"]) == (0, True)
    status, document = as_json(call("sign", path, "--key", private, "--json"))
    assert (status, document["code"]) == (1, "policy.signature"), "one key signs once"
    assert "SITE-1" in {each.id for each in load_rules(root).packs.rules}


def test_an_exported_component_definition_is_valid_by_the_schema_of_nist(call, tmp_path):
    call("export", "oscal", "--out", tmp_path / "oscal")
    made = json.loads((tmp_path / "oscal" / "component-definition.json").read_text())

    def pattern(validator, wanted, instance, _schema):
        known = wanted.replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d")
        if validator.is_type(instance, "string") and not re.search(known, instance):
            yield jsonschema.ValidationError(f"{instance!r} does not match {wanted!r}")

    checker = jsonschema.validators.extend(jsonschema.Draft7Validator, {"pattern": pattern})
    found = checker(json.loads(OSCAL.read_text())).iter_errors(made)
    assert [each.message for each in found] == []


def test_a_list_is_read_from_its_notice_signed_and_completes_the_shipped_edition(
    call, root, tmp_path
):
    made_up = [f"Beta {at:03d} Works" for at in range(186)]
    bullets = ("Alibaba Group Holding Limited", *made_up, "Quiet Hill Models Co., Ltd.")
    body = "".join(f"<P>\u2022 {each}</P>" for each in bullets)
    notice = tmp_path / "notice.xml"
    notice.write_text(
        f"<NOTICE><SUPLINF>{body}</SUPLINF><FRDOC>[FR Doc. 2026-11571 Filed]</FRDOC></NOTICE>"
    )
    out = tmp_path / "list.yaml"
    argv = ["load-list", notice, "--list", "dod-1260h", "--edition", "2026-06-08", "--out", out]
    argv += ["--released", "2026-06-08", "--published", "2026-06-10", "--retrieved", "2026-11-24"]
    argv += ["--citation", "91 FR 35189", "--json"]
    short = tmp_path / "short.xml"
    short.write_text(notice.read_text().replace(f"<P>\u2022 {made_up[0]}</P>", ""))
    less = [argv[0], short, *argv[2:]]
    status, document = as_json(call(*less))
    assert (status, document["code"]) == (1, "policy.list"), "188 names are wanted"
    status, document = as_json(call(*less, "--names", "187"))
    assert (status, document["code"]) == (1, "pack.duplicate"), "a short list is not complete"
    late = [
        "2026-06-09" if each == "2026-06-08" and argv[at - 1] == "--released" else each
        for at, each in enumerate(argv)
    ]
    status, document = as_json(call(*late))
    assert (status, document["code"]) == (1, "pack.duplicate"), "of another day"
    status, document = as_json(call(*argv, "--parents", "188"))
    assert (status, document["names"], document["complete"]) == (0, 188, True)
    put_signed(root, "list.yaml", out.read_bytes())
    held = load_rules(root).lists.held("dod-1260h", datetime(2026, 11, 25, tzinfo=UTC))
    assert held.text.complete
    assert held.matches([normal_name("Quiet Hill Models Company Limited")])
    assert held.matches([normal_name("Tencent")]), "what the shipped edition names stays"
    _, listed = as_json(call("lists", "--json"))
    mine = next(each for each in listed["lists"] if each["list"] == "dod-1260h")
    assert (mine["names"], mine["complete"], mine["alarms"]) == ("188 of 188 names", True, [])
    assert call(*argv[:-1], "--partial", "--out", out)[0] == 2, "never written over"
    assert call(*argv[:-1], "--partial", "--review", "soon", "--out", tmp_path / "x.yaml")[0] == 2


def test_lists_say_how_whole_and_how_old_they_are(call):
    status, found = as_json(call("lists", "--as-of", "2026-11-23", "--json"))
    rows = {each["list"]: each for each in found["lists"]}
    assert status == 0
    assert rows["dod-1260h"]["names"] == "20 of 188 names, in part"
    assert rows["dod-1260h"]["names_in_edition"] == 188
    assert rows["bis-entity-meu"]["edition"] is None
    assert call("lists", "--as-of", "2027-02-20")[0] == 0  # the last day without any alarm
    status, out, _ = call("lists", "--as-of", "2027-02-21")  # lists of 90 days are still taken
    assert status == 1
    assert "alarm: dod-1260h: a newer edition was to be looked for by 2027-02-21" in out
    assert "at most 90 are taken" not in out
    assert "91 days old, at most 90 are taken" in call("lists", "--as-of", "2027-02-22")[1]
    _, document = as_json(call("lint", "--json"))
    assert any("20 of 188 names" in each["words"] for each in document["findings"])


def test_a_draft_is_tried_before_anybody_signs_it(call, tmp_path):
    draft = tmp_path / "draft.yaml"
    hold = rule(id="DRAFT-1", scope="admission", when="{all: []}")
    draft.write_bytes(pack_text(hold, pack_id="draft"))
    argv = ("explain", "--model", "logos-ref-tiny", "--project", "route-design", "--json")
    _, document = as_json(call(*argv))
    assert document["outcome"] == "permit_with_obligations"
    _, document = as_json(call(*argv, "--draft", draft))
    assert document["outcome"] == "deny"
    assert any("nobody has signed" in each for each in document["assumed"])
