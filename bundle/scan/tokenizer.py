"""`tokenizer.json`: the one file that tells the worker how text becomes ids, read with limits.

Decides whether the file is a tokenizer of a kind we know, small enough, with ids that are unique
and dense enough to be a vocabulary. Obeys docs/design/bundle.md, 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bundle.scan.strict import parse_object
from policy.errors import RefusedError

CODE = "scan.tokenizer"
TOKENIZER_LIMIT = 64 * 1024 * 1024
MAX_VOCABULARY = 1 << 20
MAX_TOKEN = 1024  # characters
MAX_PATTERN = 4096  # characters of one regular expression
_PAIR = 2
MAX_PARTS = 64  # steps in a normalizer, pre-tokenizer, post-processor or decoder

_TOP = frozenset(
    [
        *("version", "truncation", "padding", "added_tokens", "normalizer"),
        *("pre_tokenizer", "post_processor", "decoder", "model"),
    ]
)
_MODELS = frozenset(["BPE", "WordLevel", "WordPiece", "Unigram"])
_PARTS = frozenset(
    [
        *("Sequence", "Split", "ByteLevel", "Whitespace", "WhitespaceSplit"),
        *("Punctuation", "Digits", "Metaspace", "BertNormalizer", "BertPreTokenizer"),
        *("CharDelimiterSplit", "UnicodeScripts", "FixedLength", "NFC", "NFD"),
        *("NFKC", "NFKD", "Lowercase", "Nmt", "Precompiled"),
        *("Prepend", "Replace", "Strip", "StripAccents", "TemplateProcessing"),
        *("BertProcessing", "RobertaProcessing", "Fuse", "ByteFallback", "WordPiece"),
        *("BPEDecoder", "CTC"),
    ]
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The facts of a tokenizer that others check against.

    Attributes:
        model: Its kind.
        size: The largest id and one.
        unk: The text of the unknown token, where it has one.
        ids: Every token's id, added ones too.
        special: Those of special tokens, which no text can write; other added tokens it can.
        plain: No step changes or drops text, every id but the unknown one stands for a piece of it.
        starts: What its template puts before a text; None where it has no template.

    """

    model: str
    size: int
    unk: str | None
    ids: dict[str, int]
    special: dict[str, int]
    plain: bool = False
    starts: tuple[int, ...] | None = None


def parse_tokenizer(data: memoryview, what: str = "tokenizer.json") -> Tokenizer:
    """Read and check the file; RefusedError `scan.tokenizer`."""
    value = parse_object(data, code=CODE, what=what, limit=TOKENIZER_LIMIT)
    unknown = set(value) - _TOP
    model = value.get("model")
    if unknown or not isinstance(model, dict):
        raise _no(what, f"unknown parts {sorted(unknown)!r:.120}" if unknown else "no model")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_part(value.get(part), what, part)
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind not in _MODELS:
        raise _no(what, f"the model is of the unknown type {kind!r:.40}")
    ids = _vocabulary(model.get("vocab"), what)
    added, special = _added(value.get("added_tokens", []), ids, what)
    every = {**ids, **added}
    numbers = set(every.values())
    if len(numbers) != len(every):
        raise _no(what, "two tokens bear one id")
    if max(numbers) >= MAX_VOCABULARY:
        raise _no(what, f"an id is larger than {MAX_VOCABULARY - 1:,}")
    unk = model.get("unk_token")
    if kind == "Unigram":
        place = model.get("unk_id")
        unk = next((text for text, number in ids.items() if number == place), None)
    if unk is not None and (not isinstance(unk, str) or unk not in every):
        raise _no(what, f"the unknown-token {unk!r:.60} is not in the vocabulary")
    plain, starts = _is_plain(value, str(kind)), _starts(value.get("post_processor"), what)
    return Tokenizer(str(kind), max(numbers) + 1, unk, every, special, plain, starts)


def _starts(part: Any, what: str) -> tuple[int, ...] | None:
    """Return what the template of a post-processor puts before one text."""
    below = (part or {}).get("processors", [])
    found = [item for item in [part, *below] if item and item["type"] == "TemplateProcessing"]
    if not found:
        return None
    starts: list[int] = []
    try:
        for piece in found[-1]["single"]:
            if "SpecialToken" not in piece:
                break
            ids = found[-1]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            starts += [number for number in ids if type(number) is int]
    except (KeyError, TypeError, AttributeError) as error:
        raise _no(what, "the template of the post_processor is malformed") from error
    return tuple(starts)


def _is_plain(value: dict[str, Any], kind: str) -> bool:
    model, split = value["model"], value.get("pre_tokenizer")
    parts = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    kept = split is None or (split.get("type"), split.get("behavior")) == ("Split", "Isolated")
    changed = any(value.get(part) for part in ("normalizer", "truncation"))
    return (
        kind in {"WordLevel", "BPE"}
        and kept
        and not changed
        and not any(model.get(part) for part in parts)
    )


def _vocabulary(value: Any, what: str) -> dict[str, int]:
    if isinstance(value, list):  # Unigram: pairs of text and score, the id is the place
        pairs = [
            item[0] if isinstance(item, list) and len(item) == _PAIR else None for item in value
        ]
        if not all(isinstance(text, str) for text in pairs) or len(set(pairs)) != len(pairs):
            raise _no(what, "the vocabulary is not a list of distinct texts")
        value = {text: number for number, text in enumerate(pairs)}
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_VOCABULARY:
        raise _no(what, f"the vocabulary does not hold 1 to {MAX_VOCABULARY:,} tokens")
    for text, number in value.items():
        if len(text) > MAX_TOKEN or type(number) is not int or number < 0:
            raise _no(what, f"token {text!r:.60} has no sound id, or is too long")
    if len(set(value.values())) != len(value):
        raise _no(what, "two tokens bear one id")
    return dict(value)


def _added(value: Any, ids: dict[str, int], what: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the added tokens, and those of them that are special."""
    if not isinstance(value, list) or len(value) > MAX_VOCABULARY:
        raise _no(what, "added_tokens is not a list")
    found: dict[str, int] = {}
    for item in value:
        sound = (
            isinstance(item, dict)
            and isinstance(item.get("content"), str)
            and 1 <= len(item["content"]) <= MAX_TOKEN
            and type(item.get("id")) is int
            and item["id"] >= 0
        )
        if not sound:
            raise _no(what, f"an added token is malformed: {item!r:.80}")
        text, number = item["content"], item["id"]
        if text in found or ids.get(text, number) != number:
            raise _no(what, f"added token {text!r:.60} stands twice, or with two ids")
        found[text] = number
    special = {item["content"] for item in value if item.get("special") is True}
    return found, {text: number for text, number in found.items() if text in special}


def _check_part(value: Any, what: str, place: str) -> None:
    """Check a step and those inside it: known types, patterns of sane length."""
    pending, seen = [value], 0
    while pending:
        part = pending.pop()
        if part is None:
            continue
        seen += 1
        if not isinstance(part, dict) or part.get("type") not in _PARTS or seen > MAX_PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise _no(what, f"{place} holds an unknown step or too many: {kind!r:.60}")
        pattern = part.get("pattern")
        if isinstance(pattern, dict):
            pattern = next(iter(pattern.values()), None)
        if pattern is not None and (not isinstance(pattern, str) or len(pattern) > MAX_PATTERN):
            raise _no(what, f"{place} holds a pattern that is not a short text")
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            below = part.get(name, [])
            if not isinstance(below, list) or len(below) > MAX_PARTS:
                raise _no(what, f"{place}.{name} is not a short list")
            pending.extend(below)


def _no(what: str, reason: str) -> RefusedError:
    return RefusedError(
        CODE, f"{what}: {reason}", hint="save it again with the `tokenizers` library and inspect"
    )
