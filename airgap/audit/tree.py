"""The tree of a log as it lies on disk: any node, and so any proof (docs/design/audit.md, 6).

Nodes come from full tiles where they are, else from the lines. Nothing is believed: whoever hands a
proof out checks it against a signed head first.
"""

from __future__ import annotations

import hashlib
import itertools
from functools import lru_cache
from typing import Final

from airgap.audit.checkpoint import Checkpoint, Head
from airgap.audit.disk import open_plain
from airgap.audit.layout import Layout, read_lines
from airgap.audit.receipt import Receipt, verify_path
from airgap.audit.tiles import (
    HEIGHT,
    SEGMENT,
    WIDTH,
    Node,
    consistency_path,
    inclusion_path,
    tile_name,
    whole_root,
)
from bundle.merkle import node_hash, verify_consistency
from policy.errors import RefusedError

_CACHE: Final = 4_096
_HASH: Final = 32


class StoredTree:
    """Reads nodes of the log in `layout`; complete subtrees only, as proofs ask for them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._node = lru_cache(maxsize=_CACHE)(self._find)
        self._row = lru_cache(maxsize=64)(self._read_row)
        self._tail = lru_cache(maxsize=8)(self._hash_tail)

    def node(self, node: Node) -> bytes:
        """Return the hash of a complete subtree; RefusedError `audit.history` if leaves lack."""
        return self._node(node)

    def root(self, size: int) -> bytes:
        """Return the root of the first `size` records."""
        return whole_root(size, self.node)

    def receipt(self, seq: int, head: Checkpoint | Head) -> Receipt:
        """Return the proof that record `seq` lies under `head`.

        Raises:
            RefusedError: `audit.absent`, the head does not cover it; `audit.proof`, the log on disk
                is not the one that was signed.

        """
        if not 0 <= seq < head.size:
            raise RefusedError(
                "audit.absent", f"no record {seq} under a head of {head.size} records"
            )
        path = inclusion_path(seq, head.size, self.node)
        receipt = Receipt(seq, head.size, self.node((0, seq)), path, head.note)
        verify_path(receipt, head)
        return receipt

    def consistency(self, old: int, head: Checkpoint | Head) -> tuple[bytes, ...]:
        """Return the proof that the first `old` records are a beginning of those under `head`.

        Raises:
            RefusedError: `audit.absent`, `old` is larger; `merkle.proof`, the log on disk is not
                the one that was signed.

        """
        if not 0 <= old <= head.size:
            raise RefusedError("audit.absent", f"a head of {head.size} records is older than {old}")
        path = consistency_path(old, head.size, self.node)
        verify_consistency(old, head.size, self.root(old), head.root, path)
        return path

    def _find(self, node: Node) -> bytes:
        level, index = node
        if level % HEIGHT == 0:
            row = self._row(level // HEIGHT, index // WIDTH)
            if row:
                at = index % WIDTH * _HASH
                return row[at : at + _HASH]
        if level == 0:
            return self._leaf(index)
        return node_hash(self.node((level - 1, 2 * index)), self.node((level - 1, 2 * index + 1)))

    def _read_row(self, level: int, index: int) -> bytes:
        """Return a full tile; for leaves of a tile that is not full, their hashes; else nothing."""
        try:
            with open_plain(self._layout.tiles / tile_name(level, index)) as file:
                content = file.read(_HASH * WIDTH + 1)
        except OSError:
            content = b""
        return content if len(content) == _HASH * WIDTH else b""

    def _leaf(self, index: int) -> bytes:
        leaves = self._tail(index // WIDTH)
        if index % WIDTH >= len(leaves):
            raise RefusedError("audit.history", f"record {index} is not there")
        return leaves[index % WIDTH]

    def _hash_tail(self, tile: int) -> list[bytes]:
        """Hash the lines that belong to a tile which is not, or not yet, on disk."""
        start = tile * WIDTH
        path = self._layout.segment(start // SEGMENT)
        if not path.is_file():
            return []
        at = start % SEGMENT
        return [
            hashlib.sha256(b"\0" + line[:-1]).digest()
            for line in itertools.islice(read_lines(path), at, at + WIDTH)
            if line.endswith(b"\n")
        ]
