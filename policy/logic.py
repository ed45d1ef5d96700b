"""Conditions over facts in Kleene's three-valued logic (docs/design/policy.md, 3 and 4).

A condition is data of a closed set of forms. There is no form that tests ignorance, so no rule can
make a missing fact useful. Leaves are evaluated once each; a condition is compiled to a closure
over their values and looks at every leaf, without short cuts, so that the trace names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from operator import itemgetter
from typing import Final

from policy.terms import Known, Unknown, Value

# Truth values are small integers: `and` is the minimum, `or` the maximum, `not` the mirror.
Truth = int
F: Final[Truth] = 0
U: Final[Truth] = 1
T: Final[Truth] = 2
LETTERS: Final = "FUT"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A leaf over one fact: `form` is an operator of `OPERATORS`, `operand` a literal or a set."""

    form: str
    fact: str
    operand: Value

    def __str__(self) -> str:
        return f"{self.fact} {_SIGNS.get(self.form, self.form)} {_literal(self.operand)}"


@dataclass(frozen=True, slots=True)
class AnyPath:
    """A leaf over the lineage graph: does some path reach a listed or so domiciled party?"""

    start: str
    via: frozenset[str]
    hits_list: str | None
    domicile_in: frozenset[str] | None
    basis: str | None

    def __str__(self) -> str:
        walked = ", ".join(sorted(self.via))
        if self.hits_list is not None:
            return f"path from {self.start} via {walked} to list {self.hits_list} ({self.basis})"
        return f"path from {self.start} via {walked} to domicile {_literal(self.domicile_in or '')}"


Leaf = Comparison | AnyPath


@dataclass(frozen=True, slots=True)
class All:
    """Kleene and; true when empty."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Any:
    """Kleene or; never empty."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """Kleene not."""

    part: Condition


Condition = All | Any | Not | Comparison | AnyPath
Compiled = Callable[[Sequence[Truth]], Truth]


def leaves(condition: Condition) -> list[Leaf]:
    """List the leaves of `condition` in writing order, with repeats."""
    match condition:
        case All(parts) | Any(parts):
            return [leaf for part in parts for leaf in leaves(part)]
        case Not(part):
            return leaves(part)
        case _:
            return [condition]


def compile_condition(condition: Condition, index: Mapping[Leaf, int]) -> Compiled:
    """Turn `condition` into a function of the leaf values, which lie as `index` says."""
    match condition:
        case All(()):
            return _true
        case All((part,)) | Any((part,)):
            return compile_condition(part, index)
        case All(parts):
            gather = _gather(parts, index)
            return lambda values: min(gather(values))
        case Any(parts):
            gather = _gather(parts, index)
            return lambda values: max(gather(values))
        case Not(part):
            single = compile_condition(part, index)
            return lambda values: T - single(values)
        case _:
            return itemgetter(index[condition])


def _gather(
    parts: Sequence[Condition], index: Mapping[Leaf, int]
) -> Callable[[Sequence[Truth]], Sequence[Truth]]:
    """The values of two parts or more; plain leaves are picked in one step."""
    picked = [index[part] for part in parts if isinstance(part, Comparison | AnyPath)]
    if len(picked) == len(parts):
        return itemgetter(*picked)
    inner = [compile_condition(part, index) for part in parts]
    return lambda values: [part(values) for part in inner]


def _true(_: Sequence[Truth]) -> Truth:
    return T


def compare(leaf: Comparison, fact: Known | Unknown) -> Truth:
    """Evaluate one leaf: unknown over an unknown fact, else what the operator says.

    Types were checked when the rule and the fact were loaded; another type here is a defect and
    raises TypeError, which nothing below the command line catches.
    """
    if isinstance(fact, Unknown):
        return U
    return T if OPERATORS[leaf.form](fact.value, leaf.operand) else F


# mypy cannot see that loaders have matched both sides; each operator is total on its own types.
OPERATORS: dict[str, Callable[[Value, Value], bool]] = {
    "eq": lambda value, operand: value == operand,
    "in": lambda value, operand: value in operand,  # type: ignore[operator]
    "contains": lambda value, operand: operand in value,  # type: ignore[operator]
    "intersects": lambda value, operand: not operand.isdisjoint(value),  # type: ignore[union-attr,arg-type]
    "lt": lambda value, operand: value < operand,  # type: ignore[operator]
    "lte": lambda value, operand: value <= operand,  # type: ignore[operator]
    "gt": lambda value, operand: value > operand,  # type: ignore[operator]
    "gte": lambda value, operand: value >= operand,  # type: ignore[operator]
    "before": lambda value, operand: value < operand,  # type: ignore[operator]
    "on_or_after": lambda value, operand: value >= operand,  # type: ignore[operator]
}
_SIGNS = {"eq": "=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "on_or_after": "from"}


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(value)) + "}"
    return value.isoformat() if isinstance(value, date) else str(value)
