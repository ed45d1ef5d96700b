"""Scanners from outside as a tripwire: a hit refuses, silence proves nothing.

Decides which known scanners are on this machine, runs each in a sealed process without a network,
and records for each what it said or why it did not run. Every file has passed our own strict parser
already; the scanners are asked because they may know an attack that has a name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bundle.scan.strict import parse_object
from bundle.staging.sealed import RunSealed, SealedJob, place_file, python, take
from bundle.staging.source import SourceFile
from policy.errors import AirgapError, RefusedError

Verdict = Literal["clean", "hit", "not run"]
PROGRAM = Path(__file__).with_name("scanner_main.py")
SECONDS = 900
MEMORY_MB = 4096
SIZE_LIMIT = 256 * 1024 * 1024
_RESULT_LIMIT = 1 << 20
_SHOWN = 200
_PLACE = re.compile(r"\S*airgap-scan-\w+/source/?")


@dataclass(frozen=True, slots=True)
class _Way:
    """How a scanner is asked: arguments before the folder (or each file), documented exits."""

    arguments: tuple[str, ...]
    clean: frozenset[int] = frozenset([0])
    hit: frozenset[int] = frozenset([1])
    each: bool = False


_KNOWN: Mapping[str, _Way] = {
    "picklescan": _Way(("--path",)),
    "modelscan": _Way(("scan", "-p"), clean=frozenset([0, 3])),
    "modelaudit": _Way(("scan", "--strict")),
    "fickling": _Way(("--check-safety", "--json-output", "{out}/fickling.json"), each=True),
}
OF_SNAPSHOTS = ("picklescan", "modelscan", "modelaudit")
OF_PICKLES = ("picklescan", "modelscan", "fickling")


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


def run_scanners(
    files: Sequence[SourceFile],
    run_sealed: RunSealed | None,
    *,
    names: Sequence[str] = OF_SNAPSHOTS,
    limit: int = SIZE_LIMIT,
    beside: Path | None = None,
) -> tuple[ScannerRun, ...]:
    """Ask each scanner about the files that the walk found; none of them may raise.

    Args:
        files: Of the snapshot.
        run_sealed: Runs a program without a network; without it nothing runs.
        names: Of the scanners.
        limit: Bytes of a file up to which it is given to them; larger ones are weights, of a
            format without code, that our own parser has read.
        beside: A folder on the disk of the files, so that they are linked and not copied.

    """
    given = [file for file in files if file.size <= limit]
    return tuple(_ask(name, given, run_sealed, beside) for name in names)


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


def _ask(
    name: str, files: Sequence[SourceFile], run_sealed: RunSealed | None, beside: Path | None
) -> ScannerRun:
    found = find_site(name)
    if found is None:
        return ScannerRun(name, "not run", "", "not installed here for this Python")
    site, version = found
    if run_sealed is None:
        return ScannerRun(name, "not run", version, "there is no sealed runner to run it in")
    way = _KNOWN[name]
    groups = [[file] for file in files] if way.each else [list(files)]
    for group in groups:
        try:
            status, text = _run(name, site, group, run_sealed, beside)
        except (AirgapError, OSError) as error:
            code = error.code if isinstance(error, AirgapError) else type(error).__name__
            return ScannerRun(name, "not run", version, f"it did not finish: {code}")
        words = " ".join(_PLACE.sub("", text).split())[-_SHOWN:]
        if status in way.hit:
            return ScannerRun(name, "hit", version, words or group[0].path)
        if status not in way.clean:
            # Its words may tell of times and places, which would differ from build to build.
            return ScannerRun(name, "not run", version, f"it ended with status {status}")
    return ScannerRun(name, "clean", version, "")


def _run(
    name: str,
    site: Path,
    files: Sequence[SourceFile],
    run_sealed: RunSealed,
    beside: Path | None,
) -> tuple[int, str]:
    way = _KNOWN[name]
    with tempfile.TemporaryDirectory(prefix="airgap-scan-", dir=beside) as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        out.mkdir()
        for file in files:
            target = source / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            place_file(file.place, target)
        before = [word.format(out=out) for word in way.arguments]
        asked = source / files[0].path if way.each else source
        arguments = [str(site), name, str(out), *before, str(asked)]
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
