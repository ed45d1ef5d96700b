"""Raw prompts: tagged text from somebody who writes the grammar, read into typed inputs.

A raw prompt has no way of its own to the model. It is parsed, refused where it is no prompt of its
task, and taken apart into what a user could have typed; from there on it is checked, screened and
written like any other input. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airgap.science.grammar import Chain, Molecule, parse_prompt
from airgap.science.refusals import PromptError
from airgap.science.tasks import Task

BESIDE = ("fix", "level")
"""Inputs that may stand beside a raw prompt; everything else is in it."""


def notes(inputs: Mapping[str, Any]) -> list[str]:
    """Return what must be said about inputs that hold a raw prompt."""
    if "prompt" not in inputs:
        return []
    return ["raw prompt: read by the grammar, and written again from what it holds"]


def typed(task: Task, inputs: Mapping[str, Any], residues: Mapping[str, str]) -> dict[str, Any]:
    """Return the inputs that say the same as the raw prompt in `inputs`.

    Args:
        task: Its task.
        inputs: Already checked against the task, `prompt` among them.
        residues: The SMILES of each residue letter, for a pocket at level 3.

    Raises:
        PromptError: The text is no prompt of this task, with byte offset and caret; or an input
            stands beside it that belongs to typed input.

    """
    beside = {name: value for name, value in inputs.items() if name != "prompt"}
    if odd := [name for name in beside if name not in BESIDE]:
        raise PromptError(
            "prompt.input",
            f"a raw prompt holds everything: {', '.join(odd)} cannot stand beside it",
            hint="say it in the prompt, or give the sequence or structure in place of the prompt",
        )
    text = str(inputs["prompt"]).rstrip("\r\n")  # files and pipes end in a line end
    subject, _ = parse_prompt(text, task.name, level=inputs.get("level", 2))
    match subject:
        case Molecule(smiles):
            return {**beside, "smiles": smiles}
        case Chain():
            spelled = {smiles: letter for letter, smiles in residues.items()}
            deep = beside.get("level") == 3  # noqa: PLR2004 - levels 1 to 3
            letters = [
                _letter(residue.text, spelled) if deep and residue.pocket else residue.text
                for residue in subject.residues
            ]
            marked = ",".join(str(at + 1) for at in subject.pockets)
            pocket = {"residues": marked} if marked else {}
            return {**beside, "sequence": "".join(letters), **pocket}
        case _:
            return beside


def _letter(smiles: str, spelled: Mapping[str, str]) -> str:
    if smiles not in spelled:
        raise PromptError(
            "prompt.g09",
            f"{smiles!a:.120} is not the SMILES of a residue as it is written here",
            hint="level 3 takes the free amino acid as canonical SMILES, such as NCC(=O)O for G; "
            "or give letters at level 2",
        )
    return spelled[smiles]
