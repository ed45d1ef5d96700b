"""The tar that we write and the only one that we read: headers, gaps and places follow from names.

A layout is known from paths and sizes alone. A reader re-creates every header and every gap and
compares bytes; it never interprets a header that the writer would not have written; FORMAT.md
section 3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence

from bundle.source import Source, read_exactly
from policy.errors import RefusedError

BLOCK = 512
ALIGN = 4096

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_TYPE = 156
_OCTAL_MAX = 0o77777777777
_PAX_NAME = b"././@PaxHeader"
_END = 2 * BLOCK


class Layout:
    """Where each file of a body lies, and what the bytes between them must be.

    Follows from the paths and sizes alone; offsets count from the first byte of the body.
    """

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = files  # path and size in bytes, in the order of the body
        self.offsets: list[int] = []
        self._starts: list[int] = []
        position = 0
        for path, size in files:
            self._starts.append(position)
            start = round_up(position, BLOCK)
            offset = start + len(header_blocks(path, size, start, ends_at=0))
            self.offsets.append(offset)
            position = offset + size
        self._starts.append(position)
        self.size = round_up(round_up(position, BLOCK) + _END, ALIGN)

    def gaps(self, low: int, high: int) -> Iterator[tuple[int, bytes, int]]:
        """Yield (start, bytes, index) of each gap that overlaps `low` up to `high`.

        A gap holds the padding after one file and the headers of the next; the last one has the
        index of no file and holds the end of the archive.
        """
        index = max(0, bisect_right(self._starts, low) - 1)
        while index < len(self._starts) and self._starts[index] < high:
            expected = self.gap(index)
            if self._starts[index] + len(expected) > low:
                yield self._starts[index], expected, index
            index += 1

    def spans(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (file index, offset in the file, start, end) of file bytes in `low` to `high`."""
        index = max(0, bisect_right(self.offsets, low) - 1)
        while index < len(self.offsets) and self.offsets[index] < high:
            start = max(low, self.offsets[index])
            end = min(high, self.offsets[index] + self.files[index][1])
            if start < end:
                yield index, start - self.offsets[index], start, end
            index += 1

    def gap(self, index: int) -> bytes:
        """Return the padding before file `index` and its headers, or the end after the last."""
        if index == len(self.files):
            return bytes(self.size - self._starts[index])
        return bytes(self.padding(index)) + self.header(index)

    def padding(self, index: int) -> int:
        """Return how many zero bytes stand before the headers of file `index`."""
        return -self._starts[index] % BLOCK

    def header(self, index: int) -> bytes:
        """Return the header blocks of file `index`."""
        path, size = self.files[index]
        return header_blocks(path, size, self._starts[index] + self.padding(index), ends_at=0)


def require_gaps(layout: Layout, chunk: memoryview, start: int) -> None:
    """Compare all headers and padding inside one chunk of the body with their only allowed form.

    Raises:
        RefusedError: `archive.padding`, `.type`, `.name`, `.header`.

    """
    end = start + len(chunk)
    for at, expected, index in layout.gaps(start, end):
        low, high = max(at, start), min(at + len(expected), end)
        if chunk[low - start : high - start] != expected[low - at : high - at]:
            found = bytes(chunk[low - start : high - start])
            raise _explain_gap(layout, found, expected[low - at : high - at], low - at, index)


def read_document(source: Source, start: int, path: str, limit: int) -> bytes:
    """Return the first file of a layout that begins at `start`: a document of unknown size.

    Raises:
        RefusedError: `archive.*`.

    """
    found = read_exactly(source, start, ALIGN)
    size = parse_size(found[-BLOCK:])
    if size is None or header_blocks(path, size, 0, ends_at=0) != found:
        raise explain(found[-BLOCK:], path)
    if size > limit:
        raise RefusedError("archive.limit", f"{path} has {size:,} bytes, more than {limit:,}")
    return read_exactly(source, start + ALIGN, size)


def names_document(source: Source, start: int, path: str) -> bool:
    """Tell whether the header of a first file at `start` bears the name `path`; proves nothing."""
    if start + ALIGN > source.size:
        return False
    block = read_exactly(source, start + ALIGN - BLOCK, BLOCK)
    return block[_NAME].rstrip(b"\0") == path.encode()


def require_layout(source: Source, start: int, layout: Layout) -> None:
    """Check every header and gap of a small layout that begins at `start` and ends with the file.

    Raises:
        RefusedError: `archive.*`.

    """
    require_end(source, start + layout.size)
    position = 0
    for index, (_, size) in enumerate([*layout.files, ("", 0)]):
        expected = layout.gap(index)
        found = read_exactly(source, start + position, len(expected))
        if found != expected:
            raise _explain_gap(layout, found, expected, 0, index)
        position += len(expected) + size


def require_end(source: Source, expected: int) -> None:
    """Check that a file ends where it must: `archive.truncated` or `archive.trailing`."""
    if source.size < expected:
        raise RefusedError(
            "archive.truncated",
            f"{source.path} has {source.size:,} of {expected:,} bytes",
            hint="copy it again from the medium",
        )
    if source.size > expected:
        raise RefusedError(
            "archive.trailing",
            f"{source.path}: {source.size - expected:,} bytes follow the end of the archive",
        )


# -- headers ----------------------------------------------------------------------------------


def header_blocks(path: str, size: int, start: int, *, ends_at: int | None) -> bytes:
    """Return all header blocks of a member that begins at `start`.

    The headers end at a position that is `ends_at` modulo 4096, or where they happen to end.
    """
    records = b""
    plain = path.isascii() and len(path) <= 100  # noqa: PLR2004 - the ustar name field
    if not plain:
        records += _record(b"path", path.encode())
    if size > _OCTAL_MAX:
        records += _record(b"size", str(size).encode())
    extension = _extension(records, start, ends_at)
    name = path.encode() if plain else path.encode("ascii", "replace").replace(b"?", b"_")[_NAME]
    return extension + _ustar(name, size if size <= _OCTAL_MAX else 0, b"0")


def _extension(records: bytes, start: int, ends_at: int | None) -> bytes:
    """Return the pax header block and its records, padded by a comment to reach the alignment."""
    if not records and (ends_at is None or (start + BLOCK - ends_at) % ALIGN == 0):
        return b""
    blocks = max(1, -(-len(records) // BLOCK))
    while True:
        end = start + (blocks + 2) * BLOCK
        rest = blocks * BLOCK - len(records)
        if (ends_at is None or (end - ends_at) % ALIGN == 0) and (rest == 0 or rest > 12):  # noqa: PLR2004 - `12 comment=\n` would be an empty value
            break
        blocks += 1
    if rest:
        records += _comment(rest)
    return _ustar(_PAX_NAME, len(records), b"x") + records


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    if len(str(total)) > len(str(length)):
        total += 1
    return b"%d %s=%s\n" % (total, key, value)


def _comment(total: int) -> bytes:
    """Return a comment record of exactly `total` bytes."""
    prefix = b"%d comment=" % total
    return prefix + b"p" * (total - len(prefix) - 1) + b"\n"


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    """Return one 512-byte header with the only metadata that a bundle carries."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"0000444\0"
    block[108:116] = b"0000000\0"
    block[116:124] = b"0000000\0"
    block[_SIZE] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[148:156] = b"        "
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def explain(found: bytes, path: str, *, order: Collection[str] = ()) -> RefusedError:
    """Name the reason why a header block is not that of `path`; `order` names its neighbours."""
    if found[257:262] != b"ustar":
        return RefusedError(
            "archive.header",
            f"where the header of {path!r:.80} must stand, there is no tar header",
            hint="this is no bundle, or a damaged one: copy it again from the medium",
        )
    kind = found[_TYPE : _TYPE + 1]
    if kind == b"x" and path in order:
        return RefusedError("archive.order", f"an extended header where {path} must stand")
    if kind not in {b"0", b"x"}:
        return RefusedError(
            "archive.type", f"a member of type {kind!r} where {path!r:.80} must stand"
        )
    name = found[_NAME].split(b"\0", maxsplit=1)[0]
    if kind == b"0" and name != path.encode()[_NAME]:
        code = "archive.order" if name.decode("latin-1") in order else "archive.name"
        return RefusedError(code, f"member {name!r:.80} where {path!r:.80} must stand")
    return RefusedError(
        "archive.header", f"the header of {path!r:.80} is not the one that staging writes"
    )


def _explain_gap(
    layout: Layout, found: bytes, expected: bytes, skipped: int, index: int
) -> RefusedError:
    """Name the reason why a gap, seen from its byte `skipped` on, is not as expected."""
    if index == len(layout.files):
        return RefusedError("archive.padding", "the end of the archive is not zero bytes")
    path, padding = layout.files[index][0], layout.padding(index)
    first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    if skipped + first < padding:
        return RefusedError("archive.padding", f"bytes before {path!r:.80} are not zero")
    block = (skipped + first - padding) // BLOCK * BLOCK + padding - skipped
    # A block that the chunk cuts is not shown whole: then it is a header that differs, no more.
    return explain(found[block : block + BLOCK] if block >= 0 else b"", path)


def parse_size(block: bytes) -> int | None:
    """Return the size in a header block, None when it is not in the one allowed form."""
    field = block[_SIZE]
    digits = field[:11]
    if field[11:] != b"\0" or any(digit not in b"01234567" for digit in digits):
        return None
    return int(digits, 8)


def round_up(value: int, unit: int) -> int:
    """Return the next multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit
