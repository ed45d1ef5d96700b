"""Rows that derive from records: JSON lines, CSV, and the table of formats (design, 10).

The signed lines are the evidence; a row is a convenience that leads back to them by sequence
number, leaf hash and origin. Rows are a function of the line alone, so a verifier can write them
again and compare.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from airgap.audit.export.fields import Format
from airgap.audit.export.ocsf import ocsf_row
from airgap.audit.export.siem import EXAMPLE_ENTERPRISE, cef_row, hec_row, syslog_row

_SAFE_START: Final = frozenset("=+-@\t\r")
# Column, and where its value lies in a record.
_COLUMNS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("ts", ("ts",)),
    ("host", ("host",)),
    ("kind", ("kind",)),
    ("phase", ("phase",)),
    ("req", ("req",)),
    ("person", ("actor", "name")),
    ("role", ("actor", "role")),
    ("uid", ("actor", "uid")),
    ("auth", ("actor", "auth")),
    ("project", ("project",)),
    ("decision", ("decision", "id")),
    ("outcome", ("decision", "outcome")),
    ("rule", ("decision", "rule")),
    ("policy", ("policy",)),
    ("model", ("model",)),
    ("in_bytes", ("in", "bytes")),
    ("in_commit", ("in", "commit")),
    ("out_bytes", ("out", "bytes")),
    ("out_commit", ("out", "commit")),
    ("tok_in", ("tok", "in")),
    ("tok_out", ("tok", "out")),
    ("lat_ms", ("lat_ms",)),
    ("error", ("err", "code")),
    ("label", ("label",)),
    ("part", ("part",)),
    ("inst", ("inst",)),
    ("boot", ("boot",)),
)


def _jsonl_row(origin: str, record: Mapping[str, Any], line: bytes, leaf: bytes) -> bytes:
    """Return the record's own bytes inside an object that says where they come from."""
    head = orjson.dumps({"leaf": leaf.hex(), "origin": origin})[:-1]
    return b'%s,"record":%s,"seq":%d}\n' % (head, line, record["seq"])


def _csv_row(origin: str, record: Mapping[str, Any], line: bytes, leaf: bytes) -> bytes:
    """Return one CSV row, RFC 4180; each cell is safe to open in a spreadsheet."""
    del line
    cells = [record["seq"], leaf.hex(), origin]
    cells += [_find(record, path) for _, path in _COLUMNS]
    data = record.get("data")
    cells.append(orjson.dumps(data, option=orjson.OPT_SORT_KEYS).decode() if data else "")
    return _csv_line([guard(str(cell)) for cell in cells])


def guard(cell: str) -> str:
    """Return `cell` so that no spreadsheet takes it for a formula."""
    return f"'{cell}" if cell[:1] in _SAFE_START else cell


def _find(record: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for name in path:
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return value


def _csv_line(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().encode()


FORMATS: Final[dict[str, Format]] = {
    "jsonl": Format("jsonl", "records.jsonl", b"", _jsonl_row),
    "csv": Format(
        "csv",
        "records.csv",
        _csv_line(["seq", "leaf", "origin", *(name for name, _ in _COLUMNS), "data"]),
        _csv_row,
    ),
    "ocsf": Format("ocsf", "records.ocsf", b"", ocsf_row),
    "rfc5424": Format("rfc5424", "records.rfc5424", b"", syslog_row(EXAMPLE_ENTERPRISE)),
    "cef": Format("cef", "records.cef", b"", cef_row),
    "hec": Format("hec", "records.hec", b"", hec_row),
}
_ENTERPRISE: Final = re.compile("rfc5424-([1-9][0-9]{0,7})")


def find_format(name: str) -> Format | None:
    """Return a format by its name; `rfc5424-<number>` has the site's own enterprise number."""
    if own := _ENTERPRISE.fullmatch(name):
        return Format(name, "records.rfc5424", b"", syslog_row(int(own[1])))
    return FORMATS.get(name)
