"""What a grammar costs: the trie once, the compilation a request, the mask a token.

Obeys docs/design/inference.md, 7 and science.md, 4, on the vocabulary of the reference model and on
the real one of Qwen (151,643 byte strings and our tags). There is no peer: the required figure
stands in its place, and the conditions hold the median of each part.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import Context, Result, alone

TESTS = Path(__file__).resolve().parents[1] / "tests"
MASK_MS = 1.0  # a token and row; the design measured up to 0.97
SMILES = "CC(=O)Nc1ccc(OCc2ccccc2)cc1C[N+](C)(C)C[C@@H](N)C(=O)[O-]"
RESIDUES = ("MKVLATGEDRSTNQHPFYWIC" * 15)[:300]


def run(context: Context) -> list[Result]:
    """Measure structure, copy and valence on both vocabularies."""
    sys.path.insert(0, str(TESTS))
    import inference_models
    import qwen

    found = []
    for name, read in (("reference", inference_models.vocabulary), ("qwen", qwen.vocabulary)):
        context.step(f"{name}: building the trie")
        found += measured(context, name, read())
    return found


def measured(context: Context, name: str, vocabulary: Any) -> list[Result]:
    """Return the cost of a token with each kind of grammar."""
    from airgap.inference.constrain import Grammars, mask_words
    from airgap.inference.protocol import Grammar, segments_of
    from airgap.inference.valence import Valence

    facts = vocabulary._facts  # noqa: SLF001 - both vocabularies are those of the tests
    begun = time.perf_counter()
    grammars = Grammars(vocabulary, facts, Valence())
    trie_s = time.perf_counter() - begun
    words = np.zeros((1, mask_words(facts.vocab_size)), dtype=np.uint32)
    retro = f"<MoleculeS>{SMILES}<MoleculeE>" * 4
    cases = {
        "structure": (Grammar("structure", "retrosynthesis"), retro),
        "copy": (Grammar("copy", "", RESIDUES), f"{RESIDUES}<ProteinE>"),
        "valence": (Grammar("structure", "retrosynthesis", valence=True), retro),
    }
    found = []
    for kind, (grammar, text) in cases.items():
        context.step(f"{name}: {kind}")
        ids = vocabulary.encode(segments_of(text))
        compiled: list[float] = []

        def once(grammar: Any = grammar, ids: Any = ids, compiled: Any = compiled) -> float:
            start = time.perf_counter()
            constraint = grammars.compile(grammar, [])
            compiled.append(1000 * (time.perf_counter() - start))
            state = constraint.start()
            start = time.perf_counter()
            for token in ids:
                state.mask(words[0])
                constraint.legal_ids(words)
                state.allows(token)
                state.accept(token)
            return 1000 * (time.perf_counter() - start) / len(ids)

        pair = alone(once, MASK_MS, context.runs)
        found.append(
            pair.lower_is_better(
                f"{name}.{kind}.mask",
                unit="ms/token",
                target=1.0,
                vocabulary=facts.vocab_size,
                tokens=len(ids),
                trie_s=round(trie_s, 3),
                compile_ms=round(statistics.median(compiled), 3),
                peer_is="the required figure: a mask, its bits and the filter within a millisecond",
            )
        )
    return found


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
