"""The growing edge of the tree, and the C2SP tiles derived from it (docs/design/audit.md, 2).

The hashes are those of `bundle.merkle`; here is only what a log of millions of leaves needs beside
it: memory for one node a level, proofs for the newest leaves, and files of 256 hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bundle.merkle import empty_root
from bundle.merkle import root as merkle_root

WIDTH: Final = 256  # hashes in a full tile
HEIGHT: Final = 8  # levels of the tree that one level of tiles spans
SEGMENT: Final = 65_536  # records in a segment, a power of WIDTH

# Level, index in groups of three digits, and the width of a partial one.
_TILE: Final = re.compile(r"(0|[1-9]\d?)/((?:x\d{3}/){0,20}\d{3})(?:\.p/([1-9]\d{0,2}))?")

Node = tuple[int, int]  # (level above the leaves, index within the level)


class Edge:
    """The right edge of an RFC 6962 tree over SHA-256: enough to append and to give the root."""

    __slots__ = ("peaks", "size")

    def __init__(self) -> None:
        self.size = 0
        self.peaks: list[bytes] = []  # roots of the complete subtrees, widest first

    @classmethod
    def of_segments(cls, roots: Sequence[bytes]) -> Edge:
        """Return the edge at a segment's end, from the roots of all segments so far."""
        edge = cls()
        for root in roots:
            edge.append(root)
        edge.size *= SEGMENT
        return edge

    def copy(self) -> Edge:
        """Return an independent copy."""
        twin = Edge()
        twin.size, twin.peaks = self.size, self.peaks.copy()
        return twin

    def append(self, leaf: bytes, made: dict[Node, bytes] | None = None) -> None:
        """Add one leaf hash; every node completed by it is added to `made`."""
        peaks, count, level = self.peaks, self.size, 0
        if made is not None:
            made[0, count] = leaf
        self.size += 1
        while count & 1:
            leaf = hashlib.sha256(b"\x01" + peaks.pop() + leaf).digest()
            count >>= 1
            level += 1
            if made is not None:
                made[level, count] = leaf
        peaks.append(leaf)

    def append_tile(self, leaves: list[bytes], made: dict[Node, bytes]) -> None:
        """Add the leaves of one whole tile, at a multiple of its width.

        Of the nodes that this completes, those from the tile's own root upwards come into `made`.
        """
        sha256, row = hashlib.sha256, leaves
        while len(row) > 1:
            row = [sha256(b"\x01" + row[i] + row[i + 1]).digest() for i in range(0, len(row), 2)]
        node, level, count = row[0], HEIGHT, self.size // WIDTH
        self.size += WIDTH
        made[level, count] = node
        while count & 1:
            node = sha256(b"\x01" + self.peaks.pop() + node).digest()
            count >>= 1
            level += 1
            made[level, count] = node
        self.peaks.append(node)

    def root(self) -> bytes:
        """Return the root of all leaves so far."""
        if not self.peaks:
            return empty_root()
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = hashlib.sha256(b"\x01" + peak + root).digest()
        return root

    def nodes(self) -> dict[Node, bytes]:
        """Return the peaks as nodes."""
        found: dict[Node, bytes] = {}
        start = 0
        levels = [n for n in range(self.size.bit_length() - 1, -1, -1) if self.size >> n & 1]
        for level, peak in zip(levels, self.peaks, strict=True):
            found[level, start >> level] = peak
            start += 1 << level
        return found


def inclusion_path(index: int, size: int, node: Callable[[Node], bytes]) -> tuple[bytes, ...]:
    """Return the audit path of RFC 6962, section 2.1.1, from complete nodes.

    For a leaf that is newer than some edge, the peaks of that edge and the nodes made since then
    are all that is asked for.
    """
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            path.append(_cover(middle, high, node))
            high = middle
        else:
            path.append(_cover(low, middle, node))
            low = middle
    return tuple(reversed(path))


def consistency_path(old: int, new: int, node: Callable[[Node], bytes]) -> tuple[bytes, ...]:
    """Return the consistency proof of RFC 6962, section 2.1.2, from complete nodes."""
    if old in {0, new}:
        return ()
    path: list[bytes] = []
    low, high, whole = 0, new, True  # `whole`: the old root itself is still a node of the path
    while old != high:
        middle = low + _split(high - low)
        if old <= middle:
            path.append(_cover(middle, high, node))
            high = middle
        else:
            path.append(_cover(low, middle, node))
            low, whole = middle, False
    if not whole:
        path.append(_cover(low, high, node))
    return tuple(reversed(path))


def whole_root(size: int, node: Callable[[Node], bytes]) -> bytes:
    """Return the root of the first `size` leaves from complete nodes."""
    return _cover(0, size, node) if size else empty_root()


def tile_name(level: int, index: int, width: int = WIDTH) -> str:
    """Return the path below `tile/` of a full or partial tile, as tlog-tiles spells it."""
    groups = [f"{index % 1000:03d}"]
    while index >= 1000:  # noqa: PLR2004 - three digits a group
        index //= 1000
        groups.append(f"x{index % 1000:03d}")
    name = "/".join(reversed(groups))
    return f"{level}/{name}" + ("" if width == WIDTH else f".p/{width}")


def is_tile_of(name: str, size: int) -> bool:
    """Tell whether a path below `tile/` is that of a tile of a tree of this size.

    The size is what somebody claims, so nothing is counted up to it.
    """
    found = _TILE.fullmatch(name)
    if found is None:
        return False
    level, index = int(found[1]), int(found[2].replace("/", "").replace("x", ""))
    width = int(found[3] or WIDTH)
    whole, rest = divmod(size >> (HEIGHT * level), WIDTH)
    there = index < whole if width == WIDTH else (index, width) == (whole, rest)
    return there and name == tile_name(level, index, width)


class Tiles:
    """Rows of hashes that wait to fill a tile, one row for each level of tiles."""

    def __init__(self, put: Callable[[str, bytes], None]) -> None:
        """`put` writes one tile by its name."""
        self.put = put
        self._rows: list[tuple[int, list[bytes]]] = []  # (index of the tile, its hashes so far)

    def add(self, made: dict[Node, bytes]) -> None:
        """Take the nodes that a batch completed and write each tile that is full."""
        for (level, _), value in made.items():
            if level % HEIGHT == 0:
                self._push(level // HEIGHT, value)

    def add_tile(self, leaves: list[bytes], made: dict[Node, bytes]) -> None:
        """Take one whole tile of leaves and the nodes that it completed."""
        if not self._rows:
            self._rows.append((0, []))
        index, row = self._rows[0]
        if row:
            raise ValueError("a whole tile follows only whole tiles")
        self.put(tile_name(0, index), b"".join(leaves))
        self._rows[0] = (index + 1, [])
        self.add(made)

    def start(self, segments: Sequence[bytes]) -> None:
        """Stand at a segment's end; `segments` are the roots of all segments before it."""
        count = len(segments)
        self._rows = [(count * SEGMENT // WIDTH, []), (count * SEGMENT // WIDTH**2, [])]
        row = list(segments)
        while row:
            whole = len(row) // WIDTH
            self._rows.append((whole, row[whole * WIDTH :]))
            row = [merkle_root(row[i * WIDTH : (i + 1) * WIDTH]) for i in range(whole)]

    def partial(self) -> list[tuple[str, bytes]]:
        """Return the tiles that are not full, by name."""
        return [
            (tile_name(level, index, len(row)), b"".join(row))
            for level, (index, row) in enumerate(self._rows)
            if row
        ]

    def _push(self, level: int, value: bytes) -> None:
        if level == len(self._rows):
            self._rows.append((0, []))
        index, row = self._rows[level]
        row.append(value)
        if len(row) == WIDTH:
            self.put(tile_name(level, index), b"".join(row))
            self._rows[level] = (index + 1, [])


def remove_partial(folder: Path) -> None:
    """Delete all partial tiles below `folder`: those of a newer head are about to be written."""
    for path in folder.glob("*/**/*.p/*"):
        path.unlink(missing_ok=True)
    for path in folder.glob("*/**/*.p"):
        path.rmdir()


def _cover(low: int, high: int, node: Callable[[Node], bytes]) -> bytes:
    """Return the hash over leaves `low` up to `high`, which begins at a multiple of its width."""
    span = high - low
    if span & (span - 1) == 0:
        level = span.bit_length() - 1
        return node((level, low >> level))
    middle = low + _split(span)
    left, right = _cover(low, middle, node), _cover(middle, high, node)
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(span: int) -> int:
    """Return the largest power of two below `span`, which is 2 or more."""
    return 1 << ((span - 1).bit_length() - 1)
