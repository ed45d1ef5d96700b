"""`graphs.json`, format `airgap-graphs/1`: all that the worker is told about a model.

The secured side has checked the same file against the signed manifest (`bundle.graphs`); the
worker, which may not import that code, reads it again and believes only what it understands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from airgap.enclave.channel import ProgramError
from airgap.inference.strict import Fields, MalformedError, is_text, parse_object

FORMAT = "airgap-graphs/1"
GRAPHS_LIMIT = 1024 * 1024  # bytes
KV_LAYOUT = "BHSD"  # batch, head, sequence, head dimension
# What a graph takes and gives: a decoder with past that gives logits, and keys and values joined;
# or shared buffers and the head inside (`airgap.inference.fast`).
INTERFACES = REFERENCE, FAST = "past", "shared"
_HEAD_IN = ("select", "seen", "penalty", "legal", "constrained", "target", "top_k")
_SIGNATURES = {
    REFERENCE: (("input_ids", "attention_mask", "position_ids"), ("logits",)),
    FAST: (
        ("input_ids", "seqlens_k", "total_sequence_length", *_HEAD_IN),
        ("scores", "ids", "raw", "log_z", "legal_z", "target_raw"),
    ),
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE_LIMIT = 1 << 20
_ID_LIMIT = (1 << 24) - 1


@dataclass(frozen=True, slots=True)
class Graph:
    """One ONNX graph; `path` is a plain name in the model's folder."""

    name: str
    precision: str
    interface: str
    path: str
    sha256: str
    external: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shapes, ids and graphs of one model; `tags` in order of id."""

    model: str
    architecture: str
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    max_context: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    unk_id: int | None
    reference_model: bool
    scientific_use: bool
    tokenizer_path: str
    tokenizer_sha256: str
    tags: dict[str, int]
    graphs: tuple[Graph, ...]

    @property
    def past_inputs(self) -> tuple[str, ...]:
        """Names of the key and value inputs, by layer."""
        return tuple(
            f"past_key_values.{layer}.{kind}"
            for layer in range(self.layers)
            for kind in ("key", "value")
        )

    @property
    def present_outputs(self) -> tuple[str, ...]:
        """Names of the key and value outputs, in the order of `past_inputs`."""
        return tuple(name.replace("past_key_values", "present", 1) for name in self.past_inputs)

    def graph(self, precision: str, interfaces: tuple[str, ...] = (FAST, REFERENCE)) -> Graph:
        """Return the graph of this precision; the first interface that there is one of.

        Raises:
            ProgramError: `model.precision`.

        """
        for interface in interfaces:
            for graph in self.graphs:
                if (graph.precision, graph.interface) == (precision, interface):
                    return graph
        offered = ", ".join(sorted({graph.precision for graph in self.graphs}))
        raise ProgramError(
            "model.precision",
            f"precision {precision!r:.40} was demanded; {self.model} has {offered}",
            "demand one that the bundle holds",
        )


def parse_graphs(raw: bytes) -> ModelFacts:
    """Read the file; ProgramError `model.facts` for anything that is not wholly understood."""
    try:
        fields = parse_object(raw, limit=GRAPHS_LIMIT, what="graphs.json")
        facts = _facts(fields)
        fields.done()
        _check(facts)
    except MalformedError as error:
        raise ProgramError(
            "model.facts", str(error), "verify the installed bundle; build it again if it is intact"
        ) from error
    return facts


def _facts(fields: Fields) -> ModelFacts:
    fields.one_of("format", (FORMAT,))
    tokenizer_path, tokenizer_sha256 = _file(fields.take("tokenizer"), "tokenizer")
    return ModelFacts(
        model=fields.text("model", 128),
        architecture=fields.text("architecture", 64),
        vocab_size=fields.integer("vocab_size", 2, _ID_LIMIT + 1),
        layers=fields.integer("layers", 1, _SIZE_LIMIT),
        kv_heads=fields.integer("kv_heads", 1, _SIZE_LIMIT),
        head_dim=fields.integer("head_dim", 1, _SIZE_LIMIT),
        max_context=fields.integer("max_context", 1, _ID_LIMIT),
        bos_id=fields.optional_integer("bos_id", 0, _ID_LIMIT),
        eos_ids=fields.integers("eos_ids", (1, 64), _ID_LIMIT),
        pad_id=fields.optional_integer("pad_id", 0, _ID_LIMIT),
        unk_id=fields.optional_integer("unk_id", 0, _ID_LIMIT),
        reference_model=fields.flag("reference_model"),
        scientific_use=fields.flag("scientific_use"),
        tokenizer_path=tokenizer_path,
        tokenizer_sha256=tokenizer_sha256,
        tags=_tags(fields.take("tags")),
        graphs=tuple(_graph(value) for value in fields.items("graphs", 1, 64)),
    )


def _check(facts: ModelFacts) -> None:
    ids = [facts.bos_id, facts.pad_id, facts.unk_id, *facts.eos_ids, *facts.tags.values()]
    if any(number is not None and number >= facts.vocab_size for number in ids):
        raise MalformedError("graphs.json: a token id lies outside the vocabulary")
    control = {facts.bos_id, facts.pad_id, facts.unk_id, *facts.eos_ids}
    if len(set(facts.tags.values())) != len(facts.tags) or control & set(facts.tags.values()):
        raise MalformedError("graphs.json: two tags, or a tag and a control token, share an id")
    if facts.unk_id in facts.eos_ids:
        raise MalformedError("graphs.json: the unknown token ends texts")
    for graph in facts.graphs:
        inputs, outputs = _SIGNATURES[graph.interface]
        wanted_in, wanted_out = {*inputs, *facts.past_inputs}, {*outputs, *facts.present_outputs}
        if (sorted(graph.inputs), sorted(graph.outputs)) != (sorted(wanted_in), sorted(wanted_out)):
            raise MalformedError(
                f"graphs.json: graph {graph.name!r:.80} has not the inputs and outputs of a "
                f"decoder of {facts.layers} layers with past"
            )


def _graph(value: object) -> Graph:
    fields = Fields(value, "graph")
    fields.one_of("kv_layout", (KV_LAYOUT,))
    path, sha256 = _file_fields(fields)
    graph = Graph(
        name=fields.text("name", 128),
        precision=fields.text("precision", 64),
        interface=fields.one_of("interface", tuple(_SIGNATURES)),
        path=path,
        sha256=sha256,
        external=tuple(_file(one, "external") for one in fields.items("external", 0, 64)),
        inputs=fields.texts("inputs", (1, 4096), 256),
        outputs=fields.texts("outputs", (1, 4096), 256),
    )
    fields.done()
    return graph


def _file(value: object, what: str) -> tuple[str, str]:
    fields = Fields(value, what)
    found = _file_fields(fields)
    fields.done()
    return found


def _file_fields(fields: Fields) -> tuple[str, str]:
    path, sha256 = fields.text("path", 128), fields.text("sha256", 64)
    if not _NAME.fullmatch(path):
        fields.fail("path", "a plain file name")
    if not _SHA256.fullmatch(sha256):
        fields.fail("sha256", "64 lower-case hexadecimal digits")
    return path, sha256


def _tags(value: object) -> dict[str, int]:
    if not isinstance(value, dict) or not all(
        is_text(tag, 128) and tag and type(number) is int and 0 <= number <= _ID_LIMIT
        for tag, number in value.items()
    ):
        raise MalformedError("graphs.json: field 'tags' must map names to ids")
    return dict(sorted(value.items(), key=lambda item: item[1]))
