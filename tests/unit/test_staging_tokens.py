"""What starts and ends a text, and the tags of tasks: as the publisher's tokenizer has them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny_llama

from bundle.scan.tokenizer import parse_tokenizer
from bundle.staging.architecture import parse_architecture
from bundle.staging.inspect import inspect_source
from bundle.staging.tokens import PAIRS, TAGS, start_token
from policy.errors import RefusedError


def words(**parts):
    value = {**deepcopy(tiny_llama.tokenizer()), **parts}
    import json

    return parse_tokenizer(memoryview(json.dumps(value).encode()))


def template(*starts):
    return {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": token, "type_id": 0}} for token in starts),
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            token: {"id": token, "ids": [tiny_llama.vocabulary().index(token)], "tokens": [token]}
            for token in starts
        },
    }


SILENT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
BOS, PAD = 2, 0
STARTS = {
    "config.json alone": (None, {}, BOS),
    "Llama 3: a template": (template("<bos>"), {"bos_token": "<bos>"}, BOS),
    "a template beside no flag": (template("<bos>"), {"add_bos_token": False}, BOS),
    "a template with another token": (template("<pad>"), {}, PAD),
    "a template without a start": (template(), {"bos_token": "<bos>"}, None),
    "Qwen: a start token that is never written": (
        SILENT,
        {"add_bos_token": False, "bos_token": None},
        None,
    ),
    "no start token by its settings": (None, {"bos_token": None}, None),
    "settings that add it": (None, {"add_bos_token": True, "bos_token": "<bos>"}, BOS),
}


@pytest.mark.parametrize(("part", "settings", "expected"), STARTS.values(), ids=STARTS)
def test_a_text_starts_as_the_publishers_tokenizer_starts_it(part, settings, expected):
    shape = parse_architecture(tiny_llama.config())
    assert start_token(shape, words(post_processor=part), settings) == expected


def test_a_start_of_two_tokens_or_of_nobody_is_refused():
    shape = parse_architecture(tiny_llama.config())
    nobody = template("<bos>")
    nobody["special_tokens"]["<bos>"]["ids"] = [5000]
    for part in (template("<bos>", "<bos>"), nobody):
        with pytest.raises(RefusedError) as caught:
            start_token(shape, words(post_processor=part), {})
        assert caught.value.code == "source.shape"


def test_the_start_token_of_a_release_is_that_of_its_tokenizer(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m")
    assert inspect_source(folder).start_id == BOS
    settings = {"add_bos_token": False, "bos_token": None, "eos_token": "<eos>"}
    tiny_llama.write_json(folder / "tokenizer_config.json", settings)
    report = inspect_source(folder)
    assert report.ready
    assert report.start_id is None
    assert "<bos>" not in report.tags


def test_words_that_are_no_special_tokens_are_no_tags(tmp_path):
    """Qwen 3 has `<think>` among its added tokens, for texts."""
    folder = tiny_llama.write_snapshot(tmp_path / "m")
    value = tiny_llama.tokenizer()
    token = {**value["added_tokens"][0], "content": "<think>", "special": False}
    token["id"] = value["model"]["vocab"].pop("[Zr]")
    value["model"]["vocab"]["<think>"] = token["id"]
    value["added_tokens"].append(token)
    tiny_llama.write_json(folder / "tokenizer.json", value)
    assert set(inspect_source(folder).tags) == set(tiny_llama.TAGS)


def test_a_release_with_another_form_of_tokenizer_is_told_what_to_do(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model.v3")
    (error,) = inspect_source(folder).refusals
    assert error.code == "source.incomplete"
    assert "save_pretrained" in error.hint
    (folder / "tokenizer.model.v3").unlink()
    (error,) = inspect_source(folder).refusals
    assert "save_pretrained" not in error.hint


def test_the_tags_are_those_of_the_grammar():
    assert set(TAGS) == set(tiny_llama.TAGS)
    assert len(PAIRS) == 6
