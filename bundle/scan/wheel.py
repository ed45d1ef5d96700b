"""A wheel, looked into without installing it: no hook at start-up, and RECORD tells all.

Decides whether a wheel is what its name says (name, version, tags), whether its members tile the
file and are exactly those of its own RECORD, with those digests, whether anything in it would run
by itself, take the place of another program or leave the environment, whether it holds native code
that its tag does not declare, or a known telemetry client; and whether two wheels of one
environment come into each other's way. Native libraries and entry points are findings. Both sides
call it; `install.sh` carries this module, so it needs the standard library alone. Obeys
docs/design/bundle.md, 5, and FORMAT.md section 23.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import csv
import email.parser
import hashlib
import io
import itertools
import mmap
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from email.message import Message

from policy.errors import RefusedError

CODE = "scan.wheel"
MAX_MEMBERS = 50_000
MAX_UNPACKED = 4 * 1024**3  # bytes
MAX_RATIO = 200
MAX_HOLLOW = 16 * 1024**2  # bytes; libraries that were patched hold megabytes of zeros
MAX_RECORD = 16 * 1024 * 1024
MAX_METADATA = 4 * 1024 * 1024
MAX_ENTRY_POINTS = 1 << 20
_WHEEL_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.!+]+)(-(?P<build>\d\w*))?"
    r"-(?P<python>[\w.]+)-(?P<abi>[\w.]+)-(?P<platform>[\w.]+)\.whl"
)
_PART = 1 << 20
_RESIDENT = 32 << 20  # bytes of a mapped file that stay in memory while it is read
# Clients that send without being asked: the one of onnxruntime from 1.29 on, and common services.
# In two parts each: this file lies in a wheel that is searched for them.
_TELEMETRY = (
    b"One" + b"Collector",
    b"events.data" + b".microsoft.com",
    b"app.post" + b"hog.com",
    b"us.i.post" + b"hog.com",
)
_OVERLAP = max(map(len, _TELEMETRY)) - 1
_NATIVE = re.compile(r"\.(so(\.\d+)*|dylib|dll|pyd|exe)$", re.IGNORECASE)
# Starters for Windows that pip carries along; they are told like any native code.
_LAUNCHER = re.compile(r"pip/_vendor/distlib/[tw](32|64)(-arm)?\.exe")
# What Python runs by itself when it starts, and what holds code that nobody reads.
_BY_ITSELF = re.compile(r"\.(pth|egg-link)$|^site-packages/(site|user)customize[./]", re.IGNORECASE)
_COMPILED = re.compile(r"\.py[co]$|(^|/)__pycache__(/|$)", re.IGNORECASE)
# Beside its source it is allowed, because an install makes it anew from there.
_MADE_ANEW = re.compile(r"(?P<folder>.*/)__pycache__/(?P<module>[^/.]+)\.[a-z0-9-]+\.pyc")
# Programs that one wheel alone may bring, and those that none may: they are the environment's.
_OWNED = re.compile(r"(python|activate|pydoc|idle|pip|airgap)", re.IGNORECASE)
_OWNERS = {"pip": "pip", "airgap": "airgap"}
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_COLUMNS = 3  # of RECORD: path, digest, size
# Of the zip format: sizes of headers, and of what may stand after a member whose size came late.
_LOCAL, _CENTRAL, _END, _END64 = 30, 46, 22, 76
_LATE = 0x08
_DESCRIPTORS = {12, 16, 20, 24}
_UTF8 = 0x800


def check_wheel(data: memoryview, name: str) -> tuple[str, ...]:
    """Refuse a wheel that is not exactly what its name and RECORD say, and return findings.

    Raises:
        RefusedError: `scan.wheel`.

    """
    with _opened(data, name) as archive:
        _check_layout(archive, data, name)
        _check_members(archive, name)
        _check_identity(archive, name)
        _check_record(archive, name)
        placed = _placed(archive, name)
        if len(set(placed)) != len(placed):
            raise _no(name, "two files of it would be installed in one place")
        return (*_native(archive), *_entry_points(archive, name))


def installed_files(data: memoryview, name: str) -> frozenset[str]:
    """Return where pip puts the files of a wheel that was checked, counted from the environment.

    Raises:
        RefusedError: `scan.wheel`.

    """
    with _opened(data, name) as archive:
        return frozenset(_placed(archive, name))


def require_disjoint(brought: Mapping[str, frozenset[str]]) -> None:
    """Refuse wheels of one environment that bring one file, or files into each other's packages.

    A module beside another wheel's (`pkg/mod.so` beside `pkg/mod.py`, `pkg.py` beside `pkg/`) is
    imported in its place. Folders without an `__init__` are shared, as namespaces are.

    Args:
        brought: What `installed_files` gave for each wheel, by file name.

    Raises:
        RefusedError: `scan.wheel`.

    """
    owners: dict[str, str] = {}
    folders: dict[str, str] = {}
    for wheel in sorted(brought):
        for path in sorted(brought[wheel]):
            for place in (path, *_packages(path)):
                if owners.setdefault(place, wheel) != wheel:
                    raise _no(wheel, f"{owners[place]!r:.100} brings {place!r:.120} as well")
            parts = path.split("/")
            for count in range(1, len(parts)):
                folders.setdefault("/".join(parts[:count]), wheel)
    for wheel in sorted(brought):
        for path in sorted(brought[wheel]):
            other = owners.get(_nearest_package(path, owners), wheel)
            if other != wheel or path in folders:
                other = folders.get(path, other)
                raise _no(wheel, f"{path!r:.120} would lie in what {other!r:.100} brings")


def split_wheel_name(name: str) -> tuple[str, str]:
    """Return canonical name and version of a wheel's file name; RefusedError `scan.wheel`."""
    found = _name(name)
    return _canonical(found["name"]), found["version"]


@contextlib.contextmanager
def _opened(data: memoryview, name: str) -> Iterator[zipfile.ZipFile]:
    """Open a wheel; whatever the library stumbles over while it is read is a refusal."""
    _name(name)
    try:
        with _Bytes(data) as stream, zipfile.ZipFile(stream) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        raise _no(name, f"it cannot be read: {error!s:.120}") from error
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or an unknown compression
        raise _no(name, f"it cannot be read: {error!s:.120}") from error


def _check_layout(archive: zipfile.ZipFile, data: memoryview, name: str) -> None:
    """Members tile the file from its first byte to the directory, and that ends the file."""
    place, late = 0, False
    for member in sorted(archive.infolist(), key=lambda each: each.header_offset):
        gap = member.header_offset - place
        if gap != 0 and not (late and gap in _DESCRIPTORS):
            raise _no(name, f"bytes that belong to no file, or to two, before {place + gap:,}")
        head = bytes(data[member.header_offset : member.header_offset + _LOCAL])
        sizes = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        place = member.header_offset + _LOCAL + sizes + member.compress_size
        late = bool(member.flag_bits & _LATE)
    gap = archive.start_dir - place
    if gap != 0 and not (late and gap in _DESCRIPTORS):
        raise _no(name, "bytes that belong to no file before its directory")
    for member in archive.infolist():
        encoding = "utf-8" if member.flag_bits & _UTF8 else "cp437"
        words = (member.orig_filename.encode(encoding), member.extra, member.comment)
        place += _CENTRAL + sum(map(len, words))
    if len(data) - place - gap not in {_END, _END + _END64} or archive.comment:
        raise _no(name, "it goes on after its directory")


def _check_members(archive: zipfile.ZipFile, name: str) -> None:
    members = archive.infolist()
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise _no(name, f"it holds {len(members):,} files")
    if len({member.filename.casefold() for member in members}) != len(members):
        raise _no(name, "two files bear one name")
    total = 0
    pure = name.endswith("-none-any.whl")
    for member in members:
        path = member.filename
        total += member.file_size
        parts = path.removesuffix("/").split("/")
        if {"", ".", ".."} & set(parts) or re.search(r"[\\:]", path) or not path.isprintable():
            raise _no(name, f"it holds the path {path!r:.80}")
        if member.filename != member.orig_filename or (member.is_dir() and member.file_size):
            raise _no(name, f"it holds the path {member.orig_filename!r:.80}")
        if pure and _NATIVE.search(path) and not _LAUNCHER.fullmatch(path):
            raise _no(name, f"its tag says pure Python, but {path!r:.80} is native code")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            word = "link" if kind == stat.S_IFLNK else "special file"
            raise _no(name, f"{path!r:.80} is a {word}")
        dense = MAX_RATIO * max(member.compress_size, MAX_HOLLOW // MAX_RATIO)
        if member.file_size > dense or total > MAX_UNPACKED:
            raise _no(name, f"{path!r:.80} unpacks to far more than it holds")


def _check_identity(archive: zipfile.ZipFile, name: str) -> None:
    """Inside and outside say the same of name, version and tags: no source archive, no disguise."""
    found, stem = _name(name), "-".join(name.split("-")[:2])
    tops = {path.split("/")[0] for path in archive.namelist()}
    odd = {top for top in tops if top.endswith((".dist-info", ".data", ".egg-info"))}
    if not {f"{stem}.dist-info"} <= odd <= {f"{stem}.dist-info", f"{stem}.data"}:
        raise _no(name, f"it holds {sorted(odd)!s:.120}, where {stem}.dist-info is expected")
    about, tags = (_headers(archive, f"{stem}.dist-info/{each}", name) for each in _DOCUMENTS)
    inside = (_one(about, "Name", name), _one(about, "Version", name))
    if (_canonical(inside[0]), _same(inside[1])) != (
        _canonical(found["name"]),
        _same(found["version"]),
    ):
        raise _no(name, f"inside it is {inside[0]!r:.60} {inside[1]!r:.40}")
    wanted = {
        "-".join(each)
        for each in itertools.product(
            *(found[part].split(".") for part in ("python", "abi", "platform"))
        )
    }
    if set(tags.get_all("Tag") or []) != wanted:
        raise _no(name, f"inside its tags are {sorted(tags.get_all('Tag') or [])!s:.120}")
    if not _one(tags, "Wheel-Version", name).startswith("1."):
        raise _no(name, "it is of another format than version 1")


_DOCUMENTS = ("METADATA", "WHEEL")


def _headers(archive: zipfile.ZipFile, place: str, name: str) -> Message:
    if place not in archive.namelist() or archive.getinfo(place).file_size > MAX_METADATA:
        raise _no(name, f"{place!r:.100} is missing or too large")
    return email.parser.BytesHeaderParser().parsebytes(archive.read(place))


def _one(about: Message, key: str, name: str) -> str:
    found = about.get_all(key) or []
    if len(found) != 1:
        raise _no(name, f"{key} stands {len(found)} times inside")
    return str(found[0]).strip()


def _check_record(archive: zipfile.ZipFile, name: str) -> None:
    stem = "-".join(name.split("-")[:2])
    place = f"{stem}.dist-info/RECORD"
    files = {member.filename for member in archive.infolist() if not member.is_dir()}
    if place not in files or archive.getinfo(place).file_size > MAX_RECORD:
        raise _no(name, f"{place!r:.100} is missing or too large")
    rows = list(csv.reader(io.StringIO(archive.read(place).decode("utf-8"))))
    listed = {row[0]: (row[1], row[2]) for row in rows if len(row) == _COLUMNS}
    unsigned = {place, f"{place}.jws", f"{place}.p7s"}
    if len(listed) != len(rows) or set(listed) | (unsigned & files) != files:
        odd = sorted(files ^ set(listed))[:1]
        raise _no(name, f"RECORD and the files differ: {odd!r:.100}")
    for path in sorted(files - unsigned):
        digest, tail, size = hashlib.sha256(), b"", 0
        with archive.open(path) as member:
            while block := member.read(_PART):
                digest.update(block)
                size += len(block)
                _require_silent(tail + block, path, name)
                tail = block[-_OVERLAP:]
        found = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
        if listed[path] not in {(f"sha256={found}", str(size)), (f"sha256={found}", "")}:
            raise _no(name, f"{path!r:.80} is not the file that RECORD names")


def _require_silent(block: bytes, path: str, name: str) -> None:
    """Refuse the strings of telemetry clients that are on by default."""
    for mark in _TELEMETRY:
        if mark in block:
            raise _no(name, f"{path!r:.80} holds a telemetry client ({mark.decode()})")


def _placed(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Return where each file goes, programs of entry points among them; refuse odd places."""
    stem = "-".join(name.split("-")[:2])
    places = [
        _place(member.filename, stem, name) for member in archive.infolist() if not member.is_dir()
    ]
    for place in places:
        if _BY_ITSELF.search(place):
            raise _no(name, f"{place!r:.80} would run whenever Python starts")
        made = _MADE_ANEW.fullmatch(place)
        source = None if made is None else f"{made['folder']}{made['module']}.py"
        if _COMPILED.search(place) and source not in places:
            raise _no(name, f"{place!r:.80} is compiled code without its source")
    return places + [f"bin/{program}" for program in _programs(archive, name)]


def _place(path: str, stem: str, name: str) -> str:
    """Return where pip puts one file."""
    top, _, inner = path.partition("/")
    if top != f"{stem}.data":
        return f"site-packages/{path}"
    kind, _, rest = inner.partition("/")
    if kind in {"purelib", "platlib"} and rest:
        return f"site-packages/{rest}"
    if kind == "headers" and rest:
        return f"include/{stem.partition('-')[0]}/{rest}"
    if kind == "scripts" and _may_bring(rest, name):
        return f"bin/{rest}"
    if kind == "data" and rest.startswith("share/"):
        return rest
    raise _no(name, f"{path!r:.80} would lie beside what the environment runs, or in its place")


def _may_bring(program: str, name: str) -> bool:
    """Tell whether a wheel may bring a program of that name into `bin`."""
    owned = _OWNED.match(program)
    if owned is None:
        return _PROGRAM.fullmatch(program) is not None
    owner = _OWNERS.get(owned[1].lower())
    return owner == _canonical(_name(name)["name"]) and _PROGRAM.fullmatch(program) is not None


def _packages(path: str) -> tuple[str, ...]:
    """Return the import name that a file at the top of site-packages, or an `__init__`, claims."""
    parts = path.split("/")
    if parts[0] != "site-packages":
        return ()
    module = parts[-1].partition(".")[0]
    if module == "__init__":
        return (f"import {'/'.join(parts[1:-1])}",)
    code = parts[-1].endswith(".py") or _NATIVE.search(parts[-1])
    return (f"import {'/'.join([*parts[1:-1], module])}",) if code else ()


def _nearest_package(path: str, owners: Mapping[str, str]) -> str:
    """Return the claim of the outermost folder of a file that is a package, or nothing."""
    parts = path.split("/")
    if parts[0] != "site-packages":
        return ""
    claims = (f"import {'/'.join(parts[1:count])}" for count in range(2, len(parts)))
    return next((claim for claim in claims if claim in owners), "")


def _native(archive: zipfile.ZipFile) -> tuple[str, ...]:
    found = sorted(path for path in archive.namelist() if _NATIVE.search(path))
    names = ", ".join(path.rpartition("/")[2] for path in found)
    return (f"{len(found)} native libraries: {names:.400}",) if found else ()


def _entry_points(archive: zipfile.ZipFile, name: str) -> tuple[str, ...]:
    """List what the wheel offers to be started by, or to be loaded into, other programs."""
    parser = _parsed_entry_points(archive, name)
    return tuple(
        f"entry points {section!r:.60}: {', '.join(parser.options(section)):.200}"
        for section in parser.sections()
        if parser.options(section)
    )


def _programs(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Return the programs that pip makes from entry points."""
    parser = _parsed_entry_points(archive, name)
    programs = [
        program
        for section in ("console_scripts", "gui_scripts")
        if parser.has_section(section)
        for program in parser.options(section)
    ]
    for program in programs:
        if not _may_bring(program, name):
            raise _no(name, f"its program {program!r:.80} would take the place of another")
    return programs


def _parsed_entry_points(archive: zipfile.ZipFile, name: str) -> configparser.ConfigParser:
    place = f"{'-'.join(name.split('-')[:2])}.dist-info/entry_points.txt"
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    if place not in archive.namelist():
        return parser
    if archive.getinfo(place).file_size > MAX_ENTRY_POINTS:
        raise _no(name, f"{place!r:.100} is too large")
    try:
        parser.read_string(archive.read(place).decode("utf-8"))
    except configparser.Error as error:
        raise _no(name, f"{place!r:.100} cannot be read") from error
    return parser


class _Bytes(io.RawIOBase):
    """A seekable file over bytes that lie mapped; nothing is copied but what is read."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._place, self._touched = data, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._place + size
        block = bytes(self._data[self._place : end])
        self._place += len(block)
        self._touched += len(block)
        if self._touched > _RESIDENT:
            self._forget()
        return block

    def close(self) -> None:
        self._forget()
        super().close()

    def _forget(self) -> None:
        """Let the pages that were read go; a shared map reads them again where they are needed."""
        self._touched, owner = 0, self._data.obj
        if isinstance(owner, mmap.mmap):
            owner.madvise(mmap.MADV_DONTNEED)


def _name(name: str) -> re.Match[str]:
    found = _WHEEL_NAME.fullmatch(name)
    if found is None:
        raise _no(name, "the file name is not that of a wheel")
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _same(version: str) -> str:
    """Return a version without what a file name writes otherwise: case, `-`, leading zeros."""
    return re.sub(r"(?<![0-9a-z])0+(?=\d)", "", version.replace("-", "_").lower())


def _no(name: str, reason: str) -> RefusedError:
    return RefusedError(
        CODE, f"{name!r:.100}: {reason}", hint="build the wheelhouse again from pinned digests"
    )
