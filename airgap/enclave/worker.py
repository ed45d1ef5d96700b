"""Entry inside the seal: load, warm up, close the last doors, serve (docs/design/enclave.md, 3).

Nothing here is trusted by the broker; it reads the facts from /proc. After stage 2 no file opens,
so whatever a program needs is imported and loaded by `warm_up`. Standard library only; imports no
other room, so that the worker holds no policy, no audit and no key.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import importlib.util
import json
import os
import signal
import traceback
from collections import deque

from airgap.enclave import channel, filters, linux, tables
from airgap.enclave.channel import ProgramError
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, NoReturn, Protocol

    class Program(Protocol):
        """What runs inside the seal."""

        def warm_up(self) -> dict[str, Any]:
            """Import and load everything, run once; the answer goes into the evidence."""
            ...

        def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
            """Answer one request; `emit` sends a part on the way. No file may be opened."""
            ...

    class Concurrent(Program, Protocol):
        """A program that takes several requests at once; it has `begin`, and is asked to `step`."""

        @property
        def runnable(self) -> bool:
            """Whether `step` has work that need not wait for the broker."""
            ...

        def begin(
            self,
            number: int,
            payload: bytes,
            emit: Callable[[bytes], None],
            finish: Callable[[bytes | ProgramError], None],
        ) -> None:
            """Take a request; `finish` gets its reply or refusal, once, now or in a later step."""
            ...

        def cancel(self, number: int) -> None:
            """Let go of a request; `finish` is not called any more."""
            ...

        def pause(self, number: int, *, paused: bool) -> None:
            """Do no work for a request whose parts nobody takes, until told otherwise."""
            ...

        def step(self) -> None:
            """Do one round of work for all."""
            ...


PROGRAM_LIMIT = 16 << 20  # bytes of the frame that names the program and its configuration
LOAD_STATUS, PROTOCOL_STATUS = 98, 99  # exit statuses


def main() -> None:
    """Run the program that the broker names until it closes the channel; never returns."""
    os.set_inheritable(CHANNEL_IN, False)
    os.set_inheritable(CHANNEL_OUT, False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        program, wanted = load()
        seal(wanted["stage2"])
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the broker must hear of any failure to load
        fault(error)
        os._exit(LOAD_STATUS)
    try:
        serve(program, wanted["request_cap"], wanted.get("window", 0))
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the channel itself is broken
        fault(error)
    os._exit(PROTOCOL_STATUS)


def load() -> tuple[Program, dict[str, Any]]:
    """Create the program, warm it up and tell the broker; returns it and what the broker wants."""
    frame = channel.receive(CHANNEL_IN, PROGRAM_LIMIT)
    wanted = json.loads(frame.payload)
    device = None if wanted["cuda"] is None else initialise_gpu(wanted["cuda"])
    module, _, function = wanted["program"].rpartition(":")
    program: Program = getattr(find_module(module), function)(wanted["config"])
    facts = program.warm_up()
    gc.collect()
    loaded = json.dumps({"program": facts, "gpu": device}).encode()
    channel.send(CHANNEL_OUT, channel.LOADED, loaded)
    return program, wanted


def initialise_gpu(library: str) -> dict[str, int]:
    """See that the GPU answers inside the seal, before the program is loaded."""
    from airgap.enclave import gpu  # noqa: PLC0415 - for a GPU alone

    try:
        return gpu.initialise(library)
    except gpu.GpuError as error:
        refusal = json.dumps({"layer": "gpu", "message": str(error)}).encode()
        channel.send(CHANNEL_OUT, channel.REFUSED, refusal)
        os._exit(LOAD_STATUS)


def find_module(name: str) -> ModuleType:
    """Import a module by name, or by file where the name is an absolute path."""
    if not name.startswith("/"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("sealed_program", name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seal(name: str) -> None:
    """Wait for the broker's snapshot, take the last filter, try the doors and report."""
    frame = channel.receive(CHANNEL_IN, PROGRAM_LIMIT)
    if frame.kind != channel.SEAL:
        raise ValueError("the broker did not seal")
    attempts = prepare_attempts()
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # exec has reset it, so not earlier
    filters.install(filters.last(name, os.getpid(), linux.MACHINE))
    result = {name: attempt() for name, attempt in attempts.items()}
    channel.send(CHANNEL_OUT, channel.READY, json.dumps({"self_test": result}).encode())


def serve(program: Program, cap: int, window: int = 0) -> None:
    """Answer requests until the broker closes the channel.

    One at a time, or several at once where the program can and the broker gives a `window`: what
    the parts of a request may cost (`channel.cost`) before the broker has taken them.
    """
    if window and hasattr(program, "begin"):
        several: Any = program
        Desk(several, window).serve(channel.Inbox(CHANNEL_IN, cap))
    while True:
        frame = channel.receive(CHANNEL_IN, cap)
        if frame.kind != channel.REQUEST:
            raise ValueError(f"unknown frame {frame.kind!r}")
        channel.send(CHANNEL_OUT, *answer(program, frame), frame.request)


def answer(program: Program, frame: channel.Frame) -> tuple[bytes, bytes]:
    """Return the kind and payload of the reply to one request."""

    def emit(part: bytes) -> None:
        channel.send(CHANNEL_OUT, channel.PART, part, frame.request)

    try:
        return channel.REPLY, program.handle(frame.payload, emit)
    except ProgramError as error:
        return channel.ERROR, error_payload(error.code, error.message, error.hint)
    except Exception as error:  # noqa: BLE001 - one request failed; the next may work
        return channel.FAULT, fault_payload(error)


class Desk:
    """Requests under way: each one gets every frame of the broker, its parts, and one last frame.

    A part leaves only within the credit of its request. What exceeds it waits here, and the request
    is paused: one that nobody reads costs the others nothing.
    """

    PAUSED_MS = 200  # how often deadlines are looked at while nothing can be done

    def __init__(self, program: Concurrent, window: int) -> None:
        self._program = program
        self._window = window
        self._open: dict[int, _Open] = {}

    def serve(self, inbox: channel.Inbox) -> NoReturn:
        """Take requests and work on them; EOFError when the broker has closed the channel."""
        while True:
            runnable = self._program.runnable
            wait = 0 if runnable else self.PAUSED_MS if self._open else None
            for frame in inbox.frames(wait):
                self._take(frame)
            if self._open:
                self._step()

    def _step(self) -> None:
        try:
            self._program.step()
        except Exception as error:  # noqa: BLE001 - nobody's state can be trusted; the next may work
            for number in list(self._open):
                self._program.cancel(number)
                self._finish(number, channel.FAULT, fault_payload(error))

    def _take(self, frame: channel.Frame) -> None:
        if frame.kind == channel.REQUEST and frame.request not in self._open:
            self._begin(frame.request, frame.payload)
        elif frame.kind == channel.CANCEL:
            self._cancel(frame.request)
        elif frame.kind == channel.CREDIT:
            self._credit(frame.request, channel.decode_credit(frame.payload))
        else:
            raise ValueError(f"unknown frame {frame.kind!r} for request {frame.request}")

    def _begin(self, number: int, payload: bytes) -> None:
        self._open[number] = _Open(self._window)

        def emit(part: bytes) -> None:
            self._emit(number, part)

        def finish(outcome: bytes | ProgramError) -> None:
            if isinstance(outcome, ProgramError):
                refusal = error_payload(outcome.code, outcome.message, outcome.hint)
                self._finish(number, channel.ERROR, refusal)
            else:
                self._finish(number, channel.REPLY, outcome)

        try:
            self._program.begin(number, payload, emit, finish)
        except ProgramError as error:
            finish(error)
        except Exception as error:  # noqa: BLE001 - one request failed; the others go on
            self._program.cancel(number)
            self._finish(number, channel.FAULT, fault_payload(error))

    def _cancel(self, number: int) -> None:
        """Let go of a request; one that has just ended is gone already."""
        request = self._open.get(number)
        if request is not None:
            self._program.cancel(number)
            request.waiting.clear()
            words = error_payload("request.cancelled", "the request was cancelled", "")
            self._finish(number, channel.ERROR, words)

    def _credit(self, number: int, count: int) -> None:
        request = self._open.get(number)
        if request is not None:
            request.credit += count
            self._flush(number, request)

    def _emit(self, number: int, part: bytes) -> None:
        request = self._open[number]
        request.waiting.append(part)
        self._flush(number, request)

    def _finish(self, number: int, kind: bytes, payload: bytes) -> None:
        request = self._open[number]
        request.last = kind, payload
        self._flush(number, request)

    def _flush(self, number: int, request: _Open) -> None:
        """Send what the credit covers; a part above the whole window is for the broker to judge."""
        waiting = request.waiting
        while waiting and (
            channel.cost(waiting[0]) <= request.credit or len(waiting[0]) > self._window
        ):
            part = waiting.popleft()
            request.credit -= channel.cost(part)
            channel.send(CHANNEL_OUT, channel.PART, part, number)
        if not waiting and request.last is not None:
            del self._open[number]
            channel.send(CHANNEL_OUT, *request.last, number)
        elif request.last is None and request.paused != bool(waiting):
            request.paused = bool(waiting)
            self._program.pause(number, paused=request.paused)


class _Open:
    """A request of the desk: what it may still send, what waits, and its last frame."""

    __slots__ = ("credit", "last", "paused", "waiting")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.waiting: deque[bytes] = deque()
        self.last: tuple[bytes, bytes] | None = None
        self.paused = False


def fault_payload(error: Exception) -> bytes:
    """Return what is told of a failure that is no refusal."""
    return error_payload("", f"{type(error).__name__}: {error}", "")


def error_payload(code: str, message: str, hint: str) -> bytes:
    """Return a typed error as JSON, its texts cut."""
    limit = channel.ERROR_TEXT_LIMIT
    return json.dumps({"code": code, "message": message[:limit], "hint": hint[:limit]}).encode()


def fault(error: BaseException) -> None:
    """Tell the broker why the program did not come up; the trace goes to the capped error pipe."""
    words = "".join(traceback.format_exception(error))[-8000:]
    try:
        os.write(tables.STDERR, words.encode(errors="replace"))
        if isinstance(error, ProgramError):
            payload = error_payload(error.code, error.message, error.hint)
            channel.send(CHANNEL_OUT, channel.ERROR, payload)
        else:
            payload = error_payload("", f"{type(error).__name__}: {error}", "")
            channel.send(CHANNEL_OUT, channel.FAULT, payload)
    except OSError:
        return


# -- the short probe ------------------------------------------------------------------------------

_AT_FDCWD = -100
_AF_UNIX, _AF_INET, _AF_VSOCK, _STREAM, _DGRAM = 1, 2, 40, 1, 2


def prepare_attempts() -> dict[str, Callable[[], str]]:
    """Prepare one raw call for each door; nothing is imported or allocated after stage 2."""
    path = ctypes.create_string_buffer(b"/dev/null")
    closed = ctypes.create_string_buffer(b"/etc/passwd")
    null_pointer = ctypes.c_void_p(0)
    parameters = ctypes.create_string_buffer(120)
    calls: dict[str, tuple[str, tuple[object, ...]]] = {
        "tcp4": ("socket", (_AF_INET, _STREAM, 0)),
        "udp4": ("socket", (_AF_INET, _DGRAM, 0)),
        "dns": ("sendto", (CHANNEL_OUT, path, 1, 0, null_pointer, 0)),
        "unix_path": ("socket", (_AF_UNIX, _STREAM, 0)),
        "vsock": ("socket", (_AF_VSOCK, _STREAM, 0)),
        "io_uring": ("io_uring_setup", (8, parameters)),
        "open": ("openat", (_AT_FDCWD, closed, 0, 0)),
        "exec": ("execve", (path, null_pointer, null_pointer)),
        "fork": ("clone", (int(signal.SIGCHLD), 0, 0, 0, 0)),
        "kill": ("kill", (1, 0)),
        "ptrace": ("ptrace", (0, 0, 0, 0)),
        "write_null": ("write", (1, path, 1)),
        "executable_memory": ("mmap", (0, 4096, 7, 0x22, -1, 0)),
        "executable_page": ("mprotect", (0, 4096, 5)),
        "signal_by_thread": ("tgkill", (os.getpid() + 1, os.getpid() + 1, 0)),
    }
    return {name: _attempt(linux.NUMBER[nr], arguments) for name, (nr, arguments) in calls.items()}


def _attempt(number: int, arguments: tuple[object, ...]) -> Callable[[], str]:
    def attempt() -> str:
        try:
            answered = linux.call_number(number, *arguments)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        if answered == 0 and number == linux.NUMBER["clone"]:
            os._exit(0)  # a child that should not exist
        return "OPEN"

    return attempt
