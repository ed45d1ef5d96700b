"""Where everything lies in the folder of a log, and how it is read (docs/design/audit.md, 2).

Used by the writer and by every reader. Nothing here verifies; callers get bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from airgap.audit.checkpoint import MAX_NOTE, Checkpoint, parse_checkpoint
from policy.errors import RefusedError

MAX_JOURNAL_LINE: Final = MAX_NOTE * 2
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8}\.jsonl")
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
    def anchors(self) -> Path:
        """Heads that others kept and handed back."""
        return self.log / "anchors"


def segment_count(layout: Layout) -> int:
    """Return how many segments there are.

    Raises:
        RefusedError: `audit.history`; one is missing or a name does not belong there.

    """
    folder = layout.log / "seg"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    for index, name in enumerate(names):
        if not _SEGMENT_NAME.fullmatch(name) or int(name[:8]) != index:
            raise RefusedError(
                "audit.history",
                f"expected segment {index:08d}.jsonl, found {name!r:.60}",
                hint="a segment was removed or added; keep the folder as evidence",
            )
    return len(names)


def read_lines(path: Path, limit: int = MAX_JOURNAL_LINE) -> Iterator[bytes]:
    """Yield the lines of a file with their newline; the last may lack it.

    So may a line longer than `limit`, cut there: a hostile file of one line costs no memory.
    """
    with path.open("rb", buffering=_BLOCK) as file:
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
    if len(line) > MAX_JOURNAL_LINE or not line.endswith(b"\n"):
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
    nothing can be read.
    """
    try:
        size = journal.stat().st_size
    except FileNotFoundError:
        return None
    span = MAX_JOURNAL_LINE
    while True:
        start = max(0, size - span)
        with journal.open("rb") as file:
            file.seek(start)
            block = file.read(size - start)
        end = len(block)
        while (newline := block.rfind(b"\n", 0, end)) >= 0:
            begin = block.rfind(b"\n", 0, newline) + 1
            if begin == 0 and start:
                break  # This line began before the block.
            try:
                return parse_journal_line(block[begin : newline + 1]), start + newline + 1
            except RefusedError:
                end = begin
        if start == 0:
            return None
        span *= 4


def _bad_line() -> RefusedError:
    return RefusedError("audit.note", "checkpoints.jsonl: a line is not an object with one note")
