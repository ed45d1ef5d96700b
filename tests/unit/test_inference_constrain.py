"""Grammars: every completion they allow has the promised form, on both kinds of vocabulary."""

from __future__ import annotations

import re

import numpy as np
import pytest
from inference_models import SEQUENCE, byte_level, vocabulary

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Grammars, lark_of
from airgap.inference.protocol import TASKS, Grammar, Segment

SMILES = r"[A-Za-z0-9@+\-\[\]()=#$%:./\\*~]+"
MOLECULE = f"<MoleculeS>{SMILES}<MoleculeE>"
FORMS = {
    "retrosynthesis": f"({MOLECULE})+",
    "molecule": f"{SMILES}<MoleculeE>",
    "pocket-ligand": f"{SMILES}<MoleculeE>",
    "material": f"(<MetalS>{SMILES}<MetalE>)+({MOLECULE})+<MaterialE>",
    "binding-site": "([A-Z]|<PocketS>[A-Z]<PocketE>)+<ProteinE>",
}


def both():
    word = vocabulary()
    byte, _ = byte_level()
    return {"word level": word, "byte level": byte}


def wander(constraint, vocabulary, rng, limit=4000):
    """Walk at random through legal tokens, often to an end; return ids, end included."""
    facts = vocabulary._facts
    closing = [number for tag, number in facts.tags.items() if tag.endswith("E>")]
    constraint.begin(1)
    ids = []
    while len(ids) < limit:
        legal = np.flatnonzero(constraint.legal()[0])
        if not len(legal):
            return ids, "dead_end"
        ends = [n for n in legal if n in facts.eos_ids]
        shut = [n for n in legal if n in closing]
        pick = shut if shut and rng.random() < 0.3 else legal
        pick = ends if ends and rng.random() < 0.5 else pick
        ids.append(int(rng.choice(pick)))
        if ids[-1] in facts.eos_ids:
            return ids, "eos"
        constraint.accept(np.array(ids[-1:]))
    return ids, "length"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["word level", "byte level"])
def test_structure_allows_only_the_form_of_its_task(task, kind):
    vocabulary = both()[kind]
    grammars = Grammars(vocabulary, vocabulary._facts)
    constraint = grammars.compile(Grammar("structure", task), [Segment("<MoleculeS>", tag=True)])
    rng = np.random.default_rng(1)
    ended = 0
    for _ in range(30):
        ids, reason = wander(constraint, vocabulary, rng)
        text = vocabulary.decode(ids[:-1])
        assert reason in ("eos", "length")
        if reason == "eos":
            ended += 1
            assert re.fullmatch(FORMS[task], text), text
    assert ended > 20


@pytest.mark.parametrize("kind", ["word level", "byte level"])
def test_copy_allows_only_exact_copies(kind):
    vocabulary = both()[kind]
    grammars = Grammars(vocabulary, vocabulary._facts)
    constraint = grammars.compile(Grammar("copy", sequence=SEQUENCE), [])
    rng = np.random.default_rng(2)
    marked = 0
    for _ in range(50):
        ids, reason = wander(constraint, vocabulary, rng)
        text = vocabulary.decode(ids[:-1])
        assert reason == "eos"
        assert re.fullmatch(FORMS["binding-site"], text)
        assert re.sub("<Pocket[SE]>", "", text) == SEQUENCE + "<ProteinE>"
        marked += text.count("<PocketS>")
    assert marked > 50


def test_a_byte_vocabulary_copies_with_tokens_of_several_residues():
    vocabulary, _ = byte_level()
    grammars = Grammars(vocabulary, vocabulary._facts)
    constraint = grammars.compile(Grammar("copy", sequence="MKMKV"), [])
    constraint.begin(1)
    pair = vocabulary.plain_ids("MK")
    assert len(pair) == 1
    assert constraint.legal()[0, pair[0]]
    constraint.accept(np.array(pair))
    assert constraint.legal()[0, pair[0]]
    assert not constraint.legal()[0, vocabulary.plain_ids("K")[0]]


def test_a_residue_that_the_vocabulary_lacks_is_a_dead_end():
    vocabulary_ = vocabulary()
    constraint = Grammars(vocabulary_, vocabulary_._facts).compile(
        Grammar("copy", sequence="MJK"), []
    )
    assert b"J" not in vocabulary_.token_bytes()
    constraint.begin(2)
    assert constraint.legal().any(axis=1).tolist() == [True, True]
    constraint.accept(np.array([vocabulary_.plain_ids("M")[0]] * 2))
    assert constraint.legal().sum(axis=1).tolist() == [1, 1]  # the pocket tag, then nothing
    constraint.accept(np.array([vocabulary_._facts.tags["<PocketS>"]] * 2))
    assert constraint.legal().sum(axis=1).tolist() == [0, 0]


def test_control_tokens_are_never_legal():
    vocabulary_ = vocabulary()
    constraint = Grammars(vocabulary_, vocabulary_._facts).compile(
        Grammar("structure", "molecule"), []
    )
    constraint.begin(1)
    assert not constraint.legal()[0, :3].any()


def test_rows_move_with_their_state():
    vocabulary_ = vocabulary()
    constraint = Grammars(vocabulary_, vocabulary_._facts).compile(
        Grammar("copy", sequence="MKV"), []
    )
    ids = {letter: vocabulary_.plain_ids(letter)[0] for letter in "MKV"}
    pocket = vocabulary_._facts.tags["<PocketS>"]
    constraint.begin(3)
    constraint.accept(np.array([ids["M"], ids["M"], pocket]))
    constraint.move([(0, 2)], 2)
    legal = constraint.legal()
    assert np.flatnonzero(legal[0]).tolist() == [ids["M"]]
    assert np.flatnonzero(legal[1]).tolist() == sorted([pocket, ids["K"]])


def test_a_prompt_inside_a_smiles_may_end_at_once():
    vocabulary_ = vocabulary()
    grammars = Grammars(vocabulary_, vocabulary_._facts)
    end = vocabulary_._facts.tags["<MoleculeE>"]
    for last, expected in ((Segment("CC"), True), (Segment("<MoleculeS>", tag=True), False)):
        constraint = grammars.compile(Grammar("structure", "molecule"), [last])
        constraint.begin(1)
        assert bool(constraint.legal()[0, end]) is expected


def test_mode_none_constrains_nothing():
    vocabulary_ = vocabulary()
    assert Grammars(vocabulary_, vocabulary_._facts).compile(Grammar(), []) is None


def test_a_model_without_the_tags_of_a_grammar_is_refused():
    facts = vocabulary()._facts
    tags = {tag: number for tag, number in facts.tags.items() if tag != "<PocketS>"}
    poor = vocabulary(tags=tags)
    grammars = Grammars(poor, poor._facts)
    assert grammars.compile(Grammar("structure", "molecule"), [])
    with pytest.raises(ProgramError, match="<PocketS>") as caught:
        grammars.compile(Grammar("copy", sequence="MK"), [])
    assert caught.value.code == "model.tags"


def test_a_grammar_that_does_not_compile_is_refused():
    vocabulary_ = vocabulary()
    grammars = Grammars(vocabulary_, vocabulary_._facts)
    assert grammars.compile(Grammar("copy", sequence="MKV" * 1000), [])
    with pytest.raises(ProgramError) as caught:
        grammars.compile(Grammar("copy", sequence='"'), [])
    assert caught.value.code == "model.grammar"
    assert '"' not in caught.value.message


def test_one_rule_a_letter_keeps_long_copies_small():
    lark = lark_of(Grammar("copy", sequence="MKMK"))
    assert lark.splitlines() == [
        "start: r_m r_k r_m r_k <ProteinE>",
        'r_k: "K" | <PocketS> "K" <PocketE>',
        'r_m: "M" | <PocketS> "M" <PocketE>',
    ]
