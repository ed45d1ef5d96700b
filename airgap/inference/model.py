"""One installed model: its facts, its session, and one call of its graph on caches that we own.

The graph is a decoder with past (docs/design/inference.md, 3): it reads the keys and values
of the past from one buffer and writes past and present, joined, to another. `Cache` holds both and
swaps them; nothing is allocated in a step.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from airgap.enclave.channel import ProgramError
from airgap.inference.fast import FastModel
from airgap.inference.graphs import (
    FAST,
    GRAPHS_LIMIT,
    REFERENCE,
    Graph,
    ModelFacts,
    parse_graphs,
)
from airgap.inference.options import Setup
from airgap.inference.providers import NATIVE_ERRORS, open_session
from airgap.inference.vocabulary import TOKENIZER_LIMIT, Vocabulary

GRAPHS_FILE = "graphs.json"
GRAPH_LIMIT = 1 << 31  # bytes of a graph file, where protobuf ends; external data are apart
_KV_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
PIECE_BYTES = 64 * 1024 * 1024  # logits of one piece of a prompt; the graph gives every position

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Model:
    """A loaded model; `run` is its only work."""

    def __init__(
        self, facts: ModelFacts, graph: Graph, session: Any, vocabulary: Vocabulary
    ) -> None:
        self.facts = facts
        self.graph = graph
        self.vocabulary = vocabulary
        self.session = session
        self.kv_type = _require_signature(facts, graph, session)
        self.logits_type = _element(session.get_outputs(), "logits")
        self.runs = 0
        self.longest_piece: int | None = None  # engines are built for pieces up to a length
        self._past_names, self._present_names = facts.past_inputs, facts.present_outputs

    @property
    def provider(self) -> str:
        """The provider that the session runs on."""
        return str(self.session.get_providers()[0])

    @property
    def piece(self) -> int:
        """How many ids of one row run at once, so that their logits stay small."""
        small = max(1, PIECE_BYTES // (4 * self.facts.vocab_size))
        return small if self.longest_piece is None else min(small, self.longest_piece)

    def run(self, ids: Ids, cache: Cache, length: int) -> Logits:
        """Run the graph on new ids after `length` cached ones and swap the cache.

        Args:
            ids: int64[rows, new], no padding.
            cache: Holds `length` positions of `rows` rows, and `length + new` afterwards.
            length: How many positions are cached.

        Returns:
            float32[rows, new, vocabulary], raw logits. The buffer is new.

        Raises:
            ProgramError: `model.run`.

        """
        rows, new = ids.shape
        ids = np.ascontiguousarray(ids)
        total = length + new
        mask = np.ones((rows, total), dtype=np.int64)
        positions = np.tile(np.arange(length, total, dtype=np.int64), (rows, 1))
        logits = np.empty((rows, new, self.facts.vocab_size), dtype=self.logits_type)
        binding = self.session.io_binding()
        past, present = cache.past(rows, length), cache.present(rows, total)
        inputs = [("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)]
        for name, array in [*inputs, *zip(self._past_names, past, strict=True)]:
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        outputs = [("logits", logits), *zip(self._present_names, present, strict=True)]
        for name, array in outputs:
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except NATIVE_ERRORS as error:
            raise ProgramError(
                "model.run",
                f"the graph failed on {rows} x {new} ids after {length}: {str(error)!r:.300}",
                "verify the installed bundle; ask for fewer samples if memory is short",
            ) from error
        self.runs += 1
        cache.swap()
        return logits.astype(np.float32, copy=False)

    def probe(self, rows: int) -> npt.NDArray[Any]:
        """Run two ids in `rows` rows and return what the first row got."""
        cache = Cache(self, rows=rows, capacity=2)
        first = np.zeros((rows, 1), dtype=np.int64)
        self.run(first, cache, 0)
        logits: Logits = self.run(first + 1, cache, 1)[0]
        return logits

    def prefill(self, ids: list[int], cache: Cache) -> Logits:
        """Run a prompt in pieces through one row of `cache`; float32[vocabulary] of its last id."""
        for start in range(0, len(ids), self.piece):
            part = np.array([ids[start : start + self.piece]], dtype=np.int64)
            logits = self.run(part, cache, start)
        last: Logits = logits[0, -1]
        return last


class Cache:
    """Keys and values of up to `rows` sequences of up to `capacity` ids, in two sets of buffers."""

    def __init__(self, model: Model, *, rows: int, capacity: int) -> None:
        self._heads, self._width = model.facts.kv_heads, model.facts.head_dim
        size = rows * self._heads * capacity * self._width
        count = len(model.facts.past_inputs)
        # Not touched until written: pages of samples that end early are never taken.
        self._front = [np.empty(size, dtype=model.kv_type) for _ in range(count)]
        self._back = [np.empty(size, dtype=model.kv_type) for _ in range(count)]

    def past(self, rows: int, length: int) -> list[npt.NDArray[Any]]:
        """Return what the graph reads: arrays [rows, heads, length, width]."""
        return [self._view(flat, rows, length) for flat in self._front]

    def present(self, rows: int, length: int) -> list[npt.NDArray[Any]]:
        """Return what the graph writes: arrays [rows, heads, length, width]."""
        return [self._view(flat, rows, length) for flat in self._back]

    def swap(self) -> None:
        """Make what was written what is read next."""
        self._front, self._back = self._back, self._front

    def fill(self, prefix: list[npt.NDArray[Any]], rows: int) -> None:
        """Copy one sequence to `rows` rows."""
        for array, one in zip(self.past(rows, prefix[0].shape[2]), prefix, strict=True):
            np.copyto(array, one)

    def move(self, moves: list[tuple[int, int]], rows: int, length: int) -> None:
        """Copy rows onto others: (to, from) pairs among `rows` rows of `length` positions."""
        for array in self.past(rows, length):
            for target, source in moves:
                array[target] = array[source]

    def _view(self, flat: npt.NDArray[Any], rows: int, length: int) -> npt.NDArray[Any]:
        size = rows * self._heads * length * self._width
        return flat[:size].reshape(rows, self._heads, length, self._width)


def load_model(
    folder: Path,
    *,
    precision: str,
    demand: str,
    threads: int,
    interface: str | None = None,
    setup: Setup | None = None,
) -> Model | FastModel:
    """Load the model in `folder` and check that it is what `graphs.json` says.

    The digests of the tokenizer and of the graph are compared again here, with the bytes that are
    used; those of external weights were compared when the installation was checked at start.

    Args:
        folder: Of one model.
        precision: Of the graph.
        demand: A provider, key of `PROVIDERS`.
        threads: Of the session.
        interface: Which kind of graph; None takes the fast one where there is one and the provider
            knows its operators (TensorRT does not).
        setup: How the session runs, beside its threads.

    Raises:
        ProgramError: A code of room `model`.

    """
    facts = parse_graphs(_read(folder / GRAPHS_FILE, GRAPHS_LIMIT))
    usual = (REFERENCE,) if demand == "tensorrt" else (FAST, REFERENCE)
    graph = facts.graph(precision, usual if interface is None else (interface,))
    vocabulary = Vocabulary(_read(folder / facts.tokenizer_path, TOKENIZER_LIMIT), facts)
    path = folder / graph.path
    if hashlib.sha256(_read(path, GRAPH_LIMIT)).hexdigest() != graph.sha256:
        raise ProgramError(
            "model.graph",
            f"{graph.path} does not have the digest that graphs.json names",
            "verify the installed bundle",
        )
    for name, _ in graph.external:
        if not (folder / name).is_file():
            raise ProgramError("model.file", f"{name} is missing", "install the bundle again")
    session = open_session(
        path, demand=demand, threads=threads, setup=setup, facts=facts, described=graph
    )
    if graph.interface == FAST:
        return FastModel(facts, graph, session, vocabulary)
    sizes = None if setup is None else setup.shapes
    if sizes is not None:  # a run beyond them would make TensorRT build engines while serving
        facts = replace(facts, max_context=min(facts.max_context, sizes.capacity))
    model = Model(facts, graph, session, vocabulary)
    model.longest_piece = None if sizes is None else sizes.piece
    return model


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise ProgramError(
            "model.file",
            f"{path.name} cannot be read: {error.strerror}",
            "install the bundle again",
        ) from error
    if len(raw) > limit:
        raise ProgramError(
            "model.file", f"{path.name} has more than {limit} bytes", "build the bundle again"
        )
    return raw


def _require_signature(facts: ModelFacts, graph: Graph, session: Any) -> type[np.generic]:
    """Compare names, types and shapes of the session with the facts; return the cache's type."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names = [one.name for one in inputs], [one.name for one in outputs]
    if (sorted(names[0]), sorted(names[1])) != (sorted(graph.inputs), sorted(graph.outputs)):
        raise _unfit(graph, "has other inputs or outputs than graphs.json names")
    caches = [*inputs, *outputs]
    caches = [one for one in caches if one.name in {*facts.past_inputs, *facts.present_outputs}]
    types = {one.type for one in caches}
    if len(types) != 1 or not types <= set(_KV_TYPES):
        raise _unfit(graph, f"has caches of type {', '.join(sorted(types))!r:.80}")
    expected = {1: facts.kv_heads, 3: facts.head_dim}
    for one in caches:
        if len(one.shape) != 4 or any(  # noqa: PLR2004 -- batch, head, sequence, width
            one.shape[axis] != size for axis, size in expected.items()
        ):
            raise _unfit(graph, f"has a cache {one.name} of shape {one.shape!r:.80}")
    logits = next(one for one in outputs if one.name == "logits")
    if isinstance(logits.shape[-1], int) and logits.shape[-1] != facts.vocab_size:
        raise _unfit(graph, f"has logits for {logits.shape[-1]} entries")
    for one in inputs:
        if one not in caches and one.type != "tensor(int64)":
            raise _unfit(graph, f"has an input {one.name} of type {one.type!r:.40}")
    return _KV_TYPES[types.pop()]


def _element(values: list[Any], name: str) -> type[np.generic]:
    found = next(value for value in values if value.name == name)
    if found.type not in _KV_TYPES:
        raise ProgramError("model.graph", f"{name} has type {found.type!r:.40}", "")
    return _KV_TYPES[found.type]


def _unfit(graph: Graph, message: str) -> ProgramError:
    return ProgramError("model.graph", f"{graph.path} {message}", "verify the installed bundle")
