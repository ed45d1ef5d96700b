"""`airgap doctor` and `airgap enclave`: what this host offers the seal, and attacks on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr, stdout, visible, write_json
from airgap.cli.profiles import profiles

if TYPE_CHECKING:
    from airgap.enclave.doctor import Examination, Rung
    from airgap.enclave.spec import SealSpec
    from airgap.enclave.trial import Trial

RungName = Literal["A", "U", "B", "C"]
ProfileName = Literal["worker", "screen"]
Forced = Annotated[
    RungName | None,
    typer.Option("--rung", help="This rung and no other. Default: the best that this host has."),
]
Profile = Annotated[ProfileName, typer.Option("--profile", help="Whose seal: worker or screen.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command()(doctor)
    group = typer.Typer(no_args_is_help=True, help="Look at the seal and attack it.")
    group.command()(audit)
    group.command()(hold)
    group.command(name="show")(show_running)
    group.command(name="filters")(show_filters)
    group.command()(profiles)
    app.add_typer(group, name="enclave")


# -- an auditor's own program ---------------------------------------------------------------------


def audit(
    probe: Annotated[Path, typer.Option("--probe", help="A plain Python file; it may be hostile.")],
    *,
    stage: Annotated[
        int,
        typer.Option(
            "--stage", min=1, max=2, help="1: after the first filter; 2: after the second."
        ),
    ] = 2,
    rung: Forced = None,
    profile: Profile = "worker",
    deadline: Annotated[
        float, typer.Option("--deadline", min=1, max=3600, help="Seconds for start and run.")
    ] = 30.0,
    root: Root = None,
    json: Json = False,
) -> None:
    """Run your own program in exactly the seal of the worker, and print what it printed."""
    from airgap.enclave import trial

    source = trial.read_probe(probe)
    wanted = _spec(root_folder(root), profile, rung, deadline_s=deadline)
    with stderr.status("proving the seal, then running the probe inside"):
        found = trial.run_trial(source, wanted, stage=stage)
    if json:
        write_json(found.as_document())
    else:
        _print_trial(found)
    if found.code:
        raise typer.Exit(1)


def _spec(folder: Path, profile: str, rung: str | None, *, deadline_s: float) -> SealSpec:
    """Return the seal of a worker of this tree: the inputs of its model, where one is installed."""
    from airgap.enclave import Caps, SealSpec
    from airgap.enclave.trial import MEMORY_MB, OUTPUT_LIMIT
    from airgap.install import Store

    current = Store(folder / "store").current() if (folder / "store").is_dir() else None
    return SealSpec(
        profile=profile,
        program="airgap.enclave.guest:create",
        read_only=(current.folder,) if current is not None and profile == "worker" else (),
        min_rung=rung or _min_rung(folder),
        rung=rung,
        deadline_s=deadline_s,
        caps=Caps(memory_mb=MEMORY_MB, stderr_bytes=OUTPUT_LIMIT),
        state=folder / "enclave",
    )


def _print_trial(found: Trial) -> None:
    """Print the output of a probe as it came, then what the host saw."""
    from rich.table import Table
    from rich.text import Text

    text = found.output.decode("utf-8", errors="backslashreplace")
    if text:
        stdout.print(visible(text), markup=False, end="" if text.endswith("\n") else "\n")
    if found.output_bytes > len(found.output):
        stderr.print(f"cut: {found.output_bytes:,} bytes came", markup=False)
    end = found.outcome
    if found.status is not None:
        end += f", status {found.status}"
    if found.message:
        end += f": {visible(found.message)[:300]}"
    document = found.evidence
    rows = [("probe", end), *_evidence_rows(document)]
    denied = found.denied
    if denied["count"] is None:
        rows.append(("denied calls", "unknown: the kernel's records cannot be read"))
    else:
        calls = ", ".join(f"{name} {times}" for name, times in denied["calls"].items())
        least = "" if denied["exact"] else "at least "
        rows.append(
            ("denied calls", f"{least}{denied['count']} ({calls or 'none'}; {denied['source']})")
        )
    rows.append(("looks", f"{found.looks} while it ran, in {found.seconds:.1f} s"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    good = found.verdict.startswith("SEALED") and not found.code
    stderr.print(table)
    stderr.print(Text.assemble((found.verdict, "bold green" if good else "bold red"), _why(found)))


def _why(found: Trial) -> str:
    return f"  {found.code}" if found.code else ""


def _evidence_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of an evidence record that a person reads first."""
    proc, seccomp = document["proc"], document["seccomp"]
    same = {True: "equal the live ones", False: "differ", None: "live ones not readable here"}
    names = [name for name in seccomp if name != "live_dump_match"]
    filters = ", ".join(f"{name} {seccomp[name]['sha256'][:16]}…" for name in names)
    net = document["net"]
    own = document["ns"]["net"][0] != document["ns"]["net"][1]
    network = ", ".join(net["links"] or ()) if own else "the host's; calls are refused"
    return [
        ("process", f"pid {proc['pid']}, uid {proc['uid']}, rung {document['rung']}"),
        ("filters", f"{filters}; {same[seccomp['live_dump_match']]}"),
        ("network", network),
        ("descriptors", ", ".join(document["fds"] or ()) or "not readable"),
    ]


# -- a worker to look at --------------------------------------------------------------------------


def hold(
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, max=86_400, help="How long it stays.")
    ] = 300.0,
    *,
    rung: Forced = None,
    profile: Profile = "worker",
    root: Root = None,
    json: Json = False,
) -> None:
    """Keep a sealed reference worker open, so that you can look at it from outside."""
    import time

    from airgap.enclave import launch
    from airgap.enclave.running import noted

    folder = root_folder(root)
    spec = _spec(folder, profile, rung, deadline_s=60.0)
    with (
        stderr.status("proving the seal"),
        launch(spec) as enclave,
        noted(folder / "enclave", enclave.evidence),
    ):
        _print_held(enclave.evidence, seconds, json=json)
        until = time.monotonic() + seconds
        while enclave.alive and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        end = enclave.close()
    words = f"ended: status {end['status']}, signal {end['signal']}"
    denied = "unknown" if end["denied_calls"] is None else end["denied_calls"]
    stderr.print(f"{words}, denied calls {denied}", markup=False)
    if end["incident"]:
        stderr.print(f"incident: {end['incident']}", markup=False)
        raise typer.Exit(1)


def _print_held(document: dict[str, Any], seconds: float, *, json: bool) -> None:
    """Print at once what a second terminal needs."""
    import sys

    if json:
        write_json(document, sort_keys=True)
    else:
        for name, value in _evidence_rows(document):
            stdout.print(f"{name:13}{value}", markup=False)
        stdout.print(
            f"SEALED/{document['rung']}  held for {seconds:g} s; Ctrl-C ends it. What to look at: "
            "docs/auditor.md",
            markup=False,
        )
    sys.stdout.flush()


def show_running(root: Root = None, *, json: Json = False) -> None:
    """List the sealed processes of this tree that run now, with their host pids."""
    from airgap.enclave.running import find_running

    found = find_running(root_folder(root) / "enclave")
    if json:
        write_json({"running": found}, sort_keys=True)
        return
    if not found:
        stdout.print("no sealed process of this tree runs now", markup=False)
    for document in found:
        proc = document["proc"]
        stdout.print(
            f"pid {proc['pid']}  {document['profile']}  SEALED/{document['rung']}  "
            f"since {document['ts']}",
            markup=False,
        )


def show_filters(
    pid: Annotated[int, typer.Option("--pid", min=1, help="Host pid of a sealed process.")],
    *,
    json: Json = False,
) -> None:
    """Dump the filters of a live process and compare them with the published ones; needs root."""
    from airgap.enclave.attest import dump

    found = dump(pid)
    if json:
        write_json({"pid": pid, "filters": found})
    else:
        for row in found:
            stdout.print(
                f"index {row['index']}: {row['instructions']} instructions  {row['sha256']}  "
                f"{row['matches'] or 'NO MATCH'}",
                markup=False,
            )
    if not found or not all(row["matches"] for row in found):
        raise typer.Exit(1)


# -- doctor ----------------------------------------------------------------------------------------


def doctor(
    root: Root = None,
    *,
    channels: Annotated[
        bool, typer.Option("--channels", help="Print what was tried, channel by channel.")
    ] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Cards, driver and GPU libraries instead of the seal.")
    ] = False,
    system: Annotated[
        bool, typer.Option("--system", help="Files, clock, disk and kernel instead of the seal.")
    ] = False,
    json: Json = False,
) -> None:
    """Probe the seal on this host: the rung that it reaches, and what would raise it."""
    if gpu:
        _doctor_gpu(json=json)
        return
    if system:
        _doctor_system(root_folder(root), json=json)
        return
    from airgap.enclave.doctor import examine

    folder = root_folder(root)
    with stderr.status("probing: a control without a seal, then a sealed twin"):
        found = examine(min_rung=_min_rung(folder), state=folder / "enclave")
    show(found.as_document(), _page(found, channels=channels), json=json)
    if found.reached is None:
        raise typer.Exit(1)


def _doctor_gpu(*, json: bool) -> None:
    """Print what a session on CUDA or TensorRT would meet; exit 1 where neither would come up."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from airgap.enclave.inventory import examine as examine_gpu
    from airgap.enclave.inventory import take

    found = examine_gpu(take())
    table = Table.grid(padding=(0, 2))
    fixes: list[Any] = []
    for check in (*found.checks, *found.tensorrt_checks):
        word = Text("fits", "green") if check.good else Text("no", "red")
        table.add_row(Text(check.name), word, Text(check.found))
        if check.fix:
            fixes.append(Text.assemble((f"{check.name}: ", "dim"), check.fix))
        if check.command:
            fixes.append(Text(f"  {check.command}", "bold", no_wrap=True, overflow="ignore"))
    if any("WHEELS" in check.command for check in (*found.checks, *found.tensorrt_checks)):
        fixes.append(Text("WHEELS is the folder of wheels from the bundle", "dim"))
    verdict = "may be demanded: cpu"
    verdict += ", cuda" * found.cuda + ", tensorrt" * found.tensorrt
    note = Text("what fits has been compared, not run: the first session is the proof", "dim")
    show(found.as_document(), Group(table, *fixes, Text(verdict, "bold"), note), json=json)
    if not found.cuda:
        raise typer.Exit(1)


def _doctor_system(folder: Path, *, json: bool) -> None:
    """Print what this host should be before it serves; exit 1 where something is bad."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from airgap.host_check import Host, examine

    found = examine(Host(folder))
    table = Table.grid(padding=(0, 2))
    colours = {"good": "green", "look": "yellow", "bad": "red"}
    fixes: list[Any] = []
    for check in found.checks:
        table.add_row(Text(check.name), Text(check.state, colours[check.state]), Text(check.found))
        if check.fix:
            fixes.append(Text.assemble((f"{check.name}: ", "dim"), check.fix))
    heading = [Text("\nwhat to do", "bold"), *fixes] if fixes else []
    show(found.as_document(), Group(table, *heading), json=json)
    if not found.good:
        raise typer.Exit(1)


def _min_rung(folder: Any) -> str | None:
    """Return the site's decision, None where there is none."""
    from airgap.config import load_site

    if not (folder / "site.toml").exists():
        return None
    return load_site(folder).enclave.min_rung


def _page(found: Examination, *, channels: bool) -> Any:
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
        parts += ["", *_probe(shown, channels=channels)]
    word = Text(
        f"SEALED/{reached.name}" if reached else "REFUSED", "bold green" if reached else "bold red"
    )
    meaning = "a worker started now reaches this rung" if reached else "no worker starts here"
    parts += ["", Text.assemble(word, f"  {meaning} (least rung allowed: {found.min_rung})")]
    for step in found.advice:
        words = Table.grid(padding=(0, 2))
        words.add_row(Text("to raise it", style="dim"), Text(step.words))
        parts += [words, *(Text(f"  {command}", "bold") for command in step.commands)]
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


def _probe(rung: Rung, *, channels: bool) -> list[Any]:
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
    count = sum(len(line.split()) - 1 for line in untested)
    title = Table.grid(padding=(0, 2))
    tried = f"{len(verdict.rows)} channels in {rung.seconds:.1f} s, {count} not to be had here"
    for name, words in (
        (f"probe of {rung.name}", tried if channels else f"{tried}; see --channels"),
        ("control", f"{verdict.control_open} open, {verdict.control_heard} heard by a receiver"),
        ("sealed", f"{verdict.sealed_open} open, {verdict.sealed_heard} heard by a receiver"),
    ):
        title.add_row(Text(name, style="dim"), words)
    if not channels:
        return [title]
    if untested:
        rest = Table.grid(padding=(0, 2))
        rest.add_row(Text("not to be had", style="dim"), Text("\n".join(untested)))
        return [title, table, rest]
    return [title, table]
