"""What `install.sh` hands over to: from a fresh runtime to a tree that works, and a record of it.

The shell part has checked the seal with openssl and nothing else of ours. Here the bundle is
verified completely before anything of it is believed; then trust root, site facts, accounts, units
and the first admission are brought in, each only where it is not as it must be. A second run finds
nothing to do and writes nothing. docs/design/bundle.md, 7.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from airgap.audit import Actor, Event, new_ulid
from airgap.audit.site import open_site_log
from airgap.config import FILE_NAME, create_site, load_site, parse_site
from airgap.host_setup import Places, Program, log_served, place_file, set_up, to_start
from airgap.install import Store
from airgap.install.record import actor_of, find_submitter, last_record
from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope
from bundle.manifest import Manifest
from bundle.media import Help, open_medium
from bundle.root import CHAIN_LIMIT
from bundle.trust import Trust, follow_chain, import_root, load_trust, save_trust
from bundle.verify import VerifyReport, open_bundle, verify_bundle
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

TRANSCRIPT_LIMIT = 1024 * 1024
_HOST_FOLDERS = ("/etc/systemd/system", "/etc/sysusers.d", "/etc/sysctl.d")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person asked for."""

    bundle: Path
    fingerprint: Digest
    volumes: tuple[Path, ...] = ()
    site: Path | None = None
    model: Path | None = None
    project: str | None = None
    transcript: str = ""
    approval: Envelope | None = None  # of going back to an older bundle of wheels
    digest: Digest | None = None  # of the release that install.sh has checked and taken wheels from


@dataclass(slots=True)
class Outcome:
    """What was done. `record` is the number of the audit record, None where nothing changed."""

    lines: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    record: int | None = None
    transcript: Digest | None = None
    refusal: RefusedError | None = None  # of the admission, or of the seal; all else was done

    def as_document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "format": "airgap/bootstrap/1",
            "changed": list(self.changed),
            "lines": list(self.lines),
            "record": self.record,
            "transcript": None if self.transcript is None else str(self.transcript),
            "refused": "" if self.refusal is None else self.refusal.code,
        }


def bootstrap(
    wish: Wish,
    places: Places,
    *,
    now: datetime,
    more: Help,
    program: Program | None = None,
    say: Say = lambda _: None,
) -> Outcome:
    """Verify the bundle, and bring the host to what it asks for.

    Args:
        wish: The bundle and the options.
        places: Where things go.
        now: UTC.
        more: What it takes to open volumes.
        program: How commands are run.
        say: Told each line of the transcript.

    A refused admission is told in the outcome, and so is a host that cannot seal, where nothing
    would run: everything else stands, and all is on record.

    Raises:
        RefusedError: A code of the verification, before anything changed; `site.exists`.
        FaultError: `host.*`, the log's own.

    """
    outcome, program = Outcome(), program or Program()

    def tell(text: str) -> None:
        outcome.lines.append(text)
        say(text)

    before, report = _verified(wish, places, now, more, tell)
    trust = report.trust
    admitted = _to_admit(wish, places, trust, now, more)
    site = _site_bytes(wish, places)
    _require_places(places)
    # Every check held: from here on the host changes.
    for done, text in _changes(places, report, before, site, program):
        outcome.changed += [text] if done else []
        tell(text if done else f"{text}: as it was")
    facts = load_site(places.root)
    if admitted is None and not outcome.changed:
        return outcome
    with log_served(places, facts, program):
        if admitted is not None:
            outcome.refusal = _admit(*admitted, wish, places, program, outcome=outcome, tell=tell)
        if outcome.changed:
            refusal = _examine(places, program, tell)
            outcome.refusal = outcome.refusal or refusal
            if command := to_start(places, facts):
                tell(f"next: {command}")
            _record(wish, places, outcome)
    return outcome


# -- before anything changes ----------------------------------------------------------------------


def _verified(
    wish: Wish, places: Places, now: datetime, more: Help, tell: Say
) -> tuple[Trust | None, VerifyReport]:
    """Return the trust that the host holds, and the verdict on the bundle, which holds."""
    folder = places.root / "trust"
    held = load_trust(folder) if any(folder.glob("*.root.json")) else None
    trust = held or _anchor(wish.bundle, wish.fingerprint, more)
    floors = Store(places.root / "store").floors(last_record(places.root))
    report = verify_bundle(
        wish.bundle, trust, now=now, floors=floors, more=more, rollback=wish.approval
    )
    tell(f"verified: {report.digest}, approved by {', '.join(report.seal.approvers)}")
    for text in report.alarms:
        tell(f"alarm: {text}")
    if wish.digest not in {None, report.digest}:
        raise RefusedError(
            "seal.subject",
            f"{wish.bundle} is {report.digest}, and {wish.digest} was checked before",
            hint="the medium was exchanged meanwhile: find out by whom, then begin again",
        )
    return held, report


def _anchor(bundle: Path, fingerprint: Digest, more: Help) -> Trust:
    """Begin with the root of that fingerprint, which a person typed, and follow the newer ones."""
    medium = open_medium(bundle, more)
    try:
        raw = medium.head.trust
    finally:
        medium.close()
    value = parse_canonical(raw, code="trust.chain", what="META/trust.json", limit=CHAIN_LIMIT)
    roots = value.get("roots") if isinstance(value, dict) else None
    for entry in roots if isinstance(roots, list) else []:
        with suppress(RefusedError):
            return follow_chain(import_root(canonical_json(entry), fingerprint), raw)
    raise RefusedError(
        "trust.fingerprint",
        f"no trust root of the bundle has the fingerprint {fingerprint}",
        hint="compare it with what `airgap trust show` prints on the staging host",
    )


def _to_admit(
    wish: Wish, places: Places, trust: Trust, now: datetime, more: Help
) -> tuple[Path, Manifest] | None:
    """Return the bundle with a model that is to be current, None when it is, or there is none."""
    path = wish.model or wish.bundle
    store = Store(places.root / "store")
    floors = store.floors(last_record(places.root))
    back = wish.approval if wish.model is None else None
    with open_bundle(path, trust, now=now, floors=floors, more=more, rollback=back) as sealed:
        manifest, digest = sealed.manifest, sealed.digest
    if wish.model is not None and not manifest.models:
        raise RefusedError(
            "store.missing", f"{path.name!r:.100} holds no model", hint="leave --model away"
        )
    current = store.find_current()
    return None if not manifest.models or current == digest else (path, manifest)


def _site_bytes(wish: Wish, places: Places) -> bytes | None:
    """Return the site facts to write, None where they stand; another file is never replaced."""
    place = places.root / FILE_NAME
    if wish.site is None:
        if place.is_file():
            load_site(places.root)
            return None
        return b""
    try:
        raw = wish.site.read_bytes()
    except OSError as error:
        raise FaultError("host.io", f"{wish.site} cannot be read: {error.strerror}") from error
    parse_site(raw, wish.site.name)
    if not place.exists():
        return raw
    if place.read_bytes() != raw:
        raise RefusedError(
            "site.exists",
            f"{place} is another file than {wish.site}",
            hint="leave --site away, or edit the file that is there",
        )
    return None


def _require_places(places: Places) -> None:
    """Refuse before anything changes where a folder of the host cannot be written.

    Raises:
        FaultError: `host.io`.

    """
    wanted = [places.root]
    if places.system:
        wanted += [places.on_host(path) for path in _HOST_FOLDERS]
        apparmor = places.on_host("/etc/apparmor.d")
        wanted += [apparmor] if apparmor.is_dir() else []
    for folder in wanted:
        place = folder
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise FaultError(
                "host.io",
                f"{place} is no folder, or cannot be written by this account",
                hint="mend owner, permissions or mount of that folder, then run install.sh again",
            )


# -- what changes ---------------------------------------------------------------------------------


def _changes(
    places: Places, report: VerifyReport, before: Trust | None, site: bytes | None, program: Program
) -> Iterator[tuple[bool, str]]:
    """Bring one thing after another to its state; yield whether it changed, and what it is."""
    trust, manifest = report.trust, report.manifest
    places.root.mkdir(mode=0o755 if places.system else 0o700, parents=True, exist_ok=True)
    fresh = before is None or before != trust
    if fresh:
        save_trust(trust, places.root / "trust")
    yield fresh, f"trust root {trust.version}, {trust.fingerprint}"
    if not manifest.models:  # that of a model rises when it is admitted
        noted = Store(places.root / "store").note_release(manifest, report.digest)
        yield noted, f"{manifest.bundle_id}, epoch {manifest.epoch}"
    if site == b"":
        create_site(places.root)
        yield True, f"{places.root / FILE_NAME}, a form to fill in"
    else:
        if site is not None:
            place_file(places.root / FILE_NAME, site, mode=0o644 if places.system else 0o600)
        yield site is not None, f"{places.root / FILE_NAME}"
    if places.system:
        yield from set_up(places, load_site(places.root), program)


def _admit(
    path: Path,
    manifest: Manifest,
    wish: Wish,
    places: Places,
    program: Program,
    *,
    outcome: Outcome,
    tell: Say,
) -> RefusedError | None:
    """Install the model as anybody would; a refusal is on record and comes back."""
    words = ["install", str(path), "--root", str(places.root)]
    words += [word for place in wish.volumes for word in ("--volume", str(place))]
    words += ["--project", wish.project] if wish.project is not None else []
    status, document = program.own(*words)
    name = f"{manifest.name} {manifest.version}"
    if status == 0:
        outcome.changed.append(f"admitted {name}")
        tell(f"admitted: {name}, decision {document.get('decision', '')}")
        return None
    code, reason = str(document.get("code", "host.internal")), str(document.get("error", ""))
    tell(f"not admitted: {name}, {code}: {reason}")
    outcome.changed.append(f"asked for {name}")
    with suppress(KeyError):
        return RefusedError(code, f"{name} is not admitted: {reason:.600}", hint=_hint(document))
    raise FaultError("host.internal", f"airgap install ended with {status}: {reason:.300}")


def _hint(document: dict[str, Any]) -> str:
    return str(document.get("hint", "")) or "airgap policy explain; then airgap install"


def _examine(places: Places, program: Program, tell: Say) -> RefusedError | None:
    """Say which rung this host reaches, whole; return why none, `enclave.rung`."""
    status, document = program.own("doctor", "--root", str(places.root))
    verdict = document.get("verdict") or document.get("error") or f"ended with {status}"
    tell(f"doctor: {verdict}")
    if status == 0:
        return None
    missed = [each for each in document.get("rungs", []) if not each.get("sealed")]
    reasons = [f"rung {each['name']}: {each['code']}: {each['reason']}" for each in missed]
    for text in (*reasons, *(f"to raise it: {step}" for step in document.get("advice", []))):
        tell(f"doctor: {text}")
    return RefusedError(
        "enclave.rung",
        "all is in place, but nothing runs on this host until it can seal (doctor: "
        f"{reasons[0] if reasons else verdict})",
        hint=f"do what doctor says above, then look again: airgap doctor --root {places.root}",
    )


def _record(wish: Wish, places: Places, outcome: Outcome) -> None:
    """Put the transcript into the log, and an act that cites it."""
    site = load_site(places.root)
    person = find_submitter(site, os.getuid(), _account())
    actor: Actor | None = None if person is None else actor_of(person)
    text = f"{wish.transcript.rstrip()}\n" + "".join(f"{line}\n" for line in outcome.lines)
    facts: dict[str, str] = {"object": _printable(wish.bundle.name)}
    request, refusal = new_ulid(), outcome.refusal
    with open_site_log(places.root, site) as log:
        log.append(Event("admin.bootstrap", "intent", req=request, actor=actor, data=facts))
        if wish.approval is not None:
            log.put_object(wish.approval.to_bytes())
        outcome.transcript = log.put_object(text.encode()[:TRANSCRIPT_LIMIT])
        facts |= {"evidence": str(outcome.transcript)}
        facts |= {"result": "complete" if refusal is None else "refused"}
        receipt = log.append(
            Event(
                "admin.bootstrap",
                "outcome",
                req=request,
                actor=actor,
                err="" if refusal is None else refusal.code,
                data=facts,
            )
        )
    outcome.record = receipt.seq


def _account() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _printable(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:256]
