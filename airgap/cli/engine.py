"""`airgap engine`: TensorRT engines of this host's GPU, built at install and signed by the lab."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.options import grouped
from airgap.cli.signers import Signing
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.config import Site
    from airgap.engine_store import Engines, Wanted
    from bundle.root import RootDocument

Model = Annotated[str, typer.Option(help="Installed bundle; default the current one.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="TensorRT engines of this host's GPU: built inside the seal, signed, never shipped.",
        no_args_is_help=True,
    )
    group.command("build")(build)
    group.command("verify")(verify)
    app.add_typer(group, name="engine")


@grouped
def build(
    *,
    by: Signing,
    model: Model = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Build the engines of an installed model on this GPU, sealed, and sign their record.

    The sizes are those of site.toml, [inference] engine_rows, engine_positions, engine_piece. An
    approver of the trust root signs. Not run on a GPU by the makers of this program.
    """
    from airgap import engine_store
    from airgap.audit.site import open_site_log
    from airgap.enclave import run_sealed

    now = datetime.now(UTC)
    bench = Bench.of(root, model)
    signer = by.open(root)
    engine_store.require_lab(signer, bench.trust, now)
    with open_site_log(bench.root, bench.site) as log:
        seal = engine_store.on_record(
            log,
            partial(
                run_sealed,
                profile="engine",
                min_rung=bench.site.enclave.min_rung,
                state=bench.root / "enclave",
            ),
        )
        with stderr.status("building engines inside the seal: minutes to hours"):
            made = engine_store.build(bench.root, bench.wanted, seal=seal, signer=signer, now=now)
    _show(bench, made, "built and signed", json=json)


def verify(*, model: Model = "", root: Root = None, json: Json = False) -> None:
    """Compare the signed engines with this host, file by file: what each start does."""
    from airgap import engine_store

    bench = Bench.of(root, model)
    found = engine_store.require(bench.root, bench.wanted, bench.trust)
    _show(bench, found, "signed, and those of this host", json=json)


@dataclass(frozen=True, slots=True)
class Bench:
    """What both commands need: the tree, its facts and trust, and which engines are meant."""

    root: Path
    site: Site
    trust: RootDocument
    wanted: Wanted

    @classmethod
    def of(cls, root: Path | None, model: str) -> Bench:
        """Read it; refuse a host, a bundle or a precision that has no engines."""
        from airgap.config import load_site
        from airgap.enclave.inventory import take
        from airgap.engine_store import Wanted
        from airgap.install import verify_installed
        from airgap.serve.provider import require_host
        from airgap.serve.session import describe, find_installed
        from bundle.trust import load_trust

        tree = root_folder(root)
        site = load_site(tree)
        require_host("tensorrt")
        installed = find_installed(tree, model)
        verify_installed(installed.folder)
        precision = site.inference.precision
        described = describe(installed, precision, "tensorrt")
        wanted = Wanted.of(installed, described.id, precision, site.inference, take())
        return cls(tree, site, load_trust(tree / "trust").standing, wanted)


def _show(bench: Bench, engines: Engines, state: str, *, json: bool) -> None:
    from airgap.cli.shown import table

    record, wanted = engines.record, bench.wanted
    document: dict[str, Any] = {
        "format": "airgap/engines/1",
        "state": state,
        "folder": str(engines.folder),
        "digest": str(engines.digest),
        "record": record.model_dump(mode="json"),
    }
    place, sizes = record.place, engines.shapes
    text = table(
        [
            ("engines", f"{state}: {counted(len(record.files), 'file')}"),
            ("of", f"{wanted.model} in {wanted.precision}"),
            ("bundle", record.bundle),
            ("for", f"{place.gpu}, compute {place.compute}, driver {place.driver}"),
            ("with", f"TensorRT {place.tensorrt}, onnxruntime-gpu {place.onnxruntime}"),
            ("sizes", f"{sizes.rows} rows, {sizes.capacity} positions, {sizes.piece} at once"),
            ("record", str(engines.digest)),
            ("folder", str(engines.folder)),
        ]
    )
    show(document, text, json=json)
