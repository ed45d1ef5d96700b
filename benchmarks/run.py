"""Run the benchmarks of this folder, print a table and write `results.json`.

    python benchmarks/run.py [NAME]... [--list] [--runs N] [--out FILE]

Without a name all are run; `python benchmarks/bench_NAME.py` is the same as that name.

Exit status: 0 every benchmark ran (a missed target is shown, not an error: figures of a busy
machine are information), 1 one failed, 2 usage, 130 interrupted; then nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where `python -m` would not look

import harness


def main(argv: Sequence[str], *, folder: Path = harness.FOLDER) -> int:
    """Run as told by `argv` and return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone; --list shows all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="the same, by flag"
    )
    parser.add_argument("--runs", type=int, default=harness.RUNS, help="runs a side (default 5)")
    parser.add_argument("--out", type=Path, default=folder / "results.json")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    output = Console(highlight=False)
    if not output.is_terminal:
        output = Console(highlight=False, width=140)  # a file has no edge to wrap at
    found = harness.discover(folder)
    if options.list:
        for name in found:
            output.print(name)
        return 0
    only = {*options.names, *options.only}
    unknown = sorted(only - set(found))
    if unknown or options.runs < 1:
        what = f"no benchmark {unknown[0]!r}" if unknown else "--runs must be 1 or more"
        sys.stderr.write(f"{what}; `--list` shows all\n")
        return 2
    chosen = {n: p for n, p in found.items() if n in only or not only}
    try:
        outcomes = _run(chosen, options.runs)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing written\n")
        return 130
    kept = harness.save(outcomes, options.out, keep_others=bool(only))
    output.print(table(outcomes))
    output.print(f"{kept} results in {options.out}", soft_wrap=True)
    return 1 if any(o.failed for o in outcomes) or not outcomes else 0


def _run(chosen: dict[str, Path], runs: int) -> list[harness.Outcome]:
    progress = Console(stderr=True, highlight=False)
    conditions = harness.machine()
    progress.print(
        f"{conditions['cpu']}, {conditions['cores_allowed']} of {conditions['cores']} cores, "
        f"load {conditions['load'][0]}, kernel {conditions['kernel']}, "
        f"python {conditions['python']}"
    )
    outcomes = []
    for count, (name, path) in enumerate(chosen.items(), start=1):
        with progress.status(f"[{count}/{len(chosen)}] {name}") as status:

            def step(text: str, prefix: str = f"[{count}/{len(chosen)}] {name}: ") -> None:
                status.update(prefix + text)

            outcomes.append(
                harness.run_one(name, path, harness.Context(runs, step), harness.machine())
            )
        last = outcomes[-1]
        word = (last.failed and "FAILED") or (last.skipped and "skipped") or "done"
        progress.print(f"[{count}/{len(chosen)}] {name}: {word}", markup=False)
    return outcomes


def table(outcomes: Sequence[harness.Outcome]) -> Table:
    """Return the table: each result with its ratio against the target, then what has none."""
    view = Table(title="Benchmarks: ratio to the peer, larger is better")
    for heading in ("benchmark", "ratio", "target", "met", "ours", "peer", "unit"):
        view.add_column(heading, justify="left" if heading in {"benchmark", "unit"} else "right")
    for outcome in outcomes:
        for r in outcome.results:
            met = "[green]yes[/]" if r.met else "[red]no[/]"
            row = (f"{r.ratio:.3g}", f"{r.target:.3g}", met, f"{r.ours:,.4g}", f"{r.peer:,.4g}")
            view.add_row(escape(r.name), *row, escape(r.unit))
        if outcome.failed:
            view.add_row(
                outcome.name, "", "", "[red]failed[/]", "", "", escape(outcome.failed[:60])
            )
        if outcome.skipped:
            view.add_row(outcome.name, "", "", "skipped", "", "", escape(outcome.skipped[:60]))
    return view


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
