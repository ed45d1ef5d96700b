"""The writer and its recovery: what is on disk, what a crash leaves, what an open mends."""

import base64
import hashlib
import json
import shutil
import threading

import audit_logs as logs
import pytest

from airgap.audit import (
    AuditLog,
    Event,
    State,
    create_log_key,
    load_vkey,
    new_ulid,
    open_log,
    site_name,
    verify_log,
    verify_receipt,
)
from airgap.audit.checkpoint import load_log_key, parse_checkpoint, vkey_path
from airgap.audit.layout import Layout, journal_line, parse_journal_line
from airgap.audit.query import read_records
from airgap.audit.recovery import load_frontier
from airgap.audit.tiles import SEGMENT, Edge
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

VKEY = logs.vkey()


def kinds(folder):
    return [r["kind"] for r in read_records(folder / "audit")]


def good(folder, receipt):
    anchor = logs.keep(receipt, folder / "kept" / "r.tlog-proof")
    verdict = verify_log(folder / "audit", vkey=VKEY, anchors=[anchor])
    assert verdict.exit == 0, verdict.findings
    return verdict


# -- files -------------------------------------------------------------------------------------


def test_the_files_of_a_log_are_those_of_the_format(tmp_path):
    receipts = logs.write_log(tmp_path, 2)
    log = tmp_path / "audit" / "log"
    assert {p.name for p in log.iterdir()} == {
        "seg", "tile", "frontier", "objects", "anchors", "checkpoint", "checkpoints.jsonl",
    }  # fmt: skip
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert logs.segment(tmp_path).stat().st_mode & 0o777 == 0o600
    assert kinds(tmp_path) == ["boot", *["inference"] * 4, "shutdown"]
    journal = (log / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    assert [parse_journal_line(line).size for line in journal] == [1, 2, 3, 4, 5, 6]
    assert parse_journal_line(journal[-1]).note == (log / "checkpoint").read_text()
    good(tmp_path, receipts[-1])


def test_a_leaf_can_be_checked_by_hand(tmp_path):
    """Hash lines, link them and build the root with hashlib alone."""
    receipts = logs.write_log(tmp_path, 5)
    lines = logs.lines_of(tmp_path)
    hashes = [hashlib.sha256(b"\0" + line).digest() for line in lines]
    prev = "0" * 64
    for seq, line in enumerate(lines):
        record = json.loads(line)
        assert (record["seq"], record["prev"]) == (seq, prev)
        assert line == json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        prev = hashes[seq].hex()
    level = hashes
    while len(level) > 1:  # RFC 6962: an odd last node rises unchanged
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(p)).digest() if p[1:] else p[0] for p in pairs]
    origin, size, root = (tmp_path / "audit/log/checkpoint").read_text().split("\n")[:3]
    assert (origin, int(size), base64.b64decode(root)) == (logs.ORIGIN, len(lines), level[0])
    tile = tmp_path / f"audit/log/tile/0/000.p/{len(lines)}"
    assert tile.read_bytes() == b"".join(hashes)
    assert receipts[0].leaf == hashes[receipts[0].seq]


def test_every_receipt_proves_its_own_record_under_any_number_of_producers(tmp_path):
    receipts = []
    with logs.open_log(tmp_path) as log:

        def work():
            receipts.extend([log.append(logs.denial()) for _ in range(20)])

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = logs.lines_of(tmp_path)
    assert sorted(r.seq for r in receipts) == list(range(1, 321))
    for receipt in receipts:
        verify_receipt(receipt, VKEY)
        assert hashlib.sha256(b"\0" + lines[receipt.seq]).digest() == receipt.leaf
    assert len({r.size for r in receipts}) < 320  # commits were shared
    good(tmp_path, receipts[-1])


def test_an_object_is_stored_once_and_must_be_there_before_it_is_cited(tmp_path):
    with logs.open_log(tmp_path) as log:
        digest = log.put_object(b'{"a":1}')
        assert log.put_object(b'{"a":1}') == digest == Digest.of(b'{"a":1}')
        path = tmp_path / "audit/log/objects" / digest.hex[:2] / digest.hex
        assert path.read_bytes() == b'{"a":1}'
        with pytest.raises(RefusedError) as refused:
            log.append(logs.intent(Digest.of(b"never stored"), new_ulid()))
        assert refused.value.code == "audit.object"
        with pytest.raises(RefusedError):
            log.put_object(b"x" * ((1 << 22) + 1))
        log.append(Event(kind="enclave.seal", data={"rung": "A", "evidence": str(digest)}))
    with logs.open_log(tmp_path) as log:
        log.append(Event(kind="enclave.exit", data={"status": 0, "evidence": str(digest)}))


def test_intents_and_outcomes_come_in_order(tmp_path):
    with logs.open_log(tmp_path) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        for early in (logs.outcome(req), logs.outcome(req, phase="chunk", part=0, data=None)):
            with pytest.raises(RefusedError) as refused:
                log.append(early)
            assert refused.value.code == "audit.order"
        log.append(logs.intent(decision, req))
        with pytest.raises(RefusedError):
            log.append(logs.intent(decision, req))
        with pytest.raises(RefusedError):
            log.append(Event(kind="export", phase="outcome", req=req, data={"result": "failed"}))
        log.append(logs.outcome(req, phase="chunk", part=0, data=None, tok=None, lat_ms=None))
        receipt = log.append(logs.outcome(req))
        with pytest.raises(RefusedError):
            log.append(logs.outcome(req))
    good(tmp_path, receipt)


def test_a_heartbeat_comes_every_thousand_records(tmp_path):
    with logs.open_log(tmp_path) as log:
        for _ in range(1_050):
            receipt = log.append(logs.denial())
    records = list(read_records(tmp_path / "audit"))
    beats = [r for r in records if r["kind"] == "heartbeat"]
    assert len(beats) == 1
    assert beats[0]["data"]["free"] > 0
    verdict = good(tmp_path, receipt)
    assert not [f for f in verdict.findings if f.check == "heartbeat gap"]


def test_a_closed_log_admits_nothing(tmp_path):
    log = logs.open_log(tmp_path)
    assert log.state is State.RUNNING
    log.close()
    log.close()
    assert log.state is State.CLOSED
    with pytest.raises(FaultError) as fault:
        log.append(logs.denial())
    assert fault.value.code == "audit.closed"
    with pytest.raises(FaultError):
        log.put_object(b"{}")


# -- keys and places ---------------------------------------------------------------------------


def test_open_log_makes_key_and_log_in_the_usual_places(tmp_path):
    with open_log(tmp_path, site="Example University", host="Lab_1") as log:
        log.append(logs.denial())
        origin = log.origin
    assert origin.startswith("example-university/audit/")
    key = tmp_path / "keys" / "audit.pem"
    assert key.stat().st_mode & 0o777 == 0o400
    vkey = load_vkey(tmp_path / "keys" / "audit.vkey")
    assert vkey.name == origin
    with open_log(tmp_path, site="another name now") as log:
        assert log.origin == origin
        assert (log.size, str(vkey)) == (4, log.vkey)
        assert log.folder == tmp_path / "audit"
        assert parse_checkpoint(log.head.encode()).size == 4
    assert next(iter(read_records(tmp_path / "audit")))["host"] == "lab-1"
    assert (tmp_path / "audit" / "reserve").stat().st_blocks * 512 >= 64 << 20


def test_a_log_without_its_key_is_a_fault_and_no_new_key_is_made(tmp_path):
    open_log(tmp_path, site="x").close()
    (tmp_path / "keys/audit.pem").unlink()
    with pytest.raises(FaultError) as fault:
        open_log(tmp_path, site="x")
    assert fault.value.code == "audit.key"
    assert not (tmp_path / "keys/audit.pem").exists()


def test_keys_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "k.pem"
    text = create_log_key(path, site="lab.example")
    assert load_vkey(vkey_path(path)) == load_log_key(path).vkey
    assert str(load_vkey(vkey_path(path))) == text
    with pytest.raises(RefusedError):
        create_log_key(path, site="lab.example")
    with pytest.raises(RefusedError):
        create_log_key(tmp_path / "other.pem", site="Lab Example")
    path.chmod(0o440)
    with pytest.raises(RefusedError, match="others"):
        load_log_key(path)
    path.chmod(0o600)
    logs.replace(vkey_path(path), f"{logs.vkey()}\n".encode())
    with pytest.raises(RefusedError, match="not the key"):
        load_log_key(path)
    path.write_bytes(b"-----BEGIN nonsense")
    with pytest.raises(RefusedError, match="PEM"):
        load_log_key(path)
    path.write_bytes(b"x" * 17_000)
    with pytest.raises(RefusedError, match="larger"):
        load_log_key(path)
    path.unlink()
    with pytest.raises(FaultError):
        load_log_key(path)


def test_a_key_of_another_kind_is_refused(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = tmp_path / "k.pem"
    path.write_bytes(pem)
    path.chmod(0o400)
    with pytest.raises(RefusedError, match="Ed25519"):
        load_log_key(path)


def test_the_origin_must_be_the_keys(tmp_path):
    key = logs.write_key(tmp_path / "k.pem")
    with pytest.raises(RefusedError) as refused:
        AuditLog.open(tmp_path / "audit", key=key, origin="other.example/audit/1")
    assert refused.value.code == "audit.key"


def test_a_missing_log_is_not_made_unless_asked(tmp_path):
    key = logs.write_key(tmp_path / "k.pem")
    with pytest.raises(RefusedError) as refused:
        AuditLog.open(tmp_path / "audit", key=key, create=False)
    assert refused.value.code == "audit.absent"
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [("Example University", "example-university"), ("  \u00c9cole (A) ", "cole-a"), ("", "site")],
)
def test_a_site_name_is_made_of_an_institutions_name(text, name):
    assert site_name(text) == name


# -- recovery ----------------------------------------------------------------------------------


@pytest.fixture
def crashed(tmp_path):
    """Return a log whose writer vanished: its last state is `open`, nothing was published."""
    log = logs.open_log(tmp_path)
    receipts = [logs.infer(log) for _ in range(5)]
    decision, req = log.put_object(logs.DECISION), new_ulid()
    receipts.append(log.append(logs.intent(decision, req)))
    copy = logs.copy(tmp_path, tmp_path / "crashed")
    log.close()
    return copy, receipts, req


def test_an_intent_that_a_crash_left_open_is_closed_as_unknown(crashed):
    folder, receipts, req = crashed
    with logs.open_log(folder):
        pass
    last = [r for r in read_records(folder / "audit") if r.get("req") == req]
    assert [r["phase"] for r in last] == ["intent", "outcome"]
    assert last[1]["data"] == {"result": "unknown"}
    assert last[1]["actor"]["auth"] == "local"
    assert kinds(folder)[-4:] == ["inference", "recovery", "boot", "shutdown"]
    good(folder, receipts[-1])


def _no_journal_tail(log):
    lines = (log / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    logs.replace(log / "checkpoints.jsonl", b"".join(lines[:3]))


def _torn_journal(log):
    content = (log / "checkpoints.jsonl").read_bytes()
    logs.replace(log / "checkpoints.jsonl", content[:-20])


def _zeros_in_journal(log):
    with (log / "checkpoints.jsonl").open("ab") as file:
        file.write(b"\0" * 300)


def _garbage_in_journal(log):
    with (log / "checkpoints.jsonl").open("ab") as file:
        file.write(b'garbage\n{"note": 5}\n{"note": "x"}\n' + b"\xff" * 30 + b"\n")


def _empty_checkpoint(log):
    logs.replace(log / "checkpoint", b"")


def _no_checkpoint(log):
    (log / "checkpoint").unlink()


def _no_tiles(log):
    for path in sorted((log / "tile").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _bad_tile(log):
    for path in (log / "tile").rglob("*.p/*"):
        logs.replace(path, b"\0" * path.stat().st_size)


CRASHES = [
    _no_journal_tail, _torn_journal, _zeros_in_journal, _garbage_in_journal, _empty_checkpoint,
    _no_checkpoint, _no_tiles, _bad_tile,
]  # fmt: skip


@pytest.mark.parametrize("act", CRASHES)
def test_what_a_power_cut_may_leave_is_mended_and_nothing_acknowledged_is_lost(crashed, act):
    folder, receipts, _ = crashed
    act(folder / "audit" / "log")
    before = verify_log(folder / "audit", vkey=VKEY)
    assert before.exit == 3, before.findings
    with logs.open_log(folder):
        pass
    lines = logs.lines_of(folder)
    for receipt in receipts:
        assert hashlib.sha256(b"\0" + lines[receipt.seq]).digest() == receipt.leaf
    verdict = good(folder, receipts[-1])
    assert not [f for f in verdict.findings if f.level == "cannot tell"]


TAILS = {
    "half a line": lambda line: line[: len(line) // 2],
    "zeros": lambda line: b"\0" * len(line),
    "zeros, then a good line": lambda line: b"\0" * 50 + b"\n" + line + b"\n",
    "a line off the chain": lambda line: line.replace(b'"prev":"', b'"prev":"0')[:-1] + b"\n",
    "not in the schema": lambda _: b'{"v":1}\n',
    "a newline alone": lambda _: b"\n",
    "bytes": lambda _: bytes(range(256)),
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_a_torn_tail_is_quarantined_byte_for_byte(crashed, tail):
    folder, receipts, _ = crashed
    path = logs.segment(folder)
    whole = path.read_bytes()
    debris = tail(logs.lines_of(folder)[-1])
    logs.replace(path, whole + debris)
    with logs.open_log(folder):
        pass
    assert (folder / "audit/torn/00000000").read_bytes() == debris
    assert path.read_bytes().startswith(whole)
    recovery = next(r for r in read_records(folder / "audit") if r["kind"] == "recovery")
    assert recovery["data"]["file"] == "00000000"
    assert recovery["data"]["signed"] == receipts[-1].size
    good(folder, receipts[-1])


def test_whole_records_past_the_last_head_are_kept_and_signed(crashed):
    folder, receipts, _ = crashed
    log = folder / "audit/log"
    _no_journal_tail(log)
    logs.replace(log / "checkpoint", b"")
    whole = logs.segment(folder).read_bytes()
    with logs.open_log(folder):
        pass
    assert logs.segment(folder).read_bytes().startswith(whole)
    assert not (folder / "audit/torn").exists()
    good(folder, receipts[-1])


def test_a_checkpoint_newer_than_the_journal_counts_as_head(crashed):
    folder, receipts, _ = crashed
    log = folder / "audit/log"
    logs.replace(log / "checkpoint", receipts[-1].note.encode())
    _no_journal_tail(log)
    logs.set_lines(folder, logs.lines_of(folder)[:-1])
    with pytest.raises(RefusedError, match="signed size"):
        logs.open_log(folder)


def test_two_heads_of_one_size_and_two_roots_are_refused(crashed):
    from airgap.audit.checkpoint import sign_checkpoint

    folder, receipts, _ = crashed
    other = sign_checkpoint(logs.log_key(), receipts[-1].size, b"\7" * 32)
    logs.replace(folder / "audit/log/checkpoint", other.note.encode())
    with pytest.raises(RefusedError, match="different roots"):
        logs.open_log(folder)
    assert verify_log(folder / "audit", vkey=VKEY).exit == 1


def test_a_log_that_never_got_its_first_head_is_started_anew(tmp_path):
    (tmp_path / "audit/log.new/seg").mkdir(parents=True)
    (tmp_path / "audit/log.new/seg/00000000.jsonl").write_bytes(b'{"half')
    receipt = logs.write_log(tmp_path, 1)[-1]
    assert not (tmp_path / "audit/log.new").exists()
    good(tmp_path, receipt)


def test_anchors_that_came_back_are_compared_at_open(tmp_path):
    receipts = logs.write_log(tmp_path, 4)
    anchors = tmp_path / "audit/log/anchors"
    logs.keep(receipts[1], anchors / "1.tlog-proof")
    (anchors / "head.note").write_text(receipts[2].note)
    (anchors / "noise").write_bytes(b"\xff")
    with logs.open_log(tmp_path) as log:
        assert log.anchored == receipts[2].size
    key = logs.log_key()
    from airgap.audit.checkpoint import sign_checkpoint

    (anchors / "fork.note").write_text(sign_checkpoint(key, 3, b"\7" * 32).note)
    with pytest.raises(RefusedError, match="root at size 3"):
        logs.open_log(tmp_path)
    (anchors / "fork.note").write_text(sign_checkpoint(key, 9_999, b"\7" * 32).note)
    with pytest.raises(RefusedError, match="anchored to size 9999"):
        logs.open_log(tmp_path)


def test_a_disk_without_room_for_the_reserve_drains(tmp_path):
    disk = logs.FailingDisk(1, 28, only=("allocate",))
    with logs.open_log(tmp_path, disk=disk, reserve_bytes=1 << 20) as log:
        assert log.state is State.DRAIN
        with pytest.raises(FaultError) as fault:
            log.append(logs.denial())
        assert fault.value.code == "audit.full"
        log.append(Event(kind="verify.result", data={"verdict": "good"}))
    with logs.open_log(tmp_path, reserve_bytes=1 << 20) as log:
        log.append(logs.denial())


def test_another_fault_of_the_reserve_is_a_fault(tmp_path):
    disk = logs.FailingDisk(1, 5, only=("allocate",))
    with pytest.raises(OSError, match="Input/output"):
        logs.open_log(tmp_path, disk=disk, reserve_bytes=1 << 20)
    logs.open_log(tmp_path).close()


# -- more than one segment ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Return a log that has begun its second segment, and a receipt of each."""
    folder = tmp_path_factory.mktemp("long")
    event = logs.denial()
    with logs.open_log(folder) as log:
        first = log.append(event)
        log.append(logs.intent(log.put_object(logs.DECISION), new_ulid()))
        while log.size < SEGMENT - 600:
            for _ in range(511):
                log._submit(event, None, None)
            log.append(event)
        while log.size < SEGMENT - 3:
            log.append(event)
        log.append(logs.intent(log.put_object(logs.DECISION), new_ulid()))
    with logs.open_log(folder) as log:  # What opening writes crosses the segment's end.
        last = [log.append(event) for _ in range(600)][-1]
    return folder, first, last


@pytest.fixture
def second(long, tmp_path):
    """Return a copy by hard links; whoever changes a file replaces it."""
    import os
    import shutil

    folder, first, last = long
    shutil.copytree(folder, tmp_path / "copy", copy_function=os.link)
    for name in ("audit/.lock", "audit/log/checkpoints.jsonl", "audit/log/seg/00000001.jsonl"):
        path = tmp_path / "copy" / name
        logs.replace(path, path.read_bytes())
    return tmp_path / "copy", first, last


def test_a_full_segment_leaves_a_frontier_that_a_signed_head_confirms(long):
    folder, first, last = long
    layout = Layout(folder / "audit")
    assert len(logs.lines_of(folder, 0)) == SEGMENT
    frontier = load_frontier(layout.frontier(0), VKEY)
    assert frontier.head.size == SEGMENT
    edge = Edge()
    for line in logs.lines_of(folder, 0):
        edge.append(hashlib.sha256(b"\0" + line).digest())
    assert frontier.segments == [edge.root()]
    records = [json.loads(line) for line in logs.lines_of(folder, 0)]
    opened = {r["req"] for r in records if r["phase"] == "intent"}
    closed = {r["req"] for r in records if r["phase"] == "outcome"}
    assert len(opened) == 2
    assert set(frontier.intents) == opened - closed
    assert len(frontier.intents) == 1  # its outcome is the first record of the next segment
    assert (layout.tiles / "0/255").stat().st_size == 8192
    assert (layout.tiles / "1/000").stat().st_size == 8192
    anchors = folder / "kept"
    logs.keep(first, anchors / "first.tlog-proof")
    logs.keep(last, anchors / "last.tlog-proof")
    verdict = verify_log(folder / "audit", vkey=VKEY, anchors=[anchors])
    assert (verdict.exit, verdict.anchors) == (0, 2), verdict.findings


def test_opening_reads_only_past_the_last_frontier(second):
    folder, _, last = second
    content = logs.segment(folder, 0).read_bytes()
    logs.replace(logs.segment(folder, 0), b"#" * len(content))  # `audit verify` is for this
    with logs.open_log(folder) as log:
        assert log.size == last.size + 2  # shutdown, boot: no intent is open
    assert verify_log(folder / "audit", vkey=VKEY).exit == 1


def test_a_forged_frontier_is_not_believed(second):
    folder, _, last = second
    path = folder / "audit/log/frontier/00000000.json"
    entry = json.loads(path.read_bytes())
    for change in (
        {"segments": ["00" * 32]},
        {"note": last.note},
        {"segments": [5]},
        {"open": 3},
        {"note": entry["note"].replace(logs.ORIGIN, "other.example")},
    ):
        logs.replace(path, json.dumps(entry | change).encode())
        assert load_frontier(path, VKEY) is None
    with logs.open_log(folder) as log:
        assert log.size == last.size + 2
    assert load_frontier(folder / "nothing", VKEY) is None


def test_tiles_of_closed_segments_are_written_again_when_they_are_gone(second):
    folder, _, last = second
    tile = folder / "audit/log/tile/0/100"
    content = tile.read_bytes()
    tile.unlink()
    with logs.open_log(folder):
        pass
    assert tile.read_bytes() == content
    good(folder, last)


def test_t14_a_torn_middle_segment_is_refused(second):
    folder, _, _ = second
    content = logs.segment(folder, 0).read_bytes()
    logs.replace(logs.segment(folder, 0), content[:-30])
    (folder / "audit/log/frontier/00000000.json").unlink()
    assert verify_log(folder / "audit", vkey=VKEY).exit == 1
    with pytest.raises(RefusedError) as refused:
        logs.open_log(folder)
    assert refused.value.code == "audit.history"


@pytest.mark.parametrize("index", [0, 1])
def test_t16_a_missing_segment_is_tampered_and_refused(second, index):
    folder, _, _ = second
    logs.segment(folder, index).unlink()
    verdict = verify_log(folder / "audit", vkey=VKEY)
    assert verdict.exit == 1
    with pytest.raises(RefusedError) as refused:
        logs.open_log(folder)
    assert refused.value.code == "audit.history"


def test_a_file_that_is_no_segment_is_refused(crashed):
    folder, _, _ = crashed
    (folder / "audit/log/seg/notes.txt").write_text("x")
    with pytest.raises(RefusedError) as refused:
        logs.open_log(folder)
    assert refused.value.code == "audit.history"


def test_a_head_lost_with_the_journal_is_found_in_the_frontier(second):
    folder, _, last = second
    journal = folder / "audit/log/checkpoints.jsonl"
    early = journal.read_bytes().splitlines(keepends=True)[:2]
    logs.replace(journal, b"".join(early))
    logs.replace(folder / "audit/log/checkpoint", b"")
    with logs.open_log(folder) as log:
        assert log.size == last.size + 3  # the unclean end is told by a recovery record, too
    assert journal_line(
        load_frontier(folder / "audit/log/frontier/00000000.json", VKEY).head.note
    ) in (journal.read_bytes())


def test_a_log_that_is_gone_is_not_begun_again_in_silence(tmp_path):
    with open_log(tmp_path, site="Test Lab"):
        pass
    with open_log(tmp_path, site="Test Lab"):
        pass
    shutil.rmtree(tmp_path / "audit")
    with pytest.raises(RefusedError) as refused:
        open_log(tmp_path, site="Test Lab")
    assert refused.value.code == "audit.history"
    assert not (tmp_path / "audit").exists()


def test_a_first_start_that_was_cut_off_after_the_key_goes_on(tmp_path):
    create_log_key(tmp_path / "keys" / "audit.pem", site="test-lab")
    with open_log(tmp_path, site="Test Lab") as log:
        assert log.size > 0
