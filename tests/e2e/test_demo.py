"""The demonstration itself, on a machine whose network is gone: it needs none after the install."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest_road import SNAPSHOT

from airgap.demo import MARKER, prepare_folder
from policy.errors import UsageError

PROGRAM = [sys.executable, "-I", str(Path(sys.executable).with_name("airgap"))]


def test_demo_in_a_namespace_without_a_route(tmp_path):
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to take the network away")
    environment = {k: v for k, v in os.environ.items() if k not in {"CI", "GITHUB_ACTIONS"}}
    out = tmp_path / "demo-out"
    done = subprocess.run(
        [*("unshare", "--net"), *PROGRAM, "demo", "--out", out, "--source", SNAPSHOT, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    codes = [code for _, code, _ in found["refusals"]]
    assert codes[0] == "chunk.leaf"
    assert codes[1] == "policy.denied"
    assert codes[3] == "tampered"
    assert found["audit"]["verdict"] == "good"
    assert found["audit"]["anchors"] == 5
    assert {run["stamp"] for run in found["runs"]} == {"scientific_use: false – reference model"}
    for task in ("retrosynthesis", "molecule", "binding-site", "pocket-ligand", "material"):
        assert (out / "reports" / f"{task}.html").is_file()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    mine = tmp_path / "thesis.txt"
    mine.write_text("x")
    with pytest.raises(UsageError):
        prepare_folder(tmp_path)
    assert mine.read_text() == "x"


def test_an_earlier_demonstration_is_cleared(tmp_path):
    out = tmp_path / "demo"
    prepare_folder(out)
    (out / "old").mkdir(mode=0o500)
    prepare_folder(out)
    assert [path.name for path in out.iterdir()] == [MARKER]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_out_that_is_no_folder_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path)
    with pytest.raises(UsageError):
        prepare_folder(out)
