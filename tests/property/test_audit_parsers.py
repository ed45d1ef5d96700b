"""Laws of the audit log's parsers: any bytes give a value or an error of ours."""

import hashlib
import json
import string

import audit_logs as logs
import orjson
import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airgap.audit import Actor, Commit, DecisionRef, Event, new_ulid
from airgap.audit.anchors import parse_anchor
from airgap.audit.checkpoint import (
    parse_checkpoint,
    parse_ring,
    parse_vkey,
    sign_checkpoint,
    verify_checkpoint,
)
from airgap.audit.export.manifest import parse_manifest
from airgap.audit.export.rows import FORMATS, guard
from airgap.audit.grammar import read_line
from airgap.audit.layout import journal_line, last_checkpoint, parse_journal_line
from airgap.audit.quorum import parse_policy
from airgap.audit.receipt import Receipt, parse_receipt, verify_receipt
from airgap.audit.record import (
    KINDS,
    RULES,
    citations,
    encode,
    parse_line,
    sealed_payloads,
    timestamp,
)
from airgap.audit.recovery import load_frontier
from airgap.audit.stream import _tile_index
from airgap.audit.tiles import Edge, Tiles, inclusion_path, tile_name
from bundle import merkle
from policy.errors import AirgapError

KEY = logs.log_key()
LEAVES = [hashlib.sha256(bytes([n % 251, n // 251])).digest() for n in range(600)]
TREE = merkle.Tree(LEAVES)
NOTE = sign_checkpoint(KEY, 600, TREE.root()).note.encode()
RECEIPT = Receipt(77, 600, LEAVES[77], tuple(TREE.inclusion_proof(77)), NOTE.decode())
OWNED = {
    "v": 1, "seq": 4, "prev": "ab" * 32, "ts": timestamp(1_764_000_000_123_456_789),
    "mono_ns": "12345", "boot": logs.BOOT, "host": "lab1", "inst": new_ulid(5, b"\1" * 10),
}  # fmt: skip
LINE = encode(
    logs.intent("sha256:" + "cd" * 32, new_ulid(6, b"\2" * 10)).fields(uid=3, auth="self") | OWNED
)
MANIFEST = (
    b'{"format":"airgap-audit-export/1","origin":"o","number":1,"first":0,"size":1,"root":"r",'
    b'"since":{"size":1,"root":"r"},"rows":"csv","rows_file":"records.csv","payloads":true,"files":[{"path":"log/a","bytes":1,"sha256":"%s","sha384":"%s"}]}'
    % (b"0" * 64, b"0" * 96)
)

PARSERS = {
    "checkpoint": (parse_checkpoint, NOTE),
    "vkey": (parse_vkey, str(KEY.vkey).encode()),
    "ring": (parse_ring, f"{KEY.vkey}\n{logs.vkey(9)}\n".encode()),
    "trust policy": (parse_policy, logs.POLICY.encode()),
    "receipt": (parse_receipt, RECEIPT.as_proof().encode()),
    "record": (parse_line, LINE),
    "journal line": (parse_journal_line, journal_line(NOTE.decode())),
    "anchor": (lambda content: parse_anchor(content, "x"), RECEIPT.as_proof().encode()),
    "manifest": (parse_manifest, MANIFEST),
}


def mutated(valid):
    """Return bytes near `valid`: cut, spliced, with bytes changed or inserted."""
    place = st.integers(0, len(valid))
    piece = st.binary(max_size=6) | st.sampled_from(
        [b"\n", b"\n\n", b" ", b"=", b"\xe2\x80\xa8", b"\\u0041", b"\\ud800", b'"', b"1e9", b"\0"]
    )
    splice = st.builds(lambda a, b, p: valid[:a] + p + valid[b:], place, place, piece)
    return st.binary(max_size=300) | splice


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_value_or_an_error_of_ours(name, data):
    parse, valid = PARSERS[name]
    parse(valid)
    content = data.draw(mutated(valid))
    try:
        parse(content)
    except AirgapError:
        return


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=400) | mutated(journal_line(NOTE.decode())))
def test_files_of_any_bytes_are_read_or_passed_over(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    found = last_checkpoint(path)
    assert found is None or found[1] <= len(content)
    assert load_frontier(path, KEY.vkey) is None


@settings(max_examples=150, deadline=None)
@given(content=mutated(NOTE))
def test_a_changed_note_is_never_verified_as_another_head(content):
    try:
        head = verify_checkpoint(parse_checkpoint(content), KEY.vkey)
    except AirgapError:
        return
    assert (head.origin, head.size, head.root) == (logs.ORIGIN, 600, TREE.root())


@settings(max_examples=150, deadline=None)
@given(content=mutated(RECEIPT.as_proof().encode()))
def test_a_changed_receipt_never_proves_something_else(content):
    try:
        receipt = parse_receipt(content)
        verify_receipt(receipt, KEY.vkey)
    except AirgapError:
        return
    assert (receipt.seq, receipt.leaf, receipt.size) == (77, LEAVES[77], 600)


@settings(max_examples=300, deadline=None)
@given(content=mutated(LINE))
def test_a_line_has_one_spelling(content):
    """What parses is what `encode` would write: no second form has the same meaning."""
    try:
        record = parse_line(content)
    except AirgapError:
        return
    assert encode(record) == content
    assert content.isascii()
    assert all(32 <= byte < 127 for byte in content)


text = st.text(alphabet=[chr(c) for c in range(0x20, 0x7F)], max_size=60)
whole = st.integers(0, 2**53 - 1)
subset = st.recursive(
    text | st.integers(-(2**53) + 1, 2**53 - 1) | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(string.ascii_lowercase, min_size=1, max_size=6), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=st.dictionaries(st.text(string.printable[:94], max_size=8), subset, max_size=6))
def test_in_our_subset_orjson_writes_rfc_8785(value):
    assert orjson.dumps(value, option=orjson.OPT_SORT_KEYS) == rfc8785.dumps(value)


@settings(max_examples=80, deadline=None)
@given(
    name=text.filter(bool).map(lambda t: t[:64]), label=text.map(lambda t: t[:64]), n=whole,
    rule=text, lat=whole,
)  # fmt: skip
def test_an_event_comes_back_from_its_line(name, label, n, rule, lat):
    event = Event(
        kind="inference",
        phase="intent",
        req=new_ulid(),
        actor=Actor(name, "r"),
        project="P",
        decision=DecisionRef("sha256:" + "a" * 64, "permit", rule),
        model=logs.MODEL,
        in_=Commit("c" * 64, n),
        label=label,
        lat_ms=lat,
        data={"n": n, "task": rule},
    )
    line = encode(event.fields(uid=7, auth="self") | OWNED)
    record = parse_line(line)
    assert record["actor"] == {"uid": 7, "auth": "self", "name": name, "role": "r"}
    assert record["in"] == {"commit": "c" * 64, "bytes": n}
    assert json.loads(line) == record
    for chosen in FORMATS.values():
        row = chosen.row("o", record, line, b"\1" * 32)
        assert row.count(b"\n") == 1


@settings(max_examples=100, deadline=None)
@given(cell=st.text(max_size=20))
def test_no_cell_starts_a_formula(cell):
    assert guard(cell)[:1] not in set("=+-@\t\r")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), start=st.integers(0, 600))
def test_the_edge_gives_the_trees_roots_and_the_newest_proofs(size, start):
    start = min(start, size - 1)
    edge = Edge()
    for leaf in LEAVES[:start]:
        edge.append(leaf)
    nodes, made = edge.nodes(), {}
    for leaf in LEAVES[start:size]:
        edge.append(leaf, made)
    assert edge.root() == TREE.root(size)
    known = (nodes | made).__getitem__
    for index in {start, (start + size) // 2, size - 1}:
        assert inclusion_path(index, size, known) == tuple(TREE.inclusion_proof(index, size))


@given(index=st.integers(0, 10**9))
def test_a_tile_name_leads_back_to_its_index(index):
    assert _tile_index(tile_name(0, index).split("/", 1)[1]) == index
    assert _tile_index(tile_name(3, index, 9).split("/", 1)[1]) == index
    assert tile_name(0, 1_234_067) == "0/x001/x234/067"


def test_every_kind_has_its_rules():
    assert set(RULES) == set(KINDS)


# -- the patterns that verification reads lines with ---------------------------------------------

_VALUES = {
    str: st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    int: st.integers(-(2**53), 2**53),
    bool: st.booleans(),
    list: st.lists(st.text('ab"\\ ,]}', max_size=4), max_size=3),
}
_ANY = st.sampled_from([1, -1, 0, True, "", "x", [], {}, 1.5, None, "sha256:" + "ab" * 32])


@st.composite
def near_records(draw):
    """Return a line that is a record, or close to one: fields missing, added or of other types."""
    kind = draw(st.sampled_from(KINDS))
    rule = RULES[kind]
    phase = draw(st.sampled_from([*rule.phases, *rule.phases, "event"]))
    digest = "sha256:" + "cd" * 32
    commit = {"bytes": 3, "commit": "ef" * 32}
    fields = dict(OWNED) | {"kind": kind, "phase": phase}
    some = {
        "actor": {"uid": 3, "auth": "self", "name": "jdoe", "role": "x"},
        "req": new_ulid(6, b"\2" * 10), "project": "P-1", "model": digest, "policy": digest,
        "decision": {"id": digest, "outcome": "permit", "rule": "R"}, "in": commit,
        "out": commit | {"sealed": digest}, "tok": {"in": 1, "out": 2}, "lat_ms": 5,
        "err": {"code": "audit.full"}, "label": "CUI", "part": 0, "src": "unix:pid=1",
        "data": {
            key: draw(_VALUES[rule.data[key]]) if draw(st.integers(0, 9)) else draw(_ANY)
            for key in rule.data if draw(st.booleans())
        },
    }  # fmt: skip
    fields |= {key: value for key, value in some.items() if draw(st.integers(0, 3))}
    if phase == "outcome" and "data" in fields:
        fields["data"]["result"] = draw(st.sampled_from(["complete", "failed", "odd"]))
    if draw(st.integers(0, 3)) == 0:
        fields[draw(st.sampled_from(sorted(fields)))] = draw(_ANY)
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def _agree(line):
    """Both readers say the same of a line."""
    try:
        record = parse_line(line)
    except AirgapError:
        with pytest.raises(AirgapError):
            read_line(line)
        return False
    found = read_line(line)
    assert (found.seq, found.prev.decode(), found.kind) == (
        record["seq"], record["prev"], record["kind"]
    )  # fmt: skip
    assert (found.phase, found.inst.decode()) == (record["phase"], record["inst"])
    assert (found.req.decode(), found.mono_ns) == (record.get("req", ""), int(record["mono_ns"]))
    assert [each.decode() for each in found.cited] == citations(record)
    assert [each.decode() for each in found.sealed] == sealed_payloads(record)
    return True


@settings(max_examples=500, deadline=None)
@given(line=near_records())
def test_the_patterns_accept_what_the_schema_accepts(line):
    _agree(line)


@settings(max_examples=400, deadline=None)
@given(line=near_records().flatmap(mutated) | mutated(LINE))
def test_the_patterns_refuse_what_the_schema_refuses(line):
    _agree(line)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_pattern_that_its_plainest_record_matches(kind):
    digest, commit = "sha256:" + "cd" * 32, {"bytes": 3, "commit": "ef" * 32}
    for phase in RULES[kind].phases:
        record = OWNED | {
            "kind": kind, "phase": phase, "req": new_ulid(6, b"\2" * 10), "project": "P-1",
            "actor": {"uid": 3, "auth": "self"}, "model": digest, "in": commit, "out": commit,
            "decision": {"id": digest, "outcome": "permit"}, "tok": {"in": 1, "out": 2}, "part": 0,
        }  # fmt: skip
        if phase == "outcome":
            record["data"] = {"result": "complete"}
        line = encode(record)
        assert _agree(line)
        assert (read_line(line).record is None) == (
            kind not in {"key.rotate", "prune", "spill.purge"}
        )


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 7])
def test_whole_tiles_give_the_tree_that_single_leaves_give(tiles):
    leaves = [hashlib.sha256(bytes([n % 251, n // 251])).digest() for n in range(256 * tiles + 9)]
    written, slow, made = {}, Edge(), {}
    one = Tiles(written.__setitem__)
    for leaf in leaves:
        slow.append(leaf, made)
    one.add(made)
    again, fast = {}, Edge()
    other = Tiles(again.__setitem__)
    for start in range(0, 256 * tiles, 256):
        made = {}
        fast.append_tile(leaves[start : start + 256], made)
        other.add_tile(leaves[start : start + 256], made)
    made = {}
    for leaf in leaves[256 * tiles :]:
        fast.append(leaf, made)
    other.add(made)
    assert (fast.size, fast.root()) == (slow.size, slow.root())
    assert again == written
    assert other.partial() == one.partial()
