"""The proof that a graph answers like its source: judged here, measured in a sealed process.

Decides by docs/design/inference.md, 3: on at least 20 real prompts of all five kinds, no
logit differs by more than the tolerance, in a full pass and with the cache, and 64 greedy tokens
are the same. A figure that is missing, or is not a number, fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from bundle.canonical import canonical_json
from bundle.scan.strict import open_view, parse_object
from bundle.staging.sealed import (
    RunSealed,
    SealedJob,
    python,
    require_only,
    require_success,
    take,
)
from policy.errors import RefusedError

TOLERANCE = Decimal("0.001")
MIN_PROMPTS = 20
STEPS = 64
KINDS = frozenset(["molecule", "retrosynthesis", "binding-site", "pocket-ligand", "material"])
PROGRAM = Path(__file__).with_name("parity_main.py")
PROMPTS = Path(__file__).with_name("prompts.json")
SECONDS = 4 * 3600
_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the packaged set: its kind, text and where it is from."""

    kind: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Vector:
    """One prompt with what the source answered, and how far the graph was from it."""

    prompt: Prompt
    ids: tuple[int, ...]
    greedy: tuple[int, ...]
    top: tuple[tuple[int, str], ...]
    full: Decimal
    past: Decimal


@dataclass(frozen=True, slots=True)
class Parity:
    """A proof that holds. Deltas are the largest over all vectors and graphs."""

    vectors: tuple[Vector, ...]
    skipped: tuple[tuple[Prompt, str], ...]
    graphs: tuple[str, ...]
    full: Decimal
    past: Decimal
    versions: dict[str, str]
    provider: str
    seal: dict[str, object]

    def vectors_document(self, model: str) -> dict[str, Any]:
        """Return META/vectors/parity.json: what a target must answer again."""
        return {
            "format": "airgap-parity-vectors/1",
            "model": model,
            "precision": "fp32",
            "provider": self.provider,
            "tolerance": str(TOLERANCE),
            "steps": STEPS,
            "credits": load_prompts()[1],
            "vectors": [
                {
                    "kind": vector.prompt.kind,
                    "prompt": vector.prompt.text,
                    "source": vector.prompt.source,
                    "prompt_ids": list(vector.ids),
                    "greedy_ids": list(vector.greedy),
                    "top_logits": [[token, value] for token, value in vector.top],
                }
                for vector in self.vectors
            ],
        }


def load_prompts() -> tuple[tuple[Prompt, ...], list[dict[str, str]]]:
    """Return the packaged prompts and the credits of their data."""
    document = parse_object(
        open_view(PROMPTS), code="parity.vectors", what="prompts.json", limit=1 << 20
    )
    prompts = tuple(
        Prompt(item["kind"], item["prompt"], item["source"]) for item in document["prompts"]
    )
    return prompts, document["credits"]


def prove_parity(
    source: Path,
    graphs: Path,
    out: Path,
    *,
    names: Sequence[str],
    run_sealed: RunSealed,
    memory_mb: int,
) -> Parity:
    """Run source and graphs side by side and judge the figures.

    Args:
        source: The folder with the published weights.
        graphs: The folder with the converted graphs.
        out: Must not exist; receives the figures.
        names: Of the graphs that must be covered.
        run_sealed: Runs the program without a network.
        memory_mb: Limit of the sealed process.

    Raises:
        RefusedError: `parity.failed`, `parity.vectors`.
        FaultError: `parity.run`.

    """
    out.mkdir()
    done = run_sealed(
        SealedJob(
            argv=python(PROGRAM, source, graphs, PROMPTS, out),
            read_only=(source, graphs, PROMPTS, PROGRAM),
            out=out,
            memory_mb=memory_mb,
            timeout_s=SECONDS,
        )
    )
    require_success(done, "the parity run", "parity.run")
    require_only(out, {"parity.json"}, "parity.failed")
    figures = parse_object(
        take(out, "parity.json", _LIMIT, "parity.failed"),
        code="parity.failed",
        what="the figures of the parity run",
        limit=_LIMIT,
    )
    return judge(figures, load_prompts()[0], dict(done.evidence), expected=names)


def judge(
    figures: Mapping[str, Any],
    prompts: Sequence[Prompt],
    seal: dict[str, object] | None = None,
    *,
    expected: Sequence[str],
) -> Parity:
    """Return the proof, or refuse; every figure is checked here, none is believed.

    Args:
        figures: What the run left, untrusted.
        prompts: The packaged prompts.
        seal: Evidence of the run.
        expected: Names of the graphs that were made; each must be covered.

    Raises:
        RefusedError: `parity.failed`, `parity.vectors`.

    """
    try:
        vectors = tuple(_vector(row, prompts) for row in figures["rows"])
        skipped = tuple(
            (prompts[item["index"]], str(item["reason"])) for item in figures["skipped"]
        )
        versions = {str(name): str(value) for name, value in figures["versions"].items()}
        graphs = tuple(sorted({str(name) for row in figures["rows"] for name in row["graphs"]}))
        whole = all(set(row["graphs"]) == set(graphs) for row in figures["rows"])
        provider = str(figures["provider"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise RefusedError(
            "parity.failed", f"the figures of the parity run are malformed: {error!r:.120}"
        ) from error
    if not graphs or not whole or set(graphs) != set(expected):
        raise RefusedError(
            "parity.failed",
            f"the parity run covered {', '.join(graphs) or 'no graph'}; made were "
            f"{', '.join(expected)}",
        )
    if len({vector.prompt.text for vector in vectors}) != len(vectors):
        raise RefusedError("parity.failed", "the parity run reports one prompt twice")
    missing = sorted(KINDS - {vector.prompt.kind for vector in vectors})
    if len(vectors) < MIN_PROMPTS or missing:
        reasons = sorted({reason for _, reason in skipped})
        raise RefusedError(
            "parity.vectors",
            f"{len(vectors)} of {len(prompts)} prompts can be used, at least {MIN_PROMPTS} of all "
            f"five kinds are needed; kinds without one: {', '.join(missing) or 'none'}; "
            f"left out because: {'; '.join(reasons) or 'nothing'}",
            hint="the model does not speak the grammar of the prompts, so they cannot prove it",
        )
    return Parity(
        vectors,
        skipped,
        graphs,
        max(vector.full for vector in vectors),
        max(vector.past for vector in vectors),
        versions,
        provider,
        seal or {},
    )


def statement(parity: Parity, subjects: Mapping[str, str], source: Mapping[str, str]) -> bytes:
    """Return the in-toto test-result statement about the graph files.

    Args:
        parity: The proof.
        subjects: SHA-256 of each graph file by manifest path.
        source: SHA-256 of each weight file by its path in the snapshot.

    """
    tests = [f"{vector.prompt.kind}-{number:02d}" for number, vector in enumerate(parity.vectors)]
    return canonical_json(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [
                {"name": path, "digest": {"sha256": digest}}
                for path, digest in sorted(subjects.items())
            ],
            "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
            "predicate": {
                "result": "PASSED",
                "configuration": [
                    {"name": path, "digest": {"sha256": digest}}
                    for path, digest in sorted(source.items())
                ]
                + [
                    {
                        "name": "parity",
                        "annotations": {
                            "graphs": " ".join(parity.graphs),
                            "precision": "fp32",
                            "provider": parity.provider,
                            "tolerance": str(TOLERANCE),
                            "max_delta_full": str(parity.full),
                            "max_delta_with_cache": str(parity.past),
                            "greedy_tokens": STEPS,
                            "prompts": len(parity.vectors),
                            "versions": parity.versions,
                        },
                    }
                ],
                "passedTests": tests,
                "warnedTests": [],
                "failedTests": [],
            },
        }
    )


def _vector(row: Mapping[str, Any], prompts: Sequence[Prompt]) -> Vector:
    """Read and judge one row."""
    index = row["index"]
    if type(index) is not int or index < 0:
        raise ValueError("an index is not a number")
    prompt = prompts[index]
    here = f"prompt {index} ({prompt.kind})"
    source = _ids(row["source"])
    full, past = Decimal(0), Decimal(0)
    for name, found in row["graphs"].items():
        _require_greedy(source, _ids(found["greedy"]), f"{here}, graph {name!s:.40}")
        full = max(full, _delta(found["full"], f"{here}, graph {name!s:.40}", "in a full pass"))
        past = max(past, _delta(found["past"], f"{here}, graph {name!s:.40}", "with the cache"))
    top = tuple((int(token), str(Decimal(value))) for token, value in row["top"])
    return Vector(prompt, _ids(row["ids"]), source, top, full, past)


def _require_greedy(source: tuple[int, ...], graph: tuple[int, ...], here: str) -> None:
    if source != graph or len(source) != STEPS:
        place = next((n for n, (a, b) in enumerate(zip(source, graph, strict=False)) if a != b), 0)
        raise RefusedError(
            "parity.failed",
            f"{here}: greedy token {place + 1} of {STEPS} differs between source and graph",
            hint=_HINT,
        )


def _delta(figure: Any, here: str, meaning: str) -> Decimal:
    value = float(figure)
    if math.isnan(value) or not 0 <= value <= float(TOLERANCE):
        raise RefusedError(
            "parity.failed",
            f"{here}: the largest difference of a logit {meaning} is {figure!s:.20}, "
            f"tolerance {TOLERANCE}",
            hint=_HINT,
        )
    return Decimal(str(figure))


_HINT = (
    "the graph is not this model: check the snapshot against its pins and build again; if it fails "
    "twice, the exporter does not fit this architecture"
)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("token ids are not a list of numbers")
    return tuple(value)
