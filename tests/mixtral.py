"""The real vocabulary of Mixtral (32,000 pieces of sentencepiece) with our tags, in two spellings.

Made from `vectors/mixtral` by the converter of transformers in about a second, once for a test
process. Its tokens hold blanks of the tokenizer's own, and 256 of them write a byte each. Releases
of one vocabulary differ in where a blank is put: before every text, also after a tag (`EACH`, the
older way), or before the first one alone (`FIRST`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import lzma
import tempfile
from dataclasses import replace
from pathlib import Path

import qwen
import tiny_llama

from airgap.inference.graphs import ModelFacts
from airgap.inference.vocabulary import Vocabulary

FILE = Path(__file__).parent / "vectors" / "mixtral" / "tokenizer.model.v1.xz"
SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
PIECES = 32_000
SIZE = PIECES + len(tiny_llama.TAGS)
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
EACH, FIRST = "each", "first"
KINDS = (EACH, FIRST)


class _Slow:
    """What the converter asks of the tokenizer that it converts."""

    add_prefix_space = True

    def __init__(self, path: Path, kind: str) -> None:
        self.vocab_file = str(path)
        self.legacy = kind == EACH

    def convert_ids_to_tokens(self, number):
        return (UNK, BOS, EOS)[number]


class _Pairs:
    """The step of the converter that otherwise needs sentencepiece to list the pieces again."""

    def __init__(self, path: str) -> None:
        pass

    def extract(self, scores):
        from transformers.convert_slow_tokenizer import generate_merges

        pieces = {piece: number for number, (piece, _) in enumerate(scores)}
        return pieces, generate_merges(pieces, scores)


@functools.cache
def tokenizer_json(kind: str) -> bytes:
    """Return `tokenizer.json` as transformers writes it, the tags after the pieces."""
    from tokenizers import AddedToken, processors
    from transformers.convert_slow_tokenizer import LlamaConverter

    raw = lzma.decompress(FILE.read_bytes())
    assert hashlib.sha256(raw).hexdigest() == SHA256
    converter = type("Converter", (LlamaConverter,), {"SpmExtractor": _Pairs})
    with tempfile.NamedTemporaryFile(suffix=".model") as stream:
        stream.write(raw)
        stream.flush()
        tokenizer = converter(_Slow(Path(stream.name), kind)).converted()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    special = [UNK, BOS, EOS, *tiny_llama.TAGS]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return str(tokenizer.to_str()).encode()


@functools.cache
def scores() -> dict[str, float]:
    """Return the score of each piece that can be merged."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(lzma.decompress(FILE.read_bytes()))
    normal = 1
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == normal}


def merged(text: str) -> list[str]:
    """Return the pieces of a text by the plain rule: always the pair of the highest score."""
    table = scores()
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [table.get(a + b) for a, b in itertools.pairwise(parts)]
        known = [score for score in pairs if score is not None]
        if not known:
            break
        at = pairs.index(max(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        name
        for part in parts
        for name in ([part] if part in table else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@functools.cache
def facts(kind: str) -> ModelFacts:
    """Return the facts of a model that has this vocabulary, as far as they concern it."""
    return replace(
        qwen.facts(),
        model=f"random-mixtral-{kind}",
        architecture="mixtral",
        vocab_size=SIZE,
        bos_id=1,
        eos_ids=(2,),
        unk_id=0,
        tokenizer_sha256=hashlib.sha256(tokenizer_json(kind)).hexdigest(),
        tags={tag: PIECES + place for place, tag in enumerate(tiny_llama.TAGS)},
    )


@functools.cache
def vocabulary(kind: str) -> Vocabulary:
    """Return the vocabulary as the worker reads it."""
    return Vocabulary(tokenizer_json(kind), facts(kind))


@functools.cache
def spelled(kind: str) -> list[bytes]:
    """Return the bytes of each id, read once."""
    return vocabulary(kind).token_bytes()


def changed(kind: str, change) -> Vocabulary:
    """Return the vocabulary of an edited `tokenizer.json`."""
    document = json.loads(tokenizer_json(kind))
    change(document)
    raw = json.dumps(document).encode()
    return Vocabulary(raw, replace(facts(kind), tokenizer_sha256=hashlib.sha256(raw).hexdigest()))


def save_random(folder: Path, seed: int = 0, **changes) -> Path:
    """Write config and weights of a random Mixtral with this vocabulary: 8 MB, two layers."""
    import torch
    import transformers

    shape = {
        "vocab_size": SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**{**shape, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_model(folder: Path, kind: str) -> Path:
    """Write a random Mixtral with this vocabulary as the worker meets it."""
    return qwen.install_model(save_random(folder), facts(kind), tokenizer_json(kind))
