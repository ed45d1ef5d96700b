"""`airgap verify`: is a bundle sealed by enough people, whole, and free of what may not enter."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli.common import Json, Root, root_folder, show
from airgap.cli.forms import (
    BasePath,
    BundlePath,
    Passphrase,
    TransitKeys,
    Volumes,
    medium_rows,
    open_help,
)
from airgap.cli.shown import bar, table
from policy.wording import counted

if TYPE_CHECKING:
    from bundle.manifest import Manifest
    from bundle.statement import VerifiedSeal
    from bundle.vectors import Vectors
    from bundle.verify import VerifyReport

_MOST_NOTES = 12
# What almost every wheel has; an entry point that hooks into another program is told.
_USUAL = re.compile(r"\d+ native libraries: .*|entry points '(console|gui)_scripts': .*", re.DOTALL)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    bundle: BundlePath,
    *,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Folder of the trust root. Default: the tree's.")
    ] = None,
    volume: Volumes = None,
    base: BasePath = None,
    transit_key: TransitKeys = None,
    passphrase_file: Passphrase = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep in the tree what holds, and go on after a stop."),
    ] = False,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also repeat the checks of the publisher's evidence, offline."),
    ] = False,
    publishers: Annotated[
        Path | None,
        typer.Option(
            "--publishers", help="With --deep: whom this host believes, instead of the builder."
        ),
    ] = None,
    vsa: Annotated[
        Path | None,
        typer.Option("--vsa", help="With --deep: write the verification summary to this file."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Every note of the scan, one line each.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify BUNDLE against the trust root of this host, and write nothing but what --resume keeps.

    BUNDLE is a bundle, a delta, a volume or the folder of a set, encrypted or not.
    """
    from airgap.cli.evidence import repeat, require_options
    from airgap.install.ledger import kept_ledger
    from airgap.install.store import Store
    from bundle.trust import load_trust
    from bundle.verify import verify_bundle

    require_options(deep=deep, publishers=publishers, vsa=vsa)
    folder = root_folder(root)
    anchors = load_trust(trust or folder / "trust")
    if trust is None:
        Store(folder / "store").require_trust(anchors)
    more = open_help(volume, transit_key, passphrase_file, base, store=folder / "store")
    now = datetime.now(UTC)
    with bar("verify") as progress:
        report = verify_bundle(
            bundle,
            anchors,
            now=now,
            floors=Store(folder / "store").floors(),
            more=more,
            progress=progress,
            remember=(lambda sealed: kept_ledger(folder / "store" / "verify", sealed))
            if resume
            else None,
        )
    document, text = report.as_document(), verify_view(report, verbose=verbose)
    if not deep:
        show(document, text, json=json)
        return
    again = repeat(bundle, anchors, now=now, more=more, publishers=publishers)
    text += "\n\nevidence, checked again\n" + table(again.rows)
    show({**document, "deep": again.document}, text, json=json)
    again.finish(vsa)


def verify_view(report: VerifyReport, *, verbose: bool = False) -> str:
    """Return the one-screen answer; with `verbose` every note of the scan stands in it."""
    manifest, seal = report.manifest, report.seal
    needed = report.trust.document.thresholds.seal.people
    rows = [
        ("bundle", f"{manifest.name} {manifest.version}"),
        ("digest", str(report.digest)),
        ("approved by", f"{approvers_text(seal)} ({needed} needed)"),
        *(("condition", f"{a.person}: {a.conditions}") for a in seal.approvals if a.conditions),
        ("built by", f"{seal.builder} (does not count)"),
        ("trust root", f"version {report.trust.version}, {report.trust.fingerprint}"),
        ("valid", f"{manifest.not_before:%Y-%m-%d} to {manifest.expires:%Y-%m-%d}"),
        ("epoch", str(manifest.epoch)),
        (
            "content",
            f"{counted(len(manifest.files), 'file')}, {manifest.body.size:,} bytes, each hashed",
        ),
    ]
    for model in manifest.models:
        use = "" if model.scientific_use else ", not for scientific use"
        rows += [
            ("model", f"{model.id}, provenance {model.provenance_level}{use}"),
            *_weights(manifest, model.id),
            ("licence", f"{model.licence.spdx} ({model.licence.status})"),
            ("supplier", f"{model.supplier.legal_name} ({model.supplier.status})"),
        ]
    rows += [(f"{claim.precision}", parity_text(vectors)) for claim, vectors in report.parity]
    rows += [("ALARM", text) for text in report.alarms]
    rows += medium_rows(report.medium)
    rows += _notes(report, verbose=verbose)
    return "sealed and whole\n" + table(rows)


def _notes(report: VerifyReport, *, verbose: bool) -> list[tuple[str, str]]:
    """Say what the scan found: what every wheel has is counted, all else stands there."""
    from bundle.scan.wheel import split_wheel_name

    found = report.scan.findings
    wheels = [path for path, role in report.scan.files.items() if role == "wheel"]
    texts: dict[str, list[str]] = {}
    for each in found:
        if verbose or not _USUAL.fullmatch(each.text):
            short = each.path in wheels and not verbose
            name = " ".join(split_wheel_name(each.path.rpartition("/")[2])) if short else each.path
            texts.setdefault(name, []).append(each.text)
    rows = [
        ("note", f"{name}: {text}")
        for name, said in texts.items()
        for text in (said if verbose else ["; ".join(said)])
    ]
    if len(rows) > _MOST_NOTES and not verbose:
        more = f"{len(rows) - _MOST_NOTES} more: airgap verify --verbose"
        rows = [*rows[:_MOST_NOTES], ("note", more)]
    native = {each.path for each in found if "native librar" in each.text}
    programs = {each.path for each in found if "_scripts'" in each.text}
    if wheels:
        targets = ", ".join(f"{r.target} {r.accelerator}" for r in report.manifest.runtimes)
        text = f"{len(wheels)} for {targets}: {len(native)} with native code, {len(programs)} with "
        rows.insert(0, ("wheels", f"{text}programs{'' if verbose else '; --verbose lists them'}"))
    return rows


def approvers_text(seal: VerifiedSeal) -> str:
    """Name the approvers, and the roles in which they say that they approved."""
    roles = {each.person: each.roles for each in seal.approvals}
    return ", ".join(
        f"{who} as {' and '.join(roles[who])}" if who in roles else who for who in seal.approvers
    )


def parity_text(vectors: Vectors) -> str:
    """Say what a precision costs, or that it answers like the source."""
    if vectors.measured is not None:
        where = (
            ""
            if vectors.measured.measured_on == vectors.provider
            else (f" (for {vectors.provider}; measured on {vectors.measured.measured_on})")
        )
        return f"{vectors.measured.text}{where}"
    return (
        f"answers like the source on {len(vectors.vectors)} prompts within {vectors.tolerance}, "
        f"{vectors.steps} greedy tokens each"
    )


def _weights(manifest: Manifest, model_id: str) -> list[tuple[str, str]]:
    """Say which weights travel as the source had them; their bytes were hashed just now."""
    files = manifest.published_weights(model_id)
    if not files:
        return []
    if len(files) > 1:
        return [("weights", f"the source's own bytes, unchanged: {len(files)} files")]
    name = files[0].path.rpartition("/")[2]
    return [("weights", f"the source's own bytes, unchanged: {name}, sha256:{files[0].sha256}")]
