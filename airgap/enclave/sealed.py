"""A sealed process at work: talk to it, look at its seal again, and say how it ended.

Obeys docs/design/enclave.md, 3 and 7. The seal is looked at before each request and on a timer; a
difference ends the process, and what it was asked is not answered.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from airgap.enclave import channel, evidence, filters, reading, twin
from airgap.enclave.calls import Calls
from airgap.enclave.channel import ChannelError, Frame
from airgap.enclave.denials import Denials
from airgap.enclave.evidence import Finding
from airgap.enclave.host import HostSurvey
from airgap.enclave.process import Process, how, program_error, start_thread
from airgap.enclave.refused import SealRefused
from airgap.enclave.spec import SealSpec
from policy.errors import AirgapError, FaultError, RefusedError

OnEnd = Callable[[dict[str, Any]], None]
_UNLOCK_S = 5.0
_FULL_LOOK_S = 1.0
_probing = threading.Lock()


class Enclave:
    """A sealed, proven, running program.

    Requests go one at a time, or `Caps.in_flight` at once at a program that takes several.
    """

    def __init__(
        self,
        process: Process,
        sealed: reading.Facts,
        document: dict[str, Any],
        spec: SealSpec,
        *,
        facts: HostSurvey,
        denials: Denials,
        on_end: OnEnd | None = None,
    ) -> None:
        self.evidence = document
        self._process = process
        self._sealed = sealed
        self._spec = spec
        self._facts = facts
        self._denials = denials
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ending = threading.RLock()  # the timer and a caller may meet here
        self._request = 0
        self._looked = time.monotonic()
        self._exit: dict[str, Any] | None = None
        self._incident: Finding | None = None
        self._closing = threading.Event()
        weakref.finalize(self, process.kill)  # forgotten or not, it ends with this object
        self._calls = Calls(process, spec.caps) if spec.caps.in_flight > 1 else None
        if spec.reverify_s > 0:
            watched = weakref.ref(self), self._closing, spec.reverify_s
            start_thread(_watch, "enclave-watch", watched)

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

        A caller that stops before the reply cancels the request at a program that takes several,
        and ends any other: it cannot be told to be silent.
        """
        if len(payload) > self._spec.caps.request_bytes:
            raise RefusedError(
                "enclave.channel",
                f"the request has {len(payload)} bytes, the cap is {self._spec.caps.request_bytes}",
                hint="send less at a time",
            )
        if self._calls is not None:
            yield from self._together(self._calls, payload, timeout, total_s)
            return
        with self._lock:
            self._require(self._glance())
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

    def _together(
        self, calls: Calls, payload: bytes, timeout: float, total_s: float | None
    ) -> Iterator[Frame]:
        """Send one request beside others; the lock covers the look alone."""
        with self._lock:
            self._require(self._glance())
        try:
            with contextlib.closing(calls.stream(payload, timeout, total_s)) as frames:
                for frame in frames:
                    if frame.kind in (channel.ERROR, channel.FAULT):
                        raise program_error(frame, self._process.words())
                    yield frame
        except ChannelError as error:
            raise self._broken(error) from error

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
        if self._incident is not None:
            return self._different()
        if document["incident"]:
            return _forbidden_call()
        reason = {
            "late": "no frame came in time",
            "closed": f"the worker died ({how(document)})",
        }.get(error.kind, str(error))
        return FaultError(
            "enclave.worker",
            f"{reason}; the worker was ended",
            hint="start a new worker; a request that ends it again is not answered",
        )

    def reverify(self, *, twin_too: bool = False) -> None:
        """Read the host's facts again and compare with the seal; a difference ends the worker.

        Args:
            twin_too: Compare the live filters again where the broker may, and repeat the probe of
                the twin: what the timer does.

        Raises:
            SealRefused: Something changed; the exit record says what.
            FaultError: The worker has died.

        """
        findings = self._differences()
        if findings == [] and twin_too:
            findings = self._deeper()
        if findings == []:
            return
        if findings:
            self._incident = self._incident or findings[0]
        # A request in flight ends by the death of the worker, and gives the lock back.
        self._process.stop()
        locked = self._lock.acquire(timeout=_UNLOCK_S)
        try:
            self._require(findings)
        finally:
            if locked:
                self._lock.release()

    def _glance(self) -> list[Finding] | None:
        """Look before a request: at everything once a second, between that at the filters."""
        if time.monotonic() - self._looked > _FULL_LOOK_S:
            return self._differences()
        if self._exit is not None or not self._process.alive:
            return None
        try:
            found = evidence.glance(self._sealed)
        except OSError:
            return None
        return None if found and self._process.dies() else found

    def _differences(self) -> list[Finding] | None:
        """Return what has changed on the host; None when the worker is dead."""
        if self._exit is not None or not self._process.alive:
            return None
        try:
            self._looked = time.monotonic()
            found = evidence.differences(self._sealed, reading.read(self._process.pid))
        except OSError:
            return None
        self._denials.poll()
        return None if found and self._process.dies() else found

    def _deeper(self) -> list[Finding]:
        """Compare the live filters and repeat the twin, twice where it proved nothing."""
        last = filters.last(self._process.plan["last"], self._sealed.pid_inside, self._facts.arch)
        try:
            self._process.verify_filters(self._facts, last)
        except SealRefused as refused:
            return [Finding(refused.layer, refused.message)]
        for again in (False, True):
            try:
                twin.require_sealed(self._probe_again())
                break
            except SealRefused as refused:
                if again and not self._closing.is_set():
                    return [Finding(refused.layer, f"the twin probe: {refused.message}")]
        return []

    def _probe_again(self) -> dict[str, Any]:
        """Repeat the probe; workers of one process share a repetition."""
        with _probing:
            return twin.probe_rung(
                self.rung,
                self._spec.uid,
                self._facts,
                self._spec.state,
                older_than_s=self._spec.reverify_s / 2,
                profile=self._spec.profile,
                driver=self._spec.driver,
            )

    def _require(self, findings: list[Finding] | None) -> None:
        """Raise unless the worker lives and nothing has changed; it has ended then."""
        if findings == []:
            return
        if findings:
            self._incident = self._incident or findings[0]
            self._end(kill=True)
            raise self._different()
        said = self._exit is not None
        document = self._end(kill=True)
        if self._incident is not None and not said:
            raise self._different()
        if document["signal"] == signal.SIGSYS and not said:
            raise _forbidden_call()
        how_it_ended = "the worker has ended" if said else f"the worker died ({how(document)})"
        raise FaultError("enclave.worker", how_it_ended, hint="start a new one")

    def _different(self) -> SealRefused:
        finding = self._incident
        if finding is None:
            raise TypeError("no incident")
        return SealRefused(finding.layer, f"the seal changed while it served: {finding.message}")

    def give_up(self, reason: str) -> None:
        """End the worker because its seal can no longer be looked at."""
        self._incident = self._incident or Finding("evidence", reason)
        self._process.stop()
        with self._lock:
            self._end(kill=True)

    def close(self) -> dict[str, Any]:
        """End the worker and return the exit record; safe to call again."""
        return self._end(kill=False)

    def _end(self, *, kill: bool) -> dict[str, Any]:
        with self._ending:
            if self._exit is None:
                self._exit = self._exit_record(kill=kill)
                if self._on_end is not None:
                    self._on_end(self._exit)
            return self._exit

    def _exit_record(self, *, kill: bool) -> dict[str, Any]:
        self._closing.set()
        if self._calls is not None:
            if kill:
                self._process.stop()
            self._calls.close()
            self._request = self._calls.count
        end = self._process.kill() if kill else self._process.finish()
        incident = None if self._incident is None else self._incident.message
        if incident is None and end["signal"] == signal.SIGSYS:
            incident = "SIGSYS"
        denied = self._denials.result()
        self._denials.close()
        return {
            "type": "enclave.exit",
            "ts": evidence.utc(),
            "mono_ns": time.monotonic_ns(),
            "seq": 2,
            "prev": evidence.digest_of(self.evidence),
            "pid": self._process.pid,
            "requests": self._request,
            "denied_calls": denied["count"],
            "denied": denied,
            "incident": incident,
            **end,
        }


def _forbidden_call() -> FaultError:
    return FaultError(
        "enclave.incident",
        "the worker made a call that its seal kills for (SIGSYS); it was not answered",
        hint="treat the model as hostile; the exit record holds the facts",
    )


def _watch(owner: weakref.ref[Enclave], closing: threading.Event, every_s: float) -> None:
    """Re-verify on a timer until the enclave is closed or forgotten."""
    while not closing.wait(every_s):
        enclave = owner()
        if enclave is None:
            return
        try:
            enclave.reverify(twin_too=True)
        except AirgapError:
            return  # the worker has ended, and its exit record says why
        except Exception as error:  # noqa: BLE001 - a look that fails is no look
            enclave.give_up(f"re-verification failed: {type(error).__name__}: {error}")
            return
        del enclave
