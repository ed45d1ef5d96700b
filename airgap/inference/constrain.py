"""Grammars: which tokens are legal next, over the bytes of tokens (docs/design/science.md, 4).

`structure` fixes tags, their order and the alphabet inside them; `copy` fixes the whole completion
of a binding-site request: every residue of the input in order, bare or in a pocket pair, then the
end tag. Masks work on the bytes that tokens write, so they hold for any segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import TAG, Grammar, Segment
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

    def __init__(self, vocabulary: Vocabulary, facts: ModelFacts) -> None:
        """Build the trie; ProgramError `model.grammar` where the bytes of tokens are not known."""
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Bridge(vocabulary, facts)), eos_token=list(facts.eos_ids), slices=[]
        )
        self._size = facts.vocab_size
        self._tags = facts.tags
        # llguidance may offer the unknown token where nothing fits: control tokens are never legal.
        control = {facts.bos_id, facts.pad_id, facts.unk_id} - set(facts.eos_ids)
        self._legal = np.ones(facts.vocab_size, dtype=np.bool_)
        self._legal[[number for number in control if number is not None]] = False

    def compile(self, grammar: Grammar, prompt: Sequence[Segment]) -> Constraint | None:
        """Return the constraint of a request, None for mode `none`.

        Raises:
            ProgramError: `model.tags`, the model lacks a tag of this grammar; `model.grammar`.

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
        return Constraint(matcher, self._legal)


class Constraint:
    """A compiled grammar and the state of each row of a batch."""

    def __init__(self, start: LLMatcher, legal: npt.NDArray[np.bool_]) -> None:
        self._start = start
        self._legal = legal
        self._rows: list[LLMatcher] = []
        self._words = np.empty((0, 0), dtype=np.uint32)

    def begin(self, rows: int) -> None:
        """Start `rows` completions."""
        self._rows = [self._start.deep_copy() for _ in range(rows)]
        width = -(-len(self._legal) // _WORD_BITS)
        self._words = np.empty((rows, width), dtype=np.uint32)

    def legal(self) -> npt.NDArray[np.bool_]:
        """Return bool[rows, vocabulary]; a row without a legal token is a dead end."""
        words = self._words[: len(self._rows)]
        for matcher, row in zip(self._rows, words, strict=True):
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if matcher.is_error():
                row[:] = 0
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        allowed: npt.NDArray[np.bool_] = bits[:, : len(self._legal)].view(np.bool_) & self._legal
        return allowed

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

    def __init__(self, vocabulary: Vocabulary, facts: ModelFacts) -> None:
        self.eos_token_id = facts.eos_ids[0]
        self.bos_token_id = facts.bos_id
        self.tokens = vocabulary.token_bytes()
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._vocabulary.plain_ids(plain)


def _rule(letter: str) -> str:
    return f"r_{letter.lower()}"
