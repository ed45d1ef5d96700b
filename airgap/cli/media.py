"""Other forms of a bundle: volumes for small media, deltas on an older release, encryption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.common import Json, Root, root_folder, show
from airgap.cli.forms import (
    BasePath,
    BundlePath,
    Passphrase,
    TransitKeys,
    Volumes,
    medium_rows,
    open_base,
    open_help,
    parse_size,
)
from airgap.cli.shown import bar, table
from policy.errors import RefusedError, UsageError

OutFolder = Annotated[
    Path | None, typer.Option("-o", "--out", help="Folder. Default: beside the input.")
]
OutFile = Annotated[Path, typer.Option("-o", "--out", help="File to write.")]
Files = Annotated[list[Path], typer.Argument(help="Bundles, volumes or deltas.", metavar="FILE...")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("split")(split)
    app.command("join")(join)
    app.command("repair")(repair)
    app.command("delta")(delta)
    app.command("encrypt")(encrypt)
    app.command("decrypt")(decrypt)


def split(
    bundle: BundlePath,
    *,
    volume_size: Annotated[
        str, typer.Option("--volume-size", help="Most bytes of a volume: 700MB, 4.7GB, 25GiB.")
    ],
    parity: Annotated[
        int, typer.Option("--parity", min=0, max=64, help="Volumes that may be lost without harm.")
    ] = 0,
    out: OutFolder = None,
    json: Json = False,
) -> None:
    """Cut BUNDLE into volumes NAME.agb.001, ..., each with the whole seal in it."""
    from bundle.media import open_medium
    from bundle.split import split as cut

    folder = out or bundle.absolute().parent
    size = parse_size(volume_size)
    folder.mkdir(parents=True, exist_ok=True)
    medium = open_medium(bundle)
    try:
        with bar("split") as progress:
            made = cut(medium, folder, volume_size=size, parity_count=parity, progress=progress)
    finally:
        medium.close()
    data = len(made) - parity
    document = {
        "format": "airgap/volumes/1",
        "volumes": [{"path": str(p), "bytes": p.stat().st_size} for p in made],
        "data": data,
        "parity": parity,
    }
    rows = [("volumes", f"{data}, and {parity} of parity")]
    rows += [(path.name, f"{path.stat().st_size:,} bytes") for path in made]
    show(document, table(rows), json=json)


def join(
    bundle: BundlePath,
    *,
    out: OutFile,
    volume: Volumes = None,
    base: BasePath = None,
    transit_key: TransitKeys = None,
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Write the full bundle that a set of volumes, or a delta and its base, stands for."""
    from bundle.media import open_medium
    from bundle.split import join as put_together

    medium = open_medium(bundle, open_help(volume, transit_key, passphrase_file, base))
    try:
        with bar("join") as progress:
            digest = put_together(medium, out, progress)
        facts = medium.facts()
    finally:
        medium.close()
    document = {"format": "airgap/joined/1", "path": str(out), "bundle": str(digest), "from": facts}
    rows = [("written", str(out)), ("digest", str(digest)), *medium_rows(facts)]
    show(document, table(rows), json=json)


def repair(bundle: BundlePath, *, out: OutFolder = None, json: Json = False) -> None:
    """Write the lost and damaged volumes of a set anew, from its parity volumes."""
    from bundle.media import open_medium
    from bundle.split import mend
    from bundle.volumes import VolumeSet

    medium = open_medium(bundle)
    try:
        if not isinstance(medium, VolumeSet):
            raise RefusedError(
                "volume.set",
                f"{str(bundle)!r:.160} is no volume of a set",
                hint="give a volume, or the folder of a set",
            )
        folder = out or (bundle if bundle.is_dir() else bundle.absolute().parent)
        with bar("repair") as progress:
            done = mend(medium, folder, progress)
    finally:
        medium.close()
    document = {
        "format": "airgap/repaired/1",
        "written": [str(path) for path in done.written],
        "equalised": [str(path) for path in done.equalised],
    }
    rows = [("written", path.name) for path in done.written]
    rows += [("seal made equal", path.name) for path in done.equalised]
    show(document, table(rows or [("whole", "nothing had to be repaired")]), json=json)


def delta(
    bundle: BundlePath,
    *,
    base: Annotated[
        Path, typer.Option("--base", help="The older release: its bundle, or an installed folder.")
    ],
    out: OutFile,
    json: Json = False,
) -> None:
    """Write what BUNDLE has more than BASE: the same seal, without what the lab has already."""
    from bundle.delta import write_delta
    from bundle.media import open_medium

    older = open_base(base)
    medium = open_medium(bundle)
    try:
        with bar("delta") as progress:
            facts = write_delta(medium, older, out, progress)
        full = medium.head.body_start + sum(run.size for f in facts.files for run in f.runs)
    finally:
        medium.close()
    size = out.stat().st_size
    document = {
        "format": "airgap/delta/1",
        "path": str(out),
        "bytes": size,
        "base": facts.base,
        "result": facts.result,
    }
    rows = [
        ("written", str(out)),
        ("bytes", f"{size:,} of {full:,}"),
        ("base", facts.base),
        ("result", facts.result),
    ]
    show(document, table(rows), json=json)


def encrypt(
    files: Files,
    *,
    to: Annotated[
        list[Path], typer.Option("--to", help="NAME.transit.pub.json of a recipient; repeatable.")
    ],
    out: OutFolder = None,
    json: Json = False,
) -> None:
    """Encrypt files for transit, each to NAME.enc; the plain files stay."""
    from bundle.keys import read_limited
    from bundle.source import PlainFile
    from bundle.transit import KEY_LIMIT, encrypt_file, parse_transit_key

    keys = [
        parse_transit_key(read_limited(path, KEY_LIMIT, code="transit.key", what="the transit key"))
        for path in to
    ]
    made: list[Path] = []
    for path in files:
        target = (out or path.absolute().parent) / f"{path.name}.enc"
        source = PlainFile(path)
        try:
            with bar(path.name) as progress:
                encrypt_file(source, target, keys, progress=progress)
        finally:
            source.close()
        made.append(target)
    document = {
        "format": "airgap/encrypted/1",
        "files": [str(path) for path in made],
        "recipients": [{"name": key.name, "keyid": key.keyid} for key in keys],
    }
    rows = [("encrypted", str(path)) for path in made]
    rows += [("for", f"{key.name} ({key.scheme}, {key.keyid[:16]})") for key in keys]
    show(document, table(rows), json=json)


def decrypt(
    files: Files,
    *,
    transit_key: Annotated[
        list[Path],
        typer.Option("--transit-key", help="Private transit key, NAME.transit.pem; repeatable."),
    ],
    passphrase_file: Passphrase = None,
    out: OutFolder = None,
    json: Json = False,
) -> None:
    """Decrypt files for transit; `verify` and `install` also take them as they are."""
    from bundle.media import open_source
    from bundle.transit import TransitFile, decrypt_file

    found = open_help(None, transit_key, passphrase_file, None)
    made: list[Path] = []
    for path in files:
        if path.suffix != ".enc":
            raise UsageError("usage.argument", f"{path.name!r:.100} does not end in .enc")
        source = open_source(path, found.identities)
        try:
            if not isinstance(source, TransitFile):
                raise RefusedError("transit.malformed", f"{path.name!r:.100} is not encrypted")
            target = (out or path.absolute().parent) / path.stem
            with bar(path.name) as progress:
                decrypt_file(source, target, progress)
        finally:
            source.close()
        made.append(target)
    document = {"format": "airgap/decrypted/1", "files": [str(path) for path in made]}
    show(document, table([("decrypted", str(path)) for path in made]), json=json)


def new_transit_key(
    name: Annotated[str, typer.Argument(help="Name of the key files.")],
    *,
    profile: Annotated[
        str, typer.Option("--profile", help="default (ML-KEM-768, X25519) or cnsa2 (1024, P-384).")
    ] = "default",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder. Default: keys/ of the tree.")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="Its first line locks the key.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make NAME.transit.pem (to open what is encrypted) and NAME.transit.pub.json (to hand out)."""
    from bundle.keys import read_passphrase
    from bundle.transit import SCHEMES
    from bundle.transit import new_transit_key as make

    if profile not in SCHEMES:
        raise UsageError(
            "usage.argument", f"--profile is {' or '.join(SCHEMES)}, not {profile!r:.40}"
        )
    folder = (out or root_folder(root) / "keys").absolute()
    made = make(folder, name, profile=profile, passphrase=read_passphrase(passphrase_file))
    document = {
        "keyid": made.keyid,
        "scheme": made.scheme,
        "private": str(folder / f"{name}.transit.pem"),
        "public": str(folder / f"{name}.transit.pub.json"),
        "encrypted": passphrase_file is not None,
    }
    rows = [
        ("private", f"{document['private']}  (stays in the lab)"),
        ("public", f"{document['public']}  (for whoever encrypts)"),
        ("key id", made.keyid),
    ]
    show(document, table(rows), json=json)
