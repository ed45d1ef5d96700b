"""Molecules on RDKit, inside the sealed helper: parsing with positions, identity, properties.

Facts that shape this module: RDKit reads an empty SMILES as a molecule, so emptiness is refused
before; its parse messages go to a log, which is caught here and turned into an error with a
position; fraction sp3 divides by carbons (the released scripts divide by heavy atoms). The
synthetic accessibility score is absent, because its data in the RDKit package is a pickle.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdkit import Chem, rdBase
from rdkit.Chem import QED, rdDepictor, rdinchi, rdMolDescriptors
from rdkit.Chem.MolStandardize import rdMolStandardize

from airgap.science.fields import check_field, check_smiles, lookalike_hint, scan_smiles
from airgap.science.refusals import PromptError

SMILES_LIMIT = 4_000
"""Longest SMILES that is read, in characters."""
ATOM_LIMIT = 500
"""Most heavy atoms of a molecule that is described or drawn."""

_MESSAGES: list[str] = []


class _Capture(logging.Handler):
    """Keeps RDKit's messages of the current call and prints none."""

    def emit(self, record: logging.LogRecord) -> None:
        if len(_MESSAGES) < 20:  # noqa: PLR2004 - a runaway log must not fill memory
            _MESSAGES.append(record.getMessage())


def capture_log() -> None:
    """Send RDKit's log to this module and nowhere else; call once before anything is parsed."""
    rdBase.LogToPythonLogger()
    logger = logging.getLogger("rdkit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_Capture())
    logger.propagate = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a SMILES is not a molecule; `at` is a character index, `atom` RDKit's atom index."""

    message: str
    at: int
    atom: int | None = None


def find_molecule(text: str) -> Chem.Mol | Problem:
    """Return the sanitised molecule of `text`, or what is wrong with it."""
    if len(text) > SMILES_LIMIT:
        return Problem(f"the SMILES has {len(text)} characters, more than {SMILES_LIMIT}", 0)
    try:
        check_smiles(text)
    except PromptError as error:
        return Problem(error.message.split(" (byte ")[0], error.at)
    molecule = parse_loosely(text)
    if molecule is None:
        return _syntax_problem(text)
    if molecule.GetNumHeavyAtoms() > ATOM_LIMIT:
        return Problem(f"the molecule has more than {ATOM_LIMIT} heavy atoms", 0)
    for problem in Chem.DetectChemistryProblems(molecule):
        return _chemistry_problem(text, problem)
    _MESSAGES.clear()
    return Chem.MolFromSmiles(text) or Problem(_said() or "RDKit does not accept it", 0)


def parse_loosely(text: str) -> Chem.Mol | None:
    """Parse without sanitisation, so that a wrong valence is no obstacle; None: a syntax error."""
    if not text.isascii():  # RDKit quotes it in a message that is then no text
        return None
    _MESSAGES.clear()
    settings = Chem.SmilesParserParams()
    for name in ("sanitize", "removeHs", "allowCXSMILES", "parseName"):
        setattr(settings, name, False)
    return Chem.MolFromSmiles(text, settings)


def _said() -> str:
    for message in _MESSAGES:
        plain = re.sub(r"^\[[\d:]+\]\s*", "", message).strip()
        if plain:
            return plain.split("\n")[0].replace("SMILES Parse Error: ", "")[:160]
    return ""


def _syntax_problem(text: str) -> Problem:
    said = _said().split(" while parsing")[0].split(" for input")[0]
    joined = "\n".join(_MESSAGES)
    place = re.search(r"around position (\d+)", joined)
    at = max(0, min(len(text), int(place[1])) - 1) if place else 0
    for kind, token, start in scan_smiles(text):
        if kind == "atom" and token.startswith("[") and start <= at < start + len(token):
            return Problem(f"{token} is not an atom", start)
    return Problem(said or "RDKit does not accept it", at)


def _chemistry_problem(text: str, problem: object) -> Problem:
    kind = problem.GetType()  # type: ignore[attr-defined]
    message = problem.Message()  # type: ignore[attr-defined]
    if kind == "KekulizeException":
        atoms = tuple(problem.GetAtomIndices())  # type: ignore[attr-defined]
        atom = int(atoms[0]) if atoms else 0
        message = "an aromatic ring has no alternating single and double bonds"
    else:
        atom = int(problem.GetAtomIdx())  # type: ignore[attr-defined]
        message = re.sub(r"^Explicit valence for atom # \d+ (\w+), (\d+), .*", _valence, message)
    places = [at for name, _, at in scan_smiles(text) if name == "atom"]
    return Problem(message, places[atom] if atom < len(places) else 0, atom)


def _valence(found: re.Match[str]) -> str:
    return f"{found[1]} has {found[2]} bonds, more than its valence allows"


def read_molecule(text: str, what: str) -> Chem.Mol:
    """Return the molecule that a user typed; PromptError g03, g07 or g12 if it is none."""
    text = text.strip()
    check_field(text, what)
    found = find_molecule(text)
    if isinstance(found, Problem):
        where = "" if found.atom is None else f" at atom {found.atom}"
        raise PromptError(
            "prompt.g07",
            f"the {what} does not parse{where}: {found.message}",
            text=text or None,
            at=found.at,
            hint=lookalike_hint(text)
            or "mend the SMILES there; a drawing program writes it with `Copy as SMILES`",
        )
    return found


def read_product(text: str, *, fix: bool, notes: list[str]) -> Chem.Mol:
    """Return the product that a user typed: one fragment, no atom maps, no wildcard (g08, g07).

    With `fix` maps are taken away and of a salt the neutral parent of the largest fragment is
    chosen, and `notes` say so.
    """
    text = text.strip()
    molecule = read_molecule(text, "product")
    wild = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomicNum() == 0]
    if wild:
        places = [at for kind, _, at in scan_smiles(text) if kind == "atom"]
        raise PromptError(
            "prompt.g07",
            f"atom {wild[0]} of the product is a wildcard",
            text=text,
            at=places[wild[0]] if wild[0] < len(places) else 0,
            hint="put an element there",
        )
    if any(atom.GetAtomMapNum() for atom in molecule.GetAtoms()):
        clean = without_maps(molecule)
        if not fix:
            raise PromptError(
                "prompt.g08",
                "the product carries atom map numbers",
                text=text,
                at=max(0, text.find(":")),
                hint=f"without them it is {Chem.MolToSmiles(clean)}; --fix takes them away",
            )
        molecule = clean
        notes.append("as asked, atom map numbers were taken away")
    fragments = Chem.GetMolFrags(molecule, asMols=True)
    if len(fragments) > 1:
        largest = max(fragments, key=lambda part: (part.GetNumHeavyAtoms(), Chem.MolToSmiles(part)))
        parent = neutral_parent(largest)
        mended = canonical(parent) != canonical(largest)
        parts = " and ".join(Chem.MolToSmiles(part) for part in fragments[:4])
        if not fix:
            raise PromptError(
                "prompt.g08",
                f"the product has {len(fragments)} fragments, expected one: {parts:.160}",
                text=text,
                at=max(0, text.find(".")),
                hint=f"give one, for example {canonical(parent):.200}; --fix takes the largest"
                + " as its neutral parent" * mended,
            )
        molecule = parent
        notes.append(
            f"as asked, the largest of {len(fragments)} fragments was taken"
            + f", as its neutral parent: {canonical(largest):.200} became {canonical(parent):.200}"
            * mended
        )
        if charge := Chem.GetFormalCharge(parent):
            notes.append(f"the fragment keeps its charge of {charge:+d}: no proton can balance it")
    return molecule


def neutral_parent(fragment: Chem.Mol) -> Chem.Mol:
    """Return an ion of a salt with protons put on or taken off until it is neutral, if they can."""
    neutral = rdMolStandardize.Uncharger().uncharge(fragment)
    return Chem.MolFromSmiles(canonical(neutral)) or fragment


def without_maps(molecule: Chem.Mol) -> Chem.Mol:
    """Return a copy without atom map numbers and without hydrogens that only they kept."""
    copy = Chem.Mol(molecule)
    for atom in copy.GetAtoms():
        atom.SetAtomMapNum(0)
    return Chem.RemoveHs(copy)


def canonical(molecule: Chem.Mol) -> str:
    """Return the canonical SMILES."""
    return str(Chem.MolToSmiles(molecule))


def inchikey(molecule: Chem.Mol) -> str:
    """Return the InChIKey, or an empty string for what InChI cannot describe."""
    return str(rdinchi.MolToInchiKey(molecule))


def identity(molecule: Chem.Mol) -> str:
    """Return what makes two molecules one row: the InChIKey, else the canonical SMILES."""
    return inchikey(molecule) or canonical(molecule)


@dataclass(frozen=True, slots=True)
class Description:
    """Identity and computed properties of one molecule.

    `mw` is the average mass in Da, `tpsa` the polar surface in square angstrom, `logp` Crippen's,
    `fsp3` sp3 carbons over all carbons. `qed` runs from 0 to 1.
    """

    smiles: str
    inchikey: str
    formula: str
    mw: float
    logp: float
    tpsa: float
    qed: float
    fsp3: float
    donors: int
    acceptors: int
    rotatable: int
    heavy_atoms: int


def describe(molecule: Chem.Mol) -> Description:
    """Compute the properties of a sanitised molecule."""
    return Description(
        smiles=canonical(molecule),
        inchikey=inchikey(molecule),
        formula=str(rdMolDescriptors.CalcMolFormula(molecule)),
        mw=round(float(rdMolDescriptors._CalcMolWt(molecule)), 3),  # noqa: SLF001 - RDKit's own MolWt
        logp=round(float(rdMolDescriptors.CalcCrippenDescriptors(molecule)[0]), 3),
        tpsa=round(float(rdMolDescriptors.CalcTPSA(molecule)), 2),
        qed=round(float(QED.qed(molecule)), 4),  # type: ignore[no-untyped-call]
        fsp3=round(float(rdMolDescriptors.CalcFractionCSP3(molecule)), 4),
        donors=int(rdMolDescriptors.CalcNumHBD(molecule)),
        acceptors=int(rdMolDescriptors.CalcNumHBA(molecule)),
        rotatable=int(rdMolDescriptors.CalcNumRotatableBonds(molecule)),
        heavy_atoms=int(molecule.GetNumHeavyAtoms()),
    )


def residue_smiles() -> dict[str, str]:
    """Return the free amino acid of each standard residue as canonical SMILES.

    The authors do not publish whether their residue SMILES is the free acid or the form in a chain.
    """
    return {letter: canonical(Chem.MolFromSequence(letter)) for letter in "ACDEFGHIKLMNPQRSTVWY"}


_SDF_FIELDS = (
    *("rank", "votes", "logprob", "per_token", "removed_mass", "inchikey", "formula"),
    *("mw", "logp", "tpsa", "qed", "fsp3", "built"),
)


def write_sdf(row: Mapping[str, Any]) -> str:
    """Return SDF records of the molecules of a row: the molecule, the reactants or the linkers.

    Coordinates are of the drawing: two-dimensional, no conformer was computed.
    """
    parts = row.get("reactants") or row.get("linkers") or ([row] if "smiles" in row else [])
    out: list[str] = []
    for number, part in enumerate(parts, 1):
        molecule = read_molecule(str(part["smiles"]), "row")
        rdDepictor.Compute2DCoords(molecule)
        name = f"row {row['rank']}" + (f" part {number}" if len(parts) > 1 else "")
        molecule.SetProp("_Name", name)
        fields = {"smiles": str(part["smiles"])}
        fields.update({key: str(row[key]) for key in _SDF_FIELDS if key in row})
        fields.update({key: str(part[key]) for key in _SDF_FIELDS if key in part})
        if "reaction" in row:
            fields["reaction"] = str(row["reaction"])
        body = "".join(f"> <{key}>\n{_one_line(value)}\n\n" for key, value in fields.items())
        out.append(f"{Chem.MolToMolBlock(molecule)}{body}$$$$\n")
    return "".join(out)


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text)[:2_000] or "-"


_METAL = re.compile(r"\[(\d*)([A-Z][a-z]?)([^\[\]]*)\]")
_NON_METALS = frozenset(
    (
        *("H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "As", "Se"),
        *("Br", "Te", "I", "He", "Ne", "Ar", "Kr", "Xe", "Rn", "At", "Ts", "Og"),
    )
)


def dotted_node(text: str) -> tuple[str, bool]:
    """Put the dots back into a metal node, and say whether it names a metal.

    `[O][Zn][Zn]` parses as a chain of metal-metal bonds that does not exist, so a node is shown as
    separate atoms and never parsed as one molecule.
    """
    atoms = list(_METAL.finditer(text.replace(".", "")))
    if "".join(found[0] for found in atoms) != text.replace(".", ""):
        return text, False
    table = Chem.GetPeriodicTable()
    symbols = [found[2] for found in atoms]
    known = all(_number(table, symbol) > 0 for symbol in symbols)
    metal = any(symbol not in _NON_METALS for symbol in symbols)
    return ".".join(found[0] for found in atoms), known and metal


def _number(table: object, symbol: str) -> int:
    try:
        return int(table.GetAtomicNumber(symbol))  # type: ignore[attr-defined]
    except RuntimeError:
        return 0


def warm_up() -> None:
    """Run every code path once, so that no file is read and nothing is imported later."""
    capture_log()
    molecule = Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)[O-].[Na+]")
    describe(molecule)
    find_molecule("CC(C)(C)(C)C")
    find_molecule("C[Xx]")
    find_molecule("c1cccc1")
    neutral_parent(Chem.GetMolFrags(molecule, asMols=True)[0])
    residue_smiles()
    dotted_node("[O][Zn][Zn]")
