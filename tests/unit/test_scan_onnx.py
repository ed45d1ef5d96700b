"""The walk over ONNX: every graph of the file, every place for external data, every bound."""

from __future__ import annotations

import pytest
from scan_samples import (
    external,
    graph,
    node,
    onnx_model,
    opset,
    pair,
    put,
    tensor,
    value_info,
    varint,
)

from bundle.scan import onnx
from bundle.scan.onnx import External, parse_onnx
from policy.errors import RefusedError

SIZES = {"w.data": 64}
HERE = {"location": "w.data", "offset": "0", "length": "16"}
AWAY = {"location": "../x", "offset": "0", "length": "16"}


def walk(data: bytes):
    return parse_onnx(memoryview(data), sizes=SIZES.get)


def code_of(data: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        walk(data)
    return caught.value.code


def with_tensors(*tensors: bytes) -> bytes:
    return onnx_model(graph(tensors=tensors))


def branch(body: bytes) -> bytes:
    """Return the attribute that holds a sub-graph."""
    return put(5, put(1, "then_branch") + put(20, 5) + put(6, body))


def function(domain: str, name: str, *nodes: bytes) -> bytes:
    return put(
        25, put(1, name) + b"".join(put(7, n) for n in nodes) + put(9, opset()) + put(10, domain)
    )


def test_summary_of_a_sound_graph():
    found = walk(with_tensors(external(**HERE)))
    assert found.inputs == ("x",)
    assert found.outputs == ("y",)
    assert found.opsets == {"": 17}
    assert found.nodes == 1
    assert found.external == (External("W", "w.data", 0, 16),)


SUBGRAPHS = {
    "graph attribute": lambda t: onnx_model(graph(node("If", more=branch(graph(tensors=(t,)))))),
    "list of graphs": lambda t: onnx_model(
        graph(
            node("If", more=put(5, put(1, "b") + put(11, graph()) + put(11, graph(tensors=(t,)))))
        )
    ),
    "two levels down": lambda t: onnx_model(
        graph(node("If", more=branch(graph(node("Loop", more=branch(graph(tensors=(t,))))))))
    ),
    "tensor attribute": lambda t: onnx_model(
        graph(node("Constant", more=put(5, put(1, "value") + put(5, t))))
    ),
    "list of tensors": lambda t: onnx_model(
        graph(node("X", more=put(5, put(1, "v") + put(10, t))))
    ),
    "sparse initializer": lambda t: onnx_model(graph(more=put(15, put(1, t)))),
    "sparse attribute": lambda t: onnx_model(
        graph(node("X", more=put(5, put(1, "v") + put(22, put(2, t)))))
    ),
    "function body": lambda t: onnx_model(
        more=function(
            "com.microsoft", "Gelu", node("Constant", more=put(5, put(1, "v") + put(5, t)))
        )
    ),
    "training graph": lambda t: onnx_model(more=put(20, put(1, graph(tensors=(t,))))),
    "training algorithm": lambda t: onnx_model(more=put(20, put(2, graph(tensors=(t,))))),
}


@pytest.mark.parametrize("place", SUBGRAPHS)
def test_external_data_is_found_wherever_it_hides(place):
    build = SUBGRAPHS[place]
    inline = tensor(more=put(9, bytes(16)))
    if not place.startswith("training"):
        walk(build(inline))
        walk(build(external(**HERE)))
    assert code_of(build(external(**AWAY))) == "scan.onnx.external"


@pytest.mark.parametrize(
    "location",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "/x",
        "C:x",
        "w.data\0",
        ".hidden",
        "w data",
        "ü",
        "x" * 200,
        "*[0]",
    ],
)
def test_location_is_a_plain_name(location):
    assert code_of(with_tensors(external(**{**HERE, "location": location}))) == "scan.onnx.external"


@pytest.mark.parametrize(
    "change",
    [
        {"offset": "-1"},
        {"offset": "0x10"},
        {"offset": "64"},
        {"offset": "999999999999999999999"},
        {"length": ""},
        {"length": "15"},
        {"length": "17"},
        {"offset": "49"},
        {"location": "other.data"},
        {"mode": "w"},
    ],
)
def test_bounds_and_keys_of_external_data(change):
    walk(with_tensors(external(**HERE)))
    assert code_of(with_tensors(external(**{**HERE, **change}))) == "scan.onnx.external"


def test_an_external_key_twice_is_refused():
    twice = tensor(
        more=put(13, pair("location", "w.data")) * 2 + put(13, pair("length", "16")) + put(14, 1)
    )
    assert code_of(with_tensors(twice)) == "scan.onnx.external"


def test_external_and_inline_at_once_is_refused():
    both = external(**HERE) + put(9, bytes(16))
    assert code_of(with_tensors(both)) == "scan.onnx.external"
    listed_only = tensor(more=put(13, pair("location", "w.data")))
    assert code_of(with_tensors(listed_only)) == "scan.onnx.external"


def test_tensors_may_share_bytes_only_if_they_share_all():
    walk(with_tensors(external("A", **HERE), external("B", **HERE)))
    walk(with_tensors(external("A", **HERE), external("B", **{**HERE, "offset": "16"})))
    shifted = external("B", **{**HERE, "offset": "8"})
    assert code_of(with_tensors(external("A", **HERE), shifted)) == "scan.onnx.external"


DOMAINS = {
    "unknown domain": onnx_model(graph(node("Add", domain="ai.onnx.ml")), opsets=(opset(),)),
    "unknown operator of a known domain": onnx_model(
        graph(node("EPContext", domain="com.microsoft")),
        opsets=(opset(), opset(1, "com.microsoft")),
    ),
    "import alone": onnx_model(opsets=(opset(), opset(1, "com.attacker"))),
    "function in a domain of its own": onnx_model(more=function("com.attacker", "F", node())),
    "operator in a sub-graph": onnx_model(
        graph(node("If", more=branch(graph(node("Evil", domain="com.attacker")))))
    ),
    "opaque type": onnx_model(
        graph(more=put(13, put(1, "v") + put(2, put(7, put(1, "d") + put(2, "n")))))
    ),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_operators_that_are_not_known(name):
    assert code_of(DOMAINS[name]) == "scan.onnx.domain"


def test_operators_of_the_fast_graph_are_known():
    body = graph(node("GroupQueryAttention", domain="com.microsoft"))
    assert walk(onnx_model(body, opsets=(opset(), opset(1, "com.microsoft")))).nodes == 1


MALFORMED = {
    "empty": b"",
    "no graph": put(1, 9) + put(8, opset()),
    "no operator set": put(1, 9) + put(7, graph()),
    "old IR": onnx_model(ir=3),
    "future IR": onnx_model(ir=14),
    "negative IR": onnx_model(ir=-1),
    "old operator set": onnx_model(opsets=(opset(6),)),
    "future operator set": onnx_model(opsets=(opset(99),)),
    "one domain in two versions": onnx_model(opsets=(opset(17), opset(18))),
    "graph twice": onnx_model(more=put(7, graph())),
    "name twice": onnx_model(graph(more=put(2, "h"))),
    "unknown field": onnx_model(more=put(99, 1)),
    "unknown field in a node": onnx_model(graph(node(more=put(50, "x")))),
    "field number zero": onnx_model(more=b"\x00\x00"),
    "group wire type": onnx_model(more=varint(6 << 3 | 3)),
    "number where text belongs": onnx_model(more=put(2, 7)),
    "text where a number belongs": put(1, "nine") + put(7, graph()) + put(8, opset()),
    "cut inside a message": onnx_model()[:-1],
    "length beyond the end": onnx_model() + varint(6 << 3 | 2) + varint(1 << 40),
    "number of eleven bytes": b"\x08" + b"\xff" * 10 + b"\x01",
    "number above 64 bits": b"\x08" + b"\xff" * 9 + b"\x7f",
    "text that is not UTF-8": onnx_model(more=put(6, b"\xff\xfe")),
    "long text": onnx_model(more=put(6, "x" * (onnx.MAX_STRING + 1))),
    "training information": onnx_model(more=put(20, put(1, graph()))),
    "device configuration": onnx_model(more=put(26, put(1, "d"))),
    "device placement": onnx_model(graph(node(more=put(10, put(1, "d"))))),
    "unknown tensor type": with_tensors(tensor(kind=99, more=put(9, bytes(16)))),
    "too few bytes": with_tensors(tensor(more=put(9, bytes(15)))),
    "too many bytes": with_tensors(tensor(more=put(9, bytes(17)))),
    "negative dimension": with_tensors(tensor(dims=(-4,), more=put(9, bytes(16)))),
    "too many dimensions": with_tensors(tensor(dims=(1,) * 20, more=put(9, bytes(4)))),
    "segment of a tensor": with_tensors(tensor(more=put(3, put(1, 0)) + put(9, bytes(16)))),
    "string data in a number": with_tensors(tensor(more=put(6, "x"))),
    "too much string data": with_tensors(
        tensor(kind=8, more=put(6, bytes(onnx.MAX_STRING_DATA + 1)))
    ),
    "floats cut": with_tensors(tensor(more=put(4, bytes(15)))),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(name):
    walk(onnx_model())
    assert code_of(MALFORMED[name]) == "scan.onnx"


def test_packed_and_unpacked_numbers_are_both_read():
    packed = put(1, varint(2) + varint(2)) + put(2, 1) + put(8, "W") + put(9, bytes(16))
    assert walk(with_tensors(packed)).nodes == 1
    attribute = put(
        5, put(1, "v") + put(7, 1.0) + put(7, 2.0) + put(8, 1) + put(8, varint(3)) + put(2, 1.5)
    )
    assert walk(onnx_model(graph(node("X", more=attribute)))).nodes == 1


def test_deep_nesting_ends_in_a_refusal():
    body = graph()
    for _ in range(40):
        body = graph(node("If", more=branch(body)))
    assert code_of(onnx_model(body)) == "scan.onnx"


def test_counts_are_bounded(monkeypatch):
    data = onnx_model(graph(node(), node(), node()))
    walk(data)
    monkeypatch.setattr(onnx, "MAX_NODES", 2)
    assert code_of(data) == "scan.onnx"
    monkeypatch.setattr(onnx, "MAX_FIELDS", 5)
    assert code_of(onnx_model()) == "scan.onnx"


def test_external_tensors_are_bounded(monkeypatch):
    monkeypatch.setattr(onnx, "MAX_EXTERNAL", 1)
    walk(with_tensors(external("A", **HERE)))
    assert code_of(with_tensors(external("A", **HERE), external("B", **HERE))) == "scan.onnx"


def test_inputs_and_outputs_are_those_of_the_main_graph():
    inner = graph(node("If", more=branch(graph(more=put(11, value_info("hidden"))))))
    assert walk(onnx_model(inner)).inputs == ("x",)
