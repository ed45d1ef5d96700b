"""What seal, policy and audit cost a request: the whole broker against a bare, unsealed worker.

Obeys docs/design/inference.md, 7: less than 1 % of the work or 10 ms, whichever is larger. Two
figures: the same request through the sealed worker and through the same program in this process;
and the two decisions, the objects and the two durable records that surround it, against 10 ms.
Needs the lab that `airgap demo` leaves; `AIRGAP_BENCH_LAB` names another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import structlog
from harness import Context, Result, SkipBenchmark, alone, paired, seconds

ROOT = Path(__file__).resolve().parents[1]
LAB = Path(os.environ.get("AIRGAP_BENCH_LAB", ROOT / "demo-out" / "lab"))
PRODUCT = "CC(=O)Nc1ccc(OCc2ccccc2)cc1"
SAMPLES = 32
ALLOWED_MS = 10.0


def run(context: Context) -> list[Result]:
    """Measure both."""
    if not (LAB / "store" / "current").exists():
        raise SkipBenchmark(f"no lab in {LAB}; `make demo` makes one")
    from airgap.config import load_site
    from airgap.inference.program import create
    from airgap.serve import Job, open_broker
    from airgap.serve.broker import settings_of
    from airgap.serve.session import find_installed, specs

    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet)  # as the command line does; the table is the output
    with open_broker(LAB, project="route-design") as (broker, project):
        job = Job("retrosynthesis", {"smiles": PRODUCT}, project, {"n": SAMPLES, "seed": 1})
        prepared = broker._prepare("01" + "0" * 24, job)  # noqa: SLF001 - a step on its own
        payload = settings_of(prepared).encode()
        config = specs(find_installed(LAB, ""), broker.model, load_site(LAB), LAB)[0].config
        bare = create(config)
        bare.warm_up()
        context.step("the same request, sealed and bare")
        seal = paired(
            seconds(lambda: broker.worker.request(payload, 60.0)),
            seconds(lambda: bare.handle(payload, lambda _event: None)),
            context.runs * 4,
        )
        context.step("decisions and records around it")
        around = alone(milliseconds(surround(broker, job, prepared)), ALLOWED_MS, context.runs * 4)
    return [
        seal.lower_is_better(
            "sealed", unit="s", target=0.95, samples=SAMPLES, peer_is="the same program, unsealed"
        ),
        around.lower_is_better(
            "policy_and_audit", unit="ms", target=1.0, peer_is="10 ms allowed a request"
        ),
    ]


def surround(broker, job, prepared) -> Callable[[], None]:  # noqa: ANN001 - typed in airgap.serve
    """Return everything of a request that is neither model nor chemistry."""
    from airgap.audit import commitment, new_ulid
    from airgap.serve.broker import settings_of

    def work() -> None:
        request = new_ulid()
        screen = prepared.input_screen
        decision = broker._permit(request, job, prepared, screen, stage="input")  # noqa: SLF001
        opening = (prepared.prompt.encode(), os.urandom(32))
        broker._record_intent(request, job, decision, settings_of(prepared), opening)  # noqa: SLF001
        broker._permit(request, job, prepared, screen, stage="output")  # noqa: SLF001
        broker._record(  # noqa: SLF001
            request,
            job,
            "outcome",
            out=commitment(b"x" * 10_000, os.urandom(32)),
            tok=(31, 1000),
            lat_ms=1,
            data={"result": "complete", "samples": SAMPLES, "task": job.task},
        )

    return work


def milliseconds(work: Callable[[], None]) -> Callable[[], float]:
    """Return a measure of `work` in milliseconds."""
    measure = seconds(work)
    return lambda: 1000 * measure()


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
