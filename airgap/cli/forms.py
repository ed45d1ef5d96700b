"""The options that open other forms of a bundle: volumes, deltas, encrypted files."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import stderr
from policy.errors import UsageError

if TYPE_CHECKING:
    from airgap.cli.shown import Bar
    from bundle.delta import Base
    from bundle.media import Help
    from bundle.volumes import Asker
    from policy.terms import Digest

BundlePath = Annotated[Path, typer.Argument(help="The bundle, NAME.agb.", metavar="BUNDLE")]
Volumes = Annotated[
    list[Path] | None,
    typer.Option("--volume", help="Another volume, or a folder of volumes; repeatable."),
]
BasePath = Annotated[
    Path | None, typer.Option("--base", help="Bundle of the older release, for a delta.")
]
TransitKeys = Annotated[
    list[Path] | None,
    typer.Option("--transit-key", help="Private transit key, NAME.transit.pem; repeatable."),
]
Project = Annotated[
    str | None, typer.Option("--project", help="Project of site.toml that it is for.")
]
Discs = Annotated[
    bool, typer.Option("--discs", help="Ask for the next volume when one is not there.")
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the transit key.")
]
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Arrival:
    """How a bundle comes in: for which project, in volumes on discs, encrypted."""

    project: Project = None
    volume: Volumes = None
    discs: Discs = False
    transit_key: TransitKeys = None
    passphrase_file: Passphrase = None

    def help(self, progress: Bar) -> Help:
        """Return what it takes to open it; the bar goes away while a person is asked for a disc."""
        ask = disc_asker(progress.paused) if self.discs else None
        return open_help(self.volume, self.transit_key, self.passphrase_file, None, ask=ask)


def open_help(
    volumes: Sequence[Path] | None,
    transit_keys: Sequence[Path] | None,
    passphrase_file: Path | None,
    base: Path | None,
    *,
    store: Path | None = None,
    ask: Asker | None = None,
) -> Help:
    """Return what it takes to open other forms, from the options of a command.

    `store` is where installed releases lie; `ask` lets a person change discs.
    """
    from bundle.delta import InstalledBase
    from bundle.keys import read_passphrase
    from bundle.media import Help
    from bundle.transit import load_identity

    offered = None if base is None else open_base(base)

    def find(digest: Digest) -> Base | None:
        if offered is not None and offered.manifest.digest == digest:
            return offered
        folder = None if store is None else store / "installed" / digest.hex
        return InstalledBase(folder) if folder is not None and folder.is_dir() else None

    phrase = read_passphrase(passphrase_file)
    return Help(
        volumes=tuple(volumes or ()),
        asker=ask,
        find_base=find,
        identities=tuple(load_identity(path, phrase) for path in transit_keys or ()),
    )


def open_base(path: Path) -> Base:
    """Return the older release that lies at `path`: a bundle, or the folder of an install."""
    from bundle.delta import BundleBase, InstalledBase
    from bundle.media import open_medium

    if (path / "META" / "manifest.json").is_file():
        return InstalledBase(path)
    return BundleBase(open_medium(path))


def disc_asker(pause: Callable[[], AbstractContextManager[None]]) -> Asker:
    """Return what asks a person for the next disc while the bar is away."""

    def ask(number: int, count: int) -> list[Path]:
        with pause():
            return ask_for_disc(number, count)

    return ask


def ask_for_disc(number: int, count: int) -> list[Path]:
    """Ask on the terminal where volume `number` is; nothing means that it is not to be had."""
    if not sys.stdin.isatty():
        return []
    stderr.print(
        f"Bring volume {number} of {count}, then type its path or folder; "
        "an empty line stops (the install can be resumed): ",
        end="",
    )
    line = sys.stdin.readline().strip()
    if not line:
        return []
    from bundle.volumes import find_siblings

    path = Path(line).expanduser()
    return find_siblings(path) if path.exists() else ask_for_disc(number, count)


def medium_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is worth saying about the form; of a single file, nothing."""
    if facts.get("form") == "delta":
        return [("form", f"delta of {facts['new_bytes']:,} bytes on {facts['base']}")]
    if facts.get("form") != "volumes":
        return []
    rows = [("form", f"{facts['count']} volumes and {facts['parity']} of parity")]
    rows += [
        ("repaired", f"volume {item['volume']}: {item['chunks']} chunks, from parity")
        for item in facts["repaired"]
    ]
    rows += [("problem", text) for text in facts["problems"]]
    rows += [
        ("problem", f"volume {n} of parity is missing or damaged") for n in facts["bad_parity"]
    ]
    return rows


def parse_size(text: str) -> int:
    """Read a size such as 4.7GB (powers of 1000) or 25GiB (powers of 1024), in bytes."""
    from decimal import Decimal

    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise UsageError(
            "usage.argument",
            f"--volume-size {text!r:.40} is no size",
            hint="write it like 700MB, 4.7GB or 25GiB",
        )
    return int(Decimal(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()])
