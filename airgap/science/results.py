"""What the broker believes of the sealed helper: typed, capped replies, and nothing else.

The helper reads hostile text, so its replies are parsed strictly here: unknown fields, wrong types,
infinite numbers and oversize are refused. Standard library and pydantic; no RDKit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from airgap.science.grammar import parse_prompt
from airgap.science.refusals import PromptError
from policy.errors import FaultError

REPLY_LIMIT = 4 * 1024 * 1024
SVG_LIMIT = 400_000
ROWS_LIMIT = 10_000
SDF_ROWS = 200

Model = TypeVar("Model", bound=BaseModel)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
# No control character and no sign that turns the direction of writing: these reach a terminal.
_SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]*$"
Line = Annotated[str, Field(max_length=4_000, pattern=_SHOWN)]
Long = Annotated[str, Field(max_length=200_000, pattern=_SHOWN)]
Text = Annotated[str, Field(max_length=200_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ScreenResult(_Strict):
    """Outcome of a hazard screen; only policy and the restricted log may look inside."""

    status: Literal["complete", "incomplete"]
    tier: Literal["H0", "H1", "H2", "H3", "H4"]
    pack: Line
    mode: Line
    classes: list[Line] = Field(max_length=1_000)
    reason: Line = ""
    target_tier: Literal["H0", "H1", "H2", "H3", "H4"] | None = None


class Preset(_Strict):
    """Sampling settings, every value stated."""

    name: Line
    n: Annotated[int, Field(ge=1, le=10_000)]
    temperature: Annotated[Finite, Field(ge=0)]
    top_p: Annotated[Finite, Field(gt=0, le=1)]
    top_k: Count
    repetition_penalty: Annotated[Finite, Field(gt=0)]
    seed: Count | None = None
    valence: bool = False
    ppl_authors: bool = False


class Subject(_Strict):
    """What the run is about."""

    product: Line = ""
    sequence: Text = ""
    labels: list[Line] = Field(default=[], max_length=20_000)
    pockets: list[Count] = Field(default=[], max_length=20_000)
    level: Annotated[int, Field(ge=1, le=3)] = 1
    source: Line = ""


class Prepared(_Strict):
    """Reply of `prepare`: everything that the model's request needs, and what policy must know."""

    task: Line
    prompt: Text
    display: Long
    stop: list[Line] = Field(max_length=16)
    grammar: dict[Line, Text]
    max_new_tokens: Annotated[int, Field(ge=1, le=65_536)]
    preset: Preset
    modality: Literal["retrosynthesis", "molecule", "annotation", "protein"]
    subject: Subject
    input_screen: ScreenResult
    unchecked: Line
    notes: list[Line] = Field(max_length=100)

    @property
    def constraint(self) -> str:
        """What held the samples, in one word: none, structure, structure+valence or copy."""
        mode = self.grammar.get("mode", "none")
        return f"{mode}+valence" if self.preset.valence and mode == "structure" else mode


class _Likelihood(_Strict):
    logprob: Finite
    per_token: Finite
    tokens: Count
    removed_mass: Annotated[Finite, Field(ge=0, le=1)]
    finish_reason: Line
    ppl_authors: Annotated[Finite, Field(ge=0.999)] | None = None


class _Row(_Likelihood):
    rank: Annotated[int, Field(ge=1)]
    index: Count
    votes: Annotated[int, Field(ge=1)]
    indices: list[Count] = Field(max_length=1_000)


class Reactant(_Strict):
    """One reactant: canonical SMILES, InChIKey, and the text as the model wrote it."""

    smiles: Line
    inchikey: Line
    text: Line


class RetroRow(_Row):
    """One predicted set of reactants."""

    reactants: list[Reactant] = Field(min_length=1, max_length=100)
    reaction: Long
    handed_back: bool
    atoms_balance: bool


class MoleculeRow(_Row):
    """One molecule with its computed properties."""

    text: Line
    smiles: Line
    inchikey: Line
    formula: Line
    mw: Finite
    logp: Finite
    tpsa: Finite
    qed: Finite
    fsp3: Finite
    donors: Count
    acceptors: Count
    rotatable: Count
    heavy_atoms: Count


class SiteRow(_Row):
    """One annotation: labels, letters and one-based positions of the marked residues."""

    sites: list[Line] = Field(max_length=20_000)
    letters: Long
    positions: list[Count] = Field(max_length=20_000)


class Metal(_Strict):
    """A metal node as written and with its dots put back."""

    text: Line
    node: Line


class Linker(_Strict):
    """An organic linker."""

    smiles: Line
    inchikey: Line
    formula: Line
    mw: Finite


class MaterialRow(_Row):
    """Building blocks of one material."""

    metals: list[Metal] = Field(min_length=1, max_length=100)
    linkers: list[Linker] = Field(min_length=1, max_length=100)
    built: Line


class Invalid(_Likelihood):
    """A completion that is no answer; `text` is None where it could not be screened."""

    index: Count
    reason: Line
    offset: Count | None
    text: Text | None
    remainder: Text | None


class Track(_Strict):
    """Votes per residue over `copies` exact copies."""

    sequence: Long
    labels: list[Line] = Field(max_length=20_000)
    votes: list[Count] = Field(max_length=20_000)
    copies: Count


class Summary(_Strict):
    """Counts over all samples asked for."""

    n: Count
    valid: Count
    invalid: Count
    unique: Count
    handed_back: Count
    finish: dict[Line, Count]
    tokens: Count
    mean_removed_mass: Annotated[Finite, Field(ge=0, le=1)]


Row = RetroRow | MoleculeRow | SiteRow | MaterialRow
_ROWS: dict[str, type[Row]] = {
    "retrosynthesis": RetroRow,
    "molecule": MoleculeRow,
    "pocket-ligand": MoleculeRow,
    "binding-site": SiteRow,
    "material": MaterialRow,
}


class Assessed(_Strict):
    """Reply of `assess`; `parts` counts the frames that its rows came in before it.

    `sequences` are residues that the model wrote beyond a copy, for a screener and nobody else.
    """

    task: Line
    rows: list[Row] = Field(max_length=ROWS_LIMIT)
    invalid: list[Invalid] = Field(max_length=ROWS_LIMIT)
    track: Track | None
    output_screen: ScreenResult
    summary: Summary
    unchecked: Line
    sequences: list[Text] = Field(default=[], max_length=1_001)
    parts: Count = 0


class _Part(_Strict):
    event: Literal["progress", "part"]
    done: Count = 0
    of: Count = 0
    rows: list[Row] = Field(default=[], max_length=ROWS_LIMIT)
    invalid: list[Invalid] = Field(default=[], max_length=ROWS_LIMIT)


class Drawings(_Strict):
    """Reply of `draw`: SVG texts by row rank (or `subject`), and the rank to go on from."""

    drawings: dict[Line, list[Annotated[str, Field(max_length=SVG_LIMIT)]]]
    next: Count | None


class _Sdf(_Strict):
    sdf: Annotated[str, Field(max_length=REPLY_LIMIT)]


def parse_prepared(reply: bytes) -> Prepared:
    """Read a reply of `prepare`; FaultError `science.reply` if it is not one.

    The prompt is parsed again by the grammar, because it is about to be sent to a model.
    """
    prepared = _parse(Prepared, reply)
    try:
        parse_prompt(prepared.prompt, prepared.task, level=prepared.subject.level)
    except (PromptError, KeyError) as error:
        raise _wrong("the prompt is none of its task") from error
    return prepared


def parse_assessed(reply: bytes, parts: Iterable[bytes] = ()) -> Assessed:
    """Read a reply of `assess`; FaultError `science.reply` if it is not one.

    Args:
        reply: The last frame.
        parts: Every frame that came before it. Without them only an answer that fits one frame
            can be read; one that does not is refused and never cut.

    Every row is of the type that the task has, and rows, votes and summary agree.
    """
    read = [part for part in (_parse(_Part, raw) for raw in parts) if part.event == "part"]
    assessed = _parse(Assessed, reply)
    if len(read) != assessed.parts:
        raise _wrong(f"{len(read)} parts came, {assessed.parts} were sent")
    if read:
        rows = [*assessed.rows, *(row for part in read for row in part.rows)]
        invalid = [*assessed.invalid, *(one for part in read for one in part.invalid)]
        assessed = assessed.model_copy(update={"rows": rows, "invalid": invalid})
    kind = _ROWS.get(assessed.task)
    if kind is None or any(type(row) is not kind for row in assessed.rows):
        raise _wrong("rows are not those of the task")
    total = assessed.summary
    votes = sum(row.votes for row in assessed.rows)
    if (len(assessed.rows), votes) != (total.unique, total.valid):
        raise _wrong("rows and votes do not add up to the summary")
    if len(assessed.invalid) != total.invalid or total.valid + total.invalid != total.n:
        raise _wrong("invalid samples do not add up to the summary")
    return assessed


def parse_drawings(reply: bytes) -> Drawings:
    """Read a reply of `draw`; FaultError `science.reply` if it is not one."""
    return _parse(Drawings, reply)


def incomplete(reason: str) -> ScreenResult:
    """Return the result for a helper that crashed, hung or answered nonsense: it holds."""
    return ScreenResult(
        status="incomplete", tier="H0", pack="none", mode="none", classes=[], reason=reason[:200]
    )


def draw_all(
    ask: Callable[[Mapping[str, Any]], bytes],
    *,
    inputs: Mapping[str, Any],
    assessed: Assessed,
    limit: int = 200,
) -> dict[str, list[str]]:
    """Ask the helper for drawings in portions, of the first `limit` rows; not yet checked SVG.

    Args:
        ask: Sends one request and returns the reply.
        inputs: The inputs of the run.
        assessed: Its result.
        limit: Rows to draw; a page with thousands of drawings helps nobody.

    """
    rows = [row.model_dump(mode="json") for row in assessed.rows[:limit]]
    track = assessed.track.model_dump(mode="json") if assessed.track else None
    found: dict[str, list[str]] = {}
    start: int | None = 0
    while start is not None:
        request = {
            "op": "draw",
            "task": assessed.task,
            "inputs": dict(inputs),
            "rows": rows[start:],
            "track": track,
        }
        reply = parse_drawings(ask(request))
        found.update(reply.drawings)
        if reply.next is not None and not 0 < reply.next < len(rows) - start:
            raise _wrong("a portion of drawings makes no progress")
        start = None if reply.next is None else start + reply.next
    return found


def sdf_all(ask: Callable[[Mapping[str, Any]], bytes], assessed: Assessed) -> str:
    """Ask the helper for SDF in portions of `SDF_ROWS` rows and return the whole."""
    texts = []
    for start in range(0, len(assessed.rows), SDF_ROWS):
        rows = [row.model_dump(mode="json") for row in assessed.rows[start : start + SDF_ROWS]]
        reply = ask({"op": "sdf", "task": assessed.task, "rows": rows})
        texts.append(_parse(_Sdf, reply).sdf)
    return "".join(texts)


def _parse(model: type[Model], reply: bytes) -> Model:
    if len(reply) > REPLY_LIMIT:
        raise _wrong(f"{len(reply)} bytes, more than {REPLY_LIMIT}")
    try:
        return model.model_validate_json(reply)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:120]
        raise _wrong(f"{place}: {first['msg'][:120]}") from error


def _wrong(what: str) -> FaultError:
    return FaultError(
        "science.reply",
        f"the sealed helper sent a reply that is not one: {what}",
        hint="run it again; if it repeats, report it with `airgap doctor --json`",
    )
