"""Runs a conversion under the seal: read-only inputs, one writable folder, no network, no exec.

Profile `convert` of the launcher (docs/design/enclave.md, 1). Files must open, so stage 2 does not
apply and rung C is never enough; what the program leaves is checked name by name before anyone
reads it. `bundle.staging` takes `run_sealed` as an argument and never imports this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from airgap.enclave import channel, evidence, filters, host, reading, twin
from airgap.enclave import plan as plans
from airgap.enclave.host import HostSurvey
from airgap.enclave.plan import Plan
from airgap.enclave.process import Process, planning
from airgap.enclave.refused import SealRefused
from policy.errors import FaultError

START_S = 30.0  # seconds for the seal itself, before the program starts
DESCRIPTORS = 1024
DEPTH_LIMIT = 3
ENTRY_LIMIT = 1000
_INTERPRETER_FLAGS = frozenset({"-I", "-S", "-B", "-E", "-s", "-u"})  # the seal sets these itself
_POLL_S = 0.05
_MIB = 1 << 20


class Job(Protocol):
    """What to run; `bundle.staging` has a class of this shape."""

    @property
    def argv(self) -> Sequence[str]:
        """`python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`."""

    @property
    def read_only(self) -> Sequence[Path]:
        """Files and folders that the program may read, beside the interpreter and our packages."""

    @property
    def out(self) -> Path:
        """An empty folder, the only place that the program may write to."""

    @property
    def memory_mb(self) -> int:
        """Limit on data in MiB."""

    @property
    def timeout_s(self) -> float:
        """Seconds after which the program is killed."""

    @property
    def stderr_limit(self) -> int:
        """Bytes of output kept."""


@dataclass(frozen=True, slots=True)
class SealedResult:
    """How a sealed program ended and what it left.

    Attributes:
        status: Exit status; None when a signal ended it.
        signal: Number of that signal.
        stderr: Its output, cut; untrusted text.
        files: Accepted regular files below `out`; empty unless `status` is 0.
        evidence: The record of the seal, for the build record.
        seconds: Wall time of the program.

    """

    status: int | None
    signal: int | None
    stderr: str
    files: tuple[Path, ...]
    evidence: dict[str, Any]
    seconds: float


def run_sealed(
    job: Job,
    *,
    min_rung: str | None = None,
    out_limit_mb: int | None = None,
    expected: Sequence[str] | None = None,
    threads: int = 2,
    rung: str | None = None,
    state: Path | None = None,
    profile: str = "convert",
) -> SealedResult:
    """Run `job` under the seal and accept what it leaves, or raise.

    Args:
        job: What to run.
        min_rung: Least rung; None is A for root and B for a user. C is never enough.
        out_limit_mb: Size of everything in `out` together; None is 1 GiB and four times the inputs.
        expected: The only relative names that may be left; None accepts any plain file.
        threads: OMP_NUM_THREADS of the program.
        rung: Try this rung alone.
        state: Folder that keeps the probe's result between processes.
        profile: `convert`, or `engine` for a job that needs the GPU.

    Raises:
        SealRefused: The seal could not be proven, or the program left something unacceptable; `out`
            is empty then.
        FaultError: `enclave.deadline`, the program took too long.

    """
    facts = host.survey()
    least = min_rung or host.default_min_rung(facts)
    if "C" in (least, rung):
        raise SealRefused("rung", "a conversion opens files, so rung C would leave it unsealed")
    inputs = [os.path.abspath(path) for path in job.read_only]  # noqa: PTH100 - symbolic links stay
    with planning():
        plans.require_inputs(inputs)
    work = Work(
        job=job,
        facts=facts,
        program=parse_argv(job.argv),
        out=fresh_folder(job.out),
        inputs=inputs,
        limit=(out_limit_mb or 1024 + 4 * plans.folder_bytes(inputs) // _MIB) * _MIB,
        expected=expected,
        threads=threads,
        profile=profile,
    )
    rungs, left_out = host.candidate_rungs(facts, least)
    tried = [{"rung": name, "reason": reason} for name, reason in sorted(left_out.items())]
    rungs = [name for name in rungs if plans.runs_on(profile, name)]
    probed = "worker-gpu" if profile == "engine" else "worker"
    for name in [name for name in rungs if rung in (None, name)]:
        try:
            with _cleared_on_error(work.out):
                report = twin.probe_rung(name, None, facts, state, profile=probed)
                twin.require_sealed(report)
                return run_on(name, work, tried=tried, probe=report)
        except SealRefused as refused:
            refused.facts, refused.tried = facts, tried
            if refused.layer not in {"namespaces", "root"} or name == rungs[-1] or rung:
                raise
            tried.append({"rung": name, "reason": f"{refused.code}: {refused.message}"})
    reasons = "; ".join(f"{entry['rung']}: {entry['reason']}" for entry in tried)
    raise SealRefused("rung", f"this host reaches no rung from {least} up ({reasons})")


@dataclass(frozen=True, slots=True)
class Work:
    """A job whose wishes have been looked at."""

    job: Job
    facts: HostSurvey
    program: dict[str, Any]
    out: Path
    inputs: Sequence[str]
    limit: int
    expected: Sequence[str] | None = None
    threads: int = 2
    uid: int | None = None
    profile: str = "convert"


def run_on(
    rung: str,
    work: Work,
    *,
    tried: Sequence[dict[str, str]] = (),
    probe: dict[str, Any] | None = None,
    leaked: tuple[int, ...] = (),
) -> SealedResult:
    """Run a job on `rung`; `run_sealed` has the probe's word before it calls this.

    `leaked` are descriptors that the probe hands to its launcher on purpose.
    """
    job, out = work.job, work.out
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        process = Process(
            lambda: _plan(work, rung, (out, scratch)),
            stderr_cap=job.stderr_limit,
            deadline_s=START_S,
            leaked=leaked,
        )
        try:
            document = _seal(process, work, tried, probe)
            started = time.monotonic()
            process.send(channel.REQUEST, json.dumps(work.program).encode())
            _wait(process, (out, scratch), work.limit, started + job.timeout_s)
            seconds = time.monotonic() - started
        finally:
            end = process.kill()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files: tuple[Path, ...] = ()
    if end["status"] == 0:
        files = collect(out, limit=work.limit, expected=work.expected)
        hashes = {str(path.relative_to(out)): evidence.file_sha256(path) for path in files}
        document["files"] = hashes
    else:
        empty(out)
    document["exit"] = end
    return SealedResult(end["status"], end["signal"], process.words(), files, document, seconds)


def _plan(work: Work, rung: str, writable: tuple[Path, Path]) -> Plan:
    """Plan the seal and give both writable folders, result and scratch, to the worker's uid."""
    environment = plans.built_environment(threads=work.threads, scratch=str(writable[1]))
    with planning():
        plans.require_silent(work.facts.telemetry, environment)
        plan = plans.build(
            work.facts,
            rung=rung,
            profile=work.profile,
            part="convert",
            read_only=work.inputs,
            writable=[str(folder) for folder in writable],
            environment=environment,
            memory_mb=work.job.memory_mb,
            descriptors=DESCRIPTORS,
            file_mb=work.limit // _MIB,
            uid=work.uid,
        )
    if plan["identity"] is not None:
        for folder in writable:
            os.chown(folder, *plan["identity"], follow_symlinks=False)
    return plan


def _seal(
    process: Process,
    work: Work,
    tried: Sequence[dict[str, str]],
    probe: dict[str, Any] | None,
) -> dict[str, Any]:
    """Let the stub close exec and verify it twice, as for a worker."""
    plan, facts = process.plan, work.facts
    process.expect(channel.LOADED)
    loaded = process.verify(facts, own_filters=2, dumpable=None)
    process.send(channel.SEAL, b"")
    process.expect(channel.READY)
    sealed = process.verify(facts, own_filters=2, dumpable=False)
    last = filters.no_exec(facts.arch)
    live = process.verify_filters(facts, last)
    wanted = {"profile": work.profile, "limits": plan["limits"], "binds": plan["binds"]}
    content = json.dumps(wanted, sort_keys=True, separators=(",", ":")).encode()
    return evidence.seal_document(
        facts,
        plan,
        loaded,
        sealed,
        policy={"profile": work.profile, "sha256": hashlib.sha256(content).hexdigest()},
        live=live,
        last_filter=last,
        artifacts={
            "onnxruntime": facts.onnxruntime,
            "ort_telemetry": "disabled" if facts.telemetry else "absent",
        },
        tried=tried,
        probe=None if probe is None else twin.summary(probe),
        self_test={},
        host=reading.own_namespaces(),
    )


def _wait(process: Process, folders: tuple[Path, Path], limit: int, deadline: float) -> None:
    """Wait for the end of the program; a folder over its limit or a late end kills it."""
    pause = _POLL_S
    while process.alive:
        if time.monotonic() > deadline:
            process.kill()
            raise FaultError(
                "enclave.deadline",
                "the sealed program did not end in time; its last words: "
                f"{process.words()[-400:]!r}",
                hint="give it more time, or look at what it was doing",
            )
        used = sum(folder_size(folder) for folder in folders)
        if used > limit:
            process.kill()
            raise SealRefused("output", f"the program wrote {used} bytes, the limit is {limit}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


# -- the command line of a job --------------------------------------------------------------------


def parse_argv(argv: Sequence[str]) -> dict[str, Any]:
    """Read `python [flags] SCRIPT …` or `python [flags] -m MODULE …`; anything else is refused.

    The seal starts this very interpreter with flags of its own, so the first word and the flags are
    only checked.
    """
    words = list(argv)
    if not words or not Path(words.pop(0)).name.startswith("python"):
        raise SealRefused("job", f"a sealed job runs Python, found {list(argv)[:1]!r:.80}")
    while words and words[0] in _INTERPRETER_FLAGS:
        words.pop(0)
    if len(words) > 1 and words[0] == "-m":
        return {"kind": "module", "name": words[1], "arguments": words[2:]}
    if words and not words[0].startswith("-"):
        return {"kind": "script", "name": os.path.abspath(words[0]), "arguments": words[1:]}  # noqa: PTH100
    raise SealRefused("job", f"neither a script nor a module: {words[:2]!r:.80}")


# -- the folder that the program writes to --------------------------------------------------------


def fresh_folder(out: Path) -> Path:
    """Return the absolute path of an empty folder that is ours; refuse anything else."""
    path = Path(os.path.abspath(out))  # noqa: PTH100 - symbolic links are looked at below
    try:
        status = path.lstat()
    except FileNotFoundError:
        path.mkdir(mode=0o700)
        return path
    if not stat.S_ISDIR(status.st_mode):
        raise SealRefused("job", f"{path} is not a folder")
    if any(path.iterdir()):
        raise SealRefused("job", f"{path} is not empty")
    return path


def folder_size(folder: Path) -> int:
    """Add up what lies below `folder` while somebody may be writing there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def collect(out: Path, *, limit: int, expected: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Accept the plain files below `out`, make them the caller's own, and return them sorted.

    Raises:
        SealRefused: A symbolic or hard link, a FIFO, a socket, a device, a set-id bit, a name that
            is not expected, too many entries, too deep or too large.

    """
    own = (os.geteuid(), os.getegid())
    files: list[Path] = []
    total = 0
    for count, (path, descriptor, depth) in enumerate(_walk(out)):
        status = os.fstat(descriptor)
        name = str(path.relative_to(out))
        if count > ENTRY_LIMIT or depth > DEPTH_LIMIT:
            raise SealRefused("output", "the program left too many files, or too deep")
        if not name.isprintable() or name.startswith("."):
            raise SealRefused("output", f"the program left a file named {name!r:.80}")
        if status.st_uid != own[0]:
            os.fchown(descriptor, *own)
        if stat.S_ISDIR(status.st_mode):
            os.fchmod(descriptor, 0o755)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise SealRefused("output", f"{name!r:.80} is a {stat.filemode(status.st_mode)}")
        if status.st_nlink != 1:
            raise SealRefused("output", f"{name!r:.80} has {status.st_nlink} links")
        if expected is not None and name not in expected:
            raise SealRefused("output", f"{name!r:.80} was not expected")
        total += status.st_size
        if total > limit:
            raise SealRefused("output", f"the program left over {limit} bytes")
        os.fchmod(descriptor, 0o644)
        files.append(path)
    os.chown(out, *own)
    return tuple(sorted(files))


def _walk(folder: Path, depth: int = 1) -> Iterator[tuple[Path, int, int]]:
    """Yield every entry below `folder` with a descriptor; no link is followed."""
    for entry in sorted(folder.iterdir()):
        try:
            # O_NONBLOCK: a FIFO must not hang the parent.
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SealRefused("output", f"{entry.name!r:.80} does not open as a file") from error
        try:
            yield entry, descriptor, depth
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                yield from _walk(entry, depth + 1)
        finally:
            os.close(descriptor)


def empty(out: Path) -> None:
    """Remove whatever lies in `out`; the folder stays."""
    for entry in out.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if os.geteuid() == 0:
        os.chown(out, os.geteuid(), os.getegid())


@contextlib.contextmanager
def _cleared_on_error(out: Path) -> Iterator[None]:
    """Leave nothing behind that was not accepted."""
    try:
        yield
    except BaseException:
        empty(out)
        raise
