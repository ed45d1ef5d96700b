"""Requests, events and replies: what is read back, and what is refused with which code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from airgap.enclave.channel import ProgramError
from airgap.inference import protocol
from airgap.inference.protocol import (
    Done,
    Generate,
    Grammar,
    Info,
    Progress,
    Sample,
    Score,
    Scores,
    Segment,
    encode_info,
    parse_event,
    parse_reply,
    parse_request,
    segments_of,
    tagged_of,
)
from airgap.inference.strict import Fields, MalformedError
from policy.errors import CODES

PROMPT = (Segment("<MoleculeS>", tag=True), Segment("CCO"))
REQUEST = Generate(
    prompt=PROMPT,
    n=32,
    max_new_tokens=200,
    temperature=1.2,
    top_p=0.85,
    top_k=50,
    repetition_penalty=1.05,
    seed=1,
    stop=("<MoleculeE>",),
    grammar=Grammar(mode="structure", task="molecule"),
)
SAMPLE = Sample(0, "CC<MoleculeE>", (28, 28, 9), "stop", -4.25, 0.5)


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        replace(REQUEST, grammar=Grammar(mode="copy", sequence="MKV"), stop=()),
        replace(REQUEST, grammar=Grammar()),
        Score(prompt=PROMPT, completions=((Segment("CC"),), PROMPT)),
        Info(),
    ],
    ids=["structure", "copy", "none", "score", "info"],
)
def test_a_request_is_read_back(request_):
    assert parse_request(request_.encode()) == request_


def test_grammar_defaults_to_none():
    document = json.loads(REQUEST.encode())
    del document["grammar"]
    assert parse_request(json.dumps(document).encode()).grammar == Grammar()


BROKEN = {
    "no samples": {"n": 0},
    "a million samples": {"n": 1_000_000},
    "a boolean count": {"n": True},
    "a fractional count": {"n": 1.0},
    "no budget": {"max_new_tokens": 0},
    "negative temperature": {"temperature": -1},
    "tiny temperature": {"temperature": 1e-9},
    "text for a number": {"temperature": "1"},
    "top-p zero": {"top_p": 0},
    "top-p above one": {"top_p": 1.1},
    "negative top-k": {"top_k": -1},
    "penalty zero": {"repetition_penalty": 0},
    "seed too large": {"seed": 2**63},
    "empty prompt": {"prompt": []},
    "prompt as text": {"prompt": "<MoleculeS>"},
    "segment of two kinds": {"prompt": [{"tag": "<A>", "text": "C"}]},
    "segment of no kind": {"prompt": [{}]},
    "segment that is a list": {"prompt": [[]]},
    "tag without brackets": {"prompt": [{"tag": "MoleculeS"}]},
    "tag with text": {"prompt": [{"tag": "<MoleculeS>C"}]},
    "half a surrogate pair": {"prompt": [{"text": "\ud800"}]},
    "stop without brackets": {"stop": ["MoleculeE"]},
    "too many stops": {"stop": ["<A>"] * 17},
    "unknown mode": {"grammar": {"mode": "valence"}},
    "unknown task": {"grammar": {"mode": "structure", "task": "poem"}},
    "copy without a sequence": {"grammar": {"mode": "copy"}},
    "copy of small letters": {"grammar": {"mode": "copy", "sequence": "mkv"}},
    "copy of nothing": {"grammar": {"mode": "copy", "sequence": ""}},
    "copy that breaks out": {"grammar": {"mode": "copy", "sequence": 'M" | "A'}},
    "unknown field": {"extra": 1},
    "unknown operation": {"op": "exec"},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_request_is_refused(change):
    document = json.loads(REQUEST.encode())
    assert parse_request(json.dumps(document).encode()) == REQUEST
    with pytest.raises(ProgramError) as caught:
        parse_request(json.dumps(document | change).encode())
    assert caught.value.code == "request.malformed"


RAW = {
    "nothing": b"",
    "not UTF-8": b"\xff\xfe",
    "not JSON": b"{",
    "a list": b"[]",
    "a field twice": b'{"op":"info","op":"info"}',
    "a nested field twice": b'{"op":"generate","grammar":{"mode":"none","mode":"none"}}',
    "deep nesting": b"[" * 100_000,
    "a huge number": b'{"op":' + b"9" * 5000 + b"}",
    "not a number": b'{"op":NaN}',
    "trailing bytes": b'{"op":"info"}x',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_bytes_that_are_no_request_are_refused(raw):
    with pytest.raises(ProgramError) as caught:
        parse_request(raw)
    assert caught.value.code == "request.malformed"


def test_a_request_or_prompt_beyond_its_limit_is_refused():
    long = replace(REQUEST, prompt=(Segment("C" * protocol.PROMPT_LIMIT),))
    assert parse_request(long.encode()) == long
    halves = (Segment("C" * protocol.PROMPT_LIMIT), Segment("C"))
    for raw in (replace(REQUEST, prompt=halves).encode(), b" " * (protocol.REQUEST_LIMIT + 1)):
        with pytest.raises(ProgramError) as caught:
            parse_request(raw)
        assert caught.value.code == "request.limit"


def test_infinite_numbers_are_refused():
    raw = REQUEST.encode().replace(b'"temperature":1.2', b'"temperature":1e999')
    with pytest.raises(ProgramError):
        parse_request(raw)


def test_segments_are_cut_at_tags_and_join_again():
    tagged = "<ProteinS>MKV<ProteinE><Search><ProteinS>"
    segments = segments_of(tagged)
    assert [s.document() for s in segments] == [
        {"tag": "<ProteinS>"},
        {"text": "MKV"},
        {"tag": "<ProteinE>"},
        {"tag": "<Search>"},
        {"tag": "<ProteinS>"},
    ]
    assert tagged_of(segments) == tagged
    assert segments_of("") == ()


@pytest.mark.parametrize(
    ("tagged", "place"), [("CC<", 2), ("A>B", 1), ("< MoleculeS >", 0), ("<MoleculeS>C>>", 12)]
)
def test_a_stray_bracket_is_refused_with_its_place(tagged, place):
    with pytest.raises(ProgramError, match=f"character {place} ") as caught:
        segments_of(tagged)
    assert caught.value.code == "prompt.g04"


@pytest.mark.parametrize("event", [Progress(5, 1, 32), SAMPLE], ids=["progress", "sample"])
def test_an_event_is_read_back(event):
    assert parse_event(event.encode()) == event


BAD_SAMPLES = {
    "index beyond the limit": {"index": 10_000},
    "count that is not the number of ids": {"tokens": 4},
    "unknown reason": {"finish_reason": "because"},
    "probability above one": {"logprob": 0.5},
    "mass above one": {"removed_mass": 1.5},
    "negative id": {"ids": [-1, 2, 3]},
    "unknown field": {"path": "/etc/passwd"},
    "unknown event": {"event": "exec"},
}


@pytest.mark.parametrize("change", BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_a_bad_event_of_the_worker_is_refused(change):
    with pytest.raises(MalformedError):
        parse_event(json.dumps(json.loads(SAMPLE.encode()) | change).encode())


@pytest.mark.parametrize(
    "reply", [Done(9, 100, 42, 12, 32), Scores(9, ((-4.5, 3), (0.0, 0)))], ids=["done", "scores"]
)
def test_a_reply_is_read_back(reply):
    assert parse_reply(reply.encode()) == reply
    broken = json.loads(reply.encode()) | {"prompt_tokens": 0}
    with pytest.raises(MalformedError):
        parse_reply(json.dumps(broken).encode())


def test_the_facts_are_read_back_as_they_came():
    assert parse_reply(encode_info({"model": "m", "tags": {"<A>": 4}})) == {
        "model": "m",
        "tags": {"<A>": 4},
    }


def test_a_message_names_the_field_and_not_its_value():
    with pytest.raises(MalformedError) as caught:
        Fields({"sequence": "SECRET" * 10}, "request").text("sequence", 5)
    assert "sequence" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_every_code_of_this_room_is_listed():
    import re
    from pathlib import Path

    folder = Path(protocol.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    found = set(re.findall(r'"((?:model|request|prompt)\.[a-z0-9]+)"', text))
    assert {"model.memory", "prompt.g10", "request.limit"} <= found
    assert found <= set(CODES)
