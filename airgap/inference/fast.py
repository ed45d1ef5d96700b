"""The fast graph in one session: shared key-value buffers, the head in the graph.

`Slots` holds the buffers, one slot a sequence; `FastModel.run` is one call of the graph on
neighbouring slots (docs/design/inference.md, 3 and 5; the inputs are those of
`bundle.staging.graph`). Nothing here knows of requests.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import Graph, ModelFacts
from airgap.inference.providers import NATIVE_ERRORS
from airgap.inference.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

PIECE = 256  # ids of a prompt that run at once: fixed, so that a shared prefix has the same bits
_BOUND = 8  # shapes of runs that stay bound: a step, the pieces of a prompt, guesses
_OUTPUTS = ("scores", "ids", "raw", "log_z", "legal_z", "target_raw")
_KV = np.float32
# Of the buffers, by the graph's own word: what numpy keeps them as, and ONNX's number of the type.
_KINDS: dict[str, tuple[type[np.generic], int]] = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),  # numpy has no such type; nothing here computes with them
}


@dataclass(frozen=True, slots=True)
class Head:
    """What the head shall do at each picked position.

    Args:
        select: int64[picked], flat places among rows * new.
        top_k: How many candidates to give back, 1 or more.
        seen: int64[picked, any], ids that the penalty punishes; None for no penalty.
        penalty: float32[picked].
        legal: bool[picked, vocabulary]; None where no row has a grammar.
        target: int64[picked], ids whose raw logits are wanted.

    """

    select: Ids
    top_k: int = 1
    seen: Ids | None = None
    penalty: Floats | None = None
    legal: Bools | None = None
    target: Ids | None = None

    @property
    def history(self) -> int:
        """How many ids of each position are punished; 0 without a penalty."""
        return 0 if self.seen is None or self.penalty is None else self.seen.shape[1]

    def asks_as(self, other: Head) -> bool:
        """Whether another head asks the same, wherever its positions lie."""
        return self.top_k == other.top_k and all(
            _equal(getattr(self, name), getattr(other, name))
            for name in ("seen", "penalty", "legal", "target")
        )


def _equal(one: npt.NDArray[Any] | None, other: npt.NDArray[Any] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


@dataclass(frozen=True, slots=True)
class Found:
    """What the head gave: [picked, top_k] and [picked]; `bundle.staging.graph` defines each."""

    scores: Floats
    ids: Ids
    raw: Floats
    log_z: Floats
    legal_z: Floats
    target_raw: Floats

    def repeat(self, count: int) -> Found:
        """Return what one picked position got, for `count` samples that begin there."""
        return Found(*(np.repeat(getattr(self, one), count, axis=0) for one in self.__slots__))


_stamps = itertools.count()


class Slots:
    """Keys and values of up to `rows` sequences of up to `capacity` ids; one buffer each.

    Attributes:
        stamp: Changes whenever the buffers move; no two sets of buffers ever have the same.

    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        rows: int,
        capacity: int,
        kind: type[np.generic] = np.float32,
    ) -> None:
        self.rows, self.capacity = rows, capacity
        shape = (rows, facts.kv_heads, capacity, facts.head_dim)
        # Not touched until written: pages of samples that end early are never taken.
        self._buffers: list[npt.NDArray[Any]]
        self._buffers = [np.empty(shape, dtype=kind) for _ in facts.past_inputs]
        self.stamp = next(_stamps)

    def views(self, first: int, rows: int) -> list[npt.NDArray[Any]]:
        """Return the part of each buffer that `rows` slots from `first` own."""
        return [buffer[first : first + rows] for buffer in self._buffers]

    def copy(self, source: Slots, length: int, *, to: int) -> None:
        """Copy `length` positions of the first slot of `source` into slot `to`."""
        for ours, theirs in zip(self._buffers, source._buffers, strict=True):
            ours[to, :, :length] = theirs[0, :, :length]

    def move(self, source: int, length: int, *, to: int) -> None:
        """Copy `length` positions of one slot over another."""
        for buffer in self._buffers:
            buffer[to, :, :length] = buffer[source, :, :length]

    def resize(self, rows: int, capacity: int, lengths: list[int]) -> None:
        """Change the size and keep the first slots, which hold `lengths` positions.

        After a MemoryError nothing in them means anything, and their stamp is another one: no run
        uses the addresses of buffers that moved.
        """
        self.stamp = next(_stamps)
        for place, old in enumerate(self._buffers):
            new = np.empty((rows, old.shape[1], capacity, old.shape[3]), dtype=old.dtype)
            for row, length in enumerate(lengths):
                new[row, :, :length] = old[row, :, :length]
            self._buffers[place] = new  # one at a time: two whole sets would not fit the plan
        self.rows, self.capacity = rows, capacity


class _Bound:
    """One shape of a run with its inputs and outputs bound once.

    The session reads and writes these arrays at their addresses: a step fills the inputs again and
    binds nothing. Buffers of the slots are bound by address and not kept alive; `Slots.stamp` in
    the key sees to it that no address is used after they moved.
    """

    def __init__(self, model: FastModel, slots: Slots, head: Head, *, first: int, ids: Ids) -> None:
        rows, picked = len(ids), len(head.select)
        self.inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.empty(ids.shape, dtype=np.int64),
            "seqlens_k": np.empty(rows, dtype=np.int32),
            "total_sequence_length": np.empty((), dtype=np.int32),
            "select": np.empty(picked, dtype=np.int64),
            "seen": np.zeros((picked, max(1, head.history)), dtype=np.int64),
            "penalty": np.ones((picked, 1), dtype=np.float32),
            "legal": np.ones((1, model.facts.vocab_size), dtype=np.bool_),  # not read without one
            "constrained": np.array(head.legal is not None),
            "target": np.zeros(picked, dtype=np.int64),
            "top_k": np.array([head.top_k], dtype=np.int64),
        }
        shape = (picked, head.top_k)
        self.outputs: list[npt.NDArray[Any]] = [
            np.empty(shape, dtype=kind) for kind in (_KV, np.int64, _KV)
        ]
        self.outputs += [np.empty(picked, dtype=_KV) for _ in range(3)]
        self._session, self._binding = model.session, model.session.io_binding()
        for name, array in self.inputs.items():
            self._bind(name, array)
        for name, array in zip(_OUTPUTS, self.outputs, strict=True):
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, _place(array))
        names = zip(model.facts.past_inputs, model.facts.present_outputs, strict=True)
        for (past, present), view in zip(names, slots.views(first, rows), strict=True):
            self._binding.bind_input(past, "cpu", 0, model.element, view.shape, _place(view))
            self._binding.bind_output(present, "cpu", 0, model.element, view.shape, _place(view))

    def run(self, ids: Ids, lengths: npt.NDArray[np.int32], head: Head) -> Found:
        """Fill the inputs and run."""
        inputs = self.inputs
        inputs["input_ids"][...] = ids
        np.subtract(lengths, 1, out=inputs["seqlens_k"])
        inputs["total_sequence_length"][...] = lengths.max()
        inputs["select"][...] = head.select
        if head.history:
            inputs["seen"][...] = head.seen
            inputs["penalty"][:, 0] = head.penalty
        if head.target is not None:
            inputs["target"][...] = head.target
        if head.legal is not None:
            legal = np.ascontiguousarray(head.legal)  # large: bound where it lies
            self._bind("legal", legal)
        self._session.run_with_iobinding(self._binding)
        return Found(*(array.copy() for array in self.outputs))

    def _bind(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, _place(array))


def _place(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


class FastModel:
    """A loaded fast graph; `run` is its only work, of one thread at a time."""

    def __init__(
        self, facts: ModelFacts, graph: Graph, session: Any, vocabulary: Vocabulary
    ) -> None:
        self.facts = facts
        self.graph = graph
        self.vocabulary = vocabulary
        self.session = session
        self.runs = 0
        self._kind, self.element = _KINDS[_require_signature(facts, graph, session)]
        self._bindings: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()

    @property
    def provider(self) -> str:
        """The provider that the session runs on."""
        return str(self.session.get_providers()[0])

    def run(
        self, ids: Ids, lengths: npt.NDArray[np.int32], slots: Slots, head: Head, *, first: int = 0
    ) -> Found:
        """Run new ids on the slots from `first`.

        Args:
            ids: int64[rows, new]; more than one new id for one row alone, or for empty slots.
            lengths: int32[rows], positions of each slot after this run.
            slots: The buffers.
            head: Of which positions the head is wanted.
            first: The slot of row 0.

        Raises:
            ProgramError: `model.run`.

        """
        try:
            found = self._bound(slots, ids, head, first).run(ids, lengths, head)
        except NATIVE_ERRORS as error:
            raise ProgramError(
                "model.run",
                f"the graph failed on {len(ids)} x {ids.shape[1]} ids: {str(error)!r:.300}",
                "verify the installed bundle; ask for fewer samples if memory is short",
            ) from error
        self.runs += 1
        return found

    def slots(self, *, rows: int, capacity: int) -> Slots:
        """Return buffers of the type that this graph keeps keys and values in."""
        return Slots(self.facts, rows=rows, capacity=capacity, kind=self._kind)

    def prefill(
        self, ids: list[int], slots: Slots, *, start: int = 0, head: Head | None = None
    ) -> Found:
        """Run a prompt through slot 0; returns what the head gave for its last id.

        Args:
            ids: Of the whole prompt, more than `start`.
            slots: Hold its first `start` positions.
            start: A multiple of `PIECE`.
            head: Of the last id; what it selects is not read.

        Raises:
            ProgramError: `model.run`.

        """
        for place in range(start, len(ids), PIECE):
            part = np.array([ids[place : place + PIECE]], dtype=np.int64)
            size = part.shape[1]
            last = Head(select=np.array([size - 1]))
            if head is not None and place + size == len(ids):
                last = replace(head, select=last.select)
            found = self.run(part, np.array([place + size], dtype=np.int32), slots, last)
        return found

    def probe(self, rows: int) -> npt.NDArray[Any]:
        """Run two ids in `rows` slots and return what the first slot got."""
        slots = self.slots(rows=rows, capacity=2)
        ids = np.zeros((rows, 1), dtype=np.int64)
        head = Head(select=np.arange(rows), top_k=min(8, self.facts.vocab_size))
        self.run(ids, np.full(rows, 1, dtype=np.int32), slots, head)
        found = self.run(ids + 1, np.full(rows, 2, dtype=np.int32), slots, head)
        return np.concatenate([found.raw[0], found.log_z[:1]])

    def _bound(self, slots: Slots, ids: Ids, head: Head, first: int) -> _Bound:
        """Return the binding for a run of this shape, made or from an earlier run."""
        size = (*ids.shape, len(head.select), head.top_k, head.history)
        key = (slots.stamp, first, *size, head.legal is not None, head.target is not None)
        bound = self._bindings.get(key)
        if bound is None:
            bound = _Bound(self, slots, head, first=first, ids=ids)
            self._bindings[key] = bound
            if len(self._bindings) > _BOUND:
                self._bindings.popitem(last=False)
        self._bindings.move_to_end(key)
        return bound


def _require_signature(facts: ModelFacts, graph: Graph, session: Any) -> str:
    """Compare names, types and shapes of the session with the facts; return the cache's type."""
    inputs = {one.name: one for one in session.get_inputs()}
    outputs = {one.name: one for one in session.get_outputs()}
    if (sorted(inputs), sorted(outputs)) != (sorted(graph.inputs), sorted(graph.outputs)):
        raise _unfit(graph, "has other inputs or outputs than graphs.json names")
    kind = str(inputs[facts.past_inputs[0]].type)
    for name in (*facts.past_inputs, *facts.present_outputs):
        one = inputs.get(name) or outputs[name]
        size = one.shape[1::2] if len(one.shape) == 4 else None  # noqa: PLR2004
        if kind not in _KINDS or one.type != kind or size != [facts.kv_heads, facts.head_dim]:
            raise _unfit(graph, f"has a cache {name} of {one.type} {one.shape!r:.80}")
    if inputs["legal"].shape[-1] != facts.vocab_size:
        raise _unfit(graph, f"has a head for {inputs['legal'].shape[-1]!r:.20} entries")
    return kind


def _unfit(graph: Graph, message: str) -> ProgramError:
    return ProgramError("model.graph", f"{graph.path} {message}", "verify the installed bundle")
