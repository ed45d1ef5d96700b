"""`airgap audit witness`: let a second person's machine cosign heads, by media."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.audit_acts import owners_log
from airgap.cli.common import Json, Root, root_folder, show, write_new
from policy.errors import FaultError, RefusedError
from policy.wording import counted

Folder = Annotated[Path, typer.Argument(help="Folder of this witness, on its own machine.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A file that does not exist yet.")]


def register(audit: typer.Typer) -> None:
    """Add the group to `airgap audit`."""
    group = typer.Typer(no_args_is_help=True, help="Let a second person's machine cosign heads.")
    group.command(name="init")(init)
    group.command(name="trust")(trust)
    group.command(name="request")(request)
    group.command(name="cosign")(cosign)
    group.command(name="import")(import_head)
    audit.add_typer(group, name="witness")


def init(
    folder: Folder,
    *,
    name: Annotated[str, typer.Option("--name", help="Such as isso.example/w1.")],
    json: Json = False,
) -> None:
    """Make the key of a witness; its vkey goes into the policies of those who verify."""
    from airgap.audit.witness import Witness

    witness = Witness.create(folder.absolute(), name)
    short = name.replace("/", "-")
    text = f"witness {short} {witness.vkey}\nthat line goes into policy.tlog, and: quorum {short}"
    show({"vkey": str(witness.vkey), "folder": str(folder)}, text, json=json)


def trust(
    folder: Folder,
    vkey: Annotated[Path, typer.Argument(help="audit.vkey of the log, compared with its owner.")],
    *,
    json: Json = False,
) -> None:
    """Let a witness know a log, or the new key of one that it knows."""
    from airgap.audit import load_ring
    from airgap.audit.witness import Witness

    ring = load_ring(vkey)
    Witness.load(folder.absolute()).trust(ring)
    document = {"log": ring.name, "keys": [key.key_id.hex() for key in ring.keys]}
    show(document, f"knows {ring.name} with {len(ring.keys)} key(s)", json=json)


def request(
    log: Annotated[
        Path | None, typer.Argument(help="Folder that holds `log/`. Default: your own log.")
    ] = None,
    *,
    out: Out,
    old: Annotated[
        int | None,
        typer.Option("--old", help="Size that the witness has. Default: the last cosigned head."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write a request to cosign the newest head, for a witness to take away on media."""
    from airgap.audit import load_ring
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.status import read_status
    from airgap.audit.tree import StoredTree
    from airgap.audit.witness import Request

    tree = root_folder(root)
    layout = Layout(tree / "audit" if log is None else log.expanduser().absolute())
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no signed head in {layout.folder}")
    if old is None:
        own = tree / "keys" / "audit.vkey"
        ring = load_ring(own) if log is None and own.exists() else None
        old = read_status(layout.folder, ring).anchored
    request = Request(old, StoredTree(layout).consistency(old, found[0]), found[0])
    write_new(out, request.as_text().encode())
    document = {"old": old, "size": found[0].size, "out": str(out)}
    show(document, f"wrote {out}: from {old} to {counted(found[0].size, 'record')}", json=json)


def cosign(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="The request, as it came.")],
    *,
    out: Out,
    json: Json = False,
) -> None:
    """Check that a log only grew, store its new head, and only then cosign it."""
    from airgap.audit.witness import MAX_REQUEST, Witness, parse_request

    found = parse_request(_read(request, MAX_REQUEST + 1))
    note = Witness.load(folder.absolute()).cosign(found, int(time.time()))
    write_new(out, note.encode())
    document = {"origin": found.checkpoint.origin, "size": found.checkpoint.size, "out": str(out)}
    show(document, f"cosigned {counted(found.checkpoint.size, 'record')}; wrote {out}", json=json)


def import_head(
    note: Annotated[Path, typer.Argument(help="What the witness wrote.")],
    *,
    policy: Annotated[
        Path | None,
        typer.Option(help="Trust policy. Default: log/policy.tlog; given once, it is kept there."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Take a cosigned head back: it becomes an anchor of your own log, on record."""
    from airgap.audit.checkpoint import MAX_NOTE
    from airgap.audit.cosigning import import_cosigned
    from airgap.audit.quorum import MAX_POLICY

    tree = root_folder(root)
    content = _read(note, MAX_NOTE + 1)
    rules = None if policy is None else _read(policy, MAX_POLICY + 1)
    with owners_log(tree) as log:
        found = import_cosigned(log, content, rules)
    document = {"size": found.size, "witnesses": found.witnesses, "quorum": found.quorum}
    text = f"{counted(found.size, 'record')} cosigned by {', '.join(found.witnesses)}; " + (
        "the quorum of the policy is met" if found.quorum else "not yet a quorum of the policy"
    )
    show(document, text, json=json)


def _read(path: Path, limit: int) -> bytes:
    from airgap.audit.disk import open_plain

    try:
        with open_plain(path) as file:
            return file.read(limit)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot read {path}: {error.strerror}", hint="check the path"
        ) from error
