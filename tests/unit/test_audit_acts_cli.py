"""`airgap audit` acts from the command line: keys, witnesses, payloads, pruning, the live log."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from datetime import UTC, datetime

import audit_logs as logs
import pytest
from test_audit_cli import result as result_of
from test_audit_cli import run

from airgap.audit import load_ring, new_ulid, verify_log
from airgap.audit.export.sign import load_export_public
from airgap.audit.payloads import load_holder_key
from airgap.audit.query import Filter, follow, read_records
from airgap.cli.common import show_error
from airgap.demo import site_toml
from bundle.keys import load_signer, new_key, parse_public_key
from bundle.trust import add_key, new_root, save_trust
from policy.errors import AirgapError, RefusedError


@pytest.fixture
def tree(tmp_path):
    """Return a user's own tree with a site, two approvers and a log in its usual place."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "site.toml").write_text(site_toml(os.getuid()))
    with logs.open_log(folder, clock=None) as log:
        receipt = logs.infer(log)
        log.append(logs.denial())
    logs.keep(receipt, folder / "receipts" / "last.tlog-proof")
    return folder


def enrol(folder):
    """Make keys of ada and bob and a trust root that knows both as approvers."""
    now = datetime.now(UTC)
    owner = new_key(folder / "keys", "root", person="root", roles=("root",))
    signer = load_signer(folder / "keys" / "root.pem")
    trust = new_root(owner, signer, now=now)
    for name, role in (("ada", "isso"), ("bob", "compliance")):
        new_key(folder / "keys", name, person=name, roles=(role,))
        public = parse_public_key((folder / "keys" / f"{name}.pub.json").read_bytes())
        trust = add_key(trust, public, [signer], now=now)
    save_trust(trust, folder / "trust")


def result(capsys, *argv):
    """Return exit status and document of one command, whatever was printed before."""
    capsys.readouterr()
    return result_of(capsys, *argv)


def code_of(capsys, *argv):
    """Return exit status and the code that the command line would print."""
    import typer

    from airgap.cli import audit

    app = typer.Typer()
    audit.register(app)
    app.command("other")(lambda: None)
    capsys.readouterr()
    with pytest.raises(AirgapError) as refused:
        app(args=["audit", *map(str, argv)], standalone_mode=False)
    show_error(refused.value, json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["hint"]
    return document["code"]


# -- status, proofs, paper --------------------------------------------------


def test_status_says_how_far_the_log_is_anchored(tree, capsys):
    assert run("status", "--root", tree) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "size 5, anchored to nothing, records 0 to 4 at root's mercy"
    status, found = result(capsys, "status", "--root", tree)
    assert (status, found["size"], found["unanchored"], found["writer"]) == (0, 5, 5, "closed")
    assert code_of(capsys, "status", tree / "keys") == "audit.absent"


def test_prove_writes_a_receipt_that_check_receipt_takes(tree, tmp_path, capsys):
    out = tmp_path / "r.tlog-proof"
    status, found = result(capsys, "prove", "2", "--root", tree, "-o", out)
    assert (status, found["seq"]) == (0, 2)
    assert run("check-receipt", out, "--root", tree) == 0
    capsys.readouterr()
    assert run("prove", "2", "--root", tree) == 0
    assert capsys.readouterr().out == out.read_text()
    assert code_of(capsys, "prove", "99", "--root", tree) == "audit.absent"
    assert code_of(capsys, "prove", "2", "--root", tree, "-o", out) == "host.io"


def test_a_head_on_paper_is_an_anchor_when_it_is_typed_again(tree, tmp_path, capsys):
    status, found = result(capsys, "head", "--root", tree, "--qr", tmp_path / "head.svg")
    assert (status, len(found["words"].split())) == (0, 4)
    assert (tmp_path / "head.svg").read_text().startswith("<svg")
    (tmp_path / "typed").write_text(found["short"])
    anchors = ("--anchors", tmp_path / "typed")
    status, verdict = result(capsys, "verify", "--root", tree, *anchors)
    assert (status, verdict["anchored_size"], verdict["code"]) == (0, 5, "")
    assert run("head", "--root", tree, "--show-qr") == 0
    assert "\u2588" in capsys.readouterr().out


def test_the_verdict_of_verify_carries_a_code(tree, capsys):
    status, verdict = result(capsys, "verify", "--root", tree)
    assert (status, verdict["code"], verdict["verdict"]) == (3, "audit.unknown", "cannot tell")
    logs.set_lines(tree, logs.lines_of(tree)[:-1])
    status, verdict = result(capsys, "verify", "--root", tree)
    assert (status, verdict["code"]) == (1, "audit.tampered")


# -- the live log --------------------------------------------------


def test_follow_shows_what_comes(tree):
    program = "import sys, airgap.cli; airgap.cli.main()"
    argv = ["audit", "show", "--follow", "--kind", "denial", "--json", "--root", str(tree)]
    child = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE)
    try:
        first = json.loads(child.stdout.readline())
        with logs.open_log(tree, clock=None) as log:
            receipt = log.append(logs.denial(label="CUI"))
            second = json.loads(child.stdout.readline())
        assert (first["seq"], second["seq"], second["label"]) == (3, receipt.seq, "CUI")
    finally:
        child.terminate()
        child.wait(20)


def test_follow_crosses_a_half_written_line(tree):
    class _EndError(Exception):
        pass

    waits = []

    def wait():
        waits.append(1)
        if len(waits) == 1:
            with logs.segment(tree).open("ab") as file:
                file.write(b'{"half":')  # a writer in the middle of a line
        elif len(waits) == 3:
            raise _EndError

    found = follow(tree / "audit", Filter(), last=2, wait=wait)
    assert [next(found)["kind"] for _ in range(2)] == ["denial", "shutdown"]
    with pytest.raises(_EndError):
        next(found)


def test_follow_in_words_is_one_line_a_record(tree):
    program = "import sys, airgap.cli; airgap.cli.main()"
    argv = ["audit", "show", "--follow", "--root", str(tree)]
    child = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE)
    try:
        lines = [child.stdout.readline().decode() for _ in range(5)]
    finally:
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    assert [line.split()[0] for line in lines] == list("01234")


def test_a_record_fits_a_terminal_and_is_one_line_for_scripts(tree):
    with logs.open_log(tree, clock=None) as log:
        log.append(logs.denial(project="a-project-with-a-name-of-some-length"))
    program = "import sys, airgap.cli; airgap.cli.main()"
    argv = [sys.executable, "-c", program, "audit", "show", "--root", str(tree)]
    whole = subprocess.run(argv, capture_output=True, check=True, text=True).stdout.splitlines()
    assert max(map(len, whole)) > 80
    head, tail = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    subprocess.run(argv, stdout=tail, check=True, env=environment)
    os.close(tail)
    shown = b""
    with contextlib.suppress(OSError):  # that is how a terminal ends
        while part := os.read(head, 1 << 16):
            shown += part
    os.close(head)
    shown = shown.decode()
    lines = shown.splitlines()
    assert len(lines) > len(whole)
    assert max(map(len, lines)) <= 80
    assert sorted(shown.split()) == sorted("\n".join(whole).split())


# -- keys --------------------------------------------------


def test_rotate_key_hands_over_and_the_receipts_of_both_epochs_count(tree, capsys):
    status, found = result(capsys, "rotate-key", "--root", tree)
    assert status == 0
    ring = load_ring(tree / "keys/audit.vkey")
    assert [str(key) for key in ring.keys] == [str(logs.vkey()), found["vkey"]]
    anchors = ("--anchors", tree / "receipts")
    assert run("verify", "--root", tree, *anchors) == 0
    assert run("rotate-key", "--root", tree) == 0
    assert run("verify", "--root", tree, *anchors) == 0
    assert "signs from record" in capsys.readouterr().out
    status, found = result(capsys, "status", "--root", tree)
    assert found["epochs"] == 3


# -- witnesses --------------------------------------------------


def test_a_head_goes_to_a_witness_and_comes_back(tree, tmp_path, capsys):
    witness = tmp_path / "witness"
    status, made = result(capsys, "witness", "init", witness, "--name", "isso.example/w1")
    assert status == 0
    assert run("witness", "trust", witness, tree / "keys/audit.vkey") == 0
    request, note = tmp_path / "request", tmp_path / "note"
    assert run("witness", "request", "--root", tree, "-o", request) == 0
    assert request.read_text().startswith("old 0\n\n")
    assert run("witness", "cosign", witness, request, "-o", note) == 0
    policy = tmp_path / "policy.tlog"
    policy.write_text(f"witness w1 {made['vkey']}\nquorum w1\n")
    capsys.readouterr()
    status, found = result(capsys, "witness", "import", note, "--policy", policy, "--root", tree)
    assert (status, found["size"], found["quorum"]) == (0, 5, True)
    assert run("status", "--root", tree) == 0
    assert "anchored to 5, age 0 h 0 min" in capsys.readouterr().out
    second = tmp_path / "second"
    assert run("witness", "request", "--root", tree, "-o", second) == 0
    assert second.read_text().startswith("old 5\n")
    assert run("witness", "cosign", witness, second, "-o", tmp_path / "note2") == 0
    capsys.readouterr()
    args = ("verify", "--root", tree, "--anchors", note, "--policy", policy)
    status, verdict = result(capsys, *args)
    assert (status, verdict["anchored_size"]) == (0, 5)
    assert code_of(capsys, "witness", "cosign", witness, request, "-o", tmp_path / "x") == (
        "audit.witness"
    )
    assert code_of(capsys, "witness", "cosign", witness, tmp_path / "no", "-o", "x") == "host.io"


# -- payloads and acts of two --------------------------------------------------


@pytest.fixture
def sealed(tree, tmp_path, capsys):
    """Return the tree with one inference whose prompt is kept for a holder."""
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse\n")
    key = tmp_path / "holder" / "isso.pem"
    assert run("payload-key", key, "--passphrase-file", phrase) == 0
    public = load_holder_key(key, b"correct horse").public
    with logs.open_log(tree, clock=None, payload_key=public) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        in_ = log.commit(b"<MoleculeS>CCO<MoleculeE>", b"\1" * 32, req=req, side="in")
        receipt = log.append(logs.intent(decision, req, in_=in_))
        log.append(logs.outcome(req))
    capsys.readouterr()
    return receipt.seq, ("--key", key, "--passphrase-file", phrase)


def test_the_holder_opens_a_payload_and_two_people_destroy_it(tree, sealed, tmp_path, capsys):
    seq, key = sealed
    assert run("open", seq, "--root", tree, *key) == 0
    assert capsys.readouterr().out == "<MoleculeS>CCO<MoleculeE>\n"
    out = tmp_path / "payload"
    status, found = result(capsys, "open", seq, "--root", tree, *key, "-o", out)
    assert (status, found["side"], found["payload"]) == (0, "in", None)
    assert out.read_bytes() == b"<MoleculeS>CCO<MoleculeE>"
    assert code_of(capsys, "open", 0, "--root", tree, *key) == "audit.payload"

    enrol(tree)
    act = tmp_path / "purge.json"
    argv = ("act", "purge", "--record", seq, "--reason", "spill", "--root", tree, "-o", act)
    assert run(*argv, "--key", "ada") == 0
    assert code_of(capsys, "purge", act, "--root", tree) == "audit.people"
    assert run("countersign", act, "--key", "bob", "--root", tree) == 0
    status, done = result(capsys, "purge", act, "--root", tree)
    assert (status, done["act"], done["record"]) == (0, "spill.purge", seq)
    assert code_of(capsys, "open", seq, "--root", tree, *key) == "audit.payload"
    verdict = verify_log(tree / "audit", vkey=logs.vkey(), anchors=[tree / "receipts"])
    assert verdict.exit == 0, verdict.findings
    acts = [r for r in read_records(tree / "audit") if r["kind"] == "spill.purge"]
    assert (acts[0]["data"]["person_1"], acts[0]["data"]["person_2"]) == ("ada", "bob")


def test_prune_only_looks_without_an_act_and_says_what_holds_it(tree, tmp_path, capsys):
    status, found = result(capsys, "prune", "--root", tree)
    assert (status, found["pruned"], found["records"]) == (0, False, 0)
    assert "one segment" in found["held_by"][0]
    enrol(tree)
    argv = ("act", "prune", "--reason", "age", "--key", "ada", "--root", tree)
    assert code_of(capsys, *argv, "-o", tmp_path / "act") == "audit.retention"
    assert run(*argv, "--last", 65_535, "-o", tmp_path / "act") == 0
    assert run("countersign", tmp_path / "act", "--key", "bob", "--root", tree) == 0
    capsys.readouterr()
    assert code_of(capsys, "prune", tmp_path / "act", "--root", tree) == "audit.retention"
    assert code_of(capsys, "act", "burn", "--reason", "x", "--key", "ada", "-o", "x") == (
        "usage.argument"
    )


# -- exports --------------------------------------------------


def test_an_export_since_the_last_one_goes_on_and_is_counted(tree, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("export", "--root", tree, "-o", first) == 0
    assert run("export", "--root", tree, "--since", "LAST", "-o", second) == 0
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (first, second)]
    assert [m["number"] for m in manifests] == [1, 2]
    assert manifests[0]["since"] is None
    assert manifests[1]["since"] == {k: manifests[0][k] for k in ("size", "root")}
    keys = load_export_public(tree / "keys/export.pub")
    for folder in (first, second):
        verdict = verify_log(
            folder, vkey=logs.vkey(), anchors=[tree / "receipts"], export_keys=keys
        )
        assert verdict.exit == 0, verdict.findings
    capsys.readouterr()
    _, found = result(capsys, "status", "--root", tree)
    assert found["exported"] == manifests[1]["size"]
    for since in ("-1", "LATEST", "9" * 16):
        argv = ("export", "--root", tree, f"--since={since}", "-o", tmp_path / "x")
        assert code_of(capsys, *argv) == "usage.argument"
    argv = ("export", "--root", tree, "--since=9999", "-o", tmp_path / "x")
    assert code_of(capsys, *argv) == "audit.absent"


def test_an_export_may_leave_payloads_out_and_says_so(tree, sealed, tmp_path, capsys):
    assert run("export", "--root", tree, "--no-payloads", "-o", tmp_path / "out") == 0
    assert run("export", "--root", tree, "-o", tmp_path / "all") == 0
    capsys.readouterr()
    argv = ("--vkey", tree / "keys/audit.vkey", "--anchors", tree / "receipts")
    status, verdict = result(capsys, "verify", tmp_path / "out", *argv)
    assert status == 0
    assert "left out" in json.dumps(verdict["findings"])
    status, verdict = result(capsys, "verify", tmp_path / "all", *argv)
    assert status == 0
    assert "left out" not in json.dumps(verdict["findings"])
    seq, key = sealed
    assert run("open", seq, tmp_path / "all", *key) == 0
    with pytest.raises(RefusedError):
        load_export_public(tree / "keys/audit.vkey")


def test_serve_needs_a_socket(tree, capsys):
    assert code_of(capsys, "serve", "--root", tree) == "usage.argument"
    argv = ("serve", "--root", tree, "--socket", tree / "s", "--group", "no-such-group")
    assert code_of(capsys, *argv) == "usage.argument"
