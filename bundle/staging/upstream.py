"""Evidence of the publisher as it is given to `inspect` and `build`: files, and whom to believe.

Reads what the command line names, once, so that what was checked is what travels. Decides which
files of a snapshot the evidence must speak of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.evidence.anchors import Anchors, Authority, Builder, Identity, Key, read_root, read_text
from bundle.evidence.levels import Item, Kind, Source
from bundle.scan.roles import Role
from bundle.scan.strict import open_view
from bundle.staging.provenance import HUB_FOLDERS
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.staging.inspect import InspectReport

EVIDENCE_LIMIT = 8 * 1024 * 1024
_NEEDED = frozenset(
    [Role.CONFIG, Role.TOKENIZER, Role.CARD, Role.LICENCE, Role.WEIGHTS, Role.INDEX]
)
_SIGNATURES = (".sig", ".sigstore", ".sigstore.json", ".asc")


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the publisher gave, what this site believes, and the day on which it is asked."""

    items: tuple[Item, ...] = ()
    anchors: Anchors = field(default_factory=Anchors)
    at: datetime | None = None


def read_items(named: Iterable[tuple[Kind, Path]]) -> tuple[Item, ...]:
    """Read pieces of evidence; a signature lies beside its checksum file as FILE.sig or .sigstore.

    Raises:
        RefusedError: `evidence.malformed`.
        FaultError: `host.io`.

    """
    items: list[Item] = []
    for kind, path in named:
        signature = None
        if kind == "checksums":
            beside = [path.with_name(path.name + end) for end in _SIGNATURES]
            signature = next((_read(each) for each in beside if each.is_file()), None)
        items.append(Item(kind, _unique(path.name, items), _read(path), signature))
    return tuple(items)


def anchors_of(
    *,
    keys: Sequence[Path] = (),
    authorities: Sequence[Path] = (),
    identities: Sequence[str] = (),
    issuer: str | None = None,
    channel: str | None = None,
    trusted_root: Path | None = None,
    builder: str | None = None,
    source: str | None = None,
) -> Anchors:
    """Return the anchors that the options of a command state.

    Raises:
        UsageError: Two options that need each other do not stand together.
        RefusedError: `evidence.anchor`.

    """
    named = issuer is not None
    _require(not keys or channel, "--signer-key needs --signer-channel: how the key came here")
    _require(not authorities or identities, "--signer-ca needs --signer-identity")
    _require(not authorities or channel, "--signer-ca needs --signer-channel: how it came here")
    _require(
        authorities or named or not identities,
        "--signer-identity needs --signer-issuer (Sigstore) or --signer-ca (certificates)",
    )
    _require(not named or identities, "--signer-issuer needs --signer-identity")
    _require((builder is None) == (source is None), "--builder-id and --builder-source go together")
    made = Anchors(
        keys=tuple(Key(name=p.stem, channel=channel or "", pem=read_text(p)) for p in keys),
        authorities=tuple(
            Authority(name=p.stem, channel=channel or "", identity=who, pem=read_text(p))
            for p in authorities
            for who in identities
        ),
        identities=tuple(
            Identity(name=who, identity=who, issuer=issuer or "") for who in identities if named
        ),
        builders=(Builder(id=builder, source=source),) if builder and source else (),
        trusted_root=None if trusted_root is None else read_root(trusted_root),
    )
    for key in made.keys:
        _ = key.public
    for authority in made.authorities:
        _ = authority.certificates
    return made


def source_of(report: InspectReport, items: Sequence[Item], *, pinned: bool) -> Source:
    """Return the files of the snapshot that evidence must speak of."""
    files = {path: digests.sha256 for path, digests in report.digests.items()}
    given = {
        hashlib.sha256(data).hexdigest()
        for item in items
        for data in (item.data, item.signature)
        if data is not None
    }
    return Source(
        files=files,
        needed=frozenset(p for p, role in report.roles.items() if role in _NEEDED),
        weights=frozenset(p for p, role in report.roles.items() if role is Role.WEIGHTS),
        exempt=frozenset(
            path
            for path, digest in files.items()
            if path.startswith(HUB_FOLDERS) or digest in given
        ),
        pinned=pinned,
        unpickled=report.unpickled is not None,
    )


def _read(path: Path) -> bytes:
    data = open_view(path)
    if len(data) > EVIDENCE_LIMIT:
        raise RefusedError(
            "evidence.malformed",
            f"{path.name!r:.80} has {len(data):,} bytes; at most {EVIDENCE_LIMIT:,} are read",
        )
    return bytes(data)


def _unique(name: str, items: Sequence[Item]) -> str:
    """Return a name that no other piece has: it becomes a file name in the bundle."""
    plain = (
        "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:80].strip(".-") or "file"
    )
    taken = {item.name for item in items}
    return next(
        text
        for text in (plain, *(f"{number}-{plain}" for number in range(2, 1000)))
        if text not in taken
    )


def _require(holds: object, text: str) -> None:
    if not holds:
        raise UsageError("usage.argument", text, hint="airgap inspect --help")
