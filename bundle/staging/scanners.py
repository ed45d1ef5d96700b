"""Scanners from outside as a tripwire: a hit refuses, silence proves nothing.

Decides which known scanners are on this machine, runs each in a sealed process without a network,
and records for each what it said or why it did not run. Every file has passed our own strict parser
already; the scanners are asked because they may know an attack that has a name.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bundle.scan.strict import parse_object
from bundle.staging.sealed import RunSealed, SealedJob, place_file, python, take
from policy.errors import AirgapError, RefusedError

if TYPE_CHECKING:
    from bundle.staging.inspect import InspectReport

Verdict = Literal["clean", "hit", "not run"]
PROGRAM = Path(__file__).with_name("scanner_main.py")
SECONDS = 900
MEMORY_MB = 4096
SIZE_LIMIT = 256 * 1024 * 1024
_RESULT_LIMIT = 1 << 20
_SHOWN = 200
# Command, its arguments before the folder, and the exit statuses that it documents.
_KNOWN: Mapping[str, tuple[tuple[str, ...], frozenset[int], frozenset[int]]] = {
    "picklescan": (("--path",), frozenset([0]), frozenset([1])),
    "modelscan": (("scan", "-p"), frozenset([0, 3]), frozenset([1])),
    "modelaudit": (("scan", "--strict"), frozenset([0]), frozenset([1])),
}


@dataclass(frozen=True, slots=True)
class ScannerRun:
    """How one scanner was asked and what it said; a scanner that is absent is a result as well."""

    name: str
    verdict: Verdict
    version: str
    text: str

    def as_document(self) -> dict[str, str]:
        """Return the entry of the report."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "version": self.version,
            "text": self.text,
        }


def run_scanners(report: InspectReport, run_sealed: RunSealed | None) -> tuple[ScannerRun, ...]:
    """Ask every known scanner about the files that the walk found; none of them may raise."""
    return tuple(_ask(name, report, run_sealed) for name in _KNOWN)


def refusals_of(runs: Iterable[ScannerRun]) -> list[RefusedError]:
    """Return one refusal for each hit."""
    return [
        RefusedError(
            "scan.tripwire",
            f"{run.name} {run.version} reports: {run.text!r:.240}",
            hint="read what the scanner says; a file that it names is not carried",
        )
        for run in runs
        if run.verdict == "hit"
    ]


def find_site(name: str) -> tuple[Path, str] | None:
    """Return the site-packages of a scanner on the PATH, and its version; None when absent."""
    beside = Path(sys.executable).with_name(name)
    command = shutil.which(name) or (str(beside) if beside.is_file() else None)
    if command is None:
        return None
    for base in (Path(command).parent.parent, Path(os.path.realpath(command)).parent.parent):
        number = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = base / "lib" / number / "site-packages"
        for found in metadata.distributions(path=[str(site)]):
            scripts = [e.name for e in found.entry_points if e.group == "console_scripts"]
            if name in scripts:
                return site, found.version
    return None


def _ask(name: str, report: InspectReport, run_sealed: RunSealed | None) -> ScannerRun:
    found = find_site(name)
    if found is None:
        where = "not installed here for this Python"
        return ScannerRun(name, "not run", "", where)
    site, version = found
    if run_sealed is None:
        return ScannerRun(name, "not run", version, "there is no sealed runner to run it in")
    try:
        status, text = _run(name, site, report, run_sealed)
    except (AirgapError, OSError) as error:
        return ScannerRun(name, "not run", version, f"it did not finish: {error!s:.160}")
    _, clean, hit = _KNOWN[name]
    words = " ".join(text.split())[-_SHOWN:]
    if status in hit:
        return ScannerRun(name, "hit", version, words)
    if status in clean:
        return ScannerRun(name, "clean", version, "")
    return ScannerRun(name, "not run", version, f"it ended with {status}: {words}")


def _run(name: str, site: Path, report: InspectReport, run_sealed: RunSealed) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="airgap-scan-") as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        out.mkdir()
        for file in report.files:
            if file.size > SIZE_LIMIT:
                continue  # weights, of a format without code, that our parser has read
            target = source / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            place_file(file.place, target)
        arguments = [str(site), name, str(out), *_KNOWN[name][0], str(source)]
        done = run_sealed(
            SealedJob(
                argv=(*python(PROGRAM), *arguments),
                read_only=(source, site, PROGRAM),
                out=out,
                memory_mb=MEMORY_MB,
                timeout_s=SECONDS,
            )
        )
        if done.status != 0:
            return -1, done.stderr
        value: dict[str, Any] = parse_object(
            take(out, "result.json", _RESULT_LIMIT, "convert.output"),
            code="convert.output",
            what="the result of a scanner",
            limit=_RESULT_LIMIT,
        )
    status = value.get("status")
    return (status if isinstance(status, int) else -1), str(value.get("text", ""))
