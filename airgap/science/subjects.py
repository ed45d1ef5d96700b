"""What a run is about: the inputs of a task, read and checked.

A user gives a SMILES, a FASTA file, a sequence or a structure. Letters are refused rather than
mended without being asked, and residues are named as people name them.

Standard library only. Chemistry and structures are read in the sealed helper, which calls this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from airgap.science.fields import RESIDUES, check_field, check_residues
from airgap.science.refusals import PromptError
from airgap.science.tasks import Task

STRUCTURE_LIMIT = 12 * 1024 * 1024
"""Largest structure file in characters; the channel to the helper takes 16 MiB."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run is about, once the input has been read.

    Attributes:
        product: Canonical SMILES, for retrosynthesis.
        sequence: Residue letters, for the two protein tasks.
        labels: A name for each residue, for people: a number, or chain and number of a structure.
        pockets: Zero-based indices of residues that are marked in the prompt.
        level: 1 bare protein, 2 marked residues as letters, 3 as SMILES.
        source: Where the sequence came from, in words.

    """

    product: str = ""
    sequence: str = ""
    labels: tuple[str, ...] = ()
    pockets: tuple[int, ...] = ()
    level: int = 1
    source: str = ""


def check_inputs(task: Task, inputs: Mapping[str, Any]) -> None:
    """Refuse unknown, missing, contradictory or mistyped inputs (`prompt.input`).

    Every task takes a raw `prompt` in place of its own inputs; see `raw.py`.
    """
    main = sorted({name for group in task.inputs for name in group})
    known = {*main, *task.optional, "prompt"}
    wanted = " or ".join(f"--{name}" for group in task.inputs for name in group) or "no input"
    for name, value in inputs.items():
        if name not in known:
            raise PromptError(
                "prompt.input",
                f"{task.name} takes no input {name[:40]!a}",
                expected=sorted(known),
                hint=f"{task.name} needs {wanted}",
            )
        kind = {"fix": bool, "record": int, "level": int}.get(name, str)
        if type(value) is not kind:
            raise PromptError(
                "prompt.input",
                f"input {name} is a {type(value).__name__}, not a {kind.__name__}",
                hint=f"{task.name} needs {wanted}",
            )
    given = [name for name in (*main, "prompt") if name in inputs]
    if len(given) > 1 or (main and not given):
        found = f"found {' and '.join(given)}" if given else "found none"
        raise PromptError(
            "prompt.input",
            f"{task.name} takes one of: {', '.join((*main, 'prompt'))}; {found}",
            hint=wanted,
        )


def read_sequence(inputs: Mapping[str, Any], notes: list[str]) -> tuple[str, tuple[str, ...], str]:
    """Read `fasta` or `sequence` and return residues, labels and the source in words.

    Letters in lower case, gaps and stop signs are refused, or mended and noted with `fix`.
    """
    if "fasta" in inputs:
        text, source = _fasta_record(inputs["fasta"], inputs.get("record"))
    else:
        text, source = str(inputs["sequence"]), "sequence"
    check_field(text, "sequence")
    plain = re.sub(r"[\s\d]", "", text) if "fasta" in inputs else "".join(text.split())
    if inputs.get("fix"):
        mended = re.sub(r"[-.*]", "", plain.upper())
        if mended != plain:
            notes.append("as asked, the sequence was upper-cased and freed of gaps and stop signs")
        plain = mended
    notes.extend(check_residues(plain))
    return plain, tuple(str(at + 1) for at in range(len(plain))), source


def _fasta_record(text: str, record: int | None) -> tuple[str, str]:
    if len(text) > STRUCTURE_LIMIT:
        raise PromptError("prompt.size", "the FASTA file is too large", hint="give one record")
    # Editors on three systems write a byte order mark and three kinds of line end.
    text = re.sub(r"\r\n?", "\n", text.removeprefix("\ufeff")).lstrip()
    if not text.startswith(">"):
        return text, "sequence"
    records = [part.partition("\n") for part in re.split(r"(?m)^>", text[1:])]
    if record is None and len(records) > 1:
        raise PromptError(
            "prompt.input",
            f"the FASTA file holds {len(records)} records, expected one",
            hint="choose one: --record 1 is the first",
        )
    number = 1 if record is None else record
    if not 1 <= number <= len(records):
        raise PromptError(
            "prompt.input",
            f"record {number} does not exist: the FASTA file holds {len(records)}",
            hint=f"choose 1 to {len(records)}",
        )
    head, _, body = records[number - 1]
    words = head.split()
    name = re.sub(r"[^\w.|:/+-]", "?", words[0])[:60] if words else f"record {number}"
    return body, f"FASTA record {name}"


def select(text: str, labels: Sequence[str], what: str) -> list[int]:
    """Return the indices that a list such as `12,45-48` names, each label once, in order.

    Raises:
        PromptError: `prompt.input` for a malformed list or a label that does not exist.

    """
    place = {label: at for at, label in enumerate(labels)}
    for at, label in enumerate(labels):  # the chain may be left out: all labels are of one chain
        place.setdefault(label.rpartition(":")[2], at)
    shown = f"{labels[0]} to {labels[-1]}" if labels else "none"
    found: set[int] = set()
    for part in text.replace(";", ",").split(","):
        match = re.fullmatch(
            r"\s*([\w:]*?-?\d+[A-Za-z]?)(?:\s*-\s*([\w:]*?-?\d+[A-Za-z]?))?\s*", part
        )
        if match is None:
            raise PromptError(
                "prompt.input",
                f"{what} {part[:40]!a} is not a residue or a range",
                hint="write them as 12,45-48",
            )
        ends = [place.get(label) for label in (match[1], match[2] or match[1])]
        if ends[0] is None or ends[1] is None or ends[0] > ends[1]:
            raise PromptError(
                "prompt.input",
                f"{what} {part.strip()[:40]!a} is not among the residues of the chain",
                hint=f"the residues are {shown}",
            )
        found.update(range(ends[0], ends[1] + 1))
    return sorted(found)


def cut_region(subject: Subject, region: str) -> Subject:
    """Return the part of the protein that `region`, one range of labels, names."""
    chosen = select(region, subject.labels, "region")
    start, end = chosen[0], chosen[-1] + 1
    if end - start != len(chosen):
        raise PromptError("prompt.input", "region is not one range", hint="write it as 1-120")
    return replace(
        subject,
        sequence=subject.sequence[start:end],
        labels=subject.labels[start:end],
        pockets=tuple(at - start for at in subject.pockets if start <= at < end),
        source=f"{subject.source}, {subject.labels[start]} to {subject.labels[end - 1]}",
    )


def choose_level(task: Task, subject: Subject, level: int | None, notes: list[str]) -> Subject:
    """Return the subject at the level asked for; a marked pocket is level 2 if none is."""
    if task.name != "pocket-ligand":
        return subject
    if level is None:
        level = 2 if subject.pockets else 1
    if level not in (1, 2, 3):
        raise PromptError(
            "prompt.input",
            f"level is {level}, expected 1 (bare), 2 (marked letters) or 3 (marked SMILES)",
            hint="leave it out",
        )
    if level > 1 and not subject.pockets:
        raise PromptError(
            "prompt.input",
            "no pocket residue is given or left in the region",
            hint="name them with --residues, or give a structure with --ligand",
        )
    odd = sorted({subject.sequence[at] for at in subject.pockets} - set(RESIDUES))
    if level == 3:  # noqa: PLR2004 - levels 1 to 3
        if odd:
            raise PromptError(
                "prompt.input",
                f"residues {' '.join(odd)} of the pocket have no SMILES",
                hint="use --level 2",
            )
        notes.append(
            "level 3: the authors do not publish the form of the residue SMILES; free acid"
        )
    notes.append(f"pocket level {level}; the authors' own level is not published")
    return replace(subject, level=level, pockets=subject.pockets if level > 1 else ())
