"""`airgap unpickle`: weights that exist only as a pickle become safetensors, under the seal.

Decides whether a new snapshot can be made of one whose weights are pickles. The pickles are read in
a process without a network that can write into one folder, by torch's restricted loader; what is
left is parsed as foreign input. The original never travels. The new snapshot bears a record,
`unpickled.json`, and every later report says that the publisher never published these bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Document, Sha256Hex, Text
from bundle.manifest import first_problem
from bundle.scan.roles import role_of
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view, parse_object
from bundle.staging.scanners import OF_PICKLES, refusals_of, run_scanners
from bundle.staging.sealed import (
    RunSealed,
    SealedJob,
    place_file,
    python,
    require_only,
    require_success,
    take,
)
from bundle.staging.source import (
    MAX_BYTES,
    Digests,
    SourceFile,
    hash_file,
    open_file,
    read_head,
    walk,
)
from bundle.staging.unpickle_main import REFUSED
from policy.errors import RefusedError

FORMAT: Literal["airgap-unpickled/1"] = "airgap-unpickled/1"
RECORD = "unpickled.json"
PROGRAM = Path(__file__).with_name("unpickle_main.py")
SECONDS = 3600
_RECORD_LIMIT = 1 << 20
_CONVERTED = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = ".bin.index.json"
_INDEX_LIMIT = 64 * 1024 * 1024
_MEMORY_FLOOR, _MEMORY_FACTOR = 4096, 4


class Pair(Document):
    """One pickle and what was made of it."""

    source: Text
    source_sha256: Sha256Hex
    file: Text
    sha256: Sha256Hex


class Unpickled(Document):
    """`unpickled.json`: which weights were made here, from what, with what, under which seal."""

    format: Literal["airgap-unpickled/1"] = FORMAT
    files: tuple[Pair, ...]
    versions: dict[str, str]
    rung: Text
    scanners: tuple[Text, ...]


def unpickle(folder: Path, out: Path, *, run_sealed: RunSealed | None) -> Unpickled:
    """Make the snapshot `out` of `folder`, its pickled weights as safetensors.

    Raises:
        RefusedError: `source.*`, `scan.*`, `build.seal`, `build.output`, `convert.output`.
        FaultError: `convert.failed`, `host.*`.

    """
    if run_sealed is None:
        raise RefusedError(
            "build.seal",
            "there is no sealed runner; a pickle is never read outside the seal",
            hint="run `airgap doctor` to see what this host lacks",
        )
    if out.exists():
        raise RefusedError(
            "build.output", f"{str(out)!r:.160} is there already", hint="name a new folder"
        )
    files = walk(folder)
    pickles = [file for file in files if _is_pickle(file)]
    if not pickles:
        raise RefusedError(
            "source.incomplete",
            f"{str(folder)!r:.120} holds no weights in a pickle ({', '.join(_CONVERTED)})",
            hint="inspect it as it is",
        )
    work = out.with_name(f".{out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        return _convert(files, pickles, work, out, run_sealed)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def parse_unpickled(raw: bytes) -> Unpickled:
    """Read a record; RefusedError `source.shape`."""
    value = parse_canonical(raw, code="source.shape", what=RECORD, limit=_RECORD_LIMIT)
    try:
        return Unpickled.model_validate_json(canonical_json(value))
    except ValidationError as error:
        raise RefusedError("source.shape", f"{RECORD}: {first_problem(error)}") from error


def require_unpickled(record: Unpickled, digests: Mapping[str, Digests]) -> Unpickled:
    """Check that the record speaks of the files that are here; RefusedError `source.shape`."""
    for pair in record.files:
        found = digests.get(pair.file)
        if found is None or found.sha256 != pair.sha256:
            raise RefusedError(
                "source.shape",
                f"{RECORD} tells of another {pair.file!r:.120}",
                hint="run `airgap unpickle` again on the published snapshot",
            )
    return record


def _is_pickle(file: SourceFile) -> bool:
    """Tell whether the file is a pickle that is converted; any other refusal stands."""
    if file.path == f"pytorch_model{_INDEX}":
        return False
    try:
        role_of(file.path, read_head(file))
    except RefusedError as error:
        if error.code == "scan.pickle" and file.path.endswith(_CONVERTED) and "/" not in file.path:
            return True
        raise
    return False


def _convert(
    files: tuple[SourceFile, ...],
    pickles: list[SourceFile],
    work: Path,
    out: Path,
    run_sealed: RunSealed,
) -> Unpickled:
    source, made, ready = work / "source", work / "made", work / "ready"
    for each in (source, made, ready):
        each.mkdir(parents=True)
    before = {}
    for file in pickles:
        before[file.path] = hash_file(file, _ignore).sha256
        place_file(file.place, source / file.path)
    runs = run_scanners(pickles, run_sealed, names=OF_PICKLES, limit=MAX_BYTES, beside=work)
    for hit in refusals_of(runs):
        raise hit
    size = sum(file.size for file in pickles) // (1 << 20)
    done = run_sealed(
        SealedJob(
            argv=python(PROGRAM, source, made),
            read_only=(source, PROGRAM),
            out=made,
            memory_mb=_MEMORY_FLOOR + _MEMORY_FACTOR * size,
            timeout_s=SECONDS,
        )
    )
    if done.status == REFUSED:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise RefusedError(
            "scan.pickle",
            f"the restricted loader refuses it: {last!r:.300}",
            hint="it holds more than weights; ask the publisher for safetensors",
        )
    require_success(done, "reading the pickle", "convert.failed")
    record = parse_object(
        take(made, "unpickle.json", _RECORD_LIMIT, "convert.output"),
        code="convert.output",
        what="the record of the conversion",
        limit=_RECORD_LIMIT,
    )
    names = _names(record, before)
    require_only(made, {*names.values(), "unpickle.json"}, "convert.output")
    for target in names.values():
        parse_safetensors(open_view(made / target), target)
    _lay_out(files, names, made, ready)
    versions = record.get("versions")
    result = Unpickled(
        files=tuple(
            Pair(
                source=name,
                source_sha256=before[name],
                file=target,
                sha256=hashlib.sha256(open_view(ready / target)).hexdigest(),
            )
            for name, target in sorted(names.items())
        ),
        versions={str(k): str(v) for k, v in versions.items()}
        if isinstance(versions, dict)
        else {},
        rung=str(done.evidence.get("rung", "unknown")),
        scanners=tuple(" ".join(f"{r.name} {r.version} {r.verdict}".split()) for r in runs),
    )
    (ready / RECORD).write_bytes(canonical_json(result.model_dump(mode="json")))
    ready.rename(out)
    return result


def _names(record: Mapping[str, object], before: Mapping[str, str]) -> dict[str, str]:
    """Return which file was made of which pickle: a plain new name for each."""
    found = record.get("names")
    names = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
    wanted = {name: f"{Path(name).stem.replace('pytorch_model', 'model')}.safetensors"
              for name in before}  # fmt: skip
    if names != wanted or len(set(names.values())) != len(names):
        raise RefusedError("convert.output", "the record names other files than it was given")
    return names


def _lay_out(
    files: tuple[SourceFile, ...], names: Mapping[str, str], made: Path, ready: Path
) -> None:
    """Put the new weights and copies of everything else into one folder."""
    for file in files:
        if file.path in names:
            continue
        with open(open_file(file), "rb") as stream:  # noqa: PTH123 - what the walk saw
            target = ready / file.path
            if file.path == f"pytorch_model{_INDEX}":
                target = ready / "model.safetensors.index.json"
                target.write_bytes(_index(stream.read(_INDEX_LIMIT + 1), names))
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as copy:
                shutil.copyfileobj(stream, copy)
    for target_name in names.values():
        if (ready / target_name).exists():
            raise RefusedError(
                "build.output",
                f"the snapshot holds {target_name!r:.80} already",
                hint="use the safetensors that the publisher gives",
            )
        place_file(made / target_name, ready / target_name)


def _index(raw: bytes, names: Mapping[str, str]) -> bytes:
    value = parse_object(
        memoryview(raw), code="scan.config", what="the index of the weights", limit=_INDEX_LIMIT
    )
    listed = value.get("weight_map")
    if not isinstance(listed, dict):
        raise RefusedError("source.incomplete", "the index of the weights holds no weight_map")
    value["weight_map"] = {
        name: names.get(str(shard), str(shard)) for name, shard in listed.items()
    }
    value.pop("metadata", None)
    return canonical_json(value)


def _ignore(count: int) -> None:
    """Show nothing."""
