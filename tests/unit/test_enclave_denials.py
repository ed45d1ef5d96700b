"""Records of denied calls: what counts as one, and when a source is not believed."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest
from enclave_harness import needs_namespaces
from hypothesis import given
from hypothesis import strategies as st

from airgap.enclave import denials, tables, worker
from airgap.enclave.denials import Denials

TEXT = (
    b"audit(1795635619.731:269931): auid=4294967295 uid=0 gid=0 ses=4294967295 pid=8404 "
    b'comm="python" exe="/usr/bin/python3.11" sig=0 arch=c000003e syscall=41 compat=0 '
    b"ip=0x7f0510f28dc7 code=0x50000"
)
HEAD = (16 + len(TEXT)).to_bytes(4, "little") + (1326).to_bytes(2, "little") + bytes(10)
LINE = b"5,1234,99,-;audit: type=1326 " + TEXT + b"\n"


def test_a_record_of_each_source_is_read():
    assert denials.parse_audit(HEAD + TEXT) == (8404, 41)
    assert denials.parse_log(LINE) == (8404, 41)


OTHERS = {
    "another type": HEAD[:4] + (1300).to_bytes(2, "little") + bytes(10) + TEXT,
    "a short message": HEAD[:8],
    "no fields": HEAD + b"nothing",
}
LINES = {
    "a line of a user": b"13," + LINE.partition(b",")[2],
    "no number": b"x" + LINE[1:],
    "another record": LINE.replace(b"1326", b"1400"),
    "words of a user that look like one": LINE.replace(b";audit:", b";x audit:"),
}


@pytest.mark.parametrize("message", OTHERS.values(), ids=OTHERS.keys())
def test_another_message_of_the_group_is_none(message):
    assert denials.parse_audit(message) is None


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_another_line_of_the_log_is_none(line):
    assert denials.parse_log(line) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_none(content):
    for read in (denials.parse_audit, denials.parse_log):
        found = read(content)
        assert found is None or len(found) == 2


def test_calls_have_names():
    assert denials.name_of(41) == "socket"
    assert denials.name_of(9999) == "9999"


class Fed(Denials):
    """Reads from a pipe."""

    def _open_audit(self):
        self._descriptor, self.feed = os.pipe()
        os.set_blocking(self._descriptor, False)
        self.source, self.exact = "kernel log", True
        return True

    def say(self, pid, number, times=1):
        for _ in range(times):
            line = LINE.replace(b"8404", b"%d" % pid).replace(b"syscall=41", b"syscall=%d" % number)
            os.write(self.feed, line)
            self._drain()


def test_only_calls_after_the_self_test_are_counted():
    fed = Fed()
    fed.say(7, 41, 5)
    fed.settle(7)
    assert fed.result()["count"] == 0
    fed.say(7, 257, 2)
    fed.say(8, 257, 9)
    assert fed.result() == {
        "count": 2,
        "source": "kernel log",
        "exact": True,
        "calls": {"openat": 2},
    }
    fed.close()
    assert fed.result()["count"] == 2
    os.close(fed.feed)


def test_the_last_door_ends_the_wait_at_once(monkeypatch):
    def waits(*_):
        raise AssertionError("waited for silence")

    fed = Fed()
    fed.say(7, 41, 5)
    fed.say(7, denials.LAST_DOOR)
    monkeypatch.setattr(denials.select, "select", waits)
    fed.settle(7, denials.LAST_DOOR)
    monkeypatch.undo()
    fed.say(7, 257)
    assert fed.result()["calls"] == {"openat": 1}
    fed.close()
    os.close(fed.feed)


def test_the_last_door_is_the_last_that_a_worker_tries():
    assert list(worker.prepare_attempts())[-1] == "signal_by_thread"
    assert denials.name_of(denials.LAST_DOOR) == "tgkill"
    # Stage 1 lets it through, so that only stage 2 can have denied it.
    denied = {name for _, _, names in tables.STAGE1 for name in names}
    assert "tgkill" not in denied


def test_records_that_come_late_are_waited_for():
    fed = Fed()
    fed.say(7, 41, 5)
    fed.settle(7)
    line = LINE.replace(b"8404", b"7")
    late = [threading.Timer(after, os.write, (fed.feed, line)) for after in (0.015, 0.03)]
    for each in late:
        each.start()
    assert fed.result()["count"] == 2
    fed.close()
    os.close(fed.feed)


def test_a_source_that_is_never_silent_is_not_exact(monkeypatch):
    class Talkative(Fed):
        def poll(self):
            super().poll()
            os.write(self.feed, LINE)

    monkeypatch.setattr(denials, "_SILENCE_LIMIT_S", 0.0)
    fed = Talkative()
    fed.say(7, 41, 5)
    fed.settle(7)
    assert fed.result()["exact"] is False
    fed.close()
    os.close(fed.feed)


def test_a_source_that_did_not_show_the_self_test_is_unknown_and_not_zero():
    fed = Fed()
    fed.say(8, 41, 50)
    fed.settle(7)
    assert fed.result() == {"count": None, "source": None, "exact": None, "calls": None}
    os.close(fed.feed)


def test_without_a_source_the_count_is_unknown():
    class Deaf(Denials):
        def _open_audit(self):
            return False

        def _open_log(self):
            return None

    deaf = Deaf()
    deaf.settle(os.getpid())
    deaf.poll()
    assert deaf.result()["count"] is None


def test_a_buffer_that_ran_over_makes_the_count_a_lower_bound(monkeypatch):
    fed = Fed()
    fed.say(7, 41, 5)
    fed.settle(7)
    real, errors = os.read, [OSError(105, "over")]

    def read(descriptor, size):
        if errors:
            raise errors.pop()
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    fed.say(7, 41)
    found = fed.result()
    assert (found["count"], found["exact"]) == (1, False)
    os.close(fed.feed)
    fed.close()


def test_a_source_that_fails_is_closed(monkeypatch):
    fed = Fed()

    def read(*_):
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", read)
        fed.poll()
    assert fed._descriptor == -1
    assert fed._seen == {0: Counter()}
    os.close(fed.feed)


@needs_namespaces
def test_the_kernel_log_is_a_source_where_it_may_be_read():
    class Log(Denials):
        def _open_audit(self):
            return False

    found = Log()
    if found.source is None:
        pytest.skip("this user may not read the kernel log")
    assert (found.source, found.exact) == ("kernel log", False)
    found.poll()
    found.close()
