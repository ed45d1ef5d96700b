"""Rows for collectors: RFC 5424 syslog, CEF, and events of Splunk's HTTP Event Collector.

Each row carries every field of its record, with sequence number, leaf hash and origin. Records are
printable ASCII, so a row has no line break; what a format gives a meaning to is escaped as it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import orjson

from airgap.audit.export.fields import (
    INFO,
    SERIOUS,
    WARNING,
    Record,
    epoch_us,
    flatten,
    gravity,
    summary,
)

EXAMPLE_ENTERPRISE: Final = 32_473  # RFC 5612: for documentation; a site has its own, or this
SOURCETYPE: Final = "airgap:audit"
_FACILITY: Final = 13  # log audit
_SYSLOG: Final = {INFO: 6, WARNING: 4, SERIOUS: 2}
_CEF: Final = {INFO: 3, WARNING: 6, SERIOUS: 9}


def syslog_row(enterprise: int) -> Callable[[str, Record, bytes, bytes], bytes]:
    """Return the row function of RFC 5424 with structured data under this enterprise number."""

    def row(origin: str, record: Record, line: bytes, leaf: bytes) -> bytes:
        del line
        priority = _FACILITY * 8 + _SYSLOG[gravity(record)]
        fields = flatten(record) | {"leaf": leaf.hex(), "origin": origin}
        data = "".join(f' {name}="{_sd(value)}"' for name, value in fields.items())
        return (
            f"<{priority}>1 {record['ts']} {record['host']} airgap {record['inst']} "
            f"{record['kind']} [airgap@{enterprise}{data}] {summary(record)}\n"
        ).encode()

    return row


def cef_row(origin: str, record: Record, line: bytes, leaf: bytes) -> bytes:
    """Return a line of ArcSight's Common Event Format, version 0.

    Standard keys where they fit; every field once more under `ad.` with its own name.
    """
    del line
    data, actor = record.get("data", {}), record.get("actor", {})
    header = ("airgap", "audit", str(record["v"]), record["kind"], summary(record))
    standard = {
        "rt": epoch_us(record["ts"]) // 1_000,
        "dvchost": record["host"],
        "externalId": record["seq"],
        "suser": actor.get("name"),
        "suid": actor.get("uid"),
        "act": record["phase"],
        "outcome": record.get("decision", {}).get("outcome", data.get("result")),
        "reason": record.get("err", {}).get("code"),
        "cs1Label": "leaf", "cs1": leaf.hex(),
        "cs2Label": "origin", "cs2": origin,
        "cs3Label": "project" if "project" in record else None, "cs3": record.get("project"),
        "cs4Label": "model" if "model" in record else None, "cs4": record.get("model"),
    }  # fmt: skip
    extension = {name: str(value) for name, value in standard.items() if value is not None}
    extension |= {f"ad.{name}": value for name, value in flatten(record).items()}
    text = " ".join(f"{name}={_cef(value)}" for name, value in extension.items())
    start = "|".join(_cef_header(part) for part in header)
    return f"CEF:0|{start}|{_CEF[gravity(record)]}|{text}\n".encode()


def hec_row(origin: str, record: Record, line: bytes, leaf: bytes) -> bytes:
    """Return an event as Splunk's collector takes it; the record's own bytes are inside."""
    second, rest = divmod(epoch_us(record["ts"]), 1_000_000)
    head = orjson.dumps({"leaf": leaf.hex(), "origin": origin})[:-1]
    event = b'%s,"record":%s,"seq":%d}' % (head, line, record["seq"])
    tail = orjson.dumps(
        {"host": record["host"], "source": origin, "sourcetype": SOURCETYPE}
    )  # `time` is a number with a point, which no record may hold: it is written by hand.
    return b'{"event":%s,%s,"time":%d.%06d}\n' % (event, tail[1:-1], second, rest)


def _sd(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


def _cef(value: str) -> str:
    return value.replace("\\", "\\\\").replace("=", "\\=")


def _cef_header(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|")
