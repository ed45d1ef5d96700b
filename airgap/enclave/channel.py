"""Frames between broker and worker, over two pipes (docs/design/enclave.md, 3).

A frame is a 4-byte big-endian payload length, a 1-byte kind, a 4-byte big-endian request id and
the payload. Pipes and not sockets: nothing can be passed along or re-addressed. The broker
believes nothing: every read has a cap and a deadline, and a frame that is over, short, late or of
a kind that is not expected ends the worker. Stdlib only; both sides import it.
"""

from __future__ import annotations

import os
import select
import struct
import time

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD = struct.Struct(">IcI")

# from the broker
PLAN, PROGRAM, SEAL, REQUEST = b"P", b"L", b"S", b"Q"
# from the broker, of a request under way: to a program that takes several at once
CANCEL, CREDIT = b"C", b"K"
# from the launcher
ALIVE, REFUSED = b"p", b"n"
# from the worker
LOADED, READY, PART, REPLY, ERROR, FAULT = b"l", b"r", b"e", b"a", b"f", b"x"

_CHUNK = 1 << 16
_BYTES = struct.Struct(">I")  # payload of a CREDIT frame
_PART_COST = 128  # what a part costs its receiver beside its bytes, roughly
ERROR_TEXT_LIMIT = 4000  # characters of a message or hint that a program may send


class ProgramError(Exception):
    """A refusal that a sealed program makes on purpose: listed code, words, next step."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class ChannelError(Exception):
    """The other side broke the protocol; `kind` is over, short, late, unknown or closed."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Frame:
    """One frame as received."""

    __slots__ = ("kind", "payload", "request")

    def __init__(self, kind: bytes, request: int, payload: bytes) -> None:
        self.kind = kind
        self.request = request
        self.payload = payload

    @property
    def is_part(self) -> bool:
        """True for a frame that the program emitted on the way, False for its reply."""
        return self.kind == PART

    def __repr__(self) -> str:
        return f"Frame({self.kind!r}, request={self.request}, {len(self.payload)} bytes)"


def encode(kind: bytes, payload: bytes, request: int = 0) -> bytes:
    """Return the bytes of one frame."""
    return HEAD.pack(len(payload), kind, request) + payload


def cost(part: bytes) -> int:
    """Return the credit that a part takes: small ones are not free, or millions would wait."""
    return max(len(part), _PART_COST)


def encode_credit(count: int, request: int) -> bytes:
    """Return the bytes of the frame that lets a request send parts that cost `count` more."""
    return encode(CREDIT, _BYTES.pack(count), request)


class Reader:
    """Reads frames from a pipe with caps and deadlines; the broker's side of a hostile writer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(
        self,
        kinds: Iterable[bytes],
        *,
        cap: int,
        deadline: float,
        request: int | None = None,
    ) -> Frame:
        """Return the next frame.

        Args:
            kinds: The kinds that may come now.
            cap: Largest payload in bytes.
            deadline: On `time.monotonic()`.
            request: The only request id that may come; None for any.

        Raises:
            ChannelError: Nothing, not enough, too much or something else came.

        """
        head = self._exactly(HEAD.size, deadline, first=True)
        length, kind, found = HEAD.unpack(head)
        if kind not in tuple(kinds):
            raise ChannelError(
                "unknown", f"a frame of kind {kind!r} came, expected {sorted(kinds)}"
            )
        if request is not None and found != request:
            raise ChannelError("unknown", f"a frame for request {found} came, expected {request}")
        if length > cap:
            raise ChannelError("over", f"a frame of {length} bytes came, the cap is {cap}")
        return Frame(kind, found, self._exactly(length, deadline))

    def ready(self, seconds: float) -> bool:
        """Wait for a byte or the end of the channel; False when neither came in time."""
        return bool(self._poll.poll(max(1, int(seconds * 1000))))

    def _exactly(self, length: int, deadline: float, *, first: bool = False) -> bytes:
        parts: list[bytes] = []
        missing = length
        while missing:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(max(1, int(left * 1000))):
                raise ChannelError("late", "no complete frame came before the deadline")
            part = os.read(self._descriptor, min(missing, _CHUNK))
            if not part:
                if first and missing == length:
                    raise ChannelError("closed", "the other side closed the channel")
                raise ChannelError("short", f"the channel ended {missing} bytes inside a frame")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class Writer:
    """Writes frames to a pipe whose reader may have stopped reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, frame: bytes, *, deadline: float) -> None:
        """Write one encoded frame; ChannelError when the reader is too slow for the deadline."""
        rest = memoryview(frame)
        while rest:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(max(1, int(left * 1000))):
                raise ChannelError("late", "the other side does not read")
            try:
                done = os.write(self._descriptor, rest)
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ChannelError("closed", "the other side closed the channel") from None
            rest = rest[done:]


# -- the trusting side: launcher and worker read what the broker wrote ----------------------------


def receive(descriptor: int, cap: int) -> Frame:
    """Read one frame, blocking; EOFError when the broker has closed the channel."""
    length, kind, request = HEAD.unpack(_all(descriptor, HEAD.size))
    if length > cap:
        raise ValueError(f"a frame of {length} bytes came, the cap is {cap}")
    return Frame(kind, request, _all(descriptor, length))


def send(descriptor: int, kind: bytes, payload: bytes, request: int = 0) -> None:
    """Write one frame, blocking."""
    rest = memoryview(encode(kind, payload, request))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class Inbox:
    """Frames of the broker for a worker that goes on computing while one is on its way."""

    def __init__(self, descriptor: int, cap: int) -> None:
        self._descriptor = descriptor
        self._cap = cap
        self._held = bytearray()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def frames(self, wait_ms: int | None) -> list[Frame]:
        """Return every whole frame that has come.

        Args:
            wait_ms: How long to wait for a byte where no whole frame is there; None for ever.

        Raises:
            EOFError: The broker has closed the channel.
            ValueError: A frame is larger than the cap.

        """
        found = self._whole()
        while not found and self._poll.poll(wait_ms):
            part = os.read(self._descriptor, _CHUNK)
            if not part:
                raise EOFError
            self._held += part
            found = self._whole()
            if wait_ms is not None and not found:
                wait_ms = 0
        return found

    def _whole(self) -> list[Frame]:
        found = []
        while len(self._held) >= HEAD.size:
            length, kind, request = HEAD.unpack_from(self._held)
            if length > self._cap:
                raise ValueError(f"a frame of {length} bytes came, the cap is {self._cap}")
            end = HEAD.size + length
            if len(self._held) < end:
                break
            found.append(Frame(kind, request, bytes(self._held[HEAD.size : end])))
            del self._held[:end]
        return found


def decode_credit(payload: bytes) -> int:
    """Return the credit that a CREDIT frame gives."""
    return int(_BYTES.unpack(payload)[0])


def _all(descriptor: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = os.read(descriptor, min(length, _CHUNK))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
