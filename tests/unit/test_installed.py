"""`airgap inspect` of an installed release: nothing is said that was not checked at this moment."""

import json
import shutil

import pytest
from lab_trees import make_lab, make_sealed, make_staging, run

from airgap.cli.installed import _weights_text
from bundle.canonical import canonical_json
from bundle.envelope import ENVELOPE_SIZE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("installed")
    staging = make_staging(base / "staging")
    lab = make_lab(staging, base / "lab")
    assert run("install", make_sealed(staging, base / "tiny.agb"), "--root", lab) == 0
    return lab


@pytest.fixture
def lab(made, tmp_path):
    shutil.copytree(made, tmp_path / "lab", symlinks=True)
    return tmp_path / "lab"


def inspect(capsys, lab, name="tiny-line"):
    capsys.readouterr()
    status = run("inspect", name, "--root", lab, "--json")
    out = capsys.readouterr().out
    return status, json.loads(out)


def release(lab):
    (folder,) = (lab / "store" / "installed").iterdir()
    folder.chmod(0o700)
    (folder / "META").chmod(0o700)
    return folder


def replace(path, raw):
    path.chmod(0o600)
    path.write_bytes(raw)


def weights(folder):
    files = [path for path in (folder / "payload").rglob("*") if path.is_file()]
    found = max(files, key=lambda path: path.stat().st_size)
    found.parent.chmod(0o700)
    return found


def alter_weights(folder):
    path = weights(folder)
    raw = path.read_bytes()
    replace(path, raw[:-1] + bytes([raw[-1] ^ 1]))


def take_weights(folder):
    weights(folder).unlink()


def add_a_file(folder):
    (folder / "more").write_bytes(b"x")


def no_seal(folder):
    (folder / "META/envelope.dsse.json").unlink()


def one_signature(folder):
    path = folder / "META/envelope.dsse.json"
    value = json.loads(path.read_bytes())
    value["signatures"] = value["signatures"][:1]  # the builder's, or that of one of two
    replace(path, canonical_json(value))


def no_json(folder):
    replace(folder / "META/envelope.dsse.json", b"{")


def too_long(folder):
    replace(folder / "META/envelope.dsse.json", b" " * (ENVELOPE_SIZE + 1))


ALTERED = {
    "weights altered": (alter_weights, "start.digest"),
    "weights taken away": (take_weights, "start.digest"),
    "a file more": (add_a_file, "start.digest"),
    "no seal": (no_seal, "host.io"),
    "too few people": (one_signature, "seal."),
    "a seal that is none": (no_json, "seal.malformed"),
    "a seal without end": (too_long, "start.digest"),
}


@pytest.mark.parametrize(("alter", "code"), ALTERED.values(), ids=ALTERED)
def test_of_an_altered_release_nothing_is_told(lab, capsys, alter, code):
    status, document = inspect(capsys, lab)
    assert (status, document["verdict"]) == (0, "sealed and whole")
    alter(release(lab))
    status, document = inspect(capsys, lab)
    assert status > 0
    assert document["code"].startswith(code), document
    assert "verdict" not in document


def test_a_release_is_found_by_name_and_folder_and_nothing_else_is_taken_for_one(lab, capsys):
    _, document = inspect(capsys, lab)
    assert inspect(capsys, lab, release(lab)) == (0, document)
    assert inspect(capsys, lab, document["bundle"].removeprefix("sha256:")) == (0, document)
    for other, code in (("nobody", "store.missing"), (lab / "nobody", "source.missing")):
        assert inspect(capsys, lab, other)[1]["code"] == code
    bare = lab / "bare"
    bare.mkdir()
    assert inspect(capsys, bare, "nobody")[1]["code"] == "source.missing"
    assert inspect(capsys, lab, bare)[1]["code"] != "store.missing"


def test_a_copy_of_a_release_elsewhere_is_none(lab, capsys):
    copied = lab / "copy"
    shutil.copytree(release(lab), copied)
    status, document = inspect(capsys, lab, copied)
    assert (status, document["code"]) == (1, "store.missing")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"files": []}, "converted"),
        ({"files": [{"path": "w", "sha256": "0"}], "weights": "source"}, "the source's own bytes"),
        ({"files": [{"path": "w", "sha256": "0"}], "weights": "publisher"}, "publisher's bytes"),
        ({"files": [{}] * 3, "weights": "publisher"}, "publisher's bytes, unchanged: 3 files"),
    ],
)
def test_whose_the_bytes_are_is_said_as_far_as_it_is_proven(model, text):
    assert _weights_text(model).startswith(text)
