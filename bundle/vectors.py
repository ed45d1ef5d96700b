"""`META/vectors/*.json`, format `airgap-parity-vectors/1` or `/2`: what a target answers again.

One file a precision; FORMAT.md, 12.2. Staging writes it out of the proof of parity; the secured
side reads it and holds the installed graph against it (`airgap.install.parity`). It also carries
what was measured of a precision that is not fp32, so that whoever chooses one can see its price.
Codes are proven in `/2` alone; in `/1` they are readable, and told as not proven exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Count, Document, Name, Text, Token
from bundle.manifest import Manifest, Parity, first_problem
from policy.errors import RefusedError

FORMAT: Literal["airgap-parity-vectors/1"] = "airgap-parity-vectors/1"
FORMAT_CODED: Literal["airgap-parity-vectors/2"] = "airgap-parity-vectors/2"
LIMIT = 16 * 1024 * 1024
EXACT_LIMIT, PART_LIMIT = Decimal("0.001"), Decimal("0.25")  # of `CodesFigures`

_Id = Annotated[int, Field(ge=0, le=1 << 24)]
_Ids = Annotated[tuple[_Id, ...], Field(min_length=1, max_length=1 << 17)]
_Number = Annotated[
    str, Field(pattern=r"^-?[0-9]{1,12}(\.[0-9]{1,12})?([Ee][+-]?[0-9]{1,3})?$", max_length=32)
]
_Prompt = Annotated[str, Field(min_length=1, max_length=65_536)]


class Vector(Document):
    """One prompt: its ids, the greedy tokens after it, and the largest logits of the first."""

    kind: Token
    prompt: _Prompt
    source: Text
    prompt_ids: _Ids
    greedy_ids: _Ids
    top_logits: tuple[tuple[_Id, _Number], ...] = Field(min_length=1, max_length=64)


class TaskFigure(Document):
    """Completions of one task that are valid, out of `samples`, here and in fp32."""

    task: Token
    samples: Count
    valid: Count
    valid_fp32: Count


class CodesFigures(Document):
    """How near codes in the place of matrices are to what they stand for, computed in fp32.

    `exact` is the furthest logit of the same graph without rounded activations. `part` is what the
    rounding makes: the difference on a prompt, root mean square, as a part of the logits' spread.
    """

    exact: _Number
    part: _Number

    @model_validator(mode="after")
    def _holds(self) -> Self:
        """Refuse what no build lets pass: the format alone is read as `proven exactly`."""
        for name, limit in (("exact", EXACT_LIMIT), ("part", PART_LIMIT)):
            if not 0 <= Decimal(getattr(self, name)) <= limit:
                raise ValueError(f"{name} is {getattr(self, name)}, at most {limit} is a proof")
        return self


class Figures(Document):
    """What a precision costs against the published weights in fp32.

    `mean_kl` is in nats; `top1` and `greedy` are shares: of the positions with the same best token,
    and of the greedy tokens before the first that differs. `measured_on` tells of a stand-in.
    """

    mean_kl: _Number
    top1: _Number
    greedy: _Number
    max_delta: _Number
    positions: Count
    measured_on: Text
    recipe: str = Field(max_length=1024)
    tasks: tuple[TaskFigure, ...] = Field(max_length=64)
    codes: CodesFigures | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        shares = (
            f"same best token {_percent(self.top1)}, same greedy tokens {_percent(self.greedy)}"
        )
        tasks = "; ".join(
            f"{each.task} valid {each.valid} of {each.samples} (fp32 {each.valid_fp32})"
            for each in self.tasks
        )
        found = f"mean KL to fp32 {Decimal(self.mean_kl):.1e}, {shares}"
        if self.codes is not None:
            found += (
                f"; codes exact to {Decimal(self.codes.exact):.1e} in a logit, rounded activations "
                f"{_percent(self.codes.part)} of the spread"
            )
        elif self.recipe:
            found += "; its codes were not proven exactly, an older build"
        return f"{found}; {tasks or 'no task was assessed'}"


class Vectors(Document):
    """The whole file."""

    format: Literal["airgap-parity-vectors/1", "airgap-parity-vectors/2"] = FORMAT
    model: Name
    precision: Token
    provider: Name
    tolerance: _Number
    steps: Annotated[int, Field(ge=1, le=4096)]
    credits: tuple[dict[str, Text], ...] = Field(max_length=64)
    measured: Figures | None = None
    vectors: tuple[Vector, ...] = Field(min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _proves_codes(self) -> Self:
        """Want the figures of codes in the format that is for them, and nowhere else."""
        coded = self.measured is not None and self.measured.codes is not None
        if coded != (self.format == FORMAT_CODED):
            raise ValueError(
                f"figures of codes {'do not ' if coded else ''}belong in {self.format}"
            )
        return self


def canonical_vectors(vectors: Vectors) -> bytes:
    """Return the one byte form."""
    return canonical_json(vectors.model_dump(mode="json", exclude_none=True))


def parse_vectors(raw: bytes, claim: Parity) -> Vectors:
    """Turn the bytes that `claim` names into vectors.

    Raises:
        RefusedError: `manifest.vectors`; anything else than what staging writes for this claim.

    """
    parse_canonical(raw, code="manifest.vectors", what=claim.vectors, limit=LIMIT)
    try:
        found = Vectors.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError(
            "manifest.vectors", f"{claim.vectors!r:.120}: {first_problem(error)}"
        ) from error
    stated = found.model, found.precision, found.provider, found.tolerance
    if stated != (claim.model, claim.precision, claim.provider, claim.tolerance):
        raise RefusedError(
            "manifest.vectors", f"{claim.vectors!r:.120} is not what the manifest claims of it"
        )
    return found


def vectors_path(precision: str) -> str:
    """Return where the vectors of a precision stand."""
    return f"META/vectors/parity{'' if precision == 'fp32' else '-' + precision}.json"


def read_vectors(
    manifest: Manifest, view: Callable[[str], memoryview]
) -> tuple[tuple[Parity, Vectors], ...]:
    """Return every claim of parity with its vectors; RefusedError `manifest.vectors`.

    Args:
        manifest: Verified.
        view: Gives the bytes of a listed file.

    """
    return tuple(
        (claim, parse_vectors(bytes(view(claim.vectors)), claim)) for claim in manifest.parity
    )


def _percent(share: str) -> str:
    return f"{100 * Decimal(share):.1f} %"
