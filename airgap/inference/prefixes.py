"""Keys and values of prompts that were run, for later prompts of the same request set.

A request set is the requests of one person (docs/design/inference.md, 5): its name is drawn by the
broker, means nothing here, and no entry is ever found under another one. A prompt runs in pieces of
`PIECE` ids, so whole pieces of a common beginning have the same bits as if they were run again; a
shorter beginning is not reused, since another shape of a piece may add up in another order. What
the head gave for the last id is kept too: the same prompt under the same settings runs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from airgap.inference.fast import PIECE, Found, Head, Slots


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What one prompt left: its ids, their keys and values, and what its last id was followed by.

    Attributes:
        head: What was asked of the last id, and `found` what came of it.

    """

    ids: tuple[int, ...]
    slots: Slots
    head: Head
    found: Found


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    prefix: Prefix
    size: int


class Prefixes:
    """Least recently used entries go first; the owner says how many bytes may be kept."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], _Entry] = OrderedDict()
        self.size = 0  # bytes

    def find(self, request_set: str, ids: list[int]) -> tuple[Prefix, int] | None:
        """Return the prefix that shares the most of `ids`, and how many positions they share.

        The number is that of all ids, or a multiple of `PIECE`. The very ids come before others
        that share as many: what their head gave may do.
        """
        same = request_set, tuple(ids)
        key, most = (same, len(ids)) if same in self._entries else (None, 0)
        for (owner, held), entry in self._entries.items():
            shared = _shared(entry.prefix.ids, ids) if request_set and owner == request_set else 0
            if shared > most:
                key, most = (owner, held), shared
        if key is None:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].prefix, most

    def keep(self, request_set: str, prefix: Prefix, *, size: int, room: int) -> None:
        """Keep a prefix if `size` bytes fit into `room`; it replaces that of the same ids."""
        if not request_set:
            return
        key = request_set, prefix.ids
        old = self._entries.pop(key, None)
        self.size -= old.size if old is not None else 0
        if size <= room:
            self.shrink(room - size)
            self._entries[key] = _Entry(prefix, size)
            self.size += size

    def shrink(self, room: int) -> None:
        """Let go of entries until at most `room` bytes are kept."""
        while self._entries and self.size > room:
            _, entry = self._entries.popitem(last=False)
            self.size -= entry.size

    def forget(self, request_set: str) -> int:
        """Let go of all that a request set left; returns how many entries that were."""
        gone = [key for key in self._entries if key[0] == request_set]
        for key in gone:
            self.size -= self._entries.pop(key).size
        return len(gone)


def _shared(ours: tuple[int, ...], theirs: list[int]) -> int:
    """Return how many ids of a common beginning may be taken over."""
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count if count == len(theirs) == len(ours) else count - count % PIECE
