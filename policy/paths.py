"""`any_path`: whether a lineage reaches a listed party (docs/design/policy.md, 3 and 4).

True when asserted edges lead to a hit, unknown when a step rests on a disputed edge, an unresolved
name or an unchecked list, and false otherwise, which reads "no hit on edition X" and never
"cleared".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from policy.lineage import Registry, Step
from policy.logic import AnyPath, F, T, Truth, U
from policy.similar import find_alike
from policy.snapshots import Entry, ListSnapshot, normal_name
from policy.terms import MAKER_RELATIONS

SELF = "self"  # relation of a start that is the party itself
MAX_LOOKS = 50_000  # remembered answers of one finder
MAX_OPENED = 1_000  # pairs of relations and day of which one finder remembers steps


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """A first step of a path: `party` is an id, a name or a handle; not sure means unknown."""

    relation: str
    party: str
    sure: bool
    source: str


@dataclass(frozen=True, slots=True)
class Start:
    """First steps that are known, and relations about which nothing is known (with the reason)."""

    origins: tuple[Origin, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def nothing_known(cls, reason: str = "not supplied") -> Start:
        """A start about which nobody has said anything."""
        relations = (*MAKER_RELATIONS, "affiliated_with", SELF)
        return cls((), MappingProxyType(dict.fromkeys(relations, reason)))

    @classmethod
    def parties(cls, names: Iterable[str], source: str) -> Start:
        """A start at the parties themselves (`counterparty`, `recipient`)."""
        return cls(tuple(Origin(SELF, each, sure=True, source=source) for each in names))

    def united(self, other: Start) -> Start:
        """Both starts: everything known of either, and everything unknown of either."""
        return Start(
            tuple(dict.fromkeys((*self.origins, *other.origins))),
            MappingProxyType({**self.unknown, **other.unknown}),
        )


class Hop(NamedTuple):
    """One step of a found path, for the trace."""

    relation: str
    party: str
    by: str


# A party on the way: its key, its name, its id, whether every step to it is sure, the step that led
# here, and what came before. A plain tuple, because a decision makes some hundred of them.
_Reached = tuple[str, str, str | None, bool, Origin | Step, "_Reached | None"]


class PathResult(NamedTuple):
    """Value of one `any_path`, the party on whose path it was decided, and words for a reader."""

    truth: Truth
    end: _Reached | None
    words: str

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The steps from the start to the party that decided; they are put in order when read."""
        found: list[Hop] = []
        at = self.end
        while at is not None:
            _, name, _, _, step, before = at
            by = step.edge_id if isinstance(step, Step) else step.source
            found.append(Hop(step.relation, name, by))
            at = before
        return tuple(reversed(found))


class _Looks(NamedTuple):
    """What is remembered of one target on one day: parties in the clear, and all others."""

    clear: set[str]
    telling: dict[str, tuple[Truth, str]]


class Walks:
    """What was reached from each start of one evaluation, so that leaves may share a walk.

    Relations that no edge and no origin bears lead nowhere: without them many leaves walk alike.
    """

    def __init__(self, finder: PathFinder, day: date) -> None:
        self._finder = finder
        self._day = day
        self._live: dict[str, frozenset[str]] = {}
        self._reached: dict[tuple[str, frozenset[str]], list[_Reached]] = {}

    def of(self, leaf: AnyPath, start: Start) -> list[_Reached]:
        """What `leaf` reaches from its start."""
        live = self._live.get(leaf.start)
        if live is None:
            live = self._finder.relations.union([each.relation for each in start.origins])
            self._live[leaf.start] = live
        key = (leaf.start, leaf.via & live)
        reached = self._reached.get(key)
        if reached is None:
            reached = self._reached[key] = self._finder.walk(start, key[1], self._day)
        return reached


@lru_cache(maxsize=8)
def path_finder(
    registry: Registry, held: tuple[tuple[str, ListSnapshot | None], ...]
) -> PathFinder:
    """The finder of these very objects; what it has looked up serves the next decision too."""
    return PathFinder(registry, dict(held))


class PathFinder:
    """Evaluates `any_path` leaves over one registry and the editions that are held."""

    def __init__(self, registry: Registry, held: Mapping[str, ListSnapshot | None]) -> None:
        self.registry = registry
        self.held = held
        self._looks: dict[tuple[object, ...], _Looks] = {}
        self.relations = frozenset(edge.relation for edge in registry.edges)
        self._opened: dict[tuple[frozenset[str], date], dict[str, tuple[Step, ...]]] = {}

    def find(
        self, leaf: AnyPath, start: Start, day: date, walks: Walks | None = None
    ) -> PathResult:
        """Look at every party that a path reaches; a sure hit decides, else the first unknown.

        `walks` remembers what was reached, for the other leaves of the same evaluation.
        """
        doubt = self._doubt_of_start(leaf, start) if start.unknown else None
        reached = self.walk(start, leaf.via, day) if walks is None else walks.of(leaf, start)
        target = (leaf.hits_list, leaf.basis, leaf.domicile_in, "same_person_as" in leaf.via, day)
        looks = self._looks.get(target)
        if looks is None:
            looks = self._remember(target)
        clear, telling = looks
        for here in [each for each in reached if each[0] not in clear]:
            truth, words = telling.get(here[0]) or self._look(looks, leaf, here, day)
            if truth == F:
                continue
            sure = here[3]
            if truth == T and sure:
                return PathResult(T, here, words)
            if doubt is None:
                weak = "" if sure else "; a step on the way is disputed or weakly sourced"
                doubt = PathResult(U, here, words + weak)
        return doubt or PathResult(F, None, self._clear_words(leaf))

    def walk(self, start: Start, via: frozenset[str], day: date) -> list[_Reached]:
        """Reach every party once for sure and once in doubt at most, nearest first."""
        registry, opened = self.registry, self._steps_by(via, day)
        reached: list[_Reached] = []
        certain: set[str] = set()
        doubtful: set[str] = set()
        waiting: list[_Reached] = []
        for each in start.origins:
            if each.relation in via or each.relation == SELF:
                known = registry.party_of(each.party)
                waiting.append((known or each.party, each.party, known, each.sure, each, None))
        for here in waiting:  # grows while it is walked
            key, _, party, sure, _, _ = here
            if key in certain or (not sure and key in doubtful):
                continue
            (certain if sure else doubtful).add(key)
            reached.append(here)
            if party is None:
                continue
            steps = opened.get(party)
            if steps is None:
                steps = opened[party] = self._open(party, via, day)
            for step in steps:
                _, target, step_sure, _, _ = step
                if target not in certain:
                    waiting.append((target, target, target, sure and step_sure, step, here))
        return reached

    def _steps_by(self, via: frozenset[str], day: date) -> dict[str, tuple[Step, ...]]:
        """What is remembered of `_open`, by party."""
        if len(self._opened) > MAX_OPENED:
            self._opened.clear()
        return self._opened.setdefault((via, day), {})

    def _open(self, party: str, via: frozenset[str], day: date) -> tuple[Step, ...]:
        """The steps by these relations that leave a party and hold on `day`."""
        return tuple(
            step
            for step in self.registry.steps[party]
            if step.relation in via and step.valid.holds(day)
        )

    @staticmethod
    def _doubt_of_start(leaf: AnyPath, start: Start) -> PathResult | None:
        for relation in sorted(start.unknown):
            if relation in leaf.via or relation == SELF:
                words = f"{relation} of {leaf.start} is unknown: {start.unknown[relation]}"
                return PathResult(U, None, words)
        return None

    def _clear_words(self, leaf: AnyPath) -> str:
        if leaf.hits_list is None:
            return "no party of that domicile"
        snapshot = self.held.get(leaf.hits_list)
        edition = snapshot.text.edition if snapshot else "none held"
        return f"no hit on {leaf.hits_list} edition {edition}"

    def _remember(self, target: tuple[object, ...]) -> _Looks:
        """Begin to remember answers about one target on one day."""
        if len(self._looks) > MAX_LOOKS:
            self._looks.clear()
        return self._looks.setdefault(target, _Looks(set(), {}))

    def _look(self, looks: _Looks, leaf: AnyPath, here: _Reached, day: date) -> tuple[Truth, str]:
        """Look at one party once for all leaves with this target."""
        if len(looks.clear) + len(looks.telling) > MAX_LOOKS:
            looks.clear.clear()
            looks.telling.clear()
        key, name, party, *_ = here
        found = self._look_afresh(leaf, party, name, day)
        if found[0] == F:
            looks.clear.add(key)
        else:
            looks.telling[key] = found
        return found

    def _look_afresh(
        self, leaf: AnyPath, party: str | None, name: str, day: date
    ) -> tuple[Truth, str]:
        if leaf.hits_list is not None:
            return self._look_at_list(leaf, leaf.hits_list, party, name, day)
        if party is None:
            return U, f"{name} is not in the lineage registry"
        domicile = self.registry.parties[party].domicile
        if domicile is None:
            deferred = self._stands_for_another(party, leaf.via, day)
            return (F, "") if deferred else (U, f"the domicile of {party} is not recorded")
        found = leaf.domicile_in is not None and domicile in leaf.domicile_in
        return (T if found else F), f"{party} is domiciled in {domicile}"

    def _look_at_list(
        self, leaf: AnyPath, list_id: str, party: str | None, name: str, day: date
    ) -> tuple[Truth, str]:
        snapshot = self.held.get(list_id)
        if snapshot is None:
            return U, f"no edition of {list_id} is held"
        edition = f"{list_id} edition {snapshot.text.edition}"
        basis = leaf.basis or "released"
        entries = self._entries(snapshot, party, name)
        for entry in entries:
            window = entry.window(basis)
            if window is not None and window.holds(day):
                return T, f"{party or name} is on {edition} as {entry.names[0]} ({basis})"
        if any(entry.window(basis) is None and _on_other_basis(entry, day) for entry in entries):
            return U, f"{party or name} is on {edition}, but its {basis} dates are not recorded"
        if party is not None and entries:
            return F, f"no hit for {party} on {edition}"
        return self._look_for_others(leaf, snapshot, party, name, day)

    def _look_for_others(
        self, leaf: AnyPath, snapshot: ListSnapshot, party: str | None, name: str, day: date
    ) -> tuple[Truth, str]:
        """No entry has this very name: what people have found, and what looks alike."""
        edition = f"{snapshot.list_id} edition {snapshot.text.edition}"
        names = (normal_name(name),) if party is None else self.registry.keys[party]
        alike = self._look_alike(snapshot, names, leaf.basis or "released", day)
        if alike is not None and alike[0] == T:
            return alike
        if party is not None and self._finding(snapshot, party) == "no_hit":
            return F, f"no hit for {party} on {edition}"
        if alike is not None:
            return alike
        if party is None:
            return U, f"{name} is not in the lineage registry"
        if self._looked_at(snapshot, party, leaf.via, day):
            return F, f"no hit for {party} on {edition}"
        held = "" if snapshot.text.complete else ", which is held in part"
        return U, f"{party} has not been checked against {edition}{held}"

    def _look_alike(
        self, snapshot: ListSnapshot, names: Sequence[str], basis: str, day: date
    ) -> tuple[Truth, str] | None:
        """Entries whose names look like ours: unknown, until a person has ruled on each."""
        edition = (snapshot.list_id, snapshot.text.edition)
        for entry in snapshot.text.entries:
            window = entry.window(basis)
            if window is not None and not window.holds(day):
                continue
            listed = [normal_name(each) for each in entry.names]
            ruling = self.registry.ruling(names, listed, edition, day)
            if ruling is not None and not ruling.same:
                continue
            if ruling is not None and window is not None:
                people = ", ".join(ruling.people)
                return T, f"{names[0]} is {entry.names[0]} on {snapshot.list_id}: {people} ruled so"
            pair = find_alike(names, listed)
            if pair is not None:
                return U, (
                    f"possible match, review: {pair[0]} looks like {entry.names[0]} on"
                    f" {snapshot.list_id} edition {snapshot.text.edition}"
                )
        return None

    def _finding(self, snapshot: ListSnapshot, party: str) -> str | None:
        key = (party, snapshot.list_id, snapshot.text.edition)
        finding = self.registry.findings.get(key)
        return None if finding is None else finding.finding

    def _looked_at(
        self, snapshot: ListSnapshot, party: str, via: frozenset[str], day: date
    ) -> bool:
        finding = self._finding(snapshot, party)
        if finding is not None:
            return finding == "no_hit"
        return snapshot.text.complete or self._stands_for_another(party, via, day)

    def _entries(self, snapshot: ListSnapshot, party: str | None, name: str) -> tuple[Entry, ...]:
        if party is None:
            return snapshot.matches((normal_name(name),))
        return snapshot.matches(self.registry.keys[party])

    def _stands_for_another(self, party: str, via: frozenset[str], day: date) -> bool:
        """Whether it is a unit or account of a legal person that the path goes on to look at."""
        if self.registry.parties[party].kind not in {"internal_unit", "model_org"}:
            return False
        return "same_person_as" in via and any(
            step.relation == "same_person_as" and step.sure and step.valid.holds(day)
            for step in self.registry.steps[party]
        )


def _on_other_basis(entry: Entry, day: date) -> bool:
    windows = (entry.released, entry.published)
    return any(window is not None and window.holds(day) for window in windows)


def boundaries(registry: Registry, held: Iterable[ListSnapshot | None]) -> set[date]:
    """Every day on which an edge or a listing begins or ends."""
    found: set[date | None] = set()
    for edge in registry.edges:
        found |= {edge.valid.start, edge.valid.end}
    found |= {ruling.expires for ruling in registry.rulings}
    for snapshot in held:
        for entry in snapshot.text.entries if snapshot else ():
            for window in (entry.released, entry.published):
                found |= {window.start, window.end} if window else set()
    return {day for day in found if day is not None}
