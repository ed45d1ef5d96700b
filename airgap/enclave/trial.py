"""Runs an auditor's own program in exactly the seal of the worker (docs/design/enclave.md, 7).

The plan, the launcher, the filters and the checks are those of a worker; only the last word of the
command line differs. The broker has compared /proc with the plan before the first line of the probe
runs, looks again while it runs, and once more at its end. How the probe ended is a result and not
an error: the seal is refused, and raised, only while it is being built.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import channel, evidence, host, reading, twin
from airgap.enclave.channel import ChannelError, Frame
from airgap.enclave.denials import LAST_DOOR, LAST_OF_STAGE1, Denials
from airgap.enclave.guest import SOURCE_LIMIT
from airgap.enclave.host import HostSurvey
from airgap.enclave.launcher import HIGH_STATUS
from airgap.enclave.plan import Plan
from airgap.enclave.process import Process, json_object
from airgap.enclave.refused import SealRefused
from airgap.enclave.seal import climb, library_of, plan_for, policy_of, prove
from airgap.enclave.spec import SealSpec
from policy.errors import RefusedError

STAGES = (1, 2)
OUTPUT_LIMIT = 1 << 20  # bytes of output that are kept
MEMORY_MB = 1024
_ADDRESS_MB = 2048
_LOOK_S = 0.5
_REQUEST = 1
_REPLY_LIMIT = 1 << 16
_ABOVE = 256  # an exit status is a byte
# What the probe itself may say of its end; anything else is not believed to be an answer.
_SAID = frozenset({"returned", "exited", "raised", "syntax", "memory"})
# A program may open files, spend its dump flag and add filters of its own before stage 2.
_OWN_BEFORE_STAGE2 = frozenset({"descriptors", "dumpable", "filters"})
_CODES = {
    "raised": "enclave.program",
    "syntax": "enclave.program",
    "memory": "enclave.program",
    "signal": "enclave.worker",
    "incident": "enclave.incident",
    "deadline": "enclave.deadline",
    "channel": "enclave.channel",
}


@dataclass(frozen=True, slots=True)
class ProbeFile:
    """The source of a probe as it was read, once."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Its digest, which stands in the evidence."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class Trial:
    """How a probe ended, and what the host saw of its seal.

    Attributes:
        verdict: `SEALED/A`: every look found the seal whole. `REFUSED/A`: the probe ended before
            stage 2, or left what no worker may have. `BROKEN/A`: a look found a difference.
            `NO CLAIM/C`: rung C claims nothing before stage 2.
        outcome: returned, exited, raised, syntax, memory, signal, incident, deadline, channel,
            refused or broken.
        code: Stable code; empty where the probe ended by itself and the seal held.
        message: The outcome in words.
        status: Exit status, where there is one.
        signal: The signal that ended it, where one did.
        output: The first bytes that it printed.
        output_bytes: How many bytes it printed in all.
        seconds: From the start of the launcher to the end of the probe.
        looks: How often the host was asked.
        denied: Calls that the filters denied, from the kernel's records.
        evidence: The record of the seal, as of a worker.

    """

    verdict: str
    outcome: str
    code: str
    message: str
    status: int | None
    signal: int | None
    output: bytes
    output_bytes: int
    seconds: float
    looks: int
    denied: dict[str, Any]
    evidence: dict[str, Any]

    def as_document(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        return {
            "verdict": self.verdict,
            "outcome": self.outcome,
            "code": self.code,
            "message": self.message,
            "status": self.status,
            "signal": self.signal,
            "output": self.output.decode("utf-8", errors="backslashreplace"),
            "output_bytes": self.output_bytes,
            "output_cut": self.output_bytes > len(self.output),
            "seconds": round(self.seconds, 3),
            "looks": self.looks,
            "denied": self.denied,
            "evidence": self.evidence,
        }


def read_probe(path: Path) -> ProbeFile:
    """Read the file of a probe: a plain file, not through a link, of a bounded size.

    Raises:
        RefusedError: `enclave.probe_file`.

    """
    try:
        # O_NONBLOCK: a FIFO without a writer must not hang us.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        descriptor = os.open(path, flags)
    except OSError as error:
        words = "it is a symbolic link" if path.is_symlink() else str(error.strerror)
        raise _no_probe(path, words) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _no_probe(path, f"it is no plain file ({stat.filemode(mode)})")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(SOURCE_LIMIT + 1)
    if len(content) > SOURCE_LIMIT:
        raise _no_probe(path, f"it is larger than {SOURCE_LIMIT} bytes")
    return ProbeFile(path.name, content)


def _no_probe(path: Path, why: str) -> RefusedError:
    return RefusedError(
        "enclave.probe_file",
        f"{str(path)!r:.300} is no probe: {why}",
        hint="give one plain Python file; docs/auditor.md shows what it may hold",
    )


def run_trial(probe: ProbeFile, spec: SealSpec, *, stage: int = 2) -> Trial:
    """Run `probe` in the seal of `spec` and return how it ended.

    Args:
        probe: What to run.
        spec: The seal: profile, rung, limits; its `deadline_s` bounds start and run together.
        stage: 1 runs it after the first filter; 2 loads it before the second and runs it after.

    Raises:
        SealRefused: The seal could not be built; no line of the probe has run.

    """
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage}")
    facts = host.survey()

    def make(rung: str, tried: Sequence[dict[str, str]], report: dict[str, Any]) -> Trial:
        attempt = _Attempt(probe, spec, facts, stage, rung, tried=tried, report=report)
        return attempt.run()

    return climb(spec, facts, make)


class _BrokenError(Exception):
    """A look found the seal changed."""

    def __init__(self, finding: evidence.Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class _Attempt:
    """One run of a probe on one rung."""

    def __init__(
        self,
        probe: ProbeFile,
        spec: SealSpec,
        facts: HostSurvey,
        stage: int,
        rung: str,
        *,
        tried: Sequence[dict[str, str]],
        report: dict[str, Any],
    ) -> None:
        self._probe, self._spec, self._facts = probe, spec, facts
        self._stage, self._rung = stage, rung
        self._tried, self._report = tried, report
        self._looks = 0
        self._sealed = False  # the last filter of this stage is in
        self._denials = Denials()
        self._started = time.monotonic()
        try:
            self._process = Process(
                self._plan, stderr_cap=spec.caps.stderr_bytes, deadline_s=spec.deadline_s
            )
        except BaseException:
            self._denials.close()
            raise

    def _plan(self) -> Plan:
        plan = plan_for(self._rung, self._spec, self._facts, part="guest")
        # Shared memory counts as address space alone, of which a model needs more than a probe.
        address = (self._spec.caps.memory_mb + _ADDRESS_MB) << 20
        plan["limits"]["AS"] = min(plan["limits"]["AS"], address)
        return plan

    def run(self) -> Trial:
        """Build the seal, hand the probe in, watch it, end it."""
        process = self._process
        try:
            process.expect(channel.LOADED)
            self._before = process.verify(self._facts, own_filters=1, dumpable=None)
            self._evidence = self._stage1_document()
            self._denials.settle(process.pid, LAST_OF_STAGE1)
            try:
                ended = self._exchange()
            except SealRefused as refused:
                ended = {"outcome": "refused", "code": refused.code, "error": refused.message}
            except _BrokenError as broken:
                code = f"enclave.{broken.finding.layer}"
                ended = {"outcome": "broken", "code": code, "error": str(broken)}
            except ChannelError as error:
                ended = self._broken_channel(error)
            return self._result(ended)
        finally:
            process.kill()
            self._denials.close()

    def _exchange(self) -> dict[str, Any]:
        """Run the probe; returns what it says of its end."""
        process = self._process
        request = {
            "stage": self._stage,
            "stage2": process.plan["last"],
            "name": self._probe.name,
            "source": self._probe.content.hex(),
            "request": _REQUEST,
        }
        self._send(channel.PROGRAM, json.dumps(request).encode())
        if self._stage == 1:
            self._sealed = True
        else:
            frame = self._next(channel.LOADED)
            if frame.kind == channel.FAULT:
                return self._said(frame)
            self._before, self._evidence = prove(
                process,
                self._spec,
                self._facts,
                tried=self._tried,
                probe=self._report,
                said={"program": self._program()},
            )
            self._evidence["stage"] = 2
            self._sealed = True
            self._denials.settle(process.pid, LAST_DOOR)
            self._send(channel.REQUEST, b"")
        said = self._said(self._next(channel.REPLY))
        self._look()
        return said

    def _send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame; a probe that does not read is late, one that is gone has closed."""
        self._process.writer.write(
            channel.encode(kind, payload, _REQUEST), deadline=self._process.deadline
        )

    def _next(self, kind: bytes) -> Frame:
        """Wait for a frame and look at the host meanwhile."""
        process = self._process
        while not process.reader.ready(min(_LOOK_S, process.deadline - time.monotonic())):
            if time.monotonic() > process.deadline:
                raise ChannelError("late", "the probe did not end in time")
            self._look()
        return process.reader.read(
            (kind, channel.FAULT), cap=_REPLY_LIMIT, deadline=process.deadline
        )

    def _look(self) -> None:
        """Read /proc and compare with the first reading; a process that is gone says so itself."""
        try:
            now = reading.read(self._process.pid)
        except OSError:
            return
        self._looks += 1
        self._denials.poll()
        own = frozenset() if self._complete else _OWN_BEFORE_STAGE2
        findings = evidence.differences(self._before, now, leave_out=own)
        if findings and not self._process.dies():
            raise _BrokenError(findings[0])

    @property
    def _complete(self) -> bool:
        return self._stage == 2 and self._sealed  # noqa: PLR2004 - the number of the stage

    def _said(self, frame: Frame) -> dict[str, Any]:
        """Read what the probe says of its end: its word, cut, and of a closed list."""
        try:
            found = json_object(frame.payload)
        except SealRefused as error:
            raise ChannelError("unknown", error.message) from error
        status = found.get("status")
        outcome = found.get("outcome") if frame.kind == channel.REPLY else "raised"
        named = isinstance(outcome, str) and outcome in _SAID
        if not named or not (status is None or (isinstance(status, int) and 0 <= status < _ABOVE)):
            raise ChannelError("unknown", f"the reply is none: {frame.payload[:80]!r}")
        words = str(found.get("error") or found.get("message") or "")
        return {"outcome": outcome, "status": status, "error": words[: channel.ERROR_TEXT_LIMIT]}

    def _broken_channel(self, error: ChannelError) -> dict[str, Any]:
        """Say why there was no reply."""
        if error.kind == "late":
            words = f"it did not end within {self._spec.deadline_s:g} s"
            return {"outcome": "deadline", "error": words}
        if error.kind != "closed":
            return {"outcome": "channel", "error": f"{error} ({error.kind})"}
        end = self._process.finish()
        if self._process.was_killed:
            words = "it closed the channel and went on; it was ended"
            return {"outcome": "channel", "error": words}
        number = end["signal"]
        if number == signal.SIGSYS:
            words = "it made a call that the seal kills for (SIGSYS)"
            return {"outcome": "incident", "error": words}
        if number is not None:
            return {"outcome": "signal", "error": f"it died of signal {number}"}
        words = "128 or above" if end["status"] == HIGH_STATUS else ""
        return {"outcome": "exited", "status": end["status"], "error": words}

    def _result(self, ended: dict[str, Any]) -> Trial:
        end = self._process.kill()
        seconds = time.monotonic() - self._started
        outcome = str(ended["outcome"])
        output, total = self._process.printed()
        by_itself = outcome in {"signal", "incident"}
        return Trial(
            verdict=self._verdict(outcome),
            outcome=outcome,
            code=ended.get("code") or _CODES.get(outcome, ""),
            message=str(ended["error"]),
            status=ended.get("status"),
            signal=end["signal"] if by_itself else None,
            output=output,
            output_bytes=total,
            seconds=seconds,
            looks=self._looks,
            denied=self._denials.result(),
            evidence=self._evidence,
        )

    def _verdict(self, outcome: str) -> str:
        if outcome == "broken":
            return f"BROKEN/{self._rung}"
        if not self._sealed or outcome == "refused":
            return f"REFUSED/{self._rung}"
        if self._rung == "C" and self._stage == 1:
            return "NO CLAIM/C"
        return f"SEALED/{self._rung}"

    def _program(self) -> dict[str, Any]:
        return {"probe": self._probe.name, "sha256": self._probe.sha256, "stage": self._stage}

    def _stage1_document(self) -> dict[str, Any]:
        """Return the evidence of a process that has taken the first filter and no other."""
        process, plan = self._process, self._process.plan
        live = process.verify_filters(self._facts, None)
        document = evidence.seal_document(
            self._facts,
            plan,
            self._before,
            self._before,
            policy=policy_of(self._spec, self._rung),
            live=live,
            last_filter=b"",
            artifacts={**library_of(self._facts), "program": self._program()},
            tried=self._tried,
            probe=twin.summary(self._report),
            self_test={},
            host=reading.own_namespaces(),
        )
        kept = ("s1", "live_dump_match")
        document["seccomp"] = {name: document["seccomp"][name] for name in kept}
        return {**document, "stage": 1, "verdict": "STAGE 1"}
