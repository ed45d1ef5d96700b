"""One pass over all records of a log (docs/design/audit.md, 9): lines, chain, tree, tiles, pairs.

The pass judges everything that needs no key, and collects what the keys are held against
afterwards: roots at the sizes that heads and anchors name, leaves that receipts name, changes of
the log's key, and who claims to have signed the heads of the journal.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from airgap.audit.disk import open_plain
from airgap.audit.epochs import Rotation, find_rotation
from airgap.audit.findings import NOTE, TAMPERED, UNKNOWN, Findings
from airgap.audit.grammar import Line, read_line
from airgap.audit.layout import Layout, pruned_leaves, read_kept, read_lines, segment_range
from airgap.audit.order import Part, next_part
from airgap.audit.previous import NAMES_ONE, Previous, find_previous
from airgap.audit.record import FIRST_PREV, MAX_LINE, Record
from airgap.audit.tiles import SEGMENT, WIDTH, Edge, Node, Tiles
from policy.errors import RefusedError

# The writer beats every 1,000 records and every 60 s; one batch may come in between.
HEARTBEAT_GAP_RECORDS: Final = 2_048
HEARTBEAT_GAP_NS: Final = 180 * 10**9
SIGNER_PREFIX: Final = 5  # characters of base64 that the four bytes of a key id determine
_CHUNK: Final = 1_024
_JOURNAL_SIZE: Final = re.compile(rb'\{"note": "[^"\\]{1,200}\\n([0-9]{1,16})\\n')
# A whole line of the journal in its one spelling; canonical base64 has no other last characters.
_JOURNAL_LINE: Final = re.compile(
    rb'\{"note": "[^" ]{1,1200}\\n[0-9]{1,16}\\n[A-Za-z0-9+/]{43}=\\n\\n'
    rb'(?:\\u2014 [^" ]{1,1200} (?:[A-Za-z0-9+/]{4})+'
    rb'(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?\\n){1,24}"\}\n'
)
_JOURNAL: Final = "log/checkpoints.jsonl"
_NEVER: Final = 1 << 62

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(slots=True)
class Collected:
    """What the pass learned, for the checks that come after it."""

    first: int = 0  # the first record whose line is there
    size: int = 0  # records read, or known by their hash
    roots: dict[int, bytes] = field(default_factory=dict)  # at the sizes that were asked for
    leaves: dict[int, bytes] = field(default_factory=dict)  # at the places that were asked for
    rotations: list[Rotation] = field(default_factory=list)
    closing: dict[int, bytes] = field(default_factory=dict)  # size -> line of the head journal
    signers: dict[tuple[int, bytes], int] = field(default_factory=dict)  # (epoch, id) -> size
    prunings: list[Record] = field(default_factory=list)  # intents
    purged: set[bytes] = field(default_factory=set)
    sealed: dict[bytes, int] = field(default_factory=dict)  # digest -> first record that names it
    previous: Previous | None = None  # the log that this one continues under another name
    beginning: Record = field(default_factory=dict)  # the first record of such a log


@dataclass(frozen=True, slots=True)
class Question:
    """What the pass must know of the heads and anchors beforehand."""

    origin: str
    signed: int  # size of the newest head
    journal_end: int  # offset where the readable part of the head journal ends
    sizes: frozenset[int]
    leaves: frozenset[int]
    live: bool
    writer: bool  # a writer holds the log at this moment


@dataclass(slots=True)
class _Beat:
    """When the present writer last showed that it lives."""

    inst: bytes = b""
    mono_ns: int = 0
    seq: int = 0


class Stream:
    """Reads a log from its first byte to its last. Use `run` once."""

    def __init__(self, layout: Layout, question: Question, findings: Findings) -> None:
        self.layout, self.asked, self.findings = layout, question, findings
        self.found = Collected()
        self.edge = Edge()
        self._prev = FIRST_PREV.encode()
        self._place = ""
        self._kept = read_kept(layout)
        self._leaves = question.leaves | self._kept.keys()
        self._broken = False  # the chain broke: later lines are hashed, not judged
        self._beat = _Beat()
        self._intents: dict[bytes, tuple[str, int]] = {}  # by request: kind and record
        self._parts: dict[bytes, Part] = {}  # by request: its newest chunk
        self._objects: set[bytes] = set()
        self._made: dict[Node, bytes] = {}
        self._tiles = Tiles(self._compare_tile)
        self._partial = _partial_tiles(layout)
        self._missing_tiles = 0
        self._heads = _journal_sizes(layout.journal, question.journal_end)
        self._next_head, self._next_line = next(self._heads, (_NEVER, b""))
        self._journal_differs = False  # that all later ones do says nothing new
        origin = json.dumps(question.origin)[1:-1]
        self._head_start = f'{{"note": "{origin}\\n'.encode()
        self._head_signer = f"\\n\\n\\u2014 {origin} ".encode()

    def run(self, progress: Progress | None) -> Collected:
        """Read every segment, then say what is missing."""
        paths = self._segments()
        total = sum(path.stat().st_size for path in paths) or 1
        done = 0
        self._read_pruned()
        for index, path in enumerate(paths, self.found.first // SEGMENT):
            self._place = f"log/seg/{path.name}"
            if not self._read(path, last=path == paths[-1]):
                break
            if path != paths[-1] and self.edge.size != (index + 1) * SEGMENT:
                self.findings.add(
                    TAMPERED, "segment", self._place, expected=f"{SEGMENT} records",
                    found=f"{self.edge.size - index * SEGMENT}",
                )  # fmt: skip
            done += path.stat().st_size
            if progress is not None:
                progress(done, total)
        self._tiles.add(self._made)
        for name, content in self._tiles.partial():
            self._compare_partial(name.rsplit(".p/", 1)[0], content)
        self.found.size = self.edge.size
        self._finish()
        return self.found

    def _segments(self) -> list[Path]:
        try:
            found = segment_range(self.layout)
        except RefusedError as error:
            self.findings.add(TAMPERED, "segment", "log/seg", found=error.message)
            count = 0
            while self.layout.segment(count).exists():
                count += 1
            found = range(count)
        self.found.first = found.start * SEGMENT
        return [self.layout.segment(index) for index in found]

    def _read(self, path: Path, *, last: bool) -> bool:
        """Take one segment; False when nothing after it can be read."""
        edge, made, sizes, leaves = self.edge, self._made, self.asked.sizes, self._leaves
        sha256 = hashlib.sha256
        for raw in read_lines(path):
            seq = edge.size
            if raw[-1] != 10:  # noqa: PLR2004 - the newline
                self._tail(seq, "a record that is not ended by a newline", last=last)
                return False
            line = raw[:-1]
            leaf = sha256(b"\0" + line).digest()
            if not self._broken:
                try:
                    self._judge(read_line(line), line, seq)
                except RefusedError as error:
                    if not self._bad_line(error.message, line, seq, last=last):
                        return False
            self._prev = leaf.hex().encode()
            edge.append(leaf, made)
            size = seq + 1
            if size in sizes:
                self.found.roots[size] = edge.root()
            if seq in leaves:
                self.found.leaves[seq] = leaf
            if self._next_head <= size:
                self._compare_heads(size)
            if size % _CHUNK == 0:
                self._tiles.add(made)
                made.clear()
        return True

    def _read_pruned(self) -> None:
        """Take the leaf hashes of what is no longer there, and the lines of it that were kept."""
        edge, made, asked = self.edge, self._made, self.asked
        self._place = "log/tile/0"
        for index in range(self.found.first // SEGMENT):
            for leaf in pruned_leaves(self.layout, index):
                seq = edge.size
                if seq in self._kept:
                    self._judge_kept(self._kept.pop(seq), leaf, seq)
                edge.append(leaf, made)
                if edge.size in asked.sizes:
                    self.found.roots[edge.size] = edge.root()
                if seq in asked.leaves:
                    self.found.leaves[seq] = leaf
                if self._next_head <= edge.size:
                    self._compare_heads(edge.size)
                if edge.size % _CHUNK == 0:
                    self._tiles.add(made)
                    made.clear()
                self._prev = leaf.hex().encode()

    # -- lines ---------------------------------------------------------------------------------

    def _judge(self, line: Line, raw: bytes, seq: int) -> None:
        if line.seq != seq:
            self._broken = True
            self.findings.add(
                TAMPERED, "sequence", self._place, seq, expected=str(seq), found=str(line.seq)
            )
        if line.prev != self._prev:
            self._broken = True
            self.findings.add(
                TAMPERED, "chain", self._place, max(0, seq - 1),
                expected=f"leaf hash {line.prev.decode()} (by the record after it)",
                found=self._prev.decode(),
            )  # fmt: skip
        if line.phase != "event":
            self._pair(line, raw, seq)
        if line.inst != self._beat.inst or line.kind in {"heartbeat", "boot"}:
            self._beats(line, seq)
        for digest in line.cited:
            if digest not in self._objects:
                self._object(digest, seq)
        for digest in line.sealed:
            self.found.sealed.setdefault(digest, seq)
        if line.record is not None:
            self._obey(line.record)
        if seq == 0 and NAMES_ONE in raw:
            self._continues(raw)

    def _continues(self, raw: bytes) -> None:
        """Note what the first record says of a log before."""
        record = orjson.loads(raw)
        try:
            self.found.previous = find_previous(record)
        except RefusedError as error:
            self.findings.add(TAMPERED, "log before", self._place, 0, found=error.message)
        self.found.beginning = record

    def _bad_line(self, what: str, line: bytes, seq: int, *, last: bool) -> bool:
        """Report a line that is no record; False when nothing after it can be read."""
        if seq >= self.asked.signed and last:
            self._tail(seq, what, last=last)
            return False
        self.findings.add(TAMPERED, "record", self._place, seq, found=what)
        self._broken = True
        return len(line) <= MAX_LINE

    def _judge_kept(self, line: bytes, leaf: bytes, seq: int) -> None:
        """Obey a line of a pruned segment, if it is the one that the tree holds at its place."""
        try:
            found = read_line(line)
        except RefusedError as error:
            self.findings.add(TAMPERED, "record", "log/kept.jsonl", seq, found=error.message)
            return
        if hashlib.sha256(b"\0" + line).digest() != leaf or found.seq != seq:
            self.findings.add(
                TAMPERED, "record", "log/kept.jsonl", seq, expected=leaf.hex(),
                found="a line with another leaf hash",
            )  # fmt: skip
            return
        if found.record is not None:
            self._obey(found.record)
        if seq == 0 and NAMES_ONE in line:
            self._continues(line)

    def _obey(self, record: Record) -> None:
        """Note what a record changes for verification itself."""
        data = record.get("data", {})
        if record["kind"] == "key.rotate":
            try:
                rotation = find_rotation(record, self.asked.origin)
            except RefusedError as error:
                self.findings.add(
                    TAMPERED, "key epoch", self._place, record["seq"], found=error.message
                )
                return
            if rotation is not None:
                self.found.rotations.append(rotation)
        elif record["kind"] == "prune" and record["phase"] == "intent":
            self.found.prunings.append(record)
        elif record["kind"] == "spill.purge" and record["phase"] == "intent":
            self.found.purged.add(str(data.get("payload", "")).encode())

    def _pair(self, line: Line, raw: bytes, seq: int) -> None:
        req, phase, kind = line.req, line.phase, line.kind
        known = self._intents.get(req)
        if phase == "intent":
            if known is not None:
                what = f"a second intent of {req.decode()}"
                self.findings.add(TAMPERED, "pairing", self._place, seq, found=what)
            self._intents[req] = (kind, seq)
            return
        if (known is None and not self.found.first) or (known is not None and known[0] != kind):
            self.findings.add(
                TAMPERED, "pairing", self._place, seq, found=f"{kind} {phase} without its intent"
            )
        if phase == "chunk" or req in self._parts:
            self._chunk(req, raw, seq, judged=known is not None or not self.found.first)
        if phase == "outcome":
            self._intents.pop(req, None)

    def _chunk(self, req: bytes, raw: bytes, seq: int, *, judged: bool) -> None:
        """Chunks are numbered and grow, and the outcome commits to what the last of them did."""
        newest, wrong = next_part(self._parts.get(req), orjson.loads(raw))
        if wrong and (judged or req in self._parts):
            self.findings.add(TAMPERED, "chunks", self._place, seq, found=wrong)
        if newest is None:
            self._parts.pop(req, None)
        else:
            self._parts[req] = newest

    def _beats(self, line: Line, seq: int) -> None:
        beat, now = self._beat, line.mono_ns
        if line.inst == beat.inst:
            gap = now - beat.mono_ns
            if gap > HEARTBEAT_GAP_NS or seq - beat.seq > HEARTBEAT_GAP_RECORDS:
                self.findings.add(
                    NOTE, "heartbeat gap", self._place, seq,
                    found=f"{gap // 10**9} s and {seq - beat.seq} records without a heartbeat",
                )  # fmt: skip
        beat.inst, beat.mono_ns, beat.seq = line.inst, now, seq

    def _object(self, digest: bytes, seq: int) -> None:
        """Compare a cited object with its name, once."""
        self._objects.add(digest)
        name = digest[7:].decode()
        place = f"log/objects/{name[:2]}/{name}"
        try:
            with open_plain(self.layout.object(name)) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            self.findings.add(
                TAMPERED, "object", place, seq, expected="the object that the record cites",
                found="nothing",
            )  # fmt: skip
            return
        if found != name:
            self.findings.add(
                TAMPERED, "object", place, seq, expected=digest.decode(), found=f"sha256:{found}"
            )

    def _tail(self, seq: int, what: str, *, last: bool) -> None:
        """A bad line: past the signed head of a live log a crash explains it, else nothing does."""
        if seq >= self.asked.signed and last and self.asked.live:
            level = NOTE if self.asked.writer else UNKNOWN
            self.findings.add(level, "unrecovered tail", self._place, seq, found=what)
        else:
            self.findings.add(TAMPERED, "record", self._place, seq, found=what)

    # -- against the tree ----------------------------------------------------------------------

    def _compare_heads(self, size: int) -> None:
        """Compare each line of the journal that speaks of the tree as it stands now."""
        while self._next_head <= size:
            head, line = self._next_head, self._next_line
            self._next_head, self._next_line = next(self._heads, (_NEVER, b""))
            if self._journal_differs or not self.asked.origin:
                continue
            root = base64.b64encode(self.edge.root())
            expected = b"%s%d\\n%s%s" % (self._head_start, head, root, self._head_signer)
            whole = _JOURNAL_LINE.fullmatch(line)
            if head != size or not line.startswith(expected) or whole is None:
                self._journal_differs = True
                self.findings.add(
                    TAMPERED, "head journal", _JOURNAL,
                    expected=f"a signed head as in {line[:120]!r}",
                    found=f"root {root.decode()} at size {size}",
                )  # fmt: skip
                continue
            rotations = self.found.rotations
            closes = bool(rotations) and rotations[-1].size == size
            signer = line[len(expected) : len(expected) + SIGNER_PREFIX]
            self.found.signers.setdefault((len(rotations) - closes, signer), size)
            if closes:
                self.found.closing[size] = line

    def _compare_tile(self, name: str, content: bytes) -> None:
        path = self.layout.tiles / name
        self._compare_partial(name, content)
        try:
            found = _read(path, len(content) + 1)
        except FileNotFoundError:
            self._missing_tiles += 1
            return
        if found != content:
            self._tile_differs(name, content, found)

    def _compare_partial(self, name: str, content: bytes) -> None:
        """Compare the published partial tiles of this place, each a beginning of `content`."""
        for width, path in self._partial.pop(name, ()):
            try:
                found = _read(path, 32 * width + 1)
            except FileNotFoundError:
                continue  # A writer replaced it by a wider one.
            if found != content[: 32 * width]:
                self._tile_differs(f"{name}.p/{width}", content[: 32 * width], found)

    def _tile_differs(self, name: str, content: bytes, found: bytes) -> None:
        """Tell which hash of a tile differs; in the live segment a crash may have cut the file."""
        cut = len(found) != len(content) or not found.strip(b"\0")
        recent = self.edge.size // SEGMENT * SEGMENT == 0 or self._is_recent(name)
        level = UNKNOWN if cut and self.asked.live and recent else TAMPERED
        first = next(
            (i for i in range(0, len(content), 32) if content[i : i + 32] != found[i : i + 32]), 0
        )
        tile_level, _, rest = name.partition("/")
        index = _tile_index(rest)
        seq = (index * WIDTH + first // 32) if tile_level == "0" else None
        self.findings.add(
            level, "tile", f"log/tile/{name}", seq,
            expected=f"{content[first : first + 32].hex()} (from the records)",
            found=found[first : first + 32].hex() or "nothing",
        )  # fmt: skip

    def _is_recent(self, name: str) -> bool:
        level, _, rest = name.partition("/")
        span: int = WIDTH ** (int(level) + 1)
        return (_tile_index(rest) + 1) * span > self.edge.size // SEGMENT * SEGMENT

    # -- at the end ----------------------------------------------------------------------------

    def _finish(self) -> None:
        findings, live = self.findings, self.asked.live
        for seq, line in self._kept.items():  # of lines that are there, too: the same ones
            if self.found.leaves.get(seq) != hashlib.sha256(b"\0" + line).digest():
                findings.add(
                    TAMPERED, "record", "log/kept.jsonl", seq, found="a line with another leaf hash"
                )
        if self._missing_tiles:
            findings.add(
                NOTE if live else TAMPERED, "tile", "log/tile",
                found=f"{self._missing_tiles} full tiles are missing; they derive from the records",
            )  # fmt: skip
        for name, partial in self._partial.items():
            findings.add(
                UNKNOWN if live else TAMPERED, "tile", f"log/tile/{name}.p/{partial[0][0]}",
                found="a tile of records that are not there",
            )  # fmt: skip
        if self._intents:
            findings.add(NOTE, "open intents", "log/seg", found=self._open_words())

    def _open_words(self) -> str:
        """Count the open intents; an export ends with its own, which is on record before it."""
        count = len(self._intents)
        words = f"{count} without an outcome"
        if self.asked.live or ("export", self.edge.size - 1) not in self._intents.values():
            return words
        return f"{words}{': ' if count == 1 else ', among them '}the export itself"


def _journal_sizes(journal: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield size and line of each head up to offset `end`; 0 for a line that is none."""
    offset = 0
    for line in read_lines(journal) if end else ():
        offset += len(line)
        if offset > end:
            return
        found = _JOURNAL_SIZE.match(line)
        yield (int(found[1]) if found else 0), line


def _partial_tiles(layout: Layout) -> dict[str, list[tuple[int, Path]]]:
    """Return the partial tiles on disk by the name of their full tile."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in layout.tiles.glob("**/*.p/*"):
        name = str(path.parent.relative_to(layout.tiles)).removesuffix(".p")
        if name.startswith("entries/"):
            continue  # Bundles of lines, which an export adds.
        if path.name.isascii() and path.name.isdecimal() and 0 < int(path.name) < WIDTH:
            found.setdefault(name, []).append((int(path.name), path))
    return found


def _read(path: Path, limit: int) -> bytes:
    """Return at most `limit` bytes of a plain file."""
    with open_plain(path) as file:
        return file.read(limit)


def _tile_index(rest: str) -> int:
    """Return the index of a tile from the part of its name after the level."""
    return int(rest.partition(".p")[0].replace("x", "").replace("/", ""))
