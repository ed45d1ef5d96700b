"""Reading bytes and JSON without surprises; every parser of this package starts here.

A parser takes a `memoryview` (a mapped file, or a member of an archive that lies mapped) and
returns a typed summary or raises `RefusedError` with its own code. It never follows a path by
itself.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Any

from bundle import canonical
from policy.errors import FaultError, RefusedError

MAX_DEPTH = 64
MAX_DIGITS = 24  # of a number in JSON text: sizes and ids; a longer one is an attack on the reader
MAPPED_FROM = 1 << 20  # bytes; smaller files are read whole


def open_view(path: Path) -> memoryview:
    """Return the bytes of a regular file without following a link in its last component.

    Raises:
        FaultError: `host.io`.
        RefusedError: `scan.role`; not a regular file.

    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise RefusedError("scan.role", f"{path.name!r:.80} is a symbolic link") from error
        raise FaultError("host.io", f"cannot read {str(path)!r:.200}: {error.strerror}") from error
    with open(number, "rb") as file:  # noqa: PTH123 - the descriptor is what was checked
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError("scan.role", f"{path.name!r:.80} is not a regular file")
        if found.st_size < MAPPED_FROM:
            return memoryview(file.read())
        return memoryview(mmap.mmap(number, 0, prot=mmap.PROT_READ))


def parse_json(data: memoryview, *, code: str, what: str, limit: int) -> Any:
    """Return the JSON value in `data`; floats are allowed, everything ambiguous is not.

    Args:
        data: Untrusted.
        code: Of the refusal.
        what: Names the document in the message.
        limit: In bytes.

    Raises:
        RefusedError: `code`; too long, not UTF-8, not JSON, a key twice, NaN, or too deep.

    """
    return canonical.parse_json(
        data,
        code=code,
        what=what,
        limit=limit,
        depth=MAX_DEPTH,
        integer=_integer,
        fraction=_float,
    )


def parse_object(data: memoryview, *, code: str, what: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in `data`; refusals as in `parse_json`."""
    value = parse_json(data, code=code, what=what, limit=limit)
    if not isinstance(value, dict):
        raise RefusedError(code, f"{what} is JSON but not an object")
    return value


def parse_text(data: memoryview, *, code: str, what: str, limit: int) -> str:
    """Return UTF-8 text without control characters other than tab and line ends."""
    if len(data) > limit:
        raise RefusedError(code, f"{what} has {len(data):,} bytes; at most {limit:,} are read")
    try:
        text = bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(code, f"{what} is not UTF-8 text (byte {error.start})") from error
    for place, character in enumerate(text):
        if character < " " and character not in "\t\n\r\f":
            raise RefusedError(code, f"{what} holds the control character {character!r} at {place}")
    return text


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= 2 * MAX_DIGITS else float("inf")
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r:.40} is not a finite number")
    return value
