"""Adapter for a sequence screener that the site has installed (docs/design/policy.md, 11).

No screener ships with this product. A site names one in site.toml; without it new sequences are
not screened, and the screen of an answer that holds some is `incomplete`, which holds. The screener
is a Python program that runs under the seal of a conversion: no network, no new process, read-only
inputs and database, one folder to write to.

Protocol `airgap/sequence-screen/1`. The program is started as::

    python PROGRAM --input request.json --database FOLDER --output FOLDER/result.json

    request.json  {"format": "airgap/sequence-request/1",
                   "sequences": [{"id": "1", "kind": "protein", "sequence": "MKTAYIAK"}, ...]}
    result.json   {"format": "airgap/sequence-result/1", "name": "...", "version": "...",
                   "mode": "...", "results": [{"id": "1", "status": "clear", "classes": []}, ...]}

`status` is `clear`, `hit` or `incomplete`; `classes` are of `biorisk`, `select_agent` and `toxin`.
Name, version and mode must be those of site.toml: the record says what looked, with what, and how
thoroughly. The program is one file; it and the database must have the digests of site.toml before
every run, and what runs is a copy of the bytes that were hashed. Beside it the program sees only
the interpreter and packages of this installation. Another program refuses when a broker opens
(`site.screener`); whatever goes wrong later gives `incomplete`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from airgap.config import SequenceScreener
from airgap.science.results import ScreenResult
from bundle.keys import read_limited
from policy.errors import AirgapError, FaultError, RefusedError

REQUEST = "airgap/sequence-request/1"
REPLY_LIMIT = 4 * 1024 * 1024
SEQUENCES_LIMIT = 1_000
LENGTH_LIMIT = 20_000
MEMORY_MB = 8_192
ENTRIES_LIMIT = 10_000
PROGRAM_LIMIT = 4 * 1024 * 1024
_WORDS = 64 * 1024
_RESULT_NAME = "result.json"

Short = Annotated[str, Field(max_length=64)]


class Sealed(Protocol):
    """How a sealed program ended; `airgap.enclave.SealedResult` has this shape."""

    @property
    def status(self) -> int | None:
        """Exit status, None when a signal ended it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What it left and was accepted."""

    @property
    def evidence(self) -> dict[str, Any]:
        """Record of the seal."""


Run = Callable[["Job"], Sealed]
OnEvidence = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the screener, as `airgap.enclave.run_sealed` takes it."""

    argv: Sequence[str]
    read_only: Sequence[Path]
    out: Path
    memory_mb: int
    timeout_s: float
    stderr_limit: int = _WORDS


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _Entry(_Strict):
    id: Short
    status: Literal["clear", "hit", "incomplete"]
    classes: list[Literal["biorisk", "select_agent", "toxin"]] = Field(max_length=3)


class _Reply(_Strict):
    format: Literal["airgap/sequence-result/1"]
    name: Annotated[str, Field(max_length=200)]
    version: Annotated[str, Field(max_length=200)]
    mode: Annotated[str, Field(max_length=200)]
    results: list[_Entry] = Field(max_length=SEQUENCES_LIMIT)


class SequenceScreen:
    """Screens sequences with the program that the site named, one sealed run a call.

    Raises:
        RefusedError: `site.screener`, the program is not the one that site.toml pins.

    """

    def __init__(
        self,
        settings: SequenceScreener,
        *,
        run: Run,
        scratch: Path,
        on_evidence: OnEvidence = lambda _evidence: None,
    ) -> None:
        self._settings, self._run, self._scratch = settings, run, scratch
        self._on_evidence = on_evidence
        self._require_program()

    @property
    def mode(self) -> str:
        """What looks at sequences, for records and reports."""
        wanted = self._settings
        program, database = _short(wanted.program_sha256), _short(wanted.database_sha256)
        words = f"{wanted.name} {wanted.version}, {wanted.mode}"
        return f"sequences: {words:.140}, program {program}, database {database}"

    def __call__(self, sequences: Sequence[str], kind: str = "protein") -> ScreenResult:
        """Screen sequences and return the highest tier; nothing is raised, what fails holds."""
        if kind not in self._settings.kinds:
            return self._incomplete(f"the screener does not take {kind}")
        if len(sequences) > SEQUENCES_LIMIT or max(map(len, sequences), default=0) > LENGTH_LIMIT:
            return self._incomplete("too many sequences, or too long")
        try:
            program = self._require_program()
            self._require_database()
            reply = self._ask(program, sequences, kind)
        except (AirgapError, OSError, ValueError) as error:
            reason = error.code if isinstance(error, AirgapError) else type(error).__name__
            return self._incomplete(f"the screener failed: {reason}: {error!s:.100}")
        return self._judge(reply, len(sequences))

    def _ask(self, program: bytes, sequences: Sequence[str], kind: str) -> _Reply:
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="sequences-", dir=self._scratch))
        try:
            work.chmod(0o755)  # the sealed program has another uid
            entries = [
                {"id": str(number), "kind": kind, "sequence": text}
                for number, text in enumerate(sequences)
            ]
            request, out = work / "in" / "request.json", work / "out"
            request.parent.mkdir(mode=0o755)
            request.write_text(json.dumps({"format": REQUEST, "sequences": entries}))
            copy = work / "program" / "screener.py"
            copy.parent.mkdir(mode=0o755)
            copy.write_bytes(program)
            result = self._run(self._job(copy, request, out))
            self._on_evidence(result.evidence)
            if result.status != 0:
                raise ValueError(f"it ended with status {result.status}")
            raw = next((each for each in result.files if each.name == _RESULT_NAME), None)
            if raw is None or raw.stat().st_size > REPLY_LIMIT:
                raise ValueError("it left no result of a fit size")
            return _Reply.model_validate_json(raw.read_bytes())
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise ValueError(f"its result: {first['msg'][:80]}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _job(self, program: Path, request: Path, out: Path) -> Job:
        database = Path(self._settings.database)
        arguments = ("--input", request, "--database", database, "--output", out / _RESULT_NAME)
        return Job(
            argv=("python3", str(program), *map(str, arguments)),
            read_only=(program, database, request.parent),
            out=out,
            memory_mb=MEMORY_MB,
            timeout_s=float(self._settings.seconds),
        )

    def _require_program(self) -> bytes:
        path, code = Path(self._settings.program), "site.screener"
        try:
            content = read_limited(path, PROGRAM_LIMIT, code=code, what="the screener")
        except FaultError as error:
            raise RefusedError(code, error.message, hint=error.hint) from error
        found = f"sha256:{sha256(content).hexdigest()}"
        _require_pinned("program", found, self._settings.program_sha256)
        return content

    def _require_database(self) -> None:
        found = folder_digest(Path(self._settings.database))
        _require_pinned("database", found, self._settings.database_sha256)

    def _judge(self, reply: _Reply, asked: int) -> ScreenResult:
        wanted = self._settings
        if (reply.name, reply.version, reply.mode) != (wanted.name, wanted.version, wanted.mode):
            return self._incomplete("it is another screener, version or mode than site.toml names")
        classes: list[str] = sorted({name for each in reply.results for name in each.classes})
        hit = any(each.status == "hit" or each.classes for each in reply.results)
        done = {each.id for each in reply.results if each.status != "incomplete"}
        complete = done == {str(number) for number in range(asked)} == _ids(reply)
        return ScreenResult(
            status="complete" if complete else "incomplete",
            tier="H3" if hit else "H0",
            pack=wanted.database_sha256,
            mode=self.mode,
            classes=classes or (["biorisk"] if hit else []),
            reason="" if complete else "a sequence was not screened to its end",
        )

    def _incomplete(self, reason: str) -> ScreenResult:
        shown = "".join(c if " " <= c <= "~" else "?" for c in reason)[:200]
        return ScreenResult(
            status="incomplete",
            tier="H0",
            pack=self._settings.database_sha256,
            mode=self.mode,
            classes=[],
            reason=shown,
        )


def _require_pinned(what: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise RefusedError(
            "site.screener",
            f"the {what} of the sequence screener has digest {found[:19]}, and {pinned[:19]} is"
            " pinned",
            hint="whoever installed it says what changed; then pin it anew in site.toml,"
            f" [screen.sequences] {what}_sha256",
        )


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _ids(reply: _Reply) -> set[str]:
    return {each.id for each in reply.results}


def folder_digest(folder: Path) -> str:
    """Return the digest of a folder: over the lines `SHA-256  NAME` of its files, sorted by name.

    Raises:
        ValueError: It holds no plain file, something that is none, or too many.

    """
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path.name!r:.60} is neither a file nor a folder")
        if path.is_file():
            digest = sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            lines.append(f"{digest.hexdigest()}  {path.relative_to(folder)}\n")
        if len(lines) > ENTRIES_LIMIT:
            raise ValueError("too many files")
    if not lines:
        raise ValueError("no file in it")
    return f"sha256:{sha256(''.join(lines).encode()).hexdigest()}"
