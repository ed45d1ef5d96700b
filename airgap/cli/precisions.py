"""The precisions of `airgap build`: options, and who counts valid completions for their figures.

Only the sealed helper reads what a model wrote; staging gets a number.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from policy.errors import FaultError, UsageError

if TYPE_CHECKING:
    from bundle.staging.parity import Completions

HELPER = "airgap.science.program:create"
SECONDS = 120.0

Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        help="fp32 (always there), bf16, fp16, int8, int4; repeatable. Each is measured.",
    ),
]
NoReference = Annotated[
    bool,
    typer.Option(
        "--no-reference",
        help="Leave the reference graph out: it is larger than the weights, and TensorRT needs it.",
    ),
]


class Helper(Protocol):
    """The sealed helper."""

    def request(self, payload: bytes, timeout: float) -> bytes:
        """Send a request and return the reply."""
        ...


def wanted_precisions(named: Sequence[str] | None) -> tuple[str, ...]:
    """Return the precisions that the options name; UsageError for one that there is not."""
    from bundle.staging.convert import PRECISIONS

    unknown = sorted(set(named or ()) - set(PRECISIONS))
    if unknown:
        raise UsageError(
            "usage.argument",
            f"--precision {unknown[0]!r:.40}: one of {', '.join(PRECISIONS)}",
            hint="int8 and int4 are weight-only; dynamic int8 is not offered, because its results "
            "depend on who shares a batch",
        )
    return tuple(named or ("fp32",))


@contextlib.contextmanager
def assessor(
    precisions: Sequence[str], state: Path
) -> Iterator[Callable[[Completions], int | None] | None]:
    """Yield the question to the sealed helper; None where no precision needs a task figure."""
    if set(precisions) <= {"fp32"}:
        yield None
        return
    from airgap.enclave import SealSpec, launch
    from airgap.extras import require_extras

    require_extras("science")
    spec = SealSpec(profile="screen", program=HELPER, config={"packs": []}, state=state)
    with contextlib.closing(launch(spec)) as helper:
        yield lambda completions: count_valid(helper, completions)


def count_valid(helper: Helper, completions: Completions) -> int | None:
    """Return how many completions are valid answers to their prompt; None if it is of no task."""
    from airgap.science.results import parse_assessed
    from airgap.science.tasks import TASKS
    from policy.errors import RefusedError

    if completions.prompt.kind not in TASKS:
        return None
    request = {
        "op": "assess",
        "task": completions.prompt.kind,
        "inputs": {"prompt": completions.prompt.text},
        "samples": [
            {
                "index": index,
                "text": text,
                "finish_reason": end,
                "logprob": 0.0,
                "tokens": tokens,
                "removed_mass": 0.0,
            }
            for index, (text, end, tokens) in enumerate(completions.items)
        ],
    }
    try:
        raw = helper.request(json.dumps(request).encode(), SECONDS)
    except RefusedError as error:
        if error.code.startswith("prompt."):
            return None
        raise FaultError("science.reply", f"the helper refused: {error.message}") from error
    return parse_assessed(raw, ()).summary.valid
