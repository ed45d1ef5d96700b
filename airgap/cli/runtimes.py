"""`airgap runtimes`: the environments of the program on this host, and taking old ones away."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show
from airgap.cli.shown import table
from policy.errors import AirgapError, UsageError

if TYPE_CHECKING:
    from airgap.install import Store
    from airgap.install.runtimes import Runtime
    from bundle.manifest import Manifest

_MEBIBYTE = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("runtimes")(runtimes)


def runtimes(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="With --remove: which. Default: all that nothing needs.", metavar="[ID]..."
        ),
    ] = None,
    *,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete environments that nothing needs.")
    ] = False,
    prefix: Annotated[
        Path | None,
        typer.Option("--prefix", help="Where install.sh put the program. Default: this one's."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """List the environments that install.sh made, with their sizes and what needs them.

    A newer bundle of wheels leaves the older environment there. Needed is the one that answers,
    one that a process runs from, and one that an installed release brought along.
    """
    from airgap.install import Store
    from airgap.install.runtimes import find_prefix, find_runtimes

    place = prefix or find_prefix()
    if place is None or (names and not remove):
        raise UsageError(
            "usage.argument",
            "names of environments go with --remove"
            if place is not None
            else "this program was not installed by install.sh",
            hint="airgap runtimes --prefix /opt/airgap",
        )
    folder = root_folder(root)
    store = Store(folder / "store")
    if remove:
        _remove(place.absolute(), names or [], folder, store, json=json)
        return
    found = find_runtimes(place.absolute(), store)
    document = {
        "format": "airgap/runtimes/1",
        "prefix": str(place.absolute()),
        "runtimes": [each.as_document() for each in found],
    }
    rows = [row for each in found for row in _rows(each)]
    show(document, table(rows) if rows else f"no environment in {place}", json=json)


def program_document(store: Store) -> dict[str, Any] | None:
    """Return what `airgap status` says of the environments; None where install.sh made none."""
    from airgap.install.runtimes import find_prefix, find_runtimes

    prefix = find_prefix()
    if prefix is None:
        return None
    document: dict[str, Any] = {"prefix": str(prefix)}
    try:
        document["runtimes"] = [each.as_document() for each in find_runtimes(prefix, store)]
    except AirgapError as error:
        document |= {"code": error.code, "error": error.message}
    return document


def program_rows(document: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the lines of `airgap status` about the program."""
    if document is None:
        return []
    if "error" in document:
        return [("program", document["error"])]
    found = document["runtimes"]
    total = sum(each["bytes"] for each in found)
    rows = [("program", f"{document['prefix']}, environments of {_size(total)}")]
    return rows + [
        ("not needed", f"{each['id']}, {_size(each['bytes'])}: airgap runtimes --remove")
        for each in found
        if not each["needs"]
    ]


def wheels_rows(manifest: Manifest, environment: Path | None = None) -> list[tuple[str, str]]:
    """Say where the program that a release brought along is, if another one answers now."""
    from airgap.install.runtimes import find_prefix, is_there, runtime_of

    here = Path(sys.prefix if environment is None else environment).resolve()
    prefix, made = find_prefix(here), runtime_of(manifest)
    if prefix is None or not made or here.name in made:
        return []
    there = [name for name in made if is_there(prefix, name)]
    state = f"{prefix}/runtimes/{there[0]}" if there else "not on this host any more"
    text = f"another one came with this release ({state}): sh install.sh from its medium"
    return [("program", text)]


def _remove(prefix: Path, names: list[str], folder: Path, store: Store, *, json: bool) -> None:
    from airgap.audit import Event, new_ulid
    from airgap.audit.site import open_site_log
    from airgap.config import load_site
    from airgap.install.record import actor_of, find_submitter
    from airgap.install.runtimes import remove_runtimes

    site = load_site(folder)
    person = find_submitter(site, os.getuid(), account_name())
    actor = None if person is None else actor_of(person)
    requests: dict[str, str] = {}
    with open_site_log(folder, site) as log:

        def record(name: str, phase: str, result: str) -> Any:
            facts = {"object": f"environment {name}", **({"result": result} if result else {})}
            request = requests.setdefault(name, new_ulid())
            return log.append(Event("admin.remove", phase, req=request, actor=actor, data=facts))

        done = remove_runtimes(prefix, names, store=store, audit=record)
    document = {
        "format": "airgap/runtimes-removed/1",
        "prefix": str(prefix),
        "runtimes": [each.runtime.as_document() for each in done],
        "receipts": [each.receipt.as_document() for each in done],
    }
    rows = [("removed", f"{each.runtime.id}, {_size(each.runtime.size)}") for each in done]
    if done:
        rows.append(("on record", f"audit log, record {done[-1].receipt.seq}"))
    text = table(rows) if rows else "nothing to remove: each environment is needed"
    show(document, text, json=json)


def _rows(runtime: Runtime) -> list[tuple[str, str]]:
    """Return the lines of one environment."""
    why = list(runtime.needs) or ["nothing needs it: airgap runtimes --remove"]
    state = "" if runtime.whole else ", unfinished"
    first = (runtime.id, f"{_size(runtime.size)}{state}; {why[0]}")
    return [first, *(("", text) for text in why[1:])]


def _size(size: int) -> str:
    return f"{size / _MEBIBYTE:,.0f} MiB"
