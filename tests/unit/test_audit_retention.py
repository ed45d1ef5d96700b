"""Pruning by two people, partial exports, capacity: what may go, and what verifies afterwards."""

import os
import shutil
from datetime import UTC, datetime, timedelta

import audit_logs as logs
import pytest

from airgap.audit import Actor, Capacity, Event, State, load_ring, verify_log
from airgap.audit.capacity import LastExport, last_export, note_export
from airgap.audit.cosigning import import_cosigned
from airgap.audit.export.sign import ExportKey
from airgap.audit.export.write import Plan, export_log
from airgap.audit.layout import Layout, last_checkpoint, read_kept, segment_range
from airgap.audit.people import Act
from airgap.audit.query import read_records
from airgap.audit.retention import PROFILES, plan, prune, site_profile
from airgap.audit.steward import OwnersLog
from airgap.audit.tiles import SEGMENT
from airgap.audit.tree import StoredTree
from airgap.audit.witness import Request, Witness
from policy.errors import AirgapError, FaultError, RefusedError

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)  # the records are a year old by the fixed clock
PROFILE = PROFILES["m-26-14"]
WHO = Actor("isso")
QUICK = logs.QuickDisk()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Return a log past its first segment, exported, with a cosigned head, and its keys changed."""
    folder = tmp_path_factory.mktemp("long")
    with logs.open_log(folder) as log:
        logs.infer(log)
        log.rotate_key(WHO)
        logs.fill(log, SEGMENT + 300)
        early = log.append(logs.denial())
    ring = load_ring(folder / "keys/audit.vkey")
    witness = Witness.create(folder / "w1", "isso.example/w1")
    witness.trust(ring)
    layout = Layout(folder / "audit")
    head = last_checkpoint(layout.journal)[0]
    request = Request(0, StoredTree(layout).consistency(0, head), head)
    (folder / "cosigned.note").write_text(witness.cosign(request, 1_764_100_000))
    (folder / "policy.tlog").write_text(f"witness w1 {witness.vkey}\nquorum w1\n")
    logs.keep(early, folder / "anchors" / "early.tlog-proof")
    shutil.copy(folder / "cosigned.note", folder / "anchors" / "cosigned.note")
    key = ExportKey.create(folder / "keys/export.pem")
    export_log(layout, folder / "out", Plan(head, "jsonl", SEGMENT + 100, 2, key=key))
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return logs.people_of(folder, ada="isso", bob="compliance")


@pytest.fixture(scope="module")
def gone(long, people, tmp_path_factory):
    """Return the long log without its first segment, and what the pruning said."""
    tree = linked(long, tmp_path_factory.mktemp("gone") / "tree")
    trust, signers = people
    with logs.open_log(tree) as log:
        ready(log, tree)
        act = logs.signed_act(act_of(), *signers.values())
        done = prune(log, act, trust=trust, profile=PROFILE, now=NOW, actor=WHO, disk=QUICK)
    assert (done.first, done.last) == (0, SEGMENT - 1)
    return tree


def linked(folder, target):
    """Return a copy by hard links; whoever changes a file replaces it."""
    shutil.copytree(folder, target, copy_function=os.link)
    for name in (".lock", "log/checkpoints.jsonl", "log/seg/00000001.jsonl"):
        path = target / "audit" / name
        logs.replace(path, path.read_bytes())
    return target


@pytest.fixture
def tree(long, tmp_path):
    return linked(long, tmp_path / "tree")


@pytest.fixture
def pruned(gone, tmp_path):
    return linked(gone, tmp_path / "pruned")


def act_of(**changes):
    fields = {
        "act": "prune", "origin": logs.ORIGIN, "issued": NOW - timedelta(hours=1), "reason": "age",
        "last": SEGMENT - 1, "profile": PROFILE.name,
    }  # fmt: skip
    return Act(**(fields | changes))


def ready(log, tree):
    """Import the cosigned head and note an export, as they must come before a pruning."""
    import_cosigned(log, (tree / "cosigned.note").read_bytes(), (tree / "policy.tlog").read_bytes())
    note_export(Layout(tree / "audit"), LastExport(1, SEGMENT + 200, 1), QUICK)


def verify(folder, tree, **more):
    ring = load_ring(tree / "keys/audit.vkey")
    return verify_log(folder, vkey=ring, anchors=[tree / "anchors"], **more)


def told(verdict):
    return "\n".join(map(str, verdict.findings))


# -- pruning ------------------------------------------------------------


def test_a_pruned_log_verifies_from_its_leaf_hashes_and_goes_on(long, pruned):
    before, tree = verify(long / "audit", long), pruned
    assert before.exit == 0, told(before)
    layout = Layout(tree / "audit")
    assert list(segment_range(layout)) == [1]
    after = verify(tree / "audit", tree)
    assert after.exit == 0, told(after)
    assert after.first == SEGMENT
    assert after.anchors == before.anchors
    assert "by hash alone" in told(after)
    with logs.open_log(tree) as log:
        logs.infer(log)
    assert verify(tree / "audit", tree).exit == 0
    shutil.rmtree(tree / "audit/log/frontier")  # derived: the tiles give the tree again
    (tree / "audit/log/frontier").mkdir()
    with logs.open_log(tree) as log:
        logs.infer(log)
    assert verify(tree / "audit", tree).exit == 0
    act = [r for r in read_records(tree / "audit") if r["kind"] == "prune"]
    assert [r["phase"] for r in act] == ["intent", "outcome"]
    assert act[0]["data"]["person_1"] == "ada"
    assert act[0]["data"]["person_2"] == "bob"
    assert act[0]["data"]["root"] == StoredTree(layout).root(SEGMENT).hex()
    kinds = {line.split(b'"kind":"')[1].split(b'"')[0] for line in read_kept(layout).values()}
    assert kinds == {b"key.rotate", b"prune"}


def test_a_log_is_pruned_while_its_service_writes(long, people, tmp_path):
    from test_audit_service import served

    tree = linked(long, tmp_path / "tree")
    trust, signers = people
    with served(tree) as (log, path), OwnersLog(path) as held:
        ready(held, tree)
        note_export(Layout(tree / "audit"), LastExport(1, SEGMENT + 200, 1), QUICK)
        act = logs.signed_act(act_of(), *signers.values())
        prune(held, act, trust=trust, profile=PROFILE, now=NOW, actor=WHO, disk=QUICK)
        receipt = logs.infer(log)
    assert list(segment_range(Layout(tree / "audit"))) == [1]
    logs.keep(receipt, tree / "anchors" / "late.tlog-proof")
    verdict = verify(tree / "audit", tree)
    assert verdict.exit == 0, told(verdict)


def test_a_record_that_was_pruned_can_still_be_proved_to_be_in_the_log(pruned):
    tree_ = StoredTree(Layout(pruned / "audit"))
    head = last_checkpoint(pruned / "audit/log/checkpoints.jsonl")[0]
    assert tree_.receipt(5, head).leaf == tree_.node((0, 5))


@pytest.mark.parametrize(
    "case",
    [
        ({}, ("ada",), ready, "audit.people"),
        ({"last": SEGMENT + 299}, ("ada", "bob"), ready, "audit.retention"),
        ({"last": 2 * SEGMENT - 1}, ("ada", "bob"), ready, "audit.retention"),
        ({"last": None}, ("ada", "bob"), ready, "audit.retention"),
        ({"profile": "site"}, ("ada", "bob"), ready, "audit.retention"),
        ({}, ("ada", "bob"), lambda _log, _tree: None, "audit.retention"),
        ({"origin": "x/audit/1"}, ("ada", "bob"), ready, "audit.people"),
    ],
    ids=[
        "one person", "within a segment", "the live segment", "no end", "another profile",
        "not cosigned, not exported", "another log",
    ],
)  # fmt: skip
def test_t47_what_is_not_exported_cosigned_old_and_signed_by_two_stays(tree, people, case):
    changes, signed, prepare, code = case
    trust, signers = people
    with logs.open_log(tree) as log:
        prepare(log, tree)
        envelope = logs.signed_act(act_of(**changes), *(signers[name] for name in signed))
        with pytest.raises(RefusedError) as refused:
            prune(log, envelope, trust=trust, profile=PROFILE, now=NOW, actor=WHO)
        assert refused.value.code == code
    assert list(segment_range(Layout(tree / "audit"))) == [0, 1]
    assert b'"kind":"prune"' not in logs.segment(tree, 1).read_bytes()


def test_t47_each_condition_alone_holds_a_pruning(tree):
    layout = Layout(tree / "audit")
    with logs.open_log(tree) as log:
        assert plan(log, PROFILE, NOW).last == -1
        ready(log, tree)
        assert plan(log, PROFILE, NOW).last == SEGMENT - 1
        assert plan(log, site_profile(36), NOW).last == -1
        assert "36 months" in plan(log, site_profile(36), NOW).reasons[0]
        note_export(layout, LastExport(1, SEGMENT - 1, 1), QUICK)
        assert "exported up to" in plan(log, PROFILE, NOW).reasons[0]
        note_export(layout, LastExport(1, SEGMENT, 1), QUICK)
        assert plan(log, PROFILE, NOW).last == SEGMENT - 1
        layout.policy.unlink()
        assert "cosigned up to 0" in plan(log, PROFILE, NOW).reasons[0]


def _no_prune_record(folder):
    logs.replace(folder / "log/kept.jsonl", b"")


def _forged_prune_record(folder):
    kept = folder / "log/kept.jsonl"
    logs.replace(kept, kept.read_bytes().replace(b'"last":65535', b'"last":95535'))


def _pruned_tile_edited(folder):
    tile = folder / "log/tile/0/003"
    content = bytearray(tile.read_bytes())
    content[40] ^= 1
    logs.replace(tile, bytes(content))


def _pruned_tile_gone(folder):
    (folder / "log/tile/0/003").unlink()


@pytest.mark.parametrize(
    ("act", "exit_", "opens"),
    [
        (_no_prune_record, 1, False),
        (_forged_prune_record, 1, False),
        (_pruned_tile_edited, 1, True),  # the frontier is believed; `verify` is for this
        (_pruned_tile_gone, 3, False),
    ],
)
def test_what_a_pruned_log_leaves_cannot_be_changed(pruned, act, exit_, opens):
    assert verify(pruned / "audit", pruned).exit == 0
    act(pruned / "audit")
    verdict = verify(pruned / "audit", pruned)
    assert verdict.exit == exit_, told(verdict)
    if opens:
        logs.open_log(pruned).close()
    else:
        with pytest.raises((RefusedError, OSError)):
            logs.open_log(pruned).close()


def test_t16_a_beginning_that_nobody_pruned_on_record_is_tampering(tree):
    logs.segment(tree, 0).unlink()
    verdict = verify(tree / "audit", tree)
    assert verdict.exit == 1
    assert "a pruning on record" in told(verdict)
    with pytest.raises(RefusedError) as refused:
        logs.open_log(tree)
    assert refused.value.code == "audit.history"


# -- exports since an earlier one ------------------------------------------------------------


@pytest.fixture
def export(long, tmp_path):
    """Return an export that goes on from a size in the second segment."""
    return shutil.copytree(long / "out", tmp_path / "out", copy_function=os.link)


def test_an_export_since_a_size_holds_the_rest_and_proves_the_beginning(long, export):
    tree = long
    verdict = verify(export, tree)
    assert verdict.exit == 0, told(verdict)
    assert (verdict.first, verdict.anchors) == (SEGMENT, 2)
    assert [p.name for p in (export / "log/seg").iterdir()] == ["00000001.jsonl"]
    rows = (export / "records.jsonl").read_bytes().splitlines()
    assert b'"seq":%d}' % SEGMENT in rows[0][-20:]
    assert (export / "since.tlog-witness").read_text().startswith(f"old {SEGMENT + 100}\n")
    size = sum(p.stat().st_size for p in export.rglob("*") if p.is_file())
    whole = logs.segment(tree, 0).stat().st_size
    assert size < whole / 4


def test_entry_bundles_are_the_lines_with_their_length(long, export):
    bundle = (export / "log/tile/entries/256").read_bytes()
    lines = []
    while bundle:
        length = int.from_bytes(bundle[:2], "big")
        lines.append(bundle[2 : 2 + length])
        bundle = bundle[2 + length :]
    assert lines == logs.lines_of(long, 1)[:256]


def _manifest(change):
    def act(export):
        path = export / "manifest.json"
        logs.replace(path, change(path.read_bytes()))

    return act


def _no_signature(scheme):
    import json

    def act(export):
        path = export / "manifest.sig"
        document = json.loads(path.read_text())
        del document["signatures"][scheme]
        logs.replace(path, json.dumps(document).encode())

    return act


def _other_key(export):
    manifest = (export / "manifest.json").read_bytes()
    other = ExportKey.create(export.parent / "other.pem")
    logs.replace(export / "manifest.sig", other.sign(manifest))


def _flip(export):
    path = export / "manifest.sig"
    text = path.read_text()
    at = text.index('"ml-dsa-87": "') + 40
    logs.replace(path, (text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]).encode())


MEDIA = {
    "T44 without its ML-DSA signature": _no_signature("ml-dsa-87"),
    "T44 without its Ed25519 signature": _no_signature("ed25519"),
    "T44 without any signature": lambda export: (export / "manifest.sig").unlink(),
    "T44 signed by another key": _other_key,
    "T44 a signature changed": _flip,
    "T44 signatures malformed": lambda e: logs.replace(e / "manifest.sig", b"[]"),
    "T48 another number": _manifest(lambda c: c.replace(b'"number": 2', b'"number": 9')),
    "another beginning": _manifest(lambda c: c.replace(b'"first": 65536', b'"first": 0')),
    "another proof": lambda e: logs.replace(
        e / "since.tlog-witness",
        (e / "since.tlog-witness").read_bytes().replace(b"old 65636", b"old 65635"),
    ),
    "a bundle changed": lambda e: logs.replace(e / "log/tile/entries/256", b"x"),
    "a bundle dropped": lambda e: (e / "log/tile/entries/256").unlink(),
    "a leaf of the beginning changed": _pruned_tile_edited,
}


@pytest.mark.parametrize("act", MEDIA.values(), ids=MEDIA.keys())
def test_t44_an_export_is_what_its_host_signed(long, export, act):
    tree = long
    public = ExportKey.load(tree / "keys/export.pem").public
    assert verify(export, tree, export_keys=public).exit == 0
    act(export)
    verdict = verify(export, tree, export_keys=public)
    assert verdict.exit == 1, told(verdict)


def test_t44_the_importer_may_ask_for_less(long, export):
    tree = long
    public = ExportKey.load(tree / "keys/export.pem").public
    _no_signature("ml-dsa-87")(export)
    assert verify(export, tree, export_keys=public, required=("ed25519",)).exit == 0


def test_a_since_beyond_the_log_is_refused(long, tmp_path):
    layout = Layout(long / "audit")
    head = last_checkpoint(layout.journal)[0]
    with pytest.raises(RefusedError):
        export_log(layout, tmp_path / "out", Plan(head, "jsonl", head.size + 1))
    assert not (tmp_path / "out").exists()


def test_export_keys_that_others_can_read_or_that_are_none_are_refused(tmp_path):
    path = tmp_path / "export.pem"
    ExportKey.create(path)
    with pytest.raises(RefusedError):
        ExportKey.create(path)
    path.chmod(0o640)
    with pytest.raises(RefusedError):
        ExportKey.load(path)
    with pytest.raises(RefusedError):
        ExportKey.load(tmp_path / "export.pub")
    with pytest.raises(FaultError):
        ExportKey.load(tmp_path / "none")


# -- capacity ------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "days", "refuse", "state"),
    [
        (0.10, 0, False, State.RUNNING),
        (0.75, 0, False, State.WARN),
        (0.90, 0, False, State.ALARM),
        (1.00, 0, False, State.DRAIN),
        (0.10, 5, False, State.RUNNING),
        (0.10, 5.1, False, State.WARN),
        (0.10, 8, False, State.WARN),
        (0.10, 8, True, State.DRAIN),
        (0.95, 6, True, State.ALARM),
    ],
)
def test_space_and_export_age_give_the_state(used, days, refuse, state):
    capacity = Capacity(quota_bytes=1 << 20, refuse_overdue=refuse)
    assert capacity.state(used, int(days * 86_400)) is state


def test_a_quota_warns_alarms_and_then_admits_nothing_new(tmp_path):
    clock, quota = logs.FixedClock(), 120_000
    capacity = Capacity(quota_bytes=quota, reserve_bytes=0)
    with logs.open_log(tmp_path, clock=clock, capacity=capacity) as log:
        seen = [log.state]
        decision, req = log.put_object(logs.DECISION), logs.new_ulid()
        log.append(logs.intent(decision, req))
        while log.state is not State.DRAIN:
            log.append(logs.denial())
            if log.state is not seen[-1]:
                seen.append(log.state)
        with pytest.raises(FaultError) as full:
            log.append(logs.denial())
        assert full.value.code == "audit.full"
        assert seen == [State.RUNNING, State.WARN, State.ALARM, State.DRAIN]
        log.append(logs.outcome(req))  # what was begun may end
        log.append(Event(kind="verify.result", data={"verdict": "good"}))
        with pytest.raises(FaultError):
            log.append(logs.intent(decision, logs.new_ulid()))
    beats = [
        r["data"]["state"] for r in read_records(tmp_path / "audit") if r["kind"] == "heartbeat"
    ]
    assert beats == ["warn", "alarm", "drain"]
    assert verify_log(tmp_path / "audit", vkey=logs.vkey()).exit == 3
    with logs.open_log(tmp_path, clock=clock, capacity=capacity) as again:
        assert again.state is State.DRAIN
    with logs.open_log(tmp_path, clock=clock) as free:
        assert free.state is State.RUNNING


def test_a_week_without_an_export_warns_and_where_the_site_chose_stops(tmp_path):
    clock = logs.FixedClock()
    logs.write_log(tmp_path, 1, clock=clock)
    clock.slept_s = 6 * 86_400
    with logs.open_log(tmp_path, clock=clock) as log:
        assert log.state is State.WARN
        logs.infer(log)
        log.note_export(log.size)
        logs.infer(log)
        assert log.state is State.RUNNING
        assert log.last_export.number == 1
    strict = Capacity(refuse_overdue=True, reserve_bytes=0)
    clock.slept_s += 8 * 86_400
    with logs.open_log(tmp_path, clock=clock, capacity=strict) as log:
        assert log.state is State.DRAIN
        with pytest.raises(AirgapError) as full:
            logs.infer(log)
        assert full.value.code == "audit.full"
        log.note_export(log.size)
        log.append(Event(kind="verify.result", data={"verdict": "good"}))
        logs.infer(log)
    assert last_export(Layout(tmp_path / "audit")).number == 2
