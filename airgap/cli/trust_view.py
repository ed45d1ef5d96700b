"""A trust root as a document and in words: people, keys, thresholds, and the line to compare."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.wording import counted

if TYPE_CHECKING:
    from bundle.trust import Trust


def trust_document(trust: Trust, folder: Path) -> dict[str, Any]:
    """Return what `trust show --json` prints."""
    from bundle.fields import format_time

    document = trust.document
    return {
        "format": "airgap/trust/1",
        "path": str(folder / "root.json"),
        "version": trust.version,
        "fingerprint": str(trust.fingerprint),
        "issued": format_time(document.issued),
        "expires": format_time(document.expires),
        "profile": document.profile,
        "revocations": _list_facts(trust),
        "thresholds": document.thresholds.model_dump(mode="json"),
        "people": {
            who: person.model_dump(mode="json", exclude_none=True)
            for who, person in document.people.items()
        },
    }


def _list_facts(trust: Trust) -> dict[str, Any] | None:
    from bundle.fields import format_time

    held = trust.revocations
    if held is None:
        return None
    return {
        "version": held.version,
        "next_update": format_time(held.document.next_update),
        "entries": len(held.document.entries()),
        "alarm": held.alarm(datetime.now(UTC)),
    }


def trust_view(trust: Trust, folder: Path) -> str:
    """Return people and keys, and the line to compare."""
    from bundle.fields import format_time

    document = trust.document
    width = max(len(who) for who in document.people)
    lines: list[str] = []
    for who, person in sorted(document.people.items()):
        since = format_time(person.valid_from)[:10]
        name = "" if person.name == who else f"{person.name}, "
        lines.append(f"{who:<{width}}  {name}{', '.join(person.roles)}, since {since}")
        lines += [f"{'':<{width}}  key {keyid}" for keyid in person.keys]
    seal = document.thresholds.seal
    roles = f", among them {', '.join(seal.required_roles)}" if seal.required_roles else ""
    return "\n".join(
        [
            *lines,
            "",
            f"a bundle needs  {seal.people} approvers beside its builder{roles}",
            f"root            version {trust.version}, until {format_time(document.expires)[:10]}",
            f"profile         {document.profile}",
            _list_line(trust),
            f"document        {folder / 'root.json'}",
            f"fingerprint     {trust.fingerprint}",
        ]
    )


def _list_line(trust: Trust) -> str:
    facts = _list_facts(trust)
    if facts is None:
        return "revocations     no list"
    held = counted(facts["entries"], "entry", "entries")
    line = f"revocations     list {facts['version']}, {held}, the next is due "
    return f"{line}{facts['next_update'][:10]}" + (", STALE" if facts["alarm"] else "")
