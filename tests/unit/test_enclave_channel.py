"""Frames: caps, deadlines and kinds are the reader's, whatever the other side writes."""

from __future__ import annotations

import os
import struct
import threading
import time

import pytest

from airgap.enclave import channel
from airgap.enclave.channel import ChannelError, Reader, Writer

CAP = 1000


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def read(end, *, kinds=(channel.REPLY, channel.PART), request=7, within=0.05, cap=CAP):
    return Reader(end).read(kinds, cap=cap, deadline=time.monotonic() + within, request=request)


def test_a_frame_arrives_as_it_was_sent(pipe):
    channel.send(pipe[1], channel.REPLY, b"answer", 7)
    frame = read(pipe[0])
    assert (frame.kind, frame.request, frame.payload) == (channel.REPLY, 7, b"answer")
    assert not frame.is_part
    assert "6 bytes" in repr(frame)


def test_parts_are_told_from_the_reply(pipe):
    channel.send(pipe[1], channel.PART, b"", 7)
    assert read(pipe[0]).is_part


def head(length, kind=channel.REPLY, request=7):
    return struct.pack(">IcI", length, kind, request)


@pytest.mark.parametrize(
    ("content", "close", "kind"),
    [
        (head(CAP + 1), False, "over"),
        (head(0xFFFFFFFF), False, "over"),
        (head(10) + b"12345", True, "short"),
        (head(10)[:5], True, "short"),
        (head(10) + b"12345", False, "late"),
        (head(10)[:5], False, "late"),
        (b"", False, "late"),
        (b"", True, "closed"),
        (head(1, b"?") + b"x", False, "unknown"),
        (head(1, channel.READY) + b"x", False, "unknown"),
        (head(1, request=8) + b"x", False, "unknown"),
        (b"HTTP/1.1 200 OK\r\n\r\n", False, "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_whatever_breaks_the_protocol_is_named(pipe, content, close, kind):
    channel.send(pipe[1], channel.REPLY, b"x" * CAP, 7)
    assert len(read(pipe[0]).payload) == CAP  # the untouched frame passes
    os.write(pipe[1], content)
    if close:
        os.close(pipe[1])
    with pytest.raises(ChannelError) as caught:
        read(pipe[0])
    assert caught.value.kind == kind


def test_any_request_is_accepted_where_none_is_named(pipe):
    channel.send(pipe[1], channel.REPLY, b"", 12345)
    assert read(pipe[0], request=None).request == 12345


def test_a_frame_in_small_pieces_arrives(pipe):
    content = channel.encode(channel.REPLY, b"slow", 7)

    def drip():
        for at in range(len(content)):
            os.write(pipe[1], content[at : at + 1])
            time.sleep(0.001)

    thread = threading.Thread(target=drip)
    thread.start()
    assert read(pipe[0], within=5.0).payload == b"slow"
    thread.join()


def test_a_large_frame_passes_a_small_pipe(pipe):
    payload = os.urandom(300_000)
    writer = threading.Thread(
        target=Writer(pipe[1]).write,
        args=(channel.encode(channel.REPLY, payload, 7),),
        kwargs={"deadline": time.monotonic() + 5},
    )
    writer.start()
    assert read(pipe[0], within=5.0, cap=1 << 20).payload == payload
    writer.join()


def test_a_reader_that_stops_reading_is_late(pipe):
    with pytest.raises(ChannelError) as caught:
        Writer(pipe[1]).write(bytes(1 << 20), deadline=time.monotonic() + 0.05)
    assert caught.value.kind == "late"


def test_a_reader_that_is_gone_is_closed(pipe):
    os.close(pipe[0])
    with pytest.raises(ChannelError) as caught:
        Writer(pipe[1]).write(b"x", deadline=time.monotonic() + 0.05)
    assert caught.value.kind == "closed"


def test_the_worker_side_reads_what_the_broker_wrote(pipe):
    channel.send(pipe[1], channel.REQUEST, b"question", 3)
    frame = channel.receive(pipe[0], CAP)
    assert (frame.kind, frame.payload, frame.request) == (channel.REQUEST, b"question", 3)


def test_the_worker_side_ends_with_its_broker(pipe):
    os.close(pipe[1])
    with pytest.raises(EOFError):
        channel.receive(pipe[0], CAP)


def test_the_worker_side_has_a_cap_too(pipe):
    os.write(pipe[1], head(CAP + 1, channel.REQUEST))
    with pytest.raises(ValueError, match="the cap is 1000"):
        channel.receive(pipe[0], CAP)
