"""A walk over the protobuf of an ONNX model: every graph, sub-graph, function and training graph.

Decides whether a graph stays inside its own files and inside the operators that we know, without
the onnx library and before any runtime opens it. Unknown fields, a singular field twice (protobuf
would merge them) and wire types that the schema does not have are refused. Obeys
docs/design/bundle.md, 5; the table below is onnx.proto of onnx 1.23.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from policy.errors import RefusedError

CODE = "scan.onnx"
EXTERNAL = "scan.onnx.external"
DOMAIN = "scan.onnx.domain"

MAX_DEPTH = 64  # messages inside messages; 8 a level of sub-graphs
MAX_FIELDS = 4_000_000  # in one file; an 80-layer model has about 300,000
MAX_NODES = 1_000_000
MAX_STRING = 1 << 16  # bytes of any name or text
MAX_STRING_DATA = 1 << 20  # bytes of all string tensors together
MAX_EXTERNAL = 100_000
IR_VERSIONS = range(7, 12)  # onnxruntime 1.28 reads up to 11
OPSETS = {"": range(11, 24), "ai.onnx": range(11, 24), "com.microsoft": range(1, 2)}
# Of com.microsoft, only what a transformer needs: EPContext, for one, loads a file by itself.
MICROSOFT = frozenset(
    [
        *("GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding", "MatMulNBits"),
        *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "FusedMatMul"),
        *("SkipLayerNormalization", "QuickGelu", "BiasGelu", "FastGelu", "Gelu", "QMoE", "MoE"),
    ]
)
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Kinds of a field: `int`, `f32`, `f64` singular numbers; `str`, `bin` singular bytes; a name of a
# message; a `*` in front: repeated. Repeated numbers may be packed.
_TABLE = {
    "Model": "1 int 2 str 3 str 4 str 5 int 6 str 7 Graph 8 *OperatorSet 14 *Pair 20 *Training "
    "25 *Function 26 *Configuration",
    "Graph": "1 *Node 2 str 5 *Tensor 10 str 11 *Value 12 *Value 13 *Value 14 *Annotation "
    "15 *SparseTensor 16 *Pair",
    "Node": "1 *str 2 *str 3 str 4 str 5 *Attribute 6 str 7 str 8 str 9 *Pair 10 *Placement",
    "Attribute": "1 str 2 f32 3 int 4 bin 5 Tensor 6 Graph 7 *f32 8 *int 9 *bin 10 *Tensor "
    "11 *Graph 13 str 14 Type 15 *Type 20 int 21 str 22 SparseTensor 23 *SparseTensor",
    "Tensor": "1 *int 2 int 3 Segment 4 *f32 5 *int 6 *bin 7 *int 8 str 9 bin 10 *f64 11 *int "
    "12 str 13 *Pair 14 int 16 *Pair",
    "Segment": "1 int 2 int",
    "SparseTensor": "1 Tensor 2 Tensor 3 *int",
    "Value": "1 str 2 Type 3 str 4 *Pair",
    "Type": "1 TypeTensor 4 TypeSequence 5 TypeMap 6 str 7 TypeOpaque 8 TypeTensor 9 TypeSequence",
    "TypeTensor": "1 int 2 Shape",
    "TypeSequence": "1 Type",
    "TypeMap": "1 int 2 Type",
    "TypeOpaque": "1 str 2 str",
    "Shape": "1 *Dimension",
    "Dimension": "1 int 2 str 3 str",
    "OperatorSet": "1 str 2 int",
    "Pair": "1 str 2 str",
    "Annotation": "1 str 2 *Pair",
    "Training": "1 Graph 2 Graph 3 *Pair 4 *Pair",
    "Function": "1 str 4 *str 5 *str 6 *str 7 *Node 8 str 9 *OperatorSet 10 str 11 *Attribute "
    "12 *Value 13 str 14 *Pair",
    "Configuration": "1 str 2 int 3 *str",
    "Placement": "1 str 2 *Sharding 3 int",
    "Sharding": "1 str 2 *int 3 *IntList 4 *ShardedDim",
    "IntList": "1 int 2 *int",
    "ShardedDim": "1 int 2 *SimpleDim",
    "SimpleDim": "1 int 2 str 3 int",
}
_WIRE = {"int": VARINT, "f32": FIXED32, "f64": FIXED64}
# Bits of one element, by TensorProto.DataType; 8 is a string.
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    **dict.fromkeys((21, 22, 23), 4),
    15: 128,
}
_STRING = 8
# Numbers of the fields that a check reads.
_DIMS, _TYPE, _SEGMENT, _STRINGS, _NAME, _RAW, _PAIRS, _LOCATION = 1, 2, 3, 6, 8, 9, 13, 14
_INLINE = frozenset([4, 5, 7, 9, 10, 11])
_PLACEMENT, _OPAQUE = 10, 7
_LAST_BYTE = 0x80  # a byte of a varint below this one is the last


def _schema() -> dict[str, dict[int, tuple[str, bool]]]:
    found: dict[str, dict[int, tuple[str, bool]]] = {}
    for name, text in _TABLE.items():
        parts = text.split()
        found[name] = {
            int(number): (kind.removeprefix("*"), kind.startswith("*"))
            for number, kind in zip(parts[::2], parts[1::2], strict=True)
        }
    return found


_SCHEMA = _schema()


@dataclass(frozen=True, slots=True)
class External:
    """A tensor whose bytes lie in another file, at `offset` for `length` bytes."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Onnx:
    """What a graph file says about itself."""

    ir_version: int
    opsets: dict[str, int]
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    external: tuple[External, ...]


def parse_onnx(
    data: memoryview, *, sizes: Callable[[str], int | None], what: str = "the graph"
) -> Onnx:
    """Walk the whole file; tensor bytes are not read.

    Args:
        data: The complete file, untrusted.
        sizes: Gives the size in bytes of a file beside the graph that the manifest lists (or the
            folder holds as a regular file), None when there is none.
        what: Names the file in the message.

    Raises:
        RefusedError: `scan.onnx`, `scan.onnx.domain` or `scan.onnx.external`.

    """
    walk = _Walk(what, sizes)
    try:
        model = walk.message("Model", data, 0)
    except RecursionError as error:  # cannot happen within MAX_DEPTH; a guard, not a path
        raise RefusedError(CODE, f"{what} is nested too deeply") from error
    return walk.finish(model)


@dataclass(slots=True)
class _Message:
    """A parsed message: numbers and texts by field, and the messages below it."""

    kind: str
    numbers: dict[int, int] = field(default_factory=dict)
    lists: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)  # bytes of data fields, not kept
    below: dict[int, list[_Message]] = field(default_factory=dict)

    def text(self, number: int) -> str:
        return self.texts.get(number, [""])[0]


@dataclass(slots=True)
class _Walk:
    what: str
    sizes: Callable[[str], int | None]
    fields: int = 0
    nodes: int = 0
    string_data: int = 0
    external: list[External] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    imports: dict[str, int] = field(default_factory=dict)

    def message(self, kind: str, data: memoryview, depth: int) -> _Message:
        """Parse one message and check it at once; only small things are kept."""
        if depth > MAX_DEPTH:
            raise self._no(f"messages nest deeper than {MAX_DEPTH}")
        found = _Message(kind)
        schema = _SCHEMA[kind]
        for number, wire, value in self._fields(data):
            if number not in schema:
                raise self._no(f"{kind} has the unknown field {number}")
            name, repeated = schema[number]
            if not repeated and self._seen(found, number):
                raise self._no(f"{kind} has field {number} twice")
            if name in _WIRE:
                self._number(found, number, name, wire, value, repeated=repeated)
            elif wire != BYTES or not isinstance(value, memoryview):
                raise self._no(f"{kind} field {number} has wire type {wire}")
            else:
                self._bytes(found, number, name, value, depth)
        check = _CHECKS.get(kind)
        if check is not None:
            check(self, found)
        return found

    def _bytes(
        self, found: _Message, number: int, name: str, value: memoryview, depth: int
    ) -> None:
        """Take a text, a block of data or a message."""
        if name == "str":
            found.texts.setdefault(number, []).append(self._text(value))
        elif name == "bin":
            found.sizes[number] = found.sizes.get(number, 0) + len(value)
        else:
            below = self.message(name, value, depth + 1)
            kept = found.below.setdefault(number, [])
            if name in {"Pair", "OperatorSet", "Value"} or found.kind == "Model":
                kept.append(below)  # all others were checked and are not needed again

    def finish(self, model: _Message) -> Onnx:
        """Check what only the whole file tells."""
        version = model.numbers.get(1, 0)
        if version not in IR_VERSIONS:
            raise self._no(f"IR version {version}; known are {_span(IR_VERSIONS)}")
        graphs = model.below.get(7, [])
        if not graphs:
            raise self._no("it holds no graph")
        for number, name in ((20, "training information"), (26, "a device configuration")):
            if number in model.below:
                raise self._no(f"it holds {name}, which inference never needs")
        opsets = {entry.text(1): entry.numbers.get(2, 0) for entry in model.below.get(8, [])}
        if not opsets:
            raise self._no("it imports no operator set")
        for domain, operator in sorted(self.operators - self.functions):
            if domain not in OPSETS or (domain == "com.microsoft" and operator not in MICROSOFT):
                raise RefusedError(
                    DOMAIN,
                    f"{self.what}: operator {operator!r:.60} of domain {domain!r:.60} is not known",
                    hint="export with standard operators, as `airgap build` does",
                )
        self._require_apart()
        graph = graphs[0]
        names = {
            number: tuple(value.text(1) for value in graph.below.get(number, []))
            for number in (11, 12)
        }
        return Onnx(version, opsets, self.nodes, names[11], names[12], tuple(self.external))

    # -- wire format --------------------------------------------------------------------------

    def _fields(self, data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
        place, end = 0, len(data)
        while place < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise self._no(f"it has more than {MAX_FIELDS:,} fields")
            tag, place = self._varint(data, place)
            number, wire = tag >> 3, tag & 7
            value: int | memoryview
            if wire == VARINT:
                value, place = self._varint(data, place)
            elif wire == BYTES:
                size, place = self._varint(data, place)
                value, place = data[place : place + size], place + size
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
                value, place = data[place : place + size], place + size
            else:
                raise self._no(f"field {number} has wire type {wire}")
            if place > end or number == 0:
                raise self._no(f"field {number} runs past the end of its message")
            yield number, wire, value

    def _varint(self, data: memoryview, place: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if place >= len(data):
                raise self._no("it ends inside a number")
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < _LAST_BYTE:
                if value >= 1 << 64:
                    break
                return value, place
        raise self._no("a number has more than 64 bits")

    def _number(
        self,
        found: _Message,
        number: int,
        name: str,
        wire: int,
        value: int | memoryview,
        *,
        repeated: bool,
    ) -> None:
        if wire == _WIRE[name]:
            if isinstance(value, int):
                if repeated:
                    self._append(found, number, value)
                else:
                    found.numbers[number] = value
            else:
                found.sizes[number] = found.sizes.get(number, 0) + len(value)
        elif wire == BYTES and repeated and isinstance(value, memoryview):  # packed
            if name == "int" and number in _KEPT.get(found.kind, ()):
                place = 0
                while place < len(value):
                    item, place = self._varint(value, place)
                    self._append(found, number, item)
            elif name != "int" and len(value) % (4 if name == "f32" else 8):
                raise self._no(f"{found.kind} field {number} is cut inside a number")
            found.sizes[number] = found.sizes.get(number, 0) + len(value)
        else:
            raise self._no(f"{found.kind} field {number} has wire type {wire}")

    def _append(self, found: _Message, number: int, value: int) -> None:
        items = found.lists.setdefault(number, [])
        if number in _KEPT.get(found.kind, ()):
            items.append(value)
            if len(items) > _KEPT[found.kind][number]:
                raise self._no(f"{found.kind} field {number} has too many entries")

    def _text(self, value: memoryview) -> str:
        if len(value) > MAX_STRING:
            raise self._no(f"a text of {len(value):,} bytes")
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._no("a text is not UTF-8") from error

    def _seen(self, found: _Message, number: int) -> bool:
        return any(
            number in table for table in (found.numbers, found.texts, found.sizes, found.below)
        )

    def _no(self, reason: str) -> RefusedError:
        return RefusedError(
            CODE, f"{self.what}: {reason}", hint="export the graph again with `airgap build`"
        )

    # -- meaning ------------------------------------------------------------------------------

    def check_opset(self, found: _Message) -> None:
        """Operator sets: known domain, known version, one version a domain in the whole file."""
        domain, version = found.text(1), found.numbers.get(2, 0)
        if domain in OPSETS and version not in OPSETS[domain]:
            raise self._no(f"operator set {domain or 'ai.onnx'} {version} is not known")
        if self.imports.setdefault(domain, version) != version:
            raise self._no(f"operator set {domain or 'ai.onnx'} is imported in two versions")
        if domain not in OPSETS:
            raise RefusedError(
                DOMAIN,
                f"{self.what}: imports operators of the unknown domain {domain!r:.60}",
                hint="export with standard operators, as `airgap build` does",
            )

    def check_node(self, found: _Message) -> None:
        """Count nodes and remember their operators; functions may stand anywhere in the file."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._no(f"it has more than {MAX_NODES:,} nodes")
        self.operators.add((found.text(7), found.text(4)))
        if _PLACEMENT in found.below:
            raise self._no("a node is bound to a device, which inference never needs")

    def check_function(self, found: _Message) -> None:
        """A function may not claim a name in a domain that is ours to know."""
        self.functions.add((found.text(10), found.text(1)))
        if found.text(10) not in OPSETS:
            raise RefusedError(
                DOMAIN,
                f"{self.what}: defines functions of the unknown domain {found.text(10)!r:.60}",
            )

    def check_type(self, found: _Message) -> None:
        """Refuse opaque types: only a custom operator can use one."""
        if _OPAQUE in found.below:
            raise RefusedError(DOMAIN, f"{self.what}: holds an opaque type")

    def check_tensor(self, found: _Message) -> None:
        """Sizes must agree with the shape, wherever the bytes lie."""
        name = found.text(_NAME)
        kind = found.numbers.get(_TYPE, 0)
        if _SEGMENT in found.below:
            raise self._no(f"tensor {name!r:.60} is a segment of another")
        dims = found.lists.get(_DIMS, [])
        if any(size >= 1 << 53 for size in dims):
            raise self._no(f"tensor {name!r:.60} has an impossible shape")
        count = 1
        for size in dims:
            count *= size
        if _STRINGS in found.sizes or kind == _STRING:
            self.string_data += found.sizes.get(_STRINGS, 0)
            if kind != _STRING or self.string_data > MAX_STRING_DATA:
                raise self._no(f"string tensor {name!r:.60} is out of place or too large")
        elif kind not in _BITS:
            raise self._no(f"tensor {name!r:.60} has the unknown type {kind}")
        needed = (count * _BITS.get(kind, 0) + 7) // 8
        if found.numbers.get(_LOCATION, 0) != 0 or _PAIRS in found.below:
            self._external(found, name, needed)
        elif _RAW in found.sizes and found.sizes[_RAW] != needed:
            raise self._no(
                f"tensor {name!r:.60} has {found.sizes[_RAW]:,} bytes; its shape needs {needed:,}"
            )

    def _external(self, found: _Message, name: str, needed: int) -> None:
        here = f"{self.what}: tensor {name!r:.60}"
        pairs = [(pair.text(1), pair.text(2)) for pair in found.below.get(_PAIRS, [])]
        keys = [key for key, _ in pairs]
        values = dict(pairs)
        if found.numbers.get(_LOCATION, 0) != 1 or _INLINE & (
            found.sizes.keys() | found.lists.keys()
        ):
            raise RefusedError(EXTERNAL, f"{here} is external and inline at once")
        if len(set(keys)) != len(keys) or not set(keys) <= {
            "location",
            "offset",
            "length",
            "checksum",
        }:
            raise RefusedError(EXTERNAL, f"{here} has other external keys: {sorted(keys)!r:.120}")
        location = values.get("location", "")
        if not PLAIN_NAME.fullmatch(location):
            raise RefusedError(
                EXTERNAL, f"{here} points to {location!r:.80}, which is not a plain file name"
            )
        numbers = [values.get("offset", "0"), values.get("length", "")]
        if not all(NUMBER.fullmatch(number) for number in numbers):
            raise RefusedError(EXTERNAL, f"{here} has no plain offset and length")
        offset, length = (int(number) for number in numbers)
        size = self.sizes(location)
        if size is None:
            raise RefusedError(EXTERNAL, f"{here} points to {location!r:.80}, which is not listed")
        if offset + length > size or length != needed:
            raise RefusedError(
                EXTERNAL,
                f"{here} reads {length:,} bytes at {offset:,} of {location!r:.80} "
                f"({size:,} bytes); its shape needs {needed:,}",
            )
        if len(self.external) >= MAX_EXTERNAL:
            raise self._no(f"it has more than {MAX_EXTERNAL:,} external tensors")
        self.external.append(External(name, location, offset, length))

    def _require_apart(self) -> None:
        """Refuse two external tensors that share some bytes but not all."""
        spans = sorted({(e.location, e.offset, e.offset + e.length) for e in self.external})
        for (one, _, end), (other, start, _) in itertools.pairwise(spans):
            if one == other and start < end:
                raise RefusedError(
                    EXTERNAL, f"{self.what}: external tensors overlap at byte {start:,} of {one!r}"
                )


# Repeated numbers that a check reads, with the most entries that are sane.
_KEPT: Mapping[str, Mapping[int, int]] = {"Tensor": {1: 16}}
_CHECKS: Mapping[str, Callable[[_Walk, _Message], None]] = {
    "OperatorSet": _Walk.check_opset,
    "Node": _Walk.check_node,
    "Function": _Walk.check_function,
    "Type": _Walk.check_type,
    "Tensor": _Walk.check_tensor,
}


def _span(versions: range) -> str:
    return f"{versions.start} to {versions.stop - 1}"
