"""`airgap doctor`: what this host offers the seal, proven by a probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.profiles import profiles

if TYPE_CHECKING:
    from airgap.enclave.doctor import Examination, Rung


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(doctor)
    group = typer.Typer(help="Look at the seal and attack it.", no_args_is_help=True)
    group.command()(profiles)
    app.add_typer(group, name="enclave")


def doctor(root: Root = None, *, json: Json = False) -> None:
    """Probe the seal on this host: the rung that it reaches, and what would raise it."""
    from airgap.enclave.doctor import examine

    folder = root_folder(root)
    with stderr.status("probing: a control without a seal, then a sealed twin"):
        found = examine(min_rung=_min_rung(folder), state=folder / "enclave")
    show(found.as_document(), _page(found), json=json)
    if found.reached is None:
        raise typer.Exit(1)


def _min_rung(folder: Any) -> str | None:
    """Return the site's decision, None where there is none."""
    from airgap.config import load_site

    if not (folder / "site.toml").exists():
        return None
    return load_site(folder).enclave.min_rung


def _page(found: Examination) -> Any:
    """Lay the examination out for one screen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    reached = found.reached
    head = Table.grid(padding=(0, 2))
    for name, value in _facts(found):
        head.add_row(Text(name, style="dim"), value)
    rungs = Table.grid(padding=(0, 2))
    for rung in found.rungs:
        rungs.add_row(f"rung {rung.name}", _verdict(rung), Text(_reason(rung)))
    parts: list[Any] = [head, "", rungs]
    shown = reached or next((r for r in found.rungs if r.verdict and r.verdict.rows), None)
    if shown is not None and shown.verdict is not None:
        parts += ["", *_probe(shown)]
    word = Text(
        f"SEALED/{reached.name}" if reached else "REFUSED", "bold green" if reached else "bold red"
    )
    meaning = "a worker started now reaches this rung" if reached else "no worker starts here"
    end = Text.assemble(word, f"  {meaning} (least rung allowed: {found.min_rung})")
    parts += ["", end, *(Text(f"to raise it: {step}") for step in found.advice)]
    return Group(*parts)


def _facts(found: Examination) -> list[tuple[str, str]]:
    facts = found.facts
    start = "root: the worker gets a uid of its own" if facts.uid == 0 else f"uid {facts.uid}"
    spaces = "unknown" if facts.max_user_namespaces is None else str(facts.max_user_namespaces)
    if facts.apparmor_userns:
        spaces += ", restricted by AppArmor"
    library = facts.onnxruntime or "not installed"
    if facts.onnxruntime:
        library += (
            ", telemetry code present and switched off"
            if facts.telemetry
            else ", no telemetry code"
        )
    return [
        ("host", f"{facts.distro}, kernel {facts.kernel}, {facts.arch}"),
        ("started by", start),
        (
            "namespaces",
            f"{spaces} user namespaces; {'may' if facts.sys_admin else 'may not'} make others",
        ),
        ("Landlock", f"ABI {facts.landlock_abi}" if facts.landlock_abi else "none"),
        ("automounts", ", ".join(facts.autofs) or "none"),
        ("devices", ", ".join(facts.nodes) or "none of interest"),
        ("onnxruntime", library),
    ]


def _verdict(rung: Rung) -> Any:
    from rich.text import Text

    return Text("SEALED", "green") if rung.sealed else Text(f"REFUSED {rung.code}", "red")


def _reason(rung: Rung) -> str:
    from airgap.enclave.doctor import LAYERS

    return LAYERS[rung.name] if rung.sealed else rung.reason


def _probe(rung: Rung) -> list[Any]:
    """Return the table of channels that the control could use, and what could not be tried."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from airgap.enclave.doctor import condense

    if rung.verdict is None:
        return []
    verdict = rung.verdict
    lines, untested = condense(verdict.rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("channel", "control", "sealed", "closed by"):
        table.add_column(name, overflow="fold")
    for line in lines:
        leaking = line.control == "LEAK"
        table.add_row(
            Text(" ".join(line.channels)),
            Text(line.control, "yellow" if leaking else ""),
            Text(line.sealed, "red" if "open" in line.sealed or "LEAK" in line.sealed else "green"),
            Text(line.closed_by, "dim"),
        )
    title = Text.assemble(
        (f"probe of rung {rung.name}", "bold"),
        f" ({len(verdict.rows)} channels, {rung.seconds:g} s): control "
        f"{verdict.control_open} open, {verdict.control_heard} heard by a receiver; sealed "
        f"{verdict.sealed_open} open, {verdict.sealed_heard} heard",
    )
    if untested:
        words = f"not even the control could: {'; '.join(untested)}"
        return [title, table, Text(words, style="dim")]
    return [title, table]
