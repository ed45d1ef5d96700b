"""Use in figures: by award, person, model, outcome and time, in one pass over a log of any length.

What is kept is one counter for each name and the requests that are still open, so memory does not
grow with the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from airgap.audit.query import Filter
from airgap.audit.record import Record
from airgap.dossier.chart import Chart, Item
from airgap.dossier.page import Page, Section
from airgap.dossier.reports import LOG_LIMITS, About, banner_of, log_section, page_of
from airgap.dossier.usage import LogFacts, Usage, signed_records
from policy.wording import counted

BARS_SHOWN = 20
"""Bars of a chart; the table and the JSON form hold all."""
_HOURS_UP_TO, _DAYS_UP_TO = 3, 92  # days that a chart by the hour, or by the day, spans
_SHOWN_ROWS = 200


@dataclass(slots=True)
class Total:
    """What one name adds up to."""

    requests: int = 0
    answered: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    ms: int = 0

    @property
    def tokens(self) -> int:
        """Both ways."""
        return self.tokens_in + self.tokens_out

    def add(self, other: Total) -> None:
        """Add another one."""
        self.requests += other.requests
        self.answered += other.answered
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.ms += other.ms

    def document(self) -> dict[str, int]:
        """Return the JSON form."""
        return {
            "requests": self.requests,
            "answered": self.answered,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "milliseconds": self.ms,
        }


@dataclass(slots=True)
class Totals:
    """All counters of one pass."""

    whole: Total = field(default_factory=Total)
    awards: dict[str, Total] = field(default_factory=dict)
    people: dict[str, Total] = field(default_factory=dict)
    models: dict[str, Total] = field(default_factory=dict)
    outcomes: dict[str, Total] = field(default_factory=dict)
    hours: dict[str, Total] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Total] = field(default_factory=dict)  # award and person
    examined: int = 0
    first_ts: str = ""
    last_ts: str = ""

    def take(self, use: Usage, total: Total) -> None:
        """Add one request, or refusals that one record joins."""
        award, person = use.project or "(none)", use.person or "(unnamed)"
        hour = use.begun[:13]
        self.whole.add(total)
        for counters, name in (
            (self.awards, award), (self.people, person), (self.outcomes, use.result or "open"),
            (self.hours, hour),
        ):  # fmt: skip
            counters.setdefault(name, Total()).add(total)
        if use.model:
            self.models.setdefault(use.model, Total()).add(total)
        self.pairs.setdefault((award, person), Total()).add(total)


def add_up(folder: Path, log: LogFacts, *, since: str = "", until: str = "") -> Totals:
    """Add up the requests under the newest signed head; `until` is not included."""
    found = Totals()
    open_: dict[str, tuple[Usage, Total]] = {}
    within = Filter(since=since, until=until)
    for record in filter(within, signed_records(folder, log)):
        found.examined += 1
        found.first_ts, found.last_ts = found.first_ts or record["ts"], record["ts"]
        if record["kind"] not in {"inference", "denial"}:
            continue
        req, project = record.get("req", ""), record.get("project", "")
        use, total = open_.pop(req) if req in open_ else (Usage(req, project), Total())
        _take(use, total, record)
        if record["phase"] == "outcome" or (record["kind"] == "denial" and len(use.seqs) == 1):
            found.take(use, total)
        else:
            use.seqs = use.seqs[:2]  # only whether there was more than one matters here
            open_[req] = (use, total)
    for use, total in open_.values():
        found.take(use, total)
    return found


def _take(use: Usage, total: Total, record: Record) -> None:
    use.take(record)
    use.project = use.project or record.get("project", "")
    tokens = record.get("tok", {})
    total.requests = max(total.requests, int(record.get("data", {}).get("count", 1)))
    total.tokens_in += tokens.get("in", 0)
    total.tokens_out += tokens.get("out", 0)
    total.ms += record.get("lat_ms", 0)
    total.answered = int(use.result == "answered")


def totals_report(found: Totals, log: LogFacts, about: About) -> Page:
    """Return the page of a log's use, with its charts and the tables behind them."""
    unit, times = _times(found.hours)
    models: dict[str, Total] = {}
    for digest, total in found.models.items():
        models.setdefault(about.model(digest), Total()).add(total)
    document: dict[str, Any] = {
        "format": "airgap/audit-report/1",
        "log": log.document(),
        "period": {"first": found.first_ts, "last": found.last_ts},
        "records_examined": found.examined,
        "whole": found.whole.document(),
        "awards": _documents(found.awards),
        "people": _documents(found.people),
        "models": _documents(found.models),
        "outcomes": _documents(found.outcomes),
        f"time_by_{unit}": _documents(times),
        "awards_and_people": [
            {"award": award, "person": person, **total.document()}
            for (award, person), total in sorted(found.pairs.items())
        ],
    }
    over_time = Chart(f"requests by {unit} (UTC)", _upright(times), upright=True)
    sections = [
        Section(
            "Over time",
            chart=over_time if times else None,
            head=(f"{unit} (UTC)", *_HEAD),
            rows=[(name.replace("T", " "), *_cells(each)) for name, each in times.items()],
            empty="no request in these records",
        ),
        _section("By award", "award", found.awards, _tokens),
        _section("By person", "person", found.people, _tokens),
        _section("By model", "model", models, _tokens),
        _section("By outcome", "outcome", found.outcomes, _requests),
        Section(
            "Award and person",
            head=("award", "person", *_HEAD),
            rows=[
                (*names, *_cells(total))
                for names, total in sorted(found.pairs.items())[:_SHOWN_ROWS]
            ],
            empty="no request in these records",
        ),
        log_section(log),
    ]
    whole = found.whole
    return page_of(
        about,
        document,
        kind="usage report",
        title="Use of models",
        subject=f"{log.origin}, {_day(found.first_ts)} to {_day(found.last_ts)} (UTC)",
        figures=[
            ("requests", f"{whole.requests:,}"), ("answered", f"{whole.answered:,}"),
            ("tokens read", f"{whole.tokens_in:,}"), ("tokens written", f"{whole.tokens_out:,}"),
            ("people", f"{len(found.people):,}"), ("awards", f"{len(found.awards):,}"),
        ],
        sections=sections,
        limits=LOG_LIMITS,
        banner=banner_of(log),
    )  # fmt: skip


_HEAD = ("requests", "answered", "tokens read", "tokens written", "seconds")


def _section(
    title: str, what: str, totals: Mapping[str, Total], measure: Callable[[Total], tuple[int, str]]
) -> Section:
    """Return a chart of the largest and the table of all."""
    order = sorted(totals.items(), key=lambda pair: (-measure(pair[1])[0], pair[0]))
    items = [Item(name, *measure(total)) for name, total in order[:BARS_SHOWN]]
    words = []
    if len(order) > BARS_SHOWN:
        words.append(f"The chart shows the {BARS_SHOWN} largest of {len(order)}.")
    if len(order) > _SHOWN_ROWS:
        words.append(f"The table shows {_SHOWN_ROWS} of {len(order)}; the JSON form has all.")
    return Section(
        title,
        words=words,
        chart=Chart(f"{'requests' if measure is _requests else 'tokens'} by {what}", items)
        if items
        else None,
        head=(what, *_HEAD),
        rows=[(name, *_cells(total)) for name, total in order[:_SHOWN_ROWS]],
        empty="no request in these records",
    )


def _tokens(total: Total) -> tuple[int, str]:
    return total.tokens, f"{counted(total.tokens, 'token')}, {counted(total.requests, 'request')}"


def _requests(total: Total) -> tuple[int, str]:
    return total.requests, f"{counted(total.requests, 'request')}"


def _cells(total: Total) -> tuple[str, ...]:
    seconds = f"{total.ms // 1000:,}"
    numbers = (total.requests, total.answered, total.tokens_in, total.tokens_out)
    return (*(f"{number:,}" for number in numbers), seconds)


def _times(hours: Mapping[str, Total]) -> tuple[str, dict[str, Total]]:
    """Return counters by hour, day or month, as fits the span; days without use are there too."""
    if not hours:
        return "day", {}
    first, last = min(hours), max(hours)
    span = (_date(last) - _date(first)).days
    unit, letters = ("hour", 13) if span < _HOURS_UP_TO else ("day", 10)
    if span > _DAYS_UP_TO:
        unit, letters = "month", 7
    found: dict[str, Total] = {}
    if unit == "day":
        start = _date(first).toordinal()
        found = {date.fromordinal(start + n).isoformat(): Total() for n in range(span + 1)}
    for hour in sorted(hours):
        found.setdefault(hour[:letters], Total()).add(hours[hour])
    return unit, found


def _date(hour: str) -> date:
    try:
        return date.fromisoformat(hour[:10])
    except ValueError:  # a record's time may name a 39th of a month; it orders nothing
        return date.min


def _upright(times: Mapping[str, Total]) -> list[Item]:
    def label(name: str) -> str:
        return f"{name[5:10]} {name[11:]}h" if "T" in name else name[5:] if len(name) > 7 else name  # noqa: PLR2004

    return [
        Item(label(name), total.requests, f"{total.requests:,}") for name, total in times.items()
    ]


def _documents(totals: Mapping[str, Total]) -> dict[str, dict[str, int]]:
    return {name: total.document() for name, total in sorted(totals.items())}


def _day(ts: str) -> str:
    return ts[:10] or "-"
