"""What happens to releases after their install: one returns, one becomes the default, one goes.

Each act holds the store, is on record before it begins and when it ended, and is one rename: a kill
leaves what was there or what shall be there. The high-water marks stay whatever is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from airgap.install.installer import Decision, Gate
from airgap.install.standing import require_standing, require_valid
from airgap.install.store import InstalledBundle, Store, delete_tree, verify_installed
from bundle.archive import Progress
from bundle.envelope import ENVELOPE_SIZE, Envelope, parse_seal
from bundle.keys import read_limited
from bundle.rollback import VerifiedRollback, verify_rollback
from bundle.statement import VerifiedSeal, verify_seal
from bundle.trust import Trust, load_trust
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

ENGINES = "engines"  # of the tree: built for this host's GPU, a folder for each release
Act = Literal["update", "rollback", "remove"]
Result = Literal["", "complete", "refused", "failed", "cancelled"]


@dataclass(slots=True)
class ActEvent:
    """One thing that the audit log must hold about an act: `admission`, or how the act stands.

    `result` is empty before the act; `code` says why it did not end well.
    """

    act: Act
    target: InstalledBundle
    previous: Digest | None
    decision: Decision | None = None
    approval: VerifiedRollback | None = None
    result: Result = ""
    code: str = ""
    phase: Literal["intent", "admission", "outcome"] = "intent"


ActRecorder = Callable[[ActEvent], Any]  # returns the receipt; raises when not durable


@dataclass(frozen=True, slots=True)
class Switched:
    """A release that was made the active one of its line and the default."""

    bundle: InstalledBundle
    previous: Digest | None
    decision: Decision
    receipt: Any
    approval: VerifiedRollback | None


@dataclass(frozen=True, slots=True)
class Removed:
    """Releases that are gone."""

    bundles: tuple[InstalledBundle, ...] = field(default=())
    receipts: tuple[Any, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Retired:
    """A tree that runs no more: what was deleted, what is left."""

    gone: tuple[Path, ...]
    kept: tuple[Path, ...]
    receipt: Any


def switch(
    name: str,
    *,
    root: Path,
    now: datetime,
    gate: Gate,
    audit: ActRecorder,
    approval: Envelope | None = None,
    progress: Progress | None = None,
) -> Switched:
    """Make an installed release the active one of its line, and the default.

    Args:
        name: Digest, name or name-version.
        root: The tree that holds `trust/` and `store/`.
        now: UTC.
        gate: Decides admission anew, by the rules of today.
        audit: Appends to the log and returns when the record is durable.
        approval: Of a rollback; used for a release below the mark of its line that is not active.
        progress: Told bytes: every file is hashed again.

    Raises:
        RefusedError: `store.missing`; `start.digest`, it was altered; `trust.revoked`,
            `trust.expired`; `trust.rollback`, it is older and no approval lets it return;
            `policy.denied`. All but the first are on record.
        FaultError: `host.state`; the log's own. Nothing is changed.

    """
    store, trust = Store(root / "store"), load_trust(root / "trust")
    with store.locked():
        target = store.get(name)
        line = target.manifest.bundle_id
        older = _is_older(store, target)
        event = ActEvent("rollback" if older else "update", target, store.find_current())
        with _on_record(event, audit):
            verify_installed(target.folder, progress)
            require_standing(target, trust, now=now)
            require_valid(target, now)
            if older:
                event.approval = _require_approval(store, target, trust, approval, now)
            decision = event.decision = gate(target.manifest, target.digest)
            event.phase = "admission"
            audit(event)
            if not decision.permitted:
                raise decision.refusal()
            before = store.active(line)
            store.prefer(target.manifest, target.digest)
            store.activate(target.digest)
            event.phase, event.result = "outcome", "complete"
            try:
                receipt = audit(event)
            except BaseException:  # what the log does not hold did not happen
                store.activate(event.previous)
                store.restore_active(line, before)
                raise
    return Switched(target, event.previous, decision, receipt, event.approval)


def remove(names: list[str], *, root: Path, audit: ActRecorder, default: bool = False) -> Removed:
    """Delete installed releases; what the log, the approvals and the marks say of them stays.

    Args:
        names: Digest, name or name-version of each.
        root: The tree that holds `store/`.
        audit: As for `switch`.
        default: Delete the default too; then no release answers until another is chosen.

    Raises:
        RefusedError: `store.missing`; `store.active`, one is the default and `default` is not set.
            Checked for all before any is touched.
        FaultError: `host.state`; the log's own.

    """
    store = Store(root / "store")
    receipts: list[Any] = []
    with store.locked():
        store.delete_leftovers()
        targets = list({item.digest.hex: item for item in map(store.get, names)}.values())
        current = store.find_current()
        for target in targets:
            if target.digest == current and not default:
                raise RefusedError(
                    "store.active",
                    f"{target.manifest.name} {target.manifest.version} answers by default",
                    hint="airgap switch OTHER first, or --default to have no release answer",
                )
        for target in targets:
            event = ActEvent("remove", target, current if target.digest == current else None)
            with _on_record(event, audit):
                if target.digest == current:
                    store.activate(None)
                store.drop(target.digest)
                _drop_engines(root, target.digest)
                event.phase, event.result = "outcome", "complete"
                receipts.append(audit(event))
    return Removed(tuple(targets), tuple(receipts))


def retire(root: Path, *, audit: Callable[[str, str], Any]) -> Retired:
    """Delete what makes a tree run, and keep what an auditor needs; the log stays whole.

    Gone are the releases, engines, results of probes, held jobs and every private key but that of
    the log.
    Kept are the log and its keys, the trust root, rules, approvals, site facts and `restricted/`.

    Args:
        root: The tree.
        audit: Records (phase, result) of the act.

    Raises:
        FaultError: `host.state`, an install is under way; `host.io`. Running it again goes on.

    """
    store = Store(root / "store")
    gone = [root / name for name in ("store", "enclave", "holds", ENGINES)]
    keys = root / "keys"
    if keys.is_dir():
        gone += [p for p in sorted(keys.iterdir()) if _is_private(p)]
    gone = [path for path in gone if path.exists()]
    with store.locked():
        audit("intent", "")
        try:
            for path in gone:
                if path.is_dir() and not path.is_symlink():
                    delete_tree(path)
                else:
                    path.unlink()
        except OSError as error:
            audit("outcome", "failed")
            raise FaultError(
                "host.io",
                f"{error.filename} cannot be deleted: {error.strerror}",
                hint="check who owns it, then run the command again: it goes on",
            ) from error
        receipt = audit("outcome", "complete")
    kept = sorted(path for path in root.iterdir() if path.name != "store")
    return Retired(tuple(gone), tuple(kept), receipt)


def _drop_engines(root: Path, digest: Digest) -> None:
    """Delete what was built for this host's GPU from a release that goes."""
    folder = root / ENGINES / digest.hex
    if folder.is_dir() and not folder.is_symlink():
        delete_tree(folder)


def _is_private(path: Path) -> bool:
    """Tell whether a file of `keys/` is a private key of anything but the log."""
    return path.suffix == ".pem" and not path.name.startswith("audit")


@contextmanager
def _on_record(event: ActEvent, audit: ActRecorder) -> Iterator[None]:
    """Record the intent, and the outcome of whatever does not end well."""
    audit(event)
    try:
        yield
    except BaseException as error:
        if event.result == "complete":  # the log itself failed: nothing can be added to it
            raise
        event.phase = "outcome"
        event.result = "failed"
        if isinstance(error, RefusedError):
            event.result = "refused"
        elif isinstance(error, KeyboardInterrupt):
            event.result = "cancelled"
        event.code = error.code if isinstance(error, AirgapError) else ""
        with suppress(AirgapError):  # the first reason is the one to tell
            audit(event)
        raise


def _is_older(store: Store, target: InstalledBundle) -> bool:
    """Tell whether a release lies below the mark of its line and is not the active one."""
    line = target.manifest.bundle_id
    mark = store.state().marks.get(line)
    older = mark is not None and target.manifest.epoch < mark.epoch
    return older and store.active(line) != target.digest


def _require_approval(
    store: Store, target: InstalledBundle, trust: Trust, approval: Envelope | None, now: datetime
) -> VerifiedRollback:
    """Return the approval that lets an older release return; its seal must hold today."""
    manifest = target.manifest
    mark = store.floors().epochs[manifest.bundle_id]
    if approval is None:
        raise RefusedError(
            "trust.rollback",
            f"{manifest.name} {manifest.version} has epoch {manifest.epoch}, and this host has "
            f"seen epoch {mark[0]} ({mark[1]})",
            hint="airgap rollback --approval FILE; airgap trust rollback-sign makes one",
        )
    return verify_rollback(
        approval,
        trust,
        manifest,
        builder=_seal_of(target, trust).builder,
        mark=mark,
        now=now,
    )


def _seal_of(target: InstalledBundle, trust: Trust) -> VerifiedSeal:
    path = target.folder / "META/envelope.dsse.json"
    raw = read_limited(path, ENVELOPE_SIZE, code="start.digest", what="the seal")
    return verify_seal(parse_seal(raw), trust.document, trust.revocations)
