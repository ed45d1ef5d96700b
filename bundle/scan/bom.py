"""The bill of materials held against the files: same digests, and no file left out.

Decides whether `META/sbom/bom.cdx.json` and the manifest describe one payload. The full CycloneDX
schema is checked on the staging side; here only what a reader of the release relies on.
"""

from __future__ import annotations

from typing import Any

from bundle.manifest import Manifest
from bundle.scan.strict import parse_object
from policy.errors import RefusedError

CODE = "bom.mismatch"
BOM_LIMIT = 16 * 1024 * 1024
PATH = "META/sbom/bom.cdx.json"


def require_bom(data: memoryview, manifest: Manifest) -> None:
    """Check that the file components are exactly the payload, digest by digest.

    Raises:
        RefusedError: `bom.mismatch`.

    """
    bom = parse_object(data, code=CODE, what=PATH, limit=BOM_LIMIT)
    if bom.get("bomFormat") != "CycloneDX" or bom.get("specVersion") != "1.7":
        raise RefusedError(CODE, f"{PATH} is not CycloneDX 1.7")
    found: dict[str, str] = {}
    pending: list[Any] = [bom.get("components")]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            if item.get("type") == "file":
                name = str(item.get("name"))
                if name in found:
                    raise RefusedError(CODE, f"{PATH} lists {name!r:.120} twice")
                found[name] = _sha256(item.get("hashes"))
            pending.append(item.get("components"))
    wanted = {e.path: e.sha256 for e in manifest.files if e.path.startswith("payload/")}
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise RefusedError(
                CODE,
                f"{path!r:.160}: the manifest says {wanted.get(path, 'nothing')}, the bill of "
                f"materials {found.get(path, 'nothing')!s:.80}",
                hint="build the release again; its bill of materials is of another payload",
            )


def _sha256(value: Any) -> str:
    entries = value if isinstance(value, list) else []
    contents = [
        str(entry.get("content"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("alg") == "SHA-256"
    ]
    return contents[0] if len(contents) == 1 else "no SHA-256"
