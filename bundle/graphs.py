"""`payload/<model>/graphs.json`, format `airgap-graphs/1`: all that the sealed worker is told.

Staging writes it; the secured side parses it again and checks it against the files of the manifest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Document, Name, Sha256Hex, Token
from bundle.manifest import Manifest, first_problem
from policy.errors import RefusedError

FORMAT: Literal["airgap-graphs/1"] = "airgap-graphs/1"
GRAPHS_LIMIT = 1024 * 1024

_Small = Annotated[int, Field(ge=1, le=1 << 20)]
_TokenId = Annotated[int, Field(ge=0, le=1 << 24)]
_PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
_Tensor = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:-]{1,256}$")]
_Tag = Annotated[str, Field(min_length=1, max_length=128)]


class FileRef(Document):
    """A file in the model's own folder, by plain name."""

    path: _PlainName
    sha256: Sha256Hex


class Graph(Document):
    """One ONNX graph of the model in one precision."""

    name: Name
    precision: Token
    path: _PlainName
    sha256: Sha256Hex
    external: tuple[FileRef, ...] = ()
    inputs: tuple[_Tensor, ...] = Field(min_length=1, max_length=4096)
    outputs: tuple[_Tensor, ...] = Field(min_length=1, max_length=4096)
    kv_layout: Literal["BHSD", "BSHD"]
    interface: Literal["past", "shared"]


class Graphs(Document):
    """One model: shapes, special tokens, tokenizer and graphs."""

    format: Literal["airgap-graphs/1"] = FORMAT
    model: Name
    architecture: Token
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    layers: _Small
    kv_heads: _Small
    head_dim: _Small
    max_context: Annotated[int, Field(ge=1, le=1 << 24)]
    bos_id: _TokenId | None
    eos_ids: tuple[_TokenId, ...] = Field(min_length=1, max_length=64)
    pad_id: _TokenId | None
    unk_id: _TokenId | None
    reference_model: bool
    scientific_use: bool
    tokenizer: FileRef
    tags: dict[_Tag, _TokenId]
    graphs: tuple[Graph, ...] = Field(min_length=1, max_length=64)


def canonical_graphs(graphs: Graphs) -> bytes:
    """Return the byte form; here a null is a value (`unk_id`), so nothing is left out."""
    return canonical_json(graphs.model_dump(mode="json"))


def parse_graphs(raw: bytes) -> Graphs:
    """Turn untrusted bytes into `Graphs`; RefusedError `scan.graphs` for anything else."""
    parse_canonical(raw, code="scan.graphs", what="graphs.json", limit=GRAPHS_LIMIT)
    try:
        graphs = Graphs.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("scan.graphs", f"graphs.json: {first_problem(error)}") from error
    if canonical_graphs(graphs) != raw:
        raise RefusedError("scan.graphs", "graphs.json leaves out a field that staging writes")
    names = [graph.name for graph in graphs.graphs]
    if len(set(names)) != len(names):
        raise RefusedError("scan.graphs", "two graphs bear one name")
    ids = [graphs.bos_id, graphs.pad_id, graphs.unk_id, *graphs.eos_ids, *graphs.tags.values()]
    if any(token is not None and token >= graphs.vocab_size for token in ids):
        raise RefusedError("scan.graphs", "a token id lies outside the vocabulary")
    return graphs


def require_matches(graphs: Graphs, manifest: Manifest, model_id: str) -> None:
    """Check every file that `graphs` names against the manifest, and its claims on use.

    Raises:
        RefusedError: `scan.graphs`.

    """
    model = manifest.model(model_id)
    if model is None or graphs.model != model_id:
        raise RefusedError("scan.graphs", f"graphs.json of {model_id!r:.64} names another model")
    if (graphs.reference_model, graphs.scientific_use) != (
        model.reference_model,
        model.scientific_use,
    ):
        raise RefusedError("scan.graphs", f"{model_id}: graphs.json and manifest differ on use")
    if {graph.precision for graph in graphs.graphs} != set(model.precisions):
        raise RefusedError("scan.graphs", f"{model_id}: graphs.json has other precisions")
    wanted = [(graphs.tokenizer.path, graphs.tokenizer.sha256, "tokenizer")]
    for graph in graphs.graphs:
        wanted.append((graph.path, graph.sha256, "onnx"))
        wanted.extend((ref.path, ref.sha256, "external-data") for ref in graph.external)
    for name, sha256, role in wanted:
        entry = manifest.find(f"payload/{model_id}/{name}")
        if entry is None or entry.sha256 != sha256 or entry.role != role:
            raise RefusedError(
                "scan.graphs", f"{model_id}: no listed {role} {name!r:.80} with digest {sha256}"
            )
