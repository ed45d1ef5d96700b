"""Grammars: which tokens are legal next, over the bytes of tokens (docs/design/science.md, 4).

`structure` fixes tags, their order and the alphabet inside them; `copy` fixes the whole completion
of a binding-site request: every residue of the input in order, bare or in a pocket pair, then the
end tag. Masks work on the bytes that tokens write, so they hold for any segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import TAG, Grammar, Segment
from airgap.inference.valence import Valence, Writing, open_text
from airgap.inference.vocabulary import Vocabulary

# What a SMILES may be written with (OpenSMILES, and `~` of its dialects); no `>`: a reaction has
# its own tags here. Brackets and valence are not its business.
_SMILES = r"SMILES: /[A-Za-z0-9@+\-\[\]()=#$%:.\/\\*~]+/"
_RESIDUE = "residue: /[A-Z]/"
_SITE = "site: residue | <PocketS> residue <PocketE>"
_MOLECULE = "molecule: <MoleculeS> SMILES <MoleculeE>"
_METAL = "metal: <MetalS> SMILES <MetalE>"
_STRUCTURES = {
    "retrosynthesis": ("molecule+", (_MOLECULE, _SMILES)),
    "molecule": ("SMILES <MoleculeE>", (_SMILES,)),
    "pocket-ligand": ("SMILES <MoleculeE>", (_SMILES,)),
    "material": ("metal+ molecule+ <MaterialE>", (_METAL, _MOLECULE, _SMILES)),
    "binding-site": ("site+ <ProteinE>", (_SITE, _RESIDUE)),
}
# The parser's own words hold the text that it parsed: never into a log.
_LIMITS = {"verbose_errors": False}
_WORD_BITS = 32


def lark_of(grammar: Grammar, *, continues: bool = False) -> str:
    """Return the Lark text of a grammar that is not `none`.

    Args:
        grammar: The request's.
        continues: The prompt ends inside a SMILES that the user began: the rest may be empty.

    """
    if grammar.mode == "copy":
        rules = [
            f'{_rule(letter)}: "{letter}" | <PocketS> "{letter}" <PocketE>'
            for letter in sorted(set(grammar.sequence))
        ]
        body = " ".join(_rule(letter) for letter in grammar.sequence)
        return "\n".join([f"start: {body} <ProteinE>", *rules, ""])
    start, parts = _STRUCTURES[grammar.task]
    if continues and start.startswith("SMILES "):
        start = start.replace("SMILES", "SMILES?", 1)
    return "\n".join([f"start: {start}", *parts, ""])


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
        continues = bool(prompt) and not prompt[-1].tag
        lark = lark_of(grammar, continues=continues)
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
            matcher, self._legal, self._copy_of(grammar), self._writing_of(grammar, prompt)
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

    def _copy_of(self, grammar: Grammar) -> Copy | None:
        if grammar.mode != "copy":
            return None
        sizes = [len(one) for one in self._bytes]
        return Copy(grammar.sequence, self._vocabulary.plain_ids, sizes=sizes, tags=self._tags)


class Copy:
    """Guesses how the exact copy of a sequence goes on: without a pocket, the likeliest way."""

    def __init__(
        self,
        sequence: str,
        ids_of: Callable[[str], list[int]],
        *,
        sizes: Sequence[int],
        tags: Mapping[str, int],
    ) -> None:
        """Take the sequence, the tokenizer, the bytes that each id writes, and the tags."""
        self._sequence, self._ids_of, self._sizes = sequence, ids_of, sizes
        self._opens, self._closes = tags["<PocketS>"], tags["<PocketE>"]
        self._ends = tags["<ProteinE>"]

    def advance(self, place: tuple[int, int], token: int) -> tuple[int, int]:
        """Return (residues written, 0 outside a pocket, 1 after its tag, 2 after its residue)."""
        done, pocket = place
        if token == self._opens:
            return done, 1
        if token in (self._closes, self._ends):
            return done, 0
        return done + self._sizes[token], 2 if pocket else 0

    def guess(self, place: tuple[int, int], limit: int) -> list[int]:
        """Return at most `limit` ids that may come next."""
        done, pocket = place
        head: list[int] = []
        if pocket == 1:
            head = self._ids_of(self._sequence[done : done + 1])
            done, pocket = done + 1, 2
        if pocket == 2:  # noqa: PLR2004 -- after the residue of a pocket
            head.append(self._closes)
        rest = self._sequence[done : done + limit * 8]
        tail = self._ids_of(rest)
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
        return State(self._start.deep_copy(), self._copy, (0, 0), writing)

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
