"""What an OSCAL document of this site says: statements by control, and what is still open here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airgap import oscal
from airgap.approvals import reviews_of
from airgap.config import Site
from airgap.dossier.controls import ROWS
from airgap.dossier.reports import About
from airgap.dossier.usage import Evidence, LogFacts
from airgap.rules import load_rules
from bundle.trust import load_trust
from policy.errors import AirgapError

COMPONENT = "airgap"
DESCRIPTION = (
    "Carries open-weight scientific models into a secured system: signed bundles, rules with "
    "citations that decide admission and use, processes without a network, and a log that can be "
    "verified with public keys."
)
GAPS = (
    "the module for cryptography is not a validated one unless the site records another",
    "controls of the host are not described here",
    "titles of requirements are left to the publication",
)


def oscal_documents(
    evidence: Evidence, site: Site, about: About, tree: Path, log: LogFacts
) -> dict[str, dict[str, Any]]:
    """Return the three documents by file name."""
    head = oscal.Head("", about.author, about.now, about.version, GAPS)
    props = {
        "log": log.origin,
        "log-records": str(log.size),
        "log-verification": log.verdict,
        "crypto-module": _crypto(site),
    }
    system = site.system.id
    return {
        "component-definition.json": oscal.component_definition(
            _titled(head, "Component definition of airgap"),
            component=COMPONENT,
            description=DESCRIPTION,
            r2=_statements(evidence, "r2"),
            r3=_statements(evidence, "r3"),
            props=props,
        ),
        "ssp-fragment.json": oscal.ssp_fragment(
            _titled(head, f"Fragment of the system security plan of {system}"),
            system=system,
            component=COMPONENT,
            description=DESCRIPTION,
            statements=_statements(evidence, "r3"),
            users=sorted({role for person in site.person for role in person.roles}),
            props=props,
        ),
        "poam.json": oscal.poam(
            _titled(head, f"Open items of {COMPONENT} on {system}"),
            system=system,
            items=open_items(site, tree, log),
        ),
    }


def _titled(head: oscal.Head, title: str) -> oscal.Head:
    return oscal.Head(title, head.author, head.now, head.version, head.gaps)


def _crypto(site: Site) -> str:
    crypto = site.system.crypto
    if crypto is None:
        return "not recorded"
    return f"{crypto.module}, {crypto.certificate or 'no certificate'}, {crypto.status}"


def _statements(evidence: Evidence, revision: str) -> Iterable[oscal.Statement]:
    found: dict[str, oscal.Statement] = {}
    for row in ROWS:
        for control in row.r2 if revision == "r2" else row.r3:
            count = row.count(evidence.kinds) if row.kinds else None
            text = f"Evidence emitted: {row.evidence}."
            if control in found:  # two rows of revision 2 share one requirement of revision 3
                text = f"{found[control].text} {text}"
            found[control] = oscal.Statement(control, text, row.part, row.rest, count)
    return found.values()


def open_items(site: Site, tree: Path, log: LogFacts) -> list[oscal.OpenItem]:
    """Return what is open on this site, each with the place where that was seen."""
    items: list[oscal.OpenItem] = []
    rules = load_rules(tree)
    for pack in rules.packs.packs:
        marked = [each.id for each in pack.rules if each.text.verify_before_release]
        if marked:
            items.append(
                oscal.OpenItem(
                    f"pack-{pack.pack_id}-verify",
                    f"Rules of pack {pack.pack_id} await verification",
                    f"{len(marked)} rules say `verify_before_release`: {', '.join(marked)}.",
                    f"pack {pack.pack_id} {pack.version}",
                    "general_counsel",
                )
            )
    items.extend(
        oscal.OpenItem(
            f"list-{snapshot.text.list_id}-{snapshot.text.edition}",
            f"List {snapshot.text.list_id} is partial",
            f"Edition {snapshot.text.edition} lacks names: a name that is not found is unknown.",
            f"list {snapshot.text.list_id}",
            "research_security",
        )
        for snapshot in rules.lists.snapshots
        if not snapshot.text.complete
    )
    if site.system.crypto is None:
        items.append(
            oscal.OpenItem(
                "crypto-record",
                "No cryptographic module is recorded",
                "site.toml has no [system.crypto]: module, certificate, status and day.",
                "site.toml",
                "isso",
            )
        )
    if log.verdict != "good":
        items.append(
            oscal.OpenItem(
                "log-anchors",
                "The log was not compared with an outside head to its end",
                f"{log.size - log.anchored_size} records lie past the last outside head.",
                f"log {log.origin}",
                "security_officer",
            )
        )
    return items + _reviews(tree)


def _reviews(tree: Path) -> list[oscal.OpenItem]:
    try:
        reviews = reviews_of(tree, load_trust(tree / "trust").standing)
    except AirgapError as error:
        return [
            oscal.OpenItem(
                "approvals", "Approvals cannot be read", error.message, "policy/approvals"
            )
        ]
    return [
        oscal.OpenItem(
            f"review-{each.approval.digest.hex[:12]}",
            "A break-glass approval awaits its review",
            f"Rules {', '.join(sorted(each.approval.rules))} for {each.approval.project}: "
            f"{each.approval.reason}",
            f"approval {each.approval.digest}",
            "security_officer",
        )
        for each in reviews
        if each.is_open
    ]
