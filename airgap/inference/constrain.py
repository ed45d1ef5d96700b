"""Grammars: which tokens are legal next, over the bytes of tokens (docs/design/science.md, 4).

`structure` fixes tags, their order and the alphabet inside them; `copy` fixes the whole completion
of a binding-site request: every residue of the input in order, bare or in a pocket pair, then the
end tag. Masks work on the bytes that tokens write, so they hold for any segmentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import TAG, Grammar, Segment
from airgap.inference.valence import Valence, Writing, open_text
from airgap.inference.vocabulary import Place, Vocabulary, place_after

# What a text is written with. A SMILES: OpenSMILES, and `~` of its dialects; no `>`, as a reaction
# has its own tags here. Brackets and valence are not its business.
_SMILES, _RESIDUES, _RESIDUE = r"[A-Za-z0-9@+\-\[\]()=#$%:.\/\\*~]+", "[A-Z]+", "[A-Z]"
_LETTERS = {"SMILES": _SMILES, "RESIDUES": _RESIDUES, "RESIDUE": _RESIDUE}  # after a tag
_MOLECULE = "molecule: <MoleculeS> SMILES <MoleculeE>"
_METAL = "metal: <MetalS> SMILES <MetalE>"
_POCKET = "pocket: <PocketS> RESIDUE <PocketE>"
# By task: the start, where FIRST is the text that follows the prompt; its letters; further rules.
_STRUCTURES = {
    "retrosynthesis": ("molecule+", "", (_MOLECULE,)),
    "molecule": ("FIRST <MoleculeE>", _SMILES, ()),
    "pocket-ligand": ("FIRST <MoleculeE>", _SMILES, ()),
    "material": ("metal+ molecule+ <MaterialE>", "", (_METAL, _MOLECULE)),
    "binding-site": (
        "(FIRST | pocket RESIDUES?) (pocket RESIDUES?)* <ProteinE>",
        _RESIDUES,
        (_POCKET,),
    ),
}
# The parser's own words hold the text that it parsed: never into a log.
_LIMITS = {"verbose_errors": False}
_WORD_BITS = 32


def lark_of(
    grammar: Grammar, *, continues: bool = False, opens: bool = False, blanks: bool = False
) -> str:
    """Return the Lark text of a grammar that is not `none`.

    Args:
        grammar: The request's.
        continues: The prompt ends inside a SMILES that the user began: the rest may be empty.
        opens: The tokenizer writes a blank of its own before the first text.
        blanks: It does before each text that follows a tag. Such a blank may stand there and
            nowhere else, since a model may have been taught without.

    """
    if grammar.mode == "copy":
        return _copy_lark(grammar.sequence, opens=opens, blanks=blanks)
    start, letters, rules = _STRUCTURES[grammar.task]
    if continues and start.startswith("FIRST <"):
        start = start.replace("FIRST", "FIRST?", 1)
    used = re.findall(r"\b[A-Z]+\b", " ".join((start, *rules)))
    texts = {name: (one, blanks) for name, one in _LETTERS.items() if name in used}
    if letters:
        texts["FIRST"] = letters, opens
    terminals = [f"{name}: /{' ?' if blank else ''}{one}/" for name, (one, blank) in texts.items()]
    return "\n".join([f"start: {start}", *rules, *terminals, ""])


def _copy_lark(sequence: str, *, opens: bool, blanks: bool) -> str:
    """Return the text of an exact copy, with one rule a letter.

    A blank after a pocket may also stand before the next tag, where it is no part of the text: to
    forbid it there would take two rules a residue.
    """
    gap = "GAP? " if blanks else ""
    rules = [
        f'{_rule(letter)}: "{letter}" | <PocketS> {gap}"{letter}" <PocketE> {gap}'.rstrip()
        for letter in sorted(set(sequence))
    ]
    body = " ".join(_rule(letter) for letter in sequence)
    terminal = ['GAP: " "'] if blanks or opens else []
    start = f"start: {'GAP? ' if opens else ''}{body} <ProteinE>"
    return "\n".join([start, *rules, *terminal, ""])


class Grammars:
    """The byte trie of one vocabulary, built once; compiles the grammar of each request."""

    def __init__(
        self, vocabulary: Vocabulary, facts: ModelFacts, valence: Valence | None = None
    ) -> None:
        """Build the trie; ProgramError `model.grammar` where the bytes of tokens are not known.

        Args:
            vocabulary: Of the model.
            facts: Of the model.
            valence: The filter of requests that ask for it; None refuses them.

        """
        self._bytes = vocabulary.token_bytes()
        bridge = TokenizerWrapper(_Bridge(vocabulary, facts, self._bytes))
        self._tokenizer = LLTokenizer(bridge, eos_token=list(facts.eos_ids), slices=[])
        self._size = facts.vocab_size
        self._tags = facts.tags
        self._vocabulary = vocabulary
        self._valence = valence
        # llguidance may offer the unknown token where nothing fits: control tokens are never legal.
        control = {facts.bos_id, facts.pad_id, facts.unk_id} - set(facts.eos_ids)
        self._legal = np.ones(facts.vocab_size, dtype=np.bool_)
        self._legal[[number for number in control if number is not None]] = False

    def compile(self, grammar: Grammar, prompt: Sequence[Segment]) -> Constraint | None:
        """Return the constraint of a request, None for mode `none`.

        Raises:
            ProgramError: `model.tags`, the model lacks a tag of this grammar; `model.grammar`;
                `model.valence`, the filter is not loaded.

        """
        if grammar.mode == "none":
            return None
        place = place_after(prompt)
        lark = lark_of(
            grammar,
            continues=place is Place.TEXT,
            opens=self._vocabulary.blank(place),
            blanks=self._vocabulary.blank(Place.TAG),
        )
        missing = sorted(set(TAG.findall(lark)) - set(self._tags))
        if missing:
            raise ProgramError(
                "model.tags",
                f"the grammar needs {' '.join(missing)}, which this model does not have",
                "use a model of this family, or grammar mode `none`",
            )
        matcher = LLMatcher(self._tokenizer, lark, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise ProgramError("model.grammar", "the grammar does not compile", "shorten the input")
        return Constraint(
            matcher, self._legal, self._copy_of(grammar, place), self._writing_of(grammar, prompt)
        )

    def _writing_of(self, grammar: Grammar, prompt: Sequence[Segment]) -> Writing | None:
        if not grammar.valence:
            return None
        if self._valence is None:
            raise ProgramError(
                "model.valence",
                "this worker was started without the filter `valence`",
                "start it with the filter: airgap run --valence",
            )
        return Writing(self._valence, self._tags, self._bytes, open_text(prompt))

    def _copy_of(self, grammar: Grammar, place: Place) -> Copy | None:
        if grammar.mode != "copy":
            return None
        return Copy(
            grammar.sequence,
            self._vocabulary.plain_ids,
            letters=[len(one) - one.count(b" ") for one in self._bytes],
            tags=self._tags,
            place=place,
        )


_TEXT, _TAGGED, _OPENED, _FILLED = range(4)


class Copy:
    """Guesses how the exact copy of a sequence goes on: without a pocket, the likeliest way.

    A place in it is (residues written, where): inside a text, after a tag, after the tag that opens
    a pocket, after the residue of a pocket.
    """

    def __init__(
        self,
        sequence: str,
        ids_of: Callable[[str, Place], list[int]],
        *,
        letters: Sequence[int],
        tags: Mapping[str, int],
        place: Place,
    ) -> None:
        """Take the sequence, the tokenizer, the residues that each id writes, tags, the start."""
        self._sequence, self._ids_of, self._letters = sequence, ids_of, letters
        self._opens, self._closes = tags["<PocketS>"], tags["<PocketE>"]
        self._ends = tags["<ProteinE>"]
        self.start = (0, _TEXT if place is Place.TEXT else _TAGGED)

    def advance(self, place: tuple[int, int], token: int) -> tuple[int, int]:
        """Return the place after `token`."""
        done, where = place
        if token == self._opens:
            return done, _OPENED
        if token in (self._closes, self._ends):
            return done, _TAGGED
        if not self._letters[token]:
            return place  # a blank of the tokenizer's own
        return done + self._letters[token], _FILLED if where == _OPENED else _TEXT

    def guess(self, place: tuple[int, int], limit: int) -> list[int]:
        """Return at most `limit` ids that may come next."""
        done, where = place
        head: list[int] = []
        if where == _OPENED:
            head = self._ids_of(self._sequence[done : done + 1], Place.TAG)
            done, where = done + 1, _FILLED
        if where == _FILLED:
            head.append(self._closes)
            where = _TAGGED
        rest = self._sequence[done : done + limit * 8]
        tail = self._ids_of(rest, Place.TEXT if where == _TEXT else Place.TAG)
        if done + len(rest) == len(self._sequence):
            tail.append(self._ends)
        return (head + tail)[:limit]


class State:
    """A grammar at one place of one completion."""

    def __init__(
        self,
        matcher: LLMatcher,
        copy: Copy | None,
        place: tuple[int, int],
        writing: Writing | None = None,
    ) -> None:
        self._matcher = matcher
        self._copy = copy
        self._place = place
        self._writing = writing

    @property
    def filters(self) -> bool:
        """Whether a legal token must pass `allows` too."""
        return self._writing is not None

    def allows(self, token: int) -> bool:
        """Return whether the filter `valence` lets a legal token pass."""
        return self._writing is None or self._writing.allows(token)

    def mask(self, words: npt.NDArray[np.uint32]) -> None:
        """Write a bit for each legal id; all zero where there is none."""
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words[:] = 0

    def accept(self, token: int) -> None:
        """Go on by one id."""
        self._matcher.consume_token(token)
        if self._copy is not None:
            self._place = self._copy.advance(self._place, token)
        if self._writing is not None:
            self._writing.accept(token)

    def copy(self) -> State:
        """Return an independent state at the same place."""
        writing = None if self._writing is None else self._writing.copy()
        return State(self._matcher.deep_copy(), self._copy, self._place, writing)

    def guess(self, limit: int) -> list[int]:
        """Return legal ids that probably, or certainly, come next."""
        ids = self._copy.guess(self._place, limit) if self._copy else []
        ids = ids or self._matcher.compute_ff_tokens()[:limit]
        return ids[: self._matcher.validate_tokens(ids)] if ids else []


class Constraint:
    """A compiled grammar and the state of each row of a batch."""

    def __init__(
        self,
        start: LLMatcher,
        legal: npt.NDArray[np.bool_],
        copy: Copy | None = None,
        writing: Writing | None = None,
    ) -> None:
        self._start = start
        self._legal = legal
        self._copy = copy
        self._writing = writing
        self._rows: list[LLMatcher] = []
        self._words = np.empty((0, 0), dtype=np.uint32)

    def start(self) -> State:
        """Return the state of a completion of which nothing is written yet."""
        writing = None if self._writing is None else self._writing.copy()
        place = (0, 0) if self._copy is None else self._copy.start
        return State(self._start.deep_copy(), self._copy, place, writing)

    @property
    def filters(self) -> bool:
        """Whether it is more than a mask: only the engine can apply it then."""
        return self._writing is not None

    def legal_ids(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Turn masks uint32[rows, ...] into bool[rows, vocabulary], control tokens left out."""
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        allowed: npt.NDArray[np.bool_] = bits[:, : len(self._legal)].view(np.bool_) & self._legal
        return allowed

    def begin(self, rows: int) -> None:
        """Start `rows` completions."""
        self._rows = [self._start.deep_copy() for _ in range(rows)]
        self._words = np.empty((rows, mask_words(len(self._legal))), dtype=np.uint32)

    def legal(self) -> npt.NDArray[np.bool_]:
        """Return bool[rows, vocabulary]; a row without a legal token is a dead end."""
        words = self._words[: len(self._rows)]
        for matcher, row in zip(self._rows, words, strict=True):
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if matcher.is_error():
                row[:] = 0
        return self.legal_ids(words)

    def accept(self, ids: npt.NDArray[np.int64]) -> None:
        """Advance each row by its token."""
        for matcher, number in zip(self._rows, ids.tolist(), strict=True):
            matcher.consume_token(number)

    def move(self, moves: list[tuple[int, int]], rows: int) -> None:
        """Put rows in the place of others, (to, from) pairs, and keep the first `rows`."""
        for target, source in moves:
            self._rows[target] = self._rows[source]
        del self._rows[rows:]


class _Bridge:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary, facts: ModelFacts, tokens: list[bytes]) -> None:
        self.eos_token_id = facts.eos_ids[0]
        self.bos_token_id = facts.bos_id
        self.tokens = tokens
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._vocabulary.plain_ids(plain)


def mask_words(vocabulary: int) -> int:
    """Return how many words of 32 bits a mask has."""
    return -(-vocabulary // _WORD_BITS)


def _rule(letter: str) -> str:
    return f"r_{letter.lower()}"
