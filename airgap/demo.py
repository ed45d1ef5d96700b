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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from policy.errors import FaultError, RefusedError, UsageError

MODEL = "logos-ref-tiny"
# The day whose law the demonstration applies. It is written into the demo's site.toml and shown on
# the closing screen, so that the outcome does not change when a rule starts or a list grows old.
AS_OF = "2026-11-23"
MARKER = ".airgap-demo"  # a folder without it is somebody's data and is never cleared
OUTPUT_LIMIT = 64 * 1024 * 1024  # bytes of one command's JSON
PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
IBUPROFEN = "CC(C)Cc1ccc(cc1)C(C)C(=O)O"
# Human lysozyme C, residues 19 to 66 of UniProt P61626: short enough for the small model.
LYSOZYME = "KVFERCELARTLKRLGMDGYRGISLANWMCLAKWESGYNTRATNYNAG"
SHOWN_DECISIONS = 4


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
    demo.console.print(f"\n[bold cyan]{demo.done}/{demo.total}[/] [bold]{title}[/]")
    started = time.monotonic()
    yield
    demo.console.print(f"    [dim]{time.monotonic() - started:.1f} s[/]")


def call(demo: Demo, *argv: str | Path, expect: int = 0) -> Outcome:
    """Run one `airgap` command with `--json`, show its line, and check how it ended."""
    words = [str(word) for word in argv]
    shown = " ".join(shorten(demo, word) for word in words)
    demo.console.print(f"    [green]$[/] airgap {shown}", soft_wrap=True, markup=True)
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
