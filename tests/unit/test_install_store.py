"""Install: nothing before the seal and every hash, resume after a kill, old state on faults."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import attacks
import bundles
import pytest
from disks import fill, mounted

from airgap.install import Store, install, installer, verify_installed
from airgap.install.quarantine import make_writable
from bundle import trust
from policy.errors import CODES, AirgapError, FaultError, RefusedError
from policy.terms import Digest

TESTS = Path(__file__).parents[1]
ROOTS = bundles.make_trust()


@dataclass(frozen=True)
class Verdict:
    """A decision as the installer sees it."""

    permitted: bool = True
    canonical: bytes = b"{}"

    @property
    def digest(self):
        return Digest.of(self.canonical)

    def refusal(self):
        return RefusedError("policy.denied", "the policy denies it")


@dataclass
class Log:
    """An audit log that keeps events, and can fail at one."""

    events: list = field(default_factory=list)
    fails_at: str = ""

    def __call__(self, event):
        if self.fails_at == f"{event.phase} {event.result}".strip():
            raise FaultError("host.io", "the log is full")
        self.events.append(event)
        return len(self.events)

    @property
    def phases(self):
        return [f"{event.phase} {event.result}".strip() for event in self.events]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    bundles.make_bundle(folder / "one.agb")
    bundles.make_bundle(
        folder / "two.agb", members=bundles.make_members(bundles.make_weights(seed=2)),
        version="2.0", epoch=2,
    )  # fmt: skip
    return folder


@pytest.fixture
def root(tmp_path):
    trust.save_trust(ROOTS, tmp_path / "root" / "trust")
    return tmp_path / "root"


def bring_in(path, root, *, log=None, verdict=None, **more):
    more.setdefault("now", bundles.NOW)
    return install(
        path,
        root=root,
        gate=lambda *_: verdict or Verdict(),
        audit=log if log is not None else Log(),
        **more,
    )


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def digest_of(path):
    return hashlib.sha256(attacks.canonical_json(attacks.Forge.of(path.read_bytes()).manifest))


# -- the good road ----------------------------------------------------------------------------


def test_install_activates_read_only_files_and_records_each_step(release, root):
    log, seen = Log(), []
    done = bring_in(release / "one.agb", root, log=log, progress=lambda d, t: seen.append((d, t)))
    assert log.phases == ["intent", "admission", "outcome complete"]
    assert done.receipt == 3
    assert log.events[-1].digest == done.bundle.digest
    assert log.events[-1].seal.approvers == ("alice", "bob")
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    store = Store(root / "store")
    current = store.current()
    assert current == done.bundle
    assert store.list() == (current,)
    folder = current.model_folder(bundles.MODEL)
    assert (folder / "model.onnx_data").read_bytes() == bundles.make_weights()
    for path in current.folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o555 if path.is_dir() else 0o444), path
    assert current.folder.stat().st_mode & 0o777 == 0o555
    assert verify_installed(current.folder) == current.manifest
    assert store.unfinished() == ()
    assert store.floors().epochs == {"tiny-line": (1, current.digest)}
    assert store.floors().clock == bundles.CREATED
    assert store.floors(bundles.NOW).clock == bundles.NOW


def test_an_installed_bundle_is_found_by_digest_name_and_version(release, root):
    bring_in(release / "one.agb", root)
    done = bring_in(release / "two.agb", root)
    store = Store(root / "store")
    assert store.current().digest == done.bundle.digest
    assert store.get("tiny").digest == done.bundle.digest  # two answer, the current one wins
    assert store.get("tiny-1.0").manifest.version == "1.0"
    for name in (str(done.bundle.digest), done.bundle.digest.hex):
        assert store.get(name) == done.bundle
    with pytest.raises(RefusedError) as caught:
        store.get("other")
    assert caught.value.code == "store.missing"
    with pytest.raises(RefusedError, match="no model"):
        done.bundle.model_folder("other")
    assert done.previous is not None


def test_an_empty_store_says_so(tmp_path):
    store = Store(tmp_path / "none")
    assert store.list() == ()
    assert store.current() is None
    assert store.unfinished() == ()
    assert store.floors().clock is None
    with pytest.raises(RefusedError):
        store.get("tiny")
    assert not (tmp_path / "none").exists()


def test_installing_again_only_activates(release, root):
    first = bring_in(release / "one.agb", root)
    bring_in(release / "two.agb", root)
    Store(root / "store").activate(first.bundle.digest)
    log = Log()
    again = bring_in(release / "two.agb", root, log=log)
    assert not again.copied
    assert log.phases == ["intent", "admission", "outcome complete"]
    assert Store(root / "store").current() == again.bundle


def test_an_older_epoch_never_comes_back(release, root):
    bring_in(release / "two.agb", root)
    before = files_below(root)
    log = Log()
    with pytest.raises(RefusedError) as caught:
        bring_in(release / "one.agb", root, log=log)
    assert caught.value.code == "trust.epoch"
    assert log.phases == ["intent", "outcome refused"]
    assert log.events[-1].code == "trust.epoch"
    assert files_below(root) == before


# -- refusals ---------------------------------------------------------------------------------


def test_the_policy_is_asked_before_activation_and_its_no_is_recorded(release, root):
    log = Log()
    with pytest.raises(RefusedError) as caught:
        bring_in(release / "one.agb", root, log=log, verdict=Verdict(permitted=False))
    assert caught.value.code == "policy.denied"
    assert log.phases == ["intent", "admission", "outcome refused"]
    store = Store(root / "store")
    assert store.current() is None
    assert store.list() == ()
    (left,) = store.unfinished()
    assert (left / "refused").read_text() == "policy.denied\n"
    done = bring_in(release / "one.agb", root)  # the rules changed: nothing is copied twice
    assert done.resumed == done.bundle.manifest.body.leaves


HEAD_ROWS = [
    row for row in attacks.ATTACKS if row.code.startswith(("seal.", "trust.", "manifest.canon"))
]


@pytest.mark.parametrize("row", HEAD_ROWS[::4], ids=lambda row: row.name)
def test_without_a_seal_nothing_is_written(row, release, root, tmp_path):
    path = tmp_path / "bad.agb"
    path.write_bytes(row.alter((release / "one.agb").read_bytes()))
    log = Log()
    with pytest.raises(RefusedError) as caught:
        bring_in(path, root, log=log)
    assert caught.value.code == row.code
    assert log.phases == ["intent", "outcome refused"]
    assert files_below(root / "store") == ["lock"]


def test_a_bad_chunk_is_never_written(release, root, tmp_path):
    good = (release / "one.agb").read_bytes()
    at = attacks.head_of(good)["body"][0] + attacks.CHUNK + 9
    path = tmp_path / "bad.agb"
    path.write_bytes(attacks.flip(good, at))
    with pytest.raises(RefusedError) as caught:
        bring_in(path, root)
    assert caught.value.code == "chunk.leaf"
    store = Store(root / "store")
    assert store.list() == ()
    (left,) = store.unfinished()
    assert (left / "refused").read_text() == "chunk.leaf\n"
    assert (left / "chunks").read_bytes() == b"\x01"
    written = left / "files/payload/tiny/model.onnx_data"
    assert bundles.make_weights().startswith(written.read_bytes())
    done = bring_in(release / "one.agb", root)
    assert done.resumed == 1


def test_contents_are_scanned_before_anything_is_installed(release, root, tmp_path):
    row = next(row for row in attacks.ATTACKS if row.name == "auto_map in the config")
    path = tmp_path / "bad.agb"
    path.write_bytes(row.alter((release / "one.agb").read_bytes()))
    asked = []
    with pytest.raises(RefusedError) as caught:
        install(
            path,
            root=root,
            now=bundles.NOW,
            gate=lambda *args: asked.append(args),
            audit=Log(),
        )
    assert caught.value.code == "scan.config"
    assert asked == []
    assert Store(root / "store").list() == ()


def test_newer_roots_are_kept_even_when_the_bundle_is_refused(root, tmp_path):
    longer = trust.add_key(
        ROOTS, bundles.public("mallory"), [bundles.signer("root")], now=bundles.ENROLLED
    )
    path = tmp_path / "new.agb"
    bundles.make_bundle(path, roots=longer, signers=("builder", "alice"))
    log = Log()
    with pytest.raises(RefusedError) as caught:
        bring_in(path, root, log=log)
    assert caught.value.code == "seal.threshold"
    assert log.phases == ["intent", "trust", "trust complete", "outcome refused"]
    assert trust.load_trust(root / "trust").version == longer.version
    bundles.make_bundle(path, roots=longer, signers=("builder", "alice", "mallory"))
    assert bring_in(path, root).seal.approvers == ("alice", "mallory")


def test_a_host_without_trust_accepts_nothing(release, tmp_path):
    with pytest.raises(RefusedError) as caught:
        bring_in(release / "one.agb", tmp_path)
    assert caught.value.code == "trust.missing"


def test_the_clock_may_not_lie_before_the_last_record(release, root):
    with pytest.raises(RefusedError) as caught:
        bring_in(release / "one.agb", root, last_record=bundles.NOW + timedelta(seconds=1))
    assert caught.value.code == "trust.clock"


# -- faults -----------------------------------------------------------------------------------


def test_what_the_log_does_not_hold_did_not_happen(release, root):
    first = bring_in(release / "one.agb", root)
    for stage in ("intent", "admission", "outcome complete"):
        with pytest.raises(FaultError):
            bring_in(release / "two.agb", root, log=Log(fails_at=stage))
        assert Store(root / "store").current().digest == first.bundle.digest, stage
    assert bring_in(release / "two.agb", root).bundle.manifest.version == "2.0"


def test_two_installs_at_once_are_refused(release, root):
    store = Store(root / "store")
    with store.locked(), pytest.raises(FaultError) as caught:
        bring_in(release / "one.agb", root)
    assert caught.value.code == "host.state"


def test_an_interrupt_leaves_only_what_can_be_resumed(release, root):
    log = Log()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring_in(release / "one.agb", root, log=log, progress=stop)
    assert log.phases == ["intent", "outcome cancelled"]
    store = Store(root / "store")
    assert store.current() is None
    assert store.list() == ()
    assert bring_in(release / "one.agb", root).resumed == 1


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import bundles
    sys.path.insert(0, {unit!r})
    from test_install_store import Log, bring_in
    share = float(sys.argv[1])
    def progress(done, total):
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)
    bring_in(Path({bundle!r}), Path({root!r}), progress=progress)
"""


@pytest.mark.parametrize("share", [0.0, 0.5, 0.51, 1.0])
def test_a_killed_install_resumes(share, release, root):
    script = textwrap.dedent(KILLED).format(
        tests=str(TESTS),
        unit=str(TESTS / "unit"),
        bundle=str(release / "one.agb"),
        root=str(root),
    )
    killed = subprocess.run([sys.executable, "-c", script, str(share)], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = Store(root / "store")
    assert store.current() is None
    assert store.list() == ()
    done = bring_in(release / "one.agb", root)
    assert done.resumed >= (1 if share == 0.0 else 2)
    assert verify_installed(done.bundle.folder)


def test_an_altered_quarantine_is_not_believed(release, root):
    with pytest.raises(RefusedError):
        bring_in(release / "one.agb", root, verdict=Verdict(permitted=False))
    (left,) = Store(root / "store").unfinished()
    weights = left / "files/payload/tiny/model.onnx_data"
    raw = bytearray(weights.read_bytes())
    raw[1000] ^= 1
    weights.write_bytes(bytes(raw) + b"more")
    (left / "files/payload/tiny/config.json").unlink()
    done = bring_in(release / "one.agb", root)
    assert done.resumed < done.bundle.manifest.body.leaves
    assert verify_installed(done.bundle.folder)


def test_a_file_size_limit_is_a_fault_and_the_old_bundle_stays(release, root):
    """A write that the system refuses half-way; works without root, unlike a full disk."""
    first = bring_in(release / "one.agb", root)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Log()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(FaultError) as caught:
            bring_in(release / "two.agb", root, log=log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert caught.value.code == "install.io"
    assert caught.value.exit_status == 3
    assert log.phases == ["intent", "outcome failed"]
    assert Store(root / "store").current() == first.bundle
    assert bring_in(release / "two.agb", root).bundle.manifest.version == "2.0"


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", 40 << 20) as folder:
        yield folder


def test_too_little_space_is_told_before_anything_is_copied(release, small_disk):
    trust.save_trust(ROOTS, small_disk / "trust")
    fill(small_disk / "ballast", 10 << 20)
    with pytest.raises(FaultError) as caught:
        bring_in(release / "one.agb", small_disk)
    assert caught.value.code == "host.space"
    assert "bytes free" in caught.value.message
    (small_disk / "ballast").unlink()
    assert bring_in(release / "one.agb", small_disk).copied


def test_a_disk_that_fills_during_the_copy_is_a_fault_and_resumes(release, small_disk):
    trust.save_trust(ROOTS, small_disk / "trust")
    first = bring_in(release / "one.agb", small_disk)

    def run_out(*_):
        if not (small_disk / "ballast").exists():
            fill(small_disk / "ballast", 0)

    log = Log()
    with pytest.raises(FaultError) as caught:
        bring_in(release / "two.agb", small_disk, log=log, progress=run_out)
    assert caught.value.code == "install.io"
    assert os.strerror(errno.ENOSPC) in caught.value.message
    assert log.phases == ["intent", "outcome failed"]
    store = Store(small_disk / "store")
    assert store.current() == first.bundle
    assert len(store.list()) == 1
    (small_disk / "ballast").unlink()
    assert bring_in(release / "two.agb", small_disk).resumed == 1


def test_an_install_needs_its_size_and_64_mib_at_most(tmp_path):
    path, disk = tmp_path / "large.agb", tmp_path / "disk"
    members = bundles.make_members(bundles.make_weights(100 * 1024 * 1024))
    manifest = bundles.make_bundle(path, members=members)
    installed = sum(entry.size for entry in manifest.files)
    with mounted(disk, installed + (64 << 20)):
        trust.save_trust(ROOTS, disk / "trust")
        assert bring_in(path, disk).copied
        assert verify_installed(Store(disk / "store").current().folder) == manifest


# -- damage after the install -----------------------------------------------------------------


def alter(path, change):
    path.parent.chmod(0o755)
    if path.exists():
        path.chmod(0o644)
    change(path)


DAMAGE = {
    "a byte": lambda p: alter(
        p / "payload/tiny/model.onnx_data", lambda f: f.write_bytes(attacks.flip(f.read_bytes(), 5))
    ),
    "cut": lambda p: alter(p / "payload/tiny/model.onnx_data", lambda f: f.write_bytes(b"x")),
    "gone": lambda p: alter(p / "payload/tiny/config.json", lambda f: f.unlink()),
    "added": lambda p: alter(p / "payload/tiny/evil.py", lambda f: f.write_text("x")),
    "a link": lambda p: alter(
        p / "payload/tiny/config.json", lambda f: (f.unlink(), f.symlink_to("/etc/passwd"))
    ),
    "manifest": lambda p: alter(p / "META/manifest.json", lambda f: f.write_bytes(b"{}")),
    "manifest gone": lambda p: alter(p / "META/manifest.json", lambda f: f.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_changed_after_install_is_found_at_start(damage, release, root):
    bundle = bring_in(release / "one.agb", root).bundle
    verify_installed(bundle.folder)
    damage(bundle.folder)
    with pytest.raises(AirgapError) as caught:
        verify_installed(bundle.folder)
    assert caught.value.code == "start.digest"
    again = bring_in(release / "one.agb", root)  # the medium mends it, the evidence stays
    assert again.copied
    verify_installed(again.bundle.folder)
    (aside,) = Store(root / "store").unfinished()
    assert aside.name == f"{bundle.digest.hex}.damaged-1"


def test_a_bundle_that_was_removed_by_hand_can_be_installed_again(release, root):
    bundle = bring_in(release / "one.agb", root).bundle
    make_writable(bundle.folder)
    shutil.rmtree(bundle.folder)
    assert Store(root / "store").current() is None
    assert bring_in(release / "one.agb", root).bundle.digest == bundle.digest


@contextlib.contextmanager
def as_nobody(folder):
    """Act as a user without rights, who owns `folder`."""
    if os.geteuid() != 0:
        yield  # this user has none anyway
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_install_killed_after_its_files_were_made_read_only_resumes(release):
    """As a user without rights: root could write to read-only files and would hide the problem."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(release / "one.agb", folder / "one.agb")
        trust.save_trust(ROOTS, folder / "root" / "trust")
        store = Store(folder / "root" / "store")
        with as_nobody(folder):
            with pytest.raises(RefusedError):
                bring_in(folder / "one.agb", folder / "root", verdict=Verdict(permitted=False))
            (left,) = store.unfinished()
            installer._protect(left / "files")
            (left / "files").chmod(0o555)
            done = bring_in(folder / "one.agb", folder / "root")
            assert done.resumed == done.bundle.manifest.body.leaves
            verify_installed(done.bundle.folder)
            assert store.unfinished() == ()
            alter(done.bundle.folder / "payload/tiny/config.json", lambda f: f.write_text("x"))
            assert bring_in(folder / "one.agb", folder / "root").copied
            make_writable(folder)


def test_a_manifest_of_another_release_is_found_at_start(release, root):
    bundle = bring_in(release / "one.agb", root).bundle
    value = json.loads((bundle.folder / "META/manifest.json").read_bytes())
    value["version"] = "1.1"
    alter(
        bundle.folder / "META/manifest.json",
        lambda f: f.write_bytes(attacks.canonical_json(value)),
    )
    with pytest.raises(RefusedError, match="manifest has digest"):
        verify_installed(bundle.folder)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"format":"airgap-store/1","marks":[]}', b"\xff"])
def test_a_damaged_state_is_told(raw, release, root):
    bring_in(release / "one.agb", root)
    (root / "store/state.json").write_bytes(raw)
    if raw == b"{}":
        assert Store(root / "store").state().marks == {}
        return
    with pytest.raises(RefusedError) as caught:
        Store(root / "store").state()
    assert caught.value.code == "store.state"


def test_current_that_is_no_link_is_a_fault(release, root):
    bring_in(release / "one.agb", root)
    (root / "store/current").unlink()
    (root / "store/current").write_text("x")
    with pytest.raises(FaultError) as caught:
        Store(root / "store").current()
    assert caught.value.code == "host.state"


def test_every_code_that_this_room_raises_is_listed():
    for code in ("install.io", "install.digest", "start.digest", "store.state", "store.missing"):
        assert code in CODES


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_stands_in_the_place_of_the_lock_is_not_touched(tmp_path, kind):
    store = Store(tmp_path / "store")
    store.folder.mkdir()
    precious = tmp_path / "precious"
    precious.write_bytes(b"dear")
    if kind == "link":
        (store.folder / "lock").symlink_to(precious)
    else:
        os.mkfifo(store.folder / "lock")
    with pytest.raises(FaultError) as caught, store.locked():
        pass
    assert caught.value.code == "host.state"
    assert precious.read_bytes() == b"dear"


def test_what_is_no_bundle_is_not_listed(tmp_path):
    store = Store(tmp_path / "store")
    store.installed.mkdir(parents=True)
    (store.installed / "README").write_text("notes")
    (store.installed / "lost+found").mkdir()
    assert store.list() == ()
    (store.installed / ("0" * 64)).mkdir()
    with pytest.raises(RefusedError) as caught:
        store.list()
    assert caught.value.code == "start.digest"


def test_an_altered_medium_is_refused_even_when_the_bundle_is_installed(release, root, tmp_path):
    done = bring_in(release / "one.agb", root)
    altered = bytearray((release / "one.agb").read_bytes())
    altered[len(altered) // 2] ^= 1
    (tmp_path / "altered.agb").write_bytes(altered)
    log = Log()
    with pytest.raises(RefusedError) as caught:
        bring_in(tmp_path / "altered.agb", root, log=log)
    assert caught.value.code == "chunk.leaf"
    assert log.phases == ["intent", "outcome refused"]
    assert Store(root / "store").current() == done.bundle
    verify_installed(done.bundle.folder)
