"""`airgap audit` from the command line: output, exits, filters, interrupts."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import audit_logs as logs
import pytest
import typer

from airgap.audit import parse_receipt
from airgap.audit.query import Filter, read_records, select
from airgap.cli import audit
from policy.errors import AirgapError, FaultError, RefusedError, UsageError


@pytest.fixture
def tree(tmp_path):
    """Return a user's own tree with a log in its usual place."""
    folder = tmp_path / "tree"
    with logs.open_log(folder) as log:
        for person, project in (("jdoe", "P-1"), ("asmith", "P-2"), ("jdoe", "P-2")):
            receipt = logs.infer(log, person=person, project=project)
        log.append(logs.denial())
    logs.keep(receipt, folder / "receipts" / "last.tlog-proof")
    return folder


def run(*argv):
    """Run one command and return its exit status, as the console script would."""
    app = typer.Typer()
    audit.register(app)
    app.command("other")(lambda: None)
    try:
        return app(args=["audit", *map(str, argv)], standalone_mode=False) or 0
    except AirgapError as error:
        return error.exit_status


def result(capsys, *argv):
    status = run(*argv, "--json")
    return status, json.loads(capsys.readouterr().out)


# -- show --------------------------------------------------------------------------------------


def test_show_prints_one_line_a_record(tree, capsys):
    assert run("show", "--root", tree) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["seq", "time"]
    assert len(lines) == 1 + 9
    assert any("inference intent" in x and "asmith" in x and "BASE-USE" in x for x in lines)
    assert any("12+200 tokens" in x for x in lines)
    assert any("denial" in x and "prompt.g01" in x for x in lines)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ([], 9),
        (["--person", "jdoe"], 4),
        (["--project", "P-2"], 4),
        (["--project", "P-2", "--person", "jdoe"], 2),
        (["--kind", "denial"], 1),
        (["--kind", "inference", "--phase", "intent"], 3),
        (["--outcome", "permit"], 3),
        (["--outcome", "complete"], 3),
        (["--outcome", "prompt.g01"], 1),
        (["--model", "abab"], 3),
        (["--model", "sha256:abab"], 3),
        (["--model", "ac"], 0),
        (["--since", "2030-01-01"], 0),
        (["--until", "2030-01-01"], 9),
        (["--since", "2020-01-01T10:00Z"], 9),
        (["--last", "2"], 2),
        (["--last", "0"], 9),
    ],
)
def test_show_filters(tree, capsys, options, count):
    status, found = result(capsys, "show", "--root", tree, *options)
    assert (status, found["count"]) == (0, count)
    assert len(found["records"]) == count


def test_show_filters_by_request_and_by_a_group_of_kinds(tree):
    req = next(r["req"] for r in read_records(tree / "audit") if "req" in r)
    assert len(select(tree / "audit", Filter(req=req), last=0)) == 2
    assert select(tree / "audit", Filter(kind="admin"), last=0) == []


def test_show_says_so_when_nothing_matches(tree, capsys):
    assert run("show", "--root", tree, "--person", "nobody") == 0
    assert "no record matches" in capsys.readouterr().out


def test_show_reads_past_no_broken_line(tree):
    lines = logs.lines_of(tree)
    logs.set_lines(tree, lines, tail=b'{"half')
    assert len(list(read_records(tree / "audit"))) == len(lines)
    logs.set_lines(tree, [*lines[:3], b"{}", *lines[4:]])
    with pytest.raises(RefusedError) as refused:
        list(read_records(tree / "audit"))
    assert refused.value.code == "audit.tampered"
    assert "line 4" in refused.value.message


@pytest.mark.parametrize("options", [["--since", "yesterday"], ["--until", "2026-1-1"]])
def test_show_takes_utc_times_only(tree, options):
    assert run("show", "--root", tree, *options) == UsageError.exit_status


def test_no_log_is_a_refusal(tmp_path, capsys):
    assert run("show", "--root", tmp_path) == 1
    assert run("verify", "--root", tmp_path) == 3
    assert run("verify", tmp_path) == 3
    assert "no log here" in capsys.readouterr().out


# -- verify ------------------------------------------------------------------------------------


def test_verify_gives_0_with_an_anchor_and_3_without(tree, capsys):
    status, found = result(capsys, "verify", "--root", tree)
    assert (status, found["verdict"]) == (3, "cannot tell")
    status, found = result(capsys, "verify", "--root", tree, "--anchors", tree / "receipts")
    assert (status, found["verdict"]) == (0, "good")
    assert found["anchored_size"] + found["unanchored"] == found["size"] == 9
    assert run("verify", "--root", tree, "--anchors", tree / "receipts") == 0
    out = capsys.readouterr().out
    assert "good" in out
    assert "anchored to 7 by 1 outside head, 2 past the last anchor" in out


def test_verify_of_a_copy_needs_the_key_from_outside(tree, capsys):
    anchors = ("--anchors", tree / "receipts/last.tlog-proof")
    assert result(capsys, "verify", tree / "audit", *anchors)[0] == 3
    vkey = ("--vkey", tree / "keys/audit.vkey")
    assert result(capsys, "verify", tree / "audit", *anchors, *vkey)[0] == 0


def test_verify_names_the_record_that_was_changed(tree, capsys):
    lines = logs.lines_of(tree)
    lines[3] = lines[3].replace(b"asmith", b"nobody")
    logs.set_lines(tree, lines)
    assert run("verify", "--root", tree) == 1
    out = capsys.readouterr().out
    assert out.startswith("tampered")
    assert "record 3" in out
    status, found = result(capsys, "verify", "--root", tree)
    assert status == 1
    assert found["findings"][0]["seq"] == 3


def test_verify_of_a_running_log_is_no_contradiction(tmp_path, capsys):
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
        anchor = logs.keep(receipt, tmp_path / "r" / "x.tlog-proof")
        assert run("verify", "--root", tmp_path, "--anchors", anchor) == 0
    capsys.readouterr()


def test_verify_says_what_it_cannot_read(tree, capsys):
    (tree / "audit/log/seg/00000000.jsonl").unlink()
    (tree / "audit/log/seg/00000000.jsonl").mkdir()
    status, found = result(capsys, "verify", "--root", tree)
    assert (status, found["findings"][0]["check"]) == (3, "read")
    assert run("verify", "--root", tree, "--anchors", tree / "absent") == 3
    assert run("verify", "--root", tree, "--vkey", tree / "absent") == 3
    assert run("verify", "--root", tree, "--vkey", tree / "receipts/last.tlog-proof") == 1


# -- export ------------------------------------------------------------------------------------


def test_an_export_is_on_record_and_verifies_elsewhere(tree, tmp_path, capsys):
    out = tmp_path / "media" / "export"
    status, found = result(capsys, "export", "--root", tree, "-o", out)
    assert status == 0
    kinds = [
        (r["kind"], r["phase"])
        for r in read_records(tree / "audit")
        if r["kind"] != "heartbeat"  # a log of last year is overdue for its export, and says so
    ]
    assert kinds[-4:] == [
        ("boot", "event"), ("export", "intent"), ("export", "outcome"), ("shutdown", "event"),
    ]  # fmt: skip
    last = list(read_records(tree / "audit"))[-2]["data"]
    assert last["result"] == "complete"
    assert last["last"] == found["size"] - 1
    anchors = ("--anchors", tree / "receipts", "--vkey", tree / "keys/audit.vkey")
    status, verdict = result(capsys, "verify", out, *anchors)
    notes = {note["check"]: note["found"] for note in verdict["findings"]}
    assert status == 0
    assert notes["open intents"] == "1 without an outcome: the export itself"
    assert notes["manifest"].startswith("its two signatures were not checked")
    assert sorted(p.name for p in out.iterdir()) == [
        "log", "manifest.json", "manifest.sig", "records.jsonl",
    ]  # fmt: skip
    keys = ("--export-key", tree / "keys/export.pub")
    status, verdict = result(capsys, "verify", out, *anchors, *keys)
    assert (status, verdict["code"]) == (0, "")
    assert not [f for f in verdict["findings"] if f["check"].startswith("manifest")]
    assert list(out.parent.iterdir()) == [out]


def test_each_jsonl_row_leads_back_to_its_record(tree, tmp_path, capsys):
    assert run("export", "--root", tree, "-o", tmp_path / "out") == 0
    assert "verify it elsewhere" in capsys.readouterr().out
    receipt = parse_receipt((tree / "receipts/last.tlog-proof").read_bytes())
    rows = [json.loads(row) for row in (tmp_path / "out/records.jsonl").open()]
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert rows[receipt.seq]["leaf"] == receipt.leaf.hex()
    assert rows[receipt.seq]["origin"] == logs.ORIGIN
    assert rows[receipt.seq]["record"]["kind"] == "inference"


def test_t39_a_csv_reader_gets_every_cell_back_and_no_formula(tmp_path, capsys):
    tree = tmp_path / "tree"
    name = '=HYPERLINK("x"),\\]|'
    with logs.open_log(tree) as log:
        logs.infer(log, person=name)
        log.append(logs.denial(label="@SUM(1)"))
    assert run("export", "--root", tree, "--format", "csv", "-o", tmp_path / "out") == 0
    with (tmp_path / "out/records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["person"] for row in rows if row["kind"] == "inference"] == ["'" + name] * 2
    assert [row["label"] for row in rows if row["label"]] == ["'@SUM(1)"]
    assert json.loads(rows[1]["data"]) == {"n": 10, "task": "retrosynthesis"}
    assert rows[2]["tok_out"] == "200"
    capsys.readouterr()


def test_an_export_of_a_copy_is_a_conversion_and_writes_nothing_to_it(tree, tmp_path):
    copy = logs.copy(tree, tmp_path / "copy")
    before = logs.segment(copy).read_bytes()
    assert run("export", copy / "audit", "-o", tmp_path / "out", "--format", "csv") == 0
    assert logs.segment(copy).read_bytes() == before


def test_an_export_of_a_changed_log_is_refused_and_leaves_nothing(tree, tmp_path):
    lines = logs.lines_of(tree)
    lines[3] = lines[3].replace(b"asmith", b"nobody")
    logs.set_lines(tree, lines)
    assert run("export", tree / "audit", "-o", tmp_path / "out") == 1
    assert run("export", "--root", tree, "-o", tmp_path / "out") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree"]


@pytest.mark.parametrize(
    ("options", "status"),
    [(["--format", "xml"], 2), (["-o", "{tree}/receipts"], 2), (["--root", "{tree}/none"], 1)],
)
def test_export_refuses_what_it_cannot_do(tree, tmp_path, options, status):
    given = [option.format(tree=tree) for option in options]
    base = [] if "--root" in given else ["--root", tree]
    out = [] if "-o" in given else ["-o", tmp_path / "out"]
    (tree / "none/keys").mkdir(parents=True)
    logs.write_key(tree / "none/keys/audit.pem")
    assert run("export", *base, *out, *given) == status
    assert not (tmp_path / "out").exists()


def test_export_while_a_writer_holds_the_log_is_refused(tree, tmp_path):
    with logs.open_log(tree):
        assert run("export", "--root", tree, "-o", tmp_path / "out") == 1


def test_export_of_a_copy_without_heads_is_refused(tree, tmp_path):
    (tree / "audit/log/checkpoints.jsonl").unlink()
    assert run("export", tree / "audit", "-o", tmp_path / "out") == 1


def test_a_failed_export_is_on_record_with_its_code(tree, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        run("export", "--root", tree, "-o", tmp_path / "file" / "out")
    last = list(read_records(tree / "audit"))[-2]
    assert (last["data"]["result"], last["err"]["code"]) == ("failed", "host.io")


# -- receipts ----------------------------------------------------------------------------------


def test_check_receipt(tree, tmp_path, capsys):
    receipt = tree / "receipts/last.tlog-proof"
    status, found = result(capsys, "check-receipt", receipt, "--root", tree)
    assert (status, found["verdict"], found["in_log"]) == (0, "good", True)
    assert found["record"]["phase"] == "outcome"
    assert run("check-receipt", receipt, "--root", tree) == 0
    assert "the log holds that record" in capsys.readouterr().out
    status, found = result(capsys, "check-receipt", receipt, "--root", tmp_path / "nowhere")
    assert (status, found["verdict"], found["in_log"]) == (3, "cannot tell", False)
    vkey = ("--vkey", tree / "keys/audit.vkey")
    assert run("check-receipt", receipt, tmp_path / "nowhere", *vkey) == 0
    assert "not at hand" in capsys.readouterr().out


def test_check_receipt_refuses_what_does_not_hold(tree, tmp_path):
    good = tree / "receipts/last.tlog-proof"
    bad = tmp_path / "bad.tlog-proof"
    bad.write_text(good.read_text().replace("index 6", "index 5"))
    assert run("check-receipt", bad, "--root", tree) == 1
    bad.write_bytes(b"\xff" * 100)
    assert run("check-receipt", bad, "--root", tree) == 1
    assert run("check-receipt", tmp_path / "absent", "--root", tree) == FaultError.exit_status
    lines = logs.lines_of(tree)
    logs.set_lines(tree, [*lines[:6], lines[6].replace(b"jdoe", b"root"), *lines[7:]])
    assert run("check-receipt", good, "--root", tree) == 1
    logs.set_lines(tree, lines[:4])
    assert run("check-receipt", good, "--root", tree) == 1


# -- processes ---------------------------------------------------------------------------------

_DISPATCH = """
import sys
blocked = {"numpy", "onnxruntime", "tokenizers", "llguidance", "rdkit", "gemmi", "torch",
           "transformers", "optimum", "onnx", "sigstore", "huggingface_hub", "safetensors"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocker())
import typer
from airgap.cli import audit
app = typer.Typer()
audit.register(app)
app.command("other")(lambda: None)
sys.exit(app(args=sys.argv[1:], standalone_mode=False))
"""


def test_an_auditor_needs_no_extra_to_verify(tree):
    argv = ["audit", "verify", "--root", str(tree), "--anchors", str(tree / "receipts")]
    done = subprocess.run(
        [sys.executable, "-c", _DISPATCH, *argv], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("good")


_SLOW = """
import sys, time
import typer
from airgap.cli import audit
from airgap.audit.export import manifest
class Slow(audit._Bar):
    def __call__(self, done, total):
        open(sys.argv[1], "w").close()
        time.sleep(0.05)
audit._Bar = Slow
app = typer.Typer()
audit.register(app)
app.command("other")(lambda: None)
try:
    sys.exit(app(args=sys.argv[2:], standalone_mode=False))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_in_an_export_leaves_no_half_export_and_a_log_that_says_so(tmp_path):
    tree = tmp_path / "tree"
    with logs.open_log(tree) as log:
        for _ in range(40_000):
            log._submit(logs.denial(), None, None)
        log.append(logs.denial())
    started = tmp_path / "started"
    child = subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(started), "audit", "export", "--root", str(tree), "-o",
         str(tmp_path / "out")], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(60) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["started", "tree"]
    last = list(read_records(tree / "audit"))[-2]
    assert (last["kind"], last["phase"]) == ("export", "outcome")
    assert last["data"]["result"] == "cancelled"
    assert Path(tree / "audit/.lock").read_text().split()[2] == "closed"
