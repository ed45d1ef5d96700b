"""Key epochs: who may sign which size, and a change of the key that is cut short anywhere."""

import shutil
from contextlib import suppress

import audit_logs as logs
import pytest

from airgap.audit import Actor, load_ring, verify_log, verify_receipt
from airgap.audit.checkpoint import (
    LogKey,
    Ring,
    parse_checkpoint,
    parse_ring,
    sign_checkpoint,
    verify_checkpoint,
)
from airgap.audit.epochs import Epochs, KeyFiles, Rotation, align
from airgap.audit.layout import journal_line, last_checkpoint, parse_journal_line
from airgap.audit.query import read_records
from airgap.audit.record import parse_line
from airgap.audit.recovery import frontier_content, load_frontier
from airgap.audit.tiles import SEGMENT, Edge
from policy.errors import AirgapError, RefusedError

WHO = Actor("isso")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a log with two epochs, a receipt of each, the old key, and a copy from before."""
    folder = tmp_path_factory.mktemp("epochs")
    first = logs.write_log(folder, 3)[-1]
    logs.copy(folder, folder / "old")
    with logs.open_log(folder) as log:
        logs.infer(log)
        log.rotate_key(WHO)
        second = logs.infer(log)
    logs.write_log(folder, 1)
    logs.keep(first, folder / "anchors" / "first.tlog-proof")
    logs.keep(second, folder / "anchors" / "second.tlog-proof")
    return folder


@pytest.fixture
def tree(base, tmp_path):
    return logs.copy(base, tmp_path / "tree")


def ring(tree):
    return load_ring(tree / "keys/audit.vkey")


def boundary(tree):
    found = next(r for r in read_records(tree / "audit") if r["kind"] == "key.rotate")
    return found["seq"] + 1


def verify(tree, keys, *, anchored=True):
    anchors = [tree / "anchors"] if anchored else []
    return verify_log(tree / "audit", vkey=keys, anchors=anchors)


def told(verdict):
    return "\n".join(map(str, verdict.findings))


def replace_heads(tree, change):
    """Pass each head of the journal through `change` and publish the last."""
    journal = tree / "audit/log/checkpoints.jsonl"
    heads = [parse_journal_line(line) for line in journal.open("rb")]
    notes = [change(head) for head in heads]
    logs.replace(journal, b"".join(journal_line(note) for note in notes if note))
    logs.replace(tree / "audit/log/checkpoint", [note for note in notes if note][-1].encode())


def new_key(tree):
    return KeyFiles(tree / "keys/audit.pem").load(logs.QuickDisk())[0]


# -- verification --------------------------------------------------------------------------------


def test_a_log_verifies_across_epochs_by_the_first_key_the_last_or_both(tree):
    keys = ring(tree)
    assert len(keys.keys) == 2
    assert keys.keys[0].key_id == logs.vkey().key_id
    for some in (keys, keys.keys[0], keys.keys[1]):
        verdict = verify(tree, some)
        assert verdict.verdict != "tampered", told(verdict)
    assert verify(tree, keys).exit == 0
    assert verify(tree, keys).anchors == 2
    assert verify(tree, keys.keys[0]).exit == 0  # The old key vouches for the new one.
    closing = next(
        head
        for head in map(parse_journal_line, (tree / "audit/log/checkpoints.jsonl").open("rb"))
        if head.size == boundary(tree)
    )
    assert len(verify_checkpoint(closing, keys).signers) == 2


def test_the_old_private_key_is_gone_and_the_new_one_is_another(tree):
    key = new_key(tree)
    assert key.vkey.key_id != logs.vkey().key_id
    assert not (tree / "keys/audit.next.pem").exists()
    assert (tree / "keys/audit.pem").stat().st_mode & 0o777 == 0o400


def test_t23_a_head_of_an_old_size_signed_by_the_newer_key_is_tampered(tree):
    key, end = new_key(tree), boundary(tree)

    def sign_again(head):
        return sign_checkpoint(key, head.size, head.root).note if head.size < end else head.note

    assert verify(tree, ring(tree)).exit == 0
    replace_heads(tree, sign_again)
    verdict = verify(tree, ring(tree))
    assert verdict.exit == 1
    assert "key epoch" in told(verdict)


def test_t23_a_stolen_old_key_signs_nothing_later(tree):
    old, end = logs.log_key(), boundary(tree)

    def sign_by_old(head):
        return sign_checkpoint(old, head.size, head.root).note if head.size > end else head.note

    replace_heads(tree, sign_by_old)
    for keys in (ring(tree), ring(tree).keys[0]):
        verdict = verify(tree, keys)
        assert verdict.exit == 1
        assert "key epoch" in told(verdict)
    with pytest.raises(RefusedError) as refused:
        logs.open_log(tree)
    assert refused.value.code == "audit.epoch"


def test_t23_an_anchor_signed_outside_its_epoch_shows_a_stolen_key(tree):
    head = last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]
    forged = sign_checkpoint(logs.log_key(), head.size, head.root).note
    (tree / "anchors/forged.note").write_text(forged)
    verdict = verify(tree, ring(tree))
    assert verdict.exit == 1
    assert "anchor forged.note" in told(verdict)


def test_a_rollback_to_before_the_new_key_shows_without_any_anchor(tree):
    shutil.rmtree(tree / "audit")
    shutil.copytree(tree / "old/audit", tree / "audit")
    verdict = verify(tree, ring(tree), anchored=False)
    assert verdict.exit == 1
    assert "which is trusted" in told(verdict)
    assert verify(tree, ring(tree).keys[0], anchored=False).exit == 3
    with pytest.raises(RefusedError) as refused:
        logs.open_log(tree)
    assert refused.value.code == "audit.epoch"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda head, _: sign_checkpoint(logs.log_key(), head.size, head.root).note, "old key"),
        (lambda head, key: sign_checkpoint(key, head.size, head.root).note, "key"),
        (lambda _head, _key: "", "nothing"),
    ],
    ids=["the old key alone", "the new key alone", "no closing head"],
)
def test_the_closing_head_needs_both_signatures(tree, change, says):
    key, end = new_key(tree), boundary(tree)
    replace_heads(tree, lambda head: change(head, key) if head.size == end else head.note)
    verdict = verify(tree, ring(tree))
    assert verdict.exit == 1
    assert "key epoch" in told(verdict)
    assert says in told(verdict)


def test_a_key_that_nobody_handed_over_to_signs_nothing(tree):
    """With a rotation of his own making and no signature of the old key, an attacker is caught."""
    head = last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]
    mine = LogKey.of(logs.ORIGIN, logs.private_key(99))
    note = sign_checkpoint(mine, head.size, head.root).note
    logs.replace(tree / "audit/log/checkpoint", note.encode())
    assert verify(tree, ring(tree)).exit == 1


# -- the table of epochs -------------------------------------------------------------------------


def keys_of(*seeds):
    return [logs.vkey(seed) for seed in seeds]


def test_the_closing_head_belongs_to_the_old_key():
    one, two, three = keys_of(1, 2, 3)
    epochs = Epochs(one, [Rotation(10, two), Rotation(20, three)])
    assert [epochs.holder(size) for size in (1, 10, 11, 20, 21)] == [one, one, two, two, three]


@pytest.mark.parametrize(
    ("trusted", "reached", "fits"),
    [
        ((1,), (), True),
        ((1,), (2, 3), True),
        ((1, 2), (2, 3), True),
        ((2, 3), (2, 3), True),
        ((3,), (2, 3), True),
        ((1, 2), (), False),
        ((1, 3), (2, 3), False),
        ((1, 2, 3), (2,), False),
        ((2, 4), (2, 3), False),
    ],
)
def test_every_trusted_key_must_have_had_its_epoch(trusted, reached, fits):
    rotations = [Rotation(10 * n, key) for n, key in enumerate(keys_of(*reached), 1)]
    _, problem = align(Ring(tuple(keys_of(*trusted))), rotations)
    assert (problem == "") is fits


def test_a_ring_is_of_one_log_and_has_no_key_twice():
    text = f"{logs.vkey()}\n{logs.vkey(2)}\n"
    assert len(parse_ring(text.encode()).keys) == 2
    for bad in (f"{logs.vkey()}\n{logs.vkey()}\n", f"{logs.vkey()}\n{logs.vkey(2, 'x/y')}\n", "\n"):
        with pytest.raises(RefusedError):
            parse_ring(bad.encode())


def test_a_frontier_remembers_the_keys(tmp_path):
    edge = Edge.of_segments([b"\1" * 32])
    head = sign_checkpoint(logs.log_key(2), SEGMENT, edge.root())
    content = frontier_content([b"\1" * 32], "00", {}, [(7, str(logs.vkey(2)))], head)
    (tmp_path / "f").write_bytes(content)
    found = load_frontier(tmp_path / "f", Ring(tuple(keys_of(1, 2))))
    assert found.rotations == [Rotation(7, logs.vkey(2))]


# -- crashes -------------------------------------------------------------------------------------


def test_a_fault_at_any_call_of_a_rotation_leaves_a_log_that_opens_with_its_key(tmp_path):
    logs.write_log(tmp_path / "first", 1)
    at, fired, switched = 0, True, set()
    while fired:
        at += 1
        folder = logs.copy(tmp_path / "first", tmp_path / str(at))
        disk = logs.FailingDisk(at, (5, 28)[at % 2])  # EIO, ENOSPC
        with suppress(AirgapError, OSError):
            log = logs.open_log(folder, disk=disk)
            try:
                log.rotate_key(WHO)
                logs.infer(log)
            finally:
                log.close()
        fired = disk.fired
        with logs.open_log(folder) as log:
            receipt = logs.infer(log)
        keys = ring(folder)
        verify_receipt(receipt, keys)
        switched.add(len(keys.keys))
        anchor = logs.keep(receipt, folder / "kept" / "r.tlog-proof")
        verdict = verify_log(folder / "audit", vkey=keys, anchors=[anchor])
        assert verdict.exit == 0, (at, disk.calls[-1], told(verdict))
        assert verify_log(folder / "audit", vkey=logs.vkey(), anchors=[anchor]).exit == 0
        shutil.rmtree(folder)
    assert switched == {1, 2}
    assert at > 20


class _PowerCutError(Exception):
    """The machine is gone."""


class _CutDisk(logs.QuickDisk):
    """Stops at call number `at` of those that change something, as a kill would."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def _tick(self):
        self.count += 1
        if self.count >= self.at:
            raise _PowerCutError

    def rename(self, old, new):
        self._tick()
        super().rename(old, new)

    def put(self, path, content, **more):
        self._tick()
        super().put(path, content, **more)

    def pwrite(self, fd, content, offset):
        self._tick()
        super().pwrite(fd, content, offset)


def test_a_kill_at_any_step_of_the_key_files_leaves_one_of_the_two_keys(tmp_path):
    for at in range(1, 6):
        folder = tmp_path / str(at)
        logs.write_log(folder, 1)
        files = KeyFiles(folder / "keys/audit.pem")
        with logs.open_log(folder) as log:
            following = files.prepare(new_key(folder))
            event = logs.Event(
                "key.rotate", actor=WHO,
                data={"use": "log", "next": str(following.vkey), "epoch": 1},
            )  # fmt: skip
            log._wait(log._submit(event, None, _held(), following))
            with suppress(_PowerCutError):
                files.finish(following, _CutDisk(at))
        with logs.open_log(folder) as log:
            receipt = logs.infer(log)
        verify_receipt(receipt, following.vkey)
        assert not files.following.exists()


def _held():
    import threading

    lock = threading.Lock()
    lock.acquire()
    return lock


def test_a_closing_head_that_a_power_cut_took_is_signed_again_by_both(tmp_path):
    """The record is durable, its head is not: both keys are still there, and both sign."""
    logs.write_log(tmp_path, 1)
    files = KeyFiles(tmp_path / "keys/audit.pem")
    shutil.copytree(tmp_path / "keys", tmp_path / "before")
    with logs.open_log(tmp_path) as log:
        log.rotate_key(WHO)
        crashed = logs.copy(tmp_path / "audit", tmp_path / "crashed")
    # As it was on disk at that moment: old key, next key waiting, journal without the closing head.
    following = files.path.read_bytes()
    shutil.rmtree(tmp_path / "audit")
    shutil.rmtree(tmp_path / "keys")
    shutil.copytree(tmp_path / "before", tmp_path / "keys")
    crashed.rename(tmp_path / "audit")
    files.following.write_bytes(following)
    files.following.chmod(0o400)
    journal = tmp_path / "audit/log/checkpoints.jsonl"
    end = boundary(tmp_path)
    lines = [ln for ln in journal.open("rb") if parse_journal_line(ln).size < end]
    logs.replace(journal, b"".join(lines))
    (tmp_path / "audit/log/checkpoint").unlink()
    with logs.open_log(tmp_path) as log:
        receipt = logs.infer(log)
    verdict = verify_log(
        tmp_path / "audit", vkey=ring(tmp_path),
        anchors=[logs.keep(receipt, tmp_path / "kept/r.tlog-proof")],
    )  # fmt: skip
    assert verdict.exit == 0, told(verdict)


def test_the_key_of_an_epoch_that_is_over_opens_nothing(tree):
    shutil.rmtree(tree / "keys")
    shutil.copytree(tree / "old/keys", tree / "keys")
    with pytest.raises(RefusedError) as refused:
        logs.open_log(tree)
    assert refused.value.code in {"audit.epoch", "audit.note"}


def test_a_rotation_names_the_next_key_in_the_log(tree):
    record = next(r for r in read_records(tree / "audit") if r["kind"] == "key.rotate")
    line = next(x for x in logs.lines_of(tree) if b"key.rotate" in x)
    assert parse_line(line)["data"]["next"] == str(ring(tree).newest)
    assert record["actor"]["name"] == "isso"
    assert parse_checkpoint((tree / "audit/log/checkpoint").read_bytes()).origin == logs.ORIGIN
