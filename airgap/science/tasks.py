"""Typed tasks: what a scientist can ask for, with the settings of each.

A user never types a tag. The tasks, their prompt forms, stop tags and sampling settings are those
of the authors' released scripts and README (repository LOGOS-Hub/LOGOS, commit 66c935a); two of the
six published tasks have no script, and are refused rather than guessed.

Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from airgap.science.refusals import PromptError

SAMPLES_LIMIT = 10_000
SEED_LIMIT = 2**53 - 1
"""Largest integer that a record of the audit log, or any JSON reader, holds exactly."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling settings, every value stated.

    `valence` is the opt-in filter that forces molecules, `ppl_authors` asks for the perplexity of
    the authors' scripts beside our log-likelihood.
    """

    name: str
    n: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    valence: bool = False
    ppl_authors: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One task that a user can ask for.

    Attributes:
        name: As typed on the command line.
        title: For people.
        inputs: Groups of input names; one group must be given, whole.
        optional: Input names that may come beside.
        tokens: Tags that the checkpoint must have.
        stop: Stop tags; the end of text stops as well.
        grammar: Mode of the constraint on decoding: `structure` or `copy`.
        modality: What policy calls the output.
        presets: By name; `ours` is the default.
        unchecked: What no part of this program looks at.

    """

    name: str
    title: str
    inputs: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    tokens: tuple[str, ...]
    stop: tuple[str, ...]
    grammar: str
    modality: str
    presets: Mapping[str, Preset]
    unchecked: str


def _presets(n: int, ours: int, *, copy: bool = False, script: bool = True) -> dict[str, Preset]:
    # Top-k 50 is what the library under the authors' scripts applies without saying so.
    readme = Preset("authors-readme", n, 1.2, 0.85, 50, 1.05)
    # A penalty on repetition punishes every residue of the prompt: off where the task is a copy.
    mine = replace(readme, name="ours", n=ours, repetition_penalty=1.0 if copy else 1.05)
    found = {"ours": mine}
    if script:
        found["authors-readme"] = readme
        found["authors-script"] = replace(readme, name="authors-script", top_p=0.95)
    return found


_RETRO = _presets(32, 32)
_RETRO["authors-script"] = replace(_RETRO["authors-script"], temperature=0.7)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="retrosynthesis",
            title="Retrosynthesis",
            inputs=(("smiles",),),
            optional=("fix",),
            tokens=("<MoleculeS>", "<MoleculeE>", "<ReverseReact>"),
            stop=(),
            grammar="structure",
            modality="retrosynthesis",
            presets=_RETRO,
            unchecked="whether the reaction runs: conditions, yield, selectivity and safety; "
            "whether the reactants can be bought; whether the product would be formed again",
        ),
        Task(
            name="molecule",
            title="Molecules",
            inputs=((),),
            optional=(),
            tokens=("<MoleculeS>", "<MoleculeE>"),
            stop=("<MoleculeE>",),
            grammar="structure",
            modality="molecule",
            presets=_presets(32, 32, script=False),
            unchecked="synthesis, stability, toxicity, activity and patents; novelty against any "
            "database",
        ),
        Task(
            name="binding-site",
            title="Binding sites",
            inputs=(("fasta",), ("sequence",), ("pdb",)),
            optional=("chain", "region", "record", "fix"),
            tokens=("<ProteinS>", "<ProteinE>", "<Search>", "<PocketS>", "<PocketE>"),
            stop=("<ProteinE>",),
            grammar="copy",
            modality="annotation",
            presets=_presets(40, 40, copy=True),
            unchecked="the three-dimensional structure: the model reads the sequence only; ligand, "
            "affinity and function; the input sequence itself was not screened",
        ),
        Task(
            name="pocket-ligand",
            title="Pocket ligands",
            inputs=(("fasta",), ("sequence",), ("pdb",)),
            optional=("chain", "ligand", "residues", "region", "record", "level", "fix"),
            tokens=(
                *("<ProteinS>", "<ProteinE>", "<PocketS>", "<PocketE>"),
                *("<MoleculeS>", "<MoleculeE>"),
            ),
            stop=("<MoleculeE>",),
            grammar="structure",
            modality="molecule",
            presets=_presets(10, 10),
            unchecked="binding: nothing was docked; synthesis, stability, toxicity and patents; "
            "the input sequence itself was not screened",
        ),
        Task(
            name="material",
            title="Materials",
            inputs=((),),
            optional=(),
            tokens=(
                *("<MaterialS>", "<MaterialE>", "<MetalS>", "<MetalE>"),
                *("<MoleculeS>", "<MoleculeE>"),
            ),
            stop=("<MaterialE>",),
            grammar="structure",
            modality="molecule",
            # The authors draw 10,000; a first look does not need them.
            presets=_presets(10_000, 32),
            unchecked="3D not built: no topology, cell or coordinates; charge balance, stability "
            "and porosity; metal nodes against any library; novelty",
        ),
    )
}

UNPUBLISHED = ("protein-editing", "antibody-cdr")
ALIASES = {
    "retro": "retrosynthesis",
    "molecules": "molecule",
    "mol": "molecule",
    "sites": "binding-site",
    "site": "binding-site",
    "binding-sites": "binding-site",
    "pocket": "pocket-ligand",
    "ligand": "pocket-ligand",
    "materials": "material",
    "mof": "material",
    "antibody": "antibody-cdr",
    "cdr": "antibody-cdr",
    "protein-edit": "protein-editing",
}


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        PromptError: `prompt.task`, naming the nearest one; `prompt.unpublished` for the two tasks
            whose prompts nobody outside knows.

    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = ALIASES.get(plain, plain)
    if plain in UNPUBLISHED:
        raise PromptError(
            "prompt.unpublished",
            f"task {plain}: prompt format not published by the authors",
            hint=f"tasks with a released prompt: {', '.join(TASKS)}",
        )
    if plain in TASKS:
        return TASKS[plain]
    near = difflib.get_close_matches(plain, [*TASKS, *ALIASES, *UNPUBLISHED], n=1, cutoff=0.6)
    guess = f"did you mean {ALIASES.get(near[0], near[0])}? " if near else ""
    raise PromptError(
        "prompt.task",
        f"there is no task {name[:40]!a}",
        hint=f"{guess}tasks: {', '.join(TASKS)}",
    )


# -- settings -------------------------------------------------------------------------------------

_FLAGS = ("valence", "ppl_authors")
_NUMBERS = {int: "whole number", float: "number"}
_RANGES: dict[str, tuple[type, float, float]] = {
    "n": (int, 1, SAMPLES_LIMIT),
    "temperature": (float, 0.0, 10.0),
    "top_p": (float, 0.01, 1.0),
    "top_k": (int, 0, 1_024),
    "repetition_penalty": (float, 0.5, 5.0),
    "seed": (int, 0, SEED_LIMIT),
    "max_new_tokens": (int, 1, 1_000_000),
}


def choose_preset(task: Task, options: Mapping[str, Any]) -> tuple[Preset, dict[str, int]]:
    """Return the preset that `options` name with their changes, and `seed`/`max_new_tokens` if set.

    Raises:
        PromptError: `prompt.option` for an unknown option, type or value.

    """
    name = options.get("preset", "ours")
    if not isinstance(name, str) or name not in task.presets:
        raise PromptError(
            "prompt.option",
            f"{task.name} has no preset {_shown(name)}",
            expected=tuple(task.presets),
            hint="leave it out for `ours`",
        )
    preset = task.presets[name]
    rest: dict[str, int] = {}
    for key, value in options.items():
        if key == "preset":
            continue
        if key in _FLAGS:
            preset = _flagged(task, preset, key, value)
            continue
        if key not in _RANGES:
            raise PromptError(
                "prompt.option",
                f"there is no option {key[:40]!a}",
                expected=(*_RANGES, *_FLAGS),
                hint="leave it out",
            )
        kind, low, high = _RANGES[key]
        number = type(value) is int or (kind is float and type(value) is float)
        if not number or not low <= value <= high:  # NaN is in no range
            raise PromptError(
                "prompt.option",
                f"{key} is {_shown(value)}, expected a {_NUMBERS[kind]} from {low} to {high}",
                hint=f"leave it out for {getattr(preset, key, 'the default')}",
            )
        if key in {"seed", "max_new_tokens"}:
            rest[key] = value
        else:
            preset = replace(preset, **{key: kind(value)})
    return preset, rest


def _flagged(task: Task, preset: Preset, key: str, value: object) -> Preset:
    """Return the preset with one of its switches set."""
    if not isinstance(value, bool):
        raise PromptError(
            "prompt.option",
            f"{key} is {_shown(value)}, expected true or false",
            hint="leave it out",
        )
    if key == "valence" and value and task.grammar == "copy":
        raise PromptError(
            "prompt.option",
            f"{task.name} writes no molecule that the filter valence could look at",
            hint="leave --valence out",
        )
    return (
        replace(preset, valence=value) if key == "valence" else replace(preset, ppl_authors=value)
    )


def _shown(value: object) -> str:
    """Return a value as a message may hold it; one that is no text or number by its kind."""
    plain = isinstance(value, str | int | float) or value is None
    return f"{value!a:.40}" if plain else f"a {type(value).__name__}"


def setting_notes(preset: Preset) -> list[str]:
    """Return what must be said of results that were made with these settings."""
    found = []
    if preset.valence:
        found.append(
            "constraint structure+valence: validity was forced, so the share of valid answers says "
            "nothing about the model; what partialsmiles refuses (metals in linkers and reactants, "
            "uncommon valences) cannot appear; the removed mass is a lower bound"
        )
    if preset.ppl_authors:
        found.append(
            "ppl (authors): perplexity of prompt and answer together, decoded and tokenised again, "
            "as the released scripts print it; for comparison with their files only"
        )
    return found


def preset_document(preset: Preset, extra: Mapping[str, int]) -> dict[str, Any]:
    """Return the preset as the JSON of a reply, with the seed when one was given."""
    return {**asdict(preset), **{key: extra[key] for key in ("seed",) if key in extra}}
