"""The built wheel in environments that hold no more than they must.

`python tests/bare_wheel.py --demo demo-out --work build/wheel` builds the wheel and installs it
twice: with the extras `cpu` and `science` (a lab: verify, install, run, audit) and with none (an
auditor: verify a bundle and a log). It uses the bundle, trust root and log that `airgap demo` left,
because only the staging side can make a bundle. `make wheel-test` runs it, pytest does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# What must not be there, whatever the resolver thinks.
ABSENT = ("torch", "transformers", "optimum", "sigstore", "onnx", "cyclonedx", "model_signing")
EXTRA_FREE = (*ABSENT, "numpy", "onnxruntime", "tokenizers", "rdkit", "huggingface_hub")


def main() -> None:
    """Build, install, run; exits with the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="what `airgap demo` left")
    parser.add_argument("--work", type=Path, required=True, help="a folder to build in; cleared")
    options = parser.parse_args()
    demo, work = options.demo.absolute(), options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    wheel = build_wheel(work)
    bundle = next((demo / "media").glob("*.agb"))
    test_lab(work, wheel, demo, bundle)
    test_auditor(work, wheel, demo, bundle)
    print("wheel-test: both environments pass")


def build_wheel(work: Path) -> Path:
    """Build the wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(work)]
    subprocess.run([*command, str(REPOSITORY)], check=True)
    return next(work.glob("airgap-*.whl"))


def install(work: Path, name: str, requirement: str) -> Path:
    """Make a fresh environment, install one requirement, return its `airgap`."""
    folder = work / name
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-c", str(REPOSITORY / "constraints.txt"), requirement], check=True)
    return folder / "bin" / "airgap"


def require_absent(airgap: Path, modules: tuple[str, ...]) -> None:
    """Fail when a module can be found in the environment of `airgap`."""
    script = "import importlib.util as u, sys; print([m for m in sys.argv[1:] if u.find_spec(m)])"
    found = subprocess.run(
        [str(airgap.with_name("python")), "-I", "-c", script, *modules],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]", f"must not be installed: {found.stdout}"


def run(airgap: Path, *argv: object, expect: int = 0) -> dict:
    """Run one command from a folder that holds a hostile `policy.py`, and return its document."""
    place = airgap.parents[2] / "elsewhere"
    place.mkdir(exist_ok=True)
    for name in ("policy.py", "bundle.py", "airgap.py"):
        (place / name).write_text("raise SystemExit('a module of the working folder was loaded')\n")
    environment = {k: v for k, v in os.environ.items() if k not in {"CI", "PYTHONPATH"}}
    done = subprocess.run(
        [str(airgap), *map(str, argv), "--json"],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    shown = " ".join(map(str, argv[:2]))
    assert done.returncode == expect, f"{shown}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(f"  {airgap.parents[1].name}: airgap {shown}: {done.returncode}")
    return json.loads(done.stdout)


def test_lab(work: Path, wheel: Path, demo: Path, bundle: Path) -> None:
    """A lab with the extras cpu and science does everything that a lab does."""
    airgap = install(work, "lab", f"airgap[cpu,science] @ {wheel.as_uri()}")
    require_absent(airgap, ABSENT)
    root = work / "tree"
    root.mkdir(mode=0o700)
    shutil.copy(demo / "lab" / "site.toml", root)
    document = demo / "media" / "root.json"
    fingerprint = run(airgap, "trust", "show", "--root", demo / "lab")["fingerprint"]
    run(
        airgap, *("trust", "init", "--from", document, "--fingerprint", fingerprint, "--root", root)
    )
    run(airgap, "verify", bundle, "--root", root)
    run(airgap, "install", bundle, "--root", root)
    receipt = work / "answer.tlog-proof"
    answer = run(
        airgap,
        *("run", "retrosynthesis", "--smiles", "CC(=O)Nc1ccc(O)cc1", "-n", "4", "--seed", "1"),
        *("--project", "route-design", "--root", root, "--receipt", receipt),
        *("--html", work / "report.html"),
    )
    assert answer["summary"]["n"] == 4
    export = work / "export"
    run(airgap, "audit", "export", "-o", export, "--root", root)
    vkey = root / "keys" / "audit.vkey"
    verdict = run(airgap, "audit", "verify", export, "--vkey", vkey, "--anchors", receipt)
    assert verdict["verdict"] == "good"
    snapshot = REPOSITORY / "reference" / "logos-ref-tiny" / "model"
    run(airgap, "inspect", snapshot)
    needs = run(
        airgap,
        *("build", snapshot, "-o", work / "x.agb", "--name", "m", "--version", "1"),
        *("--key", demo / "staging" / "keys" / "builder.pem", "--root", demo / "staging"),
        expect=3,
    )
    assert needs["code"] == "host.extra", needs


def test_auditor(work: Path, wheel: Path, demo: Path, bundle: Path) -> None:
    """An auditor without any extra verifies bundles and logs, and is told what `run` needs."""
    airgap = install(work, "auditor", f"airgap @ {wheel.as_uri()}")
    require_absent(airgap, EXTRA_FREE)
    run(airgap, "verify", bundle, "--trust", demo / "lab" / "trust")
    vkey = demo / "lab" / "keys" / "audit.vkey"
    receipts = demo / "receipts"
    verdict = run(
        airgap, "audit", "verify", demo / "audit-export", "--vkey", vkey, "--anchors", receipts
    )
    assert verdict["verdict"] == "good"
    refused = run(
        airgap,
        *("run", "molecule", "-n", "1", "--seed", "1", "--project", "route-design"),
        *("--root", demo / "lab"),
        expect=3,
    )
    assert refused["code"] == "host.extra", refused


if __name__ == "__main__":
    main()
