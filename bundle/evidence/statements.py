"""What publishers say about files without model signing: checksum files, in-toto statements, SLSA.

Decides which files such a document speaks of, and refuses one that speaks of other bytes under the
same name. A signature over it is checked elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bundle.evidence.anchors import Anchors
from bundle.scan.strict import parse_object
from policy.errors import RefusedError

SLSA = "https://slsa.dev/provenance/v1"
CHECKSUMS_LIMIT = 4 * 1024 * 1024
STATEMENT_LIMIT = 8 * 1024 * 1024
MAX_SUBJECTS = 4096
_GNU = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_BSD = re.compile(r"SHA256 \((.+)\) = ([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Build:
    """Verified provenance: who built, from what."""

    builder: str
    source: str
    covers: frozenset[str]


def covered_by_checksums(data: bytes, files: Mapping[str, str], *, what: str) -> frozenset[str]:
    """Return the paths whose SHA-256 a publisher's checksum file lists.

    Raises:
        RefusedError: `evidence.malformed`; `evidence.subject`, a listed file has other bytes, or
            none of them is here.

    """
    listed = parse_checksums(data, what=what)
    found = frozenset(path for path in listed if path in files)
    for path in sorted(found):
        if files[path] != listed[path]:
            raise _other(what, f"{path!r:.160}: sha256:{listed[path]}, found sha256:{files[path]}")
    if not found:
        raise _other(what, "none of the files that it lists is here")
    return found


def parse_checksums(data: bytes, *, what: str) -> dict[str, str]:
    """Read the form of `sha256sum`, plain or with `--tag`; RefusedError `evidence.malformed`."""
    if len(data) > CHECKSUMS_LIMIT:
        raise _bad(what, f"it has {len(data):,} bytes; at most {CHECKSUMS_LIMIT:,} are read")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _bad(what, "it is not UTF-8 text") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        gnu, bsd = _GNU.fullmatch(line), _BSD.fullmatch(line)
        name, digest = (gnu[2], gnu[1]) if gnu else (bsd[1], bsd[2]) if bsd else ("", "")
        name = name.removeprefix("./")
        if not name or name in listed:
            raise _bad(what, f"line {number} is no line of `sha256sum`, or a name stands twice")
        listed[name] = digest
    return listed


def covered_by_statement(payload: bytes, files: Mapping[str, str], *, what: str) -> frozenset[str]:
    """Return the paths that have the digest of a subject of the in-toto statement.

    Raises:
        RefusedError: `evidence.malformed`; `evidence.subject`, a subject of a name that is here has
            another digest, or no subject is here.

    """
    return _covers(_statement(payload, what), files, what)


def read_build(payload: bytes, files: Mapping[str, str], anchors: Anchors, *, what: str) -> Build:
    """Check SLSA provenance: its subjects are here, its builder and source are those expected.

    Raises:
        RefusedError: As above; `evidence.identity`, another builder or source; `evidence.anchor`.

    """
    value = _statement(payload, what)
    if value.get("predicateType") != SLSA:
        raise _bad(what, f"its predicate is {value.get('predicateType')!r:.80}, not {SLSA}")
    predicate = _object(value.get("predicate"))
    run = _object(predicate.get("runDetails"))
    builder = _object(run.get("builder")).get("id")
    definition = _object(predicate.get("buildDefinition"))
    dependencies = definition.get("resolvedDependencies")
    sources = [
        str(item.get("uri"))
        for item in (dependencies if isinstance(dependencies, list) else [])
        if isinstance(item, dict) and item.get("uri")
    ]
    if not isinstance(builder, str) or not sources:
        raise _bad(what, "it names no builder, or no source that the build was made from")
    if not anchors.builders:
        raise RefusedError(
            "evidence.anchor",
            f"{what}: provenance counts only for a builder that this site expects; none is given",
            hint="give --builder-id and --builder-source, or a --publishers file",
        )
    for each in anchors.builders:
        for source in sources:
            if each.id == builder and source.partition("@")[0] == each.source:
                return Build(builder, source, _covers(value, files, what))
    raise RefusedError(
        "evidence.identity",
        f"{what}: built by {builder!r:.120} from {sources[0]!r:.120}; expected "
        + "; ".join(f"{each.id} from {each.source}" for each in anchors.builders)[:240],
        hint="evidence counts only from the builder and source that this site names",
    )


def _statement(payload: bytes, what: str) -> dict[str, Any]:
    value = parse_object(
        memoryview(payload), code="evidence.malformed", what=what, limit=STATEMENT_LIMIT
    )
    subjects = value.get("subject")
    if value.get("_type") != "https://in-toto.io/Statement/v1" or not isinstance(subjects, list):
        raise _bad(what, "it is not an in-toto statement of version 1")
    if not 1 <= len(subjects) <= MAX_SUBJECTS:
        raise _bad(what, f"it has {len(subjects):,} subjects")
    return value


def _covers(value: Mapping[str, Any], files: Mapping[str, str], what: str) -> frozenset[str]:
    wanted: set[str] = set()
    for item in value["subject"]:
        subject = _object(item)
        digest = _object(subject.get("digest")).get("sha256")
        if not isinstance(digest, str) or not _HEX.fullmatch(digest):
            continue  # a subject by another hash speaks of nothing that we can compare
        name = str(subject.get("name", "")).removeprefix("./")
        if name in files and files[name] != digest:
            raise _other(what, f"{name!r:.160}: sha256:{digest}, found sha256:{files[name]}")
        wanted.add(digest)
    found = frozenset(path for path, digest in files.items() if digest in wanted)
    if not found:
        raise _other(what, "no file here has the digest of a subject")
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _other(what: str, reason: str) -> RefusedError:
    return RefusedError(
        "evidence.subject",
        f"{what}: {reason}",
        hint="take the evidence of this very revision, or leave it out",
    )


def _bad(what: str, reason: str) -> RefusedError:
    return RefusedError("evidence.malformed", f"{what}: {reason}")
