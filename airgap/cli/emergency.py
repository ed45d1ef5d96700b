"""`airgap trust clock` and `trust rollback-sign`: statements for the day that something went wrong.

A clock that ran ahead is forgotten, and an older release comes back, only by what people signed for
this one case.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr
from airgap.cli.options import grouped
from airgap.cli.rotation import Confirm, load, put, read_envelope, require_typed, write_envelope
from airgap.cli.signers import Signing
from policy.errors import RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from bundle.manifest import Manifest
    from bundle.rollback import Mark, RollbackStatement


def register(trust: typer.Typer) -> None:
    """Add the commands to `airgap trust`."""
    trust.command("clock")(show_clock)
    trust.command("clock-sign")(clock_sign)
    trust.command("clock-reset")(clock_reset)
    trust.command("rollback-sign")(rollback_sign)


def show_clock(*, root: Root = None, json: Json = False) -> None:
    """Say which time this host will not fall behind, and what to do after a clock ran ahead."""
    from bundle.fields import format_time

    floor, now = _floor(root), datetime.now(UTC)
    seen = "" if floor is None else format_time(floor)
    document = {"clock": format_time(now), "latest": seen, "behind": bool(floor and now < floor)}
    text = f"clock of this host   {format_time(now)}\nlatest that has been {seen or 'nothing'}"
    if floor is not None and now < floor:
        text += (
            "\nThis host refuses bundles. If that time never was, whoever holds a root key signs:\n"
            f"airgap trust clock-sign clock.json --forget {seen} --reason WHY --key root\n"
            "and here: airgap trust clock-reset clock.json"
        )
    show(document, text, json=json)


@grouped
def clock_sign(
    out: Annotated[Path, typer.Argument(help="The statement to write, or to add to.")],
    *,
    forget: Annotated[str, typer.Option("--forget", help="What `trust clock` printed.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; it goes on record.")] = "",
    by: Signing,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign, with a root key, that a host shall forget a time that never was."""
    from bundle.clock import CLOCK_TYPE, parse_clock, sign_clock
    from bundle.envelope import add_signature
    from bundle.fields import parse_time

    signers = by.open(root)
    if forget or not out.exists():
        try:
            moment = parse_time(forget)
        except ValueError as error:
            raise UsageError(
                "usage.argument", f"--forget: {error}", hint="airgap trust clock prints it"
            ) from error
        envelope = sign_clock(moment, reason, signers, now=datetime.now(UTC))
    else:
        found = read_envelope(out)
        statement = parse_clock(found.payload)
        if found.payload_type != CLOCK_TYPE:
            raise RefusedError("trust.clock", f"{out} is no statement about a clock")
        stderr.print(f"forget {statement.forget}: {statement.reason}", markup=False)
        envelope = add_signature(found, *signers)
    write_envelope(out, envelope)
    show(
        {"file": str(out), "signatures": len(envelope.signatures)},
        f"wrote {out}, {counted(len(envelope.signatures), 'signature')}",
        json=json,
    )


def clock_reset(
    statement: Annotated[Path, typer.Argument(help="What the root people signed.")],
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Forget the time that the statement names. It goes on record, and works once."""
    from airgap.install import Store
    from airgap.signed import on_record
    from bundle.clock import verify_clock
    from bundle.fields import format_time
    from policy.terms import Digest

    trust, envelope, folder = load(root), read_envelope(statement), root_folder(root)
    found = verify_clock(envelope, trust.standing, floor=_floor(root), now=datetime.now(UTC))
    store = Store(folder / "store")
    with (
        store.locked(),
        on_record(folder, "admin.trust", account_name(), Digest.of(envelope.payload)),
    ):
        store.forget_time(found.issued)
        put(folder / "trust" / "clock.json", envelope.to_bytes() + b"\n")
    document = {"forgotten": format_time(found.forget), "latest": format_time(found.issued)}
    text = f"forgotten {document['forgotten']}; this host has seen {document['latest']}"
    show(document, text, json=json)


def _floor(root: Path | None) -> datetime | None:
    """Return the latest time that this tree has seen, noting that of the log.

    After a reset the log still ends in records of the wrong time until the next one is written;
    the reset itself is such a record.
    """
    from airgap.install import Store
    from airgap.install.record import last_record

    folder = root_folder(root)
    return Store(folder / "store").floors(last_record(folder)).clock


# -- an older release comes back --------------------------------------------------------------


@grouped
def rollback_sign(
    out: Annotated[Path, typer.Argument(help="The approval to write, or to add to.")],
    *,
    release: Annotated[
        str,
        typer.Option(
            "--release", help="What comes back: its bundle, or the name or digest of an install."
        ),
    ] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; it goes on record.")] = "",
    above: Annotated[
        str,
        typer.Option(
            "--above",
            help="The mark of the host, EPOCH@DIGEST, as its refusal says. Default: of this tree.",
        ),
    ] = "",
    days: Annotated[int, typer.Option("--days", min=1, max=30, help="How long it holds.")] = 7,
    by: Signing,
    confirm: Confirm = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Approve, as one of several people, that a host goes back to one older release.

    As many people as a bundle needs sign the same file, each with this command; none of them may
    have built the release. Then, on the host: airgap rollback RELEASE --approval FILE.
    """
    from bundle.envelope import add_signature
    from bundle.rollback import parse_rollback, sign_rollback
    from policy.terms import Digest

    if out.exists():
        found = read_envelope(out)
        statement = parse_rollback(found.payload)
        stderr.print(_rollback_text(statement), markup=False, soft_wrap=True)
        require_typed(Digest.of(found.payload).hex, confirm)
        signers = by.open(root)
        envelope = add_signature(found, *signers)
    else:
        if not release or not reason.strip():
            raise UsageError(
                "usage.argument",
                f"{str(out)!r:.120} is new: it needs --release and --reason",
                hint="airgap trust rollback-sign --help",
            )
        manifest = _manifest(release, root)
        mark = _mark(manifest, above, root)
        signers = by.open(root)
        now = datetime.now(UTC)
        envelope = sign_rollback(
            manifest, mark, reason, signers, now=now, valid_for=timedelta(days=days)
        )
        statement = parse_rollback(envelope.payload)
        stderr.print(_rollback_text(statement), markup=False, soft_wrap=True)
    write_envelope(out, envelope)
    document = {
        "file": str(out),
        "digest": str(Digest.of(envelope.payload)),
        "signatures": len(envelope.signatures),
        **statement.model_dump(mode="json"),
    }
    show(document, f"wrote {out}, {counted(len(envelope.signatures), 'signature')}", json=json)


def _manifest(release: str, root: Path | None) -> Manifest:
    """Return the manifest of a bundle file, or of an installed release."""
    from airgap.cli.forms import open_base
    from airgap.install import Store

    path = Path(release)
    if path.exists():
        return open_base(path).manifest
    return Store(root_folder(root) / "store").get(release).manifest


def _mark(manifest: Manifest, above: str, root: Path | None) -> Mark:
    """Return the high-water mark that is stated, or that of this tree."""
    from airgap.install import Store
    from policy.terms import Digest

    if above:
        epoch, _, digest = above.partition("@")
        if not epoch.isdecimal():
            raise UsageError(
                "usage.argument",
                f"--above {above!r:.90} is not EPOCH@DIGEST",
                hint="the host prints both when it refuses the release",
            )
        return int(epoch), Digest.parse(digest)
    found = Store(root_folder(root) / "store").floors().epochs.get(manifest.bundle_id)
    if found is None:
        raise RefusedError(
            "trust.rollback",
            f"this tree has seen no release of {manifest.bundle_id}",
            hint="on another tree than the host's, give its mark: --above EPOCH@DIGEST",
        )
    return found


def _rollback_text(statement: RollbackStatement) -> str:
    """Say what is approved, a fact a line."""
    from bundle.fields import format_time

    return (
        f"bring back   {statement.bundle_id}, epoch {statement.epoch}, {statement.bundle}\n"
        f"on a host at epoch {statement.above.epoch}, {statement.above.bundle}\n"
        f"holds        {format_time(statement.issued)} to {format_time(statement.expires)}\n"
        f"because      {statement.reason}"
    )
