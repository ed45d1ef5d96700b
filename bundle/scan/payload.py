"""The scan of a whole payload: each file by its own parser, then what they say of each other.

Both sides call it: staging before it seals, the secured side in step 8 of the verification, on
files in quarantine or on members of an archive that lies mapped. It reads no path but the listed
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.graphs import Graphs, parse_graphs, require_matches
from bundle.manifest import FileEntry, Manifest
from bundle.scan.bom import require_bom
from bundle.scan.config import lint_config
from bundle.scan.onnx import Onnx, parse_onnx
from bundle.scan.roles import Role, payload_role
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view, parse_text
from bundle.scan.template import lint_template
from bundle.scan.tokenizer import Tokenizer, parse_tokenizer
from bundle.scan.wheel import check_wheel
from bundle.scan.wheelhouse import require_wheelhouse
from policy.errors import RefusedError

DOCUMENT_LIMIT = 4 * 1024 * 1024

Reader = Callable[[str], memoryview]
"""Gives the bytes of the member with that manifest path; large ones mapped, not copied."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the reader of the report should know; it refuses nothing by itself."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What was parsed: files by role, and the findings."""

    files: Mapping[str, Role]
    findings: tuple[Finding, ...]


def scan_payload(source: Path | Reader, manifest: Manifest) -> ScanReport:
    """Parse every file below `payload/` and check them against each other and the manifest.

    Args:
        source: The folder that holds `payload/`, or a reader of members by manifest path.
        manifest: Already verified; the scan covers its list and nothing else.

    Raises:
        RefusedError: `scan.*`, `bom.mismatch`.
        FaultError: `host.io`.

    """
    read = _folder_reader(source) if isinstance(source, Path) else source
    files: dict[str, Role] = {}
    findings: list[Finding] = []
    entries = [entry for entry in manifest.files if entry.path.startswith("payload/")]
    for entry in entries:
        role = payload_role(entry.path)
        if entry.role != role.value:
            raise RefusedError(
                "scan.role", f"{entry.path!r:.160} is listed as {entry.role}; its name says {role}"
            )
        files[entry.path] = role
    for folder in sorted({entry.path.rpartition("/")[0] for entry in entries}):
        inside = [entry for entry in entries if entry.path.rpartition("/")[0] == folder]
        findings += _scan_folder(folder, inside, files, read, manifest)
    for entry in manifest.files:
        if entry.role == "sbom":
            require_bom(read(entry.path), manifest)
    require_wheelhouse(manifest, read)
    return ScanReport(files, tuple(findings))


def _scan_folder(
    folder: str,
    entries: Sequence[FileEntry],
    files: Mapping[str, Role],
    read: Reader,
    manifest: Manifest,
) -> list[Finding]:
    """Scan the files of one model (or the wheels) and what they say of each other."""
    findings: list[Finding] = []
    sizes = {
        entry.path.rpartition("/")[2]: entry.size
        for entry in entries
        if files[entry.path] is Role.EXTERNAL_DATA
    }
    graphs: Graphs | None = None
    tokenizer: Tokenizer | None = None
    onnx: dict[str, Onnx] = {}
    for entry in entries:
        data, role = read(entry.path), files[entry.path]
        name = entry.path.rpartition("/")[2]
        if len(data) != entry.size:
            raise RefusedError(
                "scan.role", f"{entry.path!r:.160} has {len(data):,} bytes, listed {entry.size:,}"
            )
        if role is Role.GRAPHS:
            graphs = parse_graphs(bytes(data))
        elif role is Role.TOKENIZER:
            tokenizer = parse_tokenizer(data, entry.path)
        elif role is Role.ONNX:
            onnx[name] = parse_onnx(data, sizes=sizes.get, what=entry.path)
        else:
            texts = scan_file(data, role, entry.path)
            findings += [Finding(entry.path, text) for text in texts]
    if graphs is not None:
        model_id = folder.rpartition("/")[2]
        require_matches(graphs, manifest, model_id)
        _require_agreement(graphs, onnx, tokenizer, folder)
    return findings


def scan_file(data: memoryview, role: Role, what: str) -> tuple[str, ...]:
    """Parse one file that stands for itself; returns findings, one line each.

    Raises:
        RefusedError: `scan.*`.

    """
    if role is Role.CONFIG:
        value, findings = lint_config(data, what)
        for place, template in templates_of(value.get("chat_template")):
            lint_template(memoryview(template.encode()), f"{what}, {place}")
        return findings
    if role is Role.TEMPLATE:
        lint_template(data, what)
    elif role is Role.WHEEL:
        return check_wheel(data, what.rpartition("/")[2])
    elif role is Role.EXTERNAL_DATA and what.endswith(".safetensors"):
        parse_safetensors(data, what)
    elif role in {Role.DOCUMENT, Role.LICENCE, Role.CARD, Role.INSTALLER}:
        parse_text(data, code="scan.text", what=what, limit=DOCUMENT_LIMIT)
    return ()


def templates_of(value: object) -> list[tuple[str, str]]:
    """Return the chat templates of a tokenizer configuration: one text, or a list of named ones.

    Raises:
        RefusedError: `scan.template`; there is one, in a form that no library writes.

    """
    if value is None:
        return []
    if isinstance(value, str):
        return [("chat_template", value)]
    items = value if isinstance(value, list) else [None]
    found: list[tuple[str, str]] = []
    for item in items:
        named = item if isinstance(item, dict) else {}
        text = named.get("template")
        if not isinstance(text, str):
            raise RefusedError("scan.template", "chat_template is neither text nor named texts")
        found.append((f"chat_template {named.get('name')!r:.40}", text))
    return found


def _folder_reader(folder: Path) -> Reader:
    return lambda path: open_view(folder / path)


def _require_agreement(
    graphs: Graphs, onnx: Mapping[str, Onnx], tokenizer: Tokenizer | None, folder: str
) -> None:
    """Check graphs.json against the graphs and the tokenizer that it names."""
    if tokenizer is None:
        raise RefusedError("scan.graphs", f"{folder}: there is no tokenizer.json")
    problem = _graph_problem(graphs, onnx) or _token_problem(graphs, tokenizer)
    if problem:
        raise RefusedError("scan.graphs", f"{folder}/graphs.json: {problem}")


def _graph_problem(graphs: Graphs, onnx: Mapping[str, Onnx]) -> str:
    """Say where graphs.json and the graphs differ, or nothing."""
    if {graph.path for graph in graphs.graphs} != set(onnx):
        return "it does not name exactly the graphs beside it"
    for graph in graphs.graphs:
        found = onnx[graph.path]
        if found.inputs != graph.inputs or found.outputs != graph.outputs:
            return f"{graph.path} has other inputs or outputs"
        if {item.location for item in found.external} != {item.path for item in graph.external}:
            return f"{graph.path} uses other external files"
    return ""


def _token_problem(graphs: Graphs, tokenizer: Tokenizer) -> str:
    """Say where graphs.json and the tokenizer differ, or nothing."""
    if tokenizer.size > graphs.vocab_size:
        return f"the tokenizer has ids up to {tokenizer.size - 1}, the graph {graphs.vocab_size}"
    for text, number in graphs.tags.items():
        if tokenizer.ids.get(text) != number:
            return f"tag {text!r:.60} has another id in the tokenizer"
    unk = None if tokenizer.unk is None else tokenizer.ids[tokenizer.unk]
    return "" if graphs.unk_id == unk else "the unknown-token is another one in the tokenizer"
