"""`airgap audit` acts: keys, payloads, acts of two people, and the service."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr, write_new
from airgap.cli.signing import Key, Passphrase, signer_of
from policy.errors import RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.audit.people import Act
    from airgap.audit.steward import OwnLog
    from airgap.audit.token_key import TokenKey
    from airgap.config import Site

Out = Annotated[Path, typer.Option("--out", "-o", help="A file that does not exist yet.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group `audit`."""
    group.command(name="rotate-key")(rotate_key)
    group.command(name="token-key")(token_key)
    group.command(name="payload-key")(payload_key)
    group.command(name="open")(open_payload)
    group.command(name="act")(act)
    group.command(name="countersign")(countersign)
    group.command(name="prune")(prune)
    group.command(name="purge")(purge)
    group.command(name="new-log")(new_log)
    group.command(name="serve")(serve)


# -- keys and payloads ----------------------------------------


Token = Annotated[
    str,
    typer.Argument(help="pkcs11:token=LABEL;object=LABEL?module-path=FILE; a label not in use."),
]
PinFile = Annotated[Path, typer.Option("--pin-file", help="Its first line is the token's PIN.")]


def rotate_key(
    *,
    into: Annotated[
        str, typer.Option("--into", help="Make the next key in a token: a pkcs11: URI.")
    ] = "",
    pin_file: Annotated[
        Path | None, typer.Option("--pin-file", help="Its first line is the PIN for --into.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """End the epoch of the log's key; hand the new verifier key to everyone who verifies."""
    from airgap.audit import Actor, AuditLog

    tree = root_folder(root)
    with own_log(tree, changes=False) as log:
        actor = Actor(account_name())
        if not into:
            vkey = log.rotate_key(actor)
        elif isinstance(log, AuditLog):
            vkey = log.rotate_key(actor, _token(into, pin_file))
        else:
            raise UsageError(
                "usage.argument", "--into: the service holds the log", hint="stop it for that"
            )
        size = log.size
    document = {"vkey": str(vkey), "from_size": size, "ring": str(tree / "keys" / "audit.vkey")}
    text = f"{vkey}\nsigns from record {size} on; every verifier needs {document['ring']}"
    show(document, text, json=json)


def token_key(
    uri: Token,
    *,
    pin_file: PinFile,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make the key of a log that does not exist yet in a PKCS#11 token."""
    from airgap.audit import create_log_key, site_name
    from airgap.audit.token_key import pin_path, read_pin

    tree = root_folder(root)
    path = tree / "keys" / "audit.pem"
    if path.exists():
        raise RefusedError(
            "audit.key", f"{path} exists", hint="move a log's key: airgap audit rotate-key --into"
        )
    name, made = site_name(_site(tree).institution.name), _token(uri, pin_file)
    vkey = create_log_key(path, site=name, token=made)
    pin = pin_path(path)
    if pin.absolute() != pin_file.absolute():
        write_new(pin, read_pin(pin_file) + b"\n")
        pin.chmod(0o400)
    show({"vkey": vkey, "key": str(path), "uri": made.uri}, f"{vkey}\n{made.uri}", json=json)


def _token(uri: str, pin_file: Path | None) -> TokenKey:
    from airgap.audit.token_key import TokenKey, read_pin

    if pin_file is None:
        raise UsageError("usage.argument", "a token needs its PIN", hint="give --pin-file FILE")
    return TokenKey.make(uri, read_pin(pin_file))


def payload_key(
    out: Annotated[Path, typer.Argument(help="The holder's private key; FILE.pub comes beside.")],
    *,
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Make the key pair of whoever may read payloads, on that person's own machine."""
    from airgap.audit.payloads import HolderKey
    from bundle.keys import read_passphrase

    key = HolderKey.generate()
    key.write(out, read_passphrase(passphrase_file))
    public = out.with_suffix(".pub")
    document = {"private": str(out), "public": str(public), "key": key.public.key_id}
    text = (
        f"wrote {out} (stays with its holder) and {public}\n"
        f'on the host: copy {public.name} to keys/payloads.pub and set payloads = "sealed"'
    )
    show(document, text, json=json)


def open_payload(
    seq: Annotated[int, typer.Argument(min=0, help="Number of a record that names a payload.")],
    log: Annotated[
        Path | None, typer.Argument(help="Folder that holds `log/`. Default: your own log.")
    ] = None,
    *,
    key: Annotated[Path, typer.Option("--key", help="The holder's private key.")],
    side: Annotated[str, typer.Option("--side", help="in or out.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the bytes here. Default: print.")
    ] = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Open an encrypted payload, as its holder, and check it against the record's commitment."""
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.payloads import load_holder_key
    from airgap.audit.retention import find_line, open_sealed
    from bundle.keys import read_passphrase

    layout = Layout(root_folder(root) / "audit" if log is None else log.expanduser().absolute())
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no audit log in {layout.folder}")
    holder = load_holder_key(key, read_passphrase(passphrase_file))
    side, payload = open_sealed(
        layout, find_line(layout, seq), holder, origin=found[0].origin, side=side
    )
    if out is not None:
        write_new(out, payload)
    text = payload.decode("utf-8", "backslashreplace")
    document = {
        "seq": seq, "side": side, "bytes": len(payload), "commitment": "holds",
        "payload": text if out is None else None, "out": str(out) if out else None,
    }  # fmt: skip
    show(document, text if out is None else f"wrote {out}; the commitment holds", json=json)


# -- acts of two people ----------------------------------------


def act(
    kind: Annotated[str, typer.Argument(help="prune, purge or new-log.")],
    *,
    key: Key,
    reason: Annotated[str, typer.Option("--reason", help="Why, in your words.")],
    out: Out,
    last: Annotated[
        int | None, typer.Option("--last", help="prune: the last record. Default: all that may go.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="prune: manifest.json of the export.")
    ] = None,
    record: Annotated[
        int | None, typer.Option("--record", help="purge: a record that names the payload.")
    ] = None,
    side: Annotated[str, typer.Option("--side", help="purge: in or out.")] = "",
    heads: Annotated[
        list[Path] | None,
        typer.Option("--head", help="new-log: a head of the old log, kept outside; repeatable."),
    ] = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write down a pruning, a purge or a new log identity, and sign it as its first person."""
    from airgap.audit.people import PAYLOAD_TYPE
    from bundle.envelope import sign_statement

    tree = root_folder(root)
    if kind == "prune":
        statement = _prune_act(tree, last, manifest, reason)
    elif kind == "purge" and record is not None:
        statement = _purge_act(tree, record, side, reason)
    elif kind == "new-log":
        statement = _new_log_act(tree, heads or (), reason)
    else:
        raise UsageError(
            "usage.argument",
            f"{kind!r:.40}",
            hint="act prune, act purge --record SEQ, or act new-log",
        )
    signer = signer_of(key, passphrase_file, tree)
    envelope = sign_statement(statement.to_bytes(), PAYLOAD_TYPE, signer)
    write_new(out, envelope.to_bytes() + b"\n")
    show(_act_document(statement, out), f"{_act_words(statement)}\nwrote {out}", json=json)


def countersign(
    statement: Annotated[Path, typer.Argument(help="The file that `audit act` wrote.")],
    *,
    key: Key,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign an act as its second person, after reading it."""
    from airgap.audit.disk import Disk
    from airgap.audit.people import parse_act, read_act
    from bundle.envelope import add_signature

    tree = root_folder(root)
    envelope = read_act(statement)
    found = parse_act(envelope.payload)
    stderr.print(_act_words(found), markup=False, soft_wrap=True)
    signed = add_signature(envelope, signer_of(key, passphrase_file, tree))
    Disk().put(statement, signed.to_bytes() + b"\n")
    show(_act_document(found, statement), f"signed {statement}", json=json)


def prune(
    statement: Annotated[
        Path | None, typer.Argument(help="The act, signed by two people. Default: only look.")
    ] = None,
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Drop old segments that were exported and cosigned; leaf hashes stay. Without an act: look."""
    from airgap.audit import Actor
    from airgap.audit.people import read_act
    from airgap.audit.retention import plan
    from airgap.audit.retention import prune as prune_log
    from airgap.audit.site import retention
    from bundle.trust import load_trust

    tree = root_folder(root)
    profile = retention(_site(tree).audit)
    now = datetime.now(UTC)
    if statement is None:
        with own_log(tree, changes=False) as log:
            found = plan(log, profile, now)
    else:
        envelope, trust = read_act(statement), load_trust(tree / "trust").standing
        with owners_log(tree) as log:
            found = prune_log(
                log, envelope, trust=trust, profile=profile, now=now, actor=Actor(account_name())
            )
    count = found.last + 1 - found.first
    document = {
        "first": found.first, "last": found.last, "records": count, "profile": profile.name,
        "pruned": statement is not None, "held_by": list(found.reasons),
    }  # fmt: skip
    what = "pruned" if statement is not None else "may go"
    text = f"{counted(count, 'record')} {what} ({profile.name}: {profile.basis})"
    show(document, "\n".join([text, *found.reasons]), json=json)


def purge(
    statement: Annotated[Path, typer.Argument(help="The act, signed by two people.")],
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Destroy one encrypted payload; its record, commitment and proofs stay valid."""
    from airgap.audit import Actor
    from airgap.audit.people import read_act
    from airgap.audit.retention import purge as purge_payload
    from bundle.trust import load_trust

    tree = root_folder(root)
    envelope, trust = read_act(statement), load_trust(tree / "trust").standing
    with owners_log(tree) as log:
        done = purge_payload(
            log, envelope, trust=trust, now=datetime.now(UTC), actor=Actor(account_name())
        )
    text = f"{_act_words(done)}\ndone; exports made before may hold the payload still"
    show(_act_document(done, statement), text, json=json)


def new_log(
    statement: Annotated[Path, typer.Argument(help="The act, signed by two people.")],
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Begin a new log where the old one or its key is lost; what is left of it is put aside."""
    from airgap.audit.identity import begin_again
    from airgap.audit.people import read_act
    from airgap.audit.site import capacity
    from bundle.trust import load_trust

    tree = root_folder(root)
    site = _site(tree)
    found = begin_again(
        tree, read_act(statement), site=site.institution.name, now=datetime.now(UTC),
        trust=load_trust(tree / "trust").standing, capacity=capacity(site.audit),
    )  # fmt: skip
    text = (
        f"{found.origin}\nbegun by {' and '.join(found.people)} in place of {found.previous}\n"
        f"its verifier key, for everyone who verifies: {found.vkey}\n"
        f"what is left of the old log: {', '.join(found.aside) or 'nothing'}\n"
        "export the old one, if it can be: airgap audit export FOLDER --out OUT"
    )
    document = {
        "origin": found.origin, "vkey": found.vkey, "previous": found.previous,
        "people": list(found.people), "aside": list(found.aside),
    }  # fmt: skip
    show(document, text, json=json)


# -- the service ----------------------------------------


def serve(
    *,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Default: [audit] socket of site.toml.")
    ] = None,
    group: Annotated[
        str, typer.Option("--group", help="Whose members may connect. Default: you alone.")
    ] = "",
    broker: Annotated[
        str, typer.Option("--broker", help="Account of `airgap serve`, which speaks for its users.")
    ] = "",
    root: Root = None,
) -> None:
    """Own the log and serve it to brokers on a Unix socket, until interrupted."""
    import grp
    import pwd

    from airgap.audit.daily import Daily
    from airgap.audit.restart import SettingsWatch
    from airgap.audit.service import Service
    from airgap.audit.site import open_own_log
    from airgap.systemd import tell_systemd

    tree = root_folder(root)
    site = _site(tree)
    path = socket or (Path(site.audit.socket) if site.audit.socket else None)
    if path is None:
        raise UsageError(
            "usage.argument", "no socket", hint="give --socket, or set it in [audit] of site.toml"
        )
    number = -1
    if group:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            raise UsageError("usage.argument", f"--group: no group {group!r:.40}") from None
    try:
        brokers = frozenset({pwd.getpwnam(broker).pw_uid}) if broker else frozenset[int]()
    except KeyError:
        raise UsageError("usage.argument", f"--broker: no account {broker!r:.40}") from None
    with open_own_log(tree, site, mode="service") as log:
        service = Service(log, path.absolute(), 0o660 if group else 0o600, number, brokers)
        daily = Daily(log)
        settings = SettingsWatch(tree, site.audit, lambda line: tell_systemd(f"STATUS={line}"))
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: service.stop())
        daily.start()
        settings.start()

        def ready() -> None:
            tell_systemd("READY=1")
            stderr.print(f"serving {log.origin} at {path}", markup=False, soft_wrap=True)

        service.run(ready)
        settings.stop()
        daily.stop()


# -- small things ----------------------------------------


def own_log(tree: Path, *, changes: bool = True) -> OwnLog:
    """Open the log of this tree, or go through the service that holds it.

    `changes` says that files of the log change or go: that is for the service's account alone.
    """
    from airgap.audit import AuditLog
    from airgap.audit.site import capacity, find_log_socket, payload_key
    from airgap.audit.steward import held_by_service

    settings = _site(tree).audit if (tree / "site.toml").exists() else None
    path = find_log_socket(tree, settings)
    held = held_by_service(path, tree / "audit")
    if held is not None:
        if changes:
            held.require_files()
        return held
    return AuditLog.open(
        tree / "audit",
        key=tree / "keys" / "audit.pem",
        create=False,
        capacity=capacity(settings) if settings else None,
        payload_key=payload_key(tree, settings) if settings else None,
    )


@contextlib.contextmanager
def owners_log(tree: Path) -> Iterator[OwnLog]:
    """Yield the log of this tree for an act that changes its files, as the account that owns them.

    Root does what the service's account may do, and no more; read what the account may not before.
    """
    from airgap.audit.site import find_log_socket
    from airgap.audit.steward import as_owner, held_by_service

    settings = _site(tree).audit if (tree / "site.toml").exists() else None
    held = held_by_service(find_log_socket(tree, settings), tree / "audit")
    with contextlib.ExitStack() as stack:
        if held is not None:
            held.close()
            stack.enter_context(as_owner(tree / "audit"))
        yield stack.enter_context(own_log(tree))


def _site(tree: Path) -> Site:
    from airgap.config import load_site

    return load_site(tree)


def _prune_act(tree: Path, last: int | None, manifest: Path | None, reason: str) -> Act:
    from airgap.audit.people import Act
    from airgap.audit.retention import export_digest, plan
    from airgap.audit.site import retention

    profile, now = retention(_site(tree).audit), datetime.now(UTC).replace(microsecond=0)
    with own_log(tree, changes=False) as log:
        found = plan(log, profile, now)
        origin = log.origin
    if last is None and found.last < found.first:
        raise RefusedError("audit.retention", f"nothing may be pruned: {'; '.join(found.reasons)}")
    return Act(
        act="prune", origin=origin, issued=now, reason=reason, profile=profile.name,
        last=found.last if last is None else last,
        manifest=export_digest(manifest) if manifest else None,
    )  # fmt: skip


def _purge_act(tree: Path, record: int, side: str, reason: str) -> Act:
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.people import Act
    from airgap.audit.retention import choose_payload, find_line

    layout = Layout(tree / "audit")
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no audit log in {layout.folder}")
    payload = choose_payload(find_line(layout, record), side)[1]
    return Act(
        act="spill.purge", origin=found[0].origin, reason=reason, record=record, payload=payload,
        issued=datetime.now(UTC).replace(microsecond=0),
    )  # fmt: skip


def _new_log_act(tree: Path, heads: Sequence[Path], reason: str) -> Act:
    from airgap.audit.identity import last_known
    from airgap.audit.people import Act

    known = last_known(tree, heads)
    return Act(
        act="new-log", origin=known.origin, reason=reason,
        issued=datetime.now(UTC).replace(microsecond=0),
        previous=str(known) if known.size else None,
    )  # fmt: skip


def _act_words(found: Act) -> str:
    if found.act == "new-log":
        known = f"its last known head: {found.previous}" if found.previous else "no head is known"
        return f"begin a new log in place of {found.origin}; {known}: {found.reason}"
    what = (
        f"prune {found.origin} up to record {found.last} ({found.profile})"
        if found.act == "prune"
        else f"purge payload {found.payload} of record {found.record} in {found.origin}"
    )
    return f"{what}: {found.reason}"


def _act_document(found: Act, path: Path) -> dict[str, Any]:
    return found.model_dump(mode="json", exclude_none=True) | {"file": str(path)}
