"""A decision record becomes a question again, so that it can be asked anew years later.

Only a whole record will do: the public record of a hazard decision has no facts of the screen.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from types import MappingProxyType
from typing import Any

from policy.errors import RefusedError
from policy.evaluator import Request
from policy.paths import Origin, Start
from policy.strict import parse_day
from policy.terms import FACTS, Digest, Fact, Kind, Known, Scope, Unknown, Value

_FORMAT = "airgap/decision/1"


def request_of_record(
    document: Mapping[str, Any], *, leads: frozenset[str] = frozenset()
) -> Request:
    """The question that a record answers.

    `leads` are the principal investigators, whom a record does not name; they only bear on
    approvals.

    Raises:
        RefusedError: `policy.record`, it is no whole decision record of this format.

    """
    if document.get("format") != _FORMAT or "facts_digest" not in document.get("request", {}):
        raise RefusedError(
            "policy.record",
            f"expected a whole record of format {_FORMAT}, found {document.get('format')!r:.60}",
            hint="a record without `facts_digest` is the public part of a hazard decision",
        )
    try:
        return _request(document, leads)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError("policy.record", f"the record is malformed: {error!s:.120}") from error


def times_of_record(document: Mapping[str, Any]) -> tuple[date, datetime]:
    """`as_of` and `known_at` of a record; RefusedError `policy.record`."""
    try:
        known_at = datetime.fromisoformat(document["known_at"])
        return date.fromisoformat(document["as_of"]), known_at
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError("policy.record", f"the record is malformed: {error!s:.120}") from error


def _request(document: Mapping[str, Any], leads: frozenset[str]) -> Request:
    asked = document["request"]
    return Request(
        scope=Scope(document["scope"]),
        bundle=None if asked["bundle"] is None else Digest.parse(asked["bundle"]),
        project=asked["project"],
        task=asked["task"],
        submitter=asked["person"],
        leads=leads,
        facts={
            each["name"]: _fact(each)
            for each in document["facts"]
            if not FACTS[each["name"]].derived and not _was_absent(each)
        },
        starts={
            name: Start(
                tuple(
                    Origin(each["relation"], each["party"], each["sure"], each["source"])
                    for each in start["origins"]
                ),
                MappingProxyType(dict(start["unknown"])),
            )
            for name, start in document["starts"].items()
            if name != "bundle_and_bases"
        },
        screens=tuple(document["screens"]),
        day_source=document["as_of_source"],
    )


_ABSENT = Unknown()


def _was_absent(entry: Mapping[str, Any]) -> bool:
    return entry.get("unknown") == _ABSENT.reason and entry["source"] == _ABSENT.source


def _fact(entry: Mapping[str, Any]) -> Fact:
    derivation = tuple(entry["derivation"])
    if "unknown" in entry:
        return Unknown(entry["unknown"], entry["source"], derivation)
    day = entry["asserted_on"]
    return Known(
        _value(FACTS[entry["name"]].kind, entry["value"]),
        entry["source"],
        entry["asserted_by"],
        None if day is None else date.fromisoformat(day),
        None if entry["evidence"] is None else Digest.parse(entry["evidence"]),
        derivation,
    )


def _value(kind: Kind, value: Any) -> Value:
    if kind is Kind.SET:
        return frozenset(value)
    if kind is Kind.DATE:
        day = parse_day(value)
        if not isinstance(day, date):
            raise ValueError(f"{value!r:.40} is no day")
        return day
    if isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{value!r:.40} is no value of a fact")
