"""Everything that decides, apart from facts: packs of rules, editions of lists, lineage, rulings.

What the program ships is what its list of digests names; what a site adds counts when its people
have signed it. The rules themselves are judged by `policy`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import policy.strict
from airgap.config import read_plain
from policy import snapshots
from policy.errors import FaultError, RefusedError
from policy.lineage import SCHEMA as LINEAGE_SCHEMA
from policy.lineage import LineageFile, Registry, Ruling, parse_lineage, unite
from policy.pack import Packs, PolicyPack, combine, parse_pack
from policy.snapshots import ListSnapshot, Snapshots, parse_lists
from policy.terms import Digest

MAX_SITE_FILES = 64
SHIPPED = ("lists", "packs", "registry")  # folders below `policy/`
DIGESTS = "digests.json"


@dataclass(frozen=True)
class Rules:
    """Everything that decides, apart from facts: rule packs, list editions, lineage."""

    packs: Packs
    lists: Snapshots
    registry: Registry
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A file of which rules were made; `own` is one of the site."""

    name: str
    content: bytes
    own: bool


def load_rules(root: Path | None, *, drafts: Sequence[Path] = ()) -> Rules:
    """Load what the program ships and what `<root>/policy/*.yaml` adds or tightens.

    A file of the site counts when it is signed as the trust root of the tree asks. `drafts` are
    further files for a what-if, which nobody has signed yet.

    Raises:
        RefusedError: `policy.signature`, a file is not signed; `pack.*`, with file, line and
            column; `trust.*`, there are files of the site and no trust root to judge them by.

    """
    folder = None if root is None else root / "policy"
    paths = [] if folder is None or not folder.is_dir() else sorted(folder.glob("*.yaml"))
    require_few(paths)
    signed = list(_signed(root, paths))
    own = _parse_files([(str(path), content) for path, content in signed])
    unsigned = _parse_files([(str(path), _read(path)) for path in drafts])
    sources = [Source(name, content, own=False) for name, content in shipped_files().items()]
    sources += [Source(path.name, content, own=True) for path, content in signed]
    return _united(_shipped(), own, _rulings(root), unsigned=unsigned, sources=tuple(sources))


def rules_of(sources: Sequence[Source], rulings: Iterable[Ruling]) -> Rules:
    """The rules of these very files, whatever is loaded today.

    Raises:
        RefusedError: `pack.*`, this release does not read them.

    """
    shipped = _parse_files([(each.name, each.content) for each in sources if not each.own])
    own = _parse_files([(each.name, each.content) for each in sources if each.own])
    return _united(shipped, own, rulings, sources=tuple(sources))


def _united(
    shipped: _Files,
    own: _Files,
    rulings: Iterable[Ruling],
    *,
    unsigned: _Files | None = None,
    sources: tuple[Source, ...] = (),
) -> Rules:
    further = unsigned or _Files()
    return Rules(
        packs=combine(shipped.packs, (*own.packs, *further.packs)),
        lists=snapshots.complete(shipped.lists, (*own.lists, *further.lists)),
        registry=unite((*shipped.lineage, *own.lineage, *further.lineage), rulings),
        sources=sources,
    )


def _rulings(root: Path | None) -> Iterable[Ruling]:
    """The signed adjudications of a site; none where it has no folder for them."""
    if root is None or not (root / "policy" / "adjudications").is_dir():
        return ()
    from airgap.adjudications import load  # noqa: PLC0415 - loads cryptography
    from bundle.trust import load_trust  # noqa: PLC0415 - as above

    return load(root, load_trust(root / "trust").standing)


def _signed(root: Path | None, paths: Sequence[Path]) -> Iterator[tuple[Path, bytes]]:
    """Read the files of a site whose signatures hold."""
    if root is None or not paths:
        return
    # Signatures load cryptography, which a site without files of its own need not.
    from airgap.site_rules import read_signature, verify_file  # noqa: PLC0415
    from bundle.trust import load_trust  # noqa: PLC0415

    trust = load_trust(root / "trust").standing
    for path in paths:
        content = _read(path)
        verify_file(content, path.name, read_signature(path), trust)
        yield path, content


def with_files(rules: Rules, paths: Sequence[Path]) -> Rules:
    """The rules with the packs, lists and lineage of `paths` in place of those of the same name.

    For comparisons only: nobody has signed them.

    Raises:
        RefusedError: `pack.*`.

    """
    given = _parse_files([(str(path), _read(path)) for path in paths])
    ids = {each.pack_id for each in given.packs}
    editions = {(each.list_id, each.text.edition) for each in given.lists}
    shipped = {each.pack_id for each in _shipped().packs}
    kept = [each for each in rules.packs.packs if each.pack_id not in ids]
    base = [each for each in (*kept, *given.packs) if each.pack_id in shipped]
    own = [each for each in (*kept, *given.packs) if each.pack_id not in shipped]
    lists = [
        each for each in rules.lists.snapshots if (each.list_id, each.text.edition) not in editions
    ]
    registry = rules.registry
    if given.lineage:
        signed = [each for each in registry.rulings if each.expires is not None]
        registry = unite((*registry.files, *given.lineage), signed)
    return Rules(combine(base, own), Snapshots((*lists, *given.lists)), registry)


def require_file(content: bytes, name: str) -> None:
    """Refuse bytes that are no file of rules, lists or lineage; `pack.*` with line and column."""
    _parse_files([(name, content)])


def _read(path: Path) -> bytes:
    return read_plain(path, policy.strict.MAX_BYTES + 1)


def require_few(paths: Sequence[Path]) -> None:
    """Refuse more files than a site needs; `pack.limit`."""
    if len(paths) > MAX_SITE_FILES:
        raise RefusedError("pack.limit", f"more than {MAX_SITE_FILES} files in {paths[0].parent}")


@dataclass(frozen=True, slots=True)
class _Files:
    packs: tuple[PolicyPack, ...] = ()
    lists: tuple[ListSnapshot, ...] = ()
    lineage: tuple[LineageFile, ...] = ()


def shipped_files() -> dict[str, bytes]:
    """The files of rules, lists and lineage that the program ships, by path below `policy/`."""
    home = Path(policy.strict.__file__).parent
    paths = sorted(path for each in SHIPPED for path in (home / each).glob("*.yaml"))
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in paths}


@lru_cache(maxsize=1)
def _shipped() -> _Files:
    """Parse the shipped files; each must be the one that the digest list of the program names."""
    home = Path(policy.strict.__file__).parent
    found = shipped_files()
    listed = json.loads((home / DIGESTS).read_bytes())
    digests = {name: str(Digest.of(content)) for name, content in found.items()}
    if digests != listed:
        wrong = sorted(
            name for name in {*digests, *listed} if digests.get(name) != listed.get(name)
        )
        raise FaultError(
            "host.self",
            f"the shipped rules are not those of this release: {', '.join(wrong)[:300]}",
        )
    return _parse_files([(str(home / name), content) for name, content in found.items()])


def _parse_files(files: Iterable[tuple[str, bytes]]) -> _Files:
    found_packs: list[PolicyPack] = []
    found_lists: list[ListSnapshot] = []
    found_lineage: list[LineageFile] = []
    for name, content in files:
        value = policy.strict.read_yaml(content, name).value
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema == snapshots.SCHEMA:
            found_lists += parse_lists(content, name)
        elif schema == LINEAGE_SCHEMA:
            found_lineage.append(parse_lineage(content, name))
        else:
            found_packs.append(parse_pack(content, name))
    return _Files(tuple(found_packs), tuple(found_lists), tuple(found_lineage))
