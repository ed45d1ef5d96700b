"""The container: same input, same bytes; standard tools read it; the writer refuses errors."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import attacks
import bundles
import pytest

from bundle import archive, envelope
from bundle.manifest import canonical, parse_manifest
from bundle.media import open_medium
from bundle.tar import Layout, require_gaps
from bundle.verify import open_bundle, verify_bundle
from bundle.write import Member, write_archive
from policy.errors import AirgapError, RefusedError

TRUST = bundles.make_trust()
BASE = f"payload/{bundles.MODEL}/"
LONG = BASE + "d" * 100 + "/" + "n" * 100 + ".txt"
UNICODE = BASE + "Überblick-分子.txt"


def code_of(call):
    with pytest.raises(AirgapError) as caught:
        call()
    return caught.value.code


@pytest.fixture
def bundle(tmp_path):
    path = tmp_path / "a.agb"
    bundles.make_bundle(path)
    return path


def test_same_input_same_bytes(bundle, tmp_path):
    other = tmp_path / "elsewhere" / "b.agb"
    other.parent.mkdir()
    members = list(reversed(bundles.make_members()))
    sources = []
    for number, member in enumerate(members):  # other order, files in place of bytes
        place = tmp_path / f"source{number}"
        place.write_bytes(member.source)
        sources.append(Member(member.path, place, member.role, member.media_type))
    bundles.make_bundle(other, members=sources)
    assert other.read_bytes() == bundle.read_bytes()


def test_the_manifest_of_the_file_is_the_one_returned(tmp_path):
    path = tmp_path / "a.agb"
    manifest = bundles.make_bundle(path)
    with open_bundle(path, TRUST, now=bundles.NOW) as sealed:
        assert sealed.manifest == manifest
        assert sealed.digest == manifest.digest
        assert parse_manifest(canonical(manifest)) == manifest
        assert sealed.people == ("alice", "bob")
        raw = sealed.read("META/report.json")
        assert bytes(sealed.view("META/report.json")) == raw == b'{"findings":[]}'
        with pytest.raises(KeyError):
            sealed.read("META/none")


def test_signing_moves_no_byte(tmp_path):
    path = tmp_path / "a.agb"
    bundles.make_bundle(path, signers=("builder",))
    before = path.read_bytes()
    made = envelope.parse_envelope(before[512 : 512 + archive.ENVELOPE_SIZE])
    for name in ("alice", "bob"):
        made = envelope.add_signature(made, bundles.signer(name))
        open_medium(path).rewrite_envelope(made)
    after = path.read_bytes()
    assert len(after) == len(before)
    cut = 512 + archive.ENVELOPE_SIZE
    assert after[cut:] == before[cut:]
    assert verify_bundle(path, TRUST, now=bundles.NOW).seal.builder == "ben"


def test_only_a_bundle_gets_an_envelope(tmp_path):
    path = tmp_path / "a.agb"
    path.write_bytes(b"something else" * 50_000)
    made = envelope.Envelope(b"{}", "t", ())
    assert code_of(lambda: open_medium(path).rewrite_envelope(made)) == "archive.header"
    assert path.read_bytes() == b"something else" * 50_000
    bundles.make_bundle(path)
    assert code_of(lambda: open_medium(tmp_path / "none").rewrite_envelope(made)) == "host.io"


def test_standard_tools_read_it(bundle, tmp_path):
    listed = subprocess.run(["tar", "tf", bundle], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    names = listed.stdout.split()
    assert names[:5] == [
        "META/envelope.dsse.json",
        "META/trust.json",
        "META/manifest.json",
        "META/chunks.bin",
        "META/SHA256SUMS",
    ]
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "xf", bundle, "-C", out], check=True)
    summed = subprocess.run(
        ["sha256sum", "--strict", "-c", "META/SHA256SUMS"], cwd=out, capture_output=True, check=True
    )
    assert summed.stdout.count(b": OK\n") == len(names) - 5
    with tarfile.open(bundle) as tar:
        assert tar.getnames() == names
        assert {m.mode for m in tar} == {0o444}
        assert {m.uid for m in tar} == {0}


@pytest.mark.parametrize("tool", ["tar", "bsdtar"])
def test_long_and_foreign_names_survive(tool, tmp_path):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    path = tmp_path / "a.agb"
    extra = (Member(LONG, b"long", "document"), Member(UNICODE, b"unicode", "document"))
    bundles.make_bundle(path, members=bundles.make_members(extra=extra))
    with open_bundle(path, TRUST, now=bundles.NOW) as sealed:
        sealed.verify_body()
        assert sealed.read(LONG) == b"long"
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [tool, "-xf", path, "-C", out],
        check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    assert (out / LONG).read_bytes() == b"long"
    assert (out / UNICODE).read_bytes() == b"unicode"


def test_every_file_begins_at_a_page(bundle):
    raw = bundle.read_bytes()
    places = attacks.head_of(raw)
    start = places["body"][0]
    assert start % 4096 == 0
    assert len(raw) % 4096 == 0
    manifest = json.loads(raw[places[archive.MANIFEST][0] :][: places[archive.MANIFEST][1]])
    for entry in manifest["files"]:
        at = start + entry["offset"]
        assert at % 4096 == 0
        assert hashlib.sha256(raw[at : at + entry["size"]]).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 3072, 3583, 3584, 4095, 4096, 4097])
@pytest.mark.parametrize("path", [BASE + "a", LONG, UNICODE, BASE + "b" * 86])
def test_layout_aligns_any_size_and_any_name(size, path):
    layout = Layout([(BASE + "0", size), (path, size), (BASE + "zz", 1)])
    assert all(offset % 4096 == 0 for offset in layout.offsets)
    body = b"".join(layout.gap(i) + b"x" * layout.files[i][1] for i in range(3)) + layout.gap(3)
    assert len(body) == layout.size
    assert layout.size % 4096 == 0
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        assert [(m.name, m.size) for m in tar] == list(layout.files)
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    for number, piece in enumerate(pieces):
        require_gaps(layout, memoryview(piece), number * 1000)
    covered = sum(end - start for _, _, start, end in layout.spans(0, layout.size))
    assert covered == 2 * size + 1


def test_a_file_of_more_than_8_gib_gets_a_size_record():
    size = 9 * 2**30
    layout = Layout([(BASE + "big", size)])
    header = layout.header(0)
    assert b" size=%d\n" % size in header
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024)), mode="r:") as tar:
        assert tar.next().size == size


def test_any_changed_byte_of_a_gap_is_found():
    layout = Layout([(BASE + "a", 700), (LONG, 3)])
    for index in range(3):
        gap = layout.gap(index)
        start = layout._starts[index]
        for at in range(0, len(gap), 7):
            bad = bytearray(gap)
            bad[at] ^= 0xFF
            with pytest.raises(RefusedError) as caught:
                require_gaps(layout, memoryview(bad), start)
            assert caught.value.code.startswith("archive.")


def test_a_chunk_border_inside_a_header_hides_nothing():
    layout = Layout([(BASE + "a", 700), (BASE + "b", 3)])
    gap, start = layout.gap(1), layout._starts[1]
    for border in range(1, len(gap), 97):
        for at in (border - 1, border):
            bad = bytearray(gap)
            bad[at] ^= 1
            assert not accepts(layout, bad, start, border)
        assert accepts(layout, gap, start, border)


def accepts(layout, gap, start, border):
    """Tell whether a gap passes that comes in two pieces."""
    try:
        require_gaps(layout, memoryview(gap)[:border], start)
        require_gaps(layout, memoryview(gap)[border:], start + border)
    except RefusedError:
        return False
    return True


# -- the writer refuses -----------------------------------------------------------------------


def fails(tmp_path, code, **more):
    out = tmp_path / "x" / "a.agb"
    out.parent.mkdir(exist_ok=True)
    assert code_of(lambda: bundles.make_bundle(out, **more)) == code
    assert list(out.parent.iterdir()) == []


def test_a_source_that_changes_while_it_is_read_makes_no_bundle(tmp_path):
    members = bundles.make_members()
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10)
    lying = Member(BASE + "note.txt", source, "document", sha256="0" * 64)
    fails(tmp_path, "host.io", members=[*members, lying])


def test_a_source_that_holds_more_than_its_size_makes_no_bundle(tmp_path):
    source = Path("/proc/version")  # the system says that it has no bytes
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    member = Member(BASE + "n.txt", source, "document", sha256=digest)
    fails(tmp_path, "host.io", members=[*bundles.make_members(), member])


def test_what_the_reader_would_refuse_is_not_written(tmp_path):
    members = bundles.make_members()
    fails(tmp_path, "manifest.paths", members=[*members, Member("etc/x", b"", "document")])
    fails(tmp_path, "manifest.paths", members=[*members, Member(BASE + "NUL", b"", "document")])
    fails(tmp_path, "manifest.paths", members=[*members, members[0]])
    fails(tmp_path, "manifest.schema", members=members[1:][:-3])
    fails(tmp_path, "manifest.schema", expires=bundles.CREATED)
    fails(tmp_path, "manifest.schema", members=[*members, Member(BASE + "x.txt", b"", "report")])


def test_a_seal_that_fails_leaves_nothing(tmp_path):
    def seal(_):
        raise RefusedError("trust.keyfile", "locked")

    out = tmp_path / "a.agb"
    out.write_bytes(b"old")
    with pytest.raises(RefusedError):
        write_archive(
            out, bundles.make_release(), bundles.make_members(), trust_chain=b"{}", seal=seal
        )
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.agb"]


def test_an_interrupt_leaves_nothing(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(
            tmp_path / "a.agb",
            bundles.make_release(),
            bundles.make_members(),
            trust_chain=b"{}",
            seal=bundles.seal_with("builder"),
            progress=stop,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_trust_chain_that_is_too_long(tmp_path):
    with pytest.raises(RefusedError) as caught:
        write_archive(
            tmp_path / "a.agb",
            bundles.make_release(),
            bundles.make_members(),
            trust_chain=bytes(archive.TRUST_LIMIT + 1),
            seal=bundles.seal_with("builder"),
        )
    assert caught.value.code == "archive.limit"


# -- verification ------------------------------------------------------------------------------


def test_verification_writes_nothing_and_reports_progress(bundle, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    seen = []
    report = verify_bundle(
        bundle, TRUST, now=bundles.NOW, progress=lambda done, total: seen.append((done, total))
    )
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert seen[-1] == (report.manifest.body.size,) * 2
    document = report.as_document()
    assert json.loads(json.dumps(document)) == document
    assert document["approvers"] == ["alice", "bob"]
    assert document["bundle"] == str(report.digest)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_answer(bundle, workers):
    with open_bundle(bundle, TRUST, now=bundles.NOW) as sealed:
        sealed.verify_body(workers=workers)
    raw = bundle.read_bytes()
    bundle.write_bytes(attacks.flip(raw, len(raw) - 100_000))
    with open_bundle(bundle, TRUST, now=bundles.NOW) as sealed, pytest.raises(RefusedError):
        sealed.verify_body(workers=workers)


def test_an_interrupt_during_verification_ends_it(bundle):
    def stop(*_):
        raise KeyboardInterrupt

    with open_bundle(bundle, TRUST, now=bundles.NOW) as sealed, pytest.raises(KeyboardInterrupt):
        sealed.verify_body(progress=stop)


def test_a_large_file_is_viewed_and_not_read(tmp_path):
    path = tmp_path / "a.agb"
    bundles.make_bundle(path)
    with open_bundle(path, TRUST, now=bundles.NOW) as sealed:
        entry = sealed.manifest.find(BASE + "model.onnx_data")
        object.__setattr__(entry, "size", 1 << 40)
        assert code_of(lambda: sealed.read(entry.path)) == "archive.limit"
