"""Root's acts on the log of a running service of another account: `airgap audit` as on a host.

The service runs as its account in a process of its own. Root exports, takes a cosigned head back,
prunes and purges through it; every file stays that account's, and the service goes on.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path

import audit_logs as logs
import pytest
from test_audit_acts_cli import code_of, enrol, result

from airgap import cli
from airgap.audit import Clock, load_ring, new_ulid, verify_log
from airgap.audit.layout import Layout, segment_range
from airgap.audit.payloads import HolderKey
from airgap.audit.query import read_records
from airgap.audit.service import Service
from airgap.audit.site import open_own_log
from airgap.audit.steward import OwnersLog, as_owner
from airgap.audit.tiles import SEGMENT
from airgap.config import load_site
from airgap.demo import site_toml
from policy.errors import RefusedError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root alone acts for other accounts")
UID, GID = 65534, 65534
PAYLOAD = b"<MoleculeS>CCO<MoleculeE>"


@pytest.fixture(scope="module")
def made():
    """A tree with a long log that is a year old, a sealed payload and two approvers."""
    with tempfile.TemporaryDirectory(prefix="airgap-root-", dir="/var/tmp") as name:
        tree = Path(name) / "tree"
        tree.mkdir(mode=0o755)
        (tree / "site.toml").write_text(
            site_toml(0) + f'\n[audit]\nsocket = "{name}/run/audit.sock"\npayloads = "sealed"\n'
        )
        (tree / "enclave").mkdir()
        holder = HolderKey.generate()
        options = {"disk": logs.QuickDisk(), "payload_key": holder.public}
        with logs.open_log(tree, **options) as log:
            decision, req = log.put_object(logs.DECISION), new_ulid()
            in_ = log.commit(PAYLOAD, b"\1" * 32, req=req, side="in")
            log.append(logs.intent(decision, req, in_=in_))
            log.append(logs.outcome(req))
            logs.fill(log, SEGMENT + 20)
            early = logs.infer(log)
            decision, req = log.put_object(logs.DECISION), new_ulid()
            in_ = log.commit(PAYLOAD + b"2", b"\2" * 32, req=req, side="in")
            late = log.append(logs.intent(decision, req, in_=in_))
            log.append(logs.outcome(req))
        (tree / "keys" / "payloads.pub").write_bytes(holder.public.as_pem())
        enrol(tree)
        logs.keep(early, tree / "receipts" / "early.tlog-proof")
        yield tree, late.seq


@pytest.fixture
def tree(made):
    """A copy, as an installation has it: log and keys are the account's, and served by it."""
    source, _ = made
    with tempfile.TemporaryDirectory(prefix="airgap-root-", dir="/var/tmp") as name:
        folder, run = Path(name), Path(name) / "run"
        folder.chmod(0o755)
        copy = shutil.copytree(source, folder / "tree", symlinks=True)
        site = (copy / "site.toml").read_text()
        (copy / "site.toml").write_text(site.replace(str(source.parent), str(folder)))
        copy.chmod(0o755)
        run.mkdir(mode=0o755)
        for path in (run, *(p for part in ("audit", "keys") for p in _all(copy / part))):
            os.chown(path, UID, GID)
        (copy / "keys").chmod(0o755)
        yield copy


def _all(folder):
    return [folder, *folder.rglob("*")]


def wait_for_socket(path):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as trial, contextlib.suppress(OSError):
            trial.connect(str(path))
            return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at {path}")


def as_account(act):
    """Start a fork of this process that is the account's and does one thing; its process id.

    A fork, since the account need not be able to read this interpreter: what it imports late is
    there already.
    """
    Clock().boot_id()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setgroups([])
        os.setresgid(GID, GID, GID)
        os.setresuid(UID, UID, UID)
        os.chdir("/")
        os.umask(0o077)
        status = act()
    except BaseException:  # noqa: BLE001 - a child that must not return into the tests
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def service_of(tree):
    """Serve the log as `airgap audit serve` does, as its account."""
    path = tree.parent / "run" / "audit.sock"

    def serve():
        with open_own_log(tree, load_site(tree), mode="service") as log:
            service = Service(log, path)
            signal.signal(signal.SIGTERM, lambda *_: service.stop())
            service.run()
        return 0

    child = as_account(serve)
    try:
        wait_for_socket(path)
        yield path
    finally:
        os.kill(child, signal.SIGTERM)
        assert ended(child) == 0


def owners(tree):
    return {
        (path.lstat().st_uid, path.lstat().st_gid)
        for part in ("audit", "keys")
        for path in _all(tree / part)
    }


def prepared(tree, tmp_path, capsys):
    """Export, and bring a cosigned head back, as root: what has to come before a pruning."""
    witness, note = tmp_path / "witness", tmp_path / "note"
    request, policy = tmp_path / "request", tmp_path / "policy.tlog"
    done = result(capsys, "export", "--root", tree, "-o", tmp_path / "export")
    assert done[0] == 0, done
    status, made = result(capsys, "witness", "init", witness, "--name", "isso.example/w1")
    assert status == 0
    assert result(capsys, "witness", "trust", witness, tree / "keys/audit.vkey")[0] == 0
    assert result(capsys, "witness", "request", "--root", tree, "-o", request)[0] == 0
    assert result(capsys, "witness", "cosign", witness, request, "-o", note)[0] == 0
    policy.write_text(f"witness w1 {made['vkey']}\nquorum w1\n")
    policy.chmod(0o600)  # root alone reads it, as in a folder of root's
    words = ("witness", "import", note, "--policy", policy, "--root", tree)
    status, found = result(capsys, *words)
    assert (status, found["quorum"]) == (0, True), found


def signed(tree, capsys, out, *words):
    """Write an act down as root, and let two people sign it."""
    words = ("act", *words, "--reason", "age", "--key", "ada", "--root", tree, "-o", out)
    done = result(capsys, *words)
    assert done[0] == 0, done
    out.chmod(0o600)
    assert result(capsys, "countersign", out, "--key", "bob", "--root", tree)[0] == 0
    return out


def verify(tree):
    ring = load_ring(tree / "keys" / "audit.vkey")
    found = verify_log(tree / "audit", vkey=ring, anchors=[tree / "receipts"])
    assert found.exit == 0, [str(each) for each in found.findings]
    return found


def test_root_prunes_a_served_log_and_everything_stays_its_accounts(tree, tmp_path, capsys):
    with service_of(tree) as path:
        status, found = result(capsys, "prune", "--root", tree)  # only looks
        assert (status, found["records"], found["pruned"]) == (0, 0, False)
        prepared(tree, tmp_path, capsys)
        status, found = result(capsys, "prune", "--root", tree)
        assert (status, found["records"]) == (0, SEGMENT)
        act = signed(tree, capsys, tmp_path / "act", "prune")
        status, found = result(capsys, "prune", act, "--root", tree)
        assert (status, found["pruned"], found["records"]) == (0, True, SEGMENT), found
        assert os.geteuid() == 0
        assert list(segment_range(Layout(tree / "audit"))) == [1]
        with OwnersLog(path) as held:  # and the service goes on
            held.append(logs.denial())
    assert owners(tree) == {(UID, GID)}
    acts = [r for r in read_records(tree / "audit") if r["kind"] == "prune"]
    assert [(r["phase"], r["actor"]["uid"], r["actor"]["name"]) for r in acts] == [
        ("intent", UID, "root"), ("outcome", UID, "root"),
    ]  # fmt: skip
    assert verify(tree).first == SEGMENT
    with service_of(tree):  # and comes up again
        status, found = result(capsys, "prune", "--root", tree)
        assert (status, found["records"]) == (0, 0)


def test_root_purges_a_payload_of_a_served_log(made, tree, tmp_path, capsys):
    seq = made[1]
    with service_of(tree):
        act = signed(tree, capsys, tmp_path / "act", "purge", "--record", seq)
        assert code_of(capsys, "purge", tmp_path / "none", "--root", tree) == "host.io"
        status, found = result(capsys, "purge", act, "--root", tree)
        assert (status, found["act"], found["record"]) == (0, "spill.purge", seq), found
        assert code_of(capsys, "purge", act, "--root", tree) == "audit.payload"
    assert len([p for p in Layout(tree / "audit").sealed.rglob("*") if p.is_file()]) == 1
    assert owners(tree) == {(UID, GID)}
    verify(tree)


def test_the_account_can_go_on_with_what_root_began(tree, tmp_path, capsys):
    """The keys of exports that root made are the account's: its own next export is signed, too."""
    with service_of(tree):
        done = result(capsys, "export", "--root", tree, "-o", tmp_path / "export")
        assert done[0] == 0, done
        out = tree.parent / "run" / "export"
        words = ["audit", "export", "--root", str(tree), "-o", str(out)]
        assert ended(as_account(lambda: cli.invoke(words))) == 0
        assert (out / "manifest.sig").is_file()
    assert owners(tree) == {(UID, GID)}


def test_without_a_service_root_prunes_no_log_of_an_unknown_account(tree, tmp_path, capsys):
    with service_of(tree):
        prepared(tree, tmp_path, capsys)
        act = signed(tree, capsys, tmp_path / "act", "prune")
    assert code_of(capsys, "prune", act, "--root", tree) == "audit.owner"
    assert list(segment_range(Layout(tree / "audit"))) == [0, 1]
    with service_of(tree):
        assert result(capsys, "prune", act, "--root", tree)[0] == 0


def test_a_link_that_the_account_put_in_the_way_leads_root_nowhere(made, tree, tmp_path, capsys):
    """A purge overwrites a file: where the account made it a link, it is not root who follows."""
    precious = tree.parent / "precious"
    precious.write_bytes(b"of root alone")
    precious.chmod(0o600)
    with service_of(tree):
        act = signed(tree, capsys, tmp_path / "act", "purge", "--record", made[1])
        for path in [p for p in Layout(tree / "audit").sealed.rglob("*") if p.is_file()]:
            path.unlink()
            path.symlink_to(precious)
            os.lchown(path, UID, GID)
        assert cli.invoke(["audit", "purge", str(act), "--root", str(tree), "--json"]) == 3
        assert "host." in capsys.readouterr().out
    assert precious.read_bytes() == b"of root alone"


def test_acting_as_the_owner_ends_with_the_block(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with as_owner(folder):
        assert os.geteuid() == 0  # it is root's own
    os.chown(folder, UID, GID)
    before = os.getgroups()

    def act():
        with as_owner(folder):
            assert (os.geteuid(), os.getegid(), os.getgroups()) == (UID, GID, [])
            raise RefusedError("audit.people", "stop")

    with pytest.raises(RefusedError):
        act()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, before)
