"""An install's connection to the rest of the site: the policy that admits, the log that keeps.

`install` takes both as callables; the command line binds them to this site here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from airgap.audit import Actor, DecisionRef, Event, Receipt, new_ulid
from airgap.audit.layout import Layout, read_lines, segment_count
from airgap.audit.record import parse_line
from airgap.audit.service import Log
from airgap.config import LegalDay, Person, Site
from airgap.gate import decide_admission
from airgap.install.installer import InstallEvent
from airgap.install.lifecycle import ActEvent
from airgap.rules import Rules
from bundle.manifest import Manifest
from policy.approvals import Approvals
from policy.engine import Decision
from policy.terms import Digest

NAME_LIMIT, ROLE_LIMIT = 64, 32  # characters of an actor in a record


def admission(
    site: Site,
    rules: Rules,
    day: LegalDay,
    *,
    project: str | None,
    approvals: Approvals,
    submitter: str | None,
) -> Callable[[Manifest, Digest], Decision]:
    """Return the question that an install asks the policy of this site, once all hashes hold.

    `submitter` is who brings the bundle in, and so can never be the one who approves it.
    """

    def gate(manifest: Manifest, digest: Digest) -> Decision:
        return decide_admission(
            site,
            rules,
            manifest.models,
            bundle_digest=digest,
            project=project,
            as_of=day.as_of,
            known_at=day.known_at,
            verified=True,
            submitter=submitter,
            approvals=approvals,
            day_source=day.source,
        )

    return gate


def recorder(
    log: Log, *, actor: Actor | None, project: str | None
) -> Callable[[InstallEvent], Receipt]:
    """Return the callable that puts each step of one install on record, durably."""
    request = new_ulid()
    trust_request = new_ulid()

    def record(event: InstallEvent) -> Receipt:
        if event.phase == "trust":
            return log.append(_trust_event(event, trust_request, actor))
        if event.phase == "admission":
            return log.append(_admission_event(log, event, request, project))
        return log.append(_install_event(log, event, request, actor, project))

    return record


def act_recorder(
    log: Log, *, actor: Actor | None, project: str | None
) -> Callable[[ActEvent], Receipt]:
    """Return the callable that puts an act on releases on record, durably."""
    requests: dict[Digest, str] = {}

    def record(event: ActEvent) -> Receipt:
        digest = event.target.digest
        request = requests.setdefault(digest, new_ulid())
        if event.phase == "admission":
            return log.append(
                _admission_record(
                    log,
                    event.decision,
                    event.target.manifest,
                    digest,
                    request=request,
                    project=project or "",
                )
            )
        manifest = event.target.manifest
        facts = {"object": _printable(f"{manifest.name}-{manifest.version}")}
        if event.previous is not None:
            facts["old"] = str(event.previous)
        if event.act != "remove" and event.result == "complete":
            facts["new"] = str(digest)
        if event.result:
            facts["result"] = event.result
        if event.approval is not None:
            facts["evidence"] = str(log.put_object(event.approval.statement.to_bytes()))
        return log.append(
            Event(
                f"admin.{event.act}",
                event.phase,
                req=request,
                actor=actor,
                project=project or "",
                model=digest,
                err=event.code,
                data=facts,
            )
        )

    return record


def find_submitter(site: Site, uid: int, account: str) -> Person | None:
    """Return the person of site.toml behind an account, if there is one."""
    for person in site.person:
        if person.uid == uid or (person.uid is None and person.account == account):
            return person
    return None


def actor_of(person: Person) -> Actor:
    """Return how the log names a person: by the id where a record, in ASCII, lacks the letters."""
    name, role = person.name or "", min(person.roles, default="")
    return Actor(
        name if _fits(name, NAME_LIMIT) else person.id, role if _fits(role, ROLE_LIMIT) else ""
    )


def _fits(text: str, limit: int) -> bool:
    return 0 < len(text) <= limit and all(" " <= c <= "~" for c in text)


def last_record(root: Path) -> datetime | None:
    """Return the time of the newest record of the tree's log, None when there is none."""
    layout = Layout(root / "audit")
    if not layout.log.is_dir():
        return None
    for index in reversed(range(segment_count(layout))):
        newest = b""
        for line in read_lines(layout.segment(index)):
            if line.endswith(b"\n"):
                newest = line
        if newest:
            return datetime.fromisoformat(parse_line(newest.removesuffix(b"\n"))["ts"])
    return None


def _install_event(
    log: Log, event: InstallEvent, request: str, actor: Actor | None, project: str | None
) -> Event:
    facts: dict[str, Any] = {"object": _printable(event.path.name)}
    if event.previous is not None:
        facts["old"] = str(event.previous)
    if event.result:
        facts["result"] = event.result
    if event.result == "complete":
        facts["new"] = str(event.digest)
    if event.proofs:
        facts["parity"] = [_printable(each.text) for each in event.proofs][:48]
    if event.approval is not None and event.act == "rollback":
        facts["evidence"] = str(log.put_object(event.approval.statement.to_bytes()))
    return Event(
        f"admin.{event.act}",
        event.phase,
        req=request,
        actor=actor,
        project=project or "",
        model=event.digest or "",
        err=event.code,
        data=facts,
    )


def _trust_event(event: InstallEvent, request: str, actor: Actor | None) -> Event:
    facts = {"object": "trust root", **({"result": event.result} if event.result else {})}
    if event.trust is not None:
        facts["new"] = f"version {event.trust.version} {event.trust.fingerprint}"
    phase = "outcome" if event.result else "intent"
    return Event("admin.trust", phase, req=request, actor=actor, data=facts)


def _admission_event(log: Log, event: InstallEvent, request: str, project: str | None) -> Event:
    if event.manifest is None or event.digest is None:
        raise TypeError("an admission is recorded with the bundle that it is about")
    return _admission_record(
        log, event.decision, event.manifest, event.digest, request=request, project=project or ""
    )


def _admission_record(
    log: Log, decision: object, manifest: Manifest, digest: Digest, *, request: str, project: str
) -> Event:
    if not isinstance(decision, Decision):
        raise TypeError("an admission is recorded with the decision of the policy")
    return Event(
        "admission",
        req=request,
        project=project,
        model=digest,
        decision=DecisionRef(
            log.put_object(decision.canonical), decision.outcome.value, decision.rule_for_log
        ),
        data={
            "bundle": _printable(f"{manifest.name}-{manifest.version}"),
            "result": decision.outcome.value,
            "obligations": [_printable(str(each.id)) for each in decision.obligations][:48],
        },
    )


def _printable(text: str) -> str:
    """Return text as a record may hold it: printable ASCII, at most 256 characters."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:256]
