"""Merkle trees of RFC 6962, section 2.1: roots, inclusion and consistency proofs.

Decides whether a leaf lies in a tree and whether one tree is a prefix of another. The hash is an
argument everywhere: a bundle of profile `cnsa2` uses SHA-384, the audit log always SHA-256. Proofs
are checked with the algorithms of RFC 9162, sections 2.1.3.2 and 2.1.4.2.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from policy.errors import RefusedError

_LEAF = b"\x00"
_NODE = b"\x01"


Buffer = bytes | bytearray | memoryview


class Hasher(Protocol):
    """What a hash function of `hashlib` returns."""

    def update(self, data: Buffer, /) -> None:
        """Take more bytes."""

    def digest(self) -> bytes:
        """Return the digest of all bytes so far."""


HashFunction = Callable[..., Hasher]  # a constructor such as `hashlib.sha256`


def leaf_hash(data: Buffer, h: HashFunction = hashlib.sha256) -> bytes:
    """Return the hash of one leaf; `data` is not copied."""
    hasher = h(_LEAF)
    hasher.update(data)
    return hasher.digest()


def node_hash(left: bytes, right: bytes, h: HashFunction = hashlib.sha256) -> bytes:
    """Return the hash of an inner node."""
    return h(_NODE + left + right).digest()


def empty_root(h: HashFunction = hashlib.sha256) -> bytes:
    """Return the root of the tree without leaves: the hash of no bytes."""
    return h().digest()


def root(leaves: Iterable[bytes], h: HashFunction = hashlib.sha256) -> bytes:
    """Return the root over leaf hashes, in one pass and with memory for one node a level."""
    peaks: list[tuple[int, bytes]] = []  # (level, hash), levels strictly falling
    for leaf in leaves:
        level, current = 0, leaf
        while peaks and peaks[-1][0] == level:
            current = node_hash(peaks.pop()[1], current, h)
            level += 1
        peaks.append((level, current))
    if not peaks:
        return empty_root(h)
    current = peaks.pop()[1]
    while peaks:
        current = node_hash(peaks.pop()[1], current, h)
    return current


class Tree:
    """A tree that grows at its end and keeps every complete node, about 64 bytes a leaf.

    `leaves` are leaf hashes, not data. Appending and proving cost O(log n) hashes.
    """

    def __init__(self, leaves: Iterable[bytes] = (), h: HashFunction = hashlib.sha256) -> None:
        self._h = h
        self._width = len(empty_root(h))
        self._levels: list[bytearray] = [bytearray()]
        for leaf in leaves:
            self.append(leaf)

    def __len__(self) -> int:
        return len(self._levels[0]) // self._width

    @property
    def size(self) -> int:
        """Leaves in the tree."""
        return len(self)

    def append(self, leaf: bytes) -> int:
        """Add one leaf hash and return its index; ValueError when it has the wrong length."""
        if len(leaf) != self._width:
            raise ValueError(f"a leaf hash has {self._width} bytes, not {len(leaf)}")
        index = len(self)
        current = leaf
        for level in range(len(self._levels) + 1):
            if level == len(self._levels):
                self._levels.append(bytearray())
            nodes = self._levels[level]
            nodes += current
            count = len(nodes) // self._width
            if count % 2:
                break
            current = node_hash(self._node(level, count - 2), self._node(level, count - 1), self._h)
        return index

    def leaf(self, index: int) -> bytes:
        """Return one leaf hash; IndexError outside the tree."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._node(0, index)

    def root(self, size: int | None = None) -> bytes:
        """Return the root, by default of all leaves, else of the first `size`."""
        size = len(self) if size is None else size
        if not 0 <= size <= len(self):
            raise ValueError(f"the tree has {len(self)} leaves, not {size}")
        return self._range(0, size) if size else empty_root(self._h)

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the audit path of leaf `index` in the tree of the first `size` leaves."""
        size = len(self) if size is None else size
        if not 0 <= index < size <= len(self):
            raise ValueError(f"no leaf {index} in {size} of {len(self)} leaves")
        path: list[bytes] = []
        low, high = 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low = middle
        return path[::-1]

    def consistency_proof(self, old: int, new: int | None = None) -> list[bytes]:
        """Return the proof that the tree of `old` leaves is a prefix of that of `new` leaves."""
        new = len(self) if new is None else new
        if not 0 <= old <= new <= len(self):
            raise ValueError(f"no sizes {old} and {new} in {len(self)} leaves")
        if old in {0, new}:
            return []
        path: list[bytes] = []
        low, high, whole = 0, new, True  # `whole`: the old root itself is still a node of the path
        while old != high:
            middle = low + _split(high - low)
            if old <= middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low, whole = middle, False
        if not whole:
            path.append(self._range(low, high))
        return path[::-1]

    def _node(self, level: int, index: int) -> bytes:
        start = index * self._width
        return bytes(self._levels[level][start : start + self._width])

    def _range(self, low: int, high: int) -> bytes:
        """Hash leaves `low` up to `high`; `low` is a multiple of the largest power below."""
        span = high - low
        if span & (span - 1) == 0:
            level = span.bit_length() - 1
            return self._node(level, low >> level)
        middle = low + _split(span)
        return node_hash(self._range(low, middle), self._range(middle, high), self._h)


def verify_inclusion(
    leaf: bytes,
    index: int,
    size: int,
    proof: Sequence[bytes],
    expected_root: bytes,
    *,
    h: HashFunction = hashlib.sha256,
) -> None:
    """Return if `leaf` (a leaf hash) has `index` in the tree of `size` leaves with that root.

    Raises:
        RefusedError: `merkle.proof`; numbers out of range, wrong length, or another root.

    """
    if not 0 <= index < size:
        raise _bad(f"leaf {index} cannot lie in {size} leaves")
    current = leaf
    for sibling, on_left in _climb(index, size - 1, proof):
        current = node_hash(sibling, current, h) if on_left else node_hash(current, sibling, h)
    _require_same(current, expected_root)


def verify_consistency(
    old_size: int,
    new_size: int,
    old_root: bytes,
    new_root: bytes,
    proof: Sequence[bytes],
    *,
    h: HashFunction = hashlib.sha256,
) -> None:
    """Return if the tree of `old_size` leaves is a prefix of that of `new_size` leaves.

    Raises:
        RefusedError: `merkle.proof`; sizes out of order, wrong length, or another root.

    """
    if not 0 <= old_size <= new_size:
        raise _bad(f"sizes {old_size} and {new_size} are out of order")
    if old_size in {0, new_size}:
        if proof:
            raise _bad("a trivial consistency proof is empty")
        _require_same(old_root, empty_root(h) if old_size == 0 else new_root)
        return
    # A whole power of two is a node of the new tree: its root is known and not in the proof.
    steps = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not steps:
        raise _bad("the proof is too short")
    position, last = old_size - 1, new_size - 1
    while position % 2:
        position, last = position >> 1, last >> 1
    old = new = steps[0]
    for sibling, on_left in _climb(position, last, steps[1:]):
        if on_left:
            old, new = node_hash(sibling, old, h), node_hash(sibling, new, h)
        else:
            new = node_hash(new, sibling, h)
    _require_same(old, old_root)
    _require_same(new, new_root)


def _climb(position: int, last: int, proof: Sequence[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each sibling and whether it stands on the left, from a node up to the root.

    `position` is the node's place in its level and `last` that of the level's last node.
    """
    for sibling in proof:
        if last == 0:
            raise _bad("the proof is too long")
        on_left = bool(position % 2) or position == last
        yield sibling, on_left
        if on_left:
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        position, last = position >> 1, last >> 1
    if last:
        raise _bad("the proof is too short")


def _split(span: int) -> int:
    """Return the largest power of two below `span`, which is 2 or more."""
    return 1 << ((span - 1).bit_length() - 1)


def _require_same(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise _bad(f"expected root {expected.hex():.96}, the proof leads to {found.hex()}")


def _bad(message: str) -> RefusedError:
    return RefusedError("merkle.proof", message)
