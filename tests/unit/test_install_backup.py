"""Backup and restore: what comes back is what was there, and the log goes on and can show it."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
from datetime import UTC, datetime

import kills
import lab_trees
import pytest
from lab_trees import run

from airgap.audit import load_ring, verify_log
from airgap.audit.layout import Layout, read_lines
from airgap.audit.site import open_own_log
from airgap.config import load_site
from airgap.install import Store, backup, verify_installed
from bundle.canonical import canonical_json
from bundle.source import PlainFile
from bundle.tar import Layout as TarLayout
from bundle.transit import (
    TransitFile,
    encrypt_file,
    load_identity,
    new_transit_key,
    parse_transit_key,
)
from policy.errors import CODES, FaultError, RefusedError
from policy.terms import Digest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A lab with one release, its backup, the verifier keys and the key of the holder."""
    folder = tmp_path_factory.mktemp("backup")
    staging = lab_trees.make_staging(folder / "staging")
    bundle = lab_trees.make_sealed(staging, folder / "one.agb")
    root = lab_trees.make_lab(staging, folder / "lab")
    assert run("install", bundle, "--root", root) == 0
    (root / "restricted").mkdir()
    (root / "restricted" / "record.json").write_text("{}")
    new_transit_key(folder, "holder")
    words = ("-o", folder / "lab.backup", "--to", folder / "holder.transit.pub.json")
    assert run("backup", *words, "--root", root) == 0
    shutil.copyfile(root / "keys" / "audit.vkey", folder / "audit.vkey")
    return folder


def words_of(place, file=None, *more):
    key = ("--transit-key", place / "holder.transit.pem")
    return ("restore", file or place / "lab.backup", "--vkey", place / "audit.vkey", *key, *more)


def records(root):
    layout = Layout(root / "audit")
    return [
        json.loads(line) for p in sorted((layout.log / "seg").iterdir()) for line in read_lines(p)
    ]


def files_of(root, *, without=()):
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mode & 0o777)
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.is_symlink()
        and not path.relative_to(root).as_posix().startswith(without)
    }


# -- the good road ----------------------------------------------------------------------------


def test_a_restored_tree_is_the_tree_and_its_log_goes_on(place, tmp_path, call):
    lab, root = place / "lab", tmp_path / "second" / "tree"
    status, done = call(*words_of(place), "--root", root)
    assert status == 0
    left = ("audit/", "store/lock", "enclave/", "keys/audit.begun")
    assert files_of(root, without=left) == files_of(lab, without=left)
    current = Store(root / "store").current()
    assert current.digest == Store(lab / "store").current().digest
    assert verify_installed(current.folder)
    assert (current.folder.stat().st_mode & 0o777) == 0o555
    before, after = records(lab), records(root)
    taken = done["records"]
    assert after[:taken] == before[:taken]
    kinds = [r["data"].get("result") for r in after if r["kind"] == "admin.restore"]
    assert kinds == [None, "complete"]
    ring = load_ring(place / "audit.vkey")
    # The head at the time of the backup, kept apart, is an anchor that the restored log holds.
    head = tmp_path / "head"
    status, shown = call("backup", "-o", tmp_path / "again", *to(place), "--root", root)
    assert status == 0
    head.write_text(shown["head"])
    assert verify_log(root / "audit", vkey=ring, anchors=[head]).verdict == "good"
    assert run("install", place / "one.agb", "--root", root) == 0
    assert verify_log(root / "audit", vkey=ring, anchors=[head]).verdict == "good"


def to(place):
    return ("--to", place / "holder.transit.pub.json")


def test_the_backup_is_on_record_and_named_by_its_inventory(place):
    acts = [r for r in records(place / "lab") if r["kind"] == "admin.backup"]
    assert [r["data"].get("result") for r in acts[:2]] == [None, "complete"]
    digest = Digest.parse(acts[0]["data"]["object"])
    kept = Layout(place / "lab" / "audit").object(digest.hex)
    names = {item["path"] for item in json.loads(kept.read_bytes())["files"]}
    assert {"site.toml", "keys/audit.pem", "restricted/record.json", "store/state.json"} <= names
    assert not any(name.startswith(("audit/", "enclave/")) for name in names)
    assert b"PRIVATE KEY" not in (place / "lab.backup").read_bytes()


def test_without_releases_they_are_installed_again(place, tmp_path, call):
    out = tmp_path / "small"
    assert call("backup", "-o", out, *to(place), "--no-releases", "--root", place / "lab")[0] == 0
    root = tmp_path / "tree"
    assert call(*words_of(place, out), "--root", root)[0] == 0
    assert Store(root / "store").current() is None
    assert Store(root / "store").state().marks  # what was here is not forgotten
    assert run("install", place / "one.agb", "--root", root) == 0


def test_a_backup_is_for_somebody_and_lies_elsewhere(place, tmp_path, call):
    lab = place / "lab"
    size = len(records(lab))
    assert call("backup", "-o", tmp_path / "x", "--root", lab)[1]["code"] == "usage.argument"
    assert call("backup", "-o", lab / "x", *to(place), "--root", lab)[1]["code"] == "backup.tree"
    assert len(records(lab)) == size
    missing = call("backup", "-o", tmp_path / "x", *to(place), "--root", tmp_path / "none")[1]
    assert missing["code"] == "site.missing"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_a_pipe_in_the_tree_is_named(kind, place, tmp_path, call):
    root = tmp_path / "tree"
    shutil.copytree(place / "lab", root, symlinks=True)
    odd = root / "policy" / "odd"
    odd.parent.mkdir(exist_ok=True)
    if kind == "link":
        odd.symlink_to("/etc/hostname")
    else:
        os.mkfifo(odd)
    status, refused = call("backup", "-o", tmp_path / "x", *to(place), "--root", root)
    assert (status, refused["code"]) == (1, "backup.tree")
    assert "policy/odd" in refused["error"]


@pytest.mark.parametrize(
    "name", [b"a:b", b"con", b"dot.", b"a\nb", b"\xff", b"n" * 129, b"SITE.toml", b"link"]
)
def test_a_name_that_no_restore_takes_is_told_by_the_backup(name, place, tmp_path, call):
    root = tmp_path / "tree"
    shutil.copytree(place / "lab", root, symlinks=True)
    path = os.path.join(os.fsencode(root), name)  # noqa: PTH118 - bytes
    if name == b"link":
        os.symlink(b"\xff", path)  # noqa: PTH211 - bytes
    else:
        with open(path, "wb"):  # noqa: PTH123 - bytes
            pass
    status, refused = call("backup", "-o", tmp_path / "x", *to(place), "--root", root)
    assert (status, refused["code"]) == (1, "backup.tree")


def test_a_file_that_changes_between_its_digest_and_its_copy_is_told(place, tmp_path):
    """As long as before, but another one: the backup would be refused when it is needed."""
    root = tmp_path / "tree"
    shutil.copytree(place / "lab", root, symlinks=True)
    site = root / "site.toml"
    content = site.read_bytes()
    key = parse_transit_key((place / "holder.transit.pub.json").read_bytes())

    def open_log(folder):
        site.write_bytes(content.replace(b"a", b"b", 1))
        return open_own_log(folder, load_site(folder))

    with pytest.raises(FaultError) as caught:
        backup.back_up(
            root, tmp_path / "x", [key], open_log=open_log, actor=None, now=datetime.now(UTC)
        )
    assert caught.value.code == "host.io"
    assert "changed while it was backed up" in caught.value.message
    assert not (tmp_path / "x").exists()


def test_more_files_than_a_restore_takes_make_no_backup(place, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(place / "lab", root, symlinks=True)
    key = parse_transit_key((place / "holder.transit.pub.json").read_bytes())

    def open_log(folder):
        return open_own_log(folder, load_site(folder))

    words = {"open_log": open_log, "actor": None, "now": datetime.now(UTC)}
    with pytest.raises(RefusedError) as caught:
        backup.back_up(root, tmp_path / "x", [key], limit=1_000, **words)
    assert caught.value.code == "backup.tree"
    assert not (tmp_path / "x").exists()
    assert records(root)[-1]["kind"] != "admin.backup" or records(root)[-1]["data"]["result"]
    assert backup.back_up(root, tmp_path / "x", [key], **words).files


def test_a_socket_is_left_out(place, tmp_path, call):
    root = tmp_path / "t"
    shutil.copytree(place / "lab", root, symlinks=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "a.sock"))
        assert call("backup", "-o", tmp_path / "x", *to(place), "--root", root)[0] == 0


# -- refusals ---------------------------------------------------------------------------------


def test_nothing_is_restored_over_a_tree(place, tmp_path, call):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "mine").write_text("kept")
    status, refused = call(*words_of(place), "--root", root)
    assert (status, refused["code"]) == (1, "backup.target")
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]
    assert (root / "mine").read_text() == "kept"


def test_two_restores_at_once_do_not_mix_and_a_folder_of_another_account_is_left(
    place, tmp_path, call
):
    root, partial = tmp_path / "tree", tmp_path / ".tree.restoring"
    partial.mkdir(mode=0o700)
    (partial / "theirs").write_text("of another backup")
    writer = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(writer, fcntl.LOCK_EX)
    status, refused = call(*words_of(place), "--root", root)
    assert (status, refused["code"]) == (1, "backup.target")
    assert (partial / "theirs").exists()
    os.close(writer)
    if os.geteuid() == 0:
        os.chown(partial, 40404, 40404)
        status, refused = call(*words_of(place), "--root", root)
        assert (status, refused["code"]) == (1, "backup.target")
        assert "another account" in str(refused)
        os.chown(partial, 0, 0)
    assert call(*words_of(place), "--root", root)[0] == 0  # what a killed one left goes
    assert not (root / "theirs").exists()
    assert not partial.exists()


def test_a_key_of_somebody_else_opens_nothing(place, tmp_path, call):
    new_transit_key(tmp_path, "other")
    words = ("restore", place / "lab.backup", "--vkey", place / "audit.vkey")
    key = ("--transit-key", tmp_path / "other.transit.pem")
    root = tmp_path / "tree"
    assert call(*words, *key, "--root", root)[1]["code"] == "transit.key"
    assert call(*words, "--root", root)[1]["code"] == "transit.key"
    assert not root.exists()


def test_a_log_of_another_key_is_refused(place, tmp_path, call):
    other = lab_trees.make_lab(place / "staging", tmp_path / "other")
    assert run("install", place / "one.agb", "--root", other) == 0
    root = tmp_path / "tree"
    words = ("restore", place / "lab.backup", "--vkey", other / "keys" / "audit.vkey")
    key = ("--transit-key", place / "holder.transit.pem")
    assert call(*words, *key, "--root", root)[1]["code"] == "backup.log"
    assert not root.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_log_that_has_gone_on_is_told_by_a_newer_head(place, tmp_path, call):
    lab = tmp_path / "lab"
    shutil.copytree(place / "lab", lab, symlinks=True)
    assert run("install", place / "one.agb", "--root", lab) == 0  # after the backup
    head = tmp_path / "head"
    shutil.copyfile(lab / "audit" / "log" / "checkpoint", head)
    root = tmp_path / "tree"
    status, refused = call(*words_of(place), "--anchors", head, "--root", root)
    assert (status, refused["code"]) == (1, "backup.log")
    assert not root.exists()


def forged(place, out, change):
    """Write the backup again after `change(head, files)`, as somebody with the public key can."""
    identity = load_identity(place / "holder.transit.pem")
    source = TransitFile(PlainFile(place / "lab.backup"), [identity])
    head, inventory = backup._read_heads(source)
    layout = head.layout()
    files = {}
    for index, (name, size) in enumerate(layout.files[2:], start=2):
        buffer = bytearray(size)
        source.read_into(layout.offsets[index], memoryview(buffer))
        files[name] = bytes(buffer)
    document, listed = head.model_dump(mode="json"), inventory.model_dump(mode="json")
    change(document, listed, files)
    raw = canonical_json(listed)
    document |= {"inventory": str(Digest.of(raw)), "inventory_size": len(raw)}
    parts = [(backup.HEAD, canonical_json(document)), (backup.INVENTORY, raw), *files.items()]
    fresh = TarLayout([(name, len(content)) for name, content in parts])
    plain = bytearray()
    for index, (_, content) in enumerate(parts):
        plain += fresh.gap(index) + content
    plain += fresh.gap(len(parts))
    (out.parent / "plain").write_bytes(plain)
    recipient = parse_transit_key((place / "holder.transit.pub.json").read_bytes())
    encrypt_file(PlainFile(out.parent / "plain"), out, [recipient])
    return out


def untouched(document, listed, files):
    del document, listed, files


def other_content(document, listed, files):
    del document, listed
    files["files/site.toml"] = files["files/site.toml"].replace(b"a", b"b")


def other_content_listed(document, listed, files):
    import hashlib

    other_content(document, listed, files)
    for item in listed["files"]:
        if item["path"] == "site.toml":
            item["sha256"] = hashlib.sha256(files["files/site.toml"]).hexdigest()


def a_record_changed(document, listed, files):
    del document, listed
    name = next(name for name in files if name.startswith("audit/log/seg/"))
    files[name] = files[name].replace(b'"admin.install"', b'"admin.approve"'[:15], 1)


def out_of_the_tree(document, listed, files):
    for entry in (*document["files"], *listed["files"]):
        if entry["path"] == "site.toml":
            entry["path"] = "../site.toml"
    files["files/../site.toml"] = files.pop("files/site.toml")


def into_the_log(document, listed, files):
    for entry in (*document["files"], *listed["files"]):
        if entry["path"] == "site.toml":
            entry["path"] = "audit/site.toml"
    files["files/audit/site.toml"] = files.pop("files/site.toml")


def a_link_out(document, listed, files):
    del document, files
    listed["links"] = {"store/current": "../../../etc"}


def a_link_with_a_null(document, listed, files):
    del document, files
    listed["links"] = {"store/current": "installed/\0"}


def a_link_to_nothing(document, listed, files):
    del document, files
    listed["links"] = {"store/current": ""}


def a_link_for_the_log(document, listed, files):
    del document, files
    listed["links"] = {"audit/log": "installed"}


def one_more_file(document, listed, files):
    del listed
    document["files"].append({"path": "extra", "size": 1, "mode": 0o644})
    files["files/extra"] = b"x"


ATTACKS = {
    untouched: "",
    other_content: "backup.digest",
    other_content_listed: "backup.digest",
    a_record_changed: "backup.log",
    out_of_the_tree: "backup.format",
    into_the_log: "backup.format",
    a_link_out: "backup.format",
    a_link_with_a_null: "backup.format",
    a_link_to_nothing: "backup.format",
    a_link_for_the_log: "backup.format",
    one_more_file: "backup.format",
}


@pytest.mark.parametrize("change", ATTACKS, ids=lambda change: change.__name__)
def test_a_backup_that_was_put_together_by_somebody_else(change, place, tmp_path, call):
    """The public key of the recipient is public: whoever has it can encrypt anything."""
    out = forged(place, tmp_path / "forged", change)
    root = tmp_path / "tree"
    status, answer = call(*words_of(place, out), "--root", root)
    assert answer.get("code", "") == ATTACKS[change]
    assert status == (1 if ATTACKS[change] else 0)
    assert root.exists() == (not ATTACKS[change])
    assert not (tmp_path / ".tree.restoring").exists()


def open_to_all(document, listed, files):
    del listed, files
    for entry in document["log"]:
        entry["mode"] = 0o777


def test_files_of_the_log_are_written_by_their_owner_alone(place, tmp_path, call):
    out = forged(place, tmp_path / "forged", open_to_all)
    assert call(*words_of(place, out), "--root", tmp_path / "tree")[0] == 0
    modes = {p.stat().st_mode & 0o022 for p in (tmp_path / "tree/audit").rglob("*") if p.is_file()}
    assert modes == {0}


@pytest.mark.parametrize("content", [b"", b"x" * 10_000, b"\0" * 65_536])
def test_what_is_no_backup(content, place, tmp_path, call):
    path = tmp_path / "file"
    path.write_bytes(content)
    status, refused = call(*words_of(place, path), "--root", tmp_path / "tree")
    assert status in {1, 3}
    assert refused["code"] in CODES
    (tmp_path / "one.enc").unlink(missing_ok=True)
    recipient = parse_transit_key((place / "holder.transit.pub.json").read_bytes())
    if content:
        encrypt_file(PlainFile(path), tmp_path / "file.enc", [recipient])
        status, refused = call(*words_of(place, tmp_path / "file.enc"), "--root", tmp_path / "tree")
        assert (status, refused["code"]) == (1, "backup.format")


def test_every_flipped_byte_of_a_sample_is_refused(place, tmp_path, call):
    good = (place / "lab.backup").read_bytes()
    path = tmp_path / "file"
    for at in random.Random(4).sample(range(len(good)), 12):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        status, refused = call(*words_of(place, path), "--root", tmp_path / "tree")
        assert status in {1, 3}, at
        assert refused["code"] in CODES, at
        assert not (tmp_path / "tree").exists(), at


# -- kills ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["backup", "restore"])
def test_a_kill_leaves_the_old_tree_whole_or_the_new(act, place, tmp_path, lab_copy):
    out, root = tmp_path / "again", tmp_path / "tree"
    words = {
        "backup": ("backup", "-o", out, *to(place), "--root", lab_copy),
        "restore": (*words_of(place), "--root", root),
    }[act]
    total = kills.operations(words, tmp_path)
    ring = load_ring(place / "audit.vkey")
    for point in random.Random(act).sample(range(1, total), 6):
        shutil.rmtree(root, ignore_errors=True)
        out.unlink(missing_ok=True)
        assert kills.run_killed(words, point, tmp_path) == -signal.SIGKILL
        if act == "backup":
            assert verify_log(lab_copy / "audit", vkey=ring).code != "audit.tampered"
            if out.exists():
                restored = ("restore", out, *words_of(place)[2:], "--root", root)
                assert run(*restored) == 0
        elif root.exists():
            assert verify_log(root / "audit", vkey=ring).code != "audit.tampered"
            assert verify_installed(Store(root / "store").current().folder)
            shutil.rmtree(root)
        assert run(*words) == 0


@pytest.fixture
def lab_copy(place, tmp_path):
    root = tmp_path / "lab"
    shutil.copytree(place / "lab", root, symlinks=True)
    return root
