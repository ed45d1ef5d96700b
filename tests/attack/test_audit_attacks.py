"""Attacks on the audit log, each against a log that first passes (docs/design/audit.md, 13).

Exits of verification: 0 good, 1 tampered, 3 cannot tell. `alone` is the verdict without an outside
anchor, `anchored` with receipts and a checkpoint that somebody kept.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import audit_logs as logs
import orjson
import pytest

from airgap.audit import Event, Peer, State, new_ulid, parse_receipt, verify_log, verify_receipt
from airgap.audit.checkpoint import sign_checkpoint
from airgap.audit.disk import Disk
from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import Layout, journal_line, last_checkpoint, parse_journal_line
from airgap.audit.query import read_records
from airgap.audit.tiles import Edge, Tiles
from policy.errors import AirgapError, FaultError, RefusedError

VKEY = logs.vkey()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a closed log of 12 inferences, its anchors, and an older copy of it."""
    folder = tmp_path_factory.mktemp("base")
    receipts = logs.write_log(folder, 6)
    logs.copy(folder, folder / "old")
    receipts += logs.write_log(folder, 6)
    for index in (2, 7, 11):
        logs.keep(receipts[index], folder / "anchors" / f"{index}.tlog-proof")
    shutil.copy(folder / "audit/log/checkpoint", folder / "anchors" / "paper.note")
    return folder


@pytest.fixture
def tree(base, tmp_path):
    return logs.copy(base, tmp_path / "tree")


def verify(folder, *, anchored, vkey=VKEY):
    anchors = [folder / "anchors"] if anchored else []
    return verify_log(folder / "audit", vkey=vkey, anchors=anchors)


# -- helpers of an attacker --------------------------------------------------------------------


def edit(folder, seq, change):
    lines = logs.lines_of(folder)
    lines[seq] = change(lines[seq])
    logs.set_lines(folder, lines)


def other_person(line):
    return line.replace(b'"jdoe"', b'"root"')


def relink(lines, start):
    """Recompute `prev` (and `seq`) of every line from `start` on."""
    lines = list(lines)
    for seq in range(start, len(lines)):
        record = orjson.loads(lines[seq])
        record["seq"] = seq
        record["prev"] = hashlib.sha256(b"\0" + lines[seq - 1]).hexdigest()
        lines[seq] = orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
    return lines


def rewrite(folder, lines, *, key=None):
    """Write lines with tiles that fit, and with heads signed by `key` if there is one."""
    logs.set_lines(folder, lines)
    tiles_folder = folder / "audit/log/tile"
    shutil.rmtree(tiles_folder)

    def put(name, content):
        path = tiles_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    edge, tiles, made, journal = Edge(), Tiles(put), {}, b""
    for line in lines:
        edge.append(hashlib.sha256(b"\0" + line).digest(), made)
        if key is not None:
            journal += journal_line(sign_checkpoint(key, edge.size, edge.root()).note)
    tiles.add(made)
    for name, content in tiles.partial():
        put(name, content)
    if key is not None:
        logs.replace(folder / "audit/log/checkpoints.jsonl", journal)
        note = sign_checkpoint(key, edge.size, edge.root()).note
        logs.replace(folder / "audit/log/checkpoint", note.encode())


def heads_to(folder, size):
    """Cut the journal after the head of `size` and publish that head."""
    journal = folder / "audit/log/checkpoints.jsonl"
    kept = [ln for ln in journal.open("rb") if parse_journal_line(ln).size <= size]
    logs.replace(journal, b"".join(kept))
    head = parse_journal_line(kept[-1])
    logs.replace(folder / "audit/log/checkpoint", head.note.encode())
    return head.size


# -- on the files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    act: object
    alone: int
    anchored: int = 1
    opens: str = "audit.history"  # code of the refusal, or empty when the log opens
    says: str = ""


def t2(folder):
    lines = logs.lines_of(folder)
    logs.set_lines(folder, lines[:9] + lines[10:])


def t3(folder):
    lines = logs.lines_of(folder)
    logs.set_lines(folder, [*lines[:9], lines[20], *lines[9:]])


def t5_middle(folder):
    lines = logs.lines_of(folder)
    logs.set_lines(folder, [*lines[:9], lines[8], *lines[9:]])


def t4(folder):
    lines = logs.lines_of(folder)
    lines[9], lines[10] = lines[10], lines[9]
    logs.set_lines(folder, lines)


def t5(folder):
    lines = logs.lines_of(folder)
    logs.set_lines(folder, [*lines, lines[-1]])


def t6(folder):
    lines = logs.lines_of(folder)
    lines[9] = other_person(lines[9])
    logs.set_lines(folder, relink(lines, 10))


def t7(folder):
    lines = logs.lines_of(folder)
    lines[9] = other_person(lines[9])
    rewrite(folder, relink(lines, 10))


def t8_spaces(folder):
    edit(folder, 9, lambda line: line.replace(b'":', b'": ', 1))


def t8_order(folder):
    def backwards(line):
        return json.dumps(dict(reversed(json.loads(line).items())), separators=(",", ":")).encode()

    edit(folder, 9, backwards)


def t9(folder):
    edit(folder, 9, lambda line: b'{"v":1,' + line[1:])


def t10(old, new):
    return lambda folder: edit(folder, 9, lambda line: line.replace(old, new))


def t10_oversized(folder):
    edit(folder, 9, lambda line: line.replace(b'"jdoe"', b'"' + b"j" * 20_000 + b'"'))


def t11(folder):
    logs.set_lines(folder, logs.lines_of(folder)[:-3])


def t12(folder):
    size = heads_to(folder, len(logs.lines_of(folder)) - 5)
    logs.set_lines(folder, logs.lines_of(folder)[:size])
    shutil.rmtree(folder / "audit/log/tile")
    (folder / "audit/log/tile").mkdir()


def t12_all_heads(folder):
    (folder / "audit/log/checkpoints.jsonl").unlink()
    (folder / "audit/log/checkpoint").unlink()


def t13(folder):
    logs.set_lines(folder, logs.lines_of(folder), tail=b'{"half":')


def t15(folder):
    t12(folder)
    logs.write_log(folder, 1)


def t16(folder):
    logs.segment(folder).unlink()


def t17(folder):
    shutil.rmtree(folder / "audit")
    (folder / "audit").mkdir()


def t18(folder):
    shutil.rmtree(folder / "audit")
    shutil.copytree(folder / "old/audit", folder / "audit")


def t18_rewritten(folder):
    """With the stolen key: one person becomes another, everything is signed again."""
    lines = logs.lines_of(folder)
    lines[9] = other_person(lines[9])
    rewrite(folder, relink(lines, 10), key=logs.log_key())


def t20(folder):
    lines = logs.lines_of(folder)
    lines[3] = other_person(lines[3])
    rewrite(folder, relink(lines, 4), key=logs.log_key())
    logs.write_log(folder, 2)


def t21(folder):
    rewrite(folder, logs.lines_of(folder), key=logs.log_key(seed=9))


def t22(folder):
    """A second line of the known key that does not hold stands beside the good one."""
    checkpoint = folder / "audit/log/checkpoint"
    note = checkpoint.read_text()
    blob = bytearray(base64.b64decode(note.split(" ")[-1]))
    blob[20] ^= 1
    bad = f"\u2014 {logs.ORIGIN} {base64.b64encode(blob).decode()}\n"
    logs.replace(checkpoint, (note + bad).encode())


def t24_signature_of_nobody(folder):
    checkpoint = folder / "audit/log/checkpoint"
    body = checkpoint.read_text().split("\n\n")[0]
    blob = base64.b64encode(b"\1\2\3\4" + b"\0" * 64).decode()
    note = f"{body}\n\n\u2014 {logs.ORIGIN} {blob}\n"
    logs.replace(checkpoint, note.encode())
    logs.replace(folder / "audit/log/checkpoints.jsonl", journal_line(note))


def journal_edited(folder):
    journal = folder / "audit/log/checkpoints.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = journal_line(sign_checkpoint(logs.log_key(), 3, b"\7" * 32).note)
    logs.replace(journal, b"".join(lines))


def journal_garbage(folder):
    journal = folder / "audit/log/checkpoints.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    logs.replace(journal, b"".join([*lines[:2], b"garbage\n", *lines[3:]]))


def tile_edited(folder):
    path = next((folder / "audit/log/tile/0").rglob("*.p/*"))
    content = bytearray(path.read_bytes())
    content[9 * 32] ^= 1
    logs.replace(path, bytes(content))


def object_edited(folder):
    path = next(p for p in (folder / "audit/log/objects").rglob("*") if p.is_file())
    logs.replace(path, b'{"outcome":"deny"}')


def object_removed(folder):
    next(p for p in (folder / "audit/log/objects").rglob("*") if p.is_file()).unlink()


FILES = {
    "T1 one byte flipped": Attack(lambda f: edit(f, 9, other_person), 1, says="record 9"),
    "T1 one byte flipped in the last record": Attack(
        lambda f: edit(f, -1, lambda line: line.replace(b"closed", b"clozed")), 1, says="record"
    ),
    "T2 record deleted": Attack(t2, 1, says="record 9"),
    "T3 record inserted": Attack(t3, 1, says="record 9"),
    "T4 two records reordered": Attack(t4, 1, says="record 9"),
    "T5 record duplicated": Attack(t5_middle, 1, says="record 9"),
    # Whole and well-formed, so no crash explains it; at open the tail rule quarantines it.
    "T5 last record duplicated": Attack(t5, 1, opens="", says="sequence"),
    "T6 edited, later prev recomputed": Attack(t6, 1, says="root"),
    "T7 edited, chain and tiles rebuilt": Attack(t7, 1, says="root"),
    "T8 same JSON, other spaces": Attack(t8_spaces, 1, says="record 9"),
    "T8 same JSON, other key order": Attack(t8_order, 1, says="record 9"),
    "T9 duplicate key": Attack(t9, 1, says="record 9"),
    "T10 float": Attack(t10(b'"n":10', b'"n":10.0'), 1, says="record 9"),
    "T10 NaN": Attack(t10(b'"n":10', b'"n":NaN'), 1, says="record 9"),
    "T10 integer past 2^53": Attack(t10(b'"n":10', b'"n":9007199254740992'), 1, says="record 9"),
    "T10 non-ASCII": Attack(t10(b'"jdoe"', '"jdo\u00e9"'.encode()), 1, says="record 9"),
    "T10 oversized": Attack(t10_oversized, 1, says="record 9"),
    "T11 tail deleted, head kept": Attack(t11, 1, says="size"),
    "T12 tail and its heads deleted": Attack(t12, 3, opens=""),
    "T12 every head deleted": Attack(t12_all_heads, 1, says="without a signed head"),
    "T13 half a record at the end": Attack(t13, 3, anchored=3, opens="", says="tail"),
    "T15 truncated, then continued": Attack(t15, 3, opens=""),
    "T16 segment deleted": Attack(t16, 1),
    "T17 empty directory put in place": Attack(t17, 3, opens=""),
    "T18 rolled back with the stolen key": Attack(t18, 3, opens="", says="rollback"),
    "T19 fork of the same size, stolen key": Attack(t18_rewritten, 3, opens="", says="root"),
    "T20 larger fork, stolen key": Attack(t20, 3, opens="", says="root"),
    "T21 another key under the same name": Attack(t21, 1, opens="audit.note", says="signature"),
    "T22 bad signature of the known key": Attack(t22, 1, opens="audit.note", says="signature"),
    "T24 signed by nobody we know": Attack(
        t24_signature_of_nobody, 1, opens="audit.note", says="signature"
    ),
    "an old head in the journal replaced": Attack(journal_edited, 1, opens="", says="journal"),
    "a line of the journal made unreadable": Attack(journal_garbage, 1, opens="", says="journal"),
    "a tile edited": Attack(tile_edited, 1, opens="", says="tile"),
    "a cited decision edited": Attack(object_edited, 1, opens="", says="object"),
    "a cited decision removed": Attack(object_removed, 1, opens="", says="object"),
}


@pytest.mark.parametrize("attack", FILES.values(), ids=FILES.keys())
def test_an_attack_on_the_files_gets_its_verdict(tree, attack):
    assert verify(tree, anchored=True).exit == 0
    assert verify(tree, anchored=False).exit == 3

    attack.act(tree)

    alone, anchored = verify(tree, anchored=False), verify(tree, anchored=True)
    assert alone.exit == attack.alone, alone.findings
    assert anchored.exit == attack.anchored, anchored.findings
    told = "\n".join(map(str, anchored.findings))
    assert attack.says in told


@pytest.mark.parametrize("attack", FILES.values(), ids=FILES.keys())
def test_a_changed_log_is_refused_at_open_unless_nothing_on_the_host_can_tell(tree, attack):
    logs.open_log(tree).close()

    attack.act(tree)

    if attack.opens:
        with pytest.raises(RefusedError) as refused:
            logs.open_log(tree)
        assert refused.value.code == attack.opens
        with pytest.raises(RefusedError):  # The lock was given back: refused, not locked.
            logs.open_log(tree)
    else:
        logs.open_log(tree).close()


def test_t18_each_kind_of_anchor_shows_a_rollback(tree):
    anchors = sorted((tree / "anchors").iterdir())
    assert len(anchors) == 4
    later = [p for p in anchors if p.name != "2.tlog-proof"]
    for anchor in later:
        assert verify_log(tree / "audit", vkey=VKEY, anchors=[anchor]).exit == 0
    t18(tree)
    for anchor in later:
        assert verify_log(tree / "audit", vkey=VKEY, anchors=[anchor]).exit == 1
    early = verify_log(tree / "audit", vkey=VKEY, anchors=[tree / "anchors/2.tlog-proof"])
    assert early.exit == 0  # An anchor before the cut cannot show it, and the verdict says how far.
    assert early.anchored_size < early.size


def test_t19_a_receipt_shows_that_its_own_record_was_changed(tree):
    t18_rewritten(tree)
    lines = logs.lines_of(tree)
    target = next(parse_receipt(p.read_bytes()).seq for p in [tree / "anchors/7.tlog-proof"])
    lines[target] = other_person(lines[target])
    rewrite(tree, relink(lines, target + 1), key=logs.log_key())
    told = "\n".join(map(str, verify(tree, anchored=True).findings))
    assert f"receipt, anchor 7.tlog-proof record {target}" in told


def test_t13_the_half_record_is_quarantined_and_the_recovery_says_so(tree):
    t13(tree)
    with logs.open_log(tree):
        pass
    assert (tree / "audit/torn/00000000").read_bytes() == b'{"half":'
    recovery = [r for r in read_records(tree / "audit") if r["kind"] == "recovery"]
    assert recovery[-1]["data"]["bytes"] == 8
    assert recovery[-1]["data"]["sha256"] == hashlib.sha256(b'{"half":').hexdigest()
    assert verify(tree, anchored=True).exit == 0


def test_t13_t15_in_an_export_nothing_is_forgiven(tree, tmp_path):
    out = exported(tree, tmp_path / "out")
    assert verify_log(out, vkey=VKEY, anchors=[tree / "anchors"]).exit == 0
    with (out / "log/seg/00000000.jsonl").open("ab") as file:
        file.write(b'{"half":')
    assert verify_log(out, vkey=VKEY, anchors=[tree / "anchors"]).exit == 1


def test_t15_a_gap_between_heartbeats_is_reported(tmp_path):
    clock = logs.FixedClock()
    with logs.open_log(tmp_path, clock=clock) as log:
        logs.infer(log)
        clock.slept_s = 3600
        log.append(Event(kind="heartbeat", data={"free": 1}))
    told = "\n".join(map(str, verify_log(tmp_path / "audit", vkey=VKEY).findings))
    assert "heartbeat gap" in told


def test_t24_without_a_key_the_verdict_is_never_good(tree):
    assert verify(tree, anchored=True, vkey=None).exit == 3
    assert verify(tree, anchored=True, vkey=logs.vkey(seed=9)).exit == 1


def test_an_anchor_of_another_log_or_a_forged_one_tells_nothing(tree, tmp_path):
    other = logs.write_log(tmp_path / "x", 1, origin="other.example/audit/1")[-1]
    kept = logs.keep(other, tmp_path / "kept" / "other.tlog-proof")
    assert verify_log(tree / "audit", vkey=VKEY, anchors=[kept]).exit == 3
    forged = (tree / "anchors/7.tlog-proof").read_text().replace("index ", "index 1")
    kept.write_text(forged)
    assert verify_log(tree / "audit", vkey=VKEY, anchors=[kept]).exit == 3
    kept.write_bytes(b"\0\xff nothing of the kind")
    assert verify_log(tree / "audit", vkey=VKEY, anchors=[kept]).exit == 3


def test_t46_a_proof_for_one_record_says_nothing_for_another(tree):
    receipt = parse_receipt((tree / "anchors/7.tlog-proof").read_bytes())
    verify_receipt(receipt, VKEY)
    for seq in range(receipt.size):
        if seq != receipt.seq:
            moved = receipt.as_proof().replace(f"index {receipt.seq}\n", f"index {seq}\n")
            with pytest.raises(RefusedError):
                verify_receipt(parse_receipt(moved.encode()), VKEY)


# -- on the running log ------------------------------------------------------------------------


def test_t9_t10_what_the_schema_forbids_is_refused_at_append_and_the_log_goes_on(tmp_path):
    with logs.open_log(tmp_path) as log:
        decision = log.put_object(logs.DECISION)
        good = logs.intent(decision, new_ulid())
        log.append(good)
        for bad in (
            {"data": {"n": 10.5}},
            {"data": {"n": float("nan")}},
            {"data": {"n": 2**53}},
            {"data": {"task": "retro\u00e9"}},
            {"data": {"task": "a\nb"}},
            {"data": {"task": "x" * 257}},
            {"data": {"prompt": "CCO"}},
            {"project": "P 1"},
            {"req": "nonsense"},
            {"kind": "gossip"},
            {"phase": "event"},
            {"model": ""},
            {"err": "no.such.code"},
        ):
            with pytest.raises(RefusedError) as refused:
                logs.intent(decision, **({"req": new_ulid()} | bad))
            assert refused.value.code == "audit.record"
        size = log.size
        log.append(logs.outcome(good.req))
        assert log.size == size + 1


def test_t10_a_record_past_the_line_limit_is_refused_before_it_is_queued(tmp_path):
    with logs.open_log(tmp_path) as log:
        log.append(Event(kind="admission", data={"obligations": ["x" * 256] * 48}))
        for parts in (["x" * 256] * 70, ['"' * 256] * 48):
            with pytest.raises(RefusedError) as refused:
                log.append(Event(kind="admission", data={"obligations": parts}))
            assert refused.value.code == "audit.record"
        assert log.state is State.RUNNING
        log.append(logs.denial())


def test_t25_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path):
    with logs.open_log(tmp_path) as log:
        with pytest.raises(RefusedError) as refused:
            logs.open_log(tmp_path)
        assert refused.value.code == "audit.locked"
        assert f"process {os.getpid()} " in refused.value.message
        log.append(logs.denial())
    logs.open_log(tmp_path).close()


def _unlink(path):
    path.unlink()


def _replace(path):
    path.rename(path.with_suffix(".old"))
    shutil.copy(path.with_suffix(".old"), path)


def _grow(path):
    with path.open("ab") as file:
        file.write(b"{}\n")


@pytest.mark.parametrize("act", [_unlink, _replace, _grow])
@pytest.mark.parametrize("target", ["log/seg/00000000.jsonl", ".lock"])
def test_t26_t27_a_live_file_that_is_no_longer_there_halts_the_log(tmp_path, act, target):
    log = logs.open_log(tmp_path)
    log.append(logs.denial())
    act(tmp_path / "audit" / target)
    if act is _grow and target == ".lock":
        log.append(logs.denial())  # Its content is a courtesy; its identity is what counts.
        log.close()
        return
    with pytest.raises(FaultError) as fault:
        log.append(logs.denial())
    assert fault.value.code == "audit.halted"
    assert_halted(log)
    log.close()


def assert_halted(log):
    """Nothing is admitted again, for the life of the process."""
    assert log.state is State.HALTED
    for _ in range(2):
        with pytest.raises(FaultError) as fault:
            log.append(logs.denial())
        assert fault.value.code == "audit.halted"
        with pytest.raises(FaultError):
            log.put_object(b"{}")


def test_t28_a_file_system_that_remounts_itself_read_only_halts_the_log(tmp_path):
    """ext4 does so on an error (`errors=remount-ro`); the kernel lets root trigger one."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    if subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=False).returncode:
        pytest.skip("needs mkfs.ext4")
    logs.mounted(disk, "loop,errors=remount-ro", kind="ext4", source=image)
    try:
        found = ["findmnt", "-n", "-o", "SOURCE", str(disk)]
        device = Path(subprocess.run(found, check=True, capture_output=True, text=True).stdout)
        trigger = Path("/sys/fs/ext4") / device.name.strip() / "trigger_fs_error"
        if not trigger.exists():
            pytest.skip("this kernel has no trigger_fs_error")
        log = logs.open_log(disk, key=logs.write_key(tmp_path / "k.pem"), disk=Disk())
        log.append(logs.denial())
        trigger.write_text("1")
        with pytest.raises(FaultError, match="EROFS"):
            log.append(logs.denial())
        assert_halted(log)
        log.close()
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_t28_a_file_system_that_turned_read_only_halts_the_log(tmp_path):
    disk = logs.FailingDisk(code=30, only=("write",))
    log = logs.open_log(tmp_path, disk=disk)
    log.append(logs.denial())
    disk.at = len(disk.calls) + 1
    with pytest.raises(FaultError, match="EROFS"):
        log.append(logs.denial())
    assert_halted(log)
    log.close()


def test_t29_a_full_disk_halts_and_the_reserve_holds_the_recovery_record(tmp_path):
    disk = tmp_path / "disk"
    logs.mounted(disk, "size=1m")
    key = logs.write_key(tmp_path / "k.pem")
    acked = 0
    try:
        log = logs.open_log(disk, key=key, disk=Disk(), reserve_bytes=128 << 10)
        fault = None
        while fault is None and acked < 4_000:
            try:
                log.append(logs.denial(label="x" * 64))
                acked += 1
            except FaultError as error:
                fault = error
        assert fault.code == "audit.halted"
        assert "ENOSPC" in fault.message
        assert_halted(log)
        log.close()
        assert acked > 100
        again = logs.open_log(disk, key=key, disk=Disk(), reserve_bytes=128 << 10)
        assert again.state is State.DRAIN
        with pytest.raises(FaultError) as full:
            again.append(logs.denial())
        assert full.value.code == "audit.full"
        again.append(Event(kind="verify.result", data={"verdict": "good", "size": 1}))
        again.close()
        records = list(read_records(disk / "audit"))
        assert sum(r["kind"] == "denial" for r in records) >= acked
        assert any(r["kind"] == "recovery" for r in records)
        verdict = verify_log(disk / "audit", vkey=VKEY)
        assert verdict.exit == 3, verdict.findings
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _story(folder, disk):
    """Open, write and close; return what was acknowledged."""
    acked = []
    log = None
    with contextlib.suppress(AirgapError, OSError):
        log = logs.open_log(folder, disk=disk)
        for _ in range(4):
            acked.append(log.append(logs.denial(data={"count": len(acked)})))
        acked.append(logs.infer(log))
    failed = log is not None and log.state is State.HALTED
    if failed:
        assert_halted(log)
    if log is not None:
        log.close()
    return acked


@pytest.mark.parametrize("code", [5, 28], ids=["EIO", "ENOSPC"])
def test_t30_a_fault_at_any_call_loses_nothing_that_was_acknowledged(tmp_path, code):
    logs.write_key(tmp_path / "keys" / "audit.pem")
    at, fired = 0, True
    while fired:
        at += 1
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "keys", folder / "keys")
        disk = logs.FailingDisk(at, code)
        acked = _story(folder, disk)
        fired = disk.fired
        with logs.open_log(folder):
            pass
        lines = logs.lines_of(folder)
        for receipt in acked:
            verify_receipt(receipt, VKEY)
            assert hashlib.sha256(b"\0" + lines[receipt.seq]).digest() == receipt.leaf
        verdict = verify_log(folder / "audit", vkey=VKEY)
        assert verdict.exit == 3, (at, disk.calls[-1], verdict.findings)
        shutil.rmtree(folder)
    assert len(acked) == 5
    assert at > 40


def test_t30_a_flush_that_failed_is_never_tried_again(tmp_path):
    disk = logs.FailingDisk(only=("fdatasync",))
    log = logs.open_log(tmp_path, disk=disk)
    disk.at = len(disk.calls) + 1
    with pytest.raises(FaultError):
        log.append(logs.denial())
    tried = len(disk.calls)
    assert_halted(log)
    log.close()
    assert len(disk.calls) == tried


def test_t30_the_suspect_tail_is_kept_and_written_again_after_an_io_error(tmp_path):
    disk = logs.FailingDisk(only=("fdatasync",))
    log = logs.open_log(tmp_path, disk=disk)
    disk.at = len(disk.calls) + 1
    with pytest.raises(FaultError):
        log.append(logs.denial())
    log.close()
    suspect = logs.lines_of(tmp_path)[-1] + b"\n"
    recorder = logs.FailingDisk(only=("pwrite", "fsync"))
    with logs.open_log(tmp_path, disk=recorder):
        pass
    assert (tmp_path / "audit/torn/00000000").read_bytes() == suspect
    assert "pwrite" in recorder.calls
    reason = [r for r in read_records(tmp_path / "audit") if r["kind"] == "recovery"]
    assert reason[0]["data"]["reason"] == "the last writer ended: halted:EIO"


class _Forgetful(logs.QuickDisk):
    """Flips one bit of what it writes to the segment."""

    armed = False

    def write(self, fd, content):
        if self.armed and content.startswith(b'{"'):
            content = content.replace(b"eve", b"evf")
        super().write(fd, content)


def test_a_bit_that_flips_on_its_way_to_the_file_is_never_signed(tmp_path):
    disk = _Forgetful()
    log = logs.open_log(tmp_path, disk=disk)
    log.append(logs.denial())
    disk.armed = True
    with pytest.raises(FaultError, match="reads back differently"):
        log.append(logs.denial())
    assert_halted(log)
    log.close()


@pytest.mark.parametrize("years", [-10, 10])
def test_t31_a_clock_that_jumps_is_recorded_and_orders_nothing(tmp_path, years):
    clock = logs.FixedClock()
    with logs.open_log(tmp_path, clock=clock) as log:
        logs.infer(log)
        clock.jump_s = years * 365 * 86_400
        receipt = logs.infer(log)
    steps = [r for r in read_records(tmp_path / "audit") if r["kind"] == "clock.step"]
    assert [s["data"]["drift_ms"] for s in steps] == [years * 365 * 86_400_000]
    anchor = logs.keep(receipt, tmp_path / "kept" / "r.tlog-proof")
    assert verify_log(tmp_path / "audit", vkey=VKEY, anchors=[anchor]).exit == 0


def test_t32_another_boot_is_a_boot_record(tmp_path):
    logs.write_log(tmp_path, 1)
    other = "11111111-2222-3333-4444-555555555555"
    receipt = logs.write_log(tmp_path, 1, clock=logs.FixedClock(boot=other))[-1]
    boots = [r["boot"] for r in read_records(tmp_path / "audit") if r["kind"] == "boot"]
    assert boots == [logs.BOOT, other]
    anchor = logs.keep(receipt, tmp_path / "kept" / "r.tlog-proof")
    assert verify_log(tmp_path / "audit", vkey=VKEY, anchors=[anchor]).exit == 0


class _StalledDisk(logs.QuickDisk):
    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()

    def fdatasync(self, fd):
        self.gate.wait(30)
        super().fdatasync(fd)


def test_t33_a_stalled_disk_denies_in_time(tmp_path):
    disk = _StalledDisk()
    log = logs.open_log(tmp_path, disk=disk, patience_s=0.2)
    log.append(logs.denial())
    disk.gate.clear()
    start = time.monotonic()
    with pytest.raises(FaultError) as fault:
        log.append(logs.denial())
    assert fault.value.code == "audit.timeout"
    assert time.monotonic() - start < 2
    disk.gate.set()
    log.close()


_KILLED = """
import sys, threading
sys.path.insert(0, sys.argv[2])
import audit_logs as logs
from airgap.audit.disk import Disk
from pathlib import Path
disk = logs.QuickDisk() if sys.argv[3:] == ["control"] else Disk()
log = logs.open_log(Path(sys.argv[1]), disk=disk, clock=None)
def work(t):
    i = 0
    while True:
        r = log.append(logs.denial(data={"count": i, "stage": f"t{t}"}))
        sys.stdout.write(f"{r.seq} {t} {i}\\n")
        sys.stdout.flush()
        i += 1
for t in range(4):
    threading.Thread(target=work, args=(t,), daemon=True).start()
threading.Event().wait(60)
"""


def _kill_rounds(folder, rounds, after_lines):
    logs.write_key(folder / "keys" / "audit.pem")
    helpers = str(Path(logs.__file__).parent)
    acked = []
    for number in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(folder), helpers], stdout=subprocess.PIPE
        )
        acked += [child.stdout.readline() for _ in range(after_lines + 17 * (number % 9))]
        child.kill()
        acked += child.stdout.read().splitlines(keepends=True)
        child.wait()
        child.stdout.close()
    rows = [tuple(map(int, row.split())) for row in acked if row.endswith(b"\n")]
    with logs.open_log(folder):
        pass
    return rows, list(read_records(folder / "audit"))


def _assert_none_lost(folder, rows, records):
    for seq, thread, count in rows:
        data = records[seq]["data"]
        assert (data["stage"], data["count"]) == (f"t{thread}", count)
    verdict = verify_log(folder / "audit", vkey=VKEY)
    assert verdict.exit == 3, verdict.findings
    assert not [f for f in verdict.findings if f.level == "tampered"]


def test_t35_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    rows, records = _kill_rounds(tmp_path, rounds=8, after_lines=20)
    assert len(rows) > 160
    _assert_none_lost(tmp_path, rows, records)
    assert sum(r["kind"] == "recovery" for r in records) >= 7


@pytest.mark.soak
def test_t35_kill_9_two_hundred_times(tmp_path):
    rows, records = _kill_rounds(tmp_path, rounds=200, after_lines=20)
    _assert_none_lost(tmp_path, rows, records)


def _power_cut(work, number, *, control):
    """Copy the block image of a running writer's disk; return what was acked and what is there.

    The copy holds what reached the device, as after a power cut: the page cache is not in it.
    """
    image, copy, disk = work / f"{number}.img", work / f"{number}.cut", work / f"{number}"
    image.write_bytes(b"")
    os.truncate(image, 48 << 20)
    if subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=False).returncode:
        pytest.skip("needs mkfs.ext4")
    logs.mounted(disk, "loop", kind="ext4", source=image)
    try:
        logs.write_key(disk / "keys" / "audit.pem")
        os.sync()
        argv = [sys.executable, "-c", _KILLED, str(disk), str(Path(logs.__file__).parent)]
        child = subprocess.Popen(argv + ["control"] * control, stdout=subprocess.PIPE)
        rows = [child.stdout.readline() for _ in range(300 + 40 * number)]
        child.send_signal(signal.SIGSTOP)
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        child.kill()
        child.wait()
        child.stdout.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    acked = [tuple(map(int, row.split())) for row in rows]
    subprocess.run(["mount", "-o", "loop", str(copy), str(disk)], check=True)
    try:
        records = []
        with contextlib.suppress(RefusedError):
            before = verify_log(disk / "audit", vkey=VKEY)
            assert before.exit == 3, before.findings
            with logs.open_log(disk, disk=Disk()):
                pass
            records = list(read_records(disk / "audit"))
            after = verify_log(disk / "audit", vkey=VKEY)
            assert after.exit == 3, after.findings
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    there = {
        (r["seq"], r["data"]["stage"], r["data"]["count"])
        for r in records
        if "stage" in r.get("data", {})
    }
    return acked, [row for row in acked if (row[0], f"t{row[1]}", row[2]) not in there]


@pytest.mark.soak
def test_t36_a_power_cut_loses_nothing_that_was_acknowledged_and_the_control_does(tmp_path):
    images = int(os.environ.get("AIRGAP_POWER_IMAGES", "50"))
    acked = 0
    for number in range(images):
        rows, lost = _power_cut(tmp_path, number, control=False)
        acked += len(rows)
        assert lost == [], f"image {number}"
    assert acked >= 300 * images
    rows, lost = _power_cut(tmp_path, images, control=True)
    assert lost  # Without flushes the same test must lose, or it shows nothing.


def test_t37_the_uid_is_the_kernels_and_a_name_in_the_message_changes_nothing(tmp_path):
    with pytest.raises(TypeError):
        logs.denial(uid=0)
    with logs.open_log(tmp_path) as log:
        log.append(logs.denial(), peer=Peer(uid=1234, pid=99))
        log.append(logs.denial())
    forged, own = [r for r in read_records(tmp_path / "audit") if r["kind"] == "denial"]
    assert forged["actor"] == {"auth": "peercred", "name": "eve", "uid": 1234}
    assert forged["src"] == "unix:pid=99"
    assert own["actor"] == {"auth": "self", "name": "eve", "uid": os.getuid()}


def test_t38_no_log_level_silences_a_record(tmp_path):
    import logging

    logging.disable(logging.CRITICAL)
    try:
        logs.write_log(tmp_path, 1)
    finally:
        logging.disable(logging.NOTSET)
    assert sum(r["kind"] == "inference" for r in read_records(tmp_path / "audit")) == 2


def test_t40_a_short_prompt_cannot_be_guessed_from_its_commitment(tmp_path):
    logs.write_log(tmp_path, 1)
    record = next(r for r in read_records(tmp_path / "audit") if r["phase"] == "intent")
    prompt = b"<MoleculeS>CCO<MoleculeE>"
    assert record["in"]["commit"] == hashlib.sha256(logs.NONCE + prompt).hexdigest()
    assert record["in"]["commit"] != hashlib.sha256(prompt).hexdigest()
    assert logs.NONCE.hex() not in logs.segment(tmp_path).read_text()


# -- on exports --------------------------------------------------------------------------------


def exported(tree, out, rows="jsonl"):
    layout = Layout(tree / "audit")
    found = last_checkpoint(layout.journal)
    export_log(layout, out, Plan(found[0], rows))
    return out


def _swap(out):
    path = out / "log/checkpoints.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")


def _listed_path(path):
    def act(out):
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["files"][0]["path"] = path
        (out / "manifest.json").write_text(json.dumps(manifest))

    return act


def _link(out):
    path = out / "log/checkpoint"
    path.rename(out.parent / "elsewhere")
    path.symlink_to(out.parent / "elsewhere")


def _row(out):
    path = next(out.glob("records.*"))
    logs.replace(path, path.read_bytes().replace(b"jdoe", b"root", 1))


def _row_dropped(out):
    path = next(out.glob("records.*"))
    logs.replace(path, b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _row_added(out):
    path = next(out.glob("records.*"))
    lines = path.read_bytes().splitlines(keepends=True)
    logs.replace(path, b"".join([*lines, lines[-1]]))
    _list_again(out, path.name)


def _other_header(out):
    path = next(out.glob("records.*"))
    lines = path.read_bytes().splitlines(keepends=True)
    logs.replace(path, b"".join([b"seq,leaf\r\n", *lines[1:]]))
    _list_again(out, path.name)


def _list_again(out, name):
    """Let the manifest, which nobody signs yet, list the file as it is now."""
    content = (out / name).read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry["bytes"] = len(content)
            entry["sha256"] = hashlib.sha256(content).hexdigest()
            entry["sha384"] = hashlib.sha384(content).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))


def _smaller(out):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"size": manifest["size"] - 1}))


EXPORTS = {
    "T45 a row is added and listed": _row_added,
    "T45 another header, listed": _other_header,
    "T48 the manifest speaks of another size": _smaller,
    "T43 file dropped": lambda out: next((out / "log/tile").rglob("*.p/*")).unlink(),
    "T43 file added": lambda out: (out / "log/extra").write_text("x"),
    "T43 file swapped": _swap,
    "T45 a row differs": _row,
    "T45 a row is missing": _row_dropped,
    "T49 .. in a path": _listed_path("log/../../x"),
    "T49 absolute path": _listed_path("/etc/passwd"),
    "T49 symlink": _link,
    "manifest is not JSON": lambda out: (out / "manifest.json").write_text("[]"),
    "rows file of another format": lambda out: (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace('"rows":', '"rowz":')
    ),
}


@pytest.mark.parametrize("rows", ["jsonl", "csv"])
@pytest.mark.parametrize("act", EXPORTS.values(), ids=EXPORTS.keys())
def test_an_export_that_was_changed_on_media_is_tampered(tree, tmp_path, act, rows):
    out = exported(tree, tmp_path / "out", rows)
    assert verify_log(out, vkey=VKEY, anchors=[tree / "anchors"]).exit == 0
    act(out)
    verdict = verify_log(out, vkey=VKEY, anchors=[tree / "anchors"])
    assert verdict.exit == 1, verdict.findings


REST = ("manifest.sig", "records.jsonl", "log/tile/entries")


@pytest.mark.parametrize("left", [*REST, "all of it"])
def test_t43_an_export_without_its_manifest_is_not_judged_as_a_live_log(tree, tmp_path, left):
    out = exported(tree, tmp_path / "out", "jsonl")
    (out / "manifest.sig").touch()
    (out / "manifest.json").unlink()
    for name in REST:
        if left not in {name, "all of it"}:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    verdict = verify_log(out, vkey=VKEY, anchors=[tree / "anchors"])
    assert verdict.exit == 1
    assert "an export without its manifest" in str(verdict.findings[0])
