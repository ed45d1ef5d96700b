"""Canonical JSON of the engine: on every value the bytes of rfc8785, or its refusal."""

import pytest
import rfc8785
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_cases import ADMISSION, LOGOS_8B, USE, ask

from policy import canonical
from policy.canonical import canonical_bytes
from policy.terms import Scope

# Every character there is, those with an escape and the odd ones of JSON above all.
odd = st.sampled_from(
    [*map(chr, range(0x20)), '"', "\\", "/", "\x7f", "\u2028", "\ufeff", "\U0001f600"]
)
text = st.text(odd | st.characters(exclude_categories=["Cs"]), max_size=12)
whole = st.integers(-(2**53) + 1, 2**53 - 1)
key = st.text(st.characters(max_codepoint=0x7F), max_size=6)


def documents(scalars, keys):
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
        max_leaves=16,
    )


@settings(max_examples=300, deadline=None)
@given(value=documents(text | whole | st.booleans() | st.none(), key))
def test_a_record_has_the_bytes_of_rfc_8785(value):
    assert canonical._is_ordinary(value)
    assert canonical.orjson.dumps(value, option=canonical._OPTIONS) == rfc8785.dumps(value)
    assert canonical_bytes(value) == rfc8785.dumps(value)


def outcome(write, value):
    try:
        return write(value)
    except ValueError as error:
        return type(error)


strange = st.floats() | st.integers() | st.text(max_size=4) | st.characters(categories=["Cs"])


@settings(max_examples=300, deadline=None)
@given(value=documents(strange | text | st.tuples(whole), st.text(max_size=4)))
@example({"\ue000": 1, "\U00010000": 2})  # UTF-16 puts the second key first, UTF-8 does not
@example([1.0, -0.0, 1e21])
@example({"a": 2**53})
@example("\ud800")
def test_any_other_value_has_the_answer_of_rfc_8785(value):
    assert outcome(canonical_bytes, value) == outcome(rfc8785.dumps, value)


@pytest.mark.parametrize(("scope", "facts"), [(Scope.USE, USE), (Scope.ADMISSION, ADMISSION)])
def test_decisions_take_the_short_way(scope, facts, monkeypatch):
    decision = ask(facts, LOGOS_8B, scope=scope)
    whole = decision.as_document()
    expected = rfc8785.dumps(whole)
    monkeypatch.setattr(canonical.rfc8785, "dumps", None)
    assert decision.canonical == expected
