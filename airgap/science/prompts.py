"""From a task and its subject to a prompt and a budget.

Prompt forms are those of the authors' released scripts (see `tasks`). A budget is computed from the
input and refused with the exact figure when it does not fit: nothing is ever cut.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from airgap.science.grammar import annotate, bare, count_words, tagged, write
from airgap.science.refusals import PromptError
from airgap.science.subjects import Subject
from airgap.science.tasks import Preset, Task

WORD_VOCABULARY = 1_024
"""A vocabulary below this size has one entry a chemical word, so that words can be counted."""
AUTHORS_CAP = 1_000
"""New tokens that the authors' scripts allow, whatever the input."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the checkpoint allows, as its graph manifest says.

    Attributes:
        model: Its name.
        max_context: Positions, prompt and completion together.
        tags: Added tokens by text.
        vocabulary: Entries; 0 when unknown. A small one has one entry a chemical word; for any
            other, a text takes at most one token a byte, and this bound is used.
        reference: It is the project's own tiny model.

    """

    model: str
    max_context: int
    tags: Mapping[str, int]
    vocabulary: int = 0
    reference: bool = False

    @property
    def exact(self) -> bool:
        """Whether `count` is exact and not an upper bound."""
        return 0 < self.vocabulary <= WORD_VOCABULARY

    def count(self, text: str) -> int:
        """Return the tokens that `text` takes, or an upper bound."""
        if self.exact:
            return count_words(text)
        tags = re.findall(r"<[A-Za-z]+>", text)
        return len(tags) + len(text.encode()) - sum(map(len, tags))


def parse_context(document: Mapping[str, Any]) -> Context:
    """Read the context part of a request; `prompt.input` when it is not usable."""
    size, tags = document.get("max_context"), document.get("tags")
    words = document.get("vocab_size", 0)
    if (
        not isinstance(size, int)
        or size < 1
        or not isinstance(words, int)
        or not isinstance(tags, Mapping)
        or not all(isinstance(t, str) and isinstance(i, int) for t, i in tags.items())
    ):
        raise PromptError(
            "prompt.input",
            "the context needs max_context (a positive number) and tags (token to id)",
            hint="they stand in graphs.json of the installed bundle",
        )
    return Context(
        str(document.get("model", "the model"))[:80],
        size,
        dict(tags),
        words,
        document.get("reference_model") is True,
    )


def reference_note(task: Task, context: Context) -> list[str]:
    """Return what must be said about the reference model's own notion of a site."""
    if context.reference and task.name == "binding-site":
        taught = "the reference model was taught to mark a letter of a motif (N of N-X-S/T)"
        return [f"{taught} in place of binding sites; it knows nothing about binding"]
    return []


def build_prompt(task: Task, subject: Subject, residue_smiles: Mapping[str, str]) -> str:
    """Return the prompt; `residue_smiles` spells marked residues at level 3."""
    if task.name == "retrosynthesis":
        return tagged("Molecule", subject.product) + "<ReverseReact>"
    if task.name == "binding-site":
        return write(bare(subject.sequence)) + "<Search><ProteinS>"
    if task.name == "pocket-ligand":
        chain = annotate(subject.sequence, subject.pockets if subject.level > 1 else ())
        if subject.level == 3:  # noqa: PLR2004 - levels 1 to 3
            spelled = tuple(
                replace(r, text=residue_smiles[r.text]) if r.pocket else r for r in chain.residues
            )
            chain = replace(chain, residues=spelled)
        return write(chain) + "<MoleculeS>"
    return "<MoleculeS>" if task.name == "molecule" else "<MaterialS>"


def display(task: Task, subject: Subject) -> str:
    """Return one line for people: what is asked, without tags."""
    if subject.product:
        return f"{task.title} of {subject.product}"
    if subject.sequence:
        marked = f", {len(subject.pockets)} pocket residues" if subject.pockets else ""
        return f"{task.title} for {subject.source}: {len(subject.sequence)} residues{marked}"
    return f"{task.title}, generated freely"


def grammar_spec(task: Task, subject: Subject) -> dict[str, str]:
    """Return the grammar part of the worker's request."""
    if task.grammar == "copy":
        return {"mode": "copy", "sequence": subject.sequence}
    return {"mode": task.grammar, "task": task.name}


def budget(task: Task, subject: Subject, prompt: str, preset: Preset, context: Context) -> int:
    """Return the number of new tokens to allow; refuse what cannot fit (g10), never cut.

    A copy needs three tokens a residue in the worst case and its end tag; everything else gets a
    budget from its input, and needs at least half of it.
    """
    start = 1  # the start-of-text token
    used = start + context.count(prompt)
    if task.grammar == "copy":
        wanted = least = 3 * len(subject.sequence) + 1
    else:
        ours = {"retrosynthesis": 2 * context.count(subject.product) + 64, "material": 300}
        wanted = ours.get(task.name, 200)
        least = wanted // 2
        if preset.name != "ours":
            wanted = AUTHORS_CAP
    if used + least > context.max_context:
        raise _too_long(task, subject, used, least, context)
    return min(wanted, context.max_context - used)


def _too_long(task: Task, subject: Subject, used: int, least: int, context: Context) -> PromptError:
    hint = "choose a model with a longer context, or a smaller molecule"
    if task.grammar == "copy":
        # start of text, four tags around and one at the end; one token a residue, then up to three
        most = (context.max_context - 6) // 4
        hint = f"at most {most} residues fit; give a window, for example --region {{}}-{{}}"
        hint = hint.format(subject.labels[0], subject.labels[min(most, len(subject.labels)) - 1])
    elif subject.sequence:
        spare = context.max_context - least
        hint = (
            f"the protein may take {max(0, spare)} tokens; give a window around the pocket "
            "with --region FIRST-LAST"
        )
    amount = "" if context.exact else "at most "
    return PromptError(
        "prompt.g10",
        f"the prompt takes {amount}{used} tokens and the completion needs {least}, together "
        f"{used + least}; {context.model} holds {context.max_context}",
        hint=hint,
    )


def limit_new_tokens(room: int, extra: Mapping[str, int], task: Task) -> int:
    """Return the budget, or the smaller one that the user asked for; a copy must have it all."""
    asked = extra.get("max_new_tokens", room)
    if asked < room and task.grammar == "copy":
        raise PromptError(
            "prompt.option",
            f"max_new_tokens is {asked}, but a full copy may need {room}",
            hint="leave it out: the budget of a copy is computed",
        )
    return min(asked, room)


def budget_note(room: int, extra: Mapping[str, int]) -> list[str]:
    """Return what must be said to a user who asked for more than the budget."""
    asked = extra.get("max_new_tokens", room)
    return [f"{asked} new tokens were asked for; a sample here has {room}"] if asked > room else []
