"""Our log, receipts and consistency proofs, read by Debian's Go checksum database code."""

import os
import shutil
import subprocess
from pathlib import Path

import audit_logs as logs
import pytest

from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import Layout, last_checkpoint

SOURCE = Path(__file__).resolve().parents[1] / "data/sumdb/sumdb.go"
X_MOD = Path("/usr/share/gocode/src/golang.org/x/mod/sumdb")


@pytest.fixture(scope="module")
def sumdb(tmp_path_factory):
    if shutil.which("go") is None or not X_MOD.is_dir():
        pytest.skip("Go or x/mod is missing (apt packages golang-go, golang-golang-x-mod-dev)")
    folder = tmp_path_factory.mktemp("sumdb")
    environment = os.environ | {
        "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(folder / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        ["go", "build", "-o", str(folder / "sumdb"), str(SOURCE)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "sumdb"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return an export of a log of more than two tiles, with a receipt."""
    folder = tmp_path_factory.mktemp("log")
    receipt = logs.write_log(folder, 320)[100]
    logs.keep(receipt, folder / "receipt.tlog-proof")
    layout = Layout(folder / "audit")
    head = last_checkpoint(layout.journal)[0]
    export_log(layout, folder / "out", Plan(head, "jsonl", since=300))
    return folder


def ask(sumdb, folder):
    out = folder / "out"
    done = subprocess.run(
        [
            sumdb, out / "log", folder / "keys/audit.vkey", folder / "receipt.tlog-proof",
            out / "since.tlog-witness",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_go_proves_every_record_from_our_tiles_and_takes_our_proofs(sumdb, base):
    size = last_checkpoint(Layout(base / "audit").journal)[0].size
    status, said = ask(sumdb, base)
    assert (status, said.split()[0], said.split()[1], said.split()[3]) == (
        0,
        "OK",
        str(size),
        "300",
    )
    assert size > 600


@pytest.mark.parametrize(
    "name",
    [
        "out/log/seg/00000000.jsonl", "out/log/tile/0/001", "out/log/checkpoint",
        "receipt.tlog-proof", "out/since.tlog-witness",
    ],
)  # fmt: skip
def test_go_refuses_what_was_changed(sumdb, base, tmp_path, name):
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    assert ask(sumdb, folder)[0] == 0
    path = folder / name
    content = bytearray(path.read_bytes())
    middle = 60 if name.startswith("receipt") else len(content) // 2
    content[middle] = ord("A") if content[middle] != ord("A") else ord("B")
    path.write_bytes(content)
    assert ask(sumdb, folder)[0] == 1


def test_tlog_scales_reads_the_tiles_of_an_export(base):
    pytest.importorskip("tlog_scales", reason="tlog-scales is not installed")
    from tlog_scales import backend, reader, signing, tlog

    folder = base / "out/log"
    head = tlog.Checkpoint.from_text((folder / "checkpoint").read_text())
    head.verify(signing.Vkey.from_string(str(logs.vkey())))
    tiles = reader.TilesReader(backend.LocalBackend(folder))
    tiles.set_size(head.size)
    assert tiles.calculate_root_hash() == head.root_hash
