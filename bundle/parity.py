"""Reed-Solomon over GF(256): lost chunks of a set are computed from the others; FORMAT.md 14.6.

The code is systematic, with a Cauchy matrix whose first row is all ones: with one parity volume it
is plain XOR. Any `parity` chunks of one column may be lost. Multiplication by a constant is a
translation table and addition an exclusive or of whole chunks, so the standard library is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

MAX_VOLUMES = 255  # data and parity together: the field has no more elements to tell them apart
_POLYNOMIAL = 0x11D


@cache
def _tables() -> tuple[list[int], list[int]]:
    """Return powers of the generator 2, twice over, and logarithms."""
    powers, logs, value = [0] * 510, [0] * 256, 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logs[value] = exponent
        value <<= 1
        if value & 0x100:
            value ^= _POLYNOMIAL
    return powers, logs


def multiply(a: int, b: int) -> int:
    """Return the product in GF(256)."""
    powers, logs = _tables()
    return powers[logs[a] + logs[b]] if a and b else 0


def invert(a: int) -> int:
    """Return the inverse in GF(256); ZeroDivisionError for 0."""
    if not a:
        raise ZeroDivisionError("0 has no inverse in GF(256)")
    powers, logs = _tables()
    return powers[255 - logs[a]]


@cache
def matrix(count: int, parity: int) -> tuple[tuple[int, ...], ...]:
    """Return the coefficients: parity `r` is the sum of `matrix[r][i]` times data `i`.

    Entry (r, i) is 1 / (x_r + y_i) with x_r = 255 - r and y_i = i, each column divided by its first
    entry. ValueError when data and parity together are more than `MAX_VOLUMES`.
    """
    if count < 1 or parity < 0 or count + parity > MAX_VOLUMES:
        raise ValueError(f"no code of {count} data and {parity} parity volumes")
    rows = [[invert((255 - r) ^ i) for i in range(count)] for r in range(max(parity, 1))]
    scale = [invert(value) for value in rows[0]]
    made = [tuple(multiply(v, s) for v, s in zip(row, scale, strict=True)) for row in rows]
    return tuple(made[:parity])


class Sums:
    """Running sums over the chunks of one column, one for each row of the code."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._sums = [0] * len(rows)

    def add(self, place: int, chunk: bytes) -> None:
        """Add the chunk of data volume `place`, counted from 0; a short one ends in zeros."""
        plain: int | None = None
        for number, row in enumerate(self._rows):
            factor = row[place]
            if factor == 1:
                plain = int.from_bytes(chunk, "little") if plain is None else plain
                self._sums[number] ^= plain
            elif factor:
                self._sums[number] ^= int.from_bytes(chunk.translate(_table(factor)), "little")

    def chunk(self, number: int, length: int) -> bytes:
        """Return the sum of row `number`, in `length` bytes."""
        return self._sums[number].to_bytes(length, "little")


def recover(
    rows: Sequence[Sequence[int]],
    lost: Sequence[int],
    sums: Sums,
    parities: Sequence[bytes],
) -> list[bytes]:
    """Return the chunks of the data volumes `lost`, in that order.

    Args:
        rows: Those rows of the code whose parity chunks are there, at least as many as `lost`.
        lost: Places of the lost chunks.
        sums: Over the chunks that are there, by the same rows.
        parities: The parity chunks, by row.

    """
    used = range(len(lost))
    square = [[rows[r][place] for place in lost] for r in used]
    length = len(parities[0])
    syndromes = Sums(_invert_matrix(square))
    for r in used:
        seen = int.from_bytes(sums.chunk(r, length), "little")
        difference = int.from_bytes(parities[r], "little") ^ seen
        syndromes.add(r, difference.to_bytes(length, "little"))
    return [syndromes.chunk(number, length) for number in used]


@cache
def _table(factor: int) -> bytes:
    return bytes(multiply(factor, value) for value in range(256))


def _invert_matrix(square: Sequence[Sequence[int]]) -> list[list[int]]:
    """Invert by elimination; every square part of a Cauchy matrix can be inverted."""
    size = len(square)
    work = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(square)]
    for column in range(size):
        pivot = next(r for r in range(column, size) if work[r][column])
        work[column], work[pivot] = work[pivot], work[column]
        factor = invert(work[column][column])
        work[column] = [multiply(value, factor) for value in work[column]]
        for r in range(size):
            other = work[r][column]
            if r != column and other:
                work[r] = [
                    value ^ multiply(other, pivoted)
                    for value, pivoted in zip(work[r], work[column], strict=True)
                ]
    return [row[size:] for row in work]
