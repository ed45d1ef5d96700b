"""Step 11 of an install: the parity vectors of the bundle, on this machine, in the sealed worker.

FORMAT.md section 11; `bundle.vectors`. The worker reports logits and this module judges them: at
each place the expected token must be the best, and the largest logits of the first place must be
those of the staging side, to the tolerance that the manifest claims. Where another token is as good
as the expected one to that tolerance, either may be the best.

A precision for a provider that this host does not run is told as not run; it is no proof.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from airgap.enclave import SealSpec
from bundle.manifest import Manifest
from bundle.manifest import Parity as Claim
from bundle.vectors import Vector, Vectors, parse_vectors
from policy.errors import AirgapError, FaultError, RefusedError

PROGRAM = "airgap.inference.vectors:create"
PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
LOAD_S, ANSWER_S = 600.0, 600.0
RUN_S = 5  # seconds after which no further vector is begun, once one of each kind has run


class Sealed(Protocol):
    """What is needed of a sealed worker."""

    def request(self, payload: bytes, timeout: float) -> bytes:
        """Send a request and return its reply."""
        ...


Seal = Callable[[SealSpec], AbstractContextManager[Sealed]]
"""Starts a sealed process, its evidence on record."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of the vectors of one precision; `run` of `vectors` were run."""

    model: str
    precision: str
    provider: str
    vectors: int
    run: int
    tokens: int
    delta: Decimal

    @property
    def text(self) -> str:
        """One line, printable ASCII, for people and for the log."""
        where = f"{self.model} {self.precision} on {self.provider}"
        if not self.run:
            return f"{where}: not run on this host"
        return (
            f"{where}: {self.run} of {self.vectors} vectors, {self.tokens} tokens the same, "
            f"largest difference of a logit {float(self.delta):.1e}"
        )


Prove = Callable[[Path, Manifest], tuple[Proof, ...]]
"""Takes the folder of a bundle's files and its manifest; raises where a graph answers otherwise."""


def prover(
    seal: Seal,
    *,
    state: Path | None = None,
    min_rung: str | None = None,
    providers: Sequence[str] = ("cpu",),
) -> Prove:
    """Return the question that an install asks of every graph in a bundle.

    Args:
        seal: Starts the worker.
        state: Folder that keeps the result of the twin probe.
        min_rung: Least rung that is acceptable.
        providers: Which this host runs, of those of the worker.

    """

    def prove(folder: Path, manifest: Manifest) -> tuple[Proof, ...]:
        found = []
        for claim in manifest.parity:
            vectors = parse_vectors((folder / claim.vectors).read_bytes(), claim)
            provider = PROVIDERS.get(claim.provider)
            if provider not in providers:
                found.append(_not_run(claim, vectors))
                continue
            spec = SealSpec(
                profile="worker" if provider == "cpu" else "worker-gpu",
                program=PROGRAM,
                config={
                    "folder": str(folder / "payload" / claim.model),
                    "precision": claim.precision,
                    "threads": os.cpu_count() or 1,
                    "provider": provider,
                },
                read_only=(folder,),
                artifacts={"bundle": str(manifest.digest)},
                deadline_s=LOAD_S,
                min_rung=min_rung,
                state=state,
            )
            order = in_order(vectors.vectors)
            answers = _ask(seal, spec, claim, order)
            found.append(judge(claim, vectors, order, answers))
        return tuple(found)

    return prove


def in_order(vectors: Sequence[Vector]) -> tuple[Vector, ...]:
    """Put the shortest vector of each kind first, then the others."""
    short = sorted(vectors, key=lambda each: len(each.prompt_ids))
    kinds: dict[str, Vector] = {}
    for each in short:
        kinds.setdefault(each.kind, each)
    first = tuple(kinds.values())
    return (*first, *(each for each in short if not any(each is one for one in first)))


def _ask(
    seal: Seal, spec: SealSpec, claim: Claim, vectors: Sequence[Vector]
) -> list[Mapping[str, Any]]:
    """Run the vectors in a sealed worker; FaultError `parity.device` if that cannot be done."""
    least = len({each.kind for each in vectors})
    request = {
        "seconds": RUN_S,
        "least": least,
        "vectors": [
            {
                "prompt_ids": each.prompt_ids,
                "greedy_ids": each.greedy_ids,
                "top_ids": [token for token, _ in each.top_logits],
            }
            for each in vectors
        ],
    }
    try:
        with seal(spec) as worker:
            reply = json.loads(worker.request(json.dumps(request).encode(), ANSWER_S))
        answers: list[Mapping[str, Any]] = reply["answers"]
    except AirgapError as error:
        if not error.code.startswith("model."):
            raise  # of the seal itself: that has a code and a next step of its own
        raise FaultError(
            "parity.device",
            f"{claim.model} in {claim.precision} does not run on this host: {error.message}",
            hint=error.hint,
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _odd(claim) from error
    if not isinstance(answers, list) or not least <= len(answers) <= len(vectors):
        raise _odd(claim)
    return answers


def judge(
    claim: Claim,
    vectors: Vectors,
    order: Sequence[Vector],
    answers: Sequence[Mapping[str, Any]],
) -> Proof:
    """Hold the answers against the vectors; every figure is checked.

    Raises:
        RefusedError: `parity.failed`.
        FaultError: `parity.device`; the answers are not what was asked for.

    """
    tolerance, worst, tokens = Decimal(claim.tolerance), Decimal(0), 0
    for vector, answer in zip(order, answers, strict=False):
        here = f"{claim.model} in {claim.precision}, vector {vector.kind} {vector.prompt!r:.60}"
        try:
            top = [Decimal(value) for value in answer["top"]]
            best = [tuple(map(Decimal, row)) for row in answer["best"]]
            decoded = list(answer["decoded"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise _odd(claim) from error
        if len(top) != len(vector.top_logits) or [len(row) for row in best] != [3] * vectors.steps:
            raise _odd(claim)
        expected = (Decimal(value) for _, value in vector.top_logits)
        if not all(value.is_finite() for row in (top, *best) for value in row):
            raise _differs(f"{here}: a logit is no number")
        delta = max(abs(one - other) for one, other in zip(top, expected, strict=True))
        if delta > tolerance:
            raise _differs(f"{here}: a logit differs by {float(delta):.1e}, tolerance {tolerance}")
        for place, (largest, _, wanted) in enumerate(best):
            if largest - wanted > 2 * tolerance:
                raise _differs(f"{here}: greedy token {place + 1} is another")
        _require_decoded(decoded, vector, best, 2 * tolerance, here)
        worst, tokens = max(worst, delta), tokens + len(best)
    return Proof(
        claim.model,
        claim.precision,
        claim.provider,
        vectors=len(vectors.vectors),
        run=len(answers),
        tokens=tokens,
        delta=worst,
    )


def _require_decoded(
    decoded: list[Any],
    vector: Vector,
    best: Sequence[tuple[Decimal, ...]],
    near: Decimal,
    here: str,
) -> None:
    """Compare what was written with the cache; behind a choice that was near, texts may part."""
    for place, (token, wanted) in enumerate(zip(decoded, vector.greedy_ids, strict=False)):
        largest, second, _ = best[place]
        if largest - second <= near:
            return
        if token != wanted:
            raise _differs(f"{here}: token {place + 1} with the cache is another")


def _not_run(claim: Claim, vectors: Vectors) -> Proof:
    return Proof(
        claim.model,
        claim.precision,
        claim.provider,
        vectors=len(vectors.vectors),
        run=0,
        tokens=0,
        delta=Decimal(0),
    )


def _differs(message: str) -> RefusedError:
    return RefusedError(
        "parity.failed",
        message,
        hint="the bundle is not active; the graph, its runtime or this machine answers otherwise "
        "than on the staging side: keep the message, and ask the staging host",
    )


def _odd(claim: Claim) -> FaultError:
    return FaultError(
        "parity.device",
        f"the worker gave no answer to the vectors of {claim.model} in {claim.precision}",
        hint="run it again; airgap doctor shows what this host offers",
    )
