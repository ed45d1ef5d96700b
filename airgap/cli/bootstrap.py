"""`airgap bootstrap`: what install.sh calls; `airgap installer`: what lies beside a bundle."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.common import Json, Root, root_folder, show, stdout, visible
from airgap.cli.forms import BundlePath, Volumes, open_help
from policy.errors import FaultError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("bootstrap")(bootstrap)
    app.command("installer")(installer)


def bootstrap(
    bundle: BundlePath,
    *,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="Of the trust root, as it was told you.")
    ],
    prefix: Annotated[Path, typer.Option("--prefix", help="Folder of the program.")],
    digest: Annotated[
        str | None, typer.Option("--digest", help="Of the release that was checked before.")
    ] = None,
    system: Annotated[
        bool, typer.Option("--system", help="Also accounts, units and profile of the host.")
    ] = False,
    site: Annotated[Path | None, typer.Option("--site", help="site.toml of this lab.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Another bundle to admit, with a model.")
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", help="Project of site.toml that it is for.")
    ] = None,
    approval: Annotated[
        Path | None,
        typer.Option("--approval", help="Of going back to older wheels: trust rollback-sign."),
    ] = None,
    transcript: Annotated[
        Path | None, typer.Option("--transcript", help="What the installer said before.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option("--result", help="File for the JSON document as well.")
    ] = None,
    volume: Volumes = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Set up a host from BUNDLE: trust, site facts, accounts and units, first admission.

    `sh install.sh` calls it. Everything is verified before anything changes; what is as it must be
    stays as it is; the transcript goes into the audit log.
    """
    from airgap.bootstrap import TRANSCRIPT_LIMIT, Wish
    from airgap.bootstrap import bootstrap as set_up
    from airgap.cli.lifecycle import read_approval
    from airgap.host_setup import Places
    from policy.terms import Digest

    said = ""
    if transcript is not None:
        try:
            with transcript.open("rb") as stream:
                said = stream.read(TRANSCRIPT_LIMIT).decode("utf-8", "replace")
        except OSError as error:
            raise FaultError("host.io", f"{transcript}: {error.strerror}") from error
    wish = Wish(
        bundle,
        Digest.parse(fingerprint.strip()),
        tuple(volume or ()),
        site,
        model,
        project,
        said,
        approval=None if approval is None else read_approval(approval),
        digest=None if digest is None else Digest.parse(digest),
    )
    places = Places(prefix.absolute(), root_folder(root), system)

    def tell(text: str) -> None:
        if not json:
            stdout.print(visible(text))

    help_ = open_help(volume, None, None, None)
    outcome = set_up(wish, places, now=datetime.now(UTC), more=help_, say=tell)
    end = "nothing changed"
    if outcome.changed:
        end = f"on record: audit log, record {outcome.record}, transcript {outcome.transcript}"
    if result is not None:
        from bundle.canonical import canonical_json
        from bundle.durable import write_beside

        write_beside(result, canonical_json(outcome.as_document()))
    if outcome.refusal is not None:
        raise outcome.refusal
    show(outcome.as_document(), end, json=json)


def installer(
    bundle: BundlePath,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the medium.")],
    volume: Volumes = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write install.sh of a sealed BUNDLE beside it, and the list of digests of the folder.

    People sign SHA256SUMS (`airgap trust sign-file`), so that a host without any program of ours
    can check the installer with openssl and sha256sum before it runs it.
    """
    from airgap.install.medium import write_medium
    from bundle.trust import load_trust

    made = write_medium(
        bundle,
        out,
        trust=load_trust(root_folder(root) / "trust"),
        now=datetime.now(UTC),
        more=open_help(volume, None, None, None),
    )
    text = "\n".join(
        [*(f"{digest}  {name}" for name, digest in made.items()), f"written: {out / 'SHA256SUMS'}"]
    )
    show({"format": "airgap/installer/1", "files": made, "folder": str(out)}, text, json=json)
