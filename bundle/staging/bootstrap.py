"""A release of wheels: what its documents say, and how one without a model is built and sealed.

The installer travels inside `payload/wheels/`, so the manifest covers it; `write_medium` puts it
beside the bundle, where a host without any program of ours can check it with `sha256sum`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.canonical import canonical_json
from bundle.envelope import Envelope, sign_statement
from bundle.fields import format_time
from bundle.keys import Signer, as_signers
from bundle.manifest import REPORT, Manifest, Release
from bundle.scan.bom import PATH as BOM_PATH
from bundle.scan.payload import scan_payload
from bundle.scan.strict import open_view
from bundle.scan.wheelhouse import FOLDER
from bundle.staging.bom import require_schema, wheels_document
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.trust import Trust, chain_document
from bundle.write import Member, write_archive
from policy.errors import RefusedError
from policy.terms import URI_BASE

if TYPE_CHECKING:
    from bundle.staging.wheelhouse import Wheelhouse

ATTEST = "META/attest/wheels.json"
REPORT_FORMAT = "airgap-wheelhouse-report/1"
_MARK = "@PROGRAM@"
# In one file they need no imports of each other; what the shared part raises is a refusal there.
_BETWEEN = re.compile(
    r"^from __future__ import annotations\n"
    r"|^from (?:bundle|policy)\.[a-z_.]+ import (?:\([^)]*\)|[^(\n]+)\n",
    re.MULTILINE,
)
_REFUSAL = '''\
class RefusedError(Stop):
    """A refusal of the part that the program shares with this one."""

    def __init__(self, code, message, hint=""):
        super().__init__(1, code, message, hint)
'''


@dataclass(frozen=True, slots=True)
class WheelFacts:
    """What the builder states of a release without a model."""

    name: str
    version: str
    created: datetime
    expires: datetime
    epoch: int


@dataclass(frozen=True, slots=True)
class BuiltWheels:
    """A finished draft of wheels."""

    path: Path
    manifest: Manifest
    report: Mapping[str, Any]
    builder: str


def installer_text() -> bytes:
    """Return `install.sh`: the shell part with the Python part inside, one file to check."""
    folder = resources.files("bundle")
    shell, medium, *rest = (
        (folder / name).read_text("utf-8")
        for name in (
            "staging/install.sh",
            "staging/bootstrap_medium.py",
            "staging/bootstrap_seal.py",
            "scan/wheel.py",
            "staging/bootstrap_main.py",
        )
    )
    program = "\n\n".join([medium, _REFUSAL, *(_BETWEEN.sub("", part) for part in rest)])
    if shell.count(_MARK) != 1 or "\nEND_OF_PROGRAM" in program:
        raise RefusedError("build.wheels", "the installer cannot be put together")
    return shell.replace(_MARK, program.rstrip("\n")).encode()


def report_of(wheelhouse: Wheelhouse) -> dict[str, Any]:
    """Return what approvers read about the wheels, as JSON."""
    return {
        "format": REPORT_FORMAT,
        "targets": [
            {"target": each.target, "accelerator": each.accelerator, "wheels": len(each.packages)}
            for each in wheelhouse.runtimes
        ],
        "wheels": [
            {
                "file": wheel.path.name,
                "name": wheel.name,
                "version": wheel.version,
                "sha256": wheel.sha256,
                "size": wheel.path.stat().st_size,
                "licence": wheel.licence,
                "attestation": wheel.attestation,
                "findings": list(wheel.findings),
            }
            for wheel in wheelhouse.wheels
        ],
        "bytes": wheelhouse.size,
    }


def attestation_of(wheelhouse: Wheelhouse) -> bytes:
    """Return the statement about all wheels, in canonical form."""
    report = report_of(wheelhouse)
    return canonical_json(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [
                {"name": f"{FOLDER}/{each['file']}", "digest": {"sha256": each["sha256"]}}
                for each in report["wheels"]
            ],
            "predicateType": f"{URI_BASE}wheelhouse/v1",
            "predicate": report,
        }
    )


def build_wheels(
    wheelhouse: Wheelhouse,
    out: Path,
    facts: WheelFacts,
    *,
    trust: Trust,
    signer: Signer | Sequence[Signer],
    progress: Callable[[str, int, int], None] | None = None,
) -> BuiltWheels:
    """Write the draft of a release that holds wheels and the installer, and no model.

    Raises:
        RefusedError: `build.output`, `build.bom`, `seal.role`, `scan.wheel`, codes of the manifest.
        FaultError: `host.*`.

    """
    from bundle.staging.pipeline import require_builder, require_output

    require_output(out)
    builder = require_builder(trust, signer, facts.created)
    report = report_of(wheelhouse)
    bom = wheels_document(
        facts.name, facts.version, wheelhouse, created=facts.created, identity=_identity(wheelhouse)
    )
    require_schema(bom)
    stamped = {**report, "release": facts.name, "created": format_time(facts.created)}
    members = (
        Member(REPORT, canonical_json(stamped), "report", "application/json"),
        Member(ATTEST, attestation_of(wheelhouse), "attestation", "application/json"),
        Member(BOM_PATH, bom, "sbom", "application/json"),
        *wheelhouse.members,
    )
    release = Release(
        profile=trust.document.profile,
        bundle_id=facts.name,
        name=facts.name,
        version=facts.version,
        created=facts.created,
        not_before=facts.created,
        expires=facts.expires,
        epoch=facts.epoch,
        runtimes=wheelhouse.runtimes,
    )
    sources = {member.path: member.source for member in members}

    def view(path: str) -> memoryview:
        source = sources[path]
        return memoryview(source) if isinstance(source, bytes) else open_view(source)

    def seal(manifest: Manifest) -> Envelope:
        scan_payload(view, manifest)
        payload = seal_statement(manifest, builder=builder).to_bytes()
        return sign_statement(payload, PAYLOAD_TYPE, *as_signers(signer))

    manifest = write_archive(
        out,
        release,
        members,
        trust_chain=chain_document(trust),
        seal=seal,
        progress=None if progress is None else lambda done, total: progress("seal", done, total),
    )
    return BuiltWheels(out, manifest, stamped, builder)


def _identity(wheelhouse: Wheelhouse) -> str:
    hasher = hashlib.sha256()
    for wheel in wheelhouse.wheels:
        hasher.update(f"{wheel.sha256}  {wheel.path.name}\n".encode())
    return hasher.hexdigest()
