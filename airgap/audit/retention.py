"""Retention: which records a host may drop, and how (docs/design/audit.md, 8).

Pruning takes whole segments that were exported and cosigned past their end and are older than the
profile's searchable time; two people sign it, and the intent is durable before anything goes. What
stays are the leaf hashes, so the root still follows from the folder, and the few lines that
verification needs. A purge destroys one encrypted payload; its record and proofs stay valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from airgap.audit.capacity import last_export
from airgap.audit.disk import Disk, open_plain
from airgap.audit.grammar import Line, read_line
from airgap.audit.layout import Layout, read_kept, read_lines, segment_range
from airgap.audit.payloads import MAX_BLOB, SIDES, HolderKey
from airgap.audit.people import Act, require_two
from airgap.audit.previous import NAMES_ONE
from airgap.audit.quorum import load_policy
from airgap.audit.record import (
    Actor,
    Event,
    Record,
    new_ulid,
    parse_line,
    printable,
    sealed_payloads,
)
from airgap.audit.steward import OwnLog
from airgap.audit.tiles import SEGMENT
from airgap.audit.tree import StoredTree
from bundle.envelope import Envelope
from bundle.root import RootDocument
from policy.errors import RefusedError

CODE: Final = "audit.retention"
_MONTH: Final = timedelta(days=31)
_KEPT: Final = frozenset({"key.rotate", "prune"})


@dataclass(frozen=True, slots=True)
class Profile:
    """A retention profile: how long records stay searchable here and retrievable anywhere."""

    name: str
    searchable_months: int
    retrievable_months: int
    basis: str

    def may_go(self, newest: datetime, now: datetime) -> bool:
        """Whether records whose newest is of that time may leave this host."""
        return now - newest > self.searchable_months * _MONTH


PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("m-26-14", 6, 12, "OMB M-26-14; whether it binds this site is for the site to say"),
        Profile("m-21-31-legacy", 12, 18, "OMB M-21-31, rescinded on 2026-05-22"),
    )
}


def site_profile(months: int) -> Profile:
    """Return the site's own profile."""
    return Profile("site", months, months, "the written policy of this site")


@dataclass(frozen=True, slots=True)
class Plan:
    """What may be pruned now: records `first` up to `last`, or nothing and why."""

    first: int
    last: int
    reasons: tuple[str, ...]

    @property
    def segments(self) -> range:
        """Indices of the segments that would go."""
        return range(self.first // SEGMENT, (self.last + 1) // SEGMENT)


def plan(log: OwnLog, profile: Profile, now: datetime) -> Plan:
    """Return the longest range that all conditions allow to go."""
    layout = Layout(log.folder)
    there = segment_range(layout)
    exported, cosigned = last_export(layout).size, cosigned_size(layout, log)
    last = there.start * SEGMENT - 1
    young = f"segment {{}} is younger than {profile.searchable_months} months ({profile.name})"
    reasons: list[str] = []
    for index in there[:-1]:
        end = (index + 1) * SEGMENT
        reasons = [
            text
            for holds, text in (
                (exported >= end, f"exported up to {exported}, segment {index} ends at {end}"),
                (cosigned >= end, f"cosigned up to {cosigned}, segment {index} ends at {end}"),
                (profile.may_go(_newest(layout, index), now), young.format(index)),
            )
            if not holds
        ]
        if reasons:
            break
        last = end - 1
    if len(there) < 2:  # noqa: PLR2004 - the one in which records are written
        reasons = ["the log has one segment, in which records are written"]
    return Plan(there.start * SEGMENT, last, tuple(reasons))


def cosigned_size(layout: Layout, log: OwnLog) -> int:
    """Return the size up to which witnesses of the site's policy stand behind the log."""
    return log.anchored if layout.policy.is_file() and load_policy(layout.policy).quorum else 0


def prune(
    log: OwnLog,
    envelope: Envelope,
    *,
    trust: RootDocument,
    profile: Profile,
    now: datetime,
    actor: Actor,
    disk: Disk | None = None,
) -> Plan:
    """Drop the lines of old segments, on record and in the name of two people.

    Raises:
        RefusedError: `audit.people`; `audit.retention`, what they signed is not allowed to go.
        FaultError: As `AuditLog.append`.

    """
    act, first, second = require_two(envelope, "prune", log.origin, trust, now)
    allowed = plan(log, profile, now)
    wanted = -1 if act.last is None else act.last
    if act.profile != profile.name:
        raise _refused(f"signed under {act.profile!r:.40}, the site keeps {profile.name}")
    if (wanted + 1) % SEGMENT or wanted < allowed.first:
        raise _refused(f"record {wanted} does not end a segment that is there")
    if wanted > allowed.last:
        raise _refused("; ".join(allowed.reasons) or "a segment is still written")
    layout, disk = Layout(log.folder), disk or Disk()
    done = Plan(allowed.first, wanted, ())
    root = StoredTree(layout).root(wanted + 1)
    with _on_record(log, "prune", actor, {
        "first": done.first, "last": done.last, "root": root.hex(), "profile": profile.name,
        "manifest": act.manifest or "", "person_1": first, "person_2": second,
    }) as seq:  # fmt: skip
        _drop(layout, done.segments, seq, disk)
    log.note_freed()
    return done


def purge(
    log: OwnLog,
    envelope: Envelope,
    *,
    trust: RootDocument,
    now: datetime,
    actor: Actor,
    disk: Disk | None = None,
) -> Act:
    """Destroy one encrypted payload, on record and in the name of two people.

    Of an answer that left in pieces every state is destroyed: each is a beginning of the next.

    Raises:
        RefusedError: `audit.people`; `audit.payload`, no such record, payload or file.
        FaultError: As `AuditLog.append`.

    """
    act, first, second = require_two(envelope, "spill.purge", log.origin, trust, now)
    layout, disk = Layout(log.folder), disk or Disk()
    record = parse_line(find_line(layout, act.record if act.record is not None else -1))
    if act.payload is None or act.payload not in sealed_payloads(record):
        raise RefusedError("audit.payload", f"record {act.record} names no payload {act.payload}")
    path = layout.payload(act.payload.removeprefix("sha256:"))
    if not path.is_file():
        raise RefusedError("audit.payload", f"payload {act.payload} is not there; purged before?")
    people = {"reason": printable(act.reason), "person_1": first, "person_2": second}
    for seq, payload in _states(layout, record, act.payload):
        path = layout.payload(payload.removeprefix("sha256:"))
        if path.is_file():
            data = people | {"payload": payload, "record": seq}
            with _on_record(log, "spill.purge", actor, data):
                _destroy(path, disk)
    return act


def choose_payload(line: bytes, side: str) -> tuple[str, str]:
    """Return side and digest of the payload that a record names; `side` chooses among two.

    Raises:
        RefusedError: `audit.payload`; it names none, or two and none was chosen.

    """
    record = parse_line(line)
    named = {each: record[each]["sealed"] for each in SIDES if "sealed" in record.get(each, ())}
    chosen = {each: digest for each, digest in named.items() if side in {"", each}}
    if len(chosen) != 1:
        raise RefusedError(
            "audit.payload",
            f"record {record['seq']} names {len(chosen)} payloads"
            + (f" of side {side!r:.10}" if side else ""),
            hint="choose --side in or out; `airgap audit show` tells which records name payloads",
        )
    return next(iter(chosen.items()))


def open_sealed(
    layout: Layout, line: bytes, holder: HolderKey, *, origin: str, side: str
) -> tuple[str, bytes]:
    """Return side and bytes of the payload that a record names, opened by its holder.

    Raises:
        RefusedError: `audit.payload`; purged, of another key, or not what the record commits to.

    """
    side, digest = choose_payload(line, side)
    path = layout.payload(digest.removeprefix("sha256:"))
    try:
        with open_plain(path) as file:
            blob = file.read(MAX_BLOB + 1)
    except FileNotFoundError:
        raise RefusedError(
            "audit.payload",
            f"the payload {digest} is not here: purged, pruned or left out of an export",
            hint="airgap audit show --kind spill.purge",
        ) from None
    if hashlib.sha256(blob).hexdigest() != digest.removeprefix("sha256:"):
        raise RefusedError("audit.payload", f"the blob {path.name} is not what the record names")
    return side, holder.open(blob, parse_line(line), origin=origin, side=side)


def find_line(layout: Layout, seq: int) -> bytes:
    """Return the line of a record, without newline; RefusedError `audit.absent` if it is gone."""
    there = segment_range(layout)
    if seq // SEGMENT in there:
        for number, line in enumerate(read_lines(layout.segment(seq // SEGMENT))):
            if number == seq % SEGMENT and line.endswith(b"\n"):
                return line[:-1]
    raise RefusedError(
        "audit.absent",
        f"no line of record {seq} in {layout.folder}",
        hint="a pruned record lives on in the exports",
    )


def _states(layout: Layout, record: Record, payload: str) -> Iterator[tuple[int, str]]:
    """Yield record and digest of the payload and of all states of the same side and request."""
    yield int(record["seq"]), payload
    side = next(side for side in SIDES if record.get(side, {}).get("sealed") == payload)
    request = str(record.get("req", "")).encode()
    for line, found in _lines(layout, segment_range(layout)):
        if request and found.req == request and found.sealed:
            other = parse_line(line).get(side, {}).get("sealed", payload)
            if other != payload:
                yield found.seq, other


# -- steps -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _on_record(log: OwnLog, kind: str, actor: Actor, data: dict[str, Any]) -> Iterator[int]:
    """Put an act on record before it begins and as it ended; yields the number of the intent."""
    req = new_ulid()
    intent = log.append(Event(kind, "intent", req=req, actor=actor, data=data))
    result = "failed"
    try:
        yield intent.seq
        result = "complete"
    finally:
        outcome = {"result": result}
        log.append(Event(kind, "outcome", req=req, actor=actor, data=outcome))


def _drop(layout: Layout, segments: range, intent: int, disk: Disk) -> None:
    """Remove lines, and the objects and payloads that only they name; leaf hashes stay."""
    kept = read_kept(layout)
    kept[intent] = find_line(layout, intent)
    gone: set[bytes] = set()
    for line, found in _lines(layout, segments):
        begins = found.seq == 0 and NAMES_ONE in line  # in place of a log before
        if found.kind in _KEPT or begins:
            kept[found.seq] = line
        if not begins:
            gone.update(found.cited, found.sealed)
    there = segment_range(layout)
    for _, found in _lines(layout, range(segments.stop, there.stop)):
        gone.difference_update(found.cited, found.sealed)
    content = b"".join(kept[seq] + b"\n" for seq in sorted(kept))
    disk.put(layout.kept, content)
    for index in segments:  # From the oldest: what is left is one range at every moment.
        disk.unlink(layout.segment(index))
        disk.sync_folder(layout.segment(index).parent)
    for digest in sorted(gone):
        name = digest[7:].decode()
        for path in (layout.object(name), layout.payload(name)):
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(path)


def _lines(layout: Layout, segments: range) -> Iterator[tuple[bytes, Line]]:
    for index in segments:
        for raw in read_lines(layout.segment(index)):
            if raw.endswith(b"\n"):
                yield raw[:-1], read_line(raw[:-1])


def _destroy(path: Path, disk: Disk) -> None:
    """Overwrite and remove; on a disk that remaps blocks only destroying the key is sure."""
    fd = disk.open(path, os.O_WRONLY)
    try:
        disk.pwrite(fd, bytes(path.stat().st_size), 0)
        disk.fsync(fd)
    finally:
        os.close(fd)
    disk.unlink(path)
    disk.sync_folder(path.parent)


def _newest(layout: Layout, index: int) -> datetime:
    """Return the time on the last line of a segment."""
    with open_plain(layout.segment(index)) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 2 * 16_384))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    return datetime.fromisoformat(parse_line(last)["ts"]).astimezone(UTC)


def export_digest(path: Path) -> str:
    """Return the digest of an export's manifest, as an act of pruning cites it."""
    with open_plain(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _refused(message: str) -> RefusedError:
    return RefusedError(
        CODE,
        f"this range may not be pruned: {message}",
        hint="export, let the witnesses cosign, wait for the retention time; nothing was removed",
    )
