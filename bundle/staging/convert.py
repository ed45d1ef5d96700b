"""From published weights to the reference graph, in a sealed process; the result is foreign input.

Decides whether what came out is a graph that the secured side would take: expected files only,
parsed by the strict walker, with the inputs and outputs of a decoder with a key-value cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bundle.scan.onnx import Onnx, parse_onnx
from bundle.scan.strict import open_view, parse_object
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
PROGRAM = Path(__file__).with_name("convert_main.py")
SECONDS = 4 * 3600
_RECORD_LIMIT = 1 << 20
_GRAPH_LIMIT = 2 * 1024**3
_READ = frozenset(["config.json", "generation_config.json", "tokenizer.json"])


@dataclass(frozen=True, slots=True)
class Converted:
    """The graph in `folder`, what it says of itself, and what made it."""

    folder: Path
    graph: Onnx
    external: bool
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
        out: Must not exist; receives the graph.
        run_sealed: Runs the program without a network.
        memory_mb: Limit of the sealed process.

    Raises:
        RefusedError: `convert.output`, or a code of the scan.
        FaultError: `convert.failed`.

    """
    out.mkdir()
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
    external = (out / EXTERNAL).exists()
    sizes = {EXTERNAL: (out / EXTERNAL).stat().st_size} if external else {}
    take(out, GRAPH, _GRAPH_LIMIT, "convert.output")
    graph = parse_onnx(open_view(out / GRAPH), sizes=sizes.get, what=GRAPH)
    _require_interface(report, graph)
    versions = record.get("versions")
    if not isinstance(versions, dict):
        raise RefusedError("convert.output", "the record of the conversion names no versions")
    return Converted(
        out,
        graph,
        external,
        {str(name): str(version) for name, version in versions.items()},
        dict(done.evidence),
    )


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
