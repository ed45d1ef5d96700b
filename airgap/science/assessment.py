"""From what the model wrote to ranked rows, inside the sealed helper.

Ranking: votes (samples that give the same answer), then the summed log-likelihood of the best of
them, then the order of drawing; a retrosynthesis that hands the product back, and so answers
nothing, ranks after all that do not. A prediction with a part that cannot be parsed is invalid as a
whole; nothing is repaired to make it count. Text that could not be read is kept, and shown only if
it could be screened in some form.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rdkit import Chem

from airgap.science.completions import Completion, parse_completion
from airgap.science.fields import scan_smiles
from airgap.science.molecules import (
    Problem,
    canonical,
    describe,
    dotted_node,
    find_molecule,
    identity,
    parse_loosely,
)
from airgap.science.screens import Screener, can_screen
from airgap.science.subjects import Subject
from airgap.science.tasks import Task

TEXT_SHOWN = 2_000
"""Characters of an unreadable completion that are kept."""
INDICES_KEPT = 100
TEXT_SCREENED = 20_001
"""Characters of a new sequence that are handed on; a screener takes one less, so this one holds."""
SEQUENCES_KEPT = 1_001


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the worker sent it; `logprob` is natural, summed, unmasked."""

    index: int
    text: str
    finish_reason: str
    logprob: float
    tokens: int
    removed_mass: float
    ppl_authors: float | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """A valid completion: what makes it equal to others, its fields, and what must be screened.

    `parts` are the identities of the reactants, where there are any.
    `fields` is called once a row and not once a sample: properties cost milliseconds.
    """

    key: str
    fields: Callable[[], dict[str, Any]]
    structures: tuple[Chem.Mol, ...]
    positions: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a completion is no answer."""

    reason: str
    offset: int | None = None


def assess(
    task: Task,
    subject: Subject,
    samples: Sequence[Sample],
    screener: Screener,
    tick: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return rows, invalid completions, output screen and summary as the JSON of a reply.

    `tick` is told steps done and steps in all: reading, describing and screening, a sample each.
    """
    steps = 3 * len(samples)
    read = _READERS[task.name]
    groups: dict[str, list[tuple[Sample, _Reading]]] = {}
    invalid: list[tuple[Sample, Completion, _Fault]] = []
    for number, sample in enumerate(samples):
        tick(number, steps)
        stopped = sample.finish_reason == "stop"
        completion = parse_completion(task.name, sample.text, stopped=stopped)
        outcome = (
            read(completion, subject) if completion.complete else _unfinished(sample, completion)
        )
        if isinstance(outcome, _Fault):
            invalid.append((sample, completion, outcome))
        else:
            groups.setdefault(outcome.key, []).append((sample, outcome))
    product = identity(Chem.MolFromSmiles(subject.product)) if subject.product else ""
    ordered = sorted(
        groups.values(),
        key=lambda members: (product in members[0][1].parts, *_rank(members)),
    )
    rows = []
    for place, members in enumerate(ordered):
        tick(len(samples) + place, steps)
        rows.append(_row(place + 1, members))
    shown, loose = _show_invalid(task, invalid)
    structures = [mol for members in ordered for mol in members[0][1].structures]
    sequences = _new_sequences(task, subject, invalid)
    document: dict[str, Any] = {
        "task": task.name,
        "rows": rows,
        "invalid": shown,
        "track": _track(subject, groups) if task.name == "binding-site" else None,
        "output_screen": screener.incomplete("new sequences were not screened").document()
        if sequences
        else _screen(task, screener, _ticking([*structures, *loose], tick, steps)),
        "sequences": sequences,
        "summary": _summary(samples, rows, invalid),
        "unchecked": task.unchecked,
    }
    return document


def _rank(members: Sequence[tuple[Sample, _Reading]]) -> tuple[int, float, int]:
    best = max(sample.logprob for sample, _ in members)
    return -len(members), -best, members[0][0].index


def _row(rank: int, members: Sequence[tuple[Sample, _Reading]]) -> dict[str, Any]:
    best, reading = max(members, key=lambda member: (member[0].logprob, -member[0].index))
    return {
        "rank": rank,
        "index": best.index,
        "votes": len(members),
        "indices": [sample.index for sample, _ in members][:INDICES_KEPT],
        **_likelihood(best),
        **reading.fields(),
    }


def _likelihood(sample: Sample) -> dict[str, Any]:
    authors = sample.ppl_authors
    return {
        **({} if authors is None else {"ppl_authors": round(authors, 4)}),
        "logprob": round(float(sample.logprob), 4),
        "per_token": round(sample.logprob / sample.tokens, 4) if sample.tokens else 0.0,
        "tokens": sample.tokens,
        "removed_mass": round(float(sample.removed_mass), 6),
        "finish_reason": sample.finish_reason,
    }


def _unfinished(sample: Sample, completion: Completion) -> _Fault:
    if sample.finish_reason == "length":
        return _Fault("cut off: the budget of new tokens was used up", completion.offset)
    if sample.finish_reason == "dead_end":
        return _Fault("no legal token was left", completion.offset)
    return _Fault("does not have the form of its task", completion.offset)


# -- one reader a task ----------------------------------------------------------------------------


def _read_retrosynthesis(completion: Completion, subject: Subject) -> _Reading | _Fault:
    parts: list[tuple[str, Chem.Mol]] = []
    for number, text in enumerate(completion.molecules, 1):
        found = find_molecule(text)
        if isinstance(found, Problem):
            return _Fault(f"reactant {number} does not parse: {found.message}")
        parts.append((text, found))
    ordered = sorted(parts, key=lambda part: (-part[1].GetNumHeavyAtoms(), canonical(part[1])))
    keys = [identity(mol) for _, mol in ordered]

    def fields() -> dict[str, Any]:
        smiles = [canonical(mol) for _, mol in ordered]
        product = identity(Chem.MolFromSmiles(subject.product))
        return {
            "reactants": [
                {"smiles": text, "inchikey": key, "text": written}
                for text, key, (written, _) in zip(smiles, keys, ordered, strict=True)
            ],
            "reaction": f"{'.'.join(smiles)}>>{subject.product}",
            "handed_back": product in keys,
            "atoms_balance": _balance(subject.product, [mol for _, mol in ordered]),
        }

    return _Reading(
        " ".join(sorted(keys)), fields, tuple(mol for _, mol in ordered), parts=tuple(keys)
    )


def _balance(product: str, reactants: Iterable[Chem.Mol]) -> bool:
    """Return whether the reactants hold every heavy atom of the product."""
    need = _elements([Chem.MolFromSmiles(product)])
    have = _elements(reactants)
    return all(have[symbol] >= number for symbol, number in need.items())


def _elements(molecules: Iterable[Chem.Mol]) -> Counter[str]:
    return Counter(a.GetSymbol() for m in molecules for a in m.GetAtoms() if a.GetAtomicNum() > 1)


def _read_molecule(completion: Completion, _: Subject) -> _Reading | _Fault:
    text = completion.molecules[0] if completion.molecules else ""
    found = find_molecule(text)
    if isinstance(found, Problem):
        return _Fault(f"does not parse: {found.message}", found.at)
    return _Reading(identity(found), lambda: {"text": text, **asdict(describe(found))}, (found,))


def _read_binding_site(completion: Completion, subject: Subject) -> _Reading | _Fault:
    copied = "".join(residue.text for residue in completion.residues)
    if copied != subject.sequence:
        at = next(
            (
                n
                for n, (one, two) in enumerate(zip(copied, subject.sequence, strict=False))
                if one != two
            ),
            min(len(copied), len(subject.sequence)),
        )
        where = subject.labels[at] if at < len(subject.labels) else "the end"
        return _Fault(f"is no exact copy of the sequence: differs at {where}")
    positions = tuple(at + 1 for at, residue in enumerate(completion.residues) if residue.pocket)

    def fields() -> dict[str, Any]:
        return {
            "sites": [subject.labels[position - 1] for position in positions],
            "letters": "".join(subject.sequence[position - 1] for position in positions),
            "positions": list(positions),
        }

    return _Reading(" ".join(map(str, positions)), fields, (), positions)


def _read_material(completion: Completion, _: Subject) -> _Reading | _Fault:
    linkers: list[Chem.Mol] = []
    for number, text in enumerate(completion.molecules, 1):
        found = find_molecule(text)
        if isinstance(found, Problem):
            return _Fault(f"linker {number} does not parse: {found.message}")
        linkers.append(found)
    nodes = [(text, *dotted_node(text)) for text in completion.metals]
    for text, _dotted, named in nodes:
        if not named:
            return _Fault(f"metal node {text:.60} names no metal, or holds what is no atom")
    keys = [*sorted(text for text, _, _ in nodes), *sorted(identity(mol) for mol in linkers)]

    def fields() -> dict[str, Any]:
        described = [asdict(describe(mol)) for mol in linkers]
        names = ("smiles", "inchikey", "formula", "mw")
        return {
            "metals": [{"text": text, "node": dotted} for text, dotted, _ in nodes],
            "linkers": [{name: one[name] for name in names} for one in described],
            "built": "3D not built",
        }

    return _Reading("|".join(keys), fields, tuple(linkers))


_READERS: dict[str, Callable[[Completion, Subject], _Reading | _Fault]] = {
    "retrosynthesis": _read_retrosynthesis,
    "molecule": _read_molecule,
    "pocket-ligand": _read_molecule,
    "binding-site": _read_binding_site,
    "material": _read_material,
}


# -- what is shared -------------------------------------------------------------------------------


def _track(
    subject: Subject, groups: Mapping[str, Sequence[tuple[Sample, _Reading]]]
) -> dict[str, Any]:
    """Return votes per residue over all exact copies."""
    votes = [0] * len(subject.sequence)
    copies = 0
    for members in groups.values():
        copies += len(members)
        for position in members[0][1].positions:
            votes[position - 1] += len(members)
    return {
        "sequence": subject.sequence,
        "labels": list(subject.labels),
        "votes": votes,
        "copies": copies,
    }


def _show_invalid(
    task: Task, invalid: Sequence[tuple[Sample, Completion, _Fault]]
) -> tuple[list[dict[str, Any]], list[Chem.Mol]]:
    """Return invalid completions as JSON, and structures to screen before their text is shown.

    A text that is no molecule in any reading cannot be screened and is withheld.
    """
    shown: list[dict[str, Any]] = []
    structures: dict[str, Chem.Mol | None] = {}
    for sample, completion, fault in invalid:
        runs = _text_runs(task, sample.text)
        for run in runs:
            if run not in structures:
                structures[run] = _loose_structure(run)
        known = task.name != "binding-site" and all(structures[run] is not None for run in runs)
        shown.append(
            {
                "index": sample.index,
                "reason": fault.reason,
                "offset": fault.offset,
                "text": sample.text[:TEXT_SHOWN] if known else None,
                "remainder": completion.remainder[:TEXT_SHOWN] if known else None,
                **_likelihood(sample),
            }
        )
    return shown, [molecule for molecule in structures.values() if molecule is not None]


def _new_sequences(
    task: Task, subject: Subject, invalid: Sequence[tuple[Sample, Completion, _Fault]]
) -> list[str]:
    """Return residues that the model wrote and that are no beginning of the given sequence.

    Their text is withheld, but they are protein: without a screener for sequences they hold.
    """
    if task.name != "binding-site":
        return []
    written = (re.sub(r"<[^<>]*>", "", sample.text).strip() for sample, _, _ in invalid)
    return sorted(
        {text[:TEXT_SCREENED] for text in written if not subject.sequence.startswith(text)}
    )[:SEQUENCES_KEPT]


def _text_runs(task: Task, text: str) -> list[str]:
    """Return the runs of text outside tags that could be molecules; a copied protein has none."""
    if task.name == "binding-site":
        return []
    if task.name == "material":
        text = re.sub(r"<MetalS>[^<>]*(?:<MetalE>|$)", "<>", text)
    return [run for run in re.split(r"<[^<>]*>", text) if run.strip()]


def _loose_structure(run: str) -> Chem.Mol | None:
    """Read a run of text as a structure, mended if need be.

    None if it resists, or is too large to be screened: its text is then withheld, which is better
    than holding the whole run for one sample that ran away.
    """
    molecule = parse_loosely(run) or parse_loosely(mend(run))
    return molecule if molecule is not None and can_screen(molecule) else None


def mend(text: str) -> str:
    """Return a SMILES without open rings, open branches and half atoms, for screening only."""
    scanned = [one for one in scan_smiles(text) if one[0] != "unknown"]
    rings = Counter(piece.strip("%()") for kind, piece, _ in scanned if kind == "ring")
    out: list[str] = []
    depth = 0
    for kind, piece, _ in scanned:
        if kind == "ring" and rings[piece.strip("%()")] % 2:
            continue
        if piece == ")" and depth == 0:
            continue
        depth += {"(": 1, ")": -1}.get(piece, 0)
        out.append(piece)
    joined = "".join(out) + ")" * depth
    previous = ""
    while joined != previous:
        previous = joined
        joined = re.sub(r"[-=#$:/\\.~(]*$|\([-=#$:/\\.~]*\)", "", joined)
    return joined


def _ticking(
    structures: Sequence[Chem.Mol], tick: Callable[[int, int], None], steps: int
) -> Iterator[Chem.Mol]:
    for number, structure in enumerate(structures):
        tick(min(steps, 2 * steps // 3 + number), steps)
        yield structure


def _screen(task: Task, screener: Screener, structures: Iterator[Chem.Mol]) -> dict[str, Any]:
    if task.name == "binding-site":
        return screener.nothing("output is an exact copy of the input").document()
    return screener.screen(structures, route=task.name == "retrosynthesis").document()


def _summary(
    samples: Sequence[Sample],
    rows: Sequence[Mapping[str, Any]],
    invalid: Sequence[tuple[Sample, Completion, _Fault]],
) -> dict[str, Any]:
    n = len(samples)
    return {
        "n": n,
        "valid": n - len(invalid),
        "invalid": len(invalid),
        "unique": len(rows),
        "handed_back": sum(row["votes"] for row in rows if row.get("handed_back")),
        "finish": dict(sorted(Counter(sample.finish_reason for sample in samples).items())),
        "tokens": sum(sample.tokens for sample in samples),
        "mean_removed_mass": round(sum(s.removed_mass for s in samples) / n, 6) if n else 0.0,
    }
