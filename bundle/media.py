"""Opening what lies on a medium: a bundle, a delta, volumes, and each of them encrypted.

Decides from the first headers which form it is. Nothing is believed yet; FORMAT.md sections 14 to
16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.archive import read_head
from bundle.delta import DELTA, Base, DeltaMedium
from bundle.medium import Medium
from bundle.source import PlainFile, Source
from bundle.tar import names_document
from bundle.transit import TRANSIT, Identity, TransitFile
from bundle.volumes import VOLUME, Asker, VolumeSet, find_siblings, number_of
from policy.errors import RefusedError
from policy.terms import Digest


def _no_base(_: Digest) -> Base | None:
    return None


@dataclass(frozen=True, slots=True)
class Help:
    """What a host has to open other forms than a plain bundle.

    `volumes`: further places of volumes. `asker`: brings a missing one. `find_base`: gives an
    installed release. `identities`: keys that open a transit encryption.
    """

    volumes: tuple[Path, ...] = ()
    asker: Asker | None = None
    find_base: Callable[[Digest], Base | None] = _no_base
    identities: tuple[Identity, ...] = ()


def open_medium(path: Path, more: Help | None = None) -> Medium:
    """Open a bundle in any form; reads its head and no byte of the body.

    Raises:
        RefusedError: `archive.*`, `volume.*`, `delta.*`, `transit.*`.
        FaultError: `host.io`.

    """
    more = more or Help()

    def opener(place: Path) -> Source:
        return open_source(place, more.identities)

    path = _lone(path)
    if path.is_dir() or more.volumes or number_of(path):
        return VolumeSet(_places([path, *more.volumes]), opener, more.asker)
    source = opener(path)
    try:
        start = read_head(source).body_start
        if names_document(source, start, VOLUME):
            source.close()
            return VolumeSet([path], opener, more.asker)
        if names_document(source, start, DELTA):
            return DeltaMedium(source, more.find_base)
        return Medium(source)
    except BaseException:
        source.close()
        raise


def _lone(path: Path) -> Path:
    """Return the bundle of a folder that holds one and no volume, else `path` as it was given."""
    if not path.is_dir():
        return path
    names = [each for each in path.iterdir() if ".agb" in each.suffixes]
    return names[0] if len(names) == 1 and names[0].suffix == ".agb" else path


def open_source(path: Path, identities: Sequence[Identity] = ()) -> Source:
    """Open one file, through its transit encryption if it has one; codes as `open_medium`."""
    source = PlainFile(path)
    try:
        if names_document(source, 0, TRANSIT):
            return TransitFile(source, identities)
    except BaseException:
        source.close()
        raise
    return source


def _places(paths: Sequence[Path]) -> list[Path]:
    """Return every file that may be a volume, the named ones first, each once."""
    found: dict[Path, Path] = {}
    refusal: RefusedError | None = None
    for path in paths:
        try:
            siblings = find_siblings(path)
        except RefusedError as error:
            refusal = refusal or error
            continue
        for place in siblings:
            found.setdefault(place.absolute(), place)
    if not found and refusal is not None:
        raise refusal
    return list(found.values())
