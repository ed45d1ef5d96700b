"""From published weights to graphs: the fast one written here, the reference exported under seal.

The fast graph is ours and reads the publisher's own bytes (`bundle.staging.graph`). The reference
graph comes out of a sealed process and is foreign input: this module decides whether it is one that
the secured side would take: expected files only, parsed by the strict walker, with the inputs and
outputs of a decoder with a key-value cache. The proof of both is parity.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from bundle.scan.onnx import Onnx, parse_onnx
from bundle.scan.strict import open_view, parse_object
from bundle.staging.architecture import expected_tensors
from bundle.staging.graph import Placed, interface, write_graph
from bundle.staging.inspect import InspectReport
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
PROGRAM = Path(__file__).with_name("convert_main.py")
SECONDS = 4 * 3600
_RECORD_LIMIT = 1 << 20
_GRAPH_LIMIT = 2 * 1024**3
_READ = frozenset(["config.json", "generation_config.json", "tokenizer.json"])


@dataclass(frozen=True, slots=True)
class Made:
    """One graph in the folder of a conversion.

    `external` names the files beside it that hold its weights; `published` tells that they are the
    publisher's own, unchanged.
    """

    name: str
    interface: Literal["past", "shared"]
    path: str
    external: tuple[str, ...]
    published: bool
    graph: Onnx


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
    report: InspectReport, source: Path, out: Path, *, run_sealed: RunSealed, memory_mb: int
) -> Converted:
    """Convert the snapshot that `place_inputs` laid out.

    Args:
        report: Of the snapshot, without refusals.
        source: The folder with the inputs.
        out: Must not exist; receives the graphs, and links to the weights that the fast one reads.
        run_sealed: Runs the program without a network.
        memory_mb: Limit of the sealed process.

    Raises:
        RefusedError: `convert.output`, `convert.none`, or a code of the scan.
        FaultError: `convert.failed`.

    """
    shape = report.architecture
    exported = shape is not None and shape.kind not in NOT_EXPORTED
    written = shape is not None and shape.head_dim % HEAD_MULTIPLE == 0
    if not exported and not written:
        raise RefusedError(
            "convert.none",
            "no graph can be made: the exporter does not know this family, and the fast graph needs"
            f" heads of a multiple of {HEAD_MULTIPLE} dimensions",
            hint="carry this model by other means",
        )
    out.mkdir()
    graphs: tuple[Made, ...] = ()
    versions: dict[str, str] = {"onnx": version("onnx")}
    seal: dict[str, object] = {}
    if exported:
        reference, versions, seal = _export(
            report, source, out, run_sealed=run_sealed, memory_mb=memory_mb
        )
        graphs = (reference,)
    if written:
        graphs = (_write_fast(report, source, out), *graphs)
    return Converted(out, graphs, versions, seal)


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
    made = Made("reference", "past", GRAPH, external, published=False, graph=graph)
    found = {str(name): str(value) for name, value in versions.items()}
    return made, found, dict(done.evidence)


def _write_fast(report: InspectReport, source: Path, out: Path) -> Made:
    """Write the fast graph over the published files, which are linked beside it."""
    shape = report.architecture
    if shape is None:
        raise RefusedError("convert.none", "the snapshot has no architecture")
    placed = {
        name: Placed(report.holders[name], tensor)
        for name, tensor in report.tensors.items()
        if name in expected_tensors(shape)
    }
    (out / FAST).write_bytes(write_graph(shape, placed))
    files = tuple(sorted({one.file for one in placed.values()}))
    for name in files:
        place_file(source / name, out / name)
    sizes = {name: (out / name).stat().st_size for name in files}
    graph = parse_onnx(open_view(out / FAST), sizes=sizes.get, what=FAST)
    if (graph.inputs, graph.outputs) != interface(shape.layers):
        raise RefusedError("convert.output", "the fast graph has other inputs or outputs")
    return Made("fast", "shared", FAST, files, published=True, graph=graph)


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
