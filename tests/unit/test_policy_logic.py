"""Three-valued logic: the tables of Kleene, compiled conditions against a second implementation."""

import itertools
from datetime import date

import pytest
from policy_cases import RULES

from policy.logic import (
    OPERATORS,
    All,
    Any,
    AnyPath,
    Comparison,
    F,
    Not,
    T,
    U,
    compile_condition,
    leaves,
)

# a, not a, then `a and b` and `a or b` for b in T, F, U: copied from docs/design/policy.md, 4.
TABLE = [
    (T, F, (T, F, U), (T, T, T)),
    (F, T, (F, F, F), (T, F, U)),
    (U, U, (U, F, U), (T, U, U)),
]


@pytest.mark.parametrize("row", TABLE)
def test_kleene_tables_are_those_of_the_specification(row):
    first, second = (Comparison("eq", name, operand=True) for name in ("a", "b"))
    places = {first: 0, second: 1}
    a, negated, ands, ors = row
    assert compile_condition(Not(first), places)((a, U)) == negated
    for b, both, either in zip((T, F, U), ands, ors, strict=True):
        assert compile_condition(All((first, second)), places)((a, b)) == both
        assert compile_condition(Any((first, second)), places)((a, b)) == either


def test_the_empty_conjunction_is_true():
    assert compile_condition(All(()), {})(()) == T


def naive(condition, values):
    """The same meaning by other means: None is unknown."""
    match condition:
        case All(parts):
            found = [naive(part, values) for part in parts]
            return False if False in found else None if None in found else True
        case Any(parts):
            found = [naive(part, values) for part in parts]
            return True if True in found else None if None in found else False
        case Not(part):
            inner = naive(part, values)
            return None if inner is None else not inner
        case _:
            return values[condition]


WORDS = {T: True, F: False, U: None}


@pytest.mark.parametrize("rule", RULES.packs.rules, ids=lambda rule: rule.id)
def test_every_assignment_of_each_rule_agrees_with_a_naive_evaluator(rule):
    for condition in filter(None, (rule.applies_when, rule.when, rule.unless)):
        found = list(dict.fromkeys(leaves(condition)))
        assert len(found) <= 10
        compiled = compile_condition(condition, {leaf: at for at, leaf in enumerate(found)})
        for values in itertools.product((F, U, T), repeat=len(found)):
            named = {leaf: WORDS[value] for leaf, value in zip(found, values, strict=True)}
            assert WORDS[compiled(values)] is naive(condition, named)


def test_leaves_read_like_sentences():
    assert str(Comparison("eq", "project.active", True)) == "project.active = true"
    assert str(Comparison("in", "task.action", frozenset({"infer", "finetune"}))) == (
        "task.action in {finetune, infer}"
    )
    assert str(Comparison("before", "project.award_date", date(2026, 1, 2))) == (
        "project.award_date before 2026-01-02"
    )
    path = AnyPath("bundle", frozenset({"developed_by"}), "dod-1260h", None, "published")
    assert str(path) == "path from bundle via developed_by to list dod-1260h (published)"
    path = AnyPath("bundle", frozenset({"developed_by"}), None, frozenset({"CN"}), None)
    assert str(path) == "path from bundle via developed_by to domicile {CN}"


@pytest.mark.parametrize(
    ("form", "value", "operand", "expected"),
    [
        ("eq", 1, 1, True),
        ("in", "a", frozenset("ab"), True),
        ("in", "c", frozenset("ab"), False),
        ("contains", frozenset("ab"), "a", True),
        ("contains", frozenset(), "a", False),
        ("intersects", frozenset("ab"), frozenset("bc"), True),
        ("intersects", frozenset("a"), frozenset("bc"), False),
        ("lt", 1, 2, True),
        ("lt", 2, 2, False),
        ("lte", 2, 2, True),
        ("lte", 3, 2, False),
        ("gt", 2, 2, False),
        ("gt", 3, 2, True),
        ("gte", 2, 2, True),
        ("gte", 1, 2, False),
        ("before", date(2026, 1, 1), date(2026, 1, 2), True),
        ("before", date(2026, 1, 2), date(2026, 1, 2), False),
        ("on_or_after", date(2026, 1, 2), date(2026, 1, 2), True),
        ("on_or_after", date(2026, 1, 1), date(2026, 1, 2), False),
    ],
)
def test_operators_at_their_borders(form, value, operand, expected):
    assert OPERATORS[form](value, operand) is expected
