"""OSCAL documents: a component definition, a fragment of a system security plan, rows of a POA&M.

Obeys docs/design/policy.md, 12. They carry statements and links to evidence. Implementation status,
system facts that nobody gave, and risk decisions are left to the institution, marked `TO_COMPLETE`.
The form is OSCAL 1.2.1; tests validate it against the schemas of NIST.

Pure: time, version and identifiers come from the caller. Identifiers are UUIDs of version 5 over
what they name, so that the same content gives the same document.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from policy.terms import URI_BASE

OSCAL_VERSION = "1.2.1"
CATALOG_R3 = (
    "https://raw.githubusercontent.com/usnistgov/oscal-content/main/nist.gov/SP800-171/rev3/json/"
    "NIST_SP800-171_rev3_catalog.json"
)
CATALOG_R2 = "https://doi.org/10.6028/NIST.SP.800-171r2"
"""Revision 2 has no OSCAL catalog of NIST; its numbers are given as they stand in the text."""
TO_COMPLETE = "TO COMPLETE by the institution"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, URI_BASE)
_NAMESPACE = f"{URI_BASE}oscal"


@dataclass(frozen=True, slots=True)
class Statement:
    """What this product does towards one requirement; `control` is its number in the catalog."""

    control: str
    text: str
    part: str
    rest: str
    records: int | None = None


@dataclass(frozen=True, slots=True)
class OpenItem:
    """One row of a plan of action: what is open, where that was seen, and who owns it."""

    key: str
    title: str
    text: str
    source: str
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """What stands at the top of each document."""

    title: str
    author: str
    now: datetime
    version: str
    gaps: Sequence[str] = ()


def identifier(*parts: str) -> str:
    """Return the identifier of something named by `parts`."""
    return str(uuid.uuid5(_SPACE, "\n".join(parts)))


def component_definition(
    head: Head,
    *,
    component: str,
    description: str,
    r2: Iterable[Statement],
    r3: Iterable[Statement],
    props: Mapping[str, str],
) -> dict[str, Any]:
    """Return a component definition with statements for both revisions of SP 800-171."""
    sets = [
        _control_set("r2", CATALOG_R2, "NIST SP 800-171, revision 2", list(r2), prefix=""),
        _control_set(
            "r3", CATALOG_R3, "NIST SP 800-171, revision 3", list(r3), prefix="SP_800_171_"
        ),
    ]
    return {
        "component-definition": {
            "uuid": identifier("component-definition", component, head.version),
            "metadata": metadata(head),
            "components": [
                {
                    "uuid": identifier("component", component),
                    "type": "software",
                    "title": component,
                    "description": description,
                    "props": _props(props),
                    "control-implementations": [each for each in sets if each],
                }
            ],
        }
    }


def ssp_fragment(
    head: Head,
    *,
    system: str,
    component: str,
    description: str,
    statements: Iterable[Statement],
    users: Sequence[str],
    props: Mapping[str, str],
) -> dict[str, Any]:
    """Return a system security plan with what this product can say, the rest to be completed."""
    part = identifier("component", component)
    return {
        "system-security-plan": {
            "uuid": identifier("ssp", system, head.version),
            "metadata": metadata(head),
            "import-profile": {"href": CATALOG_R3, "remarks": f"{TO_COMPLETE}: the own profile"},
            "system-characteristics": {
                "system-ids": [{"id": system}],
                "system-name": system,
                "description": f"{TO_COMPLETE}: what the system is for.",
                "system-information": {
                    "information-types": [
                        {
                            "title": TO_COMPLETE,
                            "description": f"{TO_COMPLETE}: kinds of information.",
                        }
                    ]
                },
                "status": {"state": "other", "remarks": TO_COMPLETE},
                "authorization-boundary": {"description": f"{TO_COMPLETE}: the boundary."},
            },
            "system-implementation": {
                "users": [
                    {"uuid": identifier("user", each), "title": each, "role-ids": [_token(each)]}
                    for each in users or ("user",)
                ],
                "components": [
                    {
                        "uuid": part,
                        "type": "software",
                        "title": component,
                        "description": description,
                        "props": _props(props),
                        "status": {"state": "other", "remarks": TO_COMPLETE},
                    }
                ],
            },
            "control-implementation": {
                "description": "What one component does. Implementation status is left out on"
                " purpose: the institution states it.",
                "implemented-requirements": [
                    {
                        "uuid": identifier("requirement", system, each.control),
                        "control-id": f"SP_800_171_{each.control}",
                        "by-components": [
                            {
                                "component-uuid": part,
                                "uuid": identifier("by-component", system, each.control),
                                "description": each.text,
                                "props": _statement_props(each),
                                "remarks": f"Responsibility {each.part}; with the institution: "
                                f"{each.rest}",
                            }
                        ],
                    }
                    for each in statements
                ],
            },
        }
    }


def poam(head: Head, *, system: str, items: Sequence[OpenItem]) -> dict[str, Any]:
    """Return a plan of action and milestones with one row for each open item."""
    rows = items or (
        OpenItem("none", "No open item was found", "Nothing is open in what was looked at.", "-"),
    )
    return {
        "plan-of-action-and-milestones": {
            "uuid": identifier("poam", system, head.version, *(each.key for each in rows)),
            "metadata": metadata(head),
            "system-id": {"id": system},
            "poam-items": [
                {
                    "uuid": identifier("poam-item", system, each.key),
                    "title": each.title,
                    "description": each.text,
                    "props": _props({"source": each.source, "owner": each.owner}),
                    "remarks": f"{TO_COMPLETE}: milestones, dates and risk.",
                }
                for each in rows
            ],
        }
    }


def metadata(head: Head) -> dict[str, Any]:
    """Return the metadata of a document, with its author and known gaps."""
    party = identifier("party", head.author)
    return {
        "title": head.title,
        "last-modified": head.now.isoformat(timespec="seconds"),
        "version": head.version,
        "oscal-version": OSCAL_VERSION,
        "roles": [{"id": "creator", "title": "Author of this document"}],
        "parties": [{"uuid": party, "type": "person", "name": head.author}],
        "responsible-parties": [{"role-id": "creator", "party-uuids": [party]}],
        "remarks": "Statements of evidence. Whether a requirement is met is for the institution's"
        f" assessor. Known gaps: {'; '.join(head.gaps) or 'none stated'}.",
    }


def _control_set(
    name: str, source: str, title: str, statements: Sequence[Statement], *, prefix: str
) -> dict[str, Any]:
    if not statements:
        return {}
    return {
        "uuid": identifier("control-implementation", name),
        "source": source,
        "description": title,
        "implemented-requirements": [
            {
                "uuid": identifier("implemented-requirement", name, each.control),
                "control-id": _control_id(prefix, each.control),
                "description": each.text,
                "props": _statement_props(each),
                "remarks": f"Responsibility {each.part}; with the institution: {each.rest}",
            }
            for each in statements
        ],
    }


def _control_id(prefix: str, number: str) -> str:
    return f"{prefix}{number}" if prefix else f"r2_{number}"  # a token begins with a letter


def _statement_props(each: Statement) -> list[dict[str, str]]:
    found = {"responsibility": each.part}
    if each.records is not None:
        found["records"] = str(each.records)
    return _props(found)


def _props(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": _token(name), "ns": _NAMESPACE, "value": value.strip()}
        for name, value in values.items()
        if value.strip()
    ] or [{"name": "none", "ns": _NAMESPACE, "value": "none"}]


def _token(text: str) -> str:
    """Return text as an OSCAL token: letters, digits, `.`, `-`, `_`, a letter first."""
    kept = "".join(c if c.isalnum() or c in ".-_" else "-" for c in text)
    return kept if kept[:1].isalpha() or kept[:1] == "_" else f"_{kept}"
