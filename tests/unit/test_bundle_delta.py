"""Deltas: only what changed travels, the result is the full bundle, a wrong base is refused."""

import json
import shutil
from pathlib import Path

import attacks
import bundles
import pytest

from airgap.install import Store, install
from airgap.install.quarantine import make_writable
from bundle import trust
from bundle.delta import BundleBase, InstalledBase, write_delta
from bundle.manifest import Base
from bundle.media import Help, open_medium
from bundle.split import join
from bundle.verify import verify_bundle
from bundle.write import Member
from policy.errors import AirgapError

TRUST = bundles.make_trust()
CHUNK = attacks.CHUNK


def weights(*seeds):
    return b"".join(bundles.make_weights(CHUNK, seed=n) for n in seeds) + b"tail" * 1000


def make(path, members, base=None, **more):
    if base is not None:
        more["base"] = Base(bundle_id="tiny-line", manifest_digest=str(base.digest))
    return bundles.make_bundle(path, members=members, **more)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Three releases: two is one with a changed block in the middle, three is unrelated to both."""
    folder = tmp_path_factory.mktemp("line")
    note = Member("META/evidence/two.txt", b"# two\n", "evidence")
    one = make(folder / "one.agb", bundles.make_members(weights(1, 2, 3, 4)))
    make(
        folder / "two.agb",
        bundles.make_members(weights(1, 9, 3, 4), extra=(note,)),
        one,
        version="2.0",
        epoch=2,
    )
    make(folder / "other.agb", bundles.make_members(weights(5, 6)), version="1.5")
    delta(folder / "two.agb", folder / "one.agb", folder / "two.delta.agb")
    return folder


def delta(new, base, out):
    medium, older = open_medium(new), open_medium(base)
    try:
        return write_delta(medium, BundleBase(older), out)
    finally:
        medium.close()
        older.close()


def base_of(path):
    return lambda digest: (
        found if (found := BundleBase(open_medium(path))).manifest.digest == digest else None
    )


def open_digest(path):
    medium = open_medium(path)
    medium.close()
    return trust.Digest.of(medium.head.manifest)


def verify(path, base=None):
    more = Help() if base is None else Help(find_base=base_of(base))
    return verify_bundle(path, TRUST, now=bundles.NOW, more=more)


def refusal(call, *args, **more):
    with pytest.raises(AirgapError) as caught:
        call(*args, **more)
    return caught.value


class Yes:
    permitted = True
    canonical = b"{}"
    digest = bundles.trust.Digest.of(b"{}")


def bring_in(path, root, **more):
    return install(
        path,
        root=root,
        now=bundles.NOW,
        gate=lambda *_: Yes(),
        audit=lambda event: event,
        **more,
    )


@pytest.fixture
def root(tmp_path):
    trust.save_trust(TRUST, tmp_path / "root" / "trust")
    return tmp_path / "root"


def test_the_result_is_the_full_bundle(line, tmp_path):
    full, small = line / "two.agb", line / "two.delta.agb"
    report, wanted = verify(small, line / "one.agb"), verify(full)
    assert (report.digest, report.seal, report.scan) == (wanted.digest, wanted.seal, wanted.scan)
    assert report.medium["form"] == "delta"
    assert small.stat().st_size < full.stat().st_size / 3
    assert CHUNK < report.medium["new_bytes"] < CHUNK + 100_000
    medium = open_medium(small, Help(find_base=base_of(line / "one.agb")))
    join(medium, tmp_path / "again.agb")
    medium.close()
    assert (tmp_path / "again.agb").read_bytes() == full.read_bytes()


def test_a_full_bundle_that_names_a_base_needs_none(line):
    assert verify(line / "two.agb").manifest.base is not None


def test_making_it_twice_gives_the_same_bytes(line, tmp_path):
    delta(line / "two.agb", line / "one.agb", tmp_path / "d.agb")
    assert (tmp_path / "d.agb").read_bytes() == (line / "two.delta.agb").read_bytes()


def test_standard_tools_list_it(line):
    import subprocess

    done = subprocess.run(
        ["tar", "tf", line / "two.delta.agb"], check=True, capture_output=True, text=True
    )
    assert done.stdout.split()[-2:] == ["META/delta.json", "DELTA/new.bin"]


def test_install_on_the_installed_base(line, root):
    first = bring_in(line / "one.agb", root)
    done = bring_in(line / "two.delta.agb", root)
    assert done.bundle.digest == verify(line / "two.agb").digest
    assert Store(root / "store").current() == done.bundle
    assert done.previous == first.bundle.digest
    folder = done.bundle.model_folder("tiny")
    assert (folder / "model.onnx_data").read_bytes() == weights(1, 9, 3, 4)
    assert InstalledBase(done.bundle.folder).manifest == done.bundle.manifest


def test_no_base_no_install(line, root):
    error = refusal(bring_in, line / "two.delta.agb", root)
    assert error.code == "delta.base"
    assert Store(root / "store").unfinished() == ()
    bring_in(line / "other.agb", root)
    assert refusal(bring_in, line / "two.delta.agb", root).code == "delta.base"
    assert refusal(verify, line / "two.delta.agb", line / "other.agb").code == "delta.base"
    assert refusal(verify, line / "two.delta.agb").code == "delta.base"


def test_an_altered_base_is_named(line, root):
    done = bring_in(line / "one.agb", root)
    make_writable(done.bundle.folder)
    data = done.bundle.model_folder("tiny") / "model.onnx_data"
    raw = bytearray(data.read_bytes())
    raw[3 * CHUNK + 7] ^= 1
    data.write_bytes(raw)
    error = refusal(bring_in, line / "two.delta.agb", root)
    assert error.code == "delta.base"
    assert "model.onnx_data" in error.message
    data.unlink()
    assert refusal(bring_in, line / "two.delta.agb", root).code == "delta.base"
    assert Store(root / "store").current() == done.bundle


def test_a_base_whose_manifest_is_damaged(line, root):
    done = bring_in(line / "one.agb", root)
    make_writable(done.bundle.folder)
    manifest = done.bundle.folder / "META" / "manifest.json"
    for raw in (b"{}", manifest.read_bytes().replace(b'"epoch":1', b'"epoch":2')):
        manifest.write_bytes(raw)
        assert refusal(bring_in, line / "two.delta.agb", root).code == "delta.base"


def test_a_revoked_base_is_none(line):
    from test_revocations import make_list, make_trust

    roots = make_trust()
    listed = trust.accept_revocations(
        roots, make_list(bundles={str(open_digest(line / "one.agb")): "stolen"})
    )
    base = base_of(line / "one.agb")
    more = Help(find_base=base)
    other = trust.accept_revocations(roots, make_list(bundles={"sha256:" + "0" * 64: "stolen"}))
    verify_bundle(line / "two.delta.agb", other, now=bundles.NOW, more=more)
    verify_bundle(line / "two.agb", listed, now=bundles.NOW)  # the full bundle needs no base
    error = refusal(verify_bundle, line / "two.delta.agb", listed, now=bundles.NOW, more=more)
    assert error.code == "trust.revoked"


def test_an_install_of_a_delta_resumes(line, root):
    bring_in(line / "one.agb", root)

    def stop(done, _):
        if done > 2 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring_in(line / "two.delta.agb", root, progress=stop)
    done = bring_in(line / "two.delta.agb", root)
    assert 1 <= done.resumed < done.bundle.manifest.body.leaves


def altered(path, tmp_path, change):
    raw = path.read_bytes()
    start = raw.index(b"META/delta.json") // 4096 * 4096 + 4096
    size = int(raw[start - 512 + 124 : start - 512 + 135], 8)
    facts = json.loads(raw[start : start + size])
    new = raw[raw.index(b"DELTA/new.bin") + 512 :][: facts["new"]]
    change(facts)
    text = attacks.canonical_json(facts)
    head = raw[: attacks.head_of(raw)["body"][0]]
    layout = attacks.tar.Layout([("META/delta.json", len(text)), ("DELTA/new.bin", len(new))])
    out = tmp_path / "altered.agb"
    out.write_bytes(head + layout.gap(0) + text + layout.gap(1) + new + layout.gap(2))
    return out


def runs_of(facts, name="model.onnx_data"):
    return next(f["runs"] for f in facts["files"] if f["path"].endswith(name))


def another_offset(facts):
    runs_of(facts)[0]["offset"] = CHUNK


def another_file(facts):
    runs_of(facts)[0]["base"] = "payload/tiny/tokenizer.json"


def outside(facts):
    runs_of(facts)[0]["offset"] = 1 << 40


def shorter(facts):
    runs_of(facts)[0]["size"] -= 1


def empty_run(facts):
    runs_of(facts).append({"size": 0})


def half_a_run(facts):
    del runs_of(facts)[0]["offset"]


def more_new(facts):
    runs_of(facts)[0] = {"size": runs_of(facts)[0]["size"]}


def file_dropped(facts):
    facts["files"].pop()


def extra_field(facts):
    facts["trusted"] = True


def another_base(facts):
    facts["base"] = "sha256:" + "0" * 64


def another_result(facts):
    facts["result"] = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (another_offset, "chunk.leaf"),
        (another_file, "delta.malformed"),
        (outside, "delta.malformed"),
        (shorter, "delta.malformed"),
        (empty_run, "delta.malformed"),
        (half_a_run, "delta.malformed"),
        (more_new, "delta.malformed"),
        (file_dropped, "delta.malformed"),
        (extra_field, "delta.malformed"),
        (another_base, "delta.base"),
        (another_result, "delta.base"),
    ],
)
def test_a_delta_that_lies(change, code, line, tmp_path):
    path = altered(line / "two.delta.agb", tmp_path, lambda _: None)
    assert path.read_bytes() == (line / "two.delta.agb").read_bytes()
    verify(path, line / "one.agb")
    path = altered(line / "two.delta.agb", tmp_path, change)
    error = refusal(verify, path, line / "one.agb")
    assert error.code == code, error.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw[:-1], "archive.truncated"),
        (lambda raw: raw[:-8192], "archive.truncated"),
        (lambda raw: raw + b"\0", "archive.trailing"),
        (lambda raw: attacks.flip(raw, len(raw) - 200_000), "chunk.leaf"),
        (lambda raw: attacks.flip(raw, len(raw) - 1), "archive.padding"),
        (lambda raw: raw.replace(b"DELTA/new.bin", b"DELTA/new.bim"), "archive.name"),
        (lambda raw: attacks.flip(raw, 512 + 300), "seal.threshold"),
    ],
)
def test_a_delta_that_was_damaged(change, code, line, tmp_path):
    path = tmp_path / "d.agb"
    path.write_bytes(change((line / "two.delta.agb").read_bytes()))
    error = refusal(verify, path, line / "one.agb")
    assert error.code == code, error.message


def test_only_the_release_that_was_named_is_a_base(line, tmp_path):
    out = tmp_path / "d.agb"
    assert refusal(delta, line / "two.agb", line / "other.agb", out).code == "delta.base"
    assert refusal(delta, line / "other.agb", line / "one.agb", out).code == "delta.base"
    bad = tmp_path / "bad.agb"
    raw = (line / "two.agb").read_bytes()
    bad.write_bytes(attacks.flip(raw, len(raw) - 1_000_000))
    assert refusal(delta, bad, line / "one.agb", out).code == "chunk.leaf"
    assert [path.name for path in tmp_path.iterdir()] == ["bad.agb"]


def test_blocks_are_found_in_any_file_of_the_base(line, tmp_path):
    """A folder renamed costs nothing."""
    one = verify(line / "one.agb").manifest
    members = bundles.make_members(weights(1, 2, 3, 4), model="renamed")
    model = {"id": "renamed"}
    make(tmp_path / "n.agb", members, one, model=model, version="3", epoch=3)
    facts = delta(tmp_path / "n.agb", line / "one.agb", tmp_path / "d.agb")
    assert facts.new < 20_000
    assert verify(tmp_path / "d.agb", line / "one.agb").manifest.version == "3"


def test_an_installed_folder_serves_as_a_base(line, root, tmp_path):
    done = bring_in(line / "one.agb", root)
    copy = Path(shutil.copytree(done.bundle.folder, tmp_path / "copy"))
    medium = open_medium(line / "two.agb")
    write_delta(medium, InstalledBase(copy), tmp_path / "d.agb")
    medium.close()
    assert (tmp_path / "d.agb").read_bytes() == (line / "two.delta.agb").read_bytes()
    make_writable(copy)
