"""What every derived format needs: a record as flat fields, its time, and how grave it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

Record = Mapping[str, Any]
INFO: Final = "info"
WARNING: Final = "warning"
SERIOUS: Final = "serious"
_GRAVE: Final = {
    "denial": WARNING, "clock.step": WARNING, "recovery": WARNING, "halt": SERIOUS,
    "enclave.incident": SERIOUS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """How a derived file is written: its name, first line and one row a record."""

    name: str
    file: str
    header: bytes
    row: Callable[[str, Record, bytes, bytes], bytes]  # origin, record, line, leaf


def flatten(record: Record) -> dict[str, str]:
    """Return every field of a record as text under one name; a list as JSON.

    Names join with `_`: `actor_name`, `in_commit`, `data_result`. No name of the schema has more
    than 32 characters or a letter outside `a-z 0-9 _`, and no two meet; a test holds that.
    """
    found: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{key}": _text(each) for key, each in value.items()}
        else:
            found[name] = _text(value)
    return found


def epoch_us(ts: str) -> int:
    """Return microseconds since 1970 of a record's time.

    Days are counted by the calendar's rule and not looked up, so that no digits of a record that
    nobody trusts make an error.
    """
    year, month, day = int(ts[:4]), int(ts[5:7]), int(ts[8:10])
    shifted = year - (month <= 2)  # noqa: PLR2004 - the year of this count begins in March
    days = 365 * shifted + shifted // 4 - shifted // 100 + shifted // 400
    days += (153 * ((month + 9) % 12) + 2) // 5 + day - 719_469
    seconds = days * 86_400 + int(ts[11:13]) * 3_600 + int(ts[14:16]) * 60 + int(ts[17:19])
    return seconds * 1_000_000 + int(ts[20:26])


def gravity(record: Record) -> str:
    """Return how much a reader should care: INFO, WARNING or SERIOUS."""
    kind, data = record["kind"], record.get("data", {})
    if kind == "egress.probe" and data.get("result") == "complete":
        return SERIOUS  # something answered from outside
    if kind == "verify.result" and data.get("verdict") == "tampered":
        return SERIOUS
    if kind == "heartbeat" and data.get("state") not in {None, "running"}:
        return WARNING
    if data.get("result") in {"failed", "unknown"}:
        return WARNING
    return _GRAVE.get(kind, INFO)


def summary(record: Record) -> str:
    """Return one line for people: what, who, under which project, how it ended."""
    data = record.get("data", {})
    parts = (
        record["kind"] if record["phase"] == "event" else f"{record['kind']} {record['phase']}",
        record.get("actor", {}).get("name", ""),
        record.get("project", ""),
        record.get("decision", {}).get("outcome", ""),
        str(data.get("result", "")),
        record.get("err", {}).get("code", ""),
    )
    return " ".join(part for part in parts if part)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return orjson.dumps(value).decode()
