"""What a citation says of itself that can be held against the calendar, offline.

Obeys docs/design/policy.md, 3. Whether a text says what a rule says is for a person to read
(`airgap policy review`). That a volume, a year, a title or a day cannot be right is seen here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date
from typing import Final

# Authorization acts by public law: fiscal year and day of enactment.
_NDAA: Final = {
    "115-232": (2019, date(2018, 8, 13)),
    "116-283": (2021, date(2021, 1, 1)),
    "118-31": (2024, date(2023, 12, 22)),
    "118-159": (2025, date(2024, 12, 23)),
    "119-60": (2026, date(2025, 12, 18)),
}
_FIRST_FR_YEAR = 1935  # volume 1 is 1936
_TITLES: Final = {"U.S.C.": 54, "CFR": 50}

_FORMS: Final = (
    re.compile(r"Pub\. L\. \d{2,3}-\d{1,3}\b"),
    re.compile(r"\bFY\d{4} NDAA s\.\d+"),
    re.compile(r"\b\d{1,2} (?:U\.S\.C\.|CFR)(?: part)? \d+"),
    re.compile(r"\b\d{1,3} FR \d+"),
    re.compile(r"\bDFARS 252\.\d{3}-\d{4}"),
    re.compile(r"\bNOT-OD-\d{2}-\d{3}\b"),
    re.compile(r"\bDOE O \d{3}\.\d[A-Z]?"),
    re.compile(r"\bGov't Code ch\. \d+"),
    re.compile(r"\bCWC Annex on Chemicals, Schedule \d"),
    re.compile(r"\b(?:Community License|Acceptable Use Policy)\b"),
)
_DAY = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_DOCUMENT = re.compile(r"\bFR Doc (\d{4})-(\d{4,5})\b")


def is_identified(text: str) -> bool:
    """Whether some form in `text` names a public text that can be looked up without an address."""
    return any(form.search(text) for form in _FORMS)


def faults(
    text: str, url: str | None, *, rule: str, begins: date | None, editions: Iterable[str] = ()
) -> Iterator[str]:
    """Say what of a citation cannot be right.

    Args:
        text: The citation.
        url: Its address, where one is given.
        rule: Id of the rule, with the fiscal year where the subject has one.
        begins: First day on which the rule is in force, None for always.
        editions: Citations of the editions held of those lists that the rule reads.

    """
    yield from _impossible_days(text)
    yield from _public_laws(text, rule, begins)
    yield from _volumes(text)
    for mark, last in _TITLES.items():
        for title in re.findall(rf"\b(\d+) {re.escape(mark)}", text):
            if not 1 <= int(title) <= last:
                yield f"{title} {mark}: titles go from 1 to {last}"
    notice = re.search(r"NOT-OD-(\d{2})-\d{3} \((\d{4})-", text)
    if notice and int(notice[2]) % 100 not in {int(notice[1]), int(notice[1]) - 1}:
        yield f"{notice[0].rstrip('-')}...): the notice is of another fiscal year"
    yield from _addresses(text, url)
    ours, held = set(_DOCUMENT.findall(text)), set(_DOCUMENT.findall(" ".join(editions)))
    if ours and held and not ours & held:
        found, wanted = ("-".join(min(each)) for each in (ours, held))
        yield f"FR Doc {found}: the list that is held cites FR Doc {wanted}"


def _impossible_days(text: str) -> Iterator[str]:
    for found in _DAY.findall(text):
        try:
            date.fromisoformat(found)
        except ValueError:
            yield f"{found} is no day"


def _public_laws(text: str, rule: str, begins: date | None) -> Iterator[str]:
    laws = re.findall(r"Pub\. L\. (\d{2,3}-\d{1,3})\b", text)
    named = re.match(r"US-NDAA(\d{2})-", rule)
    years = {_NDAA[law][0] for law in laws if law in _NDAA}
    if named and years and 2000 + int(named[1]) not in years:
        yield f"{rule} is of FY20{named[1]}, and the law that is cited is of FY{min(years)}"
    for law in laws:
        if law in _NDAA and begins is not None and begins < _NDAA[law][1]:
            yield f"in force from {begins}, before Pub. L. {law} was enacted on {_NDAA[law][1]}"
    for year in re.findall(r"\(?FY(\d{4})\)?", text):
        if years and int(year) not in years:
            yield f"FY{year}: the law that is cited is of FY{min(years)}"


def _volumes(text: str) -> Iterator[str]:
    documents = _DOCUMENT.findall(text)
    for volume in re.findall(r"\b(\d{1,3}) FR \d+", text):
        year = _FIRST_FR_YEAR + int(volume)
        for of, number in documents:
            if int(of) not in {year, year - 1}:
                yield f"{volume} FR is of {year}, FR Doc {of}-{number} is not"
        days = [date.fromisoformat(each) for each in _DAY.findall(text) if _is_day(each)]
        if days and not any(each.year == year for each in days):
            yield f"{volume} FR is of {year}, and no day of that year stands beside it"


def _addresses(text: str, url: str | None) -> Iterator[str]:
    if url is None:
        return
    if not url.startswith("https://"):
        yield f"{url:.60} is no https address"
    for year, number in _DOCUMENT.findall(text):
        if "federalregister.gov" in url and f"{year}-{number}" not in url:
            yield f"the address is not that of FR Doc {year}-{number}"


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
