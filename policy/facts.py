"""Facts of a request: checked against the closed vocabulary, completed by what follows from them.

Derived facts (docs/design/policy.md, 2) are computed here and cannot be supplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import date

from policy.errors import RefusedError
from policy.pack import Packs
from policy.snapshots import ListSnapshot
from policy.terms import FACTS, SCREENED, Fact, Known, Unknown, unknown_name

UNREAD = "unread"  # member of `bundle.licences` for a licence that nobody has read

_NOT_SUPPLIED = Unknown()
_ENGINE = "engine"


def check_facts(facts: Mapping[str, Fact]) -> None:
    """Refuse names and values outside the vocabulary; `policy.request`."""
    for name, fact in facts.items():
        spec = FACTS.get(name)
        if spec is None:
            raise RefusedError("policy.request", unknown_name(name, FACTS))
        if spec.derived:
            raise RefusedError(
                "policy.request", f"fact {name} is computed by the engine and cannot be supplied"
            )
        fault = spec.fault(fact.value) if isinstance(fact, Known) else None
        if fault:
            raise RefusedError("policy.request", f"fact {name}: {fault}")


def complete_facts(
    facts: Mapping[str, Fact], names: Iterable[str], packs: Packs
) -> dict[str, Fact]:
    """Return supplied facts, the derived ones that do not depend on the day, and Unknowns."""
    whole = dict(facts)
    for name, derive in _DERIVED.items():
        whole[name] = derive(whole, packs)
    for name in names:
        whole.setdefault(name, _NOT_SUPPLIED)
    return whole


def list_age(held: Iterable[ListSnapshot | None], day: date) -> Fact:
    """Age in days of the oldest edition held; a list that is not held does not age."""
    ages = [(day - each.dated).days for each in held if each is not None]
    if not ages:
        return Unknown("no list is held", _ENGINE)
    return Known(max(ages), _ENGINE, derivation=("lists",))


def sources_of(name: str) -> tuple[str, ...]:
    """Supplied facts from which `name` is derived; itself when it is supplied."""
    return _SOURCES.get(name, (name,))


_SOURCES: dict[str, tuple[str, ...]] = {
    "data.export_controlled": ("data.export_class",),
    "screen.required": ("task.modality",),
    "bundle.licences_differ": ("bundle.licences",),
    "bundle.licence_terms": ("bundle.licences",),
    "institution.state_pack_loaded": ("institution.state",),
}


def _export_controlled(facts: Mapping[str, Fact], _: Packs) -> Fact:
    derivation = ("data.export_class",)
    fact = facts.get("data.export_class", _NOT_SUPPLIED)
    if isinstance(fact, Unknown):
        return Unknown(fact.reason, fact.source, derivation)
    if fact.value == "unreviewed":
        return Unknown("the export office has not reviewed the data", fact.source, derivation)
    return Known(fact.value in {"ITAR", "ECCN"}, fact.source, derivation=derivation)


def _screen_required(facts: Mapping[str, Fact], _: Packs) -> Fact:
    fact = facts.get("task.modality", _NOT_SUPPLIED)
    needed = isinstance(fact, Unknown) or fact.value in SCREENED
    return Known(needed, _ENGINE, derivation=("task.modality", "task.action"))


def _licences_differ(facts: Mapping[str, Fact], _: Packs) -> Fact:
    derivation = ("bundle.licences",)
    fact = facts.get("bundle.licences", _NOT_SUPPLIED)
    if isinstance(fact, Unknown) or not isinstance(fact.value, frozenset):
        reason = fact.reason if isinstance(fact, Unknown) else "no set"
        return Unknown(reason, fact.source, derivation)
    if len(fact.value - {UNREAD}) > 1:
        return Known(value=True, source=fact.source, derivation=derivation)
    if UNREAD in fact.value or not fact.value:
        return Unknown("a licence has not been read", fact.source, derivation)
    return Known(value=False, source=fact.source, derivation=derivation)


def _licence_terms(facts: Mapping[str, Fact], _: Packs) -> Fact:
    derivation = ("bundle.licences",)
    fact = facts.get("bundle.licences", _NOT_SUPPLIED)
    if isinstance(fact, Unknown) or not isinstance(fact.value, frozenset):
        reason = fact.reason if isinstance(fact, Unknown) else "no set"
        return Unknown(reason, fact.source, derivation)
    if UNREAD in fact.value or not fact.value:
        return Unknown("a licence has not been read", fact.source, derivation)
    return Known(fact.value, fact.source, derivation=derivation)


def _state_pack_loaded(facts: Mapping[str, Fact], packs: Packs) -> Fact:
    derivation = ("institution.state",)
    fact = facts.get("institution.state", _NOT_SUPPLIED)
    if isinstance(fact, Unknown):
        return Unknown(fact.reason, fact.source, derivation)
    return Known(fact.value in packs.states, _ENGINE, derivation=derivation)


_DERIVED: dict[str, Callable[[Mapping[str, Fact], Packs], Fact]] = {
    "data.export_controlled": _export_controlled,
    "screen.required": _screen_required,
    "bundle.licences_differ": _licences_differ,
    "bundle.licence_terms": _licence_terms,
    "institution.state_pack_loaded": _state_pack_loaded,
}
