"""The wheels of `airgap build`: options, and the release that holds wheels alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli.common import show
from policy.errors import FaultError, RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.keys import Signer
    from bundle.staging.wheel_attestations import Attestations
    from bundle.staging.wheelhouse import Wheelhouse

Tell = Callable[[str, int, int], None]

Snapshot = Annotated[
    Path | None,
    typer.Argument(help="Folder of the snapshot, with config.json in it. None: wheels alone."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="Hosts that wheels are for, linux-x86_64-cp311; repeatable. Default: none."
    ),
]
Accelerators = Annotated[
    str, typer.Option("--accelerator", help="Of those hosts: cpu, or cuda with its libraries.")
]
NoWheels = Annotated[
    bool, typer.Option("--no-wheels", help="Say that no wheels travel, as without --target.")
]
AirgapSource = Annotated[
    Path | None,
    typer.Option(
        "--airgap", help="Checkout or wheel of this program. Default: what this one runs from."
    ),
]
WheelsFrom = Annotated[
    Path | None,
    typer.Option("--wheels-from", help="Take wheels from this folder and ask no index."),
]


AttestationsFrom = Annotated[
    Path | None,
    typer.Option(
        "--attestations", help="Folder of NAME.whl.provenance (PEP 740), held against --publishers."
    ),
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options say of wheels."""

    targets: tuple[str, ...]
    accelerator: str
    source: Path | None
    folder: Path | None
    attestations: Path | None = None
    publishers: Path | None = None

    def require(self, *, no_wheels: bool, alone: bool) -> None:
        """Refuse options that contradict each other: UsageError `usage.argument`."""
        problem = ""
        if no_wheels and self.targets:
            problem = "--no-wheels contradicts --target"
        elif alone and not self.targets:
            problem = "without a snapshot there must be a --target: there is nothing else to carry"
        elif self.accelerator not in {"cpu", "cuda"}:
            problem = f"--accelerator {self.accelerator!r:.40}: cpu or cuda"
        elif not self.targets and (self.source or self.folder):
            problem = "--airgap and --wheels-from need a --target"
        if problem:
            raise UsageError("usage.argument", problem, hint="airgap build --help")

    @contextlib.contextmanager
    def gathered(self, tell: Tell) -> Iterator[Wheelhouse | None]:
        """Yield the wheels, in a folder that goes away; None where none are wanted."""
        if not self.targets:
            yield None
            return
        with staging():
            from bundle.staging.wheelhouse import (
                Accelerator,
                Pip,
                collect,
                default_source,
                own_wheel,
                parse_target,
            )
        targets = [parse_target(text) for text in self.targets]
        with tempfile.TemporaryDirectory(prefix="airgap-wheels-") as name:
            pip = Pip(None if self.folder is None else self.folder.absolute())
            # Our own wheel is built with what this host has; only what travels is from the folder.
            own = own_wheel(self.source or default_source(), Path(name))
            work = Path(name) / "work"
            work.mkdir()
            accelerator: Accelerator = "cuda" if self.accelerator == "cuda" else "cpu"
            yield collect(
                targets,
                accelerator,
                work,
                own=own,
                pip=pip,
                attest=self._attestations(),
                progress=tell,
            )

    def _attestations(self) -> Attestations | None:
        """Return what proves who published the wheels, where a folder of it is given."""
        if self.attestations is None:
            return None
        with staging():
            from bundle.evidence.anchors import Anchors, load_anchors
            from bundle.staging.wheel_attestations import Attestations
        anchors = Anchors() if self.publishers is None else load_anchors(self.publishers)
        return Attestations(self.attestations, anchors)


def build_alone(
    wanted: Wanted,
    out: Path,
    *,
    name: str,
    version: str,
    created: datetime,
    expires: datetime,
    epoch: int,
    root: Path,
    signers: Sequence[Signer],
    bars: Callable[[], AbstractContextManager[Tell]],
    json: bool,
) -> int:
    """Build the draft of a release that holds wheels and no model; show it."""
    with staging():
        from bundle.staging.bootstrap import WheelFacts, build_wheels
        from bundle.staging.views import wheels_document, wheels_view
    from bundle.trust import load_trust

    facts = WheelFacts(name, version, created, expires, epoch)
    trust = load_trust(root / "trust")
    with bars() as tell, wanted.gathered(tell) as wheelhouse:
        if wheelhouse is None:
            raise RefusedError("build.target", "no target is named")
        built = build_wheels(wheelhouse, out, facts, trust=trust, signer=signers, progress=tell)
    show(wheels_document(built), wheels_view(built), json=json)
    return 0


@contextlib.contextmanager
def staging() -> Iterator[None]:
    """Turn a missing library of the staging side into a fault that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise FaultError(
            "host.extra",
            f"this command needs {error.name!r:.60}, which is not installed",
            hint="install the extra `staging` on the connected side: pip install 'airgap[staging]'",
        ) from error
