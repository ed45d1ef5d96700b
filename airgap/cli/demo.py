"""`airgap demo`: the whole road on one machine, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.common import Json, show, stderr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="demo")(demo)


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for every artefact.")] = Path("demo-out"),
    source: Annotated[Path, typer.Option(help="Model snapshot in Hugging Face layout.")] = Path(
        "reference/logos-ref-tiny/model"
    ),
    json: Json = False,
) -> None:
    """Carry the reference model from a hub snapshot to a sealed, decided, recorded answer."""
    from airgap.demo import closing_screen, run_demo

    found = run_demo(out, source, stderr)
    show(found, closing_screen(found, out), json=json)
