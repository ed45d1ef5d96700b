"""`airgap install`, `airgap list`, `airgap status`: bring a bundle in, and say what is here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from airgap.cli.approve import owed
from airgap.cli.common import Json, Root, account_name, root_folder, show
from airgap.cli.forms import Arrival, BundlePath
from airgap.cli.options import grouped
from airgap.cli.runtimes import program_document, program_rows
from airgap.cli.shown import bar, table
from policy.errors import AirgapError
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.audit import Actor
    from airgap.config import Site
    from airgap.install import InstalledBundle, Store
    from airgap.rules import Rules
    from bundle.envelope import Envelope
    from bundle.manifest import Manifest
    from bundle.trust import Trust
    from policy.engine import Decision
    from policy.terms import Digest


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("install")(install)
    app.command("list")(list_bundles)
    app.command("status")(status)


@grouped
def install(
    bundle: BundlePath,
    *,
    arrival: Arrival,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify BUNDLE, ask the policy, activate it, and put all of it on record."""
    take_in(bundle, arrival, root=root, json=json)


def take_in(
    bundle: Path,
    arrival: Arrival,
    *,
    root: Path | None,
    json: bool,
    update: bool = False,
    rollback: Envelope | None = None,
) -> None:
    """Install from a medium, and show what came of it."""
    from airgap.audit.site import open_site_log
    from airgap.install import install as bring_in
    from airgap.install.parity import prover
    from airgap.install.record import last_record, recorder
    from airgap.rule_history import put_on_record
    from airgap.serve.session import sealed
    from airgap.service.presence import taken_over

    folder = root_folder(root)
    lab = open_lab(folder, arrival.project)
    before = last_record(folder)
    with open_site_log(folder, lab.site) as log, bar("install") as progress:
        put_on_record(log, lab.rules)
        done = bring_in(
            bundle,
            root=folder,
            now=lab.now,
            gate=lab.gate,
            audit=recorder(log, actor=lab.actor, project=arrival.project),
            last_record=before,
            more=arrival.help(progress),
            prove=prover(
                partial(sealed, log),
                state=folder / "enclave",
                min_rung=lab.site.enclave.min_rung,
                providers=("cpu", "cuda") if lab.site.inference.provider == "cuda" else ("cpu",),
            ),
            progress=progress,
            update=update,
            rollback=rollback,
        )
    service, told = taken_over(folder, str(done.bundle.digest))
    document = {
        **bundle_document(done.bundle, current=True),
        "service": service,
        "approvers": list(done.seal.approvers),
        "builder": done.seal.builder,
        "decision": str(done.decision.digest),
        "receipt": done.receipt.as_document(),
        "previous": None if done.previous is None else str(done.previous),
        "resumed_chunks": done.resumed,
        "copied": done.copied,
        "parity": [
            {**asdict(each), "delta": str(each.delta), "text": each.text} for each in done.proofs
        ],
    }
    text = table(
        [
            (
                "rolled back to" if rollback else "updated to" if update else "installed",
                f"{done.bundle.manifest.name} {done.bundle.manifest.version}",
            ),
            ("digest", str(done.bundle.digest)),
            ("admitted", f"decision {done.decision.digest}"),
            *(("answers", each.text) for each in done.proofs),
            ("on record", f"audit log, record {done.receipt.seq}"),
            ("folder", str(done.bundle.folder)),
            *told,
            *(
                [("engines", "build those of this GPU before use: airgap engine build --key KEY")]
                if lab.site.inference.provider == "tensorrt"
                else []
            ),
        ]
    )
    show(document, text, json=json)


@dataclass(frozen=True, slots=True)
class Lab:
    """What an act on releases asks of the site: its facts, who acts, and the policy's question."""

    site: Site
    now: datetime
    actor: Actor | None
    gate: Callable[[Manifest, Digest], Decision]
    rules: Rules


def open_lab(folder: Path, project: str | None) -> Lab:
    """Read the site's facts and rules for one act on releases."""
    from airgap.approvals import load_approvals
    from airgap.config import load_site
    from airgap.install.record import actor_of, admission, find_submitter
    from airgap.rules import load_rules
    from bundle.trust import load_trust

    site = load_site(folder)
    now = datetime.now(UTC)
    person = find_submitter(site, os.getuid(), account_name())
    rules = load_rules(folder)
    gate = admission(
        site,
        rules,
        site.legal_day(now),
        project=project,
        approvals=load_approvals(folder, load_trust(folder / "trust").standing),
        submitter=None if person is None else person.id,
    )
    return Lab(site, now, None if person is None else actor_of(person), gate, rules)


def list_bundles(*, root: Root = None, json: Json = False) -> None:
    """List what is installed: `*` answers by default, `+` to its name; with what will not start."""
    from airgap.install import Store

    folder = root_folder(root)
    store, trust = Store(folder / "store"), _trust(folder)
    active, (installed, damaged) = store.find_current(), store.survey()
    found = [
        {
            **bundle_document(item, current=item.digest == active),
            "active": store.active(item.manifest.bundle_id) == item.digest,
            "barred": _bar(item, trust),
        }
        for item in installed
    ]
    lines = "" if damaged and not found else list_view(found)
    broken = damaged_document(damaged)
    lines += "".join(f"\n! {each['digest']}\n  DAMAGED: {each['error']}" for each in broken)
    document = {"format": "airgap/list/1", "bundles": found, "damaged": broken}
    show(document, lines.lstrip("\n"), json=json)


def damaged_document(damaged: Mapping[Digest, AirgapError]) -> list[dict[str, str]]:
    """Return what is damaged, and how."""
    return [
        {"digest": str(digest), "code": error.code, "error": error.message}
        for digest, error in damaged.items()
    ]


def _trust(folder: Path) -> Trust | None:
    """Return the trust of a tree; None where it cannot be read, which `status` tells."""
    from bundle.trust import load_trust

    try:
        return load_trust(folder / "trust")
    except AirgapError:
        return None


def _bar(bundle: InstalledBundle, trust: Trust | None) -> dict[str, str] | None:
    """Return code and words of what keeps a release from starting: revoked, expired."""
    from airgap.install.standing import find_bar

    try:
        error: AirgapError | None = find_bar(bundle, trust, datetime.now(UTC))
    except AirgapError as fault:
        error = fault
    return None if error is None else {"code": error.code, "error": error.message}


def status(*, root: Root = None, json: Json = False) -> None:
    """Say what this tree holds: trust root, current bundle, unfinished installs, log."""
    from airgap.install import Store

    folder = root_folder(root)
    store = Store(folder / "store")
    document = status_document(folder, store)
    show(document, status_view(document), json=json)


def bundle_document(bundle: InstalledBundle, *, current: bool) -> dict[str, Any]:
    """Return one installed bundle as JSON."""
    from bundle.fields import format_time

    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": str(bundle.digest),
        "epoch": manifest.epoch,
        "expires": format_time(manifest.expires),
        "models": [model.id for model in manifest.models],
        "folder": str(bundle.folder),
        "current": current,
    }


def status_document(folder: Path, store: Store) -> dict[str, Any]:
    """Gather the state of a tree; a part that is missing or damaged is told, not hidden."""
    from airgap.service.presence import find_daemon
    from bundle.trust import load_trust

    document: dict[str, Any] = {"format": "airgap/status/1", "root": str(folder), "alarms": []}
    try:
        trust = load_trust(folder / "trust")
        document["trust"] = {
            "version": trust.version,
            "fingerprint": str(trust.fingerprint),
            "people": len(trust.document.people),
        }
        document["alarms"] = _alarms(trust, store)
    except AirgapError as error:
        document["trust"] = {"code": error.code, "error": error.message}
    try:
        here, (installed, damaged) = store.find_current(), store.survey()
        document["installed"] = len(installed)
        document["alarms"] += [
            f"{error.code}: {error.message}" for each, error in damaged.items() if each != here
        ]
        for item in installed:
            bar_ = _bar(item, _trust(folder)) if item.digest != here else None
            if bar_ is not None:
                name = f"{item.manifest.name} {item.manifest.version}"
                document["alarms"].append(f"{name}: {bar_['code']}: {bar_['error']}")
        current = store.current()
        document["current"] = current and bundle_document(current, current=True)
    except AirgapError as error:
        document["current"] = {"code": error.code, "error": error.message}
    document["unfinished"] = [path.name for path in store.unfinished()]
    document["program"] = program_document(store)
    document["service"] = find_daemon(folder)
    document["site"] = (folder / "site.toml").is_file()
    document["audit"] = (folder / "audit" / "log").is_dir()
    held = folder / "holds"
    document["held"] = sum(
        not path.with_suffix(".answered").exists() for path in held.glob("*.json")
    )
    try:
        document["reviews_owed"] = owed(folder)
    except AirgapError as error:
        document["reviews_owed"] = [f"{error.code}: {error.message}"]
    return document


def _alarms(trust: Trust, store: Store) -> list[str]:
    """Say that the revocation list is stale, or that the current bundle is on it or over."""
    from airgap.install.standing import require_standing, require_valid

    now = datetime.now(UTC)
    try:
        current = store.current()
        if current is None:
            return list(trust.alarms(now))
        found = require_standing(current, trust, now=now)
        require_valid(current, now)
        return list(found)
    except AirgapError as error:
        return [f"{error.code}: {error.message}"]


def list_view(found: list[dict[str, Any]]) -> str:
    """Return one line a bundle, or a word on how to get one."""
    if not found:
        return "nothing is installed; airgap install BUNDLE.agb"
    lines = [
        f"{'*' if item['current'] else '+' if item['active'] else ' '} "
        f"{item['name']} {item['version']}  epoch {item['epoch']}  until {item['expires'][:10]}  "
        f"models {', '.join(item['models'])}  {item['digest']}{_mark(item)}"
        for item in found
    ]
    return "\n".join(lines)


def _mark(item: dict[str, Any]) -> str:
    """Say below the line of a release that it is on disk but will not start."""
    if item["barred"] is None:
        return ""
    code, error = item["barred"]["code"], item["barred"]["error"]
    word = {"trust.expired": "EXPIRED"}.get(code, "REVOKED" if code.endswith("revoked") else code)
    return f"\n  {word}: {error}"


def presence_line(service: dict[str, Any]) -> str:
    """Say which daemon serves a tree, and how it stands."""
    why = f" ({service['why']})" if service.get("why") else ""
    serves, state = service.get("serves") or "nothing yet", service.get("state", "starting")
    return f"process {service.get('pid', '?')}, {state}{why}: {serves}"


def status_view(document: dict[str, Any]) -> str:
    """Return the status as lines."""
    trust, current = document["trust"], document["current"]
    root = (
        f"version {trust.get('version')}, {counted(trust.get('people', 0), 'person', 'people')}, "
    )
    rows = [
        ("tree", document["root"]),
        ("site facts", "site.toml" if document["site"] else "none: airgap site init"),
        ("trust root", trust.get("error") or f"{root}{trust['fingerprint']}"),
    ]
    if current is None:
        rows.append(("current", "none: airgap install BUNDLE.agb"))
    elif "error" in current:
        rows.append(("current", current["error"]))
    else:
        rows.append(("current", f"{current['name']} {current['version']}, {current['digest']}"))
    rows += [("ALARM", text) for text in document["alarms"]]
    if (service := document["service"]) is not None:
        rows.append(("service", presence_line(service)))
        if service.get("waits"):
            words = f"the daemon goes on without the change of {', '.join(service['waits'])}"
            rows += [("RESTART", f"{words}: {service.get('next', '')}")]
    rows += [("unfinished", name) for name in document["unfinished"]]
    rows.append(("audit log", "kept" if document["audit"] else "none yet"))
    rows += program_rows(document["program"])
    if document["held"]:
        rows.append(
            ("held", f"{counted(document['held'], 'request')} without an answer: airgap hold list")
        )
    rows += [("review", words) for words in document["reviews_owed"]]
    return table(rows)
