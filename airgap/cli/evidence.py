"""`airgap verify --deep` and `airgap receipt`: evidence about a bundle, on the lab's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show
from policy.errors import UsageError

if TYPE_CHECKING:
    from bundle.evidence.deep import DeepReport
    from bundle.manifest import Manifest
    from bundle.media import Help
    from bundle.trust import Trust


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
        from airgap.install.store import write_beside
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


def receipt(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agb.", metavar="BUNDLE")],
    *,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the page here; it needs no other file.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Folder of the trust root. Default: the tree's.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify BUNDLE and write one page about it for the security officer.

    What it is, who approved it, what was proved about its origin, its licences and its conversion;
    what is verified and what is only declared stand apart.
    """
    from airgap.cli.bundle import bar, table
    from airgap.install.store import Store
    from airgap.receipt import Receipt, receipt_page
    from bundle.trust import load_trust
    from bundle.verify import open_bundle, verify_contents

    folder = root_folder(root)
    now = datetime.now(UTC)
    floors = Store(folder / "store").floors()
    anchors = load_trust(trust or folder / "trust")
    with open_bundle(bundle, anchors, now=now, floors=floors) as sealed:
        with bar("verify") as progress:
            sealed.verify_body(progress=progress)
        scan = verify_contents(sealed.manifest, sealed.view)
        found = Receipt.of(sealed, scan, now=now)
    if html is not None:
        from airgap.install.store import write_beside

        write_beside(html, receipt_page(found).encode(), 0o644)
    show(found.document, table(found.rows), json=json)
