"""The connected side: inspect a snapshot, build a draft under the seal, sign it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli import precisions, wheels
from airgap.cli.common import Json, Root, error_document, root_folder, show, show_error, stderr
from airgap.cli.forms import parse_size
from airgap.cli.options import grouped
from airgap.cli.signers import Passphrase, Signing
from airgap.cli.upstream import Publisher
from policy.errors import RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from bundle.manifest import Base, ModelEntry
    from bundle.staging.sealed import RunSealed
    from policy.terms import Digest

Source = Annotated[Path, typer.Argument(help="Folder of the snapshot, with config.json in it.")]
Inspected = Annotated[
    Path,
    typer.Argument(help="Folder of a snapshot, a bundle, or the name of an installed release."),
]
Key = Annotated[Path, typer.Option("--key", help="Private key file, from `airgap keys new`.")]
Pin = Annotated[
    Path | None,
    typer.Option("--pin", help="File in the form of sha256sum that fixes every file (level L1)."),
]
_LABELS = {
    "scan": "read every file",
    "hash": "hash every byte",
    "admit": "ask the policy",
    "convert": "convert to ONNX, sealed",
    "quantize": "write 8-bit and 4-bit codes",
    "parity": "prove parity, sealed",
    "describe": "describe the release",
    "resolve": "resolve and fetch wheels",
    "wheels": "check every wheel",
    "seal": "write and sign",
    "volumes": "cut into volumes",
}


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command("inspect")(inspect)
    app.command("build")(build)
    app.command("sign")(sign)
    app.command("unpickle")(unpickle)
    app.command("sign-model")(sign_model)


@grouped
def inspect(
    source: Inspected,
    *,
    pin: Pin = None,
    publisher: Publisher,
    origin: Annotated[
        str | None, typer.Option("--origin", help="Where it is from, hf:ORG/NAME.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the report as one HTML page.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> int:
    """Tell what a snapshot is and what is proved; of a bundle, what it attests.

    Lists or refuses every file, hashes every byte, and compares with the pins of your institution
    and the records of the hub client. Nothing in the snapshot is loaded or run. Of an installed
    release: its seal, its files and their origin, checked again now, its precisions and parity.
    """
    if source.is_file():
        from airgap.cli.evidence import show_attested

        return show_attested(source, json=json)
    from airgap.cli.installed import find_release, show_installed

    release = find_release(source, root_folder(root))
    if release is not None:
        return show_installed(release, root=root_folder(root), json=json)
    with wheels.staging():
        from bundle.staging.inspect import inspect_source
        from bundle.staging.output import output_problem
        from bundle.staging.views import report_page, report_view, write_page
    problem = "" if html is None else output_problem(html)
    if problem:
        raise UsageError(
            "usage.argument",
            f"--html: {str(html)!r:.160}: {problem}",
            hint="name a file in a folder that exists and that you may write to",
        )
    upstream = publisher.read()
    with _bars() as progress:
        report = inspect_source(
            source,
            pins=pin,
            upstream=upstream,
            origin=origin,
            run_sealed=_runner(),
            progress=progress,
        )
    document = report.as_document()
    if html is not None:
        write_page(html, report_page(document, str(report.digest)))
    error = report.refusal()
    extra = error_document(error) if error else {}
    show({**document, "digest": str(report.digest), **extra}, report_view(document), json=json)
    if error is not None and not json:
        show_error(error, json=False)
    return 1 if error else 0


@grouped
def build(
    source: wheels.Snapshot = None,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle to write, NAME.agb.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model and of the release.")],
    version: Annotated[str, typer.Option("--version", help="Version of the release.")],
    by: Signing,
    pin: Pin = None,
    publisher: Publisher,
    origin: Annotated[
        str | None,
        typer.Option("--origin", help="Where it is from, hf:ORG/NAME or local:NAME."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Commit of the publisher's repository.")
    ] = None,
    supplier: Annotated[
        str | None, typer.Option("--supplier", help="Legal name of who publishes the model.")
    ] = None,
    jurisdiction: Annotated[
        str | None, typer.Option("--jurisdiction", help="Country of the supplier (ISO 3166).")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option("--modality", help="What it writes; may be repeated.")
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", help="Project for which admission is asked.")
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option("--epoch", min=0, help="Grows with each release; default: the build time."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The bundle that this one succeeds: allows `airgap delta`."),
    ] = None,
    volume_size: Annotated[
        str | None,
        typer.Option("--volume-size", help="Write volumes of at most this: 700MB, 4.7GB, 25GiB."),
    ] = None,
    parity: Annotated[
        int, typer.Option("--parity", min=0, max=64, help="Volumes that may be lost without harm.")
    ] = 0,
    created: Annotated[
        str | None,
        typer.Option("--created", help="2026-01-31T12:00:00Z; default SOURCE_DATE_EPOCH, or now."),
    ] = None,
    valid_days: Annotated[int, typer.Option("--valid-days", min=1, max=3650)] = 365,
    precision: precisions.Precisions = None,
    no_reference: precisions.NoReference = False,
    target: wheels.Targets = None,
    accelerator: wheels.Accelerators = "cpu",
    no_wheels: wheels.NoWheels = False,
    airgap_source: wheels.AirgapSource = None,
    wheels_from: wheels.WheelsFrom = None,
    attestations: wheels.AttestationsFrom = None,
    root: Root = None,
    json: Json = False,
) -> int:
    """Convert a snapshot and write a signed draft.

    Inspects it, asks the policy, converts it to ONNX in a process without a network, proves that
    the graph answers like its source, and signs the draft with the builder's key. With --target
    the wheels of such hosts travel along; without SOURCE they travel alone.
    """
    from airgap.extras import require_extras

    size = None if volume_size is None else parse_size(volume_size)
    if size is None and parity:
        raise UsageError(
            "usage.argument", "--parity is of volumes", hint="add --volume-size, such as 4.7GB"
        )
    wanted = wheels.Wanted(
        tuple(target or ()),
        accelerator,
        airgap_source,
        wheels_from,
        attestations,
        publisher.publishers,
    )
    wanted.require(no_wheels=no_wheels, alone=source is None)
    require_extras(*(("staging",) if source is None else ("cpu", "staging")))
    if source is None:
        if size is not None:
            raise UsageError(
                "usage.argument", "wheels alone are one file", hint="then: airgap split"
            )
        moment = _created(created)
        return wheels.build_alone(
            wanted,
            out,
            name=name,
            version=version,
            created=moment,
            expires=_expires(moment, valid_days),
            epoch=int(moment.timestamp()) if epoch is None else epoch,
            root=root_folder(root),
            signers=by.open(root),
            bars=_bars,
            json=json,
        )
    with wheels.staging():
        from bundle.staging.pipeline import Cut
        from bundle.staging.pipeline import build as build_draft
        from bundle.staging.release import Facts
        from bundle.staging.views import built_document, built_view

        chosen = precisions.wanted_precisions(precision)
    from airgap.enclave import run_sealed
    from bundle.trust import load_trust

    upstream = publisher.read()
    folder = root_folder(root)
    moment = _created(created)
    facts = Facts(
        model_id=name,
        version=version,
        created=moment,
        expires=_expires(moment, valid_days),
        epoch=int(moment.timestamp()) if epoch is None else epoch,
        source=origin,
        revision=revision,
        supplier=supplier,
        jurisdiction=jurisdiction,
        modalities=tuple(modality or ()),
        base=None if base is None else _base(base),
    )
    with (
        _bars() as progress,
        wanted.gathered(progress) as wheelhouse,
        precisions.assessor(chosen, folder / "enclave") as assess,
    ):
        built = build_draft(
            source,
            out,
            facts,
            trust=load_trust(folder / "trust"),
            signer=by.open(root),
            run_sealed=run_sealed,
            admit=_admission(folder, project, moment),
            pins=pin,
            upstream=upstream,
            precisions=chosen,
            reference=not no_reference,
            assess=assess,
            wheelhouse=wheelhouse,
            cut=None if size is None else Cut(size, parity),
            progress=progress,
        )
    show(built_document(built), built_view(built), json=json)
    return 0


@grouped
def sign(
    bundle: Annotated[Path, typer.Argument(help="The draft, NAME.agb.")],
    *,
    by: Signing,
    role: Annotated[
        str, typer.Option("--role", help="The role in which you approve. Default: all of yours.")
    ] = "",
    condition: Annotated[
        str, typer.Option("--condition", help="On which you approve, in words; others read it.")
    ] = "",
    confirm: Annotated[
        str | None,
        typer.Option("--confirm", help="What you would type: the model's name or the digest."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> int:
    """Read a draft, confirm it, and sign it.

    Hashes the whole draft and checks its files as a lab will, shows the report that the seal
    names, takes the model's name as the confirmation, and adds the signature and a statement of
    your role in place. The builder of a draft never approves it.
    """
    with wheels.staging():
        from bundle.staging import sign as signing
        from bundle.staging.views import draft_view, tally_document, tally_view
    from airgap.cli.shown import bar
    from bundle.trust import load_trust

    trust = load_trust(root_folder(root) / "trust")
    draft = signing.read_draft(bundle)
    signers = by.open(root)
    who, roles = signing.require_approver(draft, trust, signers, role=role)
    with bar("hash every byte") as progress:
        signing.verify_payload(draft, trust, progress)
    if not json or confirm is None:
        stderr.print(draft_view(draft, signing.count(draft, trust)))
        stderr.print(f"you sign as {who}: {', '.join(roles)}", markup=False, highlight=False)
    typed = confirm if confirm is not None else _ask(draft.manifest.name)
    tally = signing.sign(
        draft,
        trust,
        signers,
        confirmation=typed,
        now=datetime.now(UTC),
        role=role,
        conditions=condition,
    )
    show(tally_document(draft, tally, who, roles), tally_view(draft, tally, who), json=json)
    return 0


def unpickle(
    source: Source,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="The new snapshot, a new folder.")],
    json: Json = False,
) -> int:
    """Make safetensors of pickled weights, in a sealed process.

    For a model that is published as a pickle only. The pickle is read once, without a network, by
    a loader that takes nothing but weights. The new snapshot says how it was made; its provenance
    is what your institution pins, because the publisher never published these bytes.
    """
    from airgap.extras import require_extras

    require_extras("staging")
    with wheels.staging():
        from bundle.staging.unpickle import unpickle as make
    record = make(source, out, run_sealed=_runner())
    document = {**record.model_dump(mode="json"), "folder": str(out)}
    lines = [f"{pair.source} -> {pair.file} ({pair.sha256[:16]}...)" for pair in record.files]
    text = "\n".join(
        [
            f"made {out}, sealed (rung {record.rung})",
            *lines,
            "the publisher never published these bytes: look at them, pin them, then inspect",
        ]
    )
    show(document, text, json=json)
    return 0


def sign_model(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, published or installed.")],
    *,
    key: Key,
    out: Annotated[Path, typer.Option("-o", "--out", help="The signature to write, model.sig.")],
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> int:
    """Sign a model folder for the tools of others (OpenSSF model signing).

    Writes what `model_signing verify key` checks. It is no seal: no lab of this program believes
    it in the place of one.
    """
    with wheels.staging():
        from bundle.staging.model_signature import write_signature
    from bundle.keys import load_signer, read_passphrase

    signer = load_signer(key, read_passphrase(passphrase_file))
    count = write_signature(folder, out, signer)
    document = {"signature": str(out), "files": count, "keyid": signer.public_key.keyid}
    text = f"signed {counted(count, 'file')} of {folder} as {out}\nkey {signer.public_key.keyid}"
    show(document, text, json=json)
    return 0


def _runner() -> RunSealed | None:
    """Return the sealed runner."""
    from airgap.enclave import run_sealed

    return run_sealed


def _ask(name: str) -> str:
    """Ask for the confirmation on the terminal; without one nothing is signed."""
    if not sys.stdin.isatty():
        raise RefusedError(
            "sign.confirm",
            "there is no terminal to type the confirmation on",
            hint=f"read the report, then add: --confirm {name}",
        )
    stderr.print(
        f"Type {name!r} or the first 8 digits of the digest to sign, anything else to stop: ",
        end="",
    )
    return sys.stdin.readline()


def _admission(
    root: Path, project: str | None, moment: datetime
) -> Callable[[Sequence[ModelEntry], Digest], bytes]:
    """Return the question that staging asks the policy of this site, as of the build time."""
    from airgap.config import load_site
    from airgap.gate import decide_admission
    from airgap.rules import load_rules
    from policy import require
    from policy.terms import Outcome

    def admit(models: Sequence[ModelEntry], digest: Digest) -> bytes:
        site = load_site(root)
        day = site.legal_day(moment)
        decision = decide_admission(
            site,
            load_rules(root),
            models,
            bundle_digest=digest,
            project=project,
            as_of=day.as_of,
            known_at=day.known_at,
            verified=True,  # every byte was hashed a moment ago, by this very command
            day_source=day.source,
        )
        # A hold is for people: they read it in the draft, approve this very digest, and the lab
        # decides again. A denial is final here.
        if decision.outcome is Outcome.DENY:
            require(decision)
        record: bytes = decision.canonical
        return record

    return admit


def _base(path: Path) -> Base:
    """Return what a release says of the one that it succeeds."""
    from airgap.cli.forms import open_base
    from bundle.manifest import Base

    manifest = open_base(path).manifest
    return Base(bundle_id=manifest.bundle_id, manifest_digest=str(manifest.digest))


def _created(text: str | None) -> datetime:
    """Return the time that the release bears, in whole seconds."""
    from bundle.fields import parse_time

    stated = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        if text is not None:
            return parse_time(text)
        if stated:
            return datetime.fromtimestamp(int(stated), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            "usage.argument",
            f"{text or stated!r:.60} is not a time: {error}",
            hint="airgap build --help",
        ) from error
    return datetime.now(UTC).replace(microsecond=0)


def _expires(moment: datetime, valid_days: int) -> datetime:
    """Return the end of the release's validity; the calendar ends with the year 9999."""
    try:
        return moment + timedelta(days=valid_days)
    except OverflowError as error:
        raise UsageError(
            "usage.argument",
            f"{valid_days} days after {moment:%Y-%m-%d} no calendar goes on",
            hint="give an earlier --created, or fewer --valid-days",
        ) from error


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar a stage on standard error; bytes where it hashes or writes."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[amount]:>22}"),
        TimeElapsedColumn(),
        console=stderr,
    ) as display:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(_LABELS.get(stage, stage), amount="", total=None)
            amount = _amount(stage, done, total)
            known = total if total > 1 or done else None
            display.update(tasks[stage], completed=done, total=known, amount=amount)

        yield tell


def _amount(stage: str, done: int, total: int) -> str:
    from bundle.staging.views import size_text

    if stage in {"hash", "seal", "volumes"}:
        return f"{size_text(done)} / {size_text(total)}"
    return f"{done} / {total} files" if stage in {"scan", "wheels"} else ""
