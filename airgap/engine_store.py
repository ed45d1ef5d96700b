"""Engines of this lab's GPU: built at install inside the seal, signed, and verified at each start.

One folder for each bundle and precision: `engines/<digest>/<precision>/` of the tree, with
`record.json`, the signed record of `airgap.engines`, and `files/`, which the worker reads. Nothing
of it is ever packed into a bundle. The seal and what this host is are arguments.

Not run on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from airgap.audit import Event
from airgap.audit.service import Log
from airgap.config import InferenceSettings
from airgap.enclave import SealedResult
from airgap.enclave.channel import ProgramError
from airgap.enclave.inventory import Gpu, Host, parse_smi
from airgap.engines import (
    CODE,
    ENGINES_TYPE,
    RECORD_LIMIT,
    EngineRecord,
    Place,
    options_digest,
    place_of,
    record_engines,
    require_engines,
    sign_engines,
)
from airgap.inference.engine_build import ENGINE, reference_graph
from airgap.inference.graphs import Graph, ModelFacts
from airgap.inference.options import Setup, Shapes, profiles, provider_options
from airgap.install.lifecycle import ENGINES
from airgap.install.store import InstalledBundle
from bundle.envelope import Envelope, find_signers, parse_envelope
from bundle.keys import Signer, as_signers, read_limited
from bundle.root import RootDocument
from policy.errors import CODES, FaultError, RefusedError
from policy.terms import Digest

FOLDER = Path(ENGINES)
RECORD, FILES = "record.json", "files"
PROGRAM = "airgap.inference.engine_build"
BUILD_S = 2 * 3600.0
MEMORY_MB = 32 << 10  # of the build, beside four times the model
STDERR_LIMIT = 1 << 16
_FIX = "airgap engine build --key KEY, on this host"


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What the seal runs; the fields are those of `airgap.enclave.convert.Job`."""

    argv: Sequence[str]
    read_only: Sequence[Path]
    out: Path
    memory_mb: int
    timeout_s: float = BUILD_S
    stderr_limit: int = STDERR_LIMIT


class Result(Protocol):
    """How the sealed program ended."""

    @property
    def status(self) -> int | None:
        """Exit status."""

    @property
    def stderr(self) -> str:
        """Its words: untrusted."""


Seal = Callable[[EngineJob], Result]
"""Runs a job in profile `engine`: `run_sealed` with that profile, or a stand-in."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a session on TensorRT would ask for, of this bundle on this machine."""

    installed: InstalledBundle
    model: str
    precision: str
    settings: InferenceSettings
    place: Place
    facts: ModelFacts
    graph: Graph
    shapes: Shapes

    @classmethod
    def of(
        cls,
        installed: InstalledBundle,
        model: str,
        precision: str,
        settings: InferenceSettings,
        host: Host,
    ) -> Wanted:
        """Read the bundle and the host; refuse what no engine could be built for.

        Raises:
            RefusedError: `model.engine`; a code of room `model` for the graph or the sizes.

        """
        place = place_of(card_of(host, settings.device), host.versions)
        with _as_refusal():
            facts, graph = reference_graph(installed.model_folder(model), precision)
            shapes = shapes_of(settings, facts)
        wanted = cls(installed, model, precision, settings, place, facts, graph, shapes)
        with _as_refusal():
            wanted.profiles()
        return wanted

    def profiles(self) -> dict[str, str]:
        """Return the shapes of every input."""
        return profiles(self.facts, self.graph, self.shapes)

    def options(self) -> Digest:
        """Return the digest of all options of the provider."""
        setup = Setup(
            device=self.settings.device,
            device_mb=self.settings.device_mb,
            deterministic=self.settings.deterministic,
            engines=Path("/"),
            shapes=self.shapes,
        )
        return options_digest(provider_options("tensorrt", setup, self.facts, self.graph)[0][1])

    def folder(self, root: Path) -> Path:
        """Return where the engines of it lie below the tree `root`."""
        return root / FOLDER / self.installed.digest.hex / self.precision


@dataclass(frozen=True, slots=True)
class Engines:
    """Engines that are signed for this machine, and the sizes that they are for."""

    folder: Path
    shapes: Shapes
    record: EngineRecord

    @property
    def digest(self) -> Digest:
        """Of the record: what the evidence of a worker names."""
        return Digest.of(self.record.to_bytes())


def shapes_of(settings: InferenceSettings, facts: ModelFacts) -> Shapes:
    """Return the sizes that a site asks for, within the context of the model."""
    capacity = min(settings.engine_positions, facts.max_context)
    return Shapes(settings.engine_rows, capacity, min(settings.engine_piece, capacity))


def card_of(host: Host, device: int) -> Gpu:
    """Return the card of that number; RefusedError `model.engine` where there is none."""
    for card in parse_smi(host.smi):
        if card.index == device:
            return card
    raise RefusedError(
        CODE, f"this host shows no GPU of number {device}", hint="airgap doctor --gpu"
    )


def build(
    root: Path, wanted: Wanted, *, seal: Seal, signer: Signer | Sequence[Signer], now: datetime
) -> Engines:
    """Build the engines inside the seal, record and sign them, and put them in their place.

    Those of an earlier build stay until the new ones are signed.

    Args:
        root: The tree.
        wanted: For what.
        seal: Runs the job.
        signer: A key of the lab.
        now: Wall clock, UTC.

    Raises:
        RefusedError: `model.engine` and other codes of room `model`; `enclave.*`.
        FaultError: `enclave.deadline`, `host.io`.

    """
    place = wanted.folder(root)
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=place.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir(mode=0o755)
        files = made / FILES
        ended = seal(_job(wanted, files))
        if ended.status != 0:
            raise _refusal(ended)
        if not any(name.endswith(ENGINE) for name in os.listdir(files)):  # noqa: PTH208
            raise RefusedError(CODE, "the sealed build left no engine", hint=_FIX)
        record = record_engines(
            files,
            bundle=wanted.installed.digest,
            graph=_graph_digest(wanted),
            place=wanted.place,
            profiles=wanted.profiles(),
            options=wanted.options(),
            now=now,
        )
        envelope = sign_engines(record, signer)
        (made / RECORD).write_bytes(envelope.to_bytes())
        _readable(made)
        _replace(made, place, Path(scratch) / "old")
    return Engines(place / FILES, wanted.shapes, record)


def on_record(log: Log, run: Callable[[EngineJob], SealedResult]) -> Seal:
    """Return a seal whose evidence, and how the program in it ended, are in the log."""

    def seal(job: EngineJob) -> SealedResult:
        ended = run(job)
        evidence = json.dumps(ended.evidence, sort_keys=True).encode()
        data: dict[str, Any] = {
            "rung": str(ended.evidence["rung"]),
            "profile": "engine",
            "evidence": log.put_object(evidence),
        }
        log.append(Event("enclave.seal", data=data))
        end = {"status": ended.status, "signal": ended.signal}
        known = {name: value for name, value in end.items() if value is not None}
        log.append(Event("enclave.exit", data={**data, **known}))
        return ended

    return seal


def require(root: Path, wanted: Wanted, trust: RootDocument) -> Engines:
    """Return the engines of this bundle after every file and fact has been compared.

    Raises:
        RefusedError: `model.engine`; there are none, or something differs.

    """
    place = wanted.folder(root)
    if not (place / RECORD).is_file() or not (place / FILES).is_dir():
        raise RefusedError(
            CODE,
            f"there are no engines of {wanted.model} in {wanted.precision} on this host",
            hint=_FIX,
        )
    envelope = _read(place / RECORD)
    record = require_engines(
        envelope,
        trust.public_keys(),
        place / FILES,
        bundle=wanted.installed.digest,
        graph=_graph_digest(wanted),
        place=wanted.place,
        profiles=wanted.profiles(),
        options=wanted.options(),
    )
    keyids = find_signers(envelope, trust.public_keys(), payload_type=ENGINES_TYPE)
    _require_lab(keyids, trust, record.built)
    return Engines(place / FILES, wanted.shapes, record)


def require_lab(signer: Signer | Sequence[Signer], trust: RootDocument, now: datetime) -> None:
    """Refuse a key whose signature would not count, before an hour is spent.

    Raises:
        RefusedError: `model.engine`.

    """
    _require_lab([each.public_key.keyid for each in as_signers(signer)], trust, now)


def _require_lab(keyids: Iterable[str], trust: RootDocument, at: datetime) -> None:
    people = [trust.people[who] for who in trust.people_of(keyids)]
    if not any(person.approves and person.is_enrolled(at) for person in people):
        raise RefusedError(
            CODE,
            "no approver of the trust root signed the engines",
            hint="airgap trust show lists them; one of them signs the engines",
        )


def _job(wanted: Wanted, out: Path) -> EngineJob:
    settings, shapes = wanted.settings, wanted.shapes
    folder = wanted.installed.model_folder(wanted.model)
    job = {
        "folder": str(folder),
        "precision": wanted.precision,
        "threads": settings.threads or os.cpu_count() or 1,
        "device": settings.device,
        "device_mb": settings.device_mb,
        "deterministic": settings.deterministic,
        "rows": shapes.rows,
        "positions": shapes.capacity,
        "piece": shapes.piece,
    }
    size = sum(each.stat().st_size for each in folder.iterdir() if each.is_file())
    return EngineJob(
        argv=["python", "-m", PROGRAM, json.dumps(job), str(out)],
        read_only=(wanted.installed.folder,),
        out=out,
        memory_mb=MEMORY_MB + 4 * (size >> 20),
    )


def _refusal(ended: Result) -> RefusedError | FaultError:
    """Return what the sealed program said as an error; its words are untrusted."""
    words = ended.stderr.strip().splitlines()
    try:
        said = json.loads(words[-1])
        code, message, hint = (str(said[name])[:400] for name in ("code", "message", "hint"))
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        code, message, hint = "", "", ""
    if code in CODES and code.startswith("model."):
        return RefusedError(code, message, hint=hint or _FIX)
    tail = " / ".join(words[-3:])[:400]
    return FaultError(
        CODE,
        f"the build of engines ended with {ended.status}: {tail!r}",
        hint="airgap doctor --gpu",
    )


def _graph_digest(wanted: Wanted) -> Digest:
    return Digest.parse(f"sha256:{wanted.graph.sha256}")


def _read(path: Path) -> Envelope:
    raw = read_limited(path, RECORD_LIMIT, code=CODE, what="the record of engines")
    return parse_envelope(raw, code=CODE, limit=RECORD_LIMIT)


def _readable(made: Path) -> None:
    """Own what the sealed user left, and let the worker's user read it."""
    files = made / FILES
    files.chmod(0o755)
    for each in (made / RECORD, *files.iterdir()):
        if os.getuid() == 0:
            os.chown(each, 0, 0, follow_symlinks=False)
        each.chmod(0o644)
    if os.getuid() == 0:
        os.chown(files, 0, 0)


def _replace(made: Path, place: Path, old: Path) -> None:
    if place.exists():
        place.rename(old)
    made.rename(place)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _as_refusal() -> Iterator[None]:
    """Turn a refusal of code that the sealed side shares into one of this side."""
    try:
        yield
    except ProgramError as error:
        raise RefusedError(error.code, error.message, hint=error.hint or _FIX) from error
