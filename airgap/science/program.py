"""The program in the sealed helper: prepare a prompt, assess completions, draw, write SDF.

One JSON object in, one out. It is the only place where RDKit and gemmi read what a user or a model
wrote; after `warm_up` it opens no file, imports nothing and starts no thread.

Requests and replies::

    {"op": "prepare", "task": "retrosynthesis", "inputs": {"smiles": "CCOC(C)=O"},
     "context": {"max_context": 512, "vocab_size": 150, "tags": {"<MoleculeS>": 8, ...},
                 "model": "logos-ref-tiny"}, "options": {"n": 32, "seed": 1, "preset": "ours"}}
    -> {"task", "prompt", "display", "stop", "grammar", "max_new_tokens", "preset", "modality",
        "subject", "input_screen", "unchecked", "notes"}
    {"op": "assess", "task": ..., "inputs": {...}, "samples": [{"index": 0, "text": "...",
     "finish_reason": "eos", "logprob": -4.1, "tokens": 5, "removed_mass": 0.0}, ...]}
       (a sample may carry "ppl_authors")
    -> {"task", "rows", "invalid", "track", "output_screen", "summary", "unchecked", "parts"}
    {"op": "draw", "task": ..., "inputs": {...}, "rows": [...], "track": {...} or null}
    -> {"drawings": {"subject": ["<svg ..>"], "1": ["<svg ..>", ...], ...}, "next": 17 or null}
    {"op": "sdf", "task": ..., "rows": [...]} -> {"sdf": "..."}

Drawings are keyed by the rank of their row; `next` is the number of rows drawn when not all were,
because a reply has a largest size: ask again with the rest.

Long work sends parts `{"event": "progress", "done": 300, "of": 10000}`. An assessment that would
not fit one frame sends its rows as parts `{"event": "part", "rows": [...], "invalid": [...]}` and
ends with empty lists and the number of such `parts`; `results.parse_assessed` joins them.

`inputs` are the same in every request of a run: the helper keeps nothing between requests. In
place of typed inputs they may hold `prompt`, tagged text, which is read into them. A
refusal is a `ProgramError` with a `prompt.*` code, or `request.malformed` for a request that is not
one of these.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rdkit import Chem

from airgap.enclave.channel import ProgramError
from airgap.science import (
    assessment,
    drawing,
    molecules,
    prompts,
    raw,
    screens,
    structures,
    subjects,
    tasks,
)
from airgap.science.checkpoint import require_tokens
from airgap.science.refusals import PromptError
from airgap.science.svg import SVG_LIMIT

Emit = Callable[[bytes], None]

SAMPLE_TEXT_LIMIT = 200_000
TICK_SECONDS = 1.0
ROWS_PER_PART = 300
"""A row of molecules takes under 10 kB, so that a part fits one frame of the channel."""
ALIGN_SECONDS = 6.0
"""Time in one request for turning reactants as they lie in the product."""
REPLY_LIMIT = 3 * 1024 * 1024
"""Largest reply in bytes; the channel takes 4 MiB."""


def create(config: Mapping[str, Any]) -> Program:
    """Return the program; `config` may hold `packs`: paths of screen packs of the site."""
    return Program(config)


class Program:
    """Answers requests; holds the screen packs and nothing about any run."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._screener: screens.Screener | None = None
        self._residues: dict[str, str] = {}

    def warm_up(self) -> dict[str, Any]:
        """Load everything that is ever needed, run each operation once, and say what is loaded."""
        molecules.warm_up()
        structures.warm_up()
        drawing.warm_up()
        self._residues = molecules.residue_smiles()
        packs = screens.load_packs(Path(path) for path in self._config.get("packs", ()))
        self._screener = screens.Screener(*packs)
        _rehearse(self)
        return {
            "pack": self._screener.digest,
            "packs": {f"{pack.name}/{pack.version}": pack.digest for pack in packs},
            "screen": self._screener.mode,
        }

    def handle(self, payload: bytes, emit: Emit) -> bytes:
        """Answer one request; ProgramError for a refusal."""
        request = _parse(payload)
        operation = _OPERATIONS.get(str(request.get("op")))
        if operation is None:
            raise _malformed("`op` is none of " + ", ".join(_OPERATIONS))
        try:
            reply = operation(self, request, emit)
        except PromptError as error:
            raise ProgramError(error.code, error.message, error.hint) from error
        except KeyError as error:
            raise _malformed(f"the request lacks {error}") from error
        raw = _encode(reply)
        if len(raw) > REPLY_LIMIT:
            raise ProgramError(
                "request.limit",
                f"the reply has {len(raw)} bytes, more than {REPLY_LIMIT}",
                "ask for fewer samples at a time",
            )
        return raw

    @property
    def screener(self) -> screens.Screener:
        """The screener; without warm-up there is none, and nothing may run unscreened."""
        if self._screener is None:
            raise _malformed("the program has not been warmed up")
        return self._screener

    def prepare(self, request: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Turn typed input into a prompt with its budget, settings and input screen."""
        del emit
        task, inputs = self.task_and_inputs(request)
        notes = raw.notes(_object(request, "inputs", {}))
        subject, screen = self.subject(task, inputs, notes)
        context = prompts.parse_context(_object(request, "context"))
        preset, extra = tasks.choose_preset(task, _object(request, "options", {}))
        require_tokens(context.tags, task.tokens, model=context.model, task=task.name)
        prompt = prompts.build_prompt(task, subject, self._residues)
        room = prompts.budget(task, subject, prompt, preset, context)
        return {
            "task": task.name,
            "prompt": prompt,
            "display": prompts.display(task, subject),
            "stop": list(task.stop),
            "grammar": prompts.grammar_spec(task, subject),
            "max_new_tokens": prompts.limit_new_tokens(room, extra, task),
            "preset": tasks.preset_document(preset, extra),
            "modality": task.modality,
            "subject": _subject_document(subject),
            "input_screen": screen.document(),
            "unchecked": task.unchecked,
            "notes": [
                *notes,
                *prompts.reference_note(task, context),
                *prompts.budget_note(room, extra),
                *tasks.setting_notes(preset),
            ],
        }

    def task_and_inputs(self, request: Mapping[str, Any]) -> tuple[tasks.Task, dict[str, Any]]:
        """Return the task and its typed inputs; a raw prompt is read into them."""
        name = request.get("task")
        if not isinstance(name, str):
            raise _malformed("`task` is not a text")
        task, inputs = tasks.find_task(name), _object(request, "inputs", {})
        if "prompt" in inputs:
            subjects.check_inputs(task, inputs)
            inputs = raw.typed(task, inputs, self._residues)
        return task, inputs

    def subject(
        self, task: tasks.Task, inputs: Mapping[str, Any], notes: list[str]
    ) -> tuple[subjects.Subject, screens.ScreenResult]:
        """Read the inputs of a task and screen what can be screened."""
        subjects.check_inputs(task, inputs)
        if task.name == "retrosynthesis":
            product = molecules.read_product(
                inputs["smiles"], fix=inputs.get("fix", False), notes=notes
            )
            smiles = molecules.canonical(product)
            if smiles != inputs["smiles"].strip():
                notes.append("the product is written as canonical SMILES")
            # Screen what was typed, not only what was kept of it.
            typed = molecules.read_molecule(inputs["smiles"], "product")
            result = self.screener.screen([product, typed], target=True)
            return subjects.Subject(product=smiles), result
        if "<ProteinS>" in task.tokens:
            subject = _protein(task, inputs, notes)
            return subject, self.screener.nothing("input sequence not screened")
        return subjects.Subject(), self.screener.nothing("no input")

    def assess(self, request: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Turn completions into ranked rows with an output screen."""
        task, inputs = self.task_and_inputs(request)
        subject, _ = self.subject(task, inputs, [])
        samples = _samples(request)
        tick = _Ticker(emit)
        return _split(assessment.assess(task, subject, samples, self.screener, tick), emit)

    def draw(self, request: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Draw the subject and as many rows as fit one reply."""
        task, inputs = self.task_and_inputs(request)
        rows = _rows(request)
        found: dict[str, list[str]] = {}
        size = 0
        until = time.monotonic() + ALIGN_SECONDS
        product = None
        if task.name == "retrosynthesis":
            product = molecules.read_product(
                inputs.get("smiles", ""), fix=inputs.get("fix", False), notes=[]
            )
            found["subject"] = [drawing.draw_molecule(product)]
        if request.get("track"):
            found["subject"] = [drawing.draw_track(_track(request))]
        if task.name == "pocket-ligand":
            protein = _protein(task, inputs, [])
            picture = drawing.draw_pocket(protein.sequence, protein.labels, protein.pockets)
            if len(picture) <= SVG_LIMIT:  # the report states the sequence as text as well
                found["subject"] = [picture]
        tick = _Ticker(emit)
        for number, row in enumerate(rows):
            tick(number, len(rows))
            drawn = _draw_row(task, row, product, until)
            size += sum(map(len, drawn)) + 64
            if size > REPLY_LIMIT - 512_000 and number:
                return {"drawings": found, "next": number}
            found[str(int(row["rank"]))] = drawn
        return {"drawings": found, "next": None}

    def sdf(self, request: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Write the molecules of the rows as SDF with their data fields."""
        del emit
        return {"sdf": "".join(molecules.write_sdf(row) for row in _rows(request))}


class _Ticker:
    """Sends a sign of life about once a second."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self._last = emit, time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if time.monotonic() - self._last >= TICK_SECONDS:
            self._last = time.monotonic()
            self._emit(_encode({"event": "progress", "done": done, "of": of}))


def _split(document: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Send rows as parts where the whole would not fit one frame."""
    document["parts"] = 0
    if len(_encode(document)) <= REPLY_LIMIT:
        return document
    for name in ("rows", "invalid"):
        items, document[name] = document[name], []
        for start in range(0, len(items), ROWS_PER_PART):
            part = {"event": "part", "rows": [], "invalid": []}
            part[name] = items[start : start + ROWS_PER_PART]
            emit(_encode(part))
            document["parts"] += 1
    return document


_OPERATIONS: dict[str, Callable[[Program, Mapping[str, Any], Emit], dict[str, Any]]] = {
    "prepare": Program.prepare,
    "assess": Program.assess,
    "draw": Program.draw,
    "sdf": Program.sdf,
}


def _protein(task: tasks.Task, inputs: Mapping[str, Any], notes: list[str]) -> subjects.Subject:
    if "pdb" in inputs:
        found = structures.read_protein(
            inputs["pdb"],
            chain=inputs.get("chain"),
            ligand=inputs.get("ligand"),
            residues=inputs.get("residues"),
            notes=notes,
        )
        subject = subjects.Subject(
            sequence=found.sequence,
            labels=found.labels,
            pockets=found.pockets,
            source=f"chain {found.chain} of the structure",
        )
    else:
        if given := [name for name in ("chain", "ligand") if name in inputs]:
            raise PromptError(
                "prompt.input",
                f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to a structure",
                hint="give the structure with --pdb",
            )
        sequence, labels, source = subjects.read_sequence(inputs, notes)
        subject = subjects.Subject(sequence=sequence, labels=labels, source=source)
        if "residues" in inputs:
            chosen = subjects.select(inputs["residues"], labels, "residues")
            subject = replace(subject, pockets=tuple(chosen))
    if "region" in inputs:
        subject = subjects.cut_region(subject, inputs["region"])
    return subjects.choose_level(task, subject, inputs.get("level"), notes)


def _subject_document(subject: subjects.Subject) -> dict[str, Any]:
    document = asdict(subject)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in document.items()
    }


def _draw_row(
    task: tasks.Task, row: Mapping[str, Any], product: Chem.Mol | None, until: float
) -> list[str]:
    if task.name == "retrosynthesis" and product is not None:
        reactants = [_molecule(one) for one in row["reactants"]]
        return [drawing.draw_scheme(product, reactants, until=until)]
    if task.name == "material":
        return [drawing.draw_molecule(_molecule(one)) for one in row["linkers"]]
    return [] if task.name == "binding-site" else [drawing.draw_molecule(_molecule(row))]


def _molecule(item: Mapping[str, Any]) -> Chem.Mol:
    return molecules.read_molecule(str(item["smiles"]), "row")


# -- requests -------------------------------------------------------------------------------------


def _malformed(message: str) -> ProgramError:
    return ProgramError(
        "request.malformed", message, "the requests are listed in airgap/science/program.py"
    )


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed("the request is not JSON") from error
    if not isinstance(value, dict):
        raise _malformed("the request is not an object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def _object(
    request: Mapping[str, Any], name: str, default: dict[str, Any] | None = None
) -> dict[str, Any]:
    value = request.get(name, default)
    if not isinstance(value, dict):
        raise _malformed(f"`{name}` is not an object")
    return value


def _rows(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = request.get("rows")
    if not isinstance(rows, list) or len(rows) > tasks.SAMPLES_LIMIT:
        raise _malformed(f"`rows` is not a list of at most {tasks.SAMPLES_LIMIT}")
    if not all(isinstance(row, dict) and type(row.get("rank")) is int for row in rows):
        raise _malformed("a row is not an object with a rank")
    if not all(_has_parts(row) for row in rows):
        raise _malformed("a row has parts without a SMILES")
    return rows


def _has_parts(row: Mapping[str, Any]) -> bool:
    """Return whether every part of a row is an object with a SMILES."""
    for name in ("reactants", "linkers"):
        parts = row.get(name, [])
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("smiles"), str) for part in parts
        ):
            return False
    return isinstance(row.get("smiles", ""), str)


def _track(request: Mapping[str, Any]) -> dict[str, Any]:
    track = _object(request, "track")
    lists = [track.get(name) for name in ("sequence", "labels", "votes")]
    good = isinstance(lists[0], str) and isinstance(lists[1], list) and isinstance(lists[2], list)
    if not good or len({len(one) for one in lists if one is not None}) != 1:
        raise _malformed("`track` has no sequence, labels and votes of one length")
    if type(track.get("copies")) is not int or not all(
        type(vote) is int for vote in lists[2] or ()
    ):
        raise _malformed("`track` has votes that are no numbers")
    return track


def _samples(request: Mapping[str, Any]) -> list[assessment.Sample]:
    items = request.get("samples")
    if not isinstance(items, list) or len(items) > tasks.SAMPLES_LIMIT:
        raise _malformed(f"`samples` is not a list of at most {tasks.SAMPLES_LIMIT}")
    return [_sample(item) for item in items]


def _sample(item: object) -> assessment.Sample:
    kinds: dict[str, tuple[type, ...]] = {
        "index": (int,),
        "text": (str,),
        "finish_reason": (str,),
        "logprob": (int, float),
        "tokens": (int,),
        "removed_mass": (int, float),
    }
    if not isinstance(item, dict):
        raise _malformed("a sample is not an object")
    for name, kind in kinds.items():
        if type(item.get(name)) not in kind:
            raise _malformed(f"a sample has no usable `{name}`")
    authors = item.get("ppl_authors")
    if authors is not None and (type(authors) is not float or not math.isfinite(authors)):
        raise _malformed("a sample has no usable `ppl_authors`")
    sample = assessment.Sample(**{name: item[name] for name in kinds}, ppl_authors=authors)
    finite = math.isfinite(sample.logprob) and math.isfinite(sample.removed_mass)
    if not finite or sample.tokens < 0 or len(sample.text) > SAMPLE_TEXT_LIMIT:
        raise _malformed("a sample has a value out of range")
    return sample


def _rehearse(program: Program) -> None:
    """Run each operation once on harmless input, so that later calls need no import and no file."""
    tags = {tag: number for number, tag in enumerate(_every_tag())}
    context = {"max_context": 4096, "tags": tags}
    sample = {"index": 0, "finish_reason": "eos", "logprob": -1.0, "tokens": 1, "removed_mass": 0.0}
    completions = {
        "retrosynthesis": ({"smiles": "CCOC(C)=O"}, "<MoleculeS>CCO<MoleculeE><MoleculeS>C("),
        "molecule": ({}, "CCO<MoleculeE>"),
        "binding-site": ({"sequence": "MK"}, "M<PocketS>K<PocketE><ProteinE>"),
        "pocket-ligand": ({"fasta": ">a\nMK", "residues": "1"}, "c1ccccc1<MoleculeE>"),
        "material": (
            {},
            "<MetalS>[Zn][O]<MetalE><MoleculeS>[O-]C=O<MoleculeE><MaterialE>",
        ),
    }
    for name, (inputs, text) in completions.items():
        head = {"task": name, "inputs": inputs}
        prepared = program.prepare({**head, "context": context}, _nowhere)
        reply = program.assess({**head, "samples": [{**sample, "text": text}]}, _nowhere)
        program.draw({**head, "rows": reply["rows"], "track": reply["track"]}, _nowhere)
        program.sdf({**head, "rows": reply["rows"]}, _nowhere)
        tagged = {"task": name, "inputs": {"prompt": prepared["prompt"]}}
        program.prepare({**tagged, "context": context}, _nowhere)


def _nowhere(part: bytes) -> None:
    """Drop a part."""


def _every_tag() -> tuple[str, ...]:
    return tuple(sorted({tag for task in tasks.TASKS.values() for tag in task.tokens}))
