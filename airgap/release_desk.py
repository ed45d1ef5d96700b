"""How far the release of a hold is, as anybody may read it (docs/design/policy.md, 7)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from airgap.config import Site
from airgap.gate import in_legal_zone
from airgap.holds import Hold, Holds, Signed
from airgap.rules import Rules
from bundle.root import RootDocument
from policy.approvals import Approvals, Case, fault_of
from policy.errors import RefusedError
from policy.terms import Digest, Scope


@dataclass(frozen=True, slots=True)
class ReleaseDesk:
    """Holds, rules and people of a tree, and whether the reader has the hazard role."""

    tree: Path
    site: Site
    rules: Rules
    trust: RootDocument
    holds: Holds
    hazard_role: bool

    def row(self, hold: Hold) -> dict[str, Any]:
        """Return what anybody may read of a hold, and the rules for the hazard role."""
        row = {
            "reference": hold.reference,
            "opened": hold.opened.isoformat(),
            "person": hold.person,
            "project": hold.project,
            "task": hold.task,
            "stage": hold.stage,
            "bundle": hold.bundle,
            "state": self.state(hold),
        }
        return row | ({"rules": self.holds.blocking(hold)} if self.hazard_role else {})

    def state(self, hold: Hold) -> str:
        """Say in a word how far a hold is."""
        if answer := self.holds.answered(hold):
            return f"answered as {answer}"
        signed = self.current(hold)
        if signed is None:
            return "held"
        people = ", ".join(each.person for each in signed.people) or "nobody who counts"
        if any(self.faults(hold)):
            return f"held; signed by {people}"
        return f"released until {signed.release.expires} by {people}: airgap hold fetch"

    def require_released(self, hold: Hold) -> None:
        """Refuse to take up what is not released yet, or is held on under a later reference.

        What a hazard rule asks for is not told: how far it is, and nothing of why.

        Raises:
            RefusedError: `hold.waiting`.

        """
        if faults := self.faults(hold):
            told = [] if hold.restricted else [each.split(": ", 1)[-1] for each in faults]
            missing = "; ".join(sorted(set(told) - {"no release"}))
            raise RefusedError(
                "hold.waiting",
                f"{hold.reference} is not released yet: {self.state(hold)}"
                + (f"; {missing}" if missing else ""),
                hint="those who release have to sign it first: airgap hold list; nothing was run, "
                "and it does not count as a new request",
            )
        if (later := self.holds.answer_of(hold)) is not None:
            raise RefusedError(
                "hold.waiting",
                f"{hold.reference} was released and run, and its answer is held as "
                f"{later.reference}",
                hint=f"airgap hold fetch {later.reference}, once that one is released",
            )

    def current(self, hold: Hold) -> Signed | None:
        """Return the release to go on with: of those that have not expired the one signed most."""
        today = datetime.now(UTC).date()
        found = [each for each in self.holds.releases(hold) if each.release.expires > today]
        return found[0] if found else None

    def faults(self, hold: Hold) -> list[str]:
        """Say for each rule why the release does not lift it yet; empty when all are lifted."""
        signed = self.current(hold)
        if signed is None:
            return ["no release"]
        now = datetime.now(UTC)
        day = self.site.legal_day(now)
        case = Case(
            scope=Scope.USE,
            bundle=Digest.parse(hold.bundle),
            project=hold.project,
            task=hold.task,
            submitter=hold.person,
            leads=self.site.require_project(hold.project).principal_investigators,
            as_of=day.as_of,
            known_at=day.known_at,
        )
        of_hold = Approvals((self.holds.approval_of(hold, signed),))
        (approval,) = in_legal_zone(self.site, of_hold).approvals
        rules = {each.id: each for each in self.rules.packs.rules}
        missing = [
            f"{each}: no such rule is loaded" for each in approval.rules if each not in rules
        ]
        faults = {
            each: fault_of(approval, rules[each], case) for each in approval.rules if each in rules
        }
        return missing + [f"{rule}: {words}" for rule, words in faults.items() if words]
