"""Where everything lies in the folder of a log, and how it is read (docs/design/audit.md, 2).

Used by the writer and by every reader. Nothing here verifies; callers get bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from airgap.audit.checkpoint import MAX_NOTE, Checkpoint, parse_checkpoint
from airgap.audit.disk import open_plain
from airgap.audit.tiles import SEGMENT, WIDTH, tile_name
from policy.errors import RefusedError

MAX_JOURNAL_LINE: Final = MAX_NOTE * 2
_MIN_JOURNAL_LINE: Final = 64  # less holds no root; millions of such lines end soon
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8}\.jsonl")
_SEQ: Final = re.compile(rb'"seq":([0-9]{1,16}),')
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one log. `name` is `log`, or `log.new` until its first head is durable."""

    folder: Path
    name: str = "log"

    @property
    def log(self) -> Path:
        """What is evidence and what derives from it."""
        return self.folder / self.name

    @property
    def lock(self) -> Path:
        """Who writes, and how the last writer ended."""
        return self.folder / ".lock"

    @property
    def torn(self) -> Path:
        """Quarantined tails."""
        return self.folder / "torn"

    @property
    def reserve(self) -> Path:
        """Blocks kept for recovery on a full disk."""
        return self.folder / "reserve"

    @property
    def verified(self) -> Path:
        """When this host last verified the whole log; no evidence."""
        return self.folder / "verified.json"

    @property
    def exported(self) -> Path:
        """When this host last exported, and how far; no evidence."""
        return self.folder / "exported.json"

    @property
    def manifest(self) -> Path:
        """What makes the folder an export."""
        return self.folder / "manifest.json"

    def segment(self, index: int) -> Path:
        """One file of records."""
        return self.log / "seg" / f"{index:08d}.jsonl"

    def frontier(self, index: int) -> Path:
        """The tree at the end of that segment."""
        return self.log / "frontier" / f"{index:08d}.json"

    def object(self, digest_hex: str) -> Path:
        """A decision record or other cited object, by its SHA-256."""
        return self.log / "objects" / digest_hex[:2] / digest_hex

    @property
    def tiles(self) -> Path:
        """C2SP tiles."""
        return self.log / "tile"

    @property
    def checkpoint(self) -> Path:
        """The current signed note."""
        return self.log / "checkpoint"

    @property
    def journal(self) -> Path:
        """Every signed head."""
        return self.log / "checkpoints.jsonl"

    @property
    def kept(self) -> Path:
        """Lines of pruned segments that verification still needs: key changes and prunings."""
        return self.log / "kept.jsonl"

    @property
    def sealed(self) -> Path:
        """Encrypted payloads."""
        return self.log / "sealed"

    def payload(self, digest_hex: str) -> Path:
        """One encrypted payload, by its SHA-256."""
        return self.sealed / digest_hex[:2] / digest_hex

    @property
    def policy(self) -> Path:
        """The trust policy of this site, for its own status; no verifier believes it."""
        return self.log / "policy.tlog"

    @property
    def anchors(self) -> Path:
        """Heads that others kept and handed back."""
        return self.log / "anchors"


def segment_range(layout: Layout) -> range:
    """Return the indices of the segments that are there; it begins later where a log was pruned.

    Whether the missing beginning was pruned or stolen is for the caller to find out.

    Raises:
        RefusedError: `audit.history`; one is missing or a name does not belong there.

    """
    folder = layout.log / "seg"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    first = int(names[0][:8]) if names and _SEGMENT_NAME.fullmatch(names[0]) else 0
    for index, name in enumerate(names, first):
        if not _SEGMENT_NAME.fullmatch(name) or int(name[:8]) != index:
            raise RefusedError(
                "audit.history",
                f"expected segment {index:08d}.jsonl, found {name!r:.60}",
                hint="a segment was removed or added; keep the folder as evidence",
            )
    return range(first, first + len(names))


def segment_count(layout: Layout) -> int:
    """Return how many segments the log has had, those included that were pruned."""
    return segment_range(layout).stop


def read_kept(layout: Layout) -> dict[int, bytes]:
    """Return the lines that outlive a pruning, by the number on them; nothing here is verified."""
    found = {}
    if layout.kept.is_file():
        for raw in read_lines(layout.kept):
            number = _SEQ.search(raw)
            if number is not None and raw.endswith(b"\n"):
                found[int(number[1])] = raw[:-1]
    return found


def pruned_leaves(layout: Layout, index: int) -> Iterator[bytes]:
    """Yield the leaf hashes of a segment from its level-0 tiles.

    Raises:
        OSError: A tile is missing.
        RefusedError: `audit.history`; a tile has another length.

    """
    for number in range(index * (SEGMENT // WIDTH), (index + 1) * (SEGMENT // WIDTH)):
        with open_plain(layout.tiles / tile_name(0, number)) as file:
            content = file.read(32 * WIDTH + 1)
        if len(content) != 32 * WIDTH:
            raise RefusedError("audit.history", f"tile {tile_name(0, number)} is not whole")
        yield from (content[at : at + 32] for at in range(0, len(content), 32))


def read_lines(path: Path, limit: int = MAX_JOURNAL_LINE) -> Iterator[bytes]:
    """Yield the lines of a file with their newline; the last may lack it.

    So may a line longer than `limit`, cut there: a hostile file of one line costs no memory.
    """
    with open_plain(path, buffering=_BLOCK) as file:
        while line := file.readline(limit):
            yield line


def journal_line(note: str) -> bytes:
    """Return a line of `checkpoints.jsonl` with its newline, in ASCII."""
    return json.dumps({"note": note}).encode() + b"\n"


def parse_journal_line(line: bytes) -> Checkpoint:
    """Return the checkpoint on a whole line of the journal, newline included.

    Raises:
        RefusedError: `audit.note`.

    """
    if not _MIN_JOURNAL_LINE < len(line) <= MAX_JOURNAL_LINE or not line.endswith(b"\n"):
        raise _bad_line()
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad_line() from None
    if not isinstance(entry, dict) or set(entry) != {"note"} or not isinstance(entry["note"], str):
        raise _bad_line()
    try:
        note = entry["note"].encode()
    except UnicodeEncodeError:
        raise _bad_line() from None
    return parse_checkpoint(note)


def last_checkpoint(journal: Path) -> tuple[Checkpoint, int] | None:
    """Return the last readable checkpoint of the journal and the offset where its line ends.

    What follows that offset is debris of a crash: heads are not fsynced one by one. None when
    nothing can be read. Reads backwards, one block at a time.
    """
    try:
        file = open_plain(journal)
    except FileNotFoundError:
        return None
    with file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start)
            found, first = _last_line(block, whole=start == 0)
            if found is not None:
                return found[0], start + found[1]
            end = start + first  # the line that began before the block, or what lies before
    return None


def _last_line(block: bytes, *, whole: bool) -> tuple[tuple[Checkpoint, int] | None, int]:
    """Return the last readable line and its end; else where lines end that are still to be read.

    `whole` says that a line begins at the first byte.
    """
    end = len(block)
    while (newline := block.rfind(b"\n", 0, end)) >= 0:
        begin = block.rfind(b"\n", 0, newline) + 1
        if begin == 0 and not whole:
            # A line as long as the block is none of ours; else it is read with what precedes it.
            return None, 0 if newline >= MAX_JOURNAL_LINE else newline + 1
        try:
            return (parse_journal_line(block[begin : newline + 1]), newline + 1), 0
        except RefusedError:
            end = begin
    return None, 0


def _bad_line() -> RefusedError:
    return RefusedError("audit.note", "checkpoints.jsonl: a line is not an object with one note")
