"""Screen packs as text: their fields, checked without RDKit (docs/design/policy.md, 11).

Whoever signs a pack checks it with this; the sealed helper builds it into patterns afterwards.
"""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Mapping
from typing import Any

SCHEMA = "airgap/screen/1"
TIERS = ("H0", "H1", "H2", "H3", "H4")
PACK_LIMIT = 1024 * 1024

# Schedule, part and number of the Annex; number of the Australia Group's list; or, in a pack of a
# site, a class of `policy.terms.SCREEN_CLASSES` and a number of the site's own.
_PARAGRAPH = re.compile(
    r"[123][ab]\d\d|ag\d\d|(?:eccn_1c350|dea_listed|select_agent|toxin):[A-Za-z0-9][A-Za-z0-9.-]{0,31}"
)
_HEAD = frozenset({"schema", "name", "version", "source", "source_date", "author", "reviewer"})
_MAY = frozenset({"reviewed_on", "listed", "family"})
_LISTED = frozenset({"paragraph", "name", "tier", "block", "atoms"})
_FAMILY = frozenset({"paragraph", "text", "tier", "cores", "whole"})
_FAMILY_MAY = frozenset({"groups", "exempt"})
_NAME = re.compile("[a-z0-9][a-z0-9-]{0,31}")
_BLOCK = re.compile("[A-Z]{14}")
_ATOMS = re.compile(r"[A-Z][a-z]?[1-9]\d*( [A-Z][a-z]?[1-9]\d*)*")
_GROUP = re.compile(r"[0-9]{1,3}-[0-9]{1,3}( rings)?")
_LABEL = re.compile("[0-9]{1,3}")


def read_pack(raw: bytes) -> dict[str, Any]:
    """Return the fields of a pack; ValueError for anything that is not one. SMARTS stay texts."""
    if len(raw) > PACK_LIMIT:
        raise ValueError("the screen pack is too large")
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not a screen pack: {error}") from error
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema {document.get('schema')!r:.40}, expected {SCHEMA}")
    _fields(document, _HEAD, _MAY, "the pack")
    _check_head(document)
    for name, check in (("listed", _check_listed), ("family", _check_family)):
        entries = document.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise ValueError(f"the pack has no list of tables in {name!r}")
        for entry in entries:
            check(entry)
    if not document.get("listed") and not document.get("family"):
        raise ValueError("the screen pack is empty")
    return document


def _fields(entry: Mapping[str, Any], must: frozenset[str], may: frozenset[str], what: str) -> None:
    if missing := must - set(entry):
        raise ValueError(f"{what} lacks the field {min(missing)!r}")
    if strange := set(entry) - must - may:
        raise ValueError(f"{what} has an unknown field {min(strange)!r:.40}")


def _check_head(document: Mapping[str, Any]) -> None:
    if not isinstance(document["name"], str) or not _NAME.fullmatch(document["name"]):
        raise ValueError(f"the pack has the name {document['name']!r:.40}, expected a-z, 0-9 and -")
    if type(document["version"]) is not int or document["version"] < 1:
        raise ValueError("the pack has a version that is no number from 1")
    for name in ("source", "author", "reviewer"):
        if not isinstance(document[name], str) or not document[name].strip():
            raise ValueError(f"the pack has no text in {name!r}")
    for name in ("source_date", "reviewed_on"):
        if name in document and type(document[name]) is not dt.date:
            raise ValueError(f"the pack has {document[name]!r:.40} where a day is wanted")


def _check_listed(entry: Mapping[str, Any]) -> None:
    what = f"entry {entry.get('name')!r:.60}"
    _fields(entry, _LISTED, frozenset(), what)
    _check_shared(entry, what)
    if not isinstance(entry["name"], str) or not entry["name"].strip():
        raise ValueError(f"{what} of the pack has no name")
    if not _BLOCK.fullmatch(str(entry["block"])) or not _ATOMS.fullmatch(str(entry["atoms"])):
        raise ValueError(f"{what} of the pack has no InChIKey block, or no atoms such as `C2 O1`")


def _check_family(entry: Mapping[str, Any]) -> None:
    what = f"family {entry.get('paragraph')!r:.60}"
    _fields(entry, _FAMILY, _FAMILY_MAY, what)
    _check_shared(entry, what)
    groups, exempt = entry.get("groups", {}), entry.get("exempt", [])
    good = (
        isinstance(entry["cores"], list)
        and bool(entry["cores"])
        and all(isinstance(core, str) and core.strip() for core in entry["cores"])
        and isinstance(entry["text"], str)
        and type(entry["whole"]) is bool
        and isinstance(groups, dict)
        and all(_LABEL.fullmatch(name) for name in groups)
        and all(_is_group(group) for group in groups.values())
        and isinstance(exempt, list)
        and all(isinstance(block, str) and _BLOCK.fullmatch(block) for block in exempt)
    )
    if not good:
        raise ValueError(f"{what} of the pack has cores, groups or exemptions of another form")


def _is_group(group: object) -> bool:
    """Whether it is a list of spans of carbons such as `1-10 rings`, none of them backwards."""
    if not isinstance(group, list):
        return False
    for text in group:
        if not isinstance(text, str) or not _GROUP.fullmatch(text):
            return False
        least, _, most = text.removesuffix(" rings").partition("-")
        if int(least) > int(most):
            return False
    return bool(group)


def _check_shared(entry: Mapping[str, Any], what: str) -> None:
    if not _PARAGRAPH.fullmatch(str(entry["paragraph"])):
        raise ValueError(f"{what} of the pack has a paragraph of no known form")
    if entry["tier"] not in TIERS:
        raise ValueError(f"{what}: tier {entry['tier']!r:.10} is none of {TIERS}")
