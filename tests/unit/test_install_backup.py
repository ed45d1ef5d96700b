"""Backup and restore: what comes back is what was there, and the log goes on and can show it."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import audit_logs as logs
import disks
import kills
import lab_trees
import pytest
from lab_trees import run

from airgap.audit import Actor, Event, load_ring, new_ulid, parse_receipt, verify_log
from airgap.audit.layout import Layout, last_checkpoint, read_lines
from airgap.audit.service import Service
from airgap.audit.site import OWNER_SOCKET, open_own_log
from airgap.audit.steward import OwnersLog
from airgap.config import load_site
from airgap.install import Store, backup, backup_format, restore, verify_installed
from bundle.canonical import canonical_json
from bundle.durable import write_beside
from bundle.source import PlainFile, read_exactly
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


@pytest.mark.parametrize("name", ["verified.json", "torn", "log/sealed", "log/anchors"])
def test_a_link_in_the_folder_of_the_log_brings_no_file_of_anybody_else(name, place, lab_copy):
    """Its account owns the folder, and whoever backs up is root, who may read everything."""
    assert back_up(place, lab_copy, lab_copy.parent / "x").files
    away, link = lab_copy.parent / "away", lab_copy / "audit" / name
    away.mkdir()
    (away / "id").write_text("of root")
    if link.suffix:
        link.symlink_to(away / "id")
    else:
        shutil.rmtree(link, ignore_errors=True)
        link.symlink_to(away)
    with pytest.raises(FaultError) as caught:
        back_up(place, lab_copy, lab_copy.parent / "y")
    assert caught.value.code == "host.io"
    assert not (lab_copy.parent / "y").exists()


def test_a_folder_that_becomes_a_link_brings_no_file_of_anybody_else(place, large, monkeypatch):
    """The daemon owns folders too, and goes on meanwhile: here it is quick, and wins each time."""
    away, held = large.parent / "away", large / "restricted"
    away.mkdir()
    (away / "record.json").write_text("of root")
    listed = backup._Tree._listed

    def between(tree):
        found = listed(tree)
        held.rename(large.parent / "held")
        held.symlink_to(away)
        found[0]["restricted/record.json"] = (away / "record.json").lstat()
        return found

    monkeypatch.setattr(backup._Tree, "_listed", between)
    with pytest.raises(FaultError) as caught:
        back_up(place, large, large.parent / "y")
    assert (caught.value.code, "restricted" in caught.value.message) == ("host.io", True)


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


class Meddled:
    """The log of a tree; `meddle` is called when it has taken a record."""

    def __init__(self, log, meddle):
        self.log, self.meddle, self.folder = log, meddle, log.folder

    def put_object(self, content):
        return self.log.put_object(content)

    def append(self, event):
        receipt = self.log.append(event)
        self.meddle()
        return receipt


def back_up(place, root, out, *, meddle=None, **more):
    """Back up in this process, with something that happens after each record."""
    key = parse_transit_key((place / "holder.transit.pub.json").read_bytes())

    @contextlib.contextmanager
    def opened(folder):
        with open_own_log(folder, load_site(folder)) as log:
            yield log if meddle is None else Meddled(log, meddle)

    return backup.back_up(
        root, out, [key], open_log=opened, actor=None, now=datetime.now(UTC), **more
    )


def times(count, act):
    """Return what does `act` so many times, and then no more."""
    left = iter(range(count))
    return lambda: act() if next(left, None) is not None else None


def begun_in(root):
    acts = (r for r in records(root) if r["kind"] == "admin.backup")
    return [r for r in acts if "result" not in r["data"]]


def restored(place, file, root, call):
    status, done = call(*words_of(place, file), "--root", root)
    assert status == 0, done
    return done


def test_what_comes_and_changes_before_the_head_is_in_the_backup(place, tmp_path, lab_copy, call):
    """The record names what was there at its head; as long as that is another thing, again."""
    site, held = lab_copy / "site.toml", lab_copy / "restricted" / "late.json"
    content = site.read_bytes()

    def change():
        site.write_bytes(site.read_bytes() + b"# more\n")
        write_beside(held, b"held")

    before = len(begun_in(lab_copy))
    done = back_up(place, lab_copy, tmp_path / "x", meddle=times(3, change))
    begun = begun_in(lab_copy)
    assert len(begun) == before + 1 + 3  # one for each time that something changed
    assert begun[-1]["data"]["object"] == str(done.inventory)
    root = tmp_path / "tree"
    assert restored(place, tmp_path / "x", root, call)["records"] == done.records
    assert (root / "site.toml").read_bytes() == content + b"# more\n" * 3
    assert (root / "restricted" / "late.json").read_bytes() == b"held"


def test_a_tree_that_changes_all_the_time_makes_no_backup(place, tmp_path, lab_copy):
    site = lab_copy / "site.toml"

    def change():
        site.write_bytes(site.read_bytes() + b"#\n")

    with pytest.raises(FaultError) as caught:
        back_up(place, lab_copy, tmp_path / "x", meddle=change)
    assert (caught.value.code, caught.value.exit_status) == ("host.io", 3)
    assert not list(tmp_path.glob("*x*"))
    assert records(lab_copy)[-2]["data"]["result"] == "failed"  # before the shutdown
    assert back_up(place, lab_copy, tmp_path / "x").files


@pytest.fixture
def large(lab_copy):
    """A tree whose last file is larger than what is read ahead of the copy."""
    path = lab_copy / "zz" / "large"
    path.parent.mkdir()
    with path.open("wb") as stream:
        stream.truncate(96 << 20)
    return lab_copy


def at_the_copy(act):
    """Return a progress that acts once, when the copy has begun."""
    once = times(1, act)
    return lambda done, total: once() if done > total // 2 else None


def test_what_goes_or_is_replaced_during_the_copy_is_in_the_backup_as_it_was(
    place, tmp_path, large, call
):
    path, other = large / "zz" / "large", large / "restricted" / "record.json"

    def meddle():
        write_beside(path, b"another")
        other.unlink()
        shutil.rmtree(large / "policy", ignore_errors=True)

    done = back_up(place, large, tmp_path / "x", progress=at_the_copy(meddle))
    assert path.read_bytes() == b"another"
    assert not other.exists()
    root = tmp_path / "tree"
    assert restored(place, tmp_path / "x", root, call)["files"] == done.files
    assert (root / "zz" / "large").stat().st_size == 96 << 20
    assert (root / "restricted" / "record.json").read_text() == "{}"


def test_a_file_that_changes_between_its_digest_and_its_copy_is_told(place, tmp_path, large):
    """As long as before, but another one: the backup would be refused when it is needed."""

    def meddle():
        with (large / "zz" / "large").open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"x")

    with pytest.raises(FaultError) as caught:
        back_up(place, large, tmp_path / "x", progress=at_the_copy(meddle))
    assert caught.value.code == "host.io"
    assert "changed while it was backed up" in caught.value.message
    assert not list(tmp_path.glob("*x*"))
    assert records(large)[-2]["data"]["result"] == "failed"
    assert back_up(place, large, tmp_path / "x").files


def test_more_files_than_a_restore_takes_make_no_backup(place, tmp_path, lab_copy):
    before = len([r for r in records(lab_copy) if r["kind"] == "admin.backup"])
    with pytest.raises(RefusedError) as caught:
        back_up(place, lab_copy, tmp_path / "x", limit=1_000)
    assert caught.value.code == "backup.tree"
    assert not list(tmp_path.glob("*x*"))
    assert len([r for r in records(lab_copy) if r["kind"] == "admin.backup"]) == before
    assert back_up(place, lab_copy, tmp_path / "x").files


def test_a_disk_that_is_full_in_the_middle_leaves_nothing(place, tmp_path, large):
    with disks.mounted(tmp_path / "disk", 160 << 20) as disk:
        out, other = disk / "lab.backup", disk / "other"
        with pytest.raises(FaultError) as caught:
            back_up(place, large, out, progress=at_the_copy(lambda: disks.fill(other, 1 << 20)))
        assert caught.value.code == "host.space"
        assert os.listdir(disk) == ["other"]  # noqa: PTH208 - hidden names too
        assert records(large)[-2]["data"]["result"] == "failed"
        with pytest.raises(FaultError) as caught:  # and beforehand
            back_up(place, large, out)
        assert caught.value.code == "host.space"
        other.unlink()
        assert back_up(place, large, out).size < out.stat().st_size
    assert (
        verify_log(large / "audit", vkey=load_ring(place / "audit.vkey")).code != "audit.tampered"
    )


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


def parts_of(place, file=None):
    """Return the files of a backup by name, in their order."""
    source = TransitFile(
        PlainFile(file or place / "lab.backup"), [load_identity(place / "holder.transit.pem")]
    )
    proven = restore._prove(source, load_ring(place / "audit.vkey"))
    size, parts, end = len(proven.inventory.to_bytes()), {}, proven.start
    head = restore.read_document(source, 0, backup_format.HEAD, backup_format.HEAD_LIMIT)
    parts[backup_format.HEAD] = head
    parts[backup_format.INVENTORY] = read_exactly(source, end - size, size)
    for item in proven.inventory.files:
        start = restore._require_header(source, end, f"files/{item.path}", item.size)
        end = start + item.size
        parts[f"files/{item.path}"] = read_exactly(source, start, item.size)
    for name, start, size in restore._log_files(source, end):
        parts[name] = read_exactly(source, start, size)
    return parts


def tarred(parts):
    layout = TarLayout([(name, len(content)) for name, content in parts])
    plain = bytearray()
    for index, (_, content) in enumerate(parts):
        plain += layout.gap(index) + content
    return plain + layout.gap(len(parts))


def sealed(place, out, plain):
    """Encrypt bytes for the holder, as whoever has the public key can."""
    (out.parent / "plain").write_bytes(plain)
    recipient = parse_transit_key((place / "holder.transit.pub.json").read_bytes())
    encrypt_file(PlainFile(out.parent / "plain"), out, [recipient])
    (out.parent / "plain").unlink()
    return out


def untouched(parts, place):
    del parts, place


def other_content(parts, place):
    del place
    parts["files/site.toml"] = parts["files/site.toml"].replace(b"a", b"b")


def head_of(parts, **changes):
    head = json.loads(parts[backup_format.HEAD]) | changes
    parts[backup_format.HEAD] = canonical_json(head)


def other_content_listed(parts, place):
    other_content(parts, place)
    listed = json.loads(parts[backup_format.INVENTORY])
    for item in listed["files"]:
        if item["path"] == "site.toml":
            item["sha256"] = hashlib.sha256(parts["files/site.toml"]).hexdigest()
    parts[backup_format.INVENTORY] = canonical_json(listed)
    return str(Digest.of(parts[backup_format.INVENTORY]))


def other_content_recorded(parts, place):
    named = other_content_listed(parts, place)
    record = json.loads(json.loads(parts[backup_format.HEAD])["record"])
    record["data"]["object"] = named
    head_of(parts, record=json.dumps(record, sort_keys=True, separators=(",", ":")))


def nothing_like_json(parts, place):
    """Bytes that no parser should see: nobody vouches for them."""
    del place
    parts[backup_format.INVENTORY] = b"[" * backup_format.INVENTORY_LIMIT
    head_of(parts, inventory_size=backup_format.INVENTORY_LIMIT)


def larger_than_any_inventory(parts, place):
    del place
    head_of(parts, inventory_size=backup_format.INVENTORY_LIMIT + 1)


def proof_of(parts, place, wanted):
    """Let the head speak of another record of the log, with its true proof."""
    out = place / "proof.tlog-proof"
    (seq,) = [r["seq"] for r in records(place / "lab") if wanted(r)][:1]
    assert run("audit", "prove", seq, "-o", out, "--root", place / "lab") == 0
    line = list(read_lines(Layout(place / "lab" / "audit").segment(0)))[seq][:-1]
    head_of(parts, record=line.decode(), proof=out.read_text())
    out.unlink()


def a_record_of_another_act(parts, place):
    proof_of(parts, place, lambda record: record["kind"] == "boot")


def the_record_of_its_end(parts, place):
    proof_of(parts, place, lambda record: record["data"].get("result") == "complete"
             and record["kind"] == "admin.backup")  # fmt: skip


def a_record_changed(parts, place):
    del place
    name = next(name for name in parts if name.startswith("audit/log/seg/"))
    parts[name] = parts[name].replace(b'"admin.install"', b'"admin.approve"', 1)


def a_log_that_ends_before(parts, place):
    """An older log, whole and signed, with the files of this backup."""
    del place
    lines = parts["audit/log/seg/00000000.jsonl"].splitlines(keepends=True)[:-1]
    heads = parts["audit/log/checkpoints.jsonl"].splitlines(keepends=True)
    while f"\n{len(lines)}\n" not in json.loads(heads[-1])["note"]:
        heads.pop()
    parts["audit/log/seg/00000000.jsonl"] = b"".join(lines)
    parts["audit/log/checkpoints.jsonl"] = b"".join(heads)
    parts["audit/log/checkpoint"] = json.loads(heads[-1])["note"].encode()


def a_log_that_went_on(parts, place):
    """The newer log of the same tree, with the older files of this backup."""
    for name in ("log/seg/00000000.jsonl", "log/checkpoints.jsonl", "log/checkpoint"):
        parts[f"audit/{name}"] = (place / "lab" / "audit" / name).read_bytes()


def one_more_file(parts, place):
    del place
    parts["files/extra"] = b"x"


def added(name):
    def add(parts, place):
        del place
        parts[name] = b"x"

    add.__name__ = f"added {name}"
    return add


def a_file_in_place_of_a_folder(parts, place):
    del place
    log = {name: parts.pop(name) for name in list(parts) if name.startswith("audit/")}
    parts |= {"audit/log/seg": b"x", **log}


ATTACKS = {
    untouched: "",
    other_content: "backup.digest",
    other_content_listed: "backup.digest",
    other_content_recorded: "backup.log",
    nothing_like_json: "backup.digest",
    larger_than_any_inventory: "backup.format",
    a_record_of_another_act: "backup.log",
    the_record_of_its_end: "backup.log",
    a_record_changed: "backup.log",
    a_log_that_ends_before: "backup.log",
    a_log_that_went_on: "backup.log",
    one_more_file: "backup.format",
    a_file_in_place_of_a_folder: "backup.format",
    added("audit/../site.toml"): "backup.format",
    added("audit/log/../../x"): "backup.format",
    added("audit/.lock"): "backup.format",
    added("audit//x"): "backup.format",
    added("/x"): "backup.format",
    added("audit/log/\u00e4"): "backup.format",
    added("audit/" + "n" * 120): "backup.format",
}


@pytest.mark.parametrize("change", ATTACKS, ids=lambda change: change.__name__)
def test_a_backup_that_was_put_together_by_somebody_else(change, place, tmp_path, call):
    """The public key of the recipient is public: whoever has it can encrypt anything."""
    parts = parts_of(place)
    change(parts, place)
    out, root = sealed(place, tmp_path / "forged", tarred(list(parts.items()))), tmp_path / "tree"
    status, answer = call(*words_of(place, out), "--root", root)
    assert answer.get("code", "") == ATTACKS[change]
    assert status == (1 if ATTACKS[change] else 0)
    assert root.exists() == (not ATTACKS[change])
    assert not (tmp_path / ".tree.restoring").exists()


@pytest.mark.parametrize("what", ["nothing", "twice", "longer", "shorter", "not zero", "mode"])
def test_a_container_that_the_writer_would_not_write(what, place, tmp_path, call):
    parts = list(parts_of(place).items())
    plain = tarred([*parts, parts[-1]] if what == "twice" else parts)
    if what == "longer":
        plain += bytes(4096)
    elif what == "shorter":
        del plain[-4096:]
    elif what == "not zero":
        plain[-1] = 1
    elif what == "mode":
        at = plain.rindex(b"0000444\0")
        plain[at : at + 7] = b"0000777"
    out, root = sealed(place, tmp_path / "forged", plain), tmp_path / "tree"
    status, answer = call(*words_of(place, out), "--root", root)
    assert (status, root.exists()) == ((0, True) if what == "nothing" else (1, False)), answer
    assert what == "nothing" or answer["code"] in {"backup.format", "archive.truncated"}


class Counted:
    """A source that counts the bytes that were read of it; beyond its own it has zeros."""

    def __init__(self, content, size=0):
        self.content, self.size, self.read = bytes(content), size or len(content), 0
        self.path = Path("counted")

    def read_into(self, offset, buffer):
        self.read += len(buffer)
        found = self.content[offset : offset + len(buffer)]
        buffer[:] = found.ljust(len(buffer), b"\0")


def test_a_huge_first_document_is_refused_before_it_is_read(place, tmp_path):
    ring = load_ring(place / "audit.vkey")
    good = Counted(tarred(list(parts_of(place).items())))
    assert restore._prove(good, ring).inventory.files
    size = 256 << 20
    huge = Counted(TarLayout([(backup_format.HEAD, size)]).gap(0) + b"[" * 4096, size + 8192)
    with pytest.raises(RefusedError) as caught:
        restore.restore(huge, tmp_path / "tree", ring=ring, open_log=None, actor=None)
    assert caught.value.code == "backup.format"
    assert huge.read < 8192
    assert not list(tmp_path.iterdir())


# -- what the host itself could have signed -----------------------------------------------------


def out_of_the_tree(listed):
    for entry in listed["files"]:
        if entry["path"] == "site.toml":
            entry["path"] = "../site.toml"


def into_the_log(listed):
    for entry in listed["files"]:
        if entry["path"] == "site.toml":
            entry["path"] = "audit/site.toml"


def linked(links):
    def change(listed):
        listed["links"] = links

    change.__name__ = f"link {links}"
    return change


def as_it_is(listed):
    del listed


HOST_ATTACKS = {
    as_it_is: "",
    out_of_the_tree: "backup.format",
    into_the_log: "backup.format",
    linked({"store/current": "../../../etc"}): "backup.format",
    linked({"store/current": "installed/\0"}): "backup.format",
    linked({"store/current": ""}): "backup.format",
    linked({"audit/log": "installed"}): "backup.format",
}


@pytest.mark.parametrize("change", HOST_ATTACKS, ids=lambda change: change.__name__)
def test_an_inventory_that_the_log_vouches_for_leads_nowhere_else(
    change, place, tmp_path, lab_copy, call
):
    """Whoever has the log's key signs any inventory: its names are judged all the same."""
    parts = parts_of(place)
    listed = json.loads(parts[backup_format.INVENTORY])
    change(listed)
    raw = canonical_json(listed)
    with open_own_log(lab_copy, load_site(lab_copy)) as log:
        evidence = str(log.put_object(raw))
        data = {"object": str(Digest.of(raw)), "evidence": evidence}
        event = Event(backup_format.KIND, req=new_ulid(), actor=Actor("host"), data=data)
        cut = backup._Cut.at(Layout(lab_copy / "audit"), log.append(event))
        changed = [(backup_format.HEAD, b""), (backup_format.INVENTORY, raw)]
        for item in listed["files"]:
            old = "site.toml" if item["path"].endswith("/site.toml") else item["path"]
            changed.append((f"files/{item['path']}", parts[f"files/{old}"]))
        for part in cut.parts:
            content = bytearray(part.length)
            part.read_into(0, memoryview(content))
            changed.append((part.name, bytes(content)))
    head = backup_format.Head(
        record=cut.line.decode(), proof=cut.receipt.as_proof(), inventory_size=len(raw)
    )
    changed[0] = (backup_format.HEAD, head.to_bytes())
    out, root = sealed(place, tmp_path / "forged", tarred(changed)), tmp_path / "tree"
    status, answer = call(*words_of(place, out), "--root", root)
    assert answer.get("code", "") == HOST_ATTACKS[change], answer
    assert status == (1 if HOST_ATTACKS[change] else 0)
    assert root.exists() == (not HOST_ATTACKS[change])


def test_files_of_the_log_are_their_owners_alone(place, tmp_path, call):
    restored(place, None, tmp_path / "tree", call)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "tree/audit").rglob("*") if p.is_file()}
    assert modes == {0o600}


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


# -- while a service writes the log -----------------------------------------------------------


@contextlib.contextmanager
def served(root):
    """Yield the open log of a tree that a thread of this process serves."""
    with open_own_log(root, load_site(root), mode="service") as log:
        (root / OWNER_SOCKET).parent.mkdir(mode=0o700, exist_ok=True)
        service, ready = Service(log, root / OWNER_SOCKET), threading.Event()
        thread = threading.Thread(target=service.run, args=(ready.set,), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield log
        finally:
            service.stop()
            thread.join(10)


@contextlib.contextmanager
def at_work(root, log):
    """Let people use a tree: requests, and holds that are written before their record."""
    stop, failed, receipts = threading.Event(), [], []
    (root / "holds").mkdir(exist_ok=True)

    def ask():
        while not stop.is_set():
            receipts.append(logs.infer(log))

    def hold():
        for number in range(100_000):
            if stop.wait(0.3):
                return
            write_beside(root / "holds" / f"{number:06}.json", b"held")
            log.append(Event("denial", actor=Actor("ada"), err="policy.held", req=new_ulid(),
                             data={"task": f"hold {number:06}"}))  # fmt: skip

    def guarded(act):
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - told by the test
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in (ask, ask, ask, hold)]
    for thread in threads:
        thread.start()
    try:
        yield receipts
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not failed, failed


@pytest.fixture
def short(place):
    """A lab with a path that is short enough for sockets."""
    with lab_trees.short_folder() as folder:
        yield shutil.copytree(place / "lab", folder / "lab", symlinks=True)


def test_a_backup_of_a_log_in_use_is_of_one_moment_and_both_go_on(place, short, tmp_path, call):
    ring, taken = load_ring(place / "audit.vkey"), []
    with served(short) as log:
        with at_work(short, log) as receipts:
            for number in range(4):
                first = (
                    logs.keep(receipts[-1], tmp_path / f"{number}.tlog-proof") if receipts else None
                )
                out = tmp_path / f"{number}.backup"
                status, done = call("backup", "-o", out, *to(place), "--root", short)
                assert status == 0, done
                taken.append((out, done, first, log.size))
                time.sleep(0.2)
        late = logs.keep(logs.infer(log), tmp_path / "late.tlog-proof")
        assert log.state.value == "running"
    heads = []
    for number, (out, done, first, after) in enumerate(taken):
        head = tmp_path / f"{number}.head"
        head.write_text(done["head"])
        heads.append(head)
        assert done["records"] < after  # it went on meanwhile
        root = tmp_path / f"tree-{number}"
        anchors = ("--anchors", head, *(("--anchors", first) if first else ()))
        status, found = call(*words_of(place, out), *anchors, "--root", root)
        assert (status, found["records"]) == (0, done["records"]), found
        assert found["verdict"]["verdict"] == "good"
        named = {
            r["data"]["task"].removeprefix("hold ")
            for r in records(root)[: done["records"]]
            if r["kind"] == "denial" and r["data"].get("task", "").startswith("hold ")
        }
        there = {path.stem for path in (root / "holds").glob("*.json")}
        assert named <= there
        assert len(there - named) <= 1  # one was written, and its record was on its way
        with open_own_log(root, load_site(root)) as again:
            logs.infer(again)
        assert verify_log(root / "audit", vkey=ring, anchors=[head]).verdict == "good"
        gone_on = (*words_of(place, out), "--anchors", late, "--root", tmp_path / "none")
        assert call(*gone_on)[1]["code"] == "backup.log"
    verdict = verify_log(short / "audit", vkey=ring, anchors=[*heads, late])
    assert verdict.verdict == "good", verdict.findings
    assert verdict.anchors == len(heads) + 1


def test_an_act_that_takes_from_the_log_begins_the_backup_anew(place, short, tmp_path, call):
    """A payload that was purged since the head would be missing in a log that does not say so."""
    layout = Layout(short / "audit")
    with served(short) as log, OwnersLog(short / OWNER_SOCKET) as held:
        receipt = log.append(Event(backup_format.KIND, req=new_ulid(), actor=Actor("ada"), data={}))
        assert not backup._Cut.at(layout, receipt).was_changed()
        logs.infer(log)
        assert not backup._Cut.at(layout, receipt).was_changed()
        act = Event("spill.purge", "intent", req=new_ulid(), actor=Actor("ada"), data={})
        held.append(act)
        cut = backup._Cut.at(layout, receipt)
        assert cut.was_changed()
        held.append(Event("spill.purge", "outcome", req=act.req, actor=Actor("ada"),
                          data={"result": "complete"}))  # fmt: skip
        assert call("backup", "-o", tmp_path / "x", *to(place), "--root", short)[0] == 0
    restored(place, tmp_path / "x", tmp_path / "tree", call)


def test_an_anchor_that_came_after_the_head_stays_behind(short):
    with served(short) as log:
        receipt = log.append(Event(backup_format.KIND, req=new_ulid(), actor=Actor("ada"), data={}))
        later = logs.infer(log)
        layout = Layout(short / "audit")
        (layout.anchors / "early.tlog-proof").write_text(receipt.as_proof())
        (layout.anchors / "late.tlog-proof").write_text(later.as_proof())
        names = {part.name for part in backup._Cut.at(layout, receipt).parts}
    assert "audit/log/anchors/early.tlog-proof" in names
    assert "audit/log/anchors/late.tlog-proof" not in names


def test_the_cut_of_a_log_is_exact_at_every_size(tmp_path):
    """Segments, heads and tiles up to a head verify alone, wherever the head is."""
    folder = tmp_path / "tree"
    with logs.open_log(folder, disk=logs.QuickDisk()) as log:
        receipts = [logs.infer(log) for _ in range(6)]
        logs.fill(log, 700)
        receipts += [logs.infer(log)]
        layout = Layout(folder / "audit")
        for receipt in receipts:
            target = tmp_path / f"cut-{receipt.size}"
            for part in backup._Cut.at(layout, receipt).parts:
                content = bytearray(part.length)
                part.read_into(0, memoryview(content))
                path = target / part.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            verdict = verify_log(target / "audit", vkey=logs.vkey())
            assert verdict.code == "audit.unknown", verdict.findings  # no anchor, and nothing else
            assert (verdict.size, verdict.records) == (receipt.size, receipt.size)
            newest = last_checkpoint(Layout(target / "audit").journal)
            assert newest[0].size == receipt.size
            assert parse_receipt(receipt.as_proof().encode()).note == newest[0].note
