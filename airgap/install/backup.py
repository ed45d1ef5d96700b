"""Backup and restore of a tree: its log, keys, rules and releases, for named recipients only.

    META/backup.json      what lies in it: names and sizes, and which inventory the log vouches for
    META/inventory.json   digest and mode of every file beside the log
    files/...             those files
    audit/...             the log, which proves itself

The log's record of the backup names the digest of the inventory, and the log itself is verified
with a public key from elsewhere. So whoever restores needs to trust neither the medium nor the
file, only the key that she holds. The whole is encrypted, since it holds private keys (FORMAT.md
16).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from airgap.audit import Actor, AuditLog, Event, Receipt, Verdict, new_ulid, verify_log
from airgap.audit.checkpoint import Ring, load_log_key
from airgap.audit.layout import Layout as LogLayout
from airgap.audit.layout import last_checkpoint, read_lines, segment_range
from airgap.audit.record import parse_line
from airgap.install.store import delete_tree
from bundle.archive import Progress
from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import sync_folder
from bundle.fields import Count, DigestText, Document, Instant, Sha256Hex
from bundle.manifest import first_problem, require_paths
from bundle.source import Source
from bundle.tar import Layout, read_document
from bundle.transit import TransitHeader, TransitKey, encrypt_file
from bundle.write import require_space
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

CODE: Final = "backup.format"
HEAD: Final = "META/backup.json"
INVENTORY: Final = "META/inventory.json"
HEAD_LIMIT: Final = 256 << 20
_PART: Final = 4 << 20
# What another host would not take over: locks, probes, engines of a GPU, installs half done.
_LEFT_OUT: Final = ("enclave/", "engines/", "store/quarantine/", "store/verify/", "store/lock")
_LOG_LEFT_OUT: Final = (".lock", "reserve")

Mode = Annotated[int, Field(ge=0, le=0o777)]
OpenLog = Callable[[Path], AuditLog]
_Stamp = tuple[int, ...]


class Item(Document):
    """A file beside the log."""

    path: str
    size: Count
    mode: Mode
    sha256: Sha256Hex


class Inventory(Document):
    """`META/inventory.json`: the log holds its digest."""

    format: Literal["airgap-backup-inventory/1"] = "airgap-backup-inventory/1"
    created: Instant
    releases: bool
    files: tuple[Item, ...]
    links: dict[str, str]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


class LogFile(Document):
    """A file of the log."""

    path: str
    size: Count
    mode: Mode


class Head(Document):
    """`META/backup.json`."""

    format: Literal["airgap-backup/1"] = "airgap-backup/1"
    origin: str
    records: Count
    inventory: DigestText
    inventory_size: Count
    files: tuple[LogFile, ...]
    log: tuple[LogFile, ...]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))

    def layout(self) -> Layout:
        """Return where everything lies."""
        return Layout(
            [
                (HEAD, len(self.to_bytes())),
                (INVENTORY, self.inventory_size),
                *((f"files/{item.path}", item.size) for item in self.files),
                *((f"audit/{item.path}", item.size) for item in self.log),
            ]
        )


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A backup that was written. `head` is the signed head of the log when it was made."""

    transit: TransitHeader
    head: str
    records: int
    files: int
    size: int
    inventory: Digest
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Restored:
    """A tree that was restored. `records` were in the backup; `receipt` is of the next."""

    origin: str
    records: int
    files: int
    verdict: Verdict
    created: datetime
    receipt: Receipt


# -- backup -----------------------------------------------------------------------------------


def back_up(
    root: Path,
    out: Path,
    recipients: Sequence[TransitKey],
    *,
    open_log: OpenLog,
    actor: Actor | None,
    now: datetime,
    releases: bool = True,
    progress: Progress | None = None,
    limit: int = HEAD_LIMIT,
) -> BackedUp:
    """Write the tree at `root`, encrypted for `recipients`, and record that it was done.

    Args:
        root: The tree. Nothing may write to it meanwhile: a service is stopped first.
        out: Replaced if it exists; not below `root`.
        recipients: Public transit keys of those who may restore.
        open_log: Opens the log of a tree in this process.
        actor: Who does it.
        now: UTC.
        releases: Whether installed releases go along; else they are installed again from media.
        progress: Told bytes, of digests first and then of the copy.
        limit: Bytes of the list of files that a restore takes.

    Raises:
        RefusedError: `backup.tree`, a link or a device lies in the tree, or too many files;
            `audit.locked`;
            `transit.key`.
        FaultError: `host.io`, `host.space`, a file changed meanwhile; the log's own.

    """
    if out.absolute().is_relative_to(root.absolute()):
        raise RefusedError(
            "backup.tree", f"{out} lies in the tree itself", hint="write it to a medium: -o FILE"
        )
    inventory, stamps = _take_inventory(root, now, releases=releases, progress=progress)
    digest, request = Digest.of(inventory.to_bytes()), new_ulid()

    def record(log: AuditLog, **data: str) -> Receipt:
        evidence = str(log.put_object(inventory.to_bytes()))
        facts = {"object": str(digest), "evidence": evidence, **data}
        return log.append(Event("admin.backup", req=request, actor=actor, data=facts))

    with open_log(root) as log:
        record(log)
    try:
        # Closed, it stands still: what is copied now is what the next writer will find.
        with _frozen(root / "audit") as files:
            head = _head_of(root, inventory, files)
            _require_restorable(head, limit)
            note = LogLayout(root / "audit").checkpoint.read_text("utf-8")
            source = TreeSource(root, head, inventory, stamps)
            digested = sum(item.size for item in inventory.files)

            def second(done: int, _: int) -> None:
                if progress is not None:
                    progress(digested + done, digested + source.size)

            header = encrypt_file(source, out, recipients, progress=second)
    except BaseException:
        with suppress(AirgapError), open_log(root) as log:  # the first reason is the one to tell
            record(log, result="failed")
        raise
    with open_log(root) as log:
        receipt = record(log, result="complete", new=f"sha256:{header.id}")
    return BackedUp(header, note, head.records, len(inventory.files), source.size, digest, receipt)


class TreeSource:
    """The backup as one file that lies nowhere; a `bundle.source.Source`."""

    def __init__(
        self, root: Path, head: Head, inventory: Inventory, stamps: Mapping[str, _Stamp]
    ) -> None:
        self.path = root
        self._layout = head.layout()
        self.size = self._layout.size
        self._small = (head.to_bytes(), inventory.to_bytes())
        self._places = [
            *((root / item.path, stamps[item.path]) for item in head.files),
            *((root / "audit" / item.path, None) for item in head.log),
        ]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`: FaultError `host.io` when a file is not the one that was digested."""
        low, high = offset, offset + len(buffer)
        for at, gap, _ in self._layout.gaps(low, high):
            start, end = max(at, low), min(at + len(gap), high)
            buffer[start - low : end - low] = gap[start - at : end - at]
        for number, within, start, end in self._layout.spans(low, high):
            part = buffer[start - low : end - low]
            if number < len(self._small):
                part[:] = self._small[number][within : within + len(part)]
            else:
                path, stamp = self._places[number - len(self._small)]
                _read_at(path, within, part, stamp)

    def map(self) -> memoryview | None:
        """Return nothing: it lies nowhere."""
        return None

    def close(self) -> None:
        """Nothing is held open."""


def _take_inventory(
    root: Path, now: datetime, *, releases: bool, progress: Progress | None
) -> tuple[Inventory, dict[str, _Stamp]]:
    places, links = [], dict[str, str]()
    for path in _walk(root, releases=releases):
        if path.is_symlink():
            links[path.relative_to(root).as_posix()] = os.fspath(path.readlink())
        else:
            places.append(path)
    try:  # a name that no restore takes back is better told now
        _require_listed([path.relative_to(root).as_posix() for path in places], links)
    except RefusedError as error:
        raise RefusedError(
            "backup.tree",
            f"the tree: {error.message}",
            hint="rename it, or move it out of the tree",
        ) from error
    total = sum(path.stat().st_size for path in places)
    done, items, stamps = 0, [], dict[str, _Stamp]()
    for path in places:
        hasher, size = hashlib.sha256(), 0
        stamp = stamps[path.relative_to(root).as_posix()] = _stamp(path.lstat())
        for part in _parts(path):
            hasher.update(part)
            size += len(part)
            done += len(part)
            if progress is not None:
                progress(done, 2 * total)
        if _stamp(path.lstat()) != stamp:
            raise _changed(path)
        items.append(
            Item(
                path=path.relative_to(root).as_posix(),
                size=size,
                mode=stat.S_IMODE(path.stat().st_mode) & 0o777,
                sha256=hasher.hexdigest(),
            )
        )
    created = now.replace(microsecond=0)
    inventory = Inventory(created=created, releases=releases, files=tuple(items), links=links)
    return inventory, stamps


def _walk(root: Path, *, releases: bool) -> Iterator[Path]:
    """Yield the plain files of a tree beside its log, and links that stay beside their targets."""
    left_out = (*_LEFT_OUT, *(() if releases else ("store/installed/", "store/current")))
    for place, folders, names in os.walk(root):
        folder = Path(place)
        if folder == root:
            folders[:] = [name for name in folders if name != "audit"]
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = folder / name
            relative = path.relative_to(root).as_posix()
            if relative.startswith(left_out):
                continue
            kind = path.lstat().st_mode
            if stat.S_ISREG(kind) or (stat.S_ISLNK(kind) and _stays(os.fspath(path.readlink()))):
                yield path
            elif not stat.S_ISDIR(kind) and not stat.S_ISSOCK(kind):
                raise RefusedError(
                    "backup.tree",
                    f"{relative!r:.160} is a device, a pipe, or a link that leads away",
                    hint="put the file itself there, or move it out of the tree",
                )


def _stays(target: str) -> bool:
    """Tell whether a link leads to something beside or below it, by a name that can be written."""
    return bool(target) and not target.startswith("/") and ".." not in target.split("/")


@contextmanager
def _frozen(folder: Path) -> Iterator[tuple[LogFile, ...]]:
    """Hold the lock of a log that nobody writes, and yield its files."""
    descriptor = os.open(LogLayout(folder).lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                "audit.locked",
                f"another process writes the log in {folder}",
                hint="stop it for the time of the backup",
            ) from None
        yield tuple(
            LogFile(
                path=path.relative_to(folder).as_posix(),
                size=path.stat().st_size,
                mode=stat.S_IMODE(path.stat().st_mode) & 0o777,
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and not path.is_symlink()
            and path.relative_to(folder).as_posix() not in _LOG_LEFT_OUT
        )
    finally:
        os.close(descriptor)


def _head_of(root: Path, inventory: Inventory, files: tuple[LogFile, ...]) -> Head:
    newest = last_checkpoint(LogLayout(root / "audit").journal)
    assert newest is not None  # noqa: S101 - a log that was opened and closed has a head
    raw = inventory.to_bytes()
    return Head(
        origin=newest[0].origin,
        records=newest[0].size,
        inventory=str(Digest.of(raw)),
        inventory_size=len(raw),
        files=tuple(LogFile(path=i.path, size=i.size, mode=i.mode) for i in inventory.files),
        log=files,
    )


def _require_restorable(head: Head, limit: int) -> None:
    if max(len(head.to_bytes()), head.inventory_size) > limit:
        raise RefusedError(
            "backup.tree",
            f"{len(head.files) + len(head.log):,} files are more than a restore takes",
            hint="export and prune old records first; or leave releases out",
        )


# -- restore ----------------------------------------------------------------------------------


def restore(
    source: Source,
    root: Path,
    *,
    ring: Ring,
    anchors: Sequence[Path] = (),
    open_log: OpenLog,
    actor: Actor | None,
    progress: Progress | None = None,
) -> Restored:
    """Bring a backup back as the tree `root`, and go on with its log.

    Everything is written beside, checked, and renamed when all of it holds.

    Args:
        source: The opened backup; `bundle.transit.TransitFile`.
        root: May not exist, or must be empty.
        ring: Verifier keys of the log, kept elsewhere.
        anchors: Receipts and heads kept elsewhere: a log that has gone on since is told by them.
        open_log: Opens the log of a tree in this process.
        actor: Who does it.
        progress: Told bytes.

    Raises:
        RefusedError: `backup.target`, there is something at `root`; `backup.format`;
            `backup.digest`, a file is not the one of the inventory, or the inventory not the one
            that the log names; `backup.log`, the log does not verify, or has gone on elsewhere.
        FaultError: `host.io`, `host.space`.

    """
    root = root.absolute()
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise RefusedError(
            "backup.target",
            f"{root} exists and is not an empty folder",
            hint="name a new folder with --root; nothing is ever restored over a tree",
        )
    head, inventory = _read_heads(source)
    partial = root.with_name(f".{root.name}.restoring")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial):
            require_space(root.parent, sum(item.size for item in (*head.files, *head.log)))
            _write_files(source, head, inventory, partial, progress)
            verdict = _require_log(partial / "audit", head, inventory, ring, anchors)
            _require_key(partial, ring)
            request = new_ulid()
            facts = {"object": head.inventory, "old": f"record {head.records}"}
            with open_log(partial) as log:
                evidence = str(log.put_object(inventory.to_bytes()))
                facts["evidence"] = evidence
                log.append(Event("admin.restore", req=request, actor=actor, data=facts))
            _protect_releases(partial)
            if root.exists():
                root.rmdir()
            partial.rename(root)
            sync_folder(root.parent)
    except OSError as error:
        raise FaultError(
            "host.io",
            f"{root} cannot be restored: {error.strerror or error}",
            hint="check the disk and who may write there; the folder "
            f"{partial.name} beside it may be deleted",
        ) from error
    with open_log(root) as log:
        facts["result"] = "complete"
        receipt = log.append(Event("admin.restore", req=request, actor=actor, data=facts))
    return Restored(head.origin, head.records, len(head.files), verdict, inventory.created, receipt)


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Make the folder of one restore, and delete it unless it was renamed.

    One that a killed restore left goes first. One that another restore writes, or another account
    made, is left alone: two backups in one folder would be a tree that nobody ever backed up.
    """
    if os.path.lexists(partial):
        with _locked(partial):
            delete_tree(partial)
    partial.mkdir(mode=0o700)
    with _locked(partial):
        try:
            yield
        finally:
            if partial.exists():
                delete_tree(partial)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise RefusedError(
                "backup.target",
                f"{partial} belongs to another account",
                hint="remove it, or name a folder where nobody else may write",
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                "backup.target",
                f"another restore writes {partial}",
                hint="wait for it, or name another folder with --root",
            ) from None
        yield
    finally:
        os.close(descriptor)


def _read_heads(source: Source) -> tuple[Head, Inventory]:
    try:
        raw = read_document(source, 0, HEAD, HEAD_LIMIT)
    except RefusedError as error:
        raise RefusedError(
            CODE,
            f"{source.path.name!r:.100} holds no backup: {error.message}",
            hint="airgap backup makes one; a bundle is taken by airgap install",
        ) from error
    head = _parse(Head, raw)
    layout = head.layout()
    if source.size != layout.size:
        raise RefusedError(CODE, f"the backup has {source.size:,} bytes, not {layout.size:,}")
    if head.inventory_size > HEAD_LIMIT:
        raise RefusedError(CODE, f"an inventory of {head.inventory_size:,} bytes")
    buffer = bytearray(head.inventory_size)
    source.read_into(layout.offsets[1], memoryview(buffer))
    if str(Digest.of(bytes(buffer))) != head.inventory:
        raise RefusedError(CODE, "the inventory is not the one that the backup names")
    inventory = _parse(Inventory, bytes(buffer))
    listed = tuple(LogFile(path=i.path, size=i.size, mode=i.mode) for i in inventory.files)
    if listed != head.files:
        raise RefusedError(CODE, "the backup and its inventory list other files")
    _require_names(head, inventory)
    return head, inventory


def _parse(kind: type[Any], raw: bytes) -> Any:
    parse_canonical(raw, code=CODE, what="the backup", limit=HEAD_LIMIT)
    try:
        found = kind.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError(CODE, f"the backup: {first_problem(error)}") from error
    if found.to_bytes() != raw:
        raise RefusedError(CODE, "the backup writes a field in another form")
    return found


def _require_names(head: Head, inventory: Inventory) -> None:
    """Let no name of the backup leave the tree, or pass for the log."""
    names = [*(item.path for item in head.files), *inventory.links]
    try:
        _require_listed([item.path for item in head.files], inventory.links)
        require_paths([f"audit/{item.path}" for item in head.log])
    except RefusedError as error:
        raise RefusedError(CODE, f"the backup: {error.message}") from error
    for name in names:
        if name.startswith(("audit/", *_LEFT_OUT)) or name == "audit":
            raise RefusedError(CODE, f"the backup: {name!r:.100} has no place in a tree")
    for name, target in inventory.links.items():
        if not _stays(target):
            raise RefusedError(CODE, f"the backup: the link {name!r:.100} leads away")


def _require_listed(names: Sequence[str], links: Mapping[str, str]) -> None:
    """Refuse names and targets of links that cannot be written again as they are."""
    require_paths([*names, *links])
    for text in [*names, *links, *links.values()]:
        if not text.isprintable():  # a byte that is no UTF-8 is not, either
            raise RefusedError("manifest.paths", f"{text!r:.80} holds odd characters")


def _write_files(
    source: Source, head: Head, inventory: Inventory, partial: Path, progress: Progress | None
) -> None:
    layout = head.layout()
    digests = {f"files/{item.path}": item.sha256 for item in inventory.files}
    modes = {f"files/{item.path}": item.mode for item in head.files}
    # Nothing vouches for the modes of the log's files: whoever made them, others write none.
    modes |= {f"audit/{item.path}": item.mode & ~0o022 for item in head.log}
    for index, (name, size) in enumerate(layout.files):
        if name not in modes:
            continue
        path = partial / name.removeprefix("files/")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _write_one(source, layout.offsets[index], size, path, modes[name])
        if found != digests.get(name, found):
            raise RefusedError(
                "backup.digest",
                f"{name.removeprefix('files/')!r:.160} is not the file that was backed up",
                hint="take another copy of the backup",
            )
        if progress is not None:
            progress(layout.offsets[index] + size, layout.size)
    for name, target in inventory.links.items():
        (partial / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (partial / name).symlink_to(target)


def _write_one(source: Source, offset: int, size: int, path: Path, mode: int) -> str:
    hasher, done = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as stream:
        while done < size:
            buffer = memoryview(bytearray(min(_PART, size - done)))
            source.read_into(offset + done, buffer)
            hasher.update(buffer)
            stream.write(buffer)
            done += len(buffer)
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())
    return hasher.hexdigest()


def _require_log(
    folder: Path, head: Head, inventory: Inventory, ring: Ring, anchors: Sequence[Path]
) -> Verdict:
    """Verify the log, and that its last act was this backup."""
    verdict = verify_log(folder, vkey=ring, anchors=anchors)
    if verdict.code == "audit.tampered":
        worst = verdict.findings[0]
        raise RefusedError(
            "backup.log",
            f"the log of the backup does not hold: {worst}",
            hint="compare the key and the anchors; a log that has gone on since cannot be set back",
        )
    last: dict[str, Any] = {}
    for index in segment_range(LogLayout(folder)):
        for line in read_lines(LogLayout(folder).segment(index)):
            record = parse_line(line.removesuffix(b"\n"))
            if record["kind"] == "admin.backup" and "result" not in record["data"]:
                last = dict(record)
    named = last.get("data", {}).get("object")
    if named != str(Digest.of(inventory.to_bytes())) or named != head.inventory:
        raise RefusedError(
            "backup.digest",
            "the log does not name this inventory as that of its last backup",
            hint="the file was put together from parts; take another copy of the backup",
        )
    return verdict


def _require_key(partial: Path, ring: Ring) -> None:
    path = partial / "keys" / "audit.pem"
    if path.is_file() and load_log_key(path).vkey.key_id not in {k.key_id for k in ring.keys}:
        raise RefusedError(
            "backup.log",
            "the private key of the log in the backup is not one of the keys that were given",
            hint="give the newest verifier keys of the log: --vkey FILE",
        )


def _protect_releases(partial: Path) -> None:
    """Make folders of releases read-only again; their files came with their modes."""
    installed = partial / "store" / "installed"
    for place, _, _ in os.walk(installed, topdown=False):
        if Path(place) != installed:
            Path(place).chmod(0o555)


# -- files ------------------------------------------------------------------------------------


def _parts(path: Path) -> Iterator[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            while part := stream.read(_PART):
                yield part
    except OSError as error:
        raise FaultError("host.io", f"{path} cannot be read: {error.strerror}") from error


def _stamp(found: os.stat_result) -> _Stamp:
    """Return what changes whenever the content of a file may have."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_at(path: Path, offset: int, buffer: memoryview, stamp: _Stamp | None) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            count = os.preadv(descriptor, [buffer], offset)
            found = _stamp(os.fstat(descriptor))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FaultError("host.io", f"{path} cannot be read: {error.strerror}") from error
    if count != len(buffer) or (stamp is not None and found != stamp):
        raise _changed(path)


def _changed(path: Path) -> FaultError:
    return FaultError(
        "host.io",
        f"{path} changed while it was backed up",
        hint="stop what writes to the tree, then back up again",
    )
