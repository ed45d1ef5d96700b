"""`airgap build`: from a snapshot to a draft of the release that only the builder has signed.

inspect -> admission -> convert (sealed) -> parity (sealed) -> bill of materials -> archive. The
policy is asked before the expensive steps, about the snapshot as it was hashed. The same snapshot,
facts and tools give the same body and manifest: no clock is read, `created` is an argument.
Everything happens in one work folder beside the output (`bundle.staging.resume`): a build that is
stopped leaves its finished steps there, and the next one goes on from them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bundle.approval import have_room
from bundle.envelope import Envelope, sign_statement
from bundle.keys import Signer, as_signers
from bundle.manifest import Manifest, ModelEntry
from bundle.media import open_medium
from bundle.root import BUILDER
from bundle.scan.payload import scan_payload
from bundle.scan.strict import open_view
from bundle.split import split
from bundle.staging.attest import source_digest
from bundle.staging.convert import convert, place_inputs
from bundle.staging.inspect import InspectReport, inspect_source
from bundle.staging.output import output_problem
from bundle.staging.parity import Assess, Parity, prove_parity
from bundle.staging.release import Facts, describe, model_entry
from bundle.staging.resume import work_folder
from bundle.staging.sealed import RunSealed
from bundle.staging.source import Progress
from bundle.staging.upstream import Upstream
from bundle.staging.wheelhouse import Wheelhouse
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.trust import Trust, chain_document
from bundle.vectors import Vectors
from bundle.write import Member, write_archive
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

Admit = Callable[[Sequence[ModelEntry], Digest], bytes]
"""Gives the canonical record of the admission decision, or raises `policy.*`."""

_SPACE = 6  # times the bytes of the weights: fp32 graph, its copy while it is written, the archive
_FLOOR = 64 * 1024 * 1024
# A sealed process holds the weights in fp32, the graph and a copy of it; and two libraries.
_MEMORY_FACTOR, _MEMORY_FLOOR = 5, 6144


@dataclass(frozen=True, slots=True)
class Cut:
    """How a draft is cut into volumes: the most bytes of one, and how many of parity."""

    size: int
    parity: int = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was taken over from a build that was stopped: sealed runs by name, and chunks."""

    runs: tuple[str, ...] = ()
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    """A finished draft; of a set of volumes `path` is the first one."""

    path: Path
    manifest: Manifest
    report: InspectReport
    parity: Parity
    vectors: tuple[Vectors, ...]
    builder: str
    decision: Mapping[str, Any]
    seal: Mapping[str, object]
    resumed: Resumed = Resumed()
    volumes: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file, or of all volumes."""
        return sum(path.stat().st_size for path in self.volumes or (self.path,))


def build(
    folder: Path,
    out: Path,
    facts: Facts,
    *,
    trust: Trust,
    signer: Signer | Sequence[Signer],
    run_sealed: RunSealed | None,
    admit: Admit,
    pins: Path | None = None,
    upstream: Upstream | None = None,
    wheelhouse: Wheelhouse | None = None,
    cut: Cut | None = None,
    precisions: Sequence[str] = ("fp32",),
    reference: bool = True,
    assess: Assess | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build the draft of a release.

    Args:
        folder: The snapshot.
        out: The bundle; replaced if it exists, and untouched until the draft is complete.
        facts: What the snapshot does not say.
        trust: Of this site; names the person whose key `signer` is.
        signer: The builder's key; both keys in the profile `cnsa2`.
        run_sealed: Runs a program without a network; refused when there is none.
        admit: Asks the policy for the admission.
        pins: A file in the form of `sha256sum`.
        upstream: Evidence of the publisher, and whom this site believes.
        wheelhouse: Wheels that travel along.
        cut: Write volumes `out`.001, ... in the place of one file.
        precisions: Which the bundle shall hold; fp32 is always among them.
        reference: Whether it carries the reference graph where there is a fast one.
        assess: Counts valid completions, for the task figures of a precision.
        progress: Told stages and units.

    Raises:
        RefusedError: Codes of inspection, conversion, parity, policy and manifest.
        FaultError: `host.*`.

    """
    if run_sealed is None:
        raise RefusedError(
            "build.seal",
            "there is no sealed runner; a model is never converted outside the seal",
            hint="run `airgap doctor` to see what this host lacks, or convert on another one",
        )
    tell = progress or _silent
    builder = require_builder(trust, signer, facts.created)
    require_output(out)
    report = inspect_source(
        folder,
        pins=pins,
        upstream=dataclasses.replace(upstream or Upstream(), at=facts.created),
        name=facts.model_id,
        origin=facts.source,
        run_sealed=run_sealed,
        progress=progress,
    )
    report.require_ready()
    model = model_entry(report, facts, precisions)
    tell("admit", 0, 1)
    record = admit([model], source_digest(report))
    tell("admit", 1, 1)
    _require_space(report, out, cut)
    hashed = [(file.identity, report.digests[file.path].sha256) for file in report.files]
    with work_folder(out, hashed) as found:
        work, kept, run_sealed = found.folder, found.archive, found.keeping(run_sealed)
        source = work / "source"
        place_inputs(report, source)
        memory = memory_of(report)
        tell("convert", 0, 1)
        converted = convert(
            report,
            source,
            work / "graph",
            run_sealed=run_sealed,
            memory_mb=memory,
            precisions=precisions,
            reference=reference,
            progress=lambda done, total: tell("quantize", done, total),
        )
        tell("convert", 1, 1)
        tell("parity", 0, 1)
        parity = prove_parity(
            source,
            work / "graph",
            work / "parity",
            made=converted.graphs,
            start=report.start_id,
            run_sealed=run_sealed,
            memory_mb=memory,
        )
        tell("parity", 1, 1)
        tell("describe", 0, 1)
        draft = describe(
            report,
            facts,
            model,
            converted,
            parity,
            record=record,
            pins=pins,
            assess=assess,
            wheelhouse=wheelhouse,
        )
        tell("describe", 1, 1)

        def seal(manifest: Manifest) -> Envelope:
            scan_payload(_reader(draft.members), manifest)
            payload = seal_statement(
                manifest,
                builder=builder,
                policy_pack_digests=draft.pack_digests,
                attested=have_room(trust.document),
            ).to_bytes()
            return sign_statement(payload, PAYLOAD_TYPE, *as_signers(signer))

        whole = out if cut is None else found.kept / out.name
        manifest = write_archive(
            whole,
            draft.release.model_copy(update={"profile": trust.document.profile}),
            draft.members,
            trust_chain=chain_document(trust),
            seal=seal,
            progress=lambda done, total: tell("seal", done, total),
            kept=kept,
        )
        volumes = () if cut is None else _cut(whole, out, cut, tell)
    taken = Resumed(tuple(found.resumed), kept.resumed)
    return Built(
        volumes[0] if volumes else out,
        manifest,
        report,
        parity,
        draft.vectors,
        builder,
        draft.decision,
        converted.seal or parity.seal,
        taken,
        volumes,
    )


def _cut(whole: Path, out: Path, cut: Cut, tell: Progress) -> tuple[Path, ...]:
    """Write the volumes of a finished draft beside the place of `out`."""
    medium = open_medium(whole)
    try:
        return split(
            medium,
            out.absolute().parent,
            volume_size=cut.size,
            parity_count=cut.parity,
            progress=lambda done, total: tell("volumes", done, total),
        )
    finally:
        medium.close()


def require_builder(trust: Trust, signer: Signer | Sequence[Signer], at: datetime) -> str:
    """Return the person whose keys sign, who must be enrolled as a builder.

    Raises:
        RefusedError: `seal.role`.

    """
    keyids = [each.public_key.keyid for each in as_signers(signer)]
    keyid = keyids[0]
    who = next(iter(trust.document.people_of(keyids)), None)
    person = trust.document.people.get(who or "")
    if who is None or person is None or BUILDER not in person.roles or not person.is_enrolled(at):
        found = "nobody's here" if who is None else f"{who}'s, who is not enrolled as a builder"
        raise RefusedError(
            "seal.role",
            f"key {keyid} is {found}; a draft is signed by an enrolled builder",
            hint="`airgap trust show` lists people and roles; `airgap trust add` enrols a key",
        )
    return who


def memory_of(report: InspectReport) -> int:
    """Return the memory in MiB that the sealed processes may take."""
    return _MEMORY_FLOOR + _MEMORY_FACTOR * 4 * report.parameters // (1024 * 1024)


def _reader(members: Sequence[Member]) -> Callable[[str], memoryview]:
    by_path = {member.path: member.source for member in members}

    def read(path: str) -> memoryview:
        source = by_path[path]
        return memoryview(source) if isinstance(source, bytes) else open_view(source)

    return read


def require_output(out: Path) -> None:
    """Refuse a place where no file can be put: `build.output`, fault `host.io`."""
    parent = out.absolute().parent
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise FaultError("host.io", f"{str(parent)!r:.160} cannot be written")
    problem = output_problem(out)
    if problem:
        raise RefusedError(
            "build.output",
            f"{str(out)!r:.160} cannot be a file: {problem}",
            hint="name a file in an existing folder, for example -o model-1.0.agb",
        )


def _require_space(report: InspectReport, out: Path, cut: Cut | None) -> None:
    weights = sum(tensor.end - tensor.start for tensor in report.tensors.values())
    needed = _FLOOR + (_SPACE if cut is None else 2 * _SPACE) * weights
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise FaultError(
            "host.space",
            f"building needs about {needed // 1024**2:,} MiB beside {out.name!r:.80}, "
            f"free are {free // 1024**2:,}",
            hint="free space, or name an output on a larger disk",
        )


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
