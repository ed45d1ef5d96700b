"""A process behind a channel: start it, read its frames, look at it from outside, end it.

Obeys docs/design/enclave.md, 3 and 7. `seal` decides what runs and when it is proven; here is what
every sealed process has in common. Nothing that it says is believed.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import queue
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from airgap.enclave import channel, evidence, filters, host, reading
from airgap.enclave import plan as plans
from airgap.enclave.channel import ChannelError, Frame, Reader, Writer
from airgap.enclave.host import HostSurvey
from airgap.enclave.launcher import HIGH_STATUS, REFUSED_STATUS, SIGNAL_BASE
from airgap.enclave.plan import Plan, PlanError
from airgap.enclave.refused import SealRefused
from airgap.enclave.worker import LOAD_STATUS
from policy.errors import CODES, AirgapError, FaultError, RefusedError

_SMALL = 1 << 20  # bytes of a control frame
_GRACE_S = 2.0
# A sealed program may answer with codes of these rooms alone: it never speaks for policy or audit.
_PROGRAM_ROOMS = frozenset({"prompt", "model", "request", "science", "screen"})


class Process:
    """A launcher that was told a plan, and what it becomes.

    `make_plan` is called once the launcher has been started: its interpreter comes up meanwhile.
    """

    plan: Plan

    def __init__(
        self,
        make_plan: Callable[[], Plan],
        *,
        stderr_cap: int,
        deadline_s: float,
        leaked: tuple[int, ...] = (),
    ) -> None:
        self.deadline = time.monotonic() + deadline_s
        self.deadline_s = deadline_s
        self._ended: dict[str, Any] | None = None
        self.was_killed = False  # by us: its signal says nothing of what it did
        # Who waits for a child also sees the stops of one that is traced: one thread at a time.
        self._reaping = threading.RLock()
        self._pidfd = -1
        self.pid = 0
        self._waited_for = False  # by a parent outside, which passes its end on
        self._parent_sealed = False
        require_descriptors()
        incoming, self._to = os.pipe()
        self._from, outgoing = os.pipe()
        try:
            argv = plans.launcher_argv(incoming, outgoing)
            self._popen = _spawner().start(argv, (incoming, outgoing, *leaked))
        except BaseException:
            self._close_ends()  # a launcher that reads no plan ends
            raise
        finally:
            os.close(incoming)
            os.close(outgoing)
        self.reader, self.writer = Reader(self._from), Writer(self._to)
        self._stderr = _Drain(self._popen, stderr_cap)
        try:
            self._stderr.start()
            self.plan = make_plan()
            self._waited_for = bool(self.plan["namespaces"])
            self.send(channel.PLAN, marshal.dumps(dict(self.plan)))
            self._meet()
        except BaseException:
            self.kill()
            raise

    def _meet(self) -> None:
        """Learn the host pid of the sealed process and take a handle that cannot be reused."""
        frame = self.expect(channel.ALIVE)
        pid = int(frame.payload)
        wanted = self._popen.pid if self._waited_for else os.getpid()
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return  # it is gone already; the next frame says why
        found = _parent_of(pid)
        if found == wanted:
            self.pid, self._pidfd = pid, handle
            return
        os.close(handle)  # never a handle to kill by before it is known whose it is
        if found is not None:
            raise SealRefused("parent", f"process {pid} is a child of {found}, not of {wanted}")

    def send(self, kind: bytes, payload: bytes, request: int = 0) -> None:
        """Send a frame before the start deadline."""
        try:
            self.writer.write(channel.encode(kind, payload, request), deadline=self.deadline)
        except ChannelError as error:
            if error.kind != "closed":
                raise self.refusal(error) from error

    def expect(self, kind: bytes) -> Frame:
        """Return the next control frame; a refusal or a failure on the other side is raised."""
        kinds = (kind, channel.REFUSED, channel.ERROR, channel.FAULT)
        try:
            frame = self.reader.read(kinds, cap=_SMALL, deadline=self.deadline)
        except ChannelError as error:
            raise self.refusal(error) from error
        if frame.kind == kind:
            return frame
        if frame.kind == channel.REFUSED:
            found = json_object(frame.payload)
            name = str(found.get("layer", ""))
            known = name if f"enclave.{name}" in CODES else "start"
            raise SealRefused(known, f"{found.get('message', '')!s:.2000}")
        raise program_error(frame, self.words())

    def refusal(self, error: ChannelError) -> AirgapError:
        """Turn a broken channel into what it means for the caller, and end the process."""
        end = self.kill()
        tail = last_words(self.words())
        if end["signal"] == signal.SIGSYS:
            return SealRefused(
                "incident", f"the process made a forbidden call and was killed{tail}"
            )
        if error.kind == "late":
            return SealRefused("deadline", f"nothing came within {self.deadline_s:g} s{tail}")
        if error.kind == "closed" and end["status"] == REFUSED_STATUS:
            return SealRefused("parent", f"the waiting parent could not seal itself{tail}")
        if error.kind == "closed":
            return FaultError(
                "enclave.worker",
                f"the sealed process ended early ({how(end)}){tail}",
                hint="run it again; if it ends again, look at the model and at the memory limit",
            )
        return SealRefused("channel", f"{error} ({error.kind}){tail}")

    def verify(
        self, facts: HostSurvey, *, own_filters: int, dumpable: bool | None
    ) -> reading.Facts:
        """Read /proc and compare with the plan; SealRefused names the first difference."""
        try:
            found = self._settled()
        except OSError as error:
            raise SealRefused("evidence", f"the process is gone: {error}") from error
        findings = evidence.verify(
            found,
            self.plan,
            inherited=reading.inherited_filters(),
            own_filters=own_filters,
            dumpable=dumpable,
            host=reading.own_namespaces(),
            uid=self.uid_seen(facts),
        )
        if findings:
            raise SealRefused(findings[0].layer, "; ".join(f.message for f in findings)[:2000])
        if found.session != self._popen.pid:
            words = f"the process is in session {found.session}, not in that of its launcher"
            raise SealRefused("parent", words)
        until = time.monotonic() + _GRACE_S
        while self._waited_for and not self.parent_sealed(facts):
            if time.monotonic() > until:
                raise SealRefused("parent", "the waiting parent has taken no filter")
            time.sleep(0.001)
        return found

    def _settled(self) -> reading.Facts:
        """Read the facts; the kernel counts a closed socket of the launcher an instant longer."""
        until = time.monotonic() + _GRACE_S
        while True:
            found = reading.read(self.pid)
            if not self._waited_for or not found.sockets or time.monotonic() > until:
                return found
            time.sleep(0.001)

    def look_at_parent(self, facts: HostSurvey) -> None:
        """Prove the waiting parent while the program loads; `verify` does it where it is early."""
        if not self._waited_for:
            return
        with contextlib.suppress(SealRefused):  # raised again by `verify`, if it still holds then
            while not self.parent_sealed(facts) and not self.reader.ready(0.002):
                continue

    def parent_sealed(self, facts: HostSurvey) -> bool:
        """Look at the process that waits outside; False until it has taken its filter.

        Once is enough: under that filter it can change nothing of itself any more.

        Raises:
            SealRefused: It is gone, or it is not what it should be.

        """
        if self._parent_sealed:
            return True
        try:
            found = reading.read(self._popen.pid)
        except OSError as error:
            raise SealRefused("parent", f"the waiting parent is gone: {error}") from error
        if not found.seccomp or found.filters != reading.inherited_filters() + 1:
            return False
        whole = (found.uids[1], found.no_new_privs, found.capabilities["prm"], found.descriptors)
        if whole[:3] != (self.uid_seen(facts), 1, "0") or whole[3]:
            raise SealRefused("parent", f"the waiting parent is not sealed: {whole}")
        expected = filters.waiting_parent(self.pid, facts.arch)
        with self._reaping:
            if evidence.live_filters(self._popen.pid, [expected], facts) is False:
                raise SealRefused("parent", "the filter of the waiting parent is another one")
        self._parent_sealed = True
        return True

    def uid_seen(self, facts: HostSurvey) -> int:
        """Return the uid that /proc shows: in a user namespace it stays the starter's."""
        identity = self.plan["identity"]
        return facts.uid if identity is None else identity[0]

    def verify_filters(self, facts: HostSurvey, last: bytes | None) -> bool | None:
        """Compare the live filters with the built ones, where the broker may look."""
        expected = [filters.stage1(facts.arch), *([] if last is None else [last])]
        with self._reaping:
            live = evidence.live_filters(self.pid, expected, facts)
        if live is False:
            raise SealRefused(
                "stage2", "the filters of the live process are not the published ones"
            )
        return live

    def words(self) -> str:
        """Return what the process wrote to its error pipe, cut, control characters replaced."""
        return re.sub(r"[^\x20-\x7e\n]", "?", self._stderr.content().decode(errors="replace"))

    def printed(self) -> tuple[bytes, int]:
        """Return the kept part of the error pipe as it came, and how many bytes came in all."""
        return self._stderr.content(), self._stderr.total

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        with self._reaping:
            return self._ended is None and self._popen.poll() is None

    def stop(self) -> None:
        """Send SIGKILL and no more: whoever reads the channel sees its end and cleans up."""
        with self._reaping:
            if self.alive and self._pidfd >= 0:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def dies(self, within_s: float = 0.05) -> bool:
        """Say whether the process ends by itself within an instant.

        One that is ending has lost its descriptors already: that is no change of the seal.
        """
        until = time.monotonic() + within_s
        while self.alive:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    def finish(self, grace_s: float = _GRACE_S) -> dict[str, Any]:
        """Close the channel, let the process end by itself, then kill it; returns how it ended."""
        with self._reaping:
            if self._ended is None:
                self._close_ends()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(grace_s)
            return self.kill()

    def kill(self) -> dict[str, Any]:
        """End the process now and return how it ended; later calls return the same."""
        with self._reaping:
            return self._kill()

    def _kill(self) -> dict[str, Any]:
        if self._ended is not None:
            return self._ended
        if self._pidfd >= 0 and self._popen.poll() is None:
            self.was_killed = True
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_GRACE_S)  # the waiting parent passes the end on
        if self._popen.poll() is None:
            self.was_killed = True
            self._popen.kill()
        status = self._popen.wait()
        self._close_ends()
        self._stderr.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        if not self._waited_for and status >= SIGNAL_BASE:
            status = HIGH_STATUS  # our own child: a number of its choice, and no signal
        self._ended = exit_of(status)
        return self._ended

    def duplicate_ends(self) -> tuple[int, int]:
        """Return the channel's ends, to read and to write, for a thread that closes them itself."""
        return os.dup(self._from), os.dup(self._to)

    def _close_ends(self) -> None:
        for name in ("_to", "_from"):
            end = getattr(self, name)
            if end >= 0:
                os.close(end)
                setattr(self, name, -1)


def _parent_of(pid: int) -> int | None:
    """Return the parent of a process, None when it is gone."""
    try:
        status = host.parse_status(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(status["PPid"])


def exit_of(status: int) -> dict[str, Any]:
    """Read an exit status as a waiting parent passes it on.

    A signal is 128 + number; 255 stands for each status from 128 up, which is no signal.
    """
    passed_on = SIGNAL_BASE < status < SIGNAL_BASE + signal.NSIG
    number = -status if status < 0 else status - SIGNAL_BASE if passed_on else None
    return {"status": None if number else status, "signal": number}


def how(end: dict[str, Any]) -> str:
    """Return in words how a process ended."""
    if end["signal"]:
        with contextlib.suppress(ValueError):
            return signal.Signals(end["signal"]).name
        return f"signal {end['signal']}"
    if end["status"] == LOAD_STATUS:
        return "the program did not load"
    return f"exit status {end['status']}"


def program_error(frame: Frame, words: str) -> AirgapError:
    """Turn an error frame into ours: a typed refusal keeps its code, anything else is a fault."""
    found = json_object(frame.payload)
    code, message = str(found.get("code", "")), str(found.get("message", ""))
    limit = channel.ERROR_TEXT_LIMIT
    room = code.partition(".")[0]
    if frame.kind == channel.ERROR and code in CODES and room in _PROGRAM_ROOMS:
        return RefusedError(code, message[:limit], hint=str(found.get("hint", ""))[:limit])
    return FaultError(
        "enclave.program",
        f"the sealed program failed: {message[:limit]}{last_words(words)}",
        hint="the request was not answered; nothing left the seal",
    )


def json_object(payload: bytes) -> dict[str, Any]:
    """Read a small JSON object from the other side."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SealRefused("channel", f"a control frame is not JSON: {payload[:80]!r}") from error
    if not isinstance(found, dict):
        raise SealRefused("channel", f"a control frame is not an object: {payload[:80]!r}")
    return found


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Turn a wish that cannot be met into the refusal of its layer."""
    try:
        yield
    except PlanError as error:
        raise SealRefused(error.layer, str(error)) from error


# -- starting processes ---------------------------------------------------------------------------


DESCRIPTORS = 640  # hard limit that launcher and probe need: the probe uses numbers above 600
_OWN_DESCRIPTORS = 64


def require_descriptors() -> None:
    """Refuse a limit on open files under which launcher or probe would fail in a puzzling way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = (soft, _OWN_DESCRIPTORS) if soft < _OWN_DESCRIPTORS else (hard, DESCRIPTORS)
    if least[0] < least[1]:
        raise SealRefused(
            "limits",
            f"this process may open {least[0]} files (ulimit -n), the seal needs {least[1]}",
        )


def start_thread(
    target: Callable[..., None], name: str, arguments: tuple[object, ...] = ()
) -> threading.Thread:
    """Start a thread that does not keep this process alive."""
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise FaultError(
            "enclave.worker",
            "no thread can be started: this process has reached its limits",
            hint="raise them (ulimit -d, -v, -u), then start it again",
        ) from error
    return thread


def last_words(words: str) -> str:
    """Return the end of what a process wrote, as the end of a message; of a trace its last line."""
    if not words.strip():
        return ""
    if "Traceback (most recent call last)" in words:
        words = words.rstrip().rpartition("\n")[2]
    return f"; its last words: {words[-400:]!r}"


class _Drain:
    """Reads an error pipe to its end and keeps the first bytes."""

    def __init__(self, popen: subprocess.Popen[bytes], cap: int) -> None:
        self._popen = popen
        self._cap = cap
        self._kept = bytearray()
        self.total = 0  # bytes that came, kept or not
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read."""
        self._thread = start_thread(self._read, "enclave-stderr")

    def _read(self) -> None:
        pipe = self._popen.stderr
        if pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):
            while part := os.read(pipe.fileno(), 1 << 16):
                self.total += len(part)
                self._kept += part[: max(0, self._cap - len(self._kept))]

    def content(self) -> bytes:
        """Return what was kept so far."""
        return bytes(self._kept)

    def close(self) -> None:
        """Wait for the end of the pipe, which comes with the end of the process."""
        if self._thread is not None:
            self._thread.join(_GRACE_S)
        if self._popen.stderr is not None:
            self._popen.stderr.close()


class _Spawner:
    """Starts processes from one thread that lives as long as this process.

    The death signal follows the thread that started a child: a worker started by a short-lived
    thread would be killed when that thread ends.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._wishes: queue.SimpleQueue[tuple[Callable[[], object], queue.SimpleQueue[Any]]] = (
            queue.SimpleQueue()
        )
        start_thread(self._run, "enclave-spawner")

    def _run(self) -> None:
        while True:
            make, answer = self._wishes.get()
            try:
                answer.put((make(), None))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                answer.put((None, error))

    def start(self, argv: list[str], ends: tuple[int, ...]) -> subprocess.Popen[bytes]:
        """Start `argv` with an empty environment, null, an error pipe and `ends`."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def make() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=ends,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            )

        self._wishes.put((make, answer))
        popen, error = answer.get()
        if error is not None:
            raise FaultError("enclave.worker", f"the launcher did not start: {error}") from error
        return popen  # type: ignore[no-any-return]


_spawners: list[_Spawner] = []


def _spawner() -> _Spawner:
    """Return this process's spawner; after a fork the thread of the parent is not ours."""
    if not _spawners or _spawners[0].pid != os.getpid():
        _spawners[:] = [_Spawner()]
    return _spawners[0]
