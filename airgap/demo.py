"""The demonstration: the whole road on one machine, with the real commands.

Each step runs the installed `airgap` program in its own process, exactly as a person would type it,
and shows the line. Two folders play the two sides: `staging/` is connected, `lab/` is not. What a
step printed as JSON is the only thing that the closing screen knows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from policy.errors import FaultError, RefusedError, UsageError
from policy.wording import counted

MODEL = "logos-ref-tiny"
MARKER = ".airgap-demo"  # a folder without it is somebody's data and is never cleared
SHOWN_REASONS = 4
SHOWN_CAUSE = 150
OUTPUT_LIMIT = 64 * 1024 * 1024  # bytes of one command's JSON
PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
# Human lysozyme C, residues 19 to 66 of UniProt P61626: short enough for the small model.
LYSOZYME = "KVFERCELARTLKRLGMDGYRGISLANWMCLAKWESGYNTRATNYNAG"
SEED = "20260630"
PROJECT = "route-design"
DENIED_PROJECT = "sensor-coatings"
# Key name, person, role. The root key is the institution's; the builder never counts as approver.
PEOPLE = (
    ("root", "rosa", "root"),
    ("builder", "ben", "builder"),
    ("isso", "ivy", "isso"),
    ("compliance", "carl", "compliance"),
)
APPROVERS = ("isso", "compliance")
TASKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("retrosynthesis", ("--smiles", PARACETAMOL, "-n", "32")),
    ("molecule", ("-n", "32")),
    ("binding-site", ("--sequence", LYSOZYME, "-n", "16")),
    ("pocket-ligand", ("--sequence", LYSOZYME, "--residues", "17,34,44-48", "-n", "16")),
    ("material", ("-n", "16")),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one command did: exit status, the JSON document it printed, seconds."""

    status: int
    document: dict[str, Any]
    seconds: float


@dataclass(slots=True)
class Demo:
    """State of one run: folders, the screen, and what the steps found out."""

    out: Path
    source: Path
    console: Console
    found: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    @property
    def pins(self) -> Path:
        """The institution's own list of digests, beside the snapshot and never inside it."""
        return self.source.with_name("SHA256SUMS")

    @property
    def staging(self) -> Path:
        """The connected side's tree."""
        return self.out / "staging"

    @property
    def lab(self) -> Path:
        """The secured side's tree."""
        return self.out / "lab"

    @property
    def media(self) -> Path:
        """The folder that plays the disc."""
        return self.out / "media"

    @property
    def bundle(self) -> Path:
        """The bundle as it crosses."""
        return self.media / f"{MODEL}-1.0.0.agb"

    @property
    def reports(self) -> Path:
        """Where every report lands."""
        return self.out / "reports"

    @property
    def receipts(self) -> Path:
        """What each answer left with its user: heads of the log outside of the log's host."""
        return self.out / "receipts"


def program() -> list[str]:
    """Return the argv prefix of the installed console script, run in isolated mode."""
    script = Path(sys.executable).with_name("airgap")
    if not script.is_file():
        raise FaultError(
            "host.self",
            f"the console script was expected at {script}, and is not there",
            hint="install the package into this environment: pip install .",
        )
    return [sys.executable, "-I", str(script)]


def run_demo(out: Path, source: Path, console: Console) -> dict[str, Any]:
    """Walk the road once and return what the closing screen shows.

    Args:
        out: Folder for every artefact; cleared first when an earlier demonstration made it.
        source: The hub snapshot, a Hugging Face layout.
        console: Where progress goes (standard error).

    Raises:
        UsageError: `source` is no folder, or `out` holds something else.
        RefusedError, FaultError: a step did not end as it must.

    """
    if not (source / "config.json").is_file():
        raise UsageError(
            "usage.argument",
            f"expected a model snapshot with config.json in {source}",
            hint="run it in a checkout of the project, or name a folder with --source",
        )
    prepare_folder(out)
    demo = Demo(out.absolute(), source.absolute(), console)
    steps = (
        ("Keys and people: a builder and two approvers", make_people),
        ("Inspect the snapshot: hashes, provenance, licences, scan", inspect),
        ("Build: convert without a network, prove parity, seal a draft", build),
        ("Two people approve and sign", sign),
        ("Lab: import trust by fingerprint, verify, install", admit),
        ("Run five tasks inside the seal", run_tasks),
        ("Four refusals, for real", refuse),
        ("Export the log; verify it with a public key and the receipts", prove),
    )
    demo.total = len(steps)
    started = time.monotonic()
    for title, step in steps:
        with titled(demo, title):
            step(demo)
    demo.found["seconds"] = round(time.monotonic() - started, 1)
    return demo.found


def prepare_folder(out: Path) -> None:
    """Make `out`, or clear it when an earlier demonstration made it; never anything else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError("usage.argument", f"{out} is not a folder", hint="choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UsageError(
                "usage.argument",
                f"{out} holds files that no demonstration made, so it is left alone",
                hint="choose another --out",
            )
        make_writable(out)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("This folder was made by `airgap demo`, which may clear it.\n")


def make_writable(folder: Path) -> None:
    """Give back the write bit that an installed bundle's folders do not have."""
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o700)


@contextmanager
def titled(demo: Demo, title: str) -> Iterator[None]:
    """Print the step's number and title before, its duration after."""
    demo.done += 1
    demo.console.print(f"\n[bold cyan]{demo.done}/{demo.total}[/] [bold]{title}[/]", markup=True)
    started = time.monotonic()
    yield
    demo.console.print(f"    [dim]{time.monotonic() - started:.1f} s[/]", markup=True)


def call(demo: Demo, *argv: object, expect: int = 0) -> Outcome:
    """Run one `airgap` command with `--json`, show its line, and check how it ended."""
    words = [str(word) for word in argv]
    shown = " ".join(shorten(demo, word) for word in words)
    line = Text.assemble("    ", ("$", "green"), f" airgap {shown}")
    demo.console.print(line, soft_wrap=True)
    started = time.monotonic()
    outcome = collect([*program(), *words, "--json"], started)
    if outcome.status != expect:
        raise unexpected(words, outcome, expect)
    return outcome


def collect(argv: Sequence[str], started: float) -> Outcome:
    """Run `argv`; its progress goes to our standard error, its JSON comes back."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert_pipe = child.stdout
        try:
            raw = assert_pipe.read(OUTPUT_LIMIT + 1) if assert_pipe else b""
            status = child.wait()
        except KeyboardInterrupt:
            # The terminal sent it to the child too; give it the time to clean up after itself.
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
    try:
        document = json.loads(raw) if raw.strip() else {}
    except ValueError as error:
        raise FaultError(
            "host.internal", f"`airgap {argv[3]}` printed no JSON: {raw[:80]!r}"
        ) from error
    return Outcome(status, document, time.monotonic() - started)


def unexpected(words: Sequence[str], outcome: Outcome, expect: int) -> RefusedError | FaultError:
    """Say which step ended otherwise than it must, with the child's own code."""
    kind = RefusedError if outcome.status == RefusedError.exit_status else FaultError
    code = str(outcome.document.get("code", "host.internal"))
    reason = str(outcome.document.get("error", "no reason given"))
    return kind(
        "demo.step",
        f"`airgap {words[0]}` was expected to end with {expect} and ended with "
        f"{outcome.status} ({code}): {reason:.400}",
        hint=str(outcome.document.get("hint", "")) or "airgap doctor",
    )


def shorten(demo: Demo, word: str) -> str:
    """Return a word of the shown command line: paths relative to here, quotes where needed."""
    for base in (Path.cwd(), demo.out.parent):
        if word.startswith(f"{base}/"):
            word = word[len(str(base)) + 1 :]
    return f"'{word}'" if any(c in word for c in " ()#;&|<>") or not word else word


# -- the steps ------------------------------------------------------------------------------------


def make_people(demo: Demo) -> None:
    """Make the keys of three people and the trust root that the institution signs."""
    for folder in (demo.staging, demo.media, demo.reports, demo.receipts):
        folder.mkdir(parents=True)
    site = site_toml(os.getuid())
    (demo.staging / "site.toml").write_text(site)
    for name, person, role in PEOPLE:
        call(demo, "keys", "new", name, "--person", person, "--role", role, "--root", demo.staging)
    keys = demo.staging / "keys"
    call(demo, "trust", "init", "--key", keys / "root.pem", "--root", demo.staging)
    for name, _, _ in PEOPLE[1:]:
        public = keys / f"{name}.pub.json"
        call(demo, "trust", "add", public, "--key", keys / "root.pem", "--root", demo.staging)
    shown = call(demo, "trust", "show", "--root", demo.staging)
    demo.found["trust"] = shown.document


def inspect(demo: Demo) -> None:
    """Inspect the snapshot against the institution's own list of digests."""
    outcome = call(
        demo, "inspect", demo.source, "--pin", demo.pins, "--html", demo.reports / "inspect.html"
    )
    demo.found["inspect"] = outcome.document


def build(demo: Demo) -> None:
    """Build the draft; the builder's key signs it and does not count."""
    outcome = call(
        demo,
        *("build", demo.source, "-o", demo.bundle, "--name", MODEL, "--version", "1.0.0"),
        *("--key", demo.staging / "keys" / "builder.pem", "--pin", demo.pins),
        *("--origin", f"local:{MODEL}", "--supplier", "airgap project", "--jurisdiction", "none"),
        *("--modality", "retrosynthesis", "--modality", "molecule", "--modality", "protein"),
        *("--modality", "material", "--root", demo.staging),
    )
    demo.found["build"] = outcome.document


def sign(demo: Demo) -> None:
    """Let both approvers sign; with one signature the lab refuses."""
    for name in APPROVERS:
        key = demo.staging / "keys" / f"{name}.pem"
        outcome = call(
            demo, "sign", demo.bundle, "--key", key, "--confirm", MODEL, "--root", demo.staging
        )
    demo.found["sign"] = outcome.document


def admit(demo: Demo) -> None:
    """Bring trust and bundle into a lab that has seen neither; nothing is believed unverified."""
    demo.lab.mkdir()
    (demo.lab / "site.toml").write_text(site_toml(os.getuid()))
    root = demo.media / "root.json"
    shutil.copyfile(demo.staging / "trust" / "root.json", root)
    fingerprint = str(demo.found["trust"]["fingerprint"])
    call(demo, "trust", "init", "--from", root, "--fingerprint", fingerprint, "--root", demo.lab)
    call(demo, "verify", demo.bundle, "--root", demo.lab)
    explain = ("policy", "explain", "--root", demo.lab)
    demo.found["explain"] = call(demo, *explain, "--bundle", demo.bundle).document
    other = call(demo, *explain, "--model", "logos-8b", "--project", PROJECT)
    demo.found["logos-8b"] = other.document
    demo.found["install"] = call(demo, "install", demo.bundle, "--root", demo.lab).document
    demo.found["status"] = call(demo, "status", "--root", demo.lab).document


def run_tasks(demo: Demo) -> None:
    """Run every task once, each with a report, a table and a receipt."""
    demo.found["runs"] = []
    for task, arguments in TASKS:
        base = demo.reports / task
        outcome = call(
            demo,
            *("run", task, *arguments, "--seed", SEED, "--project", PROJECT, "--root", demo.lab),
            *("--html", f"{base}.html", "--csv", f"{base}.csv"),
            *("--receipt", demo.receipts / f"{task}.tlog-proof"),
        )
        demo.found["runs"].append(outcome.document)


def refuse(demo: Demo) -> None:
    """Show four refusals happening, each on a copy so that the evidence stays whole."""
    demo.found["refusals"] = [
        flipped_byte(demo),
        denied_use(demo),
        connect_inside(demo),
        edited_log(demo),
    ]


def flipped_byte(demo: Demo) -> tuple[str, str, str]:
    """Flip one bit in the middle of a copy of the bundle."""
    copy = demo.out / "one-byte-flipped.agb"
    shutil.copyfile(demo.bundle, copy)
    with copy.open("r+b") as stream:
        middle = copy.stat().st_size * 2 // 3
        stream.seek(middle)
        byte = stream.read(1)[0]
        stream.seek(middle)
        stream.write(bytes([byte ^ 1]))
    outcome = call(demo, "verify", copy, "--root", demo.lab, expect=1)
    copy.unlink()
    return ("one bit of the bundle flipped", *reason(outcome))


def denied_use(demo: Demo) -> tuple[str, str, str]:
    """Ask for the same work under a defence contract with controlled data."""
    outcome = call(
        demo,
        *("run", "retrosynthesis", "--smiles", PARACETAMOL, "-n", "4"),
        *("--project", DENIED_PROJECT, "--root", demo.lab),
        expect=1,
    )
    return (f"a run for project {DENIED_PROJECT}", *reason(outcome))


def connect_inside(demo: Demo) -> tuple[str, str, str]:
    """Probe the seal: the control must reach its receiver, the sealed twin must not."""
    outcome = call(demo, "doctor", "--root", demo.lab)
    demo.found["doctor"] = outcome.document
    rung = next(each for each in outcome.document["rungs"] if each["sealed"])
    row = next(each for each in rung["verdict"]["rows"] if each["channel"] == "tcp4")
    return (
        "connect() from inside the seal",
        str(row["stage2"]),
        f"{row['stage1']} before the last filter; outside the seal the same call: {row['control']}",
    )


def edited_log(demo: Demo) -> tuple[str, str, str]:
    """Edit one number in one line of a copy of the log."""
    copy = demo.out / "edited-log"
    shutil.copytree(demo.lab / "audit", copy)
    segment = copy / "log" / "seg" / "00000000.jsonl"
    lines = segment.read_bytes().split(b"\n")
    at = next(
        i for i, line in enumerate(lines) if b'"kind":"inference"' in line and b'"n":' in line
    )
    lines[at] = lines[at].replace(b'"n":', b'"n":9', 1)
    segment.write_bytes(b"\n".join(lines))
    outcome = call(demo, "audit", "verify", copy, "--vkey", vkey_file(demo), expect=1)
    shutil.rmtree(copy)
    first = outcome.document["findings"][0]
    return (
        f"one digit of record {at} of the log edited",
        str(outcome.document["verdict"]),
        (
            f"record {first['seq']}, {first['check']}: expected {first['expected']}, "
            f"found {first['found']}"
        ),
    )


def reason(outcome: Outcome) -> tuple[str, str]:
    """Return code and cause of a refusal."""
    return str(outcome.document.get("code")), str(outcome.document.get("error"))


def prove(demo: Demo) -> None:
    """Export the log and verify the export with the public key, the receipts as anchors."""
    export = demo.out / "audit-export"
    call(demo, "audit", "export", "--format", "csv", "-o", export, "--root", demo.lab)
    outcome = call(
        demo,
        *("audit", "verify", export, "--vkey", vkey_file(demo), "--anchors", demo.receipts),
    )
    demo.found["audit"] = outcome.document


def vkey_file(demo: Demo) -> Path:
    """Return the lab's public log key."""
    return next((demo.lab / "keys").glob("audit*.vkey"))


def site_toml(uid: int) -> str:
    """Return the demonstration's site.toml for the account that runs it."""
    text = resources.files("airgap").joinpath("demo_site.toml").read_text(encoding="utf-8")
    return text.replace("uid = 0 ", f"uid = {uid} ", 1)


# -- the closing screen ---------------------------------------------------------------------------


def closing_screen(found: dict[str, Any], out: Path) -> Panel:
    """Return one screen: what runs, why it may, that nothing leaves, what was done."""
    parts = (
        section("What runs", what_runs(found)),
        section("Why it may", why(found)),
        section("That nothing leaves", egress(found)),
        section("What was done", done(found)),
        section("Refused, for real", refusals(found)),
        section("Look at", look_at(out)),
    )
    title = f"airgap demo, {found['seconds']:.0f} s"
    return Panel(Group(*parts), title=title, border_style="cyan", padding=(0, 1))


def section(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Return a titled block of name and value."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=20, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(Text(title, style="bold cyan"), "")
    for name, value in rows:
        grid.add_row(f"  {name}", Text(value))
    return grid


def what_runs(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name the model, its bundle, its lineage and the proof that conversion changed nothing."""
    built = found["build"]
    return [
        ("model", f"{MODEL} 1.0.0, provenance L1 (hash-pinned), scientific_use: false"),
        ("bundle", str(found["install"]["digest"])),
        ("lineage", lineage_of(found["explain"])),
        ("parity", str(built["parity"]["text"])),
        ("approved by", f"{', '.join(found['sign']['people'])}; built by {built['builder']}"),
    ]


def lineage_of(decision: dict[str, Any]) -> str:
    """Return the makers and bases that the decision counted with, each once."""
    starts = decision["starts"]
    makers = [f"{o['relation']} {o['party']} [{o['source']}]" for o in starts["bundle"]["origins"]]
    bases = [f"base: {o['party']}" for o in starts["base_bundles"]["origins"]]
    return "; ".join(makers[:1] + (bases or ["no base model"]))


def why(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Give the decisions with their citations, and the day whose law they applied."""
    admission = found["explain"]
    use = found["runs"][0]["run"]
    return [
        ("legal day", f"{admission['as_of']}, fixed by {admission['as_of_source']}"),
        ("admission", f"{admission['outcome']}, record {found['install']['decision']}"),
        *(
            ("", f"{each['rule']}: {each['plain']} [{each['citation']}]")
            for each in admission["reasons"][:SHOWN_REASONS]
        ),
        ("use", str(use["decision"])),
        *(("", str(line)) for line in use["reasons"][:SHOWN_REASONS]),
        ("LOGOS-8B here", f"would be {found['logos-8b']['summary']}"),
    ]


def egress(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Give the rung of the seal and the probe."""
    doctor = found["doctor"]
    verdict = next(each for each in doctor["rungs"] if each["sealed"])["verdict"]
    return [
        ("seal", str(doctor["verdict"])),
        (
            "probe",
            (
                f"outside {verdict['control_open']} channels open, {verdict['control_heard']} "
                f"heard; inside {verdict['sealed_open']} open, {verdict['sealed_heard']} heard"
            ),
        ),
    ]


def done(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Count the answers and give the head of the log with its verification."""
    audit = found["audit"]
    tasks = ", ".join(
        f"{run['task']} {run['summary']['valid']}/{run['summary']['n']} valid"
        for run in found["runs"]
    )
    return [
        ("answers", tasks),
        ("log", f"{audit['origin']}, {counted(audit['size'], 'record')}, head {audit['root']}"),
        (
            "verified",
            (
                f"{audit['verdict']}; {audit['anchors']} receipts agree, anchored to record "
                f"{audit['anchored_size']} of {audit['size']}"
            ),
        ),
    ]


def refusals(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Give the four refusals: what was tried, and how it ended."""
    return [
        (f"{number}. {code}", f"{what}: {textwrap.shorten(cause, SHOWN_CAUSE, placeholder=' …')}")
        for number, (what, code, cause) in enumerate(found["refusals"], 1)
    ]


def look_at(out: Path) -> list[tuple[str, str]]:
    """Name the files worth opening."""
    return [
        ("report", f"{out}/reports/retrosynthesis.html"),
        ("all artefacts", f"{out}/ (bundle, store, log, export, receipts, reports)"),
    ]
