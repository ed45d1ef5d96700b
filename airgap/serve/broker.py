"""One request from typed input to an answer with a receipt (docs/design/architecture.md, 4).

The order is the promise: prepare and screen the input in the sealed helper; ask the policy; make
the intent durable; let the sealed worker decode; assess and screen the output in the helper; ask
the policy again; make the outcome durable; only then answer. Whatever fails on the way closes the
intent with an outcome that says so, and nothing is released.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import structlog

from airgap.audit import Actor, DecisionRef, Event, Receipt, commitment, new_ulid
from airgap.audit.service import Log
from airgap.config import Limits
from airgap.enclave import Enclave
from airgap.enclave.channel import ProgramError
from airgap.holds import Hold, Holds, Stage, job_text
from airgap.inference import protocol
from airgap.inference.strict import MalformedError
from airgap.science import results
from airgap.science.results import Assessed, Prepared, ScreenResult
from airgap.science.tasks import choose_preset, find_task
from policy import report
from policy.approvals import Approval
from policy.engine import Decision, require
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

HELPER_S = 60.0  # seconds without a frame of the helper
WORKER_S = 120.0  # seconds without a progress frame of the worker
GRACE_S = 5.0  # for the worker's own word on its deadline
NONCE_BYTES = 32
SEED_BITS = 31  # short enough to type

log = structlog.get_logger("airgap.broker")

OnProgress = Callable[[int, int, int], None]  # tokens so far, samples finished, samples wanted


@dataclass(frozen=True, slots=True)
class Job:
    """What a person asks for: a task, what she has, and under which project."""

    task: str
    inputs: Mapping[str, Any]
    project: str
    options: Mapping[str, Any] = field(default_factory=dict)
    held: str = ""  # request of a released hold that this job takes up


@dataclass(frozen=True, slots=True)
class Model:
    """The installed model, as the broker names it in requests and records.

    `context` is what the helper must know of the checkpoint: `model`, `max_context`, `vocab_size`
    and `tags` by text, all from the sealed graph manifest.
    """

    id: str
    bundle: Digest
    name: str
    version: str
    precision: str
    context: Mapping[str, Any]
    reference_model: bool
    scientific_use: bool
    provider: str = "cpu"  # that was demanded of the worker


class UsePolicy(Protocol):
    """Asks the rules about one use; the facts of site, person and bundle are bound in it."""

    def __call__(
        self,
        job: Job,
        *,
        modality: str,
        screen: Mapping[str, Any] | None,
        released: tuple[Approval, ...] = (),
    ) -> Decision:
        """Return the decision; `released` are approvals for this job and this stage alone."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """Opens the commitments of one run; given to the person who asked, never to the log."""

    nonce_in: bytes
    nonce_out: bytes
    content_in: bytes
    content_out: bytes


@dataclass(frozen=True, slots=True)
class Permit:
    """A decision, and how the general log cites it; `restricted` names the whole record."""

    decision: Decision
    ref: DecisionRef
    restricted: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """What the model made and nobody has seen: the answer in its canonical form, and its seed."""

    content: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A released answer."""

    request: str
    prepared: Prepared
    assessed: Assessed
    seed: int
    totals: protocol.Done
    permit: Permit
    intent: Receipt
    outcome: Receipt
    opening: Opening
    model: Model


@dataclass(slots=True)
class Broker:
    """Serves one installed model to one person; the log, worker and helper are open and proven."""

    log: Log
    worker: Enclave
    helper: Enclave
    model: Model
    actor: Actor
    use_policy: UsePolicy
    limits: Limits = field(default_factory=Limits)
    restricted: Path | None = None  # whole records of hazard decisions; None keeps none
    holds: Holds | None = None  # None: what is held cannot be released
    require_released: Callable[[str], None] = lambda _: None  # of the hold that a job takes up
    screen_sequences: Callable[[Sequence[str]], ScreenResult] | None = None  # None: they hold
    request_set: str = ""  # a random name: whose requests share prefixes and turns at the worker

    def infer(self, job: Job, on_progress: OnProgress = lambda *_: None) -> Answer:
        """Run `job` and return the answer.

        Raises:
            RefusedError: `prompt.*` for the input, `policy.denied` or `policy.held`, `model.*`;
                `hold.*` where the job takes up a hold that is not released.
            FaultError: The log, the worker or the helper failed; nothing was released.

        """
        request = new_ulid()
        if job.held:
            self._take_up(request, job)
        prepared = self._prepare(request, job)
        permit = self._permit(request, job, prepared, prepared.input_screen)
        settings = settings_of(prepared)
        opening_in = prepared.prompt.encode(), os.urandom(NONCE_BYTES)
        intent = self._record_intent(request, job, permit, settings, opening_in)
        started = time.monotonic()
        try:
            samples, totals = self._generate(settings, on_progress)
            assessed = self._assess(job, samples)
            content = canonical(assessed.model_dump(mode="json"))
            made = Made(content, settings.seed)
            release = self._permit_release(request, job, prepared, assessed, made)
            nonce = os.urandom(NONCE_BYTES)
            outcome = self._record(
                request,
                job,
                "outcome",
                decision=release.ref,
                out=self.log.commit(content, nonce, req=request, side="out"),
                tok=(totals.prompt_tokens, totals.tokens),
                lat_ms=elapsed_ms(started),
                data={"result": "complete", "samples": len(samples), "task": prepared.task},
            )
        except BaseException as error:
            self._close_intent(request, job, started, error)
            log.warning("request.failed", request=request, error=type(error).__name__)
            raise
        log.info("request.answered", request=request, tokens=totals.tokens, runs=totals.runs)
        if self.holds is not None and job.held:
            self.holds.close(job.held, f"{outcome.origin}#{outcome.seq}")
        return Answer(
            request=request,
            prepared=prepared,
            assessed=assessed,
            seed=settings.seed,
            totals=totals,
            permit=release,
            intent=intent,
            outcome=outcome,
            opening=Opening(opening_in[1], nonce, opening_in[0], content),
            model=self.model,
        )

    def draw(self, job: Job, answer: Answer) -> dict[str, list[str]]:
        """Return drawings by row rank (SVG that is not yet checked)."""
        return results.draw_all(self.ask_helper, inputs=dict(job.inputs), assessed=answer.assessed)

    def sdf(self, answer: Answer) -> str:
        """Return the molecules of an answer as SDF text."""
        return results.sdf_all(self.ask_helper, answer.assessed)

    def ask_helper(self, request: Mapping[str, Any]) -> bytes:
        """Send one request to the sealed helper and return its reply."""
        return self.helper.request(canonical(request), timeout=HELPER_S)

    # -- steps ---------------------------------------------------------------------------------

    def _take_up(self, request: str, job: Job) -> None:
        """Refuse what is not released before any rule judges it: on record, and no new hold."""
        try:
            self.require_released(job.held)
        except RefusedError as error:
            self._record_refusal(request, job, "standing", error)
            raise

    def _prepare(self, request: str, job: Job) -> Prepared:
        try:
            require_text(job)
            require_small(job, self.limits)
            choose_preset(find_task(job.task), job.options)  # the channel carries no NaN
            reply = self.ask_helper(
                {
                    "op": "prepare",
                    "task": job.task,
                    "inputs": dict(job.inputs),
                    "context": dict(self.model.context),
                    "options": dict(job.options),
                }
            )
            return within(results.parse_prepared(reply), self.limits)
        except RefusedError as error:
            # A refused prompt is an attempt to use the model, so it is on record as well.
            self._record_refusal(request, job, "prompt", error)
            raise

    def _permit(
        self,
        request: str,
        job: Job,
        prepared: Prepared,
        screen: ScreenResult,
        made: Made | None = None,
    ) -> Permit:
        """Ask the policy; a refusal is durable before it is told. `made` would be released."""
        stage: Stage = "input" if made is None else "output"
        document = screen.model_dump(mode="json")
        released = self._released(job, stage, made)
        more = {"released": released} if released else {}
        try:
            decision = self.use_policy(job, modality=prepared.modality, screen=document, **more)
        except RefusedError as error:
            if made is None:  # after the intent its outcome says it
                self._record_refusal(request, job, "standing", error)
            raise
        permit = self._keep(decision)
        log.info("request.decided", request=request, permitted=decision.permitted)
        if decision.permitted:
            return permit
        receipt = self.log.append(
            Event(
                "denial",
                req=request,
                actor=self.actor,
                project=job.project,
                model=self.model.bundle,
                decision=permit.ref,
                data={"count": 1, "stage": stage, "task": prepared.task},
            )
        )
        reference = f"{receipt.origin}#{receipt.seq}"
        self._hold(request, job, permit, reference, made)
        require(decision, reference=reference)
        return permit

    def _released(self, job: Job, stage: Stage, made: Made | None) -> tuple[Approval, ...]:
        """Return what named people released of this very job at this stage."""
        if self.holds is None or not job.held:
            return ()
        return self.holds.released(
            job.held,
            stage=stage,
            bundle=self.model.bundle,
            project=job.project,
            task=job.task,
            job=(job.inputs, job.options),
            content=None if made is None else made.content,
        )

    def _hold(
        self, request: str, job: Job, permit: Permit, reference: str, made: Made | None
    ) -> None:
        """Keep what is held, so that it can be released; a plain denial is no hold."""
        decision = permit.decision
        if self.holds is None or decision.refusal().code != "policy.held":
            return
        seed = job.options.get("seed") if made is None else made.seed
        hold = Hold(
            request=request,
            reference=reference,
            opened=datetime.now(UTC).replace(microsecond=0),
            person=str(decision.evaluator.request.submitter),
            project=job.project,
            task=job.task,
            stage="input" if made is None else "output",
            bundle=str(self.model.bundle),
            decision=str(permit.ref.id),
            restricted=permit.restricted,
            job=job_text(job.inputs, job.options),
            seed=seed,
            parent=job.held,
            output=None if made is None else self.holds.commit(made.content),
        )
        self.holds.keep(hold, None if made is None else made.content)

    def _keep(self, decision: Decision) -> Permit:
        """Store the record of a decision; what a hazard rule said goes to the restricted folder.

        The general log holds the public record, the same for every hazard rule, with a commitment
        to the whole one. Without its nonce nobody can try out which rule it was.
        """
        content, commit = decision.canonical, ""
        if report.is_restricted(decision):
            nonce = os.urandom(NONCE_BYTES)
            commit = commitment(content, nonce).commit
            if self.restricted is not None:
                keep_restricted(self.restricted, commit, nonce, content)
            content = report.general_record(decision, commit)
        outcome = report.general_outcome(decision)
        digest = self.log.put_object(content)
        ref = DecisionRef(digest, outcome.value, decision.rule_for_log)
        return Permit(decision, ref, commit if self.restricted is not None else "")

    def _permit_release(
        self, request: str, job: Job, prepared: Prepared, assessed: Assessed, made: Made
    ) -> Permit:
        """Decide once more with what the model wrote; a binding site that is no copy is protein."""
        if prepared.modality == "annotation" and assessed.summary.valid < assessed.summary.n:
            prepared = prepared.model_copy(update={"modality": "protein"})
        return self._permit(request, job, prepared, assessed.output_screen, made)

    def _record_intent(
        self,
        request: str,
        job: Job,
        permit: Permit,
        settings: protocol.Generate,
        opening: tuple[bytes, bytes],
    ) -> Receipt:
        cited = self.log.put_object(canonical(self._public_settings(settings)))
        return self._record(
            request,
            job,
            "intent",
            decision=permit.ref,
            in_=self.log.commit(*opening, req=request, side="in"),
            data={
                "task": printable(job.task),
                "n": settings.n,
                "seed": settings.seed,
                "max_new_tokens": settings.max_new_tokens,
                "precision": self.model.precision,
                "provider": self.model.provider,
                "settings": cited,
            },
        )

    def _public_settings(self, settings: protocol.Generate) -> dict[str, Any]:
        """Return everything that shaped the sampling and nothing that a person typed."""
        return {
            "format": "airgap/settings/1",
            "model": str(self.model.bundle),
            "precision": self.model.precision,
            "provider": self.model.provider,
            "n": settings.n,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": str(settings.temperature),
            "top_p": str(settings.top_p),
            "top_k": settings.top_k,
            "repetition_penalty": str(settings.repetition_penalty),
            "seed": str(settings.seed),
            "stop": list(settings.stop),
            "grammar": settings.grammar.mode,
            **({"valence": True} if settings.grammar.valence else {}),
        }

    def _generate(
        self, settings: protocol.Generate, on_progress: OnProgress
    ) -> tuple[list[dict[str, Any]], protocol.Done]:
        samples: dict[int, dict[str, Any]] = {}
        totals: protocol.Done | None = None
        with contextlib.closing(self._events(settings)) as events:
            for event in events:
                if isinstance(event, protocol.Progress):
                    on_progress(event.tokens, event.finished, settings.n)
                elif isinstance(event, protocol.Done):
                    totals = event
                else:
                    if event.index in samples or event.index >= settings.n:
                        raise wrong_reply(f"sample {event.index} came twice or was not asked for")
                    samples[event.index] = sample_document(event)
        if totals is None or len(samples) != settings.n:
            raise wrong_reply(f"{len(samples)} samples came, {settings.n} were asked for")
        on_progress(totals.tokens, settings.n, settings.n)
        return [samples[index] for index in range(settings.n)], totals

    def _events(
        self, settings: protocol.Generate
    ) -> Generator[protocol.Progress | protocol.Sample | protocol.Done]:
        """Yield what the worker says; whoever stops before the end cancels the request."""
        limit = self.limits.seconds
        wanted = replace(settings, deadline_ms=limit * 1000, request_set=self.request_set)
        frames = self.worker.stream(wanted.encode(), WORKER_S, total_s=limit + GRACE_S)
        try:
            for frame in frames:
                if frame.is_part:
                    yield protocol.parse_event(frame.payload)
                    continue
                reply = protocol.parse_reply(frame.payload)
                if not isinstance(reply, protocol.Done):
                    raise wrong_reply("the reply is none of `generate`")
                yield reply
        except MalformedError as error:
            raise wrong_reply(str(error)) from error
        finally:
            if isinstance(frames, Generator):
                frames.close()

    def _assess(self, job: Job, samples: list[dict[str, Any]]) -> Assessed:
        """Assess in the helper; a large answer comes in parts."""
        request = {
            "op": "assess",
            "task": job.task,
            "inputs": dict(job.inputs),
            "samples": samples,
        }
        frames = list(self.helper.stream(canonical(request), HELPER_S))
        parts = [frame.payload for frame in frames if frame.is_part]
        assessed = results.parse_assessed(frames[-1].payload, parts)
        if assessed.sequences and self.screen_sequences is not None:
            screened = self.screen_sequences(assessed.sequences)
            assessed = assessed.model_copy(update={"output_screen": screened})
        return assessed

    # -- records -------------------------------------------------------------------------------

    def _record(self, request: str, job: Job, phase: str, **fields: Any) -> Receipt:
        return self.log.append(
            Event(
                "inference",
                phase,
                req=request,
                actor=self.actor,
                project=job.project,
                model=self.model.bundle,
                **fields,
            )
        )

    def _record_refusal(self, request: str, job: Job, stage: str, error: RefusedError) -> None:
        self.log.append(
            Event(
                "denial",
                req=request,
                actor=self.actor,
                project=job.project,
                model=self.model.bundle,
                err=error.code,
                data={"count": 1, "stage": stage, "task": printable(job.task)},
            )
        )

    def _close_intent(self, request: str, job: Job, started: float, error: BaseException) -> None:
        """Say how an intent ended that gave no answer. A log that fails here has halted already."""
        code = error.code if isinstance(error, AirgapError) else ""
        result = "failed"
        if isinstance(error, RefusedError):
            result = "refused"
        if code == "request.cancelled" or not isinstance(error, Exception):
            result = "cancelled"
        try:
            self._record(
                request,
                job,
                "outcome",
                err=code,
                lat_ms=elapsed_ms(started),
                data={"result": result, "task": printable(job.task)},
            )
        except AirgapError:
            return  # the first error is the one to tell; the next start closes the intent


def require_text(job: Job) -> None:
    """Refuse an input that is no Unicode text, or no JSON that the channel carries."""
    for name, value in job.inputs.items():
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise RefusedError(
                "prompt.input",
                f"input {printable(name)} is not UTF-8 text",
                hint="type it again in a terminal that is set to UTF-8",
            )
    try:
        canonical(job.inputs)
    except (ValueError, RecursionError) as error:  # NaN, half a character in a list, endless depth
        raise RefusedError(
            "prompt.input",
            f"the input cannot be read: {type(error).__name__}",
            hint="airgap tasks names the inputs of each task",
        ) from error


def require_small(job: Job, limits: Limits) -> None:
    """Refuse typed input above the site's cap; a structure file has its own, and is cut to one."""
    size = sum(
        len(value.encode())
        for name, value in job.inputs.items()
        if isinstance(value, str) and name != "pdb"
    )
    if size > limits.prompt_bytes:
        raise RefusedError(
            "request.limit",
            f"the input has {size} bytes; site.toml allows {limits.prompt_bytes}",
            hint="give a smaller molecule, or a part of the protein with --region",
        )


def within(prepared: Prepared, limits: Limits) -> Prepared:
    """Return `prepared` if it keeps to the site's caps."""
    if prepared.preset.n > limits.samples:
        raise RefusedError(
            "request.limit",
            f"{prepared.preset.n} samples were asked for; site.toml allows {limits.samples}",
            hint=f"-n {limits.samples}",
        )
    if prepared.max_new_tokens > limits.new_tokens:
        raise RefusedError(
            "request.limit",
            f"{prepared.max_new_tokens} new tokens a sample; site.toml allows {limits.new_tokens}",
            hint="--max-new-tokens, or a smaller input",
        )
    return prepared


def settings_of(prepared: Prepared) -> protocol.Generate:
    """Return the worker's request; a seed that nobody chose is drawn here, and recorded."""
    preset = prepared.preset
    seed = preset.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(8)) >> (64 - SEED_BITS)
    mode = prepared.grammar.get("mode", "none")
    return protocol.Generate(
        prompt=segments(prepared.prompt),
        n=preset.n,
        max_new_tokens=prepared.max_new_tokens,
        temperature=preset.temperature,
        top_p=preset.top_p,
        top_k=preset.top_k,
        repetition_penalty=preset.repetition_penalty,
        seed=seed,
        stop=tuple(prepared.stop),
        grammar=protocol.Grammar(
            mode=mode,
            task=prepared.task if mode == "structure" else "",
            sequence=prepared.subject.sequence if mode == "copy" else "",
            valence=preset.valence and mode == "structure",
        ),
        ppl_authors=preset.ppl_authors,
    )


def segments(prompt: str) -> tuple[protocol.Segment, ...]:
    """Cut the helper's prompt into tags and texts; the helper is not believed either."""
    try:
        return protocol.segments_of(prompt)
    except ProgramError as error:
        raise RefusedError(error.code, error.message, hint=error.hint) from error


def keep_restricted(folder: Path, commit: str, nonce: bytes, record: bytes) -> None:
    """Write the whole record of a hazard decision, readable for its owner alone, durably."""
    folder.mkdir(mode=0o700, exist_ok=True)
    document = {"format": "airgap/restricted/1", "nonce": nonce.hex(), "record": record.decode()}
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(folder / f"{commit}.json", flags, 0o600), "wb") as stream:
        stream.write(canonical(document))
        stream.flush()
        os.fsync(stream.fileno())


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys and no spaces, in UTF-8."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sample_document(sample: protocol.Sample) -> dict[str, Any]:
    """Return what the helper reads of a sample."""
    return {
        "index": sample.index,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "logprob": sample.logprob,
        "tokens": len(sample.ids),
        "removed_mass": sample.removed_mass,
        **({} if sample.ppl_authors is None else {"ppl_authors": sample.ppl_authors}),
    }


def printable(text: str) -> str:
    """Return a task name as it may stand in a record: short, printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:32])


def elapsed_ms(started: float) -> int:
    """Return whole milliseconds since `started` on the monotonic clock."""
    return int((time.monotonic() - started) * 1000)


def wrong_reply(what: str) -> FaultError:
    """The worker broke the protocol of its room."""
    return FaultError(
        "model.reply",
        f"the sealed worker sent something that is not an answer: {what:.300}",
        hint="treat the model as hostile; run `airgap verify` on its bundle",
    )
