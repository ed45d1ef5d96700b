"""Fine faults in a graph of codes, or in their file: too small for the limit of rounding to see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view

MATRIX = "layers.1.mlp.down_proj"


def product(model):
    """Return the product with the codes of one matrix, and its initializers by place."""
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and MATRIX in n.input[1])
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    return node, by_name[node.input[1]], by_name[node.input[2]]


def alter(tensor, folder, change):
    """Hold a tensor in the graph itself, changed; the file beside it stays as it is."""
    values = numpy_helper.to_array(tensor, base_dir=str(folder)).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def largest(values):
    """Return the place of the largest magnitude."""
    return np.unravel_index(abs(values).argmax(), values.shape)


def off(values):
    """Make the largest scale 2 % larger."""
    values[largest(values)] *= np.float32(1.02)


def exchanged(values):
    """Exchange the first two columns of a matrix; of 4 bits a byte holds both."""
    if values.shape[2] == 16:
        values[:, 0, 0] = (values[:, 0, 0] >> 4) | (values[:, 0, 0] << 4)
    else:
        values[:, 0, [0, 1]] = values[:, 0, [1, 0]]


def one_scale(model, folder):
    alter(product(model)[2], folder, off)


def two_columns(model, folder):
    alter(product(model)[1], folder, exchanged)


def zero_point(model, folder):
    """Give one block another middle than the others."""
    node, codes, scales = product(model)
    rows, blocks, size = codes.dims
    row, block = largest(numpy_helper.to_array(scales, base_dir=str(folder)))
    middles = np.full((rows, blocks), 128 if size == 32 else 8, np.uint8)
    middles[row, block] -= 1
    if size == 16:  # two of 4 bits a byte, the low one first
        middles = np.pad(middles, ((0, 0), (0, blocks % 2)), constant_values=8)
        middles = middles[:, 0::2] | (middles[:, 1::2] << 4)
    model.graph.initializer.append(numpy_helper.from_array(middles, "middles"))
    inputs = [*node.input, ""][:5]
    node.input[:] = [*inputs[:3], "middles", *node.input[4:]]


def other_norm(model, folder):  # noqa: ARG001 - the shape of a fault
    """Have a layer take the norm of another."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type == "SkipSimplifiedLayerNormalization":
                node.input[place] = name.replace(
                    "layers.1.post_attention_layernorm", "layers.0.post_attention_layernorm"
                )


def far_window(model, folder):  # noqa: ARG001 - the shape of a fault
    """Have attention see the last 128 positions alone."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 128


IN_GRAPH = {
    "one scale 2 % off": one_scale,
    "two columns of a block exchanged": two_columns,
    "another middle of one block": zero_point,
    "the norm of another layer": other_norm,
}
FAR = {"a window that only long prompts reach": far_window}  # short texts do not show it
IN_FILE = {"one scale 2 % off": ("scales", off), "two columns exchanged": ("codes", exchanged)}


def seed_graph(path: Path, fault) -> None:
    """Put a fault of `IN_GRAPH` into the graph at `path`."""
    model = onnx.load(path, load_external_data=False)
    fault(model, path.parent)
    path.write_bytes(model.SerializeToString(deterministic=True))


def seed_file(path: Path, kind: str, change) -> None:
    """Put a fault of `IN_FILE` into the codes at `path`: into its bytes, in their place."""
    tensor = next(
        one
        for one in parse_safetensors(open_view(path)).tensors
        if MATRIX in one.name and one.name.endswith(kind)
    )
    raw = bytearray(path.read_bytes())
    part = np.frombuffer(raw, np.uint8)[tensor.start : tensor.end]
    change(part.view("<f4" if kind == "scales" else "u1").reshape(tensor.shape))
    path.write_bytes(raw)
