"""A flood of refusals: joined into few records, counted, and every caller gets a durable one."""

import threading
import time

import audit_logs as logs
import pytest

from airgap.audit import Actor, verify_log, verify_receipt
from airgap.audit.joining import BURST, Joiner
from airgap.audit.query import read_records
from airgap.audit.writer import Pending
from policy.errors import FaultError

SECOND = 10**9


def refusal(person="eve", **more):
    return logs.denial(
        actor=Actor(person), project="P-1", data={"count": 1, "stage": "prompt"}, **more
    )


def pending(event, uid=1000):
    return Pending(event.fields(uid=uid, auth="self"))


def test_a_burst_is_written_one_by_one_and_the_rest_as_one_record():
    joiner = Joiner()
    batch = [pending(refusal()) for _ in range(BURST + 30)]
    assert joiner.take(batch, SECOND) == batch[:BURST]
    assert joiner.holds
    assert joiner.take([pending(refusal())], SECOND + 1) == []
    (joined,) = joiner.take([], 2 * SECOND)
    assert joined.fields["data"] == {"count": 31, "stage": "prompt"}
    assert len(joined.followers) == 30
    assert not joiner.holds
    later = [pending(refusal())]
    assert joiner.take(later, 2 * SECOND + 5) == later


def test_only_what_is_alike_is_joined():
    joiner = Joiner()
    joiner.take([pending(refusal()) for _ in range(BURST)], SECOND)
    kinds = [
        refusal(), refusal(), refusal(err="policy.held"), refusal(label="CUI"),
    ]  # fmt: skip
    assert joiner.take([pending(event) for event in kinds], SECOND) == []
    counts = [each.fields["data"]["count"] for each in joiner.release()]
    assert sorted(counts) == [1, 1, 2]


def test_others_and_other_records_do_not_wait():
    joiner = Joiner()
    joiner.take([pending(refusal()) for _ in range(BURST + 1)], SECOND)
    free = [pending(refusal("ada")), pending(refusal(), uid=7), pending(logs.denial())]
    assert joiner.take(free, SECOND) == free
    assert len(joiner.take([pending(refusal())], SECOND, last=True)) == 2


def test_each_of_many_refused_callers_gets_a_receipt_of_a_durable_record(tmp_path):
    receipts = []
    with logs.open_log(tmp_path, clock=None) as log:

        def work():
            receipts.extend(log.append(refusal()) for _ in range(4))

        threads = [threading.Thread(target=work) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(receipts) == 120
    for receipt in receipts:
        verify_receipt(receipt, logs.vkey())
    counts = [r["data"]["count"] for r in read_records(tmp_path / "audit") if r["kind"] == "denial"]
    assert sum(counts) == 120
    assert len(counts) < 120
    kept = logs.keep(receipts[-1], tmp_path / "kept" / "r.tlog-proof")
    assert verify_log(tmp_path / "audit", vkey=logs.vkey(), anchors=[kept]).exit == 0


def test_who_waits_in_a_flood_is_told_when_the_log_halts(tmp_path):
    disk = logs.FailingDisk(only=("fdatasync",))
    log = logs.open_log(tmp_path, disk=disk, clock=None)
    errors = []

    def work():
        try:
            log.append(refusal())
        except FaultError as error:
            errors.append(error.code)

    threads = [threading.Thread(target=work) for _ in range(BURST * 2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while not log._joiner.holds and time.monotonic() < deadline:
        time.sleep(0.005)
    disk.at = len(disk.calls) + 1
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert set(errors) == {"audit.halted"}
    with pytest.raises(FaultError):
        log.append(refusal())
    log.close()
