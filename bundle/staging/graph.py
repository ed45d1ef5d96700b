"""The fast graph: our own decoder in ONNX over the publisher's own bytes.

Decides how a Llama, Mistral, Qwen or Mixtral decoder is written with GroupQueryAttention on one
key-value buffer and with the head in the graph (docs/design/inference.md, 3). Weights are external
data that point into the published safetensors files at their own offsets: no weight is copied, so
what runs has the digest that was published. The function is pure: same shape, same bytes.

Between its layers a graph computes in fp32, in fp16 or in bf16 (`compute`); stored weights of
another type are cast when it is loaded. The head is fp32 in any case. No kernel of the CPU takes
bf16: `rounded` writes the same graph in fp32 with every result rounded to bf16, so that a host
without the device can measure what bf16 costs.

    inputs   input_ids               int64[rows, new]
             seqlens_k               int32[rows], positions of a row after this run, less one
             total_sequence_length   int32[], the largest of them, not less one
             select                  int64[picked], flat places in [rows * new] that get a head
             seen                    int64[picked, any], ids that the penalty punishes
             penalty                 float32[picked, 1], 1 for none
             legal                   bool[picked, vocabulary], read only if `constrained`
             constrained             bool[]
             target                  int64[picked], an id whose raw logit is wanted
             top_k                   int64[1]
             past_key_values.<layer>.{key,value}  [rows, kv_heads, capacity, head_dim], of `compute`
    outputs  scores, ids, raw        [picked, top_k], best first: after penalty and grammar; raw
             log_z, legal_z          float32[picked], log of the sum of exp of the raw logits, over
                                     all ids and over the legal ones (NaN where none is legal)
             target_raw              float32[picked]
             present.<layer>.{key,value}  the same buffers
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bundle.scan.safetensors import Tensor
from bundle.staging.architecture import Architecture

IR_VERSION = 10
OPSET = 21
HEAD_INPUTS = (*("select", "seen", "penalty", "legal", "constrained", "target", "top_k"),)
HEAD_OUTPUTS = ("scores", "ids", "raw", "log_z", "legal_z", "target_raw")
_MS = "com.microsoft"
_FLOAT, _BFLOAT16 = 1, 16  # TensorProto.DataType
_TYPES = {"F32": _FLOAT, "U8": 2, "F16": 10, "BF16": _BFLOAT16}
COMPUTE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the plain name of the file that holds it."""

    file: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Quantized:
    """Codes and scales in the place of a matrix; `bundle.staging.quantize` writes them."""

    codes: Placed
    scales: Placed
    bits: int
    block: int


def interface(layers: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the inputs and of the outputs."""
    kinds = [(layer, kind) for layer in range(layers) for kind in ("key", "value")]
    return (
        (
            "input_ids",
            "seqlens_k",
            "total_sequence_length",
            *HEAD_INPUTS,
            *(f"past_key_values.{layer}.{kind}" for layer, kind in kinds),
        ),
        (*HEAD_OUTPUTS, *(f"present.{layer}.{kind}" for layer, kind in kinds)),
    )


def write_graph(
    shape: Architecture,
    tensors: Mapping[str, Placed],
    quantized: Mapping[str, Quantized] | None = None,
    *,
    compute: str = "fp32",
    rounded: bool = False,
) -> bytes:
    """Return the ONNX file.

    Args:
        shape: The architecture.
        tensors: Every tensor of it, checked by `architecture.require_tensors`.
        quantized: What takes the place of some matrices.
        compute: A key of `COMPUTE`: what keys, values and results between the layers are.
        rounded: Write the stand-in for bf16 that the CPU runs; `compute` is fp32.

    """
    return _Writer(shape, tensors, quantized or {}, COMPUTE[compute], rounded).write()


@dataclass
class _Writer:
    """Collects nodes and weights; a method a part of the decoder, each returns a value's name."""

    shape: Architecture
    tensors: Mapping[str, Placed]
    quantized: Mapping[str, Quantized]
    compute: str = "F32"
    rounded: bool = False
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    count: int = 0

    def write(self) -> bytes:
        """Write everything."""
        from onnx import helper

        shape = self.shape
        self.shared()
        stream, normed = self.embed(), ""
        for layer in range(shape.layers):
            stream, normed = self.layer(layer, stream, normed)
        self.head(normed)
        inputs, outputs = self.signature()
        graph = helper.make_graph(
            self.nodes,
            "main",
            inputs,
            outputs,
            initializer=[*self.weights.values(), *self.constants.values()],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="airgap")
        model.ir_version = IR_VERSION
        raw: bytes = model.SerializeToString(deterministic=True)
        return raw

    # Parts of the decoder

    def shared(self) -> None:
        """Make what all layers use: the rotary tables and the flat shape of a run."""
        shape = self.shape
        frequencies = shape.rope.frequencies(shape.head_dim)
        self.floats("inv_freq", frequencies, [1, len(frequencies)])
        self.scalar("rope_start", 0, "INT64")
        self.scalar("rope_end", shape.context, "INT64")
        self.scalar("rope_step", 1, "INT64")
        places = self.op("Range", ["rope_start", "rope_end", "rope_step"])
        places = self.op("Cast", [places], to=1)
        self.integers("column", [-1, 1])
        places = self.op("Reshape", [places, "column"])
        angles = self.op("Mul", [places, "inv_freq"])
        for kind in ("Cos", "Sin"):
            table = self.op(kind, [angles])
            self.op("Cast", [self.keep(table)], [f"{kind.lower()}_cache"], to=self.type)
        self.op("Shape", ["input_ids"], ["run_shape"])

    def embed(self) -> str:
        """Rows of the embedding, float32[tokens, hidden]."""
        self.integers("flat", [-1])
        ids = self.op("Reshape", ["input_ids", "flat"])
        found = self.op("Gather", [self.stored("model.embed_tokens.weight"), ids], axis=0)
        return self.keep(self.op("Cast", [found], to=self.type))

    def layer(self, layer: int, stream: str, normed: str) -> tuple[str, str]:
        """Return the stream before its last addition, and the next layer's normed input."""
        at = f"model.layers.{layer}."
        if not normed:
            normed = self.norm(stream, f"{at}input_layernorm.weight")
        attended = self.attention(layer, normed)
        stream, normed = self.skip(stream, attended, f"{at}post_attention_layernorm.weight")
        forward = self.experts(at, normed) if self.shape.experts else self.feed_forward(at, normed)
        last = layer + 1 == self.shape.layers
        following = (
            "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
        )
        return self.skip(stream, forward, following)

    def attention(self, layer: int, normed: str) -> str:
        """GroupQueryAttention with rotary embedding on the shared buffer."""
        shape, at = self.shape, f"model.layers.{layer}.self_attn."
        parts = []
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            flat = self.linear(normed, f"{at}{name}_proj", bias=shape.attention_bias)
            if shape.qk_norm and name != "v":
                flat = self.head_norm(flat, f"{at}{name}_norm.weight")
            parts.append(self.to_rows(flat, heads * shape.head_dim))
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        out = self.fresh()
        self.op(
            "GroupQueryAttention",
            [*parts, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
            [out, *present],
            domain=_MS,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=1.0 / math.sqrt(shape.head_dim),
            local_window_size=shape.window if shape.window is not None else -1,
        )
        flat = self.keep(self.to_tokens(out, shape.heads * shape.head_dim))
        return self.linear(
            flat, f"{at}o_proj", bias=shape.attention_bias and not shape.kind.startswith("qwen2")
        )

    def feed_forward(self, at: str, normed: str) -> str:
        """SwiGLU."""
        bias = self.shape.mlp_bias
        gate = self.linear(normed, f"{at}mlp.gate_proj", bias=bias)
        up = self.linear(normed, f"{at}mlp.up_proj", bias=bias)
        gated = self.keep(self.op("Mul", [self.silu(gate), up]))
        return self.linear(gated, f"{at}mlp.down_proj", bias=bias)

    def experts(self, at: str, normed: str) -> str:
        """A mixture of experts: each expert sees the tokens that chose it, and no other."""
        shape = self.shape
        moe = f"{at}block_sparse_moe."
        logits = self.linear(normed, f"{moe}gate", bias=False)
        shares = self.op("Softmax", [self.op("Cast", [logits], to=_FLOAT)], axis=-1)
        self.integers("chosen", [shape.experts_chosen])
        best, chosen = self.fresh(), self.fresh()
        self.op("TopK", [shares, "chosen"], [best, chosen], axis=-1, largest=1, sorted=1)
        total = self.op("ReduceSum", [best, self.integers("last_axis", [-1])], keepdims=1)
        best = self.op("Cast", [self.op("Div", [best, total])], to=self.type)
        result = self.op("Cast", [self.op("Sub", [normed, normed])], to=_FLOAT)
        for expert in range(shape.experts):
            number = self.scalar(f"expert_{expert}", expert, "INT64")
            mine = self.op("Equal", [chosen, number])
            weight = self.op("Mul", [best, self.op("Cast", [mine], to=self.type)])
            weight = self.op("ReduceSum", [weight, "last_axis"], keepdims=1)
            hit = self.op("ReduceMax", [self.op("Cast", [mine], to=6), "last_axis"], keepdims=0)
            rows = self.op("NonZero", [hit])
            rows = self.op("Reshape", [rows, "flat"])
            seen = self.op("Gather", [normed, rows], axis=0)
            inner = f"{moe}experts.{expert}."
            gate = self.linear(seen, f"{inner}w1", bias=False)
            up = self.linear(seen, f"{inner}w3", bias=False)
            gated = self.keep(self.op("Mul", [self.silu(gate), up]))
            down = self.linear(gated, f"{inner}w2", bias=False)
            down = self.op("Mul", [down, self.op("Gather", [weight, rows], axis=0)])
            down = self.op("Cast", [down], to=_FLOAT)
            places = self.op("Reshape", [rows, "column"])
            result = self.op("ScatterND", [result, places, down], reduction="add")
        return self.keep(self.op("Cast", [result], to=self.type))

    def head(self, normed: str) -> None:
        """Picked positions only: logits, penalty, grammar, the best k, and both normalisers."""
        name = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        picked = self.op("Gather", [normed, "select"], axis=0)
        logits = self.product(picked, name)
        if self.type != _FLOAT:
            logits = self.op("Cast", [logits], to=_FLOAT)
        self.integers("last_axis", [-1])
        self.log_sum(logits, "log_z")
        target = self.op("Reshape", ["target", "column"])
        wanted = self.op("GatherElements", [logits, target], axis=1)
        self.op("Reshape", [wanted, "flat"], ["target_raw"])
        old = self.op("GatherElements", [logits, "seen"], axis=1)
        self.scalar("nought", 0.0, "FLOAT")
        worse = self.op(
            "Where",
            [
                self.op("Less", [old, "nought"]),
                self.op("Mul", [old, "penalty"]),
                self.op("Div", [old, "penalty"]),
            ],
        )
        punished = self.op("ScatterElements", [logits, "seen", worse], axis=1)
        self.choose(logits, punished)
        self.op("GatherElements", [logits, "ids"], ["raw"], axis=1)

    def log_sum(self, logits: str, name: str = "") -> str:
        """Log of the sum of exp over a row: its maximum less the log-probability of that.

        ReduceLogSumExp adds number by number: six times slower, and 2e-4 off where a vocabulary of
        128 k gives 7e-6 here (onnxruntime 1.28). NaN and infinity come through as NaN.
        """
        best = self.op("ReduceMax", [logits, "last_axis"], keepdims=0)
        share = self.op("LogSoftmax", [logits], axis=-1)
        share = self.op("ReduceMax", [share, "last_axis"], keepdims=0)
        return self.op("Sub", [best, share], [name] if name else None)

    def choose(self, logits: str, punished: str) -> None:
        """Take the best under the grammar; without one its mask is not read, and nothing copied."""
        from onnx import helper

        self.scalar("never", -math.inf, "FLOAT")
        branches = {}
        for name in ("then", "else"):
            outer, self.nodes = self.nodes, []
            if name == "then":
                legal = self.op("Where", ["legal", punished, "never"])
                kept = self.log_sum(self.op("Where", ["legal", logits, "never"]))
            else:
                legal, kept = punished, self.op("Identity", ["log_z"])
            best = [self.fresh(), self.fresh()]
            self.op("TopK", [legal, "top_k"], best, axis=-1, largest=1, sorted=1)
            values = [helper.make_empty_tensor_value_info(value) for value in (*best, kept)]
            branches[f"{name}_branch"] = helper.make_graph(self.nodes, name, [], values)
            self.nodes = outer
        self.op("If", ["constrained"], ["scores", "ids", "legal_z"], **branches)

    # Bricks

    def norm(self, value: str, weight: str) -> str:
        """Root-mean-square norm."""
        normed = self.op(
            "SimplifiedLayerNormalization",
            [value, self.weight(weight)],
            axis=-1,
            epsilon=self.shape.epsilon,
            stash_type=1,
        )
        return self.keep(normed)

    def head_norm(self, flat: str, weight: str) -> str:
        """Norm of each head alone (Qwen3)."""
        size = self.shape.head_dim
        apart = self.op("Reshape", [flat, self.integers("by_head", [-1, size])])
        normed = self.norm(apart, weight)
        return self.op("Reshape", [normed, self.op("Shape", [flat])])

    def skip(self, stream: str, added: str, weight: str) -> tuple[str, str]:
        """Add to the stream and norm the sum; returns (sum, normed)."""
        normed, total = self.fresh(), self.fresh()
        self.op(
            "SkipSimplifiedLayerNormalization",
            [stream, added, self.weight(weight)],
            [normed, "", "", total],
            domain=_MS,
            epsilon=self.shape.epsilon,
        )
        return self.keep(total), self.keep(normed)

    def linear(self, value: str, name: str, *, bias: bool) -> str:
        """float32[tokens, in] times the stored [out, in], transposed in the product."""
        added = self.weight(f"{name}.bias") if bias else ""
        return self.keep(self.product(value, f"{name}.weight", added))

    def product(self, value: str, name: str, bias: str = "") -> str:
        """Multiply by a stored matrix, or by the codes that take its place."""
        if name not in self.quantized:
            inputs = [value, self.weight(name), *([bias] if bias else [])]
            return self.op("Gemm", inputs, transB=1)
        codes = self.quantized[name]
        rows, width = self.tensors[name].tensor.shape
        inputs = [value, self.external(codes.codes), self.external(codes.scales)]
        inputs += ["", "", bias] if bias else []
        return self.op(
            "MatMulNBits",
            inputs,
            domain=_MS,
            K=width,
            N=rows,
            bits=codes.bits,
            block_size=codes.block,
            # Blocks of activations are rounded to 8 bits, each row for itself: one kernel for every
            # number of rows, so the same bits for a row in any batch. Level 1 (no rounding) has no
            # kernel for 8 bits, where it widens the whole matrix at each step, and for 4 bits one
            # that sums otherwise as soon as there are two rows.
            accuracy_level=4,
        )

    def silu(self, value: str) -> str:
        """Value times its sigmoid."""
        return self.keep(self.op("QuickGelu", [value], domain=_MS, alpha=1.0))

    @property
    def type(self) -> int:
        """The ONNX type of results between the layers."""
        return _TYPES[self.compute]

    def keep(self, value: str) -> str:
        """Round a result to bf16 where this graph stands in for one that computes in it."""
        if not self.rounded:
            return value
        return self.op("Cast", [self.op("Cast", [value], to=_BFLOAT16)], to=_FLOAT)

    def to_rows(self, flat: str, width: int) -> str:
        """[tokens, width] -> [rows, new, width]."""
        to = f"rows_{width}"
        if to not in self.made:
            self.made.add(to)
            self.integers(f"width_{width}", [width])
            self.op("Concat", ["run_shape", f"width_{width}"], [to], axis=0)
        return self.op("Reshape", [flat, to])

    def to_tokens(self, rows: str, width: int) -> str:
        """[rows, new, width] -> [tokens, width]."""
        return self.op("Reshape", [rows, self.integers(f"tokens_{width}", [-1, width])])

    def weight(self, name: str) -> str:
        """A stored tensor in the type of `compute`; a cast is folded when the graph is loaded."""
        stored = self.stored(name)
        if self.tensors[name].tensor.dtype == self.compute and not self.rounded:
            return stored
        cast = f"{name}.cast"
        if cast not in self.made:
            self.made.add(cast)
            self.op("Cast", [self.keep(stored)], [cast], to=self.type)
        return cast

    def stored(self, name: str) -> str:
        """Name the tensor as it lies in the publisher's file."""
        return self.external(self.tensors[name])

    def external(self, placed: Placed) -> str:
        """Name a tensor that lies in a file beside the graph."""
        from onnx import TensorProto

        tensor = placed.tensor
        if tensor.name not in self.weights:
            proto = TensorProto(name=tensor.name, dims=tensor.shape)
            proto.data_type = _TYPES[tensor.dtype]
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", placed.file),
                ("offset", str(tensor.start)),
                ("length", str(tensor.end - tensor.start)),
            ):
                proto.external_data.add(key=key, value=value)
            self.weights[tensor.name] = proto
        return tensor.name

    def signature(self) -> tuple[list[Any], list[Any]]:
        """Return the declared inputs and outputs."""
        from onnx import TensorProto, helper

        shape = self.shape
        vocabulary, cache = shape.vocabulary, ["rows", shape.kv_heads, "capacity", shape.head_dim]
        known = {
            "input_ids": (TensorProto.INT64, ["rows", "new"]),
            "seqlens_k": (TensorProto.INT32, ["rows"]),
            "total_sequence_length": (TensorProto.INT32, []),
            "select": (TensorProto.INT64, ["picked"]),
            "seen": (TensorProto.INT64, ["picked", "any"]),
            "penalty": (TensorProto.FLOAT, ["picked", 1]),
            "legal": (TensorProto.BOOL, ["masked", vocabulary]),
            "constrained": (TensorProto.BOOL, []),
            "target": (TensorProto.INT64, ["picked"]),
            "top_k": (TensorProto.INT64, [1]),
            "ids": (TensorProto.INT64, ["picked", "best"]),
            **{name: (TensorProto.FLOAT, ["picked", "best"]) for name in ("scores", "raw")},
            **{
                name: (TensorProto.FLOAT, ["picked"]) for name in ("log_z", "legal_z", "target_raw")
            },
        }
        inputs, outputs = (
            [
                helper.make_tensor_value_info(name, *known.get(name, (self.type, cache)))
                for name in names
            ]
            for names in interface(shape.layers)
        )
        return inputs, outputs

    def integers(self, name: str, values: Sequence[int]) -> str:
        """A constant int64[...]."""
        from onnx import TensorProto, helper

        if name not in self.constants:
            self.constants[name] = helper.make_tensor(
                name, TensorProto.INT64, [len(values)], values
            )
        return name

    def floats(self, name: str, values: Sequence[float], dims: Sequence[int]) -> str:
        """A constant float32."""
        from onnx import TensorProto, helper

        self.constants[name] = helper.make_tensor(name, TensorProto.FLOAT, dims, values)
        return name

    def scalar(self, name: str, value: float, kind: str) -> str:
        """A constant without dimensions."""
        from onnx import TensorProto, helper

        if name not in self.constants:
            self.constants[name] = helper.make_tensor(name, getattr(TensorProto, kind), [], [value])
        return name

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; returns its first output."""
        from onnx import helper

        outputs = outputs or [self.fresh()]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def fresh(self) -> str:
        """A name that nothing bears yet."""
        self.count += 1
        return f"v{self.count}"
