"""Hazard screen inside the sealed helper: is a molecule on a public list, or in a family of one?

Obeys docs/design/policy.md, 11: a documented, repeatable check that holds a run for named
reviewers. It is no claim of safety. The packs hold the Annex on Chemicals of the Chemical Weapons
Convention and the precursors of the Australia Group as their texts define them: names become the
first block of an InChIKey, and families become a core with the carbon counts that the paragraph
allows. Nothing beyond those paragraphs is shipped. The core of a Schedule 1 family in a molecule
that its paragraph leaves out is a resemblance: tier H1, noted for review, never held.

Every molecule is brought to one form first, because a salt, an isotope label, a mixture or a charge
would otherwise hide it: metals cut off, charges on neighbours and acids neutralised, isotopes and
stereo taken away, each fragment apart, canonical tautomer. The treaty covers labelled and
stereoisomeric forms alike. Whatever goes wrong gives `incomplete`, which holds.
"""

from __future__ import annotations

import datetime as dt
import itertools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rdkit import Chem
from rdkit.Chem import rdinchi
from rdkit.Chem.MolStandardize import rdMolStandardize

from airgap.science.packs import read_pack

PACK_FOLDER = Path(__file__).parent / "screen_packs"
PACKS_LIMIT = 16
ATOM_LIMIT = 500
FRAGMENT_LIMIT = 40
MATCH_LIMIT = 500
SECONDS = 60.0
"""Time for one call of the screen."""
REJOIN_LIMIT = 6
"""Elements of anions that are tried on a cation."""
_NON_METALS = frozenset({5, 6, 7, 8, 9, 14, 15, 16, 17, 33, 34, 35, 53})
NEAR = "near."
"""Begins the name of a resemblance."""

# An output of a retrosynthesis is a step of the route: a treaty chemical there counts as a target,
# the bulk chemicals of the Australia Group do not.
_BULK = re.compile(r"ag\d\d(?:\.listed)?")


@dataclass(frozen=True, slots=True)
class Listed:
    """A chemical that the Annex names: the first block of its InChIKey and its atoms by element."""

    paragraph: str
    tier: str
    block: str
    atoms: str


@dataclass(frozen=True, slots=True)
class Group:
    """What may hang on one core atom: a saturated hydrocarbon of so many carbons; 0 is hydrogen."""

    low: int
    high: int
    rings: bool


@dataclass(frozen=True, slots=True)
class Family:
    """A family of one paragraph.

    Attributes:
        cores: SMARTS, any of which may match.
        whole: The core and its groups are the entire molecule; else the core may stand in any.
        groups: Groups by map number of the core atom that bears them.
        exempt: First InChIKey blocks that the paragraph takes out.

    """

    paragraph: str
    tier: str
    cores: tuple[Chem.Mol, ...]
    whole: bool
    groups: Mapping[int, tuple[Group, ...]]
    exempt: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pack:
    """A screen pack; `digest` is over the bytes of its file; `reviewed_on` None: nobody did."""

    name: str
    version: int
    digest: str
    source: str
    source_date: dt.date
    author: str
    reviewer: str
    reviewed_on: dt.date | None
    listed: tuple[Listed, ...]
    families: tuple[Family, ...]


@dataclass(frozen=True, slots=True)
class ScreenResult:
    """Outcome of one screen, for policy and the restricted log; users see a reference only."""

    status: str
    tier: str
    pack: str
    mode: str
    classes: tuple[str, ...] = ()
    reason: str = ""
    target_tier: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "status": self.status,
            "tier": self.tier,
            "pack": self.pack,
            "mode": self.mode,
            "classes": list(self.classes),
            "reason": self.reason,
            "target_tier": self.target_tier,
        }


# -- the pack -------------------------------------------------------------------------------------


def parse_pack(raw: bytes) -> Pack:
    """Read a pack from bytes and build its patterns; ValueError for anything that is not one."""
    document = read_pack(raw)
    return Pack(
        name=document["name"],
        version=document["version"],
        digest=f"sha256:{sha256(raw).hexdigest()}",
        source=document["source"],
        source_date=document["source_date"],
        author=document["author"],
        reviewer=document["reviewer"],
        reviewed_on=document.get("reviewed_on"),
        listed=tuple(
            Listed(entry["paragraph"], entry["tier"], entry["block"], entry["atoms"])
            for entry in document.get("listed", ())
        ),
        families=tuple(_family(entry) for entry in document.get("family", ())),
    )


def load_packs(paths: Iterable[Path] = ()) -> tuple[Pack, ...]:
    """Read the packs that are shipped and those of a site, which can only add.

    Raises:
        ValueError: One is no pack, two have one name, or there are too many.

    """
    shipped = sorted(PACK_FOLDER.glob("*.toml"))
    files = [*shipped, *itertools.islice(paths, PACKS_LIMIT + 1)]
    if len(files) > PACKS_LIMIT:
        raise ValueError(f"more than {PACKS_LIMIT} screen packs")
    packs = tuple(parse_pack(path.read_bytes()) for path in files)
    if len({pack.name for pack in packs}) != len(packs):
        raise ValueError("two screen packs have one name")
    return packs


def _family(entry: Mapping[str, Any]) -> Family:
    cores = tuple(Chem.MolFromSmarts(core) for core in entry["cores"])
    if any(core is None for core in cores):
        raise ValueError(f"family {entry['paragraph']!r:.60} has a core that is no SMARTS")
    return Family(
        paragraph=entry["paragraph"],
        tier=entry["tier"],
        cores=cores,
        whole=entry["whole"],
        groups={
            int(number): tuple(_group(text) for text in texts)
            for number, texts in entry.get("groups", {}).items()
        },
        exempt=frozenset(entry.get("exempt", ())),
    )


def _group(text: str) -> Group:
    size, _, rings = text.partition(" ")
    low, high = size.split("-")
    return Group(int(low), int(high), rings == "rings")


# -- screening ------------------------------------------------------------------------------------


class Screener:
    """Screens molecules against packs; a call that needs more than `seconds` is incomplete."""

    def __init__(self, *packs: Pack, seconds: float = SECONDS) -> None:
        if not packs:
            raise ValueError("no screen pack: nothing could be found")
        self.packs = packs
        self._listed: dict[str, list[Listed]] = {}
        for entry in (entry for pack in packs for entry in pack.listed):
            self._listed.setdefault(entry.atoms, []).append(entry)
        self._families = tuple(family for pack in packs for family in pack.families)
        self._seconds = seconds
        self._uncharger = rdMolStandardize.Uncharger()
        self._disconnector = rdMolStandardize.MetalDisconnector()
        self._tautomers = rdMolStandardize.TautomerEnumerator()
        self._tautomers.SetMaxTautomers(200)
        self._tautomers.SetMaxTransforms(400)

    @property
    def digest(self) -> str:
        """What stands for the packs in records: the digest of one, or of the list of digests."""
        if len(self.packs) == 1:
            return self.packs[0].digest
        joined = "\n".join(sorted(pack.digest for pack in self.packs))
        return f"sha256:{sha256(joined.encode()).hexdigest()}"

    @property
    def mode(self) -> str:
        """What this screen looks at, for records and reports."""
        names = "+".join(f"{pack.name}/{pack.version}" for pack in self.packs)
        return f"{names:.120}; structures only, sequences not screened"

    def screen(
        self, molecules: Iterable[Chem.Mol], *, target: bool = False, route: bool = False
    ) -> ScreenResult:
        """Screen molecules and return the highest tier.

        Args:
            molecules: Sanitised or not.
            target: They are products for which a route is asked: anything from H2 up counts as H3.
            route: They are steps of such a route. What the treaty names counts as a target too.

        """
        deadline = time.monotonic() + self._seconds
        found: dict[str, str] = {}
        reason = ""
        for molecule in molecules:
            if time.monotonic() > deadline:
                reason = "time"
                break
            try:
                found.update(self.find_classes(molecule))
            except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
                reason = f"standardisation failed: {type(error).__name__}"
        tier = max(found.values(), default="H0")
        steps = [found[name] for name in found if not _BULK.fullmatch(name)]
        toward = tier if target else max(steps, default="H0") if route else None
        if target and tier == "H2":
            tier = "H3"
        return ScreenResult(
            status="incomplete" if reason else "complete",
            tier=tier,
            pack=self.digest,
            mode=self.mode,
            classes=tuple(sorted(found)),
            reason=reason,
            target_tier=toward,
        )

    def nothing(self, why: str) -> ScreenResult:
        """Return the result for a run that has no structure to screen; `why` goes into the mode."""
        return ScreenResult("complete", "H0", self.digest, f"{self.mode}; {why}")

    def incomplete(self, reason: str) -> ScreenResult:
        """Return a result that holds."""
        return ScreenResult("incomplete", "H0", self.digest, self.mode, (), reason)

    def find_classes(self, molecule: Chem.Mol) -> dict[str, str]:
        """Return the classes that match, with tiers; ValueError for what is too large to judge."""
        if not can_screen(molecule):
            raise ValueError("too many atoms or fragments")
        found: dict[str, str] = {}
        for form in self.forms(molecule):
            found.update(self._match(form))
        return found

    def forms(self, molecule: Chem.Mol) -> list[Chem.Mol]:
        """Return the standard form of each fragment, and its tautomer where it matters."""
        plain = _neutral_pairs(_plain(molecule))
        parts: list[Chem.Mol] = []
        for whole in (plain, *_rejoined(plain)):
            apart = self._disconnector.Disconnect(whole)
            parts += Chem.GetMolFrags(apart, asMols=True, sanitizeFrags=False)
        forms: dict[str, Chem.Mol] = {}
        for part in parts:
            form = _plain(self._uncharger.uncharge(part))
            forms[Chem.MolToSmiles(form)] = form
            if self._needs_tautomer(form):
                other = _plain(self._tautomers.Canonicalize(form))
                forms[Chem.MolToSmiles(other)] = other
        return list(forms.values())

    def _needs_tautomer(self, form: Chem.Mol) -> bool:
        # Slow, so only where a listed chemical has these atoms, or a family could be hidden.
        hidden = any(atom.GetAtomicNum() in {15, 33} for atom in form.GetAtoms())
        return (hidden or composition(form) in self._listed) and _is_clean(form)

    def _match(self, form: Chem.Mol) -> dict[str, str]:
        block = ""
        found: dict[str, str] = {}
        if entries := self._listed.get(composition(form), ()):
            block = first_block(form)
            for entry in entries:
                if entry.block == block:
                    found[f"{entry.paragraph}.listed"] = entry.tier
        for family in self._families:
            fit = _fit_family(form, family)
            if not fit or (
                family.exempt and (block := block or first_block(form)) in family.exempt
            ):
                continue
            if fit == _INSIDE:
                found[family.paragraph] = family.tier
            elif family.tier == "H3":
                found[f"{NEAR}{family.paragraph}"] = "H1"
        return found


def can_screen(molecule: Chem.Mol) -> bool:
    """Return whether the molecule is small enough for every step of the screen."""
    small = molecule.GetNumHeavyAtoms() <= ATOM_LIMIT and molecule.GetNumAtoms() <= 3 * ATOM_LIMIT
    return small and len(Chem.GetMolFrags(molecule)) <= FRAGMENT_LIMIT


def first_block(molecule: Chem.Mol) -> str:
    """Return the first block of the InChIKey: skeleton and hydrogens, nothing else."""
    return str(rdinchi.MolToInchiKey(molecule)).partition("-")[0]


def composition(molecule: Chem.Mol) -> str:
    """Return the heavy atoms by element, for example `C4 O2 P1`."""
    counts: dict[str, int] = {}
    for atom in molecule.GetAtoms():
        if atom.GetAtomicNum() > 1:
            counts[atom.GetSymbol()] = counts.get(atom.GetSymbol(), 0) + 1
    return " ".join(f"{symbol}{number}" for symbol, number in sorted(counts.items()))


def _is_clean(molecule: Chem.Mol) -> bool:
    return not Chem.DetectChemistryProblems(molecule)


def _plain(molecule: Chem.Mol) -> Chem.Mol:
    """Return a copy without maps, isotopes, stereo and hydrogens; broken valences are kept."""
    copy = Chem.Mol(molecule)
    for atom in copy.GetAtoms():
        atom.SetAtomMapNum(0)
        atom.SetIsotope(0)
    Chem.RemoveStereochemistry(copy)
    copy.UpdatePropertyCache(strict=False)
    if _is_clean(copy):
        Chem.SanitizeMol(copy)
        _fill_valences(copy)
        copy = Chem.RemoveHs(copy)
    else:
        copy = Chem.RemoveHs(copy, sanitize=False)
        copy.UpdatePropertyCache(strict=False)
        Chem.FastFindRings(copy)
    return copy


def _fill_valences(molecule: Chem.Mol) -> None:
    """Give hydrogens to atoms that were written without them, such as `[P]` for `[PH]`."""
    for atom in molecule.GetAtoms():
        open_shell = atom.GetNumRadicalElectrons() and atom.GetFormalCharge() <= 0
        if open_shell and atom.GetAtomicNum() in _NON_METALS:
            atom.SetNumRadicalElectrons(0)
            atom.SetNoImplicit(False)
    molecule.UpdatePropertyCache(strict=False)


def _rejoined(molecule: Chem.Mol) -> list[Chem.Mol]:
    """Return the molecule with ions put back together that are no salt: `O=[P+](Cl)Cl.[Cl-]`.

    A cation of carbon, phosphorus, sulfur or arsenic with a free valence is bonded to an anion of
    the mixture; there is one result for each element that the anions may be of.
    """
    cations = [atom.GetIdx() for atom in molecule.GetAtoms() if _wants_anion(atom)]
    anions: dict[str, list[int]] = {}
    for atom in molecule.GetAtoms() if cations else ():
        if atom.GetFormalCharge() < 0 and all(
            n.GetFormalCharge() <= 0 for n in atom.GetNeighbors()
        ):
            anions.setdefault(atom.GetSymbol(), []).append(atom.GetIdx())
    found = []
    for symbol in sorted(anions)[:REJOIN_LIMIT]:
        edit = Chem.RWMol(molecule)
        for one, two in zip(cations, anions[symbol], strict=False):
            edit.AddBond(one, two, Chem.BondType.SINGLE)
            for at, change in ((one, -1), (two, 1)):
                atom = edit.GetAtomWithIdx(at)
                atom.SetFormalCharge(atom.GetFormalCharge() + change)
        found.append(_plain(edit.GetMol()))
    return found


def _wants_anion(atom: Chem.Atom) -> bool:
    return (
        atom.GetFormalCharge() > 0
        and atom.GetAtomicNum() in {6, 15, 16, 33}
        and atom.GetTotalNumHs() == 0
        and atom.GetDegree() < (3 if atom.GetAtomicNum() == 16 else 4)  # noqa: PLR2004 - sulfur
        and all(other.GetFormalCharge() >= 0 for other in atom.GetNeighbors())
    )


def _neutral_pairs(molecule: Chem.Mol) -> Chem.Mol:
    """Write charge-separated and dative bonds on phosphorus, sulfur and arsenic as double bonds."""
    edit = Chem.RWMol(molecule)
    for bond in edit.GetBonds():
        one, two = bond.GetBeginAtom(), bond.GetEndAtom()
        if bond.GetBondType() == Chem.BondType.DATIVE and two.GetAtomicNum() in {8, 16}:
            bond.SetBondType(Chem.BondType.DOUBLE)
            continue
        if one.GetFormalCharge() < 0:
            one, two = two, one
        if (
            bond.GetBondType() == Chem.BondType.SINGLE
            and one.GetAtomicNum() in {15, 16, 33}
            and one.GetFormalCharge() > 0 > two.GetFormalCharge()
        ):
            bond.SetBondType(Chem.BondType.DOUBLE)
            one.SetFormalCharge(one.GetFormalCharge() - 1)
            two.SetFormalCharge(two.GetFormalCharge() + 1)
    return _plain(edit.GetMol())


_INSIDE, _NEAR = 2, 1


def _fit_family(form: Chem.Mol, family: Family) -> int:
    """Return `_INSIDE` for a member, `_NEAR` where only the core is there, 0 for neither."""
    near = 0
    for core in family.cores:
        if not family.whole:
            if form.HasSubstructMatch(core):
                return _INSIDE
            continue
        numbers = [atom.GetAtomMapNum() for atom in core.GetAtoms()]
        places = form.GetSubstructMatches(core, uniquify=False, maxMatches=MATCH_LIMIT)
        if any(_is_whole(form, place, numbers, family.groups) for place in places):
            return _INSIDE
        near = near or _NEAR * bool(places)
    return near


def _is_whole(
    form: Chem.Mol,
    place: Sequence[int],
    numbers: Sequence[int],
    allowed: Mapping[int, Sequence[Group]],
) -> bool:
    """Return whether the core at `place` and its allowed groups make up the entire molecule."""
    core = set(place)
    seen = set(place)
    for index, number in zip(place, numbers, strict=True):
        sizes: list[tuple[int, bool]] = []
        for bond in form.GetAtomWithIdx(index).GetBonds():
            other = bond.GetOtherAtomIdx(index)
            if other in core:
                continue
            if bond.GetBondType() != Chem.BondType.SINGLE or other in seen:
                return False
            size = _alkyl(form, other, core, seen)
            if size is None:
                return False
            sizes.append(size)
        if not _fit(sizes, allowed.get(number, ()) if number else ()):
            return False
    return len(seen) == form.GetNumAtoms()


def _alkyl(form: Chem.Mol, start: int, core: set[int], seen: set[int]) -> tuple[int, bool] | None:
    """Return carbons and whether there is a ring, if a saturated hydrocarbon begins at `start`."""
    stack, carbons, rings, links = [start], 0, False, 0
    mine = {start}
    while stack:
        atom = form.GetAtomWithIdx(stack.pop())
        saturated = atom.GetAtomicNum() == 6 and atom.GetFormalCharge() == 0  # noqa: PLR2004 - carbon
        if not saturated or atom.GetIsAromatic():
            return None
        carbons += 1
        rings = rings or atom.IsInRing()
        for bond in atom.GetBonds():
            other = bond.GetOtherAtomIdx(atom.GetIdx())
            if bond.GetBondType() != Chem.BondType.SINGLE:
                return None
            if other in core:
                links += 1
            elif other not in mine:
                mine.add(other)
                stack.append(other)
    seen.update(mine)
    return (carbons, rings) if links == 1 else None


def _fit(sizes: Sequence[tuple[int, bool]], groups: Sequence[Group]) -> bool:
    """Return whether the hydrocarbons fill the groups; a group from 0 may be absent."""
    if len(sizes) > len(groups):
        return False
    padded = [*sizes, *[(0, False)] * (len(groups) - len(sizes))]
    return any(
        all(
            group.low <= carbons <= group.high and (group.rings or not rings)
            for (carbons, rings), group in zip(order, groups, strict=True)
        )
        for order in itertools.permutations(padded)
    )
