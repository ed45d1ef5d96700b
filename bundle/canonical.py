"""Canonical JSON (RFC 8785), read strictly: one value has one form, and any other form is refused.

Every JSON document of a bundle passes through `parse_canonical`. Duplicate keys, floating-point
numbers, integers beyond 2^53-1, lone surrogates and deep nesting are refused before a schema sees
the value; FORMAT.md section 4. `parse_json` is the one reader of JSON in this package: files of
others may hold fractions and larger numbers, and nothing else that is ambiguous.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

import rfc8785

from policy.errors import RefusedError

MAX_DEPTH = 24
MAX_INTEGER = 2**53 - 1


def canonical_json(value: Any) -> bytes:
    """Return the RFC 8785 bytes of a JSON value that this program made; ValueError for others."""
    return rfc8785.dumps(value)


def parse_canonical(raw: bytes, *, code: str, what: str, limit: int) -> Any:
    """Return the JSON value of `raw`, which must be the canonical form of that value.

    Args:
        raw: Untrusted.
        code: Of the refusal.
        what: Names the document in the message.
        limit: In bytes.

    Raises:
        RefusedError: `code`; too long, not JSON, or not canonical.

    """
    value = parse_strict(raw, code=code, what=what, limit=limit)
    if canonical_json(value) != raw:
        raise RefusedError(code, f"{what} is JSON but not in the canonical form of RFC 8785")
    return value


def parse_strict(raw: bytes, *, code: str, what: str, limit: int) -> Any:
    """Return the JSON value of `raw` without asking for canonical form; otherwise as strict."""
    value = parse_json(
        raw,
        code=code,
        what=what,
        limit=limit,
        depth=MAX_DEPTH,
        integer=_integer,
        fraction=_no_float,
    )
    try:
        canonical_json(value)  # refuses what JSON text cannot carry, such as a lone surrogate
    except (ValueError, RecursionError) as error:
        raise RefusedError(code, f"{what} is not strict JSON: {error!s:.120}") from error
    return value


def parse_json(
    raw: bytes | memoryview,
    *,
    code: str,
    what: str,
    limit: int,
    depth: int,
    integer: Callable[[str], int],
    fraction: Callable[[str], float],
) -> Any:
    """Return the JSON value of `raw`, refusing all that two readers could read differently.

    Args:
        raw: Untrusted.
        code: Of the refusal.
        what: Names the document in the message.
        limit: In bytes.
        depth: Of nesting.
        integer: Reads a whole number, or raises ValueError.
        fraction: Reads any other finite number, or raises ValueError.

    Raises:
        RefusedError: `code`; too long, not UTF-8, not JSON, a key twice, NaN, or too deep.

    """
    if len(raw) > limit:
        raise RefusedError(code, f"{what} has {len(raw):,} bytes; at most {limit:,} are read")
    try:
        value = json.loads(
            bytes(raw).decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=integer,
            parse_float=fraction,
            parse_constant=_constant,
        )
        _require_depth(value, depth, depth)
    except (ValueError, RecursionError) as error:
        raise RefusedError(code, f"{what} is not strict JSON: {error!s:.160}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.60} stands twice in one object")
    return found


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text!r:.40} is not an integer")


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > len(str(MAX_INTEGER)) + 1 or abs(int(text)) > MAX_INTEGER:
        raise ValueError(f"{text!r:.40} is outside -(2^53-1) to 2^53-1")
    return int(text)


def _require_depth(value: Any, depth: int, most: int) -> None:
    if depth == 0:
        raise ValueError(f"nested deeper than {most}")
    if isinstance(value, dict):
        for item in value.values():
            _require_depth(item, depth - 1, most)
    elif isinstance(value, list):
        for item in value:
            _require_depth(item, depth - 1, most)
