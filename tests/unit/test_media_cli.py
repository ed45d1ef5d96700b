"""The commands for volumes, deltas and encryption, as a person gives them."""

import io
import shutil
import sys
from datetime import UTC, datetime, timedelta

import bundles
import pytest

from airgap import cli
from airgap.cli.forms import ask_for_disc, parse_size
from bundle import envelope, trust
from bundle.manifest import Base
from policy.errors import UsageError

NOW = datetime.now(UTC).replace(microsecond=0)
CHUNK = 4 * 1024 * 1024
SIZE = "4800kB"


@pytest.fixture
def words(capsys):
    def run(*argv):
        capsys.readouterr()
        assert cli.invoke([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trust root and two releases of which the second succeeds the first."""
    folder = tmp_path_factory.mktemp("made")
    old = bundles.ENROLLED
    try:
        bundles.ENROLLED = NOW - timedelta(days=30)
        roots = bundles.make_trust()
    finally:
        bundles.ENROLLED = old
    trust.save_trust(roots, folder / "root" / "trust")
    dates = {
        "created": NOW - timedelta(days=1),
        "not_before": NOW - timedelta(days=1),
        "expires": NOW + timedelta(days=30),
    }

    def weights(*seeds):
        return b"".join(bundles.make_weights(CHUNK, seed=seed) for seed in seeds)

    # Registered as this project's own model, so that the packaged rules admit it.
    licence = {"spdx": "Apache-2.0", "text_digest": "sha256:" + "1" * 64, "status": "declared"}
    found = {"spdx": "Apache-2.0", "place": "LICENSE", "sha256": "1" * 64, "status": "verified"}
    name = "logos-ref-tiny"
    model = {"id": name, "source": f"local:{name}", "licence": licence, "licences_found": [found]}

    def make(path, blocks, **more):
        return bundles.make_bundle(
            path,
            roots=roots,
            members=bundles.make_members(weights(*blocks), model=name),
            model=model,
            **dates,
            **more,
        )

    one = make(folder / "one.agb", (1, 2, 3))
    base = Base(bundle_id="tiny-line", manifest_digest=str(one.digest))
    make(folder / "two.agb", (1, 7, 3), base=base, epoch=2, version="2.0")
    return folder


@pytest.fixture
def volumes(made, tmp_path, call):
    status, document = call(
        *("split", made / "one.agb", "--volume-size", SIZE),
        *("--parity", 1, "-o", tmp_path / "set"),
    )
    assert status == 0
    assert (document["data"], document["parity"]) == (4, 1)
    assert all(item["bytes"] <= 4_800_000 for item in document["volumes"])
    return tmp_path / "set"


def verify(call, made, path, *more):
    return call("verify", path, "--root", made / "root", *more)


def test_split_verify_repair_join(made, volumes, call, words, tmp_path):
    assert verify(call, made, volumes)[1]["medium"]["count"] == 4
    (volumes / "one.agb.002").unlink()
    text = words("verify", volumes / "one.agb.001", "--root", made / "root")
    assert "repaired     volume 2: 1 chunks, from parity" in text
    (volumes / "one.agb.005").rename(tmp_path / "one.agb.005")
    status, document = verify(call, made, volumes)
    assert (status, document["code"]) == (1, "volume.missing")
    assert "volume 2 of 4" in document["error"]
    assert verify(call, made, volumes, "--volume", tmp_path / "one.agb.005")[0] == 0
    (tmp_path / "one.agb.005").rename(volumes / "one.agb.005")
    status, document = call("repair", volumes)
    assert (status, [path[-3:] for path in document["written"]]) == (0, ["002"])
    assert "nothing had to be repaired" in words("repair", volumes / "one.agb.001")
    assert call("join", volumes, "-o", tmp_path / "j.agb")[0] == 0
    assert (tmp_path / "j.agb").read_bytes() == (made / "one.agb").read_bytes()
    status, document = call("repair", made / "one.agb")
    assert document["code"] == "volume.set"


def test_bad_parity_is_told(made, volumes, words):
    path = volumes / "one.agb.005"
    raw = bytearray(path.read_bytes())
    raw[-100_000] ^= 1
    path.write_bytes(raw)
    text = words("verify", volumes, "--root", made / "root")
    assert "volume 5 of parity is missing or damaged" in text


def test_delta(made, call, words, tmp_path):
    small = tmp_path / "two.delta.agb"
    assert "result" in words("delta", made / "two.agb", "--base", made / "one.agb", "-o", small)
    assert small.stat().st_size < (made / "two.agb").stat().st_size / 2
    assert verify(call, made, small)[1]["code"] == "delta.base"
    status, document = verify(call, made, small, "--base", made / "one.agb")
    assert (status, document["medium"]["form"]) == (0, "delta")
    text = words("verify", small, "--base", made / "one.agb", "--root", made / "root")
    assert "delta of 4," in text
    status, document = call("delta", made / "one.agb", "--base", made / "two.agb", "-o", small)
    assert document["code"] == "delta.base"


def test_encrypt_and_decrypt(made, call, words, tmp_path):
    status, key = call("keys", "transit", "lab", "--out", tmp_path)
    assert (status, key["scheme"]) == (0, "mlkem768-x25519")
    (tmp_path / "phrase").write_text("correct horse\n")
    locked = ("--passphrase-file", tmp_path / "phrase")
    status, second = call(
        "keys", "transit", "gov", "--profile", "cnsa2", "--out", tmp_path, *locked
    )
    assert (status, second["scheme"]) == (0, "mlkem1024-p384")
    assert call("keys", "transit", "x", "--profile", "rot13")[1]["code"] == "usage.argument"
    assert "key id" in words("keys", "transit", "third", "--out", tmp_path)
    to = ("--to", tmp_path / "lab.transit.pub.json", "--to", tmp_path / "gov.transit.pub.json")
    assert "encrypted" in words("encrypt", made / "one.agb", "-o", tmp_path, *to)
    path = tmp_path / "one.agb.enc"
    assert verify(call, made, path)[1]["code"] == "transit.key"
    assert verify(call, made, path, "--transit-key", tmp_path / "lab.transit.pem")[0] == 0
    mine = ("--transit-key", tmp_path / "gov.transit.pem", *locked)
    assert verify(call, made, path, *mine)[0] == 0
    assert call("decrypt", path, *mine)[0] == 0
    assert (tmp_path / "one.agb").read_bytes() == (made / "one.agb").read_bytes()
    assert call("decrypt", tmp_path / "one.agb", *mine)[1]["code"] == "usage.argument"
    shutil.copy(made / "one.agb", tmp_path / "no.enc")
    assert call("decrypt", tmp_path / "no.enc", *mine)[1]["code"] == "transit.malformed"


def lab(made, tmp_path):
    from test_install_cli import with_site

    root = tmp_path / "lab"
    shutil.copytree(made / "root", root, symlinks=True)
    return with_site(root)


def test_discs_and_a_delta_are_installed(made, volumes, call, tmp_path):
    root = lab(made, tmp_path)
    (volumes / "one.agb.005").unlink()
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (volumes / "one.agb.003").rename(shelf / "one.agb.003")
    status, document = call("install", volumes, "--root", root)
    assert (status, document["code"]) == (1, "volume.missing")
    status, document = call("install", volumes, "--discs", "--root", root)
    assert document["code"] == "volume.missing"  # there is no terminal to ask on
    status, document = call("install", shelf, "--root", root)
    assert (status, document["resumed_chunks"]) == (0, 3)
    assert (
        call("delta", made / "two.agb", "--base", document["folder"], "-o", tmp_path / "d")[0] == 0
    )
    status, document = call("install", tmp_path / "d", "--root", root)
    assert (status, document["version"]) == (0, "2.0")


def test_who_sits_at_a_terminal_is_asked_for_the_disc(volumes, monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def answer(text):
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        return ask_for_disc(3, 4)

    assert answer("\n") == []
    assert len(answer(f"{tmp_path}/nowhere\n{volumes}\n")) == 5
    assert answer(f"{volumes}/one.agb.003\n")[0] == volumes / "one.agb.003"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.7GB", 4_700_000_000), ("25GiB", 25 << 30), ("700 MB", 700_000_000), ("1000", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4,7GB", "4.7 G B", "1iB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_a_draft_is_signed_in_every_volume(tmp_path, call):
    """`airgap sign` takes a set: any volume, or its folder."""
    pytest.importorskip("onnxruntime")
    from bundle.media import open_medium
    from bundle.staging.sign import read_draft, sign

    draft = tmp_path / "draft.agb"
    members = bundles.make_members(bundles.make_weights(2 * CHUNK))
    members.append(bundles.Member("META/policy/admission.json", b'{"outcome":"permit"}', "policy"))
    bundles.make_bundle(draft, members=members, signers=("builder",))
    assert call("split", draft, "--volume-size", SIZE, "-o", tmp_path / "set")[0] == 0
    roots = bundles.make_trust()
    for who in ("alice", "bob"):
        read = read_draft(tmp_path / "set")
        tally = sign(read, roots, bundles.signer(who), confirmation="tiny", now=bundles.NOW)
    assert tally.complete
    for path in (tmp_path / "set").iterdir():
        medium = open_medium(path)
        found = envelope.parse_envelope(medium.head.envelope)
        assert len(found.signatures) == 3
        medium.close()
