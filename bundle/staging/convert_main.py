"""The conversion program: reads a snapshot, writes the reference ONNX graph. Runs sealed.

`python -I convert_main.py SOURCE OUT`, started by `bundle.staging.convert` through the sealed
runner and by nothing else (docs/design/inference.md, 3; enclave.md, 1). It needs no
network, writes only into OUT and imports nothing of ours. The parent believes none of it: it
parses the graph again as foreign input and proves parity in another process.

Same source, same bytes: documentation strings, exporter metadata and stack traces are removed, and
the protobuf is written in its deterministic form.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Hygiene, never the proof: the seal is. Set before the first import that could look at them.
QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "PYTHONHASHSEED": "0",
}
INLINE_LIMIT = 1 << 28  # bytes of weights inside the graph file; more lie beside it, to be mapped
GRAPH = "model.onnx"
EXTERNAL = "model.onnx_data"


def main(argv: list[str]) -> int:
    """Convert `argv[0]` into the folder `argv[1]`; whatever goes wrong is raised."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    source, out = (Path(argument) for argument in argv)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(0)
    model = load(source)
    inputs, outputs = export(model, out)
    finish(out)
    (out / "convert.json").write_text(
        json.dumps({"inputs": inputs, "outputs": outputs, "versions": versions()}, sort_keys=True)
    )
    return 0


def load(source: Path) -> Any:
    """Load the weights in fp32 from safetensors only, without remote code and without a hub."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return model.eval()


def export(model: Any, out: Path) -> tuple[list[str], list[str]]:
    """Let optimum write the graph with a key-value cache; returns its input and output names."""
    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(
        model, out, task="text-generation-with-past", do_validation=False, device="cpu"
    )
    import onnx

    graph = onnx.load(out / GRAPH, load_external_data=False).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def finish(out: Path) -> None:
    """Rewrite the graph without anything that tells of the machine, and keep only its files."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    model = onnx.load(out / GRAPH)
    strip(model)
    size = sum(4 * math.prod(tensor.dims) for tensor in model.graph.initializer)
    for path in out.iterdir():
        path.unlink()
    if size > INLINE_LIMIT:
        convert_model_to_external_data(model, location=EXTERNAL, size_threshold=1024)
        onnx.save_model(model, out / GRAPH)
    else:
        (out / GRAPH).write_bytes(model.SerializeToString(deterministic=True))


def strip(model: Any) -> None:
    """Clear documentation and metadata; they hold stack traces and paths of the exporter."""
    model.producer_name, model.producer_version, model.domain = "airgap", "", ""
    model.doc_string, model.model_version = "", 0
    del model.metadata_props[:]
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        graph.doc_string, graph.name = "", "main"
        del graph.metadata_props[:]
        del graph.value_info[:]  # inferred again by every loader; its names may hold paths
        for value in (*graph.input, *graph.output):
            value.doc_string = ""
        for tensor in graph.initializer:
            tensor.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.doc_string = ""
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += list(attribute.graphs)


def versions() -> dict[str, str]:
    """Return the versions that decide the bytes of the result."""
    from importlib.metadata import version

    names = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "accelerate")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
