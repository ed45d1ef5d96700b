"""Manifest, graphs.json and statement: what each field may be, and what they say of each other."""

import json
from datetime import UTC, datetime, timedelta, timezone

import attacks
import bundles
import pytest
from pydantic import ValidationError

from bundle import fields, graphs, manifest, statement
from bundle.canonical import MAX_DEPTH, canonical_json, parse_canonical, parse_strict
from policy.errors import RefusedError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "a.agb"
    bundles.make_bundle(path, members=bundles.make_members(bundles.make_weights(4096)))
    forge = attacks.Forge.of(path.read_bytes())
    entry = attacks.entry_of(forge, attacks.GRAPHS)
    raw = bytes(forge.body[entry["offset"] : entry["offset"] + entry["size"]])
    return forge.manifest, json.loads(raw)


def code_of(call):
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


# -- canonical JSON ---------------------------------------------------------------------------

# From RFC 8785, section 3.2.3 (sorting by UTF-16 code units) and 3.2.2.
SORTED = (
    '{"\\u20ac":"Euro Sign","\\r":"Carriage Return","\\u000a":"Newline","1":"One",'
    '"\\u0080":"Control\\u007f","\\ud83d\\ude02":"Smiley","\\u00f6":"Latin","\\ufb33":"Hebrew"}'
)


def test_keys_are_sorted_as_the_rfc_says():
    made = json.loads(canonical_json(json.loads(SORTED)))
    assert [*made.values()] == [
        *("Newline", "Carriage Return", "One", "Control\x7f", "Latin", "Euro Sign"),
        *("Smiley", "Hebrew"),
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a":1,"a":1}',
        b"1.5",
        b"1e3",
        b"NaN",
        b"Infinity",
        b"9007199254740992",
        b"-9007199254740992",
        b"1" * 5000,
        b'"\\ud800"',
        b"\xff",
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"[" * 100_000,
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_strict_json(raw):
    assert (
        code_of(lambda: parse_strict(raw, code="seal.malformed", what="it", limit=1 << 20))
        == "seal.malformed"
    )


@pytest.mark.parametrize("raw", [b" 1", b"1\n", b'{"b":1,"a":1}', b'"\\u0041"', b"-0", b"[1, 2]"])
def test_what_is_json_but_not_canonical(raw):
    parse_strict(raw, code="seal.malformed", what="it", limit=100)
    with pytest.raises(RefusedError, match="canonical"):
        parse_canonical(raw, code="seal.malformed", what="it", limit=100)


def test_a_document_that_is_too_long_is_not_parsed():
    with pytest.raises(RefusedError, match="at most 3"):
        parse_strict(b"[[[[", code="seal.malformed", what="it", limit=3)


# -- fields -----------------------------------------------------------------------------------


def test_times_have_one_form():
    moment = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert fields.parse_time("2026-01-31T12:00:00Z") == moment
    assert fields.format_time(moment) == "2026-01-31T12:00:00Z"
    assert fields.parse_time(moment.astimezone(timezone(timedelta(hours=2)))) == moment
    for bad in (
        *("2026-01-31", "2026-01-31T12:00:00+00:00", "2026-13-01T00:00:00Z", 5, None),
        *("2026-01-31T12:00:00.5Z", "２026-01-31T12:00:00Z"),
        moment.replace(tzinfo=None),
        moment.replace(microsecond=1),
    ):
        with pytest.raises(ValueError, match=r".*"):
            fields.parse_time(bad)


# -- manifest ---------------------------------------------------------------------------------


def test_a_good_manifest_returns_its_bytes(good):
    raw = canonical_json(good[0])
    found = manifest.parse_manifest(raw)
    assert manifest.canonical(found) == raw
    assert found.model("tiny").id == "tiny"
    assert found.model("other") is None
    assert found.find("META/none") is None


def change(value, *path, to):
    made = json.loads(json.dumps(value))
    place = made
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return made


WRONG = {
    "order of files": lambda m: change(m, "files", to=m["files"][::-1]),
    "role by place": lambda m: change(m, "files", 1, "role", to="evidence"),
    "payload role": lambda m: change(m, "files", -1, "role", to="report"),
    "no sums": lambda m: change(m, "files", to=m["files"][1:]),
    "no report": lambda m: change(m, "files", to=[f for f in m["files"] if f["role"] != "report"]),
    "no graphs": lambda m: change(m, "files", to=[f for f in m["files"] if f["role"] != "graphs"]),
    "model twice": lambda m: change(m, "models", to=m["models"] * 2),
    "model wheels": lambda m: change(m, "models", 0, "id", to="wheels"),
    "parity of nobody": lambda m: change(m, "parity", to=[parity(model="other")]),
    "parity without vectors": lambda m: change(m, "parity", to=[parity(vectors="META/x")]),
    "parity precision": lambda m: change(m, "parity", to=[parity(precision="int8")]),
    "tolerance is a float": lambda m: change(m, "parity", to=[parity(tolerance="1e-3")]),
    "level": lambda m: change(m, "models", 0, "provenance_level", to="L9"),
    "status": lambda m: change(m, "models", 0, "licence", "status", to="trusted"),
    "epoch": lambda m: change(m, "epoch", to=-1),
    "boolean epoch": lambda m: change(m, "epoch", to=True),
    "text epoch": lambda m: change(m, "epoch", to="1"),
    "hash": lambda m: change(m, "body", "hash", to="blake3"),
    "digest": lambda m: change(m, "files", 0, "sha256", to="A" * 64),
    "expires first": lambda m: change(m, "expires", to=m["not_before"]),
}


def parity(**changes):
    return {
        "model": "tiny",
        "precision": "fp32",
        "provider": "CPU",
        "tolerance": "0.001",
        "vectors": "META/vectors/parity.json",
    } | changes


@pytest.mark.parametrize("build", WRONG.values(), ids=WRONG.keys())
def test_a_manifest_that_contradicts_itself(build, good):
    assert code_of(lambda: manifest.parse_manifest(canonical_json(build(good[0])))) == (
        "manifest.schema"
    )


def test_evidence_and_parity_that_are_listed(good):
    entry = next(e for e in good[0]["files"] if e["role"] == "evidence")
    evidence = {
        "kind": "pins",
        "path": entry["path"],
        "sha256": entry["sha256"],
        "subject": "x",
        "summary": "x",
    }
    made = change(change(good[0], "evidence", to=[evidence]), "parity", to=[parity()])
    found = manifest.parse_manifest(canonical_json(made))
    assert found.evidence[0].kind == "pins"
    made = change(made, "evidence", 0, "sha256", to="0" * 64)
    assert code_of(lambda: manifest.parse_manifest(canonical_json(made))) == "manifest.schema"


def test_a_manifest_larger_than_its_limit():
    raw = b" " * (manifest.MANIFEST_LIMIT + 1)
    assert code_of(lambda: manifest.parse_manifest(raw)) == "manifest.canonical"


def test_nothing_changes_a_manifest(good):
    found = manifest.parse_manifest(canonical_json(good[0]))
    with pytest.raises(ValidationError):
        found.epoch = 7


# -- graphs.json ------------------------------------------------------------------------------

BAD_GRAPHS = {
    "unknown field": lambda g: g | {"code": "x"},
    "field left out": lambda g: {k: v for k, v in g.items() if k != "unk_id"},
    "a default left out": lambda g: change(
        g, "graphs", 0, to={k: v for k, v in g["graphs"][0].items() if k != "external"}
    ),
    "two of one name": lambda g: change(g, "graphs", to=g["graphs"] * 2),
    "id outside the vocabulary": lambda g: change(g, "eos_ids", to=[99]),
    "tag outside the vocabulary": lambda g: change(g, "tags", to={"<x>": 8}),
    "a path": lambda g: change(g, "tokenizer", "path", to="../tokenizer.json"),
    "no graph": lambda g: change(g, "graphs", to=[]),
    "layout": lambda g: change(g, "graphs", 0, "kv_layout", to="SBHD"),
}


@pytest.mark.parametrize("build", BAD_GRAPHS.values(), ids=BAD_GRAPHS.keys())
def test_graphs_that_are_refused(build, good):
    assert graphs.parse_graphs(canonical_json(good[1])).model == "tiny"
    assert code_of(lambda: graphs.parse_graphs(canonical_json(build(good[1])))) == "scan.graphs"


def test_graphs_may_leave_the_unknown_token_open(good):
    raw = canonical_json(change(good[1], "unk_id", to=None))
    assert graphs.canonical_graphs(graphs.parse_graphs(raw)) == raw


MISMATCH = {
    "model": lambda g: change(g, "model", to="other"),
    "use": lambda g: change(g, "scientific_use", to=True),
    "precision": lambda g: change(g, "graphs", 0, "precision", to="int8"),
    "tokenizer": lambda g: change(g, "tokenizer", "sha256", to="0" * 64),
    "graph": lambda g: change(g, "graphs", 0, "path", to="other.onnx"),
    "external": lambda g: change(g, "graphs", 0, "external", 0, "sha256", to="0" * 64),
    "role": lambda g: change(
        g, "graphs", 0, "external", 0, to={"path": "config.json", "sha256": "0" * 64}
    ),
}


@pytest.mark.parametrize("build", MISMATCH.values(), ids=MISMATCH.keys())
def test_graphs_of_other_files(build, good):
    found = manifest.parse_manifest(canonical_json(good[0]))
    graphs.require_matches(graphs.parse_graphs(canonical_json(good[1])), found, "tiny")
    other = graphs.parse_graphs(canonical_json(build(good[1])))
    assert code_of(lambda: graphs.require_matches(other, found, "tiny")) == "scan.graphs"


# -- statement --------------------------------------------------------------------------------


def test_a_statement_states_the_manifest(good):
    found = manifest.parse_manifest(canonical_json(good[0]))
    made = statement.seal_statement(found, builder="ben", policy_pack_digests=[found.digest])
    assert statement.parse_statement(made.to_bytes()) == made
    statement.require_matches(made, found, canonical_json(good[0]))
    value = json.loads(made.to_bytes())
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"][0]["digest"] == {"sha256": found.digest.hex}
    for other in ({}, {"predicateType": statement.SEAL_TYPE}):
        assert code_of(lambda o=other: statement.parse_statement(canonical_json(o))) == "seal.type"
    assert code_of(lambda: statement.parse_statement(b"[]")) == "seal.malformed"
    with pytest.raises(ValueError, match="no META/report"):
        statement.seal_statement(found.model_copy(update={"files": found.files[:1]}), builder="ben")
