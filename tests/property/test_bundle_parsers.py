"""For any bytes and any JSON value, a parser of this room returns or raises our own error."""

import json
import tempfile
import unicodedata
from pathlib import Path

import attacks
import bundles
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle import (
    canonical,
    delta,
    envelope,
    graphs,
    keys,
    manifest,
    statement,
    tar,
    transit,
    trust,
    volumes,
)
from bundle.source import PlainFile
from bundle.verify import open_bundle, verify_bundle
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

TRUST = bundles.make_trust()
RELAXED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "sha256:" + "0" * 64, "2026-01-01T00:00:00Z", "L1", "airgap-bundle/1"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
PARSERS = {
    "envelope": envelope.parse_envelope,
    "graphs": graphs.parse_graphs,
    "import root": lambda raw: trust.import_root(raw, Digest.of(raw)),
    "manifest": manifest.parse_manifest,
    "public key": keys.parse_public_key,
    "root": trust.parse_root,
    "statement": statement.parse_statement,
    "transit header": transit.parse_header,
    "transit key": transit.parse_transit_key,
    "trust chain": lambda raw: trust.follow_chain(TRUST, raw),
    "volume": lambda raw: volumes.parse_volume(raw, Path("tiny.agb.001")),
    "delta": delta.parse_delta,
}
GOOD = {}


def setup_module():
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "good.agb"
        bundles.make_bundle(path, members=bundles.make_members(bundles.make_weights(65536)))
        raw = path.read_bytes()
    forge = attacks.Forge.of(raw)
    entry = attacks.entry_of(forge, attacks.GRAPHS)
    made = canonical.canonical_json(forge.manifest)
    digest = "sha256:" + "0" * 64
    run = {"base": "payload/tiny/config.json", "offset": 0, "size": 7}
    facts = {"format": "airgap-delta/1", "base": digest, "result": digest, "new": 5}
    facts["files"] = [{"path": "META/SHA256SUMS", "runs": [run, {"size": 5}]}]
    part = {"format": "airgap-volume/1", "set": digest, "index": 1}
    with tempfile.TemporaryDirectory() as name:
        key = transit.new_transit_key(Path(name), "lab")
        path = Path(name) / "plain"
        path.write_bytes(b"plain")
        header = transit.encrypt_file(PlainFile(path), Path(name) / "x.enc", [key])
    GOOD.update(
        {
            "delta": canonical.canonical_json(facts),
            "transit header": header.to_bytes(),
            "transit key": key.to_bytes(),
            "volume": canonical.canonical_json({**part, "count": 3, "parity": 1, "chunks": 2}),
            "bundle": raw,
            "envelope": raw[512 : 512 + 131_072],
            "graphs": bytes(forge.body[entry["offset"] : entry["offset"] + entry["size"]]),
            "import root": TRUST.chain[0].to_bytes(),
            "manifest": made,
            "public key": bundles.public("alice").to_bytes(),
            "root": TRUST.document.to_bytes(),
            "statement": canonical.canonical_json(forge.make_statement(made)),
            "trust chain": forge.trust,
        }
    )


def returns_or_refuses(parse, raw):
    """Run a parser; any other outcome than a value or our error fails the test."""
    try:
        parse(raw)
    except AirgapError as error:
        assert error.hint is not None  # noqa: PT017 - either outcome is right
        return False
    return True


@pytest.mark.parametrize("name", PARSERS)
def test_the_untouched_document_passes(name):
    if name != "import root":  # its fingerprint is that of the payload, not of these bytes
        assert returns_or_refuses(PARSERS[name], GOOD[name])


@pytest.mark.parametrize("name", PARSERS)
@RELAXED
@given(raw=st.binary(max_size=300))
def test_any_bytes(name, raw):
    returns_or_refuses(PARSERS[name], raw)


@pytest.mark.parametrize("name", PARSERS)
@RELAXED
@given(value=JSON)
def test_any_json(name, value):
    try:
        raw = canonical.canonical_json(value)
    except ValueError:
        raw = json.dumps(value).encode()
    assert not returns_or_refuses(PARSERS[name], raw)


def places_of(value, path=()):
    """Yield the path of every value inside a document."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from places_of(item, (*path, key))


def put(value, path, new):
    """Return a copy of a document with another value at one place."""
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = put(value[path[0]], path[1:], new)
    return made


@pytest.mark.parametrize("name", PARSERS)
@RELAXED
@given(data=st.data())
def test_any_json_value_in_any_field(name, data):
    good = json.loads(GOOD[name])
    path = data.draw(st.sampled_from(list(places_of(good))))
    made = put(good, path, data.draw(JSON))
    try:
        raw = canonical.canonical_json(made)
    except ValueError:
        raw = json.dumps(made).encode()
    returns_or_refuses(PARSERS[name], raw)


@RELAXED
@given(data=st.data())
def test_any_value_in_a_sealed_manifest_is_refused_or_changes_nothing(data, tmp_path):
    forge = attacks.Forge.of(GOOD["bundle"])
    path = data.draw(st.sampled_from([p for p in places_of(forge.manifest) if p]))
    made = put(forge.manifest, path, data.draw(JSON))
    try:
        forge.raw_manifest = canonical.canonical_json(made)
    except ValueError:
        forge.raw_manifest = json.dumps(made).encode()
    out = tmp_path / "x.agb"
    out.write_bytes(forge.assemble())
    if returns_or_refuses(lambda p: verify_bundle(p, TRUST, now=bundles.NOW), out):
        assert made == {**forge.manifest, path[0]: made[path[0]]}


@RELAXED
@given(data=st.data())
def test_any_edit_of_a_bundle_is_refused(data, tmp_path):
    raw = bytearray(GOOD["bundle"])
    end = attacks.head_of(bytes(raw))["body"][0]
    kind = data.draw(st.sampled_from(["set", "cut", "insert", "delete", "swap"]))
    at = data.draw(st.integers(0, end - 1) | st.integers(0, len(raw) - 1))
    size = data.draw(st.integers(1, 2048))
    if kind == "set":
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    elif kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "delete":
        del raw[at : at + size]
    else:
        raw[at : at + size], raw[:size] = raw[:size], raw[at : at + size]
    out = tmp_path / "x.agb"
    out.write_bytes(raw)
    passes = returns_or_refuses(lambda p: verify_bundle(p, TRUST, now=bundles.NOW), out)
    assert passes == (bytes(raw) == GOOD["bundle"])
    assert [item.name for item in tmp_path.iterdir()] == ["x.agb"]


@RELAXED
@given(raw=st.binary(max_size=4096))
def test_any_file_is_a_bundle_or_refused(raw, tmp_path):
    out = tmp_path / "x.agb"
    out.write_bytes(raw)
    with pytest.raises(RefusedError) as caught:
        open_bundle(out, TRUST, now=bundles.NOW)
    assert caught.value.code in {"archive.truncated", "archive.header", "archive.type"}


PATHS = st.lists(
    st.sampled_from([*"aA.b/ \\:\n", "é", "e\u0301", "\u202e", "\ud800", "ß", "SS"]),
    min_size=1,
    max_size=12,
).map("".join)


@RELAXED
@given(paths=st.lists(PATHS, max_size=4))
def test_accepted_paths_are_distinct_on_every_host(paths):
    try:
        manifest.require_paths(paths)
    except RefusedError as error:
        assert error.code == "manifest.paths"  # noqa: PT017 - either outcome is right
        return
    folded = {unicodedata.normalize("NFC", p.casefold()) for p in paths}
    assert len(folded) == len(paths)
    for path in paths:
        assert not path.startswith("/")
        assert ".." not in path.split("/")
        assert "\\" not in path


@RELAXED
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=6),
    piece=st.integers(100, 20_000),
)
def test_layout_covers_every_byte_once(sizes, piece):
    layout = tar.Layout([(f"payload/m/{i}", size) for i, size in enumerate(sizes)])
    covered = bytearray(layout.size)
    for low in range(0, layout.size, piece):
        high = min(low + piece, layout.size)
        for start, gap, _ in layout.gaps(low, high):
            for at in range(max(start, low), min(start + len(gap), high)):
                covered[at] += 1
        for _, _, start, end in layout.spans(low, high):
            assert low <= start < end <= high
            for at in range(start, end):
                covered[at] += 1
    assert set(covered) == {1}


@RELAXED
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
        max_leaves=10,
    )
)
def test_canonical_json_returns_what_went_in(value):
    try:
        raw = canonical.canonical_json(value)
    except (ValueError, UnicodeError):
        return  # a lone surrogate has no form
    found = canonical.parse_canonical(raw, code="manifest.canonical", what="it", limit=1 << 20)
    assert found == value
