"""`airgap audit report`: figures that add up, from a log and from an export; charts; bad input."""

import json
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import audit_logs as logs
import pytest
import typer

from airgap.audit import Actor, DecisionRef, new_ulid
from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import Layout, last_checkpoint
from airgap.cli import audit_exports
from airgap.cli.report import words
from airgap.dossier import add_up, render, totals_report
from airgap.dossier.chart import Chart, Item
from airgap.dossier.reports import About
from airgap.dossier.usage import judge
from policy.errors import AirgapError, RefusedError

ABOUT = About("ada", datetime(2026, 11, 25, tzinfo=UTC), "0", {logs.MODEL: "rxn 1.0"})


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    clock = logs.FixedClock()
    with logs.open_log(folder, clock=clock) as log:
        for person, project in (("jdoe", "P-1"), ("asmith", "P-2"), ("jdoe", "P-2")):
            receipt = logs.infer(log, person=person, project=project)
            clock.slept_s += 86_400
        decision = log.put_object(logs.DECISION)
        refused = DecisionRef(decision, "deny", "BASE-USE")
        log.append(logs.denial(actor=Actor("<b>eve"), project="P-2", decision=refused, err=""))
        log.append(logs.denial(data={"count": 7}))
        log.append(logs.intent(decision, new_ulid(), project="P-1"))
    logs.keep(receipt, folder / "receipts/r.tlog-proof")
    return folder


def run(*argv):
    group = typer.Typer()
    audit_exports.register(group)
    app = typer.Typer()
    app.add_typer(group, name="audit")
    try:
        return app(args=["audit", *map(str, argv)], standalone_mode=False) or 0
    except AirgapError as error:
        return error.exit_status


def report(folder, **period):
    facts = judge(folder / "audit", logs.vkey(), [folder / "receipts"])
    return totals_report(add_up(folder / "audit", facts, **period), facts, ABOUT)


def test_every_dimension_adds_up_to_the_whole(tree):
    document = report(tree).document
    assert document["whole"] == {
        "requests": 12, "answered": 3, "tokens_in": 36, "tokens_out": 600, "milliseconds": 3600,
    }  # fmt: skip
    for name in ("awards", "people", "outcomes", "time_by_day"):
        for figure, whole in document["whole"].items():
            assert sum(each[figure] for each in document[name].values()) == whole, (name, figure)
    assert {name: each["requests"] for name, each in document["awards"].items()} == {
        "P-1": 2, "P-2": 3, "(none)": 7,
    }  # fmt: skip
    assert {name: each["requests"] for name, each in document["outcomes"].items()} == {
        "answered": 3, "denied": 1, "refused": 7, "open": 1,
    }  # fmt: skip
    assert document["models"][logs.MODEL]["answered"] == 3


def test_a_period_takes_what_began_in_it(tree):
    whole = report(tree).document["period"]["first"][:10]
    after = report(tree, since=f"{whole}T23:59").document["whole"]["answered"]
    before = report(tree, until=f"{whole}T23:59").document["whole"]["answered"]
    assert (before, after) == (1, 2)


def test_the_page_has_charts_that_parse_and_no_script(tree):
    page = render(report(tree))
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        assert ET.fromstring(chart).tag == "svg"  # noqa: S314 - our own page
    assert "<b>eve" not in page
    assert "&lt;b&gt;eve" in page
    assert "<script" not in page
    assert "style=" not in page
    assert "rxn 1.0" in page


def test_the_same_figures_come_from_an_export_elsewhere(tree, tmp_path, capsys):
    layout = Layout(tree / "audit")
    export_log(layout, tmp_path / "out", Plan(last_checkpoint(layout.journal)[0], "ocsf"))
    options = ["--vkey", tree / "keys/audit.vkey", "--anchors", tree / "receipts", "--json"]
    assert run("report", tree / "audit", *options) == 0
    ours = json.loads(capsys.readouterr().out)
    assert run("report", tmp_path / "out", *options, "--html", tmp_path / "r.html") == 0
    theirs = json.loads(capsys.readouterr().out)
    for name in ("whole", "awards", "people", "models", "outcomes"):
        assert ours[name] == theirs[name]
    assert theirs["log"]["verdict"] == "good"
    assert "Use of models" in (tmp_path / "r.html").read_text()


def test_no_report_is_made_from_a_log_that_was_changed_or_is_not_there(tree, tmp_path):
    lines = logs.lines_of(tree)
    logs.set_lines(tree, [lines[0].replace(b"lab1", b"lab2"), *lines[1:]])
    with pytest.raises(RefusedError):
        report(tree)
    assert run("report", tree / "audit") == 1
    assert run("report", tmp_path / "none") == 1
    assert run("report", "--root", tree, "--since", "yesterday") == 2


def test_an_empty_period_has_a_page_too(tree):
    page = render(report(tree, since="2031-01-01"))
    assert "no request in these records" in page
    assert "<svg" not in page


def test_rows_are_written_for_a_collector_and_bad_names_refused(tree, tmp_path, capsys):
    for name in ("jsonl", "csv", "ocsf", "rfc5424", "rfc5424-99", "cef", "hec"):
        out = tmp_path / f"{name}.out"
        assert (
            run("rows", tree / "audit", "--format", name, "--out", out, "--since", 2, "--json") == 0
        )
        count = json.loads(capsys.readouterr().out)["rows"]
        assert out.read_bytes().count(b"\n") == count + (name == "csv")
    assert run("rows", tree / "audit", "--format", "leef", "--out", tmp_path / "x") == 2
    assert run("rows", tree / "audit", "--out", tmp_path / "ocsf.out") > 2
    assert run("rows", tmp_path / "none", "--out", tmp_path / "y") == 1


def test_import_from_the_command_line(tree, tmp_path, capsys):
    from airgap.audit.export.sign import ExportKey

    layout, key = Layout(tree / "audit"), ExportKey.create(tree / "keys/export.pem")
    export_log(layout, tmp_path / "out", Plan(last_checkpoint(layout.journal)[0], "cef", key=key))
    options = [
        "--vkey", tree / "keys/audit.vkey", "--export-key", tree / "keys/export.pub",
        "--memory", tmp_path / "memory", "--anchors", tree / "receipts",
    ]  # fmt: skip
    assert run("import", tmp_path / "out", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["remembered"] is True
    assert run("import", tmp_path / "out", *options) == 1
    assert "replayed: export 1" in capsys.readouterr().out
    assert run("import", tmp_path / "none", *options) > 2


def test_a_chart_shows_what_is_small_and_cuts_what_is_long():
    chart = Chart("t", [Item("x" * 80, 10**9, "a"), Item("y", 1, "b"), Item("z", 0, "c")])
    assert [float(each.width) for each in chart.shapes] == [440.0, 2.0, 0.0]
    assert chart.shapes[0].label.endswith("…")
    many = Chart("t", [Item(str(n), n, str(n)) for n in range(92)], upright=True)
    assert 10 < sum(bool(each.label) for each in many.shapes) <= 15
    assert Chart("t", []).shapes == []


def test_columns_are_aligned_or_a_cell_a_line_where_a_terminal_is_too_narrow(tree):
    page = report(tree)
    lines = words(page, {}).splitlines()
    start = lines.index("By award") + 1
    assert lines[start].split()[:3] == ["award", "requests", "answered"]
    end = lines[start].index("requests") + len("requests")
    for row in lines[start + 1 : lines.index("", start)]:
        assert row[end - 1].isdigit()
        assert row[end : end + 2] == "  "
    narrow = words(page, {}, 40).splitlines()
    start = narrow.index("By award") + 1
    assert [line.split()[0] for line in narrow[start : start + 3]] == [
        "award",
        "requests",
        "answered",
    ]
    assert not any("  |  " in line for line in lines + narrow)
