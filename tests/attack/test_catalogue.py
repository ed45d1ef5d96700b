"""The catalogue of attacks is complete: every row is carried out by a test that is there."""

import ast
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import attacks
import bundles
import catalogue
import pytest

from airgap.install import Store, install
from bundle import trust
from bundle.write import Member
from policy.errors import RefusedError

TESTS = Path(__file__).parents[1]
ROOTS = bundles.make_trust()


@cache
def names_in(path):
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", catalogue.CATALOGUE)
def test_row_is_carried_out(row):
    known = {attack.name for attack in attacks.ATTACKS}
    for reference in catalogue.CATALOGUE[row]:
        if reference.startswith("attack: "):
            assert reference.removeprefix("attack: ") in known
        else:
            path, _, name = reference.partition("::")
            assert name in names_in(path), reference
    assert bool(catalogue.CATALOGUE[row]) != (row in catalogue.OPEN)


def test_the_catalogue_has_its_size():
    assert len(catalogue.CATALOGUE) == 68
    assert len(catalogue.CATALOGUE) - len(catalogue.OPEN) >= 55


# -- rows of their own ------------------------------------------------------------------------


class Verdict:
    canonical = b"{}"
    digest = trust.Digest.of(b"{}")

    def __init__(self, *, permitted):
        self.permitted = permitted

    def refusal(self):
        return RefusedError("policy.denied", "the policy of this host denies it")


def bring_in(path, root, *, permitted=True, progress=None, audit=lambda event: event):
    return install(
        path,
        root=root,
        now=bundles.NOW,
        gate=lambda *_: Verdict(permitted=permitted),
        audit=audit,
        progress=progress,
    )


def test_a_pack_in_the_bundle_permits_nothing(tmp_path):
    """What the bundle says of policy travels along as a record; only this host decides."""
    pack = b"rules:\n- id: ALLOW-ALL\n  effect: permit\n"
    decision = b'{"outcome":"permit"}'
    extra = (
        Member("META/policy/pack.yaml", pack, "policy", "text/plain"),
        Member("META/policy/admission.json", decision, "policy", "application/json"),
    )
    path, root = tmp_path / "x.agb", tmp_path / "root"
    bundles.make_bundle(path, members=bundles.make_members(extra=extra))
    trust.save_trust(ROOTS, root / "trust")
    with pytest.raises(RefusedError) as caught:
        bring_in(path, root, permitted=False)
    assert caught.value.code == "policy.denied"
    assert Store(root / "store").current() is None
    assert bring_in(path, root).copied


def kill_at(step, path, root):
    """Install in a process of its own that is killed at a step; return how it ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]

    def audit(event):
        if event.phase == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    def progress(done, total):
        if (step == "copy" and done > total // 4) or (step == "read" and done > total * 0.8):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        bring_in(path, root, audit=audit, progress=progress)
    finally:
        os._exit(0)


@pytest.mark.parametrize("step", ["intent", "copy", "admission", "read", "outcome"])
def test_an_install_killed_at_any_step_leaves_the_old_bundle(step, tmp_path):
    one, two, root = tmp_path / "one.agb", tmp_path / "two.agb", tmp_path / "root"
    bundles.make_bundle(one)
    members = bundles.make_members(bundles.make_weights(seed=2))
    bundles.make_bundle(two, members=members, version="2.0", epoch=2)
    trust.save_trust(ROOTS, root / "trust")
    old = bring_in(one, root)
    assert kill_at(step, two, root) == signal.SIGKILL
    store = Store(root / "store")
    if step == "outcome":  # activated, and killed before the log could say so
        assert store.current().digest in {old.bundle.digest, bring_in(two, root).bundle.digest}
    else:
        assert store.current() == old.bundle
    assert bring_in(two, root).bundle.manifest.version == "2.0"


def test_a_module_of_the_working_folder_is_not_loaded(tmp_path):
    for name in ("policy", "bundle", "airgap", "json"):
        (tmp_path / f"{name}.py").write_text("open('loaded', 'w').close()\nraise SystemExit(77)\n")
    program = Path(sys.executable).with_name("airgap")
    done = subprocess.run(
        [program, "verify", "none.agb"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode in {1, 3}
    assert "none.agb" in done.stderr or "trust" in done.stderr
    assert not (tmp_path / "loaded").exists()
