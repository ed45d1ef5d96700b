"""`airgap inspect`: what a snapshot is, what is proved about it, and whether it may be converted.

Walks the snapshot closed, parses every file by its role, hashes every byte, and compares with pins
and the hub's records. Refusals are collected, so that one run shows all of them; the first one
decides the exit. The report is canonical JSON without times and local paths: the same bytes give
the same report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bundle.canonical import canonical_json
from bundle.evidence.levels import UNPICKLED, Proof, Source, check
from bundle.scan.config import CODE as CONFIG_CODE
from bundle.scan.config import CONFIG_LIMIT, unknown_keys
from bundle.scan.onnx import parse_onnx
from bundle.scan.payload import DOCUMENT_LIMIT, Finding, scan_file
from bundle.scan.roles import Role, role_of
from bundle.scan.safetensors import Tensor, parse_safetensors
from bundle.scan.strict import open_view, parse_object
from bundle.scan.tokenizer import Tokenizer, parse_tokenizer
from bundle.staging.architecture import Architecture, parse_architecture, require_tensors
from bundle.staging.licences import (
    Conflict,
    LicenceFound,
    base_licence,
    card_licences,
    licence_conflicts,
    licence_text,
    parse_card,
)
from bundle.staging.lineage import (
    Hint,
    lineage_hints,
    packaged_registry,
    registry_hints,
    silent_card,
)
from bundle.staging.prompts import lacking_tags, require_speech
from bundle.staging.provenance import (
    HubRecords,
    check_hub,
    level_document,
    parse_pins,
    require_pins,
)
from bundle.staging.scanners import ScannerRun, refusals_of, run_scanners
from bundle.staging.sealed import RunSealed
from bundle.staging.source import Digests, Progress, SourceFile, commit_of, hash_file, read_head
from bundle.staging.source import walk as walk_source
from bundle.staging.tokens import require_tokens, start_token
from bundle.staging.unpickle import RECORD, Unpickled, parse_unpickled, require_unpickled
from bundle.staging.upstream import Upstream, source_of
from policy.errors import RefusedError
from policy.terms import Digest

FORMAT = "airgap-inspect/1"
_TAG = re.compile(r"<[A-Za-z]+>")
_TITLE = re.compile(r"^# +(.{1,80})$", re.MULTILINE)
_CARRIED = frozenset([Role.CONFIG, Role.TOKENIZER, Role.CARD, Role.LICENCE])
_INDEX_LIMIT = 64 * 1024 * 1024
_NEEDED = ("config.json", "tokenizer.json")
_FINISH = "point at the folder that holds config.json, and let the download finish"
_OTHER_TOKENIZER = re.compile(r"tokenizer\.model|tekken\.json")
_CONVERT_TOKENIZER = (
    "this release has its tokenizer in another format: let transformers write tokenizer.json "
    "(AutoTokenizer.from_pretrained, then save_pretrained), add the file, pin and inspect again"
)
HASH_REFUSED = 1 << 30  # bytes up to which a file that its parser refused is still hashed


@dataclass(slots=True)
class InspectReport:
    """All that inspection found. `refusals` empty means that the snapshot may be converted."""

    name: str
    files: tuple[SourceFile, ...]
    repository: str | None = None  # on the hub, when the snapshot lies in the hub's own cache
    roles: dict[str, Role] = field(default_factory=dict)
    digests: dict[str, Digests] = field(default_factory=dict)
    refusals: list[RefusedError] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # paths that their parser did not accept
    findings: list[Finding] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    hub: HubRecords | None = None
    upstream: Upstream = field(default_factory=Upstream)
    proofs: tuple[Proof, ...] = ()
    unpickled: Unpickled | None = None
    scanners: tuple[ScannerRun, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    architecture: Architecture | None = None
    tokenizer: Tokenizer | None = None
    start_id: int | None = None  # what the publisher's tokenizer puts before a text
    tensors: dict[str, Tensor] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)  # the weight file of each tensor
    licences: list[LicenceFound] = field(default_factory=list)
    lineage: tuple[Hint, ...] = ()
    registry: tuple[Hint, ...] = ()  # what the curated registry says; the policy reads it itself
    conflicts: tuple[Conflict, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether nothing was refused."""
        return not self.refusals

    @property
    def reference_model(self) -> bool:
        """Whether card or configuration say that this is a reference model, for trying things."""
        return True in {self.card.get("reference_model"), self.config.get("reference_model")}

    @property
    def scientific_use(self) -> bool:
        """Whether card and configuration leave scientific use open; an explicit no closes it."""
        return False not in {self.card.get("scientific_use"), self.config.get("scientific_use")}

    @property
    def tags(self) -> dict[str, int]:
        """The special tokens that a prompt is built of, such as `<ProteinS>`, by id."""
        if self.tokenizer is None:
            return {}
        control = {self.tokenizer.unk, *_control_tokens(self)}
        return {
            text: number
            for text, number in sorted(self.tokenizer.special.items(), key=lambda item: item[1])
            if _TAG.fullmatch(text) and text not in control
        }

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        total = 0
        for tensor in self.tensors.values():
            count = 1
            for size in tensor.shape:
                count *= size
            total += count
        return total

    def carried(self) -> tuple[SourceFile, ...]:
        """The files that travel as they are."""
        return tuple(file for file in self.files if self.roles.get(file.path) in _CARRIED)

    def weights(self) -> tuple[SourceFile, ...]:
        """The files that the conversion reads beside those that travel."""
        wanted = {Role.WEIGHTS, Role.INDEX}
        return tuple(file for file in self.files if self.roles.get(file.path) in wanted)

    def refusal(self) -> RefusedError | None:
        """Return the first refusal; its message tells how many more there are."""
        if not self.refusals:
            return None
        first, more = self.refusals[0], len(self.refusals) - 1
        suffix = f" (and {more} more: see the report)" if more else ""
        return RefusedError(first.code, first.message + suffix, hint=first.hint)

    def require_ready(self) -> None:
        """Raise the first refusal, if there is one."""
        error = self.refusal()
        if error is not None:
            raise error

    def as_document(self) -> dict[str, Any]:
        """Return the report as JSON data; no floats, no times, no local paths."""
        return _document(self)

    def to_bytes(self) -> bytes:
        """Return the canonical form, which is sealed as META/report.json."""
        return canonical_json(self.as_document())

    @property
    def digest(self) -> Digest:
        """SHA-256 of the canonical form."""
        return Digest.of(self.to_bytes())


def inspect_source(
    folder: Path,
    *,
    pins: Path | None = None,
    upstream: Upstream | None = None,
    name: str | None = None,
    origin: str | None = None,
    run_sealed: RunSealed | None = None,
    progress: Progress | None = None,
) -> InspectReport:
    """Inspect a snapshot on disk; what it refuses stands in the report.

    Args:
        folder: In hub layout: a download folder, or a snapshot inside the hub's cache.
        pins: A file in the form of `sha256sum` that fixes every file of the snapshot.
        upstream: Evidence of the publisher, and whom this site believes.
        name: Of the model in the report; else the repository, the card's title or the folder.
        origin: Where it is from, hf:ORG/NAME; else the hub's cache tells.
        run_sealed: Runs outside scanners without a network; without it they are not run.
        progress: Told stages, and bytes while hashing.

    Raises:
        RefusedError: `source.*` and `pin.malformed`; there is nothing to report on.
        FaultError: `host.io`.

    """
    wanted = None if pins is None else parse_pins(pins)
    repository = _repository_of(folder)
    report = InspectReport(
        name or repository or folder.absolute().name, walk_source(folder), repository
    )
    tell = progress or _silent
    for number, file in enumerate(report.files):
        tell("scan", number, len(report.files))
        try:
            _scan(report, file)
        except RefusedError as error:
            report.refusals.append(error)
            report.refused.add(file.path)
    tell("scan", len(report.files), len(report.files))
    _collect(report, lambda: _check_model(report))
    if any(f.size > HASH_REFUSED and f.path in report.refused for f in report.files):
        raise report.refusals[0]  # hours of hashing could not change the answer
    _hash_all(report, tell)
    report.upstream = upstream or Upstream()
    _collect(report, lambda: _check_unpickled(report))
    _collect(report, lambda: _check_origin(report, wanted, commit_of(folder)))
    pin_digest = None if pins is None else Digest.of(bytes(open_view(pins))).hex
    pinned = wanted if not any(r.code == "pin.mismatch" for r in report.refusals) else None
    source = source_of(report, report.upstream.items, pinned=pinned is not None)
    _collect(report, lambda: _check_upstream(report, source))
    report.provenance = level_document(source, pinned, pin_digest, report.hub, report.proofs)
    report.scanners = run_scanners(report.files, run_sealed)
    report.refusals += refusals_of(report.scanners)
    title = _read_card(report)
    if name is None and repository is None and title:
        report.name = title
    place = origin or (f"hf:{repository}" if repository else None)
    report.lineage = lineage_hints(
        report.card, report.config, report.architecture, report.tokenizer, place
    )
    report.registry = registry_hints(packaged_registry(), place)
    _conclude(report)
    return report


def _collect(report: InspectReport, step: Callable[[], None]) -> None:
    try:
        step()
    except RefusedError as error:
        report.refusals.append(error)


def _scan(report: InspectReport, file: SourceFile) -> None:
    """Give one file its role and parse it; raises what it refuses."""
    role = report.roles[file.path] = role_of(file.path, read_head(file))
    if role in {Role.SIDE, Role.HUB}:
        return
    data = open_view(file.place)
    if role is Role.WEIGHTS:
        parsed = parse_safetensors(data, file.path)
        for tensor in parsed.tensors:
            if tensor.name in report.tensors:
                raise RefusedError(
                    "source.shape", f"tensor {tensor.name!r:.100} stands in two weight files"
                )
            report.tensors[tensor.name] = tensor
            report.holders[tensor.name] = file.path
    elif role is Role.TOKENIZER:
        report.tokenizer = parse_tokenizer(data, file.path)
    elif role is Role.INDEX:
        parse_object(data, code=CONFIG_CODE, what=file.path, limit=_INDEX_LIMIT)
    elif role is Role.ONNX:
        beside = {other.path: other.size for other in report.files}
        parse_onnx(data, sizes=beside.get, what=file.path)
    else:
        report.findings += [Finding(file.path, text) for text in scan_file(data, role, file.path)]


def _check_model(report: InspectReport) -> None:
    """Check that the files make up one model of a known architecture."""
    paths = {file.path: file for file in report.files}
    for path in _NEEDED:
        if path not in paths:
            other = path == "tokenizer.json" and any(_OTHER_TOKENIZER.match(one) for one in paths)
            raise RefusedError(
                "source.incomplete",
                f"{path} is missing",
                hint=_CONVERT_TOKENIZER if other else _FINISH,
            )
    if any(r.code == CONFIG_CODE for r in report.refusals):
        return
    report.config = _json(paths["config.json"])
    generation = paths.get("generation_config.json")
    report.findings += [
        Finding("config.json", f"key {key!r:.60} is not one of this architecture")
        for key in unknown_keys(report.config)
    ]
    report.architecture = parse_architecture(report.config, _json(generation) if generation else {})
    _require_weights(report)
    require_tensors(report.architecture, report.tensors)
    if report.tokenizer is None:
        return
    require_tokens(report.architecture, report.tokenizer, report.tags)
    settings = paths.get("tokenizer_config.json")
    report.start_id = start_token(
        report.architecture, report.tokenizer, _json(settings) if settings else {}
    )
    require_speech(report.architecture, report.tokenizer)
    report.findings += [
        Finding("tokenizer.json", f"task {kind} will be refused: there is no {' '.join(tags)}")
        for kind, tags in lacking_tags(report.tokenizer).items()
    ]


def _require_weights(report: InspectReport) -> None:
    weights = [path for path, role in report.roles.items() if role is Role.WEIGHTS]
    refused = {r.code for r in report.refusals}
    if not weights and not refused & {"scan.pickle", "scan.safetensors"}:
        raise RefusedError(
            "source.incomplete",
            "there is no *.safetensors file",
            hint="let the download finish; only weights in safetensors are converted",
        )
    for path, role in report.roles.items():
        if role is not Role.INDEX:
            continue
        file = next(item for item in report.files if item.path == path)
        listed = _json(file, _INDEX_LIMIT).get("weight_map")
        if not isinstance(listed, dict):
            raise RefusedError("source.incomplete", f"{path} holds no weight_map")
        shards = sorted({str(name) for name in listed.values()} - set(weights))
        names = sorted(set(listed) ^ set(report.tensors))
        if shards or (names and "scan.safetensors" not in refused):
            odd = f"shard {shards[0]!r:.80}" if shards else f"tensor {names[0]!r:.80}"
            raise RefusedError(
                "source.incomplete",
                f"{path} and the weight files differ: {odd}",
                hint="let the download finish, or download the missing shard again",
            )


def _hash_all(report: InspectReport, tell: Progress) -> None:
    total, done = sum(file.size for file in report.files), 0
    tell("hash", 0, total)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        tell("hash", done, total)

    for file in report.files:
        report.digests[file.path] = hash_file(file, tick)


def _check_origin(
    report: InspectReport, pins: Mapping[str, str] | None, commit: str | None
) -> None:
    report.hub = check_hub({file.path: file for file in report.files}, report.digests, commit)
    if pins is not None:
        require_pins(pins, report.digests)


def _check_upstream(report: InspectReport, source: Source) -> None:
    """Hold every piece of the publisher's evidence against the files."""
    at = report.upstream.at or datetime.now(UTC)
    report.proofs = check(report.upstream.items, source, report.upstream.anchors, at=at)


def _check_unpickled(report: InspectReport) -> None:
    """Read the record of a conversion from a pickle, which must speak of the weights here."""
    file = next((file for file in report.files if file.path == RECORD), None)
    if file is not None:
        record = parse_unpickled(bytes(open_view(file.place)))
        report.unpickled = require_unpickled(record, report.digests)
        names = ", ".join(item.source for item in record.files)
        report.findings.append(Finding(RECORD, f"{UNPICKLED} ({names:.200})"))


def _read_card(report: InspectReport) -> str:
    """Read licences and the front matter of the card; returns the card's title, if it has one."""
    title = ""
    for file in report.files:
        role = report.roles.get(file.path)
        if role not in {Role.CARD, Role.LICENCE}:
            continue
        # A longer one was refused by its parser; it must not be read into memory here.
        text = bytes(open_view(file.place)[:DOCUMENT_LIMIT]).decode("utf-8", "replace")
        sha256 = report.digests[file.path].sha256
        if role is Role.LICENCE:
            found = licence_text(file.path, text)
            report.licences.append(
                found or LicenceFound("LicenseRef-unknown", file.path, sha256, "declared")
            )
        elif file.path == "README.md":
            _collect(report, lambda text=text: report.card.update(parse_card(text)))  # type: ignore[misc]
            report.licences += card_licences(report.card, file.path, sha256)
            found_title = _TITLE.search(text)
            title = found_title[1].strip() if found_title else ""
    return title


def _conclude(report: InspectReport) -> None:
    """Add the findings that need everything else."""
    names = sorted({found.spdx for found in report.licences})
    if not names:
        report.findings.append(Finding("README.md", "no licence is stated anywhere"))
    if len(names) > 1:
        report.findings.append(
            Finding("licences", f"{len(names)} licences are stated: {', '.join(names)}")
        )
    bases = [
        base_licence(hint.party, hint.basis)
        for hint in (*report.lineage, *report.registry)
        if hint.relation == "derived_from" and not hint.basis.startswith("tokenizer.json")
    ]
    report.conflicts = licence_conflicts([*report.licences, *filter(None, bases)])
    report.findings += [Finding("licences", each.text) for each in report.conflicts]
    silent = silent_card(report.card, report.lineage)
    if silent:
        report.findings.append(Finding("README.md", silent))


def _document(report: InspectReport) -> dict[str, Any]:
    shape = report.architecture
    document: dict[str, Any] = {
        "format": FORMAT,
        "model": report.name,
        "verdict": "ready" if report.ready else "refused",
        "refusals": [
            {"code": error.code, "message": error.message, "hint": error.hint}
            for error in report.refusals
        ],
        "findings": [{"path": item.path, "text": item.text} for item in report.findings],
        "provenance": report.provenance,
        "scanners": [run.as_document() for run in report.scanners],
        "files": [_file_document(report, file) for file in report.files],
        "licences": [
            {"spdx": item.spdx, "place": item.place, "sha256": item.sha256, "status": item.status}
            for item in report.licences
        ],
        "lineage": [
            {
                "relation": hint.relation,
                "party": hint.party,
                "basis": hint.basis,
                "status": hint.status,
            }
            for hint in (*report.lineage, *report.registry)
        ],
        "licence_conflicts": [each.text for each in report.conflicts],
        "use": {
            "reference_model": report.reference_model,
            "scientific_use": report.scientific_use,
            "status": "declared",
        },
        "weights": {
            "files": sum(role is Role.WEIGHTS for role in report.roles.values()),
            "tensors": len(report.tensors),
            "parameters": report.parameters,
            "bytes": sum(tensor.end - tensor.start for tensor in report.tensors.values()),
            "types": sorted({tensor.dtype for tensor in report.tensors.values()}),
        },
    }
    if report.hub is not None:
        document["revision"] = report.hub.commit
    if shape is not None:
        document["architecture"] = {
            "kind": shape.kind,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "feed_forward": shape.feed_forward,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocabulary": shape.vocabulary,
            "context": shape.context,
            "tied": shape.tied,
        }
    if report.tokenizer is not None:
        document["tokenizer"] = {
            "model": report.tokenizer.model,
            "size": report.tokenizer.size,
            "special": len(report.tokenizer.special),
            "tags": report.tags,
        }
    return document


def _file_document(report: InspectReport, file: SourceFile) -> dict[str, Any]:
    refused = file.path in report.refused
    role = None if refused else report.roles.get(file.path)
    digests = report.digests[file.path]
    return {
        "path": file.path,
        "role": role.value if role else "refused",
        "size": file.size,
        "sha256": digests.sha256,
        "git_blob": digests.git_blob,
        "carried": role in _CARRIED,
    }


def _control_tokens(report: InspectReport) -> set[str]:
    shape, tokenizer = report.architecture, report.tokenizer
    if shape is None or tokenizer is None:
        return set()
    ids = {shape.bos_id, shape.pad_id, *shape.eos_ids, *(tokenizer.starts or ())}
    return {text for text, number in tokenizer.special.items() if number in ids}


def _repository_of(folder: Path) -> str | None:
    """Return ORG/NAME when the snapshot lies in the hub's own cache."""
    folder = folder.absolute()
    holder = folder.parent.parent.name
    if commit_of(folder) is None or not holder.startswith("models--"):
        return None
    return holder.removeprefix("models--").replace("--", "/", 1)


def _json(file: SourceFile, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    return parse_object(open_view(file.place), code=CONFIG_CODE, what=file.path, limit=limit)


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
