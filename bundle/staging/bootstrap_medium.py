"""The first part of `install.sh`: what it shares, and the bundle where it lies.

It reads a bundle or a set of volumes, one of which may be lost where the first parity volume is
there, and believes nothing of it; FORMAT.md sections 14 and 23. The standard library alone.
`installer_text` puts it before `bootstrap_seal`, `bundle.scan.wheel` and `bootstrap_main`, in one
file.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

HEAD = ("META/envelope.dsse.json", "META/trust.json", "META/manifest.json", "META/chunks.bin")
LIMITS = (131_072, 2 << 20, 4 << 20, 16 << 20)
BLOCK, ALIGN, CHUNK = 512, 4096, 4 << 20
UNMAPPED = 65534  # whom the root folders of a container without real root belong to
DELTA, VOLUME, TRANSIT = "META/delta.json", "META/volume.json", "META/transit.json"
NUMBERED = re.compile(r"(?P<stem>.+\.agb)\.(?P<number>[0-9]{3})")


class Stop(Exception):  # noqa: N818 - it is a refusal or a fault, as its status says
    """Nothing was changed; `status` is 1 for a refusal and 3 for a fault."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint


def refuse(code: str, message: str, hint: str = "") -> Stop:
    """Return a refusal: understood, and the answer is no."""
    return Stop(1, code, message, hint)


def fault(code: str, message: str, hint: str = "") -> Stop:
    """Return a fault: it could not be found out."""
    return Stop(3, code, message, hint)


def clean(text: str) -> str:
    """Return text without what would steer a terminal: names on a medium are anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)


def require_own(folder: Path) -> None:
    """Refuse a folder that another account could change or exchange, or a link to one.

    The folders above it count as well, but for those where only an owner may rename (`/tmp`).

    Raises:
        Stop: fault `host.io`.

    """
    mine = os.geteuid()
    others = 0o022 if mine == 0 else 0o002
    above = folder.parent.resolve()
    for place in (folder, above, *above.parents):
        if not os.path.lexists(place):
            continue
        found = place.lstat()
        shared = found.st_mode & others and (place == folder or not found.st_mode & stat.S_ISVTX)
        known = {0, mine} if place == folder else {0, mine, UNMAPPED}
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in known or shared:
            raise fault(
                "host.io",
                f"{place} is no folder, or another account owns it or may write to it",
                "name the true folder with --prefix, or a new one; or mend owner and permissions",
            )


def require_place(folder: Path, needed: int) -> None:
    """Check that a folder can be made or written, and that its disk has room.

    Raises:
        Stop: faults `host.io` and `host.space`.

    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        why = "its disk is mounted read-only" if read_only else "it is no folder or denied to you"
        raise fault(
            "host.io",
            f"{place} cannot be written: {why}",
            "choose another place with --prefix and --root, or mend the permissions",
        )
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise fault(
            "host.space",
            f"{place} has {free:,} bytes free, about {needed:,} are needed",
            "free space there, or choose another place with --prefix and --root",
        )


@contextlib.contextmanager
def held(prefix: Path) -> Iterator[None]:
    """Hold the prefix for one installer; fault `host.state` while another one has it."""
    descriptor = os.open(prefix, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise fault(
                "host.state", f"another installer works in {prefix}",
                "wait for it, or stop it, then run it again",
            ) from error  # fmt: skip
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a folder of our own that goes away; openssl reads there what it is asked about."""
    place = Path(tempfile.gettempdir()).resolve()
    found = place.stat()
    sticky = bool(found.st_mode & stat.S_ISVTX) and found.st_uid == 0
    try:
        require_own(place.parent if sticky else place)
    except Stop as stop:
        raise fault(
            "host.io",
            f"temporary files would lie where others can exchange them: {stop.message}",
            "unset TMPDIR, or name a folder of yours there",
        ) from stop
    with tempfile.TemporaryDirectory(prefix="airgap-", dir=place) as name:
        yield Path(name)


# -- the medium -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Some bytes of a file."""

    start: int
    size: int


def read_member(stream: BinaryIO, at: int, limit: int) -> tuple[str, Span, int]:
    """Return name and span of the tar member whose headers begin at `at`, and where it ends."""
    stream.seek(at)
    block, size = stream.read(BLOCK), None
    if block[156:157] == b"x" and len(block) == BLOCK:
        length = _octal(block[124:136])
        records = stream.read(-(-length // BLOCK) * BLOCK)[:length]
        found = re.search(rb"(?:^|\n)\d+ size=(\d{1,15})\n", records)
        size = int(found[1]) if found else None
        at += BLOCK + -(-length // BLOCK) * BLOCK
        block = stream.read(BLOCK)
    plain = block[156:157] == b"0" and block[257:263] == b"ustar\0"
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    if len(block) != BLOCK or not plain or _octal(block[148:155]) != total:
        raise refuse("archive.header", f"byte {at:,} is no header of a bundle")
    size = _octal(block[124:136]) if size is None else size
    if size > limit:
        raise refuse("archive.limit", f"a member of {size:,} bytes, where {limit:,} are allowed")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    return name, Span(at + BLOCK, size), at + BLOCK + -(-size // BLOCK) * BLOCK


def read_head(path: Path) -> tuple[dict[str, bytes], int]:
    """Return the four members of the head of a bundle or volume, and where the head ends."""
    found: dict[str, bytes] = {}
    with open_plain(path) as stream:
        at = 0
        for wanted, limit in zip(HEAD, LIMITS, strict=True):
            name, span, at = read_member(stream, at, max(limit, 1 << 20))
            if name == TRANSIT:
                raise encrypted(path)
            if name != wanted:
                raise refuse("archive.order", f"{path}: {name!r:.80} stands for {wanted}")
            if span.size > limit:
                raise refuse("archive.limit", f"{path}: {wanted} is too large")
            stream.seek(span.start)
            found[name] = stream.read(span.size)
            if len(found[name]) != span.size:
                raise refuse("archive.truncated", f"{path} ends within {name}")
    return found, -(-at // ALIGN) * ALIGN


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file; a pipe or device is refused, and no writer of a pipe is waited for."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(number, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise refuse(
                    "archive.type", f"{path} is not a plain file", "name the bundle itself"
                )
            yield stream
    except OSError as error:
        raise fault("host.io", f"{path} cannot be read: {error.strerror}") from error


def encrypted(path: Path) -> Stop:
    """Return the refusal of a file that is encrypted for the way."""
    return refuse(
        "transit.key",
        f"{path.name} is encrypted, and this host has no program yet that could open it",
        "carry the wheels as a plain bundle: they are public programs; what is secret comes after",
    )


@dataclass(frozen=True)
class Piece:
    """Bytes of the body: those of one span; of several, added bit by bit (a parity volume)."""

    sources: tuple[tuple[Path, Span], ...]
    size: int

    def read(self, within: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer where the file ends."""
        total, length = 0, 0
        for path, span in self.sources:
            with open_plain(path) as stream:
                stream.seek(span.start + within)
                part = stream.read(max(min(size, span.size - within), 0))
            total ^= int.from_bytes(part, "little")
            length = max(length, len(part))
        return total.to_bytes(length, "little")


@dataclass
class Medium:
    """A bundle where it lies: one file, or a set of volumes."""

    head: dict[str, bytes]
    pieces: list[Piece]  # in order
    per_piece: int  # bytes of the body in a full piece
    notes: tuple[str, ...] = ()  # what a person must hear

    def read(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield bytes of the body."""
        while size > 0:
            number, within = divmod(offset, self.per_piece)
            if number >= len(self.pieces):
                raise refuse("archive.truncated", "the body ends too early")
            piece = self.pieces[number]
            part = piece.read(within, max(min(size, piece.size - within, 1 << 20), 0))
            if not part:
                raise refuse(
                    "archive.truncated", f"{piece.sources[0][0]} ends too early", "copy it again"
                )
            offset, size = offset + len(part), size - len(part)
            yield part


def open_medium(path: Path, places: Iterable[Path]) -> Medium:
    """Open a bundle, a volume or a folder with volumes.

    Raises:
        Stop: `volume.*`, `delta.base`, `transit.key`, `archive.*`, `host.io`.

    """
    if path.suffix == ".enc":
        raise encrypted(path)
    if path.is_dir():
        path = _only_one(path)
    named = NUMBERED.fullmatch(path.name)
    if named is not None:
        return _open_set(named["stem"], [path.parent, *places])
    head, start = read_head(path)
    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size - start
        first = read_member(stream, start, 1 << 62)[0] if size > 0 else ""
    if first == DELTA:
        raise refuse(
            "delta.base",
            f"{path.name} is a delta, and the release that it builds on is not on this host",
            "carry the full bundle of wheels; a host that has the program takes deltas",
        )
    if first == VOLUME:
        raise refuse(
            "volume.missing",
            f"{path.name} is one volume of a set, under another name",
            "give each volume its name again, NAME.agb.001 and so on, and name one of them",
        )
    return Medium(head, [Piece(((path, Span(start, size)),), size)], max(size, 1))


def _only_one(folder: Path) -> Path:
    """Return the bundle of a folder, or the first volume of its set."""
    names = sorted(each.name for each in folder.iterdir())
    numbered = [name for name in names if NUMBERED.fullmatch(name)]
    stems = {NUMBERED.fullmatch(name)["stem"] for name in numbered}  # type: ignore[index]
    plain = [name for name in names if name.endswith(".agb")]
    closed = [name for name in names if name.endswith(".enc")]
    if closed and not stems and not plain:
        raise encrypted(folder / closed[0])
    if len(stems) + len(plain) != 1:
        raise refuse(
            "volume.missing", f"{folder} holds {len(stems) + len(plain)} bundles, not one",
            "name the bundle, or any of its volumes",
        )  # fmt: skip
    return folder / (plain or numbered)[0]


def _open_set(stem: str, places: Iterable[Path]) -> Medium:
    """Find the volumes of a set and check that they have one head."""
    found: dict[int, Path] = {}
    for place in places:
        for path in sorted(place.glob(f"{glob_escape(stem)}.[0-9][0-9][0-9]")):
            found.setdefault(int(path.suffix[1:]), path)
    first: dict[str, bytes] = {}
    facts: dict[str, Any] = {}
    pieces: dict[int, tuple[Path, Span]] = {}
    for number, path in sorted(found.items()):
        head, start = read_head(path)
        with open_plain(path) as stream:
            name, span, at = read_member(stream, start, ALIGN)
            stream.seek(span.start)
            told = parse(stream.read(span.size), VOLUME)
            numbers = [told.get(key) for key in ("count", "chunks", "index")]
            if not all(isinstance(each, int) and 1 <= each < 1 << 32 for each in numbers):
                raise refuse("volume.order", f"{path} lies about its place in the set")
            if head != (first or head):
                raise refuse("volume.set", f"{path} is of another set than {found[min(found)]}")
            kind = "parity" if number > told["count"] else "body"
            if kind == "parity":
                _, _, at = read_member(stream, at, 16 << 20)  # digests, which repairs need
            body, span, _ = read_member(stream, at, 1 << 62)
        first, facts = first or head, facts or told
        same = ("set", "count", "chunks")
        odd = name != VOLUME or body != f"VOLUME/{kind}.{number:03}" or told["index"] != number
        if odd or any(told[key] != facts[key] for key in same):
            raise refuse("volume.order", f"{path} lies about its place in the set")
        pieces[number] = (path, span)
    count = facts.get("count", 1)
    missing = [number for number in range(1, count + 1) if number not in pieces]
    if missing and (len(missing) > 1 or count + 1 not in pieces):
        names = ", ".join(f"{stem}.{number:03}" for number in missing)
        raise refuse(
            "volume.missing",
            f"of {count} volumes {len(missing)} are missing: {names[:200]}",
            "bring them, or name further places with --volume DIR; one may be lost where the first "
            "parity volume is here",
        )
    data = {n: Piece((each,), each[1].size) for n, each in pieces.items() if n <= count}
    notes: tuple[str, ...] = ()
    for number in missing:  # the first parity volume is the sum of all data volumes
        others = tuple(each for n, each in sorted(pieces.items()) if n <= count + 1)
        data[number] = Piece(others, max(span.size for _, span in others))
        notes = (f"{stem}.{number:03} is not here: {pieces[count + 1][0].name} stands in for it",)
    ordered = [data[number] for number in range(1, count + 1)]
    return Medium(first, ordered, facts["chunks"] * CHUNK, notes)


# -- helpers -----------------------------------------------------------------------------------


def parse(raw: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object; a duplicate key or another form is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise refuse("seal.malformed", f"{what}: {error!s:.120}") from error
    if not isinstance(value, dict):
        raise refuse("seal.malformed", f"{what} is no object")
    return value


def decode(text: object) -> bytes:
    """Return the bytes of base64 of the one allowed form."""
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError as error:
        raise refuse("seal.malformed", "base64 with another form") from error


def glob_escape(text: str) -> str:
    """Return text without a meaning for glob."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _octal(field_: bytes) -> int:
    digits = field_.rstrip(b"\0 ")
    if not re.fullmatch(b"[0-7]{1,12}", digits):
        raise refuse("archive.header", "a number of a header is none")
    return int(digits, 8)
