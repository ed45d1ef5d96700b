"""After a disaster: two people begin a new log that names the old one, and verifiers say so."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import audit_logs as logs
import pytest
from audit_exports import Case, export_of, go_verifier
from test_audit_acts_cli import enrol
from test_audit_cli import result, run

from airgap.audit import load_ring, open_log, verify_log
from airgap.audit.checkpoint import parse_checkpoint
from airgap.audit.export.importing import Memory
from airgap.audit.findings import NOTE, TAMPERED, UNKNOWN
from airgap.audit.identity import begin_again, last_known
from airgap.audit.layout import Layout, last_checkpoint
from airgap.audit.people import Act
from airgap.audit.previous import Previous
from airgap.audit.query import read_records
from airgap.config import LOG_ACCOUNT
from airgap.demo import site_toml
from policy.errors import AirgapError, FaultError, RefusedError

__all__ = ["go_verifier"]  # a fixture
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
QUICK = logs.QuickDisk()


@pytest.fixture
def tree(tmp_path):
    """Return a tree whose log has a few records, and receipts of them kept elsewhere."""
    folder = tmp_path / "tree"
    folder.mkdir()
    with open_log(folder, site="lab.example") as log:
        receipts = [logs.infer(log) for _ in range(3)]
    for number, receipt in enumerate(receipts):
        logs.keep(receipt, tmp_path / "kept" / f"{number}.tlog-proof")
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return logs.people_of(folder, ada="isso", bob="compliance")


def act_for(known, **changes):
    fields = {
        "act": "new-log", "origin": known.origin, "issued": NOW - timedelta(hours=1),
        "reason": "the disk failed", "previous": str(known) if known.size else None,
    }  # fmt: skip
    return Act(**(fields | changes))


def begin(
    tree, people, known=None, *, signed=("ada", "bob"), disk=QUICK, account=LOG_ACCOUNT, **changes
):
    trust, signers = people
    act = act_for(last_known(tree) if known is None else known, **changes)
    envelope = logs.signed_act(act, *(signers[name] for name in signed))
    return begin_again(
        tree, envelope, site="lab.example", trust=trust, now=NOW, disk=disk,
        clock=logs.FixedClock(), account=account,
    )  # fmt: skip


def lose_log(tree):
    shutil.rmtree(tree / "audit")


def lose_key(tree):
    (tree / "keys/audit.pem").unlink()


def lose_keys(tree):
    for path in (tree / "keys").glob("audit.*"):
        path.unlink()


def lose_all(tree):
    lose_log(tree)
    lose_keys(tree)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_a_new_log_that_root_begins_belongs_to_whom_the_old_one_did(tree, people):
    for folder in (tree / "audit", tree / "keys"):
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
    with pytest.raises(RefusedError) as refused:
        begin(tree, people)
    assert refused.value.code == "audit.owner"
    begin(tree, people, account="nobody")
    found = [path for path in tree.rglob("*") if path.lstat().st_uid != 65534]
    assert found == []
    assert len(list(tree.glob("audit*"))) == 2


def tear(tree):
    path = tree / "audit/log/seg/00000000.jsonl"
    path.write_bytes(path.read_bytes()[:400])


LOSSES = {"the log": lose_log, "the key": lose_key, "all keys": lose_keys, "records": tear}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_lost_opens_no_log_until_two_people_begin_a_new_one(tree, people, loss):
    before = last_known(tree)
    LOSSES[loss](tree)
    with pytest.raises(AirgapError) as stopped:
        open_log(tree, site="lab.example")
    assert stopped.value.code in {"audit.history", "audit.key"}
    known = last_known(tree)
    assert known == (Previous(before.origin) if loss == "the log" else before)
    done = begin(tree, people)
    assert (done.previous, done.people) == (str(known), ("ada", "bob"))
    assert done.origin != before.origin
    with open_log(tree, site="lab.example") as log:
        receipt = logs.infer(log)
        assert log.origin == done.origin
    first = next(iter(read_records(tree / "audit")))
    assert (first["kind"], first["data"]["previous"]) == ("boot", str(known))
    assert (first["data"]["person_1"], first["data"]["person_2"]) == ("ada", "bob")
    assert first["data"]["reason"] == "the disk failed"
    kept = logs.keep(receipt, tree / "kept.tlog-proof")
    verdict = verify_log(tree / "audit", vkey=load_ring(tree / "keys/audit.vkey"), anchors=[kept])
    assert (verdict.exit, verdict.previous) == (0, str(known)), verdict.findings
    assert "begun by ada and bob" in str(verdict.findings[-1])
    assert all(path.startswith(str(tree)) for path in done.aside)
    if loss != "the log":
        old = next(tree.glob("audit.lost-*"))
        assert last_checkpoint(Layout(old).journal)[0].origin == before.origin


def test_a_head_from_outside_says_more_than_what_is_left(tree, tmp_path, people):
    whole = last_known(tree)
    lose_all(tree)
    assert last_known(tree) == Previous("-")
    known = last_known(tree, [tmp_path / "kept"])
    assert (known.origin, known.size) == (whole.origin, 7)
    assert begin(tree, people, known).previous == str(known)


def test_where_nothing_is_known_the_new_log_says_that(tree, people):
    lose_all(tree)
    assert begin(tree, people).previous == "-"


def one_person(tree, people):
    begin(tree, people, signed=("ada",))


def too_old(tree, people):
    begin(tree, people, issued=NOW - timedelta(days=8))


def for_pruning(tree, people):
    begin(tree, people, act="prune")


def forgets_records(tree, people):
    begin(tree, people, Previous(last_known(tree).origin))


def another_root(tree, people):
    known = last_known(tree)
    begin(tree, people, Previous(known.origin, known.size, b"\1" * 32))


def of_another_log(tree, people):
    begin(tree, people, Previous("other.example/audit/1", 99, b"\1" * 32))


def held(tree, people):
    with open_log(tree, site="lab.example"):
        begin(tree, people)


WRONG = {
    one_person: "audit.people", too_old: "audit.people",
    for_pruning: "audit.people", forgets_records: "audit.history", another_root: "audit.history",
    of_another_log: "audit.history", held: "audit.locked",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_one_person_or_another_act_begins_nothing(tree, people, wrong):
    size = last_known(tree).size
    with pytest.raises(RefusedError) as refused:
        wrong(tree, people)
    assert refused.value.code == WRONG[wrong]
    assert last_known(tree).size >= size
    open_log(tree, site="lab.example").close()  # as before
    begin(tree, people)  # and the untouched act passes


class Late(logs.QuickDisk):
    """The old log gets one more record in the instant before it is locked."""

    def __init__(self, tree):
        super().__init__()
        self._tree, self._done = tree, False

    def open(self, path, flags, *more):
        if path.name == ".lock" and not self._done:
            self._done = True
            with open_log(self._tree, site="lab.example") as log:
                logs.infer(log)
        return super().open(path, flags, *more)


def test_a_record_that_comes_while_the_new_log_begins_is_not_left_out(tree, people):
    known = last_known(tree)
    with pytest.raises(RefusedError) as refused:
        begin(tree, people, known, disk=Late(tree))
    assert refused.value.code == "audit.history"
    assert last_known(tree).size > known.size
    with open_log(tree, site="lab.example"):
        pass
    kinds = [record["kind"] for record in read_records(tree / "audit")]
    assert "recovery" not in kinds  # the refused act was no crash
    begin(tree, people)


def test_an_act_is_carried_out_once(tree, people):
    trust, signers = people
    envelope = logs.signed_act(act_for(last_known(tree)), *signers.values())
    how = {"site": "lab", "trust": trust, "now": NOW, "disk": QUICK}
    begin_again(tree, envelope, **how)
    with pytest.raises(RefusedError) as refused:
        begin_again(tree, envelope, **how)
    assert refused.value.code == "audit.history"


def test_a_crash_anywhere_leaves_the_way_to_go_on(tree, people, tmp_path):
    """Fail each call in turn: until it is done no log opens in silence, and once more ends it."""
    at, fired = 1, True
    while fired:
        copy = tmp_path / f"copy{at}"
        shutil.copytree(tree, copy)
        known = last_known(copy)
        disk = logs.FailingDisk(at)
        try:
            begin(copy, people, known, disk=disk)
        except (OSError, AirgapError):
            assert disk.fired
            if (copy / "keys/audit.moving").exists():
                with pytest.raises(RefusedError) as refused:
                    open_log(copy, site="lab.example")
                assert refused.value.code == "audit.history"
                begin(copy, people, known)
                first = next(iter(read_records(copy / "audit")))
                assert first["data"]["previous"] == str(known)
        with open_log(copy, site="lab.example") as log:
            logs.infer(log)
        old = {each.origin for each in map(lost_head, copy.glob("audit.lost-*"))}
        assert old == ({known.origin} if log.origin != known.origin else set())
        shutil.rmtree(copy)
        at, fired = at + 1, disk.fired
    assert at > 20


def lost_head(folder):
    return last_checkpoint(Layout(folder).journal)[0]


def test_another_act_does_not_take_over_what_one_began(tree, people):
    disk = logs.FailingDisk(only=("rename",))
    disk.at = 3  # the note of the act is one, the first file put aside another
    with pytest.raises(OSError, match="Input/output"):
        begin(tree, people, disk=disk)
    with pytest.raises(RefusedError) as refused:
        begin(tree, people, reason="something else")
    assert refused.value.code == "audit.history"
    begin(tree, people, act_before(tree))


def act_before(tree):
    known = [Previous.of(lost_head(path)) for path in tree.glob("audit.lost-*")]
    return known[0] if known else last_known(tree)


# -- three verifiers on the new log's export ---------------------------------------------------


@pytest.fixture
def begun(tree, people, tmp_path):
    """Return a case: a new log that names a head of the old one, its export and its reader."""
    shutil.copy(tmp_path / "kept/1.tlog-proof", tmp_path / "old.tlog-proof")
    lose_all(tree)
    begin(tree, people, last_known(tree, [tmp_path / "old.tlog-proof"]))
    with open_log(tree, site="lab.example") as log:
        logs.keep(logs.infer(log), tree / "anchors/new.tlog-proof")
    export_of(tree, tree / "out")
    return Case(tree)


def all_three(case, go_verifier, **how):
    return case.ours(**how), case.python(**how), case.go(go_verifier, **how)


def add_anchor(case, source, change=None):
    text = source.read_text()
    checkpoint = parse_checkpoint(text[text.index("\n\n") + 2 :].encode())
    previous = Previous.of(checkpoint)
    (case.folder / "anchors/old").write_text(f"{change(previous) if change else previous}\n")


@pytest.mark.parametrize(
    "row",
    [
        (0, None, 0, NOTE),
        (1, None, 0, NOTE),
        (2, None, 3, UNKNOWN),  # somebody holds a later head of the old log than the two named
        (1, lambda p: Previous(p.origin, p.size, b"\1" * 32), 1, TAMPERED),
    ],
    ids=["earlier", "the same", "later", "forked"],
)
def test_heads_of_the_old_log_are_held_against_what_the_new_one_says(
    begun, tmp_path, go_verifier, row
):
    number, change, exit_, level = row
    assert all_three(begun, go_verifier) == (0, 0, 0)
    shutil.rmtree(begun.folder / "ours")
    shutil.rmtree(begun.folder / "python")
    shutil.rmtree(begun.folder / "go")
    add_anchor(begun, tmp_path / f"kept/{number}.tlog-proof", change)
    verdict = verify_log(
        begun.out, vkey=load_ring(begun.folder / "keys/audit.vkey"),
        anchors=[begun.folder / "anchors"],
    )  # fmt: skip
    assert (verdict.exit, verdict.findings[0].level) == (exit_, level), verdict.findings
    assert all_three(begun, go_verifier) == (exit_,) * 3


def test_the_memory_of_the_old_log_speaks_when_the_new_one_comes(begun, tmp_path, go_verifier):
    """A reader that took records 0 to 6 of the old log sees that the new one names fewer."""
    text = (tmp_path / "kept/2.tlog-proof").read_text()
    head = Previous.of(parse_checkpoint(text[text.index("\n\n") + 2 :].encode()))
    for name in ("ours", "python", "go"):
        memory = Memory(begun.folder / name, head.origin)
        memory.folder.mkdir()
        memory.head.write_text(f"{head}\n")
    assert all_three(begun, go_verifier) == (3, 3, 3)
    number = Memory(begun.folder / "ours", last_known(begun.folder).origin).number
    assert number == 2  # and remembers the new log all the same


def test_the_words_of_the_record_cannot_be_others(begun, go_verifier):
    """With all keys stolen: the leaf is under a receipt."""
    path = begun.out / "log/seg/00000000.jsonl"
    path.write_text(path.read_text().replace('"person_1":"ada"', '"person_1":"eve"'))
    assert all_three(begun, go_verifier) == (1, 1, 1)


# -- the command line --------------------------------------------------------------------------


def test_the_commands_from_loss_to_new_log(tmp_path, capsys):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "site.toml").write_text(site_toml(0))
    enrol(tree)
    with open_log(tree, site="lab.example") as log:
        logs.keep(logs.infer(log), tmp_path / "r.tlog-proof")
        origin = log.origin
    lose_log(tree)
    act = tmp_path / "act"
    argv = ("act", "new-log", "--reason", "disk lost", "--head", tmp_path / "r.tlog-proof")
    capsys.readouterr()
    assert run(*argv, "--key", "ada", "--out", act, "--root", tree) == 0
    assert f"in place of {origin}; its last known head: {origin} 3 " in capsys.readouterr().out
    assert run("countersign", act, "--key", "bob", "--root", tree) == 0
    capsys.readouterr()
    status, document = result(capsys, "new-log", act, "--root", tree)
    assert status == 0
    assert document["previous"].startswith(f"{origin} 3 ")
    status, verdict = result(capsys, "verify", "--root", tree)
    assert (status, verdict["previous"]) == (3, document["previous"])
    assert [f["check"] for f in verdict["findings"]] == ["anchor", "log before"]


def test_a_head_of_another_log_or_none_names_no_log(tree, tmp_path):
    other = logs.write_log(tmp_path / "x", 1)[-1]
    logs.keep(other, tmp_path / "other.tlog-proof")
    (tmp_path / "junk").write_text("no head")
    for path in (tmp_path / "other.tlog-proof", tmp_path / "junk"):
        with pytest.raises(RefusedError) as refused:
            last_known(tree, [path])
        assert refused.value.code == "audit.note"
    with pytest.raises(FaultError):
        last_known(tree, [tmp_path / "absent"])


@pytest.mark.parametrize("text", ["", "a b", "a -1 x", "a 1 notbase64", "a 1 AAAA", "a b c d"])
def test_words_that_name_no_log_are_refused(text):
    with pytest.raises(RefusedError):
        Previous.parse(text)


def test_what_the_record_says_is_read_back():
    for previous in (Previous("-"), Previous("a/audit/1"), Previous("a/audit/1", 7, b"\2" * 32)):
        assert Previous.parse(str(previous)) == previous
    assert json.dumps(str(Previous("a/audit/1", 7, b"\2" * 32)))
