"""The tokenizer of the installed model: segments to ids, ids to text, and the bytes of each token.

A text can never become a tag (`protocol`): it is encoded with special tokens switched off, and an
id of a special token in the result is a refusal all the same. A text that the model cannot spell is
`prompt.g11`, with the place. No id is a constant: `graphs.json` names them and the tokenizer file
must agree.

Some tokenizers (sentencepiece: Mistral, Mixtral, Llama 2) put a blank of their own before a text:
before each, also after a tag, or before the first alone. Prompts get it where the publisher's
tokenizer writes it in the whole text, a text that goes on gets none, and where ids become text
again it is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

from tokenizers import Encoding, Tokenizer

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import TAG, Segment

TOKENIZER_LIMIT = 256 * 1024 * 1024  # bytes; that of Llama 3 has 9 MB, of Qwen 11 MB
_PROBE = "C"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # as the library reads a number


class Place(Enum):
    """What stands before a text: nothing, a tag, or a text that it goes on."""

    START = "start"
    TAG = "tag"
    TEXT = "text"


def place_after(segments: Sequence[Segment]) -> Place:
    """Return what a text after `segments` stands after; an empty text is nothing."""
    last = next((one for one in reversed(segments) if one.text), None)
    if last is None:
        return Place.START
    return Place.TAG if last.tag else Place.TEXT


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
            self._tokenizer = _plain_tokenizer(raw)
            self._blanks = _take_blanks(document)
            # Going on with a text needs a tokenizer without blanks of its own.
            bare = self._tokenizer
            if any(self._blanks.values()):
                bare = _plain_tokenizer(json.dumps(document).encode())
        except Exception as error:  # tokenizers raises bare Exception
            raise _unfit("the file is not one that this version of tokenizers reads") from error
        del document  # of a large vocabulary some 60 MB
        self._tokenizers = {
            place: self._tokenizer if blank else bare for place, blank in self._blanks.items()
        }
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._special |= set(facts.eos_ids)
        self._bounds = self._special | set(added)  # a text ends there and another one begins
        self._anchor = next(iter(facts.tags.values()), facts.eos_ids[0])
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

    def encode(self, segments: Sequence[Segment], after: Sequence[Segment] = ()) -> list[int]:
        """Return the ids of `segments`, without a start token.

        Args:
            segments: Neighbouring texts are one text.
            after: What stands before them, and is not encoded.

        Raises:
            ProgramError: `prompt.g04`, a tag that this model does not know; `prompt.g11`, a text
                that it cannot spell; `prompt.g03`, a text that turned into a special token.

        """
        ids: list[int] = []
        offset, place = 0, place_after(after)
        for segment in _joined(segments):
            if segment.tag:
                ids.append(self._tag(segment, offset))
            else:
                ids += self._plain(segment.text, offset, place)
            offset += len(segment.text)
            place = Place.TAG if segment.tag else Place.TEXT
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` as the publisher's decoder writes it, special tokens kept."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def continuation(self, ids: Sequence[int], after: Sequence[Segment] = ()) -> str:
        """Return the text that `ids` write after a prompt, special tokens kept.

        It is what a person who typed it would have written: without the blanks that the tokenizer
        itself puts before texts, and with a blank that the model began with.
        """
        if not any(self._blanks.values()):
            return self._middle(ids)
        text, run, place = "", list[int](), place_after(after)
        for number in [*ids, None]:
            if number is not None and number not in self._bounds:
                run.append(number)
                continue
            written = self._middle(run) if run else ""
            text += written.removeprefix(" ") if self._blanks[place] else written
            text += "" if number is None else self._middle([number])
            run, place = [], Place.TAG
        return text

    def blank(self, place: Place) -> bool:
        """Return whether the tokenizer puts a blank of its own before a text that stands there."""
        return self._blanks[place]

    def plain_ids(self, text: str, place: Place = Place.TEXT) -> list[int]:
        """Return the ids of a plain text, unchecked; for the grammar's own use."""
        return list(self._tokenizers[place].encode(text, add_special_tokens=False).ids)

    def encode_again(self, text: str, *, start: bool = True) -> list[int]:
        """Return the ids of a text in which tags and control tokens stand, as its publisher would.

        For the authors' perplexity and the checks of this class: nothing that goes to a sample is
        encoded this way. `start` adds what the tokenizer puts before and after a text.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=start).ids)
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
            special = number in added and added[number].special
            found[number] = token.encode() if special else spell(token)
        return found

    def _middle(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` as it stands inside a longer one."""
        return self.decode([self._anchor, *ids])[len(self.decode([self._anchor])) :]

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
        self._check_texts()

    def _check_texts(self) -> None:
        """Refuse a tokenizer that cuts or writes a text with tags otherwise than piece by piece."""
        tagged = [Segment(_PROBE)]
        for tag in self._facts.tags:
            tagged += [Segment(tag, tag=True), Segment(_PROBE)]
        places = [Place.START] + [Place.TAG] * len(self._facts.tags)
        texts = [self.plain_ids(_PROBE, place) for place in places]
        if any(self._facts.unk_id in ids for ids in texts):
            return  # a model of another alphabet: each prompt is held against it (`prompt.g11`)
        ids = list(texts[0])
        for number, text in zip(self._facts.tags.values(), texts[1:], strict=True):
            ids += [number, *text]
        whole = "".join(segment.text for segment in tagged)
        if self.encode_again(whole, start=False) != ids:
            raise _unfit("it cuts a text with tags otherwise than tag by tag")
        if self.continuation(ids) != whole:
            raise _unfit("it does not give back the text that it was given")

    def _tag(self, segment: Segment, place: int) -> int:
        found = self._facts.tags.get(segment.text)
        if found is None:
            raise ProgramError(
                "prompt.g04",
                f"{self._facts.model} knows no tag {segment.text!r:.80} (character {place})",
                f"its tags are {' '.join(sorted(self._facts.tags))}",
            )
        return found

    def _plain(self, text: str, offset: int, place: Place) -> list[int]:
        encoding = self._tokenizers[place].encode(text, add_special_tokens=False)
        hole = _first_hole(text, encoding, self._facts.unk_id)
        if hole is not None:
            start, end = hole
            raise ProgramError(
                "prompt.g11",
                f"{self._facts.model} has no token for {text[start:end]!r:.40} "
                f"(character {offset + start} of the prompt)",
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


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Return them without empty ones, neighbouring texts as one."""
    found: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if found and not (segment.tag or found[-1].tag):
            found[-1] = Segment(found[-1].text + segment.text)
        else:
            found.append(segment)
    return found


def _plain_tokenizer(raw: bytes) -> Tokenizer:
    """Read a tokenizer that takes special tokens in a text for letters."""
    found = Tokenizer.from_buffer(raw)
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, in order."""
    if not part:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for below in ("normalizers", "pretokenizers", "decoders"):
        for one in part.get(below, ()):
            yield from _steps(one)


def _take_blanks(document: dict[str, Any]) -> dict[Place, bool]:
    """Take out of `tokenizer.json` what writes a blank before a text; tell where it did."""
    first = every = False
    for step in _steps(document.get("normalizer")):
        if step["type"] == "Prepend":
            every = True
            step.clear()
            step.update(type="Sequence", normalizers=[])
    for step in _steps(document.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            older = "always" if step.pop("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", older)
            first, every = first or scheme == "first", every or scheme == "always"
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            every = every or bool(step.get("add_prefix_space", True))
            step["add_prefix_space"] = False
    return {Place.START: first or every, Place.TAG: every, Place.TEXT: False}


def _speller(decoder: dict[str, Any], tokens: Sequence[str]) -> Callable[[str], bytes]:
    """Return the function from the text of one of `tokens` to its bytes, by steps of the decoder.

    What a token writes inside a text; a step that strips the beginning of a text does not matter.
    """
    steps = list(_steps(decoder))
    kinds = [step.get("type") for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _byte_speller(tokens)
    replaced: list[tuple[str, str]] = []
    fallback = fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                old and not fallback and not fused
            ):
                replaced.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "stop": 0} if fused:
                pass
            case _:
                raise _no_grammar(f"for decoder {kinds!r:.120}")
    if not steps:
        raise _no_grammar("without a decoder")

    def spell(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        byte = _BYTE.fullmatch(token) if fallback else None
        return token.encode() if byte is None else bytes([int(byte[1], 16)])

    return spell


def _byte_speller(tokens: Sequence[str]) -> Callable[[str], bytes]:
    letters = _byte_level()
    strange = set("".join(tokens)) - set(letters)
    if strange:
        raise _no_grammar(f"a token has the letter {min(strange)!r:.40}, which is no byte's")
    table = str.maketrans({letter: chr(byte) for letter, byte in letters.items()})

    def spell(token: str) -> bytes:
        if set(token) <= set(letters):
            return token.translate(table).encode("latin-1")
        return token.encode()  # an added token, which the decoder writes as it stands

    return spell


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
