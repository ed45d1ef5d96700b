"""What is proved about the origin of a snapshot: pins of the institution, records of the hub.

Compares with the bytes what the institution fixed and what the client of the hub wrote down, and
writes the provenance part of the report (docs/design/bundle.md, 4). The hub's records never raise
the level: the client wrote them and nobody signed them. Evidence of publishers: `bundle.evidence`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.evidence.levels import SENTENCES, UNPICKLED, Proof, Source, level_of, uncovered
from bundle.scan.strict import open_view
from bundle.staging.source import Digests, SourceFile
from policy.errors import RefusedError

PIN_LIMIT = 4 * 1024 * 1024
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
HUB_FOLDERS = (".cache/huggingface/", ".huggingface/")
_RECORD = re.compile(r"(?:\.cache/huggingface|\.huggingface)/download/(.+)\.metadata")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubRecords:
    """The records of the hub client, compared with the bytes.

    `lfs` and `git` count the files whose SHA-256 or git blob digest is the recorded one; `commit`
    is the one commit of all records.
    """

    commit: str
    lfs: int
    git: int
    missing: tuple[str, ...]


def parse_pins(path: Path) -> dict[str, str]:
    """Read a pin file in the form of `sha256sum`: path to bare hex.

    Raises:
        RefusedError: `pin.malformed`.
        FaultError: `host.io`.

    """
    data = open_view(path)
    if len(data) > PIN_LIMIT:
        raise _malformed(path, f"it has {len(data):,} bytes; at most {PIN_LIMIT:,} are read")
    try:
        lines = bytes(data).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _malformed(path, "it is not UTF-8 text") from error
    pins: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        name = found[2].removeprefix("./") if found else ""
        if found is None or name in pins:
            what = "stands twice" if found else "is not `<64 hex>  <path>`"
            raise _malformed(path, f"line {number} {what}: {line!r:.100}")
        pins[name] = found[1]
    if not pins:
        raise _malformed(path, "it pins nothing")
    return pins


def require_pins(pins: Mapping[str, str], digests: Mapping[str, Digests]) -> None:
    """Check that exactly the pinned files are there, with the pinned digests.

    Records of the hub client need no pin: they do not travel and nothing reads them but us.

    Raises:
        RefusedError: `pin.mismatch`.

    """
    for path, wanted in sorted(pins.items()):
        found = digests.get(path)
        if found is None:
            raise _mismatch(f"{path!r:.160} is pinned and not there")
        if found.sha256 != wanted:
            raise _mismatch(
                f"{path!r:.160}: pinned sha256:{wanted}, found sha256:{found.sha256}",
            )
    for path in sorted(digests):
        if path not in pins and not path.startswith(HUB_FOLDERS):
            raise _mismatch(f"{path!r:.160} is there and not pinned")


def check_hub(
    files: Mapping[str, SourceFile], digests: Mapping[str, Digests], commit: str | None
) -> HubRecords | None:
    """Compare every record of the hub client with the bytes; None when there are no records.

    Args:
        files: The snapshot by path.
        digests: Of every file.
        commit: The commit that the hub's cache names the folder by, None for a local folder.

    Raises:
        RefusedError: `pin.mismatch`; a record tells of other bytes, or of another commit.

    """
    records: dict[str, tuple[str, str]] = {}
    for path, file in files.items():
        found = _RECORD.fullmatch(path)
        if found is not None:
            records[found[1]] = _record(path, file)
        elif file.blob is not None and commit is not None:
            records[path] = (commit, file.blob)
    if not records:
        return None
    commits = sorted({record[0] for record in records.values()})
    if len(commits) != 1:
        raise _mismatch(f"the hub's records tell of {len(commits)} commits: {commits!r:.200}")
    counts = {40: 0, 64: 0}
    for path, (_, etag) in sorted(records.items()):
        found_digests = digests.get(path)
        if found_digests is None:
            continue  # a file that was downloaded and then taken out; its pin decides
        ours = found_digests.sha256 if len(etag) == 64 else found_digests.git_blob  # noqa: PLR2004
        if ours != etag:
            raise _mismatch(f"{path!r:.160}: the hub announced {etag}, the bytes have {ours}")
        counts[len(etag)] += 1
    missing = tuple(
        path for path in sorted(digests) if path not in records and not path.startswith(HUB_FOLDERS)
    )
    return HubRecords(commits[0], counts[64], counts[40], missing)


def level_document(
    source: Source,
    pins: Mapping[str, str] | None,
    pin_digest: str | None,
    hub: HubRecords | None,
    proofs: Sequence[Proof] = (),
) -> dict[str, Any]:
    """Return the provenance part of the report: level, sentence, and what stands behind it."""
    level = level_of(source, proofs)
    document: dict[str, Any] = {"level": level, "sentence": SENTENCES[level], "evidence": []}
    evidence = document["evidence"]
    if pins is not None:
        evidence.append(
            {
                "kind": "pins",
                "status": "verified",
                "sha256": pin_digest,
                "text": f"all {len(pins)} pinned files are there with the pinned digests, and no "
                "other file",
            }
        )
    for proof in proofs:
        evidence += proof.as_documents()
    missing = uncovered(source, proofs)
    if proofs and missing:
        text = f"no signature covers {', '.join(missing)[:200]}"
        evidence.append({"kind": "coverage", "status": "declared", "text": text})
    if source.unpickled:
        document["unpickled"] = True
        evidence.append({"kind": "unpickled", "status": "declared", "text": UNPICKLED})
    evidence += _hub_lines(hub)
    return document


def _hub_lines(hub: HubRecords | None) -> list[dict[str, Any]]:
    if hub is None:
        return []
    text = (
        f"{hub.lfs} large files equal the SHA-256 and {hub.git} small files the git digest "
        f"that the hub announced, all for commit {hub.commit}"
    )
    if hub.missing:
        text += f"; no record for {', '.join(hub.missing)[:200]}"
    said = "the records were written by the download client and nobody signed them"
    return [
        {"kind": "hub-revision", "status": "verified", "text": text},
        {"kind": "hub-revision", "status": "declared", "text": said},
    ]


def _record(path: str, file: SourceFile) -> tuple[str, str]:
    """Read one record: commit, etag and time, a line each."""
    lines = bytes(open_view(file.place)[:1024]).decode("utf-8", "replace").split("\n")
    commit, etag = (line.strip().strip('"') for line in [*lines, "", ""][:2])
    if not _COMMIT.fullmatch(commit) or not _ETAG.fullmatch(etag):
        raise _mismatch(f"{path!r:.160} is not a record of the hub client (commit, digest, time)")
    return commit, etag


def _malformed(path: Path, reason: str) -> RefusedError:
    return RefusedError(
        "pin.malformed",
        f"{path.name!r:.100}: {reason}",
        hint="make it with: cd SNAPSHOT && find . -type f -not -path './.cache/*' | sort | "
        "xargs sha256sum",
    )


def _mismatch(reason: str) -> RefusedError:
    return RefusedError(
        "pin.mismatch",
        reason,
        hint="download the approved revision again, or have the new digests approved and pinned",
    )
