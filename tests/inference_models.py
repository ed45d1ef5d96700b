"""A random two-layer Llama as the worker meets it: converted by the real program, with graphs.json.

Built once for a test process, about six seconds. `write_model` copies it, so that a test may break
its copy.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_llama
from random_models import write_fast

from airgap.inference.graphs import ModelFacts, parse_graphs
from airgap.inference.vocabulary import Vocabulary
from bundle.staging.graph import interface

CONVERT = Path(__file__).parents[1] / "bundle" / "staging" / "convert_main.py"
SEQUENCE = "MKNACDEFGHIKLMNPQRSTVWY"
RETRO = "<MoleculeS>CCO<MoleculeE><ReverseReact>"
SEARCH = f"<ProteinS>{SEQUENCE}<ProteinE><Search><ProteinS>"


@functools.cache
def snapshot() -> Path:
    """Return the model in hub layout, for torch."""
    return tiny_llama.write_snapshot(_scratch() / "snapshot")


@functools.cache
def model_folder() -> Path:
    """Return the installed model, never to be written to."""
    source, folder = snapshot(), _scratch() / "model"
    folder.mkdir()
    subprocess.run([sys.executable, "-I", str(CONVERT), str(source), str(folder)], check=True)
    signature = json.loads((folder / "convert.json").read_text())
    (folder / "convert.json").unlink()
    shutil.copy(source / "tokenizer.json", folder)
    (folder / "graphs.json").write_text(json.dumps(graphs_document(folder, signature)))
    return folder


@functools.cache
def fast_folder() -> Path:
    """Return the installed model with the fast graph before the reference graph."""
    folder = shutil.copytree(model_folder(), _scratch() / "fast")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(snapshot() / name, folder)
    inputs, outputs = interface(write_fast(folder).layers)
    document = json.loads((folder / "graphs.json").read_text())
    document["graphs"].insert(
        0,
        {
            "name": "fast",
            "precision": "fp32",
            "interface": "shared",
            "path": "fast.onnx",
            "sha256": sha256(folder / "fast.onnx"),
            "external": [
                {"path": "model.safetensors", "sha256": sha256(folder / "model.safetensors")}
            ],
            "inputs": inputs,
            "outputs": outputs,
            "kv_layout": "BHSD",
        },
    )
    (folder / "graphs.json").write_text(json.dumps(document))
    return folder


def graphs_document(folder: Path, signature: dict[str, list[str]]) -> dict[str, Any]:
    """Return graphs.json for the files in `folder`; `signature` holds the names of the graph."""
    shape = tiny_llama.SHAPE
    words = tiny_llama.vocabulary()
    return {
        "format": "airgap-graphs/1",
        "model": "tiny-random-llama",
        "architecture": "llama",
        "vocab_size": len(words),
        "layers": shape["num_hidden_layers"],
        "kv_heads": shape["num_key_value_heads"],
        "head_dim": shape["head_dim"],
        "max_context": shape["max_position_embeddings"],
        "bos_id": 2,
        "eos_ids": [3],
        "pad_id": 0,
        "unk_id": 1,
        "reference_model": True,
        "scientific_use": False,
        "tokenizer": {"path": "tokenizer.json", "sha256": sha256(folder / "tokenizer.json")},
        "tags": {tag: words.index(tag) for tag in tiny_llama.TAGS},
        "graphs": [
            {
                "name": "reference",
                "precision": "fp32",
                "path": "model.onnx",
                "sha256": sha256(folder / "model.onnx"),
                "external": [],
                "inputs": signature["inputs"],
                "outputs": signature["outputs"],
                "kv_layout": "BHSD",
                "interface": "past",
            }
        ],
    }


def write_model(
    folder: Path, change: Callable[[dict[str, Any]], None] = lambda _document: None
) -> Path:
    """Copy the model to `folder`, which is made; `change` edits graphs.json."""
    shutil.copytree(model_folder(), folder)
    document = json.loads((folder / "graphs.json").read_text())
    change(document)
    (folder / "graphs.json").write_text(json.dumps(document))
    return folder


def rewrite(folder: Path, name: str, raw: bytes) -> None:
    """Replace a file of a copied model and its digest in graphs.json."""
    (folder / name).write_bytes(raw)
    document = json.loads((folder / "graphs.json").read_text())
    for entry in (document["tokenizer"], *document["graphs"]):
        if entry["path"] == name:
            entry["sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / "graphs.json").write_text(json.dumps(document))


def change_graph(folder: Path, change: Callable[[Any], None]) -> Path:
    """Let `change` edit the graph of a copied model."""
    import onnx

    graph = onnx.load(folder / "model.onnx")
    change(graph.graph)
    rewrite(folder, "model.onnx", graph.SerializeToString())
    return folder


def poison(folder: Path) -> Path:
    """Put NaN into the last norm's weights of a copied model."""
    from onnx import numpy_helper

    def change(graph):
        weights = next(w for w in graph.initializer if w.name == "model.norm.weight")
        values = numpy_helper.to_array(weights).copy()
        values[0] = float("nan")
        weights.CopyFrom(numpy_helper.from_array(values, weights.name))

    return change_graph(folder, change)


def facts_of(raw: bytes, **change: Any) -> ModelFacts:
    """Return the facts of the model with the digest of another tokenizer."""
    facts = parse_graphs((model_folder() / "graphs.json").read_bytes())
    return replace(facts, tokenizer_sha256=hashlib.sha256(raw).hexdigest(), **change)


def vocabulary(
    change: Callable[[dict[str, Any]], None] = lambda _document: None, **facts: Any
) -> Vocabulary:
    """Return the word-level vocabulary; `change` edits tokenizer.json, `facts` the facts."""
    document = tiny_llama.tokenizer()
    change(document)
    raw = json.dumps(document).encode()
    return Vocabulary(raw, facts_of(raw, **facts))


def byte_level(
    change: Callable[[dict[str, Any]], None] = lambda _document: None,
) -> tuple[Vocabulary, bool]:
    """Return a small byte-level BPE, as Llama and Qwen have; `change` edits tokenizer.json.

    The second value tells whether a careless encoding takes a text for a tag.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True) for t in ["<eos>", *tiny_llama.TAGS]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["MKVLAAGIVGLCAKAY CC(=O)Nc1ccccc1 MKMKMK"] * 50, trainer)
    careless = set(tokenizer.encode("CC<MoleculeE>").ids)
    document = json.loads(tokenizer.to_str())
    change(document)
    raw = json.dumps(document).encode()
    tags = {tag: tokenizer.token_to_id(tag) for tag in tiny_llama.TAGS}
    facts = facts_of(
        raw,
        vocab_size=tokenizer.get_vocab_size(),
        tags=tags,
        eos_ids=(0,),
        bos_id=None,
        pad_id=None,
        unk_id=None,
    )
    return Vocabulary(raw, facts), tags["<MoleculeE>"] in careless


def sha256(path: Path) -> str:
    """Return the digest of a file as bare hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="airgap-inference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
