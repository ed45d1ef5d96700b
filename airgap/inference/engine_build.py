"""Builds TensorRT engines inside the seal, once at install (docs/design/inference.md, 6).

`python -m airgap.inference.engine_build JSON OUT`, in profile `engine` of the launcher. What it
leaves is foreign input: the secured side records, signs and later verifies every file by digest.

Not run on a GPU: tests pass a stand-in for the session.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import GRAPHS_LIMIT, REFERENCE, Graph, ModelFacts, parse_graphs
from airgap.inference.options import Setup, Shapes
from airgap.inference.strict import MalformedError, parse_object

ENGINE = ".engine"
GRAPHS_FILE = "graphs.json"
_LIMIT = 1 << 16
_BLOCK = 1 << 20

Open = Callable[..., Any]
"""`providers.open_session`, or a stand-in that writes files into the set-up's `engines`."""


def build_engines(folder: Path, *, precision: str, setup: Setup, open_session: Open) -> None:
    """Open the reference graph of a model on TensorRT so that its engines are left in a folder.

    Args:
        folder: Of the model.
        precision: Of the graph.
        setup: With `engines`, an empty folder, and `shapes`.
        open_session: Opens a session.

    Raises:
        ProgramError: `model.precision`, `model.provider`, `model.graph`, `model.file`,
            `model.engine`.

    """
    facts, graph = reference_graph(folder, precision)
    path = folder / graph.path
    if _sha256(path) != graph.sha256:
        raise ProgramError(
            "model.graph",
            f"{graph.path} does not have the digest that graphs.json names",
            "verify the installed bundle",
        )
    session = open_session(
        path,
        demand="tensorrt",
        threads=setup.threads,
        setup=replace(setup, build=True),
        facts=facts,
        described=graph,
    )
    del session  # the timing cache is written when the provider goes
    left = () if setup.engines is None else setup.engines.iterdir()
    if not any(each.name.endswith(ENGINE) for each in left):
        raise ProgramError(
            "model.engine",
            "the session came up and left no engine",
            "TensorRT took no part of the graph: demand `cuda`",
        )


def reference_graph(folder: Path, precision: str) -> tuple[ModelFacts, Graph]:
    """Return what `graphs.json` says of the graph that TensorRT takes."""
    try:
        with (folder / GRAPHS_FILE).open("rb") as stream:
            facts = parse_graphs(stream.read(GRAPHS_LIMIT + 1))
    except OSError as error:
        raise ProgramError(
            "model.file", f"{GRAPHS_FILE} cannot be read: {error.strerror}", "install it again"
        ) from error
    return facts, facts.graph(precision, (REFERENCE,))


def parse_job(text: str, out: Path) -> tuple[Path, str, Setup]:
    """Read what the secured side wrote: folder, precision and set-up; strict like all input."""
    try:
        fields = parse_object(text.encode(), limit=_LIMIT, what="engine job")
        folder, precision = Path(fields.text("folder", 4096)), fields.text("precision", 64)
        setup = Setup(
            threads=fields.integer("threads", 1, 1024),
            device=fields.integer("device", 0, 63),
            device_mb=fields.optional_integer("device_mb", 1, 1 << 30),
            deterministic=fields.flag("deterministic"),
            engines=out,
            shapes=Shapes(
                rows=fields.integer("rows", 1, 4096),
                capacity=fields.integer("positions", 1, 1 << 20),
                piece=fields.integer("piece", 1, 65536),
            ),
        )
        fields.done()
    except MalformedError as error:
        raise ProgramError("model.config", str(error)) from error
    return folder, precision, setup


def main(argv: Sequence[str], open_session: Open | None = None) -> int:
    """Build, and say in one line of JSON what went wrong."""
    try:
        folder, precision, setup = parse_job(argv[0], Path(argv[1]))
        if open_session is None:
            from airgap.inference import providers  # noqa: PLC0415 - onnxruntime, and slow

            open_session = providers.open_session
        build_engines(folder, precision=precision, setup=setup, open_session=open_session)
    except ProgramError as error:
        refusal = {"code": error.code, "message": error.message, "hint": error.hint}
        sys.stderr.write(json.dumps(refusal) + "\n")
        return 1
    return 0


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise ProgramError(
            "model.file", f"{path.name} cannot be read: {error.strerror}", "install it again"
        ) from error
    return state.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
