"""Verification of a log with public keys alone (docs/design/audit.md, 9).

`verify_log` reads the folder once, believes nothing in it, and returns a verdict: *good* only if an
outside anchor was compared, *tampered* if anything contradicts, *cannot tell* otherwise. Key and
anchors come from whoever verifies, never from the folder under test.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from airgap.audit.checkpoint import (
    MAX_NOTE,
    Checkpoint,
    Vkey,
    parse_checkpoint,
    verify_checkpoint,
)
from airgap.audit.disk import open_plain
from airgap.audit.layout import (
    Layout,
    journal_line,
    last_checkpoint,
    read_lines,
    segment_count,
)
from airgap.audit.receipt import HEADER, MAX_RECEIPT, Receipt, parse_receipt, verify_receipt
from airgap.audit.record import FIRST_PREV, MAX_LINE, Record, citations, parse_line
from airgap.audit.tiles import SEGMENT, WIDTH, Edge, Node, Tiles
from policy.errors import FaultError, RefusedError

MAX_FINDINGS: Final = 50
# The writer beats every 1,000 records and every 60 s; one batch may come in between.
HEARTBEAT_GAP_RECORDS: Final = 2_048
HEARTBEAT_GAP_NS: Final = 180 * 10**9
_CHUNK: Final = 1_024
_JOURNAL_SIZE: Final = re.compile(rb'\{"note": "[^"\\]{1,200}\\n([0-9]{1,16})\\n')

TAMPERED: Final = "tampered"
UNKNOWN: Final = "cannot tell"
NOTE: Final = "note"
GOOD: Final = "good"
_JOURNAL: Final = "log/checkpoints.jsonl"
_CURRENT: Final = "log/checkpoint"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not fit, or that the reader should know (`note`)."""

    level: str  # TAMPERED, UNKNOWN or NOTE
    check: str
    place: str  # file below the folder, or the anchor's name
    seq: int | None = None
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        at = "" if self.seq is None else f" record {self.seq}"
        what = f": expected {self.expected}" if self.expected else ""
        return f"{self.level}: {self.check}, {self.place}{at}{what}" + (
            f"{',' if what else ':'} found {self.found}" if self.found else ""
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification came to. `exit` is 0 good, 1 tampered, 3 cannot tell."""

    exit: int
    verdict: str
    origin: str
    size: int  # records under the newest signed head
    records: int  # records that were read
    anchored_size: int  # the largest outside anchor that agrees
    anchors: int  # how many agree
    root: str
    findings: tuple[Finding, ...]

    def as_document(self) -> dict[str, Any]:
        """Return the verdict for JSON output."""
        rows = [
            {
                "level": f.level,
                "check": f.check,
                "place": f.place,
                "seq": f.seq,
                "expected": f.expected,
                "found": f.found,
            }
            for f in self.findings
        ]
        return {
            "verdict": self.verdict,
            "exit": self.exit,
            "origin": self.origin,
            "size": self.size,
            "records": self.records,
            "anchored_size": self.anchored_size,
            "unanchored": self.size - self.anchored_size,
            "anchors": self.anchors,
            "root": self.root,
            "findings": rows,
        }


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A head from outside that the log's key has signed, and the record it proves, if any."""

    name: str
    size: int
    root: bytes
    receipt: Receipt | None


def verify_log(
    folder: Path,
    *,
    vkey: Vkey | None,
    anchors: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Verdict:
    """Check everything in `folder` that a public key and outside anchors can show.

    Args:
        folder: Holds `log/`; with a `manifest.json` it is an export, where nothing may be unsigned.
        vkey: The log's verifier key; without it the best verdict is *cannot tell*.
        anchors: Receipts (`.tlog-proof`) and checkpoints kept elsewhere, or folders of them.
        progress: Called with bytes read and bytes in all.

    """
    layout = Layout(folder)
    findings = _Findings()
    live = not layout.manifest.exists()
    kept = list(_load_anchors(anchors, vkey, findings))
    if vkey is None:
        findings.add(UNKNOWN, "signature", _CURRENT, found="no verifier key was given")
    held = _Held.look(layout, live=live)
    try:
        special = next(_special_files(layout), None)
        if special is not None:
            findings.add(TAMPERED, "files", special, found="a pipe or device")
            return _verdict(findings, None, kept, 0, 0)
        heads = _find_heads(layout, vkey, findings, live=live)
        head = heads.newest
        stream = _Stream(layout, heads, kept, findings, live=live, writer=held.now)
        stream.run(progress)
        if held.now and stream.edge.size > stream.signed:
            # A writer is at work: what came since is under a newer head by now.
            findings.add(NOTE, "tail", "log/seg", found="records of a writer that is running")
        if not live:
            from airgap.audit.export.manifest import check_export  # noqa: PLC0415 - it needs us

            for finding in check_export(folder):
                findings.keep(finding)
    except OSError as error:
        name = str(error.filename or folder)
        findings.add(UNKNOWN, "read", name, found=error.strerror or str(error))
        return _verdict(findings, None, kept, 0, 0)
    return _verdict(findings, head, kept, stream.edge.size, stream.anchored)


class _Findings:
    """Collected in order; the first of a kind tells, thousands of followers do not."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self._levels: set[str] = set()

    def add(
        self,
        level: str,
        check: str,
        place: str,
        seq: int | None = None,
        *,
        expected: str = "",
        found: str = "",
    ) -> None:
        self.keep(Finding(level, check, place, seq, expected[:160], found[:160]))

    def keep(self, finding: Finding) -> None:
        if len(self.all) < MAX_FINDINGS or finding.level not in self._levels:
            self._levels.add(finding.level)
            self.all.append(finding)

    def has(self, level: str) -> bool:
        return level in self._levels


@dataclass(frozen=True, slots=True)
class _Held:
    """Whether a writer holds the log at this moment."""

    now: bool

    @classmethod
    def look(cls, layout: Layout, *, live: bool) -> _Held:
        if not live:
            return cls(now=False)
        try:
            fd = os.open(layout.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return cls(now=False)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return cls(now=True)
        finally:
            os.close(fd)
        return cls(now=False)


def _verdict(
    findings: _Findings, head: Checkpoint | None, kept: list[_Anchor], records: int, anchored: int
) -> Verdict:
    matched = [anchor for anchor in kept if 0 < anchor.size <= anchored]
    if findings.has(TAMPERED):
        code, word = 1, TAMPERED
    elif findings.has(UNKNOWN) or not matched:
        code, word = 3, UNKNOWN
        if not kept:
            findings.add(
                UNKNOWN, "anchor", "--anchors", found="no outside head to compare this log with"
            )
    else:
        code, word = 0, GOOD
    order = [TAMPERED, UNKNOWN, NOTE]  # within a level, what names a record comes first
    told = sorted(findings.all, key=lambda f: (order.index(f.level), f.seq is None))
    return Verdict(
        code,
        word,
        head.origin if head else "",
        head.size if head else 0,
        records,
        anchored,
        len(matched),
        base64.b64encode(head.root).decode() if head else "",
        tuple(told),
    )


# -- heads and anchors -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """The heads in the folder whose signature holds, by place, and where the journal ends."""

    good: dict[str, Checkpoint]
    journal_end: int

    @property
    def newest(self) -> Checkpoint | None:
        return max(self.good.values(), key=lambda c: c.size, default=None)


def _find_heads(layout: Layout, vkey: Vkey | None, findings: _Findings, *, live: bool) -> _Heads:
    """Return the signed heads; findings say what is wrong with others."""
    found: dict[str, Checkpoint] = {}
    end = 0
    journal = last_checkpoint(layout.journal)
    current = _read_current(layout, findings, live=live)
    crash = UNKNOWN if live else TAMPERED  # a crash explains it in a live folder alone
    if journal is not None:
        found[_JOURNAL], end = journal
        if end != layout.journal.stat().st_size:
            findings.add(crash, "head journal", _JOURNAL, found="a torn last line")
    if current is not None:
        found[_CURRENT] = current
        if journal is None or journal[0].size < current.size:
            findings.add(crash, "head journal", _JOURNAL, found="behind the checkpoint")
    good = {}
    for place, checkpoint in found.items():
        try:
            if vkey is not None:
                verify_checkpoint(checkpoint, vkey)
        except RefusedError as error:
            findings.add(TAMPERED, "signature", place, found=error.message)
        else:
            good[place] = checkpoint
    if len({checkpoint.origin for checkpoint in good.values()}) > 1:
        findings.add(TAMPERED, "fork", _CURRENT, found="checkpoint and journal of two logs")
    return _Heads(good, end)


def _read_current(layout: Layout, findings: _Findings, *, live: bool) -> Checkpoint | None:
    try:
        with open_plain(layout.checkpoint) as file:
            content = file.read(MAX_NOTE + 1)
    except FileNotFoundError:
        if not live:
            findings.add(TAMPERED, "checkpoint", "log/checkpoint", found="nothing")
        return None
    if live and not content.strip(b"\0"):
        findings.add(NOTE, "checkpoint", "log/checkpoint", found="empty, as a crash may leave it")
        return None
    try:
        return parse_checkpoint(content)
    except RefusedError as error:
        findings.add(TAMPERED, "checkpoint", "log/checkpoint", found=error.message)
        return None


def load_anchor(content: bytes) -> tuple[Checkpoint, Receipt | None]:
    """Return the checkpoint of a receipt or of a bare signed note; RefusedError when neither."""
    if content.startswith(HEADER.encode()):
        receipt = parse_receipt(content)
        return parse_checkpoint(receipt.note.encode()), receipt
    return parse_checkpoint(content), None


def _load_anchors(
    paths: Sequence[Path], vkey: Vkey | None, findings: _Findings
) -> Iterator[_Anchor]:
    """Yield the usable anchors; one that cannot be used is a reason for *cannot tell*."""
    for path in _anchor_files(paths):
        try:
            with open_plain(path) as file:
                checkpoint, receipt = load_anchor(file.read(MAX_RECEIPT + 1))
            if vkey is None:
                continue
            if receipt is not None:
                head = verify_receipt(receipt, vkey)
            else:
                head = verify_checkpoint(checkpoint, vkey)
        except (RefusedError, OSError) as error:
            findings.add(UNKNOWN, "anchor", path.name, found=str(error))
            continue
        yield _Anchor(path.name, head.size, head.root, receipt)


def _anchor_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.is_file())
        elif path.exists():
            yield path
        else:
            raise FaultError("host.io", f"no anchor at {path}", hint="check the path")


# -- records -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Beat:
    """When the present writer last showed that it lives."""

    inst: str = ""
    mono_ns: int = 0
    seq: int = 0


class _Stream:
    """One pass over all records: lines, chain, tree, tiles, pairs, objects, heads, anchors."""

    def __init__(
        self,
        layout: Layout,
        heads: _Heads,
        anchors: list[_Anchor],
        findings: _Findings,
        *,
        live: bool,
        writer: bool,
    ) -> None:
        self.layout, self.findings, self.live, self.writer = layout, findings, live, writer
        self.head = head = heads.newest
        self.signed = head.size if head else 0
        self._journal_end = heads.journal_end
        self.anchors = anchors
        self.anchored = 0
        self.edge = Edge()
        self._prev = FIRST_PREV
        self._place = ""
        self._broken = False  # the chain broke: later lines are hashed, not judged
        self._beat = _Beat()
        self._intents: dict[str, tuple[str, int]] = {}  # by request: kind and record
        self._objects: set[str] = set()
        self._made: dict[Node, bytes] = {}
        self._tiles = Tiles(self._compare_tile)
        self._partial = _partial_tiles(layout)
        self._missing_tiles = 0
        self._roots: dict[int, list[tuple[str, bytes]]] = {}  # by size: place, expected root
        self._differs = False  # a root differed: that all later ones do says nothing new
        for place, checkpoint in heads.good.items():
            self._roots.setdefault(checkpoint.size, []).append((place, checkpoint.root))
        self._leaves: dict[int, list[_Anchor]] = {}
        for anchor in anchors:
            self._roots.setdefault(anchor.size, []).append((f"anchor {anchor.name}", anchor.root))
            if anchor.receipt is not None:
                self._leaves.setdefault(anchor.receipt.seq, []).append(anchor)

    def run(self, progress: Progress | None) -> None:
        """Read every segment, then say what is missing."""
        paths = self._segments()
        total = sum(path.stat().st_size for path in paths) or 1
        done = 0
        heads = _journal_sizes(self.layout.journal, self._journal_end)
        next_head = next(heads, None)
        edge, made = self.edge, self._made
        for index, path in enumerate(paths):
            self._place = f"log/seg/{path.name}"
            for line in read_lines(path):
                done += len(line)
                if not self._line(line, last=index == len(paths) - 1):
                    break
                if edge.size in self._roots:
                    self._compare_roots()
                while next_head is not None and next_head[0] <= edge.size:
                    self._compare_head(*next_head)
                    next_head = next(heads, None)
                if edge.size % _CHUNK == 0:
                    self._tiles.add(made)
                    made.clear()
                    if progress is not None:
                        progress(done, total)
            else:
                if index < len(paths) - 1 and edge.size != (index + 1) * SEGMENT:
                    self.findings.add(
                        TAMPERED, "segment", self._place, expected=f"{SEGMENT} records",
                        found=f"{edge.size - index * SEGMENT}",
                    )  # fmt: skip
                continue
            break
        self._tiles.add(made)
        for name, content in self._tiles.partial():
            self._compare_partial(name.rsplit(".p/", 1)[0], content)
        self._finish()

    def _segments(self) -> list[Path]:
        try:
            count = segment_count(self.layout)
        except RefusedError as error:
            self.findings.add(TAMPERED, "segment", "log/seg", found=error.message)
            count = 0
            while self.layout.segment(count).exists():
                count += 1
        return [self.layout.segment(index) for index in range(count)]

    def _line(self, raw: bytes, *, last: bool) -> bool:
        """Judge one line and add it to the tree; False when nothing after it can be read."""
        seq = self.edge.size
        if not raw.endswith(b"\n"):
            self._tail(seq, "a record that is not ended by a newline", last=last)
            return False
        line = raw[:-1]
        leaf = hashlib.sha256(b"\0" + line).digest()
        if not self._broken:
            try:
                record = parse_line(line)
            except RefusedError as error:
                if seq >= self.signed and last:
                    self._tail(seq, error.message, last=last)
                    return False
                self.findings.add(TAMPERED, "record", self._place, seq, found=error.message)
                if len(line) > MAX_LINE:
                    return False
                self._broken = True
            else:
                self._judge(record, seq)
        self._prev = leaf.hex()
        self.edge.append(leaf, self._made)
        if seq in self._leaves:
            self._compare_leaf(seq, leaf)
        return True

    def _judge(self, record: Record, seq: int) -> None:
        if record["seq"] != seq:
            self._broken = True
            self.findings.add(
                TAMPERED, "sequence", self._place, seq, expected=str(seq), found=str(record["seq"])
            )
        if record["prev"] != self._prev:
            self._broken = True
            self.findings.add(
                TAMPERED, "chain", self._place, max(0, seq - 1),
                expected=f"leaf hash {record['prev']} (by the record after it)", found=self._prev,
            )  # fmt: skip
        kind = record["kind"]
        if record["phase"] != "event":
            self._pair(record, seq)
        if kind in {"heartbeat", "boot"} or record["inst"] != self._beat.inst:
            self._beats(record, seq)
        if "decision" in record or "data" in record:
            for digest in citations(record):
                if digest not in self._objects:
                    self._object(digest, seq)

    def _pair(self, record: Record, seq: int) -> None:
        req, phase, kind = record["req"], record["phase"], record["kind"]
        known = self._intents.get(req)
        if phase == "intent":
            if known is not None:
                self.findings.add(
                    TAMPERED, "pairing", self._place, seq, found=f"a second intent of {req}"
                )
            self._intents[req] = (kind, seq)
            return
        if known is None or known[0] != kind:
            self.findings.add(
                TAMPERED, "pairing", self._place, seq, found=f"{kind} {phase} without its intent"
            )
        if phase == "outcome":
            self._intents.pop(req, None)

    def _beats(self, record: Record, seq: int) -> None:
        beat, now = self._beat, int(record["mono_ns"])
        if record["inst"] == beat.inst:
            gap = now - beat.mono_ns
            if gap > HEARTBEAT_GAP_NS or seq - beat.seq > HEARTBEAT_GAP_RECORDS:
                self.findings.add(
                    NOTE, "heartbeat gap", self._place, seq,
                    found=f"{gap // 10**9} s and {seq - beat.seq} records without a heartbeat",
                )  # fmt: skip
        beat.inst, beat.mono_ns, beat.seq = record["inst"], now, seq

    def _object(self, digest: str, seq: int) -> None:
        """Compare a cited object with its name, once."""
        self._objects.add(digest)
        path = self.layout.object(digest[7:])
        try:
            with open_plain(path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            self.findings.add(
                TAMPERED, "object", f"log/objects/{digest[7:9]}/{digest[7:]}", seq,
                expected="the object that the record cites", found="nothing",
            )  # fmt: skip
            return
        if found != digest[7:]:
            self.findings.add(
                TAMPERED, "object", f"log/objects/{digest[7:9]}/{digest[7:]}", seq,
                expected=digest, found=f"sha256:{found}",
            )  # fmt: skip

    def _tail(self, seq: int, what: str, *, last: bool) -> None:
        """A bad line: past the signed head of a live log a crash explains it, else nothing does."""
        if seq >= self.signed and last and self.live:
            level = NOTE if self.writer else UNKNOWN
            self.findings.add(level, "unrecovered tail", self._place, seq, found=what)
        else:
            self.findings.add(TAMPERED, "record", self._place, seq, found=what)

    # -- against the tree ----------------------------------------------------------------------

    def _compare_roots(self) -> None:
        size, root = self.edge.size, self.edge.root()
        for place, expected in self._roots[size]:
            if expected != root:
                self.findings.add(
                    TAMPERED, "root", place, expected=f"root {expected.hex()} at size {size}",
                    found=root.hex(),
                )  # fmt: skip
            elif place.startswith("anchor "):
                self.anchored = max(self.anchored, size)

    def _compare_leaf(self, seq: int, leaf: bytes) -> None:
        for anchor in self._leaves[seq]:
            expected = anchor.receipt.leaf if anchor.receipt else b""
            if expected != leaf:
                self.findings.add(
                    TAMPERED, "receipt", f"anchor {anchor.name}", seq,
                    expected=f"leaf hash {expected.hex()}", found=leaf.hex(),
                )  # fmt: skip

    def _compare_head(self, size: int, line: bytes) -> None:
        """Compare one line of the journal with the tree as it stood at that size."""
        if self.head is None or self._differs:
            return
        root = base64.b64encode(self.edge.root()).decode()
        expected = journal_line(f"{self.head.origin}\n{size}\n{root}\n\n")[:-3]
        if size != self.edge.size or not line.startswith(expected):
            self._differs = True
            self.findings.add(
                TAMPERED, "head journal", _JOURNAL, expected=f"a signed head as in {line[:120]!r}",
                found=f"root {root} at size {self.edge.size}",
            )  # fmt: skip

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
        level = UNKNOWN if cut and self.live and recent else TAMPERED
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
        size, findings = self.edge.size, self.findings
        self._finish_size(size)
        for anchor in self.anchors:
            if anchor.size > size:
                findings.add(
                    TAMPERED, "rollback", f"anchor {anchor.name}",
                    expected=f"at least {anchor.size} records", found=f"{size}",
                )  # fmt: skip
        if self._missing_tiles:
            findings.add(
                NOTE if self.live else TAMPERED, "tile", "log/tile",
                found=f"{self._missing_tiles} full tiles are missing; they derive from the records",
            )  # fmt: skip
        for name, partial in self._partial.items():
            findings.add(
                UNKNOWN if self.live else TAMPERED, "tile", f"log/tile/{name}.p/{partial[0][0]}",
                found="a tile of records that are not there",
            )  # fmt: skip
        if self._intents:
            findings.add(NOTE, "open intents", "log/seg", found=self._open_words(size))

    def _open_words(self, size: int) -> str:
        """Count the open intents; an export ends with its own, which is on record before it."""
        count = len(self._intents)
        words = f"{count} without an outcome"
        if self.live or ("export", size - 1) not in self._intents.values():
            return words
        return f"{words}{': ' if count == 1 else ', among them '}the export itself"

    def _finish_size(self, size: int) -> None:
        head, findings = self.head, self.findings
        if head is None and size:
            findings.add(TAMPERED, "head", "log", found=f"{size} records without a signed head")
        elif head is None:
            findings.add(UNKNOWN, "log", "log", found="no log here")
        elif size < head.size:
            findings.add(
                TAMPERED, "size", "log/seg", expected=f"{head.size} signed records", found=f"{size}"
            )
        elif size > head.size:
            self._past_head(size, head.size)

    def _past_head(self, size: int, signed: int) -> None:
        if not self.live:
            self.findings.add(
                TAMPERED, "size", "log/seg", expected=f"{signed} signed records", found=f"{size}"
            )
        elif not self.writer:
            self.findings.add(
                UNKNOWN, "unrecovered tail", "log/seg", signed,
                found=f"{size - signed} records after the newest head; the next open signs them",
            )  # fmt: skip


def _journal_sizes(journal: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield size and line of each head up to offset `end`; -1 for a line that is none."""
    offset = 0
    for line in read_lines(journal) if end else ():
        offset += len(line)
        if offset > end:
            return
        found = _JOURNAL_SIZE.match(line)
        yield (int(found[1]) if found else -1), line


def _partial_tiles(layout: Layout) -> dict[str, list[tuple[int, Path]]]:
    """Return the partial tiles on disk by the name of their full tile."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in layout.tiles.glob("**/*.p/*"):
        name = str(path.parent.relative_to(layout.tiles)).removesuffix(".p")
        if path.name.isascii() and path.name.isdecimal() and 0 < int(path.name) < WIDTH:
            found.setdefault(name, []).append((int(path.name), path))
    return found


def _special_files(layout: Layout) -> Iterator[str]:
    """Yield what in the log is neither file nor folder, which no writer makes."""
    for place, folders, names in os.walk(layout.log):
        for name in [*folders, *names]:
            path = Path(place) / name
            if path.exists() and not (path.is_file() or path.is_dir()):
                yield path.relative_to(layout.folder).as_posix()


def _read(path: Path, limit: int) -> bytes:
    """Return at most `limit` bytes of a plain file."""
    with open_plain(path) as file:
        return file.read(limit)


def _tile_index(rest: str) -> int:
    """Return the index of a tile from the part of its name after the level."""
    return int(rest.partition(".p")[0].replace("x", "").replace("/", ""))
