"""From published weights to graphs: the fast one written here, the reference exported under seal.

The fast graph is ours and reads the publisher's own bytes (`bundle.staging.graph`). The reference
graph comes out of a sealed process and is foreign input: this module decides whether it is one that
the secured side would take: expected files only, parsed by the strict walker, with the inputs and
outputs of a decoder with a key-value cache. The proof of both is parity.

Beside fp32, which is always made, a build may ask for bf16 and fp16, which read the same published
bytes and differ in the graph alone, and for int8 and int4, whose codes are new bytes in a file of
their own (`bundle.staging.quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from bundle.scan.onnx import Onnx, parse_onnx
from bundle.scan.strict import open_view, parse_object
from bundle.staging.architecture import Architecture, expected_tensors
from bundle.staging.graph import Placed, interface, write_graph
from bundle.staging.inspect import InspectReport
from bundle.staging.quantize import BITS, BLOCK, RECIPE, quantize
from bundle.staging.sealed import (
    RunSealed,
    SealedJob,
    place_file,
    python,
    require_only,
    require_success,
    take,
)
from bundle.staging.source import open_file
from policy.errors import RefusedError

GRAPH = "model.onnx"
EXTERNAL = "model.onnx_data"
FAST = "fast.onnx"
NOT_EXPORTED = frozenset(["mixtral"])  # families that optimum-onnx 0.1 does not know
HEAD_MULTIPLE = 16  # of GroupQueryAttention with rotary embedding on the CPU
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROGRAM = Path(__file__).with_name("convert_main.py")
SECONDS = 4 * 3600
_RECORD_LIMIT = 1 << 20
_PART = 1 << 24  # bytes of a weight file that are looked at together
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # all ones: no finite number
_GRAPH_LIMIT = 2 * 1024**3
_READ = frozenset(["config.json", "generation_config.json", "tokenizer.json"])


@dataclass(frozen=True, slots=True)
class Made:
    """One graph in the folder of a conversion.

    Attributes:
        external: The files beside it that hold its weights.
        published: Those of them that are the publisher's own, unchanged.
        codes: The one that holds codes in the place of matrices.
        stand_in: A graph that stays here and is measured in the place of this one, where no
            provider of this host could run it.
        provider: Which the graph is for.

    """

    name: str
    interface: Literal["past", "shared"]
    path: str
    external: tuple[str, ...]
    published: frozenset[str]
    graph: Onnx
    precision: str = "fp32"
    codes: str = ""
    stand_in: str = ""
    provider: str = CPU

    @property
    def recipe(self) -> str:
        """How new bytes were made of the published ones; empty where there are none."""
        if not self.codes:
            return ""
        return (
            f"{BITS[self.precision]} bits a weight of each linear layer, {RECIPE}, {BLOCK} a block"
        )


@dataclass(frozen=True, slots=True)
class Converted:
    """The graphs in `folder`, fast before reference, and what made them."""

    folder: Path
    graphs: tuple[Made, ...]
    versions: dict[str, str]
    seal: dict[str, object]


def place_inputs(report: InspectReport, folder: Path) -> None:
    """Lay out in `folder` exactly the files that the conversion reads, as they were inspected.

    Raises:
        RefusedError: `source.changed`.

    """
    folder.mkdir()
    wanted = [file for file in report.files if file.path in _READ]
    for file in (*wanted, *report.weights()):
        with open(open_file(file), "rb"):  # noqa: PTH123 - compares with what the walk saw
            place_file(file.place, folder / file.path)


def convert(
    report: InspectReport,
    source: Path,
    out: Path,
    *,
    run_sealed: RunSealed,
    memory_mb: int,
    precisions: Sequence[str] = ("fp32",),
    reference: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Convert the snapshot that `place_inputs` laid out.

    Args:
        report: Of the snapshot, without refusals.
        source: The folder with the inputs.
        out: Must not exist; receives the graphs, and links to the weights that the fast one reads.
        run_sealed: Runs the program without a network.
        memory_mb: Limit of the sealed process.
        precisions: Of `PRECISIONS`; fp32 is made in any case.
        reference: Whether the reference graph is wanted; it is larger than the weights.
        progress: Told how many matrices have become codes.

    Raises:
        RefusedError: `convert.output`, `convert.none`, `source.values`, or a code of the scan.
        FaultError: `convert.failed`.

    """
    require_finite(report, source)
    shape = report.architecture
    written = shape is not None and shape.head_dim % HEAD_MULTIPLE == 0
    exported = shape is not None and shape.kind not in NOT_EXPORTED and (reference or not written)
    more = [precision for precision in PRECISIONS[1:] if precision in precisions]
    if (not exported and not written) or (more and not written):
        raise RefusedError(
            "convert.none",
            f"the fast graph needs heads of a multiple of {HEAD_MULTIPLE} dimensions; without it "
            + ("there is no precision but fp32" if exported else "there is none for this family"),
            hint="build it in fp32" if exported else "carry this model by other means",
        )
    out.mkdir()
    graphs: tuple[Made, ...] = ()
    versions: dict[str, str] = {"onnx": version("onnx")}
    seal: dict[str, object] = {}
    if exported:
        oracle, versions, seal = _export(
            report, source, out, run_sealed=run_sealed, memory_mb=memory_mb
        )
        graphs = (oracle,)
    if written:
        placed = _place_weights(report, source, out)
        fast = _write_fast(report, out, placed)
        others = [_write_other(report, out, placed, each, progress) for each in more]
        graphs = (fast, *graphs, *others)
    return Converted(out, graphs, versions, seal)


def require_finite(report: InspectReport, source: Path) -> None:
    """Refuse weights that hold what is no number, before any work is done with them.

    Raises:
        RefusedError: `source.values`.

    """
    views = {name: open_view(source / name) for name in set(report.holders.values())}
    for name, tensor in report.tensors.items():
        mask = _EXPONENT[tensor.dtype]
        kind = np.dtype("<u4" if tensor.dtype == "F32" else "<u2")
        for start in range(tensor.start, tensor.end, _PART):
            part = views[report.holders[name]][start : min(start + _PART, tensor.end)]
            # A tensor may begin at any byte, so its numbers need not lie at their own multiples.
            values = np.frombuffer(part, dtype=kind)
            if ((values & mask) == mask).any():
                raise RefusedError(
                    "source.values",
                    f"{name} in {report.holders[name]!r:.80} holds what is no finite number",
                    hint="download the snapshot again; if it stays so, tell its publisher",
                )


def _export(
    report: InspectReport, source: Path, out: Path, *, run_sealed: RunSealed, memory_mb: int
) -> tuple[Made, dict[str, str], dict[str, object]]:
    """Let the sealed program write the reference graph; check all that it left."""
    done = run_sealed(
        SealedJob(
            argv=python(PROGRAM, source, out),
            read_only=(source, PROGRAM),
            out=out,
            memory_mb=memory_mb,
            timeout_s=SECONDS,
        )
    )
    require_success(done, "the conversion", "convert.failed")
    require_only(out, {GRAPH, EXTERNAL, "convert.json"}, "convert.output")
    record = parse_object(
        take(out, "convert.json", _RECORD_LIMIT, "convert.output"),
        code="convert.output",
        what="the record of the conversion",
        limit=_RECORD_LIMIT,
    )
    (out / "convert.json").unlink()
    external = (EXTERNAL,) if (out / EXTERNAL).exists() else ()
    sizes = {name: (out / name).stat().st_size for name in external}
    take(out, GRAPH, _GRAPH_LIMIT, "convert.output")
    graph = parse_onnx(open_view(out / GRAPH), sizes=sizes.get, what=GRAPH)
    _require_interface(report, graph)
    versions = record.get("versions")
    if not isinstance(versions, dict):
        raise RefusedError("convert.output", "the record of the conversion names no versions")
    made = Made("reference", "past", GRAPH, external, frozenset(), graph)
    found = {str(name): str(value) for name, value in versions.items()}
    return made, found, dict(done.evidence)


def _place_weights(report: InspectReport, source: Path, out: Path) -> dict[str, Placed]:
    """Link the published files beside the graphs; return every tensor of the architecture."""
    expected = expected_tensors(_shape(report))
    placed = {
        name: Placed(report.holders[name], tensor)
        for name, tensor in report.tensors.items()
        if name in expected
    }
    for name in sorted({one.file for one in placed.values()}):
        place_file(source / name, out / name)
    return placed


def _write_fast(report: InspectReport, out: Path, placed: Mapping[str, Placed]) -> Made:
    """Write the fast graph over the published files."""
    (out / FAST).write_bytes(write_graph(_shape(report), placed))
    files = tuple(sorted({one.file for one in placed.values()}))
    return Made(
        "fast", "shared", FAST, files, frozenset(files), _read_back(report, out, FAST, files)
    )


def _write_other(
    report: InspectReport,
    out: Path,
    placed: Mapping[str, Placed],
    precision: str,
    progress: Callable[[int, int], None] | None,
) -> Made:
    """Write the fast graph in another precision than fp32."""
    shape, path = _shape(report), f"fast-{precision}.onnx"
    published = frozenset(one.file for one in placed.values())
    codes = stand_in = ""
    if precision in BITS:
        codes = f"{precision}.safetensors"
        found = quantize(placed, out, out / codes, precision=precision, progress=progress)
        raw = write_graph(shape, placed, found)
        # Only what stays as it was is read from the published files.
        published = frozenset(one.file for name, one in placed.items() if name not in found)
    else:
        raw = write_graph(shape, placed, compute=precision)
    (out / path).write_bytes(raw)
    if precision == "bf16":
        stand_in = f"stand-in-{precision}.onnx"
        (out / stand_in).write_bytes(write_graph(shape, placed, rounded=True))
    files = (*sorted(published), *([codes] if codes else []))
    graph = _read_back(report, out, path, files)
    return Made(
        f"fast-{precision}",
        "shared",
        path,
        files,
        published,
        graph,
        precision=precision,
        codes=codes,
        stand_in=stand_in,
        provider=CUDA if stand_in else CPU,
    )


def _read_back(report: InspectReport, out: Path, path: str, files: Sequence[str]) -> Onnx:
    """Parse a graph of ours as the secured side will."""
    sizes = {name: (out / name).stat().st_size for name in files}
    graph = parse_onnx(open_view(out / path), sizes=sizes.get, what=path)
    if (graph.inputs, graph.outputs) != interface(_shape(report).layers):
        raise RefusedError("convert.output", f"{path} has other inputs or outputs")
    return graph


def _shape(report: InspectReport) -> Architecture:
    if report.architecture is None:
        raise RefusedError("convert.none", "the snapshot has no architecture")
    return report.architecture


def _require_interface(report: InspectReport, graph: Onnx) -> None:
    shape = report.architecture
    layers = range(shape.layers if shape else 0)
    past = {f"past_key_values.{n}.{part}" for n in layers for part in ("key", "value")}
    present = {f"present.{n}.{part}" for n in layers for part in ("key", "value")}
    inputs = {"input_ids", "attention_mask", "position_ids", *past}
    if set(graph.inputs) != inputs or set(graph.outputs) != {"logits", *present}:
        raise RefusedError(
            "convert.output",
            f"the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; a decoder "
            f"of {len(layers)} layers with a cache has {len(inputs)} and {len(present) + 1}",
        )
