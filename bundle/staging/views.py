"""How reports look: on a terminal, and as one HTML file that needs no other file.

Everything that comes from a snapshot is untrusted text: the terminal gets it without markup and
without control characters, the page gets it escaped.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bundle.approval import read_approvals
from bundle.canonical import canonical_json
from bundle.fields import has_hidden
from bundle.manifest import Manifest
from bundle.scan.roles import Role
from bundle.staging.bootstrap import BuiltWheels
from bundle.staging.parity import Parity
from bundle.staging.pipeline import Built, Resumed
from bundle.staging.prompts import STEPS
from bundle.staging.sign import Draft, Tally
from policy.errors import RefusedError
from policy.terms import Digest

_SHOWN_FILES = 60
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024


def size_text(size: int) -> str:
    """Write a size for people: 3.1 MiB."""
    value, unit = float(size), _UNITS[0]
    for unit in _UNITS:
        if value < _STEP or unit == _UNITS[-1]:
            break
        value /= _STEP
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def count_text(value: int) -> str:
    """Write a large count for people: 774,016 or 8.03 billion."""
    if value >= 10**9:
        return f"{value / 10**9:.2f} billion"
    return f"{value / 10**6:.1f} million" if value >= 10**7 else f"{value:,}"


def travel_text(item: Mapping[str, Any]) -> str:
    """Say whether a file goes into the bundle: as it is, with graphs beside it, or not at all."""
    if item["carried"]:
        return "yes"
    return "yes, + ONNX" if item["role"] == Role.WEIGHTS else ""


def plain(text: object) -> str:
    """Make foreign text safe to show: what a screen would hide or act on becomes visible."""
    found = str(text)
    return ascii(found)[1:-1] if has_hidden(found) else found


def report_view(report: Mapping[str, Any]) -> RenderableType:
    """Show an inspection report on a terminal."""
    parts: list[RenderableType] = [_headline(report), Text()]
    parts.append(_Facts(_report_facts(report)))
    parts += [Text(), Rule("files", align="left", style="dim"), _files(report["files"])]
    if report["findings"]:
        parts += [Text(), Rule("findings", align="left", style="dim")]
        parts += [_bullet("!", "yellow", f["path"], f["text"]) for f in report["findings"]]
    if report["refusals"]:
        parts += [Text(), Rule("refused", align="left", style="red")]
        parts += [
            _bullet("✗", "red", item["code"], item["message"], item["hint"])
            for item in report["refusals"]
        ]
    return Group(*parts)


def report_page(report: Mapping[str, Any], digest: str) -> str:
    """Return the report as one HTML page; scripts, fonts and pictures from elsewhere: none."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size_text, number=count_text, plain=plain, travels=travel_text)
    page = environment.get_template("report.html.j2")
    return page.render(report=report, digest=digest, facts=_report_facts(report))


def write_page(path: Path, text: str) -> None:
    """Write beside, flush, rename: the page is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def built_document(built: Built) -> dict[str, Any]:
    """Return what `airgap build --json` prints."""
    model = built.manifest.models[0]
    return {
        "bundle": str(built.path),
        "digest": str(built.manifest.digest),
        "body_root": built.manifest.body.root,
        "size": built.size,
        "volumes": [str(path) for path in built.volumes],
        "resumed": {"runs": list(built.resumed.runs), "chunks": built.resumed.chunks},
        "builder": built.builder,
        "model": model.id,
        "version": built.manifest.version,
        "source": model.source,
        "revision": model.revision,
        "supplier": model.supplier.legal_name,
        "licence": model.licence.spdx,
        "scientific_use": model.scientific_use,
        "provenance_level": model.provenance_level,
        "parity": {
            "prompts": len(built.parity.vectors),
            "skipped": len(built.parity.skipped),
            "max_delta_full": str(built.parity.full),
            "max_delta_with_cache": str(built.parity.past),
            "greedy_tokens_equal": True,
            "text": parity_text(built.parity),
            "precisions": {
                each.precision: {
                    **(each.measured.model_dump(mode="json") if each.measured else {}),
                    "provider": each.provider,
                    "text": each.measured.text if each.measured else parity_text(built.parity),
                }
                for each in built.vectors
            },
        },
        "rung": str(built.seal.get("rung", "unknown")),
        "decision": {
            "outcome": built.decision.get("outcome"),
            "as_of": built.decision.get("as_of"),
            "as_of_source": built.decision.get("as_of_source"),
            "reasons": built.decision.get("reasons", []),
            "digest": str(Digest.of(canonical_json(dict(built.decision)))),
        },
    }


def parity_text(parity: Parity) -> str:
    """Say in one line what the proof showed."""
    kinds = len({vector.prompt.kind for vector in parity.vectors})
    return (
        f"{len(parity.vectors)} prompts of {kinds} kinds: largest difference of a logit "
        f"{parity.full:.1e} in a full pass, {parity.past:.1e} with the cache; "
        f"{STEPS} greedy tokens the same on each"
    )


def built_view(built: Built) -> RenderableType:
    """Show a finished draft on a terminal."""
    rows = [
        ("bundle", f"{built.path} ({size_text(built.size)})"),
        *([("volumes", f"{len(built.volumes)}, this is the first")] if built.volumes else []),
        ("digest", str(built.manifest.digest)),
        ("source", f"{built.manifest.models[0].source} at {built.manifest.models[0].revision}"),
        (
            "provenance",
            f"{built.report.provenance['level']}: {built.report.provenance['sentence']}",
        ),
        ("conversion", f"sealed, no network (rung {built.seal.get('rung', 'unknown')})"),
        ("parity", parity_text(built.parity)),
        *(
            (f"  {each.precision}", each.measured.text)
            for each in built.vectors
            if each.measured is not None
        ),
        ("policy", _decision_text(built.decision)),
        ("builder", f"{built.builder} has signed; approvers sign next"),
        *([("resumed", _resumed_text(built))] if built.resumed != Resumed() else []),
    ]
    name = built.path.name
    return Group(
        Text.assemble(("✓ ", "bold green"), ("draft built", "bold"), f"  {built.manifest.name} "
                      f"{built.manifest.version}"),
        Text(),
        _Facts(rows),
        *_holds(built.decision),
        Text(),
        Text(f"next step: airgap sign {name} --key APPROVER.pem", "dim"),
    )  # fmt: skip


def _resumed_text(built: Built) -> str:
    """Say what was taken over from a build that was stopped."""
    names = {"graph": "the conversion", "parity": "the proof of parity"}
    parts = [names.get(name, name) for name in built.resumed.runs]
    if built.resumed.chunks:
        parts.append(f"{built.resumed.chunks} of {built.manifest.body.leaves} chunks")
    return f"{', '.join(parts)} of the build that was stopped, hashed again"


def wheels_document(built: BuiltWheels) -> dict[str, Any]:
    """Return what `airgap build --json` prints of a release of wheels."""
    return {
        "bundle": str(built.path),
        "digest": str(built.manifest.digest),
        "body_root": built.manifest.body.root,
        "size": built.path.stat().st_size,
        "builder": built.builder,
        "name": built.manifest.name,
        "version": built.manifest.version,
        "targets": built.report["targets"],
        "wheels": built.report["wheels"],
    }


def wheels_view(built: BuiltWheels) -> RenderableType:
    """Show a finished draft of wheels on a terminal."""
    manifest = built.manifest
    rows = [
        ("bundle", f"{built.path} ({size_text(built.path.stat().st_size)})"),
        ("digest", str(manifest.digest)),
        *_wheel_facts(built.report),
        ("builder", f"{built.builder} has signed; approvers sign next"),
    ]
    title = Text.assemble(
        ("✓ ", "bold green"), ("draft built", "bold"), f"  {manifest.name} {manifest.version}"
    )
    next_step = Text(f"next step: airgap sign {built.path.name} --key APPROVER.pem", "dim")
    return Group(title, Text(), _Facts(rows), Text(), next_step)


def _wheel_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return targets, sizes, licences and what is proved of the origin, for a table of facts."""
    wheels = report["wheels"]
    proved = sum(each["attestation"] != "absent" for each in wheels)
    licences = sorted({each["licence"] for each in wheels})
    native = sum(any("native libraries" in text for text in each["findings"]) for each in wheels)
    return [
        *(
            ("target", f"{each['target']}, {each['accelerator']}: {each['wheels']} wheels")
            for each in report["targets"]
        ),
        ("wheels", f"{len(wheels)}, {size_text(report['bytes'])}; {native} with native code"),
        ("licences", "; ".join(licences) + " (declared)"),
        ("attested", f"{proved} of {len(wheels)} by their publishers; all fixed by digest"),
    ]


def _wheels_draft_view(draft: Draft, tally: Tally) -> RenderableType:
    """Show an approver a release that holds wheels and no model."""
    seal = draft.statement.predicate
    rows = [
        ("release", f"{draft.manifest.name} {draft.manifest.version}, epoch {seal.epoch}"),
        ("digest", str(draft.digest)),
        ("holds", f"{seal.not_before:%Y-%m-%d} to {seal.expires:%Y-%m-%d}"),
        ("built by", seal.builder),
        ("profile", f"{seal.profile}, {seal.body_size:,} bytes, {len(draft.manifest.files)} files"),
        *_wheel_facts(draft.report),
        ("report", seal.report_digest),
        ("signed by", _tally_text(tally)),
    ]
    parts: list[RenderableType] = [Text("what you are about to approve", "bold"), Text()]
    parts += [_Facts(rows), Text(), Rule("wheels", align="left", style="dim")]
    parts += [
        _bullet("-", "dim", f"{each['name']} {each['version']}", f"{each['licence']}")
        for each in draft.report["wheels"]
    ]
    return Group(*parts, Text())


def draft_view(draft: Draft, tally: Tally) -> RenderableType:
    """Show an approver what she is about to sign.

    Raises:
        RefusedError: `manifest.schema`; the report is none that this program writes.

    """
    try:
        return _draft_view(draft, tally)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RefusedError(
            "manifest.schema",
            f"the report of the draft cannot be shown: {type(error).__name__} {error!s:.100}",
            hint="what cannot be read is not signed: have it built by this version",
        ) from error


def _draft_view(draft: Draft, tally: Tally) -> RenderableType:
    if not draft.manifest.models:
        return _wheels_draft_view(draft, tally)
    seal, report = draft.statement.predicate, draft.report
    claims = draft.manifest.parity
    rows = [
        ("release", f"{draft.manifest.name} {draft.manifest.version}, epoch {seal.epoch}"),
        ("digest", str(draft.digest)),
        ("holds", f"{seal.not_before:%Y-%m-%d} to {seal.expires:%Y-%m-%d}"),
        ("built by", seal.builder),
        ("profile", f"{seal.profile}, {seal.body_size:,} bytes, {len(draft.manifest.files)} files"),
        *_models(draft.manifest, report),
        ("weights", _weights_text(report)),
        (
            "parity",
            ", ".join(f"{c.precision} within {c.tolerance} on {c.provider}" for c in claims),
        ),
        ("policy", _decision_text(draft.decision)),
        ("report", seal.report_digest),
        ("signed by", _tally_text(tally)),
        *_approvals(draft),
    ]
    parts: list[RenderableType] = [Text("what you are about to approve", "bold"), Text()]
    parts.append(_Facts(rows))
    if report["findings"]:
        parts += [Text(), Rule("findings of the inspection", align="left", style="dim")]
        parts += [_bullet("!", "yellow", f["path"], f["text"]) for f in report["findings"]]
    return Group(*parts, *_holds(draft.decision), Text())


def _models(manifest: Manifest, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where each model of a draft comes from; the report is about one of them."""
    rows: list[tuple[str, str]] = []
    several = len(manifest.models) > 1
    for model in manifest.models:
        provenance: str = model.provenance_level
        if not several or report.get("model") == model.id:
            said = report["provenance"]
            if said["level"] != provenance:
                raise ValueError(f"it says {said['level']}, the manifest {provenance}")
            provenance = f"{said['level']}: {said['sentence']}"
        found = ", ".join(f"{x.spdx} ({x.place})" for x in model.licences_found)
        rows += [("model", model.id)] if several else []
        rows += [
            ("source", f"{model.source} at {model.revision}"),
            ("provenance", provenance),
            ("supplier", f"{model.supplier.legal_name} ({model.supplier.jurisdiction}), declared"),
            ("licence", found or "none found"),
            ("use", _use_text(model.model_dump())),
        ]
    return rows


def _approvals(draft: Draft) -> list[tuple[str, str]]:
    """Return what those who signed before say, in their own words."""
    return [
        ("condition", f"{each.person}, as {', '.join(each.roles)}: {each.conditions}")
        for each in read_approvals(draft.envelope)
        if each.conditions
    ]


def tally_document(
    draft: Draft, tally: Tally, who: str, roles: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what `airgap sign --json` prints."""
    return {
        "bundle": str(draft.path),
        "digest": str(draft.digest),
        "signed_by": who,
        "roles": list(roles),
        "people": list(tally.approvers),
        "needed": tally.needed,
        "missing_roles": list(tally.missing_roles),
        "builder": tally.builder,
        "complete": tally.complete,
    }


def tally_view(draft: Draft, tally: Tally, who: str) -> RenderableType:
    """Show what a signature changed."""
    lines = [
        Text.assemble(("✓ ", "bold green"), (plain(who), "bold"), f" signed {draft.digest}"),
        Text(f"  {_tally_text(tally)}"),
    ]
    if tally.complete:
        lines.append(Text(f"next step: carry {draft.path.name} across, then airgap verify", "dim"))
    else:
        lines.append(Text("next step: the next approver runs airgap sign", "dim"))
    return Group(*lines)


def _headline(report: Mapping[str, Any]) -> Text:
    ready = report["verdict"] == "ready"
    mark, style = ("✓ ready to build", "bold green") if ready else ("✗ refused", "bold red")
    return Text.assemble((plain(report["model"]), "bold"), "  ", (mark, style))


def _report_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    provenance = report["provenance"]
    rows = [("provenance", f"{provenance['level']}: {provenance['sentence']}")]
    rows += [(f"  {item['status']}", f"{item['text']}") for item in provenance["evidence"]]
    if "revision" in report:
        rows.append(("revision", report["revision"]))
    shape = report.get("architecture")
    if shape:
        rows.append(
            (
                "architecture",
                (
                    f"{shape['kind']}: {shape['layers']} layers, width {shape['hidden']}, "
                    f"{shape['heads']} heads ({shape['kv_heads']} key-value), vocabulary "
                    f"{shape['vocabulary']:,}, context {shape['context']:,}"
                ),
            )
        )
    rows.append(("weights", _weights_text(report)))
    words = report.get("tokenizer")
    if words:
        tags = " ".join(words["tags"]) or "none"
        rows.append(("tokenizer", f"{words['model']}, {words['size']:,} tokens; tags: {tags}"))
    licences = ", ".join(f"{x['spdx']} ({x['status']}: {x['place']})" for x in report["licences"])
    rows.append(("licences", licences or "none stated"))
    hints = "; ".join(
        f"{x['relation'].replace('_', ' ')} {x['party']} ({x['status']}: {x['basis']})"
        for x in report["lineage"]
    )
    rows.append(("lineage", hints or "nothing stated, and no sign of a base model"))
    rows.append(("use", _use_text(report["use"])))
    rows.append(("scanners", _scanner_text(report)))
    return rows


def _scanner_text(report: Mapping[str, Any]) -> str:
    """Say what outside scanners said; that one did not run is a result as well."""
    ran = [
        f"{run['name']} {run['version']} {run['verdict']}"
        for run in report.get("scanners", [])
        if run["verdict"] != "not run"
    ]
    others = [run["name"] for run in report.get("scanners", []) if run["verdict"] == "not run"]
    return "; ".join([*ran, *([f"not run: {', '.join(others)}"] if others else [])]) or "none"


def _weights_text(report: Mapping[str, Any]) -> str:
    weights = report["weights"]
    if not weights["tensors"]:
        return "none that could be read"
    return (
        f"{count_text(weights['parameters'])} parameters in {weights['tensors']:,} tensors, "
        f"{size_text(weights['bytes'])} of {', '.join(weights['types'])}, "
        f"{weights['files']} file{'s' if weights['files'] != 1 else ''}"
    )


def _use_text(use: Mapping[str, Any]) -> str:
    parts = ["reference model" if use["reference_model"] else "no reference model"]
    parts.append(
        "scientific use is not excluded" if use["scientific_use"] else "not for scientific use"
    )
    return ", ".join(parts) + " (declared)"


def _decision_text(decision: Mapping[str, Any]) -> str:
    words = {
        "permit": "permitted",
        "permit_with_obligations": "permitted with obligations",
        "needs_approval": "HELD until people approve",
    }
    outcome = str(decision.get("outcome", "recorded"))
    day = f" as of {decision['as_of']}" if "as_of" in decision else ""
    return f"{words.get(outcome, outcome)}{day}; the lab decides again before it installs"


def _holds(decision: Mapping[str, Any]) -> list[RenderableType]:
    """List the rules that stand in the way, with their citation; nothing when none does."""
    reasons = [
        reason
        for reason in decision.get("reasons", [])
        if reason.get("effect") in {"deny", "needs_approval"} and not reason.get("lifted")
    ]
    if not reasons:
        return []
    return [
        Text(),
        Rule("held by the policy", align="left", style="yellow"),
        *(
            _bullet("!", "yellow", reason["rule"], f"{reason['plain']} [{reason['citation']}]")
            for reason in reasons
        ),
    ]


def _tally_text(tally: Tally) -> str:
    names = ", ".join(tally.approvers) or "nobody yet"
    text = f"{len(tally.approvers)} of {tally.needed} approvers: {names}"
    if tally.missing_roles:
        text += f"; still needed: a person with the role {', '.join(tally.missing_roles)}"
    return f"{text}; builder {tally.builder}" + ("" if tally.builder_signed else " (NOT signed)")


class _Facts:
    """Labels and values in two columns; a digest, which people copy, leaves its column whole."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._rows = [(name, plain(value)) for name, value in rows]

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        column = max(len(name) for name, _ in self._rows) + 2
        for name, value in self._rows:
            label = name
            for line in textwrap.wrap(
                value, options.max_width - column, break_long_words=False, break_on_hyphens=False
            ) or [""]:
                indent = min(column, max(0, options.max_width - len(line)))
                if len(label) >= indent and label:
                    yield Text(label, "dim")
                    label = ""
                yield Text.assemble((label.ljust(indent), "dim"), line, overflow="fold")
                label = ""


def _files(files: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("path", overflow="fold")
    table.add_column("role")
    table.add_column("size", justify="right")
    table.add_column("SHA-256", no_wrap=True, min_width=16, overflow="ellipsis")
    table.add_column("travels")
    for item in files[:_SHOWN_FILES]:
        refused = item["role"] == "refused"
        table.add_row(
            Text(plain(item["path"])),
            Text(item["role"], "red" if refused else ""),
            size_text(item["size"]),
            item["sha256"][:16] + "…",
            travel_text(item),
        )
    if len(files) > _SHOWN_FILES:
        table.add_row(f"… {len(files) - _SHOWN_FILES} more: see --json", "", "", "", "")
    return table


def _bullet(mark: str, style: str, name: str, text: str, hint: str = "") -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(
        Text(mark, f"bold {style}"), Text.assemble((plain(name), "bold"), f"  {plain(text)}")
    )
    if hint:
        grid.add_row("", Text(f"next step: {plain(hint)}", "dim"))
    return grid
