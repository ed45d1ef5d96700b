"""An export and its three readers: `airgap audit import`, one file of Python, one of Go."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from airgap.audit import load_ring
from airgap.audit.export.importing import import_export
from airgap.audit.export.sign import ExportKey, load_export_public
from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import Layout, last_checkpoint

TOOLS = Path(__file__).resolve().parents[1] / "airgap/audit/tools"
GO_PATH = Path("/usr/share/gocode/src/golang.org/x/mod/sumdb")


def go_environment(cache):
    return os.environ | {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(cache)}


def need_go():
    if shutil.which("go") is None or not GO_PATH.is_dir():
        pytest.skip("Go or x/mod is missing (apt packages golang-go, golang-golang-x-mod-dev)")


def go_program(source, folder):
    """Compile a Go file with what Debian has, or skip."""
    need_go()
    out = folder / source.stem
    done = subprocess.run(
        ["go", "build", "-o", str(out), str(source)],
        env=go_environment(folder / "cache"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def go_verifier(tmp_path_factory):
    return go_program(TOOLS / "verify_export.go", tmp_path_factory.mktemp("go"))


def _module():
    spec = importlib.util.spec_from_file_location("verify_export", TOOLS / "verify_export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERIFY = _module()


@dataclass(frozen=True)
class Case:
    """An export with all that its reader holds."""

    folder: Path

    @property
    def out(self):
        return self.folder / "out"

    @property
    def key(self):
        return ExportKey.load(self.folder / "keys/export.pem")

    def options(self, *, anchors=True):
        given = [
            "--vkey",
            self.folder / "keys/audit.vkey",
            "--export-key",
            self.folder / "keys/export.pub",
        ]
        return [*given, "--anchors", self.folder / "anchors"] if anchors else given

    def ours(self, *, anchors=True, memory="ours"):
        return import_export(
            self.out,
            self.folder / memory,
            vkey=load_ring(self.folder / "keys/audit.vkey"),
            export_keys=load_export_public(self.folder / "keys/export.pub"),
            anchors=[self.folder / "anchors"] if anchors else [],
        ).verdict.exit

    def python(self, *, anchors=True, memory="python"):
        said = io.StringIO()
        arguments = [
            self.out,
            *self.options(anchors=anchors),
            "--memory",
            self.folder / memory,
            "--json",
        ]
        with contextlib.redirect_stdout(said):
            status = VERIFY.main([str(each) for each in arguments])
        document = json.loads(said.getvalue())
        assert (document["exit"], VERIFY.EXITS[document["verdict"]]) == (status, status)
        return status

    def go(self, program, *, anchors=True, memory="go"):
        arguments = [
            self.out,
            *self.options(anchors=anchors),
            "--memory",
            self.folder / memory,
            "--json",
        ]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert json.loads(done.stdout)["exit"] == done.returncode, done.stderr
        return done.returncode


def export_of(folder, out, *, number=2, rows="jsonl", since=0):
    layout = Layout(folder / "audit")
    path = folder / "keys/export.pem"
    key = ExportKey.load(path) if path.exists() else ExportKey.create(path)
    head = last_checkpoint(layout.journal)[0]
    export_log(layout, out, Plan(head, rows, since, number, key=key))
