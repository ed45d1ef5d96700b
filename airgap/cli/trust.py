"""`airgap keys` and `airgap trust`: who signs, and whose signatures count on this host."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.media import new_transit_key
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.keys import FileSigner, PublicKeyFile
    from bundle.trust import Trust

KeyOption = Annotated[
    str, typer.Option("--key", help="Private key: a file, or a name in keys/ of the tree.")
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the key.")
]


def register(app: typer.Typer) -> None:
    """Add both groups."""
    keys = typer.Typer(help="Make keys for people.", no_args_is_help=True)
    keys.command("new")(new)
    keys.command("transit")(new_transit_key)
    app.add_typer(keys, name="keys")
    trust = typer.Typer(help="Whose signatures count here.", no_args_is_help=True)
    trust.command("init")(init)
    trust.command("add")(add)
    trust.command("show")(show_trust)
    app.add_typer(trust, name="trust")


def new(
    name: Annotated[str, typer.Argument(help="Name of the key files.")],
    *,
    person: Annotated[str, typer.Option("--person", help="Id of the person it acts for.")],
    role: Annotated[
        list[str],
        typer.Option("--role", help="root, builder, approver, or a role of yours; repeatable."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder. Default: keys/ of the tree.")
    ] = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make NAME.pem (private, mode 0600) and NAME.pub.json (to hand to the trust root)."""
    from bundle.keys import new_key, read_passphrase

    folder = (out or root_folder(root) / "keys").absolute()
    made = new_key(
        folder, name, person=person, roles=tuple(role), passphrase=read_passphrase(passphrase_file)
    )
    document = {
        "keyid": made.keyid,
        "person": made.person,
        "roles": list(made.roles),
        "private": str(folder / f"{name}.pem"),
        "public": str(folder / f"{name}.pub.json"),
        "encrypted": passphrase_file is not None,
    }
    text = (
        f"private  {document['private']}  (keep it; never carry it across)\n"
        f"public   {document['public']}  (hand it over: airgap trust add)\n"
        f"key id   {made.keyid}\n"
        f"person   {made.person}, {', '.join(made.roles)}"
    )
    show(document, text, json=json)
    if passphrase_file is None and not json:
        stderr.print("note: the key has no passphrase (--passphrase-file)", markup=False)


def init(
    *,
    key: KeyOption = "root",
    passphrase_file: Passphrase = None,
    people: Annotated[
        int, typer.Option("--people", min=1, max=16, help="Approvers that a bundle needs.")
    ] = 2,
    require_role: Annotated[
        list[str] | None,
        typer.Option("--require-role", help="A role that must be among them; repeatable."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Import this root document instead.")
    ] = None,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="Of that document, sha256:..., as it was told you.")
    ] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Begin a trust root with a root key, or import one whose fingerprint you were told."""
    from bundle.keys import load_signer, read_limited, read_passphrase
    from bundle.trust import CHAIN_LIMIT, import_root, new_root, save_trust
    from policy.terms import Digest

    folder = root_folder(root) / "trust"
    _require_new(folder)
    if source is None:
        if fingerprint:
            raise UsageError("usage.argument", "--fingerprint needs --from")
        path = _key_path(key, root)
        signer = load_signer(path, read_passphrase(passphrase_file))
        trust = new_root(
            _public_half(path, signer),
            signer,
            now=datetime.now(UTC),
            people=people,
            required_roles=tuple(require_role or ()),
        )
    else:
        if not fingerprint:
            raise UsageError(
                "usage.argument",
                "--from needs --fingerprint: nothing else says that this is the right root",
                hint="read it from `airgap trust show` on the staging host, by phone or on paper",
            )
        raw = read_limited(source, CHAIN_LIMIT, code="trust.chain", what="the root document")
        trust = import_root(raw, Digest.parse(fingerprint.strip()))
    save_trust(trust, folder)
    show(trust_document(trust, folder), trust_view(trust, folder), json=json)


def add(
    public_key: Annotated[Path, typer.Argument(help="NAME.pub.json of the person.")],
    *,
    key: KeyOption = "root",
    passphrase_file: Passphrase = None,
    name: Annotated[str, typer.Option("--name", help="Full name of the person.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Enrol a key in the next version of the root, signed by the root key."""
    from bundle.keys import (
        KEY_FILE_LIMIT,
        load_signer,
        parse_public_key,
        read_limited,
        read_passphrase,
    )
    from bundle.trust import add_key, load_trust, save_trust

    folder = root_folder(root) / "trust"
    trust = load_trust(folder)
    raw = read_limited(public_key, KEY_FILE_LIMIT, code="trust.keyfile", what="the public key file")
    signer = load_signer(_key_path(key, root), read_passphrase(passphrase_file))
    longer = add_key(trust, parse_public_key(raw), [signer], now=datetime.now(UTC), name=name)
    save_trust(longer, folder)
    show(trust_document(longer, folder), trust_view(longer, folder), json=json)


def show_trust(*, root: Root = None, json: Json = False) -> None:
    """Show people, keys, thresholds and the fingerprint to compare."""
    from bundle.trust import load_trust

    folder = root_folder(root) / "trust"
    trust = load_trust(folder)
    show(trust_document(trust, folder), trust_view(trust, folder), json=json)


def trust_document(trust: Trust, folder: Path) -> dict[str, Any]:
    """Return what `trust show --json` prints."""
    from bundle.fields import format_time

    document = trust.document
    return {
        "format": "airgap/trust/1",
        "path": str(folder / "root.json"),
        "version": trust.version,
        "fingerprint": str(trust.fingerprint),
        "issued": format_time(document.issued),
        "expires": format_time(document.expires),
        "profile": document.profile,
        "thresholds": document.thresholds.model_dump(mode="json"),
        "people": {
            who: person.model_dump(mode="json", exclude_none=True)
            for who, person in document.people.items()
        },
    }


def trust_view(trust: Trust, folder: Path) -> str:
    """Return people and keys, and the line to compare."""
    from bundle.fields import format_time

    document = trust.document
    width = max(len(who) for who in document.people)
    lines: list[str] = []
    for who, person in sorted(document.people.items()):
        since = format_time(person.valid_from)[:10]
        name = "" if person.name == who else f"{person.name}, "
        lines.append(f"{who:<{width}}  {name}{', '.join(person.roles)}, since {since}")
        lines += [f"{'':<{width}}  key {keyid}" for keyid in person.keys]
    seal = document.thresholds.seal
    roles = f", among them {', '.join(seal.required_roles)}" if seal.required_roles else ""
    return "\n".join(
        [
            *lines,
            "",
            f"a bundle needs  {seal.people} approvers beside its builder{roles}",
            f"root            version {trust.version}, until {format_time(document.expires)[:10]}",
            f"document        {folder / 'root.json'}",
            f"fingerprint     {trust.fingerprint}",
        ]
    )


def _require_new(folder: Path) -> None:
    if folder.is_dir() and any(folder.glob("*.root.json")):
        raise RefusedError(
            "trust.exists",
            f"{folder} holds a trust root already, which is never replaced",
            hint="airgap trust show; or name another tree with --root",
        )


def _key_path(key: str, root: Path | None) -> Path:
    """Return the file that a path, or a name in keys/ of the tree, stands for."""
    path = Path(key)
    if "/" not in key and not path.exists():
        path = root_folder(root) / "keys" / f"{key.removesuffix('.pem')}.pem"
    return path


def _public_half(path: Path, signer: FileSigner) -> PublicKeyFile:
    """Read the public file beside a private one; it must be its public half."""
    from bundle.keys import KEY_FILE_LIMIT, parse_public_key, read_limited

    beside = path.with_suffix(".pub.json")
    raw = read_limited(beside, KEY_FILE_LIMIT, code="trust.keyfile", what="the public key file")
    found = parse_public_key(raw)
    if found.keyid != signer.public_key.keyid:
        raise RefusedError("trust.keyfile", f"{beside} is not the public half of {path}")
    return found
