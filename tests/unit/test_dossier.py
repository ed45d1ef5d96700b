"""Evidence: what reports say of a real log, what they refuse to say, and that OSCAL is OSCAL."""

import csv
import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import bundles
import jsonschema
import pytest
import typer
from policy_site import deciding
from test_approvals import enrolled
from test_holds import FAMILY, held, writes
from test_serve_broker import MODEL, Helper, Worker, job

from airgap import holds, oscal
from airgap.audit import Actor, load_vkey, open_log, parse_receipt, verify_receipt
from airgap.audit.query import read_records
from airgap.cli import report as commands
from airgap.cli.common import show_error
from airgap.config import parse_site
from airgap.demo import site_toml
from airgap.dossier import FAMILIES, NEVER_SAID, ROWS, Page, Section, render
from airgap.dossier.reports import families, role_conflicts
from airgap.holds import Holds
from airgap.rules import load_rules
from airgap.serve.broker import Broker
from bundle import trust
from policy.errors import AirgapError, RefusedError

SCHEMAS = Path(__file__).parents[1] / "vectors" / "oscal"
PEOPLE = enrolled(eve=("ehs",), xia=("export_control",))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tree with requests that were answered, held (one of them in release), denied, refused."""
    root = tmp_path_factory.mktemp("lab")
    text = site_toml(os.getuid()).replace("as_of = ", "# as_of = ")
    (root / "site.toml").write_text(text)
    trust.save_trust(PEOPLE, root / "trust")
    site, rules = parse_site(text.encode()), load_rules(root)

    use_policy = deciding(site, rules, MODEL.bundle)

    with open_log(root, site="Test Lab") as log:
        broker = Broker(log, Worker(), Helper(), MODEL, Actor("Ada Example"), use_policy)
        broker.restricted = root / "restricted"
        broker.holds = Holds(root, PEOPLE.document, "ada")
        answer = broker.infer(job())
        hold = held(broker, frames=writes(FAMILY))
        held(broker, frames=writes(FAMILY))
        broker.worker.frames = None
        for bad in (job(project="sensor-coatings"), job(inputs={"smiles": "CC("})):
            with pytest.raises(RefusedError):
                broker.infer(bad)
        words = {"reason": "seen", "issued": datetime.now(UTC).replace(microsecond=0)}
        statement = holds.word_release(
            hold, **words, expires=datetime(2099, 1, 1, tzinfo=UTC).date(), document=None
        )
        broker.holds.add_release(holds.RELEASE.sign(statement, bundles.signer("eve")))
    (root / "kept").mkdir()
    (root / "kept" / "answer.tlog-proof").write_text(answer.outcome.as_proof())
    return root, answer, hold


@pytest.fixture
def call(capsys, lab):
    app = typer.Typer()
    commands.register(app)
    capsys.readouterr()

    def run(*argv, text=False):
        try:
            line = [*(str(each) for each in argv), "--root", str(lab[0])]
            status = app(args=line + ["--json"] * (not text), standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        out = capsys.readouterr().out
        return status, out if text else json.loads(out)

    return run


def test_the_report_of_an_award_counts_what_the_log_holds(call, lab):
    status, report = call("report", "award", "route-design")
    assert status == 0
    assert report["results"] == {"answered": 1, "held": 2, "refused": 1}
    assert [use["result"] for use in report["uses"]] == ["answered", "held", "held", "refused"]
    assert report["uses"][0]["samples"] == 2
    assert report["uses"][0]["person"] == "Ada Example"
    assert report["uses"][3]["rule"] == "prompt.g07"
    assert report["project"]["sponsors"] == ["NIH"]
    assert report["log"]["verdict"] == "cannot tell"  # no outside head
    _, anchored = call("report", "award", "route-design", "--anchors", lab[0] / "kept")
    assert (anchored["log"]["verdict"], anchored["log"]["anchors"]) == ("good", 1)
    text = json.dumps(report)
    assert "HAZ-" not in text
    assert FAMILY not in text


def test_a_period_narrows_a_report(call):
    _, none = call("report", "award", "route-design", "--until", "2001-01-01")
    assert (none["uses"], none["records_examined"]) == ([], 0)
    _, some = call("report", "award", "route-design", "--since", "2001-01-01")
    assert len(some["uses"]) == 4
    status, refused = call("report", "award", "no-such")
    assert (status, refused["code"]) == (1, "site.project")


def test_not_used_says_what_it_rests_on_and_what_it_cannot_show(call, lab):
    status, report = call(
        "report", "not-used", "--award", "sensor-coatings", "--anchors", lab[0] / "kept"
    )
    assert (status, report["used"]) == (0, False)
    assert len(report["not_answered"]) == 1  # a denied attempt is told
    assert report["requests_of_other_projects"] == 3
    assert "no answered request" in report["statement"]
    assert any("other hosts" in each for each in report["limits"])
    assert any(str(report["log"]["anchored_size"]) in each for each in report["limits"])
    status, used = call("report", "not-used", "--award", "route-design")
    assert (status, used["used"]) == (1, True)
    status, other = call(
        "report", "not-used", "--award", "route-design", "--model", f"sha256:{'0' * 64}"
    )
    assert (status, other["used"]) == (0, False)
    status, never = call("report", "not-used", "--award", "N00014-99-1-0001")
    assert (status, never["award_in_site"]) == (0, False)
    assert (
        call("report", "not-used", "--award", "x", "--model", "nothing")[1]["code"]
        == "store.missing"
    )


def test_no_report_is_made_from_a_log_that_was_changed(lab, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(lab[0], copy)
    assert commands.Desk.of(copy, None).log.size
    segment = next((copy / "audit" / "log" / "seg").iterdir())
    segment.write_bytes(
        segment.read_bytes().replace(b'"project":"sensor-coatings"', b'"project":"sensor-coatingx"')
    )
    with pytest.raises(RefusedError) as refused:
        commands.Desk.of(copy, None)
    assert refused.value.code == "audit.tampered"
    shutil.rmtree(copy / "audit")
    with pytest.raises(RefusedError) as refused:
        commands.Desk.of(copy, None)
    assert refused.value.code == "audit.absent"


def test_controls_are_listed_by_family_with_counts_and_shares(call):
    _, report = call("report", "controls")
    assert {row["family"] for row in report["rows"]} == set(FAMILIES)
    rows = {tuple(row["r2"]): row for row in report["rows"]}
    assert rows[("3.1.1", "3.1.2")]["records"] == 10
    assert rows[("3.3.4",)]["records"] == 0
    assert all(
        row["responsibility"] in {"inherited", "shared", "customer"} for row in report["rows"]
    )
    _, one = call("report", "controls", "--family", "3.3")
    assert {row["family"] for row in one["rows"]} == {"3.3"}
    assert call("report", "controls", "--family", "9.9")[0] == 2
    assert families() == tuple(FAMILIES)


def test_duties_that_one_person_should_not_bear_alone_are_listed(lab):
    site = parse_site((lab[0] / "site.toml").read_bytes())
    assert role_conflicts(site, PEOPLE.document) == []
    both = enrolled(ada=("ehs",), ben=("builder",), ben2=("approver",), tom=("policy",)).document
    assert role_conflicts(site, both) == [
        "ada leads a project and releases hazard holds: ehs, principal_investigator",
        "ben builds and approves releases: builder",
    ]
    assert role_conflicts(site, None) == []


def test_control_numbers_are_well_formed():
    for row in ROWS:
        assert all(re.fullmatch(r"3\.\d{1,2}\.\d{1,2}", each) for each in row.r2)
        assert all(re.fullmatch(r"03\.\d\d\.\d\d", each) for each in row.r3)
        assert all(each.startswith(row.family) for each in row.r2)


def test_the_dossier_of_a_request_holds_decisions_facts_and_proofs_that_verify(call, lab):
    root, answer, _ = lab
    status, dossier = call("dossier", answer.request, "--anchors", root / "kept")
    assert status == 0
    assert [each["kind"] for each in dossier["records"]] == ["inference", "inference"]
    assert len(dossier["decisions"]) == 2  # before the run, and before the release
    record = dossier["decisions"][0]["record"]
    assert {"facts", "reasons", "obligations", "next_change", "packs", "lists"} <= set(record)
    vkey = load_vkey(root / "keys" / "audit.vkey")
    for record, proof in zip(dossier["records"], dossier["proofs"], strict=True):
        receipt = parse_receipt(proof.encode())
        assert (receipt.seq, verify_receipt(receipt, vkey).size) == (record["seq"], receipt.size)
    by_reference = call("dossier", f"{answer.outcome.origin}#{answer.outcome.seq}")[1]
    assert by_reference["request"] == answer.request
    status, out = call("dossier", answer.request, text=True)
    assert "BASE-USE v1, fired" in out
    assert "site.toml [[project]] route-design" in out


def test_the_dossier_of_a_hold_names_no_hazard_rule(call, lab):
    root, _, hold = lab
    status, dossier = call("dossier", hold.reference)
    assert (status, dossier["request"]) == (0, hold.request)
    assert [each["state"] for each in dossier["holds"]] == ["held; signed by eve"]
    text = json.dumps(dossier)
    at = text.find("HAZ-")
    assert at < 0, text[at - 300 : at + 60]
    page = render_of(call, hold.request, root)
    assert "HAZ-" not in page
    assert hold.reference in page


@pytest.mark.parametrize("name", ["nothing", "#999999", "01ARZ3NDEKTSV4RRFFQ69G5FAV"])
def test_a_request_that_is_not_there_is_refused(call, name):
    status, refused = call("dossier", name)
    assert (status, refused["code"]) == (1, "usage.argument")


def test_a_record_that_belongs_to_no_request_has_no_dossier(call, lab):
    boot = next(each for each in read_records(lab[0] / "audit") if each["kind"] == "boot")
    assert call("dossier", str(boot["seq"]))[0] == 1


def test_an_object_that_was_changed_is_refused(lab, tmp_path):
    import shutil

    root, answer, _ = lab
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    digest = str(answer.permit.ref.id).removeprefix("sha256:")
    path = copy / "audit/log/objects" / digest[:2] / digest
    from airgap.dossier.usage import read_object

    assert read_object(copy / "audit", f"sha256:{digest}")["outcome"] == "permit"
    for bad in (path.read_bytes() + b" ", b"[]"):
        path.write_bytes(bad)
        with pytest.raises(RefusedError):
            read_object(copy / "audit", f"sha256:{digest}")


def render_of(call, request, root):
    out = root / "page.html"
    assert call("dossier", request, "--html", out)[0] == 0
    return out.read_text()


def test_a_page_is_one_file_without_script_or_link(call, lab):
    root, answer, _ = lab
    page = render_of(call, answer.request, root)
    assert "default-src &#39;none&#39;" in page
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    import base64

    assert base64.b64encode(sha256(style.encode()).digest()).decode() in page
    assert not re.search(r"<script|<link|<img|<iframe|href=|src=|url\(|@import", page)
    assert "@page" in style


def test_what_was_stated_is_escaped():
    page = Page(
        kind="x",
        title="<script>alert(1)</script>",
        subject="a & b",
        figures=[("n", "<b>")],
        sections=[
            Section("<i>", facts=[("a", "<u>")], head=("h",), rows=[("<td>",)], text="</pre>")
        ],
        limits=["<li>"],
        author="<a>",
        created="now",
        version="0",
        id="x",
    )
    html = render(page)
    for tag in ("<script>", "<i>", "<u>", "<a>", "</pre><"):
        assert tag not in html.replace("&lt;/pre&gt;</pre>", "")
    assert "&lt;script&gt;" in html


def test_a_folder_of_evidence_carries_its_hashes(call, tmp_path):
    out = tmp_path / "evidence"
    status, report = call("report", "award", "route-design", "--out", out)
    assert (status, sorted(report["written"])) == (
        0,
        ["SHA256SUMS", "report.html", "report.json", "uses.csv"],
    )
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert sha256((out / name).read_bytes()).hexdigest() == digest
    rows = list(csv.DictReader((out / "uses.csv").open()))
    assert [row["result"] for row in rows] == ["answered", "held", "held", "refused"]
    assert call("report", "award", "route-design", "--out", out)[0] == 2
    assert commands.to_csv([{"a": "=1+1", "b": "x"}]) == "a,b\n'=1+1,x\n"


# -- OSCAL ----------------------------------------------------------------------------------------


def pattern(validator, patrn, instance, _schema):
    """Check a pattern whose Unicode classes the standard library does not know."""
    known = patrn.replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d")
    if validator.is_type(instance, "string") and not re.search(known, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {patrn!r}")


def problems(name, document):
    schema = json.loads((SCHEMAS / f"oscal_{name}_schema.json").read_text())
    checker = jsonschema.validators.extend(jsonschema.Draft7Validator, {"pattern": pattern})
    return [each.message for each in checker(schema).iter_errors(document)]


KINDS = {
    "component": "component-definition.json",
    "ssp": "ssp-fragment.json",
    "poam": "poam.json",
}


@pytest.fixture(scope="module")
def documents(lab, tmp_path_factory):
    app = typer.Typer()
    commands.register(app)
    out = tmp_path_factory.mktemp("oscal") / "out"
    app(args=["report", "oscal", "-o", str(out), "--root", str(lab[0])], standalone_mode=False)
    assert (out / "SHA256SUMS").is_file()
    return {name: json.loads((out / file).read_text()) for name, file in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_oscal_documents_are_valid_by_the_schemas_of_nist(name, documents):
    assert problems(name, documents[name]) == []
    (body,) = documents[name].values()
    broken = {**documents[name], next(iter(documents[name])): {**body, "uuid": "no"}}
    assert problems(name, broken)
    assert body["metadata"]["oscal-version"] == "1.2.1"
    assert "Known gaps" in body["metadata"]["remarks"]


def test_oscal_leaves_the_status_of_implementation_to_the_institution(documents):
    text = json.dumps(documents)
    assert "implementation-status" not in text
    assert text.count("TO COMPLETE by the institution") > 5
    requirements = documents["ssp"]["system-security-plan"]["control-implementation"]
    numbers = [each["control-id"] for each in requirements["implemented-requirements"]]
    assert len(numbers) == len(set(numbers)) > 30
    items = documents["poam"]["plan-of-action-and-milestones"]["poam-items"]
    titles = " ".join(each["title"] for each in items)
    assert "await verification" in titles
    assert "No cryptographic module" in titles


def test_a_plan_without_open_items_is_valid_too():
    head = oscal.Head("t", "ada", datetime(2026, 11, 25, tzinfo=UTC), "0.1.0")
    empty = oscal.poam(head, system="lab", items=[])
    assert problems("poam", empty) == []
    assert oscal.poam(head, system="lab", items=[]) == empty  # the same content, the same bytes
    later = oscal.poam(replace(head, version="0.2.0"), system="lab", items=[])
    assert later != empty
    assert oscal._token("1 a/b") == "_1-a-b"


def test_no_text_of_evidence_says_that_anything_is_met(call, lab, documents, tmp_path):
    _, answer, hold = lab
    texts = [json.dumps(documents)]
    for argv in (
        ("report", "award", "route-design"),
        ("report", "controls"),
        ("report", "not-used", "--award", "sensor-coatings"),
        ("dossier", answer.request),
        ("dossier", hold.request),
    ):
        page = tmp_path / "page.html"
        texts += [call(*argv, text=True)[1], json.dumps(call(*argv, "--html", page)[1])]
        texts.append(re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL))
    said = re.compile(rf"\b({'|'.join(NEVER_SAID)})\b", re.IGNORECASE)
    assert said.search("This is compliant.")
    assert [found[0] for text in texts for found in said.finditer(text)] == []
