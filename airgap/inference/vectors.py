"""The program that repeats parity vectors on the target, sealed like the one that serves.

It loads the model as that one does (`airgap.inference.model`), so it is this graph in this runtime
on this machine that answers. It only reports; the installer judges (`airgap.install.parity`).

One request, JSON::

    {"vectors": [{"prompt_ids": [...], "greedy_ids": [...], "top_ids": [...]}, ...],
     "seconds": 5, "least": 5}
    -> {"answers": [{"best": [["1.5e+00", "1.1e+00", "1.5e+00"], ...], "top": ["2.1e+00", ...],
                     "decoded": [...]}, ...]}

`best` holds, for each greedy token, the two largest logits at its place and that of the token
itself, given the prompt and the tokens before it. `top` are logits of the first place. `decoded`
are tokens that the graph wrote by itself with its cache, of the first vector alone. After `seconds`
no further vector is begun, but the first `least` are always run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from airgap.enclave.channel import ProgramError
from airgap.inference.fast import PIECE, FastModel, Head
from airgap.inference.model import Cache, Model, load_model
from airgap.inference.providers import PROVIDERS
from airgap.inference.strict import Fields, MalformedError, parse_object

DECODED = 8  # tokens
REQUEST_LIMIT = 16 << 20


def create(config: dict[str, Any]) -> Program:
    """Make the program; `config` holds `folder`, `precision`, `threads` and `provider`.

    Raises:
        ProgramError: `model.config`.

    """
    try:
        fields = Fields(config, "worker configuration")
        program = Program(
            folder=Path(fields.text("folder", 4096)),
            precision=fields.text("precision", 64),
            threads=fields.integer("threads", 1, 1024),
            provider=fields.one_of("provider", tuple(PROVIDERS)),
        )
        fields.done()
    except MalformedError as error:
        raise ProgramError("model.config", str(error), "") from error
    return program


class Program:
    """One model, and one question to it."""

    def __init__(
        self,
        *,
        folder: Path,
        precision: str,
        threads: int,
        provider: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arguments = folder, precision, threads, provider
        self.clock = clock  # seconds

    def warm_up(self) -> dict[str, Any]:
        """Load the model and run it once.

        Raises:
            ProgramError: A code of room `model`.

        """
        folder, precision, threads, provider = self._arguments
        self._model = load_model(folder, precision=precision, demand=provider, threads=threads)
        self._model.probe(1)
        return {"graph": self._model.graph.name, "graph_sha256": self._model.graph.sha256}

    def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
        """Answer the vectors.

        Raises:
            ProgramError: `request.malformed`, `model.run`.

        """
        del emit
        try:
            fields = parse_object(payload, limit=REQUEST_LIMIT, what="vectors")
            seconds, least = fields.integer("seconds", 1, 3600), fields.integer("least", 1, 4096)
            vectors = [self._vector(item) for item in fields.items("vectors", 1, 4096)]
            fields.done()
        except MalformedError as error:
            raise ProgramError("request.malformed", str(error), "") from error
        until, answers = self.clock() + seconds, list[dict[str, Any]]()
        for number, (prompt, greedy, top) in enumerate(vectors):
            if number >= least and self.clock() > until:
                break
            places = self._answers(prompt, greedy[:-1])
            wanted = places[np.arange(len(greedy)), greedy]
            largest = np.partition(places, -2, axis=1)[:, :-3:-1]
            answer = {
                "best": [
                    [_text(first), _text(second), _text(one)]
                    for (first, second), one in zip(largest, wanted, strict=True)
                ],
                "top": [_text(value) for value in places[0, top]],
                "decoded": [] if answers else self._decode(prompt, min(DECODED, len(greedy))),
            }
            answers.append(answer)
        return json.dumps({"answers": answers}).encode()

    def _vector(self, item: object) -> tuple[list[int], list[int], list[int]]:
        fields, facts = Fields(item, "vector"), self._model.facts
        most = facts.vocab_size - 1
        prompt, greedy, top = (
            list(fields.integers(name, (1, size), most))
            for name, size in (("prompt_ids", 1 << 17), ("greedy_ids", 4096), ("top_ids", 64))
        )
        fields.done()
        if len(prompt) + len(greedy) > facts.max_context:
            raise MalformedError("a vector is longer than the context")
        return prompt, greedy, top

    def _answers(self, prompt: list[int], tokens: list[int]) -> Any:
        """Return float32[places, vocabulary]: the last of the prompt and each token."""
        ids, first = [*prompt, *tokens], len(prompt) - 1
        model = self._model
        parts = []
        if isinstance(model, FastModel):
            slots, size = model.slots(rows=1, capacity=len(ids)), model.facts.vocab_size
            for start in range(0, len(ids), PIECE):
                part = ids[start : start + PIECE]
                select = np.arange(max(0, first - start), len(part))
                if len(select) == 0:
                    select = np.array([len(part) - 1])
                head = Head(select=select, top_k=size)
                found = model.run(_row(part), _length(start + len(part)), slots, head)
                if start + len(part) > first:
                    whole = np.empty((len(select), size), dtype=np.float32)
                    np.put_along_axis(whole, found.ids, found.raw, axis=1)
                    parts.append(whole)
        else:
            cache = Cache(model, rows=1, capacity=len(ids))
            for start in range(0, len(ids), model.piece):
                logits = model.run(_row(ids[start : start + model.piece]), cache, start)[0]
                parts.append(logits[max(0, first - start) :])
        return np.concatenate(parts)

    def _decode(self, prompt: list[int], count: int) -> list[int]:
        """Return greedy tokens, one run each."""
        model, found = self._model, list[int]()
        if isinstance(model, Model):
            cache = Cache(model, rows=1, capacity=len(prompt) + count)
            last = model.prefill(prompt, cache)
            while len(found) < count:
                found.append(int(last.argmax()))
                last = model.run(_row(found[-1:]), cache, len(prompt) + len(found) - 1)[0, -1]
            return found
        slots = model.slots(rows=1, capacity=len(prompt) + count)
        found.append(int(model.prefill(prompt, slots).ids[0, 0]))
        while len(found) < count:
            at = _length(len(prompt) + len(found))
            best = model.run(_row(found[-1:]), at, slots, Head(select=np.array([0])))
            found.append(int(best.ids[0, 0]))
        return found


def _row(ids: list[int]) -> Any:
    return np.array([ids], dtype=np.int64)


def _length(positions: int) -> Any:
    return np.array([positions], dtype=np.int32)


def _text(value: Any) -> str:
    return f"{float(value):.6e}"
