"""What a power cut may leave of the writer's calls, by the rules of a file system.

A recorder notes every call that the log's durability rests on. At each point the calls so far give
several legal disks: what was flushed is there; of the rest nothing, everything, contents without
names, names without contents, the last write torn, or lengths without data. From each of them the
log must open, verify, and hold every record that was acknowledged until then. (The method is that
of ALICE: Pillai et al., OSDI 2014.)
"""

import hashlib
import os
import shutil

import audit_logs as logs
import pytest

from airgap.audit import load_ring, verify_log
from policy.errors import RefusedError


class Recorder(logs.QuickDisk):
    """Real files without flushes, and the list of calls, with acknowledgements between them."""

    def __init__(self):
        self.calls = []
        self.paths = {}

    def open(self, path, flags, mode=0o600):
        new = bool(flags & os.O_CREAT) and not path.exists()
        fd = super().open(path, flags, mode)
        self.paths[fd] = path
        if new:
            self.calls.append(("create", path))
        elif flags & os.O_TRUNC:
            self.calls.append(("truncate", path, 0))
        return fd

    def write(self, fd, content):
        self.calls.append(("write", self.paths[fd], os.fstat(fd).st_size, content))
        super().write(fd, content)

    def pwrite(self, fd, content, offset):
        self.calls.append(("write", self.paths[fd], offset, content))
        super().pwrite(fd, content, offset)

    def truncate(self, fd, size):
        self.calls.append(("truncate", self.paths[fd], size))
        super().truncate(fd, size)

    def fdatasync(self, fd):
        self.calls.append(("flush", self.paths[fd]))

    fsync = fdatasync

    def rename(self, old, new):
        super().rename(old, new)
        self.paths = {fd: _moved(path, old, new) for fd, path in self.paths.items()}
        self.calls.append(("rename", old, new))

    def unlink(self, path):
        super().unlink(path)
        self.calls.append(("unlink", path))


class Model:
    """Names and contents, as a process sees them and as the device has them."""

    def __init__(self):
        self.names, self.durable_names = {}, {}
        self.content, self.durable = {}, {}
        self.moves = []  # renames of folders whose parent was not flushed yet
        self.unflushed = []  # (inode, offset, content)

    def apply(self, call):
        kind, path, *rest = call
        if kind == "create":
            inode = object()
            self.names[path], self.content[inode], self.durable[inode] = inode, b"", b""
        elif kind == "write":
            inode, (offset, content) = self.names[path], rest
            old = self.content[inode]
            self.content[inode] = old[:offset] + content + old[offset + len(content) :]
            self.unflushed.append((inode, offset, content))
        elif kind == "truncate":
            inode = self.names[path]
            self.content[inode] = self.content[inode][: rest[0]]
        elif kind == "rename":
            self._rename(path, rest[0])
        elif kind == "unlink":
            self.names.pop(path)
        elif kind == "flush":
            self._flush(path)

    def _rename(self, old, new):
        if old in self.names:
            self.names[new] = self.names.pop(old)
            return
        self.names = {_moved(path, old, new): inode for path, inode in self.names.items()}
        self.moves.append((old, new))

    def _flush(self, path):
        if path in self.names:
            inode = self.names[path]
            self.durable[inode] = self.content[inode]
            self.unflushed = [each for each in self.unflushed if each[0] is not inode]
            return
        for old, new in [move for move in self.moves if move[1].parent == path]:
            moved = {_moved(p, old, new): i for p, i in self.durable_names.items()}
            self.durable_names = moved
            self.moves.remove((old, new))
        there = {p: i for p, i in self.names.items() if p.parent == path}
        kept = {p: i for p, i in self.durable_names.items() if p.parent != path}
        self.durable_names = kept | there

    def disks(self):
        """Yield a name and the files of each legal disk."""
        torn, zeros = dict(self.content), dict(self.content)
        if self.unflushed:
            inode, offset, content = self.unflushed[-1]
            torn[inode] = torn[inode][: offset + len(content) // 2]
        for inode, offset, content in self.unflushed:
            old = zeros[inode]
            zeros[inode] = old[:offset] + bytes(len(content)) + old[offset + len(content) :]
        for name, names, contents in (
            ("only what was flushed", self.durable_names, self.durable),
            ("everything", self.names, self.content),
            ("contents without names", self.durable_names, self.content),
            ("names without contents", self.names, self.durable),
            ("the last write torn", self.names, torn),
            ("lengths without data", self.names, zeros),
        ):
            yield name, {path: contents[inode] for path, inode in names.items()}


def _moved(path, old, new):
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def record(folder, story):
    """Run a story on a recording disk and return its calls and acknowledgements."""
    disk = Recorder()
    with logs.open_log(folder, disk=disk) as log:
        story(log, lambda receipt: disk.calls.append(("ack", receipt)))
    return disk.calls


def short_story(log, ack):
    for _ in range(3):
        ack(log.append(logs.denial()))
    ack(logs.infer(log))


def lay_out(files, folder, target):
    """Write the files of one disk below `target`."""
    for path, content in files.items():
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (target / "keys/audit.pem").chmod(0o400)


def check(target, acked, where):
    """The log opens, verifies, and holds what was acknowledged."""
    try:
        with logs.open_log(target):
            pass
    except RefusedError as error:
        raise AssertionError(f"{where}: {error}") from error
    lines = logs.lines_of(target)
    for receipt in acked:
        assert receipt.seq < len(lines), (where, receipt.seq)
        assert hashlib.sha256(b"\0" + lines[receipt.seq]).digest() == receipt.leaf, where
    ring = load_ring(target / "keys/audit.vkey")
    verdict = verify_log(target / "audit", vkey=ring)
    assert verdict.exit == 3, (where, verdict.findings)


def _replay(tmp_path, story, *, every, first=0):
    source = tmp_path / "source"
    logs.write_key(source / "keys" / "audit.pem")
    keys = {p: p.read_bytes() for p in (source / "keys").iterdir()}
    calls = record(source, story)
    model, acked, seen = Model(), [], set()
    for path, content in keys.items():
        inode = object()
        model.names[path] = model.durable_names[path] = inode
        model.content[inode] = model.durable[inode] = content
    for number, call in enumerate(calls):
        if call[0] == "ack":
            acked.append(call[1])
            continue
        model.apply(call)
        if number % every != first:
            continue
        for name, files in model.disks():
            print_of = hashlib.sha256(repr(sorted(files.items())).encode()).digest()
            if (print_of, len(acked)) in seen:
                continue
            seen.add((print_of, len(acked)))
            target = tmp_path / "disk"
            lay_out(files, source, target)
            check(target, acked, (number, call[0], name))
            shutil.rmtree(target)
    assert len(acked) >= 2
    return len(seen)


def test_every_legal_disk_of_a_short_life_opens_with_what_was_acknowledged(tmp_path):
    assert _replay(tmp_path, short_story, every=4) > 40


@pytest.mark.soak
@pytest.mark.parametrize("first", range(3))
def test_every_legal_disk_at_every_call(tmp_path, first):
    assert _replay(tmp_path, short_story, every=3, first=first) > 50


def test_a_log_that_signs_before_it_flushes_is_caught_by_this_harness(tmp_path):
    """The control: without the writer's flush, some legal disk lacks an acknowledged record."""

    class Lazy(Recorder):
        def fdatasync(self, fd):
            if not str(self.paths[fd]).endswith(".jsonl"):
                super().fdatasync(fd)

        fsync = fdatasync

    source = tmp_path / "source"
    logs.write_key(source / "keys" / "audit.pem")
    disk, lost = Lazy(), 0
    with logs.open_log(source, disk=disk) as log:
        receipt = log.append(logs.denial())
        calls = list(disk.calls)
    model = Model()
    for call in calls:
        model.apply(call)
    for _, files in model.disks():
        content = files.get(logs.segment(source), b"")
        lines = content.split(b"\n")
        held = [hashlib.sha256(b"\0" + line).digest() for line in lines]
        lost += receipt.leaf not in held
    assert lost
