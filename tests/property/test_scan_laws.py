"""For any bytes, and for any damage to a sound file, a parser returns or raises ours."""

from __future__ import annotations

import contextlib
import json

import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as some
from scan_samples import ONE_TENSOR, external, graph, node, onnx_model, put, safetensors, wheel

from bundle.scan.bom import require_bom
from bundle.scan.config import lint_config
from bundle.scan.onnx import parse_onnx
from bundle.scan.payload import templates_of
from bundle.scan.roles import payload_role, role_of
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import parse_json, parse_text
from bundle.scan.template import check_syntax
from bundle.scan.tokenizer import parse_tokenizer
from bundle.scan.wheel import check_wheel
from policy.errors import AirgapError

EXAMPLES = settings(max_examples=150, deadline=None)
JSON = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats(allow_nan=False)
    | some.text(max_size=20),
    lambda inner: (
        some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=20,
)
SOUND = {
    "onnx": onnx_model(
        graph(
            node("If", more=put(5, put(1, "b") + put(6, graph()))),
            tensors=(external(location="w", offset="0", length="16"),),
        )
    ),
    "safetensors": safetensors({"__metadata__": {"a": "b"}, **ONE_TENSOR}, bytes(8)),
    "tokenizer": json.dumps(tiny_llama.tokenizer()).encode(),
    "config": json.dumps(tiny_llama.config()).encode(),
    "wheel": wheel({"a.py": b"", "good-1.0.dist-info/RECORD": b"a.py,sha256=x,0\n"}),
}


def parse_all(data: bytes) -> None:
    """Give the same bytes to every parser; only our own errors may come out."""
    view = memoryview(data)
    for parse in (
        lambda: parse_onnx(view, sizes={"w": 16}.get),
        lambda: parse_safetensors(view),
        lambda: parse_tokenizer(view),
        lambda: lint_config(view, "x"),
        lambda: check_wheel(view, "good-1.0-py3-none-any.whl"),
        lambda: parse_json(view, code="scan.config", what="x", limit=1 << 20),
        lambda: parse_text(view, code="scan.text", what="x", limit=1 << 20),
        lambda: check_syntax(data.decode("utf-8", "replace"), "x"),
    ):
        with contextlib.suppress(AirgapError):
            parse()


@EXAMPLES
@given(some.binary(max_size=300))
def test_any_bytes(data):
    parse_all(data)


@EXAMPLES
@given(
    some.sampled_from(sorted(SOUND)),
    some.data(),
    some.binary(max_size=6),
    some.sampled_from(["put", "replace", "cut", "repeat"]),
)
def test_any_damage_to_a_sound_file(kind, data, piece, how):
    sound = SOUND[kind]
    start = data.draw(some.integers(0, len(sound)))
    end = data.draw(some.integers(start, len(sound)))
    parse_all(
        {
            "put": sound[:start] + piece + sound[start:],
            "replace": sound[:start] + piece + sound[start + len(piece) :],
            "cut": sound[:start] + sound[end:],
            "repeat": sound[:end] + sound[start:],
        }[how]
    )


@EXAMPLES
@given(JSON)
def test_any_json(value):
    parse_all(json.dumps(value).encode())
    with contextlib.suppress(AirgapError):
        templates_of(value)


@EXAMPLES
@given(some.dictionaries(some.sampled_from(list(tiny_llama.tokenizer())), JSON))
def test_any_value_in_the_parts_of_a_tokenizer(changes):
    with contextlib.suppress(AirgapError):
        parse_tokenizer(memoryview(json.dumps({**tiny_llama.tokenizer(), **changes}).encode()))


@EXAMPLES
@given(
    some.dictionaries(some.sampled_from(["a", "b", "__metadata__"]), JSON), some.binary(max_size=20)
)
def test_any_value_in_a_header(header, data):
    with contextlib.suppress(AirgapError):
        found = parse_safetensors(memoryview(safetensors(header, data)))
        assert found.tensors[-1].end == 8 + len(json.dumps(header)) + len(data)


@EXAMPLES
@given(some.text(max_size=60), some.binary(max_size=16))
def test_any_name_has_a_role_or_a_refusal(path, head):
    for role in (lambda: role_of(path, head), lambda: payload_role(path)):
        with contextlib.suppress(AirgapError):
            assert role()


@EXAMPLES
@given(some.text(alphabet="{}%|.'_[]() abfori=+*-\n#", max_size=60))
def test_any_template(text):
    with contextlib.suppress(AirgapError):
        check_syntax(text, "x")


class _Nothing:
    files = ()


@EXAMPLES
@given(JSON)
def test_any_bill_of_materials(components):
    document = {"bomFormat": "CycloneDX", "specVersion": "1.7", "components": components}
    with contextlib.suppress(AirgapError):
        require_bom(memoryview(json.dumps(document).encode()), _Nothing())
