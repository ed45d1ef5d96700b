"""`airgap verify --deep` and `airgap receipt`: evidence about a bundle, on the lab's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show
from airgap.cli.forms import BasePath, Passphrase, TransitKeys, Volumes, open_help
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.evidence.deep import DeepReport
    from bundle.manifest import FileEntry, Manifest
    from bundle.media import Help
    from bundle.medium import Medium
    from bundle.trust import Trust

STATEMENT_LIMIT = 16 * 1024 * 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("receipt")(receipt)


@dataclass(frozen=True, slots=True)
class Repeated:
    """What `verify --deep` found beside the seal."""

    manifest: Manifest
    report: DeepReport
    now: datetime

    @property
    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return self.report.as_document()

    @property
    def rows(self) -> Sequence[tuple[str, str]]:
        """Label and text for the screen."""
        from bundle.evidence.deep import deep_lines

        return deep_lines(self.report)

    def finish(self, vsa: Path | None) -> None:
        """Write the summary, or raise when something was not repeated."""
        from bundle.durable import write_beside
        from bundle.evidence.deep import deep_summary

        raw = deep_summary(self.manifest, self.report, now=self.now)
        if vsa is not None:
            write_beside(vsa, raw, 0o644)


def require_options(*, deep: bool, publishers: Path | None, vsa: Path | None) -> None:
    """Refuse options that mean nothing without --deep."""
    if not deep and (publishers is not None or vsa is not None):
        raise UsageError(
            "usage.argument",
            "--publishers and --vsa belong to --deep",
            hint="airgap verify BUNDLE --deep",
        )


def repeat(
    bundle: Path, trust: Trust, *, now: datetime, more: Help, publishers: Path | None
) -> Repeated:
    """Check the upstream evidence of a bundle again; its seal is checked again on the way."""
    from bundle.evidence.anchors import load_anchors
    from bundle.evidence.deep import verify_deep
    from bundle.verify import open_bundle

    anchors = None if publishers is None else load_anchors(publishers)
    with open_bundle(bundle, trust, now=now, more=more) as sealed:
        report = verify_deep(sealed.manifest, sealed.read, anchors)
        return Repeated(sealed.manifest, report, now)


def show_attested(bundle: Path, *, json: bool) -> int:
    """Show what a bundle attests and which keys signed it; nobody's word on either is taken here.

    The statements are held against the manifest in the same file. Whether the seal holds is for
    `airgap verify`, on a host with a trust root.
    """
    from airgap.cli.shown import table
    from airgap.receipt import ATTESTATIONS, statement_facts
    from bundle.approval import read_approvals
    from bundle.envelope import parse_seal
    from bundle.manifest import parse_manifest
    from bundle.media import open_medium
    from bundle.statement import parse_statement, require_matches

    medium = open_medium(bundle)
    try:
        envelope = parse_seal(medium.head.envelope)
        manifest = parse_manifest(medium.head.manifest)
        require_matches(parse_statement(envelope.payload), manifest, medium.head.manifest)
        statements = [
            statement_facts(entry.path, _read(medium, entry))
            for entry in manifest.files
            if entry.path.startswith(ATTESTATIONS) and entry.path.endswith(".json")
        ]
    finally:
        medium.close()
    document = {
        "format": "airgap/attested/1",
        "verdict": "not verified",
        "bundle": str(manifest.digest),
        "name": manifest.name,
        "version": manifest.version,
        "keyids": [each.keyid for each in envelope.signatures],
        "approvals": [
            each.model_dump(mode="json", exclude_none=True) for each in read_approvals(envelope)
        ],
        "models": [
            {"id": each.id, "provenance_level": each.provenance_level, "source": each.source}
            for each in manifest.models
        ],
        "evidence": [
            {"kind": each.kind, "path": each.path, "sha256": each.sha256, "summary": each.summary}
            for each in manifest.evidence
        ],
        "attestations": statements,
    }
    rows = [
        ("bundle", f"{manifest.name} {manifest.version}: what it says of itself, NOT verified"),
        ("digest", str(manifest.digest)),
        *(("signed by key", each.keyid) for each in envelope.signatures),
        *(
            ("approval", f"{a.person} as {', '.join(a.roles)}: {a.conditions or 'no condition'}")
            for a in read_approvals(envelope)
        ),
        *(("model", f"{m.id}, claims provenance {m.provenance_level}") for m in manifest.models),
        *(("evidence", f"{each.kind}: {each.summary}") for each in manifest.evidence),
        *(("attests", f"{s['path']}: {s['type']} {s['result']}".strip()) for s in statements),
        ("next step", f"airgap verify {bundle.name}"),
    ]
    show(document, table(rows), json=json)
    return 0


def _read(medium: Medium, entry: FileEntry) -> dict[str, Any]:
    """Read a statement and hold it against the manifest beside it."""
    from hashlib import sha256

    from bundle.scan.strict import parse_object

    raw = bytearray(min(entry.size, STATEMENT_LIMIT))
    medium.read_into(entry.offset, memoryview(raw))
    if sha256(raw).hexdigest() != entry.sha256:
        raise RefusedError(
            "seal.subject", f"{entry.path!r:.100} is not the document that the manifest names"
        )
    return parse_object(
        memoryview(raw), code="manifest.schema", what=entry.path, limit=STATEMENT_LIMIT
    )


def receipt(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agb.", metavar="BUNDLE")],
    *,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the page here; it needs no other file.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Folder of the trust root. Default: the tree's.")
    ] = None,
    volume: Volumes = None,
    base: BasePath = None,
    transit_key: TransitKeys = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify BUNDLE and write one page about it for the security officer.

    What it is, who approved it, what was proved about its origin, its licences and its conversion;
    what is verified and what is only declared stand apart.
    """
    from airgap.cli.shown import bar, table
    from airgap.install.store import Store
    from airgap.receipt import Receipt, receipt_page
    from bundle.trust import load_trust
    from bundle.verify import open_bundle, verify_contents

    folder = root_folder(root)
    now = datetime.now(UTC)
    floors = Store(folder / "store").floors()
    anchors = load_trust(trust or folder / "trust")
    more = open_help(volume, transit_key, passphrase_file, base, store=folder / "store")
    with open_bundle(bundle, anchors, now=now, floors=floors, more=more) as sealed:
        with bar("verify") as progress:
            sealed.verify_body(progress=progress)
        scan = verify_contents(sealed.manifest, sealed.view)
        sealed.medium.check_spares()
        found = Receipt.of(sealed, scan, now=now)
    if html is not None:
        from bundle.durable import write_beside

        write_beside(html, receipt_page(found).encode(), 0o644)
    show(found.document, table(found.rows), json=json)
