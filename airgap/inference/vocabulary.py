"""The tokenizer of the installed model: segments to ids, ids to text, and the bytes of each token.

A text can never become a tag (`protocol`): it is encoded with special tokens switched off, and an
id of a special token in the result is a refusal all the same. A text that the model cannot spell is
`prompt.g11`, with the place. No id is a constant: `graphs.json` names them and the tokenizer file
must agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import TAG, Segment

TOKENIZER_LIMIT = 256 * 1024 * 1024  # bytes; that of Llama 3 has 9 MB, of Qwen 11 MB


class Vocabulary:
    """Tokenizer and tags, checked against the facts of the model."""

    def __init__(self, raw: bytes, facts: ModelFacts) -> None:
        """Read `tokenizer.json` from its bytes.

        Raises:
            ProgramError: `model.tokenizer` or `model.tags`.

        """
        self._facts = facts
        if hashlib.sha256(raw).hexdigest() != facts.tokenizer_sha256:
            raise _unfit("the file does not have the digest that graphs.json names")
        try:
            document: dict[str, Any] = json.loads(raw)
            self._unknown = (document.get("model") or {}).get("unk_token")
            self._decoder = document.get("decoder") or {}
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises bare Exception
            raise _unfit("the file is not one that this version of tokenizers reads") from error
        del document  # of a large vocabulary some 60 MB
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self.unknown_tags = sorted(
            token.content
            for number, token in added.items()
            if TAG.fullmatch(token.content) and number not in self._known_ids()
        )
        self._check()

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text: tags and control tokens."""
        return frozenset(self._special)

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Return the ids of `segments`, without a start token.

        Raises:
            ProgramError: `prompt.g04`, a tag that this model does not know; `prompt.g11`, a text
                that it cannot spell; `prompt.g03`, a text that turned into a special token.

        """
        ids: list[int] = []
        place = 0
        for segment in segments:
            ids += [self._tag(segment, place)] if segment.tag else self._plain(segment.text, place)
            place += len(segment.text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens kept."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of a plain text, unchecked; for the grammar's own use."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_again(self, text: str) -> list[int]:
        """Return the ids of a text in which tags and control tokens stand, as its publisher would.

        For the authors' perplexity alone: nothing that goes to a sample is encoded this way.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=True).ids)
        finally:
            self._tokenizer.encode_special_tokens = True

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each id of the model's vocabulary writes; empty where it has none.

        Raises:
            ProgramError: `model.grammar`; the decoder is of a kind whose bytes are not known here.

        """
        added = self._tokenizer.get_added_tokens_decoder()
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        spell = _speller(self._decoder, [one for one, at in entries.items() if at not in added])
        found = [b""] * self._facts.vocab_size
        for token, number in entries.items():
            found[number] = token.encode() if number in added else spell(token)
        return found

    def _known_ids(self) -> set[int]:
        facts = self._facts
        control = {facts.bos_id, facts.pad_id, facts.unk_id, *facts.eos_ids}
        return {number for number in control if number is not None} | set(facts.tags.values())

    def _check(self) -> None:
        facts, tokenizer = self._facts, self._tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if max(vocabulary.values(), default=0) >= facts.vocab_size:
            raise _unfit(f"it has ids beyond the model's {facts.vocab_size} entries")
        unknown = self._unknown
        if (tokenizer.token_to_id(unknown) if unknown else None) != facts.unk_id:
            raise _unfit("its unknown token is not the one that graphs.json names")
        for tag, number in facts.tags.items():
            if tokenizer.token_to_id(tag) != number:
                raise _tags(tag, f"is not id {number} in the tokenizer")
            if number not in self._special:
                raise _tags(tag, "is not a special token in the tokenizer")
        for number in facts.eos_ids:
            if tokenizer.id_to_token(number) is None:
                raise _unfit(f"end token {number} has no entry")
        if self.decode(list(facts.tags.values())) != "".join(facts.tags):
            raise _unfit("its decoder changes tags")

    def _tag(self, segment: Segment, place: int) -> int:
        found = self._facts.tags.get(segment.text)
        if found is None:
            raise ProgramError(
                "prompt.g04",
                f"{self._facts.model} knows no tag {segment.text!r:.80} (character {place})",
                f"its tags are {' '.join(sorted(self._facts.tags))}",
            )
        return found

    def _plain(self, text: str, place: int) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        hole = _first_hole(text, encoding, self._facts.unk_id)
        if hole is not None:
            start, end = hole
            raise ProgramError(
                "prompt.g11",
                f"{self._facts.model} has no token for {text[start:end]!r:.40} "
                f"(character {place + start} of the prompt)",
                "use only letters and atoms that this model was trained on",
            )
        strays = self._special.intersection(encoding.ids)
        if strays:
            raise ProgramError(
                "prompt.g03",
                f"a text of the prompt holds the special token {min(strays)}",
                "a value may not contain tags",
            )
        return list(encoding.ids)


def _first_hole(text: str, encoding: Encoding, unk_id: int | None) -> tuple[int, int] | None:
    """Return the first span of `text` that is unknown or not covered; blanks may be bare."""
    reached = 0
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if text[reached:start].strip():
            return reached, start
        if number == unk_id:
            return start, end
        reached = max(reached, end)
    return (reached, len(text)) if text[reached:].strip() else None


def _speller(decoder: dict[str, Any], tokens: Sequence[str]) -> Callable[[str], bytes]:
    """Return the function from the text of one of `tokens` to its bytes, by kind of decoder."""
    kinds = {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        letters = _byte_level()
        strange = set("".join(tokens)) - set(letters)
        if strange:
            raise _no_grammar(f"a token has the letter {min(strange)!r:.40}, which is no byte's")
        table = str.maketrans({letter: chr(byte) for letter, byte in letters.items()})
        return lambda token: token.translate(table).encode("latin-1")
    if kinds <= {"Fuse", None}:
        return str.encode
    raise _no_grammar(f"for decoder {kinds!r:.80}")


def _no_grammar(why: str) -> ProgramError:
    return ProgramError(
        "model.grammar",
        f"no grammar can be applied: the bytes of tokens are not known, {why}",
        "ask for grammar mode `none`",
    )


def _byte_level() -> dict[str, int]:
    """Return the letters that byte-level vocabularies write for bytes (as GPT-2 first did)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(others))]
    return dict(zip(letters, plain + others, strict=True))


def _unfit(message: str) -> ProgramError:
    return ProgramError("model.tokenizer", f"tokenizer: {message}", "verify the installed bundle")


def _tags(tag: str, message: str) -> ProgramError:
    return ProgramError("model.tags", f"tag {tag!r:.80} {message}", "build the bundle again")
