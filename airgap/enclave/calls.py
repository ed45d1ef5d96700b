"""Several requests at once at one worker: who gets which frame (docs/design/enclave.md, 3).

One thread reads the channel for all; each caller takes its own frames. The worker is believed no
more than with one request: a frame for a request that is not open, more bytes than a request may
have, or more parts than its caller has let come end the worker, and so does its silence. A caller
that goes away cancels its request; the worker then has the time of a silence to say its last word.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from airgap.enclave import channel
from airgap.enclave.channel import ChannelError, Frame, Reader, Writer
from airgap.enclave.process import Process, start_thread
from airgap.enclave.spec import Caps
from policy.errors import RefusedError

_TICK_S = 0.25  # how often a caller's silence is looked for while no frame comes
_FRAME_S = 30.0  # for the rest of a frame that has begun
_WRITE_S = 30.0  # for a frame of a few bytes to a worker that may be computing
_CLOSE_S = 2.0


@dataclass(slots=True, eq=False)
class _Call:
    """A request that the worker has not had its last word on."""

    number: int
    timeout: float
    frames: queue.SimpleQueue[Frame | ChannelError] = field(default_factory=queue.SimpleQueue)
    received: int = 0
    untaken: int = 0  # cost of the parts that came and whose credit was not given back
    taken: int = 0
    over: float | None = None  # cancelled: by when the last word must have come


class Calls:
    """The requests of one sealed worker; threads may share it."""

    def __init__(self, process: Process, caps: Caps) -> None:
        """Take over the channel of a worker that is ready."""
        self._process, self._caps = process, caps
        self._from, self._to = process.duplicate_ends()
        self._writer = Writer(self._to)
        self._writing = threading.Lock()
        self._table = threading.Lock()
        self._open: dict[int, _Call] = {}
        self._places = threading.Semaphore(caps.in_flight)
        self._broken: ChannelError | None = None
        self.count = 0
        start_thread(self._read, "enclave-calls")

    def stream(self, payload: bytes, timeout: float, total_s: float | None) -> Generator[Frame]:
        """Send one request and yield its frames to the last one; see `Enclave.stream`.

        Raises:
            ChannelError: The worker broke the protocol, was silent for `timeout`, or is gone.
            RefusedError: `request.busy`, no place came free; `model.deadline`, `total_s` is over.

        """
        last = None if total_s is None else time.monotonic() + total_s
        wait = timeout if total_s is None else max(0.0, min(timeout, total_s))
        if not self._places.acquire(timeout=wait):
            raise RefusedError(
                "request.busy",
                f"the worker has {self._caps.in_flight} requests under way, and none has ended "
                f"within {wait:g} s",
                hint="send it again later",
            )
        call = self._begin(payload, timeout)
        ended = False
        try:
            while not ended:
                frame = self._next(call, last)
                ended = frame.kind != channel.PART
                yield frame
                if not ended:
                    self._give_back(call, channel.cost(frame.payload))
        finally:
            if not ended:
                self._abandon(call)

    def close(self) -> None:
        """Send nothing any more; the worker sees the end of its channel."""
        if self._writing.acquire(timeout=_CLOSE_S):
            try:
                if self._to >= 0:
                    os.close(self._to)
                    self._to = -1
            finally:
                self._writing.release()

    def _begin(self, payload: bytes, timeout: float) -> _Call:
        """Open a request and send it; its own end never cuts a frame, which would end the rest."""
        with self._table:
            self.count += 1
            call = _Call(self.count & 0xFFFFFFFF, timeout)
            if self._broken is not None:
                self._places.release()
                raise self._broken
            self._open[call.number] = call
        self._send(channel.encode(channel.REQUEST, payload, call.number), timeout)
        return call

    def _next(self, call: _Call, last: float | None) -> Frame:
        """Return the next frame of a request."""
        left = float("inf") if last is None else last - time.monotonic()
        try:
            found = call.frames.get(timeout=max(0.0, min(left, call.timeout)))
        except queue.Empty:
            if left < call.timeout:
                raise RefusedError(
                    "model.deadline",
                    "the time of this request is over, and it was not answered",
                    hint="ask for fewer or shorter samples, or for more time",
                ) from None
            raise ChannelError("late", "no frame came before the deadline") from None
        if isinstance(found, ChannelError):
            raise found
        return found

    def _give_back(self, call: _Call, count: int) -> None:
        """Let a request send on, half a window at a time."""
        call.taken += count
        if call.taken < self._caps.frame_bytes // 2:
            return
        with self._table:
            call.untaken -= call.taken
        credit, call.taken = call.taken, 0
        self._send(channel.encode_credit(credit, call.number), _WRITE_S)

    def _abandon(self, call: _Call) -> None:
        """Cancel a request whose caller is gone."""
        with self._table:
            if call.number not in self._open or self._broken is not None:
                return
            call.over = time.monotonic() + call.timeout
        with contextlib.suppress(ChannelError):  # whoever reads next hears of it
            self._send(channel.encode(channel.CANCEL, b"", call.number), _WRITE_S)

    def _send(self, frame: bytes, within_s: float) -> None:
        """Write one frame, in `within_s` of its turn; half of one is the end of the channel."""
        with self._writing:
            try:
                self._write(frame, time.monotonic() + within_s)
            except ChannelError as error:
                raise self._break(error) from error

    def _write(self, frame: bytes, deadline: float) -> None:
        if self._to < 0:
            raise ChannelError("closed", "the channel is closed")
        self._writer.write(frame, deadline=deadline)

    # -- the thread that reads -----------------------------------------------------------------

    def _read(self) -> None:
        reader = Reader(self._from)
        kinds = (channel.PART, channel.REPLY, channel.ERROR, channel.FAULT)
        try:
            while True:
                if reader.ready(_TICK_S):
                    until = time.monotonic() + _FRAME_S
                    self._dispatch(reader.read(kinds, cap=self._caps.frame_bytes, deadline=until))
                self._require_last_words()
        except ChannelError as error:
            self._break(error)
        finally:
            os.close(self._from)

    def _dispatch(self, frame: Frame) -> None:
        with self._table:
            call = self._open.get(frame.request)
            if call is None:
                raise ChannelError(
                    "unknown", f"a frame came for request {frame.request}, which is not open"
                )
            size = len(frame.payload)
            call.received += size + channel.HEAD.size
            if call.received > self._caps.reply_bytes:
                raise ChannelError(
                    "over", f"one request brought more than {self._caps.reply_bytes} bytes"
                )
            if frame.kind != channel.PART:
                del self._open[frame.request]
                self._places.release()
            elif call.over is None:
                call.untaken += channel.cost(frame.payload)
                if call.untaken > self._caps.frame_bytes:
                    raise ChannelError(
                        "over", "a request sent more parts than its caller has let come"
                    )
            else:
                return  # of a cancelled request: nobody takes it
            call.frames.put(frame)

    def _require_last_words(self) -> None:
        now = time.monotonic()
        with self._table:
            if any(call.over is not None and now > call.over for call in self._open.values()):
                raise ChannelError("late", "a cancelled request was not ended")

    def _break(self, error: ChannelError) -> ChannelError:
        """End the worker, and tell every caller what was first; returns that."""
        with self._table:
            first = self._broken = self._broken or error
            waiting, self._open = list(self._open.values()), {}
        if error.kind != "closed":
            self._process.stop()
        for call in waiting:
            call.frames.put(first)
            self._places.release()
        return first
