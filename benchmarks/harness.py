"""What every benchmark shares: results, fair pairing, the machine's conditions, and the runner.

A benchmark is a file `bench_*.py` beside this one with `def run(context) -> list[Result]`. It
measures our figure and that of a peer alternately, so that a busy machine slows both alike, and
returns their ratio, turned so that larger is better.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
RUNS = 5
LIBRARIES = (
    "cryptography",
    "numpy",
    "onnxruntime",
    "optimum",
    "orjson",
    "pydantic",
    "rdkit",
    "tokenizers",
    "torch",
    "transformers",
)


class SkipBenchmark(Exception):  # noqa: N818 - a notice, not an error
    """Raised by a benchmark that cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of `results.json`.

    `ratio` is larger-is-better and `target` the least ratio that counts as met. `ours` and `peer`
    are in `unit`; where no peer exists, `peer` is the required figure and `conditions` say so.
    """

    name: str
    ratio: float
    target: float
    ours: float
    peer: float
    unit: str
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the ratio reaches its target."""
        return self.ratio >= self.target


@dataclass(frozen=True, slots=True)
class Paired:
    """Figures of alternating runs; `ours` and `peer` are medians."""

    ours: float
    peer: float
    all_ours: tuple[float, ...]
    all_peer: tuple[float, ...]

    def _conditions(self, more: dict[str, Any]) -> dict[str, Any]:
        spread = {"runs": len(self.all_ours)} | {
            f"{who}_range": [_short(min(values)), _short(max(values))]
            for who, values in (("ours", self.all_ours), ("peer", self.all_peer))
        }
        return spread | more

    def higher_is_better(self, name: str, *, unit: str, target: float, **conditions: Any) -> Result:
        """Return a result for rates, scores and the like: ratio = ours / peer."""
        ratio = self.ours / self.peer
        return Result(name, ratio, target, self.ours, self.peer, unit, self._conditions(conditions))

    def lower_is_better(self, name: str, *, unit: str, target: float, **conditions: Any) -> Result:
        """Return a result for durations, sizes and errors: ratio = peer / ours."""
        ratio = self.peer / self.ours
        return Result(name, ratio, target, self.ours, self.peer, unit, self._conditions(conditions))


def paired(
    ours: Callable[[], float], peer: Callable[[], float], runs: int = RUNS, *, warm_ups: int = 1
) -> Paired:
    """Measure both in turn, in the order A B, B A, A B, ..., and return the medians.

    Args:
        ours: Does one run and returns its figure (see `seconds` for plain durations).
        peer: The same for the other side, in the same unit.
        runs: Measured runs of each side.
        warm_ups: Runs of each side that are thrown away.

    """
    for _ in range(warm_ups):
        ours(), peer()
    mine: list[float] = []
    theirs: list[float] = []
    for turn in range(runs):
        order = [(ours, mine), (peer, theirs)]
        for measure, figures in order if turn % 2 == 0 else reversed(order):
            figures.append(measure())
    return Paired(statistics.median(mine), statistics.median(theirs), tuple(mine), tuple(theirs))


def alone(
    ours: Callable[[], float], required: float, runs: int = RUNS, warm_ups: int = 1
) -> Paired:
    """Measure where no peer exists; `required` stands in its place."""
    return paired(ours, lambda: required, runs, warm_ups=warm_ups)


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that does `work` once and returns its wall time in seconds."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


@dataclass(frozen=True, slots=True)
class Context:
    """What a benchmark gets: `runs` a side, and a `step` to say what it is doing."""

    runs: int = RUNS
    step: Callable[[str], None] = lambda _text: None

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a scratch folder on a real disk (beside the results), removed afterwards."""
        base = Path(os.environ.get("AIRGAP_BENCH_TMP", FOLDER.parent / "build"))
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base, prefix="bench-") as name:
            yield Path(name)


def machine() -> dict[str, Any]:
    """Return the conditions that hold for every result of this run."""
    affinity = os.sched_getaffinity(0)
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        memory = int(next(lines).split()[1]) // 1024
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(affinity),
        "load": [round(x, 2) for x in os.getloadavg()],
        "memory_mb": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def discover(folder: Path = FOLDER) -> dict[str, Path]:
    """Return the benchmarks of a folder by name, `bench_audit.py` as `audit`."""
    return {p.stem.removeprefix("bench_"): p for p in sorted(folder.glob("bench_*.py"))}


def run_this(file: str) -> NoReturn:
    """Run the benchmark in `file` as `run.py` does, for a file that was started by itself."""
    import run

    sys.exit(run.main([Path(file).stem.removeprefix("bench_"), *sys.argv[1:]]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one benchmark: results, or why there are none."""

    name: str
    results: tuple[Result, ...] = ()
    skipped: str = ""
    failed: str = ""


def run_one(name: str, path: Path, context: Context, conditions: dict[str, Any]) -> Outcome:
    """Run one file; a failure becomes an outcome, so that it hides no other benchmark."""
    try:
        found = _load(path).run(context)
        if not found:
            return Outcome(name, failed="returned no result")
        results = tuple(_checked(name, result, conditions) for result in found)
    except SkipBenchmark as notice:
        return Outcome(name, skipped=str(notice) or "no reason given")
    except Exception as error:  # noqa: BLE001 - the runner's last line: report and go on
        return Outcome(name, failed=f"{type(error).__name__}: {error}"[:500])
    return Outcome(name, results)


def save(outcomes: Sequence[Outcome], path: Path = RESULTS, *, keep_others: bool = False) -> int:
    """Write the results beside `path` and rename; return how many it now holds.

    With `keep_others` results of benchmarks that did not run now are kept; those of one that
    failed or was skipped are dropped, since they would pass for new.
    """
    rows = [asdict(result) for outcome in outcomes for result in outcome.results]
    if keep_others and path.exists():
        ran = {outcome.name for outcome in outcomes}
        old = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in old if row["name"].split("/")[0] not in ran] + rows
    rows.sort(key=lambda row: str(row["name"]))
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return len(rows)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # so that a benchmark can `from harness import ...`
    spec.loader.exec_module(module)
    return module


def _checked(bench: str, result: Result, conditions: dict[str, Any]) -> Result:
    """Return the result under the name `<bench>/<name>` with the machine's conditions added."""
    figures = (result.ratio, result.target, result.ours, result.peer)
    if not all(math.isfinite(figure) for figure in figures):
        raise ValueError(f"{result.name}: a figure is not finite: {figures}")
    return replace(
        result,
        name=f"{bench}/{result.name}",
        ratio=_short(result.ratio),
        ours=_short(result.ours),
        peer=_short(result.peer),
        conditions={"machine": conditions} | result.conditions,
    )


def _short(figure: float) -> float:
    """Keep five digits: nobody measures more, and diffs stay readable."""
    return float(f"{figure:.5g}")


def _cpu_model() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.machine()
