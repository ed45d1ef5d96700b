"""How often the hazard screen holds ordinary molecules, and what one molecule costs.

Obeys docs/design/policy.md, 11 and 15: on 10,000 drug-like molecules of MOSES fewer than 0.1 % may
be held. A hold is a tier from H3 up or a screen that does not finish; as the target of a
retrosynthesis a molecule is held from H2 up, and that share is printed too.

    python benchmarks/bench_screen.py [--wheel molsets-0.3.1-py3-none-any.whl] [-n 10000]

The data come from the wheel `molsets==0.3.1` (MIT), which is read and never installed: the file of
`--wheel` or of AIRGAP_BENCH_MOLSETS, else what `pip download --no-deps` brings.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness import Context, Result, SkipBenchmark

PACKAGE = "molsets==0.3.1"
MEMBER = "moses/dataset/data/train.csv.gz"
MOLECULES = 10_000
SEED = 20_261_125
ALLOWED = 0.001  # share that may be held
MILLISECONDS = 5.0  # a molecule; a run of 10,000 samples then costs under a minute
TARGET_HELD = ("H2", "H3", "H4")
CONFIDENCE = 1.96


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass over the molecules gave; `seconds` is wall time."""

    tiers: Counter[str]
    incomplete: int
    classes: Counter[str]
    seconds: float

    @property
    def n(self) -> int:
        """Molecules."""
        return self.tiers.total()

    @property
    def held(self) -> int:
        """Those that a person would have to release."""
        return self.tiers["H3"] + self.tiers["H4"] + self.incomplete

    @property
    def held_as_target(self) -> int:
        """Those that would hold a retrosynthesis."""
        return sum(self.tiers[tier] for tier in TARGET_HELD) + self.incomplete


def run(context: Context) -> list[Result]:
    """Screen the molecules once; the figure is the upper end of a 95 % interval."""
    wheel = os.environ.get("AIRGAP_BENCH_MOLSETS", "")
    with context.folder() as scratch:
        context.step("reading MOSES")
        texts = read_moses(Path(wheel) if wheel else download(scratch), MOLECULES)
    context.step(f"screening {len(texts)} molecules")
    found = screen(texts)
    share = upper_end(found.held, found.n)
    return [
        Result(
            name="screen.false_holds",
            ratio=ALLOWED / share,
            target=1.0,
            ours=share,
            peer=ALLOWED,
            unit="share",
            conditions={
                "peer_is": "the share that is allowed",
                "ours_is": "upper end of the 95 % interval",
                "molecules": found.n,
                "held": found.held,
                "held_as_target": found.held_as_target,
                "tiers": dict(sorted(found.tiers.items())),
                "seed": SEED,
            },
        ),
        Result(
            name="screen.molecule",
            ratio=MILLISECONDS / (found.seconds / found.n * 1e3),
            target=1.0,
            ours=found.seconds / found.n * 1e3,
            peer=MILLISECONDS,
            unit="ms",
            conditions={"peer_is": "the time that is allowed", "molecules": found.n},
        ),
    ]


def download(folder: Path) -> Path:
    """Fetch the wheel without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], check=False, capture_output=True)
    wheels = sorted(folder.glob("molsets-*.whl"))
    if done.returncode or not wheels:
        raise SkipBenchmark(f"{PACKAGE} cannot be downloaded; name a file in AIRGAP_BENCH_MOLSETS")
    return wheels[0]


def read_moses(wheel: Path, count: int) -> list[str]:
    """Return `count` SMILES of the training set, drawn with a fixed seed."""
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read(MEMBER)).decode()
    texts = [row["SMILES"] for row in csv.DictReader(io.StringIO(table))]
    return random.Random(SEED).sample(texts, count)


def screen(texts: list[str]) -> Found:
    """Screen each molecule by itself, as the helper does."""
    from rdkit import Chem

    from airgap.science import molecules, screens

    molecules.capture_log()
    screener = screens.Screener(*screens.load_packs())
    tiers: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    incomplete = 0
    began = time.perf_counter()
    for text in texts:
        molecule = molecules.find_molecule(text)
        result = screener.screen([molecule]) if isinstance(molecule, Chem.Mol) else None
        if result is None or result.status != "complete":
            incomplete += 1
        tiers[result.tier if result else "H0"] += 1
        classes.update(result.classes if result else ())
    return Found(tiers, incomplete, classes, time.perf_counter() - began)


def upper_end(count: int, n: int) -> float:
    """Return the upper end of the 95 % interval of a share (Wilson)."""
    share, z = count / n, CONFIDENCE
    middle = share + z * z / (2 * n)
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle + spread) / (1 + z * z / n)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help="the wheel of molsets; else pip downloads it")
    parser.add_argument("-n", type=int, default=MOLECULES, help="molecules")
    options = parser.parse_args()
    with Context().folder() as scratch:
        texts = read_moses(options.wheel or download(scratch), options.n)
    found = screen(texts)
    end = upper_end(found.held, found.n)
    print(f"{found.n} molecules of MOSES, seed {SEED}")
    print(f"tiers: {dict(sorted(found.tiers.items()))}; not finished: {found.incomplete}")
    print(f"classes: {dict(found.classes.most_common()) or 'none'}")
    print(f"held: {found.held} ({found.held / found.n:.4%}; 95 % interval up to {end:.4%})")
    print(f"held as the target of a retrosynthesis: {found.held_as_target}")
    print(f"{found.seconds / found.n * 1e3:.2f} ms a molecule")
    return 0 if end < ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
