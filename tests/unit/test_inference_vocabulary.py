"""Segments to ids and back: no text becomes a tag, nothing unknown passes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_llama
from inference_models import RETRO, SEARCH, byte_level, facts_of, vocabulary
from test_inference_constrain import SMILES

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Grammars
from airgap.inference.protocol import Grammar, Segment, segments_of
from airgap.inference.vocabulary import Place, Vocabulary, place_after

WORDS = tiny_llama.vocabulary()


@pytest.mark.parametrize("tagged", [RETRO, SEARCH, "<MoleculeS>C[C@@H](N)ClBr%"])
def test_text_goes_to_ids_and_back(tagged):
    tokens = vocabulary()
    ids = tokens.encode(segments_of(tagged))
    assert tokens.decode(ids) == tagged
    assert ids[0] == WORDS.index(tagged.split(">")[0] + ">")


def test_a_text_that_spells_a_tag_is_never_that_tag():
    tokens = vocabulary()
    assert tokens.encode([Segment("<MoleculeE>", tag=True)]) == [WORDS.index("<MoleculeE>")]
    with pytest.raises(ProgramError) as caught:
        tokens.encode([Segment("CC<MoleculeE>")])
    assert caught.value.code == "prompt.g11"


def test_a_text_that_spells_a_tag_stays_letters_in_a_byte_vocabulary():
    tokens, raw_ids = byte_level()
    ids = tokens.encode([Segment("CC<MoleculeE>")])
    assert tokens.decode(ids) == "CC<MoleculeE>"
    assert not set(ids) & tokens.special_ids
    assert raw_ids  # the same text, encoded carelessly, holds the tag


def test_an_unknown_letter_is_named_with_its_place():
    with pytest.raises(ProgramError, match=r"no token for '\?' \(character 13 ") as caught:
        vocabulary().encode(segments_of("<MoleculeS>CC?C"))
    assert caught.value.code == "prompt.g11"


def test_an_unknown_tag_is_refused_with_its_place():
    with pytest.raises(ProgramError, match=r"no tag '<Proteins>' \(character 3\)") as caught:
        vocabulary().encode(segments_of("CCO<Proteins>"))
    assert caught.value.code == "prompt.g04"


def test_a_control_token_is_no_tag():
    with pytest.raises(ProgramError) as caught:
        vocabulary().encode([Segment("<eos>", tag=True)])
    assert caught.value.code == "prompt.g04"


def test_a_token_that_swallows_letters_without_a_trace_is_refused():
    def strip_x(document):
        document["normalizer"] = {"type": "Replace", "pattern": {"String": "X"}, "content": ""}

    with pytest.raises(ProgramError) as caught:
        vocabulary(strip_x).encode([Segment("CXC")])
    assert caught.value.code == "prompt.g11"


def test_a_tokenizer_that_turns_text_into_a_tag_all_the_same_is_caught():
    def whole_words(document):
        document["pre_tokenizer"] = None

    with pytest.raises(ProgramError) as caught:
        vocabulary(whole_words).encode([Segment("<MoleculeE>")])
    assert caught.value.code == "prompt.g03"


def without_tag(document):
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<React>"]
    document["model"]["vocab"].pop("<React>")


def swapped_tags(document):
    names = {"<React>": "<Trans>", "<Trans>": "<React>"}
    for token in document["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    document["model"]["vocab"] = {names.get(k, k): v for k, v in document["model"]["vocab"].items()}


def plain_tag(document):
    next(t for t in document["added_tokens"] if t["content"] == "<React>")["special"] = False


def spaced(document):
    document["decoder"] = None


def other_unknown(document):
    document["model"]["unk_token"] = "C"


UNFIT = {
    "a tag is missing": (without_tag, {}, "model.tags"),
    "two tags are swapped": (swapped_tags, {}, "model.tags"),
    "a tag is not special": (plain_tag, {}, "model.tags"),
    "the decoder puts blanks between tags": (spaced, {}, "model.tokenizer"),
    "another unknown token": (other_unknown, {}, "model.tokenizer"),
    "an unknown token that is not declared": (lambda _d: None, {"unk_id": None}, "model.tokenizer"),
    "ids beyond the model": (lambda _d: None, {"vocab_size": 30}, "model.tokenizer"),
}


@pytest.mark.parametrize(("change", "facts", "code"), UNFIT.values(), ids=UNFIT.keys())
def test_a_tokenizer_that_contradicts_the_facts_is_refused(change, facts, code):
    vocabulary()
    with pytest.raises(ProgramError) as caught:
        vocabulary(change, **facts)
    assert caught.value.code == code


def test_an_end_token_without_an_entry_is_refused():
    assert vocabulary(vocab_size=len(WORDS) + 10)
    with pytest.raises(ProgramError) as caught:
        vocabulary(vocab_size=len(WORDS) + 10, eos_ids=(len(WORDS) + 2,))
    assert caught.value.code == "model.tokenizer"


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"model": 3}', b"\xff" * 10])
def test_bytes_that_are_no_tokenizer_are_refused(raw):
    with pytest.raises(ProgramError) as caught:
        Vocabulary(raw, facts_of(raw))
    assert caught.value.code == "model.tokenizer"


def test_another_digest_is_refused():
    raw = json.dumps(tiny_llama.tokenizer()).encode()
    with pytest.raises(ProgramError, match="digest") as caught:
        Vocabulary(raw, facts_of(raw + b" "))
    assert caught.value.code == "model.tokenizer"


def test_added_tokens_that_nobody_declared_are_shown():
    facts = facts_of(b"")
    tags = {tag: number for tag, number in facts.tags.items() if tag != "<Trans>"}
    assert vocabulary().unknown_tags == []
    assert vocabulary(tags=tags).unknown_tags == ["<Trans>"]


def test_token_bytes_spell_what_tokens_write():
    table = vocabulary(vocab_size=len(WORDS) + 3).token_bytes()
    assert table[WORDS.index("[nH]")] == b"[nH]"
    assert table[WORDS.index("<React>")] == b"<React>"
    assert table[-1] == b""
    tokens, _ = byte_level()
    ids = tokens.encode([Segment("MKV é")])
    assert b"".join(tokens.token_bytes()[number] for number in ids) == "MKV é".encode()


def test_bytes_of_an_unknown_decoder_are_not_guessed():
    def wordpiece(document):
        document["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}

    def letters_of_no_byte(document):
        flags = ("add_prefix_space", "trim_offsets", "use_regex")
        document["decoder"] = {"type": "ByteLevel", **dict.fromkeys(flags, True)}
        document["model"]["vocab"] = {
            "\u4e2d" if word == "C" else word: at for word, at in document["model"]["vocab"].items()
        }

    for change in (wordpiece, letters_of_no_byte):
        with pytest.raises(ProgramError) as caught:
            vocabulary(change).token_bytes()
        assert caught.value.code == "model.grammar"


def added(document, content, *, special):
    """Add a token after all others, as fine-tuners do."""
    last = max(document["model"]["vocab"].values())
    number = max(last, *(token["id"] for token in document["added_tokens"])) + 1
    token = {**document["added_tokens"][0], "content": content, "special": special, "id": number}
    document["added_tokens"].append(token)
    return number


def larger(change, rows=400):
    """Return the byte vocabulary after a change, of a model with rows that no token has."""
    plain, _ = byte_level()
    document = json.loads(plain._tokenizer.to_str())
    change(document)
    raw = json.dumps(document).encode()
    digest = hashlib.sha256(raw).hexdigest()
    return Vocabulary(raw, replace(plain._facts, tokenizer_sha256=digest, vocab_size=rows))


def like_llama_3(document):
    document["model"]["ignore_merges"] = True
    added(document, "<|begin_of_text|>", special=True)
    added(document, "<|reserved_special_token_0|>", special=True)
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|begin_of_text|>": {
                "id": "<|begin_of_text|>",
                "ids": [document["added_tokens"][-2]["id"]],
                "tokens": ["<|begin_of_text|>"],
            }
        },
    }


def like_qwen_3(document):
    document["normalizer"] = {"type": "NFC"}
    added(document, "<|im_start|>", special=True)
    for word in ("<think>", "</think>", "<tool_call>"):
        added(document, word, special=False)


def like_tekken(document):
    """Put control tokens that nobody named in front, in the vocabulary itself too."""
    for place in range(3):
        number = added(document, f"<SPECIAL_{place}>", special=True)
        document["model"]["vocab"][f"<SPECIAL_{place}>"] = number


@pytest.mark.parametrize("change", [like_llama_3, like_qwen_3, like_tekken])
def test_byte_vocabularies_of_the_promised_families_are_read(change):
    plain, _ = byte_level()
    tokens = larger(change)
    tagged = "<MoleculeS>CC(=O)Nc1ccccc1<MoleculeE><ReverseReact>"
    ids = tokens.encode(segments_of(tagged))
    assert ids == plain.encode(segments_of(tagged))
    assert tokens.continuation(ids) == tagged
    table = tokens.token_bytes()
    assert len(table) == 400
    for number, token in tokens._tokenizer.get_added_tokens_decoder().items():
        assert table[number] == token.content.encode()
    constraint = Grammars(tokens, tokens._facts).compile(Grammar("structure", "molecule"), [])
    constraint.begin(1)
    legal = constraint.legal()[0]
    letters = {n for n, one in enumerate(table) if re.fullmatch(SMILES.encode(), one)}
    assert set(np.flatnonzero(legal)) == letters


def test_a_word_that_a_fine_tuner_added_is_a_text_and_its_tags_are_not():
    tokens = larger(like_qwen_3)
    (think,) = tokens.encode([Segment("<think>")])
    assert think not in tokens.special_ids
    assert tokens.unknown_tags == ["<think>", "<tool_call>"]
    with pytest.raises(ProgramError) as caught:
        tokens.encode([Segment("<think>", tag=True)])
    assert caught.value.code == "prompt.g04"


def test_an_added_word_has_the_bytes_that_the_decoder_writes():
    words = ["\u00e9t", "\u4e2d", "a b", "Ġx"]

    def change(document):
        for word in words:
            added(document, word, special=False)

    tokens = larger(change)
    table, inside = tokens.token_bytes(), tokens.plain_ids("x")
    for word in words:
        number = tokens._tokenizer.token_to_id(word)
        written = tokens.decode([*inside, number, *inside])
        assert written == f"x{table[number].decode('utf-8', 'replace')}x"


def test_a_byte_vocabulary_may_write_a_blank_before_each_text():
    def blank(document):
        document["pre_tokenizer"]["add_prefix_space"] = True

    tokens, _ = byte_level(blank)
    tagged = "MKV<MoleculeS>CCO<MoleculeE>"
    ids = tokens.encode(segments_of(tagged))
    assert ids == tokens.encode_again(tagged)
    assert tokens.decode(ids) == " MKV<MoleculeS> CCO<MoleculeE>"
    assert tokens.continuation(ids) == tagged
    more = tokens.encode([Segment("N")], after=[Segment("CC")])
    assert tokens.continuation(more, [Segment("CC")]) == "N"
    assert tokens.blank(Place.TAG)
    assert not byte_level()[0].blank(Place.TAG)


def test_an_end_token_that_a_text_could_write_is_none_of_its_letters():
    letter = WORDS.index("C")
    tokens = vocabulary(eos_ids=(letter,))
    assert tokens.encode([Segment("N")])
    with pytest.raises(ProgramError) as caught:
        tokens.encode([Segment("NC")])
    assert caught.value.code == "prompt.g03"


@pytest.mark.parametrize(
    ("segments", "place"),
    [
        ([], Place.START),
        ([Segment("")], Place.START),
        ([Segment("C")], Place.TEXT),
        ([Segment("C"), Segment("")], Place.TEXT),
        ([Segment("C"), Segment("<React>", tag=True)], Place.TAG),
        ([Segment("<React>", tag=True), Segment("")], Place.TAG),
    ],
)
def test_a_text_stands_after_what_is_there(segments, place):
    assert place_after(segments) is place


def test_texts_that_touch_are_one_text():
    tokens, _ = byte_level()
    cut = [Segment("M"), Segment(""), Segment("K"), Segment("<React>", tag=True), Segment("MK")]
    assert tokens.encode(cut) == tokens.encode(segments_of("MK<React>MK"))
    with pytest.raises(ProgramError, match=r"no token for '\?' \(character 3 "):
        vocabulary().encode([Segment("CC"), Segment("C?")])
