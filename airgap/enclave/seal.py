"""The broker's side: start a process, prove it, talk to it (docs/design/enclave.md, 3 and 7).

`launch` returns a worker whose every layer was found on the host, or raises. There is no flag and
no variable that makes it return anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from airgap.enclave import channel, evidence, filters, host, twin
from airgap.enclave import plan as plans
from airgap.enclave.channel import ChannelError, Frame, Reader, Writer
from airgap.enclave.host import HostSurvey
from airgap.enclave.launcher import REFUSED_STATUS, SIGNAL_BASE
from airgap.enclave.plan import Plan, PlanError
from airgap.enclave.refused import SealRefused
from airgap.enclave.worker import LOAD_STATUS
from policy.errors import CODES, AirgapError, FaultError, RefusedError

_SMALL = 1 << 20  # bytes of a control frame
_REVERIFY_S = 60.0
_GRACE_S = 2.0
# A sealed program may answer with codes of these rooms alone: it never speaks for policy or audit.
_PROGRAM_ROOMS = frozenset({"prompt", "model", "request", "science", "screen"})
# Layers whose absence is a fact of the host; the next rung does without them.
_OF_RUNG_A = frozenset({"namespaces", "root"})


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits on what crosses the channel and on what the process may use."""

    request_bytes: int = 16 << 20
    frame_bytes: int = 4 << 20
    reply_bytes: int = 256 << 20  # all frames of one request together
    stderr_bytes: int = 64 << 10
    memory_mb: int = 0  # 0: 4 GiB and three times the inputs
    threads: int = 2
    descriptors: int = 256


@dataclass(frozen=True, slots=True)
class SealSpec:
    """What to seal.

    Attributes:
        profile: `worker` or `screen`; the layers are the same.
        program: `module:function` or `/path/to/file.py:function`; the function takes `config` and
            returns a Program. A file must lie in `read_only`.
        config: JSON-ready configuration.
        read_only: Inputs that the program may read: its model folder.
        min_rung: Least rung that is acceptable; None is A for root and B for a user.
        uid: The worker's uid when root starts it; None picks a free one.
        deadline_s: For start, load and proof together.
        caps: Limits.
        artifacts: Digests of what runs, recorded in the evidence.
        state: Folder that keeps the result of the twin probe between processes; None keeps it
            for this process alone.
        rung: Try this rung alone; it must not lie below `min_rung`.

    """

    profile: str
    program: str
    config: dict[str, Any] = field(default_factory=dict)
    read_only: tuple[Path, ...] = ()
    min_rung: str | None = None
    uid: int | None = None
    deadline_s: float = 60.0
    caps: Caps = field(default_factory=Caps)
    artifacts: dict[str, Any] = field(default_factory=dict)
    state: Path | None = None
    rung: str | None = None


def launch(spec: SealSpec) -> Enclave:
    """Start `spec.program` inside the seal and return it once every layer is proven.

    Raises:
        SealRefused: Code `enclave.<layer>`; nothing is left running.
        RefusedError: The program refused to load, with a code of its own.
        FaultError: The program failed to load.

    """
    facts = host.survey()
    min_rung = spec.min_rung or host.default_min_rung(facts)
    rungs, left_out = host.candidate_rungs(facts, min_rung)
    tried = [{"rung": rung, "reason": reason} for rung, reason in sorted(left_out.items())]
    if spec.rung is not None:
        rungs = [rung for rung in rungs if rung == spec.rung]
    for rung in rungs:
        try:
            report = twin.probe_rung(rung, spec.uid, facts, spec.state)
            twin.require_sealed(report)
            return start(rung, spec, facts, tried=tried, probe=report)
        except SealRefused as refused:
            refused.facts = facts
            refused.tried = tried
            if refused.layer not in _OF_RUNG_A or rung == rungs[-1]:
                raise
            tried.append({"rung": rung, "reason": f"{refused.code}: {refused.message}"})
    reasons = "; ".join(f"{entry['rung']}: {entry['reason']}" for entry in tried)
    refusal = SealRefused("rung", f"this host reaches no rung from {min_rung} up ({reasons})")
    refusal.facts, refusal.tried = facts, tried
    raise refusal


def start(
    rung: str,
    spec: SealSpec,
    facts: HostSurvey,
    *,
    tried: Sequence[dict[str, str]] = (),
    probe: dict[str, Any] | None = None,
    leaked: tuple[int, ...] = (),
) -> Enclave:
    """Start and verify a worker on `rung`; `launch` has the probe's word before it calls this.

    `leaked` are descriptors that the twin of the probe hands to its launcher on purpose.
    """
    read_only = [os.path.abspath(path) for path in spec.read_only]  # noqa: PTH100 - symbolic links stay
    environment = plans.built_environment(threads=spec.caps.threads)
    with planning():
        plans.require_silent(facts.telemetry, environment)
        plans.require_inputs(read_only)
        memory = spec.caps.memory_mb or 4096 + 3 * plans.folder_bytes(read_only) // (1 << 20)
        plan = plans.build(
            facts,
            rung=rung,
            profile=spec.profile,
            part="worker",
            read_only=read_only,
            writable=(),
            environment=environment,
            memory_mb=memory,
            descriptors=spec.caps.descriptors,
            file_mb=0,
            uid=spec.uid,
        )
    process = Process(
        plan, stderr_cap=spec.caps.stderr_bytes, deadline_s=spec.deadline_s, leaked=leaked
    )
    try:
        request = {
            "program": spec.program,
            "config": spec.config,
            "request_cap": spec.caps.request_bytes,
        }
        process.send(channel.PROGRAM, json.dumps(request).encode())
        frame = process.expect(channel.LOADED)
        loaded = process.verify(facts, own_filters=1, dumpable=None)
        process.send(channel.SEAL, b"")
        ready = process.expect(channel.READY)
        sealed = process.verify(facts, own_filters=2, dumpable=False)
        stage2 = filters.stage2(sealed.pid_inside, facts.arch)
        live = process.verify_filters(facts, stage2)
        self_test = _self_test(ready.payload)
        document = evidence.seal_document(
            facts,
            plan,
            loaded,
            sealed,
            policy=_policy(spec, rung),
            live=live,
            last_filter=stage2,
            artifacts={
                **_library(facts),
                **spec.artifacts,
                "program": _json(frame.payload).get("program"),
            },
            tried=tried,
            probe=None if probe is None else twin.summary(probe),
            self_test=self_test,
            host=evidence.own_namespaces(),
        )
    except BaseException:
        process.kill()
        raise
    return Enclave(process, sealed, document, spec)


def _policy(spec: SealSpec, rung: str) -> dict[str, Any]:
    """Return what was asked for, with a digest of it."""
    wanted = {
        "min_rung": spec.min_rung or rung,
        "gpu": False,
        "profile": spec.profile,
        "program": spec.program,
        "caps": asdict(spec.caps),
        "read_only": [str(path) for path in spec.read_only],
    }
    content = json.dumps(wanted, sort_keys=True, separators=(",", ":")).encode()
    return {**wanted, "sha256": hashlib.sha256(content).hexdigest()}


def _library(facts: HostSurvey) -> dict[str, Any]:
    return {
        "onnxruntime": facts.onnxruntime,
        "ort_telemetry": "disabled" if facts.telemetry else "absent",
    }


def _json(payload: bytes) -> dict[str, Any]:
    """Read a small JSON object from the other side."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SealRefused("channel", f"a control frame is not JSON: {payload[:80]!r}") from error
    if not isinstance(found, dict):
        raise SealRefused("channel", f"a control frame is not an object: {payload[:80]!r}")
    return found


def _self_test(payload: bytes) -> dict[str, str]:
    """Every door that the worker tried after stage 2 must have answered EPERM."""
    found = _json(payload).get("self_test")
    if not isinstance(found, dict) or not found:
        raise SealRefused("stage2", "the worker reported no self-test")
    for door, answer in found.items():
        if answer != "EPERM":
            raise SealRefused("stage2", f"{door!r:.40} answered {answer!r:.40}, expected EPERM")
    return {str(door): str(answer) for door, answer in found.items()}


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Turn a wish that cannot be met into the refusal of its layer."""
    try:
        yield
    except PlanError as error:
        raise SealRefused(error.layer, str(error)) from error


# -- a process behind a channel -------------------------------------------------------------------


class Process:
    """A launcher that was told `plan`, and what it becomes."""

    def __init__(
        self, plan: Plan, *, stderr_cap: int, deadline_s: float, leaked: tuple[int, ...] = ()
    ) -> None:
        self.plan = plan
        self.deadline = time.monotonic() + deadline_s
        self.deadline_s = deadline_s
        self._ended: dict[str, Any] | None = None
        self._pidfd = -1
        self.pid = 0
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
            self.send(channel.PLAN, json.dumps(plan).encode())
            self._meet()
        except BaseException:
            self.kill()
            raise

    def _meet(self) -> None:
        """Learn the host pid of the sealed process and take a handle that cannot be reused."""
        frame = self.expect(channel.ALIVE)
        pid = int(frame.payload)
        wanted = self._popen.pid if self.plan["namespaces"] else os.getpid()
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
            found = _json(frame.payload)
            name = str(found.get("layer", ""))
            known = name if f"enclave.{name}" in CODES else "start"
            raise SealRefused(known, f"{found.get('message', '')!s:.2000}")
        raise program_error(frame, self.words())

    def refusal(self, error: ChannelError) -> AirgapError:
        """Turn a broken channel into what it means for the caller, and end the process."""
        end = self.kill()
        words = self.words()
        tail = f"; its last words: {words[-400:]!r}" if words else ""
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
                f"the sealed process ended early ({_how(end)}){tail}",
                hint="run it again; if it ends again, look at the model and at the memory limit",
            )
        return SealRefused("channel", f"{error} ({error.kind}){tail}")

    def verify(
        self, facts: HostSurvey, *, own_filters: int, dumpable: bool | None
    ) -> evidence.Facts:
        """Read /proc and compare with the plan; SealRefused names the first difference."""
        try:
            found = self._settled()
        except OSError as error:
            raise SealRefused("evidence", f"the process is gone: {error}") from error
        findings = evidence.verify(
            found,
            self.plan,
            own_filters=own_filters,
            dumpable=dumpable,
            host=evidence.own_namespaces(),
            uid=self.uid_seen(facts),
        )
        if findings:
            raise SealRefused(findings[0].layer, "; ".join(f.message for f in findings)[:2000])
        if found.session != self._popen.pid:
            raise SealRefused("parent", "the process shares a session, and its terminal's signals")
        if self.plan["namespaces"]:
            self._verify_parent(facts)
        return found

    def _settled(self) -> evidence.Facts:
        """Read the facts; the kernel counts a closed socket of the launcher an instant longer."""
        until = time.monotonic() + _GRACE_S
        while True:
            found = evidence.read(self.pid)
            if not self.plan["namespaces"] or not found.sockets or time.monotonic() > until:
                return found
            time.sleep(0.001)

    def _verify_parent(self, facts: HostSurvey) -> None:
        """Look at the process that waits outside: it seals itself, an instant later."""
        until = time.monotonic() + _GRACE_S
        while True:
            try:
                found = evidence.read(self._popen.pid)
            except OSError as error:
                raise SealRefused("parent", f"the waiting parent is gone: {error}") from error
            if found.seccomp and found.filters == evidence.inherited_filters() + 1:
                break
            if time.monotonic() > until:
                raise SealRefused("parent", "the waiting parent has taken no filter")
            time.sleep(0.001)
        whole = (found.uids[1], found.no_new_privs, found.capabilities["prm"], found.descriptors)
        if whole[:3] != (self.uid_seen(facts), 1, "0") or whole[3]:
            raise SealRefused("parent", f"the waiting parent is not sealed: {whole}")

    def uid_seen(self, facts: HostSurvey) -> int:
        """Return the uid that /proc shows: in a user namespace it stays the starter's."""
        identity = self.plan["identity"]
        return facts.uid if identity is None else identity[0]

    def verify_filters(self, facts: HostSurvey, last: bytes) -> bool | None:
        """Compare the live filters with the built ones, where the broker may look."""
        live = evidence.live_filters(self.pid, [filters.stage1(facts.arch), last], facts)
        if live is False:
            raise SealRefused(
                "stage2", "the filters of the live process are not the published ones"
            )
        return live

    def words(self) -> str:
        """Return what the process wrote to its error pipe, cut, control characters replaced."""
        return re.sub(r"[^\x20-\x7e\n]", "?", self._stderr.content().decode(errors="replace"))

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._ended is None and self._popen.poll() is None

    def finish(self, grace_s: float = _GRACE_S) -> dict[str, Any]:
        """Close the channel, let the process end by itself, then kill it; returns how it ended."""
        if self._ended is None:
            self._close_ends()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        return self.kill()

    def kill(self) -> dict[str, Any]:
        """End the process now and return how it ended; later calls return the same."""
        if self._ended is not None:
            return self._ended
        if self._pidfd >= 0 and self._popen.poll() is None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_GRACE_S)  # the waiting parent passes the end on
        if self._popen.poll() is None:
            self._popen.kill()
        status = self._popen.wait()
        self._close_ends()
        self._stderr.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._ended = exit_of(status)
        return self._ended

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
    """Read an exit status of the launcher: it passes a signal of the worker on as 128 + number."""
    number = -status if status < 0 else status - SIGNAL_BASE if status > SIGNAL_BASE else None
    return {"status": None if number else status, "signal": number}


def _how(end: dict[str, Any]) -> str:
    if end["signal"]:
        with contextlib.suppress(ValueError):
            return signal.Signals(end["signal"]).name
        return f"signal {end['signal']}"
    if end["status"] == LOAD_STATUS:
        return "the program did not load"
    return f"exit status {end['status']}"


def program_error(frame: Frame, words: str) -> AirgapError:
    """Turn an error frame into ours: a typed refusal keeps its code, anything else is a fault."""
    found = _json(frame.payload)
    code, message = str(found.get("code", "")), str(found.get("message", ""))
    limit = channel.ERROR_TEXT_LIMIT
    room = code.partition(".")[0]
    if frame.kind == channel.ERROR and code in CODES and room in _PROGRAM_ROOMS:
        return RefusedError(code, message[:limit], hint=str(found.get("hint", ""))[:limit])
    tail = f"; its last words: {words[-400:]!r}" if words else ""
    return FaultError(
        "enclave.program",
        f"the sealed program failed: {message[:limit]}{tail}",
        hint="the request was not answered; nothing left the seal",
    )


# -- the worker -----------------------------------------------------------------------------------


class Enclave:
    """A sealed, proven, running program. Requests go one at a time."""

    def __init__(
        self, process: Process, sealed: evidence.Facts, document: dict[str, Any], spec: SealSpec
    ) -> None:
        self.evidence = document
        self._process = process
        self._sealed = sealed
        self._spec = spec
        self._lock = threading.Lock()
        self._request = 0
        self._verified = time.monotonic()
        self._exit: dict[str, Any] | None = None
        self._incident: str | None = None
        weakref.finalize(self, process.kill)  # forgotten or not, it ends with this object

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def rung(self) -> str:
        """The rung that was reached."""
        return str(self.evidence["rung"])

    @property
    def pid(self) -> int:
        """The worker's pid on the host."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while requests can be sent."""
        return self._exit is None and self._process.alive

    def request(self, payload: bytes, timeout: float, *, total_s: float | None = None) -> bytes:
        """Send one request and return the reply; parts on the way are dropped.

        Args:
            payload: The request.
            timeout: Seconds without any frame after which the worker is killed.
            total_s: Seconds for the whole request; None for no limit beside `timeout`.

        Raises:
            RefusedError: The program refused, with a code of its own.
            FaultError: The program failed, or the worker died or broke the protocol.

        """
        reply = b""
        for frame in self.stream(payload, timeout, total_s=total_s):
            reply = frame.payload
        return reply

    def stream(
        self, payload: bytes, timeout: float, *, total_s: float | None = None
    ) -> Iterator[Frame]:
        """Send one request and yield its frames: parts (`is_part`), then the reply. See `request`.

        A caller that stops before the reply ends the worker: it cannot be told to be silent.
        """
        if len(payload) > self._spec.caps.request_bytes:
            raise RefusedError(
                "enclave.channel",
                f"the request has {len(payload)} bytes, the cap is {self._spec.caps.request_bytes}",
                hint="send less at a time",
            )
        with self._lock:
            if time.monotonic() - self._verified > _REVERIFY_S:
                self.reverify()
            if self._exit is not None:
                raise FaultError("enclave.worker", "the worker has ended", hint="start a new one")
            done = False
            try:
                for frame in self._exchange(payload, timeout, total_s):
                    done = frame.kind != channel.PART
                    if frame.kind in (channel.ERROR, channel.FAULT):
                        raise program_error(frame, self._process.words())
                    yield frame
            except ChannelError as error:
                raise self._broken(error) from error
            finally:
                if not done:
                    self._end(kill=True)

    def _exchange(self, payload: bytes, timeout: float, total_s: float | None) -> Iterator[Frame]:
        self._request = number = (self._request + 1) & 0xFFFFFFFF
        last = float("inf") if total_s is None else time.monotonic() + total_s
        caps = self._spec.caps
        self._process.writer.write(
            channel.encode(channel.REQUEST, payload, number),
            deadline=min(last, time.monotonic() + timeout),
        )
        kinds = (channel.PART, channel.REPLY, channel.ERROR, channel.FAULT)
        received = 0
        while True:
            frame = self._process.reader.read(
                kinds,
                cap=caps.frame_bytes,
                deadline=min(last, time.monotonic() + timeout),
                request=number,
            )
            received += len(frame.payload) + channel.HEAD.size
            if received > caps.reply_bytes:
                raise ChannelError(
                    "over", f"one request brought more than {caps.reply_bytes} bytes"
                )
            yield frame
            if frame.kind != channel.PART:
                return

    def _broken(self, error: ChannelError) -> AirgapError:
        """End the worker after a broken exchange and say why."""
        document = self._end(kill=error.kind != "closed")
        if document["incident"]:
            return FaultError(
                "enclave.incident",
                "the worker made a call that its seal kills for (SIGSYS); it was not answered",
                hint="treat the model as hostile; the exit record holds the facts",
            )
        reason = {
            "late": "no frame came in time",
            "closed": f"the worker died ({_how(document)})",
        }.get(error.kind, str(error))
        return FaultError(
            "enclave.worker",
            f"{reason}; the worker was ended",
            hint="start a new worker; a request that ends it again is not answered",
        )

    def reverify(self) -> None:
        """Read /proc again and compare with the seal; a difference ends the worker.

        Raises:
            SealRefused: Something changed; the exit record says what.

        """
        self._verified = time.monotonic()
        if self._exit is not None:
            raise FaultError("enclave.worker", "the worker has ended", hint="start a new one")
        try:
            findings = evidence.differences(self._sealed, evidence.read(self._process.pid))
        except OSError as error:
            findings = [evidence.Finding("evidence", f"the worker is gone: {error}")]
        if findings:
            self._incident = "; ".join(finding.message for finding in findings)
            self._end(kill=True)
            raise SealRefused(findings[0].layer, self._incident)

    def close(self) -> dict[str, Any]:
        """End the worker and return the exit record; safe to call again."""
        return self._end(kill=False)

    def _end(self, *, kill: bool) -> dict[str, Any]:
        if self._exit is None:
            end = self._process.kill() if kill else self._process.finish()
            incident = self._incident or ("SIGSYS" if end["signal"] == signal.SIGSYS else None)
            self._exit = {
                "type": "enclave.exit",
                "ts": evidence.utc(),
                "mono_ns": time.monotonic_ns(),
                "seq": 2,
                "prev": evidence.digest_of(self.evidence),
                "pid": self._process.pid,
                "requests": self._request,
                "denied_calls": None,
                "incident": incident,
                **end,
            }
        return self._exit


# -- starting processes ---------------------------------------------------------------------------


class _Drain:
    """Reads an error pipe to its end and keeps the first bytes."""

    def __init__(self, popen: subprocess.Popen[bytes], cap: int) -> None:
        self._popen = popen
        self._cap = cap
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, name="enclave-stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        pipe = self._popen.stderr
        if pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):
            while part := os.read(pipe.fileno(), 1 << 16):
                self._kept += part[: max(0, self._cap - len(self._kept))]

    def content(self) -> bytes:
        """Return what was kept so far."""
        return bytes(self._kept)

    def close(self) -> None:
        """Wait for the end of the pipe, which comes with the end of the process."""
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
        threading.Thread(target=self._run, name="enclave-spawner", daemon=True).start()

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
