"""Grammars on the real vocabulary of Mixtral: blanks of the tokenizer's own, and tokens of a byte.

In both spellings that releases have: a blank before each text, also after a tag, and a blank before
the first text alone.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import hypothesis.strategies as st
import inference_models as models
import mixtral
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from test_inference_constrain import FORMS, wander
from test_inference_qwen import COMPLETIONS, COPY, SMILES, accepts

from airgap.enclave.channel import ProgramError
from airgap.inference.authors import authors_ids
from airgap.inference.constrain import Grammars
from airgap.inference.engine import Engine
from airgap.inference.model import load_model
from airgap.inference.program import create
from airgap.inference.protocol import (
    TASKS,
    Generate,
    Grammar,
    Sample,
    Score,
    Segment,
    parse_event,
    segments_of,
    tagged_of,
)
from airgap.inference.valence import Valence, Writing
from airgap.inference.vocabulary import Place, Vocabulary
from bundle.staging.prompts import load_prompts

KINDS = pytest.mark.parametrize("kind", mixtral.KINDS)
EACH = mixtral.EACH
TAG = st.sampled_from(tiny_llama.TAGS).map(lambda tag: Segment(tag, tag=True))
CHEMICAL = st.text("ACDEFGHIKLMNPQRSTVWYcnos()[]=#-+@/\\%0123456789.Brl", min_size=1, max_size=30)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20)


@functools.cache
def grammars(kind):
    vocabulary = mixtral.vocabulary(kind)
    return Grammars(vocabulary, vocabulary._facts, Valence())


@functools.cache
def whole_tokenizer(kind):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(mixtral.tokenizer_json(kind).decode())


def pieces(kind, ids):
    return [whole_tokenizer(kind).id_to_token(number) for number in ids]


# -- texts and ids --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.one_of(CHEMICAL, ANY))
def test_the_fixture_cuts_texts_as_sentencepiece_does(text):
    # Of several pairs with one score (only those of a lone blank) the order is not fixed.
    for kind in mixtral.KINDS:
        found = pieces(kind, mixtral.vocabulary(kind).plain_ids(text))
        assert found == mixtral.merged(text)


@KINDS
def test_each_id_has_the_bytes_that_the_tokenizer_decodes_inside_a_text(kind):
    tokenizer, spelled = whole_tokenizer(kind), mixtral.spelled(kind)
    special = mixtral.vocabulary(kind).special_ids
    (letter,) = mixtral.vocabulary(kind).plain_ids("x")
    alone = 0
    for number in range(mixtral.SIZE):
        if number in special:
            continue
        written = tokenizer.decode([letter, number, letter], skip_special_tokens=False)
        if written == "x\N{REPLACEMENT CHARACTER}x" and len(spelled[number]) == 1:
            alone += 1  # half a character: the next test puts them together
            continue
        assert written.encode() == b"x" + spelled[number] + b"x", number
    assert alone == 128
    assert [spelled[3 + byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]


@settings(max_examples=60)
@given(ANY)
def test_bytes_of_tokens_are_those_of_the_text(text):
    for kind in mixtral.KINDS:
        vocabulary, spelled = mixtral.vocabulary(kind), mixtral.spelled(kind)
        ids = vocabulary.plain_ids(text)
        assert b"".join(spelled[number] for number in ids) == text.encode()
        assert vocabulary.continuation(ids, [Segment("x")]) == text


@KINDS
@pytest.mark.parametrize("prompt", load_prompts()[0], ids=lambda prompt: prompt.kind)
def test_prompts_have_the_ids_that_the_publishers_tokenizer_gives_the_whole_text(kind, prompt):
    vocabulary = mixtral.vocabulary(kind)
    segments = segments_of(prompt.text)
    ids = vocabulary.encode(segments)
    assert [mixtral.facts(kind).bos_id, *ids] == whole_tokenizer(kind).encode(prompt.text).ids
    assert vocabulary.continuation(ids) == prompt.text


@settings(max_examples=80)
@given(st.lists(st.one_of(TAG, CHEMICAL.map(Segment)), min_size=1, max_size=8), st.data())
def test_texts_survive_wherever_they_are_cut(segments, data):
    kind = data.draw(st.sampled_from(mixtral.KINDS))
    vocabulary, text = mixtral.vocabulary(kind), tagged_of(segments)
    ids = vocabulary.encode(segments)
    assert ids == whole_tokenizer(kind).encode(text, add_special_tokens=False).ids
    assert vocabulary.continuation(ids) == text
    at = data.draw(st.integers(0, len(text)))
    if text[:at].count("<") == text[:at].count(">"):  # not inside a tag
        before, rest = segments_of(text[:at]), segments_of(text[at:])
        more = vocabulary.encode(rest, after=before)
        assert vocabulary.continuation(more, before) == text[at:]
        assert vocabulary.continuation([*vocabulary.encode(before), *more]) == text


def test_the_two_spellings_differ_after_a_tag_and_nowhere_else():
    prompt = segments_of("<MoleculeS>CCO")
    each, first = (mixtral.vocabulary(kind).encode(prompt) for kind in mixtral.KINDS)
    assert pieces(EACH, each)[1].startswith("▁C")
    assert pieces(EACH, first)[1].startswith("C")
    for kind in mixtral.KINDS:
        vocabulary = mixtral.vocabulary(kind)
        assert pieces(kind, vocabulary.encode([Segment("CCO")]))[0].startswith("▁C")
        assert pieces(kind, vocabulary.encode([Segment("O")], after=prompt)) == ["O"]
        assert vocabulary.encode([Segment("CC"), Segment(""), Segment("O")]) == vocabulary.encode(
            [Segment("CCO")]
        )


@KINDS
def test_what_a_sample_writes_is_read_as_a_continuation(kind):
    vocabulary = mixtral.vocabulary(kind)
    words = vocabulary.plain_ids(" world")
    assert vocabulary.decode(words) == "world"  # the publisher's decoder takes it for a beginning
    assert vocabulary.continuation(words, [Segment("hello")]) == " world"
    two = vocabulary.plain_ids("  world")
    after_tag = vocabulary.continuation(two, [Segment("<MoleculeS>", tag=True)])
    assert after_tag == (" world" if kind == EACH else "  world")
    assert vocabulary.continuation([], [Segment("C")]) == ""


@KINDS
def test_a_text_that_spells_a_tag_or_an_end_stays_letters(kind):
    vocabulary = mixtral.vocabulary(kind)
    for text in ("CC<MoleculeE>", "</s>", "<unk>", "<0x41>"):
        ids = vocabulary.encode([Segment(text)])
        assert not set(ids) & vocabulary.special_ids
        assert vocabulary.continuation(ids) == text


def test_a_letter_without_a_piece_and_without_its_bytes_is_refused_with_its_place():
    def few_bytes(document):
        words = document["model"]["vocab"]
        for byte in range(256):
            words[f"[gone {byte}]"] = words.pop(f"<0x{byte:02X}>")

    vocabulary = mixtral.changed(EACH, few_bytes)
    assert vocabulary.encode(segments_of("<MoleculeS>CC"))
    with pytest.raises(ProgramError, match=r"no token for '\U0001f9ea' \(character 13 ") as caught:
        vocabulary.encode(segments_of("<MoleculeS>CC\N{TEST TUBE}C"))
    assert caught.value.code == "prompt.g11"


def test_the_authors_perplexity_has_the_ids_of_their_library():
    from transformers import PreTrainedTokenizerFast

    for kind in mixtral.KINDS:
        vocabulary, facts = mixtral.vocabulary(kind), mixtral.facts(kind)
        library = PreTrainedTokenizerFast(tokenizer_object=whole_tokenizer(kind))
        ids = [1, *vocabulary.encode(segments_of("<MoleculeS>CCO<MoleculeE><ReverseReact>")), 2]
        text = library.decode(ids, skip_special_tokens=False)
        assert authors_ids(vocabulary, facts, ids) == library(text)["input_ids"]


# -- what cannot be known is refused --------------------------------------------------------------


def steps(*decoders):
    def change(document):
        document["decoder"] = {"type": "Sequence", "decoders": list(decoders)}

    return change


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
KNOWN = {
    "as released": (REPLACE, FALLBACK, FUSE, STRIP),
    "without a strip": (REPLACE, FALLBACK, FUSE),
    "nested": ({"type": "Sequence", "decoders": [REPLACE]}, FALLBACK, FUSE),
}
UNKNOWN = {
    "a strip of each token": (REPLACE, FALLBACK, STRIP, FUSE),
    "a strip of the end": (REPLACE, FALLBACK, FUSE, {**STRIP, "stop": 1}),
    "a strip of letters": (REPLACE, FALLBACK, FUSE, {**STRIP, "content": "C"}),
    "a pattern": ({**REPLACE, "pattern": {"Regex": "▁"}}, FALLBACK, FUSE),
    "bytes before blanks": (FALLBACK, REPLACE, FUSE),
    "blanks after all": (FALLBACK, FUSE, REPLACE),
    "byte letters too": (REPLACE, BYTES, FUSE),
    "another step": (REPLACE, FALLBACK, FUSE, {"type": "CTC", "pad_token": "p",
                     "word_delimiter_token": "|", "cleanup": False}),
}  # fmt: skip


@pytest.mark.parametrize("decoders", KNOWN.values(), ids=KNOWN)
def test_decoders_of_this_family_are_known(decoders):
    found = mixtral.changed(EACH, steps(*decoders)).token_bytes()
    assert found == mixtral.spelled(EACH)


@pytest.mark.parametrize("decoders", UNKNOWN.values(), ids=UNKNOWN)
def test_bytes_of_other_decoders_are_not_guessed(decoders):
    with pytest.raises(ProgramError) as caught:
        mixtral.changed(EACH, steps(*decoders)).token_bytes()
    assert caught.value.code == "model.grammar"


def no_blank_back(document):
    document["decoder"]["decoders"].remove(REPLACE)


def another_mark(document):
    document["normalizer"]["normalizers"][0]["prepend"] = "#"


def tags_after_normalization(document):
    for token in document["added_tokens"]:
        token["normalized"] = True


def small_letters(document):
    document["normalizer"]["normalizers"].append({"type": "Lowercase"})


UNFIT = {
    "blanks stay marks": no_blank_back,
    "another letter before a text": another_mark,
    "tags are looked for too late": tags_after_normalization,
    "letters become small": small_letters,
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_tokenizer_that_spells_texts_with_tags_otherwise_is_refused(change):
    mixtral.changed(EACH, lambda _document: None)
    with pytest.raises(ProgramError) as caught:
        mixtral.changed(EACH, change)
    assert caught.value.code == "model.tokenizer"


# -- grammars -------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("task", COMPLETIONS)
def test_it_takes_and_refuses_what_the_other_vocabularies_do(kind, task):
    good, bad = COMPLETIONS[task]
    assert accepts(grammars(kind), Grammar("structure", task), good)
    assert not accepts(grammars(kind), Grammar("structure", task), bad)


def accepted(kind, grammar, prompt, ids):
    constraint = grammars(kind).compile(grammar, prompt)
    constraint.begin(1)
    for token in ids:
        if not constraint.legal()[0, token]:
            return False
        constraint.accept(np.array([token]))
    return True


@KINDS
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompt", ["<MoleculeS>", ""], ids=["after a tag", "at the start"])
def test_structure_allows_only_the_form_of_its_task(kind, task, prompt):
    vocabulary, before = mixtral.vocabulary(kind), segments_of(prompt)
    constraint = grammars(kind).compile(Grammar("structure", task), before)
    rng = np.random.default_rng(1)
    ended = 0
    for _ in range(10):
        ids, reason = wander(constraint, vocabulary, rng)
        assert reason in ("eos", "length")
        if reason == "length":
            continue
        ended += 1
        text = vocabulary.continuation(ids[:-1], before)
        assert re.fullmatch(FORMS[task], text), text
        # The publisher's decoder says the same, but for its own blanks after tags.
        assert re.sub("(^|>) ", r"\1", vocabulary.decode(ids[:-1])) == text
        again = vocabulary.encode(segments_of(text), after=before)
        assert accepted(kind, Grammar("structure", task), before, [*again, ids[-1]])
    assert ended > 5


@KINDS
def test_copy_allows_only_exact_copies(kind):
    vocabulary, before = mixtral.vocabulary(kind), segments_of(models.SEARCH)
    constraint = grammars(kind).compile(COPY, before)
    rng = np.random.default_rng(2)
    marked = 0
    for _ in range(40):
        ids, reason = wander(constraint, vocabulary, rng)
        text = vocabulary.continuation(ids[:-1], before)
        assert reason == "eos"
        assert re.fullmatch(FORMS["binding-site"], text)
        assert re.sub("<Pocket[SE]>", "", text) == models.SEQUENCE + "<ProteinE>"
        again = vocabulary.encode(segments_of(text), after=before)
        assert accepted(kind, COPY, before, [*again, ids[-1]])
        marked += text.count("<PocketS>")
    assert marked > 40


@settings(max_examples=10)
@given(st.lists(st.booleans(), min_size=len(models.SEQUENCE), max_size=len(models.SEQUENCE)))
def test_every_marking_of_a_copy_is_taken_and_no_slip(marks):
    letters = [
        f"<PocketS>{letter}<PocketE>" if marked else letter
        for letter, marked in zip(models.SEQUENCE, marks, strict=True)
    ]
    text = "".join(letters) + "<ProteinE>"
    for kind in mixtral.KINDS:
        assert accepts(grammars(kind), COPY, text)
        for slip in (text.replace("K", "R", 1), text.replace("W", "WW", 1), "".join(letters[:-1])):
            assert not accepts(grammars(kind), COPY, slip)


@KINDS
@pytest.mark.parametrize("task", ["molecule", "binding-site"])
def test_a_blank_stands_only_where_the_tokenizer_puts_it(kind, task):
    vocabulary = mixtral.vocabulary(kind)
    tag, text = [Segment("<MoleculeS>", tag=True)], segments_of("<MoleculeS>CC")
    letters, blanks = vocabulary.plain_ids("C"), vocabulary.plain_ids("C", Place.START)
    (blank,) = vocabulary.plain_ids(" ")
    grammar = Grammar("structure", task)
    for before, legal in ((tag, kind == EACH), (text, False), ([], True)):
        assert accepted(kind, grammar, before, letters)
        assert accepted(kind, grammar, before, blanks) is legal
        assert accepted(kind, grammar, before, [blank, *letters]) is legal
        assert not accepted(kind, grammar, before, [blank, *blanks])
        assert not accepted(kind, grammar, before, [*letters, *blanks])


@KINDS
def test_a_token_of_a_byte_is_as_good_as_the_letter(kind):
    vocabulary, before = mixtral.vocabulary(kind), [Segment("<MoleculeS>", tag=True)]
    byte = whole_tokenizer(kind).token_to_id("<0x43>")
    end = mixtral.facts(kind).tags["<MoleculeE>"]
    assert accepted(kind, Grammar("structure", "molecule"), before, [byte, byte, end])
    assert vocabulary.continuation([byte, byte, end], before) == "CC<MoleculeE>"
    snow = [whole_tokenizer(kind).token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    assert not accepted(kind, Grammar("structure", "molecule"), before, snow[:1])
    assert vocabulary.continuation(snow, before) == "é"


@KINDS
def test_no_control_token_and_no_row_beyond_the_pieces_is_ever_legal(kind):
    facts = replace(mixtral.facts(kind), vocab_size=mixtral.SIZE + 48)
    vocabulary = Vocabulary(mixtral.tokenizer_json(kind), facts)
    constraint = Grammars(vocabulary, facts).compile(Grammar("structure", "molecule"), [])
    constraint.begin(1)
    legal = constraint.legal()[0]
    assert legal.shape == (mixtral.SIZE + 48,)
    assert legal.sum() > 2_000
    assert not legal[:3].any()
    assert not legal[mixtral.SIZE :].any()


@KINDS
def test_a_copy_is_guessed_in_tokens_of_several_residues(kind):
    sequence = models.SEQUENCE * 12
    vocabulary, before = mixtral.vocabulary(kind), segments_of(models.SEARCH)
    state = grammars(kind).compile(Grammar("copy", "", sequence), before).start()
    ids, guesses = [], 0
    while vocabulary.continuation(ids, before) != f"{sequence}<ProteinE>":
        guess = state.guess(64)
        assert guess
        guesses += 1
        for token in guess:
            state.accept(token)
        ids += guess
    assert len(ids) < 0.8 * len(sequence)
    assert guesses < len(ids) / 10
    canonical = vocabulary.encode([Segment(sequence)], after=before)
    assert ids[: len(canonical) // 2] == canonical[: len(canonical) // 2]


@KINDS
def test_a_copy_is_guessed_through_pockets(kind):
    facts, vocabulary = mixtral.facts(kind), mixtral.vocabulary(kind)
    before = segments_of(models.SEARCH)
    state = grammars(kind).compile(Grammar("copy", "", "MKNACDEFGHIKLMN"), before).start()
    opens, closes = facts.tags["<PocketS>"], facts.tags["<PocketE>"]
    state.accept(opens)
    ids = [opens]
    if kind == EACH:  # the blank as a token of its own, which no guess foresees
        (blank,) = vocabulary.plain_ids(" ")
        copy = state.copy()
        copy.accept(blank)
        copy.accept(vocabulary.plain_ids("M")[0])
        assert copy.guess(3)[0] == closes
    guess = state.guess(64)
    assert guess[1] == closes
    ids += guess
    assert vocabulary.continuation(ids, before) == "<PocketS>M<PocketE>KNACDEFGHIKLMN<ProteinE>"
    assert ids == vocabulary.encode(
        segments_of("<PocketS>M<PocketE>KNACDEFGHIKLMN<ProteinE>"), after=before
    )


@KINDS
def test_a_forced_tag_is_known_at_once(kind):
    before = segments_of("<MaterialS>")
    state = grammars(kind).compile(Grammar("structure", "material"), before).start()
    assert state.guess(8) == [mixtral.facts(kind).tags["<MetalS>"]]


@KINDS
def test_the_filter_reads_letters_and_not_blanks(kind):
    vocabulary = mixtral.vocabulary(kind)
    grammar = Grammar("structure", "molecule", valence=True)
    state = grammars(kind).compile(grammar, segments_of("<MoleculeS>")).start()
    place = Place.TAG
    for text in ("C(F)(F)(F)", "F"):
        for token in vocabulary.plain_ids(text, place):
            assert state.allows(token)
            state.accept(token)
        place = Place.TEXT
    assert not state.allows(vocabulary.plain_ids("C")[0])
    assert state.allows(mixtral.facts(kind).tags["<MoleculeE>"])
    (blank,) = vocabulary.plain_ids(" ")
    writing = Writing(Valence(), mixtral.facts(kind).tags, mixtral.spelled(kind), "")
    assert writing.allows(blank)
    writing.accept(blank)
    assert writing.text == ""


# -- in the engine and in the program -------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("mixtral")
    return {kind: mixtral.write_model(base / kind, kind) for kind in mixtral.KINDS}


def ask(prompt, grammar, **change):
    settings = {
        "n": 3,
        "max_new_tokens": 60,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "seed": 3,
        "stop": ("<MoleculeE>", "<ProteinE>", "<MaterialE>"),
    }
    return Generate(prompt=segments_of(prompt), grammar=grammar, **{**settings, **change})


LETTERS = r"[A-Za-z0-9@+\-\[\]()=#$%:./\\*~]*"
ASKED = {
    "molecule": ("<MoleculeS>", Grammar("structure", "molecule"), f"{LETTERS}(<MoleculeE>)?"),
    "begun": ("<MoleculeS>CC(", Grammar("structure", "molecule"), f"{LETTERS}(<MoleculeE>)?"),
    "valence": (
        "<MoleculeS>",
        Grammar("structure", "molecule", valence=True),
        f"{LETTERS}(<MoleculeE>)?",
    ),
    "retrosynthesis": (
        models.RETRO,
        Grammar("structure", "retrosynthesis"),
        f"<MoleculeS>{LETTERS}(<MoleculeE>)?",
    ),
    "material": ("<MaterialS>", Grammar("structure", "material"), f"<MetalS>{LETTERS}(<.*)?"),
    "copy": (models.SEARCH, COPY, None),
}


@KINDS
def test_a_model_with_this_vocabulary_writes_what_the_grammar_says(kind, folders):
    config = {"folder": str(folders[kind]), "precision": "fp32", "threads": 1, "valence": True}
    program = create(config)
    told = program.warm_up()
    assert told["grammar"] is True
    assert told["model"] == mixtral.facts(kind).model
    vocabulary = mixtral.vocabulary(kind)
    for prompt, grammar, form in ASKED.values():
        # Of a model with random weights the filter refuses nearly all that is drawn.
        few = {"max_new_tokens": 8} if grammar.valence else {}
        request, events = ask(prompt, grammar, **few), []
        program.handle(request.encode(), lambda raw, kept=events: kept.append(parse_event(raw)))
        samples = [event for event in events if isinstance(event, Sample)]
        assert len(samples) == 3
        for sample in samples:
            assert sample.text == vocabulary.continuation(sample.ids, request.prompt)
            if form is None:
                assert sample.finish_reason == "stop"
                plain = re.sub("<Pocket[SE]>", "", sample.text)
                assert plain == f"{models.SEQUENCE}<ProteinE>"
            else:
                assert re.fullmatch(form, sample.text), sample.text


@KINDS
def test_scores_are_those_of_the_ids_that_stand_there(kind, folders):
    model = load_model(folders[kind], precision="fp32", demand="cpu", threads=1)
    engine, vocabulary = Engine(model, budget=1 << 30, most_rows=4), mixtral.vocabulary(kind)
    whole = f"<MoleculeS>{SMILES}<MoleculeE>"
    for cut in (0, 11, 15):
        prompt, rest = segments_of(whole[:cut]), segments_of(whole[cut:])
        request = Score(prompt=prompt, completions=(rest,))
        ((logprob, tokens),) = engine.score(request).scores
        before = [1, *vocabulary.encode(prompt)]
        after = vocabulary.encode(rest, after=prompt)
        assert tokens == len(after)
        assert logprob == pytest.approx(likelihood(folders[kind], before, after), abs=1e-3)
        if cut == 11:  # at a tag nothing is cut in two: the ids are those of the whole text
            assert [1, *vocabulary.encode(segments_of(whole))] == before + after


def likelihood(folder, before, after):
    """Return that of `after` by torch."""
    import torch
    from random_models import torch_logits

    logits = torch.tensor(torch_logits(folder, [[*before, *after]])[0]).double()
    logs = torch.log_softmax(logits, dim=-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    return float(sum(logs[at, token] for at, token in zip(places, after, strict=True)))


def test_the_files_of_both_spellings_are_those_of_the_converter():
    each, first = (json.loads(mixtral.tokenizer_json(kind)) for kind in mixtral.KINDS)
    assert [step["type"] for step in each["normalizer"]["normalizers"]] == ["Prepend", "Replace"]
    assert each["pre_tokenizer"] is None
    assert first["normalizer"] is None
    assert first["pre_tokenizer"]["prepend_scheme"] == "first"
    for document in (each, first):
        assert document["model"]["byte_fallback"]
        assert document["decoder"]["decoders"] == [REPLACE, FALLBACK, FUSE, STRIP]
