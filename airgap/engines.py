"""Engines of one GPU: who signed them, for which machine, and the refusal of every difference.

A TensorRT engine belongs to one model of GPU, driver, TensorRT and onnxruntime. It is built on the
lab's own GPU, recorded here, signed by a key of the lab, and never shipped. Before one is loaded
every file is hashed and every fact compared: an engine that merely loads may answer wrongly.

Not run on a GPU.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from airgap.enclave.inventory import Gpu
from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, find_signers, sign_statement
from bundle.fields import Count, DigestText, Document, Instant, Text
from bundle.keys import PublicKey, Signer
from policy.errors import RefusedError
from policy.terms import Digest

CODE = "model.engine"
ENGINES_TYPE = "application/vnd.airgap.engines+json"
RECORD_LIMIT = 1 << 20
FILES_LIMIT = 256
FILE_LIMIT = 64 << 30
_BLOCK = 1 << 20
_OF_A_RUN = {
    "trt_dump_ep_context_model",
    "trt_engine_cache_path",
    "trt_ep_context_file_path",
    "trt_timing_cache_path",
}
_FIX = "build them again on this host: engines serve one GPU, driver, TensorRT and onnxruntime"


class Place(Document):
    """The machine that an engine was built on: each of these must be the same when it is loaded."""

    gpu: Text
    compute: Text
    driver: Text
    tensorrt: Text
    onnxruntime: Text


class EngineFile(Document):
    """One file of the folder, by plain name."""

    name: Text
    size: Count
    sha256: DigestText


class EngineRecord(Document):
    """What is signed."""

    format: Literal["airgap-engines/1"] = "airgap-engines/1"
    bundle: DigestText
    graph: DigestText
    place: Place
    profiles: dict[str, str] = Field(min_length=3, max_length=3)
    options: DigestText
    files: tuple[EngineFile, ...] = Field(min_length=1, max_length=FILES_LIMIT)
    built: Instant

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


def options_digest(options: Mapping[str, str]) -> Digest:
    """Return the digest of a provider's options but for where files lie and whether it builds."""
    kept = {name: options[name] for name in options if name not in _OF_A_RUN}
    return Digest.of(canonical_json(kept))


def place_of(gpu: Gpu, versions: Mapping[str, str]) -> Place:
    """Return the place that a card and the installed packages make.

    Raises:
        RefusedError: `model.engine`; TensorRT or onnxruntime is not installed.

    """
    engine = next((v for n, v in versions.items() if n.startswith("tensorrt-cu")), "")
    runtime = versions.get("onnxruntime-gpu", "")
    if not engine or not runtime:
        raise RefusedError(
            CODE,
            "engines need onnxruntime-gpu and TensorRT; found "
            f"onnxruntime-gpu {runtime or 'none'}, TensorRT {engine or 'none'}",
            hint="airgap doctor --gpu",
        )
    return Place(
        gpu=gpu.name,
        compute=gpu.compute,
        driver=gpu.driver,
        tensorrt=engine,
        onnxruntime=runtime,
    )


def record_engines(
    folder: Path,
    *,
    bundle: Digest,
    graph: Digest,
    place: Place,
    profiles: Mapping[str, str],
    options: Digest,
    now: datetime,
) -> EngineRecord:
    """Return the record of the engines that lie in `folder`."""
    try:
        return EngineRecord(
            bundle=str(bundle),
            graph=str(graph),
            place=place,
            profiles=dict(profiles),
            options=str(options),
            files=tuple(_files(folder)),
            built=now.replace(microsecond=0),
        )
    except ValidationError as error:
        raise RefusedError(
            CODE, f"{folder} holds no engines that could be recorded", hint=_FIX
        ) from error


def sign_engines(record: EngineRecord, signer: Signer | Sequence[Signer]) -> Envelope:
    """Return the record signed by a key of the lab."""
    return sign_statement(record.to_bytes(), ENGINES_TYPE, signer)


def require_engines(
    envelope: Envelope,
    keys: Mapping[str, PublicKey],
    folder: Path,
    *,
    bundle: Digest,
    graph: Digest,
    place: Place,
    profiles: Mapping[str, str],
    options: Digest,
) -> EngineRecord:
    """Return the record if a key of the lab signed exactly what would be loaded, for this machine.

    Args:
        envelope: Parsed and untrusted.
        keys: Of the lab, by key id.
        folder: The engines.
        bundle: The installed bundle.
        graph: The graph that they were built from.
        place: This machine, as it is now.
        profiles: The shapes that the session will ask for.
        options: Of all the options that it will ask for; see `options_digest`.

    Raises:
        RefusedError: `model.engine`, naming the first difference; `seal.type`.

    """
    if not find_signers(envelope, keys, payload_type=ENGINES_TYPE):
        raise RefusedError(CODE, "no key of this lab signed the record of the engines", hint=_FIX)
    record = _parse(envelope.payload)
    wanted = {"bundle": str(bundle), "graph": str(graph), **place.model_dump()}
    found = {"bundle": record.bundle, "graph": record.graph, **record.place.model_dump()}
    for name, value in wanted.items():
        if found[name] != value:
            raise RefusedError(
                CODE,
                f"engines were built for {name} {found[name]!r:.100}; here it is {value!r:.100}",
                hint=_FIX,
            )
    if record.profiles != dict(profiles):
        raise RefusedError(CODE, "engines were built for other shapes than are asked", hint=_FIX)
    if record.options != str(options):
        raise RefusedError(CODE, "engines were built with other options than are set", hint=_FIX)
    lying = {file.name: file for file in _files(folder)}
    signed = {file.name: file for file in record.files}
    for name in sorted({*lying, *signed}):
        if lying.get(name) != signed.get(name):
            what = "is not signed" if name not in signed else "is missing or has changed"
            raise RefusedError(CODE, f"engine file {name!r:.80} {what}", hint=_FIX)
    return record


def _parse(payload: bytes) -> EngineRecord:
    parse_canonical(payload, code=CODE, what="the record of engines", limit=RECORD_LIMIT)
    try:
        return EngineRecord.model_validate_json(payload)
    except ValidationError as error:
        raise RefusedError(CODE, "the record of engines breaks its schema", hint=_FIX) from error


def _files(folder: Path) -> list[EngineFile]:
    """Hash the plain files of a folder; anything else in it is a refusal."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        facts = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > FILE_LIMIT:
            raise RefusedError(CODE, f"{entry.name!r:.80} is no plain file", hint=_FIX)
        found.append(
            EngineFile(name=entry.name, size=facts.st_size, sha256=str(_digest(Path(entry.path))))
        )
    return found


def _digest(path: Path) -> Digest:

    state = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return Digest("sha256", state.digest())
