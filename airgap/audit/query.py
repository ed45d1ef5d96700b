"""Reading a log for people: filters over records. Reading proves nothing; `verify_log` does."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from airgap.audit.disk import open_plain
from airgap.audit.layout import Layout, read_lines, segment_range
from airgap.audit.record import MAX_LINE, Record, parse_line
from airgap.audit.tiles import SEGMENT
from policy.errors import RefusedError, UsageError

FOLLOW_S: Final = 0.5
_DENIAL: Final = b'"kind":"denial"'  # as the one canonical form writes it
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d(T\d\d(:\d\d(:\d\d(\.\d{1,6})?)?)?Z?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Filter:
    """What a record must have; empty means anything. Times are UTC text, compared as text.

    `kind` also takes a group: `admin` stands for every `admin.…`. `model` and `decision` take the
    beginning of a digest.
    """

    person: str = ""
    project: str = ""
    kind: str = ""
    phase: str = ""
    outcome: str = ""
    model: str = ""
    req: str = ""
    since: str = ""
    until: str = ""

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            text = getattr(self, name)
            if text and not _TIME.fullmatch(text):
                raise UsageError(
                    "usage.argument",
                    f"--{name}: {text!r:.40} is no UTC time",
                    hint="write 2026-11-25 or 2026-11-25T14:30",
                )

    def __call__(self, record: Record) -> bool:
        """Whether the record passes."""
        kind = record["kind"]
        model = record.get("model", "").removeprefix("sha256:")
        return (
            (not self.person or record.get("actor", {}).get("name") == self.person)
            and (not self.project or record.get("project") == self.project)
            and (not self.kind or kind == self.kind or kind.startswith(f"{self.kind}."))
            and (not self.phase or record["phase"] == self.phase)
            and (not self.outcome or self.outcome in outcomes(record))
            and (not self.model or model.startswith(self.model.removeprefix("sha256:")))
            and (not self.req or record.get("req") == self.req)
            and (not self.since or record["ts"] >= self.since.rstrip("Z"))
            and (not self.until or record["ts"] < self.until.rstrip("Z"))
        )


def outcomes(record: Record) -> set[str]:
    """Return the words that say how a record ended: decision, result, error code."""
    data = record.get("data", {})
    words = {
        record.get("decision", {}).get("outcome"),
        data.get("result"),
        data.get("verdict"),
        record.get("err", {}).get("code"),
    }
    return {word for word in words if isinstance(word, str)}


def read_records(folder: Path) -> Iterator[Record]:
    """Yield the records of the log in `folder`, in order, up to the first line that is none.

    Raises:
        RefusedError: `audit.absent`, no log there; `audit.history`, a segment is missing;
            `audit.tampered`, a line that is no record, other than a torn last one.

    """
    layout = Layout(folder)
    if not layout.log.is_dir():
        raise RefusedError(
            "audit.absent",
            f"no audit log in {folder}",
            hint="name the folder that holds `log/`, or use --root",
        )
    there = segment_range(layout)
    for index in there:
        for number, line in enumerate(read_lines(layout.segment(index))):
            if not line.endswith(b"\n") and index == there[-1]:
                return  # A writer is at work, or a crash left it: the next open deals with it.
            try:
                yield parse_line(line.removesuffix(b"\n"))
            except RefusedError as error:
                raise RefusedError(
                    "audit.tampered",
                    f"{layout.segment(index).name}, line {number + 1}: {error.message}",
                    hint="run `airgap audit verify`",
                ) from error


class Denials:
    """Who was denied when and by which rule; read once, then on from there. Threads may share it.

    Each is kept as `seq`, `ts`, `actor.uid` and `decision.rule` alone.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._index = self._offset = 0
        self._found: dict[int, list[Record]] = {}

    def of(self, uid: int, since: str) -> list[Record]:
        """Return the denials of an account since a time, UTC text, oldest first.

        Raises:
            RefusedError: `audit.history`, a segment is missing; `audit.record`, a line is none.

        """
        with self._lock:
            self._read_on()
            return [record for record in self._found.get(uid, ()) if record["ts"] >= since]

    def _read_on(self) -> None:
        there = segment_range(self._layout)
        if self._index < there.start:  # what was read there has been pruned since
            self._index, self._offset = there.start, 0
        while self._index in there:
            with open_plain(self._layout.segment(self._index)) as file:
                file.seek(self._offset)
                while (line := file.readline(MAX_LINE + 2)).endswith(b"\n"):
                    self._offset += len(line)
                    if _DENIAL in line:
                        self._keep(parse_line(line[:-1]))
            if self._index + 1 not in there:
                return
            self._index, self._offset = self._index + 1, 0

    def _keep(self, record: Record) -> None:
        if record["kind"] == "denial":
            uid, rule = record["actor"]["uid"], record.get("decision", {}).get("rule", "")
            kept = {"seq": record["seq"], "ts": record["ts"], "actor": {"uid": uid}}
            self._found.setdefault(uid, []).append(kept | {"decision": {"rule": rule}})


def follow(
    folder: Path, wanted: Filter, *, last: int, wait: Callable[[], object] | None = None
) -> Iterator[Record]:
    """Yield the newest `last` records that pass, then each new one as it is written, for ever.

    `wait` is called when there is nothing new; it may raise to end it.
    """
    pause = wait or (lambda: time.sleep(FOLLOW_S))
    layout = Layout(folder)
    seen = -1
    recent: deque[Record] = deque(maxlen=last or None)
    for record in read_records(folder):
        seen = record["seq"]
        if wanted(record):
            recent.append(record)
    yield from recent
    place = _Place(layout, seen + 1)
    while True:
        new = place.next()
        if new is None:
            pause()
        elif wanted(new):
            yield new


class _Place:
    """Where the next record will stand: a segment and an offset in it."""

    def __init__(self, layout: Layout, seq: int) -> None:
        self._layout, self._seq, self._offset = layout, seq, 0
        path = layout.segment(seq // SEGMENT)
        if path.is_file():
            lines = itertools.islice(read_lines(path), seq % SEGMENT)
            self._offset = sum(len(line) for line in lines)

    def next(self) -> Record | None:
        """Return the next whole record, None when there is none yet."""
        try:
            with open_plain(self._layout.segment(self._seq // SEGMENT)) as file:
                file.seek(self._offset)
                line = file.readline(MAX_LINE + 2)
        except FileNotFoundError:
            return None
        if not line.endswith(b"\n"):
            return None
        record = parse_line(line[:-1])
        self._seq += 1
        self._offset = 0 if self._seq % SEGMENT == 0 else self._offset + len(line)
        return record


def select(folder: Path, wanted: Filter, *, last: int) -> list[Record]:
    """Return the newest `last` records that pass, oldest first; 0 means all."""
    found = (record for record in read_records(folder) if wanted(record))
    return list(deque(found, maxlen=last or None))
