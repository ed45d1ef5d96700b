"""`airgap verify --deep`: the upstream checks once more, offline, from what the bundle carries.

Decides whether the sealed evidence, held against the sealed digests of the source and the anchors
of this host (or those that the staging side sealed), still proves the level that the release
claims. Keys and certificates need the base install; an entry in a Sigstore log needs the library,
and where that is missing the piece is named as not repeated and the answer is no success.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bundle.canonical import parse_canonical
from bundle.evidence.anchors import ANCHORS_LIMIT, Anchors, parse_anchors
from bundle.evidence.anchors import PATH as ANCHORS
from bundle.evidence.levels import (
    KINDS,
    SENTENCES,
    UNPICKLED,
    Item,
    Kind,
    Proof,
    Source,
    check_one,
    level_of,
)
from bundle.evidence.statements import parse_checksums
from bundle.evidence.summary import LEVELS, statement
from bundle.manifest import REPORT, Evidence, Manifest, ModelEntry
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

REPORT_LIMIT = 16 * 1024 * 1024
HUB_FOLDERS = (".cache/huggingface/", ".huggingface/")
_NEEDED = frozenset(["config", "tokenizer", "card", "licence", "weights", "weights-index"])

Read = Callable[[str], bytes]
"""Gives the bytes of a listed small file of a bundle whose seal holds."""


@dataclass(frozen=True, slots=True)
class DeepReport:
    """What was repeated and what was not.

    `anchors` is `host` or `sealed`: whose word on publishers was taken. `level` is what the
    repeated checks prove; `claimed` what the release says. `anchors_digest` is that of the
    anchors in canonical form.
    """

    claimed: str
    level: str
    anchors: str
    anchors_digest: str
    proofs: tuple[Proof, ...]
    verified: tuple[str, ...]
    declared: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]  # piece, and why it was not repeated

    @property
    def complete(self) -> bool:
        """Whether every piece was checked again here."""
        return not self.missing

    def as_document(self) -> dict[str, Any]:
        """Return the JSON form, `airgap/deep-report/1`."""
        return {
            "format": "airgap/deep-report/1",
            "claimed": self.claimed,
            "level": self.level,
            "sentence": SENTENCES[self.level],
            "anchors": self.anchors,
            "anchors_digest": self.anchors_digest,
            "complete": self.complete,
            "verified": [*self.verified, *(p.verified for p in self.proofs if p.verified)],
            "declared": [*self.declared, *(p.declared for p in self.proofs if p.declared)],
            "not_repeated": [{"name": name, "reason": reason} for name, reason in self.missing],
        }


def verify_deep(manifest: Manifest, read: Read, anchors: Anchors | None = None) -> DeepReport:
    """Repeat the checks of the upstream evidence of every model.

    Args:
        manifest: Verified.
        read: Of the same bundle.
        anchors: Of this host; None takes those that were sealed with the evidence, which proves
            that the staging side saw what it says, by the standard that the approvers signed.

    Raises:
        RefusedError: `evidence.*`, `pin.mismatch`.

    """
    if not manifest.models:
        raise RefusedError(
            "evidence.summary",
            "the bundle carries no model, so there is no evidence to repeat",
            hint="airgap verify, without --deep",
        )
    sealed = manifest.find(ANCHORS)
    believed = anchors
    if believed is None:
        raw = read(ANCHORS) if sealed is not None and sealed.size <= ANCHORS_LIMIT else b""
        believed = parse_anchors(raw) if raw else Anchors()
    whose = "host" if anchors is not None else "sealed"
    found = [_repeat(model, manifest, read, believed) for model in manifest.models]
    several = len(found) > 1

    def named(texts: Callable[[_Repeated], tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(
            f"{each.model}: {text}" if several else text for each in found for text in texts(each)
        )

    return DeepReport(
        min((model.provenance_level for model in manifest.models), key=LEVELS.index),
        min((each.level for each in found), key=LEVELS.index),
        whose,
        str(Digest.of(believed.to_bytes())),
        tuple(proof for each in found for proof in each.proofs),
        named(lambda each: each.verified),
        named(lambda each: each.declared),
        tuple(missing for each in found for missing in each.missing),
    )


@dataclass(frozen=True, slots=True)
class _Repeated:
    """What was repeated of one model."""

    model: str
    level: str
    proofs: tuple[Proof, ...]
    verified: tuple[str, ...]
    declared: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def _repeat(model: ModelEntry, manifest: Manifest, read: Read, believed: Anchors) -> _Repeated:
    """Repeat the checks of one model; its evidence must prove what it claims."""
    evidence = [item for item in manifest.evidence if item.subject == model.id]
    source = _source(model.id, manifest, evidence, read)
    proofs: list[Proof] = []
    missing: list[tuple[str, str]] = []
    for item in _items(evidence, read):
        try:
            proofs.append(check_one(item, source, believed, at=manifest.created))
        except FaultError as error:
            missing.append((item.name, error.message))
    level = level_of(source, proofs)
    if not missing and LEVELS.index(level) < LEVELS.index(model.provenance_level):
        raise RefusedError(
            "evidence.level",
            f"{model.id} claims {model.provenance_level}; its evidence proves {level}",
            hint="refuse this release, or name the publisher's anchors with --publishers",
        )
    verified = [f"SHA-256 of {len(source.files)} files of the source, as sealed"]
    if source.pinned:
        verified.append("the pin file of the institution names exactly these files")
    hub = _hub(evidence, source, read)
    verified += [f"{hub} records of the hub's client name the same SHA-256"] if hub else []
    declared = ["the records of the hub's client, which nobody signed"] if hub else []
    declared += [UNPICKLED] if source.unpickled else []
    return _Repeated(
        model.id, level, tuple(proofs), tuple(verified), tuple(declared), tuple(missing)
    )


def deep_summary(manifest: Manifest, report: DeepReport, *, now: datetime) -> bytes:
    """Return the verification summary of this host about the bundle; only of a complete check.

    Raises:
        FaultError: `host.extra`; a piece was not repeated, so nothing can be summed up.

    """
    require_complete(report)
    return statement(
        resource=f"{manifest.bundle_id}@{manifest.version}",
        subjects={"META/manifest.json": manifest.digest.hex},
        inputs={item.path: item.sha256 for item in manifest.evidence},
        level=report.level,
        moment=now,
        policy=[report.anchors_digest.removeprefix("sha256:")],
    )


def require_complete(report: DeepReport) -> None:
    """Raise `host.extra` when a piece of evidence could not be repeated on this host."""
    if report.missing:
        name, reason = report.missing[0]
        raise FaultError(
            "host.extra",
            f"{len(report.missing)} of {len(report.missing) + len(report.proofs)} pieces of "
            f"evidence were not checked again here; {name}: {reason}",
            hint="the seal holds all the same; repeat it on a machine with the extra `staging`, "
            "which needs no network",
        )


def _source(model: str, manifest: Manifest, evidence: list[Evidence], read: Read) -> Source:
    """Rebuild what the evidence of a model speaks of, from sealed documents that must agree.

    The report tells which files of the source are needed. It is about one model; of another one
    every file is taken for needed, and for weights.
    """
    found = next((item for item in evidence if item.kind == "source-digests"), None)
    if found is None:
        raise RefusedError(
            "evidence.summary",
            "the bundle carries no digests of its source, so nothing can be repeated",
            hint="ask the staging host for a release that was built by this version",
        )
    files = parse_checksums(read(found.path), what=found.path)
    report = _object(
        parse_canonical(read(REPORT), code="evidence.summary", what=REPORT, limit=REPORT_LIMIT)
    )
    listed = report.get("files")
    entries = [item for item in (listed if isinstance(listed, list) else [])
               if isinstance(item, dict)]  # fmt: skip
    about = len(manifest.models) == 1 or report.get("model") == model
    listed_files = {str(item.get("path")): str(item.get("sha256")) for item in entries}
    if about and listed_files != files:
        raise RefusedError("evidence.summary", f"{REPORT} and {found.path} tell of different files")
    _require_payload(model, manifest, set(files.values()))
    roles = {str(item["path"]): str(item.get("role")) for item in entries if about}
    pins = next((item for item in evidence if item.kind == "pins"), None)
    if pins is not None:
        _require_pins(parse_checksums(read(pins.path), what=pins.path), files)
    given = {item.sha256 for item in evidence if item.kind.partition("-")[0] in KINDS}
    provenance = _object(report.get("provenance"))
    return Source(
        files=files,
        needed=frozenset(p for p in files if not about or roles.get(p) in _NEEDED),
        weights=frozenset(p for p in files if not about or roles.get(p) == "weights"),
        exempt=frozenset(p for p, d in files.items() if p.startswith(HUB_FOLDERS) or d in given),
        pinned=pins is not None,
        unpickled=bool(provenance.get("unpickled")),
    )


def _items(evidence: list[Evidence], read: Read) -> list[Item]:
    signatures = {
        item.path.removesuffix(".signature"): read(item.path)
        for item in evidence
        if item.kind.endswith("-signature")
    }
    kinds: Mapping[str, Kind] = {kind: kind for kind in KINDS}
    return [
        Item(kinds[item.kind], item.path.rpartition("/")[2], read(item.path),
             signatures.get(item.path))
        for item in evidence
        if item.kind in kinds
    ]  # fmt: skip


def _require_payload(model: str, manifest: Manifest, known: set[str]) -> None:
    """Check that every file of a model that travels comes from a file of its source."""
    for entry in manifest.files:
        if not entry.path.startswith(f"payload/{model}/"):
            continue
        sources = {digest.removeprefix("sha256:") for digest in entry.derived_from}
        if entry.origin is not None and entry.origin.sha256 is not None:
            sources.add(entry.origin.sha256)
        if sources - known:
            raise RefusedError(
                "evidence.subject", f"{entry.path!r:.160} comes from a file that was not inspected"
            )


def _require_pins(pins: Mapping[str, str], files: Mapping[str, str]) -> None:
    for path in sorted({*pins, *(p for p in files if not p.startswith(HUB_FOLDERS))}):
        if pins.get(path) != files.get(path):
            raise RefusedError(
                "evidence.subject",
                f"{path!r:.160}: pinned {pins.get(path, 'not at all')}, "
                f"inspected {files.get(path, 'not at all')}",
            )


def _hub(evidence: list[Evidence], source: Source, read: Read) -> int:
    """Hold the hub's records of large files against the digests; returns how many there are."""
    count = 0
    for item in evidence:
        if item.kind != "hub-revision":
            continue
        path = item.path.removeprefix("META/evidence/hub/").removesuffix(".metadata")
        lines = read(item.path)[:1024].decode("utf-8", "replace").split("\n")
        etag = lines[1].strip().strip('"') if len(lines) > 1 else ""
        if len(etag) != 64 or path not in source.files:  # noqa: PLR2004 - a git digest is SHA-1
            continue
        if etag != source.files[path]:
            raise RefusedError(
                "evidence.subject", f"{path!r:.160}: the hub announced {etag}, another was sealed"
            )
        count += 1
    return count


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def deep_lines(report: DeepReport) -> list[tuple[str, str]]:
    """Return the rows for a screen: verified and declared apart."""
    whose = {"host": "of this host", "sealed": "sealed by the staging side"}[report.anchors]
    rows = [
        ("provenance", f"{report.level}: {SENTENCES[report.level]}"),
        ("anchors", whose),
    ]
    document = report.as_document()
    rows += [("verified", text) for text in document["verified"]]
    rows += [("declared", text) for text in document["declared"]]
    rows += [("NOT repeated", f"{name}: {reason}") for name, reason in report.missing]
    return rows
