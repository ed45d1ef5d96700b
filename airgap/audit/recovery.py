"""Opening a log: which head is the last, does the content agree, and what a crash left behind.

The order and the tail rule are those of docs/design/audit.md, 4. Only bytes past the last signed
head, in the last segment, may be quarantined: nobody was told that they are durable, or they are
whole and are signed now. Everything else that does not fit is refused, never repaired.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from airgap.audit.anchors import parse_anchor
from airgap.audit.checkpoint import (
    MAX_NOTE,
    Checkpoint,
    Head,
    Keys,
    Ring,
    Vkey,
    is_torn,
    parse_checkpoint,
    parse_vkey,
    verify_checkpoint,
)
from airgap.audit.disk import Disk, open_plain
from airgap.audit.epochs import Rotation, align, find_rotation
from airgap.audit.layout import (
    Layout,
    journal_line,
    last_checkpoint,
    pruned_leaves,
    read_kept,
    read_lines,
    segment_range,
)
from airgap.audit.quorum import load_policy
from airgap.audit.receipt import MAX_RECEIPT
from airgap.audit.record import Record, parse_line
from airgap.audit.tiles import SEGMENT, WIDTH, Edge, Node, Tiles, tile_name
from policy.errors import RefusedError

MAX_FRONTIER: Final = 1 << 24
_CHUNK: Final = 4_096  # lines between writes of tiles
_PHASE: Final = b'"phase":"'
_EVENT: Final = b'"phase":"event"'
_OUTCOME: Final = b'"phase":"outcome"'
_INTENT: Final = b'"phase":"intent"'
_KIND: Final = b'"kind":"'
_PROJECT: Final = b'"project":"'
_REQ: Final = b'"req":"'
_ROTATE: Final = b'"kind":"key.rotate"'
_HINT: Final = "keep the folder as evidence, run `airgap audit verify`, tell the security officer"

OpenIntents = dict[str, tuple[str, str]]  # req -> (kind, project)


@dataclass(slots=True)
class Recovered:
    """The state of a log that agrees with its signed heads."""

    head: Head
    edge: Edge
    prev: str  # hex of the last leaf
    intents: OpenIntents
    segments: list[bytes]  # roots of the whole segments
    tiles: Tiles
    rotations: list[Rotation] = field(default_factory=list)
    closing_root: bytes = b""  # at the newest rotation
    anchored: int = 0
    anchored_at: int = 0  # when that anchor came back, seconds since 1970
    found: int = 0  # records in the files before anything was cut
    torn: list[tuple[str, int, str]] = field(default_factory=list)  # (file, bytes, sha256)

    def report(self, before: str) -> list[dict[str, Any]]:
        """Return the `data` of one recovery record for each quarantined piece, or of one alone."""
        common = {
            "signed": self.head.size,
            "found": self.found,
            "reason": f"the last writer ended: {before or 'unknown'}"[:256],
        }
        return [
            common | {"file": file, "bytes": size, "sha256": digest}
            for file, size, digest in self.torn
        ] or [common]


@dataclass(frozen=True, slots=True)
class Frontier:
    """The tree at a segment's end: believed because its root equals a signed head."""

    segments: list[bytes]
    last_leaf: str
    intents: OpenIntents
    rotations: list[Rotation]
    head: Head


def recover(
    layout: Layout,
    ring: Ring,
    disk: Disk,
    *,
    following: Vkey | None = None,
    put_tile: Callable[[str, bytes], None],
    suspect: bool,
) -> Recovered:
    """Bring the log in `layout` to a state that its last signed head describes, or refuse.

    Args:
        layout: An existing log, locked by the caller.
        ring: The log's own keys.
        disk: Where writes go.
        following: The next key, while one is being replaced.
        put_tile: Writes a tile unless it is already there with that content.
        suspect: The last writer met an I/O error: keep a copy of the unsigned tail as evidence.

    Raises:
        RefusedError: `audit.history`; `audit.note` for a head whose signature does not hold, or
            `audit.epoch` for one that another epoch's key has signed.

    """
    there = segment_range(layout)
    count = there.stop
    known = ring if following is None else Ring((*ring.keys, following))
    frontier = _last_frontier(layout, known, count)
    head = _last_head(layout, known, frontier, disk)
    if head is None or count == 0:
        raise _refused("there are records without any signed head, or heads without records")
    if frontier is not None and not _tiles_complete(layout, len(frontier.segments)):
        frontier = None  # Derived files are gone: hash everything once and write them again.
    state = _start(head, frontier, put_tile)
    anchors = _anchors(layout, known)
    state.anchored = max((size for size, (_, arrived) in anchors.items() if arrived), default=0)
    state.anchored_at = anchors[state.anchored][1] if state.anchored else 0
    expected = {size: root for size, (root, _) in anchors.items() if size > state.edge.size}
    if expected.get(head.size, head.root) != head.root:
        raise _refused(f"an anchor of size {head.size} has another root")
    expected[head.size] = head.root
    if there.start:
        _require_pruned(layout, there)
    for index in range(len(state.segments), there.start):
        _replay_pruned(layout, index, state, expected)
    for index in range(len(state.segments), count):
        last = index == count - 1
        _replay(layout, index, state, disk, last=last, expected=expected, suspect=suspect)
    state.found = max(state.found, state.edge.size)
    if state.edge.size < head.size:
        raise _refused(f"signed size {head.size}, found {state.edge.size} records")
    beyond = [size for size in expected if size > state.edge.size]
    if beyond:
        raise _refused(f"anchored to size {max(beyond)}, found {state.edge.size} records")
    epochs, problem = align(ring, [each for each in state.rotations if each.size <= head.size])
    if problem:
        raise RefusedError("audit.epoch", f"this log's keys: expected {problem}", hint=_HINT)
    epochs.require(head)
    return state


def load_frontier(path: Path, keys: Keys) -> Frontier | None:
    """Return the frontier of a file, or None when it is not one that a signed head confirms."""
    try:
        if path.stat().st_size > MAX_FRONTIER:
            return None
        entry = json.loads(path.read_bytes())
        segments = [bytes.fromhex(text) for text in entry["segments"]]
        intents = {req: (kind, project) for req, kind, project in entry["open"]}
        head = verify_checkpoint(parse_checkpoint(entry["note"].encode()), keys)
        last = str(entry["last"])
        rotations = [
            Rotation(int(size), parse_vkey(str(text).encode()))
            for size, text in entry.get("rotations", ())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RefusedError):
        return None
    edge = Edge.of_segments(segments)
    if edge.size != head.size or edge.root() != head.root or any(len(s) != 32 for s in segments):  # noqa: PLR2004
        return None
    return Frontier(segments, last, intents, rotations, head)


def frontier_content(
    segments: Iterable[bytes],
    last_leaf: str,
    intents: OpenIntents,
    rotations: Iterable[tuple[int, str]],
    head: Head,
) -> bytes:
    """Return the content of a frontier file."""
    entry = {
        "last": last_leaf,
        "note": head.note,
        "open": [[req, *rest] for req, rest in intents.items()],
        "rotations": [list(each) for each in rotations],
        "segments": [root.hex() for root in segments],
    }
    return json.dumps(entry).encode() + b"\n"


def note_intent(intents: OpenIntents, fields: Mapping[str, object]) -> None:
    """Keep the list of intents without outcome up to date with one more record."""
    phase, req = fields["phase"], str(fields.get("req"))
    if phase == "intent":
        intents[req] = (str(fields["kind"]), str(fields.get("project", "")))
    elif phase == "outcome":
        intents.pop(req, None)


def _start(
    head: Head, frontier: Frontier | None, put_tile: Callable[[str, bytes], None]
) -> Recovered:
    tiles = Tiles(put_tile)
    if frontier is None:
        return Recovered(head, Edge(), "0" * 64, {}, [], tiles)
    tiles.start(frontier.segments)
    edge = Edge.of_segments(frontier.segments)
    return Recovered(
        head,
        edge,
        frontier.last_leaf,
        dict(frontier.intents),
        list(frontier.segments),
        tiles,
        list(frontier.rotations),
    )


def _replay(
    layout: Layout,
    index: int,
    state: Recovered,
    disk: Disk,
    *,
    last: bool,
    expected: dict[int, bytes],
    suspect: bool,
) -> None:
    """Hash one segment into the state; cut or rewrite the tail of the last one."""
    content = layout.segment(index).read_bytes()
    edge, signed = state.edge, state.head.size
    made: dict[Node, bytes] = {}
    before = edge.size
    offset = signed_end = _replay_tiles(content, state, min(signed, before + SEGMENT), expected)
    while offset < len(content) and edge.size - before < SEGMENT:
        end = content.find(b"\n", offset)
        line = content[offset : len(content) if end < 0 else end]
        if edge.size >= signed and (end < 0 or not _fits(line, edge.size, state.prev)):
            break
        if end < 0:
            raise _refused(f"record {edge.size} in {index:08d}.jsonl is torn, and it was signed")
        leaf = hashlib.sha256(b"\0" + line).digest()
        edge.append(leaf, made)
        state.prev = leaf.hex()
        _follow(state, line)
        offset = end + 1
        if edge.size in expected and edge.root() != expected[edge.size]:
            raise _refused(f"the root at size {edge.size} differs from the signed one")
        if edge.size <= signed:
            signed_end = offset
        if len(made) > _CHUNK:
            state.tiles.add(made)
            _remember(state, made)
            made = {}
    state.tiles.add(made)
    _remember(state, made)
    if not last and (edge.size - before != SEGMENT or offset != len(content)):
        raise _refused(f"segment {index:08d}.jsonl does not hold {SEGMENT} whole records")
    if last:
        state.found = edge.size + content.count(b"\n", offset)
        _mend_tail(
            layout,
            index,
            state,
            disk,
            content=content,
            signed_end=signed_end,
            good_end=offset,
            suspect=suspect,
        )


def _replay_tiles(content: bytes, state: Recovered, end: int, expected: dict[int, bytes]) -> int:
    """Take as many whole tiles of signed records as there are, fast; return the offset after them.

    It stops before a tile in which a root must be compared or a key changes: those go one by one.
    """
    edge, sha256, offset = state.edge, hashlib.sha256, 0
    opened: dict[bytes, bytes] = {}  # request -> line of its intent
    roots = sorted(expected)
    lines = content.split(b"\n", end - edge.size)
    del lines[-1]  # what follows the last newline that was looked for
    for start in range(0, len(lines) - WIDTH + 1, WIDTH):
        tile = lines[start : start + WIDTH]
        at = bisect.bisect_right(roots, edge.size)
        if at < len(roots) and roots[at] <= edge.size + WIDTH:
            break
        if any(_ROTATE in line for line in tile):
            break
        leaves = [sha256(b"\0" + line).digest() for line in tile]
        made: dict[Node, bytes] = {}
        edge.append_tile(leaves, made)
        state.tiles.add_tile(leaves, made)
        _remember(state, made)
        for line in tile:
            at = line.find(_PHASE)
            phase = line[at + 9 : at + 10]
            if phase == b"e":
                continue
            at = line.find(_REQ, at) + len(_REQ)
            req = line[at : at + 26]
            if phase == b"i":
                opened[req] = line
            elif phase == b"o" and opened.pop(req, None) is None:
                state.intents.pop(req.decode("ascii", "replace"), None)
        state.prev = leaves[-1].hex()
        offset += sum(map(len, tile)) + WIDTH
    for line in opened.values():
        _follow(state, line)
    return offset


def _replay_pruned(
    layout: Layout, index: int, state: Recovered, expected: dict[int, bytes]
) -> None:
    """Hash a pruned segment into the state from its tiles, and obey the lines that were kept."""
    kept = read_kept(layout)
    made: dict[Node, bytes] = {}
    for leaf in pruned_leaves(layout, index):
        line = kept.get(state.edge.size, b"")
        state.edge.append(leaf, made)
        state.prev = leaf.hex()
        if line and hashlib.sha256(b"\0" + line).digest() == leaf:
            _follow_keys(state, line)
        size = state.edge.size
        if size in expected and state.edge.root() != expected[size]:
            raise _refused(f"the root at size {size} differs from the signed one")
    state.tiles.add(made)
    _remember(state, made)


def _require_pruned(layout: Layout, there: range) -> None:
    """Return if a pruning is on record that explains where the log begins; refuse if not.

    The record was kept aside when the lines went; it counts if the tree has its leaf in its place.
    """
    for seq, line in read_kept(layout).items():
        record = _fitting(line, seq)
        if record is None or record["kind"] != "prune" or record["phase"] != "intent":
            continue
        covers = int(record.get("data", {}).get("last", -1)) + 1 >= there.start * SEGMENT
        if covers and _leaf_at(layout, seq, there) == hashlib.sha256(b"\0" + line).digest():
            return
    raise _refused(
        f"the log begins with segment {there.start:08d}.jsonl and no pruning is on record"
    )


def _leaf_at(layout: Layout, seq: int, there: range) -> bytes:
    """Return the leaf hash at a place, from its line or, where that is gone, from its tile."""
    index = seq // SEGMENT
    if index < there.start:
        return next(itertools.islice(pruned_leaves(layout, index), seq % SEGMENT, None), b"")
    if index not in there:
        return b""
    line = next(itertools.islice(read_lines(layout.segment(index)), seq % SEGMENT, None), b"\n")
    return hashlib.sha256(b"\0" + line[:-1]).digest()


def _fitting(line: bytes, seq: int) -> Record | None:
    with contextlib.suppress(RefusedError):
        record = parse_line(line)
        return record if record["seq"] == seq else None
    return None


def _follow_keys(state: Recovered, line: bytes) -> None:
    """Note a change of the log's key."""
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
        rotation = find_rotation(orjson.loads(line), state.head.origin)
        if rotation is not None:
            state.rotations.append(rotation)
            state.closing_root = state.edge.root()


def _mend_tail(
    layout: Layout,
    index: int,
    state: Recovered,
    disk: Disk,
    *,
    content: bytes,
    signed_end: int,
    good_end: int,
    suspect: bool,
) -> None:
    """Quarantine what is torn; write whole but unsigned records once more, then flush them.

    After a failed flush the page cache may call lost pages clean. Writing the same bytes in place
    makes them dirty again; it needs no space and leaves no moment in which they are missing.
    """
    tail, torn = content[signed_end:good_end], content[good_end:]
    if tail and suspect:
        _quarantine(layout, tail, state, disk)
    if torn:
        _quarantine(layout, torn, state, disk)
    if not tail and not torn:
        return
    fd = disk.open(layout.segment(index), os.O_WRONLY)
    try:
        if tail:
            disk.pwrite(fd, tail, signed_end)
        if torn:
            disk.truncate(fd, good_end)
        disk.fsync(fd)
    finally:
        os.close(fd)


def _quarantine(layout: Layout, content: bytes, state: Recovered, disk: Disk) -> None:
    disk.make_folder(layout.torn)
    number = len(list(layout.torn.iterdir()))
    disk.put(layout.torn / f"{number:08d}", content)
    state.torn.append((f"{number:08d}", len(content), hashlib.sha256(content).hexdigest()))


def _fits(line: bytes, seq: int, prev: str) -> bool:
    """Whether an unsigned line is a record that continues the chain."""
    try:
        record = parse_line(line)
    except RefusedError:
        return False
    return bool(record["seq"] == seq and record["prev"] == prev)


def _follow(state: Recovered, line: bytes) -> None:
    """Note an intent, an outcome or a change of the key.

    A quote inside a text is escaped, so these bytes are keys and values of the record itself.
    """
    if _EVENT in line:
        if _ROTATE in line:
            _follow_keys(state, line)
        return
    req = _value(line, _REQ)
    if _OUTCOME in line:
        state.intents.pop(req, None)
    elif _INTENT in line:
        state.intents[req] = (_value(line, _KIND), _value(line, _PROJECT))


def _value(line: bytes, key: bytes) -> str:
    """Return the text behind a key of the record, empty if there is none."""
    at = line.find(key)
    if at < 0:
        return ""
    at += len(key)
    return line[at : line.find(b'"', at)].decode("ascii", "replace")


def _remember(state: Recovered, made: dict[Node, bytes]) -> None:
    """Collect the roots of whole segments."""
    height = SEGMENT.bit_length() - 1
    state.segments += [value for (level, _), value in made.items() if level == height]


def _last_frontier(layout: Layout, ring: Ring, count: int) -> Frontier | None:
    for index in range(count - 1, -1, -1):
        frontier = load_frontier(layout.frontier(index), ring)
        if frontier is not None and len(frontier.segments) == index + 1:
            return frontier
    return None


def _last_head(layout: Layout, ring: Ring, frontier: Frontier | None, disk: Disk) -> Head | None:
    """Return the newest signed head of journal, checkpoint and frontier; mend the journal."""
    found = last_checkpoint(layout.journal)
    heads = [] if found is None else [verify_checkpoint(found[0], ring)]
    current = _current(layout)
    if current is not None:
        heads.append(verify_checkpoint(current, ring))
    if frontier is not None:
        heads.append(frontier.head)
    if not heads:
        return None
    newest = max(heads, key=lambda head: head.size)
    for head in heads:
        if head.size == newest.size and head.root != newest.root:
            raise _refused(f"two signed heads of size {head.size} have different roots")
    _mend_journal(layout, newest, found, disk)
    return newest


def _mend_journal(
    layout: Layout, newest: Head, found: tuple[Checkpoint, int] | None, disk: Disk
) -> None:
    """Cut the debris of a crash off the journal, and let it end with the newest head."""
    end = 0 if found is None else found[1]
    behind = found is None or found[0].size < newest.size
    size = layout.journal.stat().st_size if layout.journal.exists() else 0
    if size == end and not behind:
        return
    fd = disk.open(layout.journal, os.O_WRONLY | os.O_CREAT)
    try:
        disk.truncate(fd, end)
        if behind:
            disk.pwrite(fd, journal_line(newest.note), end)
        disk.fsync(fd)
    finally:
        os.close(fd)


def _current(layout: Layout) -> Checkpoint | None:
    """Return `log/checkpoint`; None when absent, empty or torn, as a crash may leave it.

    It is derived and not flushed; the journal holds the same head.
    """
    try:
        with open_plain(layout.checkpoint) as file:
            content = file.read(MAX_NOTE + 1)
    except FileNotFoundError:
        return None
    return None if is_torn(content) else parse_checkpoint(content)


def _anchors(layout: Layout, ring: Ring) -> dict[int, tuple[bytes, int]]:
    """Return, by size, each head that was handed back to this host: its root, and when it came.

    The time is 0 for one that the site's trust policy does not count.
    """
    found: dict[int, tuple[bytes, int]] = {}
    policy = load_policy(layout.policy) if layout.policy.is_file() else None
    for path in sorted(layout.anchors.iterdir()) if layout.anchors.is_dir() else ():
        with open_plain(path) as file:
            content = file.read(MAX_RECEIPT + 1)
            arrived = int(os.fstat(file.fileno()).st_mtime)
        try:
            anchor = parse_anchor(content, path.name)
            head = anchor.verify(ring, None)
        except RefusedError:
            continue  # Not one of ours: `audit verify` reports it.
        if found.get(head.size, (head.root, 0))[0] != head.root:
            raise _refused(f"two anchors of size {head.size} have different roots")
        try:
            anchor.verify(ring, policy)
        except RefusedError:
            arrived = 0
        found[head.size] = (head.root, max(arrived, found.get(head.size, (b"", 0))[1]))
    return found


def _tiles_complete(layout: Layout, segments: int) -> bool:
    """Whether every full tile of level 0 of the closed segments is there."""
    per_segment = SEGMENT // WIDTH
    return all(
        (layout.tiles / tile_name(0, index)).is_file() for index in range(segments * per_segment)
    )


def _refused(message: str) -> RefusedError:
    return RefusedError("audit.history", message, hint=_HINT)
