"""The broker's side: start a process and prove its seal (docs/design/enclave.md, 3 and 7).

`launch` returns a worker whose every layer was found on the host, or raises. There is no flag and
no variable that makes it return anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from airgap.enclave import channel, evidence, filters, host, reading, twin
from airgap.enclave import plan as plans
from airgap.enclave.denials import LAST_DOOR, Denials
from airgap.enclave.host import HostSurvey
from airgap.enclave.plan import Plan
from airgap.enclave.process import Process, json_object, planning
from airgap.enclave.refused import SealRefused
from airgap.enclave.sealed import Enclave, OnEnd
from airgap.enclave.spec import SealSpec

T = TypeVar("T")
Make = Callable[[str, Sequence[dict[str, str]], dict[str, Any]], T]
# Layers whose absence is a fact of the host; the next rung does without them.
_OF_RUNG_A = frozenset({"namespaces", "root"})


def launch(spec: SealSpec, on_end: OnEnd | None = None) -> Enclave:
    """Start `spec.program` inside the seal and return it once every layer is proven.

    Args:
        spec: What to seal.
        on_end: Called once with the exit record, as soon as the process has ended.

    Raises:
        SealRefused: Code `enclave.<layer>`; nothing is left running.
        RefusedError: The program refused to load, with a code of its own.
        FaultError: The program failed to load.

    """
    facts = host.survey()

    def make(rung: str, tried: Sequence[dict[str, str]], report: dict[str, Any]) -> Enclave:
        return start(rung, spec, facts, tried=tried, probe=report, on_end=on_end)

    return climb(spec, facts, make)


def climb(spec: SealSpec, facts: HostSurvey, make: Make[T]) -> T:
    """Return what `make` builds on the best rung that the probe proves, or raise.

    Raises:
        SealRefused: No rung that `spec` allows can be had; the message says why for each.

    """
    min_rung = spec.min_rung or host.default_min_rung(facts)
    rungs, left_out = host.candidate_rungs(facts, min_rung)
    for rung in [rung for rung in rungs if not plans.runs_on(spec.profile, rung)]:
        rungs.remove(rung)
        left_out[rung] = f"profile {spec.profile} does not run on it"
    tried = [{"rung": rung, "reason": reason} for rung, reason in sorted(left_out.items())]
    if spec.rung is not None:
        if spec.rung not in rungs:
            why = left_out.get(spec.rung, "there is no such rung")
            raise _no_rung(f"rung {spec.rung} cannot be had on this host: {why}", facts, tried)
        rungs = [spec.rung]
    for rung in rungs:
        try:
            report = twin.probe_rung(
                rung, spec.uid, facts, spec.state, profile=spec.profile, driver=spec.driver
            )
            twin.require_sealed(report)
            return make(rung, tried, report)
        except SealRefused as refused:
            refused.facts = facts
            refused.tried = tried
            if refused.layer not in _OF_RUNG_A or rung == rungs[-1]:
                raise
            tried.append({"rung": rung, "reason": f"{refused.code}: {refused.message}"})
    words = {entry["reason"] for entry in tried if entry["rung"] in host.allowed_rungs(min_rung)}
    reasons = "; ".join(f"{entry['rung']}: {entry['reason']}" for entry in tried)
    if len(words) == 1:
        reasons = words.pop()  # one reason for all: say it once
    raise _no_rung(f"this host reaches no rung from {min_rung} up ({reasons})", facts, tried)


def _no_rung(message: str, facts: HostSurvey, tried: list[dict[str, str]]) -> SealRefused:
    refusal = SealRefused("rung", message)
    refusal.facts, refusal.tried = facts, tried
    return refusal


def plan_for(rung: str, spec: SealSpec, facts: HostSurvey, *, part: str = "worker") -> Plan:
    """Return the plan of a process of `spec` on `rung`; `part` is what `entry.py` runs inside."""
    read_only = [os.path.abspath(path) for path in spec.read_only]  # noqa: PTH100 - symbolic links stay
    environment = plans.built_environment(threads=spec.caps.threads)
    with planning():
        plans.require_silent(facts.telemetry, environment)
        plans.require_inputs(read_only)
        memory = spec.caps.memory_mb or 4096 + 3 * plans.folder_bytes(read_only) // (1 << 20)
        return plans.build(
            facts,
            rung=rung,
            profile=spec.profile,
            part=part,
            read_only=read_only,
            writable=(),
            environment=environment,
            memory_mb=memory,
            descriptors=spec.caps.descriptors,
            file_mb=0,
            uid=spec.uid,
            devices=spec.driver.devices,
        )


def start(
    rung: str,
    spec: SealSpec,
    facts: HostSurvey,
    *,
    tried: Sequence[dict[str, str]] = (),
    probe: dict[str, Any] | None = None,
    leaked: tuple[int, ...] = (),
    on_end: OnEnd | None = None,
) -> Enclave:
    """Start and verify a worker on `rung`; `launch` has the probe's word before it calls this.

    `leaked` are descriptors that the twin of the probe hands to its launcher on purpose.
    """
    denials = Denials()
    process = None
    try:
        process = Process(
            lambda: plan_for(rung, spec, facts),
            stderr_cap=spec.caps.stderr_bytes,
            deadline_s=spec.deadline_s,
            leaked=leaked,
        )
        plan = process.plan
        request = {
            "program": spec.program,
            "config": spec.config,
            "request_cap": spec.caps.request_bytes,
            "window": spec.caps.frame_bytes if spec.caps.in_flight > 1 else 0,
            "stage2": plan["last"],
            "cuda": spec.driver.library if plan["last"] == "stage2_gpu" else None,
        }
        process.send(channel.PROGRAM, json.dumps(request).encode())
        process.look_at_parent(facts)
        frame = process.expect(channel.LOADED)
        said = json_object(frame.payload)
        sealed, document = prove(process, spec, facts, tried=tried, probe=probe, said=said)
        denials.settle(process.pid, LAST_DOOR)
    except BaseException:
        denials.close()
        if process is not None:
            process.kill()
        raise
    return Enclave(process, sealed, document, spec, facts=facts, denials=denials, on_end=on_end)


def prove(
    process: Process,
    spec: SealSpec,
    facts: HostSurvey,
    *,
    tried: Sequence[dict[str, str]],
    probe: dict[str, Any] | None,
    said: dict[str, Any],
) -> tuple[reading.Facts, dict[str, Any]]:
    """Take a loaded process through its last filter; returns the last facts and the evidence.

    `said` is what the program reports of itself: its part of the artifacts.
    """
    plan = process.plan
    loaded = process.verify(facts, own_filters=1, dumpable=None)
    process.send(channel.SEAL, b"")
    ready = process.expect(channel.READY)
    sealed = process.verify(facts, own_filters=2, dumpable=False)
    stage2 = filters.last(plan["last"], sealed.pid_inside, facts.arch)
    live = process.verify_filters(facts, stage2)
    document = evidence.seal_document(
        facts,
        plan,
        loaded,
        sealed,
        policy=policy_of(spec, plan["rung"]),
        live=live,
        last_filter=stage2,
        artifacts={
            **library_of(facts),
            **spec.artifacts,
            "program": said.get("program"),
            "gpu": said.get("gpu"),
        },
        tried=tried,
        probe=None if probe is None else twin.summary(probe),
        self_test=_self_test(ready.payload, plan),
        host=reading.own_namespaces(),
    )
    return sealed, document


def policy_of(spec: SealSpec, rung: str) -> dict[str, Any]:
    """Return what was asked for, with a digest of it."""
    wanted = {
        "min_rung": spec.min_rung or rung,
        "gpu": spec.profile == "worker-gpu",
        "profile": spec.profile,
        "program": spec.program,
        "caps": asdict(spec.caps),
        "read_only": [str(path) for path in spec.read_only],
    }
    content = json.dumps(wanted, sort_keys=True, separators=(",", ":")).encode()
    return {**wanted, "sha256": hashlib.sha256(content).hexdigest()}


def library_of(facts: HostSurvey) -> dict[str, Any]:
    """Return what is known of onnxruntime."""
    return {
        "onnxruntime": facts.onnxruntime,
        "ort_telemetry": "disabled" if facts.telemetry else "absent",
    }


def _self_test(payload: bytes, plan: Plan) -> dict[str, str]:
    """Every door that the worker tried after stage 2 must have answered EPERM.

    With a GPU files may be opened: that of the door is not there, or Landlock closes it.
    """
    found = json_object(payload).get("self_test")
    if not isinstance(found, dict) or not found:
        raise SealRefused("stage2", "the worker reported no self-test")
    for door, answer in found.items():
        if door == "open" and plan["last"] == "stage2_gpu" and answer in {"ENOENT", "EACCES"}:
            continue
        if answer != "EPERM":
            raise SealRefused("stage2", f"{door!r:.40} answered {answer!r:.40}, expected EPERM")
    return {str(door): str(answer) for door, answer in found.items()}
