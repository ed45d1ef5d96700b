"""The store on disk: installed bundles by digest, the current one, and the high-water marks.

    store/lock                      held while somebody installs
    store/state.json                highest epoch of each line, latest `created`
    store/quarantine/<digest>/      chunks that are verified, of installs that are not finished
    store/quarantine/<digest>.damaged-N/   a bundle that was altered after its install
    store/installed/<digest>/       a bundle's files, read-only; never changed after the rename
    store/current                   link to the installed bundle that answers by default

`state.json` also names the active release of each line: the one that its name alone means.

Every change is a file written beside, synced and renamed: a crash leaves the old state or the new.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from bundle.archive import Progress
from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import sync_folder, write_beside
from bundle.fields import Count, DigestText, Document, Instant, Name
from bundle.keys import read_limited
from bundle.manifest import MANIFEST_LIMIT, FileEntry, Manifest, first_problem, parse_manifest
from bundle.trust import Trust
from bundle.verify import Floors
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

STATE_LIMIT = 1024 * 1024
HEAD_FILES = ("META/envelope.dsse.json", "META/manifest.json", "META/trust.json")
_PART = 1024 * 1024
_DIGEST = re.compile("[0-9a-f]{64}")


class Mark(Document):
    """The highest epoch of one line that was ever active here."""

    epoch: Count
    bundle: DigestText


class TrustMark(Document):
    """The newest root and revocation list that a chain of roots has had here."""

    root: Count
    revocations: Count = 0


class State(Document):
    """What the store must remember even when bundles are removed."""

    format: Literal["airgap-store/1"] = "airgap-store/1"
    latest_created: Instant | None = None
    latest_seen: Instant | None = None  # newest time ever seen in the log: a clock set back stays
    marks: dict[Name, Mark] = Field(default_factory=dict)
    active: dict[Name, DigestText] = Field(default_factory=dict)
    trust: dict[DigestText, TrustMark] = Field(default_factory=dict)  # by the first root of a chain


@dataclass(frozen=True, slots=True)
class InstalledBundle:
    """A bundle in the store; `folder` holds META/ and payload/ as they were sealed."""

    folder: Path
    manifest: Manifest
    digest: Digest

    def model_folder(self, model_id: str) -> Path:
        """Return the folder of one model's files.

        Raises:
            RefusedError: `store.missing`; the bundle holds no such model.

        """
        if self.manifest.model(model_id) is None:
            known = ", ".join(model.id for model in self.manifest.models)
            raise RefusedError(
                "store.missing",
                f"{self.manifest.name} holds no model {model_id!r:.64}, but {known}",
            )
        return self.folder / "payload" / model_id


class Store:
    """The store below one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def installed(self) -> Path:
        """Where bundles lie by digest."""
        return self.folder / "installed"

    @property
    def quarantine(self) -> Path:
        """Where unfinished installs lie by digest."""
        return self.folder / "quarantine"

    # -- reading ------------------------------------------------------------------------------

    def list(self) -> tuple[InstalledBundle, ...]:
        """Return what is installed, by name, version and digest; other names are no bundles.

        Raises:
            RefusedError: `start.digest`, for the first that is damaged; `survey` tells all of them.

        """
        found, damaged = self.survey()
        for error in damaged.values():
            raise error
        return found

    def survey(self) -> tuple[tuple[InstalledBundle, ...], dict[Digest, RefusedError]]:
        """Return what is installed in the order of `list`, and what is damaged by its digest."""
        there = self.installed.iterdir() if self.installed.is_dir() else ()
        found, damaged = [], {}
        for path in sorted(each for each in there if _DIGEST.fullmatch(each.name)):
            try:
                found.append(self._load(path))
            except RefusedError as error:
                damaged[Digest.parse(f"sha256:{path.name}")] = error
        found.sort(key=lambda b: (b.manifest.name, b.manifest.version, b.digest.hex))
        return tuple(found), damaged

    def current(self) -> InstalledBundle | None:
        """Return the bundle that answers by default, None when there is none, or not any more."""
        digest = self.find_current()
        if digest is None or not (self.installed / digest.hex).exists():
            return None
        return self._load(self.installed / digest.hex)

    def find_current(self) -> Digest | None:
        """Return the digest that `current` names, whatever has become of that bundle."""
        try:
            target = (self.folder / "current").readlink()
            return Digest.parse(f"sha256:{target.name}")
        except FileNotFoundError:
            return None
        except (OSError, RefusedError) as error:
            raise FaultError(
                "host.state",
                f"{self.folder}/current is not a link to a bundle",
                hint="remove it; the next install makes it anew",
            ) from error

    def get(self, name: str) -> InstalledBundle:
        """Return the bundle with that digest, name, or `name-version`.

        Where several answer to a name, the current one wins, then the active release of the line.
        A damaged one beside it is no hindrance, unless it may be the one that the name means.

        Raises:
            RefusedError: `store.missing`, none or several match; `start.digest`, it is damaged.

        """
        digest = name.removeprefix("sha256:")
        if _DIGEST.fullmatch(digest) and (self.installed / digest).is_dir():
            return self._load(self.installed / digest)
        installed, damaged = self.survey()
        wanted = [
            item
            for item in installed
            if name
            in {
                str(item.digest),
                item.digest.hex,
                item.manifest.name,
                f"{item.manifest.name}-{item.manifest.version}",
            }
        ]
        self._require_whole(name, wanted, damaged)
        current = self.find_current()
        for item in wanted:
            if item.digest == current:
                return item
        if len(wanted) > 1:
            active = set(self.state().active.values())
            wanted = [item for item in wanted if str(item.digest) in active] or wanted
        if len(wanted) == 1:
            return wanted[0]
        raise RefusedError(
            "store.missing",
            f"{len(wanted)} installed bundles answer to {name!r:.80}",
            hint="airgap list; then name one by its digest",
        )

    def _require_whole(
        self, name: str, wanted: Sequence[InstalledBundle], damaged: Mapping[Digest, RefusedError]
    ) -> None:
        """Refuse a name that may mean a damaged release: no other one answers in its place."""
        if not damaged:
            return
        active, current = self.state().active, self.find_current()
        lines = {item.manifest.bundle_id for item in wanted if item.manifest.name == name}
        for digest, error in damaged.items():
            line = next((key for key, value in active.items() if value == str(digest)), None)
            unknown = line is None and digest == current
            if not wanted or line in lines or (lines and unknown):
                raise error

    def active(self, line: str) -> Digest | None:
        """Return the active release of a line, None where none is installed."""
        state = self.state()
        mark = state.marks.get(line)
        named = state.active.get(line) or (None if mark is None else mark.bundle)
        digest = None if named is None else Digest.parse(named)
        return None if digest is None or not (self.installed / digest.hex).is_dir() else digest

    def state(self) -> State:
        """Return the high-water marks; a store that is new has none.

        Raises:
            RefusedError: `store.state`; it cannot be read, or is gone while releases are there.

        """
        path = self.folder / "state.json"
        if not path.exists():
            there = self.installed.iterdir() if self.installed.is_dir() else ()
            if any(_DIGEST.fullmatch(entry.name) for entry in there):
                raise RefusedError(
                    "store.state",
                    f"{path} is gone, and releases are installed: what this host has seen is lost",
                    hint="restore it from a backup, or ask two people who keep the log, move the "
                    "store away and install anew",
                )
            return State()
        raw = read_limited(path, STATE_LIMIT, code="store.state", what="the store's state")
        parse_canonical(raw, code="store.state", what="the store's state", limit=STATE_LIMIT)
        try:
            return State.model_validate_json(raw)
        except ValidationError as error:
            raise RefusedError(
                "store.state", f"{path}: {first_problem(error)}", hint="restore it from a backup"
            ) from error

    def floors(self, clock: datetime | None = None) -> Floors:
        """Return what a bundle may not fall behind; `clock` is that of the last audit record."""
        state = self.state()
        epochs = {
            line: (mark.epoch, Digest.parse(mark.bundle)) for line, mark in state.marks.items()
        }
        known = (clock, state.latest_created, state.latest_seen)
        latest = [moment for moment in known if moment is not None]
        return Floors(clock=max(latest, default=None), epochs=epochs)

    def unfinished(self) -> tuple[Path, ...]:
        """Return the quarantines of installs that did not finish."""
        if not self.quarantine.is_dir():
            return ()
        return tuple(sorted(self.quarantine.iterdir()))

    # -- changing -----------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for one install; FaultError `host.state` when somebody else does."""
        for folder in (self.folder, self.installed, self.quarantine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._open_lock()
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FaultError(
                    "host.state",
                    f"another install holds {self.folder}/lock",
                    hint="wait for it, or stop it, then run it again",
                ) from error
            yield
        finally:
            os.close(lock)

    def _open_lock(self) -> int:
        """Open the lock file and nothing in its place: no link is followed, no pipe waited for."""
        path, flags = self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            lock = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise FaultError(
                "host.state",
                f"{path} cannot be opened: {error.strerror}",
                hint="it must be an ordinary file of yours: remove what is there",
            ) from error
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            os.close(lock)
            raise FaultError(
                "host.state", f"{path} is not a plain file", hint="remove what is there"
            )
        return lock

    def prefer(self, manifest: Manifest, digest: Digest) -> None:
        """Make a release the active one of its line; the mark rises with it and never falls."""
        state, line = self.state(), manifest.bundle_id
        mark = state.marks.get(line)
        if mark is None or mark.epoch < manifest.epoch:
            mark = Mark(epoch=manifest.epoch, bundle=str(digest))
        changes = {
            "latest_created": max(filter(None, [state.latest_created, manifest.created])),
            "marks": {**state.marks, line: mark},
            "active": {**state.active, line: str(digest)},
        }
        self._write_state(state.model_copy(update=changes))

    def note_release(self, manifest: Manifest, digest: Digest) -> bool:
        """Remember a release without a model, so that no older one takes its place; tell if new."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state, line = self.state(), manifest.bundle_id
        mark = state.marks.get(line)
        if mark is not None and mark.epoch >= manifest.epoch:
            return False
        mark = Mark(epoch=manifest.epoch, bundle=str(digest))
        self._write_state(state.model_copy(update={"marks": {**state.marks, line: mark}}))
        return True

    def restore_active(self, line: str, digest: Digest | None) -> None:
        """Undo `prefer` as far as a change of mind may: the mark stays where it is."""
        state = self.state()
        active = {key: value for key, value in state.active.items() if key != line}
        if digest is not None:
            active[line] = str(digest)
        self._write_state(state.model_copy(update={"active": active}))

    def note_trust(self, trust: Trust) -> None:
        """Remember how far roots and revocation list have come.

        Raises:
            RefusedError: `trust.chain`, `trust.revocation`; as `require_trust`.

        """
        self.require_trust(trust)
        state, first = self.state(), str(trust.documents[0].fingerprint)
        listed = 0 if trust.revocations is None else trust.revocations.version
        mark = TrustMark(root=trust.version, revocations=listed)
        if state.trust.get(first) != mark:
            self._write_state(state.model_copy(update={"trust": {**state.trust, first: mark}}))

    def require_trust(self, trust: Trust) -> None:
        """Refuse a folder of trust from which the newest root or revocation list was taken away.

        Raises:
            RefusedError: `trust.chain`, `trust.revocation`.

        """
        mark = self.state().trust.get(str(trust.documents[0].fingerprint))
        listed = 0 if trust.revocations is None else trust.revocations.version
        if mark is not None and trust.version < mark.root:
            raise RefusedError(
                "trust.chain",
                f"this host has held root {mark.root}, but its folder of trust ends with root "
                f"{trust.version}",
                hint="bring the newest chain back: airgap trust import FILE",
            )
        if mark is not None and listed < mark.revocations:
            raise RefusedError(
                "trust.revocation",
                f"this host has held revocation list {mark.revocations}, but its folder of trust "
                f"holds {f'list {listed}' if listed else 'none'}",
                hint="bring the newest list back: airgap trust import-revocations FILE",
            )

    def note_time(self, moment: datetime | None) -> None:
        """Remember a time that has been; without this, one refused attempt would hide it."""
        state = self.state()
        if moment is None or (state.latest_seen is not None and moment <= state.latest_seen):
            return
        self._write_state(state.model_copy(update={"latest_seen": moment.replace(microsecond=0)}))

    def forget_time(self, moment: datetime) -> None:
        """Take `moment` for the latest that has been; the root people signed that."""
        state, moment = self.state(), moment.replace(microsecond=0)
        created = state.latest_created
        earlier = None if created is None else min(created, moment)
        self._write_state(
            state.model_copy(update={"latest_seen": moment, "latest_created": earlier})
        )

    def _write_state(self, state: State) -> None:
        raw = canonical_json(state.model_dump(mode="json", exclude_none=True))
        # Nothing in it is secret, and a daemon of another account reads it; the folder is the gate.
        write_beside(self.folder / "state.json", raw, mode=0o644)

    def activate(self, digest: Digest | None) -> None:
        """Point `current` to an installed bundle, or to none."""
        link = self.folder / "current"
        if digest is None:
            link.unlink(missing_ok=True)
        else:
            fresh = self.folder / f".current.{os.getpid()}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(Path("installed") / digest.hex)
            fresh.replace(link)
        sync_folder(self.folder)

    def set_aside(self, digest: Digest) -> Path:
        """Move a damaged bundle into the quarantine, to be looked into; return its place."""
        source, number = self.installed / digest.hex, 1
        while (target := self.quarantine / f"{digest.hex}.damaged-{number}").exists():
            number += 1
        source.chmod(0o700)  # a folder's own name entry `..` changes with its place
        source.rename(target)
        sync_folder(self.installed)
        return target

    def remove_quarantine(self, digest: Digest) -> None:
        """Drop what is left of an install."""
        shutil.rmtree(self.quarantine / digest.hex, ignore_errors=True)

    def drop(self, digest: Digest) -> None:
        """Delete an installed release: one rename, after which it is no release any more.

        A deletion that is killed leaves `quarantine/<digest>.removed`, which the next one takes.
        """
        source = self.installed / digest.hex
        target = self.quarantine / f"{digest.hex}.removed"
        shutil.rmtree(target, ignore_errors=True)
        source.chmod(0o700)  # a folder's own name entry `..` changes with its place
        source.rename(target)
        sync_folder(self.installed)
        delete_tree(target)

    def delete_leftovers(self) -> None:
        """Delete what killed deletions left."""
        for path in self.unfinished():
            if path.name.endswith(".removed"):
                delete_tree(path)

    def _load(self, folder: Path) -> InstalledBundle:
        try:
            raw = read_limited(
                folder / "META/manifest.json", MANIFEST_LIMIT, code="start.digest", what="manifest"
            )
            manifest = parse_manifest(raw)
        except AirgapError as error:
            raise _damaged(folder, error.message) from error
        digest = Digest.of(raw)
        if digest.hex != folder.name:
            raise _damaged(folder, f"its manifest has digest {digest}")
        return InstalledBundle(folder, manifest, digest)


def verify_installed(folder: Path, progress: Progress | None = None) -> Manifest:
    """Hash every file of an installed bundle again and allow no other; before each model start.

    Raises:
        RefusedError: `start.digest`; a file is missing, altered or not listed, or the manifest is
            not the one that the folder is named after.

    """
    bundle = Store(folder.parent.parent)._load(folder)  # noqa: SLF001 - one module, one invariant
    listed = {entry.path for entry in bundle.manifest.files} | set(HEAD_FILES)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in listed):
            raise _damaged(folder, f"{name!r:.160} is not a file of this bundle")
    wrong = find_wrong(folder, bundle.manifest, progress)
    if wrong:
        raise _damaged(folder, f"{wrong!r:.160} is not the file that was installed")
    return bundle.manifest


def find_wrong(
    folder: Path, manifest: Manifest, progress: Progress | None = None, *, sync: bool = False
) -> str:
    """Return the path of the first file whose digest is not the manifest's, or nothing.

    Files are hashed two at a time. With `sync`, each is also written through to the disk.
    """
    total = sum(entry.size for entry in manifest.files)
    done = 0

    def check(entry: FileEntry) -> tuple[str, bool, int]:
        wanted = entry.checked
        found = _digest_file(folder / entry.path, wanted.algorithm, sync=sync)
        return entry.path, found == (wanted.raw, entry.size), entry.size

    pool = ThreadPoolExecutor(2, thread_name_prefix="digest")
    try:
        for path, same, size in pool.map(check, manifest.files):
            if not same:
                return path
            done += size
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return ""


def delete_tree(folder: Path) -> None:
    """Delete a folder and all in it, read-only folders too; links are not followed."""
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o700)
    shutil.rmtree(folder)


def _digest_file(path: Path, algorithm: str, *, sync: bool) -> tuple[bytes, int]:
    """Return digest and size of a plain file, (b"", 0) when it is missing or no such file."""
    hasher, size = hashlib.new(algorithm), 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b"", 0
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        while part := stream.read(_PART):
            hasher.update(part)
            size += len(part)
        if sync:
            os.fsync(descriptor)
    return hasher.digest(), size


def _damaged(folder: Path, reason: str) -> RefusedError:
    return RefusedError(
        "start.digest",
        f"the installed bundle {folder.name:.64} is damaged: {reason}",
        hint="install the bundle again from its medium: the damaged copy is set aside",
    )
