"""The header of a safetensors file, read more strictly than the format's own library does.

Decides whether the spans of the header tile the data exactly: no gap, no overlap, no byte after the
last tensor, no key twice (which safetensors 0.8 accepts). Obeys docs/design/bundle.md, 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bundle.scan.strict import parse_object
from policy.errors import RefusedError

CODE = "scan.safetensors"
HEADER_LIMIT = 32 * 1024 * 1024  # a shard of a 600 B model has under 1 MiB
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_METADATA = 256  # entries; and this many KiB of text
MAX_NAME = 512
_PREFIX = 8  # bytes that hold the length of the header

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; `start` and `end` count bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A whole file: its tensors in the order of their bytes, and the publisher's metadata."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


def parse_safetensors(data: memoryview, what: str = "the file") -> TensorFile:
    """Read the header of `data`, which must be the complete file; tensor bytes are not touched.

    Raises:
        RefusedError: `scan.safetensors`.

    """
    if len(data) < _PREFIX:
        raise RefusedError(CODE, f"{what} has {len(data)} bytes; a header takes 8 and more")
    length = int.from_bytes(data[:_PREFIX], "little")
    if length > min(HEADER_LIMIT, len(data) - _PREFIX):
        raise RefusedError(
            CODE,
            f"{what}: the header claims {length:,} bytes; the file has {len(data):,} "
            f"and the limit is {HEADER_LIMIT:,}",
        )
    raw = data[_PREFIX : _PREFIX + length]
    if bytes(raw[:1]) != b"{":
        raise RefusedError(CODE, f"{what}: the header does not begin with an object")
    header = parse_object(raw, code=CODE, what=f"the header of {what}", limit=HEADER_LIMIT)
    metadata = _metadata(header.pop("__metadata__", {}), what)
    if not 1 <= len(header) <= MAX_TENSORS:
        raise RefusedError(CODE, f"{what} holds {len(header):,} tensors; 1 to {MAX_TENSORS:,}")
    base = _PREFIX + length
    tensors = sorted(
        (_tensor(name, entry, base, what) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    place = base
    for tensor in tensors:
        if tensor.start != place:
            kind = "overlaps the tensor before it" if tensor.start < place else "follows a gap"
            raise RefusedError(CODE, f"{what}: tensor {tensor.name!r:.80} {kind}")
        place = tensor.end
    if place != len(data):
        raise RefusedError(
            CODE, f"{what}: tensors end at byte {place:,}, the file at {len(data):,}"
        )
    return TensorFile(tuple(tensors), metadata)


def _metadata(value: Any, what: str) -> dict[str, str]:
    sound = (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA
        and all(isinstance(item, str) for item in value.values())
        and sum(len(k) + len(v) for k, v in value.items()) <= MAX_METADATA * 1024
    )
    if not sound:
        raise RefusedError(CODE, f"{what}: __metadata__ is not a small map of strings")
    return dict(value)


def _tensor(name: str, entry: Any, base: int, what: str) -> Tensor:
    here = f"{what}: tensor {name!r:.80}"
    if not 1 <= len(name) <= MAX_NAME:
        raise RefusedError(CODE, f"{here} has a name of {len(name)} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise RefusedError(CODE, f"{here} is not {{dtype, shape, data_offsets}}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise RefusedError(CODE, f"{here} has the unknown type {dtype!r:.40}")
    shape = _counts(entry["shape"], here, "shape", MAX_RANK)
    start, end = [*_counts(entry["data_offsets"], here, "data_offsets", 2), -1, -1][:2]
    if end < start or end < 0:
        raise RefusedError(CODE, f"{here} has no ordered pair of offsets")
    size = SIZES[dtype]
    for count in shape:
        size *= count
    if size != end - start:
        raise RefusedError(CODE, f"{here} spans {end - start:,} bytes; its shape needs {size:,}")
    return Tensor(name, dtype, shape, base + start, base + end)


def _counts(value: Any, here: str, field: str, longest: int) -> tuple[int, ...]:
    sound = (
        isinstance(value, list)
        and len(value) <= longest
        and all(type(item) is int and 0 <= item < 1 << 53 for item in value)
    )
    if not sound:
        raise RefusedError(CODE, f"{here}: {field} is not a list of at most {longest} counts")
    return tuple(value)
