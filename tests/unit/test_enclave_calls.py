"""Several requests at once at one sealed worker: each gets its own, and a hostile one gets none."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from enclave_harness import needs_namespaces

from airgap.enclave import Caps, SealSpec, channel, host, seal
from policy.errors import AirgapError, FaultError, RefusedError

pytestmark = needs_namespaces
PROGRAM = Path(__file__).parents[1] / "sealed_together.py"
FRAME = 1 << 16


@pytest.fixture
def worker(request):
    config = getattr(request, "param", {})
    spec = SealSpec(
        profile="worker",
        program=f"{PROGRAM}:create",
        config=config,
        read_only=(PROGRAM,),
        caps=Caps(memory_mb=512, in_flight=4, frame_bytes=FRAME, reply_bytes=1 << 20),
        reverify_s=0,
    )
    facts = host.survey()
    rung = host.candidate_rungs(facts, "B")[0][0]
    with seal.start(rung, spec, facts) as enclave:
        yield enclave


def payload(**wanted):
    return json.dumps(wanted).encode()


def say(enclave):
    return json.loads(enclave.request(payload(op="say"), 10.0))


def together(enclave, *wanted):
    """Send every request from a thread of its own; returns (parts, reply) or the error of each."""
    found = [None] * len(wanted)

    def ask(place):
        try:
            frames = list(enclave.stream(payload(**wanted[place]), 20.0))
            found[place] = [frame.payload for frame in frames]
        except AirgapError as error:
            found[place] = error

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_requests_run_together_and_each_gets_its_own_frames(worker):
    wanted = [{"parts": 30, "letter": letter, "sleep": 0.002} for letter in "abc"]
    found = together(worker, *wanted)
    assert found == [[letter.encode()] * 31 for letter in "abc"]
    assert say(worker)["most"] == 3


def test_more_than_the_places_wait_and_are_answered(worker):
    found = together(worker, *({"parts": 3, "letter": letter} for letter in "abcdefghij"))
    assert found == [[letter.encode()] * 4 for letter in "abcdefghij"]
    assert say(worker)["most"] <= 4


def test_a_full_desk_refuses_after_the_time_of_a_silence(worker):
    hanging = [worker.stream(payload(parts=1, size=1, sleep=0.01), 20.0) for _ in range(4)]
    endless = [worker.stream(payload(parts=5000, sleep=0.01), 20.0) for _ in range(4)]
    for stream in endless:
        next(stream)
    with pytest.raises(RefusedError) as caught:
        worker.request(payload(), 0.2)
    assert caught.value.code == "request.busy"
    for stream in endless:
        stream.close()
    assert worker.request(payload(letter="y"), 20.0) == b"y"
    assert [len(list(stream)) for stream in hanging] == [2] * 4


def test_a_refusal_or_failure_of_one_is_its_own(worker):
    refused, broken, served = together(
        worker, {"op": "refuse"}, {"op": "raise"}, {"parts": 5, "sleep": 0.01}
    )
    assert refused.code == "prompt.g01"
    assert (broken.code, "broken" in broken.message) == ("enclave.program", True)
    assert len(served) == 6


def test_a_failure_in_a_round_fails_those_under_way_and_no_later_one(worker):
    found = together(
        worker, {"op": "step_raises", "parts": 5000, "sleep": 0.001}, {"parts": 5000, "sleep": 0.01}
    )
    assert [error.code for error in found] == ["enclave.program"] * 2
    assert worker.request(payload(letter="z"), 20.0) == b"z"


def test_a_caller_that_goes_away_cancels_and_the_others_go_on(worker):
    stream = worker.stream(payload(parts=5000, sleep=0.001), 20.0)
    next(stream)
    other = worker.stream(payload(parts=3, letter="o"), 20.0)
    next(other)
    stream.close()
    assert [frame.payload for frame in other] == [b"o"] * 3
    assert len(say(worker)["cancelled"]) == 1
    assert worker.alive


def test_the_whole_time_of_a_request_ends_it_alone(worker):
    with pytest.raises(RefusedError) as caught:
        worker.request(payload(parts=5000, sleep=0.001), 20.0, total_s=0.2)
    assert caught.value.code == "model.deadline"
    assert worker.request(payload(letter="z"), 20.0) == b"z"


def test_a_request_that_nobody_reads_is_paused_and_costs_the_others_nothing(worker):
    slow = worker.stream(payload(parts=40, size=10_000, letter="s"), 20.0)
    first = next(slow)
    until = time.monotonic() + 10
    while not (state := say(worker))["paused"] and time.monotonic() < until:
        time.sleep(0.01)
    assert len(state["paused"]) == 1
    rounds = state["rounds"]
    assert worker.request(payload(parts=3, letter="z"), 20.0) == b"z"
    assert say(worker)["rounds"] - rounds < 20  # it does not spin for the one that waits
    rest = [frame.payload for frame in slow]
    assert b"".join([first.payload, *rest]) == b"s" * 400_001


HOSTILE = {
    "a reply to nobody": channel.encode(channel.REPLY, b"", 77),
    "a part of nobody": channel.encode(channel.PART, b"x", 0),
    "an unknown kind": channel.encode(b"?", b"", 1),
    "a frame above its cap": channel.HEAD.pack(FRAME + 1, channel.PART, 1),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_worker_that_breaks_the_protocol_ends_and_nobody_is_answered(worker, frame):
    broken, other = together(
        worker, {"op": "raw", "frame": frame.hex()}, {"parts": 5000, "sleep": 0.01}
    )
    assert (broken.code, other.code) == ("enclave.worker", "enclave.worker")
    with pytest.raises(FaultError):
        worker.request(payload(), 20.0)


def test_a_second_reply_ends_the_worker(worker):
    twice = channel.encode(channel.REPLY, b"", 1) * 2
    assert worker.request(payload(op="raw", frame=twice.hex()), 20.0) == b""
    await_end(worker)


def test_more_parts_than_its_caller_lets_come_end_the_worker(worker):
    parts = channel.encode(channel.PART, b"x" * FRAME, 1) * 2
    victim = worker.stream(payload(op="raw", frame=parts.hex()), 20.0)
    next(victim)
    await_end(worker)
    with pytest.raises(FaultError) as caught:
        list(victim)
    assert "more parts than its caller" in caught.value.message


def test_parts_without_bytes_are_not_free(worker):
    """Each waits as an object of the broker: empty ones took hundreds of MiB of its memory."""
    parts = channel.encode(channel.PART, b"", 1) * (FRAME // channel.cost(b"") + 1)
    victim = worker.stream(payload(op="raw", frame=parts.hex()), 20.0)
    next(victim)
    await_end(worker)
    with pytest.raises(FaultError) as caught:
        list(victim)
    assert "more parts than its caller" in caught.value.message


def test_small_parts_above_the_window_come_as_they_are_taken(worker):
    """What the worker counts is what the broker counts."""
    many = 3 * FRAME // channel.cost(b"")
    assert len(list(worker.stream(payload(parts=many), 20.0))) == many + 1


def test_a_request_whose_time_ends_before_its_turn_ends_alone(worker):
    """The others hold every place until its time is over; the worker goes on for them."""
    endless = [worker.stream(payload(parts=5000, sleep=0.01), 20.0) for _ in range(4)]
    for stream in endless:
        next(stream)
    for total_s in (0.2, 0.0, -1.0):
        with pytest.raises(RefusedError) as caught:
            worker.request(payload(), 20.0, total_s=total_s)
        assert caught.value.code == "request.busy"
    assert [stream.close() for stream in endless] == [None] * 4
    assert worker.request(payload(letter="y"), 20.0) == b"y"
    with pytest.raises(RefusedError) as caught:
        worker.request(payload(parts=5000, sleep=0.01), 20.0, total_s=-1.0)
    assert caught.value.code == "model.deadline"
    assert worker.request(payload(letter="z"), 20.0) == b"z"


def await_end(worker):
    until = time.monotonic() + 20
    while worker.alive and time.monotonic() < until:
        time.sleep(0.02)
    assert not worker.alive


def test_the_death_of_the_worker_is_told_to_everyone(worker):
    found = together(
        worker,
        {"parts": 5000, "sleep": 0.001},
        {"parts": 5000, "sleep": 0.001},
        {"op": "exit", "status": 7},
    )
    assert [error.code for error in found] == ["enclave.worker"] * 3
    assert worker.close()["status"] == 7


def test_silence_ends_the_worker_for_all(worker):
    with pytest.raises(FaultError) as caught:
        worker.request(payload(op="deaf"), 0.5)
    assert "no frame came in time" in caught.value.message
    assert worker.close()["signal"] == 9


@pytest.mark.parametrize("worker", [{"deaf": True}], indirect=True)
def test_a_worker_that_does_not_let_go_of_a_cancelled_request_ends(worker):
    stream = worker.stream(payload(parts=5000, sleep=0.001), 0.5)
    next(stream)
    stream.close()
    await_end(worker)
    with pytest.raises(FaultError):
        worker.request(payload(), 1.0)


def test_closing_ends_the_worker_by_itself(worker):
    assert worker.request(payload(letter="z"), 20.0) == b"z"
    end = worker.close()
    assert (end["status"], end["incident"], end["requests"]) == (0, None, 1)
