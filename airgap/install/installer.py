"""Installation: verify, quarantine, ask the policy, activate by rename, and record every outcome.

Nothing is written outside the quarantine before the seal and every hash hold; the policy is asked
before activation; every end is recorded, and what the log does not hold did not happen; FORMAT.md
section 11, steps 0 to 12.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from airgap.install.parity import Proof, Prove
from airgap.install.quarantine import Quarantine, broken_disk
from airgap.install.store import (
    InstalledBundle,
    Store,
    find_wrong,
    verify_installed,
)
from bundle.archive import Progress
from bundle.delta import Base, InstalledBase
from bundle.durable import sync_folder, write_beside
from bundle.envelope import Envelope, parse_seal
from bundle.manifest import Manifest
from bundle.media import Help, open_medium
from bundle.rollback import VerifiedRollback
from bundle.statement import VerifiedSeal
from bundle.trust import Trust, follow_chain, load_trust, require_dated, save_trust
from bundle.verify import SealedBundle, open_bundle, verify_contents
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

Act = Literal["install", "update", "rollback"]
Phase = Literal["intent", "trust", "admission", "outcome"]
Result = Literal["", "complete", "refused", "failed", "cancelled"]


class Decision(Protocol):
    """What the installer needs of a policy decision."""

    @property
    def permitted(self) -> bool:
        """Whether the answer is yes."""

    @property
    def canonical(self) -> bytes:
        """The record of the decision, RFC 8785."""

    @property
    def digest(self) -> Digest:
        """The digest of that record."""

    def refusal(self) -> RefusedError:
        """Return the error that says why the answer is no."""


@dataclass(frozen=True, slots=True)
class InstallEvent:
    """One thing that the audit log must hold about an install, an update or a rollback.

    `intent`: an install begins. `trust`: a newer root is taken, then was. `admission`: the policy
    answered, either way. `outcome`: how it ended, with `code` when it did not end well.
    """

    phase: Phase
    path: Path
    digest: Digest | None = None
    manifest: Manifest | None = None
    seal: VerifiedSeal | None = None
    decision: Decision | None = None
    trust: Trust | None = None
    previous: Digest | None = None
    result: Result = ""
    code: str = ""
    act: Act = "install"
    approval: VerifiedRollback | None = None  # of a rollback, once it holds
    proofs: tuple[Proof, ...] = ()  # what came of the parity vectors on this machine


Gate = Callable[[Manifest, Digest], Decision]
Recorder = Callable[
    [InstallEvent], Any
]  # returns the receipt of the record; raises when not durable


@dataclass(frozen=True, slots=True)
class Installed:
    """A finished install. `resumed` counts chunks taken over from an earlier, killed run."""

    bundle: InstalledBundle
    seal: VerifiedSeal
    decision: Decision
    receipt: Any
    previous: Digest | None
    resumed: int
    copied: bool
    proofs: tuple[Proof, ...] = ()


def install(
    path: Path,
    *,
    root: Path,
    now: datetime,
    gate: Gate,
    audit: Recorder,
    last_record: datetime | None = None,
    more: Help | None = None,
    prove: Prove | None = None,
    progress: Progress | None = None,
    update: bool = False,
    rollback: Envelope | None = None,
) -> Installed:
    """Bring the bundle at `path` into the store below `root` and make it the current one.

    Args:
        path: Of the `.agb` file, of a volume, or of the folder of a set.
        root: The tree that holds `trust/` and `store/`.
        now: UTC.
        gate: Decides admission; asked once, after every hash holds.
        audit: Appends to the log and returns when the record is durable.
        last_record: Time of the last audit record: the clock may not lie before it.
        more: What it takes to open volumes and encrypted files; bases are looked for in the store.
        prove: Runs the parity vectors of the bundle on this machine; asked before it is active.
        progress: Told bytes of the copy and then of the read-back, out of one total.
        update: Refuse a bundle of a line that is not installed.
        rollback: The signed approval that lets one older release return; `bundle.rollback`.

    Raises:
        RefusedError: A code of the verification, `install.update`, `policy.denied`, or
            `parity.failed`; recorded.
        FaultError: `host.space`, `install.io`, `host.state`, or the log's own; nothing is active.

    """
    store = Store(root / "store")
    trust = load_trust(root / "trust")
    with store.locked():
        job = _Job(path, root, store, audit, progress, _with_bases(more or Help(), store))
        job.prove = prove
        job.act = "rollback" if rollback is not None else "update" if update else "install"
        job.previous = store.find_current()
        store.note_time(last_record)
        audit(job.event("intent"))
        try:
            store.require_trust(trust)
            trust = job.follow_roots(trust, now)
            if job.trust is not None:
                store.note_trust(trust)
            floors = store.floors(last_record)
            with open_bundle(
                path, trust, now=now, floors=floors, more=job.more, rollback=rollback
            ) as sealed:
                store.note_trust(trust)
                return job.bring_in(sealed, gate)
        except RefusedError as error:
            job.mark_refused(error)
            audit(job.event("outcome", "refused", error.code))
            raise
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            code = error.code if isinstance(error, AirgapError) else ""
            with suppress(AirgapError):  # the first reason is the one to tell
                audit(job.event("outcome", "cancelled" if stopped else "failed", code))
            raise


@dataclass(slots=True)
class _Job:
    """One install while it runs."""

    path: Path
    root: Path
    store: Store
    audit: Recorder
    progress: Progress | None
    more: Help
    act: Act = "install"
    prove: Prove | None = None
    proofs: tuple[Proof, ...] = ()
    previous: Digest | None = None
    sealed: SealedBundle | None = None
    decision: Decision | None = None
    trust: Trust | None = None

    def event(self, phase: Phase, result: Result = "", code: str = "") -> InstallEvent:
        sealed = self.sealed
        return InstallEvent(
            phase,
            self.path,
            digest=None if sealed is None else sealed.digest,
            manifest=None if sealed is None else sealed.manifest,
            seal=None if sealed is None else sealed.seal,
            decision=self.decision,
            trust=self.trust,
            previous=self.previous,
            result=result,
            code=code,
            act=self.act,
            approval=None if sealed is None else sealed.rollback,
            proofs=self.proofs,
        )

    def follow_roots(self, trust: Trust, now: datetime) -> Trust:
        """Take newer roots that the bundle carries, whatever becomes of the bundle itself."""
        medium = open_medium(self.path, self.more)
        try:
            newer = follow_chain(trust, medium.head.trust)
        finally:
            medium.close()
        require_dated(newer, now)
        if newer != trust:  # a newer root, or a newer revocation list: bad news is kept
            self.trust = newer
            self.audit(self.event("trust"))
            save_trust(newer, self.root / "trust")
            self.audit(self.event("trust", "complete"))
        return newer

    def bring_in(self, sealed: SealedBundle, gate: Gate) -> Installed:
        """Steps 6 to 12 for a bundle whose seal holds."""
        self.sealed = sealed
        line = sealed.manifest.bundle_id
        if not sealed.manifest.models:
            raise RefusedError(
                "store.missing",
                f"{self.path.name!r:.100} holds wheels and no model, so nothing to admit",
                hint="sh install.sh --bundle installs wheels; it lies beside the bundle",
            )
        if self.act == "update" and self.store.active(line) is None:
            raise RefusedError(
                "install.update",
                f"no release of {line} is installed here, so there is nothing to update",
                hint="airgap list shows what is installed; airgap install takes a new line",
            )
        target = self.store.installed / sealed.digest.hex
        folder = self.store.quarantine / sealed.digest.hex
        resumed, copied = 0, not self._holds(target, sealed.digest)
        if copied:
            resumed = self._copy(sealed, folder)
            files = folder / "files"
            verify_contents(sealed.manifest, lambda path: _view(files / path))
        else:
            sealed.verify_body(None, self.progress)  # a good copy here excuses no altered medium
        self.decision = decision = gate(sealed.manifest, sealed.digest)
        self.audit(self.event("admission"))
        if not decision.permitted:
            raise decision.refusal()
        if copied:
            self._seal_files(sealed, folder)
        self._prove(sealed, folder / "files" if copied else target)
        return self._commit(sealed, folder, target, decision, resumed=resumed, copied=copied)

    def _holds(self, target: Path, digest: Digest) -> bool:
        """Tell whether the bundle is installed whole; a damaged one is set aside."""
        if not target.exists():
            return False
        try:
            verify_installed(target, self.progress)
        except RefusedError:
            self.store.set_aside(digest)
            return False
        return True

    def mark_refused(self, error: RefusedError) -> None:
        """Leave the reason beside the chunks, if there are any."""
        if self.sealed is not None:
            folder = self.store.quarantine / self.sealed.digest.hex
            with suppress(OSError):
                if folder.is_dir():
                    write_beside(folder / "refused", f"{error.code}\n".encode())

    def _copy(self, sealed: SealedBundle, folder: Path) -> int:
        """Step 6: stream verified chunks into the quarantine; return how many were there."""
        total = 2 * sealed.manifest.body.size
        report = self.progress

        def first_half(done: int, _: int) -> None:
            if report is not None:
                report(done, total)

        try:
            with Quarantine(folder, sealed) as quarantine:
                self._require_space(quarantine.needed())
                sealed.verify_body(quarantine, first_half)
                quarantine.finish()
                return quarantine.resumed
        except OSError as error:
            raise broken_disk(error, folder) from error

    def _require_space(self, needed: int) -> None:
        found = os.statvfs(self.store.folder)
        free = found.f_bavail * found.f_frsize
        if free < needed:
            raise FaultError(
                "host.space",
                f"{self.store.folder} has {free:,} bytes free, the install needs {needed:,}",
                hint="free space there, or use a root on a larger disk (--root)",
            )

    def _seal_files(self, sealed: SealedBundle, folder: Path) -> None:
        """Step 10: read back and hash what the disk holds, make it durable and read-only."""
        files = folder / "files"
        size = sealed.manifest.body.size
        report = self.progress

        def second_half(done: int, total: int) -> None:
            if report is not None:
                report(size + size * done // max(1, total), 2 * size)

        try:
            wrong = find_wrong(files, sealed.manifest, second_half, sync=True)
            if wrong:
                raise RefusedError(
                    "install.digest",
                    f"{wrong!r:.160} differs from the manifest after it was written",
                    hint="check the disk of this host, then install again",
                )
            for name, content in (
                ("META/envelope.dsse.json", parse_seal(sealed.head.envelope).to_bytes()),
                ("META/manifest.json", sealed.head.manifest),
                ("META/trust.json", sealed.head.trust),
            ):
                write_beside(files / name, content)
            _protect(files)
        except OSError as error:
            raise broken_disk(error, folder) from error

    def _prove(self, sealed: SealedBundle, files: Path) -> None:
        """Step 11: what does not answer here as it did on the staging side is not made active."""
        if self.prove is None:
            return
        before = files.stat().st_mode & 0o777
        files.chmod(0o555)  # the worker has a uid of its own
        try:
            self.proofs = self.prove(files, sealed.manifest)
        finally:
            files.chmod(before)

    def _commit(
        self,
        sealed: SealedBundle,
        folder: Path,
        target: Path,
        decision: Decision,
        *,
        resumed: int,
        copied: bool,
    ) -> Installed:
        """Step 12: rename, raise the mark, activate, record the outcome."""
        try:
            if copied:
                (folder / "files").rename(target)
                target.chmod(0o555)
                sync_folder(target.parent)
            line = sealed.manifest.bundle_id
            before = self.store.active(line)
            self.store.prefer(sealed.manifest, sealed.digest)
            self.store.activate(sealed.digest)
        except OSError as error:
            raise broken_disk(error, target) from error
        try:
            receipt = self.audit(self.event("outcome", "complete"))
        except BaseException:  # what the log does not hold did not happen
            self.store.activate(self.previous)
            self.store.restore_active(line, before)
            raise
        self.store.remove_quarantine(sealed.digest)
        bundle = InstalledBundle(target, sealed.manifest, sealed.digest)
        return Installed(
            bundle,
            sealed.seal,
            decision,
            receipt,
            self.previous,
            resumed=resumed,
            copied=copied,
            proofs=self.proofs,
        )


def _with_bases(more: Help, store: Store) -> Help:
    """Let deltas find their base among what is installed, after what the caller offers."""

    def find(digest: Digest) -> Base | None:
        offered = more.find_base(digest)
        if offered is not None or digest.algorithm != "sha256":
            return offered
        folder = store.installed / digest.hex
        return InstalledBase(folder) if folder.is_dir() else None

    return replace(more, find_base=find)


def _view(path: Path) -> memoryview:
    """Map a file of the quarantine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


def _protect(files: Path) -> None:
    """Make files 0444 and folders 0555, deepest first; the top stays writable for the rename."""
    for place, folders, names in os.walk(files, topdown=False):
        for name in names:
            (Path(place) / name).chmod(0o444)
        for name in folders:
            folder = Path(place) / name
            folder.chmod(0o555)
            sync_folder(folder)
    sync_folder(files)
