"""Names that look alike: a question for a person, never an answer (docs/design/policy.md, 8).

Measured on a real list, similarity flags strangers and misses affiliates with other names. So it
only ever makes a path unknown; registry edges and exact names decide.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

LEAST_RATIO = 0.88  # of difflib, for a misspelt name
LEAST_LETTERS = 5  # shorter names are compared whole or by words only
LEAST_SIGNS = 2  # of a Chinese name inside another

# Words that say what a body does or where it sits, and not who it is.
_COMMON = frozenset(
    {
        *("academy", "ai", "and", "artificial", "beijing", "center", "centre", "china", "chinese"),
        *("cloud", "communications", "computing", "data", "development", "digital", "electronics"),
        *("engineering", "for", "global", "group", "guangzhou", "hangzhou", "holding", "holdings"),
        *("hong", "hub", "industrial", "industries", "industry", "information", "institute"),
        *("intelligence", "international", "kong", "lab", "laboratories", "laboratory", "labs"),
        *("model", "models", "national", "network", "of", "open", "project", "research"),
        *("school", "science", "sciences", "shanghai", "shenzhen", "software", "state", "system"),
        *("systems", "team", "tech", "technologies", "technology", "the", "university"),
    }
)


def look_alike(one: str, other: str) -> bool:
    """Whether two normalised names (`policy.snapshots.normal_name`) may mean one party."""
    if one == other:
        return True
    if _is_chinese(one) or _is_chinese(other):
        shorter, longer = sorted((one.replace(" ", ""), other.replace(" ", "")), key=len)
        return len(shorter) >= LEAST_SIGNS and _is_chinese(shorter) and shorter in longer
    words, others = set(one.split()), set(other.split())
    shared = words & others
    if shared - _COMMON and shared in (words, others):
        return True
    telling, others_telling = words - _COMMON, others - _COMMON
    if telling == others_telling:
        return bool(telling)
    mine, theirs = (" ".join(sorted(each)) for each in (telling, others_telling))
    if min(len(mine), len(theirs)) < LEAST_LETTERS or telling & others_telling:
        return False
    matcher = difflib.SequenceMatcher(a=mine, b=theirs, autojunk=False)
    return matcher.quick_ratio() >= LEAST_RATIO and matcher.ratio() >= LEAST_RATIO


def find_alike(names: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
    """The first pair of the sorted names that look alike; None when none does."""
    keys = sorted(set(others))
    return next(
        ((one, other) for one in sorted(set(names)) for other in keys if look_alike(one, other)),
        None,
    )


def _is_chinese(text: str) -> bool:
    return any(unicodedata.name(each, "").startswith("CJK UNIFIED") for each in text)
