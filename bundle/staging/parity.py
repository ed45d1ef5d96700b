"""The proof that a graph answers like its source: judged here, measured in a sealed process.

Decides by docs/design/inference.md, 3: on at least 20 real prompts of all five kinds, no
logit differs by more than the tolerance, in a full pass and with the cache, and 64 greedy tokens
are the same. A figure that is missing, or is not a number, fails.

Another precision than fp32 is described by figures and not forbidden by them, but must be what it
says. 16 bits stay within `MAX_KL` of the published weights. Codes are proven in three steps:

1. The file: each code is the nearest to its published weight, `MAX_STEP`, and each scale is that of
   the recipe, `MAX_SCALE`.
2. The graph: its exact twin, the same bytes but for the rounding of activations, differs by no more
   than the tolerance in any logit from a model that holds what the codes stand for in fp32.
3. The rounding: on no prompt do the logits of the graph itself lie further from that model, in the
   root mean square, than `MAX_PART` of the spread that they have. It is 1 to 2 % of it, and 11 % in
   a deep model with random weights, which damps no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from bundle.canonical import canonical_json
from bundle.scan.strict import parse_object
from bundle.staging.convert import Made
from bundle.staging.prompts import PROMPTS, STEPS, Prompt, load_prompts, require_prompts
from bundle.staging.sealed import (
    RunSealed,
    SealedJob,
    python,
    require_only,
    require_success,
    take,
)
from bundle.vectors import (
    EXACT_LIMIT,
    FORMAT,
    FORMAT_CODED,
    PART_LIMIT,
    CodesFigures,
    Figures,
    TaskFigure,
    Vectors,
)
from bundle.vectors import Vector as VectorDocument
from policy.errors import RefusedError

TOLERANCE = EXACT_LIMIT
PROGRAM = Path(__file__).with_name("parity_main.py")
PLAN = "plan.json"
SECONDS = 4 * 3600
_LIMIT = 64 * 1024 * 1024
# What a target may differ by in a logit: sums in fp32 are nearly the same everywhere, 16 bits not.
# With codes another machine's last bit can round an activation the other way, 1/127 of its block.
TOLERANCES = {
    "fp32": TOLERANCE,
    "int8": Decimal("0.5"),
    "int4": Decimal("0.5"),
    "fp16": Decimal("0.05"),
    "bf16": Decimal("0.5"),
}
MAX_KL = Decimal("0.01")  # nats; a graph in 16 bits that differs more is another model
MAX_STEP = Decimal("0.501")  # half a step, and what fp32 rounds
MAX_SCALE = Decimal("0.000001")
MAX_PART = PART_LIMIT
EXACT_PROMPTS = 3  # at least, for the exact twin, and the longest of all among them
STOPS = {
    "molecule": "<MoleculeE>",
    "pocket-ligand": "<MoleculeE>",
    "binding-site": "<ProteinE>",
    "material": "<MaterialE>",
}


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
class Completions:
    """What a graph wrote after one prompt, without a grammar: text, how it ended, tokens."""

    prompt: Prompt
    items: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class Codes:
    """The proof of matrices that are codes, held against what the codes stand for.

    Attributes:
        step: The furthest that a code is from its published weight, in steps.
        scale: The furthest that a scale is from that of the recipe, relatively.
        exact: The furthest that a logit of the exact twin is.
        part: The furthest that a prompt is, root mean square, as a part of the logits' own spread.
        kl: Mean divergence in nats.

    """

    step: Decimal
    scale: Decimal
    exact: Decimal
    part: Decimal
    kl: Decimal


@dataclass(frozen=True, slots=True)
class Measured:
    """A precision that is not fp32, held against the published weights.

    Attributes:
        kl: Mean divergence from the published weights, in nats.
        top1: Share of positions with the same best token.
        greedy: Share of the greedy tokens before the first that differs.
        delta: Largest difference of a logit.
        codes: The proof of its codes; None where there are none.

    """

    name: str
    precision: str
    vectors: tuple[Vector, ...]
    kl: Decimal
    top1: Decimal
    greedy: Decimal
    delta: Decimal
    positions: int
    codes: Codes | None
    completions: tuple[Completions, ...]
    made: Made

    def figures(self, tasks: Sequence[TaskFigure] = ()) -> Figures:
        """Return them as the bundle carries them."""
        on = self.made.provider
        if self.made.stand_in:
            on = "CPUExecutionProvider, in fp32 with each result rounded to bf16"
        codes = None
        if self.codes is not None:
            codes = CodesFigures(exact=str(self.codes.exact), part=str(self.codes.part))
        return Figures(
            mean_kl=str(self.kl),
            top1=str(self.top1),
            greedy=str(self.greedy),
            max_delta=str(self.delta),
            positions=self.positions,
            measured_on=on,
            recipe=self.made.recipe,
            tasks=tuple(tasks),
            codes=codes,
        )


Assess = Callable[[Completions], int | None]
"""Counts the valid ones among completions; None where the prompt is of no task."""


@dataclass(frozen=True, slots=True)
class Parity:
    """A proof that holds. Deltas are the largest over all vectors and graphs in fp32.

    Attributes:
        head: How far the heads of the fast graphs, in any precision, are from numpy's: penalty,
            grammar mask, candidates, target and both normalisers; None where no graph has one.

    """

    vectors: tuple[Vector, ...]
    skipped: tuple[tuple[Prompt, str], ...]
    graphs: tuple[str, ...]
    full: Decimal
    past: Decimal
    versions: dict[str, str]
    provider: str
    seal: dict[str, object]
    measured: tuple[Measured, ...] = ()
    completions: tuple[Completions, ...] = ()
    head: Decimal | None = None

    def vectors_documents(self, model: str, assess: Assess | None = None) -> tuple[Vectors, ...]:
        """Return META/vectors/*.json, one a precision: what a target must answer again."""
        found = [self._document(model, "fp32", self.provider, self.vectors, None)]
        valid = {each.prompt.kind: assess(each) if assess else None for each in self.completions}
        for one in self.measured:
            tasks = []
            for each in one.completions:
                here, there = assess(each) if assess else None, valid.get(each.prompt.kind)
                if here is not None and there is not None:
                    tasks.append(
                        TaskFigure(
                            task=each.prompt.kind,
                            samples=len(each.items),
                            valid=here,
                            valid_fp32=there,
                        )
                    )
            found.append(
                self._document(
                    model, one.precision, one.made.provider, one.vectors, one.figures(tasks)
                )
            )
        return tuple(found)

    def _document(
        self,
        model: str,
        precision: str,
        provider: str,
        vectors: Sequence[Vector],
        figures: Figures | None,
    ) -> Vectors:
        return Vectors(
            format=FORMAT_CODED if figures and figures.codes else FORMAT,
            model=model,
            precision=precision,
            provider=provider,
            tolerance=str(TOLERANCES[precision]),
            steps=STEPS,
            credits=tuple(load_prompts()[1]),
            measured=figures,
            vectors=tuple(
                VectorDocument(
                    kind=vector.prompt.kind,
                    prompt=vector.prompt.text,
                    source=vector.prompt.source,
                    prompt_ids=vector.ids,
                    greedy_ids=vector.greedy,
                    top_logits=vector.top,
                )
                for vector in vectors
            ),
        )


def prove_parity(
    source: Path,
    graphs: Path,
    out: Path,
    *,
    made: Sequence[Made],
    start: int | None,
    run_sealed: RunSealed,
    memory_mb: int,
) -> Parity:
    """Run source and graphs side by side and judge the figures.

    Args:
        source: The folder with the published weights.
        graphs: The folder with the converted graphs.
        out: Must not exist; receives the figures.
        made: The graphs that must be covered.
        start: The id that the publisher's tokenizer puts before each text (`tokens`).
        run_sealed: Runs the program without a network.
        memory_mb: Limit of the sealed process.

    Raises:
        RefusedError: `parity.failed`, `parity.vectors`.
        FaultError: `parity.run`.

    """
    out.mkdir()
    plan = [
        {
            "name": each.name,
            "precision": each.precision,
            "interface": each.interface,
            "path": each.stand_in or each.path,
            "codes": each.codes,
        }
        for each in made
    ]
    (graphs / PLAN).write_bytes(canonical_json({"graphs": plan, "start": start, "stops": STOPS}))
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
    return judge(figures, load_prompts()[0], dict(done.evidence), expected=made)


def judge(
    figures: Mapping[str, Any],
    prompts: Sequence[Prompt],
    seal: dict[str, object] | None = None,
    *,
    expected: Sequence[Made],
) -> Parity:
    """Return the proof, or refuse; every figure is checked here, none is believed.

    Args:
        figures: What the run left, untrusted.
        prompts: The packaged prompts.
        seal: Evidence of the run.
        expected: The graphs that were made; each must be covered.

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
    wanted = [made.name for made in expected if made.precision == "fp32"]
    if not graphs or not whole or set(graphs) != set(wanted):
        raise RefusedError(
            "parity.failed",
            f"the parity run covered {', '.join(graphs) or 'no graph'}; made were "
            f"{', '.join(wanted)}",
        )
    if len({vector.prompt.text for vector in vectors}) != len(vectors):
        raise RefusedError("parity.failed", "the parity run reports one prompt twice")
    require_prompts(
        [vector.prompt for vector in vectors], len(prompts), {reason for _, reason in skipped}
    )
    others = [made for made in expected if made.precision != "fp32"]
    measured, completions = _judge_others(figures, prompts, others, vectors)
    head = _judge_heads(figures, expected)
    return Parity(
        vectors,
        skipped,
        graphs,
        max(vector.full for vector in vectors),
        max(vector.past for vector in vectors),
        versions,
        provider,
        seal or {},
        measured,
        completions,
        head,
    )


def _judge_heads(figures: Mapping[str, Any], expected: Sequence[Made]) -> Decimal | None:
    """Judge what the fast graphs make of raw logits; each must be covered."""
    found = figures.get("heads")
    wanted = {made.name for made in expected if made.interface == "shared"}
    if not isinstance(found, dict) or set(found) != wanted:
        raise RefusedError("parity.failed", "the parity run did not cover each head")
    try:
        deltas = [_delta(found[name], f"the head of {name}", "beside numpy") for name in wanted]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RefusedError("parity.failed", "the figures of a head are malformed") from error
    return max(deltas, default=None)


def _judge_others(
    figures: Mapping[str, Any],
    prompts: Sequence[Prompt],
    expected: Sequence[Made],
    vectors: Sequence[Vector],
) -> tuple[tuple[Measured, ...], tuple[Completions, ...]]:
    """Judge the graphs that are not in fp32; each must be covered on every prompt."""
    found = figures.get("precisions", {})
    if not isinstance(found, dict) or set(found) != {made.name for made in expected}:
        raise RefusedError("parity.failed", "the parity run did not cover each precision")
    try:
        measured = tuple(_measured(found[made.name], made, prompts, vectors) for made in expected)
        completions = _completions(figures.get("samples", []), prompts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise RefusedError(
            "parity.failed", f"the figures of a precision are malformed: {error!r:.120}"
        ) from error
    return measured, completions


def _measured(
    found: Mapping[str, Any], made: Made, prompts: Sequence[Prompt], vectors: Sequence[Vector]
) -> Measured:
    """Read and judge one precision."""
    rows = [_other_row(row, made, prompts) for row in found["rows"]]
    if [row.vector.ids for row in rows] != [vector.ids for vector in vectors]:
        raise ValueError(f"{made.name} was not measured on the same prompts")
    positions = sum(row.positions for row in rows)
    kl = _rounded(sum((row.kl for row in rows), Decimal(0)) / positions)
    codes = _codes(found["codes"], made, rows) if made.codes else None
    if codes is None and kl > MAX_KL:
        raise RefusedError(
            "parity.failed",
            f"{made.precision}: the mean divergence from the published weights is {kl} nats, "
            f"at most {MAX_KL} are taken",
            hint=_HINT,
        )
    return Measured(
        name=made.name,
        precision=made.precision,
        vectors=tuple(row.vector for row in rows),
        kl=kl,
        top1=_rounded(Decimal(sum(row.same for row in rows)) / positions),
        greedy=_rounded(Decimal(sum(row.agree for row in rows)) / (STEPS * len(rows))),
        delta=max(row.delta for row in rows),
        positions=positions,
        codes=codes,
        completions=_completions(found["samples"], prompts),
        made=made,
    )


def _codes(found: Mapping[str, Any], made: Made, rows: Sequence[_Row]) -> Codes:
    """Judge the codes in their file, the exact twin, and the rounding of activations."""
    twin = f"{made.precision} without rounded activations"
    step, scale = (_figure(found[name], made.precision) for name in ("step", "scale"))
    proven = set(_ids(found["prompts"]))
    lengths = {row.index: len(row.vector.ids) for row in rows}
    if len(proven) < EXACT_PROMPTS or not proven <= lengths.keys():
        raise ValueError(f"{twin}: fewer than {EXACT_PROMPTS} of the prompts")
    if max(lengths[index] for index in proven) < max(lengths.values()):
        raise ValueError(f"{twin}: not the longest of the prompts")
    exact = max(
        _delta(found["full"], twin, "in a full pass"),
        _delta(found["past"], twin, "with the cache"),
    )
    part = max(row.codes_part for row in rows)
    for value, limit, what in (
        (step, MAX_STEP, "the furthest code is {} steps from its published weight"),
        (scale, MAX_SCALE, "the furthest scale is {} of itself from that of the recipe"),
        (part, MAX_PART, "the logits are {} of their spread from what the codes stand for"),
    ):
        if not 0 <= value <= limit:
            raise RefusedError(
                "parity.failed",
                f"{made.precision}: {what.format(value)}, at most {limit} is taken",
                hint=_HINT,
            )
    total = sum((row.codes_kl for row in rows), Decimal(0))
    kl = _rounded(total / sum(row.positions for row in rows))
    return Codes(step, scale, exact, part, kl)


@dataclass(frozen=True, slots=True)
class _Row:
    index: int
    vector: Vector
    kl: Decimal
    same: int
    agree: int
    positions: int
    delta: Decimal
    codes_kl: Decimal
    codes_part: Decimal


def _other_row(row: Mapping[str, Any], made: Made, prompts: Sequence[Prompt]) -> _Row:
    """Read one prompt of a precision."""
    prompt = _prompt(row, prompts)
    here, greedy = f"{made.precision}, prompt {row['index']} ({prompt.kind})", _ids(row["greedy"])
    if len(greedy) != STEPS:
        raise ValueError(f"{here}: other than {STEPS} greedy tokens")
    positions, same, agree = (row[name] for name in ("positions", "same", "agree"))
    if any(type(each) is not int for each in (positions, same, agree)):
        raise ValueError(f"{here}: a count is no number")
    if not (positions > 0 and 0 <= same <= positions and 0 <= agree <= STEPS):
        raise ValueError(f"{here}: a count is out of range")
    kl, delta = (_figure(row[name], here) for name in ("kl", "delta"))
    codes_kl = codes_part = Decimal(0)
    if made.codes:
        codes_kl, codes_part = (_figure(row["codes"][name], here) for name in ("kl", "part"))
        if row["codes"]["positions"] != positions:
            raise ValueError(f"{here}: figures of the codes do not fit")
    vector = Vector(prompt, _ids(row["ids"]), greedy, _top(row), Decimal(0), Decimal(0))
    return _Row(
        row["index"],
        vector,
        max(Decimal(0), kl),
        same,
        agree,
        positions,
        delta,
        max(Decimal(0), codes_kl),
        codes_part,
    )


def _completions(items: Any, prompts: Sequence[Prompt]) -> tuple[Completions, ...]:
    found = []
    for item in items:
        texts = tuple(
            (each["text"], each["finish"], each["tokens"]) for each in item["completions"]
        )
        if not all(
            isinstance(words, str) and end in ("eos", "stop", "length") and type(count) is int
            for words, end, count in texts
        ):
            raise ValueError("a completion is malformed")
        found.append(Completions(_prompt(item, prompts), texts))
    return tuple(found)


def _figure(value: Any, here: str) -> Decimal:
    found = Decimal(str(value))
    if not found.is_finite():
        raise RefusedError("parity.failed", f"{here}: a figure is {found}, no number", hint=_HINT)
    return found


def _rounded(value: Decimal) -> Decimal:
    return Decimal(f"{value:.4g}")


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
                            **(
                                {}
                                if parity.head is None
                                else {"max_delta_of_head": str(parity.head)}
                            ),
                            "greedy_tokens": STEPS,
                            "prompts": len(parity.vectors),
                            "versions": parity.versions,
                        },
                    }
                ]
                + [_other_annotations(each) for each in parity.measured],
                "passedTests": tests,
                "warnedTests": [],
                "failedTests": [],
            },
        }
    )


def _other_annotations(one: Measured) -> dict[str, Any]:
    """Return what the statement says of one precision that is not fp32."""
    figures = one.figures().model_dump(mode="json", exclude={"tasks", "codes"})
    return {
        "name": f"parity {one.precision}",
        "annotations": {
            "graph": one.name,
            "provider": one.made.provider,
            **figures,
            **({} if one.codes is None else _codes_annotations(one.codes)),
        },
    }


def _codes_annotations(codes: Codes) -> dict[str, str]:
    return {
        "codes_steps_from_weights": str(codes.step),
        "codes_scales_from_recipe": str(codes.scale),
        "codes_exact_max_delta": str(codes.exact),
        "codes_part": str(codes.part),
        "codes_mean_kl": str(codes.kl),
    }


def _vector(row: Mapping[str, Any], prompts: Sequence[Prompt]) -> Vector:
    """Read and judge one row."""
    prompt = _prompt(row, prompts)
    here = f"prompt {row['index']} ({prompt.kind})"
    source = _ids(row["source"])
    full, past = Decimal(0), Decimal(0)
    for name, found in row["graphs"].items():
        _require_greedy(source, _ids(found["greedy"]), f"{here}, graph {name!s:.40}")
        full = max(full, _delta(found["full"], f"{here}, graph {name!s:.40}", "in a full pass"))
        past = max(past, _delta(found["past"], f"{here}, graph {name!s:.40}", "with the cache"))
    return Vector(prompt, _ids(row["ids"]), source, _top(row), full, past)


def _prompt(row: Mapping[str, Any], prompts: Sequence[Prompt]) -> Prompt:
    index = row["index"]
    if type(index) is not int or index < 0:
        raise ValueError("an index is not a number")
    return prompts[index]


def _top(row: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    return tuple((int(token), str(_figure(value, "a logit"))) for token, value in row["top"])


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
