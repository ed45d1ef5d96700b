"""Answers that leave in pieces: each is on record before it leaves, and three verifiers hold it."""

import audit_logs as logs
import pytest
from audit_exports import Case, export_of, go_verifier

from airgap.audit import Actor, Event, Streamed, commitment, new_ulid, verify_log
from airgap.audit.payloads import HolderKey
from airgap.audit.query import read_records
from airgap.audit.writer import Pending
from policy.errors import FaultError, RefusedError

__all__ = ["go_verifier"]  # a fixture
PIECES = [b"CC", b"(=O)", b"OC"]
WHO = Actor("jdoe", "scientist")
NONCE = b"\x09" * 32


def begin(log):
    """Put an intent on record; return its request and the output on its way."""
    req = new_ulid()
    log.append(logs.intent(log.put_object(logs.DECISION), req))
    return req, Streamed(log, req=req, project="P-0042", nonce=NONCE, actor=WHO, model=logs.MODEL)


def answer(log, pieces=PIECES):
    req, streamed = begin(log)
    for piece in pieces:
        assert streamed.release(piece, tok=(12, 3)) == piece
    return log.append(logs.outcome(req, out=streamed.commit()))


def good(folder, receipt):
    anchor = logs.keep(receipt, folder / "anchors" / "r.tlog-proof")
    return verify_log(folder / "audit", vkey=logs.vkey(), anchors=[anchor])


def test_each_piece_is_on_record_before_it_leaves(tmp_path):
    with logs.open_log(tmp_path) as log:
        req, streamed = begin(log)
        for number, piece in enumerate(PIECES):
            streamed.release(piece)
            newest = list(read_records(tmp_path / "audit"))[-1]
            assert (newest["phase"], newest["part"]) == ("chunk", number)
            so_far = b"".join(PIECES[: number + 1])
            assert streamed.content == so_far
            said = commitment(so_far, NONCE)
            assert (newest["out"]["commit"], newest["out"]["bytes"]) == (said.commit, said.bytes)
        receipt = log.append(logs.outcome(req, out=streamed.commit()))
    assert list(read_records(tmp_path / "audit"))[-2]["out"] == newest["out"]
    assert good(tmp_path, receipt).exit == 0


def test_an_answer_that_ends_early_says_what_has_left(tmp_path):
    with logs.open_log(tmp_path) as log:
        req, streamed = begin(log)
        streamed.release(b"CC")
        receipt = log.append(
            logs.outcome(req, out=streamed.commit(), tok=None, data={"result": "cancelled"})
        )
        req, empty = begin(log)
        log.append(logs.outcome(req, out=empty.commit()))
        begin(log)[1].release(b"N")  # and this one finds no end: the next open gives it one
    assert good(tmp_path, receipt).exit == 0
    with logs.open_log(tmp_path):
        pass
    assert good(tmp_path, receipt).exit == 0


def test_a_piece_whose_record_fails_does_not_leave(tmp_path):
    disk = logs.FailingDisk(only=("fdatasync",))
    with logs.open_log(tmp_path, disk=disk) as log:
        _, streamed = begin(log)
        streamed.release(b"CC")
        disk.at = len(disk.calls) + 1
        with pytest.raises(FaultError):
            streamed.release(b"O")
        assert streamed.content == b"CC"
        assert streamed.commit() is None
        with pytest.raises(RefusedError) as refused:
            streamed.release(b"N")
        assert refused.value.code == "audit.order"


@pytest.mark.parametrize("pieces", [[b""], [b"C", b""]], ids=["first", "later"])
def test_an_empty_piece_is_refused(tmp_path, pieces):
    with logs.open_log(tmp_path) as log:
        streamed = begin(log)[1]
        for piece in pieces[:-1]:
            streamed.release(piece)
        with pytest.raises(RefusedError) as refused:
            streamed.release(pieces[-1])
        assert refused.value.code == "audit.order"


def chunk(req, part, content, **more):
    fields = {"part": part, "out": commitment(content, NONCE), "actor": WHO, "project": "P-0042"}
    return Event("inference", "chunk", req=req, **(fields | more))


# What a broker might say that streams wrongly: after the intent and chunk 0 with `CC`.
WRONG = {
    "a chunk is left out": lambda req: chunk(req, 2, b"CCO"),
    "a chunk comes twice": lambda req: chunk(req, 0, b"CC"),
    "a chunk adds nothing": lambda req: chunk(req, 1, b"CC"),
    "a chunk takes back": lambda req: chunk(req, 1, b"C"),
    "another outcome": lambda req: logs.outcome(req, out=commitment(b"NN", NONCE)),
    "a longer outcome": lambda req: logs.outcome(req, out=commitment(b"CCO", NONCE)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_log_refuses_chunks_out_of_order(tmp_path, name):
    with logs.open_log(tmp_path) as log:
        req, streamed = begin(log)
        streamed.release(b"CC")
        with pytest.raises(RefusedError) as refused:
            log.append(WRONG[name](req))
        assert refused.value.code == "audit.order"
        streamed.release(b"O")  # and the log goes on
        receipt = log.append(logs.outcome(req, out=streamed.commit()))
    assert good(tmp_path, receipt).exit == 0


@pytest.mark.parametrize("name", [None, *WRONG], ids=lambda name: name or "untouched")
def test_three_verifiers_find_chunks_out_of_order(tmp_path, name, go_verifier):
    """The owner of log and keys wrote what his own program refuses to write."""
    with logs.open_log(tmp_path) as log:
        receipt = answer(log)
        req, streamed = begin(log)
        streamed.release(b"CC")
        event = logs.outcome(req, out=streamed.commit()) if name is None else WRONG[name](req)
        log._writer.commit_all([Pending(event.fields(uid=1, auth="self"))])
    logs.keep(receipt, tmp_path / "anchors/r.tlog-proof")
    export_of(tmp_path, tmp_path / "out")
    case = Case(tmp_path)
    expected = 0 if name is None else 1
    assert good(tmp_path, receipt).exit == expected
    assert (case.ours(), case.python(), case.go(go_verifier)) == (expected,) * 3


def test_where_payloads_are_kept_each_state_of_the_answer_is_sealed(tmp_path):
    holder = HolderKey.generate()
    with logs.open_log(tmp_path, payload_key=holder.public) as log:
        receipt = answer(log)
        origin = log.origin
    opened = []
    for record in read_records(tmp_path / "audit"):
        if "out" in record and record["phase"] == "chunk":
            name = record["out"]["sealed"][7:]
            blob = (tmp_path / "audit/log/sealed" / name[:2] / name).read_bytes()
            opened.append(holder.open(blob, record, origin=origin, side="out"))
    assert opened == [b"CC", b"CC(=O)", b"CC(=O)OC"]
    assert good(tmp_path, receipt).exit == 0
