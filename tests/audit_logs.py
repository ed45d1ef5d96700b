"""Real logs for the audit tests: a fixed key, a clock that can be turned, a disk that can fail."""

import errno
import itertools
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from airgap.audit import Actor, AuditLog, Clock, DecisionRef, Event, commitment, new_ulid
from airgap.audit.checkpoint import COSIGNATURE, LogKey, Vkey, vkey_path
from airgap.audit.disk import Disk

ORIGIN = "lab.example/audit/0123456789abcdef"
MODEL = "sha256:" + "ab" * 32
DECISION = b'{"outcome":"permit"}'
NONCE = b"\x05" * 32
BOOT = "b6d9b3a2-0000-4f55-8aaa-0123456789ab"


def private_key(seed=7):
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def log_key(seed=7, origin=ORIGIN):
    return LogKey.of(origin, private_key(seed))


def vkey(seed=7, origin=ORIGIN):
    return log_key(seed, origin).vkey


def witness_vkey(seed=21, name="isso.example/w1"):
    return Vkey.of(name, private_key(seed).public_key(), COSIGNATURE)


def policy_text(quorum="any"):
    """One log, two witnesses, and `any` or `all` of them."""
    return (
        f"# of the tests\nlog {vkey()}\nwitness w1 {witness_vkey()}\n"
        f"witness w2 {witness_vkey(22, 'second.example/w2')} https://w2.example/\n"
        f"group both {quorum} w1 w2\nquorum both\n"
    )


def write_key(path, seed=7, origin=ORIGIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = private_key(seed).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(pem)
    path.chmod(0o400)
    vkey_path(path).write_text(f"{vkey(seed, origin)}\n")
    return path


POLICY = policy_text()


class FixedClock(Clock):
    """A tick a call, from a fixed second on; `jump_s` moves the wall clock alone."""

    def __init__(self, start=1_764_000_000, boot=BOOT):
        self._ticks = itertools.count(1)
        self._start, self._boot = start * 10**9, boot
        self.jump_s = 0
        self.slept_s = 0

    def mono_ns(self):
        return next(self._ticks) * 1_000_000 + self.slept_s * 10**9

    def wall_ns(self):
        return self._start + self.mono_ns() + self.jump_s * 10**9

    def boot_id(self):
        return self._boot


class QuickDisk(Disk):
    """Real files, no flushes: for tests that cut no power."""

    def fsync(self, fd):
        os.fstat(fd)

    def fdatasync(self, fd):
        os.fstat(fd)


class FailingDisk(QuickDisk):
    """Fails call number `at` (from 1) of all, or of those named in `only`, with `code`."""

    CALLS = (
        "open", "write", "pwrite", "fdatasync", "fsync", "truncate", "allocate", "mkdir",
        "rename", "unlink",
    )  # fmt: skip

    def __init__(self, at=0, code=errno.EIO, only=CALLS):
        self.at, self.code, self.only = at, code, only
        self.calls = []
        self.fired = False

    def _tick(self, name):
        if name in self.only:
            self.calls.append(name)
            if len(self.calls) == self.at:
                self.fired = True
                raise OSError(self.code, os.strerror(self.code))


def _failing(name):
    def call(self, *args, **kwargs):
        self._tick(name)
        return getattr(QuickDisk, name)(self, *args, **kwargs)

    return call


for _name in FailingDisk.CALLS:
    setattr(FailingDisk, _name, _failing(_name))


def open_log(folder, *, key=None, seed=7, origin=ORIGIN, **options):
    """Open `folder/audit` with the fixed key in `folder/keys`, without a reserve."""
    path = key or folder / "keys" / "audit.pem"
    if not path.exists():
        write_key(path, seed, origin)
    defaults = {
        "host": "lab1", "clock": FixedClock(), "disk": QuickDisk(), "reserve_bytes": 0,
        "patience_s": 60.0,
    }  # fmt: skip
    return AuditLog.open(folder / "audit", key=path, **(defaults | options))


def intent(decision, req, **more):
    fields = {
        "kind": "inference", "phase": "intent", "req": req, "actor": Actor("jdoe", "scientist"),
        "project": "P-0042", "decision": DecisionRef(decision, "permit", "BASE-USE"),
        "model": MODEL, "in_": commitment(b"<MoleculeS>CCO<MoleculeE>", NONCE),
        "data": {"task": "retrosynthesis", "n": 10},
    }  # fmt: skip
    return Event(**(fields | more))


def outcome(req, **more):
    fields = {
        "kind": "inference", "phase": "outcome", "req": req, "project": "P-0042",
        "actor": Actor("jdoe", "scientist"), "out": commitment(b"CC.O", NONCE), "tok": (12, 200),
        "lat_ms": 1200, "data": {"result": "complete", "samples": 10},
    }  # fmt: skip
    return Event(**(fields | more))


def infer(log, *, person="jdoe", project="P-0042"):
    """Write one whole inference and return the receipt of its outcome."""
    decision = log.put_object(DECISION)
    req = new_ulid()
    actor = Actor(person, "scientist")
    log.append(intent(decision, req, actor=actor, project=project))
    return log.append(outcome(req, actor=actor, project=project))


def denial(**more):
    return Event(**({"kind": "denial", "actor": Actor("eve"), "err": "prompt.g01"} | more))


def write_log(folder, inferences=12, **options):
    """Make a closed log and return the receipts of its outcomes."""
    with open_log(folder, **options) as log:
        return [infer(log) for _ in range(inferences)]


def keep(receipt, path):
    """Store a receipt where a user would keep it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(receipt.as_proof())
    return path


def segment(folder, index=0):
    return folder / "audit" / "log" / "seg" / f"{index:08d}.jsonl"


def lines_of(folder, index=0):
    return segment(folder, index).read_bytes().split(b"\n")[:-1]


def set_lines(folder, lines, index=0, tail=b""):
    replace(segment(folder, index), b"".join(line + b"\n" for line in lines) + tail)


def replace(path: Path, content: bytes):
    """Give a path new content in a new file: copies made by hard links stay as they are."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


def people_of(folder, **roles):
    """Return a trust root of people by role, and a signer for each: `people_of(f, ada="isso")`."""
    from bundle.keys import load_signer, new_key
    from bundle.root import KeyEntry, Person, RootDocument, Threshold, Thresholds

    at = datetime(2026, 1, 1, tzinfo=UTC)
    made = {name: new_key(folder, name, person=name, roles=(role,)) for name, role in roles.items()}
    one = Threshold(people=1)
    document = RootDocument(
        version=1,
        issued=at,
        expires=at.replace(year=2036),
        profile="default",
        keys={key.keyid: KeyEntry(scheme=key.scheme, public=key.public) for key in made.values()},
        people={
            name: Person(name=name, keys=(key.keyid,), roles=key.roles, valid_from=at)
            for name, key in made.items()
        },
        thresholds=Thresholds(root=one, seal=one, policy=one, revocation=one),
    )
    return document, {name: load_signer(folder / f"{name}.pem") for name in made}


def signed_act(act, *signers):
    """Return an act signed by all of these."""
    from airgap.audit.people import PAYLOAD_TYPE
    from bundle.envelope import add_signature, sign_statement

    envelope = sign_statement(act.to_bytes(), PAYLOAD_TYPE, signers[0])
    for signer in signers[1:]:
        envelope = add_signature(envelope, signer)
    return envelope


def fill(log, size):
    """Append denials until the log has `size` records, most of them without waiting."""
    event = denial()
    while log.size < size - 600:
        for _ in range(511):
            log._submit(event, None, None)
        log.append(event)
    while log.size < size:
        log.append(event)


def mounted(folder, options, *, kind="tmpfs", source="tmpfs"):
    """Mount a file system on a new folder, or skip the test."""
    import subprocess

    import pytest

    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    done = subprocess.run(
        ["mount", "-t", kind, "-o", options, str(source), str(folder)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
