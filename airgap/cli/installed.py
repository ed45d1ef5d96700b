"""`airgap inspect` of an installed release: what it is, checked again at this moment.

Every file is hashed and the seal is held against today's trust root before a word is said about the
weights; where either fails, nothing is. Whose bytes they are rests on the upstream evidence in the
bundle, which is checked again too (docs/design/bundle.md, 6).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airgap.cli.common import show
from policy.errors import AirgapError, RefusedError

if TYPE_CHECKING:
    from airgap.install import InstalledBundle
    from bundle.evidence.deep import DeepReport
    from bundle.manifest import Manifest, ModelEntry
    from bundle.statement import VerifiedSeal
    from bundle.trust import Trust
    from bundle.vectors import Vectors

PARITY = "META/attest/parity.json"
PARITY_LIMIT = 16 * 1024 * 1024
_PUBLISHED = ("L2", "L3", "L4")  # somebody's key, and not the institution's own pin, says so


def find_release(source: Path, root: Path) -> InstalledBundle | None:
    """Return the installed release that `source` names: its folder, or a word of `airgap list`.

    None where it is a folder or a file of another kind.

    Raises:
        RefusedError: `store.missing`, `start.digest`.

    """
    from airgap.install import Store

    if (source / "META" / "manifest.json").is_file():
        folder = source.resolve()
        return Store(folder.parent.parent).get(folder.name)
    if source.exists() or source.is_symlink() or len(source.parts) != 1:
        return None
    if not (root / "store").is_dir():
        return None
    try:
        return Store(root / "store").get(str(source))
    except RefusedError as error:
        if error.code != "store.missing":
            raise
        hint = "airgap list tells what is installed; name a snapshot by its folder: ./NAME"
        raise RefusedError(error.code, error.message, hint=hint) from error


def show_installed(bundle: InstalledBundle, *, root: Path, json: bool) -> int:
    """Check the release again and show what it is.

    Raises:
        RefusedError: `start.digest`, a file is not the one that was installed; `seal.*`, its seal
            does not hold under the trust root of `root`.

    """
    from airgap.cli.shown import bar, table
    from airgap.install import verify_installed
    from bundle.trust import load_trust
    from bundle.vectors import parse_vectors

    trust = load_trust(root / "trust")
    with bar("hash") as progress:
        manifest = verify_installed(bundle.folder, progress)
    seal = _seal(bundle, trust)

    def read(path: str) -> bytes:
        return (bundle.folder / path).read_bytes()

    deep, problems = _repeated(manifest, read)
    figures = _figures(read(PARITY)) if manifest.find(PARITY) is not None else []
    precisions = [parse_vectors(read(claim.vectors), claim) for claim in manifest.parity]
    runs, why = _runs(bundle, root) if manifest.models else (None, [])
    document = {
        "format": "airgap/installed/1",
        "verdict": "sealed and whole",
        "bundle": str(bundle.digest),
        "name": manifest.name,
        "version": manifest.version,
        "approvers": list(seal.approvers),
        "builder": seal.builder,
        "models": [_model(manifest, model, deep) for model in manifest.models],
        "precisions": [_precision(each, figures) for each in precisions],
        "runs": runs,
        "alarms": [*problems, *_alarms(bundle, trust), *why, *_damaged(bundle)],
    }
    show(document, table(_rows(document)), json=json)
    return 0


def _seal(bundle: InstalledBundle, trust: Trust) -> VerifiedSeal:
    """Return the seal, which must speak of this manifest and count under today's root."""
    from bundle.envelope import ENVELOPE_SIZE, parse_seal
    from bundle.keys import read_limited
    from bundle.statement import require_matches, verify_seal

    path = bundle.folder / "META/envelope.dsse.json"
    raw = read_limited(path, ENVELOPE_SIZE, code="start.digest", what="the seal")
    seal = verify_seal(parse_seal(raw), trust.document, trust.revocations)
    require_matches(
        seal.statement, bundle.manifest, (bundle.folder / "META/manifest.json").read_bytes()
    )
    return seal


def _repeated(
    manifest: Manifest, read: Callable[[str], bytes]
) -> tuple[DeepReport | None, list[str]]:
    """Check the upstream evidence again; None, and why, where it does not prove what is claimed."""
    from bundle.evidence.deep import verify_deep

    if not manifest.models:
        return None, []
    try:
        return verify_deep(manifest, read), []
    except RefusedError as error:
        return None, [f"{error.code}: {error.message}"]


def _damaged(bundle: InstalledBundle) -> list[str]:
    """Say which other release of its store is damaged: that one will not start."""
    from airgap.install import Store

    _, damaged = Store(bundle.folder.parent.parent).survey()
    return [f"{error.code}: {error.message}" for error in damaged.values()]


def _alarms(bundle: InstalledBundle, trust: Trust) -> list[str]:
    """Say what keeps this release from running today, and what the list calls for."""
    from airgap.install.standing import require_standing, require_valid

    now = datetime.now(UTC)
    found: list[str] = []
    try:
        found += require_standing(bundle, trust, now=now)
        require_valid(bundle, now)
    except RefusedError as error:
        found.append(f"{error.code}: {error.message}")
    return found


def _model(manifest: Manifest, model: ModelEntry, deep: DeepReport | None) -> dict[str, Any]:
    from bundle.evidence.levels import SENTENCES

    files = manifest.published_weights(model.id)
    level = "L0" if deep is None else deep.level
    missing = () if deep is None else deep.missing
    proven = level in _PUBLISHED and not missing
    return {
        "id": model.id,
        "source": model.source,
        "revision": model.revision,
        "claimed": model.provenance_level,
        "provenance": level,
        "sentence": SENTENCES[level],
        "not_repeated": [{"name": name, "reason": reason} for name, reason in missing],
        "weights": ("publisher" if proven else "source") if files else "converted",
        "files": [
            {"path": entry.path.rpartition("/")[2], "sha256": entry.sha256} for entry in files
        ],
        "scientific_use": model.scientific_use,
    }


def _figures(raw: bytes) -> list[dict[str, Any]]:
    """Return the measurements of the parity statement, which the seal covers."""
    from bundle.scan.strict import parse_object

    value = parse_object(memoryview(raw), code="manifest.schema", what=PARITY, limit=PARITY_LIMIT)
    predicate = value.get("predicate")
    items = predicate.get("configuration") if isinstance(predicate, dict) else None
    found = [item.get("annotations") for item in items or () if isinstance(item, dict)]
    return [item for item in found if isinstance(item, dict)]


def _precision(vectors: Vectors, figures: list[dict[str, Any]]) -> dict[str, Any]:
    from airgap.cli.bundle import parity_text

    measured = {
        name: str(item[name])
        for item in figures
        if item.get("precision") == vectors.precision
        for name in ("max_delta_full", "max_delta_with_cache")
        if name in item
    }
    return {
        "model": vectors.model,
        "precision": vectors.precision,
        "provider": vectors.provider,
        "tolerance": str(vectors.tolerance),
        "prompts": len(vectors.vectors),
        "measured": measured,
        "text": parity_text(vectors),
    }


def _runs(bundle: InstalledBundle, root: Path) -> tuple[dict[str, str] | None, list[str]]:
    """Return what site.toml would run, None without one that can be read, and why it could not."""
    from airgap.config import load_site
    from airgap.serve.session import require_precision

    try:
        settings = load_site(root).inference
    except AirgapError:
        return None, []
    found: dict[str, str] = {"precision": settings.precision, "provider": settings.provider}
    try:
        require_precision(bundle, settings.precision, settings.provider)
    except RefusedError as error:
        return found, [f"site.toml, [inference]: {error.message} ({error.code})"]
    return found, []


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("installed", f"{document['name']} {document['version']}: {document['verdict']}, now"),
        ("digest", document["bundle"]),
        ("approved by", ", ".join(document["approvers"])),
        ("built by", f"{document['builder']} (does not count)"),
    ]
    for model in document["models"]:
        use = "" if model["scientific_use"] else ", not for scientific use"
        rows += [
            ("model", f"{model['id']} from {model['source']}{use}"),
            ("provenance", f"{model['provenance']}: {model['sentence']}"),
            *(
                ("not checked", f"{each['name']}: {each['reason']}")
                for each in model["not_repeated"]
            ),
            ("weights", _weights_text(model)),
        ]
    for each in document["precisions"]:
        furthest = "; furthest logit {max_delta_full}, with the cache {max_delta_with_cache}"
        measured = furthest.format(**each["measured"]) if len(each["measured"]) > 1 else ""
        rows.append((each["precision"], f"{each['text']}{measured}"))
    if document["runs"] is not None:
        rows.append(
            ("runs here", "{precision} on {provider}, by site.toml".format(**document["runs"]))
        )
    return [*rows, *(("ALARM", text) for text in document["alarms"])]


def _weights_text(model: dict[str, Any]) -> str:
    files = model["files"]
    if not files:
        return "converted; no file travels as the source had it"
    whose = "publisher's bytes" if model["weights"] == "publisher" else "the source's own bytes"
    if len(files) > 1:
        return f"{whose}, unchanged: {len(files)} files"
    return f"{whose}, unchanged: {files[0]['path']}, sha256:{files[0]['sha256']}"
