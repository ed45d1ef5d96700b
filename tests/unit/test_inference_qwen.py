"""Grammars on the real vocabulary of Qwen: its tokens hold several residues and halves of atoms."""

import functools
import re

import hypothesis.strategies as st
import inference_models as models
import numpy as np
import pytest
import qwen
import regex
from hypothesis import given, settings

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Grammars, mask_words
from airgap.inference.engine import Engine
from airgap.inference.model import load_model
from airgap.inference.protocol import Generate, Grammar, Sample, Segment, segments_of
from airgap.inference.valence import Valence

SMILES = "CC(=O)Nc1ccc(OCc2ccccc2)cc1C[N+](C)(C)C[C@@H](N)C(=O)[O-]"
COPY = Grammar("copy", "", models.SEQUENCE)
# A completion of each grammar, and one that differs in a single place.
COMPLETIONS = {
    "retrosynthesis": (
        f"<MoleculeS>{SMILES}<MoleculeE><MoleculeS>CCBr<MoleculeE>",
        f"<MoleculeS>{SMILES}<MoleculeE><MetalS>CCBr<MetalE>",
    ),
    "molecule": (f"{SMILES}<MoleculeE>", f"{SMILES} <MoleculeE>"),
    "pocket-ligand": (f"{SMILES}<MoleculeE>", f"{SMILES}<ProteinE>"),
    "material": (
        "<MetalS>[Zn][O]<MetalE><MoleculeS>OC(=O)c1ccc(cc1)C(=O)O<MoleculeE><MaterialE>",
        "<MetalS>[Zn][O]<MetalE><MaterialE>",
    ),
    "binding-site": ("MKN<PocketS>A<PocketE>CDE<ProteinE>", "MKN<PocketS>AC<PocketE>DE<ProteinE>"),
}


@functools.cache
def grammars():
    vocabulary = qwen.vocabulary()
    return Grammars(vocabulary, vocabulary._facts, Valence())


@functools.cache
def small_grammars():
    vocabulary = models.vocabulary()
    return Grammars(vocabulary, vocabulary._facts)


def accepts(which, grammar, text):
    """Say whether a whole completion and the end of the text are legal, token by token."""
    vocabulary = which._vocabulary
    facts = vocabulary._facts
    prompt = [Segment("<MoleculeS>", tag=True)]
    constraint = which.compile(grammar, prompt)
    constraint.begin(1)
    for token in [*vocabulary.encode(segments_of(text), after=prompt), facts.eos_ids[0]]:
        if not constraint.legal()[0, token]:
            return False
        constraint.accept(np.array([token]))
    return True


@pytest.mark.parametrize("task", COMPLETIONS)
def test_both_vocabularies_take_and_refuse_the_same_completions(task):
    good, bad = COMPLETIONS[task]
    for which in (grammars(), small_grammars()):
        assert accepts(which, Grammar("structure", task), good)
    refused = [accepts(grammars(), Grammar("structure", task), bad)]
    if " " not in bad:  # the small vocabulary has no blank at all
        refused.append(accepts(small_grammars(), Grammar("structure", task), bad))
    assert not any(refused)


@settings(max_examples=6)
@given(st.lists(st.booleans(), min_size=len(models.SEQUENCE), max_size=len(models.SEQUENCE)))
def test_both_take_every_marking_of_a_copy_and_no_slip(marks):
    letters = [
        f"<PocketS>{letter}<PocketE>" if marked else letter
        for letter, marked in zip(models.SEQUENCE, marks, strict=True)
    ]
    text = "".join(letters) + "<ProteinE>"
    slips = (text.replace("K", "R", 1), text.replace("W", "WW", 1), "".join(letters[:-1]))
    for which in (grammars(), small_grammars()):
        assert accepts(which, COPY, text)
        for slip in slips:
            assert not accepts(which, COPY, slip)


@settings(max_examples=60)
@given(st.text(alphabet="ACDEFGHIKLMNPQRSTVWYcnos()[]=#-+@/\\%0123456789.Brl ", max_size=60))
def test_the_fixture_cuts_texts_as_the_published_table_does(text):
    vocabulary = qwen.vocabulary()
    expected = [
        number for piece in regex.findall(qwen.CUT, text) for number in qwen.merged(piece.encode())
    ]
    assert vocabulary.plain_ids(text) == expected
    assert vocabulary.decode(expected) == text
    assert b"".join(qwen.spelled()[n] for n in expected) == text.encode()


def test_tokens_hold_several_residues_and_end_inside_atoms():
    vocabulary = qwen.vocabulary()
    assert len(qwen.spelled()) == qwen.SIZE == 151_660
    assert len(vocabulary.plain_ids(models.SEQUENCE)) < len(models.SEQUENCE)
    pieces = [qwen.spelled()[n].decode() for n in vocabulary.plain_ids(SMILES)]
    assert len(pieces) < len(SMILES)
    assert any(piece.count("[") != piece.count("]") for piece in pieces)


def test_a_mask_has_a_bit_for_each_of_151_660_ids_and_none_for_a_forged_tag():
    constraint = grammars().compile(Grammar("structure", "molecule"), [])
    words = np.zeros((1, mask_words(qwen.SIZE)), dtype=np.uint32)
    assert words.nbytes == 18_960
    constraint.start().mask(words[0])
    legal = constraint.legal_ids(words)[0]
    spelled = qwen.spelled()
    alphabet = re.compile(rb"[A-Za-z0-9@+\-\[\]()=#$%:.\/\\*~]+")
    assert legal.sum() > 10_000
    for number in np.flatnonzero(legal):
        assert alphabet.fullmatch(spelled[number]), spelled[number]
    text = Segment("CC<MoleculeE>")
    assert set(qwen.vocabulary().encode([text])).isdisjoint(qwen.vocabulary().special_ids)


def test_a_copy_is_guessed_in_tokens_of_several_residues():
    sequence = models.SEQUENCE * 12
    state = grammars().compile(Grammar("copy", "", sequence), []).start()
    written, tokens, guesses = b"", 0, 0
    spelled = qwen.spelled()
    while not written.endswith(b"<ProteinE>"):
        guess = state.guess(64)
        assert guess
        guesses += 1
        for token in guess:
            state.accept(token)
            written += spelled[token]
        tokens += len(guess)
    assert written == sequence.encode() + b"<ProteinE>"
    assert tokens < 0.8 * len(sequence)
    assert guesses < tokens / 10


def test_the_filter_reads_bytes_and_not_tokens():
    prompt = segments_of("<MoleculeS>C(F)(F)(F)")
    state = grammars().compile(Grammar("structure", "molecule", valence=True), prompt).start()
    ranks = qwen.ranks()
    verdict = {text: state.allows(ranks[text]) for text in (b"CC", b"FF", b"Br", b"(C", b"=C")}
    # One bond is left: a branch would need a fifth one after it, and fluorine has but one.
    assert verdict == {b"CC": True, b"FF": False, b"Br": True, b"(C": False, b"=C": False}


@pytest.mark.soak
def test_a_model_with_this_vocabulary_writes_what_the_grammar_says(tmp_path):
    model = load_model(qwen.write_model(tmp_path), precision="fp32", demand="cpu", threads=1)
    found = {}

    def emit(event):
        if isinstance(event, Sample):
            found[event.index] = event

    search = f"<ProteinS>{models.SEQUENCE}<ProteinE><Search><ProteinS>"
    for prompt, grammar in (
        ("<MoleculeS>", Grammar("structure", "molecule")),
        ("<MoleculeS>", Grammar("structure", "molecule", valence=True)),
        (search, COPY),
    ):
        request = Generate(
            prompt=segments_of(prompt),
            n=2,
            max_new_tokens=3 * len(models.SEQUENCE) + 1,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            seed=3,
            stop=("<MoleculeE>", "<ProteinE>"),
            grammar=grammar,
        )
        engine = Engine(model, budget=1 << 30, most_rows=4)
        engine.generate(request, grammars().compile(grammar, request.prompt), emit)
        for sample in found.values():
            if grammar is COPY:
                assert sample.finish_reason == "stop"
                plain = re.sub("<Pocket[SE]>", "", sample.text)
                assert plain == f"{models.SEQUENCE}<ProteinE>"
            else:
                assert re.fullmatch(r"[A-Za-z0-9@+\-\[\]()=#$%:./\\*~]*(<MoleculeE>)?", sample.text)
    with pytest.raises(ProgramError):
        load_model(tmp_path, precision="fp32", demand="cuda", threads=1)
