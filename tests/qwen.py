"""The real vocabulary of Qwen (151,643 byte strings) with our tags, for what no small one shows.

Made from `vectors/qwen` in about three seconds, once for a test process. Its tokens hold several
residues or end inside an atom, and its masks have 151,660 bits.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import lzma
from pathlib import Path

import tiny_llama

from airgap.inference.graphs import ModelFacts
from airgap.inference.vocabulary import Vocabulary, _byte_level

FILE = Path(__file__).parent / "vectors" / "qwen" / "qwen.tiktoken.xz"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
END = "<|endoftext|>"
# How the publisher cuts a text before pairs are merged.
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZE = 151_643 + 1 + len(tiny_llama.TAGS)


@functools.cache
def ranks() -> dict[bytes, int]:
    """Return the published table."""
    raw = lzma.decompress(FILE.read_bytes())
    assert hashlib.sha256(raw).hexdigest() == SHA256
    lines = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def tokenizer_json() -> bytes:
    """Return `tokenizer.json`: the table as byte-level BPE, the end token and the tags after it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cutters

    table = ranks()
    letters = {byte: letter for letter, byte in _byte_level().items()}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[int, tuple[int, int], bytes, bytes]] = []
    for token, rank in table.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in table and right in table:
                merges.append((rank, (table[left], table[right]), left, right))
    merges.sort()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={written(token): rank for token, rank in table.items()},
            merges=[(written(left), written(right)) for _, _, left, right in merges],
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cutters.Sequence(
        [
            cutters.Split(Regex(CUT), "isolated"),
            cutters.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=True, normalized=False) for text in (END, *tiny_llama.TAGS)]
    tokenizer.add_special_tokens(added)
    return str(tokenizer.to_str()).encode()


@functools.cache
def facts() -> ModelFacts:
    """Return the facts of a model that has this vocabulary, as far as they concern it."""
    first = len(ranks())
    return ModelFacts(
        model="random-qwen",
        architecture="qwen3",
        vocab_size=SIZE,
        layers=2,
        kv_heads=2,
        head_dim=16,
        max_context=2048,
        bos_id=None,
        eos_ids=(first,),
        pad_id=None,
        unk_id=None,
        reference_model=True,
        scientific_use=False,
        tokenizer_path="tokenizer.json",
        tokenizer_sha256=hashlib.sha256(tokenizer_json()).hexdigest(),
        tags={tag: first + 1 + place for place, tag in enumerate(tiny_llama.TAGS)},
        graphs=(),
    )


@functools.cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary as the worker reads it."""
    return Vocabulary(tokenizer_json(), facts())


@functools.cache
def spelled() -> list[bytes]:
    """Return the bytes of each id, read once."""
    return vocabulary().token_bytes()


def merged(piece: bytes) -> list[int]:
    """Return the ids of one piece of a text by the plain rule: always the pair of least rank."""
    table = ranks()
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        pairs = [table.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        least = min(pairs)
        if least == 1 << 30:
            break
        at = pairs.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [table[part] for part in parts]


def write_model(folder: Path, seed: int = 0) -> Path:
    """Write a random Qwen3 with this vocabulary as the worker meets it: 20 MB, two layers."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=facts().eos_ids[0],
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return install_model(folder, facts(), tokenizer_json())


def install_model(folder: Path, known: ModelFacts, tokenizer: bytes) -> Path:
    """Put graph, tokenizer and `graphs.json` beside the weights in `folder`."""
    from random_models import write_fast

    from bundle.staging.graph import interface

    (folder / "tokenizer.json").write_bytes(tokenizer)
    inputs, outputs = interface(write_fast(folder).layers)
    digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    document = {
        "format": "airgap-graphs/1",
        **{
            name: getattr(known, name) for name in ("model", "architecture", "vocab_size", "layers")
        },
        **{name: getattr(known, name) for name in ("kv_heads", "head_dim", "max_context")},
        **{
            name: getattr(known, name) for name in ("bos_id", "eos_ids", "pad_id", "unk_id", "tags")
        },
        **{name: getattr(known, name) for name in ("reference_model", "scientific_use")},
        "tokenizer": {"path": "tokenizer.json", "sha256": digest["tokenizer.json"]},
        "graphs": [
            {
                "name": "fast",
                "precision": "fp32",
                "interface": "shared",
                "path": "fast.onnx",
                "sha256": digest["fast.onnx"],
                "external": [{"path": "model.safetensors", "sha256": digest["model.safetensors"]}],
                "inputs": inputs,
                "outputs": outputs,
                "kv_layout": "BHSD",
            }
        ],
    }
    (folder / "graphs.json").write_text(json.dumps(document))
    return folder
