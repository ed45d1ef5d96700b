"""QR codes of ISO/IEC 18004 for a signed head on paper: byte mode, error correction level M.

No library of the pinned set draws them, and a head must get out of a room that has no other way.
Tests read the result with a decoder that is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from policy.errors import RefusedError

MAX_VERSION: Final = 25
# Level M, by version from 1: error-correction codewords of a block, and blocks.
_CORRECTION: Final = (
    10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26, 26, 28, 28, 28,
    28,
)  # fmt: skip
_BLOCKS: Final = (
    1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16, 17, 17, 18, 20, 21,
)  # fmt: skip
_LEVEL_M: Final = 0
_MASKS: Final[tuple[Callable[[int, int], bool], ...]] = (
    lambda x, y: (x + y) % 2 == 0,
    lambda _, y: y % 2 == 0,
    lambda x, _: x % 3 == 0,
    lambda x, y: (x + y) % 3 == 0,
    lambda x, y: (x // 3 + y // 2) % 2 == 0,
    lambda x, y: x * y % 2 + x * y % 3 == 0,
    lambda x, y: (x * y % 2 + x * y % 3) % 2 == 0,
    lambda x, y: ((x + y) % 2 + x * y % 3) % 2 == 0,
)
_QUIET: Final = 4  # modules of white around the code


@dataclass(frozen=True, slots=True)
class Code:
    """A finished code: rows of modules, true for dark."""

    version: int
    rows: tuple[tuple[bool, ...], ...]

    def svg(self, title: str) -> str:
        """Return the code as an SVG image of black squares; `title` is plain ASCII."""
        size = len(self.rows) + 2 * _QUIET
        dark = "".join(
            f"M{x + _QUIET},{y + _QUIET}h1v1h-1z"
            for y, row in enumerate(self.rows)
            for x, module in enumerate(row)
            if module
        )
        safe = title.replace("&", "&amp;").replace("<", "&lt;")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" '
            f'width="{size * 4}" height="{size * 4}" shape-rendering="crispEdges">'
            f'<title>{safe}</title><rect width="{size}" height="{size}" fill="#fff"/>'
            f'<path d="{dark}" fill="#000"/></svg>\n'
        )

    def terminal(self) -> str:
        """Return the code in half blocks, two rows of modules a line, for dark terminals too."""
        width = len(self.rows) + 2 * _QUIET
        white = [(False,) * width] * _QUIET
        margin = (False,) * _QUIET
        rows = [*white, *((*margin, *row, *margin) for row in self.rows), *white]
        rows += [(False,) * width] * (len(rows) % 2)
        signs = {(True, True): " ", (True, False): "\u2584", (False, True): "\u2580"}
        return "\n".join(
            "".join(signs.get(pair, "\u2588") for pair in zip(upper, lower, strict=True))
            for upper, lower in zip(rows[::2], rows[1::2], strict=True)
        )


def encode(content: bytes) -> Code:
    """Return the smallest code that holds `content`.

    Raises:
        RefusedError: `audit.note`; too long for version 25.

    """
    for version in range(1, MAX_VERSION + 1):
        room = _data_codewords(version) * 8
        bits = 4 + _length_bits(version) + 8 * len(content)
        if bits <= room:
            return _draw(version, _interleave(version, _data(version, content, room)))
    raise RefusedError(
        "audit.note",
        f"{len(content)} bytes fit no QR code of ours",
        hint="print the head as text: airgap audit head",
    )


# -- bits --------------------------------------------------------------------------------------


def _length_bits(version: int) -> int:
    return 8 if version < 10 else 16  # noqa: PLR2004 - table 3 of the standard


def _raw_modules(version: int) -> int:
    """Return the modules that carry codewords, function patterns excluded."""
    result = (16 * version + 128) * version + 64
    if version >= 2:  # noqa: PLR2004 - alignment patterns begin here
        count = version // 7 + 2
        result -= (25 * count - 10) * count - 55
        if version >= 7:  # noqa: PLR2004 - version information begins here
            result -= 36
    return result


def _data_codewords(version: int) -> int:
    return _raw_modules(version) // 8 - _CORRECTION[version - 1] * _BLOCKS[version - 1]


def _data(version: int, content: bytes, room: int) -> bytes:
    """Return mode, length, content and padding as codewords."""
    bits = f"{0b0100:04b}{len(content):0{_length_bits(version)}b}"
    bits += "".join(f"{byte:08b}" for byte in content)
    bits += "0" * min(4, room - len(bits))
    bits += "0" * (-len(bits) % 8)
    codewords = bytearray(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    for pad in _alternate(0xEC, 0x11):
        if len(codewords) == room // 8:
            break
        codewords.append(pad)
    return bytes(codewords)


def _alternate(one: int, other: int) -> Iterator[int]:
    while True:
        yield one
        yield other


def _interleave(version: int, data: bytes) -> bytes:
    """Cut the data into blocks, add error correction to each, and weave them together."""
    count, correction = _BLOCKS[version - 1], _CORRECTION[version - 1]
    total = _raw_modules(version) // 8
    short = total // count - correction
    long_from = count - total % count
    divisor = _divisor(correction)
    blocks, checks, at = [], [], 0
    for number in range(count):
        size = short + (number >= long_from)
        block = data[at : at + size]
        at += size
        blocks.append(block)
        checks.append(_remainder(block, divisor))
    woven = [block[i] for i in range(short + 1) for block in blocks if i < len(block)]
    woven += [check[i] for i in range(correction) for check in checks]
    return bytes(woven)


def _multiply(one: int, other: int) -> int:
    """Multiply in GF(256) with the polynomial 0x11D."""
    result = 0
    for bit in range(7, -1, -1):
        result = result << 1 ^ (result >> 7) * 0x11D
        result ^= (other >> bit & 1) * one
    return result


def _divisor(degree: int) -> list[int]:
    """Return the generator polynomial, without its leading one."""
    result = [0] * (degree - 1) + [1]
    root = 1
    for _ in range(degree):
        for at in range(degree):
            result[at] = _multiply(result[at], root)
            if at + 1 < degree:
                result[at] ^= result[at + 1]
        root = _multiply(root, 2)
    return result


def _remainder(data: bytes, divisor: list[int]) -> bytes:
    result = [0] * len(divisor)
    for byte in data:
        factor = byte ^ result.pop(0)
        result.append(0)
        result = [each ^ _multiply(coefficient, factor) for each, coefficient in zip(
            result, divisor, strict=True
        )]  # fmt: skip
    return bytes(result)


# -- modules -----------------------------------------------------------------------------------


class _Canvas:
    """A square of modules; `fixed` ones are function patterns, which no mask touches."""

    def __init__(self, version: int) -> None:
        self.version, self.size = version, 17 + 4 * version
        self.dark = [[False] * self.size for _ in range(self.size)]
        self.fixed = [[False] * self.size for _ in range(self.size)]

    def set(self, x: int, y: int, *, dark: bool) -> None:
        """Set a module of a function pattern."""
        self.dark[y][x], self.fixed[y][x] = dark, True

    def patterns(self) -> None:
        """Draw finders, timing, alignment and version; reserve the format's place."""
        size = self.size
        for at in range(size):
            self.set(6, at, dark=at % 2 == 0)
            self.set(at, 6, dark=at % 2 == 0)
        for x, y in ((3, 3), (size - 4, 3), (3, size - 4)):
            self._finder(x, y)
        places = self._alignment()
        last = len(places) - 1
        for i, x in enumerate(places):
            for j, y in enumerate(places):
                if (i, j) not in {(0, 0), (0, last), (last, 0)}:
                    self._align(x, y)
        self.format(0)
        self._version()

    def _finder(self, x: int, y: int) -> None:
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                if 0 <= x + dx < self.size and 0 <= y + dy < self.size:
                    self.set(x + dx, y + dy, dark=max(abs(dx), abs(dy)) not in {2, 4})

    def _align(self, x: int, y: int) -> None:
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                self.set(x + dx, y + dy, dark=max(abs(dx), abs(dy)) != 1)

    def _alignment(self) -> list[int]:
        if self.version == 1:
            return []
        count = self.version // 7 + 2
        step = (self.version * 8 + count * 3 + 5) // (count * 4 - 4) * 2
        places = [self.size - 7 - at * step for at in range(count - 1)] + [6]
        return places[::-1]

    def format(self, mask: int) -> None:
        """Draw level and mask, twice, with their error correction."""
        data = _LEVEL_M << 3 | mask
        rest = data
        for _ in range(10):
            rest = rest << 1 ^ (rest >> 9) * 0x537
        bits = (data << 10 | rest) ^ 0x5412
        size = self.size
        first = [(8, at) for at in range(6)] + [(8, 7), (8, 8), (7, 8)]
        first += [(14 - at, 8) for at in range(9, 15)]
        second = [(size - 1 - at, 8) for at in range(8)]
        second += [(8, size - 15 + at) for at in range(8, 15)]
        for places in (first, second):
            for at, (x, y) in enumerate(places):
                self.set(x, y, dark=bool(bits >> at & 1))
        self.set(8, size - 8, dark=True)

    def _version(self) -> None:
        if self.version < 7:  # noqa: PLR2004 - the standard writes none below
            return
        rest = self.version
        for _ in range(12):
            rest = rest << 1 ^ (rest >> 11) * 0x1F25
        bits = self.version << 12 | rest
        for at in range(18):
            x, y = self.size - 11 + at % 3, at // 3
            self.set(x, y, dark=bool(bits >> at & 1))
            self.set(y, x, dark=bool(bits >> at & 1))

    def fill(self, codewords: bytes) -> None:
        """Lay the codewords in the zigzag of the standard, from the right."""
        bits = (byte >> bit & 1 for byte in codewords for bit in range(7, -1, -1))
        for right in range(self.size - 1, 0, -2):
            column = right - (right <= 6)  # noqa: PLR2004 - the timing column is skipped
            upwards = (self.size - 1 - right) // 2 % 2 == 0
            for step in range(self.size):
                y = self.size - 1 - step if upwards else step
                for x in (column, column - 1):
                    if not self.fixed[y][x]:
                        self.dark[y][x] = bool(next(bits, 0))

    def mask(self, number: int) -> None:
        """Invert data modules by a mask; twice is none."""
        rule = _MASKS[number]
        for y in range(self.size):
            for x in range(self.size):
                if not self.fixed[y][x] and rule(x, y):
                    self.dark[y][x] = not self.dark[y][x]

    def penalty(self) -> int:
        """Return the standard's penalty: runs, blocks, finder look-alikes, balance."""
        columns = [list(column) for column in zip(*self.dark, strict=True)]
        total = sum(_line_penalty(line) for line in (*self.dark, *columns))
        for upper, lower in zip(self.dark, self.dark[1:], strict=False):
            for at in range(self.size - 1):
                if upper[at] == upper[at + 1] == lower[at] == lower[at + 1]:
                    total += 3
        dark = sum(map(sum, self.dark))
        return total + 10 * (abs(20 * dark - 10 * self.size**2) // self.size**2)


_LOOK_ALIKES: Final = ("00001011101", "10111010000")


def _line_penalty(line: list[bool]) -> int:
    text = "".join("1" if module else "0" for module in line)
    total, run = 0, 1
    for before, module in zip(text, text[1:] + "x", strict=False):
        if module == before:
            run += 1
            continue
        total += run - 2 if run >= 5 else 0  # noqa: PLR2004 - the standard's first rule
        run = 1
    for pattern in _LOOK_ALIKES:
        at = text.find(pattern)
        while at >= 0:
            total += 40
            at = text.find(pattern, at + 1)
    return total


def _draw(version: int, codewords: bytes) -> Code:
    """Draw patterns and codewords, and choose the mask with the least penalty."""
    canvas = _Canvas(version)
    canvas.patterns()
    canvas.fill(codewords)
    best = (1 << 30, 0)
    for number in range(len(_MASKS)):
        canvas.mask(number)
        canvas.format(number)
        best = min(best, (canvas.penalty(), number))
        canvas.mask(number)
    canvas.mask(best[1])
    canvas.format(best[1])
    return Code(version, tuple(tuple(row) for row in canvas.dark))
