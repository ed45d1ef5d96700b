"""`airgap revoke` on the staging side, `airgap trust import-revocations` on the secured one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.options import grouped
from airgap.cli.rotation import Confirm, keep, require_typed
from airgap.cli.signers import Keys, Signing
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.envelope import Envelope
    from bundle.revocation import RevocationDocument
    from bundle.trust import Trust

_MAX_DAYS = 3660


@dataclass(frozen=True)
class RevocationSigning(Signing):
    """Without `--key` the key called `revocation` signs."""

    key: Keys = field(default_factory=lambda: ["revocation"])


def register(app: typer.Typer) -> None:
    """Add the group."""
    revoke = typer.Typer(
        help="Revoke keys, people, bundles, models and files.", no_args_is_help=True
    )
    revoke.command("create")(create)
    revoke.command("sign")(sign)
    revoke.command("show")(show_list)
    app.add_typer(revoke, name="revoke")


@grouped
def create(
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="The list to write.")],
    reason: Annotated[
        str, typer.Option("--reason", help="Why; every entry of this call bears it.")
    ] = "",
    revoke_key: Annotated[
        list[str] | None, typer.Option("--revoke-key", help="Id of a key; repeatable.")
    ] = None,
    person: Annotated[
        list[str] | None, typer.Option("--person", help="Id of a person: all her keys; repeatable.")
    ] = None,
    bundle: Annotated[
        list[str] | None, typer.Option("--bundle", help="Digest of a release; repeatable.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="SHA-256 of weights, published or converted; repeatable."),
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="SHA-256 of any file; repeatable.")
    ] = None,
    wheel: Annotated[
        list[str] | None, typer.Option("--wheel", help="SHA-256 of a wheel; repeatable.")
    ] = None,
    below: Annotated[
        list[str] | None,
        typer.Option("--below", help="LINE:EPOCH: all older releases of a line; repeatable."),
    ] = None,
    days: Annotated[
        int, typer.Option("--days", min=1, max=_MAX_DAYS, help="Until the next list is due.")
    ] = 90,
    by: RevocationSigning,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write the next list: all earlier entries and these, or the same ones with a later date.

    It counts when the people with the role `revocation` have signed it, and is kept in this tree
    then: from now on every draft that is built here carries it.
    """
    from bundle.envelope import sign_statement
    from bundle.revocation import LIST_TYPE

    given = {
        "keys": revoke_key,
        "people": person,
        "bundles": [each if ":" in each else f"sha256:{each}" for each in bundle or ()],
        "models": [each.removeprefix("sha256:") for each in model or ()],
        "files": [each.removeprefix("sha256:") for each in file or ()],
        "wheels": [each.removeprefix("sha256:") for each in wheel or ()],
    }
    floors = _floors(below or ())
    if (floors or any(given.values())) and not reason.strip():
        raise UsageError("usage.argument", "a revocation needs its --reason", hint="--reason WHY")
    trust = _load(root)
    document = _next_list(trust, given, floors, reason.strip(), days)
    signers = by.open(root)
    _finish(trust, sign_statement(document.to_bytes(), LIST_TYPE, *signers), out, root, json=json)


@grouped
def sign(
    file: Annotated[Path, typer.Argument(help="A list that needs more signatures.")],
    *,
    by: Signing,
    confirm: Confirm = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Read a list, confirm it, and sign it as a further person."""
    from bundle.envelope import add_signature
    from bundle.revocation import parse_revocations
    from policy.terms import Digest

    trust, envelope = _load(root), _read(file)
    stderr.print(list_view(parse_revocations(envelope.payload)), markup=False, soft_wrap=True)
    require_typed(Digest.of(envelope.payload).hex, confirm)
    signers = by.open(root)
    _finish(trust, add_signature(envelope, *signers), file, root, json=json)


def show_list(*, root: Root = None, json: Json = False) -> None:
    """Show the newest list of this tree."""
    trust = _load(root)
    if trust.revocations is None:
        raise RefusedError(
            "trust.revocation", "this tree has no revocation list", hint="airgap revoke create"
        )
    document = trust.revocations.document
    alarm = trust.revocations.alarm(datetime.now(UTC))
    text = list_view(document) + (f"\nALARM {alarm}" if alarm else "")
    show({**document.model_dump(mode="json"), "alarm": alarm}, text, json=json)


def import_revocations(
    file: Annotated[Path, typer.Argument(help="The list, as `airgap revoke create` wrote it.")],
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Take a newer revocation list; an older one, or one that drops an entry, is refused."""
    from bundle.trust import accept_revocations

    keep(accept_revocations(_load(root), _read(file)), root, json=json)


def list_view(document: RevocationDocument) -> str:
    """Return the list in words."""
    from bundle.fields import format_time

    head = (
        f"revocation list {document.version}, issued {format_time(document.issued)}, "
        f"the next is due {format_time(document.next_update)}"
    )
    lines = [
        head,
        *(
            f"{kind:<8} {identifier}  {reason}"
            for (kind, identifier), reason in sorted(document.entries().items())
        ),
        *(
            f"{'epochs':<8} {line} below {floor.below}  {floor.reason}"
            for line, floor in sorted((document.epochs or {}).items())
        ),
    ]
    return "\n".join(lines)


def _floors(below: Sequence[str]) -> dict[str, int]:
    """Return the lowest epoch that stays, by line."""
    found: dict[str, int] = {}
    for text in below:
        line, _, epoch = text.rpartition(":")
        if not line or not epoch.isdecimal():
            raise UsageError(
                "usage.argument", f"--below {text!r:.90} is not LINE:EPOCH", hint="airgap list"
            )
        found[line] = max(int(epoch), found.get(line, 0))
    return found


def _next_list(
    trust: Trust, given: dict[str, Any], floors: dict[str, int], reason: str, days: int
) -> RevocationDocument:
    from pydantic import ValidationError

    from bundle.manifest import first_problem
    from bundle.revocation import KINDS, EpochFloor, RevocationDocument

    held = None if trust.revocations is None else trust.revocations.document
    now = datetime.now(UTC).replace(microsecond=0)
    entries: dict[str, dict[str, str]] = {
        kind: {} if held is None else dict(getattr(held, kind)) for kind in KINDS
    }
    for kind, identifiers in given.items():
        for identifier in identifiers or ():
            entries[kind].setdefault(identifier, reason)
    epochs = {} if held is None else dict(held.epochs or {})
    try:
        for line, epoch in floors.items():
            if line not in epochs or epochs[line].below < epoch:
                epochs[line] = EpochFloor(below=epoch, reason=reason)
        return RevocationDocument(
            version=1 if held is None else held.version + 1,
            issued=now,
            next_update=now + timedelta(days=days),
            epochs=epochs or None,
            **entries,  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise RefusedError(
            "trust.revocation",
            f"the list cannot be made: {first_problem(error)}",
            hint="ids are as `airgap trust show`, `airgap list` and sha256sum print them",
        ) from error


def _finish(trust: Trust, envelope: Envelope, out: Path, root: Path | None, *, json: bool) -> None:
    """Write the list; keep it in this tree once enough people have signed."""
    from airgap.cli.rotation import write_envelope as write
    from bundle.trust import accept_revocations, save_trust

    write(out, envelope)
    try:
        accepted = accept_revocations(trust, envelope)
    except RefusedError as error:
        document = {"file": str(out), "complete": False, "missing": error.message}
        show(document, f"wrote {out}\nnot complete: {error.message}", json=json)
        return
    save_trust(accepted, root_folder(root) / "trust")
    assert accepted.revocations is not None  # noqa: S101 - for the type checker
    document = {"file": str(out), "complete": True, "version": accepted.revocations.version}
    text = (
        f"{list_view(accepted.revocations.document)}\nwrote {out}; drafts that are built here "
        f"carry it, and `airgap trust import-revocations {out.name}` takes it in a lab"
    )
    show(document, text, json=json)


def _load(root: Path | None) -> Trust:
    from bundle.trust import load_trust

    return load_trust(root_folder(root) / "trust")


def _read(path: Path) -> Envelope:
    from bundle.envelope import parse_envelope
    from bundle.keys import read_limited
    from bundle.root import CHAIN_LIMIT

    code = "trust.revocation"
    raw = read_limited(path, CHAIN_LIMIT, code=code, what="the revocation list")
    return parse_envelope(raw.strip(b"\n"), code=code, limit=CHAIN_LIMIT)
