"""`airgap keys` and `airgap trust`: who signs, and whose signatures count on this host."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli import emergency, revoke, rotation
from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.media import new_transit_key
from airgap.cli.options import grouped
from airgap.cli.signers import Passphrase, PinFile, RootSigning
from airgap.cli.trust_view import trust_document, trust_view
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.keys import PublicKeyFile, Signer


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
    rotation.register(trust)
    emergency.register(trust)
    trust.command("import-revocations")(revoke.import_revocations)
    revoke.register(app)
    app.add_typer(trust, name="trust")


def new(
    name: Annotated[str, typer.Argument(help="Name of the key files.")],
    *,
    person: Annotated[str, typer.Option("--person", help="Id of the person it acts for.")],
    role: Annotated[
        list[str],
        typer.Option(
            "--role",
            help="root, builder, policy, revocation; any other role approves bundles.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder. Default: keys/ of the tree.")
    ] = None,
    passphrase_file: Passphrase = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help="ed25519, ecdsa-p384 or ml-dsa-87.")
    ] = "ed25519",
    profile: Annotated[
        str, typer.Option("--profile", help="cnsa2 makes both keys of a person.")
    ] = "default",
    pkcs11: Annotated[
        str, typer.Option("--pkcs11", help="Make the key inside this token: a pkcs11: URI.")
    ] = "",
    pin_file: PinFile = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make NAME.pem (private, mode 0600) and NAME.pub.json (to hand to the trust root).

    With --pkcs11 the private key is made in the token and never leaves it. With --profile cnsa2
    both keys of a person are made: NAME-ml-dsa-87 and NAME-ecdsa-p384.
    """
    from bundle.keys import new_key, new_pair, pair_names, read_passphrase

    folder = (out or root_folder(root) / "keys").absolute()
    roles, phrase = tuple(role), read_passphrase(passphrase_file)
    if profile not in {"default", "cnsa2"} or (pkcs11 and profile == "cnsa2"):
        raise UsageError(
            "usage.argument",
            f"--profile {profile!r:.40}: default or cnsa2, and cnsa2 makes no keys in tokens",
            hint="make each key of the pair by itself: --scheme ml-dsa-87, --scheme ecdsa-p384",
        )
    if pkcs11:
        made = [_token_key(pkcs11, pin_file, folder, name, scheme, person=person, roles=roles)]
        names = [name]
    elif profile == "cnsa2":
        made = [*new_pair(folder, name, person=person, roles=roles, passphrase=phrase)]
        names = [*pair_names(name)]
    else:
        made = [new_key(folder, name, person=person, roles=roles, passphrase=phrase, scheme=scheme)]
        names = [name]
    rows = [
        {
            "keyid": key.keyid,
            "scheme": key.scheme,
            "person": key.person,
            "roles": list(key.roles),
            "private": pkcs11 or str(folder / f"{each}.pem"),
            "public": str(folder / f"{each}.pub.json"),
            "encrypted": passphrase_file is not None,
        }
        for each, key in zip(names, made, strict=True)
    ]
    document = rows[0] if len(rows) == 1 else {**rows[0], "keys": rows}
    text = "\n".join(
        f"private  {row['private']}  (keep it; never carry it across)\n"
        f"public   {row['public']}  (hand it over: airgap trust add)\n"
        f"key id   {row['keyid']}  ({row['scheme']})"
        for row in rows
    )
    show(document, f"{text}\nperson   {person}, {', '.join(role)}", json=json)
    if passphrase_file is None and not json and not pkcs11:
        stderr.print("note: the key has no passphrase (--passphrase-file)", markup=False)


def _token_key(
    uri: str,
    pin_file: Path | None,
    folder: Path,
    name: str,
    scheme: str,
    *,
    person: str,
    roles: tuple[str, ...],
) -> PublicKeyFile:
    """Make a key in a token; its public half is written like any other."""
    from bundle.keys import public_key_file, read_passphrase, save_public_key
    from bundle.token import new_token_key

    if (folder / f"{name}.pub.json").exists():  # before the token holds a key that nobody wants
        raise RefusedError("trust.keyfile", f"{folder / name}.pub.json exists; choose another name")
    signer = new_token_key(uri, read_passphrase(pin_file), scheme)
    document = public_key_file(name, signer.public_key, person=person, roles=roles)
    save_public_key(folder, name, document)
    return document


@grouped
def init(
    *,
    by: RootSigning,
    profile: Annotated[
        str, typer.Option("--profile", help="default, or cnsa2 for good.")
    ] = "default",
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
    from bundle.keys import read_limited
    from bundle.root import CHAIN_LIMIT
    from bundle.trust import import_root, new_root, save_trust
    from policy.terms import Digest

    folder = root_folder(root) / "trust"
    _require_new(folder)
    if source is None:
        if fingerprint:
            raise UsageError("usage.argument", "--fingerprint needs --from")
        if profile not in {"default", "cnsa2"}:
            raise UsageError("usage.argument", f"--profile {profile!r:.40}: default or cnsa2")
        signers = by.open(root)
        trust = new_root(
            [_public_half(each, by.key, root) for each in signers],
            signers,
            now=datetime.now(UTC),
            people=people,
            required_roles=tuple(require_role or ()),
            profile="cnsa2" if profile == "cnsa2" else "default",
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


@grouped
def add(
    public_key: rotation.PublicKeys,
    *,
    name: Annotated[str, typer.Option("--name", help="Full name of the person.")] = "",
    following: rotation.NextVersion,
) -> None:
    """Enrol keys in the next version of the root, signed by the root key."""
    from bundle.root import with_keys

    trust = following.load()
    found = rotation.read_public_keys(public_key)
    document = with_keys(trust.document, found, now=datetime.now(UTC), name=name)
    following.finish(trust, document)


def show_trust(*, root: Root = None, json: Json = False) -> None:
    """Show people, keys, thresholds and the fingerprint to compare."""
    from bundle.trust import load_trust

    folder = root_folder(root) / "trust"
    trust = load_trust(folder)
    show(trust_document(trust, folder), trust_view(trust, folder), json=json)


def _require_new(folder: Path) -> None:
    if folder.is_dir() and any(folder.glob("*.root.json")):
        raise RefusedError(
            "trust.exists",
            f"{folder} holds a trust root already, which is never replaced",
            hint="airgap trust show; or name another tree with --root",
        )


def _public_half(signer: Signer, names: list[str], root: Path | None) -> PublicKeyFile:
    """Find the public file of a key: beside the private one, or in keys/ of the tree."""
    from bundle.keyring import key_paths
    from bundle.keys import KEY_FILE_LIMIT, parse_public_key, read_limited
    from bundle.token import names_token

    folder = root_folder(root) / "keys"
    named = [path for name in names if not names_token(name) for path in key_paths(name, folder)]
    beside = [path.with_suffix(".pub.json") for path in named]
    others = sorted(folder.glob("*.pub.json")) if len(named) < len(names) else []
    for path in [*beside, *others]:
        raw = read_limited(path, KEY_FILE_LIMIT, code="trust.keyfile", what="the public key file")
        found = parse_public_key(raw)
        if found.keyid == signer.public_key.keyid:
            return found
    raise RefusedError(
        "trust.keyfile",
        f"{', '.join(map(str, beside)) or folder} is not the public half of key "
        f"{signer.public_key.keyid}",
        hint="airgap keys new writes NAME.pub.json beside NAME.pem",
    )
