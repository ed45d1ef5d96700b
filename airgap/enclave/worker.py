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

from airgap.enclave import channel, filters, linux, tables
from airgap.enclave.channel import ProgramError
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, Protocol

    class Program(Protocol):
        """What runs inside the seal."""

        def warm_up(self) -> dict[str, Any]:
            """Import and load everything, run once; the answer goes into the evidence."""
            ...

        def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
            """Answer one request; `emit` sends a part on the way. No file may be opened."""
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
        serve(program, wanted["request_cap"])
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


def serve(program: Program, cap: int) -> None:
    """Answer requests one at a time until the broker closes the channel."""
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
        return channel.FAULT, error_payload("", f"{type(error).__name__}: {error}", "")


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
