"""The budget of refusals: what an account may spend, what is told of the rest, what is kept."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict

import audit_logs as logs
import pytest
from audit_exports import Case, export_of, go_verifier
from hypothesis import given, settings
from hypothesis import strategies as st

from airgap.audit import Actor
from airgap.audit.clock import Peer
from airgap.service.budget import ACCOUNTS, BURST, PER_S, TOLD_S, Budget, Turned
from airgap.service.daemon import Daemon
from airgap.service.keeper import Standing
from policy.errors import FaultError, RefusedError

__all__ = ["go_verifier"]  # a fixture

ADA, BEN = 1001, 1002


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


def budget_of(clock, **more):
    return Budget(clock=clock, pause_s=0.0, **more)


def ask(budget, uid, *, refused=True, pid=7):
    """Make a request; returns 0, or the seconds of the hint where it was turned away."""
    try:
        with budget.request(uid, pid) as spend:
            if refused:
                spend()
    except RefusedError as error:
        if error.code != "request.busy":
            raise
        return int(error.hint.removeprefix("ask again in ").removesuffix(" s"))
    return 0


def test_a_burst_then_one_a_second_and_admissions_cost_nothing():
    clock = Clock()
    budget = budget_of(clock)
    for _ in range(1_000):
        assert ask(budget, ADA, refused=False) == 0
    assert [ask(budget, ADA) for _ in range(BURST)] == [0] * BURST
    assert ask(budget, ADA) == 1
    assert ask(budget, ADA, refused=False) == 1  # nobody knows yet that it would be admitted
    assert ask(budget, BEN) == 0
    clock.now += 0.5
    assert ask(budget, ADA) == 1
    clock.now += 0.5
    assert ask(budget, ADA, refused=False) == 0
    assert ask(budget, ADA) == 0
    assert ask(budget, ADA) == 1
    clock.now += 10_000
    assert [ask(budget, ADA) for _ in range(BURST + 1)] == [0] * BURST + [1]


def test_the_hint_holds():
    clock = Clock()
    budget = budget_of(clock, burst=2, per_s=0.125)
    assert [ask(budget, ADA) for _ in range(3)] == [0, 0, 8]
    clock.now += 3
    assert ask(budget, ADA) == 5
    clock.now += 5
    assert ask(budget, ADA) == 0


def test_requests_at_once_have_no_more_tokens_than_there_are():
    budget = budget_of(Clock(), burst=1)
    with budget.request(ADA, 1):
        assert ask(budget, ADA) == 1
        assert ask(budget, BEN) == 0
    assert ask(budget, ADA) == 0  # given back
    with pytest.raises(RefusedError, match="not looked at"), budget.request(ADA, 1):
        raise AssertionError
    with pytest.raises(ZeroDivisionError), budget_of(Clock()).request(ADA, 1):
        raise ZeroDivisionError


def test_what_was_turned_away_is_told_once_with_its_beginning():
    clock = Clock()
    budget = budget_of(clock, burst=1)
    assert [ask(budget, ADA) for _ in range(4)] == [0, 1, 1, 1]
    assert budget.due() == []
    clock.now += 0.5
    assert ask(budget, ADA, pid=8) == 1
    clock.now += TOLD_S - 0.5
    (turned,) = budget.due()
    assert (turned.uid, turned.pid, turned.count, turned.since) == (ADA, 8, 4, 1_000.0)
    assert budget.due(0.0) == []
    event = turned.event(clock.now, int((1.7e9 + TOLD_S) * 1e9), Actor("ada", "researcher"))
    fields = event.fields(uid=ADA, auth="peercred")
    assert fields["data"] == {"count": 4, "stage": "budget since 2023-11-14T22:13:20.000000Z"}
    assert fields["err"] == {"code": "request.busy"}
    assert fields["actor"]["uid"] == ADA
    # No record was possible: it is told with the next.
    assert [ask(budget, ADA) for _ in range(3)] == [0, 1, 1]
    budget.keep(turned)
    (again,) = budget.due()
    assert (again.count, again.since) == (6, 1_000.0)


def test_a_full_table_forgets_who_lost_nothing_and_tells_of_who_had_to_give_way():
    clock = Clock()
    budget = budget_of(clock, burst=1, accounts=3)
    assert ask(budget, 1) == 0
    assert ask(budget, 2) == 0
    assert ask(budget, 2) == 1
    clock.now += 2  # both are full again; what was turned away of 2 is not told yet
    assert ask(budget, 3) == 0
    assert ask(budget, 4) == 0  # 1 gave way
    assert ask(budget, 5) == 0  # none is full and told: 2, the oldest, gave way
    (turned,) = budget.due(0.0)
    assert (turned.uid, turned.count) == (2, 1)
    budget.keep(turned)
    assert budget.due() == [turned]
    assert [ask(budget, uid) for uid in (4, 5)] == [1, 1]
    for uid in range(10, 500):
        ask(budget, uid)
    assert len(budget._buckets) == 3
    assert Counter({each.uid: each.count for each in budget.due(0.0)}) == {4: 1, 5: 1}
    wide = budget_of(clock)
    for uid in range(ACCOUNTS + 50):
        ask(wide, uid)
    assert len(wide._buckets) == ACCOUNTS


def counts(found):
    told = Counter()
    for each in found:
        assert each.count > 0
        told[each.uid] += each.count
    return told


Step = st.tuples(
    st.sampled_from(["refused", "admitted", "wait", "tell", "lose"]),
    st.integers(1, 3),
    st.floats(0.0, 20.0, allow_nan=False),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(Step, max_size=120), burst=st.integers(1, 5), accounts=st.integers(1, 4))
def test_no_time_has_more_refusals_than_its_budget_and_each_that_was_turned_away_is_told(
    steps, burst, accounts
):
    clock = Clock()
    budget = budget_of(clock, burst=burst, accounts=accounts)
    spent, turned, told = defaultdict(list), Counter(), Counter()

    for what, uid, seconds in steps:
        match what:
            case "wait":
                clock.now += seconds
            case "tell":
                told += counts(budget.due(min(seconds, TOLD_S)))
            case "lose":
                for each in budget.due():
                    budget.keep(each)
            case _:
                wait_s = ask(budget, uid, refused=what == "refused")
                if wait_s:
                    assert 1 <= wait_s <= math.ceil(1 / PER_S)
                    turned[uid] += 1
                elif what == "refused":
                    spent[uid].append(clock.now)
        assert len(budget._buckets) <= accounts
    assert told + counts(budget.due(0.0)) == turned
    if accounts >= 3:  # nobody had to give way
        assert all(within(times, burst) for times in spent.values())


def within(times, burst):
    """Whether no stretch of these times has more than the budget allows."""
    return all(
        last - first + 1 <= burst + (times[last] - times[first]) * PER_S + 1e-6
        for first in range(len(times))
        for last in range(first, len(times))
    )


def test_three_verifiers_take_the_record(tmp_path, go_verifier):
    turned = Turned(ADA, 9, 123_456, 1_000.0)
    with logs.open_log(tmp_path) as log:
        for actor in (Actor("ada", "researcher"), None):
            event = turned.event(1_012.5, time.time_ns(), actor)
            receipt = log.append(event, peer=Peer(turned.uid, turned.pid))
    logs.keep(receipt, tmp_path / "anchors/r.tlog-proof")
    export_of(tmp_path, tmp_path / "out")
    case = Case(tmp_path)
    assert (case.ours(), case.python(), case.go(go_verifier)) == (0, 0, 0)


class Keeper:
    """The keeper of a daemon that serves nothing."""

    standing = Standing("ended", None, None)


class Log:
    """A log that gives no receipt while it is told so."""

    def __init__(self):
        self.broken, self.records, self.tried = True, [], threading.Event()

    def append(self, event, *, peer):
        self.tried.set()
        if self.broken:
            raise FaultError("audit.halted", "the disk")
        self.records.append((peer, event.data["count"]))


def test_a_log_that_takes_nothing_now_is_told_later_and_at_the_end():
    clock, log = Clock(), Log()
    daemon = Daemon(Keeper(), log, None)
    daemon._budget = budget = budget_of(clock, burst=1)
    assert [ask(budget, ADA, pid=9) for _ in range(3)] == [0, 1, 1]
    clock.now += TOLD_S
    thread = threading.Thread(target=daemon._tell_of_turned)
    thread.start()
    assert log.tried.wait(10)
    log.broken = False
    daemon._ended.set()
    thread.join(10)
    assert not thread.is_alive()
    assert log.records == [(Peer(ADA, 9), 2)]
