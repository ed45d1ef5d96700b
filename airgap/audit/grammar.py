"""The record schema as one regular expression for each kind and phase: verification at speed.

A line that matches is canonical and valid: the keys come in the one order, without spaces, each
value is of its type and within its limit, the rules of `RULES` hold. A line that does not match is
not judged here but by `parse_line`, which says what is wrong. So the language of these patterns is
a part of what `parse_line` accepts (a property test holds that); texts with an escape and numbers
of 16 digits are left to it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from airgap.audit.record import (
    KINDS,
    MAX_LINE,
    OBJECT_KEYS,
    RESULTS,
    RULES,
    Record,
    citations,
    parse_line,
    sealed_payloads,
)

_TEXT: Final = r"[ !#-\[\]-~]"  # printable ASCII without quote and backslash
_WHOLE: Final = r"(?:0|[1-9][0-9]{0,14})"
_SIGNED: Final = r"(?:0|-?[1-9][0-9]{0,14})"
_HEX: Final = r"[0-9a-f]{64}"
_SHA256: Final = rf"sha256:{_HEX}"
_ULID: Final = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"
_WORD: Final = r"[A-Za-z0-9._-]{1,64}"
_ERROR: Final = r'(?=[^"]{1,32}")[a-z0-9_]+\.[a-z0-9_.-]+'
_OUTCOME: Final = "permit|permit_with_obligations|needs_approval|deny"
_TIME: Final = r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]\.[0-9]{6}Z"
_DATA: Final = {
    str: rf'"{_TEXT}{{0,256}}"',
    int: _SIGNED,
    bool: "(?:true|false)",
    list: rf'\[(?:"{_TEXT}{{0,256}}"(?:,"{_TEXT}{{0,256}}"){{0,47}})?\]',
}
# Kinds that steer verification itself are rare, and their records are wanted whole.
_WHOLE_RECORD: Final = frozenset({"key.rotate", "prune", "spill.purge"})
_CITED: Final = tuple(sorted(OBJECT_KEYS))
_GROUPS: Final = (
    "seq", "prev", "phase", "req", "inst", "mono", "decision", *_CITED, "sealed_in", "sealed_out",
    "err",
)  # fmt: skip
_KIND: Final = b'"kind":"'
_PHASE: Final = b'"phase":"'


class Line(NamedTuple):
    """What verification needs of a valid line; text is in the bytes of the line."""

    seq: int
    prev: bytes  # 64 hexadecimal digits
    kind: str
    phase: str
    req: bytes  # empty where there is none
    inst: bytes
    mono_ns: int
    cited: tuple[bytes, ...]  # objects, `sha256:<hex>`
    sealed: tuple[bytes, ...]  # encrypted payloads, `sha256:<hex>`
    record: Record | None  # the whole record, for kinds that verification itself obeys


def read_line(line: bytes) -> Line:
    """Return what a line (without newline) says, if it is a valid record; `parse_line` for speed.

    Raises:
        RefusedError: `audit.record`.

    """
    at = line.find(_KIND)
    to = line.find(_PHASE, at)
    key = line[at : line.find(b'"', at + 8)] + line[to : line.find(b'"', to + 9)]
    known = _compiled.get(key) or _find(key)
    matched = known and len(line) <= MAX_LINE and known.pattern.fullmatch(line)
    if known is None or not matched:
        return _of_record(parse_line(line))
    seq, prev, req, inst, mono, decision, one, two, three, inner, outer, failed = matched.group(
        "seq", "prev", "req", "inst", "mono", "decision", "evidence", "screen", "settings",
        "sealed_in", "sealed_out", "err",
    )  # fmt: skip
    if known.needs_reason and failed is None and decision is None:
        return _of_record(parse_line(line))
    cited: tuple[bytes, ...] = ()
    if decision or one or two or three:
        cited = tuple([each for each in (decision, one, two, three) if each])
    sealed: tuple[bytes, ...] = ()
    if inner or outer:
        sealed = tuple([each for each in (inner, outer) if each])
    return Line(
        int(seq), prev, known.kind, known.phase, req or b"", inst, int(mono), cited, sealed, None
    )


def _of_record(record: Record) -> Line:
    return Line(
        record["seq"], record["prev"].encode(), record["kind"], record["phase"],
        record.get("req", "").encode(), record["inst"].encode(), int(record["mono_ns"]),
        tuple(digest.encode() for digest in citations(record)),
        tuple(digest.encode() for digest in sealed_payloads(record)),
        record if record["kind"] in _WHOLE_RECORD else None,
    )  # fmt: skip


class _Known(NamedTuple):
    """The pattern of one kind and phase."""

    kind: str
    phase: str
    pattern: re.Pattern[bytes]
    needs_reason: bool  # a decision or an error code


_NAMES: Final = {
    f'"kind":"{kind}"phase":"{phase}'.encode(): (kind, phase)
    for kind in KINDS
    for phase in RULES[kind].phases
    if kind not in _WHOLE_RECORD
}
_compiled: dict[bytes, _Known] = {}  # filled when a kind and phase is first met


def _find(key: bytes) -> _Known | None:
    """Return the pattern for the bytes that name kind and phase; None where there is none."""
    names = _NAMES.get(key)
    if names is None:
        return None
    known = _compiled[key] = _Known(*names, _compile(*names), names[0] == "denial")
    return known


def _compile(kind: str, phase: str) -> re.Pattern[bytes]:
    """Write the members of a record in their order, each required, optional or forbidden."""
    rule = RULES[kind]
    required = {"kind", "phase"} | ({"actor"} if rule.person else set())
    forbidden = set()
    if phase != "event":
        required.add("req")
    if phase == "outcome":
        required.add("data")
    if kind == "inference":
        required |= _INFERENCE[phase]
        forbidden = {"err"} if phase == "outcome" else set()
    if kind == "decision":
        required |= {"decision", "project"}
    result = "complete" if kind == "inference" else "|".join(sorted(RESULTS))
    data = _members(rule.data, result if phase == "outcome" else "")
    members = _owned() | {
        "actor": (
            rf'\{{"auth":"(?:peercred|self|local)"(?:,"name":"{_TEXT}{{1,64}}")?'
            rf'(?:,"role":"{_TEXT}{{1,32}}")?,"uid":{_WHOLE}\}}'
        ),
        "data": data,
        "decision": (
            rf'\{{"id":"(?P<decision>{_SHA256})","outcome":"(?:{_OUTCOME})"'
            rf'(?:,"rule":"{_TEXT}{{1,128}}")?\}}'
        ),
        "err": rf'\{{"code":"(?P<err>{_ERROR})"\}}',
        "in": _commit("sealed_in"),
        "kind": f'"{re.escape(kind)}"',
        "label": rf'"{_TEXT}{{1,64}}"',
        "lat_ms": _WHOLE,
        "model": f'"{_SHA256}"',
        "out": _commit("sealed_out"),
        "part": _WHOLE,
        "phase": f'"(?P<phase>{phase})"',
        "policy": f'"{_SHA256}"',
        "project": f'"{_WORD}"',
        "req": f'"(?P<req>{_ULID})"',
        "src": rf'"{_TEXT}{{1,64}}"',
        "tok": rf'\{{"in":{_WHOLE},"out":{_WHOLE}\}}',
    }
    required |= _owned().keys()
    text = "".join(
        f'"{name}":{members[name]},' if name in required else f'(?:"{name}":{members[name]},)?'
        for name in sorted(members.keys() - forbidden)
    )
    absent = "".join(f"(?P<{name}>(?!))?" for name in _GROUPS if f"(?P<{name}>" not in text)
    return re.compile(rf'\{{{text}"v":1\}}{absent}'.encode())


def _owned() -> dict[str, str]:
    """Return the members that the owner of the log adds; all are required."""
    return {
        "boot": '"[0-9a-f-]{36}"',
        "host": '"[a-z0-9.-]{1,64}"',
        "inst": f'"(?P<inst>{_ULID})"',
        "mono_ns": '"(?P<mono>[0-9]{1,20})"',
        "prev": f'"(?P<prev>{_HEX})"',
        "seq": f"(?P<seq>{_WHOLE})",
        "ts": f'"{_TIME}"',
    }


def _commit(group: str) -> str:
    return rf'\{{"bytes":{_WHOLE},"commit":"{_HEX}"(?:,"sealed":"(?P<{group}>{_SHA256})")?\}}'


def _members(known: dict[str, type], result: str) -> str:
    """Return `data` of a kind: any of its keys in order; `result` is what an outcome may say."""
    parts = []
    for key in sorted(known):
        value = _DATA[known[key]]
        if key in OBJECT_KEYS:
            value = f'"(?P<{key}>{_SHA256})"'
        if key == "result" and result:
            parts.append(rf'"result":"(?:{result})"(?:,|(?=\}}))')
        else:
            parts.append(rf'(?:"{key}":{value}(?:,|(?=\}})))?')
    return rf"\{{{''.join(parts)}(?<!,)\}}"


# What an inference needs; an outcome other than a complete one is left to `parse_line`.
_INFERENCE: Final = {
    "intent": frozenset({"project", "decision", "model", "in"}),
    "chunk": frozenset({"project", "part", "out"}),
    "outcome": frozenset({"project", "out", "tok"}),
}
