"""Taking an export in (docs/design/audit.md, 7): judge it against what this reader took last.

The memory is a folder that the standalone verifiers read and write too: of each log `<id>.head`,
a line `origin size root` that serves every verifier as an anchor, and `<id>.number`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from airgap.audit.checkpoint import Keys
from airgap.audit.disk import Disk, open_plain
from airgap.audit.export.manifest import MAX_MANIFEST, Manifest, parse_manifest
from airgap.audit.export.sign import FILE, MAX_FILE, ExportPublic
from airgap.audit.findings import TAMPERED, UNKNOWN, Finding, Findings, Verdict
from airgap.audit.layout import Layout, read_lines
from airgap.audit.previous import find_previous
from airgap.audit.quorum import Policy
from airgap.audit.record import parse_line
from airgap.audit.stream import Progress
from airgap.audit.verify import verify_log
from policy.errors import FaultError, RefusedError

_MAX_NUMBER = 32


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import came to: the verdict, the export's number, and whether it is remembered."""

    verdict: Verdict
    number: int
    previous: int  # number of the export before it, 0 for the first
    remembered: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """What this reader took last of one log."""

    folder: Path
    origin: str

    @property
    def head(self) -> Path:
        """Its last head, as a line that `--anchors` takes."""
        return self._file("head")

    @property
    def number(self) -> int:
        """The number of the last export; 0 where there was none. FaultError `host.io`."""
        try:
            with open_plain(self._file("number")) as file:
                return int(file.read(_MAX_NUMBER))
        except FileNotFoundError:
            return 0
        except ValueError:
            raise FaultError(
                "host.io",
                f"{self._file('number')} holds no number",
                hint="restore the memory from a backup; without it an old export passes as new",
            ) from None

    def store(self, manifest: Manifest) -> None:
        """Remember an export durably.

        Head first: a crash between the two lets the same export in once more, and no older one.
        """
        disk = Disk()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        line = f"{manifest.origin} {manifest.size} {manifest.root}\n"
        disk.put(self.head, line.encode(), mode=0o600)
        disk.put(self._file("number"), f"{manifest.number}\n".encode(), mode=0o600)

    def _file(self, kind: str) -> Path:
        return self.folder / f"{hashlib.sha256(self.origin.encode()).hexdigest()[:16]}.{kind}"


def import_export(
    folder: Path,
    memory: Path,
    *,
    vkey: Keys | None,
    export_keys: ExportPublic | None,
    anchors: Sequence[Path] = (),
    policy: Policy | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Judge an export and remember it when nothing speaks against it.

    Nothing of the manifest is read before its signatures hold. The head of the export before is an
    anchor; the first export of a log has none, so its verdict is *cannot tell* unless `anchors`
    hold one, and it is remembered if that is all that is missing. Without `export_keys` nothing is.
    """
    try:
        content = _read(folder / "manifest.json", MAX_MANIFEST)
        if export_keys is not None:
            export_keys.verify(content, _read(folder / FILE, MAX_FILE))
        manifest = parse_manifest(content)
    except RefusedError as error:
        return Imported(_refused("manifest", error.message), 0, 0, remembered=False)
    known = Memory(memory, manifest.origin)
    before = known.number
    if manifest.number <= before:
        what = f"replayed: export {manifest.number}, and {before} was taken already"
        return Imported(_refused("replay", what), manifest.number, before, remembered=False)
    own = [known.head] if known.head.exists() else []
    verdict = verify_log(
        folder,
        vkey=vkey,
        anchors=[*anchors, *own, *_of_log_before(folder, memory)],
        policy=policy,
        export_keys=export_keys,
        progress=progress,
    )
    remember = export_keys is not None and vkey is not None and _sound(verdict, own, anchors)
    if remember:
        known.store(manifest)
    return Imported(verdict, manifest.number, before, remembered=remember)


def _of_log_before(folder: Path, memory: Path) -> list[Path]:
    """Return the remembered head of the log that this one says it continues.

    What it says is not verified yet; it only chooses what `verify_log` compares.
    """
    layout = Layout(folder)
    for path in (layout.segment(0), layout.kept):
        try:
            line = next(read_lines(path), b"")
            previous = find_previous(parse_line(line.removesuffix(b"\n")))
        except (OSError, RefusedError):
            continue
        if previous is not None:
            head = Memory(memory, previous.origin).head
            return [head] if head.exists() else []
    return []


def _sound(verdict: Verdict, own: Sequence[Path], anchors: Sequence[Path]) -> bool:
    """Whether nothing speaks against the export but that no anchor was given at all.

    That the log before has lost records is said each time; it is no reason to forget this one.
    """
    doubts = [each.check for each in verdict.findings if each.level == UNKNOWN]
    doubts = [check for check in doubts if check != "lost records"]
    first = not own and not anchors and doubts == ["anchor"]
    return verdict.verdict != TAMPERED and (not doubts or first)


def _refused(check: str, what: str) -> Verdict:
    findings = Findings()
    findings.keep(Finding(TAMPERED, check, "manifest.json", found=what))
    empty = Verdict(TAMPERED, "", 0, 0, 0, 0, 0, "", ())
    return replace(empty, findings=findings.in_order())


def _read(path: Path, limit: int) -> bytes:
    try:
        with open_plain(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot read {path}: {os.strerror(error.errno or 0)}", hint="check the path"
        ) from error
    return content
