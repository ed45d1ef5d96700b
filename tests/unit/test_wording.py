"""How a number of things is said."""

import pytest

from policy.wording import counted


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (1, ("request",), "1 request"),
        (0, ("request",), "0 requests"),
        (1_200, ("record",), "1,200 records"),
        (1, ("entry", "entries"), "1 entry"),
        (2, ("entry", "entries"), "2 entries"),
    ],
)
def test_one_is_not_many(number, words, said):
    assert counted(number, *words) == said
