"""Segments to ids and back: no text becomes a tag, nothing unknown passes."""

from __future__ import annotations

import json

import pytest
import tiny_llama
from inference_models import RETRO, SEARCH, byte_level, facts_of, vocabulary

from airgap.enclave.channel import ProgramError
from airgap.inference.protocol import Segment, segments_of
from airgap.inference.vocabulary import Vocabulary

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
