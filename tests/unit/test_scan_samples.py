"""The 21 samples of weight-file attacks, on both sides (docs/design/bundle.md, 5)."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import scan_samples
import tiny_llama

from bundle.scan import scan_payload
from bundle.scan.onnx import parse_onnx
from bundle.scan.payload import scan_file
from bundle.scan.roles import Role, payload_role, role_of
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view
from bundle.staging.inspect import inspect_source
from policy.errors import RefusedError


def scan_folder(folder: Path) -> None:
    """Give every file of a folder to the parser of its role, as both sides do."""
    regular = {
        p.name: p.stat().st_size for p in folder.iterdir() if stat.S_ISREG(p.lstat().st_mode)
    }
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue  # the walks of both sides refuse it; here the graph must not rely on it
        data = open_view(path)
        role = role_of(path.name, bytes(data[:64]))
        if role is Role.WEIGHTS:
            parse_safetensors(data)
        elif role is Role.ONNX:
            parse_onnx(data, sizes=regular.get)
        else:
            scan_file(data, role, path.name)


@pytest.mark.parametrize("name", scan_samples.SAMPLES)
def test_sample_gets_its_verdict(name, tmp_path):
    code = scan_samples.write_sample(name, tmp_path)
    if code is None:
        scan_folder(tmp_path)
        return
    with pytest.raises(RefusedError) as caught:
        scan_folder(tmp_path)
    assert caught.value.code == code
    if code in {"scan.pickle", "scan.role", "scan.config", "scan.template"}:
        assert caught.value.hint


@pytest.mark.parametrize(
    "name", [n for n in scan_samples.SAMPLES if not n.startswith(("12", "21"))]
)
def test_sample_inside_a_sound_snapshot_is_refused_by_inspect(name, tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "model")
    assert inspect_source(folder).ready

    code = scan_samples.write_sample(name, folder)

    report = inspect_source(folder)
    assert code in {error.code for error in report.refusals}
    assert report.as_document()["verdict"] == "refused"
    with pytest.raises(RefusedError):
        report.require_ready()


def test_symbolic_link_is_refused_by_the_walk(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "model")
    scan_samples.write_sample("12 ONNX symbolic link (CVE-2026-34447)", folder)
    with pytest.raises(RefusedError) as caught:
        inspect_source(folder)
    assert caught.value.code == "source.link"


# -- the same on the secured side -------------------------------------------------------------


def listing(files: dict[str, bytes]) -> SimpleNamespace:
    """Return what the scan asks of a manifest; roles follow the names where they can."""

    def role(path: str) -> str:
        try:
            return payload_role(path).value
        except RefusedError:
            return "document"

    entries = [
        SimpleNamespace(path=path, role=role(path), size=len(content), sha256="0" * 64)
        for path, content in files.items()
    ]
    return SimpleNamespace(files=entries, runtimes=())


@pytest.mark.parametrize(
    "name", [n for n in scan_samples.SAMPLES if not n.startswith(("12", "21"))]
)
def test_sample_in_a_payload_is_refused(name):
    code, files = scan_samples.SAMPLES[name]
    folder = "wheels" if name.startswith("20") else "m"
    payload = {f"payload/{folder}/{path}": content for path, content in files.items()}
    if name.startswith("13"):  # there the data file bears the name that staging gives it
        payload = {
            "payload/m/model.onnx": scan_samples.reads("w.onnx_data", __class__="x"),
            "payload/m/w.onnx_data": bytes(16),
        }
    with pytest.raises(RefusedError) as caught:
        scan_payload(lambda path: memoryview(payload[path]), listing(payload))
    assert caught.value.code == code


def test_quarantine_on_disk_and_reader_agree(tmp_path):
    files = {
        "payload/m/config.json": b'{"model_type": "llama", "x": "org/name"}',
        "payload/m/LICENSE": b"words",
        "payload/m/model.onnx": scan_samples.onnx_model(),
    }
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    manifest = listing(files)
    from_disk = scan_payload(tmp_path, manifest)
    from_reader = scan_payload(lambda path: memoryview(files[path]), manifest)
    assert from_disk == from_reader
    assert [finding.path for finding in from_disk.findings] == ["payload/m/config.json"]


def test_role_of_the_manifest_must_be_that_of_the_name():
    files = {"payload/m/config.json": b"{}"}
    manifest = listing(files)
    assert scan_payload(lambda path: memoryview(files[path]), manifest).files
    manifest.files[0].role = "document"
    with pytest.raises(RefusedError, match="its name says config"):
        scan_payload(lambda path: memoryview(files[path]), manifest)


def test_size_of_the_manifest_must_be_that_of_the_bytes():
    files = {"payload/m/config.json": b"{}"}
    manifest = listing(files)
    with pytest.raises(RefusedError, match="listed 2"):
        scan_payload(lambda _: memoryview(b"{} "), manifest)


@pytest.mark.parametrize(
    "path", ["payload/m/deep/config.json", "payload/x.json", "payload/m/run.py"]
)
def test_payload_has_no_other_places(path):
    with pytest.raises(RefusedError) as caught:
        payload_role(path)
    assert caught.value.code == "scan.role"
