"""A copy of a log, a receipt or a key that is a pipe, a device or endless must not hold a reader.

Each call below would block, or read until memory ends, if the file were opened as it stands.
"""

import os
import resource
import shutil
import signal

import audit_logs as logs
import pytest
from typer.testing import CliRunner

from airgap.audit import load_vkey, verify_log
from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import MAX_JOURNAL_LINE, Layout, journal_line, last_checkpoint
from airgap.audit.query import read_records
from airgap.cli.app import build
from policy.errors import FaultError

VKEY = logs.vkey()
FILES = ("checkpoint", "checkpoints.jsonl", "seg/00000000.jsonl", "objects")
SPARSE = 3 << 30


@pytest.fixture(autouse=True)
def alarm():
    """End a test that blocks."""

    def fire(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fire)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tree(tmp_path):
    receipts = logs.write_log(tmp_path, 3)
    logs.keep(receipts[-1], tmp_path / "anchors" / "last.tlog-proof")
    return tmp_path


def place(tree, name):
    path = tree / "audit/log" / name
    return next(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else path


def verify(tree, anchors="anchors"):
    return verify_log(tree / "audit", vkey=VKEY, anchors=[tree / anchors])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_special_file_in_a_log_is_found_unread(tree, name, kind):
    path = place(tree, name)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    verdict = verify(tree)
    assert verdict.exit == 1
    assert verdict.findings[0].check == "files"
    assert verdict.findings[0].place.endswith(path.name)


def test_a_special_file_in_a_log_ends_show_and_export(tree):
    head = last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]
    path = place(tree, "seg/00000000.jsonl")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a plain file"):
        list(read_records(tree / "audit"))
    with pytest.raises(OSError, match="not a plain file"):
        export_log(Layout(tree / "audit"), tree / "out", Plan(head, "jsonl"))
    assert not (tree / "out").exists()
    assert not list(tree.glob(".out*"))


def test_an_export_copies_no_device(tree):
    head = last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]
    for path in [p for p in (tree / "audit/log/objects").rglob("*") if p.is_file()]:
        path.unlink()
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a plain file"):
        export_log(Layout(tree / "audit"), tree / "out", Plan(head, "jsonl"))


def test_a_pipe_is_no_anchor_no_key_and_no_receipt(tree):
    os.mkfifo(tree / "pipe")
    assert verify(tree, "pipe").exit == 3
    with pytest.raises(FaultError) as caught:
        load_vkey(tree / "pipe")
    assert caught.value.code == "audit.key"
    ended = CliRunner().invoke(
        build(), ["audit", "check-receipt", str(tree / "pipe"), "--root", str(tree)]
    )
    assert isinstance(ended.exception, FaultError)
    assert ended.exception.code == "host.io"


@pytest.mark.parametrize("name", [*FILES, "tile"])
def test_a_file_of_gigabytes_costs_no_memory(tree, name):
    path = place(tree, name)
    os.truncate(path, SPARSE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verify(tree).exit in {0, 1, 3}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_an_export_with_gigabytes_of_manifest_or_checkpoint_costs_no_memory(tree):
    head = last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]
    export_log(Layout(tree / "audit"), tree / "out", Plan(head, "jsonl"))
    for name in ("manifest.json", "log/checkpoint"):
        copy = shutil.copytree(tree / "out", tree / name.replace("/", "-"))
        os.truncate(copy / name, SPARSE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert verify_log(copy, vkey=VKEY, anchors=[tree / "anchors"]).exit == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


@pytest.mark.parametrize("junk", [1, 4096, MAX_JOURNAL_LINE, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_the_last_head_is_found_before_any_amount_of_debris(tree, junk, newline):
    journal = tree / "audit/log/checkpoints.jsonl"
    content = journal.read_bytes()
    found = last_checkpoint(journal)
    for debris in (b"\0" * junk + newline, b"\n" * junk, b"{}\n" * (junk // 3 + 1)):
        journal.write_bytes(content + debris)
        assert last_checkpoint(journal) == found


def test_the_last_head_is_found_wherever_a_block_begins(tree):
    journal = tree / "audit/log/checkpoints.jsonl"
    line = journal_line(last_checkpoint(journal)[0].note)
    for size in range((1 << 20) - 2, (1 << 20) + len(line) + 2, 37):
        journal.write_bytes(line + b"x" * size + b"\n")
        assert last_checkpoint(journal)[1] == len(line)
        journal.write_bytes(b"x" * size + b"\n" + line + b"x" * 100)
        assert last_checkpoint(journal)[1] == size + 1 + len(line)
