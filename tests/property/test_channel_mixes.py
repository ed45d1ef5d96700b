"""Mixes of requests through the channel of a sealed worker: each gets the tokens it gets alone."""

import functools
import json
import threading
import time
from dataclasses import replace

import hypothesis.strategies as st
import inference_models as models
import pytest
from enclave_harness import needs_namespaces
from hypothesis import HealthCheck, given, settings
from test_engine_mixes import alone, requests

from airgap.enclave import Caps, SealSpec, host, seal
from airgap.inference.protocol import Done, Forget, Sample, parse_event, parse_reply
from policy.errors import RefusedError

pytestmark = needs_namespaces


@functools.cache
def expected(request):
    return alone(replace(request, request_set="", deadline_ms=0))


@pytest.fixture(scope="module")
def worker():
    folder = models.fast_folder()
    spec = SealSpec(
        profile="worker",
        program="airgap.inference.program:create",
        config={
            "folder": str(folder),
            "precision": "fp32",
            "threads": 1,
            "most_rows": 5,
            "valence": True,
        },
        read_only=(folder,),
        caps=Caps(in_flight=8, frame_bytes=1 << 16),
        reverify_s=0,
    )
    facts = host.survey()
    with seal.start(host.candidate_rungs(facts, "B")[0][0], spec, facts) as enclave:
        yield enclave


def ask(worker, request, delay, give_up, into):
    """Send one request after a while; `give_up` is after how many frames its caller goes away."""
    time.sleep(delay)
    samples, done = {}, None
    stream = worker.stream(request.encode(), 60.0)
    try:
        for count, frame in enumerate(stream):
            if frame.is_part:
                event = parse_event(frame.payload)
                if isinstance(event, Sample):
                    samples[event.index] = (event.ids, event.finish_reason, event.text)
            else:
                done = parse_reply(frame.payload)
            if count == give_up:
                break
    except RefusedError as error:
        done = error.code
    finally:
        stream.close()
    into.append((request, samples, done))


@st.composite
def plans(draw):
    """Draw requests of up to three sets with a deadline here and there, arrivals and departures."""
    return [
        (
            replace(
                draw(requests()),
                request_set=draw(st.sampled_from(["", "a", "b", "c"])),
                deadline_ms=draw(st.sampled_from([0, 0, 0, 60_000, 5])),
            ),
            draw(st.integers(0, 30)) / 1000,
            draw(st.sampled_from([-1, -1, -1, 0, 2])),
        )
        for _ in range(draw(st.integers(2, 7)))
    ]


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(plan=plans())
def test_a_mix_through_the_channel_gives_each_what_it_gets_alone(worker, plan):
    mix(worker, plan)


@pytest.mark.soak
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(plan=plans())
def test_two_hundred_mixes_through_the_channel(worker, plan):
    mix(worker, plan)


def mix(worker, plan):
    found = []
    threads = [threading.Thread(target=ask, args=(worker, *each, found)) for each in plan]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(plan)
    for request, samples, done in found:
        if isinstance(done, Done):
            assert samples == expected(request)
            assert done.tokens == sum(len(ids) for ids, _, _ in samples.values())
        else:
            assert done in (None, "model.deadline")
            assert done is None or request.deadline_ms == 5
            assert samples.items() <= expected(request).items()
    assert worker.alive


def test_the_broker_can_have_a_set_forgotten(worker):
    reply = parse_reply(worker.request(Forget("a").encode(), 20.0))
    assert reply.prefixes >= 0
    info = json.loads(worker.request(b'{"op":"info"}', 20.0))
    assert info["interface"] == "shared"
