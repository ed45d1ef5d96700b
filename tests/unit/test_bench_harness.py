"""The benchmark harness: discovery, fair pairing, and failures that hide nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIELDS = {"name", "ratio", "target", "ours", "peer", "unit", "conditions"}

GOOD = """
from harness import Paired, paired
def run(context):
    context.step("measuring")
    figures = iter([9.0, 1.0, 2.0, 3.0])
    peers = iter([9.0, 4.0, 4.0, 4.0])
    pair = paired(lambda: next(figures), lambda: next(peers), 3)
    return [pair.higher_is_better("rate", unit="1/s", target=1.0, note="x"),
            pair.lower_is_better("time", unit="s", target=1.0)]
"""
BROKEN = "def run(context):\n    raise RuntimeError('disk on fire [/]')\n"
SKIPPED = (
    "from harness import SkipBenchmark\ndef run(context):\n    raise SkipBenchmark('needs a GPU')\n"
)
INFINITE = (
    "from harness import Result\n"
    "def run(context):\n    return [Result('x', float('inf'), 1.0, 1.0, 1.0, 's')]\n"
)


def _module(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            f"bench_{name}_tested", BENCHMARKS / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run():
    return _module("run")


@pytest.fixture
def harness(run):
    return run.harness


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bench_good.py").write_text(GOOD)
    (tmp_path / "other.py").write_text("raise SystemExit\n")
    return tmp_path


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_benchmark_runs_and_its_results_have_exactly_the_agreed_fields(run, folder, capsys):
    assert run.main([], folder=folder) == 0
    rows = _results(folder)
    assert [row["name"] for row in rows] == ["good/rate", "good/time"]
    assert all(set(row) == FIELDS for row in rows)
    rate, time = rows
    assert (rate["ours"], rate["peer"], rate["ratio"]) == (2.0, 4.0, 0.5)
    assert time["ratio"] == 2.0
    assert rate["conditions"]["runs"] == 3
    assert rate["conditions"]["ours_range"] == [1.0, 3.0]
    assert rate["conditions"]["note"] == "x"
    machine = rate["conditions"]["machine"]
    assert {"cpu", "cores", "load", "kernel", "python", "libraries"} <= set(machine)
    assert "pydantic" in machine["libraries"]
    printed = capsys.readouterr().out
    assert "good/rate" in printed
    assert "0.5" in printed


def test_a_benchmark_may_hold_a_dataclass(run, folder):
    (folder / "bench_good.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True, slots=True)\nclass Found:\n    n: int\n" + GOOD
    )
    assert run.main([], folder=folder) == 0


@pytest.mark.parametrize(
    "source",
    [BROKEN, INFINITE, "import nothing_of_that_name\n", "def run(context):\n    return []\n"],
)
def test_a_failing_benchmark_gives_exit_1_and_hides_no_other(run, folder, source, capsys):
    (folder / "bench_a_broken.py").write_text(source)
    assert run.main([], folder=folder) == 1
    assert [row["name"] for row in _results(folder)] == ["good/rate", "good/time"]
    assert "failed" in capsys.readouterr().out


def test_a_skipped_benchmark_is_shown_with_its_reason_and_is_no_failure(run, folder, capsys):
    (folder / "bench_gpu.py").write_text(SKIPPED)
    assert run.main([], folder=folder) == 0
    assert "needs a GPU" in capsys.readouterr().out


def test_only_keeps_the_results_of_others_and_drops_stale_ones_of_a_failure(run, folder):
    (folder / "bench_fast.py").write_text(GOOD)
    assert run.main([], folder=folder) == 0
    (folder / "bench_fast.py").write_text(BROKEN)
    assert run.main(["--only", "fast"], folder=folder) == 1
    assert [row["name"] for row in _results(folder)] == ["good/rate", "good/time"]


def test_a_name_runs_that_one_alone(run, folder, capsys):
    (folder / "bench_a_broken.py").write_text(BROKEN)
    assert run.main(["good"], folder=folder) == 0
    assert "a_broken" not in capsys.readouterr().out


def test_a_file_started_by_itself_runs_as_the_runner_does(run, harness, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "run", run)
    monkeypatch.setattr(run, "main", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr(sys, "argv", ["bench_seal.py", "--runs", "3"])
    with pytest.raises(SystemExit):
        harness.run_this("/somewhere/bench_seal.py")
    assert asked == [["seal", "--runs", "3"]]


def test_list_runs_nothing(run, folder, capsys):
    assert run.main(["--list"], folder=folder) == 0
    assert capsys.readouterr().out.split() == ["good"]
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(
    "argv", [["absent"], ["--only", "absent"], ["--runs", "0"], ["--no-such-flag"]]
)
def test_a_wrong_command_line_is_usage(run, folder, argv):
    assert run.main(argv, folder=folder) == 2
    assert not (folder / "results.json").exists()


def test_an_interrupt_writes_nothing(run, folder):
    (folder / "bench_long.py").write_text("def run(context):\n    raise KeyboardInterrupt\n")
    assert run.main([], folder=folder) == 130
    assert not (folder / "results.json").exists()


def test_pairs_alternate_so_that_drift_hits_both_sides(harness):
    order = []
    harness.paired(
        lambda: order.append("A") or 1.0, lambda: order.append("B") or 1.0, 4, warm_ups=1
    )
    assert "".join(order) == "AB" + "ABBA" * 2


def test_seconds_measures_the_work_and_alone_compares_with_a_requirement(harness):
    done = []
    assert harness.seconds(lambda: done.append(1))() >= 0
    assert done == [1]
    result = harness.alone(lambda: 600.0, 300.0, 2).higher_is_better("x", unit="1/s", target=1.0)
    assert (result.ratio, result.met) == (2.0, True)


def test_a_scratch_folder_is_removed(harness, monkeypatch, tmp_path):
    monkeypatch.setenv("AIRGAP_BENCH_TMP", str(tmp_path / "scratch"))
    with harness.Context().folder() as folder:
        (folder / "file").write_text("x")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_benchmarks_of_this_repository_are_found(harness):
    assert set(harness.discover()) == {p.stem[6:] for p in BENCHMARKS.glob("bench_*.py")}
