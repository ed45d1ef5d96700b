"""From an answer to what a person keeps: table, JSON, CSV, SDF, report and receipt."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from airgap.audit import commitment
from airgap.science import views
from airgap.science.results import Assessed, Prepared
from airgap.serve.broker import Answer, Broker, Job
from policy import report
from policy.errors import FaultError, UsageError

OBLIGATIONS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer as it may cross a socket: the document, the files by kind, what the table needs."""

    document: dict[str, Any]
    files: dict[str, str]
    header: views.Header
    prepared: Prepared
    assessed: Assessed


@dataclass(frozen=True, slots=True)
class Presented:
    """What is printed: `json` for machines, `text` for people."""

    json: dict[str, Any]
    text: Group


def header_of(broker: Broker, answer: Answer) -> views.Header:
    """Return the facts that stand on every page of this answer."""
    probe = broker.worker.evidence.get("probe") or {}
    tried = probe.get("sealed", {})
    model, decision = answer.model, answer.permit.decision
    return views.Header(
        model=f"{model.name} {model.version}",
        model_digest=str(model.bundle),
        precision=model.precision,
        seed=answer.seed,
        prompt_commitment=commitment(answer.opening.content_in, answer.opening.nonce_in).commit,
        decision=f"{answer.permit.ref.outcome} as of {decision.as_of}, {answer.permit.ref.id}",
        seal=f"rung {broker.worker.rung}; {len(tried)} channels probed, none open",
        receipt=f"{answer.outcome.origin} record {answer.outcome.seq}",
        created=datetime.now(UTC),
        scientific_use=model.scientific_use,
        reference_model=model.reference_model,
        reasons=reasons_of(answer),
        version=version("airgap"),
        constraint=answer.prepared.constraint,
    )


def reasons_of(answer: Answer) -> tuple[str, ...]:
    """Return the rules and obligations of the decision that its user may read."""
    shown = report.explain(answer.permit.decision)
    reasons = [f"{each.rule}: {each.plain} [{each.citation}]" for each in shown.rules]
    duties = [f"obligation {each.id}: {each.text}" for each in shown.obligations]
    return (*reasons, *duties[:OBLIGATIONS_SHOWN])


def present(
    broker: Broker, job: Job, answer: Answer, outputs: Mapping[str, Path | None]
) -> Presented:
    """Write the files that were asked for and return what to print.

    Args:
        broker: Still open: drawings and SDF come from the sealed helper.
        job: As it was run.
        answer: Its answer.
        outputs: Path or None for `csv`, `sdf`, `html` and `receipt`.

    Raises:
        UsageError: SDF of a task that makes no molecules.
        FaultError: A file could not be written; the answer is on record all the same.

    """
    wanted = [kind for kind, path in outputs.items() if path is not None]
    return deliver(render(broker, job, answer, wanted), outputs)


def render(broker: Broker, job: Job, answer: Answer, kinds: Sequence[str]) -> Rendered:
    """Return an answer with the files that were asked for, nothing written; see `present`."""
    header = header_of(broker, answer)
    prepared, assessed = answer.prepared, answer.assessed
    files: dict[str, str] = {}
    for kind in kinds:
        if kind == "csv":
            content = views.csv(assessed, header)
        elif kind == "sdf":
            content = broker.sdf(answer)
        elif kind == "html":
            content = views.html(prepared, assessed, header, broker.draw(job, answer))
        else:
            content = answer.outcome.as_proof()
        files[kind] = content
    document = views.document(prepared, assessed, header) | {
        "request": answer.request,
        "tokens": {"prompt": answer.totals.prompt_tokens, "new": answer.totals.tokens},
        "elapsed_ms": answer.totals.elapsed_ms,
        "decision": str(answer.permit.ref.id),
        "receipts": {
            "intent": answer.intent.as_document(),
            "outcome": answer.outcome.as_document(),
        },
        # Whoever holds these can show that this text is the one on record; the log cannot.
        "openings": {
            "in": answer.opening.nonce_in.hex(),
            "out": answer.opening.nonce_out.hex(),
        },
    }
    return Rendered(document, files, header, prepared, assessed)


def deliver(rendered: Rendered, outputs: Mapping[str, Path | None]) -> Presented:
    """Write the files and return what to print; FaultError as `present`."""
    header = rendered.header
    written: dict[str, str] = {}
    for kind, path in outputs.items():
        if path is None:
            continue
        try:
            write_whole(path, rendered.files[kind])
        except OSError as error:
            raise unwritten(kind, path, error, header) from error
        written[kind] = str(path)
    lines = [
        f"on record: {header.receipt}; decision {header.decision}",
        f"sealed: {header.seal}; seed {header.seed}",
        *(f"{kind}: {path}" for kind, path in written.items()),
    ]
    table = views.table(rendered.prepared, rendered.assessed, header)
    text = Group(table, *(Text(line, style="dim") for line in lines))
    return Presented({**rendered.document, "written": written}, text)


def unwritten(kind: str, path: Path, error: OSError, header: views.Header) -> FaultError:
    """Say which file is missing, and how to have the same answer again."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return FaultError(
        "host.space" if full else "host.io",
        f"--{kind}: {path} was not written: {error.strerror}; the run is on record as "
        f"{header.receipt}",
        hint=f"make room or name another folder; --seed {header.seed} gives the same answer again",
    )


def write_whole(path: Path, content: str) -> None:
    """Write a file that is either complete or not there; a link keeps pointing to it."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check_outputs(task: str, outputs: Mapping[str, Path | None]) -> None:
    """Refuse an output that could not be written, before any work is done."""
    if outputs.get("sdf") is not None and task in {"binding-site", "material"}:
        raise UsageError(
            "usage.argument",
            f"--sdf: the task {task} makes no molecules with a structure of their own",
            hint="use --csv or --html",
        )
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        real, problem = locate_output(path)
        if not problem and real in taken:
            problem = f"--{taken[real]} goes there as well"
        if problem:
            raise UsageError(
                "usage.argument",
                f"--{option}: {path}: {problem}",
                hint="name a file in a folder that exists and that you may write to",
            )
        taken[real] = option


def locate_output(path: Path) -> tuple[Path, str]:
    """Return the file that a path leads to, and why it cannot be written, empty where it can."""
    try:
        real = path.resolve()
        kind: int | None = None
        with contextlib.suppress(FileNotFoundError):
            kind = real.lstat().st_mode
        folder = real.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        return path, getattr(error, "strerror", "") or "a link that leads nowhere"
    if kind is not None and stat.S_ISDIR(kind):
        return real, "a folder"
    if kind is not None and not stat.S_ISREG(kind):
        return real, "not an ordinary file; --json writes to standard output"
    if not folder:
        return real, "its folder does not exist"
    if not os.access(real.parent, os.W_OK):
        return real, "its folder cannot be written to"
    return real, ""
