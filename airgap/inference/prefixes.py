"""Keys and values of prompts that were run, for later prompts of the same request set.

A request set is the requests of one person (docs/design/inference.md, 5): its name is drawn by the
broker, means nothing here, and no entry is ever found under another one. A prompt runs in pieces of
`PIECE` ids, so whole pieces of a common beginning have the same bits as if they were run again; a
shorter beginning is not reused, since another shape of a piece may add up in another order.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from airgap.inference.fast import PIECE, Slots


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What one prompt left: its ids, their keys and values, and how many bytes that takes."""

    ids: tuple[int, ...]
    slots: Slots
    size: int


class Prefixes:
    """Least recently used entries go first; the owner says how many bytes may be kept."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], _Entry] = OrderedDict()
        self.size = 0  # bytes

    def find(self, request_set: str, ids: list[int]) -> tuple[Slots, int] | None:
        """Return the buffers that share the most of `ids`, and how many positions they share.

        The number is that of all ids, or a multiple of `PIECE`.
        """
        key, most = None, 0
        for (owner, held), entry in self._entries.items():
            shared = _shared(entry.ids, ids) if owner == request_set else 0
            if shared > most:
                key, most = (owner, held), shared
        if key is None:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].slots, most

    def keep(self, request_set: str, ids: list[int], slots: Slots, *, size: int, room: int) -> None:
        """Keep the buffers of `ids` if `size` bytes fit into `room`; older entries make place."""
        key = request_set, tuple(ids)
        if not request_set or not ids or size > room or key in self._entries:
            return
        self.shrink(room - size)
        self._entries[key] = _Entry(key[1], slots, size)
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
