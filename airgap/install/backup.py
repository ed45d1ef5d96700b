"""Backup of a tree while it serves: its log, keys, rules and releases, for named recipients only.

The log goes on meanwhile, and so do requests. What is copied of it ends at a signed head: that of
the record which names the inventory. Every other file is opened once and stays open, so what is
copied is what was digested, whatever takes its name later. That all of it is of one moment is
looked at last: where a file came, went or changed before that head was signed, it is done again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from airgap.audit import Actor, Event, Receipt, new_ulid
from airgap.audit.anchors import parse_anchor
from airgap.audit.disk import open_plain
from airgap.audit.layout import Layout as LogLayout
from airgap.audit.layout import journal_line, read_lines, segment_range
from airgap.audit.receipt import MAX_RECEIPT
from airgap.audit.service import Log
from airgap.audit.tiles import SEGMENT, is_tile_of
from airgap.install.backup_format import (
    HEAD,
    INVENTORY,
    INVENTORY_LIMIT,
    KIND,
    LEFT_OUT,
    Head,
    Inventory,
    Item,
    names_log_file,
    require_names,
    stays,
)
from bundle.archive import Progress
from bundle.tar import Layout
from bundle.transit import TransitHeader, TransitKey, encrypt_file
from bundle.write import full_disk
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

MAX_FILES: Final = 32_768  # beside the log; an inventory of more is larger than the log takes
TRIES: Final = 20
PAUSE_S: Final = 0.02  # after the first look that met a change; longer after each further one
_PART: Final = 4 << 20
_BLOCK: Final = 1 << 20
_SMALL: Final = 64 << 20  # what the log rewrites: notes of exports and prunings, anchors
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BESIDE: Final = re.compile(r"\.[^/]+\.[0-9]+")  # being written, to be renamed
_ONCE: Final = ("objects", "sealed")  # folders of the log whose files are written once
_AFTER: Final = (b'"kind":"prune"', b'"kind":"spill.purge"', b'"kind":"export"')

OpenLog = Callable[[Path], Log]
_Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A backup that was written. `head` is the signed head of the log that it ends with."""

    transit: TransitHeader
    head: str
    records: int
    files: int
    size: int
    inventory: Digest
    receipt: Receipt


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
    limit: int = INVENTORY_LIMIT,
) -> BackedUp:
    """Write the tree at `root`, encrypted for `recipients`, and record that it was done.

    Args:
        root: The tree. A service may use it and write to its log meanwhile.
        out: Replaced if it exists; not below `root`.
        recipients: Public transit keys of those who may restore.
        open_log: Opens the log of the tree: in this process, or of the service that holds it.
        actor: Who does it.
        now: UTC.
        releases: Whether installed releases go along; else they are installed again from media.
        progress: Told bytes, of digests first and then of the copy.
        limit: Bytes of the inventory.

    Raises:
        RefusedError: `backup.tree`, a link or a device lies in the tree, or too many files;
            `audit.locked`; `transit.key`.
        FaultError: `host.io`, `host.space`, a file changed meanwhile; the log's own.

    """
    if out.absolute().is_relative_to(root.absolute()):
        raise RefusedError(
            "backup.tree", f"{out} lies in the tree itself", hint="write it to a medium: -o FILE"
        )
    _allow_descriptors()
    with open_log(root) as log, _Tree.opened(root, releases=releases) as tree:
        tree.look(progress)
        act = _Act(log, actor)
        try:
            cut, inventory = _at_one_moment(tree, act, now, limit)
            raw = inventory.to_bytes()
            head = Head(
                record=cut.line.decode("ascii"),
                proof=cut.receipt.as_proof(),
                inventory_size=len(raw),
            )
            parts = [_Part(HEAD, content=head.to_bytes()), _Part(INVENTORY, content=raw)]
            source = _Source(root, [*parts, *tree.parts(), *cut.parts])
            digested = sum(item.size for item in inventory.files)

            def second(done: int, _: int) -> None:
                if progress is not None:
                    progress(digested + done, digested + source.size)

            header = encrypt_file(source, out, recipients, progress=second)
        except BaseException:  # also an interrupt: the record says that it came to nothing
            act.give_up()
            raise
        receipt = act.record(raw, result="complete", new=f"sha256:{header.id}")
    return BackedUp(
        transit=header,
        head=cut.receipt.note,
        records=cut.receipt.size,
        files=len(inventory.files),
        size=source.size,
        inventory=Digest.of(raw),
        receipt=receipt,
    )


@dataclass(slots=True)
class _Act:
    """This backup on the log; one request for all of its records."""

    log: Log
    actor: Actor | None
    request: str = field(default_factory=new_ulid)
    named: bytes = b""

    def give_up(self) -> None:
        """Say that it failed, if it was begun; the first reason is the one that is told."""
        if self.named:
            with suppress(AirgapError):
                self.record(self.named, result="failed")

    def record(self, inventory: bytes, **more: str) -> Receipt:
        """Put the inventory and a record that names it on the log."""
        self.named = inventory
        try:
            evidence = str(self._kept(inventory))
        except OSError as error:  # a log of our own says it as the disk does
            raise full_disk(error, self.log.folder) from error
        data = {"object": str(Digest.of(inventory)), "evidence": evidence, **more}
        return self.log.append(Event(KIND, req=self.request, actor=self.actor, data=data))

    def _kept(self, inventory: bytes) -> Digest:
        """Store the inventory; a service that was started anew meanwhile is asked once more."""
        try:
            return self.log.put_object(inventory)
        except FaultError as error:
            if error.code != "audit.service":
                raise
            return self.log.put_object(inventory)


def _at_one_moment(tree: _Tree, act: _Act, now: datetime, limit: int) -> tuple[_Cut, Inventory]:
    """Put the tree on record as it is, and return the log up to there, both of one moment.

    What the log says at its head is then true of the files: nothing came, went or changed between
    the look that the record tells of and the head that covers the record.
    """
    created, layout = now.replace(microsecond=0), LogLayout(tree.root / "audit")
    for tries in range(TRIES):
        time.sleep(tries * PAUSE_S)
        tree.look()
        inventory = tree.inventory(created, limit)
        cut = _Cut.at(layout, act.record(inventory.to_bytes()))
        if not tree.look() and not cut.was_changed():
            return cut, inventory
    raise FaultError(
        "host.io",
        f"files of {tree.root} came, went or changed in each of {TRIES} looks",
        hint="run it again at a quieter time, or find out what writes to the tree all the time",
    )


# -- the bytes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of the backup: its `content`, or the first `size` bytes of a file of the tree `root`.

    `stamp` is what that file must look like while it is read, None where it may grow.
    """

    name: str
    size: int = 0
    content: bytes | None = None
    root: Path = Path()
    path: Path = Path()
    descriptor: int = -1
    stamp: _Stamp | None = None

    @property
    def length(self) -> int:
        """Bytes in all."""
        return self.size if self.content is None else len(self.content)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`: FaultError `host.io` when the file is not what it was."""
        if self.content is not None:
            buffer[:] = self.content[offset : offset + len(buffer)]
            return
        try:
            descriptor = self.descriptor if self.descriptor >= 0 else _open(self.root, self.path)
            try:
                count = os.preadv(descriptor, [buffer], offset)
                found = os.fstat(descriptor)
            finally:
                if descriptor != self.descriptor:
                    os.close(descriptor)
        except OSError as error:
            raise FaultError(
                "host.io",
                f"{self.path} cannot be read: {error.strerror}",
                hint="if it was pruned, purged or removed just now, back up again",
            ) from error
        if count != len(buffer) or (self.stamp is not None and not _same(found, self.stamp)):
            raise FaultError(
                "host.io",
                f"{self.path} changed while it was backed up",
                hint="back up again; files are replaced by a rename and not written in place",
            )


class _Source:
    """The backup as one file that lies nowhere; a `bundle.source.Source`."""

    def __init__(self, root: Path, parts: Sequence[_Part]) -> None:
        self.path, self._parts = root, parts
        self._layout = Layout([(part.name, part.length) for part in parts])
        self.size = self._layout.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `_Part.read_into`."""
        low, high = offset, offset + len(buffer)
        for at, gap, _ in self._layout.gaps(low, high):
            start, end = max(at, low), min(at + len(gap), high)
            buffer[start - low : end - low] = gap[start - at : end - at]
        for number, within, start, end in self._layout.spans(low, high):
            self._parts[number].read_into(within, buffer[start - low : end - low])

    def map(self) -> memoryview | None:
        """Return nothing: it lies nowhere."""
        return None

    def close(self) -> None:
        """Nothing of its own is held open."""


# -- files beside the log ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """A file that was digested and is still open: what takes its name later is another one."""

    descriptor: int
    stamp: _Stamp
    item: Item


@dataclass(slots=True)
class _Tree:
    """The files of a tree beside its log, and its links that stay beside their targets."""

    root: Path
    releases: bool
    held: dict[str, _Held] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, root: Path, *, releases: bool) -> Iterator[_Tree]:
        """Yield a tree that nobody has looked at; its files are closed at the end."""
        tree = cls(root, releases)
        try:
            yield tree
        finally:
            for name in tuple(tree.held):
                tree._drop(name)

    def look(self, progress: Progress | None = None) -> bool:
        """Open and digest what is new or another; tell whether anything came, went or changed.

        Raises:
            RefusedError: `backup.tree`.
            FaultError: `host.io`.

        """
        found, links = self._listed()
        gone = self.held.keys() - found.keys()
        stale = [
            name
            for name, status in found.items()
            if name not in self.held or not _same(status, self.held[name].stamp)
        ]
        changed = bool(gone or stale or links != self.links)
        self.links = links
        for name in gone:
            self._drop(name)
        total, done = sum(found[name].st_size for name in stale), 0
        for name in stale:
            self._drop(name)
            for size in self._take(name):
                done += size
                if progress is not None:
                    progress(done, 2 * total)
        return changed

    def inventory(self, created: datetime, limit: int) -> Inventory:
        """Return what was found: RefusedError `backup.tree` when that is too much."""
        inventory = Inventory(
            created=created,
            releases=self.releases,
            files=tuple(held.item for _, held in sorted(self.held.items())),
            links=self.links,
        )
        if len(inventory.to_bytes()) > limit:
            raise _too_many(len(self.held))
        return inventory

    def parts(self) -> list[_Part]:
        """Return the files in the order of the inventory."""
        return [
            _Part(
                f"files/{name}",
                held.item.size,
                path=self.root / name,
                descriptor=held.descriptor,
                stamp=held.stamp,
            )
            for name, held in sorted(self.held.items())
        ]

    def _listed(self) -> tuple[dict[str, os.stat_result], dict[str, str]]:
        """Return files and links as they are now; what goes meanwhile is not there."""
        found, links = dict[str, os.stat_result](), dict[str, str]()
        for path in _walk(self.root, releases=self.releases):
            name = path.relative_to(self.root).as_posix()
            with suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found[name] = status
                else:
                    links[name] = _target(path)
        if len(found) > MAX_FILES:
            raise _too_many(len(found))
        try:  # a name that no restore takes back is better told now
            require_names(list(found), links)
        except RefusedError as error:
            raise RefusedError(
                "backup.tree",
                f"the tree: {error.message}",
                hint="rename it, or move it out of the tree",
            ) from error
        return found, links

    def _take(self, name: str) -> Iterator[int]:
        """Open and digest a file, yielding bytes read; one that is gone is told by the next look.

        So is one that changes meanwhile: its stamp is of before.
        """
        path = self.root / name
        try:
            descriptor = _open(self.root, path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise FaultError("host.io", f"{path} cannot be opened: {error.strerror}") from error
        hasher, size, held = hashlib.sha256(), 0, False
        try:
            status = os.fstat(descriptor)
            while part := os.pread(descriptor, _PART, size):
                hasher.update(part)
                size += len(part)
                yield len(part)
            mode = stat.S_IMODE(status.st_mode) & 0o777
            item = Item(path=name, size=size, mode=mode, sha256=hasher.hexdigest())
            self.held[name], held = _Held(descriptor, _stamp(status), item), True
        except OSError as error:
            raise FaultError("host.io", f"{path} cannot be read: {error.strerror}") from error
        finally:
            if not held:
                os.close(descriptor)

    def _drop(self, name: str) -> None:
        held = self.held.pop(name, None)
        if held is not None:
            os.close(held.descriptor)


def _allow_descriptors() -> None:
    """Let this process open a whole tree, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MAX_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * MAX_FILES, hard), hard))


def _walk(root: Path, *, releases: bool) -> Iterator[Path]:
    """Yield the plain files of a tree beside its log, and links that stay beside their targets."""
    left_out = (*LEFT_OUT, *(() if releases else ("store/installed/", "store/current")))
    for place, folders, names in os.walk(root, onerror=_unread):
        folder = Path(place)
        if folder == root:
            folders[:] = [name for name in folders if name != "audit"]
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = folder / name
            relative = path.relative_to(root).as_posix()
            if relative.startswith(left_out) or _BESIDE.fullmatch(name):
                continue
            with suppress(FileNotFoundError):
                kind = path.lstat().st_mode
                if stat.S_ISREG(kind) or (stat.S_ISLNK(kind) and stays(_target(path))):
                    yield path
                elif not stat.S_ISDIR(kind) and not stat.S_ISSOCK(kind):
                    raise RefusedError(
                        "backup.tree",
                        f"{relative!r:.160} is a device, a pipe, or a link that leads away",
                        hint="put the file itself there, or move it out of the tree",
                    )


def _unread(error: OSError) -> None:
    """Let no folder be passed over in silence; one that is gone is told by the next look."""
    if not isinstance(error, FileNotFoundError):
        raise FaultError(
            "host.io",
            f"{error.filename} cannot be read: {error.strerror}",
            hint="run it as root, or as the account that owns the tree",
        ) from error


def _open(root: Path, path: Path) -> int:
    """Open a plain file of the tree by way of folders alone: no link is followed, not even to one.

    Some folders belong to accounts that may put a link there at any moment, to a file that is not
    theirs to read. Whoever backs up is root.
    """
    place = os.open(root, _ENTER)
    try:
        *folders, name = path.relative_to(root).parts
        for folder in folders:
            below = os.open(folder, _ENTER | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = below
        found = os.open(name, _READ, dir_fd=place)
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return found


def _target(link: Path) -> str:
    return os.fspath(link.readlink())


def _too_many(count: int) -> RefusedError:
    return RefusedError(
        "backup.tree",
        f"{count:,} files beside the log are more than one backup lists",
        hint="purge old holds, or leave releases out: --no-releases",
    )


def _stamp(found: os.stat_result) -> _Stamp:
    """Return what changes whenever the content of a file may have."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _same(found: os.stat_result, stamp: _Stamp) -> bool:
    """Whether a file is as it was; losing its last name changes the last time, and no content."""
    now = _stamp(found)
    return now == stamp or (found.st_nlink == 0 and now[:-1] == stamp[:-1])


# -- the log ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cut:
    """The files of a log up to the head of a receipt, and the line of the record it is for."""

    layout: LogLayout
    receipt: Receipt
    line: bytes
    end: int  # of the last segment
    parts: tuple[_Part, ...]

    @classmethod
    def at(cls, layout: LogLayout, receipt: Receipt) -> _Cut:
        """Look at a log that may be written to meanwhile; FaultError `host.io`."""
        last = (receipt.size - 1) // SEGMENT
        try:
            line, end = _find_line(layout.segment(last), receipt, last * SEGMENT)
            parts = (
                *_segments(layout, last, end),
                _grows(layout, layout.journal, _journal_end(layout.journal, receipt.note)),
                _part(layout, layout.checkpoint, content=receipt.note.encode()),
                *_derived(layout, receipt.size),
                *(_whole(layout, path) for name in _ONCE for path in _below(layout.log / name)),
                *(_whole(layout, path) for path in _below(layout.torn)),
                *_rewritten(layout, receipt.size),
            )
        except OSError as error:
            raise FaultError(
                "host.io",
                f"{error.filename or layout.folder} cannot be read: {error.strerror}",
                hint="if it was pruned or purged just now, back up again",
            ) from error
        return cls(layout, receipt, line, end, parts)

    def was_changed(self) -> bool:
        """Whether an act since then took files away, or noted what a log this short cannot know."""
        last = (self.receipt.size - 1) // SEGMENT
        since = b""
        for index in range(last, segment_range(self.layout).stop):
            with open_plain(self.layout.segment(index)) as file:
                file.seek(self.end if index == last else 0)
                since += file.read()
        return any(kind in since for kind in _AFTER)


def _find_line(segment: Path, receipt: Receipt, first: int) -> tuple[bytes, int]:
    """Return the receipt's own line, and where the line before the head's size ends."""
    line, end, seq = b"", 0, first
    for raw in read_lines(segment):
        if seq == receipt.seq:
            line = raw.removesuffix(b"\n")
        seq, end = seq + 1, end + len(raw)
        if seq == receipt.size:
            break
    if seq != receipt.size or hashlib.sha256(b"\0" + line).digest() != receipt.leaf:
        raise FaultError(
            "host.io",
            f"{segment} does not hold what its service has just signed",
            hint="airgap audit verify tells what is wrong with the log; keep its folder",
        )
    return line, end


def _journal_end(journal: Path, note: str) -> int:
    """Return where the line of a head ends that was written a moment ago."""
    line = journal_line(note)
    with open_plain(journal) as file:
        end, window = file.seek(0, os.SEEK_END), _BLOCK
        while True:
            start = max(0, end - window)
            file.seek(start)
            found = file.read(end - start).rfind(line)
            if found >= 0:
                return start + found + len(line)
            if not start:
                raise FaultError(
                    "host.io",
                    f"{journal} does not hold the head that was just signed",
                    hint="airgap audit verify tells what is wrong with the log; keep its folder",
                )
            window *= 8


def _segments(layout: LogLayout, last: int, end: int) -> Iterator[_Part]:
    for index in range(segment_range(layout).start, last):
        yield _whole(layout, layout.segment(index))
    yield _grows(layout, layout.segment(last), end)


def _derived(layout: LogLayout, size: int) -> Iterator[_Part]:
    """Yield what follows from whole records before the head; an open writes the rest again."""
    for path in _below(layout.tiles):
        name = path.relative_to(layout.tiles).as_posix()
        if ".p/" not in name and is_tile_of(name, size):
            yield _whole(layout, path)
    for index in range(size // SEGMENT):
        if layout.frontier(index).is_file():
            yield _whole(layout, layout.frontier(index))


def _rewritten(layout: LogLayout, size: int) -> Iterator[_Part]:
    """Yield the small files that are replaced now and then, as they are at this moment."""
    for path in (
        layout.exported,
        layout.verified,
        layout.kept,
        layout.policy,
        *_below(layout.anchors),
    ):
        with (
            suppress(FileNotFoundError),
            os.fdopen(_open(layout.folder.parent, path), "rb") as file,
        ):
            content = file.read(_SMALL + 1)
            if len(content) > _SMALL:
                raise RefusedError("backup.tree", f"{path} has more than {_SMALL:,} bytes")
            if path.parent != layout.anchors or not _is_newer(content, size):
                yield _part(layout, path, content=content)


def _is_newer(content: bytes, size: int) -> bool:
    """Whether an anchor is of a head that came after: this log could not hold it."""
    try:
        return parse_anchor(content[: MAX_RECEIPT + 1], "").size > size
    except RefusedError:
        return False  # none of ours; `audit verify` reports it, here and there


def _below(folder: Path) -> Iterator[Path]:
    """Yield the plain files below a folder, and none that is being written beside."""
    for place, folders, names in os.walk(folder, onerror=_unread):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            with suppress(FileNotFoundError):
                if not name.endswith(".tmp") and stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _whole(layout: LogLayout, path: Path) -> _Part:
    found = path.lstat()
    return _part(layout, path, size=found.st_size, stamp=_stamp(found))


def _grows(layout: LogLayout, path: Path, end: int) -> _Part:
    return _part(layout, path, size=end)


def _part(
    layout: LogLayout,
    path: Path,
    *,
    size: int = 0,
    content: bytes | None = None,
    stamp: _Stamp | None = None,
) -> _Part:
    name = path.relative_to(layout.folder).as_posix()
    if not names_log_file(name):
        raise RefusedError(
            "backup.tree",
            f"{name!r:.160} in the folder of the log has a name that no log gives",
            hint="move it out of there",
        )
    return _Part(f"audit/{name}", size, content, layout.folder.parent, path, stamp=stamp)
