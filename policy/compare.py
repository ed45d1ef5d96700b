"""What a new pack, list or day changes: `diff` and `horizon` (docs/design/policy.md, 13).

Both ask stored questions again on every day on which something that is read begins or ends. Between
two such days nothing can change, so the day before and the day after are answered as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime

from policy.approvals import Approvals
from policy.engine import NO_APPROVALS
from policy.evaluator import Evaluation, Evaluator, Request
from policy.lineage import Registry
from policy.logic import AnyPath
from policy.pack import Packs, Rule
from policy.record import Change
from policy.snapshots import Snapshots
from policy.strict import shift_day
from policy.terms import Outcome

MAX_DAYS = 4_000  # boundary days of one question


@dataclass(frozen=True, slots=True)
class Rulebook:
    """Everything that decides, apart from facts."""

    packs: Packs
    lists: Snapshots
    registry: Registry


@dataclass(frozen=True, slots=True)
class Question:
    """A golden scenario or a logged decision, to be asked again."""

    name: str
    request: Request
    known_at: datetime
    approvals: Approvals = NO_APPROVALS


@dataclass(frozen=True, slots=True)
class Difference:
    """Two answers to one question, from `first` to `last` among the days that were asked.

    `cause` is `rule`, `list`, `registry` or `rule and list`.
    """

    question: str
    first: date
    last: date
    before: Outcome
    after: Outcome
    rules: tuple[str, ...]
    cause: str


def diff(before: Rulebook, after: Rulebook, questions: Iterable[Question]) -> Iterator[Difference]:
    """Ask each question under both rulebooks on every boundary day of either."""
    changed = _changed_rules(before.packs, after.packs)
    scopes = {
        scope
        for packs in (before.packs, after.packs)
        for rule in packs.rules
        if rule.id in changed
        for scope in rule.scopes
    }
    for question in questions:
        old, new = _evaluator(before, question), _evaluator(after, question)
        lists = _changed_lists(old, new)
        same = before.registry.digest == after.registry.digest
        if question.request.scope in scopes or lists or not same:
            causes = _Causes(changed, lists, before.registry, after.registry)
            yield from _differences(question.name, old, new, causes)


def _differences(
    name: str, old: Evaluator, new: Evaluator, causes: _Causes
) -> Iterator[Difference]:
    """Differences by stretches of days: from one boundary to the day before the next."""
    days = _days(old.boundaries(), new.boundaries())
    ends = [shift_day(day, -1) for day in days[1:]] + [date.max]
    running: Difference | None = None
    for first, last in zip(days, ends, strict=True):
        found = _difference(name, first, old.evaluate(first), new.evaluate(first), causes)
        if running is not None and (found is None or not _same(running, found)):
            yield running
            running = None
        if found is not None:
            begin = found.first if running is None else running.first
            running = replace(found, first=begin, last=last)
    if running is not None:
        yield running


def _evaluator(rulebook: Rulebook, question: Question) -> Evaluator:
    return Evaluator(
        question.request,
        packs=rulebook.packs,
        lists=rulebook.lists,
        lineage=rulebook.registry,
        approvals=question.approvals,
        known_at=question.known_at,
    )


def _days(*boundaries: Sequence[date]) -> list[date]:
    """The first day of each stretch in which nothing begins or ends, the time before all included.

    The day before a boundary lies in the stretch before it, so every such day is covered.
    """
    found = {day for days in boundaries for day in days if date.min < day < date.max}
    before = shift_day(min(found, default=date(2000, 1, 1)), -1)
    return sorted({before, *found})[:MAX_DAYS]


def _same(one: Difference, two: Difference) -> bool:
    return (one.before, one.after, one.rules, one.cause) == (
        two.before,
        two.after,
        two.rules,
        two.cause,
    )


@dataclass(frozen=True, slots=True)
class _Causes:
    rules: frozenset[str]
    lists: frozenset[str]
    registry: Registry
    other_registry: Registry

    def of(self, rules: Iterable[Rule]) -> str:
        """Why these rules answer otherwise."""
        found = list(rules)
        by_rule = any(each.id in self.rules for each in found)
        by_list = any(
            isinstance(leaf, AnyPath) and leaf.hits_list in self.lists
            for each in found
            for leaf in each.leaves()
        )
        if by_rule or by_list:
            return " and ".join(w for w, so in (("rule", by_rule), ("list", by_list)) if so)
        if self.registry.digest != self.other_registry.digest:
            return "registry"
        return "list" if self.lists else "rule"


def _difference(
    name: str, day: date, one: Evaluation, two: Evaluation, causes: _Causes
) -> Difference | None:
    if one.outcome == two.outcome:
        return None
    effects = {each.rule.id: (each.effect, each.lifted_by) for each in one.results}
    others = {each.rule.id: (each.effect, each.lifted_by) for each in two.results}
    nothing = (None, None)
    ids = tuple(
        each
        for each in sorted({*effects, *others})
        if effects.get(each, nothing) != others.get(each, nothing)
    )
    rules = {each.rule.id: each.rule for each in (*one.results, *two.results)}
    cause = causes.of(rules[each] for each in ids)
    return Difference(name, day, day, one.outcome, two.outcome, ids, cause)


def _changed_rules(before: Packs, after: Packs) -> frozenset[str]:
    old = {each.id: each for each in before.rules}
    new = {each.id: each for each in after.rules}
    return frozenset(each for each in {*old, *new} if old.get(each) != new.get(each))


def _changed_lists(old: Evaluator, new: Evaluator) -> frozenset[str]:
    def digests(held: Evaluator) -> Mapping[str, str]:
        return {name: str(each.digest) if each else "" for name, each in held.held.items()}

    one, two = digests(old), digests(new)
    return frozenset(each for each in {*one, *two} if one.get(each) != two.get(each))


# -- horizon --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outlook:
    """One question over the coming days: its answer now, and every change until `until`."""

    name: str
    start: date
    until: date
    now: Outcome
    changes: tuple[Change, ...]

    def within(self, days: int) -> tuple[Change, ...]:
        """Changes of the next `days` days."""
        last = shift_day(self.start, days)
        return tuple(each for each in self.changes if each.on <= last)


def outlook(rulebook: Rulebook, question: Question, start: date, days: int) -> Outlook:
    """Follow a question day by day of change; the same facts, lists and approvals throughout."""
    until = shift_day(start, days)
    evaluator = _evaluator(rulebook, question)
    last = evaluator.evaluate(start)
    now = last.outcome
    changes = []
    for day in evaluator.boundaries():
        if start < day <= until:
            here = evaluator.evaluate(day)
            if here.outcome != last.outcome:
                rules = tuple(
                    two.rule.id
                    for one, two in zip(last.results, here.results, strict=True)
                    if (one.effect, one.lifted_by) != (two.effect, two.lifted_by)
                )
                changes.append(Change(day, here.outcome, rules))
                last = here
            else:
                last = here
    return Outlook(question.name, start, until, now, tuple(changes))


@dataclass(frozen=True, slots=True, order=True)
class Due:
    """Something that falls due: the review of a rule or list, the end of an approval."""

    on: date
    what: str
    words: str


def dues(rulebook: Rulebook, approvals: Approvals, start: date, days: int) -> tuple[Due, ...]:
    """What falls due in the next `days` days, what is overdue among it, by day."""
    until = shift_day(start, days)
    found = [each for rule in rulebook.packs.rules for each in _dues_of_rule(rule, start)]
    found += _reviews(rulebook)
    found += _dues_of_lists(rulebook, start)
    for approval in approvals.approvals:
        if approval.expires > start:
            words = f"approval of {', '.join(sorted(approval.rules))} ends ({approval.project})"
            found.append(Due(approval.expires, "approval", words))
    return tuple(sorted(each for each in found if each.on <= until))


def _dues_of_rule(rule: Rule, start: date) -> Iterator[Due]:
    for window in rule.text.valid:
        if window.start is not None and window.start > start:
            yield Due(window.start, "rule", f"{rule.id} comes into force")
        if window.end is not None and window.end > start:
            yield Due(window.end, "rule", f"{rule.id} ceases")
    for each in rule.text.horizon:
        day = _first_day(each.by)
        if day > start:
            doubt = ", estimate" if each.estimate else ""
            yield Due(day, "law", f"{rule.id}: {each.text}{doubt}")


def _reviews(rulebook: Rulebook) -> Iterator[Due]:
    """Reviews of rules, those of one owner and day together."""
    groups: dict[tuple[date, str], list[str]] = {}
    for rule in rulebook.packs.rules:
        groups.setdefault((rule.text.review_by, rule.text.owner), []).append(rule.id)
    for (day, owner), ids in groups.items():
        yield Due(day, "review", f"{owner}: review of {', '.join(ids)}")


def _dues_of_lists(rulebook: Rulebook, start: date) -> Iterator[Due]:
    for list_id in sorted(rulebook.packs.list_ids):
        held = rulebook.lists.held_on(list_id, start)
        if held is None:
            yield Due(start, "list", f"no edition of {list_id} is held")
        elif held.text.next_review_by is not None:
            words = f"look for a newer edition of {list_id} ({held.text.edition})"
            yield Due(held.text.next_review_by, "list", words)


def _first_day(text: str) -> date:
    return date.fromisoformat(text if len(text) > len("2028-08") else f"{text}-01")
