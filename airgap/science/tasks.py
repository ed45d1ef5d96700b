"""Typed tasks: from what a scientist has to a prompt, a budget, settings and a grammar mode.

A user gives a SMILES, a FASTA file, a sequence or a structure and never types a tag. The tasks,
their prompt forms, stop tags and sampling settings are those of the authors' released scripts and
README (repository LOGOS-Hub/LOGOS, commit 66c935a); two of the six published tasks have no script,
and are refused rather than guessed. A budget is computed from the input and refused with the exact
figure when it does not fit: nothing is ever cut.

Standard library only. Chemistry and structures are read in the sealed helper, which calls this.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from airgap.science.fields import RESIDUES, check_field, check_residues
from airgap.science.grammar import annotate, bare, count_words, tagged, write
from airgap.science.refusals import PromptError

SAMPLES_LIMIT = 10_000
STRUCTURE_LIMIT = 12 * 1024 * 1024
"""Largest structure file in characters; the channel to the helper takes 16 MiB."""
SEED_LIMIT = 2**53 - 1
"""Largest integer that a record of the audit log, or any JSON reader, holds exactly."""
WORD_VOCABULARY = 1_024
"""A vocabulary below this size has one entry a chemical word, so that words can be counted."""
AUTHORS_CAP = 1_000
"""New tokens that the authors' scripts allow, whatever the input."""


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


# -- inputs ---------------------------------------------------------------------------------------


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


# -- prompt, budget, settings ----------------------------------------------------------------------


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
            f"{task.name} has no preset {name!a:.40}",
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
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise PromptError(
                "prompt.option",
                f"{key} is {value!a:.40}, expected a {_NUMBERS[kind]} from {low} to {high}",
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
            "prompt.option", f"{key} is {value!a:.40}, expected true or false", hint="leave it out"
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
