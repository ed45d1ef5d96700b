"""`airgap trust`: the next version of the root, by those who hold root keys, and its way here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr
from airgap.cli.options import grouped
from airgap.cli.signers import RootSigning, Signing
from airgap.cli.trust_view import trust_document, trust_view
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from bundle.envelope import Envelope
    from bundle.root import RootDocument
    from bundle.trust import Trust

Propose = Annotated[
    Path | None,
    typer.Option(
        "--propose", help="Write a proposal here for other root people to sign, and change nothing."
    ),
]
PublicKeys = Annotated[list[Path], typer.Argument(help="NAME.pub.json; two of a cnsa2 person.")]
Confirm = Annotated[
    str | None,
    typer.Option("--confirm", help="What you would type: the first 8 digits of the digest."),
]
_SHORT = 8
_SIGNED_LIMIT = 16 * 1024 * 1024


def register(trust: typer.Typer) -> None:
    """Add the commands to `airgap trust`."""
    trust.command("rotate")(rotate)
    trust.command("renew")(renew)
    trust.command("retire")(retire)
    trust.command("remove")(remove)
    trust.command("threshold")(threshold)
    trust.command("cnsa2")(raise_profile)
    trust.command("sign")(sign)
    trust.command("sign-file")(sign_file)
    trust.command("export")(export)
    trust.command("import")(import_file)


# -- the next version -------------------------------------------------------------------------


@dataclass(frozen=True)
class NextVersion(RootSigning):
    """Who signs the next version of the root, and whether it is a proposal only."""

    propose: Propose = None
    root: Root = None
    json: Json = False

    def load(self) -> Trust:
        """Read the trust root of this tree."""
        return load(self.root)

    def finish(self, trust: Trust, document: RootDocument) -> None:
        """Sign the next version; keep it, or write the proposal."""
        from bundle.rotation import propose
        from bundle.trust import append_envelope

        envelope = propose(document, self.open(self.root))
        if self.propose is not None:
            write_envelope(self.propose, envelope)
            _tell(trust, envelope, self.propose, json=self.json)
            return
        keep(append_envelope(trust, envelope), self.root, json=self.json)


@grouped
def rotate(
    new: PublicKeys,
    *,
    old: Annotated[list[str], typer.Option("--old", help="Id of a key that goes; repeatable.")],
    following: NextVersion,
) -> None:
    """Put new keys of a person in the place of old ones.

    A root key that goes signs together with the one that comes: name both with --key.
    """
    from bundle.rotation import rotate as change

    trust, now = following.load(), datetime.now(UTC)
    document = change(trust.document, old, read_public_keys(new), now=now)
    following.finish(trust, document)


@grouped
def renew(
    *,
    days: Annotated[int, typer.Option("--days", min=1, max=36500, help="From now on.")] = 5 * 365,
    following: NextVersion,
) -> None:
    """Let the root hold for longer; an expired root is renewed in the same way."""
    from bundle.rotation import renew as change

    trust, now = following.load(), datetime.now(UTC)
    document = change(trust.document, now=now, valid_for=timedelta(days=days))
    following.finish(trust, document)


@grouped
def retire(
    person: Annotated[str, typer.Argument(help="Id of the person.")],
    *,
    following: NextVersion,
) -> None:
    """End the enrolment of a person who leaves; releases of before go on counting."""
    from bundle.rotation import retire as change

    trust = following.load()
    document = change(trust.document, person, now=datetime.now(UTC))
    following.finish(trust, document)


@grouped
def remove(
    keyid: Annotated[str, typer.Argument(help="Id of the key.")],
    *,
    following: NextVersion,
) -> None:
    """Take a key out: nothing that it signed counts any more. For a stolen key also revoke it."""
    from bundle.rotation import without_key

    trust = following.load()
    document = without_key(trust.document, keyid, now=datetime.now(UTC))
    following.finish(trust, document)


@grouped
def threshold(
    *,
    people: Annotated[int | None, typer.Option("--people", min=1, max=16)] = None,
    root_people: Annotated[int | None, typer.Option("--root-people", min=1, max=16)] = None,
    revocation_people: Annotated[
        int | None, typer.Option("--revocation-people", min=1, max=16)
    ] = None,
    require_role: Annotated[
        list[str] | None, typer.Option("--require-role", help="Replaces the required roles.")
    ] = None,
    list_required: Annotated[
        bool | None,
        typer.Option("--list-required/--list-optional", help="Whether hosts need a list."),
    ] = None,
    stale: Annotated[
        str | None, typer.Option("--stale", help="With a stale list: alarm, or refuse.")
    ] = None,
    following: NextVersion,
) -> None:
    """Change how many people must sign a bundle, a root or a revocation list."""
    from bundle.root import RevocationRule
    from bundle.rotation import with_thresholds

    trust = following.load()
    if stale not in {None, "alarm", "refuse"}:
        raise UsageError("usage.argument", f"--stale {stale!r:.40}", hint="alarm, or refuse")
    held = trust.document.revocations or RevocationRule()
    rule = RevocationRule.model_validate(
        {
            "required": held.required if list_required is None else list_required,
            "stale": stale or held.stale,
        }
    )
    document = with_thresholds(
        trust.document,
        now=datetime.now(UTC),
        root=root_people,
        seal=people,
        revocation=revocation_people,
        required_roles=None if require_role is None else tuple(require_role),
        rule=None if rule == RevocationRule() and trust.document.revocations is None else rule,
    )
    following.finish(trust, document)


@grouped
def raise_profile(
    *,
    following: NextVersion,
) -> None:
    """Raise the profile to cnsa2. There is no way back; bundles of before are refused from then on.

    Enrol the pairs of everybody first. The root person signs with the old key and both new ones.
    """
    from bundle.rotation import to_cnsa2

    trust = following.load()
    document = to_cnsa2(trust.document, now=datetime.now(UTC))
    following.finish(trust, document)


# -- proposals and chains on their way --------------------------------------------------------


@grouped
def sign(
    proposal: Annotated[Path, typer.Argument(help="The file that --propose wrote.")],
    *,
    by: Signing,
    confirm: Confirm = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Read a proposal, confirm it, and sign it."""
    from bundle.rotation import describe_change, read_proposal, sign_proposal
    from policy.terms import Digest

    trust, envelope = load(root), read_envelope(proposal)
    document = read_proposal(trust, envelope)
    digest = Digest.of(envelope.payload)
    for line in [*describe_change(trust.document, document), f"digest {digest}"]:
        stderr.print(line, markup=False, soft_wrap=True)
    require_typed(digest.hex, confirm)
    signed = sign_proposal(trust, envelope, by.open(root))
    write_envelope(proposal, signed)
    _tell(trust, signed, proposal, json=json)


@grouped
def sign_file(
    file: Annotated[Path, typer.Argument(help="Such as SHA256SUMS of wheels and install scripts.")],
    *,
    by: Signing,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign a small file for openssl: what a host needs before it has this program at all.

    Writes FILE.PERSON-KEYID.sig, a plain signature over the file. It is no seal.
    """
    from bundle.keys import ED25519, P384, read_limited

    trust = load(root)
    raw = read_limited(file, _SIGNED_LIMIT, code="trust.keyfile", what="the file")
    rows: list[dict[str, str]] = []
    for signer in by.open(root):
        public = signer.public_key
        who = trust.document.find_person(public.keyid)
        if who is None:
            raise RefusedError(
                "trust.root", f"key {public.keyid} is nobody's here", hint="airgap trust show"
            )
        name = f"{who}-{public.keyid[:8]}"
        signature = file.with_name(f"{file.name}.{name}.sig")
        put(signature, signer.sign(raw))
        how = (
            f"openssl pkeyutl -verify -pubin -inkey {name}.pem -rawin -in {file.name} "
            f"-sigfile {signature.name}"
            if public.scheme == ED25519
            else f"openssl dgst -sha384 -verify {name}.pem -signature {signature.name} {file.name}"
            if public.scheme == P384
            else f"openssl pkeyutl -verify -pubin -inkey {name}.pem -in {file.name} "
            f"-sigfile {signature.name}  # openssl 3.5"
        )
        rows.append({"person": who, "signature": str(signature), "verify": how})
    text = "\n".join(f"wrote {row['signature']}\n{row['verify']}" for row in rows)
    show({"file": str(file), "signatures": rows}, text, json=json)


def export(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    *,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="Also write the approvers' public keys here, for openssl."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write the chain of roots and the revocation list, for hosts that hold an older root."""
    from bundle.trust import chain_document

    trust = load(root)
    if keys is not None:
        keys.mkdir(parents=True, exist_ok=True)
        for keyid, key in trust.document.public_keys().items():
            who = trust.document.find_person(keyid) or ""
            if trust.document.people[who].approves and key.supported:
                put(keys / f"{who}-{keyid[:8]}.pem", key.pem)
    put(out, chain_document(trust) + b"\n")
    document = {"file": str(out), "version": trust.version, "fingerprint": str(trust.fingerprint)}
    show(document, f"wrote {out}: roots up to version {trust.version}", json=json)


def import_file(
    source: Annotated[Path, typer.Argument(help="A chain (trust export) or a signed proposal.")],
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Take newer roots that continue the chain of this tree; an older one changes nothing."""
    from bundle.keys import read_limited
    from bundle.root import CHAIN_LIMIT
    from bundle.rotation import read_proposal
    from bundle.trust import append_envelope, follow_chain, newest_of

    trust = load(root)
    raw = read_limited(source, CHAIN_LIMIT, code="trust.chain", what="the file").strip(b"\n")
    if b'"format":"airgap-trust/1"' in raw[:40]:
        if newest_of(raw) < trust.version:
            raise RefusedError(
                "trust.chain",
                f"the file ends with root {newest_of(raw)}, this tree holds root {trust.version}",
                hint="an older root never takes the place of a newer one; nothing is to be done",
            )
        longer = follow_chain(trust, raw)
    else:
        envelope = read_envelope(source)
        read_proposal(trust, envelope)
        longer = append_envelope(trust, envelope)
    keep(longer, root, json=json)


def keep(trust: Trust, root: Path | None, *, json: bool) -> None:
    """Save a longer chain, on record where this tree keeps a log, and show it."""
    from airgap.install import Store
    from airgap.signed import on_record
    from bundle.trust import require_dated, save_trust

    require_dated(trust, datetime.now(UTC))
    folder = root_folder(root)
    store = Store(folder / "store")
    with on_record(folder, "admin.trust", account_name(), trust.fingerprint):
        save_trust(trust, folder / "trust")
        if store.folder.is_dir():  # of a lab; a staging tree has none
            store.note_trust(trust)
    place = folder / "trust"
    show(trust_document(trust, place), trust_view(trust, place), json=json)


# -- helpers ----------------------------------------------------------------------------------


def read_public_keys(paths: list[Path]) -> list[Any]:
    """Read public key files."""
    from bundle.keys import KEY_FILE_LIMIT, parse_public_key, read_limited

    return [
        parse_public_key(
            read_limited(path, KEY_FILE_LIMIT, code="trust.keyfile", what="the public key file")
        )
        for path in paths
    ]


def require_typed(digest: str, confirm: str | None) -> None:
    """Have the first digits of a digest typed; RefusedError `sign.confirm` otherwise."""
    typed = confirm
    if typed is None and sys.stdin.isatty():
        stderr.print(f"Type {digest[:_SHORT]} to sign, anything else to stop: ", end="")
        typed = sys.stdin.readline()
    text = (typed or "").strip().removeprefix("sha256:").lower()
    if len(text) < _SHORT or not digest.startswith(text):
        raise RefusedError(
            "sign.confirm",
            "nothing was signed: the confirmation is not the digest of the file",
            hint=f"read it, then add: --confirm {digest[:_SHORT]}",
        )


def load(root: Path | None) -> Trust:
    """Read the trust root of this tree."""
    from bundle.trust import load_trust

    return load_trust(root_folder(root) / "trust")


def read_envelope(path: Path) -> Envelope:
    """Read a signed document."""
    from bundle.envelope import parse_envelope
    from bundle.keys import read_limited
    from bundle.root import CHAIN_LIMIT

    raw = read_limited(path, CHAIN_LIMIT, code="trust.chain", what="the file")
    return parse_envelope(raw.strip(b"\n"), code="trust.chain", limit=CHAIN_LIMIT)


def write_envelope(path: Path, envelope: Envelope) -> None:
    """Write a signed document."""
    put(path, envelope.to_bytes() + b"\n")


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    from bundle.durable import write_beside
    from policy.errors import FaultError

    try:
        write_beside(path.absolute(), content, 0o644)
    except OSError as error:
        raise FaultError("host.io", f"{path} cannot be written: {error.strerror}") from error


def _tell(trust: Trust, envelope: Envelope, path: Path, *, json: bool) -> None:
    from bundle.rotation import missing_signers
    from policy.terms import Digest

    missing = missing_signers(trust, envelope)
    document = {
        "file": str(path),
        "digest": str(Digest.of(envelope.payload)),
        "signatures": len(envelope.signatures),
        "missing": missing,
    }
    text = f"wrote {path}\n{missing or f'complete: airgap trust import {path}'}"
    show(document, text, json=json)
