"""Protein structures on gemmi, inside the sealed helper: chains, ligands and pockets from PDB text.

A pocket is every residue with an atom within 4.5 angstrom of an atom of the ligand, the usual
contact distance; hydrogens are left out on both sides.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import gemmi

from airgap.science.refusals import PromptError
from airgap.science.subjects import STRUCTURE_LIMIT, select

CONTACT = 4.5
"""Distance in angstrom."""
RESIDUE_LIMIT = 20_000
_IONS_AND_SOLVENT = frozenset(
    (
        *("HOH", "DOD", "WAT", "SO4", "PO4", "CL", "NA", "K", "MG", "CA"),
        *("ZN", "GOL", "EDO", "ACT", "PEG", "DMS", "FMT", "IOD", "BR", "NO3"),
        *("MN", "NI", "CD"),
    )
)


@dataclass(frozen=True, slots=True)
class Protein:
    """One chain as observed: letters, labels such as `A:45`, and zero-based pocket indices."""

    sequence: str
    labels: tuple[str, ...]
    chain: str
    pockets: tuple[int, ...]
    ligand: str


def read_protein(
    text: str,
    *,
    chain: str | None,
    ligand: str | None,
    residues: str | None,
    notes: list[str],
) -> Protein:
    """Read a PDB or mmCIF text and return one chain, with its pocket if one is named.

    Raises:
        PromptError: `prompt.structure` or `prompt.input` for an unreadable file, a chain or ligand
            that is absent or ambiguous, an empty pocket, or residues outside the chain.

    """
    model = _model(text)
    found = {c.name: c for c in model if _letters(c)}
    if not found:
        raise PromptError(
            "prompt.structure", "the structure has no protein chain", hint="give another file"
        )
    chosen = _ligand(model, ligand) if ligand else None
    name = chain or (_nearest_chain(found, chosen[1]) if chosen else None)
    if name is None:
        if len(found) > 1 and len({_sequence(c) for c in found.values()}) > 1:
            raise PromptError(
                "prompt.structure",
                f"the structure has {len(found)} different protein chains",
                expected=tuple(found),
                hint=f"choose one: --chain {next(iter(found))}",
            )
        name = next(iter(found))
        if len(found) > 1:
            notes.append(f"chain {name} was taken: all {len(found)} chains have one sequence")
    if name not in found:
        raise PromptError(
            "prompt.structure",
            f"the structure has no protein chain {name[:20]!a}",
            expected=tuple(found),
            hint=f"choose one: --chain {next(iter(found))}",
        )
    members = _letters(found[name])
    labels = tuple(f"{name}:{_number(residue)}" for residue, _ in members)
    _note_chain(members, name, notes)
    pockets: tuple[int, ...] = ()
    if chosen:
        pockets = _contacts(members, chosen[1])
        if not pockets:
            raise PromptError(
                "prompt.structure",
                f"no residue of chain {name} lies within {CONTACT} angstrom of {chosen[0]}",
                hint="choose the chain that holds the ligand, or leave --chain out",
            )
        notes.append(
            f"pocket: {len(pockets)} residues of chain {name} within {CONTACT} angstrom of "
            f"{chosen[0]}"
        )
    elif residues:
        pockets = tuple(select(residues, labels, "residues"))
    sequence = "".join(letter for _, letter in members)
    return Protein(sequence, labels, name, pockets, chosen[0] if chosen else "")


def _model(text: str) -> gemmi.Model:
    if len(text) > STRUCTURE_LIMIT:
        raise PromptError(
            "prompt.size",
            f"the structure has {len(text)} characters, more than {STRUCTURE_LIMIT}",
            hint="take waters and other chains away",
        )
    # Both formats are ASCII: an accent in a remark must not shift columns or reach a terminal.
    text = re.sub(r"[^\t\n -~]", "?", re.sub(r"\r\n?", "\n", text))
    try:
        if re.match(r"\s*(#[^\n]*\n\s*)*data_", text):
            block = gemmi.cif.read_string(text).sole_block()
            structure = gemmi.make_structure_from_block(block)
        else:
            structure = gemmi.read_pdb_string(text)
    except (RuntimeError, ValueError, IndexError) as error:
        raise PromptError(
            "prompt.structure",
            f"the text is not a PDB or mmCIF file: {str(error)[:120]!a}",
            hint="give the file as the PDB or your program writes it",
        ) from error
    if len(structure) == 0 or not any(len(c) for c in structure[0]):
        raise PromptError(
            "prompt.structure",
            "the structure holds no atom",
            hint="ATOM and HETATM lines are needed; a FASTA file goes to --fasta",
        )
    if not all(math.isfinite(sum(each.atom.pos.tolist())) for each in structure[0].all()):
        raise PromptError(
            "prompt.structure",
            "an atom of the structure has a coordinate that is no number",
            hint="give the file as the PDB or your program writes it",
        )
    structure.setup_entities()
    return structure[0]


def _letters(chain: gemmi.Chain) -> list[tuple[gemmi.Residue, str]]:
    """Return the amino acids of a chain with their one-letter codes, first conformers only."""
    members: list[tuple[gemmi.Residue, str]] = []
    seen: set[str] = set()
    for residue in chain:
        info = gemmi.find_tabulated_residue(residue.name)
        if not info.is_amino_acid() or _number(residue) in seen:
            continue
        if residue.find_atom("CA", "*") is None:
            continue
        seen.add(_number(residue))
        letter = info.one_letter_code.upper()
        members.append((residue, letter if letter.isalpha() else "X"))
        if len(members) > RESIDUE_LIMIT:
            raise PromptError(
                "prompt.size", "the chain is too long", hint=f"at most {RESIDUE_LIMIT} residues"
            )
    return members


def _sequence(chain: gemmi.Chain) -> str:
    return "".join(letter for _, letter in _letters(chain))


def _number(residue: gemmi.Residue) -> str:
    return f"{residue.seqid.num}{residue.seqid.icode.strip()}"


def _note_chain(members: list[tuple[gemmi.Residue, str]], name: str, notes: list[str]) -> None:
    numbers = [int(residue.seqid.num or 0) for residue, _ in members]
    gaps = sum(1 for one, two in itertools.pairwise(numbers) if two - one > 1)
    notes.append(
        f"sequence of the {len(members)} residues observed in chain {name}"
        + (f"; {gaps} gaps in the numbering are joined" if gaps else "")
    )
    odd = sum(letter not in "ACDEFGHIKLMNPQRSTVWY" for _, letter in members)
    if odd:
        notes.append(
            f"{odd} residues are not standard amino acids and are written as letters X or "
            "their parent's"
        )


def _ligands(model: gemmi.Model) -> list[tuple[str, gemmi.Residue]]:
    found = []
    for chain in model:
        for residue in chain:
            info = gemmi.find_tabulated_residue(residue.name)
            if info.is_amino_acid() or info.is_nucleic_acid() or info.is_water():
                continue
            if residue.name in _IONS_AND_SOLVENT:
                continue
            found.append((f"{residue.name} {chain.name}:{_number(residue)}", residue))
    return found


def _ligand(model: gemmi.Model, wanted: str) -> tuple[str, list[gemmi.Residue]]:
    """Find the ligand `NAME`, `CHAIN:NUMBER` or `NAME CHAIN:NUMBER`; first copy of several."""
    plain = " ".join(re.split(r"[\s/]+", wanted.strip()))
    every = _ligands(model)
    named = [
        (label, residue)
        for label, residue in every
        if plain in {label, label.split()[0], label.split()[1]}
    ]
    if not named:
        shown = sorted({label for label, _ in every})[:12]
        raise PromptError(
            "prompt.structure",
            f"the structure has no ligand {wanted[:30]!a}",
            expected=shown or ("none: it holds no ligand",),
            hint=f"choose one: --ligand '{shown[0]}'"
            if shown
            else "give the pocket as --residues 12,45-48",
        )
    return named[0][0], [named[0][1]]


def _contacts(
    members: list[tuple[gemmi.Residue, str]], ligand: list[gemmi.Residue]
) -> tuple[int, ...]:
    spots = [atom.pos for part in ligand for atom in part if not atom.is_hydrogen()]
    near = []
    for at, (residue, _) in enumerate(members):
        atoms = [atom.pos for atom in residue if not atom.is_hydrogen()]
        if any(one.dist(two) <= CONTACT for one in atoms for two in spots):
            near.append(at)
    return tuple(near)


def _nearest_chain(chains: dict[str, gemmi.Chain], ligand: list[gemmi.Residue]) -> str | None:
    counts = {name: len(_contacts(_letters(chain), ligand)) for name, chain in chains.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def warm_up() -> None:
    """Read one small structure, so that gemmi's tables are in memory."""
    line = "ATOM      1  CA  ALA A   1      0.000   0.000   0.000  1.00  0.00           C\n"
    read_protein(line, chain=None, ligand=None, residues="1", notes=[])
