"""Strict reading of JSON objects with the standard library alone: the worker has no schema library.

Unknown, missing and repeated fields are errors, a boolean is not a number, no number is infinite,
and no text holds half a surrogate pair.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class MalformedError(ValueError):
    """The bytes are not the JSON object that was asked for; the message names the field."""


def parse_object(raw: bytes, *, limit: int, what: str) -> Fields:
    """Read one JSON object.

    Args:
        raw: Untrusted bytes.
        limit: The most bytes that are looked at.
        what: The name of the document in messages.

    Raises:
        MalformedError: Too long, not UTF-8, not JSON, too deep, a field twice, not an object.

    """
    if len(raw) > limit:
        raise MalformedError(f"{what} has {len(raw)} bytes, more than {limit}")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_not_a_number
        )
    except MalformedError as error:
        raise MalformedError(f"{what}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} is not JSON") from error
    return Fields(value, what)


class Fields:
    """One object that is taken apart field by field; `done` refuses what nobody asked for."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise MalformedError(f"{what} is not an object")
        self._left: dict[str, Any] = dict(value)
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Any:
        """Return the raw value of a field that must be there."""
        if name not in self._left:
            raise MalformedError(f"{self._what}: field {name!r} is missing")
        return self._left.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a whole number within `low` and `high`, both included."""
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            self.fail(name, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number, or None for null; the field itself must be there."""
        if self._left.get(name, 0) is None:
            del self._left[name]
            return None
        return self.integer(name, low, high)

    def real(self, name: str, low: float, high: float) -> float:
        """Return a finite number within `low` and `high`, both included."""
        value = self.take(name)
        if type(value) not in (int, float) or not low <= value <= high:
            self.fail(name, f"a number from {low} to {high}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        value = self.take(name)
        if type(value) is not bool:
            self.fail(name, "true or false")
        return value

    def text(self, name: str, limit: int) -> str:
        """Return a text of at most `limit` characters; it may be empty."""
        value = self.take(name)
        if not is_text(value, limit):
            self.fail(name, f"a text of at most {limit} characters")
        return str(value)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of the texts in `choices`."""
        value = self.take(name)
        if type(value) is not str or value not in choices:
            self.fail(name, "one of " + ", ".join(choices))
        return value

    def items(self, name: str, low: int, high: int) -> list[Any]:
        """Return a list of `low` to `high` raw values."""
        value = self.take(name)
        if type(value) is not list or not low <= len(value) <= high:
            self.fail(name, f"a list of {low} to {high} entries")
        return value

    def integers(self, name: str, length: tuple[int, int], high: int) -> tuple[int, ...]:
        """Return a list of whole numbers from 0 to `high`; `length` bounds how many."""
        values = self.items(name, *length)
        if any(type(value) is not int or not 0 <= value <= high for value in values):
            self.fail(name, f"whole numbers from 0 to {high}")
        return tuple(values)

    def texts(self, name: str, length: tuple[int, int], limit: int) -> tuple[str, ...]:
        """Return a list of texts of at most `limit` characters; `length` bounds how many."""
        values = self.items(name, *length)
        if not all(is_text(value, limit) for value in values):
            self.fail(name, f"texts of at most {limit} characters")
        return tuple(values)

    def rest(self) -> dict[str, Any]:
        """Return every field that was not read yet, as it came."""
        left, self._left = self._left, {}
        return left

    def done(self) -> None:
        """Refuse fields that were not read."""
        if self._left:
            raise MalformedError(f"{self._what}: unknown field {min(self._left)!r:.80}")

    def fail(self, name: str, expected: str) -> NoReturn:
        """Refuse the field `name`; its value may be a secret and is not repeated."""
        raise MalformedError(f"{self._what}: field {name!r} must be {expected}")


def is_text(value: object, limit: int) -> bool:
    """Tell whether `value` is a text of at most `limit` characters that UTF-8 can carry."""
    if type(value) is not str or len(value) > limit:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedError("a field stands twice")
    return found


def _not_a_number(_text: str) -> NoReturn:
    raise MalformedError("a number is infinite or none")
