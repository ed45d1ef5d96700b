"""The manifest: what a release consists of, where it comes from, and which names a file may bear.

Decides whether bytes are a manifest of format `airgap-bundle/1`; FORMAT.md sections 4 to 6. Facts
from outside carry `status`: what bytes or signatures confirm is `verified`, the rest `declared`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import (
    Count,
    DigestText,
    Document,
    Instant,
    Name,
    Sha256Hex,
    Sha384Hex,
    Status,
    Text,
    Token,
    has_hidden,
)
from policy.errors import RefusedError
from policy.terms import Digest

FORMAT: Literal["airgap-bundle/1"] = "airgap-bundle/1"
MANIFEST_LIMIT = 4 * 1024 * 1024
CHUNK_SIZE: Literal[4194304] = 4194304
MAX_FILES = 16_384
MAX_PATH = 255
MAX_COMPONENT = 128

SUMS = "META/SHA256SUMS"
REPORT = "META/report.json"

Profile = Literal["default", "cnsa2"]
Role = Literal[
    # META, by place
    "sums",
    "report",
    "attestation",
    "evidence",
    "sbom",
    "policy",
    "vectors",
    # payload, by strict parser
    "config",
    "tokenizer",
    "template",
    "graphs",
    "onnx",
    "external-data",
    "wheel",
    "installer",
    "document",
]
# In the order in which the groups stand in the body; within a group, bytewise by path.
GROUPS: tuple[tuple[str, Role | None], ...] = (
    (SUMS, "sums"),
    (REPORT, "report"),
    ("META/attest/", "attestation"),
    ("META/evidence/", "evidence"),
    ("META/sbom/", "sbom"),
    ("META/policy/", "policy"),
    ("META/vectors/", "vectors"),
    ("payload/", None),
)
META_ROLES = frozenset(role for _, role in GROUPS if role)
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))]
)


class Licence(Document):
    """A licence and how we know it; `text_digest` is that of the licence text."""

    spdx: Text
    text_digest: DigestText | None = None
    status: Status


class LicenceFound(Document):
    """One licence statement, and the place where it was found."""

    spdx: Text
    place: Text
    sha256: Sha256Hex | None = None
    status: Status


class Supplier(Document):
    """The legal person that the model comes from; `jurisdiction` is an ISO 3166 code or `none`."""

    legal_name: Text
    jurisdiction: Text
    status: Status


class Lineage(Document):
    """One party in the making of the model, such as `developer` or `distributor`."""

    relation: Token
    party: Text
    status: Status


class ModelEntry(Document):
    """One model: identity, provenance, licence, supplier and intended use."""

    id: Name
    source: Text
    revision: Text
    provenance_level: Literal["L0", "L1", "L2", "L3", "L4"]
    precisions: tuple[Token, ...] = Field(min_length=1)
    licence: Licence
    licences_found: tuple[LicenceFound, ...] = ()
    supplier: Supplier
    base_models: tuple[Text, ...] = ()
    lineage: tuple[Lineage, ...] = ()
    modalities: tuple[Token, ...] = Field(min_length=1)
    intended_use: Text
    reference_model: bool
    scientific_use: bool


class Origin(Document):
    """Where a file was before; `git_blob` is a SHA-1 and pins nothing by itself."""

    url: Text | None = None
    revision: Text | None = None
    sha256: Sha256Hex | None = None
    git_blob: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None


class FileEntry(Document):
    """One file of the body; `offset` and `size` in bytes, counted from the body's first byte."""

    path: str
    role: Role
    media_type: Annotated[str, Field(pattern=r"^[a-z0-9.+-]{1,64}/[a-zA-Z0-9.+-]{1,96}$")]
    size: Count
    offset: Count
    sha256: Sha256Hex
    sha384: Sha384Hex | None = None
    fsverity: DigestText | None = None
    origin: Origin | None = None
    derived_from: tuple[DigestText, ...] = ()

    @property
    def checked(self) -> Digest:
        """The digest that verification uses: SHA-384 in the profile `cnsa2`, else SHA-256."""
        if self.sha384 is not None:
            return Digest("sha384", bytes.fromhex(self.sha384))
        return Digest("sha256", bytes.fromhex(self.sha256))


class Body(Document):
    """The sealed byte range after the head, and the tree over its chunks."""

    size: Count
    chunk_size: Literal[4194304]
    hash: Literal["sha256", "sha384"]
    root: Annotated[str, Field(pattern=r"^([0-9a-f]{64}|[0-9a-f]{96})$")]
    leaves: Count


class Base(Document):
    """The release that a delta builds on."""

    bundle_id: Name
    manifest_digest: DigestText


class Runtime(Document):
    """One set of wheels for one kind of machine."""

    target: Name
    python: Text
    os: Token
    arch: Token
    accelerator: Token
    packages: dict[str, str]


class Evidence(Document):
    """A document of somebody else that travels along, and what staging concluded from it."""

    kind: Token
    path: str
    sha256: Sha256Hex
    subject: Text
    summary: Text


class Parity(Document):
    """The claim that a converted graph answers like its source, with the vectors to repeat it."""

    model: Name
    precision: Token
    provider: Name
    tolerance: Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,12})?$")]
    vectors: str


class Limits(Document):
    """What the release needs of a host, as measured on the staging side; bytes."""

    memory_bytes: Count | None = None


class Release(Document):
    """All that a manifest says beside the list of files; what `archive.write_archive` is given."""

    format: Literal["airgap-bundle/1"] = FORMAT
    profile: Profile = "default"
    bundle_id: Name
    name: Name
    version: Name
    created: Instant
    not_before: Instant
    expires: Instant
    epoch: Count
    base: Base | None = None
    models: tuple[ModelEntry, ...] = Field(default=(), max_length=64)
    runtimes: tuple[Runtime, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    parity: tuple[Parity, ...] = ()
    limits: Limits = Limits()


class Manifest(Release):
    """A complete manifest. Its digest ("bundle digest") is the identity of the release."""

    body: Body
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=MAX_FILES)

    @property
    def digest(self) -> Digest:
        """SHA-256 over the canonical form, in every profile."""
        return Digest.of(canonical(self))

    def find(self, path: str) -> FileEntry | None:
        """Return the entry of `path`, if there is one."""
        files, index = self._index
        if files is not self.files:  # `model_copy` takes the cache along
            index = {entry.path: entry for entry in self.files}
        return index.get(path)

    def model(self, model_id: str) -> ModelEntry | None:
        """Return the model with that id, if there is one."""
        return next((model for model in self.models if model.id == model_id), None)

    def published_weights(self, model_id: str) -> tuple[FileEntry, ...]:
        """Return the weight files of a model that travel as the source had them, byte for byte."""
        return tuple(
            entry
            for entry in self.files
            if entry.path.startswith(f"payload/{model_id}/")
            and entry.role == "external-data"
            and entry.origin is not None
            and entry.origin.sha256 == entry.sha256
        )

    @cached_property
    def _index(self) -> tuple[tuple[FileEntry, ...], dict[str, FileEntry]]:
        return self.files, {entry.path: entry for entry in self.files}


def canonical(manifest: Manifest) -> bytes:
    """Return the one byte form of a manifest; a field without a value is absent, never null."""
    return canonical_json(manifest.model_dump(mode="json", exclude_none=True))


def parse_manifest(raw: bytes) -> Manifest:
    """Turn untrusted bytes into a manifest.

    Raises:
        RefusedError: `manifest.canonical`, `manifest.version`, `manifest.schema` or
            `manifest.paths`, in this order of checks.

    """
    value = parse_canonical(
        raw, code="manifest.canonical", what="the manifest", limit=MANIFEST_LIMIT
    )
    _require_version(value)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("manifest.schema", f"the manifest: {first_problem(error)}") from error
    if canonical(manifest) != raw:  # an explicit null, or a default written in two ways
        raise RefusedError(
            "manifest.canonical", "the manifest writes a field in a form that staging never writes"
        )
    require_paths(entry.path for entry in manifest.files)
    _require_consistent(manifest)
    return manifest


def body_key(path: str) -> tuple[int, bytes]:
    """Return the sort key of the body order; RefusedError `manifest.paths` outside all groups."""
    for rank, (prefix, _) in enumerate(GROUPS):
        if path == prefix or (prefix.endswith("/") and path.startswith(prefix)):
            return rank, path.encode()
    raise RefusedError(
        "manifest.paths", f"{path!r:.80} lies in no folder that a bundle has (META/…, payload/…)"
    )


def require_paths(paths: Iterable[str]) -> None:
    """Refuse a path that some file system would read in another way, or two that would collide.

    Raises:
        RefusedError: `manifest.paths`.

    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        _require_path(path)
        key = _fold(path)
        if key in seen:
            raise RefusedError(
                "manifest.paths", f"{path!r:.80} and {seen[key]!r:.80} are one name on some host"
            )
        seen[key] = path
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            other = folders.setdefault(_fold(folder), folder)
            if other != folder:
                raise RefusedError(
                    "manifest.paths",
                    f"folders {folder!r:.80} and {other!r:.80} are one on some host",
                )
    for key in seen.keys() & folders.keys():
        raise RefusedError("manifest.paths", f"{seen[key]!r:.80} is both a file and a folder")


def first_problem(error: ValidationError) -> str:
    """Say where and what the first problem of a document is, without echoing it at length."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "document"
    return f"{place:.120}: {problem['msg']:.160}"


def _require_version(value: Any) -> None:
    if not isinstance(value, dict):
        raise RefusedError("manifest.schema", "the manifest is not a JSON object")
    found = value.get("format")
    if isinstance(found, str) and found != FORMAT:
        raise RefusedError(
            "manifest.version",
            f"the manifest has format {found!r:.60}; this program reads {FORMAT}",
            hint="carry a newer airgap to this host, or build with the version that runs here",
        )


def _require_path(path: str) -> None:
    problem = _path_problem(path)
    if problem:
        raise RefusedError("manifest.paths", f"{path!r:.80} {problem}")


def _path_problem(path: str) -> str:
    if not 1 <= len(path.encode("utf-8", "surrogatepass")) <= MAX_PATH:
        return f"is not 1 to {MAX_PATH} bytes long"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode form NFC"
    if has_hidden(path) or "\\" in path or ":" in path:
        return "holds a control or bidirectional character, a backslash or a colon"
    return next(filter(None, map(_component_problem, path.split("/"))), "")


def _component_problem(part: str) -> str:
    if part in {"", ".", ".."}:
        return "has an empty, `.` or `..` component"
    if len(part.encode("utf-8", "surrogatepass")) > MAX_COMPONENT:
        return f"has a component of more than {MAX_COMPONENT} bytes"
    if part[-1] in ". ":
        return "has a component that ends with a dot or a space"
    if part.split(".", maxsplit=1)[0].rstrip(" ").lower() in _DEVICES:
        return "names a device of some host"
    return ""


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _require_consistent(manifest: Manifest) -> None:
    """Check what one field says about another; all of it is the staging side's to get right."""
    problem = (
        _profile_problem(manifest)
        or _file_problem(manifest)
        or _model_problem(manifest)
        or _reference_problem(manifest)
        or ""
    )
    if not problem and not manifest.not_before < manifest.expires:
        problem = "it expires before it begins to hold"
    if problem:
        raise RefusedError("manifest.schema", f"the manifest: {problem}")


def _profile_problem(manifest: Manifest) -> str:
    """Say where a digest is of another kind than the profile demands."""
    hashed = "sha384" if manifest.profile == "cnsa2" else "sha256"
    if (
        manifest.body.hash != hashed
        or len(manifest.body.root) != {"sha256": 64, "sha384": 96}[hashed]
    ):
        return f"profile {manifest.profile} demands a tree of {hashed}"
    for entry in manifest.files:
        if (entry.sha384 is None) == (manifest.profile == "cnsa2"):
            return f"profile {manifest.profile} and the digests of {entry.path!r:.80} differ"
    return ""


def _file_problem(manifest: Manifest) -> str:
    keys = [body_key(entry.path) for entry in manifest.files]
    if keys != sorted(keys):
        return "files do not stand in the order of the body"
    for entry, (rank, _) in zip(manifest.files, keys, strict=True):
        role = GROUPS[rank][1]
        if (role is None and entry.role in META_ROLES) or (role and entry.role != role):
            return f"{entry.path!r:.80} cannot have the role {entry.role}"
    if manifest.files[0].path != SUMS or all(e.path != REPORT for e in manifest.files):
        return f"{SUMS} or {REPORT} is missing"
    return ""


def _model_problem(manifest: Manifest) -> str:
    ids = [model.id for model in manifest.models]
    if len({model_id.casefold() for model_id in ids}) != len(ids) or "wheels" in ids:
        return "a model id stands twice, or is the reserved `wheels`"
    if not ids and not manifest.runtimes:
        return "it holds neither a model nor a runtime"
    folders = {
        entry.path.split("/")[1] for entry in manifest.files if entry.path.startswith("payload/")
    }
    for model_id in ids:
        if manifest.find(f"payload/{model_id}/graphs.json") is None:
            return f"payload/{model_id}/graphs.json is missing"
    for folder in sorted(folders - {"wheels", *ids}):
        return f"payload/{folder:.64} belongs to no model"
    return ""


def _reference_problem(manifest: Manifest) -> str:
    for item in manifest.evidence:
        entry = manifest.find(item.path)
        if entry is None or entry.role != "evidence" or entry.sha256 != item.sha256:
            return f"evidence {item.path!r:.80} is not a listed file with that digest"
    for claim in manifest.parity:
        entry = manifest.find(claim.vectors)
        model = manifest.model(claim.model)
        if entry is None or entry.role != "vectors" or model is None:
            return f"parity of {claim.model} names no listed model or vectors"
        if claim.precision not in model.precisions:
            return f"parity of {claim.model} names a precision that the model does not have"
    return ""
