"""Root writes a log of its service's account: what is made there belongs to that account."""

import multiprocessing
import os
import stat
import tempfile
from pathlib import Path

import pytest

from airgap.audit import Actor, AuditLog, load_ring, verify_log
from airgap.audit.disk import Disk
from airgap.audit.tiles import SEGMENT
from policy.errors import RefusedError
from tests import audit_logs as logs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
UID, GID = 65534, 65534
ACCOUNT = "nobody"


@pytest.fixture
def tree():
    """A tree as a system installation has it, where the account can reach it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        logs.write_key(root / "keys" / "audit.pem")
        (root / "audit").mkdir(mode=0o700)
        for path in (root / "audit", root / "keys", *(root / "keys").iterdir()):
            os.chown(path, UID, GID)
        yield root


def open_log_of(tree, **options):
    return AuditLog.open(
        tree / "audit", key=tree / "keys" / "audit.pem", reserve_bytes=4096,
        **{"account": ACCOUNT, **options},
    )  # fmt: skip


def as_service(tree):
    """Append as the account does, in a process of its own."""

    def act():
        os.setgroups([])
        os.setgid(GID)
        os.setuid(UID)
        with open_log_of(tree) as log:
            log.put_object(b"of the service")
            logs.infer(log)

    child = multiprocessing.get_context("fork").Process(target=act)
    child.start()
    child.join(60)
    return child.exitcode


def owners(folder):
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in [folder, *folder.rglob("*")]}


def test_what_root_makes_is_the_accounts_and_its_service_goes_on(tree):
    for _ in range(2):  # a new log, and one that is there
        with open_log_of(tree, disk=logs.QuickDisk()) as log:
            logs.infer(log)
            log.put_object(os.urandom(8))
            logs.fill(log, SEGMENT + 3)  # on to a new segment
            log.rotate_key(Actor("root"))
            receipt = logs.infer(log)
        assert owners(tree / "audit") == owners(tree / "keys") == {(UID, GID)}
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tree / "audit").rglob("*")}
        assert modes == {0o700, 0o600}
        assert as_service(tree) == 0
    ring = tree / "keys" / "audit.vkey"
    kept = [logs.keep(receipt, tree / "last.tlog-proof")]
    verdict = verify_log(tree / "audit", vkey=load_ring(ring), anchors=kept)
    assert verdict.code == "", verdict
    assert verdict.size > receipt.size


def test_a_folder_of_another_account_is_refused_untouched(tree):
    for account in ("daemon", "no-such-account"):
        with pytest.raises(RefusedError, match="belongs to uid 65534") as refused:
            open_log_of(tree, account=account)
        assert refused.value.code == "audit.owner"
        assert "sudo -u" in refused.value.hint
    assert not list((tree / "audit").iterdir())


@pytest.mark.parametrize("what", ["roots", "link", "pipe", "linked folder", "key"])
def test_what_is_not_the_accounts_own_is_refused(tree, what):
    with open_log_of(tree, disk=logs.QuickDisk()) as log:
        logs.infer(log)
    outside = tree / "outside"
    outside.mkdir()
    place = tree / "audit" / "log" / "checkpoint.tmp"
    if what == "key":
        place = tree / "keys" / "audit.next.pem"
    if what in {"roots", "key"}:
        place.touch()
    elif what == "pipe":
        os.mkfifo(place)
        os.chown(place, UID, GID)
    elif what == "link":
        place.symlink_to(outside / "made")
        os.lchown(place, UID, GID)
    else:
        place = tree / "audit" / "log" / "objects" / "aa"
        place.symlink_to(outside)
        os.lchown(place, UID, GID)
    with pytest.raises(RefusedError, match=place.name) as refused:
        open_log_of(tree)
    assert refused.value.code == "audit.owner"
    if what not in {"linked folder", "key"}:  # and one put there later
        with pytest.raises(OSError, match=place.name):
            Disk().put(place.with_name("checkpoint"), b"more")
    assert not list(outside.iterdir())
    place.unlink(missing_ok=True)
    open_log_of(tree).close()


def test_a_folder_that_is_a_link_takes_nothing(tree):
    outside, link = tree / "outside", tree / "audit" / "aa"
    outside.mkdir()
    link.symlink_to(outside)
    os.lchown(link, UID, GID)
    for act in (
        lambda: Disk().put(link / "x", b"x"),
        lambda: Disk().mkdir(link / "x"),
        lambda: Disk().open(link / "x", os.O_CREAT | os.O_WRONLY),
    ):
        with pytest.raises(OSError, match="aa"):
            act()
    assert not list(outside.iterdir())


def test_a_file_that_exists_is_kept_or_emptied_as_asked(tree):
    path = tree / "audit" / "some"
    Disk().put(path, b"first")
    with pytest.raises(FileExistsError):
        Disk().open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(Disk().open(path, os.O_CREAT | os.O_WRONLY))
    assert path.read_bytes() == b"first"
    os.close(Disk().open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
    assert path.read_bytes() == b""
    assert owners(tree / "audit") == {(UID, GID)}
    os.close(Disk().open(tree / "roots", os.O_CREAT | os.O_WRONLY))
    assert owners(tree / "roots") == {(0, 0)}
