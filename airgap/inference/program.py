"""The entry of the sealed worker: `create` makes the program that the launcher runs (enclave).

Everything that is imported or read is imported and read before `warm_up` returns: afterwards the
process may open nothing. The facts that `warm_up` returns are those of operation `info`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Constraint, Grammars
from airgap.inference.decoder import Decoder
from airgap.inference.engine import Engine
from airgap.inference.fast import FastModel
from airgap.inference.graphs import INTERFACES
from airgap.inference.model import Model, load_model
from airgap.inference.options import PROVIDERS, Setup, Shapes
from airgap.inference.protocol import (
    Forget,
    Forgotten,
    Generate,
    Grammar,
    Info,
    Progress,
    Sample,
    Score,
    Segment,
    encode_info,
    parse_request,
)
from airgap.inference.refusals import out_of_memory
from airgap.inference.strict import Fields, MalformedError
from airgap.inference.valence import Valence

MOST_ROWS = 64
THREADS_LIMIT = 1024
_MIB = 1 << 20
_FALLBACK_BUDGET = 1024 * _MIB
_PROBE_ROWS = (1, 2, 5, 16)

Emit = Callable[[bytes], None]
Finish = Callable[[bytes | ProgramError], None]


def create(config: dict[str, Any]) -> InferenceProgram:
    """Make the program; nothing is loaded yet.

    Args:
        config: `folder` (absolute, of one model), `precision`, `threads`; optional `provider`
            ("cpu"), `interface` (which kind of graph), `memory_mb` for one request (half of what
            is free at warm-up), `most_rows`, `valence` (load the filter of that name),
            `spin`, `arena`, `device`, `device_mb` and `deterministic` (`options.Setup`), and for
            `tensorrt` the folder `engines` with its sizes `rows`, `positions` and `piece`.

    Raises:
        ProgramError: `model.config`.

    """
    try:
        fields = Fields(config, "worker configuration")
        program = InferenceProgram(
            folder=Path(fields.text("folder", 4096)),
            precision=fields.text("precision", 64),
            interface=fields.one_of("interface", INTERFACES) if "interface" in fields else None,
            threads=fields.integer("threads", 1, THREADS_LIMIT),
            provider=fields.one_of("provider", tuple(PROVIDERS)) if "provider" in fields else "cpu",
            memory_mb=fields.integer("memory_mb", 1, 1 << 30) if "memory_mb" in fields else None,
            most_rows=fields.integer("most_rows", 1, 4096) if "most_rows" in fields else MOST_ROWS,
            valence=fields.flag("valence") if "valence" in fields else False,
            setup=_setup(fields),
        )
        fields.done()
    except MalformedError as error:
        raise ProgramError("model.config", str(error), "") from error
    return program


class InferenceProgram:
    """One model behind the channel; `warm_up` once, then `handle` a request at a time, or several.

    Several: `begin` takes a request and `step` does a round for all. On the fast graph they share
    the batch of the engine; what it does not do (the reference graph, `score`) goes one at a time.
    """

    def __init__(
        self,
        *,
        folder: Path,
        precision: str,
        interface: str | None,
        threads: int,
        provider: str,
        memory_mb: int | None,
        most_rows: int,
        valence: bool = False,
        setup: Setup | None = None,
    ) -> None:
        self._setup = setup or Setup()
        self._valence = valence
        self._folder = folder
        self._precision = precision
        self._interface = interface
        self._threads = threads
        self._provider = provider
        self._budget = memory_mb * _MIB if memory_mb is not None else 0
        self._most_rows = most_rows
        self._alone: OrderedDict[int, tuple[Generate | Score, Emit, Finish]] = OrderedDict()

    def warm_up(self) -> dict[str, Any]:
        """Load the model, take every code path once and return the facts.

        Raises:
            ProgramError: A code of room `model`.

        """
        self._model = load_model(
            self._folder,
            precision=self._precision,
            demand=self._provider,
            threads=self._threads,
            interface=self._interface,
            setup=self._setup,
        )
        self._budget = self._budget or half_of_free_memory(_memory_table())
        self._decoder = _decoder_of(self._model, budget=self._budget, most_rows=self._most_rows)
        self._engine = self._decoder if isinstance(self._decoder, Engine) else None
        self._grammars = _grammars_of(self._model, Valence() if self._valence else None)
        self._info = self._facts(batch_invariant=is_batch_invariant(self._model))
        self._rehearse()
        return self._info

    def handle(self, payload: bytes, emit: Emit) -> bytes:
        """Answer one request (`protocol`); events go to `emit`.

        Raises:
            ProgramError: The request is refused.

        """
        request = parse_request(payload)
        try:
            return self._answer(request, emit)
        except MemoryError as error:
            raise out_of_memory() from error

    @property
    def runnable(self) -> bool:
        """Whether a step has work to do."""
        return bool(self._alone) or (self._engine is not None and self._engine.runnable)

    def begin(self, number: int, payload: bytes, emit: Emit, finish: Finish) -> None:
        """Take a request, which may end at once; see `enclave.worker`.

        Raises:
            ProgramError: The request is refused.

        """
        request = parse_request(payload)
        if isinstance(request, Info | Forget):
            finish(self._answer(request, emit))
        elif self._engine is not None and isinstance(request, Generate):
            self._engine.submit(
                number,
                request,
                self._constraint(request),
                emit=lambda event: emit(event.encode()),
                finish=lambda end: finish(end if isinstance(end, ProgramError) else end.encode()),
            )
        else:
            self._alone[number] = request, emit, finish

    def cancel(self, number: int) -> None:
        """Let go of a request."""
        self._alone.pop(number, None)
        if self._engine is not None:
            self._engine.cancel(number)

    def pause(self, number: int, *, paused: bool) -> None:
        """Work no further for a request whose events nobody takes, or go on."""
        if self._engine is not None:
            self._engine.pause(number, paused=paused)

    def step(self) -> None:
        """Do a round for the requests that share the batch, and one request that does not."""
        if self._engine is not None and self._engine.busy:
            self._engine.step()
        if self._alone:
            _, (request, emit, finish) = self._alone.popitem(last=False)
            try:
                outcome: bytes | ProgramError = self._answer(request, emit)
            except ProgramError as error:
                outcome = error
            except MemoryError:
                outcome = out_of_memory()
            finish(outcome)

    def _answer(self, request: Generate | Score | Info | Forget, emit: Emit) -> bytes:
        if isinstance(request, Info):
            return encode_info(self._info)
        if isinstance(request, Forget):
            kept = self._engine.forget(request.request_set) if self._engine is not None else 0
            return Forgotten(kept).encode()
        if isinstance(request, Score):
            return self._decoder.score(request).encode()
        constraint = self._constraint(request)

        def send(event: Sample | Progress) -> None:
            emit(event.encode())

        return self._decoder.generate(request, constraint, send).encode()

    def _constraint(self, request: Generate) -> Constraint | None:
        if request.grammar.mode == "none":
            return None
        if isinstance(self._grammars, ProgramError):
            raise self._grammars
        return self._grammars.compile(request.grammar, request.prompt)

    def _rehearse(self) -> None:
        """Answer one small request: what loads late loads now, and wrong shapes show now."""
        tags = list(self._model.facts.tags)
        request = Generate(
            prompt=(Segment(tags[0], tag=True),) if tags else (Segment("C"),),
            n=2,
            max_new_tokens=2,
            temperature=1.0,
            top_p=0.9,
            top_k=50,
            repetition_penalty=1.1,
            seed=0,
            stop=tuple(tags[:1]),
        )
        for grammar in (Grammar(), Grammar(mode="structure", task="molecule")):
            try:
                self.handle(replace(request, grammar=grammar).encode(), lambda _event: None)
            except ProgramError as error:
                # A model without these tags, or with a context of two, is loaded all the same.
                if error.code not in ("model.grammar", "model.tags", "prompt.g10", "prompt.g11"):
                    raise

    def _facts(self, *, batch_invariant: bool) -> dict[str, Any]:
        facts = self._model.facts
        return {
            "model": facts.model,
            "architecture": facts.architecture,
            "precision": self._precision,
            "graph": self._model.graph.name,
            "interface": self._model.graph.interface,
            "graph_sha256": self._model.graph.sha256,
            "tokenizer_sha256": facts.tokenizer_sha256,
            "provider": self._provider,
            **self._setup.document(),
            "threads": self._threads,
            "vocab_size": facts.vocab_size,
            "layers": facts.layers,
            "kv_heads": facts.kv_heads,
            "head_dim": facts.head_dim,
            "max_context": facts.max_context,
            "bos_id": facts.bos_id,
            "eos_ids": list(facts.eos_ids),
            "unk_id": facts.unk_id,
            "tags": facts.tags,
            "unknown_tags": self._model.vocabulary.unknown_tags,
            "grammar": not isinstance(self._grammars, ProgramError),
            "valence": self._valence,
            "batch_invariant": batch_invariant,
            "memory_bytes": self._budget,
            "most_rows": self._most_rows,
            "reference_model": facts.reference_model,
            "scientific_use": facts.scientific_use,
            "onnxruntime": ort.__version__,
        }


def _setup(fields: Fields) -> Setup:
    """Read what a site may set of the session; the rest stays as it is."""
    engines, shapes = None, None
    if "engines" in fields:
        engines = Path(fields.text("engines", 4096))
        shapes = Shapes(
            rows=fields.integer("rows", 1, 4096),
            capacity=fields.integer("positions", 1, 1 << 20),
            piece=fields.integer("piece", 1, 65536),
        )
    return Setup(
        engines=engines,
        shapes=shapes,
        deterministic=fields.flag("deterministic") if "deterministic" in fields else True,
        spin=fields.flag("spin") if "spin" in fields else True,
        arena=fields.flag("arena") if "arena" in fields else True,
        device=fields.integer("device", 0, 63) if "device" in fields else 0,
        device_mb=fields.integer("device_mb", 1, 1 << 30) if "device_mb" in fields else None,
    )


def _decoder_of(model: Model | FastModel, *, budget: int, most_rows: int) -> Decoder | Engine:
    if isinstance(model, FastModel):
        return Engine(model, budget=budget, most_rows=most_rows)
    return Decoder(model, budget=budget, most_rows=most_rows)


def _grammars_of(model: Model | FastModel, valence: Valence | None) -> Grammars | ProgramError:
    """Build the byte trie, or keep the reason why a request with a grammar is refused."""
    try:
        return Grammars(model.vocabulary, model.facts, valence)
    except ProgramError as error:
        return error


def is_batch_invariant(model: Model | FastModel) -> bool:
    """Tell whether one sequence gets the same bits alone and in company, on this machine.

    Matrix products may add up in another order when a batch has another height. Where they do, a
    rare draw can differ between two values of n; the facts of the worker say so.
    """
    seen = [model.probe(rows) for rows in _PROBE_ROWS]
    return all(np.array_equal(seen[0], one) for one in seen)


def half_of_free_memory(table: str) -> int:
    """Return half of `MemAvailable` of the text of /proc/meminfo, in bytes, or 1 GiB without it."""
    for line in table.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and rest.split()[:1] and rest.split()[0].isdecimal():
            return int(rest.split()[0]) * 1024 // 2
    return _FALLBACK_BUDGET


def _memory_table() -> str:
    try:
        return Path("/proc/meminfo").read_text()
    except OSError:
        return ""
