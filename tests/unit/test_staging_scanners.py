"""Scanners from outside: asked under the seal, a hit refuses, silence and absence are on record."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny_llama
from staging_runs import run_inline

from airgap.enclave import run_sealed
from bundle.staging.inspect import inspect_source
from bundle.staging.scanners import find_site
from bundle.staging.unpickle import unpickle
from policy.errors import RefusedError

PROGRAM = """
import socket, sys, pathlib
def main():
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
        print("network: refused by nobody")
    except OSError as error:
        print("network:", type(error).__name__)
    folder = pathlib.Path(sys.argv[-1])
    if folder.is_dir():
        print("files:", *sorted(path.name for path in folder.iterdir()))
    {end}
"""


def install(base: Path, name: str, end: str, python: str | None = None) -> Path:
    """Make an environment with one scanner in it, as pip leaves it; returns its bin folder."""
    number = python or f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = base / "lib" / number / "site-packages"
    info = site / f"{name}-1.2.3.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}_program.py").write_text(PROGRAM.format(end=end))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{name} = {name}_program:main\n")
    folder = base / "bin"
    folder.mkdir()
    command = folder / name
    command.write_text("#!/bin/false\n")
    command.chmod(0o755)
    return folder


@pytest.fixture
def snapshot(tmp_path):
    return tiny_llama.write_snapshot(tmp_path / "model")


def runs(report) -> dict[str, dict[str, str]]:
    return {item["name"]: item for item in report.as_document()["scanners"]}


def on_path(monkeypatch, *folders: Path) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([*map(str, folders), "/usr/bin", "/bin"]))


def test_absence_is_a_result(snapshot, monkeypatch):
    on_path(monkeypatch)
    found = runs(inspect_source(snapshot, run_sealed=run_inline))
    assert set(found) == {"picklescan", "modelscan", "modelaudit"}
    assert {item["verdict"] for item in found.values()} == {"not run"}


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        ("sys.exit(0)", "clean"),
        ("print('evil.bin is bad'); sys.exit(1)", "hit"),
        ("sys.exit(2)", "not run"),
        ("raise ValueError('broken')", "not run"),
        ("return None", "clean"),
    ],
)
def test_its_exit_decides_and_a_hit_refuses(snapshot, tmp_path, monkeypatch, end, verdict):
    on_path(monkeypatch, install(tmp_path / "env", "picklescan", end))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "picklescan_program", raising=False)
    report = inspect_source(snapshot, run_sealed=run_inline)
    found = runs(report)["picklescan"]
    assert (found["verdict"], found["version"]) == (verdict, "1.2.3")
    assert [e.code for e in report.refusals] == (["scan.tripwire"] if verdict == "hit" else [])
    if verdict == "hit":
        assert "evil.bin" in report.refusals[0].message


def test_it_runs_without_a_network_and_sees_the_files_only(snapshot, tmp_path, monkeypatch):
    on_path(monkeypatch, install(tmp_path / "env", "modelscan", "sys.exit(1)"))
    report = inspect_source(snapshot, run_sealed=run_sealed)
    text = runs(report)["modelscan"]["text"]
    assert runs(report)["modelscan"]["verdict"] == "hit", text
    assert "config.json" in text
    assert "refused by nobody" not in text
    assert "network:" in text


def test_without_a_seal_nothing_runs(snapshot, tmp_path, monkeypatch):
    on_path(monkeypatch, install(tmp_path / "env", "picklescan", "sys.exit(1)"))
    report = inspect_source(snapshot)
    assert runs(report)["picklescan"]["verdict"] == "not run"
    assert report.ready


def test_a_scanner_for_another_python_is_not_run(tmp_path, monkeypatch):
    on_path(monkeypatch, install(tmp_path / "env", "picklescan", "sys.exit(1)", "python2.7"))
    assert find_site("picklescan") is None
    assert find_site("no-such-scanner") is None


def test_pickles_are_shown_to_scanners_before_they_are_read(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    folder = tiny_llama.write_snapshot(tmp_path / "published")
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(2)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("picklescan", "fickling"):  # an earlier test loaded its own, in this process
        monkeypatch.delitem(sys.modules, f"{name}_program", raising=False)
    clean = install(tmp_path / "one", "fickling", "assert folder.is_file(); sys.exit(0)")
    on_path(monkeypatch, clean)
    record = unpickle(folder, tmp_path / "new", run_sealed=run_inline)
    assert record.scanners == ("picklescan not run", "modelscan not run", "fickling 1.2.3 clean")
    on_path(monkeypatch, clean, install(tmp_path / "two", "picklescan", "sys.exit(1)"))
    with pytest.raises(RefusedError) as caught:
        unpickle(folder, tmp_path / "other", run_sealed=run_inline)
    assert caught.value.code == "scan.tripwire"
    assert not (tmp_path / "other").exists()
