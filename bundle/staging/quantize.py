"""8-bit and 4-bit weights, block by block, for MatMulNBits (docs/design/inference.md, 4).

These are new bytes, so they get a file, a recipe and a digest of their own, and the bundle says
that the publisher's bytes were changed. Only the matrices of linear layers are cut down; the
embedding, the norms and the biases stay as they were published.

The recipe, symmetric and per block of 32 weights along the input: the scale is the weight with the
largest magnitude divided by the lowest code, so that this weight is met exactly and the whole range
of codes is used; a code is the rounded quotient (half to even) plus the middle. The file is a
safetensors file of our own writing: `<name>.codes`, uint8[out, blocks, bytes of a block], the low
half of a byte first, and `<name>.scales`, float32[out, blocks].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bundle.scan.safetensors import Tensor, parse_safetensors
from bundle.scan.strict import open_view
from bundle.staging.graph import Placed, Quantized

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
RECIPE = "symmetric, 32 weights a block along the input, largest magnitude on the lowest code"
_SKIPPED = ("model.embed_tokens.weight", ".block_sparse_moe.gate.weight")
_PART = 1 << 22  # weights of a matrix at once: bounds the memory to about 150 MB
_Floats = npt.NDArray[np.float32]


def quantize(
    tensors: Mapping[str, Placed],
    folder: Path,
    out: Path,
    *,
    precision: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quantized]:
    """Write the codes and scales of every linear layer to `out`.

    Args:
        tensors: The published tensors.
        folder: Holds their files.
        out: A file that does not exist, in the folder of the graph.
        precision: A key of `BITS`.
        progress: Told how many of all matrices are done.

    Returns:
        What takes the place of each matrix.

    """
    bits = BITS[precision]
    names = sorted(name for name, one in tensors.items() if is_linear(name, one.tensor))
    header, place = {}, 0
    for name in names:
        rows, width = tensors[name].tensor.shape
        blocks = -(-width // BLOCK)
        for kind, dtype, shape, size in (
            ("codes", "U8", [rows, blocks, BLOCK * bits // 8], rows * blocks * BLOCK * bits // 8),
            ("scales", "F32", [rows, blocks], 4 * rows * blocks),
        ):
            offsets = [place, place + size]
            header[f"{name}.{kind}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            place += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    maps: dict[str, npt.NDArray[np.uint8]] = {}
    with out.open("xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for done, name in enumerate(names):
            scales = []
            for part in _parts(tensors[name], folder, maps):
                codes, scale = quantize_rows(part, bits)
                stream.write(codes.tobytes())
                scales.append(scale)
            for scale in scales:
                stream.write(scale.tobytes())
            if progress is not None:
                progress(done + 1, len(names))
    written = {tensor.name: tensor for tensor in parse_safetensors(open_view(out)).tensors}
    return {
        name: Quantized(
            codes=Placed(out.name, written[f"{name}.codes"]),
            scales=Placed(out.name, written[f"{name}.scales"]),
            bits=bits,
            block=BLOCK,
        )
        for name in names
    }


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the matrix of a linear layer that is cut down."""
    return name.endswith(".weight") and len(tensor.shape) == 2 and not name.endswith(_SKIPPED)  # noqa: PLR2004


def quantize_rows(weights: _Floats, bits: int) -> tuple[npt.NDArray[np.uint8], _Floats]:
    """Return (codes, scales) of float32[rows, width].

    Returns:
        uint8[rows, blocks, BLOCK * bits / 8] and float32[rows, blocks].

    """
    rows, width = weights.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    padded[:, :width] = weights
    apart = padded.reshape(rows, blocks, BLOCK)
    largest: _Floats = np.take_along_axis(apart, abs(apart).argmax(axis=2)[:, :, None], axis=2)
    middle = 1 << (bits - 1)
    scales: _Floats = largest / np.float32(-middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(apart / scales) + middle
    codes = np.where(scales == 0.0, middle, codes).clip(0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:  # noqa: PLR2004 -- two codes a byte
        codes = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    return codes, scales[:, :, 0]


def dequantize_rows(codes: npt.NDArray[np.uint8], scales: _Floats, bits: int) -> _Floats:
    """Return float32[rows, blocks * BLOCK], what the codes stand for."""
    if bits == 4:  # noqa: PLR2004 -- two codes a byte
        codes = np.stack([codes & 15, codes >> 4], axis=3).reshape(*codes.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[:, :, None]
    whole: _Floats = values.reshape(len(codes), -1)
    return whole


def _parts(
    placed: Placed, folder: Path, maps: dict[str, npt.NDArray[np.uint8]]
) -> Iterator[_Floats]:
    """Give a stored matrix in float32, some rows at a time."""
    if placed.file not in maps:
        maps[placed.file] = np.memmap(folder / placed.file, dtype=np.uint8, mode="r")
    tensor = placed.tensor
    raw: Any = maps[placed.file][tensor.start : tensor.end]
    rows, width = tensor.shape
    size, many = len(raw) // rows, max(1, _PART // width)
    for first in range(0, rows, many):
        part = raw[first * size : (first + many) * size].tobytes()
        yield _floats(part, tensor.dtype).reshape(-1, width)


def _floats(raw: bytes, dtype: str) -> _Floats:
    if dtype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(raw, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32)
