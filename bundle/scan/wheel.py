"""A wheel, looked into without installing it: no hook at start-up, and RECORD tells all.

Decides whether a wheel holds exactly the files of its own RECORD, with those digests, nothing that
Python runs by itself (`.pth`), no native code that its tag does not declare, and no known telemetry
client. Native libraries and entry points are findings. Obeys docs/design/bundle.md, 5.
"""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import io
import re
import stat
import zipfile
import zlib

from policy.errors import RefusedError

CODE = "scan.wheel"
MAX_MEMBERS = 50_000
MAX_UNPACKED = 4 * 1024**3  # bytes
MAX_RATIO = 200
MAX_HOLLOW = 16 * 1024**2  # bytes; libraries that were patched hold megabytes of zeros
MAX_RECORD = 16 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.]+-[A-Za-z0-9_.!+]+(-\d\w*)?-[\w.]+-[\w.]+-[\w.]+\.whl")
_BLOCK = 1 << 20
MAX_ENTRY_POINTS = 1 << 20
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
# Into the environment beside site-packages: its interpreter, its programs, its libraries.
_TAKES_PLACE = re.compile(
    r"^[^/]+\.data/(data/(bin|lib|lib64|pyvenv\.cfg)(/|$)|scripts/(python|pip|airgap|activate)[^/]*$)",
    re.IGNORECASE,
)
_STARTERS = re.compile(r"python|activate", re.IGNORECASE)
_COLUMNS = 3  # of RECORD: path, digest, size


def check_wheel(data: memoryview, name: str) -> tuple[str, ...]:
    """Refuse a wheel that is not exactly what its RECORD says, and return findings.

    Raises:
        RefusedError: `scan.wheel`.

    """
    if not _NAME.fullmatch(name):
        raise _no(name, "the file name is not that of a wheel")
    try:
        with zipfile.ZipFile(_Bytes(data)) as archive:
            _check_members(archive, name)
            _check_record(archive, name)
            return (*_native(archive), *_entry_points(archive, name))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        raise _no(name, f"it cannot be read: {error!s:.120}") from error
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or an unknown compression
        raise _no(name, f"it cannot be read: {error!s:.120}") from error


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
        if path.startswith("/") or "\\" in path or ".." in path.split("/") or ":" in path:
            raise _no(name, f"it holds the path {path!r:.80}")
        if path.lower().endswith((".pth", ".egg-link")) or path.lower().endswith(
            ("sitecustomize.py", "usercustomize.py")
        ):
            raise _no(name, f"{path!r:.80} would run whenever Python starts")
        if pure and _NATIVE.search(path) and not _LAUNCHER.fullmatch(path):
            raise _no(name, f"its tag says pure Python, but {path!r:.80} is native code")
        if _TAKES_PLACE.search(path):
            raise _no(name, f"{path!r:.80} would take the place of what the environment runs")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise _no(name, f"{path!r:.80} is a link")
        dense = MAX_RATIO * max(member.compress_size, MAX_HOLLOW // MAX_RATIO)
        if member.file_size > dense or total > MAX_UNPACKED:
            raise _no(name, f"{path!r:.80} unpacks to far more than it holds")


def _check_record(archive: zipfile.ZipFile, name: str) -> None:
    stem = "-".join(name.split("-")[:2])
    place = f"{stem}.dist-info/RECORD"
    files = {member.filename for member in archive.infolist() if not member.is_dir()}
    if place not in files or archive.getinfo(place).file_size > MAX_RECORD:
        raise _no(name, f"{place!r:.100} is missing or too large")
    rows = list(csv.reader(io.StringIO(archive.read(place).decode("utf-8"))))
    listed = {row[0]: row[1] for row in rows if len(row) == _COLUMNS}
    unsigned = {place, f"{place}.jws", f"{place}.p7s"}
    if len(listed) != len(rows) or set(listed) | (unsigned & files) != files:
        odd = sorted(files ^ set(listed))[:1]
        raise _no(name, f"RECORD and the files differ: {odd!r:.100}")
    for path in sorted(files - unsigned):
        digest, tail = hashlib.sha256(), b""
        with archive.open(path) as member:
            while block := member.read(_BLOCK):
                digest.update(block)
                _require_silent(tail + block, path, name)
                tail = block[-_OVERLAP:]
        found = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
        if listed[path] != f"sha256={found}":
            raise _no(name, f"{path!r:.80} is not the file that RECORD names")


def _require_silent(block: bytes, path: str, name: str) -> None:
    """Refuse the strings of telemetry clients that are on by default."""
    for mark in _TELEMETRY:
        if mark in block:
            raise _no(name, f"{path!r:.80} holds a telemetry client ({mark.decode()})")


def _native(archive: zipfile.ZipFile) -> tuple[str, ...]:
    found = sorted(path for path in archive.namelist() if _NATIVE.search(path))
    names = ", ".join(path.rpartition("/")[2] for path in found)
    return (f"{len(found)} native libraries: {names:.400}",) if found else ()


def _entry_points(archive: zipfile.ZipFile, name: str) -> tuple[str, ...]:
    """List what the wheel offers to be started by, or to be loaded into, other programs."""
    place = f"{'-'.join(name.split('-')[:2])}.dist-info/entry_points.txt"
    if place not in archive.namelist():
        return ()
    if archive.getinfo(place).file_size > MAX_ENTRY_POINTS:
        raise _no(name, f"{place!r:.100} is too large")
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=True)
    try:
        parser.read_string(archive.read(place).decode("utf-8"))
    except configparser.Error as error:
        raise _no(name, f"{place!r:.100} cannot be read") from error
    for section in {"console_scripts", "gui_scripts"} & set(parser.sections()):
        for program in parser.options(section):
            if _STARTERS.match(program) or "/" in program:
                raise _no(name, f"its program {program!r:.80} would take the place of another")
    return tuple(
        f"entry points {section!r:.60}: {', '.join(parser.options(section)):.200}"
        for section in parser.sections()
    )


class _Bytes(io.RawIOBase):
    """A seekable file over bytes that lie mapped; nothing is copied but what is read."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._place = data, 0

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
        return block


def _no(name: str, reason: str) -> RefusedError:
    return RefusedError(
        CODE, f"{name!r:.100}: {reason}", hint="build the wheelhouse again from pinned digests"
    )
