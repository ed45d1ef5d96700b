"""`decide` and `require`: one decision, replayable byte for byte (docs/design/policy.md, 4 to 6).

A decision has no truth value. Ask for `decision.permitted`, or use `require`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any, NoReturn

from policy import record
from policy.approvals import Approvals
from policy.canonical import canonical_bytes
from policy.errors import RefusedError
from policy.evaluator import Evaluation, Evaluator, Request, RuleResult
from policy.lineage import Registry
from policy.pack import Obligation, Packs
from policy.snapshots import Snapshots
from policy.terms import Digest, Fact, Outcome, Scope

NO_APPROVALS = Approvals()


# The person who is refused may not read the tree; who keeps it finds the facts by the record.
_EXPLAINED = (
    "ask who keeps the tree: `airgap audit show` numbers the record, and "
    "`airgap policy explain '#NUMBER'` shows its facts"
)


@dataclass(frozen=True, eq=False)
class Decision:
    """An answer with its grounds. Costly parts (record, next change) are made when asked for."""

    evaluator: Evaluator
    evaluation: Evaluation

    def __bool__(self) -> NoReturn:
        """Refuse: a plain object is always true, and that would permit everything."""
        raise TypeError("ask for `decision.permitted`, or use `require`")

    @property
    def scope(self) -> Scope:
        """What was decided."""
        return self.evaluator.request.scope

    @property
    def outcome(self) -> Outcome:
        """The answer."""
        return self.evaluation.outcome

    @property
    def permitted(self) -> bool:
        """Whether work may go on."""
        return self.outcome.permitted

    @property
    def as_of(self) -> date:
        """The day whose law and lists applied."""
        return self.evaluation.day

    @property
    def known_at(self) -> datetime:
        """The instant up to which editions and approvals were held."""
        return self.evaluator.known_at

    @property
    def obligations(self) -> tuple[Obligation, ...]:
        """Duties that come with the answer, by id."""
        return self.evaluation.obligations

    @property
    def results(self) -> tuple[RuleResult, ...]:
        """Every rule in scope, by id."""
        return self.evaluation.results

    @cached_property
    def facts(self) -> dict[str, Fact]:
        """Every fact that was supplied, derived or read."""
        return record.facts_of(self.evaluator, self.evaluation)

    @cached_property
    def reasons(self) -> tuple[record.Reason, ...]:
        """What decided, the strictest first; `DEFAULT-DENY` where no permit rule matched."""
        return record.reasons_of(self.evaluation)

    @cached_property
    def missing(self) -> tuple[record.Missing, ...]:
        """Facts that would settle an unknown, the smallest set first."""
        return record.missing_of(self.evaluator, self.evaluation)

    def idle_approvals(self, *, hazard_role: bool = False) -> tuple[record.Idle, ...]:
        """Approvals that were at hand and lift nothing, each with the reason."""
        return record.idle_approvals(self.evaluator, self.evaluation, hazard_role=hazard_role)

    @cached_property
    def next_change(self) -> record.Change | None:
        """First later day on which the outcome changes with the same facts."""
        return record.next_change(self.evaluator, self.evaluation)

    @cached_property
    def canonical(self) -> bytes:
        """The record as RFC 8785 JSON: the bytes that the audit log keeps."""
        return canonical_bytes(self.as_document())

    @cached_property
    def digest(self) -> Digest:
        """Identity of the decision: the digest of its record."""
        return Digest.of(self.canonical)

    @property
    def rule_for_log(self) -> str:
        """Id of the deciding rule; `HAZ` for every hazard rule, because the result is an oracle."""
        first = self.reasons[0] if self.reasons else None
        if first is None:
            return ""
        return "HAZ" if first.hazard else first.rule

    def refusal(self, *, reference: str = "") -> RefusedError:
        """Word the refusal for the person who asked; of a hazard it tells only the reference.

        The code is `policy.denied` or `policy.held`; for a hazard always `policy.held`, because the
        result of a screen is an oracle.
        """
        if self.permitted:
            raise TypeError("this decision permits")
        blocking = [each for each in self.reasons if each.blocks and not each.hazard]
        if not blocking:
            number = f" Reference {reference}." if reference else ""
            return RefusedError(
                "policy.held",
                f"Held for review.{number}",
                hint="give the reference to the hazard officer",
            )
        denied = any(each.effect is Outcome.DENY for each in blocking)
        asks = "; ".join(
            question
            for each in self.missing
            if each.blocks and not each.hazard
            for question in each.questions
        )
        return RefusedError(
            "policy.denied" if denied else "policy.held",
            f"{self.scope} {'denied' if denied else 'held'} as of {self.as_of}: "
            + "; ".join(
                f"{each.rule}: {each.plain}{self._unmet(each.rule)} [{each.citation}]"
                for each in blocking
            ),
            hint=f"settle what is missing: {asks}"[:600] if asks else _EXPLAINED,
        )

    def _unmet(self, rule: str) -> str:
        """Name the conditions that kept every permit rule from matching, for `DEFAULT-DENY`."""
        if rule != record.DEFAULT_DENY:
            return ""
        unmet = [
            f"{leaf['leaf']} ({'unknown' if leaf['value'] == 'U' else 'is not so'})"
            for result in self.results
            if result.rule.text.effect == "permit"
            for leaf in record.leaves_of(self.evaluator, self.evaluation, result)
            if leaf["value"] != "T"
        ]
        return f" It needs: {', '.join(unmet)}." if unmet else ""

    def as_document(self) -> dict[str, Any]:
        """The record `airgap/decision/1` as plain values."""
        return record.document(self)


def decide(
    request: Request,
    packs: Packs,
    lists: Snapshots,
    lineage: Registry,
    approvals: Approvals = NO_APPROVALS,
    *,
    as_of: date,
    known_at: datetime,
) -> Decision:
    """Decide `request` under these rules, lists and approvals.

    `as_of` is the day whose law and lists apply, a calendar date in the institution's legal zone.
    `known_at` is the instant (with a zone) up to which editions and approvals were held.

    Raises:
        RefusedError: `policy.request`, a fact outside the vocabulary.

    """
    evaluator = Evaluator(
        request,
        packs=packs,
        lists=lists,
        lineage=lineage,
        approvals=approvals,
        known_at=known_at,
    )
    return Decision(evaluator, evaluator.evaluate(as_of))


def require(decision: Decision, *, reference: str = "") -> Decision:
    """Return a permitted decision; raise for any other.

    `reference` is the number of the restricted record: all that a user sees of a hazard hold.

    Raises:
        RefusedError: `policy.denied` or `policy.held`, with rule and citation; for a hazard always
            `policy.held`, with the reference only.

    """
    if not decision.permitted:
        raise decision.refusal(reference=reference)
    return decision
